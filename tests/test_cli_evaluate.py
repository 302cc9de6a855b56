"""The command ``evaluate`` from outside: label maps in, tables and exit codes out."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.labels import Structure
from conftest import Outcome, Run
from scenes import ATLAS, PAPER_GATE, QUERY, STRUCTURES, UNREGISTERED, straight_grid

#: 4 mm³ a voxel.
GRID = straight_grid((10, 10, 10), (1.0, 2.0, 2.0))
LIVER, NODE = (Structure(1, "liver", (9, 9, 9)), Structure(2, "node", (99, 9, 9)))


@pytest.fixture
def run(run: Run) -> Run:
    """``evaluate`` with these arguments."""
    return lambda *arguments, command="evaluate": run(command, *arguments)


def write(path: Path, length: int, *, node: bool = True, grid: Grid = GRID, names: bool = True) -> None:
    """A liver of 25 x ``length`` voxels (0.1 ml x ``length``) and a node of two."""
    data = np.zeros(grid.shape, np.uint8)
    data[:5, 2:7, :length] = 1
    if node:
        data[7:9, 8, 4] = 2
    path.parent.mkdir(parents=True, exist_ok=True)
    save_volume(Volume(data, grid), path, structures=(LIVER, NODE) if names else None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two cases: livers of 8 against 10 and of 5 against 5 slices; the second result has no node."""
    write(tmp_path / "ref/one.nii.gz", 10)
    write(tmp_path / "ref/two.nii.gz", 5)
    write(tmp_path / "pred/one.nii.gz", 8)
    write(tmp_path / "pred/two.nii.gz", 5, node=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAIR = ("--pred", "pred/one.nii.gz", "--ref", "ref/one.nii.gz")
FOLDERS = ("--pred", "pred", "--ref", "ref")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def lines(outcome: Outcome) -> dict[str, list[str]]:
    """The table by the first word of each line."""
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in rows}


def test_two_files_give_a_table(folder: Path, run: Run) -> None:
    before = tree(folder)
    outcome = run(*PAIR)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("1 case, 2 structures; NSD at 2 mm for all")
    # Dice 2 * 200 / (200 + 250).
    table = lines(outcome)
    assert table["structure"] == ["ml", "Dice", "NSD", "HD95", "ASSD"]
    assert table["liver"][:2] == ["1.00", "0.889"]
    assert table["liver"][3] == "4.00"
    assert 0 < float(table["liver"][4]) < 4
    assert table["node"][1:] == ["1.000", "1.000", "0.00", "0.00"]
    assert table["mean"][0] == "0.944"
    assert "clDice" not in outcome.out
    assert "one scoring" in outcome.err
    assert tree(folder) == before


def test_folders_give_means_over_cases_then_structures(folder: Path, run: Run) -> None:
    outcome = run(*FOLDERS)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("2 cases, 2 structures; NSD at 2 mm for all")
    table = lines(outcome)
    assert table["structure"] == [
        *("ml", "cases", "missed", "Dice", "sd", "NSD", "HD95", "ASSD", "worst", "in", "case")
    ]
    # Livers 0.889 and 1; the node of one case is found, that of the other one missed.
    assert table["liver"][:5] == ["0.75", "2", "0", "0.944", "0.079"]
    assert table["node"][:5] == ["0.01", "2", "1", "0.500", "0.707"]
    # The worst case of each structure, with its Dice.
    assert table["liver"][-2:] == ["0.889", "one"]
    assert table["node"][-2:] == ["0.000", "two"]
    assert max(map(len, outcome.out.splitlines())) <= 110
    assert table["mean"][0] == "0.722"
    assert "[2/2] two scoring" in outcome.err
    assert run(*FOLDERS, "--quiet").err == ""


def test_what_both_lack_is_left_out_and_counted_as_perfect_in_a_line_of_its_own(folder: Path, run: Run) -> None:
    write(folder / "ref/two.nii.gz", 5, node=False)
    outcome = run(*FOLDERS)
    assert outcome.code == 0, outcome.err
    assert lines(outcome)["node"][:5] == ["0.01", "2", "1", "1.000", "-"]
    assert lines(outcome)["neither"][2] == "0.972"
    write(folder / "ref/two.nii.gz", 5)
    assert "neither" not in lines(run(*FOLDERS))


