"""The commands ``benchmark ...`` from outside: a labelled dataset in, tables and exit codes out."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlassegfm import demo
from atlassegfm.benchmark import pairs, runner, timing
from atlassegfm.core.errors import RegistrationError
from atlassegfm.registration.engines import external
from conftest import Run
from scenes import QUICK_GATE, UNREGISTERED, save_demo_pair, straight_grid
from test_benchmark import write_dataset, write_json

FAST = [part for assignment in (*UNREGISTERED, *QUICK_GATE) for part in ("--set", assignment)]
#: One pair and no pictures.
ONE_PAIR = ["--protocol", "one-to-all", "--cases", "case_1,case_2", "--no-plots", "--quiet"]
TABLES = {"plan.json", "results.csv", "times.csv", "summary.json", "report.md"}


@pytest.fixture
def run(run: Run) -> Run:
    """``benchmark`` with these arguments."""
    return lambda *arguments: run("benchmark", *arguments)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "Dataset009_Small")


@pytest.fixture
def folder(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a dataset in ``data``."""
    shutil.copytree(shared, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def never(*_: object, **__: object) -> None:
    raise AssertionError("nothing may be computed")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def columns_of(folder: Path) -> list[tuple[str, str]]:
    return [(one["variant"], one["method"]) for one in json.loads((folder / "summary.json").read_text())["columns"]]


def first_words(text: str) -> list[str]:
    """What each line of the table begins with."""
    return [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")]


# What comes out


def test_a_protocol_needs_no_subcommand(folder: Path, run: Run) -> None:
    outcome = run("data", "-o", "deep/out", "--protocol", "all-pairs", "--every", "2", *FAST)
    assert outcome.code == 0, outcome.err
    out = folder / "deep" / "out"
    assert {path.name for path in out.iterdir()} == TABLES | {"pairs", "dice.png", "dice-time.png"}
    pairs = [("1", "2"), ("1", "3"), ("2", "3"), ("2", "4"), ("3", "4"), ("4", "1")]
    assert {str(path.relative_to(out / "pairs/default")) for path in (out / "pairs/default").rglob("*.json")} == {
        f"case_{atlas}/case_{query}.json" for atlas, query in pairs
    }
    assert [line.partition(", about ")[0] for line in outcome.err.splitlines()] == [
        "data: 6 pairs of 4 cases: case_1, case_2, case_3, case_4",
        "structures: liver (1), kidney (7), node (12)",
        *(f"[{n}/6] case_{atlas} -> case_{query}" for n, (atlas, query) in enumerate(pairs, start=1)),
    ]
    assert first_words(outcome.out) == ["method", "atlas only", "model", "paper gate", "fused", "oracle"]
    assert outcome.out.endswith("\nreport    deep/out/report.md\n")
    report = (out / "report.md").read_text()
    assert report.startswith("# data: all-pairs, one of 2\n")
    command = "atlassegfm benchmark data -o deep/out --protocol all-pairs --every 2 "
    assert f"\n```sh\n{command}{shlex.join(FAST)}\n```\n" in report
    assert "![Dice of each structure](dice.png)" in report
    means = [one["mean"]["dice"] for one in json.loads((out / "summary.json").read_text())["columns"]]
    for name, mean in zip(("atlas only", "model", "paper gate", "fused", "oracle"), means, strict=True):
        assert f"  {name:<10}  {mean:.4f}  " in outcome.out
        assert f"| {name} | {mean:.4f} | " in report


@pytest.mark.parametrize(
    "arguments",
    [
        ["protocol", "data", "-o", "out", *ONE_PAIR, *FAST],
        [*ONE_PAIR, *FAST, "-o", "out", "data"],
        ["-o", "out", "data", *FAST, *ONE_PAIR],
    ],
)
def test_options_may_stand_anywhere(folder: Path, run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "out") == [("default", name) for name in ("atlas", "model", "paper", "fused", "oracle")]


def test_the_default_is_the_protocol_of_the_paper(folder: Path, run: Run) -> None:
    outcome = run("data", "-o", "out", "--folds", "2", "--models", "none", *FAST, "--json", "--no-plots", "--seed", "3")
    assert outcome.code == 0, outcome.err
    assert outcome.json["benchmark"] == "one-shot-5fold"
    assert outcome.json["seed"] == outcome.json["variants"]["none"]["settings"]["seed"] == 3
    assert len(outcome.json["pairs"]) == 2
    assert outcome.json == json.loads((folder / "out/summary.json").read_text())


def test_models_and_variants_stand_side_by_side(folder: Path, run: Run) -> None:
    stiff = ["--variant", "stiff:registration.instance.smoothness=[1]; model=none"]
    outcome = run("data", "-o", "out", *ONE_PAIR, *FAST, "--models", "none,builtin", *stiff)
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "out") == [
        ("none", "atlas"),
        *(("builtin", name) for name in ("atlas", "model", "paper", "fused", "oracle")),
        ("stiff", "atlas"),
    ]
    assert first_words(outcome.out) == ["variant", "none", *(5 * ["builtin"]), "stiff"]
    variants = json.loads((folder / "out/plan.json").read_text())["variants"]
    assert [one["settings"]["model"] for one in variants.values()] == ["none", "builtin", "none"]
    assert [one["settings"]["registration"]["instance"]["smoothness"] == [1] for one in variants.values()] == [
        False,
        False,
        True,
    ]
    assert not any(one["settings"]["registration"]["rigid"] for one in variants.values())


def test_a_variant_alone_stands_beside_the_default(folder: Path, run: Run) -> None:
    outcome = run("data", "-o", "out", *ONE_PAIR, *FAST, "--set", "model=none", "--variant", "seeded:seed=7")
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "out") == [("default", "atlas"), ("seeded", "atlas")]
    outcome = run("data", "-o", "two", *ONE_PAIR, *FAST, "--models", "none", "--engines", "instance")
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "two") == [("none instance", "atlas")]


