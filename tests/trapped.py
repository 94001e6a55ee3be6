"""What the tests of traps inside a pipeline's call share."""

import torch
from middle import Settings

PROMPT = "a red cube"


SHARP = Settings(reward_scale=300.0, min_ess=1.0)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def snapshot(pipe):
    """Everything a run might have changed: attributes, scheduler, networks' state."""
    scheduler = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    modules = {
        name: (part.training, sorted(vars(part)), next(part.parameters()).sum().item())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return {name: id(value) for name, value in vars(pipe).items()}, scheduler, modules


class Full:
    """A reward with everything that is optional."""

    name = "full"

    def __init__(self):
        self.checked, self.references = [], []

    def check(self, prompts):
        self.checked.append(prompts)
        if "forbidden" in prompts:
            raise ValueError("no score for 'forbidden'")

    def __call__(self, images, prompts, *, references=None):
        self.references.append((prompts, references))
        return images.mean((1, 2, 3))

    def evaluate(self, images, prompts, references=None):
        total = images.mean((1, 2, 3))
        return total, {"red": images[:, 0].mean((1, 2)), "n": torch.ones(len(images))}
