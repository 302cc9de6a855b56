"""``atlassegfm check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .fields import argument, flag, options, series_option
from .options import AtlasOptions, ScreenOptions
from .session import EXIT_FAILURES, EXIT_USAGE, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..check.findings import Check, FileReport, Finding, LabelReport

#: More pairs than this are not listed in the table of the terminal.
_LISTED_PAIRS = 15


@options
class CheckOptions(AtlasOptions, ScreenOptions):
    """Options of ``check``."""

    files: list[Path] = argument("FILES...", "Scans, label maps, DICOM series folders, RTSTRUCT, DICOM-SEG.")
    series: str | None = series_option()
    strict: bool = flag("--strict", "Exit code 1 where there is a warning, for scripts.")


def check(options: CheckOptions) -> None:
    """Look for what is wrong with scans and label maps, and what to do about it.

    With --context, or --atlas and --labels, each scan is also fitted to the atlas (some seconds): is it the same part
    of the body, are left and right swapped, is the contrast inverted, does it show the structures? The exit code is 2
    if a file could not be used.
    """
    with options.session(warnings=False) as session:
        from ..check import check_files
        from ..jobs.scans import find_scans

        atlas = options.load_atlases()[0] if options.gives_atlas else None
        scans = find_scans(options.files, labels=True)
        for remark in scans.remarks():
            session.say(remark)
        found = check_files(scans.found, options.series, atlas, on_stage=session.progress)
    if options.as_json:
        print_json(found.to_dict())
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = 160
        console.print(as_table(found))
    if found.worst == "error":
        raise typer.Exit(EXIT_USAGE)
    if options.strict and found.worst == "warning":
        raise typer.Exit(EXIT_FAILURES)


def as_table(result: Check) -> RenderableType:
    """Format the report for a terminal, to be printed by rich."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from ..check.findings import SEVERITIES, list_items

    parts: list[RenderableType] = []
    for report in result.files:
        parts.append(Text(report.name, "bold"))
        parts.append(Padding(Text(_description(report)), (0, 0, 0, 2), expand=False))
        if report.labels:
            parts.append(Padding(_label_table(report.labels), (0, 0, 0, 2), expand=False))
    for pair in result.pairs if len(result.pairs) <= _LISTED_PAIRS else ():
        shared = " / ".join(f"{percent:.0f} %" for percent in pair.overlap_percent)
        grid = "the same grid" if pair.same_grid else f"other grids, centres {pair.centres_mm:.1f} mm apart"
        parts.append(Text(f"{pair.first}, {pair.second}: {grid}, {shared} of the fields of view shared"))
    parts.append(Text())
    styles = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    # What holds for many files is printed once.
    by_finding: dict[Finding, list[str]] = {}
    named = [(report.name, report.findings) for report in result.files]
    named += [(f"{pair.first} with {pair.second}", pair.findings) for pair in result.pairs]
    for name, findings in named:
        for finding in findings:
            by_finding.setdefault(finding, []).append(name)
    for finding in sorted(by_finding, key=lambda one: SEVERITIES.index(one.severity)):
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        text = f" {list_items(by_finding[finding])}: {finding.text}{remedy}"
        parts.append(Text.assemble((finding.severity, styles[finding.severity]), text))
    if result.worst is None:
        parts.append(Text("nothing to complain about"))
    return Group(*parts)


def _description(report: FileReport) -> str:
    """What a file is, on one line."""
    if report.kind == "unreadable":
        return "unreadable"
    kind = f"labels: {len(report.labels)}" if report.kind == "labels" else report.kind
    size = f"{' x '.join(map(str, report.shape))} voxels of {' x '.join(f'{s:.3g}' for s in report.spacing_mm)} mm"
    oblique = f" ({report.oblique_deg:.0f}° oblique)" if (report.oblique_deg or 0) >= 1 else ""
    values = f" {' to '.join(map(_value, report.value_range))}" if report.value_range else ""
    return f"{kind}, {size}, {report.axes}{oblique}, {report.stored_type}{values}"


def _label_table(labels: Sequence[LabelReport]) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    titles = ("value", "structure", "voxels", "volume ml", "parts", "stray")
    columns = [Column(title, justify="left" if title == "structure" else "right") for title in titles]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for one in labels:
        counts = str(one.voxels), _millilitres(one.volume_ml), str(one.parts), str(one.stray)
        table.add_row(str(one.value), Text(one.name), *counts)
    return table


def _value(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _millilitres(volume_ml: float) -> str:
    return f"{volume_ml:.0f}" if volume_ml >= 100 else f"{volume_ml:.1f}" if volume_ml >= 1 else f"{volume_ml:.2g}"
