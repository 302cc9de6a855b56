"""Inner loops over boxes of voxels, compiled by Numba: distances, means over blocks, and back.

A kernel computes its part from ``first`` to ``last`` of one axis (:func:`.compiled.in_slabs`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled

Array = NDArray[np.float32]


@compiled
def squared_distances_in_planes(
    mask: Any, value: bool, spacing: Any, limit: Any, result: Array, first: int, last: int
) -> None:
    """Squared distance of each voxel to the nearest one of ``value`` in its plane, at most squared ``limit``.

    ``mask`` and ``result`` are (I, J, K), ``spacing`` that of the axes. Slabs are along I.
    """
    _, nj, nk = mask.shape
    most, step_j, step_k = limit * limit, np.float32(spacing[1]), np.float32(spacing[2])
    reach = min(nj - 1, int(limit / step_j))
    rows = np.empty((nj, nk), np.float32)
    for i in range(first, last):
        for j in range(nj):
            distance = limit
            for k in range(nk):
                distance = np.float32(0) if mask[i, j, k] == value else min(distance + step_k, limit)
                rows[j, k] = distance
            distance = limit
            for k in range(nk - 1, -1, -1):
                distance = np.float32(0) if mask[i, j, k] == value else min(distance + step_k, limit)
                rows[j, k] = min(rows[j, k], distance) ** 2
        for j in range(nj):
            for k in range(nk):
                result[i, j, k] = min(rows[j, k], most)
            for other in range(max(0, j - reach), min(nj, j + reach + 1)):
                away = (np.float32(other - j) * step_j) ** 2
                for k in range(nk):
                    result[i, j, k] = min(result[i, j, k], rows[other, k] + away)


@compiled
def squared_distances_across(planes: Array, spacing: Any, limit: Any, result: Array, first: int, last: int) -> None:
    """Squared distances in space from those in planes, (I, J, K), at most squared ``limit``. Slabs are along J."""
    ni, _, nk = planes.shape
    step = np.float32(spacing[0])
    reach = min(ni - 1, int(limit / step))
    for i in range(ni):
        for j in range(first, last):
            for k in range(nk):
                result[i, j, k] = planes[i, j, k]
            for other in range(max(0, i - reach), min(ni, i + reach + 1)):
                away = (np.float32(other - i) * step) ** 2
                for k in range(nk):
                    result[i, j, k] = min(result[i, j, k], planes[other, j, k] + away)


@compiled
def block_means(values: Any, strides: Any, result: Array, first: int, last: int) -> None:
    """Means of (I, J, K) over blocks of ``strides`` voxels; the last of an axis may be smaller. Slabs along I."""
    ni, nj, nk = values.shape
    si, sj, sk = strides
    for a in range(first, last):
        for b in range(result.shape[1]):
            result[a, b, :] = 0
            for i in range(a * si, min(a * si + si, ni)):
                for j in range(b * sj, min(b * sj + sj, nj)):
                    for k in range(nk):
                        result[a, b, k // sk] += np.float32(values[i, j, k])
            plane = (min(a * si + si, ni) - a * si) * (min(b * sj + sj, nj) - b * sj)
            for c in range(result.shape[2]):
                result[a, b, c] /= np.float32(plane * (min(c * sk + sk, nk) - c * sk))


@compiled
def interpolate_blocks(values: Array, tables: Any, result: Array, first: int, last: int) -> None:
    """Interpolate (A, B, C) at (I, J, K) voxels; ``tables`` are two nodes and a fraction for each. Slabs along I."""
    (low_i, high_i, part_i), (low_j, high_j, part_j), (low_k, high_k, part_k) = tables
    one = np.float32(1)
    row = np.empty(values.shape[2], np.float32)
    for i in range(first, last):
        a, b, u = low_i[i], high_i[i], part_i[i]
        for j in range(len(low_j)):
            c, d, v = low_j[j], high_j[j], part_j[j]
            p, q, r, s = (one - u) * (one - v), (one - u) * v, u * (one - v), u * v
            for k in range(len(row)):
                row[k] = p * values[a, c, k] + q * values[a, d, k] + r * values[b, c, k] + s * values[b, d, k]
            for k in range(len(low_k)):
                result[i, j, k] = row[low_k[k]] + part_k[k] * (row[high_k[k]] - row[low_k[k]])
