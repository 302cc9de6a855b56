"""Scoring results against references: label maps on one grid, files, and whole folders.

Structures that the reference and the result both lack have no score (status "both_empty"). One that only one
of them has counts as Dice 0, NSD 0 and a distance of the image's diagonal (status "missed" or "hallucinated").
Means are over the cases of each structure, then over structures, and are given in both usual ways: structures
that both lack left out (as nnU-Net does), or counted as perfect.
"""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.errors import InputError
from ..core.files import atomic_path
from ..core.geometry import Grid
from ..core.image import IMAGE_SUFFIXES, Volume, image_stem, image_suffix, load_labels, load_volume, smallest_label_type
from ..core.labels import (
    LabelEntry,
    LabelTable,
    dataset_json_of,
    listed,
    match_rank,
    plain_name,
    read_names_file,
    structures_of,
)
from ..dicom import (
    EVERYTHING,
    DicomSource,
    Selection,
    Series,
    find_series,
    is_dicom_input,
    is_series_folder,
    open_labels,
)
from .metrics import StructureScores, compare, diagonal_mm, label_shapes
from .statistics import Spread, spread
from .tolerances import PRESETS, Tolerances

logger = logging.getLogger(__name__)


#: Of results of this program, one folder a query.
_RESULT = "segmentation.nii.gz"


#: In folders DICOM files are known by it.
_DICOM_SUFFIX = ".dcm"


#: nnU-Net's mark of the first channel: a result of CASE_0000 belongs to the reference CASE.
_FIRST_CHANNEL = "_0000"


#: Structures smaller than this in the mean over cases form a group of their own in reports: one voxel decides much.
SMALL_ML = 1.0


#: Scores that are averaged, and what "as perfect" means for them where both masks are empty.
PERFECT: Mapping[str, float] = {"dice": 1.0, "nsd": 1.0, "hd95_mm": 0.0, "hd95_voxel_mm": 0.0, "cldice": 1.0}


#: A voxel smaller than the product of its edges by this share has axes that are not at right angles (2.6 degrees).
_SHEARED = 1e-3


#: Statuses in the order of reports.
STATUSES = ("ok", "missed", "hallucinated", "both_empty")


class Scored(Protocol):
    """What a summary is made of: a structure of a case, and its scores (NaN where there is none)."""

    @property
    def case(self) -> str:
        """Of which case."""
        ...

    @property
    def value(self) -> int:
        """Label value."""
        ...

    @property
    def structure(self) -> str:
        """Its name."""
        ...

    @property
    def scores(self) -> StructureScores:
        """How well it came out."""
        ...


@dataclass(frozen=True)
class CaseScore:
    """One structure of one case.

    Parameters
    ----------
    case : str
        Name of the reference, without ending.
    value : int
        Label value.
    structure : str
        Its name.
    scores : StructureScores
        How well it came out.
    """

    case: str
    value: int
    structure: str
    scores: StructureScores


@dataclass(frozen=True)
class StructureSummary:
    """One structure over all cases.

    Parameters
    ----------
    value : int
        Label value.
    structure : str
        Its name.
    counts : mapping of str to int
        Cases of each status.
    tolerance_mm : float
        Of its NSD.
    reference_ml : float
        Mean volume in the references that have it; NaN where none has.
    scores : mapping of str to Spread
        For each score; cases in which both masks are empty are left out.
    with_empty : mapping of str to float
        Mean of each score with these cases counted as perfect.
    """

    value: int
    structure: str
    counts: Mapping[str, int]
    tolerance_mm: float
    reference_ml: float
    scores: Mapping[str, Spread]
    with_empty: Mapping[str, float]


