"""Fusion of the warped atlas and the model's prediction, structure by structure."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.image import Volume
from ..core.mask import LocalMap
from ..core.parallel import parallel_map
from ..prompts import INSIDE
from .gate import Gate, fuse
from .smoothing import smooth, smoothing_sigma_mm


def is_empty_prediction(predicted: LocalMap) -> bool:
    """Whether no voxel of a prediction is inside."""
    return not (predicted.values >= INSIDE).any()


def fuse_structures(
    image: Volume,
    warped: Mapping[int, LocalMap],
    predicted: Mapping[int, LocalMap],
    gate: Gate,
    *,
    device: str = "cpu",
) -> dict[int, LocalMap]:
    """Fuse each structure of a scan: gate (eq. 4), then the default gate's correction and smoothing.

    Masks are in [0, 1], by number of the structure; the result has the numbers of ``predicted``. Where the model
    predicts nothing, the warped atlas is kept: small structures would be lost.
    """
    fused = {
        n: warped[n] if is_empty_prediction(mask) else fuse(warped[n], mask, gate, device=device)
        for n, mask in predicted.items()
    }
    if gate.correction is None:
        return fused
    correction, grid = gate.correction, image.grid

    def finish(n: int) -> LocalMap:
        if is_empty_prediction(predicted[n]):
            return fused[n]
        corrected = correction.apply(image, n, warped[n], fused)
        fraction = gate.smoothing[n - 1] if gate.smoothing else 0.0
        return smooth(corrected, smoothing_sigma_mm(fraction, warped[n], grid), grid)

    return dict(zip(fused, parallel_map(finish, fused), strict=True))
