"""The second pass of a cohort: what is planned, what is taken over, and that nothing else changes."""

from __future__ import annotations

import csv
import pickle
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import RegistrationError
from atlassegfm.core.image import Volume, load_labels
from atlassegfm.dicom import contours_in, load_series
from atlassegfm.jobs import AtlasFiles, Case, Output, SegmentWork, second_pass
from atlassegfm.jobs import work as work_module
from atlassegfm.jobs.second_pass import (
    First,
    SecondPass,
    Try,
    choose,
    merge,
    plan_second_pass,
    recovered_run,
)
from atlassegfm.jobs.store import LabelledQuery, RunInputs, read_labels, rewrite_result, write_result
from atlassegfm.quality.verdict import StructureQuality, Verdict
from atlassegfm.records import RunRecord, StatusRecord
from atlassegfm.registration import Place, Registration
from atlassegfm.result import Segmentation
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from conftest import Run
from dicom_series import write_series
from result_folders import run_record
from scenes import ATLAS, STRUCTURES, UNREGISTERED, Patient, straight_grid
from standin import PROVENANCE
from test_cohort import COMMAND, FAST, GRID, changed, content_of, rows_of, times_of, write_atlas, write_scans

LIVER, KIDNEY, NODE = (one.value for one in STRUCTURES)
#: Estimates of the kidney by case in the first pass, and in the second; all else is 0.9.
FIRST, SECOND = {"case2": 0.3, "case5": 0.5}, {"case2": 0.85, "case5": 0.8}
COUNT = 8


def verdict_of(estimate: float) -> Verdict:
    return "good" if estimate >= 0.78 else "failed" if estimate < 0.62 else "review"


@dataclass(frozen=True, eq=False)
class Told(Registration):
    """A registration with a confidence that was not measured."""

    told: float = 0.8

    @property
    def confidence(self) -> float:
        return self.told


def estimated(result: Segmentation, estimate: float, confidence: float = 0.8) -> Segmentation:
    """A result with this estimate for the kidney."""
    structures = []
    for one in result.structures:
        found = estimate if one.structure.value == KIDNEY else 0.9
        quality = StructureQuality(verdict_of(found), "as told", found, found - 0.1, found)
        structures.append(replace(one, quality=quality))
    parts = {one.name: getattr(result.registration, one.name) for one in fields(Registration)}
    registration = Told(**parts, told=confidence)
    return replace(result, structures=tuple(structures), registrations={1: registration})


def stand_in(estimates: Mapping[str, float], moved: int = 0, calls: list[str] | None = None) -> Callable[..., Any]:
    """Segment in truth, and give the kidney this estimate, moved by so many voxels."""

    def call(context: Context, query: Volume, *arguments: Any, **options: Any) -> Segmentation:
        assert query.source is not None
        name = query.source.path.name.partition(".")[0]
        if calls is not None:
            calls.append(name)
        result = segment(context, query, *arguments, **options)
        if moved:
            data = np.where(result.labels.data == KIDNEY, 0, result.labels.data)
            data[np.roll(result.labels.data == KIDNEY, moved, axis=2)] = KIDNEY
            result = replace(result, labels=Volume(data, result.labels.grid, result.labels.source))
        return estimated(result, estimates.get(name, 0.9))

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: None) -> Path:
    """An atlas and eight scans, of which two have a kidney that only the second pass finds."""
    write_atlas(tmp_path)
    write_scans(tmp_path / "scans", COUNT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work_module, "segment", stand_in(FIRST))
    monkeypatch.setattr(second_pass, "segment", stand_in(SECOND, moved=1))
    return tmp_path


def status_of(folder: Path, case: str) -> StatusRecord:
    return StatusRecord.read(folder / "out" / case / "status.json")


# The whole of it


