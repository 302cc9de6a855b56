"""Overlap measures: hand-worked numbers, empty masks, and the one-pass count against the plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atlassegfm.core import overlap
from atlassegfm.core.overlap import dice, dice_per_structure


def test_dice_by_hand() -> None:
    a = np.zeros((2, 3, 4), bool)
    b = np.zeros((2, 3, 4), bool)
    a[0, 0, :3] = True
    b[0, 0, 1:] = True
    b[1, 2, 0] = True
    # 3 and 4 voxels, 2 in common: 2 * 2 / 7.
    assert dice(a, b) == pytest.approx(4 / 7)
    assert dice(a, a) == 1.0
    assert dice(a, ~a) == 0.0


def test_dice_counts_any_value_but_zero() -> None:
    assert dice(np.array([[[0, 300, 0.5]]]), np.array([[[0, 1, 0]]])) == pytest.approx(2 / 3)


def test_one_empty_mask_is_zero_and_two_are_nan() -> None:
    empty = np.zeros((2, 2, 2), bool)
    full = ~empty
    assert dice(empty, full) == dice(full, empty) == 0.0
    assert math.isnan(dice(empty, empty))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\) and \(2, 2, 3\)"):
        dice(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="not on one grid"):
        dice_per_structure(np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), [1])


def test_per_structure_by_hand() -> None:
    result = np.array([[[1, 1, 2, 2, 0, 7]]], np.uint8)
    reference = np.array([[[1, 2, 2, 2, 0, 0]]], np.uint8)
    scores = dice_per_structure(result, reference, (2, 1, 7, 5))
    assert list(scores) == [2, 1, 7, 5]
    assert scores[1] == pytest.approx(2 * 1 / 3)
    assert scores[2] == pytest.approx(2 * 2 / 5)
    assert scores[7] == 0.0
    assert math.isnan(scores[5])
    assert dice_per_structure(result, reference, ()) == {}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_per_structure_in_any_order_and_chunk(order: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_CHUNK", chunk)
    random = np.random.default_rng(0)
    result = np.array(random.integers(0, 5, (4, 5, 6)), np.uint16, order=order)
    reference = np.array(random.integers(0, 5, (4, 5, 6)), np.int32)
    scores = dice_per_structure(result, reference, range(6))
    for value, score in scores.items():
        assert score == pytest.approx(dice(result == value, reference == value), nan_ok=True)


@pytest.mark.parametrize("large", [300, 70_000, 2**32 - 1])
def test_large_values_cost_no_table_of_their_size(large: int) -> None:
    result = np.array([[[0, large, large, 3, 9]]], np.uint32)
    reference = np.array([[[0, large, 3, 3, 8]]], np.uint32)
    scores = dice_per_structure(result, reference, [3, large, 4])
    assert scores[3] == scores[large] == pytest.approx(2 / 3)
    assert math.isnan(scores[4])


def test_fractions_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        dice_per_structure(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.uint8), [1])


@given(
    hnp.arrays(np.int16, (3, 4, 2), elements=st.integers(-2, 5)),
    hnp.arrays(np.uint8, (3, 4, 2), elements=st.integers(0, 5)),
)
def test_one_pass_is_as_one_pass_a_structure(result: np.ndarray, reference: np.ndarray) -> None:
    for value, score in dice_per_structure(result, reference, range(7)).items():
        assert score == pytest.approx(dice(result == value, reference == value), nan_ok=True)
