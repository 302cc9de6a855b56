"""Result folders: one for each query, written whole or not at all; a run continues from them.

A folder holds

- ``segmentation.nii.gz`` or other formats, with ``colors.ctbl`` and ``labels.txt``: names and colours for 3D Slicer and
  ITK-SNAP;
- ``run.json``: what was done and what came out; the same inputs and settings give the same bytes;
- ``status.json``: how it went, with seconds, memory and what it was made from;

on request also

- ``rtstruct.dcm`` and ``seg.dcm``: the same as RTSTRUCT and DICOM-SEG on the query's own DICOM series, read back and
  compared before the folder is kept;
- ``atlas.nii.gz`` and ``model.nii.gz``: label maps of the warped atlas and of the model alone;
- ``probability.nii.gz``: fused probabilities, one volume for each structure in the order of ``run.json``, as bytes with
  a scale of 1/255;
- ``transform/``: query to atlas, as ITK, ANTs, 3D Slicer and ``segment --transform`` read it;
- ``edits.jsonl`` and ``automatic.nii.gz``: what people did to the labels, and what these were before;
- ``versions/``: label maps as each person accepted them last;
- ``report.html`` and ``overview.png``: written by :mod:`atlassegfm.report`, removed when the result is made again.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import dicom, records
from ..context import Context
from ..core.config import to_dict
from ..core.errors import InputError
from ..core.files import replaced_files, replaced_folder
from ..core.geometry import Grid
from ..core.image import Volume, load_labels, save_masks, save_volume, smallest_label_type
from ..core.itk import require_itk_extra
from ..core.labels import (
    Structure,
    file_names,
    itk_snap_labels,
    read_names_file,
    slicer_color_table,
    structures_of,
)
from ..core.mask import LocalMap
from ..core.text import did_you_mean
from ..core.version import __version__, library_versions
from ..models.table import describe_models, with_weights_paths
from ..quality.verdict import overall
from ..records import (
    AUTOMATIC,
    EDITS,
    FORMATS,
    ITK_SNAP_LABELS,
    RESULT_NAMES,
    RUN,
    SLICER_COLORS,
    STATUS,
    VERSIONS,
    label_map_of,
)
from ..result import Segmentation, StructureResult
from ..transforms.io import write_members, write_transform
from .fingerprint import is_unchanged
from .plan import Case
from .table import read_run

logger = logging.getLogger(__name__)

#: Formats that need a DICOM series.
_DICOM_FORMATS = ("rtstruct", "seg")
#: Seconds since 1970 taken as now, where set: two runs then write the same bytes (reproducible-builds.org).
_EPOCH_VARIABLE = "SOURCE_DATE_EPOCH"


@dataclass(frozen=True, eq=False)
class RunInputs:
    """Inputs of a run, for ``run.json``."""

    context: Context
    query: Volume  # as read from its file
    transform: Path | None = None  # given instead of registering

    def record(self) -> records.Inputs:
        """File names and remarks on geometry."""
        atlas, saved = self.context.atlas, self.context.saved
        context = None
        if saved is not None:
            version, files, name = self.context.version, dict(self.context.files), saved.folder.resolve().name
            context = records.ContextRecord(folder=name, sha256=saved.sha256, atlassegfm=version, files=files)
        return records.Inputs(
            atlas=_input(atlas.image),
            labels=_input(atlas.labels),
            query=_input(self.query),
            context=context,
            transform=None if self.transform is None else records.InputRecord(file=self.transform.name),
        )


@dataclass(frozen=True, eq=False)
class LabelledQuery:
    """What the label files of a result are written from."""

    query: Volume
    labels: Volume  # on its voxels as stored
    structures: tuple[Structure, ...]
    run: records.RunRecord
    maps: Mapping[int, tuple[Grid, LocalMap]]  # probabilities by label value, for contours
    contours: Mapping[int, Any] = field(default_factory=dict)  # by label value, where they are drawn already


def check_formats(formats: Sequence[str], query: Volume | None = None) -> None:
    """Check that results can be written in these formats, DICOM ones for the ``query`` if it is given.

    InputError if a format is unknown, none is given, or a DICOM format is wanted and the query is no DICOM series;
    MissingExtraError if the packages for DICOM or NRRD are not installed.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        first = unknown[0] if unknown else ""
        meant = did_you_mean(first, FORMATS)
        raise InputError(f"unknown format {first!r}{meant}; expected some of {', '.join(FORMATS)}, commas between")
    if any(FORMATS[name].endswith(".nrrd") for name in formats):
        require_itk_extra("writing NRRD")
    others = [name for name in formats if name in _DICOM_FORMATS]
    if others:
        dicom.require_dicom_extra()
    if others and query is not None and dicom.series_of(query) is None:
        name = "the query" if query.source is None else str(query.source.path)
        raise InputError(
            f"{name}: {' and '.join(others)} can only be written for a DICOM series (patient, study and frame of "
            "reference are copied from it); give its folder as the query, or use --format nifti"
        )


