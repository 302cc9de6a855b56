"""How good each structure of a result is likely to be, told without the query's labels.

Evidence of several kinds is gathered for each structure: whether warped atlas and result agree, how sure the model is,
volume, brightness and contrast against the atlas, how alike the scans are around it, how far it was moved. A linear
regression on labelled pairs (docs/quality.md; `benchmarks/quality.py` fits it) turns it into an estimate of the Dice
coefficient, and the estimate into a verdict. The reason is the evidence that speaks most against the structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.geometry import Grid
from ..core.image import Volume
from ..core.mask import LocalMap
from ..core.overlap import dice
from ..prompts import INSIDE
from ..registration import Registration
from ..transforms.resample import warp_labels

#: A result is good from the one estimated Dice on, and failed below the other. On the pairs of the calibration
#: (docs/quality.md) these catch most structures below 0.7 without sending every second one back.
GOOD_FROM, FAILED_BELOW = 0.78, 0.62


#: Percentiles of a scan's intensities that count as 0 and 1.
_RANGE_PERCENT = (1.0, 99.0)


#: Percentiles of a scan are taken over about so many voxels.
_SAMPLE_VOXELS = 1_000_000


#: Thickness of the shells inside and outside a structure's border whose brightness is compared.
_SHELL_MM = 5.0


#: Brightness is looked at on at most about so many voxels of a structure's box.
_BOX_VOXELS = 300_000


#: Values of each shell that are compared in pairs.
_PAIRS = 500


#: The neighbourhood of a structure in which the scans are compared, in voxels of the grid of the comparison.
_AROUND_VOXELS = 1.5


#: Probabilities from this on count as an answer of the model.
_ANSWER = 0.05


#: Shares and volumes stay this far from 0.
_TINY = 1e-6


@dataclass(frozen=True)
class Evidence:
    """What is known of one structure of a result without the query's labels.

    "Brightness" is intensity as a share of the range of its scan (1st to 99th percentile). The atlas's side of each
    comparison is its own label on its own scan.

    Parameters
    ----------
    agreement : float
        Dice of the warped atlas's and the result's mask, in [0, 1]; 1 without a model.
    certainty : float
        Mean distance of the model's probabilities from 1/2, 0 to 1; 0 without a model.
    volume_change : float
        Logarithm of the result's volume over the atlas's after the linear registration.
    volume_off : float
        The same without its sign.
    size : float
        Logarithm of the result's volume in mm^3.
    brightness_off : float
        Difference of the median brightness.
    spread : float
        Interquartile range of brightness in the result.
    spread_off : float
        Difference of this range from the atlas's.
    contrast_off : float
        Difference of the contrasts: of the median brightness within 5 mm inside and outside the border.
    separation_off : float
        Difference of the separations: the share of pairs of voxels, one inside and one outside, of which the inner one
        is the brighter.
    separation_product : float
        Product of the separations, each less 1/2: negative where the structure is the bright side in one scan and the
        dark one in the other, near 0 where it does not stand out.
    unlikeness : float
        Mean MIND-SSC difference of the scans around it.
    unlikeness_relative : float
        The same over that of the whole foreground.
    unlikeness_overall : float
        That of the whole foreground.
    moved : float
        How far the deformation moved it, in sizes of it (cube root of the volume).
    drawn : float
        How far the result lies from the warped atlas's mask, likewise.
    """

    agreement: float
    certainty: float
    volume_change: float
    volume_off: float
    size: float
    brightness_off: float
    spread: float
    spread_off: float
    contrast_off: float
    separation_off: float
    separation_product: float
    unlikeness: float
    unlikeness_relative: float
    unlikeness_overall: float
    moved: float
    drawn: float


@dataclass(frozen=True, eq=False)
class Case:
    """A result and what it was made of, in RAS-canonical array order; structures go by number.

    Parameters
    ----------
    query, atlas : Volume
        Scans.
    atlas_labels : Volume
        Numbers, on the atlas's grid.
    registration : Registration
        Query to atlas.
    warped : mapping of int to LocalMap
        The atlas's masks on the query.
    answers : mapping of int to LocalMap
        The model's; empty without one.
    labels : array, (I, J, K)
        The result: numbers on the query's grid.
    """

    query: Volume
    atlas: Volume
    atlas_labels: Volume
    registration: Registration
    warped: Mapping[int, LocalMap]
    answers: Mapping[int, LocalMap]
    labels: NDArray[Any]


@dataclass(frozen=True)
class _Look:
    """Brightness of a structure in one scan."""

    median: float
    spread: float
    contrast: float
    separation: float


def gather(case: Case) -> dict[int, Evidence]:
    """Evidence on each structure of the result that is not empty."""
    boxes = ndimage.find_objects(case.labels)
    present = [n for n in case.warped if n <= len(boxes) and boxes[n - 1] is not None]
    if not present:
        return {}
    atlas_boxes = ndimage.find_objects(case.atlas_labels.data)
    query_range, atlas_range = _range(case.query.data), _range(case.atlas.data)
    difference = case.registration.difference
    near = {} if difference is None else _around(case, present, difference.grid)
    overall = 0.0 if difference is None else difference.mean()
    to_query = case.registration.linear.inverse()
    growth = abs(float(np.linalg.det(to_query.matrix[:3, :3])))
    evidence = {}
    for n in present:
        mask = LocalMap(_first(boxes[n - 1]), (case.labels[boxes[n - 1]] == n).astype(np.float32))
        label_box = atlas_boxes[n - 1]
        label = case.atlas_labels.data[label_box] == n
        there = _look(case.query, case.labels, n, mask.box, query_range)
        here = _look(case.atlas, case.atlas_labels.data, n, label_box, atlas_range)
        volume = float(mask.values.sum()) * case.query.grid.voxel_volume_mm3
        expected = np.count_nonzero(label) * case.atlas.grid.voxel_volume_mm3 * growth
        change = float(np.log(volume / expected))
        size_mm = expected ** (1 / 3)
        atlas_centre = to_query.map(_centre_mm(label, _first(label_box), case.atlas.grid))
        inside = case.warped[n].values >= INSIDE
        warped_centre = _centre_mm(inside, case.warped[n].start, case.query.grid)
        centre = _centre_mm(mask.values > 0, mask.start, case.query.grid)
        unlike = 0.0 if difference is None else difference.mean(near[n])
        evidence[n] = Evidence(
            agreement=_agreement(case.warped[n], mask),
            certainty=_certainty(case.answers.get(n)),
            volume_change=change,
            volume_off=abs(change),
            size=float(np.log(volume)),
            brightness_off=abs(there.median - here.median),
            spread=there.spread,
            spread_off=abs(there.spread - here.spread),
            contrast_off=abs(there.contrast - here.contrast),
            separation_off=abs(there.separation - here.separation),
            separation_product=(there.separation - 0.5) * (here.separation - 0.5),
            unlikeness=unlike,
            unlikeness_relative=unlike / max(overall, _TINY),
            unlikeness_overall=overall,
            moved=float(np.linalg.norm(warped_centre - atlas_centre)) / size_mm,
            drawn=float(np.linalg.norm(centre - warped_centre)) / size_mm,
        )
    return evidence


def _first(box: tuple[slice, slice, slice]) -> tuple[int, int, int]:
    i, j, k = (int(side.start) for side in box)
    return i, j, k


def _range(data: NDArray[Any]) -> tuple[float, float]:
    """Intensities that count as 0 and 1."""
    step = max(1, round((data.size / _SAMPLE_VOXELS) ** (1 / 3)))
    low, high = np.percentile(data[::step, ::step, ::step], _RANGE_PERCENT)
    return float(low), max(float(high), float(low) + _TINY)


def _centre_mm(mask: NDArray[np.bool_], start: tuple[int, int, int], grid: Grid) -> NDArray[np.float64]:
    """(1, 3) RAS+ mm of the centroid of a mask on a box."""
    voxels = np.argwhere(mask)
    return grid.voxel_to_world((voxels.mean(axis=0) + start)[None])


def _agreement(one: LocalMap, other: LocalMap) -> float:
    start = np.minimum(one.start, other.start).tolist()
    stop = np.maximum(one.stop, other.stop).tolist()
    return dice(one.on_box(start, stop) >= INSIDE, other.on_box(start, stop) >= INSIDE)


def _certainty(answer: LocalMap | None) -> float:
    if answer is None:
        return 0.0
    told = answer.values[answer.values > _ANSWER]
    return float(2 * np.abs(told - 0.5).mean()) if len(told) else 0.0


def _around(case: Case, numbers: list[int], grid: Grid) -> dict[int, LocalMap]:
    """Where the scans are compared for each structure: its warped mask, smoothed."""
    around = {}
    for n, mask in warp_labels(case.atlas_labels, numbers, grid, case.registration.fixed_to_moving).items():
        margin = round(4 * _AROUND_VOXELS)
        start = np.maximum(np.array(mask.start) - margin, 0)
        stop = np.minimum(np.array(mask.stop) + margin, grid.shape)
        values = ndimage.gaussian_filter(mask.on_box(start.tolist(), stop.tolist()), _AROUND_VOXELS)
        i, j, k = (int(first) for first in start)
        around[n] = LocalMap((i, j, k), values)
    return around


def _look(
    image: Volume,
    labels: NDArray[Any],
    number: int,
    box: tuple[slice, slice, slice],
    limits: tuple[float, float],
) -> _Look:
    """Brightness of a structure of a label map on the image's grid; ``box`` holds all of it."""
    spacing_mm = image.grid.spacing_mm
    margin = np.ceil(1.2 * _SHELL_MM / spacing_mm).astype(int)
    first = np.maximum([side.start for side in box] - margin, 0)
    last = np.minimum([side.stop for side in box] + margin, image.data.shape)
    # Every few voxels of large boxes, and fewer along fine axes, where neighbours are most alike.
    step = np.ones(3, int)
    while np.prod(np.ceil((last - first) / step)) > _BOX_VOXELS:
        step[int((spacing_mm * step).argmin())] += 1
    i, j, k = (slice(int(a), int(b), int(s)) for a, b, s in zip(first, last, step, strict=True))
    part = (i, j, k)
    inside = labels[part] == number
    low, high = limits
    brightness = (image.data[part].astype(np.float32) - low) / (high - low)
    if not inside.any():  # too thin for the steps
        return _Look(0.0, 0.0, 0.0, 0.5)
    middle, lower, upper = (float(n) for n in np.percentile(brightness[inside], (50, 25, 75)))
    apart_mm = spacing_mm * step
    inner = brightness[inside & (ndimage.distance_transform_edt(inside, apart_mm) <= _SHELL_MM)]
    outer = brightness[~inside & (ndimage.distance_transform_edt(~inside, apart_mm) <= _SHELL_MM)]
    if not len(inner) or not len(outer):
        return _Look(middle, upper - lower, 0.0, 0.5)
    quantiles = (np.arange(_PAIRS) + 0.5) / _PAIRS
    one, other = np.quantile(inner, quantiles), np.quantile(outer, quantiles)
    brighter = np.searchsorted(np.sort(other), one, side="left") / _PAIRS
    return _Look(middle, upper - lower, float(np.median(inner) - np.median(outer)), float(brighter.mean()))
