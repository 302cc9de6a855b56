"""Content of a benchmark's plan.json and pairs/VARIANT/ATLAS/QUERY.json."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ..core.record import Record
from ..evaluate.scores import CaseScore
from ..records import RESULTS_FORMAT, FileRecord
from .protocols import Pair


@dataclass(frozen=True)
class Row(CaseScore):
    """Scores of one structure of one query by one of :data:`METHODS`.

    The status "failed" is that of a pair that ended in an error: it counts as missed. "not_in_atlas": the atlas does
    not have the structure, and nothing is scored. ``estimated_dice`` and ``verdict``, or the status of a structure that
    was not found, are what the result says of itself: of one method alone, fused or, without a model, the atlas.
    """

    method: str
    estimated_dice: float | None = None
    verdict: str | None = None


class PairRecord(Record):
    """One pair by one variant."""

    format: int = RESULTS_FORMAT
    variant: str
    pair: Pair
    rows: tuple[Row, ...]
    """Empty where a file cannot be used: the pair is not scored then, and not kept."""

    failure: str = Field(default="", description="Why there is no result.")
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall time of each stage; those of the registration begin with "registration: "."""

    total_seconds: float = Field(default=0.0, description="Of all stages, files already read.")
    parameters: int | None = None
    """Of an in-context network; else those that registration and gate have fitted."""

    peak_memory_mb: int | None = None
    gpu_memory_mb: int | None = None
    confidence: float | None = Field(default=None, description="Of the registration.")
    folding: float | None = Field(default=None, description="Fraction of the body where the displacement field folds.")
    files: tuple[FileRecord, ...] = Field(default=(), description="Image and labels of atlas and query.")
    unnamed: tuple[int, ...] = Field(
        default=(),
        description="Label values of atlas or query that ``dataset.json`` does not name: taken as background.",
    )


class PlanRecord(Record):
    """What a benchmark's figures depend on: a folder made with something else is refused, not mixed."""

    format: int = RESULTS_FORMAT
    dataset: str
    structures: dict[str, str] = Field(description="Names by label value.")
    tolerances_mm: dict[str, float]
    centreline: tuple[int, ...]
    variants: dict[str, dict[str, Any]]
    device: str
    threads: int = Field(description="Sums round differently with another number of threads.")
    version: str
    versions: dict[str, str]
