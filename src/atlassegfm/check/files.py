"""Check files one by one, against an atlas, and in pairs."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..atlas import Atlas
from ..core.errors import InputError, MissingExtraError
from ..core.geometry import Grid
from ..core.image import Volume, checked_image, checked_labels, load_volume
from ..dicom import Selection, Series, is_dicom_input, is_series_folder, load_series, open_labels, series_of
from .against_atlas import compare_with_atlas
from .findings import AtlasReport, Check, FileReport, Kind, LabelReport, error, note, sort_findings, warning
from .geometry import compare_grids, grid_findings, header_findings, oblique_deg, same_case, sheared_deg
from .intensity import PERCENTS, SAMPLED_VOXELS, intensity_findings, inversion_findings
from .labels import label_reports, looks_like_labels

#: Files of which all pairs are compared; of more only those of one case: by their names, or alone in a folder.
_FEW = 12


def check_files(
    paths: Iterable[str | os.PathLike[str]],
    series: str | None = None,
    atlas: Atlas | None = None,
    *,
    on_stage: Callable[[str], None] | None = None,
) -> Check:
    """Check scans, label maps, folders of DICOM series, RTSTRUCT and DICOM-SEG files one by one, and in pairs.

    What cannot be read becomes a finding; structures are checked on the series among the paths that they belong to.
    ``series`` chooses of DICOM folders as in :func:`~atlassegfm.dicom.load_series`. Each scan is fitted to ``atlas``,
    which takes some seconds. ``on_stage`` is called with what is being done, as "fitting FILE to the atlas".
    """
    files, scans = [Path(path) for path in paths], list[Series]()
    names = _names(files)
    found: dict[int, tuple[FileReport, Grid | None]] = {}
    # Scans first, as structures need them.
    for position in sorted(range(len(files)), key=lambda n: is_dicom_input(files[n]) and not files[n].is_dir()):
        path, name = files[position], names[position]
        found[position] = _examine(path, name, scans, series, atlas, on_stage or (lambda _: None))
    examined = [found[position] for position in range(len(files))]
    readable = [n for n, (_, grid) in enumerate(examined) if grid is not None]
    beside = Counter(path.parent for path in files)
    pairs = tuple(
        compare_grids(*examined[one], *examined[other])  # type: ignore[arg-type]
        for one, other in itertools.combinations(readable, 2)
        if len(files) <= _FEW
        or (files[one].parent == files[other].parent and beside[files[one].parent] <= _FEW)
        or ("/" not in names[one] + names[other] and same_case(names[one], names[other]))
    )
    return Check(tuple(report for report, _ in examined), pairs)


def _names(files: Sequence[Path]) -> list[str]:
    """Names of files for messages: equal ones with the folders that tell them apart."""
    names = [path.name or path.resolve().name for path in files]
    count = Counter(names)
    common = os.path.commonpath([path.absolute().parent for path in files]) if files else ""
    return [
        Path(os.path.relpath(path.absolute(), common)).as_posix() if count[name] > 1 else name
        for path, name in zip(files, names, strict=True)
    ]


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


def _examine(
    path: Path, name: str, scans: list[Series], choice: str | None, atlas: Atlas | None, on_stage: Callable[[str], None]
) -> tuple[FileReport, Grid | None]:
    """Report on one file; its grid too if it has one."""
    on_stage(f"reading: {name}")
    try:
        volume = _load(path, scans, choice)
    except (InputError, MissingExtraError) as refusal:
        # The sentence begins with the whole path and holds its own remedy.
        text = str(refusal).removeprefix(f"{path}: ").replace(str(path), name)
        return FileReport(name, "unreadable", (error(text),)), None
    grid, header = volume.grid, volume.source.nifti_header if volume.source else None
    findings = [*header_findings(volume), *grid_findings(grid)]
    finite = np.isfinite(volume.data)
    values = volume.data if finite.all() else volume.data[finite]
    value_range: tuple[float, ...] = (float(values.min()), float(values.max())) if values.size else ()
    kind: Kind = "labels" if looks_like_labels(volume, value_range) else "scan"
    labels: tuple[LabelReport, ...] = ()
    percentiles: tuple[float, ...] = ()
    against: AtlasReport | None = None
    if value_range and kind == "scan":
        percentiles = tuple(np.percentile(values.ravel()[:: max(1, values.size // SAMPLED_VOXELS)], PERCENTS).tolist())
    try:
        checked = (checked_labels if kind == "labels" else checked_image)(volume, name)
    except InputError as refusal:
        findings.append(error(str(refusal).removeprefix(f"{name}: ")))
    else:
        before, after = (one.source.notes if one.source else () for one in (volume, checked))
        findings += [warning(remark) for remark in after[len(before) :]]
        if kind == "labels":
            labels, more = label_reports(checked, path)
            if volume.data.dtype.kind == "f":
                text = f"the labels are stored as {volume.data.dtype}: they are read as whole numbers, and results are "
                more.append(note(f"{text}written in the smallest integer type that holds them"))
        else:
            more = [*intensity_findings(checked, volume.data.dtype, value_range, percentiles)]
            if atlas is None:
                more += inversion_findings(checked)
            elif all(one.severity == "note" for one in more):  # there is something to fit
                on_stage(f"fitting {name} to the atlas")
                against, compared = compare_with_atlas(checked, atlas, name)
                more += compared
        findings += more
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
