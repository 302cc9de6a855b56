"""Transforms and sampling, against per-voxel loops, scipy and nibabel."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import Nifti1Image
from nibabel.processing import resample_from_to
from scipy import ndimage

from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.transforms import maps as transforms
from atlassegfm.transforms.inverse import invert, invert_field
from atlassegfm.transforms.jacobian import deformation_statistics, jacobian_statistics, nodes_in
from atlassegfm.transforms.maps import Affine, Chain, DisplacementField, displacement_on, stages_of
from atlassegfm.transforms.resample import resample, warp_labels
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


def test_jacobian_in_slabs_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    field = random_field(Grid((9, 5, 4), ORIENTATIONS["oblique"]), 2.0)
    whole = field.jacobian_determinant()
    assert (whole <= 0).any()
    for planes in (1, 2, 4):
        monkeypatch.setattr(transforms, "_CHUNK_VOXELS", planes * 20)
        np.testing.assert_array_equal(field.jacobian_determinant(), whole)


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_jacobian_statistics_of_a_uniform_scaling(affine: np.ndarray) -> None:
    grid = Grid((5, 6, 7), affine)
    found = jacobian_statistics(displacement_on(Affine(np.diag([1.1, 1.1, 1.1, 1])), grid))
    assert found.folding == 0
    for name in ("minimum", "percentile_1", "percentile_5", "median", "percentile_95", "percentile_99"):
        assert getattr(found, name) == pytest.approx(1.331, abs=1e-3)
    assert found.log_deviation == pytest.approx(0, abs=1e-3)


def test_jacobian_statistics_hand_worked() -> None:
    """A line of nodes 1 mm apart, the fourth 3 mm too far to the right."""
    values = np.zeros((3, 7, 1, 1), np.float32)
    values[0, 3] = 3
    field = DisplacementField(Grid((7, 1, 1), np.eye(4)), values)
    assert field.jacobian_determinant().ravel().tolist() == [1, 1, 2.5, 1, -0.5, 1, 1]
    found = jacobian_statistics(field)
    assert found.folding == pytest.approx(1 / 7)
    assert (found.minimum, found.median) == (-0.5, 1)
    # Sorted: -0.5, 1, 1, 1, 1, 1, 2.5; the 1st percentile lies 0.06 of the way from the first to the second.
    assert found.percentile_1 == pytest.approx(-0.5 + 0.06 * 1.5)
    assert found.percentile_5 == pytest.approx(-0.5 + 0.3 * 1.5)
    assert found.percentile_95 == pytest.approx(1 + 0.7 * 1.5)
    assert found.percentile_99 == pytest.approx(1 + 0.94 * 1.5)
    # Logarithms 0 five times and log 2.5 once: mean log 2.5 / 6, variance (log 2.5)^2 5 / 36.
    assert found.log_deviation == pytest.approx(np.log(2.5) * np.sqrt(5) / 6)
    mask = np.ones((7, 1, 1), bool)
    mask[4] = False
    assert jacobian_statistics(field, mask).folding == 0
    assert jacobian_statistics(field, mask).minimum == 1


def test_jacobian_statistics_of_nothing_and_of_a_mirror() -> None:
    field = displacement_on(Affine(np.diag([-1.0, 1, 1, 1])), Grid((3, 3, 3), np.eye(4)))
    mirrored = jacobian_statistics(field)
    assert (mirrored.folding, mirrored.minimum) == (1, -1)
    assert np.isnan(mirrored.log_deviation)
    nothing = jacobian_statistics(field, np.zeros((3, 3, 3), bool))
    assert np.isnan([nothing.folding, nothing.minimum, nothing.median, nothing.log_deviation]).all()
    with pytest.raises(ValueError, match=r"mask of shape \(2, 2, 2\) for a field on a grid of shape \(3, 3, 3\)"):
        jacobian_statistics(field, np.ones((2, 2, 2), bool))


def test_deformation_statistics_of_one_field() -> None:
    values = np.zeros((3, 7, 1, 1), np.float32)
    values[0, 3] = 3
    field = DisplacementField(Grid((7, 1, 1), np.eye(4)), values)  # determinants 1, 1, 2.5, 1, -0.5, 1, 1
    part = Grid((3, 1, 1), affine_of(np.eye(3), (3.0, 0.0, 0.0)))
    folding, found = deformation_statistics(field, None, lambda nodes: nodes_in(part, nodes))
    assert folding == found.folding == pytest.approx(1 / 3)
    assert found.percentile_99 == pytest.approx(1)
    folding, found = deformation_statistics(field, None, lambda nodes: np.zeros(nodes.shape, bool))
    assert folding == 0
    assert np.isnan(found.minimum)


def test_deformation_statistics_of_two_fields() -> None:
    """12 nodes along x, 1 mm apart, and a box over the four from 3 to 6 mm, whose own are half as far apart."""
    values = np.zeros((3, 12, 3, 3), np.float32)
    values[0, 9] = 3  # folds at node 10
    values[0, :5] = -0.1 * np.arange(5).reshape(-1, 1, 1)  # 0.9 times the size, half of the box too
    values[0, 5:8] = -0.4
    axes = np.diag([1.0, 10.0, 10.0])
    field = DisplacementField(Grid((12, 3, 3), affine_of(axes, (0.0, 0.0, 0.0))), values)
    box = Grid((8, 6, 6), affine_of(axes / 2, (3.0, -2.5, -2.5)))
    inner = np.zeros((3, *box.shape), np.float32)
    inner[0, 3, 2, 2] = 2  # of 0.5 mm apart: folds at the node after it
    local = DisplacementField(box, inner)
    determinant = displacement_on(Chain((local, field)), box).jacobian_determinant()
    assert (determinant <= 0).sum() == 1
    folding, found = deformation_statistics(field, local, lambda nodes: np.ones(nodes.shape, bool))
    # Outside the box 8 x 9 nodes of 100 mm3, 9 of them folded; in it 288 of 12.5 mm3, one of them folded.
    assert folding == pytest.approx((9 * 100 + 12.5) / (72 * 100 + 288 * 12.5))
    assert found.folding == pytest.approx(1 / 288)
    assert found.minimum == determinant.min()
    folding, found = deformation_statistics(field, local, lambda nodes: nodes_in(box, nodes))
    assert folding == found.folding
    assert found.median == pytest.approx(np.median(determinant))
    folding, _ = deformation_statistics(field, local, lambda nodes: np.zeros(nodes.shape, bool))
    assert folding == 0


# --- ways back


def bent_field(grid: Grid, amount_mm: float, wave_mm: float = 12.0) -> DisplacementField:
    """Smooth, without folds while ``amount_mm`` is below ``wave_mm``."""
    nodes = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1)) - grid.centre_mm
    values = amount_mm * np.sin(np.roll(nodes, 1, axis=-1) / wave_mm + (0.3, 0.9, 1.7))
    values += 0.3 * amount_mm * np.cos(nodes / wave_mm)
    return DisplacementField(grid, np.moveaxis(values, -1, 0).astype(np.float32))


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_inverse_of_a_smooth_field(affine: np.ndarray) -> None:
    field = bent_field(Grid((11, 12, 9), affine), 4.0)
    inverse = invert_field(field, field.grid, tolerance_mm=0.001)
    assert inverse.converged.all()
    nodes = field.grid.voxel_to_world(np.moveaxis(np.indices(field.grid.shape), 0, -1).reshape(-1, 3))
    there = inverse.field.map(nodes)
    assert np.linalg.norm(there - nodes, axis=1).max() > 3
    miss = np.linalg.norm(field.map(there) - nodes, axis=1)
    assert miss.max() < 0.002  # at the nodes the tolerance holds
    np.testing.assert_allclose(miss, inverse.residual_mm.ravel(), atol=1e-4)
    inner = field.grid.voxel_to_world(np.random.default_rng(0).uniform(3, np.array(field.grid.shape) - 4, (200, 3)))
    # Between them, and the other way round, the result is interpolated.
    assert np.abs(inverse.field.map(field.map(inner)) - inner).max() < 0.4


def test_inverse_on_other_nodes_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    field = bent_field(Grid((11, 12, 9), ORIENTATIONS["oblique"]), 3.0)
    axes = field.grid.affine[:3, :3] * 0.4
    grid = Grid((7, 6, 5), affine_of(axes, tuple(field.grid.centre_mm - axes @ (3, 2.5, 2))))
    inverse = invert_field(field, grid, tolerance_mm=1e-4)
    assert inverse.field.grid is grid
    inner = grid.voxel_to_world(np.random.default_rng(0).uniform(1, np.array(grid.shape) - 2, (100, 3)))
    assert np.abs(field.map(inverse.field.map(inner)) - inner).max() < 0.05
    monkeypatch.setattr(transforms, "_CHUNK_VOXELS", 65)
    np.testing.assert_array_equal(
        invert_field(field, grid, tolerance_mm=1e-4).field.displacement_mm, inverse.field.displacement_mm
    )


@settings(max_examples=25)
@given(
    shift=st.tuples(*[st.floats(-20, 20)] * 3),
    scale=st.floats(0.3, 3.5),
    name=st.sampled_from(sorted(ORIENTATIONS)),
)
def test_inverse_of_shifts_and_of_strong_scaling(shift: tuple[float, float, float], scale: float, name: str) -> None:
    """Stretched to more than twice its size, the plain iteration would run away."""
    grid = Grid((9, 9, 9), ORIENTATIONS[name])
    centre = grid.centre_mm
    linear = Affine(affine_of(np.eye(3) * scale, tuple(centre * (1 - scale) + shift)))
    inverse = invert_field(displacement_on(linear, grid), grid, tolerance_mm=0.01)
    assert inverse.converged.all()
    nodes = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1).reshape(-1, 3))
    there = linear.inverse().map(nodes)
    ijk = grid.world_to_voxel(there)
    reached = ((ijk >= 0) & (ijk <= 8)).all(axis=1)  # beyond its nodes the field does not scale but shift
    found, there = inverse.field.map(nodes[reached]), there[reached]
    np.testing.assert_allclose(found, there, atol=0.011 / scale + 1e-3)


def test_inverse_says_where_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    values = np.zeros((3, 9, 3, 3), np.float32)
    values[0, :4], values[0, 4:] = -5, 5  # torn apart: nothing is mapped to the middle but by one steep voxel
    values[0, 3, 1, 1], values[0, 4, 1, 1] = 9, -9
    field = DisplacementField(Grid((9, 3, 3), np.eye(4)), values)
    inverse = invert_field(field, field.grid, tolerance_mm=1e-6, iterations=5)
    assert not inverse.converged.all()
    assert inverse.residual_mm[~inverse.converged].min() > 1e-6
    assert np.isfinite(inverse.field.displacement_mm).all()
    invert(field, tolerance_mm=1e-9)
    assert "the displacement field folds, or nearly does, at " in caplog.text


def test_inverse_of_nothing_is_nothing() -> None:
    grid = Grid((3, 4, 5), ORIENTATIONS["SRA"])
    inverse = invert_field(DisplacementField(grid, np.zeros((3, 3, 4, 5), np.float32)), grid)
    assert not inverse.field.displacement_mm.any()
    assert inverse.converged.all()


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_a_chain_undone(affine: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    field = bent_field(Grid((15, 14, 13), affine), 3.0, wave_mm=20.0)
    chain = Chain((field, TURN))
    back = invert(chain)
    inner = field.grid.voxel_to_world(np.random.default_rng(0).uniform(4, 9, (100, 3)))
    assert np.abs(back.map(chain.map(inner)) - inner).max() < 0.2
    assert np.abs(invert(TURN).map(TURN.map(inner)) - inner).max() < 1e-9
    assert not caplog.records

    class Other:
        def map(self, points_mm: np.ndarray) -> np.ndarray:
            return points_mm

    with pytest.raises(TypeError, match="no way to undo a Other"):
        invert(Other())


@pytest.mark.parametrize("name", ["oblique", "oblique-flipped", "SRA"])
def test_two_fields_undone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A field that is 0 outside a box maps the box onto itself: its way back lies on the same nodes."""
    field = bent_field(Grid((25, 20, 13), ORIENTATIONS[name]), 3.0, wave_mm=50.0)
    shape = np.array([24, 26, 18])
    axes = field.grid.affine[:3, :3] @ rotation(2, -4, 6) @ np.diag([0.5, 0.4, 0.35])
    box = Grid((24, 26, 18), affine_of(axes, tuple(field.grid.centre_mm - axes @ ((shape - 1) / 2))))
    hump = np.sin(np.pi * np.moveaxis(np.indices(box.shape), 0, -1) / (shape - 1)).prod(axis=-1) ** 2
    for axis in range(3):
        np.moveaxis(hump, axis, 0)[[0, -1]] = 0
    local = DisplacementField(box, np.multiply.outer([1.2, -0.9, 1.0], hump).astype(np.float32))
    chain = Chain((local, field, TURN))
    back = invert(chain)
    assert isinstance(back, Chain)
    first, second, last = back.stages
    assert isinstance(first, Affine)
    assert isinstance(second, DisplacementField)
    assert isinstance(last, DisplacementField)
    assert (second.grid, last.grid) == (field.grid, box)
    rim = np.ones(box.shape, bool)
    rim[1:-1, 1:-1, 1:-1] = False
    assert not last.displacement_mm[:, rim].any()
    random = np.random.default_rng(0)
    # In the box, over all its border, and around it.
    where = box.voxel_to_world(random.uniform(-4, shape + 3, (2000, 3)))
    where = where[(np.abs(field.grid.world_to_voxel(where) - (12, 9.5, 6)) < (9, 7, 5)).all(axis=1)]
    inside = box.contains(where)
    assert inside.sum() > 100
    assert (~inside).sum() > 100
    assert np.linalg.norm(local.map(where) - where, axis=1).max() > 1.2
    assert np.linalg.norm(back.map(chain.map(where)) - where, axis=1).max() < 0.05
    moved = TURN.map(where)
    assert np.linalg.norm(chain.map(back.map(moved)) - moved, axis=1).max() < 0.05
    assert not caplog.records


