"""A cohort from the plan to the summary."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.files import atomic_path, remove_unfinished
from .plan import Case, Shard, read_status, why_to_do
from .work import FORMAT, Ended, State, Watcher, Work

#: Does cases in some way, and tells of each as it ends.
Runner = Callable[[Work, Sequence[Case], Watcher], Generator[Ended, None, None]]


@dataclass(frozen=True)
class Row:
    """What became of one case.

    Parameters
    ----------
    case : Case
        Which.
    state : {"done", "failed", "left"}
        "left": not begun, or not finished, when the run was stopped.
    kept : bool
        Whether it was done already, by an earlier run.
    reason : str
        Why it failed, in words; empty where it did not.
    is_input : bool
        Whether the query itself is to blame for that.
    why : str
        Why it was computed: "new", "failed before", "other settings" and so on; empty where it was kept.
    attempts : int
        How often it was begun; 0 where it was not.
    seconds : float
        Wall time of the computation, by an earlier run where it was kept.
    peak_memory_mb : int or None
        Of the process that computed it.
    doubts : tuple of str
        What makes its result doubtful, in words.
    """

    case: Case
    state: State
    kept: bool = False
    reason: str = ""
    is_input: bool = False
    why: str = ""
    attempts: int = 0
    seconds: float = 0.0
    peak_memory_mb: int | None = None
    doubts: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """For ``cohort.json``."""
        return {
            "case": self.case.name,
            "query": self.case.query.name,
            "state": self.state,
            "kept": self.kept,
            "reason": self.reason,
            "why": self.why,
            "attempts": self.attempts,
            "seconds": round(self.seconds, 3),
            "peak_memory_mb": self.peak_memory_mb,
            "doubts": list(self.doubts),
        }


@dataclass
class Outcome:
    """What became of all cases; grows while a cohort runs.

    Parameters
    ----------
    rows : dict of str to Row
        By name of the case, in the order of the cases.
    wall_seconds : float
        Of the run so far.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    wall_seconds: float = 0.0
    _counts: Counter[State] = field(default_factory=Counter)
    _kept: int = 0

    def put(self, row: Row) -> None:
        """Note what became of a case, in place of what was noted before."""
        before = self.rows.get(row.case.name)
        if before is not None:
            self._counts[before.state] -= 1
            self._kept -= before.kept
        self.rows[row.case.name] = row
        self._counts[row.state] += 1
        self._kept += row.kept

    def count(self, state: State) -> int:
        """How many cases are in that state."""
        return self._counts[state]

    @property
    def kept(self) -> int:
        """How many were done already."""
        return self._kept

    @property
    def failed(self) -> list[Row]:
        """Those that failed."""
        return [row for row in self.rows.values() if row.state == "failed"]

    def summary(self) -> dict[str, Any]:
        """For ``cohort.json``."""
        states: tuple[State, ...] = ("done", "failed", "left")
        return {
            "counts": {**{state: self.count(state) for state in states}, "kept": self.kept},
            "wall_seconds": round(self.wall_seconds, 3),
            "cases": [row.summary() for row in self.rows.values()],
        }


def summary_name(shard: Shard | None) -> str:
    """Name of the summary's file: each shard has its own."""
    return "cohort.json" if shard is None else f"cohort-{shard.number}-of-{shard.count}.json"


def run_cohort(
    cases: Sequence[Case],
    out: Path,
    work: Work,
    runner: Runner,
    watcher: Watcher,
    *,
    outcome: Outcome | None = None,
    on_planned: Callable[[Outcome], None] = lambda _: None,
    on_ended: Callable[[Row], None] = lambda _: None,
    about: Mapping[str, Any] | None = None,
    force: bool = False,
    shard: Shard | None = None,
) -> Outcome:
    """Do what is missing or changed, and write the summary.

    Parameters
    ----------
    cases : sequence of Case
        Of the whole cohort.
    out : Path
        Folder of the result folders; exists.
    work : Work
        What to do with each.
    runner : Runner
        By whom.
    watcher : Watcher
        Told what is going on.
    outcome : Outcome, optional
        Filled as cases end, for those who want to look meanwhile.
    on_planned : callable
        Told the outcome once it is known what there is to do.
    on_ended : callable
        Told of each case that was done or failed.
    about : mapping of str to Any, optional
        What the summary is to say besides.
    force : bool
        Whether to do all of them again.
    shard : Shard, optional
        The part of the cohort to do.

    Returns
    -------
    Outcome
        Of this shard.

    Raises
    ------
    AtlasSegError
        If no case can be done. A case that fails does not stop the others.
    """
    start = time.perf_counter()
    outcome = Outcome() if outcome is None else outcome
    remove_unfinished(out)
    to_do = _sort(cases if shard is None else shard.part_of(cases), out, work.made_with, outcome, force=force)
    on_planned(outcome)
    ended_any = False
    try:
        if to_do:
            # Closed at once, whatever happens: its workers end with it.
            with closing(runner(work, to_do, watcher)) as all_ended:
                for ended in all_ended:
                    row = _row_of(ended, outcome.rows[ended.case.name].why)
                    outcome.put(row)
                    ended_any = True
                    on_ended(row)
    finally:
        # Where workers were killed in the end.
        remove_unfinished(out)
        outcome.wall_seconds = time.perf_counter() - start
        if ended_any or not to_do:
            content = {
                "format": FORMAT,
                "program": work.made_with.get("program"),
                "shard": None if shard is None else str(shard),
                **(about or {}),
                **outcome.summary(),
            }
            with atomic_path(out / summary_name(shard)) as temporary:
                temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return outcome


def _sort(
    cases: Iterable[Case], out: Path, made_with: Mapping[str, Any], outcome: Outcome, *, force: bool
) -> list[Case]:
    """Note what is done already; gives the rest."""
    to_do = []
    for case in cases:
        status = read_status(out / case.name)
        why = "forced" if force else why_to_do(case, out / case.name, status, made_with)
        if why or status is None:
            outcome.put(Row(case, "left", why=why))
            to_do.append(case)
        else:
            outcome.put(
                Row(
                    case,
                    "done",
                    kept=True,
                    attempts=status.get("attempts", 1),
                    seconds=status.get("total_seconds", 0.0),
                    peak_memory_mb=status.get("peak_memory_mb"),
                    doubts=tuple(status.get("doubts", ())),
                )
            )
    return to_do


def _row_of(ended: Ended, why: str) -> Row:
    return Row(
        ended.case,
        ended.state,
        reason=ended.reason,
        is_input=ended.is_input,
        why=why,
        attempts=ended.attempts,
        seconds=ended.seconds,
        peak_memory_mb=ended.peak_memory_mb,
        doubts=ended.doubts,
    )
