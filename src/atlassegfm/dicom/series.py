"""Series of images as scans: which files belong together, in which order, and where their voxels are.

The order and the geometry of slices come from their positions and orientations alone, never from file names or image
numbers. Slices that are shifted against each other evenly (a tilted gantry) keep that as a sheared affine. What is
not one evenly spaced stack is refused, with the sentence that says why: a slice that is filled in or left out by
guess would move everything above it.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.geometry import Grid
from ..core.image import Source, Volume
from ..core.labels import listed, plain_name
from .files import LPS_TO_RAS, decode_pixels, is_dicom, numbers_of, read_dataset, read_header, text_of, value_of

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

#: Scans this program is for. Others have no slices (X-ray), no single value a voxel, or are no images.
MODALITIES = ("CT", "MR", "PT")
#: Slices nearer than this are at one place, mm: no scanner makes slices so thin.
_SAME_PLACE_MM = 0.01
#: Direction cosines that differ by less are one orientation: they are stored with 6 decimals, sometimes with 4.
_SAME_DIRECTION = 1e-3
#: A slice may lie off its place in the even stack by this share of the slice distance (or of the pixel spacing,
#: sideways): the same tenth of a voxel up to which grids count as one. Rounded positions stay below a hundredth.
_OFF_PLACE = 0.1
#: From this share on it is told.
_OFF_PLACE_TOLD = 0.01
#: A distance that is a whole multiple of the usual one to within this share is a gap of missing slices.
_WHOLE_MULTIPLE = 0.1
#: Elements that tell the volumes of a 4-D series apart, the most telling first.
_VOLUME_MARKS = (
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "DiffusionBValue", "EchoNumbers", "EchoTime"),
    *("TriggerTime", "NominalPercentageOfCardiacPhase", "AcquisitionNumber", "AcquisitionTime", "ImageType"),
    *("ContentTime", "SeriesTime"),
)
_HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"),
    *("Modality", "SeriesNumber", "SeriesDescription", "InstanceNumber", "Rows", "Columns", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
    *("BitsStored", "PixelRepresentation", "PhotometricInterpretation", "ModalityLUTSequence", "SamplesPerPixel"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *_VOLUME_MARKS,
)
#: Storage classes of images end in a number below this root; the rest (RTSTRUCT, SEG, reports) are no images.
_NO_IMAGES = ("RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "SR", "REG", "PR", "KO", "DOC", "RWV", "FID", "PLAN")


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: a file, or one frame of a multi-frame file.

    Parameters
    ----------
    path : Path
        The file.
    number : int
        Which frame of it, from 0.
    uid, class_uid : str
        SOP instance and class.
    position_mm : array, (3,)
        Centre of the first pixel, LPS.
    orientation : array, (6,)
        Unit vectors along rows and columns, LPS.
    spacing_mm : array, (2,)
        Between rows (downwards), between columns (along a row): the order of PixelSpacing.
    shape : tuple of int, (2,)
        Rows, columns.
    slope, intercept : float
        Stored value to unit (HU, Bq/ml, ...).
    is_localiser : bool
        Whether it is a scout image and no slice.
    marks : mapping of str to str
        What may tell volumes of a 4-D series apart.
    """

    path: Path
    number: int
    uid: str
    class_uid: str
    position_mm: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing_mm: NDArray[np.float64]
    shape: tuple[int, int]
    slope: float
    intercept: float
    is_localiser: bool
    marks: Mapping[str, str]

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3,) unit normal of the slice, LPS."""
        return np.asarray(np.cross(self.orientation[:3], self.orientation[3:]))


@dataclass(frozen=True, eq=False)
class Series:
    """An image series whose slices form one stack.

    Parameters
    ----------
    folder : Path
        As the user named it.
    uid, study_uid, frame_uid, patient_id : str
        Identifiers, to be compared and copied, not to be shown. Empty where the files have none.
    modality : str
        "CT", "MR" or "PT".
    number, description : str
        As stored.
    frames : tuple of Frame
        In the order of k.
    grid : Grid
        i along rows, j down columns, k along the slices' normal.
    """

    folder: Path
    uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    frame_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    number: str
    description: str = field(repr=False)
    frames: tuple[Frame, ...] = field(repr=False)
    grid: Grid

    def header(self) -> Dataset:
        """The header of the first slice, everything but its pixels."""
        return read_header(self.frames[0].path)


@dataclass(frozen=True, eq=False)
class DicomSource(Source):
    """Where a volume came from, if that is a DICOM series.

    Parameters
    ----------
    series : Series or None
        The series; results are written onto it.
    """

    series: Series | None = None


def series_of(volume: Volume) -> Series | None:
    """The series a volume was read from; None if it was not."""
    return volume.source.series if isinstance(volume.source, DicomSource) else None


def is_series_folder(path: Path) -> bool:
    """Whether a folder has DICOM files directly in it, or files that call themselves so."""
    if not path.is_dir():
        return False
    return any(file.suffix.lower() == ".dcm" or is_dicom(file) for file in _files_of(path))


def load_series(folder: Path, choice: str | None = None, *, as_float: bool = False) -> Volume:
    """Read a series as a scan.

    Parameters
    ----------
    folder : Path
        Folder with the files of one or several series, in any order and of any names.
    choice : str, optional
        Which series: its number, a part of its description, or its UID (or "..." and its end). "#2" behind it is
        the second volume of a series with several. Needed where there are several.
    as_float : bool
        Whether to give float32 in any case.

    Returns
    -------
    Volume
        Integers where all slices are rescaled by whole numbers, else float32: HU for CT, stored units else. Its
        source is a :class:`DicomSource`.

    Raises
    ------
    InputError
        If there is no series of slices or several and none was chosen, if the slices do not form one even stack, or
        if files are damaged or cannot be decoded.
    """
    series, notes = find_series(folder, choice)
    for note in notes:
        logger.warning("%s: %s", folder, note)
    data = _read_voxels(series, as_float)
    return Volume(data, series.grid, DicomSource(folder, notes=notes, series=series))


def find_series(folder: Path, choice: str | None = None) -> tuple[Series, tuple[str, ...]]:
    """The series :func:`load_series` reads, without its pixels, and notes for the user.

    Raises
    ------
    InputError
        As :func:`load_series`.
    """
    candidates = _scan_folder(folder)
    wanted, volume = _split_choice(choice)
    found = _chosen(candidates, wanted, folder)
    return found.stacked(folder, volume, wanted)


@dataclass(eq=False)
class _Candidate:
    """The files of one series, before anything is known of its geometry."""

    uid: str
    header: Dataset
    files: list[tuple[Path, Dataset]] = field(default_factory=list)

    @property
    def modality(self) -> str:
        return text_of(self.header, "Modality")

    @property
    def number(self) -> str:
        return text_of(self.header, "SeriesNumber")

    @property
    def description(self) -> str:
        return text_of(self.header, "SeriesDescription")

    @property
    def is_scan(self) -> bool:
        """Whether it may be a stack of slices: more than one image, and not localisers alone."""
        images = sum(int(value_of(header, "NumberOfFrames") or 1) for _, header in self.files)
        return self.modality in MODALITIES and images > 1 and not all(_is_localiser(one) for _, one in self.files)

    def named(self) -> str:
        images = sum(int(value_of(header, "NumberOfFrames") or 1) for _, header in self.files)
        kind = "localiser" if all(_is_localiser(header) for _, header in self.files) else self.modality or "no modality"
        parts = [kind, *([repr(self.description)] if self.description else []), f"{images} images"]
        return f"{self.number or 'no number'} ({', '.join(parts)})"

    def stacked(self, folder: Path, volume: int | None, wanted: str) -> tuple[Series, tuple[str, ...]]:
        if self.modality not in MODALITIES:
            raise InputError(
                f"{folder}: series {self.named()} is no scan this program reads; expected {', '.join(MODALITIES)}"
            )
        frames, notes = _frames_of(self.files, folder)
        frames, more = _one_volume(frames, folder, volume, wanted)
        frames, grid, last = _stack(frames, folder)
        frame_uids = {text_of(header, "FrameOfReferenceUID") for _, header in self.files}
        if len(frame_uids) > 1:
            raise InputError(
                f"{folder}: the slices belong to {len(frame_uids)} frames of reference; expected one: export one "
                "acquisition"
            )
        series = Series(
            folder,
            self.uid,
            text_of(self.header, "StudyInstanceUID"),
            frame_uids.pop(),
            text_of(self.header, "PatientID"),
            self.modality,
            self.number,
            self.description,
            tuple(frames),
            grid,
        )
        return series, (*notes, *more, *last)


def _files_of(folder: Path) -> list[Path]:
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.name.upper() != "DICOMDIR"
        )
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); check the permissions") from None


def _scan_folder(folder: Path) -> list[_Candidate]:
    """Image series of a folder, in the order of their numbers."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; check the path")
    if not folder.is_dir():
        raise InputError(f"{folder}: a file; expected the folder of a DICOM series")
    found: dict[str, _Candidate] = {}
    any_dicom = False
    for path in _files_of(folder):
        # Exports hold viewers and text files as well; a file that calls itself DICOM must be one.
        if not is_dicom(path) and path.suffix.lower() != ".dcm":
            continue
        header = read_header(path, _HEADER)
        any_dicom = True
        uid = text_of(header, "SeriesInstanceUID")
        if not uid or not text_of(header, "SOPInstanceUID"):
            raise InputError(f"{path}: the header ends before the series is named: copy or export the file again")
        if text_of(header, "Modality") in _NO_IMAGES:
            continue
        if "Rows" not in header and text_of(header, "Modality") in MODALITIES:
            raise InputError(
                f"{path}: the header has no image size: the file is truncated or no image; copy or export it again, or "
                "take it out of the folder"
            )
        found.setdefault(uid, _Candidate(uid, header)).files.append((path, header))
    if not any_dicom:
        raise InputError(f"{folder}: no DICOM file in this folder; expected the files of a series")
    if not found:
        raise InputError(f"{folder}: no image series in this folder, only other DICOM objects; give that of the scan")
    return sorted(found.values(), key=lambda one: (_as_number(one.number), one.description, one.uid))


