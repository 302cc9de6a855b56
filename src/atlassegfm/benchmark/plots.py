"""Pictures of a benchmark: Dice of each structure, and Dice of each pair against its time.

The same scores give the same file. Each column of the tables has a colour and a shape of its own, so that
they can be told apart in print and by readers who do not see all colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.files import atomic_path
from ..evaluate.statistics import spread
from ..report import require_report_extra
from .records import PairRecord as Record
from .tables import METHOD_NAMES, Column, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Width of a picture and its parts, in pixels.
_WIDTH_PX = 1600
_MARGIN_PX = 40
_LEGEND_LINE_PX = 30
_MARK_PX = 26
#: Names of structures take no more than this, those in the legend no more than that.
_NAMES_PX = 420
_LEGEND_NAME_PX = 560
#: Ticks and label of the horizontal axis.
_AXIS_PX = 74
_TIME_PLOT_PX = 720
_FAILED_PX = 46
_DPI = 100

_TEXT = "#1c2128"
_FAINT = "#5b6470"
_GRID = "#dfe3e8"
_BAND = "#f5f6f8"
_FONT = "DejaVu Sans"  # comes with matplotlib: the same letters on every machine

#: Okabe and Ito's palette without its yellow, which is too faint on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
#: Five shapes, as 5 and 7 have no common divisor: 35 columns before one looks like another.
_SHAPES = ("o", "s", "D", "^", "v")
#: Where there is one variant a method looks the same in every benchmark; the oracle is no method, and is grey.
_OF_METHOD = {"fused": (0, "o"), "atlas": (1, "s"), "model": (2, "D"), "paper": (3, "v")}
_ORACLE = ("#7a828c", "^")

#: What a variant gives in the end: the first of these that it has.
_FINAL = ("fused", "paper", "model", "atlas", "oracle")
#: Times that are farther apart than this factor are drawn on a logarithmic axis.
_LINEAR_RANGE = 4.0
#: Steps of the golden ratio spread successive dots evenly, and always in the same way.
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class _Look:
    """How a column is drawn."""

    color: str
    shape: str


@dataclass(frozen=True)
class _Key:
    """An entry of the legend.

    Parameters
    ----------
    name : str
        Of the column.
    value : str
        What to say of it, in bold letters.
    look : _Look
        Its mark.
    """

    name: str
    value: str
    look: _Look


@dataclass(frozen=True)
class _Rows:
    """Heights of the rows of structures, in pixels.

    Parameters
    ----------
    lane : float
        Of one column within a row.
    height : float
        Of a row.
    font : float
        Size of the names, points.
    """

    lane: float
    height: float
    font: float


@dataclass(frozen=True)
class _Group:
    """A variant in the picture of times.

    Parameters
    ----------
    name : str
        In the legend.
    label : str
        Beside the mean.
    look : _Look
        Its mark.
    seconds, dice : array, (N,)
        Of each pair that has both.
    mean : tuple of float
        Seconds and Dice, NaN where there is none.
    pairs, failed, unscored : int
        How many pairs there are, how many of them ended in an error, and in how many others nothing is scored.
    """

    name: str
    label: str
    look: _Look
    seconds: NDArray[np.float64]
    dice: NDArray[np.float64]
    mean: tuple[float, float]
    pairs: int
    failed: int
    unscored: int


def draw_dice(columns: Sequence[Column], dataset: str, path: Path) -> None:
    """Draw the Dice coefficients of each structure and write them as PNG.

    Parameters
    ----------
    columns : sequence of Column
        At least one.
    dataset : str
        Its name, for the title.
    path : Path
        Ends in ``.png``; written under a temporary name first.

    Raises
    ------
    InputError
        If the file cannot be written.
    MissingExtraError
        If matplotlib is not installed.
    """
    require_report_extra()
    _save(dice_figure(columns, dataset), path)


def draw_dice_and_time(columns: Sequence[Column], records: Sequence[Record], dataset: str, path: Path) -> None:
    """Draw the mean Dice coefficient of each pair over its time and write it as PNG.

    Parameters
    ----------
    columns : sequence of Column
        At least one. Of each variant the method it ends in is drawn.
    records : sequence of Record
        Of the same pairs.
    dataset : str
        Its name, for the title.
    path : Path
        Ends in ``.png``; written under a temporary name first.

    Raises
    ------
    InputError
        If the file cannot be written.
    MissingExtraError
        If matplotlib is not installed.
    """
    require_report_extra()
    _save(dice_and_time_figure(columns, records, dataset), path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        # The default metadata name the version of matplotlib; without it the file depends on the scores alone.
        figure.savefig(temporary, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})


# Dice of each structure


def dice_figure(columns: Sequence[Column], dataset: str) -> Figure:
    """The picture :func:`draw_dice` writes."""
    names = {one.value: one.structure for column in columns for one in column.summary.structures}
    values = sorted(names)
    tables = [_on_rows(column, values) for column in columns]
    looks = _looks(columns)
    several = len({column.variant for column in columns}) > 1
    rows = _row_heights(len(values), len(columns))
    keys = [
        _Key(title_of(column, several=several), _decimal(column.summary.means["dice"], 3), look)
        for column, look in zip(columns, looks, strict=True)
    ]
    notes = ["large mark: mean", "bar: middle half of the pairs", "dot: one pair"]
    if len(columns[0].pairs) == 1:
        notes = ["mark: the score of the pair"]
    blank = np.stack([np.isnan(table).all(axis=1) for table in tables])  # (columns, structures)
    if (blank.any(axis=0) & ~blank.all(axis=0)).any():
        notes.append("no mark: nothing to score")

    figure = _figure()
    head_px = _draw_head(
        figure, f"{dataset}: Dice of each structure", _count(len(columns[0].pairs), "pair"), keys, notes
    )
    plot_px = rows.height * len(values) + 8
    # In a tall picture the eye would lose the axis below.
    tall = head_px + plot_px > 1300
    top_px = head_px + (34 if tall else 6)
    height = math.ceil(top_px + plot_px + _AXIS_PX)
    labels = [_measured(figure, names[value], rows.font, _NAMES_PX) for value in values]
    left = _MARGIN_PX + max(width for _, width in labels) + 14
    _set_height(figure, height)
    axes = _add_axes(figure, left, top_px, _WIDTH_PX - _MARGIN_PX - left, plot_px)

    scored = np.concatenate([table.ravel() for table in tables])
    _dice_axis(axes, scored)
    axes.set_ylim(len(values) - 0.5 + 4 / rows.height, -0.5 - 4 / rows.height)
    axes.set_yticks(range(len(values)), [label for label, _ in labels])
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.tick_params(axis="y", length=0, pad=8, labelsize=rows.font)
    axes.tick_params(axis="x", labeltop=tall)
    for row in range(0, len(values), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=_BAND, linewidth=0, zorder=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.9, zorder=0.5)

    for number, (table, look) in enumerate(zip(tables, looks, strict=True)):
        middle = (number - (len(columns) - 1) / 2) * rows.lane / rows.height
        _draw_column(axes, table, look, middle, rows)
    for row in range(len(values)):
        if blank[:, row].all():
            axes.text(
                *(0.008, row),
                "nothing to score in any pair",
                transform=axes.get_yaxis_transform(),
                **_plain(min(rows.font, 10.5), _FAINT, va="center", style="italic"),
            )
    return figure


def _on_rows(column: Column, values: Sequence[int]) -> NDArray[np.float64]:
    """(structures, pairs) Dice; rows of structures that the column does not have are NaN."""
    table = np.full((len(values), len(column.pairs)), math.nan)
    own = [values.index(one.value) for one in column.summary.structures]
    table[own] = column.table("dice")
    return table


def _row_heights(structures: int, columns: int) -> _Rows:
    """Fewer and smaller lanes the more there are: the picture grows, but not without end."""
    if structures <= 6:
        smallest, budget, thinnest, thickest = 52.0, 140.0, 9.0, 20.0
    elif structures <= 20:
        smallest, budget, thinnest, thickest = 36.0, 96.0, 8.0, 15.0
    elif structures <= 60:
        smallest, budget, thinnest, thickest = 25.0, 60.0, 5.0, 9.0
    else:
        smallest, budget, thinnest, thickest = 18.0, 26.0, 3.2, 6.0
    lane = min(max(budget / columns, thinnest), thickest)
    height = max(smallest, columns * lane + (10 if structures <= 60 else 5))
    return _Rows(lane, height, min(13.0, _points(0.72 * height)))


def _draw_column(axes: Axes, table: NDArray[np.float64], look: _Look, middle: float, rows: _Rows) -> None:
    """Dots, bars and means of one column; ``middle`` of its lane in rows from the middle of the row."""
    structures, pairs = table.shape
    y = np.arange(structures) + middle
    spreads = [spread(row) for row in table]
    size_px = min(max(0.85 * rows.lane, 6.5), 13.0)
    color = look.color
    if pairs > 1:
        # Up and down within the lane, or equal scores would hide each other.
        swing = 0.62 * rows.lane / rows.height * (np.arange(pairs) * _GOLDEN % 1 - 0.5)
        axes.plot(
            table.ravel(),
            (y[:, None] + swing).ravel(),
            linestyle="none",
            marker="o",
            color=color,
            alpha=min(0.5, max(0.16, 15 / pairs)),
            markersize=_points(min(max(0.42 * rows.lane, 3.0), 5.5)),
            markeredgewidth=0,
            zorder=2,
        )
    known = [n for n, one in enumerate(spreads) if one.count > 1]
    axes.hlines(
        y[known],
        [spreads[n].quartile for n in known],
        [spreads[n].upper_quartile for n in known],
        color=color,
        alpha=0.55,
        linewidth=_points(min(max(0.34 * rows.lane, 1.8), 4.5)),
        zorder=3,
    )
    axes.plot(
        [one.mean for one in spreads],
        y,
        linestyle="none",
        marker=look.shape,
        color=color,
        markersize=_points(size_px),
        markeredgecolor="white",
        markeredgewidth=0.9 if size_px > 8 else 0.5,
        zorder=4,
        clip_on=False,
    )


def _dice_axis(axes: Axes, scored: NDArray[np.float64]) -> None:
    """From 0 to 1, or the upper part of it if all scores are there."""
    known = scored[~np.isnan(scored)]
    lowest = float(known.min()) if len(known) else 0.0
    start = min(0.5, math.floor((lowest - 0.015) * 10) / 10) if lowest >= 0.115 else 0.0
    step = 0.05 if start >= 0.5 else 0.1
    ticks = np.arange(round(start / step), round(1 / step) + 1) * step
    axes.set_xlim(start - (0.012 if start == 0 else 0), 1.006)
    axes.set_xticks(ticks, [f"{tick:.2f}" if step < 0.1 else f"{tick:.1f}" for tick in ticks])
    _finish_axes(axes)
    axes.set_xlabel("Dice coefficient", labelpad=8, **_label())


# Dice against time


def dice_and_time_figure(columns: Sequence[Column], records: Sequence[Record], dataset: str) -> Figure:
    """The picture :func:`draw_dice_and_time` writes."""
    groups = _groups(columns, records)
    keys = []
    for group in groups:
        words = [f"{group.failed} failed (×)"] if group.failed else []
        words += [f"{group.unscored} without a score"] if group.unscored else []
        keys.append(_Key(group.name, ", ".join(words), group.look))
    failed = sum(group.failed for group in groups)
    notes = ["large mark: mean", "dot: one pair"] if len(columns[0].pairs) > 1 else ["mark: the pair"]
    if failed:
        notes.append("Dice of failed pairs counts as 0 in the mean, their time does not count")
    figure = _figure()
    title = f"{dataset}: Dice against time"
    top_px = _draw_head(figure, title, _count(len(columns[0].pairs), "pair"), keys, notes) + 10
    _set_height(figure, math.ceil(top_px + _TIME_PLOT_PX + _AXIS_PX))
    left = _MARGIN_PX + 76
    axes = _add_axes(figure, left, top_px, _WIDTH_PX - _MARGIN_PX - left, _TIME_PLOT_PX)
    _finish_axes(axes)
    axes.grid(color=_GRID, linewidth=0.9, zorder=0.5)
    axes.set_ylabel("mean Dice coefficient of the pair", labelpad=10, **_label())
    shown = [group for group in groups if not math.isnan(group.mean[0] + group.mean[1])]
    _mean_axis(axes, [y for group in shown for y in (*group.dice, group.mean[1])], _FAILED_PX if failed else 0)
    _time_axis(axes, [x for group in shown for x in (*group.seconds, group.mean[0])])
    for group in groups:
        axes.plot(
            group.seconds,
            group.dice,
            linestyle="none",
            marker=group.look.shape,
            color=group.look.color,
            alpha=min(0.5, max(0.16, 30 / group.pairs)),
            markersize=_points(8),
            markeredgewidth=0,
            zorder=2,
        )
    if failed:
        _draw_failed(axes, groups)
    if not shown:
        nothing = "no pair has a score"
        axes.text(0.5, 0.5, nothing, transform=axes.transAxes, **_plain(13, _FAINT, ha="center", va="center"))
    _draw_means(axes, shown)
    return figure


def _groups(columns: Sequence[Column], records: Sequence[Record]) -> list[_Group]:
    variants = list(dict.fromkeys(column.variant for column in columns))
    finals = []
    for variant in variants:
        own = {column.method: column for column in columns if column.variant == variant}
        finals.append(next(own[method] for method in _FINAL if method in own))
    groups = []
    for column, look in zip(finals, _looks(finals), strict=True):
        own_records = {record.pair: record for record in records if record.variant == column.variant}
        done = [own_records[pair] for pair in column.pairs]
        failed = np.array([bool(record.failure) for record in done])
        seconds = np.array([record.total_seconds for record in done])
        dice = column.pair_means()
        usable = ~failed & ~np.isnan(dice)
        # As in the tables: Dice over structures, time over the pairs that ended well.
        mean = (float(seconds[~failed].mean()) if not failed.all() else math.nan, column.summary.means["dice"])
        several = len(variants) > 1
        groups.append(
            _Group(
                title_of(column, several=several),
                column.variant if several else METHOD_NAMES[column.method],
                look,
                seconds[usable],
                dice[usable],
                mean,
                len(done),
                int(failed.sum()),
                int((~failed & np.isnan(dice)).sum()),
            )
        )
    return groups


def _time_axis(axes: Axes, seconds: Sequence[float]) -> None:
    """Logarithmic where times differ much."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = (min(seconds), max(seconds)) if seconds else (0.0, 1.0)
    logarithmic = high > _LINEAR_RANGE * max(low, 0.0) and high > 0 and bool(seconds)
    if logarithmic:
        # Less than a millisecond is not measured.
        low = max(low, 1e-3)
        margin = (high / low) ** 0.06
        low, high = low / margin, high * margin
        axes.set_xscale("log")
        wide = high / low > 60
        digits = (1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (digits if high / low < 3000 else (1,))]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        margin = max(0.08 * (high - low), 0.04 * high, 5e-3)
        low, high = max(low - margin, 0.0), high + margin
        axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    scale = ", logarithmic" if logarithmic else ""
    axes.set_xlabel(f"time of the pair (seconds{scale})", labelpad=8, **_label())


