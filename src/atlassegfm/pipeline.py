"""From one annotated scan and one query to the query's segmentation: register, prompt, predict, fuse.

Everything is computed in RAS-canonical array order and turned back at the end, so that a result does not
depend on the array order a query is stored in. The label of a query plays no part: nothing here takes one.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_dataclass
from scipy import ndimage

from .context import Context, canonical_scan
from .correction import Lesson, lesson, train_correction
from .errors import InputError, ModelError
from .fusion import FusionSettings, Gate, GateExample, fuse, label_map, train_gate
from .geometry import Grid
from .image import LocalMap, Volume, smallest_label_type
from .metrics import dice
from .models import Segmenter, describe_model, licence_accepted, load_model
from .models.settings import ModelSettings
from .prompts import INSIDE, BoxPrompt, ClickPrompt, Prompt, PromptKind, make_prompt
from .quality import Case, Evidence, StructureQuality, Verdict, gather, judge, overall
from .registration import Registration, RegistrationSettings, compare, register
from .simulation import simulated_mask
from .smoothing import best_share, smoothed, window_mm
from .structures import Structure
from .threads import side_by_side
from .topology import changes_to, topologies_of
from .transforms import (
    Affine,
    JacobianStatistics,
    Transform,
    deformation_statistics,
    nodes_in,
    stages_of,
    warp_labels_by_each,
)

logger = logging.getLogger(__name__)

#: Name of the model that is none: the result is the warped atlas.
NO_MODEL = "none"
#: From this share outside the query's field of view on, a structure counts as outside. With less than a tenth
#: of it in view, registration errors of a few mm decide whether any of it is.
_OUTSIDE_SHARE = 0.9
#: A structure whose warped mask is nowhere is called outside, not absent, if most of it is out of view.
_MOSTLY_OUTSIDE_SHARE = 0.5
#: Points along each axis of the query's field of view at which a given transform is tried.
_TRIED_POINTS = 16
#: Probability of a filled hole: just inside.
_FILLED = 0.51
#: Voxels mapped at a time: bounds the memory of coordinates.
_CHUNK_VOXELS = 1_000_000

DEVICES = ("auto", "cpu", "cuda")
Status = Literal["present", "absent", "outside"]


@settings_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Settings:
    """All settings of a job."""

    registration: RegistrationSettings = field(default_factory=RegistrationSettings)
    """How the atlas is registered to the query."""

    fusion: FusionSettings = field(default_factory=FusionSettings)
    """How the warped atlas and the model's answer become one."""

    model: str = "builtin"
    """Name of the segmentation model; "none" stops after the registration: the result is the warped atlas.
    ``atlassegfm models`` lists them."""

    model_path: str = ""
    """File or folder of the model's weights; empty: looked for where ``atlassegfm models show`` says."""

    models: ModelSettings = field(default_factory=ModelSettings)
    """How the models are set up."""

    prompt: Literal["auto", "click", "box", "mask"] = "auto"
    """What the model is prompted with; "auto" is the best of the prompts it takes."""

    topology: bool = True
    """Whether the fused result loses islands and holes that the atlas's structures do not have; not with the model
    "none", whose result is the warped atlas as it is."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Start of the random numbers: the same seed gives the same result on the same machine."""


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


class _Clock:
    """Tells the name of each stage as it begins, and keeps how long it took."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage

    def tell(self, text: str) -> None:
        if self._on_stage is not None:
            self._on_stage(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; gives a function that tells of its parts."""
        self.tell(name)
        start = time.perf_counter()
        yield lambda part: self.tell(f"{name}: {part}")
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def resolve_device(name: str) -> str:
    """Turn "auto", "cpu" or "cuda" into "cpu" or "cuda".

    Raises
    ------
    InputError
        If the name is not known.
    ModelError
        If "cuda" was asked for and there is none.
    """
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}; expected one of {', '.join(DEVICES)}")
    if name == "cpu":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ModelError("the device 'cuda' was asked for and PyTorch sees no CUDA GPU; use the device 'cpu' or 'auto'")
    return "cpu"


