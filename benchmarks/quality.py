"""Fit and check the estimate of the Dice coefficient from evidence that needs no labels (atlassegfm.quality).

Every ordered pair of the cases of four sets, and six of OASIS, is segmented, the query as it is and varied: thick
slices, a part of the field of view, or noise and another contrast. Evidence and true Dice are kept in one file a pair,
and gates in one an atlas, so that an interrupted run goes on. A ridge regression is fitted for each kind of result, and
for thin structures apart, and cross-validated by query, by atlas and by set; bounds of the verdicts follow from the
estimates left out by query.

    python benchmarks/quality.py DATA OUT --workers 2            # continues where it stopped
    python benchmarks/quality.py DATA OUT --write                # and write the calibration into the package
    python benchmarks/quality.py DATA OUT --model builtin,litemedsam    # these models together; kept beside the others
"""

from __future__ import annotations

import argparse
import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from atlassegfm.atlas import Atlas, canonical_scan
from atlassegfm.benchmark.pairs import restricted
from atlassegfm.benchmark.verdicts import BAD, FOUND, LOST, auroc, triage
from atlassegfm.context import Context, customize
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_image, load_labels
from atlassegfm.core.overlap import dice
from atlassegfm.core.parallel import limited_threads
from atlassegfm.quality import estimate
from atlassegfm.quality.estimate import CALIBRATION, THIN, THIN_FROM, Regression, Term
from atlassegfm.quality.evidence import Case, Evidence, gather
from atlassegfm.result import Segmentation
from atlassegfm.segment import segment
from atlassegfm.settings import Settings

