"""A click into an error of a mask, answered by the built-in model on a crop around it.

The mask is bent towards the click, most at the click and less around it, and this is the prompt of the model. Its
answer counts near the click alone, and in the click's direction alone: a positive click removes nothing. Only a mask
that lies elsewhere is moved to the click as a whole, where its inside resembles the click and its surroundings do not.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

from ..core.image import Volume
from ..core.mask import LocalMap, signed_distance_mm
from ..models.base import Segmenter
from ..prompts import INSIDE, MaskPrompt

Mask = NDArray[np.bool_]

#: Distance from the click to the mask's border beyond which it is not bent further, and may lie elsewhere, mm.
_FARTHEST_MM = 20.0
#: How far the border moves at the click, the ball that is surely of the structure, and the sigma of the bend, each in
#: distances from the click to the border; the smallest sigma, mm.
_SHIFT, _BALL, _SIGMA, _LEAST_SIGMA_MM = 1.5, 1.5, 2.0, 12.0
#: Distances from the click to the border by which the model may go beyond the bend; the smallest of these, mm.
_BEYOND, _LEAST_NEAR_MM = 0.5, 3.0
#: Sigmas around the click in which the mask may change; mm around that, and at least, which the model sees.
_REACH, _MARGIN_MM, _LEAST_CROP_MM = 2.0, 12.0, 50.0
#: Voxels that the model sees at most: a second on one core.
_MOST_VOXELS = 1_200_000
#: Distance between the places at which a mask that lies elsewhere is tried, its surroundings, and the ball around the
#: click whose intensities it is compared with, mm.
_TRY_MM, _SHELL_MM, _SEED_MM = 5.0, 8.0, 6.0
#: Smallest standard deviation of these, as a fraction of the scan's range; deviations at which similarity is 0.61.
_LEAST_DEVIATION, _DEVIATIONS = 0.06, 1.5
#: What a click in the middle of the mask counts beside similarity, and by how much a move has to be better.
_MIDDLE, _BETTER = 0.1, 0.1


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
    known = any(one.positive for one in earlier)
    far = click.positive and not known and near_mm >= _FARTHEST_MM
    if far and (elsewhere := _moved(scan, mask, click)) is not None:
        return _refined(model, scan, mask, elsewhere, (*earlier, click))
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
    found = _predicted(model, scan, bent, first) if bent.any() else bent
    widest_mm = bend_mm + _BEYOND * max(near_mm, _LEAST_NEAR_MM)
    reached = distance_mm <= _REACH * sigma_mm
    if click.positive:
        new = inside | (reached & found & (signed_mm + widest_mm > 0))
    else:
        new = inside & (~reached | found | (signed_mm - widest_mm > 0))
    _hold(new, first, (*earlier, click))
    parts, _ = ndimage.label(new != inside, np.ones((3, 3, 3)))
    part = parts[tuple(centre)]
    changed = (parts == part) if part else np.zeros_like(new)
    i, j, k = (int(n) for n in first)
    return Patch((i, j, k), np.where(changed, new, inside))


def _predicted(model: Segmenter, scan: Volume, mask: Mask, first: NDArray[np.int64]) -> Mask:
    """Prompt the model with a mask on the box of the scan that begins at voxel ``first``; it sees no more than that."""
    last = first + mask.shape
    crop = Volume(np.ascontiguousarray(scan.data[tuple(map(slice, first, last))]), scan.grid.crop(first, last))
    prompt = MaskPrompt(LocalMap.from_full(mask.astype(np.float32)))
    found: Mask = model.predict(model.encode(crop), {1: prompt})[1].to_full(crop.grid.shape) >= INSIDE
    return found


def _hold(mask: Mask, first: NDArray[np.int64], clicks: tuple[Click, ...]) -> None:
    """Put what clicks say into a mask on the box that begins at voxel ``first``."""
    for one in clicks:
        place = np.array(one.ijk) - first
        if ((place >= 0) & (place < mask.shape)).all():
            mask[tuple(place)] = one.positive


def _moved(scan: Volume, mask: Mask, click: Click) -> Mask | None:
    """Move a mask that lies elsewhere over the click; None if it lies as well as it is.

    Of all moves that put the click inside, the best has most similar voxels inside and fewest around, and the click
    deep inside.
    """
    spacing_mm, ijk = scan.grid.spacing_mm, np.array(click.ijk)
    step = np.maximum(np.rint(_TRY_MM / spacing_mm).astype(np.int64), 1)
    # Every few voxels are enough, the click among them.
    every = tuple(slice(int(c % s), None, int(s)) for c, s in zip(ijk, step, strict=True))
    whole = LocalMap.from_full(mask[every])
    if whole.is_empty:
        return None
    margin = np.ceil(_SHELL_MM / (step * spacing_mm)).astype(np.int64)
    own = np.pad(whole.values > 0, [(n, n) for n in margin])
    depth_mm = signed_distance_mm(own, step * spacing_mm)
    first, last = _crop(mask.shape, ijk, _SEED_MM, spacing_mm)
    seed = scan.data[tuple(map(slice, first, last))]
    seed = seed[_distances_mm(seed.shape, ijk - first, spacing_mm) <= max(_SEED_MM, float(spacing_mm.min()))]
    data = scan.data[every]
    low, high = np.percentile(data, (0.5, 99.5))
    deviation = max(float(seed.std()), _LEAST_DEVIATION * float(high - low))
    similar = np.exp(-(((data - np.median(seed)) / (_DEVIATIONS * deviation)) ** 2) / 2)
    shell = (depth_mm <= 0) & (depth_mm > -_SHELL_MM)
    weights = own / own.sum() - shell / shell.sum()
    # Index n - 1 + first voxel of the weights, n being their shape; outside the scan all counts as similar.
    evidence = signal.fftconvolve(similar - 1, weights[::-1, ::-1, ::-1])
    end = np.array(own.shape) - 1
    places, origin = np.argwhere(own), np.array(whole.start) - margin
    found = evidence[tuple((ijk // step - places + end).T)]
    best = int((found + _MIDDLE * depth_mm[own] / depth_mm.max()).argmax())
    if found[best] < max(evidence[tuple(origin + end)], 0) + _BETTER:
        return None
    voxels = np.argwhere(mask) + (ijk // step - places[best] - origin) * step
    out = np.zeros_like(mask)
    out[tuple(voxels[((voxels >= 0) & (voxels < mask.shape)).all(axis=1)].T)] = True
    return out


def _refined(model: Segmenter, scan: Volume, old: Mask, new: Mask, clicks: tuple[Click, ...]) -> Patch:
    """Let the model find a structure from a mask in another place than the old one."""
    margin = np.ceil(_MARGIN_MM / scan.grid.spacing_mm).astype(np.int64)
    part = LocalMap.from_full(old | new)
    first = np.maximum(part.start - margin, 0)
    box = tuple(map(slice, first, np.minimum(part.stop + margin, old.shape)))
    found = _predicted(model, scan, new[box], first)
    _hold(found, first, clicks)
    i, j, k = (int(n) for n in first)
    return Patch((i, j, k), found)


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
