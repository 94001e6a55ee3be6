"""What can go wrong inside a pipeline's call, and what must be refused before it begins."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import copy
import dataclasses
import json
import logging
import re
import threading

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FluxKontextPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from middle import Settings
from PIL import Image
from tiny_pipelines import family, picture, sd, sd3

from steering import Steered, steer
from steering.call import PipelineCall
from steering.denoiser import Rows
from steering.lineage import Lineage, Score, why_nothing_moved
from steering.networks import perturbed
from steering.particles import Particles
from steering.pipeline import steer_each
from steering.schedulers import Chain, Look
from steering.weights import log_mean_exp
from tilt.report import genealogy

PROMPT = "a red cube"
SHARP = Settings(reward_scale=300.0, min_ess=1.0)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def snapshot(pipe):
    """Everything a run might have changed: attributes, scheduler, networks' state."""
    scheduler = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    modules = {
        name: (part.training, sorted(vars(part)), next(part.parameters()).sum().item())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return {name: id(value) for name, value in vars(pipe).items()}, scheduler, modules


# --- the pipeline that was passed in


@pytest.mark.parametrize("name", ["sd", "sd2", "sd3", "controlnet", "inpaint"])
def test_the_pipeline_is_untouched_after_a_run(name):
    pipe, keywords = family(name)
    before = snapshot(pipe)
    steer(pipe, PROMPT, brightness, 2, SHARP, max_batch=1, progress=False, **keywords)
    assert snapshot(pipe) == before


def test_the_pipeline_is_untouched_after_a_failure():
    pipe, keywords = family("sd")
    before = snapshot(pipe)

    def broken(images, prompts):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        steer(pipe, PROMPT, broken, 2, SHARP, max_batch=1, progress=False, **keywords)
    assert snapshot(pipe) == before


def test_two_threads_on_one_pipeline_do_not_meet():
    pipe, keywords = family("sd")
    jobs = {"a red cube": 0, "two dots": 1}
    alone = {
        prompt: steer(pipe, prompt, brightness, 3, SHARP, seed, progress=False, **keywords)
        for prompt, seed in jobs.items()
    }
    together: dict[str, Steered] = {}

    def work(prompt, seed):
        together[prompt] = steer(
            pipe, prompt, brightness, 3, SHARP, seed, progress=False, **keywords
        )

    threads = [threading.Thread(target=work, args=job) for job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in jobs:
        # kernels of two threads at once may share out their work otherwise
        torch.testing.assert_close(alone[prompt].latents, together[prompt].latents)
        pair = together[prompt].log_weights, alone[prompt].log_weights
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-2)


# --- traps inside the call


def known_noise(monkeypatch, follow):
    """The noise that sits in the known region after each step, and the rows that were chosen."""
    if not follow:
        monkeypatch.setattr(Chain, "follow", lambda self, x: x)
    pipe, keywords = family("inpaint")
    states = []

    def callback(view, step, timestep, tensors):
        rows = view.scheduler.chain.lineage
        states.append((tensors["latents"][..., :3].clone(), None if rows is None else rows.clone()))
        return {}

    steer(
        pipe,
        PROMPT,
        brightness,
        4,
        SHARP,
        progress=False,
        callback_on_step_end=callback,
        **keywords,
    )
    return states


@pytest.mark.parametrize("follow", [True, False])
def test_the_noise_of_a_known_region_follows_the_lineage(monkeypatch, follow):
    """Rows with the same origin share it, and others do not; without `follow` this fails."""
    states = known_noise(monkeypatch, follow)
    latents, rows = states[-2]  # the last one is noiseless there
    assert rows is not None
    assert len(rows.unique()) < 4
    same_origin = rows[:, None] == rows[None, :]
    same_noise = (latents[:, None] == latents[None, :]).flatten(2).all(dim=2)
    assert torch.equal(same_origin, same_noise) == follow


def test_a_callback_of_the_users_runs_on_the_copy():
    pipe, keywords = family("sd3")
    steps = []

    def callback(view, step, timestep, tensors):
        assert view is not pipe
        steps.append(step)
        return {"latents": tensors["latents"] * 1.0}

    keywords = {**keywords, "callback_on_step_end": callback}
    steer(pipe, PROMPT, brightness, 2, SHARP, progress=False, **keywords)
    assert steps == list(range(6))


def observed(stds):
    """A filter of 3 particles that sees steps with these stds; its rows and what it recorded."""
    settings = Settings(min_ess=1.0, reward_scale=5.0, num_scores=2, score_from=0.3)
    particles = Particles(
        1,
        3,
        settings,
        judge=lambda x0: (x0.reshape(1, 3), torch.zeros(3, 3, 2, 2)),
        generators=[torch.Generator().manual_seed(0)],
        rows=Rows(),
        describe=lambda i, j: f"particle {j}",
        on_step=lambda *_: None,
    )
    x0 = torch.tensor([0.0, 1.0, 3.0])
    rows = [particles(Look(step, stds, lambda: x0)) for step in range(len(stds))]
    return rows, particles.lineage.scores


def test_nobody_is_resampled_before_a_move_without_noise_and_the_weights_are_carried():
    rows, (first, second) = observed((1.0, 1.0, 0.0, 0.5, 0.5, 0.0))
    assert (first.step, second.step) == (2, 4)
    assert torch.equal(rows[2], torch.arange(3))
    assert not first.resampled.any()
    assert torch.equal(first.log_weights, second.log_weights)  # the same rewards: nothing is added
    assert second.resampled.all()


def test_a_report_folds_the_weights_where_the_filter_did_and_nowhere_else():
    _, scores = observed((1.0, 1.0, 0.0, 0.5, 0.5, 0.0))
    final = torch.zeros(1, 3)
    results = {"rewards": final.tolist(), "log_weights": final.tolist(), "log_z": [0.0]}
    found = genealogy.read({"results": results}, Lineage(6, scores).to_json(), 0)
    assert found.resampled == [False, True]
    # both scores weigh the same three particles, the second by nothing more
    expected = log_mean_exp(scores[0].log_weights).item()
    assert found.log_z[:2] == pytest.approx([expected, expected])


def test_a_run_without_noise_after_the_first_score_is_refused():
    with pytest.raises(ValueError, match=r"No step from 2 on draws noise.*noise=.*min_ess=0"):
        observed((1.0, 1.0, 0.0, 0.0, 0.0, 0.0))


def test_a_funnel_shrinks_the_networks_batch_and_the_result(monkeypatch):
    pipe, keywords = family("sd")
    rows = []
    real = pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, *args, **kw: (rows.append(len(x)), real(x, *args, **kw))[1]
    )
    settings = Settings(num_scores=2, score_from=0.2, score_to=0.6, funnel=(4, 2))
    out = steer(pipe, [PROMPT, "two"], brightness, 6, settings, progress=False, **keywords)
    # the latents of a step are resampled before its move, so the next evaluation is smaller
    scored = [score.step for score in out.lineage.scores]
    expected = [12 if i <= scored[0] else 8 if i <= scored[1] else 4 for i in range(6)]
    assert rows == expected * 2
    assert out.rewards.shape == out.log_weights.shape == (2, 2)
    assert [score.ancestors.shape[1] for score in out.lineage.scores] == [4, 2]
    assert len(out.images[1]) == 2
    packed = steer(
        pipe,
        [PROMPT, "two"],
        brightness,
        6,
        settings,
        progress=False,
        prompts_per_call=2,
        **keywords,
    )
    torch.testing.assert_close(packed.latents, out.latents, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("steering.denoiser.Rows.indices", lambda *args: (None, None))
    whole = steer(pipe, [PROMPT, "two"], brightness, 6, settings, progress=False, **keywords)
    torch.testing.assert_close(whole.latents, out.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch": 1},
        {"settings": Settings(num_scores=2, funnel=(2, 1))},
        {"decode": lambda latents: latents[:, :3].sigmoid()},
    ],
)
def test_offloaded_networks_keep_their_hooks(change):
    pipe, keywords = family("sd")
    run = {"settings": SHARP, "progress": False, **change, **keywords}
    plain = steer(pipe, PROMPT, brightness, 3, **run)
    pipe.enable_model_cpu_offload(device="cpu")
    freed = []
    free = pipe.maybe_free_model_hooks
    pipe.maybe_free_model_hooks = lambda: (freed.append(1), free())
    offloaded = steer(pipe, PROMPT, brightness, 3, **run)
    assert torch.equal(offloaded.latents, plain.latents)
    assert freed == [1]
    assert all(hasattr(part, "_hf_hook") for part in (pipe.unet, pipe.vae, pipe.text_encoder))


