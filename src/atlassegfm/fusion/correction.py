"""Correcting fused masks where errors simulated on the atlas have taught how: what makes the default gate.

The paper's gate (:mod:`atlassegfm.fusion`) mixes two masks, and can only choose between them. This one goes on from its
mixture: near the border, a small network adds to the log-odds of each voxel what it has learned on the atlas's own
scan, where warped labels were simulated (:mod:`atlassegfm.simulation`), the model has answered, and the truth is known:
how far to believe the warped atlas beside the model, where this atlas's annotator drew the border of this
structure, and how the image looks there. It sees nothing absolute, neither intensities nor places: intensities are told
in standard deviations of what lies inside and around the mask, distances in expected errors, so that what was learned
on one scan holds on the next.

Over the built-in model's answers it gained, in mean Dice on kept registrations: Hippocampus (17 pairs) 0.850
to 0.855, Cardiac (10) 0.791 to 0.796, Abd-CT (liver, spleen, kidneys; 10) 0.792 to 0.798, Abd-MR (10) 0.847 to 0.850. A
prototype at full resolution came to 0.855 / 0.795 / - / 0.848; without inputs of the image to 0.854 / 0.796 / - /
0.847; with the voxel's place in the structure beside all to 0.856 / 0.797 / 0.800 / 0.847; a logistic regression in
its place to 0.853 / 0.796 / 0.794 / 0.846. ``atlassegfm benchmark`` scores the paper's gate beside this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit, logit

from ..core.image import Volume
from ..core.mask import LocalMap, ball_radius_mm, signed_distance_mm
from ..prompts import INSIDE

#: Of float32; numpy cannot say of most of its results that they stay so.
Field = NDArray[Any]


#: Expected error of a border: this share of the structure's radius (of a ball of the same volume), within these limits;
#: as the built-in model takes it.
_ERROR_PER_RADIUS = 0.2


_SMALLEST_ERROR_MM = 1.0


_LARGEST_ERROR_MM = 6.0


#: Corrected is what lies within this many expected errors of the warped atlas's border, or this many of the mask's.
_ATLAS_REACH = 3.0


_MASK_REACH = 2.0


#: Voxels around both masks that are looked at, mm.
_MARGIN_MM = 6.0


#: A structure whose box has more voxels is looked at on a grid of every second voxel along its finest axes, or fewer.
_MOST_VOXELS = 1_000_000


#: Standard deviations of the windows the image is seen through, mm.
_WINDOWS_MM = (0.0, 1.5, 4.0)


#: That of the window through which the gradient across the border is seen.
_GRADIENT_WINDOW_MM = 1.5


#: Log-odds are kept within those of this probability and its complement.
_LEAST_PROBABILITY = 0.01


#: Share of what was learned that is applied: simulated errors are alike, those of registrations less so. Of the
#: prototype, all of it gave 0.853 / 0.796 / 0.837 (Hippocampus, Cardiac, Abd-MR), 0.7 of it 0.797 / 0.848 (Cardiac,
#: Abd-MR), half of it 0.855 / 0.795 / 0.848.
_APPLIED = 0.5


#: Width of both hidden layers, and numbers that stand for a structure.
_HIDDEN = 32


_CODE = 8


#: Training: steps of AdamW, step size (highest of one cycle), decay of weights, voxels of an example and examples in a
#: step, and noise added to the inputs in their standard deviations. Noise of 0.1 / 0.3 / 0.6 gave 0.849 / 0.848 / 0.847
#: on Abd-MR and 0.797 / 0.795 / 0.794 on Cardiac at half strength, 0.820 / 0.837 / 0.843 and 0.798 / 0.796 / 0.794 at
#: full strength.
_STEPS = 400


_LEARNING_RATE = 3e-3


_DECAY = 1e-3


_VOXELS = 1000


_EXAMPLES = 6


_NOISE = 0.3


#: Voxels kept of an example.
_KEPT = 5000


#: Added to standard deviations, so that inputs that are the same everywhere on the atlas do not explode on a query.
_LEAST_DEVIATION = 0.05


#: Voxels that are corrected at once.
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one simulated mask of one structure can teach.

    Parameters
    ----------
    number : int
        Of the structure, from 1 on.
    features : array, (N, F) float32
        Of N voxels near the border.
    log_odds : array, (N,) float32
        Of the mask to be corrected.
    truth : array, (N,) float32
        Share of the voxel inside the structure, in [0, 1].
    """

    number: int
    features: Field
    log_odds: Field
    truth: Field


