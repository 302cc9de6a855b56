"""What keeps the package a package: one direction of imports, and a light front door."""

from __future__ import annotations

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


def test_geometry_and_files_need_no_torch() -> None:
    result = run_python(
        "import sys; import atlassegfm.core.image, atlassegfm.transforms.maps; print('torch' in sys.modules)"
    )
    assert result.stdout.strip() == "False", result.stderr
