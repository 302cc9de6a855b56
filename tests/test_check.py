"""Every finding of a check, on a file that has it, and none on files that are sound."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from atlassegfm.atlas import Atlas
from atlassegfm.check import check_files
from atlassegfm.check.findings import Check, FileReport, Finding
from atlassegfm.cli.check import as_table
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError, RegistrationError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_image, load_labels, save_volume
from atlassegfm.core.labels import Structure
from atlassegfm.jobs.work import warnings_on
from atlassegfm.quality.mirror import fit_to_atlas, is_inverted
from atlassegfm.registration import affine
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from conftest import SHEARED, affine_of, rotation
from scenes import ATLAS, BODY_RADII, STRUCTURES, Patient, straight_grid

WELL = affine_of(np.diag([1.5, 2.0, 4.0]), (-20.0, 30.0, 7.0))
SHAPE = (30, 28, 20)
LIVER = (Structure(1, "liver", (200, 80, 60)), Structure(2, "spleen", (10, 20, 255)))


def scan_data(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    data = np.random.default_rng(0).integers(0, 500, shape).astype(np.int16)
    data[tuple(slice(n // 4, None) for n in shape)] += 1000
    return data


def label_data(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    data = np.zeros(shape, np.uint8)
    data[5:15, 5:15, 5:15] = 1
    data[18:25, 8:20, 6:12] = 2
    return data


def nifti(path: Path, data: Any, affine: Any = WELL, *, sform: int = 1, qform: int = 1) -> Path:
    image = nib.Nifti1Image(np.asarray(data), affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nib.save(image, path)
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return nifti(tmp_path / "scan.nii.gz", scan_data())


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.nii.gz"
    save_volume(Volume(label_data(), Grid(SHAPE, WELL)), path, structures=LIVER)
    return path


def only(path: Path) -> FileReport:
    (report,) = check_files([path]).files
    return report


def finding(report: Any, words: str) -> Finding:
    found = [one for one in report.findings if words in one.text]
    assert len(found) == 1, report.findings
    return found[0]


def terminal(result: Check, width: int = 400) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(as_table(result))
    return out.getvalue()


def test_a_scan_that_is_well(scan: Path) -> None:
    report = only(scan)
    assert report.findings == ()
    assert (report.name, report.kind) == ("scan.nii.gz", "scan")
    assert report.shape == SHAPE
    assert report.spacing_mm == pytest.approx((1.5, 2, 4))
    assert report.axes == "RAS"
    assert report.oblique_deg == pytest.approx(0, abs=1e-3)
    assert report.sheared_deg == pytest.approx(0, abs=1e-3)
    assert report.stored_type == "int16"
    assert (report.sform_code, report.qform_code) == (1, 1)
    data = scan_data()
    assert report.value_range == (data.min(), data.max())
    assert report.percentiles == pytest.approx(np.percentile(data, (1, 50, 99)))
    assert check_files([scan]).worst is None


def test_labels_that_are_well(labels: Path) -> None:
    report = only(labels)
    assert report.kind == "labels"
    assert report.findings == ()
    assert report.percentiles == ()
    one, two = report.labels
    assert (one.value, one.name, one.voxels, one.parts, one.stray) == (1, "liver", 1000, 1, 0)
    assert one.volume_ml == pytest.approx(1000 * 1.5 * 2 * 4 / 1000)
    assert (two.value, two.name, two.voxels) == (2, "spleen", 7 * 12 * 6)


def test_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "scan.mha"
    image = sitk.GetImageFromArray(scan_data())
    image.SetSpacing((2, 2, 2))
    sitk.WriteImage(image, str(path))
    report = only(path)
    assert (report.kind, report.axes, report.sform_code, report.qform_code) == ("scan", "LPS", None, None)
    assert report.findings == ()


class TestRefused:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        result = check_files([tmp_path / "gone.nii"])
        (report,) = result.files
        assert report.kind == "unreadable"
        assert report.findings == (Finding("error", "no such file; check the path"),)
        assert result.worst == "error"
        assert str(tmp_path) not in json.dumps(result.to_dict())

    def test_a_folder(self, tmp_path: Path) -> None:
        assert "a folder" in finding(only(tmp_path), "expected a file ending in").text

    def test_a_damaged_file_among_good_ones(self, scan: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.nii.gz"
        broken.write_bytes(scan.read_bytes()[:2000])
        result = check_files([broken, scan])
        assert [report.kind for report in result.files] == ["unreadable", "scan"]
        assert finding(result.files[0], "truncated or damaged").severity == "error"
        assert result.pairs == ()

    def test_four_dimensions(self, tmp_path: Path) -> None:
        report = only(nifti(tmp_path / "bold.nii", scan_data((6, 6, 6, 4))))
        assert finding(report, "4 dimensions (6 x 6 x 6 x 4)").severity == "error"


class TestHeader:
    def test_no_orientation(self, tmp_path: Path) -> None:
        report = only(nifti(tmp_path / "a.nii", scan_data(), sform=0, qform=0))
        one = finding(report, "no orientation")
        assert one.severity == "warning"
        assert "left and right may be swapped" in one.text
        assert "DICOM" in one.remedy
        assert (report.sform_code, report.qform_code) == (0, 0)

    def test_sform_and_qform_differ(self, tmp_path: Path) -> None:
        image = nib.Nifti1Image(scan_data(), WELL)
        image.set_sform(WELL, 1)
        shifted = WELL.copy()
        shifted[0, 3] += 10
        image.set_qform(shifted, 1)
        nib.save(image, tmp_path / "a.nii")
        one = finding(only(tmp_path / "a.nii"), "sform and qform differ by up to 10.00 mm")
        assert one.severity == "warning"
        assert "qform" in one.remedy

    def test_unusable_qform(self, tmp_path: Path) -> None:
        path = nifti(tmp_path / "a.nii", scan_data())
        content = bytearray(path.read_bytes())
        content[256:268] = np.array([3.0, 3.0, 3.0], "<f4").tobytes()  # quatern_b to _d: longer than 1
        content[252:254] = np.array([1], "<i2").tobytes()
        path.write_bytes(content)
        assert finding(only(path), "qform").severity == "warning"


class TestGrid:
    def test_thick_slices(self, tmp_path: Path) -> None:
        one = finding(only(nifti(tmp_path / "a.nii", scan_data(), np.diag([1.25, 1.25, 7.7, 1]))), "6.2 times")
        assert one.severity == "warning"
        assert "15.4 mm" in one.text

    def test_thick_slices_along_any_axis(self, tmp_path: Path) -> None:
        finding(only(nifti(tmp_path / "a.nii", scan_data(), np.diag([8, 1.25, 1.3, 1]))), "6.2 times")

    def test_four_times_is_not_thick(self, tmp_path: Path) -> None:
        assert only(nifti(tmp_path / "a.nii", scan_data(), np.diag([1, 1, 4, 1]))).findings == ()

    def test_oblique(self, tmp_path: Path) -> None:
        affine = affine_of(rotation(0, 0, 12.0) @ np.diag([1.5, 2.0, 4.0]), (0, 0, 0))
        report = only(nifti(tmp_path / "a.nii", scan_data(), affine))
        assert report.oblique_deg == pytest.approx(12, abs=0.01)
        assert finding(report, "turned by 12.0 degrees").severity == "note"

    def test_sheared(self, tmp_path: Path) -> None:
        report = only(nifti(tmp_path / "a.nii", scan_data(), SHEARED, qform=0))
        assert report.sheared_deg == pytest.approx(20, abs=0.01)
        assert finding(report, "20.0 degrees off a right angle").severity == "note"

    @pytest.mark.parametrize(
        ("spacing", "word", "severity"),
        [
            *((0.001, "metres", "error"), (0.2, "metres", "warning")),
            *((150.0, "micrometres", "warning"), (1500.0, "micrometres", "error")),
        ],
    )
    @pytest.mark.parametrize("make", [scan_data, label_data])
    def test_unit_of_the_spacing(
        self, tmp_path: Path, spacing: float, word: str, severity: str, make: Callable[[], Any]
    ) -> None:
        path = nifti(tmp_path / "a.nii", make(), np.diag([spacing] * 3 + [1]))
        report = only(path)
        assert finding(report, word).severity == severity
        if severity == "error":
            load = load_image if report.kind == "scan" else load_labels
            with pytest.raises(InputError) as refusal:
                load(path)
            assert finding(report, word).text in str(refusal.value)

    def test_lost_spacing(self, tmp_path: Path) -> None:
        data = scan_data((512, 512, 3))
        one = finding(only(nifti(tmp_path / "a.nii", data, np.eye(4))), "spacing seems to be lost")
        assert one.severity == "warning"
        assert only(nifti(tmp_path / "b.nii", data, np.diag([0.9, 0.9, 3, 1]))).findings == ()


class TestIntensities:
    def test_nan(self, tmp_path: Path) -> None:
        data = scan_data().astype(np.float32)
        data[0, 0, :3] = (np.nan, np.inf, -np.inf)
        report = only(nifti(tmp_path / "a.nii", data))
        assert finding(report, "3 of 16800 voxels are NaN, infinite").severity == "warning"
        assert report.kind == "scan"
        assert np.isfinite(report.value_range).all()

    def test_nothing_but_nan(self, tmp_path: Path) -> None:
        report = only(nifti(tmp_path / "a.nii", np.full(SHAPE, np.nan, np.float32)))
        assert finding(report, "16800 of 16800 voxels").severity == "error"
        assert report.value_range == ()

    @pytest.mark.parametrize("value", [0, 7])
    def test_constant(self, tmp_path: Path, value: int) -> None:
        one = finding(only(nifti(tmp_path / "a.nii", np.full(SHAPE, value, np.int16))), f"the value {value}")
        assert one.severity == "error"

    def test_hardly_any_contrast(self, tmp_path: Path) -> None:
        data = np.zeros(SHAPE, np.float32)
        data[:2, :2, :2] = np.random.default_rng(0).random((2, 2, 2))
        assert finding(only(nifti(tmp_path / "a.nii", data)), "next to nothing to register").severity == "warning"

    @pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32])
    @pytest.mark.parametrize("what", ["noise", "faint noise", "air and table", "hot voxels"])
    def test_nothing_in_it(self, what: str, kind: type, tmp_path: Path) -> None:
        random, shape = np.random.default_rng(0), (60, 56, 40)
        data = np.zeros(shape)
        if what == "hot voxels":
            data.ravel()[random.integers(0, data.size, 9)] = 180
        else:
            data = np.abs(random.normal(0, 3 if what == "faint noise" else 12, shape))
        if what == "air and table":
            data[15:-15, 6:8] += 120
        report = only(nifti(tmp_path / "a.nii", data.astype(kind)))
        assert report.kind == "scan"
        assert finding(report, "next to nothing to register").severity == "warning"

    def test_small_bodies_are_something(self, tmp_path: Path) -> None:
        data = np.abs(np.random.default_rng(0).normal(0, 8, (64, 64, 40)))
        data[20:44, 24:48, 4:36] += 400  # 11 %
        assert only(nifti(tmp_path / "a.nii", data.astype(np.int16))).findings == ()

    def test_eight_bits(self, tmp_path: Path) -> None:
        data = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
        report = only(nifti(tmp_path / "a.nii", data))
        assert report.kind == "scan"
        assert finding(report, "8-bit").severity == "note"

    def test_ct(self, tmp_path: Path) -> None:
        data = scan_data() - 1000
        assert finding(only(nifti(tmp_path / "a.nii", data)), "CT-like").text == "CT-like intensities (air near -1000)"
        data[0] = -3024
        assert "down to -3024" in finding(only(nifti(tmp_path / "a.nii", data)), "CT-like").text


class TestLabels:
    def test_names_of_the_dataset(self, tmp_path: Path) -> None:
        (tmp_path / "labelsTr").mkdir()
        (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "kidney": 1}}', encoding="utf-8")
        report = only(nifti(tmp_path / "labelsTr" / "a.nii", label_data()))
        assert [label.name for label in report.labels] == ["kidney", "label_2"]
        assert finding(report, "no name for label 2 although others have one").severity == "warning"
        (tmp_path / "dataset.json").write_text("{", encoding="utf-8")
        report = only(tmp_path / "labelsTr" / "a.nii")
        assert (
            finding(report, "the names of the labels are not readable (dataset.json: not valid JSON").severity
            == "warning"
        )

    def test_no_names(self, tmp_path: Path) -> None:
        report = only(nifti(tmp_path / "a.nii", label_data()))
        assert finding(report, "names the labels").severity == "note"

    def test_many_labels_of_a_large_type(self, tmp_path: Path) -> None:
        data = np.zeros(SHAPE, np.int32)
        data[2:-2, 2:-2, 2:-2] = (np.arange(26)[:, None, None] // 4 * 1000 + np.arange(24)[:, None] // 4 + 5) * 30_000
        report = only(nifti(tmp_path / "a.nii", data))
        assert report.kind == "labels"
        assert [label.value for label in report.labels] == [int(value) for value in np.unique(data[data > 0])]
        assert sum(label.voxels for label in report.labels) == np.count_nonzero(data)

    def test_stored_as_floats(self, tmp_path: Path) -> None:
        report = only(nifti(tmp_path / "a.nii", label_data().astype(np.float32)))
        assert report.kind == "labels"
        assert finding(report, "stored as float32").severity == "note"
        assert [label.voxels for label in report.labels] == [1000, 504]

    def test_resampled_smoothly(self, tmp_path: Path) -> None:
        data = label_data().astype(np.float32)
        data[5, 5:15, 5:15] = 0.4
        one = finding(only(nifti(tmp_path / "a.nii", data)), "100 voxels")
        assert one.severity == "error"
        assert "nearest neighbour" in one.text

    def test_whole_numbers_up_to_rounding(self, tmp_path: Path) -> None:
        data = label_data().astype(np.float32)
        data[data > 0] += np.random.default_rng(0).normal(0, 1e-4, np.count_nonzero(data))
        report = only(nifti(tmp_path / "a.nii", data))
        assert report.kind == "labels"
        assert [label.voxels for label in report.labels] == [1000, 504]
        assert "error" not in {one.severity for one in report.findings}

    def test_with_nan(self, tmp_path: Path) -> None:
        data = label_data().astype(np.float32)
        data[0, 0, 0] = np.nan
        report = only(nifti(tmp_path / "a.nii", data))
        assert report.kind == "labels"
        assert finding(report, "1 of 16800 voxels").severity == "warning"
        assert [label.value for label in report.labels] == [1, 2]

    def test_negative_values(self, tmp_path: Path) -> None:
        path = tmp_path / "a.nii"
        data = label_data().astype(np.int16)
        data[0, 0, 0] = -3
        image = nib.Nifti1Image(data, WELL)
        image.header["intent_code"] = 1002
        nib.save(image, path)
        report = only(path)
        assert report.kind == "labels"
        assert finding(report, "the value -3").severity == "error"

    def test_tiny_structure(self, tmp_path: Path) -> None:
        data = label_data()
        data[3, 20:23, 3] = 9
        one = finding(only(nifti(tmp_path / "a.nii", data)), "fewer than 20 voxels: label_9 (3)")
        assert one.severity == "warning"

    def test_cut_off(self, tmp_path: Path) -> None:
        data = label_data()
        data[18:25, 8:20, :6] = 2
        assert finding(only(nifti(tmp_path / "a.nii", data)), "cut off by the border").severity == "warning"

    def test_stray_islands(self, tmp_path: Path) -> None:
        data = label_data()
        data[1, 1, 1] = data[3, 1, 1] = 1
        report = only(nifti(tmp_path / "a.nii", data))
        assert finding(report, "stray islands of less than 5% of their structure: label_1 (2)").severity == "note"
        assert (report.labels[0].parts, report.labels[0].stray, report.labels[0].voxels) == (3, 2, 1002)

    def test_pair_of_organs_in_one_label(self, tmp_path: Path) -> None:
        report = only(nifti(tmp_path / "a.nii", (label_data() > 0).astype(np.uint8)))
        assert finding(report, "several large parts: label_1 (2)").severity == "note"

    def test_long_lists_are_cut(self, tmp_path: Path) -> None:
        data = np.zeros((60, 28, 20), np.uint8)
        for n in range(10):
            data[2 + 4 * n : 4 + 4 * n, 2, 2] = n + 1
        assert "and 2 more" in finding(only(nifti(tmp_path / "a.nii", data)), "fewer than 20 voxels").text


class TestPairs:
    def test_same_grid(self, scan: Path, labels: Path) -> None:
        (pair,) = check_files([scan, labels]).pairs
        assert (pair.first, pair.second) == ("scan.nii.gz", "labels.nii.gz")
        assert pair.same_grid
        assert pair.distance_mm == pytest.approx(0, abs=1e-3)
        assert pair.overlap_percent == (100, 100)
        assert pair.findings == ()

    def test_other_order(self, scan: Path, tmp_path: Path) -> None:
        volume = Volume(scan_data(), Grid(SHAPE, WELL))
        flipped = volume.grid.affine @ np.diag([-1, 1, 1, 1])
        flipped[:3, 3] = volume.grid.voxel_to_world((SHAPE[0] - 1, 0, 0))
        (pair,) = check_files([scan, nifti(tmp_path / "b.nii", volume.data[::-1], flipped)]).pairs
        assert not pair.same_grid
        assert finding(pair, "another order (RAS and LAS)").severity == "note"

    @pytest.mark.parametrize("name", ["labels.nii", "scan_labels.nii"])
    def test_labels_beside_their_scan(self, scan: Path, tmp_path: Path, name: str) -> None:
        # 12 mm of 80 mm: apart enough to be another patient, unless the names say otherwise.
        shifted = WELL.copy()
        shifted[2, 3] += 12
        (pair,) = check_files([scan, nifti(tmp_path / name, label_data(), shifted)]).pairs
        assert pair.distance_mm == pytest.approx(12)
        if name == "scan_labels.nii":
            assert finding(pair, "corners up to 12 mm apart").severity == "warning"
        else:
            assert finding(pair, "different grids").severity == "note"

    def test_half_a_voxel_beside(self, scan: Path, tmp_path: Path) -> None:
        shifted = WELL.copy()
        shifted[0, 3] += 0.75
        (pair,) = check_files([scan, nifti(tmp_path / "labels.nii", label_data(), shifted)]).pairs
        assert finding(pair, "corners up to 0.75 mm apart").severity == "warning"

    def test_overlap_of_the_fields_of_view(self, scan: Path, tmp_path: Path) -> None:
        # The upper half of the scan, and a second scan that holds it whole.
        upper = WELL.copy()
        upper[2, 3] += 40
        (pair,) = check_files([scan, nifti(tmp_path / "b.nii", scan_data((30, 28, 10)), upper)]).pairs
        assert pair.overlap_percent == (pytest.approx(50), pytest.approx(100))
        assert pair.distance_mm is None
        assert pair.centres_mm == pytest.approx(20)
        assert pair.findings == ()

    def test_nothing_in_common(self, scan: Path, tmp_path: Path) -> None:
        away = WELL.copy()
        away[1, 3] += 1000
        (pair,) = check_files([scan, nifti(tmp_path / "b.nii", scan_data(), away)]).pairs
        assert pair.overlap_percent == (0, 0)
        assert finding(pair, "centres 1000 mm apart").severity == "note"


class TestReport:
    def test_plain_for_json(self, scan: Path, labels: Path, tmp_path: Path) -> None:
        result = check_files([scan, labels, tmp_path / "gone.nii"])
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert plain["worst"] == "error"
        assert [report["name"] for report in plain["files"]] == ["scan.nii.gz", "labels.nii.gz", "gone.nii"]
        assert plain["files"][1]["labels"][0]["name"] == "liver"
        assert plain["pairs"][0]["same_grid"] is True
        assert str(tmp_path) not in json.dumps(plain)

    def test_table(self, scan: Path, labels: Path, tmp_path: Path) -> None:
        text = terminal(check_files([scan, labels]))
        for words in ("scan.nii.gz", "labels: 2", "30 x 28 x 20", "1.5 x 2 x 4", "liver", "100 % / 100 %"):
            assert words in text
        for line in terminal(check_files([scan, labels]), width=80).splitlines():
            assert len(line.rstrip()) <= 80
        assert "nothing to complain about" in text
        assert "error gone.nii: no such file" in terminal(check_files([tmp_path / "gone.nii"]))

    def test_findings_of_many_files_are_listed_once(self, factory: Callable[[str], Path]) -> None:
        text = terminal(check_files([factory("a.nii"), factory("b.nii")]), width=1000)
        assert text.count("times the in-plane spacing") == 1
        assert "warning a.nii, b.nii: slices" in text

    def test_volumes_are_plain_numbers(self, tmp_path: Path) -> None:
        data = np.zeros((40, 40, 40), np.uint8)
        data[2:38, 2:38, 2:38] = 1
        path = nifti(tmp_path / "a.nii", data, np.diag([4.3, 4.3, 4.3, 1]))
        scan = nifti(tmp_path / "b.nii", scan_data().astype(np.float32) * 1e4)
        text = terminal(check_files([path, scan]))
        assert "3709" in text
        assert "e+" not in text

    def test_names_are_no_markup(self, factory: Callable[[str], Path]) -> None:
        assert "[red]a.nii" in terminal(check_files([factory("[red]a.nii")]))

    def test_gravest_first(self, tmp_path: Path) -> None:
        data = scan_data().astype(np.float32) - 1000
        data[0, 0, 0] = np.nan
        report = only(nifti(tmp_path / "a.nii", data, np.diag([1, 1, 8, 1])))
        assert [one.severity for one in report.findings] == ["warning", "warning", "note"]

    @pytest.fixture
    def factory(self, tmp_path: Path) -> Callable[[str], Path]:
        return lambda name: nifti(tmp_path / name, scan_data(), np.diag([1.25, 1.25, 7.7, 1]))


# Against an atlas

#: Larger than the body to the sides, as scans are; ends within it.
ROOM = straight_grid((38, 32, 24), (3.0, 3.0, 3.0))
OTHER = Patient(shift_mm=(2.0, -3.0, 4.0), scale=1.06)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.from_volumes(ATLAS.scan(ROOM), ATLAS.labels(ROOM), STRUCTURES)


def turned(codes: str, grid: Grid = ROOM) -> Grid:
    """The same voxels in another array order."""
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    change = ornt_transform(io_orientation(grid.affine), axcodes2ornt(codes))
    shape = np.empty(3, int)
    shape[change[:, 0].astype(int)] = grid.shape
    return Grid(tuple(shape), grid.affine @ inv_ornt_aff(change, grid.shape))


def mirrored(volume: Volume) -> Volume:
    """What a header that swaps left and right makes of a scan."""
    canonical = volume.canonical()
    return Volume(canonical.data[::-1], canonical.grid).turned_to(volume.grid)


def saved(volume: Volume, folder: Path) -> Path:
    path = folder / "query.nii.gz"
    save_volume(Volume(np.ascontiguousarray(volume.data), volume.grid), path)
    return path


def says(text: str, value: float) -> bool:
    """Whether a text has a number of two decimals, from a report's three."""
    return any(abs(float(number) - value) < 0.006 for number in re.findall(r"\d\.\d\d", text))


