"""The built-in rewards, and the meaning of a spec before anything is loaded.

`read` parses a spec, names every argument, and raises ValueError for unknown ones. It also
decides what a text may access. With `imports` the text is trusted and may access anything.
Without, it is untrusted and may name:

    built-in rewards and aggregators, with numbers, true, false, none, and the words of CHOICES
    `tiny` and `random:<seed>` as weights; any other text only if it is the default

So it cannot import code, open a file or a folder of its choice, download a hub repository of its
choice, send a request, or read the environment. It can still use time and memory: limit its
length, and set HF_HUB_OFFLINE=1 if it must not download the default weights.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .spec import AGGREGATORS, Call, Term, Value, aggregator, parse

__all__ = [
    "CHOICES",
    "REWARDS",
    "WEIGHTS",
    "OutsideError",
    "factory_of",
    "identity",
    "read",
    "served",
]

# name -> (module and class in rewards.models, description); a module is imported when it is used
REWARDS = {
    "aesthetic": ("aesthetic.AestheticReward", "aesthetic rating by LAION's predictors or v2.5"),
    "clip": ("clip.ClipReward", "cosine of image and prompt in CLIP's space"),
    "clip_image": ("clip_image.ClipImageReward", "similarity to reference images in CLIP's space"),
    "critic": ("critic.CriticReward", "trained to tell references from a model's samples"),
    "dino": ("dino.DinoReward", "similarity to reference images in DINO's features"),
    "hps": ("hps.HpsReward", "human preference score, v2 or v2.1"),
    "hpsv3": ("hpsv3.Hpsv3Reward", "human preference score, v3, by a Qwen2-VL-7B"),
    "imagereward": ("imagereward.ImageRewardReward", "human preference, learned on BLIP"),
    "jpeg": ("jpeg.JpegReward", "size as JPEG: small (default) or large files score high"),
    "judge": ("vlm_judge.JudgeReward", "a vision-language model's answer to a question"),
    "objects": ("objects.ObjectsReward", "objects, counts, colours and positions, by a detector"),
    "ocr": ("ocr.OcrReward", "the prompt's quoted text, as an OCR engine reads it"),
    "pickscore": ("pickscore.PickScoreReward", "preference of Pick-a-Pic's users"),
    "remote": ("remote.RemoteReward", "what `tilt serve` evaluates at another address"),
    "siglip": ("siglip.SiglipReward", "SigLIP's similarity of image and prompt"),
    "soft_tifa": ("soft_tifa.SoftTifaReward", "a model's answers to the prompt's questions"),
}
# arguments whose texts are names that the reward defines, so that they open nothing
CHOICES = {
    "detector", "dtype", "engine", "invalid", "method", "mode", "pool", "preset", "scale",
    "version",
}  # fmt: skip
MEGABYTE = 2**20
WEIGHTS = {"clip", "colours", "source"}  # arguments that may name weights
# hints for names of other software, whose most similar name here is a different reward
ELSEWHERE = {
    "hpsv2": "write hps(version=v2) or hps(version=v2.1)",
    "hpsv3": "write hpsv3",
    "unifiedreward": "write judge(preset=unifiedreward, url=..., model=...), or source=FOLDER",
    "vqascore": "write judge(preset=yes_no, url=..., model=...), or source=FOLDER",
    "clipi": "write clip_image, which compares with reference images",
    "clipscore": "write clip(ViT-B-32/openai, scale=hessel)",
    "geneval": "write objects(detector=owlv2)",
    "geneval2": "write soft_tifa(FILE OF QUESTIONS, url=..., model=...), or source=FOLDER",
    "tifa": "write soft_tifa(FILE OF QUESTIONS, url=..., model=...), or source=FOLDER",
}


class OutsideError(ValueError):
    """An untrusted text would access something outside this package, described by `what`."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"{what}, which untrusted text may not do; pass imports=True to rewards.load() if the "
            "text is your own"
        )


def read(text: str, imports: bool = False) -> tuple[Term, ...]:
    """Return the terms of a spec, with named arguments in the order of the reward's signature.

    Nothing is loaded. Raises ValueError for unknown names and syntax errors, and, unless `imports`,
    its subclass OutsideError for everything that the module docstring does not list.
    """
    return tuple(_term(term, imports) for term in parse(text))


def identity(text: str) -> str:
    """Return 12 hexadecimal digits that change if the meaning of the spec changes.

    They depend on the code and the embedded weights of this package, and on the files, folders
    (without subfolders) and modules (MODULE:NAME) that the spec names; for files above two
    megabytes, only on the size and the first and last megabyte. The server of a `remote` is asked,
    and what it serves counts. They do not depend on weights from a hub or on the imports of a
    module.
    """
    found = hashlib.sha256(_own())
    for call in _calls(read(text, imports=True)):
        if call.name == "remote":
            found.update(served(call).identity.encode())
        for value in _texts(call):
            path = os.path.expanduser(value)
            if os.path.isdir(path):
                found.update(_content(Path(path), Path(path).iterdir()))
            elif os.path.isfile(path):
                found.update(_content(Path(path), [Path(path)]))
    return found.hexdigest()[:12]