def why_to_compute(
    case: Case, folder: Path, provenance: records.Provenance, *, second_pass: bool = True
) -> tuple[str, records.StatusRecord | None]:
    """Decide whether a case has to be computed, and read the status of the result that is in its folder, if any.

    The reason is "new", "failed before", "other settings" and so on; empty if its result is there, or a person accepted
    all of it. ``provenance`` is what the result would be made from now, without the files of the case; without a
    ``second_pass`` a result that it changed does not serve.
    """
    try:
        status = records.StatusRecord.read(folder / STATUS)
    except InputError:
        return ("new" if not (folder / STATUS).exists() else "other results_format"), None
    if status.state == "failed":
        return "failed before", status
    if is_accepted(folder):
        made = status.provenance
        if made is not None and not is_unchanged(case.query, made.query):
            logger.warning("%s: the scan has changed since a person accepted the result, which is kept", case.query)
        return "", status
    files = (RUN, *(FORMATS[name] for name in provenance.formats if name not in _DICOM_FORMATS))
    if status.provenance is None or not all((folder / file).exists() for file in files):
        return "new", status
    if status.second_pass is not None and status.second_pass.recovered and not second_pass:
        return "other second pass", status
    return changed_since(status.provenance, provenance, {"query": case.query, "transform": case.transform}), status


def changed_since(before: records.Provenance, now: records.Provenance, files: dict[str, Path | None]) -> str:
    """Name what differs from what a result was made from, as "other settings"; empty if nothing does."""
    for key in type(now).model_fields:
        if key in files:
            path, record = files[key], getattr(before, key)
            if (record is not None) if path is None else not is_unchanged(path, record):
                return f"other {key}"
        elif getattr(before, key) != getattr(now, key) and not (key == "keep" and before.keep):
            return f"other {key}"
    return ""


