"""Evidence on the quality of each structure of a result, measured without the query's labels."""

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
from ..core.parallel import parallel_map
from ..prompts import INSIDE
from ..registration import Registration
from ..transforms.maps import Affine
from ..transforms.resample import warp_labels

#: Percentiles of a scan's intensities that become brightness 0 and 1, taken over about so many voxels.
_RANGE_PERCENT, _RANGE_VOXELS = (1.0, 99.0), 1_000_000
#: Thickness of the shells inside and outside a border whose brightness is compared, mm; quantiles compared in pairs.
_SHELL_MM, _QUANTILES = 5.0, 500
#: Brightness is sampled on at most about so many voxels of a structure's box.
_BOX_VOXELS = 300_000
#: Sigma of the neighbourhood of a structure in which dissimilarity is averaged, in voxels of its grid.
_AROUND_VOXELS = 1.5
#: Probabilities above this count for the model's certainty.
_LEAST_PROBABILITY = 0.05
#: Probabilities of the warped mask between these count as blurred.
_BLURRED = (0.25, 0.75)
#: Ranges and dissimilarities stay this far from 0.
_TINY = 1e-6


@dataclass(frozen=True)
class Evidence:
    """Evidence on one structure of a result.

    Brightness is intensity scaled to the range of its scan (1st to 99th percentile). Differences are absolute, between
    the result on the query and the atlas's label on the atlas's scan.
    """

    agreement: float  # Dice of the warped atlas's mask and the result, in [0, 1]; 1 without a model
    certainty: float  # twice the mean distance of the model's probabilities from 1/2, in [0, 1]; 0 without a model
    volume_change: float  # logarithm of the result's volume over the atlas's after the linear registration
    abs_volume_change: float
    log_volume: float  # logarithm of the result's volume in mm^3
    thinness: float  # surface over volume of the result, times the voxel size at which scans are compared
    brightness_difference: float  # of the medians
    brightness_iqr: float  # interquartile range of brightness in the result
    iqr_difference: float
    contrast_difference: float  # contrast: median brightness within 5 mm inside the border less that outside
    separation_difference: float  # separation: fraction of (inside, outside) voxel pairs with the inner one brighter
    separation_product: float  # of separations less 1/2: below 0 for reversed contrast, near 0 for none
    dissimilarity: float  # mean MIND-SSC difference of the scans around the structure
    dissimilarity_relative: float  # the same over that of the whole foreground
    dissimilarity_overall: float  # mean MIND-SSC difference of the whole foreground
    displacement: float  # shift of the centroid by the deformation, over the cube root of the volume
    offset: float  # distance of the result's centroid from that of the warped mask, likewise
    apart: float  # distance of its shift by the deformation from the median shift of the structures, likewise
    blur: float  # volume where the ensemble's mean mask is 1/4 to 3/4 over its volume: its members disagree there
    place_margin: float  # how much worse the second best place of the structure search is, in [0, 1]; 0 without one


@dataclass(frozen=True, eq=False)
class Case:
    """A result and what it was made of, in RAS-canonical array order, structures by number."""

    query: Volume
    atlas: Volume
    atlas_labels: Volume  # numbers on the atlas's grid
    registration: Registration  # query to atlas
    warped: Mapping[int, LocalMap]  # the atlas's masks on the query
    answers: Mapping[int, LocalMap]  # the model's predictions; empty without a model
    labels: NDArray[Any]  # (I, J, K) the result: numbers on the query's grid


@dataclass(frozen=True)
class _Brightness:
    """Brightness of a structure in one scan; see :class:`Evidence`."""

    median: float = 0.0
    iqr: float = 0.0
    contrast: float = 0.0
    separation: float = 0.5


