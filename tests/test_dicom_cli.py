"""The program on DICOM: series in, RTSTRUCT and DICOM-SEG in and out, checks, scores, and no identifier anywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_labels, save_volume
from atlassegfm.core.labels import plain_name
from atlassegfm.dicom import Provenance, load_series, open_labels, series_of, write_rtstruct, write_segmentation
from atlassegfm.records import StatusRecord
from conftest import Run
from dicom_series import LPS, NAME, PATIENT, SERIES, STUDY, write_series
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, Patient, straight_grid

#: No registration and no model where only files are at stake.
FAST = [part for setting in UNREGISTERED for part in ("--set", setting)] + ["--model", "none", "--quiet"]
#: Slices as scanners store them: from the right to the left, from the front to the back; pixels not square.
GRID = Grid((48, 30, 24), LPS @ np.array([[2.0, 0, 0, -47], [0, 2.5, 0, -37], [0, 0, 3.0, -36], [0, 0, 0, 1]]))
QUERY_SERIES = f"{SERIES}77"
QUERY_PATIENT = "SECRET-0815"
NAMES = [one.name for one in STRUCTURES]


def write_scan(folder: Path, patient: Patient, **options: Any) -> Path:
    return write_series(folder, np.rint(patient.scan(GRID).data).astype(np.int16), GRID.affine, **options)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas series with an RTSTRUCT and a DICOM-SEG, and the series of another patient."""
    folder = tmp_path_factory.mktemp("clinic")
    atlas = load_series(write_scan(folder / "atlas", ATLAS))
    write_scan(
        folder / "query",
        QUERY,
        series_uid=QUERY_SERIES,
        frame_uid=f"{QUERY_SERIES}.1",
        study_uid=f"{QUERY_SERIES}.2",
        patient_id=QUERY_PATIENT,
    )
    labels, series = ATLAS.labels(atlas.grid), series_of(atlas)
    assert series is not None
    write_rtstruct(folder / "rs.dcm", labels, STRUCTURES, series, Provenance("drawn"))
    write_segmentation(folder / "seg.dcm", labels, STRUCTURES, series, Provenance("drawn"))
    save_volume(QUERY.labels(GRID), folder / "truth.nii.gz", structures=STRUCTURES)
    return folder


