"""Where the seconds of a registration go, and what two changes to its inner loop brought (make profile).

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
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from atlassegfm import demo
from atlassegfm.atlas import canonical_scan
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.image import Volume, load_image, load_labels
from atlassegfm.registration import features, objective, register, sampling

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
    print("\nratio of medians, alternating")
    _compare_correlation()
    _compare_sampling()
    _memory_bound()


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


def _ratio(name: str, old: Callable[[], object], new: Callable[[], object]) -> None:
    pairs = [(_timed(old), _timed(new)) for _ in range(ROUNDS)]
    before, after = (float(np.median([pair[side] for pair in pairs])) for side in (0, 1))
    print(f"{name:58s} {1000 * before:7.1f} ms -> {1000 * after:7.1f} ms, {before / after:.2f} times as fast")


def _compare_correlation() -> None:
    """The derivative of the local correlation: PyTorch's own against the one written out."""
    fixed, moving, weight = (torch.rand(1, 1, SIDE, SIDE, SIDE) for _ in range(3))
    correlation = features.LocalCorrelation(fixed, objective.CORRELATION_RADIUS)
    moving.requires_grad_(True)

    def own() -> None:
        (weight * (1 - correlation(moving))).sum().backward()

    def written_out() -> None:
        correlation.dissimilarity(moving, weight).backward()

    _ratio("local correlation, derivative written out", own, written_out)


def _compare_sampling() -> None:
    """Reading 12 MIND-SSC channels at every voxel against reading them at one in eight."""
    channels = torch.rand(1, features.MIND_CHANNELS, SIDE, SIDE, SIDE)
    identity = torch.eye(3, 4)[None]
    where = F.affine_grid(identity, [1, 1, SIDE, SIDE, SIDE], align_corners=True).requires_grad_(True)

    def all_voxels() -> None:
        sampling.sample_at(channels, where).pow(2).sum().backward()

    def one_in_eight() -> None:
        sampling.sample_at(channels, where[:, ::2, ::2, ::2]).pow(2).sum().backward()

    _ratio("MIND-SSC at one voxel in eight", all_voxels, one_in_eight)


def _memory_bound() -> None:
    """How much memory a second the sampling moves, beside a plain copy."""
    channels = torch.rand(1, features.MIND_CHANNELS, SIDE, SIDE, SIDE)
    where = F.affine_grid(torch.eye(3, 4)[None], [1, 1, SIDE, SIDE, SIDE], align_corners=True)
    large = torch.rand(8_000_000)
    target = torch.empty_like(large)
    copied = float(np.median([_timed(lambda: target.copy_(large)) for _ in range(ROUNDS)]))
    sampled = float(np.median([_timed(lambda: sampling.sample_at(channels, where)) for _ in range(ROUNDS)]))
    touched = 8 * channels.numel() * 4 / sampled / 1e9
    print(f"\nplain copy {2 * large.numel() * 4 / copied / 1e9:.1f} GB/s; sampling touches {touched:.1f} GB/s")


if __name__ == "__main__":
    main()
