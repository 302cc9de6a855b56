"""Signed distances to the border of a mask, and the radius of a structure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def signed_distance_mm(mask: NDArray[np.bool_], spacing_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    """Distance of each voxel's centre to the border of a mask, which runs between voxels.

    Parameters
    ----------
    mask : array, (I, J, K) bool
        The border of the array is none of the mask's.
    spacing_mm : array, (3,)
        Distance in mm between neighbouring voxels along each axis, which are taken to be at right angles.

    Returns
    -------
    array, (I, J, K) float32
        In mm, above 0 inside; infinite everywhere where there is no border.
    """
    if mask.all() or not mask.any():
        return np.where(mask, np.float32(np.inf), np.float32(-np.inf))
    # The transform gives distances between centres; the border lies half a voxel before.
    half_mm = np.float32(spacing_mm.min() / 2)
    inward = ndimage.distance_transform_edt(mask, spacing_mm).astype(np.float32)
    outward = ndimage.distance_transform_edt(~mask, spacing_mm).astype(np.float32)
    signed: NDArray[np.float32] = np.where(mask, inward - half_mm, half_mm - outward)
    return signed


def ball_radius_mm(volume_mm3: float) -> float:
    """Radius in mm of the ball of a volume: how large a structure is, whatever its shape."""
    return float((volume_mm3 * 3 / (4 * math.pi)) ** (1 / 3))
