"""Features of the voxels near a structure's border, the input of the correction network.

No feature is absolute: intensities are in standard deviations of what lies inside and around the mask, distances in
expected errors of the border. What is learned on one scan therefore holds on the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logit

from ..core.compiled import in_slabs
from ..core.gaussian import gaussian
from ..core.image import Volume
from ..core.mask import LocalMap, ball_radius_mm, signed_distance_mm
from ..prompts import INSIDE

#: float32; the stubs of numpy do not keep the type.
Array = NDArray[Any]
#: Expected error of a border: this fraction of the radius of a ball of the structure's volume, within these limits.
_ERROR_PER_RADIUS, _MIN_ERROR_MM, _MAX_ERROR_MM = 0.2, 1.0, 6.0
#: Half widths of the corrected band around the border of the warped atlas and of the mask, in expected errors.
_ATLAS_BAND, _MASK_BAND = 3.0, 2.0
#: Distances are clipped to this many expected errors.
_MAX_DISTANCE = 9.0
#: Margin around both masks in which features are computed, mm.
_MARGIN_MM = 6.0
#: Boxes of more voxels are downsampled.
_MAX_VOXELS = 1_000_000
#: Sigmas of the Gaussian smoothing of the image, mm, and the one at which its gradient is taken.
_IMAGE_SIGMAS_MM, _GRADIENT_SIGMA_MM = (0.0, 1.5, 4.0), 1.5
#: Probabilities are clipped to this and its complement before their log-odds are taken.
_MIN_PROBABILITY = 0.01
#: Lower limit of the contrast between inside and outside, as a fraction of the intensity range.
_MIN_CONTRAST = 0.05


@dataclass(frozen=True, eq=False)
class BorderFeatures:
    """Features of one structure near its border.

    ``start`` and ``stop`` are the box on the scan's grid, ``strides`` its downsampling along each axis, ``band`` the N
    voxels of the downsampled box near a border, (A, B, C) bool; ``values`` are (N, F) float32.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    strides: tuple[int, int, int]
    band: NDArray[np.bool_]
    values: Array


def border_features(
    image: Volume, number: int, atlas: LocalMap, masks: Mapping[int, LocalMap]
) -> BorderFeatures | None:
    """Compute the features of the voxels near the border of one structure; None if it has no border.

    ``atlas`` is its warped mask on the scan's grid, ``masks`` are the fused masks of all structures by number, all in
    [0, 1].
    """
    mask = masks[number]
    if not (mask.values >= INSIDE).any() or not (atlas.values >= INSIDE).any():
        return None
    grid = image.grid
    margin = np.ceil(_MARGIN_MM / grid.spacing_mm).astype(int)
    start = tuple(np.maximum(np.minimum(atlas.start, mask.start) - margin, 0).tolist())
    stop = tuple(np.minimum(np.maximum(atlas.stop, mask.stop) + margin, grid.shape).tolist())
    box = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
    strides = block_strides(np.subtract(stop, start), grid.spacing_mm)
    spacing_mm = grid.spacing_mm * strides

    def on_blocks(values: LocalMap) -> Array:
        return downsample(values.on_box(start, stop), strides)

    warped, own = on_blocks(atlas), on_blocks(mask)
    highest = np.zeros(np.subtract(stop, start), np.float32)
    for other, values in masks.items():
        first, last = np.maximum(start, values.start), np.minimum(stop, values.stop)
        if other != number and (first < last).all():
            part = highest[tuple(map(slice, first - start, last - start))]
            np.maximum(part, values.values[tuple(map(slice, first - values.start, last - values.start))], out=part)
    others = downsample(highest, strides)
    inside_atlas, inside = warped >= INSIDE, own >= INSIDE
    if not inside_atlas.any() or not inside.any():
        return None
    radius_mm = ball_radius_mm(np.count_nonzero(inside_atlas) * spacing_mm.prod())
    error_mm = min(max(_ERROR_PER_RADIUS * radius_mm, _MIN_ERROR_MM, float(spacing_mm.min()) / 2), _MAX_ERROR_MM)
    limit_mm = _MAX_DISTANCE * error_mm
    to_atlas, to_mask = (signed_distance_mm(one, spacing_mm, limit_mm) / error_mm for one in (inside_atlas, inside))
    band = (np.abs(to_atlas) < _ATLAS_BAND) | (np.abs(to_mask) < _MASK_BAND)
    if not band.any():
        return None
    near = to_atlas > -_ATLAS_BAND - 1
    scan = downsample(np.asarray(image.data[box], np.float32), strides)
    view = _View(scan, warped, own, others, to_atlas, to_mask, band, near, spacing_mm, error_mm)
    columns = [*_image_features(view), *_mask_features(view)]
    return BorderFeatures(start, stop, strides, band, np.stack(columns, axis=1).astype(np.float32))


@dataclass(frozen=True, eq=False)
class _View:
    """The downsampled box of one structure: intensities, masks, and distances in expected errors, positive inside."""

    scan: Array
    warped: Array
    own: Array
    others: Array
    to_atlas: Array
    to_mask: Array
    band: NDArray[np.bool_]
    near: NDArray[np.bool_]
    spacing_mm: NDArray[np.float64]
    error_mm: float

    def smooth(self, values: Array, sigma_mm: float) -> Array:
        return gaussian(values, sigma_mm / self.spacing_mm, truncate=2.5)

    def gradient(self, values: Array) -> Array:
        """(3, N) derivatives along the axes, per mm; 0 along an axis of one voxel."""
        gradient = np.zeros((3, np.count_nonzero(self.band)), np.float32)
        for axis, step_mm in enumerate(self.spacing_mm):
            if values.shape[axis] > 1:
                gradient[axis] = np.gradient(values, float(step_mm), axis=axis)[self.band]
        return gradient


