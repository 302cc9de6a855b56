"""Tables of a benchmark: scores and costs as CSV, ``summary.json``, and ``report.md``.

``results.csv`` and ``summary.json`` hold scores alone and are byte-identical whether a run was interrupted or not;
costs, which differ from run to run, are in ``times.csv`` and ``report.md``.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.files import write_text
from ..core.labels import listed
from ..core.text import counted
from ..evaluate.statistics import LEVEL, Interval, Spread, macro_mean, paired_bootstrap, spread
from ..evaluate.summary import SMALL_ML, Summary, plain_row, summarise, write_scores
from ..models.incontext import describe_baseline
from .plan import IN_CONTEXT, PLAN, Plan
from .protocols import Pair
from .records import PairRecord, Row
from .verdicts import BAD, FOUND, LOST, verdict_summary

#: Fewest pairs, and atlases among them, of a bootstrap interval: fewer say nothing on other scans or atlases.
LEAST_PAIRS, LEAST_ATLASES = 10, 2
#: Scores that methods are compared by.
_COMPARED = {"dice": "Dice", "nsd": "NSD"}
#: Structures in a table at most; all of them are in results.csv.
_LONGEST_TABLE = 40
_METHOD_NAMES = {"atlas": "atlas only", "paper": "paper gate"}


@dataclass(frozen=True, eq=False)
class Column:
    """Scores of one method of one variant over all pairs of the plan; rows pair by pair."""

    variant: str
    method: str
    pairs: tuple[Pair, ...]
    rows: tuple[Row, ...]

    @cached_property
    def summary(self) -> Summary:
        """Summary over all pairs."""
        return summarise(self.rows)

    def table(self, score: str) -> NDArray[np.float64]:
        """Arrange one score as (structures, pairs), ascending by label value; NaN where there is none."""
        order = np.argsort([row.value for row in self.rows[: len(self.rows) // len(self.pairs)]])
        scores = np.array([getattr(row.scores, score) for row in self.rows], np.float64)  # None becomes NaN
        return np.ascontiguousarray(scores.reshape(len(self.pairs), -1).T[order])

    def pair_means(self, score: str = "dice") -> NDArray[np.float64]:
        """Average one score over the structures of each pair: (pairs,)."""
        table = self.table(score)
        known = ~np.isnan(table)
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = np.where(known, table, 0).sum(axis=0) / known.sum(axis=0)
        return means

    def by_atlas(self, score: str = "dice") -> dict[str, float]:
        """Average one score over the pairs of each atlas."""
        table, atlases = self.table(score), np.array([pair.atlas for pair in self.pairs])
        return {atlas: macro_mean(table[:, atlases == atlas]) for atlas in dict.fromkeys(atlases.tolist())}

    def over_atlases(self, score: str = "dice") -> Spread:
        """Spread of the means of the atlases."""
        return spread(list(self.by_atlas(score).values()))


@dataclass(frozen=True)
class Comparison:
    """Difference of two columns in one score, the first less the second."""

    score: str
    first: Column
    second: Column
    interval: Interval


def columns_of(plan: Plan, records: Sequence[PairRecord]) -> list[Column]:
    """Collect the columns of a benchmark, variant by variant."""
    columns = []
    unscored = {record.pair for record in records if not record.rows}  # by one variant, so by none: means must compare
    pairs = tuple(pair for pair in plan.pairs if pair not in unscored)
    if not pairs:
        raise InputError(listed([*dict.fromkeys(one.failure for one in records if not one.rows)], 3, "; "))
    for variant in plan.variants:
        done = {record.pair: record for record in records if record.variant == variant.name}
        for method in variant.scored:
            if variant.methods is None or method in variant.methods:
                rows = [row for pair in pairs for row in done[pair].rows if row.method == method]
                columns.append(Column(variant.name, method, pairs, tuple(rows)))
    return columns


def compare_columns(columns: Sequence[Column], seed: int) -> list[Comparison]:
    """Compare every column with every one before it; without an interval where there are too few pairs."""
    comparisons = []
    for score in _COMPARED:
        for before, column in combinations(columns, 2):
            clusters = [[getattr(pair, name) for pair in column.pairs] for name in ("query", "atlas")]
            interval = paired_bootstrap(column.table(score), before.table(score), *clusters, seed=seed)
            unknown = np.isnan(column.table(score) - before.table(score))
            atlases = [pair.atlas for n, pair in enumerate(column.pairs) if not unknown[:, n].all()]
            if len(atlases) < LEAST_PAIRS or len(set(atlases)) < LEAST_ATLASES:
                interval = replace(interval, low=math.nan, high=math.nan)
            comparisons.append(Comparison(score, column, before, interval))
    return comparisons


def write_reports(plan: Plan, records: Sequence[PairRecord], out: Path, *, plots: bool = True) -> dict[str, Any]:
    """Write all tables of a benchmark, and its plots if wanted, into its folder.

    Returns the content of ``summary.json``. InputError if a file cannot be written, MissingExtraError if plots are
    wanted and matplotlib is not installed.
    """
    columns = columns_of(plan, records)
    comparisons = compare_columns(columns, plan.seed)
    write_scores(out / "results.csv", _score_rows(records))
    write_scores(out / "times.csv", _cost_rows(records))
    made = json.loads((out / PLAN).read_text(encoding="utf-8"))
    summary = {"benchmark": plan.title, **made, **_summary(plan, records, columns, comparisons)}
    write_text(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(out / "report.md", "\n".join(_Page(plan, records, columns, comparisons, plots).lines()) + "\n")
    if plots:
        from .plots import dice_and_time_figure, dice_figure, save_figure

        save_figure(dice_figure(columns, plan.dataset.name), out / "dice.png")
        save_figure(dice_and_time_figure(columns, records, plan.dataset.name), out / "dice-time.png")
    return summary


def title_of(column: Column, *, several: bool = True) -> str:
    """Name a column by its method, with ``several`` also by its variant."""
    return f"{column.variant}: {name_of(column.method)}" if several else name_of(column.method)


def name_of(method: str) -> str:
    """Name a method, or one of several models, in words."""
    return _METHOD_NAMES.get(method, method)


def main_table(columns: Sequence[Column]) -> list[list[str]]:
    """Arrange the main scores: a head, and a line for each column; variants are named if there are several.

    clDice is among them where a structure was scored by it: its mean is over these alone.
    """
    has_cldice = any("cldice" in column.summary.means for column in columns)
    lines = [["variant", "method", "Dice", "sd atlases", "worst pair", "NSD", "HD95 mm", *["clDice"] * has_cldice]]
    for column in columns:
        means, sd, worst = column.summary.means, column.over_atlases().sd, spread(column.pair_means()).low
        numbers = [(means["dice"], 4), (sd, 3), (worst, 3), (means["nsd"], 3), (means["hd95_mm"], 1)]
        numbers += [(means.get("cldice", math.nan), 3)] * has_cldice
        lines.append([column.variant, name_of(column.method), *(decimal(*number) for number in numbers)])
    several = len({column.variant for column in columns}) > 1
    return lines if several else [line[1:] for line in lines]


def _keys(record: PairRecord) -> dict[str, str]:
    return {"variant": record.variant, "atlas": record.pair.atlases, "query": record.pair.query}


def _score_rows(records: Sequence[PairRecord]) -> list[dict[str, Any]]:
    return [
        {**_keys(record), "method": row.method, "value": row.value, "structure": row.structure, **vars(row.scores)}
        | {"estimated_dice": row.estimated_dice, "verdict": row.verdict}
        for record in records
        for row in record.rows
    ] + [{**_keys(record), "status": "not_scored"} for record in records if not record.rows]


def _cost_rows(records: Sequence[PairRecord]) -> list[dict[str, Any]]:
    stages = list(dict.fromkeys(stage for record in records for stage in record.seconds))
    return [
        {**_keys(record), "failure": record.failure, "seconds": record.total_seconds, "parameters": record.parameters}
        | {name: getattr(record, name) for name in ("peak_memory_mb", "gpu_memory_mb", "confidence", "folding")}
        | {f"{stage} seconds": record.seconds.get(stage) for stage in stages}
        for record in records
    ]


def _summary(
    plan: Plan, records: Sequence[PairRecord], columns: Sequence[Column], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    return {
        "pairs": [[pair.atlases, pair.query] for pair in plan.pairs],
        "seed": plan.seed,
        "tolerances": plan.tolerances.origin,
        "unnamed_label_values": _unnamed(records),
        "failures": [{**_keys(record), "reason": record.failure} for record in records if record.failure],
        "columns": [
            {
                "variant": column.variant,
                "method": column.method,
                **column.summary.to_dict(),
                "over_pairs": {"dice": plain_row(vars(spread(column.pair_means())))},
                "over_atlases": {"dice": plain_row(vars(column.over_atlases()))},
                "atlases": plain_row(column.by_atlas()),
                "verdicts": verdict_summary(column.rows),
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


def _unnamed(records: Sequence[PairRecord]) -> list[int]:
    return sorted({value for record in records for value in record.unnamed})


@dataclass(frozen=True)
class _Page:
    """Lines of ``report.md``."""

    plan: Plan
    records: Sequence[PairRecord]
    columns: Sequence[Column]
    comparisons: Sequence[Comparison]
    plots: bool

    @cached_property
    def titles(self) -> dict[Column, str]:
        """Name of each column, with its variant if there are several."""
        return {column: title_of(column, several=len(self.plan.variants) > 1) for column in self.columns}

    @cached_property
    def atlases(self) -> list[str]:
        """Cases that are atlases, in order."""
        return list(dict.fromkeys(pair.atlas for pair in self.plan.pairs))

    def lines(self) -> Iterator[str]:
        """Give the whole page."""
        scores = (self._head, self._methods, self._differences, self._per_structure, self._per_atlas)
        for section in (*scores, self._verdicts, self._costs):
            yield from section()
        if self.plots:
            yield from ("![Dice of each structure](dice.png)", "", "![Dice against time](dice-time.png)")

    def _head(self) -> Iterator[str]:
        plan = self.plan
        yield from (f"# {plan.dataset.name}: {plan.title}", "")
        if plan.command:
            yield from (f"```sh\n{plan.command}\n```", "")
        queries = counted(len({pair.query for pair in plan.pairs}), "query", "queries")
        yield (
            f"{counted(len(plan.pairs), 'pair')}, {counted(len(self.atlases), 'atlas', 'atlases')}, {queries}. "
            f"NSD at {plan.tolerances.origin}; HD95 on surface elements, the larger of both directions. Means over the "
            "cases of each structure, then over structures."
        )
        taken = listed([f"{name} ({value})" for value, name in plan.names.items()], _LONGEST_TABLE)
        yield from ("", f"Structures: {taken}.")
        if left := [name for value, name in plan.dataset.structures.items() if value not in plan.values]:
            yield f"Left out on request: {listed(left, _LONGEST_TABLE)}."
        if unnamed := _unnamed(self.records):
            found = ", ".join(map(str, unnamed))
            yield f"Label values that dataset.json does not name, taken as background where a case has them: {found}."
        yield ""
        yield from self._baselines()

    def _baselines(self) -> Iterator[str]:
        baselines = [one.baseline for one in self.plan.variants if one.baseline is not None]
        if any(one.random_weights for one in baselines):
            yield (
                "**Rows with random weights are no results**: they show that a baseline runs, and what it costs. Their "
                "Dice says nothing about it."
            )
            yield ""
        for one in baselines:
            licence = "random weights" if one.random_weights else describe_baseline(one.name).weights_licence
            yield f"- {one.name}: {describe_baseline(one.name).summary.partition(': ')[2]}. Weights: {licence}."
        if baselines:
            yield ""

    def _methods(self) -> Iterator[str]:
        yield from ("## Methods", "")
        yield from _markdown(main_table(self.columns), words=2 if len(self.plan.variants) > 1 else 1)
        parts = []
        for column, title in self.titles.items():
            counts = [f"{n} {status.replace('_', ' ')}" for status, n in column.summary.counts.items() if n]
            parts.append(f"{title}: {', '.join(counts)}")
        yield f"Structures of pairs by status: {'; '.join(parts)}."
        for record in self.records:
            if record.failure:
                what = "Failed" if record.rows else "Not scored"
                yield f"{what}: {record.pair.atlases} -> {record.pair.query} ({record.variant}): {record.failure}"
        yield ""

    def _differences(self) -> Iterator[str]:
        if not self.comparisons:
            return
        yield from ("## Differences", "")
        yield (
            f"Paired bootstrap over queries and atlases, {LEVEL:.0%} intervals, of the mean over structures; from "
            f"{LEAST_PAIRS} pairs and {LEAST_ATLASES} atlases on. "
            "All are in summary.json; here are the methods of one variant, and one method over variants.\n"
        )
        cells: dict[str, list[str]] = {}
        for one in self.comparisons:
            methods = {one.first.method, one.second.method}
            if one.first.variant == one.second.variant or len(methods) == 1 or methods == {"fused", IN_CONTEXT}:
                title = f"{self.titles[one.first]} − {self.titles[one.second]}"
                difference, low, high = map(_signed, (one.interval.difference, one.interval.low, one.interval.high))
                few = math.isnan(one.interval.low)
                interval = "too few pairs for an interval" if few else f"{low} to {high}"
                cells.setdefault(title, [title]).append(f"{difference} ({interval})")
        yield from _markdown([["difference", *_COMPARED.values()], *cells.values()])

    def _per_structure(self) -> Iterator[str]:
        summaries = [column.summary for column in self.columns]
        yield from ("## Dice of each structure", "")
        first, small = summaries[0].structures, summaries[0].small
        lines = [["structure", "ml", *self.titles.values()]]
        for n, one in enumerate(first[:_LONGEST_TABLE]):
            spreads = [summary.structures[n].scores["dice"] for summary in summaries]
            cells = [decimal(dice.mean, 3) + ("" if math.isnan(dice.sd) else f" ± {dice.sd:.3f}") for dice in spreads]
            lines.append([one.structure, decimal(one.reference_ml, 1), *cells])
        if small and len(small) < len(first):
            cells = [decimal(summary.small_means["dice"], 3) for summary in summaries]
            lines.append([f"mean of those below {SMALL_ML:g} ml ({len(small)})", "", *cells])
        lines.append(["mean", "", *(decimal(summary.means["dice"], 4) for summary in summaries)])
        yield from _markdown(lines)
        if len(first) > _LONGEST_TABLE:
            yield from (f"The other {len(first) - _LONGEST_TABLE} structures are in results.csv.", "")
        if any(summary.counts["both_empty"] for summary in summaries):
            means = {title: column.summary.means_with_empty["dice"] for column, title in self.titles.items()}
            parts = [f"{title} {decimal(mean, 4)}" for title, mean in means.items()]
            yield (
                "Where result and reference both lack a structure it is left out above; counted as perfect the means "
                f"are {', '.join(parts)}.\n"
            )

    def _per_atlas(self) -> Iterator[str]:
        if len(self.atlases) < 2:
            return
        yield from ("## Dice of each atlas", "")
        dice = [column.by_atlas() for column in self.columns]
        lines = [["atlas", *self.titles.values()]]
        lines += [[atlas, *(decimal(one.get(atlas, math.nan), 3) for one in dice)] for atlas in self.atlases]
        spreads = [column.over_atlases() for column in self.columns]
        lines.append(["mean ± sd", *(f"{decimal(one.mean, 3)} ± {decimal(one.sd, 3)}" for one in spreads)])
        yield from _markdown(lines)

    def _verdicts(self) -> Iterator[str]:
        judged = {title: verdict_summary(column.rows) for column, title in self.titles.items()}
        if not any(judged.values()):
            return
        yield from ("## Verdicts", "")
        yield (
            "What the results say of themselves without labels, beside the true Dice "
            f"(bad: below {BAD}, lost: below {LOST}).\n"
        )
        lines = [["method", "verdict", "structures", "Dice", "bad", "lost"]]
        notes = []
        for title, found in judged.items():
            if found is None:
                continue
            for verdict, one in found["verdicts"].items():
                counts = [str(one[name]) for name in ("structures", "bad", "lost")]
                lines.append([title, verdict, counts[0], decimal(one["dice"], 3), *counts[1:]])
            note = (
                f"{title}: {found['not_good']:.0%} of the structures are not judged good; of {found['bad']} bad ones "
            )
            note += f"{found['bad_but_good']} are"
            if found["auroc"] is not None:
                note += f"; AUROC of the estimate {found['auroc']:.3f}; looking at {found['looked_at']:.0%} of them, "
                note += f"the worst estimates first, finds {FOUND:.0%} of the bad ones"
            notes += [f"{note}. The estimate is off by {found['error']:.3f} in the mean.", ""]
        yield from (*_markdown(lines, words=2), *notes)

    def _costs(self) -> Iterator[str]:
        device, records = self.plan.device, self.records
        yield from ("## Cost of a pair", "")
        yield from (f"Seconds of wall time on {device}, files already read; mean over pairs, and the slowest pair.", "")
        every = dict.fromkeys(stage for record in records for stage in record.seconds)
        stages = [stage for stage in every if not stage.startswith("registration: ")]
        memories = {"peak MB": "peak_memory_mb"} | ({"GPU MB": "gpu_memory_mb"} if device == "cuda" else {})
        counted_weights = any(variant.baseline is not None for variant in self.plan.variants)
        lines = [["variant", "seconds", "slowest", *stages, *memories, *(["parameters"] * counted_weights)]]
        for variant in self.plan.variants:
            if done := [one for one in records if one.variant == variant.name and not one.failure]:
                totals = [one.total_seconds for one in done]
                means = [float(np.mean([one.seconds.get(stage, 0.0) for one in done])) for stage in stages]
                peaks = [max(getattr(one, name) or 0 for one in done) for name in memories.values()]
                numbers = [float(np.mean(totals)), max(totals), *means]
                lines.append([variant.name, *(decimal(number, 1) for number in numbers), *map(str, peaks)])
                if counted_weights:
                    lines[-1].append(str(max(one.parameters or 0 for one in done)))
        yield from _markdown(lines)
        if counted_weights:
            yield "Parameters: weights of an in-context network; of the method those fitted by registration and gate."
            yield ""


def _markdown(lines: Sequence[Sequence[str]], words: int = 1) -> Iterable[str]:
    """Lines of a table, aligned to the right but for its first ``words`` columns, and an empty line."""
    head, *rest = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    yield head
    yield "|" + "|".join("---" if n < words else "---:" for n in range(len(lines[0]))) + "|"
    yield from (*rest, "")


def decimal(value: float, digits: int) -> str:
    """Format a number for a table; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _signed(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")  # no −0.000
