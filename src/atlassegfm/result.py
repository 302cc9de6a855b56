"""The result for one query: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from .core.geometry import Grid
from .core.image import Volume
from .core.labels import Structure
from .core.mask import LocalMap
from .fusion.gate import Gate
from .models import describe_model
from .prompts import PromptKind
from .quality.verdict import StructureQuality, Verdict, overall
from .registration import Registration
from .settings import NO_MODEL, Settings
from .transforms.jacobian import JacobianStatistics

Status = Literal["present", "absent", "outside"]


@dataclass(frozen=True)
class PromptUsed:
    """What the model was prompted with for one structure, in the query's own terms.

    Parameters
    ----------
    kind : {"click", "box", "mask", "region"}
        Click: both corners are the clicked voxel. Box, mask, region: the first and the last voxel inside.
    first_voxel, last_voxel : tuple of int, (3,)
        In the array order the query is stored in.
    first_mm, last_mm : tuple of float, (3,)
        Centres of these voxels, RAS+ mm.
    """

    kind: PromptKind
    first_voxel: tuple[int, int, int]
    last_voxel: tuple[int, int, int]
    first_mm: tuple[float, float, float]
    last_mm: tuple[float, float, float]

    def summary(self) -> dict[str, Any]:
        """For ``run.json``."""
        if self.kind == "click":
            return {"kind": self.kind, "voxel": list(self.first_voxel), "point_mm": list(self.first_mm)}
        return {
            "kind": self.kind,
            "first_voxel": list(self.first_voxel),
            "last_voxel": list(self.last_voxel),
            "first_mm": list(self.first_mm),
            "last_mm": list(self.last_mm),
        }


@dataclass(frozen=True, eq=False)
class StructureMaps:
    """Probabilities of one structure on the query in RAS-canonical array order, each in [0, 1].

    Parameters
    ----------
    fused : LocalMap
        What the result is made of.
    atlas : LocalMap
        The warped atlas mask.
    model : LocalMap or None
        The model's answer; None without a model.
    """

    fused: LocalMap
    atlas: LocalMap
    model: LocalMap | None


@dataclass(frozen=True)
class StructureResult:
    """What became of one structure of the atlas.

    Parameters
    ----------
    structure : Structure
        Its label value, name and colour.
    status : {"present", "absent", "outside"}
        "outside": (nearly) all of it lies outside the query's field of view. "absent": nothing of it was found
        in view.
    reason : str
        Why it is not present, in words; empty where it is.
    volume_ml : float
        Of the result.
    outside_share : float
        Share of the atlas's structure that the linear registration maps outside the query's field of view, in
        [0, 1].
    prompt : PromptUsed or None
        None without a model, or where there was nothing to point at.
    round_trip_dice : float or None
        Agreement of the atlas's label with itself after a way to the query and back; None where no such way was
        made: it is only to train the gate (``fusion.examples``).
    quality : StructureQuality or None
        What is thought of it; None where it was not judged.
    """

    structure: Structure
    status: Status
    reason: str
    volume_ml: float
    outside_share: float
    prompt: PromptUsed | None = None
    round_trip_dice: float | None = None
    quality: StructureQuality | None = None

    def summary(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "value": self.structure.value,
            "name": self.structure.name,
            "status": self.status,
            **({"reason": self.reason} if self.reason else {}),
            "volume_ml": round(self.volume_ml, 4),
            "outside_share": round(self.outside_share, 4),
            "round_trip_dice": _number(self.round_trip_dice),
            "prompt": None if self.prompt is None else self.prompt.summary(),
            "quality": None if self.quality is None else self.quality.summary(),
        }


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The result for one query.

    Parameters
    ----------
    labels : Volume
        Label values of the atlas, on the query's own grid and in its array order, as the smallest integer type
        that holds all labels of the atlas.
    atlas_labels : Volume
        The same of the warped atlas alone.
    model_labels : Volume or None
        The same of the model alone.
    grid : Grid
        The query's grid in RAS-canonical array order, which ``probabilities`` lie on.
    probabilities : mapping of int to StructureMaps
        For each label value that was not outside or absent before the fusion.
    structures : tuple of StructureResult
        One for each structure of the atlas.
    registration : Registration
        Query world to atlas world.
    transform_given : bool
        Whether that was given, not fitted. Its folding and its changes of volume are those of the field of view then,
        not of the body.
    gate : Gate or None
        That was used; None without a model.
    settings : Settings
        That it was made with.
    prompt : {"click", "box", "mask", "region"} or None
        Kind of prompt that was used.
    device : {"cpu", "cuda"}
        Where it was computed.
    seconds : mapping of str to float
        Wall time of each stage.
    provenance : mapping of str to Any
        Where the model's numbers come from, as plain values; empty where it has nothing to say.
    licence_accepted : str or None
        Date (ISO 8601) on which the licence of the model's weights was accepted; None where that need not be.
    """

    labels: Volume
    atlas_labels: Volume
    model_labels: Volume | None
    grid: Grid
    probabilities: Mapping[int, StructureMaps]
    structures: tuple[StructureResult, ...]
    registration: Registration
    transform_given: bool
    gate: Gate | None
    settings: Settings
    prompt: PromptKind | None
    device: str
    seconds: Mapping[str, float]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licence_accepted: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of the structures."""
        return overall([one.quality.verdict for one in self.structures if one.quality is not None])

    def summary(self) -> dict[str, Any]:
        """What happened, as plain values for ``run.json``."""
        model: dict[str, Any] = {"name": self.settings.model}
        if self.settings.model != NO_MODEL:
            row = describe_model(self.settings.model)
            model |= {
                "summary": row.summary,
                "code_licence": row.code_licence,
                "weights_licence": row.weights_licence,
                "licence_accepted": self.licence_accepted,
                "prompt": self.prompt,
                **self.provenance,
            }
        return {
            "device": self.device,
            "seed": self.settings.seed,
            "model": model,
            "registration": {
                "source": "given" if self.transform_given else "fitted",
                "confidence": _number(self.registration.confidence),
                "fits": len(self.registration.fits),
                "folding": _number(self.registration.folding, 6),
                "jacobian": _jacobian_summary(self.registration.jacobian),
                "seconds": {name: round(seconds, 3) for name, seconds in self.registration.seconds.items()},
                "linear_query_to_atlas_mm": [
                    [round(n, 6) for n in row] for row in self.registration.linear.matrix.tolist()
                ],
            },
            "gate": None if self.gate is None else self.gate.describe(),
            "quality": {"verdict": self.verdict},
            "structures": [result.summary() for result in self.structures],
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }


def _jacobian_summary(statistics: JacobianStatistics | None) -> dict[str, float | None] | None:
    return None if statistics is None else {name: _number(value, 6) for name, value in asdict(statistics).items()}


def _number(value: float | None, digits: int = 4) -> float | None:
    """For JSON, which has no NaN."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)
