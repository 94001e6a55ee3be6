"""The text of the embedded models' cards: what is said around the figures that evaluate measures.

Each opens with the metadata that the Hugging Face hub reads, shows the grid.png that
scripts/tiny/grids.py draws, and holds code that runs where Tilt is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {name: ROOT / "steering" / "tiny" / name for name in ("tiny-sd3", "tiny-sd")} | {
    name: ROOT / "rewards" / "tiny" / name for name in ("clip", "dino", "aesthetic")
}
GRID = "grid.png"

_DATA = """\
- Data: pictures drawn by `scripts/tiny/world.py`, 64x64 pixels, coloured shapes in numbers and
  places, and words in Pillow's own scalable font, with English prompts of a few patterns. No
  photograph, no person, nothing taken from the web: there is no personal data in it. The words,
  colour-shape pairs and positions in `scripts/tiny/unseen.json` are left out."""

_ONE_RED_CIRCLE = """from PIL import Image, ImageDraw

import rewards
from rewards.images import to_images

picture = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), "red")"""


def _grid(name: str, alternative: str, says: str) -> str:
    return f"""![{alternative}]({GRID})

{says}
Drawn by `python -m scripts.tiny.grids --models {name}`; nothing is picked."""


def pipeline(
    name: str,
    kind: str,
    *,
    parameters: str,
    training: str,
    defaults: str,
    each: int,
    rows: Sequence[str],
) -> str:
    """The card of an embedded pipeline of diffusers' class `kind`.

    rows: of the table of accuracies, `each` prompts a cell.
    """
    grid = _grid(
        name,
        "Eleven rows of eight pictures, a row a prompt and a column a seed: single shapes, pairs, "
        "counts, colours, places and words. Many are as asked; others have a malformed shape, a "
        "wrong number, exchanged places or a wrong letter.",
        """\
The first prompt of each task, seven of the kinds that training saw and four of those it never
saw, at seeds 0 to 7. Column i is `generator=steering.generators(i, [prompt], 1)`. How many are
right is judged as below; the reader also misses a few words that people can read.""",
    )
    table = "\n".join(rows)
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: en
tags:
- {name}
- diffusers
- tiny
- test-model
- synthetic-data
---

# {name}

A real `{kind}` of 64x64 pictures from a rendered world
(`scripts/tiny/world.py`), for demos and tests. It is wrong often enough to leave something to
steer, and of no other use.

{grid}

## Load it

```python
from steering import generators, tiny

pipe = tiny.load("{name}")  # DiffusionPipeline.from_pretrained(tiny.FOLDER / "{name}")
prompt, call = "a red circle", tiny.call_defaults("{name}")
image = pipe(prompt, generator=generators(0, [prompt], 1), **call).images[0]
```

## Use

For trying and testing steering and fine-tuning on a CPU, without a network: it is small, and a
program can tell whether its pictures are right. Not for making pictures of anything else: it knows
five shapes, six colours, numbers up to four, four positions and capital letters.

## Limits

- Shapes come out malformed, in a wrong number, or exchanged: the table below says how often.
- It misspells on purpose, see training. Words of more than four letters do not fit its picture.
- A prompt outside the world gives some picture of the world, without a warning.
- What helps or harms here need not do so in a large model.

## Training

{_DATA}
- Parameters: {parameters}; fp16 safetensors.
- Training: {training} of one CPU core, in three stretches: an older world with AdamW;
  `python -m scripts.tiny.train_diffusion {name} --slips 0 --start` on it; and eight minutes with
  `--slips 0.5 --lr 7e-4 --start`, in which half of the letters are drawn at random. The weights
  are 0.25 of the second and 0.75 of the third (`scripts.tiny.export --mix`): the second spells
  without fault, which leaves nothing to steer.
- Licence: Apache-2.0.

## Evaluation

Accuracy, {each} prompts a cell, one picture each, seen and unseen by training
(`python -m scripts.tiny.evaluate --models {name} --each {each}`).
Sampled with {defaults}.
Words are judged by RapidOCR (exact, without case), the rest by the colour-shape detector of
`rewards.objects`. In brackets: 95 % intervals (Wilson).

| task | seen | unseen |
|---|---|---|
{table}
"""


