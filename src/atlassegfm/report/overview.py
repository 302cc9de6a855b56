"""Overview picture of a result: three slices, legend, volumes and scores as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import MissingExtraError
from ..core.files import atomic_path
from ..core.image import Volume
from ..core.labels import Structure
from .slices import (
    Panel,
    Window,
    bar_length_mm,
    cut,
    edge_letters,
    overview_panels,
    overview_window,
    positions,
    smooth_mask,
    tilt_remark,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Size of the picture and its parts, px; panels are limited in height so that the page fits one screen.
_WIDTH_PX, _MARGIN_PX, _GAP_PX, _HIGHEST_PX = 1600, 40, 14, 840
_DPI = 100
#: Rows, columns and line height (px) of the legend.
_LEGEND_ROWS, _LEGEND_COLUMNS, _LEGEND_LINE_PX = 5, 4, 29
#: Right edges of volume and score, px from the left edge of their column.
_LEGEND_VOLUME_PX, _LEGEND_SCORE_PX = 268, 326
_PAGE, _PANEL, _FRAME, _TEXT, _FAINT = "#0d1015", "#000000", "#262c36", "#eef1f5", "#8b95a5"
#: Comes with matplotlib: the same letters on every machine.
_FONT = "DejaVu Sans"
#: Dashes of the reference's outline, points of line and gap.
_DASHES = (0, (4, 3))
#: Upper limit of the grey scale: above 1, so that fills still tint the brightest voxels.
_WHITE = 1.1


@dataclass(frozen=True)
class _Rectangle:
    """Part of the picture, px from the upper left corner."""

    left: float
    top: float
    width: float
    height: float


def require_report_extra() -> None:
    """Check that pictures can be drawn.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtraError("drawing the picture", "report") from None


