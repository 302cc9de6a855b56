"""The deformable engine ``instance``: the displacement field itself is optimised on the pair, coarse to fine.

Each level adds to the displacement of the levels before it, on a control grid of every second voxel that is smoothed
and interpolated to the voxels (in effect a B-spline). Adam lowers the MIND-SSC difference, one minus the local
correlation, the squared gradient of the addition and a Jacobian penalty (cf. Siebert, Hansen & Heinrich, "Fast 3D
Registration with Accurate Optimisation and Little Learning for Learn2Reg 2021"). The last level covers only the box of
the labels, at up to the query's own resolution.

An ensemble of such fits has other weights in each member. Where the scans leave the correspondence open the members
differ, and the mean of the labels warped by all of them is as near to the truth as the best member's, or nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ...core.adam import Adam
from ...core.geometry import Grid
from ...core.image import Volume
from ...core.parallel import parallel_map
from ...settings import InstanceSettings, RegistrationSettings
from ...transforms.maps import Affine, Chain, DisplacementField, Transform, displacement_on, field_from_voxels
from ...transforms.resample import resample
from ..centreline import Centreline
from ..objective import STRIDE, Objective, Scans, Weights, smooth_control
from ..pyramid import Pair, Scan, Start, axes_of, level_grid, on_grid
from ..result import Registration
from ..sampling import integrate_velocity

#: Adam's step in voxels of the level.
_STEP_VOXELS = 0.5
#: Control points at the border of the labels' box that stay: two passes of smoothing reach two of them.
_FIXED_BORDER = 3
#: Around the warped labels, voxels of the last level: room for the labels to move and for the cubes compared.
_MARGIN_VOXELS = 12
#: A voxel of the atlas counts as labelled from this fraction on.
_LABELLED_FRACTION = 0.05
#: Squarings in the integration of a velocity; 7 in VoxelMorph's diffeomorphic layers, too.
_SQUARINGS = 7
#: Reach of the emphasis beyond a structure's border, as a fraction of the grid's size (its volume's cube root).
_EMPHASIS_REACH = 0.03


#: Members of the ensemble after the first: smoother, mostly MIND-SSC, mostly correlation.
_FURTHER_MEMBERS = (
    Weights(smoothness=3.0, emphasis=0.25, centreline=0.25),
    Weights(mind=2.0, correlation=0.3),
    Weights(mind=0.4, correlation=2.0),
)


def fit(pair: Pair, linear: Affine, start: Start | None, settings: RegistrationSettings, device: str) -> Registration:
    """Optimise the displacement of one pair.

    ``linear``, fixed to moving world, is applied after the field. With a ``start`` the first level is left out: it
    would undo much of it. The field lies on the grid of the finest level over the whole field of view, the local field
    on that of the level in the labels' box.
    """
    options, robust = settings.instance, start is not None and start.contrast_robust
    begin = None if start is None else start.field

    def fitted(factors: Weights) -> _Fit:
        return _Member(pair, linear, options, device, factors, contrast_robust=robust).fit(begin)

    # A GPU works on one fit at a time.
    most = options.ensemble if device == "cpu" else 1
    first, *others = parallel_map(fitted, (Weights(), *_FURTHER_MEMBERS)[: options.ensemble], most=most)
    further = [Chain((one.field, linear) if one.local is None else (one.local, one.field, linear)) for one in others]
    counts = {"deformable": first.parameter_count * options.ensemble}
    return Registration(linear, first.field, first.local, parameter_count=counts, further_members=tuple(further))


class _Fit(NamedTuple):
    """Field over the field of view, that of the labels' box, and the number of parameters of both."""

    field: DisplacementField
    local: DisplacementField | None
    parameter_count: int


