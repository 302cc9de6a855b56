"""How the segmentation models are set up; every model's constants with their sources. Loads no model."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@settings_dataclass(frozen=True, config=_STRICT)
class NnInteractiveSettings:
    """The model ``nninteractive``."""

    autozoom: bool = True
    """Whether it looks again at coarser resolution where its answer reaches the edge of its patch (192 voxels a
    side), and then refines what it found patch by patch. Off is faster, and cuts off what is larger."""

    server: str = ""
    """Address of an nnInteractive server (``nninteractive-server``) that computes instead of this process, such as
    "http://127.0.0.1:1527"; empty: compute here. The server gets the scan. Its key is taken from the environment
    variable NN_INTERACTIVE_API_KEY. Its answers are masks, probability 0 or 1."""

    allow_remote: bool = False
    """Whether scans may be sent to a server on another machine."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long the server may take for one answer, in seconds. On a CPU one answer takes minutes."""


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
