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
from atlassegfm.core import kernels as box_kernels
from atlassegfm.core.gaussian import gaussian
from atlassegfm.core.geometry import Grid
from atlassegfm.core.mask import signed_distance_mm
from atlassegfm.core.parallel import limited_threads
from atlassegfm.fusion import correction_features
from atlassegfm.registration import affine, features, kernels, structures
from atlassegfm.registration.objective import Objective, Scans, Weights, smooth_control
from atlassegfm.registration.pyramid import Level
from atlassegfm.registration.sampling import at_points
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
@FEW
def test_sample_and_its_slope(shape: tuple[int, int, int], seed: int) -> None:
    image, points = floats(seed, *shape), off_nodes(points_around(shape, 20, seed + 1))
    values, slopes = np.empty(20, np.float32), np.empty((20, 3), np.float32)
    kernels.sample(image, points, values, slopes, 0, 20)
    np.testing.assert_allclose(values, [crude_value(image, p) for p in points], atol=1e-5)
    np.testing.assert_allclose(slopes, [crude_slope(image, p) for p in points], atol=1e-2)


@given(SHAPES, SEEDS)
@FEW
def test_squared_difference_and_its_slope(shape: tuple[int, int, int], seed: int) -> None:
    mind, targets = floats(seed, *shape, 12), floats(seed + 1, 5, 12)
    points = off_nodes(points_around(shape, 10, seed + 2))
    values, slopes = np.empty(10, np.float32), np.empty((10, 3), np.float32)
    kernels.difference_at(mind, points, targets, values, slopes, 0, 10)
    for n, point in enumerate(points):
        found = np.array([crude_value(mind[..., c], point) for c in range(12)]) - targets[n % 5]
        slope = np.array([crude_slope(mind[..., c], point) for c in range(12)])
        assert values[n] == pytest.approx((found**2).sum(), rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(slopes[n], 2 * found @ slope, atol=3e-2)


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


@given(st.tuples(*[st.integers(1, 6)] * 3), SEEDS)
@FEW
def test_smoothing_of_the_control_grid_is_two_means(shape: tuple[int, int, int], seed: int) -> None:
    control = torch.from_numpy(floats(seed, 1, 3, *shape)).double().requires_grad_(True)
    upstream, expected = torch.from_numpy(floats(seed + 1, 1, 3, *shape)).double(), control
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

    one, other = scan(0), scan(1)
    count = len(other.points_mm)
    points = (
        torch.from_numpy(off_nodes(points_around(shape, 2 * count, seed))).reshape(2, count, 3).requires_grad_(True)
    )
    results = []
    for penalties in (one._penalties, one._penalties_by_torch):
        value = penalties(other, points)
        results.append((value, *torch.autograd.grad(value.sum(), points)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@given(st.tuples(*[st.integers(2, 8)] * 3), SEEDS)
@FEW
def test_comparison_of_structures_is_that_of_pytorch(shape: tuple[int, int, int], seed: int) -> None:
    image = torch.from_numpy(floats(seed, 1, 1, *shape))
    level = Level(Grid(shape, np.eye(4)), image, torch.ones_like(image), torch.ones_like(image), None)
    fit = structures.StructureFit(level, level, 1.0, 10.0, brightness=True)
    mind = torch.from_numpy(floats(seed + 1, 12, 15))
    mapped = torch.from_numpy(off_nodes(points_around(shape, 30, seed + 2))).reshape(2, 15, 3).requires_grad_(True)
    for found, expected in zip(fit._compared(mapped, mind), fit._compared_by_torch(mapped, mind), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        one, other = (torch.autograd.grad(values.sum(), mapped, retain_graph=True)[0] for values in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


def test_at_points_passes_the_slope_on() -> None:
    def squares(points: Any, values: Any, slopes: Any, first: int, last: int) -> None:
        values[first:last] = (points[first:last] ** 2).sum(axis=1)
        slopes[first:last] = 2 * points[first:last]

    points = torch.from_numpy(floats(0, 2, 5, 3)).requires_grad_(True)
    value = at_points(points, squares)
    torch.testing.assert_close(value, points.pow(2).sum(dim=-1))
    (found,) = torch.autograd.grad((value * torch.arange(5)).sum(), points)
    torch.testing.assert_close(found, 2 * points.detach() * torch.arange(5)[:, None])


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


@given(SHAPES, SEEDS, st.sampled_from(("mirror", "nearest")), st.tuples(*[st.sampled_from((0.0, 0.1, 0.7, 2.5))] * 3))
@FEW
def test_gaussian(shape: tuple[int, int, int], seed: int, beyond: Any, sigma: tuple[float, ...]) -> None:
    values = floats(seed, *shape)
    crude = ndimage.gaussian_filter(values, sigma, mode={"mirror": "reflect"}.get(beyond, beyond), truncate=3)
    np.testing.assert_allclose(gaussian(values, sigma, beyond=beyond, truncate=3), crude, atol=1e-5)


@given(SHAPES, SEEDS)
@FEW
def test_look_up_of_place_and_intensity(shape: tuple[int, int, int], seed: int) -> None:
    random, grid, near = np.random.default_rng(seed), floats(seed, 3, 4, 3, 6), floats(seed + 1, *shape) > 0.3
    places = [random.uniform(0, cells - 1.001, count) for cells, count in zip(grid.shape, shape, strict=False)]
    bins = random.uniform(0, 5, np.count_nonzero(near)).astype(np.float32)
    bins[:1] = 5
    tables = tuple((at.astype(int), at.astype(int) + 1, (at % 1).astype(np.float32)) for at in places)
    begins = np.cumsum([0, *np.count_nonzero(near, axis=(1, 2))])
    found = np.empty_like(bins)
    for i in reversed(range(shape[0])):
        box_kernels.look_up(grid, tables, near, bins, begins, found, i, i + 1)
    points = np.stack([*(at[index] for at, index in zip(places, np.nonzero(near), strict=True)), bins])
    np.testing.assert_allclose(found, ndimage.map_coordinates(grid, points, order=1), atol=1e-5)
