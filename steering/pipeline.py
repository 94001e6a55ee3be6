"""steer(): the particle filter inside a diffusers pipeline's own call.

The pipeline runs unchanged, on a shallow copy that carries our scheduler; what was passed in is
never modified, so there is nothing to restore and two calls at once do not meet. The target is
p(x0 | prompt) exp(λ r(x0, prompt)) with p the law of *this* call: guidance, steps, image and mask
included.

b prompts, k particles a prompt, rows prompt-major.
"""

import gc
import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steering.call import PipelineCall, check_pipeline, check_preview
from steering.decoding import Decoder, Tape, do_nothing, in_float32, to_pil, to_tensor, view_of
from steering.denoiser import (
    Rows,
    denoisers,
    distinct,
    perturbed,
    refuse_step_caches,
    undisturbed,
)
from steering.filter import final_log_z
from steering.manifest import describe, select
from steering.observer import Filter, needs_scores, refuse_not_finite, way_out
from steering.result import Steered
from steering.schedulers import stochastic
from steering.scoring import Judge, RewardFunction
from steering.settings import FeynmanKac, population_sizes, scored_steps
from steering.spread import Spread

__all__ = ["RewardFunction", "Steered", "generators", "steer", "steer_each"]

logger = logging.getLogger(__name__)

_DECODE_CHUNK = 8


def generators(seed: int, prompts: Sequence[str], k: int) -> list[Generator]:
    """The b*k CPU generators of a run, prompt-major: one a particle.

    Each depends on the seed, its prompt's text, how often that text came before, and its index
    alone, so a prompt draws the same noise whatever else is in the call.
    """
    return [_generator(seed, key, i) for key in _keys(prompts) for i in range(k)]


