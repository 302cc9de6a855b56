"""Results and contexts in napari: the manifest, and what the reader that it names gives."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlassegfm.context import Context
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_labels, save_volume
from conftest import SHEARED
from result_folders import write_result
from scenes import ATLAS, QUERY, STRUCTURES, centred_grid, straight_grid

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = resources.files("atlassegfm.napari") / "napari.yaml"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A result on a sheared grid."""
    write_result(tmp_path / "out/case", 0, ("review", "failed", "good"))
    save_volume(QUERY.labels(centred_grid(SHEARED)), tmp_path / "out/case/segmentation.nii.gz", structures=STRUCTURES)
    return tmp_path / "out/case"


@pytest.fixture
def context(tmp_path: Path) -> Path:
    grid = straight_grid()
    save_volume(ATLAS.scan(grid), tmp_path / "a.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "l.nii.gz", structures=STRUCTURES)
    Context.from_files(tmp_path / "a.nii.gz", tmp_path / "l.nii.gz").save(tmp_path / "ctx")
    return tmp_path / "ctx"


def reader() -> Callable[[Any], Any]:
    """The function that the manifest names."""
    yaml = pytest.importorskip("yaml")
    (command,) = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))["contributions"]["commands"]
    module, _, name = command["python_name"].partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return found


def test_the_manifest_is_found_and_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["napari.manifest"] == {project["name"]: "atlassegfm.napari:napari.yaml"}
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert manifest["name"] == project["name"]
    (command,), (read,) = (manifest["contributions"][kind] for kind in ("commands", "readers"))
    assert read["command"] == command["id"]
    assert read["accepts_directories"]
    npe2 = pytest.importorskip("npe2", reason="npe2 is not installed; the manifest was read as YAML alone")
    npe2.PluginManifest.from_file(str(MANIFEST)).validate_imports()


def test_a_result_has_names_colours_and_place(result: Path) -> None:
    layers = reader()(str(result))(str(result))
    assert [(arguments["name"], arguments["visible"], kind) for _, arguments, kind in layers] == [
        ("case", True, "labels"),
        ("case: atlas", False, "labels"),
        ("case: model", False, "labels"),
    ]
    data, arguments, _ = layers[0]
    stored = load_labels(result / "segmentation.nii.gz")
    assert np.array_equal(data, stored.data.T)
    assert arguments["features"] == {
        "index": [0, 1, 7, 12],
        "name": ["background", "liver", "kidney", "node"],
        "verdict": ["", "review", "failed", "good"],
    }
    for one in STRUCTURES:
        assert np.allclose(arguments["colormap"][one.value], [*(n / 255 for n in one.color), 1])
    # A voxel (k, j, i) lies where the file says, with the axes of the world turned likewise.
    k, j, i = 5, 6, 7
    z, y, x, _ = arguments["affine"] @ (k, j, i, 1)
    assert np.allclose((x, y, z), stored.grid.voxel_to_world((i, j, k)), atol=1e-4)
    assert reader()(str(result / "run.json"))(str(result / "run.json"))[0][1]["name"] == "case"


def test_a_context_has_scan_and_labels(context: Path) -> None:
    layers = reader()(str(context))(str(context))
    assert [(arguments["name"], kind) for _, arguments, kind in layers] == [
        ("atlas", "image"),
        ("atlas: labels", "labels"),
    ]
    grid = straight_grid()
    assert np.array_equal(layers[0][0], ATLAS.scan(grid).data.T)
    assert np.array_equal(layers[1][0], ATLAS.labels(grid).data.T)
    assert layers[1][1]["features"]["name"][1:] == [one.name for one in STRUCTURES]


def test_other_folders_and_files_are_left_to_others(tmp_path: Path) -> None:
    save_volume(Volume(np.ones((4, 4, 4), np.uint8), Grid((4, 4, 4), np.diag([2.0, 2, 2, 1]))), tmp_path / "x.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text("{}")
    for path in (tmp_path / "x.nii.gz", tmp_path / "empty", tmp_path / "other", tmp_path / "nosuch"):
        assert reader()(str(path)) is None
    assert reader()([str(tmp_path / "empty")]) is None


@pytest.mark.filterwarnings("ignore")  # of napari's own dependencies
def test_napari_opens_both(result: Path, context: Path) -> None:
    """In napari itself, without a window, through the manifest."""
    pytest.importorskip("napari", reason="napari is not installed")
    npe2 = pytest.importorskip("npe2")
    from napari.components import ViewerModel

    manager = npe2.PluginManager.instance()
    if "atlassegfm" not in manager:
        manager.register(npe2.PluginManifest.from_file(str(MANIFEST)))
    viewer = ViewerModel()
    viewer.open(str(result), plugin="atlassegfm")
    viewer.open(str(context), plugin="atlassegfm")
    assert [one.name for one in viewer.layers] == ["case", "case: atlas", "case: model", "atlas", "atlas: labels"]
    labels = viewer.layers["case"]
    stored = load_labels(result / "segmentation.nii.gz")
    assert np.array_equal(labels.data, stored.data.T)
    k, j, i = 5, 6, 7
    assert np.allclose(labels.data_to_world((k, j, i))[::-1], stored.grid.voxel_to_world((i, j, k)), atol=1e-4)
    assert np.allclose(labels.get_color(7)[:3], np.array(STRUCTURES[1].color) / 255, atol=0.01)
    assert labels.features.set_index("index").loc[7, "name"] == "kidney"
    assert viewer.layers["atlas"].data.dtype == np.float32
