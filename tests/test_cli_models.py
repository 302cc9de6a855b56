"""The commands ``models ...``, and models with weights in ``segment`` and ``benchmark``, by made-up models."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import atlassegfm
from atlassegfm.benchmark import pairs
from atlassegfm.core.errors import InputError
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.labels import Structure
from atlassegfm.core.mask import LocalMap
from atlassegfm.demo.run import DemoOutcome
from atlassegfm.models import (
    BASELINES,
    MODELS,
    ModelDescription,
    accept_licence,
    fetch_weights,
    licence_accepted,
    load_model,
)
from atlassegfm.models.weights import ACCEPTANCE, RECORD, PublishedWeights, WeightsFile
from atlassegfm.prompts import Prompt, PromptKind, RegionPrompt
from atlassegfm.settings import Settings
from conftest import Run
from mirror import REVISION, Mirror, body, serving, weights
from scenes import ATLAS, PAPER_GATE, QUERY, STRUCTURES, UNREGISTERED, straight_grid
from test_benchmark import write_dataset

CONTENT = b"toy weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GRID = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]
ATLAS_ARGUMENTS = ("--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz")
ONE_PAIR = ["--protocol", "one-to-all", "--cases", "case_1,case_2", "--no-plots"]


class Toy:
    """A model that takes no click: the bright voxels of the scan where the prompt is."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.asked: list[type] = []

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {} if self.path is None else {"file": self.path.name}

    def encode(self, image: Volume) -> Volume:
        return image

    def predict(
        self, encoded: Volume, prompts: Mapping[int, Prompt], _on_prompt: Callable[[int], None] | None = None
    ) -> dict[int, LocalMap]:
        answers = {}
        for number, prompt in prompts.items():
            self.asked.append(type(prompt))
            assert isinstance(prompt, RegionPrompt)
            mask = prompt.probability.to_full(encoded.grid.shape) >= 0.5
            answers[number] = LocalMap.from_full(np.where(mask & (encoded.data > 10), 0.9, 0).astype(np.float32))
        return answers


@pytest.fixture
def add_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Toy]]:
    """Put a made-up row into the table: ``add_model(name, weights, prompts)``; gives the models as they are loaded."""

    def add(
        name: str = "toy", published: PublishedWeights | None = None, prompts: tuple[PromptKind, ...] = ("region",)
    ) -> list[Toy]:
        loaded: list[Toy] = []

        def load(_device: str, _settings: object, find: Callable[[], Any]) -> Toy:
            loaded.append(Toy(None if published is None else find()))
            return loaded[-1]

        module = types.ModuleType(f"atlassegfm.models.{name}")
        module.load = load  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        row = ModelDescription(name, "bright voxels", prompts, "MIT", published, "toys", {"mask": 71.5, "box": 60})
        monkeypatch.setitem(MODELS, name, row)
        return loaded

    return add


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an atlas and a query, and a home without weights."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("ATLASSEGFM_MODELS", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scans(folder: Path) -> None:
    save_volume(ATLAS.scan(GRID), folder / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), folder / "labels.nii.gz", structures=STRUCTURES)
    save_volume(QUERY.scan(GRID), folder / "query.nii.gz")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "Dataset009_Small")


@pytest.fixture
def data(shared: Path, folder: Path) -> None:
    shutil.copytree(shared, folder / "data")


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with serving() as one:
        monkeypatch.setenv("HF_ENDPOINT", one.address)
        one.publish("toy.pt", CONTENT)
        yield one


@pytest.fixture
def models(folder: Path) -> Path:
    """Where weights are looked for."""
    return folder / "home/.local/share/atlassegfm/models"


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    return path


# models list


def test_models_alone_lists_them(run: Run) -> None:
    listed = run("models", "list")
    assert (listed.code, listed.err) == (0, "")
    assert run("models").out == listed.out
    assert run("models", "--json").out == run("models", "list", "--json").out
    head, builtin = listed.out.splitlines()[:2]
    assert head.split("  ")[1:] == head.strip().split("  ")
    assert re.search(r"^  builtin +mask, box, click +- +- +-$", builtin)
    assert re.search(r"^  none +the result is the warped atlas$", listed.out, re.MULTILINE)


