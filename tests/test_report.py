"""Overview picture: sides, proportions, and identical files for identical voxels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from atlassegfm.core import fonts
from atlassegfm.core.errors import InputError, MissingExtraError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.labels import Structure, palette_color
from atlassegfm.report import Note, draw_overview, require_report_extra
from atlassegfm.report.slices import best_slice, letters

pytest.importorskip("matplotlib")

RED = Structure(1, "right front $organ", (255, 40, 40))
BLUE = Structure(7, "left back organ", (40, 80, 255))


def grid(shape: Sequence[int] = (50, 40, 12), spacing_mm: Sequence[float] = (2.0, 2.0, 6.0)) -> Grid:
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = (-30, 12, 400)
    return Grid((shape[0], shape[1], shape[2]), affine)


@pytest.fixture(scope="module")
def scan() -> tuple[Volume, Volume]:
    """An image and labels: red at the patient's right, front and top; blue at the left, back and bottom."""
    where = grid()
    labels = np.zeros(where.shape, np.uint8)
    labels[32:42, 24:34, 5:9] = 1
    labels[8:18, 6:16, 3:7] = 7
    noise = np.random.default_rng(0).normal(100, 10, where.shape)
    return Volume((noise + 60 * (labels > 0)).astype(np.float32), where), Volume(labels, where)


