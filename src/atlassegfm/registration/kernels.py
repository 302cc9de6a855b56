"""Inner loops of the registration on a CPU, compiled by Numba.

Images are read at points by linear interpolation, with the derivative by position in the same pass, where PyTorch needs
two passes and an intermediate image for each channel. Points are in voxels; beyond the border the value of the nearest
border voxel holds, and the derivative is 0. Arrays are C-contiguous float32; MIND-SSC has its channels last. A kernel
computes its part from ``first`` to ``last`` of one axis (:func:`.core.compiled.in_slabs`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.compiled import compiled, inlined

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]
#: Of MIND-SSC: as a constant, so that the compiler lays the channels into vector registers.
_CHANNELS = 12
#: Points whose terms are kept before they are summed, in single precision.
_RUN = 64


@inlined
def _cell(place: Any, length: int) -> tuple[int, int, Any, Any]:
    """First node, step to the second (0 on an axis of one voxel), fraction between them, 1 where there is a slope."""
    one, zero = np.float32(1), np.float32(0)
    if length == 1 or not place > 0:
        return 0, min(length - 1, 1), zero, zero
    if place >= length - 1:
        return length - 2, 1, one, zero
    node = int(place)
    return node, 1, np.float32(place - node), one


@inlined
def _cells(place: Any, shape: Any) -> tuple[int, Any, Any, Any]:
    """Flat index of the first of eight nodes, steps to the others, fractions, and where there are slopes."""
    i, si, u, along_i = _cell(place[0], shape[0])
    j, sj, v, along_j = _cell(place[1], shape[1])
    k, sk, w, along_k = _cell(place[2], shape[2])
    steps = (si * shape[1] * shape[2], sj * shape[2], sk)
    return (i * shape[1] + j) * shape[2] + k, steps, (u, v, w), (along_i, along_j, along_k)


@inlined
def _read(image: Array, at: int, steps: Any, fractions: Any, along: Any) -> tuple[Any, Any, Any, Any]:
    """Interpolate between the eight nodes from ``at`` on of a flat image: value and its three derivatives."""
    di, dj, dk = steps
    u, v, w = fractions
    one = np.float32(1)
    a, b, c, d = image[at], image[at + dk], image[at + dj], image[at + dj + dk]
    e, f, g, h = image[at + di], image[at + di + dk], image[at + di + dj], image[at + di + dj + dk]
    # Along k, then j, then i.
    ab, cd, ef, gh = a + w * (b - a), c + w * (d - c), e + w * (f - e), g + w * (h - g)
    near, far = ab + v * (cd - ab), ef + v * (gh - ef)
    by_j = (one - u) * (cd - ab) + u * (gh - ef)
    by_k = (one - u) * ((one - v) * (b - a) + v * (d - c)) + u * ((one - v) * (f - e) + v * (h - g))
    return near + u * (far - near), along[0] * (far - near), along[1] * by_j, along[2] * by_k


@inlined
def _compare(
    mind: Array, at: int, steps: Any, fractions: Any, targets: Array, target: int, factor: Any
) -> tuple[Any, ...]:
    """Compare MIND-SSC between eight nodes, from ``at`` on, with ``factor`` times that from ``target`` on.

    Sums over the channels of the squared difference, of its half's derivatives by ``factor`` and by position.
    """
    u, v, w = fractions
    one, m, size = np.float32(1), at * _CHANNELS, _CHANNELS
    di, dj, dk = steps[0] * size, steps[1] * size, steps[2] * size
    # Slices, not sums of indices: so the compiler sees that channels follow each other.
    xa, xb = mind[m : m + size], mind[m + dk : m + dk + size]
    xc, xd = mind[m + dj : m + dj + size], mind[m + dj + dk : m + dj + dk + size]
    m += di
    xe, xf = mind[m : m + size], mind[m + dk : m + dk + size]
    xg, xh = mind[m + dj : m + dj + size], mind[m + dj + dk : m + dj + dk + size]
    wanted = targets[target : target + size]
    squares = by_factor = by_i = by_j = by_k = np.float32(0)
    for n in range(_CHANNELS):
        a, b, c, d, e, f, g, h = xa[n], xb[n], xc[n], xd[n], xe[n], xf[n], xg[n], xh[n]
        ab, cd, ef, gh = a + w * (b - a), c + w * (d - c), e + w * (f - e), g + w * (h - g)
        near, far = ab + v * (cd - ab), ef + v * (gh - ef)
        difference = near + u * (far - near) - factor * wanted[n]
        squares += difference * difference
        by_factor -= difference * wanted[n]
        by_i += difference * (far - near)
        by_j += difference * ((one - u) * (cd - ab) + u * (gh - ef))
        by_k += difference * ((one - u) * ((one - v) * (b - a) + v * (d - c)) + u * ((one - v) * (f - e) + v * (h - g)))
    return squares, by_factor, by_i, by_j, by_k


@inlined
def _mapped(maps: Array, b: int, points: Array, n: int) -> tuple[Any, Any, Any]:
    """Point n of (4, N), each (x, y, z, 1), by the linear map b of (B, 3, 4)."""
    x, y, z = points[0, n], points[1, n], points[2, n]
    return (
        maps[b, 0, 0] * x + maps[b, 0, 1] * y + maps[b, 0, 2] * z + maps[b, 0, 3],
        maps[b, 1, 0] * x + maps[b, 1, 1] * y + maps[b, 1, 2] * z + maps[b, 1, 3],
        maps[b, 2, 0] * x + maps[b, 2, 1] * y + maps[b, 2, 2] * z + maps[b, 2, 3],
    )


@inlined
def _add(terms: Array, points: Array, first: int, count: int, sums: Doubles) -> None:
    """Add the products of terms, (K, 4, _RUN), and points from ``first`` on, (4, N), over a run, to (K, 4, 4)."""
    for column in range(4):
        along = points[column, first : first + count]
        for term in range(terms.shape[0]):
            for row in range(4):
                values, total = terms[term, row], np.float32(0)
                for m in range(count):
                    total += values[m] * along[m]
                sums[term, row, column] += total


@compiled
def warp(image: Array, inside: Array, displaced: Array, weight: Array, result: Any, first: int, last: int) -> None:
    """Read an image and its field of view, (I, J, K) each, at displaced voxels, (3, A, B, C).

    ``result`` becomes the image there, (A, B, C), its derivatives by position, (3, A, B, C), and ``weight`` times the
    field of view, (A, B, C). Slabs are along A.
    """
    warped, slopes, counted = result
    flat, seen = image.ravel(), inside.ravel()
    for a in range(first, last):
        for b in range(warped.shape[1]):
            for c in range(warped.shape[2]):
                place = (displaced[0, a, b, c], displaced[1, a, b, c], displaced[2, a, b, c])
                at, steps, fractions, along = _cells(place, image.shape)
                warped[a, b, c], by_i, by_j, by_k = _read(flat, at, steps, fractions, along)
                slopes[0, a, b, c], slopes[1, a, b, c], slopes[2, a, b, c] = by_i, by_j, by_k
                counted[a, b, c] = weight[a, b, c] * _read(seen, at, steps, fractions, along)[0]


@compiled
def add_difference(
    mind: Array, displaced: Array, targets: Array, weight: Array, parity: Any, slopes: Array, first: int, last: int
) -> float:
    """Sum the weighted mean squared difference of MIND-SSC, (I, J, K, 12), at displaced voxels, (3, A, B, C).

    It is compared with ``targets``, (A, B, C, 12), at every second voxel along each axis, from ``parity`` on. Its
    derivatives by position are added to ``slopes``, (3, A, B, C). Slabs are along A.
    """
    flat, wanted, total = mind.ravel(), targets.ravel(), 0.0
    for a in range(first + (parity[0] - first) % 2, last, 2):
        for b in range(parity[1], weight.shape[1], 2):
            for c in range(parity[2], weight.shape[2], 2):
                factor = weight[a, b, c] / np.float32(_CHANNELS)
                if factor == 0:
                    continue
                place = (displaced[0, a, b, c], displaced[1, a, b, c], displaced[2, a, b, c])
                at, steps, fractions, along = _cells(place, mind.shape)
                target = ((a * weight.shape[1] + b) * weight.shape[2] + c) * _CHANNELS
                found = _compare(flat, at, steps, fractions, wanted, target, np.float32(1))
                total += factor * found[0]
                twice = np.float32(2) * factor
                slopes[0, a, b, c] += twice * along[0] * found[2]
                slopes[1, a, b, c] += twice * along[1] * found[3]
                slopes[2, a, b, c] += twice * along[2] * found[4]
    return total


@compiled
def structure_sums(query: Any, sample: Any, maps: Array, first: int, last: int) -> Doubles:
    """Compare weighted points of a structure, (4, N), by each of the linear maps, (B, 3, 4), with the query.

    ``query`` is intensity and field of view, (I, J, K), and MIND-SSC, (I, J, K, 12); ``sample`` are points, and at each
    its weight, intensity and MIND-SSC, (N, 12), in the atlas. The result, (B, 5, 4, 4), are weighted sums as of
    :func:`.sampling.sums_by`: the squared MIND-SSC difference, the field of view, the query's intensity, its square,
    and its product with the atlas's.
    """
    image, inside, mind = query
    points, weights, own, targets = sample
    flat, wanted = mind.ravel(), targets.ravel()
    intensity, is_seen = image.ravel(), inside.ravel()
    sums, terms = np.zeros((len(maps), 5, 4, 4)), np.empty((5, 4, _RUN), np.float32)
    for b in range(len(maps)):
        for begin in range(first, last, _RUN):
            count = min(_RUN, last - begin)
            for m in range(count):
                n = begin + m
                at, steps, fractions, along = _cells(_mapped(maps, b, points, n), mind.shape)
                here = _read(intensity, at, steps, fractions, along)
                seen = _read(is_seen, at, steps, fractions, along)
                found = _compare(flat, at, steps, fractions, wanted, n * _CHANNELS, np.float32(1))
                weight = weights[n]
                terms[0, 0, m], terms[3, 0, m] = weight * found[0], weight * here[0] * here[0]
                for axis in range(3):
                    terms[0, 1 + axis, m] = 2 * weight * along[axis] * found[2 + axis]
                    terms[3, 1 + axis, m] = 2 * weight * here[0] * here[1 + axis]
                for row in range(4):
                    terms[1, row, m] = weight * seen[row]
                    terms[2, row, m] = weight * here[row]
                    terms[4, row, m] = weight * own[n] * here[row]
            _add(terms, points, begin, count, sums[b])
    return sums


@compiled
def penalty_sums(
    scan: Any, points: Array, targets: Array, penalties: Any, maps: Array, first: int, last: int
) -> Doubles:
    """Sum penalties of foreground points, (4, N), of another scan by each of the linear maps, (B, 3, 4): (B, 1, 4, 4).

    ``scan`` is MIND-SSC times foreground, (I, J, K, 12), foreground and field of view, (I, J, K); ``targets`` are
    (N, 12); ``penalties`` are those of a mismatch, of a point out of view, and the least foreground: the terms of
    :mod:`.affine`. The result is as of :func:`.sampling.sums_by`.
    """
    mind, foreground, inside = scan
    mismatch, outside, least = penalties
    flat, wanted = mind.ravel(), targets.ravel()
    is_body, is_seen = foreground.ravel(), inside.ravel()
    sums, terms = np.zeros((len(maps), 1, 4, 4)), np.empty((1, 4, _RUN), np.float32)
    for b in range(len(maps)):
        for begin in range(first, last, _RUN):
            count = min(_RUN, last - begin)
            for m in range(count):
                n = begin + m
                at, steps, fractions, along = _cells(_mapped(maps, b, points, n), mind.shape)
                body = _read(is_body, at, steps, fractions, along)
                seen = _read(is_seen, at, steps, fractions, along)
                found = _compare(flat, at, steps, fractions, wanted, n * _CHANNELS, body[0])
                divisor = max(body[0], least)
                by_body, by_seen = 2 * found[1] / divisor, -outside
                if body[0] > least:
                    by_body -= found[0] / (divisor * divisor)
                if seen[0] > body[0]:
                    by_body -= mismatch
                    by_seen += mismatch
                mismatched = mismatch * max(seen[0] - body[0], np.float32(0))
                terms[0, 0, m] = found[0] / divisor + mismatched + outside * (1 - seen[0])
                for axis in range(3):
                    of_mind = 2 * along[axis] * found[2 + axis] / divisor
                    terms[0, 1 + axis, m] = of_mind + by_body * body[1 + axis] + by_seen * seen[1 + axis]
            _add(terms, points, begin, count, sums[b])
    return sums


@compiled
def upsample(control: Array, base: Array, tables: Any, result: Array, first: int, last: int) -> None:
    """Interpolate a control grid, (3, A, B, C), at the voxels of (3, I, J, K), and add ``base``. Slabs are along I.

    ``tables`` are for each axis the first of two control points of a voxel, and the fraction between them.
    """
    (near_i, part_i), (near_j, part_j), (near_k, part_k) = tables
    row = np.empty(control.shape[3], np.float32)
    one = np.float32(1)
    for component in range(3):
        for i in range(first, last):
            a, u = near_i[i], part_i[i]
            for j in range(len(near_j)):
                b, v = near_j[j], part_j[j]
                p, q, r, s = (one - u) * (one - v), (one - u) * v, u * (one - v), u * v
                for c in range(len(row)):
                    row[c] = (
                        p * control[component, a, b, c]
                        + q * control[component, a, b + 1, c]
                        + r * control[component, a + 1, b, c]
                        + s * control[component, a + 1, b + 1, c]
                    )
                for k in range(len(near_k)):
                    c, w = near_k[k], part_k[k]
                    result[component, i, j, k] = base[component, i, j, k] + row[c] + w * (row[c + 1] - row[c])


@compiled
def gather_planes(values: Array, tables: Any, result: Array, first: int, last: int) -> None:
    """Transpose of :func:`upsample` within planes: (3, I, J, K) to (3, I, B, C). Slabs are along I."""
    _, (near_j, part_j), (near_k, part_k) = tables
    one = np.float32(1)
    rows = np.empty((result.shape[2], values.shape[3]), np.float32)
    for component in range(3):
        for i in range(first, last):
            rows[:] = 0
            for j in range(len(near_j)):
                b, v = near_j[j], part_j[j]
                for k in range(len(near_k)):
                    rows[b, k] += (one - v) * values[component, i, j, k]
                    rows[b + 1, k] += v * values[component, i, j, k]
            for b in range(len(rows)):
                result[component, i, b, :] = 0
                for k in range(len(near_k)):
                    c, w = near_k[k], part_k[k]
                    result[component, i, b, c] += (one - w) * rows[b, k]
                    result[component, i, b, c + 1] += w * rows[b, k]


@compiled
def gather_across(planes: Array, tables: Any, result: Array, first: int, last: int) -> None:
    """Transpose of :func:`upsample` across planes: (3, I, B, C) to (3, A, B, C). Slabs are along B."""
    near_i, part_i = tables[0]
    one = np.float32(1)
    result[:, :, first:last] = 0
    for component in range(3):
        for i in range(len(near_i)):
            a, u = near_i[i], part_i[i]
            for b in range(first, last):
                for c in range(planes.shape[3]):
                    result[component, a, b, c] += (one - u) * planes[component, i, b, c]
                    result[component, a + 1, b, c] += u * planes[component, i, b, c]


@compiled
def smooth_control(result: Array, scratch: Array, first: int, last: int) -> None:
    """Smooth (3, A, B, C) in place by two means over 3 x 3 x 3 points, the border repeated. Slabs along components."""
    _, na, nb, nc = result.shape
    third = np.float32(1 / 3)
    for n in range(first, last):
        for _ in range(2):
            for a in range(na):
                low, high = max(a - 1, 0), min(a + 1, na - 1)
                for b in range(nb):
                    for c in range(nc):
                        total = result[n, low, b, c] + result[n, a, b, c] + result[n, high, b, c]
                        scratch[n, a, b, c] = third * total
            for a in range(na):
                for b in range(nb):
                    low, high = max(b - 1, 0), min(b + 1, nb - 1)
                    for c in range(nc):
                        # Along the second axis, then the third.
                        total = scratch[n, a, low, c] + scratch[n, a, b, c] + scratch[n, a, high, c]
                        result[n, a, b, c] = third * total
                    before = result[n, a, b, 0]
                    for c in range(nc):
                        here = result[n, a, b, c]
                        result[n, a, b, c] = third * (before + here + result[n, a, b, min(c + 1, nc - 1)])
                        before = here


@inlined
def _sum_plane(plane: Array, radius: int, rows: Array, result: Array) -> None:
    """Sum (J, K) over squares of 2 * radius + 1 voxels; ``rows``, (J, K), is written to."""
    nj, nk = plane.shape
    for j in range(nj):
        for k in range(nk):
            rows[j, k] = plane[j, k]
        for step in range(1, radius + 1):
            for k in range(nk - step):
                rows[j, k] += plane[j, k + step]
            for k in range(step, nk):
                rows[j, k] += plane[j, k - step]
    for j in range(nj):
        low, high = max(0, j - radius), min(nj, j + radius + 1)
        for k in range(nk):
            result[j, k] = rows[low, k]
        for other in range(low + 1, high):
            for k in range(nk):
                result[j, k] += rows[other, k]


@compiled
def sum_in_planes(images: Array, radius: int, result: Array, first: int, last: int) -> None:
    """Sum (C, I, J, K) over squares of 2 * radius + 1 voxels in the planes of J and K. Slabs are along I."""
    rows = np.empty(images.shape[2:], np.float32)
    for n in range(len(images)):
        for i in range(first, last):
            _sum_plane(images[n, i], radius, rows, result[n, i])


@compiled
def sum_across(images: Array, radius: int, result: Array, first: int, last: int) -> None:
    """Sum (C, I, J, K) over 2 * radius + 1 planes along I. Slabs are along J."""
    count, ni, _, nk = images.shape
    for n in range(count):
        for i in range(ni):
            low, high = max(0, i - radius), min(ni, i + radius + 1)
            for j in range(first, last):
                for k in range(nk):
                    result[n, i, j, k] = images[n, low, j, k]
                for other in range(low + 1, high):
                    for k in range(nk):
                        result[n, i, j, k] += images[n, other, j, k]


@inlined
def _sum_planes(images: Array, low: int, high: int, j: int, row: Array) -> None:
    """Sum row j of the planes ``low`` to ``high`` of (C, I, J, K), for as many images as ``row``, (C, K), has."""
    for n in range(row.shape[0]):
        for k in range(row.shape[1]):
            row[n, k] = images[n, low, j, k]
        for other in range(low + 1, high):
            for k in range(row.shape[1]):
                row[n, k] += images[n, other, j, k]


@compiled
def moment_sums(moving: Array, fixed: Array, radius: int, sums: Array, first: int, last: int) -> None:
    """Sums within planes of the moving image, its square, and its product with the fixed one: (3, I, J, K)."""
    _, nj, nk = moving.shape
    rows, plane = np.empty((nj, nk), np.float32), np.empty((nj, nk), np.float32)
    for i in range(first, last):
        _sum_plane(moving[i], radius, rows, sums[0, i])
        for j in range(nj):
            for k in range(nk):
                plane[j, k] = moving[i, j, k] * moving[i, j, k]
        _sum_plane(plane, radius, rows, sums[1, i])
        for j in range(nj):
            for k in range(nk):
                plane[j, k] = moving[i, j, k] * fixed[i, j, k]
        _sum_plane(plane, radius, rows, sums[2, i])


@compiled
def correlation_pulls(
    sums: Array, of_fixed: Any, weight: Array, numbers: Any, pulls: Array, first: int, last: int
) -> float:
    """Weighted sum of one minus the squared local correlation, and what each cube pulls at its voxels with.

    ``sums`` are those of :func:`moment_sums`; ``of_fixed`` are mean and variance in each cube, and one over its voxels;
    ``numbers`` are the radius and the variance of noise. ``pulls`` is (4, I, J, K); see :mod:`.features`.
    """
    mean, variance, inverse_count = of_fixed
    radius, noise = numbers
    _, ni, nj, nk = sums.shape
    row = np.empty((3, nk), np.float32)
    total = 0.0
    for i in range(first, last):
        low, high = max(0, i - radius), min(ni, i + radius + 1)
        for j in range(nj):
            _sum_planes(sums, low, high, j, row)
            for k in range(nk):
                inverse, own = inverse_count[i, j, k], row[0, k] * inverse_count[i, j, k]
                spread = max(row[1, k] * inverse - own * own, np.float32(0)) + noise
                covariance = row[2, k] * inverse - own * mean[i, j, k]
                ratio = covariance / (variance[i, j, k] * spread)
                squared, scale = ratio * covariance, weight[i, j, k] * inverse
                pull, push = scale * ratio, scale * squared / spread
                pulls[0, i, j, k], pulls[1, i, j, k] = pull, pull * mean[i, j, k]
                pulls[2, i, j, k], pulls[3, i, j, k] = push, push * own
                total += weight[i, j, k] * (1 - squared)
    return total


@compiled
def correlation_slopes(
    sums: Array, moving: Array, fixed: Array, radius: int, slopes: Array, first: int, last: int
) -> None:
    """Derivative of the value of :func:`correlation_pulls` by the moving image, from sums of pulls within planes."""
    _, ni, nj, nk = sums.shape
    row = np.empty((4, nk), np.float32)
    for i in range(first, last):
        low, high = max(0, i - radius), min(ni, i + radius + 1)
        for j in range(nj):
            _sum_planes(sums, low, high, j, row)
            for k in range(nk):
                by_fixed, by_moving = row[1, k] - row[0, k] * fixed[i, j, k], row[2, k] * moving[i, j, k] - row[3, k]
                slopes[i, j, k] = np.float32(2) * (by_fixed + by_moving)


@compiled
def patch_distances(image: Array, pairs: Any, result: Array, noise: Array, first: int, last: int) -> None:
    """Mean squared differences of shifted images over 3 x 3 x 3 voxels, less the least of all pairs of shifts.

    ``image`` is (I + 2, J + 2, K + 2), with a border of one voxel; ``pairs``, (12, 2, 3), are shifts of -1 to 1;
    ``result``, (I, J, K, 12), and its mean over the channels, ``noise``, (I, J, K), are computed. Slabs are along I.
    """
    ni, nj, nk = noise.shape
    sums = np.empty((3, _CHANNELS, nj, nk), np.float32)
    squares, rows, means = (
        np.empty((nj, nk), np.float32),
        np.empty((nj, nk), np.float32),
        np.empty((_CHANNELS, nk), np.float32),
    )
    done = max(first - 1, 0)
    for i in range(first, last):
        # Sums over squares of the next plane; those of three planes are kept.
        while done <= min(i + 1, ni - 1):
            for n in range(_CHANNELS):
                ai, aj, ak = 1 + pairs[n, 0, 0], 1 + pairs[n, 0, 1], 1 + pairs[n, 0, 2]
                bi, bj, bk = 1 + pairs[n, 1, 0], 1 + pairs[n, 1, 1], 1 + pairs[n, 1, 2]
                for j in range(nj):
                    for k in range(nk):
                        difference = image[done + ai, j + aj, k + ak] - image[done + bi, j + bj, k + bk]
                        squares[j, k] = difference * difference
                _sum_plane(squares, 1, rows, sums[done % 3, n])
            done += 1
        low, high = max(0, i - 1), min(ni, i + 2)
        for j in range(nj):
            planes = (high - low) * (min(nj, j + 2) - max(0, j - 1))
            for n in range(_CHANNELS):
                for k in range(nk):
                    means[n, k] = sums[low % 3, n, j, k]
                for other in range(low + 1, high):
                    for k in range(nk):
                        means[n, k] += sums[other % 3, n, j, k]
            for k in range(nk):
                inverse = np.float32(1) / np.float32(planes * (min(nk, k + 2) - max(0, k - 1)))
                least, total = means[0, k], means[0, k]
                for n in range(1, _CHANNELS):
                    least = min(least, means[n, k])
                    total += means[n, k]
                for n in range(_CHANNELS):
                    result[i, j, k, n] = (means[n, k] - least) * inverse
                noise[i, j, k] = (total / np.float32(_CHANNELS) - least) * inverse


@compiled
def control_penalties(addition: Array, base: Array, unit: float, weights: Any, slopes: Array) -> float:
    """Penalise gradients of an addition, and folding of its sum with ``base``, both (3, A, B, C) times ``unit``.

    ``weights`` are of the mean squared forward differences along each axis, and of the mean squared shortfall of the
    Jacobian determinant below the third number. Derivatives by the addition are added to ``slopes``.
    """
    smoothness, folding, least_volume = weights
    smoothness *= unit * unit
    _, na, nb, nc = addition.shape
    total = 0.0
    scale_a = 2 * smoothness / max(3 * (na - 1) * nb * nc, 1)
    scale_b = 2 * smoothness / max(3 * na * (nb - 1) * nc, 1)
    scale_c = 2 * smoothness / max(3 * na * nb * (nc - 1), 1)
    for n in range(3):
        for a in range(na):
            for b in range(nb):
                for c in range(nc):
                    here = addition[n, a, b, c]
                    if a + 1 < na:
                        step = scale_a * (addition[n, a + 1, b, c] - here)
                        total += 0.5 * step * (addition[n, a + 1, b, c] - here)
                        slopes[n, a, b, c] -= step
                        slopes[n, a + 1, b, c] += step
                    if b + 1 < nb:
                        step = scale_b * (addition[n, a, b + 1, c] - here)
                        total += 0.5 * step * (addition[n, a, b + 1, c] - here)
                        slopes[n, a, b, c] -= step
                        slopes[n, a, b + 1, c] += step
                    if c + 1 < nc:
                        step = scale_c * (addition[n, a, b, c + 1] - here)
                        total += 0.5 * step * (addition[n, a, b, c + 1] - here)
                        slopes[n, a, b, c] -= step
                        slopes[n, a, b, c + 1] += step
    if folding == 0 or min(na, nb, nc) < 2:
        return total
    scale = folding / ((na - 1) * (nb - 1) * (nc - 1))
    rows = np.empty((3, 3))  # of the Jacobian: component, axis
    for a in range(na - 1):
        for b in range(nb - 1):
            for c in range(nc - 1):
                for n in range(3):
                    here = addition[n, a, b, c] + base[n, a, b, c]
                    rows[n, 0] = unit * (addition[n, a + 1, b, c] + base[n, a + 1, b, c] - here)
                    rows[n, 1] = unit * (addition[n, a, b + 1, c] + base[n, a, b + 1, c] - here)
                    rows[n, 2] = unit * (addition[n, a, b, c + 1] + base[n, a, b, c + 1] - here)
                    rows[n, n] += 1
                determinant = 0.0
                for axis in range(3):
                    p, q = (axis + 1) % 3, (axis + 2) % 3
                    determinant += rows[0, axis] * (rows[1, p] * rows[2, q] - rows[1, q] * rows[2, p])
                shortfall = least_volume - determinant
                if shortfall <= 0:
                    continue
                total += scale * shortfall * shortfall
                for n in range(3):
                    x, y = (n + 1) % 3, (n + 2) % 3
                    for axis in range(3):
                        p, q = (axis + 1) % 3, (axis + 2) % 3
                        cofactor = rows[x, p] * rows[y, q] - rows[x, q] * rows[y, p]
                        step = -2 * scale * shortfall * cofactor * unit
                        slopes[n, a, b, c] -= step
                        slopes[n, a + (axis == 0), b + (axis == 1), c + (axis == 2)] += step
    return total
