"""The number of threads: set for a while, and put back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import SimpleITK
import torch

from atlassegfm.core.parallel import changed_environment, limited_threads, parallel_map, thread_variables, usable_cores


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


@pytest.mark.parametrize("threads", ["1", "2", "4", "64", ""])
def test_parallel_map_keeps_the_order(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)

    def late(n: int) -> int:
        time.sleep(0.01 * (n % 3))
        return n * n

    assert list(parallel_map(late, range(12))) == [n * n for n in range(12)]
    assert list(parallel_map(late, [])) == []


def test_parallel_map_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts wait for each other, which they could not one after the other; a fourth thread is not started."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    meeting = threading.Barrier(3, timeout=20)
    names = list(parallel_map(lambda _: (meeting.wait(), threading.current_thread().name)[1], range(3)))
    assert len(set(names)) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    running: list[int] = []
    most: list[int] = []

    def work(n: int) -> None:
        running.append(n)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(n)

    list(parallel_map(work, range(20)))
    assert 1 < max(most) <= 4


def test_one_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    with limited_threads(1):
        assert set(parallel_map(lambda _: threading.current_thread(), range(3))) == {threading.current_thread()}
    # And within a part, its own.
    monkeypatch.setenv("OMP_NUM_THREADS", "4")

    def part(_: int) -> set[bool]:
        me = threading.current_thread()
        return set(parallel_map(lambda _: threading.current_thread() is me, range(5)))

    assert list(parallel_map(part, range(3))) == [{True}] * 3
    assert threading.current_thread() not in set(parallel_map(lambda _: threading.current_thread(), range(3)))


def test_parts_are_taken_a_few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large scan not all coordinates are made at once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    taken = []

    def parts() -> Iterator[int]:
        for n in range(50):
            taken.append(n)
            yield n

    done = parallel_map(lambda n: n, parts())
    assert next(done) == 0
    assert len(taken) <= 4


@pytest.mark.parametrize("threads", ["1", "3"])
def test_an_error_in_a_part_comes_out(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    done = parallel_map(lambda n: 6 // n, [1, 2, 0, 3])
    assert [next(done), next(done)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(done)
