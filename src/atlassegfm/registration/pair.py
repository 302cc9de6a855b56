"""What a registration engine is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..image import Volume
from ..transforms import Affine, DisplacementField

if TYPE_CHECKING:
    from .pyramid import Scan


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
    spacings_mm : tuple of float
        Of the levels, coarse to fine.
    """

    fixed: Volume
    moving: Volume
    fixed_scan: Scan
    moving_scan: Scan
    moving_labels: Volume | None
    spacings_mm: tuple[float, ...]


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
    """

    linear: Affine
    field: DisplacementField | None
    parameters: Mapping[str, int]
