"""What can be done to the labels of a case, as functions on arrays of structure numbers; 0 is background."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.mask import signed_distance_mm
from .clicks import Mask, Patch

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Change:
    """Structure numbers on a box before and after an edit, compressed."""

    start: tuple[int, int, int]
    shape: tuple[int, int, int]
    before: bytes
    after: bytes

    @classmethod
    def between(cls, start: Sequence[int], before: Numbers, after: Numbers) -> Change | None:
        """Compare two arrays on a box from voxel ``start`` on, and keep the part that differs; None if none does."""
        box = _box_of(before != after)
        if box is None:
            return None
        i, j, k = (int(first + side.start) for first, side in zip(start, box, strict=True))
        shape = tuple(side.stop - side.start for side in box)
        return cls((i, j, k), shape, pack(before[box]), pack(after[box]))

    @property
    def reversed(self) -> Change:
        """The way back."""
        return Change(self.start, self.shape, self.after, self.before)

    def apply(self, numbers: Numbers) -> None:
        """Put the numbers after the edit into an array of the whole scan."""
        box = tuple(slice(first, first + n) for first, n in zip(self.start, self.shape, strict=True))
        numbers[box] = unpack(self.after, self.shape, numbers.dtype)


def _box_of(mask: Mask) -> tuple[slice, ...] | None:
    """Bounding box of a mask; None if it is empty."""
    # find_objects is fast with the axis that lies closest in memory last.
    turn = -1 if mask.flags.f_contiguous else 1
    boxes = ndimage.find_objects((mask.T if turn == -1 else mask).view(np.uint8))
    return boxes[0][::turn] if boxes else None


def pack(numbers: Numbers) -> bytes:
    """Compress an array, the first axis fastest, little-endian."""
    return zlib.compress(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes(order="F"), 1)


def unpack(content: bytes, shape: Sequence[int], kind: np.dtype[Any]) -> Numbers:
    """Decompress what :func:`pack` made, and no more than the shape says; ValueError if it is something else."""
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(content, size + 1)
    except zlib.error as error:
        raise ValueError(f"not compressed as expected ({error})") from None
    if len(raw) != size or reader.unconsumed_tail:
        raise ValueError(f"{len(raw)} bytes where {size} are expected")
    return np.frombuffer(raw, kind.newbyteorder("<")).reshape(shape, order="F").astype(kind, copy=False)


@dataclass(frozen=True)
class Rules:
    """Which voxels of others an edit of one structure may take."""

    locked: frozenset[int]  # accepted structures: nothing takes their voxels
    overwrite: bool = False  # whether it takes voxels of structures that are not locked


def repaint(numbers: Numbers, number: int, patch: Patch, rules: Rules) -> tuple[Change | None, dict[int, int]]:
    """Give a structure a new mask on a box; it is not written into the numbers.

    Gives the change, and how many voxels each other structure kept (above 0) or lost (below 0).
    """
    box = tuple(slice(first, first + n) for first, n in zip(patch.start, patch.mask.shape, strict=True))
    before = numbers[box]
    own = before == number
    wanted = patch.mask & ~own
    takes = before == 0
    if rules.overwrite:
        takes |= ~np.isin(before, [*rules.locked])
    after = np.where(own & ~patch.mask, 0, before).astype(numbers.dtype)
    after[wanted & takes] = number
    kept = np.bincount(before[wanted & ~takes].ravel())
    lost = np.bincount(before[wanted & takes].ravel())
    others = {int(n): int(kept[n]) for n in np.flatnonzero(kept)}
    others |= {int(n): -int(lost[n]) for n in np.flatnonzero(lost) if n}
    return Change.between(patch.start, before, after), others


def exchange(numbers: Numbers, table: dict[int, int]) -> Change | None:
    """Replace structure numbers by others, wherever they are."""
    known = np.arange(max(int(numbers.max()), *table, *table.values()) + 1).astype(numbers.dtype)
    for one, other in table.items():
        known[one] = other
    return Change.between((0, 0, 0), numbers, known[numbers])


def fill(mask: Mask, axis: int | None, index: int = 0) -> Patch:
    """Fill the holes of a mask on one slice across an axis, or in 3-D."""
    if axis is None:
        return Patch((0, 0, 0), ndimage.binary_fill_holes(mask))
    start = [0, 0, 0]
    start[axis] = index
    plane = ndimage.binary_fill_holes(np.take(mask, index, axis))
    return Patch((start[0], start[1], start[2]), np.expand_dims(plane, axis))


def interpolate(mask: Mask, axis: int, spacing_mm: NDArray[np.float64], drawn: Sequence[int] = ()) -> Patch | None:
    """Fill the slices between drawn ones by interpolating signed distances, moved along between their centroids.

    Without two ``drawn`` slices that have the structure, these are all that have it. None if nothing lies between.
    """
    across = np.moveaxis(mask, axis, 0)
    having = np.flatnonzero(across.any(axis=(1, 2))).tolist()
    known = [n for n in sorted(set(drawn)) if n in having]
    known = known if len(known) > 1 else having
    if len(known) < 2 or known[-1] - known[0] < len(known):
        return None
    spacing = np.delete(spacing_mm, axis)
    new = across[known[0] : known[-1] + 1].copy()
    for one, other in pairwise(known):
        if other - one < 2:
            continue
        distances = [signed_distance_mm(across[n], spacing) for n in (one, other)]
        distances = [np.nan_to_num(field, posinf=1e3, neginf=-1e3) for field in distances]
        centres = [np.array(ndimage.center_of_mass(across[n])) for n in (one, other)]
        for n in range(one + 1, other):
            part = (n - one) / (other - one)
            centre = (1 - part) * centres[0] + part * centres[1]
            moved = [
                ndimage.shift(field, centre - own, order=1, mode="nearest")
                for field, own in zip(distances, centres, strict=True)
            ]
            new[n - known[0]] = (1 - part) * moved[0] + part * moved[1] > 0
    start = [0, 0, 0]
    start[axis] = known[0]
    return Patch((start[0], start[1], start[2]), np.moveaxis(new, 0, axis))


def farthest_disagreement(one: Mask, other: Mask, spacing_mm: NDArray[np.float64]) -> tuple[int, int, int] | None:
    """Find the voxel deepest inside the difference of two masks; None if they are equal."""
    box = _box_of(one != other)
    if box is None:
        return None
    part = np.pad(one[box] != other[box], 1)
    deepest = np.unravel_index(int(ndimage.distance_transform_edt(part, spacing_mm).argmax()), part.shape)
    i, j, k = (int(n - 1 + side.start) for n, side in zip(deepest, box, strict=True))
    return i, j, k
