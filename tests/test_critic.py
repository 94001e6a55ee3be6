"""The critic: what it learns on is what it scores; it resumes and is saved; two processes agree."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from critic_models import MAKERS, PROMPTS, N, generator, pictures, preference, state, untrained
from two_processes import run_pair

import rewards
from finetune.critics import (
    Critic,
    CriticSettings,
)
from finetune.replay import Replay
from rewards.models.critic import CriticHead, CriticReward, FeatureModel, PreferenceModel

# what is learned on is what is scored


def test_a_zero_head_gives_1_and_03_and_no_reward():
    reward = untrained()
    critic = Critic(reward, CriticSettings(trigger="every_n", every=2))
    assert torch.equal(reward(pictures(0), PROMPTS), torch.zeros(N))
    stats = critic.train_step(pictures(0), pictures(1), PROMPTS, generator())
    assert stats == {
        "loss": pytest.approx(1.3),
        "real": 0.0,
        "fake": 0.0,
        "margin": 0.0,
        "accuracy": 0.5,
        "updated": 1.0,
    }


@pytest.mark.parametrize("make", [lambda: rewards.load("critic(random:1)"), preference])
def test_statistics_of_training_are_the_rewards_own_scores(make):
    """Adv-GRPO's released head learns on raw features and scores unit ones."""
    loaded = make()
    reward = loaded if isinstance(loaded, CriticReward) else loaded.parts[0].reward
    critic = Critic(reward, CriticSettings(lr=1e-3))
    for i in range(3):  # weights move between
        real, fake = reward(pictures(i, 0.3), PROMPTS), reward(pictures(i + 9), PROMPTS)
        stats = critic.train_step(pictures(i, 0.3), pictures(i + 9), PROMPTS, generator(i))
        assert stats["real"] == pytest.approx(float(real.mean()), abs=1e-6)
        assert stats["fake"] == pytest.approx(float(fake.mean()), abs=1e-6)


def test_an_update_sees_rows_of_the_scored_features_and_patches_of_its_own_picture(monkeypatch):
    reward, seen = untrained(), []
    logits = reward.logits

    def spy(features, prompts):
        seen.append(features)
        return logits(features, prompts)

    monkeypatch.setattr(reward, "logits", spy)
    real, fake = pictures(0, 0.3), pictures(1)
    scored = [reward.features(x) for x in (real, fake)]
    Critic(reward, CriticSettings(patches=4)).train_step(real, fake, PROMPTS, generator())
    assert len(seen) == 4  # to look at both, and to learn on both
    for (cls, patches), (all_cls, all_patches) in zip(seen, scored * 2, strict=True):
        assert torch.equal(cls, all_cls)
        hits = (patches[:, :, None] == all_patches[:, None]).all(-1)  # (n, drawn, p)
        assert (hits.sum(2) == 1).all()
        assert (hits.sum(1) <= 1).all()
    chosen = (seen[2][1][:, :, None] == scored[0][1][:, None]).all(-1).sum(1)
    assert chosen.shape == (N, 16)
    assert len(chosen.unique(dim=0)) > 1


def test_features_have_a_size_of_about_1():
    for part in untrained().features(pictures(0)):
        torch.testing.assert_close(part.square().mean(-1), torch.ones(part.shape[:-1]))


def test_a_preference_critic_begins_as_the_clip_that_it_is_made_of(tmp_path):
    import clip_folders

    images = pictures(3)
    torch.testing.assert_close(
        preference()(images, PROMPTS), rewards.load("clip(random:0, scale=logit)")(images, PROMPTS)
    )
    _, folder, _ = clip_folders.twin_folders(tmp_path, quick_gelu=False)  # of transformers
    reward = CriticReward(PreferenceModel(str(folder), layers=1))
    own = rewards.load(f"clip({folder}, scale=logit)", imports=True)
    torch.testing.assert_close(reward(images, PROMPTS), own(images, PROMPTS))


# replay, resuming, saving


def test_a_replay_is_a_uniform_sample_of_all_that_came():
    counts = torch.zeros(20)
    for seed in range(600):
        replay, draws = Replay(5), generator(seed)
        for start in (0, 10):
            x = torch.arange(start, start + 10).float()
            replay.add((x, x * 2), [str(int(i)) for i in x], draws)
        (kept, twice), prompts = replay.draw(9, draws)
        assert torch.equal(twice, kept * 2)
        assert [str(int(i)) for i in kept] == prompts
        assert len(set(prompts)) == 5
        counts[kept.long()] += 1
    # each is kept with p = 1/4: 150 times, give or take √(600·3/16) = 10.6
    assert (counts - 150).abs().max() < 4 * 10.6
    assert Replay(3).draw(2, generator()) == ((), [])


