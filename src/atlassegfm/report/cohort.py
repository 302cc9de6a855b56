"""The page of a cohort: which cases to look at first, all numbers in a table, and how they are distributed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.files import atomic_path
from ..dicom import is_series_folder
from .case import Agreement, CaseFacts, CaseOptions, write_case
from .folder import (
    CASE_PAGE,
    COHORT_PAGE,
    VERDICTS,
    WAITING,
    CaseRow,
    Failure,
    ResultFolder,
    StructureRow,
    default_colors,
    read_folder,
    shown_reason,
)
from .page import (
    badge,
    data_block,
    duration,
    flattened,
    footer,
    millilitres,
    model_table,
    page,
    pairs_table,
    swatch,
    text,
    tile,
)

#: A volume is an outlier where its modified z-score is larger (Iglewicz and Hoaglin 1993), of the logarithm, as organs
#: differ by factors; the score is 0.6745 times the distance from the median over the median absolute deviation.
_OUTLIER_Z, _Z_FACTOR = 3.5, 0.6745
#: Fewer cases than this say nothing on what is usual.
_FEWEST_CASES = 5
#: A spread below this share is taken for this share: five nearly equal volumes make no outlier of the sixth. With it
#: an outlier is 1.7 times as large as the median or 0.6 times, at least.
_SMALLEST_SPREAD = 0.1
#: Up to so many cases each is a dot; more are a histogram.
_MOST_DOTS = 80
_COLUMNS = 40
#: Pictures and lines of the parts that are meant to be read, not searched.
_MOST_PICTURES, _MOST_FIRST = 48, 12
#: Size of a distribution, in CSS pixels.
_PLOT_WIDTH, _PLOT_HEIGHT = 260, 34
#: Colours of the stages of a run.
_STAGE_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#edc948", "#9c755f", "#ff9da7")


@dataclass(frozen=True)
class ReportOptions:
    """What a report holds.

    Parameters
    ----------
    cases : bool
        Whether each case gets a page of its own.
    force : bool
        Whether pages that are there and up to date are made again.
    case : CaseOptions
        What goes into the page of a case.
    title : str
        Head of the page; empty for the name of the folder.
    """

    cases: bool = True
    force: bool = False
    case: CaseOptions = field(default_factory=CaseOptions)
    title: str = ""


@dataclass(frozen=True)
class Written:
    """What became of a report.

    Parameters
    ----------
    path : Path
        The page of the cohort.
    cases : int
        Results in it.
    failures : int
        Cases without a result.
    without_image : int
        Cases whose scan was not found; 0 without pages of cases.
    problems : tuple of str
        Cases that have no page of their own, and why.
    """

    path: Path
    cases: int
    failures: int
    without_image: int
    problems: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Entry:
    case: CaseRow
    facts: CaseFacts | None
    link: str


def write_report(
    folder: Path,
    path: Path | None = None,
    *,
    images: Sequence[Path] = (),
    options: ReportOptions | None = None,
    on_case: Callable[[int, int, str], None] | None = None,
) -> Written:
    """Write the page of a cohort and of each of its cases.

    Parameters
    ----------
    folder : Path
        With a subfolder for each case, as ``segment -o`` writes it.
    path : Path, optional
        The page; ``report.html`` in the folder if left out.
    images : sequence of Path
        The queries: files, folders of DICOM series, or folders that they lie in. Results do not say where these are,
        as paths name patients.
    options : ReportOptions, optional
        Defaults if left out.
    on_case : callable, optional
        Told number, count and name of each case as its page begins.

    Raises
    ------
    InputError
        If there is no result in the folder, or the page cannot be written.
    MissingExtraError
        If pictures are wanted and cannot be drawn.
    """
    options = options or ReportOptions()
    path = path or folder / COHORT_PAGE
    found = read_folder(folder)
    target = path.resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{path}: expected the name of a file in a folder that exists, ending in .html")
    scans = _scans(images)
    entries, problems, without = [], [], 0
    for position, case in enumerate(found.cases, start=1):
        facts, link = None, ""
        if options.cases:
            if on_case is not None:
                on_case(position, len(found.cases), case.name)
            back = quote(_relative(target, case.folder))
            try:
                facts = write_case(case, _scan_of(case, scans), options.case, back=back, force=options.force)
            except InputError as error:
                # One damaged label map must not cost the report of all others.
                problems.append(f"{case.name}: {error}")
            else:
                link = quote(_relative(case.folder / CASE_PAGE, target.parent))
                without += not facts.has_image
        entries.append(_Entry(case, facts, link))
    title = options.title or folder.resolve().name
    with atomic_path(path) as temporary:
        temporary.write_text(_page(title, entries, found, problems), encoding="utf-8")
    return Written(path, len(found.cases), len(found.failures), without, tuple(problems))


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()


def _scans(images: Sequence[Path]) -> dict[str, Path]:
    """Files and folders by name, of those given and of what lies in the folders given."""
    scans: dict[str, Path] = {}
    for given in images:
        if not given.exists():
            raise InputError(f"{given}: no such file or folder; expected the scans that were segmented")
        # The files of a DICOM series are no scans of their own.
        holds = given.is_dir() and not is_series_folder(given)
        listed = [*sorted(given.iterdir()), given] if holds else [given]
        for path in listed:
            scans.setdefault(path.name or path.resolve().name, path)
    return scans


def _scan_of(case: CaseRow, scans: Mapping[str, Path]) -> Path | None:
    return None if case.query_name is None else scans.get(case.query_name)


# What is unusual


@dataclass(frozen=True, eq=False)
class _Distribution:
    """Values of one structure over the cases: which case, which value, and whether it is far from the others."""

    names: list[str]
    values: NDArray[np.float64]
    far: NDArray[np.bool_]

    @property
    def median(self) -> float:
        return float(np.median(self.values))


def _volumes(entries: Sequence[_Entry], value: int) -> _Distribution:
    found = [
        (entry.case.name, row.volume_ml)
        for entry in entries
        for row in entry.case.structures
        # A structure that is cut by the field of view has no volume to compare.
        if row.value == value and row.status == "present" and row.volume_ml > 0
    ]
    values = np.array([volume for _, volume in found])
    return _Distribution([name for name, _ in found], values, outliers(values))


def outliers(volumes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which volumes are far from the others, as factors; none where there are too few to say.

    Parameters
    ----------
    volumes : array, (N,)
        Above 0, any unit.
    """
    if len(volumes) < _FEWEST_CASES:
        return np.zeros(len(volumes), bool)
    logs = np.log(volumes)
    distance = np.abs(logs - np.median(logs))
    spread = max(float(np.median(distance)), _SMALLEST_SPREAD)
    return np.asarray(_Z_FACTOR * distance / spread > _OUTLIER_Z)


