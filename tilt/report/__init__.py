"""What shows a run: pictures of it, and one self-contained page with its genealogy or curves."""

from pathlib import Path

__all__ = ["write"]


def write(folder: str | Path) -> Path:
    """Write report.html into a folder and return its path.

    The folder is one that `Steered.save` wrote, that of a whole run of `tilt steer`, or that of a
    training. Raises ValueError for another one, and for files that are damaged.
    """
    from tilt.report import steered, training
    from tilt.report.saved import read_json

    folder = Path(folder)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return training.write(folder)
    return steered.write(folder) if "results" in read_json(manifest) else steered.write_run(folder)
