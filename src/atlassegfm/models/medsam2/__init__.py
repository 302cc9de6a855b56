"""MedSAM2: SAM 2.1 trained on medical scans, which follows a structure from slice to slice as through a video.

A scan is converted to 8 bits and cut into slices. The prompt is put on one slice, the middle one of the structure; the
network follows the structure up from there, then, prompted anew, down. Preparation and prompts follow
``medsam2_infer_3D_CT.py`` of bowang-lab/MedSAM2 at 332f30d; the network itself is in :mod:`.network`.

On a slice prompted by a mask the
network returns that mask, by design.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from ...core.errors import InputError
from ...core.geometry import Grid
from ...core.image import Volume
from ...core.mask import LocalMap
from ...prompts import INSIDE, BoxPrompt, ClickPrompt, MaskPrompt, Prompt, RegionPrompt, inside_scan, largest_component
from ...settings import MedSam2Settings, ModelSettings
from ..base import OnPrompt, in_turn, intensities, scan_name, usable_device
from ..slices import Slices, SliceView, box_across, choose_view, to_8_bits
from ..weights import describe_file, installed_version
from .network import FeatureCache, Network, PointPrompt, SlicePrompt, load_network, require_packages

#: Mean and standard deviation of red, green and blue that the image encoder was trained with [SAM 2, ImageNet].
_PIXEL_MEAN = (0.485, 0.456, 0.406)
_PIXEL_STD = (0.229, 0.224, 0.225)
#: Probabilities below this count as 0, so that maps are as small as their structures.
_LEAST_PROBABILITY = 1e-3


@dataclass(frozen=True, eq=False)
class MedSam2Encoding:
    """An encoded scan: its slices, (slices, rows, columns) uint8, how they lie in it, its grid, and features."""

    slices: Slices
    view: SliceView
    grid: Grid
    features: FeatureCache


@dataclass(frozen=True, eq=False)
class MedSam2Segmenter:
    """Model behind :class:`~atlassegfm.models.Segmenter`."""

    network: Network
    settings: MedSam2Settings
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, image: Volume) -> MedSam2Encoding:
        """Convert a scan (RAS-canonical array order) to slices of 8 bits, which the network sees when it is prompted.

        Raises InputError if it has NaN or infinite voxels, or no contrast, also within the window of a CT.
        """
        view = choose_view(image.grid, self.settings.slice_axis)
        slices = to_8_bits(view.frames(intensities(image)), self.settings, scan_name(image), "medsam2")
        return MedSam2Encoding(slices, view, image.grid, FeatureCache(self.settings.feature_cache_mb * 1_000_000))

    def predict(
        self, encoded: MedSam2Encoding, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Predict the structures one after the other; see :class:`~atlassegfm.models.Segmenter`.

        Raises InputError if a box lies across the slices that are read.
        """
        return {number: self._predict_one(encoded, prompt) for number, prompt in in_turn(prompts, on_prompt)}

    def _predict_one(self, encoded: MedSam2Encoding, prompt: Prompt) -> LocalMap:
        if isinstance(prompt, RegionPrompt):
            raise TypeError("the model 'medsam2' is prompted by click, mask or box, not by RegionPrompt")
        on_slice = _on_slice(prompt, encoded)
        if on_slice is None:
            return LocalMap.empty()
        span, known = _span(prompt, on_slice.index, encoded, self.settings)
        probability = np.zeros((span[1] - span[0], *encoded.slices.shape[1:]), np.float32)
        for index, logits in self.logits(encoded, on_slice, span, stop_when_gone=not known):
            found = special.expit(logits)
            probability[index - span[0]] = np.where(found < _LEAST_PROBABILITY, 0, found)
        on_span = LocalMap.from_full(encoded.view.volume(probability))
        start = np.array(on_span.start)
        start[encoded.view.across] += span[0]
        return on_span if on_span.is_empty else LocalMap(tuple(start.tolist()), on_span.values)

    def logits(
        self,
        encoded: MedSam2Encoding,
        prompt: PointPrompt | SlicePrompt,
        span: tuple[int, int],
        *,
        stop_when_gone: bool = False,
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Predict slice by slice: the prompted one, up from there, then down.

        ``span`` is the first slice and one past the last one that may be seen. With ``stop_when_gone`` a direction ends
        after ``settings.empty_slices`` successive slices without the structure. Yields the index of each slice once,
        and logits, (rows, columns) float32: above 0 inside, -1024 everywhere if the structure is absent.
        """
        _, rows, columns = encoded.slices.shape

        def frame(index: int) -> Tensor:
            return to_frame(encoded.slices[index], self.network.image_size)

        for reverse in (False, True) if prompt.index > span[0] else (False,):
            empty = 0
            tracked = self.network.track(prompt, frame, (rows, columns), span, encoded.features, reverse=reverse)
            for index, logits in tracked:
                # The prompted slice was predicted on the way up.
                if not (reverse and index == prompt.index):
                    yield index, logits
                empty = 0 if (logits > 0).any() else empty + 1
                if stop_when_gone and empty >= self.settings.empty_slices:
                    break


def load(device: str, settings: ModelSettings, weights: Callable[[], Path]) -> MedSam2Segmenter:
    """Load the model onto "cpu" or "cuda"; errors as of :func:`~atlassegfm.models.load_model`."""
    place = usable_device(device)
    require_packages()  # reported before missing weights
    path = weights()
    network = load_network(path, place)
    provenance = {"weights": describe_file(path), "transformers_version": installed_version("transformers")}
    return MedSam2Segmenter(network, settings.medsam2, provenance)


def to_frame(pixels: NDArray[np.uint8], size: int) -> Tensor:
    """Convert a slice (rows, columns) to network input, (3, size, size) float32.

    As in the published code, the aspect ratio is not kept; Pillow, unlike torch, resamples 8 bits.
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), np.float32) / np.float32(255)
    standardised = (resized - np.array(_PIXEL_MEAN, np.float32)) / np.array(_PIXEL_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(standardised.transpose(2, 0, 1)))


