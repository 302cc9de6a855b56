"""Measure everything that docs/results.md shows, and write the page (make results).

Benchmarks run side by side, one for each core and with one thread each; each keeps its pairs in results/NAME and
goes on where it stopped. The page is made of their summaries alone.

    python benchmarks/results.py                 # all, then the page
    python benchmarks/results.py --only abdmr    # those whose names begin so, then the page of all there are
    python benchmarks/results.py --page          # the page alone
    python benchmarks/results.py --sample abdmr=2,abdct=3  # samples of these
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGE, IMAGES = ROOT / "docs" / "results.md", ROOT / "docs" / "images"
#: Sums round differently with another number of threads, and pairs side by side use the cores better than threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """One benchmark: its folder in results/, the dataset, and the words of the command."""

    name: str
    dataset: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def command(self, data: str) -> list[str]:
        """As a user types it, after the program's name."""
        return ["benchmark", *self.before, f"{data}/{self.dataset}", *self.after, "-o", f"results/{self.name}"]

    @property
    def title(self) -> str:
        """Of the set, and which share of its pairs is taken."""
        every = dict(zip(self.after, self.after[1:], strict=False)).get("--every")
        return TITLES[self.name.partition("-")[0]] + ("" if every is None else f", one pair of {every}")


ALL_PAIRS = ("--protocol", "all-pairs")
FOUR_ORGANS = ("--labels", "liver,right_kidney,left_kidney,spleen")
#: Every third case, as sets are drawn for each.
EIGHT = ",".join(f"hippocampus_{number}" for number in ("001", "049", "098", "150", "190", "234", "287", "326"))
BOTH = "builtin+litemedsam"
BOTH_MODELS = ("--models", BOTH)
#: The longest first, so that all cores have work to the end. Where all 30 pairs of six cases take too long for what
#: they tell, one of five is taken: each case once as atlas and once as query.
JOBS = (
    Job("abdct", "Dataset002_AbdCT", after=(*ALL_PAIRS, *FOUR_ORGANS)),
    Job("abdmr", "Dataset001_AbdMR", after=ALL_PAIRS),
    Job("hippocampus", "Dataset004_Hippocampus", after=(*ALL_PAIRS, "--every", "10")),
    Job("cardiac", "Dataset005_Cardiac", after=ALL_PAIRS),
    Job("abdmr-ablation", "Dataset001_AbdMR", before=("ablation",), after=(*ALL_PAIRS, "--every", "5")),
    Job("abdct-prompts", "Dataset002_AbdCT", before=("prompts",), after=(*ALL_PAIRS, *FOUR_ORGANS, "--every", "5")),
    Job("oasis", "Dataset003_OASIS", after=(*ALL_PAIRS, "--every", "10")),
    Job("abdmr-models", "Dataset001_AbdMR", after=(*ALL_PAIRS, *BOTH_MODELS)),
    Job("abdct-models", "Dataset002_AbdCT", after=(*ALL_PAIRS, *FOUR_ORGANS, *BOTH_MODELS)),
    Job("cardiac-models", "Dataset005_Cardiac", after=(*ALL_PAIRS, *BOTH_MODELS)),
    Job("hippocampus-models", "Dataset004_Hippocampus", after=(*ALL_PAIRS, *BOTH_MODELS, "--every", "50")),
    *(
        Job(f"{name}-atlases", dataset, before=("atlases",), after=(*labels, "--counts", "1,3,5"))
        for name, dataset, labels in (
            ("abdct", "Dataset002_AbdCT", FOUR_ORGANS),
            ("abdmr", "Dataset001_AbdMR", ()),
            ("cardiac", "Dataset005_Cardiac", ()),
            ("hippocampus", "Dataset004_Hippocampus", ("--cases", EIGHT)),
        )
    ),
    Job("abdct-engines", "Dataset002_AbdCT", before=("engines",), after=(*ALL_PAIRS, *FOUR_ORGANS, "--every", "5")),
)
#: Alone on the machine and with all its threads, as a user's scan would be.
TIME = ("benchmark", "time", "--json")

