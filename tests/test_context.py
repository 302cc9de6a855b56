"""The context folder: what is in it, what is refused, and that it gives what the atlas itself gives."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from atlassegfm import context as customization
from atlassegfm.atlas import Atlas
from atlassegfm.context import FORMAT, ONE_ATLAS_NAMES, Context, SavedContext, customize
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError, ModelError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_labels, save_volume
from atlassegfm.core.version import __version__
from atlassegfm.fusion.gate import Gate
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from conftest import ORIENTATIONS, Run
from scenes import ATLAS, QUERY, QUICK_GATE, STRUCTURES, UNREGISTERED, straight_grid

GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, *QUICK_GATE) for part in ("--set", assignment)]
ATLAS_ARGUMENTS = ("--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz")
SETTINGS = with_overrides(Settings(), [*UNREGISTERED, *QUICK_GATE])


@pytest.fixture(scope="module")
def made() -> Context:
    return customize(Context(Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES), SETTINGS))


@pytest.fixture(scope="module")
def template(made: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "ctx"
    made.save(folder)
    return folder


@pytest.fixture
def ctx(template: Path, tmp_path: Path) -> Path:
    """A context that may be damaged."""
    return Path(shutil.copytree(template, tmp_path / "ctx"))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an atlas, its labels and a query."""
    save_volume(ATLAS.scan(GRID), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    save_volume(QUERY.scan(GRID), tmp_path / "query.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def seal(folder: Path) -> None:
    """Write checksums that fit the files."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


# What is in it


def test_contents(ctx: Path, made: Context) -> None:
    assert {path.name for path in ctx.iterdir()} == ONE_ATLAS_NAMES
    content = tomllib.loads((ctx / "context.toml").read_text())
    assert content["format"] == FORMAT
    assert content["atlassegfm"] == __version__
    assert content["model"] == {"name": "builtin", "prompt": "mask", "weights_sha256": ""}
    assert [one["name"] for one in content["structures"]] == ["liver", "kidney", "node"]
    assert content["gate"]["samples"] == 12
    for line in (ctx / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((ctx / name).read_bytes()).hexdigest()
    # Other programs can read it.
    np.testing.assert_array_equal(nib.load(ctx / "atlas.nii.gz").get_fdata(), made.atlas.image.data)
    labels = load_labels(ctx / "labels.nii.gz")
    assert labels.source is not None
    assert {value: entry.name for value, entry in labels.source.label_table.items()} == {
        one.value: one.name for one in STRUCTURES
    }
    tomllib.loads((ctx / "settings.toml").read_text())


def test_comes_back_as_it_was(ctx: Path, made: Context) -> None:
    loaded = Context.load(ctx)
    assert loaded.gate == made.gate
    assert loaded.settings == made.settings
    assert loaded.prompt == "mask"
    assert loaded.atlas.structures == made.atlas.structures == STRUCTURES
    for one, other in ((loaded.atlas.image, made.atlas.image), (loaded.atlas.labels, made.atlas.labels)):
        assert one.data.dtype == other.data.dtype
        assert one.data.flags.c_contiguous
        np.testing.assert_array_equal(one.data, other.data)
        np.testing.assert_array_equal(one.grid.affine, other.grid.affine)


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_geometry_comes_back_to_the_last_bit(tmp_path: Path, affine: np.ndarray) -> None:
    """Though the header of a NIfTI file has 32 bits."""
    turned = affine.copy()
    turned[:3, 3] += (1 / 3, -217.123456, 1 / 7)
    labels = np.zeros((7, 8, 9), np.uint32)
    labels[2:4, 3:6, 2:5] = 70_000
    scan = np.random.default_rng(0).normal(size=labels.shape).astype(np.float32)
    grid = Grid(labels.shape, turned)
    atlas = Atlas.from_volumes(Volume(scan, grid), Volume(labels, grid))
    made = customize(Context(atlas, with_overrides(Settings(), ["model=none"])))
    made.save(tmp_path / "ctx")
    loaded = Context.load(tmp_path / "ctx")
    assert loaded.gate is None
    assert loaded.prompt is None
    np.testing.assert_array_equal(loaded.atlas.image.grid.affine, atlas.image.grid.affine)
    np.testing.assert_array_equal(loaded.atlas.image.data, atlas.image.data)
    np.testing.assert_array_equal(loaded.atlas.labels.data, atlas.labels.data)
    assert loaded.atlas.labels.data.dtype == np.uint32


def test_an_untrained_gate_comes_back(made: Context, tmp_path: Path) -> None:
    """Its Dice is NaN, which TOML has and JSON has not."""
    replace(made, gate=Gate.constant(0.25)).save(tmp_path / "ctx")
    gate = Context.load(tmp_path / "ctx").gate
    assert gate is not None
    assert gate.start == 0.25
    assert math.isnan(gate.dice_before)


def test_the_place_of_the_weights_stays_here(made: Context, tmp_path: Path) -> None:
    settings = replace(made.settings, model_path="/home/somebody/weights")
    replace(made, settings=settings).save(tmp_path / "ctx")
    assert "somebody" not in (tmp_path / "ctx/settings.toml").read_text()


def test_twice_the_same_files(ctx: Path, made: Context, tmp_path: Path) -> None:
    again = customize(Context(made.atlas, made.settings, files=made.files))
    saved = again.save(tmp_path / "again")
    assert content_of(tmp_path / "again") == content_of(ctx)
    Context.load(ctx).save(tmp_path / "copied")
    assert content_of(tmp_path / "copied") == content_of(ctx)
    loaded = Context.load(ctx)
    assert loaded.saved is not None
    assert loaded.saved.sha256 == saved.sha256 == hashlib.sha256((ctx / "SHA256SUMS").read_bytes()).hexdigest()


def test_replaces_a_context_and_nothing_else(made: Context, ctx: Path) -> None:
    (ctx / "atlas.nii.gz").write_bytes(b"old")
    made.save(ctx)
    Context.load(ctx)
    (ctx / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"the folder holds other files \(notes\.txt\)"):
        made.save(ctx)
    assert (ctx / "notes.txt").read_text() == "mine"


def test_nothing_is_left_of_a_context_that_fails(
    made: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(customization, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        made.save(tmp_path / "ctx")
    assert list(tmp_path.iterdir()) == []


# What it does


def test_same_result_as_from_the_atlas(ctx: Path, made: Context) -> None:
    query = QUERY.scan(GRID)
    straight = segment(Context(made.atlas, SETTINGS), query)
    loaded = Context.load(ctx)
    result = segment(loaded, query)
    np.testing.assert_array_equal(result.labels.data, straight.labels.data)
    for value in made.atlas.values:
        np.testing.assert_array_equal(
            result.probabilities[value].fused.values, straight.probabilities[value].fused.values
        )
    assert result.gate == straight.gate
    assert "gate" in straight.seconds
    assert set(result.seconds) == {"registration", "warping", "model", "fusion", "quality"}


# What is refused


def damage(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def of_format(number: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "context.toml").read_text().replace(f"format = {FORMAT}\n", f"format = {number}\n")
        (folder / "context.toml").write_text(text.replace(f'"{__version__}"', '"9.8.7"'))
        seal(folder)

    return change


def sealed(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        seal(folder)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (damage(name), rf"ctx/{name}: damaged or changed, its SHA-256 is \w+\.\.\., expected \w+\.\.\.; copy")
            for name in ("atlas.nii.gz", "labels.nii.gz", "settings.toml")
        ),
        (write("context.toml", "format = "), r"ctx/context\.toml: damaged or changed"),
        (write("SHA256SUMS", "nonsense"), r"ctx/SHA256SUMS: damaged; copy the whole folder again, or make it again"),
        (write("SHA256SUMS", ""), r"ctx/SHA256SUMS: damaged"),
        (write("SHA256SUMS", "0123  ../x\n"), r"ctx/SHA256SUMS: damaged, it names '\.\./x'"),
        *(
            (remove(name), f"ctx/{name}: missing from the context; copy the whole folder again, or make it again")
            for name in sorted(ONE_ATLAS_NAMES)
        ),
        (
            of_format(99),
            r"ctx: a context in the format 99 of version 9\.8\.7, but this version \([\d.]+\) reads the format "
            rf"{FORMAT}",
        ),
        (
            sealed("settings.toml", "\nmodel_path =", "\nmodel_place ="),
            r"unknown setting 'model_place'.*\(.*ctx was made by version [\d.]+: make it again with",
        ),
        (sealed("context.toml", "[grid]", "[lattice]"), r"context\.toml: damaged"),
        (sealed("context.toml", "shape = [", "shape = [3,"), r"context\.toml: damaged"),
    ],
)
def test_contexts_that_cannot_be_used(ctx: Path, change: Callable[[Path], None], message: str) -> None:
    change(ctx)
    with pytest.raises(InputError, match=message):
        Context.load(ctx)


def test_no_context(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="ctx: no such folder; expected a context folder, as atlassegfm customize writes"
    ):
        Context.load(tmp_path / "ctx")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file; expected a context folder"):
        Context.load(tmp_path / "file")
    with pytest.raises(InputError, match=r"has no context\.toml; expected a context folder"):
        Context.load(tmp_path)
    (tmp_path / "context.toml").write_text("x = 1\n")
    with pytest.raises(InputError, match="SHA256SUMS: missing from the context"):
        Context.load(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model=nninteractive",
            "ctx: made with model = builtin, but nninteractive was asked for; leave it as it is",
        ),
        (
            "prompt=click",
            "ctx: made with prompt = mask, but click was asked for; leave it as it is, or make a context",
        ),
        ("fusion.learning_rate=0.1", r"ctx: made with fusion\.learning_rate = 1e-05, but 0\.1 was asked for"),
        ("fusion.simulation.sigma=0.3", r"ctx: made with fusion\.simulation\.sigma = 0\.5, but 0\.3 was asked for"),
    ],
)
def test_settings_of_another_gate(ctx: Path, override: str, message: str) -> None:
    loaded = Context.load(ctx)
    with pytest.raises(InputError, match=message):
        segment(loaded, QUERY.scan(GRID), with_overrides(loaded.settings, [override]))


@pytest.mark.parametrize(
    "override", ["prompt=mask", "registration.rigid=true", "seed=3", "model=none", "models.medsam2.margin_mm=3"]
)
def test_settings_of_the_same_gate(ctx: Path, override: str) -> None:
    loaded = Context.load(ctx)
    loaded.check_settings(with_overrides(loaded.settings, [override]))


def test_settings_of_the_model(made: Context) -> None:
    medsam2 = replace(made, settings=with_overrides(made.settings, ["model=medsam2"]))
    medsam2.check_settings(with_overrides(medsam2.settings, ["models.medsam2.feature_cache_mb=7"]))
    with pytest.raises(InputError, match=r"the context: made with models\.medsam2\.margin_mm = 15\.0, but 3\.0 was"):
        medsam2.check_settings(with_overrides(medsam2.settings, ["models.medsam2.margin_mm=3"]))
    without = replace(made, settings=with_overrides(made.settings, ["model=none"]), gate=None)
    without.check_settings(made.settings)  # there is no gate that could not fit
    saved = replace(without, saved=SavedContext(Path("ctx"), ""))
    with pytest.raises(InputError, match="ctx: made with model = none, but builtin was asked for"):
        saved.check_settings(made.settings)


def test_other_weights(made: Context) -> None:
    class Weighed:
        def __init__(self, sha256: str) -> None:
            self.provenance = {"weights": {"file": "x.pt", "sha256": sha256}}

    one = replace(made, weights_sha256="a" * 64)
    one.check_model(Weighed("a" * 64))  # type: ignore[arg-type]
    one.check_model(None)
    with pytest.raises(ModelError, match=r"other weights of the model 'builtin' \(SHA-256 a{12}\.\.\., found b{12}"):
        one.check_model(Weighed("b" * 64))  # type: ignore[arg-type]


# The command line


def test_customize_and_segment(files: Path, run: Run) -> None:
    outcome = run("customize", *ATLAS_ARGUMENTS, "-o", "deep/ctx", *FAST)
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (files / "deep/ctx").iterdir()} == ONE_ATLAS_NAMES
    assert [path.name for path in (files / "deep").iterdir()] == ["ctx"]
    assert "atlas.nii.gz -> deep/ctx" in outcome.out
    assert "liver, kidney, node" in outcome.out
    assert "trained on 12 simulated masks" in outcome.out
    assert run("segment", "--context", "deep/ctx", "query.nii.gz", "-o", "one").code == 0
    assert run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "two", *FAST).code == 0
    assert run("segment", "--context", "deep/ctx", "query.nii.gz", "-o", "three").code == 0
    one, two, three = ((files / out / "query/segmentation.nii.gz").read_bytes() for out in ("one", "two", "three"))
    assert one == two == three
    reported = json.loads((files / "one/query/run.json").read_text())
    assert reported["inputs"]["context"] == {
        "folder": "ctx",
        "sha256": hashlib.sha256((files / "deep/ctx/SHA256SUMS").read_bytes()).hexdigest(),
        "atlassegfm": __version__,
        "files": {"atlas": "atlas.nii.gz", "labels": "labels.nii.gz"},
    }
    spent = json.loads((files / "one/query/status.json").read_text())["seconds"]
    assert spent.keys() == {"registration", "warping", "model", "fusion", "quality"}
    assert reported["settings"]["registration"]["rigid"] is False
    assert json.loads((files / "two/query/run.json").read_text())["inputs"]["context"] is None
    text = "".join(path.read_text(errors="ignore") for path in (files / "deep/ctx").glob("*.toml"))
    assert str(files) not in text


def test_customize_as_json(files: Path, run: Run) -> None:
    outcome = run("customize", *ATLAS_ARGUMENTS, "-o", "ctx", *FAST, "--json", "--prompt", "box")
    assert outcome.code == 0, outcome.err
    reported = outcome.json
    assert reported.keys() == {
        *("context", "sha256", "model", "prompt", "gate", "structures", "atlases", "expected", "device"),
        "total_seconds",
    }
    assert reported["atlases"] == 1
    assert reported["expected"] == []
    assert reported["context"] == "ctx"
    assert reported["prompt"] == "box"
    assert reported["structures"][1] == {"value": 7, "name": "kidney"}
    assert reported["sha256"] == hashlib.sha256((files / "ctx/SHA256SUMS").read_bytes()).hexdigest()


def test_several_queries_share_one_gate(files: Path, run: Run) -> None:
    shutil.copy(files / "query.nii.gz", files / "again.nii.gz")
    assert run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "again.nii.gz", "-o", "out", *FAST).code == 0
    one, other = (json.loads((files / "out" / name / "run.json").read_text()) for name in ("query", "again"))
    assert one["gate"] == other["gate"]
    spent = [json.loads((files / "out" / name / "status.json").read_text())["seconds"] for name in ("query", "again")]
    assert sum("gate" in seconds for seconds in spent) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "ctx", "--atlas", "atlas.nii.gz"), "error: --atlas and --context do not go together"),
        (("--context", "ctx", "--labels", "labels.nii.gz"), "error: --labels and --context do not go together"),
        (("--context", "ctx", "--names", "names.json"), "error: --names and --context do not go together"),
        ((), "error: Missing option '--atlas'; give --atlas and --labels, or --context"),
        (("--atlas", "atlas.nii.gz"), "error: Missing option '--labels'; give --atlas and --labels, or --context"),
        (("--context", "absent"), "error: absent: no such folder; expected a context"),
        (
            ("--context", "ctx", "--prompt", "click"),
            "error: ctx: made with prompt = mask, but click was asked for",
        ),
        (
            ("--context", "ctx", "--set", "fusion.start=1"),
            "error: ctx: made with fusion.start = best, but 1.0 was asked",
        ),
    ],
)
def test_usage_errors(files: Path, ctx: Path, run: Run, arguments: tuple[str, ...], message: str) -> None:
    outcome = run("segment", *arguments, "query.nii.gz", "-o", "out", "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1
    assert not (files / "out").exists()


def test_results_do_not_go_into_the_context(files: Path, ctx: Path, run: Run) -> None:
    before = content_of(ctx)
    for out in ("ctx", "ctx/results"):
        outcome = run("segment", "--context", "ctx", "query.nii.gz", "-o", out, "--quiet")
        assert outcome.code == 2
        assert outcome.err == f"error: {out}: is inside the context ctx; choose another output folder\n"
    assert content_of(ctx) == before


def test_customize_overwrites_no_input(files: Path, run: Run) -> None:
    outcome = run("customize", *ATLAS_ARGUMENTS, "-o", ".", *FAST, "--quiet")
    assert outcome.code == 2
    assert "the folder holds other files" in outcome.err
    (files / "ctx").mkdir()
    shutil.copy(files / "atlas.nii.gz", files / "ctx/atlas.nii.gz")
    arguments = ("--atlas", "ctx/atlas.nii.gz", "--labels", "labels.nii.gz")
    outcome = run("customize", *arguments, "-o", "ctx", *FAST, "--quiet")
    assert outcome.code == 2
    assert outcome.err == (
        "error: ctx/atlas.nii.gz: would be overwritten, as the context goes to ctx; choose another folder\n"
    )
