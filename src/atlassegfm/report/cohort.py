"""Report of a cohort: the page of each case, and one page with all cases, what to review first, and distributions."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from ..core.errors import InputError
from ..core.labels import palette_color
from ..quality.verdict import VERDICTS
from ..records import ModelRecord, StructureRecord
from .case import Agreement, CaseFacts, CaseOptions, write_case
from .distribution import FEWEST_CASES, OUTLIER_Z, Distribution, plot
from .folder import CASE_PAGE, COHORT_PAGE, LEFT, Case, Failure, ResultFolder, finite, read_folder, shown_reason
from .page import flatten, write_page

#: Largest numbers of thumbnails, of cases to review at once, and behind "more".
_MOST_PICTURES, _MOST_FIRST, _MOST_LISTED = 48, 12, 240
#: Colours of the stages of a run.
_STAGE_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#edc948", "#9c755f", "#ff9da7")
#: By label value.
_Colors = Mapping[int, Sequence[int]]
_Volumes = Mapping[int, Distribution]


@dataclass(frozen=True)
class ReportOptions:
    """Content of a report."""

    cases: bool = True  # whether each case gets a page
    force: bool = False  # whether pages that are up to date are made again
    case: CaseOptions = field(default_factory=CaseOptions)
    title: str = ""  # empty for the name of the folder


@dataclass(frozen=True)
class Written:
    """A report that was written."""

    path: Path  # page of the cohort
    cases: int
    failures: int
    without_image: int  # pages that show labels only
    kept: int  # pages that show a scan that was not given now, of a result that is the same
    problems: tuple[str, ...]  # cases without a page, and why


@dataclass(frozen=True, eq=False)
class _Entry:
    """One case, the facts of its page, and the address of the page."""

    case: Case
    facts: CaseFacts | None
    link: str

    def agreement(self, value: int) -> Agreement:
        return Agreement() if self.facts is None else self.facts.agreement.get(value, Agreement())


class _Review(NamedTuple):
    """One thing to review; the lowest rank first."""

    rank: float
    case: str
    kind: str
    link: str
    what: str


def write_report(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    scans: Mapping[str, Path] | None = None,
    options: ReportOptions | None = None,
    on_case: Callable[[int, int, str], None] | None = None,
) -> Written:
    """Write the page of a cohort, ``path`` or report.html in its folder, and of each case.

    The folder is one that ``segment -o`` wrote. ``scans`` are files or DICOM folders by name of the case: results do
    not say where these are, as paths may name patients. ``on_case`` is called with number, count and name before the
    page of each case. An :class:`.InputError` if there is no result in the folder, or the page cannot be written; a
    :class:`.MissingExtraError` if matplotlib is not installed and overviews are wanted.
    """
    options, folder = options or ReportOptions(), Path(folder)
    path = folder / COHORT_PAGE if path is None else Path(path)
    found = read_folder(folder)
    target = path.resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{path}: expected the name of a file in a folder that exists, ending in .html")
    scans, kept = scans or {}, 0
    entries: list[_Entry] = []
    problems: list[str] = []
    for position, case in enumerate(found.cases, start=1):
        facts, link = None, ""
        if options.cases:
            if on_case is not None:
                on_case(position, len(found.cases), case.name)
            scan, back = scans.get(case.name), _address(target, case.folder)
            try:
                facts, is_kept = write_case(case, scan, options.case, back=back, force=options.force)
                kept += is_kept
                link = _address(case.folder / CASE_PAGE, target.parent)
            except InputError as error:
                problems.append(f"{case.name}: {error}")
        entries.append(_Entry(case, facts, link))
    _write(path, options.title or folder.resolve().name, entries, found, problems)
    without = sum(not entry.facts.has_image for entry in entries if entry.facts is not None)
    return Written(path, len(found.cases), len(found.failures), without, kept, tuple(problems))


def _address(path: Path, start: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), start.resolve())).as_posix())


def _write(path: Path, title: str, entries: Sequence[_Entry], found: ResultFolder, problems: Sequence[str]) -> None:
    names = found.structure_names
    colors: dict[int, Sequence[int]] = {value: palette_color(n) for n, value in enumerate(sorted(names))}
    colors |= next((entry.facts.colors for entry in entries if entry.facts is not None), {})
    volumes = {value: _volumes(entries, value) for value in names}
    reviews = _reviews(entries, found.failures, volumes)
    pictures = [entry for entry in entries if entry.facts is not None and entry.facts.thumbnail]
    if len(pictures) > _MOST_PICTURES:
        ranks = {verdict: -rank for rank, verdict in enumerate((None, *VERDICTS))}
        pictures = sorted(pictures, key=lambda entry: ranks[entry.case.run.verdict])[:_MOST_PICTURES]
    judged = Counter(_quality(row)[0] for entry in entries for row in entry.case.run.structures)
    write_page(
        path,
        "cohort.html.j2",
        title=title,
        version=entries[0].case.run.versions.get("atlassegfm", "") if entries else "",
        failed=sum(one.state != LEFT for one in found.failures),
        left=sum(one.state == LEFT for one in found.failures),
        judged=judged,
        problems=list(map(shown_reason, problems)),
        reviews=reviews[:_MOST_FIRST],
        more_reviews=reviews[_MOST_FIRST:_MOST_LISTED],
        review_count=len(reviews),
        pictures=pictures,
        case_count=len(entries),
        earlier=found.earlier,
        names=names,
        verdicts=[one for one in VERDICTS if one != "accepted" or judged[one]],
        distributions=_distributions(entries, names, colors, volumes),
        links={entry.case.name: entry.link for entry in entries},
        outlier_z=OUTLIER_Z,
        fewest_cases=FEWEST_CASES,
        times=_times(entries),
        provenance=_provenance(entries),
        table=_table(entries, names, colors, volumes, found.failures),
    )


def _quality(row: StructureRecord) -> tuple[str | None, str, float | None]:
    """Verdict, its reason and the estimated Dice of a structure; no verdict where it is not judged."""
    one = row.quality
    return (None, "", None) if one is None else (one.verdict, one.reason, finite(one.estimated_dice))


def _volumes(entries: Sequence[_Entry], value: int) -> Distribution:
    """Volumes of a structure, ml, where the field of view does not cut it: a part says nothing on the whole."""
    rows = ((entry.case.name, row) for entry in entries for row in entry.case.run.structures if row.value == value)
    whole = ((name, row.volume_ml) for name, row in rows if row.status == "present" and not row.cut)
    return Distribution.of(((name, ml) for name, ml in whole if ml > 0), find_outliers=True)


def _reviews(entries: Sequence[_Entry], failures: Sequence[Failure], volumes: _Volumes) -> list[_Review]:
    """List what to review, the worst first."""
    without = [one for one in failures if one.state != LEFT]
    found = [_Review(0.0, one.name, "failed", "", f"no result ({one.state}): {one.reason}") for one in without]
    for entry in entries:
        name = entry.case.name
        found += [_Review(0.5, name, "look", entry.link, warning) for warning in entry.case.warnings]
        for row in entry.case.run.structures:
            verdict, reason, estimate = _quality(row)
            kind, remarks = "look", []
            if verdict in ("failed", "review"):
                kind, base = verdict, 1.0 if verdict == "failed" else 2.0
                remarks.append((base + 0.9 * (estimate or 0.0), reason or f"judged {verdict}"))
            if row.status == "absent":
                remarks.append((3.0, row.reason or "not found"))
            if factor := volumes[row.value].outlier_factors.get(name):
                remarks.append((4.0, f"volume {factor:.2g} times the median of this cohort"))
            if row.status == "present" and row.cut:
                remarks.append((5.0, f"cut by the field of view, {row.cut}"))
            if remarks:
                what = f"{row.name}: {'; '.join(dict.fromkeys(text for _, text in remarks))}"
                found.append(_Review(min(remarks)[0], name, kind, entry.link, what))
    return sorted(found, key=lambda one: one[:2])


def _table(
    entries: Sequence[_Entry], names: Mapping[int, str], colors: _Colors, volumes: _Volumes, failures: Sequence[Failure]
) -> dict[str, Any]:
    """Rows for ``cohort.js``, by name of column."""
    cases: list[dict[str, Any]] = []
    structures: list[dict[str, Any]] = []
    for position, entry in enumerate(entries):
        case, rows = entry.case, entry.case.run.structures
        agreed = [n for row in rows if (n := entry.agreement(row.value).atlas_model) is not None]
        cases.append(
            {
                "name": case.name,
                "link": entry.link,
                "verdict": case.run.verdict,
                **{verdict: sum(_quality(row)[0] == verdict for row in rows) for verdict in VERDICTS},
                "present": sum(row.status == "present" for row in rows),
                "structures": len(rows),
                "agreement": min(agreed, default=None),
                "confidence": finite(case.run.registration.confidence),
                "seconds": case.total_seconds and round(case.total_seconds, 1),
                "outliers": sum(case.name in volumes[row.value].outlier_factors for row in rows),
                "state": "done",
                "reason": "",
                "inRun": case.in_run,
            }
        )
        for row in rows:
            verdict, reason, estimate = _quality(row)
            one, spread = entry.agreement(row.value), volumes[row.value]
            median = spread.median if row.status == "present" and not row.cut else None
            structures.append(
                {
                    "case": position,
                    "value": row.value,
                    "verdict": verdict,
                    "estimate": estimate,
                    "status": row.status,
                    "volume": round(row.volume_ml, 3),
                    "cut": row.cut,
                    "factor": round(row.volume_ml / median, 3) if median else None,
                    "atlasModel": one.atlas_model,
                    "resultAtlas": one.result_atlas,
                    "remarks": "; ".join(
                        filter(None, (reason or row.reason, row.recovered.remark if row.recovered else ""))
                    ),
                    "outlier": case.name in spread.outlier_factors,
                }
            )
    unknown = dict.fromkeys(("verdict", "agreement", "confidence", "seconds"))
    nothing = {"link": "", **unknown, **dict.fromkeys((*VERDICTS, "present", "structures", "outliers"), 0)}
    cases += [nothing | {"name": f.name, "state": f.state, "reason": f.reason, "inRun": f.in_run} for f in failures]
    return {
        "cases": _columns(cases),
        "structures": _columns(structures),
        "names": names,
        "colors": colors,
        "agreed": any(entry.facts is not None and entry.facts.agreement for entry in entries),
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns: keys are written once, not for each of thousands of rows."""
    return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}


