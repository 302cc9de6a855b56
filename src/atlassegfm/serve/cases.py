"""The table of cases: requests name a case by its number, and the path is looked up here."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

from ..core.errors import InputError
from ..core.image import image_stem, label_values, load_labels
from ..core.labels import dataset_json_of, read_names_file, structures_of
from ..dicom import open_image
from ..jobs import Case, find_scans, plan_cases, scans_of
from ..jobs.review import import_labels
from ..jobs.table import read_run
from ..records import EDITS, RUN, STATUS, StatusRecord, StructureRecord
from ..report.folder import shown_reason
from .session import Session, read_log, stamp_of

#: Cases held in memory: a large one takes about a gigabyte, and another is read again in seconds.
_MOST_OPEN = 3
#: Seconds after which somebody who sent no sign has left.
_GONE_SECONDS = 20.0
#: How urgent a structure is by its verdict, before its estimate counts; the lowest first.
_URGENCY = {"failed": 0.0, "review": 1.0, None: 2.0, "good": 3.0, "accepted": 9.0}
#: nnU-Net's mark of the first channel.
_FIRST_CHANNEL = "_0000"


@dataclass(frozen=True)
class Entry:
    """A case, and the scan it shows; None if that was not given."""

    case: Case
    has_scan: bool = True


class Cases:
    """Cases of an output folder and of a folder of scans, by number; opened ones in memory.

    Numbers are for addresses: names of cases may name patients, and stay out of them.
    """

    def __init__(self, entries: Sequence[Entry], out: Path) -> None:
        self.out, self.entries = out, tuple(entries)
        self._opened: OrderedDict[int, Session] = OrderedDict()
        # A request may work on one longer than it is held: there is never a second one of the same case.
        self._used: WeakValueDictionary[int, Session] = WeakValueDictionary()
        self._lock, self._opening = RLock(), [RLock() for _ in self.entries]
        self._seen: dict[int, dict[str, tuple[str, float]]] = {}
        self._summaries: dict[int, tuple[tuple[int, ...], dict[str, Any]]] = {}

    @classmethod
    def find(cls, scans: Sequence[Path], out: Path, inputs: Sequence[Path] = ()) -> Cases:
        """Find the scans, and the results that the output folder has of them; InputError as of ``segment``."""
        planned = plan_cases(find_scans(scans, inputs=inputs).found, out, inputs)
        matched = scans_of(out, scans).scans if out.is_dir() else {}
        moved = {path.resolve(): name for name, path in matched.items()}
        cases = [Case(moved.get(case.query.resolve(), case.name), case.query) for case in planned]
        entries = {case.name: Entry(case) for case in cases}
        for path in sorted(out.glob(f"*/{RUN}")):
            name = path.parent.name
            entries.setdefault(name, Entry(Case(name, Path(name)), has_scan=False))
        return cls([entries[name] for name in sorted(entries)], out)

    def get(self, number: int) -> Entry:
        """Look a case up; KeyError if there is none."""
        if not 0 <= number < len(self.entries):
            raise KeyError(number)
        return self.entries[number]

    def folder(self, number: int) -> Path:
        """Look up the result folder of a case."""
        return self.out / self.get(number).case.name

    def open(self, number: int) -> Session:
        """Open a case, or take it from memory; InputError if it cannot be read."""
        entry = self.get(number)
        if not entry.has_scan:
            raise InputError("the scan of this case was not given; start again with it below --scans")
        with self._opening[number]:
            folder = self.folder(number)
            session = self._used.get(number)
            if session is not None:
                with session.lock:  # what it is saving just now is its own
                    session = session if session.stamp == stamp_of(folder) else None
            if session is None:
                session = self._used[number] = Session(folder, entry.case.query)
            with self._lock:
                self._opened[number] = session
                self._opened.move_to_end(number)
                while len(self._opened) > _MOST_OPEN:
                    self._opened.popitem(last=False)
            return session

    # Who is at which case

    def sign(self, client: str, by: str, number: int | None) -> None:
        """Note that a client is at a case, or at none."""
        with self._lock:
            for people in self._seen.values():
                people.pop(client, None)
            if number is not None:
                self._seen.setdefault(number, {})[client] = (by, time.monotonic())

    def others_at(self, number: int, client: str) -> list[str]:
        """Name the others who are at a case."""
        with self._lock:
            known = self._seen.get(number, {})
            recent = time.monotonic() - _GONE_SECONDS
            found = {by or "somebody" for one, (by, seen) in known.items() if one != client and seen > recent}
            return sorted(found)

    # What the list shows

    def summary(self, number: int) -> dict[str, Any]:
        """Describe a case for the list: state, verdict, what most needs eyes, and how urgent that is."""
        stamps = tuple(stamp_of(self.folder(number), name) for name in (RUN, STATUS, EDITS))
        known = self._summaries.get(number)
        if known is None or known[0] != stamps:
            known = self._summaries[number] = stamps, self._summarised(number)
        return dict(known[1])

    def _summarised(self, number: int) -> dict[str, Any]:
        entry, folder = self.get(number), self.folder(number)
        run = read_run(folder)
        found: dict[str, Any] = {
            "id": number,
            "name": entry.case.name,
            "verdict": None,
            "worst": "",
            "open": 0,
            "draft": False,
        }
        if run is None:
            reason = shown_reason(_status(folder).reason)
            state = "failed" if reason else "waiting"
            return {**found, "state": state, "worst": reason, "urgency": 0.5 if reason else 5.0, "count": 0}
        rows = [one for one in run.structures if one.review is None]
        state = "accepted" if not rows else "open" if entry.has_scan else "no scan"
        urgencies = [(_urgency(one), one) for one in rows]
        urgency, worst = min(urgencies, key=lambda one: one[0], default=(9.0, None))
        text = "" if worst is None or urgency >= _URGENCY["good"] else f"{worst.name}: {_why(worst)}"
        if rows and (warnings := _status(folder).warnings):  # the wrong part of the body above all
            urgency, text = -1.0, shown_reason(warnings[0])
        names = {one.review.by for one in run.structures if one.review is not None}
        return {
            **found,
            "state": state,
            "verdict": run.verdict,
            "worst": text,
            "urgency": urgency,
            "open": len(rows),
            "count": len(run.structures),
            "by": ", ".join(sorted(filter(None, names))),
            "draft": has_draft(folder),
        }

    def to_run(self) -> tuple[list[Case], list[str]]:
        """List the cases that a run may compute; and the names of those left alone, with edits nobody accepted."""
        drafts = [row["name"] for row in map(self.summary, range(len(self.entries))) if row["draft"]]
        cases = [one.case for one in self.entries if one.has_scan and one.case.name not in drafts]
        return cases, drafts


def _urgency(one: StructureRecord) -> float:
    verdict, estimate = (None, None) if one.quality is None else (one.quality.verdict, one.quality.estimated_dice)
    return _URGENCY[verdict] + 0.9 * (estimate or 0.0)


def _why(one: StructureRecord) -> str:
    return (one.quality.reason if one.quality is not None else "") or one.reason or one.status


def _status(folder: Path) -> StatusRecord:
    try:
        return StatusRecord.read(folder / STATUS)
    except InputError:
        return StatusRecord(state="done")


def has_draft(folder: Path) -> bool:
    """Check whether a result has edits of structures that are not accepted: a run would lose them."""
    if not stamp_of(folder, EDITS) or stamp_of(folder, EDITS) < stamp_of(folder, STATUS):
        return False  # computed again since
    run, edited = read_run(folder), Counter[str]()
    for line in read_log(folder / EDITS):
        if line["verb"] == "begin":
            edited.clear()
        elif "data" in line:
            for name in line["structures"]:
                edited[name] += -1 if line["verb"] == "undo" else 1
                if line["verb"] == "reset":
                    del edited[name]
    return run is not None and any(edited[one.name] > 0 for one in run.structures if one.review is None)


def import_folder(labels: Path, scans: Sequence[Path], out: Path) -> list[str]:
    """Make a result folder of each label map that has a scan of its name and no result yet.

    nnU-Net's CASE.nii.gz belongs to CASE_0000.nii.gz. Gives a sentence for each that cannot be used. InputError if no
    label map belongs to a scan.
    """
    known = {image_stem(path): path for path in find_scans(scans).found}
    known |= {name.removesuffix(_FIRST_CHANNEL): path for name, path in known.items()}
    files = {image_stem(path): path for path in find_scans([labels], labels=True).found}
    matched = {name: known[name] for name in files if name in known}
    if not matched:
        raise InputError(f"{labels}: no label map has the name of a scan ({', '.join(sorted(files)[:3])}); rename them")
    problems = []
    for name, scan in matched.items():
        case = next(one.name for one in plan_cases([scan], out))
        if (out / case / RUN).is_file():
            continue
        try:
            volume = load_labels(files[name], allow_empty=True)
            tables = [volume.source.label_table] if volume.source is not None else []
            if (dataset := dataset_json_of(files[name])) is not None:
                tables.append(read_names_file(dataset))
            named = {value for table in tables for value in table if value > 0}
            structures = structures_of({*label_values(volume.data), *named}, tables)
            import_labels(open_image(scan), volume, structures, out / case)
        except InputError as error:
            problems.append(str(error))
    return problems