def test_older_pairs_are_learned_on_again(monkeypatch):
    reward, seen = preference(), []
    logits = reward.logits

    def spy(features, prompts):
        seen.append((features[0], list(prompts)))
        return logits(features, prompts)

    critic = Critic(reward, CriticSettings(replay=N, replay_share=0.5))
    critic.train_step(pictures(0, 0.6), pictures(1), PROMPTS, generator())
    monkeypatch.setattr(reward, "logits", spy)
    critic.train_step(pictures(2, 0.6), pictures(3), PROMPTS, generator(1))
    (real, prompts), (fake, others) = seen[2:]
    assert prompts == others
    assert len(real) == len(fake) == len(prompts) == N + 3
    old_real, old_fake = reward.features(pictures(0, 0.6))[0], reward.features(pictures(1))[0]
    for i in range(N, N + 3):
        row = PROMPTS.index(prompts[i])
        assert torch.equal(real[i], old_real[row])
        assert torch.equal(fake[i], old_fake[row])


@pytest.mark.parametrize("kind", ["features", "preference"])
def test_a_resumed_critic_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    settings = CriticSettings(lr=1e-3, patches=4, replay=8, smoothing=0.1)

    def fresh() -> Critic:
        reward = untrained() if kind == "features" else preference()
        return Critic(reward, copy.copy(settings))

    def train(critic: Critic, steps: range) -> list[dict[str, float]]:
        return [
            critic.train_step(pictures(i, 0.4), pictures(i + 100), PROMPTS, generator(i))
            for i in steps
        ]

    whole = fresh()
    expected = train(whole, range(6))
    first = fresh()
    train(first, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = fresh()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert train(second, range(3, 6)) == expected[3:]
    for name, value in state(whole.reward.module).items():
        assert torch.equal(second.reward.module.state_dict()[name], value)


@pytest.mark.parametrize("make", [untrained, preference])
def test_a_saved_critic_is_a_reward_like_any_other(make, tmp_path):
    folder = tmp_path / "runs" / "my critic"
    reward = make()
    assert rewards.load(reward).spec == "<critic>"
    critic = Critic(reward, CriticSettings(lr=1e-2))
    for i in range(3):
        critic.train_step(pictures(i, 0.6), pictures(i + 100), PROMPTS, generator(i))
    critic.save(folder)
    expected = reward(pictures(7), PROMPTS)
    assert expected.std() > 0
    for spec in (f'critic("{folder}")', f"critic:{folder}", rewards.load(reward).spec):
        assert torch.equal(rewards.load(spec, imports=True)(pictures(7), PROMPTS), expected)
    half = rewards.load({f"critic:{folder}": 0.5}, imports=True)(pictures(7), PROMPTS)
    torch.testing.assert_close(half, expected / 2)
    assert sorted(path.name for path in folder.iterdir()) == ["critic.json", "critic.safetensors"]


def test_weights_of_the_two_kinds_of_features_count_as_they_are_set():
    images = pictures(0)
    scores = []
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.7, 0.3)):
        reward = untrained(weights=weights)
        head: Any = reward.module
        head.outer.weight.data.copy_(torch.randn(1, 16, generator=generator(4)))
        scores.append(reward(images, PROMPTS))
    torch.testing.assert_close(scores[2], 0.7 * scores[0] + 0.3 * scores[1])
    cls, patches = reward.features(images)
    torch.testing.assert_close(scores[0], head(cls))
    torch.testing.assert_close(scores[1], head(patches).mean(1))


def test_the_first_layer_comes_from_its_seed():
    same = [CriticHead(8, 4, generator(3)).inner.weight for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], CriticHead(8, 4, generator(4)).inner.weight)


