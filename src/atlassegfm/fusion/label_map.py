"""Label map of fused structures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.image import smallest_label_type
from ..core.mask import LocalMap, bounding_box
from ..prompts import INSIDE

#: Weight of the warped atlas where several structures are found at one voxel.
_WARPED_WEIGHT = 0.5


def label_map(
    probabilities: Mapping[int, LocalMap],
    shape: tuple[int, int, int],
    warped: Mapping[int, LocalMap] | None = None,
) -> NDArray[Any]:
    """Find the most probable structure at each voxel, background among them.

    Background has what the structures leave of 1, at least 0. Ties between structures go to the smaller label value,
    ties with background to the structure (:data:`.prompts.INSIDE`). The model is asked for each structure alone, so
    that where several are found, their probabilities say little: where a structure has at least 1/2, half of its
    ``warped`` mask is added before structures are compared with each other.

    Masks are in [0, 1] on a grid of ``shape``, by label value from 1 on. The result, (I, J, K), has the smallest
    unsigned integer type that holds these. ValueError if a value is less than 1 or a box does not lie in the grid.
    """
    values = sorted(probabilities)
    if values and values[0] < 1:
        raise ValueError(f"label value {values[0]}; expected 1 or greater")
    labels = np.zeros(shape, smallest_label_type(max(values, default=0)))
    maps = {value: probabilities[value] for value in values if probabilities[value].values.size}
    for value, local in maps.items():
        if min(local.start) < 0 or any(last > n for last, n in zip(local.stop, shape, strict=True)):
            raise ValueError(f"the box {local.start} to {local.stop} of label {value} is not inside {shape}")
    start, stop = bounding_box(maps.values())  # most of a large scan has none
    found = labels[tuple(map(slice, start, stop))]
    best, background = np.zeros(found.shape, np.float32), np.ones(found.shape, np.float32)
    for value, local in maps.items():
        box = tuple(map(slice, np.subtract(local.start, start), np.subtract(local.stop, start)))
        score = local.values
        if warped is not None and value in warped:
            weight = (score >= INSIDE).astype(np.float32) * np.float32(_WARPED_WEIGHT)
            score = score + weight * warped[value].on_box(local.start, local.stop)
        better = score > best[box]
        best[box][better] = score[better]
        found[box][better] = value
        background[box] -= local.values
    # The addition cannot win over background: the structure had 1/2 without it.
    found[best < background] = 0
    return labels