def _first_to_see(
    entries: Sequence[_Entry], failures: Sequence[Failure], volumes: Mapping[int, _Distribution]
) -> list[tuple[str, str, str, str]]:
    """Kind, case, link and what is the matter, the worst first."""
    found: list[tuple[float, str, str, str, str]] = []
    found += [
        (0.0, "failed", one.name, "", f"no result ({one.state}): {one.reason}")
        for one in failures
        if one.state not in WAITING
    ]
    odd = {
        (name, value): volume / spread.median
        for value, spread in volumes.items()
        for name, volume, far in zip(spread.names, spread.values, spread.far, strict=True)
        if far
    }
    for entry in entries:
        found += [(0.5, "look", entry.case.name, entry.link, doubt) for doubt in entry.case.doubts]
        for row in entry.case.structures:
            remarks = []
            rank = 9.0
            if row.verdict in ("failed", "review"):
                rank = (1.0 if row.verdict == "failed" else 2.0) + (0.0 if row.score is None else 0.9 * row.score)
                remarks.append(row.verdict_reason or f"judged {row.verdict}")
            if row.status == "absent":
                rank = min(rank, 3.0)
                remarks.append(row.reason or "nothing of it was found")
            factor = odd.get((entry.case.name, row.value))
            if factor is not None:
                rank = min(rank, 4.0)
                remarks.append(f"volume {factor:.2g} times the median of this cohort")
            if remarks:
                kind = row.verdict if row.verdict in ("failed", "review") else "look"
                found.append((rank, str(kind), entry.case.name, entry.link, f"{row.name}: {'; '.join(remarks)}"))
    return [one[1:] for one in sorted(found, key=lambda one: (one[0], one[2]))]


# The page


