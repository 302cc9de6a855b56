"""Inverse of a displacement field."""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.geometry import Grid
from .maps import Affine, Chain, DisplacementField, Transform, slabs

logger = logging.getLogger(__name__)

#: Steps towards the inverse of a field grow or shrink by no more than this, and are this many times as long at most.
_STEP_FACTORS, _LONGEST_STEP = (0.1, 2.0), 16.0


@dataclass(frozen=True, eq=False)
class InverseField:
    """A displacement field that undoes another one, and how well.

    ``residual_mm``, (I, J, K) float32, is at each node how far from it the two maps in a row (this one first) end.
    """

    field: DisplacementField
    residual_mm: NDArray[np.float32]
    tolerance_mm: float

    @property
    def converged(self) -> NDArray[np.bool_]:
        """(I, J, K) bool: the nodes at which the residual is within the tolerance; not so where space is folded."""
        return self.residual_mm <= self.tolerance_mm


def invert_field(
    field: DisplacementField, grid: Grid, *, tolerance_mm: float = 0.01, iterations: int = 100
) -> InverseField:
    """Invert a displacement field by fixed-point iteration at each node.

    As Chen et al., "A simple fixed-point approach to invert a deformation field" (Medical Physics 35, 2008),
    ``v <- -u(p + v)``, with the length of steps fitted for each node to how far the last one led (the relaxation of
    Irons and Tuck, 1969), so that fields converge too that stretch space to more than twice its size. A node of
    ``grid`` is done at ``tolerance_mm``, or after ``iterations`` steps, of which the best counts; between the nodes the
    error is bounded by the spacing. ``field.grid`` will do where displacements at its border are small.
    """
    displacement = np.empty((3, *grid.shape), np.float32)
    residual = np.empty(grid.shape, np.float32)
    for slab, points in slabs(grid):
        best = np.zeros_like(points)
        miss = field.map(points) - points
        distance = np.linalg.norm(miss, axis=1)
        step = np.ones(len(points))
        active = np.flatnonzero(distance > tolerance_mm)
        for _ in range(iterations):
            if not len(active):
                break
            tried = best[active] - step[active, None] * miss[active]
            tried_miss = field.map(points[active] + tried) - points[active]
            tried_distance = np.linalg.norm(tried_miss, axis=1)
            # How much longer the step should have been, were the field linear.
            change = miss[active] - tried_miss
            squared = np.maximum((change**2).sum(axis=1), 1e-300)
            factor = np.clip((miss[active] * change).sum(axis=1) / squared, *_STEP_FACTORS)
            better = tried_distance < distance[active]
            factor[~better] = np.minimum(factor[~better], 0.5)
            step[active] = np.minimum(step[active] * factor, _LONGEST_STEP)
            improved = active[better]
            best[improved], miss[improved] = tried[better], tried_miss[better]
            distance[improved] = tried_distance[better]
            active = active[distance[active] > tolerance_mm]
        displacement[:, slab] = best.T.reshape(3, -1, *grid.shape[1:])
        residual[slab] = distance.reshape(-1, *grid.shape[1:])
    return InverseField(DisplacementField(grid, displacement), residual, tolerance_mm)


def invert(transform: Transform, *, tolerance_mm: float = 0.01) -> Transform:
    """Invert an invertible :class:`Affine`, a :class:`DisplacementField` or a :class:`Chain` of these.

    Each field is undone at its own nodes by :func:`invert_field`; a warning says where the tolerance is not reached.
    """
    if isinstance(transform, Affine):
        return transform.inverse()
    if isinstance(transform, Chain):
        return Chain(tuple(invert(stage, tolerance_mm=tolerance_mm) for stage in reversed(transform.stages)))
    if not isinstance(transform, DisplacementField):
        raise TypeError(f"no way to undo a {type(transform).__name__}")
    inverse = invert_field(transform, transform.grid, tolerance_mm=tolerance_mm)
    if missed := 1 - float(inverse.converged.mean()):
        text = "the displacement field folds, or nearly does, at %.2g%% of its nodes: its inverse errs by up to %.2g mm"
        logger.warning(text, 100 * missed, float(inverse.residual_mm.max()))
    return inverse.field
