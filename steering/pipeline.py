"""steer(): the particle filter inside a diffusers pipeline's own call.

The pipeline's call runs unchanged on a shallow copy that has a stochastic scheduler. The pipeline
that was passed in is never modified, so nothing needs restoring and concurrent calls do not
interfere. The target is p(x0 | prompt) exp(λ r(x0, prompt)), where p is the law of *this* call,
with its guidance, steps, image and mask.

b prompts, k particles per prompt, rows prompt-major.
"""

import gc
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from steering.arguments import check_prompts, check_steer
from steering.call import PipelineCall, check_pipeline
from steering.denoiser import Rows
from steering.frames import Frames
from steering.lineage import Moment, Score, why_nothing_moved
from steering.result import Steered
from steering.run import Run
from steering.schedulers import stochastic
from steering.scoring import RewardFunction, scorers_of
from steering.seeds import generators
from steering.settings import FeynmanKac
from steering.spread import Spread

__all__ = ["RewardFunction", "Steered", "generators", "steer", "steer_each"]

logger = logging.getLogger(__name__)


def steer(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | str,
    reward: RewardFunction,
    particles: int = 8,
    settings: FeynmanKac = FeynmanKac(),  # noqa: B008 (frozen)
    seed: int = 0,
    preview: Any = None,
    decode: Callable[[Tensor], Any] | None = None,
    max_batch: int | str | None = "auto",
    prompts_per_call: int = 1,
    progress: bool = True,
    references: Sequence[Any] | str | None = None,
    preview_size: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    spread: Any = None,
    watch: Callable[[Moment], None] | None = None,
    score_frames: int | str = "all",
    video_score: str = "mean",
    on_the_way: RewardFunction | None = None,
    **pipe_kwargs: Any,
) -> Steered:
    """Draw `particles` weighted images per prompt from p(x0 | prompt) exp(λ r(x0, prompt)).

    Args:
        reward: reward(images (n, 3, h, w) in [0, 1], n prompts) -> (n,), a `RewardFunction`. It
            also gets `references`, one per prompt, as a keyword if there are any;
            references="image" passes the image of the call's keyword `image`, the source of an
            edit.
        particles: At most 10,000; also at most 10,000 steps or frames and 16,384 pixels a side.
        seed: 0 to 2**63 - 1.
        preview: An AutoencoderTiny that decodes the images scored during the run. The final images
            come from the pipeline's own decoder, and the final reward is that of the 8-bit image.
        decode: Latents (n, ...) -> floats in place of the pipeline's own decoder: images in [0, 1],
            (n, 3, h, w); videos (n, frames, 3, h, w); or a pair of waveforms in [-1, 1], (n,
            channels, samples), and their sampling rate in Hz. Refused beside preview, preview_size.
        max_batch: Maximum number of rows that the network evaluates at once. If memory runs out,
            it is halved as often as necessary, also for "auto" (or None), but not with spread.
        preview_size: The sides of the images scored during the run, as a share of the final ones.
        guidance_interval: (a, b): guidance is applied at step i of n if a <= i/n < b. The other
            steps cost half, and p is then another distribution.
        spread: True, or a process group, over whose processes each prompt's particles are divided.
            Every process makes the same call and gets the same result.
        watch: Called after every step with its `Moment`, which holds previews and weights if the
            step was scored. An exception that it raises ends the run.
        score_frames: The frames of a video that the reward scores, each as an image: "all",
            "first", or a number of evenly spaced ones. Only a first frame that depends on no other
            can be decoded alone; otherwise every score decodes the whole video.
        video_score: The score of a video: the "mean" or the "min" of its frames' scores.
        on_the_way: Another reward, of the same scale, for what is scored during the run, as the
            lineage shows it. The final images are weighed by `reward`, so the target is the same.
        pipe_kwargs: Keywords of the pipeline's own call.

    Raises ValueError before any step for arguments that cannot work, and during the run for a
    reward that is not finite. `Steered` says what a run that ends early keeps.
    """
    given = dict(locals())  # must come first: the arguments, as steer_each() takes them
    given |= given.pop("pipe_kwargs")
    return _joined(given)


