"""Registration: each part against a cruder second implementation, then whole runs with a known answer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

import scenes
from atlassegfm.core.errors import RegistrationError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.registration import Registration, affine, features, objective, pyramid, register, sampling, structures
from atlassegfm.registration.engines import instance
from atlassegfm.registration.pyramid import Pair, Start
from atlassegfm.settings import InstanceSettings, RegistrationSettings
from atlassegfm.transforms.maps import Affine, DisplacementField
from atlassegfm.transforms.resample import resample
from conftest import ORIENTATIONS, SHEARED, affine_of, rotation
from deformations import centred_grid, deformed, error_mm

#: A deformable fit that is quick.
QUICK_FIT: dict[str, Any] = {"level_voxels": (4_000, 12_000), "local_voxels": 12_000, "ensemble": 1}
#: Coarser than the defaults, for speed.
QUICK = RegistrationSettings(
    coarse_voxels=4_000, fine_voxels=12_000, linear_iterations=20, instance=InstanceSettings(**QUICK_FIT)
)
LINEAR = replace(QUICK, deformable=False)
#: Turned by 8 degrees, stretched by 5 to 8 % and shifted by about 2 cm.
MOTION = affine_of(rotation(2, -3, 7) @ np.diag([1.05, 1.06, 0.92]), (12.0, -14.0, 9.0))


def seen_through(matrix: NDArray[np.float64], grid: Grid) -> Volume:
    """A scan of which every world point x shows the atlas patient at ``matrix`` x: the exact answer is ``matrix``."""
    return Volume(scenes.ATLAS.scan(Grid(grid.shape, matrix @ grid.affine)).data, grid)


def random_image(shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32))[None, None]


# --- features ---------------------------------------------------------------------------------------------------


def crude_mind(image: NDArray[np.float32]) -> NDArray[np.float64]:
    """MIND-SSC voxel by voxel, in any order of the channels."""
    size = np.array(image.shape)
    steps = [tuple(sign * row) for row in np.eye(3, dtype=int) for sign in (-1, 1)]
    pairs = [(a, b) for a, b in itertools.combinations(steps, 2) if np.sum((np.array(a) - b) ** 2) == 2]

    def at(ijk: NDArray[np.int64]) -> float:
        return float(image[tuple(np.clip(ijk, 0, size - 1))])

    distance = np.zeros((len(pairs), *image.shape))
    for ijk in np.ndindex(*image.shape):
        around = [np.array(ijk) + d for d in itertools.product((-1, 0, 1), repeat=3)]
        patch = [p for p in around if (p >= 0).all() and (p < size).all()]
        for channel, (a, b) in enumerate(pairs):
            differences = [at(p + np.array(a)) - at(p + np.array(b)) for p in patch]
            distance[(channel, *ijk)] = np.mean(np.square(differences))
    distance -= distance.min(axis=0)
    noise = distance.mean(axis=0)
    return np.exp(-distance / np.clip(noise, noise.mean() / 1000, noise.mean() * 1000))


def test_mind_is_that_of_the_paper() -> None:
    image = random_image((4, 5, 6))
    found = features.mind_ssc(image)
    assert found.shape == (1, features.MIND_CHANNELS, 4, 5, 6)
    # The order of the channels is free, but one for all voxels.
    ours, crude = found[0].flatten(1).double().numpy(), crude_mind(image[0, 0].numpy()).reshape(12, -1)
    distance = np.abs(ours[:, None] - crude[None]).max(axis=2)
    assert sorted(distance.argmin(axis=1)) == list(range(12))
    assert distance.min(axis=1).max() < 1e-4


@pytest.mark.parametrize(("factor", "offset"), [(1000.0, 0.0), (0.5, 7.0), (-1.0, 1.0)])
def test_mind_ignores_contrast(factor: float, offset: float) -> None:
    image = random_image((6, 7, 8))
    torch.testing.assert_close(features.mind_ssc(factor * image + offset), features.mind_ssc(image), atol=1e-3, rtol=0)


def test_mind_of_a_constant_is_finite() -> None:
    assert (features.mind_ssc(torch.ones(1, 1, 4, 4, 4)) == 1).all()


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_box_sum_is_uniform_filter(radius: int) -> None:
    image = random_image((7, 8, 9))
    size = 2 * radius + 1
    crude = ndimage.uniform_filter(image[0, 0].double().numpy(), size, mode="constant") * size**3
    np.testing.assert_allclose(features.box_sum(image, radius)[0, 0], crude, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 8, 9), (2, 5, 6), (5, 1, 4)])
@pytest.mark.parametrize("radius", [1, 2])
def test_box_mean_is_over_the_part_inside(shape: tuple[int, int, int], radius: int) -> None:
    image = random_image(shape)
    found = features.box_mean(image.repeat(1, 2, 1, 1, 1), radius)
    for ijk in np.ndindex(*shape):
        cube = tuple(slice(max(0, n - radius), n + radius + 1) for n in ijk)
        expected = float(image[0, 0].numpy()[cube].mean())
        assert found[(0, 0, *ijk)].item() == pytest.approx(expected, rel=1e-5)
        assert found[(0, 1, *ijk)].item() == pytest.approx(expected, rel=1e-5)


def test_local_correlation_voxel_by_voxel() -> None:
    fixed, moving = random_image((5, 6, 7), 1), random_image((5, 6, 7), 2)
    found = features.LocalCorrelation(fixed, 2)(moving)[0, 0].numpy()
    a, b = fixed[0, 0].double().numpy(), moving[0, 0].double().numpy()
    for ijk in np.ndindex(*a.shape):
        cube = tuple(slice(max(0, n - 2), n + 3) for n in ijk)
        covariance = np.mean((a[cube] - a[cube].mean()) * (b[cube] - b[cube].mean()))
        expected = covariance**2 / ((a[cube].var() + 0.02**2) * (b[cube].var() + 0.02**2))
        assert found[ijk] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (0.5, 0.2), (-1.0, 1.0)])
def test_local_correlation_ignores_contrast(factor: float, offset: float) -> None:
    image = random_image((8, 8, 8))
    assert features.LocalCorrelation(image, 2)(factor * image + offset).min() > 0.95


# --- grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_dissimilarity_is_one_minus_the_correlation_with_its_derivative(radius: int) -> None:
    fixed, moving, weight = (random_image((6, 7, 8), seed).double() for seed in (1, 2, 3))
    correlation = features.LocalCorrelation(fixed, radius)
    moving.requires_grad_(True)
    plain = (weight * (1 - correlation(moving))).sum()
    (expected,) = torch.autograd.grad(plain, moving)
    value = correlation.dissimilarity(moving, weight)
    (found,) = torch.autograd.grad(3 * value, moving)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(found, 3 * expected)


def test_a_level_has_the_voxels_wanted_unless_the_scan_is_coarser() -> None:
    grid = Grid((100, 80, 20), affine_of(np.diag([1.0, 1.0, 8.0]), (5.0, -3.0, 40.0)))
    axes = pyramid.axes_of(grid)
    level = pyramid.level_grid(grid, axes, 20_000, 1.0)
    np.testing.assert_allclose(level.spacing_mm, level.spacing_mm[0])
    assert 18_000 < level.size < 24_000
    assert pyramid.level_grid(grid, axes, 10**8, 1.0).spacing_mm == pytest.approx([1, 1, 1])
    assert pyramid.level_grid(grid, axes, 10**8, 2.0).spacing_mm == pytest.approx([2, 2, 2])


@pytest.mark.parametrize("name", ["RAS", "oblique-flipped"])
def test_a_part_of_a_scan_is_as_bright_as_in_the_whole(name: str) -> None:
    grid = centred_grid((48, 40, 36), ORIENTATIONS[name][:3, :3])
    scan, labels = scenes.ATLAS.scan(grid), scenes.ATLAS.labels(grid)
    whole = pyramid.prepare(scan, labels, 4.0, "atlas")
    points = grid.voxel_to_world(np.argwhere(labels.data > 0))
    part = pyramid.prepare_part(scan, labels, points, float(grid.spacing_mm.min()), whole)
    assert part.intensity.grid.contains(points).all()
    assert part.intensity.grid.size < grid.size
    # Not reduced: the voxels are the scan's own, in the window of the whole.
    low, high, threshold = whole.window
    ijk = np.rint(grid.world_to_voxel(part.intensity.grid.voxel_to_world(np.zeros(3)))).astype(int)
    box = tuple(slice(n, n + size) for n, size in zip(ijk, part.intensity.grid.shape, strict=True))
    np.testing.assert_allclose(
        part.intensity.data, np.clip((scan.data[box] - low) / (high - low), 0, 1), rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(part.foreground.data, scan.data[box] > threshold)
    assert part.labelled is not None
    np.testing.assert_array_equal(part.labelled.data, labels.data[box] > 0)


def test_spacings_follow_from_the_field_of_view() -> None:
    grid = Grid((100, 200, 50), np.diag([1.0, 1.0, 2.0, 1.0]))
    assert pyramid.level_spacings_mm(grid, (250_000, 31_250)) == pytest.approx((4.0, 2.0))


def test_spacings_are_no_finer_than_the_scan_and_keep_their_ratio() -> None:
    grid = Grid((10, 10, 10), np.diag([2.0, 2.0, 3.0, 1.0]))
    assert pyramid.level_spacings_mm(grid, (8_000, 64_000)) == pytest.approx((4.0, 2.0))


@pytest.mark.parametrize("affine", [*ORIENTATIONS.values(), SHEARED], ids=[*ORIENTATIONS, "sheared"])
@pytest.mark.parametrize("other", [None, rotation(30, 10, -20)], ids=["own axes", "other axes"])
def test_frame_covers_the_field_of_view(affine: NDArray[np.float64], other: NDArray[np.float64] | None) -> None:
    grid = Grid((20, 15, 9), affine)
    frame = pyramid.frame_grid(grid, 3.0, other)
    np.testing.assert_allclose(frame.spacing_mm, 3.0)
    directions = frame.affine[:3, :3] / 3
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)
    # Half a voxel beyond the outer nodes still belongs to the frame.
    ijk = frame.world_to_voxel(grid.corners_mm)
    assert (ijk >= -0.5 - 1e-9).all()
    assert (ijk <= np.array(frame.shape) - 0.5 + 1e-9).all()
    # And no larger than it must be.
    assert (ijk.min(axis=0) <= 0.5).all()


@pytest.mark.parametrize("affine", [*ORIENTATIONS.values(), SHEARED], ids=[*ORIENTATIONS, "sheared"])
def test_blocks_lie_where_their_voxels_do(affine: NDArray[np.float64]) -> None:
    spacing_mm = np.array([2.0, 1.0, 4.0])  # blocks of 2, 4 and 1 voxels are no longer than 4.5 mm
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    grid = Grid((6, 8, 3), affine_of(axes * spacing_mm, affine[:3, 3]))
    world = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    for axis in range(3):
        means = pyramid._downsample(Volume(np.ascontiguousarray(world[..., axis], dtype=np.float32), grid), 4.5)
        assert means.grid.shape == (3, 2, 3)
        expected = means.grid.voxel_to_world(np.moveaxis(np.indices(means.grid.shape), 0, -1))
        np.testing.assert_allclose(means.data, expected[..., axis], atol=1e-4)


def test_an_incomplete_block_repeats_its_last_plane() -> None:
    data = np.arange(5, dtype=np.float32)[:, None, None]
    means = pyramid._downsample(Volume(data, Grid((5, 1, 1), np.eye(4))), 2.0)
    np.testing.assert_array_equal(means.data.ravel(), [0.5, 2.5, 4])


def test_prepare_parts_body_from_air() -> None:
    grid = scenes.straight_grid()
    scan = pyramid.prepare(scenes.ATLAS.scan(grid), scenes.ATLAS.labels(grid), 4.0, "query")
    assert scan.intensity.grid.shape == (24, 20, 18)
    assert scan.labelled is not None
    assert scan.intensity.data.min() == 0
    assert scan.intensity.data.max() == 1
    np.testing.assert_array_equal(scan.labelled.data[scan.foreground.data == 0], 0)


@pytest.mark.parametrize("value", [0, 1000])
def test_a_scan_of_one_value_is_background(value: float) -> None:
    grid = scenes.straight_grid()
    blank, scan = Volume(np.full(grid.shape, value, np.float32), grid), scenes.ATLAS.scan(grid)
    with pytest.raises(RegistrationError, match="query"):
        register(blank, scan, QUICK)
    with pytest.raises(RegistrationError, match="atlas"):
        register(scan, blank, QUICK)


# --- the search over translations -------------------------------------------------------------------------------


def random_side(
    shape: tuple[int, int, int], seed: int, grid_affine: NDArray[np.float64], emphasis: float
) -> affine._WeightedScan:
    random = np.random.default_rng(seed)
    inside = torch.ones(1, 1, *shape)
    inside[..., 0] = 0
    weight, near = (torch.from_numpy(random.uniform(0, 1, (1, 1, *shape)).astype(np.float32)) for _ in range(2))
    level = pyramid.Level(Grid(shape, grid_affine), random_image(shape, seed), inside, weight * inside, near)
    return affine._WeightedScan(level, emphasis)


def crude_translation_costs(
    query: affine._WeightedScan, atlas: affine._WeightedScan
) -> dict[tuple[int, int, int], float]:
    """Cost of every shift in voxels at which the grids overlap, voxel by voxel."""
    q_shape, a_shape = query.level.grid.shape, atlas.level.grid.shape
    q_inside, a_inside = query.level.inside[0, 0].numpy(), atlas.level.inside[0, 0].numpy()
    q_features, a_features = query.features.double().numpy(), atlas.features.double().numpy()
    plain = atlas.level.weight[0, 0].double().numpy()
    q_weight, a_weight = query.weight.double().numpy(), atlas.weight.double().numpy()
    costs = {}
    for shift in itertools.product(*[range(1 - q, a) for q, a in zip(q_shape, a_shape, strict=True)]):
        total = 0.0
        for a_used, payer, payer_inside in (
            (a_weight, a_weight, "query"),
            (plain, q_weight, "atlas"),
        ):
            difference = both = inside = 0.0
            for ijk in np.ndindex(*q_shape):
                there = tuple(n + s for n, s in zip(ijk, shift, strict=True))
                if min(there) < 0 or any(n >= m for n, m in zip(there, a_shape, strict=True)):
                    continue
                product = q_weight[ijk] * a_used[there]
                both += product
                difference += product * ((q_features[:, *ijk] - a_features[:, *there]) ** 2).sum()
                if payer_inside == "query":
                    inside += q_inside[ijk] * a_used[there]
                else:
                    inside += q_weight[ijk] * a_inside[there]
            whole = payer.sum()
            penalty = affine.MISMATCH_PENALTY * (inside - both) + affine._OUTSIDE_PENALTY * (whole - inside)
            total += (difference + penalty) / whole
        costs[shift] = total
    return costs


def test_translations_are_the_best_of_all() -> None:
    axes = rotation(10, 20, 30) * 4.0
    query = random_side((4, 3, 5), 1, affine_of(axes, (5.0, 6.0, 7.0)), 0.0)
    atlas = random_side((5, 4, 3), 2, affine_of(axes, (-50.0, 1.0, 2.0)), 3.0)
    costs = crude_translation_costs(query, atlas)
    expected = []
    for _ in range(4):
        best = min(costs, key=lambda shift: costs[shift])
        expected.append(atlas.level.grid.voxel_to_world(np.array(best)) - query.level.grid.voxel_to_world(np.zeros(3)))
        costs = {k: v for k, v in costs.items() if np.abs(np.array(k) - best).max() > 1}
    np.testing.assert_allclose(affine.search_translations(query, atlas, 4), expected, atol=1e-9)


def tall_body(grid: Grid) -> Volume:
    """A long cylinder full of balls of different brightness, no two alike."""
    world = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    data = np.where((world[..., :2] ** 2).sum(axis=-1) < 50**2, 0.4, 0.0)
    random = np.random.default_rng(3)
    for _ in range(90):
        centre, radius, grey = random.uniform((-35, -35, -150), (35, 35, 200)), random.uniform(8, 16), random.random()
        data[((world - centre) ** 2).sum(axis=-1) < radius**2] = 0.2 + 0.8 * grey
    return Volume(data.astype(np.float32), grid)


def test_scans_that_share_a_third_are_found() -> None:
    def grid(bottom: float, top: float) -> Grid:
        return Grid((32, 32, round((top - bottom) / 4)), affine_of(np.diag([4.0] * 3), (-62.0, -62.0, bottom + 2)))

    atlas = tall_body(grid(-96, 96))
    query = tall_body(grid(32, 160))
    # The query's table stood elsewhere.
    moved = Volume(query.data, Grid(query.grid.shape, affine_of(np.diag([4.0] * 3), (-20.0, -90.0, -300.0))))
    truth = Affine(query.grid.affine @ np.linalg.inv(moved.grid.affine))
    prepared = (pyramid.prepare(scan, None, 4.0, "scan") for scan in (moved, atlas))
    fixed_side, moving_side = (
        affine._WeightedScan(pyramid.on_grid(s, pyramid.frame_grid(s.intensity.grid, 6.0, np.eye(3)), "cpu"), 0.0)
        for s in prepared
    )
    shift = affine.search_translations(fixed_side, moving_side, 1)[0]
    assert np.linalg.norm(shift - truth.matrix[:3, 3]) < 6
    found = register(moved, atlas, LINEAR).fixed_to_moving
    assert error_mm(found, truth, moved) < 3


# --- the linear fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RAS", "LPS", "oblique"])
def test_a_known_motion_is_recovered(name: str) -> None:
    moving = scenes.ATLAS.scan(centred_grid((64, 44, 22), ORIENTATIONS[name][:3, :3]))
    fixed = seen_through(MOTION, scenes.straight_grid())
    result = register(fixed, moving, LINEAR)
    assert result.field is None
    assert set(result.seconds) == {"prepare", "linear", "assess"}
    assert error_mm(Affine.identity(), Affine(MOTION), fixed) > 15
    assert error_mm(result.fixed_to_moving, Affine(MOTION), fixed) < 3


@pytest.mark.parametrize("inverted", [False, True])
def test_an_oblique_query_is_recovered_whatever_its_contrast(inverted: bool) -> None:
    moving = scenes.ATLAS.scan(scenes.straight_grid())
    fixed = seen_through(MOTION, centred_grid((64, 44, 22), ORIENTATIONS["oblique-flipped"][:3, :3]))
    data = np.where(fixed.data > 0, 300 - fixed.data, 0).astype(np.float32) if inverted else fixed.data
    found = register(Volume(data, fixed.grid), moving, LINEAR)
    assert error_mm(found.fixed_to_moving, Affine(MOTION), fixed) < 4


def test_rigid_alone_keeps_lengths_and_angles() -> None:
    moving, fixed = scenes.ATLAS.scan(scenes.straight_grid()), seen_through(MOTION, scenes.straight_grid())
    matrix = register(fixed, moving, replace(LINEAR, affine=False)).linear.matrix[:3, :3]
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-5)
    assert np.linalg.det(matrix) > 0
    assert np.abs(matrix - np.eye(3)).max() > 0.03


def test_all_stages_off_is_the_identity() -> None:
    grid = scenes.straight_grid()
    result = register(
        scenes.QUERY.scan(grid), scenes.ATLAS.scan(grid), replace(QUICK, rigid=False, affine=False, deformable=False)
    )
    np.testing.assert_array_equal(result.linear.matrix, np.eye(4))
    assert result.field is None
    assert set(result.seconds) == {"prepare", "assess"}
    assert result.folding == 0


def test_deformable_alone_trusts_the_coordinates() -> None:
    grid = scenes.straight_grid()
    told: list[str] = []
    result = register(
        scenes.QUERY.scan(grid),
        scenes.ATLAS.scan(grid),
        replace(QUICK, rigid=False, affine=False),
        on_stage=told.append,
    )
    np.testing.assert_array_equal(result.linear.matrix, np.eye(4))
    assert result.field is not None
    assert told == list(result.seconds) == ["prepare", "deformable", "assess"]


def test_affine_alone_starts_from_the_coordinates() -> None:
    grid = scenes.straight_grid()
    grown = Affine(np.diag([1.08, 1.0, 0.94, 1.0]))
    moving, fixed = scenes.ATLAS.scan(grid), seen_through(grown.matrix, grid)
    found = register(fixed, moving, replace(LINEAR, rigid=False)).linear
    corners = grid.corners_mm / 2
    before = np.linalg.norm(grown.map(corners) - corners, axis=1).mean()
    after = np.linalg.norm(grown.map(corners) - found.map(corners), axis=1).mean()
    assert after < before / 2


def test_initial_takes_the_place_of_the_linear_stages() -> None:
    grid = scenes.straight_grid()
    initial = Affine(MOTION)
    result = register(seen_through(MOTION, grid), scenes.ATLAS.scan(grid), LINEAR, initial=initial)
    assert result.linear is initial
    assert "linear" not in result.seconds


def test_confidence_tells_right_from_misplaced() -> None:
    grid = scenes.straight_grid()
    fixed, moving = seen_through(MOTION, grid), scenes.ATLAS.scan(grid)

    def confidence(initial: Affine) -> float:
        return register(fixed, moving, LINEAR, initial=initial).confidence

    away, far = affine_of(np.eye(3), (0.0, 0.0, 30.0)), affine_of(np.eye(3), (500.0, 0.0, 0.0))
    assert confidence(Affine(MOTION)) > 0.8
    assert confidence(Affine(MOTION)) > confidence(Affine(MOTION @ away)) + 0.2
    assert confidence(Affine(far)) == 0


# --- the deformable fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [scenes.straight_grid(), centred_grid((64, 44, 22), ORIENTATIONS["oblique-flipped"][:3, :3])],
    ids=["straight", "oblique"],
)
def test_a_known_deformation_is_recovered(grid: Grid) -> None:
    fixed, moving, truth = deformed(grid, 7, 25)
    result = register(
        fixed,
        moving,
        replace(QUICK, instance=InstanceSettings(**QUICK_FIT, smoothness=(0.2,))),
        initial=Affine.identity(),
    )
    organs = Volume((resample(scenes.ATLAS.scan(moving.grid), grid, truth) > 0).astype(np.float32), grid)
    before = error_mm(Affine.identity(), truth, organs)
    assert error_mm(result.fixed_to_moving, truth, organs) < before / 2
    assert result.folding < 0.01


def test_exponential_of_a_linear_velocity() -> None:
    # v = a x about the middle: the flow after unit time is e^a x.
    n, rate = 41, -0.5
    x = torch.arange(n, dtype=torch.float32) - n // 2
    velocity = torch.zeros(1, 3, n, 5, 5)
    velocity[0, 0] = rate * x[:, None, None]
    found = sampling.integrate_velocity(velocity, 7)
    expected = (np.exp(rate) - 1) * x
    np.testing.assert_allclose(found[0, 0, :, 2, 2], expected, atol=0.02 * n)
    assert not found[0, 1:].any()
    assert not sampling.integrate_velocity(torch.zeros(1, 3, 4, 1, 3), 7).any()


def test_diffeomorphic_fits_hardly_fold() -> None:
    grid = centred_grid((30, 30, 30), np.diag([4.0] * 3))
    fixed, moving = (
        Volume(ndimage.gaussian_filter(random_image(grid.shape, seed)[0, 0].numpy(), 1.5), grid) for seed in (1, 2)
    )

    def folding(diffeomorphic: bool) -> float:
        options = InstanceSettings(**QUICK_FIT, smoothness=(0.0,), folding_penalty=0, diffeomorphic=diffeomorphic)
        return register(fixed, moving, replace(QUICK, instance=options), initial=Affine.identity()).folding

    assert folding(True) < 0.2 * folding(False)


def test_a_diffeomorphic_fit_finds_the_deformation() -> None:
    grid = scenes.straight_grid()
    fixed, moving, truth = deformed(grid, 7, 25)
    options = InstanceSettings(**QUICK_FIT, smoothness=(0.2,), diffeomorphic=True)
    result = register(fixed, moving, replace(QUICK, instance=options), initial=Affine.identity())
    before = error_mm(Affine.identity(), truth, fixed)
    assert error_mm(result.fixed_to_moving, truth, fixed) < before / 2
    assert result.folding == 0


def test_folding_penalty_hand_worked() -> None:
    assert objective.folding_penalty(torch.zeros(1, 3, 4, 4, 4)) == 0
    squeezed = torch.zeros(1, 3, 4, 4, 4)
    squeezed[0, 1] = -0.9 * torch.arange(4.0)[None, :, None]
    assert float(objective.folding_penalty(squeezed)) == pytest.approx((0.3 - 0.1) ** 2, rel=1e-4)
    # A quarter turn about one axis keeps the volume: u = (R - 1) x.
    i, j, k = torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij")
    assert float(objective.folding_penalty(torch.stack((-j - i, i - j, 0 * k))[None])) == pytest.approx(0, abs=1e-9)
    # A mirrored axis: determinant -1.
    assert float(objective.folding_penalty(torch.stack((0 * i, 0 * j, -2 * k))[None])) == pytest.approx(
        1.3**2, rel=1e-4
    )


def test_the_fit_in_the_labels_box_ends_in_nothing_at_its_border() -> None:
    grid = scenes.straight_grid()
    result = run(
        grid,
        grid,
        replace(QUICK, instance=InstanceSettings(**(QUICK_FIT | {"local_voxels": 60_000, "iterations": (15,)}))),
    )
    assert result.field is not None
    assert result.local is not None
    assert result.jacobian is not None
    for axis in (1, 2, 3):
        for side in (0, -1):
            assert not np.take(result.local.displacement_mm, side, axis=axis).any()
    assert np.abs(result.local.displacement_mm).max() > 0.1
    # Finer than the levels before it, no finer than the scan, and around the organs.
    spacing = result.local.grid.spacing_mm.max()
    assert grid.spacing_mm.min() - 1e-6 <= spacing < result.field.grid.spacing_mm.min()
    organs = scenes.QUERY.labels(grid)
    seen = result.local.grid.contains(grid.voxel_to_world(np.argwhere(organs.data > 0)))
    assert seen.mean() > 0.99
    points = grid.corners_mm
    chain = result.linear.map(result.field.map(result.local.map(points)))
    np.testing.assert_array_equal(result.fixed_to_moving.map(points), chain)


def test_there_is_no_local_fit_without_labels_or_room() -> None:
    grid = scenes.straight_grid()
    fixed, moving = scenes.QUERY.scan(grid), scenes.ATLAS.scan(grid)
    assert register(fixed, moving, QUICK, initial=Affine.identity()).local is None
    thin = centred_grid((48, 40, 6), np.diag([2.0, 2.0, 2.0]))
    labels = scenes.ATLAS.labels(grid)
    result = register(scenes.QUERY.scan(thin), moving, QUICK, moving_labels=labels, initial=Affine.identity())
    assert result.local is None


def test_contrast_of_structures_is_compared() -> None:
    grid = scenes.straight_grid()
    scan, labels = scenes.ATLAS.scan(grid), scenes.ATLAS.labels(grid)
    # The liver, by far the largest structure, is dark in the other scan.
    dark = Volume(np.where(labels.data == 1, scan.data / 4, scan.data).astype(np.float32), grid)

    def difference(query: Volume) -> float:
        prepared = pyramid.prepare(query, None, 4.0, "query"), pyramid.prepare(scan, labels, 4.0, "atlas")
        return structures.fit(*prepared, labels, Affine.identity(), 4.0, "cpu").contrast_difference

    assert difference(scan) < 0.01
    assert difference(dark) > 0.2
    # A changed scale of intensities is no change of contrast.
    assert difference(Volume(3 * scan.data + 50, grid)) < 0.05


def test_where_contrast_differs_the_fit_is_contrast_robust(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = scenes.straight_grid()
    moving, labels = scenes.ATLAS.scan(grid), scenes.ATLAS.labels(grid)
    organs = scenes.QUERY.labels(grid)
    fixed = scenes.QUERY.scan(grid)
    dark = Volume(np.where(organs.data == 1, fixed.data / 4, fixed.data).astype(np.float32), grid)
    fit, asked = structures.fit, []

    def noted(*args: Any, brightness: bool = True) -> structures.Search:
        asked.append(brightness)
        return fit(*args, brightness=brightness)

    monkeypatch.setattr(structures, "fit", noted)

    def fitted(query: Volume, *, contrast_robust: bool) -> tuple[NDArray[np.float32], list[bool]]:
        asked.clear()
        few = QUICK_FIT | {"iterations": (10,), "local_voxels": 0, "contrast_robust": contrast_robust}
        settings = replace(QUICK, instance=InstanceSettings(**few))
        field = register(query, moving, settings, moving_labels=labels, initial=Affine.identity()).field
        assert field is not None
        return field.displacement_mm, list(asked)

    same = fitted(fixed, contrast_robust=True), fitted(fixed, contrast_robust=False)
    np.testing.assert_array_equal(same[0][0], same[1][0])
    robust, plain = fitted(dark, contrast_robust=True), fitted(dark, contrast_robust=False)
    assert np.abs(robust[0] - plain[0]).max() > 0.5
    # Structures are searched for again, without brightness.
    assert (same[0][1], plain[1], robust[1]) == ([True], [True], [True, False])


def test_further_members_differ_and_leave_the_first_as_it_is() -> None:
    grid = scenes.straight_grid()
    fixed, moving = scenes.QUERY.scan(grid), scenes.ATLAS.scan(grid)
    labels = scenes.ATLAS.labels(grid)
    truth = scenes.QUERY.labels(grid).data > 0

    def fitted(members: int) -> Registration:
        options = QUICK_FIT | {"ensemble": members, "iterations": (20, 15, 10)}
        settings = replace(QUICK, instance=InstanceSettings(**options))
        return register(fixed, moving, settings, moving_labels=labels, initial=Affine.identity())

    one, several = fitted(1), fitted(4)
    assert (len(one.members), len(several.members)) == (1, 4)
    points = grid.voxel_to_world(np.argwhere(truth)[::50])
    mapped = [fit.map(points) for fit in several.members]
    np.testing.assert_array_equal(mapped[0], one.fixed_to_moving.map(points))
    for n, other in enumerate(mapped):
        for before in mapped[:n]:
            assert np.abs(other - before).max() > 0.1
    # Each is a registration of its own, not one spoilt: labels come closer by any of them than by the linear stages.
    organs = Volume((labels.data > 0).astype(np.float32), grid)
    apart = np.abs(resample(organs, grid, several.linear) - truth).sum()
    assert all(np.abs(resample(organs, grid, fit) - truth).sum() < apart for fit in several.members)


def test_with_a_start_the_first_level_is_left_out() -> None:
    grid = scenes.straight_grid()
    fixed, moving = scenes.QUERY.scan(grid), scenes.ATLAS.scan(grid)
    prepared = pyramid.prepare(fixed, None, 4.0, "query"), pyramid.prepare(moving, None, 4.0, "atlas")
    pair = Pair(fixed, moving, *prepared, None)
    shift = np.zeros((3, *grid.shape), np.float32)
    shift[0] = 3.0
    start = Start(DisplacementField(grid, shift))

    def fitted(first_level: int, begin: Start | None) -> NDArray[np.float32]:
        options = InstanceSettings(level_voxels=(first_level, 12_000), local_voxels=0, iterations=(5, 5))
        field = instance.fit(pair, Affine.identity(), begin, replace(QUICK, instance=options), "cpu").field
        assert field is not None
        return field.displacement_mm

    np.testing.assert_array_equal(fitted(3_000, start), fitted(6_000, start))
    assert np.abs(fitted(3_000, None) - fitted(6_000, None)).max() > 0.1


def test_the_shape_of_a_start_costs_nothing() -> None:
    """Where the scans say nothing, the fit keeps a bent start, however much it is to be smooth."""
    grid = centred_grid((32, 32, 32), np.diag([4.0] * 3))
    flat = Volume(np.full(grid.shape, 100.0, np.float32), grid)
    flat.data[:2] = 0
    prepared = pyramid.prepare(flat, None, 4.0, "query"), pyramid.prepare(flat, None, 4.0, "atlas")
    bent = np.zeros((3, *grid.shape), np.float32)
    bent[2] = 8 * np.sin(np.arange(32) / 5)
    start = Start(DisplacementField(grid, bent))
    options = InstanceSettings(level_voxels=(20_000,), local_voxels=0, smoothness=(50.0,), iterations=(20,))
    settings = replace(QUICK, instance=options)
    field = instance.fit(Pair(flat, flat, *prepared, None), Affine.identity(), start, settings, "cpu").field
    assert field is not None
    points = grid.voxel_to_world(np.argwhere(flat.data > 0)[::50])
    points = points[np.abs(points).max(axis=1) < 40]
    np.testing.assert_allclose(field.map(points), start.field.map(points), atol=0.5)


def sliding_organ(grid: Grid, centre_mm: tuple[float, float, float]) -> tuple[Volume, Volume]:
    """A textured body with one striped organ at ``centre_mm``, and the organ's label."""
    world = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    x, y, z = np.moveaxis(world, -1, 0)
    body = (world**2 / np.square((100, 90, 130))).sum(axis=-1) < 1
    data = np.where(body, 0.35 + 0.08 * np.sin(x / 13) * np.cos(y / 15) + 0.08 * np.sin(z / 14), 0)
    organ = ((world - centre_mm) ** 2).sum(axis=-1) < 24**2
    stripes = 0.8 + 0.2 * np.sin((x - centre_mm[0]) / 6)
    return Volume(np.where(organ, stripes, data).astype(np.float32), grid), Volume(organ.astype(np.uint8), grid)


