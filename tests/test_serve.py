"""The reward server: what it answers to strangers, and the command `tilt serve`."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import pickle
import random
import re
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from reward_server import EXACT, Live, gate, remote, scored

from rewards.backends.reward_messages import JSON, SAFETENSORS, pack
from rewards.images import to_uint8
from tilt.commands import serve
from tilt.server import routes
from tilt.server.requests import BadRequest, read_request

SPEC = f"{EXACT} + 0*jpeg"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live(SPEC) as live:
        yield live


def ask(
    live: Live, body: Any, kind: str = SAFETENSORS, path: str = "/score", **headers: str
) -> tuple[int, Any]:
    """The status and the JSON that a stranger gets for this body."""
    line = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    try:
        line.request("POST", path, body, {"Content-Type": kind} | headers)
        answer = line.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        line.close()


def file(side: int = 8, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def forged(width: int, height: int, depth: int = 8, data: bytes = b"") -> bytes:
    """A PNG file whose header states this size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def asked(*files: Any, **others: Any) -> bytes:
    """A request in JSON, of PNG files."""
    images = [base64.b64encode(f).decode() if isinstance(f, bytes) else f for f in files]
    return json.dumps({"images": images, "prompts": ["a"] * len(files)} | others).encode()


def packed(images: Any = None, text: Any = None, **others: Any) -> bytes:
    """A request in safetensors."""
    images = torch.rand(2, 3, 4, 5) if images is None else images
    text = {"prompts": ["a"] * len(images)} if text is None else text
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    whole = {"images": images, "text": torch.frombuffer(bytearray(raw), dtype=torch.uint8)}
    return safetensors.torch.save(whole | others)


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


DEEP = b"[" * 200_000


NAN = torch.rand(2, 3, 4, 5).index_fill(0, torch.tensor([1]), torch.nan)


