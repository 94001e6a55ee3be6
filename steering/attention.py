"""Selection of the attention backend of a pipeline's networks."""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from steering.hub import one_sentence

__all__ = ["is_dispatched", "set_attention", "shield", "xformers_works"]

logger = logging.getLogger(__name__)

# Networks, and the processor of all their layers, that compute the same with xformers. For others,
# the legacy switch replaces any processor that it does not know by a plain one, which fails (Flux,
# diffusers issue 9946) or changes the images (Sana's linear attention), and the dispatcher adds
# boolean masks to the scores as ones and zeros. These networks use no masks.
_SAME = {
    "UNet2DConditionModel": "AttnProcessor2_0",
    "ControlNetModel": "AttnProcessor2_0",
    "SD3Transformer2DModel": "JointAttnProcessor2_0",
    "SD3ControlNetModel": "JointAttnProcessor2_0",
    "FluxTransformer2DModel": "FluxAttnProcessor",
    "FluxControlNetModel": "FluxAttnProcessor",
}
_XFORMERS_DEVICES = ("cuda",)  # also the device type of ROCm
# (queries, keys, head width): SD 1.5's self-attention and cross-attention (77 tokens) at its
# smallest and largest head width, SDXL's cross-attention, and the joint attention of SD3 (77 + 256
# tokens) and Flux
_TRIED = ((64, 64, 40), (64, 77, 160), (64, 77, 64), (589, 589, 64), (768, 768, 128))
_TOLERANCE = 0.03  # for averages of normal numbers in bfloat16; a wrong kernel is off by 0.3


def set_attention(pipe: Any, name: str) -> None:
    """Set the attention backend of the pipeline's networks.

    name: "auto" leaves the pipeline as it is, which means PyTorch's attention unless the user chose
    another; on the one GPU where both were timed it was faster than xformers (docs/performance.md).
    "sdpa" is PyTorch's attention. Any other name is a backend of diffusers. "xformers" falls back
    to PyTorch's attention, with a warning in the log, if it is not installed, does not work on this
    device, or is not known to compute the same. Raises ValueError for a backend that diffusers does
    not know or that is not installed.
    """
    shield()
    if name == "auto":
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    from steering.networks import networks

    backend = "native" if name == "sdpa" else name
    known = ["auto", "sdpa", *(item.value for item in AttentionBackendName)]
    if backend not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"there is no attention {name if name.strip() else repr(name)}: {hint}")
    for part, network in networks(pipe).items():
        if backend == "xformers" and not _may_have_xformers(network):
            logger.warning("xformers cannot be used here; %s uses PyTorch's attention", part)
            _set_backend(network, "native")
        else:
            _set_backend(network, backend)


def shield() -> None:
    """Keep a broken xformers from breaking the import of diffusers, or printing warnings in it.

    diffusers imports xformers unguarded whenever it is installed. Call this before the models of
    diffusers are imported; later it has no effect. Without CUDA, xformers is not imported at all.
    """
    if "diffusers.models.attention_processor" in sys.modules:
        return
    if importlib.util.find_spec("xformers") is None:
        return
    from diffusers.utils import import_utils

    if not torch.cuda.is_available() or not _imports():
        import_utils._xformers_available = False


def _imports() -> bool:
    with _quietly():
        try:
            importlib.import_module("xformers.ops")
        except Exception:  # a build for another torch may raise any kind of error
            return False
    return True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the warnings and logs of xformers, which it emits even on import."""
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def is_dispatched(network: torch.nn.Module) -> bool:
    """Return whether the network uses diffusers' attention dispatcher, not the legacy switch."""
    return any(
        hasattr(getattr(module, "processor", None), "_attention_backend")
        for module in network.modules()
    )


def _computes_the_same(network: torch.nn.Module) -> bool:
    plain = getattr(network, "_orig_mod", network)  # unwrap a compiled network
    processors = {type(item).__name__ for item in getattr(plain, "attn_processors", {}).values()}
    return processors == {_SAME.get(type(plain).__name__)}


def _may_have_xformers(network: Any) -> bool:
    """Return whether xformers may be enabled.

    The legacy switch may change results, so it is used only for verified networks; with the
    dispatcher the user chooses.
    """
    return (is_dispatched(network) or _computes_the_same(network)) and _works_in(network)


def _works_in(network: Any) -> bool:
    return xformers_works(network.device, network.dtype, is_dispatched(network))


@functools.cache
def xformers_works(device: torch.device, dtype: torch.dtype, dispatched: bool) -> bool:
    """Return whether xformers' attention agrees with PyTorch's, by running its kernels once.

    A build for another torch imports with a warning and fails only when it is called. dispatched:
    call it as diffusers' dispatcher does, rather than as the processors of older networks do.
    """
    if device.type not in _XFORMERS_DEVICES:
        return False
    shield()
    # the legacy switch tests float32, whatever the network's dtype is
    dtypes = {dtype} if dispatched else {dtype, torch.float32}
    with _quietly(), torch.no_grad():
        try:
            return all(
                _agrees(device, each, dispatched, *sizes) for each in dtypes for sizes in _TRIED
            )
        except Exception:  # any failure means that it cannot be used
            return False


def _agrees(
    device: torch.device, dtype: torch.dtype, dispatched: bool, queries: int, keys: int, width: int
) -> bool:
    generator = Generator().manual_seed(0)
    shapes = [(2, n, 2, width) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    rows = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(next(rows), next(rows), next(rows))
    out = (_dispatched if dispatched else _called)(q, k, v)
    return torch.allclose(out, expected.transpose(1, 2), atol=_TOLERANCE)


def _dispatched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from diffusers.models import attention_dispatch as dispatch

    return dispatch.dispatch_attention_fn(q, k, v, backend=dispatch.AttentionBackendName.XFORMERS)


def _called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from diffusers.models import attention_processor

    flat = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    attention: Any = attention_processor.xformers  # the name that the processors look up
    scale = q.shape[-1] ** -0.5
    out = attention.ops.memory_efficient_attention(*flat, attn_bias=None, op=None, scale=scale)
    return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def _set_backend(network: Any, backend: str) -> None:
    if is_dispatched(network):
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

        before = Registry.get_active_backend()[0]
        with one_sentence(f"the attention {backend}"):
            network.set_attention_backend(backend)
        Registry.set_active_backend(before)  # otherwise it also applies to all other pipelines
    elif backend == "xformers":
        network.enable_xformers_memory_efficient_attention()
    elif backend != "native":
        kind = type(network).__name__
        logger.warning("%s does not support choosing attention; %s is not used", kind, backend)
