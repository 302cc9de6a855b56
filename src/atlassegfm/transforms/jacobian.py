"""Volume changes and folding of a deformation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.geometry import Grid
from .maps import Chain, DisplacementField, displacement_on, slabs


@dataclass(frozen=True)
class JacobianStatistics:
    """Statistics of the Jacobian determinant of a displacement field over some of its nodes; all NaN without nodes.

    The determinant is the local change of volume: 1 where there is none, 0 or less where space is folded, which is so
    at the fraction ``folding`` of the nodes. ``log_deviation`` is the standard deviation of its natural logarithm where
    it is above 0: how uneven the deformation is. 0 for a uniform scaling; NaN where no node is above 0.
    """

    folding: float
    minimum: float
    percentile_1: float
    percentile_5: float
    median: float
    percentile_95: float
    percentile_99: float
    log_deviation: float


def jacobian_statistics(field: DisplacementField, mask: NDArray[np.bool_] | None = None) -> JacobianStatistics:
    """Compute statistics of the Jacobian determinant at the nodes of a field, or at those of a (I, J, K) mask."""
    determinant = field.jacobian_determinant()
    if mask is not None and mask.shape != determinant.shape:
        raise ValueError(f"mask of shape {mask.shape} for a field on a grid of shape {determinant.shape}")
    values = determinant.ravel() if mask is None else determinant[mask]
    if not len(values):
        return JacobianStatistics(*[float("nan")] * 8)
    positive = values[values > 0]
    deviation = float(np.log(positive, dtype=np.float64).std()) if len(positive) else float("nan")
    percentiles = np.percentile(values, (1, 5, 50, 95, 99)).tolist()
    return JacobianStatistics(*[float((values <= 0).mean()), float(values.min()), *percentiles, deviation])


def deformation_statistics(
    field: DisplacementField | None, local: DisplacementField | None, counted: Callable[[Grid], NDArray[np.bool_]]
) -> tuple[float, JacobianStatistics | None]:
    """Compute the folded fraction of a region and the Jacobian statistics there; 0 and None without a field.

    ``local``, where there is one, is applied before ``field``; ``counted`` gives the nodes of a grid in the region,
    (I, J, K) bool. The fraction is by volume, in [0, 1]: in the local field's box at its nodes and of both fields in a
    row, elsewhere at those of the other; 0 where no node is in the region. The statistics are of the region's part in
    the local field's box where there is one, else of all of it.
    """
    if field is None:
        return 0.0, None
    outside = counted(field.grid)
    if local is None:
        statistics = jacobian_statistics(field, outside)
        return (statistics.folding if outside.any() else 0.0), statistics
    outside &= ~nodes_in(local.grid, field.grid)
    inside = counted(local.grid)
    statistics = jacobian_statistics(displacement_on(Chain((local, field)), local.grid), inside)
    parts = [
        (float(inside.sum()) * local.grid.voxel_volume_mm3, statistics.folding),
        (float(outside.sum()) * field.grid.voxel_volume_mm3, jacobian_statistics(field, outside).folding),
    ]
    total = sum(volume for volume, _ in parts)
    return (sum(volume * fraction for volume, fraction in parts if volume) / total if total else 0.0), statistics


def nodes_in(view: Grid, nodes: Grid) -> NDArray[np.bool_]:
    """Find the nodes inside a field of view, half a voxel of border included: (I, J, K) bool."""
    inside = np.empty(nodes.shape, np.bool_)
    for slab, points in slabs(nodes):
        inside[slab] = view.contains(points).reshape(-1, *nodes.shape[1:])
    return inside