def load_chosen(settings: Settings, device: str) -> Segmenter | None:
    """Load the model the settings name onto "cpu" or "cuda"; None without a model.

    Raises
    ------
    AtlasSegError
        As :func:`~atlassegfm.models.load_model`.
    """
    if settings.model == NO_MODEL:
        return None
    path = Path(settings.model_path).expanduser() if settings.model_path else None
    return load_model(settings.model, device, settings.models, path)


def prompt_kind(settings: Settings) -> PromptKind | None:
    """The kind of prompt the settings come to; None without a model.

    Raises
    ------
    InputError
        If the model is not known or does not take the wanted prompt.
    """
    if settings.model == NO_MODEL:
        return None
    row = describe_model(settings.model)
    if settings.prompt == "auto":
        return row.prompts[0]
    if row.prompts == ("region",):
        raise InputError(f"the model {row.name!r} takes no prompt; leave the prompt at 'auto'")
    if settings.prompt not in row.prompts:
        raise InputError(
            f"the model {row.name!r} does not take the prompt {settings.prompt!r}; it takes {', '.join(row.prompts)}"
        )
    return settings.prompt


def segment(
    context: Context,
    query: Volume,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    on_stage: Callable[[str], None] | None = None,
    model: Segmenter | None = None,
    transform: Transform | None = None,
    further_fits: Sequence[Transform] = (),
    gate: Gate | None = None,
) -> Segmentation:
    """Segment one scan by one annotated scan.

    Parameters
    ----------
    context : Context
        The atlas.
    query : Volume
        The scan: intensities in any array order and any field of view.
    settings : Settings, optional
        Defaults if left out.
    device : {"auto", "cpu", "cuda"}
        Where to compute; "auto" takes a CUDA GPU if there is one.
    on_stage : callable, optional
        Told the name of each stage as it begins.
    model : Segmenter, optional
        The model that ``settings.model`` names, where it is loaded already.
    transform : Transform, optional
        Query world to atlas world, RAS+ mm (:func:`~atlassegfm.itk.read_transform` reads one): taken instead of
        registering the atlas to the query. Where the gate is trained on a round trip, the way back is registered.
    further_fits : sequence of Transform
        More of them, beside ``transform``: the labels are warped by each, and the mean is taken
        (:func:`~atlassegfm.itk.read_fits` reads all that a result has kept).
    gate : Gate, optional
        That :func:`learn_gate` trained on this atlas with these settings, or the ``gate`` of an earlier result if
        ``fusion.examples`` is "simulated": it is the same for all queries. Trained here if left out.

    Raises
    ------
    InputError
        If the scan, a setting or the transform cannot be used.
    RegistrationError
        If the scans have nothing in common to register.
    ModelError
        If the model or the device cannot do what was asked.
    """
    settings = settings or Settings()
    if transform is None and further_fits:
        raise InputError(
            f"{len(further_fits)} further fits without a transform; expected them beside the first: give that as "
            "transform, or neither"
        )
    kind = prompt_kind(settings)
    device = resolve_device(device)
    name = "the query" if query.source is None else str(query.source.path)
    scan = canonical_scan(query, name)
    if kind is not None and model is None:
        model = load_chosen(settings, device)
    with _reproducible(settings.seed), _memory_errors():
        job = _Job(
            context, _numbered(context), query, scan, settings, device, _Clock(on_stage), transform, tuple(further_fits)
        )
        return job.run(model, kind, gate)