def against(path: Path, atlas: Atlas) -> FileReport:
    (report,) = check_files([path], None, atlas).files
    return report


@pytest.mark.usefixtures("quick_fits")
class TestAgainstAnAtlas:
    @pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "oblique"])
    def test_left_and_right_swapped(self, codes: str, atlas: Atlas, tmp_path: Path) -> None:
        if codes == "oblique":
            where = Grid(ROOM.shape, affine_of(rotation(8, -6, 12), (0, 0, 0)) @ ROOM.affine)
        else:
            where = turned(codes)
        scan = OTHER.scan(where)
        well = against(saved(scan, tmp_path), atlas)
        assert well.findings == (() if codes != "oblique" else (finding(well, "the slices are turned by"),)), (
            well.findings
        )
        assert well.atlas is not None
        assert well.atlas.mirrored_gain < -0.02
        wrong = against(saved(mirrored(scan), tmp_path), atlas)
        one = finding(wrong, "left and right of the scan seem to be swapped")
        assert one.severity == "warning"
        assert "on the wrong side" in one.text
        assert "original DICOM" in one.remedy
        assert wrong.atlas is not None
        assert wrong.atlas.mirrored_gain == pytest.approx(-well.atlas.mirrored_gain, abs=1e-3)

    @pytest.mark.usefixtures("mirror_images")
    def test_segmenting_doubts_swapped_sides(self, atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = with_overrides(Settings(model="none"), ["registration.deformable=false"])
        context, scan = Context(atlas, settings), OTHER.scan(turned("LPS"))
        fits, fit = list[int](), affine.fit

        def counted(*given: Any) -> Any:
            fits.append(1)
            return fit(*given)

        monkeypatch.setattr(affine, "fit", counted)
        right = segment(context, scan)
        assert len(fits) == 1  # the mirror image is so far behind that it is not fitted in full
        wrong = segment(context, mirrored(scan))
        assert len(fits) == 3
        assert right.sides is not None
        assert not right.swapped
        assert wrong.sides is not None
        assert wrong.sides.gain > 0.02
        assert right.sides.gain < -0.02
        assert len([told for told in warnings_on(wrong) if "swapped" in told]) == 1
        assert not [told for told in warnings_on(right) if "swapped" in told]
        found = [one.quality for one in wrong.structures if one.status == "present" and one.quality is not None]
        assert found
        assert all(one.verdict in ("review", "failed") and "swapped" in one.reason for one in found)

    @pytest.mark.parametrize("flip", [False, True])
    def test_another_part_of_the_body(self, atlas: Atlas, tmp_path: Path, flip: bool) -> None:
        """Nothing fits: then which mirror image fits better means nothing."""
        other = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=ROOM.shape), 2.5)
        scan = Volume(np.where(ATLAS.scan(ROOM).data > 0, 200 + 900 * other, 0).astype(np.float32), ROOM)
        stages: list[str] = []
        (report,) = check_files(
            [saved(mirrored(scan) if flip else scan, tmp_path)], None, atlas, on_stage=stages.append
        ).files
        assert stages[-1] == "fitting query.nii.gz to the atlas"
        assert report.atlas is not None
        assert not report.atlas.resembles
        (one,) = report.findings
        assert one.severity == "warning"
        assert says(one.text, report.atlas.resemblance)
        assert against(saved(OTHER.scan(ROOM), tmp_path), atlas).atlas.resembles  # type: ignore[union-attr]

    def test_symmetric_bodies_are_not_suspected(self, tmp_path: Path) -> None:
        # One organ on each side, of one brightness; only noise tells the sides apart.
        def symmetric(seed: int) -> Volume:
            half = ATLAS.scan(ROOM).data + np.random.default_rng(seed).normal(0, 4, ROOM.shape)
            return Volume((half + half[::-1]).astype(np.float32), ROOM)

        labels = np.zeros(ROOM.shape, np.uint8)
        labels[14:24, 12:20, 6:14] = 1
        twin = Atlas.from_volumes(symmetric(0), Volume(labels, ROOM))
        for seed in (1, 2):
            found = against(saved(symmetric(seed), tmp_path), twin)
            assert found.atlas is not None
            assert abs(found.atlas.mirrored_gain) < 0.006
            assert finding(found, "left and right cannot be told apart").severity == "note"

    def test_field_of_view(self, atlas: Atlas, tmp_path: Path) -> None:
        # Up to z = 10 mm: without the node (11 to 25 mm).
        low = Grid((38, 32, 16), ROOM.affine)
        report = against(saved(ATLAS.scan(low), tmp_path), atlas)
        one = finding(report, "outside the field of view, by a linear fit: node")
        assert one.severity == "note"
        assert "missing from the result" in one.text
        assert report.atlas is not None
        assert report.atlas.inside_percent["node"] < 10
        assert report.atlas.inside_percent["kidney"] == pytest.approx(100, abs=5)
        # Up to x = 13 mm: through the liver (-4 to 30 mm), beside the kidney (up to -6 mm).
        left = Grid((24, 32, 24), ROOM.affine)
        cut = finding(against(saved(ATLAS.scan(left), tmp_path), atlas), "cut by the border")
        assert "liver (" in cut.text
        assert "kidney" not in cut.text

    @pytest.mark.parametrize("codes", ["LPS", "SAR"])
    def test_inverted(self, codes: str, atlas: Atlas, tmp_path: Path) -> None:
        scan = OTHER.scan(turned(codes))
        negative = saved(Volume(scan.data.max() - scan.data, scan.grid), tmp_path)
        for report in (only(negative), against(negative, atlas)):
            one = finding(report, "the intensities seem to be inverted")
            assert one.severity == "warning"
            assert "MONOCHROME1" in one.text
            assert "largest value minus each" in one.remedy
            assert "swapped" not in str(report.findings)
        assert against(negative, atlas).atlas.correlation < -0.5  # type: ignore[union-attr]
        assert only(saved(scan, tmp_path)).findings == ()

    def test_inverted_without_air_is_suspected_against_the_atlas(self, atlas: Atlas, tmp_path: Path) -> None:
        # The air stays dark, as scanners' masks leave it: the scan alone does not tell.
        scan = OTHER.scan(ROOM)
        body = scan.data > 0
        negative = np.where(body, 300 - scan.data, 0).astype(np.float32)
        report = against(saved(Volume(negative, ROOM), tmp_path), atlas)
        one = finding(report, "what is bright in the atlas is dark in the scan")
        assert one.severity == "warning"
        assert "of the same modality" in one.text
        assert only(tmp_path / "query.nii.gz").findings == ()

    def test_noise_is_not_fitted(self, atlas: Atlas, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).normal(0, 9, ROOM.shape).astype(np.float32)
        report = against(saved(Volume(noise, ROOM), tmp_path), atlas)
        assert finding(report, "next to nothing to register").severity == "warning"
        assert report.atlas is None

    def test_another_modality(self, atlas: Atlas, tmp_path: Path) -> None:
        scan = OTHER.scan(ROOM)
        other = np.where(scan.data > 0, 40 + 300 * np.cos(scan.data / 25) ** 2, 0).astype(np.float32)
        report = against(saved(Volume(other, ROOM), tmp_path), atlas)
        one = finding(report, "another modality or sequence")
        assert one.severity == "warning"
        assert report.atlas is not None
        assert report.atlas.histogram_distance is not None
        assert says(one.text, report.atlas.histogram_distance)
        stronger = Volume(scan.data**1.1 * 7, ROOM)
        assert against(saved(stronger, tmp_path), atlas).findings == ()

    @pytest.mark.parametrize("of_atlas", [True, False])
    def test_hounsfield_units_of_one_alone(self, of_atlas: bool, tmp_path: Path) -> None:
        def in_hounsfield(scan: Volume) -> Volume:
            air = -1000 + np.random.default_rng(0).uniform(0, 40, ROOM.shape)
            return Volume(np.where(scan.data > 0, scan.data / 4, air).astype(np.float32), scan.grid)

        plain, hounsfield = OTHER.scan(ROOM), in_hounsfield(OTHER.scan(ROOM))
        own = ATLAS.scan(ROOM)
        atlas = Atlas.from_volumes(in_hounsfield(own) if of_atlas else own, ATLAS.labels(ROOM), STRUCTURES)
        wrong, right = (plain, hounsfield) if of_atlas else (hounsfield, plain)
        one = finding(against(saved(wrong, tmp_path), atlas), "has Hounsfield units")
        assert one.severity == "warning"
        assert "of another modality" in one.text
        assert {one.severity for one in against(saved(right, tmp_path), atlas).findings} <= {"note"}
        # Neither a crop without air nor values with an offset are another modality, but the offset is told.
        crop = Volume(np.maximum(hounsfield.data, -150), ROOM)
        assert "Hounsfield" not in str(against(saved(crop, tmp_path), atlas).findings)
        if of_atlas:
            one = finding(against(saved(Volume(hounsfield.data + 1024, ROOM), tmp_path), atlas), "1000 or 1024 added")
            assert one.severity == "note"

    def test_a_scan_that_cannot_be_fitted(self, atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise RegistrationError("the scan shows nothing but background; check its intensities")

        monkeypatch.setattr("atlassegfm.quality.mirror.fit_to_atlas", refuse)
        report = against(saved(ATLAS.scan(ROOM), tmp_path), atlas)
        assert "could not be fitted to the atlas: the scan shows nothing" in finding(report, "fitted").text
        assert report.atlas is None

    def test_labels_are_not_fitted(self, atlas: Atlas, tmp_path: Path) -> None:
        path = saved(ATLAS.labels(ROOM), tmp_path)
        assert against(path, atlas).atlas is None

    def test_numbers_for_json(self, atlas: Atlas, tmp_path: Path) -> None:
        result = check_files([saved(OTHER.scan(ROOM), tmp_path)], None, atlas)
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))["files"][0]["atlas"]
        assert plain["inside_percent"].keys() == {"liver", "kidney", "node"}
        assert plain["correlation"] > 0.5
        assert plain["mirrored_gain"] < 0


