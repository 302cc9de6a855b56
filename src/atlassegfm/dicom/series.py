"""DICOM series as scans: list the series of a folder, choose one, read its slices as a volume.

How slices are ordered and checked is in :mod:`.stack`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.files import entries_of
from ..core.geometry import Grid
from ..core.image import Source, Volume
from ..core.labels import listed, plain_name
from .files import decode_pixels, element_errors, frame_count, is_dicom, read_dataset, read_header, text_of, value_of
from .stack import VOLUME_KEYS, Frame, as_number, frames_of, has_image_type, pick_volume, stack_frames

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

#: Modalities with slices and one value a voxel.
MODALITIES = ("CT", "MR", "PT")
#: Modalities of DICOM objects that are no images.
_NO_IMAGES = ("RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "SR", "REG", "PR", "KO", "DOC", "RWV", "FID", "PLAN")
_HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"),
    *("Modality", "SeriesNumber", "SeriesDescription", "InstanceNumber", "Rows", "Columns", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
    *("BitsStored", "PixelRepresentation", "PhotometricInterpretation", "ModalityLUTSequence", "SamplesPerPixel"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *VOLUME_KEYS,
)


@dataclass(frozen=True, eq=False)
class Series:
    """An image series whose slices form one stack; its identifiers are to compare and copy, never to show."""

    folder: Path  # as the user named it
    uid: str = field(repr=False)
    study_uid: str = field(repr=False)  # identifiers are empty where the files have none
    frame_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str  # one of MODALITIES
    number: str
    description: str = field(repr=False)
    frames: tuple[Frame, ...] = field(repr=False)  # in the order of k
    grid: Grid  # i along rows, j down columns, k along the slices' normal

    def header(self) -> Dataset:
        """Read the header of the first slice, everything but its pixels."""
        return read_header(self.frames[0].path)


@dataclass(frozen=True, eq=False)
class DicomSource(Source):
    """Where a volume came from, and the series that results are written onto (None: not from a series)."""

    series: Series | None = None


def series_of(volume: Volume) -> Series | None:
    """Get the series a volume was read from; None if it was not."""
    return volume.source.series if isinstance(volume.source, DicomSource) else None


def is_series_folder(path: Path) -> bool:
    """Check whether a folder directly holds DICOM files, or files named ``.dcm``."""
    return path.is_dir() and any(file.suffix.lower() == ".dcm" or is_dicom(file) for file in _files_of(path))


def load_series(folder: Path, choice: str | None = None, *, as_float: bool = False) -> Volume:
    """Read a series of a folder as a scan, in HU for CT, in stored units otherwise; its source is a DicomSource.

    ``choice`` is which series, where there are several: its number, part of its description, or its UID (or "..." and
    its end); "3#2" is the second volume of series 3. Values are integers where all slices are rescaled by whole
    numbers, unless ``as_float``, else float32. InputError if no series of slices is there, or several and none was
    chosen; if slices do not form one even stack, or files are damaged or cannot be decoded.
    """
    series, notes = find_series(folder, choice)
    for note in notes:
        logger.warning("%s: %s", folder, note)
    return Volume(_read_voxels(series, as_float), series.grid, DicomSource(folder, notes=notes, series=series))


def find_series(folder: Path, choice: str | None = None) -> tuple[Series, tuple[str, ...]]:
    """Find the series that :func:`load_series` reads, without its pixels, and warnings; raises the same errors."""
    candidates = _scan_folder(folder)
    wanted, volume = _split_choice(choice)
    chosen = _choose(candidates, wanted, folder)
    header = chosen.header
    if chosen.modality not in MODALITIES:
        raise InputError(f"{folder}: series {chosen.describe()} is no scan; expected {', '.join(MODALITIES)}")
    frames, notes = frames_of(chosen.files, folder)
    frames, volume_notes = pick_volume(frames, folder, volume, wanted)
    frames, grid, stack_notes = stack_frames(frames, folder)
    frame_uids = {text_of(one, "FrameOfReferenceUID") for _, one in chosen.files}
    if len(frame_uids) > 1:
        raise InputError(f"{folder}: the slices are in {len(frame_uids)} frames of reference; export those of one scan")
    series = Series(
        folder,
        chosen.uid,
        text_of(header, "StudyInstanceUID"),
        frame_uids.pop(),
        text_of(header, "PatientID"),
        chosen.modality,
        chosen.number,
        chosen.description,
        tuple(frames),
        grid,
    )
    return series, (*notes, *volume_notes, *stack_notes)


@dataclass(eq=False)
class _Candidate:
    """The files of one series, and the header of one of them."""

    uid: str
    header: Dataset
    files: list[tuple[Path, Dataset]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modality, self.number, self.description = (
            text_of(self.header, keyword) for keyword in ("Modality", "SeriesNumber", "SeriesDescription")
        )

    @property
    def images(self) -> int:
        return sum(frame_count(header) for _, header in self.files)

    @property
    def is_localiser(self) -> bool:
        return all(has_image_type(header, "LOCALIZER") for _, header in self.files)

    @property
    def is_scan(self) -> bool:
        """Whether it may be a stack of slices."""
        return self.modality in MODALITIES and self.images > 1 and not self.is_localiser

    def describe(self) -> str:
        kind = "localiser" if self.is_localiser else self.modality or "no modality"
        parts = [kind, *([repr(self.description)] if self.description else []), f"{self.images} images"]
        return f"{self.number or 'no number'} ({', '.join(parts)})"


def _files_of(folder: Path) -> list[Path]:
    return [path for path in entries_of(folder) if path.is_file() and path.name.upper() != "DICOMDIR"]


def _scan_folder(folder: Path) -> list[_Candidate]:
    """List the image series of a folder in the order of their numbers."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; check the path")
    if not folder.is_dir():
        raise InputError(f"{folder}: a file; expected the folder of a DICOM series")
    found: dict[str, _Candidate] = {}
    any_dicom = False
    for path in _files_of(folder):
        # Exports hold viewers and text files as well; a file named .dcm must be DICOM.
        if not is_dicom(path) and path.suffix.lower() != ".dcm":
            continue
        header = read_header(path, _HEADER)
        any_dicom = True
        uid, modality = text_of(header, "SeriesInstanceUID"), text_of(header, "Modality")
        if not uid or not text_of(header, "SOPInstanceUID"):
            raise InputError(f"{path}: the header ends before the series is named: copy or export the file again")
        if modality in _NO_IMAGES:
            continue
        if "Rows" not in header and modality in MODALITIES:
            raise InputError(f"{path}: no image size: truncated or no image; export it again, or take it out")
        found.setdefault(uid, _Candidate(uid, header)).files.append((path, header))
    if not any_dicom:
        raise InputError(f"{folder}: no DICOM file in this folder; expected the files of a series")
    if not found:
        raise InputError(f"{folder}: no image series in this folder, only other DICOM objects; give that of the scan")
    return sorted(found.values(), key=lambda one: (as_number(one.number), one.description, one.uid))


