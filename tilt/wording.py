"""The wording of what a command says: an error in one line, options for arguments, counts."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["counted", "in_words", "one_line"]


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
        if not (equals or begins or "_" in name or "." in name):
            return found[0]
        return options[name] + (" " if found["value"] is not None else "")

    pattern = rf"(?<![\w.-])(?P<name>{names})\b(?:(?P<equals>=)(?P<value>(?=[^\s,;:.)]))?)?"
    return re.sub(pattern, option, message)


def counted(count: int, noun: str) -> str:
    """As in "1 prompt" and "2 prompts"."""
    return f"{count} {noun}{'s' * (count != 1)}"
