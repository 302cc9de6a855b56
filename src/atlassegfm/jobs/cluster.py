"""Cases on several machines, by Dask: ``dask.distributed``, and ``dask-jobqueue`` for Slurm.

Both come with the extra "cluster" and are imported late. A worker runs one case at a time; context and model are
loaded once for each worker process.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

from ..core.config import toml_value
from ..core.errors import InputError
from ..core.extras import require
from ..core.parallel import changed_environment
from .plan import Case
from .pool import ATTEMPTS
from .work import Row, SegmentWork, Watcher, opened

logger = logging.getLogger(__name__)

EXTRA = "cluster"
#: What a Slurm job asks for, where the user says nothing else: one case of an abdomen takes up to 1.3 GB.
_SLURM_DEFAULTS: Mapping[str, Any] = {"memory": "4GB", "walltime": "04:00:00", "job_name": "atlassegfm"}
#: Options of ``dask_jobqueue.SLURMCluster`` that a user may set; the others follow from one case at a time.
SLURM_OPTIONS = (
    *("account", "death_timeout", "interface", "job_directives_skip", "job_extra_directives", "job_name"),
    *("job_script_prologue", "local_directory", "log_directory", "memory", "python", "queue", "scheduler_options"),
    *("shebang", "walltime", "worker_extra_args"),
)
#: Of these there may be several.
_LISTS = ("job_directives_skip", "job_extra_directives", "job_script_prologue", "worker_extra_args")
#: Seconds in which a scheduler has to answer.
_CONNECT_SECONDS = 10
#: Seconds between looks at how many workers there are.
_LOOK_SECONDS = 1.0
#: Any free port: two runs on one machine must not get into each other's way.
_DASHBOARD = ":0"
#: Dask's own settings for clusters begun here: a case whose worker dies comes back at once, to be begun again as
#: elsewhere; and no case waits at a worker that is at another.
_DASK_SETTINGS = {"distributed.scheduler.allowed-failures": 0, "distributed.scheduler.worker-saturation": 1.0}


def require_cluster(kind: str) -> None:
    """Check that the kind of cluster is known and its packages are installed.

    InputError if ``kind`` is none of "local", "slurm" and an address; MissingExtraError if the extra is not installed.
    """
    if kind not in ("local", "slurm") and "://" not in kind:
        raise InputError(f"--cluster {kind}: expected local, slurm, or the address of a scheduler as tcp://HOST:PORT")
    require(f"--cluster {kind}", EXTRA, "distributed", *(["dask_jobqueue"] if kind == "slurm" else []))


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse options of a Slurm cluster; InputError if one has no "=" or its key is not in :data:`SLURM_OPTIONS`.

    Each is ``key=value``; values as in TOML, quotes may be left out. Repeated, those of a list add up.
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or key not in SLURM_OPTIONS:
            raise InputError(
                f"--cluster-option {assignment}: expected key=value with one of the keys {', '.join(SLURM_OPTIONS)}"
            )
        value = toml_value(text)
        if key in _LISTS:
            options.setdefault(key, []).extend(value if isinstance(value, list) else [str(value)])
        else:
            options[key] = value if isinstance(value, int | dict) else str(value)
    return options


def slurm_cluster(work: SegmentWork, options: Mapping[str, Any], *, threads: int, gpu: bool) -> Any:
    """Build a ``SLURMCluster`` whose workers are jobs of one case with so many cores; none is submitted yet.

    ``options`` are some of :data:`SLURM_OPTIONS`. With ``gpu`` each job asks for one, unless ``job_extra_directives``
    do. MissingExtraError if the extra is not installed; InputError if Dask refuses an option.
    """
    require_cluster("slurm")
    import dask
    from dask_jobqueue.slurm import SLURMCluster

    chosen = {**_SLURM_DEFAULTS, **options}
    directives = list(chosen.pop("job_extra_directives", []))
    if gpu and not any("gres" in one or "gpu" in one for one in directives):
        directives.append("--gres=gpu:1")
    prologue = [f"export {name}={value}" for name, value in work.environment.items()]
    scheduler = {"dashboard_address": _DASHBOARD, **chosen.pop("scheduler_options", {})}
    try:
        with dask.config.set(_DASK_SETTINGS):
            return SLURMCluster(
                cores=1,
                processes=1,
                job_cpu=threads,
                job_extra_directives=directives,
                job_script_prologue=[*prologue, *chosen.pop("job_script_prologue", [])],
                scheduler_options=scheduler,
                **chosen,
            )
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise InputError(f"--cluster slurm: the cluster cannot be made ({error}); check --cluster-option") from None


def run_on_cluster(
    work: SegmentWork,
    cases: Sequence[Case],
    watcher: Watcher,
    *,
    kind: str,
    workers: int,
    threads: int = 1,
    gpu: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Generator[Row, None, None]:
    """Run the cases on a Dask cluster; yields as they end.

    ``kind`` is "local", "slurm" or the address of a scheduler that runs, for which ``workers`` (processes or jobs to
    begin) is not used; the others as for :func:`slurm_cluster`. AtlasSegError if there is no cluster, or no worker.
    """
    require_cluster(kind)
    work = work.absolute()
    with _client(work, kind, min(workers, len(cases)), threads=threads, gpu=gpu, options=options or {}) as client:
        yield from _feed(client, work, cases, watcher)


@contextmanager
def _client(
    work: SegmentWork, kind: str, workers: int, *, threads: int, gpu: bool, options: Mapping[str, Any]
) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    if "://" in kind:
        try:
            client = Client(kind, timeout=_CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(f"--cluster {kind}: no scheduler answers there ({error}); check the address") from None
        with client:
            yield client
        return
    if kind == "slurm":
        cluster = slurm_cluster(work, options, threads=threads, gpu=gpu)
        # Jobs that end before their time, at their time limit above all, are followed by others.
        cluster.adapt(minimum_jobs=workers, maximum_jobs=workers)
    else:
        # Dask's own variables for new processes give way to those that are set.
        with dask.config.set(_DASK_SETTINGS), changed_environment(work.environment):
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=None,
                dashboard_address=_DASHBOARD,
                silence_logs=logging.CRITICAL,  # what matters of them is reported here
                env=dict(work.environment),
            )
    with cluster, Client(cluster) as client:
        yield client


def _feed(client: Any, work: SegmentWork, cases: Sequence[Case], watcher: Watcher) -> Iterator[Row]:
    """Submit as many cases as there are workers, and another for each that ends."""
    from distributed import wait
    from distributed.scheduler import KilledWorker

    queue = deque((case, 1) for case in cases)
    running: dict[Any, tuple[Case, int]] = {}
    try:
        while queue or running:
            places = max(1, len(client.nthreads()))
            while queue and len(running) < places:
                case, attempt = queue.popleft()
                watcher.begun(case)
                future = client.submit(
                    _do, work, case.absolute(), attempt, key=f"{case.name}-{attempt}-{work.key}", pure=False
                )
                running[future] = (case, attempt)
            try:
                ended = wait(list(running), timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                continue
            for future in ended:
                case, attempt = running.pop(future)
                error = future.exception() if future.status == "error" else None
                if isinstance(error, KilledWorker) or future.status in ("lost", "cancelled"):
                    if attempt < ATTEMPTS:
                        logger.warning("%s: its worker died; begun again", case.query)
                        queue.appendleft((case, attempt + 1))
                        continue
                    reason = f"its worker died, {attempt} times; if memory ran out, use larger ones or crop the scan"
                    yield work.give_up(case, reason, attempt)
                elif error is not None:
                    raise error
                else:
                    yield replace(future.result(), case=case)
    finally:
        client.cancel(list(running))


#: PyTorch's random numbers and switches belong to the process: one case at a time in each.
_one_at_a_time = Lock()


def _do(work: SegmentWork, case: Case, attempt: int) -> Row:
    with _one_at_a_time:
        return opened(work)(case, attempt, lambda _: None)