def learn_gate(
    context: Context,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    on_stage: Callable[[str], None] | None = None,
    model: Segmenter | None = None,
) -> Gate | None:
    """Train the gate on the atlas alone, for all queries.

    Each structure is simulated as registrations bring it (:mod:`atlassegfm.simulation`), the model is prompted with
    that on the atlas's image, and the gate is trained on all these masks.

    Parameters
    ----------
    context : Context
        The atlas.
    settings : Settings, optional
        Defaults if left out.
    device : {"auto", "cpu", "cuda"}
        Where to compute.
    on_stage : callable, optional
        Told the name of the stage, and each structure.
    model : Segmenter, optional
        The model that ``settings.model`` names, where it is loaded already.

    Returns
    -------
    Gate or None
        None without a model.

    Raises
    ------
    InputError
        If a setting cannot be used; ``fusion.examples`` is one if it is "round trip", which takes a query.
    ModelError
        If the model or the device cannot do what was asked.
    """
    settings = settings or Settings()
    kind = prompt_kind(settings)
    if kind is None:
        return None
    if settings.fusion.examples == "round trip":
        raise InputError(
            "fusion.examples is 'round trip', which trains the gate anew for each query; "
            "set it to 'simulated' to train without one"
        )
    device = resolve_device(device)
    if model is None:
        model = load_chosen(settings, device)
    if model is None:
        return None
    clock = _Clock(on_stage)
    with _reproducible(settings.seed), _memory_errors(), clock.stage("gate") as tell:
        return _simulated_gate(model, kind, context, _numbered(context), settings, device, tell)


@dataclass(frozen=True, eq=False)
class _Placed:
    """The atlas on the query, by number of the structure.

    Parameters
    ----------
    registration : Registration
        Query to atlas.
    masks : mapping of int to LocalMap
        Warped, without those that are missing.
    labels : array, (I, J, K)
        The label map of ``masks``.
    outside : mapping of int to float
        Share out of view.
    missing : mapping of int to (status, reason)
        Those not to be looked for.
    """

    registration: Registration
    masks: Mapping[int, LocalMap]
    labels: NDArray[Any]
    outside: Mapping[int, float]
    missing: Mapping[int, tuple[Status, str]]


@dataclass(frozen=True, eq=False)
class _Answers:
    """What the model was asked about one scan, and what it said, by number of the structure."""

    kind: PromptKind
    prompts: Mapping[int, Prompt]
    maps: Mapping[int, LocalMap]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Learned:
    """The gate, and how well each structure's label came back, by number, where it went anywhere."""

    gate: Gate
    round_trip_dice: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Shown:
    """A scan that a model is shown once, and may be asked about several times."""

    model: Segmenter
    kind: PromptKind
    structures: Sequence[Structure]
    image: Volume

    @cached_property
    def _encoded(self) -> Any:
        return self.model.encode(self.image)

    def ask(self, masks: Mapping[int, LocalMap], tell: Callable[[str], None]) -> _Answers:
        """Prompt the model for each structure; masks with nothing to point at are left out."""
        prompts = {n: made for n, mask in masks.items() if (made := make_prompt(self.kind, mask)) is not None}
        maps: dict[int, LocalMap] = {}
        if prompts:
            maps = self.model.predict(self._encoded, prompts, lambda n: tell(self.structures[n - 1].name))
        return _Answers(self.kind, prompts, maps, self.model.provenance)


def _simulated_gate(
    model: Segmenter,
    kind: PromptKind,
    context: Context,
    labels: Volume,
    settings: Settings,
    device: str,
    tell: Callable[[str], None],
) -> Gate:
    """Train the gate on simulated masks of the atlas; ``labels`` are its structures as numbers."""
    boxes = ndimage.find_objects(labels.data)
    truths = {n: _label(labels.data, box, n) for n, box in enumerate(boxes, start=1)}
    shown = _Shown(model, kind, context.structures, context.image)
    simulation = settings.fusion.simulation
    examples: list[dict[int, GateExample]] = []

    def simulated(which: tuple[int, int]) -> LocalMap:
        draw, n = which
        size, seed = simulation.sizes[draw], (settings.seed, draw, n)
        return simulated_mask(labels, boxes[n - 1], n, size=size, window=simulation.window, seed=seed)

    for draw in range(len(simulation.sizes)):
        masks = dict(zip(truths, side_by_side(simulated, ((draw, n) for n in truths)), strict=True))
        answers = shown.ask(masks, tell)
        examples.append({n: GateExample(masks[n], answer, truths[n]) for n, answer in answers.maps.items()})
    gate = train_gate([one for drawn in examples for one in drawn.values()], settings.fusion, device=device)
    if settings.fusion.gate == "paper":
        return gate
    fused = [{n: fuse(one.atlas, one.model, gate, device=device) for n, one in drawn.items()} for drawn in examples]

    def taught(which: tuple[int, int]) -> Lesson | None:
        draw, n = which
        one, seed = examples[draw][n], (settings.seed, draw, n)
        return lesson(context.image, n, one.atlas, fused[draw], one.truth, seed=seed)

    asked = [(draw, n) for draw, drawn in enumerate(examples) for n in drawn]
    lessons = [one for one in side_by_side(taught, asked) if one is not None]
    correction = train_correction(lessons, len(truths), seed=settings.seed)
    if correction is None:
        return gate

    def share(n: int) -> float:
        trials = (
            (correction.apply(context.image, n, drawn[n].atlas, masks), truths[n])
            for masks, drawn in zip(fused, examples, strict=True)
            if n in drawn
        )
        return best_share(trials, context.image.grid)

    shares = side_by_side(share, truths)
    return replace(gate, correction=correction, smoothing=tuple(shares))


