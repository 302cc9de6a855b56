"""The gate by hand and by oracle, its training, and the label map against a dense arg-max."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from atlassegfm.core.mask import LocalMap
from atlassegfm.fusion import gate as module
from atlassegfm.fusion.gate import Gate, GateSample, fuse, train_gate
from atlassegfm.fusion.label_map import label_map
from atlassegfm.settings import FusionSettings

Array = np.ndarray

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EMPTY = LocalMap.empty()


def local(values: Array, start: Sequence[int] = (0, 0, 0)) -> LocalMap:
    i, j, k = start
    return LocalMap((i, j, k), np.asarray(values, np.float32))


def random_mask(shape: Sequence[int], seed: int) -> Array:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def ball(shift: Sequence[float] = (0, 0, 0), radius: float = 6.0, size: int = 21) -> Array:
    """Soft ball: 1 well inside, 1/2 on its surface."""
    ijk = np.moveaxis(np.indices((size,) * 3), 0, -1) - (size - 1) / 2
    return np.clip(radius - np.linalg.norm(ijk - np.array(shift), axis=-1) + 0.5, 0, 1).astype(np.float32)


def sample(atlas: Array, model: Array, truth: Array) -> GateSample:
    return GateSample(local(atlas), local(model), local(truth))


def weight_map(gate: Gate, atlas: Array, model: Array, device: str = "cpu") -> Array:
    tensors = (torch.from_numpy(np.asarray(one, np.float32)).to(device) for one in (atlas, model))
    values: Array = gate._weight_map(*tensors).cpu().numpy()
    return values


def sigmoid(value: Array | float) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.asarray(value))))


TRUTH = (ball() >= 0.5).astype(np.float32)
WRONG, LEFT, RIGHT = ball((4, 0, 0)), ball((3, 0, 0)), ball((-3, 0, 0))
MODEL_RIGHT = sample(WRONG, TRUTH, TRUTH)
ATLAS_RIGHT = sample(TRUTH, WRONG, TRUTH)
MIDDLE_RIGHT = sample(LEFT, RIGHT, (LEFT + RIGHT >= 1).astype(np.float32))


class TestGate:
    def test_equations_by_hand(self) -> None:
        # One voxel: every pooled value is the voxel itself. g = (0.1 + 0.2 + 0.3) 0.8 + (-0.4 + 0 + 0.9) 0.2 - 0.5
        # = 0.48 + 0.1 - 0.5 = 0.08; K = 1 / (1 + exp(-0.08)) = 0.51999; M = 0.2 + K 0.6 = 0.51199.
        gate = Gate((3, 5, 7), (0.1, 0.2, 0.3, -0.4, 0.0, 0.9), -0.5, 0.5)
        fused = fuse(local([[[0.8]]], (2, 3, 4)), local([[[0.2]]], (2, 3, 4)), gate)
        assert fused.start == (2, 3, 4)
        assert fused.values == pytest.approx(0.2 + sigmoid(0.08) * 0.6, abs=1e-6)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("kernels", [(3, 5, 7), (7, 3), (1, 9), (5, 5)])
    def test_weights_are_as_by_scipy(self, kernels: tuple[int, ...], device: str) -> None:
        random = np.random.default_rng(3)
        masks = [random.random((9, 1, 12)).astype(np.float32) for _ in range(2)]
        weights = random.normal(0, 1, 2 * len(kernels))
        pooled = [ndimage.maximum_filter(mask, kernel, mode="constant") for mask in masks for kernel in kernels]
        expected = sigmoid(0.3 + sum(weight * one for weight, one in zip(weights, pooled, strict=True)))
        gate = Gate(kernels, tuple(weights.tolist()), 0.3, 0.5)
        np.testing.assert_allclose(weight_map(gate, *masks, device), expected, rtol=1e-5)
        fused = fuse(local(masks[0]), local(masks[1]), gate, device=device).values
        np.testing.assert_allclose(fused, masks[1] + expected * (masks[0] - masks[1]), rtol=1e-5)

    @pytest.mark.parametrize(("weight", "expected"), [(0.0, 0.01), (0.25, 0.25), (0.5, 0.5), (1.0, 0.99)])
    def test_constant_gate(self, weight: float, expected: float) -> None:
        gate = Gate.constant(weight)
        assert gate.start == weight
        one, other = random_mask((3, 4, 5), 0), random_mask((3, 4, 5), 1)
        np.testing.assert_allclose(weight_map(gate, one, other), expected, rtol=1e-5)

    def test_wrong_number_of_weights(self) -> None:
        with pytest.raises(ValueError, match=r"2 .* 3 "):
            Gate((3, 5, 7), (0.0, 0.0), 0.0, 0.5)

    def test_describe(self) -> None:
        assert "50%" in Gate.constant(0.5).describe()
        gate = train_gate([MODEL_RIGHT], FusionSettings(iterations=1))
        assert gate.parameter_count == 7
        assert "1 simulated mask" in gate.describe()
        smoothed = replace(gate, samples=2, smoothing=(0.0, 0.04, 0.08))
        assert "2 simulated masks" in smoothed.describe()
        assert "2 of 3" in smoothed.describe()
        assert smoothed.as_the_paper() == replace(gate, samples=2)


class TestFuse:
    GATE = Gate((3, 5, 7), (0.4, -0.2, 0.3, 0.1, 0.5, -0.6), 0.2, 0.5)

    def test_result_lies_between_both(self) -> None:
        one, other = random_mask((6, 7, 8), 0), random_mask((6, 7, 8), 1)
        fused = fuse(local(one), local(other), self.GATE).values
        assert fused.dtype == np.float32
        assert ((fused >= np.minimum(one, other)) & (fused <= np.maximum(one, other))).all()
        np.testing.assert_array_equal(fuse(local(one), local(one), self.GATE).values, one)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ((0, 0, 0), (8, 9, 10)),  # disjoint, far apart, both at the border of the scan
            ((2, 3, 4), (3, 3, 3)),  # overlapping
            ((5, 5, 5), (5, 5, 8)),  # next to each other
        ],
    )
    def test_boxes_are_as_the_whole_grid(self, one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
        shape = (12, 13, 14)
        atlas, model = local(random_mask((4, 4, 3), 0), one), local(random_mask((3, 4, 4), 1), other)
        fused = fuse(atlas, model, self.GATE)
        everywhere = fuse(local(atlas.to_full(shape)), local(model.to_full(shape)), self.GATE)
        np.testing.assert_allclose(fused.to_full(shape), everywhere.values, atol=1e-7)
        assert fused.start == tuple(np.minimum(atlas.start, model.start))
        assert fused.stop == tuple(np.maximum(atlas.stop, model.stop))

    def test_empty_masks(self) -> None:
        mask, gate = local(np.ones((2, 2, 2)), (3, 4, 5)), Gate.constant(0.25)
        assert fuse(mask, EMPTY, gate).start == (3, 4, 5)
        np.testing.assert_allclose(fuse(mask, EMPTY, gate).values, 0.25, rtol=1e-5)
        np.testing.assert_allclose(fuse(EMPTY, mask, gate).values, 0.75, rtol=1e-5)
        assert fuse(EMPTY, EMPTY, gate).is_empty


class TestTraining:
    @pytest.mark.parametrize(
        ("one", "start"),
        [(MODEL_RIGHT, 0.25), (ATLAS_RIGHT, 0.75), (MIDDLE_RIGHT, 0.5)],
        ids=["model", "atlas", "middle"],
    )
    def test_starts_where_the_right_mask_is(self, one: GateSample, start: float) -> None:
        """Of equal starts the next to 1/2; at the paper's learning rate the gate stays there."""
        settings = FusionSettings()
        assert (settings.learning_rate, settings.iterations, settings.kernels) == (1e-5, 100, (3, 5, 7))
        gate = train_gate([one], settings)
        assert (gate.start, gate.samples) == (start, 1)
        initial = Gate.constant(start)
        moved = np.abs(np.array((*gate.weights, gate.bias)) - np.array((*initial.weights, initial.bias)))
        assert 0.5e-3 < moved.max() <= 1.01e-3
        assert gate.dice_after > gate.dice_before

    def test_start_is_the_best_of_the_mean_over_all(self) -> None:
        def start(*samples: GateSample) -> float:
            return train_gate(samples, FusionSettings(iterations=0)).start

        assert start(MODEL_RIGHT, ATLAS_RIGHT, MODEL_RIGHT) <= 0.25
        assert start(ATLAS_RIGHT, MODEL_RIGHT, ATLAS_RIGHT) >= 0.75
        assert start(sample(0.9 * TRUTH, TRUTH, TRUTH)) == 0.5

    @pytest.mark.parametrize(("one", "start"), [(MODEL_RIGHT, 0.9), (ATLAS_RIGHT, 0.1)], ids=["model", "atlas"])
    def test_long_training_finds_the_right_mask_from_the_wrong_one(self, one: GateSample, start: float) -> None:
        gate = train_gate([one], FusionSettings(start=start, learning_rate=0.1, iterations=200))
        assert gate.dice_after > max(gate.dice_before + 0.05, 0.97)

    def test_learns_where_to_trust_which_mask(self) -> None:
        # The atlas has an island the model does not see; else the model is right. No constant does this, but the
        # model's neighbourhood tells both cases apart.
        truth, atlas, model = (np.zeros((30, 12, 12), np.float32) for _ in range(3))
        truth[3:9, 3:9, 3:9] = model[3:9, 3:9, 3:9] = 1
        atlas[5:11, 3:9, 3:9] = 1
        atlas[22:27, 3:9, 3:9] = truth[22:27, 3:9, 3:9] = 1
        gate = train_gate([sample(atlas, model, truth)], FusionSettings(learning_rate=0.1, iterations=300))
        weights = weight_map(gate, atlas, model)
        assert weights[22:27, 3:9, 3:9].min() > 0.9
        assert weights[3:5, 3:9, 3:9].max() < 0.1
        np.testing.assert_array_equal(fuse(local(atlas), local(model), gate).values >= 0.5, truth >= 0.5)

    def test_gradient_is_as_by_autograd(self) -> None:
        one = sample(WRONG, ball((0, 2, 0), 5), TRUTH)
        data = module._prepare(one, (3, 5), "cpu")
        assert data is not None
        values = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
        atlas, model, truth = (
            torch.tensor(part.values, dtype=torch.float64) for part in (one.atlas, one.model, one.truth)
        )
        logit = values[4] + sum(
            values[2 * n + m] * torch.nn.functional.max_pool3d(mask[None], kernel, 1, kernel // 2)[0]
            for n, mask in enumerate((atlas, model))
            for m, kernel in enumerate((3, 5))
        )
        fused = model + torch.sigmoid(logit) * (atlas - model)
        dice = 2 * (fused * truth).sum() / (fused.sum() + truth.sum())
        dice.backward()
        score, gradient = module._soft_dice(data, values.detach())
        assert score == pytest.approx(float(dice.detach()), rel=1e-5)
        assert values.grad is not None
        np.testing.assert_allclose(gradient.numpy(), values.grad.numpy(), rtol=1e-4, atol=1e-7)

    def test_chunks_and_boxes_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = FusionSettings(iterations=20)
        whole = train_gate([MODEL_RIGHT, MIDDLE_RIGHT], settings)
        monkeypatch.setattr(module, "_CHUNK", 100)
        chunks = train_gate([MODEL_RIGHT, MIDDLE_RIGHT], settings)
        assert chunks.weights == pytest.approx(whole.weights, abs=1e-8)
        cut = [GateSample(*(LocalMap.from_full(part) for part in (WRONG, TRUTH, TRUTH))), MIDDLE_RIGHT]
        assert train_gate(cut, settings).dice_after == pytest.approx(whole.dice_after, rel=1e-6)

    @pytest.mark.parametrize("device", DEVICES)
    def test_default_gate_trains_on_some_voxels_and_the_papers_on_all(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        samples = [MODEL_RIGHT, ATLAS_RIGHT, MIDDLE_RIGHT]
        default, paper = (FusionSettings(gate=kind, start=0.5, iterations=10) for kind in ("default", "paper"))
        of_all = train_gate(samples, paper, device=device)
        assert train_gate(samples, default, device=device) == of_all
        monkeypatch.setattr(module, "_MOST_VOXELS", 500)
        full, some = (module._prepare(MODEL_RIGHT, (3, 5, 7), device, limit) for limit in (None, 500))
        assert full is not None
        assert some is not None
        assert (some.step.numel(), some.weight * 500) == (500, full.step.numel())
        assert full.step.numel() > 1000
        # Sums over those drawn stand for sums over all.
        for weight in (0.0, 0.5, 1.0):
            assert module._constant_dice(some, weight) == pytest.approx(module._constant_dice(full, weight), abs=0.02)
        parameters = torch.zeros(7, dtype=torch.float64)
        (dice, gradient), (exact, exact_gradient) = (module._soft_dice(one, parameters) for one in (some, full))
        assert dice == pytest.approx(exact, abs=0.02)
        assert torch.allclose(gradient, exact_gradient, atol=0.02)
        assert train_gate(samples, paper, device=device) == of_all
        of_some = train_gate(samples, default, device=device)
        assert of_some != of_all
        assert of_some.dice_after == pytest.approx(of_all.dice_after, abs=0.02)
        assert train_gate(samples, default, device=device) == of_some

    def test_truth_outside_both_masks_counts(self) -> None:
        truth = np.zeros((4, 4, 9), np.float32)
        truth[:, :, 6:] = truth[:, :, :2] = 1
        # The model holds 32 of 80 voxels, the atlas 16 of them: Dice 2 * 32 / 112 for K = 0, 2 * 16 / 96 for K = 1.
        one = GateSample(local(np.ones((4, 4, 1))), local(np.ones((4, 4, 2))), local(truth))
        gate = train_gate([one], FusionSettings(iterations=0, start=0))
        assert gate.dice_before == pytest.approx(64 / 112, abs=0.003)  # K is 0.01, not 0

    @pytest.mark.parametrize(
        "samples",
        [
            [],
            [GateSample(EMPTY, EMPTY, EMPTY)],
            [GateSample(local(WRONG), local(TRUTH), EMPTY)],
            [GateSample(EMPTY, EMPTY, local(TRUTH))],
            [GateSample(local(WRONG), local(WRONG), local(TRUTH))],
        ],
        ids=["none", "all empty", "no truth", "no masks", "same masks"],
    )
    def test_nothing_to_learn_from(self, samples: Sequence[GateSample]) -> None:
        gate = train_gate(samples)
        assert gate.weights == (0.0,) * 6
        assert (gate.bias, gate.start, gate.samples) == (0.0, 0.5, 0)
        assert math.isnan(gate.dice_before)
        assert train_gate(samples, FusionSettings(start=0.75)).start == 0.75

    @pytest.mark.parametrize("missing", ["atlas", "model"])
    def test_one_empty_mask_sends_the_gate_to_the_other(self, missing: str) -> None:
        seen = local(TRUTH)
        one = GateSample(EMPTY if missing == "atlas" else seen, EMPTY if missing == "model" else seen, seen)
        gate = train_gate([one], FusionSettings(learning_rate=0.05))
        assert gate.dice_after > 0.99
        assert (gate.bias < 0) == (missing == "atlas")


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"gate": "learned"},
            {"kernels": (4,)},
            {"kernels": ()},
            {"kernels": (-3,)},
            {"learning_rate": 0},
            {"iterations": -1},
            {"start": 1.5},
            {"start": "worst"},
            {"speed": 3},
            {"simulation": {"sizes": ()}},
            {"correction": {"iterations": 0}},
            {"correction": {"strength": 1.5}},
        ],
    )
    def test_wrong_settings_are_refused(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValidationError):
            FusionSettings(**wrong)

    def test_other_kernels_and_starts(self) -> None:
        gate = train_gate([MODEL_RIGHT], FusionSettings(kernels=(9,), iterations=3))
        assert (gate.kernels, len(gate.weights)) == ((9,), 2)
        assert FusionSettings(start="0.25").start == 0.25  # type: ignore[arg-type]

    def test_import_needs_no_torch(self) -> None:
        code = "import sys, atlassegfm.fusion.gate, atlassegfm.fusion.train; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


