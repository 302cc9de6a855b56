"""DICOM-SEG: structures as masks on the slices of a series, read as a label map and written from one.

Reading takes the frames as they lie in the world, so that empty slices may be left out of the file and its frames may
be in any order. Writing is done by highdicom, one bit a voxel (BINARY), which all viewers read.
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
from .files import LPS_TO_RAS, decode_pixels, no_warnings, numbers_of, read_dataset, read_header, text_of, value_of
from .identity import SOFTWARE, Provenance, check_belongs, copy_identity, fingerprint, new_uid, series_number
from .masks import EVERYTHING, Selection, StructureMask, label_numbers, merge
from .series import Series

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

#: Segmentation Storage and Label Map Segmentation Storage.
STORAGES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
#: Voxels of a file may lie off those of the scan by this share of one: as two grids that count as one.
_OFF_VOXEL = 0.1
#: Segments are numbered 1, 2, 3, ... by the standard: the label value is kept here.
_TRACKING = "{software} label {value}"
#: mm: frames nearer to each other along their normal are on one slice.
_SAME_SLICE_MM = 0.01
#: Of LO.
_LONGEST_NAME = 64
#: Scales of L*, a*, b* in 16 bits (DICOM part 3, C.10.7.1.1).
_LAB_SCALE = np.array([65535 / 100, 65535 / 255, 65535 / 255])
_LAB_ZERO = np.array([0.0, 128.0, 128.0])


def is_segmentation(dataset: Dataset) -> bool:
    """Whether a DICOM object is one."""
    return text_of(dataset, "SOPClassUID") in STORAGES


def read_segmentation(path: Path, on: Series | Grid | None = None, selection: Selection = EVERYTHING) -> Volume:
    """Read a DICOM-SEG as a label map.

    Parameters
    ----------
    path : Path
        The file.
    on : Series, Grid or None
        The scan the segments lie on. None: the grid of the file's own frames, from the first to the last that there
        is.
    selection : Selection, optional
        Which segments; all if left out.

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
    notes: tuple[str, ...] = ()
    if isinstance(on, Series):
        referenced = value_of(dataset, "ReferencedSeriesSequence") or ()
        notes = check_belongs(
            path,
            on,
            patient_id=text_of(dataset, "PatientID"),
            frame_uids={text_of(dataset, "FrameOfReferenceUID")},
            series_uids={text_of(one, "SeriesInstanceUID") for one in referenced},
        )
    own, masks = _segments(dataset, path)
    grid = on.grid if isinstance(on, Series) else on
    order = selection.picked([(mask.number, mask.name) for mask in masks], path)
    chosen = [replace(masks[n], name=selection.renamed(masks[n].name)) for n in order]
    if not selection.wanted:
        empty = [mask.name for mask in chosen if not mask.mask.any()]
        if empty:
            notes = (*notes, f"left out, as they are empty: {', '.join(empty)}")
        chosen = [mask for mask in chosen if mask.mask.any()]
        if not chosen:
            raise InputError(f"{path}: all segments are empty; expected at least one structure")
    if grid is None:
        return merge(chosen, selection, own, path, None, notes)
    placed = [_placed(mask, own, grid, path) for mask in chosen]
    return merge(placed, selection, grid, path, on if isinstance(on, Series) else None, notes)


def _segments(dataset: Dataset, path: Path) -> tuple[Grid, list[StructureMask]]:
    """The grid of a file's frames, and each segment on it."""
    described = value_of(dataset, "SegmentSequence") or ()
    per_frame = value_of(dataset, "PerFrameFunctionalGroupsSequence")
    shared = value_of(dataset, "SharedFunctionalGroupsSequence")
    if not described or per_frame is None:
        raise InputError(f"{path}: the DICOM-SEG does not say what its frames are; export it again")
    pixels = decode_pixels(dataset, path)
    if len(pixels) != len(per_frame):
        raise InputError(f"{path}: {len(pixels)} frames for {len(per_frame)} descriptions; export it again")
    grid, slices = _grid_of_frames(list(per_frame), shared[0] if shared else None, pixels.shape, path)
    kind = text_of(dataset, "SegmentationType")
    if kind == "FRACTIONAL":
        pixels = 2 * pixels.astype(np.int32) >= int(value_of(dataset, "MaximumFractionalValue") or 255)
    masks = []
    numbers = [
        None if kind == "LABELMAP" else _segment_of(frame, shared[0] if shared else None, path) for frame in per_frame
    ]
    for item in described:
        number = int(item.SegmentNumber)
        if kind == "LABELMAP" and number == 0:
            continue  # the background may be described as well
        mask = np.zeros((grid.shape[2], grid.shape[1], grid.shape[0]), bool)
        for frame, of, k in zip(pixels, numbers, slices, strict=True):
            if of is None:
                mask[k] |= frame == number
            elif of == number:
                mask[k] |= frame.astype(bool)
        tracking = re.fullmatch(_TRACKING.format(software=SOFTWARE, value=r"(\d+)"), text_of(item, "TrackingID"))
        value = int(tracking[1]) if tracking else number
        name = text_of(item, "SegmentLabel") or f"segment {number}"
        masks.append(_cropped(value, name, _color(item), mask.transpose(2, 1, 0)))
    return grid, masks


