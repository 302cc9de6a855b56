"""Which scan to contour: of scans without labels, the one whose contours would reach all others best.

Every scan is registered to others by the linear stage on its coarse level alone, and two scans count as near where they
then look alike. A good atlas is near to all others. In large folders each scan is compared with a few of them only,
drawn at random, and the best are then compared with all: the work grows with the number of scans, not with its square.

What nobody knows before contouring is left out: whether a scan shows the wanted structures whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..atlas import canonical_scan
from ..core.errors import AtlasSegError, InputError
from ..core.image import IMAGE_SUFFIXES, image_stem, image_suffix, load_image
from ..registration.affine import fit
from ..registration.pyramid import Scan, axes_of, frame_grid, level_spacings_mm, on_grid, prepare
from ..settings import RegistrationSettings
from ..transforms.maps import Affine, Transform

#: Up to so many scans all pairs are registered: 66 pairs of a few seconds.
ALL_PAIRS = 12
#: In larger folders each scan is registered to so many others, and the best ones to all.
LANDMARKS, FINALISTS = 8, 3
#: Half width in voxels of the window of the local correlation: 5 voxels of the coarse level, about 45 mm of an abdomen.
_RADIUS = 2
#: Variance below which a window has no contrast to compare; intensities are 0 to 1.
_FLAT = 1e-5
#: Scores closer than this share say nothing: made-up patients that are equally good atlases differ by 1 %.
_CLEAR = 0.03
#: A correlation over a window counts where at least this share of it is in both fields of view.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Candidate:
    """One scan as an atlas.

    Parameters
    ----------
    name : str
        Of its file, without the ending.
    path : Path
        The file.
    score : float
        Mean similarity to the others it was compared with, in [0, 1]; of those compared with some alone, what it would
        be if these were as easy to reach as all are on the average.
    lowest : float
        The smallest of these similarities.
    furthest : str
        The scan it has that similarity to.
    compared : int
        With how many others.
    """

    name: str
    path: Path
    score: float
    lowest: float
    furthest: str
    compared: int


@dataclass(frozen=True, eq=False)
class Suggestion:
    """The ranking of a folder.

    Parameters
    ----------
    candidates : tuple of Candidate
        The best first.
    names : tuple of str
        Of all scans, in the order of ``similarity``.
    similarity : array, (N, N)
        In [0, 1], symmetric; NaN for pairs that were not registered, and on the diagonal.
    positions : array, (N, 2)
        A map of the scans: near ones look alike. Without unit.
    failures : tuple of (str, str)
        Files that could not be used, and why.
    pairs : int
        How many were registered.
    seconds : float
        Wall time.
    """

    candidates: tuple[Candidate, ...]
    names: tuple[str, ...]
    similarity: NDArray[np.float64]
    positions: NDArray[np.float64]
    failures: tuple[tuple[str, str], ...]
    pairs: int
    seconds: float

    @property
    def differs(self) -> bool:
        """Whether the best candidate is clearly nearer to the others than the middle one."""
        middle = self.candidates[len(self.candidates) // 2].score
        return self.candidates[0].score - middle >= _CLEAR * middle

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "best": self.candidates[0].name,
            "differs": self.differs,
            "candidates": [
                {
                    "rank": rank,
                    "name": one.name,
                    "score": round(one.score, 4),
                    "lowest": round(one.lowest, 4),
                    "furthest": one.furthest,
                    "compared": one.compared,
                }
                for rank, one in enumerate(self.candidates, start=1)
            ],
            "names": list(self.names),
            "similarity": [[None if math.isnan(v) else round(v, 4) for v in row] for row in self.similarity.tolist()],
            "positions": [[round(v, 5) for v in row] for row in self.positions.tolist()],
            "failures": [{"name": name, "reason": reason} for name, reason in self.failures],
            "pairs": self.pairs,
            "seconds": round(self.seconds, 2),
        }


def scans_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name.

    Raises
    ------
    InputError
        If it is no folder, or has fewer than three images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of scans")
    found = sorted(path for path in folder.iterdir() if image_suffix(path) and not path.name.startswith("."))
    if len(found) < 3:
        raise InputError(
            f"{folder}: {len(found)} image files; expected three or more, ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return found


def suggest(
    files: Sequence[Path],
    settings: RegistrationSettings | None = None,
    *,
    landmarks: int = LANDMARKS,
    finalists: int = FINALISTS,
    seed: int = 0,
    device: str = "cpu",
    on_pair: Callable[[int, int], None] | None = None,
) -> Suggestion:
    """Rank scans by how well each would reach all others as an atlas.

    Parameters
    ----------
    files : sequence of Path
        Scans of one kind; no labels.
    settings : RegistrationSettings, optional
        Of the linear stage; defaults if left out.
    landmarks : int
        With how many others each scan is compared where there are more than 12.
    finalists : int
        How many of the best are then compared with all.
    seed : int
        Of the draw of the landmarks.
    device : {"cpu", "cuda"}
        Where to compute.
    on_pair : callable, optional
        Told number and count of each pair as it begins.

    Raises
    ------
    InputError
        If fewer than three of the files can be used.
    """
    settings = settings or RegistrationSettings()
    start = time.perf_counter()
    scans: list[tuple[str, Path, Scan, float]] = []
    failures = []
    for path in files:
        try:
            volume = canonical_scan(load_image(path), str(path))
            spacing = level_spacings_mm(volume.grid, (settings.coarse_voxels,))[0]
            scans.append((image_stem(path), path, prepare(volume, None, spacing, "scan"), spacing))
        except AtlasSegError as error:
            failures.append((path.name, str(error)))
    count = len(scans)
    if count < 3:
        reason = f" ({failures[0][1]})" if failures else ""
        raise InputError(f"{count} of {len(files)} scans can be used, expected three or more{reason}")
    similarity = np.full((count, count), np.nan)
    done = 0
    drawn = np.arange(count)
    if count > ALL_PAIRS:
        drawn = np.sort(np.random.default_rng(seed).permutation(count)[: max(3, min(landmarks, count))])
    first = _pairs(count, drawn)
    # The finalists' pairs are not known yet, but how many they are at most is.
    extra = finalists * (count - 1 - len(drawn)) if len(drawn) < count else 0

    def compare(pairs: Sequence[tuple[int, int]], total: int) -> None:
        nonlocal done
        for one, other in pairs:
            done += 1
            if on_pair is not None:
                on_pair(done, total)
            value = _similarity(scans[one][2], scans[other][2], scans[one][3], settings, device)
            similarity[one, other] = similarity[other, one] = value

    compare(first, len(first) + extra)
    scores = _scores(similarity, drawn)
    final: list[int] = []
    if len(drawn) < count:
        final = [int(n) for n in np.argsort(-scores, kind="stable")[: max(1, min(finalists, count))]]
        missing = [p for p in _pairs(count, np.array(final)) if math.isnan(similarity[p])]
        compare(missing, len(first) + len(missing))
        scores[final] = np.nanmean(similarity[final], axis=1)
    # Those compared with all come first: the estimate of the others is a draw's.
    order = sorted(range(count), key=lambda n: (n not in final if final else False, -scores[n], scans[n][0]))
    candidates = []
    for n in order:
        far = int(np.nanargmin(similarity[n]))
        candidates.append(
            Candidate(
                *(scans[n][0], scans[n][1], float(scores[n]), float(similarity[n, far]), scans[far][0]),
                int(np.isfinite(similarity[n]).sum()),
            )
        )
    return Suggestion(
        tuple(candidates),
        tuple(scan[0] for scan in scans),
        similarity,
        _positions(similarity, drawn),
        tuple(failures),
        done,
        time.perf_counter() - start,
    )


def _pairs(count: int, chosen: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Each of the chosen with every other, each pair once."""
    return sorted({(min(int(a), b), max(int(a), b)) for a in chosen for b in range(count) if int(a) != b})


