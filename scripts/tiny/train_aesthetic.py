"""Fit tiny-aesthetic, a linear head on tiny-clip's features, to pictures that were degraded.

    python -m scripts.tiny.train_aesthetic --run runs/tiny

Each scene is drawn clean and spoiled in six ways, each by its own amount s in [0, 1]; the rating of
a picture is 10 - 9s. Ridge regression in closed form gives `weight` (1, d) and `bias`
(1,), the layout of LAION's first aesthetic heads.

Legend: m scenes, k = 7 pictures of each (the clean one first), d features.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

from rewards.images import to_images
from rewards.models.clip import ClipReward
from steering import tiny

from ..parser import parser_of
from ..tables import head, line
from .fit import RUN, report
from .world import TASKS, Scene, render, scene

RIDGE = 1e-5  # features have length 1
SHARED = 0.5  # the share of a scene's mean that is subtracted before the fit
Spoil = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def blur(image: Image.Image, s: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian, of up to 4 pixels."""
    return image.filter(ImageFilter.GaussianBlur(4 * s))


def noise(image: Image.Image, s: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian, of a standard deviation of up to 64/255."""
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + 64 * s * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, s: float, rng: np.random.Generator) -> Image.Image:
    """Quality 40 to 2, in equal ratios."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(40 * (2 / 40) ** s))
    return Image.open(buffer).convert("RGB")


def fade(image: Image.Image, s: float, rng: np.random.Generator) -> Image.Image:
    """Contrast down to 15 %."""
    pixels = np.asarray(image, dtype=np.float32)
    mean = pixels.mean((0, 1))
    return Image.fromarray((mean + (1 - 0.85 * s) * (pixels - mean)).round().astype(np.uint8))


def broken(image: Image.Image, s: float, rng: np.random.Generator) -> Image.Image:
    """Bands of four rows slide sideways by up to 8 pixels, and up to four bites are missing."""
    pixels = np.array(image)
    background = tuple(int(value) for value in pixels[0, 0])
    for top in range(0, len(pixels), 4):
        slide = round(rng.uniform(-8, 8) * s)
        pixels[top : top + 4] = np.roll(pixels[top : top + 4], slide, axis=1)
    image = Image.fromarray(pixels)
    figure = np.argwhere((pixels != background).any(-1))
    draw = ImageDraw.Draw(image)
    for _ in range(round(4 * s) if len(figure) else 0):
        y, x = figure[int(rng.integers(len(figure)))]
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=background)
    return image


SPOILS: dict[str, Spoil] = {f.__name__: f for f in (blur, noise, jpeg, fade, broken)}
KINDS = (*SPOILS, "latent")


