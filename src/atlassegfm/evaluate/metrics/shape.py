"""One structure of a label map, with its surfaces and centreline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.image import label_boxes
from .centreline import Cells, Skeleton, cell_size_mm, make_cells, make_skeleton
from .surface import Mask, Points, Spacing, surface_voxels, surfels


class Shape:
    """One structure of one label map, from :func:`label_shapes`.

    Surfaces and centreline are computed on first use and kept, so that one reference serves many results. The label
    map is not copied: it must not change. ``box`` is a part of it that holds the whole structure.
    """

    def __init__(self, labels: NDArray[Any], value: int, box: tuple[slice, ...], spacing_mm: Spacing) -> None:
        self.grid_shape: tuple[int, ...] = labels.shape
        self.spacing_mm = spacing_mm
        self._labels, self._value = labels, value
        self._first = tuple(along.start for along in box)
        self._stop = tuple(along.stop for along in box)

    @cached_property
    def voxels(self) -> int:
        """Number of voxels inside."""
        return int(np.count_nonzero(self._inside(self._first, self._stop)))

    @property
    def ml(self) -> float:
        """Volume, ml."""
        return self.voxels * math.prod(self.spacing_mm) / 1000

    @cached_property
    def surfels(self) -> tuple[Points, NDArray[np.float64]]:
        """Surface elements and the area of each, mm²."""
        return surfels(self._crop(), self._first, self.spacing_mm)

    @cached_property
    def surface_voxels(self) -> Points:
        """Centres of the voxels on the surface."""
        return surface_voxels(self._crop(), self._first, self.spacing_mm)

    @cached_property
    def skeleton(self) -> Skeleton:
        """The centreline."""
        crop = self._crop()
        cell_mm, note = cell_size_mm(crop.shape, self.spacing_mm)
        return make_skeleton(make_cells(crop, self._first, self.spacing_mm, cell_mm), cell_mm, note)

    def cells(self, cell_mm: float | None) -> Cells:
        """Mask in cells of another size; None for the voxels themselves."""
        return make_cells(self._crop(), self._first, self.spacing_mm, cell_mm)

    def common_voxels(self, other: Shape) -> int:
        """Count the voxels inside both structures, which lie on one grid."""
        first = tuple(map(max, self._first, other._first))
        stop = tuple(max(begin, min(ends)) for begin, *ends in zip(first, self._stop, other._stop, strict=True))
        return int(np.count_nonzero(self._inside(first, stop) & other._inside(first, stop)))

    def _inside(self, first: tuple[int, ...], stop: tuple[int, ...]) -> Mask:
        return np.asarray(self._labels[tuple(map(slice, first, stop))] == self._value)

    def _crop(self) -> Mask:
        """(I, J, K) the box in C order, which sorts the points made from it."""
        return np.ascontiguousarray(self._inside(self._first, self._stop))


def label_shapes(labels: NDArray[Any], values: Iterable[int], spacing_mm: Sequence[float]) -> dict[int, Shape]:
    """Find structures in a label map, (I, J, K) of an integer type, in one pass over the voxels.

    Other values than ``values`` are background; those that are missing get empty shapes. A ValueError if the array does
    not hold whole numbers on three axes, or the spacing is not three positive numbers.
    """
    if labels.ndim != 3:
        raise ValueError(f"a label map has three axes, not {labels.ndim}")
    if labels.dtype == bool:
        labels = labels.view(np.uint8)
    elif not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"label maps hold whole numbers, not {labels.dtype}")
    if len(spacing_mm) != 3 or not all(0 < step < math.inf for step in spacing_mm):
        raise ValueError(f"the spacing is three positive numbers of mm, not {spacing_mm}")
    spacing = float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])
    wanted = list(dict.fromkeys(values))
    boxes, nowhere = label_boxes(wanted, labels), (slice(0, 0),) * 3
    return {value: Shape(labels, value, boxes.get(value, nowhere), spacing) for value in wanted}
