"""Decoding of latents in training, by the code that a pipeline's call ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steering.decoding import Decoder, in_float32
from steering.schedulers import stochastic
from steering.tape import Tape

from .conditioning import Conditioning
from .network import Model

__all__ = ["decoder_of"]


def decoder_of(model: Model, pipe: Any, given: Conditioning) -> Callable[[Tensor], Tensor]:
    """Return a function from latents (n, ...) to float images (n, 3, h, w) in [0, 1].

    pipe: the pipeline, of which the decoder is used; given: the conditioning of any prompt. Images
    are the pipeline's own, without its safety checker and watermark. No gradients pass.
    """
    precise, row = in_float32(pipe), given[:1]
    decoders = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and hasattr(part, "decode")
    }

    dtype: Any = next((part.dtype for part in decoders.values()), torch.float32)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        latents = latents.to(dtype)
        n, view = len(latents), model.view(latents.device)
        vars(view).update(decoders)
        tape = Tape(row.repeated(n).to(latents.device).results(model.dtype))
        call = given.form.call | {"prompt": [""] * n}
        chain = stochastic(model.scheduler, 0.0)
        return Decoder(view, chain, tape, call, n, precise=precise).images(latents)

    return decode
