"""The result of a steered run, and how it is saved."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Generator, Tensor

from steering.lineage import Lineage
from steering.manifest import PER_PROMPT, join, select
from steering.outputs import save
from steering.resampling import multinomial
from steering.weights import normalize

__all__ = ["Steered"]


@dataclass(frozen=True, kw_only=True)
class Steered:
    """The weighted particles of b prompts, k_final per prompt; tensors are on the CPU.

    The mean of f weighted by softmax(log_weights) estimates its expectation under the tilted law;
    `log_z` is the log of an unbiased estimate of E_p[exp(λ r)].

    Other batch sizes (max_batch, prompts_per_call, spread, a halving) use the same noise. In
    float32 they give the same images to one grey level in at most 1 % of the values, unless a
    draw of resampling lies that close to the boundary between two particles (docs/checked.md).

    If anything ends steer() early, including Ctrl-C, the exception's `finished` is the Steered of
    the finished prompts, or None. It includes prompts whose steps were finished but whose decoding
    or final scores failed: latents, no images, NaN for every number.
    """

    prompts: tuple[str, ...]
    # [prompt][particle]: a PIL image, of a video the list of its frames, or a Sound
    images: list[list[Any]]
    rewards: Tensor  # (b, k_final), of exactly these images; weights and rewards share a dtype
    components: dict[str, Tensor]  # name -> (b, k_final), if the reward has parts
    log_weights: Tensor  # (b, k_final)
    log_z: Tensor  # (b,)
    lineage: Lineage
    latents: Tensor  # (b, k_final, *shape), as the pipeline returns them
    # the same as the last step left them, which some pipelines unpack, rescale or mix with a mask
    last: Tensor
    manifest: dict[str, Any]  # settings, seed and versions that repeat the run

    @property
    def best(self) -> list[Any]:
        """The image of highest reward of each prompt; ValueError if a prompt has no images."""
        self._check_images()
        return [row[i] for row, i in zip(self.images, self.rewards.argmax(1).tolist(), strict=True)]

    def sample(self, generator: Generator) -> list[Any]:
        """Draw one image per prompt by weight: a sample of the (approximate) tilted law.

        Raises ValueError if a prompt has no images.
        """
        self._check_images()
        drawn = multinomial(normalize(self.log_weights), 1, generator).flatten().tolist()
        return [row[i] for row, i in zip(self.images, drawn, strict=True)]

    def save(self, folder: str | Path) -> Path:
        """Write every image as PNG, `manifest.json`, `lineage.json` and previews of each score.

        The manifest suffices to repeat the run, and lists the files. Each PNG holds its parameters
        as text, including all that its noise depends on: the seed, the prompt's text, how often
        that came before (its occurrence), and the particle's index. previews-0000.webp, ... hold
        small images of a prompt's particles, one column per score. `tilt.report.write` shows them.

        A video is saved as a folder of PNG frames, whose score is the recorded one, and beside it
        as an animated WebP of 16 frames a second to look at; a sound as WAV, without parameters.

        For prompts without images, whose decoding or final scores failed, only the latents are
        written: "latents" (k, *shape) in undecoded-0000.safetensors, ..., listed in the manifest.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = [i for i, row in enumerate(self.images) if row]
        if len(whole) == len(self.images):
            return self._save(folder, {})
        late = [i for i, row in enumerate(self.images) if not row]
        names = [f"undecoded-{i:04d}.safetensors" for i in late]
        for i, name in zip(late, names, strict=True):
            save_file({"latents": self.latents[i].contiguous()}, folder / name)
        beside = {"undecoded": {"prompts": [self.prompts[i] for i in late], "files": names}}
        if whole:
            return self._some(whole)._save(folder, beside)
        _write_json(folder / "manifest.json", self.manifest | beside)
        _write_json(folder / "lineage.json", self.lineage.to_json())
        return folder

    def _check_images(self) -> None:
        late = [prompt for prompt, row in zip(self.prompts, self.images, strict=True) if not row]
        if late:
            raise ValueError(
                f"{late[0]!r:.60} has no images, because decoding or scoring them failed; its "
                "latents are in Steered.latents."
            )

    def _some(self, indices: Sequence[int]) -> "Steered":
        """Return the result for some of the prompts."""
        rows = torch.tensor(indices, dtype=torch.int64)
        return Steered(
            prompts=tuple(self.prompts[i] for i in indices),
            images=[self.images[i] for i in indices],
            rewards=self.rewards[rows],
            components={name: part[rows] for name, part in self.components.items()},
            log_weights=self.log_weights[rows],
            log_z=self.log_z[rows],
            lineage=self.lineage.prompts(indices),
            latents=self.latents[rows],
            last=self.last[rows],
            manifest=select(self.manifest, indices),
        )

    def _save(self, folder: Path, beside: dict[str, Any]) -> Path:
        files = [
            [
                save(folder, f"{i:04d}-{j:02d}", image, self._about(i, j))
                for j, image in enumerate(row)
            ]
            for i, row in enumerate(self.images)
        ]
        first = self.images[0][0]
        results = {
            "prompts": list(self.prompts),
            "files": files,
            "frames": len(first) if isinstance(first, list) else None,  # per video
            "rewards": self.rewards.tolist(),
            "components": {name: part.tolist() for name, part in self.components.items()},
            "log_weights": self.log_weights.tolist(),
            "log_z": self.log_z.tolist(),
        }
        _write_json(folder / "manifest.json", self.manifest | beside | {"results": results})
        _write_json(folder / "lineage.json", self.lineage.to_json() | self._save_previews(folder))
        return folder

    def _save_previews(self, folder: Path) -> dict[str, Any]:
        """Write the previews and return their entry in lineage.json, empty if there are none."""
        sheets = [sheet for i in range(len(self.prompts)) if (sheet := _sheet(self.lineage, i))]
        if not sheets:
            return {}
        names = [f"previews-{i:04d}.webp" for i in range(len(sheets))]
        for name, (sheet, _) in zip(names, sheets, strict=True):
            sheet.save(folder / name, quality=75, method=4)
        return {"previews": {"files": names, "tile": list(sheets[0][1])}}

    def _about(self, prompt: int, particle: int) -> str:
        """Return what repeats a particle and tells its reward, as JSON."""
        parts = {name: part[prompt, particle].item() for name, part in self.components.items()}
        own = select(self.manifest, [prompt])
        about = {
            "prompt": self.prompts[prompt],
            "occurrence": own["occurrences"][0],
            "references": own["references"][0] if own["references"] else None,
            "particle": particle,
            "reward": self.rewards[prompt, particle].item(),
            "components": parts,
            "log_weight": self.log_weights[prompt, particle].item(),
            "run": {name: value for name, value in own.items() if name not in PER_PROMPT},
        }
        return json.dumps(about, ensure_ascii=False)

    @staticmethod
    def join(parts: Sequence["Steered"]) -> "Steered":
        """Concatenate the results of several runs with the same settings."""
        first = parts[0]
        names = first.components
        return Steered(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            images=[row for part in parts for row in part.images],
            rewards=torch.cat([part.rewards for part in parts]),
            components={n: torch.cat([_component(part, n) for part in parts]) for n in names},
            log_weights=torch.cat([part.log_weights for part in parts]),
            log_z=torch.cat([part.log_z for part in parts]),
            lineage=Lineage.join([part.lineage for part in parts]),
            latents=torch.cat([part.latents for part in parts]),
            last=torch.cat([part.last for part in parts]),
            manifest=join([part.manifest for part in parts]),
        )


def _component(part: Steered, name: str) -> Tensor:
    """Return a component (b, k_final), NaN if the images could not be scored."""
    return part.components.get(name, torch.full_like(part.rewards, torch.nan))


def _sheet(lineage: Lineage, prompt: int) -> tuple[Image.Image, tuple[int, int]] | None:
    """Return one prompt's previews (a column per score, a row per particle) and a tile's size."""
    columns = [score.previews[prompt] for score in lineage.scores if score.previews is not None]
    if not columns:
        return None
    height, width = columns[0].shape[2:]
    sheet = torch.zeros(len(columns[0]) * height, len(columns) * width, 3, dtype=torch.uint8)
    for i, tiles in enumerate(columns):  # (k, 3, h, w)
        column = tiles.permute(0, 2, 3, 1).flatten(0, 1)
        sheet[: len(column), i * width : (i + 1) * width] = column
    return Image.fromarray(sheet.numpy()), (width, height)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
