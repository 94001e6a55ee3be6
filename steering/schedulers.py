"""Stochastic schedulers that call an observer before every move.

A pipeline's own loop calls `scheduler.step(model_output, timestep, sample)` once per step, after
guidance and rescaling. At that point the filter (`Chain.observer`) scores x̂0 and resamples the
sample together with the network's output, before the noise of the move is drawn.

n rows are the particles of a call, prompt-major.
"""

# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
# diffusers annotates its tensors as FloatTensor and its configs as plain dicts

import copy
import functools
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from steering.transitions import flow_transition

__all__ = ["Chain", "Look", "StochasticDDIM", "StochasticFlow", "stochastic"]

logger = logging.getLogger(__name__)
_MARKOV = "whose steps depend only on the present latents"

DIFFUSION_NOISE = 1.0  # DDIM's default eta here: ancestral sampling, as DDPM
FLOW_NOISE = 0.5  # stock flow samplers use 0; more costs sharpness, less makes children alike


@dataclass(frozen=True)
class Look:
    """The argument of an observer, before the move of one step.

    `predict()` returns x̂0 (n, *shape) in the dtype of the latents. `stds` are those of every move
    of this run: `stds[step]` is that of the coming move, `len(stds)` the number of executed steps.
    """

    step: int
    stds: tuple[float, ...]
    predict: Callable[[], Tensor]


