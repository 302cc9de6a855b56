"""DICOM-SEG: structures as masks on the slices of a series, read as a label map and written from one.

Reading uses the position of each frame: empty slices may be missing and frames be in any order (highdicom's volume
reader refuses the stacks of a tilted gantry). highdicom writes, one bit a voxel (BINARY), which all viewers read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError, OutputError
from ..core.extras import require
from ..core.geometry import Grid
from ..core.image import Volume, label_positions
from ..core.labels import Structure, rgb
from . import files, identity
from .files import group_numbers, items_of, numbers_of, text_of, value_of
from .identity import LONGEST_NAME, SOFTWARE, Provenance
from .series import Series
from .stack import OFF_VOXEL, SAME_POSITION_MM, grid_of_slices, plane_of
from .structures import EVERYTHING, Color, Selection, StructureMask, merge

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

#: Segmentation Storage and Label Map Segmentation Storage.
STORAGES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
#: Segments must be numbered 1, 2, 3, ...: the label value is kept in the tracking ID.
_TRACKING = f"{SOFTWARE} label "


def is_segmentation(dataset: Dataset) -> bool:
    """Check whether a DICOM object is one."""
    return text_of(dataset, "SOPClassUID") in STORAGES


def read_segmentation(path: Path, on: Series | Grid | None = None, selection: Selection = EVERYTHING) -> Volume:
    """Read the segments with voxels of a DICOM-SEG as a label map.

    ``on`` is the scan they lie on; None for the grid of the file's own frames, from the first to the last. Values are
    segment numbers, or those of the label map for files of this program. Names and colours are in the source.
    InputError if the file is no DICOM-SEG or damaged, of another patient or frame, on other voxels than the scan, a
    wanted segment is not there or empty, or segments overlap.
    """
    dataset = files.read_dataset(path)
    if not is_segmentation(dataset):
        raise InputError(f"{path}: the modality is {text_of(dataset, 'Modality') or 'missing'}; expected a DICOM-SEG")
    notes: list[str] = []
    if isinstance(on, Series):
        notes = identity.check_belongs(
            path,
            on,
            patient_id=text_of(dataset, "PatientID"),
            frame_uids={text_of(dataset, "FrameOfReferenceUID")},
            series_uids={text_of(one, "SeriesInstanceUID") for one in items_of(dataset, "ReferencedSeriesSequence")},
        )
    with files.element_errors(path):
        own, masks = _read_segments(dataset, path)
    order, left_out = selection.select([(one.number, one.name, bool(one.mask.any())) for one in masks], path, "voxels")
    notes += left_out
    chosen = [replace(masks[n], name=selection.renamed(masks[n].name)) for n in order]
    if on is None:
        return merge(chosen, selection, own, path, notes)
    grid = on.grid if isinstance(on, Series) else on
    return merge([_place(mask, own, grid, path) for mask in chosen], selection, on, path, notes)


def _read_segments(dataset: Dataset, path: Path) -> tuple[Grid, list[StructureMask]]:
    """Read the grid of a file's frames, and each segment on it."""
    described = items_of(dataset, "SegmentSequence")
    per_frame = items_of(dataset, "PerFrameFunctionalGroupsSequence")
    if not described or not per_frame:
        raise InputError(f"{path}: the DICOM-SEG does not say what its frames are; export it again")
    pixels = files.decode_pixels(dataset, path)
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
            if of in (None, number):
                mask[k] |= frame == number if of is None else frame != 0
        tracking = re.fullmatch(rf"{_TRACKING}(\d+)", text_of(item, "TrackingID"))
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

    i, j, k = next(iter(ndimage.find_objects(mask.view(np.uint8))), (slice(0, 0),) * 3)
    return StructureMask(number, name, color, (i.start, j.start, k.start), mask[i, j, k].copy())


def _grid_of_frames(frames: Sequence[Sequence[Dataset]], shape: tuple[int, int], path: Path) -> tuple[Grid, list[int]]:
    """Find the grid that frames (their functional groups) lie on, and the slice of each."""
    at, orientations, spacings = map(np.array, zip(*(plane_of(groups, path) for groups in frames), strict=True))
    orientation, spacing = orientations[0], spacings[0]
    if not np.allclose(orientations, orientation, atol=1e-3) or not np.allclose(spacings, spacing, rtol=1e-3):
        raise InputError(f"{path}: the frames have several orientations or spacings; export them one by one")
    normal = np.cross(orientation[:3], orientation[3:])
    along = at @ normal
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    distance = float(gaps.min(where=gaps > SAME_POSITION_MM, initial=np.inf))
    between = group_numbers(frames[0], "PixelMeasuresSequence", "SpacingBetweenSlices")
    if between is None:
        between = group_numbers(frames[0], "PixelMeasuresSequence", "SliceThickness")
    if between is not None and 0 < between[0] < distance * (1 - OFF_VOXEL):
        distance = float(between[0])  # each second slice or fewer is there
    if np.isinf(distance):
        distance = 1.0  # one slice of unknown thickness
    first, last = at[order[0]], at[order[-1]]
    slices = np.rint((along - along[order[0]]) / distance).astype(int)
    count = int(slices.max()) + 1
    step = (last - first) / (count - 1) if count > 1 else distance * normal
    off = np.abs(at - (first + slices[:, None] * step)).max()
    if off > OFF_VOXEL * min(distance, float(spacing.min())):
        raise InputError(f"{path}: the frames do not lie on evenly spaced slices; expected those of one scan")
    return grid_of_slices(orientation, spacing, step, first, (*shape, count), path), slices.tolist()


