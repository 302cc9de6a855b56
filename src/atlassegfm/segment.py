"""From one annotated scan and one query to the query's segmentation: register, prompt, predict, fuse.

Everything is computed in RAS-canonical array order and turned back at the end, so that a result does not
depend on the array order a query is stored in. The label of a query plays no part: nothing here takes one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .atlas import Atlas, canonical_scan
from .core.device import _memory_errors, _reproducible, resolve_device
from .core.errors import InputError
from .core.geometry import Grid
from .core.image import Volume, smallest_label_type
from .core.mask import LocalMap
from .core.overlap import dice
from .core.parallel import side_by_side
from .core.progress import _Clock
from .fusion.gate import Gate, GateExample, fuse, train_gate
from .fusion.label_map import label_map
from .fusion.smoothing import smoothed, window_mm
from .fusion.topology import changes_to, topologies_of
from .fusion.train import _Answers, _label, _numbered, _Shown, _simulated_gate
from .models import Segmenter, licence_accepted
from .models.choice import load_chosen, prompt_kind
from .prompts import INSIDE, BoxPrompt, ClickPrompt, Prompt, PromptKind
from .quality.coverage import outside_shares
from .quality.evidence import Case, Evidence, gather
from .quality.verdict import StructureQuality, Verdict, judge
from .registration import Registration, compare, register
from .result import PromptUsed, Segmentation, Status, StructureMaps, StructureResult
from .settings import Settings
from .transforms.jacobian import deformation_statistics, nodes_in
from .transforms.maps import Affine, Transform, stages_of
from .transforms.resample import warp_labels_by_each

logger = logging.getLogger(__name__)


#: From this share outside the query's field of view on, a structure counts as outside. With less than a tenth
#: of it in view, registration errors of a few mm decide whether any of it is.
_OUTSIDE_SHARE = 0.9


#: A structure whose warped mask is nowhere is called outside, not absent, if most of it is out of view.
_MOSTLY_OUTSIDE_SHARE = 0.5


#: Points along each axis of the query's field of view at which a given transform is tried.
_TRIED_POINTS = 16


#: Probability of a filled hole: just inside.
_FILLED = 0.51


def segment(
    context: Atlas,
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
    context : Atlas
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
        Query world to atlas world, RAS+ mm (:func:`~atlassegfm.transforms.io.read_transform` reads one): taken instead of
        registering the atlas to the query. Where the gate is trained on a round trip, the way back is registered.
    further_fits : sequence of Transform
        More of them, beside ``transform``: the labels are warped by each, and the mean is taken
        (:func:`~atlassegfm.transforms.io.read_fits` reads all that a result has kept).
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
class _Learned:
    """The gate, and how well each structure's label came back, by number, where it went anywhere."""

    gate: Gate
    round_trip_dice: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Job:
    """One query on its way.

    In here a structure goes by its number, its position in ``context.structures`` plus 1: label values may be as
    large as 32 bits, and tables over them would not fit into memory.

    Parameters
    ----------
    context : Atlas
        The atlas.
    labels : Volume
        Its labels as numbers.
    query, scan : Volume
        The query as it is stored, and in canonical order.
    settings, device, clock, transform, further_fits
        As they come from the caller.
    """

    context: Atlas
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


def fused_by(gate: Gate, context: Atlas, result: Segmentation) -> Volume:
    """The label map that another gate would have made of the masks of a result.

    Parameters
    ----------
    gate : Gate
        Without a correction, as the paper's.
    context : Atlas
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


def _missing(mask: LocalMap, outside_share: float) -> tuple[Status, str] | None:
    """Status and reason of a structure that is not to be looked for in the query, else None."""
    found = bool((mask.values >= INSIDE).any())
    if outside_share >= _OUTSIDE_SHARE or (not found and outside_share >= _MOSTLY_OUTSIDE_SHARE):
        return "outside", f"{outside_share:.0%} of it lies outside the field of view"
    if not found:
        return "absent", "the warped atlas fills no voxel of the query with it by half"
    return None


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
