"""Result folders as ``segment`` leaves them, without computing anything, and what their pages hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from atlassegfm.core.image import save_volume
from atlassegfm.quality.verdict import Verdict, overall
from atlassegfm.records import (
    InputRecord,
    Inputs,
    ModelRecord,
    QualityRecord,
    RegistrationRecord,
    RunRecord,
    StatusRecord,
    StructureRecord,
)
from atlassegfm.report import CaseOptions, ReportOptions
from scenes import ATLAS, QUERY, STRUCTURES, Patient, straight_grid

WITHOUT_PICTURES = ReportOptions(case=CaseOptions(overview=False))
SECRET = "Doe_John_19500101"


def run_record(
    name: str,
    volumes: dict[int, float],
    verdicts: tuple[Verdict | None, ...] = ("good", "good", "good"),
    *,
    seed: int = 0,
) -> RunRecord:
    """A run.json with names of patients where results have names of files."""
    return RunRecord(
        inputs=Inputs(query=InputRecord(file=f"{name}.nii.gz"), atlas=InputRecord(file=f"{SECRET}.nii.gz")),
        device="cpu",
        seed=seed,
        model=ModelRecord(
            name="builtin",
            summary="needs no download",
            code_licence="Apache-2.0",
            weights_licence="CC BY-NC-SA 4.0",
            prompt="mask",
            provenance={"folder": f"/data/{SECRET}"},
        ),
        registration=RegistrationRecord(
            source="fitted",
            confidence=0.8,
            members=1,
            folding=0.0,
            jacobian=None,
            linear_query_to_atlas_mm=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        ),
        gate=None,
        verdict=overall(verdicts),
        structures=tuple(
            StructureRecord(
                value=one.value,
                name=one.name,
                status="present" if volumes[one.value] else "absent",
                reason="",
                volume_ml=volumes[one.value],
                outside_fraction=0.0,
                prompt=None,
                quality=QualityRecord(
                    verdict=verdict,
                    reason=f"because {verdict} <b>",
                    estimated_dice=0.5,
                    low=0.4,
                    high=0.6,
                    evidence=None,
                ),
            )
            for one, verdict in zip(STRUCTURES, verdicts, strict=True)
        ),
        settings={"model": "builtin", "registration": {"engine": "instance"}},
        versions={"atlassegfm": "0.1.0", "numpy": "2"},
    )


DONE = StatusRecord(state="done", total_seconds=4.0, seconds={"registration": 3.0, "model": 1.0})


def write_result(
    folder: Path,
    shift: float,
    verdicts: tuple[Verdict | None, ...] = ("good", "good", "good"),
    *,
    keep: bool = True,
    status: StatusRecord = DONE,
) -> None:
    """Write a result as `segment` leaves it, without computing one."""
    folder.mkdir(parents=True)
    grid = straight_grid()
    labels = replace(QUERY, shift_mm=(1.5 + shift, -2.0, 1.0)).labels(grid)
    volumes = {one.value: round(float((labels.data == one.value).sum()) * 0.008, 3) for one in STRUCTURES}
    save_volume(labels, folder / "segmentation.nii.gz", structures=STRUCTURES)
    if keep:
        save_volume(ATLAS.labels(grid), folder / "atlas.nii.gz", structures=STRUCTURES)
        save_volume(Patient(shift_mm=(4.0, 0.0, 0.0)).labels(grid), folder / "model.nii.gz", structures=STRUCTURES)
    run_record(folder.name, volumes, verdicts).write(folder / "run.json")
    status.write(folder / "status.json")


def data_of(page: Path, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text(), re.DOTALL)
    assert match is not None
    return json.loads(match[1])
