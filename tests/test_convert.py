"""Labels from one format to another, without a change of voxels, names or colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atlassegfm.core.image import Volume, load_labels, save_volume
from atlassegfm.core.labels import Structure
from atlassegfm.dicom import load_series, open_labels, structures_in
from conftest import ORIENTATIONS, Run
from dicom_series import AFFINES, scan_values, write_series

SHAPE = (40, 36, 9)
STRUCTURES = (Structure(1, "liver", (200, 80, 60)), Structure(9, "Niere links", (10, 20, 255)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A series and a label map of its voxels."""
    write_series(tmp_path / "ct", scan_values(SHAPE), AFFINES["oblique"])
    scan = load_series(tmp_path / "ct")
    data = np.zeros(scan.grid.shape, np.uint8)
    data[5:15, 5:20, 2:6], data[20:30, 8:30, 3:8] = 1, 9
    save_volume(Volume(data, scan.grid).canonical(), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["rtstruct", "seg"])
def test_to_dicom_and_back(folder: Path, run: Run, form: str) -> None:
    written = run("convert", "labels.nii.gz", "--to", form, "--onto", "ct", "-o", "out.dcm", "--json")
    assert written.code == 0, written.err
    assert all(one["dice"] > 0.99 for one in written.json["round_trip"])
    back = run("convert", "out.dcm", "--onto", "ct", "-o", "back.seg.nrrd")
    assert back.code == 0, back.err
    scan, labels = load_series(folder / "ct"), load_labels(folder / "labels.nii.gz")
    expected, found = labels.turned_to(scan.grid).data, load_labels(folder / "back.seg.nrrd")
    names = {one.value: one.name for one in structures_in(found)}
    values = {one.name: one.value for one in STRUCTURES}
    assert set(names.values()) == set(values)
    for value, name in names.items():
        assert np.array_equal(found.turned_to(scan.grid).data == value, expected == values[name])


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".seg.nrrd", ".mha", ".mgz"])
def test_between_images(tmp_path: Path, run: Run, affine: np.ndarray, ending: str) -> None:
    from atlassegfm.core.geometry import Grid

    data = np.random.default_rng(0).choice(np.array([0, 1, 9], np.uint8), (4, 5, 6))
    save_volume(Volume(data, Grid((4, 5, 6), affine)), tmp_path / "in.nii.gz", structures=STRUCTURES)
    out = tmp_path / f"out{ending}"
    assert run("convert", str(tmp_path / "in.nii.gz"), "-o", str(out)).code == 0
    found = load_labels(out)
    assert np.array_equal(found.data, data)
    assert np.allclose(found.grid.affine, affine, atol=1e-4)
    if ending not in (".mha", ".mgz"):
        assert structures_in(found) == STRUCTURES


def test_structures_names_and_masks(folder: Path, run: Run) -> None:
    (folder / "names.txt").write_text("1 first\n9 second\n")
    arguments = ("--names", "names.txt", "--structures", "second", "--to", "masks", "-o", "masks")
    assert run("convert", "labels.nii.gz", *arguments).code == 0
    assert [path.name for path in (folder / "masks").iterdir()] == ["second.nii.gz"]
    labels = load_labels(folder / "labels.nii.gz")
    assert np.array_equal(load_labels(folder / "masks/second.nii.gz").data, labels.data == 9)


def test_refusals(folder: Path, run: Run) -> None:
    write_series(folder / "other", scan_values((20, 18, 9)), AFFINES["axial"])
    run("convert", "labels.nii.gz", "--to", "seg", "--onto", "ct", "-o", "seg.dcm")
    before = sorted(folder.rglob("*"))
    for arguments, named in {
        ("labels.nii.gz", "-o", "out.png"): "out.png",
        ("labels.nii.gz", "-o", "out.dcm"): "--to",
        ("labels.nii.gz", "--to", "png", "-o", "out"): "--to",
        ("labels.nii.gz", "--to", "seg", "-o", "out.dcm"): "--onto",
        ("labels.nii.gz", "--to", "seg", "--onto", "other", "-o", "out.dcm"): "labels.nii.gz",
        ("labels.nii.gz", "--to", "seg", "--onto", "labels.nii.gz", "-o", "out.dcm"): "--onto",
        ("absent.nii.gz", "-o", "out.nii.gz"): "absent.nii.gz",
        ("labels.nii.gz", "-o", "seg.dcm", "--to", "seg", "--onto", "ct"): "--force",
        ("seg.dcm", "-o", "out.nii.gz", "--structures", "spleen"): "spleen",
    }.items():
        outcome = run("convert", *arguments)
        assert outcome.code == 2, arguments
        assert named in outcome.err
        assert outcome.err.count("error:") == 1
    assert sorted(folder.rglob("*")) == before
    assert open_labels(folder / "seg.dcm").data.any()


def test_masks_are_replaced_as_a_whole_with_force(folder: Path, run: Run) -> None:
    command = ("convert", "labels.nii.gz", "--to", "masks", "-o", "masks")
    assert run(*command).code == 0
    assert run(*command).code == 2
    assert run(*command, "--force").code == 0
    assert len(list((folder / "masks").iterdir())) == len(STRUCTURES)
    (folder / "masks/notes.txt").write_text("mine")
    assert run(*command, "--force").code == 2
    assert (folder / "masks/notes.txt").read_text() == "mine"