#: [paper] arXiv 2512.18176, mean Dice in percent: warped atlas, prompted model, fused, nnU-Net trained on all labels.
PAPER = {"abdmr": (70.21, 69.1, 81.22, 91.56), "abdct": (58.58, None, 72.91, 90.64)}
#: [paper] Table 4, Abd-MR, warped atlas: stages of the registration, by our variants and methods.
PAPER_STAGES = {("deformable", "atlas"): 43.77, ("rigid, deformable", "atlas"): 60.29, ("all stages", "atlas"): 70.21}
#: [paper] Table 6, Abd-CT, fused: model, then click, box, mask.
PAPER_PROMPTS = (("nnInteractive", 65.68, 72.73, 72.91), ("MedSAM2", 71.64, 66.65, 69.49))
#: [paper] Table 7, Abd-CT: engine, warped atlas, fused.
PAPER_ENGINES = (
    ("ANTs SyN, affine", 41.65, 52.87),
    ("ANTs SyN, rigid and affine", 41.13, 51.82),
    ("ANTs SyN alone", 17.28, 24.74),
    ("VoxelMorph on the pair", 58.58, 72.91),
)
TITLES = {
    "abdmr": "Abd-MR",
    "abdct": "Abd-CT, four organs",
    "cardiac": "Cardiac",
    "hippocampus": "Hippocampus",
    "oasis": "OASIS",
}
METHODS = {
    "atlas": "atlas only",
    "model": "model",
    "paper": "fused, paper's gate",
    "fused": "fused",
    "oracle": "oracle",
}


def run(job: Job, data: str) -> int:
    """Run one benchmark as a process of its own; its exit code."""
    command = job.command(data)
    print("atlassegfm", *command, flush=True)
    log = RESULTS / f"{job.name}.log"
    with log.open("w") as file:
        return subprocess.run(
            [sys.executable, "-m", "atlassegfm", *command],
            cwd=ROOT,
            env=os.environ | ONE_THREAD,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description="Measure everything that docs/results.md shows, and write it.")
    parser.add_argument("--only", default="", help="benchmarks whose names begin so")
    parser.add_argument("--sample", default="", metavar="NAME=N,...", help="of these sets one pair of N")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="benchmarks side by side")
    arguments = parser.parse_args()
    data = f"{os.environ.get('ATLASSEGFM_DATA', '../shared')}/data"
    RESULTS.mkdir(exist_ok=True)
    sample = dict(item.split("=") for item in arguments.sample.split(",") if item)
    jobs = [
        replace(job, after=(*job.after, "--every", sample[job.name])) if job.name in sample else job for job in JOBS
    ]
    codes = {}
    if not arguments.page:
        chosen = [job for job in jobs if job.name.startswith(arguments.only)]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            codes = dict(zip(chosen, pool.map(lambda job: run(job, data), chosen), strict=True))
        if not arguments.only or "time".startswith(arguments.only):
            print("atlassegfm", *TIME, flush=True)
            done = subprocess.run([sys.executable, "-m", "atlassegfm", *TIME, "--quiet"], check=False, stdout=-1)
            if done.returncode == 0:
                (RESULTS / "time.json").write_bytes(done.stdout)
    for job, code in codes.items():
        if code:
            print(f"{job.name}: exit code {code}, see results/{job.name}.log", file=sys.stderr)
    found = {job.name: Found.read(job) for job in jobs if (RESULTS / job.name / "summary.json").exists()}
    missing = [job.name for job in JOBS if job.name not in found]
    if missing:
        print(f"not measured, and left out of the page: {', '.join(missing)}", file=sys.stderr)
    if not found:
        print("nothing has been measured; the page stays as it is", file=sys.stderr)
        return max(codes.values(), default=1)
    PAGE.write_text("\n".join(page(found)) + "\n", encoding="utf-8")
    for name in PAPER:
        if (RESULTS / name / "dice.png").exists():
            shutil.copyfile(RESULTS / name / "dice.png", IMAGES / f"results-{name}.png")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return max(codes.values(), default=0)


