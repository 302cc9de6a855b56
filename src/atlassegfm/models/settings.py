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
    """The model ``medsam2``. It reads a scan slice by slice, at 8 bits."""

    modality: Literal["auto", "ct", "mr"] = "auto"
    """How intensities become 8 bits: "ct" by the window below, "mr" (and anything else) by the 0.5 and 99.5 percentiles
    of what is above 0 [published code]. "auto": "ct" if the scan looks like Hounsfield units, that is if it has values
    of -500 or less (air) and of 100 or more (bone, contrast agent)."""

    window_level: float = 40.0
    """Middle of the window of a CT, in Hounsfield units [MedSAM: soft tissue 40, lung -160, brain 40]."""

    window_width: Annotated[float, Field(gt=0)] = 400.0
    """Width of the window of a CT, in Hounsfield units [MedSAM: soft tissue 400, lung 1500, brain 80]."""

    slice_axis: Literal["auto", "axial", "coronal", "sagittal"] = "auto"
    """Slices that it reads. "auto": across the axis with the largest spacing if that is at least 1.5 times the others,
    else axial. A box is axial and refused with other slices."""

    margin_mm: Annotated[float, Field(ge=0)] = 15.0
    """How far beyond the first and last slice of the atlas's structure it looks, in mm, one slice at least. Not tuned:
    it is what a registration may be off by, and then some."""

    reach_mm: Annotated[float, Field(ge=0)] = 150.0
    """How far from the prompted slice it looks up and down where the slices of the atlas's structure are not known, in
    mm. Half the height of the largest organs with some to spare. Not tuned."""

    empty_slices: Annotated[int, Field(ge=1)] = 3
    """After how many successive slices without the structure it stops looking, where the slices of the atlas's
    structure are not known."""

    feature_cache_mb: Annotated[int, Field(ge=0)] = 512
    """Memory for what the image encoder found on the slices of a scan, in MB, to be used again for other structures:
    4 MB a slice. The encoder is most of the work."""


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
