"""Doing the cases on this machine: in this process, or in several of their own.

Each worker is a process of its own with a pipe of its own, so that one that is killed, by the system for want of memory
above all, costs the case it was at and nothing else. (In ``concurrent.futures`` it would cost the whole pool.)
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, NoReturn

from ..core.errors import AtlasSegError, ModelError
from ..core.parallel import changed_environment
from .plan import Case
from .work import Ended, Watcher, Work

logger = logging.getLogger(__name__)


#: A case whose worker was killed is begun again once.
ATTEMPTS = 2


#: Workers that end in a row before their first case: then something is wrong with all of them.
_FAILED_STARTS = 3


#: Seconds that a worker has to end by itself, deleting what it has begun to write.
_GRACE_SECONDS = 5.0


#: Whose log records go to the process that began the run.
_PACKAGE = "atlassegfm"


def visible_gpus() -> list[str]:
    """GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    named = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return named[:count] if len(named) >= count else [str(number) for number in range(count)]


def run_here(work: Work, cases: Sequence[Case], watcher: Watcher) -> Generator[Ended, None, None]:
    """Do the cases in this process, one after the other."""
    do = work.open()
    for case in cases:
        watcher.begun(case)
        yield do(case, 1, lambda text, case=case: watcher.stage(case, text))  # type: ignore[misc]


def run_in_processes(
    work: Work, cases: Sequence[Case], watcher: Watcher, workers: int, gpus: Sequence[str] = ()
) -> Generator[Ended, None, None]:
    """Do the cases in several processes side by side; they end with the generator, however it ends.

    Parameters
    ----------
    work : Work
        What to do.
    cases : sequence of Case
        All of them.
    watcher : Watcher
        Told how it goes.
    workers : int
        How many processes, at most.
    gpus : sequence of str
        Names of GPUs as ``CUDA_VISIBLE_DEVICES`` takes them, one for each worker; empty on the CPU.

    Yields
    ------
    Ended
        In the order in which they end.

    Raises
    ------
    AtlasSegError
        If the workers cannot begin.
    """
    pool = _Pool(work, watcher, gpus)
    try:
        yield from pool.run(deque((case, 1) for case in cases), min(workers, len(cases)))
    finally:
        pool.stop()


@dataclass(eq=False)
class _Worker:
    """A process, and what it is at: None before it is ready and between two cases."""

    process: SpawnProcess
    pipe: Connection
    slot: int
    ready: bool = False
    case: Case | None = None
    attempt: int = 0


class _Pool:
    def __init__(self, work: Work, watcher: Watcher, gpus: Sequence[str]) -> None:
        self._work = work
        self._watcher = watcher
        self._gpus = gpus
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def run(self, queue: deque[tuple[Case, int]], count: int) -> Iterator[Ended]:
        for slot in range(count):
            self._start(slot)
        while queue or any(worker.case for worker in self._workers):
            for pipe in connection.wait([worker.pipe for worker in self._workers]):
                worker = next(one for one in self._workers if one.pipe is pipe)
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    ended = self._died(worker, queue)
                else:
                    ended = self._heard(worker, kind, content)
                if ended is not None:
                    yield ended
            for worker in self._workers:
                if worker.ready and worker.case is None and queue:
                    self._give(worker, *queue.popleft())

    def stop(self) -> None:
        """End all workers; they delete what they have begun to write."""
        for worker in self._workers:
            worker.process.terminate()
        until = time.monotonic() + _GRACE_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _start(self, slot: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._work, theirs), name=f"atlassegfm-{slot}", daemon=True)
        # Libraries read it when they are loaded, which is before the first line of the worker's own.
        with changed_environment(self._environment(slot)), _without_interrupt():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, slot))

    def _environment(self, slot: int) -> Mapping[str, str]:
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        return {**self._work.environment, **gpu}

    def _give(self, worker: _Worker, case: Case, attempt: int) -> None:
        worker.case, worker.attempt = case, attempt
        self._watcher.begun(case)
        with suppress(OSError):  # if it died just now, its pipe tells so next
            worker.pipe.send((case, attempt))

    def _heard(self, worker: _Worker, kind: str, content: Any) -> Ended | None:
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
        elif kind == "stage" and worker.case is not None:
            self._watcher.stage(worker.case, content)
        elif kind == "log":
            logging.getLogger(content.name).handle(content)
        elif kind == "refused":
            raise content
        elif kind == "ended":
            worker.case = None
            ended: Ended = content
            return ended
        return None

    def _died(self, worker: _Worker, queue: deque[tuple[Case, int]]) -> Ended | None:
        """Put another worker in its place and its case back; what to say if that was tried before."""
        worker.process.join(_GRACE_SECONDS)
        self._workers.remove(worker)
        worker.pipe.close()
        how = _ending(worker.process.exitcode)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise ModelError(f"the workers end before their first case ({how}); try --workers 1, which says more")
        case, attempt = worker.case, worker.attempt
        ended = None
        if case is not None and attempt < ATTEMPTS:
            logger.warning("%s: its worker %s; begun again", case.query, how)
            queue.appendleft((case, attempt + 1))
        elif case is not None:
            reason = f"its worker {how}, {attempt} times; if memory ran out, take fewer workers or crop the scan"
            ended = self._work.give_up(case, reason, attempt)
        if queue:
            self._start(worker.slot)
        return ended


@contextmanager
def _without_interrupt() -> Iterator[None]:
    """Let an interrupt wait; processes started meanwhile never get one.

    The terminal sends it to all processes, and the one that began the run decides what becomes of the others.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended by itself (exit code {code})"


class _ToParent(logging.Handler):
    """Log records, as text that needs nothing of this process, to the other end of a pipe."""

    def __init__(self, line: _Line) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        content = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname}
        self._line.say("log", logging.makeLogRecord({**content, "msg": self.format(record)}))


def _serve(work: Work, pipe: Connection) -> None:
    """Do cases as they come, until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    line = _Line(pipe)
    say = line.say
    logging.getLogger(_PACKAGE).addHandler(_ToParent(line))
    try:
        do = work.open()
    except AtlasSegError as error:
        say("refused", error)
        return
    say("ready", None)
    while True:
        try:
            case, attempt = pipe.recv()
        except (EOFError, OSError):
            return
        say("ended", do(case, attempt, lambda text: say("stage", text)))


@dataclass(frozen=True)
class _Line:
    """To the process that began the run."""

    pipe: Connection

    def say(self, kind: str, content: Any) -> None:
        """Tell it, or end if it is gone: that is nothing that the case at hand could be blamed for."""
        try:
            self.pipe.send((kind, content))
        except OSError:
            raise SystemExit(0) from None


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """By an exception, so that nothing half-written is left."""
    raise SystemExit(0)


def _end_with_parent() -> None:
    """End when the process that began the run is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
