"""Loops over voxels, compiled by Numba and computed in slabs by the program's own threads.

Slabs are the same with any number of threads, and sums are added up slab by slab in their order, so that results are
identical. Numba's own threads are not used: kernels release the interpreter lock, and :func:`.parallel.parallel_map`
keeps to the limits of the program and its worker processes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from .parallel import parallel_map

#: Slabs of a job, at most: enough to keep four threads busy to the end; and voxels or points of each, at least.
_SLABS, _SLAB_SIZE = 8, 15_000
#: Slabs computed at a time, at most, and the voxels or points from which that pays.
_MOST_PARALLEL, _SMALL_SIZE = 4, 30_000
#: Sums may be taken in the order that vector registers suggest, and products added without rounding in between.
_FLOATING_POINT = {"reassoc", "contract", "nsz", "arcp"}

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function at its first call, for the types it is called with; kept on disk for the next process.

    The compiled code lies beside the module or in the user's cache (``NUMBA_CACHE_DIR``); where neither can be written
    to, it is compiled by each process anew.
    """
    import numba

    options: dict[str, Any] = {"nogil": True, "fastmath": _FLOATING_POINT, "error_model": "numpy"}
    try:
        return cast("F", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no place for a cache
        return cast("F", numba.njit(**options)(function))


def inlined(function: F) -> F:
    """Mark a helper that compiled functions call: it becomes a part of each of them.

    Called as a function, the code just compiled and that kept on disk may hold two copies of it that round differently.
    """
    import numba

    return cast("F", numba.njit(inline="always", error_model="numpy")(function))


def is_kept(function: Callable[..., Any]) -> bool:
    """Check whether a compiled function was kept on disk by an earlier process, or compiled by this one."""
    stats = function.stats  # type: ignore[attr-defined]
    if stats.cache_hits or stats.cache_misses or stats.cache_path is None:
        return True
    name = function.py_func.__name__  # type: ignore[attr-defined]
    return any(Path(stats.cache_path).glob(f"kernels.{name}-*.nbi"))


def in_slabs(kernel: Callable[[int, int], Any], length: int, size: int = _SMALL_SIZE) -> list[Any]:
    """Call ``kernel`` with the first and one past the last index of each slab; what it returned, in order.

    ``size`` is the number of voxels or points of all: few are computed in the calling thread, sooner than others start.
    """
    most = _MOST_PARALLEL if size >= _SMALL_SIZE else 1
    count = min(_SLABS, max(size // _SLAB_SIZE, 1))
    bounds = [length * n // count for n in range(count + 1)]
    parts = [(first, last) for first, last in pairwise(bounds) if last > first]
    return list(parallel_map(lambda part: kernel(*part), parts, most=most))
