"""The filter as a scheduler's observer: called before every move to score, weigh and resample."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from steering.denoiser import Rows
from steering.filter import FilterState, Resampled, close, resample, start, weigh
from steering.lineage import Lineage, Moment, Score
from steering.potentials import History
from steering.schedulers import Look
from steering.settings import FeynmanKac, population_sizes, scored_steps
from steering.spread import Spread

__all__ = ["Particles", "needs_scores", "refuse_not_finite", "refuse_overflow", "way_out"]

PREVIEW = 64  # pixels, the longer side of the small images that a lineage keeps


class Particles:
    """Steers b prompts of k particles through one pipeline call (`Chain.observer`).

    `judge(x0) -> (b, num), (b*num, 3, h, w)` decodes and scores the rows x0 (b*num, *shape) of the
    living particles, with several processes only those of this one; sounds have None as images.
    `on_step(moment)` is called at every step, after its score and before its move.
    """

    def __init__(
        self,
        b: int,
        k: int,
        settings: FeynmanKac,
        judge: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        generators: Sequence[Generator],
        rows: Rows,
        describe: Callable[[int, int], str],
        on_step: Callable[[Moment], None],
        spread: Spread | None = None,
    ):
        self.b, self.k, self.num = b, k, k
        self._spread = spread or Spread()
        self._rows_each = k // self._spread.size
        self.state: FilterState | None = None
        self._settings, self._judge, self._generators = settings, judge, generators
        self.rows, self.describe, self._on_step = rows, describe, on_step
        self._sizes: dict[int, int] = {}
        self._scores: list[Score] = []
        self._num_steps = 0

    @property
    def lineage(self) -> Lineage:
        return Lineage(self._num_steps, tuple(self._scores))

    def __call__(self, look: Look) -> Tensor | None:
        if look.step == 0:
            self._begin(look)
        self.rows.progress = (look.step + 1) / len(look.stds)  # for the next network call
        if look.step not in self._sizes:
            self._on_step(Moment(look.step, self._num_steps))
            return None
        x0 = look.predict()
        rewards, images = self._judge(self.living(x0))
        rewards, previews = self.whole(rewards), self._previews(images)
        if self.state is None:
            self.state = start(self.b, self.k, rewards.device)
        # NaN is only detected when `_keep` reads the scores; until then no index may depend on it
        safe = rewards.nan_to_num(0.0, 0.0, 0.0)
        progress = (len(self._scores) + 1) / (len(self._sizes) + 1)
        state = weigh(self.state, safe, self._settings, progress)
        log_weights, size = state.log_weights, self._sizes[look.step]
        moving = look.stds[look.step] > 0
        found = resample(state, self._settings, self._generators, size, moving)
        found = self._agreed(found)
        self.state = found.state
        self._keep(look.step, rewards, log_weights, found, previews)
        return self._descend(found.ancestors)

    def _begin(self, look: Look) -> None:
        self._num_steps = len(look.stds)
        if not needs_scores(self._settings, self.k):
            return
        steps = scored_steps(self._num_steps, self._settings)
        sizes = population_sizes(self.k, len(steps), self._settings)
        noiseless = not any(std > 0 for std in look.stds[steps[0] :])
        if noiseless and self._settings.reward_scale != 0:
            raise ValueError(
                f"No step from {steps[0]} on draws noise, so the copies of a particle would remain "
                f"identical; {way_out(self._settings)}"
            )
        for step, size, before in zip(steps, sizes, (self.k, *sizes), strict=False):
            if size < before and look.stds[step] == 0 and self._settings.reward_scale != 0:
                raise ValueError(
                    f"The funnel shrinks at step {step}, which draws no noise, so copies would "
                    "remain identical; move the window with score_from or score_to."
                )
        self._sizes = dict(zip(steps, sizes, strict=True))

    def _agreed(self, found: Resampled) -> Resampled:
        """Return the result of rank 0, since devices that round differently may disagree."""
        if self._spread.size == 1:
            return found
        state, ancestors, ess, chosen = found
        one_each = torch.stack([state.log_z, state.scale, ess, chosen.to(ess.dtype)], 1)
        parts = (state.log_weights, *state.history, state.anchor, ancestors)
        packed = torch.cat([one_each, *(part.to(one_each.dtype) for part in parts)], 1)
        one_each, *rest = self._spread.first(packed).split([4, *[ancestors.shape[1]] * 6], 1)
        log_weights, *history, anchor, ancestors = rest
        log_z, scale, ess, chosen = one_each.unbind(1)
        state = FilterState(log_weights, log_z, History(*history), scale, anchor)
        return Resampled(state, ancestors.long(), ess, chosen.bool())

    def _previews(self, images: Tensor | None) -> Tensor | None:
        """Return small images of all particles, (b, num, 3, h, w) uint8, copied asynchronously."""
        if images is None:
            return None
        side = max(images.shape[2:])
        if side > PREVIEW:
            sides = [max(1, round(edge * PREVIEW / side)) for edge in images.shape[2:]]
            images = torch.nn.functional.interpolate(images, sides, mode="area")
        small = self._spread.whole((images.clamp(0, 1) * 255).round().to(torch.uint8))
        return small.to("cpu", non_blocking=True).unflatten(0, (self.b, self.num))

    def _keep(
        self,
        step: int,
        rewards: Tensor,
        log_weights: Tensor,
        found: Resampled,
        previews: Tensor | None,
    ) -> None:
        """Copy this score to the host and record it; ValueError if a reward is not finite."""
        one_each = torch.stack([found.ess, found.chosen.to(rewards.dtype)], 1)
        parts = (rewards, log_weights, one_each, found.ancestors.to(rewards.dtype))
        read = torch.cat(parts, dim=1).cpu().split([part.shape[1] for part in parts], dim=1)
        rewards, log_weights, one_each, ancestors = read
        ess, resampled = one_each[:, 0], one_each[:, 1].bool()
        refuse_not_finite(rewards, self.describe, f"step {step} of {self._num_steps}")
        refuse_overflow(log_weights, self._settings)
        score = Score(step, rewards, log_weights, ess, ancestors.long(), resampled, previews)
        self._scores.append(score)
        self._on_step(Moment(step, self._num_steps, score))

    def _descend(self, ancestors: Tensor) -> Tensor:
        """Return the batch indices of this process's rows; dropped rows repeat a living one."""
        self.num, rows = ancestors.shape[1], self._rows_each
        ancestors = self._spread.own(ancestors)
        size, prompts = ancestors.shape[1], torch.arange(self.b, device=ancestors.device)[:, None]
        spare = ancestors[:, :1].expand(-1, rows - size)
        if size < rows:
            living = prompts * rows + torch.arange(size, device=ancestors.device)
            self.rows.keep(living.flatten(), self.b * rows)
        return (torch.cat([ancestors, spare], dim=1) + prompts * self.k).flatten()

    def living(self, x: Tensor) -> Tensor:
        """Select the rows of the present population from this process's rows x."""
        living = self.num // self._spread.size
        return x.unflatten(0, (self.b, self._rows_each))[:, :living].flatten(0, 1)

    def whole(self, values: Tensor) -> Tensor:
        """Gather values of this process's living particles to (b, num), for all particles."""
        return self._spread.whole(values.flatten()).unflatten(0, (self.b, self.num))

    def close(self, rewards: Tensor) -> FilterState:
        """Return the final state, weighed by the rewards (b, num) of the final images."""
        state = self.state
        if state is None:
            state = start(self.b, self.k, rewards.device)
        closed = close(state, rewards, self._settings)
        if torch.isfinite(rewards).all():  # otherwise `refuse_not_finite` names the particle
            refuse_overflow(closed.log_weights, self._settings)
        return closed


