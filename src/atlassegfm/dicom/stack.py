"""Slices and the one evenly spaced stack they form.

Order and geometry come from positions and orientations alone, never from file names or image numbers. An even shift
between slices (a tilted gantry) becomes a sheared affine. A slice filled in or dropped by guess would move everything
above it: stacks with missing, double or uneven slices are refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.geometry import LPS_FLIP, Grid
from ..core.labels import listed
from ..core.volume import grid_of
from .files import check_one_sample, element_errors, frame_count, group_numbers, items_of, text_of, value_of

if TYPE_CHECKING:
    from pydicom import Dataset

Vector = NDArray[np.float64]
#: Slices nearer than this are at one position, mm: below any slice distance of a scanner.
SAME_POSITION_MM = 0.01
#: Slices and grids may lie off by this fraction of a voxel: the tolerance of :meth:`.Grid.matches`.
OFF_VOXEL = 0.1
#: Direction cosines that differ by less are one orientation: some files store 4 decimals.
_SAME_DIRECTION = 1e-3
#: Deviations from even spacing above this fraction of the slice distance are reported; rounding stays below.
_OFF_REPORTED = 0.01
#: Distances within this fraction of a whole multiple of the usual one are gaps of missing slices.
_WHOLE_MULTIPLE = 0.1
#: Elements that distinguish the volumes of a 4-D series, the most specific first.
VOLUME_KEYS = (
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "DiffusionBValue", "EchoNumbers", "EchoTime"),
    *("TriggerTime", "NominalPercentageOfCardiacPhase", "AcquisitionNumber", "AcquisitionTime", "ImageType"),
    *("ContentTime", "SeriesTime"),
)
_KEY_SEQUENCES = ("FrameContentSequence", "MREchoSequence", "MRDiffusionSequence", "CardiacSynchronizationSequence")


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: a file, or one frame of a multi-frame file."""

    path: Path
    number: int  # of the frame in the file, from 0
    uid: str  # SOP instance
    class_uid: str  # SOP class
    position_mm: Vector  # (3,) centre of the first pixel, LPS
    orientation: Vector  # (6,) unit vectors along rows and columns, LPS
    spacing_mm: Vector  # (2,) between rows, between columns: the order of PixelSpacing
    shape: tuple[int, int]  # rows, columns
    slope: float  # with the intercept, stored value to unit (HU, Bq/ml, ...)
    intercept: float
    is_localiser: bool  # a scout image
    keys: Mapping[str, str]  # elements that distinguish the volumes of a 4-D series

    @property
    def normal(self) -> Vector:
        """(3,) unit normal of the slice, LPS."""
        return np.asarray(np.cross(self.orientation[:3], self.orientation[3:]))


def as_number(text: str) -> float:
    """Convert to a number for sorting; infinity where it is none."""
    try:
        return float(text)
    except ValueError:
        return float("inf")


def has_image_type(header: Dataset, kind: str) -> bool:
    """Check for a value of ImageType, as "LOCALIZER"."""
    return any(str(one).upper() == kind for one in np.atleast_1d(value_of(header, "ImageType") or ()))


def frames_of(files: Sequence[tuple[Path, Dataset]], folder: Path) -> tuple[list[Frame], list[str]]:
    """Collect the slices of some files, without copies and localisers, and warnings about these."""
    frames: list[Frame] = []
    notes = []
    seen: dict[str, str] = {}
    for path, header in files:
        uid, position = text_of(header, "SOPInstanceUID"), text_of(header, "ImagePositionPatient")
        if seen.get(uid, position) != position:
            raise InputError(f"{path}: has the instance UID of an image elsewhere; export the original series")
        if uid in seen:
            continue
        seen[uid] = position
        with element_errors(path):
            check_one_sample(header, path)
            found = _frames_in(path, header, uid)
        if has_image_type(header, "MOSAIC"):
            raise InputError(f"{path}: a mosaic of all slices, which is not supported; convert it with dcm2niix")
        if "ModalityLUTSequence" in header:
            raise InputError(f"{path}: has a table of values (Modality LUT); export it with a rescale slope instead")
        frames += found
    if copies := len(files) - len(seen):
        notes.append(f"{copies} {'file is a copy' if copies == 1 else 'files are copies'} of others and left out")
    slices = [frame for frame in frames if not frame.is_localiser]
    if slices and len(slices) < len(frames):
        notes.append(f"{len(frames) - len(slices)} localiser images are left out")
        frames = slices
    if len(frames) < 2:
        raise InputError(f"{folder}: the series has one slice only; expected at least two")
    if any(text_of(header, "PhotometricInterpretation") == "MONOCHROME1" for _, header in files):
        notes.append("the images are stored for inverted display (MONOCHROME1); the values are used as stored")
    return frames, notes


