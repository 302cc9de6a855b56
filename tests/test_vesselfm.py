"""The model vesselfm: the published network and what is around it, and which vessel is whose."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError, MissingExtraError, ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Source, Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.evaluate.metrics import score_labels
from atlassegfm.jobs.store import RunInputs, run_record
from atlassegfm.models import load_model
from atlassegfm.models.table import prompt_kind
from atlassegfm.models.vesselfm import PUBLISHED_FILTERS, VesselSegmenter, build_network, load_network
from atlassegfm.prompts import ClickPrompt, RegionPrompt
from atlassegfm.result import Segmentation
from atlassegfm.segment import segment
from atlassegfm.settings import ModelSettings, Settings, VesselFmSettings
from scenes import PAPER_GATE, UNREGISTERED
from tiny_vesselfm import FILTERS, make_checkpoint

Mask = NDArray[np.bool_]
SMALL = VesselFmSettings(window=64)
EVERYWHERE = VesselFmSettings(window=64, reach_mm=1000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "vesselFM_base.pt")


def scan(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float] = (1, 1, 1), seed: int = 0) -> Volume:
    data = np.random.default_rng(seed).normal(0, 1, shape) + np.indices(shape).sum(axis=0) / 50
    return Volume(data.astype(np.float32), Grid(shape, np.diag([*spacing_mm, 1.0])))


def region(*voxels: tuple[int, int, int]) -> RegionPrompt:
    """Single voxels as the warped atlas mask."""
    start, stop = np.min(voxels, axis=0), np.max(voxels, axis=0) + 1
    values = np.zeros(stop - start, np.float32)
    values[tuple((np.array(voxels) - start).T)] = 1
    return RegionPrompt(LocalMap(tuple(start.tolist()), values))


def block(start: tuple[int, int, int], stop: tuple[int, int, int]) -> RegionPrompt:
    return RegionPrompt(LocalMap(start, np.ones(np.subtract(stop, start), np.float32)))


def threshold(window: torch.Tensor) -> torch.Tensor:
    """In place of the network: bright is a vessel."""
    return (window - 0.5) * 20


class Uneven:
    """In place of the network: gives each voxel of a window another logit, so that a missing window shows."""

    def __init__(self) -> None:
        self.windows = 0

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        self.windows += 1
        ramp = torch.linspace(-0.7, 0.9, window.numel()).reshape(window.shape)
        return window.roll(3, 2) + ramp + ramp.transpose(2, 4) * 0.37


def segmenter(network: object = threshold, settings: VesselFmSettings = SMALL) -> VesselSegmenter:
    assert callable(network)
    return VesselSegmenter(network, torch.device("cpu"), settings)


# The network and its weights


def test_published_state_dict_loads(tmp_path: Path) -> None:
    """As many keys and parameters as the authors' file, in their groups, at full size."""
    network = build_network(device="meta").to_empty(device="cpu")
    for value, weights in enumerate(network.parameters()):
        weights.fill_(value)  # instead of drawing 31 million random numbers
    state = network.state_dict()
    assert len(state) == 180
    groups = Counter(key.partition(".")[0] for key in state)
    counted = ("input_block", 9), ("downsamples", 36), ("bottleneck", 9), ("upsamples", 35), ("output_block", 2)
    assert groups == dict([*counted, ("skip_layers", 89)])
    assert sum(weights.numel() for weights in network.parameters()) == 31_418_977
    assert state["upsamples.4.conv_block.conv1.conv.weight"].shape == (32, 64, 3, 3, 3)
    torch.save(state, tmp_path / "vesselFM_base.pt")
    loaded = load_network(tmp_path / "vesselFM_base.pt").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], weights) for key, weights in state.items())


def test_filters_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    network = load_network(make_checkpoint(tmp_path / "any name.pt", filters=(2, 3, 4, 5, 6, 7)))
    assert network.get_parameter("bottleneck.conv1.conv.weight").shape[:2] == (7, 6)
    assert not network.training
    assert not any(weights.requires_grad for weights in network.parameters())


def test_half_precision_checkpoint_is_computed_in_single(tmp_path: Path, checkpoint: Path) -> None:
    state = {key: weights.half() for key, weights in torch.load(checkpoint, weights_only=True).items()}
    torch.save(state, tmp_path / "half.pt")
    assert {weights.dtype for weights in load_network(tmp_path / "half.pt").parameters()} == {torch.float32}


