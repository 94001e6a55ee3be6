"""Rollouts as training reads them: mapped, a step's rows at a time, and those of the next ahead."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from finetune.conditioning import Conditioning, Form, Mixed
from finetune.data import Ahead, Data, ShardRows, check_fits, load_data
from finetune.shards import Shard, add_rewards


def test_rows_of_several_tensors_are_those_of_one():
    parts = [torch.randn(n, 2, 3).half() for n in (3, 1, 4)]
    rows, every = ShardRows(parts), torch.cat(parts)
    index = torch.tensor([[0, 7, 3], [2, 4, 0]])
    assert len(rows) == 8
    assert rows[index].dtype == torch.float16
    assert torch.equal(rows[index], every[index])
    assert torch.equal(rows[torch.arange(8)], every)


def test_rows_of_several_shapes_are_taken_apart():
    parts = [torch.randn(2, 4, 4), torch.randn(3, 4, 6)]
    rows = ShardRows(parts)
    assert torch.equal(rows[torch.tensor([[1, 0]])], parts[0][[1, 0]][None])
    assert torch.equal(rows[torch.tensor([4, 2])], parts[1][[2, 0]])
    with pytest.raises(ValueError, match=r"shapes \[\(4, 4\), \(4, 6\)\] cannot be joined"):
        rows[torch.tensor([1, 2])]


def test_shards_of_several_dtypes_are_refused():
    with pytest.raises(ValueError, match="2 dtypes"):
        ShardRows([torch.zeros(2, 4), torch.zeros(2, 4).half()])


FORM = Form({}, {"encode_prompt": [{"tensor": "embeds"}]}, {"embeds": 0}, (4, 2, 2))


def run_of(folder: Path, shards: int, shape: tuple[int, ...]) -> Any:
    """Scored shards of two prompts with two images each."""
    found = []
    for i in range(shards):
        shard = Shard(folder / str(i))
        shard.folder.mkdir()
        groups = [2 * i, 2 * i, 2 * i + 1, 2 * i + 1]
        pq.write_table(pa.table({"group": groups}), shard.folder / "table.parquet")
        tensors = {"latents": torch.full((4, *shape), float(i))}
        tensors |= {f"given.{prompt}.embeds": torch.ones(1, 8) for prompt in range(2)}
        form = {"form": FORM.dumps()}
        save_file(tensors, shard.folder / "tensors.safetensors", form)
        add_rewards(shard, {"reward": [0.0, 1.0, 2.0, 3.0]})
        found.append(shard)
    return SimpleNamespace(shards=found, folder=folder)


def test_rewards_that_differ_in_the_ninth_digit_are_told_apart(tmp_path):
    """float32 knows seven."""
    run = run_of(tmp_path, 1, (4, 2, 2))
    add_rewards(run.shards[0], {"reward": [1e6, 1e6 + 1e-3, 2e6 + 1e-3, 2e6]})
    for norm in ("none", "rank", "global_std"):
        data = load_data(run, "reward", norm, 2)
        assert data.dropped == 0
        assert [group.rewards.argmax().item() for group in data.groups] == [1, 0]
        assert {group.rewards.dtype for group in data.groups} == {torch.float64}


def test_shards_that_were_scored_by_several_versions_of_a_reward_are_refused(tmp_path):
    run = run_of(tmp_path, 2, (4, 2, 2))
    for shard, version in zip(run.shards, "ab", strict=True):
        add_rewards(shard, {"reward": [0.0, 1.0, 2.0, 3.0]}, "jpeg", version=version)
    with pytest.raises(ValueError, match=r"different versions of jpeg; score the rollouts"):
        load_data(run, "reward", "none", 2)


def anonymous() -> float:
    """This process's memory that is not mapped from files, in MiB."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux has it")
def test_latents_stay_on_disk(tmp_path):
    run = run_of(tmp_path, 4, (4, 1024, 1024))  # 64 MiB each
    before = anonymous()
    data = load_data(run, "reward", "none", 2)
    rows = data.latents[torch.tensor([[0, 15]])]
    assert rows[0, :, 0, 0, 0].tolist() == [0.0, 3.0]
    assert anonymous() - before < 80  # of 256: the two rows, and what rewards and tables take


def test_the_next_step_is_made_in_a_thread_while_this_one_is_used():
    made: list[tuple[int, bool]] = []
    ready = threading.Event()

    def make(step: int) -> int:
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            ready.set()
        return 10 * step

    ahead = Ahead(make)
    assert ahead(0) == 0
    assert ready.wait(10)  # nobody asked for step 1 yet
    assert ahead(1) == 10
    assert ahead(5) == 50  # not foreseen: the run was resumed
    assert made[:2] == [(0, True), (1, False)]
    assert (5, True) in made


def test_what_goes_wrong_ahead_is_told_when_its_step_comes():
    def make(step: int) -> int:
        if step:
            raise OSError("the disk is gone")
        return step

    ahead = Ahead(make)
    assert ahead(0) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(1)


class UNet:
    def __init__(self, **config: Any) -> None:
        self.config = SimpleNamespace(**{"in_channels": 4, "cross_attention_dim": 16} | config)


def test_rollouts_of_another_model_are_refused():
    given = Conditioning(FORM, [{"embeds": torch.zeros(1, 3, 16)}])
    data = Data(torch.zeros(2, 4, 2, 2), given, [], 0)
    check_fits(data, UNet(), "A", "A")
    with pytest.raises(ValueError, match="were made by A, but the model is a B"):
        check_fits(data, UNet(), "A", "B")
    with pytest.raises(ValueError, match=r"latents are \(4, 2, 2\), but .* 16 channels"):
        check_fits(data, UNet(in_channels=16), "A", "A")
    with pytest.raises(ValueError, match=r"texts are \(16,\), but .* 12 channels"):
        check_fits(data, UNet(cross_attention_dim=12), "A", "A")
    check_fits(data, UNet(cross_attention_dim=12, encoder_hid_dim=16), "A", "A")  # as Kolors
    other = Mixed([FORM, replace(FORM, shape=(5, 2, 2))], [*given.rows, *given.rows])
    with pytest.raises(ValueError, match=r"latents are \(5, 2, 2\), but .* 4 channels"):
        check_fits(replace(data, given=other), UNet(), "A", "A")


def test_shards_of_several_calls_keep_their_forms(tmp_path):
    run = run_of(tmp_path, 3, (4, 2, 2))
    other = replace(FORM, call={"height": 64}, shape=(4, 4, 2))
    tensors = run.shards[1].tensors() | {"latents": torch.full((4, 4, 4, 2), 1.0)}
    file = run.shards[1].folder / "tensors.safetensors"
    save_file(tensors, file, {"form": other.dumps()})
    data = load_data(run, "reward", "none", 2)
    assert [one.form for one in data.forms()] == [FORM, other]
    assert [i for i in range(6) if data.given[[i]].form == other] == [2, 3]
    for group in data.groups:
        assert data.latents[group.rows].shape[1:] == data.given[[group.prompt]].form.shape
    with pytest.raises(ValueError, match=r"rows \[1, 2\] of the conditioning have several forms"):
        data.given[[1, 2]]
    assert data.given[[0, 5]].form == FORM


def test_shards_of_earlier_versions_are_refused(tmp_path):
    run = run_of(tmp_path, 2, (4, 2, 2))
    file = run.shards[1].folder / "tensors.safetensors"
    save_file(run.shards[1].tensors(), file)
    with pytest.raises(ValueError, match="made by an earlier version"):
        load_data(run, "reward", "none", 2)
