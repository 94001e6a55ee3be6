"""Python imports this at its start where tests/ is on PYTHONPATH: see processors.py."""

import os

if words := os.environ.get("TILT_TEST"):
    import processors

    processors.act(words)
