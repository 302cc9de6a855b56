"""Plan and outcome of a run as tables."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .progress import duration, with_path
from .session import print_json, print_table

if TYPE_CHECKING:
    from ..jobs import Case, Outcome, Row
    from ..jobs.scans import Scans

#: Up to so many cases the table shows them all, else those that need a look.
_LISTED = 50
#: Structures named in a row of the table.
_NAMED = 4


def print_plan(plan: Outcome, scans: Scans, out: Path, *, as_json: bool) -> None:
    """Print what a run would do, and what it leaves out."""
    rows = list(plan.rows.values())
    seconds = [row.seconds for row in rows if row.kept and row.seconds]
    estimate = statistics.median(seconds) * plan.count("left") if seconds else None
    if as_json:
        print_json(
            {
                "cases": [
                    {"case": row.case.name, "query": str(row.case.query), "kept": row.kept, "why": row.why}
                    for row in rows
                ],
                "left_out": {reason: [str(path) for path in paths] for reason, paths in scans.left_out.items()},
                "counts": plan.counts,
                "estimated_seconds": None if estimate is None else round(estimate),
            }
        )
        return
    print_table(
        ("case", "what", "query"),
        [(row.case.name, "keep" if row.kept else f"segment, {row.why}", str(row.case.query)) for row in rows],
    )
    for reason, paths in scans.left_out.items():
        typer.echo(f"left out, {reason}:")
        for path in paths:
            typer.echo(f"  {path}")
    time = "no result to estimate the time from" if estimate is None else f"about {duration(estimate)} on one worker"
    typer.echo(
        f"{len(rows)} {_queries(len(rows))} -> {out}: {plan.kept} kept, {plan.count('left')} to segment ({time}); "
        "nothing was done"
    )


def print_outcome(outcome: Outcome, out: Path, *, as_json: bool) -> None:
    """Print the outcome of a run."""
    if as_json:
        print_json(
            {
                "results": [
                    {"kept": row.kept, **_result(row.case, out)} for row in outcome.rows.values() if row.state == "done"
                ],
                "failures": [{"query": row.case.query.name, "reason": with_path(row)} for row in outcome.failed],
                "counts": outcome.counts,
                "wall_seconds": round(outcome.wall_seconds, 3),
            }
        )
        return
    from ..jobs.table import read_run

    runs = {row.case.name: read_run(out / row.case.name) for row in outcome.rows.values() if row.state == "done"}
    rows = list(outcome.rows.values())
    if len(rows) > _LISTED:
        rows = [row for row in rows if row.state != "done" or row.warnings or _verdict(runs, row) not in ("good", "")]
    if rows:
        cells = [
            (
                row.case.name,
                "kept" if row.kept else row.state,
                _verdict(runs, row),
                f"{row.seconds:.0f}",
                _remark(runs, row),
            )
            for row in rows
        ]
        print_table(("case", "state", "verdict", "s", ""), cells, numbers_from=3, numbers_to=4)
    count = len(outcome.rows)
    left = f", {outcome.count('left')} left" if outcome.count("left") else ""
    typer.echo(
        f"{count} {_queries(count)}: {outcome.count('done')} done (of them {outcome.kept} kept), "
        f"{outcome.count('failed')} failed{left}, in {duration(outcome.wall_seconds)} -> {out}"
    )
    typer.echo(f"table     {out / 'cohort.csv'}")


def _queries(count: int) -> str:
    return "query" if count == 1 else "queries"


def _verdict(runs: dict[str, Any], row: Row) -> str:
    run = runs.get(row.case.name)
    return "" if run is None else str(run.verdict)


def _remark(runs: dict[str, Any], row: Row) -> str:
    """What needs a look: why a case failed, warnings, structures that are not good, absent or cut."""
    from ..quality.coverage import CUT_FRACTION

    parts = [row.reason, *row.warnings] if row.reason else list(row.warnings)
    run = runs.get(row.case.name)
    found: dict[str, list[str]] = {}
    for one in () if run is None else run.structures:
        if one.status != "present":
            found.setdefault(one.status, []).append(one.name)
        elif one.quality is not None and one.quality.verdict != "good":
            found.setdefault(one.quality.verdict, []).append(one.name)
        elif one.outside_fraction >= CUT_FRACTION:
            found.setdefault("cut by the field of view", []).append(one.name)
    for word, names in found.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts.append(f"{word}: {', '.join(names[:_NAMED])}{more}")
    return "; ".join(parts)


def print_result(case: Case, out: Path, *, as_json: bool) -> None:
    """Print the structures of one result."""
    from ..quality.coverage import CUT_FRACTION

    result = _result(case, out)
    if as_json:
        print_json({"results": [result], "failures": []})
        return
    rows = []
    for one in result["structures"]:
        quality = one["quality"] or {"verdict": "", "estimated_dice": None, "reason": ""}
        estimate = quality["estimated_dice"]
        remark = one["status"] + (f" ({one['reason']})" if one["reason"] else "")
        if one["status"] == "present":
            cut = one["outside_fraction"] >= CUT_FRACTION
            remark = quality["reason"] if cut or quality["verdict"] != "good" else ""
        dice = "" if estimate is None else f"{estimate:.2f}"
        rows.append((one["name"], f"{one['volume_ml']:.1f}", dice, quality["verdict"], remark))
    typer.echo(f"{result['query']} -> {result['output']}  ({result['total_seconds']:.1f} s on {result['device']})")
    print_table(("structure", "volume ml", "est. Dice", "verdict", ""), rows, numbers_from=1, numbers_to=3)


def _result(case: Case, out: Path) -> dict[str, Any]:
    """Content of the files of a result."""
    from ..records import RUN, STATUS, RunRecord, StatusRecord

    folder = out / case.name
    run, status = RunRecord.read(folder / RUN), StatusRecord.read(folder / STATUS)
    name = case.query.name or case.query.resolve().name
    return {"query": name, "output": str(folder), **run.model_dump(mode="json"), **status.model_dump(mode="json")}
