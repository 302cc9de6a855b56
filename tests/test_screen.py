"""What the program shows: help, tables that fit, progress in terminals and pipes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from atlassegfm.cli import session as session_module
from atlassegfm.cli.app import app
from atlassegfm.cli.session import Session, print_table
from atlassegfm.core.image import save_volume
from atlassegfm.core.progress import GATE_STEPS, QUERY_STEPS, Steps, query_steps, stage_printer
from atlassegfm.core.text import counted, did_you_mean, duration
from conftest import Run
from scenes import ATLAS, PAPER_GATE, QUERY, STRUCTURES, UNREGISTERED, straight_grid

pty = pytest.importorskip("pty", reason="no terminals to pretend")

FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*path, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))
GROUPS = [path for path, command in COMMANDS.items() if hasattr(command, "commands")]


# Help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_readable(path: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run(*path, "-h")
    assert outcome.code == 0, outcome.err
    assert outcome.out == run(*path, "--help").out
    assert outcome.out.startswith(f"Usage: {' '.join(('atlassegfm', *path))} ")
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert not re.search(r"<\w+|list\[|[{}]|\[\[|\.\.\.\.", outcome.out)
    for parameter in COMMANDS[path].params:
        assert parameter.help, parameter.name
        # Help stands alone: it does not lean on the option before it.
        assert not re.match(r"(the same|its|their|of (?!more)|then)\b", parameter.help, re.IGNORECASE), parameter.help


@pytest.mark.parametrize("path", [path for path in GROUPS if path != ("models",)], ids=" ".join)
def test_a_group_alone_prints_its_help_on_its_lines(path: tuple[str, ...], run: Run) -> None:
    outcome = run(*path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == run(*path, "-h").out
    # Sentences of subcommands are not cut.
    for name, command in COMMANDS[path].commands.items():
        sentence = command.get_short_help_str(limit=1000)
        assert f"{name} {sentence}" in " ".join(outcome.err.split())


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["sgment"], "'segment'"),
        (["Segment"], "'segment'"),
        (["models", "fech"], "'fetch'"),
        (["benchmark", "engine"], "'engines'"),
        (["check", "x", "--contxt", "y"], "'--context'"),
        (["evaluate", "--prde", "y"], "'--pred'"),
        (["models", "show", "medsam"], "'medsam2'"),
        (["settings", "--set", "fusion.gte=paper"], "'fusion.gate'"),
        (["settings", "--set", "fusion.gate=papr"], "'paper'"),
        (["convert", "x", "-o", "y", "--to", "rtstuct"], "'rtstruct'"),
    ],
)
def test_a_misspelt_word_is_asked_about(arguments: list[str], meant: str, run: Run) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert f"did you mean {meant}?" in line


def test_a_usage_error_names_the_help_to_read(run: Run) -> None:
    assert run("segment").err.endswith("; see atlassegfm segment -h\n")
    assert run("models", "nothing").err.endswith("; see atlassegfm models -h\n")


def test_completion_is_there(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "SHELL": "/bin/bash",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }

    def call(*arguments: str, **more: str) -> str:
        command = [sys.executable, "-m", "atlassegfm", *arguments]
        ended = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "_ATLASSEGFM_COMPLETE" in call("--show-completion", "bash")
    assert "atlassegfm" in call("--install-completion", "bash")
    assert any("atlassegfm" in path.name for path in tmp_path.rglob("*") if path.is_file())
    asked = {"_ATLASSEGFM_COMPLETE": "complete_bash", "COMP_WORDS": "atlassegfm se", "COMP_CWORD": "1"}
    assert call(**asked).split() == ["segment", "serve", "settings"]
    asked |= {"COMP_WORDS": "atlassegfm segment --rep", "COMP_CWORD": "2"}
    assert call(**asked).split() == ["--report"]


# Tables


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_tables_fit_the_screen(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    long = "review: liver, spleen and 3 more; the mirror image fits the atlas better by 12 % and more of such words"
    rows = [("sub-01_ses-02_task-rest_run-01_T1w", "done", "1200.25", long), ("肝臓", "failed", "3.5", "")]
    print_table(("case", "state", "seconds", ""), rows, numbers_from=2, numbers_to=3)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    assert "1200.25" in text
    assert set(long.split()) <= set(text.split())
    if columns == 200:
        assert len(lines) == 3
        # Wide characters take two columns: numbers stay below each other.
        assert lines[1].index("1200.25") + 7 == lines[2].index("3.5") + 3 + 2


@pytest.mark.parametrize("arguments", [["models"], ["models", "list"]])
def test_lists_fit_80_columns(arguments: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run(*arguments).out.splitlines())) <= 80


def test_words_agree() -> None:
    assert [counted(n, "case") for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]
    assert counted(2, "query", "queries") == "2 queries"
    assert [duration(seconds) for seconds in (3, 119, 150, 7200, 9000)] == ["3 s", "119 s", "2 min", "2 h", "2 h"]
    assert did_you_mean("nothing like it", ["liver"]) == ""


# Progress


def test_steps_tell_which_of_how_many_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    steps = Steps({"read": 1.0, "fit": 0.0, "fit: coarse": 1.0, "fit: fine": 2.0, "write": 1.0})
    assert (steps.begin("read"), steps.left) == ("1 of 3", None)
    now[0] = 2.0
    assert (steps.begin("fit"), steps.left) == ("2 of 3", pytest.approx(8))
    now[0] = 6.0
    assert (steps.begin("fit: fine"), steps.left) == ("2 of 3", pytest.approx(9))
    now[0] = 8.0
    assert (steps.begin("fit: unheard of"), steps.left) == ("2 of 3", pytest.approx(7))
    now[0] = 99.0
    assert steps.left == 0
    assert steps.begin("something else") == ""
    # An earlier result tells the time left from the first moment.
    assert Steps({"read": 1.0, "fit": 9.0}, seconds=50.0).left == 50


def test_usual_steps_are_those_of_the_method() -> None:
    stages = [*dict.fromkeys(name.partition(": ")[0] for name in QUERY_STEPS)]
    assert stages == ["registration", "warping", "model", "gate", "fusion", "quality"]
    assert not {"gate", *GATE_STEPS} & query_steps(model=True, gate=False).keys()
    assert not {"gate", "model"} & query_steps(model=False, gate=True).keys()


def test_python_shows_steps_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    show = stage_printer({"read": 1.0, "fit": 1.0})
    for stage in ("read", "fit", "fit: coarse"):
        show(stage)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ s\]|, about.*left", "", line).split("] ")[-1].split("[")[-1].strip() for line in lines] == [
        "read (1 of 2)",
        "fit (2 of 2)",
    ]


def _piped(monkeypatch: pytest.MonkeyPatch, now: list[float]) -> tuple[Session, io.StringIO]:
    monkeypatch.setattr(session_module.time, "monotonic", lambda: now[0])
    written = io.StringIO()
    return Session(Console(file=written), None, quiet=False), written


def test_in_a_pipe_nothing_is_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    session, written = _piped(monkeypatch, now)
    session.begin_pair(1, 3, "a")
    for second in range(1, 31):
        now[0] = float(second)
        session.progress(f"fit: part {second}")
    session.advance("3 done, 5 left")
    now[0] = 60.0
    session.begin_pair(2, 3, "b")
    session.advance("4 done, 4 left")
    lines = written.getvalue().splitlines()
    assert lines == [
        *("[1/3] a", "[1/3] a fit: part 10", "[1/3] a fit: part 20", "[1/3] a fit: part 30"),
        "[2/3] b, about 2 min left",
    ]


TERMINAL = """
import sys, time
from atlassegfm.cli.session import open_session
from atlassegfm.core.progress import Steps
with open_session(quiet=False) as session:
    session.note("2 kept, 3 to do")
    session.begin(1, 1, "a_very_long_name_of_a_case_" * 5)
    session.steps = Steps({"reading": 1.0, "registration": 9.0}, seconds=500)
    session.progress("reading")
    time.sleep(0.3)
    session.progress("registration")
    time.sleep(0.3)
