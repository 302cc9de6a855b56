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

    level_voxels: Annotated[tuple[Annotated[int, Field(ge=2_000, le=20_000_000)], ...], Field(min_length=1)] = (
        40_000,
        150_000,
    )
    """Voxels of each level over the query's field of view, coarse to fine (for an abdomen about 9 and 6 mm), never
    finer than the query itself. Where structures have been found, the first one is left out: it would undo much of
    that."""

    local_voxels: Annotated[int, Field(ge=0, le=20_000_000)] = 500_000
    """Voxels of the last level, in the box around the warped labels, never finer than the query itself; 0 for none."""

    voxels_per_structure: Annotated[int, Field(ge=0, le=1_000_000)] = 15_000
    """Where the atlas has many structures, they are small, and the last level has as many voxels as this for each of
    them, but at most ``most_local_voxels``: OASIS with its 138 structures comes to 1.4 mm."""

    most_local_voxels: Annotated[int, Field(ge=2_000, le=100_000_000)] = 2_000_000
    """Most voxels of the last level: bounds time and memory. At 2 million the whole process peaks at 1.7 GB
    (docs/registration.md, OASIS)."""

    iterations: Annotated[tuple[Annotated[int, Field(ge=0, le=2000)], ...], Field(min_length=1)] = (40, 35, 25)
    """Adam steps on each level, the one in the labels' box last. Here and below the last number of a list holds for
    all levels after it."""

    mind_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (2.5,)
    """Weight of the MIND-SSC difference on each level."""

    correlation_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.5,)
    """Weight of one minus the local correlation on each level."""

    smoothness: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.05, 0.25, 0.4)
    """Weight of the squared gradient of what each level adds to the displacement. Of the whole displacement it would
    pull structures back that were found centimetres away: with 0.1 of the whole on the second level, Dice of the warped
    atlas is 0.793 instead of 0.796 (15 pairs of Abd-CT) and 0.789 instead of 0.790 (15 of Cardiac)."""

    folding_penalty: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the squared shortfall of the local volume (Jacobian determinant) below 0.3."""

    structure_emphasis: Annotated[float, Field(ge=0)] = 4.0
    """How much more a voxel in or near a structure of the atlas counts: 1 + this times one elsewhere."""

    fits: Annotated[int, Field(ge=1, le=4)] = 2
    """How many fits are made, each with other weights; the warped labels are the mean of what they give. The first one
    is the transform that is kept and told of. Dice of the warped atlas with 1 / 2 / 3 / 4: 0.798 / 0.810 / 0.813 /
    0.816 (Cardiac, 10 pairs), 0.816 / 0.817 / 0.813 / 0.818 (Hippocampus, 12), 0.838 / 0.838 / 0.840 / 0.840 (Abd-MR,
    10). Each takes as long as the first."""

    diffeomorphic: bool = False
    """Whether each level fits a stationary velocity, whose flow can be undone everywhere, and levels are composed
    instead of added, so that hardly anything folds. Slower."""

    cautious: bool = True
    """Whether the fit is made again, cautiously, where the structures' contrast differs between the scans: the
    structures are searched for by MIND-SSC alone, and what follows counts little else until the level in the labels'
    box. Brightness and local correlation take a bright stomach for a bright spleen where the query's spleen is dark."""

    contrast_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Difference of the structures' brightness, as a share of the range of intensities, above which contrast counts as
    different (the program logs it at level DEBUG). In the ten pairs of Abd-MR with one scan, whose spleen is dark, it
    is 0.175 to 0.312, in the other twenty 0.011 to 0.086. Two pairs of Abd-CT and three of
    Cardiac are above it only because structures lie wrong. One scan: other data may want another value."""

    cautious_mind_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (5.0,)
    """``mind_weight`` of the cautious fit over the field of view; in the labels' box it is the usual one."""

    cautious_correlation_weight: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.0, 0.2)
    """``correlation_weight`` of the cautious fit."""

    cautious_smoothness: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.3, 0.1)
    """``smoothness`` of the cautious fit."""