def test_perturbed_attention_is_never_cut(monkeypatch):
    """Its layers take the batch for three equal parts, whatever rows it is given."""
    pipe = sd(StableDiffusionPAGPipeline, pag_applied_layers="mid")
    call = {"progress": False, "num_inference_steps": 6}
    funnel = Settings(num_scores=1, funnel=(1,))
    for change in ({"max_batch": 2}, {"settings": funnel}):
        with pytest.raises(ValueError, match=r"Perturbed attention .* leave max_batch=, .* funnel"):
            steer(pipe, PROMPT, brightness, 2, **change, **call)
    steer(pipe, PROMPT, brightness, 2, max_batch=2, pag_scale=0.0, **call)
    plain = steer(pipe, PROMPT, brightness, 2, **call)
    assert plain.latents.isfinite().all()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(
        PAGIdentitySelfAttnProcessor2_0()
    )
    assert perturbed(pipe, 0.0)
    asked = []

    def full(*args, **kwargs):
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.unet, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        steer(pipe, PROMPT, brightness, 2, **call)
    assert asked == [1]  # not tried again with half the batch


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


class Full:
    """A reward with everything that is optional."""

    name = "full"

    def __init__(self):
        self.checked, self.references = [], []

    def check(self, prompts):
        self.checked.append(prompts)
        if "forbidden" in prompts:
            raise ValueError("no score for 'forbidden'")

    def __call__(self, images, prompts, *, references=None):
        self.references.append((prompts, references))
        return images.mean((1, 2, 3))

    def evaluate(self, images, prompts, references=None):
        total = images.mean((1, 2, 3))
        return total, {"red": images[:, 0].mean((1, 2)), "n": torch.ones(len(images))}


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


