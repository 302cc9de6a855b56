"""Branches of vessels beyond a mask: what is as bright, thin and connected belongs to the vessel.

A registered vessel lies a few mm off, more than its own radius, and a branch of another patient farther still. So a
prediction is the trunk from which the branches are followed: voxels of its brightness, dark vessels alike, that touch
it, as far as a registration may err. What is thicker than the vessels, as bone beside them, is left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.image import Volume
from ..core.mask import LocalMap, signed_distance_mm
from ..prompts import INSIDE, crop_mask

#: Distance from the prompt up to which branches are followed, mm: as vesselFM's ``reach_mm``.
_REACH_MM = 10.0
#: Sigma of the Gaussian against noise, mm.
_SIGMA_MM = 0.5
#: Brightness from which on a voxel is a vessel: 0 is the median around the prediction, 1 that inside it.
_LEAST_BRIGHTNESS = 0.62
#: Thicker than so many mean radii of the prompt is no vessel; its blurred border is as wide, mm.
_MOST_RADII, _BORDER_MM = 0.8, 1.0
#: Voxels that share a corner are connected.
_CONNECTIVITY = np.ones((3, 3, 3), bool)


def follow_branches(
    image: Volume, prompted: tuple[NDArray[np.int64], NDArray[np.bool_]], radius_mm: float, found: LocalMap
) -> LocalMap:
    """Add branches to a prediction, in [0, 1] on the scan's grid.

    ``prompted`` is the first voxel (3,) of a box of the scan, and the mask on it, not empty, that was the prompt, whose
    mean radius is ``radius_mm``. Voxels that are added have probabilities from 0.5 to 1 by their brightness.
    """
    spacing_mm = image.grid.spacing_mm
    first, mask = crop_mask(*prompted, np.ceil(_REACH_MM / spacing_mm).astype(np.int64), image.grid.shape)
    start, stop = first.tolist(), (first + mask.shape).tolist()
    probability = found.on_box(start, stop)
    trunk = probability >= INSIDE
    near = signed_distance_mm(mask, spacing_mm, _REACH_MM + 1) > -_REACH_MM
    around = near & ~trunk & ~mask
    if not trunk.any() or not around.any():
        return found
    data = ndimage.gaussian_filter(image.data[tuple(map(slice, start, stop))], _SIGMA_MM / spacing_mm)
    inside, outside = float(np.median(data[trunk])), float(np.median(data[around]))
    if inside == outside:
        return found
    brightness = (data - np.float32(outside)) / np.float32(inside - outside)
    bright = brightness >= _LEAST_BRIGHTNESS
    thickest_mm = _MOST_RADII * radius_mm
    core = signed_distance_mm(bright, spacing_mm, thickest_mm + 1) > thickest_mm
    thick = signed_distance_mm(core, spacing_mm, thickest_mm + _BORDER_MM + 1) > -(thickest_mm + _BORDER_MM)
    parts, _ = ndimage.label(trunk | (near & bright & ~thick), _CONNECTIVITY)
    added = np.isin(parts, np.unique(parts[trunk])) & ~trunk
    level = INSIDE + (1 - INSIDE) * (brightness[added] - _LEAST_BRIGHTNESS) / (1 - _LEAST_BRIGHTNESS)
    probability[added] = level.clip(INSIDE, 1)
    return LocalMap(tuple(start), probability)
