"""Where each labelled structure went, and how it lies there: one structure at a time.

Between two people organs lie centimetres apart relative to each other (kidneys up to 13 cm along the body in the
shared abdomens), are turned and of other size. A smooth deformable fit started from the affine cannot cross that
distance. The atlas says which voxels belong together: each structure, with the tissue right around it, is matched
at every translation within reach (:mod:`.shifts`); from the best places a linear map of its own is fitted; the one
that matches best in the end is kept; and the maps, blended to one smooth field, start the deformable fit.

Of 120 organs of Abd-CT (30 pairs, four organs), a Dice below 0.3 has a third before, a sixth by the best shift alone,
and one in fifteen by the best map. Mean Dice of the organs, each by itself: 0.42, 0.56 and 0.67; of Abd-MR 0.62, 0.69
and 0.75. The best of all candidates would have 0.70 in Abd-CT.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..core.image import Volume
from ..core.mask import LocalMap
from ..transforms.maps import Affine, DisplacementField
from ..transforms.resample import warp_labels
from .affine import affine_maps
from .features import mind_ssc
from .pyramid import Level, Scan, axes_of, frame_grid, on_grid
from .structure_search import (
    CORRELATION_WEIGHT,
    INTENSITY_WEIGHT,
    OUTSIDE_PRICE,
    PRIOR_SHARE,
    PRIOR_WEIGHT,
    VARIANCE_FLOOR,
    Patch,
    ShiftSearch,
)

#: Shifts from which a linear map is fitted, besides none. Of eight right kidneys of Abd-CT that the best shift lost,
#: seven had their place as the second or third.
_CANDIDATES = 8


#: Voxels of a patch that are compared, drawn at random from larger ones.
_MOST_POINTS = 4000


#: Adam's steps, and their sizes: in voxels for the shift, and in radians or logarithms of a stretch.
_ITERATIONS = 60


_SHIFT_STEP, _SHAPE_STEP = 0.15, 0.02


#: Price of a squared rotation (radians), stretch and shear (logarithms). Dice of the warped atlas after all stages at
#: half of these, at these and at 1.75 times: 0.770, 0.769 and 0.757 (15 pairs of Abd-CT); right after the search 0.671,
#: 0.668 and 0.657 there, 0.775, 0.784 and 0.792 on 17 pairs of Hippocampus.
_ROTATION_PRICE, _STRETCH_PRICE, _SHEAR_PRICE = 0.8, 0.4, 0.8


#: Structures that match worse count less in the blending: by this factor in the exponent of the cost. Dice right after
#: the search, 30 pairs of Abd-CT, at half the prices above: 0.653 without (0), 0.660 (1), 0.657 (2).
_DISTRUST = 1.0


#: Width of the blending between structures, as a share of the field of view's size; then what is still amiss within
#: the structures is made up for by narrower and narrower ones: 0.660 and 0.671 without and with these four.
_BLENDING_SHARE = 0.08


_CORRECTION_SHARES = (0.08, 0.056, 0.04, 0.028)


#: Where no structure is near, the maps fade to none: weight of that against the strongest structure.
_FADING, _CORRECTION_FADING = 0.02, 0.05


#: Only the largest structures are searched for: the smallest of a hundred say little about where they are.
_MOST_STRUCTURES = 32


#: A structure of fewer voxels on the level's grid is not searched for.
_FEWEST_VOXELS = 8


@dataclass(frozen=True, eq=False)
class _Pose:
    """Where one structure is believed to be.

    Parameters
    ----------
    to_query : array, (4, 4)
        From the linearly warped atlas to the query, in voxels of the common grid.
    mask : array, (I, J, K) float32
        Share of the structure, at its new place.
    cost : float
        How badly it matches there.
    """

    to_query: NDArray[np.float64]
    mask: NDArray[np.float32]
    cost: float


def search(
    fixed: Scan,
    moving: Scan,
    labels: Volume,
    linear: Affine,
    spacing_mm: float,
    device: str,
    *,
    brightness: bool = True,
) -> DisplacementField | None:
    """Find every structure and blend their maps to one smooth field.

    Parameters
    ----------
    fixed, moving : Scan
        Query and atlas.
    labels : Volume
        Labels of the atlas.
    linear : Affine
        Fixed to moving world.
    spacing_mm : float
        Of the grid to work on.
    brightness : bool
        Whether brightness is compared, and not MIND-SSC alone. It tells organs apart that are alike in form, and leads
        astray where a spleen is bright in one scan and dark in the other.

    Returns
    -------
    DisplacementField or None
        In the fixed world, to be applied before ``linear``; None where no structure is in view.
    """
    grid = frame_grid(fixed.intensity.grid, axes_of(fixed.intensity.grid), spacing_mm)
    query = on_grid(fixed, grid, device)
    atlas = on_grid(moving, grid, device, linear)
    size_mm = float(np.prod(np.array(grid.shape) * spacing_mm)) ** (1 / 3)
    values = [int(value) for value in np.unique(labels.data) if value]
    # What the linear map puts outside the query's grid is not searched for.
    maps = {value: mask for value, mask in warp_labels(labels, values, grid, linear).items() if not mask.is_empty}
    large = sorted(maps, key=lambda value: -float(maps[value].values.sum()))[:_MOST_STRUCTURES]
    fit = _PoseFit(query, atlas, spacing_mm, size_mm, brightness=brightness)
    found = (fit.pose(maps[value]) for value in sorted(large) if (maps[value].values >= 0.5).sum() >= _FEWEST_VOXELS)
    poses = [pose for pose in found if pose is not None]
    if not poses:
        return None
    along_axes = _blended(poses, size_mm / spacing_mm)
    world = np.einsum("wa,aijk->wijk", grid.affine[:3, :3], along_axes)
    return DisplacementField(grid, world.astype(np.float32))


@dataclass(frozen=True, eq=False)
class _Sample:
    """The voxels of a structure and its surroundings that are compared.

    Parameters
    ----------
    points : Tensor, (N, 3) float32
        Voxels of the warped atlas.
    weight : Tensor, (N,)
        Of each, 1 in sum.
    image, mind : Tensor, (N,) and (12, N)
        The warped atlas there.
    centre : Tensor, (3,)
        What is turned and stretched is turned and stretched about it.
    """

    points: Tensor
    weight: Tensor
    image: Tensor
    mind: Tensor
    centre: Tensor


class _PoseFit:
    """Fits linear maps of single structures, from several places at once.

    Parameters
    ----------
    query, atlas : Level
        On the same grid.
    spacing_mm : float
        Of that grid.
    size_mm : float
        Of the field of view: its volume's cube root.
    brightness : bool
        Whether brightness is compared, too.
    """

    def __init__(self, query: Level, atlas: Level, spacing_mm: float, size_mm: float, *, brightness: bool) -> None:
        self._brightness = brightness
        self._places = ShiftSearch(query, atlas, spacing_mm, size_mm)
        # What lies outside the query is zero in every channel, and counted by the second one.
        self._query = torch.cat((query.image, torch.ones_like(query.image), mind_ssc(query.image)), dim=1)
        self._atlas_image, self._atlas_mind = atlas.image[0, 0], mind_ssc(atlas.image)[0]
        self._prior_voxels = PRIOR_SHARE * size_mm / spacing_mm

    def pose(self, mask: LocalMap) -> _Pose | None:
        """Where a structure of the warped atlas is: the map that matches best of those fitted.

        None if the atlas has not been imaged there, the best map takes the structure out of view, or by MIND-SSC alone
        the structure is better off where it is than at the best shift, or as the best map has it: then brightness led
        the search astray, as it does for a spleen that is dark in one scan and bright in the other. Mean Dice of 120
        organs of Abd-MR, each by itself: 0.75, and 0.72 if only the maps are asked; of Abd-CT 0.674 and 0.678.
        """
        patch = self._places.patch(mask)
        if patch is None:
            return None
        sample = self._sample(patch)
        found = self._best(sample, self._places.candidates(patch, _CANDIDATES, brightness=self._brightness))
        if found is None:
            return None
        to_query, cost = found
        back = np.linalg.inv(to_query)
        shape = (self._query.shape[2], self._query.shape[3], self._query.shape[4])
        moved = ndimage.affine_transform(mask.on_box((0, 0, 0), shape), back[:3, :3], back[:3, 3], order=1)
        return _Pose(to_query, moved.astype(np.float32), cost) if moved.any() else None

    def _sample(self, patch: Patch) -> _Sample:
        """Of all voxels with a weight, or of as many as are enough."""
        device = patch.weight.device
        inside = torch.nonzero(patch.weight > 0)
        if len(inside) > _MOST_POINTS:
            drawn = np.sort(np.random.default_rng(0).choice(len(inside), _MOST_POINTS, replace=False))
            inside = inside[torch.from_numpy(drawn).to(device)]
        weight = patch.weight[inside.unbind(dim=1)]
        weight = weight / weight.sum()
        points = inside + torch.tensor(patch.start, device=device)
        i, j, k = points.unbind(dim=1)
        centre = (points * weight[:, None]).sum(dim=0)
        return _Sample(points.float(), weight, self._atlas_image[i, j, k], self._atlas_mind[:, i, j, k], centre)

    def _best(self, sample: _Sample, shifts: Tensor) -> tuple[NDArray[np.float64], float] | None:
        """From the linearly warped atlas to the query, in voxels, and its cost; None if MIND-SSC is against it.

        Parameters
        ----------
        sample : _Sample
        shifts : Tensor, (n, 3)
            In voxels, the best first.
        """
        start = torch.zeros((len(shifts) + 1, 12), device=shifts.device)
        start[:-1, :3] = shifts
        with torch.no_grad():
            differences = self._terms(start, sample)[0]
        unmoved = float(differences[-1])
        if float(differences[0]) > unmoved:
            return None
        found = self._fitted(start, sample)
        with torch.no_grad():
            mind_difference, cost = self._terms(found, sample)
            cost = cost + PRIOR_WEIGHT * 0.5 * (found[:, :3] / self._prior_voxels).pow(2).sum(dim=1)
            best = int(cost.argmin())
            if float(mind_difference[best]) > unmoved:
                return None
            matrix, offset = affine_maps(found[best : best + 1], sample.centre)
        to_query = np.eye(4)
        to_query[:3, :3], to_query[:3, 3] = matrix[0].cpu().numpy(), offset[0].cpu().numpy()
        return to_query, float(cost[best])

    def _fitted(self, start: Tensor, sample: _Sample) -> Tensor:
        """(n, 12) parameters after Adam's steps."""
        shift = start[:, :3].clone().requires_grad_(True)
        shape = start[:, 3:].clone().requires_grad_(True)
        optimizer = torch.optim.Adam(
            [{"params": [shift], "lr": _SHIFT_STEP}, {"params": [shape], "lr": _SHAPE_STEP}],
        )
        for _ in range(_ITERATIONS):
            _, cost = self._terms(torch.cat((shift, shape), dim=1), sample)
            optimizer.zero_grad()
            cost.sum().backward()
            optimizer.step()
        return torch.cat((shift, shape), dim=1).detach()

    def _terms(self, parameters: Tensor, sample: _Sample) -> tuple[Tensor, Tensor]:
        """MIND-SSC difference and cost without the prior on the shift, (n,) each."""
        weight = sample.weight
        matrix, offset = affine_maps(parameters, sample.centre)
        mapped = sample.points @ matrix.transpose(1, 2) + offset[:, None]
        # The query ends half a voxel beyond the centres of its outermost voxels, and fades to zero in the voxel around.
        shape = torch.tensor(self._query.shape[2:], dtype=torch.float32, device=mapped.device)
        where = ((mapped + 0.5) / shape * 2 - 1).flip(-1)[:, None, None]
        volumes = self._query.expand(len(parameters), -1, -1, -1, -1)
        sampled = F.grid_sample(volumes, where, padding_mode="zeros", align_corners=False)[:, :, 0, 0]
        image, seen = sampled[:, 0], (sampled[:, 1] * weight).sum(dim=1)
        mind_difference = ((sampled[:, 2:] - sample.mind).pow(2).sum(dim=1) * weight).sum(dim=1)
        squares = parameters[:, 3:].pow(2)
        cost = (
            mind_difference
            + OUTSIDE_PRICE * (1 - seen)
            + _ROTATION_PRICE * squares[:, :3].sum(dim=1)
            + _STRETCH_PRICE * squares[:, 3:6].sum(dim=1)
            + _SHEAR_PRICE * squares[:, 6:].sum(dim=1)
        )
        if not self._brightness:
            return mind_difference, cost
        own_centred = sample.image - (sample.image * weight).sum()
        centred = image - (image * weight).sum(dim=1, keepdim=True)
        variance = (centred.pow(2) * weight).sum(dim=1) * (own_centred.pow(2) * weight).sum()
        correlation = (centred * own_centred * weight).sum(dim=1) / torch.sqrt(variance + VARIANCE_FLOOR)
        squared_difference = ((image - sample.image).pow(2) * weight).sum(dim=1)
        return mind_difference, cost + CORRELATION_WEIGHT * (1 - correlation) + INTENSITY_WEIGHT * squared_difference


