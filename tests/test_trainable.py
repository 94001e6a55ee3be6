"""Every pipeline that diffusers exports trains, or is refused, as docs/trainable.md says."""

import re

import diffusers
import pytest
from zoo.accounts import exported
from zoo.training import CHECKS, PAGE, read, row, trained_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TABLE = read()
TRIED = re.findall(r"diffusers (\d+\.\d+)\.", PAGE.read_text(encoding="utf-8"))[0]
ASKED = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "Flux2", "QwenImage")
ASKED += ("ZImage", "Sana", "PixArtSigma", "Lumina2", "AuraFlow", "Chroma", "CogView4")
ASKED += ("HunyuanVideo", "Wan", "LTX", "Kolors")


@pytest.mark.skipif(
    not diffusers.__version__.startswith(f"{TRIED}."),
    reason=f"the table is of diffusers {TRIED}; what is new in another is found by -m slow",
)
def test_every_pipeline_that_diffusers_exports_is_in_the_table():
    assert sorted(TABLE) == exported()
    for name in ASKED:
        assert set(TABLE[f"{name}Pipeline"].cells.values()) == {"yes"}, name


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("QwenImagePipeline", "WanPipeline")]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["Flux2KleinPipeline", *SLOW])
def test_a_class_of_today_trains(name, check):
    CHECKS[check](trained_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", exported())
def test_a_pipeline_trains_as_the_table_says(name):
    assert row(name) == TABLE[name]
