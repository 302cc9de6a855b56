"""``atlassegfm context``: show a context, add atlases to it, remove them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import InputError
from ..core.labels import listed
from ..core.text import counted
from .customize import expected_rows, measured, print_expected
from .fields import argument, command, names_option, option, options, required
from .help import Group
from .options import DeviceOptions, ScreenOptions, StructureOptions
from .session import Session, print_json, print_table

if TYPE_CHECKING:
    from ..context import Context

app = typer.Typer(
    cls=Group,
    help="Contexts: `context show CTX` lists the atlases of one, `context add CTX` adds an annotated scan, "
    "`context remove CTX N` removes one, `context measure CTX` says what to expect of several.",
    no_args_is_help=True,
)


@options
class ShowOptions(ScreenOptions):
    """Options of ``context show``."""

    context: Path = argument("CTX", "A folder that `atlassegfm customize` wrote.")
    pictures: Path | None = option(
        "--pictures FOLDER", "Draw each atlas with its structures into this folder, as atlas-N.png (extra 'report')."
    )


@options
class AddOptions(ScreenOptions, StructureOptions):
    """Options of ``context add``."""

    context: Path = argument("CTX", "A folder that `atlassegfm customize` wrote.")
    atlas: Path = required("--atlas IMG", "The annotated scan to add.")
    labels: Path = required("--labels LAB", "Labels of that scan: label map, RTSTRUCT or DICOM-SEG.")
    names: Path | None = names_option()
    atlas_series: str | None = option("--atlas-series S", "Which series of the atlas's DICOM folder, as for --series.")


@options
class RemoveOptions(ScreenOptions):
    """Options of ``context remove``."""

    context: Path = argument("CTX", "A folder that `atlassegfm customize` wrote.")
    number: int = argument("N", "Number of the atlas, as `context show` lists it, from 2 on.")


@options
class MeasureOptions(ScreenOptions, DeviceOptions):
    """Options of ``context measure``."""

    context: Path = argument("CTX", "A folder that `atlassegfm customize` wrote.")


@command(app, "show")
def show(options: ShowOptions) -> None:
    """List the atlases of a context: their files, voxels, and which structures they have."""
    with options.session() as session:
        from ..context import Context

        if options.pictures is not None:
            from ..report import require_report_extra

            require_report_extra()
        session.progress("reading the context")
        context = Context.load(options.context)
        if options.pictures is not None:
            _draw(context, options.pictures, session)
    _print(context, as_json=options.as_json)


@command(app, "add")
def add(options: AddOptions) -> None:
    """Add an annotated scan: every query is then registered to it too, and the warped labels vote.

    Its structures are those of the first atlas by name; some may be missing. The gate stays that of the first atlas.
    """
    with options.session() as session:
        from ..atlas import Atlas
        from ..context import Context

        session.progress("reading the context")
        context = Context.load(options.context)
        for path in (options.atlas, options.labels):
            if path.resolve().is_relative_to(options.context.resolve()):
                raise InputError(f"{path}: lies in the context itself; give the file it was made from")
        session.progress("reading the atlas")
        atlas = Atlas.from_files(
            options.atlas, options.labels, options.names, series=options.atlas_series, selection=options.selection()
        )
        files = {"atlas": options.atlas.name, "labels": options.labels.name}
        context = context.with_atlas(atlas, str(options.labels), files)
        session.progress("writing")
        context.save(options.context)
    _print(context, as_json=options.as_json)


@command(app, "remove")
def remove(options: RemoveOptions) -> None:
    """Remove an atlas from a context; the first one, on which the gate was trained, stays."""
    with options.session():
        from ..context import Context

        context = Context.load(options.context).without_atlas(options.number)
        context.save(options.context)
    _print(context, as_json=options.as_json)


@command(app, "measure")
def measure(options: MeasureOptions) -> None:
    """Segment each atlas from the others, and keep the Dice a structure: what to expect on other scans.

    Estimates of later results take it into account. Adding or removing an atlas forgets it.
    """
    with options.session() as session:
        from ..context import Context
        from ..core.device import resolve_device
        from ..models.table import load_chosen

        session.progress("reading the context")
        context, device = Context.load(options.context), resolve_device(options.device)
        if not context.others:
            raise InputError(f"{options.context}: has one atlas; add another one with atlassegfm context add")
        context = measured(context, device, load_chosen(context.settings, device), session)
        session.progress("writing")
        context.save(options.context)
    _print(context, as_json=options.as_json)


def _draw(context: Context, folder: Path, session: Session) -> None:
    """Draw each atlas; pictures of atlases are replaced, a folder with anything else is refused."""
    from ..core.files import replaced_folder
    from ..report import draw_overview

    count = len(context.atlases)
    with replaced_folder(folder, frozenset(path.name for path in folder.glob("atlas-*.png"))) as temporary:
        for number, atlas in enumerate(context.atlases, start=1):
            session.progress(f"drawing atlas {number} of {count}")
            structures = [one for one in atlas.structures if one.value in atlas.present]
            path = temporary / f"atlas-{number}.png"
            draw_overview(atlas.image, atlas.labels, structures, path, title=f"Atlas {number} of {count}")


def _print(context: Context, *, as_json: bool) -> None:
    """Print a row for each atlas."""
    rows: list[dict[str, Any]] = []
    for number, atlas in enumerate(context.atlases, start=1):
        suffix = "" if number == 1 else f" {number}"
        lacking = [one.name for one in atlas.structures if one.value not in atlas.present]
        rows.append(
            {
                "atlas": number,
                "files": [context.files.get(f"{role}{suffix}", "") for role in ("atlas", "labels")],
                "shape": list(atlas.image.grid.shape),
                "spacing_mm": [round(float(n), 3) for n in atlas.image.grid.spacing_mm],
                "structures": [one.name for one in atlas.structures if one.name not in lacking],
                "lacking": lacking,
            }
        )
    if as_json:
        gate = None if context.gate is None else context.gate.describe()
        expected = expected_rows(context)
        print_json({"model": context.settings.model, "gate": gate, "atlases": rows, "expected": expected})
        return
    table = [
        (
            str(row["atlas"]),
            row["files"][0],
            " x ".join(map(str, row["shape"])),
            " x ".join(f"{n:g}" for n in row["spacing_mm"]),
            counted(len(row["structures"]), "structure")
            + (f", not {listed(row['lacking'])}" if row["lacking"] else ""),
        )
        for row in rows
    ]
    print_table(("atlas", "file", "voxels", "mm", ""), table, numbers_from=5)
    typer.echo(f"\nmodel  {context.settings.model}")
    if context.gate is not None:
        typer.echo(f"gate   {context.gate.describe()}")
    print_expected(context)
