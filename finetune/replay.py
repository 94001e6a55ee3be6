"""A replay buffer for the training of a critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Parts", "Replay"]

Parts = tuple[Tensor, ...]


class Replay:
    """A uniform sample of `size` of all rows that were ever added (Vitter 1985, algorithm R).

    A row is a prompt and its tensors, on the CPU. A critic that forgets old samples lets the
    generator cycle between them.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.rows: list[tuple[str, Parts]] = []

    def add(
        self, parts: Sequence[Tensor], prompts: Sequence[str], generator: torch.Generator
    ) -> None:
        """Add n rows of tensors (n, ...) and their prompts."""
        for i, prompt in enumerate(prompts):
            self.seen += 1
            slot = self.seen - 1
            if slot >= self.size:
                slot = int(torch.randint(self.seen, (1,), generator=generator))
            if slot < self.size:
                row = (prompt, tuple(part[i].detach().cpu().clone() for part in parts))
                self.rows[slot : slot + 1] = [row]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Parts, list[str]]:
        """Draw up to `count` different rows: tensors (m, ...) and m prompts; () if empty."""
        order = torch.randperm(len(self.rows), generator=generator)[:count].tolist()
        rows = [self.rows[i] for i in order]
        parts = zip(*(parts for _, parts in rows), strict=True)
        return tuple(torch.stack(part) for part in parts), [prompt for prompt, _ in rows]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "rows": list(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.rows = int(state["seen"]), list(state["rows"])
