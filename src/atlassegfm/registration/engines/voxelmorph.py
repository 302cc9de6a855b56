"""The deformable engine ``voxelmorph``: the paper's (arXiv 2512.18176), a VoxelMorph U-Net optimised on the one pair.

The network sees both scans and gives the displacement; it is not trained beforehand. Architecture: Balakrishnan et al.,
"VoxelMorph: A Learning Framework for Deformable Medical Image Registration", IEEE TMI 2019, as in the authors' PyTorch
code (``VxmDense``); its diffeomorphic variant: Dalca et al., "Unsupervised Learning of Probabilistic Diffeomorphic
Registration for Images and Surfaces", MedIA 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...core.adam import Adam
from ...core.errors import RegistrationError
from ...settings import RegistrationSettings, VoxelmorphSettings
from ...transforms.maps import Affine, field_from_voxels
from ..features import LocalCorrelation
from ..pyramid import Level, Pair, Start, frame_grid, level_spacings_mm, on_grid, prepare
from ..result import Registration
from ..sampling import gradient_penalty, integrate_velocity, sample_displaced

#: Of the generator that draws the weights; any will do.
_SEED = 0
#: Slope of the LeakyReLU, and standard deviation of the last layer's weights, so that the first displacement is small
#: [VxmDense].
_SLOPE, _FLOW_DEVIATION = 0.2, 1e-5
#: Half width of the cube of the local correlation, in voxels: 9 across [Balakrishnan et al., section IV-C].
_CORRELATION_RADIUS = 4
#: Fraction of the iterations in which the learning rate rises before the cosine.
_WARM_UP = 0.05


def fit(pair: Pair, linear: Affine, _start: Start | None, settings: RegistrationSettings, device: str) -> Registration:
    """Optimise the network on one pair, on an isotropic grid over the query's field of view.

    ``linear``, fixed to moving world, is applied after the field. No start is taken: the paper has no search for
    structures. Raises :class:`.RegistrationError` if the optimisation diverges or the GPU's memory does not suffice.
    """
    options = settings.voxelmorph
    voxels = options.cpu_voxels if device == "cpu" else options.cuda_voxels
    (spacing_mm,) = level_spacings_mm(pair.fixed.grid, (voxels,))
    grid = frame_grid(pair.fixed.grid, spacing_mm)
    # Afresh from the scans as they came: the other stages' levels may be coarser.
    query = on_grid(prepare(pair.fixed, None, spacing_mm, "query"), grid, device)
    atlas = on_grid(prepare(pair.moving, None, spacing_mm, "atlas"), grid, device, linear)
    try:
        displacement, parameter_count = _optimise(query, atlas, options)
    except torch.cuda.OutOfMemoryError as error:
        found = f"a working grid of {' x '.join(map(str, grid.shape))} voxels does not fit into the GPU's memory"
        advice = f"lower registration.voxelmorph.cuda_voxels (now {options.cuda_voxels})"
        raise RegistrationError(f"{found}; {advice}") from error
    if not np.isfinite(displacement).all():
        advice = f"lower registration.voxelmorph.learning_rate (now {options.learning_rate:g})"
        raise RegistrationError(f"the optimisation of the network diverged; {advice}")
    field = field_from_voxels(grid, displacement)
    return Registration(linear, field, parameter_count={"deformable": parameter_count})


class Network(nn.Module):
    """VoxelMorph's U-Net with its displacement layer.

    ``channels`` at full resolution, twice as many on the levels below; one 3 x 3 x 3 convolution a level and LeakyReLU;
    down by max-pooling, up by nearest neighbour with skip connections; then three convolutions at full resolution (2 c,
    c, c) and one to the displacement. 16 channels on 5 levels are VoxelMorph's default (327 331 parameters), 32 the
    paper's (1 304 387).
    """

    def __init__(self, levels: int, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        wide = 2 * channels
        down = [channels] + [wide] * (levels - 2)
        joined = [wide + skipped for skipped in reversed(down)]
        self.encoder = nn.ModuleList(_convolution(a, b, generator) for a, b in pairwise((2, *down)))
        self.decoder = nn.ModuleList(_convolution(a, wide, generator) for a in (down[-1], *joined[:-1]))
        last = pairwise((joined[-1], wide, channels, channels))
        self.last = nn.ModuleList(_convolution(a, b, generator) for a, b in last)
        self.flow = _convolution(channels, 3, generator)
        nn.init.normal_(self.flow.weight, 0, _FLOW_DEVIATION, generator=generator)
        self.flow.bias = nn.Parameter(torch.zeros(3))

    def forward(self, scans: Tensor, *, half: bool = False) -> Tensor:
        """(1, 2, I, J, K) moving and fixed scan in [0, 1] to (1, 3, I, J, K) displacement in voxels; any I, J, K.

        With ``half``, convolutions are in bfloat16; the displacement is float32 either way.
        """
        # In half precision in the order in which tensor cores and AMX read; others would be rearranged at each layer.
        values = scans.to(memory_format=torch.channels_last_3d) if half else scans
        with torch.autocast(scans.device.type, torch.bfloat16, enabled=half):
            skips = []
            for layer in self.encoder:
                values = F.leaky_relu(layer(values), _SLOPE)
                skips.append(values)
                # Odd sides are rounded up on the way down and cropped on the way up.
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
    """A layer with PyTorch's usual first weights, drawn from a generator of our own; the global one stays as it is."""
    layer: nn.Conv3d = nn.utils.skip_init(nn.Conv3d, before, after, 3, padding=1)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(before * 27)
    layer.bias = nn.Parameter(torch.empty(after).uniform_(-bound, bound, generator=generator))
    return layer


