"""Candidate places of one structure of the atlas in the query: all translations within reach at once, by FFT.

A structure is matched together with the tissue around it. Several translations are returned: at this resolution an
organ of another size, turned a little, often matches something else too; :mod:`.structure_affine` decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..core.mask import LocalMap
from .features import mind_ssc
from .pyramid import Level

#: Standard deviation of the prior on a translation, as a fraction of the field of view's size (its volume's cube root).
PRIOR_FRACTION = 0.1
#: Standard deviations of the prior within which translations are searched.
_REACH = 2.0
#: Tissue around a structure that is matched with it, as a fraction of the field of view's size.
_SURROUNDINGS_FRACTION = 0.03
#: Weights of correlation, squared intensity difference and prior beside the MIND-SSC difference (1).
CORRELATION_WEIGHT, INTENSITY_WEIGHT, PRIOR_WEIGHT = 2.0, 5.0, 0.2
#: Penalty of the part of a structure that a translation takes out of the field of view.
OUTSIDE_PENALTY = 1.0
#: Added to products of variances, against division by zero where all is of one brightness.
VARIANCE_FLOOR = 1e-5
#: Voxels on each side within which a minimum must be the lowest.
_NEIGHBOURHOOD = 2


@dataclass(frozen=True, eq=False)
class Patch:
    """A structure of the atlas with the tissue around it, on a box of the grid.

    ``weight``, (A, B, C), is 1 in the structure, falling to 0 with the distance from it, and 0 outside the atlas's
    field of view.
    """

    box: tuple[slice, ...]
    weight: Tensor


class TranslationSearch:
    """Match patches of the atlas in the query, on one grid, at all translations within reach.

    ``size_mm`` is the cube root of the field of view's volume.
    """

    def __init__(self, query: Level, atlas: Level, spacing_mm: float, size_mm: float) -> None:
        self._spacing_mm = spacing_mm
        self._surroundings_mm = max(_SURROUNDINGS_FRACTION * size_mm, spacing_mm)
        sigma = PRIOR_FRACTION * size_mm / spacing_mm
        self._reach = max(1, int(np.ceil(_REACH * sigma)))
        steps = (torch.arange(-self._reach, self._reach + 1, device=query.image.device) / sigma) ** 2
        self._prior = 0.5 * (steps[:, None, None] + steps[None, :, None] + steps[None, None, :])
        # What lies outside the query is zero in every channel, and counted by the last one.
        channels = (query.image, query.image**2, torch.ones_like(query.image), mind_ssc(query.image))
        self._query = F.pad(torch.cat(channels, dim=1), [self._reach] * 6)[0]
        self._query_mind_norm = self._query[3:].pow(2).sum(dim=0)
        self._atlas_image, self._atlas_inside = atlas.image[0, 0], atlas.inside[0, 0]
        self._atlas_mind = mind_ssc(atlas.image)[0]

    def patch(self, mask: LocalMap) -> Patch | None:
        """Cut out the patch of a structure; None if it is outside the atlas's field of view."""
        margin = int(np.ceil(self._surroundings_mm / self._spacing_mm))
        start = [max(0, first - margin) for first in mask.start]
        stop = [min(n, last + margin) for last, n in zip(mask.stop, self._atlas_image.shape, strict=True)]
        distance_mm = ndimage.distance_transform_edt(mask.on_box(start, stop) < 0.5) * self._spacing_mm
        closeness = np.clip(1 - distance_mm / self._surroundings_mm, 0, 1).astype(np.float32)
        box = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
        weight = torch.from_numpy(closeness).to(self._atlas_image.device) * self._atlas_inside[box]
        return Patch(box, weight) if float(weight.sum()) > 0 else None

    def candidates(self, patch: Patch, count: int, *, brightness: bool = True) -> Tensor:
        """Find the ``count`` best translations from warped atlas to query, (n, 3) voxels: lowest minima, best first.

        Without ``brightness``, by MIND-SSC alone.
        """
        cost = self._costs(patch, brightness=brightness)
        lowest = -F.max_pool3d(-cost[None, None], 2 * _NEIGHBOURHOOD + 1, stride=1, padding=_NEIGHBOURHOOD)[0, 0]
        places = torch.nonzero(cost == lowest)
        order = torch.argsort(cost[places.unbind(dim=1)], stable=True)[:count]
        return (places[order] - self._reach).float()

    def _costs(self, patch: Patch, *, brightness: bool) -> Tensor:
        """Cost of every translation within reach, (2 reach + 1) cubed."""
        weight = patch.weight / patch.weight.sum()
        image, mind = self._atlas_image[patch.box], self._atlas_mind[:, *patch.box]
        window = tuple(slice(part.start, part.stop + 2 * self._reach) for part in patch.box)
        query, around = self._query[:, *window], 2 * self._reach + 1
        size = tuple(query.shape[1:])

        def spectrum(values: Tensor) -> Tensor:
            return cast("Tensor", torch.fft.rfftn(values, s=size))

        def at_shifts(product: Tensor) -> Tensor:
            return cast("Tensor", torch.fft.irfftn(product, s=size)[:around, :around, :around])

        kernel, scene = spectrum(weight).conj(), torch.fft.rfftn(query, s=size, dim=(1, 2, 3))
        mean, square, seen = (at_shifts(kernel * scene[channel]) for channel in range(3))
        cross = kernel * spectrum(self._query_mind_norm[window])
        for channel in range(len(mind)):
            cross = cross - 2 * spectrum(weight * mind[channel]).conj() * scene[3 + channel]
        cost = at_shifts(cross) + (weight * mind.pow(2).sum(dim=0)).sum()
        cost = cost + OUTSIDE_PENALTY * (1 - seen) + PRIOR_WEIGHT * self._prior
        if not brightness:
            return cost
        product = at_shifts(spectrum(weight * image).conj() * scene[0])
        own_mean, own_square = (weight * image).sum(), (weight * image**2).sum()
        variance = (square - mean**2).clamp_min(0) * (own_square - own_mean**2).clamp_min(0)
        correlation = (product - mean * own_mean) / torch.sqrt(variance + VARIANCE_FLOOR)
        squared_difference = square - 2 * product + own_square
        return cost + CORRELATION_WEIGHT * (1 - correlation) + INTENSITY_WEIGHT * squared_difference
