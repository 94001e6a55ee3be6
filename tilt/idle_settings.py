"""Checks that refuse training settings which have no effect in combination with the others.

Each raises ValueError for the first such setting of the command that is not at its default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.ranges import refuse_idle

__all__ = ["check_adversarial", "check_critic", "check_gdro"]


def check_gdro(settings: Any) -> None:
    """Check the settings of `tilt train gdro`."""
    _check_checks(settings, "offload")
    if settings.gdro.form == "rank":
        refuse_idle(settings, ["gdro.temperature"], "gdro.form is 'rank'")


def check_adversarial(settings: Any) -> None:
    """Check the settings of `tilt train adversarial`."""
    _check_checks(settings)
    others = [name for name in ("grpo", "nft", "awm") if name != settings.method]
    refuse_idle(settings, others, _is("method", settings))
    _check_method(settings)
    if not settings.references:
        refuse_idle(settings, ["paired", "critic_weight"], "references= is not set")
    if not (settings.references and settings.critic_weight):
        names = ["critic_kind", "tower", "critic_layers", "critic_from", "critic"]
        refuse_idle(settings, names, "a critic needs references=, and a critic_weight above 0")
    elif settings.critic_kind == "features" and not settings.critic_from:
        refuse_idle(settings, ["critic_layers"], _is("critic_kind", settings))
    check_critic(settings, "critic_kind")


def _check_method(settings: Any) -> None:
    """Check the settings of the chosen method."""
    method, tuned = settings.method, settings.tuned
    if tuned.spread == "none":
        refuse_idle(settings, [f"{method}.population"], f"{method}.spread is 'none'")
    once = tuned.updates == tuned.minibatches == 1
    if once and (method == "grpo" or (method == "awm" and tuned.on_policy)):
        why = f"{method}.updates and {method}.minibatches are 1, with which every ratio is 1"
        refuse_idle(settings, [f"{method}.clip"], why)
    if method == "grpo" and not tuned.kl:
        refuse_idle(settings, ["grpo.kl_space"], "grpo.kl is 0")
    if method == "awm" and tuned.on_policy and not tuned.old_kl:
        refuse_idle(settings, ["awm.old_decay"], "awm.on_policy is true and awm.old_kl is 0")


def check_critic(settings: Any, kind: str) -> None:
    """Check the settings `critic` of a critic, whose kind is the setting named `kind`."""
    critic = settings.critic
    if getattr(settings, kind) == "preference":
        refuse_idle(settings, ["critic.patches", "critic.patch_weight"], _is(kind, settings))
    if not critic.patch_weight:
        refuse_idle(settings, ["critic.patches"], "critic.patch_weight is 0")
    if not critic.replay:
        refuse_idle(settings, ["critic.replay_share"], "critic.replay is 0")
    if critic.trigger != "every_n":
        refuse_idle(settings, ["critic.every"], f"critic.trigger is {critic.trigger!r}")
    if critic.trigger != "acc_below":
        refuse_idle(settings, ["critic.below"], f"critic.trigger is {critic.trigger!r}")


def _check_checks(settings: Any, *others: str) -> None:
    """Check the settings of checks, unless earlier checks of the run choose its LoRA.

    others: settings that only checks use.
    """
    if not settings.check.every and not (Path(settings.out) / "checks.csv").exists():
        refuse_idle(settings, ["check", *others], "check.every is 0")


def _is(name: str, settings: Any) -> str:
    return f"{name} is {getattr(settings, name)!r}"