def write_result(
    segmentation: Segmentation,
    inputs: RunInputs,
    folder: Path,
    status: records.StatusRecord,
    *,
    keep: bool = False,
    formats: Sequence[str] = ("nifti",),
) -> records.RunRecord:
    """Write the result folder of one query, in place of an earlier one; ``keep`` adds intermediate results.

    Structures that a person accepted in the earlier one stay as they are, as do the log of edits and the
    versions of each.
    InputError if the folder cannot be written or holds something else, or as :func:`check_formats`; OutputError if an
    RTSTRUCT or DICOM-SEG does not read back as it was written.
    """
    check_formats(formats, inputs.query)
    structures = inputs.context.atlas.structures
    run, labels, kept = _with_accepted(
        folder, run_record(segmentation, inputs), segmentation.labels, inputs.query, structures
    )
    with replaced_folder(folder, RESULT_NAMES) as new:
        _keep_work_of_people(folder, new)
        if kept:
            save_volume(segmentation.labels, new / AUTOMATIC, structures=structures)
        _save_labels(labels, structures, new, formats)
        maps = {
            value: (segmentation.grid, one.fused)
            for value, one in segmentation.probabilities.items()
            if value not in kept
        }
        result = LabelledQuery(inputs.query, labels, structures, run, maps)
        written: dict[str, Any] = {"dicom": _save_dicom(result, new, formats)}
        if keep:
            save_volume(segmentation.atlas_labels, new / "atlas.nii.gz", structures=structures)
            if segmentation.model_labels is not None:
                save_volume(segmentation.model_labels, new / "model.nii.gz", structures=structures)
            for name, labels in segmentation.member_labels.items():
                (new / "members").mkdir(exist_ok=True)
                save_volume(labels, new / "members" / f"{name}.nii.gz", structures=structures)
            _save_probabilities(segmentation, new / "probability.nii.gz")
            written["probability"] = tuple(result.structure.name for result in segmentation.structures)
            found = segmentation.registration
            write_transform(new / "transform", found.linear, found.field, segmentation.grid, found.local)
            write_members(new / "transform", found.further_members, segmentation.grid)
        run = run.model_copy(update=written)
        run.write(new / RUN)
        status.write(new / STATUS)
    return run


def _keep_work_of_people(folder: Path, new: Path) -> None:
    """Copy the log of edits and the versions of each person into the folder that takes a result's place."""
    if (folder / EDITS).is_file():
        shutil.copy2(folder / EDITS, new / EDITS)
    if (folder / VERSIONS).is_dir():
        shutil.copytree(folder / VERSIONS, new / VERSIONS)


def accepted_values(folder: Path) -> tuple[int, ...]:
    """List the label values of a result that a person accepted."""
    run = read_run(folder)
    return () if run is None else tuple(one.value for one in run.structures if one.review is not None)


def is_accepted(folder: Path) -> bool:
    """Check whether a person accepted all structures of a result: it is never computed again."""
    run = read_run(folder)
    return run is not None and all(one.review is not None for one in run.structures)


def _with_accepted(
    folder: Path, run: records.RunRecord, labels: Volume, query: Volume, structures: Sequence[Structure]
) -> tuple[records.RunRecord, Volume, set[int]]:
    """Put the structures that a person accepted in an earlier result of a folder into a new one; and which they are."""
    earlier, names = read_run(folder), {one.value: one.name for one in structures}
    known = {one.value: one for one in (() if earlier is None else earlier.structures) if one.review is not None}
    known = {value: one for value, one in known.items() if names.get(value) == one.name}
    if not known:
        return run, labels, set()
    old = read_labels(folder, query, structures).data
    data = np.where(np.isin(labels.data, [*known]), 0, labels.data).astype(labels.data.dtype)
    accepted = np.isin(old, [*known])
    data[accepted] = old[accepted]
    merged = Volume(data, labels.grid, labels.source)
    rows = tuple(known.get(one.value, one) for one in with_volumes(run, merged).structures)
    verdict = overall([one.quality.verdict for one in rows if one.quality is not None])
    return run.model_copy(update={"structures": rows, "verdict": verdict}), merged, set(known)


def with_volumes(run: records.RunRecord, labels: Volume) -> records.RunRecord:
    """Measure the volumes of a result anew."""
    voxels = np.bincount(labels.data.ravel(), minlength=1 + max(one.value for one in run.structures))
    millilitres = labels.grid.voxel_volume_mm3 / 1000
    rows = (
        one.model_copy(update={"volume_ml": round(float(voxels[one.value]) * millilitres, 4)}) for one in run.structures
    )
    return run.model_copy(update={"structures": tuple(rows)})


