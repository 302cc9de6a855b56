"""Where voxels are in the world.

World coordinates are RAS+ millimetres: x grows to the patient's right, y to the front (anterior), z to the head
(superior). Voxel indices (i, j, k) count voxel *centres* along the three array axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

#: Axes are called singular when those of unit length span less than this volume: orthogonal ones 1, a tilt of 30° 0.87.
_SMALLEST_UNIT_AXES_VOLUME = 1e-3
#: One voxel axis is shorter than another by no more than this factor: 0.5 um pixels in a slice of 100 mm have 5e-6.
_SMALLEST_AXIS_RATIO = 1e-6

#: RAS+ from the LPS frame of ITK and DICOM, and back.
LPS_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def box_corners(first: ArrayLike, last: ArrayLike) -> NDArray[Any]:
    """(8, 3) corners of a box between two opposite ones, (3,) each."""
    return np.array(np.meshgrid(*zip(np.asarray(first), np.asarray(last), strict=True), indexing="ij")).reshape(3, 8).T


#: Slices are thick where they lie this many times as far apart as their pixels.
_THICK_SLICES = 1.5


@dataclass(frozen=True, eq=False, repr=False)
class Grid:
    """A regular lattice of voxel centres in the world; InputError if shape or affine describe none."""

    shape: tuple[int, int, int]  # number of voxels along i, j, k; each at least 1
    affine: NDArray[np.float64]  # (4, 4) from (i, j, k, 1) to RAS+ mm; may be oblique or sheared, not singular

    def __repr__(self) -> str:
        return f"Grid({self.describe()})"

    def describe(self) -> str:
        """Shape, spacing and orientation: "256 x 256 x 34 voxels of 1.25 x 1.25 x 7.7 mm, axes RAS"."""
        shape = " x ".join(str(n) for n in self.shape)
        spacing = " x ".join(f"{s:.4g}" for s in self.spacing_mm)
        return f"{shape} voxels of {spacing} mm, axes {self.axis_codes}"

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"the image has shape {shape}; expected three positive numbers of voxels")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError("the affine is not a finite 4 x 4 matrix; correct the header")
        if not np.allclose(affine[3], (0, 0, 0, 1)):
            raise InputError(f"the affine ends in the row {affine[3].tolist()}; expected 0 0 0 1")
        with np.errstate(over="ignore"):
            lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        degenerate = not np.isfinite(lengths).all() or lengths.min() <= _SMALLEST_AXIS_RATIO * lengths.max()
        unit_volume = 0.0 if degenerate else abs(np.linalg.det(affine[:3, :3] / lengths))
        if unit_volume < _SMALLEST_UNIT_AXES_VOLUME:
            found = f"voxel axes of length {', '.join(f'{n:g}' for n in lengths)} mm that do not span a volume"
            raise InputError(f"the affine is singular ({found}); correct the header")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @cached_property
    def inverse_affine(self) -> NDArray[np.float64]:
        """(4, 4) RAS+ mm to voxel indices."""
        return np.linalg.inv(self.affine).astype(np.float64)

    @cached_property
    def spacing_mm(self) -> NDArray[np.float64]:
        """(3,) distance in mm between neighbouring voxel centres along i, j, k."""
        spacing: NDArray[np.float64] = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return spacing

    @property
    def slice_axis(self) -> int:
        """Axis across which slices lie: that of the largest spacing if it is 1.5 times the others, else the last."""
        across = int(self.spacing_mm.argmax())
        others = np.delete(self.spacing_mm, across)
        return across if self.spacing_mm[across] >= _THICK_SLICES * others.max() else 2

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel in cubic mm."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return int(np.prod(self.shape, dtype=np.int64))

    @cached_property
    def axis_codes(self) -> str:
        """Where each voxel axis points, as three letters: "RAS", "LPS", ..."""
        from nibabel.orientations import aff2axcodes

        return "".join(str(code) for code in aff2axcodes(self.affine))

    @cached_property
    def corners_mm(self) -> NDArray[np.float64]:
        """(8, 3) centres of the eight corner voxels, RAS+ mm."""
        return self.voxel_to_world(box_corners(np.zeros(3), np.array(self.shape) - 1))

    @property
    def faces_mm(self) -> NDArray[np.float64]:
        """(8, 3) corners of the field of view, half a voxel beyond the corner voxels, RAS+ mm."""
        return self.voxel_to_world(box_corners(np.full(3, -0.5), np.array(self.shape) - 0.5))

    @property
    def centre_mm(self) -> NDArray[np.float64]:
        """(3,) centre of the grid, RAS+ mm."""
        return self.voxel_to_world((np.array(self.shape) - 1) / 2)

    def voxel_to_world(self, ijk: ArrayLike) -> NDArray[np.float64]:
        """(..., 3) voxel indices, fractions allowed, to (..., 3) RAS+ mm."""
        return np.asarray(ijk, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def world_to_voxel(self, points_mm: ArrayLike) -> NDArray[np.float64]:
        """(..., 3) RAS+ mm to (..., 3) fractional voxel indices."""
        return np.asarray(points_mm, dtype=np.float64) @ self.inverse_affine[:3, :3].T + self.inverse_affine[:3, 3]

    def contains(self, points_mm: ArrayLike) -> NDArray[np.bool_]:
        """(..., 3) RAS+ mm to (...) bool: inside the field of view, half a voxel of border included."""
        ijk = self.world_to_voxel(points_mm)
        return np.asarray(((ijk >= -0.5) & (ijk <= np.array(self.shape) - 0.5)).all(axis=-1))

    def distance_mm(self, other: Grid) -> float:
        """Largest distance in mm between corresponding corners of two grids."""
        return float(np.linalg.norm(self.corners_mm - other.corners_mm, axis=1).max())

    def matches(self, other: Grid, tolerance_voxels: float = 0.1) -> bool:
        """Check whether both grids have the same voxels, to a fraction of the smallest spacing.

        A tenth of a voxel changes no label, and is more than rounded headers differ by (1e-5 to 0.05 mm).
        """
        smallest_mm = float(min(self.spacing_mm.min(), other.spacing_mm.min()))
        return self.shape == other.shape and self.distance_mm(other) <= tolerance_voxels * smallest_mm

    def crop(self, start: ArrayLike, stop: ArrayLike) -> Grid:
        """Get the grid of the voxels start <= (i, j, k) < stop; both (3,) int, inside this grid."""
        first, last = np.asarray(start, dtype=int), np.asarray(stop, dtype=int)
        if (first < 0).any() or (last > np.array(self.shape)).any() or (last <= first).any():
            raise InputError(f"the box {first.tolist()} to {last.tolist()} is not inside a grid of shape {self.shape}")
        affine = self.affine.copy()
        affine[:3, 3] = self.voxel_to_world(first)
        return Grid(tuple(last - first), affine)

    def canonical(self) -> Grid:
        """Permute and flip the axes so that i, j, k point closest to R, A, S."""
        from nibabel.orientations import io_orientation

        return self._turned(io_orientation(self.affine))

    def axes_relative_to(self, other: Grid) -> NDArray[np.float64] | None:
        """Find how this grid's array axes turn into those of ``other``; None where their voxels differ.

        Row n of the (3, 2) result: the axis of ``other`` that this grid's axis n becomes, and +1 or -1 (flipped), as
        :func:`nibabel.orientations.apply_orientation` takes it.
        """
        from nibabel.orientations import io_orientation

        orientation = io_orientation(other.inverse_affine @ self.affine)
        same = not np.isnan(orientation).any() and self._turned(orientation).matches(other)
        return orientation if same else None

    def _turned(self, orientation: NDArray[np.float64]) -> Grid:
        from nibabel.orientations import inv_ornt_aff

        shape = np.take(self.shape, np.argsort(orientation[:, 0]))
        return Grid(tuple(shape), self.affine @ inv_ornt_aff(orientation, self.shape))