def _page(title: str, entries: Sequence[_Entry], found: ResultFolder, problems: Sequence[str]) -> str:
    names = found.structure_names
    colors: dict[int, Sequence[int]] = dict(default_colors(list(names)))
    for entry in entries:
        if entry.facts is not None:
            colors |= entry.facts.colors
            break
    volumes = {value: _volumes(entries, value) for value in names}
    data = _table_data(entries, names, colors, volumes, found.failures)
    body = "\n".join(
        (
            _head(title, entries, found, problems),
            _first(_first_to_see(entries, found.failures, volumes)),
            _gallery(entries),
            _table(found, went=_went(entries)),
            _distributions(entries, names, colors, volumes),
            _times(entries),
            _making(entries),
            footer(entries[0].case.versions if entries else {}),
        )
    )
    return page(title, "cohort", body, data=data_block("table-data", data), scripts=("cohort.js",))


def _head(title: str, entries: Sequence[_Entry], found: ResultFolder, problems: Sequence[str]) -> str:
    rows = [row for entry in entries for row in entry.case.structures]
    waiting = sum(one.state in WAITING for one in found.failures)
    failed = len(found.failures) - waiting
    tiles = [tile("cases with a result", str(len(entries)), f"{len(rows)} structures in all")]
    if failed:
        tiles.append(tile("cases without", str(failed), "see below", "failed"))
    if waiting:
        tiles.append(tile("cases to come", str(waiting), "not done yet"))
    if found.has_verdicts:
        counts = Counter(row.verdict for row in rows)
        for verdict in VERDICTS:
            share = f"{100 * counts[verdict] / max(len(rows), 1):.0f} % of the structures"
            tiles.append(tile(verdict, str(counts[verdict]), share, verdict if counts[verdict] else ""))
    else:
        trips = [row.round_trip for row in rows if row.round_trip is not None]
        if trips:
            tiles.append(tile("median round trip", f"{np.median(trips):.2f}", "Dice, atlas to query and back"))
        missing = sum(row.status == "absent" for row in rows)
        tiles.append(tile("structures not found", str(missing), "in view, but absent", "failed" if missing else ""))
    models = sorted({str(entry.case.model.get("name", "-")) for entry in entries})
    tiles.append(tile("model", text(", ".join(models) or "-"), "licence: see the end"))
    times = [entry.case.total_seconds for entry in entries if entry.case.total_seconds is not None]
    if times:
        tiles.append(tile("time a case", duration(float(np.median(times))), f"median; {duration(sum(times))} in all"))
    notices = [f'<p class="notice">No page for {text(shown_reason(problem))}</p>' for problem in problems]
    sub = "no verdicts in these results" if not found.has_verdicts else "verdicts are made without true labels"
    return (
        f"<header><h1>{text(title)}</h1><p class='sub'>Segmentation by one annotated scan; {sub}.</p>"
        f'<div class="tiles">{"".join(tiles)}</div>{"".join(notices)}</header>'
    )


def _first(items: Sequence[tuple[str, str, str, str]]) -> str:
    if not items:
        return (
            "<section><h2>Look at these first</h2><p>Nothing stands out: no failures, no absent structures, "
            "no unusual volumes.</p></section>"
        )
    listed = [
        f'<li><span class="badge {kind}">{kind}</span><span>'
        + (f'<a href="{link}">{text(name)}</a>' if link else f"<b>{text(name)}</b>")
        + f' <span class="what">{text(what)}</span></span></li>'
        for kind, name, link, what in items
    ]
    more = ""
    if len(items) > _MOST_FIRST:
        more = (
            f"<details><summary>{len(items) - _MOST_FIRST} more</summary>"
            f'<ul class="first">{"".join(listed[_MOST_FIRST : 20 * _MOST_FIRST])}</ul></details>'
        )
        if len(items) > 20 * _MOST_FIRST:
            more += '<p class="hint">The table below has all of them.</p>'
    return (
        f'<section><h2>Look at these first</h2><ul class="first">{"".join(listed[:_MOST_FIRST])}</ul>{more}</section>'
    )


def _gallery(entries: Sequence[_Entry]) -> str:
    shown = [entry for entry in entries if entry.facts is not None and entry.facts.thumbnail]
    if not shown:
        return ""
    # The worst first where not all fit.
    order = {"failed": 0, "review": 1, "good": 2, None: 3}
    if len(shown) > _MOST_PICTURES:
        shown = sorted(shown, key=lambda entry: order[entry.case.verdict])[:_MOST_PICTURES]
    cards = [
        f'<a class="card {entry.case.verdict or ""}" href="{entry.link}">{entry.facts.thumbnail if entry.facts else ""}'
        f"<div><span>{text(entry.case.name)}</span>{badge(entry.case.verdict) if entry.case.verdict else ''}</div></a>"
        for entry in shown
    ]
    rest = len(entries) - len(shown)
    more = f'<p class="hint">{rest} more in the table.</p>' if rest else ""
    return f'<section><h2>At a glance</h2><div class="gallery">{"".join(cards)}</div>{more}</section>'