print("table")
"""


@pytest.mark.parametrize("columns", [40, 80])
def test_in_a_terminal_the_time_is_never_cut(columns: int) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", TERMINAL], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert child.wait(30) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    bars = [line for line in re.split(r"[\r\n]+", text) if "a_very" in line]
    assert bars
    assert all(re.search(r" 0:00:0\d about \d+ (min|s) left +a_very", line) for line in bars)
    assert max(map(len, bars)) <= columns
    assert "2 kept, 3 to do" in text
    # The result comes after the bar has gone.
    assert "table" in re.split(r"[\r\n]+", text.strip())[-1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    grid = straight_grid((24, 20, 18), (4.0, 4.0, 4.0))
    save_volume(ATLAS.scan(grid), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    save_volume(QUERY.scan(grid), tmp_path / "query.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_single_query_counts_its_steps(folder: Path, run: Run) -> None:
    arguments = ("segment", "--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz", "query.nii.gz", "-o", "out", *FAST)
    for more, count in (((), 8), (("--model", "none"), 6)):
        outcome = run(*arguments, *more)
        assert outcome.code == 0, outcome.err
        found = re.findall(rf"^query (\w+) \((\d) of {count}", outcome.err, re.MULTILINE)
        assert [int(number) for _, number in found] == list(range(1, count + 1))
        assert (found[0][0], found[-1][0]) == ("reading", "writing")


def test_customize_counts_its_steps(folder: Path, run: Run) -> None:
    outcome = run("customize", "--atlas", "atlas.nii.gz", "--labels", "labels.nii.gz", "-o", "ctx", *FAST)
    assert outcome.code == 0, outcome.err
    assert re.findall(r"\((\d) of (\d)", outcome.err) == [("1", "3"), ("2", "3"), ("3", "3")]
