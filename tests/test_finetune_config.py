"""Settings from files and words: what wins, and what is refused."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune import config


@dataclass
class Inner:
    rate: float = 1e-4
    name: str = "adam"


@dataclass
class Settings:
    steps: int = 100
    folder: str | None = None
    targets: list[str] = field(default_factory=lambda: ["to_q"])
    inner: Inner = field(default_factory=Inner)
    call: dict[str, Any] = field(default_factory=dict)


def test_words_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("steps: 7\ninner:\n  rate: 0.5\n")
    found = config.read(Settings, file, ["inner.rate=2e-3", "targets=[a,b]"])
    assert found == Settings(7, None, ["a", "b"], Inner(2e-3, "adam"))
    assert isinstance(found.inner, Inner)


def test_what_is_written_is_read_back(tmp_path):
    settings = Settings(3, "x", ["a"], Inner(0.25, "sgd"))
    config.write(settings, tmp_path / "deep" / "b.yaml")
    assert config.read(Settings, tmp_path / "deep" / "b.yaml") == settings


def test_keys_inside_a_dict_are_free():
    found = config.read(Settings, None, ["call.guidance_scale=2.5", "call.height=64"])
    assert found.call == {"guidance_scale": 2.5, "height": 64}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step=3"], r"sets 'step', which is unknown; did you mean 'steps'"),
        (["inner.rat=3"], r"did you mean 'inner.rate'"),
        (["steps=many"], r"steps"),
        (["steps"], r"write key=value"),
        (["zzzz=1"], r"known are"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(words, message):
    with pytest.raises(ValueError, match=message) as told:
        config.read(Settings, None, words)
    assert "\n" not in str(told.value)


def test_files_that_are_not_settings(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        config.read(Settings, Path("nowhere.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="holds no settings"):
        config.read(Settings, tmp_path / "list.yaml")
    (tmp_path / "a.yaml").write_text("stps: 3\n")
    with pytest.raises(ValueError, match=r"a\.yaml sets 'stps'"):
        config.read(Settings, tmp_path / "a.yaml")


def test_help_lists_every_key_with_its_default():
    text = config.explain(Settings, {"inner.rate": "of the optimiser"})
    assert "inner.rate  of the optimiser (default: 0.0001)" in text
    assert len(text.splitlines()) == 6
