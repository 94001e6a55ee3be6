"""What scoring costs, compared with the usual way: one picture at a time, through PIL.

    python -m scripts.bench rewards --side 512 --clip ViT-B-32 --pairs 5

docs/rewards.md has results. torchmetrics is its CLIPScore on the whole batch, with transformers'
model of the same size, adapted to transformers 5. Networks other than `tiny` have random weights,
as only time is measured, and that the scores agree. Each pair has new pictures and prompts.
"""

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import rewards
from rewards.images import to_images, to_uint8
from rewards.models.clip import ClipReward
from rewards.models.ocr import OcrReward, quoted_text
from rewards.towers.sources import TINY

from ..parser import parser_of
from ..tables import head, line, span
from ..tiny.world import render, scene
from .timing import seconds

PROMPTS, EACH = 8, 8


def pictures(side: int, seed: int) -> tuple[Tensor, list[str]]:
    """64 pictures (n, 3, side, side): 8 words of the embedded world, each drawn 8 times."""
    rng = np.random.default_rng(seed)
    images, prompts = [], []
    while len(images) < PROMPTS * EACH:
        drawn = scene(rng, "text")
        if drawn.prompt in prompts:
            continue
        picture = render(drawn).resize((side, side), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 3, (EACH, side, side, 3))  # so that no two are the same
        copies = np.clip(np.array(picture) + noise, 0, 255).astype(np.uint8)
        images += [Image.fromarray(copy) for copy in copies]
        prompts += [drawn.prompt] * EACH
    return to_images(images), prompts


def usual_clip(reward: ClipReward) -> Callable[[Tensor, list[str]], list[float]]:
    """One picture at a time through PIL and both towers, on the reward's own weights."""
    import open_clip

    from rewards.towers.openclip import WordTokenizer

    model: Any = reward.towers.model
    side = reward.towers.size[0]
    process: Any = open_clip.image_transform(
        side, is_train=False, mean=tuple(reward.towers.mean), std=tuple(reward.towers.std)
    )
    tokenizer: Any = (
        WordTokenizer(str(TINY), model.context_length)
        if model.vocab_size < 1000
        else open_clip.SimpleTokenizer(context_length=model.context_length)
    )

    def score(images: Tensor, prompts: list[str]) -> list[float]:
        scores = []
        for picture, prompt in zip(to_uint8(images), prompts, strict=True):
            image = model.encode_image(process(Image.fromarray(picture))[None], normalize=True)
            text = model.encode_text(tokenizer([prompt]), normalize=True)
            scores.append((image * text).sum().item())
        return scores

    return score


def torchmetrics_clip() -> Callable[[Tensor, list[str]], float]:
    """CLIPScore with transformers' ViT-B/32 and its processor; random weights, ready offline."""
    import open_clip
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    words = open_clip.SimpleTokenizer()
    pixels: Any = CLIPImageProcessor()

    class Processor:
        def __call__(self, text: Any = None, images: Any = None, **_: Any) -> dict[str, Tensor]:
            if text is None:
                return dict(pixels(images, return_tensors="pt"))
            ids = words(text)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    class Model(CLIPModel):  # torchmetrics expects what transformers 4 returned
        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            found: Any = super().get_image_features(*args, **kwargs)
            return found.pooler_output

        def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
            found: Any = super().get_text_features(*args, **kwargs)
            return found.pooler_output

    metric: Any = CLIPScore(lambda: (Model(CLIPConfig()).eval(), Processor()))

    def score(images: Tensor, prompts: list[str]) -> float:
        metric.reset()
        metric.update((images * 255).round().to(torch.uint8), prompts)
        return metric.compute().item()

    return score


