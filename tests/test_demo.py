"""The embedded pair of scans, and the command ``demo`` on a smaller one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from atlassegfm import demo
from atlassegfm.atlas import Atlas
from atlassegfm.core.image import Volume, load_image, load_labels
from conftest import Run
from scenes import PAPER_GATE, UNREGISTERED, save_demo_pair, straight_grid

#: Neither registration nor training of the gate.
FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]

VALUE = {"liver": 1, "spleen": 2, "right_kidney": 3, "left_kidney": 4, "aorta": 5, "gallbladder": 6}
#: Least and largest volume of an adult's organ, ml.
SIZES_ML = {
    "liver": (500, 1900),
    "spleen": (35, 300),
    "right_kidney": (60, 220),
    "left_kidney": (60, 220),
    "aorta": (25, 90),
    "gallbladder": (6, 50),
}

Scan = tuple[Volume, Volume]


@pytest.fixture(scope="module")
def pair() -> dict[str, Scan]:
    return {
        name: (load_image(demo.PAIR / image), load_labels(demo.PAIR / labels))
        for name, image, labels in (
            ("atlas", demo.ATLAS, demo.LABELS),
            ("query", demo.QUERY, demo.REFERENCE),
        )
    }


def centroid_mm(labels: Volume, name: str) -> NDArray[np.float64]:
    centroid: NDArray[np.float64] = labels.grid.voxel_to_world(np.argwhere(labels.data == VALUE[name])).mean(axis=0)
    return centroid


def test_the_files_are_few_and_small() -> None:
    files = list(demo.PAIR.iterdir())
    assert {path.name for path in files} == {demo.ATLAS, demo.LABELS, demo.QUERY, demo.REFERENCE}
    assert sum(path.stat().st_size for path in files) < 3.2e6


def test_structures_are_named_and_coloured() -> None:
    atlas = Atlas.from_files(demo.PAIR / demo.ATLAS, demo.PAIR / demo.LABELS)
    assert {one.name: one.value for one in atlas.structures} == VALUE
    assert len({one.color for one in atlas.structures}) == len(VALUE)


def test_the_scans_lie_differently(pair: dict[str, Scan]) -> None:
    atlas, query = (pair[name][0].grid for name in ("atlas", "query"))
    assert atlas.shape != query.shape
    assert (atlas.axis_codes, query.axis_codes) == ("LAS", "LPS")
    np.testing.assert_allclose(atlas.spacing_mm, (1.8, 1.8, 4.0), rtol=1e-6)
    np.testing.assert_allclose(query.spacing_mm, (1.6, 1.6, 5.0), rtol=1e-6)
    through_plane = query.affine[:3, 2] / query.spacing_mm[2]
    assert np.degrees(np.arccos(through_plane[2])) == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("which", ["atlas", "query"])
def test_every_structure_is_one_piece_of_a_human_size(pair: dict[str, Scan], which: str) -> None:
    image, labels = pair[which]
    assert labels.grid.matches(image.grid)
    assert image.data.min() >= 0
    assert set(np.unique(labels.data)) == {0, *VALUE.values()}
    for name, (least, most) in SIZES_ML.items():
        inside = labels.data == VALUE[name]
        assert least < inside.sum() * labels.grid.voxel_volume_mm3 / 1000 < most, name
        sizes = np.bincount(ndimage.label(inside)[0].ravel())[1:]
        assert sizes.max() > 0.97 * sizes.sum(), name


@pytest.mark.parametrize("which", ["atlas", "query"])
def test_sides_and_heights_are_anatomical(pair: dict[str, Scan], which: str) -> None:
    at = {name: centroid_mm(pair[which][1], name) for name in VALUE}
    x, y, z = 0, 1, 2
    # RAS+: x grows to the patient's right, y to the front, z to the head.
    assert at["liver"][x] > at["aorta"][x] > at["spleen"][x]
    assert at["right_kidney"][x] > at["aorta"][x] > at["left_kidney"][x]
    assert at["gallbladder"][y] > at["liver"][y] > at["right_kidney"][y]
    assert at["spleen"][z] > at["left_kidney"][z] > at["right_kidney"][z]


def test_the_query_shows_another_part_of_another_patient(pair: dict[str, Scan]) -> None:
    atlas, query = (pair[name][1] for name in ("atlas", "query"))
    lowest = [(labels.canonical().data[:, :, :2] == VALUE["right_kidney"]).any() for labels in (atlas, query)]
    assert lowest == [False, True]
    # At the other end the query shows the heart, 3 cm above the last label.
    highest = [labels.canonical().data[:, :, -6:].any() for labels in (atlas, query)]
    assert highest == [True, False]
    assert 20 < np.linalg.norm(centroid_mm(query, "aorta") - centroid_mm(atlas, "aorta")) < 60
    apart = [float(np.linalg.norm(centroid_mm(one, "liver") - centroid_mm(one, "spleen"))) for one in (atlas, query)]
    assert apart[1] < 0.97 * apart[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current folder, with the small scenes in place of the embedded pair."""
    pair = save_demo_pair(tmp_path / "pair", straight_grid((24, 20, 18), (4.0, 4.0, 4.0)))
    monkeypatch.setattr(demo, "PAIR", pair)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_demo(folder: Path, run: Run) -> None:
    outcome = run("demo", "-o", "demo", *FAST)
    assert outcome.code == 0, outcome.err
    assert {str(path.relative_to(folder / "demo")) for path in (folder / "demo").rglob("*") if path.is_file()} == {
        *(f"data/{name}" for name in (demo.ATLAS, demo.LABELS, demo.QUERY, demo.REFERENCE)),
        *(
            f"result/query/{name}"
            for name in ("segmentation.nii.gz", "colors.ctbl", "labels.txt", "run.json", "status.json")
        ),
        "demo.png",
    }
    for text in ("atlas only", "model", "fused", "liver", "mean", "demo/demo.png"):
        assert text in outcome.out
    before = (folder / "demo/result/query/segmentation.nii.gz").read_bytes()
    repeat = outcome.out.rstrip().splitlines()[-1]
    assert repeat.startswith("repeat    atlassegfm segment --atlas demo/data/atlas.nii.gz")
    again = run(*repeat.split()[2:])
    assert again.code == 0, again.err
    assert (folder / "demo/result/query/segmentation.nii.gz").read_bytes() == before


def test_demo_as_json_replaces_an_earlier_one(folder: Path, run: Run) -> None:
    for _ in range(2):
        outcome = run("demo", "-o", "demo", *FAST, "--no-picture", "--json", "--quiet")
        assert (outcome.code, outcome.err) == (0, "")
    scores = outcome.json["dice"]
    assert [one["name"] for one in scores["structures"]] == ["liver", "kidney", "node"]
    assert scores["mean"]["fused"] == pytest.approx(np.mean([one["fused"] for one in scores["structures"]]), abs=1e-4)
    assert not (folder / "demo/demo.png").exists()


def test_demo_without_the_extra(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = run("demo", "-o", "demo")
    assert outcome.code == 2
    assert "the extra 'report'" in outcome.err
    assert "--no-picture" in outcome.err
    assert not list(folder.iterdir())


def test_demo_keeps_the_files_of_others(folder: Path, run: Run) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "patients.csv").write_text("1")
    outcome = run("demo", "-o", ".", *FAST)
    assert outcome.code == 2
    assert "patients.csv" in outcome.err
    assert [path.name for path in folder.rglob("*")] == ["data", "patients.csv"]
