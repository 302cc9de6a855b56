"""Ranking of scans without labels by how well the contours of each would reach all others.

Every scan is registered to others by the coarse level of the linear stages, and compared with them by local
correlation: a good atlas is similar to all others. In large folders each scan is compared with a few drawn at random,
and the best are then compared with all, so that work grows with the number of scans, not with its square. Whether a
scan shows the wanted structures whole is not known before contouring.

Where some scans are contoured already, the next one is that with which every scan has the most similar atlas.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import AvgPool3d

from ..atlas import canonical_scan
from ..core.errors import AtlasSegError, InputError
from ..core.files import entries_of
from ..core.image import IMAGE_SUFFIXES, image_stem, image_suffix, load_image
from ..core.labels import hint, listed
from ..registration.affine import fit
from ..registration.pyramid import Scan, frame_grid, level_spacings_mm, on_grid, prepare
from ..settings import RegistrationSettings
from ..transforms.maps import Transform

#: Most scans of which all pairs are registered: 66 pairs of a few seconds.
ALL_PAIRS = 12
#: In larger folders, how many others each scan is registered to, and how many of the best to all.
LANDMARKS, FINALISTS = 8, 3
#: Mean over the window of the local correlation: 5 voxels of the coarse level, about 45 mm of an abdomen.
_WINDOW_MEAN = AvgPool3d(5, stride=1, padding=2, count_include_pad=False)
#: Variance below which a window has no contrast to compare; intensities are 0 to 1.
_FLAT = 1e-5
#: Least relative difference of two scores that says anything.
_CLEAR = 0.03
#: Least fraction of a window inside both fields of view that its means are divided by.
_LEAST_INSIDE = 0.01


@dataclass(frozen=True)
class Candidate:
    """One scan as an atlas."""

    name: str  # of its file, without the suffix
    path: Path
    #: Mean similarity to those it was compared with, in [0, 1]; if not all, corrected for their ease. To a scan that is
    #: more similar to one that is contoured, the similarity of these two.
    score: float
    lowest: float  # the smallest of these similarities
    furthest: str  # the scan it has that similarity to
    compared: int  # number of others


@dataclass(frozen=True, eq=False)
class Suggestion:
    """The ranking of a folder."""

    candidates: tuple[Candidate, ...]  # the best first, without those contoured
    contoured: tuple[str, ...]
    names: tuple[str, ...]  # of all scans, in the order of ``similarity``
    similarity: NDArray[np.float64]  # (N, N), in [0, 1], symmetric; NaN if not registered, and on the diagonal
    positions: NDArray[np.float64]  # (N, 2) map on which similar scans are near each other; no unit
    failures: tuple[tuple[str, str], ...]  # files that could not be used, and why
    pairs: int  # number registered
    seconds: float  # wall time

    @property
    def differs(self) -> bool:
        """Whether the best candidate is clearly more similar to the others than the middle one."""
        middle = self.candidates[len(self.candidates) // 2].score
        return self.candidates[0].score - middle >= _CLEAR * middle

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        candidates = [
            {"rank": rank, **vars(one), "score": round(one.score, 4), "lowest": round(one.lowest, 4)}
            for rank, one in enumerate(self.candidates, start=1)
        ]
        return {
            "best": self.candidates[0].name,
            "contoured": list(self.contoured),
            "differs": self.differs,
            "candidates": [{key: value for key, value in row.items() if key != "path"} for row in candidates],
            "names": list(self.names),
            "similarity": [[None if math.isnan(v) else round(v, 4) for v in row] for row in self.similarity.tolist()],
            "positions": [[round(v, 5) for v in row] for row in self.positions.tolist()],
            "failures": [{"name": name, "reason": reason} for name, reason in self.failures],
            "pairs": self.pairs,
            "seconds": round(self.seconds, 2),
        }


def scans_in(folder: Path) -> list[Path]:
    """List the image files of a folder, by name; :class:`.InputError` if it is no folder or has fewer than three."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of scans")
    found = [path for path in entries_of(folder) if image_suffix(path)]
    if len(found) < 3:
        raise InputError(
            f"{folder}: {len(found)} image files; expected three or more, ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return found


def suggest(
    files: Sequence[Path],
    settings: RegistrationSettings | None = None,
    *,
    contoured: Sequence[str] = (),
    landmarks: int = LANDMARKS,
    finalists: int = FINALISTS,
    seed: int = 0,
    device: str = "cpu",
    on_pair: Callable[[int, int], None] | None = None,
) -> Suggestion:
    """Rank scans of one kind, without labels, by how well each would reach all others as an atlas.

    Each of more than :data:`ALL_PAIRS` scans is compared with ``landmarks`` others, drawn by ``seed``; the best
    ``finalists`` are then compared with all. ``contoured`` are names of scans that are atlases already: ranked are the
    others, as a further atlas. ``settings`` are those of the linear stages; ``on_pair`` is called with number and
    count of each pair as it begins. An :class:`.InputError` if fewer than three files can be used, or a contoured scan
    is not among them.
    """
    settings = settings or RegistrationSettings()
    start = time.perf_counter()
    paths, scans, failures = [], [], []
    for path in files:
        try:
            volume = canonical_scan(load_image(path), str(path))
            spacing_mm = level_spacings_mm(volume.grid, (settings.coarse_voxels,))[0]
            scans.append((prepare(volume, None, spacing_mm, "scan"), spacing_mm))
            paths.append(path)
        except AtlasSegError as error:
            failures.append((path.name, str(error)))
    count, names = len(scans), [image_stem(path) for path in paths]
    if count < 3:
        reason = f" ({failures[0][1]})" if failures else ""
        raise InputError(f"{count} of {len(files)} scans can be used, expected three or more{reason}")
    if unknown := [name for name in contoured if name not in names]:
        raise InputError(
            f"{unknown[0]}: not one of the scans; {hint(unknown[0], names)}expected one of {listed(names)}"
        )
    known = [names.index(name) for name in contoured]
    rest = [n for n in range(count) if n not in known]
    if not rest:
        raise InputError("all scans are contoured already; leave one of them out")
    similarity = np.full((count, count), np.nan)
    done = 0

    def compare(pairs: Sequence[tuple[int, int]], total: int) -> None:
        nonlocal done
        for one, other in pairs:
            done += 1
            if on_pair is not None:
                on_pair(done, total)
            (fixed, spacing_mm), (moving, _) = scans[one], scans[other]
            value = _similarity(fixed, moving, spacing_mm, settings, device)
            similarity[one, other] = similarity[other, one] = value

    drawn = np.arange(count)
    if count > ALL_PAIRS:
        drawn = np.sort(np.random.default_rng(seed).permutation(count)[: max(3, min(landmarks, count))])
    first, partial = _pairs(count, [*drawn, *known]), len(drawn) < count
    # The finalists' pairs are not known yet, but how many they are at most is.
    compare(first, len(first) + (finalists * (count - 1 - len(drawn)) if partial else 0))
    scores = _scores(_reached(similarity, known), drawn)
    order = [n for n in np.argsort(-scores, kind="stable").tolist() if n in rest]
    final = order[: max(1, min(finalists, count)) if partial else 0]
    if final:
        missing = [pair for pair in _pairs(count, final) if math.isnan(similarity[pair])]
        compare(missing, len(first) + len(missing))
    reached = _reached(similarity, known)
    if final:
        scores[final] = np.nanmean(reached[final], axis=1)
    candidates = []
    # Those compared with all come first: the scores of the others are estimates.
    for n in sorted(rest, key=lambda n: (n not in final, -scores[n], names[n])):
        far, compared = int(np.nanargmin(reached[n])), int(np.isfinite(similarity[n]).sum())
        lowest = float(reached[n, far])
        candidates.append(Candidate(names[n], paths[n], float(scores[n]), lowest, names[far], compared))
    positions, seconds = _positions(similarity, drawn), time.perf_counter() - start
    return Suggestion(
        tuple(candidates), tuple(contoured), tuple(names), similarity, positions, tuple(failures), done, seconds
    )


def _pairs(count: int, chosen: Iterable[int]) -> list[tuple[int, int]]:
    """Each of the chosen with every other, each pair once."""
    return sorted({(min(int(a), b), max(int(a), b)) for a in chosen for b in range(count) if a != b})


def _reached(similarity: NDArray[np.float64], known: Sequence[int]) -> NDArray[np.float64]:
    """(N, N) similarities of each scan, or of a known one where that is higher; NaN stays NaN."""
    if not known:
        return similarity
    best = np.where(np.isnan(similarity[known]), 1.0, similarity[known]).max(axis=0)
    return np.where(np.isnan(similarity), np.nan, np.maximum(similarity, best))


def _scores(similarity: NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) mean similarity to the drawn scans, as if all of them were equally easy to reach."""
    if len(drawn) == len(similarity):
        return np.asarray(np.nanmean(similarity, axis=1))
    table = similarity[:, drawn]
    ease = np.nanmean(table, axis=0)
    return np.asarray(np.nanmean(table - ease, axis=1) + ease.mean())


def _similarity(fixed: Scan, moving: Scan, spacing_mm: float, settings: RegistrationSettings, device: str) -> float:
    """Squared local correlation of two scans after the coarse linear fit, mean of both directions, in [0, 1]."""
    there, _ = fit(fixed, moving, (spacing_mm,), settings, device)
    back = there.inverse()
    return (_correlation(fixed, moving, there, spacing_mm) + _correlation(moving, fixed, back, spacing_mm)) / 2


def _correlation(fixed: Scan, moving: Scan, fixed_to_moving: Transform, spacing_mm: float) -> float:
    """Mean squared correlation in windows over the common foreground; 0 where there is none."""
    grid = frame_grid(fixed.intensity.grid, spacing_mm)
    one, other = on_grid(fixed, grid, "cpu"), on_grid(moving, grid, "cpu", fixed_to_moving)
    inside = one.inside * other.inside
    fraction = _WINDOW_MEAN(inside).clamp_min(_LEAST_INSIDE)

    def mean(values: Tensor) -> Tensor:
        found: Tensor = _WINDOW_MEAN(values * inside) / fraction
        return found

    first, second = mean(one.image), mean(other.image)
    variance = (mean(one.image**2) - first**2).clamp_min(_FLAT) * (mean(other.image**2) - second**2).clamp_min(_FLAT)
    squared = ((mean(one.image * other.image) - first * second) ** 2 / variance).clamp(0, 1)
    weight = one.weight * other.weight
    total = float(weight.sum())
    return float((weight * squared).sum()) / total if total >= 1 else 0.0


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
    # The sign of an axis is arbitrary: fixed, so that the same scans give the same picture.
    signs = np.where(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])] < 0, -1.0, 1.0)
    return np.asarray(found * signs)
