"""The number of threads: set for a while, and put back."""

from __future__ import annotations

import os

import pytest
import SimpleITK
import torch

from atlassegfm.threads import changed_environment, limited_threads, thread_variables, usable_cores


def state() -> tuple[int, int, str | None]:
    itk = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    return torch.get_num_threads(), itk, os.environ.get("OMP_NUM_THREADS")


def test_threads_are_put_back() -> None:
    before = state()
    with limited_threads(3):
        assert state() == (3, 3, "3")
        with limited_threads(1):
            assert state() == (1, 1, "1")
        assert state() == (3, 3, "3")
    assert state() == before
    with pytest.raises(ZeroDivisionError), limited_threads(3):
        raise ZeroDivisionError
    assert state() == before
    with limited_threads(None):
        assert state() == before


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "1")
    monkeypatch.delenv("TWO", raising=False)
    with changed_environment({"ONE": "a", "TWO": "b"}):
        assert (os.environ["ONE"], os.environ["TWO"]) == ("a", "b")
    assert os.environ["ONE"] == "1"
    assert "TWO" not in os.environ


def test_small_matrices_take_one_thread_always() -> None:
    assert thread_variables(4)["OPENBLAS_NUM_THREADS"] == "1"
    assert thread_variables(4)["OMP_NUM_THREADS"] == "4"
    assert usable_cores() >= 1
