"""In-context baselines: networks against slower ones and the public code, slices, weights, and ``benchmark icl``."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from atlassegfm.atlas import Atlas
from atlassegfm.benchmark import pairs
from atlassegfm.core.errors import InputError, ModelError
from atlassegfm.core.image import Volume
from atlassegfm.models import BASELINES, describe_model
from atlassegfm.models.incontext import Baseline, cross, seggpt, tyche, universeg
from atlassegfm.models.incontext.by_slices import SliceBaseline, nearest_slices, to_unit_range
from atlassegfm.models.incontext.cross import load_network, published_name
from conftest import Run
from scenes import ATLAS, QUICK_GATE, STRUCTURES, UNREGISTERED, straight_grid
from test_benchmark import write_dataset

FAST = [part for assignment in (*UNREGISTERED, *QUICK_GATE) for part in ("--set", assignment)]
CROSS = {"universeg": universeg, "tyche": tyche}
#: Weights of a small network, and pixels of its slices.
CHANNELS, SIZE = 4, 32


def waves(shape: tuple[int, ...], step: float) -> Tensor:
    """Numbers in [-1, 1] that are the same everywhere."""
    values = np.sin(np.arange(int(np.prod(shape)), dtype=np.float64) * step)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def published_weights(name: str, channels: int = CHANNELS) -> dict[str, Tensor]:
    """Made-up weights in the published format."""
    own = CROSS[name].build_network(channels).state_dict()
    shapes = {published_name(key): value.shape for key, value in own.items()}
    return {
        key: waves(tuple(shape), 1 + n / 7) * (0.8 if len(shape) > 1 else 0.1)
        for n, (key, shape) in enumerate(sorted(shapes.items()))
    }


def save(name: str, folder: Path, channels: int = CHANNELS) -> Path:
    path = folder / f"{name}.pt"
    torch.save(published_weights(name, channels), path)
    return path


def case(name: str) -> tuple[Tensor, Tensor]:
    """Targets and examples: one slice, or three candidates with noise."""
    support = torch.stack([waves((5, SIZE, SIZE), 0.23), (waves((5, SIZE, SIZE), 0.05) > 0.5).float()], 1)
    image = waves((1, SIZE, SIZE), 0.37)
    if name == "universeg":
        return image[None], support
    return torch.stack([image.expand(3, -1, -1), waves((3, SIZE, SIZE), 0.61)], 1), support


def loops(weights: dict[str, Tensor], target: Tensor, support: Tensor) -> Tensor:
    """The published networks pair by pair, as the papers draw them; candidates interact where there is a mean conv."""
    several = "enc_blocks.0.meanconv.vmapped.conv.weight" in weights

    def conv(images: list[Tensor], name: str, active: bool = True) -> list[Tensor]:
        kernel = weights[f"{name}.weight"]
        found = [
            functional.conv2d(one[None], kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)[0]
            for one in images
        ]
        return [torch.where(one > 0, one, 0.01 * one) for one in found] if active else found

    def block(targets: list[Tensor], examples: list[Tensor], name: str) -> tuple[list[Tensor], list[Tensor]]:
        middle = sum(targets[1:], targets[0]) / len(targets)
        both = [torch.cat([middle, one]) for one in examples]
        both = conv(both, f"{name}.cross.cross_conv", active=several)
        mean = sum(both[1:], both[0]) / len(both)
        targets = (
            conv([torch.cat([one, mean]) for one in targets], f"{name}.meanconv.vmapped.conv") if several else [mean]
        )
        return conv(targets, f"{name}.target.vmapped.conv"), conv(both, f"{name}.support.vmapped.conv")

    def wider(one: Tensor, skip: Tensor) -> Tensor:
        places = torch.arange(skip.shape[-1]) * (one.shape[-1] - 1) / (skip.shape[-1] - 1)
        low = places.floor().long().clip(max=one.shape[-1] - 2)
        part = places - low
        rows = one[:, low] * (1 - part)[:, None] + one[:, low + 1] * part[:, None]
        return torch.cat([rows[..., low] * (1 - part) + rows[..., low + 1] * part, skip])

    def halved(one: Tensor) -> Tensor:
        return one.unfold(1, 2, 2).unfold(2, 2, 2).amax(dim=(-1, -2))

    targets, examples, skips = list(target), list(support), []
    for n in range(4):
        targets, examples = block(targets, examples, f"enc_blocks.{n}")
        if n < 3:
            skips.append((targets, examples))
            targets, examples = [halved(one) for one in targets], [halved(one) for one in examples]
    for n in range(3):
        pair = zip((targets, examples), skips.pop(), strict=True)
        targets, examples = ([wider(one, skip) for one, skip in zip(now, then, strict=True)] for now, then in pair)
        targets, examples = block(targets, examples, f"dec_blocks.{n}")
    return torch.stack(conv(targets, "out_conv.conv", active=False))


@pytest.mark.parametrize("name", CROSS)
def test_network_is_the_published_one(name: str, tmp_path: Path) -> None:
    """Against loops, and against the public code: a column of its last logits, their mean and deviation."""
    network = load_network(CROSS[name].build_network, save(name, tmp_path), wanted="weights")
    target, support = case(name)
    with torch.inference_mode():
        logits = network(target, support)
    expected = loops(published_weights(name), target, support)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # JJGO/UniverSeg at 62de02e and mariannerakic/Tyche at 2ab2e75, PyTorch 2.13 on a CPU.
    column, mean, deviation = {
        "universeg": ([974.32959, 348.267731, 321.47818, 777.977051], 1520.089655, 2520.420383),
        "tyche": ([574.175049, 271.846069, 307.931, 257.999634], 211.429616, 1049.654478),
    }[name]
    np.testing.assert_allclose(logits[-1, 0, ::9, 13].numpy(), column, rtol=1e-4)
    assert [float(logits.double().mean()), float(logits.double().std())] == pytest.approx([mean, deviation], rel=1e-4)


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("universeg", 44, 1_182_785), ("tyche", 58, 1_774_785)])
def test_full_size_is_that_of_the_published_files(name: str, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        network = CROSS[name].build_network(cross.CHANNELS)
    assert len(network.state_dict()) == tensors
    assert sum(one.numel() for one in network.parameters()) == parameters


# Slices


def copies(image: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """A network that takes the mask of the example that looks most like the slice."""
    return labels[(images - image).abs().sum(dim=(1, 2)).argmin()]


def baseline(support: int = 3) -> SliceBaseline:
    return SliceBaseline(copies, 64, support, 0, torch.device("cpu"))


def scene(spacing_mm: tuple[float, float, float]) -> Atlas:
    shape = tuple(round(96 / step) for step in spacing_mm)
    grid = straight_grid((shape[0], shape[1], shape[2]), spacing_mm)
    return Atlas.from_volumes(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 5.0), (2.0, 6.0, 3.0), (6.0, 2.0, 2.0)])
def test_a_scan_segmented_from_itself_has_its_own_labels(spacing_mm: tuple[float, float, float]) -> None:
    """Whichever way slices lie, what a network draws comes back to its voxels; so do structures of other numbers."""
    atlas = scene(spacing_mm)
    found = baseline().predict(atlas, atlas.image)
    assert set(found) == {1, 2, 3}
    across = int(np.argmax(spacing_mm))
    # Elsewhere the network has no example without a structure.
    shown = atlas.numbered.data.any(axis=tuple(axis for axis in range(3) if axis != across)).nonzero()[0]
    for number, probability in found.items():
        inside = atlas.numbered.data.take(shown, across) == number
        answer = probability.to_full(atlas.image.grid.shape).take(shown, across) >= 0.5
        assert 2 * (inside & answer).sum() / (inside.sum() + answer.sum()) > 0.9, number


def test_slices_are_the_nearest_in_relative_position_of_those_with_labels() -> None:
    shown = np.array([0, 1, 1, 1, 0, 0, 1, 0], bool)
    assert nearest_slices(shown, 4, 2).tolist() == [[1, 2], [2, 3], [3, 6], [3, 6]]
    assert nearest_slices(shown, 1, 9).tolist() == [[1, 2, 3, 6]]


def test_a_structure_is_asked_for_only_where_an_example_shows_it() -> None:
    atlas, asked = scene((4.0, 4.0, 6.0)), []

    def network(image: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        asked.append(bool(labels.any()))
        return torch.ones_like(image)

    found = SliceBaseline(network, 32, 1, 0, torch.device("cpu")).predict(atlas, atlas.image)
    assert asked
    assert all(asked)
    nearest = nearest_slices(atlas.numbered.data.any(axis=(0, 1)), atlas.image.grid.shape[2], 1)
    for number, probability in found.items():
        there = (atlas.numbered.data == number).any(axis=(0, 1))[nearest[:, 0]]
        np.testing.assert_array_equal(probability.to_full(atlas.image.grid.shape).any(axis=(0, 1)), there)
    # A structure without a voxel, as of an atlas matched to another one.
    lacking = Volume(np.where(atlas.labels.data == 12, 0, atlas.labels.data), atlas.labels.grid)
    assert baseline().predict(Atlas(atlas.image, lacking, atlas.structures), atlas.image)[3].is_empty


def test_intensities_of_scans() -> None:
    ct = np.array([-1000, -500, 250, 1000, 3000], np.float32)
    np.testing.assert_allclose(to_unit_range(ct), [0, 0, 0.5, 1, 1])
    mr = np.concatenate([np.zeros(500), np.arange(1, 1002)]).astype(np.float32)
    scaled = to_unit_range(mr)
    assert scaled.min() == 0
    assert scaled.max() == 1
    assert scaled[500 + 500] == pytest.approx(0.5, abs=1e-3)
    # Two values only, one of them 0.
    np.testing.assert_allclose(to_unit_range(np.array([0, 5, 5], np.float32)), [0, 1, 1])


# Weights


def test_addresses_of_published_weights() -> None:
    published = BASELINES["universeg"].weights
    assert published is not None
    assert published.page == "https://github.com/JJGO/UniverSeg/releases/tag/weights"
    assert published.url_of(published.files[0]) == (
        "https://github.com/JJGO/UniverSeg/releases/download/weights/universeg_v1_nf64_ss64_STA.pt"
    )


@pytest.mark.parametrize("name", CROSS)
def test_weights_that_do_not_fit_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(name, tmp_path)
    assert Baseline(name, path).load("cpu").provenance["weights"]["file"] == f"{name}.pt"
    other = {"universeg": "tyche", "tyche": "universeg"}[name]
    for content, facts in (
        (path.read_bytes()[:-400], ["cut short or damaged"]),
        (b"", ["is empty"]),
        (save(other, tmp_path).read_bytes(), ["another network", "enc_blocks.0.cross.cross_conv.weight"]),
    ):
        (tmp_path / "wrong.pt").write_bytes(content)
        with pytest.raises(ModelError) as caught:
            Baseline(name, tmp_path / "wrong.pt").load("cpu")
        for fact in ("wrong.pt", f"the weights of the in-context baseline {name!r}", *facts):
            assert fact in str(caught.value)
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"run atlassegfm models fetch {name}, or put "):
        Baseline(name).load("cpu")
    with pytest.raises(InputError, match="licence of the weights"):
        Baseline(name, path).load("cpu")


def test_baselines_are_no_models() -> None:
    with pytest.raises(InputError, match="'tyche' is an in-context baseline, no model; .* --baselines tyche"):
        describe_model("tyche")
    with pytest.raises(InputError, match="unknown in-context baseline 'univeseg' \\(did you mean 'universeg'"):
        Baseline("univeseg").load("cpu")


# SegGPT


TINY_SEGGPT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": [64, 32],
    "patch_size": 8,
    "pretrain_image_size": 32,
    "decoder_hidden_size": 4,
    "merge_index": 1,
    "intermediate_hidden_state_indices": [1, 2, 3],
}


@pytest.fixture(scope="module")
def tiny_seggpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers publishes it, with random weights."""
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    from atlassegfm.models.medsam2.network import broken_torchvision_hidden

    with warnings.catch_warnings(), broken_torchvision_hidden():
        from transformers import SegGptConfig, SegGptForImageSegmentation
    folder = tmp_path_factory.mktemp("seggpt")
    (folder / seggpt.CONFIG_FILE).write_text(json.dumps({"model_type": "seggpt", **TINY_SEGGPT}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = SegGptForImageSegmentation(SegGptConfig(**TINY_SEGGPT))
        for one in network.parameters():
            torch.nn.init.normal_(one, std=0.2)
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def test_seggpt_paints_what_its_published_processor_would(tiny_seggpt: Path) -> None:
    """Pictures prepared, and answers read, by transformers' own image processor; its answer has 8 bits of decimals."""
    try:
        from transformers.models.seggpt.image_processing_pil_seggpt import SegGptImageProcessorPil
    except ImportError:  # before 5.0
        from transformers import SegGptImageProcessor as SegGptImageProcessorPil

    made = Baseline("seggpt", tiny_seggpt).load("cpu")
    image, example = (((waves((32, 32), step) + 1) * 127.5).round() for step in (0.37, 0.23))
    mask = (waves((32, 32), 0.05) > 0.5).float()
    processor = SegGptImageProcessorPil(size={"height": 32, "width": 32})
    pictures = [np.repeat(one.numpy()[..., None], 3, -1).astype(np.uint8) for one in (image, example)]
    given = processor(
        images=pictures[0],
        prompt_images=pictures[1],
        prompt_masks=(mask * 255).numpy().astype(np.uint8),
        return_tensors="pt",
    )
    with torch.inference_mode():
        outputs = made.network.network(**given)
        answer = made.network(image / 255, example[None] / 255, mask[None])
        twice = made.network(image / 255, example[None].expand(2, -1, -1) / 255, mask[None].expand(2, -1, -1))
    expected = processor.post_process_semantic_segmentation(outputs)[0]
    assert 0.02 < float(answer.mean()) < 0.98
    torch.testing.assert_close(answer, expected.reshape(answer.shape).float() / 255, rtol=0, atol=1 / 255)
    torch.testing.assert_close(twice, answer, rtol=0, atol=1e-4)


def test_seggpt_refuses_other_files(tiny_seggpt: Path, tmp_path: Path) -> None:
    content = (tiny_seggpt / "model.safetensors").read_bytes()
    for wrong, config, fact in (
        (content[: len(content) // 2], TINY_SEGGPT, "cut short or damaged"),
        (content, TINY_SEGGPT | {"decoder_hidden_size": 8}, "another network"),
        (content, TINY_SEGGPT | {"merge_index": 9}, "cannot build the network"),
    ):
        (tmp_path / "model.safetensors").write_bytes(wrong)
        (tmp_path / seggpt.CONFIG_FILE).write_text(json.dumps(config))
        with pytest.raises(ModelError, match=fact):
            Baseline("seggpt", tmp_path).load("cpu")
    (tmp_path / seggpt.CONFIG_FILE).write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        Baseline("seggpt", tmp_path).load("cpu")


# benchmark icl


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a dataset, and networks small enough for a test."""
    for module in CROSS.values():
        monkeypatch.setattr(module, "SLICE_SIZE", SIZE)
    monkeypatch.setattr(cross, "CHANNELS", CHANNELS)
    write_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: The atlas of the one pair lacks a structure.
ONE_PAIR = (
    "data",
    "--protocol",
    "one-to-all",
    "--cases",
    "case_1,case_4",
    "--atlas",
    "case_4",
    "--no-plots",
    "--quiet",
)


def test_benchmark_with_random_weights(data: Path, run: Run) -> None:
    names = [f"{name} (random weights)" for name in CROSS]
    asked = ("--baselines", "universeg,tyche", "--random-weights")
    outcome = run("benchmark", "icl", "-o", "out", *ONE_PAIR, *FAST, *asked)
    assert outcome.code == 0, outcome.err
    assert all(name in outcome.out for name in names)
    summary = json.loads((data / "out/summary.json").read_text())
    columns = [("AtlasSegFM", "atlas"), ("AtlasSegFM", "fused"), *((name, "in context") for name in names)]
    assert [(one["variant"], one["method"]) for one in summary["columns"]] == columns
    page = (data / "out/report.md").read_text()
    assert "**Rows with random weights are no results**" in page
    assert f"| {names[0]}: in context − AtlasSegFM: fused |" in page
    with (data / "out/results.csv").open(newline="") as file:
        assert {row["status"] for row in csv.DictReader(file) if row["value"] == "12"} == {"not_in_atlas"}
    with (data / "out/times.csv").open(newline="") as file:
        costs = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(costs[names[0]]["in context seconds"]) > 0
    counts = [sum(one.numel() for one in CROSS[name].build_network(CHANNELS).parameters()) for name in CROSS]
    assert [int(costs[name]["parameters"]) for name in names] == counts
    assert all(f" {count} |" in page for count in counts)
    # Other weights are another benchmark.
    given = ("--baselines", "universeg", "--model-path", f"universeg={save('universeg', data)}")
    outcome = run("benchmark", "icl", "-o", "out", *ONE_PAIR, *FAST, *given)
    assert outcome.code == 2
    assert "made with other variants" in outcome.err


@pytest.mark.parametrize("name", ["tyche", pytest.param("seggpt", marks=pytest.mark.slow)])
def test_benchmark_with_given_weights(data: Path, run: Run, request: pytest.FixtureRequest, name: str) -> None:
    """The same figures twice, and the licence of the weights on the page."""
    path = request.getfixturevalue("tiny_seggpt") if name == "seggpt" else save(name, data)
    asked = ("--model", "none", "--baselines", name, "--model-path", f"{name}={path}", "--support", "2")
    results = []
    for out in ("one", "two"):
        outcome = run("benchmark", "icl", "-o", out, *ONE_PAIR, *FAST, *asked)
        assert outcome.code == 0, outcome.err
        results.append((data / out / "results.csv").read_bytes())
    assert results[0] == results[1]
    page = (data / "one/report.md").read_text()
    assert "random weights" not in page
    assert f"Weights: {BASELINES[name].weights_licence}." in page
    variant = json.loads((data / "one/plan.json").read_text())["variants"][name]
    assert variant["baseline"] == {"name": name, "path": str(path), "random_weights": False, "support": 2}


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--baselines", "iris"], ["unknown in-context baseline 'iris'", "universeg, tyche, seggpt"]),
        (["--baselines", "tyche"], ["models fetch tyche"]),
        (["--baselines", "tyche", "--model-path", "tyche=absent.pt"], ["absent.pt", "no such file"]),
        (["--baselines", "tyche", "--model-path", "seggpt=x"], ["weights of seggpt", "--baselines tyche"]),
        (["--baselines", "tyche", "--model-path", "tyche=x", "--random-weights"], ["tyche", "--random-weights"]),
        (["--baselines", "tyche,tyche", "--random-weights"], ["two variants have the same name"]),
        (["--support", "0"], ["--support"]),
    ],
)
def test_bad_option(
    data: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], facts: list[str]
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr(pairs, "segment", never)
    outcome = run("benchmark", "icl", "data", "-o", "out", "--protocol", "all-pairs", "--no-plots", *arguments)
    assert outcome.code == 2
    for fact in facts:
        assert fact in outcome.err
    assert not (data / "out").exists()
