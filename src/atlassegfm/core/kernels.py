"""Inner loops over boxes of voxels, compiled by Numba: distances, smoothing, means over blocks and back, warped masks.

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


@compiled
def smooth(values: Array, weights: Any, sources: Any, result: Array, first: int, last: int) -> None:
    """Correlate (I, J, K) with symmetric weights along each axis. Slabs along I.

    Of each axis ``weights`` are those at 0, 1 and so on, ``sources`` the voxel to read at each place of the axis with
    its margins. All axes are done plane by plane, in the processor's cache.
    """
    (wi, wj, wk), (si, sj, sk) = weights, sources
    ri, rj, rk = len(wi) - 1, len(wj) - 1, len(wk) - 1
    nj, nk = result.shape[1:]
    # In double precision: differences of smoothed squares would drown in rounding.
    plane, row, line = np.empty((nj, nk)), np.empty(nk), np.empty(nk + 2 * rk)
    for i in range(first, last):
        for j in range(nj):
            own, along = plane[j], values[i, j]
            for k in range(nk):
                own[k] = wi[0] * along[k]
            for r in range(1, ri + 1):
                low, high, weight = values[si[i + ri - r], j], values[si[i + ri + r], j], wi[r]
                for k in range(nk):
                    own[k] += weight * (np.float64(low[k]) + high[k])
        for j in range(nj):
            along = plane[j]
            for k in range(nk):
                row[k] = wj[0] * along[k]
            for r in range(1, rj + 1):
                low, high, weight = plane[sj[j + rj - r]], plane[sj[j + rj + r]], wj[r]
                for k in range(nk):
                    row[k] += weight * (low[k] + high[k])
            for k in range(len(line)):
                line[k] = row[sk[k]]
            for k in range(nk):
                row[k] = wk[0] * line[k + rk]
            for r in range(1, rk + 1):
                low, high, weight = line[rk - r : rk - r + nk], line[rk + r : rk + r + nk], wk[r]
                for k in range(nk):
                    row[k] += weight * (low[k] + high[k])
            for k in range(nk):
                result[i, j, k] = row[k]


@compiled
def displace_mask(mask: Any, displacement: Array, tables: Any, result: Array, first: int, last: int) -> None:
    """Interpolate (I, J, K) uint8, 0 or 1 with a border of 0, at displaced voxels of another box. Slabs along I.

    ``displacement``, (3, A, B, C) in voxels, is interpolated from its nodes; ``tables`` are, for each voxel along an
    axis of the result, two nodes, the fraction between them, and the voxel's own place in the mask.
    """
    (low_i, high_i, part_i, at_i), (low_j, high_j, part_j, at_j), (low_k, high_k, part_k, at_k) = tables
    one, nodes = np.float32(1), displacement.shape[3]
    end_i, end_j, end_k = mask.shape[0] - 1, mask.shape[1] - 1, mask.shape[2] - 1
    row = np.empty((3, nodes), np.float32)
    for i in range(first, last):
        a, b, u = low_i[i], high_i[i], part_i[i]
        for j in range(len(low_j)):
            c, d, v = low_j[j], high_j[j], part_j[j]
            p, q, r, s = (one - u) * (one - v), (one - u) * v, u * (one - v), u * v
            for axis in range(3):
                near = displacement[axis]
                for k in range(nodes):
                    row[axis, k] = p * near[a, c, k] + q * near[a, d, k] + r * near[b, c, k] + s * near[b, d, k]
            for k in range(len(low_k)):
                e, f, w = low_k[k], high_k[k], part_k[k]
                x = at_i[i] + row[0, e] + w * (row[0, f] - row[0, e])
                y = at_j[j] + row[1, e] + w * (row[1, f] - row[1, e])
                z = at_k[k] + row[2, e] + w * (row[2, f] - row[2, e])
                if not (0 < x < end_i and 0 < y < end_j and 0 < z < end_k):
                    result[i, j, k] = 0
                    continue
                a0, b0, c0 = int(x), int(y), int(z)
                x, y, z = x - np.float32(a0), y - np.float32(b0), z - np.float32(c0)
                value = np.float32(0)
                for far_i in range(2):
                    for far_j in range(2):
                        weight = (x if far_i else one - x) * (y if far_j else one - y)
                        value += weight * (one - z) * mask[a0 + far_i, b0 + far_j, c0]
                        value += weight * z * mask[a0 + far_i, b0 + far_j, c0 + 1]
                result[i, j, k] = value


@compiled
def look_up(grid: Any, tables: Any, near: Any, bins: Array, begins: Any, result: Array, first: int, last: int) -> None:
    """Interpolate a grid of place and intensity, (A, B, C, D), at the voxels of ``near``, (I, J, K), in their order.

    ``tables`` are, for each voxel along an axis, two cells and the fraction between them, ``bins`` the fractional place
    of each of the N voxels along the last axis of the grid; ``begins`` counts those before each plane. Slabs along I.
    """
    (low_i, high_i, part_i), (low_j, high_j, part_j), (low_k, high_k, part_k) = tables
    top = grid.shape[3] - 1
    for i in range(first, last):
        n = begins[i]
        for j in range(near.shape[1]):
            for k in range(near.shape[2]):
                if not near[i, j, k]:
                    continue
                below = min(int(bins[n]), top)
                above, part, value = min(below + 1, top), bins[n] - below, np.float32(0)
                for far_i in range(2):
                    a, u = (high_i[i], part_i[i]) if far_i else (low_i[i], 1 - part_i[i])
                    for far_j in range(2):
                        b, v = (high_j[j], u * part_j[j]) if far_j else (low_j[j], u * (1 - part_j[j]))
                        for far_k in range(2):
                            c, w = (high_k[k], v * part_k[k]) if far_k else (low_k[k], v * (1 - part_k[k]))
                            cell = grid[a, b, c]
                            value += w * (cell[below] + part * (cell[above] - cell[below]))
                result[n] = value
                n += 1
