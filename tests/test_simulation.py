"""Simulated errors of registration: as large and as smooth as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice
from atlassegfm.fusion.simulation import random_field, simulated_mask
from atlassegfm.settings import SimulationSettings
from conftest import rotation
from scenes import straight_grid


def ball(radius_mm: float, grid: Grid) -> Volume:
    points = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    return Volume((np.linalg.norm(points, axis=-1) <= radius_mm).astype(np.uint8) * 5, grid)


def simulate(labels: Volume, size: float, seed: int, window: float = 0.5) -> LocalMap:
    box = ndimage.find_objects(labels.data)[4]
    return simulated_mask(labels, box, 5, size=size, window=window, seed=(seed,))


def test_size_and_smoothness_of_the_field() -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(10, 20, 30) * 2
    view = Grid((60, 60, 60), affine)
    field = random_field(view, 3.0, 8.0, np.random.default_rng(0))
    values = field.displacement_mm
    assert values.dtype == np.float32
    for component in values:
        assert component.std() == pytest.approx(3.0, rel=0.15)
    # Nodes lie 4 mm apart: 4 of them are 16 mm, two windows: exp(-16² / (4 8²)) = exp(-1).
    np.testing.assert_allclose(field.grid.spacing_mm, 4.0)
    correlation = (values[:, 4:] * values[:, :-4]).mean() / (values**2).mean()
    assert correlation == pytest.approx(np.exp(-1), abs=0.08)
    assert field.grid.contains(view.corners_mm).all()


@pytest.mark.parametrize("radius_mm", [6.0, 24.0])
def test_errors_go_with_the_radius(radius_mm: float) -> None:
    """A ball moved by a share of its radius keeps the same Dice, whatever its size."""
    labels = ball(radius_mm, straight_grid((64, 64, 64), (radius_mm / 12,) * 3))
    truth = labels.data == 5
    scores = {}
    for size in SimulationSettings().sizes:
        masks = [simulate(labels, size, seed).to_full(truth.shape) >= 0.5 for seed in range(6)]
        scores[size] = float(np.mean([dice(mask, truth) for mask in masks]))
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert scores[0.07] > 0.9
    assert 0.65 < scores[0.2] < 0.88


def test_seeds() -> None:
    labels = ball(12.0, straight_grid((32, 32, 32)))
    one, same, other = simulate(labels, 0.1, 1), simulate(labels, 0.1, 1), simulate(labels, 0.1, 2)
    assert one.start == same.start
    np.testing.assert_array_equal(one.values, same.values)
    assert one.values.shape != other.values.shape or (one.values != other.values).any()
    assert one.values.min() >= 0
    assert one.values.max() <= 1


def test_other_labels_and_the_border_of_the_scan() -> None:
    grid = straight_grid((32, 32, 32))
    labels = ball(12.0, grid)
    alone = simulate(labels, 0.1, 3)
    beside = labels.data.copy()
    beside[beside == 0] = 2
    crowded = simulated_mask(
        Volume(beside, grid), ndimage.find_objects(labels.data)[4], 5, size=0.1, window=0.5, seed=(3,)
    )
    np.testing.assert_array_equal(crowded.values, alone.values)
    cut = grid.crop((0, 0, 0), (16, 32, 32))
    half = simulate(Volume(labels.data[:16], cut), 0.1, 3)
    assert min(half.start) >= 0
    assert all(last <= n for last, n in zip(half.stop, cut.shape, strict=True))


def test_a_voxel_and_a_scattered_structure() -> None:
    grid = straight_grid((200, 200, 60), (1.0, 1.0, 1.0))
    data = np.zeros(grid.shape, np.uint8)
    data[5, 5, 5] = data[195, 195, 55] = 5  # windows of 0.4 mm would need 160 million nodes
    mask = simulate(Volume(data, grid), 0.1, 0)
    assert 0 < mask.values.sum() <= 4
    single = np.zeros((5, 5, 5), np.uint8)
    single[2, 2, 2] = 5
    assert simulate(Volume(single, straight_grid((5, 5, 5))), 0.1, 0).values.max() > 0.3
