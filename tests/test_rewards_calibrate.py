"""Scores on the scale of a reference sample, and the file that holds it."""

import json
import statistics

import pytest
import torch

import rewards
from rewards.algebra import calibrate

HERE = __name__
IMAGES = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"{i}" for i in range(40)]


class Scaled:
    """A reward as the built-in ones are: its spec leaves out what is a default."""

    name, differentiable, wants_references, range = "scaled", True, False, (0.0, None)

    def __init__(self, factor: float = 2.0, offset: float = 0.0) -> None:
        self.factor, self.offset = factor, offset
        given = [f"factor={factor}"] if factor != 2 else []
        self.spec = f"{HERE}:Scaled" + (f"({', '.join(given)})" if given else "")

    def __call__(self, images, prompts, *, references=None):
        return self.factor * images.mean((1, 2, 3)) + self.offset


def steps(images, prompts):
    return (images.mean((1, 2, 3)) * 40).round()


def half_unsure(images, prompts):
    scores = images.mean((1, 2, 3))
    return torch.where(torch.arange(len(images)) % 2 == 0, torch.nan, scores)


def constant(images, prompts):
    return torch.full((len(images),), 0.3)


def endless(images, prompts):
    return torch.full((len(images),), torch.inf)


def file(tmp_path, spec):
    path = tmp_path / "scale.json"
    calibrate.save(path, calibrate.measure(rewards.load(spec, imports=True), IMAGES, PROMPTS))
    return path


def test_affine_gives_the_sample_mean_0_and_deviation_1(tmp_path):
    path = file(tmp_path, f"{HERE}:Scaled + jpeg")
    for part in (f"{HERE}:Scaled", "jpeg"):
        raw = rewards.load(part, imports=True)(IMAGES, PROMPTS).tolist()
        scores = rewards.load(f"calibrated({part}, file={path})", imports=True)(IMAGES, PROMPTS)
        mean, std = statistics.fmean(raw), statistics.pstdev(raw)
        expected = torch.tensor([(r - mean) / std for r in raw])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
        assert scores.mean().abs() < 1e-4
        assert scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_affine_carries_the_range_over(tmp_path):
    path = file(tmp_path, f"{HERE}:Scaled")
    raw = rewards.load(f"{HERE}:Scaled", imports=True)(IMAGES, PROMPTS).tolist()
    low, high = rewards.load(f"calibrated({HERE}:Scaled, file={path})", imports=True).range
    assert low == pytest.approx(-statistics.fmean(raw) / statistics.pstdev(raw), rel=1e-4)
    assert high is None


def test_quantile_is_the_share_of_the_sample_below_with_half_of_the_ties(tmp_path):
    for spec in (f"{HERE}:steps", f"{HERE}:Scaled"):
        path = file(tmp_path, spec)
        raw = rewards.load(spec, imports=True)(IMAGES, PROMPTS).tolist()
        scores = rewards.load(f"calibrated({spec}, file={path}, method=quantile)", imports=True)
        below = [sum(x < r for x in raw) + sum(x == r for x in raw) / 2 for r in raw]
        torch.testing.assert_close(scores(IMAGES, PROMPTS), torch.tensor(below) / len(raw))
        assert scores.range == (0, 1)
    assert len(set(raw)) > 30
    assert scores(IMAGES, PROMPTS).mean().item() == pytest.approx(0.5, abs=1e-6)


def test_quantile_is_straight_between_scores_and_flat_outside(tmp_path):
    path = tmp_path / "scale.json"
    spec = f"{HERE}:Scaled(1)"
    calibrate.save(
        path, {calibrate.fingerprint(rewards.load(spec, imports=True)): [0.8, 0.2, 0.4, 0.4]}
    )
    reward = rewards.load(f"calibrated({spec}, file={path}, method=quantile)", imports=True)
    level = torch.tensor([0.0, 0.2, 0.3, 0.4, 0.5, 0.8, 1.0])
    images = level.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone().requires_grad_(True)
    scores = reward(images, [""] * 7)
    expected = torch.tensor([0.125, 0.125, 0.3125, 0.5, 0.59375, 0.875, 0.875])
    torch.testing.assert_close(scores, expected)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    slopes = gradient.sum((1, 2, 3))[[0, 2, 4, 6]]
    torch.testing.assert_close(slopes, torch.tensor([0.0, 0.375 / 0.2, 0.375 / 0.4, 0.0]))


def test_calibrated_scores_keep_order_batches_and_unanswered_questions(tmp_path):
    path = file(tmp_path, f"{HERE}:half_unsure + {HERE}:Scaled")
    assert len(json.loads(path.read_text())["components"][f"{HERE}:half_unsure"]) == 20
    for method in calibrate.METHODS:
        reward = rewards.load(
            f"calibrated({HERE}:half_unsure, file={path}, method={method})", imports=True
        )
        assert reward(IMAGES, PROMPTS).isnan().tolist() == [True, False] * 20
        reward = rewards.load(
            f"calibrated({HERE}:Scaled, file={path}, method={method})", imports=True
        )
        assert reward.differentiable
        together = reward(IMAGES, PROMPTS)
        raw = reward.components(IMAGES, PROMPTS)["Scaled"]
        assert torch.equal(together.argsort(), raw.argsort())
        alone = torch.cat([reward(IMAGES[i : i + 1], [""]) for i in range(5)])
        torch.testing.assert_close(alone, together[:5])
        assert reward(IMAGES[:0], []).shape == (0,)


