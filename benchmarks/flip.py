"""How well ``check --context`` tells scans that lie right from mirrored, from inverted and from foreign ones.

python benchmarks/flip.py DATA [--datasets PART,...] [--most N]

DATA is a folder of datasets in nnU-Net raw layout. Each case is the atlas of each other one, as it is and mirrored
left-right at the same grid, as a wrong header would have it. Both are fitted for every scan, and a mirrored scan has
the two costs the other way round, so that one pair gives both. Then scans of each set are fitted to an atlas of each
other set: of these, hippocampus and head, and abdomens in CT and MR, show the same part of the body. The figures in
docs/how-to/check-scans.md are from it.
"""

from __future__ import annotations

import argparse
import time
from itertools import permutations
from pathlib import Path

import numpy as np

from atlassegfm.atlas import Atlas
from atlassegfm.check.against_atlas import LEAST_CORRELATION, MIRRORED_GAIN
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.image import Volume
from atlassegfm.quality.mirror import fit_to_atlas, is_inverted


def main() -> None:
    """Fit all pairs of each dataset, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--datasets", default="", help="parts of the datasets' names, with commas between")
    parser.add_argument("--most", type=int, default=6, help="cases of each dataset")
    arguments = parser.parse_args()
    print(
        "| set | pairs | false suspicion | mirrored found | largest gain of a right scan | inverted found | false | "
        "correlation, least and median | not similar | least resemblance | s a scan |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    of_set: dict[str, list[Atlas]] = {}
    for folder in sorted(path.parent for path in arguments.data.glob("*/dataset.json")):
        if not any(part in folder.name for part in arguments.datasets.split(",")):
            continue
        cases = load_dataset(folder).cases[: arguments.most]
        atlases = [Atlas.from_files(case.image, case.labels) for case in cases]
        scans = [atlas.image for atlas in atlases]
        of_set[folder.name] = atlases[:3]
        gains, correlations, seconds, similar, resemblances = [], [], [], [], []
        for atlas in atlases:
            for scan in scans:
                if scan is not atlas.image:
                    start = time.perf_counter()
                    found = fit_to_atlas(scan, atlas)
                    seconds.append(time.perf_counter() - start)
                    gains.append(found.mirrored_gain)
                    correlations.append(found.correlation)
                    similar.append(found.resembles)
                    resemblances.append(found.resemblance)
        gain = np.array(gains)
        inverted = [is_inverted(Volume(scan.data.max() - scan.data, scan.grid)) for scan in scans]
        print(
            f"| {folder.name} | {len(gain)} | {np.count_nonzero(gain > MIRRORED_GAIN)} "
            f"| {np.count_nonzero(-gain > MIRRORED_GAIN)} | {gain.max():.3f} "
            f"| {sum(inverted)} of {len(scans)} | {sum(is_inverted(scan) for scan in scans)} "
            f"| {np.nanmin(correlations):.2f}, {np.nanmedian(correlations):.2f} "
            f"({np.count_nonzero(np.array(correlations) < LEAST_CORRELATION)} below the bound) "
            f"| {similar.count(False)} | {min(resemblances):.2f} | {np.median(seconds):.1f} |",
            flush=True,
        )
    print("\n| atlas | scan | resemblance | similar |\n|---|---|---:|---|")
    for one, other in permutations(of_set, 2):
        for atlas, scan in ((of_set[one][0], of_set[other][0]), (of_set[one][1], of_set[other][2])):
            found = fit_to_atlas(scan.image, atlas)
            print(f"| {one} | {other} | {found.resemblance:.2f} | {'yes' if found.resembles else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
