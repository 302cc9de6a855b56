"""Built-in model: refines a prompt by the appearance and the edges of the query.

It has no weights and nothing in it is random. Per structure, on a crop around the prompt:

1. *Prior.* The signed distance to the prompt's border, divided by the expected error, gives log-odds, which are bounded
   inside the prompt.
2. *Appearance.* Intensity densities inside and outside, learned from the prompt by expectation maximisation with that
   prior. Three views are averaged: intensity over the crop; smoothed intensity with its local deviation; intensity in
   the neighbourhood, on a bilateral grid (Chen, Paris, Durand 2007).
3. *Border.* A Markov random field with contrast-sensitive couplings (Boykov, Jolly 2001), solved by mean field.

Structures marked as tubular are then followed beyond the prompt (:mod:`.tubes`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ..core.geometry import Grid
from ..core.image import Volume
from ..core.mask import LocalMap, signed_distance_mm
from ..core.parallel import parallel_map
from ..prompts import INSIDE, BoxPrompt, ClickPrompt, MaskPrompt, Prompt, RegionPrompt, crop_mask, inside_scan
from ..settings import ModelSettings
from .base import OnPrompt, in_turn, usable_device
from .tubes import follow_branches

Field = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]

#: Expected error of a prompt's border, as a fraction of the structure's radius and at most in mm: of a registered mask,
#: and of a ball or ellipsoid in place of an unknown shape (about twice that, not tuned).
_MASK_ERROR, _SHAPE_ERROR = (0.2, 6.0), (0.4, 12.0)
#: The same of a registered vessel, whatever its radius.
_TUBE_ERROR = (np.inf, 2.5)
#: Smallest expected error, in mm and in voxels: labels are not drawn better.
_SMALLEST_ERROR_MM, _SMALLEST_ERROR_VOXELS = 1.0, 0.5
#: Reach outside the prompt, in expected errors and in voxels: beyond, the prior is below 3 %.
_REACH_ERRORS, _REACH_VOXELS = 3.0, 2.5
#: Log-odds of the prior per expected error of distance.
_PRIOR_SLOPE = 1.2
#: Largest log-odds of the prior inside the prompt, beyond a voxel of its border: registration can misplace whole parts.
_LARGEST_PRIOR = 0.5
#: Weight of the evidence against the prior; better prompts need less.
_EVIDENCE_WEIGHT = 1.5
#: Fraction of each density that is taken from the mean of both: bounds the evidence of one view to log 9.
_SHARED_APPEARANCE = 0.2
#: Sweeps of expectation maximisation and of mean field.
_EM_SWEEPS, _FIELD_SWEEPS = 3, 8
#: Sigma in mm of the smoothed intensity and its local deviation, and of the neighbourhood.
_TEXTURE_MM, _NEIGHBOURHOOD_MM = 2.0, 20.0
#: Voxels on the rarer side at which a neighbourhood gets half of its weight; not tuned.
_NEIGHBOURHOOD_VOXELS = 20.0
#: Log-odds a voxel gets from one similar neighbour at the smallest spacing; larger values erode thin structures.
_COUPLING = 1.0
#: Standard deviations of noise after which a step counts as an edge.
_CONTRAST_NOISES = 2.0
#: Coupling that remains across the strongest edge, so that single voxels do not stand alone.
_SMALLEST_COUPLING = 0.02
#: Smallest noise, as a fraction of the crop's range: the median step of 8-bit and masked scans is 0.
_SMALLEST_NOISE = 0.02
#: Bound of the log-odds before coupling, so that neighbours can outvote a voxel.
_LARGEST_LOG_ODDS = 4.0
#: Probability of parts that do not touch the prompt: just not inside.
_STRAY_PROBABILITY = 0.49

#: Structures predicted in parallel: each takes some 100 bytes a voxel of its crop.
_MOST_PARALLEL = 2
#: Percentiles of the crop's intensities between which bins are laid.
_RANGE_PERCENT = (0.5, 99.5)
#: Bins of the three views (along both axes of the second), and sigma of their smoothing in bins.
_BINS, _TEXTURE_BINS, _NEIGHBOURHOOD_BINS = 64, 24, 16
_BINS_SMOOTHING, _TEXTURE_SMOOTHING, _NEIGHBOURHOOD_SMOOTHING = 1.5, 1.0, 0.8
#: Bins of the prior, so that the cost of the histograms does not grow with the sweeps.
_PRIOR_BINS = 24
#: Keeps the prior off 0 and 1.
_LEAST_PRIOR = 1e-3

#: Radius in mm in which intensities around a click are learned, and up to which the structure's radius is sought.
_CLICK_SEED_MM, _CLICK_REACH_MM = 3.0, 40.0
#: Standard deviations within which a voxel is similar to the seed; smallest fraction of such voxels in a ball's shell.
_CLICK_DEVIATIONS, _CLICK_SIMILAR = 2.5, 0.5
#: Smallest standard deviation of the seed, as a fraction of the crop's range: of few voxels it comes out too small.
_CLICK_LEAST_DEVIATION = 0.06


@dataclass(frozen=True, eq=False)
class BuiltinSegmenter:
    """Model behind :class:`~atlassegfm.models.Segmenter`; the random field is solved on ``device``."""

    device: torch.device
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, image: Volume) -> Volume:
        """Convert one scan (RAS-canonical array order) to float32."""
        return Volume(np.asarray(image.data, dtype=np.float32), image.grid)

    def predict(
        self, encoded: Volume, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Predict the structures independently; see :class:`~atlassegfm.models.Segmenter`."""

        def predict_one(numbered: tuple[int, Prompt]) -> tuple[int, LocalMap]:
            return numbered[0], self._predict_one(encoded, numbered[1])

        return dict(parallel_map(predict_one, in_turn(prompts, on_prompt), most=_MOST_PARALLEL))

    def _predict_one(self, image: Volume, prompt: Prompt) -> LocalMap:
        if isinstance(prompt, MaskPrompt | RegionPrompt):
            prompted = inside_scan(prompt.probability, image.grid.shape)
            if isinstance(prompt, MaskPrompt) and prompt.tubular and prompted[1].any():
                found = self._refine(image, prompted, _TUBE_ERROR)
                return follow_branches(image, prompted, _radius_mm(prompted[1], image.grid.spacing_mm), found)
            return self._refine(image, prompted, _MASK_ERROR)
        shape = _ball(image, prompt) if isinstance(prompt, ClickPrompt) else _ellipsoid(image, prompt)
        # The first round finds the structure from a shape that is not its own, the second its border.
        found = self._refine(image, shape, _SHAPE_ERROR)
        return self._refine(image, inside_scan(found, image.grid.shape), _MASK_ERROR)

    def _refine(
        self, image: Volume, prompted: tuple[NDArray[np.int64], Mask], expected_error: tuple[float, float]
    ) -> LocalMap:
        """Refine once; ``prompted`` is the first voxel (3,) of a box of the scan, and the mask on that box."""
        if not prompted[1].any():
            return LocalMap.empty()
        spacing_mm, shortest_mm = image.grid.spacing_mm, float(image.grid.spacing_mm.min())
        per_radius, largest_mm = expected_error
        error_mm = min(per_radius * _radius_mm(prompted[1], spacing_mm), largest_mm)
        error_mm = max(error_mm, _SMALLEST_ERROR_MM, _SMALLEST_ERROR_VOXELS * shortest_mm)
        reach_mm = max(_REACH_ERRORS * error_mm, _REACH_VOXELS * shortest_mm)
        first, crop = crop_mask(*prompted, np.ceil(reach_mm / spacing_mm).astype(np.int64), image.grid.shape)

        largest = max(_LARGEST_PRIOR, _PRIOR_SLOPE * shortest_mm / error_mm)
        # Farther inside, the prior has its largest log-odds; farther outside, nothing is looked at.
        limit_mm = max(reach_mm, largest * error_mm / _PRIOR_SLOPE)
        distance_mm = signed_distance_mm(crop, spacing_mm, limit_mm)
        near = distance_mm > -reach_mm
        prior = np.minimum(distance_mm[near] * np.float32(_PRIOR_SLOPE / error_mm), np.float32(largest))
        del distance_mm
        data = _normalised(image.data[tuple(map(slice, first, first + crop.shape))], near)
        log_odds = np.full(crop.shape, -_LARGEST_LOG_ODDS)
        posterior = prior + _EVIDENCE_WEIGHT * _evidence(data, near, prior, spacing_mm)
        log_odds[near] = posterior.clip(-_LARGEST_LOG_ODDS, _LARGEST_LOG_ODDS)
        probability = _mean_field(log_odds, _couplings(data, near, spacing_mm), self.device)
        probability[~near] = 0
        parts, _ = ndimage.label(probability >= INSIDE)
        stray = (parts > 0) & ~np.isin(parts, np.unique(parts[crop]))
        probability[stray] = _STRAY_PROBABILITY
        return LocalMap(tuple(first.tolist()), probability)


