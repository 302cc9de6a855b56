"""Centrelines of vessel-like masks, and the fraction of them inside another mask (clDice, arXiv 2003.07311).

The skeleton is scikit-image's 3-D thinning (Lee, Kashyap and Chu 1994) on isotropic cells: anisotropic voxels are cut
into cells of the smallest spacing, each with the value of the nearest voxel, which keeps the topology. In a mask too
large for that, a coarser cell is inside if any voxel in it is.

Thinning deletes some tubes of an even width (4 x 4 x N, 2 x 2 x 2). What is left without a centreline is thinned again
on a lattice of half cells: n cells in a row have n centres and n - 1 midpoints, an odd number, which thinning keeps.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from .surface import Mask, Spacing

#: Largest ratio of voxel edges that is thinned without resampling: thinning takes neighbours as equally far.
_MOST_ANISOTROPY = 1.05
#: Most cells of the mask's box: seconds of thinning, and a few hundred MB.
_MOST_CELLS = 1 << 26
#: A cell belongs to the nearest skeleton point up to this many times the point's distance to the outside, plus this
#: many cells: corners of a cube are at sqrt(3) times, and thinning shortens an end by half the width.
_REACH, _REACH_CELLS = 2.0, 2.0
#: Cells looked up at once, to bound the memory of 64-bit coordinates.
_CHUNK = 1 << 20
#: Neighbours of a voxel: 26.
_NEIGHBOURS = np.ones((3, 3, 3))


@dataclass(frozen=True, eq=False)
class Cells:
    """Mask on the lattice it is thinned on."""

    inside: Mask  # (I, J, K) crop that holds the whole mask
    first: tuple[int, ...]  # first cell of the crop on the lattice of the whole image

    def at(self, index: NDArray[np.int64]) -> Mask:
        """(N,) whether each cell ``index``, (N, 3), of the image is inside."""
        place = index - self.first
        within = np.all((place >= 0) & (place < self.inside.shape), axis=1)
        found = np.zeros(len(index), bool)
        found[within] = self.inside[tuple(place[within].T)]
        return found


@dataclass(frozen=True, eq=False)
class Skeleton:
    """Points of a centreline, each midway between two cells of the image, which are equal at the centre of a cell."""

    low: NDArray[np.int64]  # (N, 3)
    high: NDArray[np.int64]  # (N, 3)
    weight: NDArray[np.float64]  # (N,) 1, or 1/2 on half cells, which have twice as many points for the same length
    cell_mm: float | None  # size of the cells; None for voxels
    note: str  # what was done besides thinning; "" for nothing

    def fraction_in(self, cells: Cells) -> float:
        """Compute the fraction of the length inside a mask; a point between cells counts with their fraction inside."""
        corners = [
            cells.at(np.stack([ends[axis][:, axis] for axis in range(3)], axis=1))
            for ends in itertools.product((self.low, self.high), repeat=3)
        ]
        return float((np.mean(corners, axis=0) * self.weight).sum() / self.weight.sum())


def cell_size_mm(shape: tuple[int, ...], spacing_mm: Spacing) -> tuple[float | None, str]:
    """Choose the cell size for a mask's box of ``shape`` voxels: None for the voxels; with a remark on resampling."""
    finest = min(spacing_mm)
    least = float(np.prod(np.array(shape) * spacing_mm) / _MOST_CELLS) ** (1 / 3)
    if least > finest:
        return least, f"resampled to {least:.3g} mm, coarser than the voxels, for the size of the mask"
    if max(spacing_mm) / finest > _MOST_ANISOTROPY:
        return finest, f"resampled to {finest:.3g} mm"
    return None, ""


