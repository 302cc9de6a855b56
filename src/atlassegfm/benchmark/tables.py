"""What a benchmark leaves behind: tables of all scores and costs, a summary, a page to read, and plots.

``results.csv`` and ``summary.json`` hold scores alone and are the same to the last byte whether a run was
interrupted or not; what it cost, which no two runs agree on, is in ``times.csv`` and in the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.files import atomic_path
from ..core.labels import listed
from ..evaluate.scores import CaseScore
from ..evaluate.statistics import LEVEL, Interval, Spread, macro_mean, paired_bootstrap, spread
from ..evaluate.summary import SMALL_ML, Summary, plain_number, plain_row, score_row, summarise, write_scores
from .plan import PLAN, Plan
from .protocols import Pair
from .records import PairRecord as Record
from .records import Row

#: Scores that methods are compared by.
_COMPARED = ("dice", "nsd")
#: Tables of single structures grow no longer than this; all are in results.csv.
_LONGEST_TABLE = 40
#: As tables and plots name them.
METHOD_NAMES: Mapping[str, str] = {
    "atlas": "atlas only",
    "model": "model",
    "paper": "paper gate",
    "fused": "fused",
    "oracle": "oracle",
}


@dataclass(frozen=True, eq=False)
class Column:
    """One method of one variant, over all pairs.

    Parameters
    ----------
    variant, method : str
        Their names.
    pairs : tuple of Pair
        In the order of the plan.
    rows : tuple of Row
        Pair by pair.
    """

    variant: str
    method: str
    pairs: tuple[Pair, ...]
    rows: tuple[Row, ...]

    @cached_property
    def summary(self) -> Summary:
        """Over all pairs."""
        return summarise([CaseScore(row.case, row.value, row.structure, row.scores) for row in self.rows])

    def table(self, score: str) -> NDArray[np.float64]:
        """(structures, pairs) of one score; NaN where there is none."""
        values = sorted({row.value for row in self.rows})
        line = {value: n for n, value in enumerate(values)}
        per_pair = len(self.rows) // len(self.pairs)
        table = np.full((len(values), len(self.pairs)), math.nan)
        for n, row in enumerate(self.rows):
            number = getattr(row.scores, score)
            table[line[row.value], n // per_pair] = math.nan if number is None else number
        return table

    def pair_means(self, score: str = "dice") -> NDArray[np.float64]:
        """(pairs,) mean over the structures of each pair."""
        table = self.table(score)
        known = ~np.isnan(table)
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = np.where(known, table, 0).sum(axis=0) / known.sum(axis=0)
        return means

    def over_atlases(self, score: str = "dice") -> Spread:
        """How the mean depends on the atlas."""
        table = self.table(score)
        atlases = [pair.atlas for pair in self.pairs]
        return spread([self._of_atlas(table, atlases, atlas) for atlas in dict.fromkeys(atlases)])

    def of_atlas(self, atlas: str, score: str = "dice") -> float:
        """The mean over the pairs of one atlas."""
        return self._of_atlas(self.table(score), [pair.atlas for pair in self.pairs], atlas)

    @staticmethod
    def _of_atlas(table: NDArray[np.float64], atlases: Sequence[str], atlas: str) -> float:
        return macro_mean(table[:, [n for n, one in enumerate(atlases) if one == atlas]])


@dataclass(frozen=True)
class Comparison:
    """One column less another.

    Parameters
    ----------
    score : str
        Which score.
    first, second : Column
        The columns.
    interval : Interval
        The difference of their means.
    """

    score: str
    first: Column
    second: Column
    interval: Interval


def columns_of(plan: Plan, records: Sequence[Record]) -> list[Column]:
    """The columns of a benchmark, variant by variant."""
    columns = []
    for variant in plan.variants:
        done = {record.pair: record for record in records if record.variant == variant.name}
        for method in variant.scored:
            if method in variant.methods:
                rows = [row for pair in plan.pairs for row in done[pair].rows if row.method == method]
                columns.append(Column(variant.name, method, plan.pairs, tuple(rows)))
    return columns


def compare_columns(columns: Sequence[Column], seed: int) -> list[Comparison]:
    """Every column less every one before it."""
    comparisons = []
    for score in _COMPARED:
        for before, column in combinations(columns, 2):
            pairs = column.pairs
            interval = paired_bootstrap(
                column.table(score),
                before.table(score),
                [pair.query for pair in pairs],
                [pair.atlas for pair in pairs],
                seed=seed,
            )
            comparisons.append(Comparison(score, column, before, interval))
    return comparisons


def write_reports(plan: Plan, records: Sequence[Record], out: Path, *, plots: bool = True) -> dict[str, Any]:
    """Write all tables of a benchmark into its folder.

    Parameters
    ----------
    plan : Plan
        What was run.
    records : sequence of Record
        All of it.
    out : Path
        The folder.
    plots : bool
        Whether to draw ``dice.png`` and ``dice-time.png`` too.

    Returns
    -------
    dict
        The content of ``summary.json``.

    Raises
    ------
    InputError
        If the disk refuses.
    MissingExtraError
        If plots are wanted and matplotlib is not installed.
    """
    columns = columns_of(plan, records)
    comparisons = compare_columns(columns, plan.seed)
    write_scores(out / "results.csv", _score_rows(records))
    write_scores(out / "times.csv", _cost_rows(records))
    summary = _summary(plan, records, columns, comparisons, out)
    _write(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(out / "report.md", "\n".join(_page(plan, records, columns, comparisons, plots=plots)) + "\n")
    if plots:
        from .plots import draw_dice, draw_dice_and_time

        draw_dice(columns, plan.dataset.name, out / "dice.png")
        draw_dice_and_time(columns, records, plan.dataset.name, out / "dice-time.png")
    return summary


def title_of(column: Column, *, several: bool = True) -> str:
    """What a column is called."""
    method = METHOD_NAMES[column.method]
    return f"{column.variant}: {method}" if several else method


def main_table(columns: Sequence[Column]) -> list[list[str]]:
    """Head and a line for each column, for a table on the screen."""
    several = len({column.variant for column in columns}) > 1
    lines = [[*(["variant"] if several else []), "method", "Dice", "sd atlases", "worst pair", "NSD", "HD95 mm"]]
    for column in columns:
        means = column.summary.means
        lines.append(
            [
                *([column.variant] if several else []),
                METHOD_NAMES[column.method],
                _decimal(means["dice"], 4),
                _decimal(column.over_atlases().sd, 3),
                _decimal(_least(column.pair_means()), 3),
                _decimal(means["nsd"], 3),
                _decimal(means["hd95_mm"], 1),
            ]
        )
    return lines


def _score_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {"variant": record.variant, "atlas": record.pair.atlas, "query": record.pair.query}
        | {"method": row.method, "value": row.value, "structure": row.structure}
        | score_row(row.scores)
        for record in records
        for row in record.rows
    ]


def _cost_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    stages = list(dict.fromkeys(stage for record in records for stage in record.seconds))
    return [
        {
            "variant": record.variant,
            "atlas": record.pair.atlas,
            "query": record.pair.query,
            "failure": record.failure,
            "seconds": record.total_seconds,
            "peak_memory_mb": record.peak_memory_mb,
            "gpu_memory_mb": record.gpu_memory_mb,
            "confidence": record.confidence,
            "folding": record.folding,
        }
        | {f"{stage} seconds": record.seconds.get(stage) for stage in stages}
        for record in records
    ]


def _summary(
    plan: Plan, records: Sequence[Record], columns: Sequence[Column], comparisons: Sequence[Comparison], out: Path
) -> dict[str, Any]:
    return {
        "benchmark": plan.title,
        # What the pairs were made with: the sources may have changed since.
        **json.loads((out / PLAN).read_text(encoding="utf-8")),
        "pairs": [[pair.atlas, pair.query] for pair in plan.pairs],
        "seed": plan.seed,
        "tolerances": plan.tolerances.origin,
        "unnamed_label_values": sorted({value for record in records for value in record.unnamed}),
        "failures": [
            {"variant": one.variant, "atlas": one.pair.atlas, "query": one.pair.query, "reason": one.failure}
            for one in records
            if one.failure
        ],
        "columns": [
            {
                "variant": column.variant,
                "method": column.method,
                **column.summary.to_dict(),
                "over_pairs": {"dice": plain_row(vars(spread(column.pair_means())))},
                "over_atlases": {"dice": plain_row(vars(column.over_atlases()))},
                "atlases": {
                    atlas: plain_number(column.of_atlas(atlas))
                    for atlas in dict.fromkeys(pair.atlas for pair in column.pairs)
                },
            }
            for column in columns
        ],
        "comparisons": [
            {
                "score": one.score,
                "first": [one.first.variant, one.first.method],
                "second": [one.second.variant, one.second.method],
                **plain_row(vars(one.interval)),
            }
            for one in comparisons
        ],
    }


def _page(
    plan: Plan,
    records: Sequence[Record],
    columns: Sequence[Column],
    comparisons: Sequence[Comparison],
    *,
    plots: bool,
) -> Iterable[str]:
    several = len(plan.variants) > 1
    atlases = list(dict.fromkeys(pair.atlas for pair in plan.pairs))
    yield f"# {plan.dataset.name}: {plan.title}"
    yield ""
    if plan.command:
        yield f"```sh\n{plan.command}\n```"
        yield ""
    yield (
        f"{_count(plan.pairs, 'pair', 'pairs')}, {_count(atlases, 'atlas', 'atlases')}, "
        f"{_count({pair.query for pair in plan.pairs}, 'query', 'queries')}. NSD at {plan.tolerances.origin}; HD95 on "
        "surface elements, the larger of both directions. Means over the cases of each structure, then over structures."
    )
    yield ""
    taken = listed([f"{name} ({value})" for value, name in plan.names.items()], _LONGEST_TABLE)
    yield f"Structures: {taken}."
    left = [name for value, name in plan.dataset.structures.items() if value not in plan.values]
    if left:
        yield f"Left out on request: {listed(left, _LONGEST_TABLE)}."
    unnamed = sorted({value for record in records for value in record.unnamed})
    if unnamed:
        found = ", ".join(map(str, unnamed))
        yield f"Label values that dataset.json does not name, taken as background where a case has them: {found}."
    yield ""
    yield "## Methods"
    yield ""
    yield from _markdown(main_table(columns), words=2 if several else 1)
    yield ""
    yield _statuses(columns, several=several)
    failed = [record for record in records if record.failure]
    for record in failed:
        yield f"Failed: {record.pair.atlas} -> {record.pair.query} ({record.variant}): {record.failure}"
    yield ""
    yield from _differences(comparisons, several=several)
    yield from _per_structure(columns, several=several)
    yield from _per_atlas(columns, atlases, several=several)
    yield from _costs(plan, records)
    if plots:
        yield "![Dice of each structure](dice.png)"
        yield ""
        yield "![Dice against time](dice-time.png)"


def _statuses(columns: Sequence[Column], *, several: bool) -> str:
    parts = []
    for column in columns:
        counts = {status: n for status, n in column.summary.counts.items() if n}
        words = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.items())
        parts.append(f"{title_of(column, several=several)}: {words}")
    return f"Structures of pairs by status: {'; '.join(parts)}."


def _differences(comparisons: Sequence[Comparison], *, several: bool) -> Iterable[str]:
    if not comparisons:
        return
    yield "## Differences"
    yield ""
    yield (
        f"Paired bootstrap over queries and atlases, {LEVEL:.0%} intervals, of the mean over structures. "
        "All are in summary.json; here are the methods of one variant, and one method over variants."
    )
    yield ""
    lines = [["difference", *(f"{score.upper() if score == 'nsd' else score.title()}" for score in _COMPARED)]]
    by_columns: dict[tuple[int, int], dict[str, Interval]] = {}
    titles = {}
    for one in comparisons:
        if one.first.variant == one.second.variant or one.first.method == one.second.method:
            key = (id(one.first), id(one.second))
            by_columns.setdefault(key, {})[one.score] = one.interval
            titles[key] = f"{title_of(one.first, several=several)} − {title_of(one.second, several=several)}"
    for key, intervals in by_columns.items():
        cells = [
            f"{_signed(i.difference)} ({_signed(i.low)} to {_signed(i.high)})"
            for i in (intervals[score] for score in _COMPARED)
        ]
        lines.append([titles[key], *cells])
    yield from _markdown(lines)
    yield ""


def _per_structure(columns: Sequence[Column], *, several: bool) -> Iterable[str]:
    yield "## Dice of each structure"
    yield ""
    first = columns[0].summary.structures
    shown = first[:_LONGEST_TABLE]
    lines = [["structure", "ml", *(title_of(column, several=several) for column in columns)]]
    for n, one in enumerate(shown):
        cells = []
        for column in columns:
            dice = column.summary.structures[n].scores["dice"]
            cells.append(_decimal(dice.mean, 3) + ("" if math.isnan(dice.sd) else f" ± {dice.sd:.3f}"))
        lines.append([one.structure, _decimal(one.reference_ml, 1), *cells])
    small = columns[0].summary.small
    if small and len(small) < len(first):
        cells = [_decimal(column.summary.small_means["dice"], 3) for column in columns]
        lines.append([f"mean of those below {SMALL_ML:g} ml ({len(small)})", "", *cells])
    lines.append(["mean", "", *(_decimal(column.summary.means["dice"], 4) for column in columns)])
    yield from _markdown(lines)
    if len(first) > len(shown):
        yield ""
        yield f"The other {len(first) - len(shown)} structures are in results.csv."
    if any(column.summary.counts["both_empty"] for column in columns):
        yield ""
        yield (
            "Where result and reference both lack a structure it is left out above; counted as perfect the means are "
            + (
                ", ".join(
                    f"{title_of(column, several=several)} {_decimal(column.summary.means_with_empty['dice'], 4)}"
                    for column in columns
                )
                + "."
            )
        )
    yield ""


def _per_atlas(columns: Sequence[Column], atlases: Sequence[str], *, several: bool) -> Iterable[str]:
    if len(atlases) < 2:
        return
    yield "## Dice of each atlas"
    yield ""
    lines = [["atlas", *(title_of(column, several=several) for column in columns)]]
    lines += [[atlas, *(_decimal(column.of_atlas(atlas), 3) for column in columns)] for atlas in atlases]
    spreads = [column.over_atlases() for column in columns]
    lines.append(["mean ± sd", *(f"{_decimal(one.mean, 3)} ± {_decimal(one.sd, 3)}" for one in spreads)])
    yield from _markdown(lines)
    yield ""


def _costs(plan: Plan, records: Sequence[Record]) -> Iterable[str]:
    yield "## Cost of a pair"
    yield ""
    yield f"Seconds of wall time on {plan.device}, files already read; mean over pairs, and the slowest pair."
    yield ""
    stages = list(dict.fromkeys(s for record in records for s in record.seconds if not s.startswith("registration: ")))
    head = ["variant", "seconds", "slowest", *stages, "peak MB", *(["GPU MB"] if plan.device == "cuda" else [])]
    lines = [head]
    for variant in plan.variants:
        done = [one for one in records if one.variant == variant.name and not one.failure]
        if not done:
            continue
        totals = [one.total_seconds for one in done]
        cells = [_decimal(float(np.mean([one.seconds.get(stage, 0.0) for one in done])), 1) for stage in stages]
        memory = [max((one.peak_memory_mb or 0 for one in done), default=0)]
        memory += [max((one.gpu_memory_mb or 0 for one in done), default=0)] if plan.device == "cuda" else []
        numbers = [f"{np.mean(totals):.1f}", f"{max(totals):.1f}", *cells, *map(str, memory)]
        lines.append([variant.name, *numbers])
    yield from _markdown(lines)
    yield ""


def _markdown(lines: Sequence[Sequence[str]], words: int = 1) -> Iterable[str]:
    """A table; all but the first ``words`` columns to the right."""
    head, *rest = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if n < words else "---:" for n in range(len(head))) + "|"
    for line in rest:
        yield "| " + " | ".join(line) + " |"


def _count(things: Collection[Any], one: str, several: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else several}"


def _decimal(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _signed(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")  # no −0.000


def _least(values: NDArray[np.float64]) -> float:
    return math.nan if np.isnan(values).all() else float(np.nanmin(values))


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
