"""The rendered world of the embedded models: 64x64 pictures, prompts, and what stays unseen.

Six tasks as in GenEval (Ghosh et al. 2023) and one of writing:

    single_object  a circle                        colors      a red circle
    two_object     a circle and a star             color_attr  a red circle and a blue star
    counting       three stars                     position    a circle left of a star
    text           the word "BIRD" [in red]

Letters are on a grid of 16 px cells, the grid of the latent patches, and pairs and counted things
are near its corners. Characters are tokens. Therefore a network of a few million parameters learns
to draw and to spell in an hour or two on a laptop.
"""

import json
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards.geneval.rules import DIRECTIONS
from rewards.geneval.tiny_world import COLOURS, SHAPES, SIZE

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "text")
INKS = COLOURS | {"black": (20, 20, 20), "white": (250, 250, 250)}
BACKGROUNDS = ((248, 248, 248), (205, 205, 205), (28, 32, 48), (12, 12, 12))
NUMBERS = ("one", "two", "three", "four")
RELATIONS = tuple(DIRECTIONS)
ALPHABET = string.ascii_uppercase
FONT_SIZE = 20
CELL = 16

_UNSEEN = json.loads((Path(__file__).parent / "unseen.json").read_text(encoding="utf-8"))
UNSEEN_WORDS: tuple[str, ...] = tuple(_UNSEEN["words"])
UNSEEN_PAIRS = frozenset((colour, shape) for colour, shape in _UNSEEN["colour_shape"])
UNSEEN_POSITIONS = frozenset((a, relation, b) for a, relation, b in _UNSEEN["positions"])

