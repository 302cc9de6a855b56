"""The whole job in memory: the same in every array order, honest about what is not there."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from atlassegfm.atlas import Atlas
from atlassegfm.benchmark.pairs import fused_by
from atlassegfm.context import Context, customize
from atlassegfm.core.config import with_overrides
from atlassegfm.core.device import resolve_device
from atlassegfm.core.errors import InputError, ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.fusion.smoothing import smooth, smoothing_sigma_mm
from atlassegfm.jobs.store import RunInputs, run_record
from atlassegfm.models import OnPrompt, load_model
from atlassegfm.prompts import ClickPrompt, Prompt
from atlassegfm.quality.coverage import outside_fractions
from atlassegfm.result import Segmentation
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from atlassegfm.transforms.maps import Affine, Chain, DisplacementField, displacement_on
from atlassegfm.transforms.resample import resample
from conftest import rotation
from scenes import ATLAS, PAPER_GATE, QUERY, QUICK_GATE, STRUCTURES, UNREGISTERED, straight_grid

#: The module: the package shows the function of this name.
method = importlib.import_module("atlassegfm.segment")

GRID = straight_grid()


#: All stages, on grids of the size of the tiny patient.
QUICKLY = (
    "registration.coarse_voxels=8000",
    "registration.fine_voxels=20000",
    "registration.instance.level_voxels=[20000]",
    "registration.instance.local_voxels=30000",
    "registration.instance.iterations=[15]",
    "registration.linear_iterations=15",
    "registration.candidates=2",
)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES)


@pytest.fixture(scope="module")
def context(atlas: Atlas) -> Context:
    """With the default gate, trained once for all tests."""
    return customize(Context(atlas, settings()))


def context_for(atlas: Atlas, *overrides: str) -> Context:
    """With the paper's gate, which trains in no time."""
    return Context(atlas, settings(*PAPER_GATE, *overrides))


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


def status_of(result: Segmentation) -> dict[str, str]:
    return {one.structure.name: one.status for one in result.structures}


def assert_same_voxels(result: Segmentation, expected: Segmentation) -> None:
    turned = result.labels.turned_to(expected.labels.grid)
    np.testing.assert_array_equal(turned.data, expected.labels.data)


def test_result_is_good_and_on_the_grid_of_the_query(context: Context) -> None:
    query = stored_as(QUERY.scan(GRID), "LPS")
    result = segment(context, query, settings())
    assert result.labels.grid is query.grid
    assert result.labels.data.dtype == np.uint8
    scores = dice_per_structure(result.labels.data, QUERY.labels(query.grid).data, context.atlas.values)
    assert min(scores.values()) > 0.65, scores  # nothing is registered: the node is 2.5 of its 6 mm off
    assert status_of(result) == {"liver": "present", "kidney": "present", "node": "present"}
    for one in result.structures:
        voxels = int((result.labels.data == one.structure.value).sum())
        assert one.volume_ml == pytest.approx(voxels * 8 / 1000)
    assert result.gate is not None
    assert result.gate.samples == 3 * 4
    assert result.prompt == "mask"
    assert set(result.seconds) == {"registration", "warping", "model", "fusion", "quality"}


@pytest.mark.parametrize("codes", ["LPS", "LAS", "SAR", "PIR"])
@pytest.mark.parametrize("prompt", ["mask", "box", "click"])
def test_array_order_changes_nothing(atlas: Atlas, codes: str, prompt: str) -> None:
    query = QUERY.scan(GRID)
    made = context_for(atlas, f"prompt={prompt}")
    straight, turned = segment(made, query), segment(made, stored_as(query, codes))
    assert turned.labels.grid.axis_codes == codes
    assert_same_voxels(turned, straight)
    for one, other in zip(turned.structures, straight.structures, strict=True):
        assert one.prompt is not None
        assert other.prompt is not None
        if prompt == "click":
            assert one.prompt.first_mm == other.prompt.first_mm


