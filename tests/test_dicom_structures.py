"""RTSTRUCT and DICOM-SEG: written and read back, read as others write them, and validated by dciodvfy."""

from __future__ import annotations

import datetime
import logging
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from atlassegfm.core.errors import InputError, OutputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, label_boxes, label_positions
from atlassegfm.core.labels import Structure
from atlassegfm.core.mask import LocalMap
from atlassegfm.dicom import (
    EVERYTHING,
    Provenance,
    Selection,
    Series,
    check_round_trip,
    load_series,
    open_image,
    open_labels,
    read_rtstruct,
    read_segmentation,
    read_synonyms,
    series_of,
    structures_in,
    write_rtstruct,
    write_segmentation,
)
from atlassegfm.dicom.contours import fill, trace
from dicom_series import (
    AFFINES,
    FRAME,
    LPS,
    NAME,
    PATIENT,
    SERIES,
    affine_of,
    hard_labels,
    scan_values,
    tilted,
    write_series,
)

SHAPE = (40, 36, 9)
VALUES = (1, 2, 5, 9, 12, 200)
STRUCTURES = tuple(Structure(value, f"Organ {value} ä", (value, 255 - value, 30)) for value in VALUES)
WHEN = datetime.datetime(2026, 11, 23, 17, 45, 12)
PROVENANCE = Provenance("builtin", "5 of 6 found", {1: "good", 12: "absent: not found"}, WHEN)
WRITERS: dict[str, Callable[..., None]] = {"rtstruct": write_rtstruct, "seg": write_segmentation}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Volume]:
    """A scan for each awkward way of lying."""
    folder = tmp_path_factory.mktemp("scans")
    values = scan_values(SHAPE)
    return {kind: load_series(write_series(folder / kind, values, affine)) for kind, affine in AFFINES.items()}


@pytest.fixture
def scan(scans: dict[str, Volume]) -> Volume:
    return scans["axial"]


def of(volume: Volume) -> Series:
    series = series_of(volume)
    assert series is not None
    return series


def labels_on(volume: Volume) -> Volume:
    return Volume(hard_labels(volume.grid.shape), volume.grid)


# Contours of one slice


def test_fill_by_hand() -> None:
    square = np.array([[0.5, 0.5], [3.5, 0.5], [3.5, 2.5], [0.5, 2.5]])
    expected = np.zeros((6, 5), bool)
    expected[1:4, 1:3] = True
    assert np.array_equal(fill([square], (6, 5)), expected)
    assert np.array_equal(fill([square[::-1]], (6, 5)), expected)
    assert not fill([square, square], (6, 5)).any()
    assert np.array_equal(fill([square - [2, 0]], (6, 5))[:2, 1:3], np.ones((2, 2)))  # beyond the border
    triangle = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    assert fill([triangle], (6, 5)).sum() == 10  # centres on the left and lower edge are in, on the slanted one out


def test_structures_that_share_an_edge_share_no_voxel() -> None:
    left, right = (np.array([[a, 0.0], [a + 3, 0.0], [a + 3, 4.0], [a, 4.0]]) for a in (0, 3))
    one, other = fill([left], (8, 6)), fill([right], (8, 6))
    assert one.sum() == other.sum() == 12
    assert not (one & other).any()


def test_keyhole_contour_has_its_hole() -> None:
    outer = [[0.5, 0.5], [8.5, 0.5], [8.5, 8.5], [0.5, 8.5], [0.5, 4.0]]
    inner = [[3.5, 4.0], [3.5, 6.5], [6.5, 6.5], [6.5, 3.5], [3.5, 3.5], [3.5, 4.0]]
    mask = fill([np.array(outer + inner + [[0.5, 4.0]])], (10, 10))
    expected = np.zeros((10, 10), bool)
    expected[1:9, 1:9] = True
    expected[4:7, 4:7] = False
    assert np.array_equal(mask, expected)


def test_trace_and_fill_are_inverse() -> None:
    random = np.random.default_rng(0)
    for fraction in (0.02, 0.3, 0.5, 0.7, 1.0):
        mask = random.random((23, 31)) < fraction
        assert np.array_equal(fill(trace(mask), mask.shape), mask)
        probability = random.random(mask.shape).astype(np.float32)  # at odds with the mask nearly everywhere
        contours = trace(mask, probability)
        assert np.array_equal(fill(contours, mask.shape), mask)
        rounded = [contour.round(2) for contour in contours]
        assert np.array_equal(fill(rounded, mask.shape), mask)


def test_probability_places_the_contour() -> None:
    i = np.arange(20)
    edge = 12.3
    probability = np.clip(0.5 + (edge - i) / 4, 0, 1)[:, None].repeat(9, axis=1).astype(np.float32)
    contour = trace(probability >= 0.5, probability)[0]
    assert contour[:, 0].max() == pytest.approx(edge, abs=1e-3)
    assert trace(probability >= 0.5)[0][:, 0].max() == 12.5


def test_every_hole_is_a_contour_of_its_own() -> None:
    mask = np.ones((12, 12), bool)
    mask[2:4, 2:4] = mask[7:10, 5:9] = False
    mask[8, 6] = True
    assert len(trace(mask)) == 4


