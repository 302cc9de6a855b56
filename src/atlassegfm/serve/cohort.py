"""The run in the background: what is missing or open is segmented, in worker processes, by the path of ``segment``."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..context import Context
from ..core.errors import AtlasSegError, InputError
from ..core.files import output_folder
from ..jobs import Case, ContextFolder, Output, Row, SegmentWork, provenance_of, run
from ..jobs.pool import run_in_processes, visible_gpus
from ..jobs.run import Outcome, RunOptions, plan_of
from ..jobs.table import read_run
from ..records import STATUS, StatusRecord
from ..settings import Settings

State = Literal["running", "done", "stopped", "failed"]
#: Threads of a case, as ``segment`` takes them for several.
_THREADS = 1


@dataclass(frozen=True)
class Job:
    """What every run of a server has in common."""

    context: Path
    out: Path
    change: Callable[[Settings], Settings]  # settings of the command line, over those of the context
    device: str = "cpu"
    workers: int = 1

    def work(self) -> tuple[SegmentWork, Context]:
        """Read the context as it is now, and describe the work with it.

        Intermediate results are kept, unless the folder has results without them, which would be computed again.
        """
        context = Context.load(self.context)
        settings = self.change(context.settings)
        context.check_settings(settings)
        output = _output_of(self.out)
        made = provenance_of(context, settings, device=self.device, threads=_THREADS, output=output)
        source = ContextFolder(self.context)
        return SegmentWork(self.out, source, settings, self.device, _THREADS, output, made), context


def _output_of(out: Path) -> Output:
    """Files of results as those in the folder have them."""
    for path in sorted(out.glob(f"*/{STATUS}")):
        try:
            made = StatusRecord.read(path).provenance
        except InputError:
            continue
        if made is not None:
            return Output(made.keep, made.formats, made.series)
    return Output(keep=True)


#: Verdict and estimated Dice of each structure by name, by name of the case.
Verdicts = dict[str, dict[str, tuple[str | None, float | None]]]


@dataclass
class Cohort:
    """One run at a time; a watcher of it. Its fields are read by requests while it runs."""

    job: Job
    state: State | None = None
    reason: str = ""
    stages: dict[str, str] = field(default_factory=dict)  # by name of the case that is being computed
    outcome: Outcome = field(default_factory=Outcome)
    before: Verdicts = field(default_factory=dict)
    compared: list[dict[str, Any]] = field(default_factory=list)  # what changed, once it ended
    started: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self, cases: Sequence[Case]) -> None:
        """Begin to compute what is missing or outdated of these cases; InputError if a run is under way."""
        if self.state == "running":
            raise InputError("a run is under way; wait for it, or stop it")
        self._stop.clear()
        self.state, self.reason, self.stages, self.started = "running", "", {}, time.monotonic()
        self.outcome, self.before, self.compared = Outcome(), {}, []
        self._thread = threading.Thread(target=self._run, args=(list(cases),), daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the run; what is done is kept."""
        self._stop.set()
        if self._thread is not None and timeout_s is not None:
            self._thread.join(timeout_s)

    def is_computing(self, name: str) -> bool:
        """Check whether the result of a case is about to be replaced."""
        row = self.outcome.rows.get(name)
        return self.state == "running" and (row is None or row.state == "left")

    def _compared(self) -> list[dict[str, Any]]:
        """List the structures whose verdict or estimate the run changed."""
        after = verdicts_in(self.job.out, self.before)
        return [
            {"case": case, "structure": name, "before": found, "after": after[case].get(name)}
            for case, rows in self.before.items()
            for name, found in rows.items()
            if case in after and after[case].get(name) != found and self._is_done(case)
        ]

    def _is_done(self, case: str) -> bool:
        return case in self.outcome.rows and self.outcome.rows[case].state == "done"

    def _run(self, cases: list[Case]) -> None:
        try:
            work, context = self.job.work()
            plan = plan_of(cases, work)
            self.before = verdicts_in(work.out, [name for name, row in plan.rows.items() if row.state == "left"])
            gpus = visible_gpus() if work.device == "cuda" else []
            workers = min(self.job.workers, len(gpus)) if gpus else self.job.workers
            runner = functools.partial(run_in_processes, workers=workers, gpus=gpus, stopped=self._stop.is_set)
            options = RunOptions(workers=workers, prepare=lambda one: one.with_gate(context, lambda _: None))
            with output_folder(work.out):
                run(cases, work, runner, self, options)
            self.compared = self._compared()
            self.state = "stopped" if self._stop.is_set() else "done"
        except AtlasSegError as error:
            self.state, self.reason = "failed", str(error)
        except Exception as error:
            self.state, self.reason = "failed", f"unexpected error ({error!r})"
            raise
        finally:
            self.stages = {}

    # What the run reports

    def planned(self, outcome: Outcome) -> None:
        """Take over what is kept and what is to do."""
        self.outcome = outcome

    def begun(self, case: Case) -> None:
        """Show that a case begins."""
        self.stages = {**self.stages, case.name: "reading"}

    def stage(self, case: Case, stage: str) -> None:
        """Show the stage of a case."""
        self.stages = {**self.stages, case.name: stage}

    def ended(self, row: Row) -> None:
        """Show that a case is done or failed."""
        self.outcome.rows[row.case.name] = replace(row, why=self.outcome.rows[row.case.name].why)
        self.stages = {name: stage for name, stage in self.stages.items() if name != row.case.name}

    def again(self, count: int) -> None:
        """Nothing to show: cases of the second pass begin and end once more."""


def verdicts_in(out: Path, names: Sequence[str] | Mapping[str, Any]) -> Verdicts:
    """Read verdict and estimate of each structure of the cases that have a result."""
    runs = {name: found for name in names if (found := read_run(out / name)) is not None}
    return {
        name: {
            one.name: (None, None) if one.quality is None else (one.quality.verdict, one.quality.estimated_dice)
            for one in found.structures
        }
        for name, found in runs.items()
    }