def test_numbers_of_atlases_are_compared(folder: Path, run: Run) -> None:
    """case_4 lacks a structure: the other one of its sets stands first, and it has a say in the rest."""
    command = ["atlases", "data", "-o", "out", "--counts", "2,1", "--draws", "2", "--selected", "1", *FAST]
    outcome = run(*command, "--set", "model=none", "--no-plots")
    assert outcome.code == 0, outcome.err
    assert [name for name, _ in columns_of(folder / "out")] == ["1 atlas", "2 atlases", "1 of 2"]
    with (folder / "out/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["query"] for row in rows} == {f"case_{n}" for n in (1, 2, 3, 4)}
    sets = {tuple(row["atlas"].split("+")) for row in rows}
    assert all(len(set(one)) == 2 for one in sets)
    assert any("case_4" in one for one in sets)
    assert all(row["query"] not in row["atlas"].split("+") for row in rows)
    scored = {(row["variant"], row["status"]) for row in rows if "case_4" in row["atlas"]}
    assert ("2 atlases", "not_in_atlas") not in scored
    assert ("1 atlas", "not_in_atlas") in scored
    kept = run(*command, "--set", "model=none", "--no-plots")
    assert "to do" in kept.err


def test_ablation_has_a_column_for_each_row_of_the_paper(folder: Path, run: Run) -> None:
    short = ("linear_iterations=1", "instance.iterations=[1]", "candidates=1")
    fast = [part for one in short for part in ("--set", f"registration.{one}")]
    outcome = run("ablation", "data", "-o", "out", *ONE_PAIR, *fast, "--set", "registration.structure_search=false")
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "out") == [
        *((name, "atlas") for name in ("deformable", "rigid", "rigid, deformable", "rigid, affine")),
        ("user click", "model"),
        *(("all stages", name) for name in ("atlas", "model", "paper", "fused", "oracle")),
    ]
    variants = json.loads((folder / "out/plan.json").read_text())["variants"]
    stages = {
        name: [one["settings"]["registration"][stage] for stage in ("rigid", "affine", "deformable")]
        for name, one in variants.items()
    }
    assert stages == {
        "deformable": [False, False, True],
        "rigid": [True, False, False],
        "rigid, deformable": [True, False, True],
        "rigid, affine": [True, True, False],
        "user click": [True, True, True],
        "all stages": [True, True, True],
    }
    assert [one["prompts_from"] for one in variants.values()] == [*(4 * ["atlas"]), "user", "atlas"]
    with (folder / "out/times.csv").open(newline="") as file:
        costs = {row["variant"]: row for row in csv.DictReader(file)}
    for name, row in costs.items():
        assert (row.get("registration: deformable seconds", "") != "") == ("deformable" in name or name == "all stages")
    assert "# data: ablation, one-to-all\n" in (folder / "out/report.md").read_text()


