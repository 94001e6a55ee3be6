"""Steer a diffusion model toward a reward: the command `tilt steer`, for `accelerate launch`."""

import sys

from tilt.main import run

if __name__ == "__main__":
    sys.exit(run("steer"))