MALFORMED = {
    "nothing": (b"", SAFETENSORS, 400),
    "a pickle": (pickle.dumps(Bomb()), SAFETENSORS, 400),
    "a header that is too long": (struct.pack("<Q", 2**60) + b"{}", SAFETENSORS, 400),
    "a cut request": (packed()[:-7], SAFETENSORS, 400),
    "no text": (safetensors.torch.save({"images": torch.rand(1, 3, 4, 4)}), SAFETENSORS, 422),
    "text of floats": (safetensors.torch.save({"images": torch.rand(4), "text": torch.rand(9)}),
                       SAFETENSORS, 422),
    "text that is no JSON": (packed(text=b"prompts"), SAFETENSORS, 400),
    "text that is no UTF-8": (packed(text=b'{"prompts": ["\xff"]}'), SAFETENSORS, 400),
    "text nested too deep": (packed(text=DEEP), SAFETENSORS, 400),
    "numbers of many digits": (packed(text=b"9" * 9999), SAFETENSORS, 400),
    "integers": (packed(torch.ones(2, 3, 4, 4, dtype=torch.int64)), SAFETENSORS, 422),
    "booleans": (packed(torch.ones(2, 3, 4, 4, dtype=torch.bool)), SAFETENSORS, 422),
    "complex numbers": (packed(torch.ones(2, 3, 4, 4, dtype=torch.complex64)), SAFETENSORS, 422),
    "pixels of NaN": (packed(NAN), SAFETENSORS, 422),
    "pixels of 255": (packed(255 * torch.rand(2, 3, 4, 4)), SAFETENSORS, 422),
    "five dimensions": (packed(torch.rand(2, 3, 1, 4, 4)), SAFETENSORS, 422),
    "channels last": (packed(torch.rand(2, 4, 4, 3)), SAFETENSORS, 422),
    "no pixels": (packed(torch.rand(2, 3, 0, 4)), SAFETENSORS, 422),
    "too many pixels": (packed(torch.ones(1, 3, 2**10, 2**10 + 1).byte()), SAFETENSORS, 413),
    "a long side": (packed(torch.rand(1, 3, 1, 16_385)), SAFETENSORS, 413),
    "a long side of a PNG": (asked(forged(1, 16_385)), JSON, 413),
    "too many images": (packed(torch.rand(513, 3, 1, 1)), SAFETENSORS, 413),
    "too many images in JSON": (asked(*[""] * 513), JSON, 413),
    "too many references": (
        packed(text={"prompts": ["a", "b"], "references": [[0], [0]]},
               **{f"reference.{i}": torch.rand(3, 1, 1) for i in range(512)}), SAFETENSORS, 413),
    "too few prompts": (packed(text={"prompts": ["a"]}), SAFETENSORS, 422),
    "prompts that are one text": (packed(text={"prompts": "ab"}), SAFETENSORS, 422),
    "prompts that are no texts": (packed(text={"prompts": [1, None]}), SAFETENSORS, 422),
    "half a character": (packed(text=b'{"prompts": ["a", "\\ud800"]}'), SAFETENSORS, 422),
    "a long prompt": (packed(text={"prompts": ["a", "b" * 20_001]}), SAFETENSORS, 422),
    "an identity that is a list": (
        packed(text={"prompts": ["a", "b"], "identity": ["a"]}), SAFETENSORS, 422),
    "references that are not there": (
        packed(text={"prompts": ["a", "b"], "references": [[0], [1]]}), SAFETENSORS, 422),
    "references of too few images": (
        packed(text={"prompts": ["a", "b"], "references": [[]]}), SAFETENSORS, 422),
    "the same reference twice": (
        packed(text={"prompts": ["a", "b"], "references": [[0, 0], [0]]},
               **{"reference.0": torch.rand(3, 2, 2)}), SAFETENSORS, 422),
    "references that are a number": (
        packed(text={"prompts": ["a", "b"], "references": 7}), SAFETENSORS, 422),
    "references of NaN": (
        packed(text={"prompts": ["a", "b"], "references": [[0], [0]]},
               **{"reference.0": torch.full((3, 2, 2), torch.nan)}), SAFETENSORS, 422),
    "invalid JSON": (b'{"images": [', JSON, 400),
    "a list": (b"[]", JSON, 422),
    "JSON nested too deep": (DEEP, JSON, 400),
    "no images": (b'{"prompts": ["a"]}', JSON, 422),
    "images that are no list": (asked(images="abc"), JSON, 422),
    "an image that is no text": (asked(7), JSON, 422),
    "an image that is no base64": (asked("!!!!"), JSON, 422),
    "an image that is no PNG": (asked(b"GIF89a" + bytes(40)), JSON, 422),
    "an image of three bytes": (asked(b"PNG"), JSON, 422),
    "an address instead of an image": (asked("file:///etc/passwd"), JSON, 422),
    "a cut PNG": (asked(file()[:60]), JSON, 422),
    "a damaged PNG": (asked(file()[:50] + bytes(30) + file()[80:]), JSON, 422),
    "a bomb": (asked(forged(50_000, 50_000, data=bytes(10**6))), JSON, 413),
    "a bomb that lies about its size": (asked(forged(2, 2, data=bytes(10**7))), JSON, 200),
    "a PNG of no pixels": (asked(forged(0, 0)), JSON, 422),
    "a PNG of 16 bits": (asked(forged(4, 4, 16, bytes(100))), JSON, 422),
    "images of two sizes": (asked(file(8), file(9)), JSON, 422),
    "an unknown key": (asked(file(), spec="jpeg"), JSON, 422),
    "references that are no list of lists": (asked(file(), references=["a"]), JSON, 422),
    "a form": (b"a=1", "application/x-www-form-urlencoded", 415),
    "a simple request of a web page": (asked(file()), "text/plain", 415),
    "a request made for another reward": (asked(file(), identity="another"), JSON, 409),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_gets_one_sentence_and_the_server_goes_on(
    live, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    body, kind, wanted = MALFORMED[name]
    status, answer = ask(live, body, kind)
    assert status == wanted, answer
    if wanted != 200:
        assert list(answer) == ["detail"]
        assert 10 < len(answer["detail"]) < 400
        assert "\n" not in answer["detail"]
    assert not list(tmp_path.iterdir())
    images = torch.rand(1, 3, 4, 4)
    assert torch.equal(remote(live.url)(images, ["a"]), live.reward(images, ["a"]))


def test_pictures_in_json_have_the_scores_of_the_same_pictures_here(live):
    images = (torch.rand(2, 3, 6, 7) * 255).round() / 255
    files = []
    for picture in to_uint8(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    status, answer = ask(live, asked(*files, references=None), JSON)
    assert status == 200
    total, parts = live.reward.evaluate(images, ["a", "a"])
    assert answer["total"] == total.tolist()
    assert answer["components"] == {name: part.tolist() for name, part in parts.items()}
    assert answer["dtypes"] == {"fingerprint": "float64", "jpeg": "float32"}
    assert answer["identity"] == live.served.identity


def test_damaged_requests_of_every_kind_are_refused_and_nothing_else_happens(live):
    """Bytes of good requests are changed at random; whatever is not read is a BadRequest."""
    rng = random.Random(0)
    references = [[torch.rand(3, 3, 3)], [torch.rand(3, 4, 4)]]
    good = [
        (pack(torch.rand(2, 3, 4, 5), ["a", "b"], references, "x").body, SAFETENSORS),
        (asked(file(), file(mode="L"), references=[[], [base64.b64encode(file()).decode()]]), JSON),
        (file(16), ""),
    ]
    statuses = []
    for turn in range(600):
        body, kind = good[turn % 3]
        found = bytearray(body)
        for _ in range(rng.randint(1, 4)):
            found[rng.randrange(min(len(found), rng.choice([40, 400, 10**6])))] = rng.randrange(256)
        if rng.random() < 0.2:
            del found[rng.randrange(len(found)) :]
        raw, kind = (asked(bytes(found)), JSON) if not kind else (bytes(found), kind)
        try:
            read_request(raw, kind, live.served)
        except BadRequest as error:
            statuses.append(error.status)
    assert len(statuses) > 200
    assert set(statuses) <= {400, 413, 422}


def test_the_body_is_measured_while_it_is_read_and_not_where_it_says_so(live):
    status, answer = ask(live, iter([bytes(1 << 20)] * 5))  # chunked, without a length
    assert (status, answer["detail"][:24]) == (413, "the request has more tha")
    line = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    line.putrequest("POST", "/score")
    line.putheader("Content-Type", JSON)
    line.putheader("Content-Length", str(1 << 40))
    line.endheaders()
    assert line.getresponse().status == 413  # without reading any of it
    line.close()
    status, _ = ask(live, b"", JSON, **{"Content-Encoding": "gzip"})
    assert status == 415
    assert live.scorer.waiting == 0


def test_who_begins_a_request_and_does_not_end_it_is_let_go(live, monkeypatch):
    monkeypatch.setattr(routes, "READING", 0.1)
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as line:
        head = (
            f"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: {JSON}\r\nContent-Length: 99\r\n\r\n"
        )
        line.sendall(head.encode() + b"{")
        assert line.recv(4096).startswith(b"HTTP/1.1 408")
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as line:
            line.sendall(head.encode() + b"{")
    assert ask(live, asked(file()), JSON)[0] == 200
    for _ in range(100):
        if not live.scorer.waiting:
            break
        time.sleep(0.02)
    assert live.scorer.waiting == 0


def waiting(live: Live, bodies: list[bytes]) -> list[http.client.HTTPConnection]:
    """Connections that have asked for these; the first of them holds up the others."""
    lines = [http.client.HTTPConnection("127.0.0.1", live.port, timeout=20) for _ in bodies]
    gate.clear()
    for count, (line, body) in enumerate(zip(lines, bodies, strict=True), 1):
        line.request("POST", "/score", body, {"Content-Type": JSON})
        while live.scorer.waiting < min(count, live.scorer.queue):
            time.sleep(0.005)
    return lines


def test_who_has_gone_is_not_scored_for():
    with Live("reward_server:gated") as live:
        bodies = [asked(file(), prompts=["wait" if i == 0 else f"gone {i}"]) for i in range(6)]
        for line in waiting(live, bodies):
            line.close()
        assert live.scorer.waiting == 6
        time.sleep(0.3)  # until the ends of the connections have arrived
        gate.set()
        assert ask(live, asked(file(), prompts=["last"]), JSON)[0] == 200
        assert [prompt for prompt in scored if "gone" in prompt] == []
        assert scored[-1] == "last"


def test_a_full_queue_answers_at_once_when_to_come_back():
    with Live("reward_server:gated", queue=2) as live:
        *lines, third = waiting(live, [asked(file(), prompts=["wait"])] * 3)
        answer = third.getresponse()
        assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
        assert b"2 requests are waiting" in answer.read()
        third.request("GET", "/reward")  # is answered all the same
        assert json.loads(third.getresponse().read())["identity"] == live.served.identity
        gate.set()
        assert [line.getresponse().status for line in lines] == [200, 200]
        for line in (*lines, third):
            line.close()


def test_what_is_served_is_described(live):
    line = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    line.request("GET", "/reward")
    said = json.loads(line.getresponse().read())
    assert said == {
        "protocol": "tilt reward 1",
        "spec": f"{EXACT} + 0*jpeg",
        "identity": live.served.identity,
        "components": ["fingerprint", "jpeg"],
        "range": [None, None],
        "differentiable": False,
        "wants_references": False,
        "needs_references": False,
        "max_bytes": 1 << 22,
        "max_images": 512,
        "max_pixels": 1 << 20,
    }
    for path in ("/docs", "/openapi.json", "/", "/reward/"):
        line.request("GET", path)
        answer = line.getresponse()
        answer.read()
        assert answer.status in (404, 307), path
    line.close()
    assert ask(live, b'{"prompts": "abc"}', JSON, "/check")[0] == 422
    assert ask(live, b'{"prompts": ["a"]}', JSON, "/check") == (200, {})
    assert ask(live, packed(), SAFETENSORS, "/check")[0] == 415


def test_the_command_refuses_in_one_line(capsys, monkeypatch):
    def said(*words: str) -> str:
        assert serve.main([*words, "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert re.match(
            r"tilt serve: cannot listen on .*: try another --port", said("jpeg", "--port", port)
        )
    assert "cannot listen on nowhere.invalid" in said("jpeg", "--host", "nowhere.invalid")
    assert "there is no reward 'jpegg'" in said("jpegg", "--port", "0")
    assert "REWARD is '' but must be given" in said()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'tilt-diffusion[serve]'" in said("jpeg", "--port", "0")


def test_only_this_machine_is_served_unless_asked():
    assert serve.Serve("jpeg").host == "127.0.0.1"
    for host, family in (("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET)):
        with serve.bound(host, 0) as found:
            assert found.getsockname()[0] == host
            assert found.family == family
            assert found.proto == socket.IPPROTO_TCP  # or each answer waits 40 ms for its end
