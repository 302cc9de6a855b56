"""The command line: arguments to options, results to tables and exit codes.

Progress and errors go to standard error, results to standard output. Exit codes: 0 all done, 1 some queries failed,
2 bad usage or input, 130 interrupted.
What computes is imported inside the commands: help and usage errors come at once.
"""

import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from ..core.parallel import NUMPY_THREADS
from .benchmark import app as benchmark_app
from .check import check
from .context import app as context_app
from .convert import convert
from .customize import customize
from .demo import demo
from .evaluate import evaluate
from .export import export
from .fields import command
from .help import HELP_OPTIONS, Group, usage_error
from .models import app as models_app
from .options import SettingsOptions
from .report import report
from .segment import segment
from .serve import serve
from .session import EXIT_INTERRUPTED, open_session
from .suggest import suggest

app = typer.Typer(
    name="atlassegfm",
    cls=Group,
    help="One annotated scan (the atlas) segments every other scan of its kind (the queries).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": HELP_OPTIONS},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"atlassegfm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _one in (segment, demo, check, customize, evaluate, report, serve, export, convert, suggest):
    command(app, _one.__name__)(_one)
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(models_app, name="models")
app.add_typer(context_app, name="context")


@command(app, "settings")
def settings(options: SettingsOptions) -> None:
    """Print all settings as TOML, with what they mean."""
    with open_session(quiet=True):
        from ..core.config import to_toml

        typer.echo(to_toml(options.settings()), nl=False)


def main() -> NoReturn:
    """Run the command line and exit."""
    # PyTorch's threads spin while they wait for each other. On a machine with other work, two threads on two cores
    # then took 140 s for a pair that takes 25 s when they sleep. Read when PyTorch is loaded, so set first.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault(*NUMPY_THREADS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what the screen's encoding does not
            stream.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = typer.main.get_command(app).main(prog_name="atlassegfm", standalone_mode=False)
    except typer.TyperException as error:
        # Without arguments, the message is the help: it keeps its lines.
        is_help = type(error).__name__ == "NoArgsIsHelpError"
        typer.echo(error.format_message() if is_help else f"error: {usage_error(error)}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == EXIT_INTERRUPTED:
        typer.echo("interrupted", err=True)
    sys.exit(code or 0)


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """End by an exception, so that nothing unfinished is left behind when a cluster ends the job."""
    raise SystemExit(128 + number)  # as shells report a process that a signal ended