def _image_features(view: _View) -> Iterator[Array]:
    """(N,) each: intensities and gradients relative to what lies inside and around the mask."""
    band = view.band
    low, high = np.percentile(view.scan[view.near], (0.5, 99.5))
    scan = ((view.scan - np.float32(low)) / np.float32(max(high - low, 1e-6))).clip(-0.5, 1.5)
    # The uncertain border belongs to neither.
    core = view.own * (view.to_mask > 0.3)
    ring = (1 - view.own) * view.near * (view.to_mask < -0.3)
    for sigma_mm in _IMAGE_SIGMAS_MM:
        image = scan if sigma_mm == 0 else view.smooth(scan, sigma_mm)
        (inner, inner_deviation), (outer, outer_deviation) = _moments(image, core), _moments(image, ring)
        values = image[band]
        to_inner = ((values - inner) / inner_deviation).clip(-4, 4)
        to_outer = ((values - outer) / outer_deviation).clip(-4, 4)
        likelihood_ratio = 0.5 * (to_outer**2 - to_inner**2) - np.log(inner_deviation / outer_deviation)
        yield to_inner / 2
        yield to_outer / 2
        yield likelihood_ratio.clip(-4, 4) / 2
        if sigma_mm == _GRADIENT_SIGMA_MM:
            contrast = max(abs(float(inner - outer)), _MIN_CONTRAST) / view.error_mm
            normal = view.gradient(view.smooth(view.to_atlas, 1.0))
            slope = view.gradient(image)
            length = np.sqrt((normal**2).sum(axis=0)) + np.float32(1e-3)
            yield ((slope * normal).sum(axis=0) / length / contrast).clip(-3, 3)
            yield (np.sqrt((slope**2).sum(axis=0)) / contrast).clip(0, 4)


def _mask_features(view: _View) -> Iterator[Array]:
    """(N,) each: the masks of this structure and of the others, at the voxel and around it."""
    band, error_mm = view.band, view.error_mm
    odds, to_atlas, disagreement = log_odds(view.own), view.to_atlas.clip(-4, 4), view.own - view.warped
    yield odds[band] / 3
    yield view.smooth(odds, 2 * float(view.spacing_mm.min()))[band] / 3
    yield view.smooth(odds, error_mm)[band] / 3
    yield log_odds(view.warped[band]) / 3
    yield to_atlas[band] / 2
    yield view.smooth(to_atlas, error_mm)[band] / 2
    yield view.to_mask[band].clip(-4, 4) / 2
    yield disagreement[band]
    yield view.smooth(disagreement, error_mm)[band] * 2
    yield view.others[band]
    yield view.smooth(view.others, error_mm)[band] * 2


def log_odds(probability: Array) -> Array:
    """Compute log-odds of probabilities clipped to [0.01, 0.99]."""
    return np.asarray(logit(probability.clip(_MIN_PROBABILITY, 1 - _MIN_PROBABILITY)))


def block_strides(shape: ArrayLike, spacing_mm: NDArray[np.float64]) -> tuple[int, int, int]:
    """Choose the downsampling of a box: powers of 2 along its finest axes, until at most a million voxels are left."""
    strides = np.ones(3, int)
    while np.prod(np.ceil(np.array(shape) / strides)) > _MAX_VOXELS:
        strides[spacing_mm * strides < 1.5 * (spacing_mm * strides).min()] *= 2
    return tuple(strides.tolist())


def downsample(values: Array, strides: tuple[int, int, int]) -> Array:
    """Take means over blocks of ``strides`` voxels; the last block of an axis may be smaller."""
    if max(strides) == 1:
        return values
    from ..core import kernels

    means = np.empty([-(-n // stride) for n, stride in zip(values.shape, strides, strict=True)], np.float32)
    values = np.ascontiguousarray(values, dtype=np.float32)
    in_slabs(lambda *part: kernels.block_means(values, strides, means, *part), len(means))
    return means


def upsample(values: Array, strides: tuple[int, int, int], shape: tuple[int, ...]) -> Array:
    """Interpolate block means linearly at the voxels of a box of ``shape``."""
    if max(strides) == 1:
        return values
    from ..core import kernels

    tables = []
    for stride, blocks, voxels in zip(strides, values.shape, shape, strict=True):
        # The centre of voxel v lies at (v + 1/2) / stride - 1/2 blocks; beyond the outermost centres values hold on.
        place = np.clip((np.arange(voxels) + 0.5) / stride - 0.5, 0, blocks - 1)
        low = place.astype(np.int64)
        tables.append((low, np.minimum(low + 1, blocks - 1), (place - low).astype(np.float32)))
    result, values = np.empty(shape, np.float32), np.ascontiguousarray(values, dtype=np.float32)
    in_slabs(lambda *part: kernels.interpolate_blocks(values, tuple(tables), result, *part), len(result))
    return result


def _moments(image: Array, weight: Array) -> tuple[Any, Any]:
    """Weighted mean and standard deviation; 0 and 0.02 where all weights are 0."""
    total = weight.sum() + np.float32(1e-6)
    mean = (weight * image).sum() / total
    return mean, np.sqrt((weight * (image - mean) ** 2).sum() / total) + np.float32(0.02)