@dataclass(frozen=True, eq=False)
class Correction:
    """A trained network of two hidden layers.

    Parameters
    ----------
    mean, deviation : array, (F,) float32
        Of the features in training.
    codes : array, (structures, 8) float32
        Numbers that stand for each structure; that of number n is in row n - 1.
    weights, biases : tuple of array, 3 each, float32
        Of the layers: (F + 8, 32), (32, 32), (32, 1) and (32,), (32,), (1,).
    """

    mean: Field
    deviation: Field
    codes: Field
    weights: tuple[Field, Field, Field]
    biases: tuple[Field, Field, Field]

    def __post_init__(self) -> None:
        features = self.mean.shape[0]
        shapes = [one.shape for one in (self.deviation, *self.weights, *self.biases)]
        expected = [(features,), (features + _CODE, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, 1)]
        if shapes != [*expected, (_HIDDEN,), (_HIDDEN,), (1,)] or self.codes.shape[1:] != (_CODE,):
            raise ValueError(f"arrays of shapes {shapes} and {self.codes.shape} are no correction's")

    def __eq__(self, other: object) -> bool:
        """Whether it gives the same, number for number."""
        if not isinstance(other, Correction):
            return NotImplemented
        pairs = zip(self.arrays().values(), other.arrays().values(), strict=True)
        return all(np.array_equal(one, another) for one, another in pairs)

    def __hash__(self) -> int:
        return hash(tuple(one.tobytes() for one in self.arrays().values()))

    @property
    def fitted(self) -> int:
        """How many numbers were fitted: codes, weights and biases."""
        return sum(one.size for one in (self.codes, *self.weights, *self.biases))

    def arrays(self) -> dict[str, Field]:
        """All there is to it, by name; :meth:`of_arrays` takes it back."""
        layers = {f"weights_{n}": one for n, one in enumerate(self.weights)}
        layers |= {f"biases_{n}": one for n, one in enumerate(self.biases)}
        return {"mean": self.mean, "deviation": self.deviation, "codes": self.codes, **layers}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Correction:
        """From what :meth:`arrays` gave.

        Raises
        ------
        KeyError, ValueError
            If an array is missing or of another shape.
        """
        mean, deviation, codes = (np.asarray(arrays[name], np.float32) for name in ("mean", "deviation", "codes"))
        one, two, three = (np.asarray(arrays[f"weights_{n}"], np.float32) for n in range(3))
        first, second, third = (np.asarray(arrays[f"biases_{n}"], np.float32) for n in range(3))
        return cls(mean, deviation, codes, (one, two, three), (first, second, third))

    def apply(self, image: Volume, number: int, atlas: LocalMap, masks: Mapping[int, LocalMap]) -> LocalMap:
        """Correct one structure.

        Parameters
        ----------
        image : Volume
            The scan.
        number : int
            Of the structure.
        atlas : LocalMap
            Its warped mask on the scan's grid, in [0, 1].
        masks : mapping of int to LocalMap
            Of this structure and of others, by number, as they are before any of them is corrected; in [0, 1].

        Returns
        -------
        LocalMap
            float32 in [0, 1].
        """
        mask = masks[number]
        view = _look(image, number, atlas, masks)
        if view is None:
            return mask
        added = np.zeros(view.band.shape, np.float32)
        added[view.band] = _APPLIED * self._log_odds(view.features, number)
        values = mask.on_box(view.start, view.stop)
        odds = _log_odds(values) + _spread(added, view.strides, values.shape)
        touched = _spread(view.band.astype(np.float32), view.strides, values.shape) > 0
        return LocalMap(view.start, np.where(touched, expit(odds), values).astype(np.float32))

    def _log_odds(self, features: Field, number: int) -> Field:
        """(N,) to be added; ``features`` is (N, F)."""
        result = np.empty(len(features), np.float32)
        # The code is the same for all voxels, and part of the bias.
        from_code = self.codes[number - 1] @ self.weights[0][-_CODE:] + self.biases[0]
        for first in range(0, len(features), _CHUNK):
            hidden = (features[first : first + _CHUNK] - self.mean) / self.deviation
            hidden = np.maximum(hidden @ self.weights[0][:-_CODE] + from_code, 0)
            hidden = np.maximum(hidden @ self.weights[1] + self.biases[1], 0)
            result[first : first + _CHUNK] = (hidden @ self.weights[2] + self.biases[2])[:, 0]
        return result


