"""What the second pass of a cohort is worth: 24 scans, five of them hard; or scans as they are, each case the atlas.

    python benchmarks/second_pass.py ../shared/data/Dataset002_AbdCT OUT        # about 20 minutes on one core
    python benchmarks/second_pass.py ../shared/data/Dataset002_AbdCT OUT --every-atlas

Scans of a few patients repeat, each time deformed a little by another smooth field. The hard ones are of two patients
in whom structures are lost with this atlas, and who are not among the others. With --every-atlas each case of the
dataset is the atlas of a cohort of all others, unchanged. Prints the Dice of each structure that
the second pass may change, before and after, the seconds of both passes, and whether anything that was good changed.
Results of an earlier call in OUT are kept.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from atlassegfm.core.dataset import Case, Dataset, load_dataset
from atlassegfm.core.image import Volume, load_image, load_labels, save_volume
from atlassegfm.core.overlap import dice
from atlassegfm.records import RunRecord, StatusRecord

COUNT, HARD_COUNT = 24, 5
#: Root mean square displacement of a repeated scan, as a fraction of its size.
DISPLACEMENT = 0.015


def moved_points(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Voxel coordinates, (3, I, J, K), moved by a smooth random field."""
    coarse = np.random.default_rng(seed).normal(size=(3, 6, 6, 6))
    smooth = np.stack([ndimage.zoom(one, 4, order=3) for one in coarse])
    smooth *= DISPLACEMENT * np.array(shape).reshape(3, 1, 1, 1) / smooth.std(axis=(1, 2, 3), keepdims=True)
    sides = np.array(shape) / smooth.shape[1:]
    field = np.stack([ndimage.zoom(one.astype(np.float32), sides, order=1) for one in smooth])
    return field + np.indices(shape, np.float32)


def make_cohort(dataset: Dataset, atlas: str, hard: list[str], out: Path) -> None:
    """Write the scans and their true labels; the hard ones have "hard" in their names."""
    easy = [case.name for case in dataset.cases if case.name not in (atlas, *hard)]
    for folder in ("scans", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        source = (hard if number < HARD_COUNT else easy)[number % len(hard if number < HARD_COUNT else easy)]
        name = f"c{number:02d}_{'hard_' if number < HARD_COUNT else ''}{source}.nii.gz"
        if (out / "truth" / name).exists():
            continue
        case = dataset.case(source)
        scan, labels = load_image(case.image), load_labels(case.labels)
        points = moved_points(scan.data.shape, number)
        for folder, volume, order in (("scans", scan, 1), ("truth", labels, 0)):
            data = ndimage.map_coordinates(volume.data, points, order=order, mode="nearest")
            save_volume(Volume(data.round().astype(np.int16), volume.grid), out / folder / name)


def main() -> None:
    """Make the cohorts, run both passes and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--atlas", default="abdct_003")
    parser.add_argument("--hard", default="abdct_008,abdct_013")
    parser.add_argument("--structures", default="spleen,right_kidney,left_kidney,liver")
    parser.add_argument("--every-atlas", action="store_true", help="cohorts of the scans as they are")
    arguments = parser.parse_args()
    out, dataset = arguments.out, load_dataset(arguments.dataset)
    cohorts = []
    for atlas in dataset.cases if arguments.every_atlas else (dataset.case(arguments.atlas),):
        cohort = out / atlas.name if arguments.every_atlas else out
        if arguments.every_atlas:
            queries = [case for case in dataset.cases if case.name != atlas.name]
            truth = {case.image.name.removesuffix(".nii.gz"): case.labels for case in queries}
            scans = [str(case.image) for case in queries]
        else:
            make_cohort(dataset, atlas.name, arguments.hard.split(","), out)
            truth = {file.name.removesuffix(".nii.gz"): file for file in (out / "truth").iterdir()}
            scans = [str(out / "scans")]
        run_passes(atlas, arguments.structures, scans, cohort)
        cohorts.append((cohort, truth))
    compare(cohorts)


def run_passes(atlas: Case, structures: str, scans: Sequence[str], out: Path) -> None:
    """Segment the scans in one pass, and in two."""
    first, both = out / "first", out / "both"
    command = [sys.executable, "-m", "atlassegfm", "segment", "--atlas", str(atlas.image), "--labels"]
    command += [str(atlas.labels), "--structures", structures, *scans, "-o"]
    subprocess.run([*command, str(first), "--no-second-pass"], check=True, stdout=subprocess.DEVNULL)
    if not both.exists():
        shutil.copytree(first, both)
    subprocess.run([*command, str(both)], check=True)


def compare(cohorts: Sequence[tuple[Path, Mapping[str, Path]]]) -> None:
    """Print each structure of cases that were tried; and whether good ones changed."""
    changed_good, scores, seconds = 0, defaultdict[str, list[tuple[float, float]]](list), [0.0, 0.0]
    runs = [(out, path.parent, truth) for out, truth in cohorts for path in sorted(out.glob("both/*/run.json"))]
    for out, folder, truths in runs:
        run, status = RunRecord.read(folder / "run.json"), StatusRecord.read(folder / "status.json")
        truth, *found = (
            load_labels(file).data
            for file in (
                truths[folder.name],
                out / "first" / folder.name / "segmentation.nii.gz",
                folder / "segmentation.nii.gz",
            )
        )
        tried = status.second_pass
        seconds[0] += status.total_seconds
        seconds[1] += 0.0 if tried is None else tried.seconds
        for one in run.structures:
            before, after = (dice(labels == one.value, truth == one.value) for labels in found)
            scores["hard" if "hard" in folder.name else "other"].append((before, after))
            estimate = one.quality and one.quality.estimated_dice
            old = (one.recovered.verdict, one.recovered.estimated_dice) if one.recovered else (None, estimate)
            is_good = one.recovered is None and one.quality is not None and one.quality.verdict == "good"
            changed_good += is_good and not np.array_equal(*(labels == one.value for labels in found))
            if tried is not None and not is_good:
                text = (
                    f"{old[0]} {old[1]} -> {estimate} from {tried.donor}"
                    if one.recovered
                    else f"{old[1]} {tried.reason}"
                )
                print(f"{out.name} {folder.name:20} {one.name:12} {before:.3f} -> {after:.3f}  {text}")
    for kind, pairs in scores.items():
        means = np.mean(pairs, axis=0)
        low = (np.array(pairs) < 0.7).sum(axis=0)
        print(f"{kind}: mean {means[0]:.3f} -> {means[1]:.3f}; below 0.7: {low[0]} -> {low[1]} of {len(pairs)}")
    print(
        f"good ones changed: {changed_good}; {seconds[0]:.0f} s and {seconds[1]:.0f} s: {seconds[1] / seconds[0]:.2f}"
    )


if __name__ == "__main__":
    main()
