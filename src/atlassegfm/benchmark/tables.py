"""Tables of a benchmark: scores and costs as CSV, ``summary.json``, and a page to read.

``results.csv`` and ``summary.json`` hold scores alone and are byte-identical whether a run was interrupted or not;
costs, which differ from run to run, are in ``times.csv`` and in the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from .records import PairRecord, Row

#: Scores that methods are compared by.
_COMPARED = {"dice": "Dice", "nsd": "NSD"}
#: Longest table of structures; all of them are in results.csv.
_LONGEST_TABLE = 40
#: Names of the methods in tables and plots.
METHOD_NAMES: Mapping[str, str] = {
    "atlas": "atlas only",
    "model": "model",
    "paper": "paper gate",
    "fused": "fused",
    "oracle": "oracle",
}


@dataclass(frozen=True, eq=False)
class Column:
    """Scores of one method of one variant over all pairs.

    Parameters
    ----------
    variant, method : str
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
        """Summary over all pairs."""
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

    def of_atlas(self, atlas: str, score: str = "dice") -> float:
        """Mean over the pairs of one atlas."""
        return macro_mean(self.table(score)[:, [n for n, pair in enumerate(self.pairs) if pair.atlas == atlas]])

    def over_atlases(self, score: str = "dice") -> Spread:
        """Spread of the means of the atlases."""
        return spread([self.of_atlas(atlas, score) for atlas in dict.fromkeys(pair.atlas for pair in self.pairs)])


@dataclass(frozen=True)
class Comparison:
    """Difference of two columns in one score, the first less the second."""

    score: str
    first: Column
    second: Column
    interval: Interval


def columns_of(plan: Plan, records: Sequence[PairRecord]) -> list[Column]:
    """Gather the columns of a benchmark, variant by variant."""
    columns = []
    for variant in plan.variants:
        done = {record.pair: record for record in records if record.variant == variant.name}
        for method in variant.scored:
            if method in variant.methods:
                rows = [row for pair in plan.pairs for row in done[pair].rows if row.method == method]
                columns.append(Column(variant.name, method, plan.pairs, tuple(rows)))
    return columns


def compare_columns(columns: Sequence[Column], seed: int) -> list[Comparison]:
    """Compare every column with every one before it."""
    comparisons = []
    for score in _COMPARED:
        for before, column in combinations(columns, 2):
            clusters = [[getattr(pair, name) for pair in column.pairs] for name in ("query", "atlas")]
            interval = paired_bootstrap(column.table(score), before.table(score), *clusters, seed=seed)
            comparisons.append(Comparison(score, column, before, interval))
    return comparisons


