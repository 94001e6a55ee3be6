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


@pytest.mark.parametrize("word", ["steps=", "folder= ", "inner.rate=\t"])
def test_a_word_without_a_value_is_refused(word):
    """What a shell makes of a variable that is not set must not read as null."""
    with pytest.raises(ValueError, match=r"= has no value; write .*=null for none"):
        config.read(Settings, None, [word])


def test_files_that_are_not_settings(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        config.read(Settings, Path("nowhere.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="holds no settings"):
        config.read(Settings, tmp_path / "list.yaml")
    (tmp_path / "a.yaml").write_text("stps: 3\n")
    with pytest.raises(ValueError, match=r"a\.yaml sets 'stps'"):
        config.read(Settings, tmp_path / "a.yaml")


FILES = [
    "a: [", "- 1", "3", "x", "steps: 1\nsteps: 2", "inner:\n\trate: 1", "inner:\n", "inner: 3",
    "inner: [1]", "inner:\n  1: 2", "inner: {rate: {a: 1}}", "a: *x", "a: &x [*x]", "--- a\n--- b",
    "!!python/object/apply:os.system ['id']", "? [a]\n: 3", "null: 3", "true: 5", "steps: ${x}",
    "steps: ???", "steps: true", "steps: 1.5", "steps: .nan", "steps: " + "9" * 5000, "folder: [1]",
    "targets: 3", "call: 5", "call: {1: 2}", "call: null", "steps:", "[" * 20_000, "\x01",
]  # fmt: skip


@pytest.mark.parametrize("text", FILES, ids=lambda text: repr(text[:20]))
def test_every_slip_in_a_file_is_one_sentence(text, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml|the setting") as told:
        config.read(Settings, file)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 9, b"steps: \x80"])
def test_a_file_that_is_no_text_is_refused(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.yaml cannot be read as YAML"):
        config.read(Settings, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "word", ["steps=[1", "steps={", "[=]=1", "call.x=" + "[" * 2000, "steps=!!python/object:os x"]
)
def test_every_slip_in_a_word_is_one_sentence(word):
    with pytest.raises(ValueError, match="cannot be read as YAML") as told:
        config.read(Settings, None, [word])
    assert "\n" not in str(told.value)


def test_a_flag_is_true_or_false():
    @dataclass
    class Flags:
        on: bool = False

    assert config.read(Flags, None, ["on=yes"]).on
    with pytest.raises(ValueError, match="on is 3 but must be true or false"):
        config.read(Flags, None, ["on=3"])


@pytest.mark.parametrize("word", ["call=[1]", "call=5", "check.call=[1]"])
def test_a_group_that_is_given_a_value_is_named(word):
    from tilt.commands.rollout import Rollout
    from tilt.commands.train_gdro import TrainGdro

    with pytest.raises(ValueError, match=r"call is .* but is a group of settings"):
        config.read(TrainGdro if "check" in word else Rollout, None, [word])


@pytest.mark.parametrize("out", ["/dev/null/x", "x" * 5000, "  "], ids=["file", "long", "blank"])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(out):
    from tilt import exit_status

    with pytest.raises(ValueError, match=r"out.*(cannot be made|name a folder)"):
        exit_status.check_folder(out)