# --- as a registration has them


def test_stages_of_takes_what_it_can_as_it_is() -> None:
    view = Grid((5, 6, 7), ORIENTATIONS["oblique"])
    field = random_field(Grid((3, 3, 3), ORIENTATIONS["LPS"]), 1.0)
    local = random_field(Grid((4, 3, 3), ORIENTATIONS["oblique"]), 1.0)
    assert stages_of(Chain((field, TURN)), view) == (None, field, TURN)
    assert stages_of(Chain((local, field, TURN)), view) == (local, field, TURN)
    assert stages_of(TURN, view) == (None, None, TURN)
    *none, identity = stages_of(Chain(()), view)
    assert none == [None, None]
    assert np.array_equal(identity.matrix, np.eye(4))
    shift = Affine(affine_of(np.eye(3), (1.0, 2.0, 3.0)))
    first, kept, merged = stages_of(Chain((local, Chain((field, shift)), Chain((TURN,)))), view)
    assert (first, kept) == (local, field)
    np.testing.assert_allclose(merged.matrix, TURN.matrix @ shift.matrix)


@pytest.mark.parametrize("shape", [(11, 12, 9), (11, 12, 1), (1, 1, 1)])
@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_stages_of_samples_all_else_at_the_voxels(affine: np.ndarray, shape: tuple[int, int, int]) -> None:
    view = Grid(shape, affine)
    field = bent_field(Grid((11, 12, 9), affine), 3.0)
    voxels = view.voxel_to_world(np.moveaxis(np.indices(view.shape), 0, -1).reshape(-1, 3))
    for transform in (
        Chain((TURN, field)),
        Chain((field, TURN, field, TURN)),
        Chain((field, field)),
        Chain((field, field, field, TURN)),
        displacement_on(TURN, view),
    ):
        none, sampled, linear = stages_of(transform, view)
        assert none is None
        assert sampled is not None
        assert sampled.grid is view
        np.testing.assert_allclose(Chain((sampled, linear)).map(voxels), transform.map(voxels), atol=1e-4)