@dataclass(frozen=True, eq=False)
class _Member:
    """One member of the ensemble: a fit of the pair with its own weights. Fits return their parameter count, too."""

    pair: Pair
    linear: Affine
    options: InstanceSettings
    device: str
    factors: Weights
    contrast_robust: bool

    def fit(self, begin: DisplacementField | None) -> _Fit:
        """Fit over the whole field of view, then in the labels' box."""
        field, count = self._fit_levels(begin)
        local, local_count = self._fit_labels_box(field)
        return _Fit(field, local, count + local_count)

    def _fit_levels(self, begin: DisplacementField | None) -> tuple[DisplacementField, int]:
        """Fit over the whole field of view, coarse to fine."""
        levels = range(len(self.options.level_voxels))
        first, *finer = levels if begin is None else levels[1:] or levels
        field, count = self._fit_level(first, begin)
        for number in finer:
            field, count = self._fit_level(number, field)
        return field, count

    def _fit_level(self, number: int, begin: DisplacementField | None) -> tuple[DisplacementField, int]:
        pair, view = self.pair, self.pair.fixed.grid
        grid = level_grid(view, axes_of(view), self.options.level_voxels[number], float(view.spacing_mm.min()))
        scans, (iterations, weights) = (pair.fixed_scan, pair.moving_scan), self._weights(number, self.contrast_robust)
        if begin is None or not self.options.diffeomorphic:
            level = self._level(*scans, grid, self.linear)
            return level.fit(begin, weights, iterations)
        # Sums of maps that can be undone may fold; maps one after the other do not.
        level = self._level(*scans, grid, Chain((begin, self.linear)))
        added, count = level.fit(None, weights, iterations)
        return displacement_on(Chain((added, begin)), grid), count

    def _fit_labels_box(self, field: DisplacementField) -> tuple[DisplacementField | None, int]:
        """Fit the last level, in the labels' box; None if there is none."""
        transform = Chain((field, self.linear))
        box = self._labels_box(field, transform)
        if box is None:
            return None, 0
        level = self._level(*self.pair.crop(box, transform), box, transform)
        iterations, weights = self._weights(len(self.options.level_voxels))
        return level.fit(None, weights, iterations, fixed_border=True)

    def _level(self, fixed: Scan, moving: Scan, grid: Grid, transform: Transform) -> _Level:
        return _Level(fixed, moving, grid, transform, self.options, self.device, self.pair.centreline)

    def _labels_box(self, field: DisplacementField, transform: Transform) -> Grid | None:
        """Grid of the last level: around the warped labels, no finer than the query; None if they are out of view."""
        options, labels, view = self.options, self.pair.moving_labels, self.pair.fixed.grid
        if self.pair.moving_scan.labelled is None or labels is None or not options.local_voxels:
            return None
        wanted = max(options.local_voxels, len(_sizes(labels)) * options.voxels_per_structure)
        voxels = min(wanted, options.most_local_voxels)
        nodes = np.argwhere(resample(self.pair.moving_scan.labelled, field.grid, transform) >= _LABELLED_FRACTION)
        if not len(nodes):
            return None
        first, last, axes, finest_mm = nodes.min(axis=0), nodes.max(axis=0), axes_of(view), float(view.spacing_mm.min())
        grid = field.grid.crop(first, last + 1)
        # The margin is in voxels of the level, whose size follows from the box with its margin: three rounds settle it.
        for _ in range(3):
            margin = np.ceil(_MARGIN_VOXELS * grid.spacing_mm / field.grid.spacing_mm).astype(int)
            outer = field.grid.crop(np.maximum(first - margin, 0), np.minimum(last + margin + 1, field.grid.shape))
            grid = level_grid(outer, axes, voxels, finest_mm)
        # Nothing is free to move in a box that is all border.
        return grid if min(grid.shape) > 2 * STRIDE * _FIXED_BORDER else None

    def _weights(self, level: int, robust: bool = False) -> tuple[int, Weights]:
        """Iterations and weights of one level; the last value of a list holds for all levels after it."""
        prefix, factors = "contrast_robust_" if robust else "", self.factors
        names = ("mind_weight", "correlation_weight", "smoothness")
        lists = (self.options.iterations, *(getattr(self.options, prefix + name) for name in names))
        iterations, mind, correlation, smoothness = (values[min(level, len(values) - 1)] for values in lists)
        return iterations, Weights(
            mind * factors.mind,
            correlation * factors.correlation,
            smoothness * factors.smoothness,
            self.options.structure_emphasis * factors.emphasis,
            self.options.folding_penalty,
            self.options.centreline_emphasis * factors.centreline,
        )


