"""Running a benchmark: pair after pair, every method on each, kept on disk so that a killed run goes on.

A finished pair is a file ``pairs/VARIANT/ATLAS/QUERY.json``. ``plan.json`` says what they were made with; a
folder that was made with something else is refused, as its figures would be mixed with those of today. Other pairs
of the same may be added, and a pair whose files have changed is computed again.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..atlas import Atlas, canonical_scan
from ..core.config import to_dict
from ..core.dataset import Dataset
from ..core.errors import InputError, ModelError, RegistrationError
from ..core.files import atomic_path
from ..core.image import Volume, load_image, load_labels
from ..core.mask import LocalMap
from ..core.parallel import peak_memory_mb, reset_peak_memory
from ..core.version import __version__, source_digest
from ..evaluate.metrics import StructureScores
from ..evaluate.scoring import label_values, score_volumes
from ..evaluate.tolerances import Tolerances
from ..fusion.gate import Gate
from ..fusion.label_map import label_map
from ..fusion.train import learn_gate
from ..models import Segmenter
from ..models.choice import load_chosen
from ..prompts import make_prompt
from ..result import Segmentation
from ..segment import fused_by, segment
from ..settings import NO_MODEL, Settings
from .protocols import Pair

logger = logging.getLogger(__name__)

#: What is scored of each pair. "oracle": where atlas and model disagree, the one that is right, if one is: what a
#: perfect gate between both would give. "paper": what the paper's gate makes of the same masks as the default one.
METHODS = ("atlas", "model", "paper", "fused", "oracle")
#: Code that cannot change a score: a run goes on after a change to it.
_HARMLESS = ("__main__.py", "cli.py", "cli/", "demo.py", "doctor.py", "report.py", "results.py", "benchmark/tables.py")
_HARMLESS_TOO = ("benchmark/plots.py", "benchmark/protocols.py", "phantom.py", "memory.py", "benchmark/timing.py")
_NOT_USED = ("cohort/", "threads.py")
PLAN, PAIRS = "plan.json", "pairs"
#: Files of a benchmark's folder; one with anything else in it is not touched.
OUTPUTS = frozenset({PLAN, PAIRS, "results.csv", "times.csv", "summary.json", "report.md", "dice.png", "dice-time.png"})


@dataclass(frozen=True)
class Variant:
    """One way of doing the job, a column of the benchmark.

    Parameters
    ----------
    name : str
        As tables show it.
    settings : Settings
        Of the job.
    prompts_from : {"atlas", "user"}
        "user": the model alone, with one click into the middle of the true structure.
    methods : tuple of str
        Which of :data:`METHODS` tables show.
    """

    name: str
    settings: Settings
    prompts_from: Literal["atlas", "user"] = "atlas"
    methods: tuple[str, ...] = METHODS

    @property
    def scored(self) -> tuple[str, ...]:
        """Which methods this variant has."""
        if self.prompts_from == "user":
            return ("model",)
        if self.settings.model == NO_MODEL:
            return ("atlas",)
        return METHODS if self._is_corrected else tuple(method for method in METHODS if method != "paper")

    @property
    def _is_corrected(self) -> bool:
        """Whether its gate does more than the paper's."""
        return (self.settings.fusion.gate, self.settings.fusion.examples) == ("default", "simulated")


