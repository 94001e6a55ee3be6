"""Train tiny-clip, an open_clip model of the rendered world, on pictures and their captions.

    python -m scripts.tiny.train_clip --run runs/tiny --minutes 20

Pictures are blurred and made noisy at random, because steering scores estimates in mid-run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rewards.towers import openclip

from . import models
from .fit import device, fit
from .train_vae import pictures


def config(vocabulary: int) -> dict:
    """open_clip's own configuration format."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 64,
                "patch_size": 8,
                "width": 96,
                "layers": 5,
                "head_width": 32,
                "mlp_ratio": 4.0,
            },
            "text_cfg": {
                "context_length": models.TOKENS,
                "vocab_size": vocabulary,
                "width": 96,
                "heads": 3,
                "layers": 2,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


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
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="checkpoints, weights")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args(argv)
    torch.manual_seed(0)  # the initial weights; a script may
    images, prompts = pictures(60_000, seed=4)
    tok = models.tokenizer()
    ids = tok(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    settings = config(len(tok))
    model = openclip.build(settings).float().to(device()).requires_grad_(True)
    model.visual.compile()
    model.transformer.compile()

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.batch,), generator=generator)
        x = degrade(images[rows].float() / 255, generator).to(device())
        with torch.autocast(device().type, torch.bfloat16):
            return contrastive_loss(model, (x - 0.5) / 0.5, ids[rows].to(device()))

    report = fit(
        nn.ModuleDict({"clip": model}),
        loss,
        args.run / "clip.pt",
        minutes=args.minutes,
        batch=args.batch,
        lr=1e-3,
    )
    folder = args.run / "clip"
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tok.backend_tokenizer.save(str(folder / "tokenizer.json"))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (args.run / "clip.json").write_text(json.dumps(report))
    print(report)


if __name__ == "__main__":
    main()
