"""The server is killed at random moments, with four people and four workers: what was accepted is there, whole."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
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
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.jobs.table import read_run
from atlassegfm.settings import Settings
from result_folders import write_result
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, straight_grid

httpx = pytest.importorskip("httpx2")

#: Kills, at a random moment each.
KILLS = int(os.environ.get("ATLASSEGFM_KILLS", "6"))
CLIENTS, WORKERS = 4, 4
#: Cases that people correct, and those that the workers segment anew in the meantime.
NAMES, FRESH = "abcdefghijkl", "mnop"


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
                # One that a kill left open is computed again by the run, which locks it.
                if client.post(f"api/cases/{case}/undo", json={"version": version}).status_code == 423:
                    continue
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
@pytest.mark.timeout(1800)
def test_nothing_accepted_is_lost(tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in NAMES + FRESH:
        save_volume(QUERY.scan(straight_grid()), scans / f"{name}.nii.gz")
    for name in NAMES:
        write_result(out / name, 0)
    save_volume(ATLAS.scan(straight_grid()), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(straight_grid()), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    settings = with_overrides(Settings(), ["model=none", *UNREGISTERED])
    Context.from_files(tmp_path / "atlas.nii.gz", tmp_path / "labels.nii.gz", settings=settings).save(tmp_path / "ctx")
    command = [sys.executable, "-m", "atlassegfm", "serve", str(tmp_path / "ctx"), "--scans", str(scans)]
    command += ["-o", str(out), "--workers", str(WORKERS), "--no-open", "--port", "0", "--json", "-q"]

    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())["url"]

    checked = 0
    for kill in range(KILLS):
        process, url = start()
        promised: dict[int, np.ndarray] = {}
        if kill:  # the first time all cases are open, and a run would take them
            httpx.post(f"{url}api/run", timeout=30).raise_for_status()
        shares = [list(range(n, len(NAMES), CLIENTS)) for n in range(CLIENTS)]
        people = [threading.Thread(target=work, args=(url, share, promised, 100 * kill + share[0])) for share in shares]
        for one in people:
            one.start()
        time.sleep(0.5 + 12 * random.Random(kill).random())
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
        for name in FRESH:
            if read_run(out / name) is not None:
                assert load_labels(out / name / "segmentation.nii.gz").data.any()
            shutil.rmtree(out / name, ignore_errors=True)
    assert checked > KILLS
    # What was left goes on as if nothing had been.
    process, url = start()
    httpx.post(f"{url}api/run", timeout=30).raise_for_status()
    while (run := httpx.post(f"{url}api/state", json={"client": "x"}, timeout=30).json()["run"])["state"] == "running":
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert (run["state"], run["counts"]["failed"]) == ("done", 0), run
    assert all(load_labels(out / name / "segmentation.nii.gz").data.any() for name in FRESH)
