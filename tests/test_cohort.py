"""Many queries: going on where a run stopped, workers that die, parts of a cohort, and the same bytes in any case."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from atlassegfm.atlas import Atlas
from atlassegfm.core.errors import InputError
from atlassegfm.core.files import remove_unfinished
from atlassegfm.core.image import save_volume
from atlassegfm.jobs import Case, parse_shard, plan_cases, store
from atlassegfm.jobs import run as run_jobs
from atlassegfm.jobs import work as work_module
from atlassegfm.jobs.fingerprint import atlas_digest, digest, file_record, is_unchanged
from atlassegfm.jobs.pool import run_here, run_in_processes, visible_gpus
from atlassegfm.quality.verdict import LEAST_CONFIDENCE
from conftest import Run
from scenes import ATLAS, PAPER_GATE, STRUCTURES, UNREGISTERED, Patient, straight_grid
from standin import Silent, StandIn

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]
COMMAND = ("segment", "--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz", "scans", "-o", "out")
ROOT = Path(__file__).resolve().parents[1]


def write_atlas(folder: Path) -> None:
    save_volume(ATLAS.scan(GRID), folder / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), folder / "labels.nii.gz", structures=STRUCTURES)


def write_scans(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        patient = Patient(shift_mm=(1.5 - number, number - 2.0, 1.0), scale=1.05 - number / 100)
        save_volume(patient.scan(GRID), folder / f"case{number}.nii.gz")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an atlas, its labels and three scans."""
    write_atlas(tmp_path)
    write_scans(tmp_path / "scans", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content_of(out: Path) -> dict[str, bytes]:
    """All result files but those that tell how it went."""
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != "status.json" and file.parent != out
    }


def times_of(out: Path) -> dict[str, int]:
    """When each result was written."""
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*/status.json")}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    assert before.keys() <= after.keys()
    return {name for name, when in after.items() if before.get(name) != when}


def rows_of(out: Path, name: str = "cohort.json") -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in json.loads((out / name).read_text())["cases"]}


# Going on


def test_second_run_computes_nothing(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*COMMAND, *FAST)
    assert first.code == 0, first.err
    assert "3 queries: 3 done (of them 0 kept), 0 failed" in first.out
    before = times_of(folder / "out")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr(work_module, "segment", never)
    monkeypatch.setattr(work_module, "load_chosen", never)
    second = run(*COMMAND, *FAST)
    assert second.code == 0, second.err
    assert "3 of 3 kept, 0 to do\n" in second.err
    assert "3 queries: 3 done (of them 3 kept), 0 failed" in second.out
    assert times_of(folder / "out") == before
    as_json = run(*COMMAND, *FAST, "--json").json
    assert [(one["query"], one["kept"]) for one in as_json["results"]] == [(f"case{n}.nii.gz", True) for n in range(3)]
    assert [one["name"] for one in as_json["results"][0]["structures"]] == ["liver", "kidney", "node"]
    assert as_json["counts"] == {"done": 3, "failed": 0, "left": 0, "kept": 3}


def _remove_a_result(folder: Path) -> tuple[list[str], str]:
    (folder / "out/case1/segmentation.nii.gz").unlink()
    return [], "1 new"


def _remove_a_folder(folder: Path) -> tuple[list[str], str]:
    shutil.rmtree(folder / "out/case1")
    return [], "1 new"


def _damage_a_status(folder: Path) -> tuple[list[str], str]:
    (folder / "out/case1/status.json").write_text("{")
    return [], "1 other results_format"


def _change_a_query(folder: Path) -> tuple[list[str], str]:
    save_volume(Patient(shift_mm=(3.0, 3.0, 3.0)).scan(GRID), folder / "scans/case1.nii.gz")
    return [], "1 other query"


