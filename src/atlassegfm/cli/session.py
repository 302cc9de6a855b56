"""What all commands share: options, progress, errors and tables on the screen."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import AtlasSegError, InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from ..dicom import Selection
    from ..settings import Settings

EXIT_FAILURES = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
#: Whose log records are shown.
_PACKAGE = "atlassegfm"

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting; may be repeated. `atlassegfm settings` lists them."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings in TOML, as `atlassegfm settings` prints them."),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress; warnings and errors stay.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Start of the random numbers [default: 0].")
]
NamesOption = Annotated[
    Path | None, typer.Option("--names", metavar="FILE", help="Names of the labels: JSON, or '1 liver' lines.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Segmentation model, or none [default: builtin].")
]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", metavar="auto|click|box|mask", help="What to prompt the model with [default: auto]."),
]
ModelPathOption = Annotated[
    Path | None,
    typer.Option(
        "--model-path",
        metavar="PATH",
        help="File or folder of the model's weights [default: where `atlassegfm models show NAME` says].",
    ),
]
AcceptOption = Annotated[
    bool,
    typer.Option(
        "--accept-licence",
        help="Accept the licence of the model's weights, where it asks for that; noted once for all.",
    ),
]


SeriesOption = Annotated[
    str | None,
    typer.Option(
        "--series",
        metavar="S",
        help="Which series of a DICOM folder: its number, UID or part of its description; '#2' behind it: the second "
        "volume of a 4-D series.",
    ),
]
AtlasSeriesOption = Annotated[
    str | None, typer.Option("--atlas-series", metavar="S", help="The same for the folder of the atlas.")
]
StructuresOption = Annotated[
    str | None,
    typer.Option(
        "--structures",
        metavar="A,B,...",
        help="Structures to take from an RTSTRUCT or DICOM-SEG, by name, pattern or number [default: all].",
    ),
]
SynonymsOption = Annotated[
    Path | None,
    typer.Option(
        "--synonyms", metavar="FILE", help='TOML of names and what files call them: Brainstem = ["brain stem", "BS*"].'
    ),
]
OverlapOption = Annotated[
    str,
    typer.Option(
        "--overlap",
        metavar="refuse|first|last",
        help="Which structure of an RTSTRUCT or DICOM-SEG gets voxels that several have.",
    ),
]


def split_list(text: str | None, option: str) -> tuple[str, ...]:
    """Parts of a list with commas; none if it is not given."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text}: expected names with commas between")
    return tuple(parts)


def build_selection(structures: str | None, synonyms: Path | None, overlap: str) -> Selection:
    """What ``--structures``, ``--synonyms`` and ``--overlap`` say."""
    from ..dicom import OVERLAPS, Selection, read_synonyms

    wanted = split_list(structures, "--structures")
    rule = next((one for one in OVERLAPS if one == overlap), None)
    if rule is None:
        raise InputError(f"--overlap {overlap}: expected one of {', '.join(OVERLAPS)}")
    return Selection(wanted, {} if synonyms is None else read_synonyms(synonyms), rule)


def build_settings(
    config: Path | None,
    overrides: Sequence[str] | None,
    *,
    model: str | None = None,
    model_path: Path | None = None,
    prompt: str | None = None,
    seed: int | None = None,
    base: Settings | None = None,
) -> Settings:
    """Defaults (or ``base``), then the file, then ``--set``, then the options of their own."""
    from ..core.config import with_file, with_overrides, with_table
    from ..settings import Settings

    chosen = base or Settings()
    if config is not None:
        chosen = with_file(chosen, config)
    chosen = with_overrides(chosen, overrides or ())
    path = None if model_path is None else str(model_path)
    for key, value in (("model", model), ("model_path", path), ("prompt", prompt), ("seed", seed)):
        if value is not None:
            chosen = with_table(chosen, {key: value}, origin=f"--{key.replace('_', '-')}")
    return chosen


def accept_licences(models: Iterable[str], session: Session) -> None:
    """Note that the user accepts the licences of the weights of these models, and say which."""
    from ..models import accept_licence, describe_model, licence_accepted
    from ..settings import NO_MODEL

    for name in dict.fromkeys(models):
        weights = None if name == NO_MODEL else describe_model(name).weights
        if weights is not None and weights.non_commercial and licence_accepted(name) is None:
            accept_licence(name)
            session.say(f"licence of the weights of {name} accepted: {weights.licence}, {weights.licence_url}")


class Session:
    """Progress, warnings and errors on standard error."""

    def __init__(self, console: Console, bar: Progress | None, *, quiet: bool) -> None:
        self._console = console
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
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._prefix}{stage}".replace("[", r"\["))
        elif not self._quiet and not self._silent and ": " not in stage:
            self.say(f"{self._prefix}{stage}")

    def advance(self, description: str, line: str = "") -> None:
        """Say how far all of it is: as the bar's text, or, where there is no bar, in a line of its own."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=description.replace("[", r"\["))
        elif line and not self._quiet:
            self.say(line)

    def error(self, reason: str) -> None:
        """Say what went wrong."""
        self.say(f"error: {sentence(reason)}")

    def say(self, text: str) -> None:
        """One line, as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _WarningLines(logging.Handler):
    """Log records as lines of a session."""

    def __init__(self, session: Session) -> None:
        super().__init__(logging.WARNING)
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        self._session.say(f"{record.levelname.lower()}: {self.format(record)}")


@contextmanager
def open_session(quiet: bool, *, warnings: bool = True) -> Iterator[Session]:
    """Show progress and warnings; turn errors of this package into a line and an exit code."""
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
        session = Session(console, bar, quiet=quiet)
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