def _joined(given: dict[str, Any]) -> Steered:
    """Return the results of steer_each() as one; `finished` of an exception has those before it."""
    if "only" in given:
        raise ValueError("only= is an argument of steer_each(); pass steer() those prompts alone.")
    parts: list[Steered] = []
    try:
        for part in steer_each(**given):
            parts.append(part)  # one by one, so that an interrupt keeps the finished ones
    except BaseException as cut:
        late = getattr(cut, "finished", None)  # finished steps without images
        parts += [] if late is None else [late]
        cut.finished = Steered.join(parts) if parts else None  # type: ignore[attr-defined]
        raise
    return Steered.join(parts)


def steer_each(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | str,
    reward: RewardFunction,
    particles: int = 8,
    settings: FeynmanKac = FeynmanKac(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    preview: Any = None,
    decode: Callable[[Tensor], Any] | None = None,
    max_batch: int | str | None = "auto",
    prompts_per_call: int = 1,
    progress: bool = True,
    references: Sequence[Any] | str | None = None,
    preview_size: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    spread: Any = None,
    watch: Callable[[Moment], None] | None = None,
    score_frames: int | str = "all",
    video_score: str = "mean",
    on_the_way: RewardFunction | None = None,
    only: Sequence[int] | None = None,
    **pipe_kwargs: Any,
) -> Iterator[Steered]:
    """As `steer`, but yield the result of each call of the pipeline as soon as it is finished.

    The arguments are checked when this is called, before the first result is requested. `only`
    lists the indices of the prompts to run; each uses the same noise as when all are run.
    """
    given = dict(locals())  # must come first
    prompts = check_prompts(prompts)
    checked = inspect.signature(check_steer).parameters.keys() & given.keys()
    check_steer(num_prompts=len(prompts), **{name: given[name] for name in checked})
    check_pipeline(pipe, decode is not None)
    ours = tuple(inspect.signature(steer).parameters)
    call = PipelineCall.check(pipe, prompts, pipe_kwargs, ours[:-1])
    if isinstance(references, str):
        references = [call.reference(references)] * len(prompts)
    frames = Frames(score_frames, video_score)
    judge, scout = scorers_of(reward, on_the_way, prompts, references, frames)
    run = Run(
        pipe=pipe,
        call=call,
        judge=judge,
        scout=scout,
        prompts=prompts,
        k=particles,
        settings=replace(settings, noise=stochastic(pipe.scheduler, settings.noise).chain.noise),
        seed=seed,
        preview=preview,
        decode=decode,
        frames=frames,
        prompts_per_call=prompts_per_call,
        preview_size=preview_size,
        spread=Spread(spread),
        rows=Rows(None if max_batch == "auto" else max_batch, guidance=guidance_interval),  # type: ignore[arg-type]
    )
    run.check()
    indices = range(len(prompts)) if only is None else only
    starts = range(0, len(indices), prompts_per_call)
    return _each(run, [indices[i : i + prompts_per_call] for i in starts], progress, watch)


def _each(
    run: Run,
    groups: list[Sequence[int]],
    progress: bool,
    watch: Callable[[Moment], None] | None,
) -> Iterator[Steered]:
    with tqdm(disable=not progress, unit="step", desc="steering") as bar:

        def on_step(moment: Moment) -> None:
            bar.total = moment.num_steps * len(groups)
            if moment.score is not None:
                ess, best = moment.score.ess.mean().item(), moment.score.rewards.max().item()
                bar.set_postfix(ess=f"{ess:.1f}/{run.k}", best=f"{best:.3g}", refresh=False)
            bar.update()
            if watch is not None:
                watch(moment)

        scores: list[Score] = []
        for number, indices in enumerate(groups):
            bar.set_description(f"prompt {number + 1}/{len(groups)}", refresh=False)
            done = bar.n
            while (result := run.attempt(indices, on_step)) is None:
                run = replace(run, rows=replace(run.rows, halvings=run.rows.halvings + 1))
                logger.warning(
                    "Out of memory: the network's batch is halved from here on, to 1/%d of what "
                    "it was, and prompt %d starts again.",
                    2**run.rows.halvings,
                    indices[0],
                )
                bar.n = done
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            scores += [replace(score, previews=None) for score in result.lineage.scores]
            if number == len(groups) - 1 and (advice := why_nothing_moved(scores, run.settings)):
                logger.warning("%s", advice)
            yield result
