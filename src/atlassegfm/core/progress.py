"""Stage names and wall times of a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Clock:
    """Tells the name of each stage as it begins, and keeps how long it took."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage

    def tell(self, text: str) -> None:
        if self._on_stage is not None:
            self._on_stage(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; gives a function that tells of its parts."""
        self.tell(name)
        start = time.perf_counter()
        yield lambda part: self.tell(f"{name}: {part}")
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
