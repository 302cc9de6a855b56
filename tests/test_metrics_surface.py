"""Surface scores: the reference implementation, crude ones, hand-worked numbers, and what must not change them."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import surface_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.spatial.distance import cdist

from atlassegfm.core.overlap import dice, dice_per_structure
from atlassegfm.evaluate.metrics import (
    StructureScores,
    compare,
    label_shapes,
    score_labels,
    score_masks,
    surface,
)

Mask = np.ndarray
Spacing = tuple[float, float, float]


def random_mask(random: np.random.Generator, shape: tuple[int, ...]) -> Mask:
    kind = random.integers(5)
    mask = np.zeros(shape, bool)
    if kind == 1:
        mask[tuple(random.integers(0, shape))] = True
    elif kind == 2:
        mask = random.random(shape) < random.choice([0.02, 0.3, 0.8])
    elif kind == 3:
        mask = ndimage.gaussian_filter(random.standard_normal(shape), 2) > 0
    elif kind == 4:
        # Nothing but a corner of the image, or another: far apart, and at the border.
        corner = tuple(slice(0, 1 + n // 4) if random.random() < 0.5 else slice(n - 1 - n // 4, n) for n in shape)
        mask[corner] = True
    return mask


def theirs(result: Mask, reference: Mask, spacing: Spacing, tolerance: float) -> tuple[float, float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls scipy by old names
        distances = surface_distance.compute_surface_distances(reference, result, spacing)
    return (
        float(surface_distance.compute_dice_coefficient(reference, result)),
        float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)),
        float(surface_distance.compute_robust_hausdorff(distances, 95)),
    )


def crude_hd95_voxel(result: Mask, reference: Mask, spacing: Spacing) -> float:
    edges = [np.argwhere(m & ~ndimage.binary_erosion(m)) * np.array(spacing) for m in (result, reference)]
    distances = cdist(*edges)
    return max(float(np.percentile(distances.min(axis=axis), 95)) for axis in (0, 1))


def their_assd(result: Mask, reference: Mask, spacing: Spacing) -> float:
    """From both directions of surface-distance, each by the area of its surface."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(reference, result, spacing)
    areas = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
    return float(np.dot(areas, surface_distance.compute_average_surface_distance(found)) / sum(areas))


def crude_assd(result: Mask, reference: Mask, spacing: Spacing) -> float:
    """Every surfel against every surfel."""
    (one, one_mm2), (other, other_mm2) = (surface.surfels(m, (0, 0, 0), spacing) for m in (result, reference))
    distances = cdist(one.index * np.array(spacing), other.index * np.array(spacing))
    moment = distances.min(axis=1) @ one_mm2 + distances.min(axis=0) @ other_mm2
    return float(moment / (one_mm2.sum() + other_mm2.sum()))


def test_as_surface_distance_and_as_brute_force() -> None:
    random = np.random.default_rng(7)
    compared = 0
    for _ in range(150):
        shape = tuple(int(n) for n in random.integers(1, 21, 3))
        x, y, z = (float(step) for step in random.uniform(0.3, 4, 3))
        spacing = (x, y, z)
        tolerance = float(random.uniform(0, 5))
        result, reference = random_mask(random, shape), random_mask(random, shape)
        ours = score_masks(result, reference, spacing, tolerance_mm=tolerance)
        if not (result.any() and reference.any()):
            assert ours.status != "ok"
            continue
        compared += 1
        expected = theirs(result, reference, spacing, tolerance)
        assert (ours.dice, ours.nsd, ours.hd95_mm) == pytest.approx(expected, abs=1e-6)
        assert ours.hd95_voxel_mm == pytest.approx(crude_hd95_voxel(result, reference, spacing), abs=1e-9)
        assert ours.assd_mm == pytest.approx(their_assd(result, reference, spacing), abs=1e-6)
        assert ours.assd_mm == pytest.approx(crude_assd(result, reference, spacing), abs=1e-9)
    assert compared >= 90


