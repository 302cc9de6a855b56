"""The input of a registration engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core.geometry import Grid
from ..core.image import Volume
from ..transforms.maps import DisplacementField, Transform
from .pyramid import Scan, prepare_part

#: Voxels between the points at which a box is mapped.
_BOX_STEP = 8


@dataclass(frozen=True, eq=False)
class Pair:
    """Query and atlas as they came (float32, any range), prepared for the finest level, and the atlas's labels."""

    fixed: Volume
    moving: Volume
    fixed_scan: Scan
    moving_scan: Scan
    moving_labels: Volume | None

    def crop(self, box: Grid, fixed_to_moving: Transform) -> tuple[Scan, Scan]:
        """Prepare both scans around a box in the fixed world, reduced no further than the box's grid needs."""
        # Every few voxels and the corners: a deformed box is no box, and what it leaves counts as out of view.
        axes = [np.unique(np.r_[0:n:_BOX_STEP, n - 1]) for n in box.shape]
        points = box.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
        finest = float(box.spacing_mm.min())
        return (
            prepare_part(self.fixed, None, points, finest, self.fixed_scan),
            prepare_part(self.moving, self.moving_labels, fixed_to_moving.map(points), finest, self.moving_scan),
        )


@dataclass(frozen=True, eq=False)
class Start:
    """The displacement a deformable engine starts from: in the fixed world, applied before the linear stages.

    ``without_brightness`` finds such a field anew, or None, by features invariant to contrast.
    """

    field: DisplacementField
    without_brightness: Callable[[], DisplacementField | None] | None = None
