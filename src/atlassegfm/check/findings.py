"""Findings and reports of a check: data only."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
Kind = Literal["scan", "labels", "unreadable"]


@dataclass(frozen=True)
class Finding:
    """One thing about a file or a pair that a user should know.

    Parameters
    ----------
    severity : {"error", "warning", "note"}
        "error": the program refuses the file so. "warning": the result would suffer. "note": good to know.
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
        As stored.
    name : str
        From the file's header or the nnU-Net dataset it lies in, else made of the value.
    voxels : int
        How many have the value.
    volume_ml : float
        Their volume in millilitres.
    parts : int
        Connected components (26 neighbours).
    stray : int
        Of these, islands of less than 5 % of the structure.
    """

    value: int
    name: str
    voxels: int
    volume_ml: float
    parts: int
    stray: int


@dataclass(frozen=True)
class AtlasReport:
    """A scan against the annotated scan.

    Parameters
    ----------
    mirrored_gain : float
        How much better the scan's mirror image fits than the scan itself: natural logarithm of the ratio of costs.
    correlation : float or None
        Of the intensities where both show body, in [-1, 1]; None where they share none.
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
        Voxels along i, j, k.
    spacing_mm : tuple of float, (3,)
        Along i, j, k.
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
        Of a scan, where an annotated scan was given and the two could be fitted.
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
    """What :func:`check` found.

    Parameters
    ----------
    files : tuple of FileReport
        In the order given.
    pairs : tuple of PairReport
        Each two readable files.
    """

    files: tuple[FileReport, ...]
    pairs: tuple[PairReport, ...]

    @property
    def worst(self) -> Severity | None:
        """The gravest severity found, None where there is nothing to say."""
        findings = [report.findings for report in self.files] + [pair.findings for pair in self.pairs]
        found = {finding.severity for finding in itertools.chain.from_iterable(findings)}
        return next((severity for severity in SEVERITIES if severity in found), None)

    def to_dict(self) -> dict[str, Any]:
        """The whole report in plain lists, numbers and texts, for JSON."""
        plain: dict[str, Any] = {"worst": self.worst, **dataclasses.asdict(self)}
        return plain


SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, errors first."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def list_items(items: Sequence[object], most: int = 8) -> str:
    """List items for a message, the first few of many."""
    """A few of them as words: "3, 4, 5 and 7 more"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more
