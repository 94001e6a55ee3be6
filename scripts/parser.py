"""The command line of a benchmark or of a script that trains an embedded model."""

import argparse

__all__ = ["parser_of"]


def parser_of(about: str | None, module: str = "") -> argparse.ArgumentParser:
    """A parser without options, whose help shows `about`, a module's docstring, as it is.

    module: the name of a benchmark's module, which `python -m scripts.bench` runs.
    """
    kind, prog = argparse.RawDescriptionHelpFormatter, None
    if module.startswith("scripts.benchmarks."):
        prog = f"python -m scripts.bench {module.rpartition('.')[2].replace('_', '-')}"
    return argparse.ArgumentParser(prog=prog, description=about, formatter_class=kind)
