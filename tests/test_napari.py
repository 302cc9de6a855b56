"""Results and contexts in napari: the manifest, and what the reader that it names gives."""

from __future__ import annotations

import importlib
import itertools
import os
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
    superior, posterior, left, _ = arguments["affine"] @ (k, j, i, 1)
    assert np.allclose((-left, -posterior, superior), stored.grid.voxel_to_world((i, j, k)), atol=1e-4)
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


def has_opengl(napari: Any) -> bool:
    napari.qt.get_qapp()
    found: bool = importlib.import_module("qtpy.QtGui").QOpenGLContext().create()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of napari's own dependencies
@pytest.mark.parametrize("qt", [False, True], ids=["layers", "window"])
def test_napari_opens_both(result: Path, context: Path, qt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In napari itself, which finds the manifest, and in its window where there is OpenGL (``make test-napari``)."""
    napari = pytest.importorskip("napari", reason="napari is not installed: make test-napari")
    npe2 = pytest.importorskip("npe2")
    if "DISPLAY" not in os.environ:
        monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    manager = npe2.PluginManager.instance()
    manager.discover()
    assert "atlassegfm" in manager, "the package is not installed, or its entry point is not found"
    if qt and not has_opengl(napari):
        pytest.skip("Qt has no OpenGL without a screen: install Xvfb (make test-napari uses it)")
    viewer = napari.Viewer() if qt else napari.components.ViewerModel()
    viewer.open(str(result), plugin="atlassegfm")
    viewer.open(str(context), plugin="atlassegfm")
    assert [one.name for one in viewer.layers] == ["case", "case: atlas", "case: model", "atlas", "atlas: labels"]
    labels = viewer.layers["case"]
    stored = load_labels(result / "segmentation.nii.gz")
    assert np.array_equal(labels.data, stored.data.T)
    # The world is S, P, L: all of the affine is asserted, by its corners.
    for i, j, k in itertools.product((0, 7), (0, 6), (0, 5)):
        x, y, z = stored.grid.voxel_to_world((i, j, k))
        assert np.allclose(labels.data_to_world((k, j, i)), (z, -y, -x), atol=1e-4)
    for one in STRUCTURES:
        assert np.allclose(labels.get_color(one.value)[:3], np.array(one.color) / 255, atol=0.01)
        assert labels.features.set_index("index").loc[one.value, "name"] == one.name
    assert viewer.layers["atlas"].data.dtype == np.float32
    if qt:
        for layer in viewer.layers:
            layer.visible = layer is labels
        labels.opacity = 1.0
        viewer.dims.set_point((0, 1, 2), labels.data_to_world(np.argwhere(labels.data == 1).mean(axis=0)))
        viewer.reset_view()
        pixels = viewer.screenshot(flash=False)[..., :3].astype(int)
        assert (np.abs(pixels - STRUCTURES[0].color).max(axis=-1) <= 3).sum() > 100
        viewer.close()
