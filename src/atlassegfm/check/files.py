"""Check files one by one, against an atlas, and in pairs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..atlas import Atlas
from ..core.errors import InputError, MissingExtraError
from ..core.geometry import Grid
from ..core.image import Volume, checked_image, load_labels, load_volume
from ..dicom import Selection, Series, is_dicom_input, is_series_folder, load_series, open_labels, series_of
from .against_atlas import compare_with_atlas
from .findings import AtlasReport, Check, FileReport, Kind, LabelReport, error, sort_findings, warning
from .geometry import compare_grids, grid_findings, header_findings, oblique_deg, sheared_deg
from .intensity import PERCENTS, SAMPLED_VOXELS, intensity_findings, inversion_findings
from .labels import label_reports, looks_like_labels


def check_files(
    paths: Iterable[str | os.PathLike[str]], series: str | None = None, atlas: Atlas | None = None
) -> Check:
    """Check files one by one, scans against an atlas, and all in pairs.

    Parameters
    ----------
    paths : iterable of path
        Scans and label maps, folders of DICOM series, RTSTRUCT and DICOM-SEG files. What cannot be read becomes a
        finding. Structures are checked on the series among the paths that they belong to.
    series : str, optional
        Which series of DICOM folders, as :func:`~atlassegfm.dicom.load_series` takes it.
    atlas : Atlas, optional
        Each scan is fitted to it, which takes some seconds.
    """
    files = [Path(path) for path in paths]
    scans: list[Series] = []
    found: dict[int, tuple[FileReport, Grid | None]] = {}
    # Scans first, as structures need them.
    for position in sorted(range(len(files)), key=lambda n: is_dicom_input(files[n]) and not files[n].is_dir()):
        found[position] = _examine(files[position], scans, series, atlas)
    examined = [found[position] for position in range(len(files))]
    readable = [(report, grid) for report, grid in examined if grid is not None]
    pairs = tuple(compare_grids(*one, *other) for one, other in itertools.combinations(readable, 2))
    return Check(tuple(report for report, _ in examined), pairs)


def _load(path: Path, scans: list[Series], choice: str | None) -> Volume:
    """Load a scan, adding a series to ``scans``, or structures on that of ``scans`` they belong to."""
    if is_series_folder(path):
        volume = load_series(path, choice)
        series = series_of(volume)
        scans += [] if series is None else [series]
        return volume
    if not is_dicom_input(path):
        return load_volume(path)
    refusals = []
    for scan in scans or (None,):
        try:
            return open_labels(path, scan, Selection(overlap="last"))  # overlaps matter to later use only
        except InputError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _used(volume: Volume, kind: Kind, path: Path) -> tuple[Volume | None, str]:
    """The volume as other commands use it; None, and why, if they refuse it."""
    try:
        return checked_image(volume, path) if kind == "scan" else load_labels(volume), ""
    except InputError as refusal:
        return None, str(refusal).removeprefix(f"{path}: ").removeprefix("the label map: ")


def _examine(
    path: Path, scans: list[Series], choice: str | None, atlas: Atlas | None
) -> tuple[FileReport, Grid | None]:
    """Report on one file; its grid too if it has one."""
    name = path.name or path.resolve().name
    try:
        volume = _load(path, scans, choice)
    except (InputError, MissingExtraError) as refusal:
        # The sentence begins with the whole path and holds its own remedy.
        text = str(refusal).removeprefix(f"{path}: ").replace(str(path), name)
        return FileReport(name, "unreadable", (error(text),)), None
    grid, header = volume.grid, volume.source.nifti_header if volume.source else None
    findings = [*header_findings(volume), *grid_findings(grid)]
    finite = np.isfinite(volume.data)
    bad = int(volume.data.size - np.count_nonzero(finite))
    values = volume.data[finite] if bad else volume.data
    value_range: tuple[float, ...] = (float(values.min()), float(values.max())) if values.size else ()
    constant = len(set(value_range)) == 1
    kind: Kind = "labels" if looks_like_labels(volume, value_range) else "scan"
    usable, why = _used(volume, kind, path)
    if bad and usable is not None:
        taken = "background" if kind == "labels" else "outside the scan"
        text = f"{bad} of {volume.data.size} voxels are NaN or infinite: they are taken as {taken}"
        findings.append(warning(text, "replace them by the background value if that is wrong"))
    labels: tuple[LabelReport, ...] = ()
    percentiles: tuple[float, ...] = ()
    against: AtlasReport | None = None
    if constant:
        what = "an empty label map or a blank scan" if value_range[0] == 0 else "a blank scan"
        text = f"all voxels have the value {value_range[0]:g}: {what}, which the program refuses"
        findings.append(error(text, "export the file again"))
    elif kind == "labels":
        labels, more = label_reports(volume, path)
        findings += more
    elif value_range:
        sample = values.ravel()[:: max(1, values.size // SAMPLED_VOXELS)]
        percentiles = tuple(float(p) for p in np.percentile(sample, PERCENTS))
        findings += intensity_findings(volume, value_range, percentiles)
        if usable is not None and atlas is None:
            findings += inversion_findings(usable)
        elif usable is not None and atlas is not None:
            against, more = compare_with_atlas(usable, atlas, name)
            findings += more
    if usable is None and not any(finding.severity == "error" for finding in findings):
        findings.append(error(why))
    report = FileReport(
        name=name,
        kind=kind,
        findings=sort_findings(findings),
        shape=grid.shape,
        spacing_mm=tuple(float(s) for s in grid.spacing_mm),
        axes=grid.axis_codes,
        oblique_deg=oblique_deg(grid),
        sheared_deg=sheared_deg(grid),
        stored_type=str(volume.data.dtype if header is None else header.get_data_dtype().newbyteorder("=")),
        sform_code=None if header is None else int(header["sform_code"]),
        qform_code=None if header is None else int(header["qform_code"]),
        value_range=value_range,
        percentiles=percentiles,
        labels=labels,
        atlas=against,
    )
    return report, grid
