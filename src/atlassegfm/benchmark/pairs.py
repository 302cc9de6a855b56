"""One pair of a benchmark: segmented by a variant, and scored."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..atlas import Atlas, canonical_scan
from ..context import Context, customize
from ..core.config import gate_settings
from ..core.errors import InputError, ModelError, RegistrationError
from ..core.image import Volume, label_values, load_image, load_labels
from ..core.mask import LocalMap
from ..core.parallel import peak_memory_mb, reset_peak_memory
from ..evaluate.metrics import StructureScores
from ..evaluate.scores import check_grids, score_volumes
from ..fusion.gate import Gate, fuse_structures
from ..fusion.label_map import count_parts, label_map, remove_islands
from ..models.base import Models
from ..models.incontext import Baseline, InContextModel
from ..models.table import load_chosen
from ..prompts import make_prompt
from ..result import Segmentation
from ..segment import segment
from ..settings import NO_MODEL
from .plan import IN_CONTEXT, Plan, Variant
from .protocols import Pair
from .records import PairRecord, Row

logger = logging.getLogger(__name__)


def oracle(atlas: Volume, model: Volume, reference: Volume) -> Volume:
    """Compute the label map of a perfect gate: where atlas and model disagree, the one that is right, or background.

    All are label maps on one grid, in any array order.
    """
    a, m, r = atlas.data, model.data, reference.turned_to(atlas.grid).data
    right = np.where((r == a) | (r == m), r, 0)
    return Volume(np.where(a == m, a, right).astype(a.dtype), atlas.grid, atlas.source)


def fused_by(gate: Gate, atlas: Atlas, result: Segmentation) -> Volume:
    """Compute the label map that another gate makes of the masks of a result, which has a model.

    The gate has no correction, as the paper's: ValueError if it has one, which needs the scan.
    """
    if gate.correction is not None:
        raise ValueError("a gate with a correction needs the scan; expected one as the paper's")
    numbers = {value: n for n, value in enumerate(atlas.values, start=1)}
    warped = {numbers[value]: one.atlas for value, one in result.probabilities.items()}
    predicted = {numbers[v]: one.model for v, one in result.probabilities.items() if one.model is not None}
    masks = warped | fuse_structures(atlas.image, warped, predicted, gate, device=result.device)
    labels = label_map(masks, result.grid.shape, warped)
    if result.settings.topology:
        _, labels = remove_islands(masks, warped, labels, count_parts(atlas.numbered.data))
    return atlas.label_values(labels, result.grid, result.labels)


class PairRunner:
    """Run pairs; what successive pairs have in common is kept: the atlas, the query with its reference, the models."""

    def __init__(self, plan: Plan, on_stage: Callable[[str], None] | None = None) -> None:
        self._plan = plan
        self._on_stage = on_stage or (lambda _: None)
        self._atlases: dict[str, Atlas] = {}
        self._contexts: dict[tuple[str, str], Context] = {}  # by the atlas and the settings of the gate
        self._taken = ""
        self._queries: dict[str, tuple[Volume, Volume]] = {}
        self._models: dict[Any, Any] = {}
        self._unnamed: dict[str, set[int]] = {}

    def run(self, variant: Variant, pair: Pair) -> PairRecord:
        """Segment and score one pair, which has failed if registration or model raise an error.

        A pair whose files cannot be used has no rows: that is no failure of the method.
        """
        try:
            return self._run(variant, pair)
        except InputError as error:
            logger.warning("%s -> %s: %s; the pair is not scored", pair.atlases, pair.query, error)
            return PairRecord(variant=variant.name, pair=pair, rows=(), failure=str(error))

    def _run(self, variant: Variant, pair: Pair) -> PairRecord:
        if pair.atlases != self._taken:
            self._atlases.clear()
            self._taken = pair.atlases
        query, reference = self._query(pair.query)
        model = self.load(variant)
        atlases = () if variant.prompts_from == "user" else self._atlases_of(variant, pair)
        failure, cost, judged = "", dict[str, Any](), dict[tuple[str, int], dict[str, Any]]()
        try:
            if variant.baseline is not None:
                results = self._in_context(model, self._atlas(pair.atlas), query, cost)
            elif not atlases:
                results = self._click(model, query, reference, cost)
            else:
                results, judged = self._segment(variant, atlases, query, model, cost)
                if "model" in results:
                    results["oracle"] = oracle(results["atlas"], results["model"], reference)
        except (RegistrationError, ModelError) as error:
            logger.warning("%s -> %s (%s): %s", pair.atlases, pair.query, variant.name, error)
            failure = str(error)
            results = dict.fromkeys(variant.scored, Volume(np.zeros_like(reference.data), reference.grid))
        self._on_stage("scoring")
        atlas_values = set(self._atlas(atlases[0]).values if atlases else self._plan.values)
        rows = self._score(pair, results, reference, atlas_values, failed=bool(failure))
        rows = tuple(replace(row, **judged.get((row.method, row.value), {})) for row in rows)
        unnamed = sorted(self._unnamed.get(pair.atlas, set()) | self._unnamed.get(pair.query, set()))
        return PairRecord(variant=variant.name, pair=pair, rows=rows, failure=failure, unnamed=tuple(unnamed), **cost)

    def _atlases_of(self, variant: Variant, pair: Pair) -> tuple[str, ...]:
        """Names of the atlases that a variant takes of a pair, one with the most structures first."""
        names = (pair.atlas, *pair.others)[: variant.atlases]
        first = max(names, key=lambda name: len(self._atlas(name).structures))
        return first, *(name for name in names if name != first)

    def _context(self, variant: Variant, names: Sequence[str], model: Models | None) -> Context:
        """A context of these atlases; the gate of the first one serves all queries and variants."""
        settings, (first, *others) = variant.settings, names
        key = first, repr((settings.model, settings.prompt, settings.seed, gate_settings(settings)))
        if key not in self._contexts:
            context = Context(self._atlas(first), settings)
            context = customize(context, device=self._plan.device, model=model, on_stage=self._on_stage)
            self._contexts = {made: one for made, one in self._contexts.items() if made[0] == first} | {key: context}
        context = replace(self._contexts[key], settings=settings)
        for name in others:
            context = context.with_atlas(self._atlas(name), name)
        return context

    def _segment(
        self, variant: Variant, names: Sequence[str], query: Volume, model: Models | None, cost: dict[str, Any]
    ) -> tuple[dict[str, Volume], dict[tuple[str, int], dict[str, Any]]]:
        """Segment; label maps by method, and by method and label value what the result says of itself."""
        device, context = self._plan.device, self._context(variant, names, model)
        with _measured_memory(device, cost):
            result = segment(context, query, device=device, on_stage=self._on_stage, model=model)
        registration = result.registration
        inside = {f"registration: {name}": seconds for name, seconds in registration.seconds.items()}
        cost["seconds"] = {name: round(seconds, 3) for name, seconds in {**result.seconds, **inside}.items()}
        cost["total_seconds"] = round(sum(result.seconds.values()), 3)
        gate = 0 if result.gate is None else result.gate.parameter_count
        cost["parameters"] = sum(registration.parameter_count.values()) + gate
        cost["confidence"] = round(float(registration.confidence), 6)
        cost["folding"] = round(float(registration.folding), 8)
        if result.model_labels is None:
            return {"atlas": result.atlas_labels}, _judged("atlas", result)
        results = {"atlas": result.atlas_labels, **result.member_labels, "model": result.model_labels}
        if "paper" in variant.scored and result.gate is not None:
            results["paper"] = fused_by(result.gate.as_the_paper(), context.atlas, result)
        return results | {"fused": result.labels}, _judged("fused", result)

    def _in_context(
        self, model: InContextModel, atlas: Atlas, query: Volume, cost: dict[str, Any]
    ) -> dict[str, Volume]:
        scan = canonical_scan(query, "the query")
        cost["parameters"] = model.parameters
        with _measured_memory(self._plan.device, cost):
            start = time.perf_counter()
            numbers = label_map(model.predict(atlas, scan, self._on_stage), scan.grid.shape)
            cost["total_seconds"] = round(time.perf_counter() - start, 3)
        cost["seconds"] = {IN_CONTEXT: cost["total_seconds"]}
        return {IN_CONTEXT: atlas.label_values(numbers, scan.grid, query)}

    def _click(self, model: Any, query: Volume, reference: Volume, cost: dict[str, Any]) -> dict[str, Volume]:
        """Prompt the model with one click into the middle of each true structure, as a user would."""
        scan = canonical_scan(query, "the query")
        truth = reference.turned_to(scan.grid).data
        values = [value for value in self._plan.values if (truth == value).any()]
        clicks = ((n, make_prompt("click", LocalMap.from_full(truth == v))) for n, v in enumerate(values, start=1))
        prompts = {n: click for n, click in clicks if click is not None}
        with _measured_memory(self._plan.device, cost):
            start = time.perf_counter()
            numbers = label_map(model.predict(model.encode(scan), prompts), scan.grid.shape)
            cost["total_seconds"] = round(time.perf_counter() - start, 3)
        cost["seconds"] = {"model": cost["total_seconds"]}
        labels = np.array((0, *values), reference.data.dtype)[numbers]
        return {"model": Volume(labels, scan.grid).turned_to(query.grid)}

    def _score(
        self, pair: Pair, results: Mapping[str, Volume], reference: Volume, atlas_values: set[int], *, failed: bool
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
                rows.append(Row(pair.query, value, plan.names[value], one, method))
        return tuple(rows)

    def _atlas(self, name: str) -> Atlas:
        if name not in self._atlases:
            case = self._plan.dataset.case(name)
            atlas = Atlas.from_files(case.image, case.labels)
            self._warn_unnamed(set(atlas.values), name, case.labels)
            self._atlases[name] = restricted(atlas, self._plan.values, case.labels)
        return self._atlases[name]

    def _query(self, name: str) -> tuple[Volume, Volume]:
        if name not in self._queries:
            self._queries.clear()
            case = self._plan.dataset.case(name)
            reference = load_labels(case.labels, allow_empty=True)
            self._warn_unnamed(set(label_values(reference.data)), name, case.labels)
            image = load_image(case.image)
            check_grids(image, reference)
            self._queries[name] = image, reference
        return self._queries[name]

    def _warn_unnamed(self, values: set[int], name: str, path: Path) -> None:
        """Warn once for each case of label values that dataset.json does not name: they cannot be scored."""
        dataset = self._plan.dataset
        unknown = values - dataset.structures.keys() - {dataset.ignored}
        if unknown and name not in self._unnamed:
            self._unnamed[name] = unknown
            found = ", ".join(map(str, sorted(unknown)))
            logger.warning("%s: dataset.json does not name the label values %s; taken as background", path, found)

    def load(self, variant: Variant) -> Any:
        """Load the models of a variant, or its baseline; others are dropped first, as two may not fit into memory."""
        if variant.baseline is not None:
            if variant.baseline not in self._models:
                self._models.clear()
                self._models[variant.baseline] = variant.baseline.load(self._plan.device)
            return self._models[variant.baseline]
        # A large network that waits would count in the memory of others.
        self._models = {key: model for key, model in self._models.items() if not isinstance(key, Baseline)}
        chosen = variant.settings
        key = (chosen.model, chosen.model_path, chosen.models)
        if chosen.model != NO_MODEL and key not in self._models:
            self._models.clear()
            self._models[key] = load_chosen(chosen, self._plan.device)
        return self._models.get(key)


def _judged(method: str, result: Segmentation) -> dict[tuple[str, int], dict[str, Any]]:
    """Estimate and verdict of each structure of a result, as fields of its rows; none where nothing is judged."""
    if not result.is_judged:
        return {}
    judged = {}
    for one in result.structures:
        quality = one.quality
        estimate = None if quality is None or quality.estimated_dice is None else round(quality.estimated_dice, 6)
        verdict = (quality and quality.verdict) or one.status
        judged[method, one.structure.value] = {"estimated_dice": estimate, "verdict": verdict}
    return judged


@contextmanager
def _measured_memory(device: str, cost: dict[str, Any]) -> Iterator[None]:
    """Add the peak memory of the block to ``cost``, also where it raises."""
    import torch

    reset_peak_memory()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        cost["peak_memory_mb"] = peak_memory_mb()
        if device == "cuda":
            cost["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / (1 << 20))


def restricted(atlas: Atlas, values: Sequence[int], path: Path) -> Atlas:
    """Keep these label values of an atlas only; InputError, which names ``path``, if it has none of them."""
    structures = tuple(one for one in atlas.structures if one.value in values)
    if not structures:
        raise InputError(f"{path}: has none of the structures of this benchmark; leave the case out of the atlases")
    if structures == atlas.structures:
        return atlas
    labels = atlas.labels.data
    kept = np.where(np.isin(labels, values), labels, 0).astype(labels.dtype)
    return Atlas(atlas.image, replace(atlas.labels, data=kept), structures)


def _without(result: Volume, reference: Volume, ignored: int) -> Volume:
    """Remove the voxels of a result that nobody annotated."""
    there = reference.turned_to(result.grid).data == ignored
    return replace(result, data=np.where(there, 0, result.data).astype(result.data.dtype))


def _unscored(scores: StructureScores) -> StructureScores:
    nan = math.nan
    cldice = None if scores.cldice is None else nan
    scores = replace(scores, status="not_in_atlas", dice=nan, nsd=nan, cldice=cldice)
    return replace(scores, hd95_mm=nan, assd_mm=nan, hd95_voxel_mm=nan)
