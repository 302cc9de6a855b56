"""The deformable engine ``voxelmorph``: the paper's, a VoxelMorph U-Net optimised on the one pair.

The network sees both scans and gives the displacement; nothing is trained beforehand, its weights are merely
another way to write down one smooth field. Architecture: Balakrishnan et al., "VoxelMorph: A Learning Framework
for Deformable Medical Image Registration", IEEE TMI 2019, as in the authors' PyTorch code (``VxmDense``); its
diffeomorphic variant: Dalca et al., "Unsupervised Learning of Probabilistic Diffeomorphic Registration for
Images and Surfaces", MedIA 2019. Optimisation on the pair: AtlasSegFM (arXiv 2512.18176), "the paper".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...core.errors import RegistrationError
from ...transforms.maps import Affine, Chain, DisplacementField, displacement_on
from .. import pyramid
from ..features import LocalCorrelation, mind_ssc
from ..pair import Fitted, Pair, Start
from ..sampling import flow, sample_displaced

if TYPE_CHECKING:
    from ...settings import RegistrationSettings, VoxelmorphSettings


#: Of the generator that draws the weights; any will do, but the same one every time.
_SEED = 0


#: Slope of the LeakyReLU, and standard deviation of the last layer's weights, so that the first displacement is
#: next to nothing [VxmDense].
_SLOPE, _FLOW_DEVIATION = 0.2, 1e-5


#: Cube of the local correlation, voxels: 9 wide [Balakrishnan et al., section IV-C].
_CORRELATION_RADIUS = 4


#: Power of the polynomial decay of the learning rate [published code].
_DECAY_POWER = 0.9


#: Share of the iterations in which the learning rate rises before the cosine.
_WARM_UP = 0.05


#: A loss that falls by less than this share has not fallen.
_LEAST_GAIN = 1e-3


def fit(pair: Pair, linear: Affine, start: Start | None, settings: RegistrationSettings, device: str) -> Fitted:
    """Optimise the network on one pair.

    Parameters
    ----------
    pair : Pair
        Query and atlas.
    linear : Affine
        Fixed to moving world, applied after the field.
    start : Start or None
        To begin with, if the settings ask for it.

    Returns
    -------
    Fitted
        Its field lies on an isotropic grid over the query's field of view.

    Raises
    ------
    RegistrationError
        If the optimisation diverges, or the GPU's memory does not suffice.
    """
    options = settings.voxelmorph
    voxels = options.cpu_voxels if device == "cpu" else options.cuda_voxels
    stages = [(voxels // 8, options.coarse_iterations)] if options.coarse_iterations else []
    stages.append((voxels, options.iterations))
    field = start.field if options.use_start and start is not None else None
    axes = pyramid.axes_of(pair.fixed.grid)
    parameters = 0
    for wanted, iterations in stages:
        spacing_mm = pyramid.level_spacings_mm(pair.fixed.grid, (wanted,))[-1]
        grid = pyramid.frame_grid(pair.fixed.grid, axes, spacing_mm)
        # Afresh from the scans as they came: the other stages' levels may be coarser.
        fixed = pyramid.prepare(pair.fixed, None, spacing_mm, "query")
        moving = pyramid.prepare(pair.moving, None, spacing_mm, "atlas")
        before = linear if field is None else Chain((field, linear))
        query, atlas = pyramid.on_grid(fixed, grid, device), pyramid.on_grid(moving, grid, device, before)
        try:
            displacement, parameters = _optimise(query, atlas, iterations, options)
        except torch.cuda.OutOfMemoryError as error:
            raise RegistrationError(
                f"a working grid of {' x '.join(map(str, grid.shape))} voxels does not fit into the GPU's memory; "
                f"lower registration.voxelmorph.cuda_voxels (now {options.cuda_voxels})"
            ) from error
        if not np.isfinite(displacement).all():
            raise RegistrationError(
                "the optimisation of the network diverged; lower registration.voxelmorph.learning_rate "
                f"(now {options.learning_rate:g})"
            )
        world = np.einsum("wv,vijk->wijk", grid.affine[:3, :3], displacement)
        found = DisplacementField(grid, world.astype(np.float32))
        if field is not None:
            found = displacement_on(Chain((found, field)), grid)
        field = found
    return Fitted(linear, field, {"deformable": parameters})


class Network(nn.Module):
    """VoxelMorph's U-Net with its displacement layer.

    VoxelMorph's own layout at any width: ``channels`` at full resolution, twice as many on the levels below. One
    convolution of 3 x 3 x 3 a level and LeakyReLU; down by max-pooling, up by nearest neighbour with the skip
    joined on; then three convolutions at full resolution (2 c, c, c) and one to the displacement. For
    ``channels`` 16 these are VoxelMorph's default features (327 331 parameters); for 32 on 5 levels, four of them
    halved, 1 304 387: the paper's 1.3 M. (32 channels on each of the levels would make 0.34 M.)

    Parameters
    ----------
    levels : int
        Resolutions, the full one included.
    channels : int
        At full resolution.
    generator : Generator
        Draws the weights, so that the global one stays as it is.
    """

    def __init__(self, levels: int, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        wide = 2 * channels
        down = [channels] + [wide] * (levels - 2)
        self.encoder, self.decoder, self.last = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = 2
        for features in down:
            self.encoder.append(_convolution(width, features, generator))
            width = features
        for skipped in reversed(down):
            self.decoder.append(_convolution(width, wide, generator))
            width = wide + skipped
        for features in (wide, channels, channels):
            self.last.append(_convolution(width, features, generator))
            width = features
        self.flow = _convolution(width, 3, generator)
        nn.init.normal_(self.flow.weight, 0, _FLOW_DEVIATION, generator=generator)
        self.flow.bias = nn.Parameter(torch.zeros(3))

    def forward(self, scans: Tensor, *, half: bool = False) -> Tensor:
        """(1, 2, I, J, K) moving and fixed scan to (1, 3, I, J, K) displacement in voxels; any I, J, K.

        Parameters
        ----------
        scans : Tensor, (1, 2, I, J, K)
            Intensities in [0, 1].
        half : bool
            Whether to convolve in bfloat16; the displacement is float32 either way.
        """
        values = scans
        if half:
            # The order in which tensor cores and AMX read; others would be rearranged at each layer.
            values = values.to(memory_format=torch.channels_last_3d)
        with torch.autocast(scans.device.type, torch.bfloat16, enabled=half):
            skips = []
            for layer in self.encoder:
                values = F.leaky_relu(layer(values), _SLOPE)
                skips.append(values)
                # Odd sides are rounded up on the way down and cut on the way up. Filling up the scans to multiples of
                # 16 would be as good, but adds two thirds to the voxels of an abdomen on the CPU's grid.
                values = F.max_pool3d(values, 2, ceil_mode=True)
            for layer in self.decoder:
                values = F.interpolate(F.leaky_relu(layer(values), _SLOPE), scale_factor=2, mode="nearest")
                skip = skips.pop()
                i, j, k = skip.shape[2:]
                values = torch.cat((values[:, :, :i, :j, :k], skip), dim=1)
            for layer in self.last:
                values = F.leaky_relu(layer(values), _SLOPE)
        # bfloat16 has 8 bits: a displacement of 20 voxels would be known to a tenth of a voxel.
        displacement: Tensor = self.flow(values.float())
        return displacement


def _convolution(before: int, after: int, generator: torch.Generator) -> nn.Conv3d:
    """A layer with PyTorch's usual first weights, drawn from a generator of our own."""
    layer: nn.Conv3d = nn.utils.skip_init(nn.Conv3d, before, after, 3, padding=1)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(before * 27)
    layer.bias = nn.Parameter(torch.empty(after).uniform_(-bound, bound, generator=generator))
    return layer


