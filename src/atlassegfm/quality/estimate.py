"""Dice coefficient estimated from evidence: a linear score, and a monotone curve from scores to coefficients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from pydantic import TypeAdapter

from .evidence import Evidence

#: Written by ``benchmarks/quality.py --write``.
CALIBRATION = "calibration.json"
#: Evidence is clipped to this many standard deviations from its mean: the regression does not extrapolate.
MAX_DEVIATIONS = 3.0
#: Structures at least so thin (:attr:`.Evidence.thinness`) have a calibration of their own: most cortical
#: areas. A border one voxel too far out leaves a Dice of 2 / (2 + 1.4) = 0.59. Organs, parts of the heart and the
#: hippocampus stay below.
THIN_FROM = 1.4
#: What the names of these calibrations begin with.
THIN = "thin "


@dataclass(frozen=True)
class Term:
    """One piece of evidence: mean and standard deviation in the calibration, and score per standard deviation."""

    mean: float
    deviation: float
    weight: float


@dataclass(frozen=True)
class Regression:
    """Estimate of the Dice coefficient."""

    level: float  # mean score in the calibration
    curve: tuple[tuple[float, float], ...]  # scores and Dice coefficients, both rising, linear between
    below: float  # width of the 80 % interval below the estimate, from pairs left out of the fit
    above: float  # the same above it
    good_from: float  # estimate from which on a structure is good: at most 5 % of those with a Dice below 0.7 are
    failed_below: float  # estimate below which it failed: at least half of these have a Dice below 0.7
    terms: Mapping[str, Term]  # by field of :class:`.Evidence`

    def contributions(self, evidence: Evidence) -> dict[str, float]:
        """Compute what each piece of evidence adds to the score."""
        return {
            name: term.weight
            * float(np.clip((getattr(evidence, name) - term.mean) / term.deviation, -MAX_DEVIATIONS, MAX_DEVIATIONS))
            for name, term in self.terms.items()
        }

    def score(self, evidence: Evidence) -> float:
        """Compute the linear score: higher is better."""
        return self.level + sum(self.contributions(evidence).values())

    def estimate(self, evidence: Evidence) -> float:
        """Estimate the Dice coefficient, in [0, 1]."""
        scores, dices = np.array(self.curve).T
        return float(np.interp(self.score(evidence), scores, dices))


@cache
def regressions() -> Mapping[str, Regression]:
    """Load the regressions by model: those measured by name or names, any other as "model", and "none".

    Those with names that begin with :data:`THIN` are for thin structures.
    """
    text = resources.files(__package__).joinpath(CALIBRATION).read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Regression]).validate_python(json.loads(text)["regressions"])


def regression_of(model: str, evidence: Evidence) -> Regression:
    """Return the regression for a structure in a result of this model, or of "none"."""
    kind = THIN if evidence.thinness >= THIN_FROM else ""
    found = regressions()
    return found.get(f"{kind}{model}", found[f"{kind}model"])