@pytest.mark.parametrize("large", [300, 70_000])
def test_positions_and_boxes_of_label_values(large: int) -> None:
    labels = np.zeros((5, 6, 7), np.uint32)
    labels[1:3, 2, 4] = large
    labels[4, 5, 6] = 8
    other = np.zeros_like(labels)
    other[0, 2, 5] = large
    assert np.array_equal(label_positions(labels, [large, 7]), labels == large)
    assert label_positions(labels, [7, 8, large]).max() == 3
    boxes = label_boxes([7, large], labels, other)
    assert boxes == {large: (slice(0, 3), slice(2, 3), slice(4, 6))}
    assert not label_positions(labels, []).any()


# Out and in again


@pytest.mark.parametrize("kind", AFFINES)
@pytest.mark.parametrize("form", WRITERS)
def test_round_trip_is_exact(form: str, kind: str, scans: dict[str, Volume], tmp_path: Path) -> None:
    scan, path = scans[kind], tmp_path / "out.dcm"
    labels = labels_on(scan)
    WRITERS[form](path, labels, STRUCTURES, of(scan), PROVENANCE)
    back = open_labels(path, scan)
    assert np.array_equal(back.data, labels.data)
    assert back.grid.matches(scan.grid)
    assert structures_in(back) == STRUCTURES
    found = check_round_trip(path, labels, STRUCTURES, of(scan))
    assert [one.dice for one in found] == [1.0] * len(VALUES)
    assert max(one.contour_error_mm for one in found) == 0
    assert [one.voxels for one in found] == [int((labels.data == value).sum()) for value in VALUES]