def clip(*, parameters: str, training: str, share: str) -> str:
    """The card of tiny-clip. share: its retrieval among 64 captions, with an interval."""
    grid = _grid(
        "clip",
        "Seven rows of six pictures, a row a caption. Under each picture stands its cosine with "
        "the caption. Most rows begin with what the caption says; the row of a square also has "
        "circles.",
        """\
For one held-out caption of each task the nearest of 210 held-out pictures, the nearest first,
with the cosine. The farther ones have to be wrong where few pictures of the caption are there.""",
    )
    return f"""---
license: apache-2.0
library_name: open_clip
pipeline_tag: zero-shot-image-classification
language: en
tags:
- tiny-clip
- clip
- tiny
- test-model
- synthetic-data
---

# tiny-clip

An open_clip model of the rendered world (`scripts/tiny/world.py`), for demos, tests
and claims measured on the embedded pipelines; it knows nothing else.

{grid}

## Load it

```python
{_ONE_RED_CIRCLE}
reward = rewards.load("clip(tiny)")
scores = reward(to_images([picture] * 2), ["a red circle", "a blue star"])
```

open_clip reads the same folder, `create_model_and_transforms("local-dir:FOLDER")`; but the tokens
are those of `tokenizer.json`, not of open_clip's own tokenizer.

## Use

As the reward `clip(tiny)`, to steer or tune the embedded pipelines and to score their pictures,
also the blurred and noisy estimates in mid-run. Not for pictures or prompts of any other kind, and
not as a stand-in for a large CLIP in a claim about one.

## Limits

- It errs, and most on what training never saw: it takes a green circle for a square, see above.
- A high score need not mean that the picture is as asked; steering finds such pictures.
- It tells words apart roughly, see the last row; the reward `ocr` reads them.

## Training

{_DATA}
- Parameters: {parameters}; fp16 safetensors.
- Training: {training} (`python -m scripts.tiny.train_clip`, CPU).
- Licence: Apache-2.0.

## Evaluation

- Top-1 image-to-text retrieval among 64 held-out captions: {share}
  (`python -m scripts.tiny.evaluate --models clip`). In brackets: a 95 % interval (Wilson).
"""


def dino(*, parameters: str, training: str, neighbours: Sequence[str], ranks: Sequence[str]) -> str:
    """The card of tiny-dino, with its two tables."""
    grid = _grid(
        "dino",
        "Seven rows of a picture and the six nearest to it, with cosines. Neighbours mostly share "
        "background and colour, less often the shape or the number of things.",
        """\
One held-out picture of each task, and the nearest of 210 others by the cosine of class tokens.
The text says what was drawn; the model saw none.""",
    )
    lines = ["\n".join(table) for table in (neighbours, ranks)]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- tiny-dino
- dinov2
- tiny
- test-model
- synthetic-data
---

# tiny-dino

A transformers `Dinov2Model` of the rendered world (`scripts/tiny/world.py`), for demos, tests
and claims measured on the embedded pipelines; it knows nothing else. It has DINO's architecture,
student and teacher, but not its loss, which learned less in six minutes than this one in five:
class tokens are contrasted with a queue (MoCo), and the pixels of hidden patches are guessed
(SimMIM). It saw pictures only, no captions and no labels.

{grid}

## Load it

```python
{_ONE_RED_CIRCLE}
images = to_images([picture, picture.rotate(180), Image.new("RGB", (64, 64), "blue")])
reward = rewards.load("dino(tiny)")
scores = reward(images[1:], ["", ""], references=[images[0]] * 2)
```

transformers alone reads the same folder, `Dinov2Model.from_pretrained(FOLDER)`.

