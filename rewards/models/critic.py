"""A critic: a reward that was trained to distinguish reference images from a model's samples.

There are two kinds, each saved in a folder as critic.json and critic.safetensors, and trained by
finetune.critics:

    features     a small head on the CLS token and the patches of a frozen DINO
    preference   a CLIP, SigLIP or PickScore of which the image tower's last layers are trained

Both are from Adv-GRPO (Mao et al. 2025, arXiv 2511.20256). Training and scoring use the same
`features` and `logits`. A rule such as ocr or objects cannot be trained; combine it with
similarity to the references instead, `ocr + 0.5*dino(mode=hybrid)`.

Legend: n images, p patches, d features, R the tower's input side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..images import check_inputs
from ..spec import written
from ..towers.checkpoints import fetch, fit, moved, read_state, untouched
from ..towers.dino_backbone import view
from ..towers.sources import open_source, randomise, seed_of
from .base import Card, NetworkReward

__all__ = ["CriticHead", "CriticReward", "FeatureModel", "PreferenceModel"]

FILES = ("critic.json", "critic.safetensors")
# names of the layers of an image tower in open_clip, timm and transformers
LAYERS = ("visual.transformer.resblocks", "visual.trunk.blocks", "vision_model.encoder.layers")


class CriticHead(nn.Module):
    """Linear, GELU, Linear: (..., d) -> (...), float32; it returns 0 until it is trained."""

    @untouched()
    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, 1)
        bound = width**-0.5  # as in nn.Linear
        for parameter in self.inner.parameters():
            draws = torch.rand(parameter.shape, generator=generator)
            parameter.data.copy_((2 * draws - 1) * bound)
        for parameter in self.outer.parameters():
            parameter.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(x))).squeeze(-1)


class FeatureModel:
    """w₁ h(cls) + w₂ mean h(patch), with one head h for the CLS token and all patches of a DINO.

    Features are DINO's unit vectors times √d, so that their elements are about 1.

    Args:
        tower, size: See `rewards.towers.dino_backbone`.
        hidden: Width of h.
        weights: (w₁, w₂).
        seed: Seed of the head's first layer.
    """

    kind, paired = "features", False

    def __init__(
        self,
        tower: str = "facebook/dinov2-base",
        *,
        size: int | None = None,
        hidden: int = 512,
        weights: Sequence[float] = (0.7, 0.3),
        seed: int = 0,
    ) -> None:
        if type(hidden) is not int or hidden < 1:
            raise ValueError(f"the critic's hidden width is {hidden!r} but must be 1 or more")
        given = list(weights) if isinstance(weights, list | tuple) else []
        if len(given) != 2 or not all(
            isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in given
        ):
            raise ValueError(
                f"the critic's weights are {weights!r} but must be two numbers, of CLS token and "
                "patches, at least 0; (0.7, 0.3) is usual"
            )
        self.settings = {"tower": tower, "size": size, "hidden": hidden, "weights": given}
        self.weights = tuple(given)
        self.view = view(tower, size)
        backbone: Any = self.view.backbone.model
        width = backbone.config.hidden_size
        self.scale = math.sqrt(width)
        self.module = CriticHead(width, hidden, torch.Generator().manual_seed(seed))

    def to(self, device: torch.device) -> None:
        self.view.to(device)
        moved(self.module, device)

    def features(self, images: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """CLS tokens (n, d) and patches (n, p, d)."""
        tokens = self.view.tokens(images, batch_size)
        return tokens.cls * self.scale, tokens.patches * self.scale

    def logits(
        self, features: Sequence[Tensor], prompts: Sequence[str], batch_size: int
    ) -> tuple[Tensor, ...]:
        """Return h of the CLS tokens (n,) and of the patches (n, p)."""
        cls, patches = features
        return self.module(cls), self.module(patches)


class PreferenceModel:
    """exp(logit_scale) times the cosine of image and prompt; the last `layers` layers are trained.

    The towers are a copy, which no other reward of the same source shares. All weights are
    float32.

    Args:
        tower: See `rewards.towers.sources`, for example yuvalkirstain/PickScore_v1.
        layers: Number of trained layers.
    """

    kind, paired, weights = "preference", True, (1.0,)

    @untouched()
    def __init__(self, tower: str = "yuvalkirstain/PickScore_v1", *, layers: int = 2) -> None:
        self.settings = {"tower": tower, "layers": layers}
        self.towers = open_source(tower)
        model: Any = self.towers.model
        names = dict(model.named_modules())
        blocks: Any = next((names[name] for name in LAYERS if name in names), None)
        if blocks is None:
            raise ValueError(f"{tower} has none of the layers {list(LAYERS)}; use a transformer")
        if type(layers) is not int or not 1 <= layers <= len(blocks):
            raise ValueError(
                f"layers is {layers!r} but the image tower of {tower} has {len(blocks)} to train, "
                "of which at least 1 is needed"
            )
        self.module = nn.ModuleList(list(blocks)[-layers:])
        self.logit_scale = model.get_parameter("logit_scale")

    def to(self, device: torch.device) -> None:
        self.towers.to(device)

    def features(self, images: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """Return the input of the tower, (n, 3, R, R)."""
        return (torch.cat([self.towers.pixels(chunk) for chunk in images.split(batch_size)]),)

    def logits(
        self, features: Sequence[Tensor], prompts: Sequence[str], batch_size: int
    ) -> tuple[Tensor, ...]:
        """Return one score for each image, (n,)."""
        text = self.towers.text_features(prompts)
        chunks = features[0].split(batch_size)
        image = torch.cat([F.normalize(self.towers.encode_image(x), dim=-1) for x in chunks])
        return (self.logit_scale.exp() * (image * text).sum(-1),)


KINDS = {"features": FeatureModel, "preference": PreferenceModel}


class CriticReward(NetworkReward):
    """The score of a critic that `finetune.critics` trained; see the module for the two kinds.

    It ranks the images of one training run; its zero and its scale have no meaning beyond it. All
    patches are used, so a score does not depend on random draws.

    Args:
        source: A folder or a hub id that holds critic.json and critic.safetensors; `random:<seed>`,
            an untrained one for tests; or a `FeatureModel` or `PreferenceModel` to be trained.
        batch_size: Number of images evaluated at once.
        device: Device of the model; None follows the images.
    """

    card = Card(
        weights="what training wrote, on its tower (facebook/dinov2-base)",
        size="1.6 MB, and the tower's 346 MB",
        licence="the tower's",
        range="unbounded; hinge loss drives references above 1 and samples below -1",
        citation="Mao et al. 2025, Adv-GRPO, arXiv 2511.20256",
    )

    def __init__(
        self,
        source: str | FeatureModel | PreferenceModel,
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        made = isinstance(source, FeatureModel | PreferenceModel)
        written_source = "" if made else source
        super().__init__("critic", source=written_source, batch_size=batch_size, device=device)
        self.spec = "<critic>" if made else self.spec
        self.model = source if made else _open(source)
        self.module.requires_grad_(False).eval()
        if self.device is not None:
            self.model.to(self.device)

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        return self.score(self.logits(self.features(images), prompts))

    @property
    def module(self) -> nn.Module:
        """The trained part, which is saved, and frozen outside of training."""
        return self.model.module

    @property
    def paired(self) -> bool:
        """Whether a sample is compared with references of the same prompt."""
        return self.model.paired

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the input of the trained part for images (n, 3, h, w) in [0, 1], float32.

        The CLS tokens (n, d) and patches (n, p, d), or the pixels (n, 3, R, R) of a preference.
        """
        check_inputs(images, [""] * len(images))
        self.model.to(self.device or images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self.model.features(images, self.batch_size)

    def logits(self, features: Sequence[Tensor], prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the logits for a loss: (n,), and (n, p) for any number of patches."""
        with torch.autocast(features[0].device.type, enabled=False):
            return self.model.logits(features, prompts, self.batch_size)

    def score(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the reward (n,): the weighted sum of the logits' means."""
        means = [part.flatten(1).mean(1) if part.ndim > 1 else part for part in logits]
        return torch.stack([w * m for w, m in zip(self.model.weights, means, strict=True)]).sum(0)

    def save(self, folder: str | Path) -> None:
        """Write the files that `critic(folder)` reads, each atomically."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config, weights = (folder / name for name in FILES)
        scratch = folder / ".critic.new"
        save_file({k: v.detach().cpu() for k, v in self.module.state_dict().items()}, scratch)
        scratch.replace(weights)
        about = {"kind": self.model.kind} | self.model.settings
        scratch.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        scratch.replace(config)
        self.spec = written("critic", CriticReward, source=str(folder), batch_size=self.batch_size)


@untouched()
def _open(source: str) -> FeatureModel | PreferenceModel:
    if (seed := seed_of(source)) is not None:
        random = FeatureModel(source, hidden=32)
        randomise(random.module, seed)
        return random
    path = fetch(source, FILES[0])
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        model = KINDS[settings.pop("kind")](**settings)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} describes no critic ({error}); give a folder that training wrote"
        ) from error
    fit(model.module, read_state(fetch(source, FILES[1])), source)
    return model
