"""Offline group-level direct reward optimisation (GDRO): trains a LoRA on scored rollouts.

Every step draws its prompts, images, noise and times from (seed, step) alone, so a run that is
resumed, or split among processes, takes exactly the same steps. Neither a decoder nor a text
encoder is needed, since latents and conditioning come from the rollouts.

A group's loss needs the predictions of all its images. To hold the activations of a few images
only (`micro_images`), all are predicted first without gradients; then each few are predicted again,
and the loss's gradient by their predictions is propagated back. By the chain rule, the gradient is
the same.
Legend: g groups, k images per group, n = g·k rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .buckets import dealt, noises
from .conditioning import Conditioning
from .data import Ahead, Data, check_fits
from .groups import NORMS, draw_groups, target_entropy
from .learner import TIMES, Learner, Tuning, check_shares, draws, in_step
from .losses import FORMS, best_image_loss, gdro_loss, implicit_scores
from .network import Model
from .ranges import FLAG, NAME, number, one_of, setting, whole

__all__ = ["Gdro", "GdroTrainer"]


@dataclass
class Gdro(Tuning):
    """The settings of a training run."""

    steps: int = setting(200, whole(1), "number of updates")
    groups: int = setting(8, whole(1), "prompts per update, over all processes")
    k: int = setting(6, whole(2), "images per group")
    micro_groups: int = setting(2, whole(1), "groups that a process evaluates at once")
    beta: float = setting(12.0, number(0, ends="(]"), "β: smaller lets the model move further")
    temperature: float = setting(
        0.05, number(0, ends="(]"), "τ: reward temperature; β τ sets the strength of the tilt"
    )
    form: str = setting("full", one_of(*FORMS), "form of the loss: full, top1 or rank")
    hold_best: float = setting(1.0, number(0), "γ: weight of the error on the best image")
    weight: str = setting(
        "constant",
        one_of("constant", "velocity", "elbo"),
        "weight of the errors by timestep: constant, velocity (as if v was predicted) or elbo",
    )
    times: str = setting("logit_normal", one_of(*TIMES), "distribution of the training times")
    shift: float = setting(
        1.0,
        number(0, ends="(]"),
        "shift of the times; above 1 favours high noise levels, where the content is decided",
    )
    shared_noise: bool = setting(
        True, FLAG, "one noise for all images of a group; false learns less"
    )
    reward: str = setting("reward", NAME, "column of the rewards")
    reward_norm: str = setting(
        "none", one_of(*NORMS), "normalisation: none, minmax, rank, group_std or global_std"
    )


def trainer_of(pipe: Any, data: Data, settings: Gdro, accelerator: Any) -> GdroTrainer:
    """Return a trainer of a pipeline's network, for an `accelerate.Accelerator`.

    Raises ValueError if the pipeline cannot be trained or cannot have drawn the rollouts.
    """
    model, kind = Model(pipe), type(pipe).__name__
    network = getattr(pipe, model.part)
    check_fits(data, network, kind, kind)
    return GdroTrainer(network, model, data, settings, accelerator)


@dataclass(frozen=True)
class Inputs:
    """Groups that are evaluated at once: x0 (g, k, ...), rewards (g, k) minus the group's best, t
    (g,), noise (g, k or 1, ...), g rows of conditioning; and for each group a seed for breaking
    ties and its number of images. Entries beyond that number are ignored."""

    x0: Tensor
    rewards: Tensor
    t: Tensor
    noise: Tensor
    given: Conditioning
    ties: list[int]
    sizes: list[int]

    def to(self, device: torch.device) -> Inputs:
        """Copy the tensors to a device, asynchronously if they are in pinned memory."""
        tensors = {name: getattr(self, name) for name in ("x0", "rewards", "t", "noise")}
        moved = {name: v.to(device, non_blocking=True) for name, v in tensors.items()}
        return replace(self, **moved, given=self.given.to(device))


class Rows(NamedTuple):
    """The rows (n, ...) of groups that are evaluated at once: x_t, t, targets, conditioning."""

    x: Tensor
    t: Tensor
    target: Tensor
    given: Conditioning


class Slopes(NamedTuple):
    """Rows, the gradient of the loss by their predictions (n, ...), and statistics to log."""

    rows: Rows
    slope: Tensor
    seen: dict[str, Tensor]


class GdroTrainer:
    """Trains a network on rollouts, one step at a time."""

    def __init__(
        self,
        network: Any,
        model: Model,
        data: Data,
        settings: Gdro,
        accelerator: Any,
    ) -> None:
        check_shares(settings.groups, accelerator.num_processes, equal=in_step(accelerator))
        self.settings, self.noising, self.data = settings, model.noising, data
        self.learner = Learner(network, model, settings, accelerator)
        self.inputs = Ahead(self._inputs)

    @property
    def step(self) -> int:
        """The number of updates so far."""
        return self.learner.step

    def renew(self, data: Data) -> None:
        """Take the images of the next steps from other data."""
        self.data, self.inputs = data, Ahead(self._inputs)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)

    def train_step(self) -> dict[str, float]:
        """Make one update and return its statistics, averaged over all groups of all processes."""
        parts = [part for micro in self.inputs(self.step) for part in self._parts(micro)]
        return self.learner.descend(parts, self.settings.groups)

    def _micro_batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield this process's groups of the step: (prompts, rows, rewards, t, noise, tie)."""
        s, accelerator = self.settings, self.learner.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        generator = draws(s.seed, step, "batch")
        prompts, rows, rewards = draw_groups(self.data.groups, s.groups, s.k, generator)
        t = torch.rand(s.groups, generator=generator)
        if s.times == "logit_normal":  # Esser et al. 2024, eq. 19, m = 0, s = 1
            t = torch.randn(s.groups, generator=generator).sigmoid()
        t = s.shift * t / (1 + (s.shift - 1) * t)  # Esser et al. 2024, eq. 23
        t = t.clamp(1e-3, 1 - 1e-3)
        each = 1 if s.shared_noise else s.k
        given = [self.data.given[[prompt]] for prompt in prompts.tolist()]
        noise = noises([one.form.shape for one in given], each, generator)
        ties = torch.randint(2**62, (s.groups,), generator=generator)
        for part in dealt([one.kind() for one in given], rank, world, s.micro_groups):
            own = torch.stack([noise[i] for i in part])
            yield prompts[part], rows[part], rewards[part], t[part], own, ties[part]

    def _inputs(self, step: int) -> list[Inputs]:
        """Return this process's inputs of a step, on the CPU; in pinned memory for a GPU."""
        found = []
        for prompts, rows, rewards, t, noise, ties in self._micro_batches(step):
            given = self.data.given[prompts.tolist()]
            # only differences matter, and small ones are exact enough in float32
            best = rewards.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
            under = (rewards - best).float()
            tensors = {"x0": self.data.latents[rows], "rewards": under, "t": t, "noise": noise}
            if self.learner.accelerator.device.type == "cuda":
                given = given.pinned()
                tensors = {name: value.pin_memory() for name, value in tensors.items()}
            sizes = rewards.isfinite().sum(1).tolist()
            found.append(Inputs(**tensors, given=given, ties=ties.tolist(), sizes=sizes))
        return found

    def _parts(self, inputs: Inputs) -> list[Callable[[], tuple[Tensor, dict[str, Tensor]]]]:
        """Return functions that evaluate groups, in one pass or in several (see above)."""
        pieces = self.learner.pieces(inputs.rewards.numel())
        if len(pieces) == 1:
            return [partial(self._losses, inputs)]
        slopes = cache(partial(self._slopes, inputs))
        return [partial(self._piece, slopes, rows) for rows in pieces]

    def _losses(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each group (g,), and statistics to log."""
        inputs = inputs.to(self.learner.accelerator.device)
        rows = self._rows(inputs)
        ref = self._reference(rows)
        pred = self.learner.predicts(self.learner.network)(rows.x, rows.t, rows.given)
        return self._of_groups(inputs, rows, pred, ref)

    def _slopes(self, inputs: Inputs) -> Slopes:
        """Evaluate groups without gradients of the weights."""
        learner = self.learner
        inputs = inputs.to(learner.accelerator.device)
        rows = self._rows(inputs)
        ref = self._reference(rows)
        with torch.no_grad():
            pred = learner.predicts(learner.bare)(rows.x, rows.t, rows.given)
        loss, seen = self._of_groups(inputs, rows, pred.requires_grad_(), ref)
        (slope,) = torch.autograd.grad(loss.sum(), pred)
        return Slopes(rows, slope, {name: value.detach() for name, value in seen.items()})

    def _piece(self, slopes: Callable[[], Slopes], rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what has the gradient of the groups' losses by some rows, (n,), and statistics.

        Those of the groups are with the first rows.
        """
        own, slope, seen = slopes()
        pred = self.learner.predicts(self.learner.network)(
            own.x[rows], own.t[rows], own.given[rows]
        )
        loss = (pred * slope[rows]).flatten(1).sum(1)
        return loss, {"loss": loss[:0]} if rows.start else seen

    def _rows(self, inputs: Inputs) -> Rows:
        k, x0 = inputs.rewards.shape[1], inputs.x0.float()
        noise = inputs.noise.expand_as(x0).flatten(0, 1)
        t = inputs.t.repeat_interleave(k)
        x, target = self.noising.noised(x0.flatten(0, 1), noise, t)
        return Rows(x, t, target, inputs.given.repeated(k))

    def _reference(self, rows: Rows) -> Tensor:
        """Return the predictions of the reference."""
        with torch.no_grad(), self.learner.reference():
            return self.learner.predicts(self.learner.bare)(rows.x, rows.t, rows.given)

    def _of_groups(
        self, inputs: Inputs, rows: Rows, pred: Tensor, ref: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each group (g,), and statistics to log, from predictions (n, ...)."""
        s, rewards, weight = self.settings, inputs.rewards, self._weight(inputs.t)
        parts = (pred, ref, rows.target)
        pred, ref, target = (y.float().unflatten(0, rewards.shape) for y in parts)
        scores = implicit_scores(pred, ref, target, beta=s.beta, weight=weight[:, None])
        loss, told = [], []
        for i, size in enumerate(inputs.sizes):
            own = slice(i, i + 1), slice(size)  # a group may have fewer images than others
            one = [values[own] for values in (scores, rewards, pred, ref, target)]
            of_group, seen = self._of_group(*one, tie=inputs.ties[i])
            loss.append(of_group["loss"] + s.hold_best * weight[i : i + 1] * of_group["best_image"])
            told.append(of_group | seen)
        return torch.cat(loss), {name: torch.cat([one[name] for one in told]) for name in told[0]}

    def _of_group(
        self, scores: Tensor, rewards: Tensor, pred: Tensor, ref: Tensor, target: Tensor, tie: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the two losses of one group (1, k, ...), and statistics to log, (1,) each."""
        s, ties = self.settings, torch.Generator().manual_seed(tie)
        ranked = gdro_loss(scores, rewards, temperature=s.temperature, form=s.form, generator=ties)
        held = best_image_loss(pred, target, rewards, ties)
        seen = _watched(scores, rewards, pred, ref, target, s.temperature)
        return {"loss": ranked, "best_image": held}, seen

    def _weight(self, t: Tensor) -> Tensor:
        """Return the weights of the errors at t, (g,)."""
        if self.settings.weight == "velocity":
            return self.noising.velocity_weight(t)
        return self.noising.elbo_weight(t) if self.settings.weight == "elbo" else t.new_ones(len(t))


def _watched(
    scores: Tensor, rewards: Tensor, pred: Tensor, ref: Tensor, target: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Return statistics that show whether a run is healthy, per group (g,).

    accuracy: fraction of pairs with different rewards that the implicit scores order correctly;
    spread: standard deviation of the scores; entropy: that of the target, divided by log k; drift:
    increase of the error on the best image.
    """
    better = rewards[:, :, None] > rewards[:, None, :]
    agree = (scores[:, :, None] > scores[:, None, :]) & better
    best = rewards.argmax(1)
    at = torch.arange(len(best), device=best.device)

    def error(x: Tensor) -> Tensor:
        return (x[at, best] - target[at, best]).square().flatten(1).mean(1)

    return {
        "accuracy": agree.sum((1, 2)) / better.sum((1, 2)).clamp(min=1),
        "spread": scores.std(1),
        "entropy": target_entropy(rewards, temperature),
        "drift": error(pred) - error(ref),
    }
