"""Engines of other packages: greedy, ANTs, elastix.

Each runs in a process of its own (:mod:`._peer_runner`), by this Python or by another one that has it installed:
a crash of its C++ code is then one failed pair, what it prints stays out of ours, and packages that cannot be
installed beside ours, or whose licence keeps them apart, can be used all the same. Arrays and matrices are exchanged
in files of a temporary folder.

A peer sees both scans on straight grids of about its own setting ``voxels``, as its users would give them.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ..pair import Fitted, Pair, Start
from .peer_runner import MISSING

_RUNNER = Path(__file__).with_name("peer_runner.py")


#: Settings that say where and on what a peer runs; all others are handed on to it.
_OURS = ("python", "voxels", "seed")


#: What a peer said last is cut to this many characters.
_LONGEST_LINE = 300


@dataclass(frozen=True)
class Peer:
    """One row of the table of peers.

    Parameters
    ----------
    name : str
        For messages.
    distribution : str
        As ``pip install`` knows it.
    extra : str
        Of this package, that brings it; empty where it cannot be installed beside this package.
    """

    name: str
    distribution: str
    extra: str


#: By name of the engine, which is that of its settings too.
PEERS: Mapping[str, Peer] = {
    "greedy": Peer("greedy", "picsl_greedy", "greedy"),
    # antspyx 0.6.3 holds numpy below 2.4 and scipy below 1.16.
    "ants": Peer("ANTs", "antspyx", ""),
    "elastix": Peer("elastix", "itk-elastix", "elastix"),
}


def require(settings: RegistrationSettings) -> None:
    """Check that the engine chosen can run, before hours of work that need it.

    Raises
    ------
    InputError
        If the Python named for it is no program.
    MissingExtraError
        If it is not installed there.
    """
    python, origin = _python(settings)
    if not _is_installed(settings.engine, python):
        raise _missing(settings.engine, python, origin)


def fit(
    pair: Pair,
    linear: Affine | None,
    start: Start | None,  # noqa: ARG001
    settings: RegistrationSettings,
    device: str,  # noqa: ARG001
) -> Fitted:
    """Have the engine ``settings.engine`` register one pair.

    Parameters
    ----------
    pair : Pair
        Query and atlas; taken as they came, not as they were prepared for our own engines.
    linear : Affine or None
        Fixed to moving world, to be kept; None if the peer is to do those linear stages that are switched on.
    start : None
        No peer takes one.
    device : str
        Peers compute on the CPU whatever it says.

    Returns
    -------
    Fitted
        Its field lies on the peer's grid.

    Raises
    ------
    InputError
        If the Python named for the peer is no program.
    MissingExtraError
        If it is not installed there.
    RegistrationError
        If it gives up, or gives no usable result.
    """
    return _exchange(pair, linear, settings)[0]


def working_spacing_mm(grid: Grid, voxels: int) -> float:
    """Spacing in mm along the finest axes that gives a peer about ``voxels`` voxels over a field of view.

    It is never below the finest spacing of the scan. See :func:`working_grid` for the coarser axes.
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
    """The grid that a peer sees a scan on: over the same voxel centres, axes closest to R, A, S, at right angles.

    Slices thicker than ``spacing_mm`` become half as thick as it, on a logarithmic scale: 7.7 mm at 2.4 mm become
    4.3 mm. So the windows of local correlation, which count voxels, are not drawn out, and little is invented.
    """
    spacing = _axis_spacings(grid.canonical().spacing_mm, spacing_mm)
    return pyramid.frame_grid(grid, pyramid.axes_of(grid), spacing)


def _axis_spacings(native_mm: NDArray[np.float64], spacing_mm: float) -> NDArray[np.float64]:
    """(3,) mm: the wanted spacing, or its geometric mean with that of an axis that is coarser."""
    return np.sqrt(spacing_mm * np.maximum(native_mm, spacing_mm))


def _on(grid: Grid, scan: Volume) -> NDArray[np.float32]:
    """A scan smoothed as the spacing of a working grid asks for and sampled there, its darkest value made 0.

    0 is what peers take beyond the field of view. Intensities keep their scale otherwise.
    """
    scan = scan.canonical()
    data = scan.data - scan.data.min()
    # Half the ratio of spacings, less the half voxel that sampling itself blurs by, as for our own engines.
    ratio = 0.5 * grid.spacing_mm / scan.grid.spacing_mm
    for axis, sigma in enumerate(np.sqrt(np.maximum(ratio**2 - 0.25, 0))):
        # Spacings that differ by rounding alone are the same.
        if sigma > 0.05:
            data = ndimage.gaussian_filter1d(data, sigma, axis=axis, mode="nearest")
    return resample(Volume(data, scan.grid), grid)


