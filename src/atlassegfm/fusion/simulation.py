"""Simulated registration errors: each label of the atlas, warped by a smooth random field of its own.

The field is white noise smoothed by a Gaussian. Its size is a fraction of the structure's radius (of a ball of the same
volume): in this unit the errors of real registrations are similar for structures as different as hippocampus and liver.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.compiled import in_slabs
from ..core.geometry import Grid
from ..core.image import Volume
from ..core.mask import LocalMap, ball_radius_mm
from ..transforms.maps import DisplacementField

#: Nodes of the random field in one sigma; it is linear between them.
_NODES_PER_SIGMA = 2
#: The Gaussian is cut off at this many sigmas.
_TRUNCATE = 3
#: Margin around a structure in standard deviations of the displacement: 1 component in 16 000 is larger.
_MARGIN = 4.0
#: Smaller values of a mask are set to 0, as those of warped labels.
_FLOOR = 0.01
#: Upper limit of nodes. A sigma too small for it, as of lesions scattered over a body, is enlarged.
_MAX_NODES = 2_000_000


def simulate_mask(
    labels: Volume, box: tuple[slice, slice, slice], value: int, *, size: float, sigma: float, seed: Sequence[int]
) -> LocalMap:
    """Simulate the mask of one structure as a registration might warp it: in [0, 1], cut off at the grid's border.

    ``box`` holds all voxels of ``labels`` with the ``value``. ``size`` is the standard deviation of the displacement
    along each axis, ``sigma`` that of the Gaussian that smooths it, both as fractions of the structure's radius.
    """
    from ..core import kernels

    inside = labels.data[box] == value
    spacing_mm = labels.grid.spacing_mm
    radius_mm = ball_radius_mm(np.count_nonzero(inside) * labels.grid.voxel_volume_mm3)
    first, last = (np.array([getattr(side, end) for side in box]) for end in ("start", "stop"))
    margin = np.ceil(_MARGIN * size * radius_mm / spacing_mm).astype(int) + 1
    start = np.maximum(first - margin, 0)
    onto = labels.grid.crop(start, np.minimum(last + margin, labels.grid.shape))
    field = random_field(onto, size * radius_mm, sigma * radius_mm, np.random.default_rng(list(seed)))
    # Both grids have the same axes: the places of voxels among the nodes are known axis by axis.
    to_node, tables = field.grid.inverse_affine @ onto.affine, []
    for axis, count in enumerate(onto.shape):
        place = np.clip(np.arange(count) * to_node[axis, axis] + to_node[axis, 3], 0, field.grid.shape[axis] - 1)
        low = place.astype(np.int64)
        high = np.minimum(low + 1, field.grid.shape[axis] - 1)
        own = np.arange(count) + (start - first)[axis] + 1  # of the mask with a border of one voxel
        tables.append((low, high, (place - low).astype(np.float32), own.astype(np.float32)))
    to_voxel = labels.grid.inverse_affine[:3, :3].astype(np.float32)
    displacement = np.einsum("ab,bijk->aijk", to_voxel, field.displacement_mm)
    values = np.empty(onto.shape, np.float32)
    mask = np.pad(inside.view(np.uint8), 1)
    in_slabs(lambda *part: kernels.displace_mask(mask, displacement, tuple(tables), values, *part), len(values))
    values[values < _FLOOR] = 0
    warped = LocalMap.from_full(values)
    return warped if warped.is_empty else LocalMap(tuple((warped.start + start).tolist()), warped.values)


def random_field(view: Grid, size_mm: float, sigma_mm: float, random: np.random.Generator) -> DisplacementField:
    """Draw a smooth random displacement of mean 0 over a field of view.

    ``size_mm`` is the standard deviation of each component, ``sigma_mm`` that of the Gaussian that smooths white noise:
    points d mm apart correlate by exp(-d² / (4 sigma²)).
    """
    extent_mm = np.array(view.shape) * view.spacing_mm
    node_mm = max(sigma_mm / _NODES_PER_SIGMA, float(extent_mm.prod() / _MAX_NODES) ** (1 / 3))
    count = np.ceil(extent_mm / node_mm).astype(int) + 1
    affine = np.eye(4)
    affine[:3, :3] = view.affine[:3, :3] / view.spacing_mm * node_mm
    affine[:3, 3] = view.centre_mm - affine[:3, :3] @ ((count - 1) / 2)
    reach = _TRUNCATE * _NODES_PER_SIGMA
    noise: NDArray[np.float32] = random.standard_normal((3, *(count + 2 * reach)), dtype=np.float32)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _NODES_PER_SIGMA) ** 2)
    kernel /= np.linalg.norm(kernel)  # keeps the variance of the noise
    for axis in (1, 2, 3):
        noise = ndimage.correlate1d(noise, kernel, axis=axis, mode="constant")
    inner = noise[:, reach:-reach, reach:-reach, reach:-reach] * np.float32(size_mm)
    return DisplacementField(Grid(tuple(count), affine), inner)
