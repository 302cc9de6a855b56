"""Masks of one structure on a box of voxels, and distances to their border."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .compiled import in_slabs


@dataclass(frozen=True, eq=False, repr=False)
class LocalMap:
    """A scalar field on a box of a larger grid, zero everywhere else: a structure's probability costs little memory.

    ``start`` is the first voxel (i, j, k) of the box in the large grid; ``values``, (I, J, K), are in [0, 1] on it.
    """

    start: tuple[int, int, int]
    values: NDArray[np.float32]

    def __repr__(self) -> str:
        highest = float(self.values.max()) if self.values.size else 0.0
        return f"LocalMap({self.start} to {self.stop}, highest {highest:.2f})"

    @property
    def stop(self) -> tuple[int, int, int]:
        """One past the last voxel of the box, in the large grid."""
        i, j, k = (int(first + n) for first, n in zip(self.start, self.values.shape, strict=True))
        return i, j, k

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The box as slices into an array on the large grid."""
        i, j, k = (slice(first, last) for first, last in zip(self.start, self.stop, strict=True))
        return i, j, k

    @property
    def is_empty(self) -> bool:
        """Whether the field is zero everywhere."""
        return self.values.size == 0 or not bool(self.values.any())

    @classmethod
    def empty(cls) -> LocalMap:
        """Make the field that is zero everywhere."""
        return cls((0, 0, 0), np.zeros((0, 0, 0), np.float32))

    @classmethod
    def from_full(cls, values: NDArray[Any]) -> LocalMap:
        """Cut the box of the nonzero values out of a full array."""
        for box in ndimage.find_objects((values != 0).view(np.uint8)):
            return cls(tuple(side.start for side in box), np.ascontiguousarray(values[box], dtype=np.float32))
        return cls.empty()

    def to_full(self, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """Expand to the whole grid of the given shape."""
        return self.on_box((0, 0, 0), shape)

    def on_box(self, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.float32]:
        """(I, J, K) float32: the field on another box ``start`` <= ijk < ``stop`` of the large grid."""
        out = np.zeros([last - first for first, last in zip(start, stop, strict=True)], np.float32)
        first, last = np.maximum(self.start, start), np.minimum(self.stop, stop)
        if (last > first).all():
            to, of = (tuple(map(slice, first - origin, last - origin)) for origin in (start, self.start))
            out[to] = self.values[of]
        return out


def mean_of(maps: Sequence[LocalMap]) -> LocalMap:
    """Average maps; a single one is returned as it is."""
    if len(maps) == 1:
        return maps[0]
    start, stop = bounding_box(maps)
    total = np.zeros(np.subtract(stop, start), np.float32)
    for one in maps:
        total += one.on_box(start, stop)
    return LocalMap(start, total / np.float32(len(maps)))


def bounding_box(maps: Iterable[LocalMap]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First voxel and one past the last one of the box that holds all maps; of no voxels if all are empty."""
    filled = [one for one in maps if one.values.size] or [LocalMap.empty()]
    starts, stops = (np.array([getattr(one, end) for one in filled]) for end in ("start", "stop"))
    return tuple(starts.min(axis=0).tolist()), tuple(stops.max(axis=0).tolist())


def signed_distance_mm(
    mask: NDArray[np.bool_], spacing_mm: NDArray[np.float64], limit_mm: float | None = None
) -> NDArray[np.float32]:
    """Compute the distance of each voxel's centre to the border of a mask, which runs between voxels.

    ``spacing_mm`` is the distance between neighbouring voxels along each axis, taken to be at right angles. The border
    of the array is none of the mask's. Distances, float32 in mm, are above 0 inside; infinite where there is no border.
    With a limit they are clipped to it, which is faster the lower it is.
    """
    if mask.all() or not mask.any():
        return np.where(mask, np.float32(np.inf), np.float32(-np.inf))
    # Between centres; the border lies half a voxel before.
    half_mm = np.float32(spacing_mm.min() / 2)
    if limit_mm is not None:
        # Of centres that far apart, none is nearer to the border.
        between_mm = np.float32(limit_mm) + half_mm
        inward, outward = (_limited_distance_mm(mask, value, spacing_mm, between_mm) for value in (False, True))
        return np.asarray(np.where(mask, inward - half_mm, half_mm - outward), np.float32)
    inward = ndimage.distance_transform_edt(mask, spacing_mm).astype(np.float32)
    outward = ndimage.distance_transform_edt(~mask, spacing_mm).astype(np.float32)
    signed: NDArray[np.float32] = np.where(mask, inward - half_mm, half_mm - outward)
    return signed


def _limited_distance_mm(
    mask: NDArray[np.bool_], value: bool, spacing_mm: NDArray[np.float64], limit_mm: np.float32
) -> NDArray[np.float32]:
    """Distance of each voxel to the nearest one of ``value``, 0 to the limit."""
    from . import kernels

    steps, mask = tuple(spacing_mm.tolist()), np.ascontiguousarray(mask)
    planes, squares = np.empty(mask.shape, np.float32), np.empty(mask.shape, np.float32)
    in_planes, across = kernels.squared_distances_in_planes, kernels.squared_distances_across
    in_slabs(lambda *part: in_planes(mask, value, steps, limit_mm, planes, *part), mask.shape[0])
    in_slabs(lambda *part: across(planes, steps, limit_mm, squares, *part), mask.shape[1])
    return np.sqrt(squares, out=squares)


def ball_radius_mm(volume_mm3: float) -> float:
    """Radius in mm of the ball of a volume: how large a structure is, whatever its shape."""
    return float((volume_mm3 * 3 / (4 * math.pi)) ** (1 / 3))
