"""Smoothing fused masks, each structure as much as the simulated errors on the atlas say.

A model that goes by appearance draws ragged borders where a structure hardly stands out, and structures are smoother
than that: how smooth, the atlas shows. Fused masks are smoothed by a Gaussian window, its width a share of the
structure's radius. Which share is found on the atlas's own scan, where masks are simulated, answered, fused and
corrected (:mod:`atlassegfm.correction`), and the truth is known: sheets of cortex are left as they are.

Mean Dice, NSD at 2 mm and HD95 (mm) of the fused masks on kept registrations, without, with the share each structure
had best on the simulated masks, and with what is applied of it (see ``_APPLIED``): Hippocampus (12 pairs) 0.837, 0.839,
0.840; 0.980, 0.980, 0.981; 1.84, 1.83, 1.80. Cardiac (10) 0.829, 0.833, 0.833; 0.804, 0.809, 0.808; 10.6, 10.3, 10.3.
Abd-MR (10) 0.866, 0.868, 0.868; 0.742, 0.749, 0.747; 18.1, 17.2, 16.7. Abd-CT (six hard pairs) 0.746, 0.748, 0.749;
0.639, 0.637, 0.638; 27.8, 27.9, 27.9. One share of 0.06 or 0.08 for all structures came to the same on these four sets,
but takes 0.4 and 0.8 points off OASIS, where the chosen ones cost nothing. Log-odds smoothed instead of probabilities
gave the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.geometry import Grid
from ..core.mask import LocalMap, ball_radius_mm
from ..core.overlap import dice
from ..prompts import INSIDE
from .correction import strides_of

Field = NDArray[np.float32]


#: Standard deviations of the window that are tried, as shares of the radius of a ball as large as the structure. On
#: no set is 0.09 better than 0.06 for most structures, and from 0.12 on all lose.
_TRIED = (0.0, 0.03, 0.06)


#: What is applied where one of these was best: more, as real errors are larger than simulated ones.
_APPLIED = (0.0, 0.04, 0.08)


#: Standard deviation at most: of structures of more than 100 mm radius nothing was measured, and they take time.
_LARGEST_MM = 8.0


#: The window ends at this many standard deviations.
_REACH = 3.0


def smoothed(mask: LocalMap, width_mm: float, grid: Grid) -> LocalMap:
    """A mask under a Gaussian window.

    Parameters
    ----------
    mask : LocalMap
        In [0, 1], on ``grid``.
    width_mm : float
        Standard deviation along every axis; 0 leaves the mask as it is.
    grid : Grid
        Of the scan. Beyond its border, masks go on as they are at the border.

    Returns
    -------
    LocalMap
        float32 in [0, 1], on a box as much larger as the window reaches.
    """
    if width_mm <= 0 or not mask.values.size:
        return mask
    margin = np.ceil(_REACH * width_mm / grid.spacing_mm).astype(int)
    i, j, k = np.maximum(np.array(mask.start) - margin, 0).tolist()
    stop = np.minimum(np.array(mask.stop) + margin, grid.shape).tolist()
    return LocalMap((i, j, k), _under_window(mask.on_box((i, j, k), stop), width_mm, grid.spacing_mm))


def window_mm(share: float, mask: LocalMap, grid: Grid) -> float:
    """Standard deviation in mm of the window for one structure.

    Parameters
    ----------
    share : float
        Standard deviation as a share of the structure's radius; see :func:`best_share`.
    mask : LocalMap
        Shows how large the structure is, in [0, 1] on ``grid``; the radius is that of a ball as large.
    grid : Grid
        Of the scan.

    Returns
    -------
    float
        At most 8; 0 if nothing lies inside the mask.
    """
    volume_mm3 = np.count_nonzero(mask.values >= INSIDE) * grid.voxel_volume_mm3
    return min(share * ball_radius_mm(volume_mm3), _LARGEST_MM)


def best_share(trials: Iterable[tuple[LocalMap, LocalMap]], grid: Grid) -> float:
    """How much to smooth one structure: standard deviation of the window as a share of the structure's radius.

    Parameters
    ----------
    trials : iterable of (LocalMap, LocalMap)
        Masks in [0, 1] as they are without smoothing, each with the truth, 0 or 1.
    grid : Grid
        Of both.

    Returns
    -------
    float
        One of 0, 0.04 and 0.08; 0 where there are no trials, or smoothing does not improve the mean Dice.
    """
    scores = np.zeros(len(_TRIED))
    for mask, truth in trials:
        if not mask.values.size or truth.is_empty:
            continue
        start, stop = np.minimum(mask.start, truth.start), np.maximum(mask.stop, truth.stop)
        strides = strides_of((stop - start).tolist(), grid.spacing_mm)
        thinned = tuple(slice(None, None, stride) for stride in strides)
        values, true = (one.on_box(start.tolist(), stop.tolist())[thinned] for one in (mask, truth))
        for n, share in enumerate(_TRIED):
            width_mm = window_mm(share, truth, grid)
            found = _under_window(values, width_mm, grid.spacing_mm * strides) if width_mm else values
            scores[n] += dice(found >= INSIDE, true >= INSIDE)
    # The first of equal ones: no smoothing where it changes nothing.
    return _APPLIED[int(np.argmax(scores))]


def _under_window(values: Field, width_mm: float, spacing_mm: NDArray[np.float64]) -> Field:
    """Values in [0, 1]; beyond the box they go on as at its border."""
    under: Field = ndimage.gaussian_filter(values, width_mm / spacing_mm, mode="nearest", truncate=_REACH)
    return np.clip(under, 0, 1, out=under)  # rounding may leave it by a hair
