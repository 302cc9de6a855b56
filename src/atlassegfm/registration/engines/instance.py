"""The deformable engine ``instance``: the displacement field itself is optimised on the pair, coarse to fine.

Each level adds to what the levels before it found. The addition lives on a control grid of every second
voxel, is smoothed by two passes of a 3-voxel cube and interpolated to the voxels (in effect a B-spline).
Adam lowers the MIND-SSC difference, one minus the local correlation, and the squared gradient of the
addition (cf. Siebert, Hansen & Heinrich, "Fast 3D Registration with Accurate Optimisation and Little
Learning for Learn2Reg 2021", whose second stage is alike). The last level covers only the box of the labels,
as finely as the query's own voxels allow: the structures are what the field is for.

Several such fits are made, with other weights. Where the scans leave open how they go together, the fits differ, and
labels warped by all of them and averaged are as near to the truth as those of the best, or nearer, on most data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ...core.geometry import Grid
from ...core.image import Volume
from ...transforms.maps import Affine, Chain, DisplacementField, Transform, displacement_on
from ...transforms.resample import resample, warp_labels
from ..features import LocalCorrelation, mind_ssc
from ..pair import Fitted, Pair, Start
from ..pyramid import Scan, axes_of, level_grid, on_grid
from ..sampling import flow, sample_at

if TYPE_CHECKING:
    from ...settings import InstanceSettings, RegistrationSettings


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Variation:
    """By what the weights of a further fit are multiplied; see the settings of the same names."""

    mind: float = 1.0
    correlation: float = 1.0
    smoothness: float = 1.0
    emphasis: float = 1.0


#: Voxels between control points.
_STRIDE = 2


#: Half width of the cube of the local correlation, in voxels: 7 across.
_CORRELATION_RADIUS = 3


#: Tissue squeezed to less than this share of its volume is penalised.
_LEAST_VOLUME = 0.3


#: Adam's step in voxels of the level.
_STEP_VOXELS = 0.5


#: MIND-SSC is compared at one voxel in eight, another one of each cube of eight in every step: its patches overlap,
#: and reading all of them takes six times as long (benchmarks/registration_profile.py).
_PARITIES = ((0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0))


#: Control points from the border of the labels' box that stay: two passes of smoothing reach two of them.
_FIXED_RIM = 3


#: Around the warped labels, voxels of the last level: room for the labels to move and for the cubes compared.
_MARGIN_VOXELS = 12


#: A voxel of the atlas counts as labelled where this share of it is.
_LABELLED_SHARE = 0.05


#: Halvings of a velocity before it is taken for a displacement; 7 in VoxelMorph's diffeomorphic layers, too.
_SQUARINGS = 7


#: Contrast is compared in the largest structures, and in those with at least so many voxels on the coarse level.
_MOST_STRUCTURES, _FEWEST_VOXELS = 32, 8


#: A voxel is in a structure from this share on.
_INSIDE_SHARE = 0.5


#: The further fits, in this order: other answers to what the scans leave open. Dice of the warped atlas by the fit of
#: the settings alone / a smoother one / mostly MIND-SSC / mostly correlation: 0.798 / 0.807 / 0.785 / 0.794 (Cardiac,
#: 10 pairs), 0.816 / 0.811 / 0.796 / 0.816 (Hippocampus, 12), 0.838 / 0.829 / 0.814 / 0.813 (Abd-MR, 10; the last three
#: without the rule of caution).
_VARIATIONS = (
    _Variation(smoothness=3.0, emphasis=0.25),
    _Variation(mind=2.0, correlation=0.3),
    _Variation(mind=0.4, correlation=2.0),
)


#: Reach of the emphasis beyond a structure's border, as a share of the grid's size (its volume's cube root).
_EMPHASIS_REACH = 0.03


@dataclass(frozen=True)
class _Weights:
    """What counts how much on one level; see the settings of the same names."""

    iterations: int
    mind: float
    correlation: float
    smoothness: float
    folding: float
    emphasis: float
    diffeomorphic: bool


def fit(pair: Pair, linear: Affine, start: Start | None, settings: RegistrationSettings, device: str) -> Fitted:
    """Optimise the displacement of one pair.

    Parameters
    ----------
    pair : Pair
        Query and atlas.
    linear : Affine
        Fixed to moving world, applied after the field.
    start : Start or None
        To begin with; then the first level is left out. It would undo much of what the start knows: with it, Dice of
        the warped atlas is lower by 1.2 points on Abd-CT (15 pairs), 0.4 on Abd-MR (10), 1.9 on Cardiac (15) and 0.4 on
        Hippocampus (17).

    Returns
    -------
    Fitted
        Its field lies on the grid of the finest level that covers the whole field of view, its local field on that of
        the level in the box of the labels. The further fits are its ``others``.
    """
    options = settings.instance
    fitting = _Fitting(pair, linear, options, device)
    begin, cautious = None if start is None else start.field, False
    field, parameters = fitting.on_all_levels(begin, _Variation(), cautious=cautious)
    if options.cautious and pair.moving_labels is not None:
        difference = _contrast_difference(pair, pair.moving_labels, field, linear)
        cautious = difference > options.contrast_tolerance
        logger.debug("contrast of the structures differs by %.3f of the range: cautious %s", difference, cautious)
        if cautious:
            if start is not None and start.without_brightness is not None:
                begin = start.without_brightness()
            field, parameters = fitting.on_all_levels(begin, _Variation(), cautious=cautious)
    local, of_local = fitting.in_labels_box(field, _Variation())
    others = []
    for variation in _VARIATIONS[: options.fits - 1]:
        other, _ = fitting.on_all_levels(begin, variation, cautious=cautious)
        near, _ = fitting.in_labels_box(other, variation)
        others.append(Chain((other, linear) if near is None else (near, other, linear)))
    return Fitted(linear, field, {"deformable": (parameters + of_local) * options.fits}, local, tuple(others))


@dataclass(frozen=True, eq=False)
class _Fitting:
    """Fits of one pair that differ in their weights.

    Parameters
    ----------
    pair, linear, device
        As :func:`fit` has them.
    options : InstanceSettings
    """

    pair: Pair
    linear: Affine
    options: InstanceSettings
    device: str

    def on_all_levels(
        self, begin: DisplacementField | None, variation: _Variation, *, cautious: bool
    ) -> tuple[DisplacementField, int]:
        """Over the whole field of view, coarse to fine; the field, and how many numbers its last level fitted."""
        last = len(self.options.level_voxels) - 1
        first = 0 if begin is None else min(1, last)
        field, parameters = self._on_level(first, begin, variation, cautious=cautious)
        for number in range(first + 1, last + 1):
            field, parameters = self._on_level(number, field, variation, cautious=cautious)
        return field, parameters

    def _on_level(
        self, number: int, begin: DisplacementField | None, variation: _Variation, *, cautious: bool
    ) -> tuple[DisplacementField, int]:
        """One level over the whole field of view; the field, and how many numbers were fitted."""
        pair, view = self.pair, self.pair.fixed.grid
        grid = level_grid(view, axes_of(view), self.options.level_voxels[number])
        weights = _weights(self.options, number, variation, cautious=cautious)
        if not self.options.diffeomorphic or begin is None:
            level = _Level(pair.fixed_scan, pair.moving_scan, grid, self.linear, self.device)
            return level.fit(begin, weights, fixed_rim=False), level.parameters
        # Sums of maps that can be undone may fold; maps one after the other do not.
        level = _Level(pair.fixed_scan, pair.moving_scan, grid, Chain((begin, self.linear)), self.device)
        added = level.fit(None, weights, fixed_rim=False)
        return displacement_on(Chain((added, begin)), grid), level.parameters

    def in_labels_box(self, field: DisplacementField, variation: _Variation) -> tuple[DisplacementField | None, int]:
        """The last level; None if there is none, and how many numbers were fitted."""
        pair, options, transform = self.pair, self.options, Chain((field, self.linear))
        voxels = _local_voxels(options, pair.moving_labels)
        box = _labels_box(pair.moving_scan, field, transform, pair.fixed.grid, voxels)
        if box is None:
            return None, 0
        fixed, moving = pair.near(box, transform)
        level = _Level(fixed, moving, box, transform, self.device)
        weights = _weights(options, len(options.level_voxels), variation, cautious=False)
        return level.fit(None, weights, fixed_rim=True), level.parameters


def _weights(options: InstanceSettings, level: int, variation: _Variation, *, cautious: bool) -> _Weights:
    """Of one level; the last value of a list holds for all levels after it."""

    def of(values: Sequence[float]) -> float:
        return values[min(level, len(values) - 1)]

    return _Weights(
        int(of(options.iterations)),
        of(options.cautious_mind_weight if cautious else options.mind_weight) * variation.mind,
        of(options.cautious_correlation_weight if cautious else options.correlation_weight) * variation.correlation,
        of(options.cautious_smoothness if cautious else options.smoothness) * variation.smoothness,
        options.folding_penalty,
        options.structure_emphasis * variation.emphasis,
        options.diffeomorphic,
    )


def _local_voxels(options: InstanceSettings, labels: Volume | None) -> int:
    """Voxels of the level in the labels' box; 0 if there is to be none."""
    if labels is None or not options.local_voxels:
        return 0
    return min(max(options.local_voxels, len(_sizes(labels)) * options.voxels_per_structure), options.most_local_voxels)


