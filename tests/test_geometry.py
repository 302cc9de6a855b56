"""Grid: voxels to world and back, crops, turns; checked by hand-worked numbers, loops and nibabel."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from conftest import ORIENTATIONS, SHEARED, affine_of, rotation

degrees = st.floats(-180, 180)
spacings = st.floats(0.1, 20)
signs = st.sampled_from([-1.0, 1.0])


@st.composite
def grids(draw: st.DrawFn, largest: int = 12) -> Grid:
    """Any grid of a scanner or a program: turned, flipped, permuted, sheared, anisotropic, far from the origin."""
    axes = rotation(*(draw(degrees) for _ in range(3))) @ np.diag([draw(spacings) * draw(signs) for _ in range(3)])
    shear = np.eye(3)
    shear[0, 1], shear[0, 2], shear[1, 2] = (draw(st.floats(-0.4, 0.4)) for _ in range(3))
    order = draw(st.permutations(range(3)))
    origin = tuple(draw(st.floats(-500, 500)) for _ in range(3))
    shape = tuple(draw(st.integers(1, largest)) for _ in range(3))
    return Grid(shape, affine_of((axes @ shear)[:, order], origin))


points = st.lists(st.tuples(*[st.floats(-300, 300)] * 3), min_size=1, max_size=5).map(np.array)


def test_hand_worked_numbers() -> None:
    # 90 degrees about z: i runs to the front, j to the left.
    grid = Grid((10, 20, 5), affine_of(np.array([[0, -2.0, 0], [1.5, 0, 0], [0, 0, 4.0]]), (100.0, -50.0, 10.0)))
    assert grid.voxel_to_world((2, 3, 1)).tolist() == [94.0, -47.0, 14.0]
    assert np.allclose(grid.world_to_voxel((94.0, -47.0, 14.0)), (2, 3, 1))
    assert grid.spacing_mm.tolist() == [1.5, 2.0, 4.0]
    assert grid.voxel_volume_mm3 == pytest.approx(12.0)
    assert grid.size == 1000
    assert grid.axis_codes == "ALS"
    assert grid.centre_mm.tolist() == [81.0, -43.25, 18.0]
    assert grid.describe() == "10 x 20 x 5 voxels of 1.5 x 2 x 4 mm, axes ALS"


def test_example_of_the_documentation() -> None:
    grid = Grid((256, 256, 60), affine_of(np.diag([-0.9, -0.9, 3.0]), (115.2, 115.2, -90.0)))
    assert np.allclose(grid.voxel_to_world((100, 50, 20)), (25.2, 70.2, -30.0))
    assert np.allclose(grid.world_to_voxel((25.2, 70.2, -30.0)), (100, 50, 20))
    assert grid.axis_codes == "LPS"
    canonical = grid.canonical()
    assert np.allclose(canonical.voxel_to_world((155, 205, 20)), (25.2, 70.2, -30.0))
    assert np.allclose(canonical.voxel_to_world((0, 0, 0)), (-114.3, -114.3, -90.0))


@given(grids(), points)
def test_world_and_voxel_are_inverse(grid: Grid, ijk: np.ndarray) -> None:
    assert np.allclose(grid.world_to_voxel(grid.voxel_to_world(ijk)), ijk, atol=1e-6)


@given(grids(), points)
def test_voxel_to_world_is_the_homogeneous_product(grid: Grid, ijk: np.ndarray) -> None:
    crude = [(grid.affine @ np.append(one, 1))[:3] for one in ijk]
    assert np.allclose(grid.voxel_to_world(ijk), crude)
    assert np.allclose(grid.voxel_to_world(ijk), nib.affines.apply_affine(grid.affine, ijk))


@given(grids())
def test_spacing_is_the_distance_of_neighbours(grid: Grid) -> None:
    for axis in range(3):
        step = grid.voxel_to_world(np.eye(3)[axis]) - grid.voxel_to_world((0, 0, 0))
        assert np.isclose(grid.spacing_mm[axis], np.linalg.norm(step))
    assert np.allclose(grid.spacing_mm, nib.affines.voxel_sizes(grid.affine))


@given(grids())
def test_corners_and_centre(grid: Grid) -> None:
    crude = [grid.voxel_to_world(ijk) for ijk in itertools.product(*[(0, n - 1) for n in grid.shape])]
    assert np.allclose(np.sort(grid.corners_mm, axis=0), np.sort(crude, axis=0))
    assert np.allclose(grid.corners_mm.mean(axis=0), grid.centre_mm)


@given(grids())
def test_canonical_moves_no_voxel(grid: Grid) -> None:
    canonical = grid.canonical()
    index = np.arange(grid.size).reshape(grid.shape)
    turned = nib.as_closest_canonical(nib.Nifti1Image(index.astype(np.int32), grid.affine))
    assert canonical.shape == turned.shape
    assert np.allclose(canonical.affine, turned.affine)
    # Each voxel, found by its number, is where it was.
    for number in range(0, grid.size, max(1, grid.size // 7)):
        before = grid.voxel_to_world(np.argwhere(index == number)[0])
        after = canonical.voxel_to_world(np.argwhere(np.asarray(turned.dataobj) == number)[0])
        assert np.allclose(before, after, atol=1e-6)
    assert np.array_equal(canonical.canonical().affine, canonical.affine)


@given(grids())
def test_axes_relative_to_the_canonical_grid(grid: Grid) -> None:
    orientation = grid.axes_relative_to(grid.canonical())
    assert orientation is not None
    there = nib.orientations.apply_orientation(np.arange(grid.size).reshape(grid.shape), orientation)
    back = grid.canonical().axes_relative_to(grid)
    assert back is not None
    assert np.array_equal(nib.orientations.apply_orientation(there, back), np.arange(grid.size).reshape(grid.shape))


def test_axes_relative_to_other_voxels_is_none() -> None:
    grid = Grid((4, 5, 6), ORIENTATIONS["oblique"])
    shifted = grid.affine.copy()
    shifted[0, 3] += 0.5
    assert grid.axes_relative_to(Grid((4, 5, 6), shifted)) is None
    assert grid.axes_relative_to(Grid((4, 5, 7), grid.affine)) is None
    assert grid.axes_relative_to(Grid((4, 5, 6), ORIENTATIONS["LPS"])) is None


@given(grids(), st.data())
def test_crop_keeps_the_world(grid: Grid, data: st.DataObject) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in grid.shape]
    stop = [data.draw(st.integers(first + 1, n)) for first, n in zip(start, grid.shape, strict=True)]
    box = grid.crop(start, stop)
    assert box.shape == tuple(np.subtract(stop, start))
    assert np.allclose(box.voxel_to_world((0, 0, 0)), grid.voxel_to_world(start))
    last = np.array(stop) - 1
    assert np.allclose(box.voxel_to_world(last - start), grid.voxel_to_world(last))


@pytest.mark.parametrize(
    ("start", "stop"), [((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (5, 2, 2)), ((2, 0, 0), (2, 2, 2)), ((3, 0, 0), (1, 2, 2))]
)
def test_crop_outside_is_refused(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"the box .* is not inside a grid of shape \(4, 4, 4\)"):
        Grid((4, 4, 4), np.eye(4)).crop(start, stop)


def test_contains_half_a_voxel_of_border() -> None:
    grid = Grid((3, 3, 3), np.diag([2.0, 2, 2, 1]))
    inside = grid.contains([[0, 0, 0], [-0.99, 0, 0], [-1.01, 0, 0], [4.99, 4.99, 4.99], [0, 5.01, 0]])
    assert inside.tolist() == [True, True, False, True, False]


def test_matches_up_to_a_tenth_of_a_voxel() -> None:
    grid = Grid((5, 5, 5), ORIENTATIONS["oblique"])
    for shift_mm, same in ((0.0, True), (0.149, True), (0.151, False)):  # a tenth of 1.5 mm
        affine = grid.affine.copy()
        affine[2, 3] += shift_mm
        other = Grid((5, 5, 5), affine)
        assert grid.distance_mm(other) == pytest.approx(shift_mm, abs=1e-9)
        assert grid.matches(other) is same
        assert other.matches(grid) is same
    assert not grid.matches(Grid((5, 5, 6), grid.affine))


def test_a_flip_does_not_match() -> None:
    grid = Grid((5, 5, 5), ORIENTATIONS["RAS"])
    assert not grid.matches(Grid((5, 5, 5), ORIENTATIONS["LAS"]))


def test_one_voxel() -> None:
    grid = Grid((1, 1, 1), ORIENTATIONS["oblique"])
    assert grid.size == 1
    assert np.allclose(grid.corners_mm, grid.centre_mm)
    assert grid.canonical().shape == (1, 1, 1)
    assert grid.crop((0, 0, 0), (1, 1, 1)).matches(grid)


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 4), (4, 4, -1), (4, 4, 4, 4)])
def test_unusable_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="the image has shape .*; expected three positive numbers of voxels"):
        Grid(shape, np.eye(4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1.0, 1, 0, 1]), r"the affine is singular \(voxel axes of length 1, 1, 0 mm that do not span"),
        (affine_of(np.array([[1.0, 1, 0], [0, 0, 0], [0, 0, 1]]), (0, 0, 0)), "the affine is singular"),
        (np.diag([1.0, np.nan, 1, 1]), "the affine is not a finite 4 x 4 matrix; correct the header"),
        (np.diag([1.0, np.inf, 1, 1]), "the affine is not a finite 4 x 4 matrix"),
        (np.eye(3), "the affine is not a finite 4 x 4 matrix"),
        (np.diag([1.0, 1, 1, 2]), r"the affine ends in the row \[0.0, 0.0, 0.0, 2.0\]; expected 0 0 0 1"),
    ],
)
def test_unusable_affines(affine: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grid((4, 4, 4), affine)


def test_tiny_voxels_are_not_singular() -> None:
    assert Grid((4, 4, 4), np.diag([1e-4, 1e-4, 1e-4, 1])).voxel_volume_mm3 == pytest.approx(1e-12)


def test_a_tilted_gantry_is_not_singular() -> None:
    assert Grid((4, 4, 4), SHEARED).voxel_volume_mm3 == pytest.approx(12.0)


def test_the_affine_cannot_be_changed_from_outside() -> None:
    affine = np.eye(4)
    grid = Grid((4, 4, 4), affine)
    affine[0, 3] = 99
    assert grid.affine[0, 3] == 0
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 3] = 99
