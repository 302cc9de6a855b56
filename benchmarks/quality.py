"""Fit and check the estimate of the Dice coefficient from evidence that needs no labels (atlassegfm.quality).

Every ordered pair of the cases of three sets is segmented with the built-in model and without one. Evidence and true
Dice are kept in one file a pair, so that an interrupted run can be resumed. A ridge regression is fitted for each kind
of result and cross-validated by query, by atlas and by set.

    python benchmarks/quality.py DATA OUT            # about an hour on 2 cores
    python benchmarks/quality.py DATA OUT --write    # and write the coefficients into the package
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlassegfm.atlas import Atlas
from atlassegfm.benchmark.pairs import restricted
from atlassegfm.context import Context, customize
from atlassegfm.core.config import with_overrides
from atlassegfm.core.dataset import Dataset, load_dataset
from atlassegfm.core.image import load_image, load_labels
from atlassegfm.core.overlap import dice
from atlassegfm.quality import estimate
from atlassegfm.quality.estimate import CALIBRATION, Regression, Term
from atlassegfm.quality.evidence import Evidence
from atlassegfm.quality.verdict import FAILED_BELOW, GOOD_FROM
from atlassegfm.result import Segmentation
from atlassegfm.segment import segment
from atlassegfm.settings import Settings

SETS = {
    "Dataset001_AbdMR": (1, 2, 3, 4),
    "Dataset002_AbdCT": (1, 2, 3, 6),
    "Dataset005_Cardiac": (1, 2, 3),
}
#: Results of a lower Dice should be flagged.
BAD = 0.7
#: Weight of the ridge penalty; 3, 10 and 30 differ by less than 0.01 in AUROC.
RIDGE = 30.0
#: Evidence left out of each regression: another model's certainty is not comparable to the built-in one's, and without
#: a model there is neither certainty nor agreement.
LEFT_OUT = {
    "builtin": (),
    "model": ("certainty",),
    "none": ("certainty", "agreement", "offset"),
}

Row = dict[str, Any]


def measure(dataset: Dataset, values: Sequence[int], out: Path, *, only_measured: bool) -> list[Row]:
    """Measure evidence and true Dice of each structure of each ordered pair."""
    rows: list[Row] = []
    names = sorted(case.name for case in dataset.cases)
    for atlas in names:
        context = None
        for query in names:
            if query == atlas:
                continue
            file = out / f"{dataset.name}_{atlas}_{query}.json"
            if not file.exists():
                if only_measured:
                    continue
                if context is None:
                    context = _context(dataset, atlas, values)
                found = _pair(context, dataset, query)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".part").write_text(json.dumps(found))
                file.with_suffix(".part").replace(file)
                print(file.stem, flush=True)
            rows += [
                {"set": dataset.name, "atlas": atlas, "query": query, **row} for row in json.loads(file.read_text())
            ]
    return rows


def _context(dataset: Dataset, name: str, values: Sequence[int]) -> Context:
    case = dataset.case(name)
    atlas = restricted(Atlas.from_files(case.image, case.labels), values, case.labels)
    return customize(Context(atlas, Settings()))


def _pair(context: Context, dataset: Dataset, query: str) -> list[Row]:
    case = dataset.case(query)
    scan, truth = load_image(case.image), load_labels(case.labels).data
    result = segment(context, scan)
    without_model = Context(context.atlas, with_overrides(Settings(), ["model=none"]))
    bare = segment(without_model, scan, transforms=[result.registration.fixed_to_moving])
    return [row for kind, one in (("builtin", result), ("none", bare)) for row in _rows(kind, one, truth)]


def _rows(kind: str, result: Segmentation, truth: NDArray[Any]) -> list[Row]:
    rows = []
    for one in result.structures:
        value, found = one.structure.value, one.quality
        if (truth == value).any() and found is not None and found.evidence is not None:
            score = dice(result.labels.data == value, truth == value)
            rows.append({"kind": kind, "value": value, "dice": score, "evidence": asdict(found.evidence)})
    return rows


def fit(rows: Sequence[Row], names: Sequence[str]) -> Regression:
    """Fit a ridge regression of the Dice on evidence; its interval is still 0."""
    evidence, scores = _arrays(rows, names)
    mean, deviation = evidence.mean(axis=0), evidence.std(axis=0) + 1e-9
    scaled = (evidence - mean) / deviation
    weight = np.linalg.solve(scaled.T @ scaled + RIDGE * np.eye(len(names)), scaled.T @ (scores - scores.mean()))
    columns = zip(mean.tolist(), deviation.tolist(), weight.tolist(), strict=True)
    terms = {name: Term(*column) for name, column in zip(names, columns, strict=True)}
    return Regression(float(scores.mean()), 0.0, 0.0, terms)


def left_out(rows: Sequence[Row], names: Sequence[str], group: Callable[[Row], str]) -> NDArray[np.float64]:
    """Estimate the rows of each group by a fit on all others."""
    groups = [group(row) for row in rows]
    estimates = np.zeros(len(rows))
    for one in sorted(set(groups)):
        outside = [row for row, its in zip(rows, groups, strict=True) if its != one]
        inside = [n for n, its in enumerate(groups) if its == one]
        regression = fit(outside, names)
        estimates[inside] = [regression.estimate(Evidence(**rows[n]["evidence"])) for n in inside]
    return estimates


def auroc(scores: NDArray[np.float64], is_bad: NDArray[np.bool_]) -> float:
    """Compute the probability that a bad result has a lower score than another one; ties count half."""
    bad, other = scores[is_bad][:, None], scores[~is_bad][None]
    return float(((bad < other) + 0.5 * (bad == other)).mean()) if bad.size and other.size else float("nan")


def _arrays(rows: Sequence[Row], names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (
        np.array([[row["evidence"][name] for name in names] for row in rows]),
        np.array([row["dice"] for row in rows]),
    )


def main() -> None:
    """Measure, fit, check, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the datasets in nnU-Net raw layout")
    parser.add_argument("out", type=Path, help="folder for one file a pair")
    parser.add_argument("--write", action="store_true", help="write the coefficients into the package")
    parser.add_argument("--only-measured", action="store_true", help="take the pairs that OUT has, measure no more")
    arguments = parser.parse_args()
    rows = [
        row
        for name, values in SETS.items()
        for row in measure(
            load_dataset(arguments.data / name), values, arguments.out, only_measured=arguments.only_measured
        )
    ]
    regressions: dict[str, Regression] = {}
    for kind, without in LEFT_OUT.items():
        mine = [row for row in rows if row["kind"] == ("none" if kind == "none" else "builtin")]
        names = [name for name in Evidence.__dataclass_fields__ if name not in without]
        scores = _arrays(mine, names)[1]
        is_bad = scores < BAD
        print(f"\n{kind}: {len(mine)} structures, {int(is_bad.sum())} with a Dice below {BAD}")
        groups: dict[str, Callable[[Row], str]] = {
            "query": lambda row: row["set"] + row["query"],
            "atlas": lambda row: row["set"] + row["atlas"],
            "set": lambda row: row["set"],
        }
        regressions[kind] = fit(mine, names)
        for left, group in groups.items():
            estimates = left_out(mine, names, group)
            off = scores - estimates
            print(
                f"  left out by {left}: AUROC {auroc(estimates, is_bad):.3f}, correlation "
                f"{np.corrcoef(estimates, scores)[0, 1]:.3f}, mean error {np.abs(off).mean():.3f}"
            )
            for one in sorted({row["set"] for row in mine}):
                here = np.array([row["set"] == one for row in mine])
                print(f"    {one}: AUROC {auroc(estimates[here], is_bad[here]):.3f}, {int(is_bad[here].sum())} bad")
            if left == "query":
                low, high = np.percentile(off, (10, 90))
                regressions[kind] = replace(regressions[kind], below=float(-low), above=float(high))
                for verdict, first, last in (
                    ("good", GOOD_FROM, 2.0),
                    ("review", FAILED_BELOW, GOOD_FROM),
                    ("failed", -1.0, FAILED_BELOW),
                ):
                    here = (estimates >= first) & (estimates < last)
                    print(
                        f"    {verdict}: {int(here.sum())} structures, mean Dice {scores[here].mean():.3f}, "
                        f"{int(is_bad[here].sum())} below {BAD}"
                    )
    if arguments.write:
        file = Path(estimate.__file__).with_name(CALIBRATION)
        plain = {kind: asdict(one) for kind, one in regressions.items()}
        file.write_text(json.dumps({"source": "benchmarks/quality.py", "regressions": plain}, indent=1) + "\n")
        print(f"\nwritten: {file}")


if __name__ == "__main__":
    main()