def gather(case: Case) -> dict[int, Evidence]:
    """Measure the evidence on each structure of the result that is not empty, by number."""
    boxes = ndimage.find_objects(case.labels)
    present = [n for n in case.warped if n <= len(boxes) and boxes[n - 1] is not None]
    if not present:
        return {}
    atlas_boxes = ndimage.find_objects(case.atlas_labels.data)
    query_range, atlas_range = _intensity_range(case.query.data), _intensity_range(case.atlas.data)
    difference = case.registration.dissimilarity
    near = {} if difference is None else _neighbourhoods(case, present, difference.grid)
    overall = 0.0 if difference is None else difference.mean()
    voxel_mm = 0.0 if difference is None else float(difference.grid.spacing_mm.max())
    to_query = case.registration.linear.inverse()
    growth = abs(float(np.linalg.det(to_query.matrix[:3, :3])))
    shifts_mm = {n: _shift_mm(case, n, atlas_boxes[n - 1], to_query) for n in present}
    usual_mm = np.median(list(shifts_mm.values()), axis=0)

    def measure(n: int) -> Evidence:
        warped, mask = case.warped[n], _mask(case.labels, n, boxes[n - 1])
        label = _mask(case.atlas_labels.data, n, atlas_boxes[n - 1])
        found = _brightness(case.query, case.labels, n, mask.box, query_range)
        expected = _brightness(case.atlas, case.atlas_labels.data, n, label.box, atlas_range)
        volume_mm3 = float(mask.values.sum()) * case.query.grid.voxel_volume_mm3
        expected_mm3 = np.count_nonzero(label.values) * case.atlas.grid.voxel_volume_mm3 * growth
        change = float(np.log(volume_mm3 / expected_mm3))
        size_mm = expected_mm3 ** (1 / 3)
        warped_centre, centre = (_centroid_mm(one, case.query.grid) for one in (warped, mask))
        shift_mm = shifts_mm[n]
        dissimilarity = 0.0 if difference is None else difference.mean(near[n])
        return Evidence(
            agreement=_agreement(warped, mask),
            certainty=_certainty(case.answers.get(n)),
            volume_change=change,
            abs_volume_change=abs(change),
            log_volume=float(np.log(volume_mm3)),
            thinness=_surface_mm2(mask, case.query.grid) / volume_mm3 * voxel_mm,
            brightness_difference=abs(found.median - expected.median),
            brightness_iqr=found.iqr,
            iqr_difference=abs(found.iqr - expected.iqr),
            contrast_difference=abs(found.contrast - expected.contrast),
            separation_difference=abs(found.separation - expected.separation),
            separation_product=(found.separation - 0.5) * (expected.separation - 0.5),
            dissimilarity=dissimilarity,
            dissimilarity_relative=dissimilarity / max(overall, _TINY),
            dissimilarity_overall=overall,
            displacement=float(np.linalg.norm(shift_mm)) / size_mm,
            offset=float(np.linalg.norm(centre - warped_centre)) / size_mm,
            apart=float(np.linalg.norm(shift_mm - usual_mm)) / size_mm,
            blur=_blur(warped),
            place_margin=case.registration.places[n].margin if n in case.registration.places else 0.0,
        )

    return dict(zip(present, parallel_map(measure, present), strict=True))


def _mask(labels: NDArray[Any], number: int, box: tuple[slice, slice, slice]) -> LocalMap:
    i, j, k = (int(side.start) for side in box)
    return LocalMap((i, j, k), (labels[box] == number).astype(np.float32))


def _intensity_range(data: NDArray[Any]) -> tuple[float, float]:
    """Intensities of brightness 0 and 1."""
    step = max(1, round((data.size / _RANGE_VOXELS) ** (1 / 3)))
    low, high = np.percentile(data[::step, ::step, ::step], _RANGE_PERCENT)
    return float(low), max(float(high), float(low) + _TINY)


def _surface_mm2(mask: LocalMap, grid: Grid) -> float:
    """Surface area from the voxel faces of its border, less the third that these are too many in the mean."""
    inside = np.pad(mask.values >= INSIDE, 1)
    faces = [np.count_nonzero(np.diff(inside, axis=axis)) for axis in range(3)]
    return float(2 / 3 * np.dot(faces, grid.voxel_volume_mm3 / grid.spacing_mm))


