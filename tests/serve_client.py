"""A client of ``atlassegfm serve`` that does things at random, as a program of its own that can be killed.

``python serve_client.py URL PROTOCOL CASE SEED SECONDS`` prints a line of JSON before each label that it sends, and at
the end.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from atlassegfm.core.image import Volume, load_volume, save_volume
from scenes import QUERY, straight_grid

SHAPE = (24, 20, 18)
INFO = [{"name": name, "idx": n} for n, name in enumerate(("liver", "kidney", "node"), start=1)]


def pattern(seed: int) -> np.ndarray:
    """Labels from 0 to 3 that no other seed has."""
    return np.random.default_rng(seed).integers(0, 4, SHAPE, np.uint8)


def say(**content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def volume_of(content: bytes) -> Volume:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.nrrd").write_bytes(content)
        return load_volume(Path(folder) / "x.nrrd")


def monailabel(url: str, case: str, choice: random.Random, end: float) -> None:
    """Look, infer, click and submit one case, and look at others."""
    slowest, requests, sent, http = 0.0, 0, -1, httpx.Client(base_url=url, timeout=120)
    last: np.ndarray | None = None
    while time.monotonic() < end:
        begun = time.monotonic()
        verb = choice.choice(("info", "list", "next", "infer", "click", "submit", "submit", "review"))
        if verb == "info":
            answer = http.get("info/")
        elif verb == "list":
            answer = http.get("datastore/", params={"output": "all"})
        elif verb == "next":
            answer = http.post("activelearning/random", json={})
        elif verb == "infer":
            answer = http.post(f"infer/atlassegfm?image={case}&output=image", files={"params": (None, "{}")})
            if last is not None:
                assert np.array_equal(volume_of(answer.content).data, last)
        elif verb == "click":
            ijk = [choice.randrange(n) for n in SHAPE]
            params = json.dumps({"label": "liver", "foreground": [ijk], "background": []})
            answer = http.post(f"infer/correct?image={case}&output=image", files={"params": (None, params)})
            assert set(np.unique(volume_of(answer.content).data)) <= {0, 1}
        elif verb == "review":
            meta = json.dumps({"segmentationMeta": {"status": "flagged", "comment": case}})
            answer = http.put(f"datastore/updatelabelinfo?label={case}", files={"params": (None, meta)})
            assert answer.json()["segmentationMeta"]["comment"] == case
        else:
            sent = choice.randrange(1_000_000)
            with tempfile.TemporaryDirectory() as folder:
                save_volume(Volume(pattern(sent), straight_grid(SHAPE)), Path(folder) / "x.nii.gz")
                content = (Path(folder) / "x.nii.gz").read_bytes()
            say(sent=sent)
            params = json.dumps({"label_info": INFO, "client_id": case})
            files = {"params": (None, params), "label": ("x.nii.gz", content)}
            answer = http.put(f"datastore/label?image={case}", files=files)
            last = pattern(sent)
        answer.raise_for_status()
        slowest, requests = max(slowest, time.monotonic() - begun), requests + 1
    say(done=True, requests=requests, slowest=slowest, last=sent)


def nninteractive(url: str, case: str, choice: random.Random, end: float) -> None:
    """Prompt on a scan of a case, or on one that nobody knows."""
    from nnInteractive.inference.remote.remote_session import nnInteractiveRemoteInferenceSession

    slowest, requests, grid = 0.0, 0, straight_grid(SHAPE)
    scan = QUERY.scan(grid).data if case else np.random.default_rng(choice.randrange(99)).random(SHAPE, np.float32)
    with nnInteractiveRemoteInferenceSession(url) as session:
        session.set_image(scan[None], {"spacing": [2.0] * 3})
        session.set_target_buffer(np.zeros(SHAPE, np.uint8))
        mask = np.zeros(SHAPE, np.uint8)
        while time.monotonic() < end:
            begun = time.monotonic()
            ijk = [choice.randrange(1, n - 1) for n in SHAPE]
            verb = choice.choice(("point", "box", "scribble", "undo", "reset", "seed"))
            if verb == "point":
                positive = choice.random() < 0.6
                session.add_point_interaction(ijk, positive)
                assert not (session.target_buffer.any() and bool(session.target_buffer[tuple(ijk)]) != positive)
            elif verb == "box":
                session.add_bbox_interaction([[n - 1, n + 1] for n in ijk], choice.random() < 0.6)
            elif verb == "scribble":
                drawn = np.zeros(SHAPE, np.uint8)
                drawn[ijk[0], ijk[1], :] = 1
                session.add_scribble_interaction(drawn, True)
                assert session.target_buffer[drawn > 0].all()
            elif verb == "undo":
                session.undo()
            elif verb == "reset":
                session.reset_interactions()
            else:
                mask = (pattern(choice.randrange(99)) == 1).astype(np.uint8)
                session.add_initial_seg_interaction(mask)
                session.add_point_interaction(ijk, True)
                session.undo()
                assert np.array_equal(session.target_buffer, mask)
            slowest, requests = max(slowest, time.monotonic() - begun), requests + 1
    say(done=True, requests=requests, slowest=slowest)


if __name__ == "__main__":
    _, address, protocol, name, seed, seconds = sys.argv
    work = {"monailabel": monailabel, "nninteractive": nninteractive}[protocol]
    work(address, name, random.Random(int(seed)), time.monotonic() + float(seconds))
