"""A reward is any function of pictures and prompts: python scripts/examples/custom_reward.py"""

from torch import Tensor

from steering import steer, tiny


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """How red (n, 3, h, w) pictures in [0, 1] are, (n,): higher is better."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2


if __name__ == "__main__":
    pipe, call = tiny.load("tiny-sd"), tiny.call_defaults("tiny-sd")
    out = steer(pipe, ["two stars"], redness, particles=4, preview=tiny.preview(), **call)
    out.best[0].save("red.png")
    print(f"rewards {out.rewards[0].tolist()}, log Z {out.log_z[0]:.2f}: red.png")
