"""All settings of a job."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as settings_dataclass

from .core.config import RUNTIME_ONLY

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@settings_dataclass(frozen=True, config=_STRICT)
class InstanceSettings:
    """The engine ``instance``: the displacement itself is optimised."""

    level_voxels: Annotated[tuple[Annotated[int, Field(ge=2_000, le=20_000_000)], ...], Field(min_length=1)] = (
        40_000,
        150_000,
    )
    """Voxels of each level over the query's field of view, coarse to fine (for an abdomen about 9 and 6 mm), never
    finer than the query itself. Where structures have been found, the first level is left out: it would undo much of
    that."""

    local_voxels: Annotated[int, Field(ge=0, le=20_000_000)] = 500_000
    """Voxels of the last level, in the box around the warped labels, never finer than the query itself; 0 for none."""

    voxels_per_structure: Annotated[int, Field(ge=0, le=1_000_000)] = 15_000
    """Least voxels of the last level for each structure of the atlas (many structures are small ones), up to
    ``most_local_voxels``."""

    most_local_voxels: Annotated[int, Field(ge=2_000, le=100_000_000)] = 2_000_000
    """Most voxels of the last level: bounds time and memory (2 million: 1.7 GB for the whole process)."""

    iterations: Annotated[tuple[Annotated[int, Field(ge=0, le=2000)], ...], Field(min_length=1)] = (40, 35, 25)
    """Adam steps on each level, the one in the labels' box last. The last number of a list holds for all levels after
    it."""

    mind_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (2.5,)
    """Weight of the MIND-SSC difference on each level."""

    correlation_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.5,)
    """Weight of one minus the local correlation on each level."""

    smoothness: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.05, 0.25, 0.4)
    """Weight of the squared gradient (diffusion regularisation) of what each level adds to the displacement; of the
    whole displacement it would pull structures back that were found centimetres away."""

    folding_penalty: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the squared shortfall of the local volume (Jacobian determinant) below 0.3."""

    structure_emphasis: Annotated[float, Field(ge=0)] = 4.0
    """How much more a voxel in or near a structure of the atlas weighs: 1 + this times one elsewhere."""

    ensemble: Annotated[int, Field(ge=1, le=4)] = 2
    """Members of the ensemble: fits with other weights, whose warped labels are averaged. The first one is the
    transform that is kept and reported. Each takes as long as the first."""

    diffeomorphic: bool = False
    """Whether each level fits a stationary velocity, whose flow is invertible, and levels are composed instead of
    added, so that hardly anything folds. Slower."""

    contrast_robust: bool = True
    """Whether the fit is repeated by contrast-invariant features where the structures' contrast differs between the
    scans: structures are searched for by MIND-SSC alone, and it dominates until the level in the labels' box.
    Brightness and local correlation take a bright stomach for a bright spleen where the query's spleen is dark."""

    contrast_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Difference of the structures' brightness, as a fraction of the range of intensities, above which contrast counts
    as different (logged at level DEBUG). Set on abdominal MR; other data may need another value."""

    contrast_robust_mind_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (5.0,)
    """``mind_weight`` of the contrast-robust fit over the field of view; in the labels' box it is the usual one."""

    contrast_robust_correlation_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (
        0.0,
        0.2,
    )
    """``correlation_weight`` of the contrast-robust fit."""

    contrast_robust_smoothness: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.3, 0.1)
    """``smoothness`` of the contrast-robust fit."""