#: Sums and differences of eighths are exact in float32, so ties are ties.
EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)


@st.composite
def local_maps(draw: st.DrawFn) -> dict[int, LocalMap]:
    """Up to five structures in boxes of a 4 x 3 x 5 grid."""
    maps = {}
    for value in draw(st.lists(st.sampled_from([1, 2, 3, 7, 300]), unique=True)):
        start = [draw(st.integers(0, n - 1)) for n in (4, 3, 5)]
        size = [draw(st.integers(0, n - first)) for n, first in zip((4, 3, 5), start, strict=True)]
        count = int(np.prod(size))
        values = draw(st.lists(EIGHTHS, min_size=count, max_size=count))
        maps[value] = local(np.reshape(values, size), start)
    return maps


class TestLabelMap:
    @given(local_maps())
    def test_is_as_the_dense_arg_max(self, maps: dict[int, LocalMap]) -> None:
        values = sorted(maps)
        dense = np.stack([np.zeros((4, 3, 5)), *(maps[value].to_full((4, 3, 5)) for value in values)])
        background = np.maximum(0, 1 - dense.sum(axis=0))
        # Structures win over background from 1/2 on, so background is asked last.
        best = dense[1:].max(axis=0, initial=-1)
        first = np.array([0, *values])[1 + dense[1:].argmax(axis=0)] if values else np.zeros((4, 3, 5), int)
        expected = np.where((best >= background) & (best > 0), first, 0)
        found = label_map(maps, (4, 3, 5))
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == (np.uint16 if 300 in maps else np.uint8)

    def test_ties_and_halves(self) -> None:
        #                 alone at 1/2, below, tie, three at a third, too much together
        one = local([[[0.5, 0.49, 0.5, 0.3, 1.0, 0.0]]])
        two = local([[[0.0, 0.0, 0.5, 0.4, 1.0, 0.0]]])
        three = local([[[0.0, 0.0, 0.0, 0.3, 1.0, 0.0]]])
        assert label_map({9: three, 4: one, 6: two}, (1, 1, 6)).ravel().tolist() == [4, 0, 4, 6, 4, 0]

    @pytest.mark.parametrize("maps", [{}, {3: EMPTY}], ids=["none", "empty"])
    def test_no_structures(self, maps: dict[int, LocalMap]) -> None:
        found = label_map(maps, (2, 3, 4))
        assert (found.shape, found.dtype, found.any()) == ((2, 3, 4), np.uint8, False)

    @pytest.mark.parametrize(
        ("value", "start", "facts"),
        [(2, (3, 0, 0), "label 2 .*4, 4, 4"), (2, (-1, 0, 0), "label 2 .*4, 4, 4"), (0, (0, 0, 0), "value 0.* 1 ")],
    )
    def test_wrong_boxes_and_values(self, value: int, start: tuple[int, int, int], facts: str) -> None:
        with pytest.raises(ValueError, match=facts):
            label_map({value: local(np.ones((2, 2, 2)), start)}, (4, 4, 4))

    def test_warped_atlas_counts_where_several_are_found(self) -> None:
        #               both found, only one, none, both and the atlas has neither
        one = local([[[0.6, 0.6, 0.4, 0.6, 0.9]]])
        two = local([[[0.9, 0.4, 0.45, 0.9, 0.6]]])
        warped = {1: local([[[1.0, 0.0, 1.0, 0.0, 0.0]]]), 2: local([[[0.0, 1.0, 0.0, 0.0, 0.5]]])}
        assert label_map({1: one, 2: two}, (1, 1, 5)).ravel().tolist() == [2, 1, 2, 2, 1]
        assert label_map({1: one, 2: two}, (1, 1, 5), warped).ravel().tolist() == [1, 1, 2, 2, 1]
        # Boxes that differ, and a structure that the atlas does not have.
        moved = {1: local([[[1.0]]]), 2: EMPTY}
        assert label_map({1: one, 2: two}, (1, 1, 5), moved).ravel().tolist() == [1, 1, 2, 2, 1]
        assert label_map({1: one, 2: two}, (1, 1, 5), {}).ravel().tolist() == [2, 1, 2, 2, 1]

    @given(local_maps(), st.integers(0, 5))
    def test_warped_atlas_decides_only_between_structures(self, maps: dict[int, LocalMap], seed: int) -> None:
        """Background stays, and so does what at most one structure was found at."""
        shape = (4, 3, 5)
        warped = {value: local(random_mask(shape, seed + value)) for value in maps}
        before, after = label_map(maps, shape), label_map(maps, shape, warped)
        np.testing.assert_array_equal(after > 0, before > 0)
        found = np.sum([np.zeros(shape, bool), *(mask.to_full(shape) >= 0.5 for mask in maps.values())], axis=0)
        np.testing.assert_array_equal(after[found < 2], before[found < 2])
        for value, mask in maps.items():
            won = (after == value) & (found >= 2)
            assert (mask.to_full(shape)[won] >= 0.5).all()
