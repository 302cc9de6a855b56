"""Cohorts on Dask clusters: processes here, one of which is killed, and Slurm jobs."""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atlassegfm.core.errors import InputError, MissingExtraError
from atlassegfm.jobs import Case
from atlassegfm.jobs import run as run_jobs
from atlassegfm.jobs.cluster import parse_options, require_cluster, run_on_cluster, slurm_cluster
from conftest import Run
from standin import Silent, StandIn
from test_cohort import COMMAND, FAST, content_of, folder, rows_of  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def dask_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Dask writes beside what runs it, and closes what it has opened when it is collected."""
    import dask

    monkeypatch.chdir(tmp_path)
    with dask.config.set({"temporary-directory": str(tmp_path / "dask")}):
        yield
    gc.collect()


def collect(work: StandIn, names: list[str], **options: Any) -> dict[str, Any]:
    cases = [Case(name, Path(f"{name}.nii")) for name in names]
    runner = functools.partial(run_on_cluster, **options)
    return run_jobs(cases, work, runner, Silent()).rows


def test_a_worker_of_two_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a", "deadly", *"bcdef"]
    rows = collect(StandIn(tmp_path, seconds=0.1), names, kind="local", workers=2)
    assert {name: row.state for name, row in rows.items()} == dict.fromkeys(names, "done")
    assert {name: row.attempts for name, row in rows.items()} == {**dict.fromkeys(names, 1), "deadly": 2}
    begun = [line.split() for line in (tmp_path / "begun.txt").read_text().splitlines()]
    assert sorted(f"{name} {attempt}" for name, attempt, *_ in begun) == sorted(
        [*(f"{name} 1" for name in names), "deadly 2"]
    )
    assert len({process for _, _, process, _ in begun}) >= 2
    opened = [line.split()[1] for line in (tmp_path / "opened.txt").read_text().splitlines()]
    assert 2 <= len(opened) <= 3  # the last one may come when all is done
    assert set(opened) == {"1"}
    assert "deadly.nii: its worker died; begun again" in [record.getMessage() for record in caplog.records]
    assert all(row.case.query == Path(f"{name}.nii") for name, row in rows.items())


@pytest.mark.slow
def test_a_case_that_kills_every_worker_fails_alone(tmp_path: Path) -> None:
    rows = collect(StandIn(tmp_path), ["fatal", "a", "b"], kind="local", workers=1)
    assert {name: row.state for name, row in rows.items()} == {"fatal": "failed", "a": "done", "b": "done"}
    assert rows["fatal"].reason == "its worker died, 2 times; if memory ran out, use larger ones or crop the scan"


def test_workers_that_cannot_begin_say_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^atlas\.nii\.gz: no such file$"):
        collect(StandIn(tmp_path, refuses=True), ["a"], kind="local", workers=1)


@pytest.mark.slow
def test_segment_on_a_local_cluster_gives_the_same_bytes(folder: Path, run: Run) -> None:  # noqa: F811
    os.chdir(folder)
    assert run(*COMMAND[:-1], "once", *FAST).code == 0
    (folder / "scans/damaged.nii.gz").write_bytes(b"no scan")
    outcome = run(*COMMAND, *FAST, "--cluster", "local", "--workers", "2")
    assert outcome.code == 1, outcome.err
    assert "error: scans/damaged.nii.gz: " in outcome.err
    written = {name: data for name, data in content_of(folder / "out").items() if not name.startswith("damaged")}
    assert written == content_of(folder / "once")
    assert rows_of(folder / "out")["case0"]["attempts"] == 1
    assert "3 of 4 kept" in run(*COMMAND, *FAST).err


def test_nobody_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlassegfm.jobs.cluster._CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=r"^--cluster tcp://127\.0\.0\.1:1: no scheduler answers there"):
        collect(StandIn(tmp_path), ["a"], kind="tcp://127.0.0.1:1", workers=1)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    require_cluster("local")
    with pytest.raises(MissingExtraError, match="--cluster slurm needs the extra 'cluster'"):
        require_cluster("slurm")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match="--cluster local needs"):
        require_cluster("local")


def test_options() -> None:
    assert parse_options(
        [
            "queue=long",
            "memory=8GB",
            "job_extra_directives=--gres=gpu:a100:1",
            "job_extra_directives=['--nice', '-x n1']",
        ]
    ) == {"queue": "long", "memory": "8GB", "job_extra_directives": ["--gres=gpu:a100:1", "--nice", "-x n1"]}
    assert parse_options(["walltime=02:00:00", "death_timeout=60"]) == {"walltime": "02:00:00", "death_timeout": 60}
    with pytest.raises(
        InputError, match=r"^--cluster-option cores=3: expected key=value with one of the keys account, "
    ):
        parse_options(["cores=3"])


def _script(work: StandIn, options: dict[str, Any], **keywords: Any) -> str:
    with slurm_cluster(work, options, **keywords) as cluster:
        text: str = cluster.job_script()
    return text


def test_job_script(tmp_path: Path) -> None:
    options = parse_options(["queue=gpu", "account=radiology", "walltime=02:00:00", "memory=8GB"])
    lines = _script(StandIn(tmp_path), options, threads=4, gpu=True).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    for line in ("-J atlassegfm", "-p gpu", "-A radiology", "-n 1", "--cpus-per-task=4", "--mem=8G", "-t 02:00:00"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --gres=gpu:1" in lines
    assert "export OMP_NUM_THREADS=1" in lines
    started = shlex.split(lines[-1])
    assert started[1:3] == ["-m", "distributed.cli.dask_worker"]
    # One case at a time in each job, and another worker in the place of one that dies.
    assert started[started.index("--nthreads") + 1] == "1"
    assert "--nanny" in started
    own = _script(StandIn(tmp_path), {"job_extra_directives": ["--gpus=1"]}, threads=1, gpu=True)
    assert "--gpus=1" in own
    assert "--gres" not in own


def test_job_script_of_the_documentation(tmp_path: Path) -> None:
    """The command in the documentation gives the job script in the documentation."""
    text = (ROOT / "docs/how-to/many-scans.md").read_text()
    command = re.search(r"```sh\n(atlassegfm segment [^`]*--cluster slurm[^`]*)```", text)
    script = re.search(r"```sh\n(#!/usr/bin/env bash\n[^`]*dask_worker[^`]*)```", text)
    assert command is not None
    assert script is not None
    words = shlex.split(command.group(1).replace("\\\n", " "))
    given = [words[number + 1] for number, word in enumerate(words) if word == "--cluster-option"]
    from atlassegfm.jobs.work import SegmentWork

    work: Any = SegmentWork(tmp_path, None, None, "cpu", 1, False, None)  # type: ignore[arg-type]
    made = _script(work, parse_options(given), threads=1, gpu="cuda" in words)
    # What differs from machine to machine: the Python, the address, the names of workers and their folder.
    shown = [re.sub(r"^\S*python\S* |tcp://\S+|--name \S+", "", line).strip() for line in script.group(1).splitlines()]
    found = [re.sub(r"^\S*python\S* |tcp://\S+|--name \S+", "", line).strip() for line in made.splitlines()]
    assert [line for line in shown if line] == [line for line in found if line]


def test_refused_options_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^--cluster slurm: the cluster cannot be made \(.*\); check --cluster-option$"
    ):
        slurm_cluster(StandIn(tmp_path), {"interface": "no such"}, threads=1, gpu=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for sbatch")
def test_jobs_of_a_made_up_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sbatch`` here starts the job at once, on this machine; all else is as on a cluster."""
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "jobs.txt"
    _write_program(
        programs / "sbatch",
        f'cp "${{@: -1}}" {tmp_path}/job-$$.sh\nnohup bash {tmp_path}/job-$$.sh > {tmp_path}/job-$$.out 2>&1 &\n'
        f'echo "$!" >> {log}\necho "Submitted batch job $!"\n',
    )
    _write_program(programs / "scancel", 'for job in "$@"; do pkill -P "$job"; kill "$job"; done 2>/dev/null; true\n')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))
    logging.getLogger("distributed").setLevel(logging.ERROR)
    names = ["a", "deadly", "b", "c"]
    rows = collect(
        StandIn(tmp_path),
        names,
        kind="slurm",
        workers=2,
        options={"walltime": "00:10:00", "python": sys.executable, "interface": "lo"},
    )
    assert {name: row.state for name, row in rows.items()} == dict.fromkeys(names, "done")
    assert rows["deadly"].attempts == 2
    assert len(log.read_text().split()) >= 2


def _write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
