"""Scores of results against references."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.labels import listed, read_names_file
from .labelling import DicomInputs, PairReader, find_structures, pick_structures
from .pairing import find_pairs
from .scores import CaseScore, score_volumes
from .summary import CaseSummary, Summary, plain_row, summarise, summarise_cases, write_scores
from .tolerances import PRESETS, Tolerances, uniform

logger = logging.getLogger(__name__)

__all__ = ["CaseScore", "DicomInputs", "Evaluation", "EvaluationOptions", "evaluate", "score_volumes"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to score.

    Structures are given as label values, names or shell patterns; "*" is all that either side has.
    """

    labels: Sequence[str] = ()  # to score; without, both sides must have the same structures
    centreline: Sequence[str] = ()  # to score by clDice too
    names: Path | None = None  # file with names of labels: before those of the references' files, then the results'
    partial: bool = False  # whether references without a result are left out with a warning instead of refused
    dicom: DicomInputs = field(default_factory=DicomInputs)


@dataclass(frozen=True)
class Evaluation:
    """Scores of results against references: case by case, structures in ascending order of their values."""

    scores: tuple[CaseScore, ...]
    tolerances: Tolerances
    failures: Mapping[str, str] = field(default_factory=dict)  # by case: why it has no scores

    @cached_property
    def summary(self) -> Summary:
        """Means over cases and structures."""
        return summarise(self.scores)

    @cached_property
    def cases(self) -> list[CaseSummary]:
        """Means over the structures of each case that has scores."""
        return summarise_cases(self.scores)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Table of all scores: a row for each structure of each case, and one for each case without scores."""
        keys = [{"case": one.case, "value": one.value, "structure": one.structure} for one in self.scores]
        scored = [key | vars(one.scores) | {"reason": ""} for key, one in zip(keys, self.scores, strict=True)]
        return [*scored, *self._not_scored]

    @property
    def _not_scored(self) -> list[dict[str, Any]]:
        return [{"case": case, "status": "not_scored", "reason": reason} for case, reason in self.failures.items()]

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all scores as CSV."""
        write_scores(Path(path), self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tolerances": self.tolerances.origin,
            "summary": self.summary.to_dict(),
            "cases": [*({"status": "ok", **one.to_dict()} for one in self.cases), *self._not_scored],
            "scores": [plain_row(row) for row in self.rows],
        }


def evaluate(
    result: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    tolerances: Tolerances | float = 2.0,
    options: EvaluationOptions | None = None,
    *,
    on_case: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Score label maps, RTSTRUCT or DICOM-SEG files against references.

    ``result`` and ``reference`` are two files, or two folders of files with the same names (see
    :func:`~atlassegfm.evaluate.pairing.find_pairs`); ``tolerances`` are those of the NSD, or a number of mm for all
    structures. A case whose files cannot be used, or are on different grids, is left out: it is in ``failures`` of the
    result. ``on_case`` is called with number (from 1), number of cases, and name of each case as it begins.

    InputError if no case can be scored, a file has no counterpart, both sides have other structures, or there is none.
    """
    options = options or EvaluationOptions()
    if not isinstance(tolerances, Tolerances):
        tolerances = uniform(tolerances)
    pairs = find_pairs(Path(result), Path(reference), partial=options.partial)
    reader = PairReader(options.dicom, None if options.names is None else read_names_file(options.names))
    names, failures = find_structures(pairs, reader, strict=not options.labels)
    for reason in failures.values():
        logger.warning("%s; the case is not scored", reason)
    pairs = [pair for pair in pairs if pair.case not in failures]
    unmatched = tolerances.unmatched(names.items())
    if unmatched and tolerances.origin not in {f"preset {name}" for name in PRESETS}:
        logger.warning("%s: no structure is called %s; check the spelling", tolerances.origin, listed(unmatched))
    if options.labels:
        names = pick_structures(names, options.labels)
    thin = pick_structures(names, options.centreline) if options.centreline else {}
    scored = []
    for number, pair in enumerate(pairs, start=1):
        if on_case is not None:
            on_case(number, len(pairs), pair.case)
        labels, truth = reader.read(pair)
        scores = score_volumes({"": labels}, truth, names, tolerances, centreline=thin)[""]
        scored += [CaseScore(pair.case, value, names[value], one) for value, one in scores.items()]
    return Evaluation(tuple(scored), tolerances, failures)
