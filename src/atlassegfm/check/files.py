"""The geometry doctor: what a scan or label file is, what about it would spoil a result, and how to mend it.

Files are looked at one by one, then in pairs: whether they share a grid, and how much of their fields of
view. Where an annotated scan (the atlas) is given, each scan is fitted to it too: is it mirrored or inverted,
and does it show the atlas's structures? A file the program refuses is a finding like any other, so that a whole
folder can be checked in one go.
Reports name files only, without folders: paths of clinical archives often hold patients' names.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.errors import AtlasSegError, InputError, MissingExtraError
from ..core.geometry import Grid
from ..core.image import Volume, image_stem, load_volume
from ..core.labels import dataset_json_of, read_names_file, structures_of
from ..dicom import (
    DicomSource,
    Selection,
    Series,
    is_dicom_input,
    is_series_folder,
    load_series,
    open_labels,
    series_of,
)
from ..quality.mirror import is_inverted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..atlas import Atlas


Severity = Literal["error", "warning", "note"]


Kind = Literal["scan", "labels", "unreadable"]


#: Slices this many times thicker than the in-plane spacing are warned of: the clinical T2 abdomens of CHAOS
#: have 6, thin-slice CT below 4.
_ANISOTROPIC = 4.0


#: Axes are called sheared from this angle off a right one, in degrees. Rounded headers reach 0.01; over a field of
#: view of 300 mm, 0.1 degrees are half a millimetre.
_SHEARED_DEG = 0.1


#: Axes are called oblique from this angle on: below it, rounding.
_OBLIQUE_DEG = 0.1


#: Of people, no field of view is smaller (inner ear) or larger (whole body: 2 m) than this, in mm.
_FIELD_OF_VIEW_MM = (15.0, 2500.0)


#: A scan with spacing exactly 1 x 1 x 1 mm that is wider than this along two axes has probably lost its spacing:
#: scanners' bores are 500 to 800 mm wide, and 512 x 512 pixels the common matrix.
_WIDEST_AT_UNIT_SPACING = 512


#: At most this many different values make a label map (OASIS has 139 of them).
_MOST_LABELS = 1024


#: So few values are a label map wherever they lie: scans of five bits are not made.
_FEW_LABELS = 32


#: Share of neighbouring voxels, background left out, that are equal: 0.74 and above in label maps (hippocampus to
#: abdomen), 0.10 and below in scans, of all five development sets.
_LABELS_ALIKE = 0.5


#: Whole numbers among the values inside: a label map that was resampled smoothly keeps them in its middles.
_MOSTLY_WHOLE = 0.5


#: A part counts as a stray island when it is smaller than this share of its structure.
_STRAY_SHARE = 0.05


#: Structures of fewer voxels are lost by half a voxel of misregistration.
_FEW_VOXELS = 20


#: Percentiles of the intensities that are reported, and the number of voxels they are taken from.
_PERCENTS = (1.0, 50.0, 99.0)


_SAMPLED_VOXELS = 2_000_000


#: CT: air is about -1000 HU and fills part of each scan; soft tissue is above 0.
_AIR_HU = -900.0


#: Below the scale of Hounsfield units (-1024) lies only what scanners fill the corners with.
_PADDING_HU = -1100.0


#: A scan is suspected to be mirrored where its mirror image fits an atlas better by more than this (natural logarithm
#: of the ratio of costs, about 2 %). Heads are nearly symmetric: of 30 right pairs of them the mirror image of one
#: fitted better by 1.1 %; of 90 right pairs of abdomens and hearts none by more than 0.1 % (docs/check.md).
MIRRORED_GAIN = 0.02


#: Correlation of the intensities of scan and atlas inside the body below which the contrast is suspected to be
#: inverted.
LEAST_CORRELATION = -0.3


#: From this share outside the field of view on, a structure counts as outside (as in a result); as cut from the second
#: on, as the linear fit alone is some mm off.
_OUTSIDE, _CUT = 0.9, 0.1


#: Nodes along each axis that overlaps are counted at: 1 / 24 of an axis, 4 %, each way.
_OVERLAP_NODES = 24


#: Fields of view that share at least this much on both sides are taken for one.
_SAME_VIEW_PERCENT = 90.0


#: More pairs than this are not listed in the table of the terminal.
_LISTED_PAIRS = 15


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
        return next((severity for severity in _SEVERITIES if severity in found), None)

    def to_dict(self) -> dict[str, Any]:
        """The whole report in plain lists, numbers and texts, for JSON."""
        plain: dict[str, Any] = {"worst": self.worst, **dataclasses.asdict(self)}
        return plain


_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


def check(paths: Iterable[Path], series: str | None = None, context: Atlas | None = None) -> Check:
    """Look at files, one by one and in pairs, and at scans against an annotated one.

    Parameters
    ----------
    paths : iterable of Path
        Scans and label maps, folders of DICOM series, RTSTRUCT and DICOM-SEG files. What cannot be read becomes a
        finding. Structures are looked at on the series among the paths that they belong to.
    series : str, optional
        Which series of DICOM folders, as :func:`~atlassegfm.dicom.load_series` takes it.
    context : Atlas, optional
        The annotated scan that is to segment them. A fit takes some seconds a scan.
    """
    paths = [Path(path) for path in paths]
    scans: list[Series] = []
    found: dict[int, tuple[FileReport, Grid | None]] = {}
    # Scans first, as structures need them.
    for position in sorted(range(len(paths)), key=lambda n: is_dicom_input(paths[n]) and not paths[n].is_dir()):
        found[position] = _examine(paths[position], scans, series, context)
    reports = [found[position][0] for position in range(len(paths))]
    readable = [(report, grid) for report, grid in (found[n] for n in range(len(paths))) if grid is not None]
    pairs = tuple(_compare(*one, *other) for one, other in itertools.combinations(readable, 2))
    return Check(tuple(reports), pairs)


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
                labels.add_row(
                    Text("" if n else report.name, overflow="fold"),
                    str(label.value),
                    Text(label.name),
                    str(label.voxels),
                    f"{label.volume_ml:.3g}",
                    str(label.parts),
                    str(label.stray),
                )
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
    # What is true of many files is said once.
    told: dict[Finding, list[str]] = {}
    for report in result.files:
        for finding in report.findings:
            told.setdefault(finding, []).append(report.name)
    for pair in result.pairs:
        for finding in pair.findings:
            told.setdefault(finding, []).append(f"{pair.first} with {pair.second}")
    for finding in sorted(told, key=lambda one: _SEVERITIES.index(one.severity)):
        line = Text.assemble(
            (finding.severity, styles[finding.severity]), f"  {_listed(told[finding])}: {finding.text}"
        )
        if finding.remedy:
            line.append(f"; {finding.remedy}")
        parts.append(line)
    if result.worst is None:
        parts.append(Text("nothing to complain about"))
    return Group(*parts)


def _sorted(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _load(path: Path, scans: list[Series], choice: str | None) -> Volume:
    """A scan, or structures on that of the series they belong to; a series is added to the others."""
    if is_series_folder(path):
        volume = load_series(path, choice)
        series = series_of(volume)
        scans += [] if series is None else [series]
        return volume
    if not is_dicom_input(path):
        return load_volume(path)
    refused: InputError | None = None
    for series in scans:
        try:
            # Structures may overlap here: that is for the use of them to decide.
            return open_labels(path, series, Selection(overlap="last"))
        except InputError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    return open_labels(path, None, Selection(overlap="last"))


def _examine(
    path: Path, scans: list[Series], choice: str | None, context: Atlas | None
) -> tuple[FileReport, Grid | None]:
    """The report on one file, and its grid if it has one."""
    name = path.name or path.resolve().name
    try:
        volume = _load(path, scans, choice)
    except (InputError, MissingExtraError) as error:
        # The sentence begins with the whole path and holds its own remedy.
        text = str(error).removeprefix(f"{path}: ").replace(str(path), name)
        return FileReport(name, "unreadable", (Finding("error", text),)), None
    grid, header = volume.grid, volume.source.nifti_header if volume.source else None
    findings = [*_header_findings(volume), *_grid_findings(grid)]
    finite = np.isfinite(volume.data)
    bad = int(volume.data.size - np.count_nonzero(finite))
    values = volume.data[finite] if bad else volume.data
    if bad:
        findings.append(
            Finding(
                "error",
                f"{bad} of {volume.data.size} voxels are NaN or infinite: the program refuses the file",
                "replace them by the background value",
            )
        )
    value_range = (float(values.min()), float(values.max())) if values.size else ()
    kind: Kind = "labels" if _looks_like_labels(volume, value_range) else "scan"
    labels: tuple[LabelReport, ...] = ()
    percentiles: tuple[float, ...] = ()
    if value_range and value_range[0] == value_range[1]:
        what = "an empty label map or a blank scan" if value_range[0] == 0 else "a blank scan"
        findings.append(
            Finding(
                "error",
                f"all voxels have the value {value_range[0]:g}: {what}, which the program refuses",
                "export the file again",
            )
        )
    elif kind == "labels":
        labels, label_findings = _label_reports(volume, path)
        findings += label_findings
    elif value_range:
        sample = values.ravel()[:: max(1, values.size // _SAMPLED_VOXELS)]
        percentiles = tuple(float(p) for p in np.percentile(sample, _PERCENTS))
        findings += _intensity_findings(volume, value_range, percentiles)
    against: AtlasReport | None = None
    if kind == "scan" and not bad and value_range and value_range[0] < value_range[1]:
        if context is None:
            findings += _inversion_findings(volume)
        else:
            against, placed = _against_atlas(volume, context, name)
            findings += placed
    report = FileReport(
        name=name,
        kind=kind,
        findings=_sorted(findings),
        shape=grid.shape,
        spacing_mm=tuple(float(s) for s in grid.spacing_mm),
        axes=grid.axis_codes,
        oblique_deg=_oblique_deg(grid),
        sheared_deg=_sheared_deg(grid),
        stored_type=str(volume.data.dtype if header is None else header.get_data_dtype().newbyteorder("=")),
        sform_code=None if header is None else int(header["sform_code"]),
        qform_code=None if header is None else int(header["qform_code"]),
        value_range=value_range,
        percentiles=percentiles,
        labels=labels,
        atlas=against,
    )
    return report, grid


def _header_findings(volume: Volume) -> list[Finding]:
    """What :mod:`.image` noted on reading, with what it means and the remedy."""
    findings = []
    for note in volume.source.notes if volume.source else ():
        if isinstance(volume.source, DicomSource):
            findings.append(Finding("warning", note))
            continue
        if "no orientation" in note:
            effect = "left and right may be swapped, and the start of the registration is a guess"
            remedy = "convert the file from DICOM again with a tool that keeps the orientation, or set the sform"
        elif "differ" in note:
            effect = "other programs may follow the qform and show the result displaced by that much"
            remedy = "make both agree: write the sform into the qform, or the other way round if that one is right"
        else:
            effect = "programs that follow the qform cannot place the file"
            remedy = "write the sform into the qform"
        findings.append(Finding("warning", f"{note}: {effect}", remedy))
    return findings


def _grid_findings(grid: Grid) -> list[Finding]:
    findings = []
    spacing = np.sort(grid.spacing_mm)
    extent_mm = np.array(grid.shape) * grid.spacing_mm
    size = " x ".join(f"{mm:.4g}" for mm in extent_mm)
    smallest, largest = _FIELD_OF_VIEW_MM
    if extent_mm.max() < smallest:
        findings.append(
            Finding(
                "warning",
                f"the field of view is {size} mm, too small for a part of a person: is the spacing in metres or "
                "centimetres? All distances in mm (smoothing, margins, error sizes) would be wrong",
                "correct the spacing or the unit in the header",
            )
        )
    elif extent_mm.max() > largest:
        findings.append(
            Finding(
                "warning",
                f"the field of view is {size} mm, too large for a person: is the spacing in micrometres? All "
                "distances in mm (smoothing, margins, error sizes) would be wrong",
                "correct the spacing or the unit in the header",
            )
        )
    elif np.allclose(spacing, 1, atol=1e-6) and np.sort(grid.shape)[1] >= _WIDEST_AT_UNIT_SPACING:
        findings.append(
            Finding(
                "warning",
                f"the spacing is 1 x 1 x 1 mm and the field of view {size} mm: the true spacing seems to be lost, and "
                "the scan would be registered at a wrong size and shape",
                "convert the file from DICOM again, or set the true spacing in the header",
            )
        )
    ratio = float(spacing[2] / spacing[1])
    if ratio > _ANISOTROPIC:
        findings.append(
            Finding(
                "warning",
                f"slices are {spacing[2]:.3g} mm apart, {ratio:.1f} times the in-plane spacing: structures thinner "
                f"than {2 * spacing[2]:.3g} mm lie in one or two slices, and no end is placed better than to a slice",
                "prefer a thin-slice series, above all as the atlas; do not interpolate slices beforehand",
            )
        )
    sheared = _sheared_deg(grid)
    if sheared > _SHEARED_DEG:
        findings.append(
            Finding(
                "note",
                f"the voxel axes are {sheared:.1f} degrees off a right angle (a tilted gantry?): handled here, but "
                "NRRD, MetaImage and programs built on ITK cannot hold such a grid",
                "give results to those programs after resampling scan and result to right-angled axes",
            )
        )
    oblique = _oblique_deg(grid)
    if oblique > _OBLIQUE_DEG:
        findings.append(
            Finding(
                "note",
                f"the slices are turned by {oblique:.1f} degrees against the patient's axes: handled here; programs "
                "that ignore the rotation show the result beside the anatomy",
            )
        )
    return findings


def _oblique_deg(grid: Grid) -> float:
    """Largest angle between a voxel axis and the world axis next to it, degrees."""
    unit = np.abs(grid.affine[:3, :3] / grid.spacing_mm)
    return float(np.degrees(np.arccos(np.clip(unit.max(axis=0), 0, 1))).max())


def _sheared_deg(grid: Grid) -> float:
    """Largest deviation of two voxel axes from a right angle, degrees."""
    unit = grid.affine[:3, :3] / grid.spacing_mm
    cosines = np.abs(unit.T @ unit)[np.triu_indices(3, 1)]
    return float(np.degrees(np.arcsin(np.clip(cosines, 0, 1))).max())


def _looks_like_labels(volume: Volume, value_range: tuple[float, ...]) -> bool:
    """Whether values are names rather than amounts, by header and by how they lie."""
    source = volume.source
    if source is not None and source.label_table:
        return True
    if source is not None and source.nifti_header is not None and int(source.nifti_header["intent_code"]) == 1002:
        return True
    if not value_range or value_range[0] < 0 or value_range[0] == value_range[1]:
        return False
    data = volume.data
    if not np.issubdtype(data.dtype, np.integer) and data.dtype != bool:
        inside = data[data != 0]
        whole = np.isfinite(inside) & (inside == np.round(inside))
        if np.count_nonzero(whole) < _MOSTLY_WHOLE * inside.size:
            return False
        data = np.where(np.isfinite(data), np.round(data), 0)
    # Fewer values than this in a part are not more in the whole by orders of magnitude, and a part is fast.
    different = len(np.unique(data[tuple(slice(None, None, 1 + n // 128) for n in data.shape)]))
    if different <= _FEW_LABELS:
        return True
    return different <= _MOST_LABELS and max(_alike(data, axis) for axis in range(3)) >= _LABELS_ALIKE


def _alike(data: NDArray[Any], axis: int) -> float:
    """Share of neighbours along an axis, not both background, that have one value."""
    if data.shape[axis] < 2:
        return 0.0
    one = data[tuple(slice(None, -1) if n == axis else slice(None) for n in range(3))]
    other = data[tuple(slice(1, None) if n == axis else slice(None) for n in range(3))]
    counted = np.count_nonzero((one != 0) | (other != 0))
    return float(np.count_nonzero((one == other) & (one != 0)) / counted) if counted else 0.0


def _label_reports(volume: Volume, path: Path) -> tuple[tuple[LabelReport, ...], list[Finding]]:
    """Each structure of a label map, and what there is to say about them."""
    data, grid = volume.data, volume.grid
    findings = []
    if not np.issubdtype(data.dtype, np.integer) and data.dtype != bool:
        finite = np.isfinite(data)
        fractions = int(np.count_nonzero(finite & (data != np.round(np.where(finite, data, 0)))))
        if fractions:
            findings.append(
                Finding(
                    "error",
                    f"{fractions} voxels of what looks like a label map are not whole numbers: it was resampled "
                    "smoothly, which invents labels between neighbours, and the program refuses it",
                    "resample the original labels with nearest neighbour",
                )
            )
        else:
            findings.append(
                Finding(
                    "note",
                    f"the labels are stored as {data.dtype}: they are read as whole numbers, and results are written "
                    "in the smallest integer type that holds them",
                )
            )
        data = np.round(np.where(finite, data, 0)).astype(np.int64)
    if data.min() < 0:
        findings.append(
            Finding("error", f"the label map has the value {int(data.min())}: the program refuses it", "renumber it")
        )
    values, ranks = _numbered(data)
    positive = values.tolist()
    tables = [volume.source.label_table] if volume.source else []
    dataset = dataset_json_of(path)
    if dataset is not None:
        try:
            tables.append(read_names_file(dataset))
        except InputError as error:
            text = str(error).replace(str(dataset), dataset.name)
            findings.append(Finding("warning", f"the names of the labels are not readable ({text})"))
    structures = structures_of(positive, tables)
    unnamed = [value for value in positive if not any(value in table for table in tables)]
    if unnamed and len(unnamed) < len(positive):
        findings.append(
            Finding(
                "warning",
                f"no name for label {_listed(unnamed)} although others have one: are they meant?",
                "add them to the names, or remove them from the label map",
            )
        )
    elif unnamed:
        findings.append(
            Finding("note", "neither the header nor a dataset.json names the labels", "give a names file with --names")
        )
    reports = []
    tiny, cut, islands, several = [], [], [], []
    for number, (structure, box) in enumerate(zip(structures, ndimage.find_objects(ranks), strict=True), start=1):
        mask = ranks[box] == number
        components, parts = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        voxels = int(sizes.sum())
        stray = int(np.count_nonzero(sizes < _STRAY_SHARE * voxels))
        if voxels < _FEW_VOXELS:
            tiny.append(f"{structure.name} ({voxels})")
        if stray:
            islands.append(f"{structure.name} ({stray})")
        if parts - stray > 1:
            several.append(f"{structure.name} ({parts - stray})")
        if any(side.start == 0 or side.stop == n for side, n in zip(box, grid.shape, strict=True) if n > 1):
            cut.append(structure.name)
        reports.append(
            LabelReport(structure.value, structure.name, voxels, voxels * grid.voxel_volume_mm3 / 1000, parts, stray)
        )
    if tiny:
        findings.append(
            Finding(
                "warning",
                f"fewer than {_FEW_VOXELS} voxels: {_listed(tiny)}; half a voxel of misregistration loses them",
                "annotate them on a finer scan, or remove stray clicks",
            )
        )
    if cut:
        findings.append(
            Finding(
                "warning",
                f"cut off by the border of the field of view: {_listed(cut)}; as an atlas, this scan can only find "
                "the part it shows",
                "take an atlas that shows them whole, where there is one",
            )
        )
    if islands:
        findings.append(
            Finding(
                "note",
                f"stray islands of less than {_STRAY_SHARE:.0%} of their structure: {_listed(islands)}; they are "
                "carried over to the results",
                "remove them if they are not meant",
            )
        )
    if several:
        findings.append(
            Finding(
                "note",
                f"several large parts: {_listed(several)}; a click or a box prompts the model for the largest only",
                "give left and right values of their own, or use mask prompts",
            )
        )
    return tuple(reports), findings


def _numbered(data: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Label values above 0 in ascending order, (N,), and the map of their positions from 1, (I, J, K).

    So that values of 32 bits need no table of that size, and 0 is whatever is no label. Slice by slice, because
    sorting a whole large scan takes minutes.
    """
    slices = range(data.shape[2])
    found = np.unique(np.concatenate([np.unique(data[:, :, k]) for k in slices]).astype(np.int64))
    values = found[found > 0]
    ranks = np.zeros(data.shape, np.int32)
    for k in slices:
        one = data[:, :, k]
        ranks[:, :, k] = np.where(one > 0, np.searchsorted(values, one) + 1, 0)
    return values, ranks