def structures_in(folder: Path, run: records.RunRecord) -> tuple[Structure, ...]:
    """List the structures of a result, with the colours of its files."""
    path, tables = label_map_of(folder), []
    if (folder / SLICER_COLORS).is_file():
        tables.append(read_names_file(folder / SLICER_COLORS))
    elif path.is_file() and (source := load_labels(path, allow_empty=True).source) is not None:
        tables.append(dict(source.label_table))
    found = {one.value: one for one in structures_of([row.value for row in run.structures], tables)}
    return tuple(Structure(row.value, row.name, found[row.value].color) for row in run.structures)


def read_labels(folder: Path, query: Volume, structures: Sequence[Structure]) -> Volume:
    """Read the labels of a result in whichever format it has, on the voxels of its query as stored; else InputError."""
    values, path = [one.value for one in structures], label_map_of(folder)
    kind = smallest_label_type(max(values))
    masks, seg, rtstruct = (folder / FORMATS[name] for name in ("masks", "seg", "rtstruct"))
    if path.is_file():
        found = load_labels(path, allow_empty=True)
        if found.grid.axes_relative_to(query.grid) is None:
            advice = "move the folder away, or give the scan it was made from"
            raise InputError(f"{path}: not on the voxels of the scan, which has changed since; {advice}")
        data = found.turned_to(query.grid).data
    elif masks.is_dir():
        data = np.zeros(query.grid.shape, kind)
        for value, name in zip(values, file_names(structures), strict=True):
            mask = load_labels(masks / f"{name}.nii.gz", allow_empty=True)
            data[mask.turned_to(query.grid).data > 0] = value
    elif seg.is_file() or (rtstruct.is_file() and dicom.contours_in(rtstruct)):
        data = dicom.open_labels(seg if seg.is_file() else rtstruct, query, warn=False).turned_to(query.grid).data
    else:
        data = np.zeros(query.grid.shape, kind)
    return Volume(np.array(data, kind), query.grid, query.source)


def rewrite_result(result: LabelledQuery, folder: Path, status: records.StatusRecord, formats: Sequence[str]) -> None:
    """Replace the labels of a result, ``run.json`` and ``status.json``, all at once; pages of a report are removed."""
    labels = {*FORMATS.values(), SLICER_COLORS, ITK_SNAP_LABELS}
    with replaced_folder(folder, RESULT_NAMES) as new:
        for kept in folder.iterdir():
            if kept.name not in labels | {RUN, STATUS, "report.html", "overview.png"}:
                copy: Callable[..., Any] = shutil.copytree if kept.is_dir() else shutil.copy2
                copy(kept, new / kept.name)
        _save_labels(result.labels, result.structures, new, formats)
        result.run.model_copy(update={"dicom": _save_dicom(result, new, formats)}).write(new / RUN)
        status.write(new / STATUS)


def _save_labels(labels: Volume, structures: Sequence[Structure], folder: Path, formats: Sequence[str]) -> None:
    """Write a label map in the formats for files, with its colour tables, or a mask for each structure."""
    for name in formats:
        if name == "masks":
            save_masks(labels, structures, folder / FORMATS[name])
        elif name not in _DICOM_FORMATS:
            save_volume(labels, folder / FORMATS[name], structures=structures)
    (folder / SLICER_COLORS).write_text(slicer_color_table(structures), encoding="utf-8")
    (folder / ITK_SNAP_LABELS).write_text(itk_snap_labels(structures), encoding="utf-8")


