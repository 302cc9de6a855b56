"""DICOM-SEG: structures as masks on the slices of a series, read as a label map and written from one.

Reading uses the position of each frame in the world: empty slices may be missing and frames be in any order
(highdicom's volume reader refuses the stacks of a tilted gantry). Writing is done by highdicom, one bit a voxel
(BINARY), which all viewers read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError, MissingExtraError, OutputError
from ..core.geometry import Grid
from ..core.image import Volume
from ..core.labels import Structure
from .files import (
    decode_pixels,
    element_errors,
    group_numbers,
    items_of,
    no_warnings,
    numbers_of,
    read_dataset,
    read_header,
    text_of,
    value_of,
)
from .identity import (
    LONGEST_NAME,
    SOFTWARE,
    Provenance,
    check_belongs,
    copy_identity,
    fingerprint,
    new_uid,
    series_number,
)
from .series import Series
from .stack import OFF_VOXEL, SAME_POSITION_MM, grid_of_slices
from .structures import EVERYTHING, Color, Selection, StructureMask, label_numbers, merge

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

#: Segmentation Storage and Label Map Segmentation Storage.
STORAGES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
#: Segments must be numbered 1, 2, 3, ...: the label value is kept in the tracking ID.
_TRACKING = "{software} label {value}"


def is_segmentation(dataset: Dataset) -> bool:
    """Check whether a DICOM object is one."""
    return text_of(dataset, "SOPClassUID") in STORAGES


def read_segmentation(path: Path, on: Series | Grid | None = None, selection: Selection = EVERYTHING) -> Volume:
    """Read a DICOM-SEG as a label map.

    Parameters
    ----------
    on
        The scan the segments lie on; None: the grid of the file's own frames, from the first to the last.
    selection
        Which segments; all that have voxels without one.

    Returns
    -------
    Volume
        Segment numbers as label values (those of the label map for files of this program), on the grid of the scan;
        names and colours are in its source.

    Raises
    ------
    InputError
        If the file is no DICOM-SEG or damaged, of another patient or frame, on other voxels than the scan, a segment
        is not there or empty, or segments overlap.
    """
    dataset = read_dataset(path)
    if not is_segmentation(dataset):
        kind = text_of(dataset, "Modality") or "another"
        raise InputError(f"{path}: no DICOM-SEG but an object of modality {kind}; expected segments")
    notes: list[str] = []
    if isinstance(on, Series):
        notes = check_belongs(
            path,
            on,
            patient_id=text_of(dataset, "PatientID"),
            frame_uids={text_of(dataset, "FrameOfReferenceUID")},
            series_uids={text_of(one, "SeriesInstanceUID") for one in items_of(dataset, "ReferencedSeriesSequence")},
        )
    with element_errors(path):
        own, masks = _read_segments(dataset, path)
    order = selection.select([(mask.number, mask.name) for mask in masks], path)
    chosen = [replace(masks[n], name=selection.renamed(masks[n].name)) for n in order]
    if not selection.wanted:
        empty = [mask.name for mask in chosen if not mask.mask.any()]
        if empty:
            notes.append(f"left out, as they are empty: {', '.join(empty)}")
        chosen = [mask for mask in chosen if mask.mask.any()]
        if not chosen:
            raise InputError(f"{path}: all segments are empty; expected at least one structure")
    if on is None:
        return merge(chosen, selection, own, path, notes)
    grid = on.grid if isinstance(on, Series) else on
    return merge([_place(mask, own, grid, path) for mask in chosen], selection, on, path, notes)


def _read_segments(dataset: Dataset, path: Path) -> tuple[Grid, list[StructureMask]]:
    """The grid of a file's frames, and each segment on it."""
    described = items_of(dataset, "SegmentSequence")
    per_frame = items_of(dataset, "PerFrameFunctionalGroupsSequence")
    if not described or "PerFrameFunctionalGroupsSequence" not in dataset:
        raise InputError(f"{path}: the DICOM-SEG does not say what its frames are; export it again")
    pixels = decode_pixels(dataset, path)
    if len(pixels) != len(per_frame):
        raise InputError(f"{path}: {len(pixels)} frames for {len(per_frame)} descriptions; export it again")
    shared = items_of(dataset, "SharedFunctionalGroupsSequence")[:1]
    frames = [[*shared, frame] for frame in per_frame]
    grid, slices = _grid_of_frames(frames, (pixels.shape[1], pixels.shape[2]), path)
    kind = text_of(dataset, "SegmentationType")
    if kind == "FRACTIONAL":
        pixels = 2 * pixels.astype(np.int32) >= int(value_of(dataset, "MaximumFractionalValue") or 255)
    numbers = [None if kind == "LABELMAP" else _segment_of(groups, path) for groups in frames]
    masks = []
    for item in described:
        number = int(item.SegmentNumber)
        if kind == "LABELMAP" and number == 0:
            continue  # the background may be described as well
        mask = np.zeros(grid.shape[::-1], bool)
        for frame, of, k in zip(pixels, numbers, slices, strict=True):
            if of is None:
                mask[k] |= frame == number
            elif of == number:
                mask[k] |= frame.astype(bool)
        tracking = re.fullmatch(_TRACKING.format(software=SOFTWARE, value=r"(\d+)"), text_of(item, "TrackingID"))
        name = text_of(item, "SegmentLabel") or f"segment {number}"
        masks.append(_crop(int(tracking[1]) if tracking else number, name, _color(item), mask.transpose(2, 1, 0)))
    return grid, masks


