"""Results for other programs: what a network is trained on, and BIDS derivatives."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from atlassegfm.atlas import Atlas
from atlassegfm.core.bids import BidsName, parse_wanted
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_image, load_labels, save_volume
from atlassegfm.export import find_results, write_nnunet
from atlassegfm.export.training import grown, training_labels, uncertainty_mm
from atlassegfm.jobs import find_scans
from atlassegfm.jobs.review import accept
from atlassegfm.records import PromptRecord, RunRecord
from conftest import SHEARED, Run
from dicom_series import AFFINES, write_series
from result_folders import run_record, write_result
from scenes import ATLAS, STRUCTURES, Patient, straight_grid

GRID = straight_grid()
NUMBERS = {1: 1, 7: 2, 12: 3}
DATASET = "raw/Dataset101_Made"
MADE = ("--nnunet", DATASET, "--channel", "CT")
EXPORT = ("export", "out", "--images", "scans")
TRAIN = (*EXPORT, "--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz", *MADE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_volume(ATLAS.scan(GRID), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    (tmp_path / "scans").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def result(folder: Path) -> Callable[..., Path]:
    """Make a result, and its scan unless that is there already."""

    def make(name: str, *verdicts: str, scan: str | None = None, **options: Any) -> Path:
        path = folder / "scans" / (scan or f"{name}.nii.gz")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_volume(Patient(shift_mm=(float(len(name)), 0.0, 0.0)).scan(GRID), path)
        write_result(folder / "out" / name, 0.0, verdicts or ("good",) * 3, **options)  # type: ignore[arg-type]
        run = RunRecord.read(folder / "out" / name / "run.json")
        query = run.inputs.query
        assert query is not None
        inputs = run.inputs.model_copy(update={"query": query.model_copy(update={"file": path.name})})
        run.model_copy(update={"inputs": inputs}).write(folder / "out" / name / "run.json")
        return folder / "out" / name

    return make


def manifest(dataset: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (dataset / "export.csv").open(newline="", encoding="utf-8") as file:
        return {(row["case"], row["structure"]): row for row in csv.DictReader(file)}


def test_a_training_set(folder: Path, run: Run, result: Callable[..., Path]) -> None:
    turned = Patient(shift_mm=(2.0, 0.0, 0.0)).scan(GRID)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = GRID.shape[0] - 1
    turned = Volume(np.round(turned.data[::-1]), Grid(GRID.shape, GRID.affine @ flip))
    save_volume(turned, folder / "scans/c.nrrd")
    tilted = Volume(turned.data, Grid(GRID.shape, SHEARED))
    save_volume(tilted, folder / "scans/tilted.nii.gz")
    result("b_0000")
    doubtful = result("c", "review", "good", "failed", scan="c.nrrd")
    result("lost", scan="moved.nii.gz")
    (folder / "scans/moved.nii.gz").unlink()
    result("same")
    shutil.copy(folder / "atlas.nii.gz", folder / "scans/same.nii.gz")
    save_volume(Volume(load_labels(result("tilted") / "segmentation.nii.gz").data, tilted.grid), folder / "t.nii.gz")
    shutil.copy(folder / "t.nii.gz", folder / "out/tilted/segmentation.nii.gz")
    result("useless", "failed", "review", "failed")
    old = RunRecord.read(result("older") / "run.json")
    old.model_copy(update={"structures": old.structures[:2]}).write(folder / "out/older/run.json")

    outcome = run(*TRAIN)
    assert outcome.code == 0, outcome.err
    dataset = load_dataset(folder / DATASET)
    assert [case.name for case in dataset.cases] == ["atlas", "b", "c"]
    assert (dataset.structures, dataset.ignored) == ({1: "liver", 2: "kidney", 3: "node"}, 4)
    content = json.loads((folder / DATASET / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1, "kidney": 2, "node": 3, "ignore": 4}
    assert (content["channel_names"], content["numTraining"]) == ({"0": "CT"}, 3)
    table = np.array([NUMBERS.get(value, 0) for value in range(13)])
    originals = {"atlas": folder / "labels.nii.gz", "b": folder / "out/b_0000/segmentation.nii.gz"}
    for name, path in originals.items():
        assert np.array_equal(load_labels(dataset.case(name).labels).data, table[load_labels(path).data])
    for case, scan in (("atlas", "atlas.nii.gz"), ("b", "scans/b_0000.nii.gz"), ("c", "scans/c.nrrd")):
        image, original = load_image(dataset.case(case).image), load_image(folder / scan)
        assert np.array_equal(image.data, original.data)
        assert image.grid.matches(original.grid)
        assert image.grid.matches(load_labels(dataset.case(case).labels).grid)

    # The doubtful structures of c: wherever result, atlas or model see them is ignored, and more around it.
    made = load_labels(dataset.case("c").labels).turned_to(GRID).data
    seen = [load_labels(doubtful / f"{name}.nii.gz").data for name in ("segmentation", "atlas", "model")]
    places = np.any([np.isin(one, (1, 12)) for one in seen], axis=0)
    assert set(np.unique(made)) == {0, 2, 4}
    assert np.array_equal(made == 2, seen[0] == 7)
    assert (made[places & (seen[0] != 7)] == 4).all()
    rows = manifest(folder / DATASET)
    margins_mm = [float(rows["c", name]["margin_mm"]) for name in ("liver", "node")]
    distance_mm = ndimage.distance_transform_edt(~places, GRID.spacing_mm)
    assert 0.8 * min(margins_mm) < distance_mm[made == 4].max() < 1.3 * max(margins_mm) + 2
    assert (rows["c", "kidney"]["use"], rows["c", "liver"]["use"]) == ("label", "ignore")
    assert rows["c", "liver"]["reason"] == "because review <b>"
    assert rows["atlas", "liver"]["from"] == "atlas"
    assert int(rows["c", "node"]["ignored"]) == (made == 4).sum()

    # What is not there is named, on the screen and in the table.
    reasons = {
        "lost": "not among the images",
        "same": "atlas",
        "tilted": "right angles",
        "useless": "no structure",
        "older": "without node",
    }
    for name, reason in reasons.items():
        assert reason in rows[name, ""]["reason"], name
        assert f"left out, {name}: {rows[name, '']['reason']}" in outcome.err
    assert not list((folder / "raw").glob(".*"))


def test_without_doubt_there_is_no_ignore_label(folder: Path, run: Run, result: Callable[..., Path]) -> None:
    result("a")
    outcome = run(*EXPORT, "--nnunet", DATASET, "--channel", "T2", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["labels"] == {"background": 0, "liver": 1, "kidney": 2, "node": 3}
    assert (outcome.json["channel"], outcome.json["cases"], outcome.json["atlases"]) == ("T2", ["a"], [])
    assert "without the atlas" in outcome.err


def test_atlases_count_with_all_structures_only(folder: Path, result: Callable[..., Path]) -> None:
    result("a")
    first = Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES)
    labels = ATLAS.labels(GRID)
    labels.data[labels.data == 7] = 0
    second = Atlas.from_volumes(Patient(scale=1.1).scan(GRID), labels, STRUCTURES).matched(first)
    done = write_nnunet(
        find_results(folder / "out", [folder / "scans"]), folder / DATASET, [first, second], channel="T1"
    )
    assert (done.atlases, done.cases) == (["atlas"], ["a"])
    assert "kidney" in done.left_out["atlas-2"]


def test_a_dicom_series(folder: Path, run: Run, result: Callable[..., Path]) -> None:
    random = np.random.default_rng(0)
    data = random.integers(-1000, 900, (12, 10, 8)).astype(np.int16)
    write_series(folder / "scans/ct", data, AFFINES["axial"], modality="CT")
    scan = load_series_of(folder / "scans/ct")
    case = result("ct", scan="ct", keep=False)
    labels = np.zeros(scan.grid.shape, np.uint8)
    labels[2:5, 3:6, 2:6] = 7
    save_volume(Volume(labels, scan.grid), case / "segmentation.nii.gz")
    outcome = run(*EXPORT, *MADE)
    assert outcome.code == 0, outcome.err
    made = load_dataset(folder / DATASET).case("ct")
    assert np.array_equal(load_image(made.image).turned_to(scan.grid).data, scan.data)
    assert np.array_equal(load_labels(made.labels).turned_to(scan.grid).data, labels // 7 * 2)


def load_series_of(path: Path) -> Volume:
    from atlassegfm.dicom import open_image

    return open_image(path)


# --- what a network may learn from


@pytest.mark.parametrize("dice", [0.0, 0.2, 0.55, 0.9, 1.0])
def test_uncertainty_of_a_ball(dice: float) -> None:
    radius = 9.0
    shift = uncertainty_mm(4 / 3 * np.pi * radius**3, dice)
    assert 1 - 3 * shift / (4 * radius) + shift**3 / (16 * radius**3) == pytest.approx(dice, abs=1e-9)
    assert 0 <= shift <= 2 * radius + 1e-9


@pytest.mark.parametrize("margin_mm", [0.0, 3.0, 26.0])
def test_growth_against_the_exact_distance(margin_mm: float) -> None:
    spacing_mm = np.array([0.7, 1.3, 4.0])
    mask = np.zeros((90, 60, 24), bool)
    mask[30:41, 20:25, 10:13] = True
    distance_mm = ndimage.distance_transform_edt(~mask, spacing_mm)
    result = grown(mask, margin_mm, spacing_mm)
    assert result[distance_mm <= 0.8 * margin_mm].all()
    assert not result[distance_mm > 1.3 * margin_mm + 0.01].any()


def test_structures_that_are_not_there() -> None:
    labels = Patient().labels(GRID)
    labels.data[labels.data == 12] = 0
    run = run_record("x", {1: 1.0, 7: 1.0, 12: 0.0}, ("good", "good", "failed"))
    *_, node = run.structures

    def made(**changes: Any) -> Any:
        structures = (*run.structures[:-1], node.model_copy(update=changes))
        return training_labels(run.model_copy(update={"structures": structures}), labels, [], NUMBERS)

    with pytest.raises(InputError, match=r"node was not found.*--keep"):
        made()
    assert made(status="outside").structures[-1].use == "background"
    box = PromptRecord(kind="box", first_voxel=(2, 2, 2), last_voxel=(4, 3, 2), first_mm=(0,) * 3, last_mm=(0,) * 3)
    case = made(prompt=box)
    assert case.structures[-1].use == "ignore"
    assert (case.data[2:5, 2:4, 2] == 4).all()
    # A person who accepts it says that it is not there.
    accepted = accept(run, [12], labels, labels, "Dr. Grey")
    case = training_labels(accepted, labels, [], NUMBERS)
    assert (case.structures[-1].use, case.ignored) == ("background", 0)


def test_corrected_labels_count_and_their_author_is_not_named(
    folder: Path, run: Run, result: Callable[..., Path]
) -> None:
    case = result("a", "failed", "good", "failed")
    automatic = load_labels(case / "segmentation.nii.gz")
    corrected = Volume(np.roll(automatic.data, 2, axis=0), automatic.grid)
    save_volume(corrected, case / "segmentation.nii.gz")
    accept(RunRecord.read(case / "run.json"), [1, 12], corrected, automatic, "Dr. Grey").write(case / "run.json")
    assert run(*EXPORT, *MADE).code == 0
    made = load_labels(folder / DATASET / "labelsTr/a.nii.gz").data
    assert np.array_equal(made == 1, corrected.data == 1)
    rows = manifest(folder / DATASET)
    assert rows["a", "liver"]["reason"] == "accepted by a person"
    assert "Grey" not in (folder / DATASET / "export.csv").read_text()


# --- refusals


REFUSED = {
    ("export", "scans", "--images", "scans", *MADE): "scans: no run.json",
    ("export", "out/a", "--images", "scans", *MADE): "single case",
    (*EXPORT, *MADE[:2]): "--channel",
    (*EXPORT,): "--nnunet DATASET and --bids FOLDER",
    (*EXPORT, *MADE, "--bids", "b"): "--nnunet DATASET and --bids FOLDER",
    (*EXPORT, "--bids", "b", "--channel", "CT"): "--channel",
    (*EXPORT, "--nnunet", "raw/Liver", *MADE[2:]): "DatasetNNN_NAME",
    (*EXPORT, "--nnunet", "there/Dataset007_Old", *MADE[2:]): "exists already",
    (*EXPORT, "--nnunet", "there/Dataset007_New", *MADE[2:]): "Dataset007_Old has the number 007",
    (*EXPORT, "--bids", "there"): "exists already",
    (*EXPORT, "--bids", "b"): "no BIDS name",
    ("export", "out", "--images", "empty", *MADE): "no scan here",
    ("export", "out", "--images", "atlas.nii.gz", *MADE): "none of 1 case",
    (*EXPORT, "--atlas", "atlas.nii.gz", *MADE): "--labels",
    (*TRAIN, "--structures", "liver"): "the results kidney, liver, node",
}


def test_refusals(folder: Path, run: Run, result: Callable[..., Path]) -> None:
    result("a")
    (folder / "there/Dataset007_Old").mkdir(parents=True)
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    for arguments, named in REFUSED.items():
        outcome = run(*arguments)
        assert outcome.code == 2, arguments
        assert named in outcome.err
        assert sorted(folder.rglob("*")) == before


def test_cases_of_one_name_and_structures_of_two(folder: Path, run: Run, result: Callable[..., Path]) -> None:
    result("a")
    result("A_0000")
    outcome = run(*EXPORT, *MADE)
    assert outcome.code == 2
    assert "would have the name" in outcome.err
    shutil.rmtree(folder / "out/A_0000")
    other = result("b") / "run.json"
    other.write_text(other.read_text().replace('"liver"', '"spleen"'))
    outcome = run(*EXPORT, *MADE)
    assert outcome.code == 2
    assert "label 1 is 'liver' in out/a, and 'spleen' in out/b" in outcome.err
    assert not (folder / "raw").exists()


def test_a_full_disk_leaves_nothing(
    folder: Path, run: Run, result: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    result("a")
    result("b")

    def full(_volume: Volume, path: Path, **_: Any) -> None:
        if path.name.startswith("b"):
            raise OSError(errno.ENOSPC, "full")
        path.write_bytes(b"")

    monkeypatch.setattr("atlassegfm.export.nnunet.save_volume", full)
    outcome = run(*EXPORT, *MADE)
    assert outcome.code == 2
    assert "no space" in outcome.err
    assert not (folder / "raw").exists()


# --- BIDS


def test_bids_names() -> None:
    name = BidsName.of(Path("in/sub-01_ses-a_acq-hi_run-2_chunk-1_T1w.nii.gz"))
    assert name == BidsName({"sub": "01", "ses": "a", "acq": "hi", "run": "2", "chunk": "1"}, "T1w")
    assert name.derived("x", "dseg") == "sub-01_ses-a_acq-hi_run-2_space-orig_chunk-1_desc-x_dseg"
    for other in ("T1w", "sub-01", "ses-1_sub-01_T1w", "sub-01_sub-02_T1w", "sub-01_ses_T1w", "sub-01_T1w (copy)"):
        assert not BidsName.of(Path(f"{other}.nii.gz")).entities, other
    for words, fits in {
        ("sub-01", "sub-02"): True,
        ("T1w", "ses-a"): True,
        ("T2w",): False,
        ("task-x",): False,
    }.items():
        assert name.fits(parse_wanted(words)) is fits
    with pytest.raises(InputError, match="'subject=01'"):
        parse_wanted(["subject=01"])


def bids_dataset(root: Path, *names: str) -> Iterator[Path]:
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": "Made", "BIDSVersion": "1.10.0", "DatasetDOI": "doi:10.0000/made"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    for name in names:
        subject, session, *_ = name.split("_")
        yield root / subject / session / "anat" / f"{name}.nii.gz"


def test_scans_of_a_bids_dataset_by_entities(tmp_path: Path) -> None:
    for path in bids_dataset(tmp_path, "sub-01_ses-1_T1w", "sub-01_ses-1_T2w", "sub-01_ses-2_T1w", "sub-02_ses-1_T1w"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    scans = find_scans([tmp_path], entities=("ses-1", "T1w"))
    assert [path.name for path in scans.found] == ["sub-01_ses-1_T1w.nii.gz", "sub-02_ses-1_T1w.nii.gz"]
    assert len(scans.left_out["other BIDS entities"]) == 2
    with pytest.raises(InputError, match="other BIDS entities"):
        find_scans([tmp_path], entities=("sub-1",))
    named = tmp_path / "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz"
    assert find_scans([named], entities=("ses-1",)).found == [named]


@pytest.fixture
def derivatives(folder: Path, run: Run, result: Callable[..., Path]) -> Path:
    """Derivatives of a dataset of two subjects, one of them with two runs."""
    names = ("sub-01_ses-1_T1w", "sub-02_ses-1_acq-hi_run-1_T1w", "sub-02_ses-1_acq-hi_run-2_T1w")
    for path, verdict in zip(bids_dataset(folder / "scans/ds", *names), ("good", "review", "good"), strict=True):
        result(path.name.removesuffix(".nii.gz"), verdict, "good", "good", scan=str(path), keep=False)
    result("stranger")
    outcome = run(*EXPORT, "--bids", "scans/ds/derivatives/atlassegfm")
    assert outcome.code == 0, outcome.err
    assert "left out, stranger" in outcome.err
    return folder / "scans/ds/derivatives/atlassegfm"


def test_bids_derivatives(folder: Path, run: Run, result: Callable[..., Path], derivatives: Path) -> None:
    maps = sorted(path.relative_to(derivatives).as_posix() for path in derivatives.rglob("*.nii.gz"))
    assert maps == [
        "sub-01/ses-1/anat/sub-01_ses-1_space-orig_desc-atlassegfm_dseg.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_acq-hi_run-1_space-orig_desc-atlassegfm_dseg.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_acq-hi_run-2_space-orig_desc-atlassegfm_dseg.nii.gz",
    ]
    own = folder / "out/sub-02_ses-1_acq-hi_run-1_T1w/segmentation.nii.gz"
    assert np.array_equal(load_labels(derivatives / maps[1]).data, load_labels(own).data)
    description = json.loads((derivatives / "dataset_description.json").read_text())
    assert (description["DatasetType"], description["DatasetLinks"]) == ("derivative", {"raw": "../.."})
    assert description["SourceDatasets"] == [{"DOI": "doi:10.0000/made"}]
    sidecar = json.loads((derivatives / maps[1].replace(".nii.gz", ".json")).read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-02/ses-1/anat/sub-02_ses-1_acq-hi_run-1_T1w.nii.gz"]
    assert (sidecar["Verdict"], sidecar["Structures"][0]["Verdict"]) == ("review", "review")
    assert (derivatives / "dseg.tsv").read_text().splitlines()[:2] == ["index\tname\tcolor", "1\tliver\t#0ac832"]
    # Two scans of one session that differ in their suffix alone would have one derivative.
    result("sub-01_ses-1_T2w", scan="ds/sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz")
    outcome = run(*EXPORT, "--bids", "other")
    assert outcome.code == 2
    assert "sub-01_ses-1_T1w and sub-01_ses-1_T2w" in outcome.err
    assert not (folder / "other").exists()


def test_the_bids_validator_finds_no_error(derivatives: Path) -> None:
    validator = shutil.which("bids-validator-deno", path=Path(sys.executable).parent)
    if validator is None:
        pytest.skip("the BIDS validator is not installed: make test installs it")
    found = subprocess.run([validator, "--format", "json", derivatives], capture_output=True, text=True, check=False)
    issues = json.loads(found.stdout)["issues"]["issues"]
    assert [one for one in issues if one["severity"] == "error"] == []
    assert found.returncode == 0


@pytest.mark.slow
def test_the_integrity_check_of_nnunet(folder: Path, run: Run, result: Callable[..., Path]) -> None:
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: it comes with the extra 'nninteractive'")
    result("a", "failed", "good", "review")
    result("b")
    assert run(*TRAIN).code == 0
    module = "nnunetv2.experiment_planning.verify_dataset_integrity"
    code = f"from {module} import verify_dataset_integrity as verify; verify({str(folder / DATASET)!r}, 1)"
    checked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "verify_dataset_integrity Done" in checked.stdout
    assert "Warning" not in checked.stdout
    # It would find a wrong label.
    path = folder / DATASET / "labelsTr/b.nii.gz"
    labels = load_labels(path)
    save_volume(Volume(labels.data + 3, labels.grid), path)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0
