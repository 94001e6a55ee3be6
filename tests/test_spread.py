"""One population over several processes is the population of one process."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false

import dataclasses
import os

import pytest
import torch
from pictures import assert_same_picture
from tiny_pipelines import family
from two_processes import run_pair

from steering import FeynmanKac, steer
from steering.resampling import RESAMPLERS
from steering.schedulers import Chain
from steering.spread import Spread

SETTINGS = FeynmanKac(reward_scale=300.0, num_scores=3, score_from=0.2, score_to=0.7)
FUNNEL = dataclasses.replace(SETTINGS, funnel=(4, 4, 2))
PROMPTS = ["a red cube", "two dots", "a red cube"]
FOUR = {"small batches", "sd3", "funnel to 4", "best of k"}  # cases of four processes
CASES = {
    "sd": ("sd", {"settings": SETTINGS}),
    "sd3": ("sd3", {"settings": SETTINGS, "prompts_per_call": 2}),
    "funnel": ("sd", {"settings": FUNNEL, "guidance_interval": (0.0, 0.5), "particles": 6}),
    "funnel of a flow": ("sd3", {"settings": FUNNEL, "prompts_per_call": 3, "particles": 6}),
    "small batches": ("sd", {"settings": SETTINGS, "max_batch": 2}),
    "funnel to 4": (
        "sd3",
        {"settings": dataclasses.replace(SETTINGS, funnel=(8, 4, 4)), "prompts_per_call": 3},
    ),
    "best of k": ("sd", {"settings": dataclasses.replace(SETTINGS, min_ess=0.0)}),
    "video": (
        "wan",
        {"settings": SETTINGS, "particles": 4, "num_frames": 5, "score_frames": 3},
    ),
    "sound": (
        "sd",
        {"settings": SETTINGS, "particles": 4, "decode": lambda x: (x.flatten(2).tanh(), 8000)},
    ),
    "scale 0": ("sd", {"settings": dataclasses.replace(SETTINGS, reward_scale=0.0)}),
}


class Parts:
    """Brightness with a part of its own, as the sums of the reward library have."""

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1) * 10

    def evaluate(self, images, prompts):
        total = self(images, prompts)
        return total, {"half": total / 2}


class Broken(Parts):
    """NaN, from the first score on, for the second particle of rank 1."""

    def __init__(self, rank):
        self.rank = rank

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        scores[1] = torch.nan if self.rank == 1 else scores[1]
        return scores


def run(name, **more):
    kind, call = CASES[name]
    pipe, keywords = family(kind)
    keywords = {**keywords, "num_inference_steps": 9, "progress": False}
    return steer(pipe, PROMPTS, Parts(), **{"particles": 8, **keywords, **call, **more})


def refused(rank, count):
    pipe, keywords = family("sd")
    broken = rf"The reward of prompt 0, 'a', particle {count + 1} is NaN at step"
    with pytest.raises(ValueError, match=broken):
        steer(pipe, "a", Broken(rank), 2 * count, SETTINGS, spread=True, progress=False, **keywords)


PROGRAM = """
import sys, torch
from accelerate import PartialState
import test_spread
state = PartialState(cpu=True)
folder, *names = sys.argv[1:]
for name in names:
    torch.save(test_spread.parts(name), f"{folder}/{name}-{state.process_index}.pt")
