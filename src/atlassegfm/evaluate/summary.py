"""Scores of many cases: means over cases, then over structures, and tables.

Structures that result and reference both lack have no score (status "both_empty"). A structure that only one of them
has counts as Dice 0, NSD 0 and a distance of the image's diagonal (status "missed" or "hallucinated"). Means are given
in both usual ways: structures that both lack left out (as nnU-Net does), or counted as perfect.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.files import atomic_path
from .scores import CaseScore
from .statistics import Spread, mean_of, spread

#: ml. Structures with a smaller mean volume form a group of their own in reports: single voxels decide their scores.
SMALL_ML = 1.0
#: Scores that are averaged, and their value of a perfect result.
PERFECT: Mapping[str, float] = {"dice": 1, "nsd": 1, "hd95_mm": 0, "assd_mm": 0, "hd95_voxel_mm": 0, "cldice": 1}
#: Statuses in the order of reports.
STATUSES = ("ok", "missed", "hallucinated", "both_empty")


@dataclass(frozen=True)
class StructureSummary:
    """Scores of one structure over all cases."""

    value: int
    structure: str
    counts: Mapping[str, int]  # cases of each status
    tolerance_mm: float
    reference_ml: float  # mean volume in the references that have it; NaN where none has
    scores: Mapping[str, Spread]  # by score, without cases in which both masks are empty
    with_empty: Mapping[str, float]  # mean of each score with these cases counted as perfect
    worst: CaseScore | None  # lowest Dice, then largest HD95; None without a score

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "value": self.value,
            "structure": self.structure,
            "counts": dict(self.counts),
            "tolerance_mm": self.tolerance_mm,
            "reference_ml": plain_number(self.reference_ml),
            "worst": self.worst and {"case": self.worst.case, "dice": plain_number(self.worst.scores.dice)},
            **{name: plain_row(asdict(one)) for name, one in self.scores.items()},
        }


@dataclass(frozen=True)
class CaseSummary:
    """Scores of one case over its structures."""

    case: str
    means: Mapping[str, float]  # of each score, without structures that both masks lack; NaN if none is left
    worst: CaseScore | None  # as of :class:`StructureSummary`

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        worst = self.worst and {"structure": self.worst.structure, "dice": plain_number(self.worst.scores.dice)}
        return {"case": self.case, **plain_row(self.means), "worst": worst}


@dataclass(frozen=True)
class Summary:
    """Scores of all structures over all cases."""

    cases: int
    structures: tuple[StructureSummary, ...]  # ascending by value
    means: Mapping[str, float]  # of each score over structures, without cases of both masks empty; NaN if none is left
    means_with_empty: Mapping[str, float]  # the same with these cases counted as perfect
    counts: Mapping[str, int]  # structures of cases by status
    small: tuple[str, ...]  # names of structures below :data:`SMALL_ML`
    small_means: Mapping[str, float]  # ``means`` over these alone

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "cases": self.cases,
            "mean": plain_row(self.means),
            "mean_with_both_empty_as_perfect": plain_row(self.means_with_empty),
            "counts": dict(self.counts),
            "small_structures": {"below_ml": SMALL_ML, "names": list(self.small), "mean": plain_row(self.small_means)},
            "structures": [one.to_dict() for one in self.structures],
        }


def summarise(scored: Sequence[CaseScore]) -> Summary:
    """Average scores over cases, then over structures."""
    names, by_value = _score_names(scored), _grouped(scored, "value")
    structures = tuple(_summary_of(by_value[value], names) for value in sorted(by_value))
    small = tuple(one for one in structures if one.reference_ml < SMALL_ML)
    return Summary(
        cases=len({one.case for one in scored}),
        structures=structures,
        means={name: mean_of(one.scores[name].mean for one in structures) for name in names},
        means_with_empty={name: mean_of(one.with_empty[name] for one in structures) for name in names},
        counts=_counts(scored),
        small=tuple(one.structure for one in small),
        small_means={name: mean_of(one.scores[name].mean for one in small) for name in names},
    )


def summarise_cases(scored: Sequence[CaseScore]) -> list[CaseSummary]:
    """Average scores over the structures of each case."""
    names, by_case = _score_names(scored), _grouped(scored, "case")
    means = {case: {name: mean_of(_numbers(rows, name)) for name in names} for case, rows in by_case.items()}
    return [CaseSummary(case, means[case], _worst(rows)) for case, rows in by_case.items()]


def _grouped(scored: Sequence[CaseScore], key: Literal["case", "value"]) -> dict[Any, list[CaseScore]]:
    groups: dict[Any, list[CaseScore]] = {}
    for one in scored:
        groups.setdefault(getattr(one, key), []).append(one)
    return groups


def write_scores(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as CSV, whole or not at all (:class:`InputError`): 6 decimals, NaN and None as empty cells."""
    rows = list(rows)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def plain_number(value: float | None) -> float | int | None:
    """Convert a number for JSON, which has no NaN: 6 decimals, None for NaN."""
    if value is None or isinstance(value, int):
        return value
    return None if math.isnan(value) else round(value, 6)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Row for JSON, numbers as :func:`plain_number` gives them."""
    return {key: plain_number(value) if isinstance(value, float) else value for key, value in row.items()}


def _summary_of(scored: Sequence[CaseScore], names: Sequence[str]) -> StructureSummary:
    scores, with_empty = {}, {}
    for name in names:
        numbers = _numbers(scored, name)
        scores[name] = spread(numbers)
        # None was not asked for, and is not perfect where both masks are empty.
        with_empty[name] = mean_of(
            PERFECT[name] if one.scores.status == "both_empty" and getattr(one.scores, name) is not None else number
            for one, number in zip(scored, numbers, strict=True)
        )
    return StructureSummary(
        value=scored[0].value,
        structure=scored[0].structure,
        counts=_counts(scored),
        tolerance_mm=scored[0].scores.tolerance_mm,
        reference_ml=mean_of(one.scores.reference_ml for one in scored if one.scores.reference_voxels),
        scores=scores,
        with_empty=with_empty,
        worst=_worst(scored),
    )


def _score_names(scored: Sequence[CaseScore]) -> list[str]:
    return [name for name in PERFECT if name != "cldice" or any(one.scores.cldice is not None for one in scored)]


def _numbers(scored: Sequence[CaseScore], name: str) -> list[float]:
    """One score of each, NaN where there is none."""
    values = [getattr(one.scores, name) for one in scored]
    return [math.nan if value is None else value for value in values]


def _worst(scored: Sequence[CaseScore]) -> CaseScore | None:
    known = [one for one in scored if not math.isnan(one.scores.dice)]
    return min(known, key=lambda one: (one.scores.dice, -one.scores.hd95_mm), default=None)


def _counts(scored: Iterable[CaseScore]) -> dict[str, int]:
    found: Counter[str] = Counter(one.scores.status for one in scored)
    return {status: found[status] for status in (*STATUSES, *sorted(found.keys() - set(STATUSES)))}


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value
