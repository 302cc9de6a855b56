"""Training of the gate on the atlas alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..atlas import Atlas
from ..core.device import _memory_errors, _reproducible, resolve_device
from ..core.errors import InputError
from ..core.image import Volume, smallest_label_type
from ..core.labels import Structure
from ..core.mask import LocalMap
from ..core.parallel import side_by_side
from ..core.progress import _Clock
from ..models import Segmenter
from ..models.choice import load_chosen, prompt_kind
from ..prompts import Prompt, PromptKind, make_prompt
from ..settings import Settings
from .correction import Lesson, lesson, train_correction
from .gate import Gate, GateExample, fuse, train_gate
from .simulation import simulated_mask
from .smoothing import best_share


def learn_gate(
    context: Atlas,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    on_stage: Callable[[str], None] | None = None,
    model: Segmenter | None = None,
) -> Gate | None:
    """Train the gate on the atlas alone, for all queries.

    Each structure is simulated as registrations bring it (:mod:`atlassegfm.fusion.simulation`), the model is prompted with
    that on the atlas's image, and the gate is trained on all these masks.

    Parameters
    ----------
    context : Atlas
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
class _Answers:
    """What the model was asked about one scan, and what it said, by number of the structure."""

    kind: PromptKind
    prompts: Mapping[int, Prompt]
    maps: Mapping[int, LocalMap]
    provenance: Mapping[str, Any]


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
    context: Atlas,
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


def _numbers(labels: NDArray[Any], values: Sequence[int]) -> NDArray[Any]:
    """Label values replaced by their position in ``values`` (ascending) plus 1; 0 stays."""
    known = np.array((0, *values), labels.dtype)
    numbers = np.empty(labels.shape, smallest_label_type(len(values)))
    for plane, out in zip(labels, numbers, strict=True):
        out[...] = np.searchsorted(known, plane)
    return numbers


def _numbered(context: Atlas) -> Volume:
    """The labels of an atlas as numbers."""
    return Volume(_numbers(context.labels.data, context.values), context.labels.grid)


def _label(labels: NDArray[Any], box: tuple[slice, slice, slice], value: int) -> LocalMap:
    """One structure of a label map as a mask of 0 and 1."""
    i, j, k = (int(side.start) for side in box)
    return LocalMap((i, j, k), (labels[box] == value).astype(np.float32))
