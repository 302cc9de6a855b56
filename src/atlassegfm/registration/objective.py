"""What the engine ``instance`` lowers on one level: dissimilarity, gradient regularisation and folding.

On a CPU value and derivative come from compiled loops (:mod:`.kernels`), on a GPU from PyTorch; both are one function
of the displacement of the control points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..core.compiled import in_slabs
from . import kernels
from .features import LocalCorrelation, mind_ssc
from .pyramid import Level
from .sampling import gradient_penalty, sample_at

#: Voxels between control points.
STRIDE = 2
#: Half width of the cube of the local correlation, in voxels: 7 across.
CORRELATION_RADIUS = 3
#: Tissue compressed to less than this fraction of its volume is penalised.
_LEAST_VOLUME = 0.3
#: MIND-SSC is compared at one voxel in eight, another one of each cube of eight in every step: its patches overlap.
_PARITIES = ((0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0))


@dataclass(frozen=True)
class Weights:
    """Weights of the terms, and those of structures and centre lines; see the settings of the same names."""

    mind: float = 1.0
    correlation: float = 1.0
    smoothness: float = 1.0
    emphasis: float = 1.0
    folding: float = 0.0
    centreline: float = 1.0


class Scans:
    """Both scans of one level with their features, which all members of an ensemble compare."""

    def __init__(self, query: Level, atlas: Level) -> None:
        self.grid, self.weight = query.grid, query.weight
        self.atlas, self.inside = atlas.image, atlas.inside
        # Channels last in memory, as the compiled loops read them.
        self.query_mind, self.atlas_mind = mind_ssc(query.image), mind_ssc(atlas.image)
        self.correlation = LocalCorrelation(query.image, CORRELATION_RADIUS)
        self.control_shape = [-(-n // STRIDE) + 1 for n in query.grid.shape]


class Objective:
    """A function of what a level adds to the displacement ``base``, (1, 3, I, J, K), in voxels of its grid.

    ``weight``, (1, 1, I, J, K), are those of voxels, 1 in sum.
    """

    def __init__(self, scans: Scans, base: Tensor, weight: Tensor, weights: Weights) -> None:
        self.scans, self.base, self.weight, self.weights = scans, base, weight, weights
        self.shape = list(scans.grid.shape)
        self._size = scans.weight.numel()
        self.coarse_base = F.interpolate(base, scans.control_shape, mode="trilinear", align_corners=True)
        nodes = [torch.arange(n, dtype=torch.float32, device=base.device) for n in self.shape]
        self._places = torch.stack(torch.meshgrid(*nodes, indexing="ij"))[None] + base
        self._tables = tuple(_table(n, m) for n, m in zip(self.shape, scans.control_shape, strict=True))
        self._mind = tuple(_channels_last(mind) for mind in (scans.atlas_mind, scans.query_mind))

    def __call__(self, addition: Tensor, step: int) -> Tensor:
        """Value for displacements of the control points, (1, 3, A, B, C), in voxels; differentiable.

        MIND-SSC is compared at one voxel in eight; ``step`` says which.
        """
        if addition.device.type == "cpu":
            value: Tensor = _Compiled.apply(addition, self, step)  # type: ignore[no-untyped-call]
            return value
        return self.by_torch(addition, step)

    def by_torch(self, addition: Tensor, step: int) -> Tensor:
        """Compute the same by PyTorch, on any device."""
        scans, weights = self.scans, self.weights
        displaced = self._places + F.interpolate(addition, self.shape, mode="trilinear", align_corners=True)
        to_unit = 2 / (torch.tensor(self.shape, dtype=torch.float32, device=displaced.device) - 1).clamp_min(1)
        where = (displaced.movedim(1, -1) * to_unit - 1).flip(-1)
        warped = sample_at(torch.cat((scans.atlas, scans.inside), dim=1), where)
        # Outside the atlas nothing is compared; no gradient here: leaving it would lower the loss.
        counted = self.weight * warped[:, 1:].detach()
        loss = weights.smoothness * gradient_penalty(addition / STRIDE)
        if weights.correlation:
            loss = loss + weights.correlation * scans.correlation.dissimilarity(warped[:, :1], counted)
        if weights.mind:
            i, j, k = (slice(first, None, 2) for first in _PARITIES[step % len(_PARITIES)])
            difference = (sample_at(scans.atlas_mind, where[:, i, j, k]) - scans.query_mind[:, :, i, j, k]).pow(2)
            part = (difference.mean(dim=1, keepdim=True) * counted[:, :, i, j, k]).sum()
            loss = loss + weights.mind * len(_PARITIES) * part
        if weights.folding:
            loss = loss + weights.folding * folding_penalty((self.coarse_base + addition) / STRIDE)
        return loss

    def displaced(self, addition: NDArray[np.float32]) -> NDArray[np.float32]:
        """(3, I, J, K) displaced voxels for displacements of the control points, (3, A, B, C)."""
        displaced = np.empty((3, *self.shape), np.float32)
        places = self._places[0].numpy()
        in_slabs(
            lambda *part: kernels.upsample(addition, places, self._tables, displaced, *part), self.shape[0], self._size
        )
        return displaced

    def value_and_slopes(self, addition: NDArray[np.float32], step: int) -> tuple[float, NDArray[np.float32]]:
        """Value, and derivatives by the displacements of the control points, (3, A, B, C) both, by compiled loops."""
        scans, weights, shape = self.scans, self.weights, self.shape
        displaced = self.displaced(addition)
        warped, counted, slopes = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty_like(displaced)
        images = scans.atlas[0, 0].numpy(), scans.inside[0, 0].numpy()
        weight, result = self.weight[0, 0].numpy(), (warped, slopes, counted)
        in_slabs(lambda *part: kernels.warp(*images, displaced, weight, result, *part), shape[0], self._size)
        value = 0.0
        if weights.correlation:
            moving, own = torch.from_numpy(warped)[None, None], torch.from_numpy(counted)[None, None]
            similarity, by_moving = scans.correlation.value_and_slopes(moving, own)
            value += weights.correlation * float(similarity)
            pull = weights.correlation * by_moving[0, 0].numpy()
            in_slabs(lambda a, b: np.multiply(slopes[:, a:b], pull[a:b], out=slopes[:, a:b]), shape[0], self._size)
        else:
            slopes[:] = 0
        if weights.mind:
            counted *= np.float32(weights.mind * len(_PARITIES))
            atlas_mind, query_mind = self._mind
            parity = _PARITIES[step % len(_PARITIES)]
            mind = in_slabs(
                lambda *part: kernels.add_difference(atlas_mind, displaced, query_mind, counted, parity, slopes, *part),
                shape[0],
                self._size,
            )
            value += sum(mind)
        planes = np.empty((3, shape[0], *addition.shape[2:]), np.float32)
        in_slabs(lambda *part: kernels.gather_planes(slopes, self._tables, planes, *part), shape[0], self._size)
        gathered = np.empty_like(addition)
        in_slabs(
            lambda *part: kernels.gather_across(planes, self._tables, gathered, *part), addition.shape[2], self._size
        )
        base, penalties = self.coarse_base[0].numpy(), (weights.smoothness, weights.folding, _LEAST_VOLUME)
        value += kernels.control_penalties(addition, base, 1 / STRIDE, penalties, gathered)
        return value, gathered


class _Compiled(torch.autograd.Function):
    """:meth:`Objective.value_and_slopes` for PyTorch."""

    @staticmethod
    def forward(ctx: Any, addition: Tensor, objective: Objective, step: int) -> Tensor:
        value, slopes = objective.value_and_slopes(addition[0].detach().contiguous().numpy(), step)
        ctx.save_for_backward(torch.from_numpy(slopes)[None])
        return torch.tensor(value, dtype=addition.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None


def folding_penalty(displacement: Tensor) -> Tensor:
    """Mean squared shortfall of the Jacobian determinant below 0.3, of (1, 3, I, J, K) in voxels."""
    i, j, k = (n - 1 for n in displacement.shape[2:])
    # Forward differences at the nodes that have all three.
    x, y, z = (displacement.diff(dim=axis)[0, :, :i, :j, :k] for axis in (2, 3, 4))
    determinant = (
        (1 + x[0]) * ((1 + y[1]) * (1 + z[2]) - y[2] * z[1])
        - x[1] * (y[0] * (1 + z[2]) - y[2] * z[0])
        + x[2] * (y[0] * z[1] - (1 + y[1]) * z[0])
    )
    return (_LEAST_VOLUME - determinant).clamp_min(0).pow(2).mean()


def smooth_control(control: Tensor) -> Tensor:
    """Smooth (1, 3, A, B, C) by two means over 3 x 3 x 3 control points, about a cubic B-spline; its own transpose."""
    smoothed: Tensor = _Smoothing.apply(control)  # type: ignore[no-untyped-call]
    return smoothed


class _Smoothing(torch.autograd.Function):
    """Means of three, the border repeated: a symmetric matrix along each axis, so that backwards is as forwards."""

    @staticmethod
    def forward(_: Any, control: Tensor) -> Tensor:
        if control.device.type == "cpu" and control.dtype == torch.float32:
            smoothed = control.detach()[0].numpy().copy()
            in_slabs(partial(kernels.smooth_control, smoothed, np.empty_like(smoothed)), len(smoothed), smoothed.size)
            return torch.from_numpy(smoothed)[None]
        for axis in (2, 3, 4) * 2:
            length = control.shape[axis]
            padded = torch.cat((control.narrow(axis, 0, 1), control, control.narrow(axis, length - 1, 1)), dim=axis)
            control = padded.narrow(axis, 0, length) + padded.narrow(axis, 1, length) + padded.narrow(axis, 2, length)
        return control / 3**6

    @staticmethod
    def backward(_: Any, upstream: Tensor) -> Tensor:
        return smooth_control(upstream)


def _table(voxels: int, points: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first of the two control points around each voxel of an axis, and the fraction between them."""
    place = np.arange(voxels) * ((points - 1) / max(voxels - 1, 1))
    first = np.minimum(place.astype(np.int64), points - 2)
    return first, (place - first).astype(np.float32)


def _channels_last(mind: Tensor) -> NDArray[np.float32]:
    """(I, J, K, 12) of (1, 12, I, J, K), without a copy where :func:`.mind_ssc` made it so."""
    return np.asarray(mind[0].cpu().movedim(0, -1).contiguous().numpy())
