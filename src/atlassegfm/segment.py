"""The method: register the atlas to the query, warp it, prompt the model, predict, fuse, judge.

Everything is computed in RAS-canonical array order and turned back at the end, so that a result does not depend on the
array order a query is stored in. No label of a query is ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .atlas import Atlas, canonical_scan
from .context import Context, train_context
from .core.device import memory_errors, reproducible, resolve_device
from .core.errors import InputError
from .core.image import Volume
from .core.mask import LocalMap
from .core.overlap import dice_per_structure
from .core.progress import StageClock, query_steps, stage_printer
from .dicom import open_image
from .fusion.gate import fuse_structures, is_empty_prediction
from .fusion.label_map import count_parts, label_map, remove_islands
from .fusion.mixture import Mixture, mix_structures
from .models.base import Models, Prediction, PromptedScan
from .models.table import licences_accepted, load_chosen, prompt_kind
from .prompts import used_prompt
from .quality.evidence import Case, gather
from .quality.verdict import StructureQuality, Verdict, is_calibrated, judge
from .registration import register, registration_from
from .result import MemberResult, Segmentation, StructureMaps, StructureResult
from .settings import Settings
from .transforms.maps import Transform
from .warping import Warped, warp_atlases, without_query

if TYPE_CHECKING:
    from .core.image import ImageLike


def segment(
    context: Context,
    query: ImageLike,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    model: Models | None = None,
    transforms: Sequence[Transform] = (),
    on_stage: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Segmentation:
    """Segment one scan with the atlas of a context.

    Parameters
    ----------
    context : Context
        The atlas, settings and, once trained, the gate. Without a gate, one is trained first; it is the result's
        ``gate``, and serves every query of the context.
    query : Volume, path or image
        In any array order, spacing and field of view; see :func:`~atlassegfm.core.image.as_volume` for images.
    settings : Settings, optional
        Those of the context by default. Settings that the trained gate depends on must be the context's.
    device : {"auto", "cpu", "cuda"}
        "auto" takes a CUDA GPU if there is one.
    model : Segmenter or Ensemble, optional
        The model or models that ``settings.model`` names, if loaded already.
    transforms : sequence of Transform
        Taken instead of registering: query to atlas, RAS+ mm. The first is reported; labels are averaged over all.
    on_stage, progress : callable and bool, optional
        Called with the name of each stage; print it to standard error.

    Raises
    ------
    InputError
        If the scan, a setting or a transform cannot be used.
    RegistrationError
        If a scan holds nothing but background.
    ModelError
        If model or device cannot do it.
    """
    settings = settings or context.settings
    context.check_settings(settings)
    prompt, device = prompt_kind(settings), resolve_device(device)
    query = query if isinstance(query, Volume) else open_image(query)
    scan = canonical_scan(query, "the query" if query.source is None else str(query.source.path))
    model = model or load_chosen(settings, device)
    context.check_model(model)
    usual = query_steps(model=model is not None, gate=context.gate is None)
    if transforms and context.others:
        raise InputError("a transform was given, and the context has several atlases; give a context of one")
    context = without_query(context, scan)
    atlas, clock = context.atlas, StageClock(on_stage or (stage_printer(usual) if progress else None))
    with reproducible(settings.seed), memory_errors():
        with clock.stage("registration") as report:
            if transforms:
                registrations = [registration_from(transforms, scan, atlas.image, settings.registration)]
            else:
                registrations = [
                    register(
                        scan,
                        one.image,
                        settings.registration,
                        moving_labels=one.numbered,
                        device=device,
                        on_stage=report,
                    )
                    for one in context.atlases
                ]
        registration = registrations[0]
        with clock.stage("warping"):
            warped = warp_atlases(context.atlases, scan, registrations)
        predicted, masks = None, dict[int, LocalMap]()
        if model is not None and prompt is not None:
            with clock.stage("model") as report:
                predicted = PromptedScan(model, prompt, scan, atlas.names).predict(warped.masks, report)
            if context.gate is None:
                with clock.stage("gate") as report:
                    context = train_context(context, model, settings, device=device, on_part=report)
        with clock.stage("fusion"):
            if predicted is not None and context.gate is not None:
                masks = mix_structures(predicted.members, context.gate.mixture)
            fused, labels = _fuse(context, scan, warped, masks, settings, device)
        with clock.stage("quality"):
            judging = partial(
                judge,
                model=settings.model,
                confidence=registration.confidence,
                calibrated=is_calibrated(settings, transform_given=bool(transforms)),
            )
            structures = _judge(atlas, scan, query, warped, predicted, masks, labels, judging)
    model_labels = None if predicted is None else label_map(masks, scan.grid.shape)
    members = predicted.members if predicted is not None and len(predicted.members) > 1 else {}
    member_labels = {name: label_map(found, scan.grid.shape) for name, found in members.items()}
    if context.gate is not None and members:
        structures = _with_members(structures, member_labels, labels, context.gate.mixture)

    def stored(numbers: NDArray[Any]) -> Volume:
        return atlas.label_values(numbers, scan.grid, query)

    return Segmentation(
        labels=stored(labels),
        atlas_labels=stored(warped.labels),
        model_labels=None if model_labels is None else stored(model_labels),
        member_labels={name: stored(found) for name, found in member_labels.items()},
        grid=scan.grid,
        probabilities={atlas.values[n - 1]: maps for n, maps in fused.items()},
        structures=structures,
        registration=registration,
        transform_given=bool(transforms),
        gate=None if predicted is None else context.gate,
        settings=settings,
        prompt=prompt,
        device=device,
        seconds=clock.seconds,
        provenance={} if predicted is None else predicted.provenance,
        licence_accepted=None if predicted is None else licences_accepted(settings),
    )


def _with_members(
    structures: Sequence[StructureResult],
    member_labels: Mapping[str, NDArray[Any]],
    labels: NDArray[Any],
    mixture: Mixture,
) -> tuple[StructureResult, ...]:
    """Add what each of several models found; structure n is at position n - 1."""
    numbers = range(1, len(structures) + 1)
    agreement = {name: dice_per_structure(found, labels, numbers) for name, found in member_labels.items()}
    return tuple(
        replace(one, members={name: MemberResult(mixture[name][n - 1], agreement[name][n]) for name in mixture})
        for n, one in zip(numbers, structures, strict=True)
    )


def _fuse(
    context: Context,
    scan: Volume,
    warped: Warped,
    predicted: Mapping[int, LocalMap],
    settings: Settings,
    device: str,
) -> tuple[dict[int, StructureMaps], NDArray[Any]]:
    """Fuse warped masks and predictions: probabilities of each structure, and the label map."""
    if context.gate is None:
        return {n: StructureMaps(mask, mask, None) for n, mask in warped.masks.items()}, warped.labels
    fused = fuse_structures(scan, warped.masks, predicted, context.gate, device=device)
    masks = {n: fused.get(n, mask) for n, mask in warped.masks.items()}
    labels = label_map(masks, scan.grid.shape, warped.masks)
    if settings.topology:
        masks, labels = remove_islands(masks, warped.masks, labels, count_parts(context.atlas.numbered.data))
    return {n: StructureMaps(masks[n], mask, predicted.get(n)) for n, mask in warped.masks.items()}, labels


def _judge(
    atlas: Atlas,
    scan: Volume,
    query: Volume,
    warped: Warped,
    predicted: Prediction | None,
    masks: Mapping[int, LocalMap],
    labels: NDArray[Any],
    judging: Callable[..., StructureQuality],
) -> tuple[StructureResult, ...]:
    """Gather the evidence on each structure and judge it; ``judging`` takes evidence and fraction out of view."""
    evidence = gather(
        Case(
            query=scan,
            atlas=atlas.image,
            atlas_labels=atlas.numbered,
            registration=warped.registration,
            warped=warped.masks,
            answers=masks,
            labels=labels,
        )
    )
    voxels = np.bincount(labels.ravel(), minlength=len(atlas.structures) + 1)
    results = []
    for n, structure in enumerate(atlas.structures, start=1):
        status, reason = warped.missing.get(n, ("present", ""))
        if status == "present" and not voxels[n]:
            status, reason = "absent", "at every voxel another structure or background is more probable"
        if status == "present" and n in evidence:
            place = warped.registration.places.get(n)
            quality = judging(evidence[n], outside=warped.outside[n - 1], place=place)
        else:  # what the field of view does not show cannot be wrong, but somebody may expect it there
            quality = StructureQuality("review" if status == "outside" else "failed", reason)
        if status == "present" and n in masks and is_empty_prediction(masks[n]):
            reason = "the model found nothing there, and the warped atlas was kept"
            verdict: Verdict = "failed" if quality.verdict == "failed" else "review"
            quality = replace(quality, verdict=verdict, reason=f"{reason}; {quality.reason}")
        prompt = None if predicted is None else predicted.prompts.get(n)
        results.append(
            StructureResult(
                structure,
                status,
                reason,
                volume_ml=float(voxels[n]) * scan.grid.voxel_volume_mm3 / 1000,
                outside_fraction=warped.outside[n - 1],
                place=warped.registration.places.get(n),
                prompt=None if prompt is None else used_prompt(prompt, scan.grid, query.grid),
                votes=tuple(k + 1 for k in warped.votes.get(n, ())),
                quality=quality,
            )
        )
    return tuple(results)