def usual_ocr() -> Callable[[Tensor, list[str]], list[float]]:
    """RapidOCR with its own settings, a picture at a time; the share of words read right."""
    from rapidocr import RapidOCR

    engine: Any = RapidOCR(params={"Global.log_level": "critical"})

    def score(images: Tensor, prompts: list[str]) -> list[float]:
        scores = []
        for picture, prompt in zip(to_uint8(images), prompts, strict=True):
            read = "".join(engine(np.ascontiguousarray(picture[..., ::-1])).txts or ())
            target = "".join(quoted_text(prompt)).lower()
            scores.append(float(read.replace(" ", "").lower() == target))
        return scores

    return score


def compare(
    usual: Callable[..., Any], ours: Callable[..., Any], side: int, pairs: int, agree: float | None
) -> str:
    """Median [min, max] of usual/ours in alternating pairs; agree: how much scores may differ."""
    ratios = []
    for pair in range(pairs + 1):  # the first warms up
        images, prompts = pictures(side, pair)
        found: dict[str, Any] = {}

        def call(name: str, score: Callable[..., Any]) -> float:
            return seconds(lambda: found.update({name: score(images, prompts)}))  # noqa: B023

        order = [("usual", usual), ("ours", ours)][:: 1 if pair % 2 else -1]
        spent = {name: call(name, score) for name, score in order}
        ratios += [spent["usual"] / spent["ours"]] if pair else []
        if agree is not None:
            a, b = (torch.as_tensor(found[name]).float() for name in ("usual", "ours"))
            apart = (a - b).abs().max().item()
            if apart > agree:
                raise SystemExit(f"the scores differ by {apart:.2g}, so nothing was compared")
    return span(ratios, 2)


def main(argv: list[str] | None = None) -> None:
    """Print one Markdown row for each reward and its rival."""
    parser = parser_of(__doc__, __name__)
    sources = ["tiny", "random:0", "ViT-B-32"]
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", type=int, default=512, help="pixels of the pictures")
    parser.add_argument("--clip", nargs="*", default=sources, help="towers to measure")
    args = parser.parse_args(argv)
    print(
        f"torch {torch.__version__}, {platform.machine()} CPU, {torch.get_num_threads()} threads,"
        f" {PROMPTS} x {EACH} pictures of {args.side} px, {args.pairs} pairs\n"
    )
    print(head("reward", "against", "times as fast: median [min, max]"))

    def row(reward: str, against: str, *measured: Any) -> None:
        print(line(reward, against, compare(*measured)), flush=True)

    with torch.inference_mode():
        for source in args.clip:
            clip = clip_of(source)
            usual = usual_clip(clip)
            row(f"clip, {source}", "a picture at a time", usual, clip, args.side, args.pairs, 0.02)
            if source == "ViT-B-32":
                metric = torchmetrics_clip()
                row(f"clip, {source}", "torchmetrics", metric, clip, args.side, args.pairs, None)
        ocr = OcrReward("exact")
        row("ocr", "RapidOCR as it comes", usual_ocr(), ocr, args.side, args.pairs, None)
        alone = rewards.load("clip(tiny)")
        both = rewards.load("clip(tiny) + 0.1*aesthetic(tiny)")
        row("clip", "clip + aesthetic, one tower", both, alone, args.side, args.pairs, None)
    count_texts()


def clip_of(source: str) -> ClipReward:
    """The reward of a source; the name of an architecture gives random weights."""
    if source == "tiny" or ":" in source:
        return ClipReward(source)
    import open_clip

    from rewards.towers.openclip import open_clip_towers

    model: Any = open_clip.create_model(source, pretrained=None)
    reward = ClipReward("random:0")
    reward.towers = open_clip_towers(
        model, open_clip.get_tokenizer(source), model.visual.output_dim
    )
    return reward


def count_texts() -> None:
    """Print how often the text tower ran for 64 pictures of 8 prompts."""
    reward = ClipReward("random:1")
    images, prompts = pictures(64, 0)
    encode, calls = reward.towers.encode_text, []
    reward.towers.encode_text = lambda texts: calls.append(len(texts)) or encode(texts)
    reward(images, prompts)
    reward(images, prompts)
    print(f"\ntexts encoded for twice {len(images)} pictures of {PROMPTS} prompts: {sum(calls)}")