def test_just_95_percent_of_the_area_is_decided_as_theirs() -> None:
    # Five lone voxels have 40 surfels of one size: 38 of them are 95 %, but for rounding.
    random = np.random.default_rng(0)
    for _ in range(25):
        result, reference = np.zeros((2, 9, 9, 9), bool)
        result[tuple(2 * random.integers(0, 5, (3, 5)))] = True
        reference[tuple(2 * random.integers(0, 5, (3, 5)))] = True
        spacing = (0.7, 1.3, 2.9)
        ours = score_masks(result, reference, spacing, tolerance_mm=1)
        assert ours.hd95_mm == pytest.approx(theirs(result, reference, spacing, 1)[2], abs=1e-6)


def test_areas_by_hand() -> None:
    spacing = (1.0, 2.0, 5.0)
    areas = surface.surfel_areas_mm2(spacing)
    assert areas[0] == areas[255] == 0
    # One voxel of eight: a triangle through the middles of three edges, legs 0.5, 1 and 2.5 mm from the corner.
    triangle = 0.5 * math.sqrt((0.5 * 1) ** 2 + (0.5 * 2.5) ** 2 + (1 * 2.5) ** 2)
    assert areas[[1 << bit for bit in range(8)]] == pytest.approx(np.full(8, triangle))
    # A plane across the four voxels of the lower half of an axis: the face of a voxel.
    assert areas[[0b00001111, 0b00110011, 0b01010101]] == pytest.approx([10, 5, 2])
    # The surface of the inside is that of the outside.
    assert areas == pytest.approx(areas[::-1])
    points, single = surface.surfels(np.ones((1, 1, 1), bool), (4, 5, 6), spacing)
    assert single == pytest.approx(np.full(8, triangle))
    assert points.index.tolist() == [list(at) for at in itertools.product((4, 5), (5, 6), (6, 7))]


def test_slab_has_the_faces_and_no_inner_points() -> None:
    slab = np.zeros((6, 12, 12), bool)
    slab[1:5] = True
    points, areas = surface.surfels(slab, (0, 0, 0), (1.0, 2.0, 3.0))
    off_the_edge = np.all((points.index[:, 1:] > 0) & (points.index[:, 1:] < 12), axis=1)
    assert set(points.index[off_the_edge, 0]) == {1, 5}
    assert areas[off_the_edge] == pytest.approx(np.full(2 * 11 * 11, 6))


def test_shifted_slabs_by_hand() -> None:
    # 4 voxels of 1.5 mm thick and 60 x 60 mm wide, one 3 mm above the other.
    result, reference = np.zeros((2, 20, 60, 60), bool)
    result[5:9] = reference[7:11] = True
    spacing = (1.5, 1.0, 1.0)
    assert score_masks(result, reference, spacing, tolerance_mm=3).nsd == 1
    short = score_masks(result, reference, spacing, tolerance_mm=2.9)
    # Surfels of a slab: 59 x 59 on each face of 1 mm2 and 3 x 59 on each side of 1.5 mm2; 59 on each of the 8 edges
    # around the faces and 3 on each of the other 4, cut off by half a voxel; and 8 corners.
    edge, upright = math.hypot(0.75, 0.5), 1.5 * math.hypot(0.5, 0.5)
    corner = math.hypot(0.75 * 0.5, 0.75 * 0.5, 0.5 * 0.5) / 2
    total = 2 * 59**2 + 4 * 3 * 59 * 1.5 + 8 * 59 * edge + 4 * 3 * upright + 8 * corner
    # Just 3 mm off: all of the outer face with its edges, and of the inner one what is 3 mm from the other's sides.
    off = 59**2 + 4 * 59 * edge + 4 * corner + 55**2
    assert short.nsd == pytest.approx(1 - off / total)
    assert short.hd95_mm == short.hd95_voxel_mm == 3
    assert 1.5 < short.assd_mm < 3  # the sides are nearer
    assert short.dice == 0.5
    assert (short.result_voxels, short.result_ml) == (14400, pytest.approx(21.6))


