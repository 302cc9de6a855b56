"""Read a folder of results: one folder a case, and the summaries of the cohort."""

import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.errors import InputError
from ..core.files import entries_of
from ..records import RUN, STATUS, CohortRecord, RunRecord, StatusRecord

#: Summary of a cohort, or one for each of its shards.
COHORTS = "cohort*.json"
ATLAS, MODEL = "atlas.nii.gz", "model.nii.gz"
#: Files that the report adds.
CASE_PAGE, CASE_PICTURE, COHORT_PAGE = "report.html", "overview.png", "report.html"
#: State of a case that is still to be computed.
LEFT = "left"

#: Folders in a path: they may name patients, so messages are shown without them.
_FOLDERS = re.compile(r"(?:[A-Za-z]:)?[\\/](?:[^\\/:'\"<>|\n]+[\\/])+")


@dataclass(frozen=True, eq=False)
class Case:
    """One case with a result."""

    name: str  # of its folder: the only identifier of the patient that is shown
    folder: Path
    run: RunRecord = field(repr=False)
    status: StatusRecord = field(repr=False)
    in_run: bool = True  # whether the last command had it; if not, its result is of an earlier one

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the result as a whole, without folders."""
        return tuple(map(shown_reason, self.status.warnings))

    @property
    def total_seconds(self) -> float | None:
        """Wall time; None where it is not recorded."""
        return self.status.total_seconds or None

    @property
    def series(self) -> str | None:
        """Series of the DICOM folder that was segmented. Not to be shown."""
        return None if self.status.provenance is None else self.status.provenance.series


@dataclass(frozen=True)
class Failure:
    """One case without a result."""

    name: str
    state: str  # "failed", "unreadable" or "left"
    reason: str  # without the folders of paths
    in_run: bool = True


@dataclass(frozen=True, eq=False)
class ResultFolder:
    """Cases and failures of a folder of results, each by name."""

    cases: tuple[Case, ...]
    failures: tuple[Failure, ...]

    @property
    def earlier(self) -> set[str]:
        """Names of the cases of earlier commands."""
        cases: tuple[Case | Failure, ...] = (*self.cases, *self.failures)
        return {one.name for one in cases if not one.in_run}

    @property
    def structure_names(self) -> dict[int, str]:
        """Names of all label values, in order of appearance."""
        names: dict[int, str] = {}
        for row in (row for case in self.cases for row in case.run.structures):
            names.setdefault(row.value, row.name)
        return names


def read_folder(path: str | os.PathLike[str]) -> ResultFolder:
    """Read a folder of results, :class:`.InputError` if it holds none; a case that cannot be read is a failure."""
    path = Path(path)
    if not path.is_dir():
        there = "a file" if path.exists() else "nothing"
        raise InputError(f"{path}: found {there}, expected a folder of results as `atlassegfm segment -o` writes it")
    if (path / RUN).is_file():
        raise InputError(f"{path}: is the result of a single case; give the folder above: {path.resolve().parent}")
    folders = [entry for entry in entries_of(path) if entry.is_dir()]
    # What the folder of a case says counts more than a summary.
    found: dict[str, Case | Failure] = {}
    in_run: set[str] = set()
    for summary in sorted(path.glob(COHORTS), reverse=True):
        failures, names = _read_summary(summary)
        found |= {failure.name: failure for failure in failures}
        in_run |= names
    found |= {folder.name: case for folder in folders if (case := _read_case(folder)) is not None}
    if in_run:
        found = {name: one if name in in_run else replace(one, in_run=False) for name, one in found.items()}
    if not found:
        raise InputError(f"{path}: no {RUN} in its subfolders; give the folder that `atlassegfm segment -o` wrote")
    ordered = [found[name] for name in sorted(found)]
    cases = tuple(one for one in ordered if isinstance(one, Case))
    return ResultFolder(cases, tuple(one for one in ordered if isinstance(one, Failure)))


def shown_reason(text: str) -> str:
    """Remove the folders of paths from a message."""
    return _FOLDERS.sub("", " ".join(text.split()))


def finite(value: float | None) -> float | None:
    """Replace NaN and infinity by None."""
    return value if value is not None and math.isfinite(value) else None


def _read_case(folder: Path) -> Case | Failure | None:
    """Read one result folder; None if it is none."""
    has_run, has_status = ((folder / name).is_file() for name in (RUN, STATUS))
    try:
        # A result that was copied without its status has no times.
        status = StatusRecord.read(folder / STATUS) if has_status else StatusRecord(state="done")
        if status.state == "failed":
            return Failure(folder.name, status.state, shown_reason(status.reason))
        return Case(folder.name, folder, RunRecord.read(folder / RUN), status) if has_run else None
    except InputError as error:
        return Failure(folder.name, "unreadable", str(error).replace(f"{folder}{os.sep}", ""))


def _read_summary(path: Path) -> tuple[list[Failure], set[str]]:
    """List the cases without a result in a summary, and the names of all cases of its command."""
    try:
        record = CohortRecord.read(path)
    except InputError as error:
        return [Failure(path.name, "unreadable", str(error).replace(f"{path.parent}{os.sep}", ""))], {path.name}
    failures = [Failure(one.case, one.state, shown_reason(one.reason)) for one in record.cases if one.state != "done"]
    return failures, {one.case for one in record.cases if one.in_run}
