"""Compiled loops of registration and warping: against PyTorch, and against loops in NumPy that anyone can read."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from atlassegfm.core import compiled
from atlassegfm.core.geometry import Grid
from atlassegfm.core.mask import signed_distance_mm
from atlassegfm.core.parallel import limited_threads
from atlassegfm.fusion import correction_features
from atlassegfm.registration import affine, features, kernels, structures
from atlassegfm.registration.objective import Objective, Scans, Weights, smooth_control
from atlassegfm.registration.pyramid import Level
from atlassegfm.registration.sampling import off_centre
from atlassegfm.transforms import kernels as warping

#: Anisotropic, and with axes of a single voxel.
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 6))
SEEDS = st.integers(0, 2**16)
FEW = settings(max_examples=40, deadline=None)


def floats(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)


def points_around(shape: tuple[int, ...], count: int, seed: int) -> NDArray[np.float32]:
    """Points in voxels, some of them outside."""
    reach = np.array(shape) + 1.5
    return (np.random.default_rng(seed).uniform(-2, 1, (count, 3)) * reach % (reach + 2) - 1.7).astype(np.float32)


def crude_value(image: NDArray[np.float32], point: NDArray[Any]) -> float:
    """Linear interpolation between clipped nodes."""
    place = np.clip(point.astype(float), 0, np.array(image.shape) - 1)
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        node = np.floor(place).astype(int) + corner
        weight = np.prod(1 - np.abs(place - node))
        total += weight * image[tuple(np.minimum(node, np.array(image.shape) - 1))]
    return total


def crude_slope(image: NDArray[np.float32], point: NDArray[Any]) -> NDArray[np.float64]:
    """Derivative by central differences so short that they stay between the same nodes."""
    steps = 1e-3 * np.eye(3)
    return np.array([(crude_value(image, point + h) - crude_value(image, point - h)) / 2e-3 for h in steps])


def off_nodes(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Away from the nodes, where the derivative jumps."""
    return np.floor(points) + np.float32(0.02) + np.float32(0.96) * (points - np.floor(points))


@given(SHAPES, SEEDS)
@settings(max_examples=10, deadline=None)
def test_sums_over_a_structure_and_their_slopes(shape: tuple[int, int, int], seed: int) -> None:
    image, seen, mind = floats(seed, *shape), floats(seed + 1, *shape), floats(seed + 2, *shape, 12)
    places, weights, own, targets = (
        floats(seed + n, *size) for n, size in ((3, (3, 3)), (4, (3,)), (5, (3,)), (6, (3, 12)))
    )
    points = np.vstack([places.T, np.ones((1, 3), np.float32)])
    # A turn would lead single points onto nodes, where the derivative jumps.
    move = off_nodes(points_around(shape, 1, seed + 7))[0] - 0.01
    maps = np.stack([np.c_[np.diag(scale), move] for scale in ((0.01, 0.01, 0.01), (0.0, 0.01, 0.02))]).astype(
        np.float32
    )
    found = kernels.structure_sums((image, seen, mind), (points, weights, own, targets), maps, 0, 3)
    for one, sums in zip(maps, found, strict=True):
        expected = np.zeros((5, 4, 4))
        for point, weight, other, target in zip(points.T, weights, own, targets, strict=True):
            place = one @ point
            channels = [*np.moveaxis(mind, -1, 0), image, seen]
            values = np.array([crude_value(channel, place) for channel in channels])
            slopes = np.array([crude_slope(channel, place) for channel in channels])
            difference, (here, inside) = values[:12] - target, values[12:]
            by_here, by_inside = slopes[12:]
            terms = (
                (difference @ difference, 2 * difference @ slopes[:12]),
                (inside, by_inside),
                (here, by_here),
                (here**2, 2 * here * by_here),
                (here * other, other * by_here),
            )
            expected += [weight * np.outer([value, *slope], point) for value, slope in terms]
        np.testing.assert_allclose(sums, expected, atol=6e-2)
        np.testing.assert_allclose(sums[:, 0], expected[:, 0], atol=1e-3)