def _sizes(labels: Volume) -> dict[int, int]:
    """Voxels of each structure; no table over label values, which may have 32 bits."""
    values, counts = np.unique(labels.data[labels.data > 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


class _Level:
    """One pair on one grid in the fixed world, through the transform found before this level."""

    def __init__(
        self,
        fixed: Scan,
        moving: Scan,
        grid: Grid,
        transform: Transform,
        options: InstanceSettings,
        device: str,
        centreline: Centreline | None,
    ) -> None:
        self.grid, self.options, self.device = grid, options, device
        self.labelled, self.transform, self.centreline = moving.labelled, transform, centreline
        self.scans = Scans(on_grid(fixed, grid, device), on_grid(moving, grid, device, transform))

    def fit(
        self, start: DisplacementField | None, weights: Weights, iterations: int, *, fixed_border: bool = False
    ) -> tuple[DisplacementField, int]:
        """Optimise an addition to ``start``, with ``fixed_border`` 0 at the grid's border; their sum on the grid."""
        base = self._in_voxels(start)
        objective = Objective(self.scans, base, self._weight(start, weights), weights)
        control = torch.zeros_like(objective.coarse_base, requires_grad=True)
        free = torch.ones_like(objective.coarse_base[:, :1])
        if fixed_border:
            free = _zero_border(free, _FIXED_BORDER)
        optimizer = Adam([control], [_STEP_VOXELS])
        for step in range(iterations):
            loss = objective(self._addition(control * free), step)
            optimizer.step(torch.autograd.grad(loss, (control,)))
        with torch.no_grad():
            addition = self._addition(control * free)
            voxels = base + F.interpolate(addition, list(self.grid.shape), mode="trilinear", align_corners=True)
        if fixed_border:
            voxels = _zero_border(voxels, 1)
        return field_from_voxels(self.grid, voxels[0].cpu().numpy()), control.numel()

    def _addition(self, control: Tensor) -> Tensor:
        """(1, 3, I, J, K) displacements of the control points, in voxels of the grid."""
        control = smooth_control(control)
        return integrate_velocity(control / STRIDE, _SQUARINGS) * STRIDE if self.options.diffeomorphic else control

    def _weight(self, start: DisplacementField | None, weights: Weights) -> Tensor:
        """(1, 1, I, J, K) voxel weights, 1 in sum: the query's foreground, more near the atlas's structures."""
        weight = foreground = self.scans.weight
        transform = self.transform if start is None else Chain((start, self.transform))
        if weights.emphasis and self.labelled is not None:
            near = resample(self.labelled, self.grid, transform)
            size_mm = float(np.prod(np.array(self.grid.shape) * self.grid.spacing_mm)) ** (1 / 3)
            near = ndimage.gaussian_filter(near, _EMPHASIS_REACH * size_mm / self.grid.spacing_mm)
            weight = foreground * (1 + weights.emphasis * torch.from_numpy(near).to(self.device)[None, None])
        if weights.centreline and self.centreline is not None:
            close = torch.from_numpy(self.centreline.closeness(self.grid, transform)).to(self.device)[None, None]
            weight = weight + weights.centreline * foreground * close
        # In double precision: the order of a sum depends on the threads.
        return weight / max(float(weight.sum(dtype=torch.float64)), 1e-6)

    def _in_voxels(self, field: DisplacementField | None) -> Tensor:
        """(1, 3, I, J, K) a displacement in voxels of the grid."""
        if field is None:
            return torch.zeros(1, 3, *self.grid.shape, device=self.device)
        displacement = np.stack([resample(Volume(u, field.grid), self.grid) for u in field.displacement_mm])
        voxels = np.einsum("av,vijk->aijk", self.grid.inverse_affine[:3, :3], displacement).astype(np.float32)
        return torch.from_numpy(voxels).to(self.device)[None]


def _zero_border(values: Tensor, width: int) -> Tensor:
    """(1, C, I, J, K) with zeros in the outermost planes, ``width`` on each side."""
    inner = slice(width, -width)
    return F.pad(values[:, :, inner, inner, inner], [width] * 6)
