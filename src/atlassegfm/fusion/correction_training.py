"""Training of the correction network with PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ..core.adam import Adam
from ..settings import CorrectionSettings
from .correction import EMBEDDING_WIDTH, HIDDEN_WIDTH, Correction, TrainingSample

#: Added to the standard deviations of the features, for those that hardly vary on the atlas.
_MIN_DEVIATION = 0.05
#: Fraction of the steps in which the learning rate rises; learning rate and momentum at the begin, then and at the end.
_RISE, _BEGIN, _TOP, _END = 0.3, (1 / 25, 0.95), (1.0, 0.85), (4e-6, 0.95)


def train_correction(
    samples: Sequence[TrainingSample], structures: int, settings: CorrectionSettings | None = None, *, seed: int
) -> Correction | None:
    """Train one network for all structures, numbered from 1 to ``structures``; None without samples.

    ``samples`` has some of each structure; ``seed`` is that of initialisation, batches and noise.
    """
    settings = settings or CorrectionSettings()
    if not samples:
        return None
    stacked = np.concatenate([one.features for one in samples])
    mean, deviation = stacked.mean(axis=0), stacked.std(axis=0) + np.float32(_MIN_DEVIATION)
    del stacked
    arrays = (((one.features - mean) / deviation, one.log_odds, one.truth) for one in samples)
    tensors = [tuple(map(torch.from_numpy, parts)) for parts in arrays]
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    network = _Network(len(mean), structures, generator)
    parameters = network.parameters
    optimiser = Adam(parameters, [settings.learning_rate] * len(parameters), weight_decay=settings.weight_decay)
    for step in range(settings.iterations):
        drawn = random.integers(0, len(samples), settings.batch_samples)
        parts = []
        for n in drawn:
            voxels = torch.from_numpy(random.integers(0, len(tensors[n][0]), settings.batch_voxels))
            parts.append([values[voxels] for values in tensors[n]])
        features, odds, truth = (torch.cat(part) for part in zip(*parts, strict=True))
        features = features + settings.noise * torch.randn(features.shape, generator=generator)
        numbers = torch.tensor([samples[n].number for n in drawn])
        loss = binary_cross_entropy_with_logits(odds + network(features, numbers), truth)
        factor, momentum = _one_cycle(step, settings.iterations)
        optimiser.step(torch.autograd.grad(loss, parameters), factor=factor, momentum=momentum)
    return network.export(mean, deviation, settings.strength)


def _one_cycle(step: int, steps: int) -> tuple[float, float]:
    """Learning rate, as a fraction of the highest, and momentum of one step (Smith and Topin 2019).

    The defaults of PyTorch's OneCycleLR: the rate rises from 1/25 over 30 % of the steps, and falls to 1/250 000.
    """
    top = _RISE * steps - 1
    rising = step <= top
    part = step / top if rising and top > 0 else (step - top) / max(steps - 1 - top, 1)
    (rate, momentum), (rate_after, momentum_after) = (_BEGIN, _TOP) if rising else (_TOP, _END)
    turned = (1 + math.cos(math.pi * part)) / 2
    return rate_after + (rate - rate_after) * turned, momentum_after + (momentum - momentum_after) * turned


class _Network:
    """Two hidden layers over the features and an embedding of the structure; it starts at no correction.

    Plain tensors: a ``torch.nn.Module`` made without random numbers loads PyTorch's symbolic shapes, for seconds.
    """

    def __init__(self, features: int, structures: int, generator: torch.Generator) -> None:
        self.embedding = torch.randn((structures, EMBEDDING_WIDTH), generator=generator)
        widths = (features + EMBEDDING_WIDTH, HIDDEN_WIDTH)
        self.weights, self.biases = [], []
        # PyTorch's own range of a linear layer, drawn from our generator.
        for width in widths:
            bound = width**-0.5
            self.weights.append((torch.rand((width, HIDDEN_WIDTH), generator=generator) * 2 - 1) * bound)
            self.biases.append((torch.rand(HIDDEN_WIDTH, generator=generator) * 2 - 1) * bound)
        self.weights.append(torch.zeros(HIDDEN_WIDTH, 1))
        self.biases.append(torch.zeros(1))
        self.parameters = [self.embedding, *self.weights, *self.biases]
        for one in self.parameters:
            one.requires_grad_(True)

    def __call__(self, features: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """(N,) for (N, F) features, an equal part of them of each structure of ``numbers``."""
        voxels = len(features) // len(numbers)
        # One row a sample, repeated by expand: gradients of rows picked for every voxel depend on the threads.
        own = self.embedding[numbers - 1][:, None].expand(-1, voxels, -1).reshape(-1, EMBEDDING_WIDTH)
        values = torch.cat((features, own), dim=1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for one, other in hidden:
            values = torch.relu(torch.addmm(other, values, one))
        result: torch.Tensor = torch.addmm(bias, values, weight)[:, 0]
        return result

    def export(self, mean: np.ndarray, deviation: np.ndarray, strength: float) -> Correction:
        """Export the trained network as arrays."""
        w0, w1, w2 = (one.detach().numpy() for one in self.weights)
        b0, b1, b2 = (one.detach().numpy() for one in self.biases)
        return Correction(mean, deviation, self.embedding.detach().numpy(), (w0, w1, w2), (b0, b1, b2), strength)
