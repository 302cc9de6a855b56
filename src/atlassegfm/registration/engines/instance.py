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
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ...core.geometry import Grid
from ...core.image import Volume
from ...settings import InstanceSettings, RegistrationSettings
from ...transforms.maps import Affine, Chain, DisplacementField, Transform, displacement_on, field_from_voxels
from ...transforms.resample import resample
from ..features import LocalCorrelation, mind_ssc
from ..pyramid import Pair, Scan, Start, axes_of, level_grid, on_grid
from ..result import Registration
from ..sampling import gradient_penalty, integrate_velocity, sample_at

#: Voxels between control points.
_STRIDE = 2
#: Half width of the cube of the local correlation, in voxels: 7 across.
_CORRELATION_RADIUS = 3
#: Tissue compressed to less than this fraction of its volume is penalised.
_LEAST_VOLUME = 0.3
#: Adam's step in voxels of the level.
_STEP_VOXELS = 0.5
#: MIND-SSC is compared at one voxel in eight, another one of each cube of eight in every step: its patches overlap.
_PARITIES = ((0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0))
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


@dataclass(frozen=True)
class _Weights:
    """Weights of one level, or one member's factors of them; see the settings of the same names."""

    mind: float = 1.0
    correlation: float = 1.0
    smoothness: float = 1.0
    emphasis: float = 1.0


#: Members of the ensemble after the first: smoother, mostly MIND-SSC, mostly correlation.
_FURTHER_MEMBERS = (
    _Weights(smoothness=3.0, emphasis=0.25),
    _Weights(mind=2.0, correlation=0.3),
    _Weights(mind=0.4, correlation=2.0),
)


def fit(pair: Pair, linear: Affine, start: Start | None, settings: RegistrationSettings, device: str) -> Registration:
    """Optimise the displacement of one pair.

    ``linear``, fixed to moving world, is applied after the field. With a ``start`` the first level is left out: it
    would undo much of it. The field lies on the grid of the finest level over the whole field of view, the local field
    on that of the level in the labels' box.
    """
    options, robust = settings.instance, start is not None and start.contrast_robust
    member = partial(_Member, pair, linear, options, device)
    begin = None if start is None else start.field
    first = member(contrast_robust=robust)
    field, count = first.fit_levels(begin)
    local, local_count = first.fit_labels_box(field)
    further: list[Transform] = []
    for factors in _FURTHER_MEMBERS[: options.ensemble - 1]:
        another = member(factors, contrast_robust=robust)
        other, _ = another.fit_levels(begin)
        near, _ = another.fit_labels_box(other)
        further.append(Chain((other, linear) if near is None else (near, other, linear)))
    counts = {"deformable": (count + local_count) * options.ensemble}
    return Registration(linear, field, local, parameter_count=counts, further_members=tuple(further))


@dataclass(frozen=True, eq=False)
class _Member:
    """One member of the ensemble: a fit of the pair with its own weights. Fits return their parameter count, too."""

    pair: Pair
    linear: Affine
    options: InstanceSettings
    device: str
    factors: _Weights = _Weights()
    contrast_robust: bool = False

    def fit_levels(self, begin: DisplacementField | None) -> tuple[DisplacementField, int]:
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
            level = _Level(*scans, grid, self.linear, self.options, self.device)
            return level.fit(begin, weights, iterations)
        # Sums of maps that can be undone may fold; maps one after the other do not.
        level = _Level(*scans, grid, Chain((begin, self.linear)), self.options, self.device)
        added, count = level.fit(None, weights, iterations)
        return displacement_on(Chain((added, begin)), grid), count

    def fit_labels_box(self, field: DisplacementField) -> tuple[DisplacementField | None, int]:
        """Fit the last level, in the labels' box; None if there is none."""
        transform = Chain((field, self.linear))
        box = self._labels_box(field, transform)
        if box is None:
            return None, 0
        level = _Level(*self.pair.crop(box, transform), box, transform, self.options, self.device)
        iterations, weights = self._weights(len(self.options.level_voxels))
        return level.fit(None, weights, iterations, fixed_border=True)

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
        return grid if min(grid.shape) > 2 * _STRIDE * _FIXED_BORDER else None

    def _weights(self, level: int, robust: bool = False) -> tuple[int, _Weights]:
        """Iterations and weights of one level; the last value of a list holds for all levels after it."""
        prefix, factors = "contrast_robust_" if robust else "", self.factors
        names = ("mind_weight", "correlation_weight", "smoothness")
        lists = (self.options.iterations, *(getattr(self.options, prefix + name) for name in names))
        iterations, mind, correlation, smoothness = (values[min(level, len(values) - 1)] for values in lists)
        emphasis = self.options.structure_emphasis * factors.emphasis
        weights = mind * factors.mind, correlation * factors.correlation, smoothness * factors.smoothness
        return iterations, _Weights(*weights, emphasis)


