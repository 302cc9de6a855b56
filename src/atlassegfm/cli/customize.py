"""``atlassegfm customize``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import InputError
from ..core.text import counted
from .fields import names_option, option, options, required
from .options import DeviceOptions, ModelOptions, ScreenOptions, StructureOptions
from .session import print_json, print_table

if TYPE_CHECKING:
    from ..context import Context
    from ..models.base import Models
    from .session import Session


@options
class CustomizeOptions(ScreenOptions, DeviceOptions, ModelOptions, StructureOptions):
    """Options of ``customize``."""

    out: Path = required("--out -o CTX", "Context folder to write.")
    atlas: list[Path] | None = option("--atlas IMG", "The annotated scan; repeated with --labels for several.")
    labels: list[Path] | None = option("--labels LAB", "Labels of the atlas: label map, RTSTRUCT or DICOM-SEG.")
    atlases: Path | None = option(
        "--atlases FOLDER",
        "Annotated scans instead: nnU-Net raw layout, or the folders images and labels with files of equal names.",
    )
    names: Path | None = names_option()
    atlas_series: str | None = option("--atlas-series S", "Which series of the atlas's DICOM folder.")
    measure: bool = option(
        "--measure/--no-measure", "Of several atlases, segment each from the others: what Dice to expect.", True
    )

    def annotated(self) -> list[tuple[Path, Path]]:
        """Images and labels of the atlases; raise InputError if none is given, or one without its counterpart."""
        images, labels = self.atlas or [], self.labels or []
        if self.atlases is not None:
            if images or labels:
                raise InputError("--atlases does not go with --atlas and --labels; give one or the others")
            from ..core.dataset import annotated_scans

            return [(case.image, case.labels) for case in annotated_scans(self.atlases)]
        if not images or not labels:
            missing = "--labels" if images else "--atlas"
            raise InputError(f"Missing option '{missing}'; give --atlas and --labels, or --atlases")
        if len(images) != len(labels):
            raise InputError(f"{len(images)} --atlas and {len(labels)} --labels; give both for each, in one order")
        return list(zip(images, labels, strict=True))


def customize(options: CustomizeOptions) -> None:
    """Prepare one or several annotated scans once, for `atlassegfm segment --context`.

    CTX gets the scans, their labels and names, all settings, and the gate, trained on the first scan alone. Of several
    atlases the first one that has all structures comes first; all vote on each query.
    """
    with options.session() as session:
        from .. import context as contexts
        from ..core.device import resolve_device
        from ..core.files import check_replaceable, output_folder
        from ..core.progress import GATE_STEPS, Steps
        from ..models.table import load_chosen, prompt_kind

        begun, out = time.perf_counter(), options.out
        annotated, settings = options.annotated(), options.settings()
        prompt_kind(settings)
        check_replaceable(out, contexts.CONTEXT_NAMES)
        files = (*(path for pair in annotated for path in pair), options.names)
        for path in (*files, options.config, *options.weights_given, options.synonyms):
            if path is not None and path.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{path}: would be overwritten, as the context goes to {out}; choose another folder")
        device = resolve_device(options.device)
        options.accept(settings, session)
        with output_folder(out.absolute().parent):
            session.steps = Steps({"reading the atlas": 1.0, **GATE_STEPS, "writing": 1.0})
            session.progress("reading the atlas")
            model = load_chosen(settings, device)
            context = _read(annotated, options)
            context = contexts.customize(context, device=device, model=model, on_stage=session.progress)
            if options.measure:
                context = measured(context, device, model, session)
            session.progress("writing")
            saved = context.save(out)
    gate = None if context.gate is None else context.gate.describe()
    seconds = round(time.perf_counter() - begun, 3)
    if options.as_json:
        structures = [{"value": one.value, "name": one.name} for one in context.atlas.structures]
        chosen = {"model": settings.model, "prompt": context.prompt, "gate": gate, "structures": structures}
        several = {"atlases": len(context.atlases), "expected": expected_rows(context)}
        print_json(
            {
                "context": str(out),
                "sha256": saved.sha256,
                **chosen,
                **several,
                "device": device,
                "total_seconds": seconds,
            }
        )
        return
    first = context.files.get("atlas", "")
    more = f" and {counted(len(context.others), 'other atlas', 'other atlases')}" if context.others else ""
    typer.echo(f"{first}{more} -> {out}  ({seconds:.1f} s on {device})")
    typer.echo(f"  structures  {', '.join(context.atlas.names)}")
    typer.echo(f"  model       {settings.model}" + ("" if context.prompt is None else f", prompt {context.prompt}"))
    if gate is not None:
        typer.echo(f"  gate        {gate}")
    print_expected(context)
    typer.echo(f"next: atlassegfm segment --context {shlex.quote(str(out))} QUERY... -o OUT")


def _read(annotated: list[tuple[Path, Path]], options: CustomizeOptions) -> Context:
    """A context of the annotated scans, one with the most structures first."""
    from ..context import Context

    read, selection = [], options.selection()
    for image, labels in annotated:
        settings, series = options.settings(), options.atlas_series
        one = Context.from_files(image, labels, options.names, settings=settings, series=series, selection=selection)
        read.append((str(labels), one))
    first = max(read, key=lambda named: len(named[1].atlas.structures))
    context = first[1]
    for name, one in read:
        if one is not first[1]:
            context = context.with_atlas(one.atlas, name, one.files)
    return context


def measured(context: Context, device: str, model: Models | None, session: Session) -> Context:
    """Measure what to expect of a context of several atlases, with progress."""
    from ..leave_one_out import measure

    if not context.others:
        return context

    def begin(number: int, count: int) -> None:
        session.begin_pair(number, count, "atlas left out", "registration")

    return measure(context, device=device, model=model, on_atlas=begin, on_stage=session.progress)


def expected_rows(context: Context) -> list[dict[str, Any]]:
    """What each structure is expected to score, as rows."""
    return [{"structure": name, **vars(one)} for name, one in context.expected.items()]


def print_expected(context: Context) -> None:
    """Print what each structure scored on atlases that were segmented from the others."""
    if not context.expected:
        return
    typer.echo("\nDice of each atlas, segmented from the others:")
    rows = [(name, f"{one.dice:.3f}", f"{one.lowest:.3f}", str(one.cases)) for name, one in context.expected.items()]
    print_table(("structure", "mean", "lowest", "atlases"), rows, numbers_from=1)
    typer.echo("")
