"""Write report.html of what lies in a folder: a steered run, one saved result, or a training."""

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
    """What to write a report of."""

    folder: str = setting("", GIVEN, "the folder of a run, or what Steered.save() wrote")


OPTIONS = Options("tilt report", Report, __doc__ or "", positional="folder")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence."""
    return of_command(OPTIONS, argv, lambda settings: print(report.write(settings.folder)))