def _on_slice(
    prompt: ClickPrompt | BoxPrompt | MaskPrompt, encoded: MedSam2Encoding
) -> PointPrompt | SlicePrompt | None:
    """Convert a prompt to one on a slice; None if it lies outside the scan."""
    view, shape = encoded.view, np.array(encoded.grid.shape)
    if isinstance(prompt, MaskPrompt):
        return _middle_slice(prompt.probability, encoded)
    start = np.array(prompt.ijk if isinstance(prompt, ClickPrompt) else prompt.start)
    stop = start + 1 if isinstance(prompt, ClickPrompt) else np.array(prompt.stop)
    start, stop = np.maximum(start, 0), np.minimum(stop, shape)
    if (stop <= start).any():
        return None
    if isinstance(prompt, BoxPrompt) and view.across != prompt.across:
        raise InputError(box_across(prompt, view, "medsam2"))
    # Rows and columns run against the axes, so that the last voxel of a box comes first.
    first = [float(shape[axis] - stop[axis]) for axis in (view.along, view.down)]
    last = [float(shape[axis] - 1 - start[axis]) for axis in (view.along, view.down)]
    index = int(start[view.across])
    if isinstance(prompt, ClickPrompt):
        return PointPrompt(index, np.array([first]), (1,))
    return PointPrompt(index, np.array([first, last]), (2, 3))


def _middle_slice(probability: LocalMap, encoded: MedSam2Encoding) -> SlicePrompt | None:
    """Take the mask on the middle slice of its largest component; None if it lies outside the scan."""
    view = encoded.view
    start, inside = inside_scan(probability, encoded.grid.shape)
    if not inside.any():
        return None
    # A component has no empty slice between its first and last one.
    first, last = _extent(largest_component(inside), view.across)
    index = int(start[view.across]) + (first + last) // 2
    first_voxel, stop = [0, 0, 0], list(encoded.grid.shape)
    first_voxel[view.across], stop[view.across] = index, index + 1
    mask = view.frames(probability.on_box(first_voxel, stop) >= INSIDE)[0]
    return SlicePrompt(index, np.ascontiguousarray(mask))


def _extent(mask: NDArray[np.bool_], across: int) -> tuple[int, int]:
    """First and last slice of a mask that is not empty."""
    occupied = np.flatnonzero(mask.any(axis=tuple(axis for axis in range(3) if axis != across)))
    return int(occupied[0]), int(occupied[-1])


def _span(
    prompt: ClickPrompt | BoxPrompt | MaskPrompt, index: int, encoded: MedSam2Encoding, settings: MedSam2Settings
) -> tuple[tuple[int, int], bool]:
    """Find the first slice and one past the last one to read, and whether the structure's slices are known."""
    across, count = encoded.view.across, len(encoded.slices)
    known: tuple[int, int] | None = None
    if isinstance(prompt, MaskPrompt):
        offset = prompt.probability.start[across]
        first, last = _extent(prompt.probability.values >= INSIDE, across)
        known = first + offset, last + offset + 1
    elif across == prompt.across:
        known = prompt.slices
    first, last = known or (index, index + 1)
    reach_mm = settings.reach_mm if known is None else settings.margin_mm
    added = max(int(np.ceil(reach_mm / float(encoded.grid.spacing_mm[across]) - 1e-6)), 1)
    return (max(min(first, index) - added, 0), min(max(last, index + 1) + added, count)), known is not None
