"""Overlap, surfaces and centrelines of result and reference on its grid; NaN, never 1, where both lack a structure."""

from ...core.overlap import dice, dice_per_structure
from .scores import Status, StructureScores, compare, score_labels, score_masks
from .shape import Shape, label_shapes

__all__ = ["Shape", "Status", "StructureScores"]
__all__ += ["compare", "dice", "dice_per_structure", "label_shapes", "score_labels", "score_masks"]
