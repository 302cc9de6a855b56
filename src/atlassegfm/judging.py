"""Verdicts on the structures of a result: each is judged against the atlas that fits the query best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atlas import Atlas
from .context import Expected
from .core.image import Volume
from .core.mask import LocalMap
from .core.overlap import dice_per_structure
from .fusion.gate import is_empty_prediction
from .fusion.mixture import Mixture
from .models.base import Prediction
from .prompts import used_prompt
from .quality.evidence import Case, Evidence, gather
from .quality.mirror import Sides
from .quality.verdict import SWAPPED, StructureQuality, at_most, is_calibrated, judge
from .registration import Registration
from .result import MemberResult, StructureResult
from .settings import Settings
from .warping import Warped

#: Atlases left out whose weight in the estimates equals that of the calibration.
_PRIOR_CASES = 6


@dataclass(frozen=True, eq=False)
class Job:
    """What a result was made from: the query as it came and in RAS-canonical order, and atlases by their number.

    ``sides`` are those of the query, None where they were not compared.
    """

    query: Volume
    scan: Volume
    atlases: Mapping[int, Atlas]
    registrations: Mapping[int, Registration]
    settings: Settings
    sides: Sides | None = None
    transform_given: bool = False
    expected: Mapping[str, Expected] = field(default_factory=dict)

    @property
    def confidence(self) -> float:
        """That of the best registration."""
        return max(one.confidence for one in self.registrations.values())


def judge_structures(
    job: Job,
    warped: Warped,
    predicted: Prediction | None,
    answers: Mapping[int, LocalMap],
    labels: NDArray[Any],
) -> tuple[StructureResult, ...]:
    """Gather the evidence on each structure, and judge it.

    ``answers`` are the model's masks by number, ``labels`` (I, J, K) numbers on the query in RAS-canonical order.
    """
    structures = next(iter(job.atlases.values())).structures
    judges = {n: _judge_of(job, warped, n) for n in range(1, len(structures) + 1)}
    evidence = _evidence(job, warped, judges, answers, labels)
    voxels = np.bincount(labels.ravel(), minlength=len(structures) + 1)
    tubular = next(iter(job.atlases.values())).numbers_of(job.settings.tubular, "tubular")
    calibrated = is_calibrated(job.settings, transform_given=job.transform_given)
    results = []
    for n, structure in enumerate(structures, start=1):
        place, outside = job.registrations[judges[n]].places.get(n), warped.outside[n - 1]
        status, reason = warped.missing.get(n, ("present", ""))
        if status == "present" and not voxels[n]:
            status, reason = "absent", "at every voxel another structure or background is more probable"
        if status == "present" and n in evidence:
            quality = judge(
                evidence[n],
                job.settings.model,
                job.confidence,
                outside=outside,
                place=place,
                surplus=_surplus(job.expected.get(structure.name)),
                calibrated=calibrated,
                tubular=n in tubular,
            )
        else:  # what the field of view does not show cannot be wrong, but somebody may expect it there
            quality = StructureQuality("review" if status == "outside" else "failed", reason)
        if status == "present" and n in answers and is_empty_prediction(answers[n]):
            reason = "the model found nothing there, and the warped atlas was kept"
            quality = at_most("review", quality, reason)
        if job.sides is not None and job.sides.swapped:
            quality = at_most("review", quality, SWAPPED)
        prompt = None if predicted is None else predicted.prompts.get(n)
        results.append(
            StructureResult(
                structure,
                status,
                reason,
                volume_ml=float(voxels[n]) * job.scan.grid.voxel_volume_mm3 / 1000,
                outside_fraction=outside,
                place=place,
                prompt=None if prompt is None else used_prompt(prompt, job.scan.grid, job.query.grid),
                votes=warped.votes.get(n, ()),
                quality=quality,
            )
        )
    return tuple(results)


def _surplus(expected: Expected | None) -> float:
    """What to add to an estimate: what atlases left out scored above theirs, the less the fewer they are."""
    return 0.0 if expected is None else expected.surplus * expected.cases / (expected.cases + _PRIOR_CASES)


def _judge_of(job: Job, warped: Warped, number: int) -> int:
    """Number of the atlas a structure is compared with: the one that fits the query best of those that agreed."""
    value = next(iter(job.atlases.values())).values[number - 1]
    having = [k for k, atlas in job.atlases.items() if value in atlas.present]
    return max(warped.votes.get(number) or having, key=lambda k: job.registrations[k].confidence)


def _evidence(
    job: Job,
    warped: Warped,
    judges: Mapping[int, int],
    answers: Mapping[int, LocalMap],
    labels: NDArray[Any],
) -> dict[int, Evidence]:
    found: dict[int, Evidence] = {}
    for k in sorted(set(judges.values())):
        atlas = job.atlases[k]
        case = Case(
            query=job.scan,
            atlas=atlas.image,
            atlas_labels=atlas.numbered,
            registration=job.registrations[k],
            warped={n: mask for n, mask in warped.masks.items() if atlas.values[n - 1] in atlas.present},
            answers=answers,
            labels=labels,
        )
        found |= {n: one for n, one in gather(case).items() if judges[n] == k}
    return found


def with_members(
    structures: Sequence[StructureResult],
    member_labels: Mapping[str, NDArray[Any]],
    labels: NDArray[Any],
    mixture: Mixture,
) -> tuple[StructureResult, ...]:
    """Add what each of several models found, as label maps of the result's grid; structure n is at position n - 1."""
    numbers = range(1, len(structures) + 1)
    agreement = {name: dice_per_structure(found, labels, numbers) for name, found in member_labels.items()}
    return tuple(
        replace(one, members={name: MemberResult(mixture[name][n - 1], agreement[name][n]) for name in mixture})
        for n, one in zip(numbers, structures, strict=True)
    )
