"""Surfaces of masks on the voxel lattice, and distances between them.

The surface is that of google-deepmind/surface-distance, the reference for the normalized surface Dice (arXiv
1809.04430): surface elements ("surfels") sit on corners of voxels whose 2 x 2 x 2 neighbours are neither all inside
nor all outside; beyond the image is outside; corner n lies before voxel n. The area of a surfel is that of the
marching-cubes triangles between those eight voxels.

Distances go from point to nearest point, by a k-d tree near a surface; far from it, where very many points are about
equally far, by a distance transform.
"""

import time
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
#: Percentage of the surface within the robust Hausdorff distance.
PERCENT = 95
#: Relative rounding of 32-bit spacings in headers: three voxels of 0.8 mm are 2.4000000358 mm, yet within 2.4 mm.
_SINGLE_PRECISION = 1e-6
#: Points searched for first, to time the tree.
_SAMPLE = 256
#: Searches expected to end within this time are left to the tree, s.
_PATIENCE_S = 2.0
#: Distance transform: seconds for each point of its box, and the most points (13 bytes each).
_TRANSFORM_S, _LARGEST_TRANSFORM = 1.6e-7, 1 << 27


@dataclass(frozen=True, eq=False)
class Points:
    """Points on a lattice: corners of voxels or their centres."""

    index: NDArray[np.int32]  # (N, 3) on the lattice of the whole image, in C order
    spacing_mm: Spacing

    @cached_property
    def tree(self) -> Any:
        """k-d tree of the points, in mm."""
        # Tight nodes are slower where surfaces are far apart.
        return cKDTree(self.index * np.array(self.spacing_mm), balanced_tree=False, compact_nodes=False)


def distances_mm(start: Points, end: Points, *, workers: int = -1) -> NDArray[np.float64]:
    """Compute the distance from each point of ``start`` to the nearest point of ``end``, (N,).

    Both are on one lattice, neither empty; ``workers`` are threads of the search, -1 for all cores.
    """
    low = np.minimum(start.index.min(axis=0), end.index.min(axis=0))
    size = np.maximum(start.index.max(axis=0), end.index.max(axis=0)) - low + 1
    one, other = (np.ravel_multi_index(tuple((points.index - low).T), tuple(size)) for points in (start, end))
    # Both ascend, as points are in C order. Points common to both surfaces, often most of them, need no search.
    place = np.searchsorted(other, one).clip(max=len(other) - 1)
    apart = np.flatnonzero(other[place] != one)
    found = np.zeros(len(one))
    if len(apart):
        index = start.index[apart]
        # From whole steps along each axis, free of the tree's rounding.
        steps = (index - _nearest(index, end, low, size, workers)) * np.array(start.spacing_mm)
        found[apart] = np.sqrt((steps**2).sum(axis=1))
    return found


def _nearest(
    index: NDArray[np.int32], end: Points, low: NDArray[np.int32], size: NDArray[np.int32], workers: int
) -> NDArray[np.int32]:
    """(N, 3) point of ``end`` nearest to each lattice point ``index``, (N, 3); all lie in the box from ``low`` on."""
    spacing = np.array(end.spacing_mm)
    sample = index[:: -(-len(index) // _SAMPLE)] * spacing
    tree = end.tree
    begun = time.perf_counter()
    tree.query(sample, workers=workers)
    expected_s = (time.perf_counter() - begun) * len(index) / len(sample)
    count = int(np.prod(size, dtype=np.int64))
    if count > _LARGEST_TRANSFORM or expected_s <= max(_PATIENCE_S, count * _TRANSFORM_S):
        return np.asarray(end.index[tree.query(index * spacing, workers=workers)[1]])
    off = np.ones(tuple(size), bool)
    off[tuple((end.index - low).T)] = False
    found = ndimage.distance_transform_edt(off, end.spacing_mm, return_distances=False, return_indices=True)
    return np.asarray(found[(slice(None), *(index - low).T)].T + low)


def surfels(inside: Mask, first: tuple[int, ...], spacing_mm: Spacing) -> tuple[Points, NDArray[np.float64]]:
    """Compute the surface elements of a mask, cropped from voxel ``first`` of the image on, and their areas, mm²."""
    # Bit 4 di + 2 dj + dk of a corner's code is its voxel (di, dj, dk), gathered one axis after another.
    code = np.pad(inside, 1).view(np.uint8)
    code = code[:, :, :-1] | (code[:, :, 1:] << np.uint8(1))
    code = code[:, :-1] | (code[:, 1:] << np.uint8(2))
    code = code[:-1] | (code[1:] << np.uint8(4))
    # Neither 0 nor 255: 8 bits wrap around, so that 0 becomes the largest.
    corners = np.flatnonzero(code - np.uint8(1) < np.uint8(254))
    return _points(corners, code.shape, first, spacing_mm), surfel_areas_mm2(spacing_mm)[code.ravel()[corners]]


def surface_voxels(inside: Mask, first: tuple[int, ...], spacing_mm: Spacing) -> Points:
    """Find the centres of voxels with a face to the outside or to the image's border; arguments as of surfels()."""
    border = np.flatnonzero(inside & ~ndimage.binary_erosion(inside))
    return _points(border, inside.shape, first, spacing_mm)


def surfel_areas_mm2(spacing_mm: Spacing) -> NDArray[np.float64]:
    """Compute the area of the surface in each of the 256 neighbourhoods of a corner, (256,)."""
    i, j, k = spacing_mm
    across = np.array((j * k, i * k, i * j))
    return np.asarray(np.linalg.norm(_normals() * across, axis=2).sum(axis=1))


@cache
def _normals() -> NDArray[np.float64]:
    """(256, T, 3) normals of the triangles of each code for cubic voxels, as long as the area; padded with 0."""
    from skimage.measure import marching_cubes

    normals = {}
    for code in range(1, 255):
        cube = np.unpackbits(np.array([code], np.uint8), bitorder="little").reshape(2, 2, 2)
        # Of two surfaces for an ambiguous code, surface-distance takes the one around the fewer voxels.
        if cube.sum() > 4:
            cube = 1 - cube
        vertices, faces, *_ = marching_cubes(cube.astype(np.float32), 0.5, method="lorensen")
        corners = vertices[faces].astype(float)
        normals[code] = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2
    table = np.zeros((256, max(map(len, normals.values())), 3))
    for code, found in normals.items():
        table[code, : len(found)] = found
    return table


def area_within(distance_mm: NDArray[np.float64], area_mm2: NDArray[np.float64], tolerance_mm: float) -> float:
    """Compute the area of the surfels within the tolerance (up to the precision of a 32-bit spacing), mm²."""
    return float(area_mm2[distance_mm <= tolerance_mm * (1 + _SINGLE_PRECISION)].sum())


def robust_distance_mm(distance_mm: NDArray[np.float64], area_mm2: NDArray[np.float64]) -> float:
    """Compute the least distance that covers :data:`PERCENT` of the area of the surfels, mm."""
    # Rounding decides where exactly this area is reached: order and sums are those of surface-distance.
    order = np.lexsort((area_mm2, distance_mm))
    areas = area_mm2[order]
    place = min(int(np.searchsorted(np.cumsum(areas) / areas.sum(), PERCENT / 100)), len(order) - 1)
    return float(distance_mm[order[place]])


def _points(flat: NDArray[np.intp], shape: tuple[int, ...], first: tuple[int, ...], spacing_mm: Spacing) -> Points:
    return Points((np.stack(np.unravel_index(flat, shape), axis=1) + first).astype(np.int32), spacing_mm)