@pytest.mark.parametrize("change", [_remove_a_result, _remove_a_folder, _damage_a_status, _change_a_query])
def test_only_what_is_missing_or_changed(
    folder: Path, run: Run, change: Callable[[Path], tuple[list[str], str]]
) -> None:
    assert run(*COMMAND, *FAST).code == 0
    before = times_of(folder / "out")
    arguments, why = change(folder)
    outcome = run(*COMMAND, *FAST, *arguments)
    assert outcome.code == 0, outcome.err
    assert f"2 of 3 kept, 1 to do ({why})\n" in outcome.err
    after = times_of(folder / "out")
    assert {name for name in after if before.get(name) != after[name]} == {"case1"}
    assert rows_of(folder / "out")["case1"]["why"] == why.removeprefix("1 ")
    assert rows_of(folder / "out")["case0"]["kept"] is True


def _other_setting(folder: Path) -> list[str]:
    return ["--set", "fusion.iterations=1"]


def _other_seed(folder: Path) -> list[str]:
    return ["--seed", "9"]


def _other_model(folder: Path) -> list[str]:
    return ["--model", "none"]


def _other_threads(folder: Path) -> list[str]:
    return ["--threads", "2"]


def _other_labels(folder: Path) -> list[str]:
    save_volume(Patient(scale=0.9).labels(GRID), folder / "labels.nii.gz", structures=STRUCTURES)
    return []


def _other_names(folder: Path) -> list[str]:
    (folder / "names.txt").write_text("1 hepar\n7 ren\n12 nodus\n")
    return ["--names", "names.txt"]


def _other_program(folder: Path) -> list[str]:
    return ["--other-program"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        *((_other_setting, "settings"), (_other_seed, "settings"), (_other_model, "settings")),
        *((_other_threads, "settings"), (_other_labels, "context"), (_other_names, "context")),
        *((_other_program, "version"), (lambda _: ["--keep"], "keep"), (lambda _: ["--force"], "force")),
    ],
)
def test_what_all_share_has_changed(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], list[str]], why: str
) -> None:
    assert run(*COMMAND, *FAST).code == 0
    before = times_of(folder / "out")
    arguments = change(folder)
    if arguments == ["--other-program"]:
        arguments = []
        monkeypatch.setattr(work_module, "__version__", "9.8.7")
    outcome = run(*COMMAND, *FAST, *arguments)
    assert outcome.code == 0, outcome.err
    assert changed(before, times_of(folder / "out")) == {"case0", "case1", "case2"}
    expected = "forced" if why == "force" else f"other {why}"
    assert {row["why"] for row in rows_of(folder / "out").values()} == {expected}


def test_what_does_not_matter_is_kept(folder: Path, run: Run) -> None:
    assert run(*COMMAND, *FAST, "--keep").code == 0
    before = times_of(folder / "out")
    # The same content, written later; the atlas elsewhere; steps between that are not asked for any more.
    os.utime(folder / "scans/case0.nii.gz", (1, 1))
    shutil.copytree(folder / "scans", folder / "elsewhere")
    outcome = run(*COMMAND, *FAST)
    assert "3 of 3 kept" in outcome.err
    outcome = run(*(part if part != "scans" else "elsewhere" for part in COMMAND), *FAST)
    assert "3 of 3 kept" in outcome.err
    assert times_of(folder / "out") == before


def test_failed_cases_are_tried_again_and_keep_no_earlier_result(folder: Path, run: Run) -> None:
    assert run(*COMMAND, *FAST).code == 0
    good = (folder / "scans/case1.nii.gz").read_bytes()
    (folder / "scans/case1.nii.gz").write_bytes(good[:200])
    outcome = run(*COMMAND, *FAST)
    assert outcome.code == 1
    assert outcome.err.endswith("error: 1 of 3 queries failed: scans/case1.nii.gz\n")
    assert [path.name for path in (folder / "out/case1").iterdir()] == ["status.json"]
    row = rows_of(folder / "out")["case1"]
    assert row["state"] == "failed"
    # The folder may name a patient.
    assert row["reason"].startswith("case1.nii.gz: ")
    assert "scans" not in json.dumps(row)
    assert "scans/case1.nii.gz: the file is truncated" in outcome.err
    (folder / "scans/case1.nii.gz").write_bytes(good)
    outcome = run(*COMMAND, *FAST)
    assert outcome.code == 0
    assert "2 of 3 kept, 1 to do (1 failed before)" in outcome.err


