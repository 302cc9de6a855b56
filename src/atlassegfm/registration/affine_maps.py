"""Linear maps by twelve numbers that are zero for no change, and cannot mirror."""

from __future__ import annotations

import torch
from torch import Tensor


def affine_maps(parameters: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices and offsets of linear maps that turn, stretch and shift around a centre.

    Parameters
    ----------
    parameters : Tensor, (B, 12)
        Translation, rotation vector in radians, log scales along the axes, log shears.
    centre : Tensor, (3,)
        What a map without translation leaves in place.

    Returns
    -------
    matrix : Tensor, (B, 3, 3)
        Of positive determinant.
    offset : Tensor, (B, 3)
    """
    shift, turn, scale, shear = parameters.split(3, dim=1)
    zero = torch.zeros_like(turn[:, 0])
    skew = torch.stack(
        (zero, -turn[:, 2], turn[:, 1], turn[:, 2], zero, -turn[:, 0], -turn[:, 1], turn[:, 0], zero), dim=1
    ).reshape(-1, 3, 3)
    stretch = torch.stack(
        (
            *(scale[:, 0], shear[:, 0], shear[:, 1]),
            *(shear[:, 0], scale[:, 1], shear[:, 2]),
            *(shear[:, 1], shear[:, 2], scale[:, 2]),
        ),
        dim=1,
    ).reshape(-1, 3, 3)
    matrix = torch.matrix_exp(skew) @ torch.matrix_exp(stretch)
    return matrix, centre + shift - (matrix @ centre[:, None])[..., 0]