# --- saving


def test_the_saved_pngs_score_as_reported_and_the_manifest_repeats_the_run(tmp_path):
    pipe, keywords = family("sd")
    prompts = [PROMPT, 'say "ü"']
    out = steer(pipe, prompts, brightness, 3, SHARP, seed=4, progress=False, **keywords)
    folder = out.save(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for row, files in zip(out.rewards, manifest["results"]["files"], strict=True):
        images = np.stack([np.array(Image.open(folder / name)) for name in files])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(brightness(pixels, []), row)
    text = json.loads(Image.open(folder / "0001-02.png").text["parameters"])
    assert text["prompt"] == 'say "ü"'
    assert text["reward"] == out.rewards[1, 2].item()
    assert "prompts" not in text["run"]
    assert manifest["reward"] == "brightness"
    assert (manifest["prompts_per_call"], manifest["halvings"]) == (1, 0)
    assert (manifest["adapters"], manifest["preview"], manifest["decode"]) == ([], None, False)
    assert manifest["settings"]["noise"] == 1.0
    lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
    assert lineage["scores"][0]["ancestors"] == out.lineage.scores[0].ancestors.tolist()
    again = steer(
        pipe,
        manifest["prompts"],
        brightness,
        manifest["particles"],
        Settings(**manifest["settings"] | {"funnel": tuple(manifest["settings"]["funnel"])}),
        manifest["seed"],
        progress=False,
        **manifest["pipeline_keywords"],
    )
    assert torch.equal(again.latents, out.latents)


def test_best_sample_and_origins():
    pipe, keywords = family("sd")
    out = steer(pipe, [PROMPT, "two"], brightness, 4, SHARP, progress=False, **keywords)
    assert out.best[1] is out.images[1][int(out.rewards[1].argmax())]
    draw = [out.sample(torch.Generator().manual_seed(i)) for i in range(3)]
    assert all(image in out.images[0] for image, _ in draw)
    assert out.lineage.origins(4).shape == (2, 4)
    one = out.lineage.prompt(1)
    assert torch.equal(one.origins(4)[0], out.lineage.origins(4)[1])


# --- trouble on the way


def test_out_of_memory_halves_the_networks_batch_until_it_fits(monkeypatch, caplog):
    pipe, keywords = family("sd")
    whole = steer(pipe, PROMPT, brightness, 4, SHARP, progress=False, **keywords)
    real = pipe.unet.forward
    largest = 4

    def small(x, *args, **kw):
        if len(x) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, *args, **kw)

    monkeypatch.setattr(pipe.unet, "forward", small)
    with caplog.at_level(logging.WARNING):
        out = steer(pipe, [PROMPT, "two"], brightness, 4, SHARP, progress=False, **keywords)
    assert sum("halved" in record.getMessage() for record in caplog.records) == 1
    torch.testing.assert_close(out.latents[0], whole.latents[0], rtol=1e-3, atol=1e-3)
    largest = 1
    out = steer(pipe, PROMPT, brightness, 4, SHARP, progress=False, **keywords)
    torch.testing.assert_close(out.latents, whole.latents, rtol=1e-3, atol=1e-3)
    assert (out.manifest["max_batch"], out.manifest["halvings"]) == ("auto", 3)
    largest = 0
    with pytest.raises(torch.OutOfMemoryError):
        steer(pipe, PROMPT, brightness, 4, SHARP, progress=False, **keywords)

    def other(*args, **kw):
        raise RuntimeError("something else")

    monkeypatch.setattr(pipe.unet, "forward", other)
    with pytest.raises(RuntimeError, match="something else"):
        steer(pipe, PROMPT, brightness, 4, SHARP, progress=False, **keywords)