def test_one_query_is_a_cohort_of_one(folder: Path, run: Run) -> None:
    single = tuple("scans/case0.nii.gz" if part == "scans" else part for part in COMMAND)
    assert run(*single, *FAST, "--threads", "1").code == 0
    again = run(*single, *FAST, "--threads", "1")
    assert "1 of 1 kept, 0 to do" in again.err
    assert "liver" in again.out
    assert rows_of(folder / "out")["case0"]["kept"] is True
    (folder / "scans/case0.nii.gz").rename(folder / "scans/renamed.nii.gz")
    (folder / "out/case0").rename(folder / "out/renamed")
    outcome = run(*COMMAND, *FAST)
    assert "1 of 3 kept, 2 to do (2 new)" in outcome.err
    assert rows_of(folder / "out")["renamed"]["kept"] is True


def test_summary(folder: Path, run: Run) -> None:
    (folder / "scans/damaged.nii.gz").write_bytes(b"no scan at all")
    assert run(*COMMAND, *FAST).code == 1
    summary = json.loads((folder / "out/cohort.json").read_text())
    assert summary["counts"] == {"done": 3, "failed": 1, "left": 0, "kept": 0}
    assert (summary["device"], summary["workers"], summary["threads"], summary["shard"]) == ("cpu", 1, 1, None)
    assert [row["case"] for row in summary["cases"]] == ["case0", "case1", "case2", "damaged"]
    assert summary["cases"][0]["seconds"] > 0
    assert summary["cases"][0]["peak_memory_mb"] > 50
    assert str(folder) not in json.dumps(summary)


