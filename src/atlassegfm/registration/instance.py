"""The deformable engine ``instance``: the displacement field itself is optimised on the pair, coarse to fine.

The displacement lives on a control grid of every second voxel, is smoothed by two passes of a 3-voxel cube
and interpolated to the voxels (in effect a B-spline). Adam lowers the MIND-SSC difference, one minus the
local correlation, and the squared gradient of the displacement (cf. Siebert, Hansen & Heinrich, "Fast 3D
Registration with Accurate Optimisation and Little Learning for Learn2Reg 2021", whose second stage is alike).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..image import Volume
from ..transforms import Affine, DisplacementField, resample
from .features import MIND_CHANNELS, LocalCorrelation, mind_ssc
from .pair import Fitted, Pair
from .pyramid import axes_of, frame_grid, on_grid

if TYPE_CHECKING:
    from .settings import RegistrationSettings

#: Voxels between control points.
_STRIDE = 2
#: Cube of the local correlation, voxels. On Abd-MR, atlas 001: 2, 3 and 5 within 0.004 of each other.
_CORRELATION_RADIUS = 3
_CORRELATION_WEIGHT = 0.5
#: Tissue squeezed to less than this share of its volume is penalised.
_LEAST_VOLUME = 0.3
#: Adam's step in voxels of the level.
_STEP_VOXELS = 0.5


def fit(
    pair: Pair, linear: Affine, start: DisplacementField | None, settings: RegistrationSettings, device: str
) -> Fitted:
    """Optimise the displacement of one pair.

    Parameters
    ----------
    pair : Pair
        Query and atlas.
    linear : Affine
        Fixed to moving world, applied after the field.
    start : DisplacementField or None
        To begin with.

    Returns
    -------
    Fitted
        Its field lies on the fine level's grid.
    """
    options = settings.instance
    fixed, moving, spacings_mm = pair.fixed_scan, pair.moving_scan, pair.spacings_mm
    axes = axes_of(fixed.intensity.grid)
    field = start
    iterations = (options.coarse_iterations, options.fine_iterations)[-len(spacings_mm) :]
    for spacing, steps in zip(spacings_mm, iterations, strict=True):
        grid = frame_grid(fixed.intensity.grid, axes, spacing)
        query, atlas = on_grid(fixed, grid, device), on_grid(moving, grid, device, linear)
        shape = grid.shape
        control_shape = [-(-n // _STRIDE) + 1 for n in shape]
        if field is None:
            control = torch.zeros(1, 3, *control_shape, device=device)
        else:
            displacement = np.stack([resample(Volume(u, field.grid), grid) for u in field.displacement_mm])
            voxels = np.einsum("av,vijk->aijk", grid.inverse_affine[:3, :3], displacement).astype(np.float32)
            control = F.interpolate(
                torch.from_numpy(voxels).to(device)[None], control_shape, mode="trilinear", align_corners=True
            )
        control.requires_grad_(True)
        query_mind = mind_ssc(query.image)
        atlas_channels = torch.cat((mind_ssc(atlas.image), atlas.image, atlas.inside), dim=1)
        correlation = LocalCorrelation(query.image, _CORRELATION_RADIUS)
        weight = query.weight / query.weight.sum().clamp_min(1e-6)
        nodes = torch.stack(
            torch.meshgrid(*[torch.arange(n, dtype=torch.float32, device=device) for n in shape], indexing="ij"), -1
        )[None]
        to_unit = 2 / (torch.tensor(shape, dtype=torch.float32, device=device) - 1).clamp_min(1)
        optimizer = torch.optim.Adam([control], lr=_STEP_VOXELS)
        for _ in range(steps):
            smooth = _smooth(control)
            displaced = nodes + F.interpolate(smooth, shape, mode="trilinear", align_corners=True).movedim(1, -1)
            warped = _sample(atlas_channels, (displaced * to_unit - 1).flip(-1))
            # What is outside the atlas says nothing; it must not pay to leave it either, so no gradient through this.
            counted = weight * warped[:, -1:].detach()
            difference = (warped[:, :MIND_CHANNELS] - query_mind).pow(2).mean(dim=1, keepdim=True)
            unlike = 1 - correlation(warped[:, MIND_CHANNELS : MIND_CHANNELS + 1])
            roughness = sum((smooth.diff(dim=axis) / _STRIDE).pow(2).mean() for axis in (2, 3, 4))
            loss = (
                options.mind_weight * (difference * counted).sum()
                + _CORRELATION_WEIGHT * (unlike * counted).sum()
                + options.smoothness * roughness
                + options.folding_penalty * _compression(smooth / _STRIDE)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            smooth = F.interpolate(_smooth(control), shape, mode="trilinear", align_corners=True)[0]
        world = np.einsum("wv,vijk->wijk", grid.affine[:3, :3], smooth.cpu().numpy())
        field = DisplacementField(grid, world.astype(np.float32))
    if field is None:
        raise ValueError("there must be a level to fit on")
    return Fitted(linear, field, {"deformable": control.numel()})


def _sample(channels: Tensor, where: Tensor) -> Tensor:
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


def _compression(displacement: Tensor) -> Tensor:
    """Mean squared shortfall of the Jacobian determinant below :data:`_LEAST_VOLUME`.

    Parameters
    ----------
    displacement : Tensor, (1, 3, I, J, K)
        In units of its own grid's spacing.
    """
    rows = []
    for axis in (2, 3, 4):
        row = displacement.diff(dim=axis)
        # Forward differences, cut to the nodes that have all three.
        for other in (2, 3, 4):
            if other != axis:
                row = row.narrow(other, 0, row.shape[other] - 1)
        rows.append(row[0])
    x, y, z = rows
    determinant = (
        (1 + x[0]) * ((1 + y[1]) * (1 + z[2]) - y[2] * z[1])
        - x[1] * (y[0] * (1 + z[2]) - y[2] * z[0])
        + x[2] * (y[0] * z[1] - (1 + y[1]) * z[0])
    )
    return (_LEAST_VOLUME - determinant).clamp_min(0).pow(2).mean()


def _smooth(control: Tensor) -> Tensor:
    """Two passes of a mean over 3 x 3 x 3 control points: about a cubic B-spline."""
    for _ in range(2):
        control = F.avg_pool3d(F.pad(control, [1] * 6, mode="replicate"), 3, stride=1)
    return control
