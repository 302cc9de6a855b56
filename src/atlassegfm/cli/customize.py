"""``atlassegfm customize``: what all queries of an atlas share, made once and kept as a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from .session import (
    AcceptOption,
    AtlasSeriesOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    ModelPathOption,
    NamesOption,
    OverlapOption,
    PromptOption,
    QuietOption,
    SeedOption,
    SetOption,
    StructuresOption,
    SynonymsOption,
    accept_licences,
    build_selection,
    build_settings,
    open_session,
    print_json,
)


def customize(
    atlas: Annotated[Path, typer.Option("--atlas", metavar="IMG", help="The annotated scan.")],
    labels: Annotated[Path, typer.Option("--labels", metavar="LAB", help="Its label map, RTSTRUCT or DICOM-SEG.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="CTX", help="Atlas folder to write.")],
    names: NamesOption = None,
    atlas_series: AtlasSeriesOption = None,
    structures: StructuresOption = None,
    synonyms: SynonymsOption = None,
    overlap: OverlapOption = "refuse",
    model: ModelOption = None,
    model_path: ModelPathOption = None,
    accept_licence: AcceptOption = False,
    prompt: PromptOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prepare an annotated scan once, for `atlassegfm segment --context`.

    CTX gets the scan, its labels and names, all settings, and the gate, trained on the scan alone.
    """
    with open_session(quiet) as session:
        from .. import context as customization
        from ..atlas import Atlas
        from ..core.device import resolve_device
        from ..core.files import check_replaceable, output_folder
        from ..models.choice import load_chosen, prompt_kind

        begun = time.perf_counter()
        settings = build_settings(config, overrides, model=model, model_path=model_path, prompt=prompt, seed=seed)
        prompt_kind(settings)
        selection = build_selection(structures, synonyms, overlap)
        check_replaceable(out, customization.CONTEXT_NAMES)
        for path in (atlas, labels, names, config, model_path, synonyms):
            if path is not None and path.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{path}: would be overwritten, as the context goes to {out}; choose another folder")
        resolved = resolve_device(device)
        if accept_licence:
            accept_licences([settings.model], session)
        with output_folder(out.absolute().parent):
            session.progress("reading the atlas")
            loaded = load_chosen(settings, resolved)
            context = Atlas.from_files(atlas, labels, names, series=atlas_series, selection=selection)
            made = customization.customize(context, settings, device=resolved, on_stage=session.progress, model=loaded)
            session.progress("writing")
            saved = made.save(out)
    gate = None if made.gate is None else made.gate.describe()
    seconds = round(time.perf_counter() - begun, 3)
    if as_json:
        print_json(
            {
                "context": str(out),
                "sha256": saved.sha256,
                "model": settings.model,
                "prompt": made.prompt,
                "gate": gate,
                "structures": [{"value": one.value, "name": one.name} for one in context.structures],
                "device": resolved,
                "total_seconds": seconds,
            }
        )
        return
    typer.echo(f"{atlas.name} -> {out}  ({seconds:.1f} s on {resolved})")
    typer.echo(f"  structures  {', '.join(one.name for one in context.structures)}")
    typer.echo(f"  model       {settings.model}" + ("" if made.prompt is None else f", prompt {made.prompt}"))
    if gate is not None:
        typer.echo(f"  gate        {gate}")
