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
    """Fuse each structure: gate (eq. 4), then the default gate's correction and smoothing.

    Parameters
    ----------
    image : Volume
        The query, float32, RAS-canonical array order.
    warped : mapping of int to LocalMap
        Warped atlas masks by number of the structure, in [0, 1].
    predicted : mapping of int to LocalMap
        The model's predictions. Where one is empty, the warped atlas is kept: of 138 structures on OASIS two or three a
        scan, of 10 to 150 voxels, would be lost.
    gate : Gate
    device : {"cpu", "cuda"}

    Returns
    -------
    dict of int to LocalMap
        The numbers of ``predicted``.
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
