"""``atlassegfm convert``."""

from pathlib import Path

import typer

from ..core.errors import InputError
from ..core.text import counted, did_you_mean
from .fields import argument, flag, names_option, option, options, required, series_option
from .options import ScreenOptions, StructureOptions
from .session import print_json


@options
class ConvertOptions(ScreenOptions, StructureOptions):
    """Options of ``convert``."""

    labels: Path = argument("LABELS", "Label map, RTSTRUCT or DICOM-SEG.")
    out: Path = required("--out -o OUT", "File to write; with --to masks a folder of files.")
    to: str | None = option(
        "--to image|masks|rtstruct|seg",
        "What to write [default: an image in the format of OUT's ending, as .nii.gz or .seg.nrrd].",
    )
    onto: Path | None = option("--onto SCAN", "The scan it lies on: RTSTRUCT and DICOM-SEG are written for its series.")
    names: Path | None = names_option()
    series: str | None = series_option()
    force: bool = flag("--force", "Replace OUT if it exists.")


def convert(options: ConvertOptions) -> None:
    """Convert labels between image files, RTSTRUCT and DICOM-SEG.

    Names and colours go with them. What was written as RTSTRUCT or DICOM-SEG is read back and compared.
    """
    with options.session() as session:
        session.progress("reading")
        from ..dicom.convert import FORMS, Conversion, convert_labels

        out = options.out
        if options.to is None and out.suffix.lower() == ".dcm":
            raise InputError(f"{out}: both RTSTRUCT and DICOM-SEG end so; add --to rtstruct or --to seg")
        to = options.to or "image"
        if to not in FORMS:
            meant = did_you_mean(to, FORMS)
            raise InputError(f"--to {to}: expected one of {', '.join(FORMS)}{meant}")
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
