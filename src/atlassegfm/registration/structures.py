"""One linear map for each labelled structure, blended to one smooth field that starts the deformable fit.

Between two people organs lie centimetres apart, are turned and of other size: too far for a smooth deformable fit that
starts from the affine. Each structure, with the tissue around it, is matched at all translations within reach (by FFT);
linear maps are fitted from the best of them, roughly at first, and the one that matches best in the end is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from scipy.fft import next_fast_len
from torch import Tensor

from ..core.adam import Adam
from ..core.compiled import in_slabs
from ..core.image import Volume
from ..core.mask import LocalMap
from ..core.parallel import parallel_map
from ..prompts import INSIDE
from ..transforms.maps import Affine, DisplacementField, field_from_voxels
from ..transforms.resample import warp_labels
from . import kernels
from .affine import ONE_VOXEL, affine_maps, homogeneous, linear_maps
from .features import mind_ssc
from .kernels import Array, Doubles
from .pyramid import Level, Scan, frame_grid, on_grid
from .result import Place
from .sampling import evaluate, off_centre, sample_points, with_ones

#: Standard deviation of the prior on a translation, as a fraction of the field of view's size (its volume's cube root).
_PRIOR_FRACTION = 0.1
#: Standard deviations of the prior within which translations are searched.
_REACH = 3.5
#: Tissue around a structure that is matched with it, as a fraction of the field of view's size.
_SURROUNDINGS_FRACTION = 0.03
#: Weights of correlation, squared intensity difference and prior beside the MIND-SSC difference (1).
_CORRELATION_WEIGHT, _INTENSITY_WEIGHT, _PRIOR_WEIGHT = 2.0, 5.0, 0.05
#: Penalty of the part of a structure that a translation takes out of the field of view.
_OUTSIDE_PENALTY = 1.0
#: Added to products of variances, against division by zero where all is of one brightness.
_VARIANCE_FLOOR = 1e-5
#: Voxels on each side within which a minimum must be the lowest.
_NEIGHBOURHOOD = 2
#: Translations from which a linear map is fitted roughly, besides none, and the best of these that are fitted to the
#: end, if they are so many voxels apart: the cost of a translation alone says little where a structure is turned.
_CANDIDATES, _FINALISTS, _APART_VOXELS = 64, 10, 1.5
#: Voxels of a patch that are compared in the rough and in the final fit, drawn at random from larger ones.
_ROUGH_POINTS, _FINAL_POINTS = 1000, 4000
#: Adam's steps in both, and their sizes: in voxels for the translation, in radians or logarithms of a stretch.
_ROUGH_ITERATIONS, _FINAL_ITERATIONS = 15, 50
_SHIFT_STEP, _SHAPE_STEP = 0.15, 0.02
#: MIND-SSC difference up to which a translation may be worse than none; beyond it brightness was misleading.
_MIND_TOLERANCE = 0.08
#: Penalties of squared rotation (radians), stretch and shear (logarithms).
_ROTATION_PENALTY, _STRETCH_PENALTY, _SHEAR_PENALTY = 0.8, 0.4, 0.8
#: Factor of the cost in the exponent of a structure's weight in the blending: structures that match worse count less.
_DISTRUST = 1.0
#: Sigma of the blending between structures, as a fraction of the field of view's size.
_BLENDING_FRACTION = 0.08
#: Sigmas of the corrections within the structures that follow, wide to narrow.
_CORRECTION_FRACTIONS = (0.08, 0.056, 0.04, 0.028)
#: Weight of no displacement against the strongest structure, in the blending and in the corrections.
_FADING, _CORRECTION_FADING = 0.02, 0.05
#: Another place is at least so many sizes of the structure (cube roots of its volume) away.
_ELSEWHERE_SIZES = 0.5
#: A voxel that is mapped to at least this fraction of a structure, and has less than the second of its mask, would show
#: it a second time.
_MAPPED_FRACTION, _OUTSIDE_FRACTION = 0.3, 0.1
#: Only the largest structures are searched for: the smallest of a hundred say little about where they are.
_MOST_STRUCTURES = 32
#: Structures searched for at a time, at most.
_MOST_PARALLEL = 4
#: A structure of fewer voxels on the level's grid is not searched for.
_FEWEST_VOXELS = 8


@dataclass(frozen=True, eq=False)
class _StructureMap:
    """The linear map of one structure, (4, 4) from warped atlas to query in voxels; its masks there, and the place."""

    to_query: NDArray[np.float64]
    atlas_mask: NDArray[np.float32]
    mask: NDArray[np.float32]
    place: Place


@dataclass(frozen=True, eq=False)
class Search:
    """The field from all structures, None where none is in view; where each was found; and the change of contrast.

    The field is in the fixed world, applied before the linear stages. ``contrast_difference`` is the difference of the
    structures' median brightness in both scans, in [0, 1], a mean weighted by volume and by the margin of the place.
    """

    field: DisplacementField | None
    places: Mapping[int, Place]
    contrast_difference: float


def fit(
    fixed: Scan,
    moving: Scan,
    labels: Volume,
    linear: Affine,
    spacing_mm: float,
    device: str,
    *,
    brightness: bool = True,
) -> Search:
    """Fit a linear map to each structure and blend them to one smooth field, applied before ``linear``.

    ``brightness`` compares intensities beside MIND-SSC: that tells organs of similar form apart, but misleads where the
    contrast of organs differs between the scans.
    """
    grid = frame_grid(fixed.intensity.grid, spacing_mm)
    query, atlas = on_grid(fixed, grid, device), on_grid(moving, grid, device, linear)
    size_mm = float(np.prod(np.array(grid.shape) * spacing_mm)) ** (1 / 3)
    values = [int(value) for value in np.unique(labels.data) if value]
    # What the linear map puts outside the query's grid is not searched for.
    maps = {value: mask for value, mask in warp_labels(labels, values, grid, linear).items() if not mask.is_empty}
    large = sorted(maps, key=lambda value: -float(maps[value].values.sum()))[:_MOST_STRUCTURES]
    structures = StructureFit(query, atlas, spacing_mm, size_mm, brightness=brightness)
    masks = {n: maps[n] for n in sorted(large) if (maps[n].values >= INSIDE).sum() >= _FEWEST_VOXELS}
    # A GPU works on one structure at a time.
    most = _MOST_PARALLEL if device == "cpu" else 1
    found = dict(zip(masks, parallel_map(structures.fit, masks.values(), most=most), strict=True))
    matched = {value: one for value, one in found.items() if one is not None}
    blended = _blend(list(matched.values()), size_mm / spacing_mm) if matched else None
    return Search(
        None if blended is None else field_from_voxels(grid, blended),
        {value: one.place for value, one in matched.items()},
        _contrast_difference(query, atlas, masks, found),
    )


def _contrast_difference(
    query: Level, atlas: Level, masks: Mapping[int, LocalMap], found: Mapping[int, _StructureMap | None]
) -> float:
    """Mean difference of the structures' median brightness; see :class:`Search`."""
    images = [level.image[0, 0].cpu().numpy() for level in (query, atlas)]
    differences, weights = [], []
    for value, mask in masks.items():
        one, whole = found[value], mask.on_box((0, 0, 0), images[0].shape)
        there = (whole if one is None else one.mask) >= INSIDE
        if there.any():
            medians = [
                float(np.median(image[inside])) for image, inside in zip(images, (there, whole >= INSIDE), strict=True)
            ]
            differences.append(abs(medians[0] - medians[1]))
            # An uncertain place says little; where brightness misled, contrast has changed.
            weights.append(float((whole >= INSIDE).sum()) * (1.0 if one is None else one.place.margin))
    return float(np.average(differences, weights=weights)) if sum(weights) else 0.0


