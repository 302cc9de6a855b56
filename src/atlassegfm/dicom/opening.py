"""Open what a user names: an image file, the folder of a DICOM series, an RTSTRUCT or a DICOM-SEG."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from ..core.errors import InputError
from ..core.image import ImageLike, Volume, checked_image, image_suffix, load_image, load_labels
from .files import is_dicom, read_header, text_of
from .rtstruct import is_rtstruct, read_rtstruct
from .seg import is_segmentation, read_segmentation
from .series import MODALITIES, Series, is_series_folder, load_series, series_of
from .structures import EVERYTHING, Selection

logger = logging.getLogger(__name__)


def is_dicom_input(path: Path) -> bool:
    """Check whether a path is a folder of DICOM files, or a DICOM file."""
    return is_series_folder(path) or _is_dicom_file(path)


def modalities_in(files: Iterable[Path]) -> set[str]:
    """List modalities of DICOM files, up to the first that may be a slice of a scan; else InputError."""
    found = set()
    for file in files:
        found.add(text_of(read_header(file, ["Modality"]), "Modality"))
        if found & set(MODALITIES):
            break
    return found


def _is_dicom_file(path: Path) -> bool:
    return path.is_file() and image_suffix(path) is None and is_dicom(path)


def open_image(image: ImageLike, series: str | None = None) -> Volume:
    """Read an image file, a DICOM folder or an image in memory as float32 intensities; else InputError.

    ``series`` chooses one of a folder, as in :func:`~.series.load_series`.
    """
    if not isinstance(image, str | os.PathLike):
        return load_image(image)
    path = Path(image)
    if is_series_folder(path):
        return checked_image(load_series(path, series, as_float=True), path)
    if _is_dicom_file(path):
        raise InputError(f"{path}: a single DICOM file; give the folder of its series")
    if series is not None and path.is_file():
        raise InputError(f"{path}: --series chooses a series of a DICOM folder, and this is a file; leave it out")
    return load_image(path)


def open_labels(
    image: ImageLike,
    on: Volume | Series | None = None,
    selection: Selection = EVERYTHING,
    *,
    allow_empty: bool = False,
    warn: bool = True,
) -> Volume:
    """Read a label map from an image file, an RTSTRUCT, a DICOM-SEG or memory; InputError as their readers raise it.

    ``on`` is the scan it was drawn on, which an RTSTRUCT needs; patient and frame of reference are compared with a
    series. The selection is for RTSTRUCT and DICOM-SEG, an image file is read whole, and may be without any label with
    ``allow_empty``. With ``warn``, warnings about a DICOM file are logged.
    """
    if not isinstance(image, str | os.PathLike):
        return load_labels(image, allow_empty=allow_empty)
    path = Path(image)
    if not _is_dicom_file(path):
        if is_series_folder(path):
            raise InputError(f"{path}: a folder of DICOM files; expected one RTSTRUCT or DICOM-SEG file")
        if (selection.overlap, selection.interpolate) != (EVERYTHING.overlap, EVERYTHING.interpolate):
            raise InputError(f"{path}: a label map has no contours; leave out --overlap and --interpolate-slices")
        return load_labels(path, allow_empty=allow_empty)
    header = read_header(path, ["SOPClassUID", "Modality"])
    series = series_of(on) if isinstance(on, Volume) else on
    target = series or (on.grid if isinstance(on, Volume) else None)
    if is_segmentation(header):
        volume = read_segmentation(path, target, selection)
    elif not is_rtstruct(header):
        raise InputError(f"{path}: a DICOM image or another object; expected an RTSTRUCT or DICOM-SEG")
    elif target is None:
        raise InputError(f"{path}: an RTSTRUCT holds contours, no voxels; give the scan they were drawn on as well")
    else:
        volume = read_rtstruct(path, target, selection)
    notes = list(volume.source.notes) if volume.source else []
    if target is not None and series is None:
        notes.append("patient and frame of reference are not checked, as the scan is no DICOM series")
    for note in notes if warn else ():
        logger.warning("%s: %s", path, note)
    return volume
