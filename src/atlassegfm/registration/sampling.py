"""Differentiable sampling of volumes, integration of velocities, regularisation of displacements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

#: A function from (B, P) to (B, K), and its derivatives, (B, K, P).
Known = Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]


def with_ones(points: Tensor) -> NDArray[np.float32]:
    """(4, N) points x, y, z, 1, as compiled loops take them, of (N, 3)."""
    return F.pad(points.cpu(), (0, 1), value=1).T.contiguous().numpy()


def evaluate(parameters: Tensor, function: Known) -> Tensor:
    """Evaluate a function that knows its derivatives at (B, P) on a CPU: (B, K) float64, differentiable."""
    values: Tensor = _Evaluated.apply(parameters, function)  # type: ignore[no-untyped-call]
    return values


class _Evaluated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameters: Tensor, function: Known) -> Tensor:
        values, slopes = function(parameters.detach().double().numpy())
        ctx.slopes = torch.from_numpy(slopes)
        return torch.from_numpy(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return (upstream[..., None] * ctx.slopes).sum(dim=1), None


def sample_at(channels: Tensor, where: Tensor) -> Tensor:
    """Sample (1, C, I, J, K) at points, (1, A, B, D, 3), by linear interpolation; border values beyond the border.

    Points are as :func:`torch.nn.functional.grid_sample` takes them: -1 to 1, the last axis first. PyTorch samples one
    volume with one thread on a CPU; cut into slabs it uses all threads, with identical results.
    """
    planes = where.shape[1]
    slabs = min(torch.get_num_threads(), planes) if channels.device.type == "cpu" else 1
    thickness = -(-planes // slabs)
    filled = F.pad(where, (0, 0, 0, 0, 0, 0, 0, slabs * thickness - planes))
    filled = filled.reshape(slabs, thickness, *where.shape[2:])
    volumes = channels.expand(slabs, -1, -1, -1, -1)
    sampled = F.grid_sample(volumes, filled, padding_mode="border", align_corners=True)
    return sampled.movedim(1, 0).flatten(1, 2)[None, :, :planes]


def sample_displaced(channels: Tensor, displacement: Tensor) -> Tensor:
    """Warp (1, C, I, J, K) by a displacement, (1, 3, I, J, K), in voxels of the same grid."""
    shape = displacement.shape[2:]
    axes = [torch.linspace(-1, 1, n, device=displacement.device) for n in shape]
    nodes = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    to_unit = 2 / (torch.tensor(shape, dtype=torch.float32, device=displacement.device) - 1).clamp_min(1)
    return sample_at(channels, (nodes + displacement.movedim(1, -1) * to_unit).flip(-1))


def integrate_velocity(velocity: Tensor, squarings: int) -> Tensor:
    """Integrate a stationary velocity, (1, 3, I, J, K) in voxels, to a displacement by scaling and squaring.

    Arsigny et al., "A Log-Euclidean Framework for Statistics on Diffeomorphisms", MICCAI 2006. Invertible as far as a
    step, ``velocity / 2**squarings``, is small.
    """
    displacement: Tensor = velocity / 2**squarings
    for _ in range(squarings):
        displacement = displacement + sample_displaced(displacement, displacement)
    return displacement


def gradient_penalty(displacement: Tensor) -> Tensor:
    """Sum the mean squared forward differences (diffusion regularisation) of (1, 3, I, J, K) along the three axes."""
    squares = (displacement.diff(dim=axis).pow(2).mean() for axis in (2, 3, 4))
    return sum(squares, torch.zeros((), device=displacement.device))
