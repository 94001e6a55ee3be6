"""Gaussian moves proposed by a network's output, for VP diffusion (DDIM) and rectified flow.

alpha_bar is the VP signal level ᾱ_t in x_t = √ᾱ_t x0 + √(1-ᾱ_t) noise; sigma is the flow time s in
x_s = (1-s) x0 + s noise. Both are floats or tensors that broadcast against the sample.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Transition", "ddim_transition", "flow_transition", "log_prob", "sde_transition"]


@dataclass(frozen=True)
class Transition:
    """A proposed move N(mean, std² I) and the predicted x0 from which it was computed."""

    mean: Tensor  # (b, k, *shape), or any shape for a single move
    std: Tensor  # broadcasts against mean; 0 for a move without noise
    x0: Tensor  # shaped as mean


def ddim_transition(
    model_output: Tensor,
    sample: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_prev: Tensor | float,
    eta: float,
    prediction_type: str,
) -> Transition:
    """Return the DDIM move (Song, Meng & Ermon 2021, eqs. 12, 16), η from 0 (no noise) to 1 (DDPM).

    x' = √ᾱ' x̂0 + √(1-ᾱ'-σ²) ε̂ + σ z, σ = η √((1-ᾱ')/(1-ᾱ)) √(1-ᾱ/ᾱ'), with ᾱ' = alpha_bar_prev.
    prediction_type says what model_output predicts: "epsilon", "v_prediction" or "sample". Computed
    in the dtype of the sample, at least float32. Finite at ᾱ = 0 except for "epsilon", which does
    not determine x̂0 there. Raises ValueError for an unknown prediction_type.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sample, model_output = sample.to(dtype), model_output.to(dtype)
    alpha_bar = torch.as_tensor(alpha_bar, dtype=dtype)
    alpha_bar_prev = torch.as_tensor(alpha_bar_prev, dtype=dtype)
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    if prediction_type == "epsilon":
        x0, noise = (sample - spread * model_output) / signal, model_output
    elif prediction_type == "v_prediction":
        x0 = signal * sample - spread * model_output
        noise = signal * model_output + spread * sample
    elif prediction_type == "sample":
        x0, noise = model_output, (sample - signal * model_output) / spread
    else:
        raise ValueError(
            f"prediction_type is {prediction_type!r}, not 'epsilon', 'v_prediction' or 'sample': "
            "pass what the network was trained to predict"
        )

    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    std = eta * variance.sqrt()
    # At eta = 1 and ᾱ = 0 this is zero in exact arithmetic and may round below it.
    along_noise = (1 - alpha_bar_prev - std**2).clamp(min=0).sqrt()
    return Transition(alpha_bar_prev.sqrt() * x0 + along_noise * noise, std, x0)


def flow_transition(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    eta: Tensor | float,
) -> Transition:
    """Return a rectified-flow step with noise, from s = sigma to s' = sigma_next, 0 <= η <= s'.

    x' = x + (s'-s) v - (s' - √(s'²-η²)) ε̂ + η z, with x̂0 = x - s v and ε̂ = x + (1-s) v; the mean
    is (1-s') x̂0 + √(s'²-η²) ε̂. η = 0 is the Euler step, bit for bit as in diffusers; η = s'
    replaces all noise. Finite at s = 1. Computed in the dtype of x, at least float32, except that
    (s'-s) v is rounded as in the stock scheduler. Raises ValueError if η > s', which is not
    checked for tensors on another device than the CPU.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    sigma = torch.as_tensor(sigma, dtype=dtype)
    sigma_next = torch.as_tensor(sigma_next, dtype=dtype)
    eta = torch.as_tensor(eta, dtype=dtype)
    if eta.device.type == sigma_next.device.type == "cpu" and (eta > sigma_next * (1 + 1e-6)).any():
        raise ValueError(
            f"eta is {eta.max().item():g}, which exceeds sigma_next = "
            f"{sigma_next.min().item():g}: pass eta between 0 and sigma_next"
        )
    x0 = x - sigma * velocity.to(dtype)
    noise = x + (1 - sigma) * velocity.to(dtype)
    removed = sigma_next - (sigma_next**2 - eta**2).clamp(min=0).sqrt()
    # √(s'²) is exactly s' in binary floating point, so for η = 0 nothing is removed.
    mean = x + (sigma_next - sigma) * velocity - removed * noise
    return Transition(mean, eta, x0)


def sde_transition(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    rate: Tensor | float,
) -> Transition:
    """Return the Euler-Maruyama step of a flow's SDE, from s = sigma > 0 to s' = sigma_next < s.

    dx = (v + g²/(2s) ε̂) ds + g dw backwards in s, with g = rate and ε̂ = x + (1-s) v, has the flow's
    marginals for every g(s) (Albergo et al. 2023; the score is -ε̂/s). Flow-GRPO (Liu et al. 2025,
    eq. 9) takes g = a √(s/(1-s)), DanceGRPO (Xue et al. 2025) a constant g. Unlike that of
    `flow_transition`, one step does not keep the marginal: with h = s - s', for a known x0 its
    variance is s'² + g²h²/s + g⁴h²/(4s²) instead of s'². Computed in the dtype of x, at least
    float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, velocity = x.to(dtype), velocity.to(dtype)
    sigma = torch.as_tensor(sigma, dtype=dtype)
    step = torch.as_tensor(sigma_next, dtype=dtype) - sigma
    rate = torch.as_tensor(rate, dtype=dtype)
    noise = x + (1 - sigma) * velocity
    mean = x + (velocity + rate**2 / (2 * sigma) * noise) * step
    return Transition(mean, rate * (-step).sqrt(), x - sigma * velocity)


def log_prob(transition: Transition, x: Tensor) -> Tensor:
    """Return log N(x; mean, std² I), *summed* (not averaged) over the dimensions of the latent.

    x (b, k, *shape) -> (b, k), at least float32; -inf or nan if std is 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    std = transition.std.to(dtype)
    z = (x.to(dtype) - transition.mean.to(dtype)) / std
    density = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(2).sum(dim=2) if density.ndim > 2 else density
