"""Spread of scores, and bootstrap intervals for the difference of two methods.

Scores are averaged over the cases of each structure, then over structures: a structure that many cases lack counts as
much as one that all have.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Draws of the bootstrap: the ends of a 95 % interval then vary by about 1 % of its width.
RESAMPLES = 4000
#: Confidence level of the intervals.
LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Distribution of scores; NaN where there are none."""

    count: int  # without those that are NaN
    mean: float
    sd: float  # of a sample (n - 1); NaN for fewer than two scores
    low: float
    quartile: float
    median: float
    upper_quartile: float
    high: float


@dataclass(frozen=True)
class Interval:
    """Difference of two methods with its bootstrap interval; NaN where nothing can be compared."""

    difference: float  # first less second
    low: float  # percentile interval at :data:`LEVEL`
    high: float
    clusters: int  # smallest number of independent units resampled (queries, or atlases where there are several)


def spread(values: ArrayLike) -> Spread:
    """Describe scores, (N,), without those that are NaN."""
    numbers = _known(np.asarray(values, np.float64).ravel())
    if not len(numbers):
        return Spread(0, *(7 * [math.nan]))
    sd = float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
    low, quartile, median, upper, high = (float(n) for n in np.percentile(numbers, [0, 25, 50, 75, 100]))
    return Spread(len(numbers), float(numbers.mean()), sd, low, quartile, median, upper, high)


def mean_of(values: Iterable[float]) -> float:
    """Average scores without those that are NaN; NaN if none is left."""
    numbers = _known(np.array([*values], np.float64))
    return float(numbers.mean()) if len(numbers) else math.nan


def macro_mean(table: ArrayLike) -> float:
    """Average (structures, cases) scores over cases, then over structures; NaN are left out."""
    return mean_of(mean_of(row) for row in np.asarray(table, np.float64))


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, *clusters: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Compare two methods scored on the same cases by the pigeonhole bootstrap.

    Scores that share a query or an atlas are not independent. Queries and atlases are therefore drawn with
    replacement, independently of each other, and a pair counts as often as its query times as often as its atlas
    (A. B. Owen, Annals of Applied Statistics 1 (2007) 386). With few cases the interval is rather too narrow.

    Scores are (structures, cases); a structure of a case counts where neither score is NaN. ``clusters``, (cases,), are
    query of each case, atlas of each case; what is the same for all cases is not resampled.
    """
    one, other = (np.asarray(array, np.float64) for array in (first, second))
    if one.ndim != 2 or one.shape != other.shape or any(len(cluster) != one.shape[1] for cluster in clusters):
        raise ValueError(f"tables of shape {one.shape} and {other.shape} do not fit each other and their clusters")
    difference = one - other
    known = ~np.isnan(difference)
    # Cases without any score would make few clusters look like many.
    counting = np.flatnonzero(known.any(axis=0)).tolist()
    known = known[:, counting]
    difference = np.where(known, difference[:, counting], 0.0)
    random = np.random.default_rng(seed)
    weights = np.ones((resamples, len(counting)))
    counts = []
    for cluster in clusters:
        members = [cluster[case] for case in counting]
        index = {member: n for n, member in enumerate(dict.fromkeys(members))}
        if len(index) > 1:
            counts.append(len(index))
            drawn = random.multinomial(len(index), np.full(len(index), 1 / len(index)), size=resamples)
            weights *= drawn[:, [index[member] for member in members]]
    estimate = macro_mean(np.where(known, difference, np.nan))
    if not counts or math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan, min(counts, default=1))
    with np.errstate(invalid="ignore"):
        means = (weights @ difference.T) / (weights @ known.T)  # (resamples, structures); NaN where none was drawn
    totals = np.nanmean(means[~np.isnan(means).all(axis=1)], axis=1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = (float(n) for n in np.percentile(totals, [tail, 100 - tail]))
    return Interval(estimate, low, high, min(counts))


def _known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[~np.isnan(values)]
