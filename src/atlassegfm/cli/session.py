"""Progress, errors and tables on the screen, for all commands."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ..core.errors import AtlasSegError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


EXIT_FAILURES = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
#: Whose log records are shown.
_PACKAGE = "atlassegfm"


def accept_licences(models: Iterable[str], session: Session) -> None:
    """Record that the user accepts the licences of the weights of these models, and name them."""
    from ..models import accept_licence, describe_model, licence_accepted
    from ..settings import NO_MODEL

    for name in dict.fromkeys(models):
        weights = None if name == NO_MODEL else describe_model(name).weights
        if weights is not None and weights.non_commercial and licence_accepted(name) is None:
            accept_licence(name)
            session.say(f"licence of the weights of {name} accepted: {weights.licence}, {weights.licence_url}")


class Session:
    """Progress, warnings and errors on standard error."""

    def __init__(self, console: Console, bar: Progress | None, *, quiet: bool, log: TextIO | None = None) -> None:
        self._console = console
        self._log = log
        self._bar = bar
        self._task: TaskID | None = None if bar is None else bar.add_task("starting")
        self._quiet = quiet
        self._prefix = ""
        self._silent = False

    def begin(self, number: int, count: int, name: str) -> None:
        """Say that a query begins."""
        self._prefix = f"{name} " if count == 1 else f"[{number}/{count}] {name} "

    def begin_pair(self, number: int, count: int, name: str) -> None:
        """Say that a pair of a benchmark begins; one line for each where there is no bar."""
        self.begin(number, count, name)
        if self._bar is None and not self._quiet:
            self.say(self._prefix.rstrip())
            self._silent = True

    def progress(self, stage: str) -> None:
        """Say what is being done; parts of a stage come as "stage: part"."""
        self._record(f"{self._prefix}{stage}")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._prefix}{stage}".replace("[", r"\["))
        elif not self._quiet and not self._silent and ": " not in stage:
            self._show(f"{self._prefix}{stage}")

    def advance(self, description: str, line: str = "") -> None:
        """Say how far all of it is: as the bar's text, or, where there is no bar, in a line of its own."""
        self._record(line)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=description.replace("[", r"\["))
        elif line and not self._quiet:
            self._show(line)

    def error(self, reason: str) -> None:
        """Say what went wrong."""
        self.say(f"error: {sentence(reason)}")

    def say(self, text: str) -> None:
        """One line, as it is."""
        self._record(text)
        self._show(text)

    def _show(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _record(self, text: str) -> None:
        """Write a line into the log file, with date and time."""
        if self._log is not None and not self._log.closed and text:
            self._log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
            self._log.flush()


class _WarningLines(logging.Handler):
    """Log records as lines of a session."""

    def __init__(self, session: Session) -> None:
        super().__init__(logging.WARNING)
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        self._session.say(f"{record.levelname.lower()}: {self.format(record)}")


@contextmanager
def open_session(quiet: bool, *, warnings: bool = True, log: Path | None = None) -> Iterator[Session]:
    """Show progress and warnings; turn errors of this package into a line and an exit code.

    All of it goes to the end of the file ``log`` too, where one is given, even if it is not shown.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with ExitStack() as stack:
        bar = None
        if console.is_terminal and not quiet:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
            )
            stack.enter_context(bar)
        file = None
        if log is not None:
            try:
                file = stack.enter_context(log.open("a", encoding="utf-8"))
            except OSError as error:
                Session(console, bar, quiet=quiet).error(f"{log}: cannot be written ({error.strerror}); choose another")
                raise typer.Exit(EXIT_USAGE) from None
        session = Session(console, bar, quiet=quiet, log=file)
        handler = _WarningLines(session) if warnings else logging.NullHandler()
        package = logging.getLogger(_PACKAGE)
        package.addHandler(handler)
        stack.callback(package.removeHandler, handler)
        try:
            yield session
        except AtlasSegError as error:
            session.error(str(error))
            raise typer.Exit(EXIT_USAGE) from None


def sentence(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def print_json(content: Any) -> None:
    """Print plain values as JSON, which has no NaN."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 99, numbers_to: int = 99
) -> None:
    """Columns as wide as their content, the numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if numbers_from <= column < numbers_to else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  " + "  ".join(cells).rstrip())


def score_text(value: float | None) -> str:
    """A score for a table; a dash for none."""
    return "-" if value is None or value != value else f"{value:.3f}"


def or_none(value: float | None) -> float | None:
    """A score for JSON."""
    return None if value is None or value != value else round(value, 4)
