"""The made-up pair: believable, reproducible, and different where two real scans differ."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from atlassegfm.core.image import Volume
from atlassegfm.demo.phantom import PhantomPair, make_pair

VALUE = {"liver": 1, "spleen": 2, "right_kidney": 3, "left_kidney": 4, "aorta": 5, "gallbladder": 6}


@pytest.fixture(scope="module")
def pair() -> PhantomPair:
    return make_pair(seed=0)


@pytest.fixture(params=["atlas", "query"])
def scan(request: pytest.FixtureRequest, pair: PhantomPair) -> tuple[Volume, Volume]:
    """Image and labels of one of the two scans."""
    return getattr(pair, request.param), getattr(pair, f"{request.param}_labels")


def centroid_mm(labels: Volume, name: str) -> NDArray[np.float64]:
    centroid: NDArray[np.float64] = labels.grid.voxel_to_world(np.argwhere(labels.data == VALUE[name])).mean(axis=0)
    return centroid


def volume_ml(labels: Volume, name: str) -> float:
    return float((labels.data == VALUE[name]).sum()) * labels.grid.voxel_volume_mm3 / 1000


def test_same_seed_gives_same_voxels(pair: PhantomPair) -> None:
    again = make_pair(seed=0)
    for name in ("atlas", "atlas_labels", "query", "query_labels"):
        first, second = getattr(pair, name), getattr(again, name)
        np.testing.assert_array_equal(first.data, second.data)
        np.testing.assert_array_equal(first.grid.affine, second.grid.affine)


def test_structures_name_the_label_values(pair: PhantomPair) -> None:
    assert {s.name: s.value for s in pair.structures} == VALUE
    assert len({s.color for s in pair.structures}) == len(pair.structures)


def test_labels_are_on_the_grid_of_the_image(scan: tuple[Volume, Volume]) -> None:
    image, labels = scan
    assert labels.grid.matches(image.grid)
    assert image.data.dtype == np.float32
    assert labels.data.dtype == np.uint8
    assert np.isfinite(image.data).all()
    assert image.data.min() >= 0


def test_grids_differ_as_told(pair: PhantomPair) -> None:
    atlas, query = pair.atlas.grid, pair.query.grid
    assert (atlas.axis_codes, query.axis_codes) == ("LAS", "LPS")
    np.testing.assert_allclose(atlas.spacing_mm, (1.8, 1.8, 4.0))
    np.testing.assert_allclose(query.spacing_mm, (1.6, 1.6, 5.0))
    through_plane = query.affine[:3, 2] / query.spacing_mm[2]
    assert np.degrees(np.arccos(through_plane[2])) == pytest.approx(8, abs=0.5)


def test_every_structure_is_there_in_a_human_size(scan: tuple[Volume, Volume]) -> None:
    labels = scan[1]
    assert set(np.unique(labels.data)) == {0, *VALUE.values()}
    for name, least, most in (
        ("liver", 500, 1900),
        ("spleen", 35, 300),
        ("right_kidney", 60, 220),
        ("left_kidney", 60, 220),
        ("aorta", 25, 90),
        ("gallbladder", 6, 50),
    ):
        assert least < volume_ml(labels, name) < most, name


def test_every_structure_is_one_piece(scan: tuple[Volume, Volume]) -> None:
    labels = scan[1]
    for name, value in VALUE.items():
        pieces, count = ndimage.label(labels.data == value)
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.max() > 0.97 * sizes.sum(), (name, count)


def test_sides_and_heights_are_anatomical(scan: tuple[Volume, Volume]) -> None:
    labels = scan[1]
    at = {name: centroid_mm(labels, name) for name in VALUE}
    x, y, z = 0, 1, 2
    # RAS+: x grows to the patient's right, y to the front, z to the head.
    assert at["liver"][x] > at["aorta"][x] > at["spleen"][x]
    assert at["right_kidney"][x] > at["aorta"][x] > at["left_kidney"][x]
    assert at["gallbladder"][x] > at["aorta"][x]
    assert at["gallbladder"][y] > at["liver"][y] > at["right_kidney"][y]
    assert at["spleen"][z] > at["left_kidney"][z] > at["right_kidney"][z]


def test_liver_touches_the_right_kidney_s_capsule(scan: tuple[Volume, Volume]) -> None:
    labels = scan[1]
    beyond_mm = ndimage.distance_transform_edt(labels.data != VALUE["liver"], sampling=labels.grid.spacing_mm)
    assert beyond_mm[labels.data == VALUE["right_kidney"]].min() < 8


def test_query_begins_higher_and_cuts_the_right_kidney(pair: PhantomPair) -> None:
    lowest_atlas = pair.atlas_labels.canonical().data[:, :, :2]
    lowest_query = pair.query_labels.canonical().data[:, :, :2]
    assert not (lowest_atlas == VALUE["right_kidney"]).any()
    assert (lowest_query == VALUE["right_kidney"]).any()
    # At the other end it shows the heart, 3 cm and more above the last label.
    assert not pair.query_labels.canonical().data[:, :, -6:].any()
    assert pair.atlas_labels.canonical().data[:, :, -6:].any()


def test_bodies_lie_apart_and_differ_in_shape(pair: PhantomPair) -> None:
    shift = centroid_mm(pair.query_labels, "aorta") - centroid_mm(pair.atlas_labels, "aorta")
    assert 20 < np.linalg.norm(shift) < 60
    between = [
        np.linalg.norm(centroid_mm(labels, "liver") - centroid_mm(labels, "spleen"))
        for labels in (pair.atlas_labels, pair.query_labels)
    ]
    assert between[1] < 0.97 * between[0]


def test_contrast_is_that_of_a_portal_venous_scan(scan: tuple[Volume, Volume]) -> None:
    image, labels = scan
    mean = {name: float(image.data[labels.data == value].mean()) for name, value in VALUE.items()}
    assert mean["aorta"] > 1.1 * mean["liver"]
    assert mean["liver"] > 2 * mean["gallbladder"]
    air = float(np.median(image.canonical().data[:6, :6]))
    assert 0 < air < 0.1 * mean["liver"]


def test_borders_have_partial_volume(scan: tuple[Volume, Volume]) -> None:
    image, labels = scan
    bladder = labels.data == VALUE["gallbladder"]
    core = image.data[ndimage.binary_erosion(bladder)].mean()
    rim = image.data[bladder & ~ndimage.binary_erosion(bladder)].mean()
    assert rim > 1.2 * core
