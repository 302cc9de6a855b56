"""Prompts for a segmentation model, made from the warped atlas mask of one structure.

Three kinds are those of the paper (arXiv 2512.18176): a click in the middle of the largest connected
component, the bounding box of its middle slice, or the mask itself. The fourth is the mask, too, for models that take
no prompt. Voxel indices are those of the query
in RAS-canonical array order, so that the third axis runs from feet to head and a slice is axial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .core.geometry import Grid
from .core.mask import LocalMap

#: "region" is for models that take no prompt.
PromptKind = Literal["click", "box", "mask", "region"]
#: A voxel belongs to the structure from this probability on.
INSIDE = 0.5


@dataclass(frozen=True)
class UsedPrompt:
    """Prompt of one structure, in the array order the query is stored in.

    Parameters
    ----------
    kind : {"click", "box", "mask", "region"}
        Click: both corners are the clicked voxel. Box, mask, region: the first and the last voxel inside.
    first_voxel, last_voxel : tuple of int, (3,)
    first_mm, last_mm : tuple of float, (3,)
        Centres of these voxels, RAS+ mm.
    """

    kind: PromptKind
    first_voxel: tuple[int, int, int]
    last_voxel: tuple[int, int, int]
    first_mm: tuple[float, float, float]
    last_mm: tuple[float, float, float]


@dataclass(frozen=True)
class ClickPrompt:
    """A voxel inside the structure.

    Parameters
    ----------
    ijk : tuple of int, (3,)
        Voxel of the query.
    slices : tuple of int, (2,), optional
        First axial slice of the structure and one past its last one, as the atlas has it; None if that is not known.
    """

    ijk: tuple[int, int, int]
    slices: tuple[int, int] | None = None


@dataclass(frozen=True)
class BoxPrompt:
    """A rectangle around the structure on one axial slice.

    Parameters
    ----------
    start, stop : tuple of int, (3,)
        Voxels ``start`` <= (i, j, k) < ``stop`` of the query; one voxel thick along k.
    slices : tuple of int, (2,), optional
        First axial slice of the structure and one past its last one, as the atlas has it; None if that is not known.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    slices: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class MaskPrompt:
    """The soft mask itself.

    Parameters
    ----------
    probability : LocalMap
        On the query.
    """

    probability: LocalMap


@dataclass(frozen=True, eq=False)
class RegionPrompt:
    """Where the structure is, for a model that takes no prompt and finds all of its kind in the scan.

    Parameters
    ----------
    probability : LocalMap
        On the query.
    """

    probability: LocalMap


Prompt = ClickPrompt | BoxPrompt | MaskPrompt | RegionPrompt


def make_prompt(kind: PromptKind, probability: LocalMap) -> Prompt | None:
    """Turn the warped mask of one structure into a prompt.

    Parameters
    ----------
    kind : {"click", "box", "mask", "region"}
        What the model is to be asked with.
    probability : LocalMap
        The warped mask, in [0, 1].

    Returns
    -------
    ClickPrompt, BoxPrompt, MaskPrompt, RegionPrompt or None
        None where no voxel reaches :data:`INSIDE`: there is nothing to point at.
    """
    inside = probability.values >= INSIDE
    if not inside.any():
        return None
    if kind == "mask":
        return MaskPrompt(probability)
    if kind == "region":
        return RegionPrompt(probability)
    # Click and box point at one object: stray parts of a warped mask would drag both off it.
    components, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel())[1:] if count else np.zeros(1)
    largest = components == int(sizes.argmax()) + 1
    start = np.array(probability.start)
    slices = np.flatnonzero(largest.any(axis=(0, 1)))
    reach = int(start[2] + slices[0]), int(start[2] + slices[-1]) + 1
    if kind == "click":
        i, j, k = (int(n) for n in start + _middle(largest))
        return ClickPrompt((i, j, k), reach)
    # A component has no empty slice between its first and last one, so the middle one is never empty.
    middle = int(slices[0] + slices[-1]) // 2
    plane = np.argwhere(largest[:, :, middle])
    low, high = plane.min(axis=0), plane.max(axis=0) + 1
    first = start + (low[0], low[1], middle)
    last = start + (high[0], high[1], middle + 1)
    return BoxPrompt(
        (int(first[0]), int(first[1]), int(first[2])),
        (int(last[0]), int(last[1]), int(last[2])),
        reach,
    )


def inside_scan(
    probability: LocalMap, shape: tuple[int, int, int]
) -> tuple[NDArray[np.int64], np.ndarray[tuple[int, int, int], np.dtype[np.bool_]]]:
    """The voxels of a scan that a soft mask prompts.

    Parameters
    ----------
    probability : LocalMap
        In [0, 1]; may reach out of the scan, or lie outside it.
    shape : tuple of int, (3,)
        Voxels of the scan.

    Returns
    -------
    array, (3,) int64
        First voxel of the box of the scan that the mask's own box overlaps.
    array, (I, J, K) bool
        On that box: True from :data:`INSIDE` on; of no voxels where they do not overlap.
    """
    first = np.maximum(probability.start, 0).astype(np.int64)
    last = np.maximum(np.minimum(probability.stop, shape), first)
    inside: np.ndarray[tuple[int, int, int], np.dtype[np.bool_]] = (
        probability.on_box(first.tolist(), last.tolist()) >= INSIDE
    )
    return first, inside


def _middle(mask: np.ndarray[tuple[int, int, int], np.dtype[np.bool_]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(3,) the voxel of the mask next to its centroid: the centroid itself unless that lies outside."""
    voxels = np.argwhere(mask)
    centroid = voxels.mean(axis=0)
    nearest: np.ndarray[tuple[int], np.dtype[np.int64]] = voxels[int(((voxels - centroid) ** 2).sum(axis=1).argmin())]
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
    return UsedPrompt(
        kind, _ints(first), _ints(last), _mm(stored.voxel_to_world(first)), _mm(stored.voxel_to_world(last))
    )


def _ints(voxel: NDArray[np.int64]) -> tuple[int, int, int]:
    i, j, k = (int(n) for n in voxel)
    return i, j, k


def _mm(point_mm: NDArray[np.float64]) -> tuple[float, float, float]:
    """Rounded to a hundredth of a mm, without -0."""
    x, y, z = (round(float(n), 2) + 0.0 for n in point_mm)
    return x, y, z
