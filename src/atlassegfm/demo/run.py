"""The whole job on the embedded pair of scans: nothing to download, and a score at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import demo
from ..context import Context
from ..core.files import check_replaceable, output_folder, replaced_folder
from ..core.image import Volume, load_image, load_labels
from ..core.labels import Structure
from ..core.overlap import dice_per_structure
from ..jobs.store import RunInputs, write_result
from ..records import RESULT_NAMES, RunRecord, StatusRecord
from ..report import Note, draw_overview, require_report_extra
from ..result import Segmentation
from ..segment import segment
from ..settings import Settings
from . import ATLAS, LABELS, QUERY, REFERENCE

#: Folder of the query's result in ``result``.
RESULT = "query"

_FILES = frozenset({ATLAS, LABELS, QUERY, REFERENCE})


@dataclass(frozen=True, eq=False)
class DemoScore:
    """Dice coefficients of one structure against the true labels, in [0, 1]; NaN where neither side has it.

    They are those of warped atlas, model (None without one) and final result.
    """

    structure: Structure
    atlas: float
    model: float | None
    fused: float


@dataclass(frozen=True, eq=False)
class DemoOutcome:
    """Scores of the demo, one for each structure, and the content of its ``run.json``."""

    scores: tuple[DemoScore, ...]
    run: RunRecord

    def means(self) -> tuple[float, float | None, float]:
        """Mean Dice over the structures: atlas, model, fused."""
        models = [score.model for score in self.scores if score.model is not None]
        return (
            float(np.nanmean([score.atlas for score in self.scores])),
            float(np.nanmean(models)) if models else None,
            float(np.nanmean([score.fused for score in self.scores])),
        )


def run_demo(
    folder: Path,
    settings: Settings,
    *,
    device: str = "auto",
    picture: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> DemoOutcome:
    """Segment the embedded query by the embedded atlas, and score the result.

    ``folder`` gets ``data`` (the scans), ``result`` and, with a ``picture``, ``demo.png``; an earlier demo is replaced.
    ``on_stage`` is called with the name of each stage as it begins.

    Raises
    ------
    MissingExtraError
        If the picture cannot be drawn, which needs the extra "report"; before anything is computed.
    InputError
        If the folder cannot be written or holds something else.
    """
    if picture:
        require_report_extra()
    data_folder, result_folder = folder / "data", folder / "result"
    check_replaceable(result_folder / RESULT, RESULT_NAMES)
    with output_folder(folder), replaced_folder(data_folder, _FILES) as data, output_folder(result_folder):
        for name in sorted(_FILES):
            shutil.copyfile(demo.PAIR / name, data / name)
        context = Context.from_files(data / ATLAS, data / LABELS, settings=settings)
        query, reference = load_image(data / QUERY), load_labels(data / REFERENCE)
        result = segment(context, query, device=device, on_stage=on_stage)
        run = write_result(result, RunInputs(context, query), result_folder / RESULT, StatusRecord(state="done"))
        outcome = DemoOutcome(_scores(result, reference), run)
        if picture:
            if on_stage is not None:
                on_stage("drawing the picture")
            draw_overview(
                query,
                result.labels,
                context.atlas.structures,
                folder / "demo.png",
                title="AtlasSegFM demo: one annotated scan segments another",
                subtitle=_subtitle(outcome),
                reference=reference,
                notes={one.structure.value: _note(one, result) for one in outcome.scores},
            )
    return outcome


def _scores(result: Segmentation, reference: Volume) -> tuple[DemoScore, ...]:
    structures = [one.structure for one in result.structures]

    def dice(labels: Volume) -> dict[int, float]:
        return dice_per_structure(labels.data, reference.data, [one.value for one in structures])

    atlas, fused = dice(result.atlas_labels), dice(result.labels)
    model = {} if result.model_labels is None else dice(result.model_labels)
    return tuple(DemoScore(one, atlas[one.value], model.get(one.value), fused[one.value]) for one in structures)


def _note(score: DemoScore, result: Segmentation) -> Note:
    quality = next(one.quality for one in result.structures if one.structure == score.structure)
    dice, verdict = ("–" if np.isnan(score.fused) else f"{score.fused:.2f}"), quality.verdict if quality else "good"
    return Note(f"Dice {dice}" + (f", {verdict}" if verdict != "good" else ""), verdict)


def _subtitle(outcome: DemoOutcome) -> str:
    atlas, model, fused = outcome.means()
    of_model = "" if model is None else f"model {model:.3f}, "
    return f"Mean Dice against the true labels: warped atlas {atlas:.3f}, {of_model}fused {fused:.3f}. Synthetic scans."