def test_loading_leaves_random_numbers_alone(checkpoint: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model("vesselfm", "cpu", path=checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


def test_file_or_folder_and_where_numbers_come_from(checkpoint: Path) -> None:
    for path in (checkpoint, checkpoint.parent):
        assert load_model("vesselfm", "cpu", path=path).provenance == {
            "weights": {
                "file": "vesselFM_base.pt",
                "bytes": checkpoint.stat().st_size,
                "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            },
            "monai_version": version("monai"),
        }


# What is around the network


def like_monai(image: Volume, network: Callable[[torch.Tensor], torch.Tensor]) -> NDArray[np.float32]:
    """Published: percentiles of the whole scan, windows over it in the array order of SimpleITK, sigmoid."""
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import ScaleIntensityRangePercentiles

    scale = ScaleIntensityRangePercentiles(lower=1, upper=99, b_min=0, b_max=1, clip=True)
    scaled = scale(np.ascontiguousarray(image.data.transpose(2, 1, 0))[None])
    inferer = SlidingWindowInferer(roi_size=[64] * 3, overlap=0.5, mode="constant", padding_mode="constant")
    with torch.inference_mode():
        logits = inferer(torch.as_tensor(np.asarray(scaled))[None], network)
    return torch.sigmoid(logits)[0, 0].numpy().transpose(2, 1, 0)


@pytest.mark.parametrize("shape", [(70, 40, 61), (33, 64, 1)])
def test_equals_monai(checkpoint: Path, shape: tuple[int, int, int]) -> None:
    image = scan(shape)
    model = load_model("vesselfm", "cpu", ModelSettings(vesselfm=EVERYWHERE), checkpoint)
    found = model.predict(model.encode(image), {4: region((20, 20, 0))})[4].to_full(shape)
    expected = like_monai(image, load_network(checkpoint))
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(150, 70, 97), (128, 30, 129)])
def test_windows_are_those_of_monai(shape: tuple[int, int, int]) -> None:
    """Where they lie and how they count shows in an uneven answer to each."""
    image = scan(shape)
    model = segmenter(Uneven(), EVERYWHERE)
    found = model.predict(model.encode(image), {4: region((20, 20, 0))})[4].to_full(shape)
    expected = like_monai(image, Uneven())
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_percentiles_are_those_of_the_whole_scan() -> None:
    """Also where only a part in reach is computed, and where others are set."""
    image = scan((40, 30, 20))
    low, high = np.percentile(image.data, [5, 80])
    model = segmenter(settings=replace(SMALL, percentiles=(5.0, 80.0), reach_mm=2))
    found = model.predict(model.encode(image), {1: region((30, 20, 5))})[1]
    logits = (np.clip((image.data - low) / (high - low), 0, 1) - 0.5) * 20
    distance = np.sqrt(((np.moveaxis(np.indices(image.grid.shape), 0, -1) - (30, 20, 5)) ** 2).sum(axis=-1))
    expected = np.where(distance <= 2, 1 / (1 + np.exp(-logits)), 0)
    np.testing.assert_allclose(found.to_full(image.grid.shape), expected, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(50.0, 50.0), (99.0, 1.0), (-1.0, 99.0)])
def test_percentiles_in_order(low: float, high: float) -> None:
    with pytest.raises(InputError, match=r"models\.vesselfm\.percentiles"):
        with_overrides(Settings(), [f"models.vesselfm.percentiles=[{low}, {high}]"])


