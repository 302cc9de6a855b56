"""``atlassegfm report`` and ``segment --report``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import InputError, MissingExtraError
from ..core.labels import listed
from ..core.text import counted
from .fields import argument, flag, option, options
from .options import ScreenOptions
from .session import Session, print_json

if TYPE_CHECKING:
    from ..report import ReportOptions, Written


def require_pictures(option: str = "--no-picture") -> None:
    """Check that pictures can be drawn; ``option`` leaves them out."""
    from ..report import require_report_extra

    try:
        require_report_extra()
    except MissingExtraError as error:
        raise InputError(f"{error}, or leave the pictures out ({option})") from None


def report_on(
    folder: Path,
    scans: Mapping[str, Path],
    session: Session,
    out: Path | None = None,
    content: ReportOptions | None = None,
) -> Written:
    """Write the report of a folder of results; ``scans`` by name of the case."""
    from ..report import write_report

    begin = functools.partial(session.begin, stage="page")
    written = write_report(folder, out, scans=scans, options=content, on_case=begin)
    for problem in written.problems:
        session.error(problem)
    return written


@options
class ReportCommandOptions(ScreenOptions):
    """Options of ``report``."""

    folder: Path = argument("OUT", "Folder of results, as `segment -o` writes it.")
    out: Path | None = option("--out -o FILE", "The page of the cohort [default: OUT/report.html].")
    images: list[Path] | None = option(
        "--images PATH",
        "The queries: files, DICOM series folders, or folders with them anywhere below; may be repeated. They are "
        "found by their content. Without them new pages show labels only: results do not say where scans lie.",
    )
    cases: bool = option("--cases/--no-cases", "Write a page for each case too.", True)
    picture: bool = option("--picture/--no-picture", "Draw CASE/overview.png too (extra 'report').", True)
    viewer_voxels: int = option(
        "--viewer-voxels N",
        "Largest number of voxels of the interactive view; 0 leaves the view out.",
        8_000_000,
        min=0,
    )
    title: str = option("--title", "Title of the page [default: the name of OUT].", "")
    force: bool = flag("--force", "Make all pages again, those too that show a scan that is not given.")


def report(options: ReportCommandOptions) -> None:
    """Write HTML pages of results: one for the cohort, one for each case.

    OUT/report.html lists what to review first, and all cases and structures; OUT/CASE/report.html shows slices through
    every structure and an interactive view. Each page holds all it needs and loads nothing.
    """
    with options.session() as session:
        if options.picture and options.cases:
            require_pictures()
        from ..jobs import scans_of
        from ..report import CaseOptions, ReportOptions

        case = CaseOptions(options.viewer_voxels, options.picture)
        content = ReportOptions(options.cases, options.force, case, options.title)
        if options.images:
            session.progress("finding the scans")
        matched = scans_of(options.folder, options.images or ())
        written = report_on(options.folder, matched.scans, session, options.out, content)
        left_out = {"belong to no case": matched.unused, "changed since they were segmented": matched.changed}
        for reason, paths in left_out.items():
            if paths:
                session.say(f"images left out, {reason}: {listed(list(map(str, paths)), 4)}")
    if options.as_json:
        counts = {name: getattr(written, name) for name in ("cases", "failures", "without_image", "kept")}
        unused = [str(path) for path in (*matched.unused, *matched.changed)]
        print_json({"report": str(written.path), **counts, "unused_images": unused, "problems": [*written.problems]})
        return
    failed = f", {written.failures} without a result" if written.failures else ""
    typer.echo(f"report    {written.path}  ({counted(written.cases, 'case')}{failed})")
    if written.kept:
        typer.echo(
            f"{written.kept} kept as they are: they show the scan, which was not given now or cannot be read; give it "
            "with --images, or replace them with --force"
        )
    if written.without_image:
        typer.echo(f"{written.without_image} without their scan: only labels are shown; give the scans with --images")