@settings_dataclass(frozen=True, config=_STRICT)
class VoxelmorphSettings:
    """The engine ``voxelmorph``: the paper's network, optimised on the one pair. Defaults are the paper's."""

    cpu_voxels: Annotated[int, Field(ge=1_000, le=20_000_000)] = 40_000
    """Voxels of the isotropic working grid over the query's field of view, on a CPU (about 9 mm for an abdomen), never
    finer than the scan. A step takes about 1 s on one core."""

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
    """Squared difference of intensities normalised to 0 to 1 [paper], which needs the same contrast in both scans, or
    one minus the squared local correlation, which folds less at a ``smoothness`` of 1."""

    smoothness: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared gradient of the displacement, a mean over the axes [published code]. About 1 for "lncc"
    (VoxelMorph's own: 1.5)."""

    diffeomorphic: bool = False
    """Whether the network gives a velocity, integrated at half resolution, instead of the displacement: no folding."""

    integration_steps: Annotated[int, Field(ge=1, le=12)] = 7
    """Squarings of the integration [VoxelMorph]."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate: constant [paper, which names none], or a rise over 5 % of the iterations and a
    cosine to 0, which allows higher rates."""

    half_precision: Literal["auto", "on", "off"] = "auto"
    """Whether to convolve in bfloat16; displacement and loss stay in single precision. "auto": on GPUs that have it. On
    a CPU with AMX (Xeons since 2023) a step is four to eight times as fast with it."""


@settings_dataclass(frozen=True, config=_STRICT)
class GreedySettings:
    """The engine ``greedy``: picsl_greedy. Defaults are the recipe of our reference figures."""

    python: str = ""
    """Path of a Python that has picsl_greedy. Empty: the environment variable ATLASSEGFM_GREEDY_PYTHON, or else this
    Python."""

    voxels: Annotated[int, Field(ge=2_000, le=50_000_000)] = 1_200_000
    """Voxels over the query's field of view that it works on, at most (3 mm for an abdominal CT, 1.6 mm for a head);
    never finer than the scan."""

    search_tries: Annotated[int, Field(ge=0, le=100_000)] = 200
    """Random rigid starts tried before the linear fit, around the centres of both scans; with ``registration.rigid``
    only."""

    search_rotation_deg: Annotated[float, Field(ge=0, le=180)] = 180.0
    """Standard deviation of their rotation; 180: any rotation."""

    search_shift_mm: Annotated[float, Field(ge=0)] = 40.0
    """Standard deviation of their translation along each axis."""

    metric_radius: Annotated[int, Field(ge=1, le=20)] = 4
    """Of the cube of the weighted local correlation (WNCC), in voxels."""

    iterations: Annotated[str, Field(pattern=r"^\d+(x\d+)*$")] = "100x50x20"
    """On each level, coarse to fine, in greedy's notation; the last level is the scan as it is given."""

    update_smoothing_voxels: Annotated[float, Field(ge=0)] = 2.0
    """Standard deviation of the smoothing of each update of the field."""

    field_smoothing_voxels: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of the smoothing of the field after each update."""

    seed: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    """Of the random search and the jitter of its samples; 0 would be another one each time."""


@settings_dataclass(frozen=True, config=_STRICT)
class AntsSettings:
    """The engine ``ants``: ANTs' SyN, with the defaults of antspyx 0.6.3.

    ``registration.rigid`` and ``registration.affine`` say which of the paper's variants it is: both SyN+RA, affine
    alone SyN+A, neither SyN-only.
    """

    python: str = ""
    """Path of a Python that has antspyx, which cannot be installed beside this package. Empty: the environment
    variable ATLASSEGFM_ANTS_PYTHON, or else this Python."""

    voxels: Annotated[int, Field(ge=2_000, le=50_000_000)] = 1_200_000
    """Voxels over the query's field of view that it works on, at most, as for greedy."""

    iterations: Annotated[str, Field(pattern=r"^\d+(x\d+)*$")] = "40x20x0"
    """Of SyN on each level, coarse to fine; the last level is the scan as it is given."""

    metric: Literal["mattes", "CC"] = "mattes"
    """Of SyN: mutual information, or local correlation over 9 voxels (several times as slow)."""

    gradient_step: Annotated[float, Field(gt=0)] = 0.2
    """Of SyN, in voxels."""

    flow_sigma: Annotated[float, Field(ge=0)] = 3.0
    """Smoothing of each update, in voxels (as a variance)."""

    total_sigma: Annotated[float, Field(ge=0)] = 0.0
    """Smoothing of the whole field, in voxels (as a variance)."""

    seed: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    """Of the random samples of its linear stages."""


@settings_dataclass(frozen=True, config=_STRICT)
class ElastixSettings:
    """The engine ``elastix``: B-splines on mutual information. Defaults are those of itk-elastix 0.25."""

    python: str = ""
    """Path of a Python that has itk-elastix. Empty: the environment variable ATLASSEGFM_ELASTIX_PYTHON, or else this
    Python."""

    voxels: Annotated[int, Field(ge=2_000, le=50_000_000)] = 1_200_000
    """Voxels over the query's field of view that it works on, at most, as for greedy."""

    resolutions: Annotated[int, Field(ge=1, le=8)] = 4
    """Levels, each twice as fine as the one before."""

    iterations: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Steps of the stochastic gradient descent on each level of each stage."""

    samples: Annotated[int, Field(ge=100, le=1_000_000)] = 2048
    """Points drawn anew for each step."""

    grid_voxels: Annotated[float, Field(ge=1, le=64)] = 4.0
    """Distance of B-spline control points on the last level, in voxels along the finest axis (4: about itk-elastix'
    10 mm for an abdomen)."""

    seed: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    """Of the random samples."""


@settings_dataclass(frozen=True, config=_STRICT)
class RegistrationSettings:
    """How the atlas is registered to the query."""

    engine: Literal["instance", "voxelmorph", "greedy", "ants", "elastix"] = "instance"
    """Deformable engine. Those of other packages (greedy, ants, elastix) must be installed."""

    rigid: bool = True
    """Whether to search translations and fit a rigid motion. Off: the next stage starts from the scanner's
    coordinates."""

    affine: bool = True
    """Whether to fit scale and shear too."""

    deformable: bool = True
    """Whether to fit a displacement field after the linear stages."""

    structure_search: bool = True
    """Whether each labelled structure is searched for on its own and gets a linear map of its own, to start the
    deformable stage (engine ``instance`` only): organs move by centimetres against each other, out of reach of a smooth
    fit. A structure whose MIND-SSC difference is larger at its best place than where it is stays there."""

    coarse_voxels: Annotated[int, Field(ge=2_000, le=1_000_000)] = 40_000
    """Voxels of the coarse level over the query's field of view; its spacing follows (about 9 mm for an abdomen)."""

    fine_voxels: Annotated[int, Field(ge=2_000, le=20_000_000)] = 150_000
    """Voxels of the fine level (about 6 mm for an abdomen), never finer than the scan itself."""

    candidates: Annotated[int, Field(ge=1, le=32)] = 4
    """Translations carried from the search to the linear fit."""

    linear_iterations: Annotated[int, Field(ge=1, le=1000)] = 30
    """Adam steps of each linear fit (rigid and affine on the coarse level, affine again on the fine one)."""

    peer_linear: bool = True
    """Whether engines of other packages do the linear stages too. Off: they are given ours and do the deformable stage
    alone."""

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


@settings_dataclass(frozen=True, config=_STRICT)
class SimulationSettings:
    """Simulated registration errors; the defaults were fitted to the errors of 33 real registrations."""

    sizes: Annotated[tuple[Annotated[float, Field(gt=0, le=2)], ...], Field(min_length=1)] = (0.07, 0.10, 0.14, 0.20)
    """Standard deviations of the displacement along each axis, as fractions of the structure's radius; every structure
    is simulated once with each."""

    sigma: Annotated[float, Field(gt=0, le=10)] = 0.5
    """Sigma of the Gaussian that smooths the displacement, as a fraction of the structure's radius: with it, errors
    along a border correlate as real ones do."""


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
    """Noise added to the features in training, in their standard deviations, against overfitting to one scan."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction of the learned correction that is applied: real registration errors vary more than simulated ones."""


@settings_dataclass(frozen=True, config=_STRICT)
class NnInteractiveSettings:
    """The model ``nninteractive``."""

    autozoom: bool = True
    """Whether it looks again at coarser resolution where its answer reaches the edge of its patch (192 voxels a
    side), and then refines what it found patch by patch. Off is faster, and cuts off what is larger."""

    server: Annotated[str, RUNTIME_ONLY] = ""
    """Address of an nnInteractive server (``nninteractive-server``) that computes instead of this process, such as
    "http://127.0.0.1:1527"; empty: compute here. The server gets the scan. Its key is taken from the environment
    variable NN_INTERACTIVE_API_KEY. Its answers are masks, probability 0 or 1."""

    allow_remote: Annotated[bool, RUNTIME_ONLY] = False
    """Whether scans may be sent to a server on another machine."""

    timeout_seconds: Annotated[float, Field(gt=0), RUNTIME_ONLY] = 600.0
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
    """How far beyond the first and last slice of the atlas's structure it looks, in mm, one slice at least: more than
    the usual error of a registration; not tuned."""

    reach_mm: Annotated[float, Field(ge=0)] = 150.0
    """How far from the prompted slice it looks up and down where the slices of the atlas's structure are not known, in
    mm. Half the height of the largest organs with some to spare. Not tuned."""

    empty_slices: Annotated[int, Field(ge=1)] = 3
    """After how many successive slices without the structure it stops looking, where the slices of the atlas's
    structure are not known."""

    feature_cache_mb: Annotated[int, Field(ge=0), RUNTIME_ONLY] = 512
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
    """Side in voxels of the cubes that the network sees. Smaller cubes need less time and memory, and show less of a
    vessel's course."""

    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    """Overlap of neighbouring cubes, as a fraction of their side."""

    blending: Literal["constant", "gaussian"] = "constant"
    """Weight of a voxel where cubes overlap: constant, or lower towards the cube's border (Gaussian, sigma an eighth of
    the side)."""

    reach_mm: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """Largest distance in mm from the warped atlas's structure at which a vessel counts as that structure, unless
    another one is nearer: about the error of a registration. A larger one also takes vessels without a label."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers the network computes in (PyTorch's autocast). The shorter ones are faster on GPUs and on CPUs that have
    units for them, and change probabilities in the second or third digit."""

    cache_mib: Annotated[int, Field(ge=0, le=1_000_000), RUNTIME_ONLY] = 1024
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


@settings_dataclass(frozen=True, config=_STRICT)
class FusionSettings:
    """How the warped atlas and the model's answer are fused."""

    gate: Literal["default", "paper"] = "default"
    """Kind of gate. "paper" is eq. 5 of arXiv 2512.18176. "default" then corrects the fused masks near their borders
    and smooths them, as learned on the same simulated masks."""

    kernels: tuple[int, ...] = (3, 5, 7)
    """Sizes of the max-poolings, voxels; odd [paper: 3, 5, 7]."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Learning rate of Adam; a weight moves by about this much an iteration [paper: 1e-5]."""

    iterations: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Steps of Adam; 0 keeps the constant gate [paper: 100]."""

    start: Literal["best"] | Annotated[float, Field(ge=0, le=1)] = "best"
    """Constant K that training starts from: a number (1 is the atlas alone, 0 the model alone), or "best", which tries
    0, 1/4, 1/2, 3/4 and 1 on the training samples; the paper names none."""

    simulation: SimulationSettings = field(default_factory=SimulationSettings)
    """Simulated registration errors that the gate is trained on."""

    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    """Training of the correction network of the default gate."""

    @field_validator("kernels")
    @classmethod
    def _check_kernels(cls, kernels: tuple[int, ...]) -> tuple[int, ...]:
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError("expected odd numbers of voxels, as 3, 5, 7")
        return kernels


#: Name of the model that is none: the result is the warped atlas.
NO_MODEL = "none"


@settings_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Settings:
    """All settings of a job."""

    registration: RegistrationSettings = field(default_factory=RegistrationSettings)
    """How the atlas is registered to the query."""

    fusion: FusionSettings = field(default_factory=FusionSettings)
    """How the warped atlas and the model's answer become one."""

    model: str = "builtin"
    """Name of the segmentation model; "none" stops after the registration: the result is the warped atlas.
    ``atlassegfm models`` lists them."""

    model_path: str = ""
    """File or folder of the model's weights; empty: looked for where ``atlassegfm models show`` says."""

    models: ModelSettings = field(default_factory=ModelSettings)
    """How the models are set up."""

    prompt: Literal["auto", "click", "box", "mask"] = "auto"
    """What the model is prompted with; "auto" is the best of the prompts it takes."""

    topology: bool = True
    """Whether islands that the atlas's structures do not have are removed from the fused result."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Start of the random numbers: the same seed gives the same result on the same machine."""