def lesson(
    image: Volume, number: int, atlas: LocalMap, masks: Mapping[int, LocalMap], truth: LocalMap, *, seed: Sequence[int]
) -> Lesson | None:
    """What one simulated mask teaches.

    Parameters
    ----------
    image : Volume
        The atlas's scan.
    number : int
        Of the structure.
    atlas : LocalMap
        The simulated mask, on the scan's grid.
    masks : mapping of int to LocalMap
        As of :meth:`Correction.apply`.
    truth : LocalMap
        The atlas's label, 0 or 1.
    seed : sequence of int
        Decides which voxels are kept where there are many.

    Returns
    -------
    Lesson or None
        None if there is no border to look at.
    """
    view = _look(image, number, atlas, masks)
    if view is None:
        return None
    odds = _log_odds(masks[number].on_box(view.start, view.stop))
    true = truth.on_box(view.start, view.stop)
    voxels = np.random.default_rng(list(seed)).permutation(len(view.features))[:_KEPT]
    coarse = (_thinned(array, view.strides)[view.band][voxels] for array in (odds, true))
    return Lesson(number, view.features[voxels], *coarse)


def train_correction(lessons: Iterable[Lesson], structures: int, *, seed: int) -> Correction | None:
    """Train one network for all structures.

    Parameters
    ----------
    lessons : iterable of Lesson
        Some of each structure.
    structures : int
        How many there are; numbers go from 1 to this.
    seed : int
        Same seed, same network.

    Returns
    -------
    Correction or None
        None without lessons.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, relu

    given = list(lessons)
    if not given:
        return None
    stacked = np.concatenate([one.features for one in given])
    mean, deviation = stacked.mean(axis=0), stacked.std(axis=0) + np.float32(_LEAST_DEVIATION)
    del stacked
    taught = [
        (torch.from_numpy((one.features - mean) / deviation), *map(torch.from_numpy, (one.log_odds, one.truth)))
        for one in given
    ]
    chance, draw = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    widths = (len(mean) + _CODE, _HIDDEN, _HIDDEN)
    codes = torch.randn((structures, _CODE), generator=chance)
    # PyTorch's own start of a linear layer: uniform within one over the square root of its inputs.
    weights, biases = [], []
    for inputs in widths[:-1]:
        bound = inputs**-0.5
        weights.append((torch.rand((inputs, _HIDDEN), generator=chance) * 2 - 1) * bound)
        biases.append((torch.rand(_HIDDEN, generator=chance) * 2 - 1) * bound)
    # The last layer starts at nothing to correct.
    weights.append(torch.zeros((_HIDDEN, 1)))
    biases.append(torch.zeros(1))
    parameters = [codes, *weights, *biases]
    for parameter in parameters:
        parameter.requires_grad_()
    optimiser = torch.optim.AdamW(parameters, _LEARNING_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=_STEPS)
    for _ in range(_STEPS):
        features: list[torch.Tensor] = []
        odds: list[torch.Tensor] = []
        true: list[torch.Tensor] = []
        numbers = []
        for which in draw.integers(0, len(taught), _EXAMPLES):
            voxels = torch.from_numpy(draw.integers(0, len(taught[which][0]), _VOXELS))
            for batch, values in zip((features, odds, true), taught[which], strict=True):
                batch.append(values[voxels])
            numbers.append(given[which].number - 1)
        seen = torch.cat(features)
        seen = seen + _NOISE * torch.randn(seen.shape, generator=chance)
        # One row an example, spread over its voxels: sums over a row picked for every voxel depend on the threads.
        own = codes[torch.tensor(numbers)][:, None].expand(-1, _VOXELS, -1).reshape(-1, _CODE)
        hidden = torch.cat((seen, own), dim=1)
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden = relu(hidden @ weight + bias)
        corrected = torch.cat(odds) + (hidden @ weights[-1] + biases[-1])[:, 0]
        loss = binary_cross_entropy_with_logits(corrected, torch.cat(true))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    arrays = [parameter.detach().numpy() for parameter in parameters]
    return Correction(
        mean,
        deviation,
        arrays[0],
        (arrays[1], arrays[2], arrays[3]),
        (arrays[4], arrays[5], arrays[6]),
    )


@dataclass(frozen=True, eq=False)
class _View:
    """What is seen of one structure.

    Parameters
    ----------
    start, stop : tuple of int, (3,)
        Box on the scan's grid.
    strides : tuple of int, (3,)
        Voxels of the box for one that was looked at.
    band : array, bool
        Those that were looked at and lie near a border, N of them.
    features : array, (N, F) float32
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    strides: tuple[int, int, int]
    band: NDArray[np.bool_]
    features: Field


