"""Verdict on each structure of a result: good, review or failed, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..core.config import quality_settings
from ..settings import Settings
from .coverage import cut_remark
from .estimate import Regression, regression_of
from .evidence import Evidence

if TYPE_CHECKING:
    from ..registration import Place

#: "accepted" is what a person says; the others are estimated.
Verdict = Literal["accepted", "good", "review", "failed"]
#: From best to worst.
VERDICTS: tuple[Verdict, ...] = ("accepted", "good", "review", "failed")
#: Confidence of a registration below which the scans probably show different parts of the body.
LEAST_CONFIDENCE = 0.45
#: Reason of structures without a verdict.
NOT_JUDGED = "not judged: verdicts are calibrated for the default registration only"
#: Reason of vessels, which have no verdict.
NOT_JUDGED_TUBULAR = "not judged: verdicts are calibrated for organs, and this is a vessel"
#: Reason where the mirror image of the query fits the atlas better.
SWAPPED = "left and right of the scan seem to be swapped: its mirror image fits the atlas better"
#: A second place in the scan that matches a structure worse by less than this is named in the reason.
_CLOSE_MARGIN = 0.1
#: Objections are at least so many standard deviations of the calibration from its mean.
_NOTABLE = 0.5
#: Evidence that is an objection where it is low; all other is where it is high.
_LOW_IS_BAD = frozenset({"agreement", "certainty", "log_volume", "separation_product", "place_margin"})
#: Objection to a structure by piece of evidence: the evidence and its mean in the calibration, {factor} and {usual} as
#: ratios of volumes, {ml} and {usual_ml} as volumes.
_REASONS = {
    "agreement": "warped atlas and result overlap by a Dice of {value:.2f} (on average {mean:.2f})",
    "certainty": "the model is less certain of it than usual ({value:.2f}, on average {mean:.2f})",
    "volume_change": "its volume is {factor:.2f} times the atlas's (on average {usual:.2f})",
    "abs_volume_change": "its volume is {factor:.2f} times the atlas's (on average off by a factor of {usual:.2f})",
    "log_volume": "it is small ({ml:.1f} ml, on average {usual_ml:.0f} ml), and small ones are found less reliably",
    "thinness": "it is thin for the voxels at which scans are compared ({value:.1f}, on average {mean:.1f}), and thin "
    "ones are found less reliably",
    "brightness_difference": "its brightness differs from the atlas's by {value:.0%} of the intensity range (on "
    "average {mean:.0%})",
    "brightness_iqr": "its brightness varies by {value:.0%} of the intensity range (on average {mean:.0%})",
    "iqr_difference": "the variation of its brightness differs from the atlas's by {value:.0%} of the intensity range "
    "(on average {mean:.0%})",
    "contrast_difference": "its contrast to its surroundings differs from the atlas's by {value:.0%} of the intensity "
    "range (on average {mean:.0%})",
    "separation_difference": "its contrast to its surroundings differs from the atlas's",
    "separation_product": "its contrast to its surroundings is low, or differs from the atlas's",
    "dissimilarity": "query and warped atlas differ around it by {value:.2f} (on average {mean:.2f})",
    "dissimilarity_relative": "query and warped atlas differ around it {value:.2f} times as much as elsewhere (on "
    "average {mean:.2f})",
    "dissimilarity_overall": "query and warped atlas differ by {value:.2f} (on average {mean:.2f})",
    "displacement": "the deformation moved it by {value:.2f} of its size (on average {mean:.2f})",
    "offset": "the result lies {value:.2f} of its size off the warped atlas (on average {mean:.2f})",
    "apart": "the deformation moved it by {value:.2f} of its size against the other structures (on average {mean:.2f})",
    "blur": "fits with other weights disagree on {value:.0%} of its volume (on average {mean:.0%})",
    "place_margin": "another place in the scan matches nearly as well (worse by {value:.2f}, on average {mean:.2f})",
}


@dataclass(frozen=True)
class StructureQuality:
    """Estimated quality of one structure."""

    verdict: Verdict | None  # None where it is not judged
    reason: str  # or the evidence that lowers the estimate most; and whether the field of view cuts the structure
    estimated_dice: float | None = None  # in [0, 1]; None without evidence, or where it is not judged
    low: float | None = None  # ends of the 80 % interval of the Dice
    high: float | None = None
    evidence: Evidence | None = None


def is_calibrated(settings: Settings, *, transform_given: bool) -> bool:
    """Decide whether estimates, verdicts and the bound of the confidence hold for results of these settings."""
    return not transform_given and quality_settings(settings) == quality_settings(Settings())


def judge(
    evidence: Evidence,
    model: str,
    confidence: float,
    *,
    outside: float = 0.0,
    place: Place | None = None,
    surplus: float = 0.0,
    calibrated: bool = True,
    tubular: bool = False,
) -> StructureQuality:
    """Estimate the Dice of one structure and give a verdict; neither unless ``calibrated`` (:func:`is_calibrated`).

    A ``tubular`` structure has neither, unless the registration itself has failed: what is evidence of a good organ is
    none of a good vessel. ``model`` is its name, or "none"; ``confidence`` that of the registration, in [0, 1];
    ``outside`` the fraction of the atlas's structure outside the field of view; ``place`` where the structure search
    found it; ``surplus`` is added to the estimate.
    """
    remarks = cut_remark(outside), _place_remark(place)
    if calibrated and tubular and confidence >= LEAST_CONFIDENCE:
        return StructureQuality(None, _joined(NOT_JUDGED_TUBULAR, *remarks), evidence=evidence)
    if not calibrated:
        return StructureQuality(None, _joined(NOT_JUDGED, *remarks), evidence=evidence)
    regression = regression_of(model, evidence)
    estimate = min(max(regression.estimate(evidence) + surplus, 0.0), 1.0)
    low, high = max(estimate - regression.below, 0.0), min(estimate + regression.above, 1.0)
    good_from = regression.good_from
    verdict: Verdict = "good" if estimate >= good_from else "failed" if estimate < regression.failed_below else "review"
    reason = f"estimated Dice {estimate:.2f}"
    if confidence < LEAST_CONFIDENCE:
        verdict, reason = "failed", f"{describe_confidence(confidence)}: do the scans show the same part of the body?"
    elif verdict != "good":
        reason = _joined(f"{reason} (good from {good_from:.2f})", _worst_objection(evidence, regression))
    return StructureQuality(verdict, _joined(reason, *remarks), estimate, low, high, evidence)


def at_most(verdict: Verdict, quality: StructureQuality, reason: str) -> StructureQuality:
    """Lower a verdict, or the lack of one, to ``verdict`` where it is better, and put ``reason`` first."""
    lowered = overall([verdict, quality.verdict])
    return replace(quality, verdict=lowered, reason=_joined(reason, quality.reason))


def describe_confidence(confidence: float) -> str:
    """Say that the confidence of a registration is below its bound."""
    found = f"confidence of the registration {confidence:.2f}, usually {LEAST_CONFIDENCE} or more"
    return f"the scan hardly resembles the atlas ({found})"


def explain(name: str, evidence: Evidence, mean: float) -> str:
    """Describe the objection to a structure by the piece of evidence called ``name``, against its usual value."""
    return _REASONS[name].format(
        value=getattr(evidence, name),
        mean=mean,
        factor=math.exp(evidence.volume_change),
        usual=math.exp(mean),
        ml=math.exp(evidence.log_volume) / 1000,
        usual_ml=math.exp(mean) / 1000,
    )


def overall(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """Return the worst of several verdicts; None if none is known."""
    return max((one for one in verdicts if one is not None), key=VERDICTS.index, default=None)


def _place_remark(place: Place | None) -> str:
    if place is None or place.second_distance_mm is None or place.margin >= _CLOSE_MARGIN:
        return ""
    return f"another place in the scan, {place.second_distance_mm:.0f} mm away, matches nearly as well"


def _worst_objection(evidence: Evidence, regression: Regression) -> str:
    """Explain the objection that lowers the estimate most; empty if there is none."""
    lowering = {}
    for name, added in regression.contributions(evidence).items():
        term = regression.terms[name]
        above = (getattr(evidence, name) - term.mean) / term.deviation
        # Where the regression has a sign that nobody would expect, the evidence explains nothing.
        if added < 0 and (-above if name in _LOW_IS_BAD else above) >= _NOTABLE:
            lowering[added] = explain(name, evidence, term.mean)
    return lowering[min(lowering)] if lowering else ""


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
