"""Maps between worlds, and sampling through them.

A transform answers one question: where in the moving (atlas) world lies this point of the fixed (query) world?
``map`` takes and gives RAS+ mm. Images are pulled: the value of a fixed voxel is read in the moving image at the mapped
point, once, whatever the number of stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.geometry import Grid

#: Voxels mapped at a time in one thread. Bounds the memory of coordinates to about 100 MB whatever the scan's size.
_CHUNK_VOXELS = 250_000
#: Points along each axis of a field of view at which a transform is tried, or a linear part fitted to it.
_VIEW_POINTS = 16
#: Matrices count as singular if they stretch one direction less than this fraction of another; anatomies need 1 / 3.
_SMALLEST_STRETCH = 1e-4


class Transform(Protocol):
    """A map from fixed world to moving world."""

    def map(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) RAS+ mm in the fixed world to (N, 3) RAS+ mm in the moving world."""


@dataclass(frozen=True, eq=False)
class Affine:
    """A linear map: a homogeneous (4, 4) matrix from RAS+ mm of the fixed world to RAS+ mm of the moving world."""

    matrix: NDArray[np.float64]

    @classmethod
    def identity(cls) -> Affine:
        """Make the map that moves nothing."""
        return cls(np.eye(4))

    def map(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) RAS+ mm to (N, 3) RAS+ mm."""
        return points_mm @ self.matrix[:3, :3].T + self.matrix[:3, 3]

    def inverse(self) -> Affine:
        """Invert the map."""
        return Affine(np.linalg.inv(self.matrix).astype(np.float64))

    @property
    def is_invertible(self) -> bool:
        """Whether all numbers are finite, and no direction is pressed flat."""
        if not np.isfinite(self.matrix).all():
            return False
        stretches = np.linalg.svd(self.matrix[:3, :3], compute_uv=False)
        return bool(stretches[-1] > _SMALLEST_STRETCH * stretches[0])


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """A map that adds a displacement, linearly interpolated between the nodes of a grid.

    The nodes of ``grid`` lie in the fixed world; ``displacement_mm``, (3, I, J, K) float32, is x, y, z there, RAS+ mm.
    Outside the grid the displacement of the nearest border point holds on, so that the map stays continuous.
    """

    grid: Grid
    displacement_mm: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.displacement_mm.shape != (3, *self.grid.shape):
            raise ValueError(f"field of shape {self.displacement_mm.shape} on a grid of shape {self.grid.shape}")

    def map(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) RAS+ mm to (N, 3) RAS+ mm."""
        from . import kernels

        points_mm = np.ascontiguousarray(points_mm, dtype=np.float64)
        moved = np.empty_like(points_mm)
        field = np.ascontiguousarray(self.displacement_mm)
        kernels.displace(points_mm, field, self.grid.inverse_affine, moved)
        return moved

    def jacobian_determinant(self) -> NDArray[np.float32]:
        """(I, J, K) float32: local change of volume at the nodes; 0 or less where space is folded."""
        determinant = np.empty(self.grid.shape, np.float32)
        # d displacement / d world = d displacement / d voxel * d voxel / d world
        per_mm = self.grid.inverse_affine[:3, :3].astype(np.float32)
        for planes in _slabs_of(self.grid):
            # One plane more on each side, for central differences.
            low = max(planes.start - 1, 0)
            slab = self.displacement_mm[:, low : planes.stop + 1]
            gradient = np.zeros((3, *slab.shape), np.float32)
            for axis, along in enumerate(gradient, start=1):
                if slab.shape[axis] > 1:
                    along[:] = np.gradient(slab, axis=axis)
            gradient = gradient[:, :, planes.start - low : planes.stop - low]
            change = np.einsum("vcijk,vw->ijkcw", gradient, per_mm)
            determinant[planes] = np.linalg.det(change + np.eye(3, dtype=np.float32))
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


def stages_of(transform: Transform, view: Grid) -> tuple[DisplacementField | None, DisplacementField | None, Affine]:
    """Split a transform into at most two displacement fields, applied first and second, and a linear map, applied last.

    Linear maps alone, or one or two displacement fields and then linear maps, are taken as they are; a single field is
    the second. Anything else (linear maps first, more fields, fields alone) is sampled at the voxels of ``view``, the
    grid of the fixed scan: its linear part is the linear map nearest to it over the field of view, the field is what is
    left. At the voxels the map is the same in float32; between them it is interpolated. InputError if the linear part
    presses the field of view flat.
    """
    stages = _flat(transform)
    fields = [stage for stage in stages if isinstance(stage, DisplacementField)]
    affines = [stage for stage in stages if isinstance(stage, Affine)]
    if len(fields) <= 2 and stages == [*fields, *affines] and (affines or not fields):
        linear = affines[0] if affines else Affine.identity()
        for affine in affines[1:]:
            linear = Affine(affine.matrix @ linear.matrix)
        local, field = [None, None, *fields][-2:]
        return local, field, _invertible(linear)
    # Fields alone too: they may hold the whole motion, and what lies out of view is judged by the linear part.
    linear = _invertible(_nearest_affine(transform, view))
    return None, displacement_on(Chain((transform, linear.inverse())), view), linear


def field_from_voxels(grid: Grid, voxels: NDArray[np.float32]) -> DisplacementField:
    """Make a field of displacements in voxels of its grid, (3, I, J, K)."""
    world = np.einsum("wv,vijk->wijk", grid.affine[:3, :3], voxels)
    return DisplacementField(grid, world.astype(np.float32))


def displacement_on(transform: Transform, grid: Grid) -> DisplacementField:
    """Sample a transform as displacements at the nodes of a grid: identical there, interpolated between them."""
    displacement = np.empty((3, *grid.shape), np.float32)
    for slab, points in slabs(grid):
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
    points = points_over(view)
    # About the centre: far from the origin the problem is ill-conditioned.
    centred = np.column_stack([points - view.centre_mm, np.ones(len(points))])
    solved = np.linalg.lstsq(centred, transform.map(points), rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] = solved[:3].T
    matrix[:3, 3] = solved[3] - solved[:3].T @ view.centre_mm
    return Affine(matrix)


def points_over(view: Grid) -> NDArray[np.float64]:
    """(4096, 3) points, RAS+ mm, spread evenly over a field of view, outer faces included."""
    axes = [np.linspace(-0.5, n - 0.5, _VIEW_POINTS) for n in view.shape]
    return view.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))


def _invertible(linear: Affine) -> Affine:
    if not linear.is_invertible:
        raise InputError("the linear part of the transform presses space flat; expected a map that can be undone")
    return linear


def slabs(grid: Grid) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Runs of planes along the first axis, and the world points of their voxels in C order."""
    jk = np.indices(grid.shape[1:]).reshape(2, -1)
    in_plane = jk.T @ grid.affine[:3, 1:3].T + grid.affine[:3, 3]
    for planes in _slabs_of(grid):
        along = np.arange(planes.start, planes.stop)[:, None] * grid.affine[:3, 0]
        yield planes, (along[:, None, :] + in_plane[None]).reshape(-1, 3)


def _slabs_of(grid: Grid) -> Iterator[slice]:
    depth = max(1, _CHUNK_VOXELS // (grid.shape[1] * grid.shape[2]))
    for first in range(0, grid.shape[0], depth):
        yield slice(first, min(first + depth, grid.shape[0]))
