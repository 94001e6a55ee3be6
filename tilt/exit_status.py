"""Running of a command with its settings, and its exit status."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tilt.options import Options
from tilt.processes import Stopped
from tilt.wording import one_line

__all__ = ["check_folder", "of_command", "of_run"]


def of_command(options: Options, argv: Sequence[str], work: Callable[[Any], None]) -> int:
    """Read a command's settings and run it; return exit status 0, 2 if refused or an OSError."""
    try:
        work(options.read(argv))
    except (ValueError, OSError) as error:
        # only the first word, since a reward's arguments may have the names of options
        flags, said = options.flags(), one_line(error)
        said = re.sub(r"^(\w+)(?==| is )", lambda name: flags.get(name[1], name[1]), said)
        print(f"{options.name}: {said}", file=sys.stderr)
        return 2
    return 0


def of_run(
    options: Options, argv: Sequence[str], run: Callable[[Any], None], kept: str, pattern: str
) -> int:
    """Read a command's settings and run it.

    Returns the exit status 0, 2 for refused input, 1 if the command failed or another process of
    the run has ended, and 130 on Ctrl-C. kept: says what is not lost, for the message, if `pattern`
    matches a file in the folder `out`.
    """
    settings: Any = None

    def said(error: BaseException) -> str:
        """Return the message in words of options; errors of reading settings already are."""
        return options.in_words(one_line(error)) if settings else one_line(error)

    def left() -> str:
        there = settings is not None and any(Path(settings.out).glob(pattern))
        return kept if there else "nothing is kept yet"

    name = options.name
    try:
        settings = options.read(argv)
        check_folder(settings.out)
        run(settings)
    except ValueError as error:
        print(f"{name}: {said(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, SafetensorError) as error:  # the last also for a full disk
        print(f"{name}: {said(error)}; {left()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as cut:
        died = isinstance(cut, Stopped)
        why = "another process ended" if died else "interrupted"
        print(f"{name}: {why}; {left()}: repeat with --resume", file=sys.stderr)
        return 1 if died else 130
    return 0


def check_folder(out: str) -> None:
    """Raise ValueError for a folder that cannot be made; the command itself refuses ""."""
    if out and not out.strip():
        raise ValueError(f"out is {out!r}; name a folder")
    folder = Path(out)
    for place in (folder, *folder.absolute().parents):
        try:
            place.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"out={out!r:.80} cannot be made: {error.strerror}") from None
        if place != folder and not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"out={out!r:.80} cannot be made: {place} takes no new folders")
        return
