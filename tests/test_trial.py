"""A newcomer's first day on the command line, from a hospital's folders to scores; `make trial` shows it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.jobs import work as work_module
from conftest import Outcome, Run
from dicom_series import write_series
from scenes import ATLAS, PAPER_GATE, STRUCTURES, UNREGISTERED, Patient, straight_grid

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]
PATIENTS = {f"patient {number}": Patient(shift_mm=(1.5 - number, 1.0, number - 2.0)) for number in (1, 2, 3)}


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder a patient: NIfTI scans of one name, a DICOM series, a damaged export, and what else lies about."""
    (tmp_path / "contoured").mkdir()
    save_volume(ATLAS.scan(GRID), tmp_path / "contoured/MR.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "contoured/organs.seg.nrrd", structures=STRUCTURES)
    (tmp_path / "truth").mkdir()
    for name, patient in PATIENTS.items():
        folder = tmp_path / "scans" / name
        folder.mkdir(parents=True)
        save_volume(patient.scan(GRID), folder / "MR.nii.gz")
        (folder / "letter.pdf").write_bytes(b"%PDF-1.4")
        save_volume(patient.labels(GRID), tmp_path / "truth" / f"{name}_MR.nii.gz", structures=STRUCTURES)
    stored = PATIENTS["patient 1"].scan(GRID).data.round().astype(np.int16)
    write_series(tmp_path / "scans/patient 4/series", stored, GRID.affine, modality="MR")
    save_volume(PATIENTS["patient 1"].labels(GRID), tmp_path / "truth/series.nii.gz", structures=STRUCTURES)
    (tmp_path / "scans/patient 5").mkdir()
    (tmp_path / "scans/patient 5/MR.nii.gz").write_bytes((tmp_path / "contoured/MR.nii.gz").read_bytes()[:3000])
    save_volume(ATLAS.labels(GRID), tmp_path / "scans/patient 2/old_mask.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_first_day(hospital: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def step(code: int, *arguments: str) -> Outcome:
        outcome = run(*arguments)
        shown.append(f"$ atlassegfm {' '.join(arguments)}\n{outcome.err}{outcome.out}\n")
        assert outcome.code == code, outcome.err
        return outcome

    # Is anything wrong with the scans? One is damaged.
    checked = step(2, "check", "scans", "--json").json
    assert sum(any(found["severity"] == "error" for found in one["findings"]) for one in checked["files"]) == 1

    # One contoured scan becomes a context; it says what comes next.
    atlas = ("--atlas", "contoured/MR.nii.gz", "--labels", "contoured/organs.seg.nrrd")
    made = step(0, "customize", *atlas, "-o", "context", *FAST)
    assert "segment --context context" in made.out

    # What would be done, under which names, and what is left out?
    command = ("segment", "--context", "context", "scans", "-o", "out", "--format", "nifti,seg.nrrd", *FAST)
    plan = step(0, *command, "--dry-run", "--json").json
    names = [*(f"patient {number}_MR" for number in (1, 2, 3)), "series", "patient 5_MR"]
    assert [one["case"] for one in plan["cases"]] == names
    left_out = {Path(path).name for paths in plan["left_out"].values() for path in paths}
    assert left_out == {"letter.pdf", "old_mask.nii.gz"}
    assert not (hospital / "out").exists()

    # Interrupted after two, and resumed: the damaged scan costs itself only.
    real, calls = work_module.segment, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "segment", interrupted)
        step(130, *command)
    resumed = step(1, *command)
    assert "2 of 5 kept" in resumed.err
    assert "patient 5/MR.nii.gz" in resumed.err
    cohort = json.loads((hospital / "out/cohort.json").read_text())
    assert cohort["counts"] == {"done": 4, "failed": 1, "left": 0, "kept": 2}
    step(0, "report", "out", "--images", "scans", "--no-picture")
    for name in names[:4]:
        for file in ("segmentation.nii.gz", "segmentation.seg.nrrd", "colors.ctbl", "labels.txt", "report.html"):
            assert (hospital / "out" / name / file).is_file()
    assert (hospital / "out/report.html").is_file()

    # The table: a row for each structure of each case, and one for the failure.
    with (hospital / "out/cohort.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(STRUCTURES) + 1
    assert {row["case"] for row in rows} == set(names)

    again = step(1, *command, "--report")
    assert "out/report.html" in again.out

    # For the planning system: an RTSTRUCT on the patient's own series.
    source = "out/series/segmentation.nii.gz"
    step(0, "convert", source, "--to", "rtstruct", "--onto", "scans/patient 4/series", "-o", "rs.dcm")
    step(0, "convert", "rs.dcm", "--onto", "scans/patient 4/series", "-o", "back.nii.gz")
    counts = [np.count_nonzero(load_labels(hospital / path).data) for path in (source, "back.nii.gz")]
    assert counts[0] == counts[1] > 0

    # How good is it?
    scores = step(0, "evaluate", "--pred", "out", "--ref", "truth", "-o", "scores.csv", "--json").json
    assert scores["summary"]["cases"] == 4
    assert (hospital / "scores.csv").is_file()
    sys.stdout.write("\n".join(shown))
