"""Train the autoencoder of both embedded pipelines, or the preview decoder of its latents.

python -m scripts.tiny.train_vae --run runs/tiny --minutes 10
python -m scripts.tiny.train_vae --run runs/tiny --minutes 4 --preview
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import models
from .fit import device, fit, training_parser
from .world import TASKS, render, scene

# Text is the hardest to learn, so it is drawn most often.
SHARES = {
    "text": 0.34,
    "position": 0.16,
    "color_attr": 0.14,
    "two_object": 0.10,
    "counting": 0.12,
    "colors": 0.08,
    "single_object": 0.06,
}


def pictures(count: int, seed: int, slips: float = 0.0) -> tuple[Tensor, list[str]]:
    """`count` seen scenes as uint8 (n,3,64,64), and their prompts; slips: see world.scene."""
    rng = np.random.default_rng(seed)
    tasks = rng.choice(len(TASKS), size=count, p=[SHARES[task] for task in TASKS])
    images, prompts = torch.empty(count, 3, 64, 64, dtype=torch.uint8), []
    for i, task in enumerate(tasks):
        drawn = scene(rng, TASKS[task], slips=slips)
        images[i] = torch.from_numpy(np.array(render(drawn))).permute(2, 0, 1)
        prompts.append(drawn.prompt)
    return images, prompts


def batch_of(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random batch in [-1, 1]."""
    rows = torch.randint(len(images), (size,), generator=generator)
    return (images[rows].to(device()).float() / 127.5 - 1).contiguous(
        memory_format=torch.channels_last
    )


def figure_error(out: Tensor, x: Tensor) -> Tensor:
    """The L1 error; pixels that differ from the background (the corner) count five times.

    Letters cover few pixels.
    """
    weight = 1 + 4 * ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1)
    return (weight * (out.float() - x).abs()).mean()


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Scaled latents (n, 8, 16, 16) in bf16, on the CPU, of uint8 images (n, 3, 64, 64)."""
    vae.to(device(), memory_format=torch.channels_last)
    vae.encoder.compile()
    chunks = []
    for rows in images.split(256):
        x = (rows.to(device()).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device().type, torch.bfloat16):
            z = vae.encode(x).latent_dist.mean.float()
        chunks.append((z * vae.config.scaling_factor).contiguous().bfloat16().cpu())
    return torch.cat(chunks)


def train_autoencoder(run: Path, sizes: dict[str, Any]) -> None:
    """L1 reconstruction of posterior samples plus a small KL; latents end with unit variance."""
    images, _ = pictures(20_000, seed=1)
    vae = models.vae().to(device(), memory_format=torch.channels_last)
    vae.encoder.compile()
    vae.decoder.compile()

    def loss(generator: torch.Generator) -> Tensor:
        x = batch_of(images, sizes["batch"], generator)
        with torch.autocast(device().type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
            out = vae.decode(posterior.mean + posterior.std * noise).sample
        return figure_error(out, x) + 1e-3 * posterior.kl().mean() / noise[0].numel()

    fit(nn.ModuleDict({"vae": vae}), loss, run, "vae", **sizes)
    with torch.no_grad():
        x = batch_of(images, 256, torch.Generator().manual_seed(5))
        z = vae.encode(x).latent_dist.mean
        error = (vae.decode(z).sample - x).abs().mean().item()
    # No shift: StableDiffusionPipeline has none, and the KL leaves hardly any.
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=0.0)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(run / "vae")
    print(f"L1 error {127.5 * error:.2f}/255, config {vae.config.scaling_factor}")


def train_preview(run: Path, sizes: dict[str, Any]) -> None:
    """Train AutoencoderTiny's decoder to decode the autoencoder's scaled latents."""
    images, _ = pictures(20_000, seed=2)
    latents = encode(models.AutoencoderKL.from_pretrained(run / "vae"), images)
    tiny = models.preview().to(device(), memory_format=torch.channels_last)
    tiny.encoder.requires_grad_(False)
    tiny.decoder.compile()

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (sizes["batch"],), generator=generator)
        x, z = images[rows].to(device()).float() / 127.5 - 1, latents[rows].to(device()).float()
        # Estimates of x0 in mid-run are noisy, so the latents of training are noisy too.
        share = torch.rand(len(z), 1, 1, 1, generator=generator).to(x.device) * 0.3
        z = z + share * torch.randn(z.shape, generator=generator).to(x.device)
        with torch.autocast(device().type, torch.bfloat16):
            out = tiny.decode(z.contiguous(memory_format=torch.channels_last)).sample
        return figure_error(out, x)

    fit(nn.ModuleDict({"preview": tiny}), loss, run, "preview", **sizes)
    tiny.to(memory_format=torch.contiguous_format).save_pretrained(run / "preview")


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    options = training_parser(__doc__, minutes=10, batch=32)
    options.add_argument("--preview", action="store_true", help="train the preview decoder")
    args = options.parse_args(argv)
    torch.manual_seed(0)  # of the initial weights
    sizes = {"minutes": args.minutes, "batch": args.batch, "lr": 2e-3}
    (train_preview if args.preview else train_autoencoder)(args.run, sizes)


if __name__ == "__main__":
    main()
