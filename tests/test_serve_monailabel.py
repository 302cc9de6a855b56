"""The protocol of MONAI Label, with its own client where that is installed, and as requests of the same bytes."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from scipy import ndimage

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
from starlette.testclient import TestClient

from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, load_labels, load_volume, save_volume
from atlassegfm.core.labels import Structure
from atlassegfm.dicom import open_image
from atlassegfm.jobs.table import read_run
from atlassegfm.records import EDITS
from atlassegfm.serve import guard
from atlassegfm.serve.app import Desk
from atlassegfm.serve.cases import Cases
from atlassegfm.serve.cohort import Cohort, Job
from atlassegfm.serve.protocols.multipart import read_form
from atlassegfm.settings import Settings
from conftest import ORIENTATIONS, SHEARED
from dicom_series import SERIES, STUDY, write_series
from result_folders import write_result
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, Patient, centred_grid, straight_grid
from servers import TOKEN, guarded, serving

NAMES = {"liver": 1, "kidney": 2, "node": 3}
BOUNDARY = "----------lImIt_of_THE_fIle_eW_$"
INFO = [{"name": name, "idx": value} for name, value in NAMES.items()]


def result_on(out: Path, scans: Path, name: str, grid: Grid, verdicts: Any = ("review", "failed", "good")) -> None:
    save_volume(QUERY.scan(grid), scans / f"{name}.nii.gz")
    write_result(out / name, 0, verdicts, keep=False)
    save_volume(QUERY.labels(grid), out / name / "segmentation.nii.gz", structures=STRUCTURES)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Path]:
    """Results and scans of a good case and a bad one."""
    out, scans = tmp_path / "out", tmp_path / "scans"
    out.mkdir()
    scans.mkdir()
    result_on(out, scans, "a_good", straight_grid(), ("good", "good", "good"))
    result_on(out, scans, "b_bad", centred_grid(ORIENTATIONS["LPS"]))
    return out, scans


class Requests:
    """What clients send, byte for byte."""

    def __init__(self, desk: Desk, origins: frozenset[str] = frozenset()) -> None:
        self.desk = desk
        app: Any = guarded(desk, origins)
        self.http = TestClient(
            app, base_url=f"http://localhost/{TOKEN}/", raise_server_exceptions=False, follow_redirects=False
        )

    def multipart(self, verb: str, path: str, params: Any, **files: tuple[str, bytes]) -> Any:
        lines = [b"--" + BOUNDARY.encode(), b'Content-Disposition: form-data; name="params"', b""]
        lines.append(params.encode() if isinstance(params, str) else json.dumps(params).encode())
        for key, (name, content) in files.items():
            lines.append(b"--" + BOUNDARY.encode())
            lines.append(f'Content-Disposition: form-data; name="{key}"; filename="{name}"'.encode())
            lines += [b"Content-Type: application/octet-stream", b"", content]
        lines += [f"--{BOUNDARY}--".encode(), b""]
        headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
        return self.http.request(verb, path, content=b"\r\n".join(lines) + b"\r\n", headers=headers)

    def infer(self, model: str, image: str, **params: Any) -> tuple[Volume, dict[str, Any]]:
        answer = self.multipart("POST", f"infer/{model}?image={image}", params)
        assert answer.status_code == 200, answer.text
        form = read_form(answer.content, answer.headers["content-type"])
        return volume_of(form.files["image"][0].content), form.params

    def submit(self, image: str, labels: Volume, info: Any = INFO, *, name: str = "x.nii.gz", **more: Any) -> Any:
        return self.multipart(
            "PUT",
            f"datastore/label?image={image}",
            {"label_info": info, "client_id": "Ada", **more},
            label=(rf"C:\Users\Ada\{name}", content_of(labels, Path(name))),
        )


@pytest.fixture
def client(folder: tuple[Path, Path]) -> Requests:
    return Requests(Desk(Cases.find([folder[1]], folder[0])))


def volume_of(content: bytes, name: str = "x.nrrd") -> Volume:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(content)
        return load_volume(Path(place) / name)


def content_of(volume: Volume, name: Path, structures: Any = None) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        save_volume(volume, Path(place) / name.name, structures=structures)
        return (Path(place) / name.name).read_bytes()


# The client itself


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client leaves sockets open
@pytest.mark.parametrize("name", ["LPS", "sheared"])
def test_the_loop_of_the_client(tmp_path: Path, name: str) -> None:
    """Info, next sample, stored result, inference, a click, a label: the voxels of the file throughout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports the module cgi
        found = pytest.importorskip("monailabel.client.client", reason="MONAI Label's client needs Python below 3.13")
    out, scans, mine = tmp_path / "out", tmp_path / "scans", tmp_path / "mine"
    for one in (out, scans, mine):
        one.mkdir()
    grid = centred_grid(SHEARED if name == "sheared" else ORIENTATIONS[name])
    result_on(out, scans, "case", grid)
    stored = load_labels(out / "case/segmentation.nii.gz")
    with serving(Desk(Cases.find([scans], out))) as url:
        client = found.MONAILabelClient(url, str(mine), "Ada")
        info = client.info()
        assert info["labels"] == list(NAMES)
        assert [one["type"] for one in info["models"].values()] == ["segmentation", "deepgrow", "vista3d"]
        assert info["datastore"] == {"total": 1, "completed": 0, "label_tags": {"original": 1, "final": 0}}
        assert not info.get("config")
        assert not client.auth_enabled()
        assert not client.train_status(check_if_running=True)

        sample = client.next_sample("worst_first", {})
        scan = (scans / "case.nii.gz").read_bytes()
        assert (sample["name"], sample["checksum"]) == ("case.nii.gz", f"SHA256:{hashlib.sha256(scan).hexdigest()}")
        image = sample["id"]
        labels = client.datastore()["objects"][image]["labels"]
        assert labels["original"]["info"]["params"]["label_names"] == NAMES
        kept = load_volume(client.download_label(image, "original"))
        automatic, params = client.infer("atlassegfm", image, {"result_extension": ".nrrd"})
        assert params["label_names"] == NAMES
        for result in (kept, load_volume(automatic)):
            assert result.grid.matches(stored.grid, 1e-4)
            for structure, value in zip(STRUCTURES, NAMES.values(), strict=True):
                assert np.array_equal(result.data == value, stored.data == structure.value)

        # Clicks are voxels of the file; the answer has the structure alone.
        near = ndimage.binary_dilation(stored.data == 12, iterations=2) & (stored.data == 0)
        ijk = np.argwhere(near)[0].tolist()
        clicked, params = client.infer("correct", image, {"label": "node", "foreground": [ijk], "background": []})
        node = load_volume(clicked)
        assert params["label_names"] == {"node": 3}
        assert set(np.unique(node.data)) == {0, 3}
        assert node.data[tuple(ijk)] == 3
        assert node.grid.matches(stored.grid, 1e-4)
        assert not (out / "case" / EDITS).exists()

        drawn = np.where(stored.data == 1, 1, 0).astype(np.uint8)
        drawn[3:9, 4:12, 5:8] = 2
        drawn[tuple(ijk)] = 3
        save_volume(Volume(drawn, stored.grid), mine / "mine.nii.gz")
        answer = client.save_label(image, str(mine / "mine.nii.gz"), "", {"label_info": INFO})
        assert answer["accepted"] == list(NAMES)
        after = load_labels(out / "case/segmentation.nii.gz")
        assert np.array_equal(after.data, np.array([0, 1, 7, 12], np.uint8)[drawn])
        assert after.grid.matches(stored.grid, 1e-6)
        run = read_run(out / "case")
        assert run is not None
        assert run.verdict == "accepted"
        assert run.structures[0].review.by == "Ada"
        assert client.next_sample("worst_first", {}) == {}
        assert np.array_equal(load_volume(client.download_label(image, "final")).data, drawn)
        assert np.array_equal(load_volume(client.download_label(image, "original")).data, kept.data)

        # A scan that the client opened itself is recognised; one that nobody knows is refused.
        session = client.create_session(str(scans / "case.nii.gz"))
        assert client.get_session(session["session_id"])["image"] == image
        again, _ = client.infer("atlassegfm", "", {}, session_id=session["session_id"])
        assert np.array_equal(load_volume(again).data, drawn)
        client.remove_session(session["session_id"])
        with pytest.raises(found.MONAILabelClientException):
            client.get_session(session["session_id"])
        save_volume(Patient((9.0, 0, 0)).scan(grid), mine / "other.nii.gz")
        with pytest.raises(found.MONAILabelClientException, match="none with a result here"):
            client.create_session(str(mine / "other.nii.gz"))
        with pytest.raises(found.MONAILabelClientException):
            client.infer("atlassegfm", "no-such-case", {})
    gc.collect()