def _split_choice(choice: str | None) -> tuple[str, int | None]:
    """Split "3#2" into series "3" and volume 2."""
    whole = (choice or "").strip()
    wanted, mark, volume = whole.rpartition("#")
    if not mark or not volume.isdecimal() or int(volume) < 1:
        return whole, None  # a description may hold the sign
    return wanted.strip(), int(volume)


def _choose(candidates: Sequence[_Candidate], wanted: str, folder: Path) -> _Candidate:
    if not wanted:
        scans = [one for one in candidates if one.is_scan]
        if len(scans) == 1:
            return scans[0]
        if not scans:
            wanted = f"a series of at least two slices ({', '.join(MODALITIES)})"
            raise InputError(f"{folder}: expected {wanted} in this folder, found {_listing(candidates)}")
        raise InputError(f"{folder}: {len(scans)} series in this folder; pick one with --series: {_listing(scans)}")
    tests = (
        lambda one: wanted == one.uid,
        lambda one: wanted == one.number,
        lambda one: wanted.startswith("...") and one.uid.endswith(wanted[3:]),
        lambda one: plain_name(wanted) == plain_name(one.description),
        lambda one: plain_name(wanted) in plain_name(one.description),
    )
    for test in tests:
        fitting = [one for one in candidates if test(one)]
        # A localiser often has the number or name of its scan.
        fitting = [one for one in fitting if one.is_scan] or fitting
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            found = f"{len(fitting)} series fit --series {wanted}: {_listing(fitting)}"
            raise InputError(f"{folder}: {found}; give a UID, number or description that only one has")
    raise InputError(f"{folder}: no series {wanted!r} in this folder; it holds {_listing(candidates)}")


def _listing(candidates: Sequence[_Candidate]) -> str:
    names = [one.describe() for one in candidates]
    count = Counter(names)  # where nothing else differs, the end of the UID is added
    return listed([f"{n} ...{one.uid[-8:]}" if count[n] > 1 else n for n, one in zip(names, candidates, strict=True)])


def _read_voxels(series: Series, as_float: bool) -> NDArray[Any]:
    """Read the rescaled values, (I, J, K)."""
    with element_errors(series.frames[0].path):
        kind = np.dtype(np.float32) if as_float else np.dtype(_value_type(series))
    out = np.empty((len(series.frames), *series.frames[0].shape), kind)
    path, pixels = None, np.zeros((0, 0, 0))
    for k, frame in enumerate(series.frames):
        if frame.path != path:
            with element_errors(frame.path):
                path, pixels = frame.path, decode_pixels(read_dataset(frame.path), frame.path)
        with np.errstate(all="ignore"):
            out[k] = pixels[frame.number] * frame.slope + frame.intercept
    return out.transpose(2, 1, 0)


def _value_type(series: Series) -> np.dtype[Any]:
    """Choose int16 or int32 if it holds all rescaled values and these are whole, else float32."""
    header = series.header()
    bits, signed = int(value_of(header, "BitsStored") or 16), bool(value_of(header, "PixelRepresentation"))
    lowest = -(1 << bits - 1) if signed else 0
    ends = [frame.slope * n + frame.intercept for frame in series.frames for n in (lowest, lowest + (1 << bits) - 1)]
    if all(float(n).is_integer() for frame in series.frames for n in (frame.slope, frame.intercept)):
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max:
                return np.dtype(kind)
    return np.dtype(np.float32)
