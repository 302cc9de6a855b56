"""The whole job on a made-up pair of scans: nothing to download, and a score at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .context import Context
from .image import Volume, load_image, save_volume
from .metrics import dice_per_structure
from .phantom import make_pair
from .pipeline import Segmentation, Settings, segment
from .report import draw_overview, require_report_extra
from .results import RESULT_NAMES, RunInputs, check_replaceable, output_folder, replaced_folder, write_result
from .structures import Structure

#: Files in the folder ``data``, and the folder of the query's result in ``result``.
ATLAS, LABELS, QUERY, REFERENCE = "atlas.nii.gz", "atlas_labels.nii.gz", "query.nii.gz", "query_reference.nii.gz"
RESULT = "query"
_DATA_NAMES = frozenset({ATLAS, LABELS, QUERY, REFERENCE})


@dataclass(frozen=True, eq=False)
class DemoScore:
    """How well one structure came out.

    Parameters
    ----------
    structure : Structure
        Which one.
    atlas, model, fused : float or None
        Dice coefficient against the true labels, in [0, 1]; None without a model, NaN where neither has it.
    """

    structure: Structure
    atlas: float
    model: float | None
    fused: float


@dataclass(frozen=True, eq=False)
class DemoOutcome:
    """What the demo made.

    Parameters
    ----------
    scores : tuple of DemoScore
        One for each structure.
    run : dict
        The content of the result's ``run.json``.
    """

    scores: tuple[DemoScore, ...]
    run: dict[str, Any]

    def means(self) -> tuple[float, float | None, float]:
        """Mean Dice over the structures: atlas, model, fused."""
        models = [score.model for score in self.scores if score.model is not None]
        atlas, fused = ([getattr(score, name) for score in self.scores] for name in ("atlas", "fused"))
        return float(np.nanmean(atlas)), float(np.nanmean(models)) if models else None, float(np.nanmean(fused))


def run_demo(
    folder: Path,
    settings: Settings,
    *,
    device: str = "auto",
    picture: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> DemoOutcome:
    """Make two scans, segment the second by the first, and score the result by the truth.

    Parameters
    ----------
    folder : Path
        Gets ``data`` (the scans, so that the job can be repeated), ``result`` and ``demo.png``. An earlier demo
        is replaced.
    settings : Settings
        ``settings.seed`` also picks the scans.
    device : {"auto", "cpu", "cuda"}
        Where to compute.
    picture : bool
        Whether to draw ``demo.png``; needs the extra "report".
    on_stage : callable, optional
        Told the name of each stage as it begins.

    Raises
    ------
    MissingExtraError
        If the picture cannot be drawn; before anything is computed.
    InputError
        If the folder cannot be written or holds something else.
    """
    if picture:
        require_report_extra()
    tell = on_stage or (lambda _: None)
    check_replaceable(folder / "result" / RESULT, RESULT_NAMES)
    with (
        output_folder(folder),
        replaced_folder(folder / "data", _DATA_NAMES) as data,
        output_folder(folder / "result"),
    ):
        tell("making two scans")
        pair = make_pair(settings.seed)
        save_volume(pair.atlas, data / ATLAS)
        save_volume(pair.atlas_labels, data / LABELS, structures=pair.structures)
        save_volume(pair.query, data / QUERY)
        save_volume(pair.query_labels, data / REFERENCE, structures=pair.structures)
        # From the files, as the user can: the truth goes back in only for the score below.
        context = Context.from_files(data / ATLAS, data / LABELS)
        query = load_image(data / QUERY)
        result = segment(context, query, settings, device=device, on_stage=on_stage)
        scores = _scores(result, pair.query_labels)
        run = write_result(result, RunInputs(context, query), folder / "result" / RESULT)
        outcome = DemoOutcome(scores, run)
        if picture:
            tell("drawing the picture")
            draw_overview(
                query,
                result.labels,
                context.structures,
                folder / "demo.png",
                title="AtlasSegFM demo: one annotated scan segments another",
                subtitle=_subtitle(outcome),
                reference=pair.query_labels,
                scores={score.structure.value: score.fused for score in scores},
            )
    return outcome


def _scores(result: Segmentation, truth: Volume) -> tuple[DemoScore, ...]:
    structures = [one.structure for one in result.structures]
    values = [structure.value for structure in structures]

    def dice_of(labels: Volume) -> dict[int, float]:
        return dice_per_structure(labels.data, truth.data, values)

    atlas, fused = dice_of(result.atlas_labels), dice_of(result.labels)
    model = None if result.model_labels is None else dice_of(result.model_labels)
    return tuple(
        DemoScore(one, atlas[one.value], None if model is None else model[one.value], fused[one.value])
        for one in structures
    )


def _subtitle(outcome: DemoOutcome) -> str:
    atlas, model, fused = outcome.means()
    parts = [f"warped atlas {atlas:.3f}", *([] if model is None else [f"model {model:.3f}"]), f"fused {fused:.3f}"]
    return f"Mean Dice against the true labels: {', '.join(parts)}. Made-up scans."
