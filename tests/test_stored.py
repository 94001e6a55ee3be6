"""Conditioning on disk: what was recorded, written once, mapped, made anew if it is of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_pipelines import family
from two_processes import run_pair

from finetune import stored as module
from finetune.conditioning import Conditioning, Form
from finetune.recording import Recorder, record
from finetune.stored import stored

PROMPTS = ["a red star", "two blue circles", "a cross", "a red star"]


def counted(recorder, calls):
    def recorded(prompts):
        calls.append(list(prompts))
        return recorder.record(prompts)

    return recorded


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_it_is_what_was_recorded_and_each_tensor_is_there_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_PART", 3)
    pipe, call = family(name)
    calls, guided = [], call | {"guidance_scale": 4.0, "negative_prompt": "dull"}
    recorder, folder = Recorder(pipe, guided, guided=True), tmp_path / "given"
    given = (folder, counted(recorder, calls), PROMPTS)
    found = stored(*given, "it", Accelerator(cpu=True))
    assert calls == [PROMPTS[:3], PROMPTS[3:]]
    expected = Recorder(pipe, guided, guided=True).record(PROMPTS)
    assert found.form == expected.form
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    own = sum(value.nbytes for value in expected.rows[0].values())
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 3 * own + 20_000
    assert all(found.rows[0][key] is found.rows[3][key] for key in found.rows[0])  # one prompt
    same = [k for k in found.rows[0] if found.rows[0][k] is found.rows[1][k]]
    assert same  # of the negative prompt
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_it_is_used_again_only_for_the_same_prompts_model_and_call(tmp_path):
    pipe, call = family("sd3")
    calls: list[list[str]] = []
    recorded, alone = counted(Recorder(pipe, call), calls), Accelerator(cpu=True)
    for prompts, made_of in (
        (PROMPTS[:2], "a"), (PROMPTS[:2], "a"), (PROMPTS[:2], "b"), (PROMPTS[1:3], "b")
    ):  # fmt: skip
        found = stored(tmp_path / "given", recorded, prompts, made_of, alone)
        assert len(found) == 2
    assert calls == [PROMPTS[:2], PROMPTS[:2], PROMPTS[1:3]]
    (tmp_path / "given" / "index.json").write_text("[")
    stored(tmp_path / "given", recorded, PROMPTS[1:3], "b", alone)
    assert len(calls) == 4
    plain = record(pipe, PROMPTS[1:3], **call)
    assert all(torch.equal(plain.rows[1][k], v) for k, v in found.rows[1].items())


def test_tensors_are_mapped_and_not_read(tmp_path):
    pipe, call = family("sd3")
    one = Recorder(pipe, call).record(PROMPTS[:1])
    large = [{k: v.expand(2000, *v.shape).clone() for k, v in one.rows[0].items()}]

    def recorded(_):
        return type(one)(one.form, large)

    found = stored(tmp_path / "given", recorded, PROMPTS[:1], "it", Accelerator(cpu=True))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "given") in maps.read_text()
    assert found.rows[0].keys() == large[0].keys()


@pytest.mark.slow
def test_two_processes_have_one_recording(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from accelerate import Accelerator\n"
        "from tiny_pipelines import family\n"
        "from finetune.recording import Recorder\n"
        "from finetune.stored import stored\n"
        "accelerator = Accelerator(cpu=True)\n"
        "pipe, call = family('sd3')\n"
        "record = Recorder(pipe, call).record if accelerator.is_main_process else None\n"
        "found = stored(Path(sys.argv[1]), record, ['a', 'b'], 'it', accelerator)\n"
        "assert len(found) == 2\n"
    )
    run_pair(program, str(tmp_path / "given"), port=71)


def test_equal_bytes_of_another_shape_or_dtype_are_other_tensors(tmp_path):
    zeros = {"a": torch.zeros(1, 2, 3), "b": torch.zeros(1, 3, 2), "c": torch.zeros(1, 6).int()}
    trees = [{"tensor": name} for name in zeros]
    form = Form({}, {"encode_prompt": trees}, dict.fromkeys(zeros, 0), (4,))
    accelerator = Accelerator(cpu=True)
    given = stored(
        tmp_path / "given", lambda some: Conditioning(form, [zeros]), ["a"], "m", accelerator
    )
    for name, value in zeros.items():
        found = given.rows[0][name]
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
