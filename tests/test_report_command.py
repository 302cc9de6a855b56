"""The command ``report``: which scan a page shows, which pages are kept, and what is marked."""

from __future__ import annotations

import base64
import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from atlassegfm.core.image import load_image, load_labels, save_volume
from atlassegfm.jobs import scans_of
from atlassegfm.records import RunRecord, StructureRecord
from atlassegfm.report import ReportOptions, write_report
from conftest import Run
from result_folders import WITHOUT_PICTURES, data_of, write_result
from scenes import ATLAS, STRUCTURES, UNREGISTERED, Patient, straight_grid

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, "model=none") for part in ("--set", assignment)]
Segment = Callable[..., Any]


@pytest.fixture
def segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Segment:
    """Segment queries into ``out``; the current folder has the atlas."""
    save_volume(ATLAS.scan(GRID), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> Any:
        atlas = ["--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz"]
        done = run("segment", *atlas, *arguments, "-o", "out", "-q", *FAST)
        assert done.code == 0, done.err
        return done

    return call


def scan(path: str, number: int) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_volume(Patient(shift_mm=(1.5 - 6 * number, 1.0, -2.0)).scan(GRID), Path(path))
    return Path(path)


def shown_scan(case: str) -> Any:
    """The voxels of the scan on a page; None without it."""
    packed = data_of(Path("out") / case / "report.html", "viewer-data")["volumes"].get("scan")
    return None if packed is None else nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed))).get_fdata()


def shows(case: str, path: Path) -> bool:
    shown, data = shown_scan(case), load_image(path).canonical().data
    return bool(shown is not None and np.corrcoef(shown.ravel(), data.ravel())[0, 1] > 0.99)


def report(run: Run, *arguments: Any) -> Any:
    done = run("report", "out", "--no-picture", "--json", "-q", *arguments)
    assert done.code == 0, done.err
    return done


def test_scans_of_one_name_come_to_their_own_cases(segment: Segment, run: Run) -> None:
    scans = [scan(f"p{number}/T1.nii", number) for number in (1, 2)]
    for path in scans:  # the same size and time, as from an archive
        os.utime(path, (1e9, 1e9))
    segment(*scans)
    other = scan("p3/T1.nii", 3)
    done = report(run, "--images", ".")
    assert (done.json["without_image"], done.json["kept"]) == (0, 0)
    assert str(other) in done.err
    assert any(Path(path).samefile(other) for path in done.json["unused_images"])
    assert shows("p1_T1", scans[0])
    assert shows("p2_T1", scans[1])
    assert not shows("p1_T1", scans[1])

    # Each at the other's place: what was segmented is shown.
    for path, name in zip(scans, ("2", "1"), strict=True):
        path.rename(name)
    for path, name in zip(scans, ("1", "2"), strict=True):
        shutil.move(name, path)
    report(run, "--images", "p1", "--images", "p2", "--force")
    assert shows("p1_T1", scans[1])
    assert shows("p2_T1", scans[0])
    scans.reverse()

    # One that moved is found by its content, under the name of another too.
    for name in ("p1_T1", "p2_T1"):
        Path("out", name, "report.html").unlink()
    Path("moved").mkdir()
    for path, name in zip(scans, ("p2", "p1"), strict=True):
        shutil.move(path, f"moved/{name}_T1.nii")
    report(run, "--images", "moved/p1_T1.nii", "--images", "moved/p2_T1.nii")
    assert shows("p1_T1", Path("moved/p2_T1.nii"))
    assert shows("p2_T1", Path("moved/p1_T1.nii"))


def test_a_scan_that_changed_is_not_shown(segment: Segment, run: Run) -> None:
    segment(scan("a.nii.gz", 0))
    path = scan("a.nii.gz", 2)
    os.utime(path, (1e9, 1e9))
    done = report(run, "--images", path)
    assert shown_scan("a") is None
    assert "a.nii.gz" in done.err
    assert done.json["without_image"] == 1


def test_names_count_only_where_nothing_else_is_known(tmp_path: Path) -> None:
    for name in ("p1_T1", "p2_T1", "other"):
        write_result(tmp_path / "out" / name, 0, keep=False)
        run = RunRecord.read(tmp_path / "out" / name / "run.json")
        query = run.inputs.query
        assert query is not None
        file = "other.nii.gz" if name == "other" else "T1.nii.gz"
        inputs = run.inputs.model_copy(update={"query": query.model_copy(update={"file": file})})
        run.model_copy(update={"inputs": inputs}).write(tmp_path / "out" / name / "run.json")
    paths = [scan(str(tmp_path / name), number) for number, name in enumerate(("p1/T1.nii.gz", "p2/other.nii.gz"))]
    matched = scans_of(tmp_path / "out", paths)
    assert matched.scans == {"other": paths[1]}
    assert matched.unused == [paths[0]]