@dataclass(frozen=True)
class Summary:
    """All structures over all cases.

    Parameters
    ----------
    cases : int
        How many.
    structures : tuple of StructureSummary
        In ascending order of their values.
    means : mapping of str to float
        Mean over structures of each score, cases in which both masks are empty left out; NaN where none is left.
    means_with_empty : mapping of str to float
        The same with these cases counted as perfect.
    counts : mapping of str to int
        Structures of cases by status.
    small : tuple of str
        Names of structures below :data:`SMALL_ML`.
    small_means : mapping of str to float
        ``means`` over these alone.
    """

    cases: int
    structures: tuple[StructureSummary, ...]
    means: Mapping[str, float]
    means_with_empty: Mapping[str, float]
    counts: Mapping[str, int]
    small: tuple[str, ...]
    small_means: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {
            "cases": self.cases,
            "mean": _rounded(self.means),
            "mean_with_both_empty_as_perfect": _rounded(self.means_with_empty),
            "counts": dict(self.counts),
            "small_structures": {"below_ml": SMALL_ML, "names": list(self.small), "mean": _rounded(self.small_means)},
            "structures": [
                {
                    "value": one.value,
                    "structure": one.structure,
                    "counts": dict(one.counts),
                    "tolerance_mm": one.tolerance_mm,
                    "reference_ml": plain_number(one.reference_ml),
                    **{name: spread_dict(scores) for name, scores in one.scores.items()},
                }
                for one in self.structures
            ],
        }


@dataclass(frozen=True)
class FilePair:
    """A result and its reference.

    Parameters
    ----------
    case : str
        What to call it.
    result, reference : Path
        Label maps, RTSTRUCT or DICOM-SEG files.
    """

    case: str
    result: Path
    reference: Path


@dataclass(frozen=True)
class DicomInputs:
    """How RTSTRUCT and DICOM-SEG files are read for scoring.

    Parameters
    ----------
    scan : Path, optional
        The scan they lie on: the folder of a DICOM series, or an image file. Without it the voxels of the other side
        count, if that is an image file.
    series : str, optional
        Which series of the folder.
    selection : Selection
        Which structures, and what they are called.
    """

    scan: Path | None = None
    series: str | None = None
    selection: Selection = EVERYTHING


def score_volumes(
    results: Mapping[str, Volume],
    reference: Volume,
    names: Mapping[int, str],
    tolerances: Tolerances,
    *,
    centreline: Iterable[int] = (),
) -> dict[str, dict[int, StructureScores]]:
    """Score several results against one reference.

    Parameters
    ----------
    results : mapping of str to Volume
        Label maps of each method, on the reference's voxels in any array order.
    reference : Volume
        Label map.
    names : mapping of int to str
        Name of each label value to be scored.
    tolerances : Tolerances
        For the NSD.
    centreline : iterable of int
        Label values that clDice is wanted for.

    Returns
    -------
    dict of str to dict of int to StructureScores
        For each method, in the order of ``names``.

    Notes
    -----
    On axes that are not at right angles (a tilted gantry) volumes are right and distances are not: a warning says so.

    Raises
    ------
    InputError
        If a result has other voxels than the reference; the message says how they differ.
    """
    spacing_mm = tuple(float(step) for step in reference.grid.spacing_mm)
    diagonal = diagonal_mm(reference.grid.shape, spacing_mm)
    voxel_ml = reference.grid.voxel_volume_mm3 / 1000
    if voxel_ml < (1 - _SHEARED) * math.prod(spacing_mm) / 1000:
        name = "the reference" if reference.source is None else str(reference.source.path)
        logger.warning("%s: its axes are not at right angles; distances are measured as if they were", name)
    wanted = frozenset(centreline)
    turned = {}
    for method, result in results.items():
        _check_grids(result, reference)
        turned[method] = label_shapes(result.turned_to(reference.grid).data, names, spacing_mm)
    references = label_shapes(reference.data, names, spacing_mm)
    scores: dict[str, dict[int, StructureScores]] = {method: {} for method in results}
    for value, name in names.items():
        shape = references.pop(value)  # its surfaces are kept for all methods, and then dropped
        for method, shapes in turned.items():
            one = compare(
                shapes.pop(value),
                shape,
                tolerance_mm=tolerances.of(value, name),
                diagonal_mm=diagonal,
                centreline=value in wanted,
            )
            # Those of the comparison are products of the spacing: too large where axes are not at right angles.
            result_ml, reference_ml = (n * voxel_ml for n in (one.result_voxels, one.reference_voxels))
            scores[method][value] = replace(one, result_ml=result_ml, reference_ml=reference_ml)
    return scores


