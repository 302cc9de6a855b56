"""The structures: translations against a cruder second implementation, then planted organs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.registration import Place, pyramid, structures
from atlassegfm.registration.affine import _parameters_of, affine_maps, homogeneous
from atlassegfm.registration.features import mind_ssc
from atlassegfm.transforms.maps import Affine
from conftest import affine_of, rotation

SIZE = 40
#: Of the structure: half axes and spacing of its stripes, in voxels.
AXES, STRIPES = (8.0, 6.0, 5.0), 5.0


# --- linear maps ------------------------------------------------------------------------------------------------


def test_no_parameters_change_nothing() -> None:
    matrix, offset = affine_maps(torch.zeros(2, 12), torch.tensor([3.0, -4.0, 5.0]))
    np.testing.assert_array_equal(matrix, np.eye(3)[None].repeat(2, axis=0))
    np.testing.assert_array_equal(offset, np.zeros((2, 3)))


@given(st.lists(st.floats(-1.5, 1.5), min_size=12, max_size=12))
def test_linear_maps_turn_stretch_and_never_mirror(numbers: list[float]) -> None:
    centre = torch.tensor([10.0, -20.0, 30.0])
    matrix, offset = (values[0].double().numpy() for values in affine_maps(torch.tensor([numbers]), centre))
    # What is left after the rotation is symmetric and positive: a stretch along some axes.
    stretch = Rotation.from_rotvec(numbers[3:6]).as_matrix().T @ matrix
    np.testing.assert_allclose(stretch, stretch.T, atol=2e-4 * np.abs(matrix).max())
    np.testing.assert_allclose(np.log(np.linalg.det(matrix)), sum(numbers[6:9]), atol=2e-3)
    np.testing.assert_allclose(
        matrix @ centre.numpy() + offset, centre.numpy() + numbers[:3], atol=1e-3 * max(1.0, np.abs(matrix).max())
    )


@given(st.lists(st.floats(-1.0, 1.0), min_size=12, max_size=12))
def test_parameters_of_a_linear_map_give_it_again(numbers: list[float]) -> None:
    centre = torch.tensor([10.0, -20.0, 30.0])
    matrix, offset = affine_maps(torch.tensor([numbers]), centre)
    linear = Affine(homogeneous(matrix[0], offset[0]))
    np.testing.assert_allclose(_parameters_of(linear, centre.double().numpy())[0], numbers, atol=1e-3)


# --- translations -----------------------------------------------------------------------------------------------------


def level_of(image: NDArray[np.float32], inside: NDArray[np.float32] | None = None) -> pyramid.Level:
    inside = np.ones_like(image) if inside is None else inside
    data, seen = (torch.from_numpy(values)[None, None] for values in (image, inside))
    i, j, k = image.shape
    return pyramid.Level(Grid((i, j, k), np.eye(4)), data, seen, seen, None)


def crude_cost(
    query: pyramid.Level,
    atlas: pyramid.Level,
    patch: structures.Patch,
    shift: tuple[int, int, int],
    sigma: float,
    *,
    brightness: bool,
) -> float:
    """Of one shift, voxel by voxel."""
    q_mind, a_mind = (mind_ssc(level.image)[0].double().numpy() for level in (query, atlas))
    q_image, a_image = (level.image[0, 0].double().numpy() for level in (query, atlas))
    weight = (patch.weight / patch.weight.sum()).double().numpy()
    mind = seen = 0.0
    here, there, weights = [], [], []
    for ijk in np.ndindex(*weight.shape):
        at = tuple(int(n + s) for n, s in zip(ijk, (side.start for side in patch.box), strict=True))
        to = tuple(n + s for n, s in zip(at, shift, strict=True))
        within = all(0 <= n < size for n, size in zip(to, q_image.shape, strict=True))
        described = q_mind[:, *to] if within else np.zeros(12)
        mind += weight[ijk] * ((described - a_mind[:, *at]) ** 2).sum()
        seen += weight[ijk] * within
        here.append(a_image[at])
        there.append(q_image[to] if within else 0.0)
        weights.append(weight[ijk])
    a, q, w = (np.array(values) for values in (here, there, weights))
    centred_a, centred_q = a - (a * w).sum(), q - (q * w).sum()
    variance = (centred_a**2 * w).sum() * (centred_q**2 * w).sum()
    correlation = (centred_a * centred_q * w).sum() / np.sqrt(variance + structures._VARIANCE_FLOOR)
    cost = (
        mind
        + structures._OUTSIDE_PENALTY * (1 - seen)
        + structures._PRIOR_WEIGHT * 0.5 * (np.array(shift) ** 2).sum() / sigma**2
    )
    if brightness:
        cost += (
            structures._CORRELATION_WEIGHT * (1 - correlation) + structures._INTENSITY_WEIGHT * ((a - q) ** 2 * w).sum()
        )
    return float(cost)


def small_pair(
    shape: tuple[int, int, int] = (12, 11, 10),
) -> tuple[pyramid.Level, pyramid.Level, LocalMap]:
    random = np.random.default_rng(3)
    query, atlas = (
        ndimage.gaussian_filter(random.uniform(0, 1, shape).astype(np.float32), 1).clip(0, 1) for _ in range(2)
    )
    inside = np.ones(shape, np.float32)
    inside[:, :, -3:] = 0
    return level_of(query), level_of(atlas, inside), LocalMap((4, 4, 4), np.ones((3, 2, 3), np.float32))


@pytest.mark.parametrize("brightness", [True, False])
def test_costs_of_shifts_are_those_of_a_cruder_search(brightness: bool) -> None:
    query, atlas, mask = small_pair()
    found = structures.StructureFit(query, atlas, 1.0, 12.0, brightness=brightness)
    patch = found.patch(mask)
    assert patch is not None
    sigma = structures._PRIOR_FRACTION * 12.0
    costs = found._costs(patch).numpy()
    reach = (costs.shape[0] - 1) // 2
    assert reach == 5
    for shift in itertools.product((-reach, -1, 0, 2, reach), repeat=3):
        expected = crude_cost(query, atlas, patch, shift, sigma, brightness=brightness)
        assert costs[tuple(n + reach for n in shift)] == pytest.approx(expected, abs=2e-3)


def test_candidates_are_the_lowest_minima_in_order() -> None:
    query, atlas, mask = small_pair((30, 30, 30))
    found = structures.StructureFit(query, atlas, 1.0, 50.0, brightness=True)
    patch = found.patch(mask)
    assert patch is not None
    costs = found._costs(patch).numpy()
    reach = (costs.shape[0] - 1) // 2
    minima = np.argwhere(ndimage.minimum_filter(costs, 5, mode="constant", cval=np.inf) == costs)
    by_cost = minima[np.argsort(costs[tuple(minima.T)])] - reach
    assert len(by_cost) > 3
    np.testing.assert_array_equal(found.candidates(patch, 3), by_cost[:3])
    np.testing.assert_array_equal(found.candidates(patch, 1000), by_cost)


def test_what_the_atlas_has_not_imaged_has_no_patch() -> None:
    query, atlas, _ = small_pair()
    found = structures.StructureFit(query, atlas, 1.0, 12.0, brightness=True)
    assert found.patch(LocalMap((4, 4, 9), np.ones((2, 2, 1), np.float32))) is None
    partly = found.patch(LocalMap((4, 4, 5), np.ones((2, 2, 4), np.float32)))
    assert partly is not None
    whole = np.zeros((12, 11, 10), np.float32)
    whole[partly.box] = partly.weight
    assert whole[4, 4, 6] == 1
    assert not whole[:, :, 7:].any()


# --- maps of structures ----------------------------------------------------------------------------------------


def organ(to_here: NDArray[np.float64], *, stripes: bool = True) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A striped ellipsoid in a faintly textured body, and its mask; ``to_here`` moves it from its place at rest."""
    nodes = np.moveaxis(np.indices((SIZE,) * 3, dtype=np.float64), 0, -1)
    back = np.linalg.inv(to_here)
    local = nodes @ back[:3, :3].T + back[:3, 3] - SIZE / 2
    x, y, z = np.moveaxis(nodes, -1, 0)
    body = 0.3 + 0.05 * np.sin(x / 4) * np.cos(y / 5) + 0.05 * np.sin(z / 3)
    # Not symmetric: one end is brighter.
    texture = 0.7 + local[..., 0] / 60 + (0.2 * np.sin(2 * np.pi * local[..., 1] / STRIPES) if stripes else 0)
    mask = ((local / AXES) ** 2).sum(axis=-1) < 1
    return np.where(mask, texture, body).astype(np.float32), mask.astype(np.float32)