def oblique_grid() -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = rotation(12, -8, 15) * 2
    shape = (50, 44, 40)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) / 2)
    return Grid(shape, affine)


@pytest.fixture(scope="module")
def registered(context: Context) -> Segmentation:
    return segment(context, QUERY.scan(GRID), settings(registered=True))


@pytest.mark.parametrize(
    ("grid", "is_registered"),
    [
        (oblique_grid(), False),
        (straight_grid((64, 54, 24), (1.5, 1.5, 3.0)), False),
        (oblique_grid(), True),
    ],
    ids=["oblique", "anisotropic", "oblique-registered"],
)
def test_other_voxels_of_the_same_patient(
    context: Context, registered: Segmentation, grid: Grid, is_registered: bool
) -> None:
    """The result is about the same place in the world, whatever lattice the patient was scanned on."""
    straight = registered if is_registered else segment(context, QUERY.scan(GRID), settings())
    other = segment(context, QUERY.scan(grid), settings(registered=is_registered))
    for value in context.atlas.values:
        there = Volume((straight.labels.data == value).astype(np.float32), GRID)
        overlap = dice_of(resample(there, grid) >= 0.5, other.labels.data == value)
        assert overlap > (0.94 if value != 12 else 0.86), (value, overlap)  # 12 is 6 voxels wide


def test_array_order_changes_nothing_after_registration(context: Context, registered: Segmentation) -> None:
    """Nor does a second run: results are the same to the last voxel."""
    assert_same_voxels(segment(context, stored_as(QUERY.scan(GRID), "LAS"), settings(registered=True)), registered)


