"""The built-in model: what it finds, what it leaves alone, and that it sees the world and not the array."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from atlassegfm.core.errors import ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.models import load_model
from atlassegfm.models.builtin import BuiltinSegmenter
from atlassegfm.prompts import BoxPrompt, ClickPrompt, MaskPrompt, Prompt

SHAPE = (40, 36, 20)
SPACING_MM = (1.5, 1.5, 4.0)
CENTRE = (20, 17, 10)
RADIUS_MM = 15.0


def scan(data: NDArray[np.floating], spacing_mm: tuple[float, float, float] = SPACING_MM) -> Volume:
    return Volume(data.astype(np.float32), Grid(data.shape, np.diag([*spacing_mm, 1.0])))


def ball(
    centre: tuple[float, float, float] = CENTRE,
    radius_mm: float = RADIUS_MM,
    shape: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
) -> NDArray[np.bool_]:
    ijk = np.moveaxis(np.indices(shape), 0, -1)
    return (((ijk - centre) * spacing_mm) ** 2).sum(axis=-1) <= radius_mm**2


def bright_ball(contrast: float = 60.0, noise: float = 20.0, seed: int = 0) -> Volume:
    return scan(100 + contrast * ball() + np.random.default_rng(seed).normal(0, noise, SHAPE))


def mask_prompt(mask: NDArray[np.bool_]) -> MaskPrompt:
    return MaskPrompt(LocalMap.from_full(mask.astype(np.float32)))


def dice(probability: LocalMap, truth: NDArray[np.bool_]) -> float:
    found = probability.to_full(truth.shape) >= 0.5
    return 2 * float((found & truth).sum()) / float(found.sum() + truth.sum())


def answer(image: Volume, prompt: Prompt) -> LocalMap:
    model = load_model("builtin", "cpu")
    return model.predict(model.encode(image), {3: prompt})[3]


def test_is_in_the_table_of_models():
    assert isinstance(load_model("builtin", "cpu"), BuiltinSegmenter)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu_is_an_error_of_the_model():
    with pytest.raises(ModelError, match="no CUDA GPU"):
        load_model("builtin", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    model, prompt = load_model("builtin", "cuda"), mask_prompt(ball((22, 17, 10)))
    on_gpu = model.predict(model.encode(bright_ball()), {1: prompt})[1]
    np.testing.assert_allclose(on_gpu.values, answer(bright_ball(), prompt).values, atol=1e-5)


@pytest.mark.parametrize("shift", [(3, 0, 0), (0, -3, 0), (0, 0, 1), (2, 2, 1)])
@pytest.mark.parametrize("contrast", [60.0, -60.0])
def test_displaced_mask_is_drawn_to_the_ball(shift, contrast):
    prompt = mask_prompt(ball(tuple(np.add(CENTRE, shift))))
    before, after = dice(prompt.probability, ball()), dice(answer(bright_ball(contrast), prompt), ball())
    assert after > 0.92
    assert after > before + 0.03


@pytest.mark.parametrize("radius_mm", [12.0, 18.0])
def test_mask_of_the_wrong_size_is_drawn_to_the_ball(radius_mm):
    prompt = mask_prompt(ball(radius_mm=radius_mm))
    assert dice(answer(bright_ball(), prompt), ball()) > dice(prompt.probability, ball()) + 0.04


@pytest.mark.parametrize("radius_mm", [9.0, 13.0])
def test_part_of_the_prompt_that_looks_otherwise_is_dropped_even_from_its_middle(radius_mm):
    # A registered mask that runs far into a neighbour. With a prior that grows without bound, a quarter and two thirds
    # of it stayed.
    wrong = ball((33, 17, 10), radius_mm) & ~ball()
    found = answer(bright_ball(), mask_prompt(ball() | wrong)).to_full(SHAPE) >= 0.5
    assert (found & wrong).sum() < 0.15 * wrong.sum()
    assert (found & ball()).sum() > 0.95 * ball().sum()


@pytest.mark.parametrize(("radius_mm", "least"), [(5.0, 0.85), (15.0, 0.95)])
def test_image_without_contrast_leaves_the_prompt(radius_mm, least):
    mask = ball(radius_mm=radius_mm)
    assert dice(answer(bright_ball(contrast=0), mask_prompt(mask)), mask) > least


def test_constant_image_leaves_the_prompt():
    mask = ball()
    result = answer(scan(np.full(SHAPE, 7.0)), mask_prompt(mask))
    assert dice(result, mask) > 0.96


def test_crop_that_is_constant_in_a_scan_that_is_not():
    data = np.zeros(SHAPE)
    data[:, :, 0] = 1000
    mask = ball(radius_mm=6.0)
    assert dice(answer(scan(data), mask_prompt(mask)), mask) > 0.9


def test_scale_and_offset_of_the_intensities_do_not_matter():
    image, prompt = bright_ball(), mask_prompt(ball((22, 18, 10)))
    other = Volume(image.data * np.float32(0.01) - np.float32(3), image.grid)
    np.testing.assert_allclose(answer(image, prompt).values, answer(other, prompt).values, atol=0.02)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)])
def test_flipped_scan_gives_the_flipped_result(axes):
    image, mask = bright_ball(), ball((22, 15, 11), 14.0)
    straight = answer(image, mask_prompt(mask)).to_full(SHAPE)
    flipped = answer(scan(np.flip(image.data, axes)), mask_prompt(np.flip(mask, axes))).to_full(SHAPE)
    np.testing.assert_allclose(np.flip(flipped, axes), straight, atol=1e-5)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_order_of_the_axes_does_not_matter_as_spacing_goes_with_it(order):
    image, mask = bright_ball(), ball((22, 15, 11), 14.0)
    straight = answer(image, mask_prompt(mask)).to_full(SHAPE)
    spacing_mm = tuple(SPACING_MM[axis] for axis in order)
    turned_image = scan(np.transpose(image.data, order), spacing_mm)
    turned = answer(turned_image, mask_prompt(np.transpose(mask, order)))
    turned = turned.to_full(turned_image.grid.shape)
    np.testing.assert_allclose(turned, np.transpose(straight, order), atol=1e-4)


def test_result_is_a_probability_and_the_same_again():
    image, prompt = bright_ball(), mask_prompt(ball((22, 17, 10)))
    one, two = answer(image, prompt), answer(image, prompt)
    assert one.values.dtype == np.float32
    assert 0 <= one.values.min() <= one.values.max() <= 1
    assert one.start == two.start
    np.testing.assert_array_equal(one.values, two.values)


def test_scan_and_prompt_are_not_written_to():
    image, prompt = bright_ball(), mask_prompt(ball((22, 17, 10)))
    data, values = image.data.copy(), prompt.probability.values.copy()
    answer(image, prompt)
    np.testing.assert_array_equal(image.data, data)
    np.testing.assert_array_equal(prompt.probability.values, values)


@pytest.mark.parametrize(
    "prompt",
    [
        MaskPrompt(LocalMap.empty()),
        MaskPrompt(LocalMap((3, 3, 3), np.full((2, 2, 2), 0.4, np.float32))),
        MaskPrompt(LocalMap((50, 3, 3), np.ones((4, 4, 4), np.float32))),
        MaskPrompt(LocalMap((-9, 3, 3), np.ones((4, 4, 4), np.float32))),
        ClickPrompt((40, 3, 3)),
        ClickPrompt((3, -1, 3)),
        BoxPrompt((50, 0, 3), (60, 9, 4)),
        BoxPrompt((5, 5, 3), (5, 9, 4)),
    ],
)
def test_prompt_that_points_at_nothing(prompt):
    assert answer(bright_ball(), prompt).is_empty


def test_prompt_at_the_border_of_the_volume():
    structure = ball((0, 35, 0))
    image = scan(100 + 60 * structure + np.random.default_rng(1).normal(0, 15, SHAPE))
    shifted = np.roll(structure, 2, axis=0)
    # One that sticks out on the far side too: the part in the scan counts.
    prompt = MaskPrompt(LocalMap((0, 0, -2), np.pad(shifted, ((0, 0), (0, 0), (2, 0))).astype(np.float32)))
    assert dice(answer(image, prompt), structure) > 0.88


def test_prompt_over_the_whole_volume_and_of_one_voxel():
    whole = answer(bright_ball(), mask_prompt(np.ones(SHAPE, bool)))
    assert whole.values.shape == SHAPE
    one = np.zeros(SHAPE, bool)
    one[CENTRE] = True
    assert np.isfinite(answer(bright_ball(), mask_prompt(one)).values).all()


@pytest.mark.parametrize("shape", [(12, 9, 1), (1, 1, 1), (1, 14, 2)])
def test_thin_volumes(shape):
    image = scan(np.random.default_rng(0).normal(0, 1, shape))
    middle = tuple(n // 2 for n in shape)
    stop = tuple(n + 1 for n in middle)
    mask = np.zeros(shape, bool)
    mask[middle] = True
    for prompt in (mask_prompt(mask), ClickPrompt(middle), BoxPrompt(middle, stop)):
        assert np.isfinite(answer(image, prompt).values).all()


def test_click_finds_the_ball():
    assert dice(answer(bright_ball(), ClickPrompt((22, 16, 10))), ball()) > 0.8


def test_box_finds_the_ball():
    assert dice(answer(bright_ball(), BoxPrompt((11, 6, 10), (31, 27, 11))), ball()) > 0.85


def test_box_larger_than_the_volume():
    result = answer(bright_ball(), BoxPrompt((-10, -10, 10), (60, 60, 11)))
    assert np.isfinite(result.values).all()
    assert (np.array(result.start) >= 0).all()
    assert (np.array(result.stop) <= SHAPE).all()


def test_parts_that_do_not_touch_the_prompt_are_left_out():
    # A second ball of the same brightness, within reach but apart.
    other = ball((33, 17, 10), 3.0)
    image = scan(100 + 60 * (ball((15, 17, 10), 12.0) | other) + np.random.default_rng(2).normal(0, 5, SHAPE))
    result = answer(image, mask_prompt(ball((16, 17, 10), 12.0))).to_full(SHAPE)
    assert not (result[other] >= 0.5).any()
