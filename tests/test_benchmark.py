"""Benchmarks: which pairs there are, what is scored of each, and that a killed run ends as one left alone."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from atlassegfm.atlas import Atlas
from atlassegfm.benchmark import (
    METHODS,
    Pair,
    PairRecord,
    Plan,
    Row,
    Variant,
    make_pairs,
    pairs,
    run,
    tables,
    write_reports,
)
from atlassegfm.benchmark import plan as plan_module
from atlassegfm.benchmark.plan import slug
from atlassegfm.benchmark.tables import Column, columns_of, compare_columns, main_table
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.dataset import Dataset, load_dataset
from atlassegfm.core.errors import InputError, RegistrationError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_image, load_labels, load_volume, save_volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.evaluate.metrics import StructureScores
from atlassegfm.evaluate.tolerances import uniform
from atlassegfm.prompts import ClickPrompt
from atlassegfm.result import Segmentation
from atlassegfm.settings import Settings
from scenes import ATLAS, ORGANS, QUERY, QUICK_GATE, STRUCTURES, UNREGISTERED, Patient, straight_grid

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
#: The same place with other array axes.
LPS = Grid(GRID.shape, np.diag([-1.0, -1, 1, 1]) @ GRID.affine)
#: The third lies another way, the fourth has no node.
SCANS = {
    "case_1": (ATLAS, GRID),
    "case_2": (QUERY, GRID),
    "case_3": (Patient((-2.0, 1.0, -1.0), 0.97), LPS),
    "case_4": (Patient((0.0, 2.0, -3.0), 1.02), GRID),
}
LIVER, KIDNEY, NODE = (value for value, *_ in ORGANS)
FAST = with_overrides(Settings(), [*UNREGISTERED, *QUICK_GATE])
NO_MODEL = replace(FAST, model="none")
TWO = (Variant("none", NO_MODEL), Variant("builtin", FAST))
#: Of `all-pairs`.
EVERY_PAIR = make_pairs(list(SCANS), "all-pairs")
ONE_TO_ALL = make_pairs(list(SCANS), "one-to-all")


def write_dataset(folder: Path) -> Path:
    """A dataset in nnU-Net raw layout of four small scans."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for name, (patient, grid) in SCANS.items():
        labels = patient.labels(grid)
        if name == "case_4":
            labels.data[labels.data == NODE] = 0
        save_volume(patient.scan(grid), folder / f"imagesTr/{name}_0000.nii.gz")
        save_volume(labels, folder / f"labelsTr/{name}.nii.gz")
    names = {"background": 0} | {name: value for value, name, *_ in ORGANS}
    write_json(folder, {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 4, "file_ending": ".nii.gz"})
    return folder


def write_json(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_dataset(tmp_path_factory.mktemp("data") / "Dataset009_Small"))


def plan_of(dataset: Dataset, pairs: tuple[Pair, ...] = ONE_TO_ALL, *variants: Variant, **changes: Any) -> Plan:
    plan = Plan("made up", dataset, pairs, variants or (Variant("default", NO_MODEL),), (1, 7, 12), uniform(2))
    return replace(plan, **changes)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Spy:
    """Calls of segment() and what it gave; ``before`` may raise instead."""

    before: Callable[[int, Context, Volume], None]
    calls: list[tuple[Any, ...]]
    results: list[Segmentation]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    real = pairs.segment
    watched = Spy(lambda *_: None, [], [])

    def segment(*arguments: Any, **keywords: Any) -> Segmentation:
        watched.calls.append((*arguments, keywords))
        watched.before(len(watched.calls), arguments[0], arguments[1])
        watched.results.append(real(*arguments, **keywords))
        return watched.results[-1]

    monkeypatch.setattr(pairs, "segment", segment)
    return watched


def interrupt_at(number: int) -> Callable[..., None]:
    def before(call: int, *_: object) -> None:
        if call == number:
            raise KeyboardInterrupt

    return before


def fail_for(query: str) -> Callable[..., None]:
    def before(_call: int, _context: Context, scan: Volume) -> None:
        assert scan.source is not None
        if query in scan.source.path.name:
            raise RegistrationError("nothing in common")

    return before


# Which pairs


def pairs_of(cases: str, protocol: str, **options: Any) -> list[str]:
    """Pairs of cases with names of one letter, as atlas and query."""
    return [pair.atlas + pair.query for pair in make_pairs(list(cases), protocol, **options)]


def test_all_pairs_are_all_ordered_ones_by_atlas() -> None:
    assert pairs_of("abc", "all-pairs") == ["ab", "ac", "ba", "bc", "ca", "cb"]
    assert pairs_of("ab", "all-pairs") == ["ab", "ba"]


def test_one_to_all_takes_the_first_case_or_those_named() -> None:
    assert pairs_of("abcd", "one-to-all") == ["ab", "ac", "ad"]
    assert pairs_of("abc", "one-to-all", atlases=["c", "a", "c"]) == ["ca", "cb", "ab", "ac"]


def test_folds_are_dealt_from_a_shuffle_and_begin_with_their_atlas() -> None:
    # numpy shuffles seven cases with the seed 0 to c e d g f a b; three folds are cgb, ef and da.
    assert pairs_of("abcdefg", "one-shot-5fold", folds=3) == ["cb", "cg", "ef", "da"]
    # With the seed 3 to f g c b e d a: fba, ge and cd.
    assert pairs_of("abcdefg", "one-shot-5fold", folds=3, seed=3) == ["fa", "fb", "ge", "cd"]


@pytest.mark.parametrize("count", [10, 11, 24, 50])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_folds_cover_every_case_once(count: int, seed: int) -> None:
    cases = [f"case_{n:02}" for n in range(count)]
    pairs = make_pairs(cases, "one-shot-5fold", seed=seed)
    folds = Counter(pair.atlas for pair in pairs)
    assert sorted([*folds, *(pair.query for pair in pairs)]) == cases
    assert len(folds) == 5
    assert max(folds.values()) - min(folds.values()) <= 1
    # Those of one atlas are together.
    assert [atlas for atlas, _ in groupby(pair.atlas for pair in pairs)] == list(folds)


def test_folds_depend_on_the_seed_alone() -> None:
    cases = [f"case_{n:02}" for n in range(20)]
    found = [make_pairs(cases, "one-shot-5fold", seed=seed) for seed in (0, 1, 2, 0)]
    assert found[0] == found[3]
    assert len(set(found)) == 3


