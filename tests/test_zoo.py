"""Every pipeline that diffusers exports is accounted for, as docs/pipelines.md says."""

import pytest
from zoo.accounts import exported, reason, refusal
from zoo.table import read, row

# of diffusers itself, about its own modules
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TABLE = read()


def test_every_pipeline_that_diffusers_exports_is_in_the_table():
    assert sorted(TABLE) == exported()
    for name, line in TABLE.items():
        assert bool(line.cells) == (reason(name) is None and refusal(name) is None), name


@pytest.mark.slow
@pytest.mark.parametrize("name", exported())
def test_a_pipeline_is_as_the_table_says(name):
    assert row(name) == TABLE[name]
