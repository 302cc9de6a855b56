"""Seconds and memory of the scores of one large scan, beside google-deepmind/surface-distance.

Two label maps of 13 made-up organs, 512 x 512 x 300 voxels, the result a shifted and wobbled reference. Both
libraries score them in one run, in turns; ours goes first, so that the peak of the memory is its own.

    pip install surface-distance
    python benchmarks/metrics_speed.py --rounds 3
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.parallel import peak_memory_mb
from atlassegfm.evaluate.metrics import StructureScores, score_labels

SHAPE = (512, 512, 300)
SPACING_MM = (0.8, 0.8, 2.5)
TOLERANCE_MM = 2.13
#: Middle, mm, and half axes, mm, of each organ, about as large as in an adult; the last is the whole chest's size.
ORGANS = (
    ((205, 205, 300), (165, 110, 330)),  # most of the trunk; those below are in it
    ((120, 190, 420), (75, 65, 80)),  # liver
    ((290, 230, 430), (30, 35, 55)),  # spleen
    ((140, 250, 330), (28, 26, 55)),  # right kidney
    ((270, 250, 340), (28, 26, 55)),  # left kidney
    ((215, 170, 390), (60, 18, 14)),  # pancreas
    ((260, 170, 440), (45, 35, 60)),  # stomach
    ((150, 160, 370), (18, 14, 30)),  # gallbladder
    ((190, 270, 360), (4, 10, 12)),  # right adrenal gland
    ((225, 270, 360), (4, 10, 12)),  # left adrenal gland
    ((205, 160, 120), (40, 35, 40)),  # bladder
    ((200, 235, 330), (11, 11, 300)),  # aorta
    ((230, 235, 330), (3, 3, 250)),  # a vessel
)


def make_labels(*, wobble_mm: float, shift_mm: float) -> NDArray[np.uint8]:
    """(I, J, K) label map in the memory order that NIfTI files are read in."""
    labels = np.zeros(SHAPE, np.uint8, order="F")
    x, y, z = (np.arange(count) * step for count, step in zip(SHAPE, SPACING_MM, strict=True))
    for value, (middle, half_axes) in enumerate(ORGANS, start=1):
        # Slice by slice: whole arrays of coordinates would be the peak of the memory that is measured.
        for k in np.flatnonzero(abs(z - middle[2]) <= half_axes[2]):
            bent = wobble_mm * np.sin(z[k] / 9 + y / 13 + value) + shift_mm
            across = ((x[:, None] + bent - middle[0]) / half_axes[0]) ** 2 + ((y - middle[1]) / half_axes[1]) ** 2
            labels[:, :, k][across + ((z[k] - middle[2]) / half_axes[2]) ** 2 <= 1] = value
    return labels


def score_theirs(
    result: NDArray[np.uint8], reference: NDArray[np.uint8], values: list[int]
) -> dict[int, tuple[float, float, float]]:
    """Dice, normalized surface Dice and robust Hausdorff distance of each value."""
    import surface_distance

    scores = {}
    for value in values:
        one, other = reference == value, result == value
        distances = surface_distance.compute_surface_distances(one, other, SPACING_MM)
        scores[value] = (
            float(surface_distance.compute_dice_coefficient(one, other)),
            float(surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)),
            float(surface_distance.compute_robust_hausdorff(distances, 95)),
        )
    return scores


def main() -> None:
    """Print a row a round and fail where the scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--centreline", action="store_true", help="also time ours with clDice of the two vessels")
    parser.add_argument("--save", type=Path, help="only write both label maps into this folder, for `evaluate`")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # surface-distance calls scipy by old names

    reference = make_labels(wobble_mm=0, shift_mm=0)
    result = make_labels(wobble_mm=1.5, shift_mm=1)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        grid = Grid(SHAPE, np.diag([*SPACING_MM, 1.0]))
        for name, labels in (("reference", reference), ("result", result)):
            save_volume(Volume(labels, grid), options.save / f"{name}.nii.gz")
        return
    values = list(range(1, len(ORGANS) + 1))
    tolerances = dict.fromkeys(values, TOLERANCE_MM)

    def score_ours(centreline: tuple[int, ...] = ()) -> dict[int, StructureScores]:
        return score_labels(result, reference, values, SPACING_MM, tolerances, centreline=centreline)

    before = peak_memory_mb()
    if options.centreline:
        start = time.perf_counter()
        scores = score_ours((12, 13))
        print(f"with clDice of two vessels: {time.perf_counter() - start:.1f} s, peak {peak_memory_mb()} MB")
        print(*(f"  {value}: {scores[value].cldice} ({scores[value].cldice_note})" for value in (12, 13)), sep="\n")
    for number in range(options.rounds):
        start = time.perf_counter()
        ours = score_ours()
        our_seconds = time.perf_counter() - start
        if number == 0:
            print(f"peak of ours: {peak_memory_mb()} MB ({before} MB before, of making the label maps)")
        start = time.perf_counter()
        theirs = score_theirs(result, reference, values)
        their_seconds = time.perf_counter() - start
        worst = max(
            abs(mine - other)
            for value in values
            for mine, other in zip((ours[value].dice, ours[value].nsd, ours[value].hd95_mm), theirs[value], strict=True)
        )
        print(
            f"ours {our_seconds:.1f} s, surface-distance {their_seconds:.1f} s, "
            f"{their_seconds / our_seconds:.1f} times; largest difference {worst:.1e}",
            flush=True,
        )
        if worst > 1e-6:
            raise SystemExit("the scores differ")


if __name__ == "__main__":
    main()
