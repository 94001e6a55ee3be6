"""Every setting has a range that is stated beside it, and what is outside is refused by name."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from typing import Any

import pytest

import finetune
from finetune import critics, grpo, ranges, rollouts
from finetune.ranges import Range, number, whole
from steering import FeynmanKac
from tilt import options, variants

COMMANDS = ("evaluate", "rollout", "train_adversarial", "train_critic", "train_gdro")
MODULES = [f"finetune.{found.name}" for found in pkgutil.iter_modules(finetune.__path__)]
MODULES += ["tilt.training", *(f"tilt.commands.{name}" for name in COMMANDS)]
NEEDED = {
    rollouts.Plan: {"prompts": ("a",)},
    variants.EvaluationPlan: {"prompts": ("a",), "references": ((),), "images": 2, "seed": 0},
}
WRONG = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.5,
    10**30,
    None,
    True,
    "x",
    "",
    "a\0",
    [1],
    (),
    {1: 2},
)
WRONG += (object(), b"x", {"": 1}, 1j)


def ranges_of(kind: Any) -> dict[str, Any]:
    """What each field may be: beside it, or for plans in a table."""
    beside = {f.name: f.metadata["range"] for f in dataclasses.fields(kind) if f.metadata}
    return getattr(kind, "RANGES", None) or beside


def kinds() -> Any:
    """The dataclasses of settings: those that are not frozen, and plans."""
    for module in map(importlib.import_module, MODULES):
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        for kind in classes:
            own = kind.__module__ == module.__name__ and kind.__name__[0] != "_"
            if own and dataclasses.is_dataclass(kind):
                parameters: Any = vars(kind)["__dataclass_params__"]
                if not parameters.frozen or kind in NEEDED:
                    yield kind


KINDS = sorted(kinds(), key=lambda kind: (kind.__module__, kind.__name__))


def test_the_settings_are_found():
    names = {f"{kind.__module__}.{kind.__name__}" for kind in KINDS}
    assert {
        "finetune.gdro.Gdro",
        "tilt.commands.train_critic.TrainCritic",
        "finetune.checks.Check",
    } <= names
    assert len(KINDS) >= 13


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_range_that_its_default_is_in(kind):
    assert set(ranges_of(kind)) == {field.name for field in dataclasses.fields(kind)}
    kind(**NEEDED.get(kind, {}))
    if kind not in NEEDED:
        assert all(field.metadata["help"] for field in dataclasses.fields(kind))
        said = " ".join(options.Options("x", kind, "").parser().format_help().split())
        for one in ranges_of(kind).values():
            assert "number" not in one.said or one.said.removesuffix(", or null") in said


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_outside_is_refused_by_name(kind):
    for name, allowed in ranges_of(kind).items():
        for value in WRONG:
            if allowed.allows(value):
                # text, flags, what is optional, tuples of nothing, and large numbers
                assert value in ("x", "", True, None, (), 10**30), (name, value)
                continue
            said = rf"^{name} is .* but must be {re.escape(allowed.said)}"
            with pytest.raises(ValueError, match=said):
                kind(**NEEDED.get(kind, {}) | {name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_no_range_takes_what_is_not_finite_or_of_another_type(kind):
    settings = kind(**NEEDED.get(kind, {}))
    for name, allowed in ranges_of(kind).items():
        default = getattr(settings, name)
        others = [math.nan, math.inf, -math.inf, -1, 1j]
        if isinstance(default, bool):
            others += [0, 1, "true", None]
        elif isinstance(default, int | float):
            others += ["x", "1", "", True, [1], None, {}]
        elif isinstance(default, str):
            others += [0, True, None, {}]
        assert not [value for value in others if allowed.allows(value)], name


@pytest.mark.parametrize(
    ("allowed", "said", "inside", "outside"),
    [
        (number(0, 1, "[)"), "a number in [0, 1)", (0, 0.0, 0.999), (1, -1e-9)),
        (number(0, ends="(]"), "a number above 0", (1e-300, 1e38), (0, 0.0, 1e39)),
        (number(0), "a number not below 0", (0, 3), (-1e-300,)),
        (number(), "a finite number", (-3, 0.5), (math.inf,)),
        (whole(2, 5), "a whole number, 2 to 5", (2, 5), (1, 6, 2.0)),
        (whole(2), "a whole number, 2 or more", (2, 10**9), (1, 10**10)),
    ],
)
def test_a_range_is_what_it_says(allowed, said, inside, outside):
    assert allowed.said == said
    assert all(map(allowed.allows, inside))
    assert not any(map(allowed.allows, outside))


def test_changing_a_setting_is_checked_too():
    with pytest.raises(ValueError, match="kl is -1 but must be a number not below 0"):
        dataclasses.replace(grpo.Grpo(), kl=-1)
    with pytest.raises(ValueError, match="below is 1"):
        critics.CriticSettings(below=1.5)


def test_a_field_without_a_range_is_noticed():
    @dataclasses.dataclass
    class Settings:
        size: int = 3

    with pytest.raises(KeyError, match="size"):
        ranges.check(Settings(), {"other": Range("any", bool)})


@pytest.mark.parametrize("field", dataclasses.fields(FeynmanKac), ids=lambda field: field.name)
def test_the_filters_settings_likewise(field):
    fine = {"reward_scale": (-1, -0.5, 10**30), "noise": (None,)}
    kind: Any = FeynmanKac
    for value in WRONG:
        if value in fine.get(field.name, ()) or (field.name == "funnel" and value == ()):
            kind(**{field.name: value})
            continue
        with pytest.raises(ValueError, match=rf"^{field.name}\b"):
            kind(**{field.name: value})