PROGRAM = """
import sys
import torch
from accelerate import Accelerator
torch.set_num_threads(1)
import critic_models as t
from finetune.critics import Critic, CriticSettings
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
reward = t.MAKERS[sys.argv[2]]()
settings = CriticSettings(lr=1e-3, patches=4, replay=4, trigger="acc_below", below=0.9)
critic = Critic(reward, settings, accelerator)
seen = []
for i in range(20):  # each process has pictures and draws of its own
    seed = 2 * i + rank
    real, fake = t.pictures(seed, 0.1), t.pictures(seed + 100)
    seen.append(critic.train_step(real, fake, t.PROMPTS, t.generator(seed)))
torch.save((seen, t.state(reward.module)), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=[pytest.mark.slow] * (name != "colours")) for name in MAKERS]
)
def test_two_processes_hold_the_same_weights_after_20_steps(kind, tmp_path):
    run_pair(PROGRAM, str(tmp_path), kind, port=0)
    (stats, weights), (other_stats, other_weights) = (
        torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2)
    )
    assert stats == other_stats
    assert sum(row["updated"] for row in stats) > 3
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())


# bad input


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr": 0}, "lr is 0 but must be a number above 0"),
        ({"patches": 0}, "patches is 0 but must be a whole number, 1 or more"),
        ({"replay": -1}, "replay is -1 but must be a whole number, 0 or more"),
        ({"smoothing": 0.5}, r"smoothing is 0.5 but must be a number in \[0, 0.5\)"),
        ({"loss": "wgan"}, "loss is 'wgan' but must be '', 'hinge', 'bce' or 'pairwise'"),
        ({"trigger": "never"}, "trigger is 'never' but must be 'always', 'every_n', "),
    ],
)
def test_wrong_settings_are_refused_with_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CriticSettings(**settings)


def test_wrong_input_is_refused_with_a_sentence():
    critic = Critic(untrained(), CriticSettings())
    with pytest.raises(ValueError, match="got 6 references, 6 prompts and 5 samples"):
        critic.train_step(pictures(0), pictures(0)[:5], PROMPTS, generator())
    with pytest.raises(ValueError, match=r"takes images in \[0, 1\]"):
        critic.train_step(pictures(0) * 255, pictures(0), PROMPTS, generator())
    with pytest.raises(ValueError, match="r1= and spectral= apply to a head"):
        Critic(preference(), CriticSettings(r1=1.0))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FeatureModel("random:0", hidden=0), "hidden width is 0 but must be 1 or more"),
        (lambda: FeatureModel("random:0", weights=(1.0,)), r"weights are \(1.0,\) but must be two"),
        (lambda: FeatureModel("random:0", weights=(-1.0, 1.0)), "must be two numbers"),
        (lambda: FeatureModel("random:0", size=30), "take size=32"),
        (lambda: PreferenceModel("random:0", layers=3), "layers is 3 but the image tower of rand"),
        (lambda: PreferenceModel("random:0", layers=0), "of which at least 1 is needed"),
        (lambda: CriticReward("/nowhere/at/all"), "neither a file, a folder that exists nor a hub"),
        (lambda: CriticReward("random:x"), "needs a whole number, as in random:0"),
        (lambda: CriticReward("random:0", batch_size=0), "a whole number, at least 1"),
        (
            lambda: rewards.load("critic:/nowhere/at/all", imports=True),
            "neither a file, a folder that exists",
        ),
    ],
)
def test_critics_that_cannot_be_made_say_why(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_broken_folders_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of \['critic.json'\]"):
        rewards.load(f"critic({tmp_path})", imports=True)
    untrained().save(tmp_path)
    config, weights = tmp_path / "critic.json", tmp_path / "critic.safetensors"
    about, whole = json.loads(config.read_text()), weights.read_bytes()

    def refused(sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            rewards.load(f"critic({tmp_path})", imports=True)

    config.write_text(json.dumps({**about, "hidden": 8}))
    refused(r"does not match CriticHead: it has misshapen inner.bias")
    for broken in ("{", "[]", "{}", '{"kind": "gan"}', json.dumps({**about, "depth": 2})):
        config.write_text(broken)
        refused("describes no critic .*; give a folder that training wrote")
    config.write_text(json.dumps(about))
    weights.write_bytes(whole[:200])
    refused("cut short")
    weights.unlink()
    refused(r"holds none of \['critic.safetensors'\]")


def test_scores_that_are_not_finite_stop_before_anything_changes_and_say_whose():
    reward = untrained()
    critic = Critic(reward, CriticSettings())
    critic.train_step(pictures(0), pictures(1), PROMPTS, generator())
    head: Any = reward.module
    head.outer.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"step 1 are not finite, of reference 0 \('a red"):
        critic.train_step(pictures(0), pictures(1), PROMPTS, generator())
    assert critic.step == 1
    assert head.inner.weight.isfinite().all()