@pytest.fixture(scope="module")
def plain(scan: tuple[Volume, Volume], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture without reference and scores."""
    path = tmp_path_factory.mktemp("plain") / "overview.png"
    draw_overview(*scan, (RED, BLUE), path, title="t", subtitle="A subtitle")
    return path


def stored_as(volume: Volume, codes: str) -> Volume:
    """The same voxels with the array axes in another order and direction."""
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    change = ornt_transform(io_orientation(volume.grid.affine), axcodes2ornt(codes))
    affine = volume.grid.affine @ inv_ornt_aff(change, volume.grid.shape)
    shape = np.empty(3, int)
    shape[change[:, 0].astype(int)] = volume.grid.shape
    turned = volume.turned_to(Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine))
    assert turned.grid.axis_codes == codes
    return turned


def pixels(path: Path) -> NDArray[np.float64]:
    from matplotlib.image import imread

    return 255 * np.asarray(imread(path), dtype=np.float64)[:, :, :3]


def near(picture: NDArray[np.float64], structure: Structure) -> NDArray[np.int64]:
    """(N, 2) row and column of the pixels of the structure's outline."""
    return np.argwhere(np.abs(picture - structure.color).max(axis=2) < 12)


def in_first_panel(found: NDArray[np.int64], picture: NDArray[np.float64]) -> NDArray[np.int64]:
    """Leave out the other panels (right of the middle) and the legend (lowest eighth)."""
    kept: NDArray[np.int64] = found[(found[:, 1] < 0.5 * picture.shape[1]) & (found[:, 0] < 0.87 * picture.shape[0])]
    return kept


def test_picture_shows_each_structure_on_its_side(plain: Path) -> None:
    for key in (b"tEXt", b"tIME", b"iTXt"):  # the file depends on the voxels alone
        assert key not in plain.read_bytes()
    picture = pixels(plain)
    assert picture.shape[1] == 1600
    assert 500 < picture.shape[0] < 1300
    red, blue = (in_first_panel(near(picture, s), picture) for s in (RED, BLUE))
    assert len(red) > 300
    assert len(blue) > 300
    # Radiological display: the patient's right is at the left, the front at the top.
    assert red[:, 1].max() < blue[:, 1].min()
    assert red[:, 0].max() < blue[:, 0].min()


def test_same_picture_however_the_voxels_are_stored(scan: tuple[Volume, Volume], plain: Path, tmp_path: Path) -> None:
    turned = [stored_as(volume, "PSR") for volume in scan]
    draw_overview(turned[0], turned[1], (RED, BLUE), tmp_path / "o.png", title="t", subtitle="A subtitle")
    assert (tmp_path / "o.png").read_bytes() == plain.read_bytes()


def test_a_ball_is_round_whatever_the_spacing(tmp_path: Path) -> None:
    where = grid((60, 24, 24), (1.0, 2.5, 2.5))
    points = where.voxel_to_world(np.moveaxis(np.indices(where.shape), 0, -1))
    ball = (np.linalg.norm(points - where.centre_mm, axis=-1) < 20).astype(np.uint8)
    path = tmp_path / "ball.png"
    draw_overview(Volume(ball.astype(np.float32), where), Volume(ball, where), (RED,), path, title="t")
    picture = pixels(path)
    found = in_first_panel(near(picture, RED), picture)
    height, width = np.ptp(found, axis=0)
    assert height == pytest.approx(width, rel=0.07)


def test_reference_and_scores_are_drawn(scan: tuple[Volume, Volume], plain: Path, tmp_path: Path) -> None:
    image, labels = scan
    moved = Volume(np.roll(labels.data, 4, axis=0), labels.grid)
    draw_overview(
        image,
        labels,
        (RED, BLUE),
        tmp_path / "with.png",
        title="t",
        reference=moved,
        notes={1: Note("Dice 0.50"), 7: Note("Dice –")},
    )
    white = [int((pixels(path) > 250).all(axis=2).sum()) for path in (plain, tmp_path / "with.png")]
    assert white[1] > white[0] + 200


def test_a_missed_structure_still_shows_where_it_should_be(scan: tuple[Volume, Volume], tmp_path: Path) -> None:
    image, labels = scan
    nothing = Volume(np.zeros_like(labels.data), labels.grid)
    path = tmp_path / "missed.png"
    draw_overview(image, nothing, (RED, BLUE), path, title="t", reference=labels)
    picture = pixels(path)
    white = in_first_panel(np.argwhere((picture > 250).all(axis=2)), picture)
    dashes = white[(white[:, 0] > 0.1 * len(picture)) & (white[:, 0] < 0.7 * len(picture))]
    # Red's place is at the left of blue's and above it.
    assert len(dashes) > 80
    assert np.corrcoef(dashes[:, 0], dashes[:, 1]).min() > 0.5


@pytest.mark.parametrize("is_empty", [True, False])
def test_empty_and_smallest_results_are_drawn(scan: tuple[Volume, Volume], tmp_path: Path, *, is_empty: bool) -> None:
    image, labels = scan
    data = np.zeros_like(labels.data)
    data[25, 20, 6] = not is_empty
    draw_overview(image, Volume(data, labels.grid), (RED,), tmp_path / "o.png", title="t")
    picture = pixels(tmp_path / "o.png")
    assert picture.shape[1] == 1600
    assert (len(in_first_panel(near(picture, RED), picture)) > 20) is not is_empty


def texts_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the pictures drawn from now on, as they are shown."""
    from matplotlib.text import Text

    shown: list[str] = []
    draw = Text.draw

    def noted(self: Text, *arguments: object) -> None:
        shown.append(self.get_text())
        draw(self, *arguments)

    monkeypatch.setattr(Text, "draw", noted)
    return shown


def test_what_is_not_good_is_named_and_coloured(
    scan: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, path = texts_of(monkeypatch), tmp_path / "o.png"
    notes = {1: Note("in view; 49 % outside", "review"), 7: Note("failed", "failed")}
    draw_overview(*scan, (RED, BLUE), path, title="t", notes=notes)
    assert {"in view; 49 % outside", "failed", "right front $organ"} <= set(shown)
    legend = pixels(path)[-90:]
    assert all((np.abs(legend - color).max(axis=2) < 12).any() for color in ((255, 143, 133), (242, 193, 78)))


def test_the_worst_come_first_where_the_legend_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = grid((24, 24, 24), (1.0, 1.0, 1.0))
    labels = np.zeros(where.shape, np.uint8)
    labels.ravel()[: 60 * 200] = np.repeat(np.arange(1, 61), 200)
    labels[labels == 33] = 0
    many = [Structure(value, f"s{value}", palette_color(value)) for value in range(1, 61)]
    shown = texts_of(monkeypatch)
    notes = {33: Note("absent", "failed"), 50: Note("review", "review")}
    draw_overview(Volume(labels, where), Volume(labels, where), many, tmp_path / "o.png", title="t", notes=notes)
    assert {"s33", "s50"} <= set(shown)


def test_names_are_cut_in_the_middle(
    scan: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, name = texts_of(monkeypatch), "hippocampus_in_the_medial_part_of_the_temporal_lobe_"
    pair = [Structure(1, f"{name}l", RED.color), Structure(7, f"{name}r", BLUE.color)]
    draw_overview(*scan, pair, tmp_path / "o.png", title=f"study{'_x' * 200}_end")
    found = [text for text in shown if text.startswith("hippo")]
    assert [text[-1] for text in found] == ["l", "r"]
    assert all("…" in text for text in found)
    assert any(text.startswith("study") and text.endswith("_end") and len(text) < 150 for text in shown)


@pytest.mark.parametrize("has_font", [True, False])
def test_letters_that_no_font_has_are_replaced_in_silence(
    scan: tuple[Volume, Volume],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
    *,
    has_font: bool,
) -> None:
    from matplotlib.font_manager import fontManager

    own = [font for font in fontManager.ttflist if font.name.startswith(("DejaVu", "STIX"))]
    monkeypatch.setattr(fontManager, "ttflist", own)
    monkeypatch.setattr("atlassegfm.core.fonts._font_with", fonts._font_with.__wrapped__)
    # DejaVu Sans has no script letters; another font that comes with matplotlib has them, but none in bold.
    name, lacking = ("𝒜 organ", "𝒜") if has_font else ("肝臓\n(左)", "肝")
    shown = texts_of(monkeypatch)
    draw_overview(*scan, (RED, Structure(7, name, BLUE.color)), tmp_path / "o.png", title=name)
    assert any(lacking in text for text in shown) is has_font
    assert any(text.startswith("label 7: □") for text in shown) is not has_font
    assert not recwarn
    assert not caplog.records


def test_legend_of_many_structures_stays_small(tmp_path: Path) -> None:
    where = grid((24, 24, 24), (1.0, 1.0, 1.0))
    i, j, k = np.indices(where.shape) // 4
    number = 1 + 36 * i + 6 * j + k
    labels = np.where(number <= 130, number, 0).astype(np.uint8)
    many = [Structure(value, f"a_rather_long_name_of_region_{value}", palette_color(value)) for value in range(1, 131)]
    path = tmp_path / "many.png"
    draw_overview(Volume(labels.astype(np.float32), where), Volume(labels, where), many, path, title="t")
    assert pixels(path).shape[0] < 1250


def test_unusable_inputs_are_refused(scan: tuple[Volume, Volume], tmp_path: Path) -> None:
    image, labels = scan
    other = Volume(labels.data[1:], labels.grid.crop((1, 0, 0), labels.grid.shape))
    with pytest.raises(ValueError, match="voxels"):
        draw_overview(image, other, (RED,), tmp_path / "x.png", title="t")
    with pytest.raises(InputError, match="nowhere"):
        draw_overview(*scan, (RED,), tmp_path / "nowhere" / "x.png", title="t")


def test_missing_matplotlib_names_the_extra(
    scan: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="the extra 'report'"):
        require_report_extra()
    with pytest.raises(MissingExtraError, match="the extra 'report'"):
        draw_overview(*scan, (RED,), tmp_path / "x.png", title="t")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("direction", "expected"),
    [((1, 0, 0), "R"), ((-1, 0, 0), "L"), ((0, 0.99, 0.14), "A"), ((0.5, -0.86, 0), "PR"), ((0, 0.6, -0.8), "IA")],
)
def test_letters_tell_where_an_edge_points(direction: tuple[float, float, float], expected: str) -> None:
    assert letters(np.array(direction)) == expected


def test_best_slice_prefers_many_structures_to_a_large_one() -> None:
    # Slices 0 to 3; the first structure is largest on slice 0, all three meet on slice 2.
    areas = np.array([[100, 0, 0], [90, 0, 0], [60, 4, 9], [0, 5, 0]])
    assert best_slice(areas) == 2
    assert best_slice(np.zeros((9, 3), np.int64)) == 4