@settings_dataclass(frozen=True, config=_STRICT)
class VoxelmorphSettings:
    """The engine ``voxelmorph``: the paper's network, optimised on the one pair. Defaults are the paper's."""

    cpu_voxels: Annotated[int, Field(ge=1_000, le=20_000_000)] = 40_000
    """Voxels of the isotropic working grid over the query's field of view, on a CPU: as many as the coarse level of the
    engine ``instance`` (about 9 mm for an abdomen), never finer than the scan. A step takes 1.1 s on one core of a Xeon
    of 2023, 0.14 to 0.25 s in half precision."""

    cuda_voxels: Annotated[int, Field(ge=1_000, le=100_000_000)] = 128**3
    """The same on a GPU [published code: 128 x 128 x 128, there squeezed, here isotropic]. 256 x 256 x 240 is
    15_728_640."""

    levels: Annotated[int, Field(ge=2, le=8)] = 5
    """Resolutions of the network, the full one included [paper]."""

    channels: Annotated[int, Field(ge=1, le=256)] = 32
    """Channels of the network at full resolution, twice as many below [paper]."""

    iterations: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Adam steps [paper]."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Of Adam [paper]."""

    loss: Literal["mse", "lncc", "mind"] = "mse"
    """What is compared: squared differences of intensities normalised to 0 to 1 [paper], local correlation, or
    MIND-SSC. MSE takes both scans to be of the same contrast. One Abd-MR pair, 200 steps of 1e-3 and a cosine: Dice
    0.802 by "mse" (9 % of the body folded), 0.815 by "lncc" at smoothness 1 (3 %), 0.722 by "mind" at 0.3 (0.1 %)."""

    smoothness: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared gradient of the displacement, a mean over the axes [published code]. Of the order of 1 for
    "lncc" (VoxelMorph's own: 1.5)."""

    diffeomorphic: bool = False
    """Whether the network gives a velocity, integrated at half resolution, instead of the displacement. One Abd-MR
    pair, "lncc" as above: Dice 0.822 and no folding with, 0.815 and 3 % without."""

    integration_steps: Annotated[int, Field(ge=1, le=12)] = 7
    """Squarings of the integration [VoxelMorph]."""

    schedule: Literal["constant", "polynomial", "cosine"] = "constant"
    """Course of the learning rate: constant [paper, which names none], falling with the power 0.9 [published code], or
    a rise over 5 % of the iterations and a cosine to 0, which bears higher rates."""

    coarse_iterations: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Steps of another network on an eighth of the voxels beforehand; its field is what the next begins with."""

    use_start: bool = False
    """Whether to begin with the displacement found by the search for each structure. The paper has no such search. One
    Abd-MR pair, 200 steps of 1e-3 and a cosine: Dice 0.802 without, 0.792 with."""

    patience: Annotated[int, Field(ge=0)] = 0
    """Steps without a loss lower by a thousandth after which to stop; 0 takes all steps."""

    half_precision: Literal["auto", "on", "off"] = "auto"
    """Whether to convolve in bfloat16; displacement and loss stay in single precision. "auto": on GPUs that have it.
    "on" makes a step four to eight times as fast on a CPU with AMX (Xeons since 2023); others were not measured."""


@settings_dataclass(frozen=True, config=_STRICT)
class GreedySettings:
    """The engine ``greedy``: picsl_greedy. Defaults are the recipe of our reference figures (docs/registration.md)."""

    python: str = ""
    """Path of a Python that has picsl_greedy. Empty: the environment variable ATLASSEGFM_GREEDY_PYTHON, or else this
    Python."""

    voxels: Annotated[int, Field(ge=2_000, le=50_000_000)] = 1_200_000
    """Voxels over the query's field of view that it works on, at most; never finer than the scan. About the recipe's
    spacings: 2.3 x 2.3 x 4.2 mm for Abd-MR (recipe 2.5 x 2.5 x 5), 3 mm for Abd-CT (3), 1.6 mm for OASIS (1.5), 1 mm
    for Hippocampus (1), 1.6 x 1.6 x 3.6 mm for Cardiac (1.6 x 1.6 x 4)."""

    search_tries: Annotated[int, Field(ge=0, le=100_000)] = 200
    """Random rigid starts tried before the linear fit, from the centres of both scans on; with
    ``registration.rigid`` only."""

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
    """Distance of B-spline control points on the last level, in voxels along the finest axis; 4 are about the 10 mm
    that itk-elastix takes for scans of an abdomen, and hold for small ones too."""

    seed: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    """Of the random samples."""


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
    """Whether each labelled structure is searched for on its own and gets a linear map of its own, to start the
    deformable stage: organs move by centimetres against each other, out of reach of a smooth fit. A structure whose
    best place is less like the atlas by MIND-SSC than where it is stays out of the search."""

    discrete: bool = False
    """Whether a coupled-convex search over displacements starts the deformable stage, after the search for each
    structure; not for engines that take no start. Off, as it gained nothing: Dice of three pairs, without and with,
    0.869 and 0.872 (Abd-MR 001 to 008), 0.826 and 0.799 (039 to 001), 0.788 and 0.790 (four organs of Abd-CT 008 to
    028)."""

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