def test_folds_of_one_case_give_no_pair_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pairs = make_pairs(list("abcdefg"), "one-shot-5fold")
    assert len(pairs) == 2
    assert caplog.messages == ["3 of 5 folds hold a single case, an atlas without a query; they give no pair"]


def test_folds_of_more_cases_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    make_pairs(list("abcdefghij"), "one-shot-5fold")
    assert not caplog.messages


def test_one_of_some_pairs_is_kept() -> None:
    assert pairs_of("abcdef", "one-to-all", every=2) == ["ab", "ad", "af"]
    assert pairs_of("abcdefg", "one-shot-5fold", folds=3, every=3) == ["cb", "da"]
    assert pairs_of("abc", "one-to-all", every=99) == ["ab"]


def test_a_sample_of_all_pairs_has_each_case_about_as_often_as_atlas_and_as_query() -> None:
    assert pairs_of("abcdef", "all-pairs", every=5) == ["ab", "bc", "cd", "de", "ef", "fa"]
    # 12 pairs of four cases, one of two: all with the next case, and two with the next but one.
    assert pairs_of("abcd", "all-pairs", every=2) == ["ab", "ac", "bc", "bd", "cd", "da"]
    assert pairs_of("abcd", "all-pairs", every=99) == ["ab"]


@pytest.mark.parametrize(
    ("cases", "options", "message"),
    [
        (
            "ab",
            {"protocol": "two-shot"},
            "unknown protocol 'two-shot'; expected one of one-shot-5fold, one-to-all, all-pairs",
        ),
        ("a", {}, "a benchmark needs an atlas and a query; found 1 case: add labelled cases"),
        ("ab", {"every": 0}, "--every 0: expected 1 (all pairs) or more"),
        (
            "ab",
            {"atlases": ["a"]},
            "--atlas belongs to the protocol one-to-all, not all-pairs; leave one of them out",
        ),
        (
            "ab",
            {"atlases": ["a"], "protocol": "one-shot-5fold"},
            "--atlas belongs to the protocol one-to-all, not one-shot-5fold; leave one of them out",
        ),
        (
            "abc",
            {"atlases": ["a", "d"], "protocol": "one-to-all"},
            "--atlas d: not a case of this benchmark; expected one of a, b, c",
        ),
        ("abc", {"folds": 1, "protocol": "one-shot-5fold"}, "--folds 1: expected 2 or more"),
        (
            "abcd",
            {"protocol": "one-shot-5fold"},
            "5 folds need at least 6 cases, found 4; use --folds with a smaller number, or --protocol all-pairs",
        ),
        (
            "abc",
            {"folds": 3, "protocol": "one-shot-5fold"},
            "3 folds need at least 4 cases, found 3; use --folds with a smaller number, or --protocol all-pairs",
        ),
    ],
)
def test_pairs_that_cannot_be_made(cases: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        make_pairs(list(cases), **{"protocol": "all-pairs"} | options)
    assert str(raised.value) == message


# What is scored


def test_the_oracle_picks_whoever_is_right() -> None:
    grid = straight_grid((2, 2, 2))
    maps = {
        # agree and right, agree and wrong, atlas right, model right,
        # none right, none right though one says nothing, nothing there and one right, nothing there and none right
        "atlas": [1, 2, 1, 2, 1, 0, 0, 1],
        "model": [1, 2, 2, 1, 2, 2, 2, 2],
        "reference": [1, 1, 1, 1, 7, 1, 0, 0],
        "expected": [1, 2, 1, 1, 0, 0, 0, 0],
    }
    atlas, model, reference, expected = (
        Volume(np.array(values, np.uint8).reshape(2, 2, 2), grid) for values in maps.values()
    )
    result = pairs.oracle(atlas, model, reference)
    np.testing.assert_array_equal(result.data, expected.data)
    assert result.data.dtype == np.uint8
    # The reference may lie another way.
    flipped = Grid(grid.shape, grid.affine @ np.diag([-1.0, 1, 1, 1]) + np.outer([2.0, 0, 0, 0], [0, 0, 0, 1]))
    turned = Volume(reference.data[::-1].copy(), flipped)
    np.testing.assert_array_equal(pairs.oracle(atlas, model, turned).data, expected.data)
    assert not np.array_equal(pairs.oracle(atlas, model, Volume(turned.data, grid)).data, expected.data)


def score(dice: float, status: Any = "ok", cldice: float | None = None) -> StructureScores:
    return StructureScores(status, dice, dice / 2, 2.0, 1.5, 0.5, 2.5, 10, 12, 0.1, 0.12, cldice, "")


def test_records_come_back_from_json(tmp_path: Path) -> None:
    rows = (
        Row("query", 1, "nan", score(0.75), "atlas"),
        Row("query", 1, "liver", score(math.nan, "both_empty", math.nan), "model", 0.5, "review"),
    )
    record = PairRecord(
        variant="v",
        pair=Pair("atlas", "query"),
        rows=rows,
        seconds={"warping": 0.5},
        total_seconds=0.5,
        peak_memory_mb=300,
        confidence=0.25,
    )
    record.write(tmp_path / "pair.json")
    json.loads((tmp_path / "pair.json").read_text(), parse_constant=pytest.fail)
    back = PairRecord.read(tmp_path / "pair.json")
    assert back.model_copy(update={"rows": ()}) == record.model_copy(update={"rows": ()})
    assert back.rows[0] == rows[0]  # a structure may be called "nan"
    assert back.rows[0].scores.cldice is None
    scores = back.rows[1].scores
    assert scores.status == "both_empty"
    assert scores.cldice is not None
    assert all(math.isnan(value) for value in (scores.dice, scores.nsd, scores.cldice))
    assert back.to_json() == record.to_json()


def test_structures_that_do_not_take_part_are_taken_out_of_the_atlas() -> None:
    context = Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES)
    path = Path("labels.nii.gz")
    small = pairs.restricted(context, (LIVER, NODE, 99), path)
    assert small.values == (LIVER, NODE)
    assert [one.name for one in small.structures] == ["liver", "node"]
    assert set(np.unique(small.labels.data)) == {0, LIVER, NODE}
    np.testing.assert_array_equal(small.labels.data == NODE, context.labels.data == NODE)
    assert small.labels.data.dtype == context.labels.data.dtype
    assert KIDNEY in context.labels.data
    assert pairs.restricted(context, (LIVER, KIDNEY, NODE), path) is context
    with pytest.raises(InputError) as raised:
        pairs.restricted(context, (99,), path)
    assert str(raised.value) == (
        "labels.nii.gz: has none of the structures of this benchmark; leave the case out of the atlases"
    )


