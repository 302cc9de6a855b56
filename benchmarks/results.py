"""Measure everything that docs/results.md shows, and write the page (make results).

Benchmarks run side by side, one for each core and with one thread each; each keeps its pairs in results/NAME and
goes on where it stopped. The page is made of their summaries alone.

    python benchmarks/results.py                 # all, then the page
    python benchmarks/results.py --only abdmr    # those whose names begin so, then the page of all there are
    python benchmarks/results.py --page          # the page alone
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
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


ALL_PAIRS = ("--protocol", "all-pairs")
FOUR_ORGANS = ("--labels", "liver,right_kidney,left_kidney,spleen")
#: The longest first, so that all cores have work to the end. Where all 30 pairs of six cases take too long for what
#: they tell, every fifth is taken: one query for each atlas.
JOBS = (
    Job("abdct", "Dataset002_AbdCT", after=(*ALL_PAIRS, *FOUR_ORGANS)),
    Job("abdmr", "Dataset001_AbdMR", after=ALL_PAIRS),
    Job("hippocampus", "Dataset004_Hippocampus", after=(*ALL_PAIRS, "--every", "10")),
    Job("cardiac", "Dataset005_Cardiac", after=ALL_PAIRS),
    Job("abdmr-ablation", "Dataset001_AbdMR", before=("ablation",), after=(*ALL_PAIRS, "--every", "5")),
    Job("abdct-prompts", "Dataset002_AbdCT", before=("prompts",), after=(*ALL_PAIRS, *FOUR_ORGANS, "--every", "5")),
    Job("oasis", "Dataset003_OASIS", after=(*ALL_PAIRS, "--every", "10")),
    Job("abdct-engines", "Dataset002_AbdCT", before=("engines",), after=(*ALL_PAIRS, *FOUR_ORGANS, "--every", "5")),
)


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
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="benchmarks side by side")
    arguments = parser.parse_args()
    data = f"{os.environ.get('ATLASSEGFM_DATA', '../shared')}/data"
    RESULTS.mkdir(exist_ok=True)
    codes = {}
    if not arguments.page:
        chosen = [job for job in JOBS if job.name.startswith(arguments.only)]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            codes = dict(zip(chosen, pool.map(lambda job: run(job, data), chosen), strict=True))
    for job, code in codes.items():
        if code:
            print(f"{job.name}: exit code {code}, see results/{job.name}.log", file=sys.stderr)
    return max(codes.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