@dataclass(frozen=True, eq=False)
class Patch:
    """A structure of the atlas with the tissue around it, on a box of the grid: ``weight``, (A, B, C).

    It is 1 in the structure, falling to 0 with the distance from it, and 0 outside the atlas's field of view.
    """

    box: tuple[slice, ...]
    weight: Tensor
    voxels: int  # of the structure itself


@dataclass(frozen=True, eq=False)
class _Sample:
    """The N voxels of a structure and its surroundings that are compared, in the warped atlas."""

    points: Tensor  # (N, 3), in voxels
    weight: Tensor  # (N,), 1 in sum
    image: Tensor  # (N,)
    mind: Tensor  # (12, N)
    centre: Tensor  # (3,), of rotation and stretch

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Points, (4, N), weights, intensities and MIND-SSC, (N, 12), for the compiled loop."""
        return with_ones(self.points), self.weight.numpy(), self.image.numpy(), self.mind.T.contiguous().numpy()

    def subsampled(self) -> _Sample:
        """Draw :data:`_ROUGH_POINTS` of the voxels, with the same centre."""
        drawn = _drawn(len(self.weight), _ROUGH_POINTS).to(self.weight.device)
        weight = self.weight[drawn]
        return _Sample(self.points[drawn], weight / weight.sum(), self.image[drawn], self.mind[:, drawn], self.centre)


class StructureFit:
    """Match structures of the warped atlas in the query, on one grid: at all translations, then by linear maps.

    ``size_mm`` is the cube root of the field of view's volume; ``brightness`` as of :func:`fit`.
    """

    def __init__(self, query: Level, atlas: Level, spacing_mm: float, size_mm: float, *, brightness: bool) -> None:
        self._brightness, self._spacing_mm = brightness, spacing_mm
        self._surroundings_mm = max(_SURROUNDINGS_FRACTION * size_mm, spacing_mm)
        self._prior_voxels = _PRIOR_FRACTION * size_mm / spacing_mm
        self._reach = max(1, int(np.ceil(_REACH * self._prior_voxels)))
        steps = (torch.arange(-self._reach, self._reach + 1, device=query.image.device) / self._prior_voxels) ** 2
        self._prior = 0.5 * (steps[:, None, None] + steps[None, :, None] + steps[None, None, :])
        # What lies outside the query is zero in every channel, and counted by the channel of ones.
        seen, mind = torch.ones_like(query.image), mind_ssc(query.image)
        self._query = torch.cat((query.image, seen, mind), dim=1)
        # With a border of zeros for the compiled loops.
        padded = F.pad(self._query, [1] * 6)[0].cpu()
        self._padded = *padded[:2].numpy(), padded[2:].movedim(0, -1).contiguous().numpy()
        self._scene = F.pad(torch.cat((query.image, query.image**2, seen, mind), dim=1), [self._reach] * 6)[0]
        self._scene_mind_norm = self._scene[3:].pow(2).sum(dim=0)
        self._atlas_image, self._atlas_mind = atlas.image[0, 0], mind_ssc(atlas.image)[0]
        self._atlas_inside = atlas.inside[0, 0]

    def patch(self, mask: LocalMap) -> Patch | None:
        """Cut out the patch of a structure; None if it is outside the atlas's field of view."""
        margin = int(np.ceil(self._surroundings_mm / self._spacing_mm))
        start = [max(0, first - margin) for first in mask.start]
        stop = [min(n, last + margin) for last, n in zip(mask.stop, self._atlas_image.shape, strict=True)]
        distance_mm = ndimage.distance_transform_edt(mask.on_box(start, stop) < 0.5) * self._spacing_mm
        closeness = np.clip(1 - distance_mm / self._surroundings_mm, 0, 1).astype(np.float32)
        box = tuple(map(slice, start, stop))
        weight = torch.from_numpy(closeness).to(self._atlas_image.device) * self._atlas_inside[box]
        voxels = int((mask.values >= INSIDE).sum())
        return Patch(box, weight, voxels) if float(weight.sum()) > 0 else None

    def candidates(self, patch: Patch, count: int) -> Tensor:
        """Find the ``count`` best translations from warped atlas to query: lowest minima, (n, 3) voxels, best first."""
        cost = self._costs(patch)
        lowest = -F.max_pool3d(-cost[None, None], 2 * _NEIGHBOURHOOD + 1, stride=1, padding=_NEIGHBOURHOOD)[0, 0]
        places = torch.nonzero(cost == lowest)
        order = torch.argsort(cost[places.unbind(dim=1)], stable=True)[:count]
        return (places[order] - self._reach).float()

    def _costs(self, patch: Patch) -> Tensor:
        """Cost of every translation within reach, (2 reach + 1) cubed."""
        weight = patch.weight / patch.weight.sum()
        image, mind = self._atlas_image[patch.box], self._atlas_mind[:, *patch.box]
        window = tuple(slice(part.start, part.stop + 2 * self._reach) for part in patch.box)
        query, shifts = self._scene[:, *window], slice(2 * self._reach + 1)
        size = [next_fast_len(n, real=True) for n in query.shape[1:]]
        spectrum = partial(torch.fft.rfftn, s=size, dim=(-3, -2, -1))

        def at_shifts(product: Tensor) -> Tensor:
            costs: Tensor = torch.fft.irfftn(product, s=size)[shifts, shifts, shifts]
            return costs

        kernel, scene = spectrum(weight).conj(), spectrum(query)
        mean, square, seen = (at_shifts(kernel * scene[channel]) for channel in range(3))
        cross = kernel * spectrum(self._scene_mind_norm[window])
        for channel in range(len(mind)):
            cross = cross - 2 * spectrum(weight * mind[channel]).conj() * scene[3 + channel]
        cost = at_shifts(cross) + (weight * mind.pow(2).sum(dim=0)).sum()
        cost = cost + _OUTSIDE_PENALTY * (1 - seen) + _PRIOR_WEIGHT * self._prior
        if not self._brightness:
            return cost
        product = at_shifts(spectrum(weight * image).conj() * scene[0])
        own_mean, own_square = (weight * image).sum(), (weight * image**2).sum()
        variance = (square - mean**2).clamp_min(0) * (own_square - own_mean**2).clamp_min(0)
        correlation = (product - mean * own_mean) / torch.sqrt(variance + _VARIANCE_FLOOR)
        squared_difference = square - 2 * product + own_square
        return cost + _CORRELATION_WEIGHT * (1 - correlation) + _INTENSITY_WEIGHT * squared_difference

    def fit(self, mask: LocalMap) -> _StructureMap | None:
        """Fit the map of a structure of the warped atlas: the best of those from all candidate places.

        None if the structure is out of the atlas's view or the best map takes it out of the query's, or if MIND-SSC
        alone is lower without any map than with the best one or at its first translation: brightness was misleading.
        """
        patch = self.patch(mask)
        found = None if patch is None else self._best(patch, self.candidates(patch, _CANDIDATES))
        if found is None:
            return None
        to_query, place = found
        back = np.linalg.inv(to_query)
        whole = mask.on_box((0, 0, 0), self._query.shape[2:])
        moved = ndimage.affine_transform(whole, back[:3, :3], back[:3, 3], order=1)
        return _StructureMap(to_query, whole, moved.astype(np.float32), place) if moved.any() else None

    def _sample(self, patch: Patch) -> _Sample:
        """Compare all voxels with a weight, or :data:`_FINAL_POINTS` of them."""
        inside = torch.nonzero(patch.weight > 0)
        inside = inside[_drawn(len(inside), _FINAL_POINTS).to(inside.device)]
        weight = patch.weight[inside.unbind(dim=1)]
        weight = weight / weight.sum()
        points = inside + torch.tensor([side.start for side in patch.box], device=inside.device)
        centre = (points * weight[:, None]).sum(dim=0)
        points = off_centre(points, self._atlas_image.shape)
        image, mind = sample_points(self._atlas_image[None], points)[0], sample_points(self._atlas_mind, points)
        return _Sample(points, weight, image, mind, centre)

    def _best(self, patch: Patch, shifts: Tensor) -> tuple[NDArray[np.float64], Place] | None:
        """The best map from warped atlas to query, in voxels, and its place, from (n, 3) translations."""
        sample = self._sample(patch)
        start = torch.zeros((len(shifts) + 1, 12), device=shifts.device)
        start[:-1, :3] = shifts
        with torch.no_grad():
            at_start = self._terms(start, sample)[0]
        found, cost = self._fitted(start, sample.subsampled(), _ROUGH_ITERATIONS)
        kept = _distinct(found[:, :3], cost)
        found, cost = self._fitted(found[kept], sample, _FINAL_ITERATIONS)
        best = int(cost.argmin())
        with torch.no_grad():
            difference = float(self._terms(found[best : best + 1], sample)[0])
            matrix, offset = affine_maps(found[best : best + 1], sample.centre)
        unmoved = float(at_start[-1])
        if difference > unmoved or float(at_start[kept[best]]) > unmoved + _MIND_TOLERANCE:
            return None
        return homogeneous(matrix[0], offset[0]), self._place(found[:, :3], cost, patch.voxels ** (1 / 3))

    def _place(self, shifts: Tensor, cost: Tensor, size: float) -> Place:
        """Describe the best of (n, 3) translations and the best of those elsewhere; ``size`` of the structure."""
        best = int(cost.argmin())
        distance = (shifts - shifts[best]).norm(dim=1)
        elsewhere = torch.where(distance > _ELSEWHERE_SIZES * size, cost, torch.inf)
        second = int(elsewhere.argmin())
        is_there = bool(torch.isfinite(elsewhere[second]))
        return Place(
            float(shifts[best].norm()) * self._spacing_mm,
            float(cost[best]),
            float(cost[second]) if is_there else None,
            float(distance[second]) * self._spacing_mm if is_there else None,
        )

    def _fitted(self, start: Tensor, sample: _Sample, iterations: int) -> tuple[Tensor, Tensor]:
        """Fit linear maps from (n, 12) parameters; the parameters found, and their costs with the prior, (n,)."""
        shift, shape = (part.clone().requires_grad_(True) for part in (start[:, :3], start[:, 3:]))
        optimizer = Adam([shift, shape], [_SHIFT_STEP, _SHAPE_STEP])
        for _ in range(iterations):
            _, cost = self._terms(torch.cat((shift, shape), dim=1), sample)
            optimizer.step(torch.autograd.grad(cost.sum(), (shift, shape)))
        found = torch.cat((shift, shape), dim=1).detach()
        with torch.no_grad():
            cost = self._terms(found, sample)[1]
        return found, cost + _PRIOR_WEIGHT * 0.5 * (found[:, :3] / self._prior_voxels).pow(2).sum(dim=1)

    def _terms(self, parameters: Tensor, sample: _Sample) -> tuple[Tensor, Tensor]:
        """MIND-SSC difference and cost without the prior on the shift, (n,) each."""
        by_device = self._sums if parameters.device.type == "cpu" else self._sums_by_torch
        mind_difference, seen, mean, square, product = by_device(parameters, sample).unbind(dim=1)
        cost = mind_difference + _OUTSIDE_PENALTY * (1 - seen)
        penalties = (_ROTATION_PENALTY, _STRETCH_PENALTY, _SHEAR_PENALTY)
        for penalty, part in zip(penalties, parameters[:, 3:].split(3, dim=1), strict=True):
            cost = cost + penalty * part.pow(2).sum(dim=1)
        if not self._brightness:
            return mind_difference, cost
        own_mean, own_square = (sample.image * sample.weight).sum(), (sample.image**2 * sample.weight).sum()
        variance = (square - mean**2).clamp_min(0) * (own_square - own_mean**2)
        correlation = (product - mean * own_mean) / torch.sqrt(variance + _VARIANCE_FLOOR)
        squared_difference = square - 2 * product + own_square
        cost = cost + _CORRELATION_WEIGHT * (1 - correlation)
        return mind_difference, cost + _INTENSITY_WEIGHT * squared_difference

    def _sums(self, parameters: Tensor, sample: _Sample) -> Tensor:
        """Weighted sums over a sample moved by linear maps to the query, which fades to zero beyond its border.

        Squared MIND-SSC difference, field of view, the query's intensity, its square, its product with the sample's:
        (B, 5) float64. By a compiled loop.
        """

        def sums(numbers: Doubles) -> tuple[Doubles, Doubles]:
            maps, by_parameters = linear_maps(numbers, sample.centre)
            to_padded = np.ascontiguousarray((maps + ONE_VOXEL)[:, :3], dtype=np.float32)
            loop, count = partial(kernels.structure_sums, self._padded, sample.arrays, to_padded), len(sample.weight)
            found = sum(in_slabs(loop, count, count * len(maps)))
            return found[:, :, 0, 3], np.einsum("bkij,bpij->bkp", found[:, :, 1:], by_parameters[:, :, :3])

        return evaluate(parameters, sums)

    def _sums_by_torch(self, parameters: Tensor, sample: _Sample) -> Tensor:
        """The same by PyTorch, on any device."""
        matrix, offset = affine_maps(parameters, sample.centre)
        mapped = sample.points @ matrix.transpose(1, 2) + offset[:, None]
        shape = torch.tensor(self._query.shape[2:], dtype=torch.float32, device=mapped.device)
        where = ((mapped + 0.5) / shape * 2 - 1).flip(-1)[:, None, None]
        volumes = self._query.expand(len(mapped), -1, -1, -1, -1)
        sampled = F.grid_sample(volumes, where, padding_mode="zeros", align_corners=False)[:, :, 0, 0]
        image, seen, difference = sampled[:, 0], sampled[:, 1], (sampled[:, 2:] - sample.mind).pow(2).sum(dim=1)
        compared = torch.stack((difference, seen, image, image**2, image * sample.image), dim=1)
        return (compared * sample.weight).sum(dim=2, dtype=torch.float64)