#: Structures of each set by label value, and of how many other cases each case is the atlas: where there are many
#: structures, one pair tells as much as all of another set.
SETS: Mapping[str, tuple[Sequence[int], int]] = {
    "Dataset001_AbdMR": ((1, 2, 3, 4), 5),
    "Dataset002_AbdCT": ((1, 2, 3, 6), 5),
    "Dataset005_Cardiac": ((1, 2, 3), 5),
    "Dataset004_Hippocampus": ((1, 2), 5),
    "Dataset003_OASIS": (range(1, 208), 1),
}
#: Cases of each set, the first by name.
CASES = 6
#: This fraction of the bad results may be judged good.
MISSED = 0.05
#: Of the results below the bound of "failed" at least this fraction is bad.
FAILED = 0.5
#: Weight of the ridge penalty, and the range to which the Dice is clipped for the fit: what is better than good or
#: worse than failed need not be told apart.
RIDGE, RANGE = 200.0, (0.4, 0.85)
#: Quantiles of the scores between which the curve from scores to Dice has a knot, and how far it goes on at its ends.
BINS, BEYOND = (0.0, 0.03, 0.08, 0.16, 0.3, 0.5, 0.7, 0.85, 1.0), 0.2
#: A structure of fewer voxels in the query says nothing.
FEWEST_VOXELS = 50
#: Kind of the results that each regression is fitted on, and evidence left out of it: another model's certainty is not
#: comparable to the built-in one's, and without a model there is neither certainty nor agreement. How thin a structure
#: is tells nothing among those that are not.
REGRESSIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "builtin": ("builtin", ("thinness",)),
    "builtin,litemedsam": ("builtin,litemedsam", ("thinness",)),
    "model": ("builtin", ("thinness", "certainty")),
    "none": ("none", ("thinness", "certainty", "agreement", "offset")),
    f"{THIN}builtin": ("builtin", ()),
    f"{THIN}model": ("builtin", ("certainty",)),
    f"{THIN}none": ("none", ("certainty", "agreement", "offset")),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One atlas and one query of a set; ``varied`` changes the query, ``model`` is one or several."""

    data: Path
    out: Path
    dataset: str
    atlas: str
    query: str
    varied: bool
    model: str

    @property
    def file(self) -> Path:
        """Where its rows are kept."""
        return self.out / f"{self.dataset}_{self.atlas}_{self.query}{'_varied' if self.varied else ''}{self._of}.json"

    @property
    def gate(self) -> Path:
        """Where the gate of its atlas is kept."""
        return self.out / f"gate_{self.dataset}_{self.atlas}{self._of}.pickle"

    @property
    def _of(self) -> str:
        return "" if self.model == "builtin" else f"_{self.model.replace(',', '+')}"

    def rows(self) -> list[Row]:
        """Read its rows."""
        names = {"set": self.dataset, "atlas": self.atlas, "query": self.query, "varied": self.varied}
        return [{**names, **row} for row in json.loads(self.file.read_text())]

    def measure(self) -> str:
        """Segment the query, and keep evidence and true Dice of each structure."""
        with limited_threads(1):
            dataset = load_dataset(self.data / self.dataset)
            case, other = dataset.case(self.atlas), dataset.case(self.query)
            atlas = restricted(Atlas.from_files(case.image, case.labels), SETS[self.dataset][0], case.labels)
            context = _with_gate(Context(atlas, Settings(model=self.model)), self.gate)
            scan, truth = load_image(other.image), load_labels(other.labels)
            if self.varied:
                scan, truth = varied(scan.canonical(), truth.canonical(), zlib.crc32(self.file.name.encode()))
            result = segment(context, scan)
            found = _rows(self.model, result, truth)
            if self.model == "builtin":
                found += _rows_without_model(context, scan, result, truth)
        self.file.with_suffix(".part").write_text(json.dumps(found))
        self.file.with_suffix(".part").replace(self.file)
        return self.file.stem


def jobs(data: Path, out: Path, model: str) -> Iterator[Job]:
    """List all jobs: queries as they are first, and sets and atlases in turn, so that a part tells of all."""
    for is_varied in (False, True):
        for step in range(1, CASES):
            for name, (_, others) in SETS.items():
                cases = sorted(case.name for case in load_dataset(data / name).cases)[:CASES]
                if step <= others:
                    for atlas, query in zip(cases, cases[step:] + cases[:step], strict=True):
                        yield Job(data, out, name, atlas, query, is_varied, model)


def varied(scan: Volume, truth: Volume, seed: int) -> tuple[Volume, Volume]:
    """Change a scan in one of three ways: thick slices, a part of the field of view, noise and another contrast."""
    rng, axis = np.random.default_rng(seed), int(np.argmax(scan.grid.spacing_mm))
    data, labels = scan.data.astype(np.float32), truth.data
    low, high = np.percentile(data, (1, 99))
    if seed % 3 == 0:
        count = int(rng.integers(2, 4))
        whole = data.shape[axis] // count * count
        blocks = np.split(np.take(data, range(whole), axis), whole // count, axis)
        data = np.concatenate([block.mean(axis=axis, keepdims=True) for block in blocks], axis=axis)
        labels = np.take(labels, range(count // 2, whole, count), axis)
        affine = scan.grid.affine.copy()
        affine[:3, 3] = scan.grid.voxel_to_world(np.eye(3)[axis] * (count - 1) / 2)
        affine[:3, axis] *= count
        grid = Grid(data.shape, affine)
    elif seed % 3 == 1:
        start, stop = np.zeros(3, int), np.array(data.shape)
        side, cut = int(rng.integers(3)), float(rng.uniform(0.1, 0.25))
        if rng.random() < 0.5:
            start[side] = round(cut * data.shape[side])
        else:
            stop[side] -= round(cut * data.shape[side])
        box = tuple(map(slice, start.tolist(), stop.tolist()))
        data, labels, grid = data[box], labels[box], scan.grid.crop(start, stop)
    else:
        unit = np.clip((data - low) / (high - low), 0, None) ** rng.uniform(0.75, 1.33)
        noise = ndimage.gaussian_filter(rng.standard_normal(data.shape).astype(np.float32), 0.5)
        data, grid = (low + (high - low) * (unit + 0.05 * noise)).astype(np.float32), scan.grid
    return Volume(np.ascontiguousarray(data), grid), Volume(np.ascontiguousarray(labels), grid)


def _with_gate(context: Context, file: Path) -> Context:
    """Train the context's gate, or take that which an earlier run of this script kept."""
    if not file.exists():
        part = file.with_suffix(f".{zlib.crc32(str(np.random.default_rng().integers(2**60)).encode())}")
        part.write_bytes(pickle.dumps(customize(context).gate))
        part.replace(file)
    return replace(context, gate=pickle.loads(file.read_bytes()))  # noqa: S301  written by this script


