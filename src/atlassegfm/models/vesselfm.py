"""vesselFM: segments all blood vessels of a scan; the warped atlas says which of them are wanted.

vesselFM (Wittmann et al., "vesselFM: A Foundation Model for Universal 3D Blood Vessel Segmentation", CVPR 2025) is a
3-D U-Net without prompts. Its architecture and published inference are rebuilt here on MONAI: two percentiles of the
whole scan become 0 and 1, and logits of overlapping cubes are averaged.

The cubes lie on a lattice fixed to the whole scan. Only those within reach of a prompt are computed, and they are added
up in the order of the lattice, so a voxel's probability does not depend on the other prompts.

A voxel belongs to the nearest structure (voxels that the warped atlas fills by half; ties to the smaller number) within
``reach_mm``; its probability there is the model's, and 0 elsewhere. So structures of one call compete for what lies
between them, vessels are cut at the reach, and other vessels within reach are included. Distances use the spacing along
the voxel axes, taken to be at right angles.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, special

from ..core.errors import InputError, ModelError
from ..core.extras import require
from ..core.geometry import Grid
from ..core.image import Volume
from ..core.mask import LocalMap
from ..prompts import Prompt, RegionPrompt, crop_mask, inside_scan
from ..settings import ModelSettings, VesselFmSettings
from .base import OnPrompt, intensities, scan_name, usable_device
from .checkpoint import check_fit, few, load_state, named_weights
from .weights import describe_file, installed_version

Field = NDArray[np.float32]
#: Takes a window, (1, 1, K, J, I) float32, and gives logits of the same shape.
Network = Callable[[torch.Tensor], torch.Tensor]

#: Name of the weights in messages.
_WANTED = "the weights of the model 'vesselfm' (vesselFM_base.pt)"
#: Channels of each resolution of the published network.
PUBLISHED_FILTERS = (32, 64, 128, 256, 320, 320)
#: Weights whose first axis is the number of channels of a resolution.
_FILTER_KEYS = (
    "input_block.conv1.conv.weight",
    *(f"downsamples.{n}.conv1.conv.weight" for n in range(len(PUBLISHED_FILTERS) - 2)),
    "bottleneck.conv1.conv.weight",
)


@dataclass(frozen=True, eq=False)
class VesselEncoding:
    """An encoded scan and its windows computed so far: logits by first voxel in ``data``, most recently used last.

    ``data``, (I, J, K) float32, are intensities scaled to [0, 1] in RAS-canonical array order, on the scan's ``grid``
    or resampled over the same field of view.
    """

    data: Field
    grid: Grid
    windows: OrderedDict[tuple[int, ...], Field] = field(default_factory=OrderedDict)


@dataclass(frozen=True, eq=False)
class VesselSegmenter:
    """Model behind :class:`~atlassegfm.models.Segmenter`; its network computes on ``device``."""

    network: Network
    device: torch.device
    settings: VesselFmSettings = field(default_factory=VesselFmSettings)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, image: Volume) -> VesselEncoding:
        """Scale, and resample if set, one scan (RAS-canonical array order); InputError if it has no contrast."""
        data = _scaled(image, self.settings.percentiles)
        if self.settings.spacing_mm:
            for axis, length_mm in enumerate(np.array(image.grid.shape) * image.grid.spacing_mm):
                count = max(round(length_mm / self.settings.spacing_mm), 1)
                data = _interpolate(data, _places(count, data.shape[axis], 0, count), axis)
        return VesselEncoding(np.ascontiguousarray(data), image.grid)

    def predict(
        self, encoded: VesselEncoding, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Divide the scan's vessels among the regions; see the top of this module.

        ``on_prompt`` is called before the first window that reaches the structure.
        """
        territory = _divide(prompts, encoded.grid, self.settings.reach_mm)
        waiting = list(prompts)

        def turn_to(numbers: Iterable[int]) -> None:
            for number in numbers:
                if number in waiting:
                    waiting.remove(number)
                    if on_prompt is not None:
                        on_prompt(number)

        maps = dict.fromkeys(prompts, LocalMap.empty())
        if territory.numbers:
            logits = self._logits(encoded, territory, turn_to)
            boxes = ndimage.find_objects(territory.owner, max_label=len(territory.numbers))
            for place, (number, box) in enumerate(zip(territory.numbers, boxes, strict=True), start=1):
                if box is None:  # structures of smaller numbers own all its voxels
                    continue
                # Not PyTorch's sigmoid, whose last bits depend on the place in the array.
                probability = special.expit(logits[box]) * (territory.owner[box] == place)
                start = tuple(first + side.start for first, side in zip(territory.start, box, strict=True))
                maps[number] = LocalMap(start, probability.astype(np.float32, copy=False))
        turn_to(prompts)
        return maps

    def _logits(self, encoded: VesselEncoding, territory: _Territory, turn: Callable[[Iterable[int]], None]) -> Field:
        """Logits on the territory's box, computed wherever a voxel of the territory needs them, and 0 elsewhere."""
        shape, size, first = encoded.data.shape, self.settings.window, territory.start
        last = np.add(first, territory.owner.shape)
        places = list(map(_places, encoded.grid.shape, shape, first, last))
        start = [int(along[0]) for along in places]
        stop = [int(np.ceil(along[-1])) + 1 for along in places]
        total = np.zeros(np.subtract(stop, start), np.float32)
        windows = np.zeros_like(total)
        for corner in _corners(shape, size, self.settings.overlap):
            low, high = np.maximum(corner, 0), np.minimum(np.add(corner, size), shape)
            # Voxels between two places in the working grid need both.
            touched = [(along > a - 1) & (along < b) for along, a, b in zip(places, low, high, strict=True)]
            if not (numbers := territory.numbers_in(np.ix_(*touched))):
                continue
            turn(numbers)
            begin, end = np.maximum(low, start), np.minimum(high, stop)
            to = tuple(map(slice, begin - start, end - start))
            total[to] += self._window(encoded, corner)[tuple(map(slice, begin - low, end - low))]
            windows[to] += 1
        total /= np.maximum(windows, 1)
        for axis, along in enumerate(places):
            total = _interpolate(total, along - start[axis], axis)
        return total

    def _window(self, encoded: VesselEncoding, corner: tuple[int, ...]) -> Field:
        """Logits of one window on its part inside the scan, from the cache or the network."""
        found = encoded.windows.pop(corner, None)
        if found is None:
            patch = np.zeros((self.settings.window,) * 3, np.float32)
            low, high = np.maximum(corner, 0), np.minimum(np.add(corner, patch.shape), encoded.data.shape)
            inside = tuple(map(slice, low - corner, high - corner))
            patch[inside] = encoded.data[tuple(map(slice, low, high))]
            # Published: arrays as SimpleITK gives them, the first axis through the slices.
            given = torch.from_numpy(np.ascontiguousarray(patch.T))[None, None].to(self.device)
            with torch.inference_mode(), self._precision():
                answer = self.network(given).float().cpu().numpy()[0, 0].T
            found = np.ascontiguousarray(answer[inside])
        encoded.windows[corner] = found
        kept = sum(window.nbytes for window in encoded.windows.values())
        while encoded.windows and kept > self.settings.cache_mib << 20:
            kept -= encoded.windows.popitem(last=False)[1].nbytes
        return found

    def _precision(self) -> torch.autocast:
        precision = self.settings.precision
        kind = torch.float16 if precision == "float16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=kind, enabled=precision != "float32")