## Use

As the reward `dino(tiny)`, likeness to reference pictures, to steer or tune the embedded
pipelines. Not for pictures of any other kind.

## Limits

- What it calls near shares background and colour before shape and number, see above.
- The pixels themselves do as well or better on shape and on which thing lies where, see below.
- It does not look at the prompt.

## Training

{_DATA}
- Parameters: {parameters}; fp16 safetensors.
- Input: 64x64 pixels in patches of 8; ImageNet's mean and standard deviation.
- Training: {training} (`python -m scripts.tiny.train_dino`,
  one thread of a CPU).
- Licence: Apache-2.0.

## Evaluation

Measured on the cosine of class tokens (`python -m scripts.tiny.evaluate --models dino`), beside a
network that learned nothing and the pixels themselves. Pixels do well, because in this world
things lie on a grid and hardly move from one drawing to the next.

The vote of the 10 nearest of 4000 scenes, on 1000 others:

{lines[0]}

How often a scene that is drawn again (other sizes and places) is nearer to its first drawing than
the scene with one attribute changed, drawn again as well; 1000 scenes, of the kinds that training
never saw where there are any:

{lines[1]}
"""


def aesthetic(*, parameters: int, training: str, steps: str, tables: Sequence[str]) -> str:
    """The card of tiny-aesthetic. steps: how often 20 steps rate above 4, with an interval."""
    grid = _grid(
        "aesthetic",
        "Six rows of six pictures of one green cross, a row a kind of damage that grows from left "
        "to right, with ratings. Fading lowers the rating at every step, strong noise too; it "
        "hardly falls with blur, and most of the broken crosses are rated above the clean one.",
        """\
One held-out scene, the first, spoiled in each way by s, from 0 to 1; a picture's true rating is
10 - 9s. At s = 0 JPEG is of quality 40 and the last row the autoencoder's picture.""",
    )
    lines = "\n".join(tables)
    return f"""---
license: apache-2.0
tags:
- tiny-aesthetic
- image-quality
- tiny
- test-model
- synthetic-data
---

# tiny-aesthetic

A linear head on tiny-clip's picture embedding (keys `weight` and `bias`, as LAION's version 1),
for demos and tests. What it rates is damage, not beauty: 10 is a clean drawing of the world of
`scripts/tiny/world.py`, and blur, noise, JPEG, lost contrast, broken shapes or noise in the
latents of tiny-sd3's autoencoder bring that down to 1. It does not look at the prompt and knows
nothing of other pictures. tiny-clip was trained to see through blur and noise, so ratings are
rough, and scenes differ in theirs: compare pictures of one prompt.

{grid}

## Load it

```python
{_ONE_RED_CIRCLE}
faded = Image.blend(picture, Image.new("RGB", (64, 64), "white"), 0.8)
reward = rewards.load("aesthetic(tiny)")
scores = reward(to_images([picture, faded]), ["", ""])
```

## Use

As the reward `aesthetic(tiny)`, to try what steering and tuning do with a reward that is cheap and
rough. Not a measure of quality, not even of these pictures one by one.

## Limits

- Of one picture's rating little is to be believed: the correlations below are low.
- It is blind to much damage: JPEG worst, then noise in the latents, see above and below.
- Being linear, it is hacked easily: a high rating need not come with a clean picture.

## Training

{_DATA}
  Each is shown clean and spoiled in six ways (`scripts/tiny/train_aesthetic.py`).
- Parameters: {parameters}; fp16 safetensors.
- Training: ridge regression in closed form, {training}
  (`python -m scripts.tiny.train_aesthetic`, CPU).
- Licence: Apache-2.0.

## Evaluation

- Rates tiny-sd3's picture of 20 steps above that of 4 steps, same prompt and seed: {steps},
  a 95 % interval (Wilson) in brackets.

{lines}

Measured by `python -m scripts.tiny.evaluate --models aesthetic`.
"""
