"""Linear fit of a scan to an atlas: resemblance, mirrored sides, inverted contrast and structures in view.

The linear stages are run on the scan and on its mirror image: bodies are not symmetric, so that one fits better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..atlas import Atlas, canonical_scan
from ..core.geometry import Grid
from ..core.image import Volume
from ..settings import RegistrationSettings
from ..transforms.maps import Affine

if TYPE_CHECKING:
    from ..registration.pyramid import Scan

#: Least product of the foreground fractions of a voxel in both scans to count as body of both, and surely so.
_BOTH_BODIES, _SURELY_BOTH = 0.25, 0.7
#: Percentiles taken for the ends of a scan's intensities; noise is beyond.
_ENDS = (1.0, 99.0)
#: Background is within this fraction of the intensity range from its end.
_NEAR_END = 0.1
#: Fraction of a face of the field of view that is air where it is beside the body, and how many of six faces are.
_FACE_AIR, _FACES = 0.6, 2
#: Fraction of the scan's middle that air stays below.
_MIDDLE_AIR = 0.5
#: Resemblance is the confidence of the fit plus this times the size of the correlation; scans of other parts of the
#: body stay below the bound, and below a higher one where the bodies have so little of the field of view in common that
#: the search finds a place for anything.
_CORRELATION_WEIGHT, _LITTLE_SHARED = 0.3, 0.05
_LEAST_RESEMBLANCE, _LEAST_WHERE_LITTLE_IS_SHARED = 0.28, 0.5
#: Voxels over the atlas's field of view at most: a small crop has fine levels, on which a whole body takes minutes.
_MOST_VOXELS = 600_000
#: Largest fraction of the cost of misplaced scans up to which both mirror images fit well.
_SYMMETRIC = 0.5
#: Gain, a fraction of the cost of misplaced scans, above which the mirror image fits better, and that for nearly
#: symmetric anatomy, where the gain of a right scan may be above 0.
_MIRRORED_GAIN, _SYMMETRIC_GAIN = 0.006, 0.02
#: Gain of a rough fit of the mirror image below minus which it is not fitted in full.
_CLEARLY_BEHIND = 0.025
#: Distance of both distributions of intensities less this times their correlation; larger ones are of two modalities.
_MODALITY_CORRELATION_WEIGHT, _MODALITY_BOUND = 0.3, -0.005


@dataclass(frozen=True)
class Sides:
    """Fit of a scan's mirror image against that of the scan itself."""

    gain: float  # cost of the scan less that of its mirror image, 1 for scans that are nothing like each other
    symmetric: bool  # whether both fit so well that little tells them apart

    @classmethod
    def of(cls, cost: float, mirrored_cost: float) -> Sides:
        """Compare the costs of both linear fits."""
        from ..registration.affine import MISMATCH_PENALTY

        misplaced = 2 * MISMATCH_PENALTY  # cost of both scans
        return cls((cost - mirrored_cost) / misplaced, max(cost, mirrored_cost) < _SYMMETRIC * misplaced)

    @property
    def _least(self) -> float:
        return _SYMMETRIC_GAIN if self.symmetric else _MIRRORED_GAIN

    @property
    def swapped(self) -> bool:
        """Whether left and right of the scan, or of the atlas, seem to be swapped."""
        return self.gain > self._least

    @property
    def undecided(self) -> bool:
        """Whether neither image fits better by enough to tell left from right."""
        return not self.swapped and self.gain > -self._least


@dataclass(frozen=True, eq=False)
class AtlasFit:
    """Linear fit of a scan to an atlas."""

    confidence: float  # of the better fit of scan and mirror image, in [0, 1]
    shared: float  # fraction of the field of view that is body in both
    sides: Sides
    correlation: float  # of intensities where both show body, in [-1, 1]; NaN where no body overlaps
    histogram_distance: float  # of intensities where both surely show body, in [0, 1]; NaN where they do not
    outside: Mapping[int, float]  # fraction of each structure out of the field of view, in [0, 1], by label value

    @property
    def resemblance(self) -> float:
        """Similarity of scan and atlas after the fit; the correlation's sign is that of the contrast."""
        return self.confidence + _CORRELATION_WEIGHT * (0 if math.isnan(self.correlation) else abs(self.correlation))

    @property
    def least_resemblance(self) -> float:
        """Bound below which the scan seems to show another part of the body."""
        return _LEAST_RESEMBLANCE if self.shared >= _LITTLE_SHARED else _LEAST_WHERE_LITTLE_IS_SHARED

    @property
    def resembles(self) -> bool:
        """Whether the scan seems to show the same part of the body."""
        return self.resemblance >= self.least_resemblance

    @property
    def other_modality(self) -> bool:
        """Whether the intensities seem to be those of another modality or sequence."""
        return self.histogram_distance - _MODALITY_CORRELATION_WEIGHT * self.correlation > _MODALITY_BOUND  # not if NaN


