"""The correction of fused masks: it learns from errors, and nothing of where or how bright things are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap, signed_distance_mm
from atlassegfm.core.overlap import dice
from atlassegfm.fusion import correction_features
from atlassegfm.fusion.correction import Correction, TrainingSample, make_training_sample
from atlassegfm.fusion.correction_training import train_correction
from atlassegfm.settings import CorrectionSettings
from scenes import straight_grid

GRID = straight_grid((40, 36, 32), (1.0, 1.25, 1.5))
CENTRE, RADIUS_MM = np.array([20.0, 18.0, 16.0]), 11.0
FAST = CorrectionSettings(iterations=3, batch_samples=2, batch_voxels=50)


def ball(radius_mm: float, shift: tuple[float, float, float] = (0, 0, 0), grid: Grid = GRID) -> np.ndarray:
    """Fraction of each voxel inside, from a distance of half a millimetre on either side."""
    ijk = np.moveaxis(np.indices(grid.shape), 0, -1)
    distance = np.linalg.norm((ijk - CENTRE - shift) * grid.spacing_mm, axis=-1)
    return np.clip(radius_mm + 0.5 - distance, 0, 1).astype(np.float32)


def ball_map(radius_mm: float, shift: tuple[float, float, float] = (0, 0, 0)) -> LocalMap:
    return LocalMap.from_full(ball(radius_mm, shift))


def scan_of(inside: np.ndarray, grid: Grid = GRID, bright: float = 100.0, dark: float = 40.0) -> Volume:
    noise = np.random.default_rng(0).normal(0, abs(bright - dark) / 12, inside.shape)
    return Volume((dark + (bright - dark) * inside + noise).astype(np.float32), grid)


def dice_of(one: np.ndarray, other: np.ndarray) -> float:
    return dice(one >= 0.5, other >= 0.5)


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    """A model that draws everything 2 mm too large, prompted with shifted masks."""
    truth = (ball(RADIUS_MM) >= 0.5).astype(np.float32)
    image, answer = scan_of(truth), {1: ball_map(RADIUS_MM + 2)}
    made = []
    for n, shift in enumerate([(1, 0, 0), (0, -1, 0), (0, 0, 1), (-1, 1, 0)]):
        near = correction_features.border_features(image, 1, ball_map(RADIUS_MM, shift), answer)
        assert near is not None
        made.append(make_training_sample(near, 1, answer[1], LocalMap.from_full(truth), seed=(0, n)))
    return made


@pytest.fixture(scope="module")
def trained(samples: list[TrainingSample]) -> Correction:
    made = train_correction(samples, 1, CorrectionSettings(batch_voxels=500), seed=0)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("bright", "dark"), [(100.0, 40.0), (2.0, 1.0), (-50.0, -900.0)], ids=["as in training", "other units", "negative"]
)
def test_systematic_error_is_corrected_on_another_scan(trained: Correction, bright: float, dark: float) -> None:
    """Half of what was learned is applied, and most of the error goes."""
    truth, answer = ball(RADIUS_MM, (1, -1, 1)), ball(RADIUS_MM + 2, (1, -1, 1))
    image, atlas = scan_of(truth, bright=bright, dark=dark), ball_map(RADIUS_MM)
    masks = {1: LocalMap.from_full(answer)}
    corrected = trained.apply(image, 1, atlas, masks).to_full(GRID.shape)
    assert dice_of(corrected, truth) > dice_of(answer, truth) + 0.05
    assert ((corrected >= 0) & (corrected <= 1)).all()
    off = replace(trained, strength=0.0).apply(image, 1, atlas, masks).to_full(GRID.shape)
    np.testing.assert_allclose(off, answer, atol=0.0101)  # probabilities are clipped to 0.01 and 0.99


def test_far_from_borders_nothing_changes(trained: Correction) -> None:
    truth, answer = ball(RADIUS_MM), ball(RADIUS_MM + 2) * np.float32(0.9)
    result = trained.apply(scan_of(truth), 1, LocalMap.from_full(truth), {1: LocalMap.from_full(answer)})
    corrected = result.to_full(GRID.shape)
    error_mm = 0.2 * RADIUS_MM
    to_truth, to_answer = (np.abs(signed_distance_mm(mask >= 0.5, GRID.spacing_mm)) for mask in (truth, answer))
    far = (to_truth > 3.2 * error_mm) & (to_answer > 2.2 * error_mm)
    assert far.any()
    np.testing.assert_array_equal(corrected[far], answer[far])
    assert not np.array_equal(corrected, answer)


def test_mirrored_scans_give_mirrored_results(trained: Correction) -> None:
    truth, answer, atlas = ball(RADIUS_MM, (2, 1, 0)), ball(RADIUS_MM + 2, (2, 1, 0)), ball(RADIUS_MM)
    image = scan_of(truth)

    def result(turn: slice) -> np.ndarray:
        scan = Volume(image.data[turn], GRID)
        masks = {1: LocalMap.from_full(answer[turn])}
        return trained.apply(scan, 1, LocalMap.from_full(atlas[turn]), masks).to_full(GRID.shape)[turn]

    np.testing.assert_allclose(result(slice(None, None, -1)), result(slice(None)), atol=1e-4)


def test_training_depends_on_seed_settings_and_samples_alone(samples: list[TrainingSample]) -> None:
    one, again, other = (train_correction(samples, 1, FAST, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert one != train_correction(samples, 1, replace(FAST, noise=1.0), seed=0)
    assert train_correction([], 1, FAST, seed=0) is None


def test_arrays_keep_everything(samples: list[TrainingSample]) -> None:
    made = train_correction(samples, 2, replace(FAST, strength=0.7), seed=0)
    assert made is not None
    assert Correction.from_arrays(made.arrays()) == made
    assert made != replace(made, strength=0.5)
    # Two embeddings, then both hidden layers and the last one with their biases.
    assert made.parameter_count == 2 * 8 + (len(made.mean) + 8 + 1) * 32 + (32 + 1) * 32 + (32 + 1)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Correction.from_arrays({**made.arrays(), "biases_1": np.zeros(3, np.float32)})
    with pytest.raises(KeyError, match="embedding"):
        Correction.from_arrays({name: one for name, one in made.arrays().items() if name != "embedding"})


def test_masks_without_a_border_stay_as_they_are(trained: Correction) -> None:
    image, truth = scan_of(ball(RADIUS_MM)), ball_map(RADIUS_MM)
    faint = LocalMap.from_full(ball(RADIUS_MM) * np.float32(0.4))
    assert trained.apply(image, 1, truth, {1: faint}) is faint
    assert trained.apply(image, 1, faint, {1: truth}) is truth
    assert trained.apply(image, 1, LocalMap.empty(), {1: LocalMap.empty()}).is_empty
    assert correction_features.border_features(image, 1, faint, {1: truth}) is None


@pytest.mark.parametrize("case", ["one value", "zero", "border of the scan", "one slice"])
def test_degenerate_scans_give_finite_numbers(trained: Correction, case: str) -> None:
    truth, grid = ball(RADIUS_MM), GRID
    if case == "border of the scan":
        truth = ball(RADIUS_MM, (19, 0, 0))
    if case == "one slice":
        truth, grid = truth[:, :, 16:17], Grid((40, 36, 1), GRID.affine)
    image = scan_of(truth, grid)
    if case in ("one value", "zero"):
        image = Volume(np.full(grid.shape, 5.0 if case == "one value" else 0.0, np.float32), grid)
    mask = LocalMap.from_full(truth)
    result = trained.apply(image, 1, mask, {1: mask})
    assert np.isfinite(result.values).all()
    assert min(result.start) >= 0
    assert all(last <= n for last, n in zip(result.stop, grid.shape, strict=True))


def test_large_structures_are_downsampled(trained: Correction, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is nearly that of all voxels, on the same box."""
    truth, answer = ball(RADIUS_MM, (1, 1, 0)), ball_map(RADIUS_MM + 2, (1, 1, 0))
    image, atlas = scan_of(truth), ball_map(RADIUS_MM)
    fine = trained.apply(image, 1, atlas, {1: answer})
    monkeypatch.setattr(correction_features, "_MAX_VOXELS", 8000)
    coarse = trained.apply(image, 1, atlas, {1: answer})
    assert (coarse.start, coarse.values.shape) == (fine.start, fine.values.shape)
    assert not np.array_equal(coarse.values, fine.values)
    assert dice_of(coarse.values, fine.values) > 0.95
    assert dice_of(coarse.to_full(GRID.shape), truth) > dice_of(answer.to_full(GRID.shape), truth) + 0.02


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "strides"),
    [
        ((100, 100, 100), (1.0, 1.0, 1.0), (1, 1, 1)),
        ((200, 200, 50), (1.0, 1.0, 5.0), (2, 2, 1)),
        ((400, 400, 400), (1.0, 1.0, 1.0), (4, 4, 4)),
    ],
)
def test_downsampling_is_along_the_finest_axes(
    shape: tuple[int, int, int], spacing_mm: tuple[float, ...], strides: tuple[int, int, int]
) -> None:
    assert correction_features.block_strides(shape, np.array(spacing_mm)) == strides


def test_upsampling_undoes_downsampling_of_a_ramp() -> None:
    """Apart from the ends, where blocks have no neighbour."""
    ramp = np.arange(11, dtype=np.float32)[:, None, None] * np.ones((1, 6, 5), np.float32)
    coarse = correction_features.downsample(ramp, (2, 1, 1))
    assert coarse.shape == (6, 6, 5)
    np.testing.assert_allclose(coarse[:, 0, 0], [0.5, 2.5, 4.5, 6.5, 8.5, 10])
    np.testing.assert_allclose(correction_features.upsample(coarse, (2, 1, 1), ramp.shape)[1:9], ramp[1:9], atol=1e-5)


def test_two_features_are_of_other_structures() -> None:
    truth = ball_map(RADIUS_MM)
    masks = {1: truth, 2: ball_map(6.0, (14, 0, 0))}
    image = scan_of(ball(RADIUS_MM))
    alone = correction_features.border_features(image, 1, truth, {1: truth})
    beside = correction_features.border_features(image, 1, truth, masks)
    assert alone is not None
    assert beside is not None
    assert (alone.values != beside.values).any(axis=0).sum() == 2  # at the voxel and around it


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