@dataclass
class Chain:
    """The state of one run of a stochastic scheduler.

    `observer(look)` returns the rows (n,) int64 that survive, or None to keep all; `lineage` (n,)
    is the initial row from which each present row descends. Both index `exchange(x)`, which gathers
    the rows x of all processes. A `finished` chain has no steps left, so that a pipeline goes
    straight to the code after its loop.
    """

    noise: float
    generators: Sequence[Generator] | None = None
    observer: Callable[[Look], Tensor | None] | None = None
    exchange: Callable[[Tensor], Tensor] = lambda x: x
    finished: bool = False
    stds: tuple[float, ...] = ()
    clamped: tuple[bool, ...] = ()  # DDIM: whether 1 - ᾱ' - σ² rounds below 0
    timesteps: tuple[int, ...] = ()  # DDIM: timesteps of the executed steps
    step: int = 0
    lineage: Tensor | None = None
    sample: Any = None  # input of the present move
    output: Any = None  # network output, after guidance
    last: Tensor | None = None  # result of the last move

    def restart(self) -> None:
        self.stds, self.step, self.lineage, self.last = (), 0, None, None

    def select(
        self, sample: Tensor, model_output: Tensor, predict: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the sample and the network's output of the surviving rows."""
        if self.generators is not None and len(sample) != (asked := len(self.generators)):
            raise ValueError(f"The pipeline made {len(sample)} rows instead of {asked}.")
        rows, self.sample, self.output = None, sample, model_output
        if self.observer is not None:
            rows = self.observer(Look(self.step, self.stds, predict))
        self.step += 1
        if rows is None:
            return sample, model_output
        self.lineage = rows if self.lineage is None else self.exchange(self.lineage)[rows]
        return self.exchange(sample)[rows], self.exchange(model_output)[rows]

    def follow(self, x: Tensor) -> Tensor:
        """Reorder per-row noise or image latents that the pipeline keeps by the lineage."""
        if self.lineage is None or x.shape[0] != self.lineage.shape[0]:
            return x
        return self.exchange(x)[self.lineage.to(x.device)]


class _NoSteps(Tensor):
    """Timesteps that can be counted and sliced, but that yield nothing when iterated."""

    def __iter__(self):
        return iter(())


class StochasticDDIM(DDIMScheduler):
    """DDIM whose eta is the chain's `noise` (Song et al. 2021, eq. 12 and 16).

    Its moves are bit for bit those of the stock scheduler, unless 1 - ᾱ' - σ² rounds below 0 (zero
    terminal SNR at eta 1): it is then clamped to 0, where stock DDIM returns NaN.
    """

    chain: Chain

    @functools.wraps(DDIMScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        _restart(self)

    @functools.wraps(DDIMScheduler.step)
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        if eta not in (0.0, self.chain.noise):
            raise ValueError(
                f"eta={eta} was passed to a scheduler made with noise={self.chain.noise}; "
                "pass the noise to stochastic(), or in the settings, and leave eta out."
            )
        if not self.chain.stds:
            self._plan(timestep)
        std, clamped = self.chain.stds[self.chain.step], self.chain.clamped[self.chain.step]
        # an int, since comparing a timestep on the device would synchronise
        stock: Any = functools.partial(super().step, timestep=self.chain.timesteps[self.chain.step])

        def predict() -> Tensor:
            return stock(model_output, sample=sample, eta=0.0).pred_original_sample

        sample, model_output = self.chain.select(sample, model_output, predict)
        generator = self.chain.generators if generator is None else generator
        if variance_noise is None and generator is not None and self.chain.noise > 0:
            variance_noise = _draw(model_output, generator)
        if clamped:
            z: Any = variance_noise
            x0 = stock(model_output, sample=sample, eta=0.0).pred_original_sample
            move = DDIMSchedulerOutput(math.sqrt(1 - std**2) * x0 + std * z, x0)
        else:
            move = stock(
                model_output,
                sample=sample,
                eta=self.chain.noise,
                use_clipped_model_output=use_clipped_model_output,
                variance_noise=variance_noise,
            )
        self.chain.last = move.prev_sample
        return move if return_dict else (move.prev_sample, move.pred_original_sample)

    def _plan(self, first: Any) -> None:
        """Compute the σ of every step from timestep `first` on, rounded as in the stock step."""
        timesteps = self.timesteps.tolist()
        timesteps = timesteps[timesteps.index(int(first)) :]
        stds, clamped = [], []
        for timestep in timesteps:
            previous = timestep - self.config.num_train_timesteps // self.num_inference_steps
            alpha_bar = self.final_alpha_cumprod if previous < 0 else self.alphas_cumprod[previous]
            std = self.chain.noise * self._get_variance(timestep, previous) ** 0.5
            stds.append(float(std))
            clamped.append(bool(1 - alpha_bar - std**2 < 0))
        self.chain.stds, self.chain.clamped = tuple(stds), tuple(clamped)
        self.chain.timesteps = tuple(timesteps)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        original_samples, noise = map(self.chain.follow, (original_samples, noise))
        return super().add_noise(original_samples, noise, timesteps)


class StochasticFlow(FlowMatchEulerDiscreteScheduler):
    """Euler for rectified flow with noise: eta = noise * s' (Gaussian, finite at s = 1).

    x' = x + (s'-s) v - (s' - √(s'²-η²)) ε̂ + η z, with x̂0 = x - s v and ε̂ = x + (1-s) v.
    At noise 0 it is bit for bit the stock scheduler; at noise 1 it fully renoises x̂0.
    """

    chain: Chain
    schedule: Any = None  # a scheduler of another class that provides the sigmas

    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        if self.schedule is not None and not {"sigmas", "timesteps"} & kwargs.keys():
            self.schedule.set_timesteps(*args, **kwargs)
            self.sigmas = self.schedule.sigmas.to(self.timesteps.device, torch.float32)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        _restart(self)

    @functools.wraps(FlowMatchEulerDiscreteScheduler.step)
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        if args or kwargs.get("per_token_timesteps") is not None:
            raise ValueError(
                "This pipeline gives every token its own timestep, which the filter cannot "
                "weigh; use a pipeline with one timestep per step."
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        if not self.chain.stds:
            sigmas = self.sigmas[self.step_index + 1 :].tolist()
            self.chain.stds = tuple(self.chain.noise * sigma for sigma in sigmas)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]

        def predict() -> Tensor:
            return (sample.float() - sigma * model_output).to(sample.dtype)

        std = self.chain.stds[self.chain.step]
        sample, model_output = self.chain.select(sample, model_output, predict)
        if std == 0:
            x = super().step(model_output, timestep, sample, return_dict=False)[0]
        else:
            move = flow_transition(
                model_output, sample, sigma, sigma_next, self.chain.noise * sigma_next
            )
            generator = self.chain.generators if generator is None else generator
            x = (move.mean + move.std * _draw(move.mean, generator)).to(model_output.dtype)
            self._step_index = self.step_index + 1
        self.chain.last = x
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged; Bria calls this on every scheduler but the stock one."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = None if noise is None else self.chain.follow(noise)
        return super().scale_noise(self.chain.follow(sample), timestep, noise)


def _restart(scheduler: StochasticDDIM | StochasticFlow) -> None:
    scheduler.chain.restart()
    if scheduler.chain.finished:
        scheduler.timesteps = scheduler.timesteps.as_subclass(_NoSteps)


def _draw(like: Tensor, generators: Any) -> Tensor:
    if generators is None:
        raise ValueError(
            "This pipeline passes no generator to its scheduler; pass one per particle as "
            "stochastic(scheduler, noise, generators)."
        )
    one = generators[0] if isinstance(generators, list | tuple) else generators
    noise = randn_tensor(like.shape, generator=generators, device=one.device, dtype=like.dtype)
    if one.device.type == "cpu" and like.device.type == "cuda":
        noise = noise.pin_memory()  # makes the copy asynchronous
    return noise.to(like.device, non_blocking=True)


def stochastic(
    scheduler: Any, noise: float | None = None, generators: Sequence[Generator] | None = None
) -> StochasticDDIM | StochasticFlow:
    """Return a copy of a pipeline's scheduler as a Markov chain with Gaussian moves.

    Its law is the p that `steer` tilts. Schedulers with betas become DDIM with eta = `noise`, flow
    schedulers become Euler with eta = `noise` * s'. `scheduler` itself is not modified; a scheduler
    of another class is replaced by DDIM or Euler with the same config, which is logged.

    noise: 0 (deterministic) to 1; None means 1.0 for schedulers with betas and 0.5 for flows, and
    the copy's `chain.noise` holds the value. Noise in a flow costs some sharpness compared to the
    stock sampler, which has none. generators: one per row, for pipelines that pass none to `step`
    (SD3, Flux, Wan). Raises ValueError if the scheduler is neither a flow nor has betas.
    """
    _check_stochastic(scheduler, noise, generators)
    finished = False
    if isinstance(scheduler, StochasticDDIM | StochasticFlow):
        made, finished = copy.copy(scheduler), scheduler.chain.finished
    else:
        made = _stochastic_copy(scheduler)
        _warn_distilled(scheduler)
    if noise is None:
        noise = FLOW_NOISE if isinstance(made, StochasticFlow) else DIFFUSION_NOISE
    made.chain = Chain(noise=float(noise), generators=generators, finished=finished)
    if isinstance(made, StochasticFlow) and made.config.invert_sigmas:
        raise ValueError(
            "The scheduler has invert_sigmas=True (its sigmas run from 0 to 1), for which moves "
            "with noise are not implemented; use a pipeline whose sigmas run from 1 to 0."
        )
    return made


def _check_stochastic(scheduler: Any, noise: Any, generators: Any) -> None:
    is_number = isinstance(noise, int | float) and not isinstance(noise, bool)
    if noise is not None and not (is_number and 0 <= noise <= 1):
        raise ValueError(
            f"noise={noise!r:.80} is outside [0, 1]: 0 is deterministic, 1 renoises fully."
        )
    each = generators if isinstance(generators, list | tuple) and generators else [generators]
    if generators is not None and not all(isinstance(one, Generator) for one in each):
        raise ValueError(
            f"generators={generators!r:.80}: pass a list of torch.Generator, one per row, or None."
        )
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(
            f"the scheduler is a {type(scheduler).__name__}: pass a pipeline's pipe.scheduler."
        )


def _stochastic_copy(scheduler: Any) -> Any:
    if type(scheduler) is DDIMScheduler:
        return _become(StochasticDDIM, scheduler)
    if type(scheduler) is FlowMatchEulerDiscreteScheduler:
        return _become(StochasticFlow, scheduler)
    if _is_flow(scheduler):
        return _flow_from(scheduler)
    if getattr(scheduler, "betas", None) is not None:
        return _ddim_from(scheduler)
    raise ValueError(
        f"{type(scheduler).__name__} is no flow-matching scheduler and has no betas, so no "
        "Gaussian move is known for it; set pipe.scheduler to a DDIMScheduler or a "
        "FlowMatchEulerDiscreteScheduler that fits the model."
    )


def _become(cls: type, scheduler: Any) -> Any:
    """Return a deep copy that keeps everything set on the scheduler, as an instance of `cls`."""
    made = copy.deepcopy(scheduler)
    made.__class__ = cls
    if cls is StochasticFlow and made.config.stochastic_sampling:
        made.register_to_config(stochastic_sampling=False)  # replaced by the noise added here
    return made


def _is_flow(scheduler: Any) -> bool:
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or bool(scheduler.config.get("use_flow_sigmas"))
        or scheduler.config.get("prediction_type") == "flow_prediction"
    )


def _flow_from(scheduler: Any) -> StochasticFlow:
    name = type(scheduler).__name__
    known = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    config = {key: value for key, value in scheduler.config.items() if key in known}
    if not name.startswith("FlowMatch"):
        config["shift"] = scheduler.config.get("flow_shift") or 1.0
    made = StochasticFlow(**config | {"stochastic_sampling": False})
    if not name.startswith("FlowMatch"):
        made.schedule = copy.deepcopy(scheduler)
        made.register_to_config(use_flow_sigmas=True)  # Flux reads this key
    _log_once(f"{name} is replaced by Euler for rectified flow, {_MARKOV}.")
    return made


def _ddim_from(scheduler: Any) -> StochasticDDIM:
    # a config without this key comes from a class that never clips; DDIM clips by default
    clip_sample = scheduler.config.get("clip_sample", False)
    made: Any = StochasticDDIM.from_config(scheduler.config, clip_sample=clip_sample)
    theirs = scheduler.alphas_cumprod.to(made.alphas_cumprod)
    if not torch.allclose(theirs, made.alphas_cumprod, atol=1e-6):
        made.alphas_cumprod = theirs.clone()
        if not made.config.set_alpha_to_one:
            made.final_alpha_cumprod = made.alphas_cumprod[0]
    _log_once(f"{type(scheduler).__name__} is replaced by DDIM, {_MARKOV}.")
    return made


def _warn_distilled(scheduler: Any) -> None:
    name = type(scheduler).__name__
    turbo = "EulerAncestral" in name and scheduler.config.get("timestep_spacing") == "trailing"
    if "LCM" in name or name == "TCDScheduler" or turbo:
        _log_once(
            f"{name} belongs to a model distilled to a few steps; it is replaced by DDIM or Euler "
            "with noise, which samples another distribution, and there are few steps to steer."
        )


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)
