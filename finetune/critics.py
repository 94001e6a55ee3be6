"""Training of a critic that distinguishes reference images from a generator's samples.

A critic implements the `Model` protocol, as rewards.models.critic.CriticReward does. Its frozen
part computes the `features` of each image once per step; losses, statistics, replay and reward all
use them. The trained part is float32: in half precision a step of 5e-6 would be rounded away for
nine weights of ten.

Legend: n pairs of a reference and a sample, p patches of an image, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from .ranges import check, number, one_of, setting, whole
from .replay import Parts, Replay

__all__ = [
    "LOSSES",
    "TRIGGERS",
    "Critic",
    "CriticSettings",
    "Model",
    "accuracy",
    "bce_loss",
    "due",
    "gradient_penalty",
    "hinge_loss",
    "pairwise_loss",
    "smoothed",
]


class Model(Protocol):
    """A critic that can be trained; calling it returns its reward.

    features: images (n, 3, h, w) in [0, 1] -> tensors with one row per image, computed without the
    trained part; a tensor (n, p, d) holds p patches. logits: features -> a tensor (n,) or (n, p)
    for each. score: logits -> the reward (n,). module: the trained part, frozen outside training.
    paired: whether the reference and the sample of a prompt are compared with each other.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def paired(self) -> bool: ...
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...
    def features(self, images: Tensor) -> Parts: ...
    def logits(self, features: Sequence[Tensor], prompts: Sequence[str]) -> Parts: ...
    def score(self, logits: Sequence[Tensor]) -> Tensor: ...
    def save(self, folder: str | Path) -> None: ...


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return ½ (mean max(0, 1 - real) + mean max(0, 1 + fake)), for any shapes; 1 if all are 0."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def bce_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return ½ (mean -log σ(real) + mean -log(1 - σ(fake))), any shapes; log 2 if all are 0."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def pairwise_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean -log σ(real - fake) for tensors (n,), whose rows i belong to the same prompt.

    This is the cross-entropy of "the reference is preferred", with which PickScore was trained.
    """
    return F.softplus(fake - real).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_loss,
    "bce": bce_loss,
    "pairwise": pairwise_loss,
}
TRIGGERS = ("always", "every_n", "when_fooled", "acc_below")


def smoothed(
    loss: Callable[[Tensor, Tensor], Tensor], real: Tensor, fake: Tensor, share: float
) -> Tensor:
    """Return the expected loss if a fraction `share` of the labels is flipped.

    For cross-entropy this is label smoothing (Szegedy et al. 2016, §7).
    """
    return (1 - share) * loss(real, fake) + share * loss(fake, real)


def accuracy(real: Tensor, fake: Tensor, *, paired: bool = False) -> Tensor:
    """Return the probability that a reference scores above a sample, (n,) and (m,) -> ().

    Ties count half. It is taken over all pairs (the area under the ROC curve), or row by row if
    `paired`. It is ½ for two equal sets.
    """
    difference = real - fake if paired else real[:, None] - fake
    return ((difference.sign() + 1) / 2).mean()


def gradient_penalty(scores: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Return ½ mean |∂ score / ∂ features|² over the n images (Mescheder et al. 2018, R₁, eq. 9).

    scores (n,), each computed from its row of the features, which must require gradients.
    """
    gradients = torch.autograd.grad(scores.sum(), list(features), create_graph=True)
    squares = [g.square().flatten(1).sum(1) for g in gradients]
    return torch.stack(squares).sum(0).mean() / 2


def due(
    trigger: str, step: int, stats: dict[str, float], *, every: int = 1, below: float = 0.8
) -> bool:
    """Return whether the critic is trained at a step, from its statistics on the step's images.

    always: at every step; every_n: at each `every`-th step; when_fooled: if samples score at least
    as high as references on average (Adv-GRPO; ties are included, since an untrained critic has
    only ties); acc_below: if the accuracy is less than `below`.
    """
    if trigger == "always":
        return True
    if trigger == "every_n":
        return step % every == 0
    if trigger == "when_fooled":
        return stats["fake"] >= stats["real"]
    if trigger == "acc_below":
        return stats["accuracy"] < below
    raise ValueError(f"the trigger {trigger!r} is unknown; take one of {list(TRIGGERS)}")


