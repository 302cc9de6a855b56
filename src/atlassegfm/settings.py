"""All settings of a job."""

from dataclasses import field
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as settings_dataclass

from .core.config import QUALITY_NEUTRAL, RUNTIME_ONLY

#: Name of the model that is none: the result is the warped atlas.
NO_MODEL = "none"
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_NotNegative = Annotated[float, Field(ge=0)]
_Voxels = Annotated[int, Field(ge=2_000, le=20_000_000)]
#: A number for each level, coarse to fine; the last one holds for all levels after it.
_Weights = Annotated[tuple[_NotNegative, ...], Field(min_length=1)]
_Steps = Annotated[str, Field(pattern=r"^\d+(x\d+)*$")]


@settings_dataclass(frozen=True, config=_STRICT)
class InstanceSettings:
    """The engine ``instance``: the displacement itself is optimised."""

    level_voxels: Annotated[tuple[_Voxels, ...], Field(min_length=1)] = (40_000, 150_000)
    """Voxels of each level over the query's field of view, coarse to fine (for an abdomen about 9 and 6 mm), never
    finer than the query. The first level is left out where structures have been found."""

    local_voxels: Annotated[int, Field(ge=0, le=20_000_000)] = 500_000
    """Voxels of the last level, in the box around the warped labels, never finer than the query; 0 for none."""

    voxels_per_structure: Annotated[int, Field(ge=0, le=1_000_000), QUALITY_NEUTRAL] = 15_000
    """Voxels of the last level for each structure of the atlas, at least, up to ``most_local_voxels``."""

    most_local_voxels: Annotated[int, Field(ge=2_000, le=100_000_000), QUALITY_NEUTRAL] = 2_000_000
    """Voxels of the last level, at most: bounds time and memory (2 million: 1.7 GB for the whole process)."""

    iterations: Annotated[tuple[Annotated[int, Field(ge=0, le=2000)], ...], Field(min_length=1)] = (40, 35, 25)
    """Adam steps on each level, the one in the labels' box last; the last number holds for all levels after it."""

    mind_weight: _Weights = (2.5,)
    """Weight of the MIND-SSC difference on each level."""

    correlation_weight: _Weights = (0.5,)
    """Weight of one minus the local correlation on each level."""

    smoothness: _Weights = (0.05, 0.25, 0.4)
    """Weight of the squared gradient (diffusion regularisation) of what each level adds to the displacement."""

    folding_penalty: _NotNegative = 10.0
    """Weight of the squared shortfall of the Jacobian determinant below 0.3."""

    structure_emphasis: _NotNegative = 4.0
    """Additional weight of a voxel in or near a structure of the atlas: 1 + this, and 1 elsewhere."""

    centreline_emphasis: Annotated[_NotNegative, QUALITY_NEUTRAL] = 12.0
    """Additional weight of a voxel on the centre line of a structure that the setting ``tubular`` names; it falls with
    the distance, as a Gaussian of sigma 3 mm."""

    ensemble: Annotated[int, Field(ge=1, le=4), QUALITY_NEUTRAL] = 2
    """Fits with different weights, each as slow, whose warped labels are averaged; the first transform is reported."""

    diffeomorphic: bool = False
    """Whether each level fits a stationary velocity and levels are composed: hardly any folding, but slower."""

    contrast_robust: bool = True
    """Whether, where the structures' contrast differs between the scans, they are searched for again by MIND-SSC alone,
    which is contrast-invariant, and it dominates until the level in the labels' box."""

    contrast_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Difference of structures' brightness, in intensity ranges, that counts as another contrast [abdominal MR]."""

    contrast_robust_mind_weight: _Weights = (5.0,)
    """``mind_weight`` of the contrast-robust fit over the field of view; in the labels' box it is the usual one."""

    contrast_robust_correlation_weight: _Weights = (0.0, 0.2)
    """``correlation_weight`` of the contrast-robust fit."""

    contrast_robust_smoothness: _Weights = (0.3, 0.1)
    """``smoothness`` of the contrast-robust fit."""


