"""What to expect of a context of several atlases: each is segmented from the others, and compared with its labels.

It needs no label but theirs, and an atlas takes no part in its own segmentation, nor does a gate trained on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .context import Context, Expected
from .core.overlap import dice_per_structure
from .models.base import Models
from .segment import segment

#: Atlases that are segmented, at most: the first ones.
_MOST_LEFT_OUT = 10


def measure(
    context: Context,
    *,
    device: str = "auto",
    model: Models | None = None,
    on_atlas: Callable[[int, int], None] = lambda _number, _count: None,
    on_stage: Callable[[str], None] | None = None,
) -> Context:
    """Segment each atlas of a context from the others; the context with what is then ``expected`` of a structure.

    ``on_atlas`` is called with number and count of each atlas as it begins, ``on_stage`` with each stage. A context of
    one atlas is returned as it is; an atlas without which no other one has all structures is not segmented. Raises as
    :func:`.segment`.
    """
    left_out = [
        (atlas, reduced)
        for number, atlas in enumerate(context.atlases[:_MOST_LEFT_OUT], start=1)
        if context.others and (reduced := context.leaving_out(number)) is not None
    ]
    found: dict[str, list[tuple[float, float]]] = {}
    for number, (atlas, reduced) in enumerate(left_out, start=1):
        on_atlas(number, len(left_out))
        result = segment(reduced, atlas.image, device=device, model=model, on_stage=on_stage)
        scores = dice_per_structure(result.labels.data, atlas.labels.data, atlas.present)
        for one in result.structures:
            if one.structure.value in scores:
                estimate = None if one.quality is None else one.quality.estimated_dice
                score = scores[one.structure.value]
                found.setdefault(one.structure.name, []).append((score, 0.0 if estimate is None else score - estimate))
    return replace(
        context,
        saved=None,
        expected={
            name: Expected(
                dice=float(np.mean([score for score, _ in pairs])),
                lowest=float(min(score for score, _ in pairs)),
                surplus=float(np.mean([surplus for _, surplus in pairs])),
                cases=len(pairs),
            )
            for name, pairs in found.items()
        },
    )