test_spread.refused(state.process_index, state.num_processes)
test_spread.only_members(state.process_index)
test_spread.round_differently(state.process_index)
torch.save(test_spread.parts("sd"), f"{folder}/rounded-{state.process_index}.pt")
"""


def parts(name):
    out = run(name, spread=True)
    scores = {
        f"{score.step} {part}": getattr(score, part)
        for score in out.lineage.scores
        for part in ("rewards", "ess", "ancestors", "log_weights")
    }
    return scores | {
        "latents": out.latents,
        "last": out.last,
        "rewards": out.rewards,
        "log_z": out.log_z,
        "log_weights": out.log_weights,
        "half": out.components["half"],
        "pixels": pixels(out),
    }


def only_members(rank):
    group = torch.distributed.new_group([0])
    if rank == 0:
        assert Spread(group).size == 1
    else:
        with pytest.raises(ValueError, match="a process group without this process, rank"):
            Spread(group)


def round_differently(rank):
    """As a device would, far more seldom, whose sums are rounded in another order."""
    stock = RESAMPLERS["ssp"]
    if rank > 0:
        RESAMPLERS["ssp"] = lambda *given: stock(*given).flip(1)


def pixels(out):
    from steering.outputs import levels

    return levels([image for row in out.images for image in row])


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    run_pair(PROGRAM, str(folder), *CASES, port=77)
    return folder


@pytest.fixture(scope="module")
def spread_over_4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    run_pair(PROGRAM, str(folder), *FOUR, port=78, count=4)
    return folder


def equals_one(name, folder, count):
    ranks = [torch.load(folder / f"{name}-{i}.pt", weights_only=True) for i in range(count)]
    for key in ranks[0]:
        assert all(torch.equal(ranks[0][key], other[key]) for other in ranks), key
    alone, found = run(name), ranks[0]
    # latents near 0 were off by 1.6e-4 under noise=8, where rtol allows nothing
    near = 1e-3 if "noise=" in os.environ.get("TILT_TEST", "") else 1e-4
    if name != "sound":
        assert_same_picture(found["pixels"], pixels(alone))  # all at once: each is very small
    else:  # the levels of 16 bits differ as the latents may
        levels = [one.float() for one in (found["pixels"], pixels(alone))]
        torch.testing.assert_close(*levels, rtol=1e-3, atol=32768 * near + 1)
    for score in alone.lineage.scores:
        assert torch.equal(found[f"{score.step} ancestors"], score.ancestors)
    torch.testing.assert_close(found["latents"], alone.latents, rtol=1e-3, atol=near)
    torch.testing.assert_close(found["last"], alone.latents, rtol=1e-3, atol=near)  # none repacks
    tight = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found["rewards"], alone.rewards, **tight)
    torch.testing.assert_close(found["half"], alone.components["half"], **tight)
    torch.testing.assert_close(found["log_z"], alone.log_z, rtol=1e-4, atol=1e-2)
    resampled = [score for score in alone.lineage.scores if score.resampled.any()]
    if "scale" not in name and "best" not in name:
        places = torch.arange(resampled[0].rewards.shape[1]) % count
        homes = [score.ancestors % count for score in resampled]
        # a parent on another process
        assert any((home != places[: home.shape[1]]).any() for home in homes)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(name, spread):
    equals_one(name, spread, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FOUR))
def test_four_processes_give_what_one_gives(name, spread_over_4):
    equals_one(name, spread_over_4, 4)


def test_processes_that_would_disagree_follow_the_first(spread):
    for rank in range(2):
        rounded = torch.load(spread / f"rounded-{rank}.pt", weights_only=True)
        found = torch.load(spread / f"sd-{rank}.pt", weights_only=True)
        assert all(torch.equal(rounded[key], found[key]) for key in found)


def test_a_chain_takes_its_rows_from_those_of_all_processes():
    """The second of two ranks, whose one row is a child of the other's."""
    x = torch.tensor([[7.0], [1.0]])
    seen = []

    def exchange(own):
        seen.append(own)
        return torch.cat([torch.zeros_like(own[:1]) + 5, own])

    chain = Chain(noise=1.0, observer=lambda look: torch.tensor([0, 2]), exchange=exchange)
    chain.restart()
    sample, output = chain.select(x, -x, lambda: x)
    assert sample.tolist() == [[5.0], [1.0]]
    assert output.tolist() == [[5.0], [-1.0]]
    assert chain.lineage.tolist() == [0, 2]
    assert chain.follow(x).tolist() == [[5.0], [1.0]]
    chain.select(sample, output, lambda: x)
    assert chain.lineage.tolist() == [5, 2]  # row 2 is its own second one, which came from row 2


def test_alone_nothing_is_exchanged():
    alone, x = Spread(), torch.arange(6.0)
    assert alone.whole(x) is x
    assert torch.equal(alone.own(x[None]), x[None])


def test_rows_are_dealt_in_turn_and_come_back_in_order(monkeypatch):
    """Two ranks of b = 2 prompts and k = 6 particles, without processes."""
    values = torch.arange(12).reshape(2, 6)
    ranks = [Spread() for _ in range(2)]
    for rank, one in enumerate(ranks):
        one.rank, one.size = rank, 2
    shares = [one.own(values).flatten() for one in ranks]
    assert shares[1].tolist() == [1, 3, 5, 7, 9, 11]

    def gather(parts, x, group=None):
        for part, share in zip(parts, shares, strict=True):
            part.copy_(share)

    monkeypatch.setattr("steering.spread.dist.all_gather", gather)
    assert torch.equal(ranks[0].whole(shares[0]), values.flatten())


def test_what_cannot_be_spread_is_refused(monkeypatch):
    pipe, keywords = family("sd")
    with pytest.raises(ValueError, match="start the program with accelerate launch"):
        steer(pipe, "a", Parts(), 4, spread=True, **keywords)
    two = Spread()
    two.size = 2
    monkeypatch.setattr("steering.pipeline.Spread", lambda group: two)
    with pytest.raises(ValueError, match=r"particles= 5 cannot be spread over 2 processes"):
        steer(pipe, "a", Parts(), 5, **keywords)
    inpaint, call = family("inpaint")
    with pytest.raises(ValueError, match=r"spread= with image=: .* leave spread= out"):
        steer(inpaint, "a", Parts(), 4, **call)
    odd = dataclasses.replace(SETTINGS, funnel=(4, 3, 2))
    with pytest.raises(ValueError, match=r"funnel= \(4, 3, 2\) cannot be spread"):
        steer(pipe, "a", Parts(), 4, odd, **keywords)