def _sizes(labels: Volume) -> dict[int, int]:
    """Voxels of each structure. Label values may be as large as 32 bits: no table over them."""
    values, counts = np.unique(labels.data[labels.data > 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _contrast_difference(pair: Pair, labels: Volume, field: DisplacementField, linear: Affine) -> float:
    """How differently bright the structures are in the two scans, in [0, 1].

    The mean over the largest structures, each counted by its volume, of the difference of medians as a share of the
    range of each scan. Structures need not be found exactly for that: where a spleen is dark that is bright elsewhere,
    the liver too stands out, and is found.
    """
    transform = Chain((field, linear))
    fixed = on_grid(pair.fixed_scan, field.grid, "cpu").image[0, 0].numpy()
    moving = on_grid(pair.moving_scan, field.grid, "cpu", transform).image[0, 0].numpy()
    sizes = _sizes(labels)
    values = sorted(sizes, key=lambda value: -sizes[value])[:_MOST_STRUCTURES]
    differences, volumes = [], []
    for mask in warp_labels(labels, values, field.grid, transform).values():
        inside = mask.values >= _INSIDE_SHARE
        if inside.sum() >= _FEWEST_VOXELS:
            volumes.append(int(inside.sum()))
            differences.append(abs(float(np.median(fixed[mask.box][inside]) - np.median(moving[mask.box][inside]))))
    return float(np.average(differences, weights=volumes)) if differences else 0.0


def _labels_box(moving: Scan, field: DisplacementField, transform: Transform, view: Grid, voxels: int) -> Grid | None:
    """The grid of the last level: around the warped labels, no finer than the query; None if they are out of view."""
    if moving.near is None or not voxels:
        return None
    nodes = np.argwhere(resample(moving.near, field.grid, transform) >= _LABELLED_SHARE)
    if not len(nodes):
        return None
    first, last, axes = nodes.min(axis=0), nodes.max(axis=0), axes_of(view)
    grid = field.grid.crop(first, last + 1)
    # The margin is in voxels of the level, and their size follows from the box with its margin: three rounds settle it.
    for _ in range(3):
        margin = np.ceil(_MARGIN_VOXELS * grid.spacing_mm / field.grid.spacing_mm).astype(int)
        outer = field.grid.crop(np.maximum(first - margin, 0), np.minimum(last + margin + 1, field.grid.shape))
        grid = level_grid(outer, axes, voxels, finest_mm=float(view.spacing_mm.min()))
    # Nothing is free to move in a box that is all rim.
    return grid if min(grid.shape) > 2 * _STRIDE * _FIXED_RIM else None


class _Level:
    """One pair on one grid.

    Parameters
    ----------
    fixed, moving : Scan
        Query and atlas.
    grid : Grid
        In the fixed world.
    transform : Transform
        Fixed to moving world, found before this level.
    device : str
        Where to compute.
    """

    def __init__(self, fixed: Scan, moving: Scan, grid: Grid, transform: Transform, device: str) -> None:
        self.grid, self.device = grid, device
        self.near, self.transform = moving.near, transform
        query, atlas = on_grid(fixed, grid, device), on_grid(moving, grid, device, transform)
        self.query_mind, self.atlas_mind = mind_ssc(query.image), mind_ssc(atlas.image)
        self.correlation = LocalCorrelation(query.image, _CORRELATION_RADIUS)
        self.atlas = torch.cat((atlas.image, atlas.inside), dim=1)
        self.weight = query.weight
        self.control_shape = [-(-n // _STRIDE) + 1 for n in grid.shape]
        size = torch.tensor(grid.shape, dtype=torch.float32, device=device)
        self.to_unit = 2 / (size - 1).clamp_min(1)
        nodes = [torch.arange(n, dtype=torch.float32, device=device) for n in grid.shape]
        self.nodes = torch.stack(torch.meshgrid(*nodes, indexing="ij"))[None]

    @property
    def parameters(self) -> int:
        """Numbers fitted."""
        return 3 * int(np.prod(self.control_shape))

    def fit(self, start: DisplacementField | None, weights: _Weights, *, fixed_rim: bool) -> DisplacementField:
        """Add to a displacement what makes the scans more alike.

        Parameters
        ----------
        start : DisplacementField or None
            On any grid.
        weights : _Weights
        fixed_rim : bool
            Whether the displacement stays as it is at the border of the grid.

        Returns
        -------
        DisplacementField
            On the level's grid, ``start`` and what was added.
        """
        shape = list(self.grid.shape)
        base = self._in_voxels(start)
        coarse_base = F.interpolate(base, self.control_shape, mode="trilinear", align_corners=True)
        places = self.nodes + base
        control = torch.zeros_like(coarse_base, requires_grad=True)
        weight = self._weight(start, weights.emphasis)
        free = torch.ones_like(coarse_base[:, :1])
        if fixed_rim:
            free = _without_rim(free, _FIXED_RIM)
        optimizer = torch.optim.Adam([control], lr=_STEP_VOXELS)
        for step in range(weights.iterations):
            addition = self._addition(control * free, weights)
            displaced = places + F.interpolate(addition, shape, mode="trilinear", align_corners=True)
            total = coarse_base + addition
            rough = _roughness(addition / _STRIDE)
            loss = self._unlikeness(displaced, weight, weights, step) + weights.smoothness * rough
            if weights.folding:
                loss = loss + weights.folding * _compression(total / _STRIDE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            addition = self._addition(control * free, weights)
            voxels = base + F.interpolate(addition, shape, mode="trilinear", align_corners=True)
        if fixed_rim:
            voxels = _without_rim(voxels, 1)
        world = np.einsum("wv,vijk->wijk", self.grid.affine[:3, :3], voxels[0].cpu().numpy())
        return DisplacementField(self.grid, world.astype(np.float32))

    def _addition(self, control: Tensor, weights: _Weights) -> Tensor:
        """(1, 3, I, J, K) displacements of the control points, in voxels of the grid."""
        smooth = _smooth(control)
        return flow(smooth / _STRIDE, _SQUARINGS) * _STRIDE if weights.diffeomorphic else smooth

    def _weight(self, start: DisplacementField | None, emphasis: float) -> Tensor:
        """(1, 1, I, J, K) weights of the voxels, 1 in sum: the query's foreground, more near the atlas's structures."""
        weight = self.weight
        if emphasis and self.near is not None:
            placed = self.transform if start is None else Chain((start, self.transform))
            near = resample(self.near, self.grid, placed)
            size_mm = float(np.prod(np.array(self.grid.shape) * self.grid.spacing_mm)) ** (1 / 3)
            near = ndimage.gaussian_filter(near, _EMPHASIS_REACH * size_mm / self.grid.spacing_mm)
            weight = weight * (1 + emphasis * torch.from_numpy(near).to(self.device)[None, None])
        return weight / weight.sum().clamp_min(1e-6)

    def _unlikeness(self, displaced: Tensor, weight: Tensor, weights: _Weights, step: int) -> Tensor:
        """How unlike query and warped atlas are.

        Parameters
        ----------
        displaced : Tensor, (1, 3, I, J, K)
            Where each voxel is read in the atlas, in voxels of the grid.
        weight : Tensor, (1, 1, I, J, K)
            Of each voxel.
        weights : _Weights
        step : int
            Of the optimisation: which voxels are compared by MIND-SSC depends on it.
        """
        where = (displaced.movedim(1, -1) * self.to_unit - 1).flip(-1)
        warped = sample_at(self.atlas, where)
        # What is outside the atlas says nothing; it must not pay to leave it either, so no gradient through this.
        counted = weight * warped[:, 1:].detach()
        loss = torch.zeros((), device=displaced.device)
        if weights.correlation:
            loss = loss + weights.correlation * self.correlation.unlikeness(warped[:, :1], counted)
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


def _without_rim(values: Tensor, rim: int) -> Tensor:
    """(1, C, I, J, K) with zeros in the outermost planes."""
    kept = torch.zeros_like(values)
    inner = (slice(None), slice(None), *(slice(rim, n - rim) for n in values.shape[2:]))
    kept[inner] = values[inner]
    return kept


def _roughness(displacement: Tensor) -> Tensor:
    """Mean squared gradient of (1, 3, I, J, K) displacements in units of their own grid's spacing."""
    total = torch.zeros((), device=displacement.device)
    for axis in (2, 3, 4):
        total = total + displacement.diff(dim=axis).pow(2).mean()
    return total


def _compression(displacement: Tensor) -> Tensor:
    """Mean squared shortfall of the Jacobian determinant below :data:`_LEAST_VOLUME`.

    Parameters
    ----------
    displacement : Tensor, (1, 3, I, J, K)
        In units of its own grid's spacing.
    """
    rows = []
    for axis in (2, 3, 4):
        row = displacement.diff(dim=axis)
        # Forward differences, cut to the nodes that have all three.
        for other in (2, 3, 4):
            if other != axis:
                row = row.narrow(other, 0, row.shape[other] - 1)
        rows.append(row[0])
    x, y, z = rows
    determinant = (
        (1 + x[0]) * ((1 + y[1]) * (1 + z[2]) - y[2] * z[1])
        - x[1] * (y[0] * (1 + z[2]) - y[2] * z[0])
        + x[2] * (y[0] * z[1] - (1 + y[1]) * z[0])
    )
    return (_LEAST_VOLUME - determinant).clamp_min(0).pow(2).mean()


def _smooth(control: Tensor) -> Tensor:
    """Two passes of a mean over 3 x 3 x 3 control points: about a cubic B-spline."""
    for _ in range(2):
        control = F.avg_pool3d(F.pad(control, [1] * 6, mode="replicate"), 3, stride=1)
    return control
