"""Verdict on each structure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .estimate import regressions
from .evidence import FAILED_BELOW, GOOD_FROM, Evidence

Verdict = Literal["good", "review", "failed"]


VERDICTS: tuple[Verdict, ...] = ("good", "review", "failed")


#: Confidence of a registration below which the scans are hardly of the same part of the body. 90 pairs that belong
#: together had 0.48 and more; of 14 pairs of different parts, 10 had less (docs/cohorts.md), and two abdomens by CT and
#: MR 0.40: it is no sure sign.
LEAST_CONFIDENCE = 0.45


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
