"""All scores of a structure against its reference.

Where neither has the structure every score is NaN, and where only one has, the distance scores are the image's
diagonal: the largest there can be, so that a mean over cases is worse for a structure that was missed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .shape import Shape, label_shapes
from .surface import PERCENT, area_within, distances_mm, robust_distance_mm

#: "missed": only the reference has the structure; "hallucinated": only the result has. The last two are given by
#: whoever knows more: no result at all (scored as missed), and a structure the atlas cannot give (not scored).
Status = Literal["ok", "both_empty", "missed", "hallucinated", "failed", "not_in_atlas"]


@dataclass(frozen=True)
class StructureScores:
    """How one structure of a result agrees with the reference.

    Parameters
    ----------
    status : {"ok", "both_empty", "missed", "hallucinated"}
        Which of the two have the structure.
    dice : float
        Twice the common voxels over the sum of both.
    nsd : float
        Normalized surface Dice: share of both surfaces' area that is within the tolerance of the other.
    tolerance_mm : float
        Of ``nsd``.
    hd95_mm : float
        95 % of the surface's area is no farther from the other surface, the larger of both directions.
    hd95_voxel_mm : float
        The same of the surface voxels, each counting the same: 95th percentile of the distances between their
        centres, as MONAI has it.
    result_voxels, reference_voxels : int
        Number of voxels.
    result_ml, reference_ml : float
        Volume.
    cldice : float or None
        Harmonic mean of the shares of each centreline inside the other mask; None where not asked for.
    cldice_note : str
        What was done for it besides thinning; "" for nothing.
    """

    status: Status
    dice: float
    nsd: float
    tolerance_mm: float
    hd95_mm: float
    hd95_voxel_mm: float
    result_voxels: int
    reference_voxels: int
    result_ml: float
    reference_ml: float
    cldice: float | None
    cldice_note: str


def compare(
    result: Shape, reference: Shape, *, tolerance_mm: float, diagonal_mm: float, centreline: bool = False
) -> StructureScores:
    """Score one structure.

    Parameters
    ----------
    result, reference : Shape
        On one grid, from :func:`label_shapes`.
    tolerance_mm : float
        For the normalized surface Dice, 0 or more.
    diagonal_mm : float
        Distance that stands for a structure of only one of the two.
    centreline : bool
        Whether clDice is wanted.

    Returns
    -------
    StructureScores

    Raises
    ------
    ValueError
        If the shapes are not on one grid or the tolerance is not a number of 0 or more.
    """
    if (result.grid_shape, result.spacing_mm) != (reference.grid_shape, reference.spacing_mm):
        raise ValueError(
            f"shapes on grids of {result.grid_shape} voxels of {result.spacing_mm} mm and "
            f"{reference.grid_shape} voxels of {reference.spacing_mm} mm are not on one grid"
        )
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"the tolerance is 0 mm or more, not {tolerance_mm}")
    status: Status
    cldice, note = None, ""
    if result.voxels and reference.voxels:
        status = "ok"
        dice = 2 * result.common_voxels(reference) / (result.voxels + reference.voxels)
        nsd, hd95 = _surface_scores(result, reference, tolerance_mm)
        hd95_voxel = max(
            float(np.percentile(distances_mm(one.surface_voxels, other.surface_voxels), PERCENT))
            for one, other in ((result, reference), (reference, result))
        )
        if centreline:
            cldice, note = _cldice(result, reference)
    else:
        either = result.voxels or reference.voxels
        status = "both_empty" if not either else "hallucinated" if result.voxels else "missed"
        dice = nsd = 0.0 if either else math.nan
        hd95 = hd95_voxel = diagonal_mm if either else math.nan
        if centreline:
            cldice = dice
    return StructureScores(
        status=status,
        dice=dice,
        nsd=nsd,
        tolerance_mm=tolerance_mm,
        hd95_mm=hd95,
        hd95_voxel_mm=hd95_voxel,
        result_voxels=result.voxels,
        reference_voxels=reference.voxels,
        result_ml=result.ml,
        reference_ml=reference.ml,
        cldice=cldice,
        cldice_note=note,
    )


def score_labels(
    result: NDArray[Any],
    reference: NDArray[Any],
    values: Sequence[int],
    spacing_mm: Sequence[float],
    tolerances_mm: Mapping[int, float],
    *,
    centreline: Collection[int] = (),
) -> dict[int, StructureScores]:
    """Score the structures of a label map.

    Parameters
    ----------
    result, reference : array of an integer type, (I, J, K)
        Label maps on one grid.
    values : sequence of int
        Values to compare. Others count as background.
    spacing_mm : sequence of float, (3,)
        Size of a voxel.
    tolerances_mm : mapping of int to float
        Tolerance of the normalized surface Dice for each of the values.
    centreline : collection of int
        Values that clDice is wanted for.

    Returns
    -------
    dict of int to StructureScores
        In the order of ``values``.

    Raises
    ------
    ValueError
        If the label maps differ in shape or do not hold whole numbers, the spacing is not three positive numbers,
        or a tolerance is missing or not a number of 0 or more.
    """
    if result.shape != reference.shape:
        raise ValueError(f"arrays of shape {result.shape} and {reference.shape} are not on one grid")
    missing = [value for value in values if value not in tolerances_mm]
    if missing:
        raise ValueError(f"no tolerance for the values {missing}")
    results, references = (label_shapes(labels, values, spacing_mm) for labels in (result, reference))
    diagonal = diagonal_mm(result.shape, spacing_mm)
    # Each pair is dropped as soon as it is scored: all surfaces at once would take much more memory.
    return {
        value: compare(
            results.pop(value),
            references.pop(value),
            tolerance_mm=tolerances_mm[value],
            diagonal_mm=diagonal,
            centreline=value in centreline,
        )
        for value in list(results)
    }


def score_masks(
    result: NDArray[Any],
    reference: NDArray[Any],
    spacing_mm: Sequence[float],
    *,
    tolerance_mm: float,
    centreline: bool = False,
) -> StructureScores:
    """Score one mask.

    Parameters
    ----------
    result, reference : array, (I, J, K)
        A voxel is inside where it is not 0.
    spacing_mm : sequence of float, (3,)
        Size of a voxel.
    tolerance_mm : float
        For the normalized surface Dice, 0 or more.
    centreline : bool
        Whether clDice is wanted.

    Returns
    -------
    StructureScores

    Raises
    ------
    ValueError
        If the shapes differ, the spacing is not three positive numbers, or the tolerance is not a number of 0 or
        more.
    """
    return score_labels(
        result != 0, reference != 0, [1], spacing_mm, {1: tolerance_mm}, centreline=[1] if centreline else ()
    )[1]


def diagonal_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Length of an image's diagonal, from the far corner of its first voxel to that of its last.

    Parameters
    ----------
    shape : sequence of int, (3,)
        Voxels along each axis.
    spacing_mm : sequence of float, (3,)
        Size of a voxel.
    """
    return math.hypot(*(count * step for count, step in zip(shape, spacing_mm, strict=True)))


