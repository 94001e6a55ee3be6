"""Seconds of a network's evaluation with each attention backend over those with PyTorch's own.

    python -m scripts.bench attention
    python -m scripts.bench attention --networks flux --backends native flex xformers --rows 2

On CUDA the networks are the published ones by their configurations, with random weights (the cost
does not depend on the values), in bfloat16; on a CPU the embedded ones and a small Flux. Backends
alternate inside one process and the figure is the ratio round by round, so that a drift in speed
favours none. What cannot run is listed with its reason. difference: of the outputs, over the
largest of PyTorch's own.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steering import attention, tiny
from tilt import loading

from . import networks
from .machine import about
from .networks import FLUX_DEV, network_of

NATIVE = "native"
# PyTorch's own kernels, one alone; for the newer networks the same as diffusers' name sets
KERNELS = {
    "_native_math": SDPBackend.MATH,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
}
# none that would fetch kernels from the hub
BACKENDS = (NATIVE, *KERNELS, "flex", "xformers", "flash", "_flash_3", "sage")
SMALL_FLUX = {
    "guidance_embeds": True,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "joint_attention_dim": 128,
    "pooled_projection_dim": 64,
}
MODELS = {
    **networks.MODELS,
    "flux": FLUX_DEV,
    "small-flux": replace(FLUX_DEV, config=SMALL_FLUX),
}
PUBLISHED = tuple(name for name in MODELS if name != "small-flux")
SMALL = (*tiny.NAMES, "small-flux")
TOKENS = {"UNet2DConditionModel": 77, "SD3Transformer2DModel": 333, "FluxTransformer2DModel": 512}


def build(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A network by name: an embedded one, or random weights by its published configuration."""
    if name in tiny.NAMES:
        pipe = loading.load_pipeline(name, dtype)
        return (pipe.unet if name == "tiny-sd" else pipe.transformer).to(device)
    return networks.filled(partial(network_of, MODELS[name]), device, dtype)


def inputs(network: Any, rows: int) -> dict[str, Any]:
    """Arguments of a call with `rows` latents of the size that the network was made for."""
    config, kind = network.config, type(network).__name__
    generator = Generator().manual_seed(0)
    tokens = TOKENS[kind]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(network.device, network.dtype)

    times = torch.full((rows,), 500.0, device=network.device, dtype=network.dtype)
    if kind == "FluxTransformer2DModel":
        side = 64 if config.num_layers > 2 else 16  # of 1024 pixels
        return {
            "hidden_states": noise(rows, side * side, config.in_channels),
            "encoder_hidden_states": noise(rows, tokens, config.joint_attention_dim),
            "pooled_projections": noise(rows, config.pooled_projection_dim),
            "timestep": times / 1000,
            "guidance": times / 1000,
            "img_ids": noise(side * side, 3),
            "txt_ids": noise(tokens, 3),
        }
    x = noise(rows, config.in_channels, config.sample_size, config.sample_size)
    if kind == "SD3Transformer2DModel":
        return {
            "hidden_states": x,
            "encoder_hidden_states": noise(rows, tokens, config.joint_attention_dim),
            "pooled_projections": noise(rows, config.pooled_projection_dim),
            "timestep": times,
        }
    given: dict[str, Any] = {
        "sample": x,
        "timestep": times,
        "encoder_hidden_states": noise(rows, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": noise(rows, pooled), "time_ids": noise(rows, 6)}
        given["added_cond_kwargs"] = added
    return given


@contextlib.contextmanager
def using(network: Any, backend: str) -> Iterator[None]:
    """Let a network compute its attention by `backend`; RuntimeError where it cannot."""
    if backend == NATIVE:
        yield
        return
    if backend in KERNELS:
        with sdpa_kernel(KERNELS[backend]):
            yield
        return
    newer = attention.is_dispatched(network)
    if backend == "xformers" and not attention.xformers_works(network.device, network.dtype, newer):
        raise RuntimeError("not installed, or its kernels do not run here")
    if backend != "xformers" and not newer:
        raise RuntimeError("this network has no switch for it")
    before = network.attn_processors
    attention.set_attention(SimpleNamespace(transformer=network), backend)
    try:
        yield
    finally:
        if newer:
            network.reset_attention_backend()
        else:
            network.set_attn_processor(before)


@torch.no_grad()
def evaluate(network: nn.Module, given: dict[str, Any], backend: str) -> tuple[Tensor, float]:
    """The output, and the seconds that it took."""
    with using(network, backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flex, that it is slow
        _wait(given)
        start = time.perf_counter()
        out = network(**given, return_dict=False)[0]
        _wait(given)
        return out, time.perf_counter() - start


def _wait(given: dict[str, Any]) -> None:
    if given["timestep"].is_cuda:
        torch.cuda.synchronize()


def measure(
    name: str,
    backends: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """An entry a backend: seconds and ratios to native, round by round, or the reason for none."""
    network = build(name, device, dtype)
    given = inputs(network, rows)
    expected, _ = evaluate(network, given, NATIVE)
    found: dict[str, dict[str, Any]] = {}
    for backend in (NATIVE, *(item for item in backends if item != NATIVE)):
        entry: dict[str, Any] = {"network": name, "backend": backend, "reason": None}
        try:
            out, _ = evaluate(network, given, backend)
            difference = (out.float() - expected.float()).abs().max() / expected.abs().max()
            entry["difference"] = difference.item()
        except Exception as error:  # a kernel that lacks this device, dtype, shape or package
            said = " ".join(str(error).split()).partition(". ")[0]
            entry["reason"] = textwrap.shorten(said, 120) or type(error).__name__
        found[backend] = entry | {"seconds": [], "ratios": []}
    working = [backend for backend, entry in found.items() if entry["reason"] is None]
    for turn in range(rounds):
        order = working[turn % len(working) :] + working[: turn % len(working)]
        seconds = {backend: evaluate(network, given, backend)[1] for backend in order}
        for backend in working:
            found[backend]["seconds"].append(seconds[backend])
            found[backend]["ratios"].append(seconds[backend] / seconds[NATIVE])
    return list(found.values())


def line(entry: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [entry["network"], entry["backend"]]
    if entry["reason"] is not None:
        cells += ["", "", "", entry["reason"]]
    else:
        ratios = entry["ratios"]
        cells += [
            f"{1000 * statistics.median(entry['seconds']):.1f}",
            f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]",
            f"{entry['difference']:.1e}",
            "",
        ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print the table network by network."""
    parser = argparse.ArgumentParser(
        prog="attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=(*PUBLISHED, *SMALL))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", *loading.DTYPES])
    parser.add_argument("--rows", type=int, default=8, help="of the batch")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()
    device = loading.pick_device(args.device)
    dtype = loading.pick_dtype(args.dtype, device)
    print(f"{about(device, dtype)}, {args.rows} rows, {args.rounds} rounds\n")
    print("| network | backend | ms | over native: median [min, max] | difference | reason |")
    print("|---|---|---|---|---|---|")
    for network in args.networks or (PUBLISHED if device.type == "cuda" else SMALL):
        for entry in measure(network, args.backends, device, dtype, args.rows, args.rounds):
            print(line(entry), flush=True)


if __name__ == "__main__":
    main()
