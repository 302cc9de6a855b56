"""Compute device, reproducibility and memory errors of PyTorch."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InputError, ModelError
from .text import did_you_mean

DEVICES = ("auto", "cpu", "cuda")


def resolve_device(name: str) -> str:
    """Turn "auto", "cpu" or "cuda" into "cpu" or "cuda"; InputError for another name, ModelError without a GPU."""
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}{did_you_mean(name, DEVICES)}; expected one of {', '.join(DEVICES)}")
    if name == "cpu":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ModelError("the device 'cuda' was asked for and PyTorch sees no CUDA GPU; use the device 'cpu' or 'auto'")
    return "cpu"


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed PyTorch and ask it for algorithms that give the same bits twice, and restore it.

    Nothing in this package draws from NumPy's global generator.
    """
    import torch

    # Read by cuBLAS when it starts; without it some matrix products are not reproducible.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not torch.use_deterministic_algorithms: that loads PyTorch's compiler, for seconds.
    before = torch.get_deterministic_debug_mode()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # A few CUDA kernels exist in one form only: they are used without a warning.
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.manual_seed(seed)
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the memory errors of PyTorch and NumPy into :class:`ModelError`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError("the GPU ran out of memory; use the device 'cpu', or crop the scan") from None
    except MemoryError:
        raise ModelError("the machine ran out of memory; crop the scan, or use a larger machine") from None