@dataclass(frozen=True)
class Found:
    """What one benchmark measured."""

    job: Job
    summary: Mapping[str, Any]
    costs: Sequence[Mapping[str, str]]

    @classmethod
    def read(cls, job: Job) -> Found:
        """From its folder."""
        folder = RESULTS / job.name
        with (folder / "times.csv").open(encoding="utf-8") as file:
            costs = list(csv.DictReader(file))
        return cls(job, json.loads((folder / "summary.json").read_text(encoding="utf-8")), costs)

    def column(self, variant: str, method: str) -> Mapping[str, Any] | None:
        """One column of the summary."""
        for column in self.summary["columns"]:
            if (column["variant"], column["method"]) == (variant, method):
                return column
        return None

    def dice(self, variant: str, method: str) -> float | None:
        """Its mean Dice."""
        column = self.column(variant, method)
        return None if column is None else column["mean"]["dice"]

    def structures_on(self, pairs: Sequence[Sequence[str]]) -> dict[str, float]:
        """Mean Dice of the fused result over some of the pairs, by structure."""
        wanted, scores = {tuple(pair) for pair in pairs}, dict[str, list[float]]()
        with (RESULTS / self.job.name / "results.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["method"] == "fused" and row["dice"] and (row["atlas"], row["query"]) in wanted:
                    scores.setdefault(row["structure"], []).append(float(row["dice"]))
        return {name: mean(dices) for name, dices in scores.items()}

    def command(self) -> str:
        """That gives it again."""
        return f"OMP_NUM_THREADS=1 atlassegfm {shlex.join(self.job.command('../shared/data'))}"

    def seconds(self, variant: str) -> tuple[float, float, int]:
        """Median and largest seconds of a pair, and the largest memory in MB."""
        rows = [row for row in self.costs if row["variant"] == variant and not row["failure"]]
        seconds = [float(row["seconds"]) for row in rows]
        return median(seconds), max(seconds), max(int(row["peak_memory_mb"] or 0) for row in rows)


def page(found: Mapping[str, Found]) -> Iterator[str]:
    """docs/results.md, line by line."""
    newest = max(int(one.summary["format"]) for one in found.values())
    older = [name for name, one in found.items() if int(one.summary["format"]) < newest]
    version = next(iter(found.values())).summary["version"]
    yield "# Results"
    yield ""
    yield (
        "Written by `make results`; nothing here is typed by hand. AtlasSegFM "
        f"{version} (format {newest} of results), the same default settings and the built-in model on "
        f"every set, {os.cpu_count()} CPU cores ({platform.machine()}), no GPU. Benchmarks ran side by side, one "
        "thread each: the seconds are those of one thread on a busy machine."
    )
    if older:
        yield (
            f"An older version of the program measured {', '.join(older)}: their tables, columns of one atlas and one "
            "model too, differ a little from what today's would give."
        )
    yield ""
    yield (
        "All figures are on the query's own grid, by the definitions in [Scores](explanation/scores.md). The query's "
        "labels are seen by the scoring alone. *Atlas only* is the warped atlas, *model* the built-in model prompted "
        "with it, "
        "*fused* the result by the default gate, with the paper's gate beside it, *oracle* what a gate would give that "
        "always picks the better of the two. ± is the "
        "standard deviation over atlases; an interval is a paired bootstrap over queries and atlases."
    )
    yield ""
    yield from _against_the_paper(found)
    yield from _sets(found)
    if "abdmr-ablation" in found:
        yield from _ablation(found["abdmr-ablation"])
    if "abdct-prompts" in found:
        yield from _prompts(found["abdct-prompts"])
    if "abdct-engines" in found:
        yield from _engines(found["abdct-engines"])
    yield from _models(found)
    yield from _atlases(found)
    yield from _verdicts(found)
    if (RESULTS / "time.json").exists():
        yield from _time(json.loads((RESULTS / "time.json").read_text()))
    yield "## Tried and left out"
    yield ""
    yield (
        "With their figures: for the registration [there](development/experiments.md#registration), for model and gate "
        "[there](development/experiments.md#gate)."
    )


def _models(found: Mapping[str, Found]) -> Iterator[str]:
    measured = {name: found[f"{name}-models"] for name in TITLES if f"{name}-models" in found}
    if not measured:
        return
    yield "## Several models"
    yield ""
    yield (
        "LiteMedSAM (extra `litemedsam`) prompted with what the built-in model found, and both mixed with weights for "
        "each structure. MedSAM was trained on many public scans, which may include these: its figures are no evidence "
        "on unseen data."
    )
    yield ""
    for one in measured.values():
        yield f"    {one.command()}"
    yield ""
    heads = ("set", "atlas only", *BOTH.split("+"), "both", "both, fused", "oracle")
    heads += ("builtin alone, fused", "least gain of a structure", "seconds")
    yield f"| {' | '.join(heads)} |"
    yield "|---" + "|---:" * (len(heads) - 1) + "|"
    for name, one in measured.items():
        methods = ("atlas", "builtin", "litemedsam", "model", "fused", "oracle")
        scores = [one.dice(BOTH, method) for method in methods]
        cells = [*map(_cell, scores)]
        if name in found:
            alone = found[name].structures_on(one.summary["pairs"])
            gains = {name: dice - alone[name] for name, dice in one.structures_on(one.summary["pairs"]).items()}
            least = min(gains, key=lambda name: gains[name])
            cells += [f"{mean(alone.values()):.4f}", f"{gains[least]:+.4f} ({least})"]
        else:
            cells += ["–", "–"]
        yield f"| {one.job.title} | {' | '.join(cells)} | {one.seconds(BOTH)[0]:.0f} |"
    yield ""


def _verdicts(found: Mapping[str, Found]) -> Iterator[str]:
    measured = {
        name: verdicts
        for name, one in found.items()
        for column in one.summary["columns"]
        if name.partition("-")[2] in ("", "models") and (verdicts := column["verdicts"])
    }
    if not measured:
        return
    yield "## Verdicts"
    yield ""
    yield (
        "Of the same pairs: what the fused results say of themselves without labels, beside the true Dice. A structure "
        "is bad below 0.7, lost below 0.3; *look at* is the fraction of structures to look at, the worst estimates "
        "first, to find 95 % of the bad ones. The calibration was fitted on pairs of the first six cases of four of "
        "these sets: [left out by query, atlas and set](explanation/quality.md) it is worth what that page says."
    )
    yield ""
    heads = (
        "set",
        "structures",
        "lost",
        "bad",
        "of them good",
        "not good",
        "AUROC",
        "look at",
        "error of the estimate",
    )
    yield f"| {' | '.join(heads)} |"
    yield "|---" + "|---:" * (len(heads) - 1) + "|"
    for name, one in measured.items():
        counts = [one["structures"], sum(each["lost"] for each in one["verdicts"].values()), one["bad"]]
        looked_at = "–" if one["looked_at"] is None else f"{one['looked_at']:.0%}"
        shares = [_decimal(one["auroc"]), looked_at, _decimal(one["error"])]
        cells = [*map(str, [*counts, one["bad_but_good"]]), f"{one['not_good']:.0%}", *shares]
        both = ", both models" if name.endswith("-models") else ""
        yield f"| {found[name].job.title}{both} | {' | '.join(cells)} |"
    yield ""


def _atlases(found: Mapping[str, Found]) -> Iterator[str]:
    measured = {name: found[f"{name}-atlases"] for name in TITLES if f"{name}-atlases" in found}
    if not measured:
        return
    yield "## Several atlases"
    yield ""
    yield (
        "Mean Dice, fused, of so many atlases drawn at random for each query: the same ones and more in the next "
        "column. Sets of one atlas are few; beside them stands the mean of all pairs."
    )
    yield ""
    for one in measured.values():
        yield f"    {one.command()}"
    yield ""
    columns = next(iter(measured.values())).summary["columns"]
    numbers = [column["variant"] for column in columns if column["method"] == "fused"]
    heads = ["one atlas, all pairs", *numbers, *(f"{number}, s" for number in numbers)]
    yield f"| set | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * len(heads)
    for name, one in measured.items():
        alone = found[name].dice("default", "fused") if name in found else None
        scores = [alone, *(one.dice(number, "fused") for number in numbers)]
        cells = ["–" if score is None else f"{score:.4f}" for score in scores]
        cells += [f"{one.seconds(number)[0]:.0f}" for number in numbers]
        yield f"| {one.job.title} | {' | '.join(cells)} |"
    yield ""


def _against_the_paper(found: Mapping[str, Found]) -> Iterator[str]:
    yield "## Beside the paper"
    yield ""
    yield (
        "Mean Dice in percent. The paper (arXiv 2512.18176) has nnInteractive as its model, more cases and five folds; "
        "nnU-Net was trained on all labels. Ours has no weights at all, and six cases of each set."
    )
    yield ""
    heads = [
        "set",
        "atlas only: paper",
        "ours",
        "model: paper",
        "ours",
        "fused: paper",
        "ours, paper's gate",
        "ours",
        "oracle: ours",
    ]
    yield f"| {' | '.join(heads)} | nnU-Net: paper |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, (atlas, model, fused, supervised) in PAPER.items():
        if name in found:
            title = found[name].job.title
            ours = [_percent(found[name].dice("default", method)) for method in METHODS]
            paper = "–" if model is None else f"{model:.1f}"
            yield (
                f"| {title} | {atlas:.2f} | {ours[0]} | {paper} | {ours[1]} | {fused:.2f} | {ours[2]} | **{ours[3]}** "
                f"| {ours[4]} | {supervised:.2f} |"
            )
    yield ""


def _sets(found: Mapping[str, Found]) -> Iterator[str]:
    yield "## Each set"
    yield ""
    yield "| set | pairs | structures | method | Dice | worst pair | NSD at 2 mm | HD95 mm | s a pair (slowest) | MB |"
    yield "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"
    for name in TITLES:
        if name not in found:
            continue
        one = found[name]
        seconds, slowest, memory = one.seconds("default")
        for n, method in enumerate(METHODS):
            column = one.column("default", method)
            if column is None:
                continue
            head = (
                f"| {one.job.title} | {len(one.summary['pairs'])} | {len(one.summary['structures'])} "
                if n == 0
                else "| | | "
            )
            cost = f"| {seconds:.1f} ({slowest:.1f}) | {memory} |" if n == 0 else "| | |"
            atlases = column["over_atlases"]["dice"]
            yield (
                f"{head}| {METHODS[method]} | {column['mean']['dice']:.4f} ± {_decimal(atlases['sd'])} "
                f"| {_decimal(column['over_pairs']['dice']['low'])} | {column['mean']['nsd']:.3f} "
                f"| {column['mean']['hd95_mm']:.1f} {cost}"
            )
    yield ""
    for name in TITLES:
        if name in found:
            yield from _details(found[name])


def _details(one: Found) -> Iterator[str]:
    yield f"### {one.job.title}"
    yield ""
    yield f"```sh\n{one.command()}\n```"
    yield ""
    failures = one.summary["failures"]
    yield f"{len(failures)} pairs failed." if failures else "No pair failed."
    for first, second in (("fused", "atlas"), ("fused", "model"), ("fused", "paper")):
        for comparison in one.summary["comparisons"]:
            wanted = ("dice", ["default", first], ["default", second])
            if (comparison["score"], comparison["first"], comparison["second"]) == wanted:
                ends = [comparison[end] for end in ("low", "high")]
                few = "too few pairs for an interval" if None in ends else f"{ends[0]:+.4f} to {ends[1]:+.4f}"
                yield f"Dice of {METHODS[first]} less {METHODS[second]}: {comparison['difference']:+.4f} ({few})."
    yield ""
    yield _losses(one)
    yield ""
    columns = [one.column("default", method) for method in METHODS]
    kept = [column for column in columns if column is not None]
    if len(kept[0]["structures"]) <= 20:
        names = [METHODS[column["method"]] for column in kept]
        yield (
            "| structure | ml | "
            + " | ".join(f"{name}: Dice" for name in names)
            + " | fused: NSD | fused: HD95 mm | missed |"
        )
        yield "|---|---:|" + "---:|" * (len(names) + 3)
        for n, structure in enumerate(kept[0]["structures"]):
            fused = kept[names.index("fused")]["structures"][n]
            dice = " | ".join(_decimal(column["structures"][n]["dice"]["mean"]) for column in kept)
            surfaces = f"{_decimal(fused['nsd']['mean'])} | {_decimal(fused['hd95_mm']['mean'], 1)}"
            yield (
                f"| {structure['structure']} | {_decimal(structure['reference_ml'], 1)} | {dice} "
                f"| {surfaces} | {fused['counts']['missed']} |"
            )
        yield ""
    if one.job.name in PAPER:
        yield f"![Dice of each structure](images/results-{one.job.name}.png)"
        yield ""


def _losses(one: Found) -> str:
    """Where fusing hurts: structures whose mean Dice over all pairs is below that of the warped atlas."""
    atlas, fused = one.column("default", "atlas"), one.column("default", "fused")
    if atlas is None or fused is None:
        return ""
    gains = {}
    for before, after in zip(atlas["structures"], fused["structures"], strict=True):
        if before["dice"]["mean"] is not None and after["dice"]["mean"] is not None:
            gains[before["structure"]] = after["dice"]["mean"] - before["dice"]["mean"]
    lost = [name for name, gain in gains.items() if gain < 0]
    if not lost:
        return f"No structure of {len(gains)} is worse fused than by the warped atlas, in the mean over pairs."
    worst = min(gains, key=lambda name: gains[name])
    far = sum(gain < -0.005 for gain in gains.values())
    return (
        f"In the mean over pairs {len(lost)} of {len(gains)} structures are worse fused than by the warped atlas, "
        f"{far} of them by more than 0.005, {worst} the most ({gains[worst]:+.4f})."
    )


def _ablation(one: Found) -> Iterator[str]:
    yield "## Stages of the registration, and what follows it (the paper's Table 4)"
    yield ""
    yield f"```sh\n{one.command()}\n```"
    yield ""
    yield (
        "Abd-MR, one pair of five (each case once as atlas and once as query); the paper's figures are of all cases. "
        "*User click* is the model alone: a simulated user, who sees the structure, clicks once into its middle."
    )
    yield ""
    yield "| variant | method | Dice | the paper | worst pair | s a pair |"
    yield "|---|---|---:|---:|---:|---:|"
    for column in one.summary["columns"]:
        key = (column["variant"], column["method"])
        paper = PAPER_STAGES.get(key)
        yield (
            f"| {column['variant']} | {METHODS[column['method']]} | {column['mean']['dice']:.4f} "
            f"| {'' if paper is None else f'{paper / 100:.4f}'} | {_decimal(column['over_pairs']['dice']['low'])} "
            f"| {one.seconds(column['variant'])[0]:.1f} |"
        )
    yield ""


def _prompts(one: Found) -> Iterator[str]:
    yield "## Prompts (the paper's Table 6)"
    yield ""
    yield f"```sh\n{one.command()}\n```"
    yield ""
    yield "Abd-CT, four organs, mean Dice; ours on one pair of five, each case once as atlas and once as query."
    yield ""
    yield "| model | method | click | box | mask |"
    yield "|---|---|---:|---:|---:|"
    for method in ("model", "fused"):
        cells = [_cell(one.dice(f"builtin {kind}", method)) for kind in ("click", "box", "mask")]
        yield f"| builtin | {METHODS[method]} | {' | '.join(cells)} |"
    for model, *dice in PAPER_PROMPTS:
        yield f"| {model}, the paper | fused | {' | '.join(f'{one / 100:.4f}' for one in dice)} |"
    yield ""


def _engines(one: Found) -> Iterator[str]:
    yield "## Registration engines (the paper's Table 7)"
    yield ""
    yield f"```sh\n{one.command()}\n```"
    yield ""
    yield "Abd-CT, four organs, mean Dice; ours on one pair of five, each case once as atlas and once as query."
    yield ""
    yield "| engine | atlas only | fused | s a pair |"
    yield "|---|---:|---:|---:|"
    for name in one.summary["variants"]:
        dice = f"{_cell(one.dice(name, 'atlas'))} | {_cell(one.dice(name, 'fused'))}"
        yield f"| {name} | {dice} | {one.seconds(name)[0]:.1f} |"
    for engine, atlas, fused in PAPER_ENGINES:
        yield f"| {engine}, the paper | {atlas / 100:.4f} | {fused / 100:.4f} | |"
    yield ""


def _time(timing: Mapping[str, Any]) -> Iterator[str]:
    yield "## Time and fitted numbers (the paper's Table 5)"
    yield ""
    yield f"```sh\natlassegfm {shlex.join(TIME[:2])}\n```"
    yield ""
    yield (
        "Made-up scans of 256 x 256 x 240 voxels, alone on the machine, all threads; median of three runs; "
        f"peak memory {timing['peak_memory_mb']} MB."
    )
    yield ""
    yield "| stage | seconds | fitted numbers |"
    yield "|---|---:|---:|"
    for stage in timing["stages"]:
        fitted = "" if stage["parameters"] is None else f"{stage['parameters']:,}"
        yield f"| {stage['name']} | {stage['seconds']:.1f} | {fitted} |"
    yield ""


def _percent(dice: float | None) -> str:
    return "–" if dice is None else f"{100 * dice:.2f}"


def _cell(dice: float | None) -> str:
    return "–" if dice is None else f"{dice:.4f}"


def _decimal(number: float | None, digits: int = 3) -> str:
    return "–" if number is None else f"{number:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
