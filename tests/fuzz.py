"""Seeded random damage to files, put through ``check``, ``segment --model none`` and ``evaluate``.

``python tests/fuzz.py`` runs 300 seeds and prints those that fail; ``--seed N`` replays one and shows what the program
said, ``--keep DIR`` keeps its files there.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from atlassegfm.cli.app import main
from atlassegfm.core.image import load_image, load_volume
from atlassegfm.dicom import load_series
from atlassegfm.records import RESULT_NAMES, RUN, STATUS
from damage import Damaged, damage, make_base
from scenes import PAPER_GATE, UNREGISTERED

FAST = [part for assignment in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", assignment)]
#: Seconds that a command may take.
LIMIT = 60


class HangError(BaseException):
    """A command takes too long; no Exception, so that no case takes it for a failure of its own."""


@dataclass(frozen=True)
class Said:
    """End of a command: exit code (None: an exception), what it printed, and what was wrong with it."""

    command: str
    code: int | None
    out: str
    err: str
    faults: tuple[str, ...]


def call(*arguments: str | Path) -> Said:
    """Run the program in this process."""
    code, faults = None, []
    before = sys.argv
    sys.argv = ["atlassegfm", *map(str, arguments)]
    with _captured() as texts, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(LIMIT)
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
            if code >= 128:  # ended from outside
                raise
        except HangError:
            faults.append(f"still running after {LIMIT} s: {traceback.format_exc(limit=-8)}")
        except BaseException:  # noqa: BLE001  (what a user would see as a traceback)
            faults.append(traceback.format_exc(limit=-5))
        finally:
            signal.alarm(0)
            sys.argv = before
    out, err = texts
    for text in (out, err):
        marks = [mark for mark in ("Traceback", "unexpected error", "WARNING: In") if mark in text]
        faults += [f"printed {marks[0]!r}: {text[-1000:]}"] if marks else []
    faults += [f"Python's warning: {one.message} ({one.filename}:{one.lineno})" for one in warned]
    if code not in (0, 1, 2) and not faults:
        faults.append(f"exit code {code}")
    return Said(" ".join(map(str, arguments)), code, out, err, tuple(faults))


def _hang(*_: object) -> None:
    raise HangError


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Capture what Python and the libraries below it print: standard output and error."""
    texts: list[str] = []
    saved = [os.dup(1), os.dup(2)]
    streams = sys.stdout, sys.stderr
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        try:
            yield texts
        finally:
            sys.stdout, sys.stderr = streams
            for number, file in enumerate((out, err), start=1):
                file.flush()
                os.dup2(saved[number - 1], number)
                os.close(saved[number - 1])
                file.seek(0)
                texts.append(file.read())