def _split_choice(choice: str | None) -> tuple[str, int | None]:
    """Series and volume of what the user chose: "3#2" is the second volume of series 3."""
    wanted, mark, volume = (choice or "").strip().rpartition("#")
    if not mark:
        return volume, None
    if not volume.isdecimal() or int(volume) < 1:
        return (choice or "").strip(), None  # a description may hold the sign
    return wanted.strip(), int(volume)


def _chosen(candidates: Sequence[_Candidate], wanted: str, folder: Path) -> _Candidate:
    if not wanted:
        scans = [one for one in candidates if one.is_scan]
        if len(scans) == 1:
            return scans[0]
        if not scans:
            raise InputError(
                f"{folder}: no series of slices in this folder, only {_listing(candidates)}; expected at least two "
                f"slices of {' or '.join(MODALITIES)}"
            )
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
            raise InputError(
                f"{folder}: {len(fitting)} series fit --series {wanted}: {_listing(fitting)}; give one of their UIDs, "
                "or what is different about them"
            )
    raise InputError(f"{folder}: no series {wanted!r} in this folder; it holds {_listing(candidates)}")


def _listing(candidates: Sequence[_Candidate]) -> str:
    names = [one.named() for one in candidates]
    twice = {name for name, count in Counter(names).items() if count > 1}
    # The end of a UID tells series apart that nothing else does.
    return listed([f"{n} ...{one.uid[-8:]}" if n in twice else n for n, one in zip(names, candidates, strict=True)])


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def _is_localiser(header: Dataset) -> bool:
    kinds = value_of(header, "ImageType")
    return kinds is not None and any(str(one).upper() == "LOCALIZER" for one in np.atleast_1d(kinds))


