"""Which case is the atlas for which query."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import InputError
from ..core.labels import listed
from ..core.text import did_you_mean

logger = logging.getLogger(__name__)

PROTOCOLS = ("one-shot-5fold", "one-to-all", "all-pairs")


@dataclass(frozen=True)
class Pair:
    """An atlas and a query, by the names of their cases; ``others`` are further atlases."""

    atlas: str
    query: str
    others: tuple[str, ...] = ()

    @property
    def atlases(self) -> str:
        """Name of the atlas, or of all with + between."""
        return "+".join((self.atlas, *self.others))


def make_pairs(
    cases: Sequence[str], protocol: str, *, seed: int = 0, folds: int = 5, atlases: Sequence[str] = (), every: int = 1
) -> tuple[Pair, ...]:
    """Make the pairs of a protocol from the sorted names of all cases; those of one atlas are together.

    "one-shot-5fold" is the paper's: the cases are shuffled by ``seed`` and split into ``folds`` (at least 2; paper: 5),
    and in each fold the first case is the atlas for its other cases. "one-to-all": each of ``atlases`` (the first case
    if left out) for all other cases. "all-pairs": every case for every other one. Of ``every`` so many pairs one is
    kept; of "all-pairs" a balanced sample: every case is about as often atlas as query.

    InputError if there are too few cases, an atlas is not among them, or an option belongs to another protocol.
    """
    if protocol not in PROTOCOLS:
        meant = did_you_mean(protocol, PROTOCOLS)
        raise InputError(f"unknown protocol {protocol!r}{meant}; expected one of {', '.join(PROTOCOLS)}")
    if len(cases) < 2:
        raise InputError(f"a benchmark needs an atlas and a query; found {len(cases)} case: add labelled cases")
    if every < 1:
        raise InputError(f"--every {every}: expected 1 (all pairs) or more")
    if atlases and protocol != "one-to-all":
        raise InputError(f"--atlas belongs to the protocol one-to-all, not {protocol}; leave one of them out")
    if protocol == "one-shot-5fold":
        return tuple(_folds(cases, seed, folds)[::every])
    for atlas in atlases:
        if atlas not in cases:
            raise InputError(f"--atlas {atlas}: not a case of this benchmark; expected one of {listed(cases)}")
    chosen = cases if protocol == "all-pairs" else dict.fromkeys(atlases or cases[:1])
    pairs = [Pair(atlas, query) for atlas in chosen for query in cases if query != atlas]
    return _balanced(cases, pairs, every) if protocol == "all-pairs" else tuple(pairs[::every])


def draw_sets(cases: Sequence[str], size: int, draws: int, *, seed: int = 0) -> tuple[Pair, ...]:
    """Draw sets of atlases for each query from all other cases, in random order; those of one first atlas are together.

    ``size`` is that of a set, ``draws`` the number of sets of a query. InputError if there are too few cases.
    """
    if size >= len(cases):
        raise InputError(f"{size} atlases and a query need {size + 1} cases, found {len(cases)}; ask for fewer atlases")
    random, pairs = np.random.default_rng(seed), set[Pair]()
    for query in cases:
        others = [case for case in cases if case != query]
        for _ in range(draws):
            first, *more = (others[int(n)] for n in random.permutation(len(others))[:size])
            pairs.add(Pair(first, query, tuple(more)))
    return tuple(sorted(pairs, key=lambda pair: (pair.atlas, pair.query, pair.others)))


def _balanced(cases: Sequence[str], pairs: Sequence[Pair], every: int) -> tuple[Pair, ...]:
    """Take one pair of ``every``: first each case with the next one, then each case with the next but one ..."""
    place = {case: n for n, case in enumerate(cases)}
    apart = sorted(pairs, key=lambda pair: ((place[pair.query] - place[pair.atlas]) % len(cases), place[pair.atlas]))
    kept = set(apart[: -(-len(pairs) // every)])
    return tuple(pair for pair in pairs if pair in kept)


def _folds(cases: Sequence[str], seed: int, folds: int) -> list[Pair]:
    if folds < 2:
        raise InputError(f"--folds {folds}: expected 2 or more")
    if len(cases) <= folds:
        raise InputError(
            f"{folds} folds need at least {folds + 1} cases, found {len(cases)}; use --folds with a smaller number, or "
            "--protocol all-pairs"
        )
    shuffled = [cases[int(n)] for n in np.random.default_rng(seed).permutation(len(cases))]
    split = [shuffled[n::folds] for n in range(folds)]
    if alone := sum(len(fold) == 1 for fold in split):
        logger.warning("%d of %d folds hold a single case, an atlas without a query; they give no pair", alone, folds)
    return [Pair(fold[0], query) for fold in split for query in sorted(fold[1:])]