def _intensity_findings(
    volume: Volume, value_range: tuple[float, ...], percentiles: tuple[float, ...]
) -> list[Finding]:
    findings = []
    low, high = value_range
    whole = np.issubdtype(volume.data.dtype, np.integer)
    if whole and low >= 0 and high <= 255:
        findings.append(
            Finding(
                "note",
                "8-bit intensities (0 to 255): contrast was cut off or coarsened on export; if this is CT, Hounsfield "
                "units are lost, which some models expect",
                "use the original export where there is one",
            )
        )
    if low <= _AIR_HU and high > 0:
        text = "CT-like intensities (air near -1000)"
        if low < _PADDING_HU:
            findings.append(
                Finding(
                    "note",
                    f"{text}, with values down to {low:g} outside the scanner's circle",
                    "set values below -1024 to -1024 if a model reacts to them",
                )
            )
        else:
            findings.append(Finding("note", text))
    if percentiles[0] == percentiles[2]:
        findings.append(
            Finding(
                "warning",
                f"98 % of the voxels have the value {percentiles[0]:g}: there is next to nothing to register",
                "crop the scan to the anatomy, and check that the right series was exported",
            )
        )
    return findings


def _inversion_findings(volume: Volume) -> list[Finding]:
    """Whether the scan alone tells that its contrast is inverted."""
    if not is_inverted(volume):
        return []
    return [
        Finding(
            "warning",
            "what surrounds the body is the brightest there is: the intensities seem to be inverted (DICOM "
            "MONOCHROME1, or a negative); air would be taken for the body, by the registration and by the models",
            "turn them round (largest value minus each) and write the scan again",
        )
    ]