def _mean_axis(axes: Axes, dice: Sequence[float], below_px: float) -> None:
    """The part of 0 to 1 where the scores are, with room below for the failed pairs."""
    low, high = (min(dice), max(dice)) if dice else (0.0, 1.0)
    margin = max(0.09 * (high - low), 0.03)
    # Ticks at no more than 9 round values.
    low, high = max(low - margin, -0.02), min(high + margin, 1.02)
    step = next(step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 9)
    first, last = math.ceil(max(low, 0.0) / step - 1e-9), math.floor(min(high, 1.0) / step + 1e-9)
    ticks = np.arange(first, last + 1) * step
    axes.set_yticks(ticks, [f"{tick:.{3 if step < 0.01 else 2}f}" for tick in ticks])
    axes.set_ylim(low - (high - low) * below_px / (_TIME_PLOT_PX - below_px), high)


def _draw_failed(axes: Axes, groups: Sequence[_Group]) -> None:
    """A strip at the bottom: a failed pair has neither a time nor a score that could place it."""
    share = _FAILED_PX / _TIME_PLOT_PX
    low, high = axes.get_ylim()
    line = low + share * (high - low)
    axes.axhspan(low, line, color=_BAND, linewidth=0, zorder=1)
    axes.axhline(line, color=_FAINT, linewidth=0.8, zorder=1.5)
    axes.text(0.008, share / 2, "failed", transform=axes.transAxes, **_plain(11.5, _FAINT, va="center", style="italic"))
    width = axes.get_window_extent().width
    total = sum(group.failed for group in groups)
    step = min(18 / width, (1 - 110 / width) / total)
    number = 0
    for group in groups:
        x = 90 / width + step * np.arange(number, number + group.failed)
        number += group.failed
        axes.plot(
            x,
            np.full(len(x), share / 2),
            transform=axes.transAxes,
            linestyle="none",
            marker="x",
            color=group.look.color,
            markersize=_points(11),
            markeredgewidth=2,
            zorder=3,
            gid="failed",
        )


