"""Reading a folder of results: what each case's ``run.json`` says, and what a cohort's own files add.

Reading is lenient where it can be: verdicts, times and states are shown where a file has them. A report of a
thousand cases must not fail because one of them is unlike the others: what cannot be read is listed as such.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import InputError
from ..core.labels import palette_color

RUN, STATUS = "run.json", "status.json"
#: The summary of a cohort, or one for each of its parts.
COHORTS = "cohort*.json"
SEGMENTATION, ATLAS, MODEL = "segmentation.nii.gz", "atlas.nii.gz", "model.nii.gz"
#: What the report writes into the folder of a case, and into the folder of the cohort.
CASE_PAGE, CASE_PICTURE, COHORT_PAGE = "report.html", "overview.png", "report.html"

Verdict = Literal["good", "review", "failed"]
#: States of cases that are not done yet.
WAITING = ("running", "left")
#: From the best to the worst.
VERDICTS: tuple[Verdict, ...] = ("good", "review", "failed")

#: A folder in a path: messages name files, and the folders above them may name patients.
_FOLDERS = re.compile(r"(?:[A-Za-z]:)?[\\/](?:[^\\/:'\"<>|\n]+[\\/])+")


@dataclass(frozen=True)
class StructureRow:
    """One structure of one case; None where nothing is known.

    Parameters
    ----------
    value : int
        Label value.
    name : str
        As in ``run.json``.
    status : str
        "present", "absent" or "outside".
    reason : str
        Why it is not present.
    volume_ml : float
        Of the result.
    round_trip : float or None
        Dice of the atlas's label with itself after a way to the query and back, in [0, 1].
    verdict : {"good", "review", "failed"} or None
        What the check of quality says.
    verdict_reason : str
        Why.
    score : float or None
        The Dice coefficient it is based on, as estimated without labels, in [0, 1].
    """

    value: int
    name: str
    status: str
    reason: str
    volume_ml: float
    round_trip: float | None
    verdict: Verdict | None = None
    verdict_reason: str = ""
    score: float | None = None


@dataclass(frozen=True, eq=False)
class CaseRow:
    """One case with a result.

    Parameters
    ----------
    name : str
        Of its folder: the only thing about the patient that is shown.
    folder : Path
        Where it lies.
    structures : tuple of StructureRow
        In the order of ``run.json``.
    seconds : mapping of str to float
        Wall time of each stage; empty where nothing says.
    total_seconds : float or None
        Of all of them.
    run : mapping of str to Any
        ``run.json`` as it is.
    doubts : tuple of str
        What made the program doubt the result as a whole.
    series : str or None
        Which series of a DICOM folder was segmented, as the user named it; not to be shown.
    """

    name: str
    folder: Path
    structures: tuple[StructureRow, ...]
    seconds: Mapping[str, float]
    total_seconds: float | None
    run: Mapping[str, Any] = field(repr=False)
    doubts: tuple[str, ...] = ()
    series: str | None = field(default=None, repr=False)

    @property
    def verdict(self) -> Verdict | None:
        """The worst of its structures' verdicts."""
        found = [row.verdict for row in self.structures if row.verdict is not None]
        return max(found, key=VERDICTS.index) if found else None

    @property
    def confidence(self) -> float | None:
        """Of the registration, in [0, 1]."""
        return number(_mapping(self.run.get("registration")).get("confidence"))

    @property
    def folding(self) -> float | None:
        """Share of the body in which the deformation folds space, in [0, 1]."""
        return number(_mapping(self.run.get("registration")).get("folding"))

    @property
    def model(self) -> Mapping[str, Any]:
        """What ``run.json`` says of the model."""
        return _mapping(self.run.get("model"))

    @property
    def settings(self) -> Mapping[str, Any]:
        """All settings, nested."""
        return _mapping(self.run.get("settings"))

    @property
    def versions(self) -> Mapping[str, Any]:
        """Of the programs."""
        return _mapping(self.run.get("versions"))

    @property
    def query_name(self) -> str | None:
        """Name of the query's file, for finding it; not to be shown."""
        name = _mapping(_mapping(self.run.get("inputs")).get("query")).get("file")
        return name if isinstance(name, str) and name else None


@dataclass(frozen=True)
class Failure:
    """A case without a result.

    Parameters
    ----------
    name : str
        Of the case.
    state : str
        "failed", "unreadable", or one of :data:`WAITING`.
    reason : str
        In words, without the folders that a path may name.
    """

    name: str
    state: str
    reason: str


@dataclass(frozen=True, eq=False)
class ResultFolder:
    """A folder of results.

    Parameters
    ----------
    path : Path
        Where it lies.
    cases : tuple of CaseRow
        By name.
    failures : tuple of Failure
        By name.
    """

    path: Path
    cases: tuple[CaseRow, ...]
    failures: tuple[Failure, ...]

    @property
    def structure_names(self) -> dict[int, str]:
        """Names of all label values, in their order of appearance."""
        names: dict[int, str] = {}
        for case in self.cases:
            for row in case.structures:
                names.setdefault(row.value, row.name)
        return names

    @property
    def has_verdicts(self) -> bool:
        """Whether any case was judged."""
        return any(case.verdict is not None for case in self.cases)