def _scores(similarity: NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) mean similarity to the drawn scans, as if all of them were equally easy to reach."""
    if len(drawn) == len(similarity):
        return np.asarray(np.nanmean(similarity, axis=1))
    table = similarity[:, drawn]
    ease = np.nanmean(table, axis=0)
    return np.asarray(np.nanmean(table - ease, axis=1) + ease.mean())


def _similarity(fixed: Scan, moving: Scan, spacing_mm: float, settings: RegistrationSettings, device: str) -> float:
    """Squared local correlation of two scans after the coarse linear fit, both ways, in [0, 1]."""
    there, _ = fit(fixed, moving, (spacing_mm,), settings, device)
    back = Affine(np.asarray(np.linalg.inv(there.matrix), dtype=np.float64))
    return (_correlation(fixed, moving, there, spacing_mm) + _correlation(moving, fixed, back, spacing_mm)) / 2


def _correlation(fixed: Scan, moving: Scan, fixed_to_moving: Transform, spacing_mm: float) -> float:
    """Mean over the shared foreground of the squared correlation in windows; 0 where nothing is shared."""
    grid = frame_grid(fixed.intensity.grid, axes_of(fixed.intensity.grid), spacing_mm)
    one, other = on_grid(fixed, grid, "cpu"), on_grid(moving, grid, "cpu", fixed_to_moving)
    inside = one.inside * other.inside
    share = _window_mean(inside).clamp_min(_LEAST_SHARE)

    def mean(values: Tensor) -> Tensor:
        return _window_mean(values * inside) / share

    first, second = mean(one.image), mean(other.image)
    variances = [
        (mean(level.image**2) - level_mean**2).clamp_min(_FLAT) for level, level_mean in ((one, first), (other, second))
    ]
    covariance = mean(one.image * other.image) - first * second
    squared = (covariance**2 / (variances[0] * variances[1])).clamp(0, 1)
    weight = one.weight * other.weight
    total = float(weight.sum())
    return float((weight * squared).sum()) / total if total >= 1 else 0.0


def _window_mean(values: Tensor) -> Tensor:
    return F.avg_pool3d(values, 2 * _RADIUS + 1, 1, _RADIUS, count_include_pad=False)


def _positions(similarity: NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N, 2) map by landmark multidimensional scaling (de Silva and Tenenbaum 2004); classical if all are landmarks."""
    squared = (1 - similarity[:, drawn]) ** 2
    for column, n in enumerate(drawn):
        squared[n, column] = 0
    among = squared[drawn]
    means = among.mean(axis=0)
    centred = -0.5 * (among - means - means[:, None] + among.mean())
    values, vectors = np.linalg.eigh(centred)
    top = np.argsort(-values)[:2]
    scale = np.sqrt(np.maximum(values[top], 1e-12))
    found = -0.5 * (squared - means) @ (vectors[:, top] / scale)
    # The sign of an axis is arbitrary; fixed, so that the same scans give the same picture.
    signs = np.where(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])] < 0, -1.0, 1.0)
    return np.asarray(found * signs)
