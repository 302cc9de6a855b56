"""``atlassegfm check``."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import AtlasOptions, ScreenOptions, argument, flag, options
from .session import EXIT_FAILURES, EXIT_USAGE, print_json

#: Width of tables that go into a file or a pipe.
_PIPED_WIDTH = 160


@options
class CheckOptions(AtlasOptions, ScreenOptions):
    """Options of ``check``."""

    files: list[Path] = argument("FILES...", "Scans, label maps, DICOM series folders, RTSTRUCT, DICOM-SEG.")
    strict: bool = flag("--strict", "Exit code 1 where there is a warning, for scripts that stop at any doubt.")


def check(options: CheckOptions) -> None:
    """Look for what is wrong with scans and label maps, and how to mend it.

    With --context, or --atlas and --labels, each scan is also fitted to the atlas (some seconds): is it the same part
    of the body, are left and right swapped, is the contrast inverted, does it show the structures? The exit code is 2
    if a file could not be used.
    """
    with options.session(warnings=False) as session:
        from ..check import check_files
        from ..jobs.scans import find_scans

        atlas = None
        if any(one is not None for one in (options.context, options.atlas, options.labels, options.names)):
            atlas = options.load_atlas()
        scans = find_scans(options.files, labels=True)
        for remark in scans.remarks():
            session.say(remark)
        found = check_files(scans.found, options.series, atlas, on_stage=session.progress)
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
