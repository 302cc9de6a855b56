"""The page on adding a model: its example is added as the page says, and does its job."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from atlassegfm import models
from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.jobs.store import RunInputs, run_record
from atlassegfm.models import ModelDescription, load_model
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from conftest import Run
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, straight_grid

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/development/adding-a-model.md"
MOST_LINES = 40


def code_block(title: str) -> str:
    found = re.search(
        rf'^```python title="{re.escape(title)}"\n(.*?)^```$', PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found is not None, title
    return found[1]


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelDescription:
    """The example as one file of the package and one row of its table."""
    (tmp_path / "growing.py").write_text(code_block("growing.py"), "utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    name = f"{models.__name__}.growing"
    importlib.invalidate_caches()
    importlib.import_module(name)
    # So that both the module and the package's attribute go when the test ends.
    monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    monkeypatch.delattr(models, "growing")
    row = eval(code_block("a row of MODELS"), {"ModelDescription": ModelDescription})  # noqa: S307  (our own page)
    assert isinstance(row, ModelDescription)
    monkeypatch.setitem(models.MODELS, row.name, row)
    return row


def test_example_is_short() -> None:
    lines = [line for line in code_block("growing.py").splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES


def test_example_does_its_job(growing: ModelDescription) -> None:
    grid = straight_grid()
    atlas = Atlas.from_volumes(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    settings = with_overrides(Settings(), [*UNREGISTERED, "model=growing", "fusion.gate=paper", "fusion.start=0"])
    context = Context(atlas, settings)
    query = QUERY.scan(grid)
    result = segment(context, query, device="cpu")
    truth = QUERY.labels(grid).data
    assert result.prompt == "mask"
    assert run_record(result, RunInputs(context, query)).model.summary == growing.summary
    before = dice_per_structure(result.atlas_labels.data, truth, atlas.values)
    after = dice_per_structure(result.labels.data, truth, atlas.values)
    assert all(after[value] > before[value] + 0.02 for value in atlas.values), (before, after)


def test_example_is_listed_and_known(growing: ModelDescription, run: Run) -> None:
    assert growing.name in run("models").out
    assert load_model("growing", "cpu").provenance == {}


def test_page_names_what_there_is() -> None:
    from atlassegfm.core import errors
    from atlassegfm.settings import ModelSettings

    text = PAGE.read_text("utf-8")
    named = set(re.findall(r"`(\w+Error)`", text))
    assert named == {"ModelError", "InputError", "MissingExtraError"}
    assert all(hasattr(errors, name) for name in named)
    assert f"`{ModelSettings.__name__}`" in text
    for path in set(re.findall(r"`((?:src|tests)/[\w/.]+)`", text)) - {"src/atlassegfm/models/growing.py"}:
        assert (ROOT / path).exists(), path
    assert "adding-a-model.md" in (ROOT / "zensical.toml").read_text("utf-8")
