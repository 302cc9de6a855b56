"""How a scan lies against an atlas: mirrored or not, inverted or not, and which structures it shows whole.

The linear stages of the registration alone, twice: with the scan as it is, and with the scan mirrored left-right. A
body is not its mirror image, so that one of them fits better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..atlas import Atlas, canonical_scan
from ..core.image import Volume
from ..settings import RegistrationSettings
from ..transforms.maps import Affine

if TYPE_CHECKING:
    from ..registration.pyramid import Scan

#: A voxel counts as in both bodies from this product of the shares of foreground on.
_SHARED = 0.25
#: Percentiles that are taken for the ends of a scan's intensities; noise is beyond.
_ENDS = (1.0, 99.0)
#: Background is what is within this share of the range from its end: noise of air is below it.
_NEAR_END = 0.1
#: So much of a face of the field of view is air where it is beside the body, and so many faces are, of six.
_FACE_SHARE, _FACES = 0.6, 2
#: Less than this share of the scan's middle is like the air outside.
_MIDDLE_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class AtlasFit:
    """Linear fit of a scan to an atlas.

    Parameters
    ----------
    mirrored_gain : float
        Natural logarithm of the cost of the linear fit of the scan as it is over that of its mirror image: above 0
        where the mirror image fits better. 0.02 is about 2 %.
    correlation : float
        Of the intensities where both show body, in [-1, 1]; NaN where they share no body.
    outside : mapping of int to float
        Fraction of each structure of the atlas outside the scan's field of view, in [0, 1], by label value.
    """

    mirrored_gain: float
    correlation: float
    outside: Mapping[int, float]


def fit_to_atlas(
    scan: Volume, atlas: Atlas, settings: RegistrationSettings | None = None, *, name: str = "the scan"
) -> AtlasFit:
    """Fit a scan to an atlas, as it is and mirrored.

    Parameters
    ----------
    scan : Volume
        Intensities in any array order. Where :func:`is_inverted` says so, they are fitted turned round.
    atlas : Atlas
    settings : RegistrationSettings, optional
        Of the linear stages; defaults if left out.
    name : str
        What to call the scan in messages.

    Raises
    ------
    InputError
        If the scan cannot be used.
    RegistrationError
        If it shows nothing but background.
    """
    # PyTorch comes with them, and a scan alone is looked at without.
    from ..registration.affine import fit
    from ..registration.pyramid import level_spacings_mm, prepare
    from .coverage import outside_fractions

    settings = settings or RegistrationSettings()
    scan = canonical_scan(scan, name)
    inverted = is_inverted(scan)
    data = scan.data.max() - scan.data if inverted else scan.data
    spacings = level_spacings_mm(scan.grid, (settings.coarse_voxels, settings.fine_voxels))
    annotated = prepare(atlas.image, atlas.labels, spacings[-1], "atlas")
    # The same grid: what is at the patient's right comes to the left, as if the header said the opposite.
    sides = [
        prepare(Volume(one, scan.grid), None, spacings[-1], name) for one in (data, np.ascontiguousarray(data[::-1]))
    ]
    (as_it_is, cost), (mirrored, mirrored_cost) = (fit(side, annotated, spacings, settings, "cpu") for side in sides)
    gain = math.log(max(cost, 1e-9) / max(mirrored_cost, 1e-9))
    # The field of view is its own mirror image.
    better, side = (mirrored, sides[1]) if gain > 0 else (as_it_is, sides[0])
    correlation = _correlation(side, annotated, better, spacings[-1])
    return AtlasFit(
        gain,
        -correlation if inverted else correlation,
        dict(zip(atlas.values, outside_fractions(atlas, better, scan.grid), strict=True)),
    )


def is_inverted(scan: Volume) -> bool:
    """Whether what surrounds the body is the brightest there is: air, in an inverted scan.

    Parameters
    ----------
    scan : Volume
        Finite intensities. Crops without any air tell nothing, and are not called inverted.
    """
    data = scan.data
    sample = data.ravel()[:: max(1, data.size // 500_000)]
    low, high = (float(p) for p in np.percentile(sample, _ENDS))
    if high <= low:
        return False
    bright = high - _NEAR_END * (high - low)
    faces = [data.take(end, axis=axis) for axis in range(3) for end in (0, -1)]
    if sum(_share_above(face, bright) >= _FACE_SHARE for face in faces) < _FACES:
        return False
    middle = data[tuple(slice(n // 4, max(n - n // 4, n // 4 + 1)) for n in data.shape)]
    return _share_above(middle, bright) < _MIDDLE_SHARE


def _share_above(values: NDArray[Any], bound: float) -> float:
    return float(np.count_nonzero(values >= bound)) / values.size


def _correlation(query: Scan, atlas: Scan, query_to_atlas: Affine, spacing_mm: float) -> float:
    """Pearson's, of intensities where both scans show body."""
    from ..registration.pyramid import axes_of, frame_grid, on_grid

    grid = frame_grid(query.intensity.grid, axes_of(query.intensity.grid), spacing_mm)
    one, other = on_grid(query, grid, "cpu"), on_grid(atlas, grid, "cpu", query_to_atlas)
    shared = (one.weight * other.weight >= _SHARED)[0, 0].numpy()
    first, second = one.image[0, 0].numpy()[shared], other.image[0, 0].numpy()[shared]
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])
