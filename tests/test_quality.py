"""Evidence on hand-made cases, the estimated Dice, verdicts and their reasons."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.quality import estimate, verdict
from atlassegfm.quality import evidence as module
from atlassegfm.quality.estimate import Regression, Term, regression_of, regressions
from atlassegfm.quality.evidence import Case, Evidence, gather
from atlassegfm.quality.verdict import VERDICTS, explain, is_calibrated, judge, overall
from atlassegfm.registration import Place, Registration
from atlassegfm.registration.dissimilarity import Dissimilarity
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from atlassegfm.transforms.maps import Affine
from conftest import ORIENTATIONS, affine_of
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, straight_grid

SHAPE = (30, 26, 22)
GRID = Grid(SHAPE, affine_of(np.diag([1.5, 2.0, 2.5]), (-20.0, 30.0, 7.0)))


def cuboid(corner: tuple[int, int, int] = (8, 8, 6), size: tuple[int, int, int] = (10, 8, 8)) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(first, first + n) for first, n in zip(corner, size, strict=True))] = True
    return mask


def scan(mask: np.ndarray, inside: float = 200.0, outside: float = 100.0, seed: int = 0) -> Volume:
    noise = np.random.default_rng(seed).normal(0, 5, SHAPE)
    return Volume((np.where(mask, inside, outside) + noise).astype(np.float32), GRID)


def case(found: np.ndarray, query: Volume | None = None, warped: np.ndarray | None = None, **changes: object) -> Case:
    """The atlas is a bright cuboid, registered by the identity."""
    label = cuboid()
    made = Case(
        query=query or scan(found, seed=1),
        atlas=scan(label),
        atlas_labels=Volume(label.astype(np.uint8), GRID),
        registration=Registration(Affine.identity(), None),
        warped={1: LocalMap.from_full((label if warped is None else warped).astype(np.float32))},
        answers={},
        labels=found.astype(np.uint8),
    )
    return replace(made, **changes)


def test_the_same_again_has_nothing_against_it() -> None:
    evidence = gather(case(cuboid()))[1]
    assert evidence.agreement == 1
    assert evidence.volume_change == evidence.abs_volume_change == evidence.displacement == evidence.offset == 0
    assert evidence.log_volume == pytest.approx(np.log(10 * 8 * 8 * 7.5))
    assert evidence.brightness_difference < 0.02
    assert evidence.iqr_difference < 0.02
    assert evidence.contrast_difference < 0.02
    assert evidence.separation_difference == pytest.approx(0, abs=0.01)
    assert evidence.separation_product == pytest.approx(0.25, abs=0.01)  # all inside is brighter, in both
    assert evidence.certainty == 0  # no model was asked
    assert evidence.dissimilarity == evidence.dissimilarity_overall == 0  # nothing was compared


def test_thinness_of_a_ball_and_of_a_plate() -> None:
    voxel_mm = 4.0
    grid = straight_grid((16, 14, 14), (voxel_mm,) * 3)
    difference = Dissimilarity(grid, np.zeros(grid.shape, np.float32), np.ones(grid.shape, np.float32))
    registration = Registration(Affine.identity(), None, dissimilarity=difference)
    voxels = GRID.voxel_to_world(np.argwhere(np.ones(SHAPE))).reshape(*SHAPE, 3)
    radius = 14.0
    ball = np.linalg.norm(voxels - voxels[15, 13, 11], axis=-1) < radius
    assert gather(case(ball, registration=registration))[1].thinness == pytest.approx(voxel_mm * 3 / radius, rel=0.06)
    plate = gather(case(cuboid((1, 1, 6), (28, 24, 2)), registration=registration))[1]
    assert plate.thinness == pytest.approx(voxel_mm * 2 / 3 * 2 * (1 / 42 + 1 / 48 + 1 / 5))
    assert gather(case(ball))[1].thinness == 0  # nothing was compared


def test_thin_structures_have_a_calibration_of_their_own() -> None:
    shipped = regressions()
    thick, thin = replace(NOTHING, thinness=1.3), replace(NOTHING, thinness=1.5)
    for model in ("builtin", "none"):
        assert regression_of(model, thick) == shipped[model]
        assert regression_of(model, thin) == shipped[f"thin {model}"]
    assert regression_of("nninteractive", thick) == shipped["model"]
    assert regression_of("nninteractive", thin) == regression_of("builtin,litemedsam", thin) == shipped["thin model"]


def test_volume_and_place() -> None:
    evidence = gather(case(cuboid((10, 8, 6), (5, 8, 8))))[1]
    assert evidence.volume_change == pytest.approx(np.log(0.5))
    assert evidence.abs_volume_change == pytest.approx(np.log(2))
    assert evidence.agreement == pytest.approx(2 * 5 / (5 + 10))
    size_mm = (10 * 8 * 8 * 7.5) ** (1 / 3)
    # Centroids along i: 12.5 of the warped mask, 12 of the result; 1.5 mm a voxel.
    assert evidence.offset == pytest.approx(0.5 * 1.5 / size_mm)
    assert evidence.displacement == 0
    evidence = gather(case(cuboid((12, 8, 6)), warped=cuboid((12, 8, 6))))[1]
    assert evidence.displacement == pytest.approx(4 * 1.5 / size_mm)
    assert evidence.offset == 0


def test_the_linear_registration_is_no_change_of_volume() -> None:
    half = Affine(np.diag([2.0, 2.0, 2.0, 1.0]))  # the query is half as large along each axis
    evidence = gather(case(cuboid((8, 8, 6), (5, 4, 4)), registration=Registration(half, None)))[1]
    assert evidence.volume_change == pytest.approx(0)


def test_a_dark_structure_that_is_bright_in_the_atlas() -> None:
    found = cuboid()
    evidence = gather(case(found, query=scan(found, inside=20.0)))[1]
    assert evidence.separation_difference == pytest.approx(1, abs=0.01)
    assert evidence.separation_product == pytest.approx(-0.25, abs=0.01)
    assert evidence.contrast_difference > 1
    faint = gather(case(found, query=scan(found, inside=100.0)))[1]
    assert faint.separation_product == pytest.approx(0, abs=0.03)


def test_certainty_of_the_model() -> None:
    answer = cuboid().astype(np.float32) * 0.9
    answer[0, 0, 0] = 0.04  # as good as nothing said
    assert gather(case(cuboid(), answers={1: LocalMap.from_full(answer)}))[1].certainty == pytest.approx(0.8)


def test_dissimilarity_is_that_around_the_structure() -> None:
    grid = GRID
    values = np.full(SHAPE, 0.2, np.float32)
    values[cuboid()] = 1.0
    difference = Dissimilarity(grid, values, np.ones(SHAPE, np.float32))
    registration = Registration(Affine.identity(), None, dissimilarity=difference)
    evidence = gather(case(cuboid(), registration=registration))[1]
    assert evidence.dissimilarity_overall == pytest.approx(difference.mean())
    assert 0.6 < evidence.dissimilarity < 1
    assert evidence.dissimilarity_relative == pytest.approx(evidence.dissimilarity / difference.mean())


def test_places_of_the_structure_search_are_evidence() -> None:
    assert gather(case(cuboid()))[1].place_margin == 0
    places = {1: Place(20.0, 1.5, 1.75, 60.0)}
    registration = Registration(Affine.identity(), None, places=places)
    assert gather(case(cuboid(), registration=registration))[1].place_margin == pytest.approx(0.25)
    close = judge(NOTHING, "builtin", 0.6, place=Place(20.0, 1.5, 1.55, 60.0)).reason
    assert "60 mm" in close
    assert "60 mm" not in judge(NOTHING, "builtin", 0.6, place=places[1]).reason


def test_a_structure_that_moved_against_the_others_is_apart() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 2:6, 2:6], labels[2:6, 12:16, 2:6], labels[12:16, 2:6, 2:6] = 1, 2, 3
    moved = np.zeros_like(labels)
    # All went one voxel along the first axis, the third five more along the second.
    moved[3:7, 2:6, 2:6], moved[3:7, 12:16, 2:6], moved[13:17, 7:11, 2:6] = 1, 2, 3
    warped = {n: LocalMap.from_full((moved == n).astype(np.float32)) for n in (1, 2, 3)}
    found = gather(replace(case(cuboid()), labels=moved, atlas_labels=Volume(labels, GRID), warped=warped))
    size = (64 * GRID.voxel_volume_mm3) ** (1 / 3)
    assert found[1].apart == found[2].apart == pytest.approx(0, abs=1e-6)
    assert found[3].apart == pytest.approx(5 * GRID.spacing_mm[1] / size)
    assert found[1].displacement == pytest.approx(GRID.spacing_mm[0] / size)


def test_blur_is_where_members_of_the_ensemble_disagree() -> None:
    assert gather(case(cuboid()))[1].blur == 0
    half = cuboid().astype(np.float32)
    half[half > 0] = np.where(np.arange(int(half.sum())) % 4 == 0, 0.5, 1)
    assert gather(case(cuboid(), warped=half))[1].blur == pytest.approx(0.25)


def test_structures_that_are_not_there_have_no_evidence() -> None:
    assert gather(case(np.zeros(SHAPE, bool))) == {}


@pytest.mark.parametrize("thin", [(1, 8, 8), (10, 1, 1), (1, 1, 1)])
def test_thin_structures(thin: tuple[int, int, int]) -> None:
    evidence = gather(case(cuboid(size=thin)))[1]
    assert all(np.isfinite(value) for value in asdict(evidence).values())


def test_large_structures_are_looked_at_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    every = gather(case(cuboid()))[1]
    monkeypatch.setattr(module, "_BOX_VOXELS", 2000)
    some = gather(case(cuboid()))[1]
    assert some.brightness_iqr != every.brightness_iqr
    assert some.brightness_iqr == pytest.approx(every.brightness_iqr, abs=0.03)
    assert some.separation_product == pytest.approx(every.separation_product, abs=0.02)


NOTHING = Evidence(**dict.fromkeys((field.name for field in fields(Evidence)), 0.0))


def test_estimate_is_linear_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = {"agreement": Term(0.9, 0.05, 0.04), "displacement": Term(0.2, 0.1, -0.06)}
    monkeypatch.setattr(
        estimate,
        "regressions",
        lambda: {"model": Regression(0.8, ((0.0, 0.0), (1.0, 1.0)), 0.1, 0.05, 0.78, 0.62, terms)},
    )
    evidence = replace(NOTHING, agreement=0.95, displacement=0.1)
    found = judge(evidence, "builtin", 0.6)
    assert (found.verdict, found.estimated_dice) == ("good", pytest.approx(0.8 + 0.04 + 0.06))
    assert (found.low, found.high) == (pytest.approx(0.8), pytest.approx(0.95))
    assert "0.90" in found.reason
    found = judge(replace(evidence, displacement=0.35), "builtin", 0.6)
    assert (found.verdict, found.estimated_dice) == ("review", pytest.approx(0.75))
    assert found.reason.endswith(explain("displacement", replace(evidence, displacement=0.35), 0.2))
    # The figure beside its usual value: alone it says nothing.
    assert "0.35" in found.reason
    assert "0.20" in found.reason
    # Ten deviations count as three: 0.8 + 0.04 - 0.18.
    assert judge(replace(evidence, displacement=1.2), "builtin", 0.6).estimated_dice == pytest.approx(0.66)
    found = judge(replace(evidence, agreement=0.1, displacement=1.2), "builtin", 0.6)
    assert (found.verdict, found.estimated_dice) == ("failed", pytest.approx(0.5))
    # A registration of low confidence fails whatever the estimate.
    found = judge(evidence, "builtin", 0.2)
    assert (found.verdict, found.estimated_dice) == ("failed", pytest.approx(0.9))
    assert "0.20" in found.reason


def test_shipped_calibration_fits_the_evidence() -> None:
    names = {field.name for field in fields(Evidence)}
    shipped = regressions()
    without = {"builtin": set(), "model": {"certainty"}, "none": {"certainty", "agreement", "offset"}}
    usual = {kind: left | {"thinness"} for kind, left in (without | {"builtin,litemedsam": set()}).items()}
    left_out = usual | {f"thin {kind}": left for kind, left in without.items()}
    assert shipped.keys() == left_out.keys()
    for kind, regression in shipped.items():
        assert set(regression.terms) == names - left_out[kind]
        assert min(term.deviation for term in regression.terms.values()) > 0
        assert 0 < min(regression.below, regression.above) <= max(regression.below, regression.above) < 0.3
        assert regression.terms["dissimilarity"].weight < 0


def test_every_piece_of_evidence_can_be_explained() -> None:
    for field in fields(Evidence):
        assert explain(field.name, NOTHING, 1.0)


@pytest.mark.parametrize("kind", ["builtin", "builtin,litemedsam", "model", "none", "thin builtin"])
def test_a_reason_is_on_the_wrong_side_of_its_usual_value(kind: str) -> None:
    """A regression may have a sign that nobody expects: a small difference of brightness is no objection."""
    low_is_bad = {"agreement", "certainty", "log_volume", "separation_product", "place_margin"}
    for name, term in regressions()[kind].terms.items():
        for side in (-2, 2):
            usual = {key: one.mean for key, one in regressions()[kind].terms.items()}
            poor = replace(NOTHING, **usual | {name: term.mean + side * term.deviation})
            found = verdict._worst_objection(poor, regressions()[kind])
            is_bad = side < 0 if name in low_is_bad else side > 0
            assert bool(found) == (is_bad and side * term.weight < 0)


def test_certainty_is_given_beside_its_usual_value() -> None:
    term = regressions()["builtin"].terms["certainty"]
    usual = {name: one.mean for name, one in regressions()["builtin"].terms.items()}
    found = verdict._worst_objection(replace(NOTHING, **usual | {"certainty": 0.42}), regressions()["builtin"])
    assert "0.42" in found
    assert f"{term.mean:.2f}" in found


def test_worst_verdict_is_that_of_the_whole() -> None:
    assert overall(["good", "failed", "review"]) == "failed"
    assert overall(["good", "good"]) == "good"
    assert overall(["good", None]) == "good"
    assert overall([]) is overall([None]) is None


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_evidence_is_about_the_world_not_the_array(affine: np.ndarray) -> None:
    """A scan stored otherwise is turned before; here all lies on an oblique or flipped grid."""
    straight, turned = gather(case(cuboid()))[1], Grid(SHAPE, affine)
    made = case(cuboid())
    moved = replace(
        made,
        query=Volume(made.query.data, turned),
        atlas=Volume(made.atlas.data, turned),
        atlas_labels=Volume(made.atlas_labels.data, turned),
    )
    evidence = gather(moved)[1]
    assert evidence.displacement == pytest.approx(0, abs=1e-9)
    assert evidence.volume_change == pytest.approx(0)
    assert evidence.separation_product == pytest.approx(straight.separation_product, abs=0.01)


@pytest.mark.parametrize("model", ["builtin", "none"])
def test_results_carry_their_verdicts(model: str, calibrated: None) -> None:
    grid = straight_grid((36, 30, 28), (2.5, 2.5, 2.5))
    atlas = Atlas(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    settings = with_overrides(Settings(), [*UNREGISTERED, f"model={model}", "fusion.correction.iterations=3"])
    result = segment(Context(atlas, settings), QUERY.scan(grid))
    found = [one.quality for one in result.structures if one.quality is not None]
    assert len(found) == len(STRUCTURES)
    assert result.verdict == overall(one.verdict for one in found)
    for one in found:
        assert one.verdict in VERDICTS
        assert one.low is not None
        assert one.high is not None
        assert one.estimated_dice is not None
        assert one.low <= one.estimated_dice <= one.high


def test_structure_out_of_view_is_no_good_result() -> None:
    grid = straight_grid()
    atlas = Atlas(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    beside = Grid((20, 40, 36), grid.affine @ affine_of(np.eye(3), (28.0, 0.0, 0.0)))
    result = segment(Context(atlas, with_overrides(Settings(), [*UNREGISTERED, "model=none"])), QUERY.scan(beside))
    kidney = result.structures[1]
    assert kidney.status == "outside"
    assert kidney.quality is not None
    assert (kidney.quality.verdict, kidney.quality.estimated_dice) == ("review", None)


@pytest.mark.parametrize(
    ("changes", "is_judged"),
    [
        ((), True),
        (
            ("registration.instance.ensemble=1", "fusion.gate=paper", "prompt=box", "registration.greedy.voxels=9000"),
            True,
        ),
        (("registration.deformable=false",), False),
        (("registration.rigid=false",), False),
        (("registration.structure_search=false",), False),
        (("registration.engine=greedy",), False),
        (("registration.instance.iterations=[0]",), False),
    ],
)
def test_settings_that_verdicts_are_calibrated_for(changes: tuple[str, ...], is_judged: bool) -> None:
    settings = with_overrides(Settings(), changes)
    assert is_calibrated(settings, transform_given=False) == is_judged
    assert not is_calibrated(settings, transform_given=True)


def test_no_verdict_with_another_registration() -> None:
    grid = straight_grid((36, 30, 28), (2.5, 2.5, 2.5))
    atlas = Atlas(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    settings = with_overrides(Settings(), [*UNREGISTERED, "model=none"])
    result = segment(Context(atlas, settings), QUERY.scan(grid))
    found = [one.quality for one in result.structures if one.quality is not None]
    assert result.verdict is None
    assert not result.is_judged
    assert [(one.verdict, one.estimated_dice, one.low) for one in found] == [(None, None, None)] * len(STRUCTURES)
    assert all(one.reason and one.evidence is not None for one in found)
    assert "liver" in repr(result)


def test_a_structure_cut_by_the_field_of_view_says_so(calibrated: None) -> None:
    grid = straight_grid((36, 30, 28), (2.5, 2.5, 2.5))
    atlas = Atlas(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    part = Grid((22, 30, 28), grid.affine @ affine_of(np.eye(3), (14.0, 0.0, 0.0)))
    result = segment(Context(atlas, with_overrides(Settings(), [*UNREGISTERED, "model=none"])), ATLAS.scan(part))
    cut = {one.structure.name: one for one in result.structures if 0.05 <= one.outside_fraction < 0.9}
    assert "kidney" in cut
    for one in result.structures:
        assert one.quality is not None
        if one.structure.name in cut:
            assert f"{100 * one.outside_fraction:.0f} %" in one.quality.reason
            assert f"{100 * one.outside_fraction:.0f} %" in repr(result)
        elif one.status == "present":
            assert "%" not in one.quality.reason.split("outside")[0]