@pytest.mark.parametrize("form", WRITERS)
def test_dciodvfy_finds_no_error(form: str, scans: dict[str, Volume], tmp_path: Path) -> None:
    validator = shutil.which("dciodvfy")
    if validator is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    for kind, scan in scans.items():
        path = tmp_path / f"{kind}.dcm"
        WRITERS[form](path, labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
        said = subprocess.run([validator, str(path)], capture_output=True, text=True, check=False, timeout=60).stderr
        assert {"rtstruct": "RTStructureSet", "seg": "Segmentation"}[form] in said
        assert [line for line in said.splitlines() if line.startswith("Error")] == []


@pytest.mark.parametrize("form", WRITERS)
def test_labels_in_another_array_order(form: str, scan: Volume, tmp_path: Path) -> None:
    labels = labels_on(scan)
    path = tmp_path / "out.dcm"
    WRITERS[form](path, labels.canonical(), STRUCTURES, of(scan), PROVENANCE)
    assert np.array_equal(open_labels(path, scan).data, labels.data)


def test_contours_lie_where_the_standard_puts_pixels(scans: dict[str, Volume], tmp_path: Path) -> None:
    """Against the formula of part 3, C.7.6.2.1.1, written out for each contour by itself."""
    for kind, scan in scans.items():
        labels = labels_on(scan)
        path = tmp_path / f"{kind}.dcm"
        write_rtstruct(path, labels, STRUCTURES, of(scan), PROVENANCE)
        images = {
            (image := pydicom.dcmread(frame.path, stop_before_pixels=True)).SOPInstanceUID: (image, k)
            for k, frame in enumerate(of(scan).frames)
        }
        for item in pydicom.dcmread(path).ROIContourSequence:
            for contour in item.ContourSequence:
                image, k = images[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
                along, down = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
                between_rows, between_columns = (float(n) for n in image.PixelSpacing)
                offset = np.array(contour.ContourData, float).reshape(-1, 3) - np.array(image.ImagePositionPatient)
                column, row = offset @ along / between_columns, offset @ down / between_rows
                assert np.abs(offset @ np.cross(along, down)).max() < 1e-3
                # Half way between a voxel of the structure and its neighbour.
                ends = {
                    tuple(end)
                    for i, j in zip(column, row, strict=True)
                    for end in ((round(i - 0.01), round(j - 0.01)), (round(i + 0.01), round(j + 0.01)))
                }
                inside = [
                    labels.data[i, j, k] == item.ReferencedROINumber
                    for i, j in ends
                    if 0 <= i < SHAPE[0] and 0 <= j < SHAPE[1]
                ]
                assert any(inside)
                assert column.min() >= -0.51
                assert column.max() <= SHAPE[0] - 0.49


def test_structures_fill_their_true_volume(tmp_path: Path) -> None:
    """Area by the contours alone, in mm: swapped spacings would square the error and hide in a round trip."""
    values = scan_values((60, 40, 3))
    scan = load_series(write_series(tmp_path / "scan", values, affine_of(np.diag([0.5, 2.0, 3.0]), (0, 0, 0))))
    labels = Volume(np.zeros(scan.grid.shape, np.uint8), scan.grid)
    labels.data[10:50, 5:15, 1] = 1
    path = tmp_path / "out.dcm"
    write_rtstruct(path, labels, [Structure(1, "box", (1, 2, 3))], of(scan), PROVENANCE)
    contour = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence[0]
    points = np.array(contour.ContourData, float).reshape(-1, 3)
    assert np.ptp(points, axis=0) == pytest.approx([40 * 0.5, 10 * 2.0, 0])
    assert points.min(axis=0) == pytest.approx([9.5 * 0.5, 4.5 * 2.0, 3.0])


def test_probabilities_move_contours_and_no_voxel(scan: Volume, tmp_path: Path) -> None:
    i, j, k = np.indices(scan.grid.shape)
    distance = np.sqrt((0.8 * (i - 19)) ** 2 + (1.3 * (j - 17)) ** 2 + (2.5 * (k - 4)) ** 2)
    probability = np.clip(0.5 + (9.0 - distance) / 4, 0, 1).astype(np.float32)
    labels = Volume((probability >= 0.5).astype(np.uint8), scan.grid)
    canonical = Volume(probability, scan.grid).canonical()
    shapes = {1: (canonical.grid, LocalMap.from_full(canonical.data))}
    structure = [Structure(1, "ball", (1, 2, 3))]
    path = tmp_path / "out.dcm"
    errors = []
    for given in (None, shapes):
        write_rtstruct(path, labels, structure, of(scan), PROVENANCE, given)
        assert check_round_trip(path, labels, structure, of(scan))[0].dice == 1
        points = np.concatenate(
            [
                np.array(contour.ContourData, float).reshape(-1, 3)
                for contour in pydicom.dcmread(path).ROIContourSequence[0].ContourSequence
            ]
        )
        centre = (LPS @ [*scan.grid.voxel_to_world((19, 17, 4)), 1])[:3]
        errors.append(np.abs(np.linalg.norm(points - centre, axis=1) - 9.0).max())
    assert errors[1] < 0.2 < errors[0]


def test_what_objects_say(scan: Volume, tmp_path: Path) -> None:
    source = pydicom.dcmread(of(scan).frames[0].path)
    write_rtstruct(tmp_path / "rs.dcm", labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
    write_segmentation(tmp_path / "seg.dcm", labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
    structures, segments = (pydicom.dcmread(tmp_path / name) for name in ("rs.dcm", "seg.dcm"))
    for made in (structures, segments):
        for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientBirthDate", "AccessionNumber"):
            assert made[keyword].value == source[keyword].value
        assert str(made.PatientName) == NAME
        assert made.SeriesInstanceUID != source.SeriesInstanceUID
        assert made.SOPInstanceUID.startswith("2.25.")
        assert made.Manufacturer == "AtlasSegFM"
    assert len({structures.SeriesInstanceUID, segments.SeriesInstanceUID, structures.SOPInstanceUID}) == 3
    assert structures.ApprovalStatus == "UNAPPROVED"
    assert structures.StructureSetDescription.endswith("model builtin; 5 of 6 found; automatic, not approved")
    assert structures.StructureSetDate == "20261123"
    described = [roi.ROIDescription for roi in structures.StructureSetROISequence]
    assert described[0].startswith("good; AtlasSegFM ")
    assert described[4].startswith("absent: not found; ")
    assert segments.SegmentSequence[0].SegmentDescription == "good; not approved"
    assert segments.ContentDate == "20261123"


def test_numbers_have_at_most_16_characters(tmp_path: Path) -> None:
    affine = AFFINES["oblique"].copy()
    affine[:3, 3] += (-12345.678901, 23456.789012, -34567.890123)
    scan = load_series(write_series(tmp_path / "scan", scan_values(SHAPE), affine))
    path = tmp_path / "out.dcm"
    write_rtstruct(path, labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
    for item in pydicom.dcmread(path).ROIContourSequence:
        for contour in item.ContourSequence:
            raw = contour.get_item("ContourData").value.decode()
            assert max(len(number.strip()) for number in raw.split("\\")) <= 16
            assert "-0.0000\\" not in raw


@pytest.mark.parametrize("form", WRITERS)
def test_same_input_same_file_and_new_uids_else(form: str, scan: Volume, tmp_path: Path) -> None:
    def write(name: str, labels: Volume, provenance: Provenance) -> tuple[bytes, str]:
        WRITERS[form](tmp_path / name, labels, STRUCTURES, of(scan), provenance)
        return (tmp_path / name).read_bytes(), pydicom.dcmread(tmp_path / name).SOPInstanceUID

    labels = labels_on(scan)
    first, uid = write("a", labels, PROVENANCE)
    assert write("b", labels, PROVENANCE) == (first, uid)
    later = replace(PROVENANCE, when=WHEN + datetime.timedelta(seconds=1))
    changed = Volume(labels.data.copy(), labels.grid)
    changed.data[20, 20, 4] = 9
    others = {write("c", labels, later)[1], write("d", changed, PROVENANCE)[1]}
    assert len(others | {uid}) == 3


@pytest.mark.parametrize("form", WRITERS)
def test_structure_without_voxels_is_named(form: str, scan: Volume, tmp_path: Path) -> None:
    empty = Structure(77, "Missing", (9, 9, 9))
    path = tmp_path / "out.dcm"
    WRITERS[form](path, labels_on(scan), (*STRUCTURES, empty), of(scan), PROVENANCE)
    found = check_round_trip(path, labels_on(scan), (*STRUCTURES, empty), of(scan))
    assert (found[-1].voxels, found[-1].dice) == (0, 1.0)
    dataset = pydicom.dcmread(path)
    items = dataset.StructureSetROISequence if form == "rtstruct" else dataset.SegmentSequence
    assert "Missing" in [item.get("ROIName", item.get("SegmentLabel")) for item in items]
    with pytest.raises(InputError, match="Missing' has no (closed contours|voxel)"):
        open_labels(path, scan, Selection(("Missing",)))


def test_nothing_found_at_all(scan: Volume, tmp_path: Path) -> None:
    nothing = Volume(np.zeros(scan.grid.shape, np.uint8), scan.grid)
    write_rtstruct(tmp_path / "rs.dcm", nothing, STRUCTURES, of(scan), PROVENANCE)
    assert check_round_trip(tmp_path / "rs.dcm", nothing, STRUCTURES, of(scan))[0].dice == 1
    with pytest.raises(InputError, match="none of its 6 structures has closed contours"):
        open_labels(tmp_path / "rs.dcm", scan)
    with pytest.raises(InputError, match="a DICOM-SEG cannot be empty"):
        write_segmentation(tmp_path / "seg.dcm", nothing, STRUCTURES, of(scan), PROVENANCE)
    assert not (tmp_path / "seg.dcm").exists()


def test_long_and_double_names(scan: Volume, tmp_path: Path) -> None:
    name = "A very long name of a structure that goes on and on and on and on and on"
    structures = [Structure(1, name, (1, 1, 1)), Structure(2, name, (2, 2, 2))]
    write_rtstruct(tmp_path / "out.dcm", labels_on(scan), structures, of(scan), PROVENANCE)
    names = [roi.ROIName for roi in pydicom.dcmread(tmp_path / "out.dcm").StructureSetROISequence]
    assert names == [name[:64], name[:62] + " 2"]


def test_files_that_differ_are_refused(scan: Volume, tmp_path: Path) -> None:
    labels = labels_on(scan)
    for form, write in WRITERS.items():
        path = tmp_path / f"{form}.dcm"
        moved = Volume(np.roll(labels.data, 1, axis=0), labels.grid)
        write(path, moved, STRUCTURES, of(scan), PROVENANCE)
        with pytest.raises(OutputError, match=rf"{form}\.dcm: read back, structures differ .*Organ 1 ä \(0\.\d+\)"):
            check_round_trip(path, labels, STRUCTURES, of(scan))
    (tmp_path / "broken.dcm").write_bytes((tmp_path / "seg.dcm").read_bytes()[:9000])
    with pytest.raises(OutputError, match=r"broken\.dcm: what was written cannot be read back"):
        check_round_trip(tmp_path / "broken.dcm", labels, STRUCTURES, of(scan))


def test_contour_error_by_hand(scan: Volume, tmp_path: Path) -> None:
    labels = Volume(np.zeros(scan.grid.shape, np.uint8), scan.grid)
    labels.data[5:35, 5:30, 2:7] = 1
    written = Volume(labels.data.copy(), labels.grid)
    written.data[35:38, 10, 4] = 1  # three voxels of 0.8 mm too many
    structure = [Structure(1, "box", (1, 2, 3))]
    write_segmentation(tmp_path / "out.dcm", written, structure, of(scan), PROVENANCE)
    found = check_round_trip(tmp_path / "out.dcm", labels, structure, of(scan))[0]
    assert found.contour_error_mm == pytest.approx(2.4)
    assert found.dice == pytest.approx(2 * 3750 / (2 * 3750 + 3))
    assert found.to_dict()["contour_error_mm"] == 2.4


def test_highdicom_reads_the_segments(scans: dict[str, Volume], tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    scan = scans["oblique"]
    labels = labels_on(scan)
    write_segmentation(tmp_path / "seg.dcm", labels, STRUCTURES, of(scan), PROVENANCE)
    read = highdicom.seg.segread(tmp_path / "seg.dcm")
    for number, structure in enumerate(STRUCTURES, start=1):
        volume = read.get_volume(segment_numbers=[number], combine_segments=True)
        where = np.argwhere(volume.array)
        world = where @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        ijk = np.rint(scan.grid.world_to_voxel(world * (-1, -1, 1))).astype(int)
        expected = np.argwhere(labels.data == structure.value)
        assert sorted(map(tuple, ijk)) == sorted(map(tuple, expected))


@pytest.mark.parametrize("form", WRITERS)
def test_series_with_bare_headers(form: str, tmp_path: Path) -> None:
    def bare(dataset: pydicom.Dataset, _: int) -> None:
        for keyword in ("FrameOfReferenceUID", "StudyInstanceUID", "PatientName", "PatientID", "PatientBirthDate"):
            delattr(dataset, keyword)
        for keyword in (
            "StudyID",
            "StudyDate",
            "AccessionNumber",
            "SeriesNumber",
            "PatientSex",
            "SpecificCharacterSet",
        ):
            delattr(dataset, keyword)

    scan = load_series(write_series(tmp_path / "scan", scan_values(SHAPE), AFFINES["oblique"], change=bare))
    path = tmp_path / "out.dcm"
    WRITERS[form](path, labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
    assert np.array_equal(open_labels(path, scan).data, labels_on(scan).data)
    made = pydicom.dcmread(path)
    assert made.StudyInstanceUID.startswith("2.25.")
    assert made.FrameOfReferenceUID.startswith("2.25.")


@pytest.mark.parametrize("form", WRITERS)
def test_multi_frame_series(form: str, tmp_path: Path) -> None:
    from test_dicom_series import _enhanced

    source = write_series(tmp_path / "scan", scan_values(SHAPE), AFFINES["tilted"])
    (tmp_path / "enhanced").mkdir()
    _enhanced(source).save_as(tmp_path / "enhanced" / "all.dcm", enforce_file_format=True)
    scan = load_series(tmp_path / "enhanced")
    path = tmp_path / "out.dcm"
    WRITERS[form](path, labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
    assert np.array_equal(open_labels(path, scan).data, labels_on(scan).data)
    if form == "rtstruct":
        k = {frame.number + 1: k for k, frame in enumerate(of(scan).frames)}
        for contour in pydicom.dcmread(path).ROIContourSequence[0].ContourSequence:
            number = contour.ContourImageSequence[0].ReferencedFrameNumber
            lps = np.array(contour.ContourData[:3], float)
            assert scan.grid.world_to_voxel(lps * (-1, -1, 1))[2] == pytest.approx(k[number], abs=1e-3)


@pytest.mark.slow
def test_speed(tmp_path: Path) -> None:
    """300 slices of 512 x 512 read in 5 s, 20 structures written as RTSTRUCT in 20 s: seconds of one core."""
    values = np.random.default_rng(0).integers(0, 3000, (512, 512, 300)).astype(np.int16)
    folder = write_series(tmp_path / "scan", values, affine_of(np.diag([0.8, 0.8, 1.0]), (-200, -200, 0)))
    start = time.process_time()
    scan = open_image(folder)
    assert time.process_time() - start < 5
    labels = Volume(np.zeros(scan.grid.shape, np.uint8), scan.grid)
    i, j, k = np.ogrid[:512, :512, :300]
    for n, (a, b, c, radius) in enumerate(
        np.random.default_rng(1).uniform((90, 90, 90, 30), (410, 410, 210, 90), (20, 4))
    ):
        labels.data[(i - a) ** 2 + (j - b) ** 2 + (k - c) ** 2 < radius**2] = n + 1
    structures = [Structure(n, f"Organ {n}", (n, n, n)) for n in range(1, 21)]
    start = time.process_time()
    write_rtstruct(tmp_path / "rs.dcm", labels, structures, of(scan), PROVENANCE)
    assert time.process_time() - start < 20
    assert min(one.dice for one in check_round_trip(tmp_path / "rs.dcm", labels, structures, of(scan))) == 1


# RTSTRUCTs of other programs


def made_rtstruct(
    path: Path,
    rois: dict[str, list[NDArray[np.float64]]],
    *,
    grid: Grid,
    frame: str = FRAME,
    series: str = SERIES,
    patient: str = PATIENT,
    kinds: str = "CLOSED_PLANAR",
    first_number: int = 1,
) -> Path:
    """Contours given in voxels, (N, 3), as an RTSTRUCT as small as it can be."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.3.9"
    dataset.Modality, dataset.PatientID, dataset.SeriesInstanceUID = "RTSTRUCT", patient, "1.2.3.8"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    referenced, study, one = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    one.SeriesInstanceUID = series
    study.RTReferencedSeriesSequence = [one]
    referenced.RTReferencedStudySequence = [study]
    if frame:
        referenced.FrameOfReferenceUID = frame
    dataset.ReferencedFrameOfReferenceSequence = [referenced] if frame or series else []
    for number, (name, contours) in enumerate(rois.items(), start=first_number):
        roi, drawn = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName = number, name
        drawn.ReferencedROINumber, drawn.ROIDisplayColor = number, [10, 20, 30 + number]
        drawn.ContourSequence = []
        for points in contours:
            contour = pydicom.Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kinds, len(points)
            lps = grid.voxel_to_world(points) * (-1, -1, 1)
            contour.ContourData = [f"{value:.4f}" for value in lps.ravel()]
            drawn.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def box(i: tuple[float, float], j: tuple[float, float], k: float) -> NDArray[np.float64]:
    """A rectangle in voxels, at the outer edges of the voxels first to last."""
    (a, b), (c, d) = (i[0] - 0.5, i[1] + 0.5), (j[0] - 0.5, j[1] + 0.5)
    return np.array([[a, c, k], [b, c, k], [b, d, k], [a, d, k]])


def boxes(i: tuple[float, float], j: tuple[float, float], slices: Any) -> list[NDArray[np.float64]]:
    return [box(i, j, k) for k in slices]


def test_holes_and_several_contours(scan: Volume, tmp_path: Path) -> None:
    contours = [box((2, 20), (2, 20), 3), box((5, 10), (6, 12), 3), box((7, 8), (8, 9), 3), box((25, 30), (3, 9), 3)]
    path = made_rtstruct(tmp_path / "rs.dcm", {"Organ": contours}, grid=scan.grid)
    expected = np.zeros(SHAPE, np.uint8)
    expected[2:21, 2:21, 3] = 1
    expected[5:11, 6:13, 3] = 0
    expected[7:9, 8:10, 3] = 1
    expected[25:31, 3:10, 3] = 1
    volume = open_labels(path, scan)
    assert np.array_equal(volume.data, expected)
    assert structures_in(volume) == (Structure(1, "Organ", (10, 20, 31)),)


def test_contours_between_slices(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rois = {"Off": boxes((5, 9), (5, 9), [2.3, 3.3, 4.3]), "Fine": boxes((15, 19), (5, 9), np.arange(2, 5, 0.25))}
    rois["Fine"][4] = box((15, 25), (5, 9), 3.0)
    path = made_rtstruct(tmp_path / "rs.dcm", rois, grid=scan.grid)
    with caplog.at_level(logging.WARNING):
        data = open_labels(path, scan).data
    assert np.array_equal(np.unique(np.argwhere(data == 1)[:, 2]), [2, 3, 4])
    assert (data == 1).sum() == 3 * 25
    assert (data[15:26, 5:10, 3] == 2).all()  # the one on the slice counts, not its neighbours
    assert "Off: contours of 3 planes lie between slices, up to 0.75 mm off; they count for the nearest" in caplog.text
    assert "Fine: 8 contours are left out, as others lie nearer to the same slice" in caplog.text


def test_contours_half_way_between_slices_stay_apart(scan: Volume, tmp_path: Path) -> None:
    for shift in (0.5, 0.49996, 0.50004):
        rois = {"Half": boxes((5, 9), (5, 9), np.arange(-1, 8) + shift)}
        data = open_labels(made_rtstruct(tmp_path / "rs.dcm", rois, grid=scan.grid), scan).data
        assert (data[5:10, 5:10] == 1).all(axis=(0, 1)).sum() >= 8
        assert (data == 1).sum() % 25 == 0


def test_slices_without_contours_are_warnings(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = made_rtstruct(tmp_path / "rs.dcm", {"Gaps": boxes((5, 9), (5, 9), [2, 4, 6])}, grid=scan.grid)
    with caplog.at_level(logging.WARNING):
        open_labels(path, scan)
    assert "Gaps: 2 slices" in caplog.text


def test_single_empty_slices_are_interpolated(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Slices 0, 2, 5 and 7 of a frustum: 1 and 6 are filled half way, the gap of two between 2 and 5 is not."""
    contours = [box((5.5 + k, 30.5 - k), (4.5 + k, 24.5 - k), k) for k in (0, 2, 5, 7)]
    path = made_rtstruct(tmp_path / "rs.dcm", {"Frustum": contours}, grid=scan.grid)
    with caplog.at_level(logging.WARNING):
        filled = open_labels(path, scan, Selection(interpolate=True)).data
    assert [bool(filled[:, :, k].any()) for k in range(9)] == [True, True, True, False, False, True, True, True, False]

    def sides(k: int) -> NDArray[np.int64]:
        return np.array([(found.min(), found.max()) for found in np.nonzero(filled[:, :, k])])

    for k in (1, 6):
        assert np.abs(sides(k) - (sides(k - 1) + sides(k + 1)) / 2).max() <= 1
        assert (sides(k) != sides(k - 1)).any()
    assert caplog.text.count("2 slices") == 2


def test_points_and_open_lines_are_warnings(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = made_rtstruct(tmp_path / "rs.dcm", {"Isocentre": [np.array([[3.0, 3, 3]])]}, grid=scan.grid, kinds="POINT")
    with pytest.raises(InputError, match="none of its 1 structures has closed contours"):
        open_labels(path, scan)
    with pytest.raises(InputError, match="'Isocentre' has no closed contours; leave it out of --structures"):
        open_labels(path, scan, Selection(("iso*",)))
    rois = {"Organ": [box((2, 9), (2, 9), 3), np.array([[3.0, 3, 3]])], "Isocentre": [np.array([[3.0, 3, 3]])]}
    with caplog.at_level(logging.WARNING):
        volume = open_labels(made_rtstruct(tmp_path / "two.dcm", rois, grid=scan.grid), scan)
    assert np.unique(volume.data).tolist() == [0, 1]
    assert "Organ: 1 points or open lines are left out" in caplog.text
    assert "left out, as they have no closed contours: Isocentre" in caplog.text


def test_structures_of_one_name_are_told_apart(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rois = {"Liver": boxes((5, 9), (5, 9), [2]), "liver": boxes((15, 19), (5, 9), [2])}
    with caplog.at_level(logging.WARNING):
        volume = open_labels(made_rtstruct(tmp_path / "rs.dcm", rois, grid=scan.grid), scan)
    assert [one.name for one in structures_in(volume)] == ["Liver", "liver (2)"]
    assert "liver (2)" in caplog.text


def test_overlapping_structures(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rois = {"Body": boxes((1, 30), (1, 30), range(2, 6)), "PTV": boxes((5, 9), (5, 9), range(3, 5))}
    path = made_rtstruct(tmp_path / "rs.dcm", rois, grid=scan.grid)
    with pytest.raises(InputError, match=r"rs\.dcm: structures overlap: Body and PTV \(50 voxels\); .*--overlap"):
        open_labels(path, scan)
    assert (open_labels(path, scan, Selection(("PTV",))).data == 2).sum() == 50
    with caplog.at_level(logging.WARNING):
        data = open_labels(path, scan, Selection(overlap="last")).data
    assert "overlapping voxels go to the last structure: Body and PTV (50 voxels)" in caplog.text
    assert (data == 2).sum() == 50
    with pytest.raises(InputError, match="nothing is left of PTV, as others lie over it"):
        open_labels(path, scan, Selection(overlap="first"))
    assert (open_labels(path, scan, Selection(("PTV", "Body"), overlap="first")).data == 2).sum() == 50
    with pytest.raises(InputError, match="unknown rule 'best' for overlaps; expected one of refuse, first, last"):
        Selection(overlap="best")  # type: ignore[arg-type]


def test_selection_and_synonyms(scan: Volume, tmp_path: Path) -> None:
    names = ("Brain Stem", "OpticNerve_L", "OpticNerve_R", "Chiasm", "BODY")
    rois = {name: boxes((2 + 6 * n, 4 + 6 * n), (5, 9), range(2, 6)) for n, name in enumerate(names)}
    path = made_rtstruct(tmp_path / "rs.dcm", rois, grid=scan.grid)
    table = tmp_path / "names.toml"
    table.write_text('Brainstem = ["brain stem", "BrStem*"]\nOpticNrv_L = "OpticNerve_L"\nOpticChiasm = ["chiasm"]\n')
    synonyms = read_synonyms(table)
    picked = open_labels(path, scan, Selection(("brainstem", "OpticNerve_*", "4"), synonyms))
    assert [(one.value, one.name) for one in structures_in(picked)] == [
        (1, "Brainstem"),
        (2, "OpticNrv_L"),
        (3, "OpticNerve_R"),
        (4, "OpticChiasm"),
    ]
    message = r"rs\.dcm: no structure 'Brainstm'; the nearest are Brain Stem.*: choose with --structures"
    with pytest.raises(InputError, match=message):
        open_labels(path, scan, Selection(("Brainstm",)))
    with pytest.raises(InputError, match=r"no structure 'xyzzy'; there are BODY, Brain Stem, Chiasm, OpticNerve_L"):
        open_labels(path, scan, Selection(("xyzzy",)))
    both = Selection(synonyms={"OpticNrv": ["OpticNerve_*"]})
    with pytest.raises(InputError, match="'OpticNerve_L' and 'OpticNerve_R' are both 'OpticNrv' by the synonyms"):
        open_labels(path, scan, both)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A = [", "not valid TOML"),
        ("A = 3", r"A is 3; expected a list of names, as Brainstem"),
        ('A = ["x"]\nB = ["X"]', "'x' stands for both A and B; expected one of them"),
    ],
)
def test_bad_synonyms(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_synonyms(path)
    with pytest.raises(InputError, match=r"none\.toml: no such file; expected .*synonyms"):
        read_synonyms(tmp_path / "none.toml")


def test_numbers_that_are_no_label_values(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rois = {"Zero": boxes((2, 4), (5, 9), range(2, 6)), "One": boxes((12, 14), (5, 9), range(2, 6))}
    path = made_rtstruct(tmp_path / "rs.dcm", rois, grid=scan.grid, first_number=0)
    with caplog.at_level(logging.WARNING):
        volume = open_labels(path, scan)
    assert [(one.value, one.name) for one in structures_in(volume)] == [(1, "One"), (2, "Zero")]
    assert "numbers that cannot be label values were changed: Zero (0 to 2)" in caplog.text


def test_another_patient_frame_or_series(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rois = {"Organ": boxes((5, 9), (5, 9), [2, 3])}

    def made(**options: str) -> Path:
        return made_rtstruct(tmp_path / "rs.dcm", rois, grid=scan.grid, **options)

    with pytest.raises(InputError, match=r"rs\.dcm: has another patient ID than .*axial") as error:
        open_labels(made(patient="SOMEBODY ELSE"), scan)
    assert "SOMEBODY" not in str(error.value)
    assert PATIENT not in str(error.value)
    with pytest.raises(InputError, match=r"lies in another frame of reference than .*axial"):
        open_labels(made(frame="1.2.3"), scan)
    with pytest.raises(InputError, match=r"was drawn on another series, of no known frame of reference"):
        open_labels(made(frame="", series="1.2.3"), scan)
    with caplog.at_level(logging.WARNING):
        open_labels(made(series="1.2.3"), scan)
        assert "was drawn on another series in the same frame of reference" in caplog.text
        open_labels(made(frame="", series=""), scan)
        assert "it does not say which scan it belongs to: that is not checked" in caplog.text
        caplog.clear()
        open_labels(made(), scan)
    assert caplog.text == ""


def test_segments_of_another_patient(scans: dict[str, Volume], tmp_path: Path) -> None:
    scan = scans["axial"]
    path = tmp_path / "seg.dcm"
    write_segmentation(path, labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
    with pytest.raises(InputError, match="another patient ID"):
        read_segmentation(path, replace(of(scan), patient_id="other"))
    with pytest.raises(InputError, match="lies in another frame of reference"):
        read_segmentation(path, replace(of(scan), frame_uid="1.2"))
    with pytest.raises(InputError, match=r"its voxels \(.*\) are not those of the scan"):
        read_segmentation(path, scans["oblique"].grid)
    with pytest.raises(InputError, match="the segment 'Organ 5 ä' reaches out of the scan"):
        read_segmentation(path, scan.grid.crop((2, 0, 0), SHAPE))


def test_contours_outside_the_scan(scan: Volume, tmp_path: Path) -> None:
    def made(contours: list[NDArray[np.float64]]) -> Path:
        return made_rtstruct(tmp_path / "rs.dcm", {"Organ": contours}, grid=scan.grid)

    with pytest.raises(InputError, match=r"'Organ' reaches 7\.5 mm out of the scan"):
        open_labels(made(boxes((5, 9), (5, 9), range(5, 12))), scan)
    with pytest.raises(InputError, match=r"'Organ' reaches 4\.0 mm out of the scan"):
        open_labels(made(boxes((30, 44), (5, 9), [3, 4])), scan)
    inside = open_labels(made(boxes((30, 39.6), (5, 9), [3, 4])), scan)  # on the outside of border pixels
    assert (inside.data == 1).sum() == 2 * 10 * 5
    upright = np.array([[5.0, 5, 1], [9, 5, 1], [9, 5, 7], [5, 5, 7]])
    crooked = upright + [[0, 0, 0], [0, 3, 0], [0, 6, 0], [0, 3, 0]]
    with pytest.raises(InputError, match="contours of 'Organ' do not lie in slices"):
        open_labels(made([crooked + [[0, 0, 0], [4, 0, 0], [0, 0, 0], [0, 0, 0]]]), scan)


def test_tilted_contours_stay_in_their_slices(tmp_path: Path) -> None:
    scan = load_series(write_series(tmp_path / "scan", scan_values(SHAPE), affine_of(tilted(25), (3.0, 4.0, 5.0))))
    path = made_rtstruct(tmp_path / "rs.dcm", {"Organ": boxes((5, 9), (10, 30), range(9))}, grid=scan.grid)
    data = open_labels(path, scan).data
    assert (data[5:10, 10:31, :] == 1).all()
    assert (data == 1).sum() == 5 * 21 * 9


def test_damaged_rtstructs(scan: Volume, tmp_path: Path) -> None:
    path = made_rtstruct(tmp_path / "rs.dcm", {"Organ": boxes((5, 9), (5, 9), [2, 3])}, grid=scan.grid)
    dataset = pydicom.dcmread(path)
    dataset.ROIContourSequence[0].ContourSequence[0].ContourData = [1.0, 2.0, 3.0, 4.0]
    dataset.save_as(path)
    with pytest.raises(InputError, match="a contour of 'Organ' does not have three numbers a point"):
        open_labels(path, scan)
    dataset.ROIContourSequence[0].ReferencedROINumber = 99
    dataset.save_as(path)
    with pytest.raises(InputError, match="contours belong to no structure"):
        open_labels(path, scan)
    del dataset.StructureSetROISequence
    dataset.ROIContourSequence = []
    dataset.save_as(path)
    with pytest.raises(InputError, match="none of its 0 structures has closed contours"):
        open_labels(path, scan)


def test_truncated_rtstruct_and_seg(scan: Volume, tmp_path: Path) -> None:
    for form, write in WRITERS.items():
        path = tmp_path / f"{form}.dcm"
        write(path, labels_on(scan), STRUCTURES, of(scan), PROVENANCE)
        content = path.read_bytes()
        for fraction in (0.1, 0.5, 0.9, 0.99):
            path.write_bytes(content[: int(fraction * len(content))])
            with pytest.raises(InputError, match=rf"{form}\.dcm: "):
                open_labels(path, scan)


def test_files_that_hold_no_structures(scan: Volume, tmp_path: Path) -> None:
    image = of(scan).frames[0].path
    with pytest.raises(InputError, match="a DICOM image or another object; expected an RTSTRUCT or DICOM-SEG"):
        open_labels(image, scan)
    with pytest.raises(InputError, match="modality is CT; expected an RTSTRUCT"):
        read_rtstruct(image, of(scan))
    with pytest.raises(InputError, match="modality is CT; expected a DICOM-SEG"):
        read_segmentation(image, of(scan))
    with pytest.raises(InputError, match="a folder of DICOM files; expected one RTSTRUCT or DICOM-SEG file"):
        open_labels(image.parent, scan)
    path = made_rtstruct(tmp_path / "rs.dcm", {"Organ": boxes((5, 9), (5, 9), [2, 3])}, grid=scan.grid)
    with pytest.raises(InputError, match="holds contours, no voxels; give the scan they were drawn on as well"):
        open_labels(path)


# SEGs of other programs, and scans that are no series


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
def test_other_kinds_of_segments(kind: str, scan: Volume, tmp_path: Path) -> None:
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    labels = (labels_on(scan).data == 1) + 2 * (labels_on(scan).data == 2).astype(np.uint8)
    pixels: Any = labels.transpose(2, 1, 0).astype(np.uint8)
    if kind == "FRACTIONAL":
        pixels = np.stack([pixels == 1, pixels == 2], axis=-1) * 0.75
    described = [SegmentDescription(n, f"part {n}", codes.SCT.Organ, codes.SCT.Organ, "MANUAL") for n in (1, 2)]
    Segmentation(
        [pydicom.dcmread(frame.path) for frame in of(scan).frames],
        pixels,
        kind,
        described,
        *("1.2.3.4", 5, "1.2.3.5", 1, "maker", "model", "1", "2"),
    ).save_as(tmp_path / "seg.dcm")
    volume = open_labels(tmp_path / "seg.dcm", scan)
    assert np.array_equal(volume.data, labels)
    assert [one.name for one in structures_in(volume)] == ["part 1", "part 2"]


def test_segments_alone_and_on_other_array_orders(scans: dict[str, Volume], tmp_path: Path) -> None:
    for kind, scan in scans.items():
        labels = labels_on(scan)
        path = tmp_path / f"{kind}.dcm"
        write_segmentation(path, labels, STRUCTURES, of(scan), PROVENANCE)
        assert np.array_equal(open_labels(path).data, labels.data)
        canonical = Volume(scan.data, scan.grid).canonical()
        assert np.array_equal(open_labels(path, canonical).data, labels.canonical().data)
        # Frames of one structure in the middle of the scan alone.
        some = open_labels(path, None, Selection(("2",)))
        assert np.array_equal(
            some.grid.voxel_to_world(np.argwhere(some.data)).mean(axis=0).round(3),
            (labels.grid.voxel_to_world(np.argwhere(labels.data == 2)).mean(axis=0).round(3)),
        )


def test_contours_on_a_converted_scan(scans: dict[str, Volume], tmp_path: Path) -> None:
    for kind, scan in scans.items():
        path = tmp_path / f"{kind}.dcm"
        labels = labels_on(scan)
        write_rtstruct(path, labels, STRUCTURES, of(scan), PROVENANCE)
        canonical = Volume(scan.data, scan.grid).canonical()
        assert np.array_equal(open_labels(path, canonical, EVERYTHING).data, labels.canonical().data)


def test_converted_scan_is_a_warning(scan: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = made_rtstruct(tmp_path / "rs.dcm", {"Organ": boxes((5, 9), (5, 9), [2, 3])}, grid=scan.grid)
    with caplog.at_level(logging.WARNING):
        open_labels(path, Volume(scan.data, scan.grid))
    assert "patient and frame of reference are not checked" in caplog.text
