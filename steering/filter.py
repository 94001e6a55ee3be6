"""The Feynman-Kac particle filter: evaluate, score, weigh, resample, move.

A chain x_T -> ... -> x_0 with law p is steered towards p(x_0) exp(λ r(x_0)) / Z by k weighted
particles per prompt. At a scored step, the reward r of the image predicted *from x_t* weighs x_t;
then x_t is resampled together with the move that the network proposed for it. The noise of the move
is drawn last, so that the children of one parent differ without another network call.

Weights are log-weights, in float32 or better, and are carried on without resampling while the
effective sample size is high. E[exp(log_z)] = Z for any number of particles and any settings.
Del Moral (2004); Chopin & Papaspiliopoulos (2020); Singhal et al. (2025).

b prompts, k particles per prompt. `start`, `weigh`, `resample` and `close` are the filter, for code
whose loop is elsewhere (`steering.schedulers`); `particle_filter` is a loop around them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from steering import potentials
from steering.arguments import check_filter
from steering.potentials import POTENTIALS, History
from steering.resampling import RESAMPLERS
from steering.settings import FeynmanKac, population_sizes, scored_steps
from steering.transitions import Transition
from steering.weights import ess, log_mean_exp, normalize

__all__ = [
    "FeynmanKac",
    "FilterState",
    "Population",
    "Resampled",
    "Transition",
    "check_rewards",
    "close",
    "final_log_z",
    "particle_filter",
    "resample",
    "start",
    "take",
    "weigh",
]


class FilterState(NamedTuple):
    """The state of the next score, per prompt (b,) or particle (b, k), in float32 or float64."""

    log_weights: Tensor  # (b, k), not normalised; 0 after resampling
    log_z: Tensor  # (b,) the part that resampling has folded in
    history: History  # the rewards along each particle's ancestry
    scale: Tensor  # (b,) λ_t
    anchor: Tensor  # (b, k) λ S when log_weights were last 0, so log_weights = λ_t S_t - anchor


class Resampled(NamedTuple):
    """The result of `resample` for b prompts."""

    state: FilterState
    ancestors: Tensor  # (b, num) int64
    ess: Tensor  # (b,) before resampling
    chosen: Tensor  # (b,) bool: the weights were folded into log_z and set to 0


@dataclass(frozen=True)
class Population:
    """The particles of b prompts after one step."""

    step: int
    x: Tensor  # (b, k, *shape)
    x0: Tensor  # (b, k, *shape), predicted from the parents of x; x itself after the last step
    rewards: Tensor | None  # (b, k) of x0; None where the step was not scored
    log_weights: Tensor  # (b, k), after resampling
    log_z: Tensor  # (b,) log of the estimate so far, log_weights included
    ancestors: Tensor  # (b, k) int64: index of each particle's parent in the previous population
    ess: Tensor  # (b,) before resampling


def check_rewards(
    rewards: Tensor, step: int, shape: tuple[int, int], reward_scale: float = 1.0
) -> None:
    """Raise ValueError unless `rewards` has shape (b, k) and is finite, also when scaled by λ.

    This is the only read from the device per score.
    """
    if not isinstance(rewards, Tensor):
        raise ValueError(
            f"the reward returned a {type(rewards).__name__} at step {step}: return a tensor, "
            f"one number per particle, {shape}"
        )
    if tuple(rewards.shape) != shape:
        raise ValueError(
            f"the reward returned shape {tuple(rewards.shape)} at step {step}: "
            f"return one number per particle, {shape}"
        )
    finite = torch.isfinite(_at_least_float32(rewards) * reward_scale)
    if not finite.all():
        if torch.isfinite(rewards).all():
            raise ValueError(
                f"reward_scale={reward_scale:g} times the rewards at step {step} overflows "
                "their dtype: lower reward_scale"
            )
        prompt, particle = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the reward of prompt {prompt}, particle {particle} at step {step} is "
            f"{rewards[prompt, particle].item()}: return a finite number for every image"
        )


def start(b: int, k: int, device: torch.device | str | None = None) -> FilterState:
    """Return the initial state for b prompts of k particles: equal weights, no scores."""
    per_particle = torch.zeros(b, k, device=device)
    per_prompt = torch.zeros(b, device=device)
    history = History(torch.full_like(per_particle, -math.inf), per_particle, per_particle)
    return FilterState(per_particle, per_prompt, history, per_prompt, per_particle)


def weigh(
    state: FilterState, rewards: Tensor, settings: FeynmanKac, progress: float
) -> FilterState:
    """Multiply the weights by the potential of `rewards` (b, k), which belong to the present x_t.

    progress, in (0, 1], is (index of this score + 1) / (number of scores + 1), which linear
    tempering multiplies λ by.
    """
    rewards = _at_least_float32(rewards)
    state = _in(state, torch.promote_types(rewards.dtype, state.log_weights.dtype))
    applied = state.scale[:, None] * state.history.total
    history = POTENTIALS[settings.potential](state.history, rewards)
    if settings.tempering == "adaptive":
        scale = potentials.adaptive(
            state.log_weights, history.total, applied, state.scale, settings.reward_scale
        )
    elif settings.tempering == "linear":
        scale = torch.full_like(state.scale, settings.reward_scale * progress)
    else:
        scale = torch.full_like(state.scale, settings.reward_scale)
    # Computed from the anchor rather than summed, so that rounding does not accumulate: without
    # resampling the closed weights are exactly λ r(x_final), and best-of-k ranks as the rewards do.
    log_weights = scale[:, None] * history.total - state.anchor
    return state._replace(log_weights=log_weights, history=history, scale=scale)


def resample(
    state: FilterState,
    settings: FeynmanKac,
    generators: Generator | Sequence[Generator],
    num: int | None = None,
    stochastic: bool | Tensor = True,
) -> Resampled:
    """Resample prompts whose effective sample size is low, to `num` <= k particles.

    The decision is made on the device and returned as `chosen`. Prompts that are not resampled keep
    their weights, and their ancestors are 0..k-1. `stochastic` says whether the coming move draws
    noise; without noise the children would be copies, so nothing is resampled. num < k (a funnel)
    always resamples, except if reward_scale is 0, which never resamples and keeps the first `num`
    particles.
    """
    b, k = state.log_weights.shape
    num = k if num is None else num
    before = ess(state.log_weights)
    identity = torch.arange(num, device=before.device).expand(b, num)
    if settings.reward_scale == 0:
        return Resampled(_descend(state, identity), identity, before, before < 0)

    drawn = RESAMPLERS[settings.resampler](normalize(state.log_weights), num, generators)
    if num < k:
        chosen = torch.ones_like(before, dtype=torch.bool)
    else:
        # min_ess = 1 resamples even if rounding, or equal weights, make ess exactly k.
        low = before < settings.min_ess * k if settings.min_ess < 1 else torch.ones_like(before) > 0
        chosen = low & stochastic
    ancestors = torch.where(chosen[:, None], drawn, identity)
    folded = state.log_z + log_mean_exp(state.log_weights)
    state = _descend(state, ancestors)
    applied = state.scale[:, None] * state.history.total
    state = state._replace(
        log_weights=state.log_weights.masked_fill(chosen[:, None], 0),
        log_z=torch.where(chosen, folded, state.log_z),
        anchor=torch.where(chosen[:, None], applied, state.anchor),
    )
    return Resampled(state, ancestors, before, chosen)


def close(state: FilterState, rewards: Tensor, settings: FeynmanKac) -> FilterState:
    """Apply the last potential, from the rewards (b, k) of the final images.

    It completes the product of potentials along every particle's ancestry to exp(λ r(x_final)).
    """
    target = potentials.closing(_at_least_float32(rewards), settings.reward_scale)
    return state._replace(log_weights=target - state.anchor)


def final_log_z(state: FilterState) -> Tensor:
    """Return the log of the estimate of E_p[exp(λ r)] (b,), with the present weights included."""
    return state.log_z + log_mean_exp(state.log_weights)


def take(values: Tensor, ancestors: Tensor) -> Tensor:
    """Select ancestors (b, num) from values (b, k, *shape); returns (b, num, *shape)."""
    rows = torch.arange(values.shape[0], device=values.device)[:, None]
    return values[rows, ancestors]


def particle_filter(
    x: Tensor,
    kernel: Callable[[int, Tensor], Transition],
    reward: Callable[[Tensor], Tensor],
    num_steps: int,
    settings: FeynmanKac,
    *,
    generator: Generator,
    on_the_way: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Population]:
    """Run the filter on any chain; yields a Population per step, the last with closed weights.

    x (b, k, *shape) is drawn from the chain's initial law; kernel(step, x) -> Transition proposes
    the move at step = 0 .. num_steps-1; reward(x0) -> (b, k) scores predicted and final x0;
    on_the_way(x0) -> (b, k), if given, scores the predicted ones in its place, and the target stays
    that of reward. All noise comes from `generator`, which also seeds one generator per prompt for
    resampling, so the noise does not depend on whether anything is resampled. Raises ValueError
    before the first step for settings that do not fit num_steps or k, and later for rewards that
    are not finite. Rewards are computed at every scored step, even with min_ess=0, since the
    populations report them.
    """
    check_filter(x, kernel, reward, num_steps, settings, generator, on_the_way)
    scored = scored_steps(num_steps, settings)
    sizes = population_sizes(x.shape[1], len(scored), settings)
    return _run(
        x,
        kernel,
        (reward, reward if on_the_way is None else on_the_way),
        num_steps,
        settings,
        generator,
        dict(zip(scored, sizes, strict=True)),
    )


def _run(
    x: Tensor,
    kernel: Callable[[int, Tensor], Transition],
    scorers: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    num_steps: int,
    settings: FeynmanKac,
    generator: Generator,
    sizes: dict[int, int],
) -> Iterator[Population]:
    (b, k), (reward, scout) = x.shape[:2], scorers
    state = start(b, k, x.device)
    seeds = torch.randint(2**62, (b,), generator=generator, device=generator.device).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scores_done = 0
    for step in range(num_steps):
        move = kernel(step, x)
        _check_shape(move, x, step)
        rewards, x0, before = None, move.x0, ess(state.log_weights)
        ancestors = torch.arange(x.shape[1], device=x.device).expand(b, -1)
        if step in sizes:
            rewards = scout(x0)
            check_rewards(rewards, step, (b, x.shape[1]), settings.reward_scale)
            scores_done += 1
            state = weigh(state, rewards, settings, scores_done / (len(sizes) + 1))
            noisy = (move.std > 0).any()
            state, ancestors, before, _ = resample(state, settings, generators, sizes[step], noisy)
            move = _children(move, ancestors)
            rewards, x0 = take(rewards, ancestors), move.x0
        x = move.mean + move.std * _noise_like(move.mean, generator)
        if step == num_steps - 1:
            rewards, x0 = reward(x), x
            check_rewards(rewards, step, (b, x.shape[1]), settings.reward_scale)
            state = close(state, rewards, settings)
            before = ess(state.log_weights)
        yield Population(
            step, x, x0, rewards, state.log_weights, final_log_z(state), ancestors, before
        )


def _check_shape(move: Transition, x: Tensor, step: int) -> None:
    if not isinstance(move, Transition) or not all(
        isinstance(part, Tensor) for part in (move.mean, move.std, move.x0)
    ):
        raise ValueError(
            f"the kernel returned a {type(move).__name__} at step {step}: return a Transition of "
            "tensors"
        )
    if move.mean.shape != x.shape or move.x0.shape != x.shape:
        raise ValueError(
            f"the kernel's mean and x0 have shapes {tuple(move.mean.shape)} and "
            f"{tuple(move.x0.shape)} at step {step}: return the shape of x, {tuple(x.shape)}"
        )
    # only on a CPU, where reading the value does not synchronise
    if move.std.device.type == "cpu" and not ((move.std >= 0) & move.std.isfinite()).all():
        raise ValueError(
            f"the kernel's std at step {step} is negative or not finite: return standard deviations"
        )


def _noise_like(mean: Tensor, generator: Generator) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
    return noise.to(mean.device)


def _children(move: Transition, ancestors: Tensor) -> Transition:
    std = move.std
    if std.numel() > 1:
        std = take(std.expand_as(move.mean), ancestors)
    return Transition(take(move.mean, ancestors), std, take(move.x0, ancestors))


def _descend(state: FilterState, ancestors: Tensor) -> FilterState:
    return state._replace(
        log_weights=take(state.log_weights, ancestors),
        history=History(*(take(values, ancestors) for values in state.history)),
        anchor=take(state.anchor, ancestors),
    )


def _in(state: FilterState, dtype: torch.dtype) -> FilterState:
    """Cast the whole state to `dtype`; a float32 part would round λ for all others."""
    log_weights, log_z, scale, anchor = (
        x.to(dtype) for x in (state.log_weights, state.log_z, state.scale, state.anchor)
    )
    history = History(*(values.to(dtype) for values in state.history))
    return FilterState(log_weights, log_z, history, scale, anchor)


def _at_least_float32(rewards: Tensor) -> Tensor:
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))
