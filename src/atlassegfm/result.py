"""Result for one query: data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .core.geometry import Grid
from .core.image import Volume
from .core.labels import Structure
from .core.mask import LocalMap
from .fusion.gate import Gate
from .prompts import PromptKind, UsedPrompt
from .quality.coverage import cut_remark
from .quality.mirror import Sides
from .quality.verdict import StructureQuality, Verdict, is_calibrated, overall
from .registration import Place, Registration, nearest_of
from .settings import Settings

Status = Literal["present", "absent", "outside"]


@dataclass(frozen=True, eq=False)
class StructureMaps:
    """Probabilities of one structure in [0, 1], on the query in RAS-canonical array order; atlas: warped."""

    fused: LocalMap
    atlas: LocalMap
    model: LocalMap | None


@dataclass(frozen=True)
class MemberResult:
    """One of several models on one structure: its weight in their mixture, and the Dice of its mask and the result."""

    weight: float
    dice: float


@dataclass(frozen=True)
class StructureResult:
    """Outcome for one structure of the atlas.

    ``status`` is "outside" where at least 90 % of it lies outside the query's field of view, "absent" where no voxel of
    it was found. ``reason`` says why it is not present, or why the warped atlas was kept; else it is empty.
    ``outside_fraction`` is that of the atlas's structure which the linear registration maps outside the query's field
    of view. ``place`` is where the structure search found it, None where it was not searched for or not believed.
    ``prompt`` is None without a model, or where the warped mask is empty. ``members`` are several models by name.
    ``votes`` are the numbers, from 1 on, of those of several atlases that agree on it, the others having been dropped.
    """

    structure: Structure
    status: Status
    reason: str
    volume_ml: float
    outside_fraction: float
    place: Place | None = None
    prompt: UsedPrompt | None = None
    members: Mapping[str, MemberResult] = field(default_factory=dict)
    votes: tuple[int, ...] = ()
    quality: StructureQuality | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """Result for one query.

    ``labels``, ``atlas_labels`` and ``model_labels`` are label values on the query's own grid, in the smallest integer
    type: fused, of the warped atlas, of the model; ``member_labels`` of each of several models, whose mean is then the
    model. ``probabilities`` are by label value, on ``grid``, the query's in
    RAS-canonical array order, without structures that were outside or absent before the fusion. ``registrations`` map
    query world to atlas world, by number of the atlas in the context, from 1 on; ``transform_given`` if it was given,
    not optimised here. ``sides`` compare the query with its mirror image, None where that was not done. ``gate``,
    ``prompt`` and ``model_labels`` are None without a model. ``seconds`` is the wall time of each stage; ``provenance``
    holds files, versions or server of the model, as plain values; ``licence_accepted`` is the date (ISO 8601) on which
    the licence of the model's weights was accepted, None where that is not needed.
    """

    labels: Volume
    atlas_labels: Volume
    model_labels: Volume | None
    member_labels: Mapping[str, Volume]
    grid: Grid
    probabilities: Mapping[int, StructureMaps]
    structures: tuple[StructureResult, ...]
    registrations: Mapping[int, Registration]
    sides: Sides | None
    transform_given: bool
    gate: Gate | None
    settings: Settings
    prompt: PromptKind | None
    device: str
    seconds: Mapping[str, float]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licence_accepted: str | None = None

    @property
    def nearest_atlas(self) -> int:
        """Number of the atlas whose registration has the highest confidence."""
        return nearest_of(self.registrations)

    @property
    def registration(self) -> Registration:
        """That of the nearest atlas."""
        return self.registrations[self.nearest_atlas]

    @property
    def swapped(self) -> bool:
        """Whether left and right of the query seem to be swapped."""
        return self.sides is not None and self.sides.swapped

    @property
    def is_judged(self) -> bool:
        """Whether verdicts, and the bound of the registration's confidence, hold for its settings."""
        return is_calibrated(self.settings, transform_given=self.transform_given)

    @property
    def verdict(self) -> Verdict | None:
        """Worst verdict of the structures; None where none is judged."""
        return overall([one.quality.verdict for one in self.structures if one.quality is not None])

    def __repr__(self) -> str:
        """Table of structures."""
        width = max(len(one.structure.name) for one in self.structures)
        lines = [f"Segmentation({self.verdict or 'not judged'}, {self.labels!r}, model {self.settings.model})"]
        for one in self.structures:
            verdict = (one.quality and one.quality.verdict) or one.status
            dice = None if one.quality is None else one.quality.estimated_dice
            estimate = "" if dice is None else f"  estimated Dice {dice:.2f}"
            cut = f"  ({remark})" if (remark := cut_remark(one.outside_fraction)) and one.status == "present" else ""
            lines.append(f"  {one.structure.name:<{width}}  {one.volume_ml:9.1f} ml  {verdict:<7}{estimate}{cut}")
        return "\n".join(lines)
