"""Compare rewards with each other or with human preferences, and images in a tournament."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewards
from finetune.ranges import GIVEN, NAME, SEED, TEXTS, optional, setting
from rewards.backends.local_vlm import LocalVlm
from rewards.best_of_n import choice_results, read_choices, score_choices
from rewards.compare import agreement, kendall_tau, starc_distance
from rewards.models.vlm_judge import JudgeReward
from rewards.samples import Sample, open_picture, read_samples
from rewards.tournament import tournament
from tilt import score_table
from tilt.exit_status import of_command
from tilt.loading import pick_device
from tilt.main import dispatch
from tilt.options import Options
from tilt.pairwise_judge import SideBySideJudge
from tilt.score_summary import FIGURES
from tilt.statistics import bootstrap, win_rate

__all__ = ["OPTIONS", "agreement_report", "main", "preference_report", "ranked", "win_report"]

Rows = Sequence[Mapping[str, Any]]


@dataclass
class Agreement:
    """Measure how much the columns of a table of scores agree."""

    table: str = setting("", GIVEN, "table of scores")
    columns: list[str] = setting(list, TEXTS, "columns to compare; by default all scores")

    def report(self) -> str:
        return agreement_report(_table(self.table), self.columns)


@dataclass
class Wins:
    """Measure how often one table's images beat another's: the i-th images of each prompt.

    Both tables should list the images of the same seeds in the same order.
    """

    table: str = setting("", GIVEN, "table of scores")
    baseline: str = setting("", GIVEN, "table to compare it with")
    column: str = setting("reward", NAME, "column to compare")
    seed: int = setting(0, SEED, "seed of the bootstrap")

    def report(self) -> str:
        return win_report(_table(self.table), _table(self.baseline), self.column, self.seed)


@dataclass
class Preferences:
    """Measure how often a reward prefers what people prefer: its best-of-n accuracy."""

    file: str = setting("", GIVEN, "preference file, .jsonl")
    reward: str = setting("", GIVEN, "spec of the reward")
    device: str = setting("auto", NAME, "auto, cpu, cuda or mps")

    def report(self) -> str:
        device = pick_device(self.device)
        reward = rewards.load(self.reward, device, imports=True)
        return preference_report(Path(self.file), reward, device)


@dataclass
class Tournament:
    """Rank the images of each prompt with a vision-language model that compares pairs."""

    images: str = setting("", GIVEN, "folder of images, or .jsonl file")
    prompt: str | None = setting(None, optional(NAME), "prompt of images without a recorded prompt")
    judge: str = setting("", GIVEN, "spec of the judge, judge(url=..., model=...)")
    device: str = setting("auto", NAME, "of a local judge: auto, cpu, cuda or mps")

    def report(self) -> str:
        samples = read_samples(Path(self.images), self.prompt, exclude=FIGURES)
        judge, lines = _judge(self.judge, pick_device(self.device)), []
        for prompt, paths in ranked(samples, judge).items():
            lines += [prompt, *(f"  {i}. {path}" for i, path in enumerate(paths, 1))]
        return "\n".join(lines)


EXAMPLES = {
    Agreement: "--table scores.csv --columns clip ocr",
    Wins: "--table tuned.csv --baseline base.csv --column reward",
    Preferences: """--file choices.jsonl --reward "clip(tiny)"