def _rows(model: str, result: Segmentation, truth: Volume) -> list[Row]:
    rows = []
    for one in result.structures:
        value, found = one.structure.value, one.quality
        if (truth.data == value).sum() >= FEWEST_VOXELS and found is not None and found.evidence is not None:
            rows.append(_row(model, value, result.labels.data, truth, found.evidence))
    return rows


def _rows_without_model(context: Context, scan: Volume, result: Segmentation, truth: Volume) -> list[Row]:
    """Judge the warped atlas as the result that it is without a model."""
    atlas, query = context.atlas, canonical_scan(scan, "the query")
    labels = np.zeros(query.grid.shape, np.uint16)
    stored = result.atlas_labels.canonical().data
    for n, value in enumerate(atlas.values, start=1):
        labels[stored == value] = n
    case = Case(
        query=query,
        atlas=atlas.image,
        atlas_labels=atlas.numbered,
        registration=result.registration,
        warped={atlas.values.index(value) + 1: maps.atlas for value, maps in result.probabilities.items()},
        answers={},
        labels=labels,
    )
    return [
        _row("none", atlas.values[n - 1], result.atlas_labels.data, truth, evidence)
        for n, evidence in gather(case).items()
        if (truth.data == atlas.values[n - 1]).sum() >= FEWEST_VOXELS
    ]


def _row(kind: str, value: int, labels: NDArray[Any], truth: Volume, evidence: Evidence) -> Row:
    score = dice(labels == value, truth.data == value)
    return {"kind": kind, "value": value, "dice": score, "evidence": asdict(evidence)}


def fit(rows: Sequence[Row], names: Sequence[str]) -> Regression:
    """Fit a ridge regression of the clipped Dice on evidence; its curve leads nowhere, interval and bounds are 0."""
    evidence, scores = _arrays(rows, names)
    wanted, mean, deviation = np.clip(scores, *RANGE), evidence.mean(axis=0), evidence.std(axis=0) + 1e-9
    scaled = np.clip((evidence - mean) / deviation, -estimate.MAX_DEVIATIONS, estimate.MAX_DEVIATIONS)
    weight = np.linalg.solve(scaled.T @ scaled + RIDGE * np.eye(len(names)), scaled.T @ (wanted - wanted.mean()))
    columns = zip(mean.tolist(), deviation.tolist(), weight.tolist(), strict=True)
    terms = {name: Term(*column) for name, column in zip(names, columns, strict=True)}
    return Regression(float(wanted.mean()), (), 0.0, 0.0, 0.0, 0.0, terms)


def left_out(rows: Sequence[Row], names: Sequence[str], group: Callable[[Row], str]) -> NDArray[np.float64]:
    """Compute the scores of the rows of each group by a fit on all others."""
    groups = [group(row) for row in rows]
    scores = np.zeros(len(rows))
    for one in sorted(set(groups)):
        outside = [row for row, its in zip(rows, groups, strict=True) if its != one]
        inside = [n for n, its in enumerate(groups) if its == one]
        regression = fit(outside, names)
        scores[inside] = [regression.score(Evidence(**rows[n]["evidence"])) for n in inside]
    return scores


