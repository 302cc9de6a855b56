"""The command ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError
from .session import (
    JsonOption,
    OverlapOption,
    QuietOption,
    SeriesOption,
    StructuresOption,
    SynonymsOption,
    build_selection,
    open_session,
    print_json,
    print_table,
    score_text,
    split_list,
)

if TYPE_CHECKING:
    from ..evaluate.scoring import Summary
    from ..evaluate.tolerances import Tolerances


#: mm. As 2 of the public tools have it; others have 1 or 3. There is no right one, so it is always printed.
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


def evaluate(
    pred: Annotated[Path, typer.Option("--pred", metavar="P", help="Label map, or folder of them.")],
    ref: Annotated[Path, typer.Option("--ref", metavar="R", help="Its reference, or folder of them.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.csv", help="Scores of each structure of each case.")
    ] = None,
    tolerance: ToleranceOption = f"{DEFAULT_TOLERANCE_MM:g}",
    labels: LabelsOption = None,
    cldice: CentrelineOption = None,
    names: Annotated[
        Path | None, typer.Option("--names", metavar="FILE", help="Names of the labels: JSON, or '1 liver' lines.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out references that have no result instead of refusing.")
    ] = False,
    scan: Annotated[
        Path | None,
        typer.Option(
            "--scan", metavar="IMG", help="The scan that RTSTRUCT or DICOM-SEG files lie on: DICOM folder or image."
        ),
    ] = None,
    series: SeriesOption = None,
    structures: StructuresOption = None,
    synonyms: SynonymsOption = None,
    overlap: OverlapOption = "refuse",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score label maps against references: Dice, NSD, HD95, volumes, on request clDice.

    P may also be the folder that `segment` wrote. P and R may be RTSTRUCT or DICOM-SEG files: their structures go by
    their names. Scores are on the reference's own voxels, in mm.
    """
    with open_session(quiet) as session:
        tolerances = read_tolerance(tolerance)
        if out is not None and out.suffix.lower() != ".csv":
            raise InputError(f"{out}: the scores are written as CSV; give a file ending in .csv")
        if out is not None and not out.parent.is_dir():
            raise InputError(f"{out}: the folder {out.parent} does not exist; make it, or choose another place")
        from ..evaluate.scoring import DicomInputs, evaluate_files, find_pairs, score_row, summarise, write_scores

        pairs = find_pairs(pred, ref, partial=partial)

        def begin(number: int, name: str) -> None:
            session.begin(number, len(pairs), name)
            session.progress("scoring")

        session.progress("reading labels")
        scored = evaluate_files(
            pairs,
            tolerances,
            labels=split_list(labels, "--labels"),
            centreline=split_list(cldice, "--cldice"),
            names=names,
            on_case=begin,
            dicom=DicomInputs(scan, series, build_selection(structures, synonyms, overlap)),
        )
        summary = summarise(scored)
        rows = [
            {"case": one.case, "value": one.value, "structure": one.structure} | score_row(one.scores) for one in scored
        ]
        if out is not None:
            write_scores(out, rows)
    if as_json:
        from ..evaluate.scoring import plain_row

        print_json(
            {"tolerances": tolerances.origin, "summary": summary.to_dict(), "scores": [plain_row(row) for row in rows]}
        )
        return
    _print_summary(summary, tolerances)
    if out is not None:
        typer.echo(f"\nscores    {out}")


def read_tolerance(text: str) -> Tolerances:
    """What ``--tolerance`` says."""
    from ..evaluate.tolerances import load_tolerances, uniform

    try:
        tolerance_mm = float(text)
    except ValueError:
        return load_tolerances(text)
    return uniform(tolerance_mm)


def _print_summary(summary: Summary, tolerances: Tolerances) -> None:
    cldice = "cldice" in summary.means
    head = [
        "structure",
        "ml",
        "cases",
        "missed",
        "halluc.",
        "neither",
        "Dice",
        "sd",
        "NSD",
        "at mm",
        "HD95 mm",
        "voxel",
    ]
    head += ["clDice"] if cldice else []
    rows = []
    for one in summary.structures:
        scores = one.scores
        counts = [str(one.counts[status]) for status in ("missed", "hallucinated", "both_empty")]
        cells = [score_text(scores["dice"].mean), score_text(scores["dice"].sd), score_text(scores["nsd"].mean)]
        cells += [f"{one.tolerance_mm:g}", _mm(scores["hd95_mm"].mean), _mm(scores["hd95_voxel_mm"].mean)]
        cells += [score_text(scores["cldice"].mean)] if cldice else []
        rows.append((one.structure, _mm(one.reference_ml), str(sum(one.counts.values())), *counts, *cells))
    for name, means in (("mean", summary.means), ("mean, neither = perfect", summary.means_with_empty)):
        if name == "mean" or summary.counts["both_empty"]:
            cells = ["", "", "", "", "", score_text(means["dice"]), "", score_text(means["nsd"]), ""]
            cells += [_mm(means["hd95_mm"]), _mm(means["hd95_voxel_mm"])]
            cells += [score_text(means["cldice"])] if cldice else []
            rows.append((name, *cells))
    cases = "1 case" if summary.cases == 1 else f"{summary.cases} cases"
    typer.echo(f"{cases}, {len(summary.structures)} structures; NSD at {tolerances.origin}")
    print_table(head, rows, numbers_from=1)
    typer.echo(
        "\nNSD, HD95: surface elements weighted by area; voxel: HD95 between centres of surface voxels, as in MONAI.\n"
        "HD95 is the larger of both directions. Missed and hallucinated count as Dice 0, NSD 0 and the image's\n"
        "diagonal; 'neither' is left out."
    )


def _mm(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"