def _draw_means(axes: Axes, groups: Sequence[_Group]) -> None:
    """Large marks, each with its words where they hide least."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=4, foreground="white")]
    for group in groups:
        axes.plot(
            [group.mean[0]],
            [group.mean[1]],
            linestyle="none",
            marker=group.look.shape,
            color=group.look.color,
            markersize=_points(22),
            markeredgecolor="white",
            markeredgewidth=2,
            zorder=5,
            clip_on=False,
        )
    frame = axes.get_window_extent()
    at = [axes.transData.transform(group.mean) for group in groups]
    dots = np.concatenate(
        [np.zeros((0, 2))]
        + [axes.transData.transform(np.stack([one.seconds, one.dice], axis=1)) for one in groups if len(one.dice)]
    )
    taken = [_Box(x - 13, y - 13, x + 13, y + 13) for x, y in at]
    for group, (x, y) in zip(groups, at, strict=True):
        words = f"{group.label}: {group.mean[1]:.2f} in {_seconds(group.mean[0])}"
        text = axes.text(
            0,
            0,
            words,
            path_effects=outline,
            transform=None,
            zorder=6,
            **_plain(13, _darker(group.look.color), va="center", ha="center", weight="bold"),
        )
        _shorten(text, 0.6 * frame.width)
        extent = text.get_window_extent()
        box = _best_place(extent.width, extent.height, (x, y), _Box(*frame.extents), taken, dots)
        taken.append(box)
        middle = (box.left + box.right) / 2, (box.low + box.high) / 2
        text.set_position(middle)
        text.set_gid("mean")
        nearest = float(np.clip(x, box.left, box.right)), float(np.clip(y, box.low, box.high))
        if math.dist(nearest, (x, y)) > 24:
            # Too far from its mark to be understood without a line.
            start = axes.transData.inverted().transform([nearest, (x, y)])
            axes.plot(start[:, 0], start[:, 1], color=group.look.color, linewidth=1.2, zorder=4.5)


@dataclass(frozen=True)
class _Box:
    """Part of the picture, in pixels from its lower left corner."""

    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: _Box) -> float:
        """Common area."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return max(across, 0.0) * max(min(self.high, other.high) - max(self.low, other.low), 0.0)


