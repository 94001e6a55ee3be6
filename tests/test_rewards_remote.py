"""The reward `remote` against servers in threads: exact scores, references, limits, refusals."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from reward_server import EXACT, Live, pictures, remote

import rewards
from rewards.backends.reward_messages import pack
from rewards.combine import names_in
from rewards.images import to_uint8
from tilt.server.scorer import Scorer

SPEC = f"0.5*{EXACT} + jpeg"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


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


def test_prompts_are_checked_by_the_served_reward():
    with Live("objects") as live:
        reward = rewards.load(f"remote({live.url})", imports=True)
        reward.check(["two red circles"])
        with pytest.raises(ValueError, match="unheard") as there:
            reward.check(["a thing unheard of"])
        with pytest.raises(ValueError, match="unheard") as here:
            live.reward.check(["a thing unheard of"])
        assert str(there.value) == f"{live.url} answered HTTP 422: {here.value}"


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


def test_images_are_divided_to_fit_the_limits_of_the_server():
    images, prompts = pictures(7), ["a"] * 7
    with Live(SPEC, max_bytes=4000) as live:  # one image is 1512 bytes
        assert torch.equal(remote(live.url)(images, prompts), live.reward(images, prompts))
    with Live(SPEC, max_pixels=300) as live:
        assert torch.equal(remote(live.url)(images, prompts), live.reward(images, prompts))
    said = r"is 1 images of 126 pixels in \d+ bytes, but .* accepts 512, 100 and 4194304 at once"
    with Live(SPEC, max_pixels=100) as live, pytest.raises(ValueError, match=said):
        remote(live.url)(images, prompts)


@pytest.mark.parametrize(
    "options",
    ['url=""', "url=localhost:7870", "url=ftp://a", '"http://me:key@a"', '"http://a?b=1"', "url=1",
     '"http://a:99999"', "http://a, timeout=0", "http://a, timeout=nan", "http://a, retries=-1",
     "http://a, concurrency=0", "http://a, batch_size=0", "http://a, retries=true"],
)  # fmt: skip
def test_arguments_are_refused_before_a_server_is_asked(options):
    with pytest.raises(ValueError, match=r"remote|batch_size"):
        rewards.load(f"remote({options})", imports=True)


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