def _segment_of(groups: Sequence[Dataset], path: Path) -> int:
    number = group_numbers(groups, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
    if number is None:
        raise InputError(f"{path}: a frame belongs to no segment; export the DICOM-SEG again")
    return int(number[0])


def _crop(number: int, name: str, color: Color | None, mask: NDArray[np.bool_]) -> StructureMask:
    """Keep the box of the marked voxels."""
    from scipy import ndimage

    for box in ndimage.find_objects(mask.view(np.uint8)):
        return StructureMask(number, name, color, tuple(axis.start for axis in box), mask[box].copy())
    return StructureMask(number, name, color, (0, 0, 0), np.zeros((0, 0, 0), bool))


def _grid_of_frames(frames: Sequence[Sequence[Dataset]], shape: tuple[int, int], path: Path) -> tuple[Grid, list[int]]:
    """The grid that frames (their functional groups) lie on, and the slice of each."""
    if not frames:
        raise InputError(f"{path}: the DICOM-SEG has no frames: all segments are empty")
    positions, orientations, spacings = (
        [group_numbers(groups, sequence, keyword, count) for groups in frames]
        for sequence, keyword, count in (
            ("PlanePositionSequence", "ImagePositionPatient", 3),
            ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
            ("PixelMeasuresSequence", "PixelSpacing", 2),
        )
    )
    if any(numbers is None for numbers in (*positions, *orientations, *spacings)):
        raise InputError(f"{path}: a frame does not say where it lies in the patient; export the DICOM-SEG again")
    at, orientation, spacing = np.array(positions), np.array(orientations[0]), np.array(spacings[0])
    if not (
        np.allclose(np.array(orientations), orientation, atol=1e-3)
        and np.allclose(np.array(spacings), spacing, rtol=1e-3)
    ):
        raise InputError(f"{path}: the frames have several orientations or spacings; export them one by one")
    between = group_numbers(frames[0], "PixelMeasuresSequence", "SpacingBetweenSlices")
    if between is None:
        between = group_numbers(frames[0], "PixelMeasuresSequence", "SliceThickness")
    along = at @ np.cross(orientation[:3], orientation[3:])
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    distance = float(gaps[gaps > SAME_POSITION_MM].min()) if (gaps > SAME_POSITION_MM).any() else 0.0
    if between is not None and between[0] > 0 and (distance == 0 or between[0] < distance * (1 - OFF_VOXEL)):
        distance = float(between[0])  # each second slice or fewer is there
    if distance == 0:
        distance = 1.0  # one slice of unknown thickness
    first, last = at[order[0]], at[order[-1]]
    slices = np.rint((along - along[order[0]]) / distance).astype(int)
    count = int(slices.max()) + 1
    step = (last - first) / (count - 1) if count > 1 else distance * np.cross(orientation[:3], orientation[3:])
    off = np.abs(at - (first + slices[:, None] * step)).max()
    if off > OFF_VOXEL * min(distance, float(spacing.min())):
        raise InputError(f"{path}: the frames do not lie on evenly spaced slices; expected those of one scan")
    return grid_of_slices(orientation, spacing, step, first, (*shape, count)), slices.tolist()


def _place(mask: StructureMask, own: Grid, grid: Grid, path: Path) -> StructureMask:
    """Move a mask from the file's grid to the scan's, whose voxels they are in any array order."""
    from nibabel.orientations import apply_orientation

    if not mask.mask.size:
        return mask
    part = own.crop(mask.start, np.add(mask.start, mask.mask.shape))
    ends = np.rint(grid.world_to_voxel(part.corners_mm)).astype(int)
    low, high = ends.min(axis=0), ends.max(axis=0)
    affine = grid.affine.copy()
    affine[:3, 3] = grid.voxel_to_world(low)
    i, j, k = (high + 1 - low).tolist()
    orientation = part.axes_relative_to(Grid((i, j, k), affine))
    if orientation is None:
        raise InputError(
            f"{path}: its voxels ({own.describe()}) are not those of the scan ({grid.describe()}); expected segments "
            "on the scan's own slices"
        )
    if (low < 0).any() or (high >= np.array(grid.shape)).any():
        raise InputError(
            f"{path}: the segment {mask.name!r} reaches out of the scan; give the series it was drawn on, or leave it "
            "out with --structures"
        )
    i, j, k = low.tolist()
    return replace(mask, start=(i, j, k), mask=apply_orientation(mask.mask, orientation))


def _color(item: Dataset) -> Color | None:
    """Red, green, blue of a segment, 0 to 255."""
    from highdicom.color import CIELabColor

    stored = numbers_of(item, "RecommendedDisplayCIELabValue", 3)
    if stored is None:
        return None
    red, green, blue = CIELabColor.from_dicom_value([int(n) for n in stored]).to_rgb(clip=True)
    return round(red), round(green), round(blue)


def write_segmentation(
    path: Path, labels: Volume, structures: Sequence[Structure], series: Series, provenance: Provenance
) -> None:
    """Write a label map as a DICOM-SEG on a series.

    Parameters
    ----------
    labels
        The voxels of the series, in any array order; patient, study and frame of reference are copied from it.
    structures
        Segments 1, 2, 3, ... in this order. One without voxels is described and has no frames.

    Raises
    ------
    InputError
        If there is no voxel at all: a DICOM-SEG needs a frame.
    OutputError
        If the headers of the series lack what a DICOM-SEG must copy.
    MissingExtraError
        If highdicom is not installed.
    ValueError
        If the labels do not lie on the voxels of the series.
    """
    try:
        import highdicom
        from highdicom.content import AlgorithmIdentificationSequence, PlanePositionSequence
        from highdicom.seg import Segmentation, SegmentDescription
    except ImportError:
        raise MissingExtraError("writing DICOM-SEG", "dicom") from None
    from pydicom.sr.coding import Code

    data = labels.turned_to(series.grid).data
    numbers = label_numbers(data, structures)
    if not numbers.any():
        raise InputError(f"{path}: no structure has a voxel, and a DICOM-SEG cannot be empty; choose other formats")
    frames = np.ascontiguousarray(numbers.transpose(2, 1, 0), dtype=np.uint8 if len(structures) < 256 else np.uint16)
    key = fingerprint(series, structures, provenance, data)
    body = Code("123037004", "SCT", "Anatomical Structure")
    algorithm = AlgorithmIdentificationSequence(
        name=f"{SOFTWARE}, model {provenance.model}"[:LONGEST_NAME],
        family=Code("123110", "DCM", "Artificial Intelligence"),
        version=provenance.version,
        source=SOFTWARE,
    )
    headers = [read_header(file) for file in dict.fromkeys(frame.path for frame in series.frames)]
    options: dict[str, Any] = {}
    if len(headers) < len(series.frames):
        # A multi-frame file may hold other frames: give the positions of these.
        options["plane_positions"] = [
            PlanePositionSequence("PATIENT", frame.position_mm.tolist()) for frame in series.frames
        ]
    for header in headers:
        copy_identity(series, header)
    with no_warnings(), _refusals(path):
        described = [
            SegmentDescription(
                segment_number=number,
                segment_label=structure.name.replace("\\", "/")[:LONGEST_NAME],
                segmented_property_category=body,
                segmented_property_type=body,
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
                tracking_uid=new_uid("segment", str(number), key),
                tracking_id=_TRACKING.format(software=SOFTWARE, value=structure.value),
                display_color=highdicom.color.CIELabColor.from_rgb(*structure.color),
            )
            for number, structure in enumerate(structures, start=1)
        ]
        for item, structure in zip(described, structures, strict=True):
            item.SegmentDescription = provenance.describe(structure.value, "not approved")
        dataset = Segmentation(
            source_images=headers,
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=described,
            series_instance_uid=new_uid("SEG series", key),
            series_number=series_number(series, 2),
            sop_instance_uid=new_uid("SEG", key),
            instance_number=1,
            manufacturer=SOFTWARE,
            manufacturer_model_name=SOFTWARE,
            software_versions=provenance.version,
            device_serial_number=provenance.version,
            content_description=provenance.text[:LONGEST_NAME],
            content_label="SEGMENTATION",
            series_description=f"{SOFTWARE} segments (not approved)",
            **options,
        )
        copy_identity(series, dataset)
        for keyword in (f"{of}{what}" for of in ("Content", "InstanceCreation", "Series") for what in ("Date", "Time")):
            if keyword in dataset:
                setattr(dataset, keyword, provenance.date if keyword.endswith("Date") else provenance.time)
        dataset.walk(lambda inner, element: _make_reproducible(inner, element, provenance, key))
        dataset.save_as(path)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn errors of highdicom about headers it cannot use into OutputError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{path.name}: the headers of the series are not enough for a SEG ({error}); write an RTSTRUCT instead"
        ) from None


def _make_reproducible(dataset: Dataset, element: DataElement, provenance: Provenance, key: bytes) -> None:
    """Replace what highdicom draws at random or takes from the clock."""
    if element.keyword == "DimensionOrganizationUID":
        element.value = new_uid("dimensions", key)
    elif element.keyword == "ContributionDateTime":
        if provenance.when is None:
            del dataset[element.tag]
        else:
            element.value = provenance.date + provenance.time
