"""Masks as wrong as registration makes them, without registering anything: the atlas's labels, warped at random.

Each structure is moved by a smooth random field of its own: white noise under a Gaussian window, the same for each axis
of the world. Its size is told as a share of the structure's radius, that of a ball of the same volume. In this unit
the errors of real registrations are alike for structures as different as hippocampus (borders 0.7 mm off, 0.10 of a
radius), kidney (3.4 mm, 0.10), liver (6.6 mm, 0.09) and the right ventricle (4.7 mm, 0.15).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.geometry import Grid
from ..core.image import Volume
from ..core.mask import LocalMap, ball_radius_mm
from ..transforms.maps import DisplacementField
from ..transforms.resample import warp_labels

#: Nodes of the random field within one standard deviation of its window: between them it is linear.
_NODES = 2


#: The window ends at this many of its standard deviations.
_WINDOW_REACH = 3


#: Displacements that masks are given room for, in standard deviations: 1 component in 16 000 is larger.
_ROOM = 4.0


#: Nodes at most. A window too small for that, as of lesions scattered over a body, is made larger.
_MOST_NODES = 2_000_000


def simulated_mask(
    labels: Volume, box: tuple[slice, slice, slice], value: int, *, size: float, window: float, seed: Sequence[int]
) -> LocalMap:
    """The mask of one structure as a registration might bring it.

    Parameters
    ----------
    labels : Volume
        Label values of the atlas.
    box : tuple of slice, (3,)
        Holds all voxels of the structure.
    value : int
        Its label value; occurs in ``box``.
    size : float
        Standard deviation of the displacement along each axis, as a share of the structure's radius.
    window : float
        Standard deviation of the window that smooths it, as a share of the radius.
    seed : sequence of int
        Of the random numbers: the same gives the same mask, whatever was simulated before.

    Returns
    -------
    LocalMap
        In [0, 1], on the grid of ``labels``; what is moved beyond its border is cut off.
    """
    inside = labels.data[box] == value
    spacing_mm = labels.grid.spacing_mm
    volume_mm3 = np.count_nonzero(inside) * labels.grid.voxel_volume_mm3
    radius_mm = ball_radius_mm(volume_mm3)
    first, last = (np.array([getattr(side, end) for side in box]) for end in ("start", "stop"))
    margin = np.ceil(_ROOM * size * radius_mm / spacing_mm).astype(int) + 1
    start = np.maximum(first - margin, 0)
    onto = labels.grid.crop(start, np.minimum(last + margin, labels.grid.shape))
    field = random_field(onto, size * radius_mm, window * radius_mm, np.random.default_rng(list(seed)))
    alone = Volume(inside.astype(np.uint8), labels.grid.crop(first, last))
    warped = warp_labels(alone, (1,), onto, field)[1]
    if warped.is_empty:
        return warped
    i, j, k = (int(a + b) for a, b in zip(warped.start, start, strict=True))
    return LocalMap((i, j, k), warped.values)


def random_field(view: Grid, size_mm: float, window_mm: float, random: np.random.Generator) -> DisplacementField:
    """A smooth random displacement.

    Parameters
    ----------
    view : Grid
        Field of view to be covered.
    size_mm : float
        Standard deviation of each component, in mm; the mean is 0.
    window_mm : float
        Standard deviation of the Gaussian window over white noise, in mm: points d mm apart correlate by
        exp(-d² / (4 window²)).
    random : numpy.random.Generator
        Where the numbers come from.
    """
    extent_mm = np.array(view.shape) * view.spacing_mm
    node_mm = max(window_mm / _NODES, float(extent_mm.prod() / _MOST_NODES) ** (1 / 3))
    count = np.ceil(extent_mm / node_mm).astype(int) + 1
    affine = np.eye(4)
    affine[:3, :3] = view.affine[:3, :3] / view.spacing_mm * node_mm
    affine[:3, 3] = view.centre_mm - affine[:3, :3] @ ((count - 1) / 2)
    reach = _WINDOW_REACH * _NODES
    noise: NDArray[np.float32] = random.standard_normal((3, *(count + 2 * reach)), dtype=np.float32)
    along = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _NODES) ** 2)
    along /= np.linalg.norm(along)  # the noise keeps its variance
    for axis in (1, 2, 3):
        noise = ndimage.correlate1d(noise, along, axis=axis, mode="constant")
    inner = noise[:, reach:-reach, reach:-reach, reach:-reach] * np.float32(size_mm)
    return DisplacementField(Grid((int(count[0]), int(count[1]), int(count[2])), affine), inner)
