"""The gate that fuses the warped atlas and the model's answer (arXiv 2512.18176, eq. 4 and 5).

For each structure

    M_final = M_fm + K (M_atlas - M_fm),    K = sigmoid(g([M_atlas, M_fm])),

where g max-pools both masks over 3, 5 and 7 voxels and mixes the six results by learned weights and a bias. K = 1 takes
the atlas alone, K = 0 the model alone.

One gate serves all structures, each counting the same. It is trained on the atlas's own scan, on simulated registration
errors (:mod:`.simulation`). At the paper's learning rate it ends near its start, which the paper leaves open: here the
constant K that is best on the training samples. The default gate then corrects borders (:mod:`.correction`) and smooths
(:mod:`.smoothing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ..core.image import Volume
from ..core.mask import LocalMap, bounding_box
from ..core.parallel import parallel_map
from ..prompts import INSIDE
from ..settings import FusionSettings
from .correction import Correction
from .smoothing import smooth, smoothing_sigma_mm

if TYPE_CHECKING:
    import torch

#: Constant gates tried as the start.
_STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: K of a constant gate stays this far from 0 and 1, where its logit is infinite.
_MIN_WEIGHT = 0.01
#: Voxels of training at a time: about what fits a core's cache.
_CHUNK = 1 << 15
#: Voxels of all samples, and of one at most and at least, that the default gate is trained on, drawn at random of more;
#: the paper's takes all.
_ALL_VOXELS, _MOST_VOXELS, _FEWEST_VOXELS = 250_000, 50_000, 2_000
#: Scores of two starts that agree to this many digits count as equal.
_TIE_DIGITS = 6


@dataclass(frozen=True, eq=False)
class GateSample:
    """One structure of the atlas's scan, as a gate would meet it on a query.

    ``atlas`` is the simulated mask and ``model`` the model's answer to it as a prompt, both in [0, 1]; ``truth`` is the
    atlas's label, 0 or 1.
    """

    atlas: LocalMap
    model: LocalMap
    truth: LocalMap


@dataclass(frozen=True)
class Gate:
    """A trained gate.

    ``kernels`` are the sizes of the max-poolings in voxels; ``weights`` those of the pooled masks, of the atlas in the
    order of ``kernels``, then of the model; ``bias`` is added to the weighted sum. ``start`` is K of the constant gate
    that training started from, in [0, 1]; ``samples`` the number of training samples, 0 if untrained; ``dice_before``
    and ``dice_after`` their mean soft Dice around training, NaN without samples. After fusion the default gate applies
    ``correction``, then smooths each structure by a sigma of ``smoothing``, as fractions of their radius; the paper's
    gate has neither. ``mixture`` has the weights of several models by name, those of structure n at position n - 1.
    """

    kernels: tuple[int, ...]
    weights: tuple[float, ...]
    bias: float
    start: float
    samples: int = 0
    dice_before: float = math.nan
    dice_after: float = math.nan
    correction: Correction | None = None
    smoothing: tuple[float, ...] = ()
    mixture: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.weights) != 2 * len(self.kernels):
            raise ValueError(f"{len(self.weights)} weights for {len(self.kernels)} kernels; expected two for each")

    @classmethod
    def constant(cls, weight: float, kernels: Sequence[int] = (3, 5, 7)) -> Gate:
        """Make the untrained gate of K = ``weight`` everywhere, in [0, 1]."""
        inside = _clip_weight(weight)
        return cls(tuple(kernels), (0.0,) * (2 * len(kernels)), math.log(inside / (1 - inside)), weight)

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters, those of the correction included."""
        return len(self.weights) + 1 + (0 if self.correction is None else self.correction.parameter_count)

    def describe(self) -> str:
        """Describe the gate in one line."""
        if not self.samples:
            return f"not trained: takes {self.start:.0%} of the atlas everywhere"
        steps = [f"trained on {self.samples} simulated mask{'' if self.samples == 1 else 's'}"]
        if self.mixture:
            means = (f"{name} {sum(weights) / len(weights):.0%}" for name, weights in self.mixture.items())
            steps.append(f"the model is {' and '.join(means)} on average over the structures")
        if self.correction is not None:
            steps.append("corrects near borders")
        if smoothed := sum(sigma > 0 for sigma in self.smoothing):
            steps.append(f"smooths {smoothed} of {len(self.smoothing)} structures")
        return f"takes {self.start:.0%} of the atlas, {1 - self.start:.0%} of the model; {', '.join(steps)}"

    def as_the_paper(self) -> Gate:
        """Return the gate of eq. 5 alone, without correction and smoothing."""
        return replace(self, correction=None, smoothing=())

    def _weight_map(self, atlas: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        """K of eq. 5, (I, J, K), for two masks of that shape."""
        logit = atlas.new_full(atlas.shape, self.bias)
        pooled = (one for mask in (atlas, model) for one in _max_pool(mask, self.kernels))
        for values, weight in zip(pooled, self.weights, strict=True):
            logit.add_(values, alpha=weight)
        return logit.sigmoid_()


def train_gate(samples: Iterable[GateSample], settings: FusionSettings | None = None, *, device: str = "cpu") -> Gate:
    """Train one gate on one or several samples of each structure of the atlas's scan.

    Samples without truth, or whose masks are equal, are left out. Without others the gate is a constant: K = 1/2, or
    the ``start`` in the settings.
    """
    settings = settings or FusionSettings()
    samples, limit = list(samples), None
    if settings.gate == "default":
        limit = min(max(_ALL_VOXELS // max(len(samples), 1), _FEWEST_VOXELS), _MOST_VOXELS)
    prepared = parallel_map(lambda one: _prepare(one, settings.kernels, device, limit), samples)
    usable = [one for one in prepared if one is not None]
    start = _best_start(usable) if settings.start == "best" else settings.start
    gate = Gate.constant(start, settings.kernels)
    return _optimise(gate, usable, settings) if usable else gate


def fuse(atlas: LocalMap, model: LocalMap, gate: Gate, *, device: str = "cpu") -> LocalMap:
    """Fuse one structure's warped mask and the model's answer voxel by voxel (eq. 4).

    Both are in [0, 1] on the same grid; their boxes may differ or be empty. The result is float32 in [0, 1], on the box
    that holds both.
    """
    start, stop = bounding_box((atlas, model))
    one, other = (_tensor(mask, start, stop, device) for mask in (atlas, model))
    # Interpolated, so that rounding cannot leave the range of the two masks, and equal values stay exact.
    fused = other.lerp(one, gate._weight_map(one, other)).clamp_(0, 1)
    return LocalMap(start, fused.cpu().numpy())


def is_empty_prediction(predicted: LocalMap) -> bool:
    """Check whether no voxel of a prediction is inside."""
    return not (predicted.values >= INSIDE).any()


def fuse_structures(
    image: Volume,
    warped: Mapping[int, LocalMap],
    predicted: Mapping[int, LocalMap],
    gate: Gate,
    *,
    device: str = "cpu",
) -> dict[int, LocalMap]:
    """Fuse each structure of a scan: gate (eq. 4), then the default gate's correction and smoothing.

    Masks are in [0, 1], by number of the structure; the result has the numbers of ``predicted``. Where the model
    predicts nothing, the warped atlas is kept: small structures would be lost.
    """

    def mix(n: int) -> LocalMap:
        mask = predicted[n]
        return warped[n] if is_empty_prediction(mask) else fuse(warped[n], mask, gate, device=device)

    fused = dict(zip(predicted, parallel_map(mix, predicted), strict=True))
    if gate.correction is None:
        return fused
    correction, grid = gate.correction, image.grid

    def finish(n: int) -> LocalMap:
        if is_empty_prediction(predicted[n]):
            return fused[n]
        corrected = correction.apply(image, n, warped[n], fused)
        fraction = gate.smoothing[n - 1] if gate.smoothing else 0.0
        return smooth(corrected, smoothing_sigma_mm(fraction, warped[n], grid), grid)

    return dict(zip(fused, parallel_map(finish, fused), strict=True))


@dataclass(frozen=True, eq=False)
class _TrainingData:
    """The N voxels of a sample where the masks differ, and sums over all others, whose fused value is fixed."""

    features: torch.Tensor  # (2 * kernels + 1, N): pooled masks, those of the atlas first; then ones, for the bias
    model: torch.Tensor  # (N,): M_fm
    step: torch.Tensor  # (N,): M_atlas - M_fm
    truth: torch.Tensor  # (N,)
    sides: torch.Tensor  # (2, N): step times truth, and step
    weight: float  # number of voxels that each of the N stands for
    model_truth: float  # sum over all voxels of M_fm times truth
    total: float  # sum over all voxels of M_fm plus truth
    agreed: tuple[int, int, int]  # voxels inside where the masks agree, those of them in the truth, all of the truth


def _prepare(sample: GateSample, kernels: Sequence[int], device: str, limit: int | None = None) -> _TrainingData | None:
    """Training data of at most ``limit`` voxels; None where nothing can be learned."""
    import torch

    start, stop = bounding_box((sample.atlas, sample.model))
    atlas, model, truth = (_tensor(mask, start, stop, device) for mask in (sample.atlas, sample.model, sample.truth))
    differs = atlas != model
    if sample.truth.is_empty or not bool(differs.any()):
        return None
    agreed = (model >= INSIDE) & ~differs
    taken, count = differs.flatten().nonzero()[:, 0], int(differs.sum())
    if limit is not None and count > limit:
        drawn = np.sort(np.random.default_rng(0).choice(count, limit, replace=False, shuffle=False))
        taken = taken[torch.from_numpy(drawn).to(device)]
    pooled = [values.flatten()[taken] for mask in (atlas, model) for values in _max_pool(mask, kernels)]
    step, inside = (atlas - model).flatten()[taken], truth.flatten()[taken]
    return _TrainingData(
        features=torch.stack((*pooled, torch.ones_like(step))),
        model=model.flatten()[taken],
        step=step,
        truth=inside,
        sides=torch.stack((step * inside, step)),
        weight=count / len(taken),
        model_truth=float((model * truth).sum(dtype=torch.float64)),
        # Truth outside both masks is missed by any gate, and counts.
        total=float(model.sum(dtype=torch.float64)) + float(sample.truth.values.sum(dtype=np.float64)),
        agreed=(int(agreed.sum()), int((agreed & (truth >= INSIDE)).sum()), int((sample.truth.values >= INSIDE).sum())),
    )


def _best_start(samples: Sequence[_TrainingData]) -> float:
    """The constant K of the best mean Dice; of equal ones, the next to 1/2.

    Of masks thresholded as the result is: the soft Dice of constant gates is always best at K = 0 or K = 1.
    """

    def rank(weight: float) -> tuple[float, float]:
        score = math.fsum(_constant_dice(one, weight) for one in samples) / max(len(samples), 1)
        return round(score, _TIE_DIGITS), -abs(weight - 0.5)

    return max(reversed(_STARTS), key=rank)


def _constant_dice(sample: _TrainingData, weight: float) -> float:
    """Dice of the mask that the constant gate of K = ``weight`` makes."""
    inside, common, truth = sample.agreed
    mask = sample.model + _clip_weight(weight) * sample.step >= INSIDE
    both = sample.weight * int((mask & (sample.truth >= INSIDE)).sum())
    return 2 * (common + both) / (inside + sample.weight * int(mask.sum()) + truth)


def _optimise(gate: Gate, samples: Sequence[_TrainingData], settings: FusionSettings) -> Gate:
    """The gate after the paper's training: Adam on the mean Dice loss of the samples."""
    import torch

    from ..core.adam import Adam

    parameters = torch.tensor((*gate.weights, gate.bias), dtype=torch.float64)
    optimiser = Adam([parameters], [settings.learning_rate])

    def mean_dice() -> tuple[float, torch.Tensor]:
        scores = [_soft_dice(one, parameters) for one in samples]
        return sum(dice for dice, _ in scores) / len(scores), torch.stack([slope for _, slope in scores]).mean(dim=0)

    before, slope = after, _ = mean_dice()
    for _ in range(settings.iterations):
        optimiser.step([-slope])
        after, slope = mean_dice()
    *weights, bias = parameters.tolist()
    return Gate(gate.kernels, tuple(weights), bias, gate.start, len(samples), before, after)


def _soft_dice(sample: _TrainingData, parameters: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Soft Dice of the fused mask, and its gradient by weights and bias.

    With the sums P of K step truth and Q of K step it is 2 (model_truth + P) / (total + Q). The gradients of both sums
    are taken along with them, so that the features are read once.
    """
    mixture = parameters.to(sample.features)
    sums, slopes = parameters.new_zeros(2), parameters.new_zeros(len(parameters), 2)
    for first in range(0, sample.step.numel(), _CHUNK):
        features, sides = (values[:, first : first + _CHUNK] for values in (sample.features, sample.sides))
        weight = (mixture @ features).sigmoid_()
        sums += (sides @ weight).cpu()
        slopes += (features @ (sides * (weight - weight.square())).T).cpu()
    sums, slopes = sample.weight * sums, sample.weight * slopes
    size = sample.total + float(sums[1])
    dice = 2 * (sample.model_truth + float(sums[0])) / size
    return dice, (2 * slopes[:, 0] - dice * slopes[:, 1]) / size


def _max_pool(mask: torch.Tensor, kernels: Sequence[int]) -> list[torch.Tensor]:
    """(I, J, K) each: maxima over cubes of the given odd sizes, cut off at the border of the array.

    Taken axis by axis and from smaller to larger cubes: a few passes instead of 7^3 comparisons a voxel.
    """
    by_size: dict[int, torch.Tensor] = {}
    current, size = mask, 1
    for kernel in sorted(set(kernels)):
        while size < kernel:
            for axis in range(3):
                wider, n = current.clone(), current.shape[axis] - 1
                if n > 0:
                    wider.narrow(axis, 0, n).clamp_min_(current.narrow(axis, 1, n))
                    wider.narrow(axis, 1, n).clamp_min_(current.narrow(axis, 0, n))
                current = wider
            size += 2
        by_size[kernel] = current
    return [by_size[kernel] for kernel in kernels]


def _tensor(mask: LocalMap, start: Sequence[int], stop: Sequence[int], device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(mask.on_box(start, stop)).to(device)


def _clip_weight(weight: float) -> float:
    return min(max(weight, _MIN_WEIGHT), 1 - _MIN_WEIGHT)
