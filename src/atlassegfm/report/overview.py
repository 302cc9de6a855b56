"""Overview picture of a result: three slices, legend, volumes and notes as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.extras import require
from ..core.files import atomic_path
from ..core.fonts import FONT, MISSING, fonts_for
from ..core.image import Volume, label_positions
from ..core.labels import Structure
from ..quality.verdict import VERDICTS, Verdict
from .page import millilitres
from .slices import Panel, bar_length_mm, cut, edge_letters, overview_panels, overview_window, smooth_mask, tilt_remark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

#: Size of the picture and its parts, px; panels are limited in height so that the page fits one screen.
_WIDTH_PX, _MARGIN_PX, _GAP_PX, _HIGHEST_PX = 1600, 40, 14, 840
_DPI = 100
#: Rows and line height (px) of the legend; its columns by the length of the longest note up to which they serve.
_LEGEND_ROWS, _LEGEND_LINE_PX, _LEGEND_COLUMNS = 5, 29, ((9, 4), (24, 3), (99, 2))
#: Width of a letter of a note, px.
_LETTER_PX = 8.5
_PAGE, _PANEL, _FRAME, _TEXT, _FAINT = "#0d1015", "#000000", "#262c36", "#eef1f5", "#8b95a5"
_NOTE_COLORS: dict[Verdict, str] = {"accepted": _TEXT, "good": _TEXT, "review": "#f2c14e", "failed": "#ff8f85"}
#: Dashes of the reference's outline, points of line and gap.
_DASHES = (0, (4, 3))
#: Upper limit of the grey scale: above 1, so that fills still tint the brightest voxels.
_WHITE = 1.1
#: Left, top, width and height, px from the upper left corner of the picture.
_Rectangle = tuple[float, float, float, float]


class Note(NamedTuple):
    """Remark on a structure in the legend, behind its volume; its colour is that of the verdict."""

    text: str
    verdict: Verdict = "good"


def require_report_extra() -> None:
    """Raise MissingExtraError if matplotlib, which draws pictures, is not installed."""
    require("drawing the picture", "report", "matplotlib.figure")


def draw_overview(
    image: Volume,
    result: Volume,
    structures: Sequence[Structure],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    reference: Volume | None = None,
    notes: Mapping[int, Note] | None = None,
) -> None:
    """Draw a scan with its segmentation in three planes and write it as PNG.

    Structures of the result get solid outlines, of the reference dashed white ones; both are on the voxels of ``image``
    in any array order (else a ValueError), and the same voxels give the same file. Only title and subtitle could
    identify a patient. Where the legend has no room for all structures, those that are not good by their ``notes`` (by
    label value) come first. A :class:`.MissingExtraError` if matplotlib is not installed.
    """
    require_report_extra()
    scan = image.canonical()
    values = [one.value for one in structures]
    colors = [np.array(one.color) / 255 for one in structures]
    labels = label_positions(result.turned_to(scan.grid).data, values)
    truth = None if reference is None else label_positions(reference.turned_to(scan.grid).data, values)
    drawn = labels if truth is None else np.where(labels > 0, labels, truth)
    panels = overview_panels(drawn, len(structures), scan.grid.spacing_mm)
    window = overview_window(scan.data, drawn, panels[0])
    bar_mm = bar_length_mm(min(panel.width_mm for panel in panels))

    lines = textwrap.wrap(subtitle, 150)
    places = _layout(panels, 76 + 26 * len(lines))
    legend_top = places[0][1] + places[0][3] + 22
    notes = notes or {}
    columns = _columns(notes)
    rows = -(-min(len(structures), _LEGEND_ROWS * columns) // columns)
    canvas = _Canvas(int(np.ceil(legend_top + _LEGEND_LINE_PX * rows + 22)))
    _draw_header(canvas, title, lines, _WIDTH_PX - _MARGIN_PX - (0 if truth is None else 330))
    if truth is not None:
        _draw_line_key(canvas, colors[:3] or [_TEXT])
    for panel, place in zip(panels, places, strict=True):
        px_per_mm = min(place[2] / panel.width_mm, place[3] / panel.height_mm)
        axes = _draw_slice(canvas, place, panel, px_per_mm, window.grey(cut(scan.data, panel)))
        _draw_outlines(axes, cut(labels, panel), panel, px_per_mm, colors)
        if truth is not None:
            _draw_outlines(axes, cut(truth, panel), panel, px_per_mm, None)
        _draw_directions(axes, panel, px_per_mm, scan.grid.affine, bar_mm)
    voxels = np.bincount(labels.ravel(order="K"), minlength=len(structures) + 1)[1:]
    _draw_legend(canvas, legend_top, structures, voxels * scan.grid.voxel_volume_mm3 / 1000, notes)
    with atomic_path(path) as temporary:
        # Without matplotlib's version the file depends on the voxels alone.
        canvas.figure.savefig(temporary, format="png", dpi=_DPI, facecolor=_PAGE, metadata={"Software": None})


class _Canvas:
    """A figure whose parts are placed in px from its upper left corner."""

    def __init__(self, height_px: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.height_px = height_px
        self.figure = Figure(figsize=(_WIDTH_PX / _DPI, height_px / _DPI), dpi=_DPI, facecolor=_PAGE)
        FigureCanvasAgg(self.figure)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return x / _WIDTH_PX, 1 - y / self.height_px

    def text(self, x: float, y: float, text: str, **style: Any) -> Text:
        # A dollar sign in a name is no mathematics.
        families, shown = fonts_for(text)
        if len(families) > 1:  # it may have no bold letters
            style["fontweight"] = "normal"
        return self.figure.text(*self.at(x, y), shown, family=families, parse_math=False, **style)

    def line(self, left: float, right: float, y: float, **style: Any) -> None:
        from matplotlib.lines import Line2D

        (first, at), (last, _) = self.at(left, y), self.at(right, y)
        self.figure.add_artist(Line2D([first, last], [at, at], solid_capstyle="butt", **style))

    def axes(self, place: _Rectangle) -> Axes:
        left, top, width, height = place
        return self.figure.add_axes((*self.at(left, top + height), width / _WIDTH_PX, height / self.height_px))


def _layout(panels: Sequence[Panel], top_px: float) -> list[_Rectangle]:
    """Place one large panel and two stacked beside it, or all in a row; whichever is larger."""
    width = _WIDTH_PX - 2 * _MARGIN_PX
    first, second, third = (panel.aspect for panel in panels)
    row_height = min((width - 2 * _GAP_PX) / (first + second + third), _HIGHEST_PX)
    row_area = row_height**2 * (first + second + third)

    # Stacked: h1 = w2 / second + gap + w2 / third, first * h1 + gap + w2 = width.
    stacked = (width - _GAP_PX - first * _GAP_PX) / (1 + first * (1 / second + 1 / third))
    tall = stacked / second + _GAP_PX + stacked / third
    shrink = min(1.0, _HIGHEST_PX / tall)
    stacked_area = shrink**2 * (first * tall**2 + stacked**2 * (1 / second + 1 / third))
    if stacked_area >= row_area and stacked > 0:
        right = stacked * shrink + (1 - shrink) * width * 0.35
        left = width - _GAP_PX - right
        total = tall * shrink
        upper = (total - _GAP_PX) * (1 / second) / (1 / second + 1 / third)
        x = _MARGIN_PX + left + _GAP_PX
        return [
            (_MARGIN_PX, top_px, left, total),
            (x, top_px, right, upper),
            (x, top_px + upper + _GAP_PX, right, total - _GAP_PX - upper),
        ]
    widths = np.array([first, second, third])
    widths = widths / widths.sum() * (width - 2 * _GAP_PX)
    lefts = _MARGIN_PX + np.concatenate([[0], np.cumsum(widths[:2] + _GAP_PX)])
    return [(float(x), top_px, float(w), row_height) for x, w in zip(lefts, widths, strict=True)]


def _draw_header(canvas: _Canvas, title: str, lines: Sequence[str], right_px: float) -> None:
    _shorten(canvas.text(_MARGIN_PX, 46, title, color=_TEXT, fontsize=21, fontweight="bold"), right_px)
    for n, line in enumerate(lines):
        _shorten(canvas.text(_MARGIN_PX, 76 + 26 * n, line, color=_FAINT, fontsize=12), _WIDTH_PX - _MARGIN_PX)


def _draw_line_key(canvas: _Canvas, colors: Sequence[Any]) -> None:
    """Explain the lines of result and reference at the upper right."""
    right = _WIDTH_PX - _MARGIN_PX
    keys = (("reference", _DASHES, 1.2, ["white"]), ("result", "-", 2.4, colors))
    for name, dashes, linewidth, shades in keys:
        canvas.text(right, 46, name, color=_FAINT, fontsize=12, ha="right")
        right -= 10 * len(name) + 8
        ends = np.linspace(right, right - 42, len(shades) + 1).tolist()
        for last, first, shade in zip(ends, ends[1:], reversed(shades), strict=False):
            canvas.line(first, last, 41, color=shade, linewidth=linewidth, linestyle=dashes)
        right -= 70


def _draw_slice(canvas: _Canvas, place: _Rectangle, panel: Panel, px_per_mm: float, grey: NDArray[np.float32]) -> Axes:
    """Draw a slice in the middle of its place; axes are mm from its upper left corner."""
    axes = canvas.axes(place)
    width, height = place[2] / px_per_mm, place[3] / px_per_mm
    left, top = (width - panel.width_mm) / 2, (height - panel.height_mm) / 2
    axes.set(facecolor=_PANEL, xlim=(-left, width - left), ylim=(height - top, -top), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(_FRAME)
    extent = (0, panel.width_mm, panel.height_mm, 0)
    axes.imshow(grey, "gray", vmin=0, vmax=_WHITE, extent=extent, interpolation="bicubic", aspect="auto", zorder=0)
    return axes


def _draw_outlines(
    axes: Axes, shown: NDArray[Any], panel: Panel, px_per_mm: float, colors: Sequence[Any] | None
) -> None:
    """Draw the structures of a slice of label positions: filled outlines, or dashed white ones without colours."""
    pixel_mm = panel.width_mm / shown.shape[1], panel.height_mm / shown.shape[0]
    found = np.unique(shown[shown > 0])
    alpha, linewidth = (0.20, 1.9) if len(found) < 25 else (0.24, 1.1)
    for position in found.tolist():
        lattice = smooth_mask(shown == position, pixel_mm, px_per_mm)
        if colors is None:
            axes.contour(*lattice, [0.5], colors=["white"], linewidths=0.9, linestyles=[_DASHES], zorder=3)
        else:
            color = colors[position - 1]
            axes.contourf(*lattice, [0.5, 10], colors=[color], alpha=alpha, zorder=1)
            axes.contour(*lattice, [0.5], colors=[color], linewidths=linewidth, zorder=2)


def _draw_directions(axes: Axes, panel: Panel, px_per_mm: float, affine: NDArray[np.float64], bar_mm: int) -> None:
    """Draw the letters at the edges, the name of the plane and the scale bar."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=3, foreground="#000000b0")]
    style: dict[str, Any] = {"family": FONT, "color": _TEXT, "path_effects": outline, "zorder": 5}
    inset = 14 / px_per_mm
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    middle, centre = (left + right) / 2, (top + bottom) / 2
    left, right, top, bottom = left + inset, right - inset, top + inset, bottom - inset
    places = ((left, centre), (right, centre), (middle, top), (middle, bottom))
    sides = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for (x, y), letters, (ha, va) in zip(places, edge_letters(affine, panel.view), sides, strict=True):
        axes.text(x, y, letters, ha=ha, va=va, fontsize=12.5, fontweight="bold", **style)
    tilt = tilt_remark(affine, panel.view)
    name = panel.view.name + (f"  ({tilt})" if tilt else "")
    axes.text(left, top, name, ha="left", va="top", fontsize=11.5, **{**style, "color": "#c9d1dc"})
    bar: dict[str, Any] = {"color": _TEXT, "linewidth": 2.6, "path_effects": outline, "zorder": 5}
    axes.plot([left, left + bar_mm], [bottom, bottom], solid_capstyle="butt", **bar)
    axes.text(left, bottom - 7 / px_per_mm, f"{bar_mm} mm", ha="left", va="bottom", fontsize=10.5, **style)


