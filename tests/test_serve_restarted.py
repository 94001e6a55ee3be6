"""A server that is killed and started again in the middle of a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_server import EXACT

import rewards
from rewards.images import to_uint8
from tilt.score_table import read_table

ROOT = Path(__file__).parents[1]


class Process:
    """`tilt serve` in a process of its own, which can be killed and started again."""

    def __init__(self, spec: str, port: int = 0) -> None:
        line = [sys.executable, "-m", "tilt", "serve", spec, "--port", str(port), "--device", "cpu"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.core = subprocess.Popen(
            line, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
        )
        assert self.core.stdout
        said = self.core.stdout.readline()
        found = re.fullmatch(
            r"serving (.+) at (http://127\.0\.0\.1:(\d+)) \(Ctrl-C stops it\)\n", said
        )
        assert found, said
        self.url, self.port = found[2], int(found[3])

    def end(self, how: int) -> int:
        self.core.send_signal(how)
        status = self.core.wait(30)
        assert self.core.stdout
        self.core.stdout.close()
        return status


@pytest.mark.slow
def test_a_server_killed_and_started_again_in_mid_run_loses_no_step(tmp_path):
    """Eight processes score by one server, which is killed twice; every score is the local one."""
    images = (torch.rand(40, 3, 16, 16) * 255).round() / 255
    for i, picture in enumerate(to_uint8(images)):
        Image.fromarray(picture).save(tmp_path / f"{i:02}.png")
    rows = [{"image": f"{i:02}.png", "prompt": f"p{i}"} for i in range(40)]
    for client in range(8):
        (tmp_path / f"{client}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = "reward_server:unhurried"
    server = Process(spec)
    line = [sys.executable, "-m", "tilt", "score", "--device", "cpu", "--batch-size", "1"]
    line += ["--reward", f"remote({server.url}, timeout=20, retries=12)"]
    clients = [
        subprocess.Popen([*line, f"{i}.jsonl", "--out", f"{i}.csv"], cwd=tmp_path,
                         env=os.environ | {"PYTHONPATH": str(ROOT)},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for i in range(8)
    ]  # fmt: skip
    try:
        for done in (3, 15):
            while _rows(tmp_path) < done:
                assert any(client.poll() is None for client in clients)
                time.sleep(0.02)
            assert server.end(signal.SIGKILL) == -signal.SIGKILL
            server = Process(spec, server.port)
        for client in clients:
            _, said = client.communicate(timeout=240)
            assert client.returncode == 0, said
            assert "have no score" not in said
    finally:
        assert server.end(signal.SIGINT) == 0
    expected = rewards.load(EXACT, imports=True)(images, [f"p{i}" for i in range(40)]).tolist()
    for i in range(8):
        found = read_table(tmp_path / f"{i}.csv")
        assert [row["reward"] for row in found] == expected


def _rows(folder: Path) -> int:
    """The rows that the slowest client has written."""
    parts = [folder / f"{i}.csv.part" for i in range(8)]
    return min(len(p.read_text().splitlines()) if p.exists() else 0 for p in parts)