def _sizes(labels: Volume) -> dict[int, int]:
    """Voxels of each structure; no table over label values, which may have 32 bits."""
    values, counts = np.unique(labels.data[labels.data > 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


class _Level:
    """One pair on one grid in the fixed world, through the transform found before this level."""

    def __init__(
        self, fixed: Scan, moving: Scan, grid: Grid, transform: Transform, options: InstanceSettings, device: str
    ) -> None:
        self.grid, self.options, self.device = grid, options, device
        self.labelled, self.transform = moving.labelled, transform
        query, atlas = on_grid(fixed, grid, device), on_grid(moving, grid, device, transform)
        self.query_mind, self.atlas_mind = mind_ssc(query.image), mind_ssc(atlas.image)
        self.correlation = LocalCorrelation(query.image, _CORRELATION_RADIUS)
        self.atlas = torch.cat((atlas.image, atlas.inside), dim=1)
        self.weight = query.weight
        self.control_shape = [-(-n // _STRIDE) + 1 for n in grid.shape]
        self.to_unit = 2 / (torch.tensor(grid.shape, dtype=torch.float32, device=device) - 1).clamp_min(1)
        nodes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid.shape]
        self.nodes = torch.stack(torch.meshgrid(*nodes, indexing="ij"))[None]

    def fit(
        self, start: DisplacementField | None, weights: _Weights, iterations: int, *, fixed_border: bool = False
    ) -> tuple[DisplacementField, int]:
        """Optimise an addition to ``start``, with ``fixed_border`` 0 at the grid's border; their sum on the grid."""
        shape, base = list(self.grid.shape), self._in_voxels(start)
        coarse_base = F.interpolate(base, self.control_shape, mode="trilinear", align_corners=True)
        places = self.nodes + base
        control = torch.zeros_like(coarse_base, requires_grad=True)
        weight = self._weight(start, weights.emphasis)
        free = torch.ones_like(coarse_base[:, :1])
        if fixed_border:
            free = _zero_border(free, _FIXED_BORDER)
        optimizer = torch.optim.Adam([control], lr=_STEP_VOXELS)
        for step in range(iterations):
            addition = self._addition(control * free)
            displaced = places + F.interpolate(addition, shape, mode="trilinear", align_corners=True)
            loss = self._dissimilarity(displaced, weight, weights, step)
            loss = loss + weights.smoothness * gradient_penalty(addition / _STRIDE)
            if self.options.folding_penalty:
                loss = loss + self.options.folding_penalty * _folding_penalty((coarse_base + addition) / _STRIDE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            addition = self._addition(control * free)
            voxels = base + F.interpolate(addition, shape, mode="trilinear", align_corners=True)
        if fixed_border:
            voxels = _zero_border(voxels, 1)
        return field_from_voxels(self.grid, voxels[0].cpu().numpy()), control.numel()

    def _addition(self, control: Tensor) -> Tensor:
        """(1, 3, I, J, K) displacements of the control points, in voxels of the grid."""
        # Two passes of a mean over 3 x 3 x 3 control points: about a cubic B-spline.
        for _ in range(2):
            control = F.avg_pool3d(F.pad(control, [1] * 6, mode="replicate"), 3, stride=1)
        return integrate_velocity(control / _STRIDE, _SQUARINGS) * _STRIDE if self.options.diffeomorphic else control

    def _weight(self, start: DisplacementField | None, emphasis: float) -> Tensor:
        """(1, 1, I, J, K) voxel weights, 1 in sum: the query's foreground, more near the atlas's structures."""
        weight = self.weight
        if emphasis and self.labelled is not None:
            transform = self.transform if start is None else Chain((start, self.transform))
            near = resample(self.labelled, self.grid, transform)
            size_mm = float(np.prod(np.array(self.grid.shape) * self.grid.spacing_mm)) ** (1 / 3)
            near = ndimage.gaussian_filter(near, _EMPHASIS_REACH * size_mm / self.grid.spacing_mm)
            weight = weight * (1 + emphasis * torch.from_numpy(near).to(self.device)[None, None])
        return weight / weight.sum().clamp_min(1e-6)

    def _dissimilarity(self, displaced: Tensor, weight: Tensor, weights: _Weights, step: int) -> Tensor:
        """Dissimilarity of query and atlas read at displaced voxels, (1, 3, I, J, K); MIND-SSC at the step's voxels."""
        where = (displaced.movedim(1, -1) * self.to_unit - 1).flip(-1)
        warped = sample_at(self.atlas, where)
        # Outside the atlas nothing is compared; no gradient here: leaving it would lower the loss.
        counted = weight * warped[:, 1:].detach()
        loss = torch.zeros((), device=displaced.device)
        if weights.correlation:
            loss = loss + weights.correlation * self.correlation.dissimilarity(warped[:, :1], counted)
        if weights.mind:
            i, j, k = (slice(first, None, 2) for first in _PARITIES[step % len(_PARITIES)])
            difference = (sample_at(self.atlas_mind, where[:, i, j, k]) - self.query_mind[:, :, i, j, k]).pow(2)
            part = (difference.mean(dim=1, keepdim=True) * counted[:, :, i, j, k]).sum()
            loss = loss + weights.mind * len(_PARITIES) * part
        return loss

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


def _folding_penalty(displacement: Tensor) -> Tensor:
    """Mean squared shortfall of the Jacobian determinant below :data:`_LEAST_VOLUME`, of (1, 3, I, J, K) in voxels."""
    i, j, k = (n - 1 for n in displacement.shape[2:])
    # Forward differences at the nodes that have all three.
    x, y, z = (displacement.diff(dim=axis)[0, :, :i, :j, :k] for axis in (2, 3, 4))
    determinant = (
        (1 + x[0]) * ((1 + y[1]) * (1 + z[2]) - y[2] * z[1])
        - x[1] * (y[0] * (1 + z[2]) - y[2] * z[0])
        + x[2] * (y[0] * z[1] - (1 + y[1]) * z[0])
    )
    return (_LEAST_VOLUME - determinant).clamp_min(0).pow(2).mean()