def served(call: Call) -> Any:
    """Ask the server of a call of `remote` what it serves, a `reward_messages.Served`."""
    return factory_of("remote")(**dict(_built_in(call).kwargs)).served


def _module(name: str) -> str:
    """Return the file of MODULE:NAME, or "" if it cannot be found without importing it."""
    try:
        found = importlib.util.find_spec(re.split("[.:]", name)[0])
    except (ImportError, ValueError):
        return ""
    return (found and found.origin) or ""


@functools.cache
def _own() -> bytes:
    folder = Path(__file__).parent
    return _content(folder, folder.rglob("*"))


def _content(top: Path, paths: Iterable[Path]) -> bytes:
    """Return a digest of files and of their names below `top`."""
    found = hashlib.sha256()
    for file in sorted(path for path in paths if path.is_file()):
        if "__pycache__" in file.parts:
            continue
        size = file.stat().st_size
        found.update(f"{file.relative_to(top).as_posix()} {size}\n".encode())
        with file.open("rb") as source:
            found.update(source.read(MEGABYTE))
            source.seek(max(source.tell(), size - MEGABYTE))
            found.update(source.read())
    return found.digest()


def _calls(terms: Sequence[Term]) -> Iterator[Call]:
    """Yield all calls, also those inside aggregators."""
    for call in (term.call for term in terms):
        yield call
        for inner in call.sums:
            yield from _calls(inner)


def _texts(call: Call) -> Iterator[str]:
    """Yield the text arguments of a call, and the file of a named module."""
    yield from [_module(call.name)] if ":" in call.name else []
    yield from (v for v in (*call.args, *dict(call.kwargs).values()) if isinstance(v, str))


def factory_of(name: str) -> Callable[..., Any]:
    """Return the class of a built-in reward."""
    module, _, attribute = REWARDS[name][0].partition(".")
    return getattr(importlib.import_module(f"rewards.models.{module}"), attribute)


def _term(term: Term, imports: bool) -> Term:
    call = term.call
    if "<" in call.name:
        raise ValueError(
            f"{call.name} in a spec stands for a function or an object that cannot be imported; "
            "load it itself, or put it into a module and write MODULE:NAME"
        )
    if ":" in call.name:
        if not imports:
            raise OutsideError(f"the reward {call.name[:80]} would import code")
        return term
    if call.name in AGGREGATORS:
        call = _of_others(call, imports)
    elif call.name in REWARDS:
        call = _built_in(call)
    else:
        raise _unknown(call.name)
    for key, value in () if imports else call.kwargs:
        if _reaches(call.name, key, value):
            does = "would import code" if key in CHOICES else "reaches outside of Tilt"
            raise OutsideError(f"the reward {call.name} {does} by {key}={str(value)[:80]!r}")
    return replace(term, call=call)


def _reaches(name: str, key: str, value: Value) -> bool:
    """Return whether this argument would open, import or request something that the text chose."""
    if not isinstance(value, str):
        return False
    if key in CHOICES:
        return ":" in value  # module:function names a detector of the user
    if key in WEIGHTS and (value == "tiny" or re.fullmatch(r"random:[0-9]{1,19}", value)):
        return False
    made_by = factory_of(name) if name in REWARDS else aggregator(name)[0]
    parameter = inspect.signature(made_by).parameters[key]
    takes_text = "str" in str(parameter.annotation) or parameter.annotation is parameter.empty
    return takes_text and value != parameter.default  # other types are refused by the reward


def _built_in(call: Call) -> Call:
    """Return the call with every argument named, in the order of the reward's signature."""
    parameters = inspect.signature(factory_of(call.name)).parameters
    names = [name for name in parameters if name != "device"]
    if len(call.args) > len(names):
        raise ValueError(f"reward {call.name} takes at most {len(names)} arguments: {call}")
    given = dict(zip(names, call.args, strict=False))
    for key, value in call.kwargs:
        if key in given:
            raise ValueError(f"reward {call.name} got {key} twice: {call}")
        if key not in names:
            close = get_close_matches(key, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {names}"
            raise ValueError(f"reward {call.name} has no argument {key!r}; {hint}")
        given[key] = value
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            what = {"source": "FOLDER", "url": "http://HOST:PORT"}.get(name, "FILE")
            raise ValueError(f"the reward {call.name} needs its {name}, as in {call.name}({what})")
    return Call(call.name, (), tuple((name, given[name]) for name in names if name in given))


def _of_others(call: Call, imports: bool) -> Call:
    _, options = aggregator(call.name)
    given = dict(call.kwargs)
    for key, parameter in options.items():
        if parameter.default is parameter.empty and key not in given:
            raise ValueError(f"{call.name} needs the argument {key}=, which {call} does not have")
    ordered = tuple((key, given[key]) for key in options if key in given)
    sums = tuple(tuple(_term(term, imports) for term in terms) for terms in call.sums)
    return Call(call.name, (), ordered, sums)


def _unknown(name: str) -> ValueError:
    known = sorted(REWARDS | AGGREGATORS)
    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {known}"
    hint = ELSEWHERE.get(name.lower().replace("_", ""), hint)
    return ValueError(f"there is no reward {name[:80]!r}; {hint}")
