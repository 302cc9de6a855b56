"""Inner loops of sampling through a transform, compiled by Numba; points are float64, in voxels.

A kernel computes its part from ``first`` to ``last`` of the points, or all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.compiled import compiled, inlined

Doubles = NDArray[np.float64]


@inlined
def _node(place: float, length: int) -> tuple[int, int, float]:
    """First node, the second, and the fraction between them; the nearest node beyond the border."""
    if not place > 0:
        return 0, 0, 0.0
    if place >= length - 1:
        return length - 1, length - 1, 0.0
    node = int(place)
    return node, node + 1, place - node


@inlined
def _voxel(to_voxel: Doubles, points_mm: Doubles, n: int) -> tuple[Any, Any, Any]:
    """Place of point n of (N, 3) in voxels, by an inverse affine (4, 4)."""
    x, y, z = points_mm[n, 0], points_mm[n, 1], points_mm[n, 2]
    return (
        to_voxel[0, 0] * x + to_voxel[0, 1] * y + to_voxel[0, 2] * z + to_voxel[0, 3],
        to_voxel[1, 0] * x + to_voxel[1, 1] * y + to_voxel[1, 2] * z + to_voxel[1, 3],
        to_voxel[2, 0] * x + to_voxel[2, 1] * y + to_voxel[2, 2] * z + to_voxel[2, 3],
    )


@inlined
def _cell(ijk: Any, shape: Any) -> tuple[Any, Any, Any]:
    """Nodes around a place and the fractions between them, axis by axis."""
    return _node(ijk[0], shape[0]), _node(ijk[1], shape[1]), _node(ijk[2], shape[2])


@inlined
def _linear(image: Any, cell: Any) -> Any:
    """Interpolate (I, J, K) in a cell."""
    (i, far_i, u), (j, far_j, v), (k, far_k, w) = cell
    near = (1 - v) * ((1 - w) * image[i, j, k] + w * image[i, j, far_k])
    near += v * ((1 - w) * image[i, far_j, k] + w * image[i, far_j, far_k])
    far = (1 - v) * ((1 - w) * image[far_i, j, k] + w * image[far_i, j, far_k])
    far += v * ((1 - w) * image[far_i, far_j, k] + w * image[far_i, far_j, far_k])
    return (1 - u) * near + u * far


@compiled
def displace(points_mm: Doubles, field: Any, to_voxel: Doubles, moved_mm: Doubles) -> None:
    """Add a displacement, (3, I, J, K) on a grid with the inverse affine ``to_voxel``, to (N, 3) points."""
    for n in range(len(points_mm)):
        cell = _cell(_voxel(to_voxel, points_mm, n), field.shape[1:])
        for axis in range(3):
            moved_mm[n, axis] = points_mm[n, axis] + _linear(field[axis], cell)


@compiled
def sample_linear(image: Any, points_mm: Doubles, to_voxel: Doubles, values: NDArray[np.float32]) -> None:
    """Interpolate an image at points, (N, 3), up to half a voxel beyond its outermost centres; others stay."""
    shape = image.shape
    for n in range(len(points_mm)):
        i, j, k = _voxel(to_voxel, points_mm, n)
        if -0.5 <= i <= shape[0] - 0.5 and -0.5 <= j <= shape[1] - 0.5 and -0.5 <= k <= shape[2] - 0.5:
            values[n] = _linear(image, _cell((i, j, k), shape))


@compiled
def label_weights(labels: Any, ijk: Doubles, floor: float, found: Any) -> int:
    """Interpolation weights of the labels around points, (N, 3), inside an array with a border of background.

    ``found`` are arrays for point, label and weight, of 8 N numbers each; how many were written, in order of the
    points. Background (0) and weights below ``floor`` are left out.
    """
    points, indices, weights = found
    count = 0
    for n in range(len(ijk)):
        i, j, k = int(ijk[n, 0]), int(ijk[n, 1]), int(ijk[n, 2])
        u, v, w = np.float32(ijk[n, 0] - i), np.float32(ijk[n, 1] - j), np.float32(ijk[n, 2] - k)
        begin = count
        for a in range(2):
            for b in range(2):
                for c in range(2):
                    label = labels[i + a, j + b, k + c]
                    if label == 0:
                        continue
                    one = np.float32(1)
                    weight = (u if a else one - u) * (v if b else one - v) * (w if c else one - w)
                    at = begin
                    while at < count and indices[at] != label:
                        at += 1
                    if at == count:
                        points[at], indices[at], weights[at] = n, label, 0
                        count += 1
                    weights[at] += weight
        kept = begin
        for at in range(begin, count):
            if weights[at] >= floor:
                points[kept], indices[kept], weights[kept] = points[at], indices[at], weights[at]
                kept += 1
        count = kept
    return count
