"""Plots of a benchmark: Dice of each structure, and of each pair against its time. Equal scores give equal files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.files import atomic_path
from ..core.fonts import drawable
from ..core.labels import shortened
from ..core.text import counted
from ..evaluate.statistics import spread
from ..report import require_report_extra
from .plan import IN_CONTEXT
from .records import PairRecord
from .tables import Column, decimal, name_of, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_INCHES, _DPI = 16.0, 100
#: Letters of the longest names of structures and columns, of the longest title, and across the figure.
_LONGEST_NAME, _LONGEST_TITLE, _LETTERS_ACROSS = 40, 90, 170
#: Times that differ by more than this factor are drawn on a logarithmic axis.
_LINEAR_RANGE = 4.0
#: Successive dots move across their lane by steps of the golden ratio: evenly, and always in the same way.
_GOLDEN = (math.sqrt(5) - 1) / 2
#: Colour [Okabe and Ito, without yellow] and marker of each method where there is one variant.
_METHOD_LOOKS = {
    "fused": ("#0072b2", "o"),
    "atlas": ("#d55e00", "s"),
    "model": ("#009e73", "D"),
    "paper": ("#cc79a7", "v"),
    "oracle": ("#7a828c", "^"),
}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = ("o", "s", "D", "^", "v")
#: Of each variant the first of these that it has is drawn against time.
_FINAL = ("fused", "paper", "model", "atlas", "oracle", IN_CONTEXT)
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 12,
    "text.parse_math": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.2,
    "grid.color": "#dfe3e8",
    "legend.frameon": False,
    "legend.handletextpad": 0.2,
}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; InputError if it cannot be written."""
    from matplotlib import rc_context

    with rc_context(_STYLE), atomic_path(path) as temporary:
        # Without matplotlib's version in the metadata the file depends on the scores alone.
        figure.savefig(temporary, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})


