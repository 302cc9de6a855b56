"""Play a user who clicks into errors, and report the Dice by the number of clicks, and how long a click takes.

    python benchmarks/clicks.py DATASET OUT [--atlas CASE,...] [--model NAME,...] [--clicks N] [--all] [--each]

DATASET is an nnU-Net raw folder. One case is the atlas (the first by default, or each of several in turn); the others
are segmented into OUT/CASE, as `atlassegfm segment --keep` does it, unless they are there. The user clicks at the
middle of the largest error of all structures that are not judged good: the place deepest in it; outside the structure
to add, inside to take away. The labels of a query are read for that alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from atlassegfm.core.image import load_labels
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.models import load_model
from atlassegfm.serve.clicks import Click
from atlassegfm.serve.session import Session


def main() -> None:
    """Segment, click, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--atlas", help="case of the atlas, or several, each in turn")
    parser.add_argument("--model", default="builtin", help="model of the results; the built-in one answers clicks")
    parser.add_argument("--clicks", type=int, default=6, help="clicks a case at most")
    parser.add_argument("--all", action="store_true", help="click into structures that are judged good too")
    parser.add_argument("--each", action="store_true", help="each time one click into every such structure")
    options = parser.parse_args()
    images = {path.name.removesuffix("_0000.nii.gz"): path for path in sorted((options.dataset / "imagesTr").iterdir())}
    labels, scores, seconds, counts = options.dataset / "labelsTr", [], [], []
    for atlas in options.atlas.split(",") if options.atlas else [next(iter(images))]:
        queries, out = {name: path for name, path in images.items() if name != atlas}, options.out / atlas
        command = [sys.executable, "-m", "atlassegfm", "segment", "--atlas", images[atlas], "--labels"]
        command += [labels / f"{atlas}.nii.gz", *queries.values(), "-o", out, "--keep", "--model", options.model]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        for name, path in queries.items():
            curve, times = play(out / path.name.removesuffix(".nii.gz"), path, labels / f"{name}.nii.gz", options)
            scores.append(curve)
            seconds += times
            counts.append(len(times))
            print(f"{atlas}, {name}: {' '.join(f'{one:.3f}' for one in curve)}  {len(times)} clicks", flush=True)
    print("clicks a case  " + "  ".join(f"{n:5d}" for n in range(options.clicks + 1)))
    print("mean Dice      " + "  ".join(f"{score:.3f}" for score in np.mean(scores, axis=0)))
    print(f"median clicks a case {statistics.median(counts):g}; {len(seconds)} clicks in all", end="")
    print(f", median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s" if seconds else "")
    print(json.dumps({"dice": np.mean(scores, axis=0).round(4).tolist(), "seconds": np.round(seconds, 3).tolist()}))


def play(folder: Path, scan: Path, reference: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Click into one case, a copy of whose result takes the edits; mean Dice after each click, and seconds."""
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if file.is_file():
                (Path(copy) / file.name).write_bytes(file.read_bytes())
        session, model = Session(Path(copy), scan), load_model("builtin", "cpu")
        truth = session._numbers_of(load_labels(reference))
        good = {n for n, one in enumerate(session.run.structures, 1) if one.quality and one.quality.verdict == "good"}
        open_ones = [n for n in range(1, len(session.structures) + 1) if options.all or n not in good]
        curve, seconds = [mean_dice(session, truth)], []
        for _ in range(options.clicks):
            errors = [error for n in open_ones if (error := largest_error(session, truth, n)) is not None]
            if not errors:
                break
            for _, number, click in errors if options.each else [max(errors, key=lambda one: one[0])]:
                start = time.perf_counter()
                session.click(model, number, "", click, overwrite=True)
                seconds.append(time.perf_counter() - start)
            curve.append(mean_dice(session, truth))
    return curve + curve[-1:] * (options.clicks + 1 - len(curve)), seconds


def mean_dice(session: Session, truth: NDArray[Any]) -> float:
    """Mean Dice of the structures that are in either."""
    return float(
        np.nanmean([*dice_per_structure(session.numbers, truth, range(1, len(session.structures) + 1)).values()])
    )


def largest_error(session: Session, truth: NDArray[Any], number: int) -> tuple[int, int, Click] | None:
    """Voxels of the largest connected error of a structure, its number, and a click at the place deepest in it."""
    found = []
    own, wanted = session.numbers == number, truth == number
    for error, positive in ((wanted & ~own, True), (own & ~wanted, False)):
        parts, count = ndimage.label(error)
        if count:
            part = int(np.bincount(parts.ravel())[1:].argmax()) + 1
            box = ndimage.find_objects(parts)[part - 1]
            mask = np.pad(parts[box] == part, 1)
            depth = ndimage.distance_transform_edt(mask, session.grid.spacing_mm)
            place = np.unravel_index(int(depth.argmax()), depth.shape)
            i, j, k = (int(n) - 1 + side.start for n, side in zip(place, box, strict=True))
            found.append((int(mask.sum()), number, Click((i, j, k), positive)))
    return max(found, key=lambda one: one[0], default=None)


if __name__ == "__main__":
    main()