def fit_to_atlas(
    scan: Volume, atlas: Atlas, settings: RegistrationSettings | None = None, *, name: str = "the scan"
) -> AtlasFit:
    """Fit a scan to an atlas, as it is and mirrored.

    The scan may be in any array order; its intensities are inverted first where :func:`is_inverted`. ``settings`` are
    those of the linear stages, defaults if left out; ``name`` is the scan's in messages. An :class:`.InputError` if the
    scan cannot be used, a :class:`.RegistrationError` if it shows nothing but background.
    """
    # Late: is_inverted() needs no PyTorch.
    from ..registration.affine import fit
    from ..registration.dissimilarity import measure
    from ..registration.pyramid import level_spacings_mm, prepare
    from .coverage import outside_fractions

    settings = settings or RegistrationSettings()
    scan = canonical_scan(scan, name)
    inverted = is_inverted(scan)
    data = scan.data.max() - scan.data if inverted else scan.data
    finest = (float(np.prod(atlas.image.grid.shape)) * atlas.image.grid.voxel_volume_mm3 / _MOST_VOXELS) ** (1 / 3)
    spacings = level_spacings_mm(scan.grid, (settings.coarse_voxels, settings.fine_voxels))
    spacings = tuple(max(spacing, finest) for spacing in spacings)
    annotated = prepare(atlas.image, atlas.labels, spacings[-1], "atlas")
    shown = Volume(data, scan.grid)
    images = [prepare(one, None, spacings[-1], name) for one in (shown, _mirrored(shown))]
    (straight, cost), (mirrored, mirrored_cost) = (fit(one, annotated, spacings, settings, "cpu") for one in images)
    sides = Sides.of(cost, mirrored_cost)
    better, side = (mirrored, images[1]) if sides.gain > 0 else (straight, images[0])
    correlation, distance = _compare_intensities(side, annotated, better, spacings[-1])
    outside = dict(zip(atlas.values, outside_fractions(atlas, better, scan.grid), strict=True))
    found = measure(side, annotated, better, spacings[-1])
    correlation = -correlation if inverted else correlation
    return AtlasFit(found.confidence, float(found.weight.mean()), sides, correlation, distance, outside)


def compare_sides(
    scan: Volume, atlas: Atlas, linear: Affine, cost: float, settings: RegistrationSettings, device: str = "cpu"
) -> Sides:
    """Fit the mirror image of a scan in RAS-canonical order, against ``linear``, the scan's own fit, and its ``cost``.

    On the coarse level, from the reflected own fit, most mirror images are so far behind that this decides.
    """
    from ..registration.affine import fit, refined_cost
    from ..registration.pyramid import level_spacings_mm, prepare

    spacings = level_spacings_mm(scan.grid, (settings.coarse_voxels, settings.fine_voxels))
    annotated = prepare(atlas.image, atlas.labels, spacings[-1], "atlas")
    own, mirrored = (prepare(one, None, spacings[-1], "query") for one in (scan, _mirrored(scan)))
    own_cost = refined_cost(own, annotated, linear, spacings[0], 1, device)
    begin, steps = _reflected(linear, scan.grid, own), settings.linear_iterations
    rough = Sides.of(own_cost, refined_cost(mirrored, annotated, begin, spacings[0], steps, device))
    if rough.gain < -_CLEARLY_BEHIND:
        return rough
    return Sides.of(cost, fit(mirrored, annotated, spacings, settings, device)[1])


def _reflected(linear: Affine, grid: Grid, scan: Scan) -> Affine:
    """Guess the linear map of a scan's mirror image on its own grid: its body is symmetric, and so is the atlas's."""
    across = grid.affine[:3, 0] / grid.spacing_mm[0]
    reflection = np.eye(3) - 2 * np.outer(across, across)
    foreground = scan.foreground
    centre_mm = foreground.grid.voxel_to_world(np.argwhere(foreground.data > 0).mean(axis=0))
    mirrored_mm = grid.centre_mm + reflection @ (centre_mm - grid.centre_mm)
    matrix = np.eye(4)
    matrix[:3, :3] = reflection @ linear.matrix[:3, :3] @ reflection
    matrix[:3, 3] = linear.map(centre_mm) - matrix[:3, :3] @ mirrored_mm
    return Affine(matrix)


def _mirrored(scan: Volume) -> Volume:
    """Mirror a scan on its own grid, as if the header had the sides swapped."""
    return Volume(np.ascontiguousarray(scan.data[::-1]), scan.grid)


def is_inverted(scan: Volume) -> bool:
    """Decide whether the surroundings of the body, air, are brightest (of finite values); never without air."""
    data = scan.data
    low, high = np.percentile(data.ravel()[:: max(1, data.size // 500_000)], _ENDS)
    if high <= low:
        return False
    bright = float(high) - _NEAR_END * (float(high) - float(low))
    faces = [data.take(end, axis=axis) for axis in range(3) for end in (0, -1)]
    if sum(np.mean(face >= bright) >= _FACE_AIR for face in faces) < _FACES:
        return False
    middle = data[tuple(slice(n // 4, max(n - n // 4, n // 4 + 1)) for n in data.shape)]
    return bool(np.mean(middle >= bright) < _MIDDLE_AIR)


def _compare_intensities(query: Scan, atlas: Scan, query_to_atlas: Affine, spacing_mm: float) -> tuple[float, float]:
    """Pearson correlation of intensities where both scans show body, and distance of quantiles; NaN if undefined."""
    from ..registration.pyramid import frame_grid, on_grid

    grid = frame_grid(query.intensity.grid, spacing_mm)
    one, other = on_grid(query, grid, "cpu"), on_grid(atlas, grid, "cpu", query_to_atlas)
    both = (one.weight * other.weight).numpy()
    first, second = (scan.image.numpy()[both >= _BOTH_BODIES] for scan in (one, other))
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return math.nan, math.nan
    correlation, surely = float(np.corrcoef(first, second)[0, 1]), both >= _SURELY_BOTH
    if not surely.any():
        return correlation, math.nan
    quantiles = [np.quantile(scan.image.numpy()[surely], np.linspace(0.02, 0.98, 49)) for scan in (one, other)]
    return correlation, float(np.abs(quantiles[0] - quantiles[1]).mean())