def test_left_out_structures_reach_neither_the_pipeline_nor_the_scores(
    dataset: Dataset, tmp_path: Path, spy: Spy
) -> None:
    records = run(plan_of(dataset, values=(KIDNEY, NODE)), tmp_path / "out")
    assert [call[0].atlas.values for call in spy.calls] == 3 * [(KIDNEY, NODE)]
    assert {row.structure for record in records for row in record.rows} == {"kidney", "node"}


def test_what_the_atlas_lacks_is_counted_and_not_scored(dataset: Dataset, tmp_path: Path) -> None:
    pairs = (Pair("case_4", "case_1"), Pair("case_1", "case_4"), Pair("case_1", "case_2"))
    plan = plan_of(dataset, pairs, Variant("default", FAST), centreline=(NODE,))
    records = run(plan, tmp_path / "out")
    lacking, hallucinated, usual = ([row for row in record.rows if row.value == NODE] for record in records)
    assert [row.method for row in lacking] == list(METHODS)
    for row in lacking:
        one = row.scores
        assert one.status == "not_in_atlas"
        assert one.reference_voxels > 0
        assert one.cldice is not None
        assert all(math.isnan(n) for n in (one.dice, one.nsd, one.hd95_mm, one.assd_mm, one.hd95_voxel_mm, one.cldice))
    assert {(row.scores.status, row.scores.dice) for row in hallucinated} == {("hallucinated", 0.0)}
    assert {row.scores.status for row in usual} == {"ok"}
    summary = write_reports(plan, records, tmp_path / "out", plots=False)
    for n, column in enumerate(summary["columns"]):
        assert column["counts"] == {"ok": 7, "missed": 0, "hallucinated": 1, "both_empty": 0, "not_in_atlas": 1}
        node = column["structures"][2]
        assert (node["structure"], node["dice"]["count"]) == ("node", 2)
        assert node["dice"]["mean"] == pytest.approx(usual[n].scores.dice / 2, abs=1e-6)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "atlas only: 7 ok, 1 hallucinated, 1 not in atlas; model: " in report


