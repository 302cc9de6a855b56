"""Fusing the warped atlas and the model's answer, and the label map made of the fused structures.

The gate is the paper's (arXiv 2512.18176, eq. 4 and 5): for each structure,

    M_final = M_fm + K (M_atlas - M_fm),    K = sigmoid(g([M_atlas, M_fm])),

where g pools the two masks by maxima over 3, 5 and 7 voxels, side by side, and mixes the six results by
learnable weights and a bias. K = 1 takes the atlas alone, K = 0 the model alone.

It is trained on the atlas's own scan, whose truth is the atlas's labels; the label of a query plays no part. What the
gate would meet on a query are masks as wrong as a registration makes them: they are simulated there
(:mod:`atlassegfm.simulation`), once for all queries, or come from a round trip through the query.
At the paper's learning rate a weight moves by at most 1e-3, so the gate ends where it starts, and the paper does
not say where that is. Here it starts at a constant K, the one whose fused masks are closest to the truth on
the training examples; after a round trip with a handicap for the atlas, see :class:`FusionSettings`.

The default gate goes on from what the paper's has fused (:mod:`atlassegfm.correction`, then
:mod:`atlassegfm.smoothing`).

One gate serves all structures, each counting the same: a single example is noisy. Starts of each structure's own
came to 0.676 to 0.682 on queries, half shrunk to the common one 0.677 to 0.682, the common one 0.678 to 0.682 (over
handicaps of 0.05 to 0.16).

Where nothing else is said, the figures here are mean Dice over the development sets (abdominal MR and CT, OASIS,
hippocampus, heart), each set counting the same: 19 pairs, registered by affine and demons, with the built-in model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..core.mask import LocalMap
from ..prompts import INSIDE
from ..settings import FusionSettings
from .correction import Correction

if TYPE_CHECKING:
    import torch


#: Constant gates that are tried as the start.
_STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)


#: K of a constant gate stays this far from 0 and 1, where its logit would be infinite. Moves the border of a
#: fused mask only where the surer mask is within 0.01 of 1/2.
_LEAST_GATE = 0.01


#: Voxels of training at once: about what a core keeps in its cache.
_CHUNK = 1 << 15


#: Voxels of an example that the default gate's mixture is trained on, at most: of more, some drawn at random. The
#: paper's gate takes all. On a scan of 256 x 256 x 240 that is 3 instead of 21 seconds.
_MOST_VOXELS = 200_000


#: Dice of two starts that agree to this many digits are equal.
_TIE_DIGITS = 6


@dataclass(frozen=True, eq=False)
class GateExample:
    """One structure of the atlas's scan, as the gate would meet it on a query, and the truth.

    Parameters
    ----------
    atlas : LocalMap
        Imperfect mask of the structure on the atlas's grid, in [0, 1]: simulated, or what registration leaves of it
        after a round trip through a query.
    model : LocalMap
        The model's answer on the atlas's image, prompted with ``atlas``, in [0, 1].
    truth : LocalMap
        The atlas's label, 0 or 1.
    """

    atlas: LocalMap
    model: LocalMap
    truth: LocalMap


@dataclass(frozen=True)
class Gate:
    """A trained gate.

    Parameters
    ----------
    kernels : tuple of int
        Sizes of the max-poolings, voxels.
    weights : tuple of float
        Of the pooled features: those of the atlas in the order of ``kernels``, then those of the model.
    bias : float
        Added to the weighted sum.
    start : float
        K of the constant gate that training started from, in [0, 1].
    examples : int
        Masks it was trained on; 0 where there was none to learn from.
    dice_before, dice_after : float
        Mean soft Dice on the training examples at the start and after training; NaN without examples.
    correction : Correction or None
        What the default gate does to the masks that were fused; None for the paper's.
    smoothing : tuple of float
        What the default gate does then: standard deviation of the window that smooths each structure, in the order of
        their numbers, as a share of the structure's radius; empty for the paper's.
    """

    kernels: tuple[int, ...]
    weights: tuple[float, ...]
    bias: float
    start: float
    examples: int = 0
    dice_before: float = math.nan
    dice_after: float = math.nan
    correction: Correction | None = None
    smoothing: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.weights) != 2 * len(self.kernels):
            raise ValueError(
                f"{len(self.kernels)} kernels need {2 * len(self.kernels)} weights, not {len(self.weights)}"
            )

    @classmethod
    def constant(cls, share: float, kernels: Sequence[int] = (3, 5, 7)) -> Gate:
        """The untrained gate that takes the same ``share`` (K, in [0, 1]) of the atlas everywhere."""
        return cls(tuple(kernels), (0.0,) * (2 * len(kernels)), _bias_of(share), share)

    def weight_map(self, atlas: LocalMap, model: LocalMap, *, device: str = "cpu") -> LocalMap:
        """K of eq. 5: the atlas's share at each voxel.

        Parameters
        ----------
        atlas, model : LocalMap
            Masks of one structure in [0, 1], on the same grid.
        device : str
            Where to compute, "cpu" or "cuda".

        Returns
        -------
        LocalMap
            float32 in [0, 1], on the box that holds both; K is not 0 outside, but nothing is fused there.
        """
        start, stop = _union(atlas, model)
        share = self._share(*(_tensor(mask, start, stop, device) for mask in (atlas, model)))
        return LocalMap(start, share.cpu().numpy())

    def describe(self) -> str:
        """What the gate does, in one line."""
        smoothed = sum(share > 0 for share in self.smoothing)
        if not self.examples:
            return f"not trained: takes {self.start:.0%} of the atlas everywhere"
        masks = "1 mask" if self.examples == 1 else f"{self.examples} masks"
        return (
            f"starts at {self.start:.0%} atlas; trained on {masks}: "
            f"soft Dice {self.dice_before:.4f} to {self.dice_after:.4f}, "
            f"largest weight {max(abs(weight) for weight in self.weights):.1e}"
            f"{'' if self.correction is None else '; then corrected near borders'}"
            f"{f' and smoothed ({smoothed} of {len(self.smoothing)} structures)' if smoothed else ''}"
        )

    def as_the_paper(self) -> Gate:
        """The gate of eq. 5 alone, without what the default gate does after it."""
        return replace(self, correction=None, smoothing=())

    def _share(self, atlas: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        """(I, J, K) the gate on two masks of that shape."""
        import torch

        mixed = torch.full_like(atlas, self.bias)
        for mask, weights in ((atlas, self.weights[: len(self.kernels)]), (model, self.weights[len(self.kernels) :])):
            for pooled, weight in zip(_pooled(mask, self.kernels), weights, strict=True):
                mixed.add_(pooled, alpha=weight)
        return mixed.sigmoid_()


def train_gate(
    examples: Mapping[int, GateExample] | Sequence[GateExample],
    settings: FusionSettings | None = None,
    *,
    device: str = "cpu",
) -> Gate:
    """Train one gate on the structures of the atlas's scan.

    Parameters
    ----------
    examples : mapping of int to GateExample, or sequence of GateExample
        One or several for each structure. Those without truth, or where both masks agree everywhere, teach nothing and
        are left out.
    settings : FusionSettings, optional
        Defaults if left out.
    device : str
        Where to compute, "cpu" or "cuda".

    Returns
    -------
    Gate
        A constant one of K = 1/2 (or the ``start`` asked for) where no example teaches anything.
    """
    settings = settings or FusionSettings()
    given = examples.values() if isinstance(examples, Mapping) else examples
    most = _MOST_VOXELS if settings.gate == "default" else None
    lessons = [lesson for example in given if (lesson := _lesson(example, settings.kernels, device, most)) is not None]
    # Simulated errors do not cancel, so that nothing flatters the atlas there.
    flattery = settings.atlas_flattery if settings.examples == "round trip" else 0.0
    start = _best_start(lessons, flattery) if settings.start == "best" else settings.start
    gate = Gate.constant(start, settings.kernels)
    return _descended(gate, lessons, settings) if lessons else gate


def fuse(atlas: LocalMap, model: LocalMap, gate: Gate, *, device: str = "cpu") -> LocalMap:
    """Eq. 4: one structure's warped mask and the model's answer, mixed voxel by voxel.

    Parameters
    ----------
    atlas, model : LocalMap
        In [0, 1], on the same grid; their boxes may differ, or be empty.
    gate : Gate
        Says how much of each.
    device : str
        Where to compute, "cpu" or "cuda".

    Returns
    -------
    LocalMap
        float32 in [0, 1], on the box that holds both.
    """
    start, stop = _union(atlas, model)
    one, other = (_tensor(mask, start, stop, device) for mask in (atlas, model))
    # Written so that the result lies between the two, whatever the rounding; where they agree, it is exact.
    fused = other.lerp(one, gate._share(one, other)).clamp_(0, 1)
    return LocalMap(start, fused.cpu().numpy())


@dataclass(frozen=True, eq=False)
class _Lesson:
    """What one example can teach: the N voxels where the masks differ, and sums over all others.

    Where the masks agree the fused mask is theirs whatever the gate, so these voxels enter the Dice as
    constants, without approximation.

    Parameters
    ----------
    features : tensor, (2 * kernels + 1, N)
        Pooled masks, those of the atlas first; then ones, for the bias.
    model, step, truth : tensor, (N,)
        M_fm, M_atlas - M_fm, and the truth.
    sides : tensor, (2, N)
        ``step`` times ``truth``, and ``step``.
    each : float
        How many voxels each of the N stands for.
    model_truth : float
        Sum over all voxels of M_fm times truth.
    total : float
        Sum over all voxels of M_fm plus truth.
    agreed : tuple of int, (3,)
        Voxels where the masks agree: inside the fused mask, inside both it and the truth; and all voxels of the
        truth.
    """

    features: torch.Tensor
    model: torch.Tensor
    step: torch.Tensor
    truth: torch.Tensor
    sides: torch.Tensor
    each: float
    model_truth: float
    total: float
    agreed: tuple[int, int, int]


def _lesson(example: GateExample, kernels: tuple[int, ...], device: str, most: int | None = None) -> _Lesson | None:
    """The example as training needs it, of at most so many voxels; None where it teaches nothing."""
    import torch

    start, stop = _union(example.atlas, example.model)
    atlas, model, truth = (_tensor(mask, start, stop, device) for mask in (example.atlas, example.model, example.truth))
    differs = atlas != model
    if example.truth.is_empty or not bool(differs.any()):
        return None
    agreed = (model >= INSIDE) & ~differs
    taken, count = differs.flatten().nonzero()[:, 0], int(differs.sum())
    if most is not None and count > most:
        drawn = np.sort(np.random.default_rng(0).choice(count, most, replace=False, shuffle=False))
        taken = taken[torch.from_numpy(drawn).to(device)]
    pooled = [values.flatten()[taken] for mask in (atlas, model) for values in _pooled(mask, kernels)]
    step, true = (atlas - model).flatten()[taken], truth.flatten()[taken]
    return _Lesson(
        features=torch.stack((*pooled, torch.ones_like(step))),
        model=model.flatten()[taken],
        step=step,
        truth=true,
        sides=torch.stack((step * true, step)),
        each=count / len(taken),
        model_truth=float((model * truth).sum(dtype=torch.float64)),
        # Truth outside both masks is missed whatever the gate, and counts.
        total=float(model.sum(dtype=torch.float64)) + float(example.truth.values.sum(dtype=np.float64)),
        agreed=(
            int(agreed.sum()),
            int((agreed & (truth >= INSIDE)).sum()),
            int(np.count_nonzero(example.truth.values >= INSIDE)),
        ),
    )


def _best_start(lessons: Sequence[_Lesson], atlas_flattery: float) -> float:
    """The constant K whose masks are closest to the truth, in the mean over the examples; of equal ones, next to 1/2.

    Closest by the Dice of the masks, cut at 1/2 as in the result, not by the soft Dice of the training: along
    constant gates that one always is best at K = 0 or K = 1, as it is a ratio of two linear functions of K, and it
    prefers the mask with the harder border.
    """
    if not lessons:
        return 0.5
    scores = []
    for share in _STARTS:
        score = math.fsum(_constant_dice(lesson, share) for lesson in lessons) / len(lessons) - atlas_flattery * share
        scores.append((round(score, _TIE_DIGITS), -abs(share - 0.5), share))
    return max(scores)[-1]


def _constant_dice(lesson: _Lesson, share: float) -> float:
    """Dice of the mask that the constant gate of K = ``share`` leads to."""
    inside, common, true = lesson.agreed
    mask = lesson.model + _inside_unit(share) * lesson.step >= INSIDE
    both = lesson.each * int((mask & (lesson.truth >= INSIDE)).sum())
    return 2 * (common + both) / (inside + lesson.each * int(mask.sum()) + true)


def _descended(gate: Gate, lessons: Sequence[_Lesson], settings: FusionSettings) -> Gate:
    """The gate after the paper's training: Adam on the Dice loss, the mean over the examples."""
    import torch

    parameters = torch.tensor((*gate.weights, gate.bias), dtype=torch.float64)
    optimiser = torch.optim.Adam([parameters], lr=settings.learning_rate)

    def mean_dice() -> tuple[float, torch.Tensor]:
        scores = [_soft_dice(lesson, parameters) for lesson in lessons]
        return sum(dice for dice, _ in scores) / len(scores), torch.stack([slope for _, slope in scores]).mean(dim=0)

    before, slope = after, _ = mean_dice()
    for _ in range(settings.iterations):
        parameters.grad = -slope
        optimiser.step()
        after, slope = mean_dice()
    *weights, bias = parameters.tolist()
    return Gate(gate.kernels, tuple(weights), bias, gate.start, len(lessons), before, after)


