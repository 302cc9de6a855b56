"""Four clients of two protocols at once, two of which are killed: nothing is lost or mixed, and memory is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
pytest.importorskip("httpx")
pytest.importorskip("blosc2", reason="the extra 'nninteractive-client' is not installed")
from atlassegfm.core.image import load_labels, save_volume
from result_folders import write_result
from scenes import QUERY, STRUCTURES, straight_grid
from serve_client import SHAPE, pattern

SECONDS = float(os.environ.get("ATLASSEGFM_LOAD_SECONDS", "15"))
#: Seconds that an answer may take; where others keep the cores busy, as much longer as that takes.
SLOWEST = 10 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
#: Protocol and case of each; the last two are killed.
CLIENTS = (("monailabel", "a"), ("nninteractive", "a"), ("monailabel", "b"), ("nninteractive", ""))


def resident_mb(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of another process is read from /proc")
def test_four_clients_of_which_two_are_killed(tmp_path: Path) -> None:
    scans, out, grid = tmp_path / "scans", tmp_path / "out", straight_grid(SHAPE)
    scans.mkdir()
    for name in "abcde":
        save_volume(QUERY.scan(grid), scans / f"{name}.nii.gz")
        write_result(out / name, 0, keep=False)
        save_volume(QUERY.labels(grid), out / name / "segmentation.nii.gz", structures=STRUCTURES)
    command = [sys.executable, "-m", "atlassegfm", "serve", "--review-only", "--scans", str(scans), "-o", str(out)]
    server = subprocess.Popen([*command, "--no-open", "--port", "0", "--json", "-q"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        script = str(Path(__file__).with_name("serve_client.py"))
        people = [
            subprocess.Popen(
                [sys.executable, script, url, protocol, case, str(seed), str(SECONDS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed, (protocol, case) in enumerate(CLIENTS)
        ]
        time.sleep(SECONDS / 2 + 5)
        memory = resident_mb(server.pid)
        for one in people[2:]:
            assert one.poll() is None, one.communicate()
            one.kill()
        said: list[list[dict[str, Any]]] = []
        for one in people:
            printed, errors = one.communicate(timeout=SECONDS + 120)
            assert one in people[2:] or one.returncode == 0, errors
            said.append([json.loads(line) for line in printed.splitlines()])
        assert resident_mb(server.pid) < 1.5 * memory + 100
    finally:
        server.terminate()
        server.communicate()
    for lines in said[:2]:
        assert lines[-1]["done"]
        assert lines[-1]["requests"] > SECONDS * 10 / SLOWEST / 3
        assert lines[-1]["slowest"] < SLOWEST
        print(lines[-1])  # noqa: T201  (pytest -rP shows the figures)
    values = np.array([0, 1, 7, 12], np.uint8)

    def stored(case: str) -> np.ndarray:
        return load_labels(out / case / "segmentation.nii.gz").data

    assert np.array_equal(stored("a"), values[pattern(said[0][-1]["last"])])
    # Of the killed one, the last label or the one before: nothing in between.
    sent = [line["sent"] for line in said[2]][-2:]
    assert any(np.array_equal(stored("b"), values[pattern(one)]) for one in sent)
    untouched = QUERY.labels(grid).data
    assert all(np.array_equal(stored(case), untouched) for case in "cde")
