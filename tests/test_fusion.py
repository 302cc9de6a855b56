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
from atlassegfm.fusion import gate as fusion
from atlassegfm.fusion.gate import Gate, GateExample, fuse, train_gate
from atlassegfm.fusion.label_map import label_map
from atlassegfm.settings import FusionSettings

Field = np.ndarray

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EMPTY = LocalMap.empty()


def local(values: Field, start: Sequence[int] = (0, 0, 0)) -> LocalMap:
    i, j, k = start
    return LocalMap((i, j, k), np.asarray(values, np.float32))


def random_mask(shape: Sequence[int], seed: int) -> Field:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def ball(shift: Sequence[float] = (0, 0, 0), radius: float = 6.0, size: int = 21) -> Field:
    """Soft ball: 1 well inside, 1/2 on its surface."""
    ijk = np.moveaxis(np.indices((size,) * 3), 0, -1) - (size - 1) / 2
    return np.clip(radius - np.linalg.norm(ijk - np.array(shift), axis=-1) + 0.5, 0, 1).astype(np.float32)


def hard(values: Field) -> Field:
    return (values >= 0.5).astype(np.float32)


def example(atlas: Field, model: Field, truth: Field) -> GateExample:
    return GateExample(local(atlas), local(model), local(truth))


#: With the atlas's handicap: of equal constant gates, those with less of the atlas win.
ROUND_TRIP = FusionSettings(examples="round trip")
TRUTH = hard(ball())
WRONG = ball((4, 0, 0))
MODEL_RIGHT = example(WRONG, TRUTH, TRUTH)
ATLAS_RIGHT = example(TRUTH, WRONG, TRUTH)
MIDDLE_RIGHT = example(ball((3, 0, 0)), ball((-3, 0, 0)), hard((ball((3, 0, 0)) + ball((-3, 0, 0))) / 2))


class TestGate:
    def test_equations_by_hand(self) -> None:
        # One voxel: every pooled value is the voxel itself. g = (0.1 + 0.2 + 0.3) 0.8 + (-0.4 + 0 + 0.9) 0.2 - 0.5
        # = 0.48 + 0.1 - 0.5 = 0.08; K = 1 / (1 + exp(-0.08)) = 0.51999; M = 0.2 + K 0.6 = 0.51199.
        gate = Gate((3, 5, 7), (0.1, 0.2, 0.3, -0.4, 0.0, 0.9), -0.5, 0.5)
        atlas, model = local([[[0.8]]], (2, 3, 4)), local([[[0.2]]], (2, 3, 4))
        share = 1 / (1 + math.exp(-0.08))
        assert gate.weight_map(atlas, model).values == pytest.approx(share, abs=1e-6)
        fused = fuse(atlas, model, gate)
        assert fused.start == (2, 3, 4)
        assert fused.values == pytest.approx(0.2 + share * 0.6, abs=1e-6)

    def test_pooling_reaches_as_far_as_its_kernel(self) -> None:
        line = np.zeros((1, 1, 9), np.float32)
        line[0, 0, 4] = 1
        gate = Gate((3, 7), (1.0, 0.0, 0.0, 10.0), 0.0, 0.5)
        share = gate.weight_map(local(line), local(np.zeros_like(line))).values[0, 0]
        one = 1 / (1 + math.exp(-1))
        assert share == pytest.approx([0.5, 0.5, 0.5, one, one, one, 0.5, 0.5, 0.5])
        share = gate.weight_map(local(np.zeros_like(line)), local(line)).values[0, 0]
        ten = 1 / (1 + math.exp(-10))
        assert share == pytest.approx([0.5, ten, ten, ten, ten, ten, ten, ten, 0.5])

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("kernels", [(3, 5, 7), (7, 3), (1, 9), (5, 5)])
    def test_weight_map_is_as_by_scipy(self, kernels: tuple[int, ...], device: str) -> None:
        random = np.random.default_rng(3)
        masks = [random.random((9, 1, 12)).astype(np.float32) for _ in range(2)]
        weights = random.normal(0, 1, 2 * len(kernels))
        mixed = 0.3 + sum(
            weight * ndimage.maximum_filter(mask, kernel, mode="constant")
            for weight, (mask, kernel) in zip(
                weights, [(mask, kernel) for mask in masks for kernel in kernels], strict=True
            )
        )
        gate = Gate(kernels, tuple(weights.tolist()), 0.3, 0.5)
        share = gate.weight_map(local(masks[0]), local(masks[1]), device=device).values
        np.testing.assert_allclose(share, 1 / (1 + np.exp(-mixed)), rtol=1e-5)
        fused = fuse(local(masks[0]), local(masks[1]), gate, device=device).values
        np.testing.assert_allclose(fused, masks[1] + share * (masks[0] - masks[1]), rtol=1e-5)

    @pytest.mark.parametrize(("share", "expected"), [(0.0, 0.01), (0.25, 0.25), (0.5, 0.5), (1.0, 0.99)])
    def test_constant_gate(self, share: float, expected: float) -> None:
        one, other = local(random_mask((3, 4, 5), 0)), local(random_mask((3, 4, 5), 1))
        gate = Gate.constant(share)
        assert gate.start == share
        np.testing.assert_allclose(gate.weight_map(one, other).values, expected, rtol=1e-5)

    def test_weights_must_fit_the_kernels(self) -> None:
        with pytest.raises(ValueError, match="6 weights, not 2"):
            Gate((3, 5, 7), (0.0, 0.0), 0.0, 0.5)

    def test_describes_itself(self) -> None:
        assert Gate.constant(0.5).describe() == "not trained: takes 50% of the atlas everywhere"
        text = train_gate([MODEL_RIGHT], ROUND_TRIP).describe()
        assert text.startswith("starts at 0% atlas; trained on 1 mask: soft Dice 0.9")
        assert "2 masks" in train_gate([MODEL_RIGHT, MODEL_RIGHT]).describe()
        assert "smoothed" not in text
        assert (
            replace(train_gate([MODEL_RIGHT]), smoothing=(0.0, 0.04, 0.08))
            .describe()
            .endswith(" and smoothed (2 of 3 structures)")
        )