def dice_of(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_structure_outside_the_field_of_view_is_named(context: Context) -> None:
    query = QUERY.scan(GRID.crop((0, 0, 0), (48, 40, 22)))  # ends 7 mm above the origin, below the node
    result = segment(context, query, settings())
    assert status_of(result) == {"liver": "present", "kidney": "present", "node": "outside"}
    node = result.structures[2]
    assert node.outside_fraction == 1
    assert node.reason == "100% of it lies outside the field of view"
    assert node.prompt is None
    assert node.volume_ml == 0
    assert 12 not in result.probabilities
    assert not (result.labels.data == 12).any()
    liver = result.structures[0]
    assert 0.1 < liver.outside_fraction < 0.5


def test_structure_lost_between_slices_is_absent(context: Context) -> None:
    labels = context.atlas.labels.data.copy()
    labels[24, 20, 1] = 99  # a single voxel of 2 mm
    one_voxel = context_for(Atlas.from_volumes(context.atlas.image, Volume(labels, GRID)))
    thick = straight_grid((48, 40, 7), (2.0, 2.0, 10.0))
    result = segment(one_voxel, QUERY.scan(thick))
    assert result.structures[3].status == "absent"


def test_nothing_in_view(context: Context) -> None:
    query = QUERY.scan(GRID.crop((0, 0, 0), (5, 40, 36)))
    result = segment(context, query, settings())
    assert set(status_of(result).values()) == {"outside"}
    assert not result.labels.data.any()


def test_without_a_model(context: Context) -> None:
    result = segment(context, QUERY.scan(GRID), settings("model=none"))
    assert result.model_labels is None
    assert result.gate is None
    assert result.prompt is None
    np.testing.assert_array_equal(result.labels.data, ATLAS.labels(GRID).data)


def test_label_values_stay(context: Context) -> None:
    """Values beyond 16 bits neither change nor cost memory."""
    labels = context.atlas.labels.data.astype(np.uint32)
    labels[labels == 12] = 614_454_277
    large = Atlas.from_volumes(context.atlas.image, Volume(labels, GRID))
    query = QUERY.scan(GRID)
    one, other = (segment(context_for(atlas), query) for atlas in (large, context.atlas))
    assert one.labels.data.dtype == np.uint32
    back = np.where(one.labels.data == 614_454_277, 12, one.labels.data)
    np.testing.assert_array_equal(back, other.labels.data)
    assert set(one.probabilities) == {1, 7, 614_454_277}


def test_click_is_reported_in_voxels_of_the_file(atlas: Atlas) -> None:
    query = stored_as(QUERY.scan(GRID), "PIR")
    result = segment(context_for(atlas, "prompt=click"), query)
    for one in result.structures:
        assert one.prompt is not None
        assert one.prompt.kind == "click"
        assert one.prompt.first_voxel == one.prompt.last_voxel
        np.testing.assert_allclose(query.grid.voxel_to_world(one.prompt.first_voxel), one.prompt.first_mm, atol=0.01)
        centre = {1: (13, 4, -2), 7: (-19, -9, -9), 12: (-9, 13, 18)}[one.structure.value]
        assert np.linalg.norm(np.subtract(one.prompt.first_mm, centre)) < 4


def test_box_is_reported_by_its_corner_voxels(atlas: Atlas) -> None:
    query = stored_as(QUERY.scan(GRID), "LPS")
    result = segment(context_for(atlas, "prompt=box"), query)
    liver = result.structures[0].prompt
    assert liver is not None
    size = np.subtract(liver.last_voxel, liver.first_voxel) + 1
    assert size[2] == 1
    np.testing.assert_allclose(size[:2] * 2, [34, 28], atol=4)


def test_query_of_another_type_and_in_another_memory_order(context: Context) -> None:
    query = QUERY.scan(GRID)
    whole = Volume(query.data.astype(np.int16), GRID)
    one = segment(context, whole, settings())
    other = segment(context, Volume(np.asfortranarray(whole.data.astype(np.float64)), GRID), settings())
    np.testing.assert_array_equal(one.labels.data, other.labels.data)


def test_a_given_transform_keeps_its_parts(context: Context) -> None:
    view = QUERY.scan(GRID)
    nodes = GRID.crop((10, 10, 10), (30, 30, 30))
    values = np.zeros((3, *nodes.shape), np.float32)
    values[0, 8:12, 5:15, 5:15] = 1.0
    local = DisplacementField(nodes, values)
    field = displacement_on(
        Affine(np.diag([1.1, 1.1, 1.1, 1.0])), Grid((24, 20, 18), GRID.affine @ np.diag([2, 2, 2, 1.0]))
    )
    given = segment(context, view, settings("model=none"), transforms=[Chain((local, field, Affine.identity()))])
    assert (given.registration.local, given.registration.field) == (local, field)
    assert given.registration.folding == 0
    statistics = given.registration.jacobian
    assert statistics is not None
    assert statistics.folding == 0
    assert statistics.median == pytest.approx(1.331, abs=1e-3)
    # By central differences over 2 voxels of 2 mm: 1 mm more or less.
    assert statistics.minimum == pytest.approx(1.1**3 * 0.75, abs=0.01)
    assert statistics.percentile_99 == pytest.approx(1.1**3 * 1.25, abs=0.01)
    # A field whose nodes all lie out of view says nothing about volumes.
    far = Grid(nodes.shape, nodes.affine + np.array([[0, 0, 0, 500.0], [0] * 4, [0] * 4, [0] * 4]))
    given = segment(
        context, view, settings("model=none"), transforms=[Chain((DisplacementField(far, values), Affine.identity()))]
    )
    assert given.registration.local is None
    record = run_record(given, RunInputs(context, view))
    assert record.registration.jacobian is not None
    assert set(record.registration.jacobian.values()) == {None}
    json.loads(record.to_json(), parse_constant=pytest.fail)


def test_queries_that_cannot_be_used(context: Context) -> None:
    with pytest.raises(InputError, match="the query: all voxels have the value 2"):
        segment(context, Volume(np.full(GRID.shape, 2.0), GRID))
    with pytest.raises(InputError, match="the query: .* voxels are NaN"):
        segment(context, Volume(np.full(GRID.shape, np.nan), GRID))


def test_settings_that_cannot_be_used(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    query = QUERY.scan(GRID)
    with pytest.raises(InputError, match="unknown model 'sam'"):
        segment(context_for(context.atlas, "model=sam"), query)
    row = type("Row", (), {"name": "x", "prompts": ("box",)})
    monkeypatch.setattr("atlassegfm.models.table.describe_model", lambda _: row)
    with pytest.raises(InputError, match="the model 'x' does not take the prompt 'click'; it takes box"):
        segment(context_for(context.atlas, "prompt=click"), query)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ModelError, match="'cuda' was asked for and PyTorch sees no CUDA GPU; use the device 'cpu'"):
        resolve_device("cuda")
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "the machine ran out of memory"), (torch.OutOfMemoryError(), "the GPU ran out of memory")],
)
def test_memory_errors_are_sentences(
    context: Atlas, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(method, "register_all", fail)
    with pytest.raises(ModelError, match=message):
        segment(context, QUERY.scan(GRID), settings())


def test_random_state_of_the_caller_is_kept(atlas: Atlas) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    segment(context_for(atlas, "seed=1"), QUERY.scan(GRID))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (4.0, 0.25), (8.0, 0.5), (40.0, 1.0)])
def test_outside_fractions_by_hand(shift: float, expected: float) -> None:
    grid = Grid((8, 4, 4), np.diag([2.0, 2.0, 2.0, 1.0]))
    scan = Volume(np.arange(128, dtype=np.float32).reshape(grid.shape), grid)
    atlas = Atlas.from_volumes(scan, Volume(np.full(grid.shape, 3, np.uint8), grid))
    matrix = np.eye(4)
    matrix[0, 3] = -shift  # the atlas lies `shift` mm further to the right in the query's world
    assert outside_fractions(atlas, Affine(matrix), grid) == (expected,)


