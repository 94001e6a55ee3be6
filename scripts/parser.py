"""The command line of a benchmark or of a script that trains an embedded model."""

import argparse

__all__ = ["parser_of"]


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """A parser without options, whose help shows `about`, a module's docstring, as it is."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=about, formatter_class=kind)
