"""Mixture of several models: their weighted mean stands for M_fm in the gate (eq. 4 of arXiv 2512.18176).

With the gate's K this is M = K M_atlas + (1 - K) (w_1 M_1 + w_2 M_2 + ...), the weights summing to 1. They are those of
a structure, learned on the atlas from simulated masks: a model that cannot tell a structure there, as a box cannot tell
a ring from what it encloses, gets no say in it on a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..core.mask import LocalMap, bounding_box
from ..core.overlap import dice
from ..core.parallel import parallel_map
from ..prompts import INSIDE

#: Weights by name of the model, those of structure n at position n - 1.
Mixture = Mapping[str, Sequence[float]]
#: Weights are multiples of one part of this many.
_PARTS = 4
#: Scores that agree to this many digits count as equal.
_TIE_DIGITS = 6


def mix(masks: Mapping[str, LocalMap], weights: Mapping[str, float]) -> LocalMap:
    """Average masks of one structure, in [0, 1], with weights by name; those that are empty have no say.

    A single mask is returned as it is. The result is float32 in [0, 1]; empty where all masks with a weight are.
    """
    found = {name: mask for name, mask in masks.items() if (mask.values >= INSIDE).any() and weights[name] > 0}
    if len(found) <= 1:
        return next(iter(found.values()), LocalMap.empty())
    start, stop = bounding_box(found.values())
    total = sum(weights[name] for name in found)
    mixed = np.zeros(np.subtract(stop, start), np.float32)
    for name in sorted(found):
        mixed += np.float32(weights[name] / total) * found[name].on_box(start, stop)
    return LocalMap(start, np.clip(mixed, 0, 1, out=mixed))


def mix_structures(members: Mapping[str, Mapping[int, LocalMap]], mixture: Mixture) -> dict[int, LocalMap]:
    """Average the predictions of each structure by number; those of a single model are returned as they are."""
    if len(members) <= 1:
        return dict(next(iter(members.values()), {}))
    numbers = next(iter(members.values()))
    return {
        n: mix(
            {name: masks[n] for name, masks in members.items()},
            {name: weights[n - 1] for name, weights in mixture.items()},
        )
        for n in numbers
    }


def best_mixture(
    draws: Sequence[Mapping[str, Mapping[int, LocalMap]]], truths: Mapping[int, LocalMap]
) -> dict[str, tuple[float, ...]]:
    """Choose the weights of each structure by the mean Dice on simulated masks; nothing for a single model.

    ``draws`` are predictions by model and number, ``truths`` the labels, 0 or 1, by number from 1 on. Of equally good
    weights those next to equal ones are taken, which also serve a structure that no model found.
    """
    names = sorted(draws[0]) if draws else []
    if len(names) <= 1:
        return {}
    candidates = [
        np.array(parts) / _PARTS for parts in product(range(_PARTS + 1), repeat=len(names)) if sum(parts) == _PARTS
    ]

    def weights_of(n: int) -> NDArray[np.float64]:
        trials = [{name: drawn[name][n] for name in names} for drawn in draws if n in drawn[names[0]]]

        def rank(weights: NDArray[np.float64]) -> tuple[float, float]:
            score = sum(_dice_of(masks, dict(zip(names, weights, strict=True)), truths[n]) for masks in trials)
            return round(score, _TIE_DIGITS), -float(np.abs(weights - 1 / len(names)).sum())

        return max(candidates, key=rank)

    best = list(parallel_map(weights_of, sorted(truths)))
    return {name: tuple(float(weights[column]) for weights in best) for column, name in enumerate(names)}


def _dice_of(masks: Mapping[str, LocalMap], weights: Mapping[str, float], truth: LocalMap) -> float:
    """Dice of a mixture of masks of one structure."""
    mixed = mix(masks, weights)
    start, stop = bounding_box((mixed, truth))
    return dice(mixed.on_box(start, stop) >= INSIDE, truth.on_box(start, stop) >= INSIDE)
