"""Contours of masks on one slice, and masks of contours.

Contours are (N, 2) voxel indices (i, j), whole numbers at voxel centres. A voxel is inside if its centre is inside an
odd number of contours: a contour within another is a hole, and so is one joined to it by a channel of no width.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Border values keep this distance from the level 0.5: vertices stay a tenth of a voxel off centres, despite rounding.
_MARGIN = 0.05


def fill(contours: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Mark the voxels of a slice whose centres are inside an odd number of closed polygons, (N, 2).

    Polygons may reach beyond the slice. A centre exactly on an edge belongs to the side of larger i (larger j), so that
    exactly one of two structures that share an edge has it (:func:`skimage.draw.polygon` gives it to both).
    """
    nothing = np.zeros((0, 2))
    start = np.concatenate([nothing, *contours])
    stop = np.concatenate([nothing, *(np.roll(contour, -1, axis=0) for contour in contours)])
    # Rows of voxels j that each edge crosses: low <= j < high.
    low = np.ceil(np.minimum(start[:, 1], stop[:, 1])).astype(np.int64).clip(0, shape[1])
    high = np.ceil(np.maximum(start[:, 1], stop[:, 1])).astype(np.int64).clip(0, shape[1])
    count = high - low
    edge = np.repeat(np.arange(len(start)), count)
    row = np.arange(edge.size) - np.repeat(np.cumsum(count) - count, count) + low[edge]
    slope = (stop[edge, 0] - start[edge, 0]) / (stop[edge, 1] - start[edge, 1])
    at = start[edge, 0] + (row - start[edge, 1]) * slope
    crossings = np.zeros((shape[0] + 1, shape[1]), np.int32)
    np.add.at(crossings, (np.ceil(at).clip(0, shape[0]).astype(np.int64), row), 1)
    return np.asarray(np.cumsum(crossings[:-1], axis=0) % 2 == 1)


def trace(mask: NDArray[np.bool_], probability: NDArray[np.float32] | None = None) -> list[NDArray[np.float64]]:
    """Trace the outer borders and holes of a mask, (I, J); :func:`fill` restores it voxel for voxel.

    A probability in [0, 1] of the same shape places the contours between the voxels; without it they lie half way. The
    first vertex is not repeated at the end; vertices on straight lines are left out.
    """
    from skimage.measure import find_contours

    if probability is None:
        field = mask.astype(np.float64)
    else:
        inside = np.clip(probability, 0.5 + _MARGIN, 1.0)
        field = np.where(mask, inside, np.clip(probability, 0.0, 0.5 - _MARGIN)).astype(np.float64)
    # A border of outside voxels closes what reaches the edge of the slice.
    found = find_contours(np.pad(field, 1), 0.5, fully_connected="low")
    return [_without_straight(contour[:-1] - 1) for contour in found]


def _without_straight(contour: NDArray[np.float64]) -> NDArray[np.float64]:
    before, after = contour - np.roll(contour, 1, axis=0), np.roll(contour, -1, axis=0) - contour
    turn = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0])
    kept = contour[turn > 1e-9]
    return kept if len(kept) >= 3 else contour