@dataclass(frozen=True, eq=False)
class _Job:
    """One query on its way.

    In here a structure goes by its number, its position in ``context.structures`` plus 1: label values may be as
    large as 32 bits, and tables over them would not fit into memory.

    Parameters
    ----------
    context : Context
        The atlas.
    labels : Volume
        Its labels as numbers.
    query, scan : Volume
        The query as it is stored, and in canonical order.
    settings, device, clock, transform, further_fits
        As they come from the caller.
    """

    context: Context
    labels: Volume
    query: Volume
    scan: Volume
    settings: Settings
    device: str
    clock: _Clock
    transform: Transform | None = None
    further_fits: tuple[Transform, ...] = ()

    def run(self, model: Segmenter | None, kind: PromptKind | None, gate: Gate | None) -> Segmentation:
        """All stages; ``kind`` is None without a model, ``gate`` where it is still to be trained."""
        grid, numbers = self.scan.grid, range(1, len(self.context.structures) + 1)
        registration = self._register() if self.transform is None else self._given(self.transform)
        with self.clock.stage("warping"):
            outside = outside_shares(self.labels, numbers, registration.linear, grid)
            warped = warp_labels_by_each(self.labels, numbers, grid, registration.fits)
            missing = {n: why for n in numbers if (why := _missing(warped[n], outside[n])) is not None}
            warped = {n: mask for n, mask in warped.items() if n not in missing}
            placed = _Placed(registration, warped, label_map(warped, grid.shape), outside, missing)
        if model is None or kind is None:
            return self._result(placed, None, None)
        with self.clock.stage("model") as tell:
            answers = _Shown(model, kind, self.context.structures, self.scan).ask(warped, tell)
        learned = self._learn(model, kind, placed) if gate is None else _Learned(gate)
        return self._result(placed, answers, learned)

    def _register(self) -> Registration:
        with self.clock.stage("registration") as tell:
            return register(
                self.scan,
                self.context.image,
                self.settings.registration,
                moving_labels=self.context.labels,
                device=self.device,
                on_stage=tell,
            )

    def _given(self, transform: Transform) -> Registration:
        """A transform from elsewhere as a registration."""
        view = self.scan.grid
        with self.clock.stage("transform"):
            axes = [np.linspace(-0.5, n - 0.5, _TRIED_POINTS) for n in view.shape]
            points = view.voxel_to_world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
            if not self.context.image.grid.contains(transform.map(points)).any():
                raise InputError(
                    "the transform takes no point of the query into the atlas; expected one from query points to "
                    "atlas points: check that it belongs to these two scans and is not the inverse"
                )
            local, field, linear = stages_of(transform, view)
            folding, jacobian = 0.0, None
            if field is not None:
                folding, jacobian = deformation_statistics(field, local, lambda nodes: nodes_in(view, nodes))
        difference = compare(self.scan, self.context.image, transform, self.settings.registration)
        return Registration(
            linear,
            field,
            local,
            difference=difference,
            folding=folding,
            jacobian=jacobian,
            others=self.further_fits,
        )

    def _learn(self, model: Segmenter, kind: PromptKind, placed: _Placed) -> _Learned:
        """Train the gate on the atlas's own scan."""
        if self.settings.fusion.examples == "round trip":
            return self._learn_by_round_trip(model, kind, placed)
        # In a random state of its own: the gate must not depend on what was done for this query before.
        with self.clock.stage("gate") as tell, _reproducible(self.settings.seed):
            gate = _simulated_gate(model, kind, self.context, self.labels, self.settings, self.device, tell)
        return _Learned(gate)

    def _learn_by_round_trip(self, model: Segmenter, kind: PromptKind, placed: _Placed) -> _Learned:
        """Train it on masks that went to the query and back.

        They come back by a registration of its own, so that they are as wrong there as registration makes them; what
        they should be is known.
        """
        image, there = self.context.image, Volume(placed.labels, self.scan.grid)
        to_query = placed.registration.linear.inverse()
        with self.clock.stage("round trip") as tell:
            back = register(
                image,
                self.scan,
                self.settings.registration,
                moving_labels=there,
                initial=to_query,
                device=self.device,
                on_stage=tell,
            )
            returned = warp_labels_by_each(there, tuple(placed.masks), image.grid, back.fits)
            echoes = _Shown(model, kind, self.context.structures, image).ask(returned, tell)
        with self.clock.stage("gate"):
            # What the query does not show cannot come back: there neither mask is right or wrong.
            boxes = ndimage.find_objects(self.labels.data)
            truths = {n: self._in_view(_label(self.labels.data, boxes[n - 1], n), to_query) for n in placed.masks}
            returned = {n: self._in_view(mask, to_query) for n, mask in returned.items()}
            examples = [
                GateExample(returned[n], self._in_view(answer, to_query), truths[n])
                for n, answer in echoes.maps.items()
            ]
            gate = train_gate(examples, self.settings.fusion, device=self.device)
        return _Learned(gate, {n: _local_dice(returned[n], truth) for n, truth in truths.items()})

    def _in_view(self, mask: LocalMap, atlas_to_query: Affine) -> LocalMap:
        """A mask on the atlas cut to 0 where it lies outside the query's field of view."""
        if mask.is_empty:
            return mask
        box = self.context.image.grid.crop(mask.start, mask.stop)
        view = self.scan.grid
        if view.contains(atlas_to_query.map(box.corners_mm)).all():
            return mask  # and so does all between the corners
        voxels = np.moveaxis(np.indices(box.shape), 0, -1).reshape(-1, 3)
        inside = view.contains(atlas_to_query.map(box.voxel_to_world(voxels))).reshape(box.shape)
        return LocalMap(mask.start, mask.values * inside)

    def _result(self, placed: _Placed, answers: _Answers | None, learned: _Learned | None) -> Segmentation:
        grid, structures = self.scan.grid, self.context.structures
        with self.clock.stage("fusion"):
            fused = {} if answers is None or learned is None else self._fused(placed.masks, answers.maps, learned.gate)
            maps = {
                n: StructureMaps(fused.get(n, mask), mask, None if answers is None else answers.maps.get(n))
                for n, mask in placed.masks.items()
            }
            labels = label_map({n: one.fused for n, one in maps.items()}, grid.shape, placed.masks)
            if answers is not None and self.settings.topology:
                changed, labels = _with_topology(maps, labels, self.labels.data)
                maps = {n: replace(one, fused=changed[n]) for n, one in maps.items()}
            model_labels = None if answers is None else label_map(answers.maps, grid.shape)
            voxels = np.bincount(labels.ravel(), minlength=len(structures) + 1)
        with self.clock.stage("quality"):
            case = Case(
                query=self.scan,
                atlas=self.context.image,
                atlas_labels=self.labels,
                registration=placed.registration,
                warped=placed.masks,
                answers={} if answers is None else answers.maps,
                labels=labels,
            )
            evidence = gather(case)
        results = []
        for n, structure in enumerate(structures, start=1):
            status, reason = placed.missing.get(n, ("present", ""))
            if status == "present" and not voxels[n]:
                status, reason = "absent", "no voxel of the query is more likely to be it than anything else"
            prompt = None if answers is None else answers.prompts.get(n)
            quality = self._judged(status, reason, evidence.get(n), placed.registration.confidence)
            if status == "present" and answers is not None and n in answers.maps and _found_nothing(answers.maps[n]):
                reason = "the model found nothing there, and the warped atlas was kept"
                verdict: Verdict = "failed" if quality.verdict == "failed" else "review"
                quality = replace(quality, verdict=verdict, reason=f"{reason}; {quality.reason}")
            results.append(
                StructureResult(
                    structure,
                    status,
                    reason,
                    volume_ml=float(voxels[n]) * grid.voxel_volume_mm3 / 1000,
                    outside_share=placed.outside[n],
                    prompt=None if prompt is None else _describe_prompt(prompt, grid, self.query.grid),
                    round_trip_dice=None if learned is None else learned.round_trip_dice.get(n),
                    quality=quality,
                )
            )

        def stored(map_of_numbers: NDArray[Any]) -> Volume:
            return _as_stored(map_of_numbers, self.context.values, grid, self.query)

        return Segmentation(
            labels=stored(labels),
            atlas_labels=stored(placed.labels),
            model_labels=None if model_labels is None else stored(model_labels),
            grid=grid,
            probabilities={structures[n - 1].value: one for n, one in maps.items()},
            structures=tuple(results),
            registration=placed.registration,
            transform_given=self.transform is not None,
            gate=None if learned is None else learned.gate,
            settings=self.settings,
            prompt=None if answers is None else answers.kind,
            device=self.device,
            seconds=self.clock.seconds,
            provenance={} if answers is None else answers.provenance,
            licence_accepted=None if answers is None else licence_accepted(self.settings.model),
        )

    def _fused(
        self, masks: Mapping[int, LocalMap], answers: Mapping[int, LocalMap], gate: Gate
    ) -> Mapping[int, LocalMap]:
        """What the gate makes of warped masks and answers; structures without an answer are left out."""
        fused = {n: _fused_unless_nothing(masks[n], answer, gate, self.device) for n, answer in answers.items()}
        if gate.correction is None:
            return fused
        correction, grid = gate.correction, self.scan.grid

        def finished(n: int) -> LocalMap:
            if _found_nothing(answers[n]):
                return fused[n]
            corrected = correction.apply(self.scan, n, masks[n], fused)
            share = gate.smoothing[n - 1] if gate.smoothing else 0.0
            return smoothed(corrected, window_mm(share, masks[n], grid), grid)

        return dict(zip(fused, side_by_side(finished, fused), strict=True))

    def _judged(self, status: Status, reason: str, evidence: Evidence | None, confidence: float) -> StructureQuality:
        """What is thought of one structure: from evidence, or from its not being there."""
        if status == "present" and evidence is not None:
            return judge(evidence, self.settings.model, confidence)
        # What the scan does not show cannot be wrong, but somebody may have thought that it does.
        return StructureQuality("review" if status == "outside" else "failed", reason)


