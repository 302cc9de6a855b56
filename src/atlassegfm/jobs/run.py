"""A run: what is missing or changed is computed, one query or ten thousand, and summarised."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from ..core.errors import InputError
from ..core.files import disk_errors, remove_unfinished
from ..records import STATUS, CaseRecord, CohortRecord, State, StatusRecord
from .plan import Case, Shard
from .second_pass import SecondPass, plan_second_pass
from .store import why_to_compute
from .table import read_run, write_table
from .work import Row, SegmentWork, Watcher

#: Runs cases, and yields each as it ends.
Runner = Callable[[SegmentWork, Sequence[Case], Watcher], Generator[Row, None, None]]


@dataclass
class Outcome:
    """Outcome of all cases; filled during a run."""

    rows: dict[str, Row] = field(default_factory=dict)  # by name of the case, in the order of the cases
    wall_seconds: float = 0.0

    def count(self, state: State) -> int:
        """Count the cases in a state."""
        return sum(row.state == state for row in self.rows.values())

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
        """Show what is kept and what is to do; the outcome is filled from now on."""

    def ended(self, row: Row) -> None:
        """Show that a case is done or failed."""

    def again(self, count: int) -> None:
        """Show that so many cases are tried again; they begin and end once more."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a run."""

    force: bool = False  # whether to compute all cases again
    shard: Shard | None = None  # part of the cases to run
    workers: int = 1  # for the summary
    cluster: str | None = None  # for the summary
    second_pass: bool = True  # whether structures that are not good are tried again, where all cases are run
    #: Called once with the work, if there is any to do, before it goes to others; gives the work as they get it.
    prepare: Callable[[SegmentWork], SegmentWork] = lambda work: work

    @property
    def summary(self) -> str:
        """Name of the summary and the table, without ending."""
        return "cohort" if self.shard is None else f"cohort-{self.shard.number}-of-{self.shard.count}"


def run(
    cases: Sequence[Case], work: SegmentWork, runner: Runner, watcher: RunWatcher, options: RunOptions = RunOptions()
) -> Outcome:
    """Compute the cases whose result is missing or outdated, run the second pass, and write the summary.

    ``cases`` are those of all shards, the outcome that of this one. A case that fails does not stop the others; a full
    disk does. AtlasSegError if no case can be done.
    """
    start, outcome = time.perf_counter(), plan_of(cases, work, options)
    remove_unfinished(work.out)
    to_do = [row.case for row in outcome.rows.values() if row.state == "left"]
    watcher.planned(outcome)
    ended_any, prepared = False, cache(lambda: options.prepare(work))
    try:
        if to_do:
            # Closed at once, whatever happens: its workers end with it.
            with closing(runner(prepared(), to_do, watcher)) as all_ended:
                for ended in all_ended:
                    row = replace(ended, why=outcome.rows[ended.case.name].why)
                    outcome.rows[row.case.name] = row
                    ended_any = True
                    watcher.ended(row)
                    if row.disk_full:
                        break
        if options.second_pass and options.shard is None and not outcome.count("left"):
            _try_again(outcome, work, prepared, runner, watcher)
    finally:
        # Where workers were killed in the end.
        remove_unfinished(work.out)
        outcome.wall_seconds = time.perf_counter() - start
        if ended_any or not to_do:
            write_summary(outcome, work, options)
    return outcome


def _try_again(
    outcome: Outcome, work: SegmentWork, prepared: Callable[[], SegmentWork], runner: Runner, watcher: RunWatcher
) -> None:
    """Run the second pass; what it did goes to the results, the outcome gets their warnings."""
    done = [row.case for row in outcome.rows.values() if row.state == "done"]
    planned, volumes = plan_second_pass(done, work)
    tries = [one for one in planned if StatusRecord.read(work.out / one.case.name / STATUS).second_pass is None]
    if not tries:
        return
    watcher.again(len(tries))
    second = SecondPass.after(prepared(), tries, volumes)
    with closing(runner(second, [one.case for one in tries], watcher)) as all_ended:
        for ended in all_ended:
            if ended.disk_full:
                break
            name = ended.case.name
            outcome.rows[name] = replace(outcome.rows[name], warnings=ended.warnings)
            watcher.ended(replace(ended, warnings=()))


def plan_of(cases: Sequence[Case], work: SegmentWork, options: RunOptions = RunOptions()) -> Outcome:
    """Tell which cases of a run are kept, and which are to be computed and why; nothing is computed."""
    rows = {}
    for case in cases if options.shard is None else options.shard.part_of(cases):
        why, status = why_to_compute(case, work.out / case.name, work.provenance, second_pass=options.second_pass)
        if why or options.force or status is None:
            rows[case.name] = Row(case, "left", attempts=0, why="forced" if options.force else why)
        else:
            rows[case.name] = _kept(case, status)
    return Outcome(rows)


def write_summary(outcome: Outcome, work: SegmentWork, options: RunOptions) -> None:
    """Write ``cohort.json`` and ``cohort.csv``, of a shard under names of their own.

    Without shards, results of earlier commands in the folder are listed too, marked as such.
    """
    shard, name = options.shard, options.summary
    names = {row.case.name for row in outcome.rows.values()}
    earlier = [] if shard is not None else sorted(path.parent.name for path in work.out.glob(f"*/{STATUS}"))
    records = [_case_record(row, work.out) for row in outcome.rows.values()]
    records += [one for case in earlier if case not in names for one in _earlier_record(work.out / case)]
    with disk_errors(work.out):
        CohortRecord(
            version=work.provenance.version,
            shard=None if shard is None else str(shard),
            device=work.device,
            model=work.settings.model,
            workers=options.workers,
            threads=work.threads,
            cluster=options.cluster,
            counts=outcome.counts,
            wall_seconds=round(outcome.wall_seconds, 3),
            cases=tuple(records),
        ).write(work.out / f"{name}.json")
        write_table(records, work.out, work.out / f"{name}.csv")


def _case_record(row: Row, out: Path) -> CaseRecord:
    run = read_run(out / row.case.name) if row.state == "done" else None
    shared = ("state", "kept", "reason", "why", "attempts", "peak_memory_mb", "warnings")
    return CaseRecord(
        case=row.case.name,
        query=row.case.query.name,
        seconds=round(row.seconds, 3),
        verdict=None if run is None else run.verdict,
        recovered={}
        if run is None
        else {one.name: one.recovered.donor for one in run.structures if one.recovered is not None},
        **{name: getattr(row, name) for name in shared},
    )


def _earlier_record(folder: Path) -> list[CaseRecord]:
    """The record of a result of an earlier command; none if it cannot be read."""
    try:
        status = StatusRecord.read(folder / STATUS)
    except InputError:
        return []
    query = status.provenance and status.provenance.query
    case = Case(folder.name, Path(query.file if query else ""))
    return [_case_record(_kept(case, status), folder.parent).model_copy(update={"in_run": False})]


def _kept(case: Case, status: StatusRecord) -> Row:
    """The outcome of a case that an earlier run had."""
    fields = {name: getattr(status, name) for name in ("reason", "attempts", "peak_memory_mb", "warnings")}
    return Row(case, status.state, seconds=status.total_seconds, kept=True, **fields)
