"""Train tiny-dino, a transformers Dinov2Model of the rendered world, on pictures alone.

    python -m scripts.tiny.train_dino --run runs/tiny --minutes 20

DINO's own loss, agreement about prototypes, learns too little in minutes on one CPU core. This
training keeps DINO's student and its teacher, the student's moving average (Caron et al. 2021), but
contrasts class tokens, as MoCo does (He et al. 2020): the other view of a picture against a queue
of other pictures and the rest of the batch. Half of the batch are the pictures of the other half
with left and right, or top and bottom, exchanged. There is no projection, so training uses the same
cosine as the reward. Half of the views have hidden patches, whose pixels are predicted (SimMIM, Xie
et al. 2022). Views are not cropped, mirrored or shifted in hue, as features must tell positions and
colours apart.

Notation: n pictures, v = 2n views, p patches of a view, d features, q pictures in the queue.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from rewards.images import normalize, to_images

from ..tables import table
from .cards import FOLDERS
from .fit import device, fit, training_parser
from .train_clip import degrade
from .train_vae import pictures
from .world import (
    ALPHABET,
    BACKGROUNDS,
    CELL,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    TASKS,
    Scene,
    Thing,
    render,
    scene,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as for DINO
MOMENTUM = 0.99
TEMPERATURE = 0.1
QUEUE = 4096
LUMA = (0.299, 0.587, 0.114)
# what changes in a scene, and the tasks whose scenes have it
CHANGES = {
    "shape": ("colors", "position"),
    "colour": ("colors", "position"),
    "count": ("counting",),
    "relation": ("position",),
    "background": ("colors", "counting", "position"),
    "letter": ("text",),
}
Embed = Callable[[Tensor], Tensor]  # pictures (n, 3, 64, 64) to features (n, d) of length 1


def config() -> Dinov2Config:
    """A vision transformer of 64x64 pictures in patches of 8: 0.4 M parameters."""
    return Dinov2Config.from_pretrained(FOLDERS["dino"])


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another look at pictures (n, 3, h, w) in [0, 1]: moved, scaled, other light, softer, noisy.

    They move by up to 6 of 64 pixels and scale by up to 15 %. This is more than between two
    drawings of one scene, and less than between two scenes. The hue stays.
    """

    def uniform(low: float, high: float) -> Tensor:
        u = torch.rand(len(images), 1, 1, 1, generator=generator).to(images)
        return low + (high - low) * u

    scale = uniform(math.log(0.85), math.log(1.15)).exp()[..., 0]
    shift = torch.cat([uniform(-6, 6), uniform(-6, 6)], 1)[..., 0] / 32  # (n, 2, 1)
    eye = torch.eye(2).to(images).expand(len(images), 2, 2)
    affine = torch.cat([eye * scale, shift], 2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    grey = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.8, 1.2)
    x = x * uniform(0.92, 1.05) + uniform(-0.03, 0.03)
    return degrade(x.clamp(0, 1), generator)


def hide(views: int, patches: int, generator: torch.Generator) -> Tensor:
    """(v, p): in every other view 10 to 50 % of the patches, anywhere."""
    share = 0.1 + 0.4 * torch.rand(views, 1, generator=generator)
    share[::2] = 0
    return torch.rand(views, patches, generator=generator) < share


