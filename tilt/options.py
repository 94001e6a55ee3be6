"""Options of commands, generated from a dataclass of settings, and reading of settings from YAML.

`Options` parses a command line; the help of an option is declared in the field that it sets.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import config
from finetune.ranges import GIVEN
from tilt.wording import in_words

__all__ = ["Options"]


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for invalid words, so that the command can print it."""

    def error(self, message: str) -> Any:
        hint = "--help lists the options"
        if "expected one argument" in message:
            hint = "write a value that begins with a dash as --option=VALUE"
        raise ValueError(f"{message} ({hint})")


@dataclass(frozen=True)
class _Option:
    """The option of one field of the settings."""

    path: str  # "check.every"
    flag: str  # "--check.every"; "PROMPTS" for the positional argument
    group: str  # its heading in the help
    hint: Any
    default: Any
    help: str
    choices: Sequence[str] = ()
    is_required: bool = False

    @property
    def usage(self) -> str:
        """How a positional option is shown: required ones without brackets."""
        name = f"{self.flag}{' ...' * self.is_list}"
        return name if self.is_required else f"[{name}]"

    @property
    def is_text(self) -> bool:
        return self.hint in (str, str | None)

    @property
    def is_free(self) -> bool:
        """Whether it accepts any key, such as keywords of a call."""
        return typing.get_origin(self.hint) is dict

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is list

    def add_to(self, group: Any) -> None:
        """Declare it to argparse, which returns the value as text, unconverted."""
        unsaid = self.default is False or self.default in (None, "", [], (), {})
        said = self.help if unsaid else f"{self.help} (default: {_shown(self.default)})"
        said = said.replace("%", "%%")
        if self.flag[0] != "-":
            many = "*" if self.is_list else "?"
            group.add_argument(self.path, nargs=many, metavar=self.flag, help=said)
        elif self.hint is bool:
            act = argparse.BooleanOptionalAction
            group.add_argument(self.flag, dest=self.path, action=act, help=said)
        elif self.is_free:
            group.add_argument(f"{self.flag}.NAME", dest=self.path, metavar="VALUE", help=said)
        else:
            shown = f"{{{','.join(filter(None, self.choices))}}}" if self.choices else "VALUE"
            many = "+" if self.is_list else None
            group.add_argument(self.flag, dest=self.path, nargs=many, metavar=shown, help=said)

    def word(self, given: Any) -> str:
        """Return a given value as `path=value` in YAML."""
        if self.default == "" and self.flag[0] == "-" and not given.strip():
            raise ValueError(
                f"{self.flag} is {given!r}; give it a value, or leave it out (a value in the file "
                "of --config can be deleted there)"
            )
        if self.is_text or self.is_list:  # literal text, without OmegaConf's interpolation
            return f"{self.path}={json.dumps(given, ensure_ascii=False)}".replace("${", "\\\\${")
        if typing.get_origin(self.hint) is tuple:
            return f"{self.path}={self._numbers(given)}"
        if not isinstance(given, bool):
            _check_digits(self.flag, given)
        return f"{self.path}={str(given).lower() if isinstance(given, bool) else given}"

    def _numbers(self, given: str) -> list[Any]:
        kind, *others = typing.get_args(self.hint)
        found, count = [], None if others == [...] else len(others) + 1
        with contextlib.suppress(ValueError):
            found = [kind(part) for part in given.split(",")]
        if not found or count not in (None, len(found)):
            what = " ".join([str(count)] * bool(count) + ["whole"] * (kind is int) + ["numbers"])
            raise ValueError(f"{self.flag} is {given!r:.80} but must be {what} separated by commas")
        return found


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class Options:
    """The options of a command, generated from a dataclass of settings, and their parsing.

    The field `every` of the group `check` becomes the option `--check.every`, with a dash for each
    underscore; its help and its range are declared in the field (`finetune.ranges.setting`). Fields
    of a group with the metadata "flat" have options without the group's name. A field that is a
    dict accepts any key, as in `--call.height 512`. The YAML file given by --config contains
    settings by field name; options take precedence over it.

    positional: the field, of type text or list of texts, that gets the positional arguments.
    """

    name: str
    kind: type
    about: str
    examples: str = ""
    positional: str = ""

    def read(self, argv: Sequence[str]) -> Any:
        """Parse the settings; raises ValueError, which names options, for invalid words."""
        _check_words(argv)
        file, words = self._words(argv)
        try:
            return config.read(self.kind, file, words)
        except ValueError as error:
            raise ValueError(self.in_words(str(error))) from None

    def in_words(self, message: str) -> str:
        """Return a library's message with its arguments replaced by the options that set them."""
        flags = self.flags()
        names = {flag[2:].replace("-", "_"): flag for flag in flags.values() if flag[0] == "-"}
        said = in_words(message, names | flags)
        for option in self._options():
            if option.hint is bool:
                said = said.replace(f"{option.flag} true", option.flag)
            if option.is_free:
                key = rf"(?<![\w.-]){re.escape(option.path)}\.(\w+)"
                said = re.sub(key, lambda m, o=option: f"{o.flag}.{_dashed(m[1])}", said)
        return said

    def flags(self) -> dict[str, str]:
        """Return {path of a field: its option}."""
        return {option.path: option.flag for option in self._options()}

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser, which also prints the help."""
        every = self._options()
        rest = next((o for o in every if o.path == self.positional), None)
        parser = _Parser(
            prog=self.name,
            usage=f"%(prog)s [OPTIONS] {rest.usage if rest else ''}".rstrip(),
            description=self.about,
            epilog=self.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        said = "YAML file of settings; options take precedence over it"
        parser.add_argument("--config", metavar="FILE", help=said)
        groups: dict[str, Any] = {"": parser}
        for option in every:
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            option.add_to(groups[option.group])
        return parser

    def _options(self) -> list[_Option]:
        return [
            replace(option, flag=option.path.upper()) if option.path == self.positional else option
            for option in _options(self.kind)
        ]

    def _words(self, argv: Sequence[str]) -> tuple[Path | None, list[str]]:
        options = {option.path: option for option in self._options()}
        free = [option for option in options.values() if option.is_free]
        rest, words = _keywords(argv, free)
        parser = self.parser()
        args, unknown = parser.parse_known_intermixed_args(rest)
        for word in unknown:
            raise ValueError(_no_option(word, parser))
        given = vars(args)
        file = given.pop("config", None)
        if file is not None and not file.strip():
            raise ValueError(f"--config is {file!r}; name a YAML file")
        for name, value in given.items():
            if value != [] and not options[name].is_free:
                words.append(options[name].word(value))
        return file and Path(file), words


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _options(kind: type, prefix: str = "", flat: bool = True, group: str = "") -> Iterator[_Option]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, inner = f"{prefix}{field.name}", field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            lends = field.metadata.get("flat", False)
            heading = field.metadata.get("help", name)
            yield from _options(inner, f"{name}.", lends, heading)
            continue
        default = inner() if callable(inner) else field.default
        shown = field.name if flat else name
        flag = f"--{_dashed(shown)}"
        heading = field.metadata.get("heading", group)
        said = field.metadata.get("help", "")
        allowed = field.metadata.get("range")
        if allowed and "number" in allowed.said:
            said += f"; {allowed.said.removesuffix(', or null')}"
        choices = allowed.choices if allowed else ()
        required = allowed is GIVEN
        yield _Option(name, flag, heading, hints[field.name], default, said, choices, required)


def _keywords(argv: Sequence[str], free: Sequence[_Option]) -> tuple[list[str], list[str]]:
    """Split off words such as `--call.height 512`; returns the rest, and `call.height=512`."""
    rest, words, left = [], [], list(argv)
    while left:
        word = left.pop(0)
        option = next((o for o in free if word.startswith(f"{o.flag}.")), None)
        if option is None:
            rest.append(word)
            continue
        flag, equals, value = word.partition("=")
        if not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(
                    f"{flag:.80} has no value; write one after it, or {flag:.80}=VALUE if it "
                    "begins with --"
                )
            value = left.pop(0)
        _check_digits(flag, value)
        key = flag.removeprefix(f"{option.flag}.").replace("-", "_")
        words.append(f"{option.path}.{key}={value}")
    return rest, words


# Numbers that YAML 1.1 reads otherwise than they look: 010 is 8, 0x10 is 16, 1:30 is 90.
_NOT_DECIMAL = re.compile(r"[-+]?(0[0-9xXbBoO]|[0-9]+[_:])[0-9a-fA-F_:.]*")


def _check_digits(flag: str, given: str) -> None:
    """Raise ValueError for a number that is not written in plain decimal digits."""
    if _NOT_DECIMAL.fullmatch(given.strip()):
        raise ValueError(
            f"{flag:.80} is {given!r:.80}; write a number in decimal digits, without leading zeros"
            + ", or a text in double quotes" * ("." in flag)
        )


def _no_option(word: str, parser: argparse.ArgumentParser) -> str:
    """Return the message for a word that is not an option."""
    known = parser._option_string_actions
    name, equals, value = word.partition("=")
    if not word.startswith("-"):
        flag = "--" + name.replace("_", "-")
        hint = f"write {flag} {value}" if equals and flag in known else "--help lists the options"
        return f"{word!r:.80} belongs to no option: {hint}"
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the options"
    return f"there is no option {word:.80}: {hint}"


def _check_words(words: Sequence[str]) -> None:
    """Raise ValueError for a word that is not UTF-8, because no file could store it."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise ValueError(f"{word!r:.80} is not UTF-8: write it as UTF-8")
