"""clDice: hand-worked tubes, the ones that thinning loses, and voxels that are no cubes."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.morphology import skeletonize

from atlassegfm.evaluate.metrics import StructureScores, centreline, label_shapes, score_masks

Spacing = tuple[float, float, float]
CUBIC = (1.0, 1.0, 1.0)


def tube(wide: int, high: int, length: int, *, at: int = 3) -> np.ndarray:
    mask = np.zeros((30, 14, 50), bool)
    mask[at : at + wide, 3 : 3 + high, 4 : 4 + length] = True
    return mask


def score(result: np.ndarray, reference: np.ndarray, spacing: Spacing = CUBIC) -> tuple[float, str]:
    scores: StructureScores = score_masks(result, reference, spacing, tolerance_mm=1, centreline=True)
    assert scores.cldice is not None
    return scores.cldice, scores.cldice_note


def test_half_the_length_by_hand() -> None:
    long, short = tube(3, 3, 40), tube(3, 3, 20)
    # Thinning takes one voxel off each end: voxels 5 to 42 along, of which the short tube has 5 to 23.
    assert np.argwhere(skeletonize(long))[:, 2].tolist() == list(range(5, 43))
    sensitivity = 19 / 38
    assert score(short, long) == (pytest.approx(2 * sensitivity / (1 + sensitivity)), "")
    assert score(long, short)[0] == score(short, long)[0]


@pytest.mark.parametrize(("wide", "high"), [(4, 4), (2, 2), (6, 6), (2, 4), (8, 8)])
def test_tubes_that_thinning_loses(wide: int, high: int) -> None:
    long, short = tube(wide, high, 40), tube(wide, high, 20)
    assert not skeletonize(long).any()
    value, note = score(long, long)
    assert value == 1
    assert "result: skeleton of 1 component rebuilt on a doubled lattice" in note
    assert "reference: skeleton of 1 component rebuilt on a doubled lattice" in note
    # The half of the length that is common, up to a point at each end.
    assert score(short, long)[0] == pytest.approx(2 / 3, abs=0.02)


def test_points_between_cells_count_in_part() -> None:
    # The 2 x 2 tube's centreline runs between four voxels; of them the other mask has two: half of every point.
    whole, half = tube(2, 2, 30), tube(1, 2, 30)
    assert label_shapes(whole.view(np.uint8), [1], CUBIC)[1].skeleton.fraction_in(
        centreline.Cells(half, (0, 0, 0))
    ) == pytest.approx(0.5)
    assert score(half, whole)[0] == pytest.approx(2 * 0.5 / 1.5)


def test_rebuilt_centreline_is_as_long_as_a_plain_one() -> None:
    lengths = [
        label_shapes(tube(wide, wide, 40).view(np.uint8), [1], CUBIC)[1].skeleton.weight.sum() for wide in (3, 4)
    ]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blobs_are_not_lost(size: int) -> None:
    blob = tube(size, size, size)
    value, note = score(blob, blob)
    assert value == 1
    assert ("doubled lattice" in note) == (size > 1)


def test_deepest_voxel_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centreline, "_thin", np.zeros_like)
    blob = tube(5, 5, 7)
    skeleton = label_shapes(blob.view(np.uint8), [1], CUBIC)[1].skeleton
    assert skeleton.low[:, :2].tolist() == skeleton.high[:, :2].tolist() == [[5, 5]]
    assert score(blob, blob)[0] == 1


def test_only_the_lost_component_is_rebuilt() -> None:
    both = tube(3, 3, 40) | tube(4, 4, 40, at=20)
    value, note = score(both, both)
    assert value == 1
    assert "result: skeleton of 1 component rebuilt" in note
    # The result has the plain one alone: all of it is right, and it is half of the length.
    value, note = score(tube(3, 3, 40), both)
    assert value == pytest.approx(2 / 3, abs=0.02)
    assert note == "reference: skeleton of 1 component rebuilt on a doubled lattice"


def test_lost_stretch_of_a_vessel_is_rebuilt() -> None:
    # Thinning leaves the wide half alone, with which a result without the narrow one would be perfect.
    vessel = np.zeros((12, 12, 80), bool)
    vessel[3:5, 3:5, :40] = vessel[3:8, 3:8, 40:] = True
    assert np.argwhere(skeletonize(vessel))[:, 2].min() >= 40
    wide = vessel.copy()
    wide[:, :, :40] = False
    value, note = score(wide, vessel)
    assert note == "reference: skeleton of 1 stretch rebuilt on a doubled lattice"
    assert value < 0.75
    assert score(vessel, vessel)[0] == 1


def test_apart_is_zero_without_a_note() -> None:
    assert score(tube(3, 3, 40), tube(3, 3, 40, at=20)) == (0, "")


def test_voxels_that_are_no_cubes_are_resampled() -> None:
    long, short = tube(3, 3, 40), tube(3, 3, 20)
    value, note = score(short, long, (0.8, 0.8, 2.5))
    assert note == "resampled to 0.8 mm"
    # Ends are shortened by a cell of 0.8 mm, not by a voxel of 2.5 mm.
    assert value == pytest.approx(2 / 3, abs=0.01)
    # A few percent are none.
    assert score(short, long, (1.0, 1.04, 1.0))[1] == ""


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 2.5), (2.5, 1.0, 0.9), (1.0, 1.07, 1.07), (1.0, 2.0, 3.0)])
def test_diagonal_vessel_one_voxel_thick_stays(spacing: Spacing) -> None:
    vessel = np.zeros((20, 20, 20), bool)
    vessel[range(20), range(20), range(20)] = True
    shape = label_shapes(vessel.view(np.uint8), [1], spacing)[1]
    skeleton = shape.skeleton
    assert score(vessel, vessel, spacing)[0] == 1
    assert "rebuilt" not in skeleton.note
    # From end to end, and every voxel of it.
    along = np.unique(skeleton.low[:, int(np.argmin(spacing))])
    assert len(along) >= 18
    half = vessel.copy()
    half[10:] = False
    assert score(half, vessel, spacing)[0] == pytest.approx(2 / 3, abs=0.05)


def test_cells_do_not_depend_on_the_crop() -> None:
    random = np.random.default_rng(0)
    mask = random.random((9, 8, 7)) < 0.4
    for cell_mm in (0.8, 1.9):
        whole = centreline.make_cells(mask, (5, 0, 3), (0.8, 1.0, 2.5), cell_mm)
        part = centreline.make_cells(mask[2:8, 4:, 1:5], (7, 4, 4), (0.8, 1.0, 2.5), cell_mm)
        inner = np.argwhere(part.inside[1:-1, 1:-1, 1:-1]) + 1 + part.first
        assert whole.at(inner).all()
        # Nothing vanishes, however coarse the cells are.
        for voxel in np.argwhere(mask) + (5, 0, 3):
            cell = np.floor(voxel * np.array((0.8, 1.0, 2.5)) / cell_mm + 0.5).astype(int)
            assert whole.at(cell[None])[0]


def test_mask_too_large_is_coarsened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centreline, "_MOST_CELLS", 100)
    long, short = tube(3, 3, 40), tube(3, 3, 20)
    value, note = score(short, long)
    assert "resampled to 1.53 mm, coarser than the voxels" in note
    assert 0.5 < value < 0.8
    assert score(long, long)[0] == 1
