"""Smoothing of fused masks: the Gaussian itself, and the sigma chosen on simulated masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlassegfm.core.geometry import Grid
from atlassegfm.core.mask import LocalMap
from atlassegfm.fusion import correction_features
from atlassegfm.fusion.smoothing import best_smoothing, smooth, smoothing_sigma_mm
from scenes import straight_grid

GRID = straight_grid((40, 36, 24), (1.0, 1.25, 2.5))


def oblique(grid: Grid) -> Grid:
    """The same voxels, turned by 0.5 rad about the third axis and 0.3 rad about the first, and moved."""
    about_k, about_i = np.eye(4), np.eye(4)
    about_k[:2, :2] = [[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]
    about_i[1:3, 1:3] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    affine = about_k @ about_i @ grid.affine
    affine[:3, 3] += (30, -10, 5)
    return Grid(grid.shape, affine)


def distance_mm(centre: Sequence[float], grid: Grid = GRID) -> np.ndarray:
    """(I, J, K) of each voxel to the voxel ``centre``."""
    ijk = np.moveaxis(np.indices(grid.shape), 0, -1)
    return np.asarray(np.linalg.norm((ijk - np.array(centre)) * grid.spacing_mm, axis=-1))


def dense(values: np.ndarray, sigma_mm: float, spacing_mm: np.ndarray) -> np.ndarray:
    """Oracle: along each axis a weighted sum of shifted arrays, repeated at their ends."""
    for axis, step_mm in enumerate(spacing_mm):
        reach = int(3 * sigma_mm / step_mm + 0.5)
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step_mm / sigma_mm) ** 2)
        total = np.zeros_like(values, dtype=float)
        for offset, weight in zip(range(-reach, reach + 1), weights / weights.sum(), strict=True):
            index = (np.arange(values.shape[axis]) + offset).clip(0, values.shape[axis] - 1)
            total += weight * np.take(values, index, axis=axis)
        values = total
    return values


@settings(max_examples=25, deadline=None)
@given(
    start=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 18)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)),
    sigma_mm=st.floats(0.3, 4),
    seed=st.integers(0, 9),
)
def test_is_as_a_weighted_sum_on_the_whole_scan(
    start: tuple[int, int, int], size: tuple[int, int, int], sigma_mm: float, seed: int
) -> None:
    mask = LocalMap(start, np.random.default_rng(seed).random(size).astype(np.float32))
    for grid in (GRID, oblique(GRID)):
        found = smooth(mask, sigma_mm, grid)
        assert found.values.dtype == np.float32
        assert found.values.min() >= 0
        assert found.values.max() <= 1
        expected = dense(mask.to_full(grid.shape), sigma_mm, grid.spacing_mm)
        np.testing.assert_allclose(found.to_full(grid.shape), expected, atol=2e-6)


def test_no_sigma_no_change() -> None:
    mask = LocalMap((1, 2, 3), np.ones((2, 2, 2), np.float32))
    assert smooth(mask, 0, GRID) is mask
    assert smooth(LocalMap.empty(), 3.0, GRID).is_empty


def test_structure_cut_off_by_the_border_of_the_scan_keeps_its_cut() -> None:
    full = np.zeros(GRID.shape, np.float32)
    full[:, :, :10] = 1
    found = smooth(LocalMap.from_full(full), 3.0, GRID).to_full(GRID.shape)
    np.testing.assert_array_equal(found[..., :6], 1)
    np.testing.assert_array_equal(found >= 0.5, full >= 0.5)


@pytest.mark.parametrize("radius_mm", [5.0, 9.0])
def test_sigma_is_a_fraction_of_the_radius_up_to_8_mm(radius_mm: float) -> None:
    ball = LocalMap.from_full(np.clip(radius_mm + 0.5 - distance_mm((20, 18, 12)), 0, 1))
    assert smoothing_sigma_mm(0.08, ball, GRID) == pytest.approx(0.08 * radius_mm, rel=0.02)
    assert smoothing_sigma_mm(0.08, LocalMap.empty(), GRID) == 0
    assert smoothing_sigma_mm(0.0, ball, GRID) == 0
    assert smoothing_sigma_mm(0.08, ball, straight_grid(GRID.shape, (40.0, 50.0, 100.0))) == 8


def trials(truth: np.ndarray, error: Callable[[np.random.Generator], np.ndarray]) -> list[tuple[LocalMap, LocalMap]]:
    label = LocalMap.from_full((truth >= 0.5).astype(np.float32))
    random = np.random.default_rng(0)
    return [(LocalMap.from_full((truth + error(random)).clip(0, 1)), label) for _ in range(3)]


def ragged(random: np.random.Generator) -> np.ndarray:
    return random.normal(0, 0.35, GRID.shape).astype(np.float32)


def test_ragged_masks_of_a_smooth_structure_are_smoothed() -> None:
    ball = np.clip((12 - distance_mm((20, 18, 12))) / 4 + 0.5, 0, 1).astype(np.float32)
    fraction = best_smoothing(trials(ball, ragged), GRID)
    assert fraction == 0.08
    # It helps on a mask that was not tried, too.
    mask = LocalMap.from_full((ball + ragged(np.random.default_rng(9))).clip(0, 1))
    rough, smoothed = (
        np.count_nonzero((one.to_full(GRID.shape) >= 0.5) != (ball >= 0.5))
        for one in (mask, smooth(mask, fraction * 12, GRID))
    )
    assert smoothed < 0.5 * rough


def test_thin_and_perfect_structures_are_not_smoothed() -> None:
    sheet, box = np.zeros((2, *GRID.shape), np.float32)
    sheet[4:36, 17, 2:22] = 1  # one voxel thick: smoothing takes it below one half
    assert best_smoothing(trials(sheet, lambda random: random.uniform(-0.3, 0.3, GRID.shape)), GRID) == 0
    box[10:30, 10:26, 6:18] = 1
    assert best_smoothing([(LocalMap.from_full(box), LocalMap.from_full(box))], GRID) == 0
    truth = LocalMap.from_full(np.ones((3, 3, 3), np.float32))
    assert best_smoothing([], GRID) == 0
    assert best_smoothing([(LocalMap.empty(), truth), (truth, LocalMap.empty())], GRID) == 0


def test_large_structures_are_tried_on_a_coarser_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer as at full resolution."""
    monkeypatch.setattr(correction_features, "_MAX_VOXELS", 10_000)
    ball = np.clip((12 - distance_mm((20, 18, 12))) / 4 + 0.5, 0, 1).astype(np.float32)
    tried = trials(ball, ragged)
    assert max(correction_features.block_strides(tried[0][0].values.shape, GRID.spacing_mm)) > 1
    assert best_smoothing(tried, GRID) == 0.08