def test_the_list_says_what_is_there(
    run: Run, add_model: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model("toy", weights(non_commercial=True), ("box", "click"))
    row = next(one for one in run("models", "--json").json if one["name"] == "toy")
    assert row == {
        "name": "toy",
        "prompts": ["box", "click"],
        "extra": "toys",
        "extra_installed": row["extra_installed"],
        "needs_weights": True,
        "weights": None,
        "code_licence": "MIT",
        "weights_licence": "CC-BY-NC-4.0",
        "summary": "bright voxels",
    }
    listed = run("models").out
    assert re.search(r"  toy +box, click +\S+ +missing +CC-BY-NC-4.0\n", listed)
    assert re.search(r"  toy +bright voxels\n", listed)
    put(models / "toy/toy.pt")
    row = next(one for one in run("models", "--json").json if one["name"] == "toy")
    assert row["weights"] == str(models / "toy")
    assert re.search(r"  toy +box, click +\S+ +found ", run("models").out)


@pytest.mark.parametrize(
    ("requirements", "installed", "text"),
    [
        (['numpy>=1; extra == "toys"', "absent-package", 'absent; extra == "others"'], True, "installed"),
        (['numpy; extra == "toys"', "absent-package<2,>=1 ; extra == 'toys'"], False, "missing"),
        (["numpy"], None, "?"),
        (None, None, "?"),
    ],
)
def test_whether_the_extra_is_installed(
    run: Run,
    add_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    requirements: list[str] | None,
    installed: bool | None,
    text: str,
) -> None:
    def requires(name: str) -> list[str]:
        assert name == "atlassegfm"
        if requirements is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return requirements

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    add_model()
    assert run("models", "show", "toy", "--json").json["extra_installed"] is installed
    assert re.search(rf"^  toy +region +{re.escape(text)} ", run("models").out, re.MULTILINE)


def test_every_model_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs/how-to/models.md").read_text()
    for name, row in (MODELS | BASELINES).items():
        assert f"`{name}`" in page
        if row.weights is not None:
            assert row.weights.repository in page
            assert all(file.path.rpartition("/")[2] in page for file in row.weights.files)


# models show


def test_show_a_model_without_weights(run: Run) -> None:
    outcome = run("models", "show", "builtin")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"^  prompts, best first +mask, box, click$", outcome.out, re.MULTILINE)
    assert re.search(r"^  weights +none needed$", outcome.out, re.MULTILINE)
    assert run("models", "show", "builtin", "--json").json["weights"] is None


def test_show_tells_all(run: Run, add_model: Callable[..., Any], models: Path) -> None:
    files = (
        WeightsFile("toy.pt", len(CONTENT), SHA256),
        WeightsFile("plan.json"),
        WeightsFile("more.bin", 3, "0" * 64),
    )
    add_model("toy", weights(*files, non_commercial=True), ("mask", "box"))
    put(models / "toy/toy.pt")
    put(models / "toy/plan.json")
    outcome = run("models", "show", "toy")
    assert (outcome.code, outcome.err) == (0, "reading the weights\n")
    for line in (
        "prompts, best first     mask, box",
        "Dice in the paper       mask 71.5 %, box 60 %",
        "licence of the code     MIT",
        "licence of the weights  CC-BY-NC-4.0, https://example.org/licence",
        "                        no commercial use; not accepted yet",
        f"published               https://huggingface.co/somebody/weights/tree/{REVISION}",
        f"revision                {REVISION}",
        f"looked for in           {models / 'toy'}",
        "found in                none of them",
    ):
        assert f"  {line}\n" in outcome.out
    assert (
        f"\n\n  toy.pt\n    published  11 bytes, sha256 {SHA256}\n"
        f"    found      11 bytes, sha256 {SHA256}: as published\n"
        f"\n  plan.json\n    published  not known bytes, sha256 not known\n"
        f"    found      11 bytes, sha256 {SHA256}: nothing to compare with\n"
        f"\n  more.bin\n    published  3 bytes, sha256 {'0' * 64}\n"
        f"    found      missing, expected at {models / 'toy/more.bin'}\n"
    ) in outcome.out
    put(models / "toy/more.bin")
    assert "found      11 bytes, sha256 not computed: wrong size, expected 3\n" in run("models", "show", "toy").out
    (models / "toy/more.bin").write_bytes(b"abc")
    accept_licence("toy")
    outcome = run("models", "show", "toy")
    assert f": wrong sha256, expected {'0' * 64}\n" in outcome.out
    assert f"  found in                {models / 'toy'}\n" in outcome.out
    assert f"no commercial use; accepted on {licence_accepted('toy')}\n" in outcome.out


