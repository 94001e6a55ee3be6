"""The embedded models' cards, from the templates in card_templates/ and what evaluate.py measures.

Each begins with the metadata that the Hugging Face hub reads, shows the grid.png that
scripts/tiny/grids.py draws, and contains code that runs where Tilt is installed.
"""

from pathlib import Path
from typing import Any

from tilt.report.markup import environment

__all__ = ["FOLDERS", "GRID", "card"]

ROOT = Path(__file__).parents[2]
FOLDERS = {name: ROOT / "steering" / "tiny" / name for name in ("tiny-sd3", "tiny-sd")} | {
    name: ROOT / "rewards" / "tiny" / name for name in ("clip", "dino", "aesthetic")
}
GRID = "grid.png"


def card(template: str, **values: Any) -> str:
    """The Markdown of a card. template: pipeline, clip, dino or aesthetic.

    `values` are the variables of the template; tables are lists of lines.
    """
    templates = environment(Path(__file__).parent / "card_templates")
    return templates.get_template(f"{template}.md.jinja").render(values)
