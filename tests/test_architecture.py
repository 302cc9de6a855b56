"""What keeps the package a package: one direction of imports, and a light front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_import_layers() -> None:
    result = run_python(
        "import sys; from importlinter.cli import lint_imports_command; sys.argv = ['lint-imports', '--no-cache']; "
        "lint_imports_command()"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def test_import_loads_nothing_heavy() -> None:
    result = run_python("import sys; import atlassegfm; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "atlassegfm" in loaded
    assert not loaded & {"torch", "nibabel", "SimpleITK", "skimage", "matplotlib"}


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    result = run_python(
        "import atlassegfm.jobs, atlassegfm.evaluate.metrics, atlassegfm as a; print(a.segment, a.evaluate)"
    )
    assert result.stdout.count("<function") == 2, result.stderr


def test_evaluate_is_a_public_name_without_torch() -> None:
    result = run_python(
        "import sys; from atlassegfm import evaluate as f; print(f.__module__, f.__name__, 'torch' in sys.modules)"
    )
    assert result.stdout.split() == ["atlassegfm.evaluate", "evaluate", "False"], result.stderr


def test_geometry_and_files_need_no_torch() -> None:
    result = run_python(
        "import sys; import atlassegfm.core.image, atlassegfm.transforms.maps; print('torch' in sys.modules)"
    )
    assert result.stdout.strip() == "False", result.stderr


SOURCES = sorted((ROOT / "src/atlassegfm").rglob("*.py"))


def test_files_fit_a_reader() -> None:
    """No file over 600 lines, but definitions of published networks; the method on one screen."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert [path for path, count in lines.items() if count > 600 and path.name != "network.py"] == []
    assert lines[ROOT / "src/atlassegfm/segment.py"] <= 250


def test_public_functions_take_at_most_eight_parameters() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 8:
                    long.append(f"{path.name}: {node.name}")
    assert long == []
