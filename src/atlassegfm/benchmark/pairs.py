"""One pair of a benchmark: segmented by a variant, and scored."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..atlas import Atlas, canonical_scan
from ..context import Context, customize
from ..core.errors import InputError, ModelError, RegistrationError
from ..core.image import Volume, load_image, load_labels
from ..core.mask import LocalMap
from ..core.parallel import peak_memory_mb, reset_peak_memory
from ..evaluate.labelling import label_values
from ..evaluate.metrics import StructureScores
from ..evaluate.scores import score_volumes
from ..fusion.fuse import fuse_structures
from ..fusion.gate import Gate
from ..fusion.label_map import label_map
from ..fusion.topology import count_parts, remove_islands
from ..models import Segmenter
from ..models.choice import load_chosen
from ..prompts import make_prompt
from ..result import Segmentation
from ..segment import segment
from ..settings import NO_MODEL
from .plan import Plan, Variant
from .protocols import Pair
from .records import PairRecord, Row

logger = logging.getLogger(__name__)


def oracle(atlas: Volume, model: Volume, reference: Volume) -> Volume:
    """What a gate that always picks the better of atlas and model would give.

    Parameters
    ----------
    atlas, model, reference : Volume
        Label maps on one grid.

    Returns
    -------
    Volume
        Where both agree, that; where one of them is right, the reference; background elsewhere.
    """
    a, m, r = atlas.data, model.data, reference.turned_to(atlas.grid).data
    right = np.where((r == a) | (r == m), r, 0)
    return Volume(np.where(a == m, a, right).astype(a.dtype), atlas.grid, atlas.source)


def fused_by(gate: Gate, atlas: Atlas, result: Segmentation) -> Volume:
    """Compute the label map that another gate would have made of the masks of a result.

    Parameters
    ----------
    gate : Gate
        Without a correction, as the paper's: a correction takes the scan.
    atlas : Atlas
    result : Segmentation
        Made with a model.

    Raises
    ------
    ValueError
        If the gate has a correction.
    """
    if gate.correction is not None:
        raise ValueError("a gate with a correction takes the scan; expected one as the paper's")
    numbers = {value: n for n, value in enumerate(atlas.values, start=1)}
    warped = {numbers[value]: one.atlas for value, one in result.probabilities.items()}
    predicted = {numbers[v]: one.model for v, one in result.probabilities.items() if one.model is not None}
    masks = warped | fuse_structures(atlas.image, warped, predicted, gate, device=result.device)
    labels = label_map(masks, result.grid.shape, warped)
    if result.settings.topology:
        _, labels = remove_islands(masks, warped, labels, count_parts(atlas.numbered.data))
    return atlas.label_values(labels, result.grid, result.labels)


class PairRunner:
    """Keeps what successive pairs share: the atlas, the query with its reference, and the models."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._atlases: dict[str, Atlas] = {}
        self._contexts: dict[str, Context] = {}
        self._queries: dict[str, tuple[Volume, Volume]] = {}
        self._models: dict[Any, Segmenter | None] = {}
        self._unnamed: dict[str, set[int]] = {}

    def run(self, variant: Variant, pair: Pair, on_stage: Callable[[str], None] | None) -> PairRecord:
        """One pair by one variant; where registration or model give up, the pair has failed."""
        query, reference = self._query(pair.query)
        model = self.load(variant)
        atlas = None if variant.prompts_from == "user" else self._atlas(pair.atlas)
        atlas_values = set(self._plan.values) if atlas is None else set(atlas.values)
        failure, cost = "", _Cost()
        try:
            if atlas is None:
                results = self._user_click(model, query, reference, cost)
            else:
                results = self._segment(variant, atlas, query, model, cost, on_stage)
                if "model" in results:
                    results["oracle"] = oracle(results["atlas"], results["model"], reference)
        except (RegistrationError, ModelError) as error:
            # A file that cannot be used is no failure of the method, and ends the run.
            logger.warning("%s -> %s (%s): %s", pair.atlas, pair.query, variant.name, error)
            failure = str(error)
            nothing = Volume(np.zeros_like(reference.data), reference.grid)
            results = dict.fromkeys(variant.scored, nothing)
        if on_stage is not None:
            on_stage("scoring")
        rows = self._score(pair, results, reference, atlas_values, failed=bool(failure))
        unnamed = sorted(set().union(*(self._unnamed.get(name, set()) for name in (pair.atlas, pair.query))))
        return PairRecord(
            variant=variant.name, pair=pair, rows=rows, failure=failure, unnamed=tuple(unnamed), **vars(cost)
        )

    def _segment(
        self,
        variant: Variant,
        atlas: Atlas,
        query: Volume,
        model: Any,
        cost: _Cost,
        on_stage: Callable[[str], None] | None,
    ) -> dict[str, Volume]:
        context, device = self._context(variant, atlas, model, on_stage), self._plan.device
        with cost.measured(device):
            result = segment(context, query, device=device, on_stage=on_stage, model=model)
        cost.take(result)
        if result.model_labels is None:
            return {"atlas": result.atlas_labels}
        results = {"atlas": result.atlas_labels, "model": result.model_labels}
        if "paper" in variant.scored and result.gate is not None:
            results["paper"] = fused_by(result.gate.as_the_paper(), atlas, result)
        return results | {"fused": result.labels}

    def _user_click(self, model: Any, query: Volume, reference: Volume, cost: _Cost) -> dict[str, Volume]:
        scan = canonical_scan(query, "the query")
        truth = reference.turned_to(scan.grid).data
        values = [value for value in self._plan.values if (truth == value).any()]
        # Where the user clicks is no work of the program's.
        clicks = ((n, make_prompt("click", LocalMap.from_full(truth == v))) for n, v in enumerate(values, start=1))
        prompts = {n: click for n, click in clicks if click is not None}
        with cost.measured(self._plan.device):
            start = time.perf_counter()
            maps = model.predict(model.encode(scan), prompts)
            numbers = label_map(maps, scan.grid.shape)
            cost.seconds = {"model": round(time.perf_counter() - start, 3)}
        cost.total_seconds = cost.seconds["model"]
        labels = np.array((0, *values), reference.data.dtype)[numbers]
        return {"model": Volume(labels, scan.grid).turned_to(query.grid)}

    def _score(
        self,
        pair: Pair,
        results: Mapping[str, Volume],
        reference: Volume,
        atlas_values: set[int],
        *,
        failed: bool,
    ) -> tuple[Row, ...]:
        plan = self._plan
        if plan.dataset.ignored is not None:
            results = {method: _without(one, reference, plan.dataset.ignored) for method, one in results.items()}
        scores = score_volumes(results, reference, plan.names, plan.tolerances, centreline=plan.centreline)
        rows = []
        for method, by_value in scores.items():
            for value, one in by_value.items():
                if value not in atlas_values:
                    one = _unscored(one)
                elif failed and one.status == "missed":
                    one = replace(one, status="failed")
                rows.append(Row(pair.query, method, value, plan.names[value], one))
        return tuple(rows)

    def _atlas(self, name: str) -> Atlas:
        if name not in self._atlases:
            self._atlases.clear()
            self._contexts.clear()
            case = self._plan.dataset.case(name)
            atlas = Atlas.from_files(case.image, case.labels)
            self._warn_unnamed(set(atlas.values), name, case.labels)
            self._atlases[name] = restricted(atlas, self._plan.values, case.labels)
        return self._atlases[name]

    def _context(
        self, variant: Variant, atlas: Atlas, model: Segmenter | None, on_stage: Callable[[str], None] | None
    ) -> Context:
        """The atlas with the gate of a variant, trained once for all its queries."""
        if variant.name not in self._contexts:
            context = Context(atlas, variant.settings)
            self._contexts[variant.name] = customize(context, device=self._plan.device, model=model, on_stage=on_stage)
        return self._contexts[variant.name]

    def _query(self, name: str) -> tuple[Volume, Volume]:
        if name not in self._queries:
            self._queries.clear()
            case = self._plan.dataset.case(name)
            reference = load_labels(case.labels, allow_empty=True)
            self._warn_unnamed(label_values(reference), name, case.labels)
            self._queries[name] = load_image(case.image), reference
        return self._queries[name]

    def _warn_unnamed(self, values: set[int], name: str, path: Path) -> None:
        """Warn, once for each case, of label values that nothing is known of: they cannot be scored by name."""
        dataset = self._plan.dataset
        unknown = values - dataset.structures.keys() - {dataset.ignored}
        if unknown and name not in self._unnamed:
            self._unnamed[name] = unknown
            found = ", ".join(map(str, sorted(unknown)))
            logger.warning("%s: dataset.json does not name the label values %s; taken as background", path, found)

    def load(self, variant: Variant) -> Any:
        """The model of a variant; that of the one before is dropped if it is another."""
        chosen = variant.settings
        if chosen.model == NO_MODEL:
            return None
        key = (chosen.model, chosen.model_path, chosen.models)
        if key not in self._models:
            self._models.clear()  # two models may not fit into memory
            self._models[key] = load_chosen(chosen, self._plan.device)
        return self._models[key]


