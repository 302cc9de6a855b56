"""Plan and outcome of a run as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import typer

from ..core.labels import listed
from ..core.text import counted, duration
from .progress import with_path
from .session import print_json, print_table

if TYPE_CHECKING:
    from ..jobs import Case, Outcome, Row
    from ..jobs.scans import Scans
    from ..records import RunRecord

#: Up to so many cases the table shows them all, else those that need a look.
_LISTED = 50
#: Characters of a remark in a table; files have all of it.
_LONGEST_REMARK = 160
#: Structures named in a row of the table.
_NAMED = 4
#: Cases to look at first, and structures named of each.
_LOOK_FIRST, _NAMED_FIRST = 5, 2


def print_plan(plan: Outcome, scans: Scans, out: Path, *, as_json: bool) -> None:
    """Print what a run would do, and what it leaves out."""
    rows = list(plan.rows.values())
    seconds = [row.seconds for row in rows if row.kept and row.seconds]
    estimate = statistics.median(seconds) * plan.count("left") if seconds else None
    if as_json:
        cases = [
            {"case": row.case.name, "query": str(row.case.query), "kept": row.kept, "why": row.why} for row in rows
        ]
        left_out = {reason: [str(path) for path in paths] for reason, paths in scans.left_out.items()}
        rounded = None if estimate is None else round(estimate)
        print_json({"cases": cases, "left_out": left_out, "counts": plan.counts, "estimated_seconds": rounded})
        return
    cells = [(row.case.name, "keep" if row.kept else f"segment, {row.why}") for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row, (name, what) in zip(rows, cells, strict=True):  # no table: a path stays in one piece
        typer.echo(f"  {name:<{widths[0]}}  {what:<{widths[1]}}  {row.case.query}")
    for reason, paths in scans.left_out.items():
        typer.echo(f"left out, {reason}:")
        for path in paths:
            typer.echo(f"  {path}")
    time = "no result to estimate the time from" if estimate is None else f"about {duration(estimate)} on one worker"
    count = counted(len(rows), "query", "queries")
    typer.echo(f"{count} -> {out}: {plan.kept} kept, {plan.count('left')} to segment ({time}); nothing was done")


def print_outcome(outcome: Outcome, out: Path, table: str, *, as_json: bool) -> None:
    """Print the outcome of a run, and where its table is."""
    done = [row for row in outcome.rows.values() if row.state == "done"]
    if as_json:
        results = [{"kept": row.kept, **_result(row.case, out)} for row in done]
        failures = [{"query": row.case.query.name, "reason": with_path(row)} for row in outcome.failed]
        seconds = round(outcome.wall_seconds, 3)
        print_json({"results": results, "failures": failures, "counts": outcome.counts, "wall_seconds": seconds})
        return
    from ..jobs.table import read_run

    runs = {row.case.name: read_run(out / row.case.name) for row in done}
    cells = []
    for row in outcome.rows.values():
        run = runs.get(row.case.name)
        remark, verdict = _remark(row, run), "" if run is None else run.verdict or "not judged"
        if len(outcome.rows) <= _LISTED or row.state != "done" or remark:
            state = "kept" if row.kept else row.state
            cells.append((row.case.name, state, verdict, f"{row.seconds:.0f}", remark))
    if cells:
        print_table(("case", "state", "verdict", "s", ""), cells, numbers_from=3, numbers_to=4)
    left = f", {outcome.count('left')} left" if outcome.count("left") else ""
    count = counted(len(outcome.rows), "query", "queries")
    typer.echo(
        f"{count}: {outcome.count('done')} done (of them {outcome.kept} kept), "
        f"{outcome.count('failed')} failed{left}, in {duration(outcome.wall_seconds)} -> {out}"
    )
    if models := sorted({run.model.name for run in runs.values() if run is not None}):
        typer.echo(f"model     {'; '.join(models)}")
    typer.echo(f"table     {out / table}.csv")
    if first := _look_first(runs):
        typer.echo(f"look first at  {first}")


def _look_first(runs: Mapping[str, RunRecord | None]) -> str:
    """List the cases with the worst verdicts, then the lowest estimates, and their structures that are not good."""
    ranked = []
    for name, run in runs.items():
        poor = {}
        for one in () if run is None else run.structures:
            if one.quality is not None and one.quality.verdict in ("review", "failed") and one.status != "outside":
                poor[one.quality.verdict == "review", one.quality.estimated_dice or 0.0, one.value] = one
        if poor:
            worst = [f"{one.name} {one.quality and one.quality.verdict}" for _, one in sorted(poor.items())]
            ranked.append((min(poor), name, listed(worst, _NAMED_FIRST)))
    return ", ".join(f"{name} ({worst})" for _, name, worst in sorted(ranked)[:_LOOK_FIRST])


def _remark(row: Row, run: RunRecord | None) -> str:
    """What needs a look: why a case failed, warnings, structures that are not good, absent, cut or recovered."""
    from ..quality.coverage import cut_remark

    parts = [row.reason, *row.warnings] if row.reason else list(row.warnings)
    found: dict[str, list[str]] = {}
    for one in () if run is None else run.structures:
        if one.status != "present":
            found.setdefault(one.status, []).append(one.name)
        elif one.quality is not None and one.quality.verdict in ("review", "failed"):
            found.setdefault(one.quality.verdict, []).append(one.name)
        if one.status == "present" and cut_remark(one.outside_fraction):
            found.setdefault("cut by the field of view", []).append(one.name)
        if one.recovered is not None:
            found.setdefault(f"recovered with {one.recovered.donor}", []).append(one.name)
    parts += [f"{word}: {listed(names, _NAMED)}" for word, names in found.items()]
    return shorten("; ".join(parts), _LONGEST_REMARK, placeholder=" ...")


def print_result(case: Case, out: Path, *, as_json: bool) -> None:
    """Print the structures of one result."""
    result = _result(case, out)
    if as_json:
        print_json({"results": [result], "failures": []})
        return
    from ..quality.coverage import cut_remark
    from ..quality.verdict import NOT_JUDGED

    rows = []
    for one in result["structures"]:
        quality = one["quality"] or {"verdict": "", "estimated_dice": None, "reason": ""}
        estimate = quality["estimated_dice"]
        remark = one["status"] + (f" ({one['reason']})" if one["reason"] else "")
        if one["status"] == "present":
            is_listed = quality["verdict"] in ("review", "failed")
            remark = quality["reason"] if is_listed else cut_remark(one["outside_fraction"])
        remark = shorten(remark, _LONGEST_REMARK, placeholder=" ...")
        dice = "" if estimate is None else f"{estimate:.2f}"
        rows.append((one["name"], f"{one['volume_ml']:.1f}", dice, quality["verdict"] or "-", remark))
    how = f"{result['total_seconds']:.1f} s on {result['device']}, model {result['model']['name']}"
    typer.echo(f"{result['query']} -> {result['output']}  ({how})")
    print_table(("structure", "volume ml", "est. Dice", "verdict", ""), rows, numbers_from=1, numbers_to=3)
    if any(one["quality"] and one["quality"]["verdict"] is None for one in result["structures"]):
        typer.echo(NOT_JUDGED)


def _result(case: Case, out: Path) -> dict[str, Any]:
    """Content of the files of a result."""
    from ..records import RUN, STATUS, RunRecord, StatusRecord

    folder = out / case.name
    run, status = RunRecord.read(folder / RUN), StatusRecord.read(folder / STATUS)
    name = case.query.name or case.query.resolve().name
    return {"query": name, "output": str(folder), **run.model_dump(mode="json"), **status.model_dump(mode="json")}
