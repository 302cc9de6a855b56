"""The linear stages: an exhaustive search over translations, then a rigid and an affine fit.

Scans overlap only in part, and a similarity of the overlap alone is best where nothing overlaps. So every foreground
voxel of either scan pays: its MIND-SSC dissimilarity where it meets foreground of the other scan, a fixed penalty where
it meets background, and a slightly lower one where it leaves the other scan's field of view. Voxels of the atlas pay
more near its labelled structures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.linalg import polar
from scipy.spatial.transform import Rotation
from torch import Tensor

from ..core.adam import Adam
from ..core.compiled import in_slabs
from ..core.parallel import parallel_map
from ..settings import RegistrationSettings
from ..transforms.maps import Affine
from . import exponentials, kernels
from .features import mind_ssc
from .kernels import Doubles
from .pyramid import Level, Scan, axes_of, frame_grid, on_grid
from .sampling import evaluate, off_centre, sample_points, with_ones

#: Penalty of foreground on background: the median dissimilarity (sum over 12 channels) of two misplaced abdomens.
MISMATCH_PENALTY = 2.2
#: Penalty of foreground out of the other field of view; lower ones pull some pairs of abdomens apart altogether.
_OUTSIDE_PENALTY = 2.0
#: Smallest foreground fraction that differences are divided by.
_LEAST_FOREGROUND = 0.05
_PENALTIES = (np.float32(MISMATCH_PENALTY), np.float32(_OUTSIDE_PENALTY), np.float32(_LEAST_FOREGROUND))
#: Voxels of labelled structures weigh 1 + this in the atlas.
_STRUCTURE_EMPHASIS = 3.0
#: Standard deviations of the priors on rotations (radians), log scales and log shears, and the weight of the priors.
_PRIORS, _PRIOR_WEIGHT = torch.tensor([0.15] * 6 + [0.1] * 3), 0.02
#: Added to an affine to voxels of an array with a border of one voxel.
ONE_VOXEL = np.array([[0.0, 0, 0, 1]] * 3 + [[0.0] * 4])
#: Of rotations about the axes, stretches along them, and shears: 3 x 3 matrices, row by row.
_GENERATORS = torch.tensor(
    [
        [0.0, 0, 0, 0, 0, -1, 0, 1, 0],
        [0.0, 0, 1, 0, 0, 0, -1, 0, 0],
        [0.0, -1, 0, 1, 0, 0, 0, 0, 0],
        [1.0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0.0, 0, 0, 0, 1, 0, 0, 0, 0],
        [0.0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0.0, 1, 0, 1, 0, 0, 0, 0, 0],
        [0.0, 0, 1, 0, 0, 0, 1, 0, 0],
        [0.0, 0, 0, 0, 0, 1, 0, 1, 0],
    ]
)
#: Points drawn from the foreground of each scan on the coarse and the fine level.
_COARSE_POINTS, _FINE_POINTS = 3_000, 6_000
#: Candidate translations closer than this fraction of the field of view are one.
_CANDIDATE_DISTANCE = 0.07
#: Candidates carried to the fine level.
_FINE_CANDIDATES = 2


def fit(
    fixed: Scan, moving: Scan, spacings_mm: tuple[float, ...], settings: RegistrationSettings, device: str
) -> tuple[Affine, float]:
    """Fit the linear map from fixed to moving world, by search, rigid and affine fit, coarse to fine; and its cost.

    Without the rigid stage there is no search, and the affine fit starts from the scanner's coordinates. Costs, mean
    penalties of both scans plus priors, compare between fits of the same atlas on the same levels only.
    """
    centre = torch.as_tensor(fixed.intensity.grid.centre_mm, dtype=torch.float32, device=device)
    parameters, costs = torch.zeros((1, 12), device=device), torch.full((1,), torch.inf, device=device)
    for number, spacing in enumerate(spacings_mm):
        points = _COARSE_POINTS if number == 0 else _FINE_POINTS
        query, atlas = _weighted(fixed, moving, spacing, points, device)
        cost = partial(_cost, query=query, atlas=atlas, centre_mm=centre)
        minimise = partial(_minimise, cost=cost, spacing_mm=spacing, iterations=settings.linear_iterations)
        if number == 0 and settings.rigid:
            shifts_mm = search_translations(query, atlas, settings.candidates)
            start = F.pad(torch.as_tensor(shifts_mm, dtype=torch.float32, device=device), (0, 9))
            parameters, costs = minimise(start, rigid=True)
        if number > 0 or settings.affine:
            parameters, costs = minimise(parameters, rigid=not settings.affine)
        parameters = parameters[torch.argsort(costs, stable=True)[:_FINE_CANDIDATES]]
    matrix, offset = affine_maps(parameters[:1], centre)
    return Affine(homogeneous(matrix[0], offset[0])), float(costs.min())


def refined_cost(
    fixed: Scan, moving: Scan, start: Affine, spacing_mm: float, iterations: int, device: str = "cpu"
) -> float:
    """Fit an affine from one that is nearly right, on the coarse level alone, and return its cost, as of :func:`fit`.

    A single iteration gives the cost of ``start`` itself, from fixed to moving world in mm.
    """
    centre = fixed.intensity.grid.centre_mm
    query, atlas = _weighted(fixed, moving, spacing_mm, _COARSE_POINTS, device)
    centre_mm = torch.as_tensor(centre, dtype=torch.float32, device=device)
    cost = partial(_cost, query=query, atlas=atlas, centre_mm=centre_mm)
    begin = _parameters_of(start, centre).to(device)
    return float(_minimise(begin, cost, spacing_mm, iterations, rigid=False)[1])


def _weighted(
    fixed: Scan, moving: Scan, spacing_mm: float, points: int, device: str
) -> tuple[_WeightedScan, _WeightedScan]:
    """Both scans on a level, and so many points of each."""
    axes = axes_of(fixed.intensity.grid)

    def weighted(scan: Scan, emphasis: float) -> _WeightedScan:
        grid = frame_grid(scan.intensity.grid, spacing_mm, axes)
        return _WeightedScan(on_grid(scan, grid, device), emphasis, points)

    return weighted(fixed, 0.0), weighted(moving, _STRUCTURE_EMPHASIS)


def search_translations(query: _WeightedScan, atlas: _WeightedScan, count: int) -> NDArray[np.float64]:
    """Find the best translations by whole voxels by FFT: (n, 3) mm (RAS+) from query to atlas world, best first."""
    query_shape, atlas_shape = np.array(query.level.grid.shape), np.array(atlas.level.grid.shape)
    size = [next_fast_len(int(n), real=True) for n in query_shape + atlas_shape - 1]
    # The mean penalties of both scans' voxels, but for a constant; both are linear in a weight of the atlas.
    atlas_total, query_total = (max(float(scan.weight.sum()), 1e-6) for scan in (atlas, query))
    atlas_pays, seen_pays = atlas.weight / atlas_total, MISMATCH_PENALTY - _OUTSIDE_PENALTY
    paid = atlas_pays + atlas.level.weight[0, 0] / query_total
    own, other = (scan.features.pow(2).sum(dim=0) for scan in (query, atlas))
    # sum of w w' (f - f')^2 = w f^2 * w' + w * w' f'^2 - 2 sum over channels of (w f) * (w' f')
    by_weight = paid * (other - MISMATCH_PENALTY) + seen_pays / query_total * atlas.level.inside[0, 0]
    of_query = (query.weight * own, query.weight, query.level.inside[0, 0], *(query.weight * query.features))
    of_atlas = (paid, by_weight, seen_pays * atlas_pays, *(-2 * paid * atlas.features))
    spectra = (torch.fft.rfftn(torch.stack(channels), s=size, dim=(1, 2, 3)) for channels in (of_query, of_atlas))
    product = reduce(lambda one, two: (one.conj() * two).sum(dim=0), spectra)
    costs = torch.fft.irfftn(product, s=size).cpu().numpy()
    for axis, (beyond, before) in enumerate(zip(atlas_shape, size - query_shape + 1, strict=True)):
        costs[(slice(None),) * axis + (slice(beyond, before),)] = np.inf  # no voxels meet
    reach = max(1, round(_CANDIDATE_DISTANCE * float(query_shape.max())))
    shifts = []
    for _ in range(count):
        best = np.array(np.unravel_index(int(costs.argmin()), costs.shape))
        if not np.isfinite(costs[tuple(best)]):
            break
        voxels = np.where(best > atlas_shape - 1, best - np.array(size), best)
        shifts.append(atlas.level.grid.voxel_to_world(voxels) - query.level.grid.voxel_to_world(np.zeros(3)))
        # Translations wrap around at the ends of the array.
        around = [np.arange(n - reach, n + reach + 1) % length for n, length in zip(best, costs.shape, strict=True)]
        costs[np.ix_(*around)] = np.inf
    return np.array(shifts)


class _WeightedScan:
    """One scan on one level: its features and weights, and foreground voxels drawn in proportion to their weight."""

    def __init__(self, level: Level, emphasis: float = 0.0, points: int = _COARSE_POINTS) -> None:
        self.level, self.features, self.weight = level, mind_ssc(level.image)[0], level.weight[0, 0]
        if level.labelled is not None:
            self.weight = self.weight * (1 + emphasis * level.labelled[0, 0])
        # (14, I, J, K): features times foreground, foreground, field of view.
        self.channels = torch.cat((self.features * level.weight[0], level.weight[0], level.inside[0]))
        # An evenly spaced comb through the cumulative weight: deterministic, and even over the body.
        cumulative = torch.cumsum(self.weight.flatten().double().cpu(), dim=0)
        comb = (torch.arange(points, dtype=torch.float64) + 0.5) * (float(cumulative[-1]) / points)
        index = torch.unique(torch.searchsorted(cumulative, comb).clamp_max(len(cumulative) - 1))
        device = self.features.device
        voxels = np.stack(np.unravel_index(index.numpy(), level.grid.shape), axis=1)
        ijk = off_centre(torch.from_numpy(voxels).to(device), level.grid.shape)
        self.points_mm = torch.as_tensor(level.grid.voxel_to_world(ijk.cpu().numpy()), dtype=torch.float32).to(device)
        self.point_features = sample_points(self.features, ijk)
        # A border of zeros for the compiled loop: what lies outside is zero in every channel.
        padded = F.pad(self.channels, [1] * 6)
        self._padded = padded[:-2].cpu().movedim(0, -1).contiguous().numpy(), *padded[-2:].cpu().numpy()
        self._to_padded = level.grid.inverse_affine + ONE_VOXEL
        self._targets, self._points = (
            np.ascontiguousarray(self.point_features.T.cpu().numpy()),
            with_ones(self.points_mm),
        )

    def penalty_of(self, other: _WeightedScan, maps: Doubles) -> tuple[Doubles, Doubles]:
        """(B,) mean penalties of another scan's points mapped into this one by (B, 4, 4), in mm; by a compiled loop.

        And their derivatives by the maps, (B, 4, 4).
        """
        points, targets = other._points, other._targets
        to_padded = np.ascontiguousarray((self._to_padded @ maps)[:, :3], dtype=np.float32)

        def penalties(first: int, last: int) -> Doubles:
            return kernels.penalty_sums(self._padded, points, targets, _PENALTIES, to_padded, first, last)

        means = sum(in_slabs(penalties, len(targets), len(targets) * len(maps)))[:, 0] / len(targets)
        return means[:, 0, 3], self._to_padded[:3].T @ means[:, 1:]

    def penalty_by_torch(self, other: _WeightedScan, matrix: Tensor, offset: Tensor) -> Tensor:
        """(B,) mean penalties by (B, 3, 3) matrices and (B, 3) offsets; by PyTorch, on any device."""
        mapped = other.points_mm @ matrix.transpose(1, 2) + offset[:, None]
        inverse = torch.as_tensor(self.level.grid.inverse_affine, dtype=torch.float32, device=mapped.device)
        ijk = mapped @ inverse[:3, :3].T + inverse[:3, 3]
        last = torch.tensor(self.level.grid.shape, dtype=torch.float32, device=ijk.device) - 1
        where = (ijk / last * 2 - 1).flip(-1)[:, None, None]
        volumes = self.channels.expand(len(ijk), -1, -1, -1, -1)
        sampled = F.grid_sample(volumes, where, padding_mode="zeros", align_corners=True)[:, :, 0, 0]
        features, foreground, inside = sampled[:, :-2], sampled[:, -2], sampled[:, -1]
        # Sampled features have the foreground fraction as a factor; divided out once, it weights the difference.
        difference = foreground[:, None] * other.point_features - features
        penalty = difference.pow(2).sum(dim=1) / foreground.clamp_min(_LEAST_FOREGROUND)
        penalty = penalty + MISMATCH_PENALTY * (inside - foreground).clamp_min(0)
        return (penalty + _OUTSIDE_PENALTY * (1 - inside)).mean(dim=1)


def _cost(parameters: Tensor, query: _WeightedScan, atlas: _WeightedScan, centre_mm: Tensor) -> Tensor:
    """(B, 12) parameters to (B,) costs."""
    by_device = agreement if parameters.device.type == "cpu" else agreement_by_torch
    prior = (parameters[:, 3:] / _PRIORS.to(parameters.device)).pow(2).sum(dim=1)
    return by_device(parameters, query, atlas, centre_mm) + _PRIOR_WEIGHT * prior


def agreement(parameters: Tensor, query: _WeightedScan, atlas: _WeightedScan, centre_mm: Tensor) -> Tensor:
    """Sum the mean penalties of both scans under linear maps of (B, 12) parameters: (B,), by compiled loops."""

    def penalties(numbers: Doubles) -> tuple[Doubles, Doubles]:
        maps, by_parameters = linear_maps(numbers, centre_mm)
        back = np.linalg.inv(maps).astype(np.float64)
        ways = (atlas, query, maps), (query, atlas, back)
        found = parallel_map(lambda way: way[0].penalty_of(way[1], way[2]), ways, most=len(ways))
        (of_query, slopes), (of_atlas, slopes_back) = found
        transposed = back.swapaxes(1, 2)
        # The derivative of an inverse.
        slopes = slopes - transposed @ slopes_back @ transposed
        return (of_query + of_atlas)[:, None], np.einsum("bij,bpij->bp", slopes, by_parameters)[:, None]

    return evaluate(parameters, penalties)[:, 0]


def agreement_by_torch(parameters: Tensor, query: _WeightedScan, atlas: _WeightedScan, centre_mm: Tensor) -> Tensor:
    """The same by PyTorch, on any device."""
    matrix, offset = affine_maps(parameters, centre_mm)
    inverse = torch.linalg.inv(matrix)
    of_query = atlas.penalty_by_torch(query, matrix, offset)
    return of_query + query.penalty_by_torch(atlas, inverse, -(inverse @ offset[..., None])[..., 0])


def _minimise(
    start: Tensor, cost: Callable[[Tensor], Tensor], spacing_mm: float, iterations: int, *, rigid: bool
) -> tuple[Tensor, Tensor]:
    """Adam from several starts at once; the best parameters seen, (B, 12), and their costs, (B,)."""
    # Steps in natural units: half a voxel, and the angle or stretch that moves the border of the body as far.
    steps = torch.tensor([0.5 * spacing_mm] * 3 + [0.02] * 3 + [0.015] * 6, device=start.device)
    if rigid:
        steps[6:] = 0
    moves = torch.zeros_like(start, requires_grad=True)
    optimizer = Adam([moves], [1.0], decay_rates=(0.8, 0.95))
    best, best_cost = start.clone(), torch.full((len(start),), torch.inf, device=start.device)
    for iteration in range(iterations):
        parameters = start + moves * steps
        costs = cost(parameters)
        with torch.no_grad():
            better = costs < best_cost
            best_cost = torch.where(better, costs, best_cost)
            best = torch.where(better[:, None], parameters, best)
        optimizer.step(torch.autograd.grad(costs.sum(), (moves,)), factor=1 - 0.9 * iteration / iterations)
    return best.detach(), best_cost.detach()


def affine_maps(parameters: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Build linear maps that rotate, stretch and shift around a centre.

    ``parameters`` are (B, 12): translation, rotation vector in radians, log scales along the axes, log shears; the map
    without translation leaves ``centre`` in place. Returns matrices, (B, 3, 3) of positive determinant, and offsets,
    (B, 3).
    """
    generators = _GENERATORS.to(parameters.device)
    turn, stretch = parameters[:, 3:6] @ generators[:3], parameters[:, 6:] @ generators[3:]
    rotation, strain = torch.matrix_exp(torch.cat((turn, stretch)).reshape(-1, 3, 3)).chunk(2)
    matrix = rotation @ strain
    return matrix, centre + parameters[:, :3] - (matrix @ centre[:, None])[..., 0]


