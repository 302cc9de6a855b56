"""Measure what several atlases give: Dice of single atlases, and of their vote, on the same queries.

    python benchmarks/atlases.py ../shared/data/Dataset004_Hippocampus --labels 1,2 --count 3 --draws 4 --workers 2

For each query, ``draws`` sets of ``count`` atlases are drawn from the other cases; each atlas of a set segments the
query alone, then all together. Printed are the mean Dice of the single results, of the best one of each set, and of all
together, and their seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from atlassegfm.atlas import Atlas
from atlassegfm.benchmark.pairs import restricted
from atlassegfm.context import Context, customize
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.image import load_image, load_labels
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.core.parallel import limited_threads
from atlassegfm.segment import segment
from atlassegfm.settings import Settings


@dataclass(frozen=True)
class Job:
    """One query and one set of atlases."""

    data: Path
    values: tuple[int, ...]
    query: str
    atlases: tuple[str, ...]

    def measure(self) -> tuple[list[float], float, list[float], float]:
        """Mean Dice of each atlas alone and of all together, then the seconds of each alone and of all."""
        with limited_threads(1):
            contexts = [_context(self.data, self.values, name) for name in self.atlases]
            together = contexts[0]
            for name, one in zip(self.atlases[1:], contexts[1:], strict=True):
                together = together.with_atlas(one.atlas, name)
            single = [self._score(one) for one in contexts]
            dice, seconds = self._score(together)
        print(self.query, self.atlases, [round(one, 4) for one, _ in single], round(dice, 4), flush=True)
        return [one for one, _ in single], dice, [one for _, one in single], seconds

    def _score(self, context: Context) -> tuple[float, float]:
        case = load_dataset(self.data).case(self.query)
        result = segment(context, load_image(case.image))
        scores = dice_per_structure(result.labels.data, load_labels(case.labels).data, self.values)
        return float(np.nanmean(list(scores.values()))), sum(result.seconds.values())


@cache
def _context(data: Path, values: tuple[int, ...], name: str) -> Context:
    case = load_dataset(data).case(name)
    return customize(Context(restricted(Atlas.from_files(case.image, case.labels), values, case.labels), Settings()))


def jobs(data: Path, values: tuple[int, ...], cases: Sequence[str], count: int, draws: int) -> Iterator[Job]:
    """Draw sets of atlases for each query, with a fixed seed."""
    random = np.random.default_rng(0)
    for query in cases:
        others = [name for name in cases if name != query]
        for _ in range(draws):
            yield Job(data, values, query, tuple(map(str, random.choice(others, count, replace=False))))


def main() -> None:
    """Measure, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a dataset in nnU-Net raw layout")
    parser.add_argument("--labels", required=True, help="label values, with commas")
    parser.add_argument("--cases", type=int, default=6, help="cases that take part, the first by name")
    parser.add_argument("--count", type=int, default=3, help="atlases of a set")
    parser.add_argument("--draws", type=int, default=2, help="sets for each query")
    parser.add_argument("--workers", type=int, default=2, help="sets measured side by side, one thread each")
    arguments = parser.parse_args()
    values = tuple(int(value) for value in arguments.labels.split(","))
    cases = sorted(case.name for case in load_dataset(arguments.data).cases)[: arguments.cases]
    all_jobs = list(jobs(arguments.data, values, cases, arguments.count, arguments.draws))
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        found = list(pool.map(Job.measure, all_jobs))
    single, together, seconds, all_seconds = zip(*found, strict=True)
    print(f"{len(found)} sets of {arguments.count} atlases, {arguments.data.name}, mean Dice")
    print(f"  single  {np.mean(single):.4f}  in {np.mean(seconds):.1f} s")
    print(f"  best    {np.mean(np.max(single, axis=1)):.4f}  of each set, known by the labels alone")
    print(f"  vote    {np.mean(together):.4f}  in {np.mean(all_seconds):.1f} s")
    below = np.max(single, axis=1) - np.array(together)
    print(f"  vote below the best single: worst {below.max():.4f}")


if __name__ == "__main__":
    main()
