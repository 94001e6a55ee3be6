"""What docs/scale.md and docs/memory.md say of steering is arithmetic: it is checked by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocator import real_peak
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import flops, memory, networks, scale

ROOT = Path(__file__).parents[1]
SMALL = networks.Published(
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    {"cross_attention_dim": 64, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8},
    4,
    {"embeds": (77, 64)},
    512,
)


def small_decoder(model: networks.Published) -> Any:
    kind: Any = AutoencoderKL
    return kind(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        mid_block_add_attention=False,  # the CPU's kernel takes memory of its own
    ).eval()


def weights(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def real_parts() -> tuple[Any, Any]:
    parts = networks.network_of(SMALL), small_decoder(SMALL)
    for part in parts:  # not .to(), which diffusers warns of
        for weight in part.parameters():
            weight.data = weight.data.bfloat16()
    return parts


@torch.no_grad()
def test_a_call_without_gradients_peaks_as_in_the_real_allocator(monkeypatch):
    monkeypatch.setattr(memory, "decoder_of", small_decoder)
    network, decoder = real_parts()
    given = networks.inputs(SMALL, 4, 256, partial(torch.empty, dtype=torch.bfloat16))
    real = real_peak(lambda: network(**given))
    held = weights(network) + weights(decoder)
    assert memory.call_peak(SMALL, 256, 4) - held == pytest.approx(real, rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("sliced", [False, True])
def test_decoding_peaks_as_in_the_real_allocator(monkeypatch, sliced):
    monkeypatch.setattr(memory, "decoder_of", small_decoder)
    network, decoder = real_parts()
    held = weights(network) + weights(decoder)
    decoder.use_slicing = sliced
    x = networks.latents_of(SMALL, 4, 512, torch.bfloat16)
    real = real_peak(lambda: decoder.decode(x).sample.float())
    assert memory.decode_peak(SMALL, 512, 4, sliced) - held == pytest.approx(real, rel=0.03)


def test_the_rows_that_fit_leave_a_fifth_of_the_card():
    # 80 of 100: 10 for the text encoders, 30 for two rows, then 5 a row
    assert memory.most_rows(100, 10, 30, 5, 2, decode=70) == 10
    assert memory.most_rows(100, 10, 30, 5, 2, decode=71) == 0
    assert memory.most_rows(100, 75, 30, 5, 2, decode=0) == 0


@pytest.mark.slow
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


def without_attention(call: Callable[[], object]) -> float:
    """Operations but those of attention's own products, which profilers of modules miss."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    found = counter.get_flop_counts()["Global"]
    return sum(count for name, count in found.items() if str(name) != "aten.bmm")


def test_operations_are_those_published_for_stable_diffusion():
    # Kim et al. 2023 (BK-SDM): 339, 1240 and 6 thousand million multiply-adds
    model = networks.MODELS["sd15"]
    with torch.device("meta"):
        unet, vae = networks.network_of(model), networks.decoder_of(model)
        given, x = networks.inputs(model, 1, 512), networks.latents_of(model, 1, 512)
    assert without_attention(lambda: unet(**given)) / 2e9 == pytest.approx(339, abs=0.5)
    assert without_attention(lambda: vae.decode(x)) / 2e9 == pytest.approx(1240, abs=1)
    assert flops.of_texts("sd15").flops / 2e9 == pytest.approx(6, abs=1)


@pytest.mark.parametrize(
    ("reward", "d", "depth", "out"), [("clip-l", 1024, 24, 768), ("vit-h", 1280, 32, 1024)]
)
def test_operations_of_a_vision_transformer_are_those_of_its_formula(reward, d, depth, out):
    n = 16 * 16 + 1
    block = 2 * 12 * d**2 * n + 2 * 2 * n**2 * d  # q, k, v, out, the MLP's 8; q k and weights v
    expected = 2 * 3 * 14**2 * d * 16**2 + depth * block + 2 * d * out
    assert flops.of_reward(reward).flops == expected


def test_a_judge_reads_each_patch_and_token_with_all_its_layers():
    sees, reads = flops.of_judge(504, 100)
    assert sees.flops == 2 * sees.parameters * 36**2
    assert reads.flops == pytest.approx(2 * (18**2 + 100) * (reads.parameters - 152064 * 3584))


@pytest.mark.parametrize(
    ("name", "side", "seconds", "share"),
    [
        pytest.param("sdxl", 1024, 5.932, 0.37, marks=pytest.mark.slow),
        ("sd15", 512, 1.604, 0.17),
    ],
)
def test_the_share_of_the_peak_is_that_of_the_cited_seconds(name, side, seconds, share):
    one = scale.particle(name, side)
    reached = (50 * one.step + one.decoder) / seconds / 312e12
    assert reached == pytest.approx(share, abs=0.005)


def test_the_ratio_counts_every_look_and_the_final_score():
    one = scale.Particle(step=10, preview=1, decoder=20, texts=0)
    # plain: 8 steps and a decode, 100; on top 3 looks and 4 scores of 2
    assert scale.ratio(one, 2, 8, 3, preview=True) == pytest.approx(1.11)
    assert scale.ratio(one, 2, 8, 3, preview=False) == pytest.approx(1.68)


def test_a_rank_receives_the_rows_it_does_not_hold():
    # 6 rows of 8: sample and output of ten numbers in 16 bits, and a reward
    assert scale.received(8, 4, 10, 2) == 6 * (2 * 10 * 2 + 4)
    assert scale.received(8, 1, 10, 2) == 0


def test_prompts_that_are_dealt_out_end_with_the_longest_hand():
    for count, ranks in ((553, 8), (10, 4), (3, 8)):
        hands = [len(range(rank, count, ranks)) for rank in range(ranks)]
        assert scale.split(count, ranks) == pytest.approx(count / (ranks * max(hands)))


def test_the_slowest_of_many_is_bounded():
    rng = np.random.default_rng(0)
    for ranks in (8, 64, 512):
        excess = rng.normal(0, 0.02, (4000, ranks)).max(1).mean()  # standard error below 0.0002
        assert 0.65 * scale.slowest(ranks, 0.02) < excess < scale.slowest(ranks, 0.02)
    assert scale.slowest(1, 0.02) == 0


def test_a_spread_population_waits_for_the_rank_with_most_rows():
    on = scale.Assumed(spread=0.0)
    assert scale.shared(2.0, 0.0, 16, 8, 0.0, 4, on) == pytest.approx(1)
    assert scale.shared(2.0, 0.0, 12, 8, 0.0, 4, on) == pytest.approx(0.75)
    # one particle a rank takes 2 s, the texts 1 s, five exchanges 0.2 s each
    assert scale.shared(2.0, 1.0, 8, 8, 0.2, 4, on) == pytest.approx(17 / (8 * 4))


def test_a_server_pays_from_where_both_ways_make_as_many_runs():
    base, r, others = 2.0, 1.0, 7
    b = float(scale.speedup(base, r, others))
    alone = (others + 1) / (base + r)
    assert others / (base + r / b) == pytest.approx(alone, rel=0.01)
    assert scale.speedup(8.0, 1.0, 7) == "never"  # even for nothing, 7/8 = 0.875 < 8/9


def test_the_documented_tables_are_what_the_command_prints():
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert scale.table(["what", "value", "from"], scale.ASSUMED) in text
    assert scale.exchanged(50, 4) in text


@pytest.mark.slow
def test_every_documented_table_is_what_the_command_prints(capsys):
    scale.main([])
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    for part in capsys.readouterr().out.split("\n\n"):
        if part.startswith("|"):
            assert part.strip() in text