def load(device: str, settings: ModelSettings, weights: Callable[[], Path]) -> VesselSegmenter:
    """Load the published weights onto "cpu" or "cuda"; errors as of :func:`~atlassegfm.models.load_model`."""
    place = usable_device(device)
    _dyn_unet()  # reported before missing weights: it is installed first
    path = weights()
    provenance = {"weights": describe_file(path), "monai_version": installed_version("monai")}
    return VesselSegmenter(load_network(path).to(place), place, settings.vesselfm, provenance)


def build_network(filters: Sequence[int] = PUBLISHED_FILTERS, device: str = "cpu") -> torch.nn.Module:
    """Build the published architecture with random weights; PyTorch's random state stays as it was.

    ``filters`` are the channels of the six resolutions, finest first. On "meta" it has no weights yet. It takes (N, 1,
    K, J, I), each side a multiple of 32 from 64 on, and gives logits of the same shape.
    """
    levels = len(PUBLISHED_FILTERS)
    # configs/model/dyn_unet_base.yaml of the published code; all else are MONAI's defaults.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        network: torch.nn.Module = _dyn_unet()(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            strides=[[1, 1, 1]] + [[2, 2, 2]] * (levels - 1),
            kernel_size=[[3, 3, 3]] * levels,
            upsample_kernel_size=[[2, 2, 2]] * (levels - 1),
            filters=list(filters),
            res_block=True,
        )
    return network.eval().requires_grad_(False)


def load_network(path: Path) -> torch.nn.Module:
    """Build the network of a checkpoint, a bare state dict that sets its width; ModelError if it is of another one."""
    state = named_weights(load_state(path, wanted=_WANTED), path, wanted=_WANTED)
    if missing := [key for key in _FILTER_KEYS if key not in state or state[key].ndim != 5]:
        raise ModelError(
            f"{path}: holds weights of another network, without the kernels {few(missing)}; expected {_WANTED}"
        )
    network = build_network([int(state[key].shape[0]) for key in _FILTER_KEYS], device="meta")
    check_fit(state, network.state_dict(), path, wanted=_WANTED)
    network.load_state_dict({key: value.float() for key, value in state.items()}, strict=True, assign=True)
    return network.requires_grad_(False)


