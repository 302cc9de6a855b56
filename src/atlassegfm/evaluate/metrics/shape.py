"""One structure of a label map, with its surfaces and centreline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .centreline import Cells, Skeleton, cell_size_mm, make_cells, make_skeleton
from .surface import Mask, Points, Spacing, surface_voxels, surfels

#: Label values up to here are searched as they are; larger ones are renumbered first.
_LARGEST_SEARCHED = 1 << 16


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
        inside: Mask = self._labels[tuple(map(slice, first, stop))] == self._value
        return inside

    def _crop(self) -> Mask:
        """(I, J, K) the box in C order, which sorts the points made from it."""
        return np.ascontiguousarray(self._inside(self._first, self._stop))


def label_shapes(labels: NDArray[Any], values: Iterable[int], spacing_mm: Sequence[float]) -> dict[int, Shape]:
    """Find structures in a label map, (I, J, K) of an integer type, in one pass over the voxels.

    Other values than ``values`` are background; those that are missing get empty shapes.

    Raises
    ------
    ValueError
        If the array does not hold whole numbers on three axes, or the spacing is not three positive numbers.
    """
    if labels.ndim != 3:
        raise ValueError(f"a label map has three axes, not {labels.ndim}")
    if labels.dtype == bool:
        labels = labels.view(np.uint8)
    elif not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"label maps hold whole numbers, not {labels.dtype}")
    spacing = tuple(float(step) for step in spacing_mm)
    if len(spacing) != 3 or not all(0 < step < math.inf for step in spacing):
        raise ValueError(f"the spacing is three positive numbers of mm, not {spacing}")
    wanted = list(values)
    known = np.unique(np.array(wanted, np.int64))
    direct = not len(known) or (known[0] > 0 and known[-1] < _LARGEST_SEARCHED)
    # Search in the order of memory, which is several times faster.
    turned = labels.flags.f_contiguous and not labels.flags.c_contiguous
    searched = labels.T if turned else labels
    if not direct:
        searched = _renumbered(searched, known)
    boxes = ndimage.find_objects(searched, int(known[-1]) if direct and len(known) else max(len(known), 1))
    nowhere = (slice(0, 0),) * 3
    shapes = {}
    for value in wanted:
        box = boxes[value - 1 if direct else int(np.searchsorted(known, value))] or nowhere
        shapes[value] = Shape(labels, value, box[::-1] if turned else box, (spacing[0], spacing[1], spacing[2]))
    return shapes


def _renumbered(labels: NDArray[Any], known: NDArray[np.int64]) -> NDArray[Any]:
    """(I, J, K) place of each voxel's value in ``known``, from 1; 0 for other values."""
    numbers = np.zeros(labels.shape, np.min_scalar_type(len(known)))
    # Slice by slice, to bound the memory of 64-bit values.
    for slab, out in zip(labels, numbers, strict=True):
        wide = slab.astype(np.int64)
        place = np.searchsorted(known, wide).clip(max=len(known) - 1)
        np.copyto(out, place + 1, where=known[place] == wide, casting="unsafe")
    return numbers