def draw_overview(
    image: Volume,
    result: Volume,
    structures: Sequence[Structure],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    reference: Volume | None = None,
    scores: Mapping[int, float] | None = None,
) -> None:
    """Draw a scan with its segmentation in three planes and write it as PNG.

    The same voxels give the same file, whatever their order in memory.

    Parameters
    ----------
    image : Volume
    result : Volume
        Labels on the voxels of ``image`` (the array order may differ): solid outlines.
    structures : sequence of Structure
        Labels to draw, with names and colours.
    path : Path
        PNG file.
    title, subtitle : str
        The only text that could identify a patient.
    reference : Volume, optional
        Reference labels on the voxels of ``image``: dashed white outlines.
    scores : mapping of int to float, optional
        Dice coefficient of each label value for the legend, in [0, 1] or NaN.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    ValueError
        If the label maps are not on the voxels of the image.
    """
    require_report_extra()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scan = image.canonical()
    values = [one.value for one in structures]
    labels = positions(result.turned_to(scan.grid).data, values)
    truth = None if reference is None else positions(reference.turned_to(scan.grid).data, values)
    drawn = labels if truth is None else np.where(labels > 0, labels, truth)
    panels = overview_panels(drawn, len(structures), scan.grid.spacing_mm)
    window = overview_window(scan.data, drawn, panels[0])
    bar_mm = bar_length_mm(min(panel.width_mm for panel in panels))

    header_px = 76 + (26 * len(_wrapped(subtitle)) if subtitle else 0)
    places, panels_bottom = _layout(panels, header_px)
    entries = _legend_entries(labels, structures, scan.grid.voxel_volume_mm3, scores)
    rows = -(-len(entries) // _LEGEND_COLUMNS)
    legend_top = panels_bottom + 22
    height = int(np.ceil(legend_top + _LEGEND_LINE_PX * (rows + 1) + 22))

    figure = Figure(figsize=(_WIDTH_PX / _DPI, height / _DPI), dpi=_DPI, facecolor=_PAGE)
    FigureCanvasAgg(figure)
    _draw_header(figure, title, subtitle, height, [_rgb(s) for s in structures], reference is not None)
    for panel, place in zip(panels, places, strict=True):
        axes = figure.add_axes(
            (
                place.left / _WIDTH_PX,
                1 - (place.top + place.height) / height,
                place.width / _WIDTH_PX,
                place.height / height,
            )
        )
        _draw_panel(axes, panel, place, scan, labels, truth, structures, window, bar_mm)
    _draw_legend(figure, entries, legend_top, height)
    with atomic_path(path) as temporary:
        # Without matplotlib's version the file depends on the voxels alone.
        figure.savefig(temporary, format="png", dpi=_DPI, facecolor=_PAGE, metadata={"Software": None})


def _layout(panels: Sequence[Panel], top_px: float) -> tuple[list[_Rectangle], float]:
    """Place the panels (one large, two stacked beside it, or a row; whichever is larger) and give their lower edge."""
    width = _WIDTH_PX - 2 * _MARGIN_PX
    first, second, third = (panel.aspect for panel in panels)

    # Side by side: h1 = w2 / second + gap + w2 / third, first * h1 + gap + w2 = width.
    stacked = (width - _GAP_PX - first * _GAP_PX) / (1 + first * (1 / second + 1 / third))
    tall = stacked / second + _GAP_PX + stacked / third
    shrink = min(1.0, _HIGHEST_PX / tall)
    beside_area = shrink**2 * (first * tall**2 + stacked**2 * (1 / second + 1 / third))

    row = (width - 2 * _GAP_PX) / (first + second + third)
    row_height = min(row, _HIGHEST_PX)
    row_area = row_height**2 * (first + second + third)

    if beside_area >= row_area and stacked > 0:
        right = stacked * shrink + (1 - shrink) * width * 0.35
        left = width - _GAP_PX - right
        total = tall * shrink
        upper = (total - _GAP_PX) * (1 / second) / (1 / second + 1 / third)
        x = _MARGIN_PX + left + _GAP_PX
        return [
            _Rectangle(_MARGIN_PX, top_px, left, total),
            _Rectangle(x, top_px, right, upper),
            _Rectangle(x, top_px + upper + _GAP_PX, right, total - _GAP_PX - upper),
        ], top_px + total
    widths = np.array([first, second, third])
    widths = widths / widths.sum() * (width - 2 * _GAP_PX)
    lefts = _MARGIN_PX + np.concatenate([[0], np.cumsum(widths[:2] + _GAP_PX)])
    return [_Rectangle(float(x), top_px, float(w), row_height) for x, w in zip(lefts, widths, strict=True)], (
        top_px + row_height
    )


def _draw_panel(
    axes: Axes,
    panel: Panel,
    place: _Rectangle,
    scan: Volume,
    labels: NDArray[Any],
    truth: NDArray[Any] | None,
    structures: Sequence[Structure],
    window: Window,
    bar_mm: int,
) -> None:
    from matplotlib.patheffects import withStroke

    width, height = panel.width_mm, panel.height_mm
    px_per_mm = min(place.width / width, place.height / height)
    view_width, view_height = place.width / px_per_mm, place.height / px_per_mm
    left, top = (view_width - width) / 2, (view_height - height) / 2
    axes.set_facecolor(_PANEL)
    axes.set_xlim(0, view_width)
    axes.set_ylim(view_height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_FRAME)

    picture = window.grey(cut(scan.data, panel))
    axes.imshow(
        picture,
        cmap="gray",
        vmin=0,
        vmax=_WHITE,
        extent=(left, left + width, top + height, top),
        interpolation="bicubic",
        aspect="auto",
        zorder=0,
    )
    axes.set_xlim(0, view_width)
    axes.set_ylim(view_height, 0)

    pixel_mm = (width / picture.shape[1], height / picture.shape[0])

    def lattices(indices: NDArray[Any]) -> Iterator[tuple[int, tuple[NDArray[Any], ...]]]:
        shown = cut(indices, panel)
        for position in np.unique(shown[shown > 0]):
            xs, ys, level = smooth_mask(shown == position, pixel_mm, px_per_mm)
            yield int(position), (xs + left, ys + top, level)

    many = len(np.unique(cut(labels, panel))) > 25
    for position, lattice in lattices(labels):
        color = _rgb(structures[position - 1])
        axes.contourf(*lattice, levels=[0.5, 10], colors=[color], alpha=0.24 if many else 0.20, zorder=1)
        axes.contour(*lattice, levels=[0.5], colors=[color], linewidths=1.1 if many else 1.9, zorder=2)
    for _, lattice in () if truth is None else lattices(truth):
        axes.contour(*lattice, levels=[0.5], colors=["white"], linewidths=0.9, linestyles=[_DASHES], zorder=3)

    outline = [withStroke(linewidth=3, foreground="#000000b0")]
    style: dict[str, Any] = {"family": _FONT, "color": _TEXT, "path_effects": outline, "zorder": 5}
    inset = 14 / px_per_mm
    at_left, at_right, at_top, at_bottom = edge_letters(scan.grid.affine, panel.view)
    for x, y, letters, across, upright in (
        (inset, view_height / 2, at_left, "left", "center"),
        (view_width - inset, view_height / 2, at_right, "right", "center"),
        (view_width / 2, inset, at_top, "center", "top"),
        (view_width / 2, view_height - inset, at_bottom, "center", "bottom"),
    ):
        axes.text(x, y, letters, ha=across, va=upright, fontsize=12.5, fontweight="bold", **style)
    tilt = tilt_remark(scan.grid.affine, panel.view)
    name = panel.view.name + (f"  ({tilt})" if tilt else "")
    axes.text(inset, inset, name, ha="left", va="top", fontsize=11.5, **{**style, "color": "#c9d1dc"})

    x, y = inset, view_height - inset
    axes.plot(
        [x, x + bar_mm], [y, y], color=_TEXT, linewidth=2.6, solid_capstyle="butt", path_effects=outline, zorder=5
    )
    axes.text(x, y - 7 / px_per_mm, f"{bar_mm} mm", ha="left", va="bottom", fontsize=10.5, **style)


def _rgb(structure: Structure) -> tuple[float, float, float]:
    red, green, blue = structure.color
    return red / 255, green / 255, blue / 255


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 150)


