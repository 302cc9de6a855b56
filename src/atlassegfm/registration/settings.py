"""How registration is set up; every engine's constants with their sources. Loads no engine."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@settings_dataclass(frozen=True, config=_STRICT)
class InstanceSettings:
    """The engine ``instance``: the displacement itself is optimised."""

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


@settings_dataclass(frozen=True, config=_STRICT)
class VoxelmorphSettings:
    """The engine ``voxelmorph``: the paper's network, optimised on the one pair."""

    iterations: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Adam steps [paper]."""


@settings_dataclass(frozen=True, config=_STRICT)
class GreedySettings:
    """The engine ``greedy``: picsl_greedy."""


@settings_dataclass(frozen=True, config=_STRICT)
class AntsSettings:
    """The engine ``ants``: ANTs' SyN."""


@settings_dataclass(frozen=True, config=_STRICT)
class ElastixSettings:
    """The engine ``elastix``: B-splines."""


@settings_dataclass(frozen=True, config=_STRICT)
class RegistrationSettings:
    """How the atlas is registered to the query."""

    engine: Literal["instance", "voxelmorph", "greedy", "ants", "elastix"] = "instance"
    """Deformable engine. Those of other packages (greedy, ants, elastix) are for comparison, or for whoever trusts
    them; they must be installed."""

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

    peer_linear: bool = True
    """Whether engines of other packages do the linear stages themselves, in their own way. Off: they are given ours
    and do the deformable stage alone."""

    instance: InstanceSettings = field(default_factory=InstanceSettings)
    """Of the engine ``instance``."""

    voxelmorph: VoxelmorphSettings = field(default_factory=VoxelmorphSettings)
    """Of the engine ``voxelmorph``."""

    greedy: GreedySettings = field(default_factory=GreedySettings)
    """Of the engine ``greedy``."""

    ants: AntsSettings = field(default_factory=AntsSettings)
    """Of the engine ``ants``."""

    elastix: ElastixSettings = field(default_factory=ElastixSettings)
    """Of the engine ``elastix``."""