def test_pages_that_show_the_scan_are_kept(segment: Segment, run: Run) -> None:
    paths = [scan(f"{name}.nii.gz", number) for number, name in enumerate("ab")]
    segment(*paths)
    report(run, "--images", *paths[:1])
    done = report(run)
    assert (done.json["kept"], done.json["without_image"]) == (1, 1)
    assert shows("a", paths[0])
    # A copy of the folder has other times; a view of another size or another place of the page is no reason either.
    shutil.copytree("out", "copy")
    shutil.rmtree("out")
    shutil.move("copy", "out")
    report(run, "--viewer-voxels", 1000, "-o", "page.html")
    assert shows("a", paths[0])
    # A scan that cannot be shown is no scan.
    Path("a.nii.gz").write_bytes(b"damaged")
    report(run, "--images", "a.nii.gz")
    assert shows("a", scan("a.nii.gz", 0))
    # Other labels make it a page of another result.
    labels = load_labels("out/a/segmentation.nii.gz")
    labels.data[0, 0, 0] = 1
    save_volume(labels, "out/a/segmentation.nii.gz", structures=STRUCTURES)
    report(run)
    assert shown_scan("a") is None
    report(run, "--images", "a.nii.gz")
    assert shown_scan("a") is not None
    assert report(run, "--force").json["kept"] == 0
    assert shown_scan("a") is None


def test_results_of_earlier_commands_are_marked(segment: Segment) -> None:
    pytest.importorskip("matplotlib")
    paths = [scan(f"{name}.nii.gz", number) for number, name in enumerate("abc")]
    segment(*paths[:2], "--report")
    assert data_of(Path("out/report.html"), "table-data")["cases"]["inRun"] == [True, True]
    segment(paths[2], "--report")
    cases = data_of(Path("out/report.html"), "table-data")["cases"]
    assert dict(zip(cases["name"], cases["inRun"], strict=True)) == {"a": False, "b": False, "c": True}
    assert Path("out/report.html").read_text().count('<span class="tag"') >= 3
    # Their pages stay as they are.
    assert shows("a", paths[0])
    assert shows("c", paths[2])


@pytest.mark.parametrize("form", ["nrrd", "seg.nrrd", "mgz"])
def test_results_of_every_format_get_a_page(segment: Segment, run: Run, form: str) -> None:
    path = scan("a.nii.gz", 0)
    segment(path, "--format", form)
    done = report(run, "--images", path)
    assert (done.json["problems"], done.json["without_image"]) == ([], 0)
    colors = data_of(Path("out/a/report.html"), "facts")["colors"]
    assert {int(value): tuple(color) for value, color in colors.items()} == {one.value: one.color for one in STRUCTURES}


def test_a_result_without_a_label_map_says_what_it_lacks(segment: Segment, run: Run) -> None:
    segment(scan("a.nii.gz", 0), "--format", "masks")
    (problem,) = report(run).json["problems"]
    assert problem.startswith("a: ")
    assert "--format" in problem


def test_cut_structures_are_marked_and_not_compared(tmp_path: Path) -> None:
    def changed(row: StructureRecord, number: int) -> StructureRecord:
        if row.value != STRUCTURES[0].value:
            return row
        return row.model_copy(update={"volume_ml": 10.0 + number, "outside_fraction": 0.49 if number == 5 else 0.0})

    for number in range(6):
        folder = tmp_path / f"case_{number}"
        write_result(folder, 0, keep=False)
        run = RunRecord.read(folder / "run.json")
        rows = tuple(changed(row, 200 if number == 4 else number) for row in run.structures)
        run.model_copy(update={"structures": rows}).write(folder / "run.json")
    page = write_report(tmp_path, options=ReportOptions(cases=True, case=WITHOUT_PICTURES.case)).path
    table = data_of(page, "table-data")["structures"]
    first = [number for number, value in enumerate(table["value"]) if value == STRUCTURES[0].value]
    assert [table["cut"][n] for n in first] == ["", "", "", "", "", "49 % outside"]
    assert table["factor"][first[5]] is None
    assert [table["outlier"][n] for n in first] == [False, False, False, False, True, False]
    assert "cut by the field of view, 49 % outside" in page.read_text()
    for number, is_cut in ((5, True), (0, False)):
        text = (tmp_path / f"case_{number}" / "report.html").read_text()
        assert ("in view; 49 % outside" in text) is is_cut


@pytest.mark.parametrize(("fraction", "text"), [(0.0, ""), (0.04, ""), (0.051, "5 % outside"), (0.49, "49 % outside")])
def test_a_cut_from_a_few_per_cent_on_is_said(fraction: float, text: str) -> None:
    row = StructureRecord(
        value=1,
        name="a",
        status="present",
        reason="",
        volume_ml=1,
        outside_fraction=fraction,
        prompt=None,
        quality=None,
    )
    assert row.cut == text
