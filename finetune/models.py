"""The model families: prompts to conditioning, noising of latents, and network predictions.

Latents are those that the pipeline returns with `output_type="latent"` (packed for Flux), which are
also the network's inputs. Legend: n rows; t in (0, 1) is the time, 0 for clean latents and 1 for
pure noise: the noise level of a flow, or with betas the timestep over T.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FAMILIES",
    "Family",
    "Noising",
    "decode",
    "distilled",
    "encode",
    "encoded",
    "family_of",
    "noising_of",
    "predict",
]

Conditioning = dict[str, Tensor]  # tensors with one row per prompt or image


@dataclass(frozen=True)
class Family:
    """The parts of fine-tuning that depend on the pipeline's class.

    network: the pipeline's attribute that is trained. encode(pipe, prompts, call) returns tensors
    with one row per prompt; keywords(x, timestep, conditioning) returns the keywords of the
    network's forward. targets: names of the layers that LoRA adapts by default.
    """

    network: str
    encode: Callable[[Any, list[str], Mapping[str, Any]], Conditioning]
    keywords: Callable[[Tensor, Tensor, Conditioning], dict[str, Any]]
    targets: tuple[str, ...]


UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
JOINT_TARGETS = (*UNET_TARGETS, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")


def encoded(pipe: Any, prompts: list[str], call: Mapping[str, Any], **more: Any) -> Any:
    """Call the pipeline's own encode_prompt without guidance, with the keywords that it accepts.

    call: as in `encode`.
    """
    parameters = inspect.signature(pipe.encode_prompt).parameters
    passed = {name: call[name] for name in call if name in parameters and name != "device"}
    free: dict[str, Any] = {}
    if "do_classifier_free_guidance" in parameters:
        free["do_classifier_free_guidance"] = False
    for name in ("prompt_2", "prompt_3"):
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            free[name] = None
    device = call.get("device") or pipe._execution_device
    return pipe.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=1, **free, **more, **passed
    )


def _encode_sd(pipe: Any, prompts: list[str], call: Mapping[str, Any]) -> Conditioning:
    return {"embeds": encoded(pipe, prompts, call)[0]}


def _call_sd(x: Tensor, t: Tensor, given: Conditioning) -> dict[str, Any]:
    return {"sample": x, "timestep": t, "encoder_hidden_states": given["embeds"]}


def _encode_sdxl(pipe: Any, prompts: list[str], call: Mapping[str, Any]) -> Conditioning:
    embeds, _, pooled, _ = encoded(pipe, prompts, call)
    side = pipe.default_sample_size * pipe.vae_scale_factor
    size = call.get("height") or side, call.get("width") or side
    original, target = call.get("original_size") or size, call.get("target_size") or size
    corner = call.get("crops_coords_top_left", (0, 0))
    ids = embeds.new_tensor([[*original, *corner, *target]]).repeat(len(prompts), 1)
    return {"embeds": embeds, "pooled": pooled, "time_ids": ids}


def _call_sdxl(x: Tensor, t: Tensor, given: Conditioning) -> dict[str, Any]:
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    return _call_sd(x, t, given) | {"added_cond_kwargs": added}


def _encode_sd3(pipe: Any, prompts: list[str], call: Mapping[str, Any]) -> Conditioning:
    embeds, _, pooled, _ = encoded(pipe, prompts, call)
    return {"embeds": embeds, "pooled": pooled}


def _call_sd3(x: Tensor, t: Tensor, given: Conditioning) -> dict[str, Any]:
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": given["embeds"],
        "pooled_projections": given["pooled"],
    }


def _encode_flux(pipe: Any, prompts: list[str], call: Mapping[str, Any]) -> Conditioning:
    embeds, pooled, _ = encoded(pipe, prompts, call)
    found = {"embeds": embeds, "pooled": pooled}
    side = pipe.default_sample_size * pipe.vae_scale_factor
    rows, columns = (
        int(call.get(name) or side) // (pipe.vae_scale_factor * 2) for name in ("height", "width")
    )
    found["grid"] = torch.tensor([[rows, columns]]).repeat(len(prompts), 1)
    if distilled(pipe):
        own = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
        scale = float(call.get("guidance_scale", own))
        found["guidance"] = torch.full((len(prompts),), scale, device=embeds.device)
    return found


def _call_flux(x: Tensor, t: Tensor, given: Conditioning) -> dict[str, Any]:
    rows, columns = given["grid"][0].tolist()
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    return _call_sd3(x, t / 1000, given) | {
        "img_ids": places.flatten(0, 1),
        "txt_ids": x.new_zeros(given["embeds"].shape[1], 3),
        "guidance": given.get("guidance"),
    }


# by the pipeline's class; img2img and ControlNet variants train the text-to-image network
FAMILIES = {
    "StableDiffusionPipeline": Family("unet", _encode_sd, _call_sd, UNET_TARGETS),
    "StableDiffusionXLPipeline": Family("unet", _encode_sdxl, _call_sdxl, UNET_TARGETS),
    "StableDiffusion3Pipeline": Family("transformer", _encode_sd3, _call_sd3, JOINT_TARGETS),
    "FluxPipeline": Family("transformer", _encode_flux, _call_flux, JOINT_TARGETS),
}


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline; raises ValueError for an unsupported class."""
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ValueError(f"{name} cannot be fine-tuned here; load one of {sorted(FAMILIES)}")
    return FAMILIES[name]


