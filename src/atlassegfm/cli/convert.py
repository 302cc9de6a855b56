"""``atlassegfm convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from ..core.text import counted, did_you_mean
from .options import ScreenOptions, SeriesOption, StructureOptions, options
from .session import open_session, print_json


@options
class ConvertOptions(ScreenOptions, StructureOptions):
    """Options of ``convert``."""

    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="Label map, RTSTRUCT or DICOM-SEG.")]
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="File to write; with --to masks a folder of files.")
    ]
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="image|masks|rtstruct|seg",
            help="What to write [default: an image in the format of OUT's ending, as .nii.gz or .seg.nrrd].",
        ),
    ] = None
    onto: Annotated[
        Path | None,
        typer.Option(
            "--onto", metavar="SCAN", help="The scan it lies on: RTSTRUCT and DICOM-SEG are written for its series."
        ),
    ] = None
    names: Annotated[
        Path | None, typer.Option("--names", metavar="FILE", help="Names of the labels: JSON, or '1 liver' lines.")
    ] = None
    series: SeriesOption = None
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False


def convert(options: ConvertOptions) -> None:
    """Convert labels between image files, RTSTRUCT and DICOM-SEG.

    Names and colours go with them. What was written as RTSTRUCT or DICOM-SEG is read back and compared.
    """
    with open_session(options.quiet, log=options.log) as session:
        session.progress("reading")
        from ..dicom.convert import FORMS, Conversion, convert_labels

        out = options.out
        to = options.to or ("" if out.suffix.lower() == ".dcm" else "image")
        if to not in FORMS:
            meant = did_you_mean(options.to or "", FORMS)
            raise InputError(f"--to {options.to or ''}: expected one of {', '.join(FORMS)}{meant}")
        if out.exists() and not options.force:
            raise InputError(f"{out}: exists already; choose another name, or replace it with --force")
        conversion = Conversion(to, options.onto, options.series, options.names, options.selection())
        written = convert_labels(options.labels, out, conversion)
    if options.as_json:
        print_json(written)
        return
    typer.echo(f"{options.labels} -> {out}")
    for one in written["structures"]:
        typer.echo(f"  {one['value']:>5}  {one['name']}  ({counted(one['voxels'], 'voxel')})")