def test_resampling_brings_spacings_together_and_back() -> None:
    """A thick-sliced ramp along each axis is the same ramp to the network, and back on the scan's voxels."""
    shape, spacing_mm = (40, 36, 9), (0.8, 1.0, 4.0)
    seen: list[tuple[int, ...]] = []
    places = np.moveaxis(np.indices(shape), 0, -1) * spacing_mm
    data = (places @ (1.0, 0.7, 0.5)).astype(np.float32)
    image = Volume(data, Grid(shape, np.diag([*spacing_mm, 1.0])))

    def network(window: torch.Tensor) -> torch.Tensor:
        inside = np.flatnonzero(window.numpy()[0, 0].any(axis=(1, 2)))
        seen.append((int(inside[-1] - inside[0] + 1),))
        return window * 4 - 2

    settings = VesselFmSettings(window=64, spacing_mm=1.0, reach_mm=1000, percentiles=(0.0, 100.0))
    model = segmenter(network, settings)
    encoded = model.encode(image)
    assert encoded.data.shape == (32, 36, 36)
    # Voxels of 1 mm over the field of view; beyond the outer centres the border goes on.
    np.testing.assert_allclose(np.diff(encoded.data, axis=0)[1:-1], 1 / np.ptp(data), atol=1e-5)
    np.testing.assert_allclose(np.diff(encoded.data, axis=2)[:, :, 2:-2], 0.5 / np.ptp(data), atol=1e-5)
    found = model.predict(encoded, {1: region((0, 0, 0))})[1].to_full(shape)
    assert seen == [(36,)]
    logits = (data - data.min()) / np.ptp(data) * 4 - 2
    inner = (slice(1, -1), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(found[inner], 1 / (1 + np.exp(-logits[inner])), atol=1e-5)


def test_resampled_windows_are_those_in_reach() -> None:
    """Every voxel has the value it has when all windows are computed, though few are."""
    image = scan((90, 20, 40), (1.0, 1.3, 2.0))
    settings = VesselFmSettings(window=64, spacing_mm=0.7, reach_mm=6)
    near, everywhere = segmenter(Uneven(), settings), segmenter(Uneven(), replace(settings, reach_mm=1000))
    few, encoded = near.encode(image), everywhere.encode(image)
    for voxel in ((4, 10, 4), (57, 3, 36)):
        part = near.predict(few, {1: region(voxel)})[1]
        whole = everywhere.predict(encoded, {1: region(voxel)})[1].to_full(image.grid.shape)
        distance = np.sqrt(
            (((np.moveaxis(np.indices(image.grid.shape), 0, -1) - voxel) * (1.0, 1.3, 2.0)) ** 2).sum(-1)
        )
        np.testing.assert_array_equal(part.to_full(image.grid.shape), np.where(distance <= 6, whole, 0))
    assert len(few.windows) == 7
    assert len(encoded.windows) == 12


def test_only_windows_in_reach_are_computed_and_once() -> None:
    network = Uneven()
    model = segmenter(network)
    encoded = model.encode(scan((200, 50, 50)))  # windows from 0, 32, ... 128, 136
    model.predict(encoded, {1: region((10, 25, 25))})
    assert network.windows == 1  # up to voxel 20
    model.predict(encoded, {2: region((22, 25, 25))})
    assert network.windows == 2  # up to voxel 32
    model.predict(encoded, {1: region((10, 25, 25)), 2: region((22, 25, 25)), 3: region((195, 25, 25))})
    assert network.windows == 4  # from voxel 185


@pytest.mark.parametrize("cache_mib", [0, 1, 1024])
def test_structure_by_structure_is_the_same(cache_mib: int) -> None:
    image = scan((150, 70, 40))
    prompts = {
        9: block((5, 10, 3), (30, 14, 8)),
        2: block((60, 50, 20), (140, 52, 30)),
        5: block((100, 5, 35), (102, 9, 60)),
    }
    network = Uneven()
    model = segmenter(network, replace(SMALL, cache_mib=cache_mib))
    together = model.predict(model.encode(image), prompts)
    computed = network.windows
    encoded = model.encode(image)
    for number in (5, 9, 2):
        alone = model.predict(encoded, {number: prompts[number]})[number]
        assert alone.start == together[number].start
        np.testing.assert_array_equal(alone.values, together[number].values)
    kept = sum(window.nbytes for window in encoded.windows.values())
    assert kept <= cache_mib << 20
    # Windows that two structures share are computed once where there is room for them.
    assert network.windows == 2 * computed if cache_mib == 1024 else network.windows > 2 * computed


def test_shorter_numbers_change_little(checkpoint: Path) -> None:
    image, maps = scan((20, 20, 20)), {}
    for precision in ("float32", "bfloat16"):
        settings = ModelSettings(vesselfm=replace(EVERYWHERE, precision=precision))
        model = load_model("vesselfm", "cpu", settings, checkpoint)
        maps[precision] = model.predict(model.encode(image), {1: region((5, 5, 5))})[1].values
        assert maps[precision].dtype == np.float32
    assert 0 < np.abs(maps["float32"] - maps["bfloat16"]).max() < 0.1


# Which vessel is whose


def owners(maps: dict[int, LocalMap], shape: tuple[int, int, int]) -> dict[int, Mask]:
    return {number: found.to_full(shape) > 0 for number, found in maps.items()}


def test_nearest_region_in_mm_wins() -> None:
    """Along the thick axis a voxel counts for four."""
    image = scan((21, 21, 21), (1.0, 1.0, 4.0))
    model = segmenter(settings=replace(SMALL, reach_mm=9))
    found = owners(model.predict(model.encode(image), {1: region((4, 10, 10)), 2: region((10, 10, 8))}), (21, 21, 21))
    places = np.moveaxis(np.indices((21, 21, 21)), 0, -1) * (1.0, 1.0, 4.0)
    one, two = (np.sqrt(((places - at) ** 2).sum(axis=-1)) for at in ((4, 10, 40), (10, 10, 32)))
    np.testing.assert_array_equal(found[1], (one <= 9) & (one <= two))
    np.testing.assert_array_equal(found[2], (two <= 9) & (two < one))
    assert ((one == two) & (one <= 9)).any()


def test_tie_goes_to_the_smaller_number_whatever_the_order() -> None:
    image = scan((21, 9, 9))
    model = segmenter()
    same = {7: region((10, 4, 4)), 3: region((10, 4, 4))}
    maps = model.predict(model.encode(image), same)
    assert list(maps) == [7, 3]
    assert maps[7].is_empty
    assert not maps[3].is_empty
    for order in ((8, 1), (1, 8)):
        prompts = {number: region({1: (4, 4, 4), 8: (16, 4, 4)}[number]) for number in order}
        found = owners(model.predict(model.encode(image), prompts), (21, 9, 9))
        assert found[1][:11].any()
        assert found[1][10].all()  # midway
        assert not found[1][11:].any()
        assert found[8][11:].any()
        assert not found[8][:11].any()


def test_vessel_beyond_reach_is_cut_straight() -> None:
    shape = (60, 15, 15)
    data = np.zeros(shape, np.float32)
    data[:, 6:9, 6:9] = 1
    image = Volume(data, Grid(shape, np.eye(4)))
    model = segmenter(settings=replace(SMALL, reach_mm=5))
    found = model.predict(model.encode(image), {1: block((20, 6, 6), (30, 9, 9))})[1]
    vessel = found.to_full(shape) >= 0.5
    expected = data > 0
    expected[:15] = expected[35:] = False
    np.testing.assert_array_equal(vessel, expected)
    # No fading: as sure as inside.
    assert found.to_full(shape)[34, 7, 7] == found.to_full(shape)[25, 7, 7] > 0.99
    assert model.predict(model.encode(image), {1: block((20, 6, 6), (30, 9, 9))})[1].values.dtype == np.float32


def test_reach_of_0_is_the_region_itself() -> None:
    image = scan((20, 20, 20))
    model = segmenter(settings=replace(SMALL, reach_mm=0))
    found = model.predict(model.encode(image), {1: block((3, 4, 5), (7, 9, 11))})[1]
    assert found.start == (3, 4, 5)
    assert found.stop == (7, 9, 11)
    assert (found.values > 0).all()


@pytest.mark.parametrize(
    "prompt",
    [
        RegionPrompt(LocalMap.empty()),
        RegionPrompt(LocalMap((3, 3, 3), np.full((2, 2, 2), 0.4, np.float32))),
        RegionPrompt(LocalMap((50, 3, 3), np.ones((4, 4, 4), np.float32))),
        RegionPrompt(LocalMap((-9, 3, 3), np.ones((4, 4, 4), np.float32))),
    ],
)
def test_prompt_that_points_at_nothing(prompt: RegionPrompt) -> None:
    network = Uneven()
    model = segmenter(network)
    encoded = model.encode(scan((30, 20, 10)))
    assert model.predict(encoded, {1: prompt})[1].is_empty
    assert network.windows == 0
    beside = model.predict(encoded, {1: prompt, 2: block((3, 3, 3), (4, 4, 4))})
    assert beside[1].is_empty
    assert not beside[2].is_empty


def test_no_prompt_at_all() -> None:
    model = segmenter()
    assert model.predict(model.encode(scan((9, 9, 9))), {}) == {}


def test_region_that_sticks_out_of_the_scan() -> None:
    image = scan((30, 20, 10))
    model = segmenter(settings=replace(SMALL, reach_mm=3))
    found = model.predict(model.encode(image), {1: block((-4, 17, 5), (2, 25, 14))})[1]
    inside = model.predict(model.encode(image), {1: block((0, 17, 5), (2, 20, 10))})[1]
    assert found.start == inside.start == (0, 14, 2)
    assert found.stop == inside.stop == (5, 20, 10)
    np.testing.assert_array_equal(found.values, inside.values)


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 70, 1), (1, 9, 65)])
def test_thin_scans(checkpoint: Path, shape: tuple[int, int, int]) -> None:
    model = load_model("vesselfm", "cpu", ModelSettings(vesselfm=EVERYWHERE), checkpoint)
    found = model.predict(model.encode(scan(shape)), {1: region((0, 0, 0))})[1]
    assert found.values.shape == shape
    assert np.isfinite(found.values).all()
    assert found.values.min() >= 0
    assert found.values.max() <= 1


