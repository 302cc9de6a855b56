"""RTSTRUCT: structures as closed contours on slices, read as a label map and written from one.

Reading: a voxel belongs to a structure if its centre is inside an odd number of its contours on the slice; contours
between slices count for the nearest one. Writing: contours run between the voxels at level 0.5 in the planes of the
slices, one for each hole.
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
from .files import LPS_TO_RAS, element_errors, items_of, no_warnings, read_dataset, text_of, value_of
from .identity import (
    LONGEST_NAME,
    SOFTWARE,
    Provenance,
    check_belongs,
    copy_identity,
    dataset_of,
    fingerprint,
    frame_of,
    new_uid,
    series_number,
    study_of,
)
from .series import Series
from .structures import EVERYTHING, Box, Color, Selection, StructureMask, label_boxes, merge

if TYPE_CHECKING:
    from pydicom import Dataset

STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
#: Types of contours that enclose an area; points and open lines do not.
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "")
#: Fractions of the slice distance: points of a contour this near to each other lie in one slice,
_IN_PLANE = 0.5
#: contours this near to each other are on one plane,
_SAME_PLANE = 0.02
#: planes this near to half way between slices count as half way.
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
    """Read an RTSTRUCT as a label map.

    Parameters
    ----------
    on
        The scan the contours were drawn on; patient and frame of reference are compared with a series only.
    selection
        Which structures; without one, all that have closed contours.

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
        modality = text_of(dataset, "Modality")
        kind = f"an object of modality {modality}" if modality else "another DICOM object"
        raise InputError(f"{path}: no RTSTRUCT but {kind}; expected structures")
    notes = check_belongs(path, on, **_references(dataset)) if isinstance(on, Series) else []
    grid = on.grid if isinstance(on, Series) else on
    with element_errors(path):
        rois = list(_read_rois(dataset, path))
    if not rois:
        raise InputError(f"{path}: the RTSTRUCT has no structures; export it again")
    order = selection.select([(roi.number, roi.name) for roi in rois], path)
    if not selection.wanted:
        bare = [rois[n].name for n in order if not rois[n].contours]
        if bare:
            notes.append(f"left out, as they have no closed contours: {listed(bare)}")
        order = [n for n in order if rois[n].contours]
        if not order:
            raise InputError(f"{path}: none of its {len(rois)} structures has closed contours; export it again")
    masks = []
    for roi in (rois[n] for n in order):
        if not roi.contours:
            raise InputError(f"{path}: the structure {roi.name!r} has no closed contours; leave it out of --structures")
        mask, roi_notes = _rasterise(roi, grid, path)
        masks.append(replace(mask, name=selection.renamed(mask.name)))
        notes += roi_notes
    return merge(masks, selection, on, path, notes)


def _rasterise(roi: _Roi, grid: Grid, path: Path) -> tuple[StructureMask, list[str]]:
    """Mark the voxels inside the contours of a structure, which lie in slices along any axis of the grid; and warn."""
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
    """The contours (positions in ``planes``) that count for each slice, and warnings."""
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
    """Refuse contours that leave the scan."""
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


def _references(dataset: Dataset) -> dict[str, Any]:
    """Collect what the structures refer to, as :func:`~.identity.check_belongs` takes it."""
    frames = items_of(dataset, "ReferencedFrameOfReferenceSequence")
    studies = [study for frame in frames for study in items_of(frame, "RTReferencedStudySequence")]
    series = [one for study in studies for one in items_of(study, "RTReferencedSeriesSequence")]
    images = [image for one in series for image in items_of(one, "ContourImageSequence")]
    rois = items_of(dataset, "StructureSetROISequence")
    return {
        "patient_id": text_of(dataset, "PatientID"),
        "frame_uids": {text_of(one, "FrameOfReferenceUID") for one in frames}
        | {text_of(roi, "ReferencedFrameOfReferenceUID") for roi in rois},
        "series_uids": {text_of(one, "SeriesInstanceUID") for one in series},
        "instance_uids": {text_of(image, "ReferencedSOPInstanceUID") for image in images},
    }


