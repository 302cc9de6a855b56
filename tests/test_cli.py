"""The command line from outside: files in, files and exit codes out."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from atlassegfm import __version__
from atlassegfm.core import files
from atlassegfm.core import image as image_module
from atlassegfm.core.config import known_fields
from atlassegfm.core.errors import InputError, RegistrationError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_labels, load_volume, save_volume
from atlassegfm.jobs import store, work
from atlassegfm.records import FORMATS, RESULT_NAMES, Provenance
from atlassegfm.settings import Settings
from conftest import Run
from scenes import ATLAS, PAPER_GATE, QUERY, STRUCTURES, UNREGISTERED, straight_grid

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an atlas, its labels and a query."""
    save_volume(ATLAS.scan(GRID), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    lps = Grid(GRID.shape, np.diag([-1.0, -1, 1, 1]) @ GRID.affine)
    save_volume(QUERY.scan(lps), tmp_path / "query.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: What a folder of results has after one query.
CASE = {"segmentation.nii.gz", "colors.ctbl", "labels.txt", "run.json", "status.json"}
SUMMARY = {"cohort.json", "cohort.csv"}
RESULT = {*SUMMARY, "query", *(f"query/{name}" for name in CASE)}
ATLAS_ARGUMENTS = ("--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# What comes out


def test_segment_writes_one_folder_per_query(folder: Path, run: Run) -> None:
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "deep/out", *FAST)
    assert outcome.code == 0, outcome.err
    assert tree(folder / "deep" / "out") == RESULT
    result = load_volume(folder / "deep/out/query/segmentation.nii.gz")
    query = load_volume(folder / "query.nii.gz")
    assert result.data.dtype == np.uint8
    np.testing.assert_array_equal(result.grid.affine, query.grid.affine)
    assert result.source is not None
    assert {value: entry.name for value, entry in result.source.label_table.items()} == {
        structure.value: structure.name for structure in STRUCTURES
    }
    assert "query.nii.gz -> deep/out/query" in outcome.out
    for structure in STRUCTURES:
        assert structure.name in outcome.out
    assert "query registration" in outcome.err


def test_run_json_tells_what_was_done(folder: Path, run: Run) -> None:
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--seed", "3", "--prompt", "click")
    assert outcome.code == 0, outcome.err
    text = (folder / "out/query/run.json").read_text()
    content = json.loads(text)
    assert content["versions"].keys() == {"atlassegfm", "python", "numpy", "scipy", "torch"}
    assert content["versions"]["atlassegfm"] == __version__
    assert content["seed"] == content["settings"]["seed"] == 3
    assert content["settings"]["registration"]["rigid"] is False
    assert content["device"] in ("cpu", "cuda")
    assert content["model"]["name"] == "builtin"
    assert content["model"]["prompt"] == "click"
    assert content["model"]["code_licence"] == "Apache-2.0"
    # Another number each time: these stand in status.json.
    assert not content.keys() & {"seconds", "total_seconds", "peak_memory_mb"}
    assert content["registration"].keys() >= {"confidence", "folding", "jacobian"}
    assert content["registration"]["jacobian"] is None  # nothing is deformed
    assert [one["name"] for one in content["structures"]] == ["liver", "kidney", "node"]
    assert content["structures"][0]["prompt"]["kind"] == "click"
    assert content["inputs"]["query"] == {"file": "query.nii.gz", "notes": []}
    assert str(folder) not in text


def test_status_json_tells_how_it_went(folder: Path, run: Run) -> None:
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--json")
    assert outcome.code == 0, outcome.err
    text = (folder / "out/query/status.json").read_text()
    content = json.loads(text)
    assert (content["state"], content["reason"], content["attempts"]) == ("done", "", 1)
    assert content["seconds"].keys() == {"registration", "warping", "model", "gate", "fusion", "quality"}
    assert content["total_seconds"] == pytest.approx(sum(content["seconds"].values()), abs=0.01)
    assert content["registration_seconds"].keys() >= {"prepare"}
    assert content["peak_memory_mb"] > 50
    assert content["provenance"].keys() == Provenance.model_fields.keys()
    assert str(folder) not in text
    assert outcome.json["results"][0] == {
        "query": "query.nii.gz",
        "output": "out/query",
        **json.loads((folder / "out/query/run.json").read_text()),
        **content,
    }


def test_the_same_bytes_twice(folder: Path, run: Run) -> None:
    for out in ("one", "two"):
        assert run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", out, *FAST, "--keep").code == 0
    one, other = (
        {file.relative_to(folder / out): file.read_bytes() for file in (folder / out).rglob("*") if file.is_file()}
        for out in ("one", "two")
    )
    assert len(one) >= 7
    assert one.keys() == other.keys()
    assert sorted(str(name) for name in one if one[name] != other[name]) == [
        "cohort.csv",
        "cohort.json",
        "query/status.json",
    ]


def test_header_geometry_is_that_of_the_query(folder: Path, run: Run) -> None:
    header = nib.load(folder / "query.nii.gz").header
    assert run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST).code == 0
    written = nib.load(folder / "out/query/segmentation.nii.gz").header
    for name in ("pixdim", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "qoffset_x", "quatern_b"):
        np.testing.assert_array_equal(written[name], header[name])


def test_keep_writes_the_steps_between(folder: Path, run: Run) -> None:
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--keep")
    assert outcome.code == 0, outcome.err
    kept = folder / "out" / "query"
    assert {path.name for path in kept.iterdir()} == {
        *CASE,
        *("atlas.nii.gz", "model.nii.gz", "probability.nii.gz", "transform"),
    }
    others = {"report.html", "overview.png", "members", "edits.jsonl", "automatic.nii.gz", "versions"} | set(
        FORMATS.values()
    ) - {"segmentation.nii.gz"}
    assert {path.name for path in kept.iterdir()} == RESULT_NAMES - others
    result = load_labels(kept / "segmentation.nii.gz")
    for name in ("atlas.nii.gz", "model.nii.gz"):
        np.testing.assert_array_equal(load_labels(kept / name).grid.affine, result.grid.affine)
    probability = nib.load(kept / "probability.nii.gz")
    assert json.loads((kept / "run.json").read_text())["probability"] == ["liver", "kidney", "node"]
    values = np.asarray(probability.dataobj)
    assert values.shape == (*result.grid.shape, 3)
    assert values.max() == pytest.approx(1)
    assert values[..., 1][result.data == 7].min() >= 0.5 - 1 / 255
    np.testing.assert_allclose(probability.affine, result.grid.affine)


def test_json_is_all_there_is_on_standard_output(folder: Path, run: Run) -> None:
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "absent.nii.gz", "-o", "out", *FAST, "--json")
    assert outcome.code == 1
    content = outcome.json
    assert content["results"][0]["query"] == "query.nii.gz"
    assert content["results"][0]["output"] == "out/query"
    assert content["failures"] == [{"query": "absent.nii.gz", "reason": "absent.nii.gz: no such file; check the path"}]


