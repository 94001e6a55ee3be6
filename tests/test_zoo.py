"""Every pipeline that diffusers exports is accounted for, as docs/pipelines.md says."""

import re

import diffusers
import pytest
from diffusers import MultiAdapter
from zoo.accounts import ANIMALS, exported, reason, refusal
from zoo.building import call_of, picture, pipeline_of
from zoo.checks import CHECKS, Subject
from zoo.table import PAGE, read, row

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
