"""Read a folder of results: one folder a case, and the summaries of the cohort."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import InputError
from ..core.labels import palette_color
from ..quality.verdict import Verdict
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

    name: str
    """Of its folder: the only identifier of the patient that is shown."""

    folder: Path
    run: RunRecord = field(repr=False)
    status: StatusRecord = field(repr=False)

    @property
    def verdict(self) -> Verdict:
        """Worst verdict of its structures."""
        return self.run.verdict

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the result as a whole."""
        return tuple(map(shown_reason, self.status.warnings))

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time of each stage."""
        return self.status.seconds

    @property
    def total_seconds(self) -> float | None:
        """Wall time; None where it is not recorded."""
        return self.status.total_seconds or None

    @property
    def series(self) -> str | None:
        """Series of the DICOM folder that was segmented. Not to be shown."""
        return None if self.status.provenance is None else self.status.provenance.series

    @property
    def query_name(self) -> str | None:
        """File name of the query, to find it. Not to be shown."""
        return None if self.run.inputs.query is None else self.run.inputs.query.file


@dataclass(frozen=True)
class Failure:
    """One case without a result."""

    name: str
    state: str
    """"failed", "unreadable" or "left"."""

    reason: str
    """Without the folders of paths."""


@dataclass(frozen=True, eq=False)
class ResultFolder:
    """Cases and failures of a folder of results, each by name."""

    cases: tuple[Case, ...]
    failures: tuple[Failure, ...]

    @property
    def structure_names(self) -> dict[int, str]:
        """Names of all label values, in order of appearance."""
        names: dict[int, str] = {}
        for case in self.cases:
            for row in case.run.structures:
                names.setdefault(row.value, row.name)
        return names


def read_folder(path: str | os.PathLike[str]) -> ResultFolder:
    """Read a folder that holds a result folder for each case.

    A case whose files cannot be read is listed as a failure; the others are read all the same.

    Raises
    ------
    InputError
        If it is not a folder, or holds no result.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise InputError(f"{path}: found {found}, expected a folder of results as `atlassegfm segment -o` writes it")
    if (path / RUN).is_file():
        parent = path.resolve().parent
        raise InputError(f"{path}: is the result of a single case; give the folder that holds it: {parent}")
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be read ({error.strerror}); check the permissions") from None
    cases: list[Case] = []
    failures: dict[str, Failure] = {}
    for folder in folders:
        try:
            found_case = _read_case(folder)
        except InputError as error:
            found_case = Failure(folder.name, "unreadable", str(error).replace(f"{folder}{os.sep}", ""))
        if isinstance(found_case, Case):
            cases.append(found_case)
        elif found_case is not None:
            failures[folder.name] = found_case
    done = {case.name for case in cases}
    for summary in sorted(path.glob(COHORTS)):
        for failure in _cohort_failures(summary):
            if failure.name not in done:
                failures.setdefault(failure.name, failure)
    if not cases and not failures:
        raise InputError(
            f"{path}: no result in its subfolders (no {RUN}); give the folder that `atlassegfm segment -o` wrote"
        )
    return ResultFolder(tuple(cases), tuple(failures[name] for name in sorted(failures)))


def shown_reason(text: str) -> str:
    """Remove the folders of paths from a message."""
    return _FOLDERS.sub("", " ".join(text.split()))


def finite(value: float | None) -> float | None:
    """Replace NaN and infinity by None."""
    return value if value is not None and math.isfinite(value) else None


def default_colors(values: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Choose colours (0 to 255) for label values whose files name none."""
    return {value: palette_color(position) for position, value in enumerate(sorted(values))}


def _read_case(folder: Path) -> Case | Failure | None:
    """Read one result folder; None if it is none."""
    has_run, has_status = ((folder / name).is_file() for name in (RUN, STATUS))
    # A result that was copied without its status has no times.
    status = StatusRecord.read(folder / STATUS) if has_status else StatusRecord(state="done")
    if status.state == "failed":
        return Failure(folder.name, status.state, shown_reason(status.reason))
    return Case(folder.name, folder, RunRecord.read(folder / RUN), status) if has_run else None


def _cohort_failures(path: Path) -> list[Failure]:
    """List the cases without a result in a summary."""
    try:
        record = CohortRecord.read(path)
    except InputError as error:
        return [Failure(path.name, "unreadable", str(error).replace(f"{path.parent}{os.sep}", ""))]
    return [Failure(one.case, one.state, shown_reason(one.reason)) for one in record.cases if one.state != "done"]