def test_prompts_has_every_prompt_of_every_model(folder: Path, run: Run) -> None:
    outcome = run("prompts", "data", "-o", "out", *ONE_PAIR, *FAST)
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "out") == [
        (f"builtin {kind}", method) for kind in ("click", "box", "mask") for method in ("model", "fused")
    ]
    variants = json.loads((folder / "out/plan.json").read_text())["variants"]
    assert [one["settings"]["prompt"] for one in variants.values()] == ["click", "box", "mask"]


def test_engines_has_every_engine(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("GREEDY", "ANTS", "ELASTIX"):
        monkeypatch.delenv(f"ATLASSEGFM_{engine}_PYTHON", raising=False)
    outcome = run("engines", "data", "-o", "out", *ONE_PAIR, *FAST, "--engines", "instance")
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "out") == [("instance", "atlas"), ("instance", "fused")]
    # Without them named: those that are there, and what is left out is said.
    monkeypatch.setattr(external, "_is_installed", lambda engine, _: engine == "greedy")
    shown = [part for part in ONE_PAIR if part != "--quiet"]
    outcome = run("engines", "data", "-o", "all", *shown, *FAST, "--model", "none", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "all") == [("instance", "atlas"), ("greedy", "atlas")]
    assert "left out: voxelmorph takes minutes a pair on a CPU; name it with --engines" in outcome.err
    for engine in ("ants", "elastix"):
        assert f"left out: the engine '{engine}' needs " in outcome.err
    outcome = run("engines", "data", "-o", "quiet", *ONE_PAIR, *FAST, "--model", "none", "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    "choice", [["engines", "data", "--engines", "instance,greedy"], ["data", "--set", "registration.engine=greedy"]]
)
def test_an_engine_that_is_not_installed_ends_it_at_once(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, choice: list[str]
) -> None:
    monkeypatch.setattr(external, "_is_installed", lambda *_: False)
    monkeypatch.setattr(runner, "run", never)
    monkeypatch.delenv("ATLASSEGFM_GREEDY_PYTHON", raising=False)
    outcome = run(*choice, "-o", "out", *ONE_PAIR)
    assert outcome.code == 2
    assert "the engine 'greedy' needs the extra 'greedy'" in outcome.err
    assert "the extra 'greedy'" in outcome.err
    assert not (folder / "out").exists()


def test_time_has_a_line_for_each_stage(folder: Path, run: Run) -> None:
    arguments = ["time", "data", "--shape", "24x24x20", "--rounds", "1", *FAST, "--quiet"]
    outcome = run(*arguments, "--labels", "liver,kidney")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("24 x 24 x 20 voxels (data), 2 structures, ")
    assert "median of 1 run; peak " in outcome.out.splitlines()[1]
    stages = ["registration", "registration: prepare", "registration: assess", "warping", "model", "gate"]
    assert first_words(outcome.out) == ["stage", *stages, "fusion", "quality", "all"]
    outcome = run(*arguments, "--json")
    content = outcome.json
    assert content.keys() == {"device", "peak_memory_mb", "stages"}
    seconds = {one["name"]: one["seconds"] for one in content["stages"]}
    total = seconds.pop("all")
    assert total == pytest.approx(sum(n for name, n in seconds.items() if ": " not in name))
    assert [one["name"] for one in content["stages"] if one["parameters"]] == ["gate"]
    assert {path.name for path in folder.iterdir()} == {"data"}


