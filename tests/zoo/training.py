"""docs/trainable.md: one row a pipeline, as training found it on a tiny instance.

`PYTHONPATH=tests python -m zoo.training` tries every class, or those that are named.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from finetune import lora
from finetune.conditioning import Conditioning
from finetune.data import Data, check_fits
from finetune.gdro import Gdro, GdroTrainer
from finetune.groups import Group
from finetune.network import Model, guide, predict, targets_of
from finetune.recording import Recorder
from steering.adapters import load_lora
from steering.schedulers import stochastic
from steering.tape import view_of
from zoo import table
from zoo.accounts import ANIMALS, exported, reason, refusal
from zoo.building import Animal, call_of, pipeline_of
from zoo.checks import CHECKS as STEERED
from zoo.table import Row, lines

__all__ = ["CHECKS", "PAGE", "Row", "Trained", "read", "row", "trained_of", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "trainable.md"
PROMPTS = ("a red cube", "two dots and a star")


@dataclass
class Trained:
    """A pipeline of the class `name`, and what was recorded of its call."""

    name: str
    pipe: Any
    model: Model
    given: Conditioning
    latents: torch.dtype = torch.float32

    @property
    def network(self) -> Any:
        return getattr(self.pipe, self.model.part)


def trained_of(name: str, dtype: torch.dtype = torch.float32) -> Trained:
    """A small pipeline; raises ValueError for one that cannot be trained."""
    animal = ANIMALS.get(name, Animal())
    pipe, call = cast(seeded(name, animal), dtype), call_of(name, animal)
    for length in (None, 256, 1024):  # a template takes the first tokens
        if length is not None and "max_sequence_length" in call:
            call["max_sequence_length"] = length
        recorder = Recorder(pipe, call)
        given = recorder.record(PROMPTS)
        if differ(given):
            break
    prepared = recorder._head([PROMPTS[0]], recorder.call)[1]
    return Trained(name, pipe, Model(pipe), given, prepared.dtype)


def seeded(name: str, animal: Animal) -> Any:
    """The same pipeline every time, also of a class that makes parts of its own (AnimateDiff)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pipeline_of(name, animal)


def cast(pipe: Any, dtype: torch.dtype) -> Any:
    """Cast a pipeline, but for what its networks keep in float32, as `from_pretrained` loads it."""
    pipe.to(dtype)
    for part in pipe.components.values():
        kept = getattr(part, "_keep_in_fp32_modules", None) or ()
        for name, weight in part.named_parameters() if kept else ():
            if set(kept) & set(name.split(".")):
                weight.data = weight.data.float()
    return pipe


def differ(given: Conditioning) -> bool:
    """Whether two prompts have conditioning of their own."""
    one, other = given.rows
    return not all(one[n].shape == other[n].shape and torch.equal(one[n], other[n]) for n in one)


class _Stepped(BaseException):
    """Ends a call at its first step, so no pipeline may catch it."""


