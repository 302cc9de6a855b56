"""How many parts a structure has, and whether it is solid: taken from the atlas, wanted of results.

A model that goes by appearance leaves islands: bright voxels of the stomach beside the spleen. Where the atlas's
structure is one part, so is the query's. With 8 pairs each of abdominal MR, abdominal CT and heart, leaving them out
takes the mean HD95 of the built-in model's answers from 19.4 to 18.3, 31.7 to 30.9 and 19.5 to 19.3 mm and NSD at 2 mm
from 0.740 to 0.743, 0.716 to 0.719 and 0.709 to 0.711; Dice gains 0.001. Filling holes changes none of them by more
than 0.0001.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Voxels that share a corner belong together: thin structures on thick slices often touch only so.
_TOUCHING = np.ones((3, 3, 3), bool)


#: A part of the atlas's structure counts from this share of it on: less is a slip of the pen.
_LEAST_SHARE = 0.05


#: A part of the result beyond the number wanted stays if it is larger than this share of the smallest one wanted: a
#: structure may be torn by a thin gap. 0, 0.1 and 0.3 measured the same.
_LARGE_SHARE = 0.3


@dataclass(frozen=True)
class Topology:
    """Of one structure.

    Parameters
    ----------
    parts : int
        Connected parts, at least 1.
    is_solid : bool
        Whether it encloses no background.
    """

    parts: int
    is_solid: bool


def topologies_of(labels: NDArray[Any]) -> dict[int, Topology]:
    """Topology of each structure of a label map.

    Parameters
    ----------
    labels : array, (I, J, K) of a small integer type
        Numbers of the structures, 0 for background.

    Returns
    -------
    dict of int to Topology
        By number, of those that occur.
    """
    found = {}
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        mask = labels[box] == number
        sizes = np.bincount(ndimage.label(mask, _TOUCHING)[0].ravel())[1:]
        parts = int((sizes >= _LEAST_SHARE * sizes.sum()).sum())
        found[number] = Topology(max(parts, 1), not _holes(mask, labels[box] == 0).any())
    return found


@dataclass(frozen=True, eq=False)
class Changes:
    """What has to change in one structure, as masks on a box of the label map.

    Parameters
    ----------
    box : tuple of slice, (3,)
    islands, holes : array, bool
        Voxels of it that it loses; voxels of background that it gains.
    """

    box: tuple[slice, slice, slice]
    islands: NDArray[np.bool_]
    holes: NDArray[np.bool_]


def changes_to(labels: NDArray[Any], wanted: Mapping[int, Topology]) -> dict[int, Changes]:
    """What has to change in a label map for each structure to have the topology wanted.

    Parameters
    ----------
    labels : array, (I, J, K) of a small integer type
        Numbers of the structures, 0 for background.
    wanted : mapping of int to Topology
        By number; structures that are not in it stay as they are.

    Returns
    -------
    dict of int to Changes
        By number, of those that have to change.
    """
    changes = {}
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or number not in wanted:
            continue
        mask = labels[box] == number
        islands = _islands(mask, wanted[number].parts)
        kept = mask & ~islands
        holes = _holes(kept, labels[box] == 0) if wanted[number].is_solid else np.zeros(mask.shape, bool)
        if islands.any() or holes.any():
            changes[number] = Changes(box, islands, holes)
    return changes


def _islands(mask: NDArray[np.bool_], parts: int) -> NDArray[np.bool_]:
    """Voxels of the parts beyond the largest ``parts``."""
    part_of, count = ndimage.label(mask, _TOUCHING)
    if count <= parts:
        return np.zeros(mask.shape, bool)
    sizes = np.bincount(part_of.ravel())
    sizes[0] = 0
    # Of equal parts the first in array order is kept.
    by_size = np.argsort(-sizes, kind="stable")
    small = sizes <= _LARGE_SHARE * sizes[by_size[parts - 1]]
    small[0] = False
    islands: NDArray[np.bool_] = small[part_of]
    return islands


def _holes(mask: NDArray[np.bool_], background: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Background enclosed by the mask alone; what a mask and its neighbour enclose together is no hole of either."""
    holes: NDArray[np.bool_] = ndimage.binary_fill_holes(mask) & ~mask
    if not holes.any():
        return holes
    # A hole that holds another structure is its place, and what little of background is left in there its margin.
    part_of, _ = ndimage.label(holes)
    shared = np.unique(part_of[holes & ~background])
    return holes & ~np.isin(part_of, shared)
