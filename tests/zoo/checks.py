"""What is checked of every pipeline that runs: each check returns, or raises what went wrong."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pictures import assert_same_pictures
from PIL import Image
from torch import Tensor

import steering.run
from steering import FeynmanKac, generators, steer
from steering.denoiser import Rows
from steering.schedulers import stochastic

__all__ = ["CHECKS", "Subject", "fingerprint", "lineage", "run"]

K = 3
SCORED = FeynmanKac(reward_scale=300.0, min_ess=1.0, num_scores=2, score_from=0.2, score_to=0.9)
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_SUNG = ("lyrics", "vocal_language")  # of which ACE-Step wants one a prompt
# their own calls fail with more than one row, so each of their rows is compared with a call alone
_ALONE = {
    "DreamLitePipeline": "The size of tensor|`prompt` has to be of type `str`",
    "PRXPipeline": "The size of tensor",
    "PRXPixelPipeline": "The size of tensor",
}
_DECODES_ALONE: dict[str, str] = dict.fromkeys(
    ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"), "invalid for input of size"
)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """The mean of an image, or of a waveform (channels, samples)."""
    return images.flatten(1).mean(1) * 10


@dataclass(frozen=True)
class Subject:
    """A pipeline, the keywords of its call, two prompts, and more arguments of steer()."""

    pipe: Any
    call: dict[str, Any]
    prompts: Sequence[str] = ("a red cube", "two dots")
    more: dict[str, Any] = field(default_factory=dict)


def run(it: Subject, settings: FeynmanKac = SCORED, b: int = 1, **more: Any) -> Any:
    given = {"reward": brightness, "particles": K, "progress": False} | it.more | more
    return steer(it.pipe, it.prompts[:b], settings=settings, **given, **it.call)


def own(
    it: Subject,
    noise: float,
    output_type: str,
    form: str,
    noises: list[torch.Generator] | None = None,
) -> Any:
    """What the pipeline returns on our scheduler with our generators, K times one prompt."""
    prompt, call = it.prompts[0], it.call
    pipe, noises = copy.copy(it.pipe), noises or generators(0, [prompt], K)
    known = inspect.signature(type(pipe).__call__).parameters
    pipe.scheduler = stochastic(pipe.scheduler, noise, noises)
    if hasattr(pipe, "guider"):
        pipe.guider = copy.deepcopy(pipe.guider)
    if form == "count":
        given = {"prompt": prompt} | {c: len(noises) for c in _COUNTS if c in known}
    else:
        given = {"prompt": [prompt] * K}
        given |= {name: [known[name].default] * K for name in _SUNG if name in known}
        call = {k: [v] * K if k == "negative_prompt" else v for k, v in call.items()}
    if form == "pictures":
        call = {key: _a_row(key, value) for key, value in call.items()}
    asked = {"generator": noises, "output_type": output_type, "return_dict": False}
    return pipe(**given, **asked, **call)[0]


def alone(it: Subject, noise: float, output_type: str) -> list[Any]:
    """What its own calls of one row each return, where it takes no more."""
    rows = [own(it, noise, output_type, "count", [g]) for g in generators(0, it.prompts[:1], K)]
    return [row[0] for row in rows]


def _a_row(key: str, value: Any) -> Any:
    if isinstance(value, list) and isinstance(value[:1], list) and "video" not in key:
        return value * K if isinstance(value[0], Image.Image) else value
    pictures = isinstance(value, Image.Image) or "video" in key
    return [value] * K if pictures and not isinstance(value, int | float) else value


def parity(it: Subject) -> None:
    """With reward_scale 0 its latents are the pipeline's own, bit for bit at the same batch."""
    settings = FeynmanKac(reward_scale=0.0, min_ess=1.0)
    out = run(it, settings)
    gaps, errors = [], []
    noise = out.manifest["settings"]["noise"]
    for form in ("count", "texts", "pictures"):
        try:
            theirs = own(it, noise, "latent", form)
        except Exception as error:  # not every pipeline takes every form
            errors.append(f"{form}: {error}")
            continue
        if torch.equal(out.latents[0], theirs.reshape(out.latents[0].shape)):
            if "decode" in it.more:
                return
            try:
                images = own(it, noise, "pil", form)
            except RuntimeError as error:
                if re.search(_DECODES_ALONE.get(type(it.pipe).__name__, "^$"), str(error)):
                    return
                raise
            ours, theirs = _pictures(out.images[0]), _pictures(images)
            assert_same_pictures(ours, theirs)  # large ones are decoded in smaller chunks
            return
        gaps.append(f"{(out.latents[0] - theirs.reshape(out.latents[0].shape)).abs().max():.2g}")
    assert not gaps, f"differs from the pipeline's own call: {gaps}"
    why = _ALONE.get(type(it.pipe).__name__, "^$")
    assert all(re.search(why, error) for error in errors), f"its own call fails: {errors}"
    theirs = torch.stack(alone(it, noise, "latent"))
    torch.testing.assert_close(out.latents[0], theirs, rtol=1e-4, atol=1e-4)
    if "decode" not in it.more:
        assert_same_pictures(out.images[0], alone(it, noise, "pil"))