def about_the_middle(matrix: NDArray[np.float64], shift: tuple[float, float, float]) -> NDArray[np.float64]:
    middle = np.full(3, SIZE / 2)
    return affine_of(matrix, tuple(middle + shift - matrix @ middle))


AT_REST = np.eye(4)
TURNED = about_the_middle(rotation(10, -12, 15) @ np.diag([1.15, 0.9, 1.1]), (7.0, -5.0, 4.0))


def dice(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(2 * np.minimum(first, second).sum() / (first.sum() + second.sum()))


def best_map(
    query: NDArray[np.float32], atlas: NDArray[np.float32], mask: NDArray[np.float32], *, brightness: bool = True
) -> structures._StructureMap | None:
    fit = structures.StructureFit(level_of(query), level_of(atlas), 1.0, float(SIZE), brightness=brightness)
    return fit.fit(LocalMap((0, 0, 0), mask))


@pytest.mark.parametrize(("brightness", "voxels"), [(True, 1.5), (False, 2.0)])
def test_map_of_an_organ_that_moved_turned_and_grew(brightness: bool, voxels: float) -> None:
    atlas, mask = organ(AT_REST)
    query, truth = organ(TURNED)
    found = best_map(query, atlas, mask, brightness=brightness)
    assert found is not None
    assert dice(mask, truth) < 0.45
    assert dice(found.mask, truth) > 0.9
    border = np.array([[AXES[0], 0, 0], [0, AXES[1], 0], [0, 0, AXES[2]]]) + SIZE / 2
    missed = (border @ found.to_query[:3, :3].T + found.to_query[:3, 3]) - (border @ TURNED[:3, :3].T + TURNED[:3, 3])
    assert np.linalg.norm(missed, axis=1).mean() < voxels
    # The mask lies where the map says.
    back = np.linalg.inv(found.to_query)
    np.testing.assert_allclose(
        found.mask, ndimage.affine_transform(mask, back[:3, :3], back[:3, 3], order=1), atol=1e-5
    )


def test_of_two_places_the_one_that_fits_in_the_end_is_kept() -> None:
    atlas, mask = organ(AT_REST)
    # A smooth lookalike of the same form lies nearer than the organ itself, which is turned and stretched.
    away = about_the_middle(rotation(0, 0, 28) @ np.diag([1.25, 0.8, 1.2]), (0.0, 0.0, 11.0))
    query, truth = organ(away)
    decoy, decoy_mask = organ(about_the_middle(np.eye(3), (0.0, 0.0, -6.0)), stripes=False)
    query = np.where(decoy_mask > 0, decoy, query)
    levels = level_of(query), level_of(atlas)
    places = structures.StructureFit(*levels, 1.0, float(SIZE), brightness=True)
    patch = places.patch(LocalMap((0, 0, 0), mask))
    assert patch is not None
    assert places.candidates(patch, 8)[0, 2] < 0
    found = best_map(query, atlas, mask)
    assert found is not None
    assert dice(found.mask, truth) > 0.7


def test_structure_that_looks_less_like_itself_elsewhere_is_left_out() -> None:
    atlas, mask = organ(AT_REST)
    # In the query the organ is dark, and what is bright is something else without its stripes.
    query = organ(AT_REST)[0]
    query = np.where(mask > 0, 0.6 - 0.5 * query, query).astype(np.float32)
    other, other_mask = organ(about_the_middle(np.eye(3), (0.0, 0.0, 7.0)), stripes=False)
    query = np.where((other_mask > 0) & (mask == 0), other, query).astype(np.float32)
    assert best_map(query, atlas, mask) is None
    # By what does not change with contrast it is found where it is.
    found = best_map(query, atlas, mask, brightness=False)
    assert found is not None
    assert dice(found.mask, mask) > 0.85


def test_dark_organ_that_moved_is_found_without_brightness() -> None:
    atlas, mask = organ(AT_REST)
    query, truth = organ(TURNED)
    query = np.where(truth > 0, 0.6 - 0.5 * query, query).astype(np.float32)
    found = best_map(query, atlas, mask, brightness=False)
    assert found is not None
    assert dice(mask, truth) < 0.45
    assert dice(found.mask, truth) > 0.85


def test_what_the_atlas_has_not_imaged_has_no_map() -> None:
    query, atlas, _ = small_pair()
    fit = structures.StructureFit(query, atlas, 1.0, 12.0, brightness=True)
    assert fit.fit(LocalMap((4, 4, 9), np.ones((2, 2, 1), np.float32))) is None


def ball(centre: tuple[float, float, float], radius: float = 6.0) -> NDArray[np.float32]:
    nodes = np.indices((SIZE,) * 3, dtype=np.float64)
    square = sum((nodes[axis] - centre[axis]) ** 2 for axis in range(3))
    return (square < radius**2).astype(np.float32)


def moved_ball(
    centre: tuple[float, float, float], shift: tuple[float, float, float], cost: float = 0.5
) -> structures._StructureMap:
    """A ball that is at ``centre`` in the query, and in the atlas where the shift leads from."""
    came_from = tuple(np.subtract(centre, shift).tolist())
    return structures._StructureMap(
        affine_of(np.eye(3), shift), ball(came_from), ball(centre), Place(0.0, cost, None, None)
    )


def test_blending_gives_each_structure_its_own_shift() -> None:
    first, second = (4.0, 0.0, -2.0), (-3.0, 2.0, 1.0)
    pair = [moved_ball((12, 20, 20), first), moved_ball((28, 20, 20), second)]
    field = structures._blend(pair, float(SIZE))
    for one, shift in zip(pair, (first, second), strict=True):
        inside = field[:, one.mask > 0]
        # From the query back to the atlas; two voxels apart they cannot both be met to the border.
        np.testing.assert_allclose(inside.mean(axis=1), -np.array(shift), atol=0.3)
    # What is halfway belongs to neither; nothing overshoots.
    assert np.abs(field[:, 20, 20, 20] + np.add(first, second) / 2).max() < 1.5
    assert np.abs(field).max() < 5


def test_a_structure_that_moved_far_is_found_once() -> None:
    """Where it was in the atlas another structure, which stayed, would lead to it a second time."""
    far, stays = moved_ball((20, 20, 30), (0.0, 0.0, 16.0), cost=1.5), moved_ball((10, 20, 10), (0.0, 0.0, 0.0))
    nodes = np.indices((SIZE,) * 3, dtype=np.float32)

    def elsewhere(field: NDArray[np.float32]) -> int:
        found = ndimage.map_coordinates(far.atlas_mask, nodes + field, order=1, mode="constant") > 0.5
        return int((found & (ball((20, 20, 30), 9.0) == 0)).sum())

    once = structures._blended([far, stays], [far.mask, stays.mask], float(SIZE))
    assert elsewhere(once) > 0.2 * far.mask.sum()
    assert elsewhere(structures._blend([far, stays], float(SIZE))) < 0.05 * far.mask.sum()


def test_places_tell_how_far_and_how_much_worse_the_second_is() -> None:
    atlas, mask = organ(AT_REST)
    query, _ = organ(about_the_middle(np.eye(3), (0.0, 0.0, 10.0)))
    decoy, decoy_mask = organ(about_the_middle(np.eye(3), (0.0, 0.0, -10.0)))

    def place(seen: NDArray[np.float32]) -> Place:
        found = best_map(seen, atlas, mask)
        assert found is not None
        return found.place

    alone, twins = place(query), place(np.where(decoy_mask > 0, decoy, query))
    assert alone.shift_mm == pytest.approx(10, abs=1)
    assert twins.shift_mm == pytest.approx(10, abs=1)
    assert twins.second_distance_mm == pytest.approx(20, abs=2)
    assert twins.margin < 0.05
    assert alone.margin > 0.3
    assert Place(0.0, 1.0, None, None).margin == 1


def test_far_from_all_structures_nothing_moves() -> None:
    field = structures._blend([moved_ball((8, 8, 8), (3.0, 3.0, 3.0))], 20.0)
    assert np.abs(field[:, 8, 8, 8] + 3).max() < 0.2
    assert np.abs(field[:, 34:, 34:, 34:]).max() < 0.05


def test_a_structure_that_matches_badly_counts_less() -> None:
    def shift_between(cost: float) -> float:
        pair = [moved_ball((20, 20, 12), (0, 0, 4.0)), moved_ball((20, 20, 28), (0, 0, -4.0), cost)]
        return float(structures._blend(pair, float(SIZE))[2, 20, 20, 20])

    assert abs(shift_between(0.5)) < 0.1
    assert shift_between(2.5) < -0.5


AXES_OF_QUERIES = {
    "straight": np.eye(3),
    "flipped, in another order": np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    "oblique": rotation(20, -15, 25),
}


@pytest.mark.parametrize("name", AXES_OF_QUERIES)
def test_search_moves_each_structure_in_world_mm(name: str) -> None:
    """Two organs that went different ways, in queries of several orientations with slices thicker than wide."""
    axes = AXES_OF_QUERIES[name]
    shape = (44, 44, 30)
    spacing = np.diag([4.0, 4.0, 6.0])

    def grid_along(directions: NDArray[np.float64]) -> Grid:
        matrix = directions @ spacing
        return Grid(shape, affine_of(matrix, tuple(-matrix @ (np.array(shape) - 1) / 2)))

    def scan(grid: Grid, centres: list[NDArray[np.float64]]) -> tuple[Volume, Volume]:
        world = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
        x, y, z = np.moveaxis(world, -1, 0)
        data = np.where(np.linalg.norm(world, axis=-1) < 85, 0.3 + 0.05 * np.sin(x / 13) * np.cos((y + z) / 15), 0.0)
        labels = np.zeros(grid.shape, np.uint8)
        for value, centre in enumerate(centres, start=1):
            local = world - centre
            inside = np.linalg.norm(local / (24, 18, 20), axis=-1) < 1
            data = np.where(inside, 0.6 + 0.15 * value * np.sin(local[..., value - 1] / 5), data)
            labels[inside] = value
        return Volume(data.astype(np.float32), grid), Volume(labels, grid)

    here = [np.array([-35.0, 5.0, -10.0]), np.array([35.0, -5.0, 0.0])]
    there = [here[0] + (4.0, 10.0, 18.0), here[1] + (-6.0, -12.0, -14.0)]
    moving, labels = scan(grid_along(np.eye(3)), here)
    fixed, _ = scan(grid_along(axes), there)
    field = structures.fit(
        pyramid.prepare(fixed, None, 5.0, "query"),
        pyramid.prepare(moving, labels, 5.0, "atlas"),
        labels,
        Affine.identity(),
        5.0,
        "cpu",
    ).field
    assert field is not None
    missed = np.linalg.norm(field.map(np.array(there)) - here, axis=1)
    assert missed.max() < 5


def test_no_structure_in_view_gives_no_field() -> None:
    atlas, mask = organ(AT_REST)
    grid = Grid((SIZE,) * 3, np.eye(4))
    scan, labels = Volume(atlas, grid), Volume(mask.astype(np.uint8), grid)
    prepared = pyramid.prepare(scan, None, 1.0, "query"), pyramid.prepare(scan, labels, 1.0, "atlas")
    away = Affine(affine_of(np.eye(3), (200.0, 0.0, 0.0)))
    found = structures.fit(*prepared, labels, away, 1.0, "cpu")
    assert (found.field, found.places, found.contrast_difference) == (None, {}, 0)