def test_linear_part_of_a_field_alone() -> None:
    """Far from the origin too; what is left for the field is small."""
    view = Grid((11, 12, 9), affine_of(ORIENTATIONS["oblique"][:3, :3], (900.0, -700.0, 1500.0)))
    padded = Grid((13, 14, 11), affine_of(view.affine[:3, :3], tuple(view.voxel_to_world((-1, -1, -1)))))
    _, sampled, linear = stages_of(displacement_on(TURN, padded), view)
    np.testing.assert_allclose(linear.matrix[:3, :3], TURN.matrix[:3, :3], atol=1e-5)
    assert sampled is not None
    assert np.abs(sampled.displacement_mm).max() < 1e-3


def test_stages_of_refuses_what_is_flat() -> None:
    view = Grid((5, 6, 7), np.eye(4))
    flat = Affine(np.diag([1.0, 1, 0, 1]))
    padded = Grid((7, 8, 9), affine_of(np.eye(3), (-1.0, -1.0, -1.0)))
    for transform in (flat, Chain((TURN, flat)), displacement_on(flat, padded)):
        with pytest.raises(InputError, match="the linear part of the transform presses space flat; expected a map"):
            stages_of(transform, view)
    assert not Affine(np.full((4, 4), np.nan)).is_invertible
    assert Affine(np.diag([-2.0, 1, 0.5, 1])).is_invertible


