"""Reading the annotated scan: one grid, canonical order, names from where they are."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from atlassegfm.atlas import Atlas, canonical_scan
from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, save_volume
from conftest import ORIENTATIONS
from scenes import ATLAS, STRUCTURES, straight_grid

GRID = straight_grid((12, 10, 8), (8.0, 8.0, 8.0))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    atlas, labels = tmp_path / "atlas.nii.gz", tmp_path / "labels.nii.gz"
    save_volume(ATLAS.scan(GRID), atlas)
    save_volume(ATLAS.labels(GRID), labels)
    return atlas, labels


def names_of(context: Atlas) -> list[str]:
    return [structure.name for structure in context.structures]


def test_files_become_canonical(tmp_path: Path) -> None:
    flipped = Grid(GRID.shape, np.diag([-1.0, -1, 1, 1]) @ GRID.affine)
    save_volume(ATLAS.scan(flipped), tmp_path / "atlas.nrrd")
    save_volume(ATLAS.labels(flipped), tmp_path / "labels.mha")
    context = Atlas.from_files(tmp_path / "atlas.nrrd", tmp_path / "labels.mha")
    assert context.image.grid.axis_codes == "RAS"
    assert context.labels.grid.matches(context.image.grid)
    assert context.image.data.dtype == np.float32
    assert context.image.data.flags.c_contiguous
    assert context.labels.data.flags.c_contiguous
    np.testing.assert_array_equal(context.labels.data, ATLAS.labels(context.image.grid).data)
    assert context.values == (1, 7, 12)
    assert names_of(context) == ["label_1", "label_7", "label_12"]


@pytest.mark.parametrize("codes", ["LPS", "LAS", "SAR", "PIR"])
def test_labels_in_another_array_order(tmp_path: Path, codes: str, files: tuple[Path, Path]) -> None:
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    inverse = inv_ornt_aff(turn, GRID.shape)
    shape = tuple(GRID.shape[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3))
    other = Grid(shape, GRID.affine @ inverse)
    assert other.axis_codes == codes
    save_volume(ATLAS.labels(GRID).turned_to(other), tmp_path / "turned.nii.gz")
    context = Atlas.from_files(files[0], tmp_path / "turned.nii.gz")
    np.testing.assert_array_equal(context.labels.data, ATLAS.labels(GRID).data)


def test_labels_elsewhere(tmp_path: Path, files: tuple[Path, Path]) -> None:
    affine = GRID.affine.copy()
    affine[2, 3] += 12.5
    save_volume(Volume(ATLAS.labels(GRID).data, Grid(GRID.shape, affine)), tmp_path / "moved.nii.gz")
    with pytest.raises(InputError) as caught:
        Atlas.from_files(files[0], tmp_path / "moved.nii.gz")
    assert str(caught.value) == (
        f"{tmp_path}/moved.nii.gz: not on the voxels of {files[0]}: its corners lie up to 12.5 mm from the atlas' "
        "corners; resample the labels onto the atlas with nearest neighbour, or give the scan they were drawn on"
    )


def test_labels_of_another_shape(tmp_path: Path, files: tuple[Path, Path]) -> None:
    save_volume(ATLAS.labels(GRID.crop((0, 0, 0), (12, 10, 6))), tmp_path / "short.nii.gz")
    with pytest.raises(
        InputError, match="has 12 x 10 x 6 voxels instead of 12 x 10 x 8, and its corners lie up to 16.0"
    ):
        Atlas.from_files(files[0], tmp_path / "short.nii.gz")


def test_names_file_comes_first(tmp_path: Path, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    atlas, labels = files
    save_volume(ATLAS.labels(GRID), labels, structures=STRUCTURES[1:])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "leber": 1, "niere": 7}}))
    assert names_of(Atlas.from_files(atlas, labels)) == ["leber", "kidney", "node"]
    names = tmp_path / "names.txt"
    names.write_text("1 foie 1 2 3 0\n7 rein\n99 rate\n")
    with caplog.at_level(logging.WARNING):
        context = Atlas.from_files(atlas, labels, names)
    assert names_of(context) == ["foie", "rein", "node"]
    assert context.structures[0].color == (1, 2, 3)
    assert context.structures[1].color == STRUCTURES[1].color
    assert f"{names}: names values that {labels} does not have: 99 (rate)" in caplog.text


def test_names_file_that_cannot_be_used(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="no such file; expected a names file"):
        Atlas.from_files(*files, tmp_path / "absent.json")


def test_found_dataset_json_that_cannot_be_used(
    tmp_path: Path, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"whole": [1, 7], "liver": 1}}))
    with caplog.at_level(logging.WARNING):
        context = Atlas.from_files(*files)
    assert names_of(context) == ["label_1", "label_7", "label_12"]
    assert "dataset.json: 'whole': [1, 7] is not a label" in caplog.text
    assert "its names are not used" in caplog.text


def test_volumes_from_memory() -> None:
    labels = Volume(ATLAS.labels(GRID).data.astype(float), GRID)
    context = Atlas.from_volumes(ATLAS.scan(GRID), labels, STRUCTURES[:1])
    assert context.labels.data.dtype == np.uint8
    assert names_of(context) == ["liver", "label_7", "label_12"]


def test_volumes_that_cannot_be_used() -> None:
    scan, labels = ATLAS.scan(GRID), ATLAS.labels(GRID)

    def with_first(volume: Volume, value: float) -> Volume:
        data = volume.data.astype(np.float64)
        data[0, 0, 0] = value
        return Volume(data, volume.grid)

    assert np.isfinite(Atlas.from_volumes(with_first(scan, np.nan), labels).image.data).all()
    with pytest.raises(InputError, match="the atlas: "):
        Atlas.from_volumes(Volume(np.full(GRID.shape, np.nan), GRID), labels)
    with pytest.raises(InputError, match="the atlas: all voxels have the value 3"):
        Atlas.from_volumes(Volume(np.full(GRID.shape, 3.0), GRID), labels)
    with pytest.raises(InputError, match="not whole numbers"):
        Atlas.from_volumes(scan, with_first(labels, 0.5))
    with pytest.raises(InputError, match="the value -1"):
        Atlas.from_volumes(scan, with_first(labels, -1))
    with pytest.raises(InputError, match="is empty"):
        Atlas.from_volumes(scan, Volume(np.zeros(GRID.shape), GRID))
    with pytest.raises(InputError, match="the labels: not on the voxels of the atlas"):
        Atlas.from_volumes(scan, ATLAS.labels(straight_grid((12, 10, 8), (7.0, 8.0, 8.0))))


def test_large_label_values() -> None:
    data = ATLAS.labels(GRID).data.astype(np.uint32)
    data[data == 12] = 614_454_277  # as in the Allen mouse atlas
    context = Atlas.from_volumes(ATLAS.scan(GRID), Volume(data, GRID))
    assert context.values == (1, 7, 614_454_277)


def test_context_checks_itself() -> None:
    scan = ATLAS.scan(GRID)
    with pytest.raises(ValueError, match=r"Atlas\.from_volumes"):
        Atlas(scan, ATLAS.labels(GRID.crop((0, 0, 0), (6, 6, 6))), STRUCTURES)


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_canonical_scan_does_not_depend_on_the_order(affine: np.ndarray) -> None:
    """The affine rounded to 32 bits, as files hold it, names another corner in each array order."""
    affine = affine.copy()
    affine[:3, 3] += (101.123, -217.456, 803.789)
    straight = Grid((7, 8, 9), affine).canonical()
    scans = []
    for flips in ([1, 1, 1], [-1, -1, 1], [1, -1, -1]):
        flip = np.diag([*flips, 1.0])
        flip[:3, 3] = [(n - 1) * (sign < 0) for n, sign in zip(straight.shape, flips, strict=True)]
        stored = Grid(straight.shape, (straight.affine @ flip).astype(np.float32).astype(np.float64))
        data = np.arange(straight.size, dtype=np.float32).reshape(straight.shape)[
            tuple(slice(None, None, s) for s in flips)
        ]
        scans.append(canonical_scan(Volume(data, stored), "scan"))
    for scan in scans[1:]:
        np.testing.assert_array_equal(scan.grid.affine, scans[0].grid.affine)
        np.testing.assert_array_equal(scan.data, scans[0].data)
    assert scans[0].grid.distance_mm(straight) < 0.01 * straight.spacing_mm.min()


def test_the_scan_given_as_its_own_labels_is_refused(tmp_path):
    data = np.zeros((6, 6, 6), np.uint8)
    data[2:4, 2:4, 2:4] = 7
    scan = tmp_path / "scan.nii.gz"
    save_volume(Volume(data, Grid((6, 6, 6), np.eye(4))), scan)
    with pytest.raises(InputError, match=r"scan\.nii\.gz: these are the voxels of the scan itself"):
        Atlas.from_files(scan, scan)
