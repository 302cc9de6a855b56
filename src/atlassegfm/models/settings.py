"""How the segmentation models are set up; every model's constants with their sources. Loads no model."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator
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
    """The model ``vesselfm``. Defaults are the published inference's (configs/inference.yaml) unless said otherwise."""

    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]] = (1.0, 99.0)
    """Percentiles of the whole scan's intensities that become 0 and 1; what lies beyond is cut. The authors advise to
    fit them to the data: vessels must not be cut together with what is around them."""

    spacing_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Spacing that scans are resampled to before the network sees them, along each axis; 0 leaves them as they are. The
    network was trained on nearly isotropic scans: where slices are much thicker than voxels are wide, vessels that run
    through the slices are seen better at about the width of a voxel, for several times as many windows, and slices in
    between that nobody measured."""

    window: Literal[64, 96, 128, 160, 192] = 128
    """Voxels along each side of the cubes that the network sees. Of the full-size network on one core of a server's
    CPU, one of 128 took 70 s and the process 2.3 GB, one of 64 3.6 s and 0.9 GB; in small cubes it sees less of a
    vessel's course."""

    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    """Share of a cube's side by which it overlaps the next."""

    blending: Literal["constant", "gaussian"] = "constant"
    """How much a voxel of a cube counts where cubes overlap: the same everywhere, or less towards the cube's border,
    where the network sees the least around it (a Gaussian, standard deviation an eighth of the side). Which is better
    was not measured."""

    reach_mm: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """Distance from the warped atlas's structure up to which a vessel counts as that structure, unless another one is
    nearer. About the error of a registration: on six pairs of Abd-CT (default engine), 5 / 10 / 20 mm kept 93 / 96 /
    99 % of the voxels of the aorta, 83 / 92 / 95 % of the vena cava's and 62 / 69 / 78 % of the portal and splenic
    vein's; half of what is lost there at 10 mm goes to a neighbour. A larger reach also takes more vessels along that
    the atlas does not label."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers the network computes in (PyTorch's autocast). The shorter ones are faster on GPUs and on CPUs that have
    units for them, and change probabilities in the second or third digit."""

    cache_mib: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    """MiB of computed cubes that are kept with a scan, 8 for one of 128: saves time where structures are asked for in
    several calls. Results are the same."""

    @field_validator("percentiles")
    @classmethod
    def _check_percentiles(cls, percentiles: tuple[float, float]) -> tuple[float, float]:
        if percentiles[0] >= percentiles[1]:
            raise ValueError("expected two numbers from 0 to 100, the smaller first, as 1, 99")
        return percentiles


@settings_dataclass(frozen=True, config=_STRICT)
class ModelSettings:
    """How the models are set up; those of the model that is used count."""

    nninteractive: NnInteractiveSettings = field(default_factory=NnInteractiveSettings)
    """Of the model ``nninteractive``."""

    medsam2: MedSam2Settings = field(default_factory=MedSam2Settings)
    """Of the model ``medsam2``."""

    vesselfm: VesselFmSettings = field(default_factory=VesselFmSettings)
    """Of the model ``vesselfm``."""