def fused_by(gate: Gate, context: Context, result: Segmentation) -> Volume:
    """The label map that another gate would have made of the masks of a result.

    Parameters
    ----------
    gate : Gate
        Without a correction, as the paper's.
    context : Context
        The atlas of the result.
    result : Segmentation
        Made with a model.

    Returns
    -------
    Volume
        Like ``result.labels``.

    Raises
    ------
    ValueError
        If the gate is a default one, whose correction would take the scan.
    """
    if gate.correction is not None:
        raise ValueError("a gate with a correction takes the scan; expected one as the paper's")
    numbers = {value: n for n, value in enumerate(context.values, start=1)}
    fused = {
        numbers[value]: one.atlas
        if one.model is None
        else _fused_unless_nothing(one.atlas, one.model, gate, result.device)
        for value, one in result.probabilities.items()
    }
    warped = {numbers[value]: one.atlas for value, one in result.probabilities.items()}
    labels = label_map(fused, result.grid.shape, warped)
    if result.settings.topology:
        maps = {n: StructureMaps(mask, warped[n], None) for n, mask in fused.items()}
        _, labels = _with_topology(maps, labels, _numbered(context).data)
    return _as_stored(labels, context.values, result.grid, result.labels)


def _found_nothing(answer: LocalMap) -> bool:
    """Whether a model's answer has no voxel inside."""
    return not (answer.values >= INSIDE).any()


