"""All scores of a structure against its reference.

Where neither has the structure every score is NaN. Where only one has it, distances are the image's diagonal, the
largest there can be: a missed structure makes a mean worse.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .shape import Shape, label_shapes
from .surface import PERCENT, area_within, distances_mm, robust_distance_mm

#: "missed": only the reference has the structure; "hallucinated": only the result. Benchmarks add "failed" (no result
#: at all, scored as missed) and "not_in_atlas" (not scored).
Status = Literal["ok", "both_empty", "missed", "hallucinated", "failed", "not_in_atlas"]


@dataclass(frozen=True)
class StructureScores:
    """Scores of one structure."""

    status: Status
    dice: float
    nsd: float  # normalized surface Dice: fraction of the area of both surfaces within the tolerance of the other
    tolerance_mm: float
    hd95_mm: float  # robust Hausdorff distance: 95 % of the area is no farther from the other; the larger direction
    assd_mm: float  # average symmetric surface distance: mean distance to the other surface over the area of both
    hd95_voxel_mm: float  # 95th percentile between centres of surface voxels, as in MONAI; the larger direction
    result_voxels: int
    reference_voxels: int
    result_ml: float
    reference_ml: float
    cldice: float | None  # harmonic mean of the fractions of each centreline in the other mask; None if not asked for
    cldice_note: str  # what was done for it besides thinning; "" for nothing


def compare(result: Shape, reference: Shape, *, tolerance_mm: float, centreline: bool = False) -> StructureScores:
    """Score one structure on one grid (else a ValueError), with a tolerance from 0; by clDice with ``centreline``."""
    grids = [f"{one.grid_shape} voxels of {one.spacing_mm} mm" for one in (result, reference)]
    if grids[0] != grids[1]:
        raise ValueError(f"shapes on {grids[0]} and on {grids[1]} are not on one grid")
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"the tolerance is 0 mm or more, not {tolerance_mm}")
    status: Status = "ok"
    cldice, note = None, ""
    if result.voxels and reference.voxels:
        dice = 2 * result.common_voxels(reference) / (result.voxels + reference.voxels)
        nsd, hd95, assd, hd95_voxel = _surface_scores(result, reference, tolerance_mm)
        if centreline:
            cldice, note = _cldice(result, reference)
    else:
        either = result.voxels or reference.voxels
        status = "both_empty" if not either else "hallucinated" if result.voxels else "missed"
        dice = nsd = 0.0 if either else math.nan
        diagonal = math.hypot(*np.multiply(result.grid_shape, result.spacing_mm))
        hd95 = assd = hd95_voxel = diagonal if either else math.nan
        cldice = dice if centreline else None
    sizes = (result.voxels, reference.voxels, result.ml, reference.ml)
    return StructureScores(status, dice, nsd, tolerance_mm, hd95, assd, hd95_voxel, *sizes, cldice, note)


def score_labels(
    result: NDArray[Any],
    reference: NDArray[Any],
    values: Sequence[int],
    spacing_mm: Sequence[float],
    tolerances_mm: Mapping[int, float],
    *,
    centreline: Collection[int] = (),
) -> dict[int, StructureScores]:
    """Score the structures of a label map, (I, J, K) of an integer type, against one on its grid.

    Scores are in the order of ``values``; others are background. ``tolerances_mm`` of the normalized surface Dice are
    by value; those in ``centreline`` are scored by clDice too. A ValueError as of :func:`label_shapes` and
    :func:`compare`, or if the shapes of the arrays differ or a tolerance is missing.
    """
    if result.shape != reference.shape:
        raise ValueError(f"arrays of shape {result.shape} and {reference.shape} are not on one grid")
    if missing := [value for value in values if value not in tolerances_mm]:
        raise ValueError(f"no tolerance for the values {missing}")
    results, references = (label_shapes(labels, values, spacing_mm) for labels in (result, reference))
    scores = {}
    for value in list(results):
        # Each pair is freed as soon as it is scored: all surfaces at once would take much more memory.
        one, other = results.pop(value), references.pop(value)
        scores[value] = compare(one, other, tolerance_mm=tolerances_mm[value], centreline=value in centreline)
    return scores


def score_masks(
    result: NDArray[Any],
    reference: NDArray[Any],
    spacing_mm: Sequence[float],
    *,
    tolerance_mm: float,
    centreline: bool = False,
) -> StructureScores:
    """Score one mask, (I, J, K), inside where it is not 0; arguments and errors as of :func:`score_labels`."""
    thin = [1] if centreline else []
    return score_labels(result != 0, reference != 0, [1], spacing_mm, {1: tolerance_mm}, centreline=thin)[1]


def _surface_scores(result: Shape, reference: Shape, tolerance_mm: float) -> tuple[float, float, float, float]:
    """Normalized surface Dice; in mm robust Hausdorff distance, average distance, and the former by voxels."""
    within = total = moment = hd95 = hd95_voxel = 0.0
    for one, other in ((result, reference), (reference, result)):
        points, area_mm2 = one.surfels
        to_other = distances_mm(points, other.surfels[0])
        within += area_within(to_other, area_mm2, tolerance_mm)
        total += float(area_mm2.sum())
        moment += float(area_mm2 @ to_other)
        hd95 = max(hd95, robust_distance_mm(to_other, area_mm2))
        by_voxels = distances_mm(one.surface_voxels, other.surface_voxels)
        hd95_voxel = max(hd95_voxel, float(np.percentile(by_voxels, PERCENT)))
    return within / total, hd95, moment / total, hd95_voxel


def _cldice(result: Shape, reference: Shape) -> tuple[float, str]:
    """Compute clDice and its note."""
    precision = result.skeleton.fraction_in(reference.cells(result.skeleton.cell_mm))
    sensitivity = reference.skeleton.fraction_in(result.cells(reference.skeleton.cell_mm))
    both = precision + sensitivity
    # Resampling is the same for both; a lost skeleton is one mask's.
    notes = dict.fromkeys(
        part if part.startswith("resampled") else f"{whose}: {part}"
        for whose, skeleton in (("result", result.skeleton), ("reference", reference.skeleton))
        for part in filter(None, skeleton.note.split("; "))
    )
    return 2 * precision * sensitivity / both if both else 0.0, "; ".join(notes)