@dataclass
class CriticSettings:
    """The settings of a critic's training.

    lr: learning rate of Adam (β 0.5 and 0.999), 1e-4 for a head, 5e-6 for a preference model; loss:
    one of LOSSES, "" for pairwise if prompts are paired and hinge otherwise; patches: number drawn
    from each image per step; patch_weight: weight of their loss relative to the CLS token's;
    smoothing: fraction of labels assumed to be wrong; r1: factor of `gradient_penalty` at the
    references; spectral: largest allowed singular value of a layer of the head, 0 for no limit;
    replay: number of older pairs, from all processes, that are kept; replay_share: number of them
    that are added to the n pairs of a step, as a fraction of n; trigger, every, below: see `due`.
    """

    lr: float = setting(
        1e-4,
        number(0, ends="(]"),
        "learning rate of the critic's Adam; 5e-6 is usual for a preference model",
    )
    loss: str = setting(
        "",
        one_of("", *LOSSES),
        "hinge, bce or pairwise; by default pairwise for a preference model, else hinge",
    )
    patches: int = setting(64, whole(1), "patches drawn from each image at each step")
    patch_weight: float = setting(
        0.3, number(0), "weight of the patches' loss relative to the whole image's"
    )
    smoothing: float = setting(0.0, number(0, 0.5, "[)"), "fraction of labels assumed to be wrong")
    r1: float = setting(0.0, number(0), "factor of the gradient penalty at the references")
    spectral: float = setting(0.0, number(0), "largest singular value of a layer; 0: no limit")
    replay: int = setting(0, whole(0), "number of older samples kept, from all processes")
    replay_share: float = setting(
        0.5, number(0), "number of kept samples added to a step, as a fraction of its samples"
    )
    trigger: str = setting(
        "always", one_of(*TRIGGERS), "when to train: always, every_n, when_fooled or acc_below"
    )
    every: int = setting(1, whole(1), "n for the trigger every_n")
    below: float = setting(0.8, number(0, 1), "accuracy for the trigger acc_below")

    def __post_init__(self) -> None:
        check(self)