def _surface_scores(result: Shape, reference: Shape, tolerance_mm: float) -> tuple[float, float]:
    """Normalized surface Dice, and robust Hausdorff distance in mm."""
    (result_points, result_mm2), (reference_points, reference_mm2) = result.surfels, reference.surfels
    to_reference = distances_mm(result_points, reference_points)
    to_result = distances_mm(reference_points, result_points)
    within = area_within(to_reference, result_mm2, tolerance_mm) + area_within(to_result, reference_mm2, tolerance_mm)
    return (
        within / (float(result_mm2.sum()) + float(reference_mm2.sum())),
        max(robust_distance_mm(to_reference, result_mm2), robust_distance_mm(to_result, reference_mm2)),
    )


def _cldice(result: Shape, reference: Shape) -> tuple[float, str]:
    """ClDice and its note."""
    precision = result.skeleton.share_in(reference.cells(result.skeleton.cell_mm))
    sensitivity = reference.skeleton.share_in(result.cells(reference.skeleton.cell_mm))
    both = precision + sensitivity
    notes: list[str] = []
    for whose, skeleton in (("result", result.skeleton), ("reference", reference.skeleton)):
        for part in filter(None, skeleton.note.split("; ")):
            # The same resampling is said once; a lost skeleton is one mask's matter.
            text = part if part.startswith("resampled") else f"{whose}: {part}"
            if text not in notes:
                notes.append(text)
    return 2 * precision * sensitivity / both if both else 0.0, "; ".join(notes)
