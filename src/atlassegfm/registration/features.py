"""Image features that registration compares: MIND-SSC and local correlation."""

from __future__ import annotations

import itertools
from operator import add
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.compiled import in_slabs
from . import kernels

#: The six neighbours whose patches are compared (Heinrich et al. 2013, figure 2).
_NEIGHBOURS = ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0))
#: Pairs of them at distance sqrt 2: all but the three opposite pairs.
_PAIRS = tuple((a, b) for a, b in itertools.combinations(_NEIGHBOURS, 2) if any(map(add, a, b)))
MIND_CHANNELS = len(_PAIRS)
#: Added to both variances of the local correlation: contrast below 2 % of the range is noise.
_NOISE_VARIANCE = 0.02**2


def box_mean(image: Tensor, radius: int) -> Tensor:
    """Average (N, C, I, J, K) over cubes of 2 * radius + 1 voxels; at the border over the part inside."""
    size = 2 * radius + 1
    if min(image.shape[2:]) < size:
        # Pooling refuses a kernel longer than the image, as in a scan of one or two slices.
        return box_sum(image, radius) / box_sum(torch.ones_like(image[:1, :1]), radius)
    for kernel in ((size, 1, 1), (1, size, 1), (1, 1, size)):
        image = F.avg_pool3d(image, kernel, stride=1, padding=[n // 2 for n in kernel], count_include_pad=False)
    return image


def mind_ssc(image: Tensor) -> Tensor:
    """Compute the modality-independent self-similarity context (MIND-SSC) of (1, 1, I, J, K) intensities of any scale.

    Returns (1, 12, I, J, K) in (0, 1], from patches of 3 x 3 x 3 voxels; invariant to contrast, bias field and scanner.
    Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using Self-similarities", MICCAI
    2013.
    """
    if _is_compiled(image):
        return _compiled_mind(image)
    padded = F.pad(image, [1] * 6, mode="replicate")

    def shifted(offset: tuple[int, int, int]) -> Tensor:
        i, j, k = (slice(1 + step, 1 + step + n) for step, n in zip(offset, image.shape[2:], strict=True))
        return padded[:, :, i, j, k]

    distances = box_mean(torch.cat([(shifted(a) - shifted(b)) ** 2 for a, b in _PAIRS], dim=1), 1)
    distances = distances - distances.amin(dim=1, keepdim=True)
    noise = distances.mean(dim=1, keepdim=True)
    # The local noise estimate is kept within a factor 1000 of its mean, as in the authors' own code.
    middle = noise.mean()
    noise = noise.clamp(float(middle) * 1e-3, float(middle) * 1e3).clamp_min(1e-12)
    return torch.exp(-distances / noise)


def _is_compiled(image: Tensor) -> bool:
    """Whether the compiled loops can take it: float32 on a CPU, and no derivative is asked for."""
    return image.device.type == "cpu" and image.dtype == torch.float32 and not image.requires_grad


def _compiled_mind(image: Tensor) -> Tensor:
    """:func:`mind_ssc` by compiled loops: the channels are the last axis in memory."""
    padded = np.pad(image[0, 0].numpy(), 1, mode="edge")
    shape = image.shape[2:]
    values, noise = np.empty((*shape, MIND_CHANNELS), np.float32), np.empty(shape, np.float32)
    pairs = np.array(_PAIRS)
    in_slabs(lambda *part: kernels.patch_distances(padded, pairs, values, noise, *part), shape[0], noise.size)
    middle = float(noise.mean(dtype=np.float64))
    noise = noise.clip(max(middle * 1e-3, 1e-12), max(middle * 1e3, 1e-12))

    def finish(first: int, last: int) -> None:
        part = values[first:last]
        part /= -noise[first:last, ..., None]
        np.exp(part, out=part)

    in_slabs(finish, shape[0], noise.size)
    return torch.from_numpy(values).movedim(-1, 0)[None]


def box_sum(image: Tensor, radius: int) -> Tensor:
    """Sum (N, C, I, J, K) over cubes of 2 * radius + 1 voxels, zero beyond the border; faster than average pooling."""
    if _is_compiled(image):
        images = image.flatten(0, 1).contiguous().numpy()
        planes, cubes = np.empty_like(images), np.empty_like(images)
        in_slabs(lambda *part: kernels.sum_in_planes(images, radius, planes, *part), images.shape[1], images.size)
        in_slabs(lambda *part: kernels.sum_across(planes, radius, cubes, *part), images.shape[2], images.size)
        return torch.from_numpy(cubes).reshape(image.shape)
    for axis in (2, 3, 4):
        window, length = F.pad(image, [radius if n == axis else 0 for n in (4, 4, 3, 3, 2, 2)]), image.shape[axis]
        # 2 * radius + 1 in binary: runs of 1, 2, 4 ... voxels are summed by doubling and added up.
        image, offset, width, left = window.narrow(axis, 0, length), 1, 1, radius
        while left:
            short = window.shape[axis] - width
            window = window.narrow(axis, 0, short) + window.narrow(axis, width, short)
            width *= 2
            if left & 1:
                image = image + window.narrow(axis, offset, length)
                offset += width
            left >>= 1
    return image


class LocalCorrelation:
    """Squared local correlation (LNCC) with one fixed image, (1, 1, I, J, K) in [0, 1], in cubes of a radius in voxels.

    Invariant to contrast that changes slowly over the scan (coils, bias field).
    """

    def __init__(self, fixed: Tensor, radius: int) -> None:
        self.fixed, self.radius = fixed, radius
        self.inverse_count = 1 / box_sum(torch.ones_like(fixed), radius)
        self.mean = box_sum(fixed, radius) * self.inverse_count
        variance = box_sum(fixed * fixed, radius) * self.inverse_count - self.mean**2
        self.variance = variance.clamp_min(0) + _NOISE_VARIANCE

    def __call__(self, moving: Tensor) -> Tensor:
        """(1, 1, I, J, K) intensities in [0, 1] to (1, 1, I, J, K) squared correlations in [0, 1]."""
        covariance, variance, _ = self._moments(moving)
        return covariance**2 / (self.variance * variance)

    def dissimilarity(self, moving: Tensor, weight: Tensor) -> Tensor:
        """Sum 1 minus the squared correlation, weighted; differentiable in ``moving`` alone."""
        value: Tensor = _CorrelationLoss.apply(moving, weight, self)  # type: ignore[no-untyped-call]
        return value

    def value_and_slopes(self, moving: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`dissimilarity` and its derivative by the moving image in four box sums."""
        if _is_compiled(moving) and moving.dtype == self.fixed.dtype:
            return self._compiled(moving, weight)
        covariance, variance, mean = self._moments(moving)
        ratio = covariance / (self.variance * variance)
        squared = ratio * covariance
        # For cube x: d squared = 2 ratio d covariance - squared / variance d variance, where a voxel y of the cube has
        # d covariance = (fixed(y) - mean of fixed) / count, d variance = 2 (moving(y) - mean) / count. Sums over all
        # cubes that hold y are box sums again.
        pull = weight * ratio * self.inverse_count
        push = weight * squared / variance * self.inverse_count
        sums = box_sum(torch.cat((pull, pull * self.mean, push, push * mean), dim=1), self.radius)
        gradient = 2 * (sums[:, 1:2] - sums[:, :1] * self.fixed + sums[:, 2:3] * moving - sums[:, 3:])
        return (weight * (1 - squared)).sum(), gradient

    def _compiled(self, moving: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`value_and_slopes` by compiled loops."""
        one, fixed, own = (image[0, 0].contiguous().numpy() for image in (moving, self.fixed, weight))
        of_fixed = tuple(image[0, 0].numpy() for image in (self.mean, self.variance, self.inverse_count))
        radius, numbers, planes = self.radius, (self.radius, np.float32(_NOISE_VARIANCE)), len(one)
        sums, pulls = np.empty((4, *one.shape), np.float32), np.empty((4, *one.shape), np.float32)
        in_slabs(lambda *part: kernels.moment_sums(one, fixed, radius, sums[:3], *part), planes, one.size)
        value = in_slabs(
            lambda *part: kernels.correlation_pulls(sums[:3], of_fixed, own, numbers, pulls, *part), planes, one.size
        )
        in_slabs(lambda *part: kernels.sum_in_planes(pulls, radius, sums, *part), planes, one.size)
        slopes = np.empty_like(one)
        in_slabs(lambda *part: kernels.correlation_slopes(sums, one, fixed, radius, slopes, *part), planes, one.size)
        return torch.tensor(sum(value)), torch.from_numpy(slopes)[None, None]

    def _moments(self, moving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance with the fixed image, variance and mean of the moving one, in every cube."""
        stacked = torch.cat((moving, moving * moving, moving * self.fixed), dim=1)
        means = box_sum(stacked, self.radius) * self.inverse_count
        mean = means[:, :1]
        variance = (means[:, 1:2] - mean**2).clamp_min(0) + _NOISE_VARIANCE
        return means[:, 2:] - mean * self.mean, variance, mean


class _CorrelationLoss(torch.autograd.Function):
    """:meth:`LocalCorrelation.dissimilarity` with its written-out derivative."""

    @staticmethod
    def forward(ctx: Any, moving: Tensor, weight: Tensor, correlation: LocalCorrelation) -> Tensor:
        value, gradient = correlation.value_and_slopes(moving, weight)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None
