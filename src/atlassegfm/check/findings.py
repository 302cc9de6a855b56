"""Findings and reports of a check: data only."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from ..core.labels import listed

Severity = Literal["error", "warning", "note"]
Kind = Literal["scan", "labels", "unreadable"]
#: From worst to best.
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Finding:
    """One thing about a file or a pair that a user should know."""

    severity: Severity  # error: the program refuses the file; warning: the result would suffer; note: good to know
    text: str  # what was found, and what it would do to the result
    remedy: str = ""  # empty where there is nothing to do


#: Findings by severity: ``warning(text, remedy)``.
error, warning, note = (partial(Finding, severity) for severity in SEVERITIES)


@dataclass(frozen=True)
class LabelReport:
    """One value of a label map."""

    value: int
    name: str  # from the file's header or its nnU-Net dataset, else made of the value
    voxels: int
    volume_ml: float
    parts: int  # connected components (26 neighbours)
    stray: int  # of these, islands of less than 5 % of the structure


@dataclass(frozen=True)
class AtlasReport:
    """Comparison of a scan with the atlas."""

    resembles: bool  # whether it seems to show the same part of the body; if not, the rest means nothing
    resemblance: float  # confidence of the fit, and the size of the correlation
    mirrored_gain: float  # of the fit of the mirror image, in [-1, 1]: 1 for scans that are nothing like each other
    correlation: float | None  # of intensities where both show body, in [-1, 1]; None where none overlaps
    histogram_distance: float | None  # between their distributions, in [0, 1]; None where none overlaps
    inside_percent: dict[str, float]  # how much of each structure lies in the scan's field of view, by name


@dataclass(frozen=True)
class FileReport:
    """One file; everything but ``name``, ``kind`` and ``findings`` is None or empty where it is unreadable."""

    name: str  # without its folder
    kind: Kind  # what its values look like
    findings: tuple[Finding, ...]  # errors first
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    axes: str = ""  # where i, j, k point: "RAS", "LPS", ...
    oblique_deg: float | None = None  # largest angle between a voxel axis and the patient's nearest one
    sheared_deg: float | None = None  # largest deviation of two voxel axes from a right angle
    stored_type: str = ""  # number type in the file, before the header's scaling
    sform_code: int | None = None
    qform_code: int | None = None
    value_range: tuple[float, ...] = ()  # smallest and largest finite value
    percentiles: tuple[float, ...] = ()  # 1st, 50th and 99th percentile of a scan's values
    labels: tuple[LabelReport, ...] = ()  # by value
    atlas: AtlasReport | None = None  # of a scan, where an atlas was given and the two could be fitted


@dataclass(frozen=True)
class PairReport:
    """Two files of one check, in the order they were given."""

    first: str  # file name
    second: str
    same_grid: bool  # whether voxel (i, j, k) of one is voxel (i, j, k) of the other
    distance_mm: float | None  # largest between corresponding corners, where both have the same shape
    centres_mm: float  # distance between the centres of both fields of view
    overlap_percent: tuple[float, float]  # of the first field of view in the second, and the other way round
    findings: tuple[Finding, ...]  # errors first


@dataclass(frozen=True)
class Check:
    """Reports on files in the order given, and on each pair of readable files."""

    files: tuple[FileReport, ...]
    pairs: tuple[PairReport, ...]

    @property
    def worst(self) -> Severity | None:
        """The worst severity found, None without findings."""
        reports: tuple[FileReport | PairReport, ...] = (*self.files, *self.pairs)
        found = {finding.severity for report in reports for finding in report.findings}
        return min(found, key=SEVERITIES.index, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain lists, numbers and texts, for JSON."""
        return {"worst": self.worst, **dataclasses.asdict(self)}


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, errors first."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def list_items(items: Sequence[object]) -> str:
    """List items for a message, the first 8 of many."""
    return listed([str(item) for item in items], 8)
