"""Bringing the atlas into the query's space.

The query is fixed, the atlas is moving; the result maps query world to atlas world, RAS+ mm. Everything is
optimised on the one pair, nothing is trained.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import partial
from typing import TYPE_CHECKING

from ..core.image import Volume
from ..settings import RegistrationSettings
from ..transforms.jacobian import JacobianStatistics
from ..transforms.maps import Affine, Chain, DisplacementField, Transform
from .pair import Fitted, Pair, Start

if TYPE_CHECKING:
    from .dissimilarity import Difference

__all__ = [
    "ENGINES",
    "Engine",
    "Fitted",
    "Pair",
    "Registration",
    "register",
    "require_engine",
]


@dataclass(frozen=True)
class Engine:
    """One row of the table of engines.

    Parameters
    ----------
    module : str
        Of this package; it has ``fit(pair, linear, start, settings, device) -> Fitted``. ``linear`` is None if the
        engine is to do the linear stages too, ``start`` a :class:`.pair.Start` or None.
    is_peer : bool
        Whether it is another package's: it can do the linear stages itself and takes no start.
    start_option : str or None
        Setting that says whether it takes a start, where that is up to the user.
    """

    module: str
    is_peer: bool = False
    start_option: str | None = None

    def takes_start(self, settings: RegistrationSettings) -> bool:
        """Whether a displacement to begin with is of use to it."""
        if self.start_option is None:
            return not self.is_peer
        section, key = self.start_option.split(".")
        return bool(getattr(getattr(settings, section), key))


#: Deformable engines by name.
ENGINES: Mapping[str, Engine] = {
    "instance": Engine("instance"),
    "voxelmorph": Engine("voxelmorph", start_option="voxelmorph.use_start"),
    "greedy": Engine("peer", is_peer=True),
    "ants": Engine("peer", is_peer=True),
    "elastix": Engine("peer", is_peer=True),
}


@dataclass(frozen=True, eq=False)
class Registration:
    """The outcome for one pair.

    Parameters
    ----------
    linear : Affine
        Query world to atlas world by the linear stages alone.
    field : DisplacementField or None
        In the query world, applied before ``linear``; None where the deformable stage is off.
    local : DisplacementField or None
        In the query world, applied before ``field``: what a finer fit in the box of the labels added, 0 at its border
        and beyond.
    seconds : mapping of str to float
        Wall time of each stage that ran.
    difference : Difference or None
        How unlike the scans are after all stages; None where it was not looked at.
    folding : float
        Share of the query's body in which the deformation folds space, in [0, 1].
    jacobian : JacobianStatistics or None
        Local changes of volume by the deformation in the query's body: in the box of the labels where there is a local
        field, else everywhere.
    parameters : mapping of str to int
        How many numbers each stage fitted; of the deformable one, on its finest levels.
    others : tuple of Transform
        Further fits of the deformable stage, each from query world to atlas world. All else here is of the first one.
    """

    linear: Affine
    field: DisplacementField | None
    local: DisplacementField | None = None
    seconds: Mapping[str, float] = dataclass_field(default_factory=dict)
    difference: Difference | None = None
    folding: float = 0.0
    jacobian: JacobianStatistics | None = None
    parameters: Mapping[str, int] = dataclass_field(default_factory=dict)
    others: tuple[Transform, ...] = ()

    @property
    def confidence(self) -> float:
        """In [0, 1]: 0 if the scans are as unlike where they overlap as misplaced ones, 1 if they are the same."""
        return float("nan") if self.difference is None else self.difference.confidence

    @property
    def fixed_to_moving(self) -> Transform:
        """All stages composed: query world to atlas world."""
        stages = (self.local, self.field, self.linear)
        return Chain(tuple(stage for stage in stages if stage is not None))

    @property
    def fits(self) -> tuple[Transform, ...]:
        """All fits, query world to atlas world: labels are warped by each of them, and the mean is taken."""
        return (self.fixed_to_moving, *self.others)


def require_engine(settings: RegistrationSettings) -> None:
    """Check that the engine chosen can run here, before hours of work that need it.

    Raises
    ------
    InputError
        If a setting or an environment variable names a Python for it that is no program.
    MissingExtraError
        If it is another package's, and that is not installed.
    """
    engine = ENGINES[settings.engine]
    if engine.is_peer:
        importlib.import_module(f".engines.{engine.module}", __name__).require(settings)


def compare(
    fixed: Volume, moving: Volume, fixed_to_moving: Transform, settings: RegistrationSettings | None = None
) -> Difference:
    """How unlike two scans are through a transform that is given.

    Parameters
    ----------
    fixed, moving : Volume
        Query and atlas.
    fixed_to_moving : Transform
        Query world to atlas world.
    settings : RegistrationSettings, optional
        Whose fine level says how finely they are compared.

    Raises
    ------
    RegistrationError
        If one of the scans holds nothing but background.
    """
    from . import pyramid
    from .dissimilarity import difference_of

    settings = settings or RegistrationSettings()
    spacing_mm = pyramid.level_spacings_mm(fixed.grid, (settings.coarse_voxels, settings.fine_voxels))[-1]
    query, atlas = pyramid.prepare(fixed, None, spacing_mm, "query"), pyramid.prepare(moving, None, spacing_mm, "atlas")
    return difference_of(query, atlas, fixed_to_moving, spacing_mm)


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
        If one of the scans holds nothing but background, or an engine of another package gives up.
    MissingExtraError
        If the engine is another package's, and that is not installed.
    """
    from . import affine as linear_stages
    from . import discrete, pyramid
    from . import structure_affine as poses
    from .dissimilarity import difference_of

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
        pair = Pair(fixed, moving, fixed_scan, moving_scan, moving_labels)
    engine = ENGINES[settings.engine]
    linear = initial or Affine.identity()
    wants_linear = initial is None and (settings.rigid or settings.affine)
    if wants_linear and not (engine.is_peer and settings.peer_linear):
        with stage("linear"):
            linear = linear_stages.fit(fixed_scan, moving_scan, spacings, settings, device)
        parameters["linear"] = 12 if settings.affine else 6
    field = local = None
    others: tuple[Transform, ...] = ()
    if settings.deformable or (engine.is_peer and settings.peer_linear and wants_linear):
        start = None
        if settings.structure_search and moving_labels is not None and engine.takes_start(settings):

            def searched(*, brightness: bool) -> DisplacementField | None:
                scans = fixed_scan, moving_scan, moving_labels
                return poses.search(*scans, linear, spacings[-1], device, brightness=brightness)

            with stage("structures"):
                field = searched(brightness=True)
            start = None if field is None else Start(field, partial(searched, brightness=False))
        if settings.discrete and engine.takes_start(settings):
            with stage("discrete"):
                begin = None if start is None else start.field
                field = discrete.search(fixed_scan, moving_scan, linear, begin, settings.coarse_voxels, device)
                # Found with brightness or not: a cautious fit begins with it again.
                start = Start(field)
        module = importlib.import_module(f".engines.{engine.module}", __name__)
        own_linear = engine.is_peer and settings.peer_linear and wants_linear
        with stage("deformable"):
            fitted = module.fit(pair, None if own_linear else linear, start, settings, device)
        linear, field, local, others = fitted.linear, fitted.field, fitted.local, fitted.others
        parameters.update(fitted.parameters)
    with stage("assess"):
        found = Registration(linear, field, local, seconds, parameters=parameters, others=others)
        difference = difference_of(fixed_scan, moving_scan, found.fixed_to_moving, spacings[-1])
        folding, jacobian = (0.0, None) if field is None else pyramid.volume_changes(field, local, fixed_scan)
    return replace(found, difference=difference, folding=folding, jacobian=jacobian)
