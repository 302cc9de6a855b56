"""The correction of fused masks: that it learns what errors teach, and nothing of where or how bright things are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from scipy import ndimage

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap, signed_distance_mm
from atlassegfm.fusion import correction
from atlassegfm.fusion.correction import Correction, Lesson, lesson, train_correction
from scenes import straight_grid

GRID = straight_grid((40, 36, 32), (1.0, 1.25, 1.5))
CENTRE, RADIUS_MM = np.array([20.0, 18.0, 16.0]), 11.0


def ball(radius_mm: float, shift: tuple[float, float, float] = (0, 0, 0), grid: Grid = GRID) -> np.ndarray:
    """Share of each voxel inside, from a distance of half a millimetre on either side."""
    ijk = np.moveaxis(np.indices(grid.shape), 0, -1)
    distance = np.linalg.norm((ijk - CENTRE - shift) * grid.spacing_mm, axis=-1)
    return np.clip(radius_mm + 0.5 - distance, 0, 1).astype(np.float32)


def scan_of(inside: np.ndarray, grid: Grid = GRID, bright: float = 100.0, dark: float = 40.0) -> Volume:
    noise = np.random.default_rng(0).normal(0, 5, inside.shape)
    return Volume((dark + (bright - dark) * inside + noise).astype(np.float32), grid)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one >= 0.5, other >= 0.5
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def lessons_of(image: Volume, truth: np.ndarray, grown_mm: float) -> list[Lesson]:
    """A model that draws everything too large by the same, prompted with shifted masks."""
    answer = {1: LocalMap.from_full(ball(RADIUS_MM + grown_mm))}
    found = []
    for n, shift in enumerate([(1, 0, 0), (0, -1, 0), (0, 0, 1), (-1, 1, 0)]):
        atlas = LocalMap.from_full(ball(RADIUS_MM, shift))
        one = lesson(image, 1, atlas, answer, LocalMap.from_full(truth), seed=(0, n))
        assert one is not None
        found.append(one)
    return found


@pytest.fixture(scope="module")
def trained() -> Correction:
    truth = (ball(RADIUS_MM) >= 0.5).astype(np.float32)
    made = train_correction(lessons_of(scan_of(truth), truth, 2.0), 1, seed=0)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("bright", "dark"), [(100.0, 40.0), (2.0, 1.0), (-50.0, -900.0)], ids=["as it was", "other units", "below zero"]
)
def test_a_habit_of_the_model_is_unlearned_on_another_scan(trained: Correction, bright: float, dark: float) -> None:
    """The model draws 2 mm too large; half of what was learned is applied, and most of the error goes."""
    truth = ball(RADIUS_MM, (1, -1, 1))
    noise = 5 * abs(bright - dark) / 60
    image = Volume(
        (dark + (bright - dark) * truth + np.random.default_rng(1).normal(0, noise, truth.shape)).astype(np.float32),
        GRID,
    )
    answer = ball(RADIUS_MM + 2, (1, -1, 1))
    result = trained.apply(image, 1, LocalMap.from_full(ball(RADIUS_MM)), {1: LocalMap.from_full(answer)})
    corrected = result.to_full(GRID.shape)
    assert dice(corrected, truth) > dice(answer, truth) + 0.05
    assert ((corrected >= 0) & (corrected <= 1)).all()


def test_far_from_borders_nothing_changes(trained: Correction) -> None:
    truth = ball(RADIUS_MM)
    answer = LocalMap.from_full(ball(RADIUS_MM + 2) * np.float32(0.9))
    result = trained.apply(scan_of(truth), 1, LocalMap.from_full(truth), {1: answer}).to_full(GRID.shape)
    error_mm = 0.2 * RADIUS_MM
    distances = [
        np.abs(signed_distance_mm(mask >= 0.5, GRID.spacing_mm)) for mask in (truth, answer.to_full(GRID.shape))
    ]
    far = (distances[0] > 3.2 * error_mm) & (distances[1] > 2.2 * error_mm)
    assert far.any()
    np.testing.assert_array_equal(result[far], answer.to_full(GRID.shape)[far])
    assert not np.array_equal(result, answer.to_full(GRID.shape))


def test_mirrored_scans_give_mirrored_results(trained: Correction) -> None:
    truth, answer, atlas = ball(RADIUS_MM, (2, 1, 0)), ball(RADIUS_MM + 2, (2, 1, 0)), ball(RADIUS_MM)
    image = scan_of(truth)

    def result(turn: slice) -> np.ndarray:
        scan = Volume(image.data[turn], GRID)
        masks = {1: LocalMap.from_full(answer[turn])}
        return trained.apply(scan, 1, LocalMap.from_full(atlas[turn]), masks).to_full(GRID.shape)[turn]

    np.testing.assert_allclose(result(slice(None, None, -1)), result(slice(None)), atol=1e-4)


def test_same_lessons_same_network_other_seed_another(trained: Correction) -> None:
    truth = (ball(RADIUS_MM) >= 0.5).astype(np.float32)
    lessons = lessons_of(scan_of(truth), truth, 2.0)
    assert train_correction(lessons, 1, seed=0) == trained
    assert train_correction(lessons, 1, seed=1) != trained
    assert train_correction([], 1, seed=0) is None
    assert hash(train_correction(lessons, 1, seed=0)) == hash(trained)


def test_comes_back_from_its_arrays(trained: Correction) -> None:
    assert Correction.of_arrays(trained.arrays()) == trained
    # One structure: its code, then both hidden layers and the last one with their biases.
    features = len(trained.mean)
    assert trained.fitted == 8 + (features + 8 + 1) * 32 + (32 + 1) * 32 + (32 + 1)
    arrays: Mapping[str, np.ndarray] = {**trained.arrays(), "biases_1": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="are no correction's"):
        Correction.of_arrays(arrays)
    with pytest.raises(KeyError):
        Correction.of_arrays({name: one for name, one in trained.arrays().items() if name != "codes"})


def test_nothing_to_look_at(trained: Correction) -> None:
    """Masks without a voxel inside come back as they are, and teach nothing."""
    image, truth = scan_of(ball(RADIUS_MM)), LocalMap.from_full(ball(RADIUS_MM))
    faint = LocalMap.from_full(ball(RADIUS_MM) * np.float32(0.4))
    assert trained.apply(image, 1, truth, {1: faint}) is faint
    assert trained.apply(image, 1, faint, {1: truth}) is truth
    assert trained.apply(image, 1, LocalMap.empty(), {1: LocalMap.empty()}).is_empty
    assert lesson(image, 1, faint, {1: truth}, truth, seed=(0,)) is None


@pytest.mark.parametrize("bright", [5.0, 0.0], ids=["one value", "zero"])
def test_a_scan_without_contrast_is_no_error(trained: Correction, bright: float) -> None:
    image = Volume(np.full(GRID.shape, bright, np.float32), GRID)
    mask = LocalMap.from_full(ball(RADIUS_MM))
    result = trained.apply(image, 1, mask, {1: mask})
    assert np.isfinite(result.values).all()


def test_the_border_of_the_scan_is_no_error(trained: Correction) -> None:
    shift = (19, 0, 0)
    truth = ball(RADIUS_MM, shift)
    result = trained.apply(
        scan_of(truth), 1, LocalMap.from_full(truth), {1: LocalMap.from_full(ball(RADIUS_MM + 2, shift))}
    )
    assert all(first >= 0 and last <= n for first, last, n in zip(result.start, result.stop, GRID.shape, strict=True))
    assert np.isfinite(result.values).all()
    single = Grid((40, 36, 1), GRID.affine)
    flat = LocalMap((0, 0, 0), ball(RADIUS_MM)[:, :, 16:17])
    assert np.isfinite(trained.apply(scan_of(flat.values, single), 1, flat, {1: flat}).values).all()


def test_large_structures_are_looked_at_coarsely(trained: Correction, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is nearly that of all voxels, on the same box."""
    truth, answer = ball(RADIUS_MM, (1, 1, 0)), LocalMap.from_full(ball(RADIUS_MM + 2, (1, 1, 0)))
    image, atlas = scan_of(truth), LocalMap.from_full(ball(RADIUS_MM))
    fine = trained.apply(image, 1, atlas, {1: answer})
    monkeypatch.setattr(correction, "_MOST_VOXELS", 8000)
    coarse = trained.apply(image, 1, atlas, {1: answer})
    assert coarse.start == fine.start
    assert coarse.values.shape == fine.values.shape
    assert not np.array_equal(coarse.values, fine.values)
    assert dice(coarse.values, fine.values) > 0.95
    assert dice(coarse.to_full(GRID.shape), truth) > dice(answer.to_full(GRID.shape), truth) + 0.02