def test_is_told_of_each_structure_once_as_its_windows_come() -> None:
    told: list[object] = []

    def network(window: torch.Tensor) -> torch.Tensor:
        told.append("window")
        return window

    model = segmenter(network)
    prompts = {
        4: region((190, 5, 5)),
        2: region((5, 5, 5)),
        3: RegionPrompt(LocalMap.empty()),
        8: region((8, 5, 5)),
    }
    model.predict(model.encode(scan((200, 10, 10))), prompts, told.append)
    assert told == [2, 8, "window", 4, "window", "window", 3]


def test_the_same_twice_and_nothing_is_written_to(checkpoint: Path) -> None:
    image, prompt = scan((70, 20, 20)), block((20, 5, 5), (40, 9, 9))
    data = image.data.copy()
    runs = []
    for _ in range(2):
        model = load_model("vesselfm", "cpu", ModelSettings(vesselfm=SMALL), checkpoint)
        encoded = model.encode(image)
        runs += [model.predict(encoded, {1: prompt})[1].values for _ in range(2)]
    assert all(np.array_equal(runs[0], run) for run in runs[1:])
    np.testing.assert_array_equal(image.data, data)


# The whole job on a tree of vessels


def tree(grid: Grid, shift_mm: tuple[float, float, float] = (0, 0, 0)) -> tuple[Volume, Volume]:
    """A trunk that goes on into a left branch (1), a right branch (2), and a vessel of its own (3): scan and truth."""
    points = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1)) - shift_mm
    labels = np.zeros(grid.shape, np.uint8)
    along = np.linspace(0, 1, 60)[:, None]
    courses = {
        3: (np.array([36.0, 0, -30]) + along * (0, 0, 60), 2.5),
        2: (np.array([0.0, 0, 0]) + along * (22, 4, 26), 2.4),
        1: (
            np.concatenate([[0, 0, -28] + along * (0, 0, 28), along * (-20, 3, 27) + along * (1 - along) * (-9, 0, 0)]),
            3.0,
        ),
    }
    data = np.full(grid.shape, 40.0)
    for value, (course, radius_mm) in courses.items():
        distance = np.full(grid.shape, np.inf)
        for point in course:
            np.minimum(distance, ((points - point) ** 2).sum(axis=-1), out=distance)
        labels[distance <= radius_mm**2] = value
        data += 100 * np.clip((radius_mm - np.sqrt(distance)) / 1.5 + 0.5, 0, 1) * (data < 100)
    texture = 5 * np.sin(points[..., 0] / 4) * np.cos(points[..., 2] / 5)
    return Volume((data + texture).astype(np.float32), grid), Volume(labels, grid)


