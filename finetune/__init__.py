"""Fine-tuning toward the tilted target: offline GDRO; Flow-GRPO, DiffusionNFT; a critic."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.awm import Awm
    from finetune.checks import Check, Watch
    from finetune.data import load_data
    from finetune.gdro import Gdro
    from finetune.grpo import Grpo
    from finetune.losses import gdro_loss, implicit_scores
    from finetune.nft import Nft
    from finetune.policy_losses import group_advantages, policy_loss
    from finetune.rollouts import Plan, generate
    from finetune.shards import Rollouts

# public name -> its module, imported on first use because that takes seconds
_FROM = {
    "Awm": "awm", "Check": "checks", "Gdro": "gdro", "Grpo": "grpo", "Nft": "nft",
    "Plan": "rollouts", "Rollouts": "shards", "Watch": "checks", "gdro_loss": "losses",
    "generate": "rollouts", "group_advantages": "policy_losses", "implicit_scores": "losses",
    "load_data": "data", "policy_loss": "policy_losses",
}  # fmt: skip

__all__ = [
    "Awm",
    "Check",
    "Gdro",
    "Grpo",
    "Nft",
    "Plan",
    "Rollouts",
    "Watch",
    "gdro_loss",
    "generate",
    "group_advantages",
    "implicit_scores",
    "load_data",
    "policy_loss",
]


def __getattr__(name: str) -> object:
    if name in _FROM:
        return getattr(importlib.import_module(f"finetune.{_FROM[name]}"), name)
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
