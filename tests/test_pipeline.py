"""The whole job in memory: the same in every array order, honest about what is not there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from atlassegfm import segment as pipeline
from atlassegfm.atlas import Atlas
from atlassegfm.core.config import with_overrides
from atlassegfm.core.device import resolve_device
from atlassegfm.core.errors import InputError, ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.fusion.smoothing import smoothed, window_mm
from atlassegfm.fusion.train import learn_gate
from atlassegfm.models import OnPrompt, load_model
from atlassegfm.prompts import ClickPrompt, Prompt
from atlassegfm.quality.coverage import outside_shares
from atlassegfm.result import Segmentation
from atlassegfm.segment import fused_by, segment
from atlassegfm.settings import Settings
from atlassegfm.transforms.maps import Affine, Chain, DisplacementField, displacement_on
from atlassegfm.transforms.resample import resample
from conftest import rotation
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, straight_grid

GRID = straight_grid()


#: All stages, on grids of the size of the tiny patient.
QUICKLY = (
    "registration.coarse_voxels=10000",
    "registration.fine_voxels=40000",
    "registration.instance.level_voxels=[10000, 40000]",
    "registration.instance.local_voxels=40000",
)


@pytest.fixture(scope="module")
def context() -> Atlas:
    return Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES)


def settings(*overrides: str, registered: bool = False) -> Settings:
    return with_overrides(Settings(), [*(QUICKLY if registered else UNREGISTERED), *overrides])


def stored_as(volume: Volume, codes: str) -> Volume:
    """The same voxels in the array order of another scanner."""
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    turn = ornt_transform(axcodes2ornt(volume.grid.axis_codes), axcodes2ornt(codes))
    i, j, k = (volume.grid.shape[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3))
    turned = volume.turned_to(Grid((i, j, k), volume.grid.affine @ inv_ornt_aff(turn, volume.grid.shape)))
    assert turned.grid.axis_codes == codes
    return turned


#: The gate is trained anew for each query, on labels that go there and come back.
ROUND_TRIP = "fusion.examples=round trip"


def status_of(result: Segmentation) -> dict[str, str]:
    return {one.structure.name: one.status for one in result.structures}


def assert_same_voxels(result: Segmentation, expected: Segmentation) -> None:
    turned = result.labels.turned_to(expected.labels.grid)
    np.testing.assert_array_equal(turned.data, expected.labels.data)


def test_result_is_good_and_on_the_grid_of_the_query(context: Atlas) -> None:
    query = stored_as(QUERY.scan(GRID), "LPS")
    result = segment(context, query, settings())
    assert result.labels.grid is query.grid
    assert result.labels.data.dtype == np.uint8
    scores = dice_per_structure(result.labels.data, QUERY.labels(query.grid).data, context.values)
    assert min(scores.values()) > 0.65, scores  # nothing is registered: the node is 2.5 of its 6 mm off
    assert status_of(result) == {"liver": "present", "kidney": "present", "node": "present"}
    for one in result.structures:
        voxels = int((result.labels.data == one.structure.value).sum())
        assert one.volume_ml == pytest.approx(voxels * 8 / 1000)
        assert one.round_trip_dice is None
    assert result.gate is not None
    assert result.gate.examples == 3 * 4
    assert result.prompt == "mask"
    assert set(result.seconds) == {"registration", "warping", "model", "gate", "fusion", "quality"}
    json.dumps(result.summary(), allow_nan=False)


def test_round_trip(context: Atlas) -> None:
    result = segment(context, QUERY.scan(GRID), settings(ROUND_TRIP))
    scores = dice_per_structure(result.labels.data, QUERY.labels(GRID).data, context.values)
    assert min(scores.values()) > 0.65, scores
    for one in result.structures:
        assert one.round_trip_dice is not None
        assert one.round_trip_dice > 0.95
        assert one.summary()["round_trip_dice"] == round(one.round_trip_dice, 4)
    assert result.gate is not None
    assert result.gate.examples == 3
    assert set(result.seconds) == {"registration", "warping", "model", "round trip", "gate", "fusion", "quality"}


def test_the_gate_is_that_of_the_atlas_alone(context: Atlas) -> None:
    """The same for every query, and whether it was trained before or with the query."""
    gate = learn_gate(context, settings())
    assert gate is not None
    query = QUERY.scan(GRID)
    alone = segment(context, query, settings())
    assert alone.gate == gate
    given = segment(context, query, settings(), gate=gate)
    assert given.gate is gate
    assert set(given.seconds) == {"registration", "warping", "model", "fusion", "quality"}
    np.testing.assert_array_equal(given.labels.data, alone.labels.data)
    for value in context.values:
        np.testing.assert_array_equal(given.probabilities[value].fused.values, alone.probabilities[value].fused.values)
    assert segment(context, QUERY.scan(oblique_grid()), settings()).gate == gate
    assert learn_gate(context, settings("seed=1")) != gate
    assert learn_gate(context, settings("model=none")) is None
    with pytest.raises(InputError, match="fusion.examples is 'round trip', which trains the gate anew for each query"):
        learn_gate(context, settings(ROUND_TRIP))


def test_the_default_gate_smooths_each_structure_as_the_atlas_says(context: Atlas) -> None:
    """A share for each structure, applied last; the paper's gate has none."""
    gate = learn_gate(context, settings())
    assert gate is not None
    assert gate.correction is not None
    assert len(gate.smoothing) == len(context.structures)
    assert set(gate.smoothing) <= {0.0, 0.04, 0.08}
    query = QUERY.scan(GRID)
    wide, none = (
        segment(context, query, settings("topology=false"), gate=replace(gate, smoothing=(share,) * 3))
        for share in (0.2, 0.0)
    )
    for value in context.values:
        one, other = (result.probabilities[value] for result in (wide, none))
        width_mm = window_mm(0.2, one.atlas, none.grid)
        assert width_mm > 0
        expected = smoothed(other.fused, width_mm, none.grid).to_full(none.grid.shape)
        np.testing.assert_allclose(one.fused.to_full(none.grid.shape), expected, atol=1e-5)
    paper = learn_gate(context, settings("fusion.gate=paper"))
    assert paper is not None
    assert (paper.correction, paper.smoothing) == (None, ())


