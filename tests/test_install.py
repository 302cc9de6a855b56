"""The package as others install it: a wheel, its extras, and the commands that errors give."""

from __future__ import annotations

import ast
import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from trove_classifiers import classifiers
from typer.main import get_command

from atlassegfm.cli.app import app
from atlassegfm.core.errors import MissingExtraError
from atlassegfm.core.extras import is_installed, requirements
from atlassegfm.models import BASELINES, MODELS
from atlassegfm.registration import ENGINES

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _distribution(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the wheel and the source archive of this checkout, built as pip builds them, without a network."""
    pytest.importorskip("hatchling", reason="hatchling is not installed; make test installs it")
    folder = tmp_path_factory.mktemp("archives")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def wheel(archives: Path) -> Path:
    (built,) = archives.glob("*.whl")
    return built


def test_the_wheel_has_all_extras_and_all_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        head = email.message_from_bytes(content.read(metadata))
    assert set(head.get_all("Provides-Extra")) == set(EXTRAS)
    brought = {extra: set(map(_distribution, wanted)) for extra, wanted in EXTRAS.items()}
    brought["all"] = set().union(*(brought[one] for one in brought.keys() - {"all", "elastix", "greedy"}))
    for extra, wanted in brought.items():
        found = [one for one in head.get_all("Requires-Dist") if re.search(rf"extra == ['\"]{extra}['\"]", one)]
        assert set(map(_distribution, found)) == wanted, extra
    source = ROOT / "src"
    files = (path for path in (source / "atlassegfm").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {path.relative_to(source).as_posix() for path in files} <= names


def test_archives_are_fit_for_an_index(archives: Path, wheel: Path) -> None:
    """What ``twine check --strict`` looks at, and the classifiers, which an index refuses if it does not know them."""
    (source,) = archives.glob("*.tar.gz")
    name = source.name.removesuffix(".tar.gz")
    with tarfile.open(source) as content, zipfile.ZipFile(wheel) as built:
        files = {one.name.removeprefix(f"{name}/") for one in content if one.isfile()}
        info = content.extractfile(f"{name}/PKG-INFO")
        assert info is not None
        heads = [info.read(), built.read(f"{name}.dist-info/METADATA")]
    for head in heads:
        metadata = Metadata.from_email(head)  # checks every field
        assert metadata.description_content_type == "text/markdown"
        assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
        assert set(metadata.classifiers or ()) <= set(classifiers)
        assert "3.11" in metadata.requires_python
    needed = {"pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "zensical.toml", "docs/index.md"}
    assert needed | {"containers/Dockerfile", "src/atlassegfm/demo/data/atlas.nii.gz", "tests/conftest.py"} <= files


#: The recipes, with the marks of their arguments, and what copies a path of the checkout.
RECIPES = {
    "Dockerfile": (r"ARG (\w+)=(\S+)", r"^COPY (.+) \S+$", r"^FROM python:([\d.]+)"),
    "atlassegfm.def": (r"^    (\w+)=(\S+)$", r"^    (\S+) /opt/atlassegfm/\S+$", r"^From: python:([\d.]+)"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_containers_install_what_exists(name: str) -> None:
    text = (ROOT / "containers" / name).read_text(encoding="utf-8")
    argument, copy, base = (re.compile(one, re.MULTILINE) for one in RECIPES[name])
    given = dict(argument.findall(text))
    assert set(given["EXTRAS"].split(",")) <= set(EXTRAS)
    assert given["TORCH_BACKEND"] == "cpu"
    sources = {path for paths in copy.findall(text) for path in paths.split()}
    assert sources == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"}
    assert all((ROOT / path).exists() for path in sources)
    (version,) = base.findall(text)
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert set(PROJECT["scripts"]) == {"atlassegfm"}
    ((command, options),) = re.findall(r"^(?:RUN|    )\s*atlassegfm (\w+) ([^&\n]*)&&", text, re.MULTILINE)
    # Parsed, not run: unknown ones raise.
    get_command(app).commands[command].make_context(command, shlex.split(options))  # type: ignore[attr-defined]


def test_recipes_agree_and_their_shell_lines_parse() -> None:
    docker, apptainer = ((ROOT / "containers" / name).read_text(encoding="utf-8") for name in RECIPES)
    instructions = re.sub(r"\\\n", " ", docker)
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}
    lines = [line for line in instructions.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} == known
    shell = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    sections = re.split(r"^%(\w+)\n", apptainer, flags=re.MULTILINE)
    names = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert set(names) == {"help", "files", "arguments", "post", "runscript", "test"}
    shell += [names[one].replace("{{ ", "$").replace(" }}", "") for one in ("post", "runscript", "test")]
    for one in shell:
        assert subprocess.run(["sh", "-n"], input=one, text=True).returncode == 0, one
    install = re.compile(r"uv pip install (.*)")
    plain = [re.sub(r'[${}"\s]|EXTRAS|TORCH_BACKEND', "", install.findall(one)[0]) for one in (instructions, apptainer)]
    assert plain[0] == plain[1]


def _extras_in_errors() -> set[str]:
    """Second argument of each ``MissingExtraError("...", "EXTRA")`` of the source."""
    calls = (
        node
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtraError"
    )
    return {call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)}


def test_every_extra_that_is_asked_for_exists() -> None:
    asked = (
        _extras_in_errors()
        | {row.extra for row in (MODELS | BASELINES).values()}
        | {row.extra for row in ENGINES.values()}
    )
    assert asked - {""} <= set(EXTRAS)
    assert len(asked) > 4


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"all"}))
def test_the_error_gives_a_command_for_this_environment(extra: str) -> None:
    error = str(MissingExtraError("this", extra))
    assert f"the extra {extra!r}" in error
    python, *pip, first = shlex.split(error.partition("install it with: ")[2])[:5]
    assert (python, pip) == (sys.executable, ["-m", "pip", "install"])
    # No index has this package: its requirements are named instead.
    assert not first.startswith("atlassegfm")
    assert [_distribution(one) for one in requirements(extra)] == sorted(map(_distribution, EXTRAS[extra]))


def test_without_metadata_the_command_is_for_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlassegfm.core.extras._PACKAGE", "no-such-package")
    assert is_installed("dicom") is None
    assert str(MissingExtraError("this", "dicom")).endswith("-m pip install '.[dicom]'")


def test_no_page_names_an_index_that_has_not_this_package() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    wrong = re.compile(r"pip install ['\"]?atlassegfm(\[|['\"]?\s*$)", re.MULTILINE)
    assert not [page.name for page in pages if wrong.search(page.read_text(encoding="utf-8"))]
    install = (ROOT / "docs/how-to/install.md").read_text(encoding="utf-8")
    assert not [extra for extra in EXTRAS if f"`{extra}`" not in install]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("assignment", "code"), [("EXTRAS=dicom,report", 0), ("EXTRAS=", 2)])
def test_make_extras_is_for_named_extras(assignment: str, code: int) -> None:
    ended = subprocess.run(["make", "-n", "extras", assignment], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code
    assert code or "--editable '.[dicom,report]'" in ended.stdout
    assert not code or "EXTRAS=" in ended.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_wheel_and_extra_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """What a newcomer does: install, meet a missing extra, do what the error says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, env=environment)
    python, program = tmp_path / "env/bin/python", tmp_path / "env/bin/atlassegfm"
    begun = time.monotonic()
    installed = call(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    if installed.returncode and "connection" in installed.stderr.lower():
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    print(f"\ninstalled in {time.monotonic() - begun:.0f} s: {_mebibytes(tmp_path / 'env')} MiB")  # noqa: T201
    assert call(program, "--version").stdout == f"atlassegfm {PROJECT['version']}\n"
    assert call(program, "--help").returncode == 0
    refused = call(program, "demo", "-o", "demo")
    assert refused.returncode == 2
    remedy = refused.stderr.partition("install it with: ")[2].partition(", or leave")[0]
    done = call(*shlex.split(remedy))
    assert done.returncode == 0, done.stderr
    begun = time.monotonic()
    ended = call(program, "demo", "-o", "demo")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "demo/demo.png").exists()
    print(f"demo in {time.monotonic() - begun:.0f} s; with the extra 'report' {_mebibytes(tmp_path / 'env')} MiB")  # noqa: T201
    data = [tmp_path / "demo/data" / name for name in ("atlas.nii.gz", "atlas_labels.nii.gz", "query.nii.gz")]
    options = ("--model", "none", "--keep", "--report", "-o", "out")
    ended = call(program, "segment", "--atlas", data[0], "--labels", *data[1:], *options)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out/query/transform/affine.tfm").exists()
    # The other way of the documentation: the extra of the wheel.
    assert call(python, "-m", "pip", "install", "--quiet", f"{wheel}[dicom]").returncode == 0
    assert call(python, "-c", "import pydicom, highdicom, gdcm").returncode == 0


def _mebibytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if not path.is_symlink()) >> 20