class TestFuse:
    GATE = Gate((3, 5, 7), (0.4, -0.2, 0.3, 0.1, 0.5, -0.6), 0.2, 0.5)

    def test_same_masks_stay_as_they_are(self) -> None:
        mask = random_mask((4, 5, 6), 0)
        np.testing.assert_array_equal(fuse(local(mask), local(mask), self.GATE).values, mask)

    def test_result_lies_between_both(self) -> None:
        one, other = random_mask((6, 7, 8), 0), random_mask((6, 7, 8), 1)
        fused = fuse(local(one), local(other), self.GATE)
        assert fused.values.dtype == np.float32
        assert (fused.values >= np.minimum(one, other)).all()
        assert (fused.values <= np.maximum(one, other)).all()

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ((0, 0, 0), (8, 9, 10)),  # disjoint, far apart, both at the border of the scan
            ((2, 3, 4), (3, 3, 3)),  # overlapping
            ((5, 5, 5), (5, 5, 8)),  # side by side
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
        mask = local(np.ones((2, 2, 2)), (3, 4, 5))
        gate = Gate.constant(0.25)
        assert fuse(mask, EMPTY, gate).start == (3, 4, 5)
        np.testing.assert_allclose(fuse(mask, EMPTY, gate).values, 0.25, rtol=1e-5)
        np.testing.assert_allclose(fuse(EMPTY, mask, gate).values, 0.75, rtol=1e-5)
        assert fuse(EMPTY, EMPTY, gate).is_empty
        assert gate.weight_map(EMPTY, EMPTY).is_empty


