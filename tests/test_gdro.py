"""The GDRO loop on small networks: exact resumption, groups, and that it learns what it should."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import family
from trainers import PROMPTS, data_of, gdro, gradient_of, moved, resumed, weights_of

from finetune import lora
from finetune.conditioning import Conditioning
from finetune.data import load_data
from finetune.gdro import Gdro
from finetune.groups import Group, draw_groups, make_groups, normalised, target_entropy
from finetune.learner import check_shares
from finetune.recording import record
from finetune.rollouts import Plan, generate, open_run
from finetune.shards import Rollouts, add_rewards
from finetune.state import load_state, save_state


def trainer_of(name="sd3", **changed):
    return gdro(*family(name), **changed)


def pipe_class():
    return type(family("sd3")[0])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_takes_a_step(name):
    trainer = trainer_of(name)
    before = weights_of(trainer)
    seen = trainer.train_step()
    # at an untouched adapter all scores are 0, and the loss is log k!
    assert seen["loss"] == pytest.approx(torch.tensor(4.0).lgamma().item(), abs=1e-4)
    assert seen["drift"] == pytest.approx(0, abs=1e-6)
    assert (weights_of(trainer) != before).any()
    assert torch.isfinite(weights_of(trainer)).all()


def test_ten_steps_are_five_and_a_resumed_five_bit_for_bit(tmp_path):
    whole, second, _ = resumed(trainer_of, tmp_path, 5, 5)
    for name, mean in whole.learner.average.weights.items():
        assert torch.equal(second.learner.average.weights[name], mean)
    assert not load_state(second, tmp_path / "nothing")


def test_how_groups_are_split_does_not_matter():
    one, many = trainer_of(groups=4, micro_groups=4), trainer_of(groups=4, micro_groups=1)
    for _ in range(3):
        a, b = one.train_step(), many.train_step()
        for name in a.keys() - {"accuracy"}:  # of scores that are 0 but for rounding
            assert a[name] == pytest.approx(b[name], abs=1e-4)
    torch.testing.assert_close(weights_of(one), weights_of(many), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"form": "full", "micro_images": 1},
        {"form": "top1", "micro_images": 2, "weight": "velocity", "hold_best": 0.0},
        {"form": "rank", "micro_images": 1, "shared_noise": False, "weight": "elbo"},
        {"form": "full", "micro_images": 4, "micro_groups": 2, "weight": "elbo", "hold_best": 3.0},
        {"form": "rank", "micro_images": 1, "micro_groups": 2, "refresh": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_image_by_image_the_gradient_is_that_of_the_whole_group(name, changed):
    rows = []
    whole, parts = (moved(trainer_of(name, **changed | more)) for more in ({"micro_images": 0}, {}))
    parts.learner.bare.register_forward_hook(
        lambda module, arguments, keywords, output: rows.append(
            (len(output[0]), torch.is_grad_enabled())
        ),
        with_kwargs=True,
    )
    (told, expected), (seen, found) = gradient_of(whole), gradient_of(parts)
    assert expected.norm() > 1e-4
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert seen == pytest.approx(told, rel=1e-3, abs=1e-5)
    assert {count for count, _ in rows} <= {changed["micro_images"], 6 % changed["micro_images"], 1}
    assert sum(count for count, grads in rows if grads) == 6  # each image once, two groups of three
    assert sum(count for count, grads in rows if not grads) == 12


def test_a_group_of_fewer_images_is_evaluated_image_by_image_too():
    whole, parts = (moved(trainer_of(k=4, micro_images=most)) for most in (0, 1))
    for trainer in (whole, parts):
        short = [Group(g.prompt, g.rows[:3], g.rewards[:3]) for g in trainer.data.groups]
        trainer.data = replace(trainer.data, groups=short)
    (told, expected), (seen, found) = gradient_of(whole), gradient_of(parts)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert seen == pytest.approx(told, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "form", ["full", *(pytest.param(other, marks=pytest.mark.slow) for other in ("top1", "rank"))]
)
def test_it_learns_to_order_the_images_of_its_groups(form):
    trainer = trainer_of(form=form, beta=200.0, lr=1e-2, hold_best=0.0, temperature=0.1, groups=3)
    first = last = trainer.train_step()
    for _ in range(40):
        last = trainer.train_step()
    assert last["loss"] < first["loss"] - 0.3
    assert last["accuracy"] > 0.7


def test_memory_of_the_reference_is_the_networks_own():
    trainer = trainer_of()
    frozen = [p for n, p in trainer.learner.bare.named_parameters() if ".lora_" not in n]
    before = [p.clone() for p in frozen]
    trainer.train_step()
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(frozen, before, strict=True))


def test_a_moved_reference_is_where_scores_are_0():
    trainer = trainer_of(refresh=2)
    trainer.train_step()
    assert abs(trainer.train_step()["spread"]) > 1e-5
    assert trainer.learner.anchor is not None
    assert trainer.train_step()["spread"] == pytest.approx(0, abs=1e-5)


def test_a_second_round_goes_on_from_its_lora(tmp_path):
    first, second = trainer_of(), trainer_of()
    for _ in range(3):
        first.train_step()
    with lora.swapped(first.learner.weights, first.learner.average.weights):
        lora.save(pipe_class(), first.learner.model.part, first.learner.bare, tmp_path)
    read = lora.read(tmp_path, second.learner.model.part, second.learner.weights, 2)
    second.learner.start_from(read)
    for name, value in first.learner.average.weights.items():
        assert torch.equal(second.learner.weights[name], value)
    assert second.train_step()["spread"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="another alpha"):
        lora.read(tmp_path, second.learner.model.part, second.learner.weights, 4)
    with pytest.raises(
        ValueError, match=r"another rank .* \(0 of its .* and transformer\..* does not"
    ):
        lora.read(tmp_path, second.learner.model.part, trainer_of(rank=3).learner.weights, 2)
    with pytest.raises(ValueError, match="no readable LoRA"):
        lora.read(tmp_path / "none", second.learner.model.part, second.learner.weights, 2)
    stored = load_file(tmp_path / lora.FILE)
    next(iter(stored.values()))[0, 0] = math.nan
    about = {"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'}
    save_file(stored, tmp_path / lora.FILE, about)
    with pytest.raises(ValueError, match="not finite, such as in"):
        lora.read(tmp_path, second.learner.model.part, second.learner.weights, 2)


def test_a_resumed_run_keeps_its_moved_reference(tmp_path):
    resumed(trainer_of, tmp_path, 3, 2, refresh=2)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move():
    trainer = trainer_of()
    held: Any = trainer.data.latents
    latents = torch.full(held.shape, float("nan"))
    trainer.data = replace(trainer.data, latents=latents)
    before = weights_of(trainer)
    with pytest.raises(FloatingPointError, match="step 0: implicit scores are not finite"):
        trainer.train_step()
    assert torch.equal(weights_of(trainer), before)


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    trainer = trainer_of()
    save_state(trainer, tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    trainer.train_step()

    def full(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"state of step 1 .*No space left.* is kept"):
        save_state(trainer, tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(("groups", "equal"), [(1, False), (3, True)])
def test_groups_that_leave_a_process_without_work_are_refused(groups, equal):
    with pytest.raises(ValueError, match="2 processes need"):
        check_shares(groups, 2, equal)
    check_shares(2, 2, equal)


@pytest.mark.parametrize("sizes", [{"groups": 3}, {"groups": 1, "micro_images": 1}], ids=str)
def test_gradients_are_exchanged_at_the_last_part_alone(sizes, monkeypatch):
    trainer, held = trainer_of(**sizes), []

    @contextmanager
    def no_sync(model):
        held.append("held")
        yield
        held.append("released")

    monkeypatch.setattr(trainer.learner.accelerator, "no_sync", no_sync)
    trainer.learner.bare.register_forward_hook(
        lambda *_: held.append("forward") if torch.is_grad_enabled() else None
    )
    trainer.train_step()
    assert held == ["held", "forward", "released"] * 2 + ["forward"]


def test_shifted_times_lean_to_noise():
    flat, shifted = (
        trainer_of(groups=64, micro_groups=64),
        trainer_of(groups=64, micro_groups=64, shift=3.0),
    )
    ((*_, t, _, _),) = flat._micro_batches(0)
    ((*_, u, _, _),) = shifted._micro_batches(0)
    torch.testing.assert_close(u, 3 * t / (1 + 2 * t))


def test_rollouts_with_rewards_become_data(tmp_path):
    pipe, call = family("sd")
    plan = Plan(prompts=tuple(PROMPTS), images=3, prompts_per_shard=2, call=call)
    open_run(tmp_path, pipe, plan, None, resume=False)
    list(generate(tmp_path, pipe, plan))
    run = Rollouts(tmp_path)
    with pytest.raises(ValueError, match="no rewards 'reward'; there are none yet"):
        load_data(run, "reward", "none", 2)
    values = iter(range(9))
    for shard in run.shards:
        rows = len(shard.table(["group"]))
        add_rewards(shard, {"score": [float(next(values)) for _ in range(rows)]})
    with pytest.raises(ValueError, match=r"there are \['score'\]"):
        load_data(run, "reward", "none", 2)
    data = load_data(run, "score", "none", 2)
    assert [g.rewards.tolist() for g in data.groups] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert len(data.latents) == 9
    given = record(pipe, PROMPTS, **call)
    assert isinstance(data.given, Conditioning)
    assert data.given.form == given.form
    for ours, theirs in zip(data.given.rows, given.rows, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- groups


def test_groups_without_a_spread_are_left_out_and_counted():
    groups, *left_out = make_groups([0, 0, 1, 1, 2, 2], torch.tensor([1.0, 1, 0, 2, 3, 3]), 2)
    assert left_out == [2, 0]
    assert [(g.prompt, g.rows.tolist()) for g in groups] == [(1, [2, 3])]


@pytest.mark.parametrize(
    ("rewards", "k", "message"),
    [
        (
            [1.0, float("nan"), 2.0, 3.0],
            2,
            r"1 of 4 rewards are not finite, in rows \[1\]: more tha",
        ),
        ([1.0, 2.0, 3.0], 2, r"one prompt and one reward per row are needed"),
        ([1.0, 2.0, 3.0, 4.0], 3, r"2 of 2 prompts have fewer than k = 3 images .*set k=2"),
        ([1.0, 1.0, 3.0, 3.0], 2, "nothing to learn"),
    ],
)
def test_rewards_that_cannot_be_trained_on_are_refused(rewards, k, message):
    with pytest.raises(ValueError, match=message):
        make_groups([0, 0, 1, 1], torch.tensor(rewards), k)


def test_an_image_without_a_score_is_left_out_of_its_group_and_counted():
    rewards = torch.tensor([float(i % 4) for i in range(24)])
    rewards[1] = math.nan
    rewards[9] = -math.inf
    prompts = [i // 4 for i in range(24)]
    groups, dropped, unscored = make_groups(prompts, rewards, 4)
    assert (dropped, unscored) == (0, 2)
    assert [len(group.rows) for group in groups] == [3, 4, 3, 4, 4, 4]
    assert all(group.rewards.isfinite().all() for group in groups)
    assert 1 not in groups[0].rows
    rewards[16] = math.nan
    with pytest.raises(ValueError, match=r"3 of 24 .* in rows \[1, 9, 16\]: more than 10% of all"):
        make_groups(prompts, rewards, 4)
    rewards = torch.arange(40.0)
    rewards[1:4] = math.nan  # one image is left of the first prompt: it has nothing to compare
    groups, dropped, unscored = make_groups([i // 4 for i in range(40)], rewards, 4)
    assert (len(groups), dropped, unscored) == (9, 1, 3)


def test_places_behind_the_images_of_a_group_have_no_reward():
    groups = [Group(0, torch.tensor([3, 5]), torch.tensor([1.0, 2.0]))]
    _, rows, rewards = draw_groups(groups, 1, 4, torch.Generator().manual_seed(0))
    assert rewards.isnan().tolist() == [[False, False, True, True]]
    assert set(rows[0].tolist()) <= {3, 5}
    assert dict(zip(rows[0, :2].tolist(), rewards[0, :2].tolist(), strict=True)) == {3: 1.0, 5: 2.0}


@pytest.mark.parametrize("form", ["full", "top1", "rank"])
def test_a_group_of_fewer_images_is_learned_from_as_if_it_had_been_drawn_so(form):
    """The very gradient of a run whose groups have three images, where the fourth has no score."""
    pipe, call = family("sd3")
    with torch.no_grad():
        data = data_of(pipe, call, m=4)
    short = [Group(g.prompt, g.rows[:3], g.rewards[:3]) for g in data.groups]
    found = []
    for k in (3, 4):
        trainer = trainer_of(k=k, form=form, groups=1, micro_groups=1)
        trainer.data = replace(data, groups=short)
        trainer.train_step()
        seen = trainer.train_step()
        found.append((seen, [p.detach().clone() for p in trainer.learner.weights.values()]))
    assert found[0][0].keys() == found[1][0].keys()
    for name in found[0][0].keys() - {"accuracy"}:  # an order of scores that are still alike
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=1e-4, abs=1e-5), name
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_normalisations():
    groups = [
        Group(0, torch.arange(3), torch.tensor([0.0, 2.0, 4.0])),
        Group(1, torch.arange(3), torch.tensor([10.0, 10.0, 20.0])),
    ]
    of = {
        how: [g.rewards for g in normalised(groups, how)]
        for how in ("minmax", "rank", "group_std", "global_std", "none")
    }
    assert of["minmax"][1].tolist() == [0.5, 0.5, 1.0]
    assert of["rank"][0].tolist() == [0.0, 0.5, 1.0]
    assert of["rank"][1].tolist() == [0.25, 0.25, 1.0]
    assert of["group_std"][0].std(correction=0).item() == pytest.approx(1)
    both = torch.cat([r - r.mean() for r in of["global_std"]])
    assert both.square().mean().item() == pytest.approx(1)
    assert of["none"][0].tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(ValueError, match="unknown"):
        normalised(groups, "zscore")


def test_draws_use_every_prompt_before_any_twice_and_images_once():
    groups = [Group(i, torch.arange(5) + 5 * i, torch.rand(5)) for i in range(4)]
    prompts, rows, rewards = draw_groups(groups, 6, 3, torch.Generator().manual_seed(0))
    assert sorted(prompts[:4].tolist()) == [0, 1, 2, 3]
    for prompt, row, reward in zip(prompts.tolist(), rows, rewards, strict=True):
        assert len(set(row.tolist())) == 3
        assert torch.equal(reward, groups[prompt].rewards[row - 5 * prompt])


def test_entropy_of_the_target_is_1_without_and_0_with_one_best():
    rewards = torch.tensor([[0.3, 0.3, 0.3], [0.0, 0.0, 9.0]])
    torch.testing.assert_close(target_entropy(rewards, 0.05), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    "change",
    [{"k": 1}, {"beta": 0.0}, {"steps": 0}, {"weight": "snr"}, {"times": "cosine"}],
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError, match="but"):
        Gdro(**change)


@pytest.mark.parametrize("name", [pytest.param("sd", marks=pytest.mark.slow), "sd3"])
def test_a_compiled_network_learns_the_same_and_is_compiled_once(name, monkeypatch):
    compiled, compiling = [], torch.compile
    # dynamo's trace, which pytest would keep line by line, takes most of the time
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])

    def eagerly(function, **how):
        def count(graph, inputs):
            compiled.append(len(inputs))
            return graph.forward

        return compiling(function, backend=count, **how)

    monkeypatch.setattr(torch, "compile", eagerly)
    plain, fast = trainer_of(name), trainer_of(name, compile=True, refresh=2)
    counts = []
    for _ in range(2):
        torch.testing.assert_close(plain.train_step(), fast.train_step(), atol=1e-5, rtol=1e-4)
        counts.append(len(compiled))
    assert counts == [2, 2]  # with the adapter and without it
    torch.testing.assert_close(weights_of(fast), weights_of(plain), atol=1e-6, rtol=1e-4)
    for _ in range(3):
        fast.train_step()
    assert len(compiled) == 3  # the reference has moved: with an adapter, without gradients
