"""train_adversarial.py in two processes: one's steps, one state, one continuation, one stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from test_launch import assert_alike, command, ran
from torch.utils._pytree import tree_leaves
from two_processes import run_pair

SMALL = [
    *("--grpo.groups=2", "--grpo.k=2", "--grpo.rank=2", "--grpo.num-inference-steps=3"),
    *("--grpo.window-size=1", "--grpo.lr=1e-3"),
]
# the script, and what each process holds at its end
SCRIPT = """
import sys
import torch
from tilt.commands import train_adversarial
from tilt import training

begin, held = training.begin, []
training.begin = lambda trainer, *rest: (held.append(trainer), begin(trainer, *rest))
status = train_adversarial.main(sys.argv[2:])
rank = held[0].learner.accelerator.process_index
torch.save(held[0].state_dict(), f"{sys.argv[1]}.{rank}.pt")
sys.exit(status)
"""


@pytest.fixture
def words(tmp_path) -> list[str]:
    (tmp_path / "prompts.txt").write_text('the word "CAT"\nthe word "SUN"\nthe word "DOG"\n')
    return [f"--prompts={tmp_path / 'prompts.txt'}", *SMALL]


def same(one: Any, two: Any) -> bool:
    leaves = tree_leaves(one), tree_leaves(two)
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(*leaves, strict=True)
    )


@pytest.mark.slow
def test_two_processes_train_what_one_trains(words, tmp_path):
    for processes in (1, 2):
        own = [f"--out={tmp_path / str(processes)}", "--reward=jpeg", "--grpo.steps=2"]
        ran(command("train_adversarial.py", *words, *own, processes=processes))
    assert_alike(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_two_processes_hold_one_state_and_resume_as_if_nothing_had_happened(words, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (250, 20 * i, 0)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "script.py").write_text(SCRIPT)
    # more samples than the replay holds, so that chance decides which are kept
    words += [
        f"--references={tmp_path / 'pictures'}",
        "--critic.replay=3",
        "--critic.replay-share=1",
    ]
    for name, steps in (("whole", 3), ("cut", 1), ("cut", 3)):
        own = [str(tmp_path / name), *words, f"--out={tmp_path / name}", f"--grpo.steps={steps}"]
        ran(command(str(tmp_path / "script.py"), *own, "--resume", processes=2))
    states = [
        torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True)
        for name in ("whole", "cut")
        for rank in (0, 1)
    ]
    assert states[0]["score"]["replay"]["seen"] == 3 * 2 * 2
    assert len(states[0]["score"]["replay"]["rows"]) == 3
    for name in ("weights", "average", "optimizer", "score"):
        assert all(same(state[name], states[0][name]) for state in states[1:]), name


PAIR = """
import sys
import torch
from accelerate import Accelerator
torch.set_num_threads(1)
import critic_models as t
from finetune.critics import Critic, CriticSettings
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index

def trained(critic, steps):
    for i in steps:  # each process has pictures and draws of its own
        seed = 2 * i + rank
        critic.train_step(t.pictures(seed, 0.1), t.pictures(seed + 9), t.PROMPTS, t.generator(seed))

settings = CriticSettings(lr=1e-3, patches=4, replay=8)
whole, first, second = (Critic(t.Colours(), settings, accelerator) for _ in range(3))
trained(whole, range(4))
trained(first, range(2))
if rank == 0:
    torch.save(first.state_dict(), f"{sys.argv[1]}/state.pt")
accelerator.wait_for_everyone()
second.load_state_dict(torch.load(f"{sys.argv[1]}/state.pt", weights_only=True))
trained(second, range(2, 4))
broken = t.pictures(1) * (torch.nan if rank == 1 else 1)
try:
    second.train_step(t.pictures(0), broken, t.PROMPTS, t.generator())
    told = ""
except FloatingPointError as error:
    told = str(error)
torch.save((whole.state_dict(), second.state_dict(), told), f"{sys.argv[1]}/{rank}.pt")
"""


def test_two_critics_resume_from_the_state_of_one_and_stop_together(tmp_path):
    run_pair(PAIR, str(tmp_path), port=1)
    (whole, again, told), (other_whole, other_again, other_told) = (
        torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2)
    )
    assert whole["replay"]["seen"] == 4 * 2 * 6
    assert same(whole, other_whole)
    assert same(whole, again)
    assert same(whole, other_again)
    assert "step 4 are not finite; lower" in told
    assert "step 4 are not finite, of sample 0 ('a red" in other_told
