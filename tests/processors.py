"""Another processor, acted: what its kernels may do is done to the tests on this one.

conftest.py reads TILT_TEST, words such as "threads=2 mkldnn=off noise=8":

    threads=2    PyTorch's threads, of which the tests take one otherwise
    mkldnn=off   PyTorch's own kernels in the place of oneDNN's
    noise=8      every product of matrices and convolution is off by up to so many units in the
                 last place, otherwise for every shape: rows that are computed in another batch
                 come out differently, as they do on many processors; equal calls stay equal.
                 Float64 is left alone: sums of whole numbers are exact in it everywhere

ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA, which PyTorch reads itself, choose among the kernels
that a processor has.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")
RARE = 0.01  # of the values in half precision, whose sums are rounded once


def act(words: str) -> None:
    """Do what TILT_TEST says, in this process and in the Python processes that it starts."""
    given = dict(word.split("=") for word in words.split())
    if unknown := given.keys() - {"threads", "mkldnn", "noise"}:
        raise ValueError(f"TILT_TEST={words!r}: {unknown} is not threads=, mkldnn= or noise=")
    torch.set_num_threads(int(given.get("threads", 1)))
    if given.get("mkldnn") == "off":
        torch.backends.mkldnn.set_flags(False)
    if ulps := float(given.get("noise", 0)):
        for name in PRODUCTS:
            setattr(F, name, noisy(getattr(F, name), ulps))
        for name in ("matmul", "bmm", "baddbmm", "einsum"):
            setattr(torch, name, noisy(getattr(torch, name), ulps))
        torch.Tensor.__matmul__ = noisy(torch.Tensor.__matmul__, ulps)  # type: ignore[method-assign]
        torch.Tensor.matmul = noisy(torch.Tensor.matmul, ulps)  # type: ignore[method-assign]
    if not given:
        return
    # Python imports tests/sitecustomize.py, which acts there, too
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))


def noisy(product: Callable[..., Any], ulps: float) -> Callable[..., Any]:
    """The function, off by a factor for each value that its place and the shape decide."""

    @functools.wraps(product)
    def off(*args: Any, **kwargs: Any) -> Any:
        out = product(*args, **kwargs)
        if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.is_meta:
            return out
        if not out.is_floating_point() or out.dtype == torch.float64:
            return out
        return out * factors(tuple(out.shape), out.dtype, ulps).to(out.device)

    return off


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def factors(shape: tuple[int, ...], dtype: torch.dtype, ulps: float) -> torch.Tensor:
    seed = zlib.crc32(repr((shape, dtype)).encode())
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32:
        return 1 + ulps * eps * (2 * draws - 1)
    return (1 + eps * (draws < RARE)).to(dtype)
