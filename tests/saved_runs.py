"""Saved runs of random numbers, as `Steered.save` and scripts/steer.py leave them; pages read."""

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import torch
from PIL import Image

from steering import FeynmanKac
from steering.filter import close, final_log_z, resample, start, weigh
from steering.lineage import Lineage, Score

VOID = {"meta", "img", "br", "path", "circle", "link", "hr"}
NASTY = [
    '<script>alert("1")</script>',
    "\"'><img src=x onerror=alert(1)>",
    "مرحبا بالعالم \u202e<b>",
    "👩‍🚀 a & b &amp; {curly} {0} %s </style></main>",
    "half a pair \ud83d and a\nline",
]


class Page(HTMLParser):
    """The elements, each with its attributes and text; refuses tags that do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self._open: list[tuple[str, int]] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        name, _ = self._open.pop()
        assert name == tag, (name, tag, self.getpos())

    def handle_data(self, data):
        for _, place in self._open:
            self.texts[place] = self.texts.get(place, "") + data

    def all(self, tag: str, kind: str = "") -> list[tuple[dict[str, str | None], str]]:
        return [
            (attrs, self.texts.get(i, ""))
            for i, (name, attrs) in enumerate(self.elements)
            if name == tag and (not kind or kind in (attrs.get("class") or "").split())
        ]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def noise(generator: torch.Generator, width: int, height: int, smooth: int = 1) -> Image.Image:
    size = (height // smooth, width // smooth, 3)
    values = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def _described(k: int, settings: FeynmanKac) -> dict:
    return {
        "model": "tiny-sd3",
        "pipeline": "StableDiffusion3Pipeline",
        "reward": "ocr + 'x' <i>",
        "particles": k,
        "seed": 3,
        "settings": {
            "reward_scale": settings.reward_scale,
            "min_ess": settings.min_ess,
            "potential": "difference",
        },
        "pipeline_keywords": {"num_inference_steps": 20},
        "versions": {"torch": "2.14.1"},
        "weights": {"transformer": "0123456789abcdef"},
    }


def save(
    folder: Path,
    prompts: list[str],
    sizes: list[int],
    *,
    settings: FeynmanKac | None = None,
    previews: bool = True,
    side: int = 64,
    seed: int = 0,
    components: bool = False,
    smooth: int = 1,
) -> Path:
    """A folder as `Steered.save` writes it. sizes: particles at each score, then of the end."""
    settings = settings or FeynmanKac(reward_scale=4.0)
    g = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    b, state, scores = len(prompts), start(len(prompts), sizes[0]), []
    for i, (k, num) in enumerate(itertools.pairwise(sizes)):
        rewards = torch.rand(b, k, generator=g)
        state = weigh(state, rewards, settings, (i + 1) / len(sizes))
        before = state.log_weights
        state, ancestors, ess, chosen = resample(state, settings, g, num)
        scores.append(Score(i + 1, rewards, before, ess, ancestors, chosen))
    final = torch.rand(b, sizes[-1], generator=g)
    state = close(state, final, settings)
    files = [[f"{i:04d}-{j:02d}.png" for j in range(sizes[-1])] for i in range(b)]
    for names in files:
        for name in names:
            noise(g, side, side, smooth).save(folder / name)
    parts = {"ocr <b>": final / 2, "clip": final / 4} if components else {"ocr": final}
    results = {
        "prompts": prompts,
        "files": files,
        "rewards": final.tolist(),
        "components": {name: part.tolist() for name, part in parts.items()},
        "log_weights": state.log_weights.tolist(),
        "log_z": final_log_z(state).tolist(),
    }
    manifest = _described(sizes[0], settings) | {"prompts": prompts, "results": results}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    lineage = Lineage(20, tuple(scores)).to_json()
    if previews and scores:
        names = [f"previews-{i:04d}.webp" for i in range(b)]
        lineage["previews"] = {"files": names, "tile": [64, 64]}
        for name in names:
            sheet = noise(g, 64 * len(scores), 64 * sizes[0], smooth)
            sheet.save(folder / name, quality=80)
    (folder / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    return folder


def save_run(out: Path, prompts: list[str], sizes: list[int], compare: bool = True, **more) -> Path:
    for i, prompt in enumerate(prompts):
        folder = out / f"{i:04d}-slug"
        save(folder / "steered", [prompt], sizes, seed=i, **more)
        if compare:
            plain = FeynmanKac(reward_scale=4.0, min_ess=0.0)
            few = {"side": more.get("side", 64), "smooth": more.get("smooth", 1)}
            save(folder / "plain", [prompt], [sizes[0]], settings=plain, seed=i, **few)
    manifest = {
        "settings": {"reward": "ocr", "particles": sizes[0]},
        "machine": {"device": "cpu"},
        "prompts": [{"text": prompt, "seed": 0, "references": []} for prompt in prompts],
        "command": ["tilt", "steer", *prompts, "--reward", "ocr", "--out", "x y"],
        "versions": {"torch": "2.14.1"},
    }
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out


def results_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text("utf-8"))["results"]


def values(html: str) -> list[float]:
    return [float(attrs["value"] or "") for attrs, _ in Page(html).all("data")]
