"""What text of unknown origin can make `rewards.load` do: nothing but load what Tilt has."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import rewards
from rewards.catalogue import CHOICES, REWARDS, WEIGHTS, OutsideError, factory_of, read
from rewards.spec import AGGREGATORS, aggregator
from rewards.towers.openclip import build, open_place

CODE = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
HUB = "organisation/weights"
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in WATCHED:
        _seen.append(f"{event} {arguments[:1] if event == 'import' else arguments}")


WATCHED = {
    "open", "import", "exec", "os.listdir", "os.scandir", "os.system", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "pickle.find_class", "os.putenv",
}  # fmt: skip
sys.addaudithook(_hook)  # for good: hooks cannot be taken away again


@contextmanager
def watched() -> Iterator[list[str]]:
    """What Python itself reports that was opened, imported, started or asked for meanwhile."""
    global _seen
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, current and on the path, with code, data and weights that nobody may touch."""
    folder = tmp_path / "planted"
    (folder / "planted_package").mkdir(parents=True)
    for name in ("planted_module.py", "planted_package/__init__.py", "tiny.py", "random.py"):
        (folder / name).write_text(f"{CODE}def f(*a, **k): ...\n")
    (folder / "planted.json").write_text('{"components": {"jpeg": [1, 2, 3]}}')
    torch.save({"weight": torch.zeros(1, 32)}, folder / "planted.pt")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


CODES = [
    'os:system("id")',
    "os:system",
    "planted_module:f",
    "planted_module:f()",
    "planted_package:f.__globals__",
    "mine=planted_module:f",
    "0*planted_module:f",
    "-planted_module:f*2",
    "jpeg + planted_module:f",
    "  \n\tplanted_module:f\r\n",
    "jpeg +\n\nplanted_module:f\n",
    "min(jpeg, planted_module:f)",
    "min(jpeg, mean(jpeg + 0*planted_module:f, a=jpeg))",
    "clip_above(" * 20 + "planted_module:f" + ", at=1)" * 20,
    "augmented(planted_module:f, draws=1)",
    "builtins:eval('1')",
    "builtins:__import__(planted_module)",
    "importlib:import_module(planted_module)",
    "rewards.catalogue:factory_of",
    "torch:load('planted.pt')",
    "objects(detector=planted_module:f)",
    "objects(exactly, planted_module:f)",
    "objects(detector='planted_module:f')",
    'objects(detector="planted_module\\:f")',
    "jpeg - 0.5*lcb(clip(tiny), objects(detector=planted_module:f), kappa=2)",
]
PLACES = [
    "clip({0})",
    "clip(source={0})",
    "clip('{0}')",
    "clip(~/{1})",
    "clip(./{1})",
    "clip(../planted)",
    "clip(hf-hub:organisation/weights)",
    "clip(ViT-B-32/laion2b_s34b_b79k)",
    "clip(file:///etc/passwd)",
    "clip(tiny/)",
    "clip(./tiny)",
    "clip(TINY)",
    "clip(random:)",
    "clip(random:0/../../planted)",
    "clip(random:٣)",
    "clip(random:-1)",
    "critic({0})",
    "critic:{0}",
    "critic:planted",
    "critic:tiny/../..",
    "aesthetic({0}/planted.pt)",
    "aesthetic(tiny, {0})",
    "aesthetic(tiny, clip=organisation/weights)",
    "pickscore({0}/planted.pt)",
    "objects(metadata=/etc/passwd)",
    "objects(metadata={0}/planted.json)",
    "objects(source={0}, detector=owlv2)",
    "objects(colours={0})",
    "judge(planted)",
    "judge(organisation/weights)",
    "judge(url=http://127.0.0.1:1/v1, model=m)",
    "judge(url=http://169.254.169.254/latest, model=m, key_env=AWS_SECRET_ACCESS_KEY)",
    "judge(tiny, pattern='((a+)+)+b')",
    "calibrated(jpeg, file={0}/planted.json)",
    "calibrated(jpeg, file=planted.json)",
    "calibrated(jpeg, file=tiny)",
    "clip_above(jpeg, at={0}/planted.json)",
    "clip_above(jpeg, at=random:0)",
    "par(jpeg, ref={0}/planted.json)",
    "min(jpeg, 2*par(a=jpeg, ref='planted.json'))",
    "dino(tiny) + dino2=dino({0})",
]
NO_SPEC = [
    "jpeg + planted_module:f # jpeg",
    "planted_module.py:f",
    "./planted_module:f",
    "planted/module:f",
    "planted_module：f",
    "planted_module::f",
    ":f",
    "planted_module:",
    "planted_module :f",
    "jpeg; planted_module:f",
    "__import__('planted_module')",
    "lambda: planted_module",
    "<planted_module:f>",
    "eval(planted_module)",
    "{0}/planted.pt",
    "planted_module\0:f",
    "jpeg(mode=planted_module:f)",
    "ocr(engine=planted_module:f)",
    "ocr(engine=/bin/sh)",
    "p\u200blanted_module:f",
]