def test_further_fits_need_a_first(context: Atlas) -> None:
    with pytest.raises(InputError, match="2 further fits without a transform; expected them beside the first"):
        segment(context, QUERY.scan(GRID), settings(), further_fits=[Affine(np.eye(4))] * 2)


@pytest.mark.parametrize("right", ["atlas", "model"])
def test_simulated_errors_teach_the_gate(context: Atlas, right: str) -> None:
    """From a bad start it comes to what is right: the model, or the atlas where the model says nonsense."""

    class Nonsense:
        provenance: Mapping[str, object] = {}

        def encode(self, image: Volume) -> Volume:
            return image

        def predict(self, _scan: Volume, prompts: Mapping[int, Prompt], _: OnPrompt) -> dict[int, LocalMap]:
            return {n: LocalMap((0, 0, 0), np.ones((3, 3, 3), np.float32)) for n in prompts}

    bad = 0.05 if right == "atlas" else 0.95
    fast = (f"fusion.start={bad}", "fusion.learning_rate=0.1", "fusion.iterations=50")
    gate = learn_gate(context, settings(*fast), model=Nonsense() if right == "atlas" else None)
    assert gate is not None
    assert gate.dice_after > gate.dice_before + 0.02
    assert (gate.bias > np.log(bad / (1 - bad))) == (right == "atlas")
    best = learn_gate(context, settings(), model=Nonsense() if right == "atlas" else None)
    assert best is not None
    assert (best.start >= 0.75) == (right == "atlas")


def test_what_the_model_does_not_find_stays_as_the_atlas_has_it(context: Atlas) -> None:
    """And is told: a structure must not vanish because a model gives it up."""

    class Blind:
        """Sees all but one structure of the query."""

        provenance: Mapping[str, object] = {}

        def __init__(self) -> None:
            self.inner = load_model("builtin", "cpu")

        def encode(self, image: Volume) -> object:
            return self.inner.encode(image)

        def predict(self, scan: Any, prompts: Mapping[int, Prompt], tell: OnPrompt) -> dict[int, LocalMap]:
            answers = self.inner.predict(scan, prompts, tell)
            faint = np.full_like(answers[2].values, 0.3)
            return {**answers, 2: LocalMap(answers[2].start, faint)}

    gate = learn_gate(context, settings())
    result = segment(context, QUERY.scan(GRID), settings(), model=Blind(), gate=gate)
    lost = context.values[1]
    np.testing.assert_array_equal(result.probabilities[lost].fused.values, result.probabilities[lost].atlas.values)
    first, second, _ = result.structures
    assert (second.status, second.volume_ml > 0) == ("present", True)
    assert second.reason == "the model found nothing there, and the warped atlas was kept"
    assert second.quality.verdict in ("review", "failed")
    assert second.quality.reason.startswith(second.reason)
    assert first.reason == ""
    assert gate is not None
    paper = fused_by(gate.as_the_paper(), context, result)
    assert (paper.data == lost).any()
    with pytest.raises(ValueError, match="a gate with a correction takes the scan"):
        fused_by(gate, context, result)