def _optimise(
    query: pyramid.Level, atlas: pyramid.Level, iterations: int, options: VoxelmorphSettings
) -> tuple[NDArray[np.float32], int]:
    """Fit a new network to two scans on one grid.

    Returns
    -------
    displacement : array, (3, I, J, K)
        In voxels.
    parameters : int
        Of the network.
    """
    device = query.image.device
    half = _uses_half(options, device)
    network = Network(options.levels, options.channels, torch.Generator().manual_seed(_SEED)).to(device)
    scans = torch.cat((atlas.image, query.image), dim=1)
    likeness = _Likeness(query, atlas, options)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)

    def predicted() -> tuple[Tensor, Tensor]:
        """Displacement, and what is to be smooth: the same, or the velocity it is integrated from."""
        raw = network(scans, half=half)
        return integrate(raw, options.integration_steps) if options.diffeomorphic else (raw, raw)

    best, best_at = math.inf, 0
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(options.schedule, iteration, iterations)
        displacement, rough = predicted()
        # The published code's penalty: mean over the axes of the squared forward differences, in voxels.
        roughness = sum((rough.diff(dim=axis).pow(2).mean() for axis in (2, 3, 4)), torch.zeros((), device=device)) / 3
        loss = likeness(displacement) + options.smoothness * roughness
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if options.patience:
            value = float(loss.detach())
            if value < best * (1 - _LEAST_GAIN):
                best, best_at = value, iteration
            elif iteration - best_at >= options.patience:
                break
    with torch.no_grad():
        displacement, _ = predicted()
    found: NDArray[np.float32] = displacement[0].cpu().numpy()
    return found, sum(parameter.numel() for parameter in network.parameters())


