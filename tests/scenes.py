"""A small made-up patient that can be scanned on any grid: fast enough to run the whole program on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlassegfm import demo
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.labels import Structure

#: Value, name, centre and radii in mm, grey value. The values are not in a row, as in real label maps.
ORGANS = (
    (1, "liver", (13.0, 4.0, -2.0), (17.0, 14.0, 15.0), 160.0),
    (7, "kidney", (-19.0, -9.0, -9.0), (13.0, 12.0, 15.0), 220.0),
    (12, "node", (-9.0, 13.0, 18.0), (6.0, 6.0, 7.0), 40.0),
)
STRUCTURES = tuple(Structure(value, name, (10 * value, 200, 50)) for value, name, *_ in ORGANS)
BODY_RADII = (40.0, 32.0, 60.0)


def straight_grid(
    shape: tuple[int, int, int] = (48, 40, 36), spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)
) -> Grid:
    """RAS axes, the origin of the world near the middle; all numbers exact in binary."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -np.floor(np.array(shape) / 2) * spacing_mm
    return Grid(shape, affine)


def centred_grid(affine: NDArray[np.float64], shape: tuple[int, int, int] = (40, 36, 30)) -> Grid:
    """Axes of an affine, with the origin of the world in the middle."""
    moved = affine.copy()
    moved[:3, 3] -= Grid(shape, affine).centre_mm
    return Grid(shape, moved)


@dataclass(frozen=True)
class Patient:
    """The scene, moved: ``shift_mm`` to the right, front and head, and ``scale`` times as large."""

    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    def scan(self, grid: Grid) -> Volume:
        """Intensities, float32: noise-free, with texture that is fixed to the body."""
        points = self._points(grid)
        x, y, z = np.moveaxis(points, -1, 0)
        texture = 12 * np.sin(x / 5) * np.cos(y / 6) + 12 * np.sin(z / 7 + x / 11)
        data = np.where(_distance(points, (0, 0, 0), BODY_RADII) <= 1, 100 + texture, 0.0)
        for _, _, centre, radii, grey in ORGANS:
            inside = np.clip((1 - _distance(points, centre, radii)) * 8 + 0.5, 0, 1)
            data = data * (1 - inside) + (grey + texture / 3) * inside
        return Volume(data.astype(np.float32), grid)

    def labels(self, grid: Grid) -> Volume:
        """True labels, uint8."""
        points = self._points(grid)
        data = np.zeros(grid.shape, np.uint8)
        for value, _, centre, radii, _ in ORGANS:
            data[_distance(points, centre, radii) <= 1] = value
        return Volume(data, grid)

    def _points(self, grid: Grid) -> NDArray[np.float64]:
        world = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
        return (world - self.shift_mm) / self.scale


ATLAS = Patient()
#: Another patient, a few mm off: near enough for a result without any registration.
QUERY = Patient(shift_mm=(1.5, -2.0, 1.0), scale=1.05)


def save_demo_pair(folder: Path, grid: Grid) -> Path:
    """The scenes under the names of the embedded pair, in a folder of their own."""
    folder.mkdir()
    save_volume(ATLAS.scan(grid), folder / demo.ATLAS)
    save_volume(ATLAS.labels(grid), folder / demo.LABELS, structures=STRUCTURES)
    save_volume(QUERY.scan(grid), folder / demo.QUERY)
    save_volume(QUERY.labels(grid), folder / demo.REFERENCE, structures=STRUCTURES)
    return folder


#: Trust the scanner's coordinates: no registration, so that what comes after it is tested fast and alone.
#: The default gate, trained in no time.
QUICK_GATE = ("fusion.correction.iterations=5",)
#: Nothing but eq. 5 of the paper, without training: for tests whose subject is another.
PAPER_GATE = ("fusion.gate=paper", "fusion.iterations=0", "fusion.start=0.5")
UNREGISTERED = ("registration.rigid=false", "registration.affine=false", "registration.deformable=false")


def _distance(
    points: NDArray[np.float64], centre: tuple[float, float, float], radii: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Distance from an ellipsoid's centre, 1 on its surface."""
    distance: NDArray[np.float64] = np.sqrt((((points - centre) / radii) ** 2).sum(axis=-1))
    return distance
