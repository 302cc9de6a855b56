"""MedSAM2: the numbers of the original code, how scans are read and asked, and what is said when something is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special

import tiny_medsam2
from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError, MissingExtraError, ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.jobs.store import RunInputs, run_record
from atlassegfm.models import describe_model, load_model, medsam2
from atlassegfm.models.medsam2 import MedSam2Encoding, MedSam2Segmenter, to_frame
from atlassegfm.models.medsam2 import network as network_module
from atlassegfm.models.medsam2.network import FeatureCache, PointPrompt, SlicePrompt, load_network
from atlassegfm.models.slices import VIEWS, choose_view, is_hounsfield, to_8_bits
from atlassegfm.prompts import BoxPrompt, ClickPrompt, MaskPrompt, Prompt, RegionPrompt
from atlassegfm.segment import segment
from atlassegfm.settings import MedSam2Settings, ModelSettings, Settings
from conftest import ORIENTATIONS
from scenes import ATLAS, PAPER_GATE, QUERY, STRUCTURES, UNREGISTERED, straight_grid

pytest.importorskip("transformers")
pytest.importorskip("PIL")

SHAPE = (30, 36, 9)
SPACING_MM = (1.5, 1.5, 4.0)
#: Where the bright block of the scan is, off the middle along every axis.
BLOCK = (slice(5, 17), slice(14, 30), slice(2, 7))
CLICK = ClickPrompt((11, 22, 4), slices=(2, 7))
BOX = BoxPrompt((5, 14, 4), (17, 30, 5), slices=(2, 7))


def block(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float32]:
    mask = np.zeros(shape, np.float32)
    mask[BLOCK] = 1
    return mask


def scan(data: NDArray[Any] | None = None, spacing_mm: tuple[float, float, float] = SPACING_MM) -> Volume:
    if data is None:
        data = np.random.default_rng(0).normal(100, 20, SHAPE) + 120 * block()
    return Volume(data.astype(np.float32), Grid(data.shape, np.diag([*spacing_mm, 1.0])))


MASK = MaskPrompt(LocalMap.from_full(block()))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_medsam2.make_checkpoint(tmp_path_factory.mktemp("medsam2") / "MedSAM2_latest.pt")


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> MedSam2Segmenter:
    return MedSam2Segmenter(load_network(checkpoint, CPU), MedSam2Settings())


def with_settings(model: MedSam2Segmenter, **settings: Any) -> MedSam2Segmenter:
    return dataclasses.replace(model, settings=MedSam2Settings(**settings))


def answer(model: MedSam2Segmenter, image: Volume, prompt: Prompt) -> LocalMap:
    return model.predict(model.encode(image), {7: prompt})[7]


# The original code's numbers.


@pytest.fixture(scope="module")
def parity_folder(data_dir: Path) -> Path:
    for folder in (data_dir.parent / "fixtures" / "medsam2_tiny", data_dir / "fixtures" / "medsam2_tiny"):
        if (folder / "case.npz").is_file():
            return folder
    pytest.skip(f"no logits of the original code: {data_dir.parent} has no fixtures/medsam2_tiny")


@pytest.fixture(scope="module")
def case(parity_folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(parity_folder / "case.npz") as content:
        return dict(content)


@pytest.fixture(scope="module")
def parity_model(parity_folder: Path) -> MedSam2Segmenter:
    return MedSam2Segmenter(load_network(parity_folder / "checkpoint.pt", CPU), MedSam2Settings(margin_mm=100))


def encoding(slices: NDArray[np.uint8]) -> MedSam2Encoding:
    return MedSam2Encoding(slices, VIEWS["axial"], Grid(slices.shape[::-1], np.eye(4)), FeatureCache(10**9))


def parity_prompts(case: dict[str, NDArray[Any]]) -> dict[str, PointPrompt | SlicePrompt]:
    mid = int(case["mid"])
    return {
        "box": PointPrompt(mid, case["box"].reshape(2, 2), (2, 3)),
        "point": PointPrompt(mid, case["point"].reshape(1, 2), (1,)),
        "mask": SlicePrompt(mid, case["mask"] > 0),
    }


def test_slice_becomes_the_original_codes_input(case: dict[str, NDArray[Any]]) -> None:
    frame = to_frame(case["volume"][int(case["mid"])], 128)
    np.testing.assert_allclose(frame.numpy(), case["frame_mid"], atol=1e-6)


@pytest.mark.parametrize("kind", ["box", "point", "mask"])
def test_logits_are_those_of_the_original_code(
    parity_model: MedSam2Segmenter, case: dict[str, NDArray[Any]], kind: str
) -> None:
    wanted = case[f"logits_{kind}"]
    found = np.full_like(wanted, np.nan)
    for index, logits in parity_model.logits(encoding(case["volume"]), parity_prompts(case)[kind], (0, 9)):
        assert np.isnan(found[index]).all()  # each slice once
        found[index] = logits
    assert np.abs(found - wanted).max() < 0.05
    assert ((found > 0) == (wanted > 0)).mean() >= 0.9999


@pytest.mark.parametrize("kind", ["box", "point", "mask"])
def test_answers_are_those_of_the_original_code(
    parity_model: MedSam2Segmenter, case: dict[str, NDArray[Any]], kind: str
) -> None:
    encoded = encoding(case["volume"])
    mid, (_, rows, columns) = int(case["mid"]), case["volume"].shape
    # As the original code sees a file in LPS order: i runs against the columns, j against the rows.
    x0, y0, x1, y1 = (int(n) for n in case["box"])
    x, y = (int(n) for n in case["point"])
    mask = np.zeros(encoded.grid.shape, np.float32)
    mask[:, :, mid] = case["mask"].T[::-1, ::-1]
    prompt: Prompt = {
        "box": BoxPrompt((columns - 1 - x1, rows - 1 - y1, mid), (columns - x0, rows - y0, mid + 1), (0, 9)),
        "point": ClickPrompt((columns - 1 - x, rows - 1 - y, mid), (0, 9)),
        "mask": MaskPrompt(LocalMap.from_full(mask)),
    }[kind]
    found = parity_model.predict(encoded, {1: prompt})[1].to_full(encoded.grid.shape)
    wanted = special.expit(case[f"logits_{kind}"]).transpose(2, 1, 0)[::-1, ::-1]
    assert np.abs(found - wanted).max() < 0.0125  # a quarter of the logits' tolerance


@pytest.mark.parametrize("name", ["_single_frame_forward", "_use_mask_as_output"])
def test_each_correction_matters(
    parity_model: MedSam2Segmenter, case: dict[str, NDArray[Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind = type(parity_model.network.model)
    monkeypatch.setattr(kind, name, getattr(kind.__base__, name))
    worst = max(
        np.abs(logits - case["logits_mask"][index]).max()
        for index, logits in parity_model.logits(encoding(case["volume"]), parity_prompts(case)["mask"], (0, 9))
    )
    assert worst > 0.2


# The weights.


def test_weights_of_full_size_all_find_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    built = tiny_medsam2.build(network_module.PUBLISHED_CONFIG)
    original = tiny_medsam2.original_layout(built.state_dict())
    assert len(original) == 471
    assert sum(tensor.numel() for tensor in original.values()) == 38_962_754
    assert original["image_encoder.trunk.patch_embed.proj.weight"].shape == (96, 3, 7, 7)
    monkeypatch.setattr(network_module, "load_state", lambda *_, **__: {"model": original})
    network = load_network(Path("nowhere") / "MedSAM2_latest.pt", CPU)
    assert network.image_size == 512
    loaded = network.model.state_dict()
    for name, tensor in built.state_dict().items():
        if name != "shared_image_embedding.positional_embedding":
            assert torch.equal(loaded[name], tensor), name
    # transformers initialises its two copies of one tensor apart; a checkpoint has one.
    shared = loaded["prompt_encoder.shared_embedding.positional_embedding"]
    assert torch.equal(loaded["shared_image_embedding.positional_embedding"], shared)


def test_names_are_those_of_the_original_code(parity_folder: Path) -> None:
    config = json.loads((parity_folder / "config.json").read_text(encoding="utf-8"))["transformers"]
    mine = tiny_medsam2.original_layout(tiny_medsam2.build(config).state_dict())
    theirs = torch.load(parity_folder / "checkpoint.pt", weights_only=True)["model"]
    assert {name: tensor.shape for name, tensor in mine.items()} == {n: tensor.shape for n, tensor in theirs.items()}


def test_half_precision_weights_become_single(tmp_path: Path, checkpoint: Path, tiny: MedSam2Segmenter) -> None:
    (tmp_path / "config.json").write_bytes(checkpoint.with_name("config.json").read_bytes())
    half = {name: tensor.half() for name, tensor in tiny_medsam2.make_weights().items()}
    torch.save({"model": half}, tmp_path / "half.pt")
    loaded = load_network(tmp_path / "half.pt", CPU).model.state_dict()
    for name, tensor in tiny.network.model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.half().float()), name


def test_loading_leaves_the_random_numbers_alone(checkpoint: Path) -> None:
    before = torch.random.get_rng_state()
    load_network(checkpoint, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_is_in_the_table_of_models(checkpoint: Path) -> None:
    row = describe_model("medsam2")
    assert row.prompts == ("click", "mask", "box")
    settings = ModelSettings(medsam2=MedSam2Settings(window_width=300))
    # The folder does as well as the file.
    for path in (checkpoint, checkpoint.parent):
        model = load_model("medsam2", "cpu", settings, path)
        assert isinstance(model, MedSam2Segmenter)
        assert model.settings.window_width == 300


def test_says_where_its_numbers_come_from(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    assert load_model("medsam2", "cpu", path=checkpoint).provenance == {
        "weights": {
            "file": "MedSAM2_latest.pt",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        "transformers_version": version("transformers"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "is no file of PyTorch"),
        ({"state_dict": {}}, "holds state_dict and no 'model'"),
        ([1, 2], "holds one list and no 'model'"),
        ({"model": {"a": 1}}, "holds a as 'model', not weights by name alone"),
        ({"model": {}}, "holds nothing as 'model', not weights by name alone"),
        (
            {"model": {"a": torch.zeros(1)}},
            r"holds weights of another network: 469 missing \(no_memory_embedding, .* and 466 more\); 1 unknown \(a\)",
        ),
    ],
)
def test_file_that_is_no_checkpoint(tmp_path: Path, checkpoint: Path, content: Any, message: str) -> None:
    path = tmp_path / "broken.pt"
    (tmp_path / "config.json").write_bytes(checkpoint.with_name("config.json").read_bytes())
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    wanted = r"expected the weights of the model 'medsam2' \(MedSAM2_latest\.pt\)"
    with pytest.raises(ModelError, match=rf"^{path}: {message}.*; {wanted}") as caught:
        load_model("medsam2", "cpu", path=path)
    assert "\n" not in str(caught.value)


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    weights = tiny_medsam2.make_weights()
    weights["image_encoder.trunk.extra"] = torch.zeros(1)
    del weights["no_mem_embed"]
    torch.save({"model": weights}, tmp_path / "other.pt")
    # Another program's file beside it does not count: the published size is expected.
    (tmp_path / "config.json").write_text('{"transformers_version": "4.5"}', encoding="utf-8")
    with pytest.raises(ModelError, match="Efficient-MedSAM2 is another network$") as caught:
        load_network(tmp_path / "other.pt", CPU)
    message = str(caught.value)
    assert "; 1 unknown (vision_encoder.backbone.extra); " in message
    assert " of another shape (no_memory_positional_encoding is 1 x 1 x 128 instead of 1 x 1 x 256, " in message


def test_architecture_that_cannot_be_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "tiny.pt")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json: not readable as JSON"):
        load_network(tmp_path / "tiny.pt", CPU)
    wrong = {"transformers": tiny_medsam2.CONFIG | {"vision_config": {"model_type": "unheard-of"}}}
    (tmp_path / "config.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot build the network of the model 'medsam2'"):
        load_network(tmp_path / "tiny.pt", CPU)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    wanted = r"expected the weights of the model 'medsam2' \(MedSAM2_latest\.pt of wanglab/MedSAM2\)"
    with pytest.raises(InputError, match=rf"/gone\.pt: no such file or folder; {wanted}"):
        load_model("medsam2", "cpu", path=tmp_path / "gone.pt")
    (tmp_path / "another.pt").touch()
    with pytest.raises(InputError, match=rf"^{tmp_path}: has no MedSAM2_latest\.pt; {wanted}: name the file itself"):
        load_model("medsam2", "cpu", path=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu_is_an_error_of_the_model(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="no CUDA GPU"):
        load_model("medsam2", "cuda", path=checkpoint)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu(checkpoint: Path, tiny: MedSam2Segmenter) -> None:
    model = load_model("medsam2", "cuda", path=checkpoint)
    found = model.predict(model.encode(scan()), {1: MASK})[1].to_full(SHAPE)
    # bfloat16 has 8 bits, and the network's answer depends on its own answers for other slices.
    assert ((found >= 0.5) == (answer(tiny, scan(), MASK).to_full(SHAPE) >= 0.5)).mean() > 0.97


# What it is built on.


@pytest.mark.parametrize("name", ["transformers", "PIL"])
def test_missing_extra(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    # Also where the weights are missing, too: packages are installed first.
    for path in (checkpoint, checkpoint.with_name("gone.pt")):
        with pytest.raises(MissingExtraError, match="the model 'medsam2' needs the extra 'medsam2'"):
            load_model("medsam2", "cpu", path=path)


def modeling() -> Any:
    with network_module.broken_torchvision_hidden():
        return importlib.import_module("transformers.models.sam2_video.modeling_sam2_video")


def test_transformers_without_the_network(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, modeling().__name__, None)
    with pytest.raises(ModelError, match=r"gives no Sam2VideoModel .* needs transformers 4\.56 or newer, below 6"):
        load_network(checkpoint, CPU)


@pytest.mark.parametrize("name", ["_single_frame_forward", "_use_mask_as_output"])
def test_transformers_that_was_changed_inside(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = modeling()
    with monkeypatch.context() as patch:
        patch.delattr(module.Sam2VideoModel, name)
        with pytest.raises(ModelError, match=rf"has another Sam2VideoModel\.{name} .* needs transformers 4\.56"):
            load_network(checkpoint, CPU)
    monkeypatch.setattr(module.Sam2VideoModel, name, lambda *_: None)
    with pytest.raises(ModelError, match=rf"has another Sam2VideoModel\.{name}"):
        load_network(checkpoint, CPU)


@pytest.mark.parametrize("session", [object, type("Session", (), {"__init__": lambda *_, **__: None})])
def test_transformers_with_other_sessions(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, session: type) -> None:
    monkeypatch.setattr(modeling(), "Sam2VideoInferenceSession", session)
    with pytest.raises(ModelError, match=r"another Sam2VideoInferenceSession .* processed_frames, cache"):
        load_network(checkpoint, CPU)


def test_broken_torchvision_is_hidden_only_while_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling()  # transformers has to be loaded
    import transformers

    places = (transformers.utils, transformers.utils.import_utils)
    before = [place.is_torchvision_available for place in places]
    monkeypatch.setattr(network_module, "_torchvision_is_sound", lambda: False)

    def fail_within() -> None:
        with network_module.broken_torchvision_hidden():
            assert [place.is_torchvision_available() for place in places] == [False, False]
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert [place.is_torchvision_available for place in places] == before


def test_works_beside_a_broken_torchvision(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken, encoding="utf-8")
    information = tmp_path / "torchvision-0.28.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n", "utf-8")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from atlassegfm.models import load_model
model = load_model("medsam2", "cpu", path=Path({str(checkpoint)!r}))
from transformers.utils import import_utils
print(model.network.image_size, import_utils.is_torchvision_available())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # transformers itself still believes in it, as before.
    assert done.stdout.split() == ["64", "True"]
    # Nothing of transformers or torchvision; the tiny weights are not the published ones.
    assert done.stderr.splitlines() == [
        f"{checkpoint}: is not the published file of the model 'medsam2'; taken for weights of your own"
    ]


# How scans are read.


def in_8_bits(values: NDArray[np.float32], **settings: Any) -> NDArray[np.uint8]:
    return to_8_bits(values, MedSam2Settings(**settings), "the scan", "medsam2")


def test_window_of_a_ct_by_hand() -> None:
    values = np.array([-1000, -161, -160, -159, 40, 239, 240, 3000], np.float32).reshape(1, 2, 4)
    # 256 levels over 400 HU, decimals dropped: (-159 + 160) / 400 * 255 = 0.6; 200 / 400 * 255 = 127.5.
    assert in_8_bits(values).ravel().tolist() == [0, 0, 0, 0, 127, 254, 255, 255]
    brain = in_8_bits(values, window_level=40, window_width=80)
    assert brain.ravel().tolist() == [0, 0, 0, 0, 127, 255, 255, 255]


def test_window_that_the_scan_does_not_fill() -> None:
    values = np.array([0, 50, 100], np.float32).reshape(1, 1, 3)
    # What is left after the cut is stretched, as in the published code: 0 to 100, not -160 to 240.
    assert in_8_bits(values, modality="ct").ravel().tolist() == [0, 127, 255]


def test_percentiles_of_what_is_above_0() -> None:
    values = np.concatenate([np.zeros(600), np.arange(1, 402), [-5, 1e6]]).astype(np.float32).reshape(1, 1, -1)
    low, high = np.percentile(np.r_[np.arange(1, 402), 1e6], [0.5, 99.5])
    found = in_8_bits(values).ravel()
    assert (found[:600] == 0).all()
    assert found[-1] == 255
    assert found[-2] == 0
    expected = np.floor((np.clip(np.arange(1, 402), low, high) - low) / (high - low) * 255)
    np.testing.assert_array_equal(found[600:1001], expected)


def test_zeros_stay_dark_where_zero_is_not_the_darkest() -> None:
    values = np.array([0.0, 50, 60, 70, 80], np.float32).reshape(1, 1, 5)
    assert in_8_bits(values).ravel()[0] == 0
    # Without any value above 0 all values count, and 0 is one like others.
    below = in_8_bits(values - 80).ravel()
    assert below[0] == 0
    assert below[-1] == 255


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(-1024, 1500, True), (-3024, 250, True), (-499, 1500, False), (0, 255, False), (-4, 9, False), (-900, 60, False)],
)
def test_hounsfield_units_are_told_by_their_range(least: float, most: float, expected: bool) -> None:
    values = np.linspace(least, most, 24, dtype=np.float32).reshape(2, 3, 4)
    assert is_hounsfield(values) is expected
    as_ct, by_itself = (in_8_bits(values, modality=m) for m in ("ct", "auto"))
    assert (as_ct == by_itself).all() == expected
    assert (in_8_bits(values, modality="mr") == by_itself).all() != expected


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (
            np.linspace(600, 900, 24).reshape(2, 3, 4),
            {"modality": "ct"},
            "^the scan: has no contrast from -160 ",
        ),
        (np.eye(200)[None] * 5, {}, r"no contrast from 5 to 5, .* set models\.medsam2\.modality"),
    ],
)
def test_scan_without_contrast(
    tiny: MedSam2Segmenter, values: NDArray[np.float64], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        with_settings(tiny, **settings).encode(scan(values))


@pytest.mark.parametrize(
    ("spacing_mm", "expected"),
    [
        ((1.0, 1.0, 1.0), "axial"),
        ((1.0, 1.0, 3.0), "axial"),
        ((4.0, 1.0, 1.0), "sagittal"),
        ((1.0, 1.5, 1.0), "coronal"),
        ((1.0, 1.49, 1.0), "axial"),
        ((3.0, 3.0, 1.0), "axial"),
    ],
)
def test_slices_lie_across_the_coarse_axis(spacing_mm: tuple[float, float, float], expected: str) -> None:
    grid = Grid((4, 5, 6), np.diag([*spacing_mm, 1.0]))
    assert choose_view(grid, "auto") is VIEWS[expected]
    for name in VIEWS:
        assert choose_view(grid, name) is VIEWS[name]


def test_slices_are_shown_as_in_a_usual_file(tiny: MedSam2Segmenter) -> None:
    data = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    axial, coronal, sagittal = (VIEWS[name].frames(data) for name in ("axial", "coronal", "sagittal"))
    # The first row and column: in front and on the right; above and on the right; above and in front.
    assert axial[2, 0, 0] == data[3, 4, 2]
    assert axial[2, 3, 1] == data[2, 1, 2]
    assert coronal[2, 0, 0] == data[3, 2, 5]
    assert coronal[2, 3, 1] == data[2, 2, 2]
    assert sagittal[2, 0, 0] == data[2, 4, 5]
    assert sagittal[2, 3, 1] == data[2, 3, 2]
    for view in VIEWS.values():
        np.testing.assert_array_equal(view.volume(view.frames(data)), data)
    # SimpleITK's array of a file in LPS order, as the published code reads it.
    lps = data[::-1, ::-1]
    np.testing.assert_array_equal(axial, lps.transpose(2, 1, 0))


# How it is asked.


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_click_points_at_its_voxel(tiny: MedSam2Segmenter, view: Any) -> None:
    image = scan()
    encoded = with_settings(tiny, slice_axis=view.name).encode(image)
    asked = medsam2._on_slice(ClickPrompt((11, 22, 4)), encoded)
    assert isinstance(asked, PointPrompt)
    assert asked.kinds == (1,)
    ((x, y),) = asked.xy.astype(int)
    assert view.frames(image.data)[asked.index, y, x] == image.data[11, 22, 4]


def test_box_lies_around_its_voxels(tiny: MedSam2Segmenter) -> None:
    image = scan()
    asked = medsam2._on_slice(BOX, tiny.encode(image))
    assert isinstance(asked, PointPrompt)
    assert asked.kinds == (2, 3)
    (x0, y0), (x1, y1) = asked.xy.astype(int)
    shown = VIEWS["axial"].frames(image.data)[asked.index, y0 : y1 + 1, x0 : x1 + 1]
    np.testing.assert_array_equal(shown, image.data[5:17, 14:30, 4].T[::-1, ::-1])


@pytest.mark.parametrize("name", VIEWS)
def test_mask_comes_back_where_it_was_given(tiny: MedSam2Segmenter, name: str) -> None:
    model = with_settings(tiny, slice_axis=name)
    found = answer(model, scan(), MASK).to_full(SHAPE)
    middle: list[slice] = [slice(None)] * 3
    across = VIEWS[name].across
    index = (BLOCK[across].start + BLOCK[across].stop - 1) // 2
    middle[across] = slice(index, index + 1)
    given, back = block()[tuple(middle)] > 0, found[tuple(middle)] >= 0.5
    # It is kept at a quarter of the network's 64 pixels.
    assert 2 * (given & back).sum() / (given.sum() + back.sum()) > 0.85


def test_mask_is_given_on_the_middle_slice_of_its_largest_part(tiny: MedSam2Segmenter) -> None:
    mask = block()
    mask[25:28, 3:6, 8] = 1
    mask[25:28, 3:6, 4] = 1
    encoded = tiny.encode(scan())
    asked = medsam2._on_slice(MaskPrompt(LocalMap.from_full(mask)), encoded)
    assert isinstance(asked, SlicePrompt)
    assert asked.index == 4
    # All that the structure has on that slice is given.
    np.testing.assert_array_equal(asked.mask, VIEWS["axial"].frames(mask)[4] > 0)


def test_pixel_on_a_slice_larger_than_the_input_is_not_lost(tiny: MedSam2Segmenter) -> None:
    mask = np.zeros((150, 140), bool)
    mask[50, 60] = True
    session = tiny.network.session(inference_device="cpu", dtype=torch.float32)
    tiny.network._give(session, SlicePrompt(1, mask), mask.shape, 0)
    given = session.mask_inputs_per_obj[0][1][0, 0]
    # 50 / 150 and 60 / 140 of 64 pixels.
    assert given.nonzero().tolist() == [[21, 27]]


def stored(volume: Volume, order: tuple[int, int, int], flipped: tuple[int, ...]) -> Volume:
    """The same voxels in another array order."""
    data, affine = volume.data.transpose(order), volume.grid.affine[:, [*order, 3]]
    for axis in flipped:
        data = np.flip(data, axis)
        affine[:, 3] += affine[:, axis] * (data.shape[axis] - 1)
        affine[:, axis] *= -1
    return Volume(data, Grid(data.shape, affine))


@pytest.mark.parametrize("prompt", [CLICK, BOX, MASK], ids=["click", "box", "mask"])
@pytest.mark.parametrize(
    ("order", "flipped"), [((0, 1, 2), (0, 1)), ((0, 1, 2), (0,)), ((2, 0, 1), (1,)), ((1, 2, 0), (0, 1, 2))]
)
def test_order_of_storage_does_not_matter(
    tiny: MedSam2Segmenter, order: tuple[int, int, int], flipped: tuple[int, ...], prompt: Prompt
) -> None:
    image = Volume(scan().data, Grid(SHAPE, ORIENTATIONS["oblique"]))
    other = stored(image, order, flipped)
    assert other.grid.axis_codes != "RAS"
    one, two = answer(tiny, image, prompt), answer(tiny, other.canonical(), prompt)
    assert not one.is_empty
    assert one.start == two.start
    np.testing.assert_array_equal(one.values, two.values)


def test_the_patient_is_not_mirrored(tiny: MedSam2Segmenter) -> None:
    # A network is not symmetric: a scan and its mirror image give different answers, so that an adapter that took
    # left for right would be caught by the numbers of the original code above.
    mirrored = MaskPrompt(LocalMap.from_full(block()[::-1]))
    straight = answer(tiny, scan(), MASK).to_full(SHAPE)
    other = answer(tiny, scan(scan().data[::-1]), mirrored).to_full(SHAPE)[::-1]
    assert np.abs(straight - other).max() > 0.1


@pytest.mark.parametrize("prompt", [CLICK, BOX, MASK], ids=["click", "box", "mask"])
def test_result_is_a_probability_and_the_same_again(tiny: MedSam2Segmenter, prompt: Prompt) -> None:
    image = scan()
    data = image.data.copy()
    one, two = answer(tiny, image, prompt), answer(tiny, image, prompt)
    assert one.values.dtype == np.float32
    assert one.values.flags.c_contiguous
    assert 0 <= one.values.min() <= one.values.max() <= 1
    assert one.values.max() > 0.5
    assert one.start == two.start
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(image.data, data)


def test_window_changes_what_is_seen(tiny: MedSam2Segmenter) -> None:
    image = scan(scan().data * 8 - 1000)
    soft, lung = (
        answer(with_settings(tiny, window_level=level, window_width=width), image, MASK).to_full(SHAPE)
        for level, width in ((40, 400), (-600, 1500))
    )
    assert np.abs(soft - lung).max() > 0.1


@pytest.mark.parametrize(
    "prompt",
    [
        MaskPrompt(LocalMap.empty()),
        MaskPrompt(LocalMap((3, 3, 3), np.full((2, 2, 2), 0.4, np.float32))),
        MaskPrompt(LocalMap((50, 3, 3), np.ones((4, 4, 4), np.float32))),
        MaskPrompt(LocalMap((-9, 3, 3), np.ones((4, 4, 4), np.float32))),
        ClickPrompt((30, 3, 3)),
        ClickPrompt((3, -1, 3)),
        ClickPrompt((3, 3, 9), slices=(0, 9)),
        BoxPrompt((50, 0, 3), (60, 9, 4)),
        BoxPrompt((5, 5, 3), (5, 9, 4)),
        BoxPrompt((5, 5, 9), (8, 9, 10)),
    ],
)
def test_prompt_that_points_at_nothing(tiny: MedSam2Segmenter, prompt: Prompt) -> None:
    assert answer(tiny, scan(), prompt).is_empty


@pytest.mark.parametrize(
    "prompt",
    [
        ClickPrompt((0, 0, 0)),
        ClickPrompt((29, 35, 8), slices=(7, 12)),
        ClickPrompt((29, 35, 8), slices=(0, 2)),
        BoxPrompt((-10, -10, 0), (60, 60, 1), slices=(-3, 2)),
        MaskPrompt(LocalMap((-2, 30, -1), np.ones((9, 9, 3), np.float32))),
        MaskPrompt(LocalMap((0, 0, 0), np.ones(SHAPE, np.float32))),
    ],
)
def test_prompt_at_the_border(tiny: MedSam2Segmenter, prompt: Prompt) -> None:
    found = answer(tiny, scan(), prompt)
    assert not found.is_empty
    assert np.isfinite(found.values).all()
    assert (np.array(found.start) >= 0).all()
    assert (np.array(found.stop) <= SHAPE).all()


@pytest.mark.parametrize("shape", [(12, 9, 1), (1, 14, 2), (2, 1, 1)])
def test_thin_volumes(tiny: MedSam2Segmenter, shape: tuple[int, int, int]) -> None:
    data = np.random.default_rng(0).normal(100, 9, shape)
    middle = (shape[0] // 2, shape[1] // 2, shape[2] // 2)
    mask = np.zeros(shape, np.float32)
    mask[middle] = 1
    stop = (middle[0] + 1, middle[1] + 1, middle[2] + 1)
    for prompt in (MaskPrompt(LocalMap.from_full(mask)), ClickPrompt(middle), BoxPrompt(middle, stop)):
        assert np.isfinite(answer(tiny, scan(data), prompt).values).all()


def test_all_prompts_of_a_scan_are_answered_and_told_of(tiny: MedSam2Segmenter) -> None:
    told: list[int] = []
    maps = tiny.predict(tiny.encode(scan()), {3: CLICK, 1: MASK}, told.append)
    assert list(maps) == told == [3, 1]
    np.testing.assert_array_equal(maps[1].values, answer(tiny, scan(), MASK).values)


def test_prompts_that_it_cannot_take(tiny: MedSam2Segmenter) -> None:
    with pytest.raises(InputError, match="'box' lies on axial slices of this scan, .* reads coronal ones"):
        answer(tiny, scan(spacing_mm=(1, 3, 1)), BOX)
    with pytest.raises(TypeError, match="by click, mask or box, not by RegionPrompt"):
        answer(tiny, scan(), RegionPrompt(MASK.probability))


def test_whole_job(tiny: MedSam2Segmenter, checkpoint: Path) -> None:
    atlas = Atlas.from_volumes(ATLAS.scan(straight_grid()), ATLAS.labels(straight_grid()), STRUCTURES)
    settings = with_overrides(
        Settings(),
        [*UNREGISTERED, *PAPER_GATE, "model=medsam2", "models.medsam2.margin_mm=0", f"model_path={checkpoint}"],
    )
    query = QUERY.scan(straight_grid())
    result = segment(Context(atlas, settings), query, device="cpu")
    assert result.labels.grid.matches(query.grid)
    assert result.prompt == "click"
    assert result.model_labels is not None
    assert result.model_labels.data.any()
    summary = run_record(result, RunInputs(Context(atlas), query)).model.model_dump()
    assert summary["provenance"]["weights"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert summary["weights_licence"].startswith("CC-BY-SA-4.0")


# How far it looks, and what that costs.


@pytest.mark.parametrize(
    ("prompt", "settings", "first", "last"),
    [
        (ClickPrompt((11, 22, 4), slices=(3, 5)), {"margin_mm": 4}, 2, 6),
        (ClickPrompt((11, 22, 4), slices=(3, 5)), {"margin_mm": 4.1}, 1, 7),
        (ClickPrompt((11, 22, 4), slices=(3, 5)), {"margin_mm": 0}, 2, 6),
        (ClickPrompt((11, 22, 8), slices=(3, 5)), {"margin_mm": 4}, 2, 9),
        (ClickPrompt((11, 22, 4)), {"reach_mm": 8}, 2, 7),
        (BoxPrompt((5, 14, 4), (17, 30, 5)), {"reach_mm": 4, "margin_mm": 99}, 3, 6),
        (MASK, {"margin_mm": 4, "reach_mm": 99}, 1, 8),
        (MASK, {}, 0, 9),
    ],
)
def test_slices_that_are_looked_at(
    tiny: MedSam2Segmenter, prompt: Prompt, settings: dict[str, Any], first: int, last: int
) -> None:
    model = with_settings(tiny, **settings)
    encoded = model.encode(scan())
    found = model.predict(encoded, {1: prompt})[1]
    assert encoded.features.encoded == len(encoded.features) == last - first
    assert [encoded.features.get(index) is not None for index in range(9)] == [first <= n < last for n in range(9)]
    assert first <= found.start[2] < found.stop[2] <= last


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> MedSam2Segmenter:
    """A network that never sees its object."""
    path = tiny_medsam2.make_checkpoint(tmp_path_factory.mktemp("blind") / "blind.pt")
    weights = torch.load(path, weights_only=True)["model"]
    weights["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] -= 30
    torch.save({"model": weights}, path)
    return MedSam2Segmenter(load_network(path, CPU), MedSam2Settings())


def test_nothing_found_is_an_empty_map(blind: MedSam2Segmenter) -> None:
    assert answer(blind, scan(), CLICK).is_empty


def test_search_ends_after_empty_slices(blind: MedSam2Segmenter) -> None:
    data = np.random.default_rng(0).normal(100, 20, (12, 10, 30))
    for slices, expected in ((None, {8, 9, 10, 11, 12}), ((4, 20), set(range(30)))):
        model = with_settings(blind, empty_slices=3, reach_mm=500, margin_mm=500)
        encoded = model.encode(scan(data))
        assert model.predict(encoded, {1: ClickPrompt((5, 5, 10), slices)})[1].is_empty
        # 10, 11, 12 up and 10, 9, 8 down; where the slices are known, all of them.
        assert {n for n in range(30) if encoded.features.get(n) is not None} == expected


def test_features_are_found_once_for_all_structures(tiny: MedSam2Segmenter) -> None:
    encoded = tiny.encode(scan())
    shared = tiny.predict(encoded, {1: CLICK, 2: MASK, 3: BOX})
    assert encoded.features.encoded == 9
    thrifty = with_settings(tiny, feature_cache_mb=0)
    again = thrifty.encode(scan())
    apart = thrifty.predict(again, {1: CLICK, 2: MASK, 3: BOX})
    assert len(again.features) == 1
    assert again.features.encoded == 3 * (5 + 5)  # the prompted slice is seen on both ways
    for number in (1, 2, 3):
        np.testing.assert_array_equal(shared[number].values, apart[number].values)


def test_cache_gives_up_what_was_not_used_for_longest() -> None:
    def features() -> dict[str, list[torch.Tensor]]:
        return {"vision_feats": [torch.zeros(100), torch.zeros(25)], "vision_pos_embeds": [torch.zeros(1)]}

    cache = FeatureCache(3 * 500)
    for index in (4, 5, 6):
        cache.put(index, features())
    assert cache.size_bytes == 1500
    assert cache.get(4) is not None
    cache.put(7, features())
    assert [index for index in range(9) if cache.get(index) is not None] == [4, 6, 7]
    assert cache.encoded == 4


@pytest.mark.parametrize("reverse", [False, True])
def test_long_ways_cost_no_more_memory_and_change_nothing(
    tiny: MedSam2Segmenter, monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    data = np.random.default_rng(0).normal(100, 20, (12, 10, 28))
    encoded = tiny.encode(scan(data))
    asked = PointPrompt(27 if reverse else 0, np.array([[5.0, 5.0]]), (1,))

    def run() -> list[NDArray[np.float32]]:
        way = tiny.network.track(
            asked, lambda n: to_frame(encoded.slices[n], 64), (10, 12), (0, 28), encoded.features, reverse=reverse
        )
        return [logits for _, logits in way]

    kept: list[dict[int, Any]] = []
    forget: Callable[..., None] = network_module.Network._forget

    def counted(self: Any, session: Any, index: int, *, reverse: bool) -> None:
        forget(self, session, index, reverse=reverse)
        kept.append(dict(session.output_dict_per_obj[0]["non_cond_frame_outputs"]))

    monkeypatch.setattr(network_module.Network, "_forget", counted)
    short = run()
    assert max(len(outputs) for outputs in kept) == 16
    assert all("high_res_masks" not in output for outputs in kept for output in outputs.values())
    monkeypatch.setattr(network_module.Network, "_forget", lambda *_, **__: None)
    np.testing.assert_array_equal(np.stack(short), np.stack(run()))
