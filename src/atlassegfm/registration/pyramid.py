"""Scans prepared for registration: normalised, smoothed, resampled to coarse grids of one common frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from ..core.errors import RegistrationError
from ..core.geometry import Grid
from ..core.image import Volume
from ..transforms.maps import DisplacementField, Transform
from ..transforms.resample import resample
from .centreline import Centreline

#: Foreground is brighter than this fraction of the range from the 1st to the 99th percentile: tissue in CT and MR,
#: skull-stripped ones too, and small crops whole.
_FOREGROUND_FRACTION = 0.1
#: A node is in the body where this fraction of it is foreground.
_BODY_FRACTION = 0.5
#: Voxels between the points at which a box is mapped.
_BOX_STEP = 8


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan prepared for registration, reduced to no more than the finest level needs; float32.

    ``intensity`` is 0 to 1 between the 1st and 99th percentile of the foreground, clipped. ``foreground`` is the
    fraction of each voxel that is foreground, ``labelled`` that inside any structure, where labels were given.
    ``window`` are the intensities of the scan that became 0 and 1, and the threshold of the foreground.
    """

    intensity: Volume
    foreground: Volume
    labelled: Volume | None
    window: tuple[float, float, float] = (0.0, 1.0, 0.0)

    def body(self, grid: Grid) -> NDArray[np.bool_]:
        """Find the nodes of a grid that are in the body."""
        return resample(self.foreground, grid) > _BODY_FRACTION


@dataclass(frozen=True, eq=False)
class Level:
    """One scan on the grid of one level, (1, 1, I, J, K) float32 in [0, 1].

    ``inside`` is 1 in the scan's field of view, else 0; ``weight`` the fraction of foreground, 0 out of view;
    ``labelled`` the fraction inside labelled structures.
    """

    grid: Grid
    image: Tensor
    inside: Tensor
    weight: Tensor
    labelled: Tensor | None


@dataclass(frozen=True, eq=False)
class Pair:
    """The input of an engine: query and atlas as they came and prepared for the finest level, the atlas's labels.

    ``centreline`` is that of the structures that are vessels.
    """

    fixed: Volume
    moving: Volume
    fixed_scan: Scan
    moving_scan: Scan
    moving_labels: Volume | None
    centreline: Centreline | None = None

    def crop(self, box: Grid, fixed_to_moving: Transform) -> tuple[Scan, Scan]:
        """Prepare both scans around a box in the fixed world, reduced no further than the box's grid needs."""
        # Every few voxels and the corners: a deformed box is no box, and what it leaves counts as out of view.
        axes = [np.unique(np.r_[0:n:_BOX_STEP, n - 1]) for n in box.shape]
        points = box.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
        finest = float(box.spacing_mm.min())
        return (
            prepare_part(self.fixed, None, points, finest, self.fixed_scan),
            prepare_part(self.moving, self.moving_labels, fixed_to_moving.map(points), finest, self.moving_scan),
        )


@dataclass(frozen=True, eq=False)
class Start:
    """The displacement a deformable engine starts from: in the fixed world, applied before the linear stages.

    ``contrast_robust`` where the structures' contrast differs between the scans.
    """

    field: DisplacementField
    contrast_robust: bool = False


def level_spacings_mm(grid: Grid, voxels: Sequence[int]) -> tuple[float, ...]:
    """Compute the isotropic spacing in mm of each level, coarse to fine, from its voxels over a field of view.

    The finest level is never finer than the scan; the ratios between levels follow from the numbers, so that a small
    crop at its own resolution still gets coarser levels.
    """
    volume_mm3 = float(np.prod(np.array(grid.shape) * grid.spacing_mm))
    most = max(voxels)
    finest = max((volume_mm3 / most) ** (1 / 3), float(grid.spacing_mm.min()))
    return tuple(finest * (most / count) ** (1 / 3) for count in sorted(voxels))


def prepare(scan: Volume, labels: Volume | None, finest_mm: float, name: str) -> Scan:
    """Normalise a scan and downsample it by whole factors as far as ``finest_mm`` allows.

    Raises :class:`.RegistrationError` if there is no foreground; ``name`` says of which scan.
    """
    reduced = _downsample(scan, finest_mm)
    low, high = np.percentile(reduced.data, (1, 99))
    threshold = low + _FOREGROUND_FRACTION * (high - low)
    foreground = reduced.data > threshold
    if not foreground.any():
        raise RegistrationError(f"the {name} shows nothing but background; check its intensities")
    low, high = np.percentile(reduced.data[foreground], (1, 99))
    return _normalise(reduced, labels, finest_mm, (float(low), float(high), float(threshold)))


def prepare_part(
    scan: Volume, labels: Volume | None, points_mm: NDArray[np.float64], finest_mm: float, whole: Scan
) -> Scan:
    """Prepare the part of a scan around points, (N, 3) RAS+ mm, with the intensity window of the whole."""
    ijk = scan.grid.world_to_voxel(points_mm)
    last = np.array(scan.grid.shape) - 1
    start = np.clip(np.floor(ijk.min(axis=0)) - 1, 0, last).astype(int)
    stop = np.clip(np.ceil(ijk.max(axis=0)) + 1, start, last).astype(int) + 1
    box = tuple(map(slice, start, stop))
    grid = scan.grid.crop(start, stop)
    part = _downsample(Volume(scan.data[box], grid), finest_mm)
    return _normalise(part, None if labels is None else Volume(labels.data[box], grid), finest_mm, whole.window)


