"""RTSTRUCT: structures as closed contours on slices, read as a label map and written from one.

Reading: a voxel belongs to a structure if its centre is inside an odd number of the structure's contours on the slice.
Contours that lie between slices count for the nearest one. Writing: contours run between the voxels at the level of one
half, one for each hole, in the planes of the slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.geometry import Grid
from ..core.image import Volume
from ..core.labels import Structure, listed
from ..core.mask import LocalMap
from .contours import fill, trace
from .files import LPS_TO_RAS, no_warnings, read_dataset, text_of, value_of
from .identity import (
    SOFTWARE,
    Provenance,
    check_belongs,
    copy_identity,
    fingerprint,
    frame_of,
    new_uid,
    series_number,
    study_of,
)
from .masks import EVERYTHING, Selection, StructureMask, label_boxes, merge
from .series import Series

if TYPE_CHECKING:
    from pydicom import Dataset

STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
#: Types of contours that enclose an area; points and open lines do not.
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "")
#: A contour lies in one plane if its points are within this share of the slice distance of each other. Half of it on
#: each side still names one slice.
_IN_PLANE = 0.5
#: Contours nearer to each other than this share of the slice distance are on one plane.
_SAME_PLANE = 0.02
#: Planes within this share of the slice distance of half way count as half way.
_HALF_WAY = 1e-3
#: Contours may leave the image by so many pixels: planning systems close them on the outside of border pixels.
_BEYOND_VOXELS = 1.0
#: mm, in files: a tenth of a micrometre, and at most 11 of the 16 characters that a number may have.
_DECIMALS = 4
#: LO and SH of the standard.
_LONGEST_NAME = 64
_LONGEST_LABEL = 16
#: SOP class that stands for a study in references of RTSTRUCTs (retired, but the standard asks for one).
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"


@dataclass(frozen=True, eq=False)
class Roi:
    """A structure of an RTSTRUCT.

    Parameters
    ----------
    number : int
        ROI number.
    name : str
        ROI name.
    color : tuple of int, (3,), or None
        Red, green, blue, 0 to 255.
    contours : tuple of array, (N, 3)
        Closed ones, RAS+ mm.
    left_out : int
        Points and open lines.
    """

    number: int
    name: str
    color: tuple[int, int, int] | None
    contours: tuple[NDArray[np.float64], ...]
    left_out: int


def is_rtstruct(dataset: Dataset) -> bool:
    """Whether a DICOM object is one."""
    return text_of(dataset, "SOPClassUID") == STORAGE


def read_rtstruct(path: Path, on: Series | Grid, selection: Selection = EVERYTHING) -> Volume:
    """Read an RTSTRUCT as a label map.

    Parameters
    ----------
    path : Path
        The file.
    on : Series or Grid
        The scan the contours were drawn on; with a bare grid nothing tells whether they were.
    selection : Selection, optional
        Which structures; all that have closed contours if left out.

    Returns
    -------
    Volume
        ROI numbers as label values, on the grid of the scan; names and colours are in its source.

    Raises
    ------
    InputError
        If the file is no RTSTRUCT or damaged, of another patient or frame, a structure is not there or has no closed
        contours, contours lie outside the scan or not in its slices, or structures overlap.
    """
    dataset = read_dataset(path)
    if not is_rtstruct(dataset):
        raise InputError(f"{path}: no RTSTRUCT but {_kind(dataset)}; expected structures")
    notes: list[str] = []
    if isinstance(on, Series):
        notes += check_belongs(path, on, **_references(dataset))
    grid = on.grid if isinstance(on, Series) else on
    rois = list(_rois(dataset, path))
    if not rois:
        raise InputError(f"{path}: the RTSTRUCT has no structures; export it again")
    order = selection.picked([(roi.number, roi.name) for roi in rois], path)
    if not selection.wanted:
        bare = [rois[n].name for n in order if not rois[n].contours]
        if bare:
            notes.append(f"left out, as they have no closed contours: {listed(bare)}")
        order = [n for n in order if rois[n].contours]
        if not order:
            raise InputError(f"{path}: none of its {len(rois)} structures has closed contours; export it again")
    masks = []
    for n in order:
        if not rois[n].contours:
            raise InputError(
                f"{path}: the structure {rois[n].name!r} has no closed contours; leave it out of --structures"
            )
        mask, more = rasterise(rois[n], grid, path)
        masks.append(replace(mask, name=selection.renamed(mask.name)))
        notes += more
    return merge(masks, selection, grid, path, on if isinstance(on, Series) else None, tuple(notes))


def rasterise(roi: Roi, grid: Grid, path: Path) -> tuple[StructureMask, list[str]]:
    """Mark the voxels inside the contours of a structure.

    Parameters
    ----------
    roi : Roi
        The structure.
    grid : Grid
        Of the scan; the contours lie in its slices, whichever of its axes counts them.
    path : Path
        For messages.

    Returns
    -------
    mask : StructureMask
    notes : list of str
        For the user.

    Raises
    ------
    InputError
        If contours lie outside the grid or not in its slices.
    """
    name = f"{path}: the structure {roi.name!r}"
    contours = [grid.world_to_voxel(contour) for contour in roi.contours]
    spread = np.max([np.ptp(contour, axis=0) for contour in contours], axis=0)
    axis = next((n for n in (2, 1, 0) if spread[n] <= _IN_PLANE), None)
    if axis is None:
        raise InputError(
            f"{name} has contours that do not lie in the slices of the scan; give the series they were drawn on"
        )
    across = [n for n in range(3) if n != axis]
    planes = np.array([contour[:, axis].mean() for contour in contours])
    _check_inside(contours, planes, axis, grid, name)
    by_slice, notes = _planes_to_slices(planes, grid.shape[axis], float(grid.spacing_mm[axis]), roi.name)
    both = np.concatenate(contours)[:, across]
    low = np.floor(both.min(axis=0)).astype(int).clip(0)
    high = np.minimum(np.ceil(both.max(axis=0)).astype(int) + 1, np.array(grid.shape)[across])
    first, last = min(by_slice), max(by_slice)
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    stack = np.zeros((last - first + 1, *size), bool)
    for place, numbers in by_slice.items():
        stack[place - first] = fill([contours[n][:, across] - low for n in numbers], size)
    start = [0, 0, 0]
    start[across[0]], start[across[1]], start[axis] = int(low[0]), int(low[1]), first
    mask = StructureMask(roi.number, roi.name, roi.color, (start[0], start[1], start[2]), np.moveaxis(stack, 0, axis))
    if roi.left_out:
        notes.append(f"{roi.name}: {roi.left_out} points or open lines are left out")
    return mask, notes


def _planes_to_slices(
    planes: NDArray[np.float64], count: int, distance_mm: float, name: str
) -> tuple[dict[int, list[int]], list[str]]:
    """Which contours count for which slice, and what is to be told."""
    notes = []
    best: dict[int, float] = {}
    # Planes half way between slices all go to the lower one, whatever rounding did to each.
    nearest = np.floor(planes + 0.5 - _HALF_WAY).astype(int).clip(0, count - 1)
    for place, plane in zip(nearest.tolist(), planes.tolist(), strict=True):
        if place not in best or abs(plane - place) < abs(best[place] - place):
            best[place] = plane
    chosen: dict[int, list[int]] = {}
    dropped = 0
    for n, (place, plane) in enumerate(zip(nearest.tolist(), planes.tolist(), strict=True)):
        if abs(plane - best[place]) <= _SAME_PLANE:
            chosen.setdefault(place, []).append(n)
        else:
            dropped += 1
    off = np.array([abs(plane - place) for place, plane in best.items()])
    between = int((off > _SAME_PLANE).sum())
    if between:
        notes.append(
            f"{name}: contours of {between} planes lie between slices, up to {off.max() * distance_mm:.2g} mm off; "
            "they count for the nearest slice"
        )
    if dropped:
        notes.append(f"{name}: {dropped} contours are left out, as others lie nearer to the same slice")
    missing = max(chosen) - min(chosen) + 1 - len(chosen)
    if missing:
        notes.append(f"{name}: {missing} slices between its first and its last have no contour, and stay empty")
    return chosen, notes


def _check_inside(
    contours: Sequence[NDArray[np.float64]], planes: NDArray[np.float64], axis: int, grid: Grid, name: str
) -> None:
    last = grid.shape[axis] - 1
    beyond = np.maximum(-planes, planes - last).max()
    if beyond > 0.5 + _HALF_WAY:
        raise InputError(
            f"{name} has contours up to {beyond * grid.spacing_mm[axis]:.1f} mm beyond the first or last slice of the "
            "scan; give the series they were drawn on, or leave it out with --structures"
        )
    points = np.concatenate(contours)
    for other in {0, 1, 2} - {axis}:
        low, high = points[:, other].min(), points[:, other].max()
        outside = max(-0.5 - low, high - (grid.shape[other] - 0.5))
        if outside > _BEYOND_VOXELS:
            raise InputError(
                f"{name} reaches {outside * grid.spacing_mm[other]:.1f} mm out of the scan's images; give the series "
                "it was drawn on, or leave it out with --structures"
            )


def _kind(dataset: Dataset) -> str:
    modality = text_of(dataset, "Modality")
    return f"an object of modality {modality}" if modality else "another DICOM object"


def _references(dataset: Dataset) -> dict[str, Any]:
    """What the structures refer to, as :func:`~.identity.check_belongs` takes it."""
    frames, series, images = set(), set(), set()
    for roi in value_of(dataset, "StructureSetROISequence") or ():
        frames.add(text_of(roi, "ReferencedFrameOfReferenceUID"))
    for frame in value_of(dataset, "ReferencedFrameOfReferenceSequence") or ():
        frames.add(text_of(frame, "FrameOfReferenceUID"))
        for study in value_of(frame, "RTReferencedStudySequence") or ():
            for one in value_of(study, "RTReferencedSeriesSequence") or ():
                series.add(text_of(one, "SeriesInstanceUID"))
                of_series = value_of(one, "ContourImageSequence") or ()
                images |= {text_of(image, "ReferencedSOPInstanceUID") for image in of_series}
    return {
        "patient_id": text_of(dataset, "PatientID"),
        "frame_uids": frames,
        "series_uids": series,
        "instance_uids": images,
    }


def _rois(dataset: Dataset, path: Path) -> Iterator[Roi]:
    names: dict[int, str] = {}
    for roi in value_of(dataset, "StructureSetROISequence") or ():
        number = value_of(roi, "ROINumber")
        if number is None:
            raise InputError(f"{path}: a structure has no number; export the RTSTRUCT again")
        names[int(number)] = text_of(roi, "ROIName") or f"ROI {int(number)}"
    drawn: dict[int, Dataset] = {}
    for item in value_of(dataset, "ROIContourSequence") or ():
        number = value_of(item, "ReferencedROINumber")
        if number is None or int(number) not in names:
            raise InputError(f"{path}: contours belong to no structure; export the RTSTRUCT again")
        drawn[int(number)] = item
    for number, name in names.items():
        color, contours, left_out = None, [], 0
        if number in drawn:
            channels = value_of(drawn[number], "ROIDisplayColor")
            if channels is not None and len(channels) == 3:
                color = (int(channels[0]), int(channels[1]), int(channels[2]))
            for contour in value_of(drawn[number], "ContourSequence") or ():
                points = _points(contour, f"{path}: the structure {name!r}")
                if text_of(contour, "ContourGeometricType").upper() in _CLOSED and len(points) >= 3:
                    contours.append(points)
                else:
                    left_out += 1
        yield Roi(number, name, color, tuple(contours), left_out)


def _points(contour: Dataset, name: str) -> NDArray[np.float64]:
    """(N, 3) points of a contour, RAS+ mm."""
    from pydicom.dataelem import RawDataElement

    element: Any = contour.get_item("ContourData") if "ContourData" in contour else None
    try:
        if isinstance(element, RawDataElement):
            # pydicom makes an object of each number, which takes minutes for a large file.
            text = (element.value or b"").decode("ascii").rstrip("\0 ")
            numbers = np.array(text.split("\\") if text else [], dtype=np.float64)
        else:
            numbers = np.array([float(n) for n in (element.value if element is not None else ()) or ()])
    except ValueError:
        raise InputError(f"{name} has a contour that is not made of numbers; export the RTSTRUCT again") from None
    if numbers.size % 3 or not np.isfinite(numbers).all():
        raise InputError(
            f"{name} has a contour of {numbers.size} numbers, not three finite ones a point; the file is damaged: "
            "export it again"
        )
    points: NDArray[np.float64] = numbers.reshape(-1, 3) @ LPS_TO_RAS[:3, :3]
    return points


def write_rtstruct(
    path: Path,
    labels: Volume,
    structures: Sequence[Structure],
    series: Series,
    provenance: Provenance,
    probabilities: Mapping[int, tuple[Grid, LocalMap]] | None = None,
) -> None:
    """Write a label map as an RTSTRUCT on a series.

    Parameters
    ----------
    path : Path
        The file.
    labels : Volume
        The voxels of the series, in any array order.
    structures : sequence of Structure
        What to write: label values become ROI numbers. One without voxels is named and has no contours.
    series : Series
        Patient, study and frame of reference are its own.
    provenance : Provenance
        For the descriptions.
    probabilities : mapping of int to (Grid, LocalMap), optional
        For label values: the probability of being inside, and the grid it lies on (the voxels of the series in any
        array order). It moves contours between voxels, never across one's centre.

    Raises
    ------
    ValueError
        If the labels do not lie on the voxels of the series.
    """
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian

    data = labels.turned_to(series.grid).data
    boxes = label_boxes(data, structures)
    key = fingerprint(series, structures, provenance, data)
    dataset = pydicom.Dataset()
    copy_identity(series, dataset)
    dataset.SOPClassUID, dataset.SOPInstanceUID = STORAGE, new_uid("RTSTRUCT", key)
    dataset.SeriesInstanceUID = new_uid("RTSTRUCT series", key)
    dataset.Modality, dataset.Manufacturer, dataset.ManufacturerModelName = "RTSTRUCT", SOFTWARE, SOFTWARE
    dataset.SoftwareVersions = provenance.version
    dataset.SeriesNumber, dataset.OperatorsName = series_number(series, 1), ""
    dataset.SeriesDescription = f"{SOFTWARE} structures (not approved)"
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = provenance.date, provenance.time
    dataset.StructureSetLabel = SOFTWARE[:_LONGEST_LABEL]
    dataset.StructureSetName = f"{SOFTWARE} {provenance.version}"[:_LONGEST_NAME]
    dataset.StructureSetDescription = provenance.text
    dataset.StructureSetDate, dataset.StructureSetTime = provenance.date, provenance.time
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.ReferencedFrameOfReferenceSequence = [_frame_reference(series)]
    dataset.StructureSetROISequence, dataset.ROIContourSequence, dataset.RTROIObservationsSequence = [], [], []
    names = _unique_names(structures)
    for position, structure in enumerate(structures, start=1):
        roi = pydicom.Dataset()
        roi.ROINumber, roi.ReferencedFrameOfReferenceUID = structure.value, frame_of(series)
        roi.ROIName = names[structure.value]
        roi.ROIDescription = _description(provenance, structure.value)
        roi.ROIGenerationAlgorithm = "AUTOMATIC"
        roi.ROIGenerationDescription = f"{SOFTWARE} {provenance.version}, model {provenance.model}"[:_LONGEST_NAME]
        dataset.StructureSetROISequence.append(roi)
        drawn = pydicom.Dataset()
        drawn.ROIDisplayColor = list(structure.color)
        drawn.ReferencedROINumber = structure.value
        shape = None if probabilities is None else probabilities.get(structure.value)
        outlines = _outlines(data, structure.value, boxes.get(structure.value), series.grid, shape)
        contours = [_contour(points, series, k) for k, points in outlines]
        if contours:
            drawn.ContourSequence = contours
        dataset.ROIContourSequence.append(drawn)
        observed = pydicom.Dataset()
        observed.ObservationNumber, observed.ReferencedROINumber = position, structure.value
        observed.RTROIInterpretedType, observed.ROIInterpreter = "ORGAN", ""
        dataset.RTROIObservationsSequence.append(observed)
    dataset.file_meta = FileMetaDataset()
    # Contours of more than 65534 characters have no place in a file of explicit types.
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    with no_warnings():
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def _unique_names(structures: Sequence[Structure]) -> dict[int, str]:
    """Names in the length of the standard, each once."""
    names: dict[int, str] = {}
    for one in structures:
        name = one.name.replace("\\", "/")[:_LONGEST_NAME]
        if name in names.values():
            end = f" {one.value}"
            name = name[: _LONGEST_NAME - len(end)] + end
        names[one.value] = name
    return names


def _description(provenance: Provenance, value: int) -> str:
    verdict = provenance.descriptions.get(value, "")
    return f"{verdict}; {SOFTWARE} {provenance.version}, model {provenance.model}".removeprefix("; ")[:1024]


def _frame_reference(series: Series) -> Dataset:
    import pydicom

    referenced = pydicom.Dataset()
    referenced.SeriesInstanceUID = series.uid
    referenced.ContourImageSequence = []
    seen = set()
    for frame in series.frames:
        if frame.uid not in seen:
            seen.add(frame.uid)
            referenced.ContourImageSequence.append(_image_reference(frame.uid, frame.class_uid))
    study = pydicom.Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, study_of(series)
    study.RTReferencedSeriesSequence = [referenced]
    frame_of_reference = pydicom.Dataset()
    frame_of_reference.FrameOfReferenceUID = frame_of(series)
    frame_of_reference.RTReferencedStudySequence = [study]
    return frame_of_reference


def _image_reference(uid: str, class_uid: str, number: int | None = None) -> Dataset:
    import pydicom

    image = pydicom.Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = class_uid, uid
    if number is not None:
        image.ReferencedFrameNumber = number
    return image


def _outlines(
    data: NDArray[Any],
    value: int,
    found: tuple[slice, slice, slice] | None,
    grid: Grid,
    probability: tuple[Grid, LocalMap] | None,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Slice and points, (N, 3) RAS+ mm, of each contour of a label that lies in a box."""
    if found is None:
        return
    i, j, slices = found
    # One more voxel on each side, where there is one: the probability there places the contour.
    low = np.maximum((i.start - 1, j.start - 1), 0)
    high = np.minimum((i.stop + 1, j.stop + 1), grid.shape[:2])
    box = (slice(low[0], high[0]), slice(low[1], high[1]))
    shape = None
    if probability is not None:
        turned = _turned(probability[1], probability[0], grid)
        shape = turned.on_box((*low.tolist(), 0), (*high.tolist(), grid.shape[2]))
    for k in range(slices.start, slices.stop):
        for contour in trace(data[(*box, k)] == value, None if shape is None else shape[..., k]):
            ijk = np.column_stack([contour + low, np.full(len(contour), k)])
            yield k, grid.voxel_to_world(ijk)