def load(device: str, _settings: ModelSettings, _weights: Callable[[], Path]) -> BuiltinSegmenter:
    """Load the model onto "cpu" or "cuda"; ModelError if there is no such device."""
    return BuiltinSegmenter(usable_device(device))


def _ellipsoid(image: Volume, prompt: BoxPrompt) -> tuple[NDArray[np.int64], Mask]:
    """The ellipsoid that touches the box from inside, as long across its slice as the mean of its other two axes."""
    start, stop = np.array(prompt.start), np.array(prompt.stop)
    if (stop <= start).any():
        return np.zeros(3, np.int64), np.zeros((0, 0, 0), bool)
    half_mm = (stop - start) / 2 * image.grid.spacing_mm
    half_mm[prompt.across] = max(half_mm[prompt.across], np.sqrt(np.delete(half_mm, prompt.across).prod()))
    first, squared = _squared_distance(image.grid, (start + stop - 1) / 2, half_mm)
    return first, squared <= 1


def _ball(image: Volume, prompt: ClickPrompt) -> tuple[NDArray[np.int64], Mask]:
    """A ball around the click, as large as most voxels of its surface are similar to its middle."""
    click = np.array(prompt.ijk)
    if (click < 0).any() or (click >= image.grid.shape).any():
        return np.zeros(3, np.int64), np.zeros((0, 0, 0), bool)
    first, squared = _squared_distance(image.grid, click, np.full(3, _CLICK_REACH_MM))
    data = _normalised(image.data[tuple(map(slice, first, first + squared.shape))], squared <= 1)
    distance_mm = np.sqrt(squared) * _CLICK_REACH_MM
    # Shells as thick as a voxel: on thick slices those of the middle are made of in-plane neighbours.
    thickness_mm = float(image.grid.spacing_mm.min())
    seed = data[distance_mm <= max(_CLICK_SEED_MM, 1.5 * thickness_mm)]
    deviation = max(float(seed.std()), _CLICK_LEAST_DEVIATION)
    similar = np.abs(data - np.median(seed)) <= _CLICK_DEVIATIONS * deviation
    shell = np.rint(distance_mm / thickness_mm).astype(np.int64)
    shells = int(_CLICK_REACH_MM / thickness_mm)
    inside = shell < shells
    count = np.bincount(shell[inside], minlength=shells)
    fraction = np.bincount(shell[inside], similar[inside], minlength=shells) / np.maximum(count, 1)
    other = np.flatnonzero((fraction < _CLICK_SIMILAR) & (count > 0))
    radius = int(other[0]) if len(other) else shells
    return first, distance_mm <= max((radius - 0.5) * thickness_mm, thickness_mm)


