"""The reward `remote` where something fails: servers that are away, slow, full, or impostors."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from reward_server import EXACT, Live, gate, pictures, remote
from tiny_pipelines import family
from trainers import grpo, weights_of

import rewards
from rewards.backends import reward_client

SPEC = f"0.5*{EXACT} + jpeg"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live("jpeg") as live:
        yield live


def test_a_training_run_whose_server_is_started_again_is_the_local_run():
    live, calls = Live(EXACT), 0
    remotely = remote(live.url, retries=30).evaluate

    def scored(images: torch.Tensor, prompts: list[str]) -> Any:
        nonlocal live, calls
        calls += 1
        if calls == 2:
            live.stop()
            threading.Timer(0.2, start).start()
        return remotely(images, prompts)

    def start() -> None:
        nonlocal live
        live = Live(EXACT, live.port)

    weights = []
    try:
        for score in (live.reward.evaluate, scored):
            torch.manual_seed(0)
            trainer = grpo(*family("sd3"), score=score, micro_groups=1)
            for _ in range(2):
                assert trainer.train_step()["dropped"] == 0
            weights.append(weights_of(trainer))
    finally:
        live.stop()
    assert calls == 6
    assert torch.equal(*weights)


def test_a_server_that_is_away_for_a_while_costs_no_score():
    live, images, prompts = Live(SPEC), pictures(24), [f"p{i}" for i in range(24)]
    reward, local = remote(live.url, batch_size=2, concurrency=3, retries=30), live.reward
    expected, stopped = local(images, prompts), threading.Event()

    def restart() -> None:
        nonlocal live
        time.sleep(0.03)
        live.stop()
        stopped.set()
        time.sleep(0.15)
        live = Live(SPEC, live.port)

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        while thread.is_alive():
            assert torch.equal(reward(images, prompts), expected)
        assert stopped.is_set()
        assert torch.equal(reward(images, prompts), expected)
    finally:
        thread.join()
        live.stop()


def test_nobody_there_is_nan_after_the_retries_and_is_said(caplog):
    live = Live(SPEC)
    reward = remote(live.url, retries=3, batch_size=2)
    live.stop()
    with caplog.at_level(logging.WARNING):
        total, parts = reward.evaluate(pictures(3), ["a", "b", "c"])
    assert total.isnan().all()
    assert [len(part) for part in parts.values()] == [3, 3]
    assert re_said(caplog)[-1] == (
        f"3 of 3 images have no score: the reward server at {live.url} failed 4 times; the last "
        "time it could not be reached (ConnectError)"
    )
    assert any(line.endswith("trying again") for line in re_said(caplog))
    with pytest.raises(ValueError, match="failed 4 times"):
        reward.check(["a"])


def re_said(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_what_takes_too_long_is_nan_and_the_rest_is_not(caplog):
    with Live("reward_server:gated") as live:
        reward = remote(live.url, timeout=1, retries=1, batch_size=1, concurrency=1)
        gate.clear()
        try:
            scores = reward(pictures(3), ["a", "ab", "wait"])
        finally:
            gate.set()
    assert scores[:2].tolist() == [1, 2]
    assert scores[2].isnan()
    assert re_said(caplog)[-1].startswith("1 of 3 images have no score")
    assert "failed 2 times; the last time it did not answer within 1 s" in re_said(caplog)[-1]


def test_a_failure_of_the_reward_is_tried_again_and_its_refusal_is_not(caplog):
    caplog.set_level(logging.CRITICAL, "tilt.serve")
    caplog.set_level(logging.WARNING)
    with Live("reward_server:odd") as odd:
        reward = remote(odd.url, retries=99, batch_size=1)
        once, sent = reward.client._once, []
        reward.client._once = lambda *words: sent.append(words) or once(*words)
        scores = reward(pictures(2), ["break", "3"])
        assert scores[0].isnan()
        assert scores[1] == 3
        assert len(sent) == 3 + 1  # an error in the code of a reward would never pass
        assert re_said(caplog)[-1].endswith(
            "failed 3 times; the last time it answered HTTP 500 "
            "(the reward failed with RuntimeError: out of memory)"
        )
        sent.clear()
        with pytest.raises(
            ValueError, match="HTTP 422: the prompt 'refuse' cannot be scored: write a"
        ):
            reward(pictures(3), ["1", "refuse", "2"])
        assert len(sent) <= 3


def test_a_full_queue_is_waited_for():
    with Live("reward_server:unhurried", queue=1) as live:
        reward = remote(live.url, batch_size=1, concurrency=4, retries=50)
        reward_client.LONGEST_ASKED, before = 0.0, reward_client.LONGEST_ASKED
        try:
            images, prompts = pictures(6), ["a"] * 6
            assert torch.equal(reward(images, prompts), live.reward(images, prompts))
        finally:
            reward_client.LONGEST_ASKED = before


def test_a_server_with_another_reward_is_refused_in_mid_run():
    live = Live("jpeg")
    reward = remote(live.url)
    assert reward(pictures(1), ["a"]).isfinite().all()
    live.stop()
    with (
        Live("jpeg(mode=incompressibility)", live.port),
        pytest.raises(ValueError, match=r"HTTP 409: this server serves jpeg\(mode=incompressib"),
    ):
        reward(pictures(1), ["a"])
    with Live("jpeg", live.port):
        assert reward(pictures(1), ["a"]).isfinite().all()


class Impostor:
    """Answers every request by reply(method, path): status, headers, body."""

    def __init__(self, reply: Any) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append(self.path)
                status, headers, body = reply(self.command, self.path)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_CONNECT = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.core = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.core.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.core.server_address[1]}"
        self.thread = threading.Thread(target=self.core.serve_forever, args=(0.01,))
        self.thread.start()

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.core.shutdown()
        self.core.server_close()
        self.thread.join()


def test_proxies_of_the_environment_are_not_used(live, monkeypatch):
    with Impostor(lambda *_: (502, {}, b"")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert remote(live.url)(pictures(1), ["a"]).isfinite().all()
        assert proxy.asked == []


def test_a_redirect_is_not_followed(live):
    with Impostor(lambda *_: (302, {"Location": f"{live.url}/reward"}, b"")) as other:
        with pytest.raises(ValueError, match=r"no reward server at .* HTTP 302"):
            remote(other.url)
        assert other.asked == ["/reward"]


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"protocol": "tilt reward 1", "range": [NaN, 1]}']
)
def test_another_service_is_no_reward_server(body):
    with (
        Impostor(lambda *_: (200, {}, body)) as other,
        pytest.raises(ValueError, match=f"there is no reward server at {other.url}"),
    ):
        remote(other.url)


GOOD = {"dtype": "float32", "total": [1, 2], "components": {"jpeg": [1, 2]},
        "dtypes": {"jpeg": "float32"}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"identity": "another"}, "serves another reward than jpeg"),
        ({}, "serves another reward"),
        ({"total": [1]}, "sent an answer, but it holds no scores of 2 images"),
        ({"total": [1, True]}, "no scores"),
        ({"total": [1, "nan"]}, "no scores"),
        ({"total": None}, "no scores"),
        ({"dtype": "int8"}, "no scores"),
        ({"components": {}}, "no scores"),
        ({"total": [1, 10**400]}, "no scores"),
        ("[" * 100_000, "no scores"),
    ],
)
def test_an_answer_is_read_with_care(change, said):
    with Live("jpeg") as live:
        about = json.dumps(live.served.to_json()).encode()
    text = change if isinstance(change, str) else json.dumps({"identity": ""} | GOOD | change)

    def reply(method: str, path: str) -> Any:
        return 200, {}, about if path == "/reward" else text.encode()

    with Impostor(reply) as other, pytest.raises(ValueError, match=said):
        remote(other.url)(pictures(2), ["a", "b"])


def test_an_address_where_nobody_listens_is_said_soon():
    with Live("jpeg") as live:
        pass
    with pytest.raises(ValueError, match=f"{live.url} failed 3 times.*start one there, or correct"):
        rewards.load(f"remote({live.url})", imports=True)