def test_long_tables_show_what_needs_a_look(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlassegfm.cli.outcome._LISTED", 3)
    (folder / "scans/damaged.nii.gz").write_bytes(b"no scan at all")
    out = run(*COMMAND, *FAST).out
    assert "damaged" in out
    assert "case0" not in out


# Doubts


def test_wrong_part_of_the_body_is_told(folder: Path, run: Run, calibrated: None) -> None:
    noise = np.random.default_rng(0).normal(100, 50, GRID.shape).astype(np.float32)
    save_volume(type(ATLAS.scan(GRID))(noise, GRID), folder / "scans/noise.nii.gz")
    outcome = run(*COMMAND, *FAST)
    assert outcome.code == 0
    (told,) = (line for line in outcome.err.splitlines() if "confidence" in line)
    assert told.startswith("warning: scans/noise.nii.gz: ")
    assert f"{LEAST_CONFIDENCE}" in told
    rows = rows_of(folder / "out")
    assert rows["noise"]["warnings"] == [told.removeprefix("warning: scans/noise.nii.gz: ")]
    assert rows["case0"]["warnings"] == []
    # Kept results are as doubtful as before.
    assert run(*COMMAND, *FAST).out.count("confidence") == 1


@pytest.mark.parametrize(
    ("confidence", "statuses", "count"),
    [
        (0.6, ("present", "absent"), 0),
        (float("nan"), ("present",), 0),
        (0.44, ("present",), 1),
        (0.2, ("outside", "absent"), 2),
    ],
)
def test_doubts(confidence: float, statuses: tuple[str, ...], count: int) -> None:
    assert len(work_module.warnings_on(outcome_of(confidence, [(status, None) for status in statuses]))) == count


@pytest.mark.parametrize(
    ("structures", "doubted"),
    [
        ([("present", "failed"), ("present", "failed")], True),
        ([("present", "failed"), ("absent", "failed")], True),
        ([("present", "failed"), ("present", "review")], False),
        ([("present", "failed"), ("outside", "review")], True),
        ([("outside", "review"), ("present", None)], False),
        ([("present", "good")], False),
    ],
)
def test_doubt_where_every_structure_is_judged_failed(structures: list[tuple[str, str | None]], doubted: bool) -> None:
    found = work_module.warnings_on(outcome_of(0.58, structures))
    assert [one.startswith("every structure in view is judged failed") for one in found] == [True] * doubted


def test_what_hardly_resembles_the_atlas_is_doubted_once() -> None:
    # All verdicts are failed then, for the same reason.
    (doubt,) = work_module.warnings_on(outcome_of(0.3, [("present", "failed")]))
    assert "0.30" in doubt


def test_confidence_is_not_judged_where_its_bound_does_not_hold() -> None:
    assert work_module.warnings_on(outcome_of(0.3, [("present", None)], is_judged=False)) == []


def outcome_of(confidence: float, structures: list[tuple[str, str | None]], *, is_judged: bool = True) -> Any:
    """As much of a result as doubts are made of: its confidence, and status and verdict of each structure."""
    return SimpleNamespace(
        is_judged=is_judged,
        swapped=False,
        registration=SimpleNamespace(confidence=confidence),
        structures=[
            SimpleNamespace(status=status, quality=None if verdict is None else SimpleNamespace(verdict=verdict))
            for status, verdict in structures
        ],
    )


# Parts


def test_shards_do_each_case_once(folder: Path, run: Run) -> None:
    first = run(*COMMAND, *FAST, "--shard", "1/2")
    assert first.code == 0, first.err
    assert set(times_of(folder / "out")) == {"case0", "case2"}
    before = times_of(folder / "out")
    assert run(*COMMAND, *FAST, "--shard", "2/2").code == 0
    assert changed(before, times_of(folder / "out")) == {"case1"}
    assert rows_of(folder / "out", "cohort-1-of-2.json").keys() == {"case0", "case2"}
    assert rows_of(folder / "out", "cohort-2-of-2.json").keys() == {"case1"}
    # A shard without a case is no mistake: job arrays are of one size for all cohorts.
    assert run(*COMMAND, *FAST, "--shard", "7/7").code == 0
    assert "3 of 3 kept" in run(*COMMAND, *FAST).err


def test_shards_do_not_depend_on_the_order() -> None:
    cases = [Case(name, Path(name)) for name in "hfaebdcg"]
    parts = [parse_shard(f"{number}/3").part_of(cases) for number in (1, 2, 3)]
    assert ["".join(case.name for case in part) for part in parts] == ["adg", "beh", "cf"]
    assert parse_shard("2/3").part_of(cases[::-1]) == parts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/3"], "--shard 0/3: expected i/n with i from 1 to n, such as 3/8"),
        (["--shard", "4/3"], "--shard 4/3: expected i/n"),
        (["--shard", "half"], "--shard half: expected i/n"),
        (["--workers", "0"], "Invalid value for '--workers'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--cluster", "moon"], "--cluster moon: expected local, slurm, or the address of a scheduler"),
        (["--cluster", "slurm", "--cluster-option", "colour=red"], "--cluster-option colour=red: expected key=value"),
        (["--cluster", "slurm", "--cluster-option", "queue"], "--cluster-option queue: expected key=value"),
        (["--cluster-option", "queue=long"], "--cluster-option: is for --cluster slurm; leave it out"),
    ],
)
def test_bad_option(folder: Path, run: Run, arguments: list[str], message: str) -> None:
    outcome = run(*COMMAND, *FAST, "--quiet", *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert not (folder / "out").exists()


# Stopping


def test_interrupt_keeps_what_is_done(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = work_module.segment, []

    def segment(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "segment", segment)
        outcome = run(*COMMAND, *FAST)
    assert outcome.code == 130
    assert outcome.err.endswith("stopped: 2 done, 1 left; the same command continues from there\ninterrupted\n")
    assert {row["state"] for row in rows_of(folder / "out").values()} == {"done", "left"}
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["case0", "case1", "cohort.csv", "cohort.json"]
    outcome = run(*COMMAND, *FAST)
    assert outcome.code == 0
    assert "2 of 3 kept, 1 to do (1 new)" in outcome.err


def test_unfinished_folders_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = re.sub(r"[^A-Za-z0-9.]+", ".", socket.gethostname())
    names = {
        "ended": f".writing-{host}-{ended.pid}-abc",
        "running": f".writing-{host}-{os.getpid()}-abc",
        "elsewhere": f".writing-not{host}-{ended.pid}-abc",
        "old": f".writing-not{host}-1-abc",
        "nobody's": ".writing-abc",
        "result": "case1",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "new").write_text("half")
    os.utime(tmp_path / names["old"], (1, 1))
    assert remove_unfinished(tmp_path) == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names[key] for key in ("running", "elsewhere", "nobody's", "result")}
    assert remove_unfinished(tmp_path / "absent") == 0


# Digests


def test_digest_sees_every_difference(folder: Path) -> None:
    files = (Path("atlas.nii.gz"), Path("labels.nii.gz"))
    atlas = Atlas.from_files(*files)
    first = atlas_digest(atlas)
    moved = [path.rename(folder / f"other_{path.name}") for path in files]
    assert atlas_digest(Atlas.from_files(*moved)) == first
    atlas.labels.data.ravel()[np.flatnonzero(atlas.labels.data)[0]] = 12
    assert atlas_digest(atlas) != first
    assert len({digest(*texts) for texts in (("1", "2"), ("12",), ("1", "2", ""), ("", "12"), ("2", "1"))}) == 5


def test_files_that_belong_to_a_header_count(tmp_path: Path) -> None:
    (tmp_path / "voxels.raw").write_bytes(b"123")
    headers = {
        "one.mhd": "NDims = 3\nElementDataFile = voxels.raw\n",
        "two.mhd": "ElementDataFile = LIST\nvoxels.raw\n",
        "three.mhd": "ElementDataFile = vox%02d.raw 1 2 1\n",
        "four.nhdr": "NRRD0004\ndata file: voxels.raw\n",
        "five.nhdr": "NRRD0004\ndata file: LIST\nvoxels.raw\n",
    }
    (tmp_path / "vox01.raw").write_bytes(b"456")
    for name, text in headers.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "series").mkdir()
    (tmp_path / "series/1.dcm").write_bytes(b"789")
    records = {name: file_record(tmp_path / name) for name in (*headers, "series")}
    assert all(is_unchanged(tmp_path / name, record) for name, record in records.items())
    for name in ("voxels.raw", "vox01.raw", "series/1.dcm"):
        (tmp_path / name).write_bytes(b"changed")
    assert not any(is_unchanged(tmp_path / name, record) for name, record in records.items())
    assert not is_unchanged(tmp_path / "absent.nii", records["one.mhd"])
    assert not is_unchanged(tmp_path / "one.mhd", None)


