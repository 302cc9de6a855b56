"""What of a result a network may learn from: labels to believe, places to ignore.

A label that is wrong teaches the network to be wrong, and so does background where a structure really is. A structure
that is not good and that nobody accepted is therefore neither: the voxels where it may be are ignored in the loss.
These are all that result, warped atlas or model call it, and a margin as wide as the structure may be off by the lower
end of its estimated Dice. Voxels of structures that are believed keep their label there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.errors import InputError
from ..core.image import Volume, smallest_label_type
from ..records import RunRecord, StructureRecord

Use = Literal["label", "ignore", "background"]

#: Steps of the coarse grid on which a margin is measured, in a margin: its width is off by up to a tenth.
_MARGIN_STEPS = 10


@dataclass(frozen=True)
class UsedStructure:
    """What became of one structure of a case."""

    structure: str
    use: Use
    reason: str
    verdict: str | None = None
    estimated_dice: float | None = None
    voxels: int = 0  # with its label in the training set
    margin_mm: float | None = None  # of what is ignored around the voxels that may be it


@dataclass(frozen=True, eq=False)
class TrainingLabels:
    """Label map of a training case: numbers of structures, and the one after the last for voxels to ignore."""

    data: NDArray[Any]
    structures: tuple[UsedStructure, ...]
    ignored: int  # voxels


def training_labels(
    run: RunRecord, labels: Volume, opinions: Sequence[Volume], numbers: Mapping[int, int]
) -> TrainingLabels:
    """Make the label map of a training case from a result.

    ``labels`` are label values, ``opinions`` those of warped atlas and model where they were kept, on the same voxels;
    ``numbers`` are the labels of the training set by label value, from 1 on. InputError if nothing of the case is
    believed, or a structure was not found and nothing tells where it may be.
    """
    ignore = max(numbers.values()) + 1
    data = np.zeros(labels.data.shape, smallest_label_type(ignore))
    doubtful = np.zeros(labels.data.shape, bool)
    uses = []
    for one in run.structures:
        use, reason = _use_of(one)
        margin_mm, voxels = None, 0
        if use == "label":
            inside = labels.data == one.value
            data[inside] = numbers[one.value]
            voxels = int(inside.sum())
        elif use == "ignore":
            place = _places(one, labels, opinions)
            if place.any():
                margin_mm = uncertainty_mm(place.sum() * labels.grid.voxel_volume_mm3, lowest_dice(one))
                doubtful |= grown(place, margin_mm, labels.grid.spacing_mm)
            elif one.status == "outside":
                use = "background"
            else:
                raise InputError(
                    f"{one.name} was not found, and nothing tells where it may be: segment with --keep, or accept it "
                    "as absent in `atlassegfm serve`"
                )
        quality = one.quality
        verdict, dice = (None, None) if quality is None else (quality.verdict, quality.estimated_dice)
        margin_mm = None if margin_mm is None else round(margin_mm, 1)
        uses.append(UsedStructure(one.name, use, reason, verdict, dice, voxels, margin_mm))
    if not any(_is_believed(one) for one in run.structures):
        raise InputError("no structure is good or accepted")
    doubtful &= data == 0
    data[doubtful] = ignore
    return TrainingLabels(data, tuple(uses), int(doubtful.sum()))


def uncertainty_mm(volume_mm3: float, dice: float) -> float:
    """Compute how far apart two balls of a volume lie that overlap by this Dice, in mm.

    Balls of radius r at a distance s have a Dice of 1 - 3 s / 4 r + s^3 / 16 r^3. A structure of another shape loses
    more Dice when it is moved as far: this is the most that a shift can be.
    """
    radius_mm = (3 * volume_mm3 / (4 * math.pi)) ** (1 / 3)
    angle = (2 * math.pi - math.acos(min(dice, 1.0) - 1)) / 3
    return max(4.0 * float(radius_mm) * math.cos(angle), 0.0)


def lowest_dice(one: StructureRecord) -> float:
    """Get the lower end of the interval of a structure's estimated Dice; 0 where nothing was estimated."""
    return 0.0 if one.quality is None or one.quality.low is None else one.quality.low


def grown(mask: NDArray[np.bool_], margin_mm: float, spacing_mm: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Grow a mask with at least one voxel by a margin, measured on a grid as coarse as the margin allows."""
    steps = np.maximum(1, np.floor(margin_mm / _MARGIN_STEPS / spacing_mm)).astype(int)
    found = np.argwhere(mask)
    reach = np.ceil(margin_mm / spacing_mm).astype(int) + steps
    first, last = np.maximum(found.min(0) - reach, 0), np.minimum(found.max(0) + 1 + reach, mask.shape)
    box = tuple(map(slice, first, last))
    part = mask[box]
    i, j, k = steps
    blocks = np.pad(part, [(0, -n % step) for n, step in zip(part.shape, steps, strict=True)])
    a, b, c = np.array(blocks.shape) // steps
    coarse = blocks.reshape(a, i, b, j, c, k).any(axis=(1, 3, 5))
    near = ndimage.distance_transform_edt(~coarse, steps * spacing_mm) <= margin_mm
    near = near.repeat(i, 0).repeat(j, 1).repeat(k, 2)
    result = mask.copy()
    result[box] |= near[tuple(map(slice, part.shape))]
    return result


def _use_of(one: StructureRecord) -> tuple[Use, str]:
    quality = one.quality
    if _is_believed(one):
        by = "accepted by a person" if one.review is not None else "judged good"
        return ("label", by) if one.status == "present" else ("background", f"{one.status}, {by}")
    reason = one.reason if quality is None else quality.reason
    return "ignore", reason or "not judged"


def _is_believed(one: StructureRecord) -> bool:
    return one.quality is not None and one.quality.verdict in ("good", "accepted")


def _places(one: StructureRecord, labels: Volume, opinions: Sequence[Volume]) -> NDArray[np.bool_]:
    """Where the structure may be: the voxels that anything calls so, else the box that prompted the model."""
    found: NDArray[np.bool_] = np.any([each.data == one.value for each in (labels, *opinions)], axis=0)
    if not found.any() and one.prompt is not None:
        ends = zip(one.prompt.first_voxel, one.prompt.last_voxel, strict=True)
        found[tuple(slice(first, last + 1) for first, last in ends)] = True
    return found
