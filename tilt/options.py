"""What the scripts with --options share: the parser, and the kinds of values."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "COUNT",
    "NUMBER",
    "PORT",
    "SEED",
    "Number",
    "Parser",
    "Whole",
    "check_words",
    "ended",
    "in_words",
    "one_line",
    "path",
]


class Parser(argparse.ArgumentParser):
    """Mistakes are a ValueError, for the script to say in its way."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (--help lists what there is)")


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`, None without an end, as the type of an option."""

    low: int = 1
    high: int | None = None

    def __call__(self, text: str) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isascii() and digits.isdecimal() and len(text) < 99 else None
        if value is None or value < self.low or (self.high is not None and value > self.high):
            low, high = self.low, self.high
            above = value is not None and value > low and high is not None
            wanted = f", {low} to {high}" if above else f" of {low} or more"
            raise argparse.ArgumentTypeError(f"{text!r:.80}: pass a whole number{wanted}")
        return value


@dataclass(frozen=True)
class Number:
    """A finite number, as the type of an option."""

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r:.80}: pass a finite number")
        return value


COUNT, NUMBER, SEED, PORT = Whole(), Number(), Whole(0, 2**63 - 1), Whole(1, 65535)


def path(text: str) -> Path:
    """A file or a folder, as the type of an option; "" would be the present folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: name a file or a folder")
    return Path(text)


def check_words(words: Sequence[str]) -> None:
    """Raise ValueError for a word of the command line that is not UTF-8: nothing could keep it."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise ValueError(f"{word!r:.80} is not UTF-8: write it as UTF-8")


def one_line(error: BaseException | str) -> str:
    """What an error says, as one line of words that can be read."""
    text = " ".join(str(error).split())
    return re.sub(r"\S{200,}", lambda word: f"{word[0][:80]}...{word[0][-20:]}", text)


def in_words(message: str, options: Mapping[str, str]) -> str:
    """A library's sentence for those who wrote a command: its arguments as their options.

    options: argument -> option. An argument is told by an underscore in it, by "=" behind it, or by
    "is" behind it where it begins the sentence.
    """
    names = "|".join(sorted(options, key=len, reverse=True))
    message = re.sub(rf"FeynmanKac\(({names})=\.\.\.\)", r"\1=", message)

    def option(found: re.Match[str]) -> str:
        name, equals = found["name"], found["equals"] or ""
        begins = found.start() == 0 and message.startswith(f"{name} is ")
        if not (equals or begins or "_" in name):
            return found[0]
        return options[name] + (" " if found["value"] is not None else "")

    pattern = rf"(?<![\w.-])(?P<name>{names})\b(?:(?P<equals>=)(?P<value>(?=[^\s,;:.)]))?)?"
    return re.sub(pattern, option, message)


def ended(name: str, work: Callable[[], None]) -> int:
    """Run a command that keeps nothing; exit status 0, or 2 for what it refused."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