def _parameters_of(linear: Affine, centre_mm: NDArray[np.float64]) -> Tensor:
    """(1, 12) parameters that :func:`affine_maps` turns into a linear map of positive determinant."""
    rotation, stretch = polar(linear.matrix[:3, :3])
    values, axes = np.linalg.eigh(stretch)
    logs = axes @ np.diag(np.log(values)) @ axes.T
    shift, turned = linear.map(centre_mm) - centre_mm, Rotation.from_matrix(rotation).as_rotvec()
    parameters = np.concatenate((shift, turned, np.diag(logs), logs[[0, 0, 1], [1, 2, 2]]))
    return torch.as_tensor(parameters, dtype=torch.float32)[None]


def linear_maps(parameters: Doubles, centre: Tensor) -> tuple[Doubles, Doubles]:
    """:func:`affine_maps` as (B, 4, 4), and their derivatives by the parameters, (B, 12, 4, 4); on a CPU."""
    generators = _GENERATORS.double().numpy().reshape(-1, 3, 3)
    maps, slopes = np.zeros((len(parameters), 4, 4)), np.zeros((len(parameters), 12, 4, 4))
    exponentials.linear_maps(parameters, centre.double().numpy(), generators, maps, slopes)
    return maps, slopes


def homogeneous(matrix: Tensor, offset: Tensor) -> NDArray[np.float64]:
    """(4, 4) of a (3, 3) matrix and a (3,) offset."""
    whole = np.eye(4)
    whole[:3, :3], whole[:3, 3] = matrix.double().cpu().numpy(), offset.double().cpu().numpy()
    return whole