def update_labels(result: LabelledQuery, automatic: Volume, folder: Path, version: str = "") -> None:
    """Write the labels of a result and ``run.json``, file by file in its formats; all else in the folder stays.

    At any moment each file is whole, and ``run.json`` comes last. ``automatic`` are the labels as they were computed,
    kept once. ``version`` names a file that gets the labels too. Pages of a report are removed. Errors as of
    :func:`write_result`.
    """
    formats = [name for name, file in FORMATS.items() if (folder / file).exists()] or ["nifti"]
    with replaced_files(folder, RUN) as new:
        if not (folder / AUTOMATIC).is_file():
            save_volume(automatic, new / AUTOMATIC, structures=result.structures)
        if version:
            (new / VERSIONS).mkdir()
            save_volume(result.labels, new / VERSIONS / version, structures=result.structures)
        _save_labels(result.labels, result.structures, new, formats)
        result.run.model_copy(update={"dicom": _save_dicom(result, new, formats)}).write(new / RUN)
        outdated = [FORMATS[name] for name in _DICOM_FORMATS if not (new / FORMATS[name]).exists()]
    for name in (*outdated, "report.html", "overview.png"):
        (folder / name).unlink(missing_ok=True)


def write_failure(folder: Path, status: records.StatusRecord) -> None:
    """Leave nothing but ``status.json`` in a result folder, and what people did: a result would pass for a new one.

    A result in which a person accepted something stays as it is.
    """
    if accepted_values(folder):
        logger.warning("%s: the result stays, as a person accepted structures of it", folder.name)
        return
    with replaced_folder(folder, RESULT_NAMES) as new:
        _keep_work_of_people(folder, new)
        status.write(new / STATUS)


def run_record(segmentation: Segmentation, inputs: RunInputs) -> records.RunRecord:
    """Describe a result for ``run.json``: nothing that differs between two runs on the same inputs."""
    found, several = segmentation.registration, len(segmentation.registrations) > 1
    # Folders of this machine are nobody's business.
    settings = to_dict(with_weights_paths(segmentation.settings, lambda path: path.name))
    return records.RunRecord(
        inputs=inputs.record(),
        device="cuda" if segmentation.device == "cuda" else "cpu",
        seed=segmentation.settings.seed,
        model=_model_record(segmentation),
        registration=records.RegistrationRecord(
            atlas=segmentation.nearest_atlas if several else None,
            atlases=tuple(segmentation.registrations) if several else None,
            source="given" if segmentation.transform_given else "fitted",
            confidence=_rounded(found.confidence),
            mirrored_gain=None if (sides := segmentation.sides) is None else _rounded(sides.gain),
            swapped=segmentation.swapped,
            members=len(found.members),
            folding=_rounded(found.folding, 6),
            jacobian=_rounded_fields(found.jacobian, 6),
            linear_query_to_atlas_mm=tuple(tuple(round(n, 6) for n in row) for row in found.linear.matrix.tolist()),
        ),
        gate=None if segmentation.gate is None else segmentation.gate.describe(),
        verdict=segmentation.verdict,
        structures=tuple(map(structure_record, segmentation.structures)),
        settings=settings,
        versions={"atlassegfm": __version__, **library_versions()},
    )


def _input(volume: Volume) -> records.InputRecord | None:
    if volume.source is None:
        return None
    path = volume.source.path
    return records.InputRecord(file=path.name or path.resolve().name, notes=tuple(volume.source.notes))


def _model_record(segmentation: Segmentation) -> records.ModelRecord:
    name, rows = segmentation.settings.model, describe_models(segmentation.settings)
    if not rows:
        return records.ModelRecord(name=name)
    described = {
        key: "; ".join(dict.fromkeys(getattr(row, key) for row in rows))
        for key in ("summary", "code_licence", "weights_licence")
    }
    return records.ModelRecord(
        name=name,
        **described,
        licence_accepted=segmentation.licence_accepted,
        prompt=segmentation.prompt,
        provenance=dict(segmentation.provenance),
    )


