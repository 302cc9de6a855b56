"""``atlassegfm customize``."""

import shlex
import time
from pathlib import Path

import typer

from ..core.errors import InputError
from .fields import names_option, option, options, required
from .options import DeviceOptions, ModelOptions, ScreenOptions, StructureOptions
from .session import print_json


@options
class CustomizeOptions(ScreenOptions, DeviceOptions, ModelOptions, StructureOptions):
    """Options of ``customize``."""

    atlas: Path = required("--atlas IMG", "The annotated scan.")
    labels: Path = required("--labels LAB", "Labels of the atlas: label map, RTSTRUCT or DICOM-SEG.")
    out: Path = required("--out -o CTX", "Context folder to write.")
    names: Path | None = names_option()
    atlas_series: str | None = option("--atlas-series S", "Which series of the atlas's DICOM folder.")


def customize(options: CustomizeOptions) -> None:
    """Prepare an annotated scan once, for `atlassegfm segment --context`.

    CTX gets the scan, its labels and names, all settings, and the gate, trained on the scan alone.
    """
    with options.session() as session:
        from .. import context as contexts
        from ..core.device import resolve_device
        from ..core.files import check_replaceable, output_folder
        from ..core.progress import GATE_STEPS, Steps
        from ..models.table import load_chosen, prompt_kind

        begun, out = time.perf_counter(), options.out
        settings = options.settings()
        prompt_kind(settings)
        selection = options.selection()
        check_replaceable(out, contexts.CONTEXT_NAMES)
        files = (options.atlas, options.labels, options.names)
        for path in (*files, options.config, *options.weights_given, options.synonyms):
            if path is not None and path.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{path}: would be overwritten, as the context goes to {out}; choose another folder")
        device = resolve_device(options.device)
        options.accept(settings, session)
        with output_folder(out.absolute().parent):
            session.steps = Steps({"reading the atlas": 1.0, **GATE_STEPS, "writing": 1.0})
            session.progress("reading the atlas")
            model = load_chosen(settings, device)
            context = contexts.Context.from_files(
                *files, settings=settings, series=options.atlas_series, selection=selection
            )
            context = contexts.customize(context, device=device, model=model, on_stage=session.progress)
            session.progress("writing")
            saved = context.save(out)
    gate = None if context.gate is None else context.gate.describe()
    seconds = round(time.perf_counter() - begun, 3)
    if options.as_json:
        structures = [{"value": one.value, "name": one.name} for one in context.atlas.structures]
        chosen = {"model": settings.model, "prompt": context.prompt, "gate": gate, "structures": structures}
        print_json({"context": str(out), "sha256": saved.sha256, **chosen, "device": device, "total_seconds": seconds})
        return
    typer.echo(f"{options.atlas.name} -> {out}  ({seconds:.1f} s on {device})")
    typer.echo(f"  structures  {', '.join(context.atlas.names)}")
    typer.echo(f"  model       {settings.model}" + ("" if context.prompt is None else f", prompt {context.prompt}"))
    if gate is not None:
        typer.echo(f"  gate        {gate}")
    typer.echo(f"next: atlassegfm segment --context {shlex.quote(str(out))} QUERY... -o OUT")
