"""Dissimilarity of query and warped atlas, voxel by voxel: for the confidence, and for quality without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.geometry import Grid
from ..core.mask import LocalMap
from ..transforms.maps import Transform
from .affine import MISMATCH_PENALTY
from .features import mind_ssc
from .pyramid import Scan, frame_grid, on_grid


@dataclass(frozen=True, eq=False)
class Dissimilarity:
    """MIND-SSC dissimilarity of query and warped atlas, (I, J, K) float32 each.

    ``grid`` covers the query's field of view. ``values`` are sums of squared differences over the channels, 0 where the
    scans are the same; ``weight`` is the fraction of each voxel that is foreground in both scans, in [0, 1].
    """

    grid: Grid
    values: NDArray[np.float32]
    weight: NDArray[np.float32]

    def mean(self, around: LocalMap | None = None) -> float:
        """Average over the common foreground, or over a soft mask on the grid; 0 where there is none."""
        values, weight = self.values, self.weight
        if around is not None:
            values, weight = self.values[around.box], around.values
        total = float(weight.sum(dtype=np.float64))
        return float((values * weight).sum(dtype=np.float64)) / total if total > 0 else 0.0

    @property
    def confidence(self) -> float:
        """How much better the scans match than misplaced ones, in [0, 1]; 0 without common foreground."""
        if float(self.weight.sum()) < 1:
            return 0.0
        return float(np.clip(1 - self.mean() / MISMATCH_PENALTY, 0, 1))


def measure(fixed: Scan, moving: Scan, fixed_to_moving: Transform, spacing_mm: float) -> Dissimilarity:
    """Compare two prepared scans through a transform, on a grid of about ``spacing_mm``."""
    grid = frame_grid(fixed.intensity.grid, spacing_mm)
    query, atlas = on_grid(fixed, grid, "cpu"), on_grid(moving, grid, "cpu", fixed_to_moving)
    values = (mind_ssc(query.image) - mind_ssc(atlas.image)).pow(2).sum(dim=1)[0]
    return Dissimilarity(grid, values.numpy(), (query.weight * atlas.weight)[0, 0].numpy())
