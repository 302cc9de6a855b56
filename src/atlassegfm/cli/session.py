"""Progress, errors and tables on the screen, for all commands."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ..core.errors import AtlasSegError
from ..core.files import disk_errors
from ..core.progress import Steps
from ..core.text import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


EXIT_FAILURES = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
#: Where there is no bar, also parts of a stage are shown after so many seconds without a line.
_SILENCE_S = 10.0
#: Columns of text are not made narrower than this to fit the screen.
_NARROWEST = 12


def accept_licences(models: Iterable[str], session: Session) -> None:
    """Record that the user accepts the licences of the weights of these models, and name them."""
    from ..models import accept_licence, describe_published, licence_accepted
    from ..settings import NO_MODEL

    for name in dict.fromkeys(models):
        weights = None if name == NO_MODEL else describe_published(name).weights
        if weights is not None and weights.non_commercial and licence_accepted(name) is None:
            accept_licence(name)
            session.say(f"licence of the weights of {name} accepted: {weights.licence}, {weights.licence_url}")


class Session:
    """Progress, warnings and errors on standard error."""

    #: Steps of the job, for "2 of 6" and the time left; None where they are not known.
    steps: Steps | None = None
    #: All lines are added to this file, with date and time.
    log: TextIO | None = None

    def __init__(self, console: Console, bar: Progress | None, *, quiet: bool) -> None:
        self._console, self._bar = console, bar
        #: Whether lines of progress are printed: there is no bar, and they are wanted.
        self._lines = bar is None and not quiet
        self._quiet, self._silent, self._prefix = quiet, False, ""
        self._start = self._shown = time.monotonic()
        self._end: float | None = None
        # Last, as the bar is drawn by a thread of its own.
        self._task = None if bar is None else bar.add_task("starting", session=self)

    @property
    def left(self) -> str:
        """Estimate of the time left, as "about 20 s left"; empty where it is not known."""
        left = None if self._end is None else self._end - time.monotonic()
        left = left if self.steps is None else self.steps.left
        return f"about {duration(left)} left" if left is not None and left >= 1 else ""

    def begin(self, number: int, count: int, name: str, stage: str = "") -> None:
        """Show that a query begins, with this stage; the time left is estimated from those before it."""
        self._prefix = f"{name} " if count == 1 else f"[{number}/{count}] {name} "
        self.steps, now = None, time.monotonic()
        if number == 1:
            self._start, self._end = now, None
        else:
            self._end = now + (now - self._start) / (number - 1) * (count - number + 1)
        if stage:
            self.progress(stage)

    def begin_pair(self, number: int, count: int, name: str, stage: str = "") -> None:
        """Show that a pair of a benchmark begins; one line for each where there is no bar."""
        self.begin(number, count, name)
        if self._lines:
            self.say(", ".join(filter(None, (self._prefix.rstrip(), self.left))))
            self._silent = True
        if stage:
            self.progress(stage)

    def progress(self, stage: str) -> None:
        """Show what is being done; parts of a stage come as "stage: part"."""
        where = "" if self.steps is None else self.steps.begin(stage)
        text = f"{self._prefix}{stage}"
        self._record(text)
        if self._lines and (self._waited() or not (self._silent or ": " in stage)):
            known = ", ".join(filter(None, (where, self.left)))
            self._show(f"{text} ({known})" if known else text)
        self._update(f"{text} ({where})" if where else text)

    def advance(self, description: str, line: str = "") -> None:
        """Show how far all of it is: as the bar's text, or, where there is no bar, in a line of its own."""
        self._record(line)
        if self._lines and (line or self._waited()):
            self._show(line or description)
        self._update(description)

    def note(self, line: str) -> None:
        """Show a line that stays, unless all shall be quiet."""
        self._record(line)
        if not self._quiet:
            self._show(line)

    def _update(self, description: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=description.replace("[", r"\["))

    def _waited(self) -> bool:
        return time.monotonic() - self._shown >= _SILENCE_S

    def error(self, reason: str) -> None:
        """Show what went wrong."""
        self.say(f"error: {sentence(reason)}")

    def say(self, text: str) -> None:
        """Show one line, as it is."""
        self._record(text)
        self._show(text)

    def _show(self, text: str) -> None:
        self._shown = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _record(self, text: str) -> None:
        """Write a line into the log file, with date and time."""
        if self.log is not None and not self.log.closed and text:
            self.log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
            self.log.flush()


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
            from rich.table import Column

            # The text comes last and is cut at its end: the time always shows.
            last = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            text = TextColumn("{task.fields[session].left}  {task.description}", table_column=last)
            bar = Progress(SpinnerColumn(), TimeElapsedColumn(), text, console=console, transient=True, expand=True)
            stack.enter_context(bar)
        session = Session(console, bar, quiet=quiet)
        handler = _WarningLines(session) if warnings else logging.NullHandler()
        package = logging.getLogger("atlassegfm")
        package.addHandler(handler)
        stack.callback(package.removeHandler, handler)
        try:
            if log is not None:
                with disk_errors(log):
                    session.log = stack.enter_context(log.open("a", encoding="utf-8"))
            yield session
        except AtlasSegError as error:
            session.error(str(error))
            raise typer.Exit(EXIT_USAGE) from None


def sentence(text: str) -> str:
    """Join a text to one line."""
    return " ".join(text.split())


def print_json(content: Any) -> None:
    """Print plain values as JSON, which has no NaN."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 99, numbers_to: int = 99
) -> None:
    """Print columns as wide as their content, the numbers to the right; text is wrapped to fit the screen."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    numbers = range(numbers_from, numbers_to)
    widths, least = [], []
    for position, cells in enumerate(zip(head, *rows, strict=True)):
        longest = max(map(cell_len, cells))
        word = max(map(cell_len, [*cells[0].split(), *(cells[1:] if position in numbers else ()), ""]))
        widths.append(longest)
        least.append(word if position in numbers else min(longest, max(word, _NARROWEST)))
    room = shutil.get_terminal_size().columns - 2 * len(widths)
    while sum(widths) > room and widths != least:
        widest = max(range(len(widths)), key=lambda n: (widths[n] > least[n], widths[n]))
        widths[widest] -= 1
    columns = [
        Column(width=width, overflow="fold", justify="right" if position in numbers else "left")
        for position, width in enumerate(widths)
    ]
    table = Table(*columns, box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for row in (head, *rows):
        table.add_row(*map(Text, row))
    console = Console(width=sum(widths) + 2 * len(widths), color_system=None)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        typer.echo("  " + line.rstrip())


def score_text(value: float | None) -> str:
    """Format a score for a table; a dash for none."""
    return "-" if value is None or value != value else f"{value:.3f}"