def _place(mask: StructureMask, own: Grid, grid: Grid, path: Path) -> StructureMask:
    """Move a mask from the file's grid to the scan's, whose voxels they are in any array order."""
    from nibabel.orientations import apply_orientation

    part = own.crop(mask.start, np.add(mask.start, mask.mask.shape))
    ends = np.rint(grid.world_to_voxel(part.corners_mm)).astype(int)
    low, high = ends.min(axis=0), ends.max(axis=0)
    affine = grid.affine.copy()
    affine[:3, 3] = grid.voxel_to_world(low)
    orientation = part.axes_relative_to(Grid(tuple(high + 1 - low), affine))
    if orientation is None:
        voxels = f"its voxels ({own.describe()}) are not those of the scan ({grid.describe()})"
        raise InputError(f"{path}: {voxels}; expected segments on the scan's own slices")
    if (low < 0).any() or (high >= np.array(grid.shape)).any():
        found = f"the segment {mask.name!r} reaches out of the scan"
        raise InputError(f"{path}: {found}; give the series it was drawn on, or leave it out with --structures")
    return replace(mask, start=tuple(low.tolist()), mask=apply_orientation(mask.mask, orientation))


def _color(item: Dataset) -> Color | None:
    """Red, green, blue of a segment, 0 to 255."""
    from highdicom.color import CIELabColor

    stored = numbers_of(item, "RecommendedDisplayCIELabValue", 3)
    if stored is None:
        return None
    return rgb(CIELabColor.from_dicom_value([int(n) for n in stored]).to_rgb(clip=True))


def write_segmentation(
    path: Path, labels: Volume, structures: Sequence[Structure], series: Series, provenance: Provenance
) -> None:
    """Write a label map as a DICOM-SEG on a series, whose patient, study and frame of reference are copied.

    Labels are on the voxels of the series in any array order; else ValueError. Structures become segments 1, 2, 3, ...
    in their order; one without voxels is described and has no frames. InputError if there is no voxel at all: a
    DICOM-SEG needs a frame; OutputError if the headers of the series lack what a DICOM-SEG must copy; MissingExtraError
    if highdicom is not installed.
    """
    highdicom = require("writing DICOM-SEG", "dicom", "highdicom")
    data = labels.turned_to(series.grid).data
    numbers = label_positions(data, [one.value for one in structures])
    if not numbers.any():
        raise InputError(f"{path}: no structure has a voxel, and a DICOM-SEG cannot be empty; choose other formats")
    key = identity.fingerprint(series, structures, provenance, data)
    headers = [files.read_header(file) for file in dict.fromkeys(frame.path for frame in series.frames)]
    options: dict[str, Any] = {}
    if len(headers) < len(series.frames):
        # A multi-frame file may hold other frames: give the positions of these.
        places = [frame.position_mm.tolist() for frame in series.frames]
        options["plane_positions"] = [highdicom.PlanePositionSequence("PATIENT", place) for place in places]
    for header in headers:
        identity.copy_identity(series, header)
    try:
        with files.no_warnings():
            dataset = highdicom.seg.Segmentation(
                source_images=headers,
                pixel_array=np.ascontiguousarray(numbers.transpose(2, 1, 0)),
                segmentation_type="BINARY",
                segment_descriptions=_describe(structures, provenance, key),
                series_instance_uid=identity.new_uid("SEG series", key),
                series_number=identity.series_number(series, 2),
                sop_instance_uid=identity.new_uid("SEG", key),
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"the headers of the series are not enough for a SEG ({error})"
        raise OutputError(f"{path.name}: {found}; write an RTSTRUCT instead") from None
    identity.copy_identity(series, dataset)
    for keyword in (f"{of}{what}" for of in ("Content", "InstanceCreation", "Series") for what in ("Date", "Time")):
        if keyword in dataset:
            setattr(dataset, keyword, provenance.date if keyword.endswith("Date") else provenance.time)
    dataset.walk(lambda inner, element: _make_reproducible(inner, element, provenance, key))
    with files.no_warnings():
        dataset.save_as(path)


def _describe(structures: Sequence[Structure], provenance: Provenance, key: bytes) -> list[Any]:
    """Describe each segment: name, colour, verdict and how it was made."""
    import highdicom
    from pydicom.sr.coding import Code

    body = Code("123037004", "SCT", "Anatomical Structure")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=f"{SOFTWARE}, model {provenance.model}"[:LONGEST_NAME],
        family=Code("123110", "DCM", "Artificial Intelligence"),
        version=provenance.version,
        source=SOFTWARE,
    )
    described = []
    for number, structure in enumerate(structures, start=1):
        segment = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=structure.name.replace("\\", "/")[:LONGEST_NAME],
            segmented_property_category=body,
            segmented_property_type=body,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            tracking_uid=identity.new_uid("segment", str(number), key),
            tracking_id=f"{_TRACKING}{structure.value}",
            display_color=highdicom.color.CIELabColor.from_rgb(*structure.color),
        )
        segment.SegmentDescription = provenance.describe(structure.value, "not approved")
        described.append(segment)
    return described


def _make_reproducible(dataset: Dataset, element: DataElement, provenance: Provenance, key: bytes) -> None:
    """Replace what highdicom draws at random or takes from the clock."""
    if element.keyword == "DimensionOrganizationUID":
        element.value = identity.new_uid("dimensions", key)
    elif element.keyword == "ContributionDateTime":
        if provenance.when is None:
            del dataset[element.tag]
        else:
            element.value = provenance.date + provenance.time