def _fused_unless_nothing(mask: LocalMap, answer: LocalMap, gate: Gate, device: str) -> LocalMap:
    """The gate's mixture, or the warped atlas where the model found nothing: no structure is lost without a word.

    The tiniest ones are: of 138 structures on OASIS two or three a scan, of 10 to 150 voxels.
    """
    return mask if _found_nothing(answer) else fuse(mask, answer, gate, device=device)


def _with_topology(
    maps: Mapping[int, StructureMaps], labels: NDArray[Any], atlas: NDArray[Any]
) -> tuple[Mapping[int, LocalMap], NDArray[Any]]:
    """Fused masks and label map without islands and holes that the structures of the ``atlas`` do not have."""
    fused, warped = {n: one.fused for n, one in maps.items()}, {n: one.atlas for n, one in maps.items()}
    changes = changes_to(labels, topologies_of(atlas))
    if not changes:
        return fused, labels
    changed = dict(fused)
    for n, change in changes.items():
        first, last = zip(*((side.start, side.stop) for side in change.box), strict=True)
        start, stop = np.minimum(fused[n].start, first).tolist(), np.maximum(fused[n].stop, last).tolist()
        values = fused[n].on_box(start, stop)
        inner = values[tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))]
        inner[change.islands] = 0
        inner[change.holes] = np.maximum(inner[change.holes], _FILLED)
        changed[n] = LocalMap((start[0], start[1], start[2]), values)
    i, j, k = labels.shape
    return changed, label_map(changed, (i, j, k), warped)


