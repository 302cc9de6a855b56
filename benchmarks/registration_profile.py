"""Where the seconds of a registration go, and its inner loops by PyTorch and compiled (make profile, make bench).

python benchmarks/registration_profile.py                                  # the embedded pair
python benchmarks/registration_profile.py DATASET --cases ATLAS,QUERY      # a pair of an nnU-Net dataset
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

# As the program does: threads that spin while they wait slow each other down on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from atlassegfm import demo
from atlassegfm.atlas import canonical_scan
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_image, load_labels
from atlassegfm.registration import features, objective, register
from atlassegfm.registration.pyramid import Level

#: Voxels along each side of the cubes on which parts are timed: about the level in the labels' box.
SIDE = 80
ROUNDS = 7


def main() -> None:
    """Profile one registration, then time old against new parts, alternating."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("--cases", help="atlas and query, separated by a comma [default: the first two]")
    arguments = parser.parse_args()
    query, atlas, labels = _pair(arguments.dataset, arguments.cases)
    print(f"{torch.get_num_threads()} thread(s); query {query.grid.describe()}")
    register(query, atlas, moving_labels=labels)  # what PyTorch sets up once is not of interest
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = register(query, atlas, moving_labels=labels)
    print("\nstage         seconds")
    for name, seconds in result.seconds.items():
        print(f"{name:12s} {seconds:8.2f}")
    rows = [row for row in profiler.key_averages() if row.self_cpu_time_total > 0]
    total = sum(row.self_cpu_time_total for row in rows)
    print("\noperator                               fraction  calls")
    for row in sorted(rows, key=lambda row: -row.self_cpu_time_total)[:14]:
        print(f"{row.key:40s} {row.self_cpu_time_total / total:6.1%} {row.count:6d}")
    print("\nPyTorch and compiled, medians, alternating")
    _compare_loops()


def _pair(folder: Path | None, cases: str | None) -> tuple[Volume, Volume, Volume]:
    """Query, atlas and its labels, in canonical order."""
    if folder is None:
        files = [demo.PAIR / name for name in (demo.QUERY, demo.ATLAS, demo.LABELS)]
    else:
        dataset = load_dataset(folder)
        names = cases.split(",") if cases else [case.name for case in dataset.cases[:2]]
        atlas, query = dataset.select(names).cases
        files = [query.image, atlas.image, atlas.labels]
    scans = canonical_scan(load_image(files[0]), "query"), canonical_scan(load_image(files[1]), "atlas")
    return (*scans, load_labels(files[2]).canonical())


def _timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _ratio(name: str, old: Callable[[], object], new: Callable[[], object]) -> float:
    """Print medians of both, alternating; seconds of the new one."""
    new()  # compiled
    pairs = [(_timed(old), _timed(new)) for _ in range(ROUNDS)]
    before, after = (float(np.median([pair[side] for pair in pairs])) for side in (0, 1))
    print(f"{name:58s} {1000 * before:7.1f} ms -> {1000 * after:7.1f} ms, {before / after:.1f} times as fast")
    return after


def _compare_loops() -> None:
    """Inner loops by PyTorch against the compiled ones, and how near these come to the bandwidth of a plain copy."""
    shape = (SIDE, SIDE, SIDE)
    level = [Level(Grid(shape, np.eye(4)), *(torch.rand(1, 1, *shape) for _ in range(3)), None) for _ in range(2)]
    scans = objective.Scans(*level)
    weight = torch.full((1, 1, *shape), 1 / SIDE**3)
    base = torch.zeros(1, 3, *shape)
    addition = (torch.rand(1, 3, *scans.control_shape) - 0.5).requires_grad_(True)
    image = torch.rand(1, 1, *shape)

    def term(weights: objective.Weights) -> tuple[Callable[[], object], Callable[[], object]]:
        function = objective.Objective(scans, base, weight, weights)
        return lambda: function.by_torch(addition, 0).backward(), lambda: function(addition, 0).backward()

    copied = _bandwidth()
    print(f"plain copy {copied:.1f} GB/s")
    voxels, everything = SIDE**3, objective.Weights(2.5, 0.5, 0.25, 4, 10)
    # Bytes that must move at least: each array of a pass read or written once.
    for name, functions, megabytes in (
        ("one step of a level, all terms", term(everything), voxels * 4 * 60 / 1e6),
        ("MIND-SSC term at one voxel in eight", term(objective.Weights(1, 0, 0)), voxels * 4 * 18 / 1e6),
        ("local correlation term", term(objective.Weights(0, 1, 0)), voxels * 4 * 47 / 1e6),
        (
            "MIND-SSC of an image",
            (lambda: features.mind_ssc(image.double()), lambda: features.mind_ssc(image)),
            voxels * 4 * 41 / 1e6,
        ),
    ):
        seconds = _ratio(name, *functions)
        print(f"{'':58s} at least {megabytes:.0f} MB: {megabytes / 1000 / seconds:.1f} GB/s")


def _bandwidth() -> float:
    """GB a second that a plain copy reads and writes."""
    large = torch.rand(8_000_000)
    target = torch.empty_like(large)
    return 2 * large.numel() * 4 / float(np.median([_timed(lambda: target.copy_(large)) for _ in range(ROUNDS)])) / 1e9


if __name__ == "__main__":
    main()
