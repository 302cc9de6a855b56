"""Made-up DICOM series of known geometry, as awkward as those of clinics: any order, names, tilt and compression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, PositronEmissionTomographyImageStorage
from pydicom.valuerep import format_number_as_ds

from atlassegfm.core.geometry import Grid
from conftest import rotation

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
PATIENT = "CONFIDENTIAL-4711"
NAME = "Müller^Erika"
STUDY = "1.2.826.0.1.3680043.8.498.1"
SERIES = "1.2.826.0.1.3680043.8.498.2"
FRAME = "1.2.826.0.1.3680043.8.498.3"


def affine_of(columns_lps: NDArray[np.float64], first_lps: Sequence[float]) -> NDArray[np.float64]:
    """(4, 4) voxels to RAS+ mm from the steps along i, j, k and the first voxel in LPS."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns_lps, first_lps
    return np.asarray(LPS @ affine)


def tilted(degrees: float) -> NDArray[np.float64]:
    """Steps of a CT whose gantry is tilted: slices are turned, the table still moves along z. LPS."""
    turn = rotation(degrees, 0, 0)
    return np.column_stack([turn @ [0.7, 0, 0], turn @ [0, 1.1, 0], [0, 0, 3.0]])


#: Pixels that are not square in all of them, so that swapped spacings show.
AFFINES = {
    "axial": affine_of(np.diag([0.8, 1.3, 2.5]), (-20.0, -30.0, 7.0)),
    "oblique": affine_of(rotation(20, -15, 33) @ np.diag([0.8, 1.3, 2.5]), (5.5, -6.25, 70.0)),
    "sagittal": affine_of(np.array([[0, 0, 2.5], [0.8, 0, 0], [0, -1.3, 0]]), (-10.0, -30.0, 40.0)),
    "tilted": affine_of(tilted(18), (-12.0, 4.0, -100.0)),
    "feet first": affine_of(np.diag([-0.8, 1.3, -2.5]), (20.0, -30.0, 7.0)),
}


def write_series(
    folder: Path,
    data: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    modality: str = "CT",
    series_uid: str = SERIES,
    study_uid: str = STUDY,
    frame_uid: str = FRAME,
    patient_id: str = PATIENT,
    number: int = 3,
    description: str = "Thorax 2.5",
    slope: float | Callable[[int], float] = 1.0,
    intercept: float = -1024.0,
    skip: Sequence[int] = (),
    names: Callable[[int], str] = "IM{0:05d}".format,
    image_type: Sequence[str] = ("ORIGINAL", "PRIMARY", "AXIAL"),
    change: Callable[[pydicom.Dataset, int], None] | None = None,
    seed: int = 0,
) -> Path:
    """Write stored values (I, J, K) as one file a slice, in shuffled order and with image numbers that mean nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    shuffled = np.random.default_rng(seed).permutation(data.shape[2])
    for k in range(data.shape[2]):
        if k in skip:
            continue
        dataset = pydicom.Dataset()
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.SOPClassUID = CLASSES[modality]
        dataset.SOPInstanceUID = f"{series_uid}.{k + 1}"
        dataset.ImageType = list(image_type)
        dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "20260102", "101112", "A1"
        dataset.SeriesDate, dataset.ContentDate, dataset.SeriesTime, dataset.ContentTime = (
            *("20260102", "20260102"),
            *("101213", f"1012{k % 60:02d}"),
        )
        dataset.Modality, dataset.Manufacturer, dataset.ReferringPhysicianName = modality, "Maker", "Doctor^Who"
        dataset.SeriesDescription, dataset.StudyDescription = description, "Study"
        dataset.PatientName, dataset.PatientID = NAME, patient_id
        dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientPosition = "19500101", "F", "HFS"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (
            study_uid,
            series_uid,
            frame_uid,
        )
        dataset.StudyID, dataset.SeriesNumber, dataset.InstanceNumber = "1", number, int(shuffled[k]) + 1
        dataset.PositionReferenceIndicator = ""
        dataset.ImagePositionPatient = _numbers(lps[:3, 3] + k * lps[:3, 2])
        dataset.ImageOrientationPatient = _numbers([*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])])
        dataset.PixelSpacing = _numbers([spacing[1], spacing[0]])
        dataset.SliceThickness = _numbers([spacing[2]])[0]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        pixels = np.ascontiguousarray(data[:, :, k].T)
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
        dataset.RescaleSlope = _numbers([slope(k) if callable(slope) else slope])[0]
        dataset.RescaleIntercept = _numbers([intercept])[0]
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if change is not None:
            change(dataset, k)
        dataset.save_as(folder / names(int(shuffled[k])), enforce_file_format=True)
    return folder


def _numbers(values: Any) -> list[Any]:
    return [pydicom.valuerep.DSfloat(format_number_as_ds(float(value) + 0.0)) for value in values]


def scan_values(shape: tuple[int, int, int] = (24, 20, 9), *, seed: int = 0) -> NDArray[np.int16]:
    """Stored values, different in each voxel's neighbourhood."""
    random = np.random.default_rng(seed)
    return random.integers(0, 3000, shape).astype(np.int16)


def hard_labels(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Structures that are lost easily: with a hole and an island in it, at the border, of one voxel, two parts a slice.

    1 shell, 2 the island in its hole, 5 a box at the corner of the scan, 9 two parts, 12 a single voxel, 200 diagonal
    neighbours.
    """
    i, j, k = np.indices(shape)
    centre = np.array(shape) / 2
    radius = np.sqrt(((i - centre[0]) / (shape[0] / 2.2)) ** 2 + ((j - centre[1]) / (shape[1] / 2.2)) ** 2)
    middle = (k > 0) & (k < shape[2] - 1)
    labels = np.zeros(shape, np.uint8)
    labels[(radius < 0.85) & (radius > 0.5) & middle] = 1
    labels[(radius < 0.25) & middle] = 2
    labels[: shape[0] // 6, : shape[1] // 6, :] = 5
    for side in (slice(0, 3), slice(-3, None)):
        labels[side, -3:, 2:-2] = 9
    labels[-1, 0, 3] = 12
    labels[-2, 4, 4] = labels[-1, 5, 4] = 200
    return labels


def grid_of(data: NDArray[Any], affine: NDArray[np.float64]) -> Grid:
    """The truth, with k along the slices' normal as readers sort them."""
    grid = Grid(data.shape, affine)
    lps = LPS @ affine
    if np.cross(lps[:3, 0], lps[:3, 1]) @ lps[:3, 2] < 0:
        turned = affine.copy()
        turned[:3, 3] += (data.shape[2] - 1) * affine[:3, 2]
        turned[:3, 2] *= -1
        grid = Grid(data.shape, turned)
    return grid
