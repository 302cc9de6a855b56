"""Images and labels sampled through a transform."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.geometry import Grid
from ..core.image import Volume
from ..core.mask import LocalMap, bounding_box
from ..core.parallel import parallel_map
from .maps import Transform, slabs

#: Edge in mm of the blocks skipped where no label is near: about the node spacing of the finest field.
_BLOCK_MM = 8.0
#: Voxels in order of the structure, as indices into the flat array; their structures, from 1 on; and weights.
_Weights = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]


def resample(
    moving: Volume, onto: Grid, fixed_to_moving: Transform | None = None, *, order: int = 1, outside: float = 0.0
) -> NDArray[np.float32]:
    """Resample a moving image at the voxels of a grid in the fixed world: float32, of the shape of the grid.

    ``order`` is that of the interpolating spline: 0 nearest, 1 linear, 3 cubic. Points outside the moving field of view
    get the value ``outside``. Without a transform the two worlds are the same.
    """
    from . import kernels

    result = np.full(onto.shape, outside, np.float32)
    data = np.ascontiguousarray(moving.data, dtype=np.float32) if order == 1 else moving.data

    def sample(part: tuple[slice, NDArray[np.float64]]) -> None:
        slab, points = part
        points = points if fixed_to_moving is None else fixed_to_moving.map(points)
        if order == 1:
            points = np.ascontiguousarray(points, dtype=np.float64)
            kernels.sample_linear(data, points, moving.grid.inverse_affine, result[slab].reshape(-1))
            return
        ijk = moving.grid.world_to_voxel(points)
        inside = ((ijk >= -0.5) & (ijk <= np.array(moving.grid.shape) - 0.5)).all(axis=1)
        values = ndimage.map_coordinates(moving.data, ijk[inside].T, order=order, mode="nearest", output=np.float32)
        result[slab][inside.reshape(result[slab].shape)] = values

    for _ in parallel_map(sample, slabs(onto)):
        pass
    return result


def warp_labels(
    labels: Volume,
    values: Sequence[int],
    onto: Grid,
    transforms: Transform | Sequence[Transform],
    *,
    floor: float = 0.01,
) -> dict[int, LocalMap]:
    """Warp the structures ``values`` of a label map in the moving world as soft masks, with one linear interpolation.

    ``onto`` is in the fixed world; the masks of several ``transforms``, fixed to moving world, are averaged. The value
    of a mask is the interpolation weight of the structure, in [0, 1]; weights of one transform below ``floor`` are set
    to 0, which keeps the boxes tight. Background surrounds the moving field of view: a structure cut off by its border
    fades to 0 over one voxel.
    """
    members = transforms if isinstance(transforms, Sequence) else (transforms,)
    warped = [_warp_labels(labels, values, onto, one, floor) for one in members]
    return {value: _mean([one[value] for one in warped]) for value in values} if len(warped) > 1 else warped[0]


def _warp_labels(
    labels: Volume, values: Sequence[int], onto: Grid, fixed_to_moving: Transform, floor: float
) -> dict[int, LocalMap]:
    from . import kernels

    index_of = np.zeros(int(labels.data.max()) + 1, np.int32)
    wanted = [value for value in values if 0 < value < len(index_of)]
    index_of[wanted] = np.arange(1, len(wanted) + 1)
    shape = np.array(labels.grid.shape)
    padded = np.pad(index_of[labels.data], 1)  # a border of background saves all tests for neighbours outside
    worth_mapping = _near_labels(padded, labels.grid, onto, fixed_to_moving)

    def weights_in(part: tuple[slice, NDArray[np.float64]]) -> _Weights:
        """Compute voxels and interpolation weights of the structures in one slab, in one pass over it."""
        slab, points = part
        chosen = np.flatnonzero(worth_mapping(slab))
        ijk = labels.grid.world_to_voxel(fixed_to_moving.map(points[chosen])) + 1
        kept = ((ijk > 0) & (ijk < shape + 1)).all(axis=1)
        ijk, voxels = ijk[kept], chosen[kept] + slab.start * onto.shape[1] * onto.shape[2]
        most = 8 * len(ijk)
        found = np.empty(most, np.int64), np.empty(most, np.int32), np.empty(most, np.float32)
        count = kernels.label_weights(padded, np.ascontiguousarray(ijk), floor, found)
        at, index, weight = found
        order = np.argsort(index[:count], kind="stable")
        return voxels[at[order]], index[order], weight[order]

    runs: dict[int, list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = {value: [] for value in values}
    for voxels, index, weight in parallel_map(weights_in, slabs(onto)):
        first = np.flatnonzero(np.diff(index, prepend=0))
        for begin, end in pairwise((*first.tolist(), len(index))):
            runs[wanted[index[begin] - 1]].append((voxels[begin:end], weight[begin:end]))
    return {value: _local_map_from_voxels(found, onto.shape) for value, found in runs.items()}


def _mean(maps: Sequence[LocalMap]) -> LocalMap:
    """On the box that holds all maps."""
    start, stop = bounding_box(maps)
    total = np.zeros(np.subtract(stop, start), np.float32)
    for one in maps:
        total += one.on_box(start, stop)
    total /= len(maps)
    return LocalMap(start, total)


def _near_labels(
    padded: NDArray[np.int32], grid: Grid, onto: Grid, fixed_to_moving: Transform
) -> Callable[[slice], NDArray[np.bool_]]:
    """Find the voxels of the fixed grid that can lie in a label; the others need not be mapped.

    Of each block of the fixed grid only the middle is mapped. A block can hold a label if one lies within the distances
    of its mapped middle to those of its neighbours along the three axes: twice as far as its corners are.

    ``padded`` are the labels on ``grid`` with a border of 0. The result takes a run of planes of ``onto`` and gives
    (N,) bool for its voxels in C order.
    """
    size = np.maximum(np.rint(_BLOCK_MM / onto.spacing_mm), 1).astype(int)
    blocks = [-(-n // b) for n, b in zip(onto.shape, size, strict=True)]
    nodes = np.stack(np.meshgrid(*[np.arange(-1, n + 1) for n in blocks], indexing="ij"), axis=-1)
    middles = fixed_to_moving.map(onto.voxel_to_world((nodes.reshape(-1, 3) + 0.5) * size - 0.5))
    mapped = middles.reshape(nodes.shape)
    inner = mapped[1:-1, 1:-1, 1:-1]
    reach_mm = np.zeros(inner.shape[:3])
    for axis in range(3):
        steps = np.linalg.norm(np.diff(mapped, axis=axis), axis=-1).swapaxes(0, axis)[:, 1:-1, 1:-1]
        reach_mm += np.maximum(steps[:-1], steps[1:]).swapaxes(0, axis) ** 2
    # Labels are looked up on cells of several voxels, so their distance may be a cell too large.
    cell = np.maximum(np.rint(_BLOCK_MM / 2 / grid.spacing_mm), 1).astype(int)
    cell_mm = cell * grid.spacing_mm
    reach_mm = np.sqrt(reach_mm) + 2 * float(np.linalg.norm(cell_mm))
    # Distances below take the axes for right-angled: on sheared ones they may come out too large by as much as this.
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
    return lambda planes: holds[np.ix_(of_voxel[0][planes], of_voxel[1], of_voxel[2])].ravel()


def _local_map_from_voxels(
    pieces: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], shape: tuple[int, int, int]
) -> LocalMap:
    """A map from runs of voxels, as indices into the flat array of a shape, and of their values."""
    if not any(len(voxels) for voxels, _ in pieces):
        return LocalMap.empty()
    voxels, values = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    ijk = np.stack(np.unravel_index(voxels, shape))
    start, stop = ijk.min(axis=1), ijk.max(axis=1) + 1
    box = np.zeros(stop - start, np.float32)
    box[tuple(ijk - start[:, None])] = np.minimum(values, 1)
    return LocalMap(tuple(start.tolist()), box)
