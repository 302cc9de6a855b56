"""Differentiable sampling of volumes, integration of velocities, regularisation of displacements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..core.compiled import in_slabs

#: Added to maps to voxels, (B, 3, 4), of arrays with a border of one voxel.
BORDER = torch.tensor([[0.0, 0, 0, 1]])
#: A compiled loop over the points from first to last by (B, 3, 4) maps: (B, K, 4, 4); see :func:`sums_by`.
MapLoop = Callable[[NDArray[np.float32], int, int], NDArray[np.float64]]


def with_ones(points: Tensor) -> NDArray[np.float32]:
    """(4, N) points x, y, z, 1, as compiled loops take them, of (N, 3)."""
    return F.pad(points.cpu(), (0, 1), value=1).T.contiguous().numpy()


def sums_by(maps: Tensor, loop: MapLoop, count: int) -> Tensor:
    """Sum K functions of position over ``count`` points moved by linear maps, (B, 3, 4), on a CPU: (B, K) float64.

    Differentiable in the maps; the points themselves are known to the compiled loop alone. It returns each function
    and its three derivatives by position, times the point (x, y, z, 1) before it was moved, in sum.
    """
    sums: Tensor = _SumsBy.apply(maps, loop, count)  # type: ignore[no-untyped-call]
    return sums


class _SumsBy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, loop: MapLoop, count: int) -> Tensor:
        numbers = maps.detach().contiguous().numpy()
        sums = torch.from_numpy(sum(in_slabs(partial(loop, numbers), count, count * len(maps))))
        ctx.save_for_backward(sums[:, :, 1:])
        return sums[:, :, 0, 3]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return (upstream[..., None, None] * ctx.saved_tensors[0]).sum(dim=1), None, None


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
