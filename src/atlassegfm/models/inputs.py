"""Checks of what every model is given: the device and the scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.device import resolve_device
from ..core.errors import InputError
from ..core.image import Volume

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """Return the device "cpu" or "cuda"; ModelError if it is not there."""
    import torch

    return torch.device(resolve_device(name))


def intensities(image: Volume) -> NDArray[np.float32]:
    """Return (I, J, K) float32 intensities; InputError if some are NaN or infinite, or all are equal."""
    data = np.asarray(image.data, dtype=np.float32)
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{scan_name(image)}: there are NaN or infinite voxels; expected numbers only: replace them")
    if low == high:
        raise InputError(f"{scan_name(image)}: all voxels have the value {low:g}; expected a scan with contrast")
    return data


def scan_name(image: Volume) -> str:
    """Name a scan in messages."""
    return "the scan" if image.source is None else str(image.source.path)
