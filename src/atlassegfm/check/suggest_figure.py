"""Figure of a ranking of scans: scores, similarities, the best and the worst."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import AtlasSegError
from ..core.files import atomic_path
from ..core.fonts import drawable
from ..core.image import Volume, load_image
from .suggest import ALL_PAIRS, Suggestion

_INK, _SOFT, _LINE = "#1b2330", "#5c6878", "#dfe4ea"
_BEST, _MIDDLE, _WORST = "#14804a", "#8fb5e8", "#b42318"
#: Most scans whose names fit beside the matrix and onto the map; bars and thumbnails that are shown.
_MOST_NAMES, _MOST_BARS, _BEST_SHOWN, _WORST_SHOWN = 30, 15, 3, 2
_TICKS = {"labelsize": 9, "color": _SOFT, "major.size": 0}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "text.color": _INK,
    "image.cmap": "viridis",
    "axes.edgecolor": _LINE,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 13,
    "axes.titlepad": 10,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in _TICKS.items()},
}


def draw_suggestion(suggestion: Suggestion, path: Path) -> None:
    """Draw ranking, similarities, and the best and the worst scans as a PNG (needs matplotlib)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best, others = suggestion.candidates[0], len(suggestion.names) - 1
    little = "" if suggestion.differs else "The scans differ little: others would do as well. "
    text = (
        f"Similarity to the other {others} scans after a coarse linear registration: mean {best.score:.3f}, lowest "
        f"{best.lowest:.3f} ({_short(best.furthest, 22)}). {little}"
        f"{suggestion.pairs} pairs in {suggestion.seconds:.0f} s."
    )
    with rc_context(_STYLE), atomic_path(path) as temporary:
        figure = Figure(figsize=(16, 10.4), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(
            0.03,
            0.955,
            f"Contour {_short(best.name, 40)} {'next' if suggestion.contoured else 'first'}",
            size=22,
            weight="bold",
        )
        figure.text(0.03, 0.925, text, color=_SOFT, size=12)
        _draw_ranking(figure.add_axes((0.12, 0.42, 0.2, 0.45)), suggestion)
        _draw_matrix(figure.add_axes((0.41, 0.42, 0.25, 0.45)), suggestion)
        _draw_map(figure.add_axes((0.72, 0.42, 0.25, 0.45)), suggestion)
        _draw_thumbnails(figure, suggestion)
        figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})


def _short(name: str, width: int) -> str:
    """The end of a long name, where names of a folder differ; without nnU-Net's number of the only channel."""
    name = drawable(name.removesuffix("_0000"))
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _draw_ranking(axes: Any, suggestion: Suggestion) -> None:
    ranked = list(enumerate(suggestion.candidates, start=1))
    at = np.arange(min(len(ranked), _MOST_BARS), dtype=float)
    if len(ranked) > _MOST_BARS:
        ranked = [*ranked[: _MOST_BARS - 3], *ranked[-3:]]
        at[-3:] += 0.7
    scores = [one.score for _, one in ranked]
    axes.barh(at, scores, color=[_BEST, *[_MIDDLE] * (len(ranked) - 2), _WORST], height=0.7)
    axes.plot([one.lowest for _, one in ranked], at, "|", color=_INK, markersize=9)
    axes.set_yticks(at, [f"{rank}  {_short(one.name, 18)}" for rank, one in ranked])
    axes.invert_yaxis()
    axes.set_xlim(0, max(scores) * 1.18)
    for y, score in zip(at, scores, strict=True):
        axes.text(score, y, f" {score:.3f}", va="center", color=_SOFT, size=9)
    axes.set_title("Rank (bar: mean similarity, |: lowest)")


def _draw_matrix(axes: Any, suggestion: Suggestion) -> None:
    order = [suggestion.names.index(one.name) for one in suggestion.candidates]
    names = [_short(one.name, 14) for one in suggestion.candidates]
    axes.set_facecolor("#eef1f5")
    image = axes.imshow(suggestion.similarity[np.ix_(order, order)], interpolation="nearest")
    ticks = range(len(names) if len(names) <= _MOST_NAMES else 0)
    axes.set_xticks(ticks, names[: len(ticks)], rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names[: len(ticks)])
    axes.figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03).outline.set_visible(False)
    axes.set_title("Similarity, by rank" + (" (grey: not compared)" if len(names) > ALL_PAIRS else ""))


def _draw_map(axes: Any, suggestion: Suggestion) -> None:
    points, names = suggestion.positions, suggestion.names
    scores = {one.name: one.score for one in suggestion.candidates}
    axes.scatter(*points.T, c=[scores[name] for name in names], s=70, edgecolors="white", linewidths=1)
    best, worst = (names.index(suggestion.candidates[n].name) for n in (0, -1))
    for n, color in ((best, _BEST), (worst, _WORST)):
        axes.scatter(*points[n], s=190, facecolors="none", edgecolors=color, linewidths=2.2)
    above = 0.03 * (float(np.ptp(points)) or 1.0)
    for n in range(len(points)) if len(points) <= _MOST_NAMES else (best, worst):
        axes.text(points[n, 0], points[n, 1] + above, _short(names[n], 16), size=9, ha="center")
    axes.margins(0.16)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[], title="Map: near scans are similar")


def _draw_thumbnails(figure: Any, suggestion: Suggestion) -> None:
    ranked = list(enumerate(suggestion.candidates, start=1))
    shown = [(_BEST, *one) for one in ranked[:_BEST_SHOWN]]
    shown += [(_WORST, *one) for one in ranked[_BEST_SHOWN:][-_WORST_SHOWN:]]
    width = 0.94 / len(shown)
    for number, (color, rank, one) in enumerate(shown):
        axes = figure.add_axes((0.03 + number * width, 0.02, width - 0.012, 0.27), facecolor="black")
        try:
            picture, aspect = _middle_slice(load_image(one.path))
        except AtlasSegError:
            continue  # deleted since it was ranked: its panel stays black
        low, high = (float(v) for v in np.percentile(picture, (1, 99.5)))
        axes.imshow(picture, cmap="gray", vmin=low, vmax=high if high > low else low + 1, aspect=aspect)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=color, linewidth=2)
        axes.set_title(f"{rank}  {_short(one.name, 22)}  {one.score:.3f}", fontsize=11, color=color, pad=6)


def _middle_slice(volume: Volume) -> tuple[NDArray[np.float32], float]:
    """The middle slice in the plane of the finest voxels as radiologists see it, and height over width of a voxel."""
    scan = volume.canonical()
    spacing, axes = scan.grid.spacing_mm, ((2, 0, 1), (1, 0, 2), (0, 1, 2))
    normal, right, down = next(one for one in axes if spacing[one[0]] >= 0.99 * spacing.max())
    flat = np.take(scan.data, scan.grid.shape[normal] // 2, axis=normal)
    return np.asarray(flat[::-1, ::-1].T, dtype=np.float32), float(spacing[down] / spacing[right])