def test_structures_that_are_not_good_are_mended_and_nothing_else(folder: Path, run: Run) -> None:
    assert run(*COMMAND, *FAST, "--no-second-pass").code == 0
    out, before = folder / "out", content_of(folder / "out")
    labels = {case: load_labels(out / case / "segmentation.nii.gz").data for case in FIRST}
    outcome = run(*COMMAND, *FAST, "--csv", "table.csv")
    assert outcome.code == 0, outcome.err
    assert "second pass, 2 cases" in outcome.err
    assert (folder / "table.csv").read_bytes() == (out / "cohort.csv").read_bytes()
    after = content_of(out)
    assert {name for name in after if after[name] != before[name]} == {
        f"{case}/{file}" for case in FIRST for file in ("segmentation.nii.gz", "run.json")
    }
    for case in FIRST:
        now = load_labels(out / case / "segmentation.nii.gz").data
        for value in (LIVER, NODE):
            assert np.array_equal(now == value, labels[case] == value)
        assert not np.array_equal(now == KIDNEY, labels[case] == KIDNEY)
        record = RunRecord.read(out / case / "run.json")
        (kidney,) = (one for one in record.structures if one.value == KIDNEY)
        assert kidney.recovered is not None
        assert kidney.recovered.donor in {"case0", "case1", "case3", "case4", "case6", "case7"}
        assert kidney.recovered.estimated_dice == FIRST[case]
        assert kidney.volume_ml == pytest.approx((now == KIDNEY).sum() * 0.064)
        assert record.verdict == "good"
        tried = status_of(folder, case).second_pass
        assert tried is not None
        assert (tried.donor, tried.recovered) == (kidney.recovered.donor, ("kidney",))
        assert f"recovered with {tried.donor}: kidney" in outcome.out
        assert rows_of(out)[case]["recovered"] == {"kidney": tried.donor}
    with (out / "cohort.csv").open(newline="") as file:
        recovered = {row["case"]: row["recovered_from"] for row in csv.DictReader(file) if row["recovered_from"]}
    assert recovered.keys() == FIRST.keys()


def test_table_goes_to_a_folder_that_exists(folder: Path, run: Run) -> None:
    outcome = run(*COMMAND, *FAST, "--csv", "nowhere/table.csv")
    assert (outcome.code, "nowhere/table.csv" in outcome.err) == (2, True)
    assert not (folder / "out").exists()


def test_second_pass_is_made_once(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_pass, "segment", stand_in({**SECOND, "case5": 0.51}))
    assert run(*COMMAND, *FAST).code == 0
    # Tried, and no better.
    tried = status_of(folder, "case5").second_pass
    assert tried is not None
    assert (tried.recovered, "0.51" in tried.reason) == ((), True)
    before = times_of(folder / "out")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr(work_module, "segment", never)
    monkeypatch.setattr(second_pass, "segment", never)
    outcome = run(*COMMAND, *FAST)
    assert outcome.code == 0, outcome.err
    assert f"{COUNT} of {COUNT} kept" in outcome.err
    assert times_of(folder / "out") == before
    assert "look first at  case5 (kidney failed)" in outcome.out


def test_interrupted_second_pass_continues_to_the_same_files(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*COMMAND, *FAST).code == 0
    expected = content_of(folder / "out")
    shutil.rmtree(folder / "out")
    real, calls = second_pass.segment, []

    def killed(context: Context, query: Volume, *arguments: Any, **options: Any) -> Segmentation:
        calls.append(query)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(context, query, *arguments, **options)

    monkeypatch.setattr(second_pass, "segment", killed)
    assert run(*COMMAND, *FAST).code == 130
    assert [status_of(folder, case).second_pass is None for case in FIRST] == [False, True]
    calls = calls[:1]
    again: list[str] = []
    monkeypatch.setattr(second_pass, "segment", stand_in(SECOND, moved=1, calls=again))
    assert run(*COMMAND, *FAST).code == 0
    assert again == ["case5"]
    assert content_of(folder / "out") == expected


def test_results_without_second_pass(folder: Path, run: Run) -> None:
    assert run(*COMMAND, *FAST, "--no-second-pass").code == 0
    expected = content_of(folder / "out")
    assert run(*COMMAND, *FAST).code == 0
    before = times_of(folder / "out")
    outcome = run(*COMMAND, *FAST, "--no-second-pass")
    assert "6 of 8 kept, 2 to do (2 other second pass)" in outcome.err
    assert changed(before, times_of(folder / "out")) == set(FIRST)
    assert content_of(folder / "out") == expected
    assert all(status_of(folder, case).second_pass is None for case in FIRST)


def test_no_second_pass_for_a_shard_or_a_few_scans(folder: Path, run: Run) -> None:
    assert "second pass" not in run(*COMMAND, *FAST, "--shard", "1/1").err
    for number in (0, 1, 3, 4):
        (folder / f"scans/case{number}.nii.gz").unlink()
    assert "second pass" not in run(*COMMAND, *FAST).err