def _blended(poses: list[_Pose], size: float) -> NDArray[np.float32]:
    """One smooth displacement from the query to the warped atlas, in voxels along the grid's axes.

    A mean of the structures' maps, weighted by how near they are, says what happens between and around them. Near two
    structures it is right for neither: what each still lacks within itself is added, spread more and more narrowly.

    Parameters
    ----------
    poses : list of _Pose
    size : float
        Of the field of view, in voxels.

    Returns
    -------
    array, (3, I, J, K)
    """
    shape = poses[0].mask.shape
    nodes = np.indices(shape, dtype=np.float32)
    least = min(pose.cost for pose in poses)
    trust = [np.float32(np.exp(_DISTRUST * (least - pose.cost))) for pose in poses]

    def spread(values: NDArray[np.float32], share: float) -> NDArray[np.float32]:
        filtered: NDArray[np.float32] = ndimage.gaussian_filter(values, share * size, truncate=3)
        return filtered

    def wanted(pose: _Pose, axis: int) -> NDArray[np.float32]:
        """Displacement along one axis that the structure's own map asks for, everywhere."""
        back = np.linalg.inv(pose.to_query) - np.eye(4)
        total: NDArray[np.float32] = np.float32(back[axis, 3]) + np.tensordot(
            back[axis, :3].astype(np.float32), nodes, axes=1
        )
        return total

    displacement = np.zeros((3, *shape), np.float32)
    nearness = np.zeros(shape, np.float32)
    for pose, trusted in zip(poses, trust, strict=True):
        # Large organs count more, not in proportion to their volume: a kidney keeps its own map beside the liver.
        influence = spread(pose.mask * (trusted / np.sqrt(pose.mask.sum())), _BLENDING_SHARE)
        nearness += influence
        for axis in range(3):
            displacement[axis] += influence * wanted(pose, axis)
    displacement /= nearness + np.float32(_FADING) * nearness.max()
    inside = np.zeros(shape, np.float32)
    for pose, trusted in zip(poses, trust, strict=True):
        inside += trusted * pose.mask
    for share in _CORRECTION_SHARES:
        weight = spread(inside, share)
        weight += np.float32(_CORRECTION_FADING) * weight.max()
        for axis in range(3):
            lacking = np.zeros(shape, np.float32)
            for pose, trusted in zip(poses, trust, strict=True):
                lacking += trusted * pose.mask * (wanted(pose, axis) - displacement[axis])
            displacement[axis] += spread(lacking, share) / weight
    return displacement
