"""The whole job on the embedded pair of scans: nothing to download, and a score at the end."""

import shutil
from collections.abc import Callable, Mapping
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
from ..result import Segmentation, StructureResult
from ..segment import segment
from ..settings import Settings
from . import ATLAS, LABELS, QUERY, REFERENCE

#: Folder of the query's result in ``result``.
RESULT = "query"

_FILES = frozenset({ATLAS, LABELS, QUERY, REFERENCE})


#: Dice coefficients of the warped atlas, the model (None without one) and the final result.
MethodDice = tuple[float, float | None, float]


@dataclass(frozen=True, eq=False)
class DemoOutcome:
    """Dice against the true labels, in [0, 1] or NaN where neither side has the structure, and the ``run.json``."""

    scores: Mapping[Structure, MethodDice]
    run: RunRecord

    def means(self) -> MethodDice:
        """Compute the mean Dice over the structures."""
        atlas, model, fused = zip(*self.scores.values(), strict=True)
        mean_of_model = None if None in model else float(np.nanmean(model))
        return float(np.nanmean(atlas)), mean_of_model, float(np.nanmean(fused))


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
    ``on_stage`` is called with the name of each stage as it begins. Raises MissingExtraError, before anything is
    computed, if the picture cannot be drawn, InputError if the folder cannot be written or holds something else.
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
                notes={one.structure.value: _note(one, outcome) for one in result.structures},
            )
    return outcome


def _scores(result: Segmentation, reference: Volume) -> dict[Structure, MethodDice]:
    structures = [one.structure for one in result.structures]

    def dice(labels: Volume) -> dict[int, float]:
        return dice_per_structure(labels.data, reference.data, [one.value for one in structures])

    atlas, fused = dice(result.atlas_labels), dice(result.labels)
    model = {} if result.model_labels is None else dice(result.model_labels)
    return {one: (atlas[one.value], model.get(one.value), fused[one.value]) for one in structures}


def _note(one: StructureResult, outcome: DemoOutcome) -> Note:
    fused, verdict = outcome.scores[one.structure][2], (one.quality and one.quality.verdict) or "good"
    dice = "–" if np.isnan(fused) else f"{fused:.2f}"
    return Note(f"Dice {dice}" + (f", {verdict}" if verdict != "good" else ""), verdict)


def _subtitle(outcome: DemoOutcome) -> str:
    atlas, model, fused = outcome.means()
    of_model = "" if model is None else f"model {model:.3f}, "
    return f"Mean Dice against the true labels: warped atlas {atlas:.3f}, {of_model}fused {fused:.3f}. Synthetic scans."