class _Likeness:
    """How unlike the query is the atlas once it is displaced; 0 where they are the same.

    Counted only where the atlas has been imaged: beyond its field of view there is no intensity to compare, and a
    made-up 0 would draw the atlas's border over organs it does not show. No gradient goes through the mask, lest it
    pay to push what does not match out of the picture.
    """

    def __init__(self, query: pyramid.Level, atlas: pyramid.Level, options: VoxelmorphSettings) -> None:
        self.loss = options.loss
        self.query = query.image
        channels = atlas.image
        # The paper's MSE is over all voxels. The other two compare the noise of air with itself: body only.
        self.weight = query.inside if self.loss == "mse" else query.weight
        if self.loss == "mind":
            self.query, channels = mind_ssc(query.image), mind_ssc(atlas.image)
        elif self.loss == "lncc":
            self.correlation = LocalCorrelation(query.image, _CORRELATION_RADIUS)
        self.atlas = torch.cat((channels, atlas.inside), dim=1)

    def __call__(self, displacement: Tensor) -> Tensor:
        """(1, 3, I, J, K) voxels to one number."""
        warped = sample_displaced(self.atlas, displacement)
        counted = self.weight * warped[:, -1:].detach()
        if self.loss == "lncc":
            unlike = 1 - self.correlation(warped[:, :-1])
        else:
            unlike = (warped[:, :-1] - self.query).pow(2).mean(dim=1, keepdim=True)
        return (unlike * counted).sum() / counted.sum().clamp_min(1)


def integrate(velocity: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Follow a stationary velocity for unit time by scaling and squaring, at half resolution [VxmDense].

    Parameters
    ----------
    velocity : Tensor, (1, 3, I, J, K)
        In voxels.
    steps : int
        Squarings.

    Returns
    -------
    displacement : Tensor, (1, 3, I, J, K)
        In voxels; invertible as far as the steps are small.
    halved : Tensor, (1, 3, A, B, C)
        The velocity that was integrated, in voxels of its own grid.
    """
    shape = velocity.shape[2:]
    small = [max(2, -(-n // 2)) for n in shape]
    ratio = torch.tensor([(m - 1) / (n - 1) for m, n in zip(small, shape, strict=True)], device=velocity.device)
    ratio = ratio.to(velocity.dtype)[:, None, None, None]
    halved = F.interpolate(velocity, small, mode="trilinear", align_corners=True) * ratio
    return F.interpolate(flow(halved, steps) / ratio, shape, mode="trilinear", align_corners=True), halved


def _rate(schedule: str, iteration: int, iterations: int) -> float:
    """Share of the learning rate at an iteration."""
    if schedule == "constant":
        return 1.0
    if schedule == "polynomial":
        return float((1 - iteration / iterations) ** _DECAY_POWER)
    rise = max(1, round(_WARM_UP * iterations))
    if iteration < rise:
        return (iteration + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (iteration - rise) / max(1, iterations - rise)))


def _uses_half(options: VoxelmorphSettings, device: torch.device) -> bool:
    if options.half_precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return options.half_precision == "on"