def _frames_in(path: Path, header: Dataset, uid: str) -> list[Frame]:
    count = frame_count(header)
    per_frame = items_of(header, "PerFrameFunctionalGroupsSequence")
    if count > 1 and len(per_frame) != count:
        raise InputError(f"{path}: a multi-frame file of {count} images without their positions; export single images")
    common = [header, *items_of(header, "SharedFunctionalGroupsSequence")[:1]]
    frames = []
    for number in range(count):
        groups = [*common, *per_frame[number : number + 1]]
        slope = group_numbers(groups, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = group_numbers(groups, "PixelValueTransformationSequence", "RescaleIntercept")
        frames.append(
            Frame(
                path,
                number,
                uid,
                text_of(header, "SOPClassUID"),
                *plane_of(groups, path),
                (int(header.Rows), int(header.Columns)),
                1.0 if slope is None else float(slope[0]),
                0.0 if intercept is None else float(intercept[0]),
                has_image_type(header, "LOCALIZER"),
                {"InstanceNumber": text_of(header, "InstanceNumber"), **_volume_keys(groups)},
            )
        )
    return frames


def plane_of(groups: Sequence[Dataset], path: Path) -> tuple[Vector, Vector, Vector]:
    """Read position, orientation and spacing of a frame, as :class:`Frame` has them, from its functional groups."""
    found = []
    for sequence, keyword, count in (
        ("PlanePositionSequence", "ImagePositionPatient", 3),
        ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        ("PixelMeasuresSequence", "PixelSpacing", 2),
    ):
        numbers = group_numbers(groups, sequence, keyword, count)
        if numbers is None:
            raise InputError(f"{path}: no usable {keyword}, so its position is not known; export the original series")
        found.append(numbers)
    position, orientation, spacing = found
    if (spacing <= 0).any():
        raise InputError(f"{path}: the pixel spacing is {spacing.tolist()} mm; expected two numbers above 0")
    axes = orientation.reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-2:
        raise InputError(f"{path}: the image orientation is not two unit vectors at right angles; export it again")
    return position, orientation, spacing


def _volume_keys(groups: Sequence[Dataset]) -> dict[str, str]:
    found: dict[str, str] = {}
    for group in groups:
        for dataset in (group, *(item for sequence in _KEY_SEQUENCES for item in items_of(group, sequence)[:1])):
            found |= {keyword: text for keyword in VOLUME_KEYS if (text := text_of(dataset, keyword))}
    return found


def _by_position(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Group the frames by position along the slices' normal, in ascending order."""
    along = np.array([frame.position_mm @ frames[0].normal for frame in frames])
    order = np.argsort(along, kind="stable")
    starts = np.flatnonzero(np.diff(along[order]) > SAME_POSITION_MM) + 1
    return [[frames[n] for n in group] for group in np.split(order, starts)]


def pick_volume(frames: list[Frame], folder: Path, volume: int | None, series: str) -> tuple[list[Frame], list[str]]:
    """Pick the slices of one volume of a 4-D series (from 1), and warn about it; ``series`` names it in messages."""
    _check_uniform(frames, folder)
    positions = _by_position(frames)
    counts = Counter(len(place) for place in positions)
    if set(counts) == {1}:
        if volume is not None and volume != 1:
            raise InputError(f"{folder}: --series asks for volume {volume}, but the series has one volume only")
        return frames, []
    several = counts.most_common(1)[0][0]
    if odd := [place for place in positions if len(place) != several]:
        where = listed([f"{place[0].position_mm @ place[0].normal:.1f}" for place in odd], 5)
        raise InputError(
            f"{folder}: slices are double or missing: {len(odd)} of {len(positions)} positions (at {where} mm) hold "
            f"{len(odd[0])} images instead of {several}; export the series again"
        )
    key, volumes = _split_volumes(frames, len(positions), several)
    if not volumes:
        raise InputError(f"{folder}: no element sorts the {several} images a position into volumes; export one volume")
    if volume is None:
        values = [f"#{n} = {group[0].keys.get(key, '')}" for n, group in enumerate(volumes, start=1)]
        raise InputError(
            f"{folder}: the series holds {several} volumes that differ in {key} ({listed(values, 6)}); pick one with "
            f"--series '{series}#1' to '{series}#{several}'"
        )
    if volume > several:
        raise InputError(f"{folder}: --series asks for volume {volume} of {several}; expected 1 to {several}")
    return volumes[volume - 1], [f"volume {volume} of {several} of the series is used ({key})"]


def _split_volumes(frames: Sequence[Frame], slices: int, several: int) -> tuple[str, list[list[Frame]]]:
    """Find the first element that sorts the frames into whole volumes, and these in its order; none if none does."""
    for key in VOLUME_KEYS:
        groups: dict[str, list[Frame]] = defaultdict(list)
        for frame in frames:
            groups[frame.keys.get(key, "")].append(frame)
        if len(groups) == several and all(_is_whole(group, slices) for group in groups.values()):
            return key, [groups[value] for value in sorted(groups, key=lambda text: (as_number(text), text))]
    ordered = sorted(frames, key=lambda frame: (as_number(frame.keys["InstanceNumber"]), frame.number))
    blocks = [ordered[first : first + slices] for first in range(0, len(ordered), slices)]
    return ("InstanceNumber", blocks) if all(_is_whole(block, slices) for block in blocks) else ("", [])


def _is_whole(frames: Sequence[Frame], slices: int) -> bool:
    return len(frames) == slices and len(_by_position(frames)) == slices


def _check_uniform(frames: Sequence[Frame], folder: Path) -> None:
    """Refuse images of several orientations, sizes or spacings."""
    groups: list[list[Frame]] = []
    for frame in frames:
        for group in groups:
            if np.abs(frame.orientation - group[0].orientation).max() < _SAME_DIRECTION:
                group.append(frame)
                break
        else:
            groups.append([frame])
    spacings, shapes = np.array([frame.spacing_mm for frame in frames]), Counter(frame.shape for frame in frames)
    if len(groups) > 1:
        planes = [("sagittal", "coronal", "axial")[int(np.argmax(np.abs(group[0].normal)))] for group in groups]
        kinds = listed([f"{len(group)} {plane}" for group, plane in zip(groups, planes, strict=True)], 6)
        found = f"have {len(groups)} orientations ({kinds}); expected parallel slices:"
    elif len(shapes) > 1:
        kinds = listed([f"{count} of {rows} x {columns}" for (rows, columns), count in shapes.items()], 6)
        found = f"have several sizes ({kinds});"
    elif np.ptp(spacings, axis=0).max() * max(frames[0].shape) > OFF_VOXEL * spacings.min():
        found = f"have several pixel spacings ({spacings.min():g} to {spacings.max():g} mm);"
    else:
        return
    raise InputError(f"{folder}: the images of the series {found} export one stack alone")


def stack_frames(frames: Sequence[Frame], folder: Path) -> tuple[list[Frame], Grid, list[str]]:
    """Sort frames of different positions into a stack; give its grid (k along the slices' normal) and warnings.

    InputError if slices are missing, unevenly spaced or shifted sideways.
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
        raise InputError(
            f"{folder}: {missing} slice{' is' if missing == 1 else 's are'} missing between {where} mm along the scan "
            f"(the others are {usual:.4g} mm apart); export the whole series again"
        )
    first, count = ordered[0], len(ordered)
    step = (positions[-1] - positions[0]) / (count - 1)
    off = positions - (positions[0] + np.arange(count)[:, None] * step)
    off_along = float(np.abs(off @ normal).max())
    if off_along > OFF_VOXEL * usual:
        apart = f"{steps.min():.4g} to {steps.max():.4g} mm apart"
        raise InputError(f"{folder}: the slices are not evenly spaced ({apart}); export a series with even slices")
    sideways = float(np.linalg.norm(off - np.outer(off @ normal, normal), axis=1).max())
    if sideways > OFF_VOXEL * first.spacing_mm.min():
        raise InputError(f"{folder}: slices are up to {sideways:.3g} mm shifted sideways; export the original series")
    notes = []
    if off_along > _OFF_REPORTED * usual:
        even = f"{np.linalg.norm(step):.4g} mm"
        notes.append(f"slice positions are up to {off_along:.2g} mm off an even distance of {even}, and used as even")
    shape = (*first.shape, count)
    return ordered, grid_of_slices(first.orientation, first.spacing_mm, step, positions[0], shape, folder), notes


def grid_of_slices(
    orientation: Vector, spacing_mm: Vector, step_mm: Vector, first_mm: Vector, shape: tuple[int, int, int], path: Path
) -> Grid:
    """Make the grid of (rows, columns, slices) from DICOM's orientation and PixelSpacing; step and first voxel LPS."""
    affine = np.eye(4)
    affine[:3] = np.column_stack((orientation[:3] * spacing_mm[1], orientation[3:] * spacing_mm[0], step_mm, first_mm))
    rows, columns, slices = shape
    return grid_of((columns, rows, slices), LPS_FLIP @ affine, path)