def test_the_folder_that_segment_wrote_is_scored(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grid = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
    save_volume(ATLAS.scan(grid), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    save_volume(QUERY.scan(grid), tmp_path / "case_2_0000.nii.gz")
    (tmp_path / "labelsTr").mkdir()
    save_volume(QUERY.labels(grid), tmp_path / "labelsTr/case_2.nii.gz")
    fast = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]
    atlas = ("--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz")
    done = run("case_2_0000.nii.gz", *atlas, "-o", "out", "--keep", *fast, command="segment")
    assert done.code == 0, done.err
    outcome = run("--pred", "out", "--ref", "labelsTr", "--json")
    assert outcome.code == 0, outcome.err
    assert [(one["case"], one["structure"]) for one in outcome.json["scores"]] == [
        *(("case_2", "liver"), ("case_2", "kidney"), ("case_2", "node"))
    ]
    assert all(one["dice"] > 0.5 for one in outcome.json["scores"])


def test_json_has_what_the_table_has(folder: Path, run: Run) -> None:
    outcome = run(*FOLDERS, "--json", "--quiet", "--tolerance", "3")
    assert (outcome.code, outcome.err) == (0, "")
    content = outcome.json
    assert content.keys() == {"tolerances", "summary", "cases", "scores"}
    assert [(one["case"], one["status"], one["dice"], one["worst"]["structure"]) for one in content["cases"]] == [
        *(("one", "ok", 0.944444, "liver"), ("two", "ok", 0.5, "node"))
    ]
    assert content["summary"]["structures"][1]["worst"] == {"case": "two", "dice": 0.0}
    assert content["tolerances"] == "3 mm for all"
    assert content["summary"]["mean"]["dice"] == pytest.approx(0.722222, abs=1e-6)
    assert content["summary"]["counts"] == {"ok": 3, "missed": 1, "hallucinated": 0, "both_empty": 0}
    assert [(one["case"], one["value"], one["status"], one["dice"]) for one in content["scores"]] == [
        ("one", 1, "ok", 0.888889),
        ("one", 2, "ok", 1.0),
        ("two", 1, "ok", 1.0),
        ("two", 2, "missed", 0.0),
    ]
    assert {one["tolerance_mm"] for one in content["scores"]} == {3.0}
    # No NaN, which JSON does not have.
    write(folder / "ref/two.nii.gz", 5, node=False)
    assert run(*FOLDERS, "--json").json["scores"][3]["dice"] is None


@pytest.mark.parametrize("name", ["scores.csv", "SCORES.CSV"])
def test_scores_are_written_as_csv(folder: Path, run: Run, name: str) -> None:
    before = tree(folder)
    outcome = run(*FOLDERS, "-o", name)
    assert outcome.code == 0, outcome.err
    assert outcome.out.endswith(f"\nscores    {name}\n")
    assert tree(folder) == before | {name}
    with (folder / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["structure"], row["status"], row["dice"]) for row in rows] == [
        ("one", "liver", "ok", "0.888889"),
        ("one", "node", "ok", "1.000000"),
        ("two", "liver", "ok", "1.000000"),
        ("two", "node", "missed", "0.000000"),
    ]
    assert {row["cldice"] for row in rows} == {""}


def test_structures_tolerances_and_centrelines_on_request(folder: Path, run: Run) -> None:
    (folder / "mm.toml").write_text("default_mm = 1\n[tolerance_mm]\nliver = 4\n")
    outcome = run(*PAIR, "--labels", "liver", "--cldice", "1", "--tolerance", "mm.toml")
    assert outcome.code == 0, outcome.err
    table = lines(outcome)
    assert "node" not in table
    # Within 4 mm everywhere.
    assert table["structure"] == ["ml", "Dice", "NSD", "HD95", "ASSD", "clDice"]
    assert table["liver"][2] == "1.000"
    # Each structure its own: in a column.
    table = lines(run(*PAIR, "--tolerance", "mm.toml"))
    assert table["structure"][3:5] == ["at", "mm"]
    assert [table[name][3] for name in ("liver", "node")] == ["4", "1"]
    (folder / "names.txt").write_text("1 left lobe\n2 dot\n")
    assert "left lobe" in run(*PAIR, "--names", "names.txt").out