def _frames_of(files: Iterable[tuple[Path, Dataset]], folder: Path) -> tuple[list[Frame], list[str]]:
    """All slices of the files, copies and localisers left out, and what is to be told of that."""
    frames: list[Frame] = []
    notes = []
    seen: dict[str, str] = {}
    kept: set[str] = set()
    copies = 0
    for path, header in files:
        uid, position = text_of(header, "SOPInstanceUID"), text_of(header, "ImagePositionPatient")
        if seen.setdefault(uid, position) != position:
            raise InputError(
                f"{path}: has the instance UID of an image at another position, so that images cannot be told apart (a "
                "tool that removes names may have done that); export the original series"
            )
        if uid in kept:
            copies += 1
            continue
        kept.add(uid)
        if int(value_of(header, "SamplesPerPixel") or 1) != 1:
            raise InputError(f"{path}: the image is in colour; expected one value a pixel: give the series of the scan")
        if "MOSAIC" in (str(kind).upper() for kind in np.atleast_1d(value_of(header, "ImageType") or ())):
            raise InputError(
                f"{path}: a mosaic (all slices of a volume tiled into one image), which is not supported; convert it "
                "with dcm2niix, or export enhanced multi-frame"
            )
        if "ModalityLUTSequence" in header:
            raise InputError(
                f"{path}: the values go through a table (Modality LUT), which is not supported; export the series with "
                "a rescale slope and intercept"
            )
        frames += _frames_in(path, header, uid)
    if copies:
        notes.append(f"{copies} {'file is a copy' if copies == 1 else 'files are copies'} of others and left out")
    slices = [frame for frame in frames if not frame.is_localiser]
    if slices and len(slices) < len(frames):
        notes.append(f"{len(frames) - len(slices)} localiser images are left out")
        frames = slices
    if len(frames) < 2:
        raise InputError(f"{folder}: the series has one slice only; expected at least two")
    if any(text_of(header, "PhotometricInterpretation") == "MONOCHROME1" for _, header in files):
        notes.append("the images are stored to be shown inverted (MONOCHROME1); the values are taken as they are")
    return frames, notes