def test_the_same_gate_before_and_with_a_query(atlas: Atlas) -> None:
    """The gate is that of the atlas alone, whatever was computed before it, and serves every query."""
    few = QUICK_GATE
    trained = customize(Context(atlas, settings(*few)))
    assert trained.gate is not None
    assert trained.gate.correction is not None
    assert len(trained.gate.smoothing) == len(atlas.structures)
    query = QUERY.scan(GRID)
    with_query, given = segment(Context(atlas, settings(*few)), query), segment(trained, query)
    assert with_query.gate == trained.gate
    assert given.gate is trained.gate
    assert set(with_query.seconds) - set(given.seconds) == {"gate"}
    np.testing.assert_array_equal(given.labels.data, with_query.labels.data)
    assert customize(Context(atlas, settings(*few, "seed=1"))).gate != trained.gate
    assert customize(Context(atlas, settings("model=none"))).gate is None


def test_smoothing_comes_last(context: Context) -> None:
    assert context.gate is not None
    query = QUERY.scan(GRID)
    wide, none = (
        segment(replace(context, gate=replace(context.gate, smoothing=(width,) * 3)), query, settings("topology=false"))
        for width in (0.2, 0.0)
    )
    for value in context.atlas.values:
        one, other = (result.probabilities[value] for result in (wide, none))
        sigma_mm = smoothing_sigma_mm(0.2, one.atlas, none.grid)
        assert sigma_mm > 0
        expected = smooth(other.fused, sigma_mm, none.grid).to_full(none.grid.shape)
        np.testing.assert_allclose(one.fused.to_full(none.grid.shape), expected, atol=1e-5)


class Wrapped:
    """The built-in model, watched or spoilt."""

    def __init__(self) -> None:
        self.inner = load_model("builtin", "cpu")
        self.provenance: Mapping[str, Any] = {"weights": "counted"}
        self.encoded: list[Volume] = []
        self.prompts: list[object] = []

    def encode(self, image: Volume) -> object:
        self.encoded.append(image)
        return self.inner.encode(image)

    def predict(self, encoded: Any, prompts: Mapping[int, Prompt], on_prompt: OnPrompt) -> dict[int, LocalMap]:
        self.prompts += prompts.values()
        return self.inner.predict(encoded, prompts, on_prompt)


