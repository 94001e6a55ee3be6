"""Seconds of a network's evaluation with each attention backend over those with PyTorch's own.

    python -m scripts.bench attention --networks flux --backends native flex xformers --rows 2

docs/performance.md has results. Backends alternate inside one process, and the figure is the ratio
within a round, so that a drift in speed favours none. The difference is the largest one between the
outputs, relative to the largest output of PyTorch's own.
"""

import contextlib
import statistics
import textwrap
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

from finetune.network import part_of
from steering import attention
from tilt import loading

from ..parser import parser_of
from ..tables import head, line, span
from . import networks
from .machine import about
from .networks import FLUX_DEV, MODELS, filled, network_of
from .timing import seconds

NATIVE = "native"
# a single kernel of PyTorch; for newer networks this is the same as diffusers' backend
KERNELS = {
    "_native_math": SDPBackend.MATH,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
}
# without those that would download kernels from the hub
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
SMALL_INPUTS = {"embeds": (512, 128), "pooled": (64,)}
# The embedded pipelines have networks of the classes of SD3 and SD. `inputs` takes 8 pixels for a
# latent, so side=128 gives their 16 x 16 latents.
TINY = {
    "tiny-sd3": replace(
        MODELS["sd35m"], latents=8, given={"embeds": (333, 192), "pooled": (192,)}, side=128
    ),
    "tiny-sd": replace(MODELS["sd15"], latents=8, given={"embeds": (77, 128)}, side=128),
}
LARGE = MODELS | {"sd35m": replace(MODELS["sd35m"], side=1024), "flux": FLUX_DEV}
FILLED = LARGE | {"small-flux": replace(FLUX_DEV, config=SMALL_FLUX, given=SMALL_INPUTS, side=256)}
PUBLISHED = tuple(LARGE)
SMALL = (*TINY, "small-flux")


def build(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A network by name: an embedded one, or random weights by its published configuration."""
    if name in TINY:
        pipe = loading.load_pipeline(name, dtype)
        return getattr(pipe, part_of(pipe)).to(device)
    return filled(partial(network_of, FILLED[name]), device, dtype)


def inputs(name: str, device: torch.device, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """Arguments of a call with `rows` latents of the size that the network was made for."""
    model, generator = (FILLED | TINY)[name], Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    given = networks.inputs(model, rows, model.side, noise)
    flux = model.family == "FluxPipeline"
    given["timestep"].fill_(0.5 if flux else 500.0)
    if flux:
        given["guidance"].fill_(0.5)
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
    found: list[Tensor] = []
    with using(network, backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flex, that it is slow
        took = seconds(lambda: found.append(network(**given, return_dict=False)[0]))
    return found[0], took


def measure(
    name: str,
    backends: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """An entry for each backend: seconds and ratios to native by round, or the reason for none."""
    network = build(name, device, dtype)
    given = inputs(name, device, dtype, rows)
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
        took = {backend: evaluate(network, given, backend)[1] for backend in order}
        for backend in working:
            found[backend]["seconds"].append(took[backend])
            found[backend]["ratios"].append(took[backend] / took[NATIVE])
    return list(found.values())


def row(entry: dict[str, Any]) -> str:
    """An entry as a row of the table."""
    if entry["reason"] is not None:
        return line(entry["network"], entry["backend"], "", "", "", entry["reason"])
    took, difference = 1000 * statistics.median(entry["seconds"]), f"{entry['difference']:.1e}"
    cells = (f"{took:.1f}", span(entry["ratios"]), difference, "")
    return line(entry["network"], entry["backend"], *cells)


def main(argv: list[str] | None = None) -> None:
    """Print the table network by network."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--networks", nargs="+", choices=(*PUBLISHED, *SMALL))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", *loading.DTYPES])
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()
    device = loading.pick_device(args.device)
    dtype = loading.pick_dtype(args.dtype, device)
    print(f"{about(device, dtype)}, {args.rows} rows, {args.rounds} rounds\n")
    ratio = "over native: median [min, max]"
    print(head("network", "backend", "ms", ratio, "difference", "reason"))
    for network in args.networks or (PUBLISHED if device.type == "cuda" else SMALL):
        for entry in measure(network, args.backends, device, dtype, args.rows, args.rounds):
            print(row(entry), flush=True)