def _best_place(
    width: float,
    height: float,
    mark: tuple[float, float],
    frame: _Box,
    taken: Sequence[_Box],
    dots: NDArray[np.float64],
) -> _Box:
    """Where words go: near their mark, not on others and on few dots."""
    best, least = None, math.inf
    for reach in range(20, 320, 15):
        for angle in range(0, 360, 15):
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # From the mark in this direction, until the box begins at this distance.
            x = mark[0] + across * (reach + width / 2)
            y = mark[1] + up * (reach + height / 2)
            x = min(max(x, frame.left + width / 2 + 8), frame.right - width / 2 - 8)
            y = min(max(y, frame.low + height / 2 + 8), frame.high - height / 2 - 8)
            box = _Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            wide = _Box(box.left - 6, box.low - 4, box.right + 6, box.high + 4)
            inside = (dots > (box.left, box.low)) & (dots < (box.right, box.high))
            cost = 1e3 * sum(wide.overlap(other) for other in taken) + 6 * float(inside.all(axis=1).sum()) + 0.6 * reach
            if cost < least:
                best, least = box, cost
    assert best is not None
    return best


# Parts of both


def _looks(columns: Sequence[Column]) -> list[_Look]:
    if len({column.variant for column in columns}) == 1:
        looks = []
        for column in columns:
            number, shape = _OF_METHOD.get(column.method, (-1, ""))
            looks.append(_Look(_COLORS[number], shape) if shape else _Look(*_ORACLE))
        return looks
    return [_Look(_COLORS[n % len(_COLORS)], _SHAPES[n % len(_SHAPES)]) for n in range(len(columns))]


