"""Images of several sizes in one run: each micro-batch has one, and processes stay in step."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Generator

from finetune import load_data
from finetune.buckets import dealt, noises
from finetune.conditioning import Conditioning
from finetune.gdro import Gdro, GdroTrainer
from finetune.network import Model
from finetune.shards import Rollouts
from steering import tiny
from tilt.commands import rollout, score, train_gdro


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_groups_of_one_kind_are_dealt_as_ever(world, most):
    for count, rank in ((n, r) for n in range(world, 14) for r in range(world)):
        mine = torch.arange(rank, count, world).split(most)
        assert dealt([0] * count, rank, world, most) == [part.tolist() for part in mine]


def test_every_group_is_dealt_once_in_batches_of_one_kind_and_equal_for_all_processes():
    choose = random.Random(0)
    for _ in range(300):
        world, most = choose.randint(1, 4), choose.randint(1, 4)
        turns = choose.randint(1, 6)
        kinds = [choose.randint(0, 3) for _ in range(world * turns)]
        shares = [dealt(kinds, rank, world, most) for rank in range(world)]
        every = [i for share in shares for batch in share for i in batch]
        assert sorted(every) == list(range(len(kinds)))
        assert all(len({kinds[i] for i in batch}) == 1 for share in shares for batch in share)
        assert len({tuple(map(len, share)) for share in shares}) == 1
        assert max(len(batch) for share in shares for batch in share) <= most


def test_groups_of_a_kind_are_evaluated_together():
    assert dealt([0, 1, 0, 1, 0], 0, 1, 2) == [[0, 2], [4], [1, 3]]


def test_noise_of_one_shape_is_drawn_at_once():
    shape = (3, 5, 7)  # odd: apart, other numbers would be drawn
    found = noises([shape] * 4, 2, Generator().manual_seed(0))
    assert torch.equal(
        torch.stack(found), torch.randn(4, 2, *shape, generator=Generator().manual_seed(0))
    )
    mixed = noises([shape, (2, 4), shape], 1, Generator().manual_seed(0))
    assert [tuple(one.shape) for one in mixed] == [(1, *shape), (1, 2, 4), (1, *shape)]
    assert len({float(one.flatten()[0]) for one in mixed}) == 3


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two folders of rollouts of one model: 64 x 64 and 64 x 96 pixels."""
    folder = tmp_path_factory.mktemp("sizes")
    for width, words in ((64, ("CAT", "SUN")), (96, ("SUN", "DOG", "OWL"))):
        file = folder / f"{width}.txt"
        file.write_text("".join(f'the word "{word}"\n' for word in words))
        line = [f"--prompts={file}", f"--out={folder / str(width)}", "--images=3", "--seed=1"]
        call = ["--call.num-inference-steps=1", "--call.guidance-scale=1.0"]
        assert rollout.main([*line, *call, "--call.height=64", f"--call.width={width}"]) == 0
        assert score.main([str(folder / str(width)), "--reward", "jpeg", "--device", "cpu"]) == 0
    return folder


def trainer_of(made: Path, **changed: Any) -> GdroTrainer:
    pipe: Any = tiny.load("tiny-sd3")
    data = load_data([Rollouts(made / size) for size in ("64", "96")], "reward", "none", 2)
    settings = Gdro(**{"groups": 5, "k": 2, "rank": 2, "alpha": 2, "lr": 1e-3} | changed)
    return GdroTrainer(pipe.transformer, Model(pipe), data, settings, Accelerator(cpu=True))


def test_two_sizes_are_learned_in_one_step_as_each_by_itself(made):
    """The loss and the gradient are the means over the groups of both, whatever the batches."""
    whole, alone = trainer_of(made, micro_groups=4), trainer_of(made, micro_groups=1)
    inputs = whole._inputs(0)
    assert sorted(part.x0.shape[-1] for part in inputs) == [16, 24]
    assert sum(len(part.t) for part in inputs) == 5
    assert all(part.noise.shape[2:] == part.given.form.shape for part in inputs)
    for _ in range(3):
        a, b = whole.train_step(), alone.train_step()
        for name in a.keys() - {"accuracy"}:  # of scores that are 0 but for rounding
            assert a[name] == pytest.approx(b[name], abs=1e-4)
    for ours, theirs in zip(
        whole.learner.weights.values(), alone.learner.weights.values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_every_process_has_as_many_calls_of_the_network(made, monkeypatch):
    """FSDP gathers weights in every call, so all processes must make as many as any other."""
    trainer = trainer_of(made, groups=6, micro_groups=2)
    for step in range(20):
        shares = []
        for rank in range(2):
            place = SimpleNamespace(process_index=rank, num_processes=2)
            monkeypatch.setattr(trainer.learner, "accelerator", place)
            shares.append([*trainer._micro_batches(step)])
        assert len({tuple(len(t) for *_, t, _, _ in share) for share in shares}) == 1


@pytest.mark.parametrize("images", [1, 3])
def test_every_process_makes_as_many_calls_image_by_image(made, monkeypatch, images):
    trainer = trainer_of(made, groups=6, micro_groups=3, micro_images=images)

    def called(network: Any, given: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
        calls.append(len(x))
        return torch.zeros_like(x)

    monkeypatch.setattr(trainer.learner.model, "_predict", called)
    device = trainer.learner.accelerator.device
    for step in range(10):
        counts = set()
        for rank in range(2):
            place = SimpleNamespace(process_index=rank, num_processes=2, device=device)
            monkeypatch.setattr(trainer.learner, "accelerator", place)
            calls: list[int] = []
            for part in [part for micro in trainer._inputs(step) for part in trainer._parts(micro)]:
                part()
            counts.add(tuple(calls))
        assert len(counts) == 1


def test_prompts_of_several_lengths_are_batched_by_their_lengths(made):
    """Else one process would call the network once, and another twice."""
    trainer = trainer_of(made, groups=4, micro_groups=2)
    data = load_data(Rollouts(made / "96"), "reward", "none", 2)
    assert isinstance(data.given, Conditioning)
    rows = [dict(row) for row in data.given.rows]
    (name,) = {name for name, value in rows[0].items() if value.ndim == 3}
    rows[1][name] = rows[1][name][:, :5]
    trainer.data = replace(data, given=replace(data.given, rows=rows))
    for step in range(10):
        for part in trainer._inputs(step):
            assert len([*part.given.repeated(2).parts()]) == 1
    assert torch.isfinite(torch.tensor(trainer.train_step()["loss"]))


def test_the_command_trains_on_folders_of_two_sizes(made, tmp_path, capsys):
    line = ["--rollouts", str(made / "64"), str(made / "96"), f"--out={tmp_path / 'out'}"]
    small = ["--gdro.groups=4", "--gdro.k=2", "--gdro.rank=2", "--log-every=1"]
    assert train_gdro.main([*line, *small, "--gdro.steps=1"]) == 0
    assert "5 prompts; 0 left out" in capsys.readouterr().out
    assert train_gdro.main([*line, *small, "--gdro.steps=2", "--resume"]) == 0
    assert '"width": 96' in (tmp_path / "out/lora/README.md").read_text()
