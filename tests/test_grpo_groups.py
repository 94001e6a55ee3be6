"""Policy gradients: how groups are split and shared out, and images without a score."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import family
from trainers import (
    assert_image_by_image,
    gradient_of,
    grpo,
    moved,
    passes,
    places,
    some_flat,
    weights_of,
    with_every_group,
)

from finetune import online
from finetune.learner import check_shares
from finetune.online import Compared


def trainer_of(name="sd3", **changed):
    return grpo(*family(name), **changed)


def test_how_groups_are_split_does_not_matter():
    one, many = trainer_of(micro_groups=3), trainer_of(micro_groups=1)
    for _ in range(2):
        a, b = one.train_step(), many.train_step()
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5)
    torch.testing.assert_close(weights_of(one), weights_of(many), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "changed"),
    [
        (1, {"kl": 0.1}),
        (3, {"micro_groups": 3, "updates": 2, "ratio": "guard"}),
        (3, {"share_start": False}),
    ],
    ids=str,
)
def test_image_by_image_the_gradient_is_that_of_the_whole_group(size, changed):
    assert_image_by_image(trainer_of, size, score=places, **changed)


@pytest.mark.parametrize(
    ("changed", "rows"),
    [
        ({"micro_groups": 1}, [4, 4]),
        ({"micro_groups": 3}, [4, 4]),
        ({"micro_groups": 3, "micro_images": 3}, [3, 3, 1, 1]),
        ({"micro_groups": 3, "updates": 2}, [4, 4] * 2),
        ({"micro_groups": 1, "kl": 0.1}, [4] * 6),
    ],
    ids=str,
)
def test_groups_without_a_spread_are_left_out_and_the_gradient_stays(changed, rows):
    found, every = [], []
    short = passes(moved(trainer_of(score=some_flat, **changed)), found)
    whole = passes(with_every_group(moved(trainer_of(score=some_flat, **changed))), every)
    (seen, a), (told, b) = gradient_of(short), gradient_of(whole)
    assert found == rows
    assert sum(every) == 24 * changed.get("updates", 1)
    assert a.norm() > 1e-5
    assert (a - b).norm() < 1e-4 * b.norm()
    assert seen["flat_groups"] == told["flat_groups"] == pytest.approx(2 / 3)
    assert seen["loss"] == pytest.approx(told["loss"], abs=1e-6)
    if changed.get("updates", 1) == 1:
        assert seen["ratio"] == told["ratio"] == 1.0


@pytest.mark.parametrize("sharded", [False, True])
def test_where_processes_keep_in_step_all_groups_are_computed(sharded, monkeypatch):
    rows = []
    trainer = passes(trainer_of(score=some_flat), rows)
    monkeypatch.setattr(online, "in_step", lambda accelerator: sharded)
    trainer.train_step()
    assert sum(rows) == (24 if sharded else 8)


def test_of_groups_without_any_spread_one_remains_in_which_processes_exchange_gradients():
    rows = []
    trainer = passes(
        trainer_of(score=lambda images, _: (torch.full((len(images),), 0.1), {})), rows
    )
    before = weights_of(trainer)
    seen = trainer.train_step()
    assert rows == [4, 4]
    assert seen["flat_groups"] == seen["ratio"] == 1.0
    assert torch.equal(weights_of(trainer), before)


def test_what_is_compiled_gets_batches_of_one_size():
    trainer = trainer_of(micro_groups=3)
    trainer.settings.compile = True
    compared = Compared([torch.tensor([0.0] * 8 + [1.0, -1, 0, 0])], [], [12])
    assert trainer.samples.rows(compared, [0], idle=True) == [(0, list(range(12)))]
    trainer.settings.compile = False
    assert trainer.samples.rows(compared, [0], idle=True) == [(0, [8, 9, 10, 11])]


def test_minibatches_are_disjoint_parts_of_the_epochs_groups():
    more: dict[str, Any] = {"groups": 4, "micro_groups": 2, "score": places}
    trainer, by_hand = (moved(trainer_of(**more, minibatches=two)) for two in (2, 1))
    counts, descend = [], trainer.learner.descend
    trainer.learner.descend = lambda parts, count: counts.append(count) or descend(parts, count)
    seen, found = gradient_of(trainer)
    assert counts == [16, 16]  # two groups of four images, two steps of the window
    assert (trainer.step, trainer.learner.step) == (1, 2)
    assert trainer.samples.shares(0) == [[0, 1], [2, 3]]
    batches = [by_hand._sampled(0, groups) for groups in ([0, 1], [2, 3])]
    compared = by_hand.samples.compared(batches)
    parts, weights = [], by_hand.learner.weights.values()
    by_hand.learner.optimizer.step = lambda: parts.extend(
        p.grad.flatten() for p in weights if p.grad is not None
    )
    told = [by_hand._update(batches, compared, [], [place]) for place in (0, 1)]
    assert (found - torch.cat(parts)).norm() < 1e-4 * found.norm()
    assert seen["grad_norm"] == pytest.approx(sum(x["grad_norm"] for x in told) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="groups is 3 but 2 minibatches need equal numbers"):
        trainer_of(minibatches=2)
    with pytest.raises(ValueError, match="groups is 4 but 2 minibatches on 4 processes need"):
        check_shares(4, 4, True, 2)


def test_processes_share_the_groups_of_each_minibatch():
    trainer = trainer_of(groups=8, minibatches=2, micro_groups=2)
    for rank, expected in enumerate(([[0, 2], [4, 6]], [[1, 3], [5, 7]])):
        trainer.learner.accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        assert trainer.samples.shares(0) == expected
    trainer.settings.micro_groups = trainer.settings.minibatches = 1
    assert trainer.samples.shares(0) == [[1], [3], [5], [7]]


def test_groups_of_other_shapes_are_evaluated_apart_and_equally_often_by_all_processes(monkeypatch):
    """As FSDP needs: a list of two kinds would be two passes, where another process makes one."""
    trainer = trainer_of(groups=8, minibatches=2, micro_groups=2)
    samples = trainer.samples
    names = [name for name, axis in samples.task.given.form.axes.items() if axis == 0]
    long = {n: torch.cat([x, x], 1) for n in names if (x := samples.task.given.rows[0][n]).ndim > 2}
    rows = [dict(row) for row in samples.task.given.rows]
    rows[0] |= long
    given = replace(samples.task.given, rows=rows)
    samples.task = replace(samples.task, given=given)
    monkeypatch.setattr(samples, "_chosen", lambda epoch: [0, 1, 1, 2, 1, 0, 2, 0])
    shares = []
    for rank in range(2):
        trainer.learner.accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        shares.append(samples.shares(0))
    assert shares == [[[0], [2], [4], [5]], [[1], [3], [6], [7]]]
    trainer.learner.accelerator = SimpleNamespace(process_index=0, num_processes=1)
    assert samples.shares(0) == [[0], [1, 2], [3], [4, 6], [5, 7]]
    batches: Any = [SimpleNamespace(groups=groups) for groups in samples.shares(0)]
    assert samples.minibatches(batches) == [[0, 1, 2], [3, 4]]


def test_rewards_that_are_not_finite_stop_it_and_are_named():
    def broken(images, prompts):
        return torch.full((len(images),), float("nan")), {}

    with pytest.raises(
        FloatingPointError, match="12 of 12 images have no finite reward, such as one of"
    ):
        trainer_of(score=broken, micro_groups=3).train_step()


def without(*rows, also=None):
    """Brightness, but of these of all images that are scored no score; also: another component."""
    seen = [0]

    def score(images, _):
        values = images.mean((1, 2, 3)) * 10
        for i in range(len(values)):
            values[i] = math.nan if seen[0] + i in rows else values[i]
        seen[0] += len(values)
        return values, {"brightness": values} | ({"also": also(values)} if also else {})

    return score


@pytest.mark.parametrize("spread", ["group", "global"])
@pytest.mark.parametrize("micro", [1, 3])
def test_an_image_without_a_score_is_as_if_it_had_not_been_drawn(spread, micro):
    """The gradient is the mean over the others, with advantages among them."""
    given = {"spread": spread, "micro_groups": micro, "groups": 3, "k": 4, "kl": 0.1}
    found, by_hand = trainer_of(score=without(1), **given), trainer_of(score=without(), **given)
    seen = found.train_step()
    batches = [by_hand._sampled(0, part) for part in by_hand.samples.shares(0)]
    rewards = torch.cat([batch.rewards for batch in batches])
    others = [rewards[0, [0, 2, 3]], rewards[1], rewards[2]]
    every = torch.cat(others).std() + 1e-4
    wanted = torch.zeros(3, 4)
    for row, among, own in zip(range(3), ([0, 2, 3], slice(4), slice(4)), others, strict=True):
        deviation = own.std() + 1e-4 if spread == "group" else every
        wanted[row, among] = ((own - own.mean()) / deviation).clamp(-5, 5)
    parts = []
    for batch, advantages in zip(batches, wanted.split(micro), strict=True):
        counts = torch.ones(advantages.numel())
        counts[1] = 0.0 if not parts else 1.0
        for move in batch.moves:

            def part(batch=batch, move=move, advantages=advantages, counts=counts):
                loss, _ = by_hand._loss(batch.given, move, advantages.flatten(), None)
                return loss * counts, {}

            parts.append(part)
    norm = by_hand.learner.descend(parts, 11 * len(batches[0].moves))["grad_norm"]
    assert seen["grad_norm"] == pytest.approx(norm, rel=1e-4)
    # Adam turns the rounding of the smallest gradients into a share of its step of 1e-3
    torch.testing.assert_close(weights_of(found), weights_of(by_hand), atol=2e-5, rtol=0)
    assert seen["dropped"] == 1
    assert seen["reward"] == pytest.approx(float(torch.cat(others).mean()), rel=1e-5)
    assert seen["spread"] == pytest.approx(sum(float(x.std()) for x in others) / 3, rel=1e-4)
    assert found.samples.dropped == 1
    assert found.samples.drawn == 12
    again = trainer_of(**given)
    again.load_state_dict(found.state_dict())
    assert (again.samples.dropped, again.samples.drawn) == (1, 12)


def test_a_share_of_images_without_a_score_stops_the_run():
    trainer = trainer_of(score=without(1, 14, 26))
    assert [trainer.train_step()["dropped"] for _ in range(2)] == [1, 1]
    assert trainer.train_step()["dropped"] == 1  # 3 of 36
    trainer = trainer_of(score=without(1, 2))
    before = weights_of(trainer)
    with pytest.raises(FloatingPointError, match=r"2 of 12 images .* more than 10%"):
        trainer.train_step()
    assert torch.equal(weights_of(trainer), before)


def test_a_component_that_is_only_reported_may_have_no_score_at_all():
    score = without(also=lambda values: torch.full_like(values, math.nan))
    trainer = trainer_of(score=score, each_reward=True)
    trainer.samples.task.weights["also"] = 0.0
    seen = trainer.train_step()
    assert math.isnan(seen["also"])
    assert seen["dropped"] == 0
    assert math.isfinite(seen["grad_norm"])
    assert seen["grad_norm"] > 0
