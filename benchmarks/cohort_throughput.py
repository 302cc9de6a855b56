"""A cohort beside as many single commands, in one run: wall time, memory, and whether the results are the same.

python benchmarks/cohort_throughput.py DATASET [--queries 12] [--workers 2] [--set KEY=VALUE ...]

The first case of the set is the atlas; the others are the queries, again under other names where there are fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atlassegfm.core.dataset import load_dataset


def main() -> None:
    """Run one after the other, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare(arguments, Path(name))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Time single commands, a cohort in one process, and one with workers."""
    cases = load_dataset(arguments.dataset).cases
    atlas, *others = cases
    scans = folder / "scans"
    scans.mkdir()
    for number in range(arguments.queries):
        source = others[number % len(others)].image
        shutil.copyfile(source, scans / f"query{number:02d}.nii.gz")
    command = [sys.executable, "-m", "atlassegfm", "segment", "--quiet"]
    command += ["--atlas", str(atlas.image), "--labels", str(atlas.labels)]
    command += [part for override in arguments.overrides for part in ("--set", override)]
    each = [[*command, str(scan), "-o"] for scan in sorted(scans.iterdir())]
    print(f"{arguments.queries} queries of {arguments.dataset.name}; {os.cpu_count()} cores")
    single = timed("single commands, all cores each", [[*one, str(folder / "single")] for one in each])
    workers = ["--workers", arguments.workers]
    many = timed(f"cohort, {arguments.workers} workers", [[*command, str(scans), "-o", str(folder / "many"), *workers]])
    timed("cohort, 1 worker", [[*command, str(scans), "-o", str(folder / "here")]])
    timed("a single command, --threads 1", [[*each[0], str(folder / "one"), "--threads", "1"]])
    print(f"cohort with {arguments.workers} workers: {single / many:.2f} times as fast as single commands")
    found = files(folder / "many")
    print(f"same bytes with 1 worker: {files(folder / 'here') == found}")
    print(f"same bytes by a single command: {files(folder / 'one').items() <= found.items()}")
    rows = json.loads((folder / "many" / "cohort.json").read_text())["cases"]
    print(f"peak memory of a worker: {max(row['peak_memory_mb'] for row in rows)} MB")


def timed(name: str, commands: list[list[str]]) -> float:
    """Run commands one after the other; gives the seconds they took together."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    print(f"{name:35s} {seconds:8.1f} s, {cpu:8.1f} s of cores (load before {load:.1f})", flush=True)
    return seconds


def files(out: Path) -> dict[str, bytes]:
    """Segmentations and accounts of them."""
    return {
        f"{file.parent.name}/{file.name}": file.read_bytes()
        for pattern in ("*/segmentation.nii.gz", "*/run.json")
        for file in out.glob(pattern)
    }


if __name__ == "__main__":
    main()
