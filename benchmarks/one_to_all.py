"""One atlas to the other cases of a labelled dataset: Dice, seconds and memory of the command itself.

Every query is a fresh ``atlassegfm segment`` process, as a user would start it, so that its time and memory
include everything. The query's labels are opened by this script alone, after the process has ended.

    python benchmarks/one_to_all.py                       # the sets of the README, from ../shared/data
    python benchmarks/one_to_all.py FOLDER --atlas CASE   # any dataset in nnU-Net raw layout
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atlassegfm.image import load_labels
from atlassegfm.metrics import dice_per_structure


@dataclass(frozen=True)
class Job:
    """One atlas of one dataset, and how many queries at most."""

    folder: str
    atlas: str
    queries: int | None = None


#: What the README's table shows.
README_JOBS = (
    Job("Dataset001_AbdMR", "abdmr_001"),
    Job("Dataset004_Hippocampus", "hippocampus_001"),
    Job("Dataset002_AbdCT", "abdct_003"),
)


def run(dataset: Path, job: Job, extra: list[str]) -> None:
    """Segment every other case of the dataset and print a row for each, and the mean."""
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTr").glob("*.nii.gz"))
    queries = [case for case in cases if case != job.atlas][: job.queries]
    print(f"\n{dataset.name}: atlas {job.atlas}, {len(queries)} queries", flush=True)
    print("| query | atlas only | model | fused | seconds | MB |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    for case in queries:
        rows.append(one_query(dataset, job.atlas, case, extra))
        print(f"| {case} | " + " | ".join(_cells(rows[-1])) + " |", flush=True)
    table = np.array(rows)
    print("| mean | " + " | ".join(_cells(table.mean(axis=0))) + " |")
    print("| worst | " + " | ".join(_cells([*table[:, :3].min(axis=0), *table[:, 3:].max(axis=0)])) + " |", flush=True)


def one_query(dataset: Path, atlas: str, case: str, extra: list[str]) -> list[float]:
    """Mean Dice of atlas only, model and fused, wall seconds and peak MB of one command."""
    image = f"{case}_0000"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "atlassegfm", "segment"]
        command += ["--atlas", str(dataset / "imagesTr" / f"{atlas}_0000.nii.gz")]
        command += ["--labels", str(dataset / "labelsTr" / f"{atlas}.nii.gz")]
        command += [str(dataset / "imagesTr" / f"{image}.nii.gz"), "-o", folder, "--keep", "--quiet", *extra]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = Path(folder) / image
        report = json.loads((result / "run.json").read_text())
        values = [structure["value"] for structure in report["structures"]]
        reference = load_labels(dataset / "labelsTr" / f"{case}.nii.gz")
        means = []
        for name in ("atlas", "model", "segmentation"):
            path = result / f"{name}.nii.gz"
            if not path.exists():
                means.append(float("nan"))
                continue
            # Structures that the reference does not have and the result does not claim have no Dice.
            scores = dice_per_structure(load_labels(path).data, reference.data, values)
            means.append(float(np.nanmean(list(scores.values()))))
    return [*means, float(report["total_seconds"]), float(report["peak_memory_mb"])]


def _cells(row: list[float] | np.ndarray) -> list[str]:
    return [*(f"{dice:.3f}" for dice in row[:3]), f"{row[3]:.1f}", f"{row[4]:.0f}"]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="One atlas to the other cases of a labelled dataset.")
    parser.add_argument("dataset", nargs="?", type=Path, help="folder in nnU-Net raw layout")
    parser.add_argument("--atlas", help="case to take as atlas (the first one if left out)")
    parser.add_argument("--queries", type=int, help="at most so many")
    parser.epilog = "What follows -- goes to atlassegfm segment."
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    if arguments.dataset is not None:
        first = min((arguments.dataset / "labelsTr").glob("*.nii.gz")).name.removesuffix(".nii.gz")
        run(arguments.dataset, Job("", arguments.atlas or first, arguments.queries), extra)
        return
    data = Path(os.environ.get("ATLASSEGFM_DATA", "../shared")) / "data"
    for job in README_JOBS:
        if (data / job.folder).is_dir():
            run(data / job.folder, job, extra)
        else:
            print(f"{data / job.folder}: not there, left out")


if __name__ == "__main__":
    main()