@pytest.fixture
def here(clinic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder."""
    shutil.copytree(clinic, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795453512")
    return tmp_path


def test_series_and_rtstruct_to_three_formats(here: Path, run: Run, under_review: None) -> None:
    arguments = ["segment", "--atlas", "atlas", "--labels", "rs.dcm", "query", "-o", "out", *FAST]
    outcome = run(*arguments, "--format", "nifti,rtstruct,seg", "--json")
    assert outcome.code == 0, outcome.err
    made = here / "out" / "query"
    assert {path.name for path in made.iterdir()} == {
        *("segmentation.nii.gz", "colors.ctbl", "labels.txt", "rtstruct.dcm", "seg.dcm", "run.json", "status.json")
    }
    query = load_series(here / "query")
    nifti = load_labels(made / "segmentation.nii.gz")
    assert nifti.grid.distance_mm(query.grid) < 1e-3
    assert sorted(np.unique(nifti.data)) == [0, *(one.value for one in STRUCTURES)]
    for name in ("rtstruct.dcm", "seg.dcm"):
        assert np.array_equal(open_labels(made / name, query).data, nifti.data)
    written = pydicom.dcmread(made / "rtstruct.dcm")
    assert written.PatientID == QUERY_PATIENT
    assert written.ApprovalStatus == "UNAPPROVED"
    assert written.StructureSetDate == "20261123"
    assert "review: 3 of 3 structures found" in written.StructureSetDescription
    assert written.StructureSetROISequence[0].ROIDescription.startswith("review: estimated Dice")
    assert [roi.ROIName for roi in written.StructureSetROISequence] == NAMES
    colors = [tuple(item.ROIDisplayColor) for item in written.ROIContourSequence]
    assert colors == [one.color for one in STRUCTURES]
    result = json.loads((made / "run.json").read_text())
    for form in ("rtstruct", "seg"):
        found = result["dicom"][form]
        assert [one["dice"] for one in found["round_trip"]] == [1.0] * 3
        assert [one["contour_error_mm"] for one in found["round_trip"]] == [0.0] * 3
    assert outcome.json["results"][0]["query"] == "query"
    again = run(*arguments[:-1], *["--quiet", "--format", "rtstruct,seg"], "-o", "again")
    assert again.code == 0, again.err
    for name in ("rtstruct.dcm", "seg.dcm"):
        assert (here / "again" / "query" / name).read_bytes() == (made / name).read_bytes()
    assert not (here / "again" / "query" / "segmentation.nii.gz").exists()


def test_dicom_gives_the_result_that_nifti_gives(here: Path, run: Run) -> None:
    for name in ("atlas", "query"):
        save_volume(load_series(here / name), here / f"{name}.nii.gz")
    save_volume(
        open_labels(here / "rs.dcm", load_series(here / "atlas")), here / "labels.nii.gz", structures=STRUCTURES
    )
    assert run("segment", "--atlas", "atlas", "--labels", "seg.dcm", "query", "-o", "one", *FAST).code == 0
    arguments = ["--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz", "query.nii.gz", "-o", "two"]
    assert run("segment", *arguments, *FAST).code == 0
    one, two = (load_labels(here / name / "query" / "segmentation.nii.gz") for name in ("one", "two"))
    assert np.array_equal(one.data, two.data)
    assert one.grid.distance_mm(two.grid) < 1e-3


def test_no_identifier_in_what_is_written_or_said(here: Path, run: Run) -> None:
    outcome = run("segment", "--atlas", "atlas", "--labels", "rs.dcm", "query", "-o", "out", *FAST, "--keep")
    checked = run("check", "atlas", "query", "rs.dcm", "--json")
    refused = run("segment", "--atlas", "query", "--labels", "rs.dcm", "query", "-o", "other", *FAST)
    assert refused.code == 2
    text = outcome.out + outcome.err + checked.out + checked.err + refused.err
    for path in (here / "out").rglob("*"):
        text += path.name
        content = path.read_bytes() if path.is_file() and path.suffix != ".gz" else b""
        text += content.decode("latin-1")
        if path.name.endswith(".nii.gz"):
            import gzip

            text += gzip.decompress(path.read_bytes()).decode("latin-1")
    for secret in (PATIENT, QUERY_PATIENT, NAME, "Müller", "Erika", STUDY, SERIES, "19500101", "Thorax"):
        assert secret not in text, secret


SECRETS = (PATIENT, QUERY_PATIENT, NAME, "Müller", "Erika", STUDY, SERIES, "19500101", "Thorax", "Doctor")


def volumes_of(page: Path) -> set[str]:
    """The layers of the interactive view."""
    match = re.search(r'<script type="application/json" id="viewer-data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert match is not None
    return set(json.loads(match[1])["volumes"])


def test_three_formats_and_the_report_in_one_command(here: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    outcome = run(
        *("segment", "--atlas", "atlas", "--labels", "rs.dcm", "query", "-o", "out", *FAST),
        *("--format", "nifti,rtstruct,seg", "--report"),
    )
    assert outcome.code == 0, outcome.err
    made = here / "out" / "query"
    assert {"segmentation.nii.gz", "rtstruct.dcm", "seg.dcm", "report.html"} <= {one.name for one in made.iterdir()}
    assert volumes_of(made / "report.html") == {"scan", "result", "atlas"}
    pages = [here / "out" / "report.html", made / "report.html"]
    for page in pages:
        assert "labels are shown" not in page.read_text()
        assert not [secret for secret in SECRETS if secret in page.read_text()]
    # Pages are kept while the series is the same, and made again when one of its files is another.
    first = pages[1].stat().st_mtime_ns
    assert run("report", "out", "--images", "query", "-q").code == 0
    assert pages[1].stat().st_mtime_ns == first
    os.utime(next((here / "query").iterdir()), ns=(1, 1))
    assert run("report", "out", "--images", "query", "-q").code == 0
    assert pages[1].stat().st_mtime_ns > first


def test_report_of_a_cohort_of_series(here: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    (here / "todo").mkdir()
    shutil.move(here / "query", here / "todo" / "first")
    shutil.copytree(here / "todo" / "first", here / "todo" / "second")
    # A second series in each folder: the report must open the one that was segmented.
    for name in ("first", "second"):
        write_scan(
            here / "todo" / name, ATLAS, series_uid=f"{SERIES}5", number=8, names="b{}".format, patient_id=QUERY_PATIENT
        )
    outcome = run(
        *("segment", "--atlas", "atlas", "--labels", "rs.dcm", "todo", "-o", "out", *FAST),
        *("--series", "3", "--report", "--format", "nifti,seg"),
    )
    assert outcome.code == 0, outcome.err
    pages = [here / "out" / "first" / "report.html", here / "out" / "second" / "report.html"]
    for again in (False, True):
        for page in pages:
            assert volumes_of(page) == {"scan", "result", "atlas"}
            assert not [secret for secret in SECRETS if secret in page.read_text()]
        if not again:
            done = run("report", "out", "--images", "todo", "--force", "--json", "-q")
            assert done.code == 0, done.err
            assert (done.json["cases"], done.json["without_image"]) == (2, 0)
    cohort = (here / "out" / "report.html").read_text()
    assert not [secret for secret in SECRETS if secret in cohort]
    # Without the scans, as they are on another disk.
    alone = run("report", "out", "--force", "-q")
    assert "2 without their scan" in alone.out
    assert volumes_of(pages[0]) == {"result", "atlas"}


def test_structures_and_synonyms(here: Path, run: Run) -> None:
    (here / "names.toml").write_text('Liver = ["liver", "hepar"]\n')
    arguments = ["segment", "--atlas", "atlas", "--labels", "rs.dcm", "query", "-o", "out", *FAST, "--json"]
    outcome = run(*arguments, "--structures", "kid*,Liver", "--synonyms", "names.toml")
    assert outcome.code == 0, outcome.err
    assert [one["name"] for one in outcome.json["results"][0]["structures"]] == ["Liver", "kidney"]
    refused = run(*arguments, "--structures", "livr")
    assert refused.code == 2
    assert "rs.dcm: no structure 'livr'; the nearest are liver: choose with --structures" in refused.err
    assert "--overlap best: expected one of refuse, first, last" in run(*arguments, "--overlap", "best").err
    nifti = ["segment", "--atlas", "atlas", "--labels", "truth.nii.gz", "query", "-o", "out", *FAST]
    assert "--overlap" in run(*nifti, "--overlap", "first").err


def test_folder_of_series_and_choice_of_one(here: Path, run: Run) -> None:
    (here / "todo").mkdir()
    shutil.move(here / "query", here / "todo" / "first.patient")
    shutil.copytree(here / "todo" / "first.patient", here / "todo" / "second")
    write_scan(here / "todo" / "second", ATLAS, series_uid=f"{SERIES}5", number=8, names="b{}".format)
    write_scan(here / "atlas", QUERY, series_uid=f"{SERIES}6", number=9, description="Late", names="b{}".format)
    arguments = ["segment", "--atlas", "atlas", "--labels", "rs.dcm", "todo", "-o", "out", *FAST]
    refused = run(*arguments)
    assert refused.code == 2
    assert "atlas: 2 series in this folder; pick one with --series: 3 (CT," in refused.err
    some = run(*arguments, "--atlas-series", "3")
    assert some.code == 1
    assert "todo/second: 2 series in this folder; pick one with --series" in some.err
    assert (here / "out" / "first.patient" / "segmentation.nii.gz").exists()
    both = run(*arguments, "--atlas-series", "thorax", "--series", "3")
    assert both.code == 0, both.err
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "cohort.csv",
        "cohort.json",
        "first.patient",
        "second",
    ]


def test_refusals_write_no_result(here: Path, run: Run) -> None:
    base = ["segment", "--atlas", "atlas", "--labels", "rs.dcm", "-o", "out", *FAST]
    save_volume(QUERY.scan(straight_grid()), here / "query.nii.gz")
    cases = {
        (
            "query",
            "--format",
            "nifti,png",
        ): "unknown format 'png'; expected some of nifti",
        ("query.nii.gz", "--format", "rtstruct"): "query.nii.gz: rtstruct can only be written for a DICOM series",
        ("atlas/IM00003",): "atlas/IM00003: a single DICOM file; give the folder of its series",
        (
            "query.nii.gz",
            "--labels",
            "atlas",
        ): "atlas: a folder of DICOM files; expected one RTSTRUCT or DICOM-SEG file",
        ("query", "--labels", "rs.dcm", "--atlas", "query"): "rs.dcm: has another patient ID than the scan in query",
    }
    for arguments, message in cases.items():
        refused = run(*base, *arguments)
        assert refused.code == 2, arguments
        assert message in " ".join(refused.err.split()), refused.err
        assert refused.err.count("error:") == 1
        written = {path.name for path in here.glob("out/**/*") if path.is_file()}
        # Refused before the run, or the failure of its only case.
        assert written in (set(), {"status.json", "cohort.json", "cohort.csv"})
        for path in here.glob("out/*/status.json"):
            assert StatusRecord.read(path).state == "failed"
        shutil.rmtree(here / "out", ignore_errors=True)


def test_file_that_does_not_come_back_leaves_no_result(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlassegfm import dicom

    def shifted(path: Path, labels: Volume, *others: Any) -> None:
        write_rtstruct(path, Volume(np.roll(labels.data, 2, axis=0), labels.grid), *others)

    monkeypatch.setattr(dicom, "write_rtstruct", shifted)
    arguments = ["segment", "--atlas", "atlas", "--labels", "rs.dcm", "query", "-o", "out", *FAST]
    failed = run(*arguments, "--format", "nifti,rtstruct")
    assert failed.code == 1
    assert "rtstruct.dcm: read back, structures differ from the label map (Dice below 0.99: liver (0." in failed.err
    assert {path.name for path in here.glob("out/query/*")} == {"status.json"}
    status = StatusRecord.read(here / "out/query/status.json")
    assert status.state == "failed"
    assert "rtstruct.dcm" in status.reason


def test_empty_result_has_no_segments(here: Path, run: Run) -> None:
    far = Patient(shift_mm=(500.0, 0, 0))
    shutil.rmtree(here / "query")
    values = np.rint(far.scan(GRID).data).astype(np.int16)
    values[2:5, 3:6, 4:6] = 9
    moved = GRID.affine.copy()
    moved[0, 3] += 500
    write_series(here / "query", values, moved)
    arguments = ["segment", "--atlas", "atlas", "--labels", "rs.dcm", "query", "-o", "out", *FAST]
    outcome = run(*arguments, "--format", "rtstruct,seg")
    assert outcome.code == 0, outcome.err
    assert "no DICOM-SEG is written: nothing was found, and it cannot be empty" in outcome.err
    assert not (here / "out" / "query" / "seg.dcm").exists()
    rois = pydicom.dcmread(here / "out" / "query" / "rtstruct.dcm").StructureSetROISequence
    assert [roi.ROIName for roi in rois] == NAMES
    assert rois[0].ROIDescription.startswith("outside: 100% of it lies outside the field of view")


# check


def test_check_looks_at_series_and_structures(here: Path, run: Run) -> None:
    outcome = run("check", "rs.dcm", "atlas", "seg.dcm", "--json")
    assert outcome.code == 0, outcome.out
    structures, scan, segments = outcome.json["files"]
    assert (scan["kind"], scan["axes"], scan["stored_type"]) == ("scan", "LPS", "int32")
    assert scan["spacing_mm"] == pytest.approx([2, 2.5, 3])
    for labels in (structures, segments):
        assert labels["kind"] == "labels"
        assert [one["name"] for one in labels["labels"]] == NAMES
        assert labels["shape"] == scan["shape"]
    assert all(pair["same_grid"] for pair in outcome.json["pairs"])


def test_check_finds_what_is_wrong_with_series(here: Path, run: Run) -> None:
    (here / "atlas" / "IM00004").unlink()
    broken = run("check", "atlas", "query", "--json")
    assert broken.code == 2
    assert "1 slice is missing between -36.0 and -30.0 mm" in broken.json["files"][0]["findings"][0]["text"]
    foreign = run("check", "query", "rs.dcm", "--json")
    assert foreign.code == 2
    assert "has another patient ID" in foreign.json["files"][1]["findings"][0]["text"]
    alone = run("check", "rs.dcm")
    assert alone.code == 2
    assert "holds contours, no voxels" in alone.out


@pytest.mark.usefixtures("quick_fits")
def test_check_of_a_series_against_an_atlas_series(here: Path, run: Run) -> None:
    annotated = ("--atlas", "atlas", "--labels", "rs.dcm", "--json")
    (well,) = run("check", "query", *annotated).json["files"]
    assert well["atlas"]["mirrored_gain"] < -0.006
    assert not any("swapped" in one["text"] for one in well["findings"])
    # Rows run the other way, and nothing in the header says so; as a negative on top of it.
    for path in (here / "query").iterdir():
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array[:, ::-1]
        dataset.PixelData = (1000 - pixels).astype(np.int16).tobytes()
        dataset.save_as(path)
    outcome = run("check", "query", *annotated)
    assert outcome.code == 0
    texts = [one["text"] for one in outcome.json["files"][0]["findings"]]
    assert any("left and right of the scan seem to be swapped" in text for text in texts), texts
    assert any("the intensities seem to be inverted" in text for text in texts), texts


# evaluate


def test_evaluate_against_structures(here: Path, run: Run) -> None:
    assert run("segment", "--atlas", "atlas", "--labels", "rs.dcm", "query", "-o", "out", *FAST).code == 0
    query = load_series(here / "query")
    series = series_of(query)
    assert series is not None
    # Numbers of their own, as other programs give them.
    truth = QUERY.labels(query.grid)
    renumbered = [type(one)(n, one.name.upper(), one.color) for n, one in enumerate(STRUCTURES, start=1)]
    for n, one in enumerate(STRUCTURES, start=1):
        truth.data[truth.data == one.value] = 100 + n
    truth.data[truth.data > 0] -= 100
    write_rtstruct(here / "truth.dcm", truth, renumbered, series, Provenance("drawn"))
    write_segmentation(here / "truth-seg.dcm", truth, renumbered, series, Provenance("drawn"))
    result = "out/query/segmentation.nii.gz"
    plain = run("evaluate", "--pred", result, "--ref", "truth.nii.gz", "--json")
    assert plain.code == 0, plain.err
    expected = {plain_name(one["structure"]): one["dice"] for one in plain.json["scores"]}
    for reference in ("truth.dcm", "truth-seg.dcm"):
        for options in ([], ["--scan", "query"]):
            outcome = run("evaluate", "--pred", result, "--ref", reference, "--json", *options)
            assert outcome.code == 0, outcome.err
            found = {plain_name(one["structure"]): one["dice"] for one in outcome.json["scores"]}
            assert found == pytest.approx(expected)
            assert ("not checked" in outcome.err) == (not options)
    both = ["evaluate", "--pred", "truth-seg.dcm", "--ref", "truth.dcm", "--json"]
    assert "both are DICOM objects; give the scan they lie on with --scan" in run(*both).err
    same = run(*both, "--scan", "query")
    assert [one["dice"] for one in same.json["scores"]] == [1.0] * 3
    some = run("evaluate", "--pred", result, "--ref", "truth.dcm", "--structures", "liver", "--json")
    assert some.code == 2
    assert "the label sets differ; say what to score with --labels" in some.err
    refused = run("evaluate", "--pred", result, "--ref", "truth.nii.gz", "--scan", "query")
    assert "neither is an RTSTRUCT or DICOM-SEG" in refused.err
    wrong = run("evaluate", "--pred", result, "--ref", "truth.dcm", "--scan", "atlas")
    assert "has another patient ID" in wrong.err


# Real scans


@pytest.mark.slow
def test_abdomen_from_series_to_three_formats(data_dir: Path, tmp_path: Path, run: Run) -> None:
    """One case as atlas with an RTSTRUCT, another as query series, in one command; all settings as they are."""
    from atlassegfm.core.image import load_volume

    dataset = data_dir / "Dataset002_AbdCT"
    if not dataset.is_dir():
        pytest.skip(f"no real scans: {data_dir} has no Dataset002_AbdCT")
    one, other = sorted((dataset / "imagesTr").glob("*.nii.gz"))[:2]
    for number, (name, path) in enumerate((("atlas", one), ("query", other))):
        scan = load_volume(path).turned_to(lps_of(load_volume(path).grid))
        values = np.rint(scan.data).astype(np.int16)
        uids = {"series_uid": f"{SERIES}{number}", "frame_uid": f"{SERIES}{number}.9", "patient_id": f"P{number}"}
        write_series(tmp_path / name, values, scan.grid.affine, **uids)
    atlas = load_series(tmp_path / "atlas")
    labels = load_labels(dataset / "labelsTr" / one.name.replace("_0000", "")).turned_to(atlas.grid)
    organs = json.loads((dataset / "dataset.json").read_text())["labels"]
    structures = [
        type(STRUCTURES[0])(value, name, (value * 15, 200 - value, 90)) for name, value in organs.items() if value
    ]
    series = series_of(atlas)
    assert series is not None
    write_rtstruct(tmp_path / "rs.dcm", labels, structures, series, Provenance("drawn"))
    out = tmp_path / "out"
    outcome = run(
        *("segment", "--atlas", tmp_path / "atlas", "--labels", tmp_path / "rs.dcm", tmp_path / "query", "-o", out),
        *("--format", "nifti,rtstruct,seg", "--json", "--quiet"),
    )
    assert outcome.code == 0, outcome.err
    query = load_series(tmp_path / "query")
    nifti = load_labels(out / "query" / "segmentation.nii.gz")
    for name in ("rtstruct.dcm", "seg.dcm"):
        back = open_labels(out / "query" / name, query)
        assert np.array_equal(back.data, nifti.data)
        assert back.grid.distance_mm(nifti.grid) < 1e-2
    for form in ("rtstruct", "seg"):
        for found in outcome.json["results"][0]["dicom"][form]["round_trip"]:
            assert found["dice"] == 1.0
    truth = load_labels(dataset / "labelsTr" / other.name.replace("_0000", "")).turned_to(query.grid)
    liver = organs["liver"]
    found, wanted = nifti.data == liver, truth.data == liver
    assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.7


def lps_of(grid: Grid) -> Grid:
    """The same voxels as scanners store them."""
    turned = grid.canonical()
    affine = turned.affine.copy()
    for axis in (0, 1):
        affine[:3, 3] += (turned.shape[axis] - 1) * affine[:3, axis]
        affine[:3, axis] *= -1
    return Grid(turned.shape, affine)
