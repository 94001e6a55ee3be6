"""Questions for a judge and the patterns of its answers: presets of rewards.models.vlm_judge.

    score            a question for any model that follows instructions
    unifiedreward    the question of UnifiedReward 1.0, with one number from 1 to 5
    flow_grpo        the question of UnifiedReward 1.5's server and of Flow-GRPO, with one number
                     from 1 to 5, which is divided by 5
    unifiedreward1.5, unifiedreward2
                     the questions of UnifiedReward 1.5 and 2.0, with three numbers from 1 to 5:
                     the score is their mean
    unifiedreward1.5_alignment, unifiedreward2_alignment, _coherence, _style
                     one of the three
    unifiedreward_edit
                     UnifiedReward-Edit's question about an edited image beside its source, with two
                     numbers from 0 to 25: the score is the smaller one, EditScore's rule
    unifiedreward_edit_following, unifiedreward_edit_consistency
                     one of the two: whether the instruction was followed, and nothing else changed
    unifiedreward_edit_quality
                     UnifiedReward-Edit's question about the edited image alone: the smaller one of
                     naturalness and freedom from artifacts
    yes_no           VQAScore: the probability of yes relative to no

The text of a question must be exactly that of the model's training. The model's chat template
inserts the images before it, so a literal `<image>` is left out. UnifiedReward's own client sends
images as JPEG files of quality 95; a judge sends them losslessly.
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

    Without patterns the score is P(yes)/(P(yes) + P(no)). `least` takes the smallest number instead
    of the mean. `sources` is how many images of `references` may be shown before the image.
    """

    question: str
    patterns: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    least: bool = False
    sources: float = 0
    max_tokens: int = 512


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
# point_score_ACS_image_generation.py of CodeGoat24/UnifiedReward (MIT), in inference_llava, where
# the model is UnifiedReward-7b-v1.5, and in UnifiedReward-2.0-inference
ANALYZE = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
)
RATE = (
    "Provide overall assessments for the image along the following axes (each rated from 1 to "
    "5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy."
    "\n\n"
    "Output your evaluation using the format below:\n\n"
)
AXES_OF_ANSWER = (
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n" + CAPTION
)
WORDS = (
    "\n1. Evaluate each word in the caption based on how well it is visually represented in the "
    "image. Assign a numerical score to each word using the format:\n"
    '   Word-wise Scores: [["word1", score1], ["word2", score2], ..., ["wordN", scoreN], '
    '["[No_mistakes]", scoreM]]\n'
    "   - A higher score indicates that the word is less well represented in the image.\n"
    "   - The special token [No_mistakes] represents whether all elements in the caption were "
    "correctly depicted. A high score suggests no mistakes; a low score suggests missing or "
    "incorrect elements.\n\n2. "
)
WORDS_OF_ANSWER = '---\n\nWord-wise Scores: [["word1", score1], ..., ["[No_mistakes]", scoreM]]\n\n'
# 1.5 also scores every word of the caption, so its answers are long; 4096 is the authors' limit
THREE = {
    "unifiedreward1.5": (ANALYZE + WORDS + RATE + WORDS_OF_ANSWER + AXES_OF_ANSWER, 4096),
    "unifiedreward2": (ANALYZE + RATE + AXES_OF_ANSWER, 512),
}
PATTERNS = {axis: rf"(?i){axis} score(?: \(1-5\))?{NUMBER}" for axis in AXES}

# edit_pointwise_instruction_following.py and edit_pointwise_quality.py of UnifiedReward-Edit, on
# VIEScore's texts (Ku et al. 2024, arXiv 2312.14867, MIT) with EditScore's scale (Luo et al. 2025,
# arXiv 2509.23909, Apache-2.0)
ARTIST = (
    "You are a professional digital artist. You will have to evaluate the effectiveness of the "
    "AI-generated image(s) based on given rules.\n"
    "All the input images are AI-generated. All human in the images are AI-generated too. so you "
    "need not worry about the privacy confidentials.\n\n"
    "IMPORTANT: You will have to give your output in this way (Keep your reasoning concise and "
    'short.):\n{\n\n"reasoning" : "...",\n"score" : [...],\n}\n\nRULES:\n\n'
)
EDITED = (
    ARTIST + "Two images will be provided: The first being the original AI-generated image and the "
    "second being an edited version of the first.\n"
    "The objective is to evaluate how successfully the editing instruction has been executed in "
    "the second image.\n\n"
    "Note that sometimes the two images might look identical due to the failure of image edit."
    "\n\n\n"
    "From scale 0 to 25: \n"
    "A score from 0 to 25 will be given based on the success of the editing. (0 indicates that the "
    "scene in the edited image does not follow the editing instruction at all. 25 indicates that "
    "the scene in the edited image follow the editing instruction text perfectly.)\n"
    "A second score from 0 to 25 will rate the degree of overediting in the second image. (0 "
    "indicates that the scene in the edited image is completely different from the original. 25 "
    "indicates that the edited image can be recognized as a minimal edited yet effective version "
    "of original.)\n"
    "Put the score in a list such that output score = [score1, score2], where 'score1' evaluates "
    "the editing success and 'score2' evaluates the degree of overediting.\n\n"
    "Editing instruction:{prompt}\n"
)
QUALITY = (
    ARTIST + "The image is an AI-generated image.\n"
    "The objective is to evaluate how successfully the image has been generated.\n\n"
    "From scale 0 to 25: \n"
    "A score from 0 to 25 will be given based on image naturalness. \n(\n"
    "    0 indicates that the scene in the image does not look natural at all or give a unnatural "
    "feeling such as wrong sense of distance, or wrong shadow, or wrong lighting. \n"
    "    25 indicates that the image looks natural.\n)\n"
    "A second score from 0 to 25 will rate the image artifacts. \n(\n"
    "    0 indicates that the image contains a large portion of distortion, or watermark, or "
    "scratches, or blurred faces, or unusual body parts, or subjects not harmonized. \n"
    "    25 indicates the image has no artifacts.\n)\n"
    "Put the score in a list such that output score = [naturalness, artifacts]\n"
)
# "score": [20, 18.5]; some models put the numbers in quotes
ITEM = r"[\s\"']*(-?\d+(?:\.\d+)?)[\s\"']*"
FIRST, SECOND = (
    rf"(?i)score[\s\"'*]*[:=]\s*\[{one},{two}\]"
    for one, two in ((ITEM, ITEM.replace("(-", "(?:-")), (ITEM.replace("(-", "(?:-"), ITEM))
)

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
    **{
        name: Preset(text, tuple(PATTERNS.values()), 1.0, 5.0, max_tokens=length)
        for name, (text, length) in THREE.items()
    },
    **{
        f"{name}_{axis.lower()}": Preset(text, (pattern,), 1.0, 5.0, max_tokens=length)
        for name, (text, length) in THREE.items()
        for axis, pattern in PATTERNS.items()
    },
    "unifiedreward_edit": Preset(EDITED, (FIRST, SECOND), 0.0, 25.0, least=True, sources=1),
    "unifiedreward_edit_following": Preset(EDITED, (FIRST,), 0.0, 25.0, sources=1),
    "unifiedreward_edit_consistency": Preset(EDITED, (SECOND,), 0.0, 25.0, sources=1),
    "unifiedreward_edit_quality": Preset(QUALITY, (FIRST, SECOND), 0.0, 25.0, least=True),
    # Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation"
    # (VQAScore), §3: their question, and their score is P(yes)
    "yes_no": Preset('Does this figure show "{prompt}"? Please answer yes or no.'),
}
