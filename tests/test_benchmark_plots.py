"""Pictures of a benchmark: everything is in them, whatever is missing, and the same scores give the same file."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from atlassegfm.benchmark.plots import dice_and_time_figure, dice_figure, draw_dice, draw_dice_and_time
from atlassegfm.benchmark.protocols import Pair
from atlassegfm.benchmark.runner import METHODS, Record, Row
from atlassegfm.benchmark.tables import Column
from atlassegfm.core.errors import InputError, MissingExtraError
from atlassegfm.evaluate.metrics import StructureScores

pytest.importorskip("matplotlib")


def scores(dice: float) -> StructureScores:
    return StructureScores("ok", dice, dice, 1.0, 2.0, 2.0, 10, 10, 1.0, 1.0, None, "")


def benchmark(
    structures: int = 3,
    pairs: int = 5,
    variants: Sequence[str] = ("default",),
    methods: Sequence[str] = METHODS,
    *,
    absent: Sequence[int] = (),
    failed: int = 0,
    seconds: float = 1.0,
) -> tuple[list[Column], list[Record]]:
    """Made-up scores; ``absent`` structures have none, the first ``failed`` pairs of each variant ended in an error.

    Times grow from variant to variant and from pair to pair by ``seconds``.
    """
    random = np.random.default_rng(0)
    cases = tuple(Pair("atlas", f"query {n}") for n in range(pairs))
    columns, records = [], []
    for place, variant in enumerate(variants):
        for method in methods:
            rows = tuple(
                Row(pair.query, method, 2 * value + 1, f"organ ${value}$ left", scores(dice))
                for n, pair in enumerate(cases)
                for value in range(structures)
                for dice in [math.nan if value in absent else 0.0 if n < failed else float(random.uniform(0.6, 0.9))]
            )
            columns.append(Column(variant, method, cases, rows))
        for n, pair in enumerate(cases):
            took = 0.0 if n < failed else 20 + seconds * (n + 10 * place)
            records.append(Record(variant, pair, (), "broken" if n < failed else "", {}, took))
    return columns, records


def words(figure: object) -> list[str]:
    """All texts of a figure, without empty ones."""
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    found = [text.get_text() for text in (*figure.texts, *figure.axes[0].texts)]
    return [text for text in found if text]


@pytest.mark.parametrize(
    ("structures", "pairs", "variants", "methods"),
    [
        (1, 1, ["default"], ["atlas"]),
        (2, 5, ["default"], METHODS),
        (4, 1, ["default"], METHODS),
        (13, 9, [f"variant number {n}" for n in range(12)], ["fused"]),
        (130, 6, ["default"], METHODS),
    ],
)
def test_both_pictures_are_written_and_depend_on_the_scores_alone(
    structures: int, pairs: int, variants: Sequence[str], methods: Sequence[str], tmp_path: Path
) -> None:
    from matplotlib.image import imread

    columns, records = benchmark(structures, pairs, variants, methods)
    for name in ("a", "b"):
        draw_dice(columns, "Data", tmp_path / f"{name}.png")
        draw_dice_and_time(columns, records, "Data", tmp_path / f"{name}-time.png")
    assert len(list(tmp_path.iterdir())) == 4
    for ending in (".png", "-time.png"):
        content = (tmp_path / f"a{ending}").read_bytes()
        assert content == (tmp_path / f"b{ending}").read_bytes()
        assert not any(key in content for key in (b"tEXt", b"tIME", b"iTXt"))
    picture = np.asarray(imread(tmp_path / "a.png"))
    assert picture.shape[1] == 1600
    assert 25 * structures < picture.shape[0] < 400 + 160 * structures
    assert (picture[:5, :, :3] == 1).all()


def test_dice_has_a_row_for_each_structure_and_a_mark_for_each_mean() -> None:
    columns, _ = benchmark(3, 5)
    figure = dice_figure(columns, "Data $1$")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"organ ${n}$ left" for n in range(3)]
    # The first structure is at the top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    dots, means = axes.lines[::2], axes.lines[1::2]
    assert len(axes.collections) == len(dots) == len(means) == len(columns)
    for column, dot, mean in zip(columns, dots, means, strict=True):
        np.testing.assert_array_equal(np.asarray(dot.get_xdata()), column.table("dice").ravel())
        np.testing.assert_allclose(np.asarray(mean.get_xdata()), column.table("dice").mean(axis=1))
    assert len({(line.get_color(), line.get_marker()) for line in means}) == len(columns)
    shown = words(figure)
    for wanted in ("Data $1$: Dice of each structure", "5 pairs", "fused", "atlas only", "oracle"):
        assert wanted in shown
    assert f"{columns[2].summary.means['dice']:.3f}" in shown


def test_several_variants_are_named_in_the_legend() -> None:
    columns, records = benchmark(2, 3, ["fast", "best"], ["fused"])
    for figure in (dice_figure(columns, "D"), dice_and_time_figure(columns, records, "D")):
        assert {"fast: fused", "best: fused"} <= set(words(figure))


def test_a_structure_without_scores_is_an_empty_row_with_a_note() -> None:
    columns, records = benchmark(3, 4, absent=[1])
    figure = dice_figure(columns, "Data")
    notes = [text for text in figure.axes[0].texts if text.get_text() == "nothing to score in any pair"]
    assert [note.get_position()[1] for note in notes] == [1]
    assert not any("no mark" in text for text in words(figure))
    columns[0] = benchmark(3, 4)[0][0]
    figure = dice_figure(columns, "Data")
    assert not figure.axes[0].texts
    assert any("no mark: nothing to score" in text for text in words(figure))
    assert dice_and_time_figure(columns, records, "Data")


def test_nothing_but_empty_rows(tmp_path: Path) -> None:
    columns, records = benchmark(2, 3, absent=[0, 1])
    draw_dice(columns, "Data", tmp_path / "a.png")
    draw_dice_and_time(columns, records, "Data", tmp_path / "b.png")
    shown = words(dice_and_time_figure(columns, records, "Data"))
    assert "no pair has a score" in shown
    assert "3 without a score" in shown


def test_time_shows_each_pair_of_the_method_a_variant_ends_in() -> None:
    columns, records = benchmark(3, 5)
    axes = dice_and_time_figure(columns, records, "Data").axes[0]
    np.testing.assert_array_equal(np.asarray(axes.lines[0].get_xdata()), [20, 21, 22, 23, 24])
    (fused,) = (column for column in columns if column.method == "fused")
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), fused.pair_means())
    assert axes.get_xscale() == "linear"
    assert [text.get_text() for text in axes.texts] == [f"fused: {fused.summary.means['dice']:.2f} in 22 s"]
    atlas = dice_and_time_figure(columns[:1], records, "Data").axes[0]
    np.testing.assert_allclose(np.asarray(atlas.lines[0].get_ydata()), columns[0].pair_means())


def test_times_far_apart_are_on_a_logarithmic_axis() -> None:
    for seconds, scale in ((14, "linear"), (16, "log"), (5000, "log")):
        columns, records = benchmark(2, 5, methods=["fused"], seconds=seconds)
        axes = dice_and_time_figure(columns, records, "Data").axes[0]
        assert axes.get_xscale() == scale
        assert 3 <= len([tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]) <= 14


def test_failed_pairs_are_crosses_below_all_others() -> None:
    columns, records = benchmark(3, 5, ["one", "two"], ["fused"], failed=2)
    figure = dice_and_time_figure(columns, records, "Data")
    axes = figure.axes[0]
    crosses = [line for line in axes.lines if line.get_gid() == "failed"]
    assert [len(np.asarray(line.get_xdata())) for line in crosses] == [2, 2]
    assert len(np.asarray(axes.lines[0].get_xdata())) == 3
    lowest_dot = axes.transData.transform((20, float(np.min(axes.lines[0].get_ydata()))))[1]
    assert axes.transAxes.transform((0, float(np.max(crosses[0].get_ydata()))))[1] < lowest_dot
    assert words(figure).count("2 failed (×)") == 2
    # The mean of the times leaves them out.
    assert any(text.startswith("one: ") and text.endswith(" in 23 s") for text in words(figure))


def test_all_pairs_failed() -> None:
    columns, records = benchmark(3, 5, failed=5)
    assert {"5 failed (×)", "no pair has a score"} <= set(words(dice_and_time_figure(columns, records, "Data")))


def test_words_do_not_cover_each_other() -> None:
    columns, records = benchmark(3, 8, [f"variant number {n}" for n in range(12)], ["fused"], seconds=0.3)
    for figure in (dice_and_time_figure(columns, records, "Data " * 60), dice_figure(columns, "Data " * 60)):
        texts = [text for text in (*figure.texts, *figure.axes[0].texts) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) > 12
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other)
        for box in boxes:
            assert box.x0 >= 0
            assert box.x1 <= 1600


def test_long_names_are_shortened_in_the_middle() -> None:
    columns, _ = benchmark(1, 2, ["default"], ["atlas"])
    name = "left " + "very " * 40 + "long"
    rows = tuple(Row(row.case, row.method, row.value, name, row.scores) for row in columns[0].rows)
    figure = dice_figure([Column("default", "atlas", columns[0].pairs, rows)], "Data")
    label = figure.axes[0].get_yticklabels()[0].get_text()
    assert label.startswith("left")
    assert label.endswith("long")
    assert "…" in label


def test_missing_folder_is_told(tmp_path: Path) -> None:
    columns, _ = benchmark(1, 1)
    with pytest.raises(InputError, match="cannot write there"):
        draw_dice(columns, "Data", tmp_path / "nowhere" / "x.png")


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    columns, records = benchmark(1, 2)
    with pytest.raises(InputError, match="No space left"):
        draw_dice_and_time(columns, records, "Data", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, records = benchmark(1, 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'atlassegfm\[report\]'"):
        draw_dice(columns, "Data", tmp_path / "x.png")
    with pytest.raises(MissingExtraError, match=r"atlassegfm\[report\]"):
        draw_dice_and_time(columns, records, "Data", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
