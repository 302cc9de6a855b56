"""How the segmentation models are set up; every model's constants with their sources. Loads no model."""

from __future__ import annotations

from dataclasses import field

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as settings_dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@settings_dataclass(frozen=True, config=_STRICT)
class NnInteractiveSettings:
    """The model ``nninteractive``."""


@settings_dataclass(frozen=True, config=_STRICT)
class MedSam2Settings:
    """The model ``medsam2``."""


@settings_dataclass(frozen=True, config=_STRICT)
class VesselFmSettings:
    """The model ``vesselfm``."""


@settings_dataclass(frozen=True, config=_STRICT)
class ModelSettings:
    """How the models are set up; those of the model that is used count."""

    nninteractive: NnInteractiveSettings = field(default_factory=NnInteractiveSettings)
    """Of the model ``nninteractive``."""

    medsam2: MedSam2Settings = field(default_factory=MedSam2Settings)
    """Of the model ``medsam2``."""

    vesselfm: VesselFmSettings = field(default_factory=VesselFmSettings)
    """Of the model ``vesselfm``."""
