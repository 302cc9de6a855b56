"""Fraction of each structure outside the field of view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.geometry import Grid
from ..core.image import Volume
from ..transforms.maps import Affine

#: Voxels mapped at a time: bounds the memory of coordinates.
_CHUNK_VOXELS = 1_000_000


def outside_shares(labels: Volume, values: Sequence[int], query_to_atlas: Affine, view: Grid) -> dict[int, float]:
    """Share of each structure of the atlas that lies outside the query's field of view.

    Parameters
    ----------
    labels : Volume
        Of the atlas.
    values : sequence of int
        Label values wanted; each occurs in ``labels``.
    query_to_atlas : Affine
        The linear stages of the registration. The displacement field has nothing to go by out of view.
    view : Grid
        Of the query.

    Returns
    -------
    dict of int to float
        In [0, 1].
    """
    atlas_to_query = query_to_atlas.inverse()
    count = np.zeros(int(labels.data.max()) + 1, np.int64)
    seen = np.zeros_like(count)
    voxels = np.flatnonzero(labels.data)
    for first in range(0, len(voxels), _CHUNK_VOXELS):
        part = voxels[first : first + _CHUNK_VOXELS]
        found = labels.data.ravel()[part]
        ijk = np.stack(np.unravel_index(part, labels.grid.shape), axis=-1)
        inside = view.contains(atlas_to_query.map(labels.grid.voxel_to_world(ijk)))
        count += np.bincount(found, minlength=len(count))
        seen += np.bincount(found[inside], minlength=len(count))
    return {value: float(1 - seen[value] / count[value]) for value in values}