def _distributions(
    entries: Sequence[_Entry], names: Mapping[int, str], colors: _Colors, volumes: _Volumes
) -> list[dict[str, Any]]:
    """Volumes and agreement of each structure."""
    rows = []
    for value, name in names.items():
        agreed = ((entry.case.name, entry.agreement(value).atlas_model) for entry in entries)
        agreement = plot(Distribution.of((case, dice) for case, dice in agreed if dice is not None), (0.0, 1.0))
        drawn = {"volumes": plot(volumes[value]), "agreement": agreement}
        rows.append({"name": name, "color": colors[value], "spread": volumes[value], **drawn})
    return rows


def _times(entries: Sequence[_Entry]) -> dict[str, Any] | None:
    """Median time of each stage, and times of the cases; None where none is recorded."""
    cases = [entry.case for entry in entries]
    spread = Distribution.of((one.name, one.total_seconds) for one in cases if one.total_seconds is not None)
    if spread.median is None:
        return None
    stages: dict[str, list[float]] = {}
    for case in cases:
        for name, seconds in case.status.seconds.items():
            stages.setdefault(name, []).append(seconds)
    medians = {name: float(np.median(seconds)) for name, seconds in stages.items()}
    return {
        "stages": list(zip(medians, medians.values(), itertools.cycle(_STAGE_COLORS), strict=False)),
        "whole": sum(medians.values()) or 1.0,
        "plot": plot(spread),
        "spread": spread,
    }


def _provenance(entries: Sequence[_Entry]) -> dict[str, Any] | None:
    """Models, versions and settings; the most common first where cases differ."""
    if not entries:
        return None
    runs = [entry.case.run for entry in entries]
    counts = Counter(run.model.name for run in runs)
    records: dict[str, ModelRecord] = {run.model.name: run.model for run in runs}
    versions = _values([run.versions | {"device": run.device} for run in runs])
    settings = _values([flatten(run.settings) for run in runs])
    differing = sorted(key for key, values in settings if len(values) > 1)
    same = not differing and len(counts) == 1 and all(len(values) == 1 for _, values in versions)
    return {
        "models": [(records[name], count) for name, count in counts.most_common()],
        "versions": versions,
        "settings": settings,
        "differing": "" if same else ", ".join(differing[:6]) or "versions or models",
    }


def _values(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """List the most common values of each key, each with its number of cases; 0 where all cases have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    counted = {key: Counter(row[key] for row in rows if key in row).most_common(4) for key in keys}
    return [(key, [(found[0][0], 0)] if found[0][1] == len(rows) else found) for key, found in counted.items()]