def make_cells(inside: Mask, first: tuple[int, ...], spacing_mm: Spacing, cell_mm: float | None) -> Cells:
    """Resample a crop from voxel ``first`` of the image on to cells of some size; cell 0 is centred on voxel 0."""
    if cell_mm is None or not inside.size:
        return Cells(inside, first)
    starts = []
    for axis in range(3):
        start, stop, ratio = first[axis], first[axis] + inside.shape[axis], cell_mm / spacing_mm[axis]
        if ratio <= 1:
            cells = np.arange(int((start - 1) / ratio) - 1, int((stop + 1) / ratio) + 2)
            voxel = np.floor(cells * ratio + 0.5).astype(np.int64)
            wanted = (voxel >= start) & (voxel < stop)
            inside, cells = np.take(inside, voxel[wanted] - start, axis=axis), cells[wanted]
        else:
            cells, edges = np.unique(np.floor(np.arange(start, stop) / ratio + 0.5), return_index=True)
            inside = np.logical_or.reduceat(inside, edges, axis=axis)
        starts.append(int(cells[0]))
    return Cells(np.ascontiguousarray(inside), tuple(starts))


def make_skeleton(cells: Cells, cell_mm: float | None, note: str) -> Skeleton:
    """Thin a mask, not empty, to its centreline; the note of :func:`cell_size_mm` gets what plain thinning had lost."""
    thin = np.argwhere(_thin(cells.inside))
    low, high, weight = [thin], [thin], [np.ones(len(thin))]
    lost, whole, stretches = _lost(cells.inside, thin)
    parts, _ = ndimage.label(lost, structure=_NEIGHBOURS)
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        ends, weights = _thin_doubled(parts[box] == number)
        start = [along.start for along in box]
        low.append(ends[0] + start)
        high.append(ends[1] + start)
        weight.append(weights)
    lost_parts = ((whole, "component", "components"), (stretches, "stretch", "stretches"))
    rebuilt = [f"{count} {one if count == 1 else several}" for count, one, several in lost_parts if count]
    notes = [*filter(None, [note]), *(f"skeleton of {what} rebuilt on a doubled lattice" for what in rebuilt)]
    begin, end = (np.concatenate(points) + cells.first for points in (low, high))
    return Skeleton(begin, end, np.concatenate(weight), cell_mm, "; ".join(notes))


def _lost(inside: Mask, thin: NDArray[np.int64]) -> tuple[Mask, int, int]:
    """(I, J, K) cells without a centreline, and the number of whole components and of stretches among them."""
    components, count = ndimage.label(inside, structure=_NEIGHBOURS)
    is_lost = np.arange(count + 1) > 0
    is_lost[components[tuple(thin.T)]] = False
    lost: Mask = is_lost[components]
    whole = int(np.count_nonzero(is_lost))
    del components
    if not len(thin):
        return lost, whole, 0
    # Distance to the outside: to the nearest outer cell that touches the mask, less half a cell.
    border = np.pad(inside, 1)
    border = ndimage.binary_dilation(border, structure=_NEIGHBOURS) & ~border
    depth = cKDTree(np.argwhere(border) - 1).query(thin)[0] - 0.5
    reach = _REACH * depth + _REACH_CELLS
    tree = cKDTree(thin)
    flat = np.flatnonzero(inside & ~lost)
    astray = np.zeros(inside.shape, bool)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        distance, nearest = tree.query(np.stack(np.unravel_index(chunk, inside.shape), axis=1), workers=-1)
        astray.ravel()[chunk] = distance > reach[nearest]
    return lost | astray, whole, ndimage.label(astray, structure=_NEIGHBOURS)[1]


def _thin(inside: Mask) -> Mask:
    from skimage.morphology import skeletonize

    # Named, as scikit-image otherwise takes an array one cell thick for a 2-D image.
    return np.asarray(skeletonize(inside, method="lee") > 0)


def _thin_doubled(part: Mask) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]:
    """Ends, (N, 3) each, and weights, (N,), of the points of a part that thinning has lost."""
    # Half cell p spans the doubled cells p and p + 1, of which both must be inside on all axes.
    half = part
    for axis in range(3):
        doubled = np.moveaxis(np.repeat(half, 2, axis=axis), axis, 0)
        half = np.moveaxis(doubled[:-1] & doubled[1:], 0, axis)
    points = np.argwhere(_thin(np.ascontiguousarray(half)))
    if len(points):
        return (points // 2, (points + 1) // 2), np.full(len(points), 0.5)
    depth = ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1, 1:-1]
    deepest = np.array([np.unravel_index(int(depth.argmax()), part.shape)], np.int64)
    return (deepest, deepest), np.ones(1)
