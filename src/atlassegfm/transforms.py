"""Maps between worlds, and sampling through them.

A transform answers one question: where in the moving (atlas) world lies this point of the fixed (query)
world? ``map`` takes and gives RAS+ mm. Images are pulled: the value of a fixed voxel is read in the moving
image at the mapped point, once, whatever the number of stages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .errors import InputError
from .geometry import Grid
from .image import LocalMap, Volume
from .threads import side_by_side

logger = logging.getLogger(__name__)

#: Voxels mapped at a time in one thread. Bounds the memory of coordinates to about 100 MB whatever the scan's size.
_CHUNK_VOXELS = 250_000
#: Edge of the blocks that are left out together where no label is near: about the nodes of the finest field over an
#: abdomen, so that the field bends little inside.
_BLOCK_MM = 8.0
#: Points along each axis of the field of view that a linear part is fitted to: 12 numbers from 4096 points.
_FIT_POINTS = 16
#: Steps towards the inverse of a field grow or shrink by no more than this, and are this many times as long at most.
_STEP_FACTORS, _LONGEST_STEP = (0.1, 2.0), 16.0
#: Matrices are called singular if they stretch one direction less than this share of another. Anatomy differs by
#: factors of two or three.
_SMALLEST_STRETCH = 1e-4


class Transform(Protocol):
    """A map from fixed world to moving world."""

    def map(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) RAS+ mm in the fixed world to (N, 3) RAS+ mm in the moving world."""
        ...


