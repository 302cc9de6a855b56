"""Whether a DICOM file that was written says what the label map says: it is read back and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError, OutputError
from ..core.image import Volume
from ..core.labels import Structure, listed
from .files import read_header
from .masks import EVERYTHING, label_boxes
from .rtstruct import is_rtstruct, read_rtstruct
from .seg import read_segmentation
from .series import Series

#: Structures of more voxels than this must come back with ...
COUNTED_VOXELS = 50
#: ... at least this Dice. Smaller ones are compared and reported: one voxel of them is more than a hundredth.
LEAST_DICE = 0.99


@dataclass(frozen=True)
class RoundTrip:
    """One structure, as written and as read back.

    Parameters
    ----------
    value : int
        Label value.
    name : str
        Its name.
    voxels : int
        In the label map.
    dice : float
        Of the label map and what was read back, in [0, 1]; 1 where both are empty.
    contour_error_mm : float
        Largest distance of a voxel of one to the nearest of the other; infinite where one of them is empty.
    """

    value: int
    name: str
    voxels: int
    dice: float
    contour_error_mm: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        error = self.contour_error_mm
        return {
            "value": self.value,
            "name": self.name,
            "voxels": self.voxels,
            "dice": round(self.dice, 6),
            "contour_error_mm": round(error, 4) if np.isfinite(error) else None,
        }


def check_round_trip(
    path: Path, labels: Volume, structures: Sequence[Structure], series: Series
) -> tuple[RoundTrip, ...]:
    """Read a file back and compare it with the label map it was written from.

    Parameters
    ----------
    path : Path
        RTSTRUCT or DICOM-SEG.
    labels : Volume
        That it was written from, on the voxels of the series.
    structures : sequence of Structure
        What was written.
    series : Series
        That it was written on.

    Raises
    ------
    OutputError
        If the file cannot be read back, or a structure of more than 50 voxels has a Dice below 0.99.
    """
    read = read_rtstruct if is_rtstruct(read_header(path, ["SOPClassUID"])) else read_segmentation
    data = labels.turned_to(series.grid).data
    boxes = label_boxes(data, structures)
    back = np.zeros(data.shape, np.uint8)
    if boxes:
        try:
            back = read(path, series, EVERYTHING).data
        except InputError as error:
            raise OutputError(f"{path.name}: what was written cannot be read back ({error}); nothing is kept") from None
    other_boxes = label_boxes(back, structures)
    found = tuple(
        _compare(data, back, one, [all_[one.value] for all_ in (boxes, other_boxes) if one.value in all_], series)
        for one in structures
    )
    wrong = [f"{one.name} ({one.dice:.3f})" for one in found if one.voxels > COUNTED_VOXELS and one.dice < LEAST_DICE]
    if wrong:
        raise OutputError(
            f"{path.name}: read back, structures differ from the label map (Dice below {LEAST_DICE}: {listed(wrong)}); "
            "nothing is kept: choose another format, and report this as a defect"
        )
    return found


def _compare(
    data: NDArray[Any],
    back: NDArray[Any],
    structure: Structure,
    boxes: Sequence[tuple[slice, slice, slice]],
    series: Series,
) -> RoundTrip:
    """Compare one structure, which lies in the boxes in both."""
    if not boxes:
        return RoundTrip(structure.value, structure.name, 0, 1.0, 0.0)
    box = tuple(
        slice(min(one.start for one in axis), max(one.stop for one in axis)) for axis in zip(*boxes, strict=True)
    )
    one, other = data[box] == structure.value, back[box] == structure.value
    first, second, both = (int(np.count_nonzero(mask)) for mask in (one, other, one & other))
    error = 0.0
    if both < max(first, second):
        error = _largest_distance(one, other, series.grid.spacing_mm) if first and second else float("inf")
    return RoundTrip(structure.value, structure.name, first, 2 * both / (first + second), error)


def _largest_distance(one: NDArray[np.bool_], other: NDArray[np.bool_], spacing_mm: NDArray[np.float64]) -> float:
    """Hausdorff distance in mm of two masks that both have voxels."""
    from scipy import ndimage

    directed = [
        ndimage.distance_transform_edt(~to, sampling=spacing_mm)[of].max() for of, to in ((one, other), (other, one))
    ]
    return float(max(directed))
