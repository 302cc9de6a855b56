"""Centre lines of the atlas's vessels, near which the deformable fit weighs the scans more.

A trunk has many times the volume of its branches: weighted by volume, a fit aligns the trunk. Along the centre line
each millimetre counts the same, whatever the calibre.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ..core.geometry import Grid
from ..core.image import Volume
from ..transforms.maps import Transform, slabs

#: Sigma of the Gaussian around a centre line, mm: about the error of a registration. At least a voxel of the grid.
_SIGMA_MM = 3.0
#: Beyond so many sigmas a voxel is not close.
_REACH = 4.0


class Centreline:
    """Centre lines as points, (N, 3) RAS+ mm in the atlas's world, a voxel of its labels apart."""

    def __init__(self, points_mm: NDArray[np.float64]) -> None:
        self._points = cKDTree(points_mm)

    def closeness(self, grid: Grid, fixed_to_moving: Transform) -> NDArray[np.float32]:
        """Compute how close each voxel of a grid in the fixed world is: 1 on the line, falling to 0 as a Gaussian."""
        sigma_mm = max(_SIGMA_MM, float(grid.spacing_mm.max()))
        closeness = np.empty(grid.shape, np.float32)
        for slab, points in slabs(grid):
            distance_mm, _ = self._points.query(fixed_to_moving.map(points), distance_upper_bound=_REACH * sigma_mm)
            closeness[slab] = np.exp(-0.5 * (distance_mm / sigma_mm) ** 2).reshape(closeness[slab].shape)
        return closeness


def find_centreline(labels: Volume, tubular: Collection[int]) -> Centreline | None:
    """Thin each of the ``tubular`` label values to its centre line; None if no voxel has one of them.

    Thinning deletes some straight tubes of an even width: those are weighted as organs are.
    """
    if not tubular:
        return None
    # Loaded here, as it takes a second, and few atlases have vessels.
    from skimage.morphology import skeletonize

    lines = []
    for value in sorted(tubular):
        voxels = np.argwhere(labels.data == value)
        if len(voxels):
            first = voxels.min(axis=0)
            inside = np.zeros(voxels.max(axis=0) - first + 1, bool)
            inside[tuple((voxels - first).T)] = True
            lines.append(np.argwhere(skeletonize(inside, method="lee")) + first)
    points = np.concatenate([np.empty((0, 3)), *lines])
    return Centreline(labels.grid.voxel_to_world(points)) if len(points) else None
