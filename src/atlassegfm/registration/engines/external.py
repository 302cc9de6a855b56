"""Engines of other packages (greedy, ANTs, elastix), each pair in a process of its own.

It is run by this Python or another one that has the package; arrays and matrices are exchanged in files of a temporary
folder (:mod:`.external_process`). An engine sees both scans on straight grids of about its own setting ``voxels``.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ...core.errors import InputError, MissingExtraError, RegistrationError
from ...core.geometry import Grid
from ...core.image import Volume
from ...settings import AntsSettings, ElastixSettings, GreedySettings, RegistrationSettings
from ...transforms.maps import Affine, DisplacementField
from ...transforms.resample import resample
from .. import pyramid
from ..result import Registration
from . import ENGINES
from .external_process import MISSING

if TYPE_CHECKING:
    from ..pair import Pair, Start

_PROGRAM = Path(__file__).with_name("external_process.py")
#: Settings that say where and on what an engine runs; all others are handed on to it.
_OURS = ("python", "voxels", "seed")
#: The last line of an engine's output is cut to this many characters.
_LONGEST_LINE = 300


def require(settings: RegistrationSettings) -> None:
    """Check that the engine chosen can run; see :func:`.require_engine`."""
    python, origin = _python(settings)
    if not _is_installed(settings.engine, python):
        raise _missing(settings.engine, python, origin)


def fit(
    pair: Pair,
    linear: Affine | None,
    start: Start | None,  # noqa: ARG001
    settings: RegistrationSettings,
    device: str,  # noqa: ARG001
) -> Registration:
    """Register one pair by the engine ``settings.engine``, on the CPU; the field lies on the engine's grid.

    ``linear``, fixed to moving world, is kept; None if the engine does those linear stages that are switched on.

    Raises
    ------
    InputError
        If the Python named for the engine is no program.
    MissingExtraError
        If it is not installed there.
    RegistrationError
        If it gives up, or gives no usable result.
    """
    title, options = ENGINES[settings.engine].title, _options(settings)
    python, origin = _python(settings)
    spacing = working_spacing_mm(pair.fixed.grid, options.voxels)
    fixed, moving = working_grid(pair.fixed.grid, spacing), working_grid(pair.moving.grid, spacing)
    threads = torch.get_num_threads()
    request = {
        "engine": settings.engine,
        "threads": threads,
        "seed": options.seed,
        "rigid": settings.rigid,
        "affine": settings.affine,
        "deformable": settings.deformable,
        "linear": None if linear is None else linear.matrix.tolist(),
        "fixed_affine": fixed.affine.tolist(),
        "moving_affine": moving.affine.tolist(),
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name not in _OURS},
    }
    with tempfile.TemporaryDirectory(prefix="atlassegfm-engine-") as name:
        folder = Path(name)
        np.save(folder / "fixed.npy", _on_grid(pair.fixed, fixed))
        np.save(folder / "moving.npy", _on_grid(pair.moving, moving))
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        log = folder / "log.txt"
        with log.open("wb") as file:
            code = _run([python, str(_PROGRAM), name], file, _environment(python, threads, options.seed))
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
    field = None
    if moved is not None:
        if moved.shape != (3, *fixed.shape) or not np.isfinite(moved).all():
            raise RegistrationError(f"{title} left a displacement field with gaps, of shape {moved.shape}")
        field = DisplacementField(fixed, moved)
    return Registration(Affine(found), field, parameter_count=parameter_count)


def working_spacing_mm(grid: Grid, voxels: int) -> float:
    """Compute the spacing in mm along the finest axes that gives at most about ``voxels`` voxels over a field of view.

    Never below the finest spacing of the scan. See :func:`working_grid` for the coarser axes.
    """
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
    spacing = _axis_spacings(grid.canonical().spacing_mm, spacing_mm)
    return pyramid.frame_grid(grid, pyramid.axes_of(grid), spacing)


def _axis_spacings(native_mm: NDArray[np.float64], spacing_mm: float) -> NDArray[np.float64]:
    """(3,) mm: the wanted spacing, or its geometric mean with that of an axis that is coarser."""
    return np.sqrt(spacing_mm * np.maximum(native_mm, spacing_mm))


def _on_grid(scan: Volume, grid: Grid) -> NDArray[np.float32]:
    """A scan smoothed and sampled on a working grid, its darkest value 0, as beyond its field of view."""
    scan = scan.canonical()
    data = scan.data - scan.data.min()
    # Half the ratio of spacings, less the half voxel that sampling itself blurs by, as for our own engines.
    ratio = 0.5 * grid.spacing_mm / scan.grid.spacing_mm
    for axis, sigma in enumerate(np.sqrt(np.maximum(ratio**2 - 0.25, 0))):
        # Spacings that differ by rounding alone are the same.
        if sigma > 0.05:
            data = ndimage.gaussian_filter1d(data, sigma, axis=axis, mode="nearest")
    return resample(Volume(data, scan.grid), grid)


def _options(settings: RegistrationSettings) -> GreedySettings | AntsSettings | ElastixSettings:
    options: GreedySettings | AntsSettings | ElastixSettings = getattr(settings, settings.engine)
    return options


def _python(settings: RegistrationSettings) -> tuple[str, str]:
    """The Python that runs the engine, and the setting or variable that names it; empty if it is this one."""
    variable = f"ATLASSEGFM_{settings.engine.upper()}_PYTHON"
    named = (
        (_options(settings).python, f"registration.{settings.engine}.python"),
        (os.environ.get(variable, ""), variable),
    )
    for python, origin in named:
        if python:
            if not os.access(python, os.X_OK) or Path(python).is_dir():
                raise InputError(f"{origin} is {python!r}; expected the path of a Python, such as /opt/env/bin/python")
            return python, origin
    return sys.executable, ""


@functools.cache
def _is_installed(engine: str, python: str) -> bool:
    command = [python, str(_PROGRAM), "--check", engine]
    return _run(command, subprocess.DEVNULL, _environment(python, threads=1, seed=1)) == 0


def _missing(engine: str, python: str, origin: str) -> MissingExtraError:
    """The error for an engine that is not installed, with the remedy."""
    row = ENGINES[engine]
    feature = f"the engine {engine!r}"
    if origin:
        return MissingExtraError(feature, row.extra, f"{python} -m pip install {row.distribution}")
    if row.extra:
        return MissingExtraError(feature, row.extra)
    folder = f"{engine}-env"
    return MissingExtraError(
        feature,
        row.extra,
        f"python3 -m venv {folder} && {folder}/bin/pip install {row.distribution} && "
        f"export ATLASSEGFM_{engine.upper()}_PYTHON=$PWD/{folder}/bin/python "
        "(an environment of its own, because it needs older packages than this one)",
    )


def _environment(python: str, threads: int, seed: int) -> dict[str, str]:
    environment = dict(os.environ)
    if python != sys.executable:
        # They are about packages built for this Python.
        environment.pop("PYTHONPATH", None)
        environment.pop("PYTHONHOME", None)
    return environment | {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(threads),
        "ANTS_RANDOM_SEED": str(seed),
    }


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
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; it said last: {said}"
    return said
