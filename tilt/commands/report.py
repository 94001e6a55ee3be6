"""Write report.html into the folder of a steered run, a saved result or a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.ranges import GIVEN, setting
from tilt import report
from tilt.exit_status import of_command
from tilt.options import Options

__all__ = ["OPTIONS", "main"]


@dataclass
class Report:
    """The subject of the report."""

    folder: str = setting("", GIVEN, "folder of a run, or one that Steered.save() wrote")


OPTIONS = Options("tilt report", Report, __doc__ or "", positional="folder")


def main(argv: Sequence[str]) -> int:
    """Return exit status 0, or 2 for refused input."""
    return of_command(OPTIONS, argv, lambda settings: print(report.write(settings.folder)))