def test_the_text_form_and_the_components_name_the_file(tmp_path):
    path = file(tmp_path, f"{HERE}:Scaled + jpeg")
    text = f"calibrated({HERE}:Scaled, file={path}) - 2*calibrated(jpeg, file={path})"
    reward = rewards.load(text, imports=True)
    components = reward.components(IMAGES, PROMPTS)
    assert list(components) == ["calibrated_Scaled", "Scaled", "calibrated_jpeg", "jpeg"]
    assert rewards.load(str(reward), imports=True) == reward
    torch.testing.assert_close(
        rewards.load(str(reward), imports=True)(IMAGES, PROMPTS), reward(IMAGES, PROMPTS)
    )


def test_every_component_and_the_sum_are_measured(tmp_path):
    text = f"0.5*x=jpeg + min(y={HERE}:Scaled(3), {HERE}:steps - jpeg)"
    reward = rewards.load(text, imports=True)
    measured = calibrate.measure(reward, IMAGES, PROMPTS)
    total, components = reward.evaluate(IMAGES, PROMPTS)
    least = f"min({HERE}:Scaled(factor=3), {HERE}:steps - jpeg)"
    assert list(measured) == [
        f"0.5*jpeg + {least}",
        "jpeg",
        least,
        f"{HERE}:Scaled(factor=3)",
        f"{HERE}:steps",
    ]
    torch.testing.assert_close(measured[f"0.5*jpeg + {least}"], total)
    torch.testing.assert_close(measured["jpeg"], components["x"])
    path = tmp_path / "scale.json"
    calibrate.save(path, measured)
    again = rewards.load(f"calibrated({text}, file={path})", imports=True)(IMAGES, PROMPTS)
    assert again.mean().abs() < 1e-4


def test_aliases_and_written_defaults_do_not_change_the_fingerprint(tmp_path):
    path = file(tmp_path, "jpeg")
    same = f"calibrated(a=jpeg(mode=compressibility), file={path})"
    torch.testing.assert_close(
        rewards.load(same, imports=True)(IMAGES, PROMPTS),
        rewards.load(f"calibrated(jpeg, file={path})", imports=True)(IMAGES, PROMPTS),
    )


@pytest.mark.parametrize(
    "use", ["calibrated({}, file={})", "par({}, ref={})", "clip_above({}, at={})"]
)
def test_a_sample_of_another_reward_is_refused(tmp_path, use):
    path = file(tmp_path, f"jpeg + 2*{HERE}:steps")
    for other in ("jpeg(incompressibility)", "2*jpeg", f"jpeg + {HERE}:steps"):
        with pytest.raises(ValueError, match=r"was measured for .*, not for .*; measure") as error:
            rewards.load(use.format(other, path), imports=True)
        assert "\n" not in str(error.value)


def test_par_compares_with_every_score_of_the_sample(tmp_path):
    path = file(tmp_path, f"{HERE}:Scaled")
    raw = rewards.load(f"{HERE}:Scaled", imports=True)(IMAGES, PROMPTS)
    expected = torch.stack([torch.sigmoid(r - raw).mean() for r in raw])
    scores = rewards.load(f"par({HERE}:Scaled, ref={path})", imports=True)(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, expected)


def test_clip_above_stops_at_a_quantile_of_the_sample(tmp_path):
    path = file(tmp_path, f"{HERE}:Scaled")
    raw = rewards.load(f"{HERE}:Scaled", imports=True)(IMAGES, PROMPTS)
    for spec, quantile in ((f"at={path}", 0.95), (f"at={path}, quantile=0.5", 0.5)):
        reward = rewards.load(f"clip_above({HERE}:Scaled, {spec})", imports=True)
        top = raw.double().quantile(quantile).item()
        torch.testing.assert_close(reward(IMAGES, PROMPTS), raw.clamp(max=top))
        assert reward.range == pytest.approx((0, top))


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"components": []}',
        '{"components": {"jpeg": 3}}',
        '{"components": {"jpeg": [1]}}',
        '{"components": {"jpeg": [1, NaN]}}',
        '{"components": {"jpeg": ["a", "b"]}}',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "scale.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a calibration file") as error:
        rewards.load(f"calibrated(jpeg, file={path})", imports=True)
    assert "\n" not in str(error.value)


def test_what_cannot_be_calibrated_is_refused(tmp_path):
    path = file(tmp_path, f"{HERE}:constant")
    with pytest.raises(ValueError, match=r"all 40 reference scores of .* are 0.3"):
        rewards.load(f"calibrated({HERE}:constant, file={path})", imports=True)
    with pytest.raises(
        ValueError, match=r"two or more finite scores but got 40 .* from inf to inf"
    ):
        file(tmp_path, f"{HERE}:endless")
    with pytest.raises(ValueError, match="but got 0 that are not NaN, from none"):
        calibrate.save(path, {"jpeg": [torch.nan]})
    assert json.loads(path.read_text())["components"]
    with pytest.raises(ValueError, match="did you mean 'quantile'"):
        rewards.load(f"calibrated({HERE}:constant, file={path}, method=quantil)", imports=True)
    with pytest.raises(ValueError, match="no calibration file 3"):
        rewards.load(f"calibrated({HERE}:constant, file=3)", imports=True)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "scale.json"
    calibrate.save(path, {"jpeg": [1.0, 2.0]})
    calibrate.save(path, {"jpeg": torch.tensor([4.0, 3.0])})
    assert json.loads(path.read_text()) == {"components": {"jpeg": [3.0, 4.0]}}
    assert [child.name for child in tmp_path.iterdir()] == ["scale.json"]
    torch.testing.assert_close(
        calibrate.read(path, rewards.load("jpeg")), torch.tensor([3.0, 4.0]).double()
    )


def test_a_file_written_by_hand_need_not_be_sorted(tmp_path):
    path = tmp_path / "scale.json"
    path.write_text('{"components": {"jpeg": [-2, -5, 1]}}')
    assert calibrate.read(path, rewards.load("jpeg")).tolist() == [-5, -2, 1]
