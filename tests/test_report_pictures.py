"""The pictures: what stands where, read back from the pixels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tilt.report import pictures
from tilt.report.grid import FRAME, Cell, Row, grid
from tilt.report.pictures import GridRow, Trace

RED = (214, 39, 40)  # the outline of the best


def plain_image(value: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (value, value, 255))


def row(k: int = 4, compare: bool = True, prompt: str = "a red circle", best: int = 2) -> GridRow:
    rewards = [1.0 if i == best else i / 100 for i in range(k)]
    images = [plain_image(10 * i + 5) for i in range(k)]
    if not compare:
        return GridRow(prompt=prompt, steered=images, rewards=rewards)
    baseline = [plain_image(200), plain_image(220)]
    return GridRow(
        prompt=prompt, steered=images, rewards=rewards, plain=baseline, plain_rewards=[0.1, 0.3]
    )


def columns_of(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """The x of all pixels of one colour."""
    return np.nonzero((np.asarray(picture) == colour).all(axis=2))[1]


def test_order_is_plain_best_of_k_steered():
    picture = pictures.comparison([row()])
    places = [columns_of(picture, (v, v, 255)).mean() for v in (200, 220, 5, 15, 25, 35)]
    assert places == sorted(places)


def test_the_best_steered_image_alone_is_outlined():
    for best in (0, 3):
        picture = pictures.comparison([row(best=best)])
        red = columns_of(picture, RED)
        inside = columns_of(picture, (10 * best + 5, 10 * best + 5, 255))
        assert len(red) > 400
        assert abs(red.mean() - inside.mean()) < 2
        assert red.max() - red.min() < 140  # one cell of 128 px, not two


def label_of(picture: Image.Image) -> np.ndarray:
    """The pixels of the column of the prompts, below the heads."""
    left = columns_of(picture, (5, 5, 255)).min()
    return np.asarray(picture)[24:, : left - 12]


def test_the_column_of_the_prompts_is_as_wide_as_they_are():
    short, longer = (pictures.comparison([row(compare=False, prompt=p)]) for p in ("x", "x" * 20))
    assert label_of(short).shape[1] < 60 < label_of(longer).shape[1]
    both = pictures.comparison([row(compare=False, prompt=p) for p in ("x", "x" * 20)])
    assert both.width == longer.width


@pytest.mark.parametrize("prompt", ["W" * 500, "a word and " * 99, "ﷺ" * 40])
def test_no_prompt_is_written_over_the_pictures_or_the_next_row(prompt):
    picture = pictures.comparison(
        [row(prompt=prompt, compare=False), row(prompt="x", compare=False)]
    )
    assert label_of(picture).shape[1] < 240
    between = np.asarray(picture)[24 + 128 + 18 : 24 + 128 + 26, :240]
    assert (between == 255).all()
    for value in (5, 15, 25, 35):
        assert len(columns_of(picture, (value, value, 255))) == 2 * 128 * 128


def test_letters_of_every_script_are_told_apart():
    def drawn(prompt):
        return label_of(pictures.comparison([row(compare=False, prompt=prompt)])).tobytes()

    letters = "eéèλσñ猫狗🎨🚀"
    assert len({drawn(letter) for letter in letters}) == len(letters)


def test_small_pictures_are_enlarged_pixel_by_pixel_and_large_ones_smoothed():
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = Image.fromarray(checks)
    page = np.asarray(
        pictures.comparison([GridRow(prompt="x", steered=[small, small], rewards=[1, 0])])
    )
    enlarged = np.kron(checks, np.ones((2, 2), np.uint8))
    assert np.array_equal(page[24:152, -136:-8, 0], enlarged)
    large = Image.fromarray(np.tile(checks, (8, 8)))
    page = np.asarray(
        pictures.comparison([GridRow(prompt="x", steered=[large, large], rewards=[1, 0])])
    )
    inner = page[44:260, -244:-28, 0].astype(float)
    assert np.abs(inner - 127.5).max() < 20  # grey, not one of the two


def test_two_thousand_pictures_are_no_trouble():
    many = [row(k=64, prompt=f"p{i}") for i in range(30)]
    picture = pictures.comparison(many, side=32)
    assert picture.height == 24 + 30 * 8 * (32 + 18 + 8)
    assert len(columns_of(picture, RED)) > 30 * 300  # one outline a prompt


def test_without_a_comparison_there_is_no_empty_column():
    alone = pictures.comparison([row(compare=False)])
    assert alone.width < pictures.comparison([row()]).width - 200


def test_many_particles_wrap_and_every_one_is_shown():
    picture = pictures.comparison([row(k=19)])
    assert picture.width == pictures.comparison([row(k=8)]).width
    for i in range(19):
        assert len(columns_of(picture, (10 * i + 5, 10 * i + 5, 255))) > 64 * 64


@pytest.mark.parametrize("size", [(64, 32), (512, 512), (300, 700)])
def test_any_shape_of_image_keeps_its_proportions(size):
    images = [plain_image(100, size)]
    picture = pictures.comparison([GridRow(prompt="x", steered=images, rewards=[1.0])])
    ys, xs = np.nonzero((np.asarray(picture) == (100, 100, 255)).all(axis=2))
    ratio = (np.ptp(xs) + 1) / (np.ptp(ys) + 1)
    assert ratio == pytest.approx(size[0] / size[1], rel=0.1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "prompt", ["costs $5 and $6", r"\frac{$", "", "λ ünï 猫", "x" * 3000, "a\nb\t"]
)
def test_prompts_are_written_as_typed(prompt):
    """ "$...$" would otherwise be parsed as TeX, and fail."""
    steps = {"steps": [1, 2], "rewards": [[0.0, 1.0], [0.5, 1.0]], "ess": [2.0, 1.5]}
    pictures.comparison([row(prompt=prompt), row(prompt=prompt)])
    pictures.history([Trace(prompt=prompt, **steps)])


def test_history_takes_a_funnel_and_many_prompts():
    traces = [
        Trace(
            prompt=f"p{i}",
            steps=[4, 8, 20],
            rewards=[[0.1] * 8, [0.5] * 4, [0.9] * 2],
            ess=[8, 3, 2],
        )
        for i in range(25)
    ]
    assert pictures.history(traces).size == (800, 600)


def test_a_block_has_as_many_columns_as_heads_and_labels_may_stand_above():
    """As on the cards of the embedded models; an empty caption under all takes no room."""
    cells = [Cell(plain_image(10 * i + 5), outline=None) for i in range(10)]
    row = Row("a red circle", [cells])
    picture = grid([[str(i) for i in range(10)]], [row, row], 64, size=26, labels_above=True)
    label = 26 * 4 // 3
    assert picture.size == (8 + 10 * (64 + 8), 2 * 26 + 2 * (label + 64 + 8))
    pixels = np.asarray(picture)
    for i in range(10):
        for top in (2 * 26 + label, 2 * 26 + 2 * label + 64 + 8):
            cell = pixels[top : top + 64, 8 + 72 * i : 72 + 72 * i]
            assert (cell == (10 * i + 5, 10 * i + 5, 255)).all()


def test_a_frame_lies_around_its_picture():
    pages = [
        np.asarray(grid([["x"]], [Row("x", [[Cell(plain_image(5, (64, 32)), "1", outline)]])], 128))
        for outline in (FRAME, None)
    ]
    grey, none = ((page == 0xBB).all(axis=2) for page in pages)
    inside = (pages[0] == (5, 5, 255)).all(axis=2)
    assert grey.sum() == 2 * (130 + 66) - 4
    assert not none.any()
    assert [np.ptp(np.nonzero(m)[0]) for m in (grey, inside)] == [65, 63]


def test_nothing_to_draw_is_an_error():
    for rows in ([], [GridRow(prompt="x", steered=[], rewards=[])]):
        with pytest.raises(ValueError, match="at least one"):
            pictures.comparison(rows)
    with pytest.raises(ValueError, match="at least one"):
        pictures.history([])


def test_rows_and_traces_are_what_was_saved(tmp_path):
    """Against files written here by hand, in the form of Steered.save."""
    for name, rewards in {"steered": [0.5, 1.0], "plain": [0.2, 0.1]}.items():
        folder = tmp_path / name
        folder.mkdir()
        for i in range(2):
            plain_image(50 + i).save(folder / f"0000-{i:02d}.png")
        results = {
            "prompts": ["a cat"],
            "files": [["0000-00.png", "0000-01.png"]],
            "rewards": [rewards],
            "log_weights": [[0.0, float(np.log(3))]],
            "components": {},
            "log_z": [0.0],
        }
        score = {"step": 3, "rewards": [[0.1, 0.4]], "ess": [1.5], "ancestors": [[0, 1]]}
        score["resampled"] = [False]
        scores = [score | {"log_weights": [[0.0, 0.0]]}]
        manifest = {"settings": {"reward_scale": 1.0, "min_ess": 1.0}, "results": results}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "lineage.json").write_text(json.dumps({"num_steps": 9, "scores": scores}))
    (shown,) = pictures.rows(tmp_path / "steered", tmp_path / "plain")
    (trace,) = pictures.traces(tmp_path / "steered")
    assert shown.prompt == "a cat"
    assert (shown.rewards, shown.plain_rewards) == ([0.5, 1.0], [0.2, 0.1])
    assert shown.steered[1].getpixel((0, 0)) == (51, 51, 255)
    assert trace.steps == [3, 9]
    assert trace.rewards == [[0.1, 0.4], [0.5, 1.0]]
    # weights 1/4 and 3/4: 1 / (1/16 + 9/16)
    torch.testing.assert_close(torch.tensor(trace.ess), torch.tensor([1.5, 1.6]))
    assert pictures.rows(tmp_path / "steered", tmp_path / "none")[0].plain == ()
