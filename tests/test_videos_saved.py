"""Videos: what is saved has the frames that were scored, in files, reports and commands."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import json

import numpy as np
import pytest
import torch
from odd_pipelines import odd_pipeline
from PIL import Image
from saved_runs import read
from test_videos import PROMPT, brightness, levels, run, video
from tiny_pipelines import wan
from zoo.checks import Subject

import tilt.report
from steering.call import PipelineCall, refuse_videos
from steering.outputs import to_tensor
from tilt.commands import steer as command
from tilt.report import recipe


@pytest.mark.parametrize("name", ["wan", "odd"])
def test_the_saved_frames_score_as_recorded_and_the_manifest_repeats_them(tmp_path, name):
    it = video(name)
    out = run(it, score_frames=3, video_score="min")
    manifest = json.loads((out.save(tmp_path) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["score_frames"] == 3
    assert manifest["video_score"] == "min"
    results = manifest["results"]
    assert results["frames"] == 5
    assert results["files"] == [[f"0000-{j:02d}.webp" for j in range(3)]]
    for j, recorded in enumerate(results["rewards"][0]):
        paths = sorted((tmp_path / f"0000-{j:02d}").iterdir())
        assert [path.name for path in paths] == [f"{i:04d}.png" for i in range(5)]
        frames = [Image.open(path) for path in paths]
        assert np.array_equal(levels(frames), levels(out.images[0][j]))
        assert json.loads(frames[4].text["parameters"])["reward"] == recorded
        scores = brightness(to_tensor([frames[i] for i in (0, 2, 4)], "cpu"), [PROMPT] * 3)
        assert scores.min().item() == pytest.approx(recorded, rel=1e-6)
        with Image.open(tmp_path / f"0000-{j:02d}.webp") as animation:
            assert animation.n_frames == 5
    names = {"pipe": it.pipe, "reward": brightness}
    exec(recipe.call(manifest), names)
    again = names["out"]
    assert torch.equal(again.rewards, out.rewards)
    assert np.array_equal(levels(again.images[0][0]), levels(out.images[0][0]))


def test_the_report_shows_a_frame_of_each_video_and_links_to_its_animation(tmp_path):
    out = run(video("odd"))
    page = read(tilt.report.write(out.save(tmp_path)))
    hrefs = [attrs["href"] for attrs, _ in page.all("a")]
    for j in range(3):
        assert f"./0000-{j:02d}.webp" in hrefs
    assert "score_frames='all'" in page.all("code")[-1][1]


def test_the_command_steers_videos(tmp_path, capsys):
    wan().save_pretrained(tmp_path / "wan")
    folder = tmp_path / "out"
    words = [PROMPT, "--model", str(tmp_path / "wan"), "--reward", "jpeg", "--particles", "2"]
    words += ["--steps", "3", "--height", "16", "--width", "16", "--num-frames", "5"]
    words += ["--dtype", "bfloat16", "--score-from", "0.3", "--score-frames", "2"]
    words += ["--video-score", "min", "--compare"]
    assert command.main([*words, "--out", str(folder)]) == 0
    (steered,) = folder.glob("0000-*/steered")
    manifest = json.loads((steered / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["score_frames"] == 2
    assert manifest["video_score"] == "min"
    assert manifest["pipeline_keywords"]["num_frames"] == 5
    assert manifest["dtype"] == "bfloat16"
    assert len(list((steered / "0000-01").glob("*.png"))) == 5
    assert (folder / "grid.png").exists()
    capsys.readouterr()
    words[words.index("--score-frames") + 1] = "some"
    assert command.main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "--score-frames is 'some' but must be all, first, or a" in capsys.readouterr().err


def test_the_number_of_frames_is_named_as_the_pipeline_names_it():
    class Sana:
        def __call__(self, prompt, frames=81): ...

    given = {"num_frames": 5, "seed": 1}
    command.name_frames(Sana(), given)
    assert given == {"frames": 5, "seed": 1}
    command.name_frames(Sana(), given)
    assert given == {"frames": 5, "seed": 1}
    given = {"num_frames": 5}
    command.name_frames(wan(), given)
    assert given == {"num_frames": 5}
    with pytest.raises(ValueError, match=r"no keyword num_frames=; it generates no videos\.$"):
        run(Subject(odd_pipeline(), {"num_frames": 5}))
    with pytest.raises(ValueError, match=r"no keyword video_length=; did you mean frames=\?"):
        PipelineCall.check(Sana(), ["a"], {"video_length": 5})


def test_what_needs_images_refuses_videos_by_the_name_of_their_number():
    pipe = wan()
    for call, frames in (({}, 81), ({"num_frames": 5}, 5)):
        with pytest.raises(ValueError, match=f"num_frames={frames}: this call generates videos, b"):
            refuse_videos(type(pipe), call)

    class Cog:
        def __call__(self, prompt, num_frames=None): ...

    with pytest.raises(ValueError, match="num_frames=None: this call generates videos, but"):
        refuse_videos(Cog, {})
    refuse_videos(type(pipe), {"num_frames": 1})
    refuse_videos(type(odd_pipeline()), {})
