"""Open the page to play in: the command `tilt app`."""

import sys

from tilt.main import run

if __name__ == "__main__":
    sys.exit(run("app"))
