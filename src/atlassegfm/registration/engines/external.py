"""Engines of other packages (greedy, ANTs, elastix), each pair in a process of its own.

It is run by this Python or another one that has the package; arrays and matrices are exchanged in files of a temporary
folder (:mod:`.external_process`). An engine sees both scans on orthogonal grids of about its setting ``voxels``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.errors import InputError, MissingExtraError, RegistrationError
from ...core.geometry import Grid
from ...core.image import Volume
from ...settings import RegistrationSettings
from ...transforms.maps import Affine, DisplacementField
from ...transforms.resample import resample
from ..pyramid import Pair, Start, frame_grid, smooth
from ..result import Registration
from . import ENGINES
from .external_process import MISSING

_PROGRAM = Path(__file__).with_name("external_process.py")
#: The last line of an engine's output is cut to this many characters.
_LONGEST_LINE = 300


def require(settings: RegistrationSettings) -> None:
    """Check that the engine chosen can run; see :func:`.require_engine`."""
    python, origin = _python(settings)
    if not _is_installed(settings.engine, python):
        raise _missing(settings.engine, python, origin)


def fit(
    pair: Pair, linear: Affine | None, _start: Start | None, settings: RegistrationSettings, _device: str
) -> Registration:
    """Register one pair by the engine ``settings.engine``, on the CPU; the field lies on the engine's grid.

    ``linear``, fixed to moving world, is kept; None if the engine does those linear stages that are switched on. Raises
    errors as of :func:`.require_engine`, and :class:`.RegistrationError` if it gives up or gives no usable result.
    """
    title, threads = ENGINES[settings.engine].title, torch.get_num_threads()
    python, origin = _python(settings)
    options = dataclasses.asdict(getattr(settings, settings.engine))
    del options["python"]
    spacing, seed = working_spacing_mm(pair.fixed.grid, options.pop("voxels")), options.pop("seed")
    fixed, moving = working_grid(pair.fixed.grid, spacing), working_grid(pair.moving.grid, spacing)
    request = {
        "engine": settings.engine,
        "threads": threads,
        "seed": seed,
        **{stage: getattr(settings, stage) for stage in ("rigid", "affine", "deformable")},
        "linear": None if linear is None else linear.matrix.tolist(),
        "fixed_affine": fixed.affine.tolist(),
        "moving_affine": moving.affine.tolist(),
        "options": options,
    }
    with tempfile.TemporaryDirectory(prefix="atlassegfm-engine-") as name:
        folder = Path(name)
        np.save(folder / "fixed.npy", _on_grid(pair.fixed, fixed))
        np.save(folder / "moving.npy", _on_grid(pair.moving, moving))
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        log = folder / "log.txt"
        with log.open("wb") as file:
            code = _run([python, str(_PROGRAM), name], file, _environment(python, threads, seed))
        if code == MISSING:
            raise _missing(settings.engine, python, origin)
        if code:
            raise RegistrationError(f"{title} gave up ({_ending(code, log)})")
        try:
            found = np.load(folder / "linear.npy")
            moved = np.load(folder / "displacement.npy") if settings.deformable else None
            parameter_count = json.loads((folder / "parameters.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RegistrationError(f"{title} left no result that can be read ({error})") from None
    if found.shape != (4, 4) or not np.isfinite(found).all() or np.linalg.det(found[:3, :3]) <= 0:
        raise RegistrationError(f"{title} found a linear map that mirrors or flattens space: {found.tolist()}")
    if moved is not None and (moved.shape != (3, *fixed.shape) or not np.isfinite(moved).all()):
        raise RegistrationError(f"{title} left a displacement field with gaps, of shape {moved.shape}")
    field = None if moved is None else DisplacementField(fixed, moved)
    return Registration(Affine(found), field, parameter_count=parameter_count)


def working_spacing_mm(grid: Grid, voxels: int) -> float:
    """Compute the spacing of the finest axes at which a scan has at most about ``voxels``, never below its own."""
    native: NDArray[np.float64] = grid.spacing_mm
    extent = np.array(grid.shape) * native

    def count(spacing: float) -> float:
        return float(np.prod(extent / _axis_spacings(native, spacing)))

    low = float(native.min())
    if count(low) <= voxels:
        return low
    high = max(low, float(native.max()), float((np.prod(extent) / voxels) ** (1 / 3)))
    for _ in range(50):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if count(middle) > voxels else (low, middle)
    return high


def working_grid(grid: Grid, spacing_mm: float) -> Grid:
    """Make the grid on which an engine sees a scan: over the same voxel centres, axes closest to R, A, S, orthogonal.

    An axis coarser than ``spacing_mm`` gets the geometric mean of both: 7.7 mm at 2.4 mm become 4.3 mm. So windows of
    local correlation, which count voxels, are not drawn out, and little is interpolated.
    """
    return frame_grid(grid, _axis_spacings(grid.canonical().spacing_mm, spacing_mm))


def _axis_spacings(native_mm: NDArray[np.float64], spacing_mm: float) -> NDArray[np.float64]:
    """(3,) mm: the wanted spacing, or its geometric mean with that of an axis that is coarser."""
    return np.sqrt(spacing_mm * np.maximum(native_mm, spacing_mm))


def _on_grid(scan: Volume, grid: Grid) -> NDArray[np.float32]:
    """A scan smoothed and sampled on a working grid, its darkest value 0, as beyond its field of view."""
    return resample(smooth(Volume(scan.data - scan.data.min(), scan.grid), grid), grid)


def _python(settings: RegistrationSettings) -> tuple[str, str]:
    """The Python that runs the engine, and the setting or variable that names it; empty if it is this one."""
    python, origin = getattr(settings, settings.engine).python, f"registration.{settings.engine}.python"
    if not python:
        origin = f"ATLASSEGFM_{settings.engine.upper()}_PYTHON"
        python = os.environ.get(origin)
    if not python:
        return sys.executable, ""
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise InputError(f"{origin} is {python!r}; expected the path of a Python, such as /opt/env/bin/python")
    return python, origin


@functools.cache
def _is_installed(engine: str, python: str) -> bool:
    command = [python, str(_PROGRAM), "--check", engine]
    return _run(command, subprocess.DEVNULL, _environment(python, threads=1, seed=1)) == 0


def _missing(engine: str, python: str, origin: str) -> MissingExtraError:
    """The error for an engine that is not installed, with the remedy."""
    row, remedy = ENGINES[engine], ""
    if origin:
        remedy = f"{python} -m pip install {row.distribution}"
    elif not row.extra:
        remedy = f"python3 -m venv {engine}-env && {engine}-env/bin/pip install {row.distribution} && "
        remedy += f"export ATLASSEGFM_{engine.upper()}_PYTHON=$PWD/{engine}-env/bin/python "
        remedy += "(an environment of its own, because it needs older packages than this one)"
    return MissingExtraError(f"the engine {engine!r}", row.extra, remedy)


def _environment(python: str, threads: int, seed: int) -> dict[str, str]:
    ours = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME")  # about packages built for this Python
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | dict.fromkeys(names, str(threads)) | {"ANTS_RANDOM_SEED": str(seed)}


def _run(command: list[str], output: Any, environment: dict[str, str]) -> int:
    """Run a program that reads nothing; its exit code, negative if a signal ended it."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    except OSError as error:
        raise InputError(f"{command[0]}: does not run ({error.strerror or error}); expected a Python") from None


def _ending(code: int, log: Path) -> str:
    """Last line of a program's output, and the signal that ended it."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1][:_LONGEST_LINE] if lines else "it said nothing"
    return f"ended by {signal.Signals(-code).name}; it said last: {said}" if code < 0 else said
