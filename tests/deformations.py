"""Known deformations for tests of registration, and distances to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import scenes
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.transforms.maps import DisplacementField, Transform
from atlassegfm.transforms.resample import resample
from conftest import affine_of


def centred_grid(shape: tuple[int, int, int], axes: NDArray[np.float64]) -> Grid:
    """A grid about the origin of the world; ``axes`` are voxel steps in columns, mm."""
    return Grid(shape, affine_of(axes, tuple(-axes @ (np.array(shape) - 1) / 2)))


def error_mm(found: Transform, truth: Transform, scan: Volume) -> float:
    """Mean distance between where the two transforms take the bright voxels of a scan."""
    points = scan.grid.voxel_to_world(np.argwhere(scan.data > 0.1 * scan.data.max())[::7])
    return float(np.linalg.norm(found.map(points) - truth.map(points), axis=1).mean())


def wavy(fixed: Grid, amplitude_mm: float, wavelength_mm: float) -> DisplacementField:
    """A smooth displacement along each axis of the world, on a grid around ``fixed``."""
    shape = (30, 30, 30)
    low, high = fixed.corners_mm.min(axis=0), fixed.corners_mm.max(axis=0)
    grid = Grid(shape, affine_of(np.diag((high - low) / 29), tuple(low)))
    x, y, z = np.moveaxis(grid.voxel_to_world(np.moveaxis(np.indices(shape), 0, -1)), -1, 0) / wavelength_mm
    waves = (amplitude_mm * np.sin(y + 1), (1 - amplitude_mm) * np.cos(z), amplitude_mm * np.sin(x))
    return DisplacementField(grid, np.stack(waves).astype(np.float32))


def deformed(grid: Grid, amplitude_mm: float, wavelength_mm: float) -> tuple[Volume, Volume, DisplacementField]:
    """A query that is the atlas seen through a known deformation, the atlas, and the deformation."""
    moving = scenes.ATLAS.scan(centred_grid((80, 70, 70), np.diag([2.0] * 3)))
    truth = wavy(grid, amplitude_mm, wavelength_mm)
    return Volume(resample(moving, grid, truth), grid), moving, truth
