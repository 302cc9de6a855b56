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


@dataclass(frozen=True, eq=False)
class Registration:
    """The transform of one pair, query world to atlas world (RAS+ mm), and how it was found.

    Parameters
    ----------
    linear : Affine
        Query world to atlas world by the linear stages alone.
    field, local : DisplacementField or None
        In the query world, ``local`` applied first, ``linear`` last. ``field`` is None where the deformable stage is
        off; ``local`` is the finer fit in the labels' box, 0 at its border and beyond.
    seconds : mapping of str to float
        Wall time of each stage that ran.
    dissimilarity : Dissimilarity or None
        Of the scans after all stages; None where it was not measured.
    folding : float
        Fraction of the query's body in which the deformation folds space, in [0, 1].
    jacobian : JacobianStatistics or None
        Local volume changes in the query's body: in the labels' box where there is a local field, else everywhere.
    parameter_count : mapping of str to int
        Parameters optimised by stage, "linear" and "deformable"; of the latter, on its finest levels.
    further_members : tuple of Transform
        The ensemble's members after the first, each from query world to atlas world. All else is of the first one.
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
        """All members of the ensemble, the first one kept; labels are warped by each, and the mean is taken."""
        return (self.fixed_to_moving, *self.further_members)
