"""The reward `remote` against servers in threads: exact scores, failures, restarts, refusals."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image
from reward_server import EXACT, Live, gate, remote
from test_grpo import trainer_of, weights_of

import rewards
from rewards.backends import reward_client
from rewards.backends.reward_messages import pack
from rewards.combine import names_in
from rewards.images import to_uint8
from tilt.server.scorer import Scorer

SPEC = f"0.5*{EXACT} + jpeg"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pictures(n: int, seed: int = 0, size: tuple[int, int] = (9, 14)) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exact():
    with Live(SPEC) as live:
        yield live


@pytest.fixture(scope="module")
def odd():
    with Live("reward_server:odd + 0*jpeg") as live:
        yield live


def test_eight_clients_at_once_get_exactly_the_local_scores(exact):
    spec = f"remote({exact.url}, batch_size=5)"

    def client(i: int) -> bool:
        reward, same = rewards.load(spec, imports=True), True
        for turn in range(3):
            images = pictures(13, 10 * i + turn).to(DTYPES[i % 4])
            images = images if turn else (images * 255).round() / 255
            prompts = [f"{i} {turn} {row}" for row in range(13)]
            total, parts = reward.evaluate(images, prompts)
            local, own = exact.reward.evaluate(images, prompts)
            same &= total.dtype == local.dtype and torch.equal(total, local)
            same &= all(torch.equal(parts[name], own[name]) for name in own)
            same &= all(parts[name].dtype == own[name].dtype for name in own)
        return same

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(client, range(8)))


@pytest.mark.parametrize("reciprocal", [False, True])
def test_images_of_bytes_travel_as_bytes_however_they_were_divided(exact, reciprocal):
    numbers = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)[None]
    images = numbers.float() * torch.tensor(1 / 255) if reciprocal else numbers.float() / 255
    made = pack(images, ["a"], None, "")
    assert (len(made.body) < 1500, made.images, made.pixels) == (True, 1, 256)
    assert torch.equal(remote(exact.url)(images, ["a"]), exact.reward(images, ["a"]))
    nearly = images.clone()
    nearly[0, 0, 0, 3] = torch.nextafter(nearly[0, 0, 0, 3], torch.tensor(1.0))
    assert len(pack(nearly, ["a"], None, "").body) > 3 * 256 * 4
    assert torch.equal(remote(exact.url)(nearly, ["a"]), exact.reward(nearly, ["a"]))


def test_images_may_be_transposed_out_of_range_by_rounding_or_need_a_gradient(exact):
    images = pictures(2).transpose(2, 3).mul(1.001).requires_grad_()
    scores = remote(exact.url)(images, ["a", "é"])
    assert not scores.requires_grad
    assert torch.equal(scores, exact.reward(images, ["a", "é"]))


def test_in_a_sum_the_components_are_reported_and_what_the_server_says_is_taken_over(exact):
    spec = f"size=jpeg + 2*mine=remote({exact.url})"
    reward = rewards.load(spec, imports=True)
    _, parts = reward.evaluate(pictures(2), ["a", "b"])
    assert list(parts) == ["size", "mine", "fingerprint", "jpeg"]
    assert names_in(rewards.spelled(spec, imports=True)) == list(parts)
    assert rewards.load(reward.spec, imports=True) == reward
    assert rewards.spelled(spec, imports=True) == reward.spec
    torch.testing.assert_close(parts["mine"], 0.5 * parts["fingerprint"] + parts["jpeg"])
    assert not reward.differentiable
    assert not reward.wants_references
    with Live("0.5*jpeg") as one:
        reward = rewards.load(f"min(remote({one.url}), clip_above(jpeg, at=0))", imports=True)
        assert reward.range == (None, 0.0)
        _, parts = reward.evaluate(pictures(1), ["a"])
        assert list(parts) == ["min", "remote", "clip_above_jpeg", "jpeg"]
        assert parts["remote"] == 0.5 * parts["jpeg"]
    with pytest.raises(ValueError, match="two components are called 'jpeg'; name them"):
        rewards.load(f"jpeg + remote({exact.url})", imports=True)


def test_the_identity_of_a_remote_is_that_of_what_its_server_serves(exact):
    text = f"0.1*remote({exact.url}) + ocr"
    before = rewards.identity(text)
    with Live(SPEC) as same:
        assert rewards.identity(f"ocr + min(remote({same.url}), jpeg)") == before
    with Live("jpeg") as other:
        assert rewards.identity(f"remote({other.url})") != before
    with Live("2*jpeg") as twice, Live("jpeg") as once:  # of the same code and files
        assert twice.served.identity != once.served.identity


def test_numbers_that_are_none_and_infinite_ones_arrive_and_so_do_double_ones(odd):
    prompts = ["nan", "inf", "-inf", "0.1", "1e300", "-0.0"]
    reward = rewards.load(f"remote({odd.url})", imports=True)
    total, parts = reward.evaluate(pictures(6), prompts)
    assert total.dtype == parts["odd"].dtype == torch.float64
    assert total.isnan().tolist() == [True] + 5 * [False]
    assert total[1:5].tolist() == [math.inf, -math.inf, 0.1, 1e300]
    assert math.copysign(1, total[5]) == 1  # 0 + -0, as in a local sum
    assert parts["jpeg"].dtype == torch.float32


def test_infinite_bounds_are_none_and_gradients_end_at_the_server():
    with Live("2*reward_server:Boundless") as live:
        reward = remote(live.url)
        assert reward.range == (None, None)
        images = pictures(3).requires_grad_()
        assert live.reward(images, ["a"] * 3).requires_grad
        assert not reward(images, ["a"] * 3).requires_grad


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
            trainer = trainer_of(score=score, micro_groups=1)
            for _ in range(2):
                assert trainer.train_step()["dropped"] == 0
            weights.append(weights_of(trainer))
    finally:
        live.stop()
    assert calls == 6
    assert torch.equal(*weights)


def test_no_images_give_no_scores_without_a_request(exact):
    reward = remote(exact.url)
    reward.client.url = "http://127.0.0.1:1"
    total, parts = reward.evaluate(pictures(0), [])
    assert total.shape == parts["jpeg"].shape == (0,)


def test_references_arrive_whatever_form_they_have_and_each_only_once():
    spec = "reward_server:likeness"
    tall, wide = pictures(3, 1), pictures(2, 2, (5, 20))
    shared = [tall[0], Image.fromarray(to_uint8(wide)[0])]
    entries: list[Any] = [shared, tall, to_uint8(wide), wide[1], shared]
    local = rewards.load(spec, imports=True)
    lists = [shared, [*tall], [to_uint8(wide)], [wide[1]], shared]
    images, prompts = pictures(5), ["a"] * 5
    with Live(spec) as live:
        reward = remote(live.url)
        assert reward.wants_references
        found = reward(images, prompts, references=entries)
        assert torch.equal(found, local(images, prompts, references=lists))
        assert torch.equal(reward(images[:1], ["a"], references=torch.stack([tall])[:, :1])[:1],
                           local(images[:1], ["a"], references=[[tall[0]]]))  # fmt: skip
        once = pack(images, prompts, [shared] * 5, "")
        assert once.images == 5 + 2
        assert pack(images, prompts, [list(shared) for _ in range(5)], "").images == 5 + 5 * 2
        with pytest.raises(ValueError, match="5 images need references of 5 entries but got 2"):
            reward(images, prompts, references=entries[:2])
        assert not rewards.load(f"remote({live.url})", imports=True).needs_references  # optional
    with Live("delta(jpeg)") as live:
        images = pictures(2)
        here = rewards.load("delta(jpeg)")(images, ["a", "b"], references=[images[1:], images[:1]])
        there = remote(live.url)(images, ["a", "b"], references=[images[1:], images[:1]])
        assert torch.equal(here, there)
        with pytest.raises(ValueError, match=r"HTTP 422: delta compares with reference images"):
            remote(live.url)(images, ["a", "b"])
        assert rewards.load(f"remote({live.url})", imports=True).needs_references


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


def test_a_failure_of_the_reward_is_tried_again_and_its_refusal_is_not(odd, caplog):
    caplog.set_level(logging.CRITICAL, "tilt.serve")
    caplog.set_level(logging.WARNING)
    reward = remote(odd.url, retries=99, batch_size=1)
    once, sent = reward.client._once, []
    reward.client._once = lambda *words: sent.append(words) or once(*words)
    scores = reward(pictures(2), ["break", "3"])
    assert scores[0].isnan()
    assert scores[1] == 3
    assert len(sent) == 3 + 1  # an error in the code of a reward would never pass
    assert re_said(caplog)[-1].endswith(
        "failed 3 times; the last time it answered HTTP 500 (the reward failed with RuntimeError: "
        "out of memory)"
    )
    sent.clear()
    with pytest.raises(ValueError, match="HTTP 422: the prompt 'refuse' cannot be scored: write a"):
        reward(pictures(3), ["1", "refuse", "2"])
    assert len(sent) <= 3


def test_prompts_are_checked_by_the_served_reward():
    with Live("objects") as live:
        reward = rewards.load(f"remote({live.url})", imports=True)
        reward.check(["two red circles"])
        with pytest.raises(ValueError, match="unheard") as there:
            reward.check(["a thing unheard of"])
        with pytest.raises(ValueError, match="unheard") as here:
            live.reward.check(["a thing unheard of"])
        assert str(there.value) == f"{live.url} answered HTTP 422: {here.value}"


def test_a_full_queue_is_waited_for():
    with Live("reward_server:unhurried", queue=1) as live:
        reward = remote(live.url, batch_size=1, concurrency=4, retries=50)
        reward_client.LONGEST_ASKED, before = 0.0, reward_client.LONGEST_ASKED
        try:
            images, prompts = pictures(6), ["a"] * 6
            assert torch.equal(reward(images, prompts), live.reward(images, prompts))
        finally:
            reward_client.LONGEST_ASKED = before


def test_no_more_connections_than_allowed_and_one_request_scored_at_a_time(monkeypatch):
    busy, most, there, lock = 0, [0, 0], Scorer.score, threading.Lock()

    def score(self: Any, body: bytes, kind: str) -> bytes:
        nonlocal busy
        with lock:
            busy += 1
            most[:] = max(most[0], busy), max(most[1], self.waiting)
        time.sleep(0.01)
        with lock:
            busy -= 1
        return there(self, body, kind)

    monkeypatch.setattr(Scorer, "score", score)
    with Live("jpeg") as live:
        reward = remote(live.url, batch_size=1, concurrency=3)
        with ThreadPoolExecutor(4) as pool:  # the bound holds for all threads together
            list(pool.map(lambda _: reward(pictures(4), ["a"] * 4), range(4)))
    assert most[0] == 1
    assert 1 < most[1] <= 3


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


def test_images_are_divided_to_fit_the_limits_of_the_server():
    images, prompts = pictures(7), ["a"] * 7
    with Live(SPEC, max_bytes=4000) as live:  # one image is 1512 bytes
        assert torch.equal(remote(live.url)(images, prompts), live.reward(images, prompts))
    with Live(SPEC, max_pixels=300) as live:
        assert torch.equal(remote(live.url)(images, prompts), live.reward(images, prompts))
    said = r"is 1 images of 126 pixels in \d+ bytes, but .* accepts 512, 100 and 4194304 at once"
    with Live(SPEC, max_pixels=100) as live, pytest.raises(ValueError, match=said):
        remote(live.url)(images, prompts)


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


def test_proxies_of_the_environment_are_not_used(exact, monkeypatch):
    with Impostor(lambda *_: (502, {}, b"")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert remote(exact.url)(pictures(1), ["a"]).isfinite().all()
        assert proxy.asked == []


def test_a_redirect_is_not_followed(exact):
    with Impostor(lambda *_: (302, {"Location": f"{exact.url}/reward"}, b"")) as other:
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


@pytest.mark.parametrize(
    "options",
    ['url=""', "url=localhost:7870", "url=ftp://a", '"http://me:key@a"', '"http://a?b=1"', "url=1",
     '"http://a:99999"', "http://a, timeout=0", "http://a, timeout=nan", "http://a, retries=-1",
     "http://a, concurrency=0", "http://a, batch_size=0", "http://a, retries=true"],
)  # fmt: skip
def test_arguments_are_refused_before_a_server_is_asked(options):
    with pytest.raises(ValueError, match=r"remote|batch_size"):
        rewards.load(f"remote({options})", imports=True)


def test_an_address_where_nobody_listens_is_said_soon():
    with Live("jpeg") as live:
        pass
    with pytest.raises(ValueError, match=f"{live.url} failed 3 times.*start one there, or correct"):
        rewards.load(f"remote({live.url})", imports=True)


def test_untrusted_text_may_not_send_requests():
    with pytest.raises(ValueError, match=r"remote reaches outside of Tilt by url='http://a'"):
        rewards.load("remote(http://a)")


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(ValueError, match=r"pip install 'tilt-diffusion\[serve\]'"):
        rewards.load("remote(http://127.0.0.1:1)", imports=True)


def test_it_can_be_pickled_and_copied(exact):
    reward = rewards.load(f"remote({exact.url})", imports=True)
    images, expected = pictures(2), reward(pictures(2), ["a", "b"])
    for again in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
        assert again == reward
        assert torch.equal(again(images, ["a", "b"]), expected)
