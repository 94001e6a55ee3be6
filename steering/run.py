"""One run of steer(): its checked arguments, and a pipeline call for some of its prompts.

b prompts, k particles per prompt, rows prompt-major.
"""

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance
from torch import Generator, Tensor

from steering.axes import Unclear
from steering.call import PipelineCall, check_preview
from steering.decoding import Decoder, Undecodable, do_nothing, in_float32
from steering.denoiser import Rows, denoisers, distinct
from steering.filter import final_log_z
from steering.following import Following, follow_momentum
from steering.frames import Frames
from steering.learned import Learned
from steering.lineage import Moment
from steering.manifest import describe, select
from steering.networks import out_of_memory, perturbed, refuse_step_caches, undisturbed
from steering.noise import global_states, refuse_global_noise
from steering.outputs import Sound, from_levels, levels, shown
from steering.packing import check_alone, first_step, no_rows
from steering.particles import Particles, needs_scores, refuse_not_finite, way_out
from steering.probe import Again, Batch
from steering.refusals import refuse_momentum
from steering.result import Steered
from steering.schedulers import Look, stochastic
from steering.scoring import PromptScorer
from steering.seeds import generator, keys
from steering.settings import FeynmanKac, population_sizes, scored_steps
from steering.spread import Spread
from steering.tape import Tape, view_of

__all__ = ["Run"]

