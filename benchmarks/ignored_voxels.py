"""What the ignored voxels of a training set are worth: how much of doubtful structures would be taught as background.

    D=../shared/data/Dataset002_AbdCT
    atlassegfm segment --atlas $D/imagesTr/abdct_003_0000.nii.gz --labels $D/labelsTr/abdct_003.nii.gz \
        $D/imagesTr/abdct_0{08,13,18}_0000.nii.gz -o OUT --keep
    python benchmarks/ignored_voxels.py $D OUT

Prints, for the margin as built and for others, the mean fraction of the true voxels of structures that are not good
which stay background, and the fraction of the scans that is ignored. The reference labels are used for nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.image import load_labels
from atlassegfm.export import Result, find_results, training
from atlassegfm.export.results import structures_of_all
from atlassegfm.records import StructureRecord


def estimated_dice(one: StructureRecord) -> float:
    """The estimate itself instead of the lower end of its interval."""
    return 0.0 if one.quality is None or one.quality.estimated_dice is None else one.quality.estimated_dice


def without_margin(_volume_mm3: float, _dice: float) -> float:
    """No margin at all."""
    return 0.0


#: By name: how wide the margin is, which Dice it is for, and whether warped atlas and model are used.
Variant = tuple[Callable[[float, float], float], Callable[[StructureRecord], float], bool]
VARIANTS: dict[str, Variant] = {
    "as built": (training.uncertainty_mm, training.lowest_dice, True),
    "without --keep": (training.uncertainty_mm, training.lowest_dice, False),
    "margin by the estimate": (training.uncertainty_mm, estimated_dice, True),
    "without a margin": (without_margin, training.lowest_dice, True),
}


def left_background(results: Sequence[Result], references: Path, variant: Variant) -> tuple[list[float], list[float]]:
    """Fractions of the true voxels of each doubtful structure that stay background, and of each scan, ignored."""
    numbers = {one.value: n for n, one in enumerate(structures_of_all(results), start=1)}
    margin, dice, keep = variant
    background, ignored = [], []
    for result in results:
        scan, labels = result.read()
        truth = load_labels(references / f"{result.name.removesuffix('_0000')}.nii.gz").turned_to(scan.grid).data
        values = {one.name: one.value for one in result.structures}
        with mock.patch.multiple(training, uncertainty_mm=margin, lowest_dice=dice):
            opinions = result.read_opinions(scan) if keep else []
            case = training.training_labels(result.run, labels, opinions, numbers)
        ignored.append(case.ignored / case.data.size)
        for one in case.structures:
            true = truth == values[one.structure]
            if one.use == "ignore" and true.any():
                background.append(float((case.data[true] == 0).mean()))
    return background, ignored


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    folder = load_dataset(given.dataset).folder
    results = find_results(given.out, [folder / "imagesTr"]).results
    print(f"{'margin':24} structures  left background  above 10 %  ignored")
    for name, variant in VARIANTS.items():
        background, ignored = left_background(results, folder / "labelsTr", variant)
        several = sum(one > 0.1 for one in background)
        print(f"{name:24} {len(background):10} {np.mean(background):16.3f} {several:11} {np.mean(ignored):8.3f}")


if __name__ == "__main__":
    main()
