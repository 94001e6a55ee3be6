"""Each row of docs/trainable.md is found again."""

from __future__ import annotations

import pytest
from zoo.training import read, row

TABLE = read()


@pytest.mark.slow  # some seconds for each class
@pytest.mark.parametrize("name", TABLE)
def test_a_row_of_the_table_is_found_again(name):
    assert row(name) == TABLE[name]
