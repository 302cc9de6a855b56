"""Spread and means worked by hand, and the bootstrap against plain loops and a full enumeration."""

from __future__ import annotations

import itertools
import math
import statistics as plain
from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlassegfm.evaluate.statistics import Interval, macro_mean, paired_bootstrap, spread

NAN = math.nan


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values, in a straight line."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def looped_bootstrap(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    clusters: Sequence[Sequence[Hashable]],
    *,
    seed: int,
    resamples: int,
) -> tuple[float, float]:
    """The interval, pair by pair; draws come in the same order."""
    random = np.random.default_rng(seed)
    draws = []
    for cluster in clusters:
        members = list(dict.fromkeys(cluster))
        table = random.multinomial(len(members), [1 / len(members)] * len(members), size=resamples)
        draws.append([dict(zip(members, row.tolist(), strict=True)) for row in table])
    totals = []
    for number in range(resamples):
        means = []
        for ones, others in zip(first, second, strict=True):
            total, weights = 0.0, 0
            for case, (one, other) in enumerate(zip(ones, others, strict=True)):
                weight = math.prod(draw[number][cluster[case]] for draw, cluster in zip(draws, clusters, strict=True))
                if not math.isnan(one - other):
                    total += weight * (one - other)
                    weights += weight
            if weights:
                means.append(total / weights)
        if means:
            totals.append(sum(means) / len(means))
    return percentile(totals, 2.5), percentile(totals, 97.5)


def test_spread_by_hand() -> None:
    one = spread([4.0, NAN, 1.0, 2.0, 3.0, NAN, 10.0])
    assert (one.count, one.mean, one.low, one.quartile, one.median, one.upper_quartile, one.high) == (
        5,
        4,
        1,
        2,
        3,
        4,
        10,
    )
    assert one.sd == pytest.approx(math.sqrt((9 + 4 + 1 + 0 + 36) / 4))


def test_spread_of_one_score_has_no_deviation() -> None:
    one = spread([NAN, 0.25])
    assert (one.count, one.mean, one.low, one.median, one.high) == (1, 0.25, 0.25, 0.25, 0.25)
    assert math.isnan(one.sd)


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_spread_of_nothing_is_nan(values: list[float]) -> None:
    one = spread(values)
    assert one.count == 0
    rest = (one.mean, one.sd, one.low, one.quartile, one.median, one.upper_quartile, one.high)
    assert all(math.isnan(number) for number in rest)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_spread_agrees_with_the_standard_library(values: list[float]) -> None:
    one = spread(np.array(values))
    assert one.mean == pytest.approx(plain.fmean(values), abs=1e-9)
    assert one.sd == pytest.approx(plain.stdev(values), abs=1e-6)
    quartiles = plain.quantiles(values, n=4, method="inclusive")
    assert (one.quartile, one.median, one.upper_quartile) == pytest.approx(tuple(quartiles), abs=1e-9)
    assert (one.low, one.high) == (min(values), max(values))


def test_macro_mean_by_hand() -> None:
    # Structures have the means 0.5, 0.2 and none: 0.35, where the mean of all five scores would be 0.38.
    table = [[0.25, 0.75, 0.5, NAN], [NAN, NAN, 0.1, 0.3], [NAN, NAN, NAN, NAN]]
    assert macro_mean(table) == pytest.approx(0.35)


@pytest.mark.parametrize("table", [[], [[]], [[NAN, NAN], [NAN, NAN]]])
def test_macro_mean_of_nothing_is_nan(table: list[list[float]]) -> None:
    assert math.isnan(macro_mean(table))


