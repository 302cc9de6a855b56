"""Atlases on a query: which of a context take part, their labels warped, and the votes of several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atlas import Atlas, is_same_scan
from .context import Context
from .core.errors import InputError
from .core.image import Volume
from .core.mask import LocalMap
from .fusion.label_map import label_map
from .fusion.voting import vote
from .prompts import INSIDE
from .quality.coverage import OUTSIDE_FRACTION, outside_fractions
from .quality.estimate import regression_of
from .quality.evidence import Case, gather
from .registration import Registration, rank
from .result import Status
from .settings import NO_MODEL, Settings
from .transforms.resample import warp_labels

logger = logging.getLogger(__name__)

#: A structure whose warped mask is empty counts as outside, not absent, if most of it is out of view.
_MOSTLY_OUTSIDE_FRACTION = 0.5
#: Of two atlases, one whose structure has an estimated Dice this much below that of the other one is dropped.
_LEAST_DIFFERENCE = 0.15


def atlases_for(
    context: Context, scan: Volume, settings: Settings, device: str = "cpu"
) -> tuple[Context, dict[int, Atlas]]:
    """Choose the atlases of a context that take part in a query, by number in the context from 1 on.

    Of more than ``settings.most_atlases`` these are the most alike, and for each structure that none of them has the
    next one that has it. The query itself is left out, with a warning; the context is returned without its gate if
    that was trained on the query. Raises InputError if no other atlas has all structures.
    """
    atlases = dict(enumerate(context.atlases, start=1))
    if len(atlases) == 1:
        return context, atlases
    others = {number: one for number, one in atlases.items() if not is_same_scan(one.image, scan)}
    for number in atlases.keys() - others.keys():
        reduced = context.leaving_out(number)
        if reduced is None:
            raise InputError("the query is an atlas of the context, and no other one has all structures; leave it out")
        logger.warning("the query is one of the atlases of the context, and is left out of them")
        context = reduced
    if len(others) <= settings.most_atlases:
        return context, others
    numbers = [*others]
    labelled = [(one.image, one.numbered) for one in others.values()]
    order = [numbers[place] for place in rank(scan, labelled, settings.registration, device=device)]
    chosen, spare = order[: settings.most_atlases], order[settings.most_atlases :]
    for value in context.atlas.values:
        if not any(value in others[number].present for number in chosen):
            chosen += [number for number in spare if value in others[number].present][:1]
    return context, {number: others[number] for number in sorted(chosen)}


@dataclass(frozen=True, eq=False)
class Warped:
    """An atlas on the query, or several, by number of the structure: masks of those not missing, and the label map."""

    masks: Mapping[int, LocalMap]
    labels: NDArray[Any]
    #: Fraction of each structure out of view.
    outside: tuple[float, ...]
    missing: Mapping[int, tuple[Status, str]]
    #: Numbers of the atlases that agreed on a structure, of several.
    votes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def _warp(atlas: Atlas, scan: Volume, registration: Registration) -> Warped:
    """Warp the atlas's labels to the query, and drop structures that it does not show."""
    numbers = range(1, len(atlas.structures) + 1)
    outside = outside_fractions(atlas, registration.linear, scan.grid)
    masks = warp_labels(atlas.numbered, numbers, scan.grid, registration.members)
    missing = {n: why for n in numbers if (why := _why_missing(masks[n], outside[n - 1])) is not None}
    masks = {n: mask for n, mask in masks.items() if n not in missing}
    return Warped(masks, label_map(masks, scan.grid.shape), outside, missing)


def _vote(
    atlases: Mapping[int, Atlas],
    warped: Mapping[int, Warped],
    scan: Volume,
    registrations: Mapping[int, Registration],
) -> Warped:
    """Let several atlases, which have all structures together, vote on each; what most of them miss is missing."""
    masks, missing, outside = dict[int, LocalMap](), dict[int, tuple[Status, str]](), list[float]()
    votes = {}

    @cache
    def estimates(k: int) -> dict[int, float]:
        return _estimates(atlases[k], warped[k], scan, registrations[k])

    for n, value in enumerate(next(iter(atlases.values())).values, start=1):
        having = [k for k, atlas in atlases.items() if value in atlas.present]
        found = [k for k in having if n in warped[k].masks]
        outside.append(float(np.median([warped[k].outside[n - 1] for k in having])))
        if 2 * len(found) < len(having) or not found:
            missing[n] = next(warped[k].missing[n] for k in having if n in warped[k].missing)
            continue
        if len(found) == 2:  # neither outvotes the other
            best = max(estimates(k).get(n, 0.0) for k in found)
            found = [k for k in found if estimates(k).get(n, 0.0) >= best - _LEAST_DIFFERENCE]
        masks[n], kept = vote([warped[k].masks[n] for k in found])
        votes[n] = tuple(found[k] for k in kept)
        if not (masks[n].values >= INSIDE).any():
            missing[n] = "absent", "the atlases disagree on where it is"
            del masks[n]
    return Warped(masks, label_map(masks, scan.grid.shape), tuple(outside), missing, votes)


def _estimates(atlas: Atlas, warped: Warped, scan: Volume, registration: Registration) -> dict[int, float]:
    """Estimated Dice of the warped mask of each structure by number."""
    case = Case(
        query=scan,
        atlas=atlas.image,
        atlas_labels=atlas.numbered,
        registration=registration,
        warped={n: mask for n, mask in warped.masks.items() if atlas.values[n - 1] in atlas.present},
        answers={},
        labels=warped.labels,
    )
    return {n: regression_of(NO_MODEL, one).estimate(one) for n, one in gather(case).items()}


def _why_missing(mask: LocalMap, outside: float) -> tuple[Status, str] | None:
    """Status and reason of a structure that the query does not show, else None."""
    is_empty = not (mask.values >= INSIDE).any()
    if outside >= OUTSIDE_FRACTION or (is_empty and outside >= _MOSTLY_OUTSIDE_FRACTION):
        return "outside", f"{outside:.0%} of it lies outside the field of view"
    if is_empty:
        return "absent", "no voxel of the query has a probability of 0.5 or more in the warped atlas"
    return None


def warp_atlases(atlases: Mapping[int, Atlas], scan: Volume, registrations: Mapping[int, Registration]) -> Warped:
    """Warp the labels of one or several atlases, by number, to a query; several vote on each structure."""
    warped = {number: _warp(one, scan, registrations[number]) for number, one in atlases.items()}
    return next(iter(warped.values())) if len(warped) == 1 else _vote(atlases, warped, scan, registrations)