def structure_record(one: StructureResult) -> records.StructureRecord:
    """Describe a structure for ``run.json``."""
    quality = None
    if one.quality is not None:
        quality = records.QualityRecord(
            verdict=one.quality.verdict,
            reason=one.quality.reason,
            **{name: _rounded(getattr(one.quality, name)) for name in ("estimated_dice", "low", "high")},
            evidence=_rounded_fields(one.quality.evidence),
        )
    return records.StructureRecord(
        value=one.structure.value,
        name=one.structure.name,
        status=one.status,
        reason=one.reason,
        volume_ml=round(one.volume_ml, 4),
        outside_fraction=round(one.outside_fraction, 4),
        place=None if one.place is None else records.PlaceRecord.model_validate(_rounded_fields(one.place)),
        prompt=None if one.prompt is None else records.PromptRecord(**asdict(one.prompt)),
        members={
            name: records.MemberRecord.model_validate(_rounded_fields(member)) for name, member in one.members.items()
        }
        or None,
        atlases=one.votes or None,
        quality=quality,
    )


def _rounded(value: float | None, digits: int = 4) -> float | None:
    """Rounded for JSON, which has no NaN."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def _rounded_fields(numbers: Any, digits: int = 4) -> dict[str, float | None] | None:
    """The numbers of a dataclass, rounded for JSON; None for None."""
    return None if numbers is None else {name: _rounded(value, digits) for name, value in asdict(numbers).items()}


def _save_dicom(result: LabelledQuery, folder: Path, formats: Sequence[str]) -> dict[str, Any] | None:
    """Write RTSTRUCT and DICOM-SEG where they are wanted, read them back, and report the comparison."""
    wanted = [name for name in _DICOM_FORMATS if name in formats]
    return {name: _save_object(result, folder / FORMATS[name], name) for name in wanted} or None


def _save_object(result: LabelledQuery, path: Path, form: str) -> dict[str, Any]:
    series = dicom.series_of(result.query)
    if series is None:
        raise ValueError("the query is no DICOM series")
    written = (path, result.labels, result.structures, series, _dicom_provenance(result.run))
    if form == "rtstruct":
        dicom.write_rtstruct(*written, result.maps, result.contours)
    elif result.labels.data.any():
        dicom.write_segmentation(*written)
    else:
        logger.warning("no DICOM-SEG is written: nothing was found, and it cannot be empty")
        return {"file": None, "reason": "nothing was found, and a DICOM-SEG cannot be empty"}
    found = dicom.check_round_trip(path, result.labels, result.structures, series)
    return {"file": path.name, "round_trip": [one.to_dict() for one in found]}


def _dicom_provenance(run: records.RunRecord) -> dicom.Provenance:
    """Describe a result in DICOM objects: verdict on each structure, date and model."""
    present = sum(one.status == "present" for one in run.structures)
    descriptions = {}
    for one in run.structures:
        text = f"{one.status}: {one.reason}" if one.reason else one.status
        if one.quality is not None and one.status == "present":
            text = ": ".join(filter(None, (one.quality.verdict, one.quality.reason)))
        descriptions[one.value] = text
    epoch = os.environ.get(_EPOCH_VARIABLE, "")
    when = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now().astimezone()
    return dicom.Provenance(
        run.model.name,
        f"{run.verdict or 'not judged'}: {present} of {len(run.structures)} structures found",
        descriptions,
        when,
    )


def _save_probabilities(segmentation: Segmentation, path: Path) -> None:
    """(I, J, K, structures) uint8 with scale 1/255: a quarter of float32, and no tool needs more."""
    import nibabel as nib

    stored = segmentation.labels.grid
    data = np.zeros((*stored.shape, len(segmentation.structures)), np.uint8)
    for position, result in enumerate(segmentation.structures):
        if (maps := segmentation.probabilities.get(result.structure.value)) is not None:
            full = np.rint(maps.fused.to_full(segmentation.grid.shape) * 255).astype(np.uint8)
            data[..., position] = Volume(full, segmentation.grid).turned_to(stored).data
    image = nib.Nifti1Image(data, stored.affine)
    image.header.set_xyzt_units("mm")
    # nibabel takes a slope for a wish to be rescaled; set on the header it scales what it is given.
    image.header.set_slope_inter(1 / 255, 0)
    nib.save(image, path)