def read_folder(path: Path) -> ResultFolder:
    """Read a folder of results, or that of a single case.

    Parameters
    ----------
    path : Path
        A folder whose subfolders hold a ``run.json`` each.

    Raises
    ------
    InputError
        If it is no folder, or there is no result in it.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise InputError(f"{path}: found {found}, expected a folder of results as `atlassegfm segment -o` writes it")
    if (path / RUN).is_file():
        raise InputError(
            f"{path}: is the result of a single case; give the folder that it lies in ({path.resolve().parent})"
        )
    cases: list[CaseRow] = []
    failures: dict[str, Failure] = {}
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be read ({error.strerror}); check the permissions") from None
    for folder in folders:
        status = _json(folder / STATUS) if (folder / STATUS).is_file() else None
        state = str(_mapping(status).get("state", ""))
        if state == "failed":
            failures[folder.name] = Failure(folder.name, state, shown_reason(_mapping(status).get("reason")))
        elif (folder / RUN).is_file():
            run = _json(folder / RUN)
            if isinstance(run, dict) and isinstance(run.get("structures"), list):
                cases.append(_case(folder, run, _mapping(status)))
            else:
                failures[folder.name] = Failure(folder.name, "unreadable", f"{RUN} is not what this program writes")
        elif state:
            failures[folder.name] = Failure(folder.name, state, shown_reason(_mapping(status).get("reason")))
    done = {case.name for case in cases}
    for summary in sorted(path.glob(COHORTS)):
        for failure in _cohort_failures(summary):
            if failure.name not in done:
                failures.setdefault(failure.name, failure)
    if not cases and not failures:
        raise InputError(
            f"{path}: no result in its subfolders (no {RUN}); give the folder that `atlassegfm segment -o` wrote"
        )
    return ResultFolder(path, tuple(cases), tuple(failures[name] for name in sorted(failures)))


def shown_reason(text: Any) -> str:
    """A message without the folders of the paths in it."""
    return _FOLDERS.sub("", " ".join(str(text).split())) if text else ""


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def default_colors(values: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Colours for label values whose file names none, 0 to 255 each."""
    return {value: palette_color(position) for position, value in enumerate(sorted(values))}


def _case(folder: Path, run: Mapping[str, Any], status: Mapping[str, Any]) -> CaseRow:
    rows = []
    for one in map(_mapping, run["structures"]):
        value = one.get("value")
        if not isinstance(value, int):
            continue
        judged = _mapping(one.get("quality"))
        verdict = judged.get("verdict")
        rows.append(
            StructureRow(
                value,
                str(one.get("name", f"label_{value}")),
                str(one.get("status", "")),
                str(one.get("reason", "")),
                number(one.get("volume_ml")) or 0.0,
                number(one.get("round_trip_dice")),
                verdict if verdict in VERDICTS else None,
                str(judged.get("reason") or ""),
                number(judged.get("estimated_dice")),
            )
        )
    # A cohort keeps times apart from run.json, which is then the same whenever it is computed.
    stages: dict[str, float] = {}
    total = None
    for source in (run, status):
        found = source.get("seconds")
        if isinstance(found, dict):
            stages = {str(k): s for k, v in found.items() if (s := number(v)) is not None} or stages
        elif number(found) is not None:
            total = number(found)
        if number(source.get("total_seconds")) is not None:
            total = number(source.get("total_seconds"))
    if total is None and stages:
        total = sum(stages.values())
    doubts = status.get("doubts")
    said = tuple(shown_reason(one) for one in doubts) if isinstance(doubts, list) else ()
    series = _mapping(status.get("made_with")).get("series")
    chosen = series if isinstance(series, str) else None
    return CaseRow(folder.name, folder, tuple(rows), stages, total, run, said, chosen)


def _cohort_failures(path: Path) -> list[Failure]:
    """What the summary of a cohort says of cases without a result."""
    cases = _mapping(_json(path)).get("cases")
    if isinstance(cases, dict):
        listed = [{"name": name, **_mapping(case)} for name, case in cases.items()]
    elif isinstance(cases, list):
        listed = [dict(_mapping(case)) for case in cases]
    else:
        return []
    failures = []
    for case in listed:
        name = next((case[key] for key in ("case", "name", "query") if isinstance(case.get(key), str)), None)
        state = str(case.get("state", ""))
        if name and state and state not in ("done", "kept"):
            failures.append(Failure(shown_reason(name), state, shown_reason(case.get("reason"))))
    return failures


def _json(path: Path) -> Any:
    """The content of a file; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