def _frames_in(path: Path, header: Dataset, uid: str) -> list[Frame]:
    count = int(value_of(header, "NumberOfFrames") or 1)
    per_frame = value_of(header, "PerFrameFunctionalGroupsSequence")
    shared = value_of(header, "SharedFunctionalGroupsSequence")
    if count > 1 and (per_frame is None or len(per_frame) != count):
        raise InputError(
            f"{path}: a multi-frame file of {count} images that does not say where each of them lies; export the scan "
            "as one file a slice, or as enhanced multi-frame"
        )
    frames = []
    for number in range(count):
        groups = [header]
        groups += [sequence[0] for sequence in (shared,) if sequence]
        groups += [] if per_frame is None else [per_frame[number]]
        position = _needed(groups, "PlanePositionSequence", "ImagePositionPatient", 3, path)
        orientation = _needed(groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6, path)
        spacing = _needed(groups, "PixelMeasuresSequence", "PixelSpacing", 2, path)
        if (spacing <= 0).any():
            raise InputError(f"{path}: the pixel spacing is {spacing.tolist()} mm; expected two numbers above 0")
        lengths = np.linalg.norm(orientation.reshape(2, 3), axis=1)
        if not np.allclose(lengths, 1, atol=1e-2) or abs(orientation[:3] @ orientation[3:]) > 1e-2:
            raise InputError(
                f"{path}: the image orientation is not two unit vectors at right angles; export the series again"
            )
        slope = _in_groups(groups, "PixelValueTransformationSequence", "RescaleSlope", 1)
        intercept = _in_groups(groups, "PixelValueTransformationSequence", "RescaleIntercept", 1)
        frames.append(
            Frame(
                path,
                number,
                uid,
                text_of(header, "SOPClassUID"),
                position,
                orientation,
                spacing,
                (int(header.Rows), int(header.Columns)),
                1.0 if slope is None else float(slope[0]),
                0.0 if intercept is None else float(intercept[0]),
                _is_localiser(header),
                {"InstanceNumber": text_of(header, "InstanceNumber"), **_marks(groups)},
            )
        )
    return frames


def _in_groups(groups: Sequence[Dataset], sequence: str, keyword: str, count: int) -> NDArray[np.float64] | None:
    """Numbers of an element: of the frame's own group, else the shared one, else the header itself."""
    for group in reversed(groups):
        inner = value_of(group, sequence)
        for dataset in ([inner[0]] if inner else []) + [group]:
            numbers = numbers_of(dataset, keyword, count)
            if numbers is not None:
                return numbers
    return None


def _needed(groups: Sequence[Dataset], sequence: str, keyword: str, count: int, path: Path) -> NDArray[np.float64]:
    numbers = _in_groups(groups, sequence, keyword, count)
    if numbers is None:
        raise InputError(
            f"{path}: the image has no usable {keyword}, so that its place is not known; export the original series, "
            "not a copy for viewing"
        )
    return numbers


def _marks(groups: Sequence[Dataset]) -> dict[str, str]:
    marks = {}
    for group in groups:
        inner = [group]
        for sequence in (
            "FrameContentSequence",
            "MREchoSequence",
            "MRDiffusionSequence",
            "CardiacSynchronizationSequence",
        ):
            found = value_of(group, sequence)
            inner += [found[0]] if found else []
        for dataset in inner:
            for keyword in _VOLUME_MARKS:
                text = text_of(dataset, keyword)
                if text:
                    marks[keyword] = text
    return marks