def _exchange(
    pair: Pair, linear: Affine | None, settings: RegistrationSettings, *, reslice: bool = False
) -> tuple[Fitted, Volume | None]:
    """Run the peer; with ``reslice``, its own warped atlas on its grid too."""
    peer, options = PEERS[settings.engine], _options(settings)
    python, origin = _python(settings)
    spacing = working_spacing_mm(pair.fixed.grid, options.voxels)
    fixed, moving = working_grid(pair.fixed.grid, spacing), working_grid(pair.moving.grid, spacing)
    threads = torch.get_num_threads()
    request = {
        "peer": settings.engine,
        "threads": threads,
        "seed": options.seed,
        "rigid": settings.rigid,
        "affine": settings.affine,
        "deformable": settings.deformable,
        "linear": None if linear is None else linear.matrix.tolist(),
        "reslice": reslice,
        "fixed_affine": fixed.affine.tolist(),
        "moving_affine": moving.affine.tolist(),
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name not in _OURS},
    }
    with tempfile.TemporaryDirectory(prefix="atlassegfm-peer-") as name:
        folder = Path(name)
        np.save(folder / "fixed.npy", _on(fixed, pair.fixed))
        np.save(folder / "moving.npy", _on(moving, pair.moving))
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        log = folder / "log.txt"
        with log.open("wb") as file:
            code = _run([python, str(_RUNNER), name], file, _environment(python, threads, options.seed))
        if code == MISSING:
            raise _missing(settings.engine, python, origin)
        if code:
            raise RegistrationError(f"{peer.name} gave up ({_ending(code, log)})")
        try:
            found = np.load(folder / "linear.npy")
            moved = np.load(folder / "displacement.npy") if settings.deformable else None
            resliced = np.load(folder / "resliced.npy") if reslice else None
            parameters = json.loads((folder / "parameters.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RegistrationError(f"{peer.name} left no result that can be read ({error})") from None
    if found.shape != (4, 4) or not np.isfinite(found).all() or np.linalg.det(found[:3, :3]) <= 0:
        raise RegistrationError(f"{peer.name} found a linear map that mirrors or flattens space: {found.tolist()}")
    field = None
    if moved is not None:
        if moved.shape != (3, *fixed.shape) or not np.isfinite(moved).all():
            raise RegistrationError(f"{peer.name} left a displacement field with gaps, of shape {moved.shape}")
        field = DisplacementField(fixed, moved)
    return Fitted(Affine(found), field, parameters), None if resliced is None else Volume(resliced, fixed)


def _options(settings: RegistrationSettings) -> GreedySettings | AntsSettings | ElastixSettings:
    options: GreedySettings | AntsSettings | ElastixSettings = getattr(settings, settings.engine)
    return options


def _python(settings: RegistrationSettings) -> tuple[str, str]:
    """The Python that runs a peer, and what named it; empty if nothing did and it is this one."""
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
    command = [python, str(_RUNNER), "--check", engine]
    return _run(command, subprocess.DEVNULL, _environment(python, threads=1, seed=1)) == 0


def _missing(engine: str, python: str, origin: str) -> MissingExtraError:
    """The error for a peer that is not installed, with what to do."""
    peer = PEERS[engine]
    feature = f"the engine {engine!r}"
    if origin:
        return MissingExtraError(feature, peer.extra, f"{python} -m pip install {peer.distribution}")
    if peer.extra:
        return MissingExtraError(feature, peer.extra)
    folder = f"{engine}-env"
    return MissingExtraError(
        feature,
        peer.extra,
        f"python3 -m venv {folder} && {folder}/bin/pip install {peer.distribution} && "
        f"export ATLASSEGFM_{engine.upper()}_PYTHON=$PWD/{folder}/bin/python "
        "(an environment of its own, because it needs older packages than this one)",
    )


def _environment(python: str, threads: int, seed: int) -> dict[str, str]:
    environment = dict(os.environ)
    if python != sys.executable:
        # They are about this Python; another one would find packages built for this one.
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
    """How a program ended and what it said last, in words."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1][:_LONGEST_LINE] if lines else "it said nothing"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; it said last: {said}"
    return said