def _dyn_unet() -> Any:
    return require("the model 'vesselfm'", "vesselfm", "monai.networks.nets.dynunet").DynUNet


def _scaled(image: Volume, percentiles: tuple[float, float]) -> Field:
    """(I, J, K) intensities cut at two percentiles and scaled to [0, 1]."""
    data = intensities(image)
    low, high = (float(n) for n in np.percentile(data, percentiles))
    if low == high:
        found = f"the percentiles {percentiles[0]:g} and {percentiles[1]:g} of its voxels are both {low:g}"
        advice = "crop empty parts, or set models.vesselfm.percentiles wider apart"
        raise InputError(f"{scan_name(image)}: {found}, which leaves the model 'vesselfm' no contrast; {advice}")
    scaled = data - np.float32(low)
    scaled /= np.float32(high - low)
    return np.clip(scaled, 0, 1, out=scaled)


def _places(count: int, working: int, first: int, last: int) -> NDArray[np.float64]:
    """Where voxels first <= i < last of ``count`` lie among ``working`` ones along the same length.

    Voxel i is at (i + 1/2) m/n - 1/2 of m, held at the outer centres.
    """
    return np.clip((np.arange(first, last) + 0.5) * (working / count) - 0.5, 0, working - 1)


def _interpolate(values: Field, places: NDArray[np.float64], axis: int) -> Field:
    """Interpolate linearly at places along an axis of (I, J, K) values."""
    low, high = np.floor(places).astype(np.int64), np.ceil(places).astype(np.int64)
    fraction = (places - low).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(3)])
    below = np.take(values, low, axis)
    below += fraction * (np.take(values, high, axis) - below)
    return below


@dataclass(frozen=True, eq=False)
class _Territory:
    """Which structure each voxel in reach of one belongs to.

    ``owner``, (I, J, K) int32 from voxel ``start`` of the scan on, is the place in ``numbers`` plus 1; 0 out of reach.
    ``numbers`` are those of the structures, ascending.
    """

    start: tuple[int, ...]
    owner: NDArray[np.int32]
    numbers: tuple[int, ...]

    def numbers_in(self, box: tuple[NDArray[np.int64], ...]) -> list[int]:
        """Numbers of the structures that own a voxel of a box of ``owner``."""
        return [self.numbers[place - 1] for place in np.unique(self.owner[box]) if place]


def _divide(prompts: Mapping[int, Prompt], grid: Grid, reach_mm: float) -> _Territory:
    """Give each voxel of a scan to the nearest region within reach; ties to the smaller number."""
    margin = np.ceil(reach_mm / grid.spacing_mm).astype(np.int64)
    regions: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}
    for number in sorted(prompts):
        prompt = prompts[number]
        if not isinstance(prompt, RegionPrompt):
            raise TypeError(f"the model 'vesselfm' is prompted by region, not by {type(prompt).__name__}")
        start, inside = inside_scan(prompt.probability, grid.shape)
        if inside.any():
            regions[number] = crop_mask(start, inside, margin, grid.shape)
    if not regions:
        return _Territory((0, 0, 0), np.zeros((0, 0, 0), np.int32), ())
    low = np.min([first for first, _ in regions.values()], axis=0)
    high = np.max([first + region.shape for first, region in regions.values()], axis=0)
    owner = np.zeros(high - low, np.int32)
    nearest = np.full(high - low, np.inf, np.float32)
    for place, (first, region) in enumerate(regions.values(), start=1):
        distance_mm = ndimage.distance_transform_edt(~region, sampling=grid.spacing_mm).astype(np.float32)
        box = tuple(map(slice, first - low, first + region.shape - low))
        closer = (distance_mm <= reach_mm) & (distance_mm < nearest[box])
        nearest[box][closer] = distance_mm[closer]
        owner[box][closer] = place
    return _Territory(tuple(low.tolist()), owner, tuple(regions))


def _corners(shape: Sequence[int], window: int, overlap: float) -> Iterator[tuple[int, ...]]:
    """First voxels of the windows that cover a scan, the last axis fastest.

    They step by the part that does not overlap; the last one ends with the scan. A scan smaller than a window is in
    its middle, so that the first voxel is below 0 [MONAI's ``SlidingWindowInferer``].
    """
    step = max(int(window * (1 - overlap)), 1)
    firsts = ([-((window - n) // 2)] if n <= window else [*range(0, n - window, step), n - window] for n in shape)
    return product(*firsts)
