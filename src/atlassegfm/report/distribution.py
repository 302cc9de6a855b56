"""Distributions of one quantity over a cohort: outliers, and small plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A volume is an outlier if the modified z-score of its logarithm is larger (Iglewicz and Hoaglin 1993): 0.6745 times
#: the distance from the median over the median absolute deviation.
OUTLIER_Z, _Z_FACTOR = 3.5, 0.6745
#: Fewest cases to look for outliers in.
FEWEST_CASES = 5
#: Smallest deviation of log volumes: an outlier is at least 1.7 times the median, or at most 0.6 times.
_SMALLEST_DEVIATION = 0.1
#: Up to this number each case is a dot; more are a histogram.
_MOST_DOTS = 80
_BINS = 40
#: Width (free and fixed range) and height of a plot, px, and its inner margin.
_WIDTH, _FIXED_WIDTH, _HEIGHT, _INSET = 260, 150, 34, 5


@dataclass(frozen=True, eq=False)
class Distribution:
    """Values over the cases: name of the case, value, and whether it is an outlier."""

    names: list[str]
    values: NDArray[np.float64]
    is_outlier: NDArray[np.bool_]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, float]], *, find_outliers: bool = False) -> Distribution:
        """Build it from names and values."""
        listed = list(pairs)
        values = np.array([value for _, value in listed], np.float64)
        is_outlier = outliers(values) if find_outliers else np.zeros(len(values), bool)
        return cls([name for name, _ in listed], values, is_outlier)

    @cached_property
    def median(self) -> float | None:
        """None without values."""
        return float(np.median(self.values)) if len(self.values) else None

    @property
    def quartiles(self) -> tuple[float, float]:
        """25th and 75th percentile."""
        low, high = np.percentile(self.values, (25, 75))
        return float(low), float(high)

    @cached_property
    def outlier_factors(self) -> dict[str, float]:
        """Name of each case whose value is an outlier, and its value over the median."""
        factors = (self.values / (self.median or 1.0)).tolist()
        rows = zip(self.names, factors, self.is_outlier, strict=True)
        return {name: factor for name, factor, is_outlier in rows if is_outlier}


def outliers(volumes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Find volumes, (N,) above 0, that differ from the others by a large factor; none among fewer than five."""
    if len(volumes) < FEWEST_CASES:
        return np.zeros(len(volumes), bool)
    logs = np.log(volumes)
    distance = np.abs(logs - np.median(logs))
    deviation = max(float(np.median(distance)), _SMALLEST_DEVIATION)
    return np.asarray(_Z_FACTOR * distance / deviation > OUTLIER_Z)


def plot(found: Distribution, limits: tuple[float, float] | None = None) -> dict[str, Any] | None:
    """Lay out the plot of a distribution, with ``limits`` or the range of its values; None without values.

    Lengths are px: box of the quartiles, and dots (x, y, is_outlier, title) or columns (left edge, height, width).
    """
    values = found.values
    if not len(values):
        return None
    first, last = limits or (float(values.min()), float(values.max()))
    if last <= first:
        first, last = first * 0.9 - 1e-3, last * 1.1 + 1e-3
    width = _WIDTH if limits is None else _FIXED_WIDTH
    base, inner = _HEIGHT - 12, width - 2 * _INSET

    def x(value: float) -> float:
        return _INSET + inner * (value - first) / (last - first)

    as_dots = len(values) <= _MOST_DOTS
    # The row of a dot sets nearly equal values apart.
    rows = [7 + (number * 5) % (base - 13) if as_dots else base - 4 for number in range(len(values))]
    dots = [
        (x(value), row, far, f"{name}: {value:.4g}")
        for name, value, far, row in zip(found.names, values.tolist(), found.is_outlier.tolist(), rows, strict=True)
        if as_dots or far
    ]
    counts, edges = np.histogram(values, _BINS, (first, last))
    columns = [
        (x(float(edge)), max(1.0, (base - 4) * count / counts.max()), inner / _BINS - 0.6)
        for count, edge in zip(counts, edges[:-1], strict=True)
        if count and not as_dots
    ]
    quartiles = [x(value) for value in np.percentile(values, (25, 50, 75)).tolist()]
    size = {"width": width, "height": _HEIGHT, "base": base, "first": _tick(first), "last": _tick(last)}
    return {**size, "quartiles": quartiles, "dots": dots, "columns": columns}


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.3g}"
