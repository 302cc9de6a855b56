"""Simulated errors of registration: as large and as smooth as asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice
from atlassegfm.fusion import simulation
from atlassegfm.fusion.simulation import random_field, simulate_mask
from atlassegfm.settings import SimulationSettings
from atlassegfm.transforms.maps import DisplacementField
from atlassegfm.transforms.resample import warp_labels
from conftest import rotation
from scenes import straight_grid


def ball(radius_mm: float, grid: Grid) -> Volume:
    points = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    return Volume((np.linalg.norm(points, axis=-1) <= radius_mm).astype(np.uint8) * 5, grid)


def simulate(labels: Volume, size: float, seed: int) -> LocalMap:
    box = ndimage.find_objects(np.where(labels.data == 5, 1, 0))[0]
    return simulate_mask(labels, box, 5, size=size, sigma=0.5, seed=(seed,))


def test_size_and_smoothness_of_the_field() -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(10, 20, 30) * 2
    view = Grid((60, 60, 60), affine)
    field = random_field(view, 3.0, 8.0, np.random.default_rng(0))
    values = field.displacement_mm
    assert values.dtype == np.float32
    for component in values:
        assert component.std() == pytest.approx(3.0, rel=0.15)
    # Nodes lie 4 mm apart: 4 of them are 16 mm, two sigmas: exp(-16² / (4 8²)) = exp(-1).
    np.testing.assert_allclose(field.grid.spacing_mm, 4.0)
    correlation = (values[:, 4:] * values[:, :-4]).mean() / (values**2).mean()
    assert correlation == pytest.approx(np.exp(-1), abs=0.08)
    assert field.grid.contains(view.corners_mm).all()


@pytest.mark.parametrize("radius_mm", [6.0, 24.0])
def test_errors_scale_with_the_radius(radius_mm: float) -> None:
    """A ball moved by a fraction of its radius keeps the same Dice, whatever its size."""
    labels = ball(radius_mm, straight_grid((40, 40, 40), (radius_mm / 9,) * 3))
    truth = labels.data == 5
    scores = {}
    for size in SimulationSettings().sizes:
        masks = [simulate(labels, size, seed).to_full(truth.shape) >= 0.5 for seed in range(5)]
        scores[size] = float(np.mean([dice(mask, truth) for mask in masks]))
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert scores[0.07] > 0.9
    assert 0.65 < scores[0.2] < 0.88


def test_mask_depends_on_seed_and_structure_alone() -> None:
    grid = straight_grid((32, 32, 32))
    labels = ball(12.0, grid)
    one, same, other = (simulate(labels, 0.1, seed) for seed in (1, 1, 2))
    beside = simulate(Volume(np.where(labels.data == 0, 2, labels.data), grid), 0.1, 1)
    for again in (same, beside):
        assert again.start == one.start
        np.testing.assert_array_equal(again.values, one.values)
    assert one.values.shape != other.values.shape or (one.values != other.values).any()
    assert 0 <= one.values.min() < one.values.max() <= 1
    # Cut off at the border of the scan.
    cut = grid.crop((0, 0, 0), (16, 32, 32))
    half = simulate(Volume(labels.data[:16], cut), 0.1, 3)
    assert min(half.start) >= 0
    assert all(last <= n for last, n in zip(half.stop, cut.shape, strict=True))


@pytest.mark.parametrize("cut", [False, True])
def test_mask_is_the_label_warped_by_the_field(monkeypatch: pytest.MonkeyPatch, *, cut: bool) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(10, 20, 30) @ np.diag([1.0, 1.5, 2.0])
    affine[:3, 3] = 0 if cut else -affine[:3, :3] @ (15.5, 11.5, 9.5)
    labels = ball(12.0, Grid((32, 24, 20), affine))
    fields = []

    def kept(*args: Any) -> DisplacementField:
        fields.append(random_field(*args))
        return fields[-1]

    monkeypatch.setattr(simulation, "random_field", kept)
    found = simulate(labels, 0.2, 0).to_full(labels.grid.shape)
    expected = warp_labels(labels, (5,), labels.grid, fields[0])[5].to_full(labels.grid.shape)
    inside = np.zeros(labels.grid.shape, bool)  # beyond its grid a field holds on, and a mask has ended
    inside[simulate(labels, 0.2, 0).box] = True
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-4)
    assert (found > 0.5).any()


def test_voxel_and_scattered_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_MAX_NODES", 50_000)
    data = np.zeros((80, 80, 40), np.uint8)
    data[5, 5, 5] = data[75, 75, 35] = 5  # nodes 0.2 mm apart would be 32 million
    assert 0 < simulate(Volume(data, straight_grid(data.shape, (1.0, 1.0, 1.0))), 0.1, 0).values.sum() <= 4
    single = np.zeros((5, 5, 5), np.uint8)
    single[2, 2, 2] = 5
    assert simulate(Volume(single, straight_grid((5, 5, 5))), 0.1, 0).values.max() > 0.3
