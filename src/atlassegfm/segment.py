"""The method: register the atlas to the query, warp it, prompt the model, predict, fuse, judge.

Everything is computed in RAS-canonical array order and turned back at the end, so that a result does not depend on the
array order a query is stored in. No label of a query is ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .atlas import Atlas, canonical_scan
from .context import Context, train_context
from .core.device import memory_errors, reproducible, resolve_device
from .core.errors import InputError
from .core.image import Volume
from .core.mask import LocalMap
from .core.progress import StageClock, query_steps, stage_printer
from .dicom import open_image
from .fusion.gate import fuse_structures
from .fusion.label_map import count_parts, label_map, remove_islands
from .fusion.mixture import mix_structures
from .judging import Job, judge_structures, with_members
from .models.base import Models, PromptedScan
from .models.table import licences_accepted, load_chosen, prompt_kind
from .quality.mirror import Sides, compare_sides
from .registration import Registration, nearest_of, register_all, registration_from
from .result import Segmentation, StructureMaps
from .settings import Settings
from .transforms.maps import Transform
from .warping import Warped, atlases_for, warp_atlases

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
    tubular = context.atlas.numbers_of(settings.tubular, "tubular")
    if transforms and context.others:
        raise InputError("a transform was given, and the context has several atlases; give a context of one")
    several = min(len(context.atlases), settings.most_atlases)
    usual = query_steps(model=model is not None, gate=context.gate is None, atlases=several)
    clock = StageClock(on_stage or (stage_printer(usual) if progress else None))
    with reproducible(settings.seed), memory_errors():
        with clock.stage("registration") as report:
            context, atlases = atlases_for(context, scan, settings, device)
            if transforms:
                found = [registration_from(transforms, scan, context.atlas.image, settings.registration)]
            else:
                labelled = [(one.image, one.numbered) for one in atlases.values()]
                found = register_all(
                    scan, labelled, settings.registration, tubular=tubular, device=device, on_stage=report
                )
        registrations = dict(zip(atlases, found, strict=True))
        with clock.stage("warping"):
            warped = warp_atlases(atlases, scan, registrations)
        predicted, masks = None, dict[int, LocalMap]()
        if model is not None and prompt is not None:
            with clock.stage("model") as report:
                predicted = PromptedScan(model, prompt, scan, context.atlas.names, tubular).predict(
                    warped.masks, report
                )
            if context.gate is None:
                with clock.stage("gate") as report:
                    context = train_context(context, model, settings, device=device, on_part=report)
        with clock.stage("fusion"):
            if predicted is not None and context.gate is not None:
                masks = mix_structures(predicted.members, context.gate.mixture)
            fused, labels = _fuse(context, scan, warped, masks, settings, device)
        with clock.stage("quality"):
            nearest = nearest_of(registrations)
            sides = _sides(scan, atlases[nearest], registrations[nearest], settings, device)
            job = Job(query, scan, atlases, registrations, settings, sides, bool(transforms), context.expected)
            structures = judge_structures(job, warped, predicted, masks, labels)
    model_labels = None if predicted is None else label_map(masks, scan.grid.shape)
    members = predicted.members if predicted is not None and len(predicted.members) > 1 else {}
    member_labels = {name: label_map(found, scan.grid.shape) for name, found in members.items()}
    if context.gate is not None and members:
        structures = with_members(structures, member_labels, labels, context.gate.mixture)

    def stored(numbers: NDArray[Any]) -> Volume:
        return context.atlas.label_values(numbers, scan.grid, query)

    return Segmentation(
        labels=stored(labels),
        atlas_labels=stored(warped.labels),
        model_labels=None if model_labels is None else stored(model_labels),
        member_labels={name: stored(found) for name, found in member_labels.items()},
        grid=scan.grid,
        probabilities={context.atlas.values[n - 1]: maps for n, maps in fused.items()},
        structures=structures,
        registrations=registrations,
        sides=sides,
        transform_given=bool(transforms),
        gate=None if predicted is None else context.gate,
        settings=settings,
        prompt=prompt,
        device=device,
        seconds=clock.seconds,
        provenance={} if predicted is None else predicted.provenance,
        licence_accepted=None if predicted is None else licences_accepted(settings),
    )


def _sides(scan: Volume, atlas: Atlas, found: Registration, settings: Settings, device: str) -> Sides | None:
    """Compare the fit of the scan with that of its mirror image; None where the linear stages did not run."""
    if found.linear_cost is None:
        return None
    return compare_sides(scan, atlas, found.linear, found.linear_cost, settings.registration, device)


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
