"""A base in 8 or 4 bits: what is quantised, what is refused, and that a LoRA learns on it."""

from __future__ import annotations

import importlib.metadata
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from trainers import gdro, weights_of
from two_processes import run_pair

from finetune import lora
from finetune.gdro import GdroTrainer
from finetune.network import predict
from finetune.recording import record
from finetune.rollouts import Plan, is_complete, open_run
from steering import tiny
from steering.manifest import fingerprint
from tilt import loading, quantization, training
from tilt.loading import load_pipeline

NAME = "tiny-sd3"
CALL = tiny.call_defaults(NAME) | {"num_inference_steps": 2}


def torchao() -> None:
    pytest.importorskip("torchao", reason="8 bits need torchao")


@pytest.fixture
def bitsandbytes_on_a_cpu(monkeypatch):
    """Let diffusers load 4-bit weights without a GPU, which bitsandbytes itself allows."""
    pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer as Quantizer

    monkeypatch.setattr(Quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(quantization, "check", lambda quantize: None)
    # its kernels for some processors take fewer widths
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def trainer_of(pipe: Any, accelerator: Any = None, **changed: Any) -> GdroTrainer:
    return gdro(pipe, CALL, accelerator, **changed)


def size(network: nn.Module) -> int:
    """The bytes of the weights, with all that a quantised one consists of."""
    total = 0
    for weight in network.state_dict().values():
        flat = getattr(weight, "__tensor_flatten__", None)
        parts = [getattr(weight, name) for name in flat()[0]] if flat else [weight]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


# --- what is quantised, and what is refused


def test_networks_and_large_text_encoders_are_quantised():
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.9,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    assert quantization._libraries(index) == {
        "text_encoder_2": "transformers",
        "transformer": "diffusers",
        "transformer_2": "diffusers",
    }


def test_a_text_encoder_that_diffusers_holds_is_one_of_transformers():
    """Its weights are loaded by transformers, which takes a configuration of its own."""
    index = {"text_encoder": ["kolors", "ChatGLMModel"], "unet": ["diffusers", "UNet2D"]}
    assert quantization._libraries(index) == {"text_encoder": "transformers", "unet": "diffusers"}


@pytest.mark.parametrize(("quantize", "package"), quantization._PACKAGES.items())
def test_a_missing_or_an_old_package_is_named(quantize, package, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    name, _ = package
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=f"quantize is '{quantize}'.*: pip install {name}"):
        quantization.check(quantize)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.1")
    with pytest.raises(ValueError, match=rf"or later, not 0\.9\.1: pip install -U {name}"):
        quantization.check(quantize)
    quantization.check("none")


def test_4_bits_need_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.50.2")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ValueError, match="on a GPU alone, and there is none; set quantize=8bit"):
        quantization.check("4bit")


def test_it_is_refused_before_anything_is_loaded(monkeypatch):
    def refuse(quantize):
        raise ValueError(f"no {quantize}")

    monkeypatch.setattr(quantization, "check", refuse)
    with pytest.raises(ValueError, match="no 8bit"):
        loading.resolved(SimpleNamespace(dtype="float32", quantize="8bit", offload="none"))


def test_sharded_bases_are_not_quantised(tmp_path, monkeypatch):
    sharded = SimpleNamespace(is_fsdp2=True, distributed_type="FSDP")
    monkeypatch.setattr(training, "Accelerator", lambda **_: sharded)
    monkeypatch.setattr(training, "shard", lambda accelerator: None)
    settings = training.TrainingRun(out=str(tmp_path), quantize="8bit")
    with pytest.raises(ValueError, match="quantize is '8bit', which is not supported with FSDP"):
        training.accelerator_of(settings)


def test_rollouts_record_it_and_are_resumed_with_the_same(tmp_path):
    pipe = tiny.load(NAME)
    plan = Plan(("a", "b"), images=2, call=CALL)
    open_run(tmp_path, pipe, plan, None, False, NAME)
    with pytest.raises(ValueError, match="begun with quantize='none', not '8bit'"):
        open_run(tmp_path, pipe, plan, None, True, NAME, quantize="8bit")
    with pytest.raises(ValueError, match="begun with lora=None, not '1f3a'"):
        open_run(tmp_path, pipe, plan, None, True, NAME, "1f3a")
    assert not is_complete(tmp_path, plan, None, NAME, quantize="8bit")


# --- training on it


@pytest.fixture(scope="module")
def pipes():
    return {dtype: load_pipeline(NAME, dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_in_8_bits_predicts_almost_the_same_in_less_memory(dtype, pipes):
    torchao()
    pipe, plain = load_pipeline(NAME, dtype, quantize="8bit"), pipes[dtype]
    own, whole = pipe.transformer, plain.transformer
    linear = [part for part in own.modules() if isinstance(part, nn.Linear)]
    assert {type(part.weight).__name__ for part in linear} == {"Int8Tensor"}
    assert size(own) < (0.35 if dtype == torch.float32 else 0.65) * size(whole)
    for name, kind in (("text_encoder", "Parameter"), ("text_encoder_3", "Int8Tensor")):
        linear = [part for part in getattr(pipe, name).modules() if isinstance(part, nn.Linear)]
        assert {type(part.weight).__name__ for part in linear} == {kind}
    assert fingerprint(own) == fingerprint(load_pipeline(NAME, dtype, quantize="8bit").transformer)
    assert fingerprint(own) != fingerprint(whole)
    given = record(plain, ["a red star", "two blue circles"], **CALL)
    x = torch.randn(2, *given.form.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    a, b = (predict(p, given, x, torch.tensor([0.3, 0.7])).float() for p in (plain, pipe))
    # a weight is off by up to 1/254 of its row's largest: 1/440 of it on average (uniform error)
    assert (a - b).norm() < 0.05 * a.norm()


def tried(pipe: Any, tmp_path: Any) -> None:
    """A step on a quantised base changes the weights that it changes on the whole base, and the
    LoRA is one of the whole base."""
    trainer, beside = trainer_of(pipe), trainer_of(load_pipeline(NAME, torch.float32))
    loss, other = trainer.train_step()["loss"], beside.train_step()["loss"]
    assert loss == pytest.approx(other, abs=1e-4)  # log k!, as the adapter has changed nothing yet
    weights, expected = trainer.learner.weights, beside.learner.weights
    assert {p.dtype for p in weights.values()} == {torch.float32}
    moved, there = ([n for n, p in w.items() if "_B" in n and p.any()] for w in (weights, expected))
    assert moved == there
    assert len(moved) >= 30
    lora.save(type(pipe), "transformer", pipe.transformer, tmp_path)
    found = lora.parameters(load_pipeline(NAME, torch.float32, str(tmp_path)).transformer)
    values = {name.replace("default_0", "default"): p for name, p in found.items()}
    torch.testing.assert_close(values, weights, atol=1e-7, rtol=0)


def learned(pipe: Any) -> bool:
    """Whether thirty steps of GDRO lower the loss, which differs from one draw of t to another."""
    trainer = trainer_of(pipe, beta=200.0, lr=3e-3, hold_best=0.0, groups=3, k=4)
    losses = [trainer.train_step()["loss"] for _ in range(30)]
    return median(losses[20:]) < median(losses[:10]) - 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_is_trained_on_a_base_in_8_bits(dtype, tmp_path):
    torchao()
    tried(load_pipeline(NAME, dtype, quantize="8bit"), tmp_path)


def test_a_lora_is_trained_on_a_base_in_4_bits(bitsandbytes_on_a_cpu, tmp_path):
    pipe = load_pipeline(NAME, torch.bfloat16, quantize="4bit")
    linear = [part for part in pipe.transformer.modules() if isinstance(part, nn.Linear)]
    assert {type(part.weight).__name__ for part in linear} == {"Params4bit"}
    tried(pipe, tmp_path)


@pytest.mark.slow
def test_thirty_steps_lower_the_loss_in_8_bits():
    torchao()
    assert learned(load_pipeline(NAME, torch.bfloat16, quantize="8bit"))


@pytest.mark.slow
def test_thirty_steps_lower_the_loss_in_4_bits(bitsandbytes_on_a_cpu):
    assert learned(load_pipeline(NAME, torch.bfloat16, quantize="4bit"))


@pytest.mark.gpu
def test_a_lora_is_trained_on_a_base_in_4_bits_on_a_gpu():
    pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    pipe = load_pipeline(NAME, torch.bfloat16, quantize="4bit")
    assert pipe.transformer.device.type == "cuda"
    trainer = trainer_of(pipe, Accelerator())
    trainer.train_step()
    assert any(p.any() for name, p in trainer.learner.weights.items() if "lora_B" in name)


def test_a_lora_of_the_whole_base_is_loaded_on_one_in_8_bits(tmp_path, pipes):
    torchao()
    trainer = trainer_of(load_pipeline(NAME, torch.float32))
    trainer.train_step()
    folder = lora.save(
        type(pipes[torch.float32]), "transformer", trainer.learner.bare, tmp_path
    ).parent
    pipe = load_pipeline(NAME, torch.bfloat16, str(folder), quantize="8bit")
    found = lora.parameters(pipe.transformer)
    assert len(found) == len(trainer.learner.weights)


PAIR = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
from test_quantization import NAME, trainer_of
from trainers import weights_of
from tilt.loading import load_pipeline
accelerator = Accelerator(cpu=True)
trainer = trainer_of(load_pipeline(NAME, torch.float32, quantize="8bit"), accelerator)
for _ in range(3):
    trainer.train_step()
if accelerator.is_main_process:
    torch.save(weights_of(trainer), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_train_on_8_bits_as_one_does(tmp_path):
    torchao()
    run_pair(PAIR, str(tmp_path / "two.pt"), port=61)
    one = trainer_of(load_pipeline(NAME, torch.float32, quantize="8bit"))
    for _ in range(3):
        one.train_step()
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.testing.assert_close(two, weights_of(one), atol=1e-5, rtol=1e-4)
