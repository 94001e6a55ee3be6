"""What can go wrong inside a pipeline's call, and what must be refused before it begins."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import json
import logging
import threading

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPAGPipeline,
)
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from middle import Settings
from PIL import Image
from tiny_pipelines import family, sd
from trapped import PROMPT, SHARP, brightness, snapshot

from steering import Steered, steer
from steering.denoiser import Rows
from steering.lineage import Lineage
from steering.networks import perturbed
from steering.particles import Particles
from steering.schedulers import Chain, Look
from steering.weights import log_mean_exp
from tilt.report import genealogy

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
