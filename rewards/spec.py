"""Reading and writing of the text form of a reward, ``clip + 0.5*ocr(mode=strict)``.

    sum    = [sign] term { sign term }
    term   = [alias "="] [number "*"] [alias "="] call ["*" number]     (one alias, one weight)
    call   = name ["(" [argument {"," argument}] ")"]
           | aggregator "(" sum {"," sum} {"," name "=" value} ")"
    argument = [name "="] value
    name   = identifier | module ":" attribute | "<" text ">"
    value  = number | true | false | none | word | quoted

A word holds letters, digits and ``_ . : / ~ + -`` (so ``ViT-B-32/laion2b_s34b_b79k`` and
``random:0`` need no quotes); anything else is quoted, '...' or "...", with backslash escapes.
A missing weight is 1; a component of weight 0 is evaluated and reported but not added. Two
components of one name need aliases: ``a=clip(tiny) + b=clip(tiny, scale=logit)``.

``critic:FOLDER`` by itself is ``critic(FOLDER)``.

A name in <> belongs to a function or an object that cannot be imported; it can be parsed, but not
loaded. Which names a text may use depends on whether it is trusted, see `rewards.catalogue`.

The names in AGGREGATORS take sums and combine them into one score, ``min(clip, 0.5*ocr)`` or
``lcb(clip + 0.3*ocr, aesthetic, kappa=2)``; their options come last. They nest at most 20 deep.
A text has at most 20,000 characters, and a number at most 64 bits.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

__all__ = [
    "AGGREGATORS",
    "Call",
    "Term",
    "Value",
    "aggregator",
    "chosen",
    "format_terms",
    "parse",
    "written",
]

Value = str | int | float | bool | None
Named = tuple[tuple[str, Value], ...]

NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
PATH = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
NAME = rf"{PATH}:{PATH}|<[^<>]*>|[^\W\d]\w*"
DEEPEST = 20  # nested aggregators; far below the recursion limit of Python
LONGEST = 20_000  # characters
LARGEST = 2**63  # exclusive limit of integers
WORD = r"[\w.:/~+-]+"
# "-" is a sign outside parentheses; inside it may belong to a word
OUTSIDE = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<word>{NAME})|(?P<mark>[-+*=(),]))")
INSIDE = re.compile(rf"\s*(?:(?P<quoted>{QUOTED})|(?P<word>{WORD})|(?P<mark>[=,)]))")
BRACKET = re.compile(r"\s*\(")
SIGN = re.compile(r"\s*[+-]")
OPTION = re.compile(r"\s*([^\W\d]\w*)\s*=")
LONE_VALUE = re.compile(rf"\s*(?:{QUOTED}|[+-]?{NUMBER}|true|false|none)\s*[,)]")
SIGNED = re.compile(rf"[+-]?{NUMBER}")
LITERALS: dict[str, Value] = {"true": True, "false": False, "none": None}

# name -> (module and function in rewards.algebra, description); the keywords of the function are
# the options of the name
AGGREGATORS = {
    "augmented": (
        "augment.augmented",
        "mean over random crops, colours and noise",
    ),
    "calibrated": ("calibrate.calibrated", "score on the scale of a reference sample"),
    "clip_above": ("shape.clip_above", "score with an upper limit"),
    "delta": ("shape.delta", "score minus that of the reference image"),
    "harmonic": ("aggregate.harmonic", "harmonic mean of scores scaled to [0, 1]"),
    "lcb": ("aggregate.lcb", "mean minus kappa standard deviations"),
    "log_sigmoid": ("aggregate.log_sigmoid", "sum of log sigmoids, a logical and"),
    "mean": ("aggregate.mean", "mean"),
    "median": ("aggregate.median", "median"),
    "min": ("aggregate.minimum", "minimum"),
    "par": ("shape.par", "probability of being preferred to the reference"),
    "uncertainty": ("aggregate.uncertainty", "mean, reduced where the scores disagree"),
}


@dataclass(frozen=True)
class Call:
    """A reward's name and its arguments as written: positional, then named.

    The positional arguments of an aggregator are in `sums`, and `args` is empty.
    """

    name: str
    args: tuple[Value, ...] = ()
    kwargs: Named = ()
    sums: tuple[tuple[Term, ...], ...] = ()

    def __str__(self) -> str:
        items = [format_terms(terms) for terms in self.sums]
        items += [_format(value) for value in self.args]
        items += [f"{key}={_format(value)}" for key, value in self.kwargs]
        return self.name + (f"({', '.join(items)})" if items else "")


@dataclass(frozen=True)
class Term:
    """One weighted component; `alias`, if not "", is the name under which it is reported."""

    call: Call
    weight: float = 1.0
    alias: str = ""


def parse(text: str) -> tuple[Term, ...]:
    """Return the terms of a spec; raises ValueError if it cannot be parsed."""
    if isinstance(text, str) and text.startswith("critic:"):
        return (Term(Call("critic", (text.removeprefix("critic:"),))),)
    return _Parser(text).whole()


def format_terms(terms: tuple[Term, ...]) -> str:
    """Return the spec of some terms, from which `parse` restores them."""
    text = ""
    for i, term in enumerate(terms):
        sign = "-" if term.weight < 0 else "+"
        text += f" {sign} " if i else sign.strip("+")
        text += f"{term.alias}=" if term.alias else ""
        size = abs(term.weight)
        text += "" if size == 1 else f"{_number(size)}*"
        text += str(term.call)
    return text


def aggregator(name: str) -> tuple[Callable[..., Any], dict[str, inspect.Parameter]]:
    """Return the function of a name in AGGREGATORS, and its options."""
    module, _, attribute = AGGREGATORS[name][0].partition(".")
    function = getattr(importlib.import_module(f"rewards.algebra.{module}"), attribute)
    parameters = inspect.signature(function).parameters
    return function, {key: p for key, p in parameters.items() if p.kind == p.KEYWORD_ONLY}


def written(name: str, made_by: Callable[..., Any], **arguments: Value) -> str:
    """Return the spec of a reward: its name and the arguments that are not `made_by`'s defaults."""
    return str(Call(name, (), chosen(made_by, arguments)))