def _against_atlas(volume: Volume, context: Atlas, name: str) -> tuple[AtlasReport | None, list[Finding]]:
    """A scan against the annotated one."""
    from ..quality.mirror import place

    findings = _inversion_findings(volume)
    inverted = bool(findings)
    try:
        found = place(volume, context, name=name)
    except AtlasSegError as error:
        return None, [*findings, Finding("warning", f"the scan could not be fitted to the atlas: {error}")]
    if found.mirrored_gain > MIRRORED_GAIN:
        percent = 100 * math.expm1(found.mirrored_gain)
        findings.append(
            Finding(
                "warning",
                f"the mirror image fits the atlas better by {percent:.1f} %: left and right of the scan seem to be "
                "swapped (or those of the atlas); organs would be looked for, and labelled, on the wrong side",
                "compare with the original DICOM or a known side (liver, heart, a marker), and convert the scan again",
            )
        )
    if not inverted and found.correlation < LEAST_CORRELATION:  # NaN, where no body is shared, is not
        findings.append(
            Finding(
                "warning",
                f"what is bright in the atlas is dark in the scan (correlation {found.correlation:.2f}): if both are "
                "of the same modality, the intensities seem to be inverted, and the model would be misled",
                "turn them round (largest value minus each), unless it is another modality or sequence",
            )
        )
    names = {structure.value: structure.name for structure in context.structures}
    gone = [names[value] for value, share in found.outside.items() if share >= _OUTSIDE]
    cut = [
        f"{names[value]} ({100 * (1 - share):.0f} % in view)"
        for value, share in found.outside.items()
        if _CUT <= share < _OUTSIDE
    ]
    if gone:
        all_of_it = len(gone) == len(names)
        findings.append(
            Finding(
                "warning" if all_of_it else "note",
                f"outside the field of view, by a linear fit: {_listed(gone)}; "
                + ("nothing of the atlas would be found" if all_of_it else "they will be missing from the result"),
                "check that it is the same part of the body" if all_of_it else "take a scan that shows them, if needed",
            )
        )
    if cut:
        findings.append(
            Finding(
                "note",
                f"cut by the border of the field of view, by a linear fit: {_listed(cut)}; only that part can be "
                "found, and volumes are too small",
            )
        )
    report = AtlasReport(
        round(found.mirrored_gain, 4),
        None if math.isnan(found.correlation) else round(found.correlation, 3),
        {names[value]: round(100 * (1 - share), 1) for value, share in found.outside.items()},
    )
    return report, findings


