"""Agreement of a result with a reference on its native grid: overlap, surfaces and centrelines.

A structure that neither of them has gives NaN, never 1: means must say how those are counted.
"""

from __future__ import annotations

from ...core.overlap import dice, dice_per_structure
from .scores import Status, StructureScores, compare, score_labels, score_masks
from .shape import Shape, label_shapes

__all__ = [
    "Shape",
    "Status",
    "StructureScores",
    "compare",
    "dice",
    "dice_per_structure",
    "label_shapes",
    "score_labels",
    "score_masks",
]
