"""Registration of the atlas (moving) to the query (fixed).

The transform maps query world to atlas world, RAS+ mm. Everything is optimised on the one pair, nothing is trained.
PyTorch is loaded by the first registration, not by importing this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..core.image import Volume
from ..core.progress import StageClock
from ..settings import RegistrationSettings
from ..transforms.jacobian import deformation_statistics
from ..transforms.maps import Affine
from .engines import ENGINES, require_engine
from .result import Registration

__all__ = ["ENGINES", "Registration", "register", "require_engine"]


def register(
    fixed: Volume,
    moving: Volume,
    settings: RegistrationSettings | None = None,
    *,
    moving_labels: Volume | None = None,
    initial: Affine | None = None,
    device: str = "cpu",
    on_stage: Callable[[str], None] | None = None,
) -> Registration:
    """Register the atlas to the query.

    Parameters
    ----------
    fixed, moving : Volume
        Query and atlas: float32 intensities in any array order and any field of view.
    settings : RegistrationSettings, optional
        Defaults if left out.
    moving_labels : Volume, optional
        Labels of the atlas, on its grid. Similarity weighs more near labelled structures, and each structure is
        searched for on its own.
    initial : Affine, optional
        Replaces the linear stages.
    device : {"cpu", "cuda"}
    on_stage : callable, optional
        Called with the name of each stage as it begins.

    Raises
    ------
    RegistrationError
        If one of the scans holds nothing but background, or an external engine fails.
    MissingExtraError
        If the engine is another package's, and that is not installed.
    """
    from . import affine, dissimilarity, pyramid, structure_affine
    from .pair import Pair, Start

    settings = settings or RegistrationSettings()
    engine = ENGINES[settings.engine]
    clock = StageClock(on_stage)
    with clock.stage("prepare"):
        spacings = pyramid.level_spacings_mm(fixed.grid, (settings.coarse_voxels, settings.fine_voxels))
        query = pyramid.prepare(fixed, None, spacings[-1], "query")
        atlas = pyramid.prepare(moving, moving_labels, spacings[-1], "atlas")
    wants_linear = initial is None and (settings.rigid or settings.affine)
    by_engine = wants_linear and engine.is_external and settings.peer_linear
    found = Registration(initial or Affine.identity(), None)
    if wants_linear and not by_engine:
        with clock.stage("linear"):
            linear, _ = affine.fit(query, atlas, spacings, settings, device)
        found = Registration(linear, None, parameter_count={"linear": 12 if settings.affine else 6})
    if settings.deformable or by_engine:
        start = None
        if settings.structure_search and moving_labels is not None and engine.takes_start:
            search = partial(structure_affine.fit, query, atlas, moving_labels, found.linear, spacings[-1], device)
            with clock.stage("structures"):
                field = search(brightness=True)
            start = None if field is None else Start(field, partial(search, brightness=False))
        with clock.stage("deformable"):
            pair = Pair(fixed, moving, query, atlas, moving_labels)
            fitted = engine.load()(pair, None if by_engine else found.linear, start, settings, device)
        found = replace(fitted, parameter_count={**found.parameter_count, **fitted.parameter_count})
    with clock.stage("assess"):
        measured = dissimilarity.measure(query, atlas, found.fixed_to_moving, spacings[-1])
        folding, jacobian = 0.0, None
        if found.field is not None:
            folding, jacobian = deformation_statistics(found.field, found.local, query.body)
    return replace(found, seconds=clock.seconds, dissimilarity=measured, folding=folding, jacobian=jacobian)