def test_quiet_shows_no_progress(folder: Path, run: Run) -> None:
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert "liver" in outcome.out


def test_folder_of_queries(folder: Path, run: Run) -> None:
    scans = folder / "scans"
    (scans / "nested.nii.gz").mkdir(parents=True)
    save_volume(QUERY.scan(GRID), scans / "b.nrrd")
    save_volume(QUERY.scan(GRID), scans / "a.mha")
    save_volume(QUERY.scan(GRID), scans / ".hidden.nii.gz")
    (scans / "notes.txt").write_text("not a scan")
    outcome = run("segment", *ATLAS_ARGUMENTS, "scans", "query.nii.gz", "-o", "out", *FAST, "--json")
    assert outcome.code == 0, outcome.err
    assert [one["query"] for one in outcome.json["results"]] == ["a.mha", "b.nrrd", "query.nii.gz"]
    assert re.search(
        r"^\[2/3\] b done in \d+\.\d s; 2 done, 0 failed, 1 left, about \d+ s left$", outcome.err, re.MULTILINE
    )


def test_structure_out_of_view_is_named(folder: Path, run: Run) -> None:
    save_volume(QUERY.scan(GRID.crop((0, 0, 0), (24, 20, 11))), folder / "query.nii.gz")
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST)
    assert outcome.code == 0
    assert "outside (100% of it" in outcome.out
    content = json.loads((folder / "out/query/run.json").read_text())
    assert [one["status"] for one in content["structures"]] == ["present", "present", "outside"]


