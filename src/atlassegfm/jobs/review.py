"""What people say of a result: structures are accepted, or opened again; and label maps of other programs."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..core.errors import InputError
from ..core.files import replaced_folder
from ..core.image import Volume, label_values, save_volume
from ..core.labels import Structure
from ..core.overlap import dice_per_structure
from ..core.version import __version__
from ..quality.verdict import overall
from ..records import (
    RESULT_NAMES,
    RUN,
    SEGMENTATION,
    STATUS,
    CohortRecord,
    InputRecord,
    Inputs,
    ModelRecord,
    QualityRecord,
    RegistrationRecord,
    ReviewRecord,
    RunRecord,
    StatusRecord,
    StructureRecord,
)
from .store import with_volumes
from .table import read_run, write_table

#: Name of the model in results that were made elsewhere.
IMPORTED = "imported"


def now() -> str:
    """Time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def accept(run: RunRecord, values: Sequence[int], labels: Volume, automatic: Volume, by: str) -> RunRecord:
    """Record that a person accepts structures by label value; what was estimated before stays readable.

    ``labels`` are those of the result now, ``automatic`` as they were computed, on the same voxels. Accepting twice
    changes nothing but volumes.
    """
    dice = dice_per_structure(labels.data, automatic.data, values)
    at = now()

    def accepted(one: StructureRecord) -> StructureRecord:
        if one.value not in values or one.review is not None:
            return one
        found = dice[one.value]
        review = ReviewRecord(
            by=by,
            at=at,
            dice=None if found != found else round(found, 4),
            status=one.status,
            reason=one.reason,
            quality=one.quality,
        )
        missing = "outside" if one.status == "outside" else "absent"
        return one.model_copy(
            update={
                "review": review,
                "quality": _said(review.remark),
                "status": "present" if one.volume_ml else missing,
            }
        )

    return _with(run, [accepted(one) for one in with_volumes(run, labels).structures])


def reopen(run: RunRecord, values: Sequence[int]) -> RunRecord:
    """Withdraw the acceptance of structures: verdict and reason are again those that were estimated."""

    def opened(one: StructureRecord) -> StructureRecord:
        if one.value not in values or one.review is None:
            return one
        before = {name: getattr(one.review, name) for name in ("status", "reason", "quality")}
        return one.model_copy(update={"review": None, **before})

    return _with(run, [opened(one) for one in run.structures])


def _with(run: RunRecord, rows: Sequence[StructureRecord]) -> RunRecord:
    verdict = overall([one.quality.verdict for one in rows if one.quality is not None])
    return run.model_copy(update={"structures": tuple(rows), "verdict": verdict})


def _said(remark: str) -> QualityRecord:
    return QualityRecord(verdict="accepted", reason=remark, estimated_dice=None, low=None, high=None, evidence=None)


def refresh_summary(out: Path) -> None:
    """Bring ``cohort.json`` and ``cohort.csv`` of a folder of results up to date, where they are there."""
    try:
        record = CohortRecord.read(out / "cohort.json")
    except InputError:
        return
    runs = {one.case: read_run(out / one.case) for one in record.cases}
    cases = [
        one.model_copy(update={"verdict": run.verdict}) if (run := runs[one.case]) is not None else one
        for one in record.cases
    ]
    record.model_copy(update={"cases": tuple(cases)}).write(out / "cohort.json")
    write_table(cases, out, out / "cohort.csv")


def import_labels(scan: Volume, labels: Volume, structures: Sequence[Structure], folder: Path) -> None:
    """Write a result folder for a label map that another program made; nothing is judged.

    InputError if it is not on the voxels of the scan.
    """
    if labels.grid.axes_relative_to(scan.grid) is None:
        raise InputError(f"{_name(labels)}: not on the voxels of the scan {_name(scan)}; give the scan it was drawn on")
    present = set(label_values(labels.data))
    inputs = Inputs(query=InputRecord(file=_name(scan)), labels=InputRecord(file=_name(labels)))
    identity = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
    run = RunRecord(
        inputs=inputs,
        device="cpu",
        seed=0,
        model=ModelRecord(name=IMPORTED, summary="label map of another program"),
        registration=RegistrationRecord(
            source="given",
            confidence=None,
            members=0,
            folding=None,
            jacobian=None,
            linear_query_to_atlas_mm=identity,
        ),
        gate=None,
        verdict=None,
        structures=tuple(
            StructureRecord(
                value=one.value,
                name=one.name,
                status="present" if one.value in present else "absent",
                reason="",
                volume_ml=0.0,
                outside_fraction=0.0,
                prompt=None,
                quality=None,
            )
            for one in structures
        ),
        settings={},
        versions={"atlassegfm": __version__},
    )
    with replaced_folder(folder, RESULT_NAMES) as new:
        save_volume(labels.turned_to(scan.grid), new / SEGMENTATION, structures=structures)
        with_volumes(run, labels).write(new / RUN)
        StatusRecord(state="done").write(new / STATUS)


def _name(volume: Volume) -> str:
    return "" if volume.source is None else volume.source.path.name