def _segment_of(frame: Dataset, shared: Dataset | None, path: Path) -> int:
    number = _first(frame, shared, "SegmentIdentificationSequence", "ReferencedSegmentNumber", 1)
    if number is None:
        raise InputError(f"{path}: a frame belongs to no segment; export the DICOM-SEG again")
    return int(number[0])


def _cropped(number: int, name: str, color: tuple[int, int, int] | None, mask: NDArray[np.bool_]) -> StructureMask:
    hits = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    if not hits[0].size:
        return StructureMask(number, name, color, (0, 0, 0), np.zeros((0, 0, 0), bool))
    box = tuple(slice(int(hit[0]), int(hit[-1]) + 1) for hit in hits)
    return StructureMask(number, name, color, (box[0].start, box[1].start, box[2].start), mask[box].copy())


def _grid_of_frames(
    frames: Sequence[Dataset], shared: Dataset | None, shape: tuple[int, ...], path: Path
) -> tuple[Grid, list[int]]:
    """The grid the frames lie on, and the slice of each."""
    positions, orientation, spacing, between = [], None, None, None
    for frame in frames:
        position = _first(frame, shared, "PlanePositionSequence", "ImagePositionPatient", 3)
        turned = _first(frame, shared, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        steps = _first(frame, shared, "PixelMeasuresSequence", "PixelSpacing", 2)
        if position is None or turned is None or steps is None:
            raise InputError(f"{path}: a frame does not say where it lies in the patient; export the DICOM-SEG again")
        if orientation is None or spacing is None:
            orientation, spacing = turned, steps
            between = _first(frame, shared, "PixelMeasuresSequence", "SpacingBetweenSlices", 1)
            if between is None:
                between = _first(frame, shared, "PixelMeasuresSequence", "SliceThickness", 1)
        elif not (np.allclose(turned, orientation, atol=1e-3) and np.allclose(steps, spacing, rtol=1e-3)):
            raise InputError(f"{path}: the frames have several orientations or spacings; export them one by one")
        positions.append(position)
    if orientation is None or spacing is None:
        raise InputError(f"{path}: the DICOM-SEG has no frames: all segments are empty")
    at = np.array(positions)
    along = at @ np.cross(orientation[:3], orientation[3:])
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    distance = float(gaps[gaps > _SAME_SLICE_MM].min()) if (gaps > _SAME_SLICE_MM).any() else 0.0
    if between is not None and between[0] > 0 and (distance == 0 or between[0] < distance * (1 - _OFF_VOXEL)):
        distance = float(between[0])  # each second slice or fewer is there
    if distance == 0:
        distance = 1.0  # one slice of unknown thickness
    first, last = at[order[0]], at[order[-1]]
    slices = np.rint((along - along[order[0]]) / distance).astype(int)
    count = int(slices.max()) + 1
    step = (last - first) / (count - 1) if count > 1 else distance * np.cross(orientation[:3], orientation[3:])
    off = np.abs(at - (first + slices[:, None] * step)).max()
    if off > _OFF_VOXEL * min(distance, float(spacing.min())):
        raise InputError(f"{path}: the frames do not lie on evenly spaced slices; expected those of one scan")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = orientation[:3] * spacing[1], orientation[3:] * spacing[0]
    affine[:3, 2], affine[:3, 3] = step, first
    return Grid((shape[2], shape[1], count), LPS_TO_RAS @ affine), slices.tolist()


def _first(
    frame: Dataset, shared: Dataset | None, sequence: str, keyword: str, count: int
) -> NDArray[np.float64] | None:
    """Numbers of a functional group of a frame, else of all frames."""
    for group in (frame, shared):
        inner = None if group is None else value_of(group, sequence)
        numbers = numbers_of(inner[0], keyword, count) if inner else None
        if numbers is not None:
            return numbers
    return None


def _placed(mask: StructureMask, own: Grid, grid: Grid, path: Path) -> StructureMask:
    """A mask on the file's grid as one on the scan's, whose voxels they are in any array order."""
    from nibabel.orientations import apply_orientation

    if not mask.mask.size:
        return mask
    turn = (grid.inverse_affine @ own.affine)[:3, :3]
    if own.shape[2] == 1:
        # The thickness of a single slice is not known for sure: only its direction counts.
        turn[:, 2] /= np.abs(turn[:, 2]).max()
    whole = np.rint(turn)
    start, stop = np.array(mask.start), np.array(mask.start) + mask.mask.shape
    ends = grid.world_to_voxel(own.voxel_to_world(np.stack([start, stop - 1])))
    is_turn = np.array_equal(np.abs(whole).sum(axis=0), [1, 1, 1]) and np.array_equal(
        np.abs(whole).sum(axis=1), [1, 1, 1]
    )
    off = max(np.abs(ends - np.rint(ends)).max(), np.abs((turn - whole) * np.array(own.shape)).max())
    if not is_turn or off > _OFF_VOXEL:
        raise InputError(
            f"{path}: its voxels ({own.describe()}) are not those of the scan ({grid.describe()}); expected segments "
            "on the scan's own slices"
        )
    low, high = np.rint(ends).min(axis=0).astype(int), np.rint(ends).max(axis=0).astype(int)
    if (low < 0).any() or (high >= np.array(grid.shape)).any():
        raise InputError(
            f"{path}: the segment {mask.name!r} reaches out of the scan; give the series it was drawn on, or leave it "
            "out with --structures"
        )
    axes = np.abs(whole).argmax(axis=0)
    orientation = np.column_stack([axes, whole[axes, np.arange(3)]])
    return replace(mask, start=tuple(low.tolist()), mask=apply_orientation(mask.mask, orientation))


def _color(item: Dataset) -> tuple[int, int, int] | None:
    """Red, green, blue of a segment, 0 to 255."""
    from skimage.color import lab2rgb

    stored = numbers_of(item, "RecommendedDisplayCIELabValue", 3)
    if stored is None:
        return None
    red, green, blue = np.rint(255 * lab2rgb(stored / _LAB_SCALE - _LAB_ZERO)).clip(0, 255).astype(int).tolist()
    return red, green, blue


def write_segmentation(
    path: Path, labels: Volume, structures: Sequence[Structure], series: Series, provenance: Provenance
) -> None:
    """Write a label map as a DICOM-SEG on a series.

    Parameters
    ----------
    path : Path
        The file.
    labels : Volume
        The voxels of the series, in any array order.
    structures : sequence of Structure
        Segments 1, 2, 3, ... in this order. One without voxels is described and has no frames.
    series : Series
        Patient, study and frame of reference are its own.
    provenance : Provenance
        For the descriptions.

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
        name=f"{SOFTWARE}, model {provenance.model}"[:_LONGEST_NAME],
        family=Code("123110", "DCM", "Artificial Intelligence"),
        version=provenance.version,
        source=SOFTWARE,
    )
    headers = [read_header(file) for file in dict.fromkeys(frame.path for frame in series.frames)]
    options: dict[str, Any] = {}
    if len(headers) < len(series.frames):
        # Frames of one file: said where they lie, as there may be others in it.
        options["plane_positions"] = [
            PlanePositionSequence("PATIENT", frame.position_mm.tolist()) for frame in series.frames
        ]
    for header in headers:
        copy_identity(series, header)
    with no_warnings(), _refusals(path):
        described = [
            SegmentDescription(
                segment_number=number,
                segment_label=structure.name.replace("\\", "/")[:_LONGEST_NAME],
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
            verdict = provenance.descriptions.get(structure.value, "")
            item.SegmentDescription = f"{verdict}; not approved".removeprefix("; ")[:1024]
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
            content_description=provenance.text[:_LONGEST_NAME],
            content_label="SEGMENTATION",
            series_description=f"{SOFTWARE} segments (not approved)",
            **options,
        )
        copy_identity(series, dataset)
        for keyword in ("ContentDate", "InstanceCreationDate", "SeriesDate"):
            if keyword in dataset:
                setattr(dataset, keyword, provenance.date)
        for keyword in ("ContentTime", "InstanceCreationTime", "SeriesTime"):
            if keyword in dataset:
                setattr(dataset, keyword, provenance.time)
        dataset.walk(lambda inner, element: _settled(inner, element, provenance, key))
        dataset.save_as(path)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn what highdicom says of headers it cannot use into a sentence."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{path.name}: the headers of the series do not do for a DICOM-SEG ({error}); write an RTSTRUCT instead"
        ) from None


def _settled(dataset: Dataset, element: DataElement, provenance: Provenance, key: bytes) -> None:
    """Replace what highdicom draws at random or takes from the clock."""
    if element.keyword == "DimensionOrganizationUID":
        element.value = new_uid("dimensions", key)
    elif element.keyword == "ContributionDateTime":
        if provenance.when is None:
            del dataset[element.tag]
        else:
            element.value = provenance.date + provenance.time
