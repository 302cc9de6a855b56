"""The reference pages say what the code says, links lead somewhere, and blocks marked as runnable run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from atlassegfm import demo
from atlassegfm.core.config import with_overrides
from atlassegfm.settings import Settings
from scenes import PAPER_GATE, UNREGISTERED, save_demo_pair, straight_grid

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
#: A runnable block: "run" for the fast tests too, "run slow" for `make test-all` alone.
BLOCK = re.compile(r"^<!-- run( slow)? -->\n```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "settings.md", "files.md"])
def test_reference_pages_are_current(name: str) -> None:
    page = _script("generate").PAGES[name]()
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == page.rstrip() + "\n", "run make docs"


def test_the_page_of_failures_is_of_its_script() -> None:
    script, page = _script("failures"), (DOCS / "explanation/failures.md").read_text(encoding="utf-8")
    assert page.startswith(script.HEAD)
    assert page.rstrip().endswith(script.TAIL.rstrip())
    for one in script.FAILURES:
        assert f"## {one.title}\n\n{one.text}\n" in page
        picture = DOCS / f"images/failure-{one.name}.png"
        assert f"](../images/{picture.name})" in page
        assert picture.stat().st_size < 150_000


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as Python-Markdown makes them, and that of the first of several alike."""
    titles = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", title) for title in titles)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in plain}


def test_links_lead_somewhere() -> None:
    broken, found = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
            if "://" in target:
                continue
            found += 1
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
    assert found > 150


def test_every_page_is_in_the_menu_and_every_picture_on_a_page() -> None:
    menu = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    shown = "".join(_prose(page) for page in PAGES)
    for file in DOCS.rglob("*"):
        if file.suffix == ".md":
            assert f'"{file.relative_to(DOCS).as_posix()}"' in menu
        elif file.suffix == ".png":
            assert f"images/{file.name})" in shown, file.name


def test_pages_name_jobs_scripts_and_tests_that_exist() -> None:
    jobs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= jobs, page.name
        for script in re.findall(r"python ((?:benchmarks|docs|tests)/\w+\.py)", text):
            assert (ROOT / script).exists(), f"{page.name}: {script}"
        for files, _, wanted in re.findall(r"pytest ((?:tests/\w+\.py ?)+)(-k \"?([\w ]+))?", text):
            tests = "".join((ROOT / file).read_text(encoding="utf-8") for file in files.split())
            assert all(re.search(rf"def test_\w*{word}", tests) for word in wanted.split(" or ")), (
                f"{page.name}: {files}"
            )


def _run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the cells of the notebook as Jupyter does, and give the names they leave."""
    cells = json.loads((DOCS / "tutorial/first-case.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not [one for one in cells if one.get("outputs")], "clear the outputs"
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for one in cells:
        if one["cell_type"] == "code":
            exec(compile("".join(one["source"]), f"cell {one['id']}", "exec"), names)  # noqa: S102
    assert (folder / "segmentation.nii.gz").exists()
    return names


def test_notebook_on_a_small_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, without registration and training, which take the time."""
    pair = save_demo_pair(tmp_path / "pair", straight_grid((24, 20, 18), (4.0, 4.0, 4.0)))
    quick = with_overrides(Settings(), [*UNREGISTERED, *PAPER_GATE])
    monkeypatch.setattr(demo, "PAIR", pair)
    monkeypatch.setattr("atlassegfm.context.Settings", lambda: quick)
    names = _run_notebook(tmp_path, monkeypatch)
    assert {one.structure for one in names["scores"].scores} == {"liver", "kidney", "node"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _run_notebook(tmp_path, monkeypatch)
    assert names["result"].verdict == "good"
    assert min(row["dice"] for row in names["scores"].rows) > 0.85


def _run_blocks(page: Path, folder: Path, *, slow: bool) -> int:
    """Run the blocks of a page, one after the other, where the embedded pair stands for the user's scans."""
    (folder / "demo/data").mkdir(parents=True)
    for name in (demo.ATLAS, demo.LABELS, demo.QUERY, demo.REFERENCE):
        shutil.copy(demo.PAIR / name, folder / "demo/data")
    mine = {"patient1.nii.gz": demo.ATLAS, "patient1_organs.nii.gz": demo.LABELS, "patient2.nii.gz": demo.QUERY}
    for name, source in mine.items():
        shutil.copy(demo.PAIR / source, folder / name)
    # The program of a checkout, and its Makefile, without setting up anything.
    program = folder / ".venv/bin/atlassegfm"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m atlassegfm "$@"\n')
    program.chmod(0o755)
    (folder / "Makefile").symlink_to(ROOT / "Makefile")
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "MAKEFLAGS": ""}
    blocks = [(kind, text) for only, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if slow or not only]
    for kind, text in blocks:
        text = re.sub(r"^make ", "make -o .venv/.stamps/run ", text, flags=re.MULTILINE)
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{page.name}:\n{text}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
    return len(blocks)


RUNNABLE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


def test_quick_blocks_run(tmp_path: Path) -> None:
    quick = [page for page in RUNNABLE if "<!-- run -->" in page.read_text(encoding="utf-8")]
    assert [_run_blocks(page, tmp_path / page.stem, slow=False) for page in quick] == [1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_all_runnable_blocks_run(page: Path, tmp_path: Path) -> None:
    assert _run_blocks(page, tmp_path / "work", slow=True) > 0


def test_options_that_pages_show_exist() -> None:
    """Of every `atlassegfm` command in a block: options are those of the reference, which is made from the code."""
    sections = re.split(r"\n#+ `atlassegfm ", (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8"))[1:]
    known = {section.partition("`")[0]: set(re.findall(r"--[a-z][a-z-]*", section)) for section in sections}
    seen = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = re.sub(r"^.*?atlassegfm ", "", line.partition(" #")[0]).split()
                names = [" ".join(words[:2]), *words[:1]]
                command = next((name for name in names if name in known), None)
                if "atlassegfm " not in line or command is None:
                    continue
                for option in (word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)):
                    seen += 1
                    # `benchmark DATASET` is `benchmark protocol DATASET`.
                    its = known[command] | (known["benchmark protocol"] if command == "benchmark" else set())
                    assert option in its or option.replace("--no-", "--") in its, f"{page.name}: {line}"
    assert seen > 50
