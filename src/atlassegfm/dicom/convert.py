"""Labels from one file format to another: image files, RTSTRUCT, DICOM-SEG, a mask for each structure."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from ..core.files import atomic_path, replaced_folder
from ..core.image import Volume, load_volume, save_masks, save_volume
from ..core.labels import LabelTable, Structure, dataset_json_of, file_names, read_names_file
from .files import require_dicom_extra
from .identity import Provenance
from .opening import is_dicom_input, open_labels
from .roundtrip import check_round_trip
from .rtstruct import write_rtstruct
from .seg import write_segmentation
from .series import is_series_folder, load_series, series_of
from .structures import EVERYTHING, Selection, with_structures

#: What labels can be written as.
FORMS = ("image", "masks", "rtstruct", "seg")


@dataclass(frozen=True)
class Conversion:
    """What to write, and from what."""

    to: str = "image"  # one of FORMS
    onto: Path | None = None  # the scan the labels lie on; RTSTRUCT and DICOM-SEG are read and written for its series
    series: str | None = None  # which series of that folder
    names: Path | None = None  # names of the label values
    selection: Selection = field(default_factory=Selection)  # which structures, and what they are called


def convert_labels(
    labels: str | os.PathLike[str], out: str | os.PathLike[str], conversion: Conversion = Conversion()
) -> dict[str, Any]:
    """Convert a file of labels, and give paths, and value, name and number of voxels of each structure.

    Of DICOM, also the comparison after reading it back. InputError if a file cannot be used, labels and scan do not
    share their voxels, or RTSTRUCT or DICOM-SEG is wanted without the series it belongs to; OutputError if what was
    written does not read back the same.
    """
    labels, out = Path(labels), Path(out)
    tables: list[LabelTable] = [] if conversion.names is None else [read_names_file(conversion.names)]
    scan = None if conversion.onto is None else _scan(conversion.onto, conversion.series)
    volume = open_labels(labels, scan, conversion.selection)
    if volume.source is not None:
        tables.append(volume.source.label_table)
    dataset = dataset_json_of(labels)
    if dataset is not None and not is_dicom_input(labels):
        tables.append(read_names_file(dataset))
    chosen = EVERYTHING if is_dicom_input(labels) else conversion.selection
    volume, structures = with_structures(volume, tables, chosen, str(labels))
    if scan is not None:
        if volume.grid.axes_relative_to(scan.grid) is None:
            raise InputError(
                f"{labels}: not on the voxels of {conversion.onto}; resample the labels onto it with nearest neighbour"
            )
        volume = volume.turned_to(scan.grid)
    if conversion.to in ("rtstruct", "seg"):
        comparison = _write_dicom(volume, structures, scan, out, conversion)
    else:
        comparison = None
        if conversion.to == "masks":
            with replaced_folder(out, frozenset(f"{name}.nii.gz" for name in file_names(structures))) as temporary:
                save_masks(volume, structures, temporary)
        else:
            save_volume(volume, out, structures=structures)
    counts = np.bincount(np.searchsorted([one.value for one in structures], volume.data[volume.data > 0]))
    return {
        "labels": str(labels),
        "output": str(out),
        "structures": [
            {"value": one.value, "name": one.name, "voxels": int(count)}
            for one, count in zip(structures, counts, strict=True)
        ],
        "round_trip": comparison,
    }


def _scan(path: Path, series: str | None) -> Volume:
    """The scan as stored: only its geometry and headers are used."""
    return load_series(path, series) if is_series_folder(path) else load_volume(path)


def _write_dicom(
    volume: Volume, structures: Sequence[Structure], scan: Volume | None, out: Path, conversion: Conversion
) -> list[dict[str, Any]]:
    require_dicom_extra()
    series = None if scan is None else series_of(scan)
    if series is None:
        raise InputError(
            f"{out}: {conversion.to} is written for a DICOM series (patient, study and frame of reference are copied "
            "from it); give its folder with --onto"
        )
    write = write_rtstruct if conversion.to == "rtstruct" else write_segmentation
    with atomic_path(out) as temporary:
        write(temporary, volume, structures, series, Provenance(model="converted"))
        return [one.to_dict() for one in check_round_trip(temporary, volume, structures, series)]
