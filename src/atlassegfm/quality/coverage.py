"""Fraction of each structure outside the field of view."""

from __future__ import annotations

import numpy as np

from ..atlas import Atlas
from ..core.geometry import Grid
from ..transforms.maps import Affine

#: Fraction of a structure out of view from which on it counts as cut, and as outside: below the one, the error of a
#: linear fit; above the other, registration errors of a few mm decide whether any of it is in view.
CUT_FRACTION, OUTSIDE_FRACTION = 0.05, 0.9
#: Voxels mapped at a time: bounds the memory of coordinates.
_CHUNK_VOXELS = 1_000_000


def outside_fractions(atlas: Atlas, query_to_atlas: Affine, view: Grid) -> tuple[float, ...]:
    """Compute the fraction of each structure of the atlas outside the grid ``view`` of the query, in [0, 1].

    It is 1 of a structure that has no voxel.

    ``query_to_atlas`` is from the linear stages of the registration: out of view nothing guides a displacement field.
    """
    atlas_to_query, labels = query_to_atlas.inverse(), atlas.numbered
    count = np.zeros(len(atlas.structures) + 1, np.int64)
    seen = np.zeros_like(count)
    voxels = np.flatnonzero(labels.data)
    for first in range(0, len(voxels), _CHUNK_VOXELS):
        part = voxels[first : first + _CHUNK_VOXELS]
        found = labels.data.ravel()[part]
        ijk = np.stack(np.unravel_index(part, labels.grid.shape), axis=-1)
        inside = view.contains(atlas_to_query.map(labels.grid.voxel_to_world(ijk)))
        count += np.bincount(found, minlength=len(count))
        seen += np.bincount(found[inside], minlength=len(count))
    return tuple((1 - seen[1:] / np.maximum(count[1:], 1)).tolist())


def cut_remark(outside: float) -> str:
    """Say that the field of view cuts a structure, from its fraction out of view; empty where it does not."""
    if outside < CUT_FRACTION:
        return ""
    return f"{100 * outside:.0f} % of it is outside the scan; the volume is of the part in view"