class Nonsense(Wrapped):
    """Finds every structure in one corner."""

    def predict(self, encoded: Any, prompts: Mapping[int, Prompt], on_prompt: OnPrompt) -> dict[int, LocalMap]:
        return {n: LocalMap((0, 0, 0), np.ones((3, 3, 3), np.float32)) for n in prompts}


class Blind(Wrapped):
    """Finds all but the second structure."""

    def predict(self, encoded: Any, prompts: Mapping[int, Prompt], on_prompt: OnPrompt) -> dict[int, LocalMap]:
        found = super().predict(encoded, prompts, on_prompt)
        return {**found, 2: LocalMap(found[2].start, np.full_like(found[2].values, 0.3))}


@pytest.mark.parametrize("right", ["atlas", "model"])
def test_the_gate_learns_which_mask_is_right(atlas: Atlas, right: str) -> None:
    model = Nonsense() if right == "atlas" else None
    bad = 0.05 if right == "atlas" else 0.95
    paper = "fusion.gate=paper"
    fast = settings(paper, f"fusion.start={bad}", "fusion.learning_rate=0.1", "fusion.iterations=50")
    gate = customize(Context(atlas, fast), model=model).gate
    assert gate is not None
    assert gate.dice_after > gate.dice_before + 0.02
    assert (gate.bias > np.log(bad / (1 - bad))) == (right == "atlas")
    best = customize(Context(atlas, settings(paper)), model=model).gate
    assert best is not None
    assert (best.start >= 0.75) == (right == "atlas")


def test_a_structure_the_model_does_not_find_stays_as_warped(context: Context) -> None:
    result = segment(context, QUERY.scan(GRID), settings(), model=Blind())
    lost = context.atlas.values[1]
    np.testing.assert_array_equal(result.probabilities[lost].fused.values, result.probabilities[lost].atlas.values)
    first, second, _ = result.structures
    assert (second.status, second.volume_ml > 0) == ("present", True)
    assert "the model found nothing" in second.reason
    assert second.quality is not None
    assert second.quality.verdict in ("review", "failed")
    assert second.quality.reason.startswith(second.reason)
    assert first.reason == ""
    assert context.gate is not None
    paper = fused_by(context.gate.as_the_paper(), context.atlas, result)
    assert (paper.data == lost).any()
    with pytest.raises(ValueError, match="correction"):
        fused_by(context.gate, context.atlas, result)


def test_the_model_encodes_each_scan_once(atlas: Atlas) -> None:
    model = Wrapped()
    stages: list[str] = []
    segment(context_for(atlas, "prompt=click"), QUERY.scan(GRID), model=model, on_stage=stages.append)
    assert len(model.encoded) == 2
    assert model.encoded[1] is atlas.image
    assert len(model.prompts) == 3 * 5
    assert all(isinstance(prompt, ClickPrompt) for prompt in model.prompts)
    assert stages[0] == "registration"
    assert "model: kidney" in stages


def test_nothing_takes_a_label_of_the_query() -> None:
    """The gate must not see the truth."""
    assert list(inspect.signature(segment).parameters) == [
        *("context", "query", "settings", "device", "model", "transforms", "on_stage", "progress")
    ]
    assert list(inspect.signature(customize).parameters) == [*("context", "device", "model", "on_stage", "progress")]


def test_repr_fits_a_screen(context: Context) -> None:
    result = segment(context, QUERY.scan(GRID), settings("model=none"))
    for shown in (context.atlas, context, result):
        lines = repr(shown).splitlines()
        assert len(lines) <= 10
        assert max(map(len, lines)) <= 400
    assert all(name in repr(result) for name in context.atlas.names)
