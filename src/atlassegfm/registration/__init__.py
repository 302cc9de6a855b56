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
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_dataclass

from ..image import Volume
from ..transforms import Affine, Chain, DisplacementField, Transform

#: Deformable engines: name to module of this package. Each has ``fit(fixed, moving, linear, spacings_mm, start,
#: settings, device)``, which gives the field and how many numbers it fitted.
ENGINES: Mapping[str, str] = {"instance": "instance"}


@settings_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class RegistrationSettings:
    """How the atlas is registered to the query."""

    engine: Literal["instance"] = "instance"
    """Deformable engine."""

    rigid: bool = True
    """Whether to search translations and fit a rigid motion. Off: the scanner's coordinates are the start of what
    follows."""

    affine: bool = True
    """Whether to fit scale and shear too."""

    deformable: bool = True
    """Whether to fit a displacement field after the linear stages."""

    structure_search: bool = True
    """Whether each labelled structure is searched for on its own, to start the deformable stage: organs move by
    centimetres against each other, out of reach of a smooth fit. Abd-MR, atlas 001: mean Dice 0.724 without, 0.764
    with, the worst query 0.535 and 0.698."""

    coarse_voxels: Annotated[int, Field(ge=2_000, le=1_000_000)] = 40_000
    """Voxels of the coarse level over the query's field of view. Its spacing follows (about 9 mm for an abdomen),
    so that heads, hearts and small crops need no settings of their own."""

    fine_voxels: Annotated[int, Field(ge=2_000, le=20_000_000)] = 150_000
    """Voxels of the fine level (about 6 mm for an abdomen), never finer than the scan itself."""

    candidates: Annotated[int, Field(ge=1, le=32)] = 4
    """Starts carried from the search over translations to the linear fit."""

    linear_iterations: Annotated[int, Field(ge=1, le=1000)] = 30
    """Adam steps of each linear fit (rigid and affine on the coarse level, affine again on the fine one)."""

    coarse_iterations: Annotated[int, Field(ge=0, le=2000)] = 40
    """Adam steps of the deformable fit on the coarse level; more change little."""

    fine_iterations: Annotated[int, Field(ge=0, le=2000)] = 35
    """Adam steps of the deformable fit on the fine level."""

    smoothness: Annotated[float, Field(ge=0)] = 0.4
    """Weight of the squared gradient of the displacement. Mean Dice of the warped atlas at 1 / 0.5 / 0.3, first atlas
    of each set: Abd-MR 0.767 / 0.761 / 0.763, Abd-CT 0.691 / 0.710 / 0.709, Cardiac 0.757 / 0.751 / 0.748,
    Hippocampus 0.763 / 0.772 / 0.778."""

    folding_penalty: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the squared shortfall of the local volume (Jacobian determinant) below 0.3."""

    mind_weight: Annotated[float, Field(ge=0)] = 2.5
    """Weight of the MIND-SSC difference against the local correlation (which counts 1/2). Mean Dice of the warped atlas
    at 5 / 2 / 1, first atlas: Abd-MR 0.762 / 0.760 / 0.754, Hippocampus 0.774 / 0.779 / 0.781."""


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
    linear = initial or Affine.identity()
    if initial is None and (settings.rigid or settings.affine):
        with stage("linear"):
            linear = linear_stages.fit(fixed_scan, moving_scan, spacings, settings, device)
        parameters["linear"] = 12 if settings.affine else 6
    field = None
    if settings.deformable:
        start = None
        if settings.structure_search and moving_labels is not None:
            with stage("structures"):
                start = shifts.search(fixed_scan, moving_scan, moving_labels, linear, spacings[-1], device)
        engine = importlib.import_module(f".{ENGINES[settings.engine]}", __name__)
        with stage("deformable"):
            field, parameters["deformable"] = engine.fit(
                fixed_scan, moving_scan, linear, spacings, start, settings, device
            )
    with stage("assess"):
        composed: Transform = linear if field is None else Chain((field, linear))
        confidence = linear_stages.confidence(fixed_scan, moving_scan, composed, spacings[-1])
        folding = 0.0 if field is None else pyramid.folding_in_body(field, fixed_scan)
    return Registration(linear, field, seconds, confidence, folding, parameters)