def curve(scores: NDArray[np.float64], dices: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Lead scores to mean Dice coefficients, both rising (:data:`BINS`)."""
    order = np.argsort(scores, kind="stable")
    parts = [order[int(a * len(order)) : int(b * len(order))] for a, b in pairwise(BINS)]
    at = [float(scores[part].mean()) for part in parts]
    rising = np.maximum.accumulate([dices[part].mean() for part in parts]) + 1e-4 * np.arange(len(parts))
    knots = [(at[0] - BEYOND, rising[0] - BEYOND), *zip(at, rising, strict=True), (at[-1] + BEYOND, 1.0)]
    return tuple((round(float(x), 5), round(float(np.clip(y, 0, 1)), 5)) for x, y in knots)


def bounds(estimates: NDArray[np.float64], is_bad: NDArray[np.bool_]) -> tuple[float, float]:
    """Find the estimates from which on a result is good, and below which it failed (:data:`MISSED`, :data:`FAILED`)."""
    steps = np.unique(estimates)
    good = next(float(at) for at in steps if (estimates[is_bad] >= at).mean() <= MISSED)
    failed = [
        float(at) for at in steps if at <= good and (below := estimates < at).any() and is_bad[below].mean() >= FAILED
    ]
    return round(good, 4), round(failed[-1] if failed else good, 4)


def report(kind: str, rows: Sequence[Row], names: Sequence[str]) -> Regression:
    """Fit one kind of result, and print what the fit is worth on results left out of it."""
    scores = _arrays(rows, names)[1]
    is_bad, regression = scores < BAD, fit(rows, names)
    print(f"\n{kind}: {len(rows)} structures, {int(is_bad.sum())} with a Dice below {BAD}")
    groups: dict[str, Callable[[Row], str]] = {
        "query": lambda row: row["set"] + row["query"],
        "atlas": lambda row: row["set"] + row["atlas"],
        "set": lambda row: row["set"],
    }
    regression = replace(regression, curve=curve(left_out(rows, names, groups["query"]), scores))
    for left, group in groups.items():
        if len({group(row) for row in rows}) == 1:
            continue
        estimates = np.interp(left_out(rows, names, group), *zip(*regression.curve, strict=True))
        off = scores - estimates
        print(
            f"  left out by {left}: AUROC {auroc(estimates, is_bad):.3f}, correlation "
            f"{np.corrcoef(estimates, scores)[0, 1]:.3f}, mean error {np.abs(off).mean():.3f}"
        )
        if left == "query":
            low, high = np.percentile(off, (10, 90))
            good, failed = bounds(estimates, is_bad)
            regression = replace(regression, below=float(-low), above=float(high), good_from=good, failed_below=failed)
            print(f"  look at {triage(estimates, is_bad):.0%} of the structures to find {FOUND:.0%} of these")
        for name, is_varied in sorted({(row["set"], row["varied"]) for row in rows}):
            here = np.array([row["set"] == name and row["varied"] == is_varied for row in rows])
            bad, is_good = is_bad[here], estimates[here] >= good
            what = f"{name}{' varied' if is_varied else ''}: {len(bad)} structures, mean Dice {scores[here].mean():.3f}"
            lost = int((scores[here] < LOST).sum())
            missed = f"{lost} below {LOST}, {int(bad.sum())} below {BAD}, {int((bad & is_good).sum())} of them good"
            print(f"    {what}, AUROC {auroc(estimates[here], bad):.3f}, {missed}, {1 - is_good.mean():.0%} not good")
        for verdict, first, last in (("good", good, 2.0), ("review", failed, good), ("failed", -1.0, failed)):
            here = (estimates >= first) & (estimates < last)
            print(f"    {verdict} ({first:.4f}..): {int(here.sum())} structures, {int(is_bad[here].sum())} below {BAD}")
    return regression


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
    parser.add_argument("--model", default="builtin", help="what to measure: builtin, or builtin,litemedsam")
    parser.add_argument("--workers", type=int, default=2, help="pairs measured side by side, one thread each")
    parser.add_argument("--fit", default="", help="fit those alone whose names begin so, as thin or builtin")
    parser.add_argument("--write", action="store_true", help="write the calibration into the package")
    parser.add_argument("--only-measured", action="store_true", help="take the pairs that OUT has, measure no more")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    fitted = dict.fromkeys(kind for kind, _ in REGRESSIONS.values() if kind != "none")
    all_jobs = [job for model in fitted for job in jobs(arguments.data, arguments.out, model)]
    wanted = [job for job in all_jobs if job.model == arguments.model and not arguments.only_measured]
    missing = [job for job in wanted if not job.file.exists()]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        for done in pool.map(Job.measure, missing):
            print(done, flush=True)
    rows = [row for job in all_jobs if job.file.exists() for row in job.rows()]
    regressions = dict(estimate.regressions())
    for name, (kind, without) in REGRESSIONS.items():
        is_thin = name.startswith(THIN)
        mine = [row for row in rows if row["kind"] == kind and (row["evidence"]["thinness"] >= THIN_FROM) is is_thin]
        if mine and name.startswith(arguments.fit):
            regressions[name] = report(name, mine, [n for n in Evidence.__dataclass_fields__ if n not in without])
    if arguments.write:
        file = Path(estimate.__file__).with_name(CALIBRATION)
        plain = {kind: asdict(one) for kind, one in regressions.items()}
        file.write_text(json.dumps({"source": "benchmarks/quality.py", "regressions": plain}, indent=1) + "\n")
        print(f"\nwritten: {file}")


if __name__ == "__main__":
    main()