def _places(frames: Sequence[Frame]) -> list[list[Frame]]:
    """The frames of each place along the slices' normal, in ascending order."""
    normal = frames[0].normal
    along = np.array([frame.position_mm @ normal for frame in frames])
    order = np.argsort(along, kind="stable")
    places: list[list[Frame]] = [[frames[order[0]]]]
    for before, here in itertools.pairwise(order):
        if along[here] - along[before] > _SAME_PLACE_MM:
            places.append([])
        places[-1].append(frames[here])
    return places


def _one_volume(
    frames: list[Frame], folder: Path, volume: int | None, wanted: str
) -> tuple[list[Frame], tuple[str, ...]]:
    """The slices of one volume, where there are several at the same places."""
    _check_alike(frames, folder)
    places = _places(frames)
    counts = {len(place) for place in places}
    if counts == {1}:
        if volume is not None and volume != 1:
            raise InputError(f"{folder}: --series asks for volume {volume}, but the series has one volume only")
        return frames, ()
    if len(counts) > 1:
        most = Counter(len(place) for place in places).most_common(1)[0][0]
        odd = [place for place in places if len(place) != most]
        where = listed([f"{place[0].position_mm @ place[0].normal:.1f}" for place in odd], 5)
        raise InputError(
            f"{folder}: {len(odd)} of {len(places)} slice positions hold another number of images than the rest "
            f"({len(odd[0])} instead of {most}, at {where} mm): slices are double or missing; export the series again"
        )
    several = counts.pop()
    mark, groups = _split_volumes(frames, len(places), several)
    if not groups:
        raise InputError(
            f"{folder}: each slice position holds {several} images, and nothing tells which of them belong together; "
            "export one volume of the series alone"
        )
    if volume is None:
        values = [f"#{n} = {group[0].marks.get(mark, '')}" for n, group in enumerate(groups, start=1)]
        raise InputError(
            f"{folder}: the series holds {several} volumes at the same place, told apart by {mark} "
            f"({listed(values, 6)}); pick one with --series '{wanted}#1' to '{wanted}#{several}'"
        )
    if volume > several:
        raise InputError(f"{folder}: --series asks for volume {volume} of {several}; expected 1 to {several}")
    return groups[volume - 1], (f"volume {volume} of {several} of the series is taken ({mark})",)


def _split_volumes(frames: Sequence[Frame], places: int, several: int) -> tuple[str, list[list[Frame]]]:
    """The first element that sorts the frames into whole volumes, and these in its order; none where none does."""
    for mark in _VOLUME_MARKS:
        groups: dict[str, list[Frame]] = defaultdict(list)
        for frame in frames:
            groups[frame.marks.get(mark, "")].append(frame)
        if len(groups) == several and all(_is_whole(group, places) for group in groups.values()):
            return mark, [groups[key] for key in sorted(groups, key=lambda text: (_as_number(text), text))]
    ordered = sorted(frames, key=lambda frame: (_as_number(frame.marks["InstanceNumber"]), frame.number))
    blocks = [ordered[first : first + places] for first in range(0, len(ordered), places)]
    if all(_is_whole(block, places) for block in blocks):
        return "InstanceNumber", blocks
    return "", []


def _is_whole(frames: Sequence[Frame], places: int) -> bool:
    return len(frames) == places and len(_places(frames)) == places


def _check_alike(frames: Sequence[Frame], folder: Path) -> None:
    """Refuse images of several orientations, sizes or spacings."""
    groups: list[tuple[NDArray[np.float64], int]] = []
    for frame in frames:
        for n, (orientation, count) in enumerate(groups):
            if np.abs(frame.orientation - orientation).max() < _SAME_DIRECTION:
                groups[n] = (orientation, count + 1)
                break
        else:
            groups.append((frame.orientation, 1))
    if len(groups) > 1:
        kinds = listed([f"{count} {_plane(orientation)}" for orientation, count in groups], 6)
        raise InputError(
            f"{folder}: the images of the series have {len(groups)} orientations ({kinds}); expected parallel slices: "
            "export one stack alone"
        )
    shapes = Counter(frame.shape for frame in frames)
    if len(shapes) > 1:
        kinds = listed([f"{count} of {rows} x {columns}" for (rows, columns), count in shapes.items()], 6)
        raise InputError(f"{folder}: the images of the series have several sizes ({kinds}); export one stack alone")
    spacings = np.array([frame.spacing_mm for frame in frames])
    if np.ptp(spacings, axis=0).max() * max(frames[0].shape) > _OFF_PLACE * spacings.min():
        low, high = spacings.min(), spacings.max()
        raise InputError(
            f"{folder}: the images of the series have several pixel spacings ({low:g} to {high:g} mm); export one "
            "stack alone"
        )