def _as_stored(numbers: NDArray[Any], values: Sequence[int], grid: Grid, query: Volume) -> Volume:
    """A map of numbers on ``grid`` as label values in the query's own order; one type for all queries of an atlas."""
    labels = np.array((0, *values), smallest_label_type(max(values)))[numbers]
    return Volume(labels, grid, query.source).turned_to(query.grid)


def outside_shares(labels: Volume, values: Sequence[int], query_to_atlas: Affine, view: Grid) -> dict[int, float]:
    """Share of each structure of the atlas that lies outside the query's field of view.

    Parameters
    ----------
    labels : Volume
        Of the atlas.
    values : sequence of int
        Label values wanted; each occurs in ``labels``.
    query_to_atlas : Affine
        The linear stages of the registration. The displacement field has nothing to go by out of view.
    view : Grid
        Of the query.

    Returns
    -------
    dict of int to float
        In [0, 1].
    """
    atlas_to_query = query_to_atlas.inverse()
    count = np.zeros(int(labels.data.max()) + 1, np.int64)
    seen = np.zeros_like(count)
    voxels = np.flatnonzero(labels.data)
    for first in range(0, len(voxels), _CHUNK_VOXELS):
        part = voxels[first : first + _CHUNK_VOXELS]
        found = labels.data.ravel()[part]
        ijk = np.stack(np.unravel_index(part, labels.grid.shape), axis=-1)
        inside = view.contains(atlas_to_query.map(labels.grid.voxel_to_world(ijk)))
        count += np.bincount(found, minlength=len(count))
        seen += np.bincount(found[inside], minlength=len(count))
    return {value: float(1 - seen[value] / count[value]) for value in values}


