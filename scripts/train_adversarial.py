"""The command `tilt train adversarial`, as a file for `accelerate launch`."""

import sys

from tilt.main import run

if __name__ == "__main__":
    sys.exit(run("train adversarial"))
