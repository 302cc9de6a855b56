"""Bringing the atlas into the query's space.

The query is fixed, the atlas is moving; the result maps query world to atlas world, RAS+ mm. Everything is
optimised on the one pair, nothing is trained.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field

from ..image import Volume
from ..transforms import Affine, Chain, DisplacementField, Transform
from .pair import Fitted, Pair
from .settings import (
    AntsSettings,
    ElastixSettings,
    GreedySettings,
    InstanceSettings,
    RegistrationSettings,
    VoxelmorphSettings,
)

__all__ = [
    "ENGINES",
    "AntsSettings",
    "ElastixSettings",
    "Engine",
    "Fitted",
    "GreedySettings",
    "InstanceSettings",
    "Pair",
    "Registration",
    "RegistrationSettings",
    "VoxelmorphSettings",
    "register",
]


@dataclass(frozen=True)
class Engine:
    """One row of the table of engines.

    Parameters
    ----------
    module : str
        Of this package; it has ``fit(pair, linear, start, settings, device) -> Fitted``. ``linear`` is None if the
        engine is to do the linear stages too, ``start`` a displacement to begin with or None.
    is_peer : bool
        Whether it is another package's: it can do the linear stages itself and takes no start.
    """

    module: str
    is_peer: bool = False


#: Deformable engines by name.
ENGINES: Mapping[str, Engine] = {"instance": Engine("instance")}


@dataclass(frozen=True, eq=False)
class Registration:
    """The outcome for one pair.

    Parameters
    ----------
    linear : Affine
        Query world to atlas world by the linear stages alone.
    field : DisplacementField or None
        In the query world, applied before ``linear``; None where the deformable stage is off.
    seconds : mapping of str to float
        Wall time of each stage that ran.
    confidence : float
        In [0, 1]: 0 if the scans are as unlike where they overlap as misplaced ones, 1 if they are the same.
    folding : float
        Share of the field's nodes in the query's body at which space is folded, in [0, 1].
    parameters : mapping of str to int
        How many numbers each stage fitted; of the deformable one, on its finest level.
    """

    linear: Affine
    field: DisplacementField | None
    seconds: Mapping[str, float] = dataclass_field(default_factory=dict)
    confidence: float = 0.0
    folding: float = 0.0
    parameters: Mapping[str, int] = dataclass_field(default_factory=dict)

    @property
    def fixed_to_moving(self) -> Transform:
        """All stages composed: query world to atlas world."""
        return self.linear if self.field is None else Chain((self.field, self.linear))


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
    """Find where each point of the fixed scan lies in the moving one.

    Parameters
    ----------
    fixed, moving : Volume
        Query and atlas: float32 intensities in any array order and any field of view.
    settings : RegistrationSettings, optional
        Defaults if left out.
    moving_labels : Volume, optional
        Labels of the atlas, on its grid. Similarity counts more near labelled structures, and each structure is
        searched for on its own.
    initial : Affine, optional
        Taken as the result of the linear stages, which are left out then.
    device : {"cpu", "cuda"}
        Where to compute.
    on_stage : callable, optional
        Told the name of each stage as it begins.

    Raises
    ------
    RegistrationError
        If one of the scans holds nothing but background.
    """
    from . import linear as linear_stages
    from . import pyramid, shifts

    settings = settings or RegistrationSettings()
    seconds: dict[str, float] = {}
    parameters: dict[str, int] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        if on_stage is not None:
            on_stage(name)
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin

    with stage("prepare"):
        spacings = pyramid.level_spacings_mm(fixed.grid, (settings.coarse_voxels, settings.fine_voxels))
        fixed_scan = pyramid.prepare(fixed, None, spacings[-1], "query")
        moving_scan = pyramid.prepare(moving, moving_labels, spacings[-1], "atlas")
        pair = Pair(fixed, moving, fixed_scan, moving_scan, moving_labels, spacings)
    engine = ENGINES[settings.engine]
    linear = initial or Affine.identity()
    wants_linear = initial is None and (settings.rigid or settings.affine)
    if wants_linear and not (engine.is_peer and settings.peer_linear):
        with stage("linear"):
            linear = linear_stages.fit(fixed_scan, moving_scan, spacings, settings, device)
        parameters["linear"] = 12 if settings.affine else 6
    field = None
    if settings.deformable or (engine.is_peer and settings.peer_linear and wants_linear):
        start = None
        if settings.structure_search and moving_labels is not None and not engine.is_peer:
            with stage("structures"):
                start = shifts.search(fixed_scan, moving_scan, moving_labels, linear, spacings[-1], device)
        module = importlib.import_module(f".{engine.module}", __name__)
        own_linear = engine.is_peer and settings.peer_linear and wants_linear
        with stage("deformable"):
            fitted = module.fit(pair, None if own_linear else linear, start, settings, device)
        linear, field = fitted.linear, fitted.field
        parameters.update(fitted.parameters)
    with stage("assess"):
        composed: Transform = linear if field is None else Chain((field, linear))
        confidence = linear_stages.confidence(fixed_scan, moving_scan, composed, spacings[-1])
        folding = 0.0 if field is None else pyramid.folding_in_body(field, fixed_scan)
    return Registration(linear, field, seconds, confidence, folding, parameters)
