"""Registration of the atlas (moving) to the query (fixed).

The transform maps query world to atlas world, RAS+ mm. Everything is optimised on the one pair, nothing is trained.
PyTorch is loaded by the first registration, not by importing this package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from ..core.compiled import is_kept
from ..core.errors import InputError
from ..core.geometry import Grid
from ..core.image import Volume
from ..core.parallel import parallel_map
from ..core.progress import StageClock
from ..settings import InstanceSettings, RegistrationSettings
from ..transforms.jacobian import deformation_statistics, nodes_in
from ..transforms.maps import Affine, Transform, points_over, stages_of
from .engines import ENGINES, require_engine
from .result import Place, Registration, nearest_of

__all__ = [
    "ENGINES",
    "Labelled",
    "Place",
    "Registration",
    "nearest_of",
    "rank",
    "register",
    "register_all",
    "registration_from",
    "require_engine",
]

#: The scan of an atlas and its labels, on one grid.
Labelled = tuple[Volume, Volume]
#: Steps of the fit by which atlases are ranked; more of them, or an affine fit, rank no better.
_RANKING_ITERATIONS = 5

T = TypeVar("T")
R = TypeVar("R")


def register(
    fixed: Volume,
    moving: Volume,
    settings: RegistrationSettings | None = None,
    *,
    moving_labels: Volume | None = None,
    tubular: Collection[int] = (),
    initial: Affine | None = None,
    device: str = "cpu",
    on_stage: Callable[[str], None] | None = None,
) -> Registration:
    """Register the atlas to the query, both float32 intensities in any array order and any field of view.

    With ``moving_labels`` on the atlas's grid similarity weighs more near labelled structures, and each structure is
    searched for on its own; near the centre lines of the label values ``tubular``, which are vessels, it weighs more
    still. ``initial`` replaces the linear stages. ``device`` is "cpu" or "cuda". ``on_stage`` is
    called with the name of each stage as it begins.

    Raises :class:`.RegistrationError` if one of the scans holds nothing but background or an external engine fails, and
    :class:`.MissingExtraError` if the engine is another package's that is not installed.
    """
    from . import affine, centreline, dissimilarity, kernels, pyramid, structures

    settings = settings or RegistrationSettings()
    engine, clock = ENGINES[settings.engine], StageClock(on_stage)
    if device == "cpu" and not is_kept(kernels.warp):
        if on_stage is not None:
            on_stage("compile")
        _compile()
    with clock.stage("prepare"):
        spacings = pyramid.level_spacings_mm(fixed.grid, (settings.coarse_voxels, settings.fine_voxels))
        query = pyramid.prepare(fixed, None, spacings[-1], "query")
        atlas = pyramid.prepare(moving, moving_labels, spacings[-1], "atlas")
    wants_linear = initial is None and (settings.rigid or settings.affine)
    by_engine = wants_linear and engine.is_external and settings.peer_linear
    found = Registration(initial or Affine.identity(), None)
    if wants_linear and not by_engine:
        with clock.stage("linear"):
            linear, cost = affine.fit(query, atlas, spacings, settings, device)
        found = Registration(linear, None, parameter_count={"linear": 12 if settings.affine else 6}, linear_cost=cost)
    places: Mapping[int, Place] = {}
    if settings.deformable or by_engine:
        start = None
        if settings.structure_search and moving_labels is not None and engine.takes_start:
            search = partial(structures.fit, query, atlas, moving_labels, found.linear, spacings[-1], device)
            with clock.stage("structures"):
                searched, robust = search(), False
                if settings.instance.contrast_robust:
                    robust = searched.contrast_difference > settings.instance.contrast_tolerance
                if robust:
                    searched = search(brightness=False)
            places = searched.places
            start = None if searched.field is None else pyramid.Start(searched.field, contrast_robust=robust)
        with clock.stage("deformable"):
            line = None if moving_labels is None else centreline.find_centreline(moving_labels, tubular)
            pair = pyramid.Pair(fixed, moving, query, atlas, moving_labels, line)
            fitted = engine.load()(pair, None if by_engine else found.linear, start, settings, device)
        counts = {**found.parameter_count, **fitted.parameter_count}
        found = replace(fitted, parameter_count=counts, linear_cost=found.linear_cost)
    with clock.stage("assess"):
        measured = dissimilarity.measure(query, atlas, found.fixed_to_moving, spacings[-1])
        folding, jacobian = deformation_statistics(found.field, found.local, query.body)
    found = replace(found, seconds=clock.seconds, places=places)
    return replace(found, dissimilarity=measured, folding=folding, jacobian=jacobian)


def register_all(
    fixed: Volume,
    atlases: Sequence[Labelled],
    settings: RegistrationSettings | None = None,
    *,
    tubular: Collection[int] = (),
    device: str = "cpu",
    on_stage: Callable[[str], None] | None = None,
) -> list[Registration]:
    """Register several atlases to one query; as :func:`register`, on a CPU side by side with one thread each.

    ``on_stage`` is called with the stages of a single atlas, or with the number of each of several as it begins.
    """
    report = on_stage or (lambda _: None)

    def one(numbered: tuple[int, Labelled]) -> Registration:
        number, (moving, labels) = numbered
        if len(atlases) > 1:
            report(f"atlas {number} of {len(atlases)}")
        stages = on_stage if len(atlases) == 1 else None
        return register(fixed, moving, settings, moving_labels=labels, tubular=tubular, device=device, on_stage=stages)

    numbered = list(enumerate(atlases, start=1))
    return [one(numbered[0])] if len(atlases) == 1 else _side_by_side(one, numbered, device)


def _side_by_side(work: Callable[[T], R], parts: Sequence[T], device: str) -> list[R]:
    """Apply a function that computes with PyTorch to several parts, on a CPU with one thread each."""
    if device != "cpu":
        return [work(part) for part in parts]
    import torch

    # A registration keeps one core busier than it keeps two; threads started from here on take this number over.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(parallel_map(work, parts))
    finally:
        torch.set_num_threads(threads)


def rank(
    fixed: Volume, atlases: Sequence[Labelled], settings: RegistrationSettings | None = None, *, device: str = "cpu"
) -> list[int]:
    """Order atlases by how well they fit the query after a rough rigid fit on the coarse level, best first.

    What counts is the likeness near the atlas's structures and whether the query shows them. The result are positions
    in ``atlases``; it does not depend on their order, but for equal ones. RegistrationError as of :func:`register`.
    """
    from . import affine, pyramid

    settings = settings or RegistrationSettings()
    spacings = pyramid.level_spacings_mm(fixed.grid, (settings.coarse_voxels, settings.fine_voxels))[:1]
    query = pyramid.prepare(fixed, None, spacings[0], "query")
    rough = replace(settings, candidates=1, linear_iterations=_RANKING_ITERATIONS, affine=not settings.rigid)

    def cost(atlas: Labelled) -> float:
        return affine.fit(query, pyramid.prepare(*atlas, spacings[0], "atlas"), spacings, rough, device)[1]

    costs = _side_by_side(cost, atlases, device)
    return sorted(range(len(costs)), key=costs.__getitem__)


def _compile() -> None:
    """Compile the inner loops by registering noise to itself: once on a machine, in about 15 seconds."""
    from . import kernels

    noise = np.random.default_rng(0).uniform(0, 1, (24, 24, 24)).astype(np.float32)
    kernels.warp(noise, noise, np.zeros((3, 1, 1, 1), np.float32), noise, (noise, np.stack([noise] * 3), noise), 0, 0)
    scan = Volume(noise, Grid((24, 24, 24), np.eye(4)))
    labels = Volume((noise > 0.5).astype(np.uint8), scan.grid)
    few = RegistrationSettings(linear_iterations=1, instance=InstanceSettings(iterations=(1,), ensemble=1))
    register(scan, scan, few, moving_labels=labels)


def registration_from(
    transforms: Sequence[Transform], fixed: Volume, moving: Volume, settings: RegistrationSettings | None = None
) -> Registration:
    """Describe given transforms from query to atlas world, RAS+ mm, as a registration.

    The first transform is the one reported; labels are averaged over all. Scans are compared at the fine level of the
    settings; folding and volume changes are those of the field of view, not of the body.

    Raises :class:`.InputError` if the first transform maps no point of the query into the atlas, and
    :class:`.RegistrationError` if one of the scans holds nothing but background.
    """
    from . import dissimilarity, pyramid

    settings = settings or RegistrationSettings()
    transform, view = transforms[0], fixed.grid
    if not moving.grid.contains(transform.map(points_over(view))).any():
        raise InputError(
            "the transform maps no point of the query into the atlas; expected one from query points to atlas points: "
            "check that it belongs to these two scans and is not the inverse"
        )
    local, field, linear = stages_of(transform, view)
    folding, jacobian = deformation_statistics(field, local, partial(nodes_in, view))
    spacing_mm = pyramid.level_spacings_mm(view, (settings.coarse_voxels, settings.fine_voxels))[-1]
    query, atlas = pyramid.prepare(fixed, None, spacing_mm, "query"), pyramid.prepare(moving, None, spacing_mm, "atlas")
    measured = dissimilarity.measure(query, atlas, transform, spacing_mm)
    return Registration(linear, field, local, {}, measured, folding, jacobian, further_members=tuple(transforms[1:]))