@settings_dataclass(frozen=True, config=_STRICT)
class VoxelmorphSettings:
    """The engine ``voxelmorph``: the paper's network, optimised on the one pair. Defaults are the paper's."""

    cpu_voxels: Annotated[int, Field(ge=1_000, le=20_000_000)] = 40_000
    """Voxels of the isotropic working grid on a CPU (about 9 mm for an abdomen), never finer than the scan."""

    cuda_voxels: Annotated[int, Field(ge=1_000, le=100_000_000)] = 128**3
    """The same on a GPU [published code: 128 x 128 x 128, there anisotropic, here isotropic]."""

    levels: Annotated[int, Field(ge=2, le=8)] = 5
    """Resolutions of the network, the full one included [paper]."""

    channels: Annotated[int, Field(ge=1, le=256)] = 32
    """Channels of the network at full resolution, twice as many below [paper]."""

    iterations: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Adam steps [paper]."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Of Adam [paper]."""

    loss: Literal["mse", "lncc"] = "mse"
    """Squared difference of intensities in 0 to 1 [paper], which needs equal contrast, or 1 - squared correlation."""

    smoothness: _NotNegative = 0.01
    """Weight of the squared gradient of the displacement, a mean over the axes [published code]; about 1 for "lncc"."""

    diffeomorphic: bool = False
    """Whether the network gives a velocity, integrated at half resolution, instead of the displacement: no folding."""

    integration_steps: Annotated[int, Field(ge=1, le=12)] = 7
    """Squarings of the integration [VoxelMorph]."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate: constant, or a rise over 5 % of the iterations and a cosine to 0, which allows higher rates."""

    half_precision: Literal["auto", "on", "off"] = "auto"
    """Whether to convolve in bfloat16. "auto": on GPUs that have it; faster on CPUs with AMX too."""


_ENGINE_PYTHON = "Path of a Python that has it; empty: that of ATLASSEGFM_GREEDY_PYTHON (ANTS, ELASTIX), or this one."
_ENGINE_VOXELS = "Voxels over the query's field of view, at most (3 mm for an abdominal CT), never finer than the scan."


@settings_dataclass(frozen=True, config=_STRICT)
class ExternalEngineSettings:
    """What all engines of other packages have; described in fields, as docstrings are not inherited."""

    python: Annotated[str, Field(description=_ENGINE_PYTHON)] = ""
    voxels: Annotated[int, Field(ge=2_000, le=50_000_000, description=_ENGINE_VOXELS)] = 1_200_000
    seed: Annotated[int, Field(ge=1, le=2**31 - 1, description="Seed of its random numbers.")] = 1


@settings_dataclass(frozen=True, config=_STRICT)
class GreedySettings(ExternalEngineSettings):
    """The engine ``greedy``: picsl_greedy."""

    search_tries: Annotated[int, Field(ge=0, le=100_000)] = 200
    """Random rigid starts around the centres of both scans before the linear fit; with ``registration.rigid`` only."""

    search_rotation_deg: Annotated[float, Field(ge=0, le=180)] = 180.0
    """Standard deviation of their rotation; 180: any rotation."""

    search_shift_mm: _NotNegative = 40.0
    """Standard deviation of their translation along each axis."""

    metric_radius: Annotated[int, Field(ge=1, le=20)] = 4
    """Radius in voxels of the cube of the weighted local correlation (WNCC)."""

    iterations: _Steps = "100x50x20"
    """Iterations on each level, coarse to fine; the last level is the scan as it is given."""

    update_smoothing_voxels: _NotNegative = 2.0
    """Standard deviation of the smoothing of each update of the field."""

    field_smoothing_voxels: _NotNegative = 0.5
    """Standard deviation of the smoothing of the field after each update."""


@settings_dataclass(frozen=True, config=_STRICT)
class AntsSettings(ExternalEngineSettings):
    """The engine ``ants``: ANTs' SyN, with the defaults of antspyx 0.6.3, which needs an environment of its own.

    The paper's SyN+RA; without ``registration.rigid`` SyN+A, without ``registration.affine`` either SyN-only.
    """

    iterations: _Steps = "40x20x0"
    """Iterations of SyN on each level, coarse to fine; the last level is the scan as it is given."""

    metric: Literal["mattes", "CC"] = "mattes"
    """Metric of SyN: mutual information, or local correlation over 9 voxels (several times as slow)."""

    gradient_step: Annotated[float, Field(gt=0)] = 0.2
    """Step of SyN, in voxels."""

    flow_sigma: _NotNegative = 3.0
    """Variance of the smoothing of each update, in voxels."""

    total_sigma: _NotNegative = 0.0
    """Variance of the smoothing of the whole field, in voxels."""


