"""Training of the gate on the atlas alone: no query, and no label of a query, takes part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from ..atlas import Atlas
from ..core.mask import LocalMap
from ..core.parallel import parallel_map
from ..models.base import Models, PromptedScan
from ..prompts import PromptKind
from ..settings import Settings
from .correction import TrainingSample, make_training_sample
from .correction_features import BorderFeatures, border_features
from .gate import Gate, GateSample, fuse, train_gate
from .mixture import best_mixture, mix_structures
from .simulation import simulate_mask
from .smoothing import best_smoothing

#: Simulated masks, at most, and voxels of their structures' boxes; where they allow it, at least so many draws.
_MOST_MASKS, _MOST_VOXELS, _FEWEST_DRAWS = 128, 16_000_000, 2
#: Features are kept from the training to the choice of the smoothing up to so many numbers (600 MB), else made again.
_MOST_KEPT = 150_000_000


def count_draws(boxes: Sequence[tuple[slice, slice, slice]], most: int) -> int:
    """Choose how often each structure is simulated: fewer times where there are many or large ones, at least once."""
    voxels = sum(math.prod(side.stop - side.start for side in box) for box in boxes)
    least = min(_FEWEST_DRAWS, most) if len(boxes) * _FEWEST_DRAWS <= _MOST_MASKS else 1
    wanted: int = min(_MOST_MASKS // len(boxes), _MOST_VOXELS // voxels)
    return min(max(wanted, least), most)


def train_gate_on_atlas(
    atlas: Atlas,
    model: Models,
    prompt: PromptKind,
    settings: Settings,
    *,
    device: str = "cpu",
    on_part: Callable[[str], None] = lambda _: None,
) -> Gate:
    """Train the gate on simulated registration errors of the atlas.

    Each structure's label is warped at random with an error of realistic size, the models are prompted with it on the
    atlas's image, and the gate is trained on these masks against the atlas's labels; before that, the weights of
    several models. Of the settings ``fusion``, ``tubular`` and ``seed`` are used; ``on_part`` is called with the name
    of each structure, then of each step of the training.
    """
    labels, image, options = atlas.numbered, atlas.image, settings.fusion
    boxes = ndimage.find_objects(labels.data)
    truths = {
        n: LocalMap(tuple(side.start for side in box), (labels.data[box] == n).astype(np.float32))
        for n, box in enumerate(boxes, start=1)
    }
    tubular = atlas.numbers_of(settings.tubular, "tubular")
    scan = PromptedScan(model, prompt, image, atlas.names, tubular)
    sizes = options.simulation.sizes
    draws = count_draws(boxes, len(sizes))
    drawn_masks: list[dict[int, LocalMap]] = []
    predictions: list[Mapping[str, Mapping[int, LocalMap]]] = []

    def simulate(which: tuple[int, int]) -> LocalMap:
        draw, n = which
        seed = (settings.seed, draw, n)
        # With fewer draws than sizes each structure begins with another one, and all sizes are there.
        size = sizes[(draw * len(sizes) // draws + (n if draws < len(sizes) else 0)) % len(sizes)]
        return simulate_mask(labels, boxes[n - 1], n, size=size, sigma=options.simulation.sigma, seed=seed)

    for draw in range(draws):
        masks = dict(zip(truths, parallel_map(simulate, ((draw, n) for n in truths)), strict=True))
        drawn_masks.append(masks)
        predictions.append(scan.predict(masks, on_part).members)
    on_part("weights")
    mixture = best_mixture(predictions, truths)
    samples = [
        {n: GateSample(masks[n], mask, truths[n]) for n, mask in mix_structures(predicted, mixture).items()}
        for masks, predicted in zip(drawn_masks, predictions, strict=True)
    ]
    gate = train_gate([one for drawn in samples for one in drawn.values()], options, device=device)
    gate = replace(gate, mixture=mixture)
    if options.gate == "paper":
        return gate

    on_part("correction")
    fused = [{n: fuse(one.atlas, one.model, gate, device=device) for n, one in drawn.items()} for drawn in samples]

    def features(which: tuple[int, int]) -> BorderFeatures | None:
        draw, n = which
        return border_features(image, n, samples[draw][n].atlas, fused[draw])

    from .correction_training import train_correction

    training: list[TrainingSample] = []
    kept: dict[tuple[int, int], BorderFeatures | None] = {}
    drawn_structures, kept_numbers = [(draw, n) for draw, drawn in enumerate(samples) for n in drawn], 0
    for (draw, n), near in zip(drawn_structures, parallel_map(features, drawn_structures), strict=True):
        if near is not None:
            seed = (settings.seed, draw, n)
            training.append(make_training_sample(near, n, fused[draw][n], samples[draw][n].truth, seed=seed))
            kept_numbers += near.values.size
        if kept_numbers <= _MOST_KEPT:
            kept[draw, n] = near
    correction = train_correction(training, len(truths), options.correction, seed=settings.seed)
    if correction is None:
        return gate

    def corrected(draw: int, n: int) -> LocalMap:
        near = kept.pop((draw, n)) if (draw, n) in kept else features((draw, n))
        mask = fused[draw][n]
        return mask if near is None else correction.apply_near(near, n, mask)

    def smoothing(n: int) -> float:
        if n in tubular:  # a fraction of the trunk's radius takes away the branches
            return 0.0
        trials = ((corrected(draw, n), truths[n]) for draw, drawn in enumerate(samples) if n in drawn)
        return best_smoothing(trials, image.grid)

    on_part("smoothing")
    return replace(gate, correction=correction, smoothing=tuple(parallel_map(smoothing, truths)))