def evaluate_files(
    pairs: Sequence[FilePair],
    tolerances: Tolerances,
    *,
    labels: Sequence[str] = (),
    centreline: Sequence[str] = (),
    names: Path | None = None,
    on_case: Callable[[int, str], None] | None = None,
    dicom: DicomInputs | None = None,
) -> list[CaseScore]:
    """Score result files against reference files.

    Parameters
    ----------
    pairs : sequence of FilePair
        What belongs together; at least one.
    tolerances : Tolerances
        For the NSD.
    labels : sequence of str
        Label values, names or shell patterns of what to score; "*" is all that either side has. If left out, both
        sides must have the same structures.
    centreline : sequence of str
        The same for clDice.
    names : Path, optional
        Names of the labels; else those of the references' files count, then those of the results'.
    on_case : callable, optional
        Told number (from 1) and name of each case as it begins.
    dicom : DicomInputs, optional
        How RTSTRUCT and DICOM-SEG files are read. Their structures get the label values of those of the same name on
        the other side.

    Returns
    -------
    list of CaseScore
        Case by case, structures in ascending order.

    Raises
    ------
    InputError
        If a file cannot be used, a result is not on its reference's voxels, both sides do not have the same
        structures, or there is none at all.
    """
    loader = _Loader(dicom or DicomInputs(), None if names is None else read_names_file(names))
    found = _structures_of_files(pairs, loader, strict=not labels)
    unmatched = tolerances.unmatched(found.items())
    if unmatched and tolerances.origin not in {f"preset {name}" for name in PRESETS}:
        logger.warning("%s: no structure is called %s; check the spelling", tolerances.origin, listed(unmatched))
    if labels:
        found = _picked(found, labels)
    thin = _picked(found, centreline) if centreline else {}
    scored = []
    for number, pair in enumerate(pairs, start=1):
        if on_case is not None:
            on_case(number, pair.case)
        result, reference = loader.load(pair)
        scores = score_volumes({"": result}, reference, found, tolerances, centreline=thin)[""]
        scored += [CaseScore(pair.case, value, found[value], one) for value, one in scores.items()]
    return scored


def find_pairs(result: Path, reference: Path, *, partial: bool = False) -> list[FilePair]:
    """Find what belongs together.

    Parameters
    ----------
    result, reference : Path
        Two files, or two folders of files with the same names. The folder of results may also be one that
        ``segment`` wrote, with a folder for each query. A result of CASE_0000 belongs to the reference CASE.
    partial : bool
        Whether references without a result are left out (with a warning) instead of refused.

    Raises
    ------
    InputError
        If a path does not exist or only one is a folder, a folder has no label map, or a file has no counterpart.
    """
    for path, role in ((result, "results"), (reference, "references")):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; expected the {role}: check the path")
    if not result.is_dir() and not reference.is_dir():
        return [FilePair(image_stem(reference), result, reference)]
    if not (result.is_dir() and reference.is_dir()):
        folder, file = (result, reference) if result.is_dir() else (reference, result)
        raise InputError(f"{folder}: a folder, while {file} is a file; give two files or two folders")
    references = _label_files(reference, nested=False)
    results: dict[str, Path] = {}
    for stem, path in _label_files(result, nested=True).items():
        case = stem if stem in references else stem.removesuffix(_FIRST_CHANNEL)
        if case not in references:
            raise InputError(
                f"{path}: no reference in {reference}; expected {case}.nii.gz or another image ending there: "
                "add it, or take the result away"
            )
        if case in results:
            raise InputError(f"{path}: belongs to the reference {case} as does {results[case]}; take one away")
        results[case] = path
    missing = sorted(references.keys() - results.keys())
    if missing:
        sentence = f"{result}: no result for {len(missing)} of {len(references)} references: {listed(missing, 5)}"
        if not partial:
            raise InputError(f"{sentence}; add them, or use --partial to score the others alone")
        logger.warning("%s; they are not counted", sentence)
    return [FilePair(case, results[case], references[case]) for case in sorted(results)]