def _turned(values: LocalMap, grid: Grid, to: Grid) -> LocalMap:
    """A field on one grid in the array order of another that has the same voxels."""
    from nibabel.orientations import apply_orientation

    orientation = grid.axes_relative_to(to)
    if orientation is None:
        raise ValueError("the probabilities do not lie on the voxels of the series")
    if values.is_empty:
        return values
    start = [0, 0, 0]
    for axis, (target, direction) in enumerate(orientation.astype(int).tolist()):
        start[target] = values.start[axis] if direction > 0 else grid.shape[axis] - values.stop[axis]
    return LocalMap((start[0], start[1], start[2]), apply_orientation(values.values, orientation))


def _contour(points: NDArray[np.float64], series: Series, k: int) -> Dataset:
    import pydicom
    from pydicom.charset import default_encoding
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    frame = series.frames[k]
    contour = pydicom.Dataset()
    several = sum(other.uid == frame.uid for other in series.frames[max(k - 1, 0) : k + 2]) > 1
    contour.ContourImageSequence = [_image_reference(frame.uid, frame.class_uid, frame.number + 1 if several else None)]
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(points)
    numbers = (points @ LPS_TO_RAS[:3, :3]).round(_DECIMALS) + 0.0
    text = "\\".join([f"{n:.{_DECIMALS}f}" for n in numbers.ravel().tolist()]).encode("ascii")
    text += b" " * (len(text) % 2)
    # As bytes: an object for each number takes minutes for a large set.
    tag = Tag("ContourData")
    contour[tag] = RawDataElement(tag, "DS", len(text), text, 0, True, True)
    contour.set_original_encoding(True, True, default_encoding)  # so that the bytes are written as they are
    return contour
