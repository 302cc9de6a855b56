"""Differentiable sampling of volumes, integration of velocities, regularisation of displacements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

#: Powers of the inverse root of x^4 = x + 1; modulo 1, their multiples fill the unit cube evenly.
_EVEN_STEPS = 1.2207440846057596 ** -torch.arange(1, 4, dtype=torch.float64)
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


def off_centre(voxels: Tensor, shape: Sequence[int]) -> Tensor:
    """Move voxels, (N, 3), each to another point of its middle half, within the array: (N, 3) float32.

    A translation by whole voxels puts all centres on nodes of the other grid at once, where a sum over them has a kink,
    a false maximum and no derivative: fits that started there went astray. The points are spread evenly, by Roberts'
    additive recurrence; over the whole voxel they would be no better, and interpolation would smooth their features.
    """
    steps = torch.arange(1, len(voxels) + 1, dtype=torch.float64)[:, None] * _EVEN_STEPS
    moves = (steps % 1 - 0.5) / 2
    last = torch.tensor(shape, dtype=torch.float64, device=voxels.device) - 1
    return torch.minimum((voxels + moves.to(voxels.device)).clamp_min(0), last).float()


def sample_points(channels: Tensor, points: Tensor) -> Tensor:
    """Sample (C, I, J, K) at (N, 3) voxels by linear interpolation, (C, N); border values beyond the border."""
    last = torch.tensor(channels.shape[1:], dtype=torch.float32, device=channels.device) - 1
    where = (points / last.clamp_min(1) * 2 - 1).flip(-1)
    return sample_at(channels[None], where[None, :, None, None])[0, :, :, 0, 0]


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
