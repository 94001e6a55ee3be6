"""Train tiny-clip, an open_clip model of the rendered world, on pictures and their captions.

    python -m scripts.tiny.train_clip --run runs/tiny --minutes 20

Pictures are blurred and made noisy at random, because steering scores estimates in mid-run.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rewards.towers import openclip

from . import models
from .cards import FOLDERS
from .fit import device, fit, training_parser
from .train_vae import pictures


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures lose resolution, all of them get a little noise; stays in [0, 1]."""
    small = F.interpolate(images, scale_factor=0.5, mode="area")
    soft = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
    share = torch.rand(len(images), 1, 1, 1, generator=generator).to(images) * 2 - 1
    mixed = torch.lerp(images, soft, share.clamp(min=0))
    strength = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (mixed + strength * noise).clamp(0, 1)


def contrastive_loss(model: Any, images: Tensor, ids: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy; equal captions in a batch share the target."""
    f = F.normalize(model.encode_image(images).float(), dim=-1)
    g = F.normalize(model.encode_text(ids).float(), dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * f @ g.T
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def main(argv: list[str] | None = None) -> None:
    """Train, and save in open_clip's layout."""
    args = training_parser(__doc__, minutes=20, batch=256).parse_args(argv)
    torch.manual_seed(0)  # of the initial weights
    images, prompts = pictures(60_000, seed=4)
    tok = models.tokenizer()
    ids = models.token_ids(tok, prompts)
    settings = json.loads((FOLDERS["clip"] / "open_clip_config.json").read_text(encoding="utf-8"))
    settings["model_cfg"]["text_cfg"]["vocab_size"] = len(tok)
    model = openclip.build(settings).float().to(device()).requires_grad_(True)
    model.visual.compile()
    model.transformer.compile()

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.batch,), generator=generator)
        x = degrade(images[rows].float() / 255, generator).to(device())
        with torch.autocast(device().type, torch.bfloat16):
            return contrastive_loss(model, (x - 0.5) / 0.5, ids[rows].to(device()))

    sizes = {"minutes": args.minutes, "batch": args.batch}
    fit(nn.ModuleDict({"clip": model}), loss, args.run, "clip", lr=1e-3, **sizes)
    folder = args.run / "clip"
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tok.backend_tokenizer.save(str(folder / "tokenizer.json"))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


if __name__ == "__main__":
    main()
