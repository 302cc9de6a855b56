"""Label map of fused structures, and removal of islands that the atlas's structures do not have.

A model that goes by appearance leaves islands, such as bright voxels of the stomach beside the spleen. Where the
atlas's structure is one part, so is the query's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.image import smallest_label_type
from ..core.mask import LocalMap, bounding_box
from ..core.parallel import parallel_map
from ..prompts import INSIDE

#: Weight of the warped atlas where several structures are found at one voxel.
_WARPED_WEIGHT = 0.5
#: Voxels that share a corner are connected: thin structures on thick slices often touch only so.
_CONNECTIVITY = np.ones((3, 3, 3), bool)
#: Parts of the atlas's structure below this fraction of it are not counted: slips of the pen.
_LEAST_FRACTION = 0.05
#: A part of the result beyond the atlas's count is kept above this fraction of the smallest counted one: a structure
#: may be torn by a thin gap.
_LARGE_FRACTION = 0.3


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


def count_parts(labels: NDArray[Any]) -> dict[int, int]:
    """Count the connected parts of each structure, at least 1, of a label map of numbers from 1, 0 for background."""
    boxes = {number: box for number, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None}

    def count(number: int) -> int:
        sizes = np.bincount(ndimage.label(labels[boxes[number]] == number, _CONNECTIVITY)[0].ravel())[1:]
        return max(int((sizes >= _LEAST_FRACTION * sizes.sum()).sum()), 1)

    return dict(zip(boxes, parallel_map(count, boxes), strict=True))


def remove_islands(
    fused: Mapping[int, LocalMap], warped: Mapping[int, LocalMap], labels: NDArray[Any], parts: Mapping[int, int]
) -> tuple[dict[int, LocalMap], NDArray[Any]]:
    """Remove parts of each structure beyond the number that the atlas has.

    ``fused`` and ``warped`` are masks in [0, 1], ``labels`` is the label map of ``fused``; structures without a number
    in ``parts`` stay as they are. Returns the masks, 0 on islands, and their label map.
    """
    boxes = {number: box for number, box in enumerate(ndimage.find_objects(labels), start=1) if box and number in parts}

    def cleared(number: int) -> LocalMap:
        box, mask = boxes[number], fused[number]
        islands = find_islands(labels[box] == number, parts[number])
        if not islands.any():
            return mask
        values = mask.values.copy()
        values[tuple(slice(side.start - s, side.stop - s) for side, s in zip(box, mask.start, strict=True))][
            islands
        ] = 0
        return LocalMap(mask.start, values)

    masks = {**fused, **dict(zip(boxes, parallel_map(cleared, boxes), strict=True))}
    changed = any(masks[n] is not mask for n, mask in fused.items())
    return masks, label_map(masks, labels.shape, warped) if changed else labels


def find_islands(mask: NDArray[np.bool_], parts: int) -> NDArray[np.bool_]:
    """Find the voxels of the connected parts beyond the largest ``parts``, unless these are large themselves."""
    part_of, count = ndimage.label(mask, _CONNECTIVITY)
    if count <= parts:
        return np.zeros(mask.shape, bool)
    sizes = np.bincount(part_of.ravel())
    sizes[0] = 0
    # Of equal parts the first in array order is kept.
    by_size = np.argsort(-sizes, kind="stable")
    small = sizes <= _LARGE_FRACTION * sizes[by_size[parts - 1]]
    small[0] = False
    return np.asarray(small[part_of])