def _figure() -> Figure:
    """An empty picture; its height is set when it is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_PX / _DPI, 1), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _set_height(figure: Figure, height_px: int) -> None:
    """Give the picture its height, and keep what is drawn already at its distance from the upper edge."""
    from matplotlib.lines import Line2D

    before = figure.get_size_inches()[1] * _DPI
    figure.set_size_inches(_WIDTH_PX / _DPI, height_px / _DPI)
    for artist in figure.texts:
        artist.set_y(artist.get_position()[1] + height_px - before)
    for mark in figure.artists:
        if isinstance(mark, Line2D):
            mark.set_ydata(np.asarray(mark.get_ydata(), np.float64) + height_px - before)


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the upper left corner."""
    total = figure.get_size_inches()[1] * _DPI
    return figure.add_axes((left / _WIDTH_PX, 1 - (top + height) / total, width / _WIDTH_PX, height / total))


def _finish_axes(axes: Axes) -> None:
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"bottom", "left"})
        spine.set_color(_FAINT)
    axes.tick_params(color=_FAINT, length=4, labelsize=11.5, labelfontfamily=_FONT, labelcolor=_TEXT)


def _draw_head(figure: Figure, title: str, subtitle: str, keys: Sequence[_Key], notes: Sequence[str]) -> float:
    """Title, legend and what marks mean; returns where it ends, in pixels from the upper edge."""
    total = figure.get_size_inches()[1] * _DPI
    style: dict[str, Any] = {"transform": None, "va": "baseline"}
    count = figure.text(0, total - 46, subtitle, **(_plain(14, _FAINT) | style))
    room = _WIDTH_PX - 2 * _MARGIN_PX - count.get_window_extent().width - 20
    head = figure.text(_MARGIN_PX, total - 46, _one_line(title), **(_plain(20, _TEXT, weight="bold") | style))
    _shorten(head, room)
    count.set_x(head.get_window_extent().x1 + 20)
    widths = [
        _measured(figure, key.name, 13, _LEGEND_NAME_PX)[1] + _measured(figure, key.value, 13, 9999, "bold")[1]
        for key in keys
    ]
    cell = _MARK_PX + max(widths) + 10 + 40
    fitting = max(1, int((_WIDTH_PX - 2 * _MARGIN_PX + 40) // cell))
    # Full lines as far as possible: 12 entries are better 4 + 4 + 4 than 5 + 5 + 2.
    lines = -(-len(keys) // fitting)
    across = -(-len(keys) // lines)
    for number, key in enumerate(keys):
        line, column = divmod(number, across)
        x, y = _MARGIN_PX + column * cell, total - 88 - line * _LEGEND_LINE_PX
        _draw_mark(figure, x + 8, y + 5, key.look)
        name = figure.text(x + _MARK_PX, y, _one_line(key.name), **(_plain(13, _TEXT) | style))
        _shorten(name, _LEGEND_NAME_PX)
        if key.value:
            figure.text(name.get_window_extent().x1 + 10, y, key.value, **(_plain(13, _TEXT, weight="bold") | style))
    y = 88 + lines * _LEGEND_LINE_PX
    figure.text(_MARGIN_PX, total - y, "  ·  ".join(notes), **(_plain(11, _FAINT) | style))
    return y + 16


def _draw_mark(figure: Figure, x: float, y: float, look: _Look) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    style: dict[str, Any] = {"marker": look.shape, "color": look.color, "markersize": _points(13)}
    figure.add_artist(Line2D([x], [y], linestyle="none", transform=IdentityTransform(), markeredgewidth=0, **style))


def _plain(size: float, color: str, **more: Any) -> dict[str, Any]:
    """Style of a text; a name may hold a dollar sign, which is not mathematics."""
    return {"family": _FONT, "fontsize": size, "color": color, "parse_math": False} | more


def _label() -> dict[str, Any]:
    return {"family": _FONT, "fontsize": 12.5, "color": _TEXT}


def _measured(figure: Figure, words: str, size: float, longest_px: float, weight: str = "normal") -> tuple[str, float]:
    """Words, shortened if they are too long, and their width in pixels."""
    text = figure.text(0, 0, _one_line(words), weight=weight, **_plain(size, _TEXT))
    _shorten(text, longest_px)
    measured = text.get_text(), float(text.get_window_extent().width) if words else 0.0
    text.remove()
    return measured


def _shorten(text: Text, longest_px: float) -> None:
    """Take letters out of the middle until a text fits; names often differ at both ends."""
    full = text.get_text()
    for kept in range(len(full) - 1, 3, -1):
        if text.get_window_extent().width <= longest_px:
            return
        text.set_text(full[: kept - kept // 2] + "…" + full[len(full) - kept // 2 :])


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _darker(color: str) -> str:
    """The same hue, to be read on white."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(color)
    return to_hex((0.62 * red, 0.62 * green, 0.62 * blue))


def _points(pixels: float) -> float:
    return pixels * 72 / _DPI


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _decimal(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _seconds(value: float) -> str:
    """Two digits where they say something."""
    return f"{value:.0f} s" if value >= 9.95 else f"{value:.1f} s" if value >= 0.95 else f"{value:.2g} s"
