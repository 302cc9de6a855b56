"""The engine ``voxelmorph``: the network's shape and parts, then whole fits with a known answer."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

import scenes
from atlassegfm.core.errors import RegistrationError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.registration import ENGINES, Registration, pyramid, register, sampling
from atlassegfm.registration.engines import voxelmorph
from atlassegfm.registration.engines.voxelmorph import Network
from atlassegfm.settings import RegistrationSettings, VoxelmorphSettings
from atlassegfm.transforms.maps import Affine, DisplacementField
from conftest import ORIENTATIONS
from deformations import centred_grid, deformed, error_mm

#: A small net on a small grid with a rate that a few steps suffice for.
TINY = VoxelmorphSettings(cpu_voxels=2_000, levels=3, channels=4, iterations=40, learning_rate=1e-2, schedule="cosine")


def network(levels: int = 3, channels: int = 4) -> Network:
    return Network(levels, channels, torch.Generator().manual_seed(0))


def with_options(options: VoxelmorphSettings) -> RegistrationSettings:
    return RegistrationSettings(engine="voxelmorph", coarse_voxels=2_000, fine_voxels=4_000, voxelmorph=options)


def fitted(fixed: Volume, moving: Volume, options: VoxelmorphSettings = TINY) -> Registration:
    result = register(fixed, moving, with_options(options), initial=Affine.identity())
    assert result.field is not None
    return result


def length_mm(field: DisplacementField | None) -> NDArray[np.float32]:
    assert field is not None
    return np.linalg.norm(field.displacement_mm, axis=0)


# --- settings ---------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    options = VoxelmorphSettings()
    assert (options.levels, options.channels) == (5, 32)
    assert (options.iterations, options.learning_rate, options.schedule) == (1000, 1e-4, "constant")
    # The published code's.
    assert (options.loss, options.smoothness, options.cuda_voxels) == ("mse", 0.01, 128**3)
    # What the paper does not have is off.
    assert not options.diffeomorphic
    assert not ENGINES["voxelmorph"].takes_start
    assert not ENGINES["voxelmorph"].is_external


def test_every_setting_is_read() -> None:
    source = inspect.getsource(voxelmorph)
    assert [field.name for field in fields(VoxelmorphSettings) if f"options.{field.name}" not in source] == []


# --- the network ------------------------------------------------------------------------------------------------


def counted(levels: int, channels: int) -> int:
    return sum(parameter.numel() for parameter in network(levels, channels).parameters())


def test_parameters_are_the_papers_and_voxelmorphs() -> None:
    # The paper: 5 levels, 32 channels, about 1.3 M parameters.
    assert counted(5, 32) == 1_304_387
    # VoxelMorph's default features [16, 32, 32, 32], [32, 32, 32, 32, 32, 16, 16].
    assert counted(5, 16) == 327_331


def test_parameters_hand_worked() -> None:
    # Two levels, one channel: down 2 -> 1; up 1 -> 2; last 2 + 1 -> 2, 2 -> 1, 1 -> 1; displacement 1 -> 3.
    assert counted(2, 1) == 27 * (2 * 1 + 1 * 2 + 3 * 2 + 2 * 1 + 1 * 1 + 1 * 3) + (1 + 2 + 2 + 1 + 1 + 3)


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 9, 13), (33, 2, 5), (3, 3, 2)], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_any_size_gives_a_displacement_of_its_own_size(shape: tuple[int, int, int], half: bool) -> None:
    found = network(5)(torch.rand(1, 2, *shape), half=half)
    assert found.shape == (1, 3, *shape)
    assert found.dtype == torch.float32
    # The first displacement is next to nothing.
    assert 0 < float(found.detach().abs().max()) < 1e-2


def test_the_far_side_is_seen() -> None:
    # What the deepest of 4 levels adds: 8 voxels to a step.
    net, scans = network(4), torch.rand(1, 2, 40, 4, 4)
    changed = scans.clone()
    changed[:, :, 0] += 1
    difference = (net(scans) - net(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:20] > 0).all()


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, second = network(), network()
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


# --- its parts --------------------------------------------------------------------------------------------------


def test_sample_is_linear_interpolation() -> None:
    random = np.random.default_rng(1)
    image, displacement = random.random((5, 6, 7), np.float32), random.normal(0, 2, (3, 5, 6, 7)).astype(np.float32)
    found = sampling.sample_displaced(torch.from_numpy(image)[None, None], torch.from_numpy(displacement)[None])
    crude = ndimage.map_coordinates(image, np.indices(image.shape) + displacement, order=1, mode="nearest")
    np.testing.assert_allclose(found[0, 0], crude, atol=1e-5)


def test_a_constant_velocity_is_its_own_displacement() -> None:
    velocity = torch.tensor([1.0, -2.0, 0.5])[None, :, None, None, None].expand(1, 3, 9, 8, 2)
    displacement, _ = voxelmorph.integrate(velocity, 7)
    torch.testing.assert_close(displacement, velocity, atol=1e-5, rtol=0)


def test_a_linear_velocity_integrates_to_the_exponential() -> None:
    # dx/dt = a x takes x to x exp(a). The node at the middle of the line is 0.
    x = torch.arange(33.0) - 16
    velocity = torch.zeros(1, 3, 33, 5, 5)
    velocity[:, 0] = (-0.3 * x)[:, None, None]
    displacement, halved = voxelmorph.integrate(velocity, 7)
    torch.testing.assert_close(displacement[0, 0, :, 2, 2], x * np.exp(-0.3) - x, atol=0.05, rtol=0)
    assert halved.shape == (1, 3, 17, 3, 3)
    assert float(halved[0, 0, 0, 0, 0]) == pytest.approx(0.3 * 8)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedules_fall_from_one(schedule: str) -> None:
    rates = [voxelmorph._rate(schedule, n, 100) for n in range(100)]
    assert max(rates) == pytest.approx(1, abs=1e-9)
    assert all(0 < rate <= 1 for rate in rates)
    after = rates[5:]
    assert after == sorted(after, reverse=True)
    assert (rates[-1] == 1) == (schedule == "constant")
    assert voxelmorph._rate(schedule, 0, 1) == 1


# --- fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [
        scenes.straight_grid(),
        centred_grid((64, 44, 22), ORIENTATIONS["oblique-flipped"][:3, :3]),
    ],
    ids=["straight", "oblique-flipped"],
)
def test_a_known_deformation_is_recovered(grid: Grid) -> None:
    fixed, moving, truth = deformed(grid, 5, 35)
    before = error_mm(Affine.identity(), truth, fixed)
    result = fitted(fixed, moving)
    assert error_mm(result.fixed_to_moving, truth, fixed) < before / 2
    assert result.folding < 0.01
    assert result.parameter_count == {"deformable": counted(3, 4)}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "lncc", "smoothness": 0.3},
        {"diffeomorphic": True},
        {"half_precision": "on"},
    ],
    ids=str,
)
def test_every_variant_recovers_it(changes: dict[str, object]) -> None:
    fixed, moving, truth = deformed(scenes.straight_grid(), 5, 35)
    before = error_mm(Affine.identity(), truth, fixed)
    assert error_mm(fitted(fixed, moving, replace(TINY, **changes)).fixed_to_moving, truth, fixed) < 0.65 * before


def test_the_same_scan_stays_where_it_is() -> None:
    scan = scenes.ATLAS.scan(scenes.straight_grid())
    result = fitted(scan, scan, replace(TINY, iterations=20))
    # A tenth of a voxel of the working grid.
    assert length_mm(result.field).max() < 0.65


def test_same_seed_same_bits() -> None:
    fixed, moving, _ = deformed(scenes.straight_grid(), 5, 35)
    few = replace(TINY, iterations=5)
    state = torch.get_rng_state()
    first = fitted(fixed, moving, few)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    second = fitted(fixed, moving, few)
    torch.set_rng_state(state)
    assert first.field is not None
    assert second.field is not None
    np.testing.assert_array_equal(first.field.displacement_mm, second.field.displacement_mm)


def test_working_grid_is_isotropic_over_the_query() -> None:
    fixed, moving, _ = deformed(centred_grid((64, 44, 22), ORIENTATIONS["oblique"][:3, :3]), 5, 35)
    for wanted in (2_000, 6_000):
        field = fitted(fixed, moving, replace(TINY, cpu_voxels=wanted, iterations=1)).field
        assert field is not None
        np.testing.assert_allclose(field.grid.spacing_mm, field.grid.spacing_mm[0], rtol=1e-6)
        assert np.prod(field.grid.shape) == pytest.approx(wanted, rel=0.25)
        np.testing.assert_allclose(field.grid.centre_mm, fixed.grid.centre_mm, atol=1e-6)


def test_diffeomorphic_does_not_fold() -> None:
    # Two scans that have nothing in common tear at each other.
    grid = centred_grid((30, 30, 30), np.diag([4.0] * 3))
    random = np.random.default_rng(5)
    fixed, moving = (
        Volume(ndimage.gaussian_filter(random.random(grid.shape), 3).astype(np.float32), grid) for _ in range(2)
    )
    torn = replace(TINY, smoothness=0, learning_rate=3e-3)
    free, smooth = fitted(fixed, moving, torn), fitted(fixed, moving, replace(torn, diffeomorphic=True))
    assert free.folding > 0.05
    assert length_mm(smooth.field).max() > 20
    assert smooth.folding < 0.001


@pytest.mark.parametrize("loss", ["mse", "lncc"])
def test_beyond_the_atlas_nothing_pulls(loss: Literal["mse", "lncc"]) -> None:
    # The atlas ends at the tenth plane. Were its end an edge, the rest of the query would be drawn to it.
    grid = Grid((20, 6, 6), np.eye(4))
    query, atlas = (
        pyramid.Level(grid, torch.from_numpy(image), torch.ones(1, 1, *grid.shape), torch.ones(1, 1, *grid.shape), None)
        for image in np.random.default_rng(2).random((2, 1, 1, *grid.shape), np.float32)
    )
    atlas.inside[:, :, 10:] = 0
    atlas.image[:, :, 10:] = 0
    displacement = torch.zeros(1, 3, *grid.shape, requires_grad=True)
    voxelmorph._dissimilarity(query, atlas, loss)(displacement).backward()
    assert displacement.grad is not None
    pull = displacement.grad.abs().amax(dim=(0, 1, 3, 4))
    # The local correlation reads 4 voxels around each that counts; displaced by nothing, all is read where it lies.
    assert (pull[: 10 if loss != "lncc" else 9] > 0).all()
    assert (pull[14:] == 0).all()
    assert loss == "lncc" or (pull[10:] == 0).all()


def test_mse_is_a_mean_over_what_counts() -> None:
    grid = Grid((4, 4, 4), np.eye(4))
    ones = torch.ones(1, 1, 4, 4, 4)
    inside = ones.clone()
    inside[:, :, 2:] = 0
    query, atlas = pyramid.Level(grid, ones, ones, ones, None), pyramid.Level(grid, 0.5 * inside, inside, inside, None)
    dissimilarity = voxelmorph._dissimilarity(query, atlas, "mse")
    assert float(dissimilarity(torch.zeros(1, 3, 4, 4, 4))) == pytest.approx(0.25)
    # Nothing in common: no reason for anything.
    assert float(dissimilarity(torch.full((1, 3, 4, 4, 4), 9.0))) == 0


def test_thin_scans_register() -> None:
    thin = centred_grid((24, 20, 1), np.diag([1.5, 1.5, 5.0]))
    result = fitted(scenes.QUERY.scan(thin), scenes.ATLAS.scan(thin), replace(TINY, iterations=2, diffeomorphic=True))
    assert np.isfinite(length_mm(result.field)).all()


def test_divergence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxelmorph, "_rate", lambda *_: np.nan)
    scan = scenes.ATLAS.scan(scenes.straight_grid())
    with pytest.raises(RegistrationError, match=r"registration\.voxelmorph\.learning_rate.*0\.01"):
        fitted(scan, scan, replace(TINY, iterations=2))


def test_too_large_a_grid_for_the_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(voxelmorph, "_optimise", full)
    scan = scenes.ATLAS.scan(scenes.straight_grid())
    with pytest.raises(RegistrationError, match=r"registration\.voxelmorph\.cuda_voxels.*2097152"):
        fitted(scan, scan)