def try_seed(base: Path, folder: Path, seed: int) -> tuple[Damaged, list[Said], list[str]]:
    """Damage input and put it through the commands; returns what they said and all faults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that write the damage
        damaged = damage(base, folder, seed)
    path, out = damaged.path, folder / "out"
    before = _listing(folder)
    style = ["--json"] if seed % 2 else []
    atlas = ("--atlas", base / "atlas.nii.gz", "--labels", base / "labels.nii.gz")
    if damaged.is_labels:
        scan = damaged.series or base / "atlas.nii.gz"
        segment = ("--atlas", scan, "--labels", path, base / "query.nii.gz")
    else:
        segment = (*atlas, path)
    on = ["--scan", damaged.series, "--labels", "*"] if damaged.series else []
    pair = ("--pred", path, "--ref", base / "labels.nii.gz")
    if seed % 3 == 0:
        pair = ("--pred", base / "labels.nii.gz", "--ref", path)
    scores = folder / "scores.csv"
    said = [
        call("check", *([damaged.series] if damaged.series else []), path, *style),
        call("segment", *segment, "-o", out, "--model", "none", *FAST, *style),
        call("evaluate", *pair, *on, "-o", scores, *style),
    ]
    faults = [f"{one.command.split()[0]}: {fault}" for one in said for fault in one.faults]
    for one in said:
        if one.code and not any(name in one.out + one.err for name in damaged.names):
            faults.append(f"{one.command.split()[0]}: no name of the file in the refusal: {one.out}{one.err}")
        if style and not one.code and one.out:
            json.loads(one.out, parse_constant=_no_constant)
    if (said[2].code == 0) != scores.is_file():
        faults.append(
            f"evaluate: exit code {said[2].code}, and {scores.name} is{' not' * (not scores.is_file())} there"
        )
    faults += _faults_in(out, damaged, said[1].code)
    if said[0].code == 0 and said[1].code and not damaged.is_labels:
        faults.append(f"check finds no error, and segment refuses: {said[1].err}")
    if said[0].code == 2 and said[1].code == 0 and not damaged.is_labels:
        faults.append(f"check finds an error, and segment takes the file: {said[0].out[:3000]}")
    scores.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    if _listing(folder) != before:
        faults.append(f"files changed: {set(_listing(folder)) ^ set(before)}")
    return damaged, said, faults


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} in JSON")


def _listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file())


def _faults_in(out: Path, damaged: Damaged, code: int | None) -> list[str]:
    """What is half-written in the folder of results, or wrong with a result."""
    faults = [f"left over: {path}" for path in out.rglob(".writing-*")]
    for folder in (path for path in out.glob("*") if path.is_dir()):
        names = {path.name for path in folder.iterdir()}
        status = json.loads((folder / STATUS).read_text(), parse_constant=_no_constant) if STATUS in names else {}
        whole = {RUN, STATUS, "segmentation.nii.gz", "colors.ctbl", "labels.txt"}
        if names != ({STATUS} if status.get("state") == "failed" else whole) or not names <= RESULT_NAMES:
            faults.append(f"half written ({status.get('state')}): {sorted(names)}")
        elif RUN in names:
            json.loads((folder / RUN).read_text(), parse_constant=_no_constant)
            result = load_volume(folder / "segmentation.nii.gz")
            query = load_series(damaged.path) if damaged.path.is_dir() else None
            if not damaged.is_labels and not result.grid.matches((query or load_image(damaged.path)).grid):
                faults.append("the result is not on the voxels of the query")
    if code == 0 and not list(out.glob(f"*/{RUN}")):
        faults.append("segment: exit code 0 without a result")
    return faults


def run_seeds(seeds: Sequence[int], folder: Path, show: bool = False) -> dict[int, list[str]]:
    """Try seeds, and return the faults of those that have any."""
    base, failed = make_base(folder / "base"), {}
    for seed in seeds:
        place = folder / f"seed-{seed}"
        place.mkdir()
        faulthandler.dump_traceback_later(3 * LIMIT + 30, exit=True)
        start = time.perf_counter()
        try:
            damaged, said, faults = try_seed(base, place, seed)
        except Exception:  # noqa: BLE001  (of this program, or of reading a result)
            failed[seed] = [traceback.format_exc()]
            continue
        finally:
            faulthandler.cancel_dump_traceback_later()
        if faults:
            failed[seed] = [f"{damaged.path.name}: {'; '.join(damaged.story)}", *faults]
        if show:
            codes = "/".join(str(one.code) for one in said)
            seconds, what = time.perf_counter() - start, f"{damaged.path.name}: {'; '.join(damaged.story)}"
            sys.stdout.write(f"{seed:6} {codes} {seconds:5.1f} s  {what}\n")
            sys.stdout.flush()
        if show and len(seeds) == 1:
            sys.stdout.write("\n".join(f"$ atlassegfm {one.command}\n{one.out}{one.err}" for one in said))
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--keep", type=Path, help="keep the files in this folder, which must not exist")
    given = parser.parse_args()
    chosen = range(given.first, given.first + given.seeds) if given.seed is None else [given.seed]
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as scratch:
        failures = run_seeds(chosen, given.keep or Path(scratch), show=True)
    for number, reasons in failures.items():
        sys.stdout.write(
            f"\nseed {number} failed (python tests/fuzz.py --seed {number}):\n" + "\n".join(reasons) + "\n"
        )
    sys.stdout.write(f"\n{len(chosen) - len(failures)} of {len(chosen)} seeds passed\n")
    sys.exit(bool(failures))