def _read_rois(dataset: Dataset, path: Path) -> Iterator[_Roi]:
    names: dict[int, str] = {}
    for roi in items_of(dataset, "StructureSetROISequence"):
        number = value_of(roi, "ROINumber")
        if number is None:
            raise InputError(f"{path}: a structure has no number; export the RTSTRUCT again")
        names[int(number)] = text_of(roi, "ROIName") or f"ROI {int(number)}"
    drawn: dict[int, Dataset] = {}
    for item in items_of(dataset, "ROIContourSequence"):
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
            for contour in items_of(drawn[number], "ContourSequence"):
                points = _points(contour, f"{path}: the structure {name!r}")
                if text_of(contour, "ContourGeometricType").upper() in _CLOSED and len(points) >= 3:
                    contours.append(points)
                else:
                    left_out += 1
        yield _Roi(number, name, color, tuple(contours), left_out)


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
    labels
        The voxels of the series, in any array order; patient, study and frame of reference are copied from it.
    structures
        What to write: label values become ROI numbers. One without voxels is named and has no contours.
    probabilities
        Probability of each label value, in [0, 1], and its grid (the voxels of the series in any array order). It moves
        contours between voxels, never across a voxel's centre.

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
    maker = f"{SOFTWARE} {provenance.version}, model {provenance.model}"
    dataset = dataset_of(
        SOPClassUID=STORAGE,
        SOPInstanceUID=new_uid("RTSTRUCT", key),
        SeriesInstanceUID=new_uid("RTSTRUCT series", key),
        Modality="RTSTRUCT",
        Manufacturer=SOFTWARE,
        ManufacturerModelName=SOFTWARE,
        SoftwareVersions=provenance.version,
        SeriesNumber=series_number(series, 1),
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
        ReferencedFrameOfReferenceSequence=[_frame_reference(series)],
        StructureSetROISequence=[],
        ROIContourSequence=[],
        RTROIObservationsSequence=[],
    )
    copy_identity(series, dataset)
    names = _unique_names(structures)
    for position, structure in enumerate(structures, start=1):
        value = structure.value
        dataset.StructureSetROISequence.append(
            dataset_of(
                ROINumber=value,
                ReferencedFrameOfReferenceUID=frame_of(series),
                ROIName=names[value],
                ROIDescription=provenance.describe(value, maker),
                ROIGenerationAlgorithm="AUTOMATIC",
                ROIGenerationDescription=maker[:LONGEST_NAME],
            )
        )
        drawn = dataset_of(ROIDisplayColor=list(structure.color), ReferencedROINumber=value)
        probability = None if probabilities is None else probabilities.get(value)
        outlines = _outlines(data, value, boxes.get(value), series.grid, probability)
        contours = [_contour(points, series, k) for k, points in outlines]
        if contours:
            drawn.ContourSequence = contours
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
    """Names as long as the standard allows, each once."""
    names: dict[int, str] = {}
    for one in structures:
        name = one.name.replace("\\", "/")[:LONGEST_NAME]
        if name in names.values():
            end = f" {one.value}"
            name = name[: LONGEST_NAME - len(end)] + end
        names[one.value] = name
    return names


def _frame_reference(series: Series) -> Dataset:
    images = {frame.uid: _image_reference(frame.uid, frame.class_uid) for frame in series.frames}
    referenced = dataset_of(SeriesInstanceUID=series.uid, ContourImageSequence=list(images.values()))
    study = dataset_of(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=study_of(series),
        RTReferencedSeriesSequence=[referenced],
    )
    return dataset_of(FrameOfReferenceUID=frame_of(series), RTReferencedStudySequence=[study])


def _image_reference(uid: str, class_uid: str, number: int | None = None) -> Dataset:
    image = dataset_of(ReferencedSOPClassUID=class_uid, ReferencedSOPInstanceUID=uid)
    if number is not None:
        image.ReferencedFrameNumber = number
    return image


def _outlines(
    data: NDArray[Any],
    value: int,
    found: Box | None,
    grid: Grid,
    probability: tuple[Grid, LocalMap] | None,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Slice and points, (N, 3) RAS+ mm, of each contour of a label within its box."""
    if found is None:
        return
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
    several = sum(other.uid == frame.uid for other in series.frames[max(k - 1, 0) : k + 2]) > 1
    contour = dataset_of(
        ContourImageSequence=[_image_reference(frame.uid, frame.class_uid, frame.number + 1 if several else None)],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
    )
    numbers = (points @ LPS_TO_RAS[:3, :3]).round(_DECIMALS) + 0.0
    text = "\\".join([f"{n:.{_DECIMALS}f}" for n in numbers.ravel().tolist()]).encode("ascii")
    text += b" " * (len(text) % 2)
    # As bytes: an object for each number takes minutes for a large set.
    tag = Tag("ContourData")
    contour[tag] = RawDataElement(tag, "DS", len(text), text, 0, True, True)
    contour.set_original_encoding(True, True, default_encoding)  # so that the bytes are written as they are
    return contour
