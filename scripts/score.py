"""The command `tilt score`, as a file for `accelerate launch`."""

import sys

from tilt.main import run

if __name__ == "__main__":
    sys.exit(run("score"))