def test_a_failed_try_costs_nothing(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(context: Context, query: Volume, *_: Any, **__: Any) -> Segmentation:
        raise RegistrationError(f"{query.source and query.source.path}: nothing but background")

    monkeypatch.setattr(second_pass, "segment", refuse)
    outcome = run(*COMMAND, *FAST)
    assert outcome.code == 0
    for case in FIRST:
        status = status_of(folder, case)
        assert status.state == "done"
        assert status.second_pass is not None
        assert status.second_pass.reason == f"{case}.nii.gz: nothing but background"
        assert (folder / "out" / case / "segmentation.nii.gz").exists()
    assert rows_of(folder / "out")["case2"]["state"] == "done"


def test_page_of_a_mended_case_is_removed_and_says_so(folder: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    for number in (5, 6, 7):
        (folder / f"scans/case{number}.nii.gz").unlink()
    assert run(*COMMAND, *FAST, "--no-second-pass", "--keep").code == 0
    page = folder / "out/case2/report.html"
    page.write_text("of the first pass")
    model = (folder / "out/case2/model.nii.gz").read_bytes()
    assert run(*COMMAND, *FAST, "--keep").code == 0
    assert not page.exists()
    assert (folder / "out/case2/model.nii.gz").read_bytes() == model
    assert (folder / "out/case2/transform").is_dir()
    assert run(*COMMAND, *FAST, "--report").code == 0
    donor = status_of(folder, "case2").second_pass
    assert donor is not None
    assert f"with case {donor.donor} as the atlas (before: failed, estimated Dice 0.30)" in page.read_text()


# Planning


def make_work(out: Path, settings: Settings | None = None) -> SegmentWork:
    source = AtlasFiles(Path("atlas.nii"), Path("labels.nii"))
    return SegmentWork(out, source, settings or Settings(), "cpu", 1, Output(), PROVENANCE)


def write_run(out: Path, name: str, kidney: float, *, volume: float = 50.0, confidence: float = 0.8) -> Case:
    """A run.json with an estimate and a volume of the kidney; liver and node are good."""
    run = run_record(name, {LIVER: 100 * volume / 50, KIDNEY: volume, NODE: 1.0})
    structures = tuple(
        one.model_copy(
            update={
                "quality": one.quality
                and one.quality.model_copy(update={"verdict": verdict_of(found), "estimated_dice": found})
            }
        )
        for one in run.structures
        for found in [kidney if one.value == KIDNEY else 0.9]
    )
    registration = run.registration.model_copy(update={"confidence": confidence})
    run = run.model_copy(update={"structures": structures, "registration": registration})
    (out / name).mkdir(exist_ok=True)
    run.write(out / name / "run.json")
    return Case(name, out / f"{name}.nii.gz")


def planned(cases: list[Case], work: SegmentWork) -> list[tuple[str, str]]:
    return [(one.case.name, one.donor.name) for one in plan_second_pass(cases, work)[0]]


def test_the_worst_are_tried_first_with_the_donor_most_alike(tmp_path: Path) -> None:
    cases = [write_run(tmp_path, f"d{n}", 0.9, volume=40 + 5 * n) for n in range(6)]
    cases += [write_run(tmp_path, "bad", 0.4, volume=54), write_run(tmp_path, "worse", 0.2, volume=46)]
    cases += [write_run(tmp_path, "not reached", 0.6), write_run(tmp_path, "other body", 0.0, confidence=0.2)]
    work = make_work(tmp_path)
    expected = [("worse", "d1"), ("bad", "d3")]
    assert planned(cases, work) == expected
    for seed in range(5):
        random.Random(seed).shuffle(cases)
        assert planned(cases, work) == expected


def test_mended_results_do_not_change_the_plan(tmp_path: Path) -> None:
    cases = [write_run(tmp_path, f"d{n}", 0.9, volume=40 + 5 * n) for n in range(6)]
    cases += [write_run(tmp_path, "bad", 0.4, volume=54), write_run(tmp_path, "worse", 0.2, volume=46)]
    work = make_work(tmp_path)
    expected, volumes = planned(cases, work), plan_second_pass(cases, work)[1]
    path = tmp_path / "worse/run.json"
    run = RunRecord.read(path)
    (kidney,) = (one for one in run.structures if one.value == KIDNEY)
    assert kidney.quality is not None
    quality = kidney.quality.model_copy(update={"verdict": "good", "estimated_dice": 0.95})
    better = {KIDNEY: kidney.model_copy(update={"quality": quality})}
    labels = ATLAS.labels(straight_grid())
    recovered = recovered_run(run, better, labels, {KIDNEY}, "d1")
    recovered.write(path)
    assert recovered.verdict == "good"
    assert planned(cases, work) == expected
    assert plan_second_pass(cases, work)[1] == volumes
    first = {one.value: First.of(one) for one in recovered.structures}
    assert (first[KIDNEY].verdict, first[KIDNEY].estimate, first[KIDNEY].volume_ml) == ("failed", 0.2, 46)


@pytest.mark.parametrize("case", ["few", "not calibrated", "no donor", "given transform"])
def test_nothing_is_planned(tmp_path: Path, case: str) -> None:
    kidney = 0.5 if case == "no donor" else 0.9
    cases = [write_run(tmp_path, f"d{n}", kidney) for n in range(3 if case == "few" else 5)]
    bad = write_run(tmp_path, "bad", 0.4)
    cases.append(replace(bad, transform=tmp_path) if case == "given transform" else bad)
    settings = with_overrides(Settings(), UNREGISTERED) if case == "not calibrated" else Settings()
    assert planned(cases, make_work(tmp_path, settings)) == []


def test_work_goes_to_other_processes(tmp_path: Path) -> None:
    case, donor = Case("bad", Path("bad.nii")), Case("good", Path("good.nii"))
    work = make_work(tmp_path)
    second = SecondPass.after(work, [Try(case, donor, (KIDNEY,))], {KIDNEY: (1.0, 2.0)})
    assert pickle.loads(pickle.dumps(second)) == second  # noqa: S301
    assert second.key != work.key
    assert second.absolute().tries["bad"].donor.query.is_absolute()


def test_a_killed_worker_leaves_the_result_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    StatusRecord(state="done", warnings=("as before",)).write(tmp_path / "bad/status.json")
    case = Case("bad", Path("bad.nii"))
    second = SecondPass.after(make_work(tmp_path), [Try(case, Case("good", Path("good.nii")), (KIDNEY,))], {})
    row = second.give_up(case, "its worker was ended by SIGKILL", 2)
    assert (row.state, row.warnings) == ("done", ("as before",))
    status = StatusRecord.read(tmp_path / "bad/status.json")
    assert (status.state, status.warnings) == ("done", ("as before",))
    assert status.second_pass is not None
    assert "SIGKILL" in status.second_pass.reason


# What is taken over


@pytest.fixture(scope="module")
def pair() -> tuple[RunRecord, Segmentation]:
    """A first result whose kidney failed, and a second one in which it is good."""
    settings = with_overrides(Settings(), [*UNREGISTERED, "model=none"])
    query = Patient(scale=1.02).scan(GRID)
    context = Context(Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES), settings)
    result = segment(context, query)
    return work_module_run(estimated(result, 0.3), context, query), estimated(result, 0.8)


def work_module_run(result: Segmentation, context: Context, query: Volume) -> RunRecord:
    from atlassegfm.jobs.store import run_record as describe

    return describe(result, RunInputs(context, query))


TRIED = Try(Case("bad", Path("bad.nii")), Case("good", Path("good.nii")), (KIDNEY,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda result: estimated(result, 0.34), "0.34"),
        (lambda result: estimated(result, 0.8, confidence=0.3), "confidence"),
        (lambda result: estimated(result, 0.8, confidence=float("nan")), "confidence"),
    ],
)
def test_what_is_no_better_is_not_taken(
    pair: tuple[RunRecord, Segmentation], change: Callable[[Segmentation], Segmentation], reason: str
) -> None:
    run, result = pair
    assert choose(run, result, TRIED, result.labels, {})[0].keys() == {KIDNEY}
    better, why = choose(run, change(result), TRIED, result.labels, {})
    assert better == {}
    assert reason in why


