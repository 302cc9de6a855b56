"""Stage names and wall times of a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageClock:
    """Report each stage as it begins, as "stage" or "stage: part", and record its wall time."""

    def __init__(self, on_stage: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._report = on_stage or (lambda _: None)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; yields a function that reports its parts."""
        self._report(name)
        start = time.perf_counter()
        yield lambda part: self._report(f"{name}: {part}")
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def stage_printer() -> Callable[[str], None]:
    """Make a callback that prints each stage to standard error, with the seconds since it was made."""
    start = time.perf_counter()

    def show(stage: str) -> None:
        if ": " not in stage:
            sys.stderr.write(f"[{time.perf_counter() - start:6.1f} s] {stage}\n")

    return show
