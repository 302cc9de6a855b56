"""Gaussian smoothing of boxes of voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .compiled import in_slabs


def gaussian(
    values: NDArray[Any], sigma: ArrayLike, *, beyond: Literal["mirror", "nearest"] = "mirror", truncate: float = 4.0
) -> NDArray[np.float32]:
    """Smooth (I, J, K) by a Gaussian of a sigma in voxels, one for each axis, cut off at ``truncate`` sigmas; float32.

    Beyond the border the values are mirrored, or go on as at the border.
    """
    from . import kernels

    values = np.ascontiguousarray(values, dtype=np.float32)
    result = np.empty_like(values)
    sigmas: Sequence[float] = np.broadcast_to(sigma, 3).tolist()
    weights, sources = [], []
    for one, count in zip(sigmas, values.shape, strict=True):
        radius = int(truncate * one + 0.5)
        window = np.exp(-0.5 * (np.arange(radius + 1) / max(one, 1e-9)) ** 2)
        weights.append(window / (2 * window.sum() - 1))
        sources.append(np.pad(np.arange(count), radius, "symmetric" if beyond == "mirror" else "edge"))
    in_slabs(
        lambda *part: kernels.smooth(values, tuple(weights), tuple(sources), result, *part), len(values), values.size
    )
    return result