@dataclass(frozen=True, eq=False)
class Affine:
    """A linear map.

    Parameters
    ----------
    matrix : array, (4, 4)
        Homogeneous, RAS+ mm of the fixed world to RAS+ mm of the moving world.
    """

    matrix: NDArray[np.float64]

    @classmethod
    def identity(cls) -> Affine:
        """The map that moves nothing."""
        return cls(np.eye(4))

    def map(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) RAS+ mm to (N, 3) RAS+ mm."""
        return points_mm @ self.matrix[:3, :3].T + self.matrix[:3, 3]

    def inverse(self) -> Affine:
        """The map back."""
        return Affine(np.linalg.inv(self.matrix).astype(np.float64))

    @property
    def is_invertible(self) -> bool:
        """Whether there is a map back: all numbers finite, and no direction pressed flat."""
        if not np.isfinite(self.matrix).all():
            return False
        stretches = np.linalg.svd(self.matrix[:3, :3], compute_uv=False)
        return bool(stretches[-1] > _SMALLEST_STRETCH * stretches[0])


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """A map that adds a displacement, linearly interpolated between the nodes of a grid.

    Outside the grid the displacement of the nearest border point holds on, so that the map stays
    continuous.

    Parameters
    ----------
    grid : Grid
        Nodes, in the fixed world.
    displacement_mm : array, (3, I, J, K) float32
        x, y, z of the displacement in RAS+ mm at the nodes.
    """

    grid: Grid
    displacement_mm: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.displacement_mm.shape != (3, *self.grid.shape):
            raise ValueError(f"field of shape {self.displacement_mm.shape} on a grid of shape {self.grid.shape}")

    def map(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) RAS+ mm to (N, 3) RAS+ mm."""
        ijk = self.grid.world_to_voxel(points_mm)
        moved = points_mm.copy()
        for component in range(3):
            moved[:, component] += ndimage.map_coordinates(
                self.displacement_mm[component], ijk.T, order=1, mode="nearest"
            )
        return moved

    def jacobian_determinant(self) -> NDArray[np.float32]:
        """(I, J, K) float32: local change of volume at the nodes; 0 or less where space is folded."""
        determinant = np.empty(self.grid.shape, np.float32)
        # d displacement / d world = d displacement / d voxel * d voxel / d world
        per_mm = self.grid.inverse_affine[:3, :3].astype(np.float32)
        depth = max(1, _CHUNK_VOXELS // int(np.prod(self.grid.shape[1:])))
        for first in range(0, self.grid.shape[0], depth):
            last = min(first + depth, self.grid.shape[0])
            # One plane more on each side, for central differences.
            low, high = max(first - 1, 0), min(last + 1, self.grid.shape[0])
            slab = self.displacement_mm[:, low:high]
            gradient = np.zeros((3, 3, *slab.shape[1:]), np.float32)
            for component in range(3):
                for axis in range(3):
                    if slab.shape[axis + 1] > 1:
                        gradient[component, axis] = np.gradient(slab[component], axis=axis)
            gradient = gradient[:, :, first - low : last - low]
            change = np.einsum("cvijk,vw->ijkcw", gradient, per_mm)
            determinant[first:last] = np.linalg.det(change + np.eye(3, dtype=np.float32))
        return determinant


@dataclass(frozen=True, eq=False)
class Chain:
    """Transforms one after the other, the first applied first."""

    stages: tuple[Transform, ...]

    def map(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) RAS+ mm to (N, 3) RAS+ mm."""
        for stage in self.stages:
            points_mm = stage.map(points_mm)
        return points_mm


def folding_share(transform: Transform, grid: Grid) -> float:
    """Share (0 to 1) of the nodes of ``grid`` at which ``transform`` folds space.

    The Jacobian determinant is taken by central differences of the mapped nodes themselves, so that it
    holds for any transform.
    """
    field = displacement_on(transform, grid)
    return float((field.jacobian_determinant() <= 0).mean())


@dataclass(frozen=True)
class JacobianStatistics:
    """How a displacement field changes volumes, over some of its nodes.

    The Jacobian determinant is the local change of volume: 1 where there is none, 0 or less where space is folded.
    All numbers are NaN where there was no node to look at.

    Parameters
    ----------
    folding : float
        Share of the nodes with a determinant of 0 or less, in [0, 1].
    minimum : float
        Smallest determinant.
    percentile_1, percentile_5, median, percentile_95, percentile_99 : float
        Of the determinant.
    log_deviation : float
        Standard deviation of the natural logarithm of the determinant, over the nodes where it is above 0: how
        uneven the deformation is, shrinking and growing alike. 0 for a uniform scaling; NaN where no node has one.
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
    """How a displacement field changes volumes.

    Parameters
    ----------
    field : DisplacementField
        Determinants are taken at its nodes, by central differences.
    mask : array, (I, J, K) bool, optional
        Nodes that count; all if left out.
    """
    determinant = field.jacobian_determinant()
    if mask is not None and mask.shape != determinant.shape:
        raise ValueError(f"mask of shape {mask.shape} for a field on a grid of shape {determinant.shape}")
    values = determinant.ravel() if mask is None else determinant[mask]
    if not len(values):
        return JacobianStatistics(*[float("nan")] * 8)
    positive = values[values > 0]
    p1, p5, p50, p95, p99 = (float(value) for value in np.percentile(values, (1, 5, 50, 95, 99)))
    return JacobianStatistics(
        folding=float((values <= 0).mean()),
        minimum=float(values.min()),
        percentile_1=p1,
        percentile_5=p5,
        median=p50,
        percentile_95=p95,
        percentile_99=p99,
        log_deviation=float(np.log(positive, dtype=np.float64).std()) if len(positive) else float("nan"),
    )


def deformation_statistics(
    field: DisplacementField, local: DisplacementField | None, counted: Callable[[Grid], NDArray[np.bool_]]
) -> tuple[float, JacobianStatistics]:
    """How much of a region a deformation folds, and how it changes volumes there.

    Parameters
    ----------
    field, local : DisplacementField
        ``local``, where there is one, is applied first.
    counted : callable
        Which nodes of a grid are in the region: (I, J, K) bool.

    Returns
    -------
    folding : float
        Share of the region by volume, in [0, 1]: in the local field's box at its nodes and of both fields in a row,
        elsewhere at those of the other. 0 where no node is in the region.
    statistics : JacobianStatistics
        Of the region's part in the local field's box where there is one, else of all of it.
    """
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
    return (sum(volume * share for volume, share in parts if volume) / total if total else 0.0), statistics


def nodes_in(view: Grid, nodes: Grid) -> NDArray[np.bool_]:
    """(I, J, K) bool of the shape of ``nodes``: those inside a field of view, half a voxel of border included."""
    inside = np.empty(nodes.shape, np.bool_)
    for slab, points in _slabs(nodes):
        inside[slab] = view.contains(points).reshape(-1, *nodes.shape[1:])
    return inside


@dataclass(frozen=True, eq=False)
class InverseField:
    """A displacement field that undoes another one, and how well.

    Parameters
    ----------
    field : DisplacementField
        The map back.
    residual_mm : array, (I, J, K) float32
        At each node, how far from it the two maps in a row (this one first) end.
    tolerance_mm : float
        What was asked for.
    """

    field: DisplacementField
    residual_mm: NDArray[np.float32]
    tolerance_mm: float

    @property
    def converged(self) -> NDArray[np.bool_]:
        """(I, J, K) bool: the nodes at which the map back is within the tolerance; not so where space is folded."""
        return self.residual_mm <= self.tolerance_mm


def invert_field(
    field: DisplacementField, grid: Grid, *, tolerance_mm: float = 0.01, iterations: int = 100
) -> InverseField:
    """The displacement field that undoes another one, by fixed-point iteration at each node.

    As Chen et al., "A simple fixed-point approach to invert a deformation field" (Medical Physics 35, 2008),
    ``v <- -u(p + v)``, with the length of steps fitted for each node to how far the last one led (the relaxation of
    Irons and Tuck, 1969), so that fields converge too that stretch space to more than twice its size. Between the
    nodes the result is interpolated: its error there is not bounded by the tolerance but by the spacing.

    Parameters
    ----------
    field : DisplacementField
        To be undone.
    grid : Grid
        Nodes of the result, in the world ``field`` maps to (which is also the one it maps from). ``field.grid`` will
        do where displacements at its border are small.
    tolerance_mm : float
        Distance at which a node is done; above 0.
    iterations : int
        Steps at most; at least 1. Where a node is not done by then, its best step counts.
    """
    displacement = np.empty((3, *grid.shape), np.float32)
    residual = np.empty(grid.shape, np.float32)
    for slab, points in _slabs(grid):
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
            # How much longer the step should have been, were the field linear: 1 / 2 where it went twice too far.
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
    """The map back from the moving to the fixed world.

    Parameters
    ----------
    transform : Transform
        An :class:`Affine` that is invertible, a :class:`DisplacementField` or a :class:`Chain` of these. Each field is
        undone on its own nodes by :func:`invert_field`; where that does not reach the tolerance, a warning says so.
    tolerance_mm : float
        Of each field at its nodes.
    """
    if isinstance(transform, Affine):
        return transform.inverse()
    if isinstance(transform, Chain):
        return Chain(tuple(invert(stage, tolerance_mm=tolerance_mm) for stage in reversed(transform.stages)))
    if not isinstance(transform, DisplacementField):
        raise TypeError(f"no way to undo a {type(transform).__name__}")
    inverse = invert_field(transform, transform.grid, tolerance_mm=tolerance_mm)
    missed = 1 - float(inverse.converged.mean())
    if missed:
        logger.warning(
            "the displacement field cannot be undone at %.2g%% of its nodes (off by up to %.2g mm): "
            "it folds there, or nearly does",
            100 * missed,
            float(inverse.residual_mm.max()),
        )
    return inverse.field


def stages_of(transform: Transform, view: Grid) -> tuple[DisplacementField | None, DisplacementField | None, Affine]:
    """A transform as what a registration is made of: two displacement fields at most, and a linear map.

    Parameters
    ----------
    transform : Transform
        Linear maps alone, or one or two displacement fields and then linear maps, are taken as they are. Anything
        else (linear maps first, more fields, fields alone) is sampled at the voxels of ``view``: its linear part is
        the linear map nearest to it over the field of view, the field is what is left. At the voxels that is the
        same map to what 32 bits hold; between them it is interpolated.
    view : Grid
        Of the fixed scan.

    Returns
    -------
    local : DisplacementField or None
        The first of two fields; applied first.
    field : DisplacementField or None
        The other or the only one, applied second; None where there is none.
    linear : Affine
        Applied last.

    Raises
    ------
    InputError
        If the linear part presses the field of view flat.
    """
    stages = _flat(transform)
    fields: list[DisplacementField] = []
    for stage in stages:
        if not isinstance(stage, DisplacementField):
            break
        fields.append(stage)
    rest = stages[len(fields) :]
    affines = [stage for stage in rest if isinstance(stage, Affine)]
    if len(fields) <= 2 and len(affines) == len(rest) and (affines or not fields):
        linear = affines[0] if affines else Affine.identity()
        for affine in affines[1:]:
            linear = Affine(affine.matrix @ linear.matrix)
        local, field = [None, None, *fields][-2:]
        return local, field, _invertible(linear)
    # Fields alone too: they may hold the whole motion, and what lies out of view is judged by the linear part.
    linear = _invertible(_nearest_affine(transform, view))
    return None, displacement_on(Chain((transform, linear.inverse())), view), linear


def displacement_on(transform: Transform, grid: Grid) -> DisplacementField:
    """A transform as the displacements at the nodes of a grid; the same map there, interpolated between them."""
    displacement = np.empty((3, *grid.shape), np.float32)
    for slab, points in _slabs(grid):
        moved = transform.map(points) - points
        displacement[:, slab] = moved.T.reshape(3, -1, *grid.shape[1:])
    return DisplacementField(grid, displacement)


def _flat(transform: Transform) -> list[Transform]:
    """The stages of chains within chains, the first applied first."""
    if isinstance(transform, Chain):
        return [stage for part in transform.stages for stage in _flat(part)]
    return [transform]


def _nearest_affine(transform: Transform, view: Grid) -> Affine:
    """The linear map with the least squared distance to a transform over a field of view, outer faces included."""
    axes = [np.linspace(-0.5, n - 0.5, _FIT_POINTS) for n in view.shape]
    points = view.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
    # About the centre: far from the origin the columns would be nearly alike.
    centred = np.column_stack([points - view.centre_mm, np.ones(len(points))])
    solved = np.linalg.lstsq(centred, transform.map(points), rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] = solved[:3].T
    matrix[:3, 3] = solved[3] - solved[:3].T @ view.centre_mm
    return Affine(matrix)


def _invertible(linear: Affine) -> Affine:
    if not linear.is_invertible:
        raise InputError("the linear part of the transform presses space flat; expected a map that can be undone")
    return linear


def resample(
    moving: Volume, onto: Grid, fixed_to_moving: Transform | None = None, *, order: int = 1, outside: float = 0.0
) -> NDArray[np.float32]:
    """Read a moving image at the voxels of another grid.

    Parameters
    ----------
    moving : Volume
        Intensities.
    onto : Grid
        In the fixed world.
    fixed_to_moving : Transform, optional
        Identity if left out.
    order : int
        Of the interpolating spline: 0 nearest, 1 linear, 3 cubic.
    outside : float
        Value of points outside the moving field of view.

    Returns
    -------
    array, of the shape of ``onto``, float32
    """
    result = np.full(onto.shape, outside, np.float32)

    def sample(part: tuple[slice, NDArray[np.float64]]) -> None:
        slab, points = part
        mapped = points if fixed_to_moving is None else fixed_to_moving.map(points)
        ijk = moving.grid.world_to_voxel(mapped)
        inside = ((ijk >= -0.5) & (ijk <= np.array(moving.grid.shape) - 0.5)).all(axis=1)
        values = np.full(len(ijk), outside, np.float32)
        values[inside] = ndimage.map_coordinates(
            moving.data, ijk[inside].T, order=order, mode="nearest", output=np.float32
        )
        result[slab] = values.reshape(result[slab].shape)

    for _ in side_by_side(sample, _slabs(onto)):
        pass
    return result


def warp_labels(
    labels: Volume, values: Sequence[int], onto: Grid, fixed_to_moving: Transform, *, floor: float = 0.01
) -> dict[int, LocalMap]:
    """Warp each structure of a label map as a soft mask, with one linear interpolation.

    Parameters
    ----------
    labels : Volume
        Integer labels in the moving world, at their native resolution.
    values : sequence of int
        Labels wanted.
    onto : Grid
        In the fixed world.
    fixed_to_moving : Transform
        All stages composed.
    floor : float
        Shares below this are cut to 0, which keeps the boxes tight; a hundredth of a voxel decides nothing.

    Returns
    -------
    dict of int to LocalMap
        One entry for each of ``values``. At each voxel the share in [0, 1] of the interpolation weight that
        falls on the structure. Background surrounds the moving field of view: a structure cut off by its
        border fades to 0 over one voxel.
    """
    index_of = np.zeros(int(labels.data.max()) + 1, np.int32)
    wanted = [value for value in values if 0 < value < len(index_of)]
    index_of[wanted] = np.arange(1, len(wanted) + 1)
    shape = np.array(labels.grid.shape)
    # A border of background saves all tests for neighbours outside.
    padded = np.zeros(shape + 2, np.int32)
    padded[1:-1, 1:-1, 1:-1] = index_of[labels.data]
    flat = padded.ravel()
    strides = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    worth_mapping = _near_labels(padded, labels.grid, onto, fixed_to_moving)

    def shares_in(part: tuple[slice, NDArray[np.float64]]) -> dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Of the structures in one slab: voxels, and the share of each."""
        slab, points = part
        chosen = np.flatnonzero(worth_mapping(slab))
        ijk = labels.grid.world_to_voxel(fixed_to_moving.map(points[chosen])) + 1
        near = ((ijk > 0) & (ijk < shape + 1)).all(axis=1)
        kept = np.flatnonzero(near)
        shares: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
        if len(kept):
            base = np.floor(ijk[kept]).astype(np.int64)
            fraction = (ijk[kept] - base).astype(np.float32)
            first = base @ strides
            corners = np.array(list(np.ndindex(2, 2, 2)))
            found = np.stack([flat[first + corner @ strides] for corner in corners])
            weights = np.stack(
                [np.prod(np.where(corner, fraction, 1 - fraction), axis=1, dtype=np.float32) for corner in corners]
            )
            first_voxel = slab.start * onto.shape[1] * onto.shape[2]
            for index in np.unique(found):
                if index:
                    share = (weights * (found == index)).sum(axis=0)
                    hit = share >= floor
                    shares[int(index)] = chosen[kept[hit]] + first_voxel, share[hit]
        return shares

    # Runs of the sparse result: (structure, voxel of the fixed grid, weight).
    pieces: list[list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = [[] for _ in range(len(wanted) + 1)]
    for found_there in side_by_side(shares_in, _slabs(onto)):
        for index, piece in found_there.items():
            pieces[index].append(piece)
    result = {value: LocalMap.empty() for value in values}
    for index, value in enumerate(wanted, start=1):
        if pieces[index]:
            voxels = np.concatenate([piece[0] for piece in pieces[index]])
            shares = np.concatenate([piece[1] for piece in pieces[index]])
            result[value] = _local_map_from_voxels(voxels, shares, onto.shape)
    return result


def warp_labels_by_each(
    labels: Volume, values: Sequence[int], onto: Grid, fits: Sequence[Transform]
) -> dict[int, LocalMap]:
    """Warp each structure by several transforms, and take the mean.

    Parameters
    ----------
    labels, values, onto
        As of :func:`warp_labels`.
    fits : sequence of Transform
        From fixed to moving world, at least one.

    Returns
    -------
    dict of int to LocalMap
        One entry for each of ``values``, in [0, 1].
    """
    first, *others = (warp_labels(labels, values, onto, transform) for transform in fits)
    if not others:
        return first
    return {value: _mean([first[value], *(other[value] for other in others)]) for value in first}


def _mean(maps: Sequence[LocalMap]) -> LocalMap:
    """On the box that holds all maps; what is outside the box of one of them is 0 there."""
    filled = [one for one in maps if not one.is_empty]
    if not filled:
        return LocalMap.empty()
    i, j, k = (min(one.start[axis] for one in filled) for axis in range(3))
    stop = tuple(max(one.stop[axis] for one in filled) for axis in range(3))
    total = np.zeros([last - first for first, last in zip((i, j, k), stop, strict=True)], np.float32)
    for one in filled:
        total[tuple(slice(a - s, b - s) for a, b, s in zip(one.start, one.stop, (i, j, k), strict=True))] += one.values
    total /= len(maps)
    return LocalMap((i, j, k), total)


def _near_labels(
    padded: NDArray[np.int32], grid: Grid, onto: Grid, fixed_to_moving: Transform
) -> Callable[[slice], NDArray[np.bool_]]:
    """Which voxels of the fixed grid can lie in a label: most of a body does not, and need not be mapped.

    The fixed grid is cut into blocks, and only the middle of each is mapped. A block can hold a label if one lies
    within the distances of its mapped middle to those of its neighbours along the three axes: twice as far as its
    corners are, so that what the transform does inside a block is allowed for.

    Parameters
    ----------
    padded : array, (I + 2, J + 2, K + 2) int32
        Labels on ``grid`` with a border of 0.
    grid : Grid
        Of the labels.
    onto : Grid
        The fixed grid.
    fixed_to_moving : Transform

    Returns
    -------
    callable
        From a run of planes of ``onto`` to (N,) bool, for its voxels in C order.
    """
    size = np.maximum(np.rint(_BLOCK_MM / onto.spacing_mm), 1).astype(int)
    blocks = [-(-n // b) for n, b in zip(onto.shape, size, strict=True)]
    nodes = np.stack(np.meshgrid(*[np.arange(-1, n + 1) for n in blocks], indexing="ij"), axis=-1)
    middles = fixed_to_moving.map(onto.voxel_to_world((nodes.reshape(-1, 3) + 0.5) * size - 0.5))
    mapped = middles.reshape(*nodes.shape)
    inner = mapped[1:-1, 1:-1, 1:-1]
    reach_mm = np.zeros(inner.shape[:3])
    for axis in range(3):
        steps = np.linalg.norm(np.diff(mapped, axis=axis), axis=-1)
        along = tuple(slice(None) if n == axis else slice(1, -1) for n in range(3))
        steps = steps[along]
        lower = steps[tuple(slice(-1) if n == axis else slice(None) for n in range(3))]
        upper = steps[tuple(slice(1, None) if n == axis else slice(None) for n in range(3))]
        reach_mm += np.maximum(lower, upper) ** 2
    # Labels are looked up on cells of several voxels, so their distance may be a cell too large.
    cell = np.maximum(np.rint(_BLOCK_MM / 2 / grid.spacing_mm), 1).astype(int)
    cell_mm = cell * grid.spacing_mm
    reach_mm = np.sqrt(reach_mm) + 2 * float(np.linalg.norm(cell_mm))
    # Distances below are taken along the axes of the grid as if they were at right angles: on sheared ones they may
    # come out too large by as much as this.
    reach_mm /= np.linalg.svd(grid.affine[:3, :3] / grid.spacing_mm, compute_uv=False).min()
    occupied = padded[1:-1, 1:-1, 1:-1] > 0
    for axis in range(3):
        starts = np.arange(0, occupied.shape[axis], cell[axis])
        occupied = np.logical_or.reduceat(occupied, starts, axis=axis)
    if not occupied.any():
        return lambda planes: np.zeros((planes.stop - planes.start) * onto.shape[1] * onto.shape[2], bool)
    distance_mm = ndimage.distance_transform_edt(~occupied, cell_mm)
    place = (grid.world_to_voxel(inner.reshape(-1, 3)) + 0.5) / cell - 0.5
    nearest = np.clip(np.rint(place), 0, np.array(occupied.shape) - 1)
    beyond_mm = np.linalg.norm((place - nearest) * cell_mm, axis=1)
    found_mm = distance_mm[tuple(nearest.astype(int).T)]
    # From a point beyond the grid, all of the grid lies behind the point of it that is nearest, at 90 degrees or more.
    holds = (np.hypot(found_mm, beyond_mm) <= reach_mm.ravel()).reshape(inner.shape[:3])
    of_voxel = [np.arange(n) // b for n, b in zip(onto.shape, size, strict=True)]

    def chosen(planes: slice) -> NDArray[np.bool_]:
        voxels: NDArray[np.bool_] = holds[np.ix_(of_voxel[0][planes], of_voxel[1], of_voxel[2])]
        return voxels.ravel()

    return chosen


def _local_map_from_voxels(
    voxels: NDArray[np.int64], values: NDArray[np.float32], shape: tuple[int, int, int]
) -> LocalMap:
    if not len(voxels):
        return LocalMap.empty()
    ijk = np.stack(np.unravel_index(voxels, shape))
    start, stop = ijk.min(axis=1), ijk.max(axis=1) + 1
    box = np.zeros(stop - start, np.float32)
    box[tuple(ijk - start[:, None])] = np.minimum(values, 1)
    return LocalMap((int(start[0]), int(start[1]), int(start[2])), box)


def _slabs(grid: Grid) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Runs of planes along the first axis, and the world points of their voxels in C order."""
    plane = int(np.prod(grid.shape[1:]))
    depth = max(1, _CHUNK_VOXELS // plane)
    jk = np.indices(grid.shape[1:]).reshape(2, -1)
    in_plane = jk.T @ grid.affine[:3, 1:3].T + grid.affine[:3, 3]
    for first in range(0, grid.shape[0], depth):
        last = min(first + depth, grid.shape[0])
        along = np.arange(first, last)[:, None] * grid.affine[:3, 0]
        yield slice(first, last), (along[:, None, :] + in_plane[None]).reshape(-1, 3)


def points_of(voxels: ArrayLike, grid: Grid) -> NDArray[np.float64]:
    """(N, 3) RAS+ mm of the true voxels of a mask on ``grid``."""
    mask: NDArray[Any] = np.asarray(voxels)
    return grid.voxel_to_world(np.argwhere(mask))