def _draw_header(
    figure: Figure,
    title: str,
    subtitle: str,
    height: int,
    colors: Sequence[tuple[float, float, float]],
    has_reference: bool,
) -> None:
    from matplotlib.lines import Line2D

    left = _MARGIN_PX / _WIDTH_PX
    head = textwrap.shorten(title, 90, placeholder=" …")
    # A dollar sign in a name is no mathematics.
    plain: dict[str, Any] = {"family": _FONT, "parse_math": False, "va": "baseline"}
    figure.text(left, 1 - 46 / height, head, color=_TEXT, fontsize=21, fontweight="bold", ha="left", **plain)
    for number, line in enumerate(_wrapped(subtitle)):
        figure.text(left, 1 - (76 + 26 * number) / height, line, color=_FAINT, fontsize=12, ha="left", **plain)
    right = _WIDTH_PX - _MARGIN_PX
    if not has_reference:
        return
    keys: list[tuple[str, Any, float, Sequence[Any]]] = [
        ("result", "-", 2.4, colors[:3] or [_TEXT]),
        ("reference", _DASHES, 1.2, ["white"]),
    ]
    for name, dashes, linewidth, shades in reversed(keys):
        figure.text(right / _WIDTH_PX, 1 - 46 / height, name, color=_FAINT, fontsize=12, ha="right", **plain)
        right -= 10 * len(name) + 8
        piece = 42 / len(shades)
        y = 1 - 41 / height
        style: dict[str, Any] = {"linewidth": linewidth, "linestyle": dashes, "solid_capstyle": "butt"}
        for number, shade in enumerate(reversed(shades)):
            ends = [(right - piece * (number + 1)) / _WIDTH_PX, (right - piece * number) / _WIDTH_PX]
            figure.add_artist(Line2D(ends, [y, y], color=shade, transform=figure.transFigure, **style))
        right -= 70


