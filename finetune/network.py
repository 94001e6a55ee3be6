"""One prediction of any pipeline's network, with gradients, by the pipeline's own call.

A pipeline's call knows how its network is called: in which unit it takes the time, which ids,
masks and embedded guidance it gets, and what is done with its output. So a prediction runs that
call. Its head (`encode_*`, `prepare_*`) is replayed from a recording with x_t in place of the
latents, and its scheduler has a single step, at t, that hands back what it is given. No class of
pipelines needs an adapter.

Legend: n rows; t in (0, 1) is the time, 0 for clean latents and 1 for pure noise: the noise level
of a flow, or with betas the timestep over T. Latents are those that the scheduler gets, which some
pipelines pack into tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from steering.decoding import do_nothing
from steering.networks import NETWORKS, StandIn, networks
from steering.schedulers import stochastic
from steering.tape import Tape, view_of

from .conditioning import Conditioning
from .noising import noising_of

__all__ = [
    "Model",
    "Reached",
    "at",
    "calm",
    "check_kind",
    "guide",
    "hollow",
    "part_of",
    "predict",
    "reached",
    "run",
    "targets_of",
]


class Reached(BaseException):
    """Ends a call where its result is known; a BaseException, so that no pipeline catches it."""

    def __init__(self, found: Any):
        self.found = found


def check_kind(kind: type, parts: Collection[str]) -> str:
    """Return the attribute of the network that is trained, from a pipeline's class and its parts.

    No weights are needed. Raises ValueError, which names what is missing, for a class that cannot
    be trained.
    """
    found = [name for name in NETWORKS if name in parts]
    known = inspect.signature(kind.__call__).parameters
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        name
        for name, p in known.items()
        if p.default is p.empty and p.kind not in free and name not in ("self", "prompt")
    ]
    if "prompt" not in known:
        why = "its call takes no prompt"
    elif needed:
        why = f"its call needs {needed[0]}=, and only texts are trained on"
    elif not hasattr(kind, "prepare_latents"):
        why = "it has no prepare_latents(), by which latents are passed to its call"
    elif len(found) != 1:
        names = f"the networks {', '.join(found)}" if found else "no network that is known"
        why = f"it has {names}, and just one is trained"
    else:
        return found[0]
    raise ValueError(f"{kind.__name__} cannot be trained: {why}")


def part_of(pipe: Any) -> str:
    """Return the attribute of the network that is trained; ValueError as `check_kind` raises it."""
    return check_kind(type(pipe), list(networks(pipe)))


def predict(pipe: Any, given: Conditioning, x: Tensor, t: Tensor) -> Tensor:
    """Return what the network of `pipe` predicts for x_t (n, ...) at t (n,) or ().

    given: n rows of `recording.record`. x and t are on the network's device. The result has x's
    shape; it is what the pipeline passes to its scheduler, in the form that
    `noising_of(pipe).prediction` names, with guidance if the conditioning has it. Gradients follow
    `torch.is_grad_enabled()`. Raises ValueError for a pipeline whose call does more than predict. A
    trainer uses `Model`, which prepares this once.
    """
    model = Model(pipe)
    return model.predict(getattr(pipe, model.part), given, x, t)


class Model:
    """A pipeline as a trainer sees it, without weights, so that the pipeline may be deleted.

    kind: the pipeline's class; part: the attribute of the network; noising: how latents are noised;
    dtype: of the network.
    """

    def __init__(self, pipe: Any) -> None:
        self.kind, self.part, self.noising = type(pipe), part_of(pipe), noising_of(pipe)
        self.scheduler, self._tried = stochastic(pipe.scheduler, 0.0), False
        self.dtype: torch.dtype = getattr(pipe, self.part).dtype
        modules = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module)}
        self._hollow = {name: hollow(part, _gone) for name, part in modules.items()}
        self._view = view_of(pipe, **calm(), **self._hollow)

    def view(self, device: torch.device, call: Callable[..., Any] | None = None) -> Any:
        """Return a copy of the pipeline that computes on a device and has no networks.

        call: what the pipeline then calls in place of the network that is trained.
        """
        for part in self._hollow.values():
            part.device = device
        view = copy.copy(self._view)
        if call is not None:
            shell = self._hollow[self.part]._module
            part: Any = StandIn(shell, call, modules=_no_modules, cache_context=_no_context)
            part.device = device
            vars(view)[self.part] = part
        return view

    def predict(self, network: Any, given: Conditioning, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction of `network`, which is the pipeline's or wraps it.

        Arguments and result are those of the function `predict`.
        """
        apart = t.ndim > 0 and given.form.times == "each"
        parts = [
            one for part in given.parts() for one in (_runs(t, given, part) if apart else [part])
        ]
        found = [
            self._predict(
                network, given[part], x[part], t[part.start] if apart else t[part] if t.ndim else t
            )
            for part in parts
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _predict(self, network: Any, given: Conditioning, x: Tensor, t: Tensor) -> Tensor:
        form = given.form
        if t.ndim and form.times == "copies":
            t = t.repeat(form.copies)
        grads: list[bool] = []

        def called(*args: Any, **kwargs: Any) -> Any:
            grads.append(torch.is_grad_enabled())
            return network(*args, **kwargs)

        view = self.view(x.device, called)
        guide(view, form.guided)
        vars(view)["scheduler"] = at(self.scheduler, self.noising.timesteps(t))
        output, sample = reached(view, given, x, self.dtype)
        if len(grads) > 1 and not form.guided:
            raise self._refused(
                f"it calls its {self.part} {len(grads)} times in a step, though guidance is off"
            )
        if torch.is_grad_enabled() and not all(grads):
            raise self._refused("its call computes without gradients")
        if not self._tried and not _alike(sample, x):
            raise self._refused("it changes its latents before its first step")
        self._tried = True
        if output.shape != x.shape:
            raise self._refused(
                f"for latents {tuple(x.shape)} its scheduler gets {tuple(output.shape)}"
            )
        return output

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self.kind.__name__} cannot be trained: {why}")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to NaN, apart from their dtypes."""
    if a.shape != b.shape:
        return False
    low = a.dtype if torch.finfo(a.dtype).eps > torch.finfo(b.dtype).eps else b.dtype
    return torch.equal(a.to(low).nan_to_num(), b.to(low).nan_to_num())


