"""Gaussian smoothing of fused masks, as strong for each structure as simulated errors on the atlas suggest.

A model that goes by appearance draws ragged borders where a structure hardly stands out. How smooth a structure really
is, the atlas shows: the sigma, a fraction of the structure's radius, is the best one on its simulated masks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..core.gaussian import gaussian
from ..core.geometry import Grid
from ..core.mask import LocalMap, ball_radius_mm, bounding_box
from ..core.overlap import dice
from ..prompts import INSIDE
from .correction_features import block_strides

Array = NDArray[np.float32]
#: Sigmas tried on simulated masks, as fractions of the radius of a ball of the structure's volume.
_TRIED_SIGMAS = (0.0, 0.03, 0.06)
#: Sigma used where one of these was best: larger, as real errors are larger than simulated ones.
_USED_SIGMAS = (0.0, 0.04, 0.08)
#: Upper limit of sigma, mm: structures of more than 100 mm radius were not measured.
_MAX_SIGMA_MM = 8.0
#: The Gaussian is cut off at this many sigmas.
_TRUNCATE = 3.0


def smooth(mask: LocalMap, sigma_mm: float, grid: Grid) -> LocalMap:
    """Smooth a mask, in [0, 1], by a Gaussian of a sigma in mm; 0 leaves it as it is.

    The result is float32 in [0, 1], on a box larger by 3 sigmas. Beyond the border of the scan's grid the mask goes on
    as at the border.
    """
    if sigma_mm <= 0 or not mask.values.size:
        return mask
    margin = np.ceil(_TRUNCATE * sigma_mm / grid.spacing_mm).astype(int)
    start = tuple(np.maximum(mask.start - margin, 0).tolist())
    stop = np.minimum(mask.stop + margin, grid.shape).tolist()
    return LocalMap(start, _gaussian(mask.on_box(start, stop), sigma_mm, grid.spacing_mm))


def smoothing_sigma_mm(fraction: float, mask: LocalMap, grid: Grid) -> float:
    """Convert a sigma from a fraction of the radius of a ball of the mask's volume to mm: at most 8, 0 if empty."""
    volume_mm3 = np.count_nonzero(mask.values >= INSIDE) * grid.voxel_volume_mm3
    return min(fraction * ball_radius_mm(volume_mm3), _MAX_SIGMA_MM)


def best_smoothing(trials: Iterable[tuple[LocalMap, LocalMap]], grid: Grid) -> float:
    """Choose the sigma of one structure, as a fraction of its radius: 0, 0.04 or 0.08.

    ``trials`` are unsmoothed masks in [0, 1], each with its truth, 0 or 1, on ``grid``. The sigma is 0 without trials,
    or where smoothing does not raise the mean Dice.
    """
    scores = np.zeros(len(_TRIED_SIGMAS))
    for mask, truth in trials:
        if not mask.values.size or truth.is_empty:
            continue
        start, stop = bounding_box((mask, truth))
        strides = block_strides(np.subtract(stop, start), grid.spacing_mm)
        coarse = tuple(slice(None, None, stride) for stride in strides)
        values, inside = (one.on_box(start, stop)[coarse] for one in (mask, truth))
        for n, fraction in enumerate(_TRIED_SIGMAS):
            sigma_mm = smoothing_sigma_mm(fraction, truth, grid)
            found = _gaussian(values, sigma_mm, grid.spacing_mm * strides) if sigma_mm else values
            scores[n] += dice(found >= INSIDE, inside >= INSIDE)
    return _USED_SIGMAS[int(np.argmax(scores))]  # the first of equal ones


def _gaussian(values: Array, sigma_mm: float, spacing_mm: NDArray[np.float64]) -> Array:
    smoothed = gaussian(values, sigma_mm / spacing_mm, beyond="nearest", truncate=_TRUNCATE)
    return np.clip(smoothed, 0, 1, out=smoothed)  # rounding may leave the range
