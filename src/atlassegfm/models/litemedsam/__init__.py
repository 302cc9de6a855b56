"""LiteMedSAM: a small Segment Anything trained on medical pictures, prompted with a box on every slice.

The network knows single slices. Where the structure is, and on which slices, the warped atlas says: the box around its
mask on each slice is the prompt, and where it has no voxel there is no answer. An image is encoded once for all
structures on it; of thin slices some are skipped, and interpolated.

A single box (the prompt "box") is followed from slice to slice as by the authors: each slice's box is that of its
neighbour's answer.

Input as in training (bowang-lab/MedSAM, branch LiteMedSAM at b0fab47): 8 bits, a slice averaged over areas until its
longer side is 256, stretched from 0 to 1, padded right and below. The network itself is in :mod:`.network`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ...core.errors import InputError
from ...core.geometry import Grid
from ...core.image import Volume
from ...core.mask import LocalMap
from ...prompts import INSIDE, BoxPrompt, MaskPrompt, Prompt, inside_scan
from ...settings import LiteMedSamSettings, ModelSettings
from ..base import OnPrompt, intensities, scan_name, usable_device
from ..slices import Slices, SliceView, box_across, choose_view, to_8_bits
from ..weights import describe_file, installed_version
from .network import IMAGE_SIZE, LiteMedSam, load_network

Field = NDArray[np.float32]
#: First row, first column, last row, last column: pixels of a slice, both inclusive.
Box = tuple[int, int, int, int]

#: Of each structure at least this many slices are read, where it has as many.
_FEWEST_SLICES = 16
#: Probabilities below this count as 0, so that maps are as small as their structures.
_LEAST_PROBABILITY = 1e-3


@dataclass(frozen=True, eq=False)
class SliceEncoding:
    """An encoded scan: its slices, (slices, rows, columns) uint8, how they lie in it, its grid, and embeddings.

    ``embeddings``, (1, 256, 64, 64) by slice, are those computed so far, the last used at the end.
    """

    slices: Slices
    view: SliceView
    grid: Grid
    embeddings: OrderedDict[int, torch.Tensor] = field(default_factory=OrderedDict)

    @property
    def scale(self) -> float:
        """Pixels of the network's input in one of a slice."""
        return IMAGE_SIZE / int(max(self.slices.shape[1:]))

    @property
    def input_shape(self) -> tuple[int, int]:
        """Rows and columns of the network's input that show the slice; those beyond are padding."""
        rows, columns = (max(round(n * self.scale), 1) for n in self.slices.shape[1:])
        return rows, columns