def refused(text: str, kind: type[ValueError], *, elsewhere: str = "planted") -> None:
    with watched() as seen, pytest.raises(ValueError, match=r"\w") as found:
        rewards.load(text)
    assert isinstance(found.value, kind), found.value
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 700
    mine = [one for one in seen if elsewhere in one or not one.startswith(("open", "import"))]
    mine = [one for one in mine if not one.startswith(("exec", "os.listdir"))]  # import's own
    assert mine == []


@pytest.mark.parametrize("text", CODES)
def test_code_is_not_imported(text, planted):
    refused(text, OutsideError)
    assert not list(planted.rglob("*.ran"))
    assert not {"planted_module", "planted_package"} & set(sys.modules)


@pytest.mark.parametrize("text", PLACES)
def test_nothing_that_the_text_names_is_opened_or_asked(text, planted):
    refused(text.format(planted, planted.name), OutsideError)


@pytest.mark.parametrize("text", NO_SPEC)
def test_what_is_no_spec_is_not_imported_either(text, planted):
    refused(text.format(planted), ValueError)
    assert not list(planted.rglob("*.ran"))


def test_the_same_texts_do_reach_there_where_they_are_the_caller_s_own(planted):
    """Or the tests above would hold for anything."""
    assert rewards.load("planted_module:f", imports=True).name == "f"
    assert list(planted.rglob("*.ran"))
    with watched() as seen:
        rewards.load("calibrated(jpeg, file=planted.json)", imports=True)
    assert any("planted.json" in one for one in seen)
    detector = rewards.load("objects(detector=planted_module:f)", imports=True)
    assert detector.parts[0].reward.detector.__name__ == "f"


def test_a_mapping_is_text_too(planted):
    with pytest.raises(OutsideError, match="import code"):
        rewards.load({"jpeg": 1.0, "planted_module:f": 1.0})
    assert not list(planted.rglob("*.ran"))


def test_nothing_is_loaded_before_all_is_allowed(monkeypatch):
    monkeypatch.setattr(rewards, "_made", lambda *a, **k: pytest.fail("loaded"))
    for text in ("clip(tiny) + os:system", "min(clip(tiny), objects(detector=this:c))"):
        with pytest.raises(OutsideError):
            rewards.load(text)


def parameters() -> Iterator[tuple[str, str, inspect.Parameter]]:
    for name in REWARDS:
        for key, parameter in inspect.signature(factory_of(name)).parameters.items():
            if key != "device":
                yield name, key, parameter
    for name in AGGREGATORS:
        for key, parameter in aggregator(name)[1].items():
            yield name, key, parameter


@pytest.mark.parametrize(("name", "key", "parameter"), list(parameters()))
def test_every_argument_of_every_reward_is_closed(name, key, parameter, planted):
    """New rewards and arguments are closed until somebody opens them."""
    takes_text = "str" in str(parameter.annotation)
    needs = {"calibrated": {"file": "tiny"}, "clip_above": {"at": 1}, "critic": {"source": "tiny"}}
    needs |= {"soft_tifa": {"questions": "tiny"}, "remote": {"url": "tiny"}}
    parts = ["a=jpeg", "jpeg"] if name in AGGREGATORS else []
    for value in (str(planted), "planted_module:f", HUB, "http://127.0.0.1:1/v1", "planted.json"):
        given = needs.get(name, {}) | {key: f'"{value}"'}
        text = f"{name}({', '.join(parts + [f'{k}={v}' for k, v in given.items()])})"
        closed = takes_text and (key not in CHOICES or ":" in value)
        with watched() as seen:
            if closed or name in ("calibrated", "soft_tifa", "remote"):  # which need more
                with pytest.raises(OutsideError):
                    read(text)
            else:  # to be refused by the reward, as none of its words, or no number
                assert (key, value) in read(text)[0].call.kwargs
        assert not [one for one in seen if "planted" in one or "socket" in one]


