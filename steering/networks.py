"""A pipeline's networks: which they are, what may replace one, and what a call leaves on them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from steering.tape import SHARED

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "NETWORKS",
    "StandIn",
    "kind_of",
    "networks",
    "out_of_memory",
    "perturbed",
    "refuse_step_caches",
    "undisturbed",
]

NETWORKS = (
    "unet", "transformer", "transformer_2", "unconditional_transformer", "controlnet", "prior",
    "decoder", "image_unet",
)  # fmt: skip
_PERTURBED = threading.RLock()  # perturbed attention sets processors that all threads share
_CACHES = ("cache", "fbc", "pyramid_attention_broadcast")


class StandIn:
    """Delegates to `module` except for `call` and `methods`; passes `isinstance` as `module`."""

    def __init__(self, module: Any, call: Callable[..., Any] | None = None, **methods: Callable):
        vars(self).update(methods, _module=module, _call=call or module)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def kind_of(network: torch.nn.Module) -> str:
    """Return the class name of a network, also of a compiled one."""
    return type(getattr(network, "_orig_mod", network)).__name__


def networks(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Return the networks that a pipeline calls at every step, by attribute name."""
    found = {name: getattr(pipe, name, None) for name in NETWORKS}
    return {name: net for name, net in found.items() if isinstance(net, torch.nn.Module)}


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports that a device or the host is out of memory."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in said for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def perturbed(pipe: DiffusionPipeline, pag_scale: float | None) -> bool:
    """Return whether perturbed attention guidance is on, whose layers need the whole batch."""
    if pag_scale and hasattr(pipe, "pag_attn_processors"):  # its call sets and removes them
        return True
    return any(
        type(processor).__name__.startswith("PAG")
        for net in networks(pipe).values()
        for processor in getattr(net, "attn_processors", {}).values()
    )


@contextlib.contextmanager
def undisturbed(pipe: DiffusionPipeline) -> Iterator[None]:
    """Restore, on any exit, what a call may have changed on the user's networks.

    These are the attention processors (perturbed attention), the hooks of layer-skipping guidance,
    and the dtype of a decoder that its pipeline upcasts during the call (SDXL in float16).
    """
    perturbs, hooks = hasattr(pipe, "pag_attn_processors"), _hooks_layers(pipe)
    with _PERTURBED if perturbs or hooks else contextlib.nullcontext():
        vae: Any = getattr(pipe, "vae", None)
        with SHARED:  # another thread may have upcast it temporarily
            dtype = getattr(vae, "dtype", None)
        processors = {
            name: dict(net.attn_processors)  # type: ignore[arg-type]
            for name, net in networks(pipe).items()
            if perturbs and hasattr(net, "attn_processors")
        }
        hooked = [_hooks_of(net) for net in networks(pipe).values() if hooks]
        try:
            yield
        finally:  # some calls (SDXL-PAG's inpainting) leave them even on success
            for name, before in processors.items():
                getattr(pipe, name).set_attn_processor(before)
            for before in hooked:
                _unhook(before)
            with SHARED:
                if dtype is not None and vae.dtype != dtype:
                    vae.to(dtype)


def _hooks_layers(pipe: DiffusionPipeline) -> bool:
    """Return whether a guidance of the pipeline hooks layers of its network during a call."""
    names = (name for part in pipe.components.values() for name in getattr(part, "__dict__", ()))
    return any(name.endswith("_hook_names") for name in names)


def _hooks_of(network: torch.nn.Module) -> dict[torch.nn.Module, tuple[set[str], bool]]:
    """Return for each layer the names of its hooks, and whether its forward is overridden."""
    return {
        module: (
            set(getattr(getattr(module, "_diffusers_hook", None), "hooks", ())),
            "forward" in vars(module),
        )
        for module in network.modules()
    }


def _unhook(before: dict[torch.nn.Module, tuple[set[str], bool]]) -> None:
    for module, (names, own) in before.items():
        registry: Any = getattr(module, "_diffusers_hook", None)
        for name in [name for name in getattr(registry, "hooks", ()) if name not in names]:
            registry.remove_hook(name, recurse=False)
        if not own:
            vars(module).pop("forward", None)


def refuse_step_caches(pipe: DiffusionPipeline) -> None:
    """Raise ValueError if a network caches what it computed for a row at an earlier step."""
    for name, net in networks(pipe).items():
        hooks = [
            hook
            for module in net.modules()
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        ]
        cached = [hook for hook in hooks if any(word in hook for word in _CACHES)]
        if cached or getattr(net, "is_cache_enabled", False):
            what = cached[0] if cached else type(net._cache_config).__name__
            raise ValueError(
                f"pipe.{name} has a step cache ({what}), which holds the state of rows that "
                f"resampling replaces; call pipe.{name}.disable_cache() first."
            )
