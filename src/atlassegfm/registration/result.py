"""The result of a registration; engines return it without ``seconds`` and what is assessed afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING

from ..transforms.maps import Affine, Chain, DisplacementField, Transform

if TYPE_CHECKING:
    from ..transforms.jacobian import JacobianStatistics
    from .dissimilarity import Dissimilarity


@dataclass(frozen=True)
class Place:
    """Where the structure search found a structure, and the best of the places at least half its size away."""

    shift_mm: float  # from where the linear stages put it
    cost: float  # lowest is best; see the module structures
    second_cost: float | None  # None if no other place was carried to the end
    second_distance_mm: float | None

    @property
    def margin(self) -> float:
        """How much worse the second place is, in [0, 1]; 1 if there is none."""
        return 1.0 if self.second_cost is None else min(self.second_cost - self.cost, 1.0)


def nearest_of(registrations: Mapping[int, Registration]) -> int:
    """Return the number of the atlas whose registration has the highest confidence."""
    return max(registrations, key=lambda number: registrations[number].confidence)


@dataclass(frozen=True, eq=False)
class Registration:
    """The transform of one pair, query world to atlas world (RAS+ mm), and how it was found.

    A query point goes through ``local``, the finer fit in the labels' box, which is 0 at its border and beyond, then
    through ``field``, None where the deformable stage is off, then through ``linear``. ``further_members`` are the
    ensemble's transforms after the first, of which all else is.

    ``seconds`` is the wall time of each stage that ran, ``parameter_count`` the parameters optimised by stage, "linear"
    and "deformable" (on its finest levels). ``dissimilarity`` is that of the scans after all stages, None if not
    measured; ``folding`` the fraction of the query's body in which space is folded, in [0, 1]; ``jacobian`` describes
    volume changes in the body, within the labels' box where there is a local field. ``places`` are those of the
    structure search by label value, without structures whose own place was not believed. ``linear_cost`` is that of the
    linear stages, None where they did not run.
    """

    linear: Affine
    field: DisplacementField | None
    local: DisplacementField | None = None
    seconds: Mapping[str, float] = dataclass_field(default_factory=dict)
    dissimilarity: Dissimilarity | None = None
    folding: float = 0.0
    jacobian: JacobianStatistics | None = None
    parameter_count: Mapping[str, int] = dataclass_field(default_factory=dict)
    further_members: tuple[Transform, ...] = ()
    places: Mapping[int, Place] = dataclass_field(default_factory=dict)
    linear_cost: float | None = None

    @property
    def confidence(self) -> float:
        """In [0, 1]: 0 if the scans match no better than misplaced ones, 1 if they are equal; NaN if not measured."""
        return float("nan") if self.dissimilarity is None else self.dissimilarity.confidence

    @property
    def fixed_to_moving(self) -> Transform:
        """All stages composed: query world to atlas world."""
        return Chain(tuple(stage for stage in (self.local, self.field, self.linear) if stage is not None))

    @property
    def members(self) -> tuple[Transform, ...]:
        """All members of the ensemble; labels are warped by each, and the mean is taken."""
        return (self.fixed_to_moving, *self.further_members)
