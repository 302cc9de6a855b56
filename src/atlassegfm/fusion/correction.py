"""Correction of fused masks near their borders by a small network: the first step of the default gate after fusion.

The correction adds to the log-odds of each voxel near the border what a network learned on the atlas's own scan from
simulated masks (:mod:`.simulation`). :mod:`.correction_features` has its inputs, :mod:`.correction_training` its
training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ..core.image import Volume
from ..core.mask import LocalMap
from .correction_features import Array, BorderFeatures, border_features, downsample, log_odds, upsample

#: Width of both hidden layers, and of the embedding of a structure.
HIDDEN_WIDTH, EMBEDDING_WIDTH = 32, 8
#: Voxels kept of a training sample; of more, as many are drawn at random.
_SAMPLE_VOXELS = 5000
#: Arrays of a correction, as they are saved.
_NAMES = (
    *("mean", "deviation", "strength", "embedding"),
    *(f"{part}_{layer}" for part in ("weights", "biases") for layer in range(3)),
)
#: Voxels corrected at a time, which bounds memory.
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """N voxels near the border of one simulated mask of one structure; its number counts from 1.

    Features are (N, F), the mask's log-odds (N,), the truth (N,) the fraction inside the structure, in [0, 1]; float32.
    """

    number: int
    features: Array
    log_odds: Array
    truth: Array


@dataclass(frozen=True, eq=False, repr=False)
class Correction:
    """A trained network of two hidden layers, applied with numpy; all arrays are float32.

    ``mean`` and ``deviation``, (F,), are of the features in training; row n - 1 of ``embedding``, (structures, 8),
    belongs to structure n. Layers, F + 8 to 32, 32 to 32, 32 to 1, have ``weights`` (inputs, outputs) and ``biases``.
    ``strength`` is the fraction of the network's output that is added, in [0, 1].
    """

    mean: Array
    deviation: Array
    embedding: Array
    weights: tuple[Array, Array, Array]
    biases: tuple[Array, Array, Array]
    strength: float = 0.5

    def __post_init__(self) -> None:
        shapes = [one.shape for one in (self.deviation, *self.weights, *self.biases)]
        widths = (len(self.mean) + EMBEDDING_WIDTH, HIDDEN_WIDTH, HIDDEN_WIDTH, 1)
        expected = [self.mean.shape, *pairwise(widths), *((n,) for n in widths[1:])]
        if shapes != expected or self.embedding.shape[1:] != (EMBEDDING_WIDTH,):
            raise ValueError(f"not a correction network: shapes {shapes} and {self.embedding.shape}")

    def __repr__(self) -> str:
        return f"Correction({len(self.embedding)} structures, {self.parameter_count} parameters)"

    def __eq__(self, other: object) -> bool:
        """Compare all numbers exactly."""
        if not isinstance(other, Correction):
            return NotImplemented
        return all(map(np.array_equal, self.arrays().values(), other.arrays().values()))

    def __hash__(self) -> int:
        return hash(tuple(one.tobytes() for one in self.arrays().values()))

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(one.size for one in (self.embedding, *self.weights, *self.biases))

    def arrays(self) -> dict[str, Array]:
        """Return all numbers as named arrays, for :meth:`from_arrays`."""
        numbers = (self.mean, self.deviation, np.array(self.strength, np.float32), self.embedding)
        return dict(zip(_NAMES, (*numbers, *self.weights, *self.biases), strict=True))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Correction:
        """Build a correction from the result of :meth:`arrays`.

        Raises :class:`KeyError` or :class:`ValueError` if an array is missing or has another shape.
        """
        numbers = (np.asarray(arrays[name], np.float32) for name in _NAMES)
        mean, deviation, strength, embedding, w0, w1, w2, b0, b1, b2 = numbers
        return cls(mean, deviation, embedding, (w0, w1, w2), (b0, b1, b2), float(strength))

    def apply(self, image: Volume, number: int, atlas: LocalMap, masks: Mapping[int, LocalMap]) -> LocalMap:
        """Correct the mask of one structure; parameters as of :func:`.border_features`.

        The result is float32 in [0, 1]; the mask itself if it has no border.
        """
        near = border_features(image, number, atlas, masks)
        return masks[number] if near is None else self.apply_near(near, number, masks[number])

    def apply_near(self, near: BorderFeatures, number: int, mask: LocalMap) -> LocalMap:
        """Correct a mask whose features are known."""
        added = np.zeros(near.band.shape, np.float32)
        added[near.band] = self.strength * self._predict(near.values, number)
        values = mask.on_box(near.start, near.stop)
        odds = log_odds(values) + upsample(added, near.strides, values.shape)
        changed = upsample(near.band.astype(np.float32), near.strides, values.shape) > 0
        return LocalMap(near.start, np.where(changed, expit(odds), values).astype(np.float32))

    def _predict(self, features: Array, number: int) -> Array:
        """(N,) output of the network for (N, F) features."""
        result = np.empty(len(features), np.float32)
        # The embedding is the same for all voxels: a part of the first bias.
        bias = self.embedding[number - 1] @ self.weights[0][-EMBEDDING_WIDTH:] + self.biases[0]
        for first in range(0, len(features), _CHUNK):
            hidden = (features[first : first + _CHUNK] - self.mean) / self.deviation
            hidden = np.maximum(hidden @ self.weights[0][:-EMBEDDING_WIDTH] + bias, 0)
            hidden = np.maximum(hidden @ self.weights[1] + self.biases[1], 0)
            result[first : first + _CHUNK] = (hidden @ self.weights[2] + self.biases[2])[:, 0]
        return result


def make_training_sample(
    near: BorderFeatures, number: int, mask: LocalMap, truth: LocalMap, *, seed: Sequence[int]
) -> TrainingSample:
    """Make a training sample of the fused mask of one simulated error on the atlas's scan, and its features.

    ``truth`` is the atlas's label, 0 or 1; ``seed`` is that of the choice of voxels.
    """
    odds, inside = log_odds(mask.on_box(near.start, near.stop)), truth.on_box(near.start, near.stop)
    voxels = np.random.default_rng(list(seed)).permutation(len(near.values))[:_SAMPLE_VOXELS]
    targets = (downsample(array, near.strides)[near.band][voxels] for array in (odds, inside))
    return TrainingSample(number, near.values[voxels], *targets)
