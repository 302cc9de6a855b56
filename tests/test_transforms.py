"""Transforms and sampling, against per-voxel loops, scipy and nibabel."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import Nifti1Image
from nibabel.processing import resample_from_to
from scipy import ndimage

from atlassegfm import transforms
from atlassegfm.geometry import Grid
from atlassegfm.image import Volume
from atlassegfm.transforms import Affine, Chain, DisplacementField, folding_share, points_of, resample, warp_labels
from conftest import ORIENTATIONS, SHEARED, affine_of, rotation

Factory = Callable[..., Volume]

ALL = {**ORIENTATIONS, "sheared": SHEARED}
TURN = Affine(affine_of(rotation(5, -8, 12) * 1.05, (1.0, -2.0, 3.0)))


def trilinear(values: np.ndarray, ijk: np.ndarray) -> float:
    """Eight corners, one after the other; indices beyond the border are those of the border."""
    ijk = np.clip(ijk, 0, np.array(values.shape) - 1)
    low = np.floor(ijk).astype(int)
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        weight = 1.0
        for axis in range(3):
            part = ijk[axis] - low[axis]
            weight *= part if corner[axis] else 1 - part
        at = np.minimum(low + corner, np.array(values.shape) - 1)
        total += weight * float(values[tuple(at)])
    return total


def random_field(grid: Grid, amount_mm: float, seed: int = 0) -> DisplacementField:
    values = np.random.default_rng(seed).normal(0, amount_mm, (3, *grid.shape))
    return DisplacementField(grid, values.astype(np.float32))


points = st.lists(st.tuples(*[st.floats(-100, 100)] * 3), min_size=1, max_size=4).map(np.array)


# --- maps


def test_affine_hand_worked() -> None:
    quarter = Affine(affine_of(np.array([[0, -1.0, 0], [1, 0, 0], [0, 0, 2]]), (10.0, 0.0, 0.0)))
    assert quarter.map(np.array([[1.0, 2.0, 3.0]])).tolist() == [[8.0, 1.0, 6.0]]


@given(points)
def test_affine_inverse_and_identity(where: np.ndarray) -> None:
    assert np.array_equal(Affine.identity().map(where), where)
    assert np.allclose(TURN.inverse().map(TURN.map(where)), where)


@given(points)
def test_chain_applies_the_first_first(where: np.ndarray) -> None:
    shift = Affine(affine_of(np.eye(3), (1.0, 2.0, 3.0)))
    both = Chain((shift, TURN))
    assert np.allclose(both.map(where), Affine(TURN.matrix @ shift.matrix).map(where))
    assert np.array_equal(Chain(()).map(where), where)


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_displacement_field_against_a_loop(affine: np.ndarray) -> None:
    field = random_field(Grid((4, 3, 5), affine), 2.0)
    random = np.random.default_rng(1)
    where = field.grid.voxel_to_world(random.uniform(-2, 6, (40, 3)))  # inside and outside
    before = where.copy()
    moved = field.map(where)
    assert np.array_equal(where, before)  # the caller's points are not changed
    for point, result in zip(where, moved, strict=True):
        ijk = field.grid.world_to_voxel(point)
        crude = [point[c] + trilinear(field.displacement_mm[c], ijk) for c in range(3)]
        assert np.allclose(result, crude, atol=1e-4)


def test_displacement_field_of_one_node_is_a_shift() -> None:
    field = DisplacementField(Grid((1, 1, 1), np.eye(4)), np.array([1, 2, 3], np.float32).reshape(3, 1, 1, 1))
    assert np.allclose(field.map(np.array([[50.0, -7.0, 0.25]])), [[51.0, -5.0, 3.25]])
    assert np.allclose(field.jacobian_determinant(), 1)


def test_displacement_field_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"field of shape \(3, 2, 2, 2\) on a grid of shape \(3, 3, 3\)"):
        DisplacementField(Grid((3, 3, 3), np.eye(4)), np.zeros((3, 2, 2, 2), np.float32))


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_jacobian_of_a_linear_field_is_its_determinant(affine: np.ndarray) -> None:
    grid = Grid((4, 5, 6), affine)
    nodes = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    linear = np.random.default_rng(0).normal(0, 0.2, (3, 3))
    field = DisplacementField(grid, np.moveaxis(nodes @ linear.T, -1, 0).astype(np.float32))
    assert np.allclose(field.jacobian_determinant(), np.linalg.det(np.eye(3) + linear), atol=1e-3)
    assert folding_share(Affine(affine_of(np.eye(3) + linear, (0, 0, 0))), grid) == 0


def test_folding() -> None:
    grid = Grid((6, 6, 6), ORIENTATIONS["oblique"])
    assert folding_share(Affine.identity(), grid) == 0
    assert folding_share(Affine(np.diag([-1.0, 1, 1, 1])), grid) == 1
    # One node pushed 3 mm past its neighbours at 1 mm: the differences on both sides of it are over.
    values = np.zeros((3, 7, 1, 1), np.float32)
    values[0, 3] = 3
    share = folding_share(DisplacementField(Grid((7, 1, 1), np.eye(4)), values), Grid((7, 1, 1), np.eye(4)))
    assert share == pytest.approx(1 / 7)  # 1 + (0 - 3) / 2 < 0 at the node after it only


# --- resampling of intensities


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_identity_in_identity_out(synthetic_image: Factory, affine: np.ndarray, order: int) -> None:
    image = synthetic_image((5, 6, 7), affine)
    assert np.allclose(resample(image, image.grid, order=order), image.data, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_a_known_shift_is_undone(synthetic_image: Factory, affine: np.ndarray) -> None:
    image = synthetic_image((6, 7, 8), affine)
    step = image.grid.affine[:3, :3] @ (1, 2, -1)
    shifted = resample(image, image.grid, Affine(affine_of(np.eye(3), tuple(step))), outside=-1)
    assert np.allclose(shifted[:-1, :-2, 1:], image.data[1:, 2:, :-1], rtol=1e-5, atol=1e-2)
    assert (shifted[-1] == -1).all()
    assert (shifted[:, -2:] == -1).all()
    assert (shifted[:, :, 0] == -1).all()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_resample_against_nibabel(synthetic_image: Factory, affine: np.ndarray, order: int) -> None:
    image = synthetic_image((9, 10, 11), ORIENTATIONS["oblique"])
    onto = Grid(
        (6, 7, 8), affine_of(affine[:3, :3] * 0.7, tuple(image.grid.centre_mm - affine[:3, :3] @ (2.03, 2.51, 2.37)))
    )
    # (no voxel lies half way between two others, where rounding decides)
    ours = resample(image, onto, order=order)
    theirs = resample_from_to(Nifti1Image(image.data, image.grid.affine), (onto.shape, onto.affine), order=order)
    # The two differ in the half voxel beyond the border on purpose.
    ijk = image.grid.world_to_voxel(onto.voxel_to_world(np.moveaxis(np.indices(onto.shape), 0, -1)))
    inner = ((ijk >= 0) & (ijk <= np.array(image.grid.shape) - 1)).all(axis=-1)
    assert inner.any()
    assert np.allclose(ours[inner], theirs.get_fdata()[inner], rtol=1e-4, atol=1e-2)


def test_resample_through_an_affine_against_scipy(synthetic_image: Factory) -> None:
    image = synthetic_image((9, 10, 11), ORIENTATIONS["LPS"])
    onto = Grid((8, 8, 8), ORIENTATIONS["SRA"] @ np.diag([0.5, 0.5, 0.5, 1]))
    onto = Grid(onto.shape, affine_of(onto.affine[:3, :3], tuple(image.grid.centre_mm)))
    voxel_to_voxel = image.grid.inverse_affine @ TURN.matrix @ onto.affine
    crude = ndimage.affine_transform(
        image.data, voxel_to_voxel[:3, :3], voxel_to_voxel[:3, 3], onto.shape, order=1, mode="nearest"
    )
    ours = resample(image, onto, TURN, outside=np.nan)
    inside = np.isfinite(ours)
    assert inside.mean() > 0.3
    assert np.allclose(ours[inside], crude[inside], rtol=1e-4, atol=1e-2)


def test_outside_begins_half_a_voxel_beyond_the_border() -> None:
    image = Volume(np.full((2, 2, 2), 5, np.int16), Grid((2, 2, 2), np.eye(4)))
    line = Grid((9, 1, 1), affine_of(np.diag([0.25, 1, 1]), (-1.0, 0, 0)))
    values = resample(image, line, outside=-7).ravel()  # x = -1, -0.75, ..., 1
    assert values.tolist() == [-7, -7, 5, 5, 5, 5, 5, 5, 5]


def test_chunks_change_nothing(synthetic_image: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    image, onto = synthetic_image((6, 7, 8)), Grid((7, 6, 5), ORIENTATIONS["oblique"] @ np.diag([0.4, 0.4, 0.4, 1]))
    onto = Grid(onto.shape, affine_of(onto.affine[:3, :3], tuple(image.grid.centre_mm)))
    labels = Volume((image.data > 100).astype(np.uint8), image.grid)
    whole, soft = resample(image, onto, TURN), warp_labels(labels, [1], onto, TURN)[1].to_full(onto.shape)
    monkeypatch.setattr(transforms, "_CHUNK_VOXELS", 65)  # two planes at a time, the last one alone
    assert np.array_equal(resample(image, onto, TURN), whole)
    assert np.array_equal(warp_labels(labels, [1], onto, TURN)[1].to_full(onto.shape), soft)


# --- warping of labels


def crude_warp(labels: Volume, value: int, onto: Grid, fixed_to_moving: transforms.Transform) -> np.ndarray:
    """Voxel by voxel, corner by corner; everything beyond the border is background."""
    out = np.zeros(onto.shape)
    for voxel in np.ndindex(onto.shape):
        point = fixed_to_moving.map(onto.voxel_to_world(np.array([voxel])))
        ijk = labels.grid.world_to_voxel(point)[0]
        low = np.floor(ijk).astype(int)
        for corner in itertools.product((0, 1), repeat=3):
            at = low + corner
            if ((at < 0) | (at >= labels.grid.shape)).any() or labels.data[tuple(at)] != value:
                continue
            out[voxel] += np.prod([p if c else 1 - p for p, c in zip(ijk - low, corner, strict=True)])
    return out


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_warp_labels_against_a_loop(synthetic_labels: Factory, affine: np.ndarray) -> None:
    labels = synthetic_labels((6, 7, 8), affine, values=(3, 7, 300), dtype=np.uint16)
    labels.data[0, 0, 0] = 7  # a stray voxel in the corner of the field of view
    onto = Grid((5, 6, 6), affine_of(affine[:3, :3] * 1.3, tuple(labels.grid.voxel_to_world((-0.5, -0.7, -0.3)))))
    field = random_field(Grid((3, 3, 3), affine_of(affine[:3, :3] * 3, tuple(affine[:3, 3]))), 1.0)
    turn, centre = rotation(3, 2, -4), labels.grid.centre_mm
    transform = Chain((field, Affine(affine_of(turn, tuple(centre - turn @ centre + (0.3, -0.4, 0.5))))))
    warped = warp_labels(labels, [3, 7, 300, 9], onto, transform, floor=0.0)
    assert list(warped) == [3, 7, 300, 9]
    assert warped[9].is_empty
    for value in (3, 7, 300):
        crude = crude_warp(labels, value, onto, transform)
        assert crude.max() > 0.2
        assert np.allclose(warped[value].to_full(onto.shape), crude, atol=1e-4)
    cut = warp_labels(labels, [3], onto, transform, floor=0.3)[3].to_full(onto.shape)
    crude = crude_warp(labels, 3, onto, transform)
    assert np.allclose(cut, np.where(crude >= 0.3, crude, 0), atol=1e-4)


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_warp_labels_identity(synthetic_labels: Factory, affine: np.ndarray) -> None:
    labels = synthetic_labels((7, 8, 9), affine, values=(1, 5))
    for value, local in warp_labels(labels, [1, 5], labels.grid, Affine.identity()).items():
        mask = labels.data == value
        assert np.allclose(local.to_full(labels.grid.shape), mask, atol=1e-4)
        inside = np.argwhere(mask)
        assert local.start == tuple(inside.min(axis=0))
        assert local.stop == tuple(inside.max(axis=0) + 1)


@settings(max_examples=20)
@given(st.tuples(*[st.floats(-3, 3)] * 3))
def test_shares_of_all_labels_never_exceed_one(shift: tuple[float, float, float]) -> None:
    data = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    labels = Volume(data, Grid((5, 6, 7), ORIENTATIONS["oblique"]))
    warped = warp_labels(labels, [1, 2, 3], labels.grid, Affine(affine_of(np.eye(3), shift)), floor=0.0)
    total = sum(local.to_full((5, 6, 7)) for local in warped.values())
    assert total.min() >= 0
    assert total.max() <= 1 + 1e-5


def test_warp_of_one_voxel_and_of_nothing() -> None:
    grid = Grid((3, 3, 3), np.eye(4))
    data = np.zeros((3, 3, 3), np.uint8)
    data[1, 1, 1] = 1
    shift = Affine(affine_of(np.eye(3), (0.25, 0, 0)))
    local = warp_labels(Volume(data, grid), [1], grid, shift)[1]
    # Fixed x = 1 reads moving 1.25: three quarters of the voxel; fixed x = 0 reads 0.25: one quarter.
    assert local.start == (0, 1, 1)
    assert np.allclose(local.values.ravel(), [0.25, 0.75])
    far = Affine(affine_of(np.eye(3), (100.0, 0, 0)))
    assert warp_labels(Volume(data, grid), [1], grid, far)[1].is_empty
    assert warp_labels(Volume(data, grid), [2], grid, shift)[2].is_empty
    assert warp_labels(Volume(data, grid), [], grid, shift) == {}
    assert warp_labels(Volume(np.zeros_like(data), grid), [1], grid, shift)[1].is_empty


def test_points_of() -> None:
    mask = np.zeros((2, 3, 4), bool)
    mask[1, 2, 3] = True
    assert points_of(mask, Grid((2, 3, 4), ORIENTATIONS["RAS"])).tolist() == [[-18.5, 34.0, 19.0]]
    assert points_of(np.zeros((2, 3, 4)), Grid((2, 3, 4), np.eye(4))).shape == (0, 3)
