"""Run one registration by an engine of another package, in a process of its own.

Run as ``python external_process.py FOLDER`` by whichever Python has the engine's package installed, so with nothing but
numpy, the standard library and that package, and nothing newer than Python 3.9. Geometry is RAS+ mm, matrices are
homogeneous, 4 x 4. ``FOLDER`` holds

- ``request.json``: ``engine``, ``threads``, ``seed``, ``rigid``, ``affine``, ``deformable``, ``linear`` (fixed to
  moving world, or null: the engine fits it), ``fixed_affine``, ``moving_affine`` (voxel to world, axes at right angles)
  and ``options``, the settings of the engine;
- ``fixed.npy``, ``moving.npy``: (I, J, K) float32.

It gets ``linear.npy`` (4, 4), ``parameters.json`` (parameters optimised by stage), and where wanted
``displacement.npy``, (3, I, J, K) float32 on the fixed grid, applied before ``linear``.

``python external_process.py --check ENGINE`` only tests whether the package is installed. The exit code is 0 on
success, :data:`MISSING` if it is not.

The file beside this one named after the engine has ``MODULES``, which must be installed, and ``register(fixed, moving,
given, request)``: two :class:`Image`, the linear map given or None, and the request; it returns the linear map (RAS+),
the displacement (RAS+) or None, and the parameter count of the deformable stage.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__" and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # Python puts the folder of a program first; its neighbours here would hide other packages' modules.
    del sys.path[0]

#: Exit code where the package is not installed.
MISSING = 3
#: RAS+ from ITK's LPS and back.
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


class Image:
    """An array and its geometry as ITK has it: LPS origin, spacing and unit axes in columns; ``affine`` is RAS+."""

    def __init__(self, data: Any, affine: Any) -> None:
        self.data, self.affine = data, affine
        lps = _FLIP @ affine
        self.spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
        self.direction, self.origin = lps[:3, :3] / self.spacing, lps[:3, 3]

    def nodes(self) -> Any:
        """(3, I, J, K) voxel centres, RAS+ mm."""
        ijk = np.indices(self.data.shape, dtype=np.float64)
        return np.einsum("ab,bijk->aijk", self.affine[:3, :3], ijk) + self.affine[:3, 3][:, None, None, None]

    @staticmethod
    def flip(matrix: Any) -> Any:
        """Convert a (4, 4) map from RAS+ to LPS or back."""
        return _FLIP @ matrix @ _FLIP

    @staticmethod
    def to_ras(lps: Any) -> Any:
        """Convert (I, J, K, 3) displacements in LPS mm to (3, I, J, K) in RAS+ mm."""
        return np.moveaxis(np.asarray(lps, dtype=np.float64), -1, 0) * np.array([-1.0, -1.0, 1.0])[:, None, None, None]


def main(arguments: list[str]) -> int:
    """Check for an engine or run the request of a folder; the exit code."""
    only_check, folder = arguments[0] == "--check", Path(arguments[0])
    request = {} if only_check else json.loads((folder / "request.json").read_text(encoding="utf-8"))
    engine = load(arguments[1] if only_check else request["engine"])
    if any(importlib.util.find_spec(module) is None for module in engine.MODULES):
        return MISSING
    if only_check:
        return 0
    fixed = Image(np.load(folder / "fixed.npy"), np.array(request["fixed_affine"]))
    moving = Image(np.load(folder / "moving.npy"), np.array(request["moving_affine"]))
    given = None if request["linear"] is None else np.array(request["linear"])
    os.chdir(folder)  # engines leave files where they run
    linear, displacement, parameter_count = engine.register(fixed, moving, given, request)
    counts = {} if given is not None else {"linear": 12 if request["affine"] else 6}
    if displacement is not None:
        np.save(folder / "displacement.npy", np.ascontiguousarray(displacement, dtype=np.float32))
        counts["deformable"] = int(parameter_count)
    (folder / "parameters.json").write_text(json.dumps(counts), encoding="utf-8")
    # Last, and whole: its presence says that all is there.
    np.save(folder / "linear.npy", np.asarray(linear, dtype=np.float64))
    return 0


def load(engine: str) -> Any:
    """Load the file of an engine under a name that hides no other package."""
    spec = importlib.util.spec_from_file_location(f"_engine_{engine}", Path(__file__).with_name(f"{engine}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(engine)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
