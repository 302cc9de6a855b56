"""Verdict on each structure of a result: good, review or failed, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .coverage import CUT_FRACTION
from .estimate import regressions
from .evidence import Evidence

Verdict = Literal["good", "review", "failed"]
#: From best to worst.
VERDICTS: tuple[Verdict, ...] = ("good", "review", "failed")
#: Estimated Dice from which on a structure is good, and below which it failed: in the calibration they flag most
#: structures below 0.7, and less than half of all.
GOOD_FROM, FAILED_BELOW = 0.78, 0.62
#: Confidence of a registration below which the scans probably show different parts of the body.
LEAST_CONFIDENCE = 0.45
#: Objection to a structure by piece of evidence; {value} is the evidence, {factor} the change of volume.
_REASONS = {
    "agreement": "warped atlas and result overlap by {value:.2f} only",
    "certainty": "the model is not sure of it (certainty {value:.2f})",
    "volume_change": "its volume is {factor:.2f} times the atlas's",
    "abs_volume_change": "its volume is {factor:.2f} times the atlas's",
    "log_volume": "structures of its size are found less reliably",
    "brightness_difference": "its brightness differs from the atlas's by {value:.0%} of the intensity range",
    "brightness_iqr": "its brightness varies by {value:.0%} of the intensity range",
    "iqr_difference": "the variation of its brightness differs from the atlas's by {value:.0%} of the intensity range",
    "contrast_difference": "its contrast to its surroundings differs from the atlas's by {value:.0%} of the intensity "
    "range",
    "separation_difference": "its contrast to its surroundings differs from the atlas's",
    "separation_product": "its contrast to its surroundings is low, or differs from the atlas's",
    "dissimilarity": "query and warped atlas differ around it",
    "dissimilarity_relative": "query and warped atlas differ more around it than elsewhere",
    "dissimilarity_overall": "query and warped atlas differ",
    "displacement": "the deformation moved it by {value:.2f} of its size",
    "offset": "the result lies {value:.2f} of its size off the warped atlas",
}


@dataclass(frozen=True)
class StructureQuality:
    """Estimated quality of one structure.

    Parameters
    ----------
    verdict : {"good", "review", "failed"}
    reason : str
        Why, or the evidence that lowers the estimate most.
    estimated_dice : float or None
        In [0, 1]; None without evidence.
    low, high : float or None
        80 % interval of the Dice.
    evidence : Evidence or None
    """

    verdict: Verdict
    reason: str
    estimated_dice: float | None = None
    low: float | None = None
    high: float | None = None
    evidence: Evidence | None = None


def judge(evidence: Evidence, model: str, confidence: float, outside: float = 0.0) -> StructureQuality:
    """Estimate the Dice of one structure and give a verdict.

    ``model`` is the model's name or "none", ``confidence`` that of the registration, in [0, 1],
    ``outside`` the fraction of the structure outside the field of view, which the reason names from 0.1 on.
    """
    regression = regressions().get(model, regressions()["model"])
    estimate = regression.estimate(evidence)
    low, high = max(estimate - regression.below, 0.0), min(estimate + regression.above, 1.0)
    verdict: Verdict = "good" if estimate >= GOOD_FROM else "failed" if estimate < FAILED_BELOW else "review"
    reason = f"estimated Dice {estimate:.2f}"
    if confidence < LEAST_CONFIDENCE:
        verdict = "failed"
        reason = f"the scans differ widely (confidence {confidence:.2f}): do they show the same part of the body?"
    elif verdict != "good":
        contributions = regression.contributions(evidence)
        worst = min(contributions, key=lambda name: contributions[name])
        if contributions[worst] < 0:
            reason += f"; {explain(worst, evidence)}"
    if outside >= CUT_FRACTION:
        reason = f"{outside:.0%} of it lies outside the field of view, so that its volume is too small; {reason}"
    return StructureQuality(verdict, reason, estimate, low, high, evidence)


def explain(name: str, evidence: Evidence) -> str:
    """Describe the objection to a structure by the piece of evidence called ``name``."""
    return _REASONS[name].format(value=getattr(evidence, name), factor=math.exp(evidence.volume_change))


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of several verdicts; "review" if there are none."""
    return max(verdicts, key=VERDICTS.index, default="review")