@settings_dataclass(frozen=True, config=_STRICT)
class ElastixSettings(ExternalEngineSettings):
    """The engine ``elastix``: B-splines on mutual information. Defaults are those of itk-elastix 0.25."""

    resolutions: Annotated[int, Field(ge=1, le=8)] = 4
    """Levels, each twice as fine as the one before."""

    iterations: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Steps of the stochastic gradient descent on each level of each stage."""

    samples: Annotated[int, Field(ge=100, le=1_000_000)] = 2048
    """Points drawn anew for each step."""

    grid_voxels: Annotated[float, Field(ge=1, le=64)] = 4.0
    """Distance of B-spline control points on the last level, in voxels along the finest axis."""


@settings_dataclass(frozen=True, config=_STRICT)
class RegistrationSettings:
    """How the atlas is registered to the query. Verdicts are calibrated for the defaults alone."""

    engine: Literal["instance", "voxelmorph", "greedy", "ants", "elastix"] = "instance"
    """Deformable engine. Those of other packages (greedy, ants, elastix) must be installed."""

    rigid: bool = True
    """Whether to search translations and fit a rigid motion; else the next stage starts from scanner coordinates."""

    affine: bool = True
    """Whether to fit scale and shear too."""

    deformable: bool = True
    """Whether to fit a displacement field after the linear stages."""

    structure_search: bool = True
    """Whether the deformable stage starts from a linear map for each structure (engine ``instance`` only), searched for
    by MIND-SSC: organs move by centimetres against each other, out of reach of a smooth fit."""

    coarse_voxels: Annotated[int, Field(ge=2_000, le=1_000_000)] = 40_000
    """Voxels of the coarse level over the query's field of view (about 9 mm for an abdomen)."""

    fine_voxels: _Voxels = 150_000
    """Voxels of the fine level (about 6 mm for an abdomen), never finer than the scan."""

    candidates: Annotated[int, Field(ge=1, le=32), QUALITY_NEUTRAL] = 4
    """Translations carried from the search to the linear fit."""

    linear_iterations: Annotated[int, Field(ge=1, le=1000)] = 30
    """Adam steps of each linear fit (rigid and affine on the coarse level, affine again on the fine one)."""

    peer_linear: Annotated[bool, QUALITY_NEUTRAL] = True
    """Whether engines of other packages do the linear stages too; else they start from ours."""

    instance: InstanceSettings = field(default_factory=InstanceSettings)
    voxelmorph: VoxelmorphSettings = field(default_factory=VoxelmorphSettings)
    greedy: GreedySettings = field(default_factory=GreedySettings)
    ants: AntsSettings = field(default_factory=AntsSettings)
    elastix: ElastixSettings = field(default_factory=ElastixSettings)


@settings_dataclass(frozen=True, config=_STRICT)
class SimulationSettings:
    """Simulated registration errors; the defaults were fitted to the errors of 33 real registrations."""

    sizes: Annotated[tuple[Annotated[float, Field(gt=0, le=2)], ...], Field(min_length=1)] = (0.07, 0.10, 0.14, 0.20)
    """Standard deviations of the displacement per axis, in radii of the structure, which is simulated with each."""

    sigma: Annotated[float, Field(gt=0, le=10)] = 0.5
    """Sigma of the Gaussian that smooths the displacement, in radii of the structure."""


@settings_dataclass(frozen=True, config=_STRICT)
class CorrectionSettings:
    """Training of the network that corrects fused masks near their borders (default gate only)."""

    iterations: Annotated[int, Field(ge=1, le=100_000)] = 400
    """Steps of AdamW with a one-cycle learning rate."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-3
    """Highest learning rate of the cycle."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Weight decay of AdamW."""

    batch_samples: Annotated[int, Field(ge=1, le=1000)] = 6
    """Simulated masks drawn for each step."""

    batch_voxels: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Voxels drawn of each of them."""

    noise: Annotated[float, Field(ge=0, le=10)] = 0.3
    """Noise added to the features in training, in their standard deviations, against overfitting."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction of the learned correction that is applied: real registration errors vary more than simulated ones."""


