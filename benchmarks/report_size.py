"""Time and size of the page of a large cohort, with made-up results in place of real ones.

python benchmarks/report_size.py [--cases 1000] [--structures 13]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from atlassegfm.core.parallel import peak_memory_mb
from atlassegfm.report import ReportOptions, write_report


def main() -> None:
    """Make up the results, write the page, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--structures", type=int, default=13)
    parser.add_argument("--keep", type=Path, help="Leave the results in this folder.")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        for number in range(arguments.cases):
            case = folder / f"case_{number:05d}"
            case.mkdir(parents=True)
            (case / "run.json").write_text(json.dumps(_run(arguments.structures, random)))
        start = time.perf_counter()
        written = write_report(folder, options=ReportOptions(cases=False))
        seconds = time.perf_counter() - start
        size = written.path.stat().st_size / 1e6
        print(f"{written.cases} cases, {arguments.structures} structures: {seconds:.1f} s, {size:.2f} MB")
        print(f"peak memory {peak_memory_mb()} MB")


def _run(structures: int, random: np.random.Generator) -> dict[str, object]:
    quality = [
        {"value": n, "verdict": str(random.choice(["good", "good", "good", "review", "failed"])), "score": 0.5}
        for n in range(1, structures + 1)
    ]
    return {
        "inputs": {"query": {"file": "a.nii.gz"}},
        "device": "cpu",
        "model": {"name": "builtin"},
        "registration": {"confidence": round(float(random.uniform(0.6, 0.9)), 4)},
        "structures": [
            {
                "value": n,
                "name": f"structure_{n}",
                "status": "present",
                "volume_ml": round(float(100 * n * np.exp(random.normal(0, 0.2))), 3),
                "round_trip_dice": round(float(random.uniform(0.7, 0.98)), 4),
            }
            for n in range(1, structures + 1)
        ],
        "quality": {"structures": quality},
        "seconds": {"registration": round(float(random.uniform(5, 9)), 2), "model": 2.0},
        "settings": {"model": "builtin"},
        "versions": {"atlassegfm": "0.1.0"},
    }


if __name__ == "__main__":
    main()