@given(st.tuples(*[st.integers(2, 9)] * 3), SEEDS, st.integers(0, 7), st.sampled_from(range(5)))
@FEW
def test_objective_is_that_of_pytorch(shape: tuple[int, int, int], seed: int, step: int, term: int) -> None:
    weights = (Weights(0, 0, 0, 0), Weights(1, 0, 0), Weights(0, 1, 0), Weights(0, 0, 1), Weights(2.5, 0.5, 0.2, 4, 10))
    objective = objective_on(shape, seed, weights[term])
    addition = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.9, objective.coarse_base.shape)).float()
    addition.requires_grad_(True)
    one, other = objective(addition, step), objective.by_torch(addition, step)
    (found,), (expected,) = torch.autograd.grad(3 * one, addition), torch.autograd.grad(3 * other, addition)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def objective_on(shape: tuple[int, int, int], seed: int, weights: Weights, device: str = "cpu") -> Objective:
    def level(number: int) -> Level:
        numbers = (3 * number + n for n in range(3))
        image, seen, weight = (torch.from_numpy(floats(seed + n, 1, 1, *shape)).to(device) for n in numbers)
        return Level(Grid(shape, np.eye(4)), image, (seen > 0.1).float(), weight, None)

    scans = Scans(level(0), level(1))
    base = torch.from_numpy(np.random.default_rng(seed + 7).normal(0, 0.8, (1, 3, *shape))).float().to(device)
    return Objective(scans, base, scans.weight / scans.weight.sum(), weights)


