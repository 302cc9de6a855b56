"""Work that takes no time, for tests of those who share it out. Other processes import it, so it is a module."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atlassegfm.core.errors import InputError
from atlassegfm.core.parallel import thread_variables
from atlassegfm.jobs.plan import Case
from atlassegfm.jobs.store import write_failure
from atlassegfm.jobs.work import Row
from atlassegfm.records import Provenance, StatusRecord
from atlassegfm.settings import Settings

PROVENANCE = Provenance(
    version="stand-in",
    settings="",
    context="",
    context_version="",
    weights=None,
    keep=False,
    formats=("rtstruct",),
    series=None,
)


@dataclass(frozen=True)
class StandIn:
    """Writes a result of a few bytes for each case.

    Parameters
    ----------
    out : Path
        Folder of the result folders.
    deadly : str
        Begin of the names of cases whose worker is killed at the first attempt.
    fatal : str
        The same at every attempt.
    refuses : bool
        Whether it cannot be opened.
    seconds : float
        That a case takes.
    """

    out: Path
    deadly: str = "deadly"
    fatal: str = "fatal"
    refuses: bool = False
    seconds: float = 0.0
    device: str = "cpu"
    threads: int = 1
    settings: Settings = field(default_factory=Settings)

    @property
    def key(self) -> str:
        return str(self.out)

    @property
    def provenance(self) -> Provenance:
        return PROVENANCE

    @property
    def environment(self) -> Mapping[str, str]:
        return thread_variables(1)

    def absolute(self) -> StandIn:
        return self

    def open(self, context: object = None) -> Callable[[Case, int, Callable[[str], None]], Row]:
        if self.refuses:
            raise InputError("atlas.nii.gz: no such file")
        with (self.out / "opened.txt").open("a") as log:
            log.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")

        def do(case: Case, attempt: int, tell: Callable[[str], None]) -> Row:
            tell("working")
            with (self.out / "begun.txt").open("a") as log:
                log.write(f"{case.name} {attempt} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
            if case.name.startswith(self.fatal) or (case.name.startswith(self.deadly) and attempt == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
            write_failure(self.out / case.name, StatusRecord(state="done", provenance=PROVENANCE))
            return Row(case, "done", attempts=attempt)

        return do

    def give_up(self, case: Case, reason: str, attempts: int) -> Row:
        write_failure(self.out / case.name, StatusRecord(state="failed"))
        return Row(case, "failed", reason, attempts=attempts)


class Silent:
    """Watches and says nothing."""

    def planned(self, outcome: object) -> None: ...

    def ended(self, row: object) -> None: ...

    def begun(self, case: Case) -> None: ...

    def stage(self, case: Case, text: str) -> None: ...

    def again(self, count: int) -> None: ...