def write_reports(plan: Plan, records: Sequence[PairRecord], out: Path, *, plots: bool = True) -> dict[str, Any]:
    """Write all tables of a benchmark into its folder.

    Parameters
    ----------
    plan : Plan
    records : sequence of PairRecord
        All of the plan's.
    out : Path
        The folder.
    plots : bool
        Whether to draw ``dice.png`` and ``dice-time.png`` too.

    Returns
    -------
    dict
        Content of ``summary.json``.

    Raises
    ------
    InputError
        If a file cannot be written.
    MissingExtraError
        If plots are wanted and matplotlib is not installed.
    """
    columns = columns_of(plan, records)
    comparisons = compare_columns(columns, plan.seed)
    write_scores(out / "results.csv", _score_rows(records))
    write_scores(out / "times.csv", _cost_rows(records))
    # What the pairs were made with, as recorded then.
    made = json.loads((out / PLAN).read_text(encoding="utf-8"))
    summary = _summary(plan, records, columns, comparisons, made)
    _write(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    page = _Page(plan, records, columns, comparisons, plots=plots)
    _write(out / "report.md", "\n".join(page.lines()) + "\n")
    if plots:
        from .plots import draw_dice, draw_dice_and_time

        draw_dice(columns, plan.dataset.name, out / "dice.png")
        draw_dice_and_time(columns, records, plan.dataset.name, out / "dice-time.png")
    return summary


def title_of(column: Column, *, several: bool = True) -> str:
    """Name of a column; ``several``: with its variant."""
    method = METHOD_NAMES[column.method]
    return f"{column.variant}: {method}" if several else method


def main_table(columns: Sequence[Column]) -> list[list[str]]:
    """Head and a line for each column, for a table on the screen."""
    several = len({column.variant for column in columns}) > 1
    lines = [["method", "Dice", "sd atlases", "worst pair", "NSD", "HD95 mm"]]
    for column in columns:
        means, pairs = column.summary.means, column.pair_means()
        worst = math.nan if np.isnan(pairs).all() else float(np.nanmin(pairs))
        lines.append(
            [
                *(METHOD_NAMES[column.method], _decimal(means["dice"], 4), _decimal(column.over_atlases().sd, 3)),
                *(_decimal(worst, 3), _decimal(means["nsd"], 3), _decimal(means["hd95_mm"], 1)),
            ]
        )
    if not several:
        return lines
    return [[name, *line] for name, line in zip(["variant", *(one.variant for one in columns)], lines, strict=True)]


def _score_rows(records: Sequence[PairRecord]) -> list[dict[str, Any]]:
    return [
        {"variant": record.variant, "atlas": record.pair.atlas, "query": record.pair.query}
        | {"method": row.method, "value": row.value, "structure": row.structure}
        | score_row(row.scores)
        for record in records
        for row in record.rows
    ]


def _cost_rows(records: Sequence[PairRecord]) -> list[dict[str, Any]]:
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
    plan: Plan,
    records: Sequence[PairRecord],
    columns: Sequence[Column],
    comparisons: Sequence[Comparison],
    made: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "benchmark": plan.title,
        **made,
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


class _Page:
    """Lines of ``report.md``."""

    def __init__(
        self,
        plan: Plan,
        records: Sequence[PairRecord],
        columns: Sequence[Column],
        comparisons: Sequence[Comparison],
        *,
        plots: bool,
    ) -> None:
        self._plan, self._records, self._columns, self._comparisons = plan, records, columns, comparisons
        self._plots = plots
        self._several = len(plan.variants) > 1
        self._titles = [self._title(column) for column in columns]
        self._atlases = list(dict.fromkeys(pair.atlas for pair in plan.pairs))

    def _title(self, column: Column) -> str:
        return title_of(column, several=self._several)

    def lines(self) -> Iterator[str]:
        """The whole page."""
        yield from self._head()
        yield from self._methods()
        yield from self._differences()
        yield from self._per_structure()
        yield from self._per_atlas()
        yield from self._costs()
        if self._plots:
            yield from ("![Dice of each structure](dice.png)", "", "![Dice against time](dice-time.png)")

    def _head(self) -> Iterator[str]:
        plan = self._plan
        yield from (f"# {plan.dataset.name}: {plan.title}", "")
        if plan.command:
            yield from (f"```sh\n{plan.command}\n```", "")
        yield (
            f"{_count(plan.pairs, 'pair', 'pairs')}, {_count(self._atlases, 'atlas', 'atlases')}, "
            f"{_count({pair.query for pair in plan.pairs}, 'query', 'queries')}. NSD at {plan.tolerances.origin}; "
            "HD95 on surface elements, the larger of both directions. Means over the cases of each structure, then "
            "over structures."
        )
        taken = listed([f"{name} ({value})" for value, name in plan.names.items()], _LONGEST_TABLE)
        yield from ("", f"Structures: {taken}.")
        left = [name for value, name in plan.dataset.structures.items() if value not in plan.values]
        if left:
            yield f"Left out on request: {listed(left, _LONGEST_TABLE)}."
        unnamed = sorted({value for record in self._records for value in record.unnamed})
        if unnamed:
            found = ", ".join(map(str, unnamed))
            yield f"Label values that dataset.json does not name, taken as background where a case has them: {found}."
        yield ""

    def _methods(self) -> Iterator[str]:
        yield from ("## Methods", "")
        yield from _markdown(main_table(self._columns), words=2 if self._several else 1)
        parts = []
        for column, title in zip(self._columns, self._titles, strict=True):
            counts = {status: n for status, n in column.summary.counts.items() if n}
            words = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.items())
            parts.append(f"{title}: {words}")
        yield from ("", f"Structures of pairs by status: {'; '.join(parts)}.")
        for record in self._records:
            if record.failure:
                yield f"Failed: {record.pair.atlas} -> {record.pair.query} ({record.variant}): {record.failure}"
        yield ""

    def _differences(self) -> Iterator[str]:
        if not self._comparisons:
            return
        yield from ("## Differences", "")
        yield (
            f"Paired bootstrap over queries and atlases, {LEVEL:.0%} intervals, of the mean over structures. "
            "All are in summary.json; here are the methods of one variant, and one method over variants."
        )
        yield ""
        cells: dict[tuple[int, int], list[str]] = {}
        for one in self._comparisons:
            if one.first.variant == one.second.variant or one.first.method == one.second.method:
                title = f"{self._title(one.first)} − {self._title(one.second)}"
                interval = one.interval
                cells.setdefault((id(one.first), id(one.second)), [title]).append(
                    f"{_signed(interval.difference)} ({_signed(interval.low)} to {_signed(interval.high)})"
                )
        yield from _markdown([["difference", *_COMPARED.values()], *cells.values()])
        yield ""

    def _per_structure(self) -> Iterator[str]:
        columns = self._columns
        yield from ("## Dice of each structure", "")
        first = columns[0].summary.structures
        shown = first[:_LONGEST_TABLE]
        lines = [["structure", "ml", *self._titles]]
        for n, one in enumerate(shown):
            spreads = [column.summary.structures[n].scores["dice"] for column in columns]
            cells = [_decimal(dice.mean, 3) + ("" if math.isnan(dice.sd) else f" ± {dice.sd:.3f}") for dice in spreads]
            lines.append([one.structure, _decimal(one.reference_ml, 1), *cells])
        small = columns[0].summary.small
        if small and len(small) < len(first):
            cells = [_decimal(column.summary.small_means["dice"], 3) for column in columns]
            lines.append([f"mean of those below {SMALL_ML:g} ml ({len(small)})", "", *cells])
        lines.append(["mean", "", *(_decimal(column.summary.means["dice"], 4) for column in columns)])
        yield from _markdown(lines)
        if len(first) > len(shown):
            yield from ("", f"The other {len(first) - len(shown)} structures are in results.csv.")
        if any(column.summary.counts["both_empty"] for column in columns):
            means = [column.summary.means_with_empty["dice"] for column in columns]
            parts = [f"{title} {_decimal(mean, 4)}" for title, mean in zip(self._titles, means, strict=True)]
            yield ""
            yield (
                "Where result and reference both lack a structure it is left out above; counted as perfect the means "
                f"are {', '.join(parts)}."
            )
        yield ""

    def _per_atlas(self) -> Iterator[str]:
        if len(self._atlases) < 2:
            return
        yield from ("## Dice of each atlas", "")
        lines = [["atlas", *self._titles]]
        lines += [[atlas, *(_decimal(one.of_atlas(atlas), 3) for one in self._columns)] for atlas in self._atlases]
        spreads = [column.over_atlases() for column in self._columns]
        lines.append(["mean ± sd", *(f"{_decimal(one.mean, 3)} ± {_decimal(one.sd, 3)}" for one in spreads)])
        yield from _markdown(lines)
        yield ""

    def _costs(self) -> Iterator[str]:
        device, records = self._plan.device, self._records
        yield from ("## Cost of a pair", "")
        yield f"Seconds of wall time on {device}, files already read; mean over pairs, and the slowest pair."
        yield ""
        every = dict.fromkeys(stage for record in records for stage in record.seconds)
        stages = [stage for stage in every if not stage.startswith("registration: ")]
        memories = {"peak MB": "peak_memory_mb"} | ({"GPU MB": "gpu_memory_mb"} if device == "cuda" else {})
        lines = [["variant", "seconds", "slowest", *stages, *memories]]
        for variant in self._plan.variants:
            done = [one for one in records if one.variant == variant.name and not one.failure]
            if done:
                totals = [one.total_seconds for one in done]
                means = [float(np.mean([one.seconds.get(stage, 0.0) for one in done])) for stage in stages]
                peaks = [max(getattr(one, name) or 0 for one in done) for name in memories.values()]
                numbers = [float(np.mean(totals)), max(totals), *means]
                lines.append([variant.name, *(_decimal(number, 1) for number in numbers), *map(str, peaks)])
        yield from _markdown(lines)
        yield ""


def _markdown(lines: Sequence[Sequence[str]], words: int = 1) -> Iterable[str]:
    """Table; all but the first ``words`` columns to the right."""
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


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
