"""``atlassegfm evaluate``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import InputError
from ..core.text import counted
from .fields import flag, names_option, option, options, required, series_option
from .options import ScreenOptions, StructureOptions, split_list
from .session import EXIT_FAILURES, print_json, print_table, score_text

if TYPE_CHECKING:
    from ..evaluate import CaseScore, Evaluation
    from ..evaluate.tolerances import Tolerances

#: Columns of the table by status, for those that occur, and by score.
_COUNTED = {"missed": "missed", "hallucinated": "halluc.", "both_empty": "neither"}
_SCORES = {"dice": "Dice", "nsd": "NSD", "hd95_mm": "HD95", "assd_mm": "ASSD", "cldice": "clDice"}

tolerance_option = functools.partial(
    option,
    "--tolerance MM|PRESET|FILE",
    "Tolerance of the NSD: mm for all, a preset (flare22, kits21, nikolov) or a TOML file.",
    "2",  # public tools take 1, 2 or 3; it is printed with every NSD
)
labels_option = functools.partial(
    option, "--labels A,B,...", "Structures to score, by value, name or pattern; '*' for all there are."
)
cldice_option = functools.partial(option, "--cldice A,B,...", "Structures to score by clDice too (vessels).")


@options
class EvaluateOptions(StructureOptions, ScreenOptions):
    """Options of ``evaluate``."""

    pred: Path = required("--pred P", "Label map to score, or folder of them.")
    ref: Path = required("--ref R", "Reference label map, or folder of them.")
    out: Path | None = option("--out -o FILE.csv", "Scores of each structure of each case.")
    tolerance: str = tolerance_option()
    labels: str | None = labels_option()
    cldice: str | None = cldice_option()
    names: Path | None = names_option()
    partial: bool = flag("--partial", "Leave out references that have no result instead of refusing.")
    cases: bool = flag("--cases", "Print a table of the cases too.")
    scan: Path | None = option("--scan IMG", "The scan that RTSTRUCT or DICOM-SEG files lie on: DICOM folder or image.")
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

        session.progress("reading labels")
        labels, centreline = split_list(options.labels, "--labels"), split_list(options.cldice, "--cldice")
        dicom = DicomInputs(options.scan, options.series, options.selection())
        wanted = EvaluationOptions(
            labels=labels, centreline=centreline, names=options.names, partial=options.partial, dicom=dicom
        )
        begin = functools.partial(session.begin, stage="scoring")
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
            failed = len(evaluation.failures)
            typer.echo(f"\nnot scored: {failed} of {len(evaluation.cases) + failed}")
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
    summary, rows = evaluation.summary, []
    for one in summary.structures:
        facts = {"structure": one.structure, "ml": _mm(one.reference_ml), "cases": str(sum(one.counts.values()))}
        facts |= {title: str(one.counts[status]) for status, title in _COUNTED.items()}
        facts |= {"sd": score_text(one.scores["dice"].sd), "at mm": f"{one.tolerance_mm:g}"}
        scores = {name: spread.mean for name, spread in one.scores.items()}
        rows.append(_worst(one.worst) | facts | _cells(scores))
    rows.append({"structure": "mean", **_cells(summary.means)})
    if summary.counts["both_empty"]:
        rows.append({"structure": "neither = perfect", **_cells(summary.means_with_empty)})
    several, counts = summary.cases > 1, {title: summary.counts[status] for status, title in _COUNTED.items()}
    own_tolerances = len({one.tolerance_mm for one in summary.structures}) > 1
    shown = {"structure": True, "ml": True, "cases": several, **counts, "Dice": True, "sd": several, "NSD": True}
    shown |= {"at mm": own_tolerances, "HD95": True, "ASSD": True, "clDice": "cldice" in summary.means}
    shown |= {"worst": several, "in case": several}
    size = f"{counted(summary.cases, 'case')}, {len(summary.structures)} structures"
    typer.echo(f"{size}; NSD at {evaluation.tolerances.origin}; HD95 and ASSD in mm")
    _print_rows([title for title, wanted in shown.items() if wanted], rows, texts=several)
    if any(counts.values()):
        typer.echo(
            "\nMissed and hallucinated structures count as Dice 0, NSD 0 and the image's diagonal; where\n"
            "neither has the structure, it is left out."
        )


def _print_cases(evaluation: Evaluation) -> None:
    """Print a row for each case, means over its structures."""
    head = ["case", "Dice", "NSD", "HD95", "ASSD", "worst", "structure"]
    rows = [{"case": one.case} | _cells(one.means) | _worst(one.worst) for one in evaluation.cases]
    unknown = dict.fromkeys(head, "-") | {"structure": "not scored"}
    typer.echo()
    _print_rows(head, [*rows, *(unknown | {"case": case} for case in evaluation.failures)], texts=1)


def _print_rows(head: Sequence[str], rows: Sequence[Mapping[str, str]], texts: int) -> None:
    """Print the cells of these columns; between the first and the last ``texts`` all are numbers."""
    cells = [[row.get(title, "") for title in head] for row in rows]
    print_table(head, cells, numbers_from=1, numbers_to=len(head) - texts)


def _cells(scores: Mapping[str, float]) -> dict[str, str]:
    """Scores by the title of their column."""
    texts = {name: _mm(score) if name.endswith("_mm") else score_text(score) for name, score in scores.items()}
    return {title: texts[name] for name, title in _SCORES.items() if name in texts}


def _worst(worst: CaseScore | None) -> dict[str, str]:
    if worst is None:
        return {"worst": "-"}
    return {"worst": score_text(worst.scores.dice), "in case": worst.case, "structure": worst.structure}


def _mm(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"