@settings_dataclass(frozen=True, config=_STRICT)
class NnInteractiveSettings:
    """The model ``nninteractive``."""

    autozoom: bool = True
    """Whether structures beyond its patch of 192 voxels a side are predicted coarser, then refined; off cuts them."""

    server: Annotated[str, RUNTIME_ONLY] = ""
    """Address of a ``nninteractive-server`` that gets the scan and computes, such as "http://127.0.0.1:1527"; empty:
    compute here. Its key is the environment variable NN_INTERACTIVE_API_KEY. Its answers are masks, 0 or 1."""

    allow_remote: Annotated[bool, RUNTIME_ONLY] = False
    """Whether scans may be sent to a server on another machine."""

    timeout_seconds: Annotated[float, Field(gt=0), RUNTIME_ONLY] = 600.0
    """How long the server may take for one answer, in seconds; minutes on a CPU."""


@settings_dataclass(frozen=True, config=_STRICT)
class SliceSettings:
    """How a model reads a scan slice by slice, at 8 bits."""

    modality: Literal["auto", "ct", "mr"] = "auto"
    """How intensities become 8 bits: "ct" by the window below, "mr" (and anything else) by the 0.5 and 99.5 percentiles
    of what is above 0 [published code]. "auto": "ct" if the scan has values up to -500 (air) and from 100 (bone)."""

    window_level: float = 40.0
    """Centre of the window of a CT, in Hounsfield units [MedSAM: soft tissue 40, lung -160, brain 40]."""

    window_width: Annotated[float, Field(gt=0)] = 400.0
    """Width of the window of a CT, in Hounsfield units [MedSAM: soft tissue 400, lung 1500, brain 80]."""

    slice_axis: Literal["auto", "axial", "coronal", "sagittal"] = "auto"
    """Slices to read. "auto": across the largest spacing if 1.5 times the others, else axial."""


@settings_dataclass(frozen=True, config=_STRICT)
class MedSam2Settings(SliceSettings):
    """The model ``medsam2``."""

    margin_mm: _NotNegative = 15.0
    """Range in mm beyond the first and last slice of the atlas's structure, at least a slice: a registration error."""

    reach_mm: _NotNegative = 150.0
    """Range in mm from the prompted slice where the structure's slices are not known: over half an organ's height."""

    empty_slices: Annotated[int, Field(ge=1)] = 3
    """Successive slices without the structure after which it stops, where the structure's slices are not known."""

    feature_cache_mb: Annotated[int, Field(ge=0), RUNTIME_ONLY] = 512
    """Memory in MB for the embeddings of slices, 4 MB each, which are used again for other structures."""


@settings_dataclass(frozen=True, config=_STRICT)
class LiteMedSamSettings(SliceSettings):
    """The model ``litemedsam``."""

    box_margin: Annotated[float, Field(ge=0, le=64)] = 3.0
    """Distance of the box's sides from the mask, in pixels of the network's 256 x 256 [published code: 3]."""

    passes: Annotated[int, Field(ge=1, le=10)] = 2
    """Answers on each slice: the box of the second one is drawn around the first, which moves it onto the structure."""

    slice_distance_mm: _NotNegative = 4.0
    """Distance of the slices that are read of a scan with thin ones, in mm, to the nearest multiple; between them
    answers are interpolated. Of each structure at least 16 slices are read, where it has as many; 0 reads all."""

    feature_cache_mb: Annotated[int, Field(ge=0), RUNTIME_ONLY] = 1024
    """Memory in MB for the embeddings of slices, 4 MB each, which are used again for other prompts."""


@settings_dataclass(frozen=True, config=_STRICT)
class VesselFmSettings:
    """The model ``vesselfm``. Defaults are the published inference's (configs/inference.yaml) unless said otherwise."""

    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]] = (1.0, 99.0)
    """Percentiles of the scan's intensities that become 0 and 1; fit them to the data, so that vessels stay inside."""

    spacing_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Spacing that scans are resampled to; 0 leaves them as they are. The network was trained on nearly isotropic
    scans: vessels across thick slices are seen better at about the width of a voxel, in several times the time."""

    window: Literal[64, 96, 128, 160, 192] = 128
    """Side in voxels of the network's cubes. Smaller ones need less time and memory, and show less of a vessel."""

    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    """Overlap of neighbouring cubes, as a fraction of their side."""

    reach_mm: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """Largest distance in mm of a vessel to the nearest warped structure, as which it counts: a registration error."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network (autocast). The shorter ones may be faster and change probabilities by up to 0.01."""

    cache_mib: Annotated[int, Field(ge=0, le=1_000_000), RUNTIME_ONLY] = 1024
    """MiB of computed cubes that are kept with a scan, 8 for one of 128, for further structures."""

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
    medsam2: MedSam2Settings = field(default_factory=MedSam2Settings)
    litemedsam: LiteMedSamSettings = field(default_factory=LiteMedSamSettings)
    vesselfm: VesselFmSettings = field(default_factory=VesselFmSettings)


