"""The judge, against a real HTTP server in a thread."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from judge_server import Reply, Server, first_tokens, grey, pictures, question, says

import rewards
from rewards.backends import chat_endpoint
from rewards.models.vlm_judge import PRESETS, JudgeReward

KEY = "sk-very-secret"


def level(body: Any) -> int:
    """The grey of the picture that was sent."""
    return int(picture(body)[0, 0, 0])


def picture(body: Any) -> np.ndarray:
    (found,) = pictures(body)
    return found


def test_a_request_holds_the_picture_as_it_is_the_question_and_the_key_and_is_greedy(
    server, monkeypatch
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    images = (torch.arange(3 * 5 * 9).view(1, 3, 5, 9) / 255).float()
    judge = server.judge(key_env="JUDGE_KEY", question="Is it {prompt}? {x} {prompt}")
    scores = judge(images, ["a {prompt} {0.__class__} %s"])
    assert scores.tolist() == [0.5]
    (body,) = server.bodies
    assert question(body) == "Is it a {prompt} {0.__class__} %s? {x} a {prompt} {0.__class__} %s"
    np.testing.assert_array_equal(
        picture(body), np.arange(135, dtype=np.uint8).reshape(3, 5, 9).transpose(1, 2, 0)
    )
    assert (body["model"], body["temperature"], body["seed"]) == ("tiny-judge", 0, 0)
    assert body["max_tokens"] == 512
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_without_key_env_no_key_is_sent(server):
    server.judge()(grey(1), ["a"])
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_passing_error_is_tried_again(server, status):
    server.reply = lambda n, _: (status, {}, b"no") if n < 2 else says("Score: 7")
    assert server.judge(retries=2)(grey(1), ["a"]).tolist() == pytest.approx([0.7])
    assert len(server.bodies) == 3


def test_retries_end_and_the_wait_doubles_or_is_what_the_server_asks(server, monkeypatch):
    waits = []
    monkeypatch.setattr(chat_endpoint.time, "sleep", waits.append)
    server.reply = lambda n, _: (503, {"Retry-After": "7"} if n == 1 else {}, b"")
    judge = server.judge(retries=3, invalid="nan")
    judge.model.backoff = 20
    assert judge(grey(1), ["a"]).isnan().all()
    assert len(server.bodies) == 4
    assert waits == [20, 7, 60]  # 80 is cut to a minute


def test_a_cut_response_is_tried_again(server):
    whole = says("Score: 2")
    server.reply = lambda n, _: (200, {"Content-Length": "999"}, whole[2][:9]) if n == 0 else whole
    assert server.judge(timeout=2.0)(grey(1), ["a"]).tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("invalid", ["nan", "error"])
def test_a_refused_request_is_not_repeated(server, invalid):
    server.reply = lambda *_: (400, {}, b"bad")
    judge = server.judge(invalid=invalid)
    if invalid == "nan":
        assert judge(grey(1), ["a"]).isnan().all()
    else:
        with pytest.raises(ValueError, match=r"no score for the prompt 'a': .*HTTP 400.*nan"):
            judge(grey(1), ["a"])
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_is_an_error_even_where_nan_is_allowed(server, status, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.reply = lambda *_: (status, {}, f"your key {KEY} at {server.url}".encode())
    with pytest.raises(ValueError, match=f"HTTP {status}.*check url, model and key_env") as caught:
        server.judge(key_env="JUDGE_KEY", invalid="nan")(grey(1), ["a"])
    assert len(server.bodies) == 1
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert server.url not in shown


def test_a_redirect_is_not_followed_with_the_key(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    other = Server()
    try:
        server.reply = lambda *_: (302, {"Location": other.url}, b"")
        judge = server.judge(key_env="JUDGE_KEY", invalid="nan")
        assert judge(grey(1), ["a"]).isnan().all()
        assert not other.headers
        assert len(server.bodies) == 1
    finally:
        other.close()


def test_silence_and_a_trickle_both_end_at_the_time_out(server):
    def wait(*_: Any) -> Reply:
        time.sleep(0.6)
        return says("Score: 5")

    server.reply = wait
    judge = server.judge(timeout=0.2, retries=1)
    with pytest.raises(ValueError, match=r"failed 2 times; .*did not answer within 0.2 s"):
        judge(grey(1), ["a"])
    assert len(server.bodies) == 2

    def slowly(content: bytes) -> Iterator[bytes]:
        for byte in content:
            time.sleep(0.05)
            yield bytes([byte])

    server.reply = lambda *_: says("Score: 5")
    server.parts = slowly
    start = time.monotonic()
    assert server.judge(timeout=0.3, retries=0, invalid="nan")(grey(1), ["a"]).isnan().all()
    assert time.monotonic() - start < 2


def test_nobody_there_is_said_without_the_address(server):
    server.close()
    with pytest.raises(ValueError, match=r"could not be reached \(ConnectionRefusedError\)") as e:
        server.judge(retries=0)(grey(1), ["a"])
    assert server.url not in "".join(traceback.format_exception(e.value))


GARBAGE = {
    "no JSON": (200, {}, b"<html>hello</html>"),
    "a pickle": (200, {}, b"\x80\x04\x95K\x05."),
    "a list": (200, {}, b"[1, 2]"),
    "deep": (200, {}, b"[" * 100_000),
    "no choices": (200, {}, b'{"choices": []}'),
    "choices of text": (200, {}, b'{"choices": ["Score: 5"]}'),
    "no message": (200, {}, b'{"choices": [{}]}'),
    "no text": says(None),
    "empty": (200, {}, b""),
    "not a number": says("I like it"),
    "a word": says("Score: high"),
    "above the scale": says("Score: 11"),
    "below the scale": says("Score: -1"),
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=list(GARBAGE))
def test_what_is_no_score_is_nan_and_never_0(server, reply):
    server.reply = lambda n, body: reply if level(body) == 1 else says("Score: 0")
    scores = server.judge(invalid="nan")(grey(1, 2), ["a", "a"])
    assert scores[0].isnan()
    assert scores[1] == 0
    assert len(server.bodies) == 2  # garbage is not asked for again
    with pytest.raises(ValueError, match="no score for the prompt 'a'"):
        server.judge()(grey(1, 2), ["a", "a"])


def test_an_oversized_response_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "LARGEST_RESPONSE", 1000)
    server.reply = lambda *_: says("Score: 5" + " " * 1000)
    assert server.judge(invalid="nan")(grey(1), ["a"]).isnan().all()
    server.reply = lambda *_: says("Score: 5" + " " * 900)
    assert server.judge(invalid="nan")(grey(1), ["a"]).tolist() == [0.5]


def test_requests_overlap_up_to_the_limit_and_scores_keep_the_order(server):
    def reply(number: int, body: Any) -> Reply:
        time.sleep(0.12 - 0.01 * level(body))  # the first answers last
        return says(f"Score: {level(body)}")

    server.reply = reply
    scores = server.judge(concurrency=3)(grey(*range(10)), ["a"] * 10)
    torch.testing.assert_close(scores, torch.arange(10) / 10)
    assert 1 < server.most_busy <= 3


def test_scores_are_remembered_by_picture_and_prompt_but_failures_are_not(server):
    server.reply = lambda n, body: says(f"Score: {level(body)}") if level(body) < 9 else says("?")
    judge = server.judge(invalid="nan")
    images = grey(3, 3, 4, 3, 9)
    scores = judge(images, ["a", "a", "a", "b", "a"])
    assert scores[:4].tolist() == pytest.approx([0.3, 0.3, 0.4, 0.3])
    assert len(server.bodies) == 4
    torch.testing.assert_close(judge(images, ["a", "a", "a", "b", "a"]), scores, equal_nan=True)
    assert len(server.bodies) == 5
    judge(grey(3, size=(6, 4)), ["a"])  # the same bytes, another shape
    assert len(server.bodies) == 6


def test_yes_no_compares_the_chances_of_the_first_token(server):
    likely = [("Yes", 0.3), (" yes", 0.1), ("No", 0.1), ("NO ", 0.02), ("Maybe", 0.4)]
    server.reply = lambda _, body: first_tokens(*(likely if level(body) == 1 else likely[4:]))
    judge = server.judge(preset="yes_no", invalid="nan")
    scores = judge(grey(1, 2), ["a", "a"])
    assert scores[0].item() == pytest.approx(0.4 / 0.52)
    assert scores[1].isnan()
    assert server.bodies[0]["logprobs"] is True
    assert (server.bodies[0]["max_tokens"], server.bodies[0]["top_logprobs"]) == (1, 20)
    server.reply = lambda *_: says("yes")
    assert judge(grey(3), ["a"]).isnan().all()  # an endpoint without log-probabilities
    assert judge.range == (0.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("cat (animal): 1\nFinal Score: 4", 0.75),
        ("**Final Score:** 3.5", 0.625),
        ("Final Score: 1", 0.0),
        ("final score: 5/5", 1.0),
        ("Final Score: 2 ... no. Final Score: 4", 0.75),
        ("Final Score: 10", None),  # Flow-GRPO's pattern reads a 1 here
        ("Final Score: 0", None),
        ("Score: 4", None),
        ("Final Score: [4]", 0.75),
        ("Final Score: **[2.5]**", 0.375),
        ("**Final Score**: [ 3 ]", 0.5),
        ("Final Score: [1-5]", None),
        ("Final Score (1-5): 3.", 0.5),
        ("Final Score:\n4", 0.75),
        ("Final Score: [-1]", None),
        ("Final Score: []", None),
    ],
)
def test_unifiedreward_is_read_on_its_scale(server, answer, score):
    server.reply = lambda *_: says(answer)
    (value,) = server.judge(preset="unifiedreward", invalid="nan")(grey(1), ["a"]).tolist()
    assert np.isnan(value) if score is None else value == pytest.approx(score)
    assert question(server.bodies[0]).endswith("Text Caption: [a]")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4.5", 0.9),
        ("Final Score: [1]", 0.2),
        ("Final Score: 10", None),
        ("Final Score: 0", None),
        ("Final Score: 5", 1.0),
        ("Final Score: 5.5", None),
    ],
)
def test_flow_grpo_s_question_is_asked_and_its_number_divided_by_five(server, answer, score):
    server.reply = lambda *_: says(answer)
    (value,) = server.judge(preset="flow_grpo", invalid="nan")(grey(1), ["a cat"]).tolist()
    assert np.isnan(value) if score is None else value == pytest.approx(score)
    asked = question(server.bodies[0])
    assert asked.startswith("You are given a text caption and a generated image based on that")
    assert (
        "\nBased on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n" in asked
    )
    assert asked.endswith("Text Caption: [a cat]")


# what CodeGoat24/UnifiedReward's own example prints
PRINTED = """
Alignment Score (1-5): 2.694700002670288
Coherence Score (1-5): 2.371500015258789
Style Score (1-5): 2.802500009536743
"""


def test_unifiedreward_2_is_read_by_axis_and_as_their_mean(server):
    server.reply = lambda *_: says(PRINTED)
    numbers = {"alignment": 2.6947, "coherence": 2.3715, "style": 2.8025}
    for axis, number in numbers.items():
        judge = server.judge(preset=f"unifiedreward2_{axis}")
        assert judge(grey(1), ["a"]).tolist() == pytest.approx([(number - 1) / 4], abs=1e-4)
    whole = server.judge(preset="unifiedreward2", invalid="nan")
    mean = sum(numbers.values()) / 3
    assert whole(grey(1), ["a"]).tolist() == pytest.approx([(mean - 1) / 4], abs=1e-4)
    assert whole.range == (0.0, 1.0)
    server.reply = lambda *_: says(PRINTED.replace("Coherence Score (1-5): 2", "Coherence: X 2"))
    assert whole(grey(1, 2), ["a", "a"]).isnan().tolist() == [False, True]  # 1 is remembered
    echoed = "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z"
    server.reply = lambda *_: says(echoed)
    assert whole(grey(1), ["b"]).isnan().all()


def test_a_pattern_without_a_scale_gives_the_number_itself(server):
    server.reply = lambda *_: says("I count 17 cats")
    judge = server.judge(pattern=r"count (\d+)", question="How many cats?")
    assert judge(grey(1), ["a"]).tolist() == [17]
    assert judge.range == (None, None)
    scaled = server.judge(pattern=r"count (\d+)", low=0, high=20)
    assert scaled(grey(1), ["a"]).tolist() == pytest.approx([0.85])
    assert scaled.range == (0.0, 1.0)


def test_the_spec_makes_the_same_judge_again(server):
    judge = server.judge(pattern=r"is (\d+)\.", low=0, high=20, key_env="K", invalid="nan")
    again = rewards.load(judge.spec, imports=True).parts[0].reward
    assert again.spec == judge.spec
    assert again.task == judge.task
    assert again.task.question == PRESETS["score"].question


def test_no_images_ask_nothing(server):
    assert server.judge()(grey(1)[:0], []).shape == (0,)
    assert not server.bodies


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@127.0.0.1:1/v1",
        f"http://127.0.0.1:1/v1?key={KEY}",
        f"ftp://127.0.0.1/{KEY}",
        f"{KEY}",
        f"http://[{KEY}/v1?",
        f"http://127.0.0.1/ {KEY}",
    ],
)
def test_a_url_that_may_hold_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ValueError, match=r"url must be like http://127.0.0.1:8000/v1") as caught:
        JudgeReward(url=url, model="m")
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_is_not_set_is_named(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY"):
        server.judge(key_env="JUDGE_KEY", invalid="nan")(grey(1), ["a"])
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\r\nX-Other: 1")
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY") as caught:
        server.judge(key_env="JUDGE_KEY", invalid="nan")(grey(1), ["a"])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one model"),
        ({"url": "http://a/v1", "source": "b"}, "needs one model"),
        ({"url": "http://a/v1"}, "model=NAME"),
        ({"url": "http://a/v1", "model": "m", "preset": "unified"}, "'unifiedreward'"),
        ({"url": "http://a/v1", "model": "m", "invalid": "0"}, "error or nan"),
        ({"url": "http://a/v1", "model": "m", "pattern": "("}, "not a regex"),
        ({"url": "http://a/v1", "model": "m", "pattern": "Score"}, "0 groups"),
        ({"url": "http://a/v1", "model": "m", "low": 1.0}, "give both"),
        ({"url": "http://a/v1", "model": "m", "low": 2.0, "high": 1.0}, "low below high"),
        ({"url": "http://a/v1", "model": "m", "preset": "yes_no", "low": 0, "high": 1}, "yes_no"),
        ({"url": "http://a/v1", "model": "m", "retries": -1}, "retries"),
        ({"url": "http://a/v1", "model": "m", "timeout": 0}, "timeout"),
        ({"source": "/no/such/folder"}, "neither a folder"),
        ({"source": "nothing"}, "neither a folder"),
    ],
)
def test_wrong_settings_are_refused_with_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        JudgeReward(**options)