def distilled(pipe: Any) -> bool:
    """Return whether the guidance scale is an input of the network, as in FLUX.1-dev."""
    config = getattr(pipe, family_of(pipe).network).config
    return bool(getattr(config, "guidance_embeds", False))


@dataclass(frozen=True)
class Noising:
    """How latents are noised, and what the network predicts.

    Flows: x_t = (1 - t) x0 + t ε, target ε - x0 ("velocity"). With betas: x = √ᾱ x0 + √(1 - ᾱ) ε at
    the timestep floor(t·T), target by `prediction` ("epsilon", "v_prediction" or "sample").
    """

    prediction: str
    num_train_timesteps: int
    alphas_cumprod: Tensor | None = None

    @property
    def flow(self) -> bool:
        return self.alphas_cumprod is None

    def timesteps(self, t: Tensor) -> Tensor:
        """Return the network's timesteps (n,): floats up to T for a flow, else integers."""
        if self.flow:
            return t * self.num_train_timesteps
        return (t * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_t, target), both shaped as x0 (n, ...), for t (n,)."""
        shape = (-1,) + (1,) * (x0.ndim - 1)
        if self.alphas_cumprod is None:
            share = t.view(shape)
            return (1 - share) * x0 + share * noise, noise - x0
        kept = self.alphas_cumprod.to(x0.device)[self.timesteps(t)].view(shape).to(x0.dtype)
        signal, spread = kept.sqrt(), (1 - kept).sqrt()
        x = signal * x0 + spread * noise
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: signal * noise - spread * x0,
            "sample": lambda: x0,
        }
        return x, targets[self.prediction]()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Return ½|dλ/dt| times the factor from the prediction's squared error to ε's, (n,).

        λ is the log signal-to-noise ratio (Kingma et al. 2021). With this weight, and β multiplied
        by the number of an image's elements, implicit scores averaged over t ~ U(0, 1) are
        log-likelihood ratios; see `losses.elbo_weight` for flows.
        """
        if self.alphas_cumprod is None:
            return (1 - t) / t
        kept = self.alphas_cumprod.double().to(t.device)
        ratio = (kept / (1 - kept)).log()
        slope = -torch.gradient(ratio)[0] * self.num_train_timesteps  # dλ/dt, positive
        at = self.timesteps(t)
        kept, slope = kept[at], slope[at]
        factor = {"epsilon": 1.0, "v_prediction": kept, "sample": kept / (1 - kept)}
        return (slope / 2 * factor[self.prediction]).to(t.dtype)

    def velocity_weight(self, t: Tensor) -> Tensor:
        """Return the factor from the prediction's squared error to that of the velocity, (n,).

        v = α ε - σ x0 with betas (Salimans & Ho 2022, App. D). Near pure noise, where an image's
        layout is decided, the error of ε is uninformative, because x is nearly ε itself.
        """
        if self.alphas_cumprod is None:
            return torch.ones_like(t)
        kept = self.alphas_cumprod.to(t)[self.timesteps(t)]
        one = torch.ones_like(kept)
        factor = {"epsilon": 1 / kept, "v_prediction": one, "sample": 1 / (1 - kept)}
        return factor[self.prediction]

    def x0_error(self, t: Tensor) -> Tensor:
        """Return the factor from the prediction's error to that of x0, without its sign, (n,)."""
        if self.alphas_cumprod is None:
            return t
        kept = self.alphas_cumprod.to(t)[self.timesteps(t)]
        one, spread = torch.ones_like(kept), (1 - kept).sqrt()
        factor = {"epsilon": spread / kept.sqrt(), "v_prediction": spread, "sample": one}
        return factor[self.prediction]


