"""Findings and reports of a check: data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..core.labels import listed

Severity = Literal["error", "warning", "note"]
Kind = Literal["scan", "labels", "unreadable"]
#: From worst to best.
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Finding:
    """One thing about a file or a pair that a user should know.

    Parameters
    ----------
    severity : {"error", "warning", "note"}
        "error": the program refuses the file. "warning": the result would suffer. "note": good to know.
    text : str
        What was found, and what it would do to the result.
    remedy : str
        How to mend it; empty where there is nothing to do.
    """

    severity: Severity
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class LabelReport:
    """One value of a label map.

    Parameters
    ----------
    value : int
    name : str
        From the file's header or its nnU-Net dataset, else made of the value.
    voxels : int
    volume_ml : float
    parts, stray : int
        Connected components (26 neighbours), and those of less than 5 % of the structure.
    """

    value: int
    name: str
    voxels: int
    volume_ml: float
    parts: int
    stray: int


@dataclass(frozen=True)
class AtlasReport:
    """Comparison of a scan with the atlas; fields as of :class:`~atlassegfm.quality.mirror.AtlasFit`.

    Parameters
    ----------
    mirrored_gain : float
    correlation : float or None
        None where no body overlaps.
    inside_percent : dict of str to float
        How much of each structure lies in the scan's field of view, by name.
    """

    mirrored_gain: float
    correlation: float | None
    inside_percent: dict[str, float]


@dataclass(frozen=True)
class FileReport:
    """One file. Everything but ``name``, ``kind`` and ``findings`` is None or empty where it is unreadable.

    Parameters
    ----------
    name : str
        File name without its folder.
    kind : {"scan", "labels", "unreadable"}
        What its values look like.
    findings : tuple of Finding
        Errors first.
    shape : tuple of int, (3,)
    spacing_mm : tuple of float, (3,)
    axes : str
        Where i, j, k point: "RAS", "LPS", ...
    oblique_deg, sheared_deg : float
        Largest angle between a voxel axis and the patient's nearest one, and largest deviation of two voxel axes
        from a right angle.
    stored_type : str
        Number type in the file, before the header's scaling.
    sform_code, qform_code : int or None
        Of NIfTI headers.
    value_range : tuple of float, (2,)
        Smallest and largest finite value.
    percentiles : tuple of float, (3,)
        1st, 50th and 99th percentile of a scan's values.
    labels : tuple of LabelReport
        Of a label map, by value.
    atlas : AtlasReport or None
        Of a scan, where an atlas was given and the two could be fitted.
    """

    name: str
    kind: Kind
    findings: tuple[Finding, ...]
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    axes: str = ""
    oblique_deg: float | None = None
    sheared_deg: float | None = None
    stored_type: str = ""
    sform_code: int | None = None
    qform_code: int | None = None
    value_range: tuple[float, ...] = ()
    percentiles: tuple[float, ...] = ()
    labels: tuple[LabelReport, ...] = ()
    atlas: AtlasReport | None = None


@dataclass(frozen=True)
class PairReport:
    """Two files of one check, in the order they were given.

    Parameters
    ----------
    first, second : str
        File names.
    same_grid : bool
        Whether voxel (i, j, k) of one is voxel (i, j, k) of the other.
    distance_mm : float or None
        Largest distance between corresponding corners, where both have the same shape.
    centres_mm : float
        Distance between the centres of both fields of view.
    overlap_percent : tuple of float, (2,)
        How much of the first field of view lies in the second, and the other way round.
    findings : tuple of Finding
        Errors first.
    """

    first: str
    second: str
    same_grid: bool
    distance_mm: float | None
    centres_mm: float
    overlap_percent: tuple[float, float]
    findings: tuple[Finding, ...]


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
        """The whole report in plain lists, numbers and texts, for JSON."""
        return {"worst": self.worst, **dataclasses.asdict(self)}


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, errors first."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def list_items(items: Sequence[object]) -> str:
    """List items for a message, the first 8 of many."""
    return listed([str(item) for item in items], 8)