def _went(entries: Sequence[_Entry]) -> bool:
    """Whether any structure made a round trip, which is only to train the gate."""
    return any(row.round_trip is not None for entry in entries for row in entry.case.structures)


def _table(found: ResultFolder, *, went: bool) -> str:
    judged = found.has_verdicts
    options = "".join(f'<option value="{value}">{text(name)}</option>' for value, name in found.structure_names.items())
    verdicts = "".join(f'<option value="{verdict}">{verdict}</option>' for verdict in VERDICTS)
    verdict_filter = (
        f'<select id="verdict" aria-label="verdict"><option value="">all verdicts</option>{verdicts}</select>'
        if judged
        else ""
    )
    return (
        '<section id="cases"><h2>Cases and structures</h2><div class="controls">'
        '<div class="tabs" role="tablist">'
        '<button type="button" role="tab" data-tab="cases" aria-selected="true">cases</button>'
        '<button type="button" role="tab" data-tab="structures" aria-selected="false">structures</button></div>'
        '<input type="search" id="search" placeholder="search case, structure, reason" aria-label="search">'
        f'<select id="structure" aria-label="structure"><option value="">all structures</option>{options}</select>'
        f'{verdict_filter}<span class="count" id="count"></span></div>'
        '<div class="scroll"><table class="grid" id="table"><thead></thead><tbody></tbody></table></div>'
        '<div class="pager" id="pager"></div><noscript><p>The table needs JavaScript.</p></noscript>'
        f'<p class="hint">Choose a column head to sort. {"Round trip and agreement" if went else "Agreements"} are '
        "Dice coefficients, 0 to 1, none of which needs true labels. × median is the volume over the median of this "
        "cohort.</p></section>"
    )


def _table_data(
    entries: Sequence[_Entry],
    names: Mapping[int, str],
    colors: Mapping[int, Sequence[int]],
    volumes: Mapping[int, _Distribution],
    failures: Sequence[Failure],
) -> dict[str, Any]:
    """Rows for the table; numbers, not text, so that they sort."""
    far = {
        (name, value)
        for value, spread in volumes.items()
        for name, is_far in zip(spread.names, spread.far, strict=True)
        if is_far
    }
    medians = {value: spread.median if len(spread.values) else None for value, spread in volumes.items()}
    cases, structures = [], []
    for position, entry in enumerate(entries):
        case = entry.case
        agreement = {} if entry.facts is None else entry.facts.agreement
        trips = [row.round_trip for row in case.structures if row.round_trip is not None]
        agreed = [one.atlas_model for one in agreement.values() if one.atlas_model is not None]
        cases.append(
            [
                *(case.name, entry.link, case.verdict),
                *(sum(row.verdict == verdict for row in case.structures) for verdict in VERDICTS),
                sum(row.status == "present" for row in case.structures),
                len(case.structures),
                *(min(trips, default=None), min(agreed, default=None), case.confidence),
                None if case.total_seconds is None else round(case.total_seconds, 1),
                sum((case.name, row.value) in far for row in case.structures),
                "done",
                "",
            ]
        )
        for row in case.structures:
            one = agreement.get(row.value, Agreement())
            median = medians[row.value]
            structures.append(
                [
                    *(position, row.value, row.verdict, row.score, row.status, round(row.volume_ml, 3)),
                    round(row.volume_ml / median, 3) if median and row.status == "present" else None,
                    *(row.round_trip, one.atlas_model, one.result_atlas),
                    row.verdict_reason or row.reason,
                    (case.name, row.value) in far,
                ]
            )
    nothing = [0, 0, 0, 0, 0, None, None, None, None, 0]
    cases += [[one.name, "", None, *nothing, one.state, one.reason] for one in failures]
    return {
        "cases": cases,
        "structures": structures,
        "names": {str(value): name for value, name in names.items()},
        "colors": {str(value): list(color) for value, color in colors.items()},
        "judged": any(entry.case.verdict for entry in entries),
        "went": _went(entries),
        "agreed": any(entry.facts is not None and entry.facts.agreement for entry in entries),
    }


# Distributions


