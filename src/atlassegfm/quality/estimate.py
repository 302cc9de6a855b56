"""Dice estimated from evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from pydantic import TypeAdapter

from .evidence import Evidence

#: Written by ``benchmarks/quality.py``.
_COEFFICIENTS = "calibration.json"


#: Evidence further than this many standard deviations from the mean of the calibration counts as that far: beyond what
#: it was fitted on a straight line says nothing.
_FARTHEST = 3.0


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