def test_structure_search_finds_an_organ_that_slid() -> None:
    grid = centred_grid((48, 48, 48), np.diag([5.0] * 3))
    there, here = (30.0, 10.0, 20.0), (30.0, 10.0, -20.0)
    fixed, _ = sliding_organ(grid, there)
    moving, labels = sliding_organ(grid, here)

    def missed_by_mm(search: bool) -> float:
        given = RegistrationSettings(
            coarse_voxels=20_000,
            fine_voxels=60_000,
            structure_search=search,
            instance=InstanceSettings(
                level_voxels=(20_000, 60_000), local_voxels=0, smoothness=(0.1,), iterations=(30, 20), ensemble=1
            ),
        )
        result = register(fixed, moving, given, moving_labels=labels, initial=Affine.identity())
        assert ("structures" in result.seconds) == search
        return float(np.linalg.norm(result.fixed_to_moving.map(np.array([there])) - here))

    assert missed_by_mm(True) < 15
    assert missed_by_mm(False) > 25


def test_penalty_lessens_folding() -> None:
    # Two scans that have nothing in common tear at each other.
    grid = centred_grid((30, 30, 30), np.diag([4.0] * 3))
    fixed, moving = (
        Volume(ndimage.gaussian_filter(random_image(grid.shape, seed)[0, 0].numpy(), 1.5), grid) for seed in (1, 2)
    )

    def folding(penalty: float) -> float:
        free = replace(QUICK, instance=InstanceSettings(**QUICK_FIT, smoothness=(0.0,), folding_penalty=penalty))
        return register(fixed, moving, free, initial=Affine.identity()).folding

    assert folding(0) > 0.005
    assert folding(50) < folding(0) / 2


