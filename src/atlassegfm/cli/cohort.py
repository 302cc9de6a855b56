"""``segment`` with many queries: whom to ask, what to show meanwhile, what to say in the end."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError
from .session import EXIT_FAILURES, EXIT_USAGE, Session, print_json, print_table

if TYPE_CHECKING:
    from ..jobs import Case, Outcome, Output, Row, SegmentWork
    from ..jobs.run import Runner
    from ..jobs.work import ContextSource
    from ..settings import Settings

#: Threads of a case, where nothing else is asked for: fewer seconds for all of them than with more threads for each,
#: and one number for all machines, so that results do not depend on where they were made.
_THREADS = 1
#: Up to so many cases the table shows them all, else those that need a look.
_LISTED = 50
#: Failures named in the last line.
_NAMED = 10

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        help="Scans to segment at a time, each in a process of its own [default: 1]. On GPUs at most one for each.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Threads for each scan [default: 1 with several queries, all cores with one]. Another number moves "
        "borders a little.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Segment all queries anew, also those whose result is there already.")
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Do the I-th of N parts of the queries, as one job of a job array."),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="local|slurm|tcp://HOST:PORT",
        help="Segment on a Dask cluster (extra 'cluster'): processes here, Slurm jobs, or a scheduler that runs.",
    ),
]
ClusterOptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cluster-option", metavar="KEY=VALUE", help="What a Slurm job asks for, as queue=gpu; may be repeated."
    ),
]


@dataclass(frozen=True)
class CohortOptions:
    """How a cohort is to be done, as the command line has it; None where nothing was said."""

    workers: int | None
    threads: int | None
    force: bool
    shard: str | None
    cluster: str | None
    cluster_options: Sequence[str]

    @property
    def wanted(self) -> bool:
        """Whether an option was given that makes sense for a cohort alone."""
        return any(
            (self.workers is not None, self.force, self.shard, self.cluster is not None, bool(self.cluster_options))
        )

    def check(self) -> None:
        """Refuse what does not go together, before anything is read."""
        from ..jobs import parse_shard

        if self.shard is not None:
            parse_shard(self.shard)
        if self.cluster is not None:
            from ..jobs.cluster import parse_options, require_cluster

            require_cluster(self.cluster)
            parse_options(self.cluster_options)
        if self.cluster_options and self.cluster != "slurm":
            raise InputError("--cluster-option: is for --cluster slurm; leave it out, or say which cluster")


def segment_cohort(
    cases: Sequence[Case],
    out: Path,
    source: ContextSource,
    settings: Settings,
    device: str,
    options: CohortOptions,
    session: Session,
    *,
    output: Output,
) -> Outcome:
    """Segment what is missing or changed."""
    from ..jobs import Outcome, SegmentWork, parse_shard, run_cohort
    from ..jobs.work import made_with

    threads = options.threads or _THREADS
    session.progress("reading the atlas")
    made = made_with(source.load(), settings, device=device, threads=threads, output=output)
    work = SegmentWork(out, source, settings, device, threads, output, made)
    runner, workers = _runner(work, threads, options, session, len(cases))
    progress, outcome = _Progress(session), Outcome()
    session.progress("looking for results")
    try:
        run_cohort(
            cases,
            out,
            work,
            runner,
            progress,
            outcome=outcome,
            on_planned=progress.planned,
            on_ended=progress.ended,
            about={
                "device": device,
                "model": settings.model,
                "workers": workers,
                "threads": threads,
                "cluster": options.cluster,
            },
            force=options.force,
            shard=None if options.shard is None else parse_shard(options.shard),
        )
    except (KeyboardInterrupt, SystemExit):
        session.say(
            f"stopped: {outcome.count('done')} done, {outcome.count('left')} left; the same command goes on from there"
        )
        raise
    return outcome


def tell_outcome(outcome: Outcome, out: Path, session: Session, *, as_json: bool) -> None:
    """Print how it went, and end with the exit code it comes to."""
    _print_outcome(outcome, out, as_json=as_json)
    _end(outcome, session)


def _runner(
    work: SegmentWork, threads: int, options: CohortOptions, session: Session, count: int
) -> tuple[Runner, int]:
    """Who does the work, and how many they are."""
    from ..jobs.pool import run_here, run_in_processes, visible_gpus

    workers = options.workers or 1
    if options.cluster is not None:
        from ..jobs.cluster import parse_options, run_on_cluster

        gpu = work.device == "cuda"
        if gpu and options.cluster == "local" and workers > 1:
            session.say("1 worker: a local cluster has one GPU; leave out --cluster to use all of this machine")
            workers = 1
        return functools.partial(
            run_on_cluster,
            kind=options.cluster,
            workers=workers,
            threads=threads,
            gpu=gpu,
            options=parse_options(options.cluster_options),
        ), workers
    gpus: list[str] = visible_gpus() if work.device == "cuda" else []
    if gpus and workers > len(gpus):
        session.say(f"{len(gpus)} workers instead of {workers}: one for each GPU")
        workers = len(gpus)
    if workers == 1:
        _tell_of_idle_cores(work, threads, session, count)
        return run_here, 1
    return functools.partial(run_in_processes, workers=workers, gpus=gpus), workers


def _tell_of_idle_cores(work: SegmentWork, threads: int, session: Session, count: int) -> None:
    from ..core.parallel import usable_cores

    side_by_side = min(usable_cores() // threads, count)
    if work.device == "cpu" and side_by_side > 1:
        session.advance(
            "",
            f"1 worker; --workers {side_by_side} would use all {usable_cores()} cores, with the same results and "
            f"{side_by_side} times the memory",
        )


class _Progress:
    """A line, or a bar's text, for what happens."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._outcome: Outcome | None = None
        self._start = 0.0
        self._ended = 0

    def planned(self, outcome: Outcome) -> None:
        """It is known what there is to do."""
        self._outcome, self._start = outcome, time.monotonic()
        why: dict[str, int] = {}
        for row in outcome.rows.values():
            if row.why:
                why[row.why] = why.get(row.why, 0) + 1
        if outcome.kept:
            reasons = f" ({', '.join(f'{count} {word}' for word, count in why.items())})" if why else ""
            self._session.advance(
                "", f"{outcome.kept} of {len(outcome.rows)} kept, {outcome.count('left')} to do{reasons}"
            )

    def begun(self, case: Case) -> None:
        """A case begins."""
        self._session.advance(f"{self._state()}: {case.query.name}")

    def stage(self, case: Case, text: str) -> None:
        """A stage of a case begins."""
        self._session.advance(f"{self._state()}: {case.query.name} {text}")

    def ended(self, row: Row) -> None:
        """A case has ended."""
        self._ended += 1
        query = row.case.query
        if row.state == "failed":
            self._session.error(_with_folder(row))
        for doubt in row.doubts:
            self._session.say(f"warning: {query}: {doubt}")
        line = f"{query.name} done in {row.seconds:.1f} s; {self._state()}" if row.state == "done" else ""
        self._session.advance(self._state(), line and f"[{self._number()}/{self._count()}] {line}")

    def _count(self) -> int:
        return 0 if self._outcome is None else len(self._outcome.rows)

    def _number(self) -> int:
        return 0 if self._outcome is None else self._count() - self._outcome.count("left")

    def _state(self) -> str:
        if self._outcome is None:
            return ""
        done, failed, left = (self._outcome.count(state) for state in ("done", "failed", "left"))
        text = f"{done} done, {failed} failed, {left} left"
        if left and self._ended:
            text += f", about {_duration((time.monotonic() - self._start) / self._ended * left)} left"
        return text