@settings_dataclass(frozen=True, config=_STRICT)
class FusionSettings:
    """How the warped atlas and the model's answer are fused."""

    gate: Literal["default", "paper"] = "default"
    """Kind of gate. "paper" is eq. 5 of arXiv 2512.18176. "default" then corrects the fused masks near their borders
    and smooths them, as learned on the same simulated masks."""

    kernels: tuple[int, ...] = (3, 5, 7)
    """Sizes of the max-poolings in voxels, odd [paper: 3, 5, 7]."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Learning rate of Adam; a weight moves by about this much an iteration [paper: 1e-5]."""

    iterations: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Steps of Adam; 0 keeps the constant gate [paper: 100]."""

    start: Literal["best"] | Annotated[float, Field(ge=0, le=1)] = "best"
    """Constant K that training starts from: a number (1 is the atlas alone, 0 the model alone), or "best", which tries
    0, 1/4, 1/2, 3/4 and 1 on the training samples."""

    simulation: SimulationSettings = field(default_factory=SimulationSettings)
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)

    @field_validator("kernels")
    @classmethod
    def _check_kernels(cls, kernels: tuple[int, ...]) -> tuple[int, ...]:
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError("expected odd numbers of voxels, as 3, 5, 7")
        return kernels


@settings_dataclass(frozen=True, config=_STRICT)
class Settings:
    """All settings of a job."""

    registration: RegistrationSettings = field(default_factory=RegistrationSettings)
    fusion: FusionSettings = field(default_factory=FusionSettings)

    model: str = "builtin"
    """Segmentation model of ``atlassegfm models``, or several, as builtin,litemedsam: their answers are averaged with
    weights for each structure. "none": the result is the warped atlas."""

    model_path: str = ""
    """File or folder of the weights of the one model that has some, or several as NAME=PATH,NAME=PATH; empty: looked
    for where ``atlassegfm models show`` says."""

    models: ModelSettings = field(default_factory=ModelSettings)

    prompt: Literal["auto", "click", "box", "mask"] = "auto"
    """What the model is prompted with; "auto" is the best of the prompts it takes."""

    tubular: str = ""
    """Structures that are vessels, by value, name or pattern with commas between, as aorta,*vein: the
    registration (engine ``instance``) weighs their centre lines, the built-in model follows them beyond the warped
    atlas, their branches are kept, and they are not judged: verdicts are for organs."""

    most_atlases: Annotated[int, Field(ge=1)] = 5
    """Atlases of a context that are registered in full to a query: those that fit it best after a rough
    rigid fit."""

    topology: bool = True
    """Whether islands that the atlas's structures do not have are removed from the fused result."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the random numbers: the same one gives the same result on the same machine."""

    @field_validator("tubular")
    @classmethod
    def _strip_names(cls, tubular: str) -> str:
        return ",".join(name.strip() for name in tubular.split(","))

    @field_validator("model")
    @classmethod
    def _sort_models(cls, model: str) -> str:
        """Bring several names into one order: it must not matter."""
        names = sorted(name.strip() for name in model.split(","))
        if not all(names):
            raise ValueError("expected names of models with a comma between them, as builtin,litemedsam")
        if twice := [name for name, other in pairwise(names) if name == other]:
            raise ValueError(f"expected each model once, but {twice[0]!r} is named twice")
        if len(names) > 1 and NO_MODEL in names:
            raise ValueError(f"expected names of models, or {NO_MODEL!r} alone")
        return ",".join(names)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the models, sorted; none if the result is the warped atlas."""
        return () if self.model == NO_MODEL else tuple(self.model.split(","))
