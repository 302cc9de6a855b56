"""Dice coefficient of masks and label maps."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Voxels counted at once, to bound the memory of 64-bit values.
_CHUNK = 1 << 22
#: Smallest label value that is renumbered before counting.
_LARGEST_COUNTED = 1 << 16


def dice(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Compute the Dice coefficient in [0, 1] of two masks, inside where they are not 0; NaN where both are empty."""
    _check_shapes(a, b)
    one, other = a != 0, b != 0
    return _ratio(int(np.count_nonzero(one & other)), int(np.count_nonzero(one)) + int(np.count_nonzero(other)))


def dice_per_structure(result: NDArray[Any], reference: NDArray[Any], values: Iterable[int]) -> dict[int, float]:
    """Compute the Dice coefficient of each of ``values``, at least 0, in one pass over the voxels of two label maps.

    Coefficients are in [0, 1] and in the order of ``values``; NaN where neither label map has the value.
    """
    _check_shapes(result, reference)
    for array in (result, reference):
        if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
            raise ValueError(f"label maps hold whole numbers, not {array.dtype}")
    wanted = list(values)
    known = np.unique(np.array(wanted, np.int64))
    # Bins are the values themselves, or places in `known` if those are large; the last bin is the rest.
    direct = not len(known) or int(known[-1]) < _LARGEST_COUNTED
    bins = (int(known[-1]) + 1 if len(known) else 0) if direct else len(known)
    in_either, in_both = np.zeros((2, bins + 1), np.int64)
    # Read in the order of memory, if it is the same for both.
    turned = result.flags.f_contiguous and reference.flags.f_contiguous
    flat = [(array.T if turned else array).reshape(-1) for array in (result, reference)]
    for first in range(0, flat[0].size, _CHUNK):
        one, other = (_bins(array[first : first + _CHUNK], known, bins, direct=direct) for array in flat)
        in_either += np.bincount(one, minlength=bins + 1) + np.bincount(other, minlength=bins + 1)
        in_both += np.bincount(one[one == other], minlength=bins + 1)
    position = {int(value): int(value) if direct else n for n, value in enumerate(known)}
    return {value: _ratio(int(in_both[position[value]]), int(in_either[position[value]])) for value in wanted}


def _bins(values: NDArray[Any], known: NDArray[np.int64], bins: int, *, direct: bool) -> NDArray[np.int64]:
    """(N,) bin of each voxel; ``bins`` for background."""
    wide = values.astype(np.int64)
    if direct:
        return np.where((wide >= 0) & (wide < bins), wide, bins)
    place = np.searchsorted(known, wide).clip(max=len(known) - 1)
    return np.where(known[place] == wide, place, bins)


def _ratio(common: int, total: int) -> float:
    return 2 * common / total if total else float("nan")


def _check_shapes(a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.shape != b.shape:
        raise ValueError(f"arrays of shape {a.shape} and {b.shape} are not on one grid")