WORDS = tuple((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())


@dataclass(frozen=True)
class Thing:
    """One shape: centre and radius in pixels of the 64x64 picture."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn, with the prompt that describes it."""

    prompt: str
    task: str
    background: tuple[int, int, int]
    things: tuple[Thing, ...] = ()
    word: str = ""
    ink: str = "black"
    dy: int = 0


def seen_pairs(unseen: bool = False) -> list[tuple[str, str]]:
    """All (colour, shape) pairs that training sees, or only those it never sees."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [pair for pair in pairs if (pair in UNSEEN_PAIRS) == unseen]


def _contrast(ink: str, background: tuple[int, int, int]) -> float:
    luma = np.array([0.299, 0.587, 0.114])
    return float(abs(luma @ np.array(INKS[ink]) - luma @ np.array(background)))


def article(noun: str) -> str:
    """The noun with its article: "an orange star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _nonsense(rng: np.random.Generator) -> str:
    """A pronounceable string that is no unseen word: such strings teach to combine letters."""
    vowels, consonants = "AEIOU", "BCDFGHJKLMNPQRSTVWXYZ"
    while True:
        pattern = _pick(rng, ("CVC", "CVC", "VCV", "CVCV", "CVCC", "CCVC", "VCCV", "CVVC"))
        text = "".join(_pick(rng, vowels if c == "V" else consonants) for c in pattern)
        if text not in UNSEEN_WORDS:
            return text


def _pair_layout(rng: np.random.Generator, offset: tuple[int, int]):
    """Centres and radii of two things, the first lying at `offset` from the second."""
    dx, dy = offset
    jitter = rng.uniform(-1, 1, size=4)
    radii = rng.uniform(11, 13, size=2)
    first = (32 + CELL * dx + jitter[0], 32 + CELL * dy + jitter[1], radii[0])
    second = (32 - CELL * dx + jitter[2], 32 - CELL * dy + jitter[3], radii[1])
    return first, second


def scene(rng: np.random.Generator, task: str, unseen: bool = False, slips: float = 0.0) -> Scene:
    """Draw a random scene of a task.

    slips: the probability that a letter is drawn as a random one, whatever the prompt says.

    `unseen=True` gives what training never sees: held-out words (text), held-out colour-shape
    pairs (colors, color_attr), held-out shape-relation-shape triples (position).
    """
    background = _pick(rng, BACKGROUNDS)
    if task == "text":
        return _text_scene(rng, background, unseen, slips)
    if task in ("single_object", "colors"):
        colour, shape = _pick(rng, seen_pairs(unseen and task == "colors"))
        radius = rng.uniform(14, 19)
        x, y = 32 + rng.uniform(-5, 5, size=2)
        noun = shape if task == "single_object" else f"{colour} {shape}"
        return Scene(article(noun), task, background, (Thing(shape, colour, x, y, radius),))
    if task == "counting":
        count = int(rng.integers(1, 5))
        colour, shape = _pick(rng, seen_pairs())
        cells = rng.permutation(4)[:count]
        things = tuple(
            Thing(
                shape,
                colour,
                CELL + 2 * CELL * (cell % 2) + rng.uniform(-1, 1),
                CELL + 2 * CELL * (cell // 2) + rng.uniform(-1, 1),
                rng.uniform(10, 12),
            )
            for cell in cells
        )
        prompt = f"{NUMBERS[count - 1]} {shape}{'es' * (shape == 'cross') or 's' * (count > 1)}"
        prompt = f"one {shape}" if count == 1 else prompt
        return Scene(prompt, task, background, things)
    return _pair_scene(rng, task, background, unseen)


def _pair_scene(rng, task: str, background, unseen: bool) -> Scene:
    relation = _pick(rng, RELATIONS)
    while True:
        (c1, s1), (c2, s2) = _pick(rng, seen_pairs()), _pick(rng, seen_pairs())
        if task == "color_attr" and unseen:
            c1, s1 = _pick(rng, seen_pairs(unseen=True))
        held_out = (s1, relation, s2) in UNSEEN_POSITIONS
        if s1 != s2 and c1 != c2 and (task != "position" or held_out == unseen):
            break
    first, second = _pair_layout(rng, DIRECTIONS[relation])
    things = (Thing(s1, c1, *first), Thing(s2, c2, *second))
    # Half of the position prompts name colours too.
    named = task == "color_attr" or (task == "position" and bool(rng.integers(2)))
    a, b = (f"{c1} {s1}", f"{c2} {s2}") if named else (s1, s2)
    link = relation if task == "position" else "and"
    return Scene(f"{article(a)} {link} {article(b)}", task, background, things)


def _text_scene(rng, background, unseen: bool, slips: float) -> Scene:
    if unseen:
        word = _pick(rng, UNSEEN_WORDS)
    else:
        word = _pick(rng, WORDS) if rng.integers(2) else _nonsense(rng)
    ink = _pick(rng, [name for name in INKS if _contrast(name, background) > 70])
    named = ink in COLOURS and bool(rng.integers(2))
    prompt = f'the word "{word}"' + (f" in {ink}" if named else "")
    if slips > 0:
        word = "".join(_pick(rng, ALPHABET) if rng.random() < slips else c for c in word)
    return Scene(prompt, "text", background, word=word, ink=ink, dy=int(rng.integers(-1, 2)))


def _outline(thing: Thing, scale: int) -> list[tuple[float, float]]:
    r, cx, cy = thing.radius * scale, thing.x * scale, thing.y * scale
    if thing.shape == "square":
        unit = [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    elif thing.shape == "triangle":
        unit = [(0, -1), (0.95, 0.8), (-0.95, 0.8)]
    elif thing.shape == "cross":
        a = 0.32
        unit = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        unit += [(a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    else:  # star
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
        unit = list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))
    return [(cx + r * x, cy + r * y) for x, y in unit]


def render(scene: Scene) -> Image.Image:
    """The scene as a 64x64 RGB picture, shapes drawn at four times the size and averaged."""
    if scene.word:
        image = Image.new("RGB", (SIZE, SIZE), scene.background)
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(FONT_SIZE)
        left = (SIZE - CELL * len(scene.word)) // 2
        for i, letter in enumerate(scene.word):
            centre = (left + CELL * i + CELL // 2, 39 + scene.dy)
            draw.text(centre, letter, fill=INKS[scene.ink], font=font, anchor="ms")
        return image
    scale = 4
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        fill = COLOURS[thing.colour]
        if thing.shape == "circle":
            x, y, r = thing.x * scale, thing.y * scale, 0.95 * thing.radius * scale
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        else:
            draw.polygon(_outline(thing, scale), fill=fill)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)