@pytest.fixture(scope="module")
def tables() -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Three structures; each of four queries by each of three atlases; some scores lack."""
    random = np.random.default_rng(5)
    pairs = list(itertools.product("abcd", "xyz"))
    first = random.uniform(0, 1, (3, len(pairs)))
    second = first - random.normal(0.1, 0.2, first.shape)
    first[0, 2], second[1, [0, 7]], first[2, 3:] = NAN, NAN, NAN
    return first, second, [query for query, _ in pairs], [atlas for _, atlas in pairs]


def test_bootstrap_agrees_with_plain_loops(tables: tuple[np.ndarray, np.ndarray, list[str], list[str]]) -> None:
    first, second, queries, atlases = tables
    for clusters in ([queries], [atlases], [queries, atlases]):
        interval = paired_bootstrap(first, second, *clusters, seed=3, resamples=300)
        expected = looped_bootstrap(first.tolist(), second.tolist(), clusters, seed=3, resamples=300)
        assert (interval.low, interval.high) == pytest.approx(expected)
        assert interval.low < interval.difference < interval.high
        assert interval.difference == pytest.approx(macro_mean(first - second))
        assert interval.clusters == min(len(set(cluster)) for cluster in clusters)


def test_bootstrap_agrees_with_all_draws_there_are() -> None:
    # Query a has three cases, the others have one: where a is drawn twice, its cases count six times.
    queries = ["a", "a", "a", "b", "c", "d", "e"]
    difference = [0.0, 3.0, 6.0, 10.0, 21.0, 33.0, 46.0]
    totals = []
    for drawn in itertools.product("abcde", repeat=5):
        values = [
            value for member in drawn for query, value in zip(queries, difference, strict=True) if query == member
        ]
        totals.append(sum(values) / len(values))
    interval = paired_bootstrap([difference], [[0.0] * 7], queries, resamples=40_000)
    assert interval.difference == pytest.approx(17)
    assert interval.low == pytest.approx(percentile(totals, 2.5), abs=0.5)
    assert interval.high == pytest.approx(percentile(totals, 97.5), abs=0.5)
    assert interval.clusters == 5


def test_bootstrap_of_independent_cases_has_the_width_of_the_theory() -> None:
    difference = np.random.default_rng(1).normal(2, 1, 400)
    interval = paired_bootstrap([difference], [np.zeros(400)], range(400))
    error = float(difference.std()) / math.sqrt(400)
    assert interval.low == pytest.approx(interval.difference - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.difference + 1.96 * error, abs=0.1 * error)


def test_correlated_cases_widen_the_interval() -> None:
    """Ten cases of each of four queries say little more than four cases."""
    random = np.random.default_rng(2)
    queries = np.repeat(np.arange(4), 10).tolist()
    difference = random.normal(0, 1, 4)[queries] + random.normal(0, 0.1, 40)
    zeros = np.zeros((1, 40))
    by_query = paired_bootstrap([difference], zeros, queries)
    by_case = paired_bootstrap([difference], zeros, range(40))
    assert by_query.high - by_query.low > 2 * (by_case.high - by_case.low)


def test_the_same_seed_gives_the_same_interval(
    tables: tuple[np.ndarray, np.ndarray, list[str], list[str]],
) -> None:
    first, second, queries, atlases = tables
    one = paired_bootstrap(first, second, queries, atlases, seed=7)
    assert one == paired_bootstrap(first, second, queries, atlases, seed=7)
    other = paired_bootstrap(first, second, queries, atlases, seed=8)
    assert other.difference == one.difference
    assert (other.low, other.high) != (one.low, one.high)


def test_names_of_clusters_do_not_matter(tables: tuple[np.ndarray, np.ndarray, list[str], list[str]]) -> None:
    first, second, queries, _ = tables
    numbered = [(ord(query), None) for query in queries]
    assert paired_bootstrap(first, second, numbered) == paired_bootstrap(first, second, queries)


def test_swapping_the_methods_turns_the_interval_around(
    tables: tuple[np.ndarray, np.ndarray, list[str], list[str]],
) -> None:
    first, second, queries, atlases = tables
    one = paired_bootstrap(first, second, queries, atlases)
    other = paired_bootstrap(second, first, queries, atlases)
    assert (other.difference, other.low, other.high) == pytest.approx((-one.difference, -one.high, -one.low))


def test_identical_methods_do_not_differ(tables: tuple[np.ndarray, np.ndarray, list[str], list[str]]) -> None:
    first, _, queries, atlases = tables
    assert paired_bootstrap(first, first, queries, atlases) == Interval(0.0, 0.0, 0.0, 3)


def test_a_constant_difference_has_no_width(tables: tuple[np.ndarray, np.ndarray, list[str], list[str]]) -> None:
    first, _, queries, atlases = tables
    interval = paired_bootstrap(first + 0.125, first, queries, atlases)
    assert (interval.difference, interval.low, interval.high) == pytest.approx((0.125, 0.125, 0.125))


def test_a_score_that_one_method_lacks_counts_for_neither() -> None:
    first = [[0.9, 0.8, NAN, 0.1], [NAN, 0.5, NAN, NAN]]
    second = [[0.7, 0.4, 0.2, NAN], [0.1, 0.4, NAN, 0.3]]
    interval = paired_bootstrap(first, second, "abcd")
    assert interval.difference == pytest.approx(((0.2 + 0.4) / 2 + 0.1) / 2)
    assert interval.clusters == 2  # nothing is known of c and d


def test_cases_without_scores_change_nothing(tables: tuple[np.ndarray, np.ndarray, list[str], list[str]]) -> None:
    first, second, queries, atlases = tables
    empty = np.full((3, 2), NAN)
    interval = paired_bootstrap(
        np.hstack([empty, first]), np.hstack([empty, second]), ["new", "newer", *queries], ["x", "other", *atlases]
    )
    assert interval == paired_bootstrap(first, second, queries, atlases)


def test_a_single_query_with_scores_has_no_interval() -> None:
    """Else it would look certain: every draw that has a score has the same one."""
    interval = paired_bootstrap([[0.5, NAN, NAN]], [[0.25, 0.5, NAN]], "abc")
    assert (interval.difference, interval.clusters) == (0.25, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("clusters", [(), ("aaa",), ("aaa", "xxx")])
def test_one_cluster_for_all_has_no_interval(clusters: tuple[str, ...]) -> None:
    interval = paired_bootstrap([[0.5, 0.75, 1.0]], [[0.25, 0.25, 0.25]], *clusters)
    assert (interval.difference, interval.clusters) == (0.5, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_a_cluster_that_is_the_same_for_all_is_not_resampled(
    tables: tuple[np.ndarray, np.ndarray, list[str], list[str]],
) -> None:
    first, second, queries, _ = tables
    alone = paired_bootstrap(first, second, queries)
    assert paired_bootstrap(first, second, ["x"] * len(queries), queries) == alone
    assert alone.clusters == 4


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (0, 3), (2, 3)])
def test_nothing_to_compare_is_nan(shape: tuple[int, int]) -> None:
    nothing = np.full(shape, NAN)
    interval = paired_bootstrap(nothing, nothing, "abc"[: shape[1]])
    assert interval.clusters == 1
    assert all(math.isnan(number) for number in (interval.difference, interval.low, interval.high))


@pytest.mark.parametrize(
    ("first", "second", "cluster"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "abc"),
        (np.zeros((2, 3)), np.zeros((1, 3)), "abc"),  # would spread to the other's shape
        (np.zeros(3), np.zeros(3), "abc"),
        (np.zeros((2, 3)), np.zeros((2, 3)), "ab"),
    ],
)
def test_tables_that_do_not_fit_are_refused(first: np.ndarray, second: np.ndarray, cluster: str) -> None:
    with pytest.raises(ValueError, match=r"tables of shape \(.*\) and \(.*\) do not fit each other and their clusters"):
        paired_bootstrap(first, second, cluster)