# As requests


def test_samples_come_in_the_order_of_the_strategy(client: Requests) -> None:
    def names(strategy: str) -> list[str]:
        return [client.http.post(f"activelearning/{strategy}", json={}).json()["name"] for _ in range(2)]

    assert names("worst_first") == ["b_bad.nii.gz", "a_good.nii.gz"]
    assert names("in_order") == ["a_good.nii.gz", "b_bad.nii.gz"]
    assert sorted(names("random")) == ["a_good.nii.gz", "b_bad.nii.gz"]
    assert client.http.post("activelearning/nosuch", json={}).status_code == 404


def test_paths_are_exact(client: Requests) -> None:
    for path in ("info/", "auth/", "datastore/?output=all", "datastore/", ""):
        assert client.http.get(path).status_code == 200, path
    for path in ("info", "train/?check_if_running=true", "session/nosuch", "logs/", "datastore/label?label=nosuch"):
        answer = client.http.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["detail"]
    assert client.http.get("http://localhost/info/").status_code == 404  # without the token
    image = next(iter(client.http.get("datastore/?output=all").json()["objects"]))
    assert client.http.head(f"datastore/image?image={image}").status_code == 200


def test_clicks_grow_and_shrink_and_others_stay(client: Requests, folder: tuple[Path, Path]) -> None:
    stored = load_labels(folder[0] / "b_bad/segmentation.nii.gz")
    truth = stored.data == 1
    half = truth.copy()
    half[: int(np.argwhere(truth)[:, 0].mean())] = False
    labels = np.where(half, 1, np.where(stored.data == 7, 7, 0)).astype(np.uint8)
    save_volume(Volume(labels, stored.grid), folder[0] / "b_bad/segmentation.nii.gz", structures=STRUCTURES)
    missing = np.argwhere(truth & ~half)
    middle = missing[np.abs(missing - missing.mean(axis=0)).sum(axis=1).argmin()].tolist()
    first, _ = client.infer("correct", "b_bad", label="liver", foreground=[middle])
    grown = first.data == 1
    assert grown[tuple(middle)]
    assert (grown & truth).sum() > 1.2 * half.sum()
    assert not (grown & (labels == 7)).any()
    inside = np.argwhere(half).mean(axis=0).round().astype(int).tolist()
    second, _ = client.infer("correct", "b_bad", label="liver", foreground=[middle], background=[inside])
    assert not second.data[tuple(inside)]
    assert second.data[tuple(middle)]
    # The same clicks of somebody else, who sends them at once, come out alike.
    other, _ = client.infer("correct", "b_bad", label="liver", foreground=[middle], background=[inside], client_id="x")
    assert np.array_equal(other.data, second.data)
    assert np.array_equal(client.infer("atlassegfm", "b_bad")[0].data == 1, half)