def _pictures(rows: Any) -> list[Image.Image]:
    """The images of rows, which may be videos."""
    return [one for row in rows for one in (row if isinstance(row, list) else [row])]


def reward(it: Subject) -> None:
    """It is steered: finite, resampled, and the pipeline is as it was before."""
    before = fingerprint(it.pipe)
    out = run(it)
    assert out.latents.isfinite().all()
    assert any(score.replaced.any() for score in out.lineage.scores), "nothing was resampled"
    after = fingerprint(it.pipe)
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    assert not changed, f"modified: {changed}"


def chunks(it: Subject) -> None:
    """How many rows the network sees at once does not matter."""
    whole = run(it)
    for max_batch in (1, 2):
        close(run(it, max_batch=max_batch), whole)


def funnel(it: Subject) -> None:
    """Leaving out the rows that a funnel dropped changes nothing for those that are left."""
    settings = FeynmanKac(
        reward_scale=300.0, min_ess=1.0, num_scores=1, score_from=0.2, score_to=0.9, funnel=(2,)
    )
    short = run(it, settings)
    assert short.latents.shape[1] == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "indices", lambda self, n, conditional: (None, None))
        close(short, run(it, settings))


def packing(it: Subject) -> None:
    """Two prompts in one call are the two prompts in calls of their own."""
    alone = run(it, b=2)
    close(run(it, b=2, prompts_per_call=2), alone)


def lineage(it: Subject) -> None:
    """A row is its latents and its noise: rows with the same of both stay the same."""
    taken: list[torch.Generator] = []
    with pytest.MonkeyPatch.context() as patch:
        real = steering.run.generator

        def kept(seed: int, key: Any, purpose: Any) -> torch.Generator:
            made = real(seed, key, purpose)
            if isinstance(purpose, int):
                taken.append(made)
            return made

        patch.setattr(steering.run, "generator", kept)

        def first(images: Tensor, prompts: list[str]) -> Tensor:
            return torch.arange(len(images), 0, -1.0) * 1e3

        def same_noise(moment: Any) -> None:
            if moment.score is not None:
                for other in taken[1:]:
                    other.set_state(taken[0].get_state())

        settings = FeynmanKac(
            reward_scale=1.0, min_ess=1.0, num_scores=1, score_from=0.2, score_to=0.9
        )
        out = run(it, settings, reward=first, watch=same_noise)
    assert out.lineage.scores[0].ancestors.eq(0).all()
    rows = out.latents[0].float()
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-3, atol=1e-3)


CHECKS: dict[str, Callable[[Subject], None]] = {
    "reward": reward,  # first, while nothing else has called the pipeline
    "parity": parity,
    "chunks": chunks,
    "funnel": funnel,
    "packing": packing,
    "lineage": lineage,
}


def close(one: Any, other: Any) -> None:
    for ours, theirs in zip(one.lineage.scores, other.lineage.scores, strict=True):
        assert torch.equal(ours.ancestors, theirs.ancestors), "other ancestors"
    torch.testing.assert_close(one.latents, other.latents, rtol=2e-3, atol=2e-3)


def fingerprint(pipe: Any) -> dict[str, str]:
    """Of everything that a pipeline holds, what would tell that it was changed."""
    found = {f"pipe.{key}": _mark(value) for key, value in vars(pipe).items()}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                kept = ["training", "processor"]
                if type(part).__module__.startswith("diffusers"):  # transformers sets its own
                    kept += ["_forward_hooks", "_forward_pre_hooks", "forward"]
                held = {key: vars(module)[key] for key in kept if key in vars(module)}
                held["hooks"] = list(getattr(getattr(module, "_diffusers_hook", None), "hooks", ()))
                found[f"{name}.{path}"] = _mark(held)
            for path, weight in part.named_parameters():
                found[f"{name}.{path}"] = f"{id(weight)} {weight._version} {weight.dtype}"
        elif hasattr(part, "config"):
            found[name] = _mark(vars(part))
    return found


def _mark(value: Any, depth: int = 4) -> str:
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().float().cpu().numpy().tobytes()).hexdigest()[:12]
    if isinstance(value, dict) and depth:
        return str({str(k): _mark(v, depth - 1) for k, v in value.items()})
    if isinstance(value, list | tuple) and depth:
        return str([_mark(item, depth - 1) for item in value])
    if isinstance(value, str | int | float | bool | type(None)):
        return repr(value)
    return f"{type(value).__name__} {id(value)}"
