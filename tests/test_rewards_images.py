"""Pictures as tensors, against Pillow itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rewards import images as im
from rewards.images import check_inputs, normalize, resize, resize_matrix, to_images, to_uint8

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIZES = [
    ((64, 64), (224, 224)),
    ((256, 256), (224, 224)),
    ((512, 512), (224, 224)),
    ((1024, 1024), (224, 224)),
    ((100, 200), (64, 64)),
    ((256, 256), (224, 448)),  # shrinks the height, enlarges the width: the order of passes shows
    ((300, 200), (448, 100)),
    ((50, 64), (50, 20)),
    ((33, 7), (5, 91)),
    ((37, 1024), (300, 37)),
]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pil(array: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    picture = Image.fromarray(array).resize((size[1], size[0]), FILTERS[filter])
    return np.asarray(picture).astype(float)


def gap(x: torch.Tensor, reference: np.ndarray) -> np.ndarray:
    """Absolute differences in units of one byte."""
    return np.abs(x[0].permute(1, 2, 0).double().numpy() * 255 - reference)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resize_equals_pil(source, target, filter):
    array = noise(*source)
    reference = pil(array, target, filter)
    assert gap(resize(to_images(array), target, filter, exact=True), reference).max() < 1e-3
    smooth = gap(resize(to_images(array), target, filter), reference)
    assert smooth.max() < 1.5
    assert smooth.mean() < 0.35


def test_the_clamp_between_the_passes_is_what_makes_enlarging_agree():
    array = noise(64, 64)
    reference = pil(array, (224, 224), "bicubic")
    weights = resize_matrix(64, 224).float()
    one_clamp = (weights @ (to_images(array) @ weights.T)).clamp(0, 1)
    assert gap(one_clamp, reference).max() > 10
    assert gap(resize(to_images(array), (224, 224)), reference).max() < 1.5


def test_one_axis_equals_torch_antialiased_interpolation():
    x = to_images(noise(64, 512)).double()  # torch places its kernels in the pictures' dtype
    for filter in FILTERS:
        ours = resize(x, (64, 224), filter)
        theirs = F.interpolate(x, (64, 224), mode=filter, antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("filter", FILTERS)
def test_rows_of_the_resize_matrix_sum_to_one(filter):
    for source, target in ((3, 100), (100, 3), (64, 64)):
        rows = resize_matrix(source, target, filter).sum(1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_resize_has_the_right_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 6, 5, dtype=torch.float64, generator=generator) * 0.4 + 0.3
    assert torch.autograd.gradcheck(lambda y: resize(y, (4, 9)), (x.requires_grad_(),), atol=1e-6)


def test_exact_resize_passes_the_gradient_straight_through():
    x = (to_images(noise(16, 16)) * 0.4 + 0.3).requires_grad_()
    grads = []
    for exact in (False, True):
        weight = torch.linspace(-1, 1, 3 * 24 * 24).view(1, 3, 24, 24)
        (grad,) = torch.autograd.grad((resize(x, (24, 24), exact=exact) * weight).sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resize_keeps_the_dtype_and_computes_halves_in_float32(dtype):
    x = to_images(noise(64, 64)).to(dtype)
    y = resize(x, (96, 80))
    assert y.dtype == dtype
    full = resize(x.float(), (96, 80))
    torch.testing.assert_close(y.double(), full.to(dtype).double(), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resize(x.float(), (96, 80)), full, atol=0, rtol=0)


def test_resize_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="lanczos"):
        resize(torch.rand(1, 3, 8, 8), (4, 4), filter="lanczos")
    with pytest.raises(ValueError, match="size is"):
        resize(torch.rand(1, 3, 8, 8), (4, 0))


def test_to_images_reads_every_form_of_one_picture():
    array = noise(5, 7)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    picture = Image.fromarray(array)
    tensor = torch.from_numpy(array)
    forms = [picture, array, array[None], tensor, tensor.permute(2, 0, 1), [picture], expected]
    for form in (*forms, array.astype(np.float32) / 255):
        torch.testing.assert_close(to_images(form), expected, atol=1e-7, rtol=0)
    assert to_images([picture, array]).shape == (2, 3, 5, 7)
    gray = to_images(picture.convert("L"))
    assert gray.shape == (1, 3, 5, 7)
    np.testing.assert_array_equal(to_uint8(to_images(picture))[0], array)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "empty"),
        ([noise(4, 4), noise(4, 5)], "one size"),
        (np.zeros((4, 4)), "three channels"),
        (np.zeros((4, 4, 3), dtype=np.int64), "bytes or floats"),
        (np.full((4, 4, 3), 200.0), "lie in"),
        (np.full((4, 4, 3), -1.0), "lie in"),
    ],
)
def test_to_images_refuses(value, message):
    with pytest.raises(ValueError, match=message):
        to_images(value)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(3, 8, 8), ["a"], "shape"),
        (torch.rand(1, 4, 8, 8), ["a"], "shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "uint8"),
        (torch.rand(1, 3, 8, 8) * 2 - 1, ["a"], r"\[0, 1\]"),
        (torch.rand(1, 3, 8, 8) * 255, ["a"], r"\[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), ["a"], "nan"),
        (torch.rand(2, 3, 8, 8), ["a"], "list of 2 prompts"),
        (torch.rand(1, 3, 8, 8), "a", "one string"),
    ],
)
def test_a_reward_refuses_other_ranges_and_shapes(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(images, prompts)


def test_the_tolerance_of_the_range_is_a_thousandth():
    check_inputs(torch.full((1, 3, 2, 2), 1.0009), ["a"])
    check_inputs(torch.full((1, 3, 2, 2), -0.0009), ["a"])
    with pytest.raises(ValueError, match="lie in"):
        check_inputs(torch.full((1, 3, 2, 2), 1.002), ["a"])


def test_normalize_gives_minus_mean_over_std_for_black():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    black = normalize(torch.zeros(1, 3, 1, 1), mean, std).flatten()
    torch.testing.assert_close(black, torch.tensor([-1.7922625, -1.7520971, -1.4802198]))


def test_pillow_version_is_read_as_a_number():
    assert im.PILLOW >= 10
