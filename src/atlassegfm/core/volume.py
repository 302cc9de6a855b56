"""Voxels and where they are."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import AtlasSegError, InputError
from .files import PathLike
from .geometry import Grid
from .labels import LabelEntry

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header


@dataclass(frozen=True, eq=False)
class Source:
    """Where a volume came from."""

    path: Path  # the file it was read from
    #: The file's header as stored, so that results get the same geometry fields; None for other formats.
    nifti_header: Nifti1Header | None = None
    label_table: Mapping[int, LabelEntry] = field(default_factory=dict)  # where the header names label values
    notes: tuple[str, ...] = ()  # what a user should know about the file's geometry


@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """A 3-D array of voxels and where they are."""

    data: NDArray[Any]  # (I, J, K) intensities or label values
    grid: Grid  # of the same shape
    source: Source | None = None  # the file it was read from, if any

    def __post_init__(self) -> None:
        if self.data.shape != self.grid.shape:
            raise ValueError(f"data of shape {self.data.shape} on a grid of shape {self.grid.shape}")

    def __repr__(self) -> str:
        """Shape, spacing, orientation and type, such as ``Volume(256x256x34, 1.25x1.25x7.70 mm, RAS, float32)``."""
        return f"Volume({self.grid.describe()}, {self.data.dtype})"

    def canonical(self) -> Volume:
        """Permute and flip the axes to point closest to R, A, S (a view, no resampling)."""
        return self.turned_to(self.grid.canonical())

    def turned_to(self, grid: Grid) -> Volume:
        """Permute and flip the axes to those of ``grid`` (a view, no resampling); ValueError if it has other voxels."""
        from nibabel.orientations import apply_orientation

        orientation = self.grid.axes_relative_to(grid)
        if orientation is None:
            raise ValueError("the grids do not share their voxels")
        return Volume(apply_orientation(self.data, orientation), grid, self.source)


def grid_of(shape: Sequence[int], affine: NDArray[np.float64], name: PathLike) -> Grid:
    """Make the grid of an image; InputError, which names it, if it has none."""
    try:
        return Grid((shape[0], shape[1], shape[2]), affine)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def spatial_shape(shape: Sequence[int], path: Path) -> tuple[int, int, int]:
    """Get the three dimensions of an image, without trailing ones of length 1; InputError if there are others."""
    kept = list(shape)
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    if len(kept) != 3:
        raise InputError(
            f"{path}: the image has {len(kept)} dimensions ({' x '.join(map(str, kept))}); expected 3: "
            "extract one volume of a series, or stack the slices"
        )
    return kept[0], kept[1], kept[2]


def check_real(kind: np.dtype[Any], path: Path) -> None:
    """Refuse voxels that are not one real number each."""
    if kind.kind not in "biuf":
        name = f"{len(kind.fields)} numbers each (colour)" if kind.fields is not None else f"complex ({kind.name})"
        raise InputError(f"{path}: the voxels are {name}; expected one real number a voxel")


@contextmanager
def damage_errors(path: Path, kind: str) -> Iterator[None]:
    """Raise what a library raises on a damaged file as InputError, and silence its warnings."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except AtlasSegError:
        raise
    except MemoryError:
        raise InputError(f"{path}: it does not fit into memory; check its size in the header, or crop it") from None
    except Exception as error:  # noqa: BLE001  (each library raises a dozen kinds)
        raise InputError(damage_message(path, error, kind)) from None


def damage_message(path: Path, error: BaseException | None, kind: str) -> str:
    """Say that a file cannot be read as an image of a kind, and whether it is truncated."""
    text = str(error).lower()
    truncated = isinstance(error, EOFError) or ("expected" in text and "bytes" in text)
    if truncated or isinstance(error, zlib.error) or "crc check" in text or "incorrect length" in text:
        return f"{path}: the file is truncated or damaged; copy it again"
    return f"{path}: not readable as {kind}; expected an image file: check that it is complete and has the right ending"
