"""Linear maps from their parameters, with derivatives, compiled by Numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.compiled import compiled

Doubles = NDArray[np.float64]
#: Terms of the series of a matrix exponential: exact for all rotations and stretches that occur.
_SERIES = 18


@compiled
def linear_maps(parameters: Doubles, centre: Doubles, generators: Doubles, maps: Doubles, slopes: Doubles) -> None:
    """Linear maps, (B, 4, 4), of (B, 12) parameters, as of :func:`.affine.affine_maps`, and derivatives, (B, 12, 4, 4).

    ``generators``, (9, 3, 3), are those of rotations, and of stretches and shears. Results are zero when it is called.
    """
    # Rotation and strain are exponentials, computed by their series; the derivative by each generator comes with them.
    exponents, powers, sums = np.empty((2, 3, 3)), np.empty((11, 3, 3)), np.empty((11, 3, 3))
    for b in range(len(parameters)):
        for row in range(3):
            for column in range(3):
                exponents[0, row, column] = exponents[1, row, column] = 0.0
                for n in range(9):
                    exponents[min(n // 3, 1), row, column] += parameters[b, 3 + n] * generators[n, row, column]
                for slot in range(11):
                    powers[slot, row, column] = sums[slot, row, column] = 1.0 if slot < 2 and row == column else 0.0
        for order in range(1, _SERIES + 1):
            for slot in range(10, -1, -1):
                factor = slot if slot < 2 else min(slot // 5, 1)
                for row in range(3):
                    x, y, z = powers[slot, row, 0], powers[slot, row, 1], powers[slot, row, 2]
                    p, q, r = powers[factor, row, 0], powers[factor, row, 1], powers[factor, row, 2]
                    for column in range(3):
                        e, f, g = (
                            exponents[factor, 0, column],
                            exponents[factor, 1, column],
                            exponents[factor, 2, column],
                        )
                        term = x * e + y * f + z * g
                        if slot > 1:
                            e, f, g = (
                                generators[slot - 2, 0, column],
                                generators[slot - 2, 1, column],
                                generators[slot - 2, 2, column],
                            )
                            term += p * e + q * f + r * g
                        powers[slot, row, column] = term / order
                        sums[slot, row, column] += term / order
        for slot in range(1, 11):
            # The map itself, then the derivatives: that of one factor, times the other.
            one, other = (slot, 1) if 1 < slot < 5 else (0, slot)
            for row in range(3):
                shift = 0.0
                for column in range(3):
                    value = 0.0
                    for n in range(3):
                        value += sums[one, row, n] * sums[other, n, column]
                    shift -= value * centre[column]
                    if slot == 1:
                        maps[b, row, column] = value
                    else:
                        slopes[b, slot + 1, row, column] = value
                if slot == 1:
                    maps[b, row, 3] = shift + centre[row] + parameters[b, row]
                else:
                    slopes[b, slot + 1, row, 3] = shift
        maps[b, 3, 3] = 1
        for axis in range(3):
            slopes[b, axis, axis, 3] = 1
