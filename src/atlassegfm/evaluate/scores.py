"""Scores of one case: label maps on one grid, in mm on the reference's own voxels."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ..core.errors import InputError
from ..core.image import Volume
from .metrics import StructureScores, compare, label_shapes
from .tolerances import Tolerances

logger = logging.getLogger(__name__)

#: Axes are called oblique if a voxel is smaller than the product of its edges by this fraction (2.6 degrees).
_SHEARED = 1e-3


@dataclass(frozen=True)
class CaseScore:
    """Scores of one structure (label value and name) of one case (the reference's file name without suffix)."""

    case: str
    value: int
    structure: str
    scores: StructureScores


def score_volumes(
    results: Mapping[str, Volume],
    reference: Volume,
    names: Mapping[int, str],
    tolerances: Tolerances,
    *,
    centreline: Collection[int] = (),
) -> dict[str, dict[int, StructureScores]]:
    """Score label maps of several methods against one reference: by method, then by label value.

    Results are on the reference's voxels in any array order (:func:`check_grids`). ``names`` are of the label values to
    score; those in ``centreline`` are scored by clDice too. On axes that are not at right angles (tilted gantry)
    volumes are exact and distances are not: a warning says so.
    """
    spacing_mm = reference.grid.spacing_mm.tolist()
    voxel_ml = reference.grid.voxel_volume_mm3 / 1000
    if voxel_ml < (1 - _SHEARED) * math.prod(spacing_mm) / 1000:
        name = _name(reference, "the reference")
        logger.warning("%s: its axes are not at right angles; distances are measured as if they were", name)
    shapes = {}
    for method, result in results.items():
        check_grids(result, reference)
        shapes[method] = label_shapes(result.turned_to(reference.grid).data, names, spacing_mm)
    references = label_shapes(reference.data, names, spacing_mm)
    scores: dict[str, dict[int, StructureScores]] = {method: {} for method in results}
    for value, name in names.items():
        shape = references.pop(value)  # its surfaces serve all methods, and are then freed
        for method, own in shapes.items():
            tolerance_mm = tolerances.of(value, name)
            one = compare(own.pop(value), shape, tolerance_mm=tolerance_mm, centreline=value in centreline)
            # The comparison multiplies the spacing, which is too much on sheared axes.
            result_ml, reference_ml = (n * voxel_ml for n in (one.result_voxels, one.reference_voxels))
            scores[method][value] = replace(one, result_ml=result_ml, reference_ml=reference_ml)
    return scores


def check_grids(result: Volume, reference: Volume) -> None:
    """Raise :class:`.InputError` if a result has other voxels than the reference."""
    if result.grid.axes_relative_to(reference.grid) is not None:
        return
    found, expected = result.grid.canonical(), reference.grid.canonical()
    apart = f", corners up to {found.distance_mm(expected):.1f} mm apart" if found.shape == expected.shape else ""
    raise InputError(
        f"{_name(result, 'the result')}: not on the voxels of {_name(reference, 'the reference')}: "
        f"{found.describe()} instead of {expected.describe()}{apart}; resample it with nearest neighbour, or give the "
        "right file"
    )


def _name(volume: Volume, fallback: str) -> str:
    return fallback if volume.source is None else str(volume.source.path)
