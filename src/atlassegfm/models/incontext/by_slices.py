"""Baselines that know slices alone: each slice of the query, from slices of the atlas.

Slices are those across which the query is coarsest, in both scans. A slice of the query is segmented from the slices
of the atlas nearest to it in relative position (0 at the first, 1 at the last slice of the field of view), among those
on which the atlas shows any structure; a structure that none of them shows is not looked for. Nothing else aligns the
scans. A whole slice is stretched to the network's size, its intensities to [0, 1] by those of the whole scan; the
probabilities are stretched back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...atlas import Atlas
from ...core.image import Volume
from ...core.mask import LocalMap
from ..base import intensities
from ..slices import choose_view, is_hounsfield

#: Intensities are cut at these percentiles of voxels that are not 0, or at these Hounsfield units: after the UniverSeg
#: paper's account of its training scans, which was not checked against code.
_PERCENTILES, _HOUNSFIELD = (0.5, 99.5), (-500.0, 1000.0)


class SliceNetwork(Protocol):
    """Network for one slice at a time, square."""

    def __call__(self, image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """Give the probability in [0, 1] at each pixel, (N, N).

        ``image`` is (N, N) in [0, 1], the support S slices with their masks of 0 and 1, (S, N, N).
        """


@dataclass(frozen=True, eq=False)
class SliceBaseline:
    """Baseline of :class:`.InContextModel` made of a network for slices of ``size`` pixels.

    ``support`` is the number of the atlas's slices for each of the query; ``resampling`` how images are stretched.
    """

    network: SliceNetwork
    size: int
    support: int
    parameters: int
    device: torch.device
    resampling: Literal["bilinear", "bicubic"] = "bilinear"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def predict(
        self, atlas: Atlas, query: Volume, on_stage: Callable[[str], None] | None = None
    ) -> dict[int, LocalMap]:
        """Predict slice by slice; see :class:`.InContextModel`."""
        view = choose_view(query.grid, "auto")
        support = torch.from_numpy(to_unit_range(view.frames(intensities(atlas.image))))
        frames = torch.from_numpy(to_unit_range(view.frames(intensities(query))))
        numbers = torch.from_numpy(view.frames(atlas.numbered.data).astype(np.int64))
        chosen = nearest_slices(np.asarray(numbers.flatten(1).any(1)), len(frames), self.support)
        used = {int(k) for k in np.unique(chosen)}
        pictures = {k: self._stretched(support[k]) for k in used}
        # As the published code takes labels: the nearest pixel.
        square = (self.size, self.size)
        masks = {
            k: functional.interpolate(numbers[k][None, None].float(), square, mode="nearest-exact")[0, 0] for k in used
        }
        found = {n: np.zeros(frames.shape, np.float32) for n in range(1, len(atlas.structures) + 1)}
        with torch.inference_mode():
            for z, (frame, nearest) in enumerate(zip(frames, chosen.tolist(), strict=True)):
                if on_stage is not None:
                    on_stage(f"in context: slice {z + 1} of {len(frames)}")
                image = self._stretched(frame).to(self.device)
                images = torch.stack([pictures[k] for k in nearest]).to(self.device)
                shown = torch.stack([masks[k] for k in nearest]).to(self.device)
                for n in sorted({int(one) for one in shown.unique()} - {0}):
                    answer = self.network(image, images, (shown == n).float())
                    found[n][z] = _resized(answer.float(), frame.shape, "bilinear").clip(0, 1).cpu().numpy()
        return {n: LocalMap.from_full(view.volume(values)) for n, values in found.items()}

    def _stretched(self, frame: Tensor) -> Tensor:
        return _resized(frame, (self.size, self.size), self.resampling).clip(0, 1)


def nearest_slices(shown: NDArray[np.bool_], count: int, support: int) -> NDArray[np.int64]:
    """Choose slices of the atlas for each of ``count`` slices of a query: (count, S) indices, ascending.

    ``shown`` says which slices of the atlas are taken; S is ``support``, or their number if they are fewer. Positions
    are those of the middles of slices in the field of view; of two as near, the lower slice is taken.
    """
    labelled = np.flatnonzero(shown)
    places, asked = (labelled + 0.5) / len(shown), (np.arange(count) + 0.5) / count
    order = np.argsort(np.abs(asked[:, None] - places), axis=1, kind="stable")[:, :support]
    return np.sort(labelled[order], axis=1)


def to_unit_range(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map the intensities of a scan to [0, 1], cut at both ends."""
    if is_hounsfield(frames):
        low, high = _HOUNSFIELD
    else:
        low, high = np.percentile(frames[frames != 0], _PERCENTILES)
        if low == high:
            low, high = float(frames.min()), float(frames.max())
    return np.ascontiguousarray(np.clip((frames - low) / (high - low), 0, 1), np.float32)


def _resized(frame: Tensor, shape: tuple[int, ...], mode: str) -> Tensor:
    return functional.interpolate(frame[None, None], shape, mode=mode, align_corners=False, antialias=True)[0, 0]
