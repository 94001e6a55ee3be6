"""Networks in half precision, as a GPU has them: what is trained stays float32, and means the same.

Nothing is passed that asks for half precision: the trainers see the network's own.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_pipelines import family
from trainers import data_of, gdro, gradient_of, grpo, moved, nft, places, resumed

from finetune import learner, lora
from finetune.data import Data
from finetune.decoding import decoder_of
from finetune.gdro import Gdro, GdroTrainer
from finetune.network import Model, predict, targets_of
from finetune.recording import record
from finetune.state import load_state, save_state

HALVES = [torch.bfloat16, torch.float16]
KINDS = {"gdro": gdro, "grpo": grpo, "nft": nft}


def in_half(name: str, dtype: torch.dtype) -> Any:
    pipe, call = family(name)
    return pipe.to(dtype), call


def trainer_of(kind: str, dtype: torch.dtype, name: str = "sd3", **changed: Any) -> Any:
    few = {"groups": 2, "k": 3} if kind == "gdro" else {"score": places, "groups": 1, "k": 2}
    return KINDS[kind](*in_half(name, dtype), **few | changed)


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_gradient_is_that_of_float32(kind, name):
    """To 8 bits of a bfloat16 in some twenty roundings, one after another: a tenth; to 11 bits of
    a float16: two hundredths."""
    told, expected = gradient_of(trainer_of(kind, torch.float32, name))
    assert expected.norm() > 1e-5
    for dtype, share in zip(HALVES, (0.1, 0.02), strict=True):
        seen, found = gradient_of(trainer_of(kind, dtype, name))
        assert found.dtype == torch.float32
        assert (found - expected).norm() < share * expected.norm()
        assert seen["loss"] == pytest.approx(told["loss"], rel=share / 5, abs=1e-4)
        assert seen["grad_norm"] == pytest.approx(told["grad_norm"], rel=share)
        assert seen.get("drift", 0) == seen.get("moved", 0) == 0  # the reference is the network
        assert seen.get("ratio", 1) == 1
        if kind == "gdro":
            assert seen["spread"] == 0  # of implicit rewards, each exactly 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_learns_is_float32_and_a_run_resumes_bit_for_bit(kind, dtype, tmp_path):
    whole, _, _ = resumed(lambda: trainer_of(kind, dtype), tmp_path, 1, 2)
    own = whole.learner
    frozen = {p.dtype for n, p in own.bare.named_parameters() if n not in own.weights}
    moments = [v.dtype for state in own.optimizer.state.values() for v in state.values() if v.ndim]
    held = [value.dtype for part in (own.weights, own.average.weights) for value in part.values()]
    assert frozen == {dtype}
    assert {*moments, *held} == {torch.float32}


def test_samples_and_their_moves_are_float32():
    batch = trainer_of("grpo", torch.bfloat16)._sampled(0, [0])
    kept = [batch.latents, batch.images, *(end for move in batch.moves for end in (move.x, move.y))]
    assert {value.dtype for value in kept} == {torch.float32}


def test_gradients_that_overflow_in_float16_are_taken_again_at_another_scale(tmp_path):
    whole, large = (trainer_of("gdro", torch.float16, lr=1e-3) for _ in range(2))
    large.learner.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    large.learner.optimizer.scaler = scaler
    a, b = whole.train_step(), large.train_step()
    assert 1 < scaler.get_scale() < 2.0**30
    assert b == pytest.approx(a, rel=1e-2, abs=1e-6)
    save_state(large, tmp_path)
    again = trainer_of("gdro", torch.float16)
    load_state(again, tmp_path)
    assert again.learner.accelerator.scaler.get_scale() == scaler.get_scale()
    latents = torch.full(large.data.latents.shape, float("nan"))
    again.data = Data(latents, again.data.given, again.data.groups, 0)
    again.inputs.foreseen = None
    with pytest.raises(FloatingPointError, match="step 1: implicit scores are not finite"):
        again.train_step()


@pytest.mark.parametrize("dtype", HALVES)
def test_image_by_image_the_gradient_is_that_of_the_whole_group(dtype):
    """Also where those of float16 overflow at first, and all is taken again."""
    whole, parts = (moved(trainer_of("gdro", dtype, micro_images=most)) for most in (0, 1))
    if dtype == torch.float16:
        parts.learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        parts.learner.optimizer.scaler = parts.learner.accelerator.scaler
    (told, expected), (seen, found) = gradient_of(whole), gradient_of(parts)
    share = 0.1 if dtype == torch.bfloat16 else 0.02
    assert (found - expected).norm() < share * expected.norm()
    assert seen["loss"] == pytest.approx(told["loss"], rel=share)
    if dtype == torch.float16:
        assert parts.learner.accelerator.scaler.get_scale() < 2.0**30


def test_float16_is_refused_where_its_gradients_cannot_be_scaled():
    for zero, fsdp in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="set dtype=bfloat16"):
            learner._scale_gradients(SimpleNamespace(is_fsdp2=fsdp), zero)


def test_an_engine_that_switches_autocast_off_does_not_reach_the_network():
    """As DeepSpeed's, which this stands for, on a GPU."""
    alone, trainer = trainer_of("gdro", torch.bfloat16), trainer_of("gdro", torch.bfloat16)
    network = trainer.learner.network

    def engine(*arguments, **keywords):
        with torch.autocast("cpu", enabled=False):
            return network(*arguments, **keywords)

    trainer.learner.network = engine
    assert trainer.train_step() == alone.train_step()