TREE_GRID = Grid((60, 24, 48), np.array([[1.5, 0, 0, -38], [0, 1.5, 0, -16], [0, 0, 1.5, -36], [0, 0, 0, 1]]))
SHIFT_MM = (2.5, 2.0, -1.5)


def stored_as(volume: Volume, codes: str) -> Volume:
    """The same voxels in the array order of another scanner."""
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    turn = ornt_transform(axcodes2ornt(volume.grid.axis_codes), axcodes2ornt(codes))
    i, j, k = (volume.grid.shape[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3))
    return volume.turned_to(Grid((i, j, k), volume.grid.affine @ inv_ornt_aff(turn, volume.grid.shape)))


@pytest.fixture(scope="module")
def tree_atlas() -> Atlas:
    image, labels = tree(TREE_GRID)
    return Atlas.from_volumes(image, Volume(np.where(labels.data == 3, 0, labels.data), TREE_GRID))


@pytest.fixture(scope="module")
def tree_result(tree_atlas: Atlas) -> Segmentation:
    return segment_tree(tree_atlas, tree(TREE_GRID, SHIFT_MM)[0])


def segment_tree(atlas: Atlas, query: Volume) -> Segmentation:
    """Without registration: the warped atlas is 3.5 mm off, more than the vessels' radius; the model is trusted."""
    overrides = [*PAPER_GATE, "model=vesselfm", "models.vesselfm.window=64", "fusion.start=0"]
    settings = with_overrides(Settings(), [*UNREGISTERED, *overrides])
    return segment(Context(atlas, settings), query, device="cpu", model=segmenter())


