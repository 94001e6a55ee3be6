"""Rollouts: what a shard holds, that it is whole, and that nothing depends on how it was cut."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import family

from finetune import rollouts
from finetune.rollouts import Plan, generate, open_run
from finetune.shards import Rollouts, add_rewards
from steering import FeynmanKac, generators

PROMPTS = ("a red star", "two blue circles", "a cross")


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def made(folder, name="sd", world=1, resume=False, **plan):
    pipe, call = family(name)
    keywords = {"prompts": PROMPTS, "images": 2, "prompts_per_shard": 2, "call": call} | plan
    plan = Plan(**keywords)
    open_run(folder, pipe, plan, None, resume)
    for rank in range(world):
        for _ in generate(folder, pipe, plan, brightness, rank, world):
            pass
    return Rollouts(folder)


def everything(run):
    rows = [row for shard in run.shards for row in shard.table()]
    latents = torch.cat([shard.tensors()["latents"] for shard in run.shards])
    return rows, latents


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_plain_rollouts_are_the_pipelines_own_images(tmp_path, name):
    run = made(tmp_path / "run", name)
    rows, latents = everything(run)
    assert [(r["prompt"], r["group"], r["index"]) for r in rows] == [
        (prompt, i, j) for i, prompt in enumerate(PROMPTS) for j in range(2)
    ]
    pipe, call = family(name)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            draws = generators(0, [prompt], 2)
            out = pipe(prompt, num_images_per_prompt=2, generator=draws, **call)
            draws = generators(0, [prompt], 2)
            own = pipe(
                prompt, num_images_per_prompt=2, generator=draws, output_type="latent", **call
            )
        assert torch.equal(latents[2 * i : 2 * i + 2], own[0])
        shard = run.shards[i // 2]
        for j in range(2):
            kept = list(shard.images())[2 * (i % 2) + j]
            assert np.array_equal(np.array(kept), np.array(out[0][j]))


def test_neither_shards_nor_processes_change_an_image(tmp_path):
    one, latents = everything(made(tmp_path / "one"))
    two, others = everything(made(tmp_path / "two", prompts_per_shard=1, world=2))
    assert one == two
    assert torch.equal(latents, others)


def test_steered_images_stand_beside_plain_ones_with_their_weights(tmp_path):
    settings = FeynmanKac(reward_scale=50.0)
    run = made(tmp_path / "run", steered=4, settings=settings)
    rows, latents = everything(run)
    assert [row["steered"] for row in rows[:6]] == [False] * 2 + [True] * 4
    assert {row["log_weight"] for row in rows if not row["steered"]} == {0.0}
    assert len({row["log_weight"] for row in rows if row["steered"]}) > 1
    assert json.loads(rows[2]["settings"])["reward_scale"] == 50.0
    assert len({tuple(x.flatten().tolist()) for x in latents}) == len(latents)
    _, own = everything(made(tmp_path / "plain"))
    assert torch.equal(latents[:2], own[:2])


def test_only_what_is_missing_or_damaged_is_made_again(tmp_path):
    folder = tmp_path / "run"
    before, latents = everything(made(folder))
    kept = (folder / "00000" / "tensors.safetensors").stat().st_mtime_ns
    damaged = folder / "00001" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"00001; make the rollouts again with resume=true"):
        Rollouts(folder)
    after, again = everything(made(folder, resume=True))
    assert after == before
    assert torch.equal(again, latents)
    assert (folder / "00000" / "tensors.safetensors").stat().st_mtime_ns == kept


def test_a_process_that_dies_in_a_shard_leaves_the_others_whole(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    pipe, call = family("sd")
    plan = Plan(prompts=PROMPTS, images=2, prompts_per_shard=2, call=call)
    open_run(folder, pipe, plan, None, resume=False)
    work = generate(folder, pipe, plan)
    next(work)
    monkeypatch.setattr(rollouts, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        next(work)
    monkeypatch.undo()
    assert (folder / "00000" / "shard.json").is_file()
    assert not (folder / "00001").exists()
    one, _ = everything(made(folder, resume=True))
    other, _ = everything(made(tmp_path / "whole"))
    assert one == other


def test_progress_is_told_at_every_step_of_every_call_and_goes_on_from_what_is_there(tmp_path):
    told: list[tuple[float, int]] = []
    pipe, call = family("sd")
    plan = Plan(
        prompts=PROMPTS,
        images=4,
        steered=4,
        settings=FeynmanKac(reward_scale=1, num_scores=1, funnel=(2,)),
        prompts_per_shard=2,
        call=call,
    )
    folder = tmp_path / "run"
    open_run(folder, pipe, plan, None, resume=False)
    steps = call["num_inference_steps"]
    work = generate(folder, pipe, plan, brightness, drawn=lambda *now: told.append(now))
    next(work)
    del work  # not drawn on
    first = [4 * call + 4 * (step + 1) / steps for call in range(4) for step in range(steps)]
    assert [done for done, _ in told] == pytest.approx(first)  # of two prompts: 16 of all 24
    told.clear()
    for _ in generate(folder, pipe, plan, brightness, drawn=lambda *now: told.append(now)):
        pass
    assert [done for done, _ in told] == pytest.approx(
        [16 + 4 * call + 4 * (step + 1) / steps for call in range(2) for step in range(steps)]
    )
    assert {total for _, total in told} == {24}


def test_a_run_is_complete_only_if_it_is_this_very_run_and_whole(tmp_path):
    pipe, call = family("sd")
    plan = Plan(prompts=PROMPTS, images=2, prompts_per_shard=2, call=call)
    folder = tmp_path / "run"
    assert not rollouts.is_complete(folder, plan, None, "sd")
    open_run(folder, pipe, plan, None, False, "sd", "a LoRA's digest")
    assert not rollouts.is_complete(folder, plan, None, "sd", "a LoRA's digest")
    for _ in generate(folder, pipe, plan):
        pass
    assert rollouts.is_complete(folder, plan, None, "sd", "a LoRA's digest")
    assert not rollouts.is_complete(folder, plan, None, "sd", "another's")
    assert not rollouts.is_complete(folder, plan, None, "other", "a LoRA's digest")
    assert not rollouts.is_complete(folder, plan, "jpeg", "sd", "a LoRA's digest")
    assert not rollouts.is_complete(folder, replace(plan, seed=1), None, "sd", "a LoRA's digest")
    (folder / "00001" / "table.parquet").write_bytes(b"damaged")
    assert not rollouts.is_complete(folder, plan, None, "sd", "a LoRA's digest")


def test_the_table_loads_with_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    run = made(tmp_path / "run")
    files = [str(shard.folder / "table.parquet") for shard in run.shards]
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["prompt"] == [p for p in PROMPTS for _ in range(2)]
    assert np.array_equal(np.array(loaded[1]["image"]), np.array(list(run.shards[0].images())[1]))


def test_rewards_are_added_as_columns(tmp_path):
    run = made(tmp_path / "run")
    shard = run.shards[0]
    assert shard.rewards() == {}
    add_rewards(shard, {"a": [1.0, 2.0, 3.0, 4.0]})
    add_rewards(shard, {"b": [0.5] * 4, "a": [0.0, 2.0, 3.0, 4.0]})
    assert shard.rewards() == {"a": [0.0, 2.0, 3.0, 4.0], "b": [0.5] * 4}
    Rollouts(tmp_path / "run")  # the shard is still whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 1}, "make no group"),
        ({"steered": 1}, "needs several particles"),
        ({"prompts": ("a", "b", "a")}, "the prompt 'a' is given twice"),
        ({"prompts": ()}, "there is no prompt"),
        ({"references": ((),)}, "references has 1 entries for 3 prompts"),
        ({"references": ("a.png",) * 3}, "a tuple of file names for each prompt"),
        ({"prompts_per_shard": 0}, "must be a whole number, 1"),
    ],
)
def test_plans_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"prompts": PROMPTS} | change)


def test_steered_rollouts_pass_each_prompt_s_references(tmp_path):
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    seen = []

    def compared(images, prompts, *, references=None):
        seen.append((set(prompts), {one[0].getpixel((0, 0)) for one in references or ()}))
        return images.mean((1, 2, 3))

    compared.wants_references = True  # type: ignore[attr-defined]
    pipe, call = family("sd")
    names = tuple((str(tmp_path / f"{colour}.png"),) for colour in ("red", "blue"))
    plan = Plan(("a", "b"), images=1, steered=2, call=call, references=names)
    open_run(tmp_path / "run", pipe, plan, None, resume=False)
    list(generate(tmp_path / "run", pipe, plan, compared))
    assert {(min(p), *c) for p, c in seen} == {("a", (255, 0, 0)), ("b", (0, 0, 255))}
    open_run(tmp_path / "run", pipe, plan, None, resume=True)
    other = replace(plan, references=names[::-1])
    with pytest.raises(ValueError, match="begun with another references="):
        open_run(tmp_path / "run", pipe, other, None, resume=True)


def test_the_command_reads_the_references_of_its_prompts(tmp_path):
    from tilt.commands.rollout import Rollout, plan_of

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "references": ["a.png"]}\n')
    settings = Rollout(prompts=str(file), out="runs/x")
    assert plan_of(settings).references == ((), (str(tmp_path / "a.png"),))
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert plan_of(settings).references == ()


def test_a_folder_holds_one_run(tmp_path):
    made(tmp_path / "run")
    with pytest.raises(ValueError, match="add resume=true"):
        made(tmp_path / "run")
    with pytest.raises(ValueError, match="begun with seed=0, not 1"):
        made(tmp_path / "run", resume=True, seed=1)
    call = family("sd")[1]  # of an SD3 all but the pipeline and its weights is alike
    with pytest.raises(ValueError, match=r"begun with pipeline='StableDiffusionPipeline', not 'St"):
        made(tmp_path / "run", "sd3", resume=True, call=call)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"command": ["tilt", "steer"]}')
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged, or is not of rollouts;"):
            made(tmp_path / "other", resume=resume)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        made(tmp_path / "notes")
    with pytest.raises(ValueError, match="holds no rollouts"):
        Rollouts(tmp_path / "notes")
