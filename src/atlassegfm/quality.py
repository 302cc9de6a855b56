"""How good each structure of a result is likely to be, told without the query's labels.

Evidence of several kinds is gathered for each structure: whether warped atlas and result agree, how sure the model is,
volume, brightness and contrast against the atlas, how alike the scans are around it, how far it was moved. A linear
regression on labelled pairs (docs/quality.md; `benchmarks/quality.py` fits it) turns it into an estimate of the Dice
coefficient, and the estimate into a verdict. The reason is the evidence that speaks most against the structure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from scipy import ndimage

from .geometry import Grid
from .image import LocalMap, Volume
from .metrics import dice
from .prompts import INSIDE
from .registration import Registration
from .transforms import warp_labels

Verdict = Literal["good", "review", "failed"]
VERDICTS: tuple[Verdict, ...] = ("good", "review", "failed")

#: Written by ``benchmarks/quality.py``.
_COEFFICIENTS = "quality.json"
#: A result is good from the one estimated Dice on, and failed below the other. On the pairs of the calibration
#: (docs/quality.md) these catch most structures below 0.7 without sending every second one back.
GOOD_FROM, FAILED_BELOW = 0.78, 0.62
#: Evidence further than this many standard deviations from the mean of the calibration counts as that far: beyond what
#: it was fitted on a straight line says nothing.
_FARTHEST = 3.0
#: Confidence of a registration below which the scans are hardly of the same part of the body. 90 pairs that belong
#: together had 0.48 and more; of 14 pairs of different parts, 10 had less (docs/cohorts.md), and two abdomens by CT and
#: MR 0.40: it is no sure sign.
LEAST_CONFIDENCE = 0.45

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


@dataclass(frozen=True)
class Regression:
    """A linear estimate of the Dice coefficient from evidence.

    Parameters
    ----------
    names : tuple of str
        Fields of :class:`Evidence`.
    mean, deviation, weight : tuple of float
        Of each: over the pairs it was fitted on, and what a standard deviation of it adds.
    level : float
        Mean Dice over these pairs.
    below, above : float
        How far the Dice of four structures in five lies from the estimate at most, on pairs left out of the fit.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    weight: tuple[float, ...]
    level: float
    below: float
    above: float

    def shares(self, evidence: Evidence) -> dict[str, float]:
        """What each piece of evidence adds to the level."""
        return {
            name: weight * float(np.clip((getattr(evidence, name) - mean) / deviation, -_FARTHEST, _FARTHEST))
            for name, mean, deviation, weight in zip(self.names, self.mean, self.deviation, self.weight, strict=True)
        }


@cache
def regressions() -> Mapping[str, Regression]:
    """The estimates, by what they are for: "builtin", another "model", or "none"."""
    text = resources.files(__package__).joinpath(_COEFFICIENTS).read_text(encoding="utf-8")
    adapter = TypeAdapter(dict[str, Regression])
    return adapter.validate_python(json.loads(text)["regressions"])


@dataclass(frozen=True)
class StructureQuality:
    """What is thought of one structure of a result.

    Parameters
    ----------
    verdict : {"good", "review", "failed"}
    reason : str
        In words: why, or what speaks most against it.
    estimated_dice : float or None
        In [0, 1]; None where there is nothing to estimate from.
    low, high : float or None
        Four structures in five have their Dice between these.
    evidence : Evidence or None
    """

    verdict: Verdict
    reason: str
    estimated_dice: float | None = None
    low: float | None = None
    high: float | None = None
    evidence: Evidence | None = None

    def summary(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "estimated_dice": _rounded(self.estimated_dice),
            "low": _rounded(self.low),
            "high": _rounded(self.high),
            "evidence": None
            if self.evidence is None
            else {name: _rounded(value) for name, value in asdict(self.evidence).items()},
        }


def judge(evidence: Evidence, model: str, confidence: float) -> StructureQuality:
    """Estimate the Dice of one structure and say what to do with it.

    Parameters
    ----------
    evidence : Evidence
    model : str
        Name of the model, or "none".
    confidence : float
        Of the registration.
    """
    regression = regressions().get(model, regressions()["model"])
    shares = regression.shares(evidence)
    estimate = float(np.clip(regression.level + sum(shares.values()), 0, 1))
    low, high = max(estimate - regression.below, 0.0), min(estimate + regression.above, 1.0)
    if confidence < LEAST_CONFIDENCE:
        reason = f"the scans hardly agree (confidence {confidence:.2f}): is it the same part of the body?"
        return StructureQuality("failed", reason, estimate, low, high, evidence)
    verdict: Verdict = "good" if estimate >= GOOD_FROM else "failed" if estimate < FAILED_BELOW else "review"
    worst = min(shares, key=lambda name: shares[name])
    reason = f"estimated Dice {estimate:.2f}"
    if verdict != "good" and shares[worst] < 0:
        reason += f"; {_in_words(worst, evidence)}"
    return StructureQuality(verdict, reason, estimate, low, high, evidence)


def _in_words(name: str, evidence: Evidence) -> str:
    """What a piece of evidence says against a structure."""
    value = getattr(evidence, name)
    larger = float(np.exp(evidence.volume_change))
    words = {
        "agreement": f"warped atlas and result overlap by {value:.2f} only",
        "certainty": f"the model is not sure of it (certainty {value:.2f})",
        "volume_change": f"its volume is {larger:.2f} times the atlas's",
        "volume_off": f"its volume is {larger:.2f} times the atlas's",
        "size": "structures of its size are found less well",
        "brightness_off": f"its brightness differs from the atlas's by {value:.0%} of the range",
        "spread": f"its brightness varies by {value:.0%} of the range",
        "spread_off": f"its brightness varies otherwise than the atlas's (by {value:.0%} of the range)",
        "contrast_off": f"its contrast to its surroundings differs from the atlas's by {value:.0%} of the range",
        "separation_off": "it stands out from its surroundings otherwise than in the atlas",
        "separation_product": "it hardly stands out from its surroundings, or otherwise than in the atlas",
        "unlikeness": "query and warped atlas look little alike around it",
        "unlikeness_relative": "query and warped atlas look less alike around it than elsewhere",
        "unlikeness_overall": "query and warped atlas look little alike",
        "moved": f"the deformation moved it by {value:.2f} of its size",
        "drawn": f"the result lies {value:.2f} of its size off the warped atlas",
    }
    return words[name]


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several; "review" if there is none."""
    return max(verdicts, key=VERDICTS.index, default="review")


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)
