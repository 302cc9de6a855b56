"""Peak memory: what Linux tells, what is left to other systems, and no error where nothing is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from atlassegfm.core import parallel as memory
from atlassegfm.core.parallel import peak_memory_mb, reset_peak_memory


def told(monkeypatch: pytest.MonkeyPatch, folder: Path, status: str | None) -> None:
    """Let the system tell ``status``; None for a system without such a file."""
    path = folder / "status"
    if status is not None:
        path.write_text(status)
    monkeypatch.setattr(memory, "_STATUS", path)


def with_maximum(monkeypatch: pytest.MonkeyPatch, maximum: int) -> None:
    usage = SimpleNamespace(ru_maxrss=maximum)
    fake = SimpleNamespace(RUSAGE_SELF=0, getrusage={0: usage}.__getitem__)
    monkeypatch.setitem(sys.modules, "resource", fake)


def test_peak_rises_with_an_array_and_falls_after_a_reset() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux lets a process begin a new peak")
    if not reset_peak_memory():
        pytest.skip("this Linux does not let a process begin a new peak (/proc/self/clear_refs)")
    before = peak_memory_mb()
    array = np.ones(200 << 17)  # 8 bytes each: 200 MB, all written to
    during = peak_memory_mb()
    del array
    freed = peak_memory_mb()
    assert reset_peak_memory()
    after = peak_memory_mb()
    assert before is not None
    assert during is not None
    assert freed is not None
    assert after is not None
    assert during - before == pytest.approx(200, abs=20)
    assert freed == pytest.approx(during, abs=5)  # a peak stays, though the memory is given back
    assert after == pytest.approx(before, abs=20)


def test_peak_is_read_in_kilobytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told(monkeypatch, tmp_path, "Name:\tpython\nVmPeak:\t  999999 kB\nVmHWM:\t  205312 kB\nVmRSS:\t  1024 kB\n")
    assert peak_memory_mb() == 200  # 200.5 to even


@pytest.mark.parametrize("status", [None, "Name:\tpython\n", "VmHWM:\tmuch kB\n"], ids=["no file", "no line", "words"])
def test_peak_of_the_process_where_the_status_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str | None
) -> None:
    told(monkeypatch, tmp_path, status)
    with_maximum(monkeypatch, 3 << 20)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory_mb() == 3072
    monkeypatch.setattr(sys, "platform", "darwin")  # macOS counts bytes
    assert peak_memory_mb() == 3


def test_nothing_is_told_where_the_system_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told(monkeypatch, tmp_path, None)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows: importing it fails
    assert peak_memory_mb() is None


def test_reset_says_that_the_system_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "clear_refs")
    assert reset_peak_memory() is False


def test_reset_asks_for_the_peak_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "clear_refs")
    assert reset_peak_memory() is True
    assert (tmp_path / "clear_refs").read_text() == "5"  # 1 to 4 would mark pages for others
