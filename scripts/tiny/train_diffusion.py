"""Train an embedded pipeline on cached latents, text encoders and denoiser together.

    python -m scripts.tiny.train_diffusion tiny-sd3 --run runs/tiny --minutes 120
    python -m scripts.tiny.train_diffusion tiny-sd  --run runs/tiny --minutes 120

Needs the autoencoder of `train_vae`. A second call resumes; more minutes train on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import models
from .fit import device, fit, training_parser
from .train_vae import encode, pictures

DROP = 0.1  # share of prompts replaced by "" for classifier-free guidance
LARGEST_WEIGHT = 50.0  # reached near t = 870 of 1000
T5_TOKENS = 256  # zeros that the pipeline appends unless max_sequence_length says otherwise


def cached_latents(run: Path, count: int, slips: float) -> tuple[Tensor, list[str]]:
    """Scaled latents (n,8,16,16) in bf16 of `count` seen pictures, made once, and their prompts."""
    name = f"{count}-slips-{slips:g}"
    file, prompts_file = run / f"latents-{name}.safetensors", run / f"prompts-{name}.json"
    if not file.exists():
        images, prompts = pictures(count, seed=3, slips=slips)
        vae = models.AutoencoderKL.from_pretrained(run / "vae")
        prompts_file.write_text(json.dumps(prompts))
        save_file({"latents": encode(vae, images)}, file)
    return load_file(file)["latents"], json.loads(prompts_file.read_text())


def flow_loss(pipe, x0: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Rectified flow, x = (1-s) x0 + s eps, with s logit-normal (Esser et al. 2024)."""
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    sigma = torch.randn(len(x0), generator=generator).sigmoid().to(x0)
    s = sigma.view(-1, 1, 1, 1)
    towers = [
        tower(ids, output_hidden_states=True) for tower in (pipe.text_encoder, pipe.text_encoder_2)
    ]
    context = torch.cat([out.hidden_states[-2] for out in towers], dim=-1)
    pooled = torch.cat([out[0] for out in towers], dim=-1)
    # The silent T5 appends zeros: 256 of them by default, one at max_sequence_length=1. A few
    # batches of the former teach the network to give the same pictures either way.
    many = torch.rand((), generator=generator).item() < 0.04
    context = F.pad(context, (0, 0, 0, T5_TOKENS if many else 1))
    out = pipe.transformer(
        (1 - s) * x0 + s * noise,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=sigma * 1000,
    ).sample
    return F.mse_loss(out.float(), noise - x0)


def epsilon_loss(pipe, x0: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """The error of the noise, weighted as that of v (Salimans & Ho 2022), timesteps uniform.

    The simple loss (Ho et al. 2020) hardly depends on the content of the picture: at high noise, a
    wrong x0 causes a small error of the noise. The error of v is 1/alpha_bar times that, and
    weights x0 equally at all of these timesteps.
    """
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    t = torch.randint(1000, (len(x0),), generator=generator).to(x0.device)
    alpha_bar = pipe.scheduler.alphas_cumprod.to(x0)[t].view(-1, 1, 1, 1)
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    context = pipe.text_encoder(ids).last_hidden_state
    out = pipe.unet(x, t, encoder_hidden_states=context).sample
    weight = (1 / alpha_bar).clamp(max=LARGEST_WEIGHT)
    return (weight * (out.float() - noise).square()).mean()


def warm_start(pipe: Any, folder: Path) -> None:
    """Take the networks of an exported pipeline, whose autoencoder has to be the same."""
    trained: Any = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.load_state_dict(getattr(trained, name).state_dict())


def train(args: argparse.Namespace) -> None:
    """Train a pipeline, from the weights in args.start or from nothing; save it in float32."""
    torch.manual_seed(0)  # of the initial weights
    latents, prompts = cached_latents(args.run, args.pictures, args.slips)
    vae = models.AutoencoderKL.from_pretrained(args.run / "vae")
    pipe = models.pipeline(args.model, vae)
    step_loss = {"tiny-sd3": flow_loss, "tiny-sd": epsilon_loss}[args.model]
    if args.start is not None:
        warm_start(pipe, args.start)
    parts = {part: getattr(pipe, part, None) for part in models.TRAINED}
    modules = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
    modules.to(device())
    if "unet" in modules:
        modules["unet"].to(memory_format=torch.channels_last)
    # Compiling doubles the images per second, also on the CPU. With static shapes, prompts with 256
    # more tokens get a graph of their own instead of a slower general one.
    modules["unet" if "unet" in modules else "transformer"].compile(dynamic=False)
    ids, empty = (models.token_ids(pipe.tokenizer, texts) for texts in (prompts, [""]))

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (args.batch,), generator=generator)
        dropped = torch.rand(args.batch, 1, generator=generator) < DROP
        words = torch.where(dropped, empty, ids[rows]).to(device())
        x0 = latents[rows].to(device()).float()
        if "unet" in modules:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device().type, torch.bfloat16):
            return step_loss(pipe, x0, words, generator)

    sizes = {"minutes": args.minutes, "batch": args.batch, "lr": args.lr}
    fit(modules, loss, args.run, args.model, **sizes)
    modules.to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(args.run / args.model)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    options = training_parser(__doc__, minutes=120, batch=64)
    options.add_argument("model", choices=("tiny-sd3", "tiny-sd"))
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--pictures", type=int, default=50_000, help="size of the training set")
    slips = "share of letters drawn at random, as a network without spelling errors is no test"
    options.add_argument("--slips", type=float, default=0.25, help=slips)
    options.add_argument("--start", type=Path, help="an exported pipeline to train on from")
    train(options.parse_args(argv))


if __name__ == "__main__":
    main()