def _drawn(count: int, most: int) -> Tensor:
    """Indices of all of ``count`` items, or of ``most`` of them drawn at random (with a fixed seed), in order."""
    if count <= most:
        return torch.arange(count)
    return torch.from_numpy(np.sort(np.random.default_rng(0).choice(count, most, replace=False)))


def _distinct(shifts: Tensor, cost: Tensor) -> list[int]:
    """Indices of the best of (n, 3) translations in voxels, best first, none near a better one; the last always."""
    kept: list[int] = []
    for n in torch.argsort(cost, stable=True).tolist():
        if len(kept) < _FINALISTS and all(float((shifts[n] - shifts[m]).norm()) > _APART_VOXELS for m in kept):
            kept.append(n)
    last = len(shifts) - 1
    return kept if last in kept else [*kept, last]


def _blend(structures: list[_StructureMap], size: float) -> NDArray[np.float32]:
    """One smooth displacement from query to warped atlas, (3, I, J, K) voxels; ``size`` of the field of view in voxels.

    Where the maps of others lead from elsewhere to a structure, as at the place it would have without its own map, it
    would be found twice: its own map holds there too, and leads past it.
    """
    nodes = np.indices(structures[0].mask.shape, dtype=np.float32)
    masks = [one.mask for one in structures]
    displacement = _blended(structures, masks, size)
    for n, one in enumerate(structures):
        found = ndimage.map_coordinates(one.atlas_mask, nodes + displacement, order=1, mode="constant")
        masks[n] = np.where((found >= _MAPPED_FRACTION) & (one.mask < _OUTSIDE_FRACTION), np.float32(1), one.mask)
    return _blended(structures, masks, size)


