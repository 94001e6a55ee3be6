"""A setting that would do nothing beside the others is refused by name, and no other is."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import COMMAND
from test_configs import RECIPES

from finetune.ranges import refuse_idle
from scripts.benchmarks import adversarial
from tilt.commands import train_adversarial, train_critic, train_gdro
from tilt.idle_settings import check_adversarial, check_critic, check_gdro

GIVEN = {
    "gdro": ["--rollouts=x"],
    "adversarial": ["--prompts={prompts}", "--reward=jpeg"],
    "critic": ["--rollouts=x", "--references=y"],
    "rollout": ["--prompts={prompts}"],
    "evaluate": ["--prompts={prompts}", "--reward=jpeg"],
}
LEARNS = ["--references=y"]
EVERY = ["--critic.trigger=every_n", "--critic.every=3"]
IDLE = [
    ("gdro", ["--check.prompts=x.txt"], "check.prompts", "check.every is 0"),
    ("gdro", ["--check.reward=clip"], "check.reward", "check.every is 0"),
    ("gdro", ["--check.call.height=64"], "check.call.height", "check.every is 0"),
    (
        "gdro",
        ["--gdro.form=rank", "--gdro.temperature=1"],
        "gdro.temperature",
        "gdro.form is 'rank'",
    ),
    ("adversarial", ["--check.patience=2"], "check.patience", "check.every is 0"),
    ("adversarial", ["--nft.lr=1"], "nft.lr", "method is 'grpo'"),
    ("adversarial", ["--method=nft", "--grpo.steps=3"], "grpo.steps", "method is 'nft'"),
    ("adversarial", ["--grpo.clip=1"], "grpo.clip", "grpo.updates and grpo.minibatches are 1"),
    ("adversarial", ["--awm.lr=1"], "awm.lr", "method is 'grpo'"),
    ("adversarial", ["--method=awm", "--nft.steps=3"], "nft.steps", "method is 'awm'"),
    (
        "adversarial",
        ["--method=awm", "--awm.clip=2"],
        "awm.clip",
        "awm.updates and awm.minibatches are 1",
    ),
    (
        "adversarial",
        ["--method=awm", "--awm.old-kl=0", "--awm.old-decay=0.9"],
        "awm.old_decay",
        "awm.on_policy is true and awm.old_kl is 0",
    ),
    ("adversarial", ["--grpo.kl-space=outputs"], "grpo.kl_space", "grpo.kl is 0"),
    (
        "adversarial",
        ["--grpo.spread=none", "--grpo.population"],
        "grpo.population",
        "grpo.spread is 'none'",
    ),
    ("adversarial", ["--paired"], "paired", "references= is not set"),
    ("adversarial", ["--critic-weight=2"], "critic_weight", "references= is not set"),
    ("adversarial", ["--tower=a/b"], "tower", "a critic needs references="),
    ("adversarial", ["--critic.r1=1"], "critic.r1", "a critic needs references="),
    ("adversarial", [*LEARNS, "--critic-weight=0", "--critic.lr=1"], "critic.lr", "a critic needs"),
    ("adversarial", [*LEARNS, "--critic-layers=1"], "critic_layers", "critic_kind is 'features'"),
    (
        "adversarial",
        [*LEARNS, "--critic-kind=preference", "--critic.patches=3"],
        "critic.patches",
        "critic_kind is 'preference'",
    ),
    (
        "adversarial",
        [*LEARNS, "--critic.replay-share=1"],
        "critic.replay_share",
        "critic.replay is",
    ),
    ("critic", ["--kind=preference", "--critic.patch-weight=1"], "critic.patch_weight", "kind is"),
    (
        "critic",
        ["--critic.patch-weight=0", "--critic.patches=3"],
        "critic.patches",
        "critic.patch_weight is",
    ),
    ("critic", ["--critic.every=2"], "critic.every", "critic.trigger is 'always'"),
    ("critic", ["--critic.trigger=every_n", "--critic.below=0.1"], "critic.below", "is 'every_n'"),
    ("rollout", ["--filter.reward-scale=3"], "filter.reward_scale", "steered is 0"),
    ("evaluate", ["--filter.noise=0.5"], "filter.noise", "steer= is not set"),
]


@pytest.mark.parametrize(("script", "words", "name", "why"), IDLE)
def test_a_setting_that_does_nothing_is_refused_by_name(
    script, words, name, why, tmp_path, capsys, no_model
):
    (tmp_path / "prompts.txt").write_text("a star\n")
    given = [word.format(prompts=tmp_path / "prompts.txt") for word in GIVEN[script]]
    full = script if script in COMMAND else f"train {script}"
    assert COMMAND[full].main([*given, f"--out={tmp_path / 'out'}", *words]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f": --{name.replace('_', '-')} is " in told
    assert "but has no effect, because " in told
    assert COMMAND[full].OPTIONS.in_words(f"as {why}").removeprefix("as ") in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("check", "kind", "words"),
    [
        (
            check_gdro,
            train_gdro.OPTIONS,
            ["--check.every=5", "--check.prompts=x", "--check.patience=2"],
        ),
        (
            check_gdro,
            train_gdro.OPTIONS,
            ["--gdro.form=top1", "--gdro.temperature=1"],
        ),
        (
            check_adversarial,
            train_adversarial.OPTIONS,
            ["--method=nft", "--nft.lr=1", "--grpo.lr=1e-4"],
        ),
        (
            check_adversarial,
            train_adversarial.OPTIONS,
            ["--grpo.updates=2", "--grpo.clip=1", "--grpo.population", "--grpo.ratio=guard"],
        ),
        (
            check_adversarial,
            train_adversarial.OPTIONS,
            ["--method=awm", "--awm.clip=2", "--no-awm.on-policy", "--awm.old-kl=0"],
        ),
        (
            check_adversarial,
            train_adversarial.OPTIONS,
            [*LEARNS, "--critic-weight=3", "--critic.patches=3", "--tower=x", "--paired"],
        ),
        (
            check_adversarial,
            train_adversarial.OPTIONS,
            [
                *LEARNS,
                "--critic-kind=preference",
                "--critic-layers=1",
                "--critic.trigger=acc_below",
            ],
        ),
        (
            lambda settings: check_critic(settings, "kind"),
            train_critic.OPTIONS,
            ["--critic.replay=3", "--critic.replay-share=1", *EVERY],
        ),
    ],
)
def test_what_does_something_is_not_refused(check, kind, words):
    check(kind.read(words))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_has_no_setting_that_does_nothing(file):
    if file.stem.startswith("gdro"):
        check_gdro(train_gdro.OPTIONS.read(["--config", str(file)]))
    else:
        pictures = [] if file.stem.startswith("grpo") else LEARNS
        check_adversarial(train_adversarial.OPTIONS.read(["--config", str(file), *pictures]))


@pytest.mark.parametrize(
    ("name", "words"), [pair for _, runs in adversarial.CASES.values() for pair in runs.items()]
)
def test_the_benchmarks_runs_have_no_setting_that_does_nothing(name, words):
    words = [*words, *(LEARNS if "critic" in name else [])]
    (file,) = (file for file in RECIPES if file.stem == "adversarial_tiny")
    check_adversarial(train_adversarial.OPTIONS.read(["--config", str(file), *words]))


def test_settings_of_checks_are_those_of_the_run_where_there_were_some(tmp_path):
    settings = train_gdro.OPTIONS.read([f"--out={tmp_path}", "--check.best=train/reward"])
    with pytest.raises(ValueError, match=r"check\.best is 'train/reward' but has no effect"):
        check_gdro(settings)
    Path(tmp_path / "checks.csv").touch()
    check_gdro(settings)


def test_every_setting_of_a_group_is_looked_at():
    settings = train_gdro.OPTIONS.read(["--check.call.height=64"])
    with pytest.raises(
        ValueError, match=r"^check\.call\.height is 64 but has no effect, because so"
    ):
        refuse_idle(settings, ["model", "check"], "so it is")
    refuse_idle(settings, ["model", "check.every", "gdro"], "so it is")
