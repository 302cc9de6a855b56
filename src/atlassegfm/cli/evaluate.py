"""``atlassegfm evaluate``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import InputError
from .options import (
    ScreenOptions,
    StructureOptions,
    flag,
    names_option,
    option,
    options,
    required,
    series_option,
    split_list,
)
from .session import EXIT_FAILURES, print_json, print_table, score_text

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..evaluate.tolerances import Tolerances

#: mm. Public tools take 1, 2 or 3; it is printed with every NSD.
DEFAULT_TOLERANCE_MM = 2.0

#: Statuses that are counted in the table where there are any.
_COUNTED = {"missed": "missed", "hallucinated": "halluc.", "both_empty": "neither"}

tolerance_option = functools.partial(
    option,
    "--tolerance",
    "MM|PRESET|FILE",
    "Tolerance of the NSD: mm for all, a preset (flare22, kits21, nikolov) or a TOML file.",
    f"{DEFAULT_TOLERANCE_MM:g}",
)
labels_option = functools.partial(
    option, "--labels", "A,B,...", "Structures to score, by value, name or pattern; '*' for all there are."
)
cldice_option = functools.partial(option, "--cldice", "A,B,...", "Structures to score by clDice too (vessels).")


@options
class EvaluateOptions(StructureOptions, ScreenOptions):
    """Options of ``evaluate``."""

    pred: Path = required("--pred", "P", "Label map to score, or folder of them.")
    ref: Path = required("--ref", "R", "Reference label map, or folder of them.")
    out: Path | None = option("--out -o", "FILE.csv", "Scores of each structure of each case.")
    tolerance: str = tolerance_option()
    labels: str | None = labels_option()
    cldice: str | None = cldice_option()
    names: Path | None = names_option()
    partial: bool = flag("--partial", "Leave out references that have no result instead of refusing.")
    cases: bool = flag("--cases", "Print a table of the cases too.")
    scan: Path | None = option(
        "--scan", "IMG", "The scan that RTSTRUCT or DICOM-SEG files lie on: DICOM folder or image."
    )
    series: str | None = series_option()


def evaluate(options: EvaluateOptions) -> None:
    """Score label maps against references: Dice, NSD, HD95, ASSD, volumes, on request clDice.

    P may also be the folder that `segment` wrote. P and R may be RTSTRUCT or DICOM-SEG files: their structures go by
    their names. Scores are on the reference's own voxels, in mm. A case that cannot be scored is named, and makes the
    exit code 1; the others are scored.
    """
    out = options.out
    with options.session() as session:
        tolerances = read_tolerance(options.tolerance)
        if out is not None and out.suffix.lower() != ".csv":
            raise InputError(f"{out}: the scores are written as CSV; give a file ending in .csv")
        if out is not None and not out.parent.is_dir():
            raise InputError(f"{out}: the folder {out.parent} does not exist; make it, or choose another place")
        from ..evaluate import DicomInputs, EvaluationOptions
        from ..evaluate import evaluate as score

        def begin(number: int, count: int, case: str) -> None:
            session.begin(number, count, case)
            session.progress("scoring")

        session.progress("reading labels")
        wanted = EvaluationOptions(
            labels=split_list(options.labels, "--labels"),
            centreline=split_list(options.cldice, "--cldice"),
            names=options.names,
            partial=options.partial,
            dicom=DicomInputs(options.scan, options.series, options.selection()),
        )
        evaluation = score(options.pred, options.ref, tolerances, wanted, on_case=begin)
        if out is not None:
            evaluation.write_csv(out)
    if options.as_json:
        print_json(evaluation.to_dict())
    else:
        _print_summary(evaluation)
        if options.cases:
            _print_cases(evaluation)
        if evaluation.failures:
            typer.echo(
                f"\nnot scored: {len(evaluation.failures)} of {len(evaluation.cases) + len(evaluation.failures)}"
            )
        for case, reason in evaluation.failures.items():
            typer.echo(f"  {case}: {reason}")
        if out is not None:
            typer.echo(f"\nscores    {out}")
    if evaluation.failures:
        raise typer.Exit(EXIT_FAILURES)


def read_tolerance(text: str) -> Tolerances:
    """Read the value of ``--tolerance``."""
    from ..evaluate.tolerances import load_tolerances, uniform

    try:
        tolerance_mm = float(text)
    except ValueError:
        return load_tolerances(text)
    return uniform(tolerance_mm)


def _print_summary(evaluation: Evaluation) -> None:
    """Print a row for each structure; columns that would say nothing are left out."""
    summary = evaluation.summary
    several, cldice = summary.cases > 1, "cldice" in summary.means
    counted = [status for status in _COUNTED if summary.counts[status]]
    own_tolerances = len({one.tolerance_mm for one in summary.structures}) > 1

    def row(
        title: str, facts: Sequence[str], means: Mapping[str, float], sd: str, mm: str, worst: Sequence[str]
    ) -> None:
        cells = [title, *facts, score_text(means["dice"]), *([sd] if several else []), score_text(means["nsd"])]
        cells += [*([mm] if own_tolerances else []), _mm(means["hd95_mm"]), _mm(means["assd_mm"])]
        rows.append([*cells, *([score_text(means["cldice"])] if cldice else []), *(worst if several else [])])

    head = ["structure", "ml", *(["cases"] if several else []), *(_COUNTED[status] for status in counted), "Dice"]
    head += [*(["sd"] if several else []), "NSD", *(["at mm"] if own_tolerances else []), "HD95", "ASSD"]
    head += [*(["clDice"] if cldice else []), *(["worst", "in case"] if several else [])]
    rows: list[list[str]] = []
    for one in summary.structures:
        facts = [_mm(one.reference_ml), *([str(sum(one.counts.values()))] if several else [])]
        facts += [str(one.counts[status]) for status in counted]
        worst = ["-", ""] if one.worst is None else [score_text(one.worst.scores.dice), one.worst.case]
        means = {name: spread.mean for name, spread in one.scores.items()}
        row(one.structure, facts, means, score_text(one.scores["dice"].sd), f"{one.tolerance_mm:g}", worst)
    blank = [""] * (1 + several + len(counted))
    row("mean", blank, summary.means, "", "", ["", ""])
    if summary.counts["both_empty"]:
        row("neither = perfect", blank, summary.means_with_empty, "", "", ["", ""])
    cases = "1 case" if summary.cases == 1 else f"{summary.cases} cases"
    typer.echo(
        f"{cases}, {len(summary.structures)} structures; NSD at {evaluation.tolerances.origin}; HD95 and ASSD in mm"
    )
    print_table(head, rows, numbers_from=1, numbers_to=len(head) - several)
    if counted:
        typer.echo(
            "\nMissed and hallucinated structures count as Dice 0, NSD 0 and the image's diagonal; where\n"
            "neither has the structure, it is left out."
        )


def _print_cases(evaluation: Evaluation) -> None:
    """Print a row for each case, means over its structures."""
    head, rows = ["case", "Dice", "NSD", "HD95", "ASSD", "worst", "structure"], []
    for one in evaluation.cases:
        scores = [score_text(one.means[name]) for name in ("dice", "nsd")]
        worst = ["-", ""] if one.worst is None else [score_text(one.worst.scores.dice), one.worst.structure]
        rows.append([one.case, *scores, _mm(one.means["hd95_mm"]), _mm(one.means["assd_mm"]), *worst])
    rows += [[case, *("-" for _ in head[1:-1]), "not scored"] for case in evaluation.failures]
    typer.echo("")
    print_table(head, rows, numbers_from=1, numbers_to=len(head) - 1)


def _mm(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"
