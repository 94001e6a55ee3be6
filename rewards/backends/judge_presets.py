"""Questions for a judge and the patterns of its answers: presets of rewards.models.vlm_judge.

    score            a question for any model that follows instructions
    unifiedreward    the question of UnifiedReward 1.0 and 1.5, on its scale of 1 to 5
    flow_grpo        Flow-GRPO's question to UnifiedReward 1.5, with the number divided by 5
    unifiedreward2   the question of UnifiedReward 2.0; the score is the mean of three numbers
    unifiedreward2_alignment, unifiedreward2_coherence, unifiedreward2_style     one of the three
    yes_no           VQAScore: the probability of yes relative to no

The text of a question must be exactly that of the model's training. The model's chat template
inserts the image before it, so a literal `<image>` is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]

# models write Score: 4, **Score:** 4.5, Score: [4] or Score: **[4]**; [1-5] quotes the question
BEFORE, AFTER = r"[\s*:\[]*", r"(?!\.?\d|\s*-\s*\d)"
NUMBER = rf"{BEFORE}(-?\d+(?:\.\d+)?){AFTER}"


@dataclass(frozen=True)
class Preset:
    """A question, the patterns of the numbers in its answer, and the scale of their mean.

    Without patterns the score is P(yes)/(P(yes) + P(no)).
    """

    question: str
    patterns: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


# Wang et al. 2025, "Unified Reward Model", arXiv 2503.05236
TASK = (
    "You are given a text caption and a generated image based on that caption. Your task is "
    "to evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided "
    "caption. Consider the accuracy of depicted objects, their relationships, and attributes "
    "as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, "
    "detail preservation, color accuracy, and overall aesthetic appeal.\n"
)
CAPTION = "Your task is provided as follows:\nText Caption: [{prompt}]"
FINAL = r"(?i)final score(?: \(1-5\))?"
AXES = ("Alignment", "Coherence", "Style")
# point_score_ACS_image_generation.py of CodeGoat24/UnifiedReward's 2.0 inference
THREE = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to "
    "5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy."
    "\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\n" + CAPTION
)
PATTERNS = {axis: rf"(?i){axis} score(?: \(1-5\))?{NUMBER}" for axis in AXES}

PRESETS = {
    "score": Preset(
        "This picture was made from the description between the lines.\n"
        "---\n{prompt}\n---\n"
        "Look at what the picture shows and how well it is made. Compare it with the description: "
        "objects, how many there are, colours, places, written words. Explain briefly, then end "
        'with one line "Score: N", where N from 0 to 10 says how well the picture fulfils the '
        "description (0 not at all, 10 perfectly).",
        (rf"(?i)score{NUMBER}",),
        0.0,
        10.0,
    ),
    "unifiedreward": Preset(
        TASK + "Extract key elements from the provided text caption, evaluate their presence in "
        "the generated image using the format: 'element (type): value' (where value=0 means not "
        "generated, and value=1 means generated), and assign a score from 1 to 5 after "
        "'Final Score:'.\n" + CAPTION,
        (FINAL + NUMBER,),
        1.0,
        5.0,
    ),
    # unifiedreward_score_sglang of yifan123/flow_grpo (Liu et al. 2025, arXiv 2505.05470)
    "flow_grpo": Preset(
        TASK
        + "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
        + CAPTION,
        (rf"{FINAL}{BEFORE}([1-5](?:\.\d+)?){AFTER}",),
        0.0,
        5.0,
    ),
    "unifiedreward2": Preset(THREE, tuple(PATTERNS.values()), 1.0, 5.0),
    **{
        f"unifiedreward2_{axis.lower()}": Preset(THREE, (pattern,), 1.0, 5.0)
        for axis, pattern in PATTERNS.items()
    },
    # Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation"
    # (VQAScore), §3: their question, and their score is P(yes)
    "yes_no": Preset('Does this figure show "{prompt}"? Please answer yes or no.'),
}