def refuse_overflow(log_weights: Tensor, settings: FeynmanKac) -> None:
    """Raise ValueError if λ times finite rewards gave log-weights (b, k) that are not finite."""
    if not torch.isfinite(log_weights).all():
        raise ValueError(
            f"reward_scale={settings.reward_scale:g} times these rewards overflows "
            f"{str(log_weights.dtype).removeprefix('torch.')}; lower reward_scale."
        )


def needs_scores(settings: FeynmanKac, k: int) -> bool:
    """Return whether scores before the final one can affect the result."""
    resamples = settings.reward_scale != 0 and settings.min_ess > 0 and k > 1
    return resamples or settings.funnel != ()


def way_out(settings: FeynmanKac) -> str:
    """Return advice for a chain whose moves draw no noise."""
    without = "min_ess=0 and no funnel" if settings.funnel else "min_ess=0"
    return f"set FeynmanKac(noise=...) above 0, or {without} for best-of-k."


def refuse_not_finite(rewards: Tensor, describe: Callable[[int, int], str], where: str) -> None:
    """Raise ValueError that names the first particle whose reward is not finite."""
    if torch.isfinite(rewards).all():
        return
    prompt, particle = (~torch.isfinite(rewards)).nonzero()[0].tolist()
    value = rewards[prompt, particle].item()
    raise ValueError(
        f"The reward of {describe(prompt, particle)} is {'NaN' if math.isnan(value) else value} "
        f"at {where}; it must be finite for every image."
    )
