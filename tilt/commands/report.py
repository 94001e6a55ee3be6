"""Write report.html of what lies in a folder: a steered run, one saved result, or a training."""

from __future__ import annotations

from collections.abc import Sequence

from tilt import report
from tilt.options import Parser, ended, path

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence."""
    p = Parser(prog="tilt report", description=__doc__, allow_abbrev=False)
    p.add_argument("folder", type=path, help="the folder of a run, or what Steered.save() wrote")
    return ended("tilt report", lambda: print(report.write(p.parse_args(argv).folder)))
