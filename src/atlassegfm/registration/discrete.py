"""Where everything went, by trying: a search over whole steps in all directions, made smooth step by step.

A gradient follows the slope it stands on; an organ centimetres away is beyond the next hill. Here every control
point looks at all displacements within reach at once, and its own best one and a smooth field are drawn
together (Heinrich, Papiez, Schnabel & Handels, "Non-parametric Discrete Registration with Convex Optimisation",
WBIR 2014; the first stage of Siebert, Hansen & Heinrich, "Fast 3D Registration with Accurate Optimisation and
Little Learning for Learn2Reg 2021"). No labels are needed, as they are for :mod:`.poses`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..core.geometry import Grid
from ..transforms.maps import Affine, Chain, DisplacementField, Transform, displacement_on
from .affine import MISMATCH_PRICE
from .features import box_mean, mind_ssc
from .pyramid import Level, Scan, axes_of, level_grid, on_grid

#: Displacements of so many voxels along each axis, and fewer, are tried: 5 to 6 cm for an abdomen. 2197 in all.
_REACH = 6
#: Voxels between control points, at least.
_LEAST_STRIDE = 2
#: Control points at most; more voxels mean a larger stride. Bounds the table of costs to about 180 MB.
_MOST_POINTS = 20_000
#: Price of foreground that leaves the atlas's field of view, as in the linear stages.
_OUTSIDE_PRICE = 2.0
#: Passes of a mean over 3 x 3 x 3 control points that each displacement's costs are given [authors' code]. They make
#: the match surer and organs less free: a made-up one 5 cm across is found without them alone, one of 7 cm with them.
_PASSES = 2
#: Weights of the squared distance, in control spacings, between a point's own displacement and the smooth field's, one
#: round each [authors' code]; beside costs that are a sum over the 12 channels, as theirs.
_COUPLING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: The same in a first round, about no displacement: a point to which all displacements are alike stays where it is.
_REST = 1e-6
#: Control points whose coupled costs are looked at together, and displacements whose costs are smoothed together, for
#: memory.
_CHUNK_POINTS, _CHUNK_STEPS = 2_048, 64


def search(
    fixed: Scan, moving: Scan, linear: Affine, start: DisplacementField | None, voxels: int, device: str
) -> DisplacementField:
    """Find a smooth displacement among all within reach, by MIND-SSC.

    Every foreground voxel of the query has a price, as in :mod:`.linear`: its MIND-SSC difference where it meets
    foreground, and a fixed one where it meets background or leaves the atlas's field of view. Prices of all 2197
    displacements are kept for the cells of a control grid alone, at most 20 000 of them for any number of voxels: at
    most 176 MB, and beside it the features of both scans (48 bytes a voxel each, three times).

    Parameters
    ----------
    fixed, moving : Scan
        Query and atlas.
    linear : Affine
        Fixed to moving world.
    start : DisplacementField or None
        Found before, in the fixed world and applied before ``linear``; the search begins there.
    voxels : int
        Of the isotropic grid to work on, over the query's field of view.
    device : str
        Where to compute.

    Returns
    -------
    DisplacementField
        In the fixed world, RAS+ mm, to be applied before ``linear``; ``start`` is part of it.
    """
    view = fixed.intensity.grid
    grid = level_grid(view, axes_of(view), voxels)
    stride = _stride(grid)
    shape = np.array([-(-n // stride) for n in grid.shape])
    # Room on all sides, so that what is displaced beyond the query's view is looked up in the atlas all the same.
    wide = _moved_grid(grid, -np.full(3, _REACH), shape * stride + 2 * _REACH, 1)
    with torch.no_grad():
        transform: Transform = linear if start is None else Chain((start, linear))
        steps = _steps(device)
        costs = _costs(on_grid(fixed, wide, device), on_grid(moving, wide, device, transform), steps, stride)
        voxels_moved = _coupled(costs, steps, stride).cpu().numpy()
    world = np.einsum("wv,vijk->wijk", grid.affine[:3, :3], voxels_moved).astype(np.float32)
    found = DisplacementField(_moved_grid(grid, np.full(3, (stride - 1) / 2), shape, stride), world)
    return displacement_on(found if start is None else Chain((found, start)), grid)


def _stride(grid: Grid) -> int:
    """Voxels between control points."""
    stride = _LEAST_STRIDE
    while np.prod([-(-n // stride) for n in grid.shape]) > _MOST_POINTS:
        stride += 1
    return stride


def _moved_grid(grid: Grid, origin: NDArray[np.float64], shape: NDArray[np.int64], stride: int) -> Grid:
    """The grid of another shape whose first voxel is at ``origin``, (3,) voxels, and that takes every so many."""
    affine = grid.affine.copy()
    affine[:3, 3] = grid.voxel_to_world(origin)
    affine[:3, :3] *= stride
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _steps(device: str) -> Tensor:
    """(K, 3) all displacements tried, in voxels."""
    along = torch.arange(-_REACH, _REACH + 1, device=device)
    return torch.cartesian_prod(along, along, along)


def _costs(query: Level, atlas: Level, steps: Tensor, stride: int) -> Tensor:
    """Price of the voxels around every control point after every displacement: means over its cell and its neighbours'.

    Parameters
    ----------
    query, atlas : Level
        On one grid, ``_REACH`` voxels wider on each side than the control grid's cells together.
    steps : Tensor, (K, 3)
        Displacements in voxels.
    stride : int
        Width of a cell, in voxels.

    Returns
    -------
    Tensor, (K, I, J, K') float32
    """
    core = tuple(slice(_REACH, n - _REACH) for n in query.grid.shape)
    features, weight = _features(query)[:, *core].clone(), query.weight[0, 0][core]
    atlas_features, atlas_weight, inside = _features(atlas), atlas.weight[0, 0], atlas.inside[0, 0]
    costs = torch.empty(len(steps), *(n // stride for n in weight.shape), device=weight.device)
    difference = torch.empty_like(features)
    for number, step in enumerate(steps.tolist()):
        there = tuple(slice(_REACH + d, _REACH + d + n) for d, n in zip(step, weight.shape, strict=True))
        torch.sub(features, atlas_features[:, *there], out=difference)
        # Of a voxel's foreground, what meets foreground, meets background and leaves the field of view.
        seen = weight * inside[there]
        both = torch.minimum(seen, atlas_weight[there])
        price = both * difference.square_().sum(dim=0)
        price += MISMATCH_PRICE * (seen - both) + _OUTSIDE_PRICE * (weight - seen)
        costs[number] = F.avg_pool3d(price[None], stride)[0]
    for some in costs.split(_CHUNK_STEPS):
        for _ in range(_PASSES):
            some[:] = box_mean(some[:, None], 1)[:, 0]
    return costs


def _features(level: Level) -> Tensor:
    """(12, I, J, K) MIND-SSC of a level, beyond the field of view that of its nearest voxel repeated.

    Else the border of a field of view would look like that of an organ, and where it runs through the body, the
    borders of two scans would find each other.
    """
    inside = level.inside[0, 0].cpu().numpy() > 0
    image = level.image
    if inside.any() and not inside.all():
        nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
        image = image[:, :, *torch.from_numpy(nearest).long().to(image.device)]
    return mind_ssc(image)[0]


def _coupled(costs: Tensor, steps: Tensor, stride: int) -> Tensor:
    """A smooth field of low cost: each point's best displacement near the smooth field, smoothed, ever nearer.

    Parameters
    ----------
    costs : Tensor, (K, I, J, K')
        Of each displacement at each control point.
    steps : Tensor, (K, 3)
        Displacements in voxels.
    stride : int
        Voxels between control points.

    Returns
    -------
    Tensor, (3, I, J, K')
        In voxels.
    """
    table = costs.flatten(1)
    spacings = steps.float() / stride
    smooth = torch.zeros(3, table.shape[1], device=table.device)
    for weight in (_REST, *_COUPLING):
        best = torch.cat(
            [
                (table[:, chunk] + weight * _squared_distances(spacings, smooth[:, chunk])).argmin(dim=0)
                for chunk in _chunks(table.shape[1])
            ]
        )
        hard = spacings[best].T.reshape(1, 3, *costs.shape[1:])
        smooth = box_mean(hard, 1)[0].flatten(1)
    return (stride * smooth).reshape(3, *costs.shape[1:])


def _chunks(points: int) -> list[slice]:
    return [slice(first, first + _CHUNK_POINTS) for first in range(0, points, _CHUNK_POINTS)]


def _squared_distances(steps: Tensor, places: Tensor) -> Tensor:
    """(K, P) of (K, 3) and (3, P)."""
    total = torch.zeros(len(steps), places.shape[1], device=places.device)
    for axis in range(3):
        total += (steps[:, axis, None] - places[axis]) ** 2
    return total