def chosen(made_by: Callable[..., Any], arguments: Mapping[str, Value]) -> Named:
    """Return the arguments that differ from `made_by`'s defaults, in its order."""
    parameters = inspect.signature(made_by).parameters
    given = [(key, arguments[key]) for key in parameters if key in arguments]
    return tuple((key, value) for key, value in given if value != parameters[key].default)


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _format(value: Value) -> str:
    if isinstance(value, str):
        plain = re.fullmatch(WORD, value) and isinstance(_literal(value), str)
        return value if plain else '"' + re.sub(r'([\\"])', r"\\\1", value) + '"'
    return repr(value).lower() if isinstance(value, bool) or value is None else repr(value)


def _literal(word: str) -> Value:
    if word.lower() in LITERALS:
        return LITERALS[word.lower()]
    if not SIGNED.fullmatch(word):
        return word
    if not re.fullmatch(r"[+-]?\d+", word):
        return float(word)
    if len(word) > 20 or abs(int(word)) >= LARGEST:
        raise ValueError(f"a reward spec holds {word[:40]}; give a number of 64 bits")
    return int(word)


class _Parser:
    """A recursive descent parser with one token of look-ahead."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the reward spec {text!r} is empty; write for example 'clip + ocr'")
        if len(text) > LONGEST:
            raise ValueError(
                f"the reward spec {text[:40]!r}... has {len(text)} characters, over {LONGEST}"
            )
        self.text, self.at, self.depth = text, 0, 0

    def fail(self, wanted: str) -> ValueError:
        rest = self.text[self.at :].strip()
        found = repr(rest[:20]) if rest else "the end"
        return ValueError(f"reward spec {self.text!r:.200}: {wanted} expected but found {found}")

    def take(self, kind: str, pattern: re.Pattern[str] = OUTSIDE, only: str = "") -> str | None:
        """Consume and return the next token if it is of this kind (and in `only`), else None."""
        match = pattern.match(self.text, self.at)
        if match is None or match.lastgroup != kind or (only and match[kind] not in only):
            return None
        self.at = match.end()
        return match[kind]

    def whole(self) -> tuple[Term, ...]:
        terms = self.sum()
        if self.text[self.at :].strip():
            raise self.fail("'+' or '-' between rewards")
        return terms

    def sum(self) -> tuple[Term, ...]:
        terms = [self.term(self.signs())]
        while SIGN.match(self.text, self.at):
            terms.append(self.term(self.signs()))
        return tuple(terms)

    def signs(self) -> float:
        sign = 1.0
        while (mark := self.take("mark", only="+-")) is not None:
            sign = -sign if mark == "-" else sign
        return sign

    def term(self, sign: float) -> Term:
        weight, alias, name = None, "", self.take("word")
        if name is not None and self.take("mark", only="="):
            alias, name = name, None
        if name is None and (number := self.take("number")) is not None:
            weight = float(number)
            if not self.take("mark", only="*"):
                raise self.fail("'*' after a weight")
        name = name or self.take("word")
        if name is not None and not alias and self.take("mark", only="="):
            alias, name = name, self.take("word")
        if name is None and BRACKET.match(self.text, self.at):
            raise ValueError(
                f"reward spec {self.text!r:.200}: brackets alone hold no sum; give each reward its "
                "own weight, as in 0.5*clip + 0.5*jpeg, or combine them by name, as in "
                "0.5*mean(clip, jpeg)"
            )
        if name is None or {":", "<"} & set(alias):
            raise self.fail("the name of a reward")
        call = self.call(name)
        if self.take("mark", only="*"):
            number = self.take("number")
            if number is None or weight is not None:
                raise self.fail("one weight for each reward")
            weight = float(number)
        return Term(call, sign * (1.0 if weight is None else weight), alias)

    def call(self, name: str) -> Call:
        if not self.take("mark", only="("):
            return Call(name)
        if name in AGGREGATORS:
            return self.aggregate(name)
        try:
            return Call(name, *self.arguments())
        except ValueError as error:
            if close := get_close_matches(name, AGGREGATORS, 1, 0.75):
                raise ValueError(
                    f"{error}; did you mean {close[0]!r}, which takes sums?"
                ) from error
            raise

    def aggregate(self, name: str) -> Call:
        """Parse sums, then options, after the bracket. Any other name before "=" is an alias."""
        if self.depth == DEEPEST:
            raise self.fail(f"at most {DEEPEST} aggregators in each other")
        self.depth += 1
        options = list(aggregator(name)[1])
        sums: list[tuple[Term, ...]] = []
        kwargs: dict[str, Value] = {}
        while not self.take("mark", only=")"):
            if (sums or kwargs) and not self.take("mark", only=","):
                raise self.fail(f"',' or ')' after a part of {name}")
            found = OPTION.match(self.text, self.at)
            if found and found[1] in options:
                self.at = found.end()
                if found[1] in kwargs:
                    raise self.fail(f"{found[1]} only once")
                kwargs[found[1]] = self.value()
            elif kwargs:
                raise self.fail(f"one of the options {options}, which come last, or ')'")
            elif LONE_VALUE.match(self.text, self.at):
                raise self.fail(f"a reward, or name=value with one of the options {options},")
            else:
                if found and LONE_VALUE.match(self.text, found.end()):
                    raise self.no_option(name, found[1], options)
                sums.append(self.sum())
                # an alias close to an option is a typing error, and could not be parsed again
                for alias in (term.alias for term in sums[-1]):
                    if get_close_matches(alias, options, 1, 0.8):
                        raise self.no_option(name, alias, options)
        self.depth -= 1
        return Call(name, (), tuple(kwargs.items()), tuple(sums))

    def no_option(self, name: str, key: str, options: list[str]) -> ValueError:
        close = get_close_matches(key, options, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"it takes {options}"
        return ValueError(f"reward spec {self.text!r}: {name} has no argument {key!r}; {hint}")

    def arguments(self) -> tuple[tuple[Value, ...], Named]:
        args: list[Value] = []
        kwargs: dict[str, Value] = {}
        for key, value in self.items():
            if not key and kwargs:
                raise self.fail("name=value after a named argument")
            if key in kwargs:
                raise self.fail(f"{key} only once")
            if key:
                kwargs[key] = value
            else:
                args.append(value)
        return tuple(args), tuple(kwargs.items())

    def items(self) -> Iterator[tuple[str, Value]]:
        if self.take("mark", INSIDE, ")"):
            return
        while True:
            key, value = "", self.value()
            if self.take("mark", INSIDE, "="):
                if not (isinstance(value, str) and value.isidentifier()):
                    raise self.fail(f"a name instead of {value!r} before '='")
                key, value = value, self.value()
            yield key, value
            if self.take("mark", INSIDE, ")"):
                return
            if not self.take("mark", INSIDE, ","):
                raise self.fail("',' or ')' (quote a value that holds spaces)")

    def value(self) -> Value:
        quoted = self.take("quoted", INSIDE)
        if quoted is not None:
            return re.sub(r"\\(.)", r"\1", quoted[1:-1], flags=re.DOTALL)
        word = self.take("word", INSIDE)
        if word is None:
            raise self.fail("a value")
        return _literal(word)
