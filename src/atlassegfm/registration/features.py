"""Image features that registration compares: MIND-SSC and local correlation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: The six neighbours whose patches are compared (Heinrich et al. 2013, figure 2).
_NEIGHBOURS = ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0))
#: Pairs of them at distance sqrt 2: all but the three opposite pairs.
_PAIRS = tuple(
    (a, b)
    for position, a in enumerate(_NEIGHBOURS)
    for b in _NEIGHBOURS[position + 1 :]
    if any(first + second for first, second in zip(a, b, strict=True))
)
MIND_CHANNELS = len(_PAIRS)


def box_mean(image: Tensor, radius: int) -> Tensor:
    """Average (N, C, I, J, K) over cubes of 2 * radius + 1 voxels; at the border over the part inside."""
    size = 2 * radius + 1
    if min(image.shape[2:]) < size:
        # Pooling refuses a kernel longer than the image, as in a scan of one or two slices.
        return box_sum(image, radius) / box_sum(torch.ones_like(image[:1, :1]), radius)
    for axis in range(3):
        kernel = [1, 1, 1]
        padding = [0, 0, 0]
        kernel[axis], padding[axis] = size, radius
        image = F.avg_pool3d(image, kernel, stride=1, padding=padding, count_include_pad=False)
    return image


def mind_ssc(image: Tensor) -> Tensor:
    """Compute the modality-independent self-similarity context of every voxel.

    Patches of 3 x 3 x 3 voxels; invariant to contrast, bias field and scanner. Heinrich et al., "Towards Realtime
    Multimodal Fusion for Image-Guided Interventions Using Self-similarities", MICCAI 2013.

    Parameters
    ----------
    image : Tensor, (1, 1, I, J, K) float32
        Intensities, any scale.

    Returns
    -------
    Tensor, (1, 12, I, J, K) float32
        Each in (0, 1].
    """
    padded = F.pad(image, [1] * 6, mode="replicate")
    size = image.shape[2:]

    def shifted(offset: tuple[int, int, int]) -> Tensor:
        a, b, c = (1 + step for step in offset)
        return padded[:, :, a : a + size[0], b : b + size[1], c : c + size[2]]

    differences = torch.cat([(shifted(a) - shifted(b)) ** 2 for a, b in _PAIRS], dim=1)
    distances = box_mean(differences, 1)
    distances = distances - distances.amin(dim=1, keepdim=True)
    noise = distances.mean(dim=1, keepdim=True)
    # The local noise estimate is kept within a factor 1000 of its mean, as in the authors' own code.
    middle = noise.mean()
    noise = noise.clamp(float(middle) * 1e-3, float(middle) * 1e3).clamp_min(1e-12)
    return torch.exp(-distances / noise)


def box_sum(image: Tensor, radius: int) -> Tensor:
    """Sum (N, C, I, J, K) over cubes of 2 * radius + 1 voxels; zero beyond the border.

    Adding shifted copies is four times as fast on a CPU as average pooling, which re-reads the cube for every voxel.
    """
    for axis in (2, 3, 4):
        padding = [0] * 6
        padding[2 * (4 - axis)] = padding[2 * (4 - axis) + 1] = radius
        window, length = F.pad(image, padding), image.shape[axis]
        # The window's length in binary: runs of 1, 2, 4 ... voxels are summed by doubling and added up.
        left, width, offset = 2 * radius + 1, 1, 0
        total: Tensor | None = None
        while left:
            if left & 1:
                part = window.narrow(axis, offset, length)
                total = part if total is None else total + part
                offset += width
            left >>= 1
            if left:
                short = window.shape[axis] - width
                window = window.narrow(axis, 0, short) + window.narrow(axis, width, short)
                width *= 2
        image = total if total is not None else image
    return image


class LocalCorrelation:
    """Squared local correlation (LNCC) with one fixed image, (1, 1, I, J, K) in [0, 1], in cubes of a radius in voxels.

    Invariant to contrast that changes slowly over the scan (coils, bias field).
    """

    #: Added to both variances: contrast below 2 % of the range is noise.
    _NOISE_VARIANCE = 0.02**2

    def __init__(self, fixed: Tensor, radius: int) -> None:
        self.fixed, self.radius = fixed, radius
        self.inverse_count = 1 / box_sum(torch.ones_like(fixed), radius)
        self.mean = box_sum(fixed, radius) * self.inverse_count
        self.variance = (box_sum(fixed * fixed, radius) * self.inverse_count - self.mean**2).clamp_min(
            0
        ) + self._NOISE_VARIANCE

    def __call__(self, moving: Tensor) -> Tensor:
        """(1, 1, I, J, K) intensities in [0, 1] to (1, 1, I, J, K) squared correlations in [0, 1]."""
        covariance, variance, _ = self._moments(moving)
        return covariance**2 / (self.variance * variance)

    def dissimilarity(self, moving: Tensor, weight: Tensor) -> Tensor:
        """Sum 1 minus the squared correlation, weighted; differentiable in ``moving`` alone.

        Its derivative is written out in four more box sums; PyTorch's own, through the shifted copies, costs two
        thirds more.
        """
        value: Tensor = _CorrelationLoss.apply(moving, weight, self)  # type: ignore[no-untyped-call]
        return value

    def _moments(self, moving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance with the fixed image, variance and mean of the moving one, in every cube."""
        stacked = torch.cat((moving, moving * moving, moving * self.fixed), dim=1)
        means = box_sum(stacked, self.radius) * self.inverse_count
        mean = means[:, :1]
        variance = (means[:, 1:2] - mean**2).clamp_min(0) + self._NOISE_VARIANCE
        return means[:, 2:] - mean * self.mean, variance, mean


class _CorrelationLoss(torch.autograd.Function):
    """See :meth:`LocalCorrelation.dissimilarity`."""

    @staticmethod
    def forward(ctx: Any, moving: Tensor, weight: Tensor, correlation: LocalCorrelation) -> Tensor:
        covariance, variance, mean = correlation._moments(moving)
        ratio = covariance / (correlation.variance * variance)
        squared = ratio * covariance
        # For cube x: d squared = 2 ratio d covariance - squared / variance d variance, where a voxel y of the cube has
        # d covariance = (fixed(y) - mean of fixed) / count, d variance = 2 (moving(y) - mean) / count. Sums over all
        # cubes that hold y are box sums again.
        pull = weight * ratio * correlation.inverse_count
        push = weight * squared / variance * correlation.inverse_count
        sums = box_sum(torch.cat((pull, pull * correlation.mean, push, push * mean), dim=1), correlation.radius)
        gradient = 2 * (sums[:, 1:2] - sums[:, :1] * correlation.fixed + sums[:, 2:3] * moving - sums[:, 3:])
        ctx.save_for_backward(gradient)
        return (weight * (1 - squared)).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None