class TestTraining:
    @pytest.mark.parametrize(
        ("one", "start"),
        [(MODEL_RIGHT, 0.0), (ATLAS_RIGHT, 0.75), (MIDDLE_RIGHT, 0.5)],
        ids=["model", "atlas", "middle"],
    )
    def test_starts_where_the_right_mask_is(self, one: GateExample, start: float) -> None:
        gate = train_gate([one], ROUND_TRIP)
        assert gate.start == start
        assert gate.examples == 1
        share = gate.weight_map(one.atlas, one.model).values
        assert np.abs(share - min(max(start, 0.01), 0.99)).max() < 0.002

    @pytest.mark.parametrize("one", [MODEL_RIGHT, ATLAS_RIGHT])
    def test_long_training_finds_the_right_mask_from_the_wrong_one(self, one: GateExample) -> None:
        start = 0.9 if one is MODEL_RIGHT else 0.1
        gate = train_gate([one], FusionSettings(start=start, learning_rate=0.1, iterations=200))
        assert gate.dice_after > gate.dice_before + 0.05
        assert gate.dice_after > 0.97

    def test_learns_where_to_trust_whom(self) -> None:
        # The atlas has an island the model does not see; else the model is right. No constant does this, but the
        # model's neighbourhood tells both cases apart.
        truth, atlas, model = (np.zeros((30, 12, 12), np.float32) for _ in range(3))
        truth[3:9, 3:9, 3:9] = model[3:9, 3:9, 3:9] = 1
        atlas[5:11, 3:9, 3:9] = 1
        atlas[22:27, 3:9, 3:9] = truth[22:27, 3:9, 3:9] = 1
        one = example(atlas, model, truth)
        gate = train_gate([one], FusionSettings(learning_rate=0.1, iterations=300))
        share = gate.weight_map(one.atlas, one.model).values
        assert share[22:27, 3:9, 3:9].min() > 0.9
        assert share[3:5, 3:9, 3:9].max() < 0.1
        np.testing.assert_array_equal(fuse(one.atlas, one.model, gate).values >= 0.5, truth >= 0.5)

    def test_the_papers_rate_moves_weights_by_a_thousandth(self) -> None:
        settings = FusionSettings()
        assert (settings.learning_rate, settings.iterations, settings.kernels) == (1e-5, 100, (3, 5, 7))
        gate = train_gate([MODEL_RIGHT, MIDDLE_RIGHT])
        start = Gate.constant(gate.start)
        moved = np.abs(np.array((*gate.weights, gate.bias)) - np.array((*start.weights, start.bias)))
        assert 0.5e-3 < moved.max() <= 1.01e-3
        assert gate.dice_after > gate.dice_before

    def test_slope_is_as_by_autograd(self) -> None:
        one = example(WRONG, ball((0, 2, 0), 5), TRUTH)
        lesson = fusion._lesson(one, (3, 5), "cpu")
        assert lesson is not None
        values = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
        atlas, model, truth = (
            torch.tensor(part.values, dtype=torch.float64) for part in (one.atlas, one.model, one.truth)
        )
        mixed = values[4] + sum(
            values[2 * n + m] * torch.nn.functional.max_pool3d(mask[None], kernel, 1, kernel // 2)[0]
            for n, mask in enumerate((atlas, model))
            for m, kernel in enumerate((3, 5))
        )
        fused = model + torch.sigmoid(mixed) * (atlas - model)
        dice = 2 * (fused * truth).sum() / (fused.sum() + truth.sum())
        dice.backward()
        score, slope = fusion._soft_dice(lesson, values.detach())
        assert score == pytest.approx(float(dice.detach()), rel=1e-5)
        assert values.grad is not None
        np.testing.assert_allclose(slope.numpy(), values.grad.numpy(), rtol=1e-4, atol=1e-7)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = train_gate([MODEL_RIGHT, MIDDLE_RIGHT])
        monkeypatch.setattr(fusion, "_CHUNK", 100)
        parts = train_gate([MODEL_RIGHT, MIDDLE_RIGHT])
        assert parts.weights == pytest.approx(whole.weights, abs=1e-8)

    @pytest.mark.parametrize("device", DEVICES)
    def test_repeats_itself(self, device: str) -> None:
        assert train_gate([MODEL_RIGHT], device=device) == train_gate([MODEL_RIGHT], device=device)

    def test_the_default_gate_learns_from_some_voxels_and_the_papers_from_all(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = [MODEL_RIGHT, ATLAS_RIGHT, MIDDLE_RIGHT]
        default, paper = (FusionSettings(gate=kind, start=0.5) for kind in ("default", "paper"))
        of_all = train_gate(given, paper)
        assert train_gate(given, default) == of_all
        monkeypatch.setattr(fusion, "_MOST_VOXELS", 500)
        full, some = (fusion._lesson(MODEL_RIGHT, (3, 5, 7), "cpu", most) for most in (None, 500))
        assert full is not None
        assert some is not None
        assert (some.step.numel(), some.each * 500) == (500, full.step.numel())
        assert full.step.numel() > 1000
        # Sums over those drawn stand for sums over all.
        for share in (0.0, 0.5, 1.0):
            assert fusion._constant_dice(some, share) == pytest.approx(fusion._constant_dice(full, share), abs=0.02)
        parameters = torch.zeros(7, dtype=torch.float64)
        (dice, slope), (exact, exact_slope) = (fusion._soft_dice(one, parameters) for one in (some, full))
        assert dice == pytest.approx(exact, abs=0.02)
        assert torch.allclose(slope, exact_slope, atol=0.02)
        assert train_gate(given, paper) == of_all
        thinned = train_gate(given, default)
        assert thinned != of_all
        assert thinned.dice_after == pytest.approx(of_all.dice_after, abs=0.02)
        assert train_gate(given, default) == thinned

    def test_pools_structures_for_the_start(self) -> None:
        # Two say model, one says atlas: each counts the same, whatever its size.
        gate = train_gate({1: MODEL_RIGHT, 2: ATLAS_RIGHT, 5: MODEL_RIGHT})
        assert gate.start <= 0.25
        assert gate.examples == 3
        assert train_gate([ATLAS_RIGHT, MODEL_RIGHT, ATLAS_RIGHT]).start >= 0.5

    def test_the_atlas_must_be_better_by_what_flatters_it(self) -> None:
        # The atlas has all 30 voxels, the model 28 of them and 2 more: Dice 1 for K of 3/4 and 1, 60 / 62 for 1/2 (the
        # voxels of both), 28 / 30 for 0 and 1/4.
        truth, model = (np.zeros((32, 1, 1), np.float32) for _ in range(2))
        truth[:30] = model[2:] = 1
        one = example(truth, model, truth)
        for flattery, start in ((0, 0.75), (0.06, 0.75), (0.3, 0.0)):
            assert train_gate([one], FusionSettings(examples="round trip", atlas_flattery=flattery)).start == start
            assert train_gate([one], FusionSettings(examples="simulated", atlas_flattery=flattery)).start == 0.75

    def test_equal_starts_go_to_the_middle(self) -> None:
        soft = example(0.9 * TRUTH, TRUTH, TRUTH)
        assert train_gate([soft], FusionSettings(atlas_flattery=0)).start == 0.5

    def test_boxes_are_as_the_whole_grid(self) -> None:
        cut = GateExample(*(LocalMap.from_full(part.values) for part in (WRONG_LOCAL, TRUTH_LOCAL, TRUTH_LOCAL)))
        assert train_gate([cut]).dice_before == pytest.approx(train_gate([MODEL_RIGHT]).dice_before, rel=1e-6)

    def test_truth_outside_both_masks_counts(self) -> None:
        truth = np.zeros((4, 4, 9), np.float32)
        truth[:, :, 6:] = 1
        truth[:, :, :2] = 1
        # The model holds 32 of 80 voxels, the atlas 16 of them: Dice 2 * 32 / 112 for K = 0, nearly 2 * 16 / 96 for 1.
        one = GateExample(local(np.ones((4, 4, 1))), local(np.ones((4, 4, 2))), local(truth))
        gate = train_gate([one], replace(ROUND_TRIP, iterations=0))
        assert gate.start == 0.0
        assert gate.dice_before == pytest.approx(64 / 112, abs=0.003)  # K is 0.01, not 0

    @pytest.mark.parametrize(
        "examples",
        [
            [],
            {},
            [GateExample(EMPTY, EMPTY, EMPTY)],
            [GateExample(local(WRONG), local(TRUTH), EMPTY)],
            [GateExample(EMPTY, EMPTY, local(TRUTH))],
            [GateExample(local(WRONG), local(WRONG), local(TRUTH))],
        ],
        ids=["none", "no structures", "all empty", "no truth", "no masks", "same masks"],
    )
    def test_nothing_to_learn_from(self, examples: Sequence[GateExample]) -> None:
        gate = train_gate(examples)
        assert gate.weights == (0.0,) * 6
        assert (gate.bias, gate.start, gate.examples) == (0.0, 0.5, 0)
        assert math.isnan(gate.dice_before)
        assert train_gate(examples, FusionSettings(start=0.75)).start == 0.75

    @pytest.mark.parametrize("missing", ["atlas", "model"])
    def test_one_empty_mask_sends_the_gate_to_the_other(self, missing: str) -> None:
        seen = local(TRUTH)
        one = GateExample(EMPTY if missing == "atlas" else seen, EMPTY if missing == "model" else seen, seen)
        gate = train_gate([one], FusionSettings(learning_rate=0.05))
        assert gate.dice_after > 0.99
        assert (gate.bias < 0) == (missing == "atlas")


WRONG_LOCAL, TRUTH_LOCAL = local(WRONG), local(TRUTH)


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
        ],
    )
    def test_wrong_settings_are_refused(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValidationError):
            FusionSettings(**wrong)

    def test_other_kernels(self) -> None:
        gate = train_gate([MODEL_RIGHT], FusionSettings(kernels=(9,), iterations=3))
        assert (gate.kernels, len(gate.weights)) == ((9,), 2)

    def test_start_may_come_as_text(self) -> None:
        assert FusionSettings(start="0.25").start == 0.25  # type: ignore[arg-type]
        assert FusionSettings(start="best").start == "best"

    def test_import_needs_no_torch(self) -> None:
        code = "import sys, atlassegfm.fusion.gate, atlassegfm.evaluate.metrics; sys.exit('torch' in sys.modules)"
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
        found = label_map({9: three, 4: one, 6: two}, (1, 1, 6))
        assert found.ravel().tolist() == [4, 0, 4, 6, 4, 0]

    def test_no_structures(self) -> None:
        for maps in ({}, {3: EMPTY}):
            found = label_map(maps, (2, 3, 4))
            assert found.shape == (2, 3, 4)
            assert found.dtype == np.uint8
            assert not found.any()

    def test_a_box_must_lie_in_the_grid(self) -> None:
        with pytest.raises(ValueError, match="label 2 is not inside"):
            label_map({2: local(np.ones((2, 2, 2)), (3, 0, 0))}, (4, 4, 4))
        with pytest.raises(ValueError, match="label 2 is not inside"):
            label_map({2: local(np.ones((2, 2, 2)), (-1, 0, 0))}, (4, 4, 4))
        with pytest.raises(ValueError, match="expected 1 or greater"):
            label_map({0: local(np.ones((2, 2, 2)))}, (4, 4, 4))

    def test_the_warped_atlas_settles_what_several_claim(self) -> None:
        #               both claim it, only one does, none does, both and the atlas has neither
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
    def test_the_warped_atlas_decides_nothing_but_who(self, maps: dict[int, LocalMap], seed: int) -> None:
        """What is background and what is not stays, and so does what at most one structure claims."""
        shape = (4, 3, 5)
        warped = {value: local(random_mask(shape, seed + value)) for value in maps}
        before, after = label_map(maps, shape), label_map(maps, shape, warped)
        np.testing.assert_array_equal(after > 0, before > 0)
        claims = np.sum([np.zeros(shape, bool), *(mask.to_full(shape) >= 0.5 for mask in maps.values())], axis=0)
        np.testing.assert_array_equal(after[claims < 2], before[claims < 2])
        for value, mask in maps.items():
            won = (after == value) & (claims >= 2)
            assert (mask.to_full(shape)[won] >= 0.5).all()
