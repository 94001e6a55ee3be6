"""The text form of a reward, ``clip + 0.5*ocr(mode=strict)``, read and written.

    sum    = [sign] term { sign term }
    term   = [alias "="] [number "*"] [alias "="] call ["*" number]     (one alias, one weight)
    call   = name ["(" [argument {"," argument}] ")"]
    name   = identifier | module ":" attribute
    value  = number | true | false | none | word | quoted

A word holds letters, digits and ``_ . : / ~ + -`` (so ``ViT-B-32/laion2b_s34b_b79k`` and
``random:0`` need no quotes); anything else is quoted, '...' or "...", with backslash escapes.
Weights left out are 1; a weight of 0 is evaluated and logged but not added. Two components of
one name need aliases: ``a=clip(tiny) + b=clip(tiny, scale=logit)``.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "Term", "Value", "format_terms", "parse", "written"]

Value = str | int | float | bool | None

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
PATH = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
NAME = rf"{PATH}:{PATH}|[^\W\d]\w*"
WORD = r"[\w.:/~+-]+"
# outside parentheses "-" is a sign; inside it may belong to a word
OUTSIDE = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<word>{NAME})|(?P<mark>[-+*=(]))")
INSIDE = re.compile(rf"\s*(?:(?P<quoted>{QUOTED})|(?P<word>{WORD})|(?P<mark>[=,)]))")
SIGNED = re.compile(rf"[+-]?{NUMBER}")
LITERALS: dict[str, Value] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Call:
    """A reward's name and its arguments as written: positional, then named."""

    name: str
    args: tuple[Value, ...] = ()
    kwargs: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        items = [_format(value) for value in self.args]
        items += [f"{key}={_format(value)}" for key, value in self.kwargs]
        return self.name + (f"({', '.join(items)})" if items else "")


@dataclass(frozen=True)
class Term:
    """One weighted component; `alias` is the name it is reported under, if not its own."""

    call: Call
    weight: float = 1.0
    alias: str = ""


def parse(text: str) -> tuple[Term, ...]:
    """The terms of a spec; ValueError says what was found where."""
    return _Parser(text).sum()


def format_terms(terms: tuple[Term, ...]) -> str:
    """The spec of some terms, such that parsing it gives them back."""
    text = ""
    for i, term in enumerate(terms):
        sign = "-" if term.weight < 0 else "+"
        text += f" {sign} " if i else sign.strip("+")
        text += f"{term.alias}=" if term.alias else ""
        size = abs(term.weight)
        text += "" if size == 1 else f"{_number(size)}*"
        text += str(term.call)
    return text


def written(name: str, made_by: Callable[..., Any], **arguments: Value) -> str:
    """The spec of one reward: `name`, and those arguments that are not `made_by`'s defaults."""
    parameters = inspect.signature(made_by).parameters
    given = [(key, arguments[key]) for key in parameters if key in arguments]
    kwargs = tuple((key, value) for key, value in given if value != parameters[key].default)
    return str(Call(name, (), kwargs))


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
    return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)


class _Parser:
    """One pass over the text, a token of look-ahead."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the reward spec {text!r} is empty; write for example 'clip + ocr'")
        self.text, self.at = text, 0

    def fail(self, wanted: str) -> ValueError:
        rest = self.text[self.at :].strip()
        found = repr(rest[:20]) if rest else "the end"
        return ValueError(f"reward spec {self.text!r}: {wanted} expected but found {found}")

    def take(self, kind: str, pattern: re.Pattern[str] = OUTSIDE, only: str = "") -> str | None:
        """The next token if it is of this kind (and one of the marks `only`), else None."""
        match = pattern.match(self.text, self.at)
        if match is None or match.lastgroup != kind or (only and match[kind] not in only):
            return None
        self.at = match.end()
        return match[kind]

    def sum(self) -> tuple[Term, ...]:
        terms = [self.term(self.signs())]
        while self.text[self.at :].strip():
            if self.peek() not in "+-":
                raise self.fail("'+' or '-' between rewards")
            terms.append(self.term(self.signs()))
        return tuple(terms)

    def peek(self) -> str:
        return self.text[self.at :].lstrip()[0]

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
        if name is None or ":" in alias:
            raise self.fail("the name of a reward")
        args, kwargs = self.arguments() if self.take("mark", only="(") else ((), ())
        if self.take("mark", only="*"):
            number = self.take("number")
            if number is None or weight is not None:
                raise self.fail("one weight for each reward")
            weight = float(number)
        return Term(Call(name, args, kwargs), sign * (1.0 if weight is None else weight), alias)

    def arguments(self) -> tuple[tuple[Value, ...], tuple[tuple[str, Value], ...]]:
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
