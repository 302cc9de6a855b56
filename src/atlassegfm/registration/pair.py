"""What a registration engine is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.geometry import Grid
from ..core.image import Volume
from ..transforms.maps import Affine, DisplacementField, Transform

if TYPE_CHECKING:
    from .pyramid import Scan

#: Voxels between the points at which a box is mapped.
_BOX_STEP = 8


@dataclass(frozen=True, eq=False)
class Pair:
    """The two scans to be registered.

    Parameters
    ----------
    fixed, moving : Volume
        Query and atlas as they came: float32 intensities of any range, RAS+ world.
    fixed_scan, moving_scan : Scan
        The same prepared: normalised, reduced to what the finest level needs.
    moving_labels : Volume or None
        Labels of the atlas, on its grid.
    """

    fixed: Volume
    moving: Volume
    fixed_scan: Scan
    moving_scan: Scan
    moving_labels: Volume | None

    def near(self, box: Grid, transform: Transform) -> tuple[Scan, Scan]:
        """Both scans around a box in the fixed world, reduced no further than the box's grid needs.

        Parameters
        ----------
        box : Grid
            In the fixed world.
        transform : Transform
            Fixed to moving world.
        """
        from .pyramid import prepare_part

        # Every few voxels and the corners: a deformed box is no box, and what it leaves counts as out of view.
        axes = [np.unique(np.r_[0:n:_BOX_STEP, n - 1]) for n in box.shape]
        points = box.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
        finest = float(box.spacing_mm.min())
        return (
            prepare_part(self.fixed, None, points, finest, self.fixed_scan),
            prepare_part(self.moving, self.moving_labels, transform.map(points), finest, self.moving_scan),
        )


@dataclass(frozen=True, eq=False)
class Start:
    """What an engine begins with.

    Parameters
    ----------
    field : DisplacementField
        In the fixed world, RAS+ mm, to be applied before the linear stages.
    without_brightness : callable or None
        Finds such a field anew, or None, by what does not change with contrast; for an engine that sees that the two
        scans have not the same.
    """

    field: DisplacementField
    without_brightness: Callable[[], DisplacementField | None] | None = None


@dataclass(frozen=True, eq=False)
class Fitted:
    """What an engine found.

    Parameters
    ----------
    linear : Affine
        Fixed to moving world by the linear stages.
    field : DisplacementField or None
        In the fixed world, RAS+ mm, applied before ``linear``; None where the deformable stage is off.
    parameters : mapping of str to int
        How many numbers were fitted, by stage: "linear", "deformable".
    local : DisplacementField or None
        In the fixed world, RAS+ mm, applied before ``field``; 0 at its border and beyond.
    others : tuple of Transform
        Further fits, each from fixed to moving world.
    """

    linear: Affine
    field: DisplacementField | None
    parameters: Mapping[str, int]
    local: DisplacementField | None = None
    others: tuple[Transform, ...] = ()