def _soft_dice(lesson: _Lesson, parameters: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Soft Dice of the fused mask, and its derivatives by the parameters: weights, then bias.

    With the sums P of K step truth and Q of K step, the Dice is 2 (model_truth + P) / (total + Q). Derivatives
    of both sums are taken along with them, so that the features are read once.
    """
    import torch

    mixture = parameters.to(lesson.features.device, torch.float32)
    sums = torch.zeros(2, dtype=torch.float64)
    slopes = torch.zeros((len(parameters), 2), dtype=torch.float64)
    for first in range(0, lesson.step.numel(), _CHUNK):
        features = lesson.features[:, first : first + _CHUNK]
        sides = lesson.sides[:, first : first + _CHUNK]
        share = (mixture @ features).sigmoid_()
        sums += (sides @ share).cpu()
        slopes += (features @ (sides * (share - share.square())).T).cpu()
    sums, slopes = lesson.each * sums, lesson.each * slopes
    size = lesson.total + float(sums[1])
    dice = 2 * (lesson.model_truth + float(sums[0])) / size
    return dice, (2 * slopes[:, 0] - dice * slopes[:, 1]) / size


def _pooled(mask: torch.Tensor, kernels: Sequence[int]) -> list[torch.Tensor]:
    """(I, J, K) each: maxima over cubes of the given odd sizes, cut off at the border of the array.

    The maximum over a cube is that of maxima along its three axes, and of a larger odd window that of
    smaller ones: a few passes instead of 7^3 = 343 comparisons a voxel.
    """
    import torch

    by_size: dict[int, torch.Tensor] = {}
    current, size = mask, 1
    for kernel in sorted(set(kernels)):
        while size < kernel:
            for axis in range(3):
                n = current.shape[axis]
                wider = current.clone()
                if n > 1:
                    one, other = wider.narrow(axis, 0, n - 1), wider.narrow(axis, 1, n - 1)
                    torch.maximum(one, current.narrow(axis, 1, n - 1), out=one)
                    torch.maximum(other, current.narrow(axis, 0, n - 1), out=other)
                current = wider
            size += 2
        by_size[kernel] = current
    return [by_size[kernel] for kernel in kernels]


def _union(*masks: LocalMap) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First voxel and one past the last of the box that holds all masks; a box of no voxels if all are empty."""
    boxes = [(mask.start, mask.stop) for mask in masks if mask.values.size]
    if not boxes:
        return (0, 0, 0), (0, 0, 0)
    i, j, k = (min(int(start[axis]) for start, _ in boxes) for axis in range(3))
    x, y, z = (max(int(stop[axis]) for _, stop in boxes) for axis in range(3))
    return (i, j, k), (x, y, z)


def _tensor(mask: LocalMap, start: Sequence[int], stop: Sequence[int], device: str) -> torch.Tensor:
    """(I, J, K) float32: the mask on the box ``start`` to ``stop``."""
    import torch

    return torch.from_numpy(mask.on_box(start, stop)).to(device)


def _inside_unit(share: float) -> float:
    return min(max(share, _LEAST_GATE), 1 - _LEAST_GATE)


def _bias_of(share: float) -> float:
    """The logit that a sigmoid turns into ``share``."""
    inside = _inside_unit(share)
    return math.log(inside / (1 - inside))
