"""Does ``suggest`` find good atlases? Its ranking against the Dice that each scan reached as the atlas of others.

python benchmarks/suggest_validation.py DATASET RESULTS

DATASET is a folder in nnU-Net raw layout; RESULTS is the ``results.csv`` that ``atlassegfm benchmark`` wrote for it, by
the protocol all-pairs. The figures in docs/how-to/choose-an-atlas.md are from it.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from atlassegfm.check.suggest import scans_in, suggest


def atlas_dice(path: Path, method: str) -> dict[str, float]:
    """Mean Dice of each atlas over its queries, less how easy these queries are; plus the mean of all."""
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == method and row["dice"] not in ("", "nan"):
                pairs[row["atlas"], row["query"]].append(float(row["dice"]))
    dice = {pair: float(np.mean(values)) for pair, values in pairs.items()}
    atlases, queries = ({pair[n] for pair in dice} for n in (0, 1))
    complete = len(dice) == len(atlases) * (len(queries) - 1)
    ease = {q: np.mean([v for (_, query), v in dice.items() if query == q]) for q in queries}
    mean = float(np.mean(list(dice.values())))
    # Where all pairs are there, the plain mean; else what is left when the queries' own difficulty is taken out.
    return {
        a: float(np.mean([v if complete else v - ease[q] + mean for (atlas, q), v in dice.items() if atlas == a]))
        for a in atlases
    }


def main() -> None:
    """Rank the scans, and print the ranking beside the truth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--method", default="atlas")
    arguments = parser.parse_args()
    true = atlas_dice(arguments.results, arguments.method)
    found = suggest(scans_in(arguments.dataset / "imagesTr"))
    ranked = [(one.name.removesuffix("_0000"), one.score) for one in found.candidates]
    ranked = [(name, score) for name, score in ranked if name in true]
    dice = np.array([true[name] for name, _ in ranked])
    rho = stats.spearmanr([score for _, score in ranked], dice)
    print(f"{arguments.dataset.name}: {len(ranked)} atlases, {found.pairs} pairs in {found.seconds:.0f} s")
    for (name, score), value in zip(ranked, dice, strict=True):
        print(f"  {name}  score {score:.3f}  Dice {value:.3f}")
    rank = 1 + int((dice > dice[0]).sum())
    print(
        f"  suggested: Dice {dice[0]:.3f}, rank {rank} of {len(dice)}; "
        f"mean of all {dice.mean():.3f}, best {dice.max():.3f}; "
        f"best third of the ranking {dice[: max(1, len(dice) // 3)].mean():.3f}; "
        f"Spearman {rho.statistic:.2f} (p {rho.pvalue:.2f})"
    )


if __name__ == "__main__":
    main()