@pytest.mark.parametrize("codes", ["LPS", "LAS", "SAR", "PIR"])
@pytest.mark.parametrize("prompt", ["mask", "box", "click"])
def test_array_order_changes_nothing(context: Atlas, codes: str, prompt: str) -> None:
    query = QUERY.scan(GRID)
    straight = segment(context, query, settings(f"prompt={prompt}"))
    turned = segment(context, stored_as(query, codes), settings(f"prompt={prompt}"))
    assert turned.labels.grid.axis_codes == codes
    assert_same_voxels(turned, straight)
    for one, other in zip(turned.structures, straight.structures, strict=True):
        assert one.prompt is not None
        assert other.prompt is not None
        if prompt == "click":
            assert one.prompt.first_mm == other.prompt.first_mm


def test_array_order_changes_nothing_after_registration(context: Atlas) -> None:
    query = QUERY.scan(GRID)
    straight = segment(context, query, settings(registered=True))
    for codes in ("LPS", "LAS"):
        assert_same_voxels(segment(context, stored_as(query, codes), settings(registered=True)), straight)


def oblique_grid() -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = rotation(12, -8, 15) * 2
    shape = (50, 44, 40)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) / 2)
    return Grid(shape, affine)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize(
    "grid", [oblique_grid(), straight_grid((64, 54, 24), (1.5, 1.5, 3.0))], ids=["oblique", "anisotropic"]
)
def test_other_voxels_of_the_same_patient(context: Atlas, grid: Grid, registered: bool) -> None:
    """The result is about the same place in the world, whatever lattice the patient was scanned on."""
    straight = segment(context, QUERY.scan(GRID), settings(registered=registered))
    other = segment(context, QUERY.scan(grid), settings(registered=registered))
    for value in context.values:
        there = Volume((straight.labels.data == value).astype(np.float32), GRID)
        overlap = dice_of(resample(there, grid) >= 0.5, other.labels.data == value)
        assert overlap > (0.94 if value != 12 else 0.86), (value, overlap)  # 12 is 6 voxels wide