a preference file has one object per line; paths are relative to the file:
  {"prompt": "a red circle", "chosen": "a.png", "rejected": ["b.png"]}""",
    Tournament: '--images out/demo --judge "judge(url=URL, model=NAME)"',
}
OPTIONS = {
    name: Options(
        f"tilt compare {name}", kind, kind.__doc__ or "", f"example:\n  tilt compare {name} {words}"
    )
    for kind, words in EXAMPLES.items()
    for name in [kind.__name__.lower()]
}


def main(argv: Sequence[str]) -> int | None:
    """Return exit status 0, or 2 for refused input."""
    about = {name: options.about for name, options in OPTIONS.items()}
    return dispatch("tilt compare", about, argv, run)


def run(name: str, argv: Sequence[str]) -> int:
    """Print one comparison; returns the exit status like `main`."""
    return of_command(OPTIONS[name], argv, lambda settings: print(settings.report()))


def _table(path: str) -> list[dict[str, Any]]:
    rows = score_table.read_table(Path(path))
    if not rows:
        raise ValueError(f"{path} has no rows; score some images first")
    return rows


def _judge(spec: str, device: torch.device) -> JudgeReward:
    found = rewards.load(spec, imports=True).parts[0].reward
    if not isinstance(found, JudgeReward):
        raise ValueError(
            f"{spec!r} is not a judge; write judge(url=..., model=...) or judge(FOLDER)"
        )
    if isinstance(found.model, LocalVlm):
        found.model.to(device)
    return found


def agreement_report(rows: Rows, columns: Sequence[str] = ()) -> str:
    """Report how much each two score columns of a table agree, with one line per pair.

    Images without one of the two scores are left out of that pair. The figures, explained in
    `rewards.compare`, are Kendall's τ over all images, and within prompts τ, the share of
    concordant pairs and the STARC distance.
    """
    names = list(columns) or [name for name in rows[0] if name not in score_table.TEXTS]
    if len(names) < 2:
        raise ValueError(f"a comparison needs two columns or more, but there is only {names}")
    width = max(len(f"{a}, {b}") for a, b in combinations(names, 2))
    lines = [f"{'':{width}}  images     tau  tau within  concordant  STARC"]
    for first, second in combinations(names, 2):
        a, b = _column(rows, first), _column(rows, second)
        kept = a.isfinite() & b.isfinite()
        prompts = [row["prompt"] for row, keep in zip(rows, kept, strict=True) if keep]
        a, b = a[kept], b[kept]
        within = agreement(a, b, prompts)
        cells = f"{kendall_tau(a, b):7.3f} {within.tau:11.3f} {within.concordant:11.3f}"
        distance = starc_distance(a, b, prompts)
        lines.append(f"{f'{first}, {second}':{width}} {len(a):7d} {cells} {distance:6.3f}")
    return "\n".join(lines)


def win_report(rows: Rows, baseline: Rows, column: str, seed: int = 0) -> str:
    """Report how often the images of one table beat those of another in a column.

    The i-th image of a prompt is compared with the i-th image of the same prompt.
    """
    ours, theirs = (_by_turn(table) for table in (rows, baseline))
    if set(ours) != set(theirs):
        missing = next(iter(set(ours) ^ set(theirs)))
        raise ValueError(
            "the tables have different images: image "
            f"{missing[1] + 1} of the prompt {missing[0]!r} is in only one of them"
        )
    a, b = (_column([table[key] for key in ours], column) for table in (ours, theirs))
    prompts = [prompt for prompt, _ in ours]
    won = win_rate(a, b, prompts, torch.Generator().manual_seed(seed))
    gain = bootstrap(a - b, torch.Generator().manual_seed(seed))
    return (
        f"{len(ours)} pairs of {len(set(prompts))} prompts, 95 % intervals\n"
        f"wins        {won.text()} over prompts\n"
        f"difference  {gain.text('+')} over pairs"
    )


def preference_report(file: Path, reward: Any, device: torch.device | None = None) -> str:
    """Report the best-of-n accuracy of a reward, with one line per subset of the file."""
    choices = read_choices(file)
    reward.check([choice.prompt for choice in choices])
    results = choice_results(choices, score_choices(reward, choices, file.parent, device))
    counts = {name: 0 for name in results}
    for choice in choices:
        counts["ties" if choice.subset.lower() == "ties" else choice.subset] += 1
    return "\n".join(
        f"{name or 'all'}: {value:.4f} of {counts[name]} prompts" for name, value in results.items()
    )


def ranked(samples: Sequence[Sample], judge: JudgeReward) -> dict[str, list[Path]]:
    """Rank the images of each prompt that has several, best first, in a tournament."""
    groups: dict[str, list[Path]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample.image)
    found = {}
    for prompt, paths in groups.items():
        if len(paths) > 1:
            judge.check([prompt])
            pictures = [open_picture(path) for path in paths]
            ranks = tournament(SideBySideJudge(judge.model, pictures, prompt), len(paths)).ranks
            found[prompt] = [paths[i] for i in ranks.argsort().tolist()]
    if not found:
        raise ValueError("a tournament needs two images or more of a prompt, but no prompt has two")
    return found


def _column(rows: Rows, name: str) -> Tensor:
    known = [key for key in rows[0] if key not in score_table.TEXTS]
    if name not in known:
        raise ValueError(f"the table has no column {name!r}; it has {known}")
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def _by_turn(rows: Rows) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Return {(prompt, number of earlier images of that prompt): row}."""
    seen: dict[str, int] = {}
    found = {}
    for row in rows:
        turn = seen.get(row["prompt"], 0)
        seen[row["prompt"]] = turn + 1
        found[row["prompt"], turn] = row
    return found
