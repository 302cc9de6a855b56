"""Cases on this machine: in this process, or in several worker processes."""

import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn

from pebble import ProcessExpired, ProcessPool

from ..context import Context
from ..core.parallel import changed_environment
from .plan import Case
from .work import Row, SegmentWork, Watcher, opened

logger = logging.getLogger(__name__)

#: A case whose worker was killed is begun again once.
ATTEMPTS = 2
#: Seconds between looks at what the workers report.
_POLL_SECONDS = 0.1
#: Seconds that a worker has to end by itself, deleting what it has begun to write.
_GRACE_SECONDS = 5.0
_PACKAGE = "atlassegfm"


def visible_gpus() -> list[str]:
    """List the GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    named = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return named[:count] if len(named) >= count else [str(number) for number in range(count)]


def run_here(
    work: SegmentWork, cases: Sequence[Case], watcher: Watcher, context: Context | None = None
) -> Generator[Row, None, None]:
    """Run the cases in this process, one after the other, with a ``context`` that is loaded already."""
    task = work.open(context)
    for case in cases:
        watcher.begun(case)
        yield task(case, 1, lambda stage, case=case: watcher.stage(case, stage))  # type: ignore[misc]


def run_in_processes(
    work: SegmentWork,
    cases: Sequence[Case],
    watcher: Watcher,
    workers: int,
    gpus: Sequence[str] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[Row, None, None]:
    """Run the cases in at most ``workers`` processes, which end with the generator; yields as they end.

    ``gpus`` are names as ``CUDA_VISIBLE_DEVICES`` takes them, one for each worker; empty on the CPU. Once it is
    ``stopped`` the workers end, and what they were at is left. A worker that is
    killed, for want of memory above all, costs its case, which is begun again once, and no other. AtlasSegError if the
    workers cannot load context or model.
    """
    context = multiprocessing.get_context("spawn")
    reports, names = context.Queue(), context.Queue()
    for gpu in gpus:
        names.put(gpu)
    # Libraries read their variables when they are loaded, before the first line of the worker's own.
    with changed_environment(work.environment):
        pool = ProcessPool(
            min(workers, len(cases)),
            context=context,
            initializer=_start_worker,
            initargs=(reports, names if gpus else None),
        )
        try:
            yield from _collect(pool, work, cases, watcher, reports, stopped)
        finally:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join(_GRACE_SECONDS)


def _collect(
    pool: ProcessPool,
    work: SegmentWork,
    cases: Sequence[Case],
    watcher: Watcher,
    reports: Any,
    stopped: Callable[[], bool],
) -> Generator[Row, None, None]:
    """Hand out the cases, pass on what workers report, and yield what ends."""

    def begin(case: Case, attempt: int) -> None:
        running[pool.schedule(_run_case, args=(work, case, attempt))] = (case, attempt)

    running: dict[Future[Row], tuple[Case, int]] = {}
    by_name = {case.name: case for case in cases}
    for case in cases:
        begin(case, 1)
    while running and not stopped():
        ended, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        _pass_on(reports, by_name, watcher)
        for future in ended:
            case, attempt = running.pop(future)
            error = future.exception()
            if error is None:
                yield replace(future.result(), case=case)
            elif not isinstance(error, ProcessExpired):
                raise error
            elif attempt < ATTEMPTS:
                logger.warning("%s: its worker %s; begun again", case.query, _ending(error.exitcode))
                begin(case, attempt + 1)
            else:
                reason = f"its worker {_ending(error.exitcode)}, {attempt} times; if memory ran out, use fewer workers"
                yield work.give_up(case, f"{reason} or crop the scan", attempt)


def _pass_on(reports: Any, cases: dict[str, Case], watcher: Watcher) -> None:
    while True:
        try:
            report = reports.get_nowait()
        except queue.Empty:
            return
        if isinstance(report, logging.LogRecord):
            logging.getLogger(report.name).handle(report)
        elif report[1] is None:
            watcher.begun(cases[report[0]])
        else:
            watcher.stage(cases[report[0]], report[1])


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended by itself (exit code {code})"


# In the worker

_reports: Any = None


def _start_worker(reports: Any, gpus: Any) -> None:
    """Take a GPU, and end with the process that began the run."""
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    if gpus is not None:
        # Handed round, so that the worker that replaces a dead one gets the next.
        gpu = gpus.get()
        gpus.put(gpu)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    handler = logging.handlers.QueueHandler(reports)
    handler.setLevel(logging.WARNING)
    logging.getLogger(_PACKAGE).addHandler(handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run_case(work: SegmentWork, case: Case, attempt: int) -> Row:
    task = opened(work)
    _reports.put((case.name, None))
    return task(case, attempt, lambda stage: _reports.put((case.name, stage)))


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """Raise, so that nothing half-written is left."""
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
