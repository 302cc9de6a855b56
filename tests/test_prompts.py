"""Click, box and mask from a soft mask."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from atlassegfm.core.mask import LocalMap
from atlassegfm.prompts import BoxPrompt, ClickPrompt, MaskPrompt, PromptKind, make_prompt

masks = hnp.arrays(np.float32, (4, 5, 6), elements=st.sampled_from([0.0, 0.4, 0.5, 1.0]))


def local(full: np.ndarray) -> LocalMap:
    return LocalMap.from_full(full)


def block(shape: tuple[int, int, int], *boxes: tuple[tuple[int, int], ...]) -> np.ndarray:
    full = np.zeros(shape, np.float32)
    for box in boxes:
        full[tuple(slice(a, b) for a, b in box)] = 1
    return full


def test_hand_worked_block() -> None:
    probability = local(block((20, 20, 20), ((4, 9), (6, 8), (10, 14))))
    assert make_prompt("box", probability) == BoxPrompt((4, 6, 11), (9, 8, 12), slices=(10, 14))
    click = make_prompt("click", probability)
    assert isinstance(click, ClickPrompt)
    assert click.ijk[0] == 6  # the middle of 4 ... 8
    assert click.ijk[1] in (6, 7)
    assert click.ijk[2] in (11, 12)
    assert click.slices == (10, 14)
    mask = make_prompt("mask", probability)
    assert isinstance(mask, MaskPrompt)
    assert mask.probability is probability


def test_click_and_box_point_at_the_largest_component() -> None:
    probability = local(block((30, 30, 30), ((1, 3), (1, 3), (1, 3)), ((20, 25), (20, 25), (20, 25))))
    assert make_prompt("click", probability) == ClickPrompt((22, 22, 22), slices=(20, 25))
    assert make_prompt("box", probability) == BoxPrompt((20, 20, 22), (25, 25, 23), slices=(20, 25))


def test_click_stays_inside_a_ring() -> None:
    full = block((9, 9, 1), ((0, 9), (0, 9), (0, 1)))
    full[2:7, 2:7] = 0
    click = make_prompt("click", local(full))
    assert isinstance(click, ClickPrompt)
    assert full[click.ijk] == 1


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    full = np.zeros((6, 6, 6), np.float32)
    for n in range(4):
        full[n, n, n] = 1
    full[5, 0:3, 0] = 1
    assert make_prompt("box", local(full)) == BoxPrompt((1, 1, 1), (2, 2, 2), slices=(0, 4))


@pytest.mark.parametrize("kind", get_args(PromptKind))
def test_nothing_to_point_at(kind: PromptKind) -> None:
    assert make_prompt(kind, LocalMap.empty()) is None
    assert make_prompt(kind, LocalMap((3, 4, 5), np.full((2, 2, 2), 0.49, np.float32))) is None


def test_one_voxel() -> None:
    one = LocalMap((3, 4, 5), np.full((1, 1, 1), 0.5, np.float32))
    assert make_prompt("click", one) == ClickPrompt((3, 4, 5), slices=(5, 6))
    assert make_prompt("box", one) == BoxPrompt((3, 4, 5), (4, 5, 6), slices=(5, 6))


@given(masks, st.tuples(*[st.integers(0, 5)] * 3))
def test_prompts_lie_on_one_largest_component(full: np.ndarray, start: tuple[int, int, int]) -> None:
    inside = full >= 0.5
    probability = LocalMap(start, full)
    click, box = make_prompt("click", probability), make_prompt("box", probability)
    if not inside.any():
        assert click is None
        assert box is None
        return
    assert isinstance(click, ClickPrompt)
    assert isinstance(box, BoxPrompt)
    components, _ = ndimage.label(inside, np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel())[1:]
    clicked = components[tuple(np.subtract(click.ijk, start))]
    assert clicked > 0
    assert sizes[clicked - 1] == sizes.max()
    # The box is tight around that component on its one slice, and the slice is the middle one.
    assert box.stop[2] == box.start[2] + 1
    component = components == clicked
    k = box.start[2] - start[2]
    ij = np.argwhere(component[:, :, k])
    assert tuple(ij.min(axis=0) + start[:2]) == box.start[:2]
    assert tuple(ij.max(axis=0) + 1 + start[:2]) == box.stop[:2]
    slices = np.flatnonzero(component.any(axis=(0, 1)))
    assert slices.tolist() == list(range(slices[0], slices[-1] + 1))
    assert abs(2 * k - slices[0] - slices[-1]) <= 1
    assert click.slices == box.slices == (slices[0] + start[2], slices[-1] + 1 + start[2])


@pytest.mark.parametrize("across", [0, 1, 2])
def test_click_and_box_follow_the_slices(across: int) -> None:
    """The prompt of a mask on turned axes is the turned prompt."""
    mask = np.zeros((12, 14, 16), np.float32)
    mask[2:7, 3:9, 4:15] = 1
    turned = LocalMap.from_full(np.ascontiguousarray(np.moveaxis(mask, 2, across)))
    plain = LocalMap.from_full(mask)
    for kind in ("click", "box"):
        expected, found = make_prompt(kind, plain), make_prompt(kind, turned, across)
        assert isinstance(expected, ClickPrompt | BoxPrompt)
        assert isinstance(found, ClickPrompt | BoxPrompt)
        assert (found.slices, found.across) == (expected.slices, across)
        corners = (
            [(expected.ijk, found.ijk)] if isinstance(expected, ClickPrompt) and isinstance(found, ClickPrompt) else []
        )
        if isinstance(expected, BoxPrompt) and isinstance(found, BoxPrompt):
            corners = [(expected.start, found.start), (expected.stop, found.stop)]
        for one, other in corners:
            moved = [*one[:2]]
            moved.insert(across, one[2])
            assert other == tuple(moved)