@torch.no_grad()
def latent(images: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    """What tiny-sd3's autoencoder makes of the pictures with noise of up to 1.2 in its latents.

    Latents have unit variance. Args: images (n, 3, 64, 64) in [0, 1]; s (n,). At s = 0 it is still
    the autoencoder's reconstruction.
    """
    vae = tiny.load("tiny-sd3").vae
    parts = []
    for x, share in zip(images.split(64), s.split(64), strict=True):
        z = vae.encode(2 * x - 1).latent_dist.mean
        spread = 1.2 * share.view(-1, 1, 1, 1) / vae.config.scaling_factor
        z = z + spread * torch.randn(z.shape, generator=generator)
        parts.append((vae.decode(z).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def spoiled(kind: str, scenes: list[Scene], s: np.ndarray, seed: int) -> Tensor:
    """The scenes, each drawn and spoiled by its s, (m, 3, 64, 64)."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    drawn = [render(one) for one in scenes]
    if kind == "latent":
        generator = torch.Generator().manual_seed(seed)
        return latent(to_images(drawn), torch.from_numpy(s).float(), generator)
    pairs = zip(drawn, s, strict=True)
    return to_images([SPOILS[kind](image, float(amount), rng) for image, amount in pairs])


def scenes_of(count: int, seed: int, unseen: bool = False) -> list[Scene]:
    """Scenes of all tasks in turn; unseen: of the kinds no embedded model was trained on."""
    rng = np.random.default_rng([seed, 19])
    return [scene(rng, TASKS[i % len(TASKS)], unseen) for i in range(count)]


def album(scenes: list[Scene], seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (m, k, 3, 64, 64) of the scenes, and their ratings (m, k): clean, then KINDS."""
    pictures = [to_images([render(one) for one in scenes])]
    amounts = [np.zeros(len(scenes))]
    for kind in KINDS:
        s = np.random.default_rng([seed, KINDS.index(kind), 23]).uniform(0, 1, len(scenes))
        pictures.append(spoiled(kind, scenes, s, seed))
        amounts.append(s)
    return torch.stack(pictures, 1), torch.from_numpy(10 - 9 * np.stack(amounts, 1)).float()


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """tiny-clip's features (..., d), of length 1, of pictures (..., 3, 64, 64)."""
    towers = ClipReward("tiny").towers
    parts = [towers.image_features(part) for part in images.flatten(0, -4).split(128)]
    return torch.cat(parts).unflatten(0, images.shape[:-3])


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (1, d) and bias (1,) for features (m, k, d) and ratings (m, k).

    The content of a scene changes the features more than blur does, and a reward is compared among
    pictures of one prompt. Therefore a share of each scene's mean is subtracted first, from
    features and ratings, as in random-effects regression (0 would be ordinary regression, 1 a fixed
    effect for each scene). The bias makes the mean rating right.
    """
    x, y = x.double(), y.double()
    inner = (x - SHARED * x.mean(1, keepdim=True)).flatten(0, 1)
    target = (y - SHARED * y.mean(1, keepdim=True)).flatten()
    inner, target = inner - inner.mean(0), target - target.mean()
    gram = inner.T @ inner / len(inner) + RIDGE * torch.eye(x.shape[-1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, inner.T @ target / len(inner))
    return weight[None].float(), (y - x @ weight).mean()[None].float()


def pearson(a: Tensor, b: Tensor) -> float:
    """The correlation of two tensors of one shape, flattened."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks; ties are put in any order."""
    return pearson(*(x.flatten().argsort().argsort().float() for x in (a, b)))


def tables(rate: Callable[[Tensor], Tensor], scenes: int = 500) -> list[str]:
    """The card's correlations, as Markdown, of `rate` on scenes of the kinds never trained on.

    Args: rate, pictures (n, 3, 64, 64) to ratings (n,).
    """
    pictures, ratings = album(scenes_of(scenes, seed=100, unseen=True), seed=100)
    found = rate(pictures.flatten(0, 1)).view_as(ratings)
    inner = [x - x.mean(1, keepdim=True) for x in (found, ratings)]
    rows = [
        f"Held-out correlation with the true rating over {ratings.numel()} pictures: Pearson"
        f" {pearson(found, ratings):.2f}, Spearman {spearman(found, ratings):.2f}; among the"
        f" {ratings.shape[1]} pictures of one scene (less their mean): Pearson"
        f" {pearson(*inner):.2f}.",
        "",
    ]
    heads = ("spoiled by", "Spearman", "clean rates higher", "than one spoiled by half and more")
    rows += head(*heads).splitlines()
    for i, kind in enumerate(KINDS, start=1):
        wins = (found[:, 0] > found[:, i]).float()
        shares = (f"{100 * won.mean():.0f} %" for won in (wins, wins[ratings[:, i] < 5.5]))
        rows.append(line(kind, f"{spearman(found[:, i], ratings[:, i]):.2f}", *shares))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Fit, and save the head."""
    options = parser_of(__doc__)
    options.add_argument("--run", type=Path, default=RUN, help="the folder that it is saved in")
    options.add_argument("--scenes", type=int, default=2000)
    args = options.parse_args(argv)
    start = time.monotonic()
    pictures, ratings = album(scenes_of(args.scenes, seed=0), seed=0)
    weight, bias = ridge(features(pictures), ratings)
    folder = args.run / "aesthetic"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight, "bias": bias}, folder / "aesthetic.safetensors")
    report(args.run, "aesthetic", images=ratings.numel(), minutes=(time.monotonic() - start) / 60)


if __name__ == "__main__":
    main()
