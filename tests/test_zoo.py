"""Every pipeline that diffusers exports is accounted for, as docs/pipelines.md says."""

import re

import diffusers
import pytest
import torch
from diffusers import MultiAdapter
from zoo.accounts import ANIMALS, exported, reason, refusal
from zoo.building import Animal, call_of, picture, pipeline_of
from zoo.checks import CHECKS, Subject, run
from zoo.table import PAGE, read, row

from steering.outputs import to_tensor

# of diffusers and PyTorch, about the modules and the layers of diffusers
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:__array_wrap__:DeprecationWarning",
    "ignore:Initializing zero-element tensors:UserWarning",
    "ignore:In CPU autocast:UserWarning",
)

TABLE = read()
TRIED = re.findall(r"diffusers (\d+\.\d+)\.", PAGE.read_text(encoding="utf-8"))[0]


@pytest.mark.skipif(
    not diffusers.__version__.startswith(f"{TRIED}."),
    reason=f"the table is of diffusers {TRIED}; what is new in another is found by -m slow",
)
def test_every_pipeline_that_diffusers_exports_is_in_the_table():
    assert sorted(TABLE) == exported()
    for name, line in TABLE.items():
        if line.note.startswith("not tried: it needs "):  # a package that may be here
            continue
        assert bool(line.cells) == (reason(name) is None and refusal(name) is None), name


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionAdapterPipeline",
        pytest.param("StableDiffusionXLAdapterPipeline", marks=pytest.mark.slow),
    ],
)
def test_several_adapters_have_a_picture_each(name):
    animal = ANIMALS[name]
    pipe, other = pipeline_of(name, animal), pipeline_of(name, animal)
    pipe.register_modules(adapter=MultiAdapter([pipe.adapter, other.adapter]).eval())
    several = {"image": [picture(0), picture(5)], "adapter_conditioning_scale": [1.0, 0.5]}
    it = Subject(pipe, call_of(name, animal) | several)
    for check in ("reward", "chunks"):
        CHECKS[check](it)


@pytest.mark.slow
@pytest.mark.parametrize("name", exported())
def test_a_pipeline_is_as_the_table_says(name):
    assert row(name) == TABLE[name]


# --- videos of several frames


FRAMES = 9
_COUNTS = ("num_frames", "video_length", "frames")
_LISTS = ("video", "conditioning_frames", "control_video")
_ONE_ROW = "cannot make 3 rows in one call"
_OTHERWISE = {
    "AllegroPipeline": "cannot decode latents here: .* without tiling",
    "AnimateDiffControlNetPipeline": _ONE_ROW,
    "AnimateDiffVideoToVideoControlNetPipeline": _ONE_ROW,
    "AnimateDiffVideoToVideoPipeline": "cannot follow the rows that are resampled",
    "AnimateDiffSparseControlNetPipeline": "cannot follow the rows that are resampled",
    "ConsisIDPipeline": _ONE_ROW,
    "HeliosPipeline": _ONE_ROW,
    "HeliosPyramidPipeline": _ONE_ROW,
    "HunyuanVideoFramepackPipeline": _ONE_ROW,
    "Kandinsky5I2VPipeline": "it mixes the rows of a call after its last step",
    "LTXConditionPipeline": "gives every token its own timestep",
    "LTXI2VLongMultiPromptPipeline": _ONE_ROW,
    "LTXImageToVideoPipeline": "cannot decode latents here",
    "WanVACEPipeline": "Generating multiple videos per prompt is not yet supported",
}


def video_classes():
    """The classes whose call has a number of frames, or a list of them."""
    for name in exported():
        if reason(name) is None and refusal(name) is None:
            call = call_of(name, ANIMALS.get(name, Animal()))
            if any(keyword in call for keyword in (*_COUNTS, *_LISTS)):
                yield name


@pytest.mark.slow
@pytest.mark.parametrize("name", list(video_classes()))
def test_videos_of_every_class_are_steered_by_their_frames_or_refused(name):
    animal = ANIMALS.get(name, Animal())
    call = call_of(name, animal)
    frames = 16 if name == "LattePipeline" else FRAMES  # of its tiny network
    call |= {count: max(frames, call[count]) for count in _COUNTS if count in call}
    call |= {key: [picture(i) for i in range(frames)] for key in _LISTS if key in call}
    if name == "MotifVideoImage2VideoPipeline":
        pytest.skip("its tiny instance has no feature extractor, which it needs for several frames")
    it = Subject(pipeline_of(name, animal), call)
    if name in _OTHERWISE:
        with pytest.raises(ValueError, match=_OTHERWISE[name]):
            run(it, video_score="min")
        return
    out = run(it, video_score="min")
    assert any(score.replaced.any() for score in out.lineage.scores)
    videos = to_tensor(out.images[0], "cpu")
    assert videos.shape[1] > 1
    torch.testing.assert_close(out.rewards[0], videos.mean((2, 3, 4)).amin(1) * 10)