def test_nodes_in_a_field_of_view() -> None:
    view = Grid((2, 2, 2), np.eye(4))
    nodes = Grid((5, 1, 1), affine_of(np.eye(3) * 0.5, (-1.0, 0, 0)))  # x = -1, -0.5, 0, 0.5, 1
    assert nodes_in(view, nodes).ravel().tolist() == [False, True, True, True, True]


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


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(ALL)),
    scale=st.floats(0.4, 2.5),
    angle=st.floats(-40, 40),
    amount_mm=st.floats(0, 12),
    seed=st.integers(0, 1000),
)
def test_what_is_left_out_of_a_warp_holds_no_label(
    name: str, scale: float, angle: float, amount_mm: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    data = np.zeros((40, 36, 20), np.uint8)
    for value in (1, 2):  # small structures, one perhaps at the border
        i, j, k = (int(generator.integers(0, n - 3)) for n in data.shape)
        data[i : i + 4, j : j + 3, k : k + 3] = value
    labels = Volume(data, Grid(data.shape, ALL[name]))
    onto = Grid((50, 33, 25), affine_of(rotation(angle, 10, -angle) @ np.diag([1.7, 1.3, 3.1]), (-40.0, 0.0, -10.0)))
    middle = Affine(affine_of(np.eye(3), tuple(labels.grid.centre_mm - scale * onto.centre_mm)))
    stretch = Affine(np.diag([scale, scale, scale, 1.0]))
    field = random_field(Grid((9, 7, 8), affine_of(np.diag([9.0, 9.0, 9.0]), (-45.0, -5.0, -15.0))), amount_mm, seed)
    transform = Chain((field, stretch, middle))
    with pytest.MonkeyPatch.context() as patch:
        some = warp_labels(labels, [1, 2], onto, transform)
        patch.setattr(
            sys.modules[resample.__module__],
            "_near_labels",
            lambda *_: lambda planes: np.ones((planes.stop - planes.start) * 33 * 25, bool),
        )
        everything = warp_labels(labels, [1, 2], onto, transform)
    for value in (1, 2):
        assert some[value].start == everything[value].start
        assert np.array_equal(some[value].values, everything[value].values)


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


@pytest.mark.parametrize("affine", ALL.values(), ids=ALL)
def test_labels_warped_by_several_transforms_are_the_mean(synthetic_labels: Factory, affine: np.ndarray) -> None:
    labels = synthetic_labels((14, 12, 10), affine, values=(2, 7))
    fits = [Affine.identity(), Affine(affine_of(np.eye(3), (0.5, 0, 0))), Affine(affine_of(np.eye(3), (-3, 2, 1)))]
    alone = [warp_labels(labels, [2, 7, 9], labels.grid, fit) for fit in fits]
    together = warp_labels(labels, [2, 7, 9], labels.grid, fits)
    assert set(together) == {2, 7, 9}
    for value in (2, 7):
        mean = np.mean([one[value].to_full(labels.grid.shape) for one in alone], axis=0)
        np.testing.assert_allclose(together[value].to_full(labels.grid.shape), mean, atol=1e-6)
    assert together[9].is_empty
    single = warp_labels(labels, [2], labels.grid, fits[:1])[2]
    np.testing.assert_array_equal(single.values, alone[0][2].values)


def test_a_label_that_one_of_two_transforms_takes_out_of_view_is_half_there() -> None:
    grid = Grid((8, 7, 6), np.diag([1.0, 2.0, 3.0, 1.0]))
    data = np.zeros(grid.shape, np.uint8)
    data[3:5, 2:4, 2:4] = 1
    far = Affine(affine_of(np.eye(3), (500, 0, 0)))
    warped = warp_labels(Volume(data, grid), [1], grid, [Affine.identity(), far])[1]
    np.testing.assert_array_equal(warped.to_full(grid.shape), data / 2)
