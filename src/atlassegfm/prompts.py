"""Prompts for a segmentation model, made from the warped atlas mask of one structure.

The paper (arXiv 2512.18176) has three kinds: a click in the middle of the largest connected component, the bounding box
of its middle slice, and the mask itself. The fourth, "region", is the mask for models that take no prompt. Voxels are
those of the query in RAS-canonical array order, where the third axis runs from feet to head: slices are axial, or those
of the acquisition where they are thick (``Grid.slice_axis``).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .core.geometry import Grid
from .core.mask import LocalMap

Mask = np.ndarray[tuple[int, int, int], np.dtype[np.bool_]]
PromptKind = Literal["click", "box", "mask", "region"]
#: A voxel belongs to the structure from this probability on.
INSIDE = 0.5


@dataclass(frozen=True)
class UsedPrompt:
    """Prompt of one structure, in the array order the query is stored in.

    First and last voxel are those inside a box, mask or region, and both the voxel of a click; in mm their centres.
    """

    kind: PromptKind
    first_voxel: tuple[int, int, int]
    last_voxel: tuple[int, int, int]
    first_mm: tuple[float, float, float]
    last_mm: tuple[float, float, float]


@dataclass(frozen=True)
class ClickPrompt:
    """A voxel inside the structure."""

    ijk: tuple[int, int, int]
    slices: tuple[int, int] | None = None  # first one of the atlas's structure and one past its last, if known
    across: int = 2  # axis that these slices lie across


@dataclass(frozen=True)
class BoxPrompt:
    """A rectangle around the structure on one slice: voxels ``start`` <= (i, j, k) < ``stop``, one thick ``across``."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    slices: tuple[int, int] | None = None  # as of a click
    across: int = 2


@dataclass(frozen=True, eq=False)
class MaskPrompt:
    """The soft mask itself, on the query; ``tubular`` if it is a vessel, to be followed beyond it."""

    probability: LocalMap
    tubular: bool = False


@dataclass(frozen=True, eq=False)
class RegionPrompt:
    """Soft mask of the structure, on the query, for a model that finds all structures of its kind in the scan."""

    probability: LocalMap


Prompt = ClickPrompt | BoxPrompt | MaskPrompt | RegionPrompt


def make_prompt(kind: PromptKind, probability: LocalMap, across: int = 2, *, tubular: bool = False) -> Prompt | None:
    """Turn the warped mask of one structure, in [0, 1], into a prompt; None where no voxel reaches :data:`INSIDE`.

    ``across`` is the axis that slices lie across, of 0, 1 and 2; ``tubular`` as of a :class:`MaskPrompt`.
    """
    inside = probability.values >= INSIDE
    if not inside.any():
        return None
    if kind == "mask":
        return MaskPrompt(probability, tubular)
    if kind == "region":
        return RegionPrompt(probability)
    # Click and box point at one object: stray parts of a warped mask would drag both off it.
    largest = largest_component(inside)
    start = np.array(probability.start)
    slices = np.flatnonzero(largest.any(axis=tuple(np.delete((0, 1, 2), across))))
    reach = int(start[across] + slices[0]), int(start[across] + slices[-1]) + 1
    if kind == "click":
        return ClickPrompt(_ints(start + _middle(largest)), reach, across)
    # A component has no empty slice between its first and last one, so the middle one is never empty.
    middle = int(slices[0] + slices[-1]) // 2
    plane = np.argwhere(np.take(largest, [middle], across))
    low, high = plane.min(axis=0), plane.max(axis=0) + 1
    start[across] += middle
    return BoxPrompt(_ints(start + low), _ints(start + high), reach, across)


def largest_component(mask: Mask) -> Mask:
    """Find the largest component of a mask that is not empty; voxels are connected over faces, edges and corners."""
    components, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    largest: Mask = components == int(np.bincount(components.ravel())[1:].argmax()) + 1
    return largest


def inside_scan(probability: LocalMap, shape: tuple[int, int, int]) -> tuple[NDArray[np.int64], Mask]:
    """Find the voxels of a scan of this shape that a soft mask, which may reach out of it, prompts.

    Gives the first voxel (3,) of the box of the scan that the mask's own box overlaps, and on that box, (I, J, K) bool,
    whether the mask reaches :data:`INSIDE`; the box has no voxels where they do not overlap.
    """
    first = np.maximum(probability.start, 0).astype(np.int64)
    last = np.maximum(np.minimum(probability.stop, shape), first)
    inside: Mask = probability.on_box(first.tolist(), last.tolist()) >= INSIDE
    return first, inside


def crop_mask(
    start: NDArray[np.int64], mask: Mask, margin: NDArray[np.int64], shape: tuple[int, int, int]
) -> tuple[NDArray[np.int64], Mask]:
    """Crop or extend the box of a mask to ``margin`` voxels (3,) around it within a scan of this shape.

    Takes and returns the first voxel (3,) of the box, and the mask on it, which must not be empty.
    """
    voxels = np.argwhere(mask) + start
    first = np.maximum(voxels.min(axis=0) - margin, 0)
    last = np.minimum(voxels.max(axis=0) + 1 + margin, shape)
    crop: Mask = np.zeros(last - first, bool)
    crop[tuple((voxels - first).T)] = True
    return first, crop


def _middle(mask: Mask) -> NDArray[np.int64]:
    """(3,) the voxel of the mask next to its centroid: the centroid itself unless that lies outside."""
    voxels = np.argwhere(mask)
    nearest: NDArray[np.int64] = voxels[int(((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    return nearest


def used_prompt(prompt: Prompt, grid: Grid, stored: Grid) -> UsedPrompt:
    """Describe a prompt on the canonical ``grid`` in the array order the query is ``stored`` in."""
    kind: PromptKind
    if isinstance(prompt, ClickPrompt):
        kind, low, high = "click", np.array(prompt.ijk), np.array(prompt.ijk)
    elif isinstance(prompt, BoxPrompt):
        kind, low, high = "box", np.array(prompt.start), np.array(prompt.stop) - 1
    else:
        inside = np.argwhere(prompt.probability.values >= INSIDE) + prompt.probability.start
        kind, low, high = "mask", inside.min(axis=0), inside.max(axis=0)
    ends = np.rint(stored.world_to_voxel(grid.voxel_to_world(np.stack([low, high])))).astype(int)
    first, last = ends.min(axis=0), ends.max(axis=0)
    first_mm, last_mm = (_mm(stored.voxel_to_world(end)) for end in (first, last))
    return UsedPrompt(kind, _ints(first), _ints(last), first_mm, last_mm)


def _ints(voxel: NDArray[np.int64]) -> tuple[int, int, int]:
    i, j, k = (int(n) for n in voxel)
    return i, j, k


def _mm(point_mm: NDArray[np.float64]) -> tuple[float, float, float]:
    """Rounded to a hundredth of a mm, without -0."""
    x, y, z = (round(float(n), 2) + 0.0 for n in point_mm)
    return x, y, z
