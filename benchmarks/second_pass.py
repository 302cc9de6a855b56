"""What the second pass of a cohort is worth: 24 scans of one data set, five of them made hard.

    python benchmarks/second_pass.py ../shared/data/Dataset004_Hippocampus OUT     # about five minutes on one core

The first case is the atlas. Where the set has fewer than 24 others, scans repeat, deformed a little. Five are made
hard: all are deformed strongly, and four have another contrast, thick slices, noise or a cropped field of view. Prints
the Dice of each structure that the second pass may change, before and after, the seconds of both passes, and whether
anything that was good changed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_image, load_labels, save_volume
from atlassegfm.core.overlap import dice
from atlassegfm.records import RunRecord, StatusRecord

COUNT, HARD = 24, {3: "deformed", 8: "contrast", 13: "thick", 18: "noise", 22: "cropped"}
#: Root mean square displacement of a made scan, as a fraction of its size: hard ones, and repeated ones.
STRONG, MILD = 0.07, 0.02


def deformed(volume: Volume, fraction: float, random: np.random.Generator, order: int) -> NDArray[np.float32]:
    """Move a volume by a smooth field of this size."""
    shape = volume.data.shape
    field = random.normal(size=(3, *shape))
    field = np.stack([ndimage.gaussian_filter(one, np.array(shape) / 6, mode="reflect") for one in field])
    field *= fraction * np.array(shape).reshape(3, 1, 1, 1) / field.std(axis=(1, 2, 3), keepdims=True)
    points = np.indices(shape) + field
    return ndimage.map_coordinates(volume.data.astype(np.float32), points, order=order, mode="nearest")


def made_hard(data: NDArray[np.float32], labels: NDArray[np.float32], grid: Grid, kind: str) -> tuple[Volume, Volume]:
    """Make a scan hard in one more way."""
    low, high = np.percentile(data, (1, 99))
    scaled, random = np.clip((data - low) / (high - low), 0, None), np.random.default_rng(len(kind))
    if kind == "contrast":
        data = (low + (high - low) * np.sqrt(scaled)).astype(np.float32)
    elif kind == "noise":
        data = (data + random.normal(0, 0.15 * (high - low), data.shape)).astype(np.float32)
    elif kind == "thick":
        affine = grid.affine @ np.diag([1, 1, 4, 1])
        affine[:3, 3] += grid.affine[:3, 2] * 1.5
        whole = data.shape[2] // 4 * 4
        data = data[..., :whole].reshape(*data.shape[:2], -1, 4).mean(axis=3)
        labels = labels[..., 1:whole:4]
        grid = Grid(data.shape, affine)
    elif kind == "cropped":
        inside = ndimage.find_objects((labels > 0).astype(int))[0]
        box = tuple(slice(max(0, one.start - 2), one.stop + 2) for one in inside)
        affine = grid.affine.copy()
        affine[:3, 3] = grid.voxel_to_world(np.array([one.start for one in box], float))
        data, labels = data[box], labels[box]
        grid = Grid(data.shape, affine)
    return Volume(data.astype(np.float32), grid), Volume(labels.astype(np.uint8), grid)


def make_cohort(dataset: Path, out: Path) -> tuple[Path, Path]:
    """Write the scans and their true labels; gives image and labels of the atlas."""
    first, *others = load_dataset(dataset).cases
    for folder in ("scans", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        case, random = others[number % len(others)], np.random.default_rng(number)
        scan, truth = load_image(case.image), load_labels(case.labels)
        kind = HARD.get(number, "")
        fraction = STRONG if kind else MILD if number >= len(others) else 0.0
        if fraction:
            state = random.bit_generator.state
            data = deformed(scan, fraction, random, 1)
            random.bit_generator.state = state
            scan, truth = made_hard(data, deformed(truth, fraction, random, 0), scan.grid, kind)
        name = f"c{number:02d}{kind and '_'}{kind}.nii.gz"
        save_volume(scan, out / "scans" / name)
        save_volume(truth, out / "truth" / name)
    return first.image, first.labels


def main() -> None:
    """Make the cohort, run both passes and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out
    image, labels = make_cohort(arguments.dataset, out)
    command = [sys.executable, "-m", "atlassegfm", "segment", "--atlas", str(image), "--labels", str(labels)]
    command += [str(out / "scans"), "-o", str(out / "results")]
    seconds, before = [], {}
    for switch in ("--no-second-pass", "--second-pass"):
        start = time.perf_counter()
        subprocess.run([*command, switch], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
        before = before or {case: load_labels(out / "results" / case / "segmentation.nii.gz") for case in cases(out)}
    compare(out, before)
    print(f"first pass {seconds[0]:.0f} s, second {seconds[1]:.0f} s: {seconds[1] / seconds[0]:.2f} of the first")


def cases(out: Path) -> list[str]:
    """Names of all cases."""
    return sorted(path.name.removesuffix(".nii.gz") for path in (out / "scans").iterdir())


def compare(out: Path, before: dict[str, Volume]) -> None:
    """Print each structure that is not good or changed, and whether good ones changed."""
    changed_good, all_before, all_after = 0, [], []
    for case in cases(out):
        folder = out / "results" / case
        run, status = RunRecord.read(folder / "run.json"), StatusRecord.read(folder / "status.json")
        truth, after = load_labels(out / "truth" / f"{case}.nii.gz").data, load_labels(folder / "segmentation.nii.gz")
        for one in run.structures:
            masks = [volume.data == one.value for volume in (before[case], after)]
            scores = [dice(mask, truth == one.value) for mask in masks]
            all_before.append(scores[0])
            all_after.append(scores[1])
            verdict = one.mended.verdict if one.mended else one.quality and one.quality.verdict
            if verdict == "good":
                changed_good += bool((masks[0] != masks[1]).any())
            elif status.second_pass is not None or case.endswith(tuple(HARD.values())):
                estimate = one.quality and one.quality.estimated_dice
                old = one.mended.estimated_dice if one.mended else estimate
                text = status.second_pass.reason if status.second_pass else "not tried"
                text = f"from {one.mended.donor}, estimate {estimate}" if one.mended else text
                print(f"{case:14} {one.name:12} {verdict} {old}: {scores[0]:.3f} -> {scores[1]:.3f}  {text}")
    means = f"{np.mean(all_before):.4f} -> {np.mean(all_after):.4f}"
    print(f"mean of all structures {means}; good ones changed: {changed_good}")


if __name__ == "__main__":
    main()