def test_what_ohif_reads(client: Requests, folder: tuple[Path, Path]) -> None:
    """A bare file: raw, eight bits, the first axis fastest."""
    answer = client.multipart("POST", "infer/atlassegfm?image=a_good&output=image", {"result_compress": False})
    head, _, raw = answer.content.partition(b"\n\n")
    assert b"encoding: raw" in head
    assert b"type: unsigned char" in head
    stored = load_labels(folder[0] / "a_good/segmentation.nii.gz").data
    shown = np.frombuffer(raw, np.uint8).reshape(stored.shape, order="F")
    assert np.array_equal(shown, np.array([0, 1, *[0] * 5, 2, *[0] * 4, 3])[stored])
    # Clicks as it sends them are the same as clicks of 3D Slicer.
    ijk = np.argwhere(ndimage.binary_dilation(stored == 7, iterations=2) & (stored == 0))[0].tolist()
    inside = np.argwhere(stored == 7).mean(axis=0).round().astype(int).tolist()
    points, _ = client.infer(
        "correct_in_ohif", "a_good", points=[ijk, inside], point_labels=[1, 0], label_prompt=[NAMES["kidney"]]
    )
    clicks, _ = client.infer("correct", "a_good", label="kidney", foreground=[ijk], background=[inside])
    assert np.array_equal(points.data, clicks.data)
    assert (points.data[tuple(ijk)], points.data[tuple(inside)]) == (2, 0)
    every, _ = client.infer("correct_in_ohif", "a_good", label_prompt=[1, 2, 3])
    assert np.array_equal(every.data, shown)
    for bad in ({"points": [ijk], "point_labels": []}, {"points": [ijk], "point_labels": [1], "label_prompt": [9]}):
        assert client.multipart("POST", "infer/correct_in_ohif?image=a_good", bad).status_code == 422
    said = client.multipart("POST", "infer/atlassegfm?image=a_good&output=json", {}).json()
    assert said["label_names"] == NAMES
    assert said["verdicts"]["liver"] == "good"