def test_crops_without_air_are_not_called_inverted() -> None:
    inner = straight_grid((20, 16, 20))
    assert max(np.array(inner.shape) / 2 * 2 / BODY_RADII) < 1
    data = ATLAS.scan(inner).data
    assert not is_inverted(Volume(data, inner))
    assert not is_inverted(Volume(data.max() - data, inner))


def test_the_scan_fitted_is_left_as_it_was(atlas: Atlas) -> None:
    scan = OTHER.scan(ROOM)
    before = scan.data.copy()
    fit_to_atlas(scan, atlas)
    assert np.array_equal(scan.data, before)


@pytest.mark.slow
def test_real_scans_and_labels_are_recognised(data_dir: Path) -> None:
    for dataset in sorted(data_dir.glob("Dataset*")):
        for kind, folder in (("scan", "imagesTr"), ("labels", "labelsTr")):
            for path in sorted((dataset / folder).glob("*.nii.gz"))[:3]:
                report = only(path)
                assert report.kind == kind, path
                assert "error" not in {one.severity for one in report.findings}, report.findings


def test_many_files_of_several_patients(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"p{number}").mkdir()
        nifti(tmp_path / f"p{number}/T1.nii", scan_data())
        nifti(tmp_path / f"p{number}/organs.nii", label_data())
    found = check_files(sorted(tmp_path.rglob("*.nii")))
    assert [one.name for one in found.files][:2] == ["p0/T1.nii", "p0/organs.nii"]
    assert {(one.first, one.second) for one in found.pairs} == {(f"p{n}/T1.nii", f"p{n}/organs.nii") for n in range(7)}