def test_content_is_read_only_where_size_or_time_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"1")
    record = file_record(path)
    os.utime(path, (1, 1))
    assert is_unchanged(path, record)
    record = file_record(path)
    monkeypatch.setattr("atlassegfm.jobs.fingerprint.file_record", lambda _: pytest.fail("was read"))
    assert is_unchanged(path, record)


# Planning


def test_planning_looks_at_each_file_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = Path.resolve

    def resolve(self: Path, strict: bool = False) -> Path:
        calls.append(self)
        return real(self, strict)

    monkeypatch.setattr(Path, "resolve", resolve)
    for count in (100, 200):
        calls.clear()
        plan_cases([tmp_path / f"{n}.nii" for n in range(count)], tmp_path / "out")
        assert len(calls) <= 2 * count + 10


# Workers


def collect(work: StandIn, names: list[str], runner: Any = run_here) -> dict[str, Any]:
    cases = [Case(name, Path(f"{name}.nii")) for name in names]
    return run_jobs(cases, work, runner, Silent()).rows


def in_processes(workers: int, gpus: tuple[str, ...] = ()) -> Any:
    return lambda work, cases, watcher: run_in_processes(work, cases, watcher, workers, gpus)


def test_killed_worker_costs_one_case_one_more_attempt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = StandIn(tmp_path, seconds=0.05)
    names = ["a", "deadly", "b", "fatal", *"cdef"]
    rows = collect(work, names, in_processes(2, ("7", "9")))
    assert list(rows) == names
    assert {name: row.state for name, row in rows.items()} == {
        **dict.fromkeys(names, "done"),
        "fatal": "failed",
    }
    assert {name: row.attempts for name, row in rows.items()} == {**dict.fromkeys(names, 1), "deadly": 2, "fatal": 2}
    assert rows["fatal"].reason == (
        "its worker was ended by SIGKILL, 2 times; if memory ran out, use fewer workers or crop the scan"
    )
    # Which of two workers dies first is the machine's business.
    assert sorted(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING) == [
        "deadly.nii: its worker was ended by SIGKILL; begun again",
        "fatal.nii: its worker was ended by SIGKILL; begun again",
    ]
    begun = [line.split() for line in (tmp_path / "begun.txt").read_text().splitlines()]
    assert sorted(f"{name} {attempt}" for name, attempt, *_ in begun) == sorted(
        [*(f"{name} 1" for name in names), "deadly 2", "fatal 2"]
    )
    # Opened once by each worker that does a case: two, and those in the place of dead ones.
    opened = [line.split() for line in (tmp_path / "opened.txt").read_text().splitlines()]
    assert 3 <= len(opened) <= 5
    assert {threads for _, threads in opened} == {"1"}
    assert {gpu for *_, gpu in begun} == {"7", "9"}
    assert not any(_is_running(int(process)) for process, _ in opened)


