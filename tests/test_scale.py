"""What docs/scale.md and docs/memory.md say of steering is arithmetic: it is checked by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.profiler import ProfilerActivity, profile

from scripts.benchmarks import memory, networks

ROOT = Path(__file__).parents[1]
SMALL = networks.Model(
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    {"cross_attention_dim": 64, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8},
    4,
    {"embeds": (77, 64)},
    512,
)


def small_decoder(model: networks.Model) -> Any:
    kind: Any = AutoencoderKL
    return kind(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        mid_block_add_attention=False,  # the CPU's kernel takes memory of its own
    ).eval()


@torch.no_grad()
def real_peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator had given out at once while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    profiler: Any = seen.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(live.max())


def weights(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def real_parts() -> tuple[Any, Any]:
    """With the channels last, for which the CPU's convolutions need no copies of their own."""
    parts = networks.network_of(SMALL), small_decoder(SMALL)
    for part in parts:  # not .to(), which diffusers warns of
        for weight in part.parameters():
            weight.data = weight.data.bfloat16()
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return parts


def test_a_call_without_gradients_peaks_as_in_the_real_allocator(monkeypatch):
    monkeypatch.setattr(memory, "decoder_of", small_decoder)
    network, decoder = real_parts()
    given = networks.inputs(SMALL, 4, 256, torch.bfloat16)
    given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
    real = real_peak(lambda: network(**given))
    held = weights(network) + weights(decoder)
    assert memory.call_peak(SMALL, 256, 4) - held == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("sliced", [False, True])
def test_decoding_peaks_as_in_the_real_allocator(monkeypatch, sliced):
    monkeypatch.setattr(memory, "decoder_of", small_decoder)
    network, decoder = real_parts()
    held = weights(network) + weights(decoder)
    decoder.use_slicing = sliced
    x = networks.latents_of(SMALL, 4, 512, torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    real = real_peak(lambda: decoder.decode(x).sample.float())
    assert memory.decode_peak(SMALL, 512, 4, sliced) - held == pytest.approx(real, rel=0.05)


def test_the_rows_that_fit_leave_a_fifth_of_the_card():
    # 80 of 100: 10 for the text encoders, 30 for two rows, then 5 a row
    assert memory.most_rows(100, 10, 30, 5, 2, decode=70) == 10
    assert memory.most_rows(100, 10, 30, 5, 2, decode=71) == 0
    assert memory.most_rows(100, 75, 30, 5, 2, decode=0) == 0


def test_the_documented_table_of_steering_is_what_the_command_prints():
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    assert memory.steered_row("sd15", 512) in text


@pytest.mark.parametrize(
    ("name", "published"),
    [("clip-l", 123_060_480), ("clip-bigg", 694_659_840), ("t5-xxl", 4_762_310_656)],
)
def test_text_encoders_have_the_parameters_of_the_published_ones(name, published):
    with torch.device("meta"):
        assert networks.parameters(networks.text_encoder(name)) == published