def test_branches_of_a_tree_stay_apart(tree_result: Segmentation) -> None:
    truth = tree(TREE_GRID, SHIFT_MM)[1].data
    spacing_mm, tolerances_mm = TREE_GRID.spacing_mm, {1: 1.0, 2: 1.0}

    def cldice(labels: Volume | None) -> dict[int, float]:
        assert labels is not None
        scores = score_labels(labels.data, truth, [1, 2], spacing_mm, tolerances_mm, centreline=[1, 2])
        return {value: one.cldice for value, one in scores.items() if one.cldice is not None}

    atlas, model, fused = (
        cldice(labels) for labels in (tree_result.atlas_labels, tree_result.model_labels, tree_result.labels)
    )
    assert max(atlas.values()) < 0.7, atlas
    assert min(model.values()) > 0.9, model
    assert min(fused.values()) > 0.9, fused
    assert tree_result.prompt == "region"
    assert tree_result.model_labels is not None
    found = tree_result.model_labels.data
    assert set(np.unique(found)) == {0, 1, 2}
    assert not found[truth == 3].any()  # a vessel, but no one's
    # Away from where the branches part, none has voxels of the other.
    upper = TREE_GRID.voxel_to_world(np.moveaxis(np.indices(TREE_GRID.shape), 0, -1))[..., 2] > SHIFT_MM[2] + 8
    for value, other in ((1, 2), (2, 1)):
        branch = (truth == value) & upper
        assert branch.sum() > 100
        assert not (found[branch] == other).any()
        assert (found[branch] == value).mean() > 0.9


@pytest.mark.parametrize("codes", ["LPS", "SAR", "PIR"])
def test_array_order_changes_nothing(tree_atlas: Atlas, tree_result: Segmentation, codes: str) -> None:
    turned = segment_tree(tree_atlas, stored_as(tree(TREE_GRID, SHIFT_MM)[0], codes))
    assert turned.labels.grid.axis_codes == codes
    np.testing.assert_array_equal(turned.labels.turned_to(TREE_GRID).data, tree_result.labels.data)


def test_tells_what_it_used(tree_atlas: Atlas, checkpoint: Path) -> None:
    """With the network itself, through the front door."""
    settings = with_overrides(
        Settings(),
        [*UNREGISTERED, *PAPER_GATE, "model=vesselfm", "models.vesselfm.window=64", f"model_path={checkpoint}"],
    )
    context, query = Context(tree_atlas, settings), tree(TREE_GRID, SHIFT_MM)[0]
    summary = run_record(segment(context, query, device="cpu"), RunInputs(context, query)).model.model_dump()
    assert summary["name"] == "vesselfm"
    assert summary["prompt"] == "region"
    assert summary["provenance"]["weights"]["file"] == "vesselFM_base.pt"
    assert len(summary["provenance"]["weights"]["sha256"]) == 64
    assert "non-commercial" in summary["weights_licence"]