def test_workers_that_cannot_begin_say_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^atlas\.nii\.gz: no such file$"):
        collect(StandIn(tmp_path, refuses=True), ["a", "b"], in_processes(1))


def test_gpus_as_the_scheduler_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    assert visible_gpus() == ["3", "GPU-5"]


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _wait(what: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def program(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begin the program in a process group of its own."""
    begun = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "atlassegfm", *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": paths},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
def test_interrupted_killed_and_restarted_gives_the_same_bytes(
    folder: Path, run: Run, program: Callable[..., subprocess.Popen[str]]
) -> None:
    """One run ended by Ctrl-C, one by SIGKILL, one whole; beside a run in one process."""
    shutil.rmtree(folder / "scans")
    write_scans(folder / "scans", 6)
    (folder / "scans/damaged.nii.gz").write_bytes((folder / "scans/case0.nii.gz").read_bytes()[:300])
    (folder / "scans/gone.nii.gz").symlink_to(folder / "nowhere.nii.gz")
    options = ["--set", "registration.affine=false", "--set", "registration.deformable=false", "--keep"]
    once = run(*COMMAND[:-1], "once", *options)
    assert once.code == 1
    arguments = (*COMMAND, *options, "--workers", "2")
    out = folder / "out"

    def done() -> list[str]:
        return [path.parent.name for path in out.glob("*/run.json")]

    first = program(*arguments)
    _wait(lambda: len(done()) >= 2)
    workers = _children(first.pid)
    assert len(workers) >= 2
    os.killpg(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=30)
    assert first.returncode == 130, said
    assert re.search(r"stopped: \d done, \d left; the same command continues from there\ninterrupted\n$", said)
    _wait(lambda: not any(_is_running(worker) for worker in workers), seconds=2)  # multiprocessing's own helper is last
    assert not list(out.glob(".writing-*"))

    before, count = times_of(out), len(done())
    second = program(*arguments)
    _wait(lambda: len(done()) > count)
    workers = _children(second.pid)
    second.kill()
    second.communicate()
    # Workers notice that they work for nobody.
    _wait(lambda: not any(_is_running(worker) for worker in workers), seconds=20)
    assert len(done()) < 6, "it was done before it could be killed"
    finished = {name: when for name, when in times_of(out).items() if name in done()}
    assert not {name for name, when in before.items() if name in finished and finished[name] != when}

    third = program(*arguments)
    said, _ = third.communicate(timeout=120)
    assert third.returncode == 1, said
    assert f"{len(finished)} of 8 kept" in said
    assert "2 of 8 queries failed: scans/damaged.nii.gz, scans/gone.nii.gz" in said
    after = times_of(out)
    assert {name: after[name] for name in finished} == finished
    one, other = content_of(folder / "once"), content_of(out)
    assert len(one) >= 6 * 6
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert not list(out.glob(".writing-*"))
    memory = [row["peak_memory_mb"] for row in rows_of(out).values() if row["state"] == "done"]
    assert min(memory) > 50


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_termination_ends_the_workers(folder: Path, program: Callable[..., subprocess.Popen[str]]) -> None:
    begun = program(*COMMAND, "--workers", "2")  # with all stages: it is not done before it is ended
    _wait(lambda: len(_children(begun.pid)) >= 3)  # the resource tracker, too
    workers = _children(begun.pid)
    begun.terminate()
    said, _ = begun.communicate(timeout=30)
    assert begun.returncode == 143, said
    _wait(lambda: not any(_is_running(worker) for worker in workers), seconds=2)
    assert not (folder / "out").exists() or not list((folder / "out").glob(".writing-*"))


def test_results_are_kept_whole_if_writing_them_fails(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("out/case0: cannot write there (No space left on device); choose another place")

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_volume", refuse)
        patch.setattr(work_module, "write_failure", refuse)
        outcome = run(*COMMAND, *FAST)
    assert outcome.code == 2
    assert outcome.err.count("No space left on device") >= 3
    assert rows_of(folder / "out").keys() == {"case0", "case1", "case2"}
    assert run(*COMMAND, *FAST).code == 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
def test_twelve_real_scans(
    folder: Path, data_dir: Path, run: Run, program: Callable[..., subprocess.Popen[str]]
) -> None:
    """Nine that fit, one that is damaged, one that cannot be read, one of another part of the body."""
    shutil.rmtree(folder / "scans")
    (folder / "scans").mkdir()
    images = sorted((data_dir / "Dataset004_Hippocampus/imagesTr").iterdir())
    labels = sorted((data_dir / "Dataset004_Hippocampus/labelsTr").iterdir())
    for number in range(9):
        shutil.copyfile(images[1 + number % (len(images) - 1)], folder / f"scans/case{number}.nii.gz")
    # Another part of the body: named as such, by its confidence or by its verdicts.
    abdomen = min((data_dir / "Dataset001_AbdMR/imagesTr").iterdir())
    shutil.copyfile(abdomen, folder / "scans/abdomen.nii.gz")
    (folder / "scans/damaged.nii.gz").write_bytes(images[1].read_bytes()[:5000])
    (folder / "scans/gone.nii.gz").symlink_to(folder / "nowhere.nii.gz")
    command = ("segment", "--atlas", str(images[0]), "--labels", str(labels[0]), "scans", "-o")
    out = folder / "out"

    begun = program(*command, "out", "--workers", "2")
    _wait(lambda: len(list(out.glob("case*/run.json"))) >= 3, seconds=600)
    begun.kill()
    begun.communicate()
    before = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/run.json")}
    assert len(before) < 10
    ended = program(*command, "out", "--workers", "2")
    said, _ = ended.communicate(timeout=1200)
    assert ended.returncode == 1, said
    assert f"{len(before)} of 12 kept" in said
    assert said.count("error: scans/damaged.nii.gz: ") == 1, said
    assert said.count("error: scans/gone.nii.gz: ") == 1, said
    # Told again where it was kept: in the table.
    assert re.search(
        r"^ +abdomen .* (every structure in view is judged failed|hardly resembles the atlas)", said, re.MULTILINE
    ), said
    assert "12 queries: 10 done" in said
    after = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/run.json")}
    assert {name: after[name] for name in before} == before

    assert run(*command, "once").code == 1
    assert content_of(folder / "once") == content_of(out)
