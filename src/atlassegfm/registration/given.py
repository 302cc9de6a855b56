"""A transform from elsewhere, taken instead of registering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.errors import InputError
from ..core.image import Volume
from ..settings import RegistrationSettings
from ..transforms.jacobian import deformation_statistics, nodes_in
from ..transforms.maps import Transform, stages_of
from . import Registration

#: Points along each axis of the query's field of view at which the transform is tried.
_TRIED_POINTS = 16


def registration_from(
    transforms: Sequence[Transform], fixed: Volume, moving: Volume, settings: RegistrationSettings | None = None
) -> Registration:
    """Describe given transforms from query to atlas world, RAS+ mm, as a registration.

    The first transform is the one reported; labels are averaged over all. Scans are compared at the fine level of the
    settings; folding and volume changes are those of the field of view, not of the body.

    Raises
    ------
    InputError
        If the first transform maps no point of the query into the atlas.
    RegistrationError
        If one of the scans holds nothing but background.
    """
    from . import dissimilarity, pyramid

    settings = settings or RegistrationSettings()
    transform, view = transforms[0], fixed.grid
    axes = [np.linspace(-0.5, n - 0.5, _TRIED_POINTS) for n in view.shape]
    points = view.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
    if not moving.grid.contains(transform.map(points)).any():
        raise InputError(
            "the transform maps no point of the query into the atlas; expected one from query points to atlas points: "
            "check that it belongs to these two scans and is not the inverse"
        )
    local, field, linear = stages_of(transform, view)
    folding, jacobian = 0.0, None
    if field is not None:
        folding, jacobian = deformation_statistics(field, local, lambda nodes: nodes_in(view, nodes))
    spacing_mm = pyramid.level_spacings_mm(view, (settings.coarse_voxels, settings.fine_voxels))[-1]
    query, atlas = pyramid.prepare(fixed, None, spacing_mm, "query"), pyramid.prepare(moving, None, spacing_mm, "atlas")
    return Registration(
        linear,
        field,
        local,
        dissimilarity=dissimilarity.measure(query, atlas, transform, spacing_mm),
        folding=folding,
        jacobian=jacobian,
        further_members=tuple(transforms[1:]),
    )
