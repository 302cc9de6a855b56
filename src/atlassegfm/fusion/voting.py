"""Vote of several warped atlases on one structure.

Atlases that disagree with the others are dropped, as in SIMPLE (Langerak et al., IEEE Trans. Med. Imaging 2010): a
registration that lost an organ should not blur the others' borders. The rest is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.mask import LocalMap, bounding_box, mean_of
from ..core.overlap import dice
from ..prompts import INSIDE

#: An atlas is dropped if its Dice with the vote is this much below that of the best one.
_TOLERANCE = 0.15
#: Rounds of dropping, at most.
_ROUNDS = 3


def vote(masks: Sequence[LocalMap]) -> tuple[LocalMap, tuple[int, ...]]:
    """Average the masks of one structure, in [0, 1], that agree with their median; also gives their positions.

    Of two masks both are kept: neither is known to be the wrong one.
    """
    kept = list(range(len(masks)))
    if len(masks) > 2:
        start, stop = bounding_box(masks)
        full = np.stack([one.on_box(start, stop) for one in masks])
        for _ in range(_ROUNDS):
            agreed = np.median(full[kept], axis=0) >= INSIDE
            scores = np.nan_to_num([dice(full[n] >= INSIDE, agreed) for n in kept])
            # One alone is no vote.
            least = min(scores.max() - _TOLERANCE, np.sort(scores)[-2])
            still = [n for n, score in zip(kept, scores, strict=True) if score >= least]
            if len(still) == len(kept):
                break
            kept = still
    return mean_of([masks[n] for n in kept]), tuple(kept)