def _distributions(
    entries: Sequence[_Entry],
    names: Mapping[int, str],
    colors: Mapping[int, Sequence[int]],
    volumes: Mapping[int, _Distribution],
) -> str:
    links = {entry.case.name: entry.link for entry in entries}
    went = _went(entries)
    rows = []
    for value, name in names.items():
        spread = volumes[value]
        trips = f"<td>{_plot(_scores(entries, value, _round_trip), 0.0, 1.0)}</td>" if went else ""
        agreed = _scores(entries, value, lambda _, one: one.atlas_model)
        far = [
            f'<a href="{links[n]}">{text(n)}</a>' if links[n] else text(n)
            for n, is_far in zip(spread.names, spread.far, strict=True)
            if is_far
        ]
        shown = ", ".join(far[:4]) + (f" and {len(far) - 4} more" if len(far) > 4 else "")
        summary = ""
        if len(spread.values):
            low, high = np.percentile(spread.values, (25, 75))
            summary = (
                f"{millilitres(spread.median)} <span class='none'>({millilitres(low)} – {millilitres(high)})</span>"
            )
        rows.append(
            f"<tr><th>{swatch(colors[value])}{text(name)}</th><td>{summary or '-'}</td><td>{_plot(spread)}</td>"
            f"{trips}<td>{_plot(agreed, 0.0, 1.0)}</td><td class='far'>{shown}</td></tr>"
        )
    return (
        '<section><h2>Over the cohort</h2><div class="scroll"><table class="plots"><thead><tr><th>structure</th>'
        "<th>ml, median (quartiles)</th><th>volume</th>"
        f"{'<th>round trip</th>' if went else ''}<th>atlas and model agree</th><th>unusual volumes</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="hint">Boxes span the quartiles. Red: modified z-score of log volume above {_OUTLIER_Z}, from '
        f"{_FEWEST_CASES} cases on. Structures outside the field of view are left out.</p></section>"
    )


def _round_trip(row: StructureRow, _: Agreement) -> float | None:
    return row.round_trip


def _scores(entries: Sequence[_Entry], value: int, get: Callable[[Any, Agreement], float | None]) -> _Distribution:
    found = []
    for entry in entries:
        agreement = Agreement() if entry.facts is None else entry.facts.agreement.get(value, Agreement())
        for row in entry.case.structures:
            number = get(row, agreement) if row.value == value else None
            if number is not None:
                found.append((entry.case.name, number))
    return _Distribution([n for n, _ in found], np.array([v for _, v in found]), np.zeros(len(found), bool))


def _plot(spread: _Distribution, low: float | None = None, high: float | None = None) -> str:
    """Dots or columns over a box of the quartiles, as SVG."""
    values = spread.values
    if not len(values):
        return '<span class="none">-</span>'
    fixed = low is not None and high is not None
    first = float(values.min()) if low is None else low
    last = float(values.max()) if high is None else high
    if last <= first:
        first, last = first * 0.9 - 1e-3, last * 1.1 + 1e-3
    width, height = (_PLOT_WIDTH if not fixed else 150), _PLOT_HEIGHT

    def x(value: float) -> float:
        return 5 + (width - 10) * (value - first) / (last - first)

    base = height - 12
    quartiles = [float(v) for v in np.percentile(values, (25, 50, 75))]
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>']
    if len(values) <= _MOST_DOTS:
        box = max(x(quartiles[2]) - x(quartiles[0]), 1)
        parts.append(
            f'<rect class="box" x="{x(quartiles[0]):.1f}" y="4" width="{box:.1f}" height="{base - 8}" rx="2"/>'
        )
        # Dots of nearly the same value are set apart by their place in the row, the same way every time.
        for number, (name, value, far) in enumerate(zip(spread.names, values, spread.far, strict=True)):
            y = 7 + (number * 5) % max(base - 13, 1)
            parts.append(
                f'<circle class="dot{" far" if far else ""}" cx="{x(value):.1f}" cy="{y}" r="3">'
                f"<title>{text(name)}: {value:.4g}</title></circle>"
            )
    else:
        counts, edges = np.histogram(values, _COLUMNS, (first, last))
        step = (width - 10) / _COLUMNS
        for count, edge in zip(counts, edges[:-1], strict=True):
            if count:
                tall = max(1.0, (base - 4) * float(count) / float(counts.max()))
                parts.append(
                    f'<rect class="column" x="{x(float(edge)):.1f}" y="{base - tall:.1f}" width="{step - 0.6:.1f}" '
                    f'height="{tall:.1f}"/>'
                )
        parts += [
            f'<circle class="dot far" cx="{x(value):.1f}" cy="{base - 4}" r="3">'
            f"<title>{text(name)}: {value:.4g}</title></circle>"
            for name, value, far in zip(spread.names, values, spread.far, strict=True)
            if far
        ]
    middle = x(quartiles[1])
    parts.append(f'<line class="median" x1="{middle:.1f}" x2="{middle:.1f}" y1="3" y2="{base - 3}"/>')
    parts.append(f'<text class="ends" x="0" y="{height - 1}">{_tick(first)}</text>')
    parts.append(f'<text class="ends" x="{width}" y="{height - 1}" text-anchor="end">{_tick(last)}</text>')
    return f'<svg width="{width}" height="{height}" role="img" aria-label="distribution">{"".join(parts)}</svg>'


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.3g}"


