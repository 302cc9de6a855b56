"""Table of a check on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..check.findings import SEVERITIES, Check, Finding, list_items

if TYPE_CHECKING:
    from rich.console import RenderableType


#: More pairs than this are not listed in the table of the terminal.
_LISTED_PAIRS = 15


def as_table(result: Check) -> RenderableType:
    """The report for a terminal, to be printed by rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    files = Table("file", "what", "voxels", "spacing, mm", "axes", "type", "values", title_justify="left")
    for report in result.files:
        files.add_row(
            Text(report.name, overflow="fold"),
            f"labels: {len(report.labels)}" if report.kind == "labels" else report.kind,
            " x ".join(str(n) for n in report.shape),
            " x ".join(f"{s:.3g}" for s in report.spacing_mm),
            report.axes + (f", {report.oblique_deg:.0f}° oblique" if (report.oblique_deg or 0) >= 1 else ""),
            report.stored_type,
            " to ".join(f"{v:.5g}" for v in report.value_range),
        )
    parts: list[RenderableType] = [files]
    labelled = [report for report in result.files if report.labels]
    if labelled:
        labels = Table("file", "value", "structure", "voxels", "volume, ml", "parts", "stray")
        for report in labelled:
            for n, label in enumerate(report.labels):
                counts = str(label.voxels), f"{label.volume_ml:.3g}", str(label.parts), str(label.stray)
                file = Text("" if n else report.name, overflow="fold")
                labels.add_row(file, str(label.value), Text(label.name), *counts)
        parts.append(labels)
    if 0 < len(result.pairs) <= _LISTED_PAIRS:
        pairs = Table("pair", "same grid", "centres apart, mm", "fields of view shared")
        for pair in result.pairs:
            pairs.add_row(
                Text(f"{pair.first}, {pair.second}", overflow="fold"),
                "yes" if pair.same_grid else "no",
                f"{pair.centres_mm:.1f}",
                " / ".join(f"{percent:.0f} %" for percent in pair.overlap_percent),
            )
        parts.append(pairs)
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
        text = f"  {list_items(by_finding[finding])}: {finding.text}{remedy}"
        parts.append(Text.assemble((finding.severity, styles[finding.severity]), text))
    if result.worst is None:
        parts.append(Text("nothing to complain about"))
    return Group(*parts)
