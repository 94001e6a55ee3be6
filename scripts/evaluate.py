"""The command `tilt evaluate`, as a file for `accelerate launch`."""

import sys

from tilt.main import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