DECODE_CHUNK = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """The arguments of steer(); `check` checks them and `steered` makes one pipeline call."""

    pipe: DiffusionPipeline
    call: PipelineCall
    judge: PromptScorer
    scout: PromptScorer | None  # scores during the run in place of the judge
    prompts: tuple[str, ...]
    k: int
    settings: FeynmanKac
    seed: int
    preview: Any
    decode: Callable[[Tensor], Any] | None
    frames: Frames
    prompts_per_call: int
    preview_size: float
    spread: Spread
    rows: Rows
    learned: Learned = field(default_factory=Learned)

    def check(self) -> None:
        """Raise ValueError, before any step, for arguments that cannot work."""
        self.spread.check("particles=", (self.k,))
        self.spread.check("funnel=", self.settings.funnel)
        if self.spread.size > 1:
            self.call.check_spread()
        self.call.check_packing(self.prompts_per_call)
        refuse_step_caches(self.pipe)
        if self._cuts() and self.perturbed():
            raise ValueError(
                "Perturbed attention guidance needs the whole batch at once; leave max_batch=, "
                "guidance_interval= and funnel out, or pass pag_scale=0."
            )
        check_preview(self.pipe, self.preview)
        if self.decode is not None and (self.preview is not None or self.preview_size != 1):
            raise ValueError(
                "decode= also makes the images scored during the run, on which preview= and "
                "preview_size= have no effect; leave them out."
            )
        if not needs_scores(self.settings, self.k):
            if self.scout is not None:
                raise ValueError(
                    "on_the_way= has no effect, since this run scores only its final images (one "
                    "particle, reward_scale=0 or min_ess=0, and no funnel); leave it out."
                )
            return
        refuse_momentum(self.pipe, self.call.value("guidance_scale"))
        if self.settings.noise == 0 and self.settings.reward_scale != 0:
            raise ValueError(
                "with noise=0 the copies of a particle remain identical; " + way_out(self.settings)
            )
        self._check_window()

    def _cuts(self) -> bool:
        """Return whether a network may get other rows than the pipeline passes to it."""
        rows, deals = self.rows, self.learned.deals
        return rows.max_batch is not None or rows.halvings > 0 or self._thins() or deals

    def _thins(self) -> bool:
        """Return whether single rows of a batch may be left out."""
        return self.rows.guidance != (0.0, 1.0) or self.settings.funnel != ()

    def _follows(self) -> bool:
        """Return whether the head may draw per-row noise, for an image or for a prior's steps."""
        chains = sum(isinstance(p, SchedulerMixin) for p in self.pipe.components.values())
        draws = bool(self.call.pictures()) or chains > 1
        return draws and needs_scores(self.settings, self.k)

    def _check_window(self) -> None:
        refused = []
        counts = self.call.num_steps()
        for steps in counts:
            try:
                scored = scored_steps(steps, self.settings)
                population_sizes(self.k, len(scored), self.settings)
            except ValueError as error:
                refused.append(error)
        if refused and len(refused) == len(counts):  # otherwise the first step decides
            raise refused[0]

    def perturbed(self) -> bool:
        """Return whether the rows of a batch depend on each other, so that it must not be cut."""
        return perturbed(self.pipe, self.call.value("pag_scale"))

    def attempt(self, indices: Sequence[int], on_step: Callable[[Moment], None]) -> Steered | None:
        """As `steered`, but return None if memory runs out and a smaller batch may fit."""
        try:
            return self.steered(indices, on_step)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            whole = 2 * len(indices) * self.k  # with guidance
            smallest = self.rows.chunk(min(whole, self.rows.max_batch or whole)) == 1
            # another process would wait for this one at the next score
            alone = self.spread.size == 1
            if not out_of_memory(error) or smallest or self.perturbed() or not alone:
                raise
            return None

    @torch.no_grad()
    def steered(self, indices: Sequence[int], on_step: Callable[[Moment], None]) -> Steered:
        """Steer the prompts `indices` through one call of the pipeline.

        If the call fails before its first step, the other ways to request rows are tried. If none
        works, `no_rows` says so, or the first error is raised.
        """
        met: Exception | None = None
        while True:
            self.learned.began = False
            try:
                return self._steered(indices, on_step)
            except Exception as error:
                if isinstance(error, AttributeError) and isinstance(error.obj, SchedulerMixin):
                    kind = "DDIM" if isinstance(error.obj, DDIMScheduler) else "Euler"
                    raise ValueError(
                        f"{type(self.pipe).__name__} reads scheduler.{error.name}, which {kind} "
                        "does not have; use a pipeline that works with other schedulers."
                    ) from error
                if isinstance(error, Unclear) and not self._cuts():
                    raise error.of_following() from None
                ours = isinstance(error, Undecodable) or out_of_memory(error)
                # with `deals`, the earlier error is more informative than Unclear
                ours = ours or (isinstance(error, Unclear) and not self.learned.deals)
                if self.learned.began or ours or len(indices) * self.k == 1:
                    raise
                if met is None:
                    met = error
                    traceback.clear_frames(error.__traceback__)  # frees the call's tensors
                if not self.learned.turn():
                    told = no_rows(self.pipe, self._chain, self.call, indices, self.k, met)
                    raise told from (None if told is met else met)

    def _chain(self, noise: Sequence[Generator]) -> Any:
        return stochastic(self.pipe.scheduler, self.settings.noise, noise)

    def _steered(self, indices: Sequence[int], on_step: Callable[[Moment], None]) -> Steered:
        self.learned.rng = global_states()
        texts = [keys(self.prompts)[i] for i in indices]
        own = range(self.spread.rank, self.k, self.spread.size)  # this process's particles
        noise = [generator(self.seed, text, i) for text in texts for i in own]
        rows = replace(self.rows, num=len(noise), whole=not self._cuts())
        call = self.call.for_prompts(indices, len(own), noise, self.learned.way)
        scheduler = self._chain(noise)
        tape = Tape()
        decoder = Decoder(
            self.pipe,
            scheduler,
            tape,
            call,
            len(noise),
            preview=self.preview,
            preview_size=self.preview_size,
            decode=self.decode,
            precise=self._precise,
            chunk=-(-min(DECODE_CHUNK, len(noise)) // 2**rows.halvings),
            frames=self.frames,
            first_alone=self.learned.first_alone,
        )

        def judge(x0: Tensor) -> tuple[Tensor, Tensor | None]:
            outputs = decoder.images(x0, rows)
            return (self.scout or self.judge).score(outputs, indices), shown(outputs)

        particles = Particles(
            len(indices),
            self.k,
            self.settings,
            judge=judge,
            generators=[generator(self.seed, text, "resample") for text in texts],
            rows=rows,
            describe=lambda i, j: f"prompt {indices[i]}, {texts[i][0]!r}, particle {j}",
            on_step=lambda moment: on_step(replace(moment, prompts=tuple(indices))),
            spread=self.spread,
        )

        scheduler.chain.exchange = self.spread.whole
        if self.learned.packed != (len(indices) > 1):  # the layout of rows may have changed
            self.learned.batch, self.learned.packed = Batch(), len(indices) > 1
        if self._follows():
            rows.following = Following(scheduler.chain, self.learned.batch, len(noise))
        view = self._view(scheduler, indices, rows)
        scheduler.chain.observer = self._observer(view, decoder, particles, indices)
        tape.record(view)
        with undisturbed(self.pipe):
            returned = view(**call, output_type="latent")[0]
            if rows.following is not None:
                returned = rows.following.returned(returned)
            return self._kept(indices, returned, decoder, particles, scheduler.chain.last)

    def _observer(
        self, view: Any, decoder: Decoder, particles: Particles, indices: Sequence[int]
    ) -> Callable[[Look], Tensor | None]:
        """Return what the scheduler of `view` calls at each step, before it moves."""
        guiders = [part for part in vars(view).values() if isinstance(part, BaseGuidance)]
        following, chain = particles.rows.following, view.scheduler.chain

        def observer(look: Look) -> Tensor | None:
            self._begin(look, decoder, indices)
            if look.step == 0 and following is not None:
                following.settle(chain.sample)
            survivors = particles(look)
            if survivors is not None:
                follow_momentum(guiders, survivors, self.spread.whole)
            return survivors

        return observer

    def _view(self, scheduler: Any, indices: Sequence[int], rows: Rows) -> Any:
        replaced = {
            "scheduler": scheduler,
            "_progress_bar_config": {"disable": True},
            "maybe_free_model_hooks": do_nothing,  # would hook the stand-ins
        }
        if self._cuts() or rows.following is not None:
            self._look_beside(indices, rows.num)
            replaced |= denoisers(self.pipe, rows, self.learned.batch)
        if len(indices) > 1:
            replaced |= distinct(self.pipe)
        return view_of(self.pipe, **replaced)

    def _look_beside(self, indices: Sequence[int], num: int) -> None:
        """Prepare the repeated calls with other numbers of rows, from which `Batch` learns."""
        each = 4 if num == 3 * len(indices) else 3
        call, way = self.call, self.learned.way

        def again(call: PipelineCall, indices: Sequence[int], each: int, seeds: list[int]) -> Again:
            noise = [Generator().manual_seed(seed) for seed in seeds]
            asked = call.resized(num, len(noise)).for_prompts(indices, each, noise, way)
            return Again(self.pipe, partial(self._chain, noise), asked, len(indices), each)

        changed = None
        if self.rows.guidance != (0.0, 1.0):
            changed = again(call.changed(indices[0]), (0, 1), 1, [0, 0])
        seeds = [int(i % each == 0) for i in range(each * len(indices))]
        beside = again(call, indices, each, seeds)
        counted = way == 0 and not self.learned.deals
        self.learned.batch.start(beside, changed, self._thins(), self._follows(), counted)

    def _begin(self, look: Look, decoder: Decoder, indices: Sequence[int]) -> None:
        """Check the pipeline before the first move of a call, so that failures cost little."""
        if look.step > 0:
            return
        if self.learned.began:
            raise ValueError(
                f"{type(self.pipe).__name__} denoises more than once per call, which the filter "
                "cannot follow; use a pipeline, or a length, that runs the scheduler once."
            )
        self.learned.began = True
        call, way = self.call, self.learned.way
        one = call.resized(len(indices) * self.k, 1)
        first = partial(first_step, self.pipe, self._chain, one, indices[:1], 1, way)
        refuse_global_noise(self.pipe, self.learned.rng, first)
        if (self._cuts() or self._follows()) and not self.learned.batch.asked:
            raise Unclear(type(self.pipe).__name__, "none of its networks is known")
        self.learned.batch.step()
        if len(indices) > 1 and not self.learned.packs:
            two = replace(self.rows, num=2)
            cut = denoisers(self.pipe, two, self.learned.batch) if self._cuts() else {}
            check_alone(self.pipe, self._chain, call, way, cut)
            self.learned.packs = True
        if not self.learned.decodes:
            scored = needs_scores(self.settings, self.k)
            decoder.check(look.predict(), scored, funnel=bool(self.settings.funnel))
            self.learned.decodes, self.learned.first_alone = True, decoder.first_alone

    def _kept(
        self,
        indices: Sequence[int],
        returned: Any,
        decoder: Decoder,
        particles: Particles,
        last: Tensor | None,
    ) -> Steered:
        """Return the result; if scoring it fails, the exception's `finished` has the latents."""
        if last is None:
            raise ValueError(
                f"{type(self.pipe).__name__} made no step of its scheduler, so nothing was "
                "steered; use the pipeline whose own call denoises."
            )
        shown = particles.living(returned)
        b, num = len(indices), particles.num
        kept = Steered(
            prompts=tuple(self.prompts[i] for i in indices),
            images=[[] for _ in indices],
            rewards=torch.full((b, num), math.nan),
            components={},
            log_weights=torch.full((b, num), math.nan),
            log_z=torch.full((b,), math.nan),
            lineage=particles.lineage,
            latents=self.spread.whole(shown).unflatten(0, (b, num)).cpu(),
            last=self.spread.whole(particles.living(last)).unflatten(0, (b, num)).cpu(),
            manifest=select(self._described, indices),
        )
        try:
            latents = particles.living(decoder.taken(returned, last))
            return self._finished(kept, indices, latents, decoder, particles)
        except BaseException as error:
            error.finished = kept  # type: ignore[attr-defined]
            raise

    def _finished(
        self,
        kept: Steered,
        indices: Sequence[int],
        latents: Tensor,
        decoder: Decoder,
        particles: Particles,
    ) -> Steered:
        images = decoder.finals(latents, particles.rows)
        self.pipe.maybe_free_model_hooks()
        outputs = levels(images)
        scored = decoder.chosen(outputs).to(latents.device)
        scores, parts = self.judge.evaluate(scored, indices)
        if self.spread.size > 1:
            scores = particles.whole(scores)
            parts = {name: particles.whole(part.to(scores.device)) for name, part in parts.items()}
            rate = images[0].rate if isinstance(images[0], Sound) else 0
            own = outputs.to(latents.device).view(torch.uint8)  # NCCL gathers no int16
            images = from_levels(self.spread.whole(own).view(outputs.dtype), rate)
        state = particles.close(scores)
        rewards, num = scores.cpu(), particles.num
        refuse_not_finite(rewards, particles.describe, "the final image")
        return replace(
            kept,
            images=[images[i : i + num] for i in range(0, len(images), num)],
            rewards=rewards,
            components={name: part.cpu() for name, part in parts.items()},
            log_weights=state.log_weights.cpu(),
            log_z=final_log_z(state).cpu(),
        )

    @cached_property
    def _precise(self) -> Any:
        return None if self.decode is not None else in_float32(self.pipe)

    @cached_property
    def _described(self) -> dict[str, Any]:
        """The manifest of all prompts, cached because it reads the weights."""
        return describe(
            self.pipe,
            self.settings,
            self.call.keywords,
            keys(self.prompts),
            references=self.judge.references or (self.scout and self.scout.references),
            preview=self.preview,
            reward=self.judge.name,
            on_the_way=None if self.scout is None else self.scout.name,
            particles=self.k,
            seed=self.seed,
            max_batch=self.rows.max_batch or "auto",
            preview_size=self.preview_size,
            score_frames=self.frames.which,
            video_score=self.frames.score,
            guidance_interval=self.rows.guidance,
            halvings=self.rows.halvings,
            prompts_per_call=self.prompts_per_call,
            decode=self.decode is not None,
        )