def test_results_are_identical_with_any_number_of_threads() -> None:
    objective = objective_on((23, 18, 20), 5, Weights(2.5, 0.5, 0.2, 4, 10))
    addition = np.random.default_rng(1).normal(0, 0.9, objective.coarse_base.shape[1:]).astype(np.float32)

    def found(threads: int) -> tuple[float, NDArray[np.float32], NDArray[np.float32]]:
        with limited_threads(threads):
            mind = features.mind_ssc(objective.scans.atlas).numpy()
            return (*objective.value_and_slopes(addition, 3), mind)

    first = found(1)
    for threads in (2, 3, 4):
        for one, other in zip(first, found(threads), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_objective_on_a_gpu_is_that_on_the_cpu() -> None:
    weights, shape = Weights(2.5, 0.5, 0.2, 4, 10), (23, 18, 20)
    addition = torch.from_numpy(np.random.default_rng(1).normal(0, 0.9, (1, 3, 13, 10, 11))).float()
    results = []
    for device in ("cpu", "cuda"):
        objective = objective_on(shape, 5, weights, device)
        where = addition.to(device).requires_grad_(True)
        value = objective(where, 3)
        results.append((value.cpu(), torch.autograd.grad(value, where)[0].cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@given(st.tuples(*[st.integers(1, 6)] * 3), SEEDS, st.sampled_from((torch.float32, torch.float64)))
@FEW
def test_smoothing_of_the_control_grid_is_two_means(shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> None:
    control = torch.from_numpy(floats(seed, 1, 3, *shape)).to(dtype).requires_grad_(True)
    upstream, expected = torch.from_numpy(floats(seed + 1, 1, 3, *shape)).to(dtype), control
    for _ in range(2):
        expected = F.avg_pool3d(F.pad(expected, [1] * 6, mode="replicate"), 3, stride=1)
    found = smooth_control(control)
    torch.testing.assert_close(found, expected)
    (one,), (other,) = (torch.autograd.grad((values * upstream).sum(), control) for values in (found, expected))
    torch.testing.assert_close(one, other)


@given(SHAPES, SEEDS)
@FEW
def test_mind_is_that_of_pytorch(shape: tuple[int, int, int], seed: int) -> None:
    image = torch.from_numpy(floats(seed, 1, 1, *shape))
    torch.testing.assert_close(features.mind_ssc(image), features.mind_ssc(image.double()).float(), atol=2e-4, rtol=0)


@given(st.tuples(*[st.integers(2, 9)] * 3), SEEDS, st.integers(0, 3))
@FEW
def test_correlation_is_that_of_pytorch(shape: tuple[int, int, int], seed: int, radius: int) -> None:
    fixed, moving, weight = (torch.from_numpy(floats(seed + n, 1, 1, *shape)) for n in range(3))
    found = features.LocalCorrelation(fixed, radius).value_and_slopes(moving, weight)
    doubles = features.LocalCorrelation(fixed.double(), radius).value_and_slopes(moving.double(), weight.double())
    for one, other in zip(found, doubles, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


@given(st.tuples(*[st.integers(2, 8)] * 3), SEEDS)
@FEW
def test_penalty_of_the_linear_stages_is_that_of_pytorch(shape: tuple[int, int, int], seed: int) -> None:
    def scan(number: int) -> Any:
        image, weight = (torch.from_numpy(floats(seed + 2 * number + n, 1, 1, *shape)) for n in range(2))
        return affine._WeightedScan(Level(Grid(shape, np.eye(4)), image, torch.ones_like(image), weight, None), 0.0, 50)

    one, other, parameters = scan(0), scan(1), linear_parameters(seed)
    results = []
    for agreement in (affine.agreement, affine.agreement_by_torch):
        value = agreement(parameters, one, other, torch.tensor([1.0, -2.0, 0.5]))
        results.append((value.float(), *torch.autograd.grad(value.sum(), parameters)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shift", [(0, 0, 0), (2, -1, 1)])
def test_derivatives_hold_where_a_shift_puts_all_voxels_on_nodes(shift: tuple[int, int, int]) -> None:
    def scan(number: int) -> affine._WeightedScan:
        image = torch.from_numpy(ndimage.gaussian_filter(floats(number, 20, 18, 16), 1.5) * 8)[None, None]
        everywhere = torch.ones_like(image)
        return affine._WeightedScan(Level(Grid(image.shape[2:], np.eye(4)), image, everywhere, everywhere, None), 0.0)

    one, other, parameters = scan(0), scan(1), torch.zeros(1, 12)
    parameters[0, :3] = torch.tensor(shift)
    agreement = partial(affine.agreement, query=one, atlas=other, centre_mm=torch.tensor([10.0, 9, 8]))
    steps = torch.eye(12)[:6] * torch.tensor([0.1] * 3 + [0.01] * 9)
    differences = (agreement(parameters + steps) - agreement(parameters - steps)) / (2 * steps.sum(dim=1))
    slopes = torch.autograd.grad(agreement(parameters.requires_grad_(True)).sum(), parameters)[0][0, :6]
    for part in (slice(3), slice(3, 6)):
        error = (slopes[part] - differences[part]).norm() / differences[part].norm()
        assert error < 0.3


@given(SHAPES, SEEDS)
@FEW
def test_points_off_the_centres_stay_in_their_voxels_and_spread(shape: tuple[int, int, int], seed: int) -> None:
    voxels = torch.from_numpy(np.random.default_rng(seed).integers(0, shape, (64, 3)))
    points = off_centre(voxels, shape)
    assert ((points - voxels).abs() <= 0.25).all()
    assert ((points >= 0) & (points <= torch.tensor(shape) - 1)).all()
    inner = ((voxels > 0) & (voxels < torch.tensor(shape) - 1)).all(dim=1)
    moves = (points - voxels)[inner]
    assert len(torch.unique(moves.mul(1000).round(), dim=0)) == len(moves)


def linear_parameters(seed: int) -> torch.Tensor:
    """Those of two linear maps."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.2, (2, 12))).float().requires_grad_(True)


@given(st.tuples(*[st.integers(2, 8)] * 3), SEEDS)
@FEW
def test_comparison_of_structures_is_that_of_pytorch(shape: tuple[int, int, int], seed: int) -> None:
    image = torch.from_numpy(floats(seed, 1, 1, *shape))
    level = Level(Grid(shape, np.eye(4)), image, torch.ones_like(image), torch.ones_like(image), None)
    fit = structures.StructureFit(level, level, 1.0, 10.0, brightness=True)
    points, weight, own = (
        torch.from_numpy(floats(seed + n, *size)) for n, size in ((1, (15, 3)), (2, (15,)), (3, (15,)))
    )
    mind, parameters = torch.from_numpy(floats(seed + 4, 12, 15)), linear_parameters(seed)
    points = points * torch.tensor(shape)
    sample = structures._Sample(points, weight / weight.sum(), own, mind, points.mean(dim=0))
    found, expected = fit._sums(parameters, sample), fit._sums_by_torch(parameters, sample)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    one, other = (torch.autograd.grad(values.sum(), parameters)[0] for values in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@given(SEEDS, st.sampled_from((0.1, 1.0)))
@FEW
def test_linear_maps_are_those_of_pytorch(seed: int, size: float) -> None:
    parameters, centre = linear_parameters(seed) * (5 * size), torch.tensor([80.0, -50.0, 30.0])
    maps, slopes = affine.linear_maps(parameters.detach().double().numpy(), centre)

    def by_torch(numbers: torch.Tensor) -> torch.Tensor:
        matrix, offset = affine.affine_maps(numbers, centre)
        return torch.cat((matrix, offset[..., None]), dim=2)

    np.testing.assert_allclose(maps[:, :3], by_torch(parameters).detach(), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(maps[:, 3], [[0, 0, 0, 1]] * 2)
    jacobian = torch.autograd.functional.jacobian(by_torch, parameters)
    for n in range(2):
        np.testing.assert_allclose(slopes[n, :, :3].transpose(1, 2, 0), jacobian[n, :, :, n], rtol=1e-4, atol=1e-2)


@given(SHAPES, SEEDS)
@FEW
def test_label_weights_are_interpolated_one_hot_maps(shape: tuple[int, int, int], seed: int) -> None:
    labels = np.pad(np.random.default_rng(seed).integers(0, 4, shape, dtype=np.int32), 1)
    points = np.random.default_rng(seed + 1).uniform(0, np.array(shape) + 0.999, (15, 3))
    found = np.empty(120, np.int64), np.empty(120, np.int32), np.empty(120, np.float32)
    count = warping.label_weights(labels, points, 0.05, found)
    expected = {
        (n, value): weight
        for n, point in enumerate(points)
        for value in (1, 2, 3)
        if (weight := crude_value((labels == value).astype(np.float32), point)) >= 0.05
    }
    pairs = list(zip(found[0][:count].tolist(), found[1][:count].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert [n for n, _ in pairs] == sorted(n for n, _ in pairs)
    assert set(pairs) == expected.keys()
    for pair, weight in zip(pairs, found[2][:count], strict=True):
        assert weight == pytest.approx(expected[pair], abs=1e-5)


def test_slabs_cover_all_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for length in (1, 3, 8, 50):
        parts = compiled.in_slabs(lambda first, last: list(range(first, last)), length)
        assert list(itertools.chain(*parts)) == list(range(length))


def test_without_a_place_for_a_cache_it_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    njit = numba.njit

    def refusing(*args: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", refusing)
    assert compiled.compiled(lambda n: n + 1)(2) == 3


def test_first_run_says_that_it_compiles_and_the_second_gives_the_same(tmp_path: Path) -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from atlassegfm.core.geometry import Grid\n"
        "from atlassegfm.core.image import Volume\n"
        "from atlassegfm.registration import register\n"
        "from atlassegfm.settings import InstanceSettings, RegistrationSettings\n"
        "data = np.random.default_rng(0).random((14, 15, 16), np.float32)\n"
        "one, other = (Volume(np.roll(data, n, 0), Grid(data.shape, np.eye(4))) for n in (0, 1))\n"
        "labels = Volume((data > 0.5).astype(np.uint8), one.grid)\n"
        "few = RegistrationSettings(linear_iterations=2, instance=InstanceSettings(iterations=(2,)))\n"
        "stages = []\n"
        "found = register(one, other, few, moving_labels=labels, on_stage=stages.append)\n"
        "print('compile' in stages, hashlib.sha1(found.field.displacement_mm.tobytes()).hexdigest())\n"
    )
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = partial(subprocess.run, [sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    (first, one), (second, other) = (run(check=True).stdout.split() for _ in range(2))
    assert (first, second) == ("True", "False")
    assert one == other


@pytest.mark.parametrize("limit_mm", [2.0, 7.5])
@given(SHAPES, SEEDS)
@settings(max_examples=25, deadline=None)
def test_limited_distances_are_the_exact_ones_clipped(limit_mm: float, shape: tuple[int, int, int], seed: int) -> None:
    mask = floats(seed, *shape) > 0.6
    spacing_mm = np.array([2.5, 0.8, 1.3])
    exact = signed_distance_mm(mask, spacing_mm).clip(-limit_mm, limit_mm)
    np.testing.assert_allclose(
        signed_distance_mm(mask, spacing_mm, limit_mm).clip(-limit_mm, limit_mm), exact, atol=1e-4
    )


@given(SHAPES, SEEDS, st.tuples(*[st.sampled_from((1, 2, 4))] * 3))
@FEW
def test_block_means_and_back(shape: tuple[int, int, int], seed: int, strides: tuple[int, int, int]) -> None:
    values = floats(seed, *shape)
    means = correction_features.downsample(values, strides)
    for block in np.ndindex(*means.shape):
        cube = tuple(slice(n * s, n * s + s) for n, s in zip(block, strides, strict=True))
        assert means[block] == pytest.approx(values[cube].mean(), abs=1e-5)
    back = correction_features.upsample(means, strides, shape)
    for voxel in np.ndindex(*shape):
        place = (np.array(voxel) + 0.5) / strides - 0.5
        assert back[voxel] == pytest.approx(crude_value(means, place), abs=1e-5)
