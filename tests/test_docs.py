"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _generator() -> object:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "settings.md", "files.md"])
def test_reference_pages_are_current(name: str) -> None:
    page = _generator().PAGES[name]()  # type: ignore[attr-defined]
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == page.rstrip() + "\n", "run make docs"