def test_ctrl_c_keeps_the_finished_prompts():
    pipe, keywords = family("sd")
    plain = Settings(min_ess=0.0)

    def impatient(images, prompts):
        if prompts[0] == "two":
            raise KeyboardInterrupt
        return images.mean((1, 2, 3))

    with pytest.raises(KeyboardInterrupt) as caught:
        steer(pipe, ["one", "two"], impatient, 2, plain, progress=False, **keywords)
    kept = caught.value.finished
    assert kept.prompts == ("one", "two")
    alone = steer(pipe, "one", impatient, 2, plain, progress=False, **keywords)
    assert torch.equal(kept.latents[0], alone.latents[0])
    assert [len(row) for row in kept.images] == [2, 0]  # of the second the steps were done, no more


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_step": 5}, r"no keyword num_inference_step=; did you mean num_inference_"),
        ({"callback": print}, "takes no keyword callback="),
        ({"particle": 2}, r"no keyword particle=; did you mean particles="),
        ({"potential": "max"}, r"potential is a field .* settings=FeynmanKac\(potential="),
        ({"num_inference_steps": "6"}, "num_inference_steps='6': pass a whole number"),
        ({"settings": {"noise": 1.0}}, r"settings is a dict; pass FeynmanKac\("),
        ({"prompts": None}, "prompts=None: pass one text or more"),
        ({"decode": 3}, "decode=3: pass a function from latents"),
        ({"preview": "taesd"}, "preview= is a str; pass a decoder"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt= clashes .* pass particles="),
        ({"generator": None}, "generator= clashes .* seed="),
        ({"latents": torch.zeros(1)}, "latents= clashes"),
        ({"output_type": "np"}, "output_type= clashes"),
        ({"return_dict": False}, "return_dict= clashes"),
        ({"eta": 1.0}, r"eta= clashes .* FeynmanKac\(noise="),
        ({"prompt": "x"}, "prompt= clashes"),
        ({"denoising_end": 0.8}, "denoising_end= clashes"),
        ({"particles": 0}, "particles=0: pass a whole number of 1 or more"),
        ({"max_batch": 0}, "max_batch=0: pass"),
        ({"prompts_per_call": 0}, "prompts_per_call=0: pass"),
        ({"prompts": []}, r"prompts=\[\]: pass one text or more"),
        ({"prompts": ["a", 3]}, "pass one text or more"),
        ({"negative_prompt": ["x"] * 3}, "negative_prompt= has 3 entries for 2 prompts"),
        ({"references": ["x"], "reward": Full()}, "references= has 1 entries for 2 prompts"),
        ({"reward": "clip"}, "reward is a str; pass a function"),
        ({"settings": Settings(noise=0.0)}, r"noise=0 .* min_ess=0 for best-of-k"),
        ({"settings": Settings(score_from=0.9, score_to=0.95)}, "no step to score between"),
        ({"settings": Settings(num_scores=2, funnel=(8, 2))}, "start with 8 particles or lower"),
        ({"settings": Settings(num_scores=5, funnel=(2,) * 5)}, "only 3 steps are scored"),
    ],
)
def test_bad_input_is_refused_before_any_step(monkeypatch, change, message):
    pipe, keywords = family("sd")
    before = snapshot(pipe)

    def asked(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(pipe.unet, "forward", asked)
    call = {"prompts": ["a", "b"], "reward": brightness, "particles": 4, "progress": False}
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        steer_each(pipe, **{**call, **keywords, **change})
    assert snapshot(pipe) == before


def test_pipelines_that_cannot_work_are_refused():
    pipe, keywords = family("sd")
    with pytest.raises(ValueError, match="got a str; pass a diffusers pipeline"):
        steer("sd", PROMPT, brightness)
    with pytest.raises(ValueError, match="latents of 16 channels but this pipeline's have 4"):
        steer(pipe, PROMPT, brightness, preview=AutoencoderTiny(latent_channels=16), **keywords)
    with pytest.raises(ValueError, match="of 8 pixels per side but this pipeline's have 2"):
        steer(pipe, PROMPT, brightness, preview=AutoencoderTiny(), **keywords)
    half = family("sd")[0].vae.half()
    with pytest.raises(ValueError, match=r"preview= is torch.float16 .* preview.to\(torch.float32"):
        steer(pipe, PROMPT, brightness, preview=half, **keywords)
    with pytest.raises(ValueError, match=r"decode= returned \(2, 4, 8, 8\) for 2 latents"):
        steer(pipe, PROMPT, brightness, 2, decode=lambda x: x, progress=False, **keywords)
    with pytest.raises(ValueError, match=r"only= is an argument of steer_each"):
        steer(pipe, PROMPT, brightness, only=[0], **keywords)
    pipe, keywords = family("sd3")
    pipe.text_encoder_3.train()
    match = r"pipe.text_encoder_3 is in training mode.*pipe.text_encoder_3.eval\(\)"
    with pytest.raises(ValueError, match=match):
        steer(pipe, PROMPT, brightness, progress=False, **keywords)
    pipe = sd()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler is no flow"):
        steer(pipe, PROMPT, brightness, progress=False, **keywords)
    pipe, keywords = family("img2img")
    with pytest.raises(ValueError, match=r"prompts_per_call=2 with image=.*leave prompts_per_call"):
        steer(pipe, ["a", "b"], brightness, prompts_per_call=2, progress=False, **keywords)
    with pytest.raises(ValueError, match="no step to score"):
        steer(pipe, PROMPT, brightness, progress=False, **{**keywords, "strength": 0.2})
    pipe, keywords = family("wan")
    with pytest.raises(ValueError, match=r"num_frames=0: pass a whole number of 1 or more"):
        steer(pipe, PROMPT, brightness, progress=False, **keywords | {"num_frames": 0})


def test_a_fraction_of_the_steps_is_rounded_as_the_pipeline_rounds_it():
    """Of 10 * 0.25 steps SD takes the floor, SD3 the ceiling; only the latter has a step 1 of 3."""
    settings = Settings(num_scores=1, score_from=0.3, score_to=0.4, min_ess=1.0)
    # SD3 with a generator a row wants an image a row
    call = {"image": [picture()] * 2, "num_inference_steps": 10, "strength": 0.25}
    pipe = StableDiffusion3Img2ImgPipeline(**sd3().components)
    out = steer(pipe, PROMPT, brightness, 2, settings, progress=False, **call)
    assert out.lineage.num_steps == 3
    pipe, _ = family("img2img")
    with pytest.raises(ValueError, match=r"no step to score .* of 2 steps"):
        steer(pipe, PROMPT, brightness, 2, settings, progress=False, **call)


def test_a_text_that_is_no_prompt_goes_to_the_pipeline_as_it_is():
    keywords = {"system_prompt": "be brief", "negative_prompt_2": "x"}
    defaults = dict.fromkeys(["prompt", *keywords])
    dealt = PipelineCall(keywords, defaults, ("a", "b")).for_prompts([0, 1], 1, [])
    assert dealt["system_prompt"] == "be brief"
    assert dealt["negative_prompt_2"] == ["x", "x"]


def test_prompt_embeds_stand_in_for_the_text_that_the_network_sees():
    pipe, keywords = family("sd")
    prompts = [PROMPT, "two"]
    embeds, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    text = steer(pipe, prompts, brightness, 2, SHARP, progress=False, **keywords)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    ours = steer(pipe, prompts, brightness, 2, SHARP, progress=False, **given, **keywords)
    torch.testing.assert_close(ours.latents, text.latents, rtol=1e-4, atol=1e-4)


def test_negative_prompts_go_to_all_or_one_to_each():
    pipe, keywords = family("sd")
    both = steer(
        pipe,
        ["a", "b"],
        brightness,
        2,
        SHARP,
        progress=False,
        negative_prompt=["x", "y"],
        **keywords,
    )
    one = steer(pipe, "b", brightness, 2, SHARP, progress=False, negative_prompt="y", **keywords)
    assert torch.equal(both.latents[1], one.latents[0])
    packed = steer(
        pipe,
        ["a", "b"],
        brightness,
        2,
        SHARP,
        progress=False,
        prompts_per_call=2,
        negative_prompt="y",
        **keywords,
    )
    torch.testing.assert_close(packed.latents[1], one.latents[0], rtol=1e-3, atol=1e-3)


def test_an_image_may_be_packed_when_it_is_the_only_prompt():
    pipe, keywords = family("img2img")
    out = steer(pipe, PROMPT, brightness, 2, progress=False, **{**keywords, "image": picture(3)})
    assert out.images[0][0].size == (16, 16)


def test_euler_of_sdxl_is_replaced_and_its_state_kept():
    pipe = sd(scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading"))
    pipe.scheduler.set_timesteps(9)
    before = copy.deepcopy(pipe.scheduler.timesteps)
    steer(pipe, PROMPT, brightness, 2, progress=False, num_inference_steps=6)
    assert torch.equal(pipe.scheduler.timesteps, before)
