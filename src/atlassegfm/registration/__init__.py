"""Registration of the atlas (moving) to the query (fixed).

The transform maps query world to atlas world, RAS+ mm. Everything is optimised on the one pair, nothing is trained.
PyTorch is loaded by the first registration, not by importing this package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..core.image import Volume
from ..settings import RegistrationSettings
from ..transforms.maps import Affine, Transform
from .engines import ENGINES, require_engine
from .result import Registration

if TYPE_CHECKING:
    from .dissimilarity import Dissimilarity

__all__ = ["ENGINES", "Registration", "compare", "register", "require_engine"]


def compare(
    fixed: Volume, moving: Volume, fixed_to_moving: Transform, settings: RegistrationSettings | None = None
) -> Dissimilarity:
    """Measure the dissimilarity of query and atlas through a given transform, at the fine level of the settings.

    Raises
    ------
    RegistrationError
        If one of the scans holds nothing but background.
    """
    from . import dissimilarity, pyramid

    settings = settings or RegistrationSettings()
    spacing_mm = pyramid.level_spacings_mm(fixed.grid, (settings.coarse_voxels, settings.fine_voxels))[-1]
    query, atlas = pyramid.prepare(fixed, None, spacing_mm, "query"), pyramid.prepare(moving, None, spacing_mm, "atlas")
    return dissimilarity.measure(query, atlas, fixed_to_moving, spacing_mm)


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
        Where to compute.
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
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        if on_stage is not None:
            on_stage(name)
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin

    with stage("prepare"):
        spacings = pyramid.level_spacings_mm(fixed.grid, (settings.coarse_voxels, settings.fine_voxels))
        query = pyramid.prepare(fixed, None, spacings[-1], "query")
        atlas = pyramid.prepare(moving, moving_labels, spacings[-1], "atlas")
    wants_linear = initial is None and (settings.rigid or settings.affine)
    by_engine = wants_linear and engine.is_external and settings.peer_linear
    found = Registration(initial or Affine.identity(), None)
    if wants_linear and not by_engine:
        with stage("linear"):
            linear, _ = affine.fit(query, atlas, spacings, settings, device)
        found = Registration(linear, None, parameter_count={"linear": 12 if settings.affine else 6})
    if settings.deformable or by_engine:
        start = None
        if settings.structure_search and moving_labels is not None and engine.takes_start:
            search = partial(structure_affine.fit, query, atlas, moving_labels, found.linear, spacings[-1], device)
            with stage("structures"):
                field = search(brightness=True)
            start = None if field is None else Start(field, partial(search, brightness=False))
        with stage("deformable"):
            pair = Pair(fixed, moving, query, atlas, moving_labels)
            fitted = engine.load()(pair, None if by_engine else found.linear, start, settings, device)
        found = replace(fitted, parameter_count={**found.parameter_count, **fitted.parameter_count})
    with stage("assess"):
        measured = dissimilarity.measure(query, atlas, found.fixed_to_moving, spacings[-1])
        folding, jacobian = 0.0, None
        if found.field is not None:
            folding, jacobian = pyramid.volume_changes(found.field, found.local, query)
    return replace(found, seconds=seconds, dissimilarity=measured, folding=folding, jacobian=jacobian)