def test_earlier_result_is_replaced_only_by_a_new_one(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST)
    assert run(*arguments, "--keep").code == 0
    monkeypatch.setattr(store, "save_volume", _refuse)
    assert run(*arguments, "--force").code == 2
    # An earlier result would pass for one of this run: only why there is none is left.
    assert tree(folder / "out") == {*SUMMARY, "query", "query/status.json"}
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*arguments).code == 0
    assert tree(folder / "out") == RESULT


def _refuse(*_: object, **__: object) -> None:
    raise InputError("disk full")


def test_model_none(folder: Path, run: Run) -> None:
    outcome = run(
        "segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--model", "none", "--keep", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert not (folder / "out/query/model.nii.gz").exists()
    assert outcome.json["results"][0]["gate"] is None


def test_config_set_and_options_in_this_order(folder: Path, run: Run) -> None:
    (folder / "mine.toml").write_text(
        'seed = 5\nprompt = "box"\nmodel = "nothing"\n[fusion]\niterations = 7\nlearning_rate = 0.5\n'
    )
    outcome = run(
        *("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", "--config", "mine.toml", *FAST),
        *("--set", "prompt=mask", "--set", "model=none", "--model", "builtin", "--json"),
    )
    assert outcome.code == 0, outcome.err
    settings = outcome.json["results"][0]["settings"]
    assert (settings["seed"], settings["prompt"], settings["model"]) == (5, "mask", "builtin")
    assert settings["fusion"]["iterations"] == 0  # --set comes after the file
    assert settings["fusion"]["learning_rate"] == 0.5


def test_names_file(folder: Path, run: Run) -> None:
    (folder / "names.txt").write_text("1 foie\n44 rate\n")
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--names", "names.txt")
    assert outcome.code == 0
    assert "foie" in outcome.out
    assert "warning: names.txt: names values that labels.nii.gz does not have: 44 (rate)" in outcome.err


def test_the_labels_of_the_query_are_never_read(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie beside it, under every usual name; only the atlas's are opened."""
    for name in ("query_seg.nii.gz", "query_label.nii.gz"):
        save_volume(QUERY.labels(GRID), folder / name)
    opened: list[str] = []
    load = image_module.load_volume

    def recording(path: Path) -> Volume:
        opened.append(path.name)
        return load(path)

    monkeypatch.setattr(image_module, "load_volume", recording)
    assert run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST).code == 0
    assert sorted(opened) == ["atlas.nii.gz", "labels.nii.gz", "query.nii.gz"]


# Bad input


def _bytes_of(grid: Grid) -> bytearray:
    """An uncompressed NIfTI file whose sform counts."""
    image = nib.Nifti1Image(QUERY.scan(grid).data, grid.affine)
    image.set_qform(None, code=0)
    return bytearray(image.to_bytes())


def _with_data(change: Callable[[Any], Any]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        nib.save(nib.Nifti1Image(change(QUERY.scan(GRID).data.copy()), GRID.affine), folder / "bad.nii.gz")
        return ["bad.nii.gz"]

    return make


def _with_header(offset: int, *values: float) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        content = _bytes_of(GRID)
        content[offset : offset + 4 * len(values)] = struct.pack(f"<{len(values)}f", *values)
        (folder / "bad.nii").write_bytes(content)
        return ["bad.nii"]

    return make


def _first(value: float) -> Callable[[Any], Any]:
    def change(data: Any) -> Any:
        data[1, 2, 3] = value
        return data

    return change


def _truncated(folder: Path) -> list[str]:
    whole = gzip.compress(bytes(_bytes_of(GRID)))
    (folder / "bad.nii.gz").write_bytes(whole[: len(whole) // 2])
    return ["bad.nii.gz"]


def _text_file(folder: Path) -> list[str]:
    (folder / "bad.nii").write_text("no image " * 100)
    return ["bad.nii"]


def _wrong_ending(folder: Path) -> list[str]:
    (folder / "bad.txt").write_text("no image")
    return ["bad.txt"]


def _empty_folder(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return ["empty"]


BAD_QUERIES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing": (lambda _: ["absent.nii.gz"], "absent.nii.gz: no such file; check the path"),
    "not an image": (_text_file, "bad.nii: not readable as NIfTI; expected an image file"),
    "wrong ending": (_wrong_ending, "bad.txt: not a known image file; expected a file ending in .nii.gz, "),
    "empty folder": (_empty_folder, "empty: no scan here"),
    "truncated": (_truncated, "bad.nii.gz: the file is truncated or damaged; copy it again"),
    "4-D": (
        _with_data(lambda data: np.stack([data, data], axis=-1)),
        "bad.nii.gz: the image has 4 dimensions (24 x 20 x 18 x 2); expected 3: extract one volume",
    ),
    "NaN": (_with_data(lambda data: np.full(data.shape, np.nan)), "bad.nii.gz: 8640 of 8640 voxels are NaN"),
    "constant": (
        _with_data(lambda data: np.full_like(data, 7)),
        "bad.nii.gz: all voxels have the value 7; expected a scan with contrast",
    ),
    # srow_x, _y, _z begin at byte 280, pixdim[1] at byte 80 (nifti1.h).
    "singular": (_with_header(280, 4, 0, 0, 0, 4, 0, 0, 0, 0, 0, 4, 0), "bad.nii: the affine is singular"),
    "zero spacing": (
        _with_header(80, 0.0),
        "bad.nii: the header gives the spacing 0, 4, 4; expected three numbers above 0: correct pixdim",
    ),
    "negative spacing": (
        _with_header(84, -4.0),
        "bad.nii: the header gives the spacing 4, -4, 4; expected three numbers above 0: correct pixdim",
    ),
}


@pytest.mark.parametrize("name", BAD_QUERIES)
def test_bad_query(folder: Path, run: Run, name: str) -> None:
    make, message = BAD_QUERIES[name]
    queries = make(folder)
    before = tree(folder)
    outcome = run("segment", *ATLAS_ARGUMENTS, *queries, "-o", "new/out", *FAST, "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}"), outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    written = {name for name in tree(folder) - before if (folder / name).is_file()}
    assert {Path(name).name for name in written} <= {"status.json", *SUMMARY}


def _labels(change: Callable[[Any], Any], affine: Any = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        data = change(ATLAS.labels(GRID).data.astype(np.float32))
        nib.save(nib.Nifti1Image(data, GRID.affine if affine is None else affine), folder / "labels.nii.gz")

    return make


def _moved() -> Any:
    affine = GRID.affine.copy()
    affine[:3, 3] += (3, 4, 0)
    return affine


BAD_LABELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another grid": (
        _labels(lambda data: data, _moved()),
        "labels.nii.gz: not on the voxels of atlas.nii.gz: its corners lie up to 5.0 mm from the atlas' corners; "
        "resample the labels onto the atlas with nearest neighbour",
    ),
    "fractions": (_labels(_first(0.5)), "labels.nii.gz: 1 voxels are not whole numbers (the first is 0.5)"),
    "negative": (_labels(_first(-1)), "labels.nii.gz: the label map has the value -1; expected 0 for background"),
    "empty": (_labels(lambda data: 0 * data), "labels.nii.gz: the label map is empty (all voxels are 0); expected"),
    "missing": (lambda folder: (folder / "labels.nii.gz").unlink(), "labels.nii.gz: no such file; check the path"),
    "bad atlas": (
        lambda folder: (folder / "atlas.nii.gz").write_bytes(b"") and None,
        "atlas.nii.gz: the file is empty (0 bytes); copy it again",
    ),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_atlas(folder: Path, run: Run, name: str) -> None:
    make, message = BAD_LABELS[name]
    make(folder)
    before = tree(folder)
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "new/out", *FAST, "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}"), outcome.err
    assert outcome.out == ""
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "registration.afine=false"], "--set registration.afine=false: unknown setting 'registration.afine'"),
        (["--set", "registration.afine=false"], "closest settings: registration.affine, "),
        (["--set", "registration.affine=perhaps"], "registration.affine is 'perhaps'; expected true or false"),
        (["--set", "seed"], "--set seed: expected key=value, such as "),
        (["--seed", "-1"], "--seed: seed is -1; expected a whole number from 0 to 4294967295"),
        (["--seed", "x"], "Invalid value for '--seed'"),
        (["--model", "sam"], "known models: none, builtin"),
        (["--model", "built-in"], "unknown model 'built-in' (did you mean 'builtin'?)"),
        (["--format", "nifty"], "unknown format 'nifty' (did you mean 'nifti'?)"),
        (["--overlap", "lst"], "(did you mean 'last'?)"),
        (["--prompt", "masks"], "(did you mean 'mask'?)"),
        (["--set", "registraton.engine=ants"], "(did you mean 'registration.engine'?)"),
        (["--set", "registration.engine=ant"], "(did you mean 'ants'?)"),
        (["--atlas-serie", "1"], "(did you mean '--atlas-series'?)"),
        (["--prompt", "scribble"], "--prompt: prompt is 'scribble'; expected one of auto, click, box, mask"),
        (["--device", "tpu"], "expected one of auto, cpu, cuda"),
        (["--config", "absent.toml"], "absent.toml: no such file; expected a settings file in TOML"),
        (["--names", "absent.txt"], "absent.txt: no such file; expected a names file (JSON or text)"),
        (["--colour"], "No such option: --colour"),
        (["--device", "cuda"], "the device 'cuda' was asked for and PyTorch sees no CUDA GPU; use the device 'cpu'"),
    ],
)
def test_bad_option(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(work, "segment", _never)
    before = tree(folder)
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "new/out", "--quiet", *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert tree(folder) == before


def _never(*_: object, **__: object) -> None:
    raise AssertionError("nothing may be computed")


def test_missing_arguments(run: Run) -> None:
    outcome = run("segment", "query.nii.gz", "--atlas", "atlas.nii.gz")
    assert outcome.code == 2
    assert outcome.err.startswith("error: Missing option '--out'")
    outcome = run("segment", "query.nii.gz", "-o", "out")
    assert outcome.code == 2
    assert outcome.err.startswith("error: Missing option '--atlas'")
    assert run("nothing").code == 2


def _out_is_a_file(folder: Path) -> tuple[list[str], str]:
    (folder / "out").write_text("in the way")
    return ["query.nii.gz", "-o", "out"], "out: a file is in the way where a folder is expected"


def _out_below_a_file(folder: Path) -> tuple[list[str], str]:
    (folder / "file").write_text("in the way")
    return ["query.nii.gz", "-o", "file/out"], "file/out: a file is in the way where a folder is expected"


def _result_is_a_file(folder: Path) -> tuple[list[str], str]:
    (folder / "query").write_text("in the way")
    return ["query.nii.gz", "-o", "."], "query: exists and is not a folder, but the result is to go there"


def _result_folder_of_someone_else(folder: Path) -> tuple[list[str], str]:
    (folder / "query").mkdir()
    (folder / "query" / "thesis.docx").write_text("years of work")
    return [
        "query.nii.gz",
        "-o",
        ".",
    ], "query: the result is to go there, but the folder holds other files (thesis.docx)"


def _query_in_its_result_folder(folder: Path) -> tuple[list[str], str]:
    (folder / "out" / "segmentation").mkdir(parents=True)
    os.replace(folder / "query.nii.gz", folder / "out/segmentation/segmentation.nii.gz")
    query = "out/segmentation/segmentation.nii.gz"
    return [query, "-o", "out"], f"{query}: would be overwritten, as the result of {query} goes to out/segmentation"


def _query_is_another_result(folder: Path) -> tuple[list[str], str]:
    (folder / "out" / "query").mkdir(parents=True)
    save_volume(QUERY.scan(GRID), folder / "out/query/atlas.nii.gz")
    return (
        ["query.nii.gz", "out/query/atlas.nii.gz", "-o", "out"],
        "out/query/atlas.nii.gz: would be overwritten, as the result of query.nii.gz goes to out/query",
    )


def _query_is_the_folder(folder: Path) -> tuple[list[str], str]:
    return ["query.nii.gz", "-o", "query.nii.gz"], "query.nii.gz: is the query and would be overwritten"


def _no_stem(folder: Path) -> tuple[list[str], str]:
    save_volume(QUERY.scan(GRID), folder / ".nii.gz")
    return [".nii.gz", "-o", "out"], ".nii.gz: the file has no name before its ending; rename it"


@pytest.mark.parametrize(
    "make",
    [
        *(_out_is_a_file, _out_below_a_file, _result_is_a_file, _result_folder_of_someone_else, _no_stem),
        *(_query_in_its_result_folder, _query_is_another_result, _query_is_the_folder),
    ],
)
def test_bad_output(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], tuple[list[str], str]]
) -> None:
    monkeypatch.setattr(work, "segment", _never)
    arguments, message = make(folder)
    before = tree(folder)
    outcome = run("segment", *ATLAS_ARGUMENTS, *arguments, *FAST, "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}"), outcome.err
    assert tree(folder) == before


