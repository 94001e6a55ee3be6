"""The command `tilt app`, as a file."""

import sys

from tilt.main import run

if __name__ == "__main__":
    sys.exit(run("app"))
