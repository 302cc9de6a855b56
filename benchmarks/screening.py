"""How many unsuitable scans ``check`` finds against an atlas, and how many right ones it suspects.

python benchmarks/screening.py DATA [--workers N] [--limit N] [--kinds KIND,...] [--rows FILE]

DATA is a folder of datasets in nnU-Net raw layout, as ../shared/data. 100 cases of each kind are made from it: scans of
another part of the body, mirrored ones, ones of another modality, empty ones, and right ones. All but the empty are
cropped by up to 6 % at each face and turned by up to 5 degrees, and their contrast is changed a little, so that no two
are the same. Each goes as a file through ``check_files``. FILE gets a line of JSON for each case. The figures in
docs/how-to/check-scans.md are from it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from atlassegfm.atlas import Atlas
from atlassegfm.check import check_files
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_volume, save_volume
from atlassegfm.core.parallel import changed_environment, thread_variables

COUNT = 100
SETS = {"AbdMR": "abdomen", "AbdCT": "abdomen", "OASIS": "head", "Hippocampus": "head", "Cardiac": "heart"}
#: Words of the warnings that name each kind; an empty scan may be refused, or be like nothing.
NAMED = {
    "right": (),
    "wrong part": ("hardly resembles", "nothing of the atlas would be found"),
    "mirrored": ("to be swapped",),
    "wrong modality": ("modality", "inverted"),
    "empty": ("hardly resembles", "could not be fitted", "next to nothing", "all voxels"),
}
Random = np.random.Generator


@dataclass(frozen=True)
class Case:
    """How one scan is made, and the atlas it is checked against."""

    kind: str
    variant: str  # of the kind
    atlas_set: str
    scan_set: str
    atlas: int  # numbers of the cases in their sets
    scan: int
    seed: int


def cases(limit: int) -> list[Case]:
    """List the cases of all kinds, the variants of each and the pairs of each variant in turn."""
    same = [(name, name) for name in SETS]
    other = [(one, two) for one in SETS for two in SETS if SETS[one] != SETS[two]]
    across = [("AbdCT", "AbdMR"), ("AbdMR", "AbdCT")]
    variants: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {
        "right": [("", same), ("HU", same), ("", same), ("offset", same)],
        "wrong part": [("", other)],
        "mirrored": [("", same)],
        "wrong modality": [("8 bit", across), ("inverted", same), ("HU", across), ("inverted", same)],
        "empty": [(name, same) for name in ("background", "noise", "constant", "air and table", "hot voxels")],
    }
    listed = []
    for kind, ways in variants.items():
        for number in range(limit):
            (variant, pairs), turn = ways[number % len(ways)], number // len(ways)
            one, two = pairs[turn % len(pairs)]
            seed = 1000 * list(variants).index(kind) + number
            first, second = np.random.default_rng(seed).choice(6, 2, replace=False).tolist()
            listed.append(Case(kind, variant, one, two, first, second, seed))
    return listed


@lru_cache(maxsize=8)
def read(folder: Path, number: int) -> tuple[Path, Path]:
    """Find image and labels of a case of a set."""
    case = load_dataset(folder).cases[number]
    return case.image, case.labels


@lru_cache(maxsize=4)
def load_atlas(folder: Path, number: int, hounsfield: bool) -> Atlas:
    """Read a case as an atlas."""
    image, labels = map(load_volume, read(folder, number))
    return Atlas.from_volumes(in_hounsfield(image) if hounsfield else image, labels)


def in_hounsfield(scan: Volume) -> Volume:
    """Give a CT of 8 bit, which was cut at about -160 and 240 HU, values that look like Hounsfield units."""
    air = np.random.default_rng(0).normal(-1000, 10, scan.data.shape)
    values = np.where(scan.data == 0, air, -160 + scan.data / 255 * 400)
    return Volume(np.round(np.maximum(values, -1024)).astype(np.int16), scan.grid)


def varied(scan: Volume, random: Random) -> Volume:
    """Crop and turn a scan a little, and bend its contrast."""
    shape = np.array(scan.grid.shape)
    start, stop = (random.uniform(0, 0.06, 3) * shape).astype(int), (random.uniform(0.94, 1, 3) * shape).astype(int)
    box = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", random.uniform(-5, 5, 3), degrees=True).as_matrix()
    cropped = scan.grid.crop(start, stop)
    data = scan.data[box].astype(np.float32)
    high = float(data.max())
    gain = 1 if scan.data.dtype == np.uint8 else random.uniform(0.7, 1.4)
    curve = gain * high * np.clip(data / high, 0, 1) ** random.uniform(0.9, 1.1)
    return Volume(np.round(curve).astype(scan.data.dtype), Grid(cropped.shape, turn @ cropped.affine))


def mirrored(scan: Volume) -> Volume:
    """Turn the array left to right, and leave the header."""
    straight = scan.canonical()
    return Volume(straight.data[::-1], straight.grid).turned_to(scan.grid)


def emptied(scan: Volume, variant: str, random: Random) -> Volume:
    """Put nothing that can be segmented on the grid of a scan."""
    grid, kind = scan.canonical().grid, scan.data.dtype
    high = float(np.percentile(scan.data, 99))
    data: NDArray[Any] = np.zeros(grid.shape)
    if variant == "constant":
        data += round(random.uniform(1, high))
    elif variant in ("noise", "air and table"):
        data = np.abs(random.normal(0, random.uniform(0.01, 0.1) * high, grid.shape))
    if variant == "air and table":
        (wide, deep), thick = grid.shape[:2], max(1, grid.shape[1] // 60)
        back = round(random.uniform(0.05, 0.2) * deep)
        data[wide // 5 : -wide // 5, back : back + thick] += random.uniform(0.2, 0.6) * high
    elif variant == "hot voxels":
        data.ravel()[random.integers(0, data.size, random.integers(3, 20))] = random.uniform(0.5, 1, 1) * high
    return Volume(np.round(data).astype(kind), grid)


def make(case: Case, scan: Volume) -> Volume:
    """Make the scan of a case."""
    random = np.random.default_rng(case.seed)
    if case.kind == "empty":
        return emptied(scan, case.variant, random)
    scan = varied(scan, random)
    if case.variant in ("HU", "offset") and case.scan_set == "AbdCT":
        scan = in_hounsfield(scan)
        scan = Volume(scan.data + (1024 if case.variant == "offset" else 0), scan.grid)
    if case.kind == "mirrored":
        return mirrored(scan)
    return Volume(scan.data.max() - scan.data, scan.grid) if case.variant == "inverted" else scan


def check(data: Path, case: Case) -> dict[str, Any]:
    """Check the scan of one case, and tell what was found."""
    folder = {name: next(data.glob(f"*{name}")) for name in (case.atlas_set, case.scan_set)}
    hounsfield = case.variant in ("HU", "offset") and case.atlas_set == "AbdCT"
    atlas = load_atlas(folder[case.atlas_set], case.atlas, hounsfield)
    scan = make(case, load_volume(read(folder[case.scan_set], case.scan)[0]))
    with tempfile.TemporaryDirectory() as there:
        path = Path(there) / "scan.nii"
        save_volume(Volume(np.ascontiguousarray(scan.data), scan.grid), path)
        start = time.perf_counter()
        (report,) = check_files([path], None, atlas).files
    alarms = [one.text for one in report.findings if one.severity != "note" and "slices are" not in one.text]
    return {
        **asdict(case),
        "named": any(word in text for word in NAMED[case.kind] for text in alarms),
        "alarms": alarms,
        "undecided": any("told apart" in one.text for one in report.findings),
        "read_as": report.kind,
        "figures": report.atlas and {**asdict(report.atlas), "inside_percent": None},
        "seconds": round(time.perf_counter() - start, 2),
    }


def print_table(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> None:
    """Print how many of each group were found by name, called something else or passed; of those, sides undecided."""
    print("| kind | cases | found | called something else | passed | of these sides undecided |")
    print("|---|---:|---:|---:|---:|---:|")
    for group in dict.fromkeys(map(key, rows)):
        of_group = [row for row in rows if key(row) == group]
        named = sum(row["named"] for row in of_group)
        passed = [row for row in of_group if not row["alarms"]]
        undecided, otherwise = sum(row["undecided"] for row in passed), len(of_group) - named - len(passed)
        print(f"| {group} | {len(of_group)} | {named} | {otherwise} | {len(passed)} | {undecided} |")


def main() -> None:
    """Check all cases, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--limit", type=int, default=COUNT, help="cases of each kind")
    parser.add_argument("--kinds", default="", help="only these kinds, with commas between")
    parser.add_argument("--rows", type=Path, help="file for a line of JSON a case")
    arguments = parser.parse_args()
    chosen = [case for case in cases(arguments.limit) if case.kind in (arguments.kinds or case.kind).split(",")]
    start, rows = time.perf_counter(), []
    with (
        changed_environment(thread_variables(1)),
        ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool,
    ):
        for row in pool.map(partial(check, arguments.data), chosen):
            rows.append(row)
            if arguments.rows:
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print_table(rows, lambda row: row["kind"])
    print()
    print_table(rows, lambda row: f"{row['kind']}, {row['variant'] or row['scan_set']}, atlas {row['atlas_set']}")
    median = np.median([row["seconds"] for row in rows])
    print(f"\n{len(rows)} cases in {time.perf_counter() - start:.0f} s; median of a check {median:.1f} s")


if __name__ == "__main__":
    main()