def _look(image: Volume, number: int, atlas: LocalMap, masks: Mapping[int, LocalMap]) -> _View | None:
    """Features of the voxels near the border of one structure; None if it has none."""
    mask = masks[number]
    if not (mask.values >= INSIDE).any() or not (atlas.values >= INSIDE).any():
        return None
    grid = image.grid
    margin = np.ceil(_MARGIN_MM / grid.spacing_mm).astype(int)
    i, j, k = (int(n) for n in np.maximum(np.minimum(atlas.start, mask.start) - margin, 0))
    x, y, z = (int(n) for n in np.minimum(np.maximum(atlas.stop, mask.stop) + margin, grid.shape))
    start, stop = (i, j, k), (x, y, z)
    strides = strides_of((x - i, y - j, z - k), grid.spacing_mm)
    spacing_mm = grid.spacing_mm * strides

    def looked_at(values: LocalMap) -> Field:
        return _thinned(values.on_box(start, stop), strides)

    warped, own = looked_at(atlas), looked_at(mask)
    others = np.zeros_like(own)
    for other, values in masks.items():
        if other != number and _overlap(values, start, stop):
            np.maximum(others, looked_at(values), out=others)
    inside, found = warped >= INSIDE, own >= INSIDE
    if not inside.any() or not found.any():
        return None
    radius_mm = ball_radius_mm(np.count_nonzero(inside) * spacing_mm.prod())
    error_mm = min(
        max(_ERROR_PER_RADIUS * radius_mm, _SMALLEST_ERROR_MM, float(spacing_mm.min()) / 2), _LARGEST_ERROR_MM
    )
    to_atlas = (signed_distance_mm(inside, spacing_mm) / error_mm).clip(-9, 9)
    to_mask = (signed_distance_mm(found, spacing_mm) / error_mm).clip(-9, 9)
    band = (np.abs(to_atlas) < _ATLAS_REACH) | (np.abs(to_mask) < _MASK_REACH)
    near = to_atlas > -_ATLAS_REACH - 1
    if not near.any() or not band.any():
        return None
    scan = _thinned(image.data[i:x, j:y, k:z].astype(np.float32), strides)
    seen = [
        *_image_features(scan, near, own, (to_atlas, to_mask), band, spacing_mm, error_mm),
        *_mask_features(warped, own, others, (to_atlas, to_mask), band, spacing_mm, error_mm),
    ]
    return _View(start, stop, strides, band, np.stack(seen, axis=1).astype(np.float32))


def _image_features(
    scan: Field,
    near: NDArray[np.bool_],
    own: Field,
    distances: tuple[Field, Field],
    band: NDArray[np.bool_],
    spacing_mm: NDArray[np.float64],
    error_mm: float,
) -> Iterable[Field]:
    """(N,) each: how the image looks, in terms of what lies inside and around the mask."""
    low, high = np.percentile(scan[near], (0.5, 99.5))
    scan = ((scan - np.float32(low)) / np.float32(max(high - low, 1e-6))).clip(-0.5, 1.5)
    # The core of the mask, and its surroundings, without the border in doubt.
    core = own * (distances[1] > 0.3)
    ring = (1 - own) * near * (distances[1] < -0.3)
    for window_mm in _WINDOWS_MM:
        image = scan if window_mm == 0 else _smoothed(scan, window_mm, spacing_mm)
        (inner, spread), (outer, outer_spread) = _moments(image, core), _moments(image, ring)
        values = image[band]
        to_inner = ((values - inner) / spread).clip(-4, 4)
        to_outer = ((values - outer) / outer_spread).clip(-4, 4)
        ratio = 0.5 * (to_outer**2 - to_inner**2) - np.log(spread / outer_spread)
        yield to_inner / 2
        yield to_outer / 2
        yield ratio.clip(-4, 4) / 2
        if window_mm == _GRADIENT_WINDOW_MM:
            contrast = max(abs(float(inner - outer)), _LEAST_DEVIATION) / error_mm
            normal = _gradient(_smoothed(distances[0], 1.0, spacing_mm), spacing_mm, band)
            slope = _gradient(image, spacing_mm, band)
            length = np.sqrt((normal**2).sum(axis=0)) + np.float32(1e-3)
            yield ((slope * normal).sum(axis=0) / length / contrast).clip(-3, 3)
            yield (np.sqrt((slope**2).sum(axis=0)) / contrast).clip(0, 4)


