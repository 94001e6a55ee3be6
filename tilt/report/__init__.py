"""Reports of runs: image grids, plots, and a self-contained HTML page."""

from pathlib import Path

__all__ = ["write"]


def write(folder: str | Path) -> Path:
    """Write report.html into a folder and return its path.

    The folder is one written by `Steered.save`, by `tilt steer` or by a training. Raises ValueError
    for other folders and for damaged files.
    """
    from tilt.report import steered, training
    from tilt.report.saved import read_json

    folder = Path(folder)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return training.write(folder)
    return steered.write(folder) if "results" in read_json(manifest) else steered.write_run(folder)
