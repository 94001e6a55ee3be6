"""Tables of scores: carried on after an interruption, and their statistics."""

import math

import numpy as np
import pytest

from tilt.score_summary import draw, rank_correlation, summary
from tilt.score_table import Table, read_table, spec_of, write_table

ROWS = [
    {"image": f"{i}.png", "prompt": 'a "b",\u2028c', "reward": i / 3, "x": float(i), "y": math.inf}
    for i in range(4)
]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_read_back_as_it_was_written(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"scores{suffix}"
    rows = [*ROWS[:3], ROWS[3] | {"reward": math.nan, "y": math.nan}]
    table = Table(path, "x + y")
    table.add(rows[2:])
    table.add(rows[:2])
    assert table.finish(rows)
    assert {p.name for p in tmp_path.iterdir()} - {"scores.csv.spec"} == {path.name}
    assert spec_of(path) == "x + y"
    for row, back in zip(rows, read_table(path), strict=True):
        assert all(row[k] == back[k] or (math.isnan(row[k]) and math.isnan(back[k])) for k in row)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("score", ["reward", "y"])
def test_nan_is_no_score_so_it_is_asked_for_again(tmp_path, suffix, score):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path, without = tmp_path / f"scores{suffix}", ROWS[1] | {score: math.nan}
    first = Table(path, "x")
    first.add([ROWS[0], without, ROWS[2]])
    assert first.missing(ROWS) == [1, 3]
    first.finish(ROWS[:3])
    assert len(read_table(path)) == 3
    one, other = (Table(path, "x", resume=True, index=i) for i in range(2))
    assert one.missing(ROWS) == [1, 3]
    one.add([ROWS[1]])
    other.add([ROWS[3]])  # its file begins with the finished table, and so with the NaN
    last = Table(path, "x", resume=True)
    assert last.missing(ROWS) == []
    assert last.finish(ROWS)
    assert read_table(path) == ROWS
    assert not Table(path, "x", resume=True).finish(ROWS)


def test_an_interrupted_table_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "scores.csv"
    Table(path, "x").add(ROWS[:2])
    part = tmp_path / "scores.csv.part"
    part.write_text(part.read_text() + '{"image": "2.pn')
    table = Table(path, "x", resume=True)
    assert [row["image"] for row in table.rows] == ["0.png", "1.png"]
    table.add(ROWS[2:])
    table.finish(ROWS)
    assert len(read_table(path)) == 4


def test_processes_write_one_table_which_any_number_of_them_goes_on_with(tmp_path):
    path = tmp_path / "scores.csv"
    first, second = (Table(path, "x", index=i) for i in range(2))
    second.add(ROWS[1:2])  # the run ends here, before the first process has written anything
    with pytest.raises(ValueError, match="add --resume"):
        Table(path, "x")
    with pytest.raises(ValueError, match="was scored by 'x', not 'y'"):
        Table(path, "y", resume=True)
    first, second, third = (Table(path, "x", resume=True, index=i) for i in range(3))
    assert third.missing(ROWS) == [0, 2, 3]
    for i, table in ((3, second), (0, first), (2, third)):
        table.add(ROWS[i : i + 1])
    alone = Table(path, "x", resume=True)
    assert alone.missing(ROWS) == []
    first.collect()
    assert first.finish(ROWS)
    assert [row["image"] for row in read_table(path)] == [row["image"] for row in ROWS]
    assert {file.name for file in tmp_path.iterdir()} == {"scores.csv", "scores.csv.spec"}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_finished_table_takes_more_rows_and_keeps_its_own(tmp_path, suffix):
    path = tmp_path / f"scores{suffix}"
    first = Table(path, "x")
    first.add(ROWS[:2])
    first.finish(ROWS[:2])
    again = Table(path, "x", resume=True)
    assert again.missing(ROWS) == [2, 3]
    again.add(ROWS[2:3])
    cut = Table(path, "x", resume=True)  # the last run ended here, the finished file still stands
    assert cut.missing(ROWS) == [3]
    cut.add(ROWS[3:])
    assert cut.finish(ROWS)
    assert [row["image"] for row in read_table(path)] == [row["image"] for row in ROWS]
    assert not Table(path, "x", resume=True).finish(ROWS)


def test_a_row_is_named_by_picture_prompt_and_references(tmp_path):
    rows = [
        {"image": "a.png", "prompt": prompt, "references": references, "reward": float(i)}
        for i, (prompt, references) in enumerate([("x", "[]"), ("y", "[]"), ("y", '["b.png"]')])
    ]
    path = tmp_path / "scores.csv"
    table = Table(path, "x")
    table.add(rows)
    table.finish([*rows[::-1], rows[0]])
    assert [row["reward"] for row in read_table(path)] == [2, 1, 0, 0]
    again = Table(path, "x", resume=True)
    assert again.missing(rows) == []
    with pytest.raises(ValueError, match=r"not asked for \(2\), the first of a\.png"):
        again.missing(rows[1:])
    assert len(read_table(path)) == 4


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_finished_table_of_another_spec_is_not_carried_on(tmp_path, suffix):
    path = tmp_path / f"scores{suffix}"
    table = Table(path, "x")
    table.add(ROWS)
    table.finish(ROWS)
    with pytest.raises(ValueError, match="was scored by 'x', not 'y'"):
        Table(path, "y", resume=True)
    if suffix == ".csv":
        (tmp_path / "scores.csv.spec").unlink()
        with pytest.raises(ValueError, match="by an unnamed reward, not 'x'"):
            Table(path, "x", resume=True)


def test_what_cannot_be_written_is_refused_before_there_are_rows(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    for path in (tmp_path / "file" / "scores.csv", tmp_path / "folder.csv"):
        with pytest.raises(ValueError, match="cannot be written"):
            Table(path, "x", resume=True)
    Table(tmp_path / "new" / "scores.csv", "x")
    assert not list((tmp_path / "new").iterdir())


def test_what_is_there_is_not_overwritten_or_mixed(tmp_path):
    path = tmp_path / "scores.csv"
    Table(path, "x").add(ROWS)
    with pytest.raises(ValueError, match="--resume"):
        Table(path, "x")
    with pytest.raises(ValueError, match="was scored by 'x', not 'y'"):
        Table(path, "y", resume=True)
    with pytest.raises(ValueError, match=r"must end in one of"):
        Table(tmp_path / "scores.xls", "x")


def test_rank_correlation_equals_torchmetrics():
    import torch
    from torchmetrics.functional.regression import spearman_corrcoef

    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 40).astype(float)  # many ties
    b = a + rng.normal(size=40) * 3
    wanted = spearman_corrcoef(torch.tensor(a), torch.tensor(b)).item()
    assert rank_correlation(a, b) == pytest.approx(wanted, abs=1e-6)
    a[3] = math.nan
    assert rank_correlation(a, b) == pytest.approx(
        rank_correlation(np.delete(a, 3), np.delete(b, 3))
    )
    assert math.isnan(rank_correlation(np.ones(5), np.arange(5.0)))


def test_summary_counts_what_is_missing(tmp_path):
    text = summary(ROWS)
    line = next(line for line in text.splitlines() if line.startswith("y "))
    assert line.split()[-1] == "4"
    x = next(line for line in text.splitlines() if line.startswith("x ")).split()
    assert [float(v) for v in x[1:6]] == pytest.approx([1.5, 0.6455, 0, 1.5, 3], rel=1e-3)
    draw(ROWS, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_a_row_that_was_cut_off_is_scored_again(tmp_path):
    rows = [
        {"image": f"{i}.png", "prompt": "a", "reward": i / 3, "clip": math.inf} for i in range(3)
    ]
    path = tmp_path / "scores.csv"
    write_table(path, rows, "clip")
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    wanted = [{"image": row["image"], "prompt": row["prompt"]} for row in rows]
    for text, missing in (
        (whole, []),
        (whole.replace(",inf", ",", 1), [0]),  # an empty cell is a NaN
        ("".join([lines[0], "0.png,a\n", *lines[2:]]), [0]),
        ("".join(lines[:3]) + "2.png,a,0.6", [2]),
    ):
        path.write_text(text)
        assert Table(path, "clip", resume=True).missing(wanted) == missing


@pytest.mark.parametrize(
    "content",
    [b"hello\nworld\n", b"image,prompt,reward\na,b,x\n", b"\xff", b"image,prompt\na,b,c\n"],
)
def test_a_table_of_something_else_is_named(content, tmp_path):
    (tmp_path / "scores.csv").write_bytes(content)
    (tmp_path / "scores.csv.spec").write_text("clip")
    with pytest.raises(ValueError, match=r"scores\.csv is not a table of scores, or is damaged"):
        Table(tmp_path / "scores.csv", "clip", resume=True)


@pytest.mark.parametrize(
    "content", ["[]\n", "3\n", "{}\n", "x\n", '{"reward": "clip"}\n[1]\n', "[" * 9999 + "\n"]
)
def test_a_damaged_working_file_is_named(content, tmp_path):
    (tmp_path / "scores.csv.part").write_text(content)
    with pytest.raises(ValueError, match=r"scores\.csv\.part is not a table of scores"):
        Table(tmp_path / "scores.csv", "clip", resume=True)


def test_a_damaged_parquet_table_is_named(tmp_path):
    write_table(tmp_path / "a.parquet", [{"image": "a", "prompt": "b", "reward": 1.0}], "clip")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"a\.parquet is not a table of scores"):
        Table(tmp_path / "a.parquet", "clip", resume=True)