def test_tolerance_on_the_lattice_counts_in_single_precision() -> None:
    step = float(np.float32(0.8))
    assert 3 * step > 2.4
    result, reference = np.zeros((2, 12, 4, 4), bool)
    result[:4] = reference[:7] = True
    assert score_masks(result, reference, (step, 1, 1), tolerance_mm=2.4).nsd == 1
    assert score_masks(result, reference, (step, 1, 1), tolerance_mm=2.39).nsd < 1


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(bool, st.tuples(*[st.integers(1, 6)] * 3)),
    st.data(),
    st.permutations(range(3)),
    st.tuples(*[st.booleans()] * 3),
)
def test_turning_flipping_and_swapping_change_nothing(
    result: Mask, data: st.DataObject, axes: list[int], flips: tuple[bool, bool, bool]
) -> None:
    reference = data.draw(hnp.arrays(bool, result.shape))
    # Sums of squares of these are exact in any order, so that equal distances stay equal.
    spacing = (0.5, 1.25, 3.0)
    before = score_masks(result, reference, spacing, tolerance_mm=1.3)
    step = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    after = score_masks(
        result.transpose(axes)[step],
        reference.transpose(axes)[step],
        [spacing[axis] for axis in axes],
        tolerance_mm=1.3,
    )
    assert_same(after, before)
    swapped = score_masks(reference, result, spacing, tolerance_mm=1.3)
    status = {"missed": "hallucinated", "hallucinated": "missed"}.get(before.status, before.status)
    assert_same(
        swapped,
        replace(
            before,
            status=status,  # type: ignore[arg-type]
            result_voxels=before.reference_voxels,
            reference_voxels=before.result_voxels,
            result_ml=before.reference_ml,
            reference_ml=before.result_ml,
        ),
    )


def assert_same(one: StructureScores, other: StructureScores) -> None:
    assert one.status == other.status
    numbers = ("dice", "nsd", "hd95_mm", "assd_mm", "hd95_voxel_mm", "result_voxels", "reference_voxels", "result_ml")
    for name in numbers:
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-9, nan_ok=True), name


@given(hnp.arrays(bool, st.tuples(*[st.integers(1, 6)] * 3)).filter(np.any))
def test_a_mask_agrees_with_itself(mask: Mask) -> None:
    scores = score_masks(mask, mask, (0.7, 1.1, 2.3), tolerance_mm=0, centreline=True)
    assert (scores.dice, scores.nsd, scores.cldice) == (1, 1, 1)
    assert scores.hd95_mm == scores.assd_mm == scores.hd95_voxel_mm == 0


def test_status_and_scores_of_empty_masks() -> None:
    empty = np.zeros((3, 4, 12), bool)
    full = ~empty
    spacing = (1.0, 0.75, 1.0)
    both = score_masks(empty, empty, spacing, tolerance_mm=1, centreline=True)
    assert both.status == "both_empty"
    assert np.isnan([both.dice, both.nsd, both.hd95_mm, both.assd_mm, both.hd95_voxel_mm, both.cldice]).all()
    assert (both.result_voxels, both.result_ml) == (0, 0)
    for result, reference, status in ((empty, full, "missed"), (full, empty, "hallucinated")):
        scores = score_masks(result, reference, spacing, tolerance_mm=1, centreline=True)
        assert scores.status == status
        # 3 x 3 x 12 mm.
        assert scores.hd95_mm == scores.assd_mm == scores.hd95_voxel_mm == pytest.approx(math.sqrt(162))
        assert (scores.dice, scores.nsd, scores.cldice, scores.cldice_note) == (0, 0, 0, "")
    assert score_masks(full, empty, spacing, tolerance_mm=1).cldice is None
    assert score_masks(full, full, spacing, tolerance_mm=1).cldice is None


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("kind", "add"), [(np.int16, 0), (np.int64, 0), (np.uint32, 70_000), (np.int64, 2**40)])
def test_label_maps_as_masks(order: str, kind: type[np.integer], add: int) -> None:
    random = np.random.default_rng(3)
    small = random.integers(0, 5, (2, 9, 7, 5))
    maps = np.where(small > 0, small + add, 0)
    if np.issubdtype(kind, np.signedinteger):
        maps[:, 0] = -3
    result = np.array(maps[0], kind, order=order)
    reference = np.array(maps[1], kind)
    values = [add + 4, add + 2, add + 9]
    spacing = (1.0, 0.8, 2.0)
    tolerances = {add + 4: 1.0, add + 2: 0.5, add + 9: 0.0}
    scores = score_labels(result, reference, values, spacing, tolerances, centreline={add + 2})
    assert list(scores) == values
    for value in values:
        alone = score_masks(
            result == value,
            reference == value,
            spacing,
            tolerance_mm=tolerances[value],
            centreline=value == add + 2,
        )
        assert repr(alone) == repr(scores[value])  # NaN is not equal to itself
        assert scores[value].dice == pytest.approx(dice(result == value, reference == value), nan_ok=True)
    assert {value: one.dice for value, one in scores.items()} == pytest.approx(
        dice_per_structure(result, reference, values), nan_ok=True
    )
    assert scores[add + 9].status == "both_empty"
    assert score_labels(result, reference, [], spacing, {}) == {}