# --- whole runs -------------------------------------------------------------------------------------------------


def run(fixed_grid: Grid, moving_grid: Grid, settings: RegistrationSettings = QUICK) -> Registration:
    return register(
        scenes.QUERY.scan(fixed_grid),
        scenes.ATLAS.scan(moving_grid),
        settings,
        moving_labels=scenes.ATLAS.labels(moving_grid),
    )


def test_two_runs_are_the_same_to_the_last_bit() -> None:
    grid = scenes.straight_grid()
    few = replace(QUICK, linear_iterations=5, instance=InstanceSettings(**QUICK_FIT, iterations=(5,)))
    first, second = run(grid, grid, few), run(grid, grid, few)
    np.testing.assert_array_equal(first.linear.matrix, second.linear.matrix)
    assert first.field is not None
    assert second.field is not None
    np.testing.assert_array_equal(first.field.displacement_mm, second.field.displacement_mm)
    assert (first.confidence, first.folding) == (second.confidence, second.folding)


@pytest.mark.parametrize("shape", [(64, 64, 3), (48, 40, 1), (2, 40, 36), (5, 5, 5)], ids=str)
def test_thin_volumes_register(shape: tuple[int, int, int]) -> None:
    few = replace(QUICK, linear_iterations=5, instance=InstanceSettings(**QUICK_FIT, iterations=(5,)))
    thin, whole = centred_grid(shape, np.diag([1.5, 1.5, 5.0])), scenes.straight_grid()
    for fixed, moving in ((thin, thin), (thin, whole), (whole, thin)):
        result = run(fixed, moving, few)
        points = fixed.corners_mm
        assert np.isfinite(result.fixed_to_moving.map(points)).all()
        assert 0 <= result.confidence <= 1


@pytest.mark.slow
def test_default_settings_find_the_patient() -> None:
    grid = scenes.straight_grid((64, 54, 48), (1.5, 1.5, 1.5))
    result = run(grid, grid, RegistrationSettings())
    truth = affine_of(np.eye(3) / 1.05, tuple(-np.array(scenes.QUERY.shift_mm) / 1.05))
    assert error_mm(result.fixed_to_moving, Affine(truth), scenes.QUERY.labels(grid)) < 1.5
    assert result.confidence > 0.8