def _keys(prompts: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def _generator(seed: int, key: tuple[str, int], purpose: int | str) -> Generator:
    digest = hashlib.sha256(repr((seed, *key, purpose)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def steer(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | str,
    reward: RewardFunction,
    particles: int = 8,
    settings: FeynmanKac = FeynmanKac(),  # noqa: B008 (frozen)
    seed: int = 0,
    preview: Any = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    max_batch: int | str | None = "auto",
    prompts_per_call: int = 1,
    progress: bool = True,
    references: Sequence[Any] | None = None,
    preview_size: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    spread: Any = None,
    **pipe_kwargs: Any,
) -> Steered:
    """Draw `particles` weighted images a prompt from p(x0 | prompt) exp(λ r(x0, prompt)).

    reward(images (n, 3, h, w) in [0, 1], n prompts) -> (n,), with `references` (one a prompt) as a
    keyword where there are any. preview: an AutoencoderTiny that decodes for the scores along the
    way; the final images come from the pipeline's own decoder, and the reward is that of the 8-bit
    image. preview_size: sides of what is scored on the way, as a share of the image's. decode:
    latents (n, ...) -> images in [0, 1], for pipelines whose own decoder cannot be reached.
    max_batch: how many rows the network evaluates at once, at most; where memory runs out, "auto"
    (or None) too, that is halved as often as it takes. guidance_interval (a, b): step i of n is
    guided where a <= i/n < b; the others cost half (and make another p). spread: True, or a process
    group, over whose processes each prompt's particles are spread; all call this alike, and get the
    same. pipe_kwargs: keywords of the pipeline's own call.

    Raises ValueError before any step for what cannot work, and during the run for a reward that is
    not finite. Whatever cuts the run off, Ctrl-C too, the exception's `finished` is the Steered of
    the finished prompts, or None.
    """
    if "only" in pipe_kwargs:
        raise ValueError("only= is an argument of steer_each(); pass steer() those prompts alone.")
    parts: list[Steered] = []
    try:
        for part in steer_each(
            pipe,
            prompts,
            reward,
            particles,
            settings,
            seed=seed,
            preview=preview,
            decode=decode,
            max_batch=max_batch,
            prompts_per_call=prompts_per_call,
            progress=progress,
            references=references,
            preview_size=preview_size,
            guidance_interval=guidance_interval,
            spread=spread,
            **pipe_kwargs,
        ):
            parts.append(part)  # one by one: what is finished outlives an interrupt
    except BaseException as cut:
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
    decode: Callable[[Tensor], Tensor] | None = None,
    max_batch: int | str | None = "auto",
    prompts_per_call: int = 1,
    progress: bool = True,
    references: Sequence[Any] | None = None,
    preview_size: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    spread: Any = None,
    only: Sequence[int] | None = None,
    **pipe_kwargs: Any,
) -> Iterator[Steered]:
    """As `steer`, yielding the result of each call of the pipeline as soon as it is finished.

    Input is checked here, before the first is asked for. `only` names the prompts to run, by
    index; each comes out as it would among all.
    """
    prompts = _checked_prompts(prompts)
    check_pipeline(pipe)
    if not isinstance(settings, FeynmanKac):
        raise ValueError(f"settings is a {type(settings).__name__}; pass FeynmanKac(...).")
    if decode is not None and not callable(decode):
        raise ValueError(
            f"decode={decode!r:.80}: pass a function from latents to images (n, 3, h, w) in [0, 1]."
        )
    ours = tuple(inspect.signature(steer).parameters)
    call = PipelineCall.check(pipe, prompts, pipe_kwargs, ours[:-1])
    noise = stochastic(pipe.scheduler, settings.noise).chain.noise
    run = _Run(
        pipe=pipe,
        call=call,
        judge=Judge(reward, prompts, references),
        prompts=prompts,
        k=particles,
        settings=replace(settings, noise=noise),
        seed=seed,
        preview=preview,
        decode=decode,
        prompts_per_call=prompts_per_call,
        preview_size=preview_size,
        spread=Spread(spread),
        rows=Rows(None if max_batch == "auto" else max_batch, guidance=guidance_interval),  # type: ignore[arg-type]
    )
    run.check()
    indices = range(len(prompts)) if only is None else only
    starts = range(0, len(indices), prompts_per_call)
    return _each(run, [indices[i : i + prompts_per_call] for i in starts], progress)


def _each(run: "_Run", groups: list[Sequence[int]], progress: bool) -> Iterator[Steered]:
    with tqdm(disable=not progress, unit="step", desc="steering") as bar:

        def on_step(num_steps: int, ess: float | None, best: float | None) -> None:
            bar.total = num_steps * len(groups)
            if ess is not None:
                bar.set_postfix(ess=f"{ess:.1f}/{run.k}", best=f"{best:.3g}", refresh=False)
            bar.update()

        resampled = False
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
            resampled |= any(score.resampled.any() for score in result.lineage.scores)
            if number == len(groups) - 1 and result.lineage.scores and not resampled:
                _say_that_nothing_moved(run.settings, run.k)
            yield result


def _check_share(size: Any) -> None:
    if not isinstance(size, int | float) or not 0 < size <= 1:
        raise ValueError(f"preview_size={size!r}: pass a share of the image's sides, above 0 to 1.")


def _check_interval(interval: Any) -> None:
    ends = interval if isinstance(interval, tuple) and len(interval) == 2 else (1, 0)
    if not all(isinstance(end, int | float) for end in ends) or not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError(
            f"guidance_interval={interval!r}: pass two fractions of the run, the first of them "
            "smaller, such as (0.2, 0.7)."
        )


def _say_that_nothing_moved(settings: FeynmanKac, k: int) -> None:
    if settings.min_ess > 0 and settings.reward_scale != 0:
        # an effective sample size is never below 1
        what = "min_ess" if settings.min_ess * k <= 1 else "reward_scale"
        logger.warning("No score resampled: the run is best-of-k; raise %s.", what)


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in said for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def _checked_prompts(prompts: Any) -> tuple[str, ...]:
    if isinstance(prompts, str):
        return (prompts,)
    texts = tuple(prompts) if isinstance(prompts, Iterable) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts={prompts!r:.80}: pass one text or more.")
    return texts


@dataclass(frozen=True, kw_only=True)
class _Run:
    """steer()'s arguments, checked; `steered` is one call of the pipeline."""

    pipe: DiffusionPipeline
    call: PipelineCall
    judge: Judge
    prompts: tuple[str, ...]
    k: int
    settings: FeynmanKac
    seed: int
    preview: Any
    decode: Callable[[Tensor], Tensor] | None
    prompts_per_call: int
    preview_size: float
    spread: Spread
    rows: Rows

    def check(self) -> None:
        """Raise ValueError, before any step, for what cannot work."""
        counts = {"particles": self.k, "prompts_per_call": self.prompts_per_call}
        if self.rows.max_batch is not None:
            counts["max_batch"] = self.rows.max_batch
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                also = ', or "auto"' if name == "max_batch" else ""
                raise ValueError(f"{name}={value!r}: pass a whole number of 1 or more{also}.")
        self.spread.check("particles=", (self.k,))
        self.spread.check("funnel=", self.settings.funnel)
        if self.spread.size > 1:
            self.call.check_spread()
        _check_share(self.preview_size)
        _check_interval(self.rows.guidance)
        self.call.check_packing(self.prompts_per_call)
        if self.decode is None:
            self.call.check_frames()
        refuse_step_caches(self.pipe)
        if self._cuts() and self.perturbed():
            raise ValueError(
                "Perturbed attention guidance needs its whole batch at once; leave max_batch=, "
                "guidance_interval= and funnel out, or pass pag_scale=0."
            )
        check_preview(self.pipe, self.preview)
        if not needs_scores(self.settings, self.k):
            return
        if self.settings.noise == 0 and self.settings.reward_scale != 0:
            raise ValueError(
                "noise=0 leaves no noise to tell the copies of a particle apart; "
                + way_out(self.settings)
            )
        self._check_window()

    def _cuts(self) -> bool:
        """Whether a network may be shown fewer rows than its pipeline hands it."""
        rows = self.rows
        fewer = rows.guidance != (0.0, 1.0) or self.settings.funnel != ()
        return rows.max_batch is not None or rows.halvings > 0 or fewer

    def _check_window(self) -> None:
        refused = []
        counts = self.call.num_steps()
        for steps in counts:
            try:
                scored = scored_steps(steps, self.settings)
                population_sizes(self.k, len(scored), self.settings)
            except ValueError as error:
                refused.append(error)
        if refused and len(refused) == len(counts):  # else the first step knows, and decides
            raise refused[0]

    def perturbed(self) -> bool:
        """Whether the rows of a batch depend on one another, so that it must not be cut."""
        return perturbed(self.pipe, self.call.value("pag_scale"))

    def attempt(self, indices: Sequence[int], on_step: Callable[..., None]) -> Steered | None:
        """As `steered`; None, with no traceback that holds tensors, where memory ran out."""
        try:
            return self.steered(indices, on_step)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            whole = 2 * len(indices) * self.k  # guided rows too
            smallest = self.rows.chunk(min(whole, self.rows.max_batch or whole)) == 1
            # another process would wait for this one at the next score
            alone = self.spread.size == 1
            if not _out_of_memory(error) or smallest or self.perturbed() or not alone:
                raise
            return None

    @torch.no_grad()
    def steered(self, indices: Sequence[int], on_step: Callable[..., None]) -> Steered:
        """Steer the prompts `indices` through one call of the pipeline."""
        keys = [_keys(self.prompts)[i] for i in indices]
        own = range(self.spread.rank, self.k, self.spread.size)  # of the particles
        noise = [_generator(self.seed, key, i) for key in keys for i in own]
        rows = replace(self.rows, live=None, source=None, num=len(noise))
        call = self.call.for_prompts(indices, len(own), noise)
        scheduler = stochastic(self.pipe.scheduler, self.settings.noise, noise)
        tape = Tape()
        decoder = Decoder(
            self.pipe,
            scheduler,
            tape,
            call,
            preview=self.preview,
            preview_size=self.preview_size,
            decode=self.decode,
            precise=self._precise,
            chunk=-(-min(_DECODE_CHUNK, len(noise)) // 2**rows.halvings),
        )
        particles = Filter(
            len(indices),
            self.k,
            self.settings,
            judge=lambda x0: self.judge.score(decoder.images(x0), indices),
            generators=[_generator(self.seed, key, "resample") for key in keys],
            rows=rows,
            describe=lambda i, j: f"prompt {indices[i]}, {keys[i][0]!r}, particle {j}",
            on_step=on_step,
            spread=self.spread,
        )
        scheduler.chain.observer = particles
        scheduler.chain.exchange = self.spread.whole
        replaced = {
            "scheduler": scheduler,
            "_progress_bar_config": {"disable": True},
            "maybe_free_model_hooks": do_nothing,  # it would hook the stand-ins
        }
        if self._cuts():
            replaced |= denoisers(self.pipe, rows)
        if len(indices) > 1:
            replaced |= distinct(self.pipe)
        view = view_of(self.pipe, **replaced)
        tape.record(view)
        with undisturbed(self.pipe):
            latents = view(**call, output_type="latent")[0]
            return self._result(indices, particles.living(latents), decoder, particles)

    def _result(
        self, indices: Sequence[int], latents: Tensor, decoder: Decoder, particles: Filter
    ) -> Steered:
        images = decoder.finals(latents)
        self.pipe.maybe_free_model_hooks()
        pixels = to_tensor(images, latents.device)
        scores, parts = self.judge.evaluate(pixels, indices)
        if self.spread.size > 1:
            scores, latents = particles.whole(scores), self.spread.whole(latents)
            parts = {name: particles.whole(part.to(scores.device)) for name, part in parts.items()}
            images = to_pil(self.spread.whole((pixels * 255).round().to(torch.uint8)) / 255)
        state = particles.close(scores)
        rewards, num = scores.cpu(), particles.num
        refuse_not_finite(rewards, particles.describe, "the final image")
        chosen = [self.prompts[i] for i in indices]
        return Steered(
            prompts=tuple(chosen),
            images=[images[i : i + num] for i in range(0, len(images), num)],
            rewards=rewards,
            components={name: part.cpu() for name, part in parts.items()},
            log_weights=state.log_weights.cpu(),
            log_z=final_log_z(state).cpu(),
            lineage=particles.lineage,
            latents=latents.unflatten(0, (len(indices), num)).cpu(),
            manifest=select(self._described, indices),
        )

    @cached_property
    def _precise(self) -> Any:
        return None if self.decode is not None else in_float32(self.pipe)

    @cached_property
    def _described(self) -> dict[str, Any]:
        """The manifest of all prompts: it reads the weights, once a run."""
        return describe(
            self.pipe,
            self.settings,
            self.call.keywords,
            _keys(self.prompts),
            references=self.judge.references,
            preview=self.preview,
            reward=self.judge.name,
            particles=self.k,
            seed=self.seed,
            max_batch=self.rows.max_batch or "auto",
            preview_size=self.preview_size,
            guidance_interval=self.rows.guidance,
            halvings=self.rows.halvings,
            prompts_per_call=self.prompts_per_call,
            decode=self.decode is not None,
        )