# What can be wrong


def test_missing_package(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets.dynunet", None)
    with pytest.raises(MissingExtraError, match="^the model 'vesselfm' needs the extra 'vesselfm'"):
        load_model("vesselfm", "cpu", path=checkpoint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu_is_an_error_of_the_model(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="no CUDA GPU"):
        load_model("vesselfm", "cuda", path=checkpoint)


def test_missing_file(tmp_path: Path) -> None:
    wanted = r"expected the weights of the model 'vesselfm' \(vesselFM_base\.pt of bwittmann/vesselFM\)"
    with pytest.raises(InputError, match=rf"/nothing\.pt: no such file or folder; {wanted}"):
        load_model("vesselfm", "cpu", path=tmp_path / "nothing.pt")
    with pytest.raises(InputError, match=rf"^{tmp_path}: has no vesselFM_base\.pt; {wanted}"):
        load_model("vesselfm", "cpu", path=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html><body>404</body></html>", "is a web page"),
        ([1, 2], "holds one list, not weights by name"),
        ({}, "holds nothing, not weights by name alone"),
        ({"state_dict": {}, "epoch": 3}, "holds state_dict, epoch, not weights by name alone"),
        (Path("folder"), r"holds other objects \(pathlib\..+\) besides tensors"),
    ],
)
def test_file_that_is_no_checkpoint(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    wanted = r"expected the weights of the model 'vesselfm' \(vesselFM_base\.pt\)"
    with pytest.raises(ModelError, match=rf"^{path}: {message}.*; {wanted}"):
        load_network(path)


def test_truncated_file(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "short.pt"
    path.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"short\.pt: is cut short or damaged; expected the weights of the model 'ves"):
        load_network(path)


def test_other_architecture(tmp_path: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    path = tmp_path / "other.pt"

    def message_with(**changes: torch.Tensor | None) -> str:
        changed = {**state, **{key.replace("__", "."): value for key, value in changes.items()}}
        torch.save({key: value for key, value in changed.items() if value is not None}, path)
        with pytest.raises(ModelError, match=r"expected the weights of the model 'vesselfm'") as raised:
            load_network(path)
        return str(raised.value)

    bias = "output_block__conv__conv__bias"
    missing = f"{path}: holds weights of another network: 1 missing (output_block.conv.conv.bias);"
    assert missing in message_with(**{bias: None})
    assert "without the kernels input_block.conv1.conv.weight;" in message_with(input_block__conv1__conv__weight=None)
    assert ": 1 unknown (head.weight);" in message_with(head__weight=torch.zeros(1))
    found = message_with(**{bias: torch.zeros(2)})
    assert ": 1 of another shape (output_block.conv.conv.bias is 2 instead of 1);" in found
    wide = torch.zeros(FILTERS[1] + 1, FILTERS[0], 3, 3, 3)
    assert " of another shape (" in message_with(downsamples__0__conv1__conv__weight=wide)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ModelError, match=r"without the kernels input_block\.conv1\.conv\.weight, .* and 3 more;"):
        load_network(path)
    assert len(PUBLISHED_FILTERS) == len(FILTERS)


def test_scan_without_contrast() -> None:
    grid = Grid((8, 8, 8), np.eye(4))
    rare = np.zeros(grid.shape, np.float32)
    rare[0, 0, 0] = 1
    with pytest.raises(InputError, match=r"^flat\.nii\.gz: the percentiles 1 and 99 of its voxels are both 0, "):
        segmenter().encode(Volume(rare, grid, Source(Path("flat.nii.gz"))))
    with pytest.raises(InputError, match=r"^the scan: .*models\.vesselfm\.percentiles wider apart$"):
        segmenter().encode(Volume(rare, grid))


def test_is_asked_by_region_only() -> None:
    model = segmenter()
    with pytest.raises(TypeError, match="by region, not by ClickPrompt"):
        model.predict(model.encode(scan((9, 9, 9))), {1: ClickPrompt((1, 1, 1))})
    refused = with_overrides(Settings(), ["model=vesselfm", "prompt=click"])
    with pytest.raises(InputError, match="the model 'vesselfm' takes no prompt; leave the prompt at 'auto'"):
        prompt_kind(refused)
