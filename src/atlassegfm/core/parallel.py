"""Threads, environment variables and memory of a process."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

#: Read by OpenMP (PyTorch), its linear algebra, and ITK, when they are loaded.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
#: Linear algebra of NumPy and SciPy: always one, as its matrices are small, and as it cannot be changed later.
NUMPY_THREADS = ("OPENBLAS_NUM_THREADS", "1")
#: Parts of one job computed at a time, at most: each takes memory of its own.
_MOST_PARALLEL = 4

T = TypeVar("T")
R = TypeVar("R")

_here = threading.local()


def usable_cores() -> int:
    """Processor cores that this process may use: a scheduler may have given it a part of the machine."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def parallel_map(work: Callable[[T], R], parts: Iterable[T], *, most: int = _MOST_PARALLEL) -> Iterator[R]:
    """Apply a function to parts of a job in threads; results are identical with any number of threads.

    For work in NumPy and SciPy, which release the interpreter lock. The number of threads is ``OMP_NUM_THREADS``, or
    the number of cores, at most ``most``. A nested call runs in its own thread only. Parts are taken a few ahead;
    yields what ``work`` returned, in their order.
    """
    count = 1 if most == 1 or getattr(_here, "is_part", False) else min(_allowed_threads(), most)
    if count <= 1:
        yield from map(work, parts)
        return
    with ThreadPoolExecutor(count, initializer=setattr, initargs=(_here, "is_part", True)) as pool:
        under_way: deque[Future[R]] = deque()
        try:
            for part in parts:
                under_way.append(pool.submit(work, part))
                if len(under_way) > count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _allowed_threads() -> int:
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdecimal() else usable_cores()


def thread_variables(count: int) -> dict[str, str]:
    """Get the environment variables under which a program computes with this many threads."""
    return {**dict.fromkeys(_VARIABLES, str(count)), NUMPY_THREADS[0]: NUMPY_THREADS[1]}


@contextmanager
def changed_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started meanwhile, and restore them."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads, at least 1, in this thread of the program, and restore it; None for no change."""
    if count is None:
        yield
        return
    with changed_environment(thread_variables(count)):
        import torch

        before: list[tuple[Callable[[int], object], int]] = [(torch.set_num_threads, torch.get_num_threads())]
        with suppress(ImportError):  # of an extra
            from SimpleITK import ProcessObject as itk

            before.append((itk.SetGlobalDefaultNumberOfThreads, itk.GetGlobalDefaultNumberOfThreads()))
        for set_threads, _ in before:
            set_threads(count)
        try:
            yield
        finally:
            for set_threads, number in before:
                set_threads(number)


#: Where Linux shows a process its memory, and takes the request to begin a new peak ("5": proc(5)).
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> bool:
    """Begin a new peak at what is in use now; False where the system cannot, and the peak stays that of the process."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_mb() -> int | None:
    """Largest resident memory since the last reset, or of the process so far; None where the system has no figure."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024)
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