def _mask_features(
    warped: Field,
    own: Field,
    others: Field,
    distances: tuple[Field, Field],
    band: NDArray[np.bool_],
    spacing_mm: NDArray[np.float64],
    error_mm: float,
) -> Iterable[Field]:
    """(N,) each: what both masks and those of the other structures say, here and around."""
    odds = _log_odds(own)
    to_atlas = distances[0].clip(-4, 4)
    disagreement = own - warped
    yield odds[band] / 3
    yield _smoothed(odds, 2 * float(spacing_mm.min()), spacing_mm)[band] / 3
    yield _smoothed(odds, error_mm, spacing_mm)[band] / 3
    yield _log_odds(warped[band]) / 3
    yield to_atlas[band] / 2
    yield _smoothed(to_atlas, error_mm, spacing_mm)[band] / 2
    yield distances[1][band].clip(-4, 4) / 2
    yield disagreement[band]
    yield _smoothed(disagreement, error_mm, spacing_mm)[band] * 2
    yield others[band]
    yield _smoothed(others, error_mm, spacing_mm)[band] * 2


def strides_of(shape: Sequence[int], spacing_mm: NDArray[np.float64]) -> tuple[int, int, int]:
    """Voxels to be taken for one along each axis, so that at most a million are left; finest axes first.

    Parameters
    ----------
    shape : sequence of int, (3,)
        Of a box of voxels.
    spacing_mm : array, (3,)
        Their size.

    Returns
    -------
    tuple of int, (3,)
        Powers of 2.
    """
    strides = np.ones(3, int)
    while np.prod(np.ceil(np.array(shape) / strides)) > _MOST_VOXELS:
        finest = (spacing_mm * strides).min()
        strides[spacing_mm * strides < 1.5 * finest] *= 2
    i, j, k = (int(stride) for stride in strides)
    return i, j, k


def _thinned(values: Field, strides: tuple[int, int, int]) -> Field:
    """Means over blocks; those at the far ends may be smaller."""
    for axis, stride in enumerate(strides):
        if stride > 1:
            first = np.arange(0, values.shape[axis], stride)
            sizes = np.diff(first, append=values.shape[axis]).astype(np.float32)
            along = [1, 1, 1]
            along[axis] = len(sizes)
            values = np.add.reduceat(values, first, axis=axis) / sizes.reshape(along)
    return values


def _spread(values: Field, strides: tuple[int, int, int], shape: tuple[int, ...]) -> Field:
    """Back to the voxels of the box, linearly between the centres of the blocks."""
    if max(strides) == 1:
        return values
    step = np.array(strides, float)
    # The centre of voxel v of the box lies at (v + 1/2) / stride - 1/2 blocks.
    spread: Field = ndimage.affine_transform(
        values, 1 / step, offset=0.5 / step - 0.5, output_shape=tuple(shape), order=1, mode="nearest"
    )
    return spread


def _overlap(mask: LocalMap, start: Sequence[int], stop: Sequence[int]) -> bool:
    """Whether the box of the mask meets the other box."""
    if not mask.values.size:
        return False
    sides = zip(mask.start, mask.stop, start, stop, strict=True)
    return all(first < other_last and other_first < last for first, last, other_first, other_last in sides)


def _moments(image: Field, weight: Field) -> tuple[Any, Any]:
    """Weighted mean and standard deviation; those of nothing are 0 and small."""
    total = weight.sum() + np.float32(1e-6)
    mean = (weight * image).sum() / total
    deviation = np.sqrt((weight * (image - mean) ** 2).sum() / total) + np.float32(0.02)
    return mean, deviation


def _smoothed(values: Field, window_mm: float, spacing_mm: NDArray[np.float64]) -> Field:
    smoothed: Field = ndimage.gaussian_filter(values, window_mm / spacing_mm, truncate=2.5)
    return smoothed


def _gradient(values: Field, spacing_mm: NDArray[np.float64], band: NDArray[np.bool_]) -> Field:
    """(3, N) derivatives along the axes, per mm; 0 along an axis of one voxel."""
    gradient = np.zeros((3, np.count_nonzero(band)), np.float32)
    for axis, step_mm in enumerate(spacing_mm):
        if values.shape[axis] > 1:
            gradient[axis] = np.gradient(values, float(step_mm), axis=axis)[band]
    return gradient


def _log_odds(probability: Field) -> Field:
    odds: Field = logit(probability.clip(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY))
    return odds
