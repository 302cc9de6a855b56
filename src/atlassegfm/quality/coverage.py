"""Fraction of each structure outside the field of view."""

from __future__ import annotations

import numpy as np

from ..atlas import Atlas
from ..core.geometry import Grid
from ..transforms.maps import Affine

#: A structure counts as cut by the field of view from this fraction outside it on: less may be the fit's error.
CUT_FRACTION = 0.1
#: Voxels mapped at a time: bounds the memory of coordinates.
_CHUNK_VOXELS = 1_000_000


def outside_fractions(atlas: Atlas, query_to_atlas: Affine, view: Grid) -> tuple[float, ...]:
    """Compute the fraction of each structure of the atlas outside the grid ``view`` of the query, in [0, 1].

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
    return tuple((1 - seen[1:] / count[1:]).tolist())