def _times(entries: Sequence[_Entry]) -> str:
    stages: dict[str, list[float]] = {}
    for entry in entries:
        for name, seconds in entry.case.seconds.items():
            stages.setdefault(name, []).append(seconds)
    totals = np.array([entry.case.total_seconds for entry in entries if entry.case.total_seconds is not None])
    if not len(totals):
        return ""
    medians = {name: float(np.median(seconds)) for name, seconds in stages.items()}
    whole = sum(medians.values()) or 1.0
    bar = "".join(
        f'<i style="width:{100 * seconds / whole:.2f}%;background:{_STAGE_COLORS[n % len(_STAGE_COLORS)]}" '
        f'title="{text(name)}: {duration(seconds)}"></i>'
        for n, (name, seconds) in enumerate(medians.items())
    )
    keys = "".join(
        f'<span><i class="swatch" style="background:{_STAGE_COLORS[n % len(_STAGE_COLORS)]}"></i>{text(name)} '
        f"{duration(seconds)}</span>"
        for n, (name, seconds) in enumerate(medians.items())
    )
    names = [entry.case.name for entry in entries if entry.case.total_seconds is not None]
    spread = _Distribution(names, totals, np.zeros(len(totals), bool))
    parts = f'<div class="stages">{bar}</div><div class="legend">{keys}</div>' if stages else ""
    return (
        f"<section><h2>Time</h2>{parts}<table class='plots'><tbody><tr><th>seconds a case</th><td>{_plot(spread)}</td>"
        f"<td>median {duration(spread.median)}, longest {duration(float(totals.max()))}, "
        f"together {duration(float(totals.sum()))}</td></tr></tbody></table></section>"
    )


def _making(entries: Sequence[_Entry]) -> str:
    """Settings, versions and models; where cases differ, which are how common."""
    if not entries:
        return ""
    # Of mixed results, the most common comes first.
    models: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for entry in entries:
        name = str(entry.case.model.get("name"))
        models[name] = (models.get(name, (0, {}))[0] + 1, entry.case.model)
    shown = "".join(
        f"<div><h3>Model{f' of {count} cases' if len(models) > 1 else ''}</h3>{model_table(model)}</div>"
        for count, model in sorted(models.values(), key=lambda pair: -pair[0])
    )
    versions = _varying([{k: str(v) for k, v in entry.case.versions.items()} for entry in entries])
    devices = _varying([{"device": str(entry.case.run.get("device", "-"))} for entry in entries])
    settings = _varying([flattened(entry.case.settings) for entry in entries])
    differing = {key for key, value in settings.items() if len(value) > 1}
    warning = ""
    if differing or any(len(value) > 1 for value in versions.values()) or len(models) > 1:
        what = ", ".join(sorted(differing)[:6]) or "versions or models"
        warning = f'<p class="notice">Not all cases were made in the same way: {text(what)}.</p>'
    return (
        f'<section><h2>How it was made</h2>{warning}<div class="columns">{shown}'
        f"<div><h3>Versions</h3>{pairs_table(_shown(versions | devices, len(entries)))}</div></div>"
        f"<details><summary>All settings</summary>{pairs_table(_shown(settings, len(entries)))}</details></section>"
    )


def _varying(rows: Sequence[Mapping[str, str]]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for key, value in row.items():
            found.setdefault(key, Counter())[value] += 1
    return found


def _shown(varying: Mapping[str, Counter[str]], count: int) -> list[tuple[str, str]]:
    rows = []
    for key, values in varying.items():
        if len(values) == 1 and values.total() == count:
            rows.append((key, f"<code>{text(next(iter(values)))}</code>"))
        else:
            listed = values.most_common(4)
            rows.append((key, ", ".join(f"<code>{text(value)}</code> ({n})" for value, n in listed)))
    return rows
