"""Writing results: one folder for each query, whole or not at all.

A folder holds

- ``segmentation.nii.gz``, unless only DICOM is wanted;
- ``run.json``: what was done and what came out. The same inputs and settings give the same bytes;
- ``status.json``: how it went (state, seconds, memory), which is another time each time;

on request also

- ``rtstruct.dcm`` and ``seg.dcm``: the same as RTSTRUCT and DICOM-SEG on the query's own DICOM series. They are read
  back and compared before the folder is kept; ``run.json`` lists the outcome under ``dicom``;

- ``atlas.nii.gz`` and ``model.nii.gz``: label maps of the warped atlas and of the model alone;
- ``probability.nii.gz``: fused probabilities, one volume for each structure in the order that ``run.json`` lists
  under ``probability``, as bytes with a scale of 1/255 in the header;
- ``report.html`` and ``overview.png``: written by :mod:`atlassegfm.report`, gone when the result is made again;
- ``transform/``: the map from query to atlas as ITK, ANTs, 3D Slicer and ``segment --transform`` read it; see
  :mod:`atlassegfm.itk`.

Names of files are kept in ``run.json``, their folders are not: paths in clinics name patients.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..atlas import Atlas
from ..core.config import to_dict
from ..core.errors import InputError
from ..core.files import _disk_errors, replaced_folder
from ..core.image import Volume, save_volume
from ..core.parallel import peak_memory_mb
from ..dicom import Provenance, check_round_trip, require_dicom_extra, series_of, write_rtstruct, write_segmentation
from ..result import Segmentation
from ..transforms.io import write_further_fits, write_transform

logger = logging.getLogger(__name__)


#: What a report adds to a result folder; gone when the result is made again.
REPORT_NAMES = frozenset({"report.html", "overview.png"})


#: What a result folder may hold: a folder with anything else in it is never replaced.
SEGMENTATION, RUN, STATUS = "segmentation.nii.gz", "run.json", "status.json"


RESULT_NAMES = frozenset(
    {
        *(SEGMENTATION, "rtstruct.dcm", "seg.dcm", RUN, STATUS),
        *("atlas.nii.gz", "model.nii.gz", "probability.nii.gz", "transform"),
        *REPORT_NAMES,
    }
)


#: What a segmentation can be written as, and the file of each.
FORMATS = {"nifti": SEGMENTATION, "rtstruct": "rtstruct.dcm", "seg": "seg.dcm"}


#: Seconds since 1970 that count as now, where set: so that two runs write the same bytes (reproducible-builds.org).
_EPOCH_VARIABLE = "SOURCE_DATE_EPOCH"


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What ``run.json`` says of the inputs.

    Parameters
    ----------
    context : Atlas
        The atlas.
    query : Volume
        As read from its file.
    transform : Path, optional
        The transform that was given instead of registering.
    saved_context : mapping of str to Any, optional
        The context folder that was given instead of the atlas, in plain values.
    """

    context: Atlas
    query: Volume
    transform: Path | None = None
    saved_context: Mapping[str, Any] | None = None

    def summary(self) -> dict[str, Any]:
        """File names and the notes about their geometry."""
        volumes = {"atlas": self.context.image, "labels": self.context.labels, "query": self.query}
        files: dict[str, Any] = {
            role: {
                "file": volume.source.path.name or volume.source.path.resolve().name,
                "notes": list(volume.source.notes),
            }
            for role, volume in volumes.items()
            if volume.source is not None
        }
        if self.saved_context is not None:
            files["context"] = dict(self.saved_context)
        if self.transform is not None:
            files["transform"] = {"file": self.transform.name}
        return files


def check_formats(formats: Sequence[str], query: Volume | None = None) -> None:
    """Check that results can be written so.

    Parameters
    ----------
    formats : sequence of str
        Of :data:`FORMATS`.
    query : Volume, optional
        What is to be segmented.

    Raises
    ------
    InputError
        If a format is not known, none is given, or the query is no DICOM series and a DICOM format is wanted.
    MissingExtraError
        If the packages for DICOM are not installed.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(
            f"unknown format {unknown[0] if unknown else ''!r}; expected some of {', '.join(FORMATS)}, commas between"
        )
    others = [name for name in formats if name != "nifti"]
    if others:
        require_dicom_extra()
    if others and query is not None and series_of(query) is None:
        name = "the query" if query.source is None else str(query.source.path)
        raise InputError(
            f"{name}: {' and '.join(others)} can only be written for a DICOM series (patient, study and frame of "
            "reference are copied from it); give its folder as the query, or use --format nifti"
        )


def write_result(
    segmentation: Segmentation,
    inputs: RunInputs,
    folder: Path,
    *,
    keep: bool = False,
    formats: Sequence[str] = ("nifti",),
    status: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the result of one query.

    Parameters
    ----------
    segmentation : Segmentation
        The result.
    inputs : RunInputs
        What it was made from.
    folder : Path
        The result folder; an earlier one is replaced. Its parent exists.
    keep : bool
        Whether to write the intermediate results too.
    formats : sequence of str
        Of :data:`FORMATS`: what to write the segmentation as.
    status : mapping of str to Any, optional
        What ``status.json`` is to say besides, as plain values.

    Returns
    -------
    dict
        What was written to ``run.json`` and ``status.json``.

    Raises
    ------
    InputError
        If the folder cannot be written or holds something else, or as :func:`check_formats`.
    OutputError
        If an RTSTRUCT or DICOM-SEG does not come back as it was written.
    """
    check_formats(formats, inputs.query)
    structures = inputs.context.structures
    run = run_summary(segmentation, inputs)
    ended = {"state": "done", "reason": "", **(status or {}), **cost_summary(segmentation)}
    with replaced_folder(folder, RESULT_NAMES) as new, _disk_errors(folder):
        if "nifti" in formats:
            save_volume(segmentation.labels, new / FORMATS["nifti"], structures=structures)
        others = [name for name in FORMATS if name in formats and name != "nifti"]
        if others:
            run["dicom"] = {name: _save_dicom(segmentation, inputs, new / FORMATS[name], name) for name in others}
        if keep:
            save_volume(segmentation.atlas_labels, new / "atlas.nii.gz", structures=structures)
            if segmentation.model_labels is not None:
                save_volume(segmentation.model_labels, new / "model.nii.gz", structures=structures)
            _save_probabilities(segmentation, new / "probability.nii.gz")
            run["probability"] = [result.structure.name for result in segmentation.structures]
            found = segmentation.registration
            write_transform(new / "transform", found.linear, found.field, segmentation.grid, found.local)
            write_further_fits(new / "transform", found.others, segmentation.grid)
        _write_json(run, new / RUN)
        _write_json(ended, new / STATUS)
    return run | ended


