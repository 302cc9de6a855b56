"""nnInteractive behind the adapter: the same masks as its own session, in this process and on a server."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError, MissingExtraError, ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.demo.run import run_demo
from atlassegfm.jobs.store import RunInputs, run_record
from atlassegfm.models import MODELS, accept_licence, load_model
from atlassegfm.prompts import BoxPrompt, ClickPrompt, MaskPrompt, Prompt, RegionPrompt
from atlassegfm.segment import segment
from atlassegfm.settings import ModelSettings, NnInteractiveSettings, Settings
from conftest import affine_of, rotation
from scenes import ATLAS, PAPER_GATE, QUERY, QUICK_GATE, STRUCTURES, UNREGISTERED, straight_grid

pytest.importorskip("nnInteractive.inference.remote", reason="nnInteractive's client is not installed")
with contextlib.redirect_stdout(io.StringIO()):
    pytest.importorskip("nnInteractive.inference.inference_session", reason="nnInteractive is not installed")

from tiny_nninteractive import CONFIGURATION, make_folder, save_checkpoint, write

SHAPE = (48, 40, 36)
CENTRE = (20, 17, 15)


def scan(data: NDArray[Any], affine: NDArray[np.float64] | None = None) -> Volume:
    affine = np.diag([1.5, 2.0, 2.5, 1.0]) if affine is None else affine
    return Volume(data.astype(np.float32), Grid(data.shape, affine))


def ball(
    centre: tuple[int, int, int] = CENTRE, radius: float = 10.0, shape: tuple[int, int, int] = SHAPE
) -> NDArray[np.bool_]:
    return ((np.moveaxis(np.indices(shape), 0, -1) - centre) ** 2).sum(axis=-1) <= radius**2


def rod() -> NDArray[np.bool_]:
    """Along i, 90 voxels long, and off the middle in a narrow volume."""
    i, j, k = np.indices((100, 28, 24))
    return ((j - 14) ** 2 + (k - 12) ** 2 <= 49) & (i >= 5) & (i < 95)


def bright(mask: NDArray[np.bool_], seed: int = 0) -> Volume:
    return scan(100 + 60 * mask + np.random.default_rng(seed).normal(0, 4, mask.shape))


def mask_prompt(mask: NDArray[np.bool_]) -> MaskPrompt:
    return MaskPrompt(LocalMap.from_full(mask.astype(np.float32)))


#: Each off the middle, so that swapped or flipped axes show.
PROMPTS: dict[str, Prompt] = {
    "mask": mask_prompt(ball((22, 16, 14))),
    "click": ClickPrompt((23, 15, 13)),
    "box": BoxPrompt((10, 8, 14), (30, 28, 15)),
}


def load(folder: Path, **options: Any) -> Any:
    return load_model("nninteractive", "cpu", ModelSettings(nninteractive=NnInteractiveSettings(**options)), folder)


def answer(model: Any, image: Volume, prompt: Prompt) -> LocalMap:
    found: LocalMap = model.predict(model.encode(image), {3: prompt})[3]
    return found


def dice(probability: LocalMap, truth: NDArray[np.bool_]) -> float:
    found = probability.to_full(truth.shape) >= 0.5
    return 2 * float((found & truth).sum()) / float(found.sum() + truth.sum())


def official(folder: Path, image: Volume, prompt: Prompt, *, autozoom: bool) -> NDArray[np.bool_]:
    """The mask of nnInteractive's own session, used as its manual says, (i, j, k)."""
    from nnInteractive.inference.inference_session import nnInteractiveInferenceSession

    threads, drawn = torch.get_num_threads(), np.random.get_state()  # noqa: NPY002
    with contextlib.redirect_stdout(io.StringIO()):
        session = nnInteractiveInferenceSession(device=torch.device("cpu"), torch_n_threads=1, do_autozoom=autozoom)
        session.initialize_from_trained_model_folder(str(folder), use_fold=0)
        session.set_image(np.transpose(image.data, (2, 1, 0))[None].copy())
        found = np.zeros(image.grid.shape[::-1], np.uint8)
        session.set_target_buffer(found)
        np.random.seed(0)  # noqa: NPY002
        if isinstance(prompt, ClickPrompt):
            i, j, k = prompt.ijk
            session.add_point_interaction((k, j, i), include_interaction=True)
        elif isinstance(prompt, BoxPrompt):
            sides = [[prompt.start[axis], prompt.stop[axis]] for axis in (2, 1, 0)]
            session.add_bbox_interaction(sides, include_interaction=True)
        else:
            mask = prompt.probability.to_full(image.grid.shape) >= 0.5
            session.add_initial_seg_interaction(mask.transpose(2, 1, 0).astype(np.uint8), run_prediction=True)
    np.random.set_state(drawn)  # noqa: NPY002
    torch.set_num_threads(threads)
    return found.transpose(2, 1, 0) > 0


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random network of the published kind."""
    return make_folder(tmp_path_factory.mktemp("random") / "nnInteractive_v1.0")


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network that follows prompts."""
    return make_folder(tmp_path_factory.mktemp("toy") / "nnInteractive_v1.0", follower=True)