def _compare(first: FileReport, one: Grid, second: FileReport, other: Grid) -> PairReport:
    """The report on two files."""
    same = one.matches(other)
    distance_mm = one.distance_mm(other) if one.shape == other.shape else None
    overlap = (_overlap_percent(one, other), _overlap_percent(other, one))
    centres_mm = float(np.linalg.norm(one.centre_mm - other.centre_mm))
    findings: list[Finding] = []
    labelled = (first.kind == "labels") != (second.kind == "labels")
    if same:
        pass
    elif one.axes_relative_to(other) is not None:
        findings.append(
            Finding(
                "note",
                f"the same voxels in another order ({first.axes} and {second.axes}): handled here; programs that pair "
                "arrays by index mix them up",
            )
        )
    elif distance_mm is not None and labelled and (min(overlap) >= _SAME_VIEW_PERCENT or _named_alike(first, second)):
        findings.append(
            Finding(
                "warning",
                f"the same shape, but corners up to {distance_mm:.3g} mm apart: if the labels were drawn on this scan, "
                "one of the headers is wrong, and the two are refused as an atlas",
                "find out which header is right, and copy its geometry to the other file",
            )
        )
    elif labelled:
        findings.append(
            Finding(
                "note",
                "a scan and a label map on different grids: refused as an atlas, fine for different patients",
                "if the labels belong to this scan, resample them to it with nearest neighbour",
            )
        )
    if max(overlap) == 0:
        findings.append(
            Finding(
                "note",
                f"no common field of view in scanner coordinates (centres {centres_mm:.0f} mm apart): usual for "
                "different patients, and the search of the registration copes; not if its rigid stage is switched off",
            )
        )
    return PairReport(first.name, second.name, same, distance_mm, centres_mm, overlap, _sorted(findings))


def _named_alike(first: FileReport, second: FileReport) -> bool:
    """Whether two files are one case by their names: "case" and "case_0000", "scan" and "scan_labels"."""
    one, other = (image_stem(Path(report.name)) for report in (first, second))
    return one.startswith(other) or other.startswith(one)


def _overlap_percent(of: Grid, within: Grid) -> float:
    """How much of the field of view of one grid lies in that of another, percent."""
    # Middles of equal cells, so that each node stands for the same volume.
    along = [(np.arange(min(n, _OVERLAP_NODES)) + 0.5) / min(n, _OVERLAP_NODES) * n - 0.5 for n in of.shape]
    ijk = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1)
    return 100 * float(within.contains(of.voxel_to_world(ijk)).mean())


def _listed(items: Sequence[object], most: int = 8) -> str:
    """A few of them as words: "3, 4, 5 and 7 more"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more