def test_time_takes_the_median_and_not_the_first_round(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = timing.segment, [90.0, 1.0, 5.0, 2.0]

    def segment(*arguments: Any, **keywords: Any) -> Any:
        result = real(*arguments, **keywords)
        result.seconds["warping"] = taken.pop(0)
        return result

    monkeypatch.setattr(timing, "segment", segment)
    outcome = run("time", "data", "--shape", "12X12x10", "--model", "none", *FAST, "--json")
    assert outcome.code == 0, outcome.err
    assert not taken
    assert {one["name"]: one["seconds"] for one in outcome.json["stages"]}["warping"] == 2


def test_structures_by_name_and_what_is_left_out(folder: Path, run: Run) -> None:
    outcome = run("data", "-o", "out", *ONE_PAIR, *FAST, "--labels", "kid*,1", "--cldice", "kidney", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.err == "left out on request: node\n"
    assert outcome.json["structures"] == {"1": "liver", "7": "kidney"}
    assert outcome.json["centreline"] == [7]
    liver, kidney = outcome.json["columns"][0]["structures"]
    assert liver["cldice"]["count"] == 0
    assert kidney["cldice"]["count"] == 1
    assert "\nLeft out on request: node.\n" in (folder / "out/report.md").read_text()
    assert "left out" not in run("data", "-o", "all", *ONE_PAIR, *FAST, "--models", "none").err


def test_a_pair_that_fails_ends_in_exit_code_1(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pairs.segment

    def segment(*arguments: Any, **keywords: Any) -> Any:
        if "case_3" in arguments[1].source.path.name:
            raise RegistrationError("nothing in common")
        return real(*arguments, **keywords)

    monkeypatch.setattr(pairs, "segment", segment)
    arguments = ["data", "-o", "out", "--protocol", "one-to-all", "--models", "none", *FAST]
    outcome = run(*arguments, "--quiet")
    assert outcome.code == 1
    assert "warning: case_1 -> case_3 (none): nothing in common\n" in outcome.err
    assert first_words(outcome.out) == ["method", "atlas only"]
    assert {path.name for path in (folder / "out").iterdir()} == TABLES | {"pairs", "dice.png", "dice-time.png"}
    assert "\nFailed: case_1 -> case_3 (none): nothing in common\n" in (folder / "out/report.md").read_text()
    # The same again, from what is on disk.
    again = run(*arguments, "--quiet", "--json")
    assert again.code == 1
    assert again.json["failures"] == [
        {"variant": "none", "atlas": "case_1", "query": "case_3", "reason": "nothing in common"}
    ]


def test_an_interrupted_run_goes_on(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = pairs.segment, []

    def segment(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(pairs, "segment", segment)
    arguments = ["data", "-o", "out", "--protocol", "one-to-all", "--models", "none", "--no-plots", *FAST]
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.endswith("interrupted\n")
    assert tree(folder / "out") == {
        *("plan.json", "pairs", "pairs/none", "pairs/none/case_1", "pairs/none/case_1/case_2.json")
    }
    outcome = run(*arguments)
    assert outcome.code == 0
    assert "1 kept, 2 to do\n[1/2] case_1 -> case_3\n" in outcome.err
    assert len(calls) == 4
    outcome = run(*arguments, "--force", "--tolerance", "1")
    assert outcome.code == 0
    assert len(calls) == 7


# What is refused


def _no_file_ending(folder: Path) -> tuple[list[str], str]:
    content = json.loads((folder / "data/dataset.json").read_text())
    write_json(folder / "data", {key: value for key, value in content.items() if key != "file_ending"})
    return ["data"], 'data/dataset.json: no "file_ending"; expected the ending of all images, one of .nii.gz, '


def _absent_cases(folder: Path) -> tuple[list[str], str]:
    content = json.loads((folder / "data/dataset.json").read_text())
    training = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in ("case_1", "case_8")]
    write_json(folder / "data", content | {"training": training})
    return ["data"], 'data/dataset.json: "training" lists 2 cases, of which 1 are not in labelsTr: case_8; add the '


def _no_dataset_json(folder: Path) -> tuple[list[str], str]:
    (folder / "data/dataset.json").unlink()
    return ["data"], "data: no dataset.json; expected a dataset in nnU-Net raw layout"


def _no_folder(folder: Path) -> tuple[list[str], str]:
    return ["absent"], "absent: no such folder; expected the folder of a dataset in nnU-Net raw layout"


def _too_few(folder: Path) -> tuple[list[str], str]:
    return ["data"], (
        "5 folds need at least 6 cases, found 4; use --folds with a smaller number, or --protocol all-pairs\n"
    )


def _one_case(folder: Path) -> tuple[list[str], str]:
    return ["data", "--cases", "case_2"], ("a benchmark needs an atlas and a query; found 1 case: add labelled cases\n")


@pytest.mark.parametrize("command", [None, "ablation"])
@pytest.mark.parametrize("make", [_no_file_ending, _absent_cases, _no_dataset_json, _no_folder, _too_few, _one_case])
def test_bad_dataset(
    folder: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], tuple[list[str], str]],
    command: str | None,
) -> None:
    monkeypatch.setattr(pairs, "segment", never)
    arguments, message = make(folder)
    before = tree(folder)
    protocol = ["--protocol", "one-shot-5fold"] if command else []
    outcome = run(*([command] if command else []), *arguments, *protocol, "-o", "out", "--quiet", "--no-plots")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}"), outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert tree(folder) == before


BAD_VARIANT = "expected NAME:KEY=VALUE, with semicolons between several"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "case_1,case_9"], "data: no case 'case_9'; did you mean "),
        (["--cases", "case_1,case_1"], "data: case 'case_1' is named more than once; name each case once"),
        (["--cases", "case_1,"], "--cases case_1,: expected names with commas between"),
        (["--labels", "spleen"], "data/dataset.json: no structure 'spleen'; expected a value, name or pattern of 1 ("),
        (["--cldice", "vein"], "data/dataset.json: no structure 'vein'; expected a value, name or pattern of 1 ("),
        (["--protocol", "two-shot"], "unknown protocol 'two-shot'"),
        (["--atlas", "case_1"], "--atlas belongs to the protocol one-to-all, not all-pairs; leave one of them out"),
        (["--every", "0"], "--every 0: expected 1 (all pairs) or more"),
        (["--variant", "stiff"], f"--variant stiff: {BAD_VARIANT}"),
        (["--variant", ":seed=1"], f"--variant :seed=1: {BAD_VARIANT}"),
        (["--variant", "stiff: ;"], f"--variant stiff: ;: {BAD_VARIANT}"),
        (
            ["--variant", "a:sed=1"],
            "--variant a: sed=1: unknown setting 'sed' (did you mean 'seed'?)",
        ),
        (["--variant", "a:seed=-1"], "--variant a: seed=-1: seed is -1; expected a whole number from 0"),
        (["--variant", "default:seed=1"], "two variants have the same name (default, default); name each once"),
        (["--models", "none,none"], "two variants have the same name (none, none); name each once"),
        (["--models", "sam"], "unknown model 'sam'"),
        (["--engines", "demons"], "demons: registration.engine is 'demons'; expected "),
        (["--tolerance", "abc"], "abc: neither a preset nor a file; expected flare22, kits21, nikolov or a TOML file"),
        (["--tolerance", "-1"], "-1 mm for all: the tolerance of 'default_mm' is -1.0; expected a finite number of mm"),
        (["--channel", "1"], "data/dataset.json: no channel 1; expected one of 0 (CT)"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--set", "sed=1"], "--set sed=1: unknown setting 'sed' (did you mean 'seed'?); closest settings: "),
    ],
)
def test_bad_option(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(pairs, "segment", never)
    before = tree(folder)
    outcome = run("data", "-o", "out", "--protocol", "all-pairs", "--quiet", "--no-plots", *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}"), outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["time", "--shape", "24x24"], "--shape 24x24: expected three numbers of voxels of at least 8, as 256x256x240"),
        (["time", "--shape", "7x24x24"], "--shape 7x24x24: expected three numbers of voxels of at least 8"),
        (["time", "--shape", "axbxc"], "--shape axbxc: expected three numbers of voxels of at least 8"),
        (["time", "--shape", "-9x24x24"], "--shape -9x24x24: expected three numbers of voxels of at least 8"),
        (["time", "--rounds", "0"], "Invalid value for '--rounds': "),
        (["time", "data", "--labels", "vein"], "data/dataset.json: no structure 'vein'; expected a value, name or "),
        (["time", "absent"], "absent: no such folder; expected the folder of a dataset in nnU-Net raw layout"),
        (["ablation", "data", "-o", "out", "--model", "none"], "an ablation needs a model; leave out --model none"),
        (["atlases", "data", "-o", "out", "--counts", "1,x"], "--counts 1,x: expected whole numbers"),
        (["atlases", "data", "-o", "out", "--counts", "1,4"], "4 atlases and a query need 5 cases, found 4"),
        (["atlases", "data", "-o", "out", "--counts", "2", "--selected", "2"], "--selected 2: expected fewer than"),
        (["prompts", "data", "-o", "out", "--models", "sam"], "unknown model 'sam'"),
        (["engines", "data", "-o", "out", "--engines", "x"], "x: registration.engine is 'x'; expected "),
        (["data"], "Missing option '--out' / '-o'"),
        (["data", "data", "-o", "out"], "Got unexpected extra argument"),
    ],
)
def test_bad_option_of_a_subcommand(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(pairs, "segment", never)
    monkeypatch.setattr(timing, "segment", never)
    before = tree(folder)
    outcome = run(*arguments, "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}"), outcome.err
    assert outcome.out == ""
    assert tree(folder) == before


def test_time_needs_two_cases(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "segment", never)
    for case in ("case_2", "case_3", "case_4"):
        (folder / f"data/imagesTr/{case}_0000.nii.gz").unlink()
        (folder / f"data/labelsTr/{case}.nii.gz").unlink()
    content = json.loads((folder / "data/dataset.json").read_text())
    write_json(folder / "data", content | {"numTraining": 1})
    outcome = run("time", "data", "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: data: has one case; expected at least two\n"


def test_time_on_made_up_scans(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
    monkeypatch.setattr(demo, "PAIR", save_demo_pair(folder / "pair", grid))
    outcome = run("time", "--shape", "20x24x16", "--rounds", "1", *FAST)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("20 x 24 x 16 voxels (embedded scans), 3 structures, ")
    monkeypatch.setattr(timing, "segment", never)
    outcome = run("time", "--labels", "liver", "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: --labels belongs to a dataset; the embedded scans are used as they are\n"


@pytest.mark.parametrize("command", [[], ["ablation"], ["prompts"], ["engines"]])
def test_plots_without_the_extra_are_refused_at_once(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(pairs, "segment", never)
    before = tree(folder)
    outcome = run(*command, "data", "-o", "out", "--protocol", "all-pairs", "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: drawing the picture needs the extra 'report'")
    assert outcome.err.count("\n") == 1
    assert tree(folder) == before


def test_no_plots_need_no_extra(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = run("data", "-o", "out", *ONE_PAIR, *FAST, "--models", "none")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (folder / "out").iterdir()} == TABLES | {"pairs"}


@pytest.mark.parametrize("name", ["data", "data/dataset.json"])
def test_the_dataset_is_not_written_to(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pairs, "segment", never)
    before = tree(folder)
    for force in ([], ["--force"]):
        outcome = run("data", "-o", name, *ONE_PAIR, *force)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"error: {name}: " in outcome.err
        assert ("holds other files (dataset.json" if name == "data" else "is not a folder") in outcome.err
    assert tree(folder) == before


def test_another_benchmark_in_the_folder_is_refused(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["data", "-o", "out", *ONE_PAIR, *FAST, "--models", "none"]
    assert run(*arguments).code == 0
    monkeypatch.setattr(pairs, "segment", never)
    outcome = run(*arguments, "--labels", "liver", "--seed", "1")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.endswith(
        "error: out: holds a benchmark made with other structures, tolerances_mm, variants; "
        "choose another folder, or begin again with --force\n"
    )
    assert run(*arguments).code == 0


def test_what_cannot_be_compared_is_refused_at_once(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "segment", never)
    outcome = run("prompts", "data", "-o", "out", "--models", "builtin,none", *FAST)
    assert (outcome.code, outcome.err) == (2, "error: --models builtin,none: 'none' takes no prompt; leave it out\n")
    outcome = run("data", "-o", "out", "--labels", "liver", "--cldice", "node", *FAST)
    assert outcome.code == 2
    assert outcome.err == "error: --cldice node: is not among the structures of --labels liver; add it\n"
    assert not (folder / "out").exists()