def test_checkpointed_blocks_are_computed_again_in_the_same_precision():
    plain, less = (
        trainer_of("gdro", torch.bfloat16, gradient_checkpointing=on) for on in (False, True)
    )
    (_, a), (_, b) = gradient_of(plain), gradient_of(less)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def cast(given, dtype):
    rows = [
        {n: v.to(dtype) if v.is_floating_point() else v for n, v in row.items()}
        for row in given.rows
    ]
    form = replace(given.form, dtype=str(dtype).removeprefix("torch."))
    return replace(given, rows=rows, form=form)


@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_rollouts_of_another_precision_serve(name, network):
    pipe, call = family(name)
    other = torch.bfloat16 if network == torch.float32 else torch.float32
    data: Any = data_of(pipe, call)
    data = Data(data.latents.to(other), cast(data.given, other), data.groups, 0)
    settings = Gdro(groups=2, k=3, rank=2, alpha=2, micro_groups=1)
    pipe.to(network)
    model = Model(pipe)
    part = getattr(pipe, model.part)
    trainer = GdroTrainer(part, model, data, settings, Accelerator(cpu=True))
    assert trainer.train_step()["grad_norm"] > 0


@pytest.mark.filterwarnings("ignore:`upcast_vae`:FutureWarning")  # of the pipeline
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_latents_are_decoded_as_the_pipeline_does(name, dtype):
    """SDXL's decoder overflows in float16; its pipeline takes float32 then, here a copy."""
    pipe, call = in_half(name, dtype)
    generator = [torch.Generator().manual_seed(0)]
    kinds = {"generator": generator, "return_dict": False, **call, "num_inference_steps": 1}
    with torch.no_grad():
        latents = pipe("a", **kinds, output_type="latent")[0]
        kinds["generator"] = [torch.Generator().manual_seed(0)]
        images = pipe("a", **kinds, output_type="pt")[0]
    found = decoder_of(Model(pipe), pipe, record(pipe, ["a"], **call))(latents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, images.float(), atol=1e-3, rtol=0)
    assert pipe.vae.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_predictions_take_conditioning_of_any_precision(dtype):
    pipe, call = family("sd3")
    network = pipe.transformer
    lora.attach(network, targets_of(network), 2, 2, torch.Generator().manual_seed(0))
    given = record(pipe, ["a"], **call)
    x, t = torch.ones(1, 4, 8, 8), torch.tensor([0.3])
    with torch.no_grad():
        expected, found = (predict(pipe, g, x, t) for g in (given, cast(given, dtype)))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
