"""Training a critic: references on one side, a generator's samples on the other.

A critic is anything of the `Model` protocol, as rewards.models.critic.CriticReward. Its frozen part
sees each picture once a step; what it sees (`features`) is what losses, statistics and the replay
use, and what the reward scores. The trained part is float32: in half precision a step of 5e-6 would
leave nine weights of ten as they are.

Legend: n pairs of a reference and a sample, p patches of a picture, d features.
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
    """What a critic is to its training.

    Called, it is a reward. features: images (n, 3, h, w) in [0, 1] -> tensors with a row an image,
    without the trained part; one of three dimensions (n, p, d) holds p patches. logits: features
    -> a tensor (n,) or (n, p) each. score: logits -> the reward (n,). module: the trained part,
    frozen outside training. paired: whether references and samples of one prompt are compared.
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
    """½ (mean max(0, 1 - real) + mean max(0, 1 + fake)), of any shapes; 1 where all are 0."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def bce_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean -log σ(real) + mean -log(1 - σ(fake))), of any shapes; log 2 where all are 0."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def pairwise_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean -log σ(real - fake), of two tensors (n,), row by row of one prompt.

    The cross-entropy of "the reference is preferred", as PickScore was trained.
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
    """The loss to be expected where a share of the labels is the wrong way round.

    For cross-entropy that is label smoothing (Szegedy et al. 2016, §7).
    """
    return (1 - share) * loss(real, fake) + share * loss(fake, real)


def accuracy(real: Tensor, fake: Tensor, *, paired: bool = False) -> Tensor:
    """The chance that a reference scores above a sample, ties counting half, (n,) and (m,) -> ().

    Over all pairs (the area under the ROC curve), or row by row. ½ for two sets that are alike,
    whatever they are.
    """
    difference = real - fake if paired else real[:, None] - fake
    return ((difference.sign() + 1) / 2).mean()


def gradient_penalty(scores: Tensor, features: Sequence[Tensor]) -> Tensor:
    """½ mean |∂ score / ∂ features|², over the n pictures (Mescheder et al. 2018, R₁, eq. 9).

    scores (n,), each of its own row of the features, which must require gradients.
    """
    gradients = torch.autograd.grad(scores.sum(), list(features), create_graph=True)
    squares = [g.square().flatten(1).sum(1) for g in gradients]
    return torch.stack(squares).sum(0).mean() / 2


def due(
    trigger: str, step: int, stats: dict[str, float], *, every: int = 1, below: float = 0.8
) -> bool:
    """Whether the critic learns at a step, from what it thinks of the step's pictures.

    always; every_n, each `every`-th step; when_fooled, where samples score above references on
    average (Adv-GRPO; ties learn too, or an untrained critic never would); acc_below, where the
    accuracy is less than `below`.
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
    """How a critic is trained.

    lr: of Adam (β 0.5 and 0.999), 1e-4 for a head, 5e-6 for a preference model; loss: one of
    LOSSES, "" for pairwise where prompts are paired and hinge elsewhere; patches: drawn of each
    picture at each step; patch_weight: their loss beside the CLS token's; smoothing: the share of
    labels taken to be wrong; r1: the factor of `gradient_penalty` at the references; spectral: the
    largest singular value that a layer of the head may have, 0 for any; replay: how many older
    pairs, of all processes, are kept; replay_share: how many of them are added to a step's n, as a
    share of n; trigger, every, below: see `due`.
    """

    lr: float = setting(
        1e-4,
        number(0, ends="(]"),
        "learning rate of the critic's Adam; 5e-6 is usual for a preference",
    )
    loss: str = setting(
        "",
        one_of("", *LOSSES),
        "hinge, bce or pairwise; by default pairwise for a preference, else hinge",
    )
    patches: int = setting(64, whole(1), "patches drawn of each picture at each step")
    patch_weight: float = setting(
        0.3, number(0), "weight of the patches' loss beside the whole picture's"
    )
    smoothing: float = setting(0.0, number(0, 0.5, "[)"), "the share of labels taken to be wrong")
    r1: float = setting(0.0, number(0), "factor of the gradient penalty at the references")
    spectral: float = setting(0.0, number(0), "the largest singular value of a layer; 0: any")
    replay: int = setting(0, whole(0), "how many older samples of all processes are kept")
    replay_share: float = setting(
        0.5, number(0), "how many of them are added to a step, as a share of its samples"
    )
    trigger: str = setting(
        "always", one_of(*TRIGGERS), "when it learns: always, every_n, when_fooled or acc_below"
    )
    every: int = setting(1, whole(1), "the n of every_n")
    below: float = setting(0.8, number(0, 1), "the accuracy of acc_below")

    def __post_init__(self) -> None:
        check(self)


class Critic:
    """A critic that learns a step at a time, the same in all processes.

    Gradients are averaged over processes by hand, and nothing is wrapped: the reward that scores
    is the very object that learns. Processes must begin with the same weights and bring equally
    many pictures. All keep the same replay, so that the state of one process is that of each, and
    of however many a run goes on with.
    """

    def __init__(self, reward: Model, settings: CriticSettings, accelerator: Any = None) -> None:
        if reward.paired and (settings.r1 or settings.spectral):
            raise ValueError(
                "r1 and spectral are for a head on frozen features, but this critic trains layers "
                "of a preference model; set both to 0"
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
        """Look at n references and n samples (n, 3, h, w), row by row of one prompt; learn if due.

        Returns what the critic thought of them before, over all processes: loss, the mean scores
        real and fake, margin = real - fake, accuracy; and updated, 1 or 0. FloatingPointError, and
        no change, where a score or the gradient of any process is not finite. The generator (CPU)
        draws patches, and rows of the replay.
        """
        s, n = self.settings, len(prompts)
        if not len(real) == len(fake) == n or not n:
            raise ValueError(
                f"a critic takes a reference and a prompt for each sample but got {len(real)} "
                f"references, {n} prompts and {len(fake)} samples; draw as many references"
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
        """Write the folder that `critic(folder)` scores with."""
        self.reward.save(folder)

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs."""
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
                + "; lower its learning rate, or look at those pictures"
            )
        return stats

    def _total(self, real: Parts, fake: Parts) -> Tensor:
        """The loss of each part, the first's in full."""
        s = self.settings
        losses = [smoothed(self.loss, r, f, s.smoothing) for r, f in zip(real, fake, strict=True)]
        return losses[0] + s.patch_weight * sum(losses[1:], torch.zeros_like(losses[0]))

    def _thinned(self, features: Parts, generator: torch.Generator) -> Parts:
        """As many patches of each picture as the settings say, drawn anew for each."""
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
        """Rows of all processes, in one order."""
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
    """Scale layers down to a spectral norm (Gouk et al. 2021).

    Power iteration, the usual way, divides by 0 at the head's first weights.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            norm = torch.linalg.matrix_norm(layer.weight, 2)
            layer.weight.div_((norm / limit).clamp(min=1))