def _columns(notes: Mapping[int, Note]) -> int:
    longest = max((len(note.text) for note in notes.values()), default=0)
    return next((columns for most, columns in _LEGEND_COLUMNS if longest <= most), 2)


def _draw_legend(
    canvas: _Canvas,
    top_px: float,
    structures: Sequence[Structure],
    volumes_ml: NDArray[np.float64],
    notes: Mapping[int, Note],
) -> None:
    """Write colour, name, volume and note of the structures, or of the worst and largest and the number of others."""
    from matplotlib.patches import Rectangle

    columns = _columns(notes)
    listed, room = list(range(len(structures))), _LEGEND_ROWS * columns
    if len(structures) > room:
        rank = {value: VERDICTS.index(note.verdict) for value, note in notes.items()}
        key = [(-rank.get(one.value, 0), -volume) for one, volume in zip(structures, volumes_ml, strict=True)]
        listed = sorted(sorted(listed, key=key.__getitem__)[: room - 1])
    more = len(structures) - len(listed)
    count = len(listed) + (more > 0)
    rows = -(-count // columns)
    column_px = (_WIDTH_PX - 2 * _MARGIN_PX + 30) / columns
    volume_px = column_px - 42 - _LETTER_PX * max((len(note.text) for note in notes.values()), default=0)
    style: dict[str, Any] = {"va": "center_baseline", "fontsize": 12.5}

    def place(number: int) -> tuple[float, float]:
        column, row = divmod(number, rows)
        return _MARGIN_PX + column * column_px, top_px + _LEGEND_LINE_PX * row + 14

    for number, position in enumerate(listed):
        (x, y), one = place(number), structures[position]
        size = 14 / _WIDTH_PX, 14 / canvas.height_px
        color = [channel / 255 for channel in one.color]
        canvas.figure.add_artist(Rectangle(canvas.at(x, y + 7), *size, color=color, linewidth=0))
        name = canvas.text(x + 26, y, one.name, color=_TEXT, **style)
        if MISSING in name.get_text() and MISSING not in one.name:
            name.set_text(f"label {one.value}: {name.get_text()}")
        volume = f"{millilitres(float(volumes_ml[position]))} ml"
        right = canvas.text(x + volume_px, y, volume, color=_FAINT, ha="right", **style)
        _shorten(name, right.get_window_extent().x0 - 12)
        if (note := notes.get(one.value)) is not None:
            canvas.text(x + volume_px + 8, y, note.text, color=_NOTE_COLORS[note.verdict], **style)
    if more:
        x, y = place(len(listed))
        canvas.text(x + 26, y, f"and {more} more", color=_FAINT, **style)


def _shorten(text: Text, right_px: float) -> None:
    """Remove letters from the middle until a text ends before ``right_px``: names differ at both ends."""
    full = text.get_text()
    for kept in range(len(full) - 1, 3, -1):
        if text.get_window_extent().x1 <= right_px:
            return
        text.set_text(full[: kept - kept // 2] + "…" + full[len(full) - kept // 2 :])