def first_step(it: Trained, prompt: str) -> tuple[Tensor, Tensor, float]:
    """The output, latents and time of the first step of the pipeline's own call."""
    view, scheduler = view_of(it.pipe), stochastic(it.pipe.scheduler, 0.0)
    guide(view, it.given.form.guided)
    found: list[Any] = []

    def step(output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.extend([output.clone(), sample.clone(), float(timestep)])
        raise _Stepped

    vars(scheduler)["step"] = step
    vars(view)["scheduler"] = scheduler
    try:
        with torch.no_grad():
            noise = [Generator().manual_seed(1)]
            view(prompt=prompt, generator=noise, output_type="latent", **it.given.form.call)
    except _Stepped:
        pass
    output, sample, timestep = found
    sample = sample.to(it.latents)  # some are cast for the scheduler
    steps = it.model.noising.num_train_timesteps
    return output, sample, timestep / steps if it.model.noising.flow else (timestep + 0.5) / steps


@torch.no_grad()
def same(it: Trained) -> None:
    """A prediction is what the pipeline's own call passes to its scheduler, bit for bit."""
    for i, prompt in enumerate(PROMPTS):
        output, x, t = first_step(it, prompt)
        found = it.model.predict(it.network, it.given[[i]], x, torch.tensor(t))
        assert torch.equal(found, output), (found - output).abs().max()


@torch.no_grad()
def rows(it: Trained) -> None:
    """Rows of two prompts at four times are those of calls of one row, to rounding."""
    assert differ(it.given)
    given = it.given.repeated(2)
    x = torch.randn(4, *it.given.form.shape, generator=Generator().manual_seed(2))
    t = torch.tensor([0.2, 0.9, 0.5, 0.7])
    found = it.model.predict(it.network, given, x, t)
    alone = [it.model.predict(it.network, given[[i]], x[[i]], t[i]) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def gradients(it: Trained) -> None:
    """Every weight of a LoRA gets a gradient, but for layers that do not reach the output at all.

    Some networks compute queries of the text in their last block and do not use them.
    """
    x = torch.randn(2, *it.given.form.shape, generator=Generator().manual_seed(3))

    def still(weights: dict[str, Any]) -> set[str]:
        for weight in weights.values():
            weight.requires_grad_(True)
        output = it.model.predict(it.network, it.given, x, torch.tensor(0.5))
        assert output.shape == x.shape
        found = torch.autograd.grad(output.square().sum(), [*weights.values()], allow_unused=True)
        return {n for n, g in zip(weights, found, strict=True) if g is None or not g.any()}

    dead = {name.removesuffix(".weight") for name in still(dict(it.network.named_parameters()))}
    weights = attached(it)
    assert weights
    without = {name.partition(".lora_")[0] for name in still(weights)}
    assert without <= dead, without - dead


def attached(it: Trained) -> dict[str, Any]:
    """A LoRA whose weights are not 0, so that all of them matter."""
    generator = Generator().manual_seed(4)
    weights = lora.attach(it.network, targets_of(it.network), 2, 2, generator)
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return weights


def trainer_of(it: Trained) -> GdroTrainer:
    """GDRO on random latents and rewards for both prompts."""
    generator, k = Generator().manual_seed(5), 4
    latents = torch.randn(len(PROMPTS) * k, *it.given.form.shape, generator=generator)
    groups = [Group(i, torch.arange(k) + k * i, torch.arange(k) / k) for i in range(len(PROMPTS))]
    data = Data(latents, it.given, groups, 0)
    check_fits(data, it.network, it.name, it.name)
    settings = Gdro(groups=2, k=k, micro_groups=2, rank=2, alpha=2, lr=1e-2, warmup=1, beta=2.0)
    return GdroTrainer(it.network, it.model, data, settings, Accelerator(cpu=True))


def gdro(it: Trained) -> None:
    """20 steps of GDRO lower the loss on what it was trained on."""
    trainer = trainer_of(it)

    @torch.no_grad()
    def loss() -> float:
        held = [part for step in range(100, 110) for part in trainer._inputs(step)]
        return torch.cat([trainer._losses(part)[0] for part in held]).mean().item()

    before = loss()
    for _ in range(20):
        trainer.train_step()
    assert loss() < before


def half(it: Trained) -> None:
    """In bfloat16 a prediction is the own call's, too, and GDRO moves the float32 adapter."""
    it = trained_of(it.name, torch.bfloat16)
    same(it)
    trainer = trainer_of(it)
    before = lora.copy(trainer.learner.weights)
    assert trainer.train_step()["grad_norm"] > 0
    moved = trainer.learner.weights
    assert any(not torch.equal(moved[name], before[name]) for name in before)
    assert all(
        weight.dtype == torch.float32 and weight.isfinite().all() for weight in moved.values()
    )


def loads(it: Trained) -> None:
    """A saved LoRA, loaded into a fresh pipeline, gives the tuned network, to 1e-5."""
    animal = ANIMALS.get(it.name, Animal())
    attached(it)
    x = torch.randn(2, *it.given.form.shape, generator=Generator().manual_seed(6))
    t = torch.tensor(0.4)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        lora.save(it.model.kind, it.model.part, it.network, Path(folder))
        fresh = seeded(it.name, animal)
        load_lora(fresh, folder)
        found, tuned = predict(fresh, it.given, x, t), predict(it.pipe, it.given, x, t)
        torch.testing.assert_close(found, tuned, atol=1e-5, rtol=1e-5)
        plain = predict(seeded(it.name, animal), it.given, x, t)
    assert (plain - tuned).abs().max() > 10 * (found - tuned).abs().max()


CHECKS: dict[str, Callable[[Trained], None]] = {
    "same": same,
    "rows": rows,
    "gradients": gradients,
    "gdro": gdro,
    "bfloat16": half,
    "loads": loads,
}


def row(name: str) -> Row:
    """Try everything with the class `name`, each check on a pipeline of its own."""
    why = reason(name)
    if why is not None:
        return Row(name, note=f"not tried: {why}")
    steered = table.read(table.PAGE, STEERED).get(name, Row(name)).cells
    if refusal(name) is not None and steered.get("reward") == "yes":
        return Row(name, note="not tried: it makes sound, and rollouts take no decode=")
    if refusal(name) is not None or steered.get("reward") == "refused":
        return Row(name, note="not tried: steer() refuses it, so it draws no rollouts")
    try:
        times = trained_of(name).given.form.times
    except ValueError as error:
        return Row(name, note=f"refused: {error}")
    apart = "Its call takes one time, so rows at different times are predicted in separate calls."
    note = apart if times == "each" else ""
    cells = {}
    for check, function in CHECKS.items():
        try:
            function(trained_of(name))
            cells[check] = "yes"
        except Exception as error:
            cells[check] = "no"
            sys.stderr.write(f"{name} {check}: {type(error).__name__} {str(error)[:300]}\n")
    return Row(name, cells, note)


def read() -> dict[str, Row]:
    return table.read(PAGE, CHECKS)


HEAD = """# Which pipelines train

Every pipeline class that diffusers {version} exports. Those of the first table were trained on a
tiny instance with random weights (`tests/zoo/training.py`); the second table says why the others
were not. This page is written by `PYTHONPATH=tests python -m
zoo.training`, and `pytest -m slow tests/test_trainable.py` finds each cell again.

Adding a class takes nothing: the network is called by the pipeline's own call, whose head is
recorded once for each prompt (`finetune/recording.py`, `finetune/network.py`). A class can fail in
three ways, each of which is one sentence before training:

1. Its call cannot be repeated from a text: it needs an image, or has no `prepare_latents()` by
   which noised latents are passed to it, or has several networks, of which one would be trained.
2. What its head makes of a text cannot be stored by rows: the rows of a batch cannot be found in
   it, or it holds something other than tensors and plain values.
3. Its call does more than predict: it changes the latents before its first step, computes without
   gradients, or its scheduler is neither a flow nor has betas.

Classes that make videos train on videos of several frames in the same way, by the same commands
(`tests/test_video_training.py`, Wan and LTX); here, most have one frame.

- **same**: a prediction is what the pipeline's own call passes to its scheduler, bit for bit, for
  two prompts.
- **rows**: rows of different prompts and times in one call are those of a call each, to 1e-5.
- **gradients**: every weight of a LoRA on the attention projections gets a gradient, but for
  layers whose result the network itself does not use.
- **gdro**: 20 steps of GDRO lower the loss.
- **bfloat16**: with the pipeline in bfloat16, **same** holds, too, and a step of GDRO moves the
  LoRA, whose weights are float32.
- **loads**: a saved LoRA, loaded into a fresh pipeline, gives the tuned network, to 1e-5.

"""


def write(found: dict[str, Row]) -> None:
    tried = [r for r in found.values() if r.cells]
    whole = [r for r in tried if set(r.cells.values()) == {"yes"}]
    parts = [
        HEAD.format(version=diffusers.__version__),
        f"{len(tried)} classes were trained; all of this holds for {len(whole)} of them.\n\n",
        lines(
            ["class", *CHECKS, "note"], [[f"`{r.name}`", *r.cells.values(), r.note] for r in tried]
        ),
        "\n## Refused, or not tried\n\n",
        lines(["class", "note"], [[f"`{r.name}`", r.note] for r in found.values() if not r.cells]),
    ]
    PAGE.write_text("".join(parts), encoding="utf-8")


def main(wanted: list[str]) -> None:
    found = read() if PAGE.exists() else {}
    for name in wanted or exported():
        sys.stderr.write(f"{name}\n")
        try:
            found[name] = row(name)
        except Exception as error:
            found[name] = Row(name, note=f"not built: {type(error).__name__}")
            sys.stderr.write(f"{name}: {type(error).__name__} {str(error)[:300]}\n")
        write({n: found[n] for n in exported() if n in found})


if __name__ == "__main__":
    main(sys.argv[1:])
