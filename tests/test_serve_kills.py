"""The server is killed at random moments: what it said is accepted is there, whole; so is every edit it answered."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.jobs.table import read_run
from result_folders import write_result
from scenes import QUERY, straight_grid

httpx = pytest.importorskip("httpx2")

#: Kills, at a random moment each.
KILLS = int(os.environ.get("ATLASSEGFM_KILLS", "6"))
CLIENTS, NAMES = 4, "abcdefghijkl"


def numbers(client: Any, case: int) -> np.ndarray:
    """Structure numbers of the draft, as the server has them."""
    shape = client.get(f"api/cases/{case}").json()["shape"]
    raw = zlib.decompress(client.get(f"api/cases/{case}/labels/draft").content)
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F")


def work(url: str, cases: list[int], promised: dict[int, np.ndarray], seed: int) -> None:
    """Open each case again, paint, and accept it, until the server is gone; note what it said is accepted."""
    choice = random.Random(seed)
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            for case in cases:
                version = client.get(f"api/cases/{case}").raise_for_status().json()["version"]

                def send(what: str, case: int = case, **body: Any) -> int:
                    answer = client.post(f"api/cases/{case}/{what}", json=body).raise_for_status()
                    return int(answer.json()["version"])

                version = send("reopen", version=version)
                mask = base64.b64encode(zlib.compress(bytes([1]) * 64)).decode()
                for _ in range(3):
                    start = [choice.randrange(40), choice.randrange(30), choice.randrange(30)]
                    edit = {"verb": "paint", "structure": choice.randrange(1, 4), "start": start, "shape": [4, 4, 4]}
                    version = send("edit", version=version, mask=mask, overwrite=True, **edit)
                drawn = numbers(client, case)
                send("accept", version=version)
                promised[case] = drawn
    except (httpx.HTTPError, KeyError, ValueError):
        return


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_accepted_is_lost(tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in NAMES:
        save_volume(QUERY.scan(straight_grid()), scans / f"{name}.nii.gz")
        write_result(out / name, 0)
    command = [sys.executable, "-m", "atlassegfm", "serve", "--review-only", "--scans", str(scans), "-o", str(out)]
    command += ["--no-open", "--port", "0", "--json", "-q"]
    checked = 0
    for kill in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        promised: dict[int, np.ndarray] = {}
        shares = [list(range(n, len(NAMES), CLIENTS)) for n in range(CLIENTS)]
        people = [threading.Thread(target=work, args=(url, share, promised, 100 * kill + share[0])) for share in shares]
        for one in people:
            one.start()
        time.sleep(0.5 + 3 * random.Random(kill).random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for one in people:
            one.join()
        for number, name in enumerate(NAMES):
            run = read_run(out / name)
            labels = load_labels(out / name / "segmentation.nii.gz").canonical().data  # whole, whatever happened
            assert run is not None
            if number in promised:
                assert all(one.review is not None for one in run.structures)
                assert np.array_equal(np.searchsorted((0, 1, 7, 12), labels), promised[number])
                checked += 1
    assert checked > KILLS