@pytest.fixture
def broken(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the random network's folder, to be broken."""
    return Path(shutil.copytree(random_folder, tmp_path / "nnInteractive_v1.0"))


@pytest.fixture(scope="module")
def toy(toy_folder: Path) -> Iterator[Any]:
    model = load(toy_folder)
    yield model
    model.close()


# --- the same as the official session -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROMPTS)
def test_masks_are_those_of_the_official_session(random_folder: Path, kind: str) -> None:
    image = scan(np.random.default_rng(1).normal(size=SHAPE))
    found = answer(load(random_folder, autozoom=False), image, PROMPTS[kind])
    expected = official(random_folder, image, PROMPTS[kind], autozoom=False)
    assert 0.01 < expected.mean() < 0.99
    np.testing.assert_array_equal(found.to_full(SHAPE) >= 0.5, expected)
    assert found.values.dtype == np.float32
    assert 0 <= found.values.min() <= found.values.max() <= 1
    assert len(np.unique(found.values)) > 100  # soft, not a mask


def test_probabilities_are_those_of_the_network(random_folder: Path) -> None:
    """Without what makes them fit the mask exactly: recomputed from the network's input made by hand."""
    image = scan(np.random.default_rng(1).normal(size=SHAPE))
    model = load(random_folder, autozoom=False)
    found = answer(model, image, PROMPTS["mask"]).to_full(SHAPE).transpose(2, 1, 0)
    data = image.data.transpose(2, 1, 0)
    mask = (PROMPTS["mask"].probability.to_full(SHAPE) >= 0.5).transpose(2, 1, 0)  # type: ignore[union-attr]
    hit = np.argwhere(mask)
    centre = [round((low + high) / 2) for low, high in zip(hit.min(axis=0), hit.max(axis=0) + 1, strict=True)]
    given = torch.zeros((1, 8, 64, 64, 64))
    first = [c - 32 for c in centre]
    to = tuple(slice(-n, -n + size) for n, size in zip(first, data.shape, strict=True))
    given[0, 0][to] = torch.from_numpy(np.ascontiguousarray((data - data.mean()) / data.std(ddof=1)))
    given[0, 1][to] = torch.from_numpy(np.ascontiguousarray(mask.astype(np.float32)))
    with torch.inference_mode():
        expected = model.session.network(given)[0].softmax(0)[1].numpy()[to]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert ((expected > 0.5) == (found >= 0.5)).mean() >= 0.999


@pytest.mark.parametrize("kind", PROMPTS)
def test_masks_are_those_of_the_official_session_after_zooming_out(toy_folder: Path, toy: Any, kind: str) -> None:
    """A rod longer than a patch: pasted together from several."""
    truth = rod()
    image = bright(truth)
    prompt = {
        "mask": mask_prompt(np.roll(truth, 1, axis=1)),
        "click": ClickPrompt((50, 14, 11)),
        "box": BoxPrompt((5, 7, 12), (96, 22, 13)),
    }[kind]
    pasted = []
    session = toy.session
    plan = session._plan_refinement_bboxes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_plan_refinement_bboxes", lambda *given: (pasted.extend(plan(*given)), pasted)[1])
        found = answer(toy, image, prompt)
    assert len(pasted) > 2
    full = found.to_full(truth.shape)
    np.testing.assert_array_equal(full >= 0.5, official(toy_folder, image, prompt, autozoom=True))
    assert dice(found, truth) > 0.95
    # Soft at the border, along the whole rod.
    soft = ((full > 0.002) & (full < 0.998)).any(axis=(1, 2))
    assert soft[10:90].all()


@pytest.mark.parametrize("kind", PROMPTS)
def test_array_order_and_flips_of_the_stored_scan_change_nothing(toy: Any, kind: str) -> None:
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    truth = ball() | ball((30, 22, 20), 6.0)
    image = scan(bright(truth).data, affine_of(rotation(8, -6, 10) @ np.diag([1.5, 2.0, 2.5]), (5.0, -6.0, 70.0)))
    expected = answer(toy, image, PROMPTS[kind])
    assert dice(expected, truth) > 0.9
    for codes in ("LPS", "SRA", "AIL"):
        turn = ornt_transform(axcodes2ornt(image.grid.axis_codes), axcodes2ornt(codes))
        i, j, k = (image.grid.shape[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3))
        stored = image.turned_to(Grid((i, j, k), image.grid.affine @ inv_ornt_aff(turn, image.grid.shape)))
        found = answer(toy, stored.canonical(), PROMPTS[kind])
        assert found.start == expected.start
        np.testing.assert_array_equal(found.values, expected.values)


# --- prompts and scans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_find_the_ball(toy: Any, kind: str) -> None:
    assert dice(answer(toy, bright(ball()), PROMPTS[kind]), ball()) > 0.98


def test_two_scans_in_turn_and_several_structures_do_not_mix(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ball(), ball((34, 25, 24), 6.0)
    first, second = toy.encode(bright(one)), toy.encode(bright(one | two, seed=1))
    shown = []
    session = toy.session
    show = session.set_image
    monkeypatch.setattr(session, "set_image", lambda *given: (shown.append(given[0].shape), show(*given))[1])
    told: list[int] = []
    prompts = {4: ClickPrompt((34, 25, 24)), 9: ClickPrompt(CENTRE)}
    both = toy.predict(second, prompts, told.append)
    alone = toy.predict(first, {1: PROMPTS["mask"]})[1]
    again = toy.predict(second, {9: prompts[9]})[9]
    assert told == [4, 9]
    assert list(both) == [4, 9]
    assert shown == [(1, 36, 40, 48)] * 3  # once for each turn, not for each structure
    assert dice(both[4], two) > 0.98
    assert dice(both[9], one) > 0.98
    assert dice(alone, one) > 0.98
    np.testing.assert_array_equal(again.values, both[9].values)


@pytest.mark.parametrize(
    "prompt",
    [
        MaskPrompt(LocalMap.empty()),
        MaskPrompt(LocalMap((3, 3, 3), np.full((2, 2, 2), 0.4, np.float32))),
        MaskPrompt(LocalMap((50, 3, 3), np.ones((4, 4, 4), np.float32))),
        ClickPrompt((48, 3, 3)),
        ClickPrompt((3, -1, 3)),
        BoxPrompt((50, 0, 3), (60, 9, 4)),
        BoxPrompt((5, 5, 3), (5, 9, 4)),
        BoxPrompt((5, 5, 36), (9, 9, 37)),
    ],
)
def test_prompt_that_points_at_nothing(toy: Any, prompt: Prompt) -> None:
    assert answer(toy, bright(ball()), prompt).is_empty


def test_parts_of_prompts_outside_the_scan_are_left_out(toy: Any) -> None:
    structure = ball((0, 38, 15), 9.0)
    image = bright(structure)
    cut = MaskPrompt(LocalMap((-3, 35, 10), np.ones((8, 10, 8), np.float32)))
    assert dice(answer(toy, image, cut), structure) > 0.5
    assert dice(answer(toy, image, BoxPrompt((-5, 30, 15), (9, 60, 16))), structure) > 0.95


@pytest.mark.parametrize("shape", [(12, 9, 1), (1, 1, 2)])
def test_thin_volumes(toy: Any, shape: tuple[int, int, int]) -> None:
    image = scan(np.random.default_rng(0).normal(0, 1, shape))
    i, j, k = (n // 2 for n in shape)
    mask = np.zeros(shape, bool)
    mask[i, j, k] = True
    for prompt in (mask_prompt(mask), ClickPrompt((i, j, k)), BoxPrompt((i, j, k), (i + 1, j + 1, k + 1))):
        found = answer(toy, image, prompt)
        assert np.isfinite(found.values).all()
        assert all(stop <= size for stop, size in zip(found.stop, shape, strict=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.pad(np.full((9, 9, 9), 3.0), 5), "all voxels but those of value 0 around them have the value 3"),
        (np.pad(np.full((9, 9, 9), -3.0), 5), "all voxels but those of value 0 around them have the value -3"),
    ],
)
def test_scans_that_cannot_be_normalised(toy: Any, data: NDArray[np.float64], message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy.encode(scan(data))


def test_nothing_of_the_process_is_changed(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, prompt = bright(ball()), PROMPTS["mask"]
    data, values = image.data.copy(), prompt.probability.values.copy()  # type: ignore[union-attr]
    threads, torch_state = torch.get_num_threads(), torch.get_rng_state()
    numpy_state = np.random.get_state()[1]  # noqa: NPY002
    torch.set_num_threads(1)
    try:
        model = load(toy_folder)
        answer(model, image, prompt)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    np.testing.assert_array_equal(image.data, data)
    np.testing.assert_array_equal(prompt.probability.values, values)  # type: ignore[union-attr]
    assert capsys.readouterr().out == ""
    executor = model.session.executor
    assert not executor._shutdown
    del model
    gc.collect()  # frames of the loading may live on in a cycle of a library
    assert executor._shutdown


def test_failed_prompt_leaves_no_trace(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = toy.encode(bright(ball()))
    expected = toy.predict(image, {1: PROMPTS["click"]})[1]
    session = toy.session
    with monkeypatch.context() as patch:
        patch.setattr(
            session, "_build_network_input", lambda *_: (_ for _ in ()).throw(RuntimeError("no room\nat all"))
        )
        with pytest.raises(ModelError, match=r"nnInteractive 2\.6\.\d+ failed on a prompt \(RuntimeError: no room\)"):
            toy.predict(image, {1: ClickPrompt((40, 35, 30))})
    assert session.new_interaction_centers  # it stays dirty without our care
    np.testing.assert_array_equal(toy.predict(image, {1: PROMPTS["click"]})[1].values, expected.values)


def test_memory_that_runs_out_is_left_to_the_pipeline(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("GPU")

    monkeypatch.setattr(toy.session, "_build_network_input", fail)
    with pytest.raises(torch.OutOfMemoryError):
        answer(toy, bright(ball()), PROMPTS["click"])


# --- the whole pipeline ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROMPTS)
def test_pipeline_is_better_than_the_atlas_alone(toy_folder: Path, kind: str) -> None:
    grid = straight_grid()
    atlas = Atlas.from_volumes(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    settings = with_overrides(
        Settings(), [*UNREGISTERED, *QUICK_GATE, "model=nninteractive", f"model_path={toy_folder}", f"prompt={kind}"]
    )
    context, query = Context(atlas, settings), QUERY.scan(grid)
    result = segment(context, query, device="cpu")
    truth = QUERY.labels(grid).data
    assert result.model_labels is not None
    warped, model, fused = (
        dice_per_structure(labels.data, truth, atlas.values)
        for labels in (result.atlas_labels, result.model_labels, result.labels)
    )
    assert min(model.values()) > 0.9, model
    for value in atlas.values:
        assert model[value] > warped[value] + 0.05, (warped, model)
        assert fused[value] > warped[value] + 0.03, fused
    told = run_record(result, RunInputs(context, query)).model.model_dump()
    checkpoint = toy_folder / "fold_0" / "checkpoint_final.pth"
    assert told["provenance"]["weights"] == {
        "file": "checkpoint_final.pth",
        "bytes": checkpoint.stat().st_size,
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "fold": "fold_0",
        "folder": toy_folder.name,
        "licence_in_folder": "CC0-1.0",
    }
    assert told["provenance"]["nninteractive_version"] == version("nninteractive")
    assert told["weights_licence"] == "CC-BY-NC-SA-4.0"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_pair_through_the_official_session(tmp_path: Path) -> None:
    """With the registration, the gate and all else as a user has it."""
    # Wide enough to show each structure with its surroundings at once, so that the session neither zooms nor refines.
    folder = make_folder(tmp_path / "refiner", refiner=True, patch=(72, 144, 192))
    settings = with_overrides(Settings(), ["model=nninteractive", f"model_path={folder}"])
    outcome = run_demo(tmp_path / "demo", settings, device="cpu", picture=False)
    assert outcome.run.model.prompt == "mask"
    atlas, model, fused = outcome.means()
    assert model is not None
    assert min(model, fused) > atlas + 0.01, (atlas, model, fused)


# --- the folder -----------------------------------------------------------------------------------------------------


def test_folder_may_be_named_by_its_parent_or_its_fold(toy_folder: Path) -> None:
    for path in (toy_folder.parent, toy_folder, toy_folder / "fold_0"):
        found = load(path).provenance["weights"]
        assert (found["folder"], found["fold"]) == (toy_folder.name, "fold_0")


def test_folder_is_found_among_all_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLASSEGFM_MODELS", str(tmp_path))
    published = MODELS["nninteractive"].weights
    assert published is not None
    folder = make_folder(tmp_path / "nninteractive" / published.files[0].path.split("/")[0], follower=True)
    with pytest.raises(InputError, match=r"plans\.json has \d+ bytes, expected 6287"):
        load_model("nninteractive", "cpu")
    tiny = [
        replace(file, size=(folder.parent / file.path).stat().st_size, sha256=None)  # as if this were published
        for file in published.files
    ]
    row = replace(MODELS["nninteractive"], weights=replace(published, files=tuple(tiny)))
    monkeypatch.setitem(MODELS, "nninteractive", row)
    accept_licence("nninteractive")
    assert load_model("nninteractive", "cpu").provenance["weights"]["folder"] == folder.name


def test_several_networks_or_folds_must_be_told_apart(toy_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(toy_folder, tmp_path / name)
    with pytest.raises(InputError, match="one, two are in it; name one of them"):
        load(tmp_path)
    shutil.copytree(tmp_path / "one" / "fold_0", tmp_path / "one" / "fold_1")
    with pytest.raises(InputError, match="fold_0, fold_1 are in it; name one of them"):
        load(tmp_path / "one")
    assert load(tmp_path / "one" / "fold_1").provenance["weights"]["fold"] == "fold_1"


@pytest.mark.parametrize(
    ("name", "content", "decay", "radius"),
    [
        ("inference_session_class.json", "nnInteractiveInferenceSession", 0.9, 4),
        ("inference_session_class.json", {"point_radius": 5, "preferred_scribble_thickness": [2, 2, 2]}, 0.98, 5),
        ("inference_info.json", {"interaction_decay": 0.7, "inference_class_min_version": "2.0.0"}, 0.7, 4),
    ],
)
def test_old_and_new_formats(broken: Path, name: str, content: Any, decay: float, radius: int) -> None:
    (broken / "inference_session_class.json").unlink()
    write(broken / name, content)
    session = load(broken).session
    assert session.interaction_decay == decay
    assert session.point_interaction.point_radius == radius


@pytest.mark.parametrize(
    "name", ["dataset.json", "plans.json", "inference_session_class.json", "fold_0/checkpoint_final.pth"]
)
def test_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(InputError, match=Path(name).name):
        load(broken)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/absent: no such file or folder; expected the weights of the model 'nninter"):
        load(tmp_path / "absent")
    with pytest.raises(InputError, match="no network in it; expected the folder of an nnInteractive network"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="/file: is a file; expected the folder of the weights of the model 'nninter"):
        load(tmp_path / "file")


def _cut_short(folder: Path) -> None:
    file = folder / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:-2000])


def _plans(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plans = json.loads((folder / "plans.json").read_text())
    change(plans["configurations"][CONFIGURATION])
    write(folder / "plans.json", plans)


WANTED = r"expected the weights of the model 'nninteractive' \(checkpoint_final\.pth\)"
A_WEIGHT = {"a": torch.zeros(1)}
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no torch file": (
        lambda folder: (folder / "fold_0" / "checkpoint_final.pth").write_text("<html>please log in</html>"),
        rf"checkpoint_final\.pth: is a web page, .*; {WANTED}",
    ),
    "download cut short": (_cut_short, rf"checkpoint_final\.pth: is cut short or damaged; {WANTED}"),
    "no weights": (
        lambda folder: save_checkpoint(folder / "fold_0", network_weights=None),
        rf"checkpoint_final\.pth: holds trainer_name, init_args and no 'network_weights'; {WANTED}",
    ),
    "no arguments": (
        lambda folder: save_checkpoint(folder / "fold_0", network_weights=A_WEIGHT, init_args=None),
        rf"checkpoint_final\.pth: names no configuration under 'init_args'; {WANTED}",
    ),
    "empty arguments": (
        lambda folder: save_checkpoint(folder / "fold_0", network_weights=A_WEIGHT, init_args={}),
        "names no configuration under 'init_args'",
    ),
    "a tensor": (
        lambda folder: torch.save(torch.zeros(3), folder / "fold_0" / "checkpoint_final.pth"),
        "holds one Tensor and no 'network_weights'",
    ),
    "other weights": (
        lambda folder: save_checkpoint(folder / "fold_0", network_weights=A_WEIGHT),
        r"holds weights of another network: .* missing .*1 unknown \(a\); expected those of the network in plans\.json",
    ),
    "other configuration": (
        lambda folder: save_checkpoint(folder / "fold_0", network_weights=A_WEIGHT, init_args={"configuration": "2d"}),
        rf"plans.json: no configuration '2d', .* \(there are: {CONFIGURATION}\)",
    ),
    "other architecture": (
        lambda folder: _plans(
            folder, lambda one: one["architecture"]["arch_kwargs"].update(features_per_stage=[4, 8, 12])
        ),
        r"holds weights of another network: .* of another shape \(.* instead of 12.*\); expected those of the network",
    ),
    "architecture that does not exist": (
        lambda folder: _plans(folder, lambda one: one["architecture"].update(network_class_name="no.such.Network")),
        "plans.json: its network cannot be built .*no.such.Network is no network",
    ),
    "architecture that is no network": (
        lambda folder: _plans(folder, lambda one: one["architecture"].update(network_class_name="subprocess.Popen")),
        "plans.json: its network cannot be built .*subprocess.Popen is no network",
    ),
    "architecture left out": (
        lambda folder: _plans(folder, lambda one: one["architecture"]["arch_kwargs"].pop("n_stages")),
        "plans.json: its network cannot be built",
    ),
    "small patch": (
        lambda folder: _plans(folder, lambda one: one.update(patch_size=[64, 48, 64])),
        "the patch is 64 x 48 x 64 voxels; nnInteractive cannot refine with less than 49",
    ),
    "two channels": (
        lambda folder: write(
            folder / "dataset.json", {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "x": 1}}
        ),
        "dataset.json: 2 channels; expected a network for scans of one",
    ),
    "no JSON": (lambda folder: (folder / "plans.json").write_text("{"), "plans.json: not a JSON object"),
    "JSON list": (lambda folder: write(folder / "plans.json", []), "plans.json: not a JSON object"),
    "newer format": (
        lambda folder: write(folder / "inference_info.json", {"inference_class_min_version": "9.0.0"}),
        r"inference_info.json: nnInteractive 2\.6\.\d+ cannot use it .*>=9.0.0",
    ),
    "other padding": (
        lambda folder: write(folder / "inference_session_class.json", {"pad_mode_image": "edge"}),
        "pads by 'edge'",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_folder_is_one_sentence(broken: Path, name: str) -> None:
    spoil, message = BREAKS[name]
    spoil(broken)
    with pytest.raises(ModelError, match=message) as caught:
        load(broken)
    assert "\n" not in str(caught.value)


class _Harmless:
    """Stands for what a pickle may hold."""


def test_checkpoint_with_more_than_plain_values_is_refused(broken: Path) -> None:
    """Plain values that a training leaves, numbers and arrays of NumPy among them, are read."""
    weights = load(broken).session.network.state_dict()
    left = {"logging": {"losses": [np.float64(0.5), np.arange(3.0)]}, "current_epoch": 7, "device": torch.device("cpu")}
    save_checkpoint(broken / "fold_0", network_weights=weights, **left)
    load(broken)
    save_checkpoint(broken / "fold_0", network_weights=weights, logging=_Harmless())
    with pytest.raises(ModelError) as error:
        load(broken)
    assert "_Harmless" in str(error.value)
    assert str(broken / "fold_0" / "checkpoint_final.pth") in str(error.value)


def test_plain_pickle_is_never_run(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (broken / "harmed",)

    checkpoint = broken / "fold_0" / "checkpoint_final.pth"
    for protocol, message in ((2, "is cut short or damaged"), (4, "is no file of PyTorch")):
        checkpoint.write_bytes(pickle.dumps(Harm(), protocol))
        with pytest.raises(ModelError, match=message):
            load(broken)
    torch.save(Harm(), checkpoint, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="holds other objects .* loading these could run any program"):
        load(broken)
    assert not (broken / "harmed").exists()


def test_damaged_checkpoint_is_never_run(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where what is damaged is the list of contents, as if it held more than tensors."""
    save_checkpoint(broken / "fold_0", network_weights=A_WEIGHT)
    checkpoint = broken / "fold_0" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes().replace(b"_rebuild_tensor", b"_rebuilt_tensor"))
    with pytest.raises(ModelError, match=rf"is cut short or damaged; {WANTED}"):
        load(broken)
    assert "runs code" not in caplog.text


def test_prompt_the_network_does_not_take(broken: Path) -> None:
    write(
        broken / "inference_info.json",
        {"supported_interactions": {"bbox2d": False, "points": False}, "supports_initial_label": False},
    )
    model = load(broken)
    for kind, prompt in PROMPTS.items():
        with pytest.raises(ModelError, match=f"does not take the prompt '{kind}'"):
            answer(model, bright(ball()), prompt)
    with pytest.raises(TypeError, match="by mask, box or click, not by RegionPrompt"):
        answer(model, bright(ball()), RegionPrompt(LocalMap.from_full(ball())))


# --- the installed package ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("nnInteractive.inference.inference_session", {}, "nninteractive"),
        ("nnInteractive.inference.remote", {"server": "http://127.0.0.1:1"}, "nninteractive-client"),
    ],
)
def test_missing_package_names_its_extra(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, options: dict[str, Any], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"the extra '{extra}'"):
        load(toy_folder, **options)


def test_other_version_of_the_session_is_refused(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnInteractive.inference.inference_session import nnInteractiveInferenceSession

    monkeypatch.delattr(nnInteractiveInferenceSession, "_paste_prediction_to_target_buffer")
    with pytest.raises(ModelError, match=r"nnInteractive 2\.6\.\d+ is installed, and it has no _paste.*>=2\.6,<2\.7"):
        load(toy_folder)


def test_session_that_pastes_otherwise_is_refused(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(toy_folder)
    session = model.session
    paste = session._paste_prediction_to_target_buffer

    def other(prediction: torch.Tensor, bbox: list[list[int]], **named: Any) -> None:
        paste(1 - prediction, bbox, **named)

    monkeypatch.setattr(type(session), "_paste_prediction_to_target_buffer", staticmethod(other))
    with pytest.raises(ModelError, match="its outputs are not those of its masks; expected a version"):
        answer(model, bright(ball()), PROMPTS["click"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu_is_an_error_of_the_model(toy_folder: Path) -> None:
    with pytest.raises(ModelError, match="no CUDA GPU"):
        load_model("nninteractive", "cuda", path=toy_folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", PROMPTS)
def test_gpu_agrees_with_cpu(toy_folder: Path, toy: Any, kind: str) -> None:
    image = bright(ball())
    on_gpu = answer(load_model("nninteractive", "cuda", path=toy_folder), image, PROMPTS[kind])
    same = (on_gpu.to_full(SHAPE) >= 0.5) == (answer(toy, image, PROMPTS[kind]).to_full(SHAPE) >= 0.5)
    assert same.mean() > 0.999


# --- a server -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


KEY = "opensesame"


@pytest.fixture(scope="module")
def server(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The official server with the toy network, for one client at a time, which must know its key."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "nnInteractive.inference.server.main", "--model-dir", str(toy_folder)]
    command += ["--fold", "0", "--device", "cpu", "--torch-n-threads", "1", "--max-sessions", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "NN_INTERACTIVE_API_KEY": KEY}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < until, log.read_text()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def remote(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NN_INTERACTIVE_API_KEY", KEY)
    model = load(Path("/no/weights/are/needed"), server=server)
    yield model
    model.close()


def test_server_gives_the_masks_of_this_process(toy: Any, remote: Any, server: str) -> None:
    one, two = bright(ball()), bright(ball((26, 20, 18), 9.0), seed=1)
    for image in (one, two):
        here = toy.predict(toy.encode(image), dict(enumerate(PROMPTS.values())))
        there = remote.predict(remote.encode(image), dict(enumerate(PROMPTS.values())))
        for number, expected in here.items():
            mask = expected.to_full(SHAPE) >= 0.5
            assert mask.any()
            np.testing.assert_array_equal(there[number].to_full(SHAPE), mask.astype(np.float32))
    assert remote.provenance["server"] == server
    assert remote.provenance["server_version"].startswith("2.6.")
    assert remote.provenance["server_weights_licence"] == "CC0-1.0"
    assert "weights" not in remote.provenance
    assert KEY not in json.dumps(remote.provenance)


def test_server_is_used_by_the_pipeline(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_INTERACTIVE_API_KEY", KEY)
    grid = straight_grid()
    atlas = Atlas.from_volumes(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    overrides = [*UNREGISTERED, *PAPER_GATE, "model=nninteractive", f"models.nninteractive.server={server}"]
    result = segment(Context(atlas, with_overrides(Settings(), overrides)), QUERY.scan(grid), device="cpu")
    assert result.model_labels is not None
    assert min(dice_per_structure(result.model_labels.data, QUERY.labels(grid).data, atlas.values).values()) > 0.9
    assert result.provenance["server"] == server


def test_sending_the_scan_is_said(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NN_INTERACTIVE_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG):
        load(Path("absent"), server=server).close()
    assert f"{server}: this server gets the scans: patient data leave this process" in caplog.text
    assert KEY not in caplog.text


def test_autozoom_is_told_to_the_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_INTERACTIVE_API_KEY", KEY)
    for autozoom in (False, True):
        model = load(Path("absent"), server=server, autozoom=autozoom)
        assert model.session.do_autozoom is autozoom
        found = answer(model, bright(rod()), ClickPrompt((50, 14, 11)))
        model.close()
        # One patch of 64 around the click, or all of it.
        assert (found.values.shape[0] > 64) is autozoom


def test_full_server(remote: Any, server: str) -> None:
    with pytest.raises(ModelError, match=r"the server has no free session \(.*1 sessions\)\); try later"):
        load(Path("absent"), server=server)


def test_wrong_key(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_INTERACTIVE_API_KEY", "wrong")
    with pytest.raises(ModelError, match="refuses the key; set NN_INTERACTIVE_API_KEY"):
        load(Path("absent"), server=server)


def test_expired_session_is_opened_again(remote: Any, toy: Any, caplog: pytest.LogCaptureFixture) -> None:
    image = bright(ball())
    encoded = remote.encode(image)
    remote.predict(encoded, {1: PROMPTS["mask"]})
    remote.session._http.post("/release")
    with caplog.at_level(logging.INFO):
        found = remote.predict(encoded, {1: PROMPTS["click"]})[1]
    assert "the session had expired; opening another one" in caplog.text
    expected = answer(toy, image, PROMPTS["click"]).to_full(SHAPE) >= 0.5
    np.testing.assert_array_equal(found.to_full(SHAPE) >= 0.5, expected)


def test_session_that_expires_again_and_again(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnInteractive.inference.remote import SessionExpiredError, nnInteractiveRemoteInferenceSession

    def expire(*_: object, **__: object) -> None:
        raise SessionExpiredError("lease expired or unknown")

    monkeypatch.setattr(nnInteractiveRemoteInferenceSession, "set_image", expire)
    with pytest.raises(ModelError, match="ended the session twice within one prompt; .*--idle-timeout-seconds"):
        answer(remote, bright(ball()), PROMPTS["click"])


def test_what_the_server_says_is_passed_on(remote: Any) -> None:
    thick = BoxPrompt((10, 8, 12), (30, 28, 16))
    with pytest.raises(ModelError, match=r"the server failed \(HTTP 400: .*3D bounding box"):
        answer(remote, bright(ball()), thick)


def test_slow_server(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    def wait(*_: object, **__: object) -> None:
        raise httpx.ReadTimeout("too long")

    with monkeypatch.context() as patch:
        patch.setattr(remote.session._http, "post", wait)
        with pytest.raises(ModelError, match="took longer than 600 s; raise models.nninteractive.timeout_seconds"):
            answer(remote, bright(ball()), PROMPTS["click"])


def test_broken_connection(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    def fail(*_: object, **__: object) -> None:
        raise httpx.RemoteProtocolError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(remote.session._http, "post", fail)
        with pytest.raises(ModelError, match=r"the connection to the server broke \(RemoteProtocolError\)"):
            answer(remote, bright(ball()), PROMPTS["click"])


def test_no_server() -> None:
    with pytest.raises(ModelError, match="no server answers there; start nninteractive-server, or correct"):
        load(Path("absent"), server=f"http://127.0.0.1:{free_port()}")


@contextlib.contextmanager
def imposter(answers: dict[str, Any]) -> Iterator[str]:
    """A web server that answers these paths with JSON, and all others with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps(answers.get(self.path, {"detail": "Not Found"})).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


CAPABILITIES = {
    "supported_interactions": {"points": True, "bbox2d": True},
    "channel_mapping": {},
    "num_interaction_channels": 7,
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": True,
    "preferred_scribble_thickness": 2,
    "interaction_decay": 0.9,
    "inference_session_version": "3.1.0",
}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "what answers there is no nnInteractive server of version 2"),
        ({"/claim": {"token": 1}}, "what answers there is no nnInteractive server of version 2"),
        ({"/claim": {"lease_token": "x"}, "/capabilities": {}}, "what answers there is no nnInteractive server"),
        (
            {"/claim": {"lease_token": "x"}, "/capabilities": CAPABILITIES, "/release": {}},
            r"the nnInteractive server has version 3\.1\.0; expected 2\.x",
        ),
    ],
)
def test_other_server(answers: dict[str, Any], message: str) -> None:
    with imposter(answers) as url, pytest.raises(ModelError, match=message):
        load(Path("absent"), server=url)


@pytest.mark.parametrize("host", ["10.1.2.3", "gpu.hospital.example", "0.0.0.0", "[2001:db8::1]"])
def test_other_machines_need_consent(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "sent to another machine; patient data stay on this machine unless models.nninteractive.allow_remote = true"
    )
    with pytest.raises(InputError, match=message):
        load(Path("absent"), server=f"http://{host}:1527")


def test_other_machine_with_consent_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import httpx

    def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx.Client, "post", fail)
    with pytest.raises(ModelError, match=r"http://10\.1\.2\.3:1527: no server answers there"):
        load(Path("absent"), server="http://10.1.2.3:1527", allow_remote=True)
    assert "patient data leave this machine, unencrypted" in caplog.text


def test_proxy_counts_as_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    with pytest.raises(InputError, match="sent to a proxy .*NO_PROXY"):
        load(Path("absent"), server="http://127.0.0.1:1527")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ModelError, match="no server answers there"):
        load(Path("absent"), server=f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    "address", ["localhost:1527", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port", "http://["]
)
def test_address_that_is_none(address: str) -> None:
    with pytest.raises(InputError, match="expected an address such as http://127.0.0.1:1527"):
        load(Path("absent"), server=address)


@pytest.mark.parametrize("address", ["http://me:secret@127.0.0.1:1527", "http://127.0.0.1:1527/?key=secret"])
def test_secrets_in_the_address_are_refused_and_not_shown(address: str) -> None:
    with pytest.raises(InputError, match="holds a user, a password or a query") as caught:
        load(Path("absent"), server=address)
    assert "secret" not in str(caught.value)


def test_remote_part_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import atlassegfm.models.nninteractive.remote, nnInteractive.inference.remote"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
