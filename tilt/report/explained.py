"""What a report says to a reader who knows no particle filter, a line for each thing it shows."""

from __future__ import annotations

from typing import Any

from tilt.report.markup import escape, short

__all__ = ["CHARTS", "GENEALOGY", "table", "what"]

GENEALOGY = """<ul class="note reading">
<li><b>A column</b> is a step at which every particle was scored. Time goes from left to right.</li>
<li><b>A picture</b> is what a particle was heading for at that step, with its reward below.</li>
<li><b>The bar</b> under a picture is its weight, its share in deciding who goes on.</li>
<li><b>A line</b> leads from a particle to those that go on from it. Who has none died out.</li>
<li><b>ESS</b> n/k says that the k particles count as n equal ones; “kept”: none was replaced.</li>
<li>Point at a picture, or go to it by the tab key, for more.</li>
</ul>"""

# of `genealogy.charts`, by title; {k}: the particles
CHARTS = {
    "Rewards": "What the reward gave each particle at each scored step; at the end, the pictures "
    "that are returned.",
    "ESS": "Effective sample size, (Σ weights)² / Σ weights²: how many particles the weights are "
    "worth. At {k} all count alike, at 1 one has everything.",
    "log Ẑ so far": "The log of Ẑ, the estimated mean of exp(λ · reward) over pictures of the "
    "model alone. Divided by λ it is on the reward’s scale.",
}


def what(settings: dict[str, Any]) -> str:
    """What was done, and what λ is. settings: those of a manifest."""
    scale = settings["reward_scale"]
    if not settings["min_ess"]:
        how = "The particles never met: each is a sample of the model, and the best is best of k."
    else:
        how = (
            "Particles are pictures that are drawn side by side. On the way they are scored; those "
            "of low reward are replaced by copies of better ones, which then go on apart."
        )
    if not scale:
        much = "λ, how strongly the reward counts, is 0: it is only reported."
    else:
        much = (
            "λ is how strongly the reward counts: a picture whose reward is higher by 1/λ = "
            f"{short(1 / scale)} becomes e ≈ 2.7 times as likely."
        )
    return f'<p class="note">{escape(how)}<br>{escape(much)}</p>'


def table(k: int) -> str:
    """The columns of the table of rewards. k: the plain samples beside them, or 0."""
    said = "“Steered, best” is the best of a prompt’s steered pictures, “mean” the mean of them. "
    if k:
        said = (
            f"“Plain” is one picture of the model alone, “best of {k}” the best of {k}, which cost "
            f"as much as {k} steered ones (without a funnel). {said}"
        )
    said += (
        "“log Ẑ” is the log of the estimated mean of exp(λ · reward) over pictures of the model "
        "alone: where it is low, the prompt asks for what the model hardly draws."
    )
    return f'<p class="note">{said}</p>'