def test_pages_of_an_allowed_origin_alone(folder: tuple[Path, Path]) -> None:
    ohif = "http://ohif.example:3000"
    client = Requests(Desk(Cases.find([folder[1]], folder[0])), frozenset({ohif}))
    asked = client.http.options("info/", headers={"origin": ohif, "access-control-request-method": "PUT"})
    assert asked.status_code == 204
    assert "PUT" in asked.headers["access-control-allow-methods"]
    headers = {"origin": ohif, "sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}
    answer = client.http.get("info/", headers=headers)
    assert answer.headers["access-control-allow-origin"] == ohif
    for origin in ("http://evil.example", "null"):
        refused = client.http.get("info/", headers={"origin": origin})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
    assert client.http.options("http://localhost/wrong/info/", headers={"origin": ohif}).status_code == 404


@pytest.mark.parametrize(
    ("values", "info", "expected"),
    [
        ((1, 2, 3), INFO, (1, 7, 12)),
        # 3D Slicer counts a segment that it does not export: the order decides.
        ((1, 2, 3), [{"name": n, "idx": v + 1} for n, v in NAMES.items()], (1, 7, 12)),
        ((2, 1, 3), [{"name": n, "idx": 0} for n in ("kidney", "liver", "node")], (1, 7, 12)),
        # Values that are said, and cannot be meant by order.
        ((1, 7, 12), [{"name": n, "idx": v} for n, v in (("liver", 1), ("kidney", 7), ("node", 12))], (1, 7, 12)),
        # Nothing is said: values as they were sent to the client.
        ((1, 2, 3), [], (1, 7, 12)),
        # One that is not there is accepted as absent.
        ((1, 2, 0), INFO, (1, 7, 0)),
    ],
)
def test_values_of_a_label(
    client: Requests, folder: tuple[Path, Path], values: tuple[int, ...], info: Any, expected: tuple[int, ...]
) -> None:
    grid = load_labels(folder[0] / "b_bad/segmentation.nii.gz").grid
    drawn, wanted = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    for n, (value, own) in enumerate(zip(values, expected, strict=True)):
        drawn[n : n + 2, 5, 6], wanted[n : n + 2, 5, 6] = value, own
    answer = client.submit("b_bad", Volume(drawn, grid), info)
    assert answer.status_code == 200, answer.text
    assert np.array_equal(load_labels(folder[0] / "b_bad/segmentation.nii.gz").data, wanted)
    assert read_run(folder[0] / "b_bad").verdict == "accepted"


def test_structures_that_a_label_does_not_name_stay(client: Requests, folder: tuple[Path, Path]) -> None:
    before = load_labels(folder[0] / "b_bad/segmentation.nii.gz")
    drawn = (before.data == 7).astype(np.uint8)
    drawn[0, 0, 0] = 1
    assert client.submit("b_bad", Volume(drawn, before.grid), [{"name": "kidney", "idx": 4}]).status_code == 200
    after = load_labels(folder[0] / "b_bad/segmentation.nii.gz").data
    expected = before.data.copy()
    expected[0, 0, 0] = 7
    assert np.array_equal(after, expected)
    run = read_run(folder[0] / "b_bad")
    assert [one.review is not None for one in run.structures] == [False, True, False]
    # Accepted, it is not drawn over by a label of another one; itself it may be sent again.
    drawn = np.where(before.data == 7, 1, 0).astype(np.uint8)
    refused = client.submit("b_bad", Volume(drawn, before.grid), [{"name": "node", "idx": 1}])
    assert refused.status_code == 423
    assert "kidney is accepted" in refused.json()["detail"]
    assert client.submit("b_bad", Volume(drawn, before.grid), [{"name": "kidney", "idx": 1}]).status_code == 200
    assert np.array_equal(load_labels(folder[0] / "b_bad/segmentation.nii.gz").data, before.data)


def test_a_label_that_was_submitted_can_be_undone_in_the_page(client: Requests, folder: tuple[Path, Path]) -> None:
    before = load_labels(folder[0] / "b_bad/segmentation.nii.gz")
    assert client.submit("b_bad", Volume(np.zeros_like(before.data), before.grid)).status_code == 200
    assert not load_labels(folder[0] / "b_bad/segmentation.nii.gz", allow_empty=True).data.any()
    for what in ("reopen", "undo", "accept"):
        version = client.http.get("api/cases/1").json()["version"]
        assert client.http.post(f"api/cases/1/{what}", json={"version": version}).status_code == 200
    assert np.array_equal(load_labels(folder[0] / "b_bad/segmentation.nii.gz").data, before.data)


def test_a_segmentation_of_slicer_says_its_own_names(client: Requests, folder: tuple[Path, Path]) -> None:
    grid = load_labels(folder[0] / "b_bad/segmentation.nii.gz").grid
    drawn = np.zeros(grid.shape, np.uint8)
    drawn[2, 3, 4:8] = 5
    content = content_of(Volume(drawn, grid), Path("x.seg.nrrd"), [Structure(5, "kidney", (1, 2, 3))])
    answer = client.multipart(
        "PUT", "datastore/label?image=b_bad", {"label_info": INFO}, label=("/tmp/x.seg.nrrd", content)
    )
    assert answer.json()["accepted"] == ["kidney"]
    after = load_labels(folder[0] / "b_bad/segmentation.nii.gz").data
    assert np.array_equal(after == 7, drawn == 5)


def test_labels_that_are_refused_change_nothing(client: Requests, folder: tuple[Path, Path]) -> None:
    case = folder[0] / "b_bad"
    before = {path.name: path.read_bytes() for path in case.iterdir()}
    grid = load_labels(case / "segmentation.nii.gz").grid
    data = np.zeros(grid.shape, np.uint8)
    data[1, 1, 1] = 2
    moved = grid.affine.copy()
    moved[0, 3] += 40
    good = content_of(Volume(data, grid), Path("x.nii.gz"))
    shift = [{"name": n, "idx": v + 1} for n, v in NAMES.items()]
    answers = [
        (client.submit("b_bad", Volume(data, Grid(grid.shape, moved))), "not on the voxels"),
        (client.submit("b_bad", Volume(data[:-1], Grid((39, 36, 30), grid.affine))), "not on the voxels"),
        (client.submit("b_bad", Volume(data, grid), [{"name": "a", "idx": 1}, {"name": "spleen", "idx": 2}]), "spleen"),
        (client.submit("b_bad", Volume(data, grid), [{"name": "liver", "idx": 1}]), "values [2] for the 1"),
        (client.submit("b_bad", Volume(data, grid), shift), "do not tell"),
        (client.submit("b_bad", Volume(data * 9, grid), []), "nothing says"),
        (client.submit("b_bad", Volume(data, grid), "liver"), "no list"),
        (client.multipart("PUT", "datastore/label?image=b_bad", {}), "one file"),
        (client.multipart("PUT", "datastore/label?image=b_bad", "{", label=("x.nii.gz", good)), "not JSON"),
        (client.multipart("PUT", "datastore/label?image=b_bad", "[]", label=("x.nii.gz", good)), "no JSON object"),
        (client.multipart("PUT", "datastore/label?image=b_bad", {}, label=("x.bin", good)), "send it as"),
        (client.multipart("PUT", "datastore/label?image=b_bad", {}, label=("x.nii.gz", good[:40])), "labels.nii.gz"),
        (client.multipart("PUT", "datastore/label?image=b_bad&tag=version_1", {}, label=("x.nii.gz", good)), "final"),
        (client.http.put("datastore/label?image=b_bad", content=b"x"), "multipart/form-data"),
        (
            client.http.put(
                "datastore/label?image=b_bad",
                content=b"--x\r\n",
                headers={"content-type": "multipart/form-data; boundary=x"},
            ),
            "ends early",
        ),
    ]
    for answer, said in answers:
        assert answer.status_code == 422, (said, answer.text)
        assert said in answer.json()["detail"], answer.text
        assert "/tmp" not in answer.text
    assert client.submit("nosuch", Volume(data, grid)).status_code == 404
    assert {path.name: path.read_bytes() for path in case.iterdir()} == before


def test_damaged_forms_are_read_or_refused() -> None:
    head = b"--x\r\nContent-Disposition: form-data; name="
    whole = head + b'"params"\r\n\r\n{"a": 1}\r\n' + head + b'"label"; filename="/a/b.nii.gz"\r\n\r\n\x00\r\n--x--\r\n'
    form = read_form(whole, "multipart/form-data; boundary=x")
    assert form.params == {"a": 1}
    assert (form.files["label"][0].name, form.files["label"][0].content) == ("/a/b.nii.gz", b"\x00")
    choice, refused = random.Random(0), 0
    for _ in range(2000):
        damaged = bytearray(whole[: choice.randrange(len(whole) // 2, len(whole) * 3)])
        damaged[choice.randrange(len(damaged))] = choice.randrange(256)
        try:
            assert isinstance(read_form(bytes(damaged), "multipart/form-data; boundary=x").params, dict)
        except ValueError:
            refused += 1
    assert 0 < refused < 2000


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"label": "spleen", "foreground": [[1, 1, 1]]}, "liver"),
        ({"foreground": [[1, 1, 1]]}, "label"),
        ({"label": "liver", "foreground": [[1, 1]]}, "list of voxels"),
        ({"label": "liver", "foreground": [[40, 0, 0]]}, "no voxel"),
        ({"label": "liver", "background": [["a", 0, 0]]}, "list of voxels"),
        ({"label": "liver", "foreground": 7}, "list of voxels"),
        ({"label": "liver", "foreground": [[1, 1, 1]] * 201}, "at most"),
        ({"label": "liver", "result_extension": ".nii.gz"}, ".nrrd"),
    ],
)
def test_clicks_that_are_refused(client: Requests, params: dict[str, Any], said: str) -> None:
    answer = client.multipart("POST", "infer/correct?image=b_bad", params)
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["detail"]