def _duration(seconds: float) -> str:
    """Two figures are all that is known of it."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _with_folder(row: Row) -> str:
    """Why a case failed, with the path as the user gave it."""
    return f"{row.case.query}{row.reason.removeprefix(row.case.query.name)}"


def _print_outcome(outcome: Outcome, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "results": [_result(row, out) for row in outcome.rows.values() if row.state == "done"],
                "failures": [{"query": row.case.query.name, "reason": _with_folder(row)} for row in outcome.failed],
                **{key: value for key, value in outcome.summary().items() if key != "cases"},
            }
        )
        return
    rows = list(outcome.rows.values())
    shown = rows if len(rows) <= _LISTED else [row for row in rows if row.state != "done" or row.doubts]
    if shown:
        print_table(
            ("case", "state", "seconds", "MB", "remark"),
            [
                (
                    row.case.name,
                    "kept" if row.kept else row.state,
                    f"{row.seconds:.1f}",
                    "" if row.peak_memory_mb is None else str(row.peak_memory_mb),
                    "; ".join((row.reason, *row.doubts) if row.reason else row.doubts),
                )
                for row in shown
            ],
            numbers_from=2,
            numbers_to=4,
        )
    typer.echo(
        f"{len(rows)} queries: {outcome.count('done')} done (of them {outcome.kept} kept), {outcome.count('failed')} "
        f"failed, in {_duration(outcome.wall_seconds)} -> {out}"
    )


def _result(row: Row, out: Path) -> dict[str, Any]:
    """What stands in the files of a result."""
    from ..jobs.results import RUN, STATUS

    folder = out / row.case.name
    content: dict[str, Any] = {"query": row.case.query.name, "output": str(folder), "kept": row.kept}
    for name in (RUN, STATUS):
        content |= json.loads((folder / name).read_text(encoding="utf-8"))
    return content


def _end(outcome: Outcome, session: Session) -> None:
    failed = outcome.failed
    if not failed:
        return
    if len(outcome.rows) > 1:
        named = ", ".join(str(row.case.query) for row in failed[:_NAMED])
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        session.error(f"{len(failed)} of {len(outcome.rows)} queries failed: {named}{more}")
    # Where every query is bad input, the call was wrong as a whole.
    all_bad = all(row.is_input for row in failed) and not outcome.count("done")
    raise typer.Exit(EXIT_USAGE if all_bad else EXIT_FAILURES)
