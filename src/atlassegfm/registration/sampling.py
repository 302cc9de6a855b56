"""Reading tensors at points, and following a velocity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_at(channels: Tensor, where: Tensor) -> Tensor:
    """Read a volume at points, the border's values beyond it.

    PyTorch samples one volume with one thread on a CPU. Cut into as many slabs as there are threads, each beside
    the same volume, it uses them all, to the same bits.

    Parameters
    ----------
    channels : Tensor, (1, C, I, J, K)
    where : Tensor, (1, A, B, D, 3)
        In units of -1 to 1, the last axis first, as :func:`torch.nn.functional.grid_sample` takes it.

    Returns
    -------
    Tensor, (1, C, A, B, D)
    """
    planes = where.shape[1]
    slabs = min(torch.get_num_threads(), planes) if channels.device.type == "cpu" else 1
    thickness = -(-planes // slabs)
    filled = F.pad(where, (0, 0, 0, 0, 0, 0, 0, slabs * thickness - planes))
    sampled = F.grid_sample(
        channels.expand(slabs, -1, -1, -1, -1),
        filled.reshape(slabs, thickness, *where.shape[2:]),
        padding_mode="border",
        align_corners=True,
    )
    return sampled.movedim(1, 0).flatten(1, 2)[None, :, :planes]


def sample_displaced(channels: Tensor, displacement: Tensor) -> Tensor:
    """Read a volume at displaced voxels, the border's values beyond it.

    Parameters
    ----------
    channels : Tensor, (1, C, I, J, K)
    displacement : Tensor, (1, 3, I, J, K)
        In voxels of the same grid.

    Returns
    -------
    Tensor, (1, C, I, J, K)
    """
    shape = displacement.shape[2:]
    axes = [torch.linspace(-1, 1, n, device=displacement.device) for n in shape]
    nodes = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    to_unit = 2 / (torch.tensor(shape, dtype=torch.float32, device=displacement.device) - 1).clamp_min(1)
    return sample_at(channels, (nodes + displacement.movedim(1, -1) * to_unit).flip(-1))


def flow(velocity: Tensor, squarings: int) -> Tensor:
    """The displacement after unit time along a velocity that does not change, by scaling and squaring.

    Arsigny et al., "A Log-Euclidean Framework for Statistics on Diffeomorphisms", MICCAI 2006. It can be undone as far
    as a step, ``velocity / 2**squarings``, is small.

    Parameters
    ----------
    velocity : Tensor, (1, 3, I, J, K)
        In units of its own grid's spacing.
    squarings : int

    Returns
    -------
    Tensor, (1, 3, I, J, K)
        In units of the grid's spacing.
    """
    displacement: Tensor = velocity / 2**squarings
    for _ in range(squarings):
        displacement = displacement + sample_displaced(displacement, displacement)
    return displacement
