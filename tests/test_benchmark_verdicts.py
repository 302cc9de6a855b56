"""What a benchmark says of verdicts: known answers, and SciPy as the oracle of the AUROC."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from atlassegfm.benchmark import Row
from atlassegfm.benchmark.verdicts import auroc, triage, verdict_summary
from atlassegfm.evaluate.metrics import StructureScores

RESULTS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30)


@given(RESULTS)
def test_auroc_is_that_of_the_rank_sum(results: list[tuple[int, bool]]) -> None:
    estimates = np.array([one / 5 for one, _ in results])
    is_bad = np.array([bad for _, bad in results])
    found = auroc(estimates, is_bad)
    if is_bad.all() or not is_bad.any():
        assert math.isnan(found)
    else:
        wins = mannwhitneyu(estimates[~is_bad], estimates[is_bad]).statistic
        assert found == pytest.approx(wins / (is_bad.sum() * (~is_bad).sum()))


@given(RESULTS)
def test_triage_finds_what_it_promises(results: list[tuple[int, bool]]) -> None:
    estimates = np.array([one / 5 for one, _ in results])
    is_bad = np.array([bad for _, bad in results])
    fraction = triage(estimates, is_bad)
    if not is_bad.any():
        assert math.isnan(fraction)
        return
    looked_at = round(fraction * len(results))
    found = [bad for _, bad in sorted(zip(estimates, is_bad, strict=True), key=lambda one: one[0])[:looked_at]]
    assert found[-1]  # one fewer would not do
    assert sum(found) >= 0.95 * is_bad.sum() > sum(found) - 1


def row(name: str, dice: float, estimate: float | None, verdict: str | None) -> Row:
    scores = StructureScores("ok", dice, dice, 1.0, 1.0, 1.0, 1.0, 10, 10, 0.1, 0.1, None, "")
    return Row("case", 1, name, scores, "fused", estimate, verdict)


def test_summary_of_verdicts() -> None:
    """The lost one has no estimate, as it was not found; the last one was not judged."""
    found = verdict_summary(
        [
            row("a", 0.9, 0.88, "good"),
            row("b", 0.6, 0.8, "good"),
            row("c", 0.8, 0.5, "review"),
            row("d", 0.2, None, "absent"),
            row("e", 0.1, None, None),
        ]
    )
    assert found is not None
    assert found["verdicts"]["good"] == {"structures": 2, "dice": pytest.approx(0.75), "bad": 1, "lost": 0}
    assert found["verdicts"]["absent"]["lost"] == 1
    assert (found["structures"], found["bad"], found["bad_but_good"], found["not_good"]) == (4, 2, 1, 0.5)
    assert found["auroc"] == pytest.approx(3 / 4)
    assert found["looked_at"] == pytest.approx(3 / 4)
    assert found["error"] == pytest.approx((0.02 + 0.2 + 0.3 + 0.2) / 4)
    assert verdict_summary([row("e", 0.1, None, None)]) is None
