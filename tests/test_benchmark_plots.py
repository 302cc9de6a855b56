"""Pictures of a benchmark: everything is in them, whatever is missing, and the same scores give the same file."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlassegfm.benchmark.plan import METHODS
from atlassegfm.benchmark.plots import dice_and_time_figure, dice_figure, save_figure
from atlassegfm.benchmark.protocols import Pair
from atlassegfm.benchmark.records import PairRecord, Row
from atlassegfm.benchmark.tables import Column, main_table, name_of
from atlassegfm.core.errors import InputError, MissingExtraError
from atlassegfm.evaluate.metrics import StructureScores

pytest.importorskip("matplotlib")


def scores(dice: float) -> StructureScores:
    return StructureScores("ok", dice, dice, 1.0, 2.0, 1.0, 2.0, 10, 10, 1.0, 1.0, None, "")


def benchmark(
    structures: int = 3,
    pairs: int = 5,
    variants: Sequence[str] = ("default",),
    methods: Sequence[str] = METHODS,
    *,
    absent: Sequence[int] = (),
    failed: int = 0,
    seconds: float = 1.0,
) -> tuple[list[Column], list[PairRecord]]:
    """Made-up scores; ``absent`` structures have none, the first ``failed`` pairs of each variant ended in an error.

    Times grow from variant to variant and from pair to pair by ``seconds``.
    """
    random = np.random.default_rng(0)
    cases = tuple(Pair("atlas", f"query {n}") for n in range(pairs))
    columns, records = [], []
    for place, variant in enumerate(variants):
        for method in methods:
            rows = tuple(
                Row(pair.query, 2 * value + 1, f"organ ${value}$ left", scores(dice), method)
                for n, pair in enumerate(cases)
                for value in range(structures)
                for dice in [math.nan if value in absent else 0.0 if n < failed else float(random.uniform(0.6, 0.9))]
            )
            columns.append(Column(variant, method, cases, rows))
        for n, pair in enumerate(cases):
            took = 0.0 if n < failed else 20 + seconds * (n + 10 * place)
            failure = "broken" if n < failed else ""
            records.append(PairRecord(variant=variant, pair=pair, rows=(), failure=failure, total_seconds=took))
    return columns, records


def legend(figure: Any) -> list[str]:
    (one,) = figure.legends
    return [text.get_text() for text in one.get_texts()]


@pytest.mark.parametrize(
    ("structures", "pairs", "variants", "methods"),
    [
        (1, 1, ["default"], ["atlas"]),
        (2, 5, ["default"], METHODS),
        (13, 9, [f"variant number {n}" for n in range(12)], ["fused"]),
        (130, 2, ["default"], ["fused"]),
    ],
)
def test_both_pictures_are_written_and_depend_on_the_scores_alone(
    structures: int, pairs: int, variants: Sequence[str], methods: Sequence[str], tmp_path: Path
) -> None:
    from matplotlib.image import imread

    columns, records = benchmark(structures, pairs, variants, methods)
    again = structures == 2
    for name in ("a", "b") if again else ("a",):
        save_figure(dice_figure(columns, "Data"), tmp_path / f"{name}.png")
        save_figure(dice_and_time_figure(columns, records, "Data"), tmp_path / f"{name}-time.png")
    for ending in (".png", "-time.png"):
        content = (tmp_path / f"a{ending}").read_bytes()
        assert not again or content == (tmp_path / f"b{ending}").read_bytes()
        assert not any(key in content for key in (b"tEXt", b"tIME", b"iTXt"))
    picture = np.asarray(imread(tmp_path / "a.png"))
    assert picture.shape[1] == 1600
    assert 20 * structures < picture.shape[0] < 400 + 160 * structures


def test_dice_has_a_row_for_each_structure_and_a_mark_for_each_mean() -> None:
    columns, _ = benchmark(3, 5)
    figure = dice_figure(columns, "Data $1$")
    axes = figure.axes[0]
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == [f"organ ${n}$ left" for n in range(3)]
    assert not any(label.get_parse_math() for label in labels)
    # The first structure is at the top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    dots, means = axes.lines[::2], axes.lines[1::2]
    assert len(axes.collections) == len(dots) == len(means) == len(columns)
    for column, dot, mean in zip(columns, dots, means, strict=True):
        np.testing.assert_array_equal(np.asarray(dot.get_xdata()), column.table("dice").ravel())
        np.testing.assert_allclose(np.asarray(mean.get_xdata()), column.table("dice").mean(axis=1))
    assert len({(line.get_color(), line.get_marker()) for line in means}) == len(columns)
    assert legend(figure) == [f"{name_of(column.method)}  {column.summary.means['dice']:.3f}" for column in columns]
    assert figure.legends[0].get_title().get_text() == "Data $1$: Dice of each structure, 5 pairs"


def test_several_models_have_a_line_and_a_look_each() -> None:
    columns, records = benchmark(methods=("atlas", "builtin", "litemedsam", "model", "fused"))
    assert [line[0] for line in main_table(columns)[1:]] == ["atlas only", "builtin", "litemedsam", "model", "fused"]
    legend = dice_figure(columns, "data").axes[0].get_legend_handles_labels()[0]
    looks = {(handle.get_color(), handle.get_marker()) for handle in legend}
    assert len(looks) == len(columns)
    dice_and_time_figure(columns, records, "data")


def test_several_variants_are_named_and_differ() -> None:
    names = [f"variant {n}" for n in range(20)]
    columns, records = benchmark(2, 3, names, ["fused"])
    for figure in (dice_figure(columns, "D"), dice_and_time_figure(columns, records, "D")):
        assert [text.split("  ")[0] for text in legend(figure)] == [f"{name}: fused" for name in names]
        assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines[1::2]}) == len(names)


def test_structures_without_scores(tmp_path: Path) -> None:
    columns, records = benchmark(3, 4, absent=[1])
    assert "nothing to score" in dice_figure(columns, "Data").axes[0].get_xlabel()
    assert "nothing to score" not in dice_figure(benchmark(3, 4)[0], "Data").axes[0].get_xlabel()
    columns, records = benchmark(2, 3, absent=[0, 1])
    save_figure(dice_figure(columns, "Data"), tmp_path / "a.png")
    figure = dice_and_time_figure(columns, records, "Data")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no pair has a score"]
    assert legend(figure) == ["fused  3 without a score"]


def test_time_shows_each_pair_of_the_method_a_variant_ends_in() -> None:
    columns, records = benchmark(3, 5)
    figure = dice_and_time_figure(columns, records, "Data")
    axes = figure.axes[0]
    np.testing.assert_array_equal(np.asarray(axes.lines[0].get_xdata()), [20, 21, 22, 23, 24])
    (fused,) = (column for column in columns if column.method == "fused")
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), fused.pair_means())
    assert legend(figure) == [f"fused  {fused.summary.means['dice']:.2f} in 22 s"]
    atlas = dice_and_time_figure(columns[:1], records, "Data").axes[0]
    np.testing.assert_allclose(np.asarray(atlas.lines[0].get_ydata()), columns[0].pair_means())


@pytest.mark.parametrize(("seconds", "scale"), [(14, "linear"), (16, "log"), (5000, "log")])
def test_times_far_apart_are_on_a_logarithmic_axis(seconds: float, scale: str) -> None:
    columns, records = benchmark(2, 5, methods=["fused"], seconds=seconds)
    axes = dice_and_time_figure(columns, records, "Data").axes[0]
    assert axes.get_xscale() == scale
    assert ("logarithmic" in axes.get_xlabel()) == (scale == "log")
    assert 3 <= len([tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]) <= 14


def test_failed_pairs_are_counted_and_have_no_time() -> None:
    columns, records = benchmark(3, 5, ["one", "two"], ["fused"], failed=2)
    figure = dice_and_time_figure(columns, records, "Data")
    assert [text.endswith("2 failed") for text in legend(figure)] == [True, True]
    assert len(np.asarray(figure.axes[0].lines[0].get_xdata())) == 3
    # The mean of the times leaves them out.
    assert " in 23 s" in legend(figure)[0]
    assert "failed pairs" in figure.axes[0].get_xlabel()
    columns, records = benchmark(3, 5, failed=5)
    figure = dice_and_time_figure(columns, records, "Data")
    assert legend(figure) == ["fused  5 failed"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["no pair has a score"]


def test_legend_and_title_fit_and_cover_no_scores() -> None:
    columns, records = benchmark(3, 8, [f"variant number {n}" for n in range(12)], ["fused"], seconds=0.3)
    for figure in (dice_and_time_figure(columns, records, "Data " * 60), dice_figure(columns, "Data " * 60)):
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 < box.x1 <= 1600
        assert box.y1 <= figure.bbox.y1
        assert box.y0 >= figure.axes[0].get_window_extent().y1


def test_long_names_are_shortened_in_the_middle() -> None:
    columns, _ = benchmark(1, 2, ["default"], ["atlas"])
    name = "left " + "very " * 40 + "long"
    rows = tuple(replace(row, structure=name) for row in columns[0].rows)
    figure = dice_figure([Column("default", "atlas", columns[0].pairs, rows)], "Data")
    label = figure.axes[0].get_yticklabels()[0].get_text()
    assert label.startswith("left")
    assert label.endswith("long")
    assert "…" in label


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_are_replaced(tmp_path: Path) -> None:
    columns, _ = benchmark(1, 2, ["default"], ["atlas"])
    rows = tuple(replace(row, structure="肝臓 left") for row in columns[0].rows)
    figure = dice_figure([Column("default", "atlas", columns[0].pairs, rows)], "患者")
    save_figure(figure, tmp_path / "x.png")
    assert figure.axes[0].get_yticklabels()[0].get_text() == "□□ left"


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    columns, _ = benchmark(1, 1)
    with pytest.raises(InputError, match="cannot write there"):
        save_figure(dice_figure(columns, "Data"), tmp_path / "nowhere" / "x.png")


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    columns, records = benchmark(1, 2)
    with pytest.raises(InputError, match="(?i)no space"):
        save_figure(dice_and_time_figure(columns, records, "Data"), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, records = benchmark(1, 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="the extra 'report'"):
        save_figure(dice_figure(columns, "Data"), tmp_path / "x.png")
    with pytest.raises(MissingExtraError, match="the extra 'report'"):
        save_figure(dice_and_time_figure(columns, records, "Data"), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
