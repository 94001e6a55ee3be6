"""Rewards inside a pipeline's call: their references and checks, and what is said of a run."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import dataclasses
import re

import pytest
import torch
from diffusers import (
    FluxKontextPipeline,
)
from middle import Settings
from tiny_pipelines import family, picture
from trapped import PROMPT, SHARP, Full, brightness

from steering import steer
from steering.call import PipelineCall
from steering.lineage import Score, why_nothing_moved
from steering.pipeline import steer_each
from tilt.report import recipe


def test_a_run_that_never_resampled_says_so_once(caplog):
    pipe, keywords = family("sd")
    weak, none = Settings(reward_scale=1e-6), Settings(min_ess=0.0)
    for settings, times in ((weak, 1), (none, 0), (SHARP, 0)):
        caplog.clear()
        steer(pipe, ["a", "b"], brightness, 3, settings, progress=False, **keywords)
        assert caplog.text.count("the run is best-of-k; raise reward_scale") == times


def test_a_reward_that_tells_nothing_apart_is_said_to(caplog):
    pipe, keywords = family("sd")
    steer(pipe, ["a", "b"], lambda x, _: x[:, 0, 0, 0] * 0, 3, SHARP, progress=False, **keywords)
    assert "had equal rewards" in caplog.text
    assert "raise reward_scale" not in caplog.text


@pytest.mark.parametrize(
    ("rewards", "ess", "given", "said"),
    [
        ([[2.0, 2.0], [3.0, 3.0]], (2.0, 2.0), {}, "had equal rewards"),
        ([[2.0, 2.0], [3.0, 3.1]], (2.0, 1.9), {"min_ess": 1.0}, "below 1.9 of 2, and no particle"),
        (
            [[2.0, 2.5]],
            (1.8,),
            {"min_ess": 0.6},
            "resample below 1.2: .* raise reward_scale or min",
        ),
        ([[2.0, 2.5]], (1.2,), {"min_ess": 0.5}, "below 1.2 of 2, .* raise min_ess"),
        ([[2.0, 2.5]], (1.1,), {"min_ess": 0.8}, "draw no noise"),
        ([[2.0, 2.5]], (1.1,), {"min_ess": 0.0}, "^$"),
        ([[2.0, 2.5]], (1.1,), {"reward_scale": 0.0}, "^$"),
    ],
)
def test_what_is_said_of_a_run_where_nothing_moved_is_what_was_seen(rewards, ess, given, said):
    stay = torch.arange(2).expand(len(rewards), 2)
    seen = torch.tensor(rewards), torch.zeros(len(rewards), 2), torch.tensor(ess)
    chosen = torch.full((len(rewards),), given.get("min_ess") == 1.0)
    score = Score(0, *seen, stay, chosen)
    assert re.search(said, why_nothing_moved([score], Settings(**given)))
    moved = dataclasses.replace(score, ancestors=torch.zeros_like(stay))
    assert why_nothing_moved([score, moved], Settings(**given)) == ""


def test_a_funnel_that_keeps_the_first_particles_has_replaced_the_others():
    rewards, ess, chosen = torch.zeros(2, 4), torch.ones(2), torch.ones(2) > 0
    kept = Score(0, rewards, rewards, ess, torch.arange(4).expand(2, 4), chosen)
    cut = Score(0, rewards, rewards, ess, torch.arange(2).expand(2, 2), chosen)
    assert kept.replaced.tolist() == [False, False]
    assert cut.replaced.tolist() == [True, True]


def test_scores_that_resampled_everyone_to_one_child_are_not_said_to_have_kept_their_weights():
    even, stay = torch.tensor([[2.0, 2.5]]), torch.arange(2)[None]
    score = Score(0, even, even, torch.tensor([2.0]), stay, torch.tensor([True]))
    said = why_nothing_moved([score], Settings(min_ess=1.0))
    assert "no particle was replaced" in said
    assert "No score resampled" not in said


# --- rewards


def test_a_reward_that_is_not_finite_names_prompt_particle_and_step():
    pipe, keywords = family("sd")
    calls = []

    def reward(images, prompts):
        calls.append(len(images))
        scores = images.mean((1, 2, 3))
        scores[1] = torch.nan if len(calls) == 2 else scores[1]
        return scores

    with pytest.raises(
        ValueError, match=r"prompt 0, 'a red cube', particle 1 is NaN at step 3 of 6"
    ):
        steer(pipe, PROMPT, reward, 3, SHARP, progress=False, **keywords)

    def infinite(images, prompts):
        return images.mean((1, 2, 3)) / 0

    plain = Settings(min_ess=0.0)
    with pytest.raises(ValueError, match=r"prompt 1, 'b', particle 0 is inf at the final image"):
        for _ in steer_each(
            pipe, ["a", "b"], infinite, 2, plain, progress=False, only=[1], **keywords
        ):
            pass


def test_a_reward_may_have_parts_references_and_a_check():
    pipe, keywords = family("sd")
    reward = Full()
    prompts = ["x", "y"]
    settings = Settings(num_scores=1, score_from=0.5)
    out = steer(
        pipe, prompts, reward, 2, settings, references=["rx", "ry"], progress=False, **keywords
    )
    assert reward.checked == [prompts]
    assert reward.references == [(["x", "x"], ["rx", "rx"]), (["y", "y"], ["ry", "ry"])]
    assert out.components["red"].shape == (2, 2)
    assert torch.equal(out.components["n"], torch.ones(2, 2))
    with pytest.raises(ValueError, match="no score for 'forbidden'"):
        steer(pipe, "forbidden", reward, 2, progress=False, **keywords)
    with pytest.raises(ValueError, match="this reward takes no references"):
        steer(pipe, "x", brightness, 2, references=["r"], progress=False, **keywords)
    with pytest.raises(ValueError, match=r"returned shape \(2, 3\) for 2 images"):
        steer(pipe, "x", lambda images, p: images[:, :, 0, 0], 2, progress=False, **keywords)


def kontext():
    pipe, keywords = family("flux")
    more = {"image": picture(), "max_area": 256, "_auto_resize": False}
    return FluxKontextPipeline(**pipe.components), keywords | more


def test_another_reward_scores_on_the_way_and_the_target_stays():
    pipe, keywords = family("sd")
    seen = []

    def darkness(images, prompts):
        seen.append(len(images))
        return -brightness(images, prompts)

    settings = Settings(reward_scale=3.0, min_ess=1.0, num_scores=2)
    run = {"particles": 3, "settings": settings, "progress": False, **keywords}
    dark = steer(pipe, PROMPT, darkness, **run)
    seen.clear()
    out = steer(pipe, PROMPT, brightness, on_the_way=darkness, **run)
    assert seen == [3, 3]  # the final images are not among them
    for score, alone in zip(out.lineage.scores, dark.lineage.scores, strict=True):
        assert torch.equal(score.rewards, alone.rewards)
        assert torch.equal(score.ancestors, alone.ancestors)
    assert torch.equal(out.latents, dark.latents)
    assert torch.equal(out.rewards, -dark.rewards)  # of the same images
    gap = 3.0 * (out.rewards - dark.rewards)
    torch.testing.assert_close(out.log_weights - dark.log_weights, gap, atol=1e-4, rtol=1e-5)
    assert (out.manifest["reward"], out.manifest["on_the_way"]) == ("brightness", "darkness")
    assert dark.manifest["on_the_way"] is None
    assert "    on_the_way=on_the_way,\n" in recipe.call(out.manifest)
    with pytest.raises(ValueError, match="on_the_way is a str; pass a function of"):
        steer(pipe, PROMPT, brightness, on_the_way="clip", **run)
    for more in ({"particles": 1}, {"settings": Settings(min_ess=0.0)}):
        with pytest.raises(ValueError, match="on_the_way= has no effect, since this run scores on"):
            steer(pipe, PROMPT, brightness, on_the_way=darkness, **run | more)


@pytest.mark.parametrize("who", ["reward", "on_the_way"])
def test_references_reach_the_one_of_two_rewards_that_takes_them(who):
    pipe, keywords = family("sd")
    seen = []

    def compares(images, prompts, references=None):
        seen.append(references)
        return brightness(images, prompts)

    rewards = {"reward": brightness, "on_the_way": brightness} | {who: compares}
    run = {"particles": 2, "settings": Settings(num_scores=2), "progress": False, **keywords}
    out = steer(pipe, PROMPT, **rewards, references=["r"], **run)
    assert seen == [["r", "r"]] * (1 if who == "reward" else 2)
    assert out.manifest["references"] == ["r"]
    with pytest.raises(ValueError, match="this reward takes no references"):
        steer(pipe, PROMPT, brightness, on_the_way=brightness, references=["r"], **run)


@pytest.mark.parametrize("build", [lambda: family("img2img"), kontext], ids=["img2img", "kontext"])
def test_references_may_be_the_image_that_the_call_edits(build):
    pipe, keywords = build()
    source = keywords["image"]
    call = {"settings": Settings(num_scores=1, score_from=0.5), "progress": False}
    for image in (source, [source]):
        reward = Full()
        keywords["image"] = image
        steer(pipe, ["x", "y"], reward, 2, references="image", **call, **keywords)
        assert [prompts for prompts, _ in reward.references] == [["x", "x"], ["y", "y"]]
        assert all(one is source for _, given in reward.references for one in given)


def test_a_reward_that_needs_references_is_refused_without_them():
    reward = Full()
    reward.needs_references = True
    pipe, keywords = family("img2img")
    with pytest.raises(ValueError, match=r"compares with images that references= gives: pass a"):
        steer(pipe, "x", reward, 2, progress=False, **keywords)
    assert not reward.references


def test_references_name_a_keyword_that_holds_an_image():
    different = [picture(), picture()]
    assert PipelineCall({"image": different}, {}, ("x",)).reference("image") == different
    pipe, keywords = family("img2img")
    call = {"progress": False, **keywords}
    for name in ("picture", "strength", "prompt", ""):
        with pytest.raises(ValueError, match=r"references=.*this call's are \['image'\]"):
            steer(pipe, "x", Full(), 2, references=name, **call)
    with pytest.raises(ValueError, match="this reward takes no references"):
        steer(pipe, "x", brightness, 2, references="image", **call)
    pipe, keywords = family("sd")
    with pytest.raises(ValueError, match="this call has none"):
        steer(pipe, "x", Full(), 2, references="image", progress=False, **keywords)