def _optimise(query: Level, atlas: Level, options: VoxelmorphSettings) -> tuple[NDArray[np.float32], int]:
    """Displacement, (3, I, J, K) in voxels, of a new network optimised on one pair, and its parameter count."""
    device = query.image.device
    half = options.half_precision == "on"
    if options.half_precision == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    network = Network(options.levels, options.channels, torch.Generator().manual_seed(_SEED)).to(device)
    scans = torch.cat((atlas.image, query.image), dim=1)
    dissimilarity = _dissimilarity(query, atlas, options.loss)
    parameters = list(network.parameters())
    optimizer = Adam(parameters, [options.learning_rate] * len(parameters))

    def predicted() -> tuple[Tensor, Tensor]:
        """Displacement, and what is to be smooth: the same, or the velocity it is integrated from."""
        raw = network(scans, half=half)
        return integrate(raw, options.integration_steps) if options.diffeomorphic else (raw, raw)

    for iteration in range(options.iterations):
        displacement, regularised = predicted()
        gradient = gradient_penalty(regularised) / 3  # a mean over the axes, as in the published code
        loss = dissimilarity(displacement) + options.smoothness * gradient
        factor = _rate(options.schedule, iteration, options.iterations)
        optimizer.step(torch.autograd.grad(loss, parameters), factor=factor)
    with torch.no_grad():
        displacement, _ = predicted()
    return displacement[0].cpu().numpy(), sum(parameter.numel() for parameter in network.parameters())


def _dissimilarity(query: Level, atlas: Level, loss: str) -> Callable[[Tensor], Tensor]:
    """Dissimilarity of query and atlas displaced by (1, 3, I, J, K) voxels, in the atlas's field of view; 0 if equal.

    No gradient goes through the field of view: pushing what does not match out of it would lower the loss.
    """
    correlation = LocalCorrelation(query.image, _CORRELATION_RADIUS) if loss == "lncc" else None
    # The paper's MSE is over all voxels. Local correlation compares the noise of air with itself: body only.
    weight = query.inside if correlation is None else query.weight
    channels = torch.cat((atlas.image, atlas.inside), dim=1)

    def measure(displacement: Tensor) -> Tensor:
        image, inside = sample_displaced(channels, displacement).split(1, dim=1)
        counted = weight * inside.detach()
        difference = (image - query.image).pow(2) if correlation is None else 1 - correlation(image)
        mean: Tensor = (difference * counted).sum() / counted.sum().clamp_min(1)
        return mean

    return measure


def integrate(velocity: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Integrate a stationary velocity, (1, 3, I, J, K) in voxels, at half resolution in 2**steps steps [VxmDense].

    Returns the displacement, in voxels, and the velocity that was integrated, in voxels of its own coarser grid.
    """
    shape = velocity.shape[2:]
    small = [max(2, -(-n // 2)) for n in shape]
    ratio = torch.tensor([(m - 1) / (n - 1) for m, n in zip(small, shape, strict=True)], device=velocity.device)
    ratio = ratio.to(velocity.dtype)[:, None, None, None]
    halved = F.interpolate(velocity, small, mode="trilinear", align_corners=True) * ratio
    return F.interpolate(integrate_velocity(halved, steps) / ratio, shape, mode="trilinear", align_corners=True), halved


def _rate(schedule: str, iteration: int, iterations: int) -> float:
    """Factor of the learning rate at an iteration."""
    if schedule == "constant":
        return 1.0
    rise = max(1, round(_WARM_UP * iterations))
    if iteration < rise:
        return (iteration + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (iteration - rise) / max(1, iterations - rise)))