def test_what_tilt_has_can_be_named_by_anybody():
    for text in (
        "clip(tiny) + 0.5*ocr(mode=strict, engine=rapidocr) - 0.1*jpeg(incompressibility)",
        "min(a=clip(random:1), 2*aesthetic(tiny, clip=tiny), objects(exactly, detector=world))",
        "critic:random:3",
        "clip(source=tiny, scale=hessel, batch_size=2)",
        "augmented(dino(tiny), draws=2, flip=true)",
    ):
        assert rewards.load(text).spec == rewards.load(text, imports=True).spec
    usual = "yuvalkirstain/PickScore_v1"  # the default, written out
    assert read(f"pickscore({usual})")[0].call.kwargs == (("source", usual),)


def test_the_sentence_says_what_to_pass():
    with pytest.raises(OutsideError, match=r"pass imports=True to rewards\.load\(\)"):
        rewards.load("math:sqrt")
    assert set(CHOICES).isdisjoint(WEIGHTS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jpeg" + " + jpeg" * 100_000, "characters"),
        ("(" * 100_000, "characters"),
        ("min(" * 4_000, "at most 20 aggregators"),
        ("(" * 4_000, "brackets alone"),
        ("+-" * 9_000, "the name of a reward"),
        ("1" * 19_000, "expected"),
        ("min(" + "1" * 19_000, "expected"),
        ("min(a=" + "1" * 19_000 + "x", "expected"),
        ("9" * 19_000 + "*jpeg", "must be finite"),
        ("1e999*jpeg", "must be finite"),
        ("x" * 19_000, "no reward"),
        ("clip(" + "x=" * 9_000, "expected"),
        ("clip('" + "\\" * 19_000, "expected"),
        (f"clip(batch_size={'9' * 5_000})", "64 bits"),
        ("clip(batch_size=9223372036854775808)", "64 bits"),
        ("clip(tiny, batch_size=9223372036854775807)", "batch_size"),
        ("lcb(a=jpeg, jpeg, kappa=1e999)", "must be a finite"),
        ("augmented(jpeg, draws=1000000000)", "from 1 to 64"),
        ("augmented(mean(augmented(jpeg), clip(tiny)))", "contains another"),
        ("ocr(limit_side_len=1000000)", "limit_side_len"),
        ("ocr(upscale=1000000)", "upscale"),
        ("dino(tiny, size=8000000)", "up to 2048"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_long_deep_and_huge_texts_are_refused_at_once(text, said):
    with pytest.raises(ValueError, match=said) as found:
        rewards.load(text)
    assert len(str(found.value)) < 700


def test_a_long_sum_of_small_parts_is_read():
    text = " + ".join(f"a{i}=jpeg" for i in range(500))
    assert len(rewards.load(text).parts) == 500


def foreign_code(folder: Path) -> None:
    """What a repository holds that wants transformers to run its own tokenizer."""
    (folder / "tokenization_own.py").write_text(
        CODE + "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): ...\n"
    )
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_the_code_of_a_repository_is_not_run(trust, tmp_path, monkeypatch):
    """open_clip hands `tokenizer_kwargs` of a folder's configuration on to transformers."""
    from safetensors.torch import save_file

    from rewards.towers.sources import RANDOM_CONFIG
    from rewards.towers.transformers_clip import load_tokenizer

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # where foreign code would be copied to
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # transformers may ask
    folder = tmp_path / "folder"
    folder.mkdir()
    foreign_code(folder)
    text = RANDOM_CONFIG["text_cfg"] | {"hf_tokenizer_name": HUB, "tokenizer_kwargs": trust}
    config = {"model_cfg": RANDOM_CONFIG | {"text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(build(RANDOM_CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(Exception, match=r"trust_remote_code|hub"):
        open_place(str(folder), config)
    with pytest.raises(Exception, match=r"trust_remote_code|hub"):
        load_tokenizer(str(folder))
    assert not list(tmp_path.rglob("*.ran"))
