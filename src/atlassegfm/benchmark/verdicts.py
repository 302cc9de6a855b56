"""Worth of the verdicts in a benchmark: what was estimated without labels against the true Dice coefficient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluate.summary import plain_row
from .records import Row

#: Results with a Dice coefficient below the first should not be good, below the second they are lost.
BAD, LOST = 0.7, 0.3
#: Fraction of the bad results that triage has to find.
FOUND = 0.95


def auroc(estimates: NDArray[np.float64], is_bad: NDArray[np.bool_]) -> float:
    """Compute the probability that a bad result has a lower estimate than another one; ties count half.

    NaN without bad ones, or without others.
    """
    bad, other = estimates[is_bad][:, None], estimates[~is_bad][None]
    return float(((bad < other) + 0.5 * (bad == other)).mean()) if bad.size and other.size else math.nan


def triage(estimates: NDArray[np.float64], is_bad: NDArray[np.bool_]) -> float:
    """Compute the fraction of results to look at, worst estimates first, to find :data:`FOUND` of the bad ones.

    NaN without bad ones.
    """
    if not is_bad.any():
        return math.nan
    found = np.cumsum(is_bad[np.argsort(estimates, kind="stable")]) / is_bad.sum()
    return float((np.argmax(found >= FOUND) + 1) / len(found))


def verdict_summary(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Summarise verdicts and estimates of one method; None where nothing was judged.

    A structure that was not found counts with its status as its verdict, and with an estimate of 0. Those that the
    reference does not have are left out.
    """
    judged = [row for row in rows if row.verdict is not None and not math.isnan(row.scores.dice)]
    if not judged:
        return None
    dices = np.array([row.scores.dice for row in judged])
    estimates = np.array([row.estimated_dice or 0.0 for row in judged])
    verdicts, is_bad = np.array([row.verdict for row in judged]), dices < BAD
    good = verdicts == "good"
    by_verdict = {
        name: {
            "structures": int((verdicts == name).sum()),
            "dice": float(dices[verdicts == name].mean()),
            "bad": int(is_bad[verdicts == name].sum()),
            "lost": int((dices[verdicts == name] < LOST).sum()),
        }
        for name in sorted(set(verdicts.tolist()))
    }
    totals = {
        "structures": len(judged),
        "bad": int(is_bad.sum()),
        "bad_but_good": int((is_bad & good).sum()),
        "not_good": float(1 - good.mean()),
        "auroc": auroc(estimates, is_bad),
        "looked_at": triage(estimates, is_bad),
        "error": float(np.abs(estimates - dices).mean()),
    }
    return plain_row(totals) | {"verdicts": by_verdict}