@pytest.mark.parametrize(("estimate", "second", "taken"), [(0.75, 1.7, True), (0.75, 1.1, False), (0.9, 1.1, True)])
def test_an_uncertain_place_is_taken_only_if_it_is_good(
    pair: tuple[RunRecord, Segmentation], estimate: float, second: float, taken: bool
) -> None:
    run, result = pair
    found = estimated(result, estimate)
    place = Place(30.0, 1.0, second, 60.0)
    found = replace(found, structures=tuple(replace(one, place=place) for one in found.structures))
    better, why = choose(run, found, TRIED, result.labels, {})
    assert (better.keys() == {KIDNEY}) is taken
    assert taken or "another place" in why


def test_what_is_unlike_the_cohort_or_lies_on_good_structures_is_not_taken(
    pair: tuple[RunRecord, Segmentation],
) -> None:
    run, result = pair
    (volume,) = (one.volume_ml for one in result.structures if one.structure.value == KIDNEY)
    usual = {KIDNEY: tuple(volume * factor for factor in (0.9, 0.95, 1.0, 1.05, 1.1))}
    assert choose(run, result, TRIED, result.labels, usual)[0]
    other = {KIDNEY: tuple(10 * one for one in usual[KIDNEY])}
    assert choose(run, result, TRIED, result.labels, other)[0] == {}
    everywhere = replace(result.labels, data=np.full_like(result.labels.data, LIVER))
    assert choose(run, result, TRIED, everywhere, usual)[0] == {}


