"""Maps between worlds, and sampling through them.

A transform answers one question: where in the moving (atlas) world lies this point of the fixed (query)
world? ``map`` takes and gives RAS+ mm. Images are pulled: the value of a fixed voxel is read in the moving
image at the mapped point, once, whatever the number of stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .geometry import Grid
from .image import LocalMap, Volume

#: Voxels mapped at a time. Bounds the memory of coordinates to about 100 MB whatever the size of the scan.
_CHUNK_VOXELS = 1_000_000


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
        gradient = np.empty((3, 3, *self.grid.shape), np.float32)
        for component in range(3):
            for axis in range(3):
                if self.grid.shape[axis] > 1:
                    gradient[component, axis] = np.gradient(self.displacement_mm[component], axis=axis)
                else:
                    gradient[component, axis] = 0
        # d displacement / d world = d displacement / d voxel * d voxel / d world
        per_mm = np.einsum("cvijk,vw->ijkcw", gradient, self.grid.inverse_affine[:3, :3].astype(np.float32))
        determinant: NDArray[np.float32] = np.linalg.det(per_mm + np.eye(3, dtype=np.float32))
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
    nodes = np.moveaxis(np.indices(grid.shape), 0, -1).reshape(-1, 3)
    points = grid.voxel_to_world(nodes)
    moved = transform.map(points) - points
    field = DisplacementField(grid, np.ascontiguousarray(moved.T.reshape(3, *grid.shape), dtype=np.float32))
    return float((field.jacobian_determinant() <= 0).mean())


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
    for slab, points in _slabs(onto):
        mapped = points if fixed_to_moving is None else fixed_to_moving.map(points)
        ijk = moving.grid.world_to_voxel(mapped)
        inside = ((ijk >= -0.5) & (ijk <= np.array(moving.grid.shape) - 0.5)).all(axis=1)
        values = np.full(len(ijk), outside, np.float32)
        values[inside] = ndimage.map_coordinates(
            moving.data, ijk[inside].T, order=order, mode="nearest", output=np.float32
        )
        result[slab] = values.reshape(result[slab].shape)
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
    # Runs of the sparse result: (structure, voxel of the fixed grid, weight).
    pieces: list[list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = [[] for _ in range(len(wanted) + 1)]
    offset = 0
    for _, points in _slabs(onto):
        ijk = labels.grid.world_to_voxel(fixed_to_moving.map(points)) + 1
        near = ((ijk > 0) & (ijk < shape + 1)).all(axis=1)
        kept = np.flatnonzero(near)
        if len(kept):
            base = np.floor(ijk[kept]).astype(np.int64)
            fraction = (ijk[kept] - base).astype(np.float32)
            first = base @ strides
            corners = np.array(list(np.ndindex(2, 2, 2)))
            found = np.stack([flat[first + corner @ strides] for corner in corners])
            weights = np.stack(
                [np.prod(np.where(corner, fraction, 1 - fraction), axis=1, dtype=np.float32) for corner in corners]
            )
            for index in np.unique(found):
                if index:
                    share = (weights * (found == index)).sum(axis=0)
                    hit = share >= floor
                    pieces[index].append((kept[hit] + offset, share[hit]))
        offset += len(points)
    result = {value: LocalMap.empty() for value in values}
    for index, value in enumerate(wanted, start=1):
        if pieces[index]:
            voxels = np.concatenate([piece[0] for piece in pieces[index]])
            shares = np.concatenate([piece[1] for piece in pieces[index]])
            result[value] = _local_map_from_voxels(voxels, shares, onto.shape)
    return result


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
