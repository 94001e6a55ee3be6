"""The attention backend of a pipeline's networks: PyTorch's own, or another by name."""

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

# Networks, and the processor of each of their layers, that compute the same with xformers. No
# others: the older switch puts a plain processor in place of any that it does not know, which
# fails (Flux, diffusers issue 9946) or draws other pictures (Sana's linear attention); and the
# newer one adds a mask of True and False to the scores as ones and zeros. These have no masks.
_SAME = {
    "UNet2DConditionModel": "AttnProcessor2_0",
    "ControlNetModel": "AttnProcessor2_0",
    "SD3Transformer2DModel": "JointAttnProcessor2_0",
    "SD3ControlNetModel": "JointAttnProcessor2_0",
    "FluxTransformer2DModel": "FluxAttnProcessor",
    "FluxControlNetModel": "FluxAttnProcessor",
}
_XFORMERS_DEVICES = ("cuda",)  # ROCm calls itself that too
# queries, keys, width of a head: SD 1.5 on its image and its 77 tokens, at its ends; SDXL; the
# joint attention of SD3 (77 + 256 tokens) and Flux
_TRIED = ((64, 64, 40), (64, 77, 160), (64, 77, 64), (589, 589, 64), (768, 768, 128))
_TOLERANCE = 0.03  # of averages of normal numbers, in bfloat16; a wrong kernel is off by 0.3


def set_attention(pipe: Any, name: str) -> None:
    """Choose the attention backend of the pipeline's networks.

    auto: as the pipeline has it, which is PyTorch's own unless its user chose another; on the one
    GPU where both were timed it was faster than xformers (docs/performance.md). sdpa: PyTorch's
    own. xformers, or any other backend of diffusers, by name; xformers falls back to PyTorch's own,
    with a line in the log, where it is not installed, does not work on this device, or is not known
    to compute the same. Raises ValueError for a backend that diffusers does not know or that is not
    installed.
    """
    shield()
    if name == "auto":
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    from steering.denoiser import networks

    backend = "native" if name == "sdpa" else name
    known = ["auto", "sdpa", *(item.value for item in AttentionBackendName)]
    if backend not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"there is no attention {name if name.strip() else repr(name)}: {hint}")
    for part, network in networks(pipe).items():
        if backend == "xformers" and not _may_have_xformers(network):
            logger.warning("xformers cannot be used here; %s goes on with PyTorch's own", part)
            _set_backend(network, "native")
        else:
            _set_backend(network, backend)


def shield() -> None:
    """Keep an xformers that cannot be loaded from breaking or spamming the import of diffusers.

    diffusers imports it unguarded wherever it is installed. Call this before anything that imports
    the models of diffusers; it does nothing later. A machine with no CUDA is spared the import.
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
        except Exception:  # built for another torch it fails by what its linker or Python says
            return False
    return True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """xformers warns and logs while it is imported, though nobody may want to use it."""
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
    """Whether its attention goes through diffusers' dispatcher; older networks have a switch."""
    return any(
        hasattr(getattr(module, "processor", None), "_attention_backend")
        for module in network.modules()
    )


def _computes_the_same(network: torch.nn.Module) -> bool:
    plain = getattr(network, "_orig_mod", network)  # of one that is compiled
    processors = {type(item).__name__ for item in getattr(plain, "attn_processors", {}).values()}
    return processors == {_SAME.get(type(plain).__name__)}


def _may_have_xformers(network: Any) -> bool:
    """Whether xformers may be switched on.

    The legacy switch may change results, so it is used only for verified networks; with the
    dispatcher the user chooses.
    """
    return (is_dispatched(network) or _computes_the_same(network)) and _works_in(network)


def _works_in(network: Any) -> bool:
    return xformers_works(network.device, network.dtype, is_dispatched(network))


@functools.cache
def xformers_works(device: torch.device, dtype: torch.dtype, dispatched: bool) -> bool:
    """Whether xformers' attention gives what PyTorch's does, tried once by running its kernels.

    A build for another torch imports, warns, and fails only when it is called. dispatched: called
    as diffusers' dispatcher calls it, else as the processors of the older networks do.
    """
    if device.type not in _XFORMERS_DEVICES:
        return False
    shield()
    # the older switch tries float32, whatever the network's dtype is
    dtypes = {dtype} if dispatched else {dtype, torch.float32}
    with _quietly(), torch.no_grad():
        try:
            return all(
                _agrees(device, each, dispatched, *sizes) for each in dtypes for sizes in _TRIED
            )
        except Exception:  # whatever it fails by, it cannot be used
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
        Registry.set_active_backend(before)  # else every other pipeline of the process gets it too
    elif backend == "xformers":
        network.enable_xformers_memory_efficient_attention()
    elif backend != "native":
        kind = type(network).__name__
        logger.warning("%s has no choice of attention; %s is not used", kind, backend)