def test_show_as_json(run: Run, add_model: Callable[..., Any], mirror: Mirror, models: Path) -> None:
    add_model("toy", weights())
    fetch_weights("toy")
    outcome = run("models", "show", "toy", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json.keys() == {
        *("name", "summary", "prompts", "paper_dice", "extra", "extra_installed", "code_licence", "weights")
    }
    assert outcome.json["paper_dice"] == {"mask": 71.5, "box": 60}
    assert outcome.json["weights"] == {
        "repository": "somebody/weights",
        "page": f"{mirror.address}/somebody/weights/tree/{REVISION}",
        "revision": REVISION,
        "licence": "CC0-1.0",
        "licence_url": "https://example.org/licence",
        "package": "",
        "is_release": False,
        "non_commercial": False,
        "licence_accepted": None,
        "looked_in": [str(models / "toy")],
        "found": str(models / "toy"),
        "files": [
            {
                "path": "toy.pt",
                "url": mirror.url_of("toy.pt"),
                "size": None,
                "sha256": None,
                "found": {
                    "path": str(models / "toy/toy.pt"),
                    "size": 11,
                    "sha256": SHA256,
                    "verdict": "as fetched",
                    "expected": None,
                },
            }
        ],
    }


@pytest.mark.parametrize("command", ["show", "fetch"])
def test_a_name_that_is_none(run: Run, command: str) -> None:
    outcome = run("models", command, "sam")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: unknown model 'sam'")
    assert outcome.err.endswith(f"known models: {', '.join(('none', *MODELS))}\n")
    outcome = run("models", command, "none")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: 'none' stands for no model, where the result is the warped atlas; name a model\n"
    assert run("models", command).code == 2
    assert "no command 'sam'" in run("models", "sam").err


# models fetch


def test_fetch(run: Run, add_model: Callable[..., Any], mirror: Mirror, models: Path) -> None:
    add_model("toy", weights())
    outcome = run("models", "fetch", "toy")
    assert outcome.code == 0, outcome.err
    assert outcome.err == "downloading toy.pt\n"
    assert outcome.out.splitlines() == [
        f"toy: 1 file downloaded; the weights are in {models / 'toy'}",
        "  toy.pt  11 bytes, as fetched",
        f"    sha256 {SHA256}",
    ]
    outcome = run("models", "fetch", "toy")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"toy: complete already, none downloaded; the weights are in {models / 'toy'}\n")
    assert len(mirror.asked) == 1


def test_fetch_what_needs_no_weights(run: Run) -> None:
    outcome = run("models", "fetch", "builtin", "--accept-licence")
    assert (outcome.code, outcome.out) == (0, "builtin needs no weights: nothing to fetch\n")