def summarise(scored: Sequence[Scored]) -> Summary:
    """Average scores over cases, then over structures."""
    by_value: dict[int, list[Scored]] = {}
    for one in scored:
        by_value.setdefault(one.value, []).append(one)
    names = [name for name in PERFECT if name != "cldice" or any(one.scores.cldice is not None for one in scored)]
    structures = tuple(_summary_of(by_value[value], names) for value in sorted(by_value))
    small = tuple(one for one in structures if one.reference_ml < SMALL_ML)
    return Summary(
        cases=len({one.case for one in scored}),
        structures=structures,
        means={name: _mean(one.scores[name].mean for one in structures) for name in names},
        means_with_empty={name: _mean(one.with_empty[name] for one in structures) for name in names},
        counts=_counts(one.scores.status for one in scored),
        small=tuple(one.structure for one in small),
        small_means={name: _mean(one.scores[name].mean for one in small) for name in names},
    )


def write_scores(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as CSV, whole or not at all; numbers to 6 decimals, NaN and None as empty cells.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    rows = list(rows)
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it, or choose another place")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def score_row(scores: StructureScores) -> dict[str, Any]:
    """Scores as columns of a table."""
    return {field.name: getattr(scores, field.name) for field in fields(scores)}


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no NaN."""
    return {key: plain_number(value) if isinstance(value, float) else value for key, value in row.items()}


def spread_dict(one: Spread) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    return {field.name: plain_number(getattr(one, field.name)) for field in fields(one)}


def label_values(volume: Volume) -> set[int]:
    """Label values present, without 0."""
    found: set[int] = set()
    for plane in np.moveaxis(volume.data, int(np.argmax(volume.data.strides)), 0):
        found.update(np.unique(plane).tolist())
    return found - {0}


def _summary_of(scored: Sequence[Scored], names: Sequence[str]) -> StructureSummary:
    columns: dict[str, list[float]] = {}
    with_empty: dict[str, list[float]] = {}
    for name in names:
        values = [getattr(one.scores, name) for one in scored]
        columns[name] = [math.nan if value is None else value for value in values]
        # None was not asked for, and is not perfect where both masks are empty.
        with_empty[name] = [
            PERFECT[name] if one.scores.status == "both_empty" and value is not None else number
            for one, value, number in zip(scored, values, columns[name], strict=True)
        ]
    volumes = [one.scores.reference_ml for one in scored if one.scores.reference_voxels]
    return StructureSummary(
        value=scored[0].value,
        structure=scored[0].structure,
        counts=_counts(one.scores.status for one in scored),
        tolerance_mm=scored[0].scores.tolerance_mm,
        reference_ml=float(np.mean(volumes)) if volumes else math.nan,
        scores={name: spread(column) for name, column in columns.items()},
        with_empty={name: _mean(column) for name, column in with_empty.items()},
    )


def _counts(statuses: Iterable[str]) -> dict[str, int]:
    found = Counter(statuses)
    return {status: found[status] for status in (*STATUSES, *sorted(found.keys() - set(STATUSES)))}


def _mean(values: Iterable[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return float(np.mean(kept)) if kept else math.nan


def _check_grids(result: Volume, reference: Volume) -> None:
    if result.grid.axes_relative_to(reference.grid) is not None:
        return
    names = ["the result" if result.source is None else str(result.source.path)]
    names += ["the reference" if reference.source is None else str(reference.source.path)]
    one, other = result.grid, reference.grid
    raise InputError(
        f"{names[0]}: not on the voxels of {names[1]}: {_difference(one, other)}; "
        "results are scored on the reference's voxels: resample with nearest neighbour, or give the right file"
    )


def _difference(one: Grid, other: Grid) -> str:
    """How two grids differ, in words."""
    a, b = one.canonical(), other.canonical()
    if a.shape != b.shape:
        sizes = [" x ".join(str(n) for n in grid.shape) for grid in (a, b)]
        return f"it has {sizes[0]} voxels instead of {sizes[1]}"
    if not np.allclose(a.spacing_mm, b.spacing_mm, rtol=1e-3):
        sizes = [" x ".join(f"{n:.4g}" for n in grid.spacing_mm) for grid in (a, b)]
        return f"its voxels are {sizes[0]} mm instead of {sizes[1]} mm"
    return f"its corners lie up to {a.distance_mm(b):.1f} mm away (origin or direction differ)"


def _label_files(folder: Path, *, nested: bool) -> dict[str, Path]:
    """Label maps of a folder by their names without ending; ``nested``: also CASE/segmentation.nii.gz."""
    found: dict[str, Path] = {}
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); check the permissions") from None
    for path in entries:
        stem = path.name
        file = path / _RESULT if path.is_dir() and nested else path
        if path.is_dir() and not file.is_file():
            continue
        if not path.is_dir():
            if image_suffix(path) is None and path.suffix.lower() != _DICOM_SUFFIX:
                continue
            stem = image_stem(path)
        if stem in found:
            raise InputError(f"{file}: {found[stem]} has the same name; take one away")
        found[stem] = file
    if not found:
        also = f", or folders with {_RESULT}" if nested else ""
        raise InputError(
            f"{folder}: no label map in this folder; expected files ending in {', '.join(IMAGE_SUFFIXES)}{also}"
        )
    return found


class _Loader:
    """Reads pairs; tells what is to be known of DICOM files once.

    Parameters
    ----------
    dicom : DicomInputs
        How DICOM files are read.
    names : LabelTable or None
        Names the user gave.
    """

    def __init__(self, dicom: DicomInputs, names: LabelTable | None) -> None:
        self.names = names
        self._dicom = dicom
        self._scan: Series | Volume | None = None
        self._told: set[Path] = set()
        # Values of structures that the other side does not have: the same for all pairs.
        self._values: dict[str, int] = {}

    def load(self, pair: FilePair) -> tuple[Volume, Volume]:
        """Result and reference."""
        paths = (pair.result, pair.reference)
        others = [is_dicom_input(path) for path in paths]
        if not any(others):
            if self._dicom.scan is not None or self._dicom.selection != EVERYTHING:
                raise InputError(
                    f"{pair.result}, {pair.reference}: neither is an RTSTRUCT or DICOM-SEG, which --scan, "
                    "--structures, --synonyms and --overlap are for; leave them out (--labels says what to score)"
                )
            return load_labels(pair.result, allow_empty=True), load_labels(pair.reference, allow_empty=True)
        scan = self._scan_of()
        if scan is None and all(others):
            raise InputError(
                f"{pair.result}, {pair.reference}: both are DICOM objects; give the scan they lie on with --scan"
            )
        loaded: dict[int, Volume] = {}
        for side in sorted((0, 1), key=lambda side: others[side]):
            path = paths[side]
            if not others[side]:
                loaded[side] = load_labels(path, allow_empty=True)
                continue
            on = scan if scan is not None else loaded[1 - side]
            loaded[side] = open_labels(path, on, self._dicom.selection, tell=path not in self._told)
            self._told.add(path)
        # Numbers of structures in DICOM files are those of the program that wrote them.
        changed = 0 if others[0] else 1
        table = _table_of(loaded[1 - changed], paths[1 - changed]) | dict(self.names or {})
        loaded[changed] = self._renumbered(loaded[changed], table)
        return loaded[0], loaded[1]

    def _scan_of(self) -> Series | Volume | None:
        path = self._dicom.scan
        if self._scan is None and path is not None:
            if is_series_folder(path):
                self._scan = find_series(path, self._dicom.series)[0]
            else:
                self._scan = load_volume(path)
        return self._scan

    def _renumbered(self, volume: Volume, table: LabelTable) -> Volume:
        """A label map with the values that ``table`` has for its names; unchanged if that knows no names."""
        source = volume.source
        if not table or source is None:
            return volume
        by_name = {plain_name(entry.name): value for value, entry in sorted(table.items(), reverse=True)}
        lookup = np.zeros(int(max(source.label_table)) + 1, np.int64)
        entries = {}
        for value, entry in sorted(source.label_table.items()):
            name = plain_name(entry.name)
            wanted = by_name.get(name, self._values.get(name))
            if wanted is None:
                taken = {*table, *self._values.values()}
                wanted = value if value not in taken else max(taken) + 1
                self._values[name] = wanted
            lookup[value] = wanted
            entries[wanted] = entry
        data = lookup.astype(smallest_label_type(int(lookup.max())))[volume.data]
        return Volume(data, volume.grid, DicomSource(source.path, None, entries, source.notes))


def _table_of(volume: Volume, path: Path) -> dict[int, LabelEntry]:
    """Names from a file's header, else from the dataset.json of its folder."""
    table = {} if volume.source is None else dict(volume.source.label_table)
    dataset = dataset_json_of(path)
    return table if dataset is None else {**_names_of_found(dataset), **table}


def _structures_of_files(pairs: Sequence[FilePair], loader: _Loader, *, strict: bool) -> dict[int, str]:
    """Name of each label value that results or references have; ``strict``: they must have the same ones."""
    present: dict[str, set[int]] = {"result": set(), "reference": set()}
    tables: dict[str, dict[int, LabelEntry]] = {"result": {}, "reference": {}}
    found: dict[Path, LabelTable] = {}  # names of each dataset.json
    given = loader.names
    for pair in pairs:
        volumes = loader.load(pair)
        for role, path, volume in zip(present, (pair.result, pair.reference), volumes, strict=True):
            present[role] |= label_values(volume)
            table = {} if volume.source is None else dict(volume.source.label_table)
            dataset = dataset_json_of(path)
            if dataset is not None:
                if dataset not in found:
                    found[dataset] = _names_of_found(dataset)
                table = {**found[dataset], **table}
            tables[role] = table | tables[role]
    where, against = (_place([getattr(pair, role) for pair in pairs]) for role in ("result", "reference"))
    if given is None:
        _check_schemes(tables["result"], tables["reference"], where, against)
    values = present["result"] | present["reference"]
    if not values:
        raise InputError(f"{where}: no structure here or in {against} (all voxels are 0); give the right files")
    order = [given or {}, tables["reference"], tables["result"]]
    names = {one.value: one.name for one in structures_of(values, order)}
    if strict:
        # What a side's own table names is known there, even if no case has it.
        extra = sorted(present["result"] - present["reference"] - tables["reference"].keys())
        lacking = sorted(present["reference"] - present["result"] - tables["result"].keys())
        if extra or lacking:
            parts = []
            for difference, one, other in ((extra, where, against), (lacking, against, where)):
                if difference:
                    parts.append(f"{one} has {_labelled(difference, names)}, which {other} lacks")
            raise InputError(
                f"{'; '.join(parts)}: the label sets differ; say what to score with --labels "
                "(values or names with commas between, or '*' for all)"
            )
    return names


def _place(paths: Sequence[Path]) -> str:
    """What to call the files of one side: the file, or the folder they were looked for in."""
    first = paths[0]
    if len(paths) == 1:
        return str(first)
    return str(first.parent.parent if first.name == _RESULT else first.parent)


def _names_of_found(dataset: Path) -> LabelTable:
    try:
        return read_names_file(dataset)
    except InputError as error:
        # Nobody asked for this file: it may belong to something else, or have regions.
        logger.warning("%s; its names are not used", error)
        return {}


def _check_schemes(result: LabelTable, reference: LabelTable, where: str, against: str) -> None:
    """Refuse label maps that give one name to different values: every score would be of two different organs."""
    values: dict[str, list[int]] = {}
    for value, entry in reference.items():
        values.setdefault(plain_name(entry.name), []).append(value)
    for value, entry in sorted(result.items()):
        others = values.get(plain_name(entry.name), [value])
        if value not in others:
            raise InputError(
                f"{where}: {entry.name!r} has the value {value}, but {min(others)} in {against}; "
                "renumber one of them, or give the right names with --names"
            )


def _picked(names: Mapping[int, str], wanted: Sequence[str]) -> dict[int, str]:
    picked: set[int] = set()
    for one in wanted:
        ranks = {value: rank for value, name in names.items() if (rank := match_rank(one, value, name)) is not None}
        if not ranks:
            raise InputError(
                f"no structure {one!r}; expected a value, name or pattern of {_labelled(sorted(names), names)}"
            )
        picked |= {value for value, rank in ranks.items() if rank == min(ranks.values())}
    return {value: names[value] for value in sorted(picked)}


def _labelled(values: Sequence[int], names: Mapping[int, str]) -> str:
    return listed([f"{value} ({names[value]})" for value in values])


def _rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: plain_number(value) for name, value in values.items()}


def plain_number(value: float | None) -> float | int | None:
    """For JSON, which has no NaN: None for that, and 6 decimals."""
    if value is None or isinstance(value, int):
        return value
    return None if math.isnan(value) else round(value, 6)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value
