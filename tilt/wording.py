"""The wording of a command's messages: errors in one line, options for arguments, counts."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["counted", "in_words", "one_line"]


def one_line(error: BaseException | str) -> str:
    """Return an error's message as one readable line, with very long words shortened."""
    text = " ".join(str(error).split())
    return re.sub(r"\S{200,}", lambda word: f"{word[0][:80]}...{word[0][-20:]}", text)


def in_words(message: str, options: Mapping[str, str]) -> str:
    """Return a library's message with its arguments replaced by the options of a command.

    options: argument -> option. A word is taken for an argument if it has an underscore or a dot,
    if "=" follows it, or if it begins the message and "is" follows it.
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
    """Return a count with its noun, such as "1 prompt" and "2 prompts"."""
    return f"{count} {noun}{'s' * (count != 1)}"
