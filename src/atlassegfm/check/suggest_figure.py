"""Figure of a ranking of scans: who is like whom, the best and the worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import AtlasSegError
from ..core.files import atomic_path
from ..core.fonts import drawable
from ..core.image import Volume, load_image
from .suggest import ALL_PAIRS, Suggestion

_INK, _SOFT, _PAGE, _LINE = "#1b2330", "#5c6878", "#ffffff", "#dfe4ea"
_BEST, _WORST = "#14804a", "#b42318"
#: Scans whose names fit beside the matrix and onto the map; bars and small pictures that are shown.
_MOST_NAMES, _MOST_BARS, _BEST_SHOWN, _WORST_SHOWN = 30, 15, 3, 2


def draw_suggestion(suggestion: Suggestion, path: Path) -> None:
    """Draw why: the ranking, who is like whom, and the best and the worst scans. Writes a PNG.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 10.4), dpi=100, facecolor=_PAGE)
    FigureCanvasAgg(figure)
    style: dict[str, Any] = {"family": "DejaVu Sans", "parse_math": False}
    best = suggestion.candidates[0]
    figure.text(0.03, 0.955, f"Contour {_short(best.name, 40)} first", color=_INK, size=22, weight="bold", **style)
    figure.text(
        0.03,
        0.925,
        f"It looks most like the other {len(suggestion.names) - 1} scans after a coarse linear registration: "
        f"similarity {best.score:.3f} on the average, {best.lowest:.3f} to the one least like it "
        f"({_short(best.furthest, 30)}). "
        + ("" if suggestion.differs else "The scans differ little: others would do as well. ")
        + f"{suggestion.pairs} pairs in {suggestion.seconds:.0f} s.",
        color=_SOFT,
        size=12,
        **style,
    )
    _draw_ranking(figure.add_axes((0.12, 0.42, 0.2, 0.45)), suggestion, style)
    _draw_matrix(figure.add_axes((0.41, 0.42, 0.25, 0.45)), suggestion, style)
    _draw_map(figure.add_axes((0.72, 0.42, 0.25, 0.45)), suggestion, style)
    _draw_thumbnails(figure, suggestion, style)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, facecolor=_PAGE, metadata={"Software": None})


def _short(name: str, width: int) -> str:
    """The end of a long name, where names of a folder differ; without nnU-Net's number of the only channel."""
    name = drawable(name.removesuffix("_0000"))
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _head(axes: Any, title: str, style: dict[str, Any]) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=13, fontweight="bold", pad=10, **style)
    axes.tick_params(colors=_SOFT, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_color(_LINE)


def _draw_ranking(axes: Any, suggestion: Suggestion, style: dict[str, Any]) -> None:
    shown = list(suggestion.candidates)
    if len(shown) > _MOST_BARS:
        shown = [*shown[: _MOST_BARS - 3], *shown[-3:]]
    at = np.arange(len(shown), dtype=float)
    if len(suggestion.candidates) > _MOST_BARS:
        at[-3:] += 0.7
    colors = [_BEST, *["#8fb5e8"] * (len(shown) - 2), _WORST]
    axes.barh(at, [one.score for one in shown], color=colors, height=0.7)
    axes.plot([one.lowest for one in shown], at, "|", color=_INK, markersize=9)
    ranks = {one.name: rank for rank, one in enumerate(suggestion.candidates, start=1)}
    axes.set_yticks(at, [f"{ranks[one.name]}  {_short(one.name, 18)}" for one in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, max(one.score for one in shown) * 1.18)
    for y, one in zip(at, shown, strict=True):
        axes.text(one.score, y, f" {one.score:.3f}", va="center", color=_SOFT, size=9, **style)
    _head(axes, "Rank (bar: mean similarity, |: lowest)", style)


def _draw_matrix(axes: Any, suggestion: Suggestion, style: dict[str, Any]) -> None:
    position = {name: n for n, name in enumerate(suggestion.names)}
    order = [position[one.name] for one in suggestion.candidates]
    matrix = suggestion.similarity[np.ix_(order, order)]
    axes.set_facecolor("#eef1f5")
    image = axes.imshow(matrix, cmap="viridis", interpolation="nearest")
    names = [_short(one.name, 14) for one in suggestion.candidates]
    if len(names) <= _MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
    bar.ax.tick_params(colors=_SOFT, labelsize=9, length=0)
    bar.outline.set_visible(False)
    _head(axes, "Who is like whom, by rank" + (" (grey: not compared)" if len(names) > ALL_PAIRS else ""), style)


def _draw_map(axes: Any, suggestion: Suggestion, style: dict[str, Any]) -> None:
    position = {name: n for n, name in enumerate(suggestion.names)}
    scores = np.zeros(len(suggestion.names))
    for one in suggestion.candidates:
        scores[position[one.name]] = one.score
    points = suggestion.positions
    axes.scatter(points[:, 0], points[:, 1], c=scores, cmap="viridis", s=70, edgecolors="white", linewidths=1)
    best, worst = (position[suggestion.candidates[n].name] for n in (0, -1))
    for n, color in ((best, _BEST), (worst, _WORST)):
        axes.scatter(*points[n], s=190, facecolors="none", edgecolors=color, linewidths=2.2)
    named = range(len(points)) if len(points) <= _MOST_NAMES else (best, worst)
    reach = float(np.ptp(points)) or 1.0
    for n in named:
        axes.text(
            *(points[n, 0], points[n, 1] + 0.03 * reach, _short(suggestion.names[n], 16)),
            **{"size": 9, "color": _INK, "ha": "center", **style},
        )
    axes.margins(0.16)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    _head(axes, "Map: near scans look alike", style)


def _draw_thumbnails(figure: Any, suggestion: Suggestion, style: dict[str, Any]) -> None:
    shown = [("best", one) for one in suggestion.candidates[:_BEST_SHOWN]]
    shown += [("worst", one) for one in suggestion.candidates[_BEST_SHOWN:][-_WORST_SHOWN:]]
    width = 0.94 / len(shown)
    for number, (kind, one) in enumerate(shown):
        axes = figure.add_axes((0.03 + number * width, 0.02, width - 0.012, 0.27))
        axes.set_facecolor("black")
        try:
            picture, aspect = _middle_slice(load_image(one.path))
        except AtlasSegError:
            continue  # it was read a moment ago and is gone: its place stays black
        low, high = (float(v) for v in np.percentile(picture, (1, 99.5)))
        axes.imshow(picture, cmap="gray", vmin=low, vmax=high if high > low else low + 1, aspect=aspect)
        axes.set_xticks([])
        axes.set_yticks([])
        color = _BEST if kind == "best" else _WORST
        for spine in axes.spines.values():
            spine.set_color(color)
            spine.set_linewidth(2)
        title = f"{suggestion.candidates.index(one) + 1}  {_short(one.name, 22)}  {one.score:.3f}"
        axes.set_title(title, loc="left", fontsize=11, color=color, fontweight="bold", **style)


def _middle_slice(volume: Volume) -> tuple[NDArray[np.float32], float]:
    """The middle slice in the plane of the finest voxels as radiologists see it, and height over width of a voxel."""
    scan = volume.canonical()
    spacing = scan.grid.spacing_mm
    coarsest = float(spacing.max())
    normal, right, down = next(
        axes for axes in ((2, 0, 1), (1, 0, 2), (0, 1, 2)) if spacing[axes[0]] >= 0.99 * coarsest
    )
    flat = np.take(scan.data, scan.grid.shape[normal] // 2, axis=normal)
    return np.asarray(flat[::-1, ::-1].T, dtype=np.float32), float(spacing[down] / spacing[right])
