"""What the tests of trainers share: small trainers, rewards, and a look at a step's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from finetune.chains import schedule_of
from finetune.data import Data
from finetune.decoding import decoder_of
from finetune.gdro import Gdro, GdroTrainer
from finetune.groups import Group
from finetune.grpo import Grpo, GrpoTrainer
from finetune.network import Model
from finetune.nft import Nft, NftTrainer
from finetune.online import Task
from finetune.recording import Recorder, record
from finetune.state import load_state, save_state

PROMPTS = ["a red star", "two blue circles", "a cross"]
SMALL: dict[str, Any] = {"groups": 2, "k": 4, "rank": 2, "alpha": 2, "lr": 1e-3}


def data_of(pipe, call, m=4):
    generator = torch.Generator().manual_seed(0)
    given = record(pipe, PROMPTS, **call)
    latents = torch.randn(len(PROMPTS) * m, *given.form.shape, generator=generator)
    groups = [
        Group(i, torch.arange(m) + m * i, torch.rand(m, generator=generator))
        for i in range(len(PROMPTS))
    ]
    return Data(latents, given, groups, 0)


def gdro(pipe, call, accelerator: Any = None, **changed):
    more: dict[str, Any] = SMALL | {"k": 3, "micro_groups": 1} | changed
    settings = Gdro(**more)
    model, data = Model(pipe), data_of(pipe, call)
    accelerator = accelerator or Accelerator(cpu=True)
    return GdroTrainer(getattr(pipe, model.part), model, data, settings, accelerator)


def brightness(images, prompts):
    values = images.mean((1, 2, 3))
    return values, {"brightness": values}


def grpo(pipe, call, score=brightness, **changed):
    steps: dict[str, Any] = {"num_inference_steps": 4}
    more: dict[str, Any] = SMALL | steps | {"groups": 3} | changed
    model, settings = Model(pipe), Grpo(**more)
    given = record(pipe, PROMPTS, **call | steps | {"guidance_scale": 1.0})
    decode, schedule = decoder_of(model, pipe, given), schedule_of(model, given)
    task = Task(schedule, PROMPTS, given, decode, score, weights={"brightness": 1.0})
    return GrpoTrainer(getattr(pipe, model.part), model, task, settings, Accelerator(cpu=True))


def nft(pipe, call, score=brightness, kind: Any = Nft, **changed):
    steps: dict[str, Any] = {"num_inference_steps": 3}
    scale = changed.get("guidance_scale", 1.0)
    model, settings = Model(pipe), kind(**SMALL | steps | changed)
    call = call | steps | {"guidance_scale": scale}
    given = Recorder(pipe, call, guided=scale > 1).record(PROMPTS)
    decode, schedule = decoder_of(model, pipe, given), schedule_of(model, given)
    plain = record(pipe, PROMPTS, **call) if scale > 1 else None
    task = Task(schedule, PROMPTS, given, decode, score, plain=plain)
    return NftTrainer(getattr(pipe, model.part), model, task, settings, Accelerator(cpu=True))


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.learner.weights.values()])


def moved(trainer):
    """The trainer, after its adapter was moved away from the reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in trainer.learner.weights.values():
            weight.add_(torch.randn(weight.shape, generator=generator) / 8)
    return trainer


def gradient_of(trainer):
    """The first step's statistics, and the gradient by which it moves."""
    found = []
    weights = trainer.learner.weights.values()
    trainer.learner.optimizer.step = lambda: found.extend(p.grad.flatten() for p in weights)
    return trainer.train_step(), torch.cat(found)


def places(images, _):
    """Rewards of an image's place, so that rounding of the samples changes none."""
    return torch.arange(len(images)) % 4 / 4, {}


def some_flat(images, prompts):
    """Rewards without a spread for two of the three prompts; 0.1 has no exact mean."""
    spread = torch.arange(len(images)) % 4 / 4
    flat = torch.tensor([prompt != PROMPTS[0] for prompt in prompts])
    return spread.masked_fill(flat, 0.1), {}


def with_every_group(trainer):
    """The trainer, which does not leave out groups without a spread."""
    own = trainer.samples.rows
    trainer.samples.rows = lambda compared, places, idle: own(compared, places, False)
    return trainer


def passes(trainer, rows, gradients=True):
    """Note the rows of each forward pass with gradients, or of all."""
    trainer.learner.bare.register_forward_hook(
        lambda module, arguments, keywords, output: (
            rows.append(len(output[0])) if torch.is_grad_enabled() or not gradients else None
        ),
        with_kwargs=True,
    )
    return trainer


def assert_image_by_image(trainer_of, size, **changed):
    """Assert that a step in parts of `size` images moves as one of whole groups."""
    rows: list[int] = []
    whole = moved(trainer_of(**changed | {"micro_images": 0}))
    parts = passes(moved(trainer_of(**changed | {"micro_images": size})), rows, gradients=False)
    (told, expected), (seen, found) = gradient_of(whole), gradient_of(parts)
    assert expected.norm() > 1e-5
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert seen == pytest.approx(told, rel=1e-3, abs=1e-5)
    assert max(rows) == size


def resumed(trainer_of, folder, done, more, **changed):
    """Return a trainer after done + more steps, and one that was resumed between, bit for bit."""
    whole, first, second = (trainer_of(**changed) for _ in range(3))
    seen = [whole.train_step() for _ in range(done + more)]
    for _ in range(done):
        first.train_step()
    save_state(first, folder)
    assert load_state(second, folder)
    assert second.step == done
    assert [second.train_step() for _ in range(more)] == seen[done:]
    assert torch.equal(weights_of(second), weights_of(whole))
    return whole, second, seen