def write_failure(folder: Path, status: Mapping[str, Any]) -> None:
    """Leave nothing but ``status.json`` in a result folder: an earlier result would pass for one of today.

    Parameters
    ----------
    folder : Path
        The result folder. Its parent exists.
    status : mapping of str to Any
        Plain values.

    Raises
    ------
    InputError
        If the folder cannot be written or holds something else.
    """
    with replaced_folder(folder, RESULT_NAMES) as new, _disk_errors(folder):
        _write_json(status, new / STATUS)


def run_summary(segmentation: Segmentation, inputs: RunInputs) -> dict[str, Any]:
    """The content of ``run.json``: nothing that differs from one time to the next."""
    summary = segmentation.summary()
    settings = to_dict(segmentation.settings)
    settings["model_path"] = Path(settings["model_path"]).name
    del summary["seconds"], summary["registration"]["seconds"]
    return {
        "inputs": inputs.summary(),
        **summary,
        "settings": settings,
        "versions": {
            "atlassegfm": version(),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "scipy", "torch")},
        },
    }


def cost_summary(segmentation: Segmentation) -> dict[str, Any]:
    """What ``status.json`` says of time and memory."""
    summary = segmentation.summary()
    return {
        "seconds": summary["seconds"],
        "registration_seconds": summary["registration"]["seconds"],
        "total_seconds": round(sum(segmentation.seconds.values()), 3),
        "peak_memory_mb": peak_memory_mb(),
    }


def version() -> str:
    """Version of this package."""
    from ..core.version import __version__

    return __version__


def _save_dicom(segmentation: Segmentation, inputs: RunInputs, path: Path, form: str) -> dict[str, Any]:
    """Write an RTSTRUCT or DICOM-SEG, read it back, and say how it came out."""
    series, structures = series_of(inputs.query), inputs.context.structures
    if series is None:
        raise ValueError("the query is no DICOM series")
    provenance = _provenance(segmentation)
    if form == "rtstruct":
        maps = {value: (segmentation.grid, one.fused) for value, one in segmentation.probabilities.items()}
        write_rtstruct(path, segmentation.labels, structures, series, provenance, maps)
    elif segmentation.labels.data.any():
        write_segmentation(path, segmentation.labels, structures, series, provenance)
    else:
        logger.warning("no DICOM-SEG is written: nothing was found, and it cannot be empty")
        return {"file": None, "reason": "nothing was found, and a DICOM-SEG cannot be empty"}
    found = check_round_trip(path, segmentation.labels, structures, series)
    return {"file": path.name, "round_trip": [one.to_dict() for one in found]}


def _provenance(segmentation: Segmentation) -> Provenance:
    """What DICOM objects say of a result: the verdict on each structure, and when and how it was made."""
    present = sum(one.status == "present" for one in segmentation.structures)
    descriptions = {}
    for one in segmentation.structures:
        text = f"{one.status}: {one.reason}" if one.reason else one.status
        if one.quality is not None and one.status == "present":
            text = f"{one.quality.verdict}: {one.quality.reason}"
        if one.round_trip_dice is not None and np.isfinite(one.round_trip_dice):
            text += f", round trip Dice {one.round_trip_dice:.2f}"
        descriptions[one.structure.value] = text
    epoch = os.environ.get(_EPOCH_VARIABLE, "")
    when = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now().astimezone()
    return Provenance(
        segmentation.settings.model,
        f"{segmentation.verdict}: {present} of {len(segmentation.structures)} structures found",
        descriptions,
        when,
    )


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_probabilities(segmentation: Segmentation, path: Path) -> None:
    """(I, J, K, structures) uint8 with scale 1/255: a quarter of float32, and no tool needs more."""
    import nibabel as nib

    stored = segmentation.labels.grid
    data = np.zeros((*stored.shape, len(segmentation.structures)), np.uint8)
    for position, result in enumerate(segmentation.structures):
        maps = segmentation.probabilities.get(result.structure.value)
        if maps is not None:
            full = np.rint(maps.fused.to_full(segmentation.grid.shape) * 255).astype(np.uint8)
            data[..., position] = Volume(full, segmentation.grid).turned_to(stored).data
    image = nib.Nifti1Image(data, stored.affine)
    image.header.set_xyzt_units("mm")
    # nibabel takes a slope for a wish to be rescaled; set on the header it scales what it is given.
    image.header.set_slope_inter(1 / 255, 0)
    nib.save(image, path)