def _missing(mask: LocalMap, outside_share: float) -> tuple[Status, str] | None:
    """Status and reason of a structure that is not to be looked for in the query, else None."""
    found = bool((mask.values >= INSIDE).any())
    if outside_share >= _OUTSIDE_SHARE or (not found and outside_share >= _MOSTLY_OUTSIDE_SHARE):
        return "outside", f"{outside_share:.0%} of it lies outside the field of view"
    if not found:
        return "absent", "the warped atlas fills no voxel of the query with it by half"
    return None


def _numbers(labels: NDArray[Any], values: Sequence[int]) -> NDArray[Any]:
    """Label values replaced by their position in ``values`` (ascending) plus 1; 0 stays."""
    known = np.array((0, *values), labels.dtype)
    numbers = np.empty(labels.shape, smallest_label_type(len(values)))
    for plane, out in zip(labels, numbers, strict=True):
        out[...] = np.searchsorted(known, plane)
    return numbers


def _numbered(context: Context) -> Volume:
    """The labels of an atlas as numbers."""
    return Volume(_numbers(context.labels.data, context.values), context.labels.grid)


def _label(labels: NDArray[Any], box: tuple[slice, slice, slice], value: int) -> LocalMap:
    """One structure of a label map as a mask of 0 and 1."""
    i, j, k = (int(side.start) for side in box)
    return LocalMap((i, j, k), (labels[box] == value).astype(np.float32))


def _local_dice(one: LocalMap, other: LocalMap) -> float:
    """Dice coefficient of two masks on the same grid."""
    start, stop = np.minimum(one.start, other.start), np.maximum(one.stop, other.stop)
    if one.is_empty or other.is_empty:
        start, stop = (other.start, other.stop) if one.is_empty else (one.start, one.stop)
    first, last = (tuple(int(n) for n in corner) for corner in (start, stop))
    return dice(one.on_box(first, last) >= INSIDE, other.on_box(first, last) >= INSIDE)


def _describe_prompt(prompt: Prompt, grid: Grid, stored: Grid) -> PromptUsed:
    """A prompt on the canonical grid, as the user meets it in the query as it is stored."""
    kind: PromptKind
    if isinstance(prompt, ClickPrompt):
        kind, low, high = "click", np.array(prompt.ijk), np.array(prompt.ijk)
    elif isinstance(prompt, BoxPrompt):
        kind, low, high = "box", np.array(prompt.start), np.array(prompt.stop) - 1
    else:
        inside = np.argwhere(prompt.probability.values >= INSIDE) + prompt.probability.start
        kind, low, high = "mask", inside.min(axis=0), inside.max(axis=0)
    ends = np.rint(stored.world_to_voxel(grid.voxel_to_world(np.stack([low, high])))).astype(int)
    first, last = ends.min(axis=0), ends.max(axis=0)
    return PromptUsed(
        kind, _ints(first), _ints(last), _mm(stored.voxel_to_world(first)), _mm(stored.voxel_to_world(last))
    )


def _ints(voxel: NDArray[np.int64]) -> tuple[int, int, int]:
    i, j, k = (int(n) for n in voxel)
    return i, j, k


def _mm(point_mm: NDArray[np.float64]) -> tuple[float, float, float]:
    """Rounded to a hundredth of a mm, and no -0."""
    x, y, z = (round(float(n), 2) + 0.0 for n in point_mm)
    return x, y, z


def _jacobian_summary(statistics: JacobianStatistics | None) -> dict[str, float | None] | None:
    return None if statistics is None else {name: _number(value, 6) for name, value in asdict(statistics).items()}


def _number(value: float | None, digits: int = 4) -> float | None:
    """For JSON, which has no NaN."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed PyTorch and ask it for algorithms that give the same bits twice; all is put back at the end.

    Nothing in this package draws from NumPy's global generator.
    """
    import torch

    # Read by cuBLAS when it starts; without it some matrix products are not reproducible.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # A few CUDA kernels exist in one form only: they are used, and need not be told of.
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warned)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn what PyTorch and NumPy say when memory runs out into a sentence."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError("the GPU ran out of memory; use the device 'cpu', or crop the scan") from None
    except MemoryError:
        raise ModelError("the memory does not suffice for this scan; crop it, or use a larger machine") from None
