"""The coupled-convex search: each part against a cruder second implementation, then known motions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import scenes
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.registration import affine as linear
from atlassegfm.registration import discrete, pyramid, register
from atlassegfm.registration.pyramid import Scan
from atlassegfm.settings import InstanceSettings, RegistrationSettings
from atlassegfm.transforms.maps import Affine, DisplacementField
from conftest import affine_of, rotation

VOXELS = 4_000
IDENTITY = Affine.identity()
QUICK = RegistrationSettings(
    coarse_voxels=4_000,
    fine_voxels=12_000,
    discrete=True,
    instance=InstanceSettings(level_voxels=(4_000, 12_000), local_voxels=12_000, iterations=(10, 5, 5)),
)
#: Axes turned about all three of the world's, 4 mm slices.
OBLIQUE = rotation(12, -9, 15) @ np.diag([2.0, 2.0, 4.0])


def centred_grid(shape: tuple[int, int, int], axes: NDArray[np.float64]) -> Grid:
    return Grid(shape, affine_of(axes, tuple(-axes @ (np.array(shape) - 1) / 2)))


def prepared(scan: Volume) -> Scan:
    return pyramid.prepare(scan, None, 2.0, "scan")


def control_spacing_mm(found: DisplacementField) -> float:
    return float(discrete._stride(found.grid) * found.grid.spacing_mm[0])


def missed_by_mm(found: DisplacementField, points: NDArray[np.float64], truth_mm: tuple[float, float, float]) -> float:
    """Mean distance of the displacements found at some points from the true one."""
    return float(np.linalg.norm(found.map(points) - points - truth_mm, axis=1).mean())


def patient(grid: Grid, shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Volume:
    return scenes.Patient(shift_mm).scan(grid)


def organ_points(grid: Grid, shift_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    return grid.voxel_to_world(np.argwhere(scenes.Patient(shift_mm).labels(grid).data > 0)[::5])


def sliding_organ(grid: Grid, centre_mm: tuple[float, float, float]) -> Volume:
    """A textured body with one striped organ at ``centre_mm``."""
    x, y, z = np.moveaxis(grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)
    body = (x / 100) ** 2 + (y / 90) ** 2 + (z / 130) ** 2 < 1
    data = np.where(body, 0.35 + 0.08 * np.sin(x / 13) * np.cos(y / 15) + 0.08 * np.sin(z / 14), 0)
    organ = (x - centre_mm[0]) ** 2 + (y - centre_mm[1]) ** 2 + (z - centre_mm[2]) ** 2 < 34**2
    data = np.where(organ, 0.8 + 0.2 * np.sin((x - centre_mm[0]) / 6), data)
    return Volume(data.astype(np.float32), grid)


# --- parts ------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_a_loop_over_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrete, "_PASSES", 0)
    shape, stride, reach = (2, 1, 2), 2, discrete._REACH
    wide = centred_grid(tuple(stride * n + 2 * reach for n in shape), np.eye(3))
    generator = np.random.default_rng(0)

    def level() -> pyramid.Level:
        image, weight = (
            torch.from_numpy(generator.uniform(0, 1, wide.shape).astype(np.float32))[None, None] for _ in "iw"
        )
        inside = torch.ones_like(image)
        inside[:, :, :3] = 0
        return pyramid.Level(wide, image, inside, weight * inside, None)

    query, atlas = level(), level()
    steps = torch.tensor([[0, 0, 0], [-6, 6, 1], [3, -2, 6]])
    found = discrete._costs(query, atlas, steps, stride)
    ours, theirs = discrete._features(query), discrete._features(atlas)
    for number, step in enumerate(steps.numpy()):
        for cell in np.ndindex(*shape):
            total = 0.0
            for corner in np.ndindex(stride, stride, stride):
                here = tuple(np.array(cell) * stride + corner + reach)
                there = tuple(np.array(here) + step)
                weight, meets = float(query.weight[0, 0][here]), float(atlas.weight[0, 0][there])
                if not atlas.inside[0, 0][there]:
                    total += discrete._OUTSIDE_PRICE * weight
                else:
                    unlike = float(((ours[:, *here] - theirs[:, *there]) ** 2).sum())
                    total += min(weight, meets) * unlike + linear.MISMATCH_PRICE * max(weight - meets, 0)
            assert float(found[(number, *cell)]) == pytest.approx(total / stride**3, rel=1e-4)


def test_features_beyond_the_field_of_view_show_no_border() -> None:
    grid = centred_grid((12, 12, 12), np.eye(3))
    ramp = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(1, 1, 12, 12, 12) + 5
    inside = torch.ones_like(ramp)
    inside[..., :4] = 0
    cut = pyramid.Level(grid, ramp * inside, inside, inside, None)
    whole = pyramid.Level(grid, ramp, torch.ones_like(ramp), torch.ones_like(ramp), None)
    torch.testing.assert_close(discrete._features(cut), discrete._features(whole))


def test_where_nothing_is_known_the_neighbours_say_where_to_go() -> None:
    steps = discrete._steps("cpu")
    wanted = torch.tensor([4, -2, 2])
    costs = torch.zeros(len(steps), 3, 3, 3)
    assert (discrete._coupled(costs, steps, 2) == 0).all()
    costs[:, 1] = 0.5 * (steps != wanted).any(dim=1)[:, None, None]
    moved = discrete._coupled(costs, steps, 2)
    torch.testing.assert_close(moved, wanted.float().view(3, 1, 1, 1).expand_as(moved), atol=2, rtol=0)


@pytest.mark.parametrize("voxels", [2_000, 160_000, 20_000_000])
def test_the_table_of_costs_has_a_bound(voxels: int) -> None:
    edge = round(voxels ** (1 / 3))
    stride = discrete._stride(centred_grid((edge, edge, edge), np.eye(3)))
    assert stride >= 2
    assert (-(-edge // stride)) ** 3 <= 20_000


# --- motions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [np.diag([2.0] * 3), OBLIQUE], ids=["straight", "oblique"])
def test_identical_scans_stay(axes: NDArray[np.float64]) -> None:
    scan = prepared(patient(centred_grid((40, 36, 24), axes)))
    assert (discrete.search(scan, scan, IDENTITY, None, VOXELS, "cpu").displacement_mm == 0).all()


@pytest.mark.parametrize("axes", [np.diag([2.0] * 3), OBLIQUE], ids=["straight", "oblique"])
def test_a_large_translation_is_found(axes: NDArray[np.float64]) -> None:
    truth = (14.0, -9.0, 12.0)
    here = tuple(-np.array(truth))
    grid = centred_grid((64, 56, round(160 / axes[:, 2].max())), axes)
    found = discrete.search(prepared(patient(grid, here)), prepared(patient(grid)), IDENTITY, None, VOXELS, "cpu")
    points = organ_points(grid, here)
    assert missed_by_mm(found, points, truth) < control_spacing_mm(found) / 2 < np.linalg.norm(truth) / 2


def test_an_organ_that_slid_is_found_beyond_the_reach_of_the_fit() -> None:
    grid = centred_grid((48, 48, 52), np.diag([5.0] * 3))
    there, here = (30.0, 10.0, 30.0), (30.0, 10.0, -30.0)
    fixed, moving = sliding_organ(grid, there), sliding_organ(grid, here)
    found = discrete.search(prepared(fixed), prepared(moving), IDENTITY, None, 8_000, "cpu")
    assert np.linalg.norm(found.map(np.array([there])) - here) < control_spacing_mm(found)

    def missed(search: bool) -> float:
        options = InstanceSettings(level_voxels=(8_000,), local_voxels=0, iterations=(25,))
        settings = RegistrationSettings(coarse_voxels=8_000, fine_voxels=8_000, discrete=search, instance=options)
        result = register(fixed, moving, settings, initial=IDENTITY)
        return float(np.linalg.norm(result.fixed_to_moving.map(np.array([there])) - here))

    assert missed(True) < 15
    assert missed(False) > 30


def test_a_start_is_part_of_the_result() -> None:
    # The start makes up for a linear map that is off by more than the reach; the rest is to be found.
    grid = scenes.straight_grid()
    scan, away = prepared(patient(grid)), np.array([70.0, 0.0, -60.0])
    off = Affine(affine_of(np.eye(3), tuple(away)))
    start = DisplacementField(grid, np.broadcast_to(-away[:, None, None, None], (3, *grid.shape)).astype(np.float32))
    exact = discrete.search(scan, scan, off, start, VOXELS, "cpu")
    assert np.abs(exact.displacement_mm + away[:, None, None, None]).max() < 1e-4
    here = (-12.0, 0.0, 10.0)
    found = discrete.search(prepared(patient(grid, here)), scan, off, start, VOXELS, "cpu")
    truth = (12.0 - 70.0, 0.0, -10.0 + 60.0)
    assert missed_by_mm(found, organ_points(grid, here), truth) < control_spacing_mm(found)


@pytest.mark.parametrize("shape", [(64, 64, 3), (48, 40, 1), (2, 40, 36), (5, 5, 5)], ids=str)
def test_thin_volumes(shape: tuple[int, int, int]) -> None:
    thin, whole = centred_grid(shape, np.diag([1.5, 1.5, 5.0])), scenes.straight_grid()
    for fixed, moving in ((thin, thin), (thin, whole), (whole, thin)):
        found = discrete.search(prepared(patient(fixed)), prepared(patient(moving)), IDENTITY, None, 2_000, "cpu")
        assert np.isfinite(found.displacement_mm).all()


def test_scans_that_do_not_meet_give_a_field() -> None:
    scan = prepared(patient(scenes.straight_grid()))
    away = Affine(affine_of(np.eye(3), (500.0, 0.0, 0.0)))
    # The price is the same everywhere, so that nothing moves.
    assert (discrete.search(scan, scan, away, None, 2_000, "cpu").displacement_mm == 0).all()


def test_two_searches_are_the_same_to_the_last_bit() -> None:
    grid = scenes.straight_grid()
    fixed, moving = prepared(scenes.QUERY.scan(grid)), prepared(patient(grid))
    first, second = (discrete.search(fixed, moving, IDENTITY, None, 4_000, "cpu") for _ in range(2))
    np.testing.assert_array_equal(first.displacement_mm, second.displacement_mm)


# --- as a stage -------------------------------------------------------------------------------------------------


def test_it_starts_the_fit_when_it_is_on() -> None:
    grid, here = scenes.straight_grid(), (-22.0, 12.0, 16.0)
    fixed, moving = patient(grid, here), patient(grid)

    def missed(search: bool) -> float:
        given = replace(QUICK, discrete=search)
        result = register(fixed, moving, given, initial=IDENTITY)
        assert ("discrete" in result.seconds) == search
        assert result.field is not None
        return missed_by_mm(result.field, organ_points(grid, here), (22.0, -12.0, -16.0))

    assert missed(True) < 3
    assert missed(False) > 15


def test_it_follows_the_search_for_structures() -> None:
    grid = scenes.straight_grid()
    stages: list[str] = []
    result = register(
        *(scenes.QUERY.scan(grid), patient(grid), QUICK),
        moving_labels=scenes.ATLAS.labels(grid),
        initial=IDENTITY,
        on_stage=stages.append,
    )
    assert stages == ["prepare", "structures", "discrete", "deformable", "assess"]
    points = organ_points(grid, (0.0, 0.0, 0.0))
    truth = (points - scenes.QUERY.shift_mm) / scenes.QUERY.scale
    assert np.linalg.norm(result.fixed_to_moving.map(points) - truth, axis=1).mean() < 2
