"""Progress of a run on the screen."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.progress import Steps
from ..core.text import counted, duration
from .session import Session

if TYPE_CHECKING:
    from ..jobs import Case, Outcome, Row

#: Earlier results that are read to estimate the time of another.
_LOOKED_AT = 20


class RunProgress:
    """Progress as the text of a bar, or as lines where there is no terminal."""

    outcome: Outcome

    def __init__(self, session: Session, out: Path, steps: Mapping[str, float]) -> None:
        from ..jobs import Outcome

        self.outcome = Outcome()
        self._session, self._out = session, out
        #: Usual seconds of the steps of a query.
        self._steps = {"reading": 0.3, **steps, "writing": 0.3}
        self._start = time.monotonic()
        self._ended = 0
        #: Cases of the second pass, once it has begun.
        self._again = 0

    def planned(self, outcome: Outcome) -> None:
        """Show what is kept and what is to do."""
        self.outcome, self._start = outcome, time.monotonic()
        reasons = Counter(row.why for row in outcome.rows.values() if row.why)
        if outcome.kept:
            listed = f" ({', '.join(f'{count} {reason}' for reason, count in reasons.items())})" if reasons else ""
            left = outcome.count("left")
            self._session.note(f"{outcome.kept} of {len(outcome.rows)} kept, {left} to do{listed}")

    def again(self, count: int) -> None:
        """Show that a second pass begins."""
        self._again, self._ended, self._start = count, 0, time.monotonic()
        what = "structures that are not good are tried again with another case as the atlas"
        self._session.note(f"second pass, {counted(count, 'case')}: {what}")

    def begun(self, case: Case) -> None:
        """Show that a case begins."""
        if len(self.outcome.rows) == 1:
            self._session.begin(1, 1, case.name)
            earlier = islice(self._out.glob("*/status.json"), _LOOKED_AT)
            self._session.steps = Steps(self._steps, _usual_seconds(earlier))
        else:
            text = f"{self._state()}: {case.name}"
            self._session.advance(text, "" if self._ended else text)

    def stage(self, case: Case, stage: str) -> None:
        """Show the stage of a case."""
        if len(self.outcome.rows) == 1:
            self._session.progress(stage)
        else:
            self._session.advance(f"{self._state()}: {case.name} {stage}")

    def ended(self, row: Row) -> None:
        """Show how a case ended."""
        self._ended += 1
        query, count = row.case.query, len(self.outcome.rows)
        if row.state == "failed":
            self._session.error(with_path(row))
        for warning in row.warnings:
            self._session.say(f"warning: {query}: {warning}")
        if self._again:
            line = f"[{self._ended}/{self._again}] second pass, {row.case.name}: {row.reason} ({row.seconds:.1f} s)"
            self._session.advance(self._state(), line)
        elif count > 1:
            number = count - self.outcome.count("left")
            line = f"[{number}/{count}] {row.case.name} done in {row.seconds:.1f} s; {self._state()}"
            self._session.advance(self._state(), line if row.state == "done" else "")

    def _state(self) -> str:
        done, failed, left = (self.outcome.count(state) for state in ("done", "failed", "left"))
        text = f"{done} done, {failed} failed, {left} left"
        if self._again:
            left = self._again - self._ended
            text = f"second pass: {self._ended} done, {left} left"
        if left and self._ended:
            text += f", about {duration((time.monotonic() - self._start) / self._ended * left)} left"
        return text


def _usual_seconds(files: Iterable[Path]) -> float | None:
    """Median seconds of earlier results; None if there are none."""
    from ..core.errors import InputError
    from ..records import StatusRecord

    found = []
    for path in files:
        with suppress(InputError):
            found.append(StatusRecord.read(path).total_seconds)
    found = [one for one in found if one]
    return statistics.median(found) if found else None


def with_path(row: Row) -> str:
    """State why a case failed, with the path as the user gave it."""
    return f"{row.case.query}{row.reason.removeprefix(row.case.query.name)}"