def test_fetch_into_a_folder(run: Run, add_model: Callable[..., Any], mirror: Mirror, folder: Path) -> None:
    add_model("toy", weights())
    outcome = run("models", "fetch", "toy", "--folder", "here", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith("use them with --model-path here\n")
    assert {path.name for path in (folder / "here").iterdir()} == {"toy.pt", RECORD}
    assert not (folder / "home").exists()
    shown = run("models", "show", "toy", "--folder", "here").out
    assert ": as fetched\n" in shown
    assert "  looked for in           here\n  found in                here\n" in shown


def test_fetch_that_fails(run: Run, add_model: Callable[..., Any], mirror: Mirror, models: Path) -> None:
    add_model("toy", weights(WeightsFile("gone.pt")))
    outcome = run("models", "fetch", "toy", "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {mirror.url_of('gone.pt')}: ")
    assert "404" in outcome.err
    assert outcome.err.count("\n") == 1
    assert list((models / "toy").iterdir()) == []


def test_without_a_terminal_the_licence_is_accepted_by_the_option(
    run: Run, add_model: Callable[..., Any], mirror: Mirror, models: Path
) -> None:
    add_model("toy", weights(non_commercial=True))
    outcome = run("models", "fetch", "toy")
    assert (outcome.code, outcome.out) == (2, "")
    assert "'toy' has not been accepted: CC-BY-NC-4.0, https://example.org/licence" in outcome.err
    assert mirror.asked == []
    assert not models.exists()
    outcome = run("models", "fetch", "toy", "--accept-licence")
    assert outcome.code == 0, outcome.err
    accepted = "licence of the weights of toy accepted: CC-BY-NC-4.0, https://example.org/licence\n"
    assert outcome.err == f"{accepted}downloading toy.pt\n"
    assert {path.name for path in (models / "toy").iterdir()} == {"toy.pt", RECORD, ACCEPTANCE}
    outcome = run("models", "fetch", "toy", "--accept-licence")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(("answer", "agreed"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_at_a_terminal_the_licence_is_asked_for(
    run: Run,
    add_model: Callable[..., Any],
    mirror: Mirror,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    agreed: bool,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    add_model("toy", weights(non_commercial=True))
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    outcome = run("models", "fetch", "toy", "--quiet")
    asked = (
        "licence of the weights of toy: CC-BY-NC-4.0, no commercial use\nread it at https://example.org/licence\n"
        "Do you accept it? [y/N] "
    )
    assert outcome.err.startswith(asked)
    if agreed:
        assert (outcome.code, len(mirror.asked)) == (0, 1)
        monkeypatch.setattr(sys, "stdin", Terminal(""))
        assert run("models", "fetch", "toy", "--quiet").err == ""
    else:
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.removeprefix(asked) == (
            "error: the licence of the weights of the model 'toy' was not accepted; nothing was downloaded\n"
        )
        assert mirror.asked == []
        assert not models.exists()


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
sys.argv = ["atlassegfm", "models", "fetch", "toy"]
from mirror import weights
from atlassegfm.cli import app as cli
from atlassegfm.models import MODELS, ModelDescription
MODELS["toy"] = ModelDescription("toy", "", ("mask",), "MIT", weights())
cli.main()
"""


def test_a_download_that_is_terminated_leaves_nothing(
    mirror: Mirror, models: Path, add_model: Callable[..., Any]
) -> None:
    begun, waiting = threading.Event(), threading.Event()

    def half(handler: Any) -> None:
        body(bytes(3 << 20), promised=4 << 20)(handler)
        begun.set()
        waiting.wait(30)

    mirror.answer("toy.pt", half)
    paths = [str(Path(__file__).parent), str(Path(atlassegfm.__file__).parents[1])]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(paths=paths)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    waiting.set()
    assert (process.returncode, output) == (128 + signal.SIGTERM, "")
    assert list((models / "toy").iterdir()) == []


# Models with weights in segment


def test_segment_with_weights_by_path(run: Run, add_model: Callable[..., list[Toy]], scans: None, folder: Path) -> None:
    loaded = add_model("toy", weights())
    put(folder / "deep/other-name.bin")
    arguments = ("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--model", "toy", "--quiet")
    outcome = run(*arguments, "--model-path", folder / "deep/other-name.bin")
    assert outcome.code == 0, outcome.err
    assert [one.path for one in loaded] == [folder / "deep/other-name.bin"]
    text = (folder / "out/query/run.json").read_text()
    content = json.loads(text)
    assert content["model"]["prompt"] == "region"
    assert content["model"]["provenance"]["file"] == "other-name.bin"
    assert content["model"]["weights_licence"] == "CC0-1.0"
    assert content["model"]["licence_accepted"] is None
    # Paths name people: none is kept.
    assert content["settings"]["model_path"] == "other-name.bin"
    assert str(folder) not in text
    outcome = run(*arguments, "--model-path", "absent")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: absent: no such file or folder; expected the weights of the model 'toy' (")


def test_segment_without_weights_says_what_to_do(
    run: Run, add_model: Callable[..., Any], scans: None, mirror: Mirror, models: Path, folder: Path
) -> None:
    add_model("toy", weights())
    outcome = run("segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--model", "toy", "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {models}/toy: no weights of the model 'toy'")
    for fact in ("atlassegfm models fetch toy", models / "toy/toy.pt", mirror.url_of("toy.pt"), "CC0-1.0"):
        assert str(fact) in outcome.err
    assert mirror.asked == []
    assert not (folder / "out").exists()


def test_segment_asks_for_the_licence_once(
    run: Run, add_model: Callable[..., Any], scans: None, models: Path, folder: Path
) -> None:
    add_model("toy", weights(non_commercial=True))
    put(models / "toy/toy.pt")
    arguments = ["segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--model", "toy", "--quiet"]
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "has not been accepted: CC-BY-NC-4.0, https://example.org/licence, no commercial use; read " in outcome.err
    assert "--accept-licence" in outcome.err
    outcome = run(*arguments, "--accept-licence")
    assert outcome.code == 0
    assert outcome.err == "licence of the weights of toy accepted: CC-BY-NC-4.0, https://example.org/licence\n"
    note = models / "toy" / ACCEPTANCE
    note.write_text(json.dumps(json.loads(note.read_text()) | {"date": "2024-05-06"}))
    outcome = run(*arguments, "--force")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads((folder / "out/query/run.json").read_text())["model"]["licence_accepted"] == "2024-05-06"


def test_weights_for_a_model_that_has_none(run: Run, scans: None, folder: Path) -> None:
    arguments = ["segment", *ATLAS_ARGUMENTS, "query.nii.gz", "-o", "out", *FAST, "--quiet"]
    outcome = run(*arguments, "--model-path", "toy.pt")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: toy.pt: given as weights, but the model 'builtin' has none; leave out their path\n"
    # Nothing to accept is no mistake: scripts give the option to every model.
    assert run(*arguments, "--accept-licence", "--model", "none").code == 0


def test_accepting_by_a_function(add_model: Callable[..., Any], models: Path) -> None:
    add_model("toy", weights(non_commercial=True))
    put(models / "toy/toy.pt")
    assert licence_accepted("toy") is None
    with pytest.raises(InputError, match=re.escape("(in Python: atlassegfm.models.accept_licence('toy'))")):
        load_model("toy", "cpu")
    assert accept_licence("toy") == licence_accepted("toy")
    assert load_model("toy", "cpu").provenance == {"file": "toy.pt"}
    assert accept_licence("builtin") is licence_accepted("builtin") is fetch_weights("builtin") is None
    with pytest.raises(InputError, match="unknown model 'sam'"):
        accept_licence("sam")


# Models that take no click, and models with weights, in benchmarks


def columns_of(folder: Path) -> list[tuple[str, str]]:
    return [(one["variant"], one["method"]) for one in json.loads((folder / "summary.json").read_text())["columns"]]


def test_prompts_of_a_model_that_takes_none(
    run: Run, add_model: Callable[..., list[Toy]], data: None, folder: Path
) -> None:
    loaded = add_model()
    arguments = ["prompts", "data", "-o", "out", *ONE_PAIR, *FAST, "--models", "toy,builtin", "--quiet"]
    outcome = run("benchmark", *arguments)
    assert outcome.code == 0, outcome.err
    assert columns_of(folder / "out") == [
        (f"{name} {kind}", method)
        for name, kind in (("toy", "region"), ("builtin", "click"), ("builtin", "box"), ("builtin", "mask"))
        for method in ("model", "fused")
    ]
    variants = json.loads((folder / "out/plan.json").read_text())["variants"]
    assert [one["settings"]["prompt"] for one in variants.values()] == ["auto", "click", "box", "mask"]
    assert {kind for one in loaded for kind in one.asked} == {RegionPrompt}
    scores = json.loads((folder / "out/summary.json").read_text())["columns"]
    assert scores[0]["mean"]["dice"] > 0.5


def test_ablation_of_a_model_that_takes_no_click(
    run: Run, add_model: Callable[..., list[Toy]], data: None, folder: Path
) -> None:
    loaded = add_model()
    short = ("linear_iterations=1", "instance.iterations=[1]", "candidates=1", "structure_search=false")
    fast = [part for one in short for part in ("--set", f"registration.{one}")]
    outcome = run("benchmark", "ablation", "data", "-o", "out", *ONE_PAIR, *fast, "--model", "toy")
    assert outcome.code == 0, outcome.err
    assert "left out: user click, which the model 'toy' does not take\n" in outcome.err
    assert columns_of(folder / "out") == [
        *((name, "atlas") for name in ("deformable", "rigid", "rigid, deformable", "rigid, affine")),
        *(("all stages", name) for name in ("atlas", "model", "paper", "fused", "oracle")),
    ]
    assert [set(one.asked) for one in loaded] == [{RegionPrompt}]  # loaded once, though it alternates with none


def test_benchmark_with_weights(run: Run, add_model: Callable[..., list[Toy]], data: None, folder: Path) -> None:
    loaded = add_model("toy", weights(non_commercial=True))
    path = put(folder / "mine.pt")
    arguments = ["benchmark", "data", "-o", "out", *ONE_PAIR, *FAST, "--models", "none,builtin,toy", "--quiet"]
    outcome = run(*arguments, "--model-path", path)
    assert outcome.code == 2
    assert outcome.err.startswith(
        f"error: {path}: the licence of the weights of the model 'toy' has not been accepted: "
    )
    assert not (folder / "out").exists()
    outcome = run(*arguments, "--model-path", path, "--accept-licence")
    assert outcome.code == 0, outcome.err
    assert outcome.err == "licence of the weights of toy accepted: CC-BY-NC-4.0, https://example.org/licence\n"
    assert {one.path for one in loaded} == {path}
    assert [name for name, method in columns_of(folder / "out") if method == "atlas"] == ["none", "builtin", "toy"]


def test_one_path_for_two_models_is_refused(
    run: Run, add_model: Callable[..., Any], data: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model("toy", weights())
    add_model("other", weights())
    monkeypatch.setattr(pairs, "segment", None)
    for command in ([], ["prompts"]):
        outcome = run(
            *("benchmark", *command, "data", "-o", "out", *ONE_PAIR, "--models", "toy,other", "--model-path", "x.pt")
        )
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            "error: x.pt: one path of weights for the models other, toy; name each as other=PATH,toy=PATH\n"
        )
    assert not (folder / "out").exists()


def test_time_with_weights(run: Run, add_model: Callable[..., list[Toy]], data: None, folder: Path) -> None:
    loaded = add_model("toy", weights(non_commercial=True))
    path = put(folder / "mine.pt")
    arguments = [
        "benchmark",
        "time",
        "data",
        "--shape",
        "12x12x10",
        "--rounds",
        "1",
        *FAST,
        "--model",
        "toy",
        "--quiet",
    ]
    assert run(*arguments, "--model-path", path, "--accept-licence").code == 0
    assert [one.path for one in loaded] == [path]


# models verify


@pytest.mark.parametrize(("dice", "code", "said"), [(0.95, 0, "yes"), (0.5, 1, "NO")])
def test_verify_compares_with_the_recorded_band(
    run: Run, monkeypatch: pytest.MonkeyPatch, dice: float, code: int, said: str
) -> None:
    asked: list[Settings] = []

    def demo(_: Path, settings: Settings, **__: Any) -> DemoOutcome:
        asked.append(settings)
        provenance = {"weights": {"file": "w.pth", "bytes": 3, "sha256": SHA256}}
        record = types.SimpleNamespace(model=types.SimpleNamespace(provenance=provenance))
        return DemoOutcome({Structure(1, "liver", (1, 2, 3)): (0.9, dice, 0.96)}, record)  # type: ignore[arg-type]

    monkeypatch.setattr("atlassegfm.demo.run.run_demo", demo)
    outcome = run("models", "verify", "builtin")
    assert (outcome.code, asked[0].model) == (code, "builtin")
    assert SHA256 in outcome.out
    assert re.search(rf"^verified +{said}", outcome.out, re.MULTILINE)
    as_json = run("models", "verify", "builtin", "--json")
    assert as_json.code == code
    assert as_json.json["dice"]["as_expected"] is (code == 0)
    unknown = run("models", "verify", "medsam2")
    assert unknown.code == 0
    assert "verified" not in unknown.out


def test_verify_needs_one_model(run: Run) -> None:
    assert run("models", "verify", "none").code == 2
    refused = run("models", "verify", "builtin", "--model", "litemedsam")
    assert refused.code == 2
    assert "--model litemedsam" in refused.err