def _blended(structures: list[_StructureMap], masks: list[NDArray[np.float32]], size: float) -> NDArray[np.float32]:
    """Blend the structures' maps, each of which holds in its mask, to one smooth displacement.

    A mean of the structures' maps weighted by nearness holds between and around them. Near two structures it is right
    for neither: what each still lacks within itself is added, smoothed by narrower and narrower Gaussians.
    """
    shape = structures[0].mask.shape
    nodes = np.indices(shape, dtype=np.float32)
    least = min(one.place.cost for one in structures)
    trust = [np.float32(np.exp(_DISTRUST * (least - one.place.cost))) for one in structures]

    def smooth(values: NDArray[np.float32], fraction: float) -> NDArray[np.float32]:
        return np.asarray(ndimage.gaussian_filter(values, fraction * size, truncate=3))

    def wanted(one: _StructureMap, axis: int) -> NDArray[np.float32]:
        """Displacement along one axis that the structure's own map asks for, everywhere."""
        back = np.linalg.inv(one.to_query) - np.eye(4)
        return np.asarray(np.float32(back[axis, 3]) + np.tensordot(back[axis, :3].astype(np.float32), nodes, axes=1))

    displacement, nearness = np.zeros((3, *shape), np.float32), np.zeros(shape, np.float32)
    for one, mask, trusted in zip(structures, masks, trust, strict=True):
        # Large organs count more, not in proportion to their volume: a kidney keeps its own map beside the liver.
        influence = smooth(mask * (trusted / np.sqrt(one.mask.sum())), _BLENDING_FRACTION)
        nearness += influence
        for axis in range(3):
            displacement[axis] += influence * wanted(one, axis)
    displacement /= nearness + np.float32(_FADING) * nearness.max()
    weights, nothing = [a * mask for a, mask in zip(trust, masks, strict=True)], np.zeros(shape, np.float32)
    for fraction in _CORRECTION_FRACTIONS:
        weight = smooth(sum(weights, nothing), fraction)
        weight += np.float32(_CORRECTION_FADING) * weight.max()
        for axis in range(3):
            lacking = (m * (wanted(one, axis) - displacement[axis]) for m, one in zip(weights, structures, strict=True))
            displacement[axis] += smooth(sum(lacking, nothing), fraction) / weight
    return displacement
