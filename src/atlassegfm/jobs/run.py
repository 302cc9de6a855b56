"""A run: what is missing or changed is computed, one query or ten thousand, and summarised in ``cohort.json``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from ..core.files import remove_unfinished
from ..records import CaseRecord, CohortRecord, State
from .plan import Case, Shard
from .store import why_to_compute
from .work import Ended, SegmentWork, Watcher, Work

#: Runs cases, and yields each as it ends.
Runner = Callable[[Work, Sequence[Case], Watcher], Generator[Ended, None, None]]


@dataclass(frozen=True)
class Row:
    """Outcome of one case.

    Parameters
    ----------
    case : Case
    state : {"done", "failed", "left"}
        "left": not begun, or not finished, when the run was stopped.
    kept : bool
        Whether an earlier run had done it.
    reason : str
        Why it failed.
    is_input : bool
        Whether the query itself is to blame for that.
    why : str
        Why it was computed: "new", "failed before", "other settings" and so on; empty where it was kept.
    attempts : int
    seconds : float
        Wall time of the computation.
    peak_memory_mb : int or None
    warnings : tuple of str
        Reasons to doubt its result as a whole.
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
    warnings: tuple[str, ...] = ()

    def record(self) -> CaseRecord:
        """For ``cohort.json``."""
        return CaseRecord(
            case=self.case.name,
            query=self.case.query.name,
            state=self.state,
            kept=self.kept,
            reason=self.reason,
            why=self.why,
            attempts=self.attempts,
            seconds=round(self.seconds, 3),
            peak_memory_mb=self.peak_memory_mb,
            warnings=self.warnings,
        )


@dataclass
class Outcome:
    """Outcome of all cases; filled during a run.

    Parameters
    ----------
    rows : dict of str to Row
        By name of the case, in the order of the cases.
    wall_seconds : float
    """

    rows: dict[str, Row] = field(default_factory=dict)
    wall_seconds: float = 0.0
    _counts: Counter[State] = field(default_factory=Counter)

    def put(self, row: Row) -> None:
        """Set the row of a case."""
        before = self.rows.get(row.case.name)
        if before is not None:
            self._counts[before.state] -= 1
        self.rows[row.case.name] = row
        self._counts[row.state] += 1

    def count(self, state: State) -> int:
        """Number of cases in a state."""
        return self._counts[state]

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases in each state, and of those kept."""
        states: tuple[State, ...] = ("done", "failed", "left")
        return {**{state: self.count(state) for state in states}, "kept": self.kept}

    @property
    def kept(self) -> int:
        """Number of cases an earlier run had done."""
        return sum(row.kept for row in self.rows.values())

    @property
    def failed(self) -> list[Row]:
        """Rows of the failed cases."""
        return [row for row in self.rows.values() if row.state == "failed"]


class RunWatcher(Watcher, Protocol):
    """Progress of a run as a whole."""

    def planned(self, outcome: Outcome) -> None:
        """What is kept and what is to do is known; the outcome is filled from now on."""

    def ended(self, row: Row) -> None:
        """A case is done or failed."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    Parameters
    ----------
    force : bool
        Whether to compute all cases again.
    shard : Shard or None
        Part of the cases to run.
    workers : int
        For the summary.
    cluster : str or None
        For the summary.
    """

    force: bool = False
    shard: Shard | None = None
    workers: int = 1
    cluster: str | None = None


def summary_name(shard: Shard | None) -> str:
    """Name of the summary's file: each shard has its own."""
    return "cohort.json" if shard is None else f"cohort-{shard.number}-of-{shard.count}.json"


def run(
    cases: Sequence[Case], work: SegmentWork, runner: Runner, watcher: RunWatcher, options: RunOptions = RunOptions()
) -> Outcome:
    """Compute the cases whose result is missing or was made from something else, and write the summary.

    Parameters
    ----------
    cases : sequence of Case
        Of all shards.
    work : SegmentWork
    runner : Runner
        In this process, in several, or on a cluster.
    watcher : RunWatcher
    options : RunOptions

    Returns
    -------
    Outcome
        Of this shard.

    Raises
    ------
    AtlasSegError
        If no case can be done. A case that fails does not stop the others.
    """
    start, outcome = time.perf_counter(), Outcome()
    remove_unfinished(work.out)
    for case in cases if options.shard is None else options.shard.part_of(cases):
        why, status = why_to_compute(case, work.out / case.name, work.provenance)
        if why or options.force or status is None:
            outcome.put(Row(case, "left", why="forced" if options.force else why))
        else:
            outcome.put(
                Row(
                    case,
                    "done",
                    kept=True,
                    attempts=status.attempts,
                    seconds=status.total_seconds,
                    peak_memory_mb=status.peak_memory_mb,
                    warnings=status.warnings,
                )
            )
    to_do = [row.case for row in outcome.rows.values() if row.state == "left"]
    watcher.planned(outcome)
    ended_any = False
    try:
        if to_do:
            # Closed at once, whatever happens: its workers end with it.
            with closing(runner(work, to_do, watcher)) as all_ended:
                for ended in all_ended:
                    row = Row(**vars(ended), why=outcome.rows[ended.case.name].why)
                    outcome.put(row)
                    ended_any = True
                    watcher.ended(row)
    finally:
        # Where workers were killed in the end.
        remove_unfinished(work.out)
        outcome.wall_seconds = time.perf_counter() - start
        if ended_any or not to_do:
            summary = CohortRecord(
                version=work.provenance.version,
                shard=None if options.shard is None else str(options.shard),
                device=work.device,
                model=work.settings.model,
                workers=options.workers,
                threads=work.threads,
                cluster=options.cluster,
                counts=outcome.counts,
                wall_seconds=round(outcome.wall_seconds, 3),
                cases=tuple(row.record() for row in outcome.rows.values()),
            )
            summary.write(work.out / summary_name(options.shard))
    return outcome