def dice_figure(columns: Sequence[Column], dataset: str) -> Figure:
    """Draw the Dice coefficients: a row for each structure, a lane for each of at least one column.

    MissingExtraError if matplotlib is not installed.
    """
    require_report_extra()
    from matplotlib import rc_context

    names, pairs = [one.structure for one in columns[0].summary.structures], columns[0].pairs
    several = len({column.variant for column in columns}) > 1
    # Lanes get thinner the more there are, so that pictures of many structures stay readable.
    budget_px = min(max(2500 / len(names), 24.0), 100.0)
    lane_px = min(max(budget_px / len(columns), 4.0), 16.0)
    row_px = max(lane_px * len(columns) + 8, 20.0)
    with rc_context(_STYLE):
        axes = _new_axes(row_px * len(names) / _DPI)
        tables = [column.table("dice") for column in columns]
        handles = []
        for number, (column, table, look) in enumerate(zip(columns, tables, _looks(columns), strict=True)):
            middle = (number - (len(columns) - 1) / 2) * lane_px / row_px
            mean = _short(title_of(column, several=several)) + f"  {decimal(column.summary.means['dice'], 3)}"
            handles.append(_draw_lane(axes, table, look, middle, lane_px / row_px, mean))
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        for row in range(0, len(names), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", linewidth=0, zorder=0)
        lowest = np.nanmin([1.0, *(score for table in tables for score in table.ravel())])
        axes.set_xlim(min(0.5, math.floor(10 * lowest) / 10) - 0.01, 1.01)
        notes = ["large mark: mean", "bar: middle half of the pairs", "dot: one pair"] if len(pairs) > 1 else []
        if any(np.isnan(table).all(axis=1).any() for table in tables):
            notes.append("no mark: nothing to score")
        axes.set_xlabel("Dice coefficient" + (f" ({', '.join(notes)})" if notes else ""))
        return _finished(axes, handles, f"{dataset}: Dice of each structure, {counted(len(pairs), 'pair')}")


def dice_and_time_figure(columns: Sequence[Column], records: Sequence[PairRecord], dataset: str) -> Figure:
    """Draw the mean Dice coefficient of each pair over its time, by the method that each variant ends in.

    The records are of the same pairs. MissingExtraError if matplotlib is not installed.
    """
    require_report_extra()
    from matplotlib import rc_context

    by_variant: dict[str, dict[str, Column]] = {}
    for column in columns:
        by_variant.setdefault(column.variant, {})[column.method] = column
    finals = [next(own[method] for method in _FINAL if method in own) for own in by_variant.values()]
    pairs, times, any_failed = columns[0].pairs, [], False
    with rc_context(_STYLE):
        axes = _new_axes(7.2)
        handles = []
        for column, (color, marker) in zip(finals, _looks(finals), strict=True):
            own = {record.pair: record for record in records if record.variant == column.variant}
            failed = np.array([bool(own[pair].failure) for pair in column.pairs])
            seconds = np.array([own[pair].total_seconds for pair in column.pairs])[~failed]
            dice = column.pair_means()[~failed]
            scored = ~np.isnan(dice)
            axes.plot(seconds[scored], dice[scored], marker, color=color, alpha=0.5, markersize=7, markeredgewidth=0)
            # As in the tables: Dice over structures of all pairs, time over the pairs that did not fail.
            mean = (float(seconds.mean()) if len(seconds) else math.nan, column.summary.means["dice"])
            words = [name_of(column.method) if len(finals) == 1 else _short(title_of(column))]
            if not math.isnan(sum(mean)):
                words.append(f"{mean[1]:.2f} in {_seconds(mean[0])}")
                times += [*seconds[scored], mean[0]]
            words += [f"{failed.sum()} failed"] if failed.any() else []
            words += [f"{(~scored).sum()} without a score"] if not scored.all() else []
            any_failed |= bool(failed.any())
            look: Any = {"color": color, "markersize": 13, "markeredgecolor": "white", "zorder": 3}
            handles += axes.plot([mean[0]], [mean[1]], marker, label="  ".join(words), **look)
        axes.grid()
        axes.set_ylabel("mean Dice coefficient of the pair")
        scale = ""
        if times and max(times) > _LINEAR_RANGE * max(min(times), 0.0):
            scale = ", logarithmic"
            _use_logarithmic_times(axes, max(times) / min(times))
        if not times:
            axes.text(0.5, 0.5, "no pair has a score", transform=axes.transAxes, ha="center")
        note = "; Dice of failed pairs counts as 0 in the mean, their time does not count" if any_failed else ""
        axes.set_xlabel(f"time of the pair (seconds{scale}; large mark: mean, small mark: one pair{note})")
        return _finished(axes, handles, f"{dataset}: Dice against time, {counted(len(pairs), 'pair')}")


def _use_logarithmic_times(axes: Axes, ratio: float) -> None:
    """Scale the horizontal axis for times up to ``ratio`` apart, with ticks at plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 50 else (1, 3)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_lane(
    axes: Axes, table: NDArray[np.float64], look: tuple[str, str], middle: float, height: float, label: str
) -> Any:
    """Draw dots, quartile bars and means of one column; ``middle`` and ``height`` of its lane are in rows."""
    color, marker = look
    structures, pairs = table.shape
    y = np.arange(structures) + middle
    if pairs > 1:
        swing = 0.6 * height * (np.arange(pairs) * _GOLDEN % 1 - 0.5)
        dots = (y[:, None] + swing).ravel()
        axes.plot(table.ravel(), dots, "o", color=color, alpha=0.5, markersize=3.5, markeredgewidth=0)
    spreads = [spread(row) for row in table]
    bars = ([one.quartile for one in spreads], [one.upper_quartile for one in spreads])
    axes.hlines(y, *bars, color=color, alpha=0.55, linewidth=2.5)
    means = [one.mean for one in spreads]
    (handle,) = axes.plot(means, y, marker, color=color, label=label, markersize=8, markeredgecolor="white", zorder=3)
    return handle


def _looks(columns: Sequence[Column]) -> list[tuple[str, str]]:
    """Colour and marker of each column."""
    if len({column.variant for column in columns}) == 1 and all(one.method in _METHOD_LOOKS for one in columns):
        return [_METHOD_LOOKS[column.method] for column in columns]
    return list(islice(zip(cycle(_COLORS), cycle(_MARKERS), strict=False), len(columns)))


def _new_axes(height_inches: float) -> Axes:
    """Axes of a new figure, with room for labels below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _finished(axes: Axes, handles: Sequence[Any], title: str) -> Figure:
    """Add title and legend above the axes, and give the figure."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    longest = max(len(handle.get_label()) for handle in handles)
    across = max(1, min(len(handles), _LETTERS_ACROSS // (longest + 8)))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=across,
        title=_short(title, _LONGEST_TITLE),
        alignment="left",
        title_fontproperties={"size": 18, "weight": "bold"},
    )
    figure.set_figheight(figure.get_figheight() + 0.9 + 0.25 * math.ceil(len(handles) / across))
    return figure


def _short(words: str, longest: int = _LONGEST_NAME) -> str:
    """Words on one line, without the middle if they are too long."""
    return shortened(drawable(words), longest)


def _seconds(value: float) -> str:
    """Two digits."""
    return f"{value:.0f} s" if value >= 9.95 else f"{value:.1f} s" if value >= 0.95 else f"{value:.2g} s"