def dice_of(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_the_same_twice(context: Atlas) -> None:
    query = QUERY.scan(GRID)
    one, other = (segment(context, query, settings("seed=3", registered=True)) for _ in range(2))
    np.testing.assert_array_equal(one.labels.data, other.labels.data)
    for value in context.values:
        np.testing.assert_array_equal(one.probabilities[value].fused.values, other.probabilities[value].fused.values)


def test_structure_outside_the_field_of_view_is_named(context: Atlas) -> None:
    query = QUERY.scan(GRID.crop((0, 0, 0), (48, 40, 22)))  # ends 7 mm above the origin, below the node
    result = segment(context, query, settings(ROUND_TRIP))
    assert status_of(result) == {"liver": "present", "kidney": "present", "node": "outside"}
    node = result.structures[2]
    assert node.outside_share == 1
    assert node.reason == "100% of it lies outside the field of view"
    assert node.prompt is None
    assert node.volume_ml == 0
    assert 12 not in result.probabilities
    assert not (result.labels.data == 12).any()
    liver = result.structures[0]
    assert 0.1 < liver.outside_share < 0.5
    assert liver.round_trip_dice is not None
    assert liver.round_trip_dice > 0.9  # of the part in view


def test_structure_lost_between_slices_is_absent(context: Atlas) -> None:
    labels = context.labels.data.copy()
    labels[24, 20, 1] = 99  # a single voxel of 2 mm
    one_voxel = Atlas.from_volumes(context.image, Volume(labels, GRID))
    thick = straight_grid((48, 40, 7), (2.0, 2.0, 10.0))
    result = segment(one_voxel, QUERY.scan(thick), settings())
    assert result.structures[3].status == "absent"
    assert result.structures[3].reason == "the warped atlas fills no voxel of the query with it by half"


def test_nothing_in_view(context: Atlas) -> None:
    query = QUERY.scan(GRID.crop((0, 0, 0), (5, 40, 36)))
    result = segment(context, query, settings(ROUND_TRIP))
    assert set(status_of(result).values()) == {"outside"}
    assert not result.labels.data.any()
    assert result.gate is not None
    assert result.gate.examples == 0


def test_without_a_model(context: Atlas) -> None:
    result = segment(context, QUERY.scan(GRID), settings("model=none"))
    assert result.model_labels is None
    assert result.gate is None
    assert result.prompt is None
    np.testing.assert_array_equal(result.labels.data, ATLAS.labels(GRID).data)
    assert "round trip" not in result.seconds
    assert result.summary()["model"] == {"name": "none"}


def test_label_values_stay(context: Atlas) -> None:
    """Values beyond 16 bits neither change nor cost memory."""
    labels = context.labels.data.astype(np.uint32)
    labels[labels == 12] = 614_454_277
    large = Atlas.from_volumes(context.image, Volume(labels, GRID))
    query = QUERY.scan(GRID)
    one, other = segment(large, query, settings()), segment(context, query, settings())
    assert one.labels.data.dtype == np.uint32
    back = np.where(one.labels.data == 614_454_277, 12, one.labels.data)
    np.testing.assert_array_equal(back, other.labels.data)
    assert set(one.probabilities) == {1, 7, 614_454_277}


def test_click_is_told_in_voxels_of_the_file(context: Atlas) -> None:
    query = stored_as(QUERY.scan(GRID), "PIR")
    result = segment(context, query, settings("prompt=click"))
    for one in result.structures:
        assert one.prompt is not None
        assert one.prompt.summary().keys() == {"kind", "voxel", "point_mm"}
        np.testing.assert_allclose(query.grid.voxel_to_world(one.prompt.first_voxel), one.prompt.first_mm, atol=0.01)
        centre = {1: (13, 4, -2), 7: (-19, -9, -9), 12: (-9, 13, 18)}[one.structure.value]
        assert np.linalg.norm(np.subtract(one.prompt.first_mm, centre)) < 4


def test_box_is_told_by_its_corner_voxels(context: Atlas) -> None:
    query = stored_as(QUERY.scan(GRID), "LPS")
    result = segment(context, query, settings("prompt=box"))
    liver = result.structures[0].prompt
    assert liver is not None
    size = np.subtract(liver.last_voxel, liver.first_voxel) + 1
    assert size[2] == 1
    np.testing.assert_allclose(size[:2] * 2, [34, 28], atol=4)


@pytest.mark.parametrize(("examples", "asked"), [((), 5), ((ROUND_TRIP,), 2)], ids=["simulated", "round trip"])
def test_model_is_asked_once_to_encode_each_scan(context: Atlas, examples: tuple[str, ...], asked: int) -> None:
    class Counting:
        def __init__(self) -> None:
            self.inner = load_model("builtin", "cpu")
            self.provenance = {"weights": "counted"}
            self.encoded: list[Volume] = []
            self.prompts: list[object] = []

        def encode(self, image: Volume) -> object:
            self.encoded.append(image)
            return self.inner.encode(image)

        def predict(self, encoded: object, prompts: Mapping[int, Prompt], on_prompt: OnPrompt) -> dict[int, LocalMap]:
            self.prompts += prompts.values()
            return self.inner.predict(encoded, prompts, on_prompt)

    model = Counting()
    stages: list[str] = []
    segment(context, QUERY.scan(GRID), settings("prompt=click", *examples), model=model, on_stage=stages.append)
    assert len(model.encoded) == 2
    assert model.encoded[1] is context.image
    assert len(model.prompts) == 3 * asked
    assert all(isinstance(prompt, ClickPrompt) for prompt in model.prompts)
    assert stages[0] == "registration"
    assert "model: kidney" in stages


def test_no_way_in_for_the_labels_of_the_query() -> None:
    """The gate must not see the truth: nothing takes it."""
    assert list(inspect.signature(segment).parameters) == [
        *("context", "query", "settings", "device", "on_stage", "model", "transform", "further_fits", "gate")
    ]
    assert list(inspect.signature(learn_gate).parameters) == ["context", "settings", "device", "on_stage", "model"]


def test_query_of_another_type_and_in_another_memory_order(context: Atlas) -> None:
    query = QUERY.scan(GRID)
    whole = Volume(query.data.astype(np.int16), GRID)
    one = segment(context, whole, settings())
    other = segment(context, Volume(np.asfortranarray(whole.data.astype(np.float64)), GRID), settings())
    np.testing.assert_array_equal(one.labels.data, other.labels.data)


def test_a_given_transform_keeps_its_parts(context: Atlas) -> None:
    view = QUERY.scan(GRID)
    nodes = GRID.crop((10, 10, 10), (30, 30, 30))
    values = np.zeros((3, *nodes.shape), np.float32)
    values[0, 8:12, 5:15, 5:15] = 1.0
    local = DisplacementField(nodes, values)
    field = displacement_on(
        Affine(np.diag([1.1, 1.1, 1.1, 1.0])), Grid((24, 20, 18), GRID.affine @ np.diag([2, 2, 2, 1.0]))
    )
    given = segment(context, view, settings("model=none"), transform=Chain((local, field, Affine.identity())))
    assert (given.registration.local, given.registration.field) == (local, field)
    assert given.registration.folding == 0
    statistics = given.summary()["registration"]["jacobian"]
    assert statistics["folding"] == 0
    assert statistics["median"] == pytest.approx(1.331, abs=1e-3)
    # By central differences over 2 voxels of 2 mm: 1 mm more or less.
    assert statistics["minimum"] == pytest.approx(1.1**3 * 0.75, abs=0.01)
    assert statistics["percentile_99"] == pytest.approx(1.1**3 * 1.25, abs=0.01)
    # A field whose nodes all lie out of view says nothing about volumes.
    far = Grid(nodes.shape, nodes.affine + np.array([[0, 0, 0, 500.0], [0] * 4, [0] * 4, [0] * 4]))
    given = segment(
        context, view, settings("model=none"), transform=Chain((DisplacementField(far, values), Affine.identity()))
    )
    assert given.registration.local is None
    assert set(given.summary()["registration"]["jacobian"].values()) == {None}
    json.dumps(given.summary(), allow_nan=False)


def test_queries_that_cannot_be_used(context: Atlas) -> None:
    with pytest.raises(InputError, match="the query: all voxels have the value 2"):
        segment(context, Volume(np.full(GRID.shape, 2.0), GRID))
    data = QUERY.scan(GRID).data.copy()
    data[3, 3, 3] = np.inf
    with pytest.raises(InputError, match="the query: there are NaN or infinite voxels"):
        segment(context, Volume(data, GRID))


def test_settings_that_cannot_be_used(context: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    query = QUERY.scan(GRID)
    with pytest.raises(InputError, match="unknown model 'sam'; known models: none, builtin"):
        segment(context, query, settings("model=sam"))
    monkeypatch.setattr(pipeline, "describe_model", lambda _: type("Row", (), {"name": "x", "prompts": ("box",)}))
    with pytest.raises(InputError, match="the model 'x' does not take the prompt 'click'; it takes box"):
        segment(context, query, settings("prompt=click"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ModelError, match="'cuda' was asked for and PyTorch sees no CUDA GPU; use the device 'cpu'"):
        resolve_device("cuda")
    with pytest.raises(InputError, match="unknown device 'tpu'; expected one of auto, cpu, cuda"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "the memory does not suffice"), (torch.OutOfMemoryError(), "the GPU ran out of memory")],
)
def test_memory_errors_are_sentences(
    context: Atlas, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "register", fail)
    with pytest.raises(ModelError, match=message):
        segment(context, QUERY.scan(GRID))


def test_random_state_of_the_caller_is_kept(context: Atlas) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    segment(context, QUERY.scan(GRID), settings("seed=1"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (4.0, 0.25), (8.0, 0.5), (40.0, 1.0)])
def test_outside_shares_by_hand(shift: float, expected: float) -> None:
    grid = Grid((8, 4, 4), np.diag([2.0, 2.0, 2.0, 1.0]))
    labels = Volume(np.full(grid.shape, 3, np.uint8), grid)
    matrix = np.eye(4)
    matrix[0, 3] = -shift  # the atlas lies `shift` mm further to the right in the query's world
    assert outside_shares(labels, [3], Affine(matrix), grid) == {3: expected}