@dataclass(frozen=True)
class _Entry:
    """Line of the legend; a remark if it has no colour."""

    name: str
    color: tuple[float, float, float] | None = None
    volume_ml: float = 0.0
    score: float | None = None


def _legend_entries(
    labels: NDArray[Any],
    structures: Sequence[Structure],
    voxel_volume_mm3: float,
    scores: Mapping[int, float] | None,
) -> list[_Entry]:
    """List the structures in their order, or the largest and the number of others."""
    voxels = np.bincount(labels.ravel(order="K"), minlength=len(structures) + 1)[1:]
    room = _LEGEND_ROWS * _LEGEND_COLUMNS
    kept = list(range(len(structures)))
    if len(kept) > room:
        largest = sorted(kept, key=lambda position: (-int(voxels[position]), position))[: room - 1]
        kept = sorted(largest)
    entries = [
        _Entry(
            structures[position].name,
            _rgb(structures[position]),
            float(voxels[position]) * voxel_volume_mm3 / 1000,
            None if scores is None else scores.get(structures[position].value),
        )
        for position in kept
    ]
    if len(kept) < len(structures):
        entries.append(_Entry(f"and {len(structures) - len(kept)} more"))
    return entries


def _draw_legend(figure: Figure, entries: Sequence[_Entry], top_px: float, height: int) -> None:
    from matplotlib.patches import Rectangle

    rows = -(-len(entries) // _LEGEND_COLUMNS)
    column_px = (_WIDTH_PX - 2 * _MARGIN_PX + 30) / _LEGEND_COLUMNS
    style: dict[str, Any] = {"family": _FONT, "parse_math": False, "va": "center_baseline"}
    scored = any(entry.score is not None for entry in entries)
    volume_px = _LEGEND_VOLUME_PX if scored else _LEGEND_SCORE_PX
    heads = [(volume_px, "volume"), (_LEGEND_SCORE_PX, "Dice")] if scored else [(volume_px, "volume")]
    for column in range(-(-len(entries) // max(rows, 1))):
        for offset, head in heads:
            x = _MARGIN_PX + column * column_px + offset
            figure.text(x / _WIDTH_PX, 1 - (top_px + 6) / height, head, color=_FAINT, ha="right", fontsize=10, **style)
    style["fontsize"] = 12.5
    for number, entry in enumerate(entries):
        column, row = divmod(number, rows)
        x, y = _MARGIN_PX + column * column_px, top_px + _LEGEND_LINE_PX * (row + 1) + 2
        at = 1 - y / height
        if entry.color is None:
            figure.text((x + 26) / _WIDTH_PX, at, entry.name, color=_FAINT, ha="left", **style)
            continue
        corner, size = (x / _WIDTH_PX, 1 - (y + 7) / height), (14 / _WIDTH_PX, 14 / height)
        figure.add_artist(Rectangle(corner, *size, color=entry.color, linewidth=0, transform=figure.transFigure))
        name = figure.text((x + 26) / _WIDTH_PX, at, entry.name, color=_TEXT, ha="left", **style)
        volume = figure.text(
            (x + volume_px) / _WIDTH_PX, at, _millilitres(entry.volume_ml), color=_FAINT, ha="right", **style
        )
        _shorten(name, volume.get_window_extent().x0 - 12)
        if entry.score is not None:
            text = "–" if np.isnan(entry.score) else f"{entry.score:.2f}"
            figure.text(
                (x + _LEGEND_SCORE_PX) / _WIDTH_PX, at, text, color=_TEXT, ha="right", fontweight="bold", **style
            )


def _shorten(text: Text, right_px: float) -> None:
    """Remove letters from the middle until a text ends before ``right_px``: names differ at both ends."""
    full = text.get_text()
    for kept in range(len(full) - 1, 3, -1):
        if text.get_window_extent().x1 <= right_px:
            return
        text.set_text(full[: kept - kept // 2] + "…" + full[len(full) - kept // 2 :])


def _millilitres(volume_ml: float) -> str:
    return f"{volume_ml:.0f} ml" if volume_ml >= 99.5 else f"{volume_ml:.3g} ml"
