"""Damaged files: a refusal that names them, or a whole result (``make fuzz`` tries ten times as many)."""

from __future__ import annotations

from pathlib import Path

import pytest

from damage import make_base
from fuzz import try_seed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("fuzz") / "base")


@pytest.mark.parametrize("first", range(0, 32, 4))
def test_damaged_files(base: Path, tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        damaged, _, faults = try_seed(base, folder, seed)
        assert not faults, f"python tests/fuzz.py --seed {seed} ({'; '.join(damaged.story)}): {faults}"