def _normalise(reduced: Volume, labels: Volume | None, finest_mm: float, window: tuple[float, float, float]) -> Scan:
    """A downsampled scan, and labels that are not downsampled yet."""
    low, high, threshold = window
    intensity = np.clip((reduced.data - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    foreground = Volume((reduced.data > threshold).astype(np.float32), reduced.grid)
    labelled = None
    if labels is not None:
        labelled = _downsample(Volume((labels.data > 0).astype(np.float32), labels.grid), finest_mm)
    return Scan(Volume(intensity, reduced.grid), foreground, labelled, window)


def level_grid(grid: Grid, axes: NDArray[np.float64], voxels: int, smallest_mm: float) -> Grid:
    """Make an isotropic grid of about ``voxels`` voxels over a field of view, never finer than ``smallest_mm``."""
    extent = np.ptp(grid.corners_mm @ axes, axis=0) + smallest_mm
    return frame_grid(grid, max((float(np.prod(extent)) / voxels) ** (1 / 3), smallest_mm), axes)


def frame_grid(grid: Grid, spacing_mm: ArrayLike, axes: NDArray[np.float64] | None = None) -> Grid:
    """Make a grid over the voxel centres of ``grid`` along orthogonal axes, of a spacing for all or one for each.

    ``axes`` are (3, 3) unit vectors in columns, made orthogonal; those closest to R, A, S if left out.
    """
    spacing_mm = np.broadcast_to(np.asarray(spacing_mm, dtype=np.float64), 3)
    orthogonal, upper = np.linalg.qr(axes_of(grid) if axes is None else axes)
    orthogonal = orthogonal * np.sign(np.diag(upper))
    local = grid.corners_mm @ orthogonal
    low, high = local.min(axis=0), local.max(axis=0)
    shape = np.round((high - low) / spacing_mm).astype(int) + 1
    # A slab thinner than the spacing, as one slice is, still gets two planes within its thickness.
    spacing_mm = np.where(shape < 2, np.minimum(spacing_mm, np.ptp(grid.faces_mm @ orthogonal, axis=0) / 2), spacing_mm)
    shape = np.maximum(shape, 2)
    affine = np.eye(4)
    affine[:3, :3] = orthogonal * spacing_mm
    affine[:3, 3] = orthogonal @ ((low + high) / 2 - (shape - 1) / 2 * spacing_mm)
    return Grid(tuple(shape), affine)


def axes_of(grid: Grid) -> NDArray[np.float64]:
    """(3, 3) unit vectors of a grid's canonical axes in columns, RAS+."""
    canonical = grid.canonical()
    axes: NDArray[np.float64] = canonical.affine[:3, :3] / canonical.spacing_mm
    return axes


def on_grid(scan: Scan, grid: Grid, device: str, fixed_to_moving: Transform | None = None) -> Level:
    """Smooth a scan against aliasing and sample it on a grid, through a transform where given."""

    def sampled(volume: Volume, outside: float = 0) -> Tensor:
        values = resample(smooth(volume, grid), grid, fixed_to_moving, outside=outside)
        return torch.from_numpy(values).to(device)[None, None]

    image = sampled(scan.intensity, outside=-1)
    inside = (image >= 0).float()
    labelled = None if scan.labelled is None else sampled(scan.labelled)
    return Level(grid, image.clamp_min(0), inside, sampled(scan.foreground).clamp(0, 1) * inside, labelled)


def smooth(volume: Volume, onto: Grid) -> Volume:
    """Smooth against aliasing on the grid ``onto``, whose axes are at right angles.

    Sigma is half the ratio of spacings, less the half voxel that sampling itself blurs by (as in ITK and elastix).
    """
    axes = volume.grid.affine[:3, :3] / volume.grid.spacing_mm
    # The length in which a scan's axis crosses one voxel of the grid.
    crossed_mm = 1 / np.linalg.norm(onto.inverse_affine[:3, :3] @ axes, axis=0)
    ratio = 0.5 * crossed_mm / volume.grid.spacing_mm
    sigma = np.sqrt(np.maximum(ratio**2 - 0.25, 0))
    return Volume(ndimage.gaussian_filter(volume.data, sigma, mode="nearest"), volume.grid)


def _downsample(scan: Volume, finest_mm: float) -> Volume:
    """Means over blocks, no longer than ``finest_mm``; an incomplete last block is padded with its last plane."""
    factors = np.clip(finest_mm / scan.grid.spacing_mm, 1, scan.grid.shape).astype(int)
    data: NDArray[np.float32] = scan.data
    for axis, factor in enumerate(factors):
        data = np.pad(data, [(0, -data.shape[axis] % factor if n == axis else 0) for n in range(3)], mode="edge")
        if factor > 1:
            shape = (*data.shape[:axis], -1, factor, *data.shape[axis + 1 :])
            data = data.reshape(shape).mean(axis=axis + 1, dtype=np.float32)
    affine = scan.grid.affine.copy()
    affine[:3, :3] *= factors
    affine[:3, 3] = scan.grid.voxel_to_world((factors - 1) / 2)
    return Volume(np.ascontiguousarray(data, dtype=np.float32), Grid(data.shape, affine))
