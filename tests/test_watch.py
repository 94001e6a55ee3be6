"""What a run shows while it runs, and keeps of it: moments, previews, stopping."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import family

from steering import FeynmanKac, steer

SETTINGS = FeynmanKac(reward_scale=300.0, num_scores=3, score_from=0.2, score_to=0.7)
FUNNEL = FeynmanKac(
    reward_scale=300.0, num_scores=3, score_from=0.2, score_to=0.7, funnel=(4, 4, 2)
)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def run(settings=SETTINGS, prompts=("a", "b"), **more):
    pipe, keywords = family("sd")
    keywords = {**keywords, "num_inference_steps": 9, "progress": False}
    return steer(pipe, prompts, brightness, 4, settings, **keywords | more)


def test_every_step_is_told_and_a_scored_one_with_its_score():
    moments = []
    out = run(watch=moments.append)
    assert [(m.prompts, m.step, m.num_steps) for m in moments] == [
        ((i,), step, 9) for i in range(2) for step in range(9)
    ]
    scored = [m for m in moments if m.score is not None]
    assert [m.step for m in scored] == [score.step for score in out.lineage.scores] * 2
    for i, moment in enumerate(scored):
        kept = out.lineage.prompt(i // 3).scores[i % 3]
        assert torch.equal(moment.score.rewards, kept.rewards)
        assert torch.equal(moment.score.previews, kept.previews)


def test_previews_are_the_pictures_that_were_scored():
    seen = []

    def reward(images, prompts):
        seen.append(images)
        return brightness(images, prompts)

    pipe, keywords = family("sd")
    out = steer(pipe, "a", reward, 4, SETTINGS, progress=False, **keywords)
    for score, images in zip(out.lineage.scores, seen, strict=False):
        shown = score.previews[0].float() / 255
        assert (shown - images).abs().max() <= 0.5 / 255 + 1e-6
    assert out.lineage.scores[0].previews.shape[:3] == (1, 4, 3)


def test_large_previews_are_made_small():
    few = FeynmanKac(reward_scale=300.0, num_scores=1)
    out = run(few, prompts=("a",), height=96, width=192, num_inference_steps=3)
    assert out.lineage.scores[0].previews.shape == (1, 4, 3, 32, 64)


def test_what_the_watcher_raises_ends_the_run_and_keeps_what_is_finished():
    class Stop(Exception):
        pass

    def stop(moment):
        if moment.prompts == (1,) and moment.step == 4:
            raise Stop

    with pytest.raises(Stop) as cut:
        run(watch=stop)
    assert cut.value.finished.prompts == ("a",)
    assert [p.shape[0] for p in (cut.value.finished.rewards,)] == [1]


@pytest.mark.parametrize("settings", [SETTINGS, FUNNEL])
def test_previews_are_saved_a_column_a_score(settings, tmp_path):
    out = run(settings)
    out.save(tmp_path)
    entry = json.loads((tmp_path / "lineage.json").read_text())["previews"]
    assert entry["files"] == ["previews-0000.webp", "previews-0001.webp"]
    width, height = entry["tile"]
    for prompt, name in enumerate(entry["files"]):
        with Image.open(tmp_path / name) as sheet:
            pixels = np.asarray(sheet.convert("RGB")).astype(int)
        assert pixels.shape == (4 * height, 3 * width, 3)
        for column, score in enumerate(out.lineage.scores):
            for row, tile in enumerate(score.previews[prompt]):
                shown = pixels[row * height :, column * width :][:height, :width]
                # WebP blurs colours of neighbours; the means tell the tiles apart
                assert abs(shown.mean() - tile.float().mean().item()) < 6


def test_a_run_without_scores_has_no_previews(tmp_path):
    run(FeynmanKac(min_ess=0.0)).save(tmp_path)
    assert "previews" not in json.loads((tmp_path / "lineage.json").read_text())