class Student(nn.Module):
    """The backbone, and a linear map from a patch's token to its pixels."""

    def __init__(self) -> None:
        super().__init__()
        settings = config()
        self.backbone: Any = Dinov2Model(settings)
        self.backbone.set_attn_implementation("eager")  # on a CPU, half the time of torch's own
        nn.init.normal_(self.backbone.embeddings.position_embeddings, std=1.0)
        self.conv_out = nn.Linear(settings.hidden_size, 3 * 8 * 8)

    def loss(self, x: Tensor, hidden: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        """Contrast, and the L1 error of the hidden patches.

        Args: x (2n, 3, h, w), the first view of each picture and then the second; hidden (2n, p);
        keys (2n, d), the teacher's unit class tokens of the same views; queue (q, d), of others.
        """
        tokens = self.backbone(x, bool_masked_pos=hidden).last_hidden_state
        guess = self.conv_out(tokens[:, 1:][hidden]).float()
        pixels = F.unfold(x, 8, stride=8).transpose(1, 2)[hidden]
        return contrast(tokens[:, 0], keys, queue) + F.l1_loss(guess, pixels)


def contrast(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """Cross-entropy of finding the other view (He et al. 2020, equation 1), the mean over 2n.

    The negatives are the queue (q, d) and all keys (2n, d) except those of the picture itself.
    """
    queries = F.normalize(queries.float(), dim=-1)
    v = len(queries)
    rows = torch.arange(v, device=queries.device)
    other = (rows + v // 2) % v
    cosine = queries @ torch.cat([keys, queue]).T
    cosine[rows, rows] = -math.inf
    return F.cross_entropy(cosine / TEMPERATURE, other)


def with_swapped(images: Tensor) -> Tensor:
    """Pictures (n, 3, h, w), and after them each with its halves exchanged.

    These are left and right, or top and bottom: the cut is the one on which less is drawn. The same
    things are then in exchanged positions.
    """
    h, w = images.shape[2:]
    column = images[..., w // 2 - 1 : w // 2 + 1].flatten(2).std(2).sum(1)
    row = images[:, :, h // 2 - 1 : h // 2 + 1].flatten(2).std(2).sum(1)
    sideways = (column <= row).view(-1, 1, 1, 1)
    return torch.cat(
        [images, torch.where(sideways, images.roll(w // 2, 3), images.roll(h // 2, 2))]
    )


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module) -> None:
    """Move the teacher towards the student."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - MOMENTUM)


class Queue(nn.Module):
    """The teacher's unit class tokens of the last pictures, in place of a large batch."""

    keys: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(QUEUE, width), dim=-1))

    def push(self, keys: Tensor) -> None:
        """Add keys (2n, d) and remove the oldest."""
        self.keys.copy_(torch.cat([keys, self.keys])[:QUEUE])


def redrawn(drawn: Scene, rng: np.random.Generator) -> Scene:
    """The same scene once more: sizes and places vary as in `world.scene`, nothing else."""
    alone = drawn.task in ("single_object", "colors")
    low, high = (14, 19) if alone else (10, 12) if drawn.task == "counting" else (11, 13)

    def place(at: float) -> float:
        if alone:
            return 32 + rng.uniform(-5, 5)
        return CELL * round(at / CELL) + rng.uniform(-1, 1)

    things = tuple(
        replace(thing, x=place(thing.x), y=place(thing.y), radius=rng.uniform(low, high))
        for thing in drawn.things
    )
    return replace(drawn, things=things, dy=int(rng.integers(-1, 2)))


def changed(drawn: Scene, what: str, rng: np.random.Generator) -> Scene:
    """The scene with one attribute of another value: `what` is a key of CHANGES."""

    def other(items, *taken):
        left = [item for item in items if item not in taken]
        return left[int(rng.integers(len(left)))]

    if what == "letter":
        i = int(rng.integers(len(drawn.word)))
        word = drawn.word[:i] + other(ALPHABET, drawn.word[i]) + drawn.word[i + 1 :]
        return replace(drawn, word=word)
    if what == "background":
        return replace(drawn, background=other(BACKGROUNDS, drawn.background))
    if what == "count":
        cells = [(CELL * x, CELL * y) for x in (1, 3) for y in (1, 3)]
        chosen = rng.permutation(4)[: other(range(1, 5), len(drawn.things))]
        things = [replace(drawn.things[0], x=cells[i][0], y=cells[i][1]) for i in chosen]
        return replace(drawn, things=tuple(things))
    if what == "relation":
        a, b = drawn.things
        now = (round((a.x - 32) / CELL), round((a.y - 32) / CELL))
        dx, dy = other(DIRECTIONS.values(), now)
        first = replace(a, x=32 + CELL * dx, y=32 + CELL * dy)
        return replace(drawn, things=(first, replace(b, x=32 - CELL * dx, y=32 - CELL * dy)))
    i = int(rng.integers(len(drawn.things)))
    thing = drawn.things[i]
    if what == "shape":
        thing = replace(thing, shape=other(SHAPES, *(t.shape for t in drawn.things)))
    else:
        thing = replace(thing, colour=other(COLOURS, *(t.colour for t in drawn.things)))
    return replace(drawn, things=(*drawn.things[:i], thing, *drawn.things[i + 1 :]))


def embeddings(folder: Path) -> dict[str, Embed]:
    """tiny-dino's class token, that of an untrained network, and the pixels."""
    torch.manual_seed(0)  # of the untrained network
    untrained = Dinov2Model(config()).eval()
    trained = Dinov2Model.from_pretrained(folder).eval()

    def of(model: Any) -> Embed:
        @torch.no_grad()
        def embed(images: Tensor) -> Tensor:
            x = normalize(images, MEAN, STD)
            tokens = [model(part).last_hidden_state[:, 0] for part in x.split(128)]
            return F.normalize(torch.cat(tokens), dim=-1)

        return embed

    def pixels(images: Tensor) -> Tensor:
        return F.normalize(images.flatten(1) - 0.5, dim=-1)

    return {"tiny-dino": of(trained), "untrained": of(untrained), "pixels": pixels}


def order(things: tuple[Thing, ...]) -> tuple[int, int]:
    """The direction from the other thing to the one whose shape is first in the alphabet."""
    a, b = sorted(things, key=lambda thing: thing.shape)
    return int(np.sign(round((a.x - b.x) / CELL))), int(np.sign(round((a.y - b.y) / CELL)))


def nearest(embed: Embed, task: str, label: Callable[[Scene], Any], k: int = 10) -> float:
    """How often the vote of k neighbours among 4000 scenes is right for 1000 other scenes."""
    rng = np.random.default_rng([TASKS.index(task), 13])
    scenes = [scene(rng, task) for _ in range(5000)]
    features = embed(to_images([render(drawn) for drawn in scenes]))
    names = sorted({label(drawn) for drawn in scenes})
    labels = torch.tensor([names.index(label(drawn)) for drawn in scenes])
    close = (features[4000:] @ features[:4000].T).topk(k, dim=1)
    votes = F.one_hot(labels[close.indices], len(names)) * (close.values.unsqueeze(-1) + 1)
    return float((votes.sum(1).argmax(1) == labels[4000:]).float().mean())


def ranking(embed: Embed, what: str, each: int = 1000) -> float:
    """How often a scene drawn again is nearer to the first drawing than with `what` changed.

    The scenes are of the kinds that training never saw, where there are any.
    """
    rng = np.random.default_rng([list(CHANGES).index(what), 17])
    tasks = [CHANGES[what][i % len(CHANGES[what])] for i in range(each)]
    first = [scene(rng, task, unseen=task != "counting") for task in tasks]
    again = [redrawn(drawn, rng) for drawn in first]
    differs = [redrawn(changed(drawn, what, rng), rng) for drawn in first]
    a, b, c = (embed(to_images([render(s) for s in group])) for group in (first, again, differs))
    return float(((a * b).sum(1) > (a * c).sum(1)).float().mean())


LABELS: dict[str, tuple[str, Callable[[Scene], Any], int]] = {
    "shape": ("colors", lambda drawn: drawn.things[0].shape, 5),
    "colour": ("colors", lambda drawn: drawn.things[0].colour, 6),
    "count": ("counting", lambda drawn: len(drawn.things), 4),
    "relation": ("position", lambda drawn: order(drawn.things), 4),
}


def neighbour_table(folder: Path) -> list[str]:
    """Of the network in a folder and its rivals, as Markdown."""
    named = embeddings(folder)
    rows = [
        [name, *(nearest(embed, task, label) for embed in named.values()), 1 / classes]
        for name, (task, label, classes) in LABELS.items()
    ]
    return _percent("attribute", named, rows)


def ranking_table(folder: Path) -> list[str]:
    """Of the network in a folder and its rivals, as Markdown."""
    named = embeddings(folder)
    rows = [[what, *(ranking(embed, what) for embed in named.values()), 0.5] for what in CHANGES]
    return _percent("changed", named, rows)


def _percent(first: str, named: dict[str, Embed], rows: list[list[Any]]) -> list[str]:
    cells = [[name, *(f"{100 * share:.0f} %" for share in shares)] for name, *shares in rows]
    return table([first, *named, "chance"], cells).splitlines()


def main(argv: list[str] | None = None) -> None:
    """Train, and save the teacher."""
    options = training_parser(__doc__, minutes=20, batch=64)
    options.add_argument("--lr", type=float, default=2e-3)
    args = options.parse_args(argv)
    torch.manual_seed(0)  # of the initial weights
    images, _ = pictures(40_000, seed=6)
    student = Student().to(device())
    teacher: Any = copy.deepcopy(student.backbone).requires_grad_(False)
    queue = Queue(config().hidden_size).to(device())
    student.backbone.compile()
    teacher.compile()

    def loss(generator: torch.Generator) -> Tensor:
        follow(teacher, student.backbone)
        rows = torch.randint(len(images), (args.batch // 2,), generator=generator)
        x = with_swapped(images[rows].to(device()).float() / 255)
        x = normalize(torch.cat([view(x, generator), view(x, generator)]), MEAN, STD)
        hidden = hide(len(x), 64, generator).to(device())
        with torch.autocast(device().type, torch.bfloat16):
            with torch.no_grad():
                keys = F.normalize(teacher(x).last_hidden_state[:, 0].float(), dim=-1)
            value = student.loss(x, hidden, keys, queue.keys.clone())
        queue.push(keys)
        return value

    modules = nn.ModuleDict({"student": student, "teacher": teacher, "queue": queue})
    sizes = {"minutes": args.minutes, "batch": args.batch, "lr": args.lr}
    fit(modules, loss, args.run, "dino", ema_decay=0.99, **sizes)  # the teacher is an average
    teacher.save_pretrained(args.run / "dino")


if __name__ == "__main__":
    main()
