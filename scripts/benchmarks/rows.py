"""Rows of results in a JSON-lines file, which a second call completes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Rows"]


class Rows(list[dict[str, Any]]):
    """The rows of a file, with a method that adds one to both."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        super().__init__(json.loads(line) for line in lines)

    def has(self, values: Mapping[str, Any]) -> bool:
        """Whether a row has these values."""
        return any(all(row[name] == value for name, value in values.items()) for row in self)

    def keep(self, row: dict[str, Any]) -> None:
        """Append a row, also to the file."""
        self.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