def _squared_distance(grid: Grid, centre: NDArray[Any], scale_mm: Doubles) -> tuple[NDArray[np.int64], Doubles]:
    """First voxel (3,) of the box of the scan around a voxel, and squares of distances / ``scale_mm`` to it."""
    size = scale_mm / grid.spacing_mm
    first = np.clip(np.floor(centre - size).astype(np.int64), 0, grid.shape)
    last = np.clip(np.ceil(centre + size).astype(np.int64) + 1, first, grid.shape)
    i, j, k = (((np.arange(a, b) - c) / s) ** 2 for a, b, c, s in zip(first, last, centre, size, strict=True))
    return first, i[:, None, None] + j[None, :, None] + k[None, None, :]


def _radius_mm(mask: Mask, spacing_mm: Doubles) -> float:
    """Three times volume over surface: the radius of a ball, 1.5 times the thickness of a sheet."""
    padded = np.pad(mask, 1)
    faces_mm2 = sum(
        np.count_nonzero(np.diff(padded, axis=axis)) * float(np.delete(spacing_mm, axis).prod()) for axis in range(3)
    )
    # The faces of voxels have 1.5 times the area of the smooth surface they follow, averaged over directions.
    return float(3 * np.count_nonzero(mask) * spacing_mm.prod() / (faces_mm2 / 1.5))


