"""The command ``report``, and what ``segment --report`` does when all is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError, MissingExtraError
from .session import JsonOption, QuietOption, Session, open_session, print_json

if TYPE_CHECKING:
    from ..report import Written


def require_pictures() -> None:
    """Check that ``overview.png`` can be drawn, in the words of the command line."""
    from ..report import require_report_extra

    try:
        require_report_extra()
    except MissingExtraError as error:
        raise InputError(f"{error}, or leave the pictures out (--no-picture)") from None


def report_on(folder: Path, images: Sequence[Path], session: Session) -> Written:
    """Write the report of a folder of results with its usual parts; what ``segment --report`` ends in."""
    from ..report import write_report

    def tell(number: int, count: int, name: str) -> None:
        session.begin(number, count, name)
        session.progress("page")

    written = write_report(folder, images=images, on_case=tell)
    for problem in written.problems:
        session.error(problem)
    return written


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of results, as `segment -o` writes it.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The page of the cohort [default: OUT/report.html]."),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            metavar="PATH",
            help="The queries: files, DICOM series folders, or folders that they lie in; may be repeated. Results do "
            "not say where these are; without them only labels are shown.",
        ),
    ] = None,
    cases: Annotated[bool, typer.Option("--cases/--no-cases", help="Write a page for each case too.")] = True,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Draw CASE/overview.png too (extra 'report').")
    ] = True,
    viewer_voxels: Annotated[
        int,
        typer.Option(
            "--viewer-voxels",
            metavar="N",
            min=0,
            help="Reduce scans to so many voxels for the interactive view; 0 leaves the view out.",
        ),
    ] = 8_000_000,
    title: Annotated[str, typer.Option("--title", help="Head of the page [default: the name of OUT].")] = "",
    force: Annotated[bool, typer.Option("--force", help="Make pages again that are up to date.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write pages that show results: one for all, one for each case.

    OUT/report.html has all cases and structures in a table, and what to look at first; OUT/CASE/report.html has slices
    through every structure and an interactive view. Each page holds all it needs and loads nothing.
    """
    with open_session(quiet) as session:
        if picture and cases:
            require_pictures()
        from ..report import CaseOptions, ReportOptions, write_report

        def tell(number: int, count: int, name: str) -> None:
            session.begin(number, count, name)
            session.progress("page")

        written = write_report(
            folder,
            out,
            images=images or (),
            options=ReportOptions(cases, force, CaseOptions(viewer_voxels, picture), title),
            on_case=tell,
        )
        for problem in written.problems:
            session.error(problem)
    if as_json:
        print_json(
            {
                "report": str(written.path),
                "cases": written.cases,
                "failures": written.failures,
                "without_image": written.without_image,
                "problems": list(written.problems),
            }
        )
        return
    typer.echo(f"report    {written.path}  ({written.cases} cases{_failed(written)})")
    if written.without_image:
        typer.echo(
            f"{written.without_image} without their scan: only labels are shown; --images says where the scans are"
        )


def _failed(written: Written) -> str:
    return f", {written.failures} without a result" if written.failures else ""