class Critic:
    """Trains a critic step by step, with the same result in all processes.

    Gradients are averaged over processes explicitly, without a wrapper, so the reward that scores
    is the same object that is trained. Processes must start with the same weights and pass equal
    numbers of images. All keep the same replay, so one process's state serves them all, and a run
    may be resumed with another number of processes.
    """

    def __init__(self, reward: Model, settings: CriticSettings, accelerator: Any = None) -> None:
        if reward.paired and (settings.r1 or settings.spectral):
            raise ValueError(
                "r1= and spectral= apply to a head on frozen features, but this critic trains "
                "layers of a preference model; set both to 0"
            )
        self.reward, self.settings, self.accelerator = reward, settings, accelerator
        self.loss = LOSSES[settings.loss or ("pairwise" if reward.paired else "hinge")]
        if accelerator is not None:
            reward.module.to(accelerator.device)
        self.weights = list(reward.module.parameters())
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.lr, betas=(0.5, 0.999))
        self.replay = Replay(settings.replay)
        self.step = 0

    @torch.inference_mode(False)
    def train_step(
        self, real: Tensor, fake: Tensor, prompts: Sequence[str], generator: torch.Generator
    ) -> dict[str, float]:
        """Train on n references and n samples (n, 3, h, w) if due; rows i share a prompt.

        Returns statistics from before the update, over all processes: loss, the mean scores real
        and fake, margin = real - fake, accuracy; and updated, 1 or 0. Raises FloatingPointError,
        without an update, if a score or the gradient of any process is not finite. The generator
        (CPU) draws patches and replay rows.
        """
        s, n = self.settings, len(prompts)
        if not len(real) == len(fake) == n or not n:
            raise ValueError(
                f"a critic needs a reference and a prompt for each sample but got {len(real)} "
                f"references, {n} prompts and {len(fake)} samples; pass one of each per sample"
            )
        with torch.no_grad():
            both = self.reward.features(real), self.reward.features(fake)
            stats = self._stats(*both, prompts)
            parts = tuple(part for side in both for part in self._thinned(side, generator))
        updated = due(s.trigger, self.step, stats, every=s.every, below=s.below)
        if updated:
            self._update(*self._with_older(parts, prompts, generator))
        if s.replay:
            common = torch.Generator().manual_seed(self.step)  # all processes keep the same rows
            self.replay.add(*self._of_all(parts, prompts), common)
        self.step += 1
        return stats | {"updated": float(updated)}

    def save(self, folder: str | Path) -> None:
        """Write the folder from which the reward `critic(folder)` loads."""
        self.reward.save(folder)

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs."""
        return {
            "step": self.step,
            "module": {k: v.detach().cpu() for k, v in self.reward.module.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.reward.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])

    def _stats(self, real: Parts, fake: Parts, prompts: Sequence[str]) -> dict[str, float]:
        logits = [self.reward.logits(side, prompts) for side in (real, fake)]
        r, f = (self.reward.score(side) for side in logits)
        right = accuracy(r, f, paired=self.reward.paired)
        names = ["loss", "real", "fake", "margin", "accuracy"]
        seen = torch.stack([self._total(*logits), r.mean(), f.mean(), (r - f).mean(), right])
        stats = dict(zip(names, self._averaged(seen).tolist(), strict=True))
        if not all(math.isfinite(value) for value in stats.values()):
            rows = [
                f"{name} {row} ({prompts[row]!r})"
                for name, scores in (("reference", r), ("sample", f))
                for row in (~scores.isfinite()).nonzero().flatten().tolist()[:3]
            ]
            raise FloatingPointError(
                f"the critic's scores of step {self.step} are not finite"
                + (f", of {', '.join(rows)}" if rows else "")
                + "; lower its learning rate, or inspect these images"
            )
        return stats

    def _total(self, real: Parts, fake: Parts) -> Tensor:
        """Return the loss of the first part plus patch_weight times that of the others."""
        s = self.settings
        losses = [smoothed(self.loss, r, f, s.smoothing) for r, f in zip(real, fake, strict=True)]
        return losses[0] + s.patch_weight * sum(losses[1:], torch.zeros_like(losses[0]))

    def _thinned(self, features: Parts, generator: torch.Generator) -> Parts:
        """Draw `settings.patches` patches of each image independently."""
        return tuple(_some(part, self.settings.patches, generator) for part in features)

    def _with_older(
        self, parts: Parts, prompts: Sequence[str], generator: torch.Generator
    ) -> tuple[Parts, list[str]]:
        count = round(self.settings.replay_share * len(prompts))
        older, old_prompts = self.replay.draw(count, generator)
        if older:
            parts = tuple(torch.cat([a, b.to(a)]) for a, b in zip(parts, older, strict=True))
        return parts, [*prompts, *old_prompts]

    def _of_all(self, parts: Parts, prompts: Sequence[str]) -> tuple[Parts, list[str]]:
        """Gather the rows of all processes, in the same order everywhere."""
        if self.accelerator is None:
            return parts, list(prompts)
        return self.accelerator.gather(parts), gather_object(list(prompts))

    def _update(self, parts: Parts, prompts: Sequence[str]) -> None:
        s, half = self.settings, len(parts) // 2
        with torch.enable_grad(), _thawed(self.reward.module):
            real, fake = parts[:half], parts[half:]
            if s.r1:
                real = tuple(part.detach().requires_grad_() for part in real)
            logits = self.reward.logits(real, prompts)
            loss = self._total(logits, self.reward.logits(fake, prompts))
            if s.r1:
                loss = loss + s.r1 * gradient_penalty(self.reward.score(logits), real)
            gradients = torch.autograd.grad(loss, self.weights)
        whole = self._averaged(torch.cat([g.flatten() for g in gradients]))
        if not whole.isfinite().all():
            raise FloatingPointError(
                f"the critic's gradient of step {self.step} is not finite: lower its learning rate"
            )
        sizes = [weight.numel() for weight in self.weights]
        for weight, gradient in zip(self.weights, whole.split(sizes), strict=True):
            weight.grad = gradient.view_as(weight)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if s.spectral:
            _bound(self.reward.module, s.spectral)

    def _averaged(self, values: Tensor) -> Tensor:
        return values if self.accelerator is None else self.accelerator.reduce(values, "mean")


def _some(part: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if part.ndim != 3 or part.shape[1] <= count:
        return part
    order = torch.rand(part.shape[:2], generator=generator).argsort(1)[:, :count].to(part.device)
    return part.gather(1, order[:, :, None].expand(-1, -1, part.shape[2]))


@contextmanager
def _thawed(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)


@torch.no_grad()
def _bound(module: nn.Module, limit: float) -> None:
    """Scale layers down to a maximum spectral norm (Gouk et al. 2021).

    The norm is exact: the usual power iteration would divide by 0 at the head's initial weights.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            norm = torch.linalg.matrix_norm(layer.weight, 2)
            layer.weight.div_((norm / limit).clamp(min=1))
