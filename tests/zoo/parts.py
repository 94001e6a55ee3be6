"""Tiny random components of diffusers and transformers, by the name of their class.

A component is built from its class's own parameters: what a parameter is called says how small it
may be (`SIZES`), and what a class needs otherwise stands beside its kin.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
# diffusers exports lazily and annotates more narrowly than it takes

import inspect
from typing import Any

import diffusers
import torch
import transformers

from zoo.audio_networks import AUDIO
from zoo.decoders import DECODERS
from zoo.networks import NETWORKS
from zoo.texts import TEXTS, TOKENIZERS
from zoo.video_networks import VIDEO_NETWORKS

__all__ = ["build"]

# parameter -> value, wherever a class has it
SIZES: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 8),
    "joint_attention_dim": 32,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "pooled_projection_dim": 32,
    "caption_projection_dim": 32,
    "text_embed_dim": 32,
    "text_dim": 32,
    "ffn_dim": 32,
    "time_embed_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
    "latent_channels": 4,
    "max_sequence_length": 16,
    "rope_max_seq_len": 32,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

_SCHEDULERS = {
    "DDIMScheduler": _BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "UniPCMultistepScheduler": _FLOW,
}
_CONFIGS = TEXTS | DECODERS | NETWORKS | VIDEO_NETWORKS | AUDIO | _SCHEDULERS
# annotations that stand for several classes, or for one that the weights decide
_INSTEAD = {
    "KarrasDiffusionSchedulers": "DDIMScheduler",
    "SchedulerMixin": "FlowMatchEulerDiscreteScheduler",
    "Gemma2PreTrainedModel": "Gemma2Model",
    "GemmaPreTrainedModel": "GemmaModel",
    "BaseGuidance": "AdaptiveProjectedGuidance",
    "PreTrainedModel": "Qwen3Model",
    "AsymmetricAutoencoderKL": "AutoencoderKL",
}


def build(name: str, changes: dict[str, Any], given: Any = None) -> Any:
    """A small component of the class `name`, with `changes` to its config.

    `given` is the class itself, for those that neither library exports.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    if name == "CosmosSafetyChecker":
        return Harmless()
    name = _INSTEAD.get(name, name)
    source = transformers if hasattr(transformers, name) else diffusers
    cls: Any = getattr(source, name, given)
    config = _CONFIGS.get(name, {}) | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        if issubclass(cls, transformers.PreTrainedModel):
            kind: Any = cls.config_class
            made = cls(kind(**config))
            if name == "ChatGLMModel":  # it makes layers of whatever is in memory
                for weight in made.parameters():
                    torch.nn.init.normal_(weight, std=0.1)
        else:
            known = inspect.signature(cls.__init__).parameters
            sizes = {key: value for key, value in SIZES.items() if key in known}
            if "down_block_types" in config:
                sizes.pop("num_attention_heads", None)  # of a U-Net it means attention_head_dim
            made = cls(**(config if "Scheduler" in name else sizes | config))
        return _awake(made) if isinstance(made, torch.nn.Module) else made


class Harmless:
    """In place of a safety checker whose package is not there."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _awake(network: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, with values where a layer starts at zero and would have no effect."""
    for name, weight in network.named_parameters():
        empty = name == "pad_token"  # Lumina's, which holds what its memory held before
        if empty or not weight.any() or not weight.isfinite().all():
            torch.nn.init.normal_(weight, std=0.1)
    return network.eval()
