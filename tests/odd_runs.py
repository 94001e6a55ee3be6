"""Runs of odd pipelines, for the tests of what steer() has never seen."""

from steering import FeynmanKac, steer

PROMPT = "a red cube"


PLAIN = FeynmanKac(num_scores=2, score_from=0.2, reward_scale=0.0)


FUNNEL = FeynmanKac(num_scores=1, score_from=0.2, score_to=0.4, reward_scale=0.0, funnel=(2,))


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def latents(pipe, settings=PLAIN, k=3, **change):
    out = steer(pipe, PROMPT, brightness, k, settings, progress=False, **change)
    return out.latents[0]