def test_folder_without_permission(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(work, "segment", _never)
    before = tree(folder)
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", "--quiet")
    assert outcome.code == 2
    assert outcome.err == "error: out: cannot write there (Permission denied); choose another place\n"
    assert tree(folder) == before


# Failures on the way


def test_what_is_not_judged_and_what_is_cut_is_told(folder: Path, run: Run, calibrated: None) -> None:
    scan = load_volume(folder / "query.nii.gz").canonical()
    part = scan.grid.shape[0] // 2 + 4
    save_volume(Volume(scan.data[:part], Grid((part, *scan.grid.shape[1:]), scan.grid.affine)), folder / "part.nii.gz")
    for names in (["part.nii.gz"], ["part.nii.gz", "query.nii.gz"]):
        outcome = run("segment", *ATLAS_ARGUMENTS, *names, "-o", "out", *FAST)
        assert outcome.code == 0, outcome.err
        structures = json.loads((folder / "out/part/run.json").read_text())["structures"]
        cut = [one for one in structures if 0.05 <= one["outside_fraction"] < 0.9]
        assert cut
        for one in cut:
            (line,) = (line for line in outcome.out.splitlines() if one["name"] in line)
            assert f"{100 * one['outside_fraction']:.0f} % of it" in line or "cut" in line
            assert f"{100 * one['outside_fraction']:.0f} % of it" in one["quality"]["reason"]


def test_a_result_that_is_not_judged_says_so_once(folder: Path, run: Run) -> None:
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("not judged") == 1
    assert json.loads((folder / "out/query/run.json").read_text())["verdict"] is None


def test_one_bad_query_of_several(folder: Path, run: Run) -> None:
    _truncated(folder)
    outcome = run("segment", *ATLAS_ARGUMENTS, "bad.nii.gz", "query.nii.gz", "absent.nii", "-o", "out", *FAST)
    assert outcome.code == 1
    assert "error: bad.nii.gz: the file is truncated or damaged; copy it again\n" in outcome.err
    assert "error: absent.nii: no such file; check the path\n" in outcome.err
    assert outcome.err.endswith("error: 2 of 3 queries failed: bad.nii.gz, absent.nii\n")
    failed = {"bad", "bad/status.json", "absent", "absent/status.json"}
    assert tree(folder / "out") == RESULT | failed
    status = json.loads((folder / "out/bad/status.json").read_text())
    assert (status["state"], status["reason"]) == (
        "failed",
        "bad.nii.gz: the file is truncated or damaged; copy it again",
    )


def test_all_of_several_bad(folder: Path, run: Run) -> None:
    assert run("segment", *ATLAS_ARGUMENTS, "one.nii", "two.nii", "-o", "out", *FAST).code == 2
    assert tree(folder / "out") == {"one", "one/status.json", "two", "two/status.json", *SUMMARY}


def _failing_once(error: BaseException) -> Callable[..., Any]:
    real, calls = work.segment, []

    def segment(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(*arguments, **keywords)

    return segment


def test_registration_that_fails(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "segment", _failing_once(RegistrationError("nothing in common")))
    before = tree(folder)
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", "--quiet", *FAST)
    assert (outcome.code, outcome.err) == (1, "error: query.nii.gz: nothing in common\n")
    assert tree(folder) - before == {"out", *(f"out/{name}" for name in SUMMARY), "out/query", "out/query/status.json"}


def test_defect_does_not_cost_the_other_results(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_volume(QUERY.scan(GRID), folder / "second.nii.gz")
    monkeypatch.setattr(work, "segment", _failing_once(ZeroDivisionError("oops")))
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "second.nii.gz", "-o", "out", *FAST)
    assert outcome.code == 1
    assert "error: query.nii.gz: unexpected error" in outcome.err
    assert "ZeroDivisionError" in outcome.err
    assert tree(folder / "out" / "second") == CASE
    assert tree(folder / "out" / "query") == {"status.json"}


def test_interrupt_leaves_nothing(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    for place in ((work, "segment"), (store, "save_volume")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, _interrupt)
            outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", "--quiet", *FAST)
        assert (outcome.code, outcome.err) == (130, "interrupted\n")
        assert tree(folder) == before


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_termination_leaves_nothing(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "segment", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = tree(folder)
    assert run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", "--quiet", *FAST).code == 143
    assert tree(folder) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_logging_is_put_back(folder: Path, run: Run) -> None:
    before = list(logging.getLogger("atlassegfm").handlers)
    run("settings")
    assert logging.getLogger("atlassegfm").handlers == before


# The other commands


def test_settings_are_printed_and_read_back(folder: Path, run: Run) -> None:
    outcome = run("settings", "--set", "seed=4")
    assert outcome.code == 0
    assert "seed = 4" in outcome.out
    (folder / "all.toml").write_text(outcome.out)
    assert run("settings", "--config", "all.toml").out == outcome.out
    for key in known_fields(Settings):
        *section, name = key.split(".")
        header = f"[{'.'.join(section)}]\n"
        assert header in outcome.out or not section
        text = outcome.out.partition(header)[2] if section else outcome.out
        assert re.search(rf"^(# )?{name} =", re.split(r"^\[", text, flags=re.MULTILINE)[0], re.MULTILINE), key


def test_models_are_listed(run: Run) -> None:
    outcome = run("models")
    assert "builtin" in outcome.out
    rows = run("models", "--json").json
    assert rows[0]["name"] == "builtin"
    assert rows[0]["prompts"][0] == "mask"
    assert rows[-1]["name"] == "none"


def test_version(run: Run) -> None:
    assert run("--version").out == f"atlassegfm {__version__}\n"


def test_check_reports(folder: Path, run: Run) -> None:
    outcome = run("check", "atlas.nii.gz", "labels.nii.gz")
    assert outcome.code == 0
    assert "atlas.nii.gz" in outcome.out
    assert run("check", "atlas.nii.gz", "--strict").code == 0
    assert run("check", "labels.nii.gz", "--strict").code == 1  # a structure of few voxels
    assert run("check", "atlas.nii.gz", "--json").json["files"][0]["name"] == "atlas.nii.gz"
    _truncated(folder)
    outcome = run("check", "atlas.nii.gz", "bad.nii.gz", "--strict", "--json")
    assert outcome.code == 2
    assert outcome.json["worst"] == "error"
    assert len(run("check", ".", "--json").json["files"]) == 4


@pytest.mark.usefixtures("quick_fits")
def test_check_against_an_atlas(folder: Path, run: Run) -> None:
    annotated = ("--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz")
    outcome = run("check", "query.nii.gz", *annotated, "--json")
    assert outcome.code == 0, outcome.err
    (report,) = outcome.json["files"]
    assert report["atlas"]["inside_percent"].keys() == {one.name for one in STRUCTURES}
    scan = load_volume(folder / "query.nii.gz").canonical()
    save_volume(Volume(np.ascontiguousarray(scan.data[::-1]), scan.grid), folder / "query.nii.gz")
    swapped = run("check", "query.nii.gz", *annotated)
    # Suspicion is no refusal.
    assert swapped.code == 0, swapped.err
    assert "warning query.nii.gz: the mirror image fits the atlas better by" in " ".join(swapped.out.split())
    strict = run("check", "query.nii.gz", *annotated, "--strict")
    assert strict.code == 1
    assert strict.out == swapped.out
    assert "Missing option '--labels'" in run("check", "query.nii.gz", "--atlas", "atlas.nii.gz").err
    refused = run("check", "query.nii.gz", *annotated, "--context", "context")
    assert refused.code == 2
    assert "--atlas and --context do not go together" in refused.err
    assert "no such folder; expected a context" in run("check", "query.nii.gz", "--context", "gone").err


@pytest.mark.usefixtures("quick_fits")
def test_check_against_a_context(folder: Path, run: Run) -> None:
    made = run("customize", "--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz", "-o", "ctx", "--model", "none")
    assert made.code == 0, made.err
    (report,) = run("check", "query.nii.gz", "--context", "ctx", "--json").json["files"]
    assert report["atlas"]["mirrored_gain"] < 0


# Starting up


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from atlassegfm.cli.app import main; sys.argv = ['atlassegfm', 'segment', '--help']\n"
        "try: main()\n"
        "except SystemExit as ended: print('loaded', *sys.modules)\n"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    assert "--atlas" in result.stdout
    loaded = result.stdout[result.stdout.index("loaded ") :].split()
    assert not {"torch", "nibabel", "skimage", "SimpleITK", "scipy", "numpy", "matplotlib"} & set(loaded)
    assert min(seconds) < 0.7


def test_module_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "atlassegfm", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == f"atlassegfm {__version__}\n"


def test_public_names_are_there() -> None:
    import atlassegfm

    for name in atlassegfm.__all__:
        assert getattr(atlassegfm, name) is not None
        assert name in dir(atlassegfm)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = atlassegfm.nothing


def test_log_file(folder: Path, run: Run) -> None:
    for _ in range(2):
        outcome = run(
            "segment", *ATLAS_ARGUMENTS, "query.nii.gz", "absent.nii.gz", "-o", "out", *FAST, "-q", "--log", "run.log"
        )
        assert outcome.code == 1
    lines = (folder / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line) for line in lines)
    assert sum("absent.nii.gz: no such file" in line for line in lines) == 2
    assert any("query" in line and "done" in line for line in lines)
    refused = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--log", "no/run.log")
    assert refused.code == 2
    assert "no/run.log" in refused.err
