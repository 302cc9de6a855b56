"""Which scans a command takes, under which names; what it leaves out is named, and no other scan's result is lost."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from atlassegfm import segment
from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.errors import InputError
from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.core.labels import read_names_file
from atlassegfm.jobs import find_scans, plan_cases, store
from atlassegfm.jobs import work as work_module
from atlassegfm.jobs.pool import run_here
from atlassegfm.records import FORMATS
from conftest import Run
from dicom_series import AFFINES, write_series
from scenes import ATLAS, PAPER_GATE, STRUCTURES, UNREGISTERED, Patient, straight_grid

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, "model=none") for part in ("--set", assignment)]
GATED = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]
COMMAND = ("segment", "--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_volume(ATLAS.scan(GRID), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scan(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_volume(Patient(shift_mm=(1.5 - number, 1.0, -2.0)).scan(GRID), path)
    return path


def dicom(folder: Path, **options: Any) -> None:
    data = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
    write_series(folder, data, AFFINES["axial"], **options)


def touched(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 400)


def found_in(folder: Path, **options: Any) -> tuple[list[str], dict[str, list[str]]]:
    scans = find_scans([folder], **options)
    return (
        [path.relative_to(folder).as_posix() for path in scans.found],
        {why: [path.relative_to(folder).as_posix() for path in paths] for why, paths in scans.left_out.items()},
    )


# --- what is found


def test_patient_folders_of_every_kind(tmp_path: Path) -> None:
    touched(tmp_path, "p1/ct.nii.gz", "p1/ct_seg.nii.gz", "p2/visit 1/ct.mgz", "p2/visit 1/report.pdf", "top.nrrd")
    touched(tmp_path, "p3/pet.img", "p3/pet.hdr", "p3/organs.seg.nrrd", "p3/labels/a.nii.gz", ".hidden/x.nii.gz")
    found, left = found_in(tmp_path)
    assert found == ["top.nrrd", "p1/ct.nii.gz", "p2/visit 1/ct.mgz", "p3/pet.img"]
    taken = {path for paths in left.values() for path in paths}
    assert taken == {"p1/ct_seg.nii.gz", "p2/visit 1/report.pdf", "p3/organs.seg.nrrd", "p3/labels"}
    everything, _ = found_in(tmp_path, labels=True)
    assert set(everything) == {*found, "p1/ct_seg.nii.gz", "p3/organs.seg.nrrd", "p3/labels/a.nii.gz"}


def test_nnunet_and_bids(tmp_path: Path) -> None:
    nnunet, bids = tmp_path / "Dataset001", tmp_path / "bids"
    touched(nnunet, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTs/b_0000.nii.gz", "labelsTr/a.nii.gz")
    touched(nnunet, "dataset.json")
    found, left = found_in(nnunet)
    assert found == ["imagesTr/a_0000.nii.gz", "imagesTs/b_0000.nii.gz"]
    assert {path for paths in left.values() for path in paths} == {
        *("imagesTr/a_0001.nii.gz", "labelsTr", "dataset.json"),
    }
    touched(bids, "dataset_description.json", "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/func/sub-01_bold.nii.gz")
    touched(bids, "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz", "derivatives/masks/sub-01_dseg.nii.gz")
    found, left = found_in(bids)
    assert found == ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz"]
    assert {"sub-01/func", "derivatives"} <= {path for paths in left.values() for path in paths}


def test_dicom_trees(tmp_path: Path) -> None:
    dicom(tmp_path / "patient A" / "CT")
    dicom(tmp_path / "patient B" / "study" / "CT", modality="MR")
    dicom(tmp_path / "patient B" / "US")
    for file in (tmp_path / "patient B" / "US").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.Modality = "US"
        dataset.save_as(file)
    (tmp_path / "patient A" / "CT" / "viewer.exe").write_bytes(b"MZ")
    touched(tmp_path, "patient A/old.nii.gz")
    found, left = found_in(tmp_path)
    assert found == ["patient A/old.nii.gz", "patient A/CT", "patient B/study/CT"]
    assert {path for paths in left.values() for path in paths} == {"patient A/CT/viewer.exe", "patient B/US"}
    cases = plan_cases(find_scans([tmp_path / "patient A" / "CT", tmp_path / "patient B"]).found, tmp_path / "out")
    assert [case.name for case in cases] == ["patient A_CT", "study_CT"]


def test_results_contexts_links_and_depth(folder: Path, run: Run) -> None:
    scan(folder / "data/a.nii.gz")
    assert run(*COMMAND, "data", "-o", "data/out", *FAST).code == 0
    assert run("customize", *COMMAND[1:], "-o", "data/ctx", *GATED).code == 0
    (folder / "data/loop").symlink_to(folder / "data")
    (folder / "data/same.nii.gz").symlink_to("a.nii.gz")
    (folder / "data/itself.nii.gz").symlink_to("itself.nii.gz")
    deep = scan(folder / "data" / "/".join("abcdefghij") / "deep.nii.gz")
    found, left = found_in(folder / "data")
    assert found == ["a.nii.gz", "itself.nii.gz"]
    assert left["a result of this program"] == ["out/a"]
    assert left["a context of this program"] == ["ctx"]
    assert left["a link to a folder above it"] == ["loop"]
    assert left["already taken"] == ["same.nii.gz"]
    assert any(deep.is_relative_to(folder / "data" / path) for paths in left.values() for path in paths)


def test_inputs_of_the_command_are_no_queries(folder: Path, run: Run) -> None:
    scan(folder / "query.nii.gz")
    outcome = run(*COMMAND, ".", "-o", "out", *FAST)
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (folder / "out").iterdir() if path.is_dir()} == {"query"}
    assert "atlas.nii.gz" in outcome.err
    assert "labels.nii.gz" in outcome.err


def test_a_folder_without_scans(tmp_path: Path) -> None:
    touched(tmp_path, "notes.txt", "labels.nii.gz")
    with pytest.raises(InputError, match=r"no scan .*notes.txt"):
        find_scans([tmp_path])


def test_a_link_to_itself_costs_one_case(folder: Path, run: Run) -> None:
    scan(folder / "scans/a.nii.gz")
    (folder / "scans/loop.nii.gz").symlink_to("loop.nii.gz")
    outcome = run(*COMMAND, "scans", "-o", "out", *FAST)
    assert outcome.code == 1
    assert "scans/loop.nii.gz" in outcome.err
    assert (folder / "out/a/segmentation.nii.gz").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_text_costs_one_case(folder: Path, run: Run) -> None:
    scan(folder / "scans/a.nii.gz")
    (folder / os.fsdecode(b"scans/caf\xe9.nii.gz")).write_bytes((folder / "scans/a.nii.gz").read_bytes())
    outcome = run(*COMMAND, "scans", "-o", "out", *FAST)
    assert outcome.code == 0, outcome.err
    assert "caf" in outcome.err
    assert {path.name for path in (folder / "out").iterdir() if path.is_dir()} == {"a"}
    assert run(*COMMAND, os.fsdecode(b"scans/caf\xe9.nii.gz"), "-o", "out2", *FAST).code == 2


# --- names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["p1/T1.nii", "p2/T1.nii"], ["p1_T1", "p2_T1"]),
        (["p1/scan/T1.nii", "p2/scan/T1.nii", "p2/scan/T2.nii"], ["p1_T1", "p2_T1", "T2"]),
        (["p1/a/T1.nii", "p1/b/T1.nii", "p2/a/T1.nii"], ["p1_a_T1", "p1_b_T1", "p2_a_T1"]),
        (["T1.nii", "p/T1.nii"], [None, "p_T1"]),
        (["p/x.nii", "p/X.NRRD", "p/y.nii"], ["x_nii", "X_NRRD", "y"]),
        (["p/x.mgz"], ["x"]),
    ],
)
def test_names_that_collide(tmp_path: Path, paths: list[str], names: list[str | None]) -> None:
    cases = plan_cases([tmp_path / path for path in paths], tmp_path / "out")
    for case, name in zip(cases, names, strict=True):
        assert name is None or case.name == name
    again = plan_cases([tmp_path / path for path in reversed(paths)], tmp_path / "out")
    assert {case.query: case.name for case in again} == {case.query: case.name for case in cases}
    assert len({case.name.casefold() for case in cases}) == len(cases)


def test_another_scan_never_replaces_a_result(folder: Path, run: Run) -> None:
    one, two = scan(folder / "p1/T1.nii.gz", 1), scan(folder / "p2/T1.nii.gz", 2)

    def segmented(query: Path, *options: str) -> dict[str, str]:
        outcome = run(*COMMAND, str(query.relative_to(folder)), "-o", "out", *FAST, *options)
        assert outcome.code == 0, outcome.err
        statuses = {path.parent.name: json.loads(path.read_text()) for path in (folder / "out").glob("*/status.json")}
        return {name: status["provenance"]["query"]["sha256"] for name, status in statuses.items()}

    first = segmented(one)
    assert set(first) == {"T1"}
    both = segmented(two)
    assert set(both) == {"T1", "p2_T1"}
    assert both["T1"] == first["T1"] != both["p2_T1"]
    # Each is found again, under any path and after its content changed.
    assert segmented(two) == segmented(one) == both
    scan(one, 3)
    changed = segmented(one)
    assert set(changed) == set(both)
    assert changed["T1"] != both["T1"]
    (folder / "p1").rename(folder / "moved")
    assert segmented(folder / "moved/T1.nii.gz") == changed
    three = scan(folder / "p3/T1.nii.gz", 4)
    forced = segmented(three, "--force")
    assert set(forced) == set(both)
    assert forced["T1"] != changed["T1"]


def test_scans_of_one_size_and_time_are_told_apart(folder: Path, run: Run) -> None:
    """As from an archive: raw files of equal length, unpacked with the same whole second."""
    for number in (1, 2):
        path = scan(folder / f"p{number}/T1.nii", number)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert run(*COMMAND, f"p{number}/T1.nii", "-o", "out", *FAST).code == 0
    assert {path.name for path in (folder / "out").iterdir() if path.is_dir()} == {"T1", "p2_T1"}


# --- dry run


def test_dry_run(folder: Path, run: Run) -> None:
    for number in (1, 2):
        scan(folder / f"scans/p{number}/T1.nii.gz", number)
    touched(folder, "scans/p1/notes.txt")
    before = sorted(folder.rglob("*"))
    outcome = run(*COMMAND, "scans", "-o", "out", *FAST, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert sorted(folder.rglob("*")) == before
    for text in ("p1_T1", "p2_T1", "scans/p2/T1.nii.gz", "scans/p1/notes.txt"):
        assert text in outcome.out
    assert run(*COMMAND, "scans/p1", "-o", "out", *FAST).code == 0
    plan = run(*COMMAND, "scans", "-o", "out", *FAST, "--dry-run", "--json").json
    assert {one["case"]: one["kept"] for one in plan["cases"]} == {"T1": True, "p2_T1": False}
    assert plan["estimated_seconds"] is not None
    assert plan["left_out"] == {"no image file": ["scans/p1/notes.txt"]}


# --- what a run writes


def test_every_format(folder: Path, run: Run) -> None:
    scan(folder / "query.nii.gz")
    plain = [name for name in FORMATS if name not in ("rtstruct", "seg")]
    outcome = run(*COMMAND, "query.nii.gz", "-o", "out", *FAST, "--format", ",".join(plain), "--flat", "flat")
    assert outcome.code == 0, outcome.err
    result = load_labels(folder / "out/query/segmentation.nii.gz")
    for name in plain:
        path = folder / "out/query" / FORMATS[name]
        if path.is_dir():
            for one in STRUCTURES:
                mask = load_labels(path / f"{one.name}.nii.gz")
                assert np.array_equal(mask.data, result.data == one.value)
                assert mask.grid.matches(result.grid)
            continue
        labels = load_labels(path)
        assert np.array_equal(labels.turned_to(result.grid).data, result.data)
        if name in ("nifti", "nrrd", "seg.nrrd"):
            assert labels.source is not None
            assert {value: entry.name for value, entry in labels.source.label_table.items()} == {
                one.value: one.name for one in STRUCTURES
            }
    for table in ("colors.ctbl", "labels.txt"):
        names = read_names_file(folder / "out/query" / table)
        assert {one.value: (one.name, one.color) for one in STRUCTURES} == {
            value: (entry.name, entry.color) for value, entry in names.items() if value
        }
    assert (folder / "flat/query.nii.gz").read_bytes() == (folder / "out/query/segmentation.nii.gz").read_bytes()
    dataset = json.loads((folder / "flat/dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, **{one.name: one.value for one in STRUCTURES}}
    assert dataset["file_ending"] == ".nii.gz"


def test_table_of_a_cohort_and_earlier_results(folder: Path, run: Run, under_review: None) -> None:
    scan(folder / "first/a.nii.gz")
    scan(folder / "second/b.nii.gz", 1)
    touched(folder, "second/damaged.nii.gz")
    assert run(*COMMAND, "first", "-o", "out", *FAST).code == 0
    outcome = run(*COMMAND, "second", "-o", "out", *FAST)
    assert outcome.code == 1
    assert "review: liver, kidney, node" in outcome.out
    assert "cohort.csv" in outcome.out
    with (folder / "out/cohort.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["structure"], row["in_run"]) for row in rows] == [
        *(("b", one.name, "True") for one in STRUCTURES),
        ("damaged", "", "True"),
        *(("a", one.name, "False") for one in STRUCTURES),
    ]
    runs = {name: json.loads((folder / f"out/{name}/run.json").read_text()) for name in ("a", "b")}
    for row in rows:
        if row["structure"]:
            one = next(one for one in runs[row["case"]]["structures"] if one["name"] == row["structure"])
            assert float(row["volume_ml"]) == one["volume_ml"]
            assert (row["status"], row["verdict"]) == (one["status"], one["quality"]["verdict"])
    assert "damaged" in rows[len(STRUCTURES)]["remark"]
    cohort = json.loads((folder / "out/cohort.json").read_text())
    assert {case["case"]: case["in_run"] for case in cohort["cases"]} == {"b": True, "damaged": True, "a": False}
    assert cohort["counts"] == {"done": 1, "failed": 1, "left": 0, "kept": 0}


def test_the_gate_is_trained_once_for_all_workers(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        scan(folder / f"scans/{number}.nii.gz", number)
    alone = run(*COMMAND, "scans", "-o", "alone", *GATED)
    assert alone.code == 0, alone.err
    works = []

    def in_this_process(work: Any, cases: Any, watcher: Any, workers: int, gpus: Any = ()) -> Any:
        works.append(work)
        monkeypatch.setattr(sys.modules["atlassegfm.segment"], "train_context", None)
        return run_here(work, cases, watcher)

    monkeypatch.setattr("atlassegfm.jobs.pool.run_in_processes", in_this_process)
    outcome = run(*COMMAND, "scans", "-o", "out", *GATED, "--workers", "2")
    assert outcome.code == 0, outcome.err
    assert works[0].gate is not None
    for number in range(3):
        for name in ("segmentation.nii.gz", "run.json"):
            assert (folder / f"out/{number}/{name}").read_bytes() == (folder / f"alone/{number}/{name}").read_bytes()


def test_a_full_disk_ends_the_run(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        scan(folder / f"scans/{number}.nii.gz", number)
    calls: list[Any] = []
    real = work_module.segment

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **options)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "out/.writing-x/new"))

    monkeypatch.setattr(work_module, "segment", counted)
    monkeypatch.setattr(store, "save_volume", full)
    outcome = run(*COMMAND, "scans", "-o", "out", *FAST)
    assert outcome.code == 1
    assert len(calls) == 1
    assert ".writing" not in outcome.err
    assert "2 left" in outcome.out
    monkeypatch.undo()
    os.chdir(folder)
    assert run(*COMMAND, "scans", "-o", "out", *FAST).code == 0


def test_an_output_folder_is_not_named_like_a_file(folder: Path, run: Run) -> None:
    scan(folder / "query.nii.gz")
    before = sorted(folder.rglob("*"))
    outcome = run(*COMMAND, "query.nii.gz", "-o", "seg.nii.gz", *FAST)
    assert outcome.code == 2
    assert "seg.nii.gz" in outcome.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "option", [("--structures", "liver"), ("--overlap", "first"), ("--atlas-series", "3"), ("--synonyms", "x.toml")]
)
def test_options_that_cannot_act(folder: Path, run: Run, option: tuple[str, str]) -> None:
    scan(folder / "query.nii.gz")
    outcome = run("segment", "--context", "ctx", "query.nii.gz", "-o", "out", *option)
    assert outcome.code == 2
    assert option[0] in outcome.err
    for more in (("--model-path", "x.pt", "--model", "builtin"), ("--prompt", "box", "--model", "none")):
        refused = run(*COMMAND, "query.nii.gz", "-o", "out", *FAST[:-2], *more)
        assert refused.code == 2
        assert more[1] in refused.err
    series = run(*COMMAND, "query.nii.gz", "-o", "out", *FAST, "--series", "3")
    assert series.code == 2
    assert "--series" in series.err


# --- structures and images


def test_some_structures_of_a_label_map(folder: Path, run: Run) -> None:
    scan(folder / "query.nii.gz")
    outcome = run(*COMMAND, "query.nii.gz", "-o", "out", *FAST, "--structures", "node,li*", "--json")
    assert outcome.code == 0, outcome.err
    assert [one["name"] for one in outcome.json["results"][0]["structures"]] == ["liver", "node"]
    assert set(np.unique(load_labels(folder / "out/query/segmentation.nii.gz").data)) <= {0, 1, 12}
    wrong = run(*COMMAND, "query.nii.gz", "-o", "out2", *FAST, "--structures", "lver")
    assert wrong.code == 2
    assert "liver" in wrong.err


def test_structures_of_one_name_are_told_apart(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "names.json").write_text(json.dumps({"1": "organ", "7": "Organ", "12": "organ (2)"}))
    atlas = Atlas.from_files(folder / "atlas.nii.gz", folder / "labels.nii.gz", folder / "names.json")
    assert len({name.casefold() for name in atlas.names}) == 3
    assert atlas.names[0] == "organ"
    assert "Organ (3)" in caplog.text


def test_paths_and_images_in_python(folder: Path) -> None:
    settings = run_settings()
    query = Patient(shift_mm=(1.5, 1.0, -2.0)).scan(GRID)
    save_volume(query, folder / "query.nii.gz")
    expected = segment(Context.from_files("atlas.nii.gz", "labels.nii.gz", settings=settings), "query.nii.gz")
    image = nib.Nifti1Image(query.data, GRID.affine)
    labels = ATLAS.labels(GRID)
    context = Context.from_files(ATLAS.scan(GRID), (labels.data, GRID.affine), settings=settings)
    for one in (query, image, (query.data, GRID.affine), folder / "query.nii.gz"):
        assert np.array_equal(segment(context, one).labels.data, expected.labels.data)


def test_progress_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    atlas = Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES)
    segment(Context(atlas, run_settings()), ATLAS.scan(GRID), progress=True)
    assert "registration" in capsys.readouterr().err


def run_settings() -> Any:
    from atlassegfm import Settings
    from atlassegfm.core.config import with_overrides

    return with_overrides(Settings(), [*UNREGISTERED, "model=none"])
