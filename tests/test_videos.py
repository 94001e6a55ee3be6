"""Videos: which frames a reward sees, what their scores make, and that what is saved has them."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from middle import Settings
from odd_pipelines import odd_pipeline
from PIL import Image
from tiny_pipelines import family
from zoo.accounts import ANIMALS
from zoo.building import call_of, pipeline_of
from zoo.checks import SCORED, Subject, alone, own

import steering.decoding
import steering.frames
from steering import FeynmanKac, steer
from steering.frames import Frames, evenly_spaced
from steering.outputs import to_tensor
from steering.scoring import PromptScorer
from steering.weights import log_mean_exp

PROMPT = "a red cube"
PLAIN = FeynmanKac(reward_scale=0.0)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def video(name):
    """A pipeline that makes 5 frames of 16 x 16 pixels (LTX: 9 of 32 x 32), and its call."""
    if name == "wan":
        pipe, keywords = family("wan")
        return Subject(pipe, keywords | {"num_frames": 5})
    if name == "ltx":
        animal = ANIMALS["LTXPipeline"]
        call = call_of("LTXPipeline", animal) | {"num_frames": 9}
        return Subject(pipeline_of("LTXPipeline", animal), call)
    return Subject(odd_pipeline("frames"), {"num_inference_steps": 6})


def run(it, settings=SCORED, reward=brightness, k=3, **more):
    given = it.more | more
    return steer(it.pipe, PROMPT, reward, k, settings, progress=False, **it.call, **given)


def levels(video):
    return np.stack([np.asarray(frame) for frame in video])


# --- the frames are the pipeline's own


@pytest.mark.parametrize("name", ["wan", "ltx", "odd"])
def test_without_a_reward_the_frames_are_those_of_the_pipelines_own_call(name):
    it = video(name)
    out = run(it, PLAIN)
    noise = out.manifest["settings"]["noise"]
    assert torch.equal(out.latents[0], own(it, noise, "latent", "count"))
    for ours, theirs in zip(out.images[0], own(it, noise, "pil", "count"), strict=True):
        assert len(ours) == len(theirs) == {"wan": 5, "ltx": 9, "odd": 5}[name]
        assert np.array_equal(levels(ours), levels(theirs))


def test_one_particle_is_the_pipelines_own_call_at_any_reward():
    it = video("wan")
    out = run(it, k=1)
    theirs = alone(it, out.manifest["settings"]["noise"], "pil")[0]
    assert np.array_equal(levels(out.images[0][0]), levels(theirs))


@pytest.mark.parametrize("name", ["wan", "ltx"])
@pytest.mark.parametrize("settings", [SCORED, Settings(num_scores=2, funnel=(2, 1))])
def test_videos_are_resampled_by_the_score_of_their_frames(name, settings):
    it = video(name)
    out = run(it, settings, video_score="min")
    assert any(score.replaced.any() for score in out.lineage.scores)
    frames = to_tensor(out.images[0], "cpu")
    each = frames.mean((2, 3, 4)) * 10
    torch.testing.assert_close(out.rewards[0], each.amin(1), rtol=1e-6, atol=1e-6)
    assert out.lineage.scores[0].previews.shape[:3] == (1, 3, 3)


def test_half_precision_videos_are_scored_in_float32():
    it = video("wan")
    it.pipe.to(torch.bfloat16)
    seen = []

    def reward(images, prompts):
        seen.append(images.dtype)
        return images.mean((1, 2, 3)).to(torch.bfloat16)

    out = run(it, reward=reward, score_frames=2)
    assert set(seen) == {torch.float32}
    assert out.rewards.dtype == torch.float32
    assert out.rewards.isfinite().all()


# --- which frames


@pytest.mark.parametrize(
    ("score_frames", "places"),
    [("all", [0, 1, 2, 3, 4]), ("first", [0]), (1, [2]), (2, [0, 4]), (3, [0, 2, 4])],
)
@pytest.mark.parametrize("name", ["wan", "odd"])
def test_the_reward_sees_the_frames_that_are_asked_for_as_images(name, score_frames, places):
    seen = []

    def reward(images, prompts):
        seen.append((images, list(prompts)))
        return brightness(images, prompts)

    out = run(video(name), reward=reward, score_frames=score_frames)
    assert len(seen) >= 3
    final = to_tensor(out.images[0], "cpu")[:, places].flatten(0, 1)
    assert torch.equal(seen[-1][0], final)
    for images, prompts in seen:
        assert images.shape == final.shape
        assert prompts == [PROMPT] * len(final)


def test_frames_are_spaced_as_rounding_the_equal_distances_does():
    for frames in range(1, 40):
        for num in range(2, frames + 1):
            exact = [i * (frames - 1) / (num - 1) for i in range(num)]
            places = evenly_spaced(frames, num)
            assert places == [math.floor(x + 0.5) for x in exact]
            assert len(set(places)) == num
        assert evenly_spaced(frames, 1) == [(frames - 1) // 2]


@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_frames_are_scored_a_few_at_a_time_with_their_own_prompts_and_references(
    monkeypatch, at_once
):
    """By enumeration: the mean or the least of what each frame alone scores."""
    monkeypatch.setattr(steering.frames, "AT_ONCE", at_once)
    calls = []

    class Reward:
        def __call__(self, images, prompts, *, references=()):
            return self.evaluate(images, prompts, references=references)[0]

        def evaluate(self, images, prompts, *, references=()):
            calls.append(len(images))
            bonus = torch.tensor(
                [len(text) + ref for text, ref in zip(prompts, references, strict=True)]
            )
            parts = {"light": images.mean((1, 2, 3)), "red": images[:, 0].amax((1, 2))}
            return parts["light"] - 3 * parts["red"] + bonus, parts

    videos = torch.rand(4, 7, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    texts, references = ["a", "bcd"], [0.5, 0.25]
    for score, least in (("mean", False), ("min", True)):
        scorer = PromptScorer(Reward(), texts, references, Frames("all", score))
        total, parts = scorer.evaluate(videos, [0, 1])
        for row in range(4):
            text, reference = texts[row // 2], references[row // 2]
            of_frames = []
            for frame in videos[row]:
                light, red = frame.mean().item(), frame[0].max().item()
                of_frames.append((light - 3 * red + len(text) + reference, light, red))
            means = [sum(values) / 7 for values in zip(*of_frames, strict=True)]
            expected = min(of_frames) if least else means
            found = [total[row // 2, row % 2]]
            found += [parts[name][row // 2, row % 2] for name in ("light", "red")]
            torch.testing.assert_close(torch.stack(found), torch.tensor(expected))
        assert torch.equal(scorer.score(videos, [0, 1]), total)
    assert max(calls) == min(at_once, 28)


@pytest.mark.parametrize("score", ["mean", "min"])
def test_a_frame_whose_reward_is_not_a_number_is_an_error(score):
    def reward(images, prompts):
        scores = images.mean((1, 2, 3))
        scores[3] = math.nan
        return scores

    with pytest.raises(ValueError, match="The reward of prompt 0, 'a red cube', particle 0 is NaN"):
        run(video("odd"), reward=reward, video_score=score)


# --- what is refused, before the second step


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"score_frames": 0}, 'score_frames=0: pass "all", "first", or the number of evenly'),
        ({"score_frames": "last"}, "score_frames='last': pass"),
        ({"score_frames": True}, "score_frames=True: pass"),
        ({"score_frames": 2.0}, "score_frames=2.0: pass"),
        ({"score_frames": None}, "score_frames=None: pass"),
        ({"video_score": "max"}, 'video_score=\'max\': pass "mean" or "min"'),
        ({"video_score": 1}, "video_score=1: pass"),
        ({"video_score": "min", "score_frames": "first"}, "the minimum of one frame is its score"),
        ({"video_score": "min", "score_frames": 1}, "the minimum of one frame is its score"),
        ({"score_frames": 6}, "score_frames=6: the videos have 5 frames"),
    ],
)
def test_what_cannot_choose_frames_is_refused(more, said):
    it = video("odd")
    with pytest.raises(ValueError, match=re.escape(said)):
        run(it, **more)
    assert len(it.pipe.unet.rows) <= 1


@pytest.mark.parametrize("settings", [SCORED, FeynmanKac(min_ess=0.0)])
@pytest.mark.parametrize("more", [{"score_frames": "first"}, {"video_score": "min"}])
@pytest.mark.parametrize("decode", [None, lambda x: x[:, :3].sigmoid()])
def test_frames_of_images_are_refused_in_words(settings, more, decode):
    it = Subject(odd_pipeline(), {"num_inference_steps": 6})
    with pytest.raises(ValueError, match="there are no videos of several frames here"):
        run(it, settings, decode=decode, **more)
    assert len(it.pipe.unet.rows) == 1


def test_channels_are_not_taken_for_frames():
    it = Subject(odd_pipeline("frames", "channels first"), {"num_inference_steps": 6})
    said = re.escape("returns (3, 3, 5, 8, 8), not (n, 3, h, w) or (n, frames, 3, h, w)")
    with pytest.raises(ValueError, match=said):
        run(it)
    assert len(it.pipe.unet.rows) == 1


def test_one_frame_is_an_image():
    pipe, keywords = family("wan")
    out = run(Subject(pipe, keywords))
    assert isinstance(out.images[0][0], Image.Image)
    with pytest.raises(ValueError, match="there are no videos of several frames here"):
        run(Subject(pipe, keywords), score_frames="first")


# --- decode=, smaller previews, weights


@pytest.mark.parametrize("settings", [SCORED, FeynmanKac(min_ess=0.0)])
def test_a_decode_of_8_bits_is_refused(settings):
    """It would be saved as white, because levels above 1 are clipped."""
    it = Subject(odd_pipeline(), {"num_inference_steps": 6})
    decode = lambda x: x[:, :3].sigmoid().mul(255).byte()  # noqa: E731
    with pytest.raises(ValueError, match=r"decode= returned values of torch.uint8; return floats"):
        run(it, settings, decode=decode)
    assert len(it.pipe.unet.rows) == 1


def test_decode_may_return_videos():
    def decode(latents):
        return latents[:, None, :3].sigmoid() * torch.tensor([1.0, 0.5])[:, None, None, None]

    it = Subject(odd_pipeline(), {"num_inference_steps": 6})
    out = run(it, decode=decode, video_score="min")
    frames = to_tensor(out.images[0], "cpu")
    assert frames.shape[1] == 2
    torch.testing.assert_close(frames, decode(out.latents[0]), rtol=0, atol=0.51 / 255)
    torch.testing.assert_close(out.rewards[0], frames[:, 1].mean((1, 2, 3)) * 10)


def test_previews_of_videos_may_be_smaller():
    seen = []

    def reward(images, prompts):
        seen.append(tuple(images.shape[2:]))
        return brightness(images, prompts)

    out = run(video("wan"), reward=reward, preview_size=0.5)
    assert seen == [(8, 8), (8, 8), (16, 16)]
    assert len(out.images[0][0]) == 5
    it = video("ltx")
    with pytest.raises(ValueError, match=r"preview_size=0.5: .* are not 4-D or 5-D"):
        run(it, preview_size=0.5)


@pytest.mark.parametrize(("name", "alone"), [("wan", True), ("ltx", False)])
def test_a_first_frame_that_needs_no_other_is_decoded_alone_on_the_way(monkeypatch, name, alone):
    """Wan's decoder is causal, and LTX's here is not. The last score decodes all frames."""
    it = video(name)
    frames, seen = [], []
    decode = it.pipe.vae.decode

    def counted(z, *args, **more):
        frames.append((len(z), z.shape[2]))
        return decode(z, *args, **more)

    monkeypatch.setattr(it.pipe.vae, "decode", counted)

    def reward(images, prompts):
        seen.append(images)
        return brightness(images, prompts)

    out = steer(it.pipe, ["a", "b"], reward, 3, SCORED, progress=False, score_frames="first",
                **it.call)  # fmt: skip
    latent = 2 if name == "wan" else frames[0][1]
    of_runs = [number for rows, number in frames if rows == 3]
    assert of_runs == [*[1 if alone else latent] * 2, latent] * 2
    assert all(len(images) == 3 for images in seen)
    assert len(out.images[0][0]) == (5 if name == "wan" else 9)
    monkeypatch.setattr(steering.decoding.Decoder, "_try_first", lambda *args: None)
    plain = steer(it.pipe, ["a", "b"], brightness, 3, SCORED, progress=False,
                  score_frames="first", **it.call)  # fmt: skip
    torch.testing.assert_close(plain.rewards, out.rewards, rtol=1e-5, atol=1e-5)
    for one, other in zip(plain.lineage.scores, out.lineage.scores, strict=True):
        torch.testing.assert_close(one.rewards, other.rewards, rtol=1e-5, atol=1e-5)


def test_the_weights_are_those_of_the_frames_that_are_returned():
    out = run(video("wan"), FeynmanKac(reward_scale=7.0, min_ess=0.0), score_frames=3)
    each = to_tensor(out.images[0], "cpu")[:, [0, 2, 4]].mean((2, 3, 4)) * 10
    torch.testing.assert_close(out.rewards[0], each.mean(1), rtol=1e-6, atol=1e-6)
    log_weights = 7.0 * each.mean(1)
    torch.testing.assert_close(out.log_z, log_mean_exp(log_weights[None]), rtol=1e-5, atol=1e-5)


def test_more_frames_than_a_video_has_are_not_scored_twice():
    reward = SimpleNamespace(evaluate=lambda *args, **kwargs: pytest.fail("it was scored"))
    with pytest.raises(ValueError, match="score_frames=8: the videos have 4 frames"):
        Frames(8).evaluate(reward, torch.zeros(1, 4, 3, 2, 2), ["a"])