def _normalised(image: Field, near: Mask) -> Field:
    """A copy in which most voxels that count lie in [0, 1], none beyond [-1, 2]: sums of squares stay exact."""
    low, high = np.percentile(image[near], _RANGE_PERCENT)
    if high <= low:
        return np.zeros(image.shape, np.float32)
    return np.asarray((image - np.float32(low)) / np.float32(high - low)).clip(-1, 2)


def _evidence(image: Field, near: Mask, prior: Field, spacing_mm: Doubles) -> Doubles:
    """(N,) log-likelihood ratio of the structure against its surroundings, 0 where appearance says nothing.

    Takes normalised intensities (I, J, K), the N voxels near the prompt, and their prior log-odds (N,).
    """
    inside = _sigmoid(prior).clip(_LEAST_PRIOR, 1 - _LEAST_PRIOR)
    value = _binned(image[near], _BINS)
    sigma = _TEXTURE_MM / spacing_mm
    mean = ndimage.gaussian_filter(image, sigma)
    variance = ndimage.gaussian_filter(image * image, sigma)[near] - mean[near] ** 2
    smoothed = _whole(_binned(mean[near], _TEXTURE_BINS))
    deviation = _whole(_binned(np.sqrt(variance.clip(0)), _TEXTURE_BINS))
    del mean, variance
    everywhere = _histogram_evidence(_whole(value), (_BINS,), inside, _BINS_SMOOTHING)
    texture = _histogram_evidence(
        smoothed * _TEXTURE_BINS + deviation, (_TEXTURE_BINS, _TEXTURE_BINS), inside, _TEXTURE_SMOOTHING
    )
    coarse = value * np.float32((_NEIGHBOURHOOD_BINS - 1) / (_BINS - 1))
    return np.asarray(everywhere + texture + _neighbourhood_evidence(coarse, near, inside, spacing_mm)) / 3


def _binned(values: Field, bins: int) -> Field:
    """Values to fractional bins, 0 to ``bins`` - 1."""
    low, high = np.percentile(values, _RANGE_PERCENT)
    if high <= low:
        return np.zeros(values.shape, np.float32)
    return np.asarray((values - np.float32(low)) * np.float32((bins - 1) / (high - low))).clip(0, bins - 1)


def _whole(bins: Field) -> NDArray[np.int64]:
    return np.rint(bins).astype(np.int64)


def _histogram_evidence(bin_of: NDArray[np.int64], shape: tuple[int, ...], inside: Field, smoothing: float) -> Doubles:
    """(N,) evidence by densities over the whole crop, on a histogram of the given shape."""
    bins = int(np.prod(shape))
    prior_of = np.minimum((inside * _PRIOR_BINS).astype(np.int64), _PRIOR_BINS - 1)
    counts = np.bincount(prior_of * bins + bin_of, minlength=_PRIOR_BINS * bins).reshape(_PRIOR_BINS, bins)
    mean_prior = np.bincount(prior_of, inside, _PRIOR_BINS) / np.maximum(counts.sum(axis=1), 1)
    log_odds = _logit(mean_prior.clip(_LEAST_PRIOR, 1 - _LEAST_PRIOR))[:, None]
    total = counts.sum(axis=0)
    evidence = np.zeros(bins)
    for _ in range(_EM_SWEEPS):
        of_inside = (counts * _sigmoid(log_odds + evidence)).sum(axis=0)
        one = ndimage.gaussian_filter(of_inside.reshape(shape), smoothing, mode="nearest").ravel()
        other = ndimage.gaussian_filter((total - of_inside).reshape(shape), smoothing, mode="nearest").ravel()
        evidence = _shrunk_log_ratio(one / max(one.sum(), 1e-9), other / max(other.sum(), 1e-9))
    return np.asarray(evidence[bin_of])