def _runs(t: Tensor, given: Conditioning, part: slice) -> Iterator[slice]:
    """Yield the runs of equal rows with equal t within a slice.

    Two prompts that happen to have one t stay apart, or one process would make fewer calls than
    another, for which FSDP would wait.
    """
    values, rows, start = t.tolist(), given.rows, part.start
    for i in range(part.start + 1, part.stop + 1):
        if i == part.stop or values[i] != values[start] or rows[i] is not rows[start]:
            yield slice(start, i)
            start = i


def calm() -> dict[str, Any]:
    """Return attributes of a copy of a pipeline whose calls print nothing and free nothing."""
    return {"_progress_bar_config": {"disable": True}, "maybe_free_model_hooks": do_nothing}


def hollow(part: nn.Module, call: Callable[..., Any]) -> Any:
    """Return what stands for a module but has no weights; calling it calls `call`."""
    found: Any = StandIn(_shell(part), call, modules=_no_modules)
    found.device = next((p.device for p in part.parameters()), torch.device("cpu"))
    return found


def _shell(part: nn.Module) -> nn.Module:
    shell, weights = copy.copy(part), ("_parameters", "_buffers")
    for kind in weights:
        held = vars(part)[kind]
        vars(shell)[kind] = {n: v if v is None else v.detach().to("meta") for n, v in held.items()}
    vars(shell)["_modules"] = {n: m and _shell(m) for n, m in part._modules.items()}
    return shell


def guide(view: Any, guided: bool) -> None:
    """Switch the guider of a copy of a pipeline, if it has one, on or off."""
    for part in vars(view).values():
        if isinstance(part, BaseGuidance):
            part.enable() if guided else part.disable()


def _no_modules() -> Iterator[nn.Module]:
    """Replaces modules(), in which pipelines look for hooks at every call."""
    return iter(())


def _no_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _gone(*_: Any, **__: Any) -> Any:
    raise ValueError("the pipeline calls an encoder or a decoder in the middle of its steps")


def at(scheduler: Any, timesteps: Tensor) -> Any:
    """Return a copy of a scheduler with one step, at timesteps (n,) or (), that ends the call.

    The step raises `Reached` with the network's output and the latents. Of several timesteps, only
    the first has its noise level in `sigmas`.
    """
    made = copy.copy(scheduler)
    level = timesteps.flatten()[:1] / scheduler.config.num_train_timesteps

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        made.timesteps = timesteps[None]

    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        raise Reached((model_output, sample))

    vars(made).update(set_timesteps=set_timesteps, step=step, timesteps=timesteps[None])
    if hasattr(scheduler, "sigmas"):
        made.sigmas = torch.cat([level, torch.zeros_like(level)])
    return made


def run(view: Any, given: Conditioning, x: Tensor, dtype: torch.dtype) -> Any:
    """Run a pipeline's call of n rows with gradients, its head replayed with x (n, ...) as latents.

    It returns latents.
    """
    vars(view).update(Tape(given.results(dtype)).players(view, x))
    call = given.form.call | {"prompt": [""] * len(x), "output_type": "latent"}
    decorated = type(view).__call__
    return getattr(decorated, "__wrapped__", decorated)(view, **call)  # without torch.no_grad()


def reached(view: Any, given: Conditioning, x: Tensor, dtype: torch.dtype) -> Any:
    """Return what was found where `Reached` ends such a call; ValueError if nothing ends it."""
    try:
        run(view, given, x, dtype)
    except Reached as end:
        return end.found
    kind = type(view).__name__
    raise ValueError(f"{kind} cannot be trained: its call makes no step of its scheduler")


def targets_of(network: nn.Module) -> tuple[str, ...]:
    """Return the names by which the attention projections of a network end."""
    ends = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    return tuple(t for t in TARGETS if any(name.endswith(f".{t}") for name in ends))


# the usual names in diffusers; those of a second stream of tokens have "add", and FLUX.2's blocks
# of one stream have a single layer for all three and the MLP
TARGETS: Sequence[str] = (
    "to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out",
    "to_qkv_mlp_proj", "to_key", "to_query", "to_value",
)  # fmt: skip