def test_good_structures_keep_their_voxels(pair: tuple[RunRecord, Segmentation]) -> None:
    run, result = pair
    poor = tuple(
        one.model_copy(update={"quality": one.quality and one.quality.model_copy(update={"verdict": "failed"})})
        if one.value == NODE
        else one
        for one in run.structures
    )
    run = run.model_copy(update={"structures": poor})
    first, second = np.zeros(GRID.shape, np.uint8), np.zeros(GRID.shape, np.uint8)
    first[:4], first[4:6], first[6:7], first[12:14] = LIVER, NODE, KIDNEY, KIDNEY
    second[:2], second[3:11] = NODE, KIDNEY
    found = replace(result, labels=Volume(second, GRID))
    labels, changes = merge(run, found, {KIDNEY: run.structures[1]}, Volume(first, GRID))
    assert labels.data[:, 0, 0].tolist() == [LIVER] * 4 + [KIDNEY] * 7 + [0] * 13
    assert changes == {KIDNEY, NODE}
    after = recovered_run(run, {KIDNEY: run.structures[1]}, labels, changes, "good")
    status = {one.value: (one.status, one.quality and one.quality.verdict) for one in after.structures}
    assert status == {LIVER: ("present", "good"), KIDNEY: ("present", "failed"), NODE: ("absent", "failed")}
    assert after.structures[0] == run.structures[0]


# Files


@pytest.mark.parametrize("form", ["nifti", "nrrd", "seg.nrrd", "mgz", "masks", "rtstruct", "seg"])
@pytest.mark.parametrize("empty", [False, True])
def test_labels_are_rewritten_in_every_format(tmp_path: Path, form: str, empty: bool) -> None:
    if form in ("rtstruct", "seg"):
        pytest.importorskip("highdicom")
    settings = with_overrides(Settings(), [*UNREGISTERED, "model=none"])
    scan = Patient(scale=1.02).scan(GRID)
    query = load_series(write_series(tmp_path / "query", np.rint(scan.data).astype(np.int16), GRID.affine))
    query = Volume(query.data.astype(np.float32), query.grid, query.source)
    context = Context(Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES), settings)
    result = segment(context, query)
    nothing = replace(result.labels, data=np.zeros_like(result.labels.data))
    if empty:
        result = replace(result, labels=nothing)
    folder, status = tmp_path / "result", StatusRecord(state="done")
    run = write_result(result, RunInputs(context, query), folder, status, formats=(form,))
    labels = read_labels(folder, query, STRUCTURES)
    assert np.array_equal(labels.data, result.labels.data)
    data = labels.data.copy()
    data[np.roll(data == NODE, 1, axis=0) & (data == 0)] = NODE
    data[3, 3, 3] = NODE if empty else data[3, 3, 3]
    contours = contours_in(folder / "rtstruct.dcm") if form == "rtstruct" else {}
    contours.pop(NODE, None)
    written = LabelledQuery(query, Volume(data, query.grid, query.source), STRUCTURES, run, {}, contours)
    before = drawn(folder / "rtstruct.dcm") if form == "rtstruct" else {}
    rewrite_result(written, folder, status, (form,))
    assert np.array_equal(read_labels(folder, query, STRUCTURES).data, data)
    if form == "rtstruct":
        after = drawn(folder / "rtstruct.dcm")
        assert {value for value in after if after[value] != before[value]} == {NODE}


def drawn(path: Path) -> dict[int, list[Any]]:
    """Coordinates of the contours of each structure."""
    items = pydicom.dcmread(path).ROIContourSequence
    return {
        int(item.ReferencedROINumber): [list(one.ContourData) for one in item.get("ContourSequence", [])]
        for item in items
    }