def test_a_reviewer_approves_and_flags(client: Requests, folder: tuple[Path, Path]) -> None:
    def review(**meta: str) -> Any:
        return client.multipart("PUT", "datastore/updatelabelinfo?label=b_bad&tag=final", {"segmentationMeta": meta})

    said = review(status="approved", approvedBy="Eve", level="easy", comment="fine").json()["segmentationMeta"]
    assert (said["status"], said["comment"]) == ("approved", "fine")
    run = read_run(folder[0] / "b_bad")
    assert (run.verdict, run.structures[0].review.by) == ("accepted", "Eve")
    review(status="flagged", approvedBy="Eve", comment="look at the liver")
    assert read_run(folder[0] / "b_bad").verdict == "failed"
    fresh = Requests(Desk(Cases.find([folder[1]], folder[0])))
    objects = fresh.http.get("datastore/?output=all").json()["objects"]
    metas = [one["labels"]["original"]["info"].get("segmentationMeta", {}).get("comment") for one in objects.values()]
    assert metas == [None, "look at the liver"]
    assert client.multipart("PUT", "datastore/updatelabelinfo?label=b_bad", {}).status_code == 422


def test_a_series_goes_by_its_identifier(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    grid = Grid((24, 20, 9), np.array([[-4.0, 0, 0, 46], [0, -4.0, 0, 38], [0, 0, 8.0, -32], [0, 0, 0, 1]]))
    out, scans = tmp_path / "out", tmp_path / "scans"
    scans.mkdir()
    write_series(scans / "series", np.rint(QUERY.scan(grid).data).astype(np.int16), grid.affine)
    write_result(out / "series", 0, keep=False)
    save_volume(QUERY.labels(grid), out / "series/segmentation.nii.gz", structures=STRUCTURES)
    client = Requests(Desk(Cases.find([scans], out)))
    result, _ = client.infer("atlassegfm", SERIES)
    assert np.array_equal(result.data == 1, QUERY.labels(grid).data == 1)
    sample = client.http.post("activelearning/in_order", json={}).json()
    assert (sample["name"], sample["SeriesInstanceUID"]) == ("series.nrrd", SERIES)
    assert sample["StudyInstanceUID"] == STUDY
    scan = volume_of(client.http.get(f"datastore/image?image={sample['id']}").content)
    assert scan.grid.matches(grid, 1e-3)
    assert np.array_equal(scan.data, open_image(scans / "series").data)
    files = [("files", (path.name, io.BytesIO(path.read_bytes()))) for path in (scans / "series").iterdir()]
    begun = client.http.put("session/", files=files)
    assert begun.json()["session_info"]["image"] == sample["id"], begun.text


def test_only_scans_may_be_large(client: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_BYTES", 1000)
    monkeypatch.setattr(guard, "MOST_SCAN_BYTES", 2000)
    refused = client.multipart("POST", "infer/atlassegfm?image=a_good", {}, label=("x", bytes(1500)))
    assert refused.status_code == 413
    assert client.multipart("PUT", "session/", {}, files=("x.nii.gz", bytes(1500))).status_code == 422
    assert client.multipart("PUT", "session/", {}, files=("x.nii.gz", bytes(2500))).status_code == 413


def test_the_command_prints_the_addresses(folder: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "atlassegfm", "serve", "--review-only", "--scans", str(folder[1])]
    command += ["-o", str(folder[0]), "--no-open", "--port", "0", "--json", "-q", "--allow-origin", "http://x.example"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        assert list(found) == ["url", "monailabel", "nninteractive", "ohif"]
        assert found["ohif"] == (f"{found['url']}ohif/" if find_spec("monailabel") else None)
        assert found["monailabel"].endswith("/")
        answer = httpx.get(f"{found['monailabel']}info/", headers={"origin": "http://x.example"})
        assert answer.json()["name"] == "AtlasSegFM"
        assert answer.headers["access-control-allow-origin"] == "http://x.example"
        if found["nninteractive"] is not None:
            assert httpx.get(f"{found['nninteractive']}/healthz").json() == {"ok": True}
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.slow
def test_a_case_without_result_is_computed(tmp_path: Path) -> None:
    grid = straight_grid((32, 28, 24), (3.0, 3.0, 3.0))
    context, scans, out = tmp_path / "ctx", tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    settings = with_overrides(Settings(), ["model=none", *UNREGISTERED])
    save_volume(ATLAS.scan(grid), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    Context.from_files(tmp_path / "atlas.nii.gz", tmp_path / "labels.nii.gz", settings=settings).save(context)
    save_volume(QUERY.scan(grid), scans / "a.nii.gz")
    client = Requests(Desk(Cases.find([scans], out), context, Cohort(Job(context, out, lambda base: base))))
    info = client.http.get("info/").json()
    assert info["models"]["atlassegfm"]["config"] == {"run_again": False}
    assert info["labels"] == list(NAMES)
    image = client.http.post("activelearning/worst_first", json={}).json()["id"]
    result, params = client.infer("atlassegfm", image)
    assert params["label_names"] == NAMES
    stamp = (out / "a/run.json").stat().st_mtime_ns
    again, _ = client.infer("atlassegfm", image, run_again=True)  # it would come out the same
    assert np.array_equal(again.data, result.data)
    assert (out / "a/run.json").stat().st_mtime_ns == stamp
    without = Requests(Desk(Cases.find([scans], tmp_path / "none")))
    assert without.multipart("POST", "infer/atlassegfm?image=a", {}).status_code == 409
