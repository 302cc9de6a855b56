"""Round trip of a written RTSTRUCT or DICOM-SEG: read it back and compare it with the label map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError, OutputError
from ..core.image import Volume, label_boxes
from ..core.labels import Structure, listed
from ..core.overlap import dice
from .files import read_header
from .rtstruct import is_rtstruct, read_rtstruct
from .seg import read_segmentation
from .series import Series
from .structures import Box

#: Structures of more voxels than this must come back with LEAST_DICE; in smaller ones, one voxel is more than 1 %.
COUNTED_VOXELS = 50
LEAST_DICE = 0.99


@dataclass(frozen=True)
class RoundTrip:
    """One structure, as written and as read back."""

    value: int
    name: str
    voxels: int  # in the label map
    dice: float  # in [0, 1]; 1 where both are empty
    contour_error_mm: float  # Hausdorff distance of the voxels; infinite where one of them is empty

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON, which has no infinity."""
        error = round(self.contour_error_mm, 4) if np.isfinite(self.contour_error_mm) else None
        return {**vars(self), "dice": round(self.dice, 6), "contour_error_mm": error}


def check_round_trip(
    path: Path, labels: Volume, structures: Sequence[Structure], series: Series
) -> tuple[RoundTrip, ...]:
    """Read a file back and compare it with the label map it was written from, on the voxels of the series.

    OutputError if the file cannot be read back, or a structure of more than 50 voxels has a Dice below 0.99.
    """
    read = read_rtstruct if is_rtstruct(read_header(path, ["SOPClassUID"])) else read_segmentation
    data = labels.turned_to(series.grid).data
    values = [one.value for one in structures]
    back = np.zeros(data.shape, np.uint8)
    if np.isin(data, values).any():
        try:
            back = read(path, series).data
        except InputError as error:
            raise OutputError(f"{path.name}: what was written cannot be read back ({error}); nothing is kept") from None
    boxes = label_boxes(values, data, back)
    found = [_compare(data, back, one, boxes.get(one.value), series.grid.spacing_mm) for one in structures]
    wrong = [f"{one.name} ({one.dice:.3f})" for one in found if one.voxels > COUNTED_VOXELS and one.dice < LEAST_DICE]
    if wrong:
        differ = f"read back, structures differ from the label map (Dice below {LEAST_DICE}: {listed(wrong)})"
        raise OutputError(f"{path.name}: {differ}; nothing is kept: choose another format, and report this defect")
    return tuple(found)


def _compare(
    data: NDArray[Any], back: NDArray[Any], structure: Structure, box: Box | None, spacing_mm: NDArray[np.float64]
) -> RoundTrip:
    """Compare one structure within its box over both; None if both are empty."""
    from scipy import ndimage

    if box is None:
        return RoundTrip(structure.value, structure.name, 0, 1.0, 0.0)
    one, other = data[box] == structure.value, back[box] == structure.value
    error = 0.0 if one.any() and other.any() else float("inf")
    if not error and (one != other).any():
        pairs = ((one, other), (other, one))
        error = float(max(ndimage.distance_transform_edt(~to, sampling=spacing_mm)[of].max() for of, to in pairs))
    return RoundTrip(structure.value, structure.name, int(np.count_nonzero(one)), dice(one, other), error)
