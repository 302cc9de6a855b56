"""``atlassegfm check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AtlasOptions, options
from .session import EXIT_FAILURES, EXIT_USAGE, open_session, print_json

#: Width of tables that go into a file or a pipe.
_PIPED_WIDTH = 160


@options
class CheckOptions(AtlasOptions):
    """Options of ``check``."""

    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES...", help="Scans, label maps, DICOM series folders, RTSTRUCT, DICOM-SEG."),
    ]
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 where there is a warning, for scripts that stop at any doubt.")
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False


def check(options: CheckOptions) -> None:
    """Look for what is wrong with scans and label maps, and how to mend it.

    With --context, or --atlas and --labels, each scan is also fitted to the atlas (some seconds): are left and right
    swapped, is the contrast inverted, does it show the structures? The exit code is 2 if a file could not be used.
    """
    with open_session(quiet=True, warnings=False) as session:
        from ..check import check_files
        from ..jobs.scans import find_scans

        atlas = None
        if any(one is not None for one in (options.context, options.atlas, options.labels, options.names)):
            options.check_atlas()
            atlas = options.load_atlas()
        scans = find_scans(options.files, labels=True)
        for remark in scans.remarks():
            session.say(remark)
        found = check_files(scans.found, options.series, atlas)
    if options.as_json:
        print_json(found.to_dict())
    else:
        from rich.console import Console

        from .check_table import as_table

        console = Console()
        if not console.is_terminal:
            console.width = _PIPED_WIDTH
        console.print(as_table(found))
    if found.worst == "error":
        raise typer.Exit(EXIT_USAGE)
    if options.strict and found.worst == "warning":
        raise typer.Exit(EXIT_FAILURES)
