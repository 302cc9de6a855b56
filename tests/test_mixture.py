"""Mixture of several models: weights learned on the atlas, and the whole path from settings to files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlassegfm import demo
from atlassegfm.atlas import Atlas
from atlassegfm.benchmark import METHODS, Variant
from atlassegfm.context import Context, customize
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError, ModelError
from atlassegfm.core.image import Volume, load_labels
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice
from atlassegfm.fusion.mixture import best_mixture, mix, mix_structures
from atlassegfm.jobs.store import RunInputs, write_result
from atlassegfm.models import Segmenter, table
from atlassegfm.models.table import describe_models, prompt_kind, shared_prompts, weights_paths
from atlassegfm.prompts import MaskPrompt, Prompt
from atlassegfm.records import StatusRecord
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from conftest import Run
from scenes import ATLAS, PAPER_GATE, QUERY, STRUCTURES, UNREGISTERED, save_demo_pair, straight_grid

SHAPE = (20, 18, 16)


def block(start: int, stop: int, value: float = 1.0) -> LocalMap:
    full = np.zeros(SHAPE, np.float32)
    full[start:stop, 4:12, 3:11] = value
    return LocalMap.from_full(full)


# Averages.


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_mean_stays_between_its_members(parts: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    values = [random.random((4, 5, 6), np.float32) for _ in parts]
    for one in values:
        one[0, 0, 0] = 1  # none is empty
    masks = {f"model{n}": LocalMap((n, 0, 1), one) for n, one in enumerate(values)}
    weights = {name: part / sum(parts) for name, part in zip(masks, parts, strict=True)}
    mixed = mix(masks, weights).to_full((12, 8, 9))
    full = np.stack([one.to_full((12, 8, 9)) for one in masks.values()])
    slow = np.einsum("m,mijk->ijk", list(weights.values()), full)
    np.testing.assert_allclose(mixed, slow, atol=1e-6)
    assert (mixed <= full.max(axis=0) + 1e-6).all()
    assert (mixed >= full.min(axis=0) - 1e-6).all()
    turned = mix(dict(reversed(masks.items())), dict(reversed(weights.items())))
    np.testing.assert_array_equal(turned.values, mix(masks, weights).values)


def test_model_that_found_nothing_has_no_say() -> None:
    found = block(4, 12, 0.8)
    for empty in (LocalMap.empty(), block(4, 12, 0.4)):
        mixed = mix({"a": found, "b": empty}, {"a": 0.25, "b": 0.75})
        assert mixed is found
    assert mix({"a": LocalMap.empty(), "b": LocalMap.empty()}, {"a": 0.5, "b": 0.5}).is_empty


def test_single_model_is_returned_as_it_is() -> None:
    masks = {3: block(2, 8), 5: block(1, 4)}
    assert mix_structures({"": masks}, {}) == masks
    assert mix_structures({}, {}) == {}


# Weights.


def test_model_that_fails_on_a_structure_of_the_atlas_gets_no_say_in_it() -> None:
    truths = {1: block(4, 12), 2: block(8, 16)}
    good, ring = {1: block(4, 12), 2: block(8, 15)}, {1: block(4, 13), 2: block(0, 20)}
    weights = best_mixture([{"good": good, "ring": ring}] * 2, truths)
    assert set(weights) == {"good", "ring"}
    assert weights["ring"][1] < 0.5
    assert all(sum(pair) == pytest.approx(1) for pair in zip(*weights.values(), strict=True))
    mixed = mix_structures({"good": good, "ring": ring}, weights)
    assert ((mixed[2].to_full(SHAPE) >= 0.5) == (good[2].to_full(SHAPE) >= 0.5)).all()


def test_models_that_are_equally_good_are_averaged() -> None:
    truths = {1: block(4, 12)}
    weights = best_mixture([{"b": truths, "a": truths}], truths)
    assert weights == {"a": (0.5,), "b": (0.5,)}


def test_errors_that_cancel_are_averaged() -> None:
    """One model reaches too far on one side, the other on the other."""
    truths, random = {1: block(5, 13)}, np.random.default_rng(0)

    def wrong(start: int, stop: int) -> LocalMap:
        soft = block(start, stop).to_full(SHAPE) * random.uniform(0.85, 0.95, SHAPE).astype(np.float32)
        return LocalMap.from_full(soft)

    draws = [{"one": {1: wrong(2, 13)}, "other": {1: wrong(5, 16)}} for _ in range(2)]
    assert best_mixture(draws, truths) == {"one": (0.5,), "other": (0.5,)}


def test_order_of_names_does_not_matter() -> None:
    truths, random = {1: block(4, 12), 2: block(8, 16)}, np.random.default_rng(1)

    def drawn() -> dict[int, LocalMap]:
        return {n: LocalMap(one.start, random.random(one.values.shape, np.float32)) for n, one in truths.items()}

    draws: list[Mapping[str, Mapping[int, LocalMap]]] = [{"a": drawn(), "b": drawn(), "c": drawn()} for _ in range(2)]
    assert best_mixture(draws, truths) == best_mixture([dict(reversed(one.items())) for one in draws], truths)


def test_one_model_and_no_draw_have_no_weights() -> None:
    assert best_mixture([{"": {1: block(4, 12)}}], {1: block(4, 12)}) == {}
    assert best_mixture([], {1: block(4, 12)}) == {}


# Settings.


def test_names_are_put_in_order() -> None:
    for text in ("litemedsam,builtin", "builtin, litemedsam", "builtin,litemedsam"):
        settings = with_overrides(Settings(), [f'model="{text}"'])
        assert settings == replace(Settings(), model="builtin,litemedsam")
        assert settings.model_names == ("builtin", "litemedsam")
    assert replace(Settings(), model="none").model_names == ()


@pytest.mark.parametrize("text", ["builtin,builtin", "builtin,", "none,builtin", ""])
def test_names_that_cannot_be(text: str) -> None:
    with pytest.raises(InputError) as error:
        with_overrides(Settings(), [f'model="{text}"'])
    assert "model" in str(error.value)


def test_unknown_name_in_a_list() -> None:
    with pytest.raises(InputError) as error:
        prompt_kind(replace(Settings(), model="builtin,litemedsan"))
    assert "'litemedsan'" in str(error.value)
    assert "'litemedsam'" in str(error.value)


def test_prompts_that_all_take() -> None:
    rows = describe_models(replace(Settings(), model="litemedsam,nninteractive"))
    assert shared_prompts(rows) == ("mask", "box")
    with pytest.raises(InputError, match="no prompt in common"):
        prompt_kind(replace(Settings(), model="builtin,vesselfm"))


def test_paths_of_weights() -> None:
    both = replace(Settings(), model="litemedsam,medsam2")
    named = replace(both, model_path="medsam2=/w/two.pt,litemedsam=/w/one.pth")
    assert weights_paths(named) == {"medsam2": Path("/w/two.pt"), "litemedsam": Path("/w/one.pth")}
    with pytest.raises(InputError, match="litemedsam=PATH,medsam2=PATH"):
        weights_paths(replace(both, model_path="/w/one.pth"))
    alone = replace(Settings(), model="builtin,litemedsam", model_path="/w/one.pth")
    assert weights_paths(alone) == {"litemedsam": Path("/w/one.pth")}


# The whole path.


class Shifted:
    """A model that answers with its prompt, moved along the first axis."""

    def __init__(self, voxels: int) -> None:
        self.voxels = voxels
        self.provenance: Mapping[str, Any] = {"weights": {"file": "w", "bytes": 1, "sha256": f"{voxels:064d}"}}

    def encode(self, image: Volume) -> None:
        return None

    def predict(self, _: None, prompts: Mapping[int, Prompt], on_prompt: Any = None) -> dict[int, LocalMap]:
        found = {}
        for number, prompt in prompts.items():
            assert isinstance(prompt, MaskPrompt)
            on_prompt(number)
            mask = prompt.probability
            low, high = mask.start[0] + self.voxels, mask.stop[0] + self.voxels
            kept = slice(max(-low, 0), mask.values.shape[0] - max(high - 48, 0))
            found[number] = LocalMap((max(low, 0), *mask.start[1:]), mask.values[kept])
        return found


@pytest.fixture(scope="module")
def scene() -> tuple[Atlas, Volume]:
    grid = straight_grid()
    return Atlas.from_volumes(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES), QUERY.scan(grid)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Segmenter]:
    """Two models under names of the table: one that is right, one that is 12 voxels off."""
    made: dict[str, Segmenter] = {"builtin": Shifted(0), "litemedsam": Shifted(12)}
    monkeypatch.setattr(table, "load_model", lambda name, *_: made[name])
    return made


def both(*overrides: str) -> Settings:
    return with_overrides(Settings(), [*UNREGISTERED, *PAPER_GATE, 'model="litemedsam,builtin"', *overrides])


def test_weights_are_learned_stored_and_used(
    scene: tuple[Atlas, Volume], models: dict[str, Segmenter], tmp_path: Path
) -> None:
    atlas, query = scene
    context = customize(Context(atlas, both()))
    assert context.gate is not None
    # The one that is off has no say in any structure of the atlas.
    assert max(context.gate.mixture["litemedsam"]) <= 0.25
    context.save(tmp_path / "ctx")
    loaded = Context.load(tmp_path / "ctx")
    assert loaded.gate == context.gate
    assert loaded.weights_sha256 == context.weights_sha256 == f"{0:064d},{12:064d}"

    result = segment(loaded, query)
    assert set(result.member_labels) == {"builtin", "litemedsam"}
    assert result.model_labels is not None
    assert dice(result.model_labels.data, result.member_labels["builtin"].data) > 0.98
    assert dice(result.model_labels.data, result.member_labels["litemedsam"].data) < 0.8
    for one in result.structures:
        assert sum(member.weight for member in one.members.values()) == 1
        assert one.members["builtin"].dice > one.members["litemedsam"].dice
    alone = segment(customize(Context(atlas, both("model=builtin"))), query)
    assert dice(result.labels.data, alone.labels.data) > 0.98
    assert alone.member_labels == {}
    assert all(not one.members for one in alone.structures)


def test_other_weights_or_models_do_not_fit_the_gate(scene: tuple[Atlas, Volume], models: dict[str, Segmenter]) -> None:
    atlas, query = scene
    context = customize(Context(atlas, both()))
    with pytest.raises(InputError, match="builtin,litemedsam"):
        segment(context, query, both("model=builtin"))
    models["litemedsam"] = Shifted(3)
    with pytest.raises(ModelError, match="other weights"):
        segment(context, query)


def test_result_folder_has_every_member(
    scene: tuple[Atlas, Volume], models: dict[str, Segmenter], tmp_path: Path
) -> None:
    atlas, query = scene
    context = Context(atlas, both(f"model_path={tmp_path / 'secret' / 'w.pth'}"))
    result = segment(context, query)
    folder = tmp_path / "out"
    write_result(result, RunInputs(context, query), folder, StatusRecord(state="done"), keep=True)
    run = json.loads((folder / "run.json").read_text())
    assert run["model"]["name"] == "builtin,litemedsam"
    assert set(run["model"]["provenance"]) == {"builtin", "litemedsam"}
    assert run["settings"]["model_path"] == "litemedsam=w.pth"
    assert "secret" not in (folder / "run.json").read_text()
    for name in ("builtin", "litemedsam"):
        stored = load_labels(folder / "members" / f"{name}.nii.gz", allow_empty=True)
        np.testing.assert_array_equal(stored.data, result.member_labels[name].data)
    assert all(set(one["members"]) == {"builtin", "litemedsam"} for one in run["structures"])
    # An earlier result with members is a result, and is replaced.
    write_result(result, RunInputs(context, query), folder, StatusRecord(state="done"))
    assert not (folder / "members").exists()


def test_benchmark_scores_every_member() -> None:
    assert Variant("", both()).scored == ("atlas", "builtin", "litemedsam", "model", "fused", "oracle")
    assert Variant("", both("model=builtin", "fusion.gate=default")).scored == METHODS


def test_command_line(tmp_path: Path, models: dict[str, Segmenter], run: Run) -> None:
    pair = save_demo_pair(tmp_path / "pair", straight_grid())
    options = [part for one in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", one)]
    atlas = ("--atlas", str(pair / demo.ATLAS), "--labels", str(pair / demo.LABELS))
    arguments = (*atlas, str(pair / demo.QUERY), "-o", str(tmp_path / "out"), *options)
    done = run("segment", *arguments, "--model", "litemedsam,builtin", "--keep")
    assert done.code == 0, done.err
    content = json.loads(next((tmp_path / "out").glob("**/run.json")).read_text())
    assert content["model"]["name"] == "builtin,litemedsam"
    assert "model builtin,litemedsam" in done.out
    assert run("report", str(tmp_path / "out")).code == 0
    page = next((tmp_path / "out").glob("*/report.html")).read_text()
    member = content["structures"][0]["members"]["litemedsam"]
    assert f"litemedsam {100 * member['weight']:.0f} % (Dice {member['dice']:.2f})" in page
    refused = run("segment", *arguments, "--model", "builtin,builtin")
    assert refused.code == 2
    assert "'builtin' is named twice" in refused.err