def test_blocks_are_taken_along_the_finest_axes() -> None:
    assert correction.strides_of((100, 100, 100), np.array([1.0, 1.0, 1.0])) == (1, 1, 1)
    assert correction.strides_of((200, 200, 50), np.array([1.0, 1.0, 5.0])) == (2, 2, 1)
    assert correction.strides_of((400, 400, 400), np.array([1.0, 1.0, 1.0])) == (4, 4, 4)


def test_block_means_and_their_spreading_are_about_the_same_places() -> None:
    """A ramp comes back as the ramp, apart from the ends where blocks have no neighbour."""
    ramp = np.arange(11, dtype=np.float32)[:, None, None] * np.ones((1, 6, 5), np.float32)
    thin = correction._thinned(ramp, (2, 1, 1))
    assert thin.shape == (6, 6, 5)
    np.testing.assert_allclose(thin[:, 0, 0], [0.5, 2.5, 4.5, 6.5, 8.5, 10])
    np.testing.assert_allclose(correction._spread(thin, (2, 1, 1), ramp.shape)[1:9], ramp[1:9], atol=1e-5)


def test_other_structures_count(trained: Correction) -> None:
    """A network that was not taught about neighbours is still told of them: its inputs differ."""
    truth = ball(RADIUS_MM)
    masks = {1: LocalMap.from_full(truth), 2: LocalMap.from_full(ball(6.0, (14, 0, 0)))}
    arguments = (scan_of(truth), 1, LocalMap.from_full(truth))
    alone = lesson(*arguments, {1: masks[1]}, masks[1], seed=(0,))
    beside = lesson(*arguments, masks, masks[1], seed=(0,))
    assert alone is not None
    assert beside is not None
    differing = (alone.features != beside.features).any(axis=0)
    assert differing.sum() == 2  # what is there of others, here and around


def test_signed_distances() -> None:
    mask = ball(RADIUS_MM) >= 0.5
    signed = signed_distance_mm(mask, GRID.spacing_mm)
    assert ((signed > 0) == mask).all()
    ijk = np.moveaxis(np.indices(GRID.shape), 0, -1)
    expected = RADIUS_MM - np.linalg.norm((ijk - CENTRE) * GRID.spacing_mm, axis=-1)
    assert np.abs(signed - expected).max() < 1.2
    assert np.isneginf(signed_distance_mm(np.zeros((3, 3, 3), bool), GRID.spacing_mm)).all()
    assert np.isposinf(signed_distance_mm(np.ones((3, 3, 3), bool), GRID.spacing_mm)).all()
    # A cruder oracle: to the nearest centre of the other kind, less half the finest spacing.
    outside = ndimage.distance_transform_edt(~mask, GRID.spacing_mm)
    np.testing.assert_allclose(signed[~mask], 0.5 - outside[~mask], atol=1e-5)