def _centroid_mm(mask: LocalMap, grid: Grid) -> NDArray[np.float64]:
    """(1, 3) RAS+ mm."""
    return grid.voxel_to_world((np.argwhere(mask.values >= INSIDE).mean(axis=0) + mask.start)[None])


def _shift_mm(case: Case, number: int, box: tuple[slice, slice, slice], to_query: Affine) -> NDArray[np.float64]:
    """(1, 3) shift of a structure's centroid by the deformation, RAS+ mm."""
    linear = to_query.map(_centroid_mm(_mask(case.atlas_labels.data, number, box), case.atlas.grid))
    return _centroid_mm(case.warped[number], case.query.grid) - linear


def _blur(warped: LocalMap) -> float:
    low, high = _BLURRED
    return float(((warped.values > low) & (warped.values < high)).sum() / max((warped.values >= INSIDE).sum(), 1))


def _agreement(one: LocalMap, other: LocalMap) -> float:
    start = np.minimum(one.start, other.start).tolist()
    stop = np.maximum(one.stop, other.stop).tolist()
    return dice(one.on_box(start, stop) >= INSIDE, other.on_box(start, stop) >= INSIDE)


def _certainty(answer: LocalMap | None) -> float:
    if answer is None:
        return 0.0
    probabilities = answer.values[answer.values > _LEAST_PROBABILITY]
    return float(2 * np.abs(probabilities - 0.5).mean()) if len(probabilities) else 0.0


def _neighbourhoods(case: Case, numbers: list[int], grid: Grid) -> dict[int, LocalMap]:
    """Weights for the mean dissimilarity around each structure: its warped mask, smoothed."""
    around, margin = {}, round(4 * _AROUND_VOXELS)
    for n, mask in warp_labels(case.atlas_labels, numbers, grid, case.registration.fixed_to_moving).items():
        i, j, k = np.maximum(np.array(mask.start) - margin, 0).tolist()
        stop = np.minimum(np.array(mask.stop) + margin, grid.shape).tolist()
        around[n] = LocalMap((i, j, k), ndimage.gaussian_filter(mask.on_box((i, j, k), stop), _AROUND_VOXELS))
    return around


def _brightness(
    image: Volume, labels: NDArray[Any], number: int, box: tuple[slice, ...], limits: tuple[float, float]
) -> _Brightness:
    """Brightness of a structure of a label map on the image's grid; ``box`` holds all of it."""
    spacing_mm = image.grid.spacing_mm
    margin = np.ceil(1.2 * _SHELL_MM / spacing_mm).astype(int)
    first = np.maximum([side.start for side in box] - margin, 0)
    last = np.minimum([side.stop for side in box] + margin, image.data.shape)
    # Large boxes are sampled in steps, wider along fine axes, where neighbours are most similar.
    step = np.ones(3, int)
    while np.prod(np.ceil((last - first) / step)) > _BOX_VOXELS:
        step[int((spacing_mm * step).argmin())] += 1
    part = tuple(map(slice, first.tolist(), last.tolist(), step.tolist()))
    inside = labels[part] == number
    low, high = limits
    brightness = (image.data[part].astype(np.float32) - low) / (high - low)
    if not inside.any():  # too thin for the steps
        return _Brightness()
    median, lower, upper = (float(n) for n in np.percentile(brightness[inside], (50, 25, 75)))
    step_mm = spacing_mm * step
    inner = brightness[inside & (ndimage.distance_transform_edt(inside, step_mm) <= _SHELL_MM)]
    outer = brightness[~inside & (ndimage.distance_transform_edt(~inside, step_mm) <= _SHELL_MM)]
    if not len(inner) or not len(outer):
        return _Brightness(median, upper - lower)
    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    one, other = np.quantile(inner, quantiles), np.quantile(outer, quantiles)
    brighter = np.searchsorted(np.sort(other), one, side="left") / _QUANTILES
    return _Brightness(median, upper - lower, float(np.median(inner) - np.median(outer)), float(brighter.mean()))