def noising_of(pipe: Any) -> Noising:
    """Return the pipeline's noising, from its scheduler's configuration."""
    config = pipe.scheduler.config
    steps = int(config.num_train_timesteps)
    betas = getattr(pipe.scheduler, "alphas_cumprod", None)
    if betas is None:
        return Noising("velocity", steps)
    kind = str(config.get("prediction_type", "epsilon"))
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"the scheduler predicts {kind!r}; supported are epsilon, v_prediction and sample"
        )
    return Noising(kind, steps, betas.double())


def predict(
    network: nn.Module, family: Family, noising: Noising, x: Tensor, t: Tensor, given: Conditioning
) -> Tensor:
    """Return the network's output for x_t (n, ...) at t (n,) and n rows of conditioning.

    Conditioning is cast to x's dtype, since the encoders may have another precision.
    """
    given = {name: v.to(x.dtype) if v.is_floating_point() else v for name, v in given.items()}
    keywords = family.keywords(x, noising.timesteps(t), given)
    return network(**keywords, return_dict=False)[0]


def encode(pipe: Any, prompts: Sequence[str], **call: Any) -> Conditioning:
    """Return the conditioning of prompts, one row each, from the pipeline's own encoders.

    call: keywords of the pipeline's call that affect it (height, max_sequence_length, ...), and
    optionally `device`, the encoders' device if it is not the pipeline's.
    """
    with torch.no_grad():
        found = family_of(pipe).encode(pipe, list(prompts), call)
    return {name: value.detach() for name, value in found.items()}


def encode_negative(pipe: Any, prompt: str, **call: Any) -> Conditioning:
    """Return the conditioning of the negative prompt, one row; zeros for an empty one in SDXL."""
    found = encode(pipe, [prompt], **call)
    if prompt or not pipe.config.get("force_zeros_for_empty_prompt"):
        return found
    return {name: v if name == "time_ids" else torch.zeros_like(v) for name, v in found.items()}


def decode(pipe: Any, latents: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Decode latents to images (n, 3, h, w) in [0, 1] as the pipeline does."""
    if type(pipe).__name__ == "FluxPipeline":
        side = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = (int(call.get(name) or side) for name in ("height", "width"))
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    config = pipe.vae.config
    large = type(pipe).__name__ == "StableDiffusionXLPipeline" and config.force_upcast
    if large and pipe.vae.dtype == torch.float16:  # would overflow; the pipeline upcasts as well
        pipe.vae.to(torch.float32)
    shift = getattr(config, "shift_factor", None) or 0.0
    x = (latents / config.scaling_factor + shift).to(pipe.vae.dtype)
    return pipe.image_processor.postprocess(pipe.vae.decode(x).sample, output_type="pt").float()
