"""Measure time and size of the page of a large cohort of synthetic results.

python benchmarks/report_size.py [--cases 1000] [--structures 13]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from atlassegfm.core.parallel import peak_memory_mb
from atlassegfm.quality.verdict import VERDICTS, Verdict
from atlassegfm.records import (
    InputRecord,
    Inputs,
    ModelRecord,
    QualityRecord,
    RegistrationRecord,
    RunRecord,
    StatusRecord,
    StructureRecord,
)
from atlassegfm.report import ReportOptions, write_report


def main() -> None:
    """Write synthetic results and their page; print time, size and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--structures", type=int, default=13)
    parser.add_argument("--keep", type=Path, help="Leave the results in this folder.")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    status = StatusRecord(state="done", total_seconds=9.0, seconds={"registration": 7.0, "model": 2.0})
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        for number in range(arguments.cases):
            case = folder / f"case_{number:05d}"
            case.mkdir(parents=True)
            _run(arguments.structures, random).write(case / "run.json")
            status.write(case / "status.json")
        start = time.perf_counter()
        written = write_report(folder, options=ReportOptions(cases=False))
        seconds = time.perf_counter() - start
        size = written.path.stat().st_size / 1e6
        print(f"{written.cases} cases, {arguments.structures} structures: {seconds:.1f} s, {size:.2f} MB")
        print(f"peak memory {peak_memory_mb()} MB")


def _run(structures: int, random: np.random.Generator) -> RunRecord:
    verdicts: list[Verdict] = ["good", "good", "good", "review", "failed"]
    judged = [verdicts[n] for n in random.integers(len(verdicts), size=structures)]
    identity = tuple(tuple(float(n) for n in row) for row in np.eye(4))
    return RunRecord(
        inputs=Inputs(query=InputRecord(file="a.nii.gz")),
        device="cpu",
        seed=0,
        model=ModelRecord(name="builtin"),
        registration=RegistrationRecord(
            source="fitted",
            confidence=round(float(random.uniform(0.6, 0.9)), 4),
            members=1,
            folding=0.0,
            jacobian=None,
            linear_query_to_atlas_mm=identity,
        ),
        gate=None,
        verdict=max(judged, key=VERDICTS.index),
        structures=tuple(
            StructureRecord(
                value=n,
                name=f"structure_{n}",
                status="present",
                reason="",
                volume_ml=round(float(100 * n * np.exp(random.normal(0, 0.2))), 3),
                outside_fraction=0.0,
                prompt=None,
                quality=QualityRecord(
                    verdict=verdict, reason="", estimated_dice=0.5, low=None, high=None, evidence=None
                ),
            )
            for n, verdict in enumerate(judged, start=1)
        ),
        settings={"model": "builtin"},
        versions={"atlassegfm": "0.1.0"},
    )


if __name__ == "__main__":
    main()
