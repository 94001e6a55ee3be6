"""`python -m tilt`, the command `tilt`."""

import sys

from tilt.main import main

if __name__ == "__main__":
    sys.exit(main())