def test_cases_on_request(folder: Path, run: Run) -> None:
    table = lines(run(*FOLDERS, "--cases"))
    assert table["one"][0] == "0.944"
    assert table["one"][-2:] == ["0.889", "liver"]
    assert table["two"][-2:] == ["0.000", "node"]


def test_a_case_on_another_grid_is_named_and_the_others_are_scored(folder: Path, run: Run) -> None:
    write(folder / "pred/two.nii.gz", 5, grid=straight_grid((10, 10, 9), (1.0, 2.0, 2.0)))
    outcome = run(*FOLDERS, "-o", "scores.csv", "--cases")
    assert outcome.code == 1
    assert "warning: pred/two.nii.gz" in outcome.err
    assert outcome.out.startswith("1 case, 2 structures")
    assert lines(outcome)["two:"][0] == "pred/two.nii.gz:"
    assert lines(outcome)["two"][-2:] == ["not", "scored"]
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["status"]) for row in rows] == [("one", "ok"), ("one", "ok"), ("two", "not_scored")]
    assert "pred/two.nii.gz" in rows[2]["reason"]
    outcome = run(*FOLDERS, "--json", "--quiet")
    assert outcome.code == 1
    assert outcome.json["cases"][1]["status"] == "not_scored"
    assert "pred/two.nii.gz" in outcome.json["cases"][1]["reason"]


def test_references_without_result_may_be_left_out(folder: Path, run: Run) -> None:
    (folder / "pred/two.nii.gz").unlink()
    outcome = run(*FOLDERS, "--partial", "--quiet")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: pred: no result for 1 of 2 references: two")
    assert outcome.out.startswith("1 case, ")


#: What is done to the files, arguments, and what the error names; the other errors are in test_evaluation.py.
BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "no reference": (lambda folder: (folder / "ref/two.nii.gz").unlink(), FOLDERS, ("pred/two.nii.gz", "ref")),
    "no result": (
        lambda folder: (folder / "pred/two.nii.gz").unlink(),
        FOLDERS,
        ("pred", "1 of 2", "two", "--partial"),
    ),
    "damaged": (
        lambda folder: (folder / "pred/one.nii.gz").write_bytes((folder / "pred/one.nii.gz").read_bytes()[:-9]),
        *(PAIR, ("pred/one.nii.gz", "damaged")),
    ),
    "no CSV": (lambda _: None, (*PAIR, "-o", "scores.xlsx"), ("scores.xlsx", ".csv")),
    "no folder": (lambda _: None, (*PAIR, "-o", "deep/scores.csv"), ("deep/scores.csv", "the folder deep")),
    "unknown label": (lambda _: None, (*PAIR, "--labels", "liver,spleen"), ("'spleen'", "1 (liver), 2 (node)")),
    "gap in labels": (lambda _: None, (*PAIR, "--labels", "liver,,node"), ("--labels liver,,node",)),
    "bad tolerance": (lambda _: None, (*PAIR, "--tolerance", "-1"), ("-1 mm for all", "default_mm", "-1.0")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(folder: Path, run: Run, name: str) -> None:
    change, arguments, facts = BAD[name]
    change(folder)
    if "-o" not in arguments:
        arguments = (*arguments, "-o", "scores.csv")
    before = tree(folder)
    for more in ([], ["--json"]):
        outcome = run(*arguments, "--quiet", *more)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert all(fact in outcome.err for fact in facts), outcome.err
    assert tree(folder) == before


def test_missing_options(run: Run) -> None:
    outcome = run("--pred", "pred")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: Missing option '--ref'")
