"""Stage names and wall times of a job, and the time that it will still take."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from .text import duration

#: Steps of the training of a gate and their usual seconds, for the embedded pair on one thread.
GATE_STEPS = {"gate": 5.3, "gate: weights": 2.2, "gate: correction": 5.0, "gate: smoothing": 4.5}
#: Steps of a query and their usual seconds, as above, with the built-in model.
QUERY_STEPS = {
    "registration": 0.1,
    "registration: linear": 2.3,
    "registration: structures": 2.9,
    "registration: deformable": 14.5,
    "registration: assess": 0.6,
    "warping": 0.7,
    "model": 0.3,
    **GATE_STEPS,
    "fusion": 0.6,
    "quality": 0.3,
}
#: The time left is estimated from this fraction of the usual time on.
_LEAST_FRACTION = 0.1


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


class Steps:
    """Which step of how many a job has reached, and the seconds it will still take.

    ``usual`` are the seconds of each step, "stage" or "stage: part", in order; stages are counted. ``seconds`` is the
    wall time of an earlier job of the kind, for the time left until enough steps of this one are done.
    """

    def __init__(self, usual: Mapping[str, float], seconds: float | None = None) -> None:
        names, total, before = [*usual], sum(usual.values()), 0.0
        self._stages = list(dict.fromkeys(name.partition(": ")[0] for name in names))
        self._done: dict[str, float] = {}
        for name in names:
            self._done[name] = before / total
            before += usual[name]
        self._seconds, self._start = seconds, time.monotonic()
        self._end = None if seconds is None else self._start + seconds

    @property
    def left(self) -> float | None:
        """Seconds left; None where they are not known."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def begin(self, name: str) -> str:
        """Begin a step, and say which it is, as "2 of 6"; empty for one that is not listed."""
        stage = name.partition(": ")[0]
        if name in self._done:
            done, now = self._done[name], time.monotonic()
            total = (now - self._start) / done if done >= _LEAST_FRACTION else self._seconds
            self._end = None if total is None else now + total * (1 - done)
        return f"{self._stages.index(stage) + 1} of {len(self._stages)}" if stage in self._stages else ""


def query_steps(*, model: bool, gate: bool, atlases: int = 1) -> dict[str, float]:
    """Usual seconds of the steps of a query, with a model and a gate to train or without, and with several atlases."""
    left_out = {*(() if model else ("model",)), *(() if model and gate else ("gate",))}
    steps = {name: seconds for name, seconds in QUERY_STEPS.items() if name.partition(": ")[0] not in left_out}
    if atlases == 1:
        return steps
    one = sum(seconds for name, seconds in steps.items() if name.startswith("registration"))
    several = {f"registration: atlas {number} of {atlases}": one for number in range(1, atlases + 1)}
    return {"registration": 0.1, **several} | {n: s for n, s in steps.items() if not n.startswith("registration")}


def stage_printer(usual: Mapping[str, float]) -> Callable[[str], None]:
    """Make a callback that prints each step of ``usual`` to standard error, with the seconds since it was made."""
    steps, start = Steps(usual), time.perf_counter()

    def show(name: str) -> None:
        where, seconds = steps.begin(name), time.perf_counter() - start
        left = "" if steps.left is None else f", about {duration(steps.left)} left"
        if ": " not in name or name in usual:
            sys.stderr.write(f"[{seconds:6.1f} s] {name} ({where}{left})\n")

    return show
