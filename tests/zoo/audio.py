"""The pipelines of sound, which need decode=."""

import torch

from zoo.building import Animal

__all__ = ["ANIMALS", "RATE", "waves"]

RATE = 8000  # Hz


def waves(latents: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Waveforms (n, 2, samples) of any latents, and their sampling rate."""
    flat = latents.float().flatten(1).tanh()
    return torch.stack([flat, flat / 2], 1), RATE


_DECODE = {"decode": waves}
_HEARD = torch.linspace(-1, 1, 2 * 32).reshape(1, 2, 32)
_EACH = {"scheduler": {"num_train_timesteps": 1}}  # timesteps that are sigmas

ANIMALS: dict[str, Animal] = {
    "StableAudio3Pipeline": Animal(_EACH, call={"duration": 1.0}, steer=_DECODE),
    "StableAudio3InpaintPipeline": Animal(
        _EACH | {"transformer": {"local_add_cond_dim": 9}},
        call={
            "duration": 1.0,
            "audio": _HEARD,
            "mask_start_seconds": 0.5,
            "mask_end_seconds": 1.0,
        },
        steer=_DECODE,
    ),
    "StableAudio3AudioToAudioPipeline": Animal(
        _EACH, call={"duration": 1.0, "audio": _HEARD, "init_noise_level": 0.7}, steer=_DECODE
    ),
    "StableAudioPipeline": Animal(
        {"scheduler": {"sigma_data": 1.0, "prediction_type": "v_prediction"}},
        call={"audio_end_in_s": 1.0},
        steer=_DECODE,
    ),
    "AceStepPipeline": Animal(
        _EACH | {"tokenizer": "Qwen2Tokenizer"},
        call={"audio_duration": 1.0, "guidance_scale": 1.0},
        steer=_DECODE,
    ),
    "AudioLDM2Pipeline": Animal(
        {"tokenizer": "RobertaTokenizer", "vae": {"in_channels": 1, "out_channels": 1}},
        call={"audio_length_in_s": 0.1},
        steer=_DECODE,
    ),
}
