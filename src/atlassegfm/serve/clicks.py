"""A click into an error of a mask, answered by the built-in model on a crop around it.

The mask is bent towards the click, most at the click and less around it, and this is the prompt of the model. Its
answer counts near the click alone, and in the click's direction alone: a positive click removes nothing. The sizes were
chosen on Abd-MR with clicks into the middle of the largest error (``benchmarks/clicks.py``).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.image import Volume
from ..core.mask import LocalMap, signed_distance_mm
from ..models.base import Segmenter
from ..prompts import INSIDE, MaskPrompt

Mask = NDArray[np.bool_]

#: Distance from the click to the mask's border beyond which it is not bent further, mm.
_FARTHEST_MM = 20.0
#: How far the border moves at the click, the ball that is surely of the structure, and the sigma of the bend, each in
#: distances from the click to the border; the smallest sigma, mm.
_SHIFT, _BALL, _SIGMA, _LEAST_SIGMA_MM = 1.5, 1.5, 2.0, 12.0
#: Sigmas around the click in which the mask may change; mm around that, and at least, which the model sees.
_REACH, _MARGIN_MM, _LEAST_CROP_MM = 2.0, 12.0, 50.0
#: Voxels that the model sees at most: a second on one core.
_MOST_VOXELS = 1_200_000


class Click(NamedTuple):
    """A voxel that belongs to a structure, or not."""

    ijk: tuple[int, int, int]
    positive: bool


class Patch(NamedTuple):
    """A mask of a structure, (I, J, K) bool, on the box of a scan that begins at voxel ``start``."""

    start: tuple[int, int, int]
    mask: Mask


def answer(model: Segmenter, scan: Volume, mask: Mask, click: Click, earlier: tuple[Click, ...] = ()) -> Patch:
    """Correct the mask of a structure at a click; all else of it stays.

    ``scan`` is in RAS-canonical array order, ``mask`` on its voxels. ``earlier`` clicks stay inside or outside.
    """
    spacing_mm, ijk = scan.grid.spacing_mm, np.array(click.ijk)
    near_mm = _distance_to_border_mm(mask, click, spacing_mm)
    sigma_mm = max(_SIGMA * near_mm, _LEAST_SIGMA_MM)
    radius_mm = max(_REACH * sigma_mm + _MARGIN_MM, _LEAST_CROP_MM)
    first, last = _crop(scan.grid.shape, ijk, radius_mm, spacing_mm)
    box = tuple(map(slice, first, last))
    inside, centre = mask[box], ijk - first
    distance_mm = _distances_mm(inside.shape, centre, spacing_mm)
    # Far from any border a distance says nothing.
    signed_mm = np.nan_to_num(signed_distance_mm(inside, spacing_mm), posinf=radius_mm, neginf=-radius_mm)
    bend_mm = _SHIFT * near_mm * np.exp(-(distance_mm**2) / (2 * sigma_mm**2))
    ball = distance_mm <= _BALL * near_mm
    bent = (signed_mm + bend_mm > 0) | ball if click.positive else (signed_mm - bend_mm > 0) & ~ball
    found = bent
    if bent.any():
        crop = Volume(np.ascontiguousarray(scan.data[box]), scan.grid.crop(first, last))
        prompt = MaskPrompt(LocalMap.from_full(bent.astype(np.float32)))
        found = model.predict(model.encode(crop), {1: prompt})[1].to_full(crop.grid.shape) >= INSIDE
    new = np.where(distance_mm <= _REACH * sigma_mm, found, inside)
    new = new | inside if click.positive else new & inside
    for one in (*earlier, click):
        place = np.array(one.ijk) - first
        if ((place >= 0) & (place < new.shape)).all():
            new[tuple(place)] = one.positive
    parts, _ = ndimage.label(new != inside, np.ones((3, 3, 3)))
    part = parts[tuple(centre)]
    changed = (parts == part) if part else np.zeros_like(new)
    i, j, k = (int(n) for n in first)
    return Patch((i, j, k), np.where(changed, new, inside))


def _distance_to_border_mm(mask: Mask, click: Click, spacing_mm: NDArray[np.float64]) -> float:
    """How deep the click lies in the error: the distance to the nearest voxel that is right, as far as is known."""
    first, last = _crop(mask.shape, np.array(click.ijk), _FARTHEST_MM, spacing_mm)
    part = mask[tuple(map(slice, first, last))]
    right = part if click.positive else ~part
    distances = _distances_mm(part.shape, np.array(click.ijk) - first, spacing_mm)[right]
    return float(min(distances.min(initial=_FARTHEST_MM), _FARTHEST_MM))


def _crop(
    shape: tuple[int, ...], ijk: NDArray[np.int64], radius_mm: float, spacing_mm: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and one past the last voxel within a radius, which is smaller where there would be too many."""
    voxel_mm3 = float(spacing_mm.prod())
    radius_mm = min(radius_mm, (_MOST_VOXELS * voxel_mm3) ** (1 / 3) / 2)
    reach = np.ceil(radius_mm / spacing_mm).astype(np.int64)
    return np.maximum(ijk - reach, 0), np.minimum(ijk + reach + 1, shape)


def _distances_mm(
    shape: tuple[int, ...], centre: NDArray[np.int64], spacing_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(I, J, K) distances to a voxel, axes taken to be at right angles."""
    sides = [((np.arange(n) - c) * s) ** 2 for n, c, s in zip(shape, centre, spacing_mm, strict=True)]
    squared: NDArray[np.float64] = sides[0][:, None, None] + sides[1][None, :, None] + sides[2][None, None, :]
    return np.sqrt(squared)