@dataclass(frozen=True, eq=False)
class LiteMedSamSegmenter:
    """Model behind :class:`~atlassegfm.models.Segmenter`."""

    network: LiteMedSam
    device: torch.device
    settings: LiteMedSamSettings = field(default_factory=LiteMedSamSettings)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, image: Volume) -> SliceEncoding:
        """Convert a scan (RAS-canonical array order) to slices of 8 bits; the network sees those with a prompt.

        Raises InputError if it has NaN or infinite voxels, or no contrast, also within the window of a CT.
        """
        view = choose_view(image.grid, self.settings.slice_axis)
        slices = to_8_bits(view.frames(intensities(image)), self.settings, scan_name(image), "litemedsam")
        return SliceEncoding(slices, view, image.grid)

    def predict(
        self, encoded: SliceEncoding, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Predict the structures slice by slice; see :class:`~atlassegfm.models.Segmenter`.

        ``on_prompt`` is called before the first slice of each structure.
        """
        answers = {number: _Answer(encoded) for number in prompts}
        waiting = set(prompts)

        def turn_to(number: int) -> None:
            if number in waiting and on_prompt is not None:
                on_prompt(number)
            waiting.discard(number)

        boxes: dict[int, dict[int, Box]] = {}  # by slice, then by structure
        for number, prompt in prompts.items():
            if isinstance(prompt, MaskPrompt):
                around = _boxes(prompt.probability, encoded)
                answers[number].shown = frozenset(around)
                for index, box in self._read(around, encoded).items():
                    boxes.setdefault(index, {})[number] = box
            elif isinstance(prompt, BoxPrompt):
                turn_to(number)
                for index, probability in self._follow(encoded, prompt):
                    answers[number].put(index, probability)
            else:
                raise TypeError(f"the model 'litemedsam' is prompted by mask or box, not by {type(prompt).__name__}")
        for index in sorted(boxes):
            for number in boxes[index]:
                turn_to(number)
            asked = list(boxes[index].values())
            for _ in range(self.settings.passes):
                found = self.predict_slice(encoded, index, asked)
                asked = [_box(one >= INSIDE) or box for one, box in zip(found, asked, strict=True)]
            for number, probability in zip(boxes[index], found, strict=True):
                answers[number].put(index, probability)
        for number in prompts:
            turn_to(number)
        return {number: answer.local_map() for number, answer in answers.items()}

    def _read(self, boxes: dict[int, Box], encoded: SliceEncoding) -> dict[int, Box]:
        """Choose the slices of one structure that are read: first, last, and some of those between if they are thin."""
        spacing_mm = float(encoded.grid.spacing_mm[encoded.view.across])
        step = max(min(round(self.settings.slice_distance_mm / spacing_mm), len(boxes) // _FEWEST_SLICES), 1)
        # Multiples of the step, so that structures share slices.
        return {index: box for index, box in boxes.items() if index % step == 0 or index in (min(boxes), max(boxes))}

    def predict_slice(self, encoded: SliceEncoding, index: int, boxes: list[Box]) -> Field:
        """Predict one slice for B boxes: probabilities in [0, 1], (B, rows, columns) float32."""
        rows, columns = encoded.input_shape
        # Outer edges of the pixels; whole numbers are their centres.
        corners = (np.array(boxes)[:, [1, 0, 3, 2]] + (0, 0, 1, 1)) * encoded.scale - 0.5
        margin = self.settings.box_margin
        corners = np.clip(corners + (-margin, -margin, margin, margin), 0, (columns - 1, rows - 1) * 2)
        with torch.inference_mode():
            prompts = torch.from_numpy(corners.astype(np.float32)).to(self.device)
            logits, _ = self.network(self._embedding(encoded, index), prompts)
            shown = logits[None, :, :rows, :columns]
            shape = encoded.slices.shape[1:]
            resized = functional.interpolate(shown, shape, mode="bilinear", align_corners=False)[0]
            return resized.sigmoid().cpu().numpy()

    def _embedding(self, encoded: SliceEncoding, index: int) -> torch.Tensor:
        """Embedding of a slice, from the cache or the network."""
        kept = encoded.embeddings
        if index not in kept:
            image = torch.from_numpy(to_input(encoded.slices[index], encoded.input_shape))
            kept[index] = self.network.encode(image[None, None].to(self.device))
        kept.move_to_end(index)
        while len(kept) > 1 and sum(one.nbytes for one in kept.values()) > self.settings.feature_cache_mb * 1_000_000:
            kept.popitem(last=False)
        return kept[index]

    def _follow(self, encoded: SliceEncoding, prompt: BoxPrompt) -> Iterator[tuple[int, Field]]:
        """Predict the box's slice, those above it, then those below, each with the box of its neighbour's answer.

        All slices that the prompt says the structure is on are answered; without them that of the box alone.
        """
        view, shape = encoded.view, np.array(encoded.grid.shape)
        start, stop = np.maximum(prompt.start, 0), np.minimum(prompt.stop, shape)
        if (stop <= start).any():
            return
        if prompt.across != view.across:
            raise InputError(box_across(prompt, view, "litemedsam"))
        box = _boxes(LocalMap(tuple(start.tolist()), np.ones(stop - start, np.float32)), encoded)
        middle = int(start[view.across])
        known = prompt.slices or (middle, middle + 1)
        first, last = max(known[0], 0), min(known[1], len(encoded.slices)) - 1
        for indices in (range(middle, last + 1), range(middle - 1, first - 1, -1)):
            near = box[middle]
            for index in indices:
                probability = self.predict_slice(encoded, index, [near])[0]
                yield index, probability
                near = _box(probability >= INSIDE) or near


class _Answer:
    """Probabilities of one structure, collected slice by slice; those of slices between are interpolated."""

    def __init__(self, encoded: SliceEncoding) -> None:
        self._encoded = encoded
        #: Slices on which the structure is.
        self.shown: frozenset[int] = frozenset()
        self._slices: dict[int, Field] = {}

    def put(self, index: int, probability: Field) -> None:
        """Keep the answer on a slice, (rows, columns)."""
        self._slices[index] = np.where(probability < _LEAST_PROBABILITY, 0, probability)

    def local_map(self) -> LocalMap:
        """All answers, on the scan's grid."""
        if not self._slices:
            return LocalMap.empty()
        first, last = min(self._slices), max(self._slices)
        frames = np.zeros((last - first + 1, *self._encoded.slices.shape[1:]), np.float32)
        for index, probability in self._slices.items():
            frames[index - first] = probability
        for below, above in pairwise(sorted(self._slices)):
            for index in sorted(self.shown.intersection(range(below + 1, above))):
                part = np.float32((index - below) / (above - below))
                frames[index - first] = (1 - part) * self._slices[below] + part * self._slices[above]
        on_span = LocalMap.from_full(self._encoded.view.volume(frames))
        start = np.array(on_span.start)
        start[self._encoded.view.across] += first
        return on_span if on_span.is_empty else LocalMap(tuple(start.tolist()), on_span.values)


def load(device: str, settings: ModelSettings, weights: Callable[[], Path]) -> LiteMedSamSegmenter:
    """Load the model onto "cpu" or "cuda"; errors as of :func:`~atlassegfm.models.load_model`."""
    place, path = usable_device(device), weights()
    network = load_network(path).to(place)
    provenance = {"weights": describe_file(path), "torch_version": installed_version("torch")}
    return LiteMedSamSegmenter(network, place, settings.litemedsam, provenance)


def to_input(pixels: NDArray[np.uint8], shape: tuple[int, int]) -> Field:
    """Convert a slice (rows, columns) to network input, (256, 256) in [0, 1], its first ``shape`` showing the slice."""
    down, along = (_resampling(n, m) for n, m in zip(pixels.shape, shape, strict=True))
    values = down @ pixels.astype(np.float32) @ along.T
    low, high = float(values.min()), float(values.max())
    out = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    out[: shape[0], : shape[1]] = (values - low) / max(high - low, 1e-8)
    return out


def _resampling(count: int, wanted: int) -> Field:
    """(wanted, count) weights that average pixels over areas, or interpolate them linearly if more are wanted."""
    if wanted > count:
        places = np.clip((np.arange(wanted) + 0.5) * count / wanted - 0.5, 0, count - 1)
        weights = np.maximum(1 - np.abs(places[:, None] - np.arange(count)), 0)
    else:
        edges, pixel = np.arange(wanted + 1) * count / wanted, np.arange(count)
        weights = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        weights = np.maximum(weights, 0) * wanted / count
    return np.asarray(weights, np.float32)


def _boxes(probability: LocalMap, encoded: SliceEncoding) -> dict[int, Box]:
    """Box around a soft mask on each slice on which it prompts a voxel."""
    start, inside = inside_scan(probability, encoded.grid.shape)
    if not inside.any():
        return {}
    view = encoded.view
    # Rows and columns of a slice run against the axes.
    corner = [encoded.grid.shape[axis] - start[axis] - inside.shape[axis] for axis in (view.down, view.along)]
    found = {}
    for offset, mask in enumerate(view.frames(inside)):
        if (box := _box(mask)) is not None:
            row, column, last_row, last_column = np.add(box, (*corner, *corner)).tolist()
            found[int(start[view.across]) + offset] = (row, column, last_row, last_column)
    return found


def _box(mask: NDArray[np.bool_]) -> Box | None:
    """Box around the pixels of a mask (rows, columns); None if it has none."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return (int(rows[0]), int(columns[0]), int(rows[-1]), int(columns[-1])) if len(rows) else None