def _neighbourhood_evidence(value: Field, near: Mask, inside: Field, spacing_mm: Doubles) -> Doubles:
    """(N,) evidence by densities in the neighbourhood of each voxel, on a grid of place and intensity."""
    cell_mm = np.maximum(_NEIGHBOURHOOD_MM, spacing_mm)
    last = np.array(near.shape) - 1
    # Cells count from the middle of the crop: a flipped scan gives the flipped result. One more a side for the blur.
    reach = np.floor(last / 2 * spacing_mm / cell_mm + 0.5).astype(np.int64) + 1
    shape = (*(int(n) for n in 2 * reach + 1), _NEIGHBOURHOOD_BINS)
    place = np.empty((4, len(value)))
    cell = np.zeros(len(value), np.int64)
    for axis, index in enumerate(np.nonzero(near)):
        offset = (np.arange(near.shape[axis]) - last[axis] / 2) * (spacing_mm[axis] / cell_mm[axis])
        nearest = (np.sign(offset) * np.floor(np.abs(offset) + 0.5)).astype(np.int64)
        cell = cell * shape[axis] + (nearest + reach[axis])[index]
        place[axis] = (offset + reach[axis])[index]
    place[3] = value
    cell = cell * _NEIGHBOURHOOD_BINS + _whole(value)

    cells = int(np.prod(shape))
    sigma = (1.0, 1.0, 1.0, _NEIGHBOURHOOD_SMOOTHING)
    total = np.bincount(cell, minlength=cells)
    log_odds = _logit(inside)
    of_inside = np.bincount(cell, inside, cells)
    for sweep in range(_EM_SWEEPS):
        one = ndimage.gaussian_filter(of_inside.reshape(shape), sigma, mode="constant")
        other = ndimage.gaussian_filter((total - of_inside).reshape(shape), sigma, mode="constant")
        number, other_number = one.sum(axis=3, keepdims=True), other.sum(axis=3, keepdims=True)
        fewer = np.minimum(number, other_number)
        trust = fewer / (fewer + _NEIGHBOURHOOD_VOXELS)
        evidence = trust * _shrunk_log_ratio(
            one / (number + _NEIGHBOURHOOD_VOXELS), other / (other_number + _NEIGHBOURHOOD_VOXELS)
        )
        if sweep + 1 < _EM_SWEEPS:
            of_inside = np.bincount(cell, _sigmoid(log_odds + evidence.ravel()[cell]), cells)
    return np.asarray(ndimage.map_coordinates(evidence, place, order=1, mode="nearest"))


def _shrunk_log_ratio(inside: Doubles, outside: Doubles) -> Doubles:
    """Log of the ratio of two densities, each mixed with the mean of both."""
    own, shared = 1 - _SHARED_APPEARANCE, _SHARED_APPEARANCE * ((inside + outside) / 2 + 1e-9)
    return np.asarray(np.log((own * inside + shared) / (own * outside + shared)))


def _couplings(image: Field, near: Mask, spacing_mm: Doubles) -> list[Field]:
    """For each axis, log-odds that neighbouring voxels along it add to each other."""
    steps = [np.diff(image, axis=axis) for axis in range(3)]
    # The axis with the smallest median step shows noise best: thick slices differ by anatomy.
    medians = []
    for axis, step in enumerate(steps):
        along = near.swapaxes(0, axis)
        counted = step.swapaxes(0, axis)[along[:-1] & along[1:]]
        if len(counted):
            medians.append(float(np.median(np.abs(counted))))
    # The median of |difference| of two voxels with normal noise is 0.954 standard deviations of the noise.
    noise = max(min(medians, default=0.0) / 0.954, _SMALLEST_NOISE)
    couplings = []
    for axis, step in enumerate(steps):
        similarity = np.exp(-0.25 * (step / np.float32(_CONTRAST_NOISES * noise)) ** 2)
        strongest = _COUPLING * float(spacing_mm.min() / spacing_mm[axis])
        couplings.append((strongest * (_SMALLEST_COUPLING + (1 - _SMALLEST_COUPLING) * similarity)).astype(np.float32))
    return couplings


def _mean_field(log_odds: Doubles, couplings: list[Field], device: torch.device) -> Field:
    """(I, J, K) marginal probabilities of the random field."""
    own = torch.from_numpy(log_odds).to(device, torch.float32)
    links = [torch.from_numpy(coupling).to(device, torch.float32) for coupling in couplings]
    # Expected sign of each voxel, -1 outside and 1 inside.
    sign = torch.tanh(own / 2)
    for _ in range(_FIELD_SWEEPS):
        field = own.clone()
        for axis, link in enumerate(links):
            last = sign.shape[axis] - 1
            field.narrow(axis, 0, last).addcmul_(link, sign.narrow(axis, 1, last))
            field.narrow(axis, 1, last).addcmul_(link, sign.narrow(axis, 0, last))
        sign = field.div_(2).tanh_()
    return sign.add_(1).div_(2).clamp_(0, 1).cpu().numpy()


def _sigmoid(log_odds: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(0.5 * (1 + np.tanh(log_odds / 2)))


def _logit(probability: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.log(probability / (1 - probability)))
