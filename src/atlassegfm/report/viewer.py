"""Volumes for the interactive view, reduced to fit into a page: voxels and affine only."""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.geometry import Grid
from ..core.image import Volume, label_positions

#: Percentiles of the scan that the 8 bits of the view cover.
_LOWEST, _HIGHEST = 0.2, 99.9
#: Spacings within this factor are reduced together: voxels stay square in a slice.
_SAME_SPACING = 1.05


@dataclass(frozen=True)
class Reduction:
    """Size of the blocks of voxels that become one, and the reduced shape."""

    factors: tuple[int, int, int]
    shape: tuple[int, int, int]


def reduction(grid: Grid, most_voxels: int) -> Reduction:
    """Choose block sizes that bring a grid below a number of voxels, the finest axes first."""
    factors = np.ones(3, int)
    while np.prod(np.ceil(np.array(grid.shape) / factors)) > most_voxels:
        spacing = np.where(factors < grid.shape, grid.spacing_mm * factors, np.inf)
        factors[spacing <= _SAME_SPACING * spacing.min()] += 1
    i, j, k = factors.tolist()
    x, y, z = (-(-np.array(grid.shape) // factors)).tolist()
    return Reduction((i, j, k), (x, y, z))


def scan_payload(image: Volume, size: Reduction) -> str:
    """Encode block means of the scan with 8 bits as .nii.gz in base64."""
    data = np.asarray(image.data, dtype=np.float32)
    for axis, factor in enumerate(size.factors):
        if factor > 1:
            rest = -data.shape[axis] % factor
            data = np.pad(data, [(0, rest if n == axis else 0) for n in range(3)], mode="edge")
            shape = (*data.shape[:axis], data.shape[axis] // factor, factor, *data.shape[axis + 1 :])
            data = data.reshape(shape).mean(axis=axis + 1, dtype=np.float32)
    step = max(1, int((data.size / 2e6) ** (1 / 3)))
    low, high = np.percentile(data[::step, ::step, ::step], (_LOWEST, _HIGHEST)).tolist()
    slope = (high - low) / 255 if high > low else 1.0
    stored = np.rint(np.clip((data - low) / slope, 0, 255)).astype(np.uint8)
    return _packed(stored, _reduced_grid(image.grid, size), slope, low)


def labels_payload(labels: Volume, values: Sequence[int], size: Reduction) -> str:
    """Encode a label map as .nii.gz in base64, each value replaced by its position in ``values`` from 1."""
    # The middle voxel of each block.
    sides = zip(size.shape, size.factors, labels.data.shape, strict=True)
    middle = [np.minimum(np.arange(blocks) * factor + factor // 2, count - 1) for blocks, factor, count in sides]
    return _packed(label_positions(labels.data[np.ix_(*middle)], values), _reduced_grid(labels.grid, size))


def _reduced_grid(grid: Grid, size: Reduction) -> Grid:
    scale = np.diag((*size.factors, 1.0))
    scale[:3, 3] = (np.array(size.factors) - 1) / 2
    return Grid(size.shape, grid.affine @ scale)


def _packed(data: NDArray[Any], grid: Grid, slope: float = 1.0, intercept: float = 0.0) -> str:
    import nibabel as nib

    # A new header: the scan's may identify the patient.
    image = nib.Nifti1Image(np.ascontiguousarray(data), grid.affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, intercept)
    return base64.b64encode(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)).decode("ascii")