def test_scores_are_those_of_the_result_against_the_labels(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    records = run(plan_of(dataset, ONE_TO_ALL, Variant("default", FAST)), tmp_path / "out")
    for record, result in zip(records, spy.results, strict=True):
        # case_3 lies another way than its atlas.
        truth = load_labels(dataset.case(record.pair.query).labels).data
        maps = {"atlas": result.atlas_labels, "model": result.model_labels, "fused": result.labels}
        for row in record.rows:
            if row.method in maps:
                found = maps[row.method]
                assert found is not None
                one, other = found.data == row.value, truth == row.value
                expected = 2 * (one & other).sum() / (one.sum() + other.sum())
                assert row.scores.dice == pytest.approx(expected)
        by_method = {
            method: mean(row.scores.dice for row in record.rows if row.method == method and row.value != NODE)
            for method in METHODS
        }
        assert by_method["oracle"] >= max(by_method["atlas"], by_method["model"])
        assert record.seconds.keys() >= {"registration", "registration: prepare", "warping", "model", "fusion"}
        stages = [seconds for name, seconds in record.seconds.items() if ": " not in name]
        assert record.total_seconds == pytest.approx(sum(stages), abs=0.01)
        assert record.confidence is not None
        assert 0 < record.confidence <= 1


def test_the_labels_of_the_query_are_not_given_away(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    """Other labels of the query change the scores and nothing of the result."""
    shutil.copytree(dataset.folder, tmp_path / "data")
    other = load_dataset(tmp_path / "data")
    for case in other.cases[1:]:
        labels = load_labels(case.labels)
        save_volume(Volume(labels.data[::-1, ::-1].copy(), labels.grid), case.labels)
    both = [
        run(plan_of(one, ONE_TO_ALL, Variant("default", FAST)), tmp_path / f"out{n}")
        for n, one in enumerate((dataset, other))
    ]
    for context, query, keywords in spy.calls:
        assert context.settings is FAST
        assert keywords.keys() == {"device", "on_stage", "model"}
        assert context.atlas.labels.source.path.name == "case_1.nii.gz"
        assert query.source.path.parent.name == "imagesTr"
        assert query.source.path.name != "case_1_0000.nii.gz"
    assert len(spy.results) == 6
    for one, again in zip(spy.results[:3], spy.results[3:], strict=True):
        np.testing.assert_array_equal(one.labels.data, again.labels.data)
        assert one.model_labels is not None
        assert again.model_labels is not None
        np.testing.assert_array_equal(one.model_labels.data, again.model_labels.data)
        np.testing.assert_array_equal(one.atlas_labels.data, again.atlas_labels.data)
    for record, changed in zip(*both, strict=True):
        assert record.rows[0].scores.dice > changed.rows[0].scores.dice + 0.1


def test_the_user_clicks_into_each_structure_and_has_no_atlas(
    dataset: Dataset, tmp_path: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Volume, ClickPrompt]] = []

    class Model:
        def encode(self, image: Volume) -> Volume:
            return image

        def predict(self, encoded: Volume, prompts: Mapping[int, ClickPrompt]) -> dict[int, LocalMap]:
            """The clicked voxels alone."""
            return {n: self.answer(encoded, prompt) for n, prompt in prompts.items()}

        def answer(self, encoded: Volume, prompt: ClickPrompt) -> LocalMap:
            asked.append((encoded, prompt))
            clicked = np.zeros(encoded.grid.shape, bool)
            clicked[prompt.ijk] = True
            return LocalMap.from_full(clicked)

    monkeypatch.setattr(pairs, "load_chosen", lambda *_: Model())
    user = Variant("user", FAST, prompts_from="user")
    assert user.scored == ("model",)
    # A click on case_4 for its two structures, on case_3 for all three.
    records = run(plan_of(dataset, (Pair("case_1", "case_4"), Pair("case_1", "case_3")), user), tmp_path / "out")
    assert not spy.calls
    truths = [load_labels(dataset.case(name).labels).canonical().data for name in ("case_4", "case_3")]
    assert [truths[n > 1][prompt.ijk] for n, (_, prompt) in enumerate(asked)] == [LIVER, KIDNEY, LIVER, KIDNEY, NODE]
    scan = load_image(dataset.case("case_3").image).canonical()
    np.testing.assert_array_equal(asked[-1][0].data, scan.data)
    for record, sizes in zip(records, ([1, 1, 0], [1, 1, 1]), strict=True):
        assert {row.method for row in record.rows} == {"model"}
        assert [row.scores.result_voxels for row in record.rows] == sizes
        assert all(row.scores.dice > 0 for row in record.rows if row.scores.result_voxels)
        assert record.seconds.keys() == {"model"}
    assert records[0].rows[2].scores.status == "both_empty"


def test_methods_depend_on_the_variant() -> None:
    assert Variant("v", FAST).scored == METHODS == ("atlas", "model", "paper", "fused", "oracle")
    assert Variant("v", NO_MODEL).scored == ("atlas",)
    without = ("atlas", "model", "fused", "oracle")
    assert Variant("v", with_overrides(FAST, ["fusion.gate=paper"])).scored == without


def test_a_pair_that_fails_counts_as_missed(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    spy.before = fail_for("case_2")
    plan = plan_of(dataset, EVERY_PAIR, Variant("default", FAST))
    records = run(plan, tmp_path / "out")
    failed = [record for record in records if record.failure]
    assert [record.pair for record in failed] == [
        *(Pair("case_1", "case_2"), Pair("case_3", "case_2"), Pair("case_4", "case_2"))
    ]
    for record in failed:
        assert record.failure == "nothing in common"
        assert [row.method for row in record.rows] == [method for method in METHODS for _ in range(3)]
        scored = [row.scores for row in record.rows if (record.pair.atlas, row.structure) != ("case_4", "node")]
        assert len(scored) == (10 if record.pair.atlas == "case_4" else 15)
        assert {(one.status, one.dice, one.nsd) for one in scored} == {("failed", 0.0, 0.0)}
    summary = write_reports(plan, records, tmp_path / "out", plots=False)
    assert summary["failures"] == [
        {"variant": "default", "atlas": record.pair.atlas, "query": "case_2", "reason": "nothing in common"}
        for record in failed
    ]
    column = summary["columns"][0]
    assert column["counts"]["failed"] == 8
    assert column["over_pairs"]["dice"]["low"] == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "\nFailed: case_3 -> case_2 (default): nothing in common\n" in report
    # Of 36: three pairs failed, case_4 lacks one structure as query of three pairs and as atlas of three.
    assert "by status: atlas only: 22 ok, 3 hallucinated, 8 failed, 3 not in atlas; model: " in report


def test_a_structure_that_the_query_lacks_is_no_failure(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    spy.before = fail_for("case_4")
    (record,) = run(plan_of(dataset, (Pair("case_1", "case_4"),)), tmp_path / "out")
    assert [row.scores.status for row in record.rows] == ["failed", "failed", "both_empty"]


def test_a_defect_is_no_failure_of_the_pair(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError("oops")

    spy.before = defect
    with pytest.raises(ZeroDivisionError, match="oops"):
        run(plan_of(dataset), tmp_path / "out")


@pytest.mark.parametrize("pair", [Pair("case_1", "case_2"), Pair("case_2", "case_1")])
def test_labels_without_a_name_are_background_and_reported(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, pair: Pair
) -> None:
    shutil.copytree(dataset.folder, tmp_path / "data")
    strange = load_dataset(tmp_path / "data")
    path = strange.case("case_2").labels
    labels = load_labels(path)
    labels.data[labels.data == NODE] = 99
    save_volume(labels, path)
    plan, out = plan_of(strange, (pair,), Variant("a", NO_MODEL), Variant("b", NO_MODEL)), tmp_path / "out"
    records = run(plan, out)
    assert caplog.messages == [f"{path}: dataset.json does not name the label values 99; taken as background"]
    assert [record.unnamed for record in records] == [(99,), (99,)]
    status = {row.scores.status for row in records[0].rows if row.value == NODE}
    assert status == {"hallucinated" if pair.query == "case_2" else "not_in_atlas"}
    summary = write_reports(plan, records, out, plots=False)
    assert summary["unnamed_label_values"] == [99]
    reported = "Label values that dataset.json does not name, taken as background where a case has them: 99."
    assert reported in (out / "report.md").read_text()


def test_voxels_that_nobody_annotated_do_not_count(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "data")
    content = json.loads((tmp_path / "data" / "dataset.json").read_text())
    content["labels"]["ignore"] = 99
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    partly = load_dataset(tmp_path / "data")
    assert partly.ignored == 99
    assert 99 not in partly.structures
    pair = Pair("case_1", "case_2")
    (before,) = run(plan_of(partly, (pair,)), tmp_path / "before")
    # Half of the scan, with what the reference and the result have there.
    for name in ("case_1", "case_2"):
        labels = load_labels(partly.case(name).labels)
        labels.data[: labels.grid.shape[0] // 2] = 99
        save_volume(labels, partly.case(name).labels)
    (after,) = run(plan_of(partly, (pair,)), tmp_path / "after")
    assert {row.value for row in after.rows} == {row.value for row in before.rows} == set(dataset.structures)
    for one, other in zip(after.rows, before.rows, strict=True):
        assert one.scores.status in ("ok", "missed", "hallucinated", "both_empty", "not_in_atlas")
        assert one.scores.reference_voxels <= other.scores.reference_voxels
    half = load_labels(partly.case("case_2").labels)
    result = [row for row in after.rows if row.method == "atlas"]
    assert sum(row.scores.reference_voxels for row in result) == int(((half.data > 0) & (half.data != 99)).sum())
    assert sum(row.scores.result_voxels for row in result) <= int((half.data != 99).sum())


def elsewhere(path: Path) -> None:
    save_volume(ATLAS.labels(straight_grid((20, 20, 20))), path)


def in_metres(path: Path) -> None:
    volume = load_volume(path)
    save_volume(Volume(volume.data, Grid(volume.grid.shape, np.diag([1e-3] * 3 + [1]) @ volume.grid.affine)), path)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("case_1", lambda path: path.write_bytes(b"not an image")),
        ("case_2", Path.unlink),
        ("case_1", elsewhere),
        ("case_2", in_metres),
    ],
)
def test_a_case_that_cannot_be_used_costs_its_pairs_alone(
    dataset: Dataset, tmp_path: Path, case: str, change: Callable[[Path], object], spy: Spy
) -> None:
    shutil.copytree(dataset.folder, tmp_path / "data")
    damaged, out = load_dataset(tmp_path / "data"), tmp_path / "out"
    plan = plan_of(damaged, EVERY_PAIR, *TWO)
    change(damaged.case(case).labels)
    records = run(plan, out)
    for record in records:
        assert (record.rows == ()) == (case in (record.pair.atlas, record.pair.query))
        assert (case in record.failure) == (record.rows == ())
    assert not any(case in str(path) for path in (out / "pairs").rglob("*.json"))
    summary = write_reports(plan, records, out)
    assert len(summary["failures"]) == 2 * 6
    assert all(case in one["reason"] for one in summary["failures"])
    assert {column.pairs for column in columns_of(plan, records)} == {
        tuple(pair for pair in EVERY_PAIR if case not in (pair.atlas, pair.query))
    }
    rows = rows_of(out / "results.csv")
    assert {case in (row["atlas"], row["query"]) for row in rows if row["status"] == "not_scored"} == {True}
    assert "\nNot scored: " in (out / "report.md").read_text()
    # Mended, they are all that is left to do.
    shutil.copyfile(dataset.case(case).labels, damaged.case(case).labels)
    before = len(spy.calls)
    assert not any(record.failure for record in run(plan, out))
    assert len(spy.calls) - before == 2 * 6


def test_where_no_pair_can_be_scored_the_reason_is_given(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "data")
    (tmp_path / "data/labelsTr/case_1.nii.gz").write_bytes(b"not an image")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/data/labelsTr/case_1.nii.gz")):
        run(plan_of(load_dataset(tmp_path / "data")), tmp_path / "out")
    assert not (tmp_path / "out" / "results.csv").exists()


@pytest.mark.parametrize(
    ("count", "has_intervals"),
    [(10, True), (9, False)],
)
def test_intervals_need_enough_pairs(
    finished: tuple[Plan, list[PairRecord], Path], count: int, has_intervals: bool
) -> None:
    plan = replace(finished[0], pairs=EVERY_PAIR[:count])
    for one in compare_columns(columns_of(plan, finished[1]), 0):
        assert math.isnan(one.interval.low) != has_intervals
        assert not math.isnan(one.interval.difference)


def test_intervals_need_more_than_one_atlas(
    finished: tuple[Plan, list[PairRecord], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "LEAST_PAIRS", 3)
    plan = replace(finished[0], pairs=tuple(pair for pair in EVERY_PAIR if pair.atlas == "case_1"))
    assert all(math.isnan(one.interval.high) for one in compare_columns(columns_of(plan, finished[1]), 0))
    shutil.copytree(finished[2], tmp_path / "out")
    summary = write_reports(plan, [one for one in finished[1] if one.pair in plan.pairs], tmp_path / "out", plots=False)
    assert {one["low"] for one in summary["comparisons"]} == {None}
    assert "too few pairs for an interval" in (tmp_path / "out/report.md").read_text()


# Order, and progress reports


def test_each_variant_begins_in_turn(dataset: Dataset, tmp_path: Path) -> None:
    reported: list[tuple[int, int, str]] = []
    stages: list[str] = []
    three = (*TWO, Variant("again", NO_MODEL))
    run(
        plan_of(dataset, ONE_TO_ALL, *three),
        tmp_path / "out",
        on_pair=lambda *now: reported.append(now),
        on_stage=stages.append,
    )
    assert [name.split("(")[1] for _, _, name in reported] == [
        *("none)", "builtin)", "again)", "builtin)", "again)", "none)", "again)", "none)", "builtin)")
    ]
    assert reported[3] == (4, 9, "case_1 -> case_3 (builtin)")
    assert stages.count("scoring") == 9


def test_one_variant_needs_no_name(dataset: Dataset, tmp_path: Path) -> None:
    reported: list[str] = []
    run(plan_of(dataset), tmp_path / "out", on_pair=lambda _n, _of, name: reported.append(name))
    assert reported == ["case_1 -> case_2", "case_1 -> case_3", "case_1 -> case_4"]


def test_records_come_variant_by_variant(dataset: Dataset, tmp_path: Path) -> None:
    records = run(plan_of(dataset, ONE_TO_ALL, *TWO), tmp_path / "out")
    assert [(one.variant, one.pair.query) for one in records] == [
        (name, f"case_{n}") for name in ("none", "builtin") for n in (2, 3, 4)
    ]


# Going on


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[PairRecord], Path]:
    """All pairs by two variants, run at one go; nothing may write into its folder."""
    out = tmp_path_factory.mktemp("finished") / "out"
    plan = plan_of(dataset, EVERY_PAIR, *TWO, command="atlassegfm benchmark --labels '*'")
    records = run(plan, out)
    write_reports(plan, records, out, plots=False)
    return plan, records, out


def test_a_killed_run_ends_as_one_left_alone(
    finished: tuple[Plan, list[PairRecord], Path], tmp_path: Path, spy: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    plan, _, whole = finished
    out = tmp_path / "deep" / "out"
    spy.before = interrupt_at(8)
    with pytest.raises(KeyboardInterrupt):
        run(plan, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "pairs").rglob("*.json")}
    assert len(before) == 7
    spy.calls.clear()
    spy.before = lambda *_: None
    records = run(plan, out)
    assert len(spy.calls) == 24 - 7
    assert caplog.messages == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    write_reports(plan, records, out, plots=False)
    for name in ("results.csv", "summary.json", "plan.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert {path for path in content_of(out) if path.startswith("pairs")} == {
        f"pairs/{variant.name}/{pair.atlas}/{pair.query}.json" for variant in TWO for pair in EVERY_PAIR
    }
    # Nothing is left to be done.
    spy.calls.clear()
    assert [record.to_json() for record in run(plan, out)] == [record.to_json() for record in records]
    assert not spy.calls


def test_a_pair_half_written_is_computed_again(
    dataset: Dataset, tmp_path: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = plan_of(dataset), tmp_path / "out"
    real = Path.write_text

    def half(self: Path, text: str, **keywords: Any) -> int:
        if self.name != "case_3.json":
            return real(self, text, **keywords)
        real(self, text[:20], **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            run(plan, out)
    assert content_of(out).keys() == {"plan.json", "pairs/default/case_1/case_2.json"}
    # What a process leaves behind that had no time to clean up.
    for folder in (out, out / "pairs/default/case_1"):
        (folder / ".writing-abc").mkdir()
        (folder / ".writing-abc" / "case_3.json").write_text('{"variant"')
    spy.calls.clear()
    assert [record.pair for record in run(plan, out)] == list(ONE_TO_ALL)
    assert len(spy.calls) == 2


def test_a_damaged_pair_is_reported(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    plan, out = plan_of(dataset), tmp_path / "out"
    run(plan, out)
    path = out / "pairs/default/case_1/case_3.json"
    whole = json.loads(path.read_text())
    for damage in (path.read_text()[:50], "{}", "[]", "3", '{"rows": [{}]}'):
        path.write_text(damage)
        with pytest.raises(InputError) as raised:
            run(plan, out)
        assert str(raised.value).startswith(f"{path}: ")
        assert str(raised.value).endswith("delete it to compute the pair again")
    path.unlink()
    spy.calls.clear()
    run(plan, out)
    assert len(spy.calls) == 1
    assert json.loads(path.read_text())["rows"] == whole["rows"]


@pytest.fixture(scope="module")
def small(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Three pairs, run; nothing may write into their folder."""
    plan, out = plan_of(dataset), tmp_path_factory.mktemp("small") / "out"
    run(plan, out)
    return plan, out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variants": (Variant("default", replace(NO_MODEL, seed=1)),)}, "variants"),
        ({"variants": (Variant("default", FAST),)}, "variants"),
        ({"variants": (Variant("another", NO_MODEL),)}, "variants"),
        ({"values": (LIVER, KIDNEY)}, "structures, tolerances_mm"),
        ({"tolerances": uniform(3)}, "tolerances_mm"),
        ({"centreline": (LIVER,)}, "centreline"),
        ({"device": "cuda"}, "device (cpu there, cuda now)"),
    ],
)
def test_another_benchmark_in_the_folder_is_refused(
    small: tuple[Plan, Path], spy: Spy, changes: dict[str, Any], named: str
) -> None:
    plan, out = small
    before = content_of(out)
    with pytest.raises(InputError) as raised:
        run(replace(plan, **changes), out)
    assert str(raised.value) == (
        f"{out}: holds a benchmark made with other {named}; choose another folder, or begin again with --force"
    )
    assert content_of(out) == before
    assert not spy.calls


def test_pairs_may_be_added(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    out = tmp_path / "out"
    few = run(plan_of(dataset, ONE_TO_ALL[:2]), out)
    spy.calls.clear()
    records = run(plan_of(dataset, ONE_TO_ALL[::-1], title="more"), out)
    assert len(spy.calls) == 1
    assert [record.pair for record in records] == list(ONE_TO_ALL[::-1])
    assert records[:0:-1] == few


def test_names_that_meet_do_not_share_a_file(dataset: Dataset, tmp_path: Path) -> None:
    cases = tuple(
        replace(case, name=name) for case, name in zip(dataset.cases, ("a", "a__b", "b__c", "c"), strict=True)
    )
    renamed = replace(dataset, cases=cases)
    pairs = (Pair("a", "b__c"), Pair("a__b", "c"))
    assert [record.pair for record in run(plan_of(renamed, pairs), tmp_path / "out")] == list(pairs)
    with pytest.raises(InputError, match="the variants 'a b' and 'a-b' would have one folder; rename one"):
        run(plan_of(renamed, pairs, Variant("a b", NO_MODEL), Variant("a-b", NO_MODEL)), tmp_path / "other")


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_plan_is_reported(dataset: Dataset, tmp_path: Path, content: str) -> None:
    plan, out = plan_of(dataset, ONE_TO_ALL[:1]), tmp_path / "out"
    run(plan, out)
    (out / "plan.json").write_text(content)
    with pytest.raises(InputError) as raised:
        run(plan, out)
    assert str(raised.value).startswith(f"{out / 'plan.json'}: ")
    assert str(raised.value).endswith("begin again with --force, or choose another folder")


def test_a_file_that_cannot_be_used_is_no_failure_of_the_method(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "data")
    broken = load_dataset(tmp_path / "data")
    broken.case("case_3").image.write_bytes(b"no scan")
    plan, out = plan_of(broken), tmp_path / "out"
    assert ["case_3_0000.nii.gz" in record.failure for record in run(plan, out)].count(True) == 1
    # What was done is kept, and what was mended is all that is left to do.
    assert {path.name for path in out.rglob("case_*.json")} == {"case_2.json", "case_4.json"}
    shutil.copyfile(dataset.case("case_3").image, broken.case("case_3").image)
    assert not any(record.failure for record in run(plan, out))


def test_another_version_is_refused_and_other_files_are_computed_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spy: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(dataset.folder, tmp_path / "data")
    plan, out = plan_of(load_dataset(tmp_path / "data")), tmp_path / "out"
    run(plan, out)
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "__version__", "9.8.7")
        with pytest.raises(
            InputError, match=r"made with other version \(.* there, 9\.8\.7 now\); choose another folder"
        ):
            run(plan, out)
    run(plan, out)
    scan = plan.dataset.case("case_3").image
    scan.write_bytes(scan.read_bytes() + b"\0")
    spy.calls.clear()
    run(plan, out)
    assert len(spy.calls) == sum("case_3" in (pair.atlas, pair.query) for pair in plan.pairs) == 1
    assert caplog.messages == ["case_1 -> case_3: files have changed; computed again"]


def test_the_command_and_the_folder_may_change(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    shutil.copytree(dataset.folder, tmp_path / dataset.name)
    run(plan_of(dataset, command="one"), tmp_path / "out")
    spy.calls.clear()
    run(plan_of(load_dataset(tmp_path / dataset.name), command="two"), tmp_path / "out")
    assert not spy.calls


def test_force_begins_anew(dataset: Dataset, tmp_path: Path, spy: Spy) -> None:
    plan, out = plan_of(dataset, ONE_TO_ALL, Variant("one", NO_MODEL), Variant("two", NO_MODEL)), tmp_path / "out"
    run(plan, out)
    other = plan_of(dataset, centreline=(1,))
    for wanted in (other, other):
        spy.calls.clear()
        run(wanted, out, force=True)
        assert len(spy.calls) == 3
    assert json.loads((out / "plan.json").read_text())["centreline"] == [1]
    assert {path.name for path in (out / "pairs").iterdir()} == {"default"}
    (out / "plan.json").write_text("{")
    run(other, out, force=True)
    assert json.loads((out / "plan.json").read_text())["centreline"] == [1]


def _foreign(out: Path) -> str:
    out.mkdir()
    (out / "thesis.docx").write_text("years of work")
    return "holds other files (thesis.docx)"


def _file(out: Path) -> str:
    out.write_text("in the way")
    return "is not a folder"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", [_foreign, _file])
def test_the_files_of_others_are_not_touched(
    dataset: Dataset, tmp_path: Path, spy: Spy, make: Callable[[Path], str], force: bool
) -> None:
    out = tmp_path / "out"
    found = make(out)
    before = content_of(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"{out}: ")) as raised:
        run(plan_of(dataset), out, force=force)
    assert found in str(raised.value)
    assert content_of(tmp_path) == before
    assert not spy.calls


def test_folders_that_cannot_be_used(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/file/out: a file is in the way")):
        run(plan_of(dataset), tmp_path / "file" / "out")
    out = tmp_path / "out"
    run(plan_of(dataset), out)
    (out / "plan.json").unlink()
    with pytest.raises(InputError) as raised:
        run(plan_of(dataset), out)
    assert str(raised.value) == (
        f"{out}: holds results without plan.json, which says of what; choose another folder, or --force"
    )


def test_names_of_variants_become_folders() -> None:
    assert slug("rigid, affine") == "rigid-affine"
    assert slug("a/../b") == "a-..-b"
    assert slug("smoothness=0.5") == "smoothness=0.5"
    assert slug("ÄÖ") == "variant"


# Tables


def made_up() -> Column:
    """Atlas a to x and y, atlas b to x; the second structure has a score in the first pair alone."""
    pairs = (Pair("a", "x"), Pair("a", "y"), Pair("b", "x"))
    dice = ((0.8, 0.4), (0.6, math.nan), (0.5, math.nan))
    rows = [
        Row(pair.query, value, f"organ {value}", score(one, "both_empty" if math.isnan(one) else "ok"), "fused")
        for pair, scores in zip(pairs, dice, strict=True)
        for value, one in zip((2, 1), scores, strict=True)
    ]
    return Column("default", "fused", pairs, tuple(rows))


def test_columns_by_hand() -> None:
    column = made_up()
    # Structures in the order of their values.
    np.testing.assert_array_equal(column.table("dice"), [[0.4, math.nan, math.nan], [0.8, 0.6, 0.5]])
    np.testing.assert_array_equal(column.table("nsd"), [[0.2, math.nan, math.nan], [0.4, 0.3, 0.25]])
    assert np.isnan(column.table("cldice")).all()
    np.testing.assert_allclose(column.pair_means(), [0.6, 0.6, 0.5])
    np.testing.assert_allclose(column.pair_means("nsd"), [0.3, 0.3, 0.25])
    assert np.isnan(column.pair_means("cldice")).all()
    assert column.by_atlas()["a"] == pytest.approx((0.4 + 0.7) / 2)
    assert column.by_atlas()["b"] == pytest.approx(0.5)
    assert column.by_atlas("nsd")["a"] == pytest.approx(0.275)
    over = column.over_atlases()
    assert (over.count, over.low, over.high) == (2, pytest.approx(0.5), pytest.approx(0.55))
    assert over.mean == pytest.approx(0.525)
    assert over.sd == pytest.approx(0.05 / math.sqrt(2))
    assert column.summary.means["dice"] == pytest.approx((0.4 + 1.9 / 3) / 2)


def test_the_table_on_the_screen_by_hand() -> None:
    column = made_up()
    assert main_table([column]) == [
        ["method", "Dice", "sd atlases", "worst pair", "NSD", "HD95 mm"],
        ["fused", "0.5167", "0.035", "0.500", "0.258", "1.5"],
    ]
    nothing = replace(column, variant="other", pairs=column.pairs[1:2], rows=column.rows[3:4])
    assert main_table([column, nothing])[0][:2] == ["variant", "method"]
    assert main_table([column, nothing])[2] == ["other", "fused", "–", "–", "–", "–", "1.5"]


def test_columns_are_those_that_a_variant_shows(finished: tuple[Plan, list[PairRecord], Path]) -> None:
    plan, records, _ = finished
    shown = replace(plan, variants=(TWO[0], replace(TWO[1], methods=("model", "fused"))))
    columns = columns_of(shown, records)
    assert [(one.variant, one.method) for one in columns] == [
        *(("none", "atlas"), ("builtin", "model"), ("builtin", "fused"))
    ]
    assert all({row.method for row in one.rows} == {one.method} for one in columns)
    assert all(len(one.rows) == 36 for one in columns)


COLUMNS = [("none", "atlas"), *(("builtin", method) for method in METHODS)]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table_of(out: Path, column: tuple[str, str], name: str) -> dict[str, dict[tuple[str, str], float]]:
    """Scores from results.csv by structure and pair."""
    table: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows_of(out / "results.csv"):
        if (row["variant"], row["method"]) == column and row[name]:
            table.setdefault(row["structure"], {})[row["atlas"], row["query"]] = float(row[name])
    return table


def macro(table: Mapping[str, Mapping[tuple[str, str], float]]) -> float:
    """Over pairs, then over structures."""
    return mean(mean(row.values()) for row in table.values() if row)


@pytest.mark.parametrize("column", COLUMNS)
def test_the_summary_can_be_computed_from_the_table(
    finished: tuple[Plan, list[PairRecord], Path], column: tuple[str, str]
) -> None:
    out = finished[2]
    (found,) = (
        one
        for one in json.loads((out / "summary.json").read_text())["columns"]
        if (one["variant"], one["method"]) == column
    )
    for name in ("dice", "nsd", "hd95_mm", "assd_mm", "hd95_voxel_mm"):
        table = table_of(out, column, name)
        assert found["mean"][name] == pytest.approx(macro(table), abs=1e-6)
        for structure in found["structures"]:
            scores = table[structure["structure"]]
            assert structure[name]["count"] == len(scores)
            assert structure[name]["mean"] == pytest.approx(mean(scores.values()), abs=1e-6)
    table = table_of(out, column, "dice")
    pairs = {pair: [row[pair] for row in table.values() if pair in row] for pair in next(iter(table.values()))}
    assert found["over_pairs"]["dice"]["count"] == len(pairs) == 12
    assert found["over_pairs"]["dice"]["mean"] == pytest.approx(mean(map(mean, pairs.values())), abs=1e-6)
    assert found["over_pairs"]["dice"]["low"] == pytest.approx(min(map(mean, pairs.values())), abs=1e-6)
    atlases = {
        atlas: macro({name: {p: n for p, n in row.items() if p[0] == atlas} for name, row in table.items()})
        for atlas in SCANS
    }
    assert found["atlases"] == pytest.approx(atlases, abs=1e-6)
    assert found["over_atlases"]["dice"]["mean"] == pytest.approx(mean(atlases.values()), abs=1e-6)
    counts = Counter(r["status"] for r in rows_of(out / "results.csv") if (r["variant"], r["method"]) == column)
    assert {status: n for status, n in found["counts"].items() if n} == counts
    assert counts["not_in_atlas"] == 3


def test_every_pair_of_columns_is_compared(finished: tuple[Plan, list[PairRecord], Path]) -> None:
    out = finished[2]
    comparisons = json.loads((out / "summary.json").read_text())["comparisons"]
    assert [(one["score"], tuple(one["first"]), tuple(one["second"])) for one in comparisons] == [
        (name, first, second) for name in ("dice", "nsd") for second, first in combinations(COLUMNS, 2)
    ]
    for one in comparisons:
        first, second = (table_of(out, tuple(one[role]), one["score"]) for role in ("first", "second"))
        difference = {
            structure: {pair: number - second[structure][pair] for pair, number in row.items()}
            for structure, row in first.items()
        }
        assert one["difference"] == pytest.approx(macro(difference), abs=2e-6)
        assert one["low"] <= one["difference"] <= one["high"]
        assert one["clusters"] == 4


def test_tables_have_a_row_for_each_score_and_empty_cells_for_none(
    finished: tuple[Plan, list[PairRecord], Path],
) -> None:
    out = finished[2]
    rows = rows_of(out / "results.csv")
    assert len(rows) == 12 * 3 * (1 + len(METHODS))
    assert len({(r["variant"], r["atlas"], r["query"], r["method"], r["value"]) for r in rows}) == len(rows)
    assert {(row["dice"], row["hd95_mm"]) for row in rows if row["status"] == "not_in_atlas"} == {("", "")}
    costs = rows_of(out / "times.csv")
    assert [(row["variant"], row["atlas"], row["query"]) for row in costs] == [
        (variant.name, pair.atlas, pair.query) for variant in TWO for pair in EVERY_PAIR
    ]
    assert all(float(row["warping seconds"]) >= 0 for row in costs)
    assert {row["model seconds"] == "" for row in costs[:12]} == {True}
    assert {row["model seconds"] == "" for row in costs[12:]} == {False}
    cells = {cell.lower() for row in (*rows, *costs) for name, cell in row.items() if name != "variant"}
    assert not {"nan", "none", "inf", "-inf"} & cells


def test_the_page_says_what_was_done(
    dataset: Dataset, tmp_path: Path, finished: tuple[Plan, list[PairRecord], Path]
) -> None:
    page = (finished[2] / "report.md").read_text()
    assert page.startswith("# Dataset009_Small: made up\n\n```sh\natlassegfm benchmark --labels '*'\n```\n")
    assert "12 pairs, 4 atlases, 4 queries. NSD at 2 mm for all; " in page
    assert "\nStructures: liver (1), kidney (7), node (12).\n" in page
    assert "Left out" not in page
    assert "Failed" not in page
    assert "dice.png" not in page
    for column in columns_of(*finished[:2]):
        method = {"atlas": "atlas only", "paper": "paper gate"}.get(column.method, column.method)
        assert f"| {column.variant} | {method} | {column.summary.means['dice']:.4f} | " in page
        counts = column.summary.counts
        assert (
            f"{column.variant}: {method}: {counts['ok']} ok, {counts['hallucinated']} hallucinated, 3 not in atlas"
            in page
        )
    assert "| builtin: fused − builtin: model |" in page
    assert "| builtin: atlas only − none: atlas only | +0.000 (+0.000 to +0.000) |" in page
    # Other methods of other variants are in summary.json alone.
    assert "builtin: fused − none: atlas only" not in page
    plan = plan_of(dataset, values=(KIDNEY,))
    write_reports(plan, run(plan, tmp_path / "out"), tmp_path / "out", plots=False)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "\nStructures: kidney (7).\nLeft out on request: liver, node.\n" in page
    assert "```" not in page
    assert "\n| atlas only | " in page
    assert "## Dice of each atlas" not in page


@pytest.mark.slow
def test_real_scans(data_dir: Path, tmp_path: Path) -> None:
    dataset = load_dataset(data_dir / "Dataset004_Hippocampus")
    names = [case.name for case in dataset.cases[:3]]
    pairs = make_pairs(names, "one-to-all")
    plan = Plan("one-to-all", dataset.select(names), pairs, (Variant("default", Settings()),), (1, 2), uniform(1))
    records = run(plan, tmp_path / "out")
    columns = {column["method"]: column for column in write_reports(plan, records, tmp_path / "out")["columns"]}
    # Measured: 0.755, 0.779, 0.779, 0.823.
    assert columns["atlas"]["mean"]["dice"] > 0.7
    assert columns["fused"]["mean"]["dice"] > 0.72
    assert columns["oracle"]["mean"]["dice"] > max(columns[one]["mean"]["dice"] for one in ("atlas", "model", "fused"))
    assert all(column["counts"]["ok"] == 4 for column in columns.values())
