"""``atlassegfm evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError
from .options import ScreenOptions, SeriesOption, StructureOptions, options, split_list
from .session import open_session, print_json, print_table, score_text

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..evaluate.tolerances import Tolerances

#: mm. Public tools take 1, 2 or 3; it is printed with every NSD.
DEFAULT_TOLERANCE_MM = 2.0

ToleranceOption = Annotated[
    str,
    typer.Option(
        "--tolerance",
        metavar="MM|PRESET|FILE",
        help="Tolerance of the NSD: mm for all, a preset (flare22, kits21, nikolov) or a TOML file.",
    ),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        "--labels", metavar="A,B,...", help="Structures to score, by value, name or pattern; '*' for all there are."
    ),
]
CentrelineOption = Annotated[
    str | None, typer.Option("--cldice", metavar="A,B,...", help="Structures to score by clDice too (vessels).")
]


@options
class EvaluateOptions(StructureOptions, ScreenOptions):
    """Options of ``evaluate``."""

    pred: Annotated[Path, typer.Option("--pred", metavar="P", help="Label map to score, or folder of them.")]
    ref: Annotated[Path, typer.Option("--ref", metavar="R", help="Reference label map, or folder of them.")]
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.csv", help="Scores of each structure of each case.")
    ] = None
    tolerance: ToleranceOption = f"{DEFAULT_TOLERANCE_MM:g}"
    labels: LabelsOption = None
    cldice: CentrelineOption = None
    names: Annotated[
        Path | None, typer.Option("--names", metavar="FILE", help="Names of the labels: JSON, or '1 liver' lines.")
    ] = None
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out references that have no result instead of refusing.")
    ] = False
    scan: Annotated[
        Path | None,
        typer.Option(
            "--scan", metavar="IMG", help="The scan that RTSTRUCT or DICOM-SEG files lie on: DICOM folder or image."
        ),
    ] = None
    series: SeriesOption = None


def evaluate(options: EvaluateOptions) -> None:
    """Score label maps against references: Dice, NSD, HD95, volumes, on request clDice.

    P may also be the folder that `segment` wrote. P and R may be RTSTRUCT or DICOM-SEG files: their structures go by
    their names. Scores are on the reference's own voxels, in mm.
    """
    out = options.out
    with open_session(options.quiet, log=options.log) as session:
        tolerances = read_tolerance(options.tolerance)
        if out is not None and out.suffix.lower() != ".csv":
            raise InputError(f"{out}: the scores are written as CSV; give a file ending in .csv")
        if out is not None and not out.parent.is_dir():
            raise InputError(f"{out}: the folder {out.parent} does not exist; make it, or choose another place")
        from .. import evaluate as room

        def begin(number: int, count: int, case: str) -> None:
            session.begin(number, count, case)
            session.progress("scoring")

        session.progress("reading labels")
        wanted = room.EvaluationOptions(
            labels=split_list(options.labels, "--labels"),
            centreline=split_list(options.cldice, "--cldice"),
            names=options.names,
            partial=options.partial,
            dicom=room.DicomInputs(options.scan, options.series, options.selection()),
        )
        evaluation = room.evaluate(options.pred, options.ref, tolerances, wanted, on_case=begin)
        if out is not None:
            evaluation.write_csv(out)
    if options.as_json:
        print_json(evaluation.to_dict())
        return
    _print_summary(evaluation)
    if out is not None:
        typer.echo(f"\nscores    {out}")


def read_tolerance(text: str) -> Tolerances:
    """Read the value of ``--tolerance``."""
    from ..evaluate.tolerances import load_tolerances, uniform

    try:
        tolerance_mm = float(text)
    except ValueError:
        return load_tolerances(text)
    return uniform(tolerance_mm)


def _print_summary(evaluation: Evaluation) -> None:
    summary = evaluation.summary
    cldice = ["cldice"] if "cldice" in summary.means else []
    head = ["structure", "ml", "cases", "missed", "halluc.", "neither"]
    head += ["Dice", "sd", "NSD", "at mm", "HD95 mm", "voxel", *("clDice" for _ in cldice)]
    rows = []
    for one in summary.structures:
        mean = {name: spread.mean for name, spread in one.scores.items()}
        rows.append(
            [
                *(one.structure, _mm(one.reference_ml), str(sum(one.counts.values()))),
                *(str(one.counts[status]) for status in ("missed", "hallucinated", "both_empty")),
                *(score_text(mean["dice"]), score_text(one.scores["dice"].sd), score_text(mean["nsd"])),
                *(f"{one.tolerance_mm:g}", _mm(mean["hd95_mm"]), _mm(mean["hd95_voxel_mm"])),
                *(score_text(mean[name]) for name in cldice),
            ]
        )
    lines = [("mean", summary.means)]
    if summary.counts["both_empty"]:
        lines.append(("mean, neither = perfect", summary.means_with_empty))
    for title, means in lines:
        rows.append(
            [
                *(title, "", "", "", "", "", score_text(means["dice"]), "", score_text(means["nsd"]), ""),
                *(_mm(means["hd95_mm"]), _mm(means["hd95_voxel_mm"])),
                *(score_text(means[name]) for name in cldice),
            ]
        )
    cases = "1 case" if summary.cases == 1 else f"{summary.cases} cases"
    typer.echo(f"{cases}, {len(summary.structures)} structures; NSD at {evaluation.tolerances.origin}")
    print_table(head, rows, numbers_from=1)
    typer.echo(
        "\nNSD, HD95: surface elements weighted by area; voxel: HD95 between centres of surface voxels, as in MONAI.\n"
        "HD95 is the larger of both directions. Missed and hallucinated count as Dice 0, NSD 0 and the image's\n"
        "diagonal; 'neither' is left out."
    )


def _mm(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"