def _plane(orientation: NDArray[np.float64]) -> str:
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    return ("sagittal", "coronal", "axial")[int(np.argmax(normal))]


def _stack(frames: Sequence[Frame], folder: Path) -> tuple[list[Frame], Grid, list[str]]:
    """Frames of different places in their order, the grid of their voxels, and what is to be told.

    Raises
    ------
    InputError
        If slices are missing or unevenly spaced.
    """
    normal = frames[0].normal
    ordered = sorted(frames, key=lambda frame: float(frame.position_mm @ normal))
    positions = np.array([frame.position_mm for frame in ordered])
    along = positions @ normal
    steps = np.diff(along)
    usual = float(np.median(steps))
    wide = steps / usual
    gaps = wide > 1.5
    if gaps.any() and (np.abs(wide - np.round(wide)) < _WHOLE_MULTIPLE).all():
        missing = int((np.round(wide[gaps]) - 1).sum())
        where = listed([f"{along[n]:.1f} and {along[n + 1]:.1f}" for n in np.flatnonzero(gaps)], 5)
        slices = "1 slice is" if missing == 1 else f"{missing} slices are"
        raise InputError(
            f"{folder}: {slices} missing: slices are {usual:.4g} mm apart, but there is none between {where} mm "
            "(along the scan); export the whole series again"
        )
    count = len(ordered)
    step = (positions[-1] - positions[0]) / (count - 1)
    off = positions - (positions[0] + np.arange(count)[:, None] * step)
    off_along = float(np.abs(off @ normal).max())
    if off_along > _OFF_PLACE * usual:
        raise InputError(
            f"{folder}: the slices are not evenly spaced: {steps.min():.4g} to {steps.max():.4g} mm apart; expected "
            "one distance: export a series with even slices"
        )
    sideways = float(np.linalg.norm(off - np.outer(off @ normal, normal), axis=1).max())
    if sideways > _OFF_PLACE * frames[0].spacing_mm.min():
        raise InputError(
            f"{folder}: the slices are shifted sideways against each other by up to {sideways:.3g} mm, and not "
            "evenly; expected one stack: export the original series"
        )
    notes = []
    if off_along > _OFF_PLACE_TOLD * usual:
        notes.append(
            f"slice positions are up to {off_along:.2g} mm off an even distance of {np.linalg.norm(step):.4g} mm, and "
            "taken as even"
        )
    first = ordered[0]
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[:3] * first.spacing_mm[1]
    affine[:3, 1] = first.orientation[3:] * first.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    try:
        grid = Grid((first.shape[1], first.shape[0], count), LPS_TO_RAS @ affine)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    return ordered, grid, notes


def _read_voxels(series: Series, as_float: bool) -> NDArray[Any]:
    """(I, J, K) rescaled values."""
    rows, columns = series.frames[0].shape
    whole = all(float(n).is_integer() for frame in series.frames for n in (frame.slope, frame.intercept))
    out: NDArray[Any] = np.empty((len(series.frames), 0, 0))
    path, pixels = None, np.zeros((0, 0, 0))
    for k, frame in enumerate(series.frames):
        if frame.path != path:
            dataset = read_dataset(frame.path)
            pixels, path = decode_pixels(dataset, frame.path), frame.path
            if not out.size:
                kind = np.dtype(np.float32) if as_float else _voxel_type(series, dataset, whole)
                out = np.empty((len(series.frames), rows, columns), kind)
        values = pixels[frame.number]
        if not whole:
            out[k] = values * frame.slope + frame.intercept
            continue
        # Integers wrap around and back: what fits at the end comes out right.
        out[k] = values
        if frame.slope != 1:
            out[k] *= out.dtype.type(frame.slope)
        if frame.intercept:
            out[k] += out.dtype.type(frame.intercept)
    return out.transpose(2, 1, 0)


def _voxel_type(series: Series, dataset: Dataset, whole: bool) -> np.dtype[Any]:
    """int16 or int32, whichever holds all rescaled values; float32 where they are fractions."""
    if not whole:
        return np.dtype(np.float32)
    bits = int(dataset.BitsStored)
    lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if dataset.PixelRepresentation else (0, (1 << bits) - 1)
    ends = [frame.slope * end + frame.intercept for frame in series.frames for end in (lowest, highest)]
    for candidate in (np.int16, np.int32):
        if np.iinfo(candidate).min <= min(ends) and max(ends) <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    return np.dtype(np.float32)
