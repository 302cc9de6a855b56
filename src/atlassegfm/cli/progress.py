"""Progress of a run on the screen, and its outcome as a table."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .session import Session, print_json, print_table

if TYPE_CHECKING:
    from ..jobs import Case, Outcome, Row

#: Up to so many cases the table shows them all, else those that need a look.
_LISTED = 50


class RunProgress:
    """Progress as the text of a bar, or as lines where there is no terminal."""

    outcome: Outcome

    def __init__(self, session: Session) -> None:
        from ..jobs import Outcome

        self.outcome = Outcome()
        self._session = session
        self._start = time.monotonic()
        self._ended = 0

    def planned(self, outcome: Outcome) -> None:
        """Show what is kept and what is to do."""
        self.outcome, self._start = outcome, time.monotonic()
        reasons = Counter(row.why for row in outcome.rows.values() if row.why)
        if outcome.kept:
            listed = f" ({', '.join(f'{count} {reason}' for reason, count in reasons.items())})" if reasons else ""
            left = outcome.count("left")
            self._session.advance("", f"{outcome.kept} of {len(outcome.rows)} kept, {left} to do{listed}")

    def begun(self, case: Case) -> None:
        """Show that a case begins."""
        if len(self.outcome.rows) == 1:
            self._session.begin(1, 1, case.query.name)
        else:
            self._session.advance(f"{self._state()}: {case.query.name}")

    def stage(self, case: Case, stage: str) -> None:
        """Show the stage of a case."""
        if len(self.outcome.rows) == 1:
            self._session.progress(stage)
        else:
            self._session.advance(f"{self._state()}: {case.query.name} {stage}")

    def ended(self, row: Row) -> None:
        """Show how a case ended."""
        self._ended += 1
        query, count = row.case.query, len(self.outcome.rows)
        if row.state == "failed":
            self._session.error(_with_path(row))
        for warning in row.warnings:
            self._session.say(f"warning: {query}: {warning}")
        if count > 1:
            number = count - self.outcome.count("left")
            line = f"[{number}/{count}] {query.name} done in {row.seconds:.1f} s; {self._state()}"
            self._session.advance(self._state(), line if row.state == "done" else "")

    def _state(self) -> str:
        done, failed, left = (self.outcome.count(state) for state in ("done", "failed", "left"))
        text = f"{done} done, {failed} failed, {left} left"
        if left and self._ended:
            text += f", about {_duration((time.monotonic() - self._start) / self._ended * left)} left"
        return text


def print_outcome(outcome: Outcome, out: Path, *, as_json: bool) -> None:
    """Print the outcome of a run."""
    rows = list(outcome.rows.values())
    if as_json:
        results = [{"kept": row.kept, **_result(row.case, out)} for row in rows if row.state == "done"]
        failures = [{"query": row.case.query.name, "reason": _with_path(row)} for row in outcome.failed]
        seconds = round(outcome.wall_seconds, 3)
        print_json({"results": results, "failures": failures, "counts": outcome.counts, "wall_seconds": seconds})
        return
    lines = []
    for row in rows:
        if len(rows) <= _LISTED or row.state != "done" or row.warnings:
            memory = "" if row.peak_memory_mb is None else str(row.peak_memory_mb)
            remark = "; ".join((row.reason, *row.warnings) if row.reason else row.warnings)
            state = "kept" if row.kept else row.state
            lines.append((row.case.name, state, f"{row.seconds:.1f}", memory, remark))
    if lines:
        print_table(("case", "state", "seconds", "MB", "remark"), lines, numbers_from=2, numbers_to=4)
    done = f"{outcome.count('done')} done (of them {outcome.kept} kept), {outcome.count('failed')} failed"
    typer.echo(f"{len(rows)} queries: {done}, in {_duration(outcome.wall_seconds)} -> {out}")


def print_result(case: Case, out: Path, *, as_json: bool) -> None:
    """Print the structures of one result."""
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
            remark = quality["reason"] if quality["verdict"] != "good" else ""
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


def _duration(seconds: float) -> str:
    """Rounded to the unit that shows about two digits."""
    unit, size = next((one for one in (("h", 3600), ("min", 60)) if seconds >= 2 * one[1]), ("s", 1))
    return f"{seconds / size:.0f} {unit}"


def _with_path(row: Row) -> str:
    """Why a case failed, with the path as the user gave it."""
    return f"{row.case.query}{row.reason.removeprefix(row.case.query.name)}"
