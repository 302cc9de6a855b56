"""RTSTRUCT: structures as closed contours on slices, read as a label map and written from one.

A voxel is read as inside if its centre is inside an odd number of contours on the slice; contours between slices count
for the nearest one. Written contours run between the voxels at level 0.5 in the planes of the slices, one a hole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.geometry import LPS_FLIP, Grid
from ..core.image import Volume, label_boxes
from ..core.labels import Structure, rgb
from ..core.mask import LocalMap
from . import identity
from .contours import fill, trace
from .files import element_errors, items_of, no_warnings, numbers_of, read_dataset, text_of, value_of
from .identity import LONGEST_NAME, SOFTWARE, Provenance, check_belongs, dataset_of
from .series import Series
from .stack import Frame
from .structures import EVERYTHING, Box, Color, Selection, StructureMask, merge

if TYPE_CHECKING:
    from pydicom import Dataset

STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
#: Types of contours that enclose an area; points and open lines do not.
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "")
#: Points of a contour within this fraction of the slice distance lie in one slice, contours on one plane.
_IN_PLANE, _SAME_PLANE = 0.5, 0.02
#: Planes within this fraction of the slice distance of half way between slices count as half way.
_HALF_WAY = 1e-3
#: Contours may leave the image by so many pixels: planning systems close them on the outside of border pixels.
_BEYOND_VOXELS = 1.0
#: Decimals of coordinates in mm: at most 11 of the 16 characters that a number may have.
_DECIMALS = 4
#: SOP class of the reference to a study (retired, but the standard asks for one).
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"


@dataclass(frozen=True, eq=False)
class _Roi:
    """A structure: its closed contours, (N, 3) RAS+ mm, and the number of points and open lines left out."""

    number: int
    name: str
    color: Color | None
    contours: tuple[NDArray[np.float64], ...]
    left_out: int


def is_rtstruct(dataset: Dataset) -> bool:
    """Check whether a DICOM object is one."""
    return text_of(dataset, "SOPClassUID") == STORAGE


def read_rtstruct(path: Path, on: Series | Grid, selection: Selection = EVERYTHING) -> Volume:
    """Read the structures with closed contours of an RTSTRUCT as a label map, with ROI numbers as values.

    ``on`` is the scan they were drawn on; patient and frame of reference are compared with a series only. Names and
    colours are in the source of the volume. InputError if the file is no RTSTRUCT or damaged, of another patient or
    frame, a wanted structure is not there or has no closed contours, contours lie outside the scan or not in its
    slices, or structures overlap.
    """
    dataset = read_dataset(path)
    if not is_rtstruct(dataset):
        raise InputError(f"{path}: the modality is {text_of(dataset, 'Modality') or 'missing'}; expected an RTSTRUCT")
    grid, notes = (on.grid, check_belongs(path, on, **_references(dataset))) if isinstance(on, Series) else (on, [])
    with element_errors(path):
        rois = list(_read_rois(dataset, path))
    found = [(roi.number, roi.name, bool(roi.contours)) for roi in rois]
    order, left_out = selection.select(found, path, "closed contours")
    notes += left_out
    masks = []
    for roi in (rois[n] for n in order):
        mask, roi_notes = _rasterise(roi, grid, path, selection.interpolate)
        masks.append(replace(mask, name=selection.renamed(roi.name)))
        notes += roi_notes
    return merge(masks, selection, on, path, notes)


def contours_in(path: Path) -> dict[int, Sequence[Dataset]]:
    """Read the contours of an RTSTRUCT by ROI number, of those that have any."""
    items = items_of(read_dataset(path), "ROIContourSequence")
    found = {int(value_of(item, "ReferencedROINumber")): items_of(item, "ContourSequence") for item in items}
    return {number: contours for number, contours in found.items() if contours}


def _rasterise(roi: _Roi, grid: Grid, path: Path, interpolate: bool) -> tuple[StructureMask, list[str]]:
    """Mark the voxels inside the contours of a structure, in slices along any axis of the grid; and give warnings."""
    contours = [grid.world_to_voxel(contour) for contour in roi.contours]
    spread = np.max([np.ptp(contour, axis=0) for contour in contours], axis=0)
    axis = next((n for n in (2, 1, 0) if spread[n] <= _IN_PLANE), None)
    if axis is None:
        raise InputError(f"{path}: contours of {roi.name!r} do not lie in slices; give the series they were drawn on")
    across = [n for n in range(3) if n != axis]
    planes = np.array([contour[:, axis].mean() for contour in contours])
    for n, at in enumerate(np.concatenate(contours).T):
        at, border, allowed = (planes, 0.0, 0.5 + _HALF_WAY) if n == axis else (at, 0.5, _BEYOND_VOXELS)
        beyond = max(-border - at.min(), at.max() - (grid.shape[n] - 1 + border))
        if beyond > allowed:
            reach = f"{roi.name!r} reaches {beyond * grid.spacing_mm[n]:.1f} mm out of the scan"
            raise InputError(f"{path}: {reach}; give the series it was drawn on, or leave it out with --structures")
    by_slice, notes = _planes_to_slices(planes, grid.shape[axis], float(grid.spacing_mm[axis]), roi.name)
    both = np.concatenate(contours)[:, across]
    low = np.floor(both.min(axis=0)).astype(int).clip(0)
    high = np.minimum(np.ceil(both.max(axis=0)).astype(int) + 1, np.array(grid.shape)[across])
    first, last = min(by_slice), max(by_slice)
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    stack = np.zeros((last - first + 1, *size), bool)
    for place, numbers in by_slice.items():
        stack[place - first] = fill([contours[n][:, across] - low for n in numbers], size)
    filled = _interpolated(stack, sorted(place - first for place in by_slice)) if interpolate else 0
    missing = len(stack) - len(by_slice) - filled
    if filled:
        notes.append(f"{roi.name}: {filled} slices without contours are filled by interpolation")
    if missing:
        found = f"{missing} slices between its first and its last have no contour and stay empty"
        notes.append(f"{roi.name}: {found} (--interpolate-slices fills single ones)")
    i, j, k = np.insert(low, axis, first).tolist()
    mask = StructureMask(roi.number, roi.name, roi.color, (i, j, k), np.moveaxis(stack, 0, axis))
    if roi.left_out:
        notes.append(f"{roi.name}: {roi.left_out} points or open lines are left out")
    return mask, notes


def _interpolated(stack: NDArray[np.bool_], drawn: Sequence[int]) -> int:
    """Fill single empty slices between drawn ones where the mean of both signed distances is inside; count them."""
    from scipy.ndimage import distance_transform_edt

    def distance(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
        return np.asarray(inside - outside)

    gaps = [low + 1 for low, high in pairwise(drawn) if high - low == 2]
    for gap in gaps:
        stack[gap] = distance(stack[gap - 1]) + distance(stack[gap + 1]) > 0
    return len(gaps)


def _planes_to_slices(
    planes: NDArray[np.float64], count: int, distance_mm: float, name: str
) -> tuple[dict[int, list[int]], list[str]]:
    """Find the contours (positions in ``planes``) of the plane nearest to each slice, and give warnings."""
    notes = []
    # Planes half way between slices all go to the lower one, whatever rounding did to each.
    nearest = np.floor(planes + 0.5 - _HALF_WAY).astype(int).clip(0, count - 1)
    off = np.abs(planes - nearest)
    chosen: dict[int, list[int]] = {}
    for n in np.argsort(off, kind="stable").tolist():
        on_slice = chosen.setdefault(int(nearest[n]), [])
        if not on_slice or abs(planes[n] - planes[on_slice[0]]) <= _SAME_PLANE:
            on_slice.append(n)
    off = off[[on_slice[0] for on_slice in chosen.values()]]
    if between := int((off > _SAME_PLANE).sum()):
        found = f"contours of {between} planes lie between slices, up to {off.max() * distance_mm:.2g} mm off"
        notes.append(f"{name}: {found}; they count for the nearest slice")
    if dropped := len(planes) - sum(map(len, chosen.values())):
        notes.append(f"{name}: {dropped} contours are left out, as others lie nearer to the same slice")
    return chosen, notes


def _references(dataset: Dataset) -> dict[str, Any]:
    """Collect what the structures refer to, as :func:`~.identity.check_belongs` takes it."""
    frames = items_of(dataset, "ReferencedFrameOfReferenceSequence")
    studies = [study for frame in frames for study in items_of(frame, "RTReferencedStudySequence")]
    series = [one for study in studies for one in items_of(study, "RTReferencedSeriesSequence")]
    images = [image for one in series for image in items_of(one, "ContourImageSequence")]
    rois = items_of(dataset, "StructureSetROISequence")
    frame_uids = {text_of(one, "FrameOfReferenceUID") for one in frames}
    return {
        "patient_id": text_of(dataset, "PatientID"),
        "frame_uids": frame_uids | {text_of(roi, "ReferencedFrameOfReferenceUID") for roi in rois},
        "series_uids": {text_of(one, "SeriesInstanceUID") for one in series},
        "instance_uids": {text_of(image, "ReferencedSOPInstanceUID") for image in images},
    }


def _read_rois(dataset: Dataset, path: Path) -> Iterator[_Roi]:
    names = {
        value_of(roi, "ROINumber"): text_of(roi, "ROIName") for roi in items_of(dataset, "StructureSetROISequence")
    }
    drawn = {value_of(item, "ReferencedROINumber"): item for item in items_of(dataset, "ROIContourSequence")}
    if None in names:
        raise InputError(f"{path}: a structure has no number; export the RTSTRUCT again")
    if not drawn.keys() <= names.keys():
        raise InputError(f"{path}: contours belong to no structure; export the RTSTRUCT again")
    for number, name in names.items():
        name = name or f"ROI {number}"
        item = drawn.get(number, dataset_of())
        channels = numbers_of(item, "ROIDisplayColor", 3)
        color = None if channels is None else rgb(channels)
        contours = [
            (text_of(contour, "ContourGeometricType").upper(), _points(contour, f"{path}: a contour of {name!r}"))
            for contour in items_of(item, "ContourSequence")
        ]
        closed = tuple(points for kind, points in contours if kind in _CLOSED and len(points) >= 3)
        yield _Roi(int(number), name, color, closed, len(contours) - len(closed))


def _points(contour: Dataset, name: str) -> NDArray[np.float64]:
    """Read the points of a contour, (N, 3) RAS+ mm."""
    # As bytes: pydicom makes an object of each number, which takes minutes for a large file.
    raw: Any = contour.get_item("ContourData") if "ContourData" in contour else None
    try:
        text = (raw.value or b"").decode("ascii").rstrip("\0 ") if raw else ""
        points = np.array(text.split("\\") if text else [], dtype=np.float64).reshape(-1, 3)
    except ValueError:
        points = np.full((1, 3), np.nan)
    if not np.isfinite(points).all():
        raise InputError(f"{name} does not have three numbers a point; export the RTSTRUCT again")
    return np.asarray(points @ LPS_FLIP[:3, :3])


def write_rtstruct(
    path: Path,
    labels: Volume,
    structures: Sequence[Structure],
    series: Series,
    provenance: Provenance,
    probabilities: Mapping[int, tuple[Grid, LocalMap]] | None = None,
    contours: Mapping[int, Sequence[Dataset]] | None = None,
) -> None:
    """Write a label map as an RTSTRUCT on a series, whose patient, study and frame of reference are copied.

    Labels, and the grid and probability in [0, 1] of label values, are on the voxels of the series in any array order;
    else ValueError. Label values become ROI numbers; a structure without voxels has no contours. Probabilities move
    contours between voxels, never across a voxel's centre. ``contours`` of label values, as :func:`contours_in` reads
    them, are written as they are.
    """
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian

    data = labels.turned_to(series.grid).data
    boxes = label_boxes([one.value for one in structures], data)
    key = identity.fingerprint(series, structures, provenance, data)
    maker = f"{SOFTWARE} {provenance.version}, model {provenance.model}"
    dataset = dataset_of(
        SOPClassUID=STORAGE,
        SOPInstanceUID=identity.new_uid("RTSTRUCT", key),
        SeriesInstanceUID=identity.new_uid("RTSTRUCT series", key),
        Modality="RTSTRUCT",
        Manufacturer=SOFTWARE,
        ManufacturerModelName=SOFTWARE,
        SoftwareVersions=provenance.version,
        SeriesNumber=identity.series_number(series, 1),
        OperatorsName="",
        SeriesDescription=f"{SOFTWARE} structures (not approved)",
        InstanceCreationDate=provenance.date,
        InstanceCreationTime=provenance.time,
        StructureSetLabel=SOFTWARE,
        StructureSetName=f"{SOFTWARE} {provenance.version}"[:LONGEST_NAME],
        StructureSetDescription=provenance.text,
        StructureSetDate=provenance.date,
        StructureSetTime=provenance.time,
        ApprovalStatus="UNAPPROVED",
        StructureSetROISequence=[],
        ROIContourSequence=[],
        RTROIObservationsSequence=[],
    )
    identity.copy_identity(series, dataset)
    dataset.ReferencedFrameOfReferenceSequence = [_frame_reference(series, dataset)]
    names = _unique_names(structures)
    for position, structure in enumerate(structures, start=1):
        value = structure.value
        dataset.StructureSetROISequence.append(
            dataset_of(
                ROINumber=value,
                ReferencedFrameOfReferenceUID=dataset.FrameOfReferenceUID,
                ROIName=names[value],
                ROIDescription=provenance.describe(value, maker),
                ROIGenerationAlgorithm="AUTOMATIC",
                ROIGenerationDescription=maker[:LONGEST_NAME],
            )
        )
        drawn = dataset_of(ROIDisplayColor=list(structure.color), ReferencedROINumber=value)
        if value in (contours or {}):
            drawn.ContourSequence = (contours or {})[value]
        elif value in boxes:
            outlines = _outlines(data, value, boxes[value], series.grid, (probabilities or {}).get(value))
            drawn.ContourSequence = [_contour(points, series, k) for k, points in outlines]
        dataset.ROIContourSequence.append(drawn)
        dataset.RTROIObservationsSequence.append(
            dataset_of(
                ObservationNumber=position, ReferencedROINumber=value, RTROIInterpretedType="ORGAN", ROIInterpreter=""
            )
        )
    dataset.file_meta = FileMetaDataset()
    # Contours of more than 65534 characters do not fit a file of explicit types.
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    with no_warnings():
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def _unique_names(structures: Sequence[Structure]) -> dict[int, str]:
    """Cut names to the length that the standard allows, each unique."""
    names: dict[int, str] = {}
    for one in structures:
        name = one.name.replace("\\", "/")[:LONGEST_NAME]
        if name in names.values():
            end = f" {one.value}"
            name = name[: LONGEST_NAME - len(end)] + end
        names[one.value] = name
    return names


def _frame_reference(series: Series, dataset: Dataset) -> Dataset:
    images = {frame.uid: _image_reference(frame) for frame in series.frames}
    referenced = dataset_of(SeriesInstanceUID=series.uid, ContourImageSequence=list(images.values()))
    study = dataset_of(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=dataset.StudyInstanceUID,
        RTReferencedSeriesSequence=[referenced],
    )
    return dataset_of(FrameOfReferenceUID=dataset.FrameOfReferenceUID, RTReferencedStudySequence=[study])


def _image_reference(frame: Frame) -> Dataset:
    return dataset_of(ReferencedSOPClassUID=frame.class_uid, ReferencedSOPInstanceUID=frame.uid)


def _outlines(
    data: NDArray[Any], value: int, found: Box, grid: Grid, probability: tuple[Grid, LocalMap] | None
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Trace the contours of a label within its box: slice and points, (N, 3) RAS+ mm."""
    i, j, slices = found
    # One more voxel on each side, where there is one: the probability there places the contour.
    low = np.maximum((i.start - 1, j.start - 1), 0)
    high = np.minimum((i.stop + 1, j.stop + 1), grid.shape[:2])
    box = (slice(low[0], high[0]), slice(low[1], high[1]))
    inside = None
    if probability is not None:
        own, values = probability
        inside = Volume(values.to_full(own.shape), own).turned_to(grid).data
    for k in range(slices.start, slices.stop):
        for contour in trace(data[(*box, k)] == value, None if inside is None else inside[(*box, k)]):
            ijk = np.column_stack([contour + low, np.full(len(contour), k)])
            yield k, grid.voxel_to_world(ijk)


def _contour(points: NDArray[np.float64], series: Series, k: int) -> Dataset:
    from pydicom.charset import default_encoding
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    frame = series.frames[k]
    image = _image_reference(frame)
    if sum(other.uid == frame.uid for other in series.frames[max(k - 1, 0) : k + 2]) > 1:
        image.ReferencedFrameNumber = frame.number + 1
    contour = dataset_of(
        ContourImageSequence=[image], ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=len(points)
    )
    numbers = (points @ LPS_FLIP[:3, :3]).round(_DECIMALS) + 0.0
    text = "\\".join([f"{n:.{_DECIMALS}f}" for n in numbers.ravel().tolist()]).encode("ascii")
    text += b" " * (len(text) % 2)
    # As bytes: an object for each number takes minutes for a large set.
    tag = Tag("ContourData")
    contour[tag] = RawDataElement(tag, "DS", len(text), text, 0, True, True)
    contour.set_original_encoding(True, True, default_encoding)  # so that the bytes are written as they are
    return contour