@dataclass
class _Cost:
    """What a pair took."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    peak_memory_mb: int | None = None
    gpu_memory_mb: int | None = None
    confidence: float | None = None
    folding: float | None = None

    def measured(self, device: str) -> _Peak:
        """Around what is to be measured."""
        return _Peak(self, device)

    def take(self, result: Segmentation) -> None:
        """Copy what a result says."""
        inside = {f"registration: {name}": seconds for name, seconds in result.registration.seconds.items()}
        self.seconds = {name: round(seconds, 3) for name, seconds in (*result.seconds.items(), *inside.items())}
        self.total_seconds = round(sum(result.seconds.values()), 3)
        self.confidence = round(float(result.registration.confidence), 6)
        self.folding = round(float(result.registration.folding), 8)


class _Peak:
    """Peak memory of a block."""

    def __init__(self, cost: _Cost, device: str) -> None:
        self._cost, self._device = cost, device

    def __enter__(self) -> None:
        reset_peak_memory()
        if self._device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        self._cost.peak_memory_mb = peak_memory_mb()
        if self._device == "cuda":
            import torch

            self._cost.gpu_memory_mb = round(torch.cuda.max_memory_allocated() / (1 << 20))


def restricted(atlas: Atlas, values: Sequence[int], path: Path) -> Atlas:
    """Keep these label values of an atlas only.

    Raises
    ------
    InputError
        If it has none of them; the message names ``path``.
    """
    if set(atlas.values) <= set(values):
        return atlas
    kept = np.isin(atlas.labels.data, values)
    if not kept.any():
        raise InputError(f"{path}: has none of the structures of this benchmark; leave the case out of the atlases")
    labels = replace(atlas.labels, data=np.where(kept, atlas.labels.data, 0).astype(atlas.labels.data.dtype))
    present = label_values(labels)
    return Atlas(atlas.image, labels, tuple(one for one in atlas.structures if one.value in present))


def _without(result: Volume, reference: Volume, ignored: int) -> Volume:
    """A result without the voxels that nobody annotated."""
    there = reference.turned_to(result.grid).data == ignored
    return replace(result, data=np.where(there, 0, result.data).astype(result.data.dtype))


def _unscored(scores: StructureScores) -> StructureScores:
    nan = math.nan
    cldice = None if scores.cldice is None else nan
    return replace(scores, status="not_in_atlas", dice=nan, nsd=nan, hd95_mm=nan, hd95_voxel_mm=nan, cldice=cldice)