def test_background_may_be_asked_for() -> None:
    labels = np.array([[[0, 0, 1, 2]]], np.uint8)
    assert {value: shape.voxels for value, shape in label_shapes(labels, [0, 2, 7], (1, 1, 1)).items()} == {
        0: 2,
        2: 1,
        7: 0,
    }


def test_one_reference_for_many_results() -> None:
    random = np.random.default_rng(5)
    labels = random.integers(0, 3, (3, 8, 8, 8)).astype(np.uint8)
    reference = label_shapes(labels[0], [1], (1, 1, 2))[1]
    kept = reference.surfels
    for other in labels[1:]:
        result = label_shapes(other, [1], (1, 1, 2))[1]
        shared = compare(result, reference, tolerance_mm=1)
        assert shared == score_masks(other == 1, labels[0] == 1, (1, 1, 2), tolerance_mm=1)
    assert reference.surfels is kept


def test_far_surfaces_by_distance_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    start, end = (
        surface.surfels(random.random((20, 15, 18)) < 0.01, first, (0.7, 1.3, 2.9))[0]
        for first in ((3, 4, 5), (9, 2, 0))
    )
    by_tree = surface.distances_mm(start, end)
    for name in ("_PATIENCE_S", "_TRANSFORM_S"):
        monkeypatch.setattr(surface, name, 0)
    monkeypatch.setattr(surface.Points, "tree", OnlySample(surface.Points.tree.func(end)))
    assert surface.distances_mm(start, end) == pytest.approx(by_tree, abs=1e-12)


class OnlySample:
    """A tree that refuses to be searched for more than a sample."""

    def __init__(self, tree: object) -> None:
        self.tree = tree

    def query(self, points: np.ndarray, workers: int) -> object:
        assert len(points) <= surface._SAMPLE
        return self.tree.query(points, workers=workers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, 1, math.nan), (1, 1, math.inf)])
def test_spacing_is_checked(spacing: tuple[float, ...]) -> None:
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match="three positive numbers"):
        score_masks(mask, mask, spacing, tolerance_mm=1)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_tolerance_is_checked(tolerance: float) -> None:
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match="tolerance is 0 mm or more"):
        score_masks(mask, mask, (1, 1, 1), tolerance_mm=tolerance)


def test_label_maps_are_checked() -> None:
    ones = np.ones((2, 2, 2), np.uint8)
    with pytest.raises(ValueError, match="float32"):
        score_labels(ones.astype(np.float32), ones, [1], (1, 1, 1), {1: 1})
    with pytest.raises(ValueError, match="not on one grid"):
        score_labels(ones, np.ones((2, 2, 3), np.uint8), [1], (1, 1, 1), {1: 1})
    with pytest.raises(ValueError, match="three axes, not 2"):
        score_labels(ones[0], ones[0], [1], (1, 1, 1), {1: 1})
    with pytest.raises(ValueError, match=r"no tolerance for the values \[2\]"):
        score_labels(ones, ones, [1, 2], (1, 1, 1), {1: 1})
    one, other = (label_shapes(ones, [1], (1, 1, step))[1] for step in (1, 2))
    with pytest.raises(ValueError, match="not on one grid"):
        compare(one, other, tolerance_mm=1)