@dataclass(frozen=True)
class Plan:
    """All that decides the figures of a benchmark.

    Parameters
    ----------
    title : str
        What it is, in a few words ("all-pairs").
    dataset : Dataset
        With the cases that take part.
    pairs : tuple of Pair
        In the order they are run.
    variants : tuple of Variant
        Run one after the other on each pair, beginning with another one each time, so that their times compare.
    values : tuple of int
        Label values that take part: the others are taken out of the atlas and are not scored.
    tolerances : Tolerances
        For the NSD.
    centreline : tuple of int
        Label values that clDice is wanted for.
    seed : int
        Of the protocol and the bootstrap.
    device : {"cpu", "cuda"}
        Where to compute.
    command : str
        That gives the same again.
    """

    title: str
    dataset: Dataset
    pairs: tuple[Pair, ...]
    variants: tuple[Variant, ...]
    values: tuple[int, ...]
    tolerances: Tolerances
    centreline: tuple[int, ...] = ()
    seed: int = 0
    device: str = "cpu"
    command: str = ""

    @property
    def names(self) -> dict[int, str]:
        """Name of each label value that takes part."""
        return {value: self.dataset.structures[value] for value in self.values}

    def file_sizes(self, pair: Pair) -> tuple[int, ...]:
        """Bytes of the files that a pair is made from: a pair is computed again where they are others now."""
        cases = [self.dataset.case(name) for name in (pair.atlas, pair.query)]
        return tuple(path.stat().st_size for case in cases for path in (case.image, case.labels))

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to go on, as plain values."""
        import torch

        return {
            "dataset": self.dataset.name,
            "structures": {str(value): name for value, name in self.names.items()},
            "tolerances_mm": {name: self.tolerances.of(value, name) for value, name in self.names.items()},
            "centreline": list(self.centreline),
            "variants": {
                one.name: {"prompts_from": one.prompts_from, "settings": to_dict(one.settings)} for one in self.variants
            },
            "device": self.device,
            # Sums round differently with another number of threads.
            "threads": torch.get_num_threads(),
            "code": code_digest(),
            "versions": {
                "atlassegfm": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("numpy", "scipy", "torch")},
            },
        }


@dataclass(frozen=True)
class Row:
    """One structure of one pair by one method; a thing :func:`~atlassegfm.evaluate.scoring.summarise` takes.

    Parameters
    ----------
    case : str
        The query.
    method : str
        One of :data:`METHODS`.
    value : int
        Label value.
    structure : str
        Its name.
    scores : StructureScores
        The status "failed" is that of a pair that ended in an error: it counts as missed. "not_in_atlas": the atlas
        does not have the structure, and nothing is scored.
    """

    case: str
    method: str
    value: int
    structure: str
    scores: StructureScores


@dataclass(frozen=True)
class Record:
    """One pair by one variant.

    Parameters
    ----------
    variant : str
        Name of the variant.
    pair : Pair
        Atlas and query.
    rows : tuple of Row
        Scores.
    failure : str
        Why there is no result; empty if there is one.
    seconds : mapping of str to float
        Wall time of each stage; those of the registration begin with "registration: ".
    total_seconds : float
        Of all stages, files already read.
    peak_memory_mb, gpu_memory_mb : int or None
        Largest memory while it ran; None where the system does not tell, or no GPU took part.
    confidence : float or None
        Of the registration.
    folding : float or None
        Share of the body at which the displacement field is folded.
    file_sizes : tuple of int
        Of the files it was made from.
    unnamed : tuple of int
        Label values of atlas or query that ``dataset.json`` does not name: they were taken as background.
    """

    variant: str
    pair: Pair
    rows: tuple[Row, ...]
    failure: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    peak_memory_mb: int | None = None
    gpu_memory_mb: int | None = None
    confidence: float | None = None
    folding: float | None = None
    file_sizes: tuple[int, ...] = ()
    unnamed: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: it is the text "nan" there."""
        return {
            "variant": self.variant,
            "atlas": self.pair.atlas,
            "query": self.pair.query,
            "failure": self.failure,
            "seconds": dict(self.seconds),
            "total_seconds": self.total_seconds,
            "peak_memory_mb": self.peak_memory_mb,
            "gpu_memory_mb": self.gpu_memory_mb,
            "confidence": self.confidence,
            "folding": self.folding,
            "file_sizes": list(self.file_sizes),
            "unnamed": list(self.unnamed),
            "rows": [
                {"method": row.method, "value": row.value, "structure": row.structure}
                | {key: "nan" if _is_nan(value) else value for key, value in vars(row.scores).items()}
                for row in self.rows
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Record:
        """The way back."""
        rows = []
        for row in content["rows"]:
            method, value, structure = row["method"], row["value"], row["structure"]
            scores: dict[str, Any] = {
                key: math.nan if score == "nan" else score
                for key, score in row.items()
                if key not in ("method", "value", "structure")
            }
            rows.append(Row(content["query"], method, value, structure, StructureScores(**scores)))
        kept = {key: content[key] for key in ("failure", "seconds", "total_seconds", "peak_memory_mb")}
        kept |= {key: content[key] for key in ("gpu_memory_mb", "confidence", "folding")}
        kept |= {key: tuple(content[key]) for key in ("file_sizes", "unnamed")}
        return cls(content["variant"], Pair(content["atlas"], content["query"]), tuple(rows), **kept)


def run(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    on_pair: Callable[[int, int, str], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> list[Record]:
    """Run all pairs that are not done yet.

    Parameters
    ----------
    plan : Plan
        What to run.
    out : Path
        Folder of the benchmark, made if it is not there.
    force : bool
        Whether to begin anew where the folder holds another benchmark, or the same one.
    on_pair : callable, optional
        Told number (from 1), count and name of each pair as it begins.
    on_stage : callable, optional
        Told of each stage.

    Returns
    -------
    list of Record
        Variant by variant, in the order of the pairs.

    Raises
    ------
    InputError
        If the folder holds something else, or a file of the dataset cannot be used. What is done by then is kept.
    AtlasSegError
        If a model cannot be loaded, before anything is written.
    """
    store = {
        (variant.name, pair): out / PAIRS / slug(variant.name) / pair.atlas / f"{pair.query}.json"
        for variant in plan.variants
        for pair in plan.pairs
    }
    bench = _Bench(plan)
    # Weights that are missing are told of now, and not after the variants before.
    for variant in plan.variants:
        if force or not all(store[variant.name, pair].exists() for pair in plan.pairs):
            bench.load(variant)
    _prepare(plan, out, force=force)
    done = {key: _load(path) for key, path in store.items() if path.exists()}
    changed = [key for key, record in done.items() if record.file_sizes != plan.file_sizes(key[1])]
    for key in changed:
        del done[key]
    if changed:
        logger.warning("%s: pairs whose files have changed, and that are computed again: %d", out, len(changed))
    todo = [(variant, pair) for variant, pair in _alternating(plan) if (variant.name, pair) not in done]
    if todo and len(todo) < len(store):
        logger.warning("%s: %d of %d are done already", out, len(store) - len(todo), len(store))
    for number, (variant, pair) in enumerate(todo, start=1):
        if on_pair is not None:
            name = f"{pair.atlas} -> {pair.query}" + (f" ({variant.name})" if len(plan.variants) > 1 else "")
            on_pair(number, len(todo), name)
        record = replace(bench.run(variant, pair, on_stage), file_sizes=plan.file_sizes(pair))
        done[variant.name, pair] = record
        path = store[variant.name, pair]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [done[key] for key in store]


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-") or "variant"


def code_digest() -> str:
    """12 hex digits over the source of all that can change a score."""
    return source_digest((*_HARMLESS, *_HARMLESS_TOO, *_NOT_USED), Path(__file__).parents[1])


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


class _Bench:
    """Keeps what successive pairs share: the atlas, the query with its reference, and the models."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._contexts: dict[str, Atlas] = {}
        self._gates: dict[str, Gate | None] = {}
        self._queries: dict[str, tuple[Volume, Volume]] = {}
        self._models: dict[Any, Segmenter | None] = {}
        self._unnamed: dict[str, set[int]] = {}

    def run(self, variant: Variant, pair: Pair, on_stage: Callable[[str], None] | None) -> Record:
        """One pair by one variant; where registration or model give up, the pair has failed."""
        query, reference = self._query(pair.query)
        model = self.load(variant)
        context = None if variant.prompts_from == "user" else self._context(pair.atlas)
        atlas_values = set(self._plan.values) if context is None else set(context.values)
        failure, cost = "", _Cost()
        try:
            if context is None:
                results = self._user_click(model, query, reference, cost)
            else:
                results = self._segment(variant, context, query, model, cost, on_stage)
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
        return Record(variant.name, pair, rows, failure, unnamed=tuple(unnamed), **vars(cost))

    def _segment(
        self,
        variant: Variant,
        context: Atlas,
        query: Volume,
        model: Any,
        cost: _Cost,
        on_stage: Callable[[str], None] | None,
    ) -> dict[str, Volume]:
        gate, device = self._gate(variant, context, model, on_stage), self._plan.device
        with cost.measured(device):
            result = segment(context, query, variant.settings, device=device, on_stage=on_stage, model=model, gate=gate)
        cost.take(result)
        if result.model_labels is None:
            return {"atlas": result.atlas_labels}
        results = {"atlas": result.atlas_labels, "model": result.model_labels}
        if "paper" in variant.scored and result.gate is not None:
            results["paper"] = fused_by(result.gate.as_the_paper(), context, result)
        return results | {"fused": result.labels}

    def _gate(
        self, variant: Variant, context: Atlas, model: Any, on_stage: Callable[[str], None] | None
    ) -> Gate | None:
        """The gate of an atlas, trained once for all its queries; None where each query trains its own."""
        settings = variant.settings
        if model is None or settings.fusion.examples == "round trip":
            return None
        if variant.name not in self._gates:
            self._gates[variant.name] = learn_gate(
                context, settings, device=self._plan.device, on_stage=on_stage, model=model
            )
        return self._gates[variant.name]

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

    def _context(self, name: str) -> Atlas:
        if name not in self._contexts:
            self._contexts.clear()
            self._gates.clear()
            case = self._plan.dataset.case(name)
            context = Atlas.from_files(case.image, case.labels)
            self._tell_unnamed(set(context.values), name, case.labels)
            self._contexts[name] = restricted(context, self._plan.values, case.labels)
        return self._contexts[name]

    def _query(self, name: str) -> tuple[Volume, Volume]:
        if name not in self._queries:
            self._queries.clear()
            case = self._plan.dataset.case(name)
            reference = load_labels(case.labels, allow_empty=True)
            self._tell_unnamed(label_values(reference), name, case.labels)
            self._queries[name] = load_image(case.image), reference
        return self._queries[name]

    def _tell_unnamed(self, values: set[int], name: str, path: Path) -> None:
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


def restricted(context: Atlas, values: Sequence[int], path: Path) -> Atlas:
    """The atlas with these label values only."""
    if set(context.values) <= set(values):
        return context
    kept = np.isin(context.labels.data, values)
    if not kept.any():
        raise InputError(f"{path}: has none of the structures of this benchmark; leave the case out of the atlases")
    labels = replace(context.labels, data=np.where(kept, context.labels.data, 0).astype(context.labels.data.dtype))
    present = label_values(labels)
    return Atlas(context.image, labels, tuple(one for one in context.structures if one.value in present))


def _without(result: Volume, reference: Volume, ignored: int) -> Volume:
    """A result without the voxels that nobody annotated."""
    there = reference.turned_to(result.grid).data == ignored
    return replace(result, data=np.where(there, 0, result.data).astype(result.data.dtype))


def _unscored(scores: StructureScores) -> StructureScores:
    nan = math.nan
    cldice = None if scores.cldice is None else nan
    return replace(scores, status="not_in_atlas", dice=nan, nsd=nan, hd95_mm=nan, hd95_voxel_mm=nan, cldice=cldice)


def _alternating(plan: Plan) -> Iterator[tuple[Variant, Pair]]:
    for number, pair in enumerate(plan.pairs):
        first = number % len(plan.variants)
        for variant in (*plan.variants[first:], *plan.variants[:first]):
            yield variant, pair


def _prepare(plan: Plan, out: Path, *, force: bool) -> None:
    """Make the folder, or check that what it holds is a part of this benchmark."""
    folders = {slug(variant.name): variant.name for variant in plan.variants}
    for variant in plan.variants:
        if folders[slug(variant.name)] != variant.name:
            raise InputError(
                f"the variants {variant.name!r} and {folders[slug(variant.name)]!r} would share a folder; rename one"
            )
    wanted = plan.fingerprint()
    path = out / PLAN
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file is in the way, expected a folder for the benchmark; choose another")
    if out.is_dir():
        foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in OUTPUTS)
        foreign = [name for name in foreign if not name.startswith(".writing-")]
        if foreign:
            raise InputError(f"{out}: holds other files ({foreign[0]}); choose another folder for the benchmark")
        if force:
            shutil.rmtree(out / PAIRS, ignore_errors=True)
            for name in OUTPUTS - {PAIRS}:
                (out / name).unlink(missing_ok=True)
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{path}: is damaged; begin anew with --force, or choose another folder")
        differing = [key for key in wanted if found.get(key) != json.loads(json.dumps(wanted[key]))]
        if differing:
            named = ", ".join(_difference(key, found, wanted) for key in differing)
            raise InputError(
                f"{out}: holds a benchmark made with other {named}; choose another folder, or begin anew with --force"
            )
        return
    if (out / PAIRS).exists():
        raise InputError(f"{out}: holds results without {PLAN}, which says of what; choose another folder, or --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); choose another place") from None
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def _difference(key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two plans; short values are named."""
    values = (found.get(key), wanted[key])
    if any(isinstance(value, dict | list) for value in values):
        return key
    return f"{key} ({values[0]} there, {values[1]} now)"


def _load(path: Path) -> Record:
    try:
        return Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is damaged; delete it, and it is computed again") from None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
