"""The server behind the page: edits, history, log, acceptance, in every orientation; and what it refuses."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import socket
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
from starlette.testclient import TestClient

from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError
from atlassegfm.core.files import append_line, remove_unfinished, replaced_files
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.dicom import contours_in, open_image, open_labels
from atlassegfm.jobs.store import write_failure
from atlassegfm.jobs.table import read_run
from atlassegfm.models import load_model
from atlassegfm.records import AUTOMATIC, EDITS, StatusRecord
from atlassegfm.serve import edits, guard, start
from atlassegfm.serve.app import Desk, make_app
from atlassegfm.serve.cases import Cases, has_draft, import_folder
from atlassegfm.serve.clicks import Click, answer
from atlassegfm.serve.cohort import Cohort, Job
from atlassegfm.settings import Settings
from conftest import ORIENTATIONS, SHEARED, Run
from dicom_series import write_series
from result_folders import DONE, run_record, write_result
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, Patient, straight_grid

TOKEN = "secret-token"
LIVER, KIDNEY, NODE = 1, 2, 3  # numbers, in the order of the label values


def result_on(folder: Path, scan: Path, grid: Grid) -> None:
    """A scan and a result of it on the same voxels, as ``segment --keep`` leaves them."""
    save_volume(QUERY.scan(grid), scan)
    write_result(folder, 0, ("review", "failed", "good"))
    for name, patient in (("segmentation", QUERY), ("atlas", ATLAS), ("model", Patient((4.0, 0.0, 0.0)))):
        save_volume(patient.labels(grid), folder / f"{name}.nii.gz", structures=STRUCTURES)


class Page:
    """What the page does, as requests."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        app: Any = guard.Guard(make_app(desk), TOKEN, frozenset({"localhost"}))
        self.client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        self.version, self.by = 0, "Ada"

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(f"/{TOKEN}/api/{path}", json=body)

    def get(self, path: str) -> Any:
        return self.client.get(f"/{TOKEN}/api/{path}")

    def open(self, number: int = 0) -> Any:
        found = self.get(f"cases/{number}").json()
        self.version = found["version"]
        return found

    def labels(self, number: int = 0, kind: str = "draft") -> np.ndarray:
        shape = self.get(f"cases/{number}").json()["shape"]
        raw = zlib.decompress(self.get(f"cases/{number}/labels/{kind}").content)
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F")

    def send(self, what: str, number: int = 0, **body: Any) -> Any:
        answer = self.post(f"cases/{number}/{what}", version=self.version, by=self.by, **body)
        if answer.status_code == 200:
            self.version = answer.json()["version"]
        return answer

    def edit(self, verb: str, structure: int, **body: Any) -> Any:
        return self.send("edit", verb=verb, structure=structure, **body)

    def stroke(self, verb: str, structure: int, start: tuple[int, ...], mask: np.ndarray, **body: Any) -> Any:
        packed = base64.b64encode(zlib.compress(mask.astype(np.uint8).tobytes(order="F"))).decode()
        return self.edit(verb, structure, start=start, shape=mask.shape, mask=packed, **body)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Path]:
    """Results and scans of one case."""
    out, scans = tmp_path / "out", tmp_path / "scans"
    out.mkdir()
    scans.mkdir()
    result_on(out / "case", scans / "case.nii.gz", straight_grid())
    return out, scans


@pytest.fixture
def page(folder: tuple[Path, Path]) -> Page:
    out, scans = folder
    return Page(Desk(Cases.find([scans], out)))


# Voxels


@pytest.mark.parametrize("name", [*ORIENTATIONS, "sheared"])
def test_a_stroke_is_the_same_voxels_on_the_disk(tmp_path: Path, name: str) -> None:
    """Drawn in the page's order of axes, read back in the file's, whatever lies between; the rest stays."""
    affine = SHEARED if name == "sheared" else ORIENTATIONS[name]
    grid = Grid((40, 36, 30), affine.copy())
    centred = affine.copy()
    centred[:3, 3] -= grid.centre_mm
    grid = Grid(grid.shape, centred)
    (tmp_path / "scans").mkdir()
    (tmp_path / "out").mkdir()
    result_on(tmp_path / "out/case", tmp_path / "scans/case.nii.gz", grid)
    page = Page(Desk(Cases.find([tmp_path / "scans"], tmp_path / "out")))
    seen = page.open()
    before = load_labels(tmp_path / "out/case/segmentation.nii.gz")
    canonical = Grid(tuple(seen["shape"]), np.array(seen["affine"]))
    assert canonical.axis_codes == "RAS"
    shown = page.labels()
    assert np.array_equal(shown > 0, before.turned_to(canonical).data > 0)

    mask = np.random.default_rng(0).random((5, 4, 1)) < 0.6
    start = (3, 2, 7)
    assert page.stroke("paint", NODE, start, mask, overwrite=True).status_code == 200
    assert page.send("accept").status_code == 200
    drawn = np.argwhere(mask) + start
    after = load_labels(tmp_path / "out/case/segmentation.nii.gz")
    places = np.rint(before.grid.world_to_voxel(canonical.voxel_to_world(drawn))).astype(int)
    expected = before.data.copy()
    expected[tuple(places.T)] = 12
    assert np.array_equal(after.data, expected)
    assert after.grid.matches(before.grid, 1e-4)
    # What is at a world position in the scan that the page got is there in the file too.
    scan = np.frombuffer(page.get("cases/0/scan").content, "<i2").reshape(canonical.shape, order="F")
    stored = QUERY.scan(grid)
    one = np.rint(stored.grid.world_to_voxel(canonical.voxel_to_world((20, 15, 12)))).astype(int)
    assert scan[20, 15, 12] * seen["slope"] + seen["intercept"] == pytest.approx(
        float(stored.data[tuple(one)]), abs=0.1
    )


def test_accepted_structures_are_locked_and_others_are_never_taken_silently(page: Page) -> None:
    page.open()
    labels = page.labels()
    liver = np.argwhere(labels == LIVER)
    first, last = liver.min(axis=0), liver.max(axis=0) + 1
    box = np.ones(last - first, bool)
    answer = page.stroke("paint", KIDNEY, tuple(map(int, first)), box).json()
    assert answer["others"]["liver"] == len(liver)
    assert np.array_equal(page.labels() == LIVER, labels == LIVER)
    assert (page.labels() == KIDNEY).sum() > (labels == KIDNEY).sum()
    page.send("undo")
    assert np.array_equal(page.labels(), labels)
    assert page.send("accept", structures=[LIVER]).status_code == 200
    answer = page.stroke("paint", KIDNEY, tuple(map(int, first)), box, overwrite=True).json()
    assert answer["others"]["liver"] == len(liver)
    refused = page.stroke("erase", LIVER, tuple(map(int, first)), box)
    assert refused.status_code == 423
    assert "liver is accepted" in refused.json()["detail"]
    page.send("undo")
    page.send("reopen", structures=[LIVER])
    answer = page.stroke("paint", KIDNEY, tuple(map(int, first)), box, overwrite=True).json()
    assert answer["others"]["liver"] == -len(liver)
    assert not (page.labels() == LIVER).any()


@pytest.mark.parametrize(
    ("verb", "more"),
    [("absent", {}), ("atlas", {}), ("model", {}), ("swap", {"other": KIDNEY}), ("relabel", {"other": KIDNEY})],
)
def test_verbs_undo_and_redo(page: Page, verb: str, more: dict[str, Any]) -> None:
    page.open()
    before = page.labels()
    source = page.labels(kind=verb) if verb in ("atlas", "model") else None
    answer = page.edit(verb, LIVER, overwrite=True, **more).json()
    after = page.labels()
    if source is not None:
        assert np.array_equal(after == LIVER, source == LIVER)
    elif verb == "swap":
        assert np.array_equal(after == LIVER, before == KIDNEY)
        assert np.array_equal(after == KIDNEY, before == LIVER)
    else:
        assert not (after == LIVER).any()
    # The box that is answered is all that changed.
    box = tuple(slice(a, a + n) for a, n in zip(answer["changed"]["start"], answer["changed"]["shape"], strict=True))
    patched = before.copy()
    raw = zlib.decompress(base64.b64decode(answer["changed"]["data"]))
    patched[box] = np.frombuffer(raw, np.uint8).reshape(answer["changed"]["shape"], order="F")
    assert np.array_equal(patched, after)
    assert answer["structures"][0]["volume"] == pytest.approx((after == LIVER).sum() * 0.008)
    assert np.array_equal((page.send("undo"), page.labels())[1], before)
    assert np.array_equal((page.send("redo"), page.labels())[1], after)
    assert page.send("redo").json()["changed"] is None
    page.edit("reset", LIVER, overwrite=True)
    assert np.array_equal(page.labels() == LIVER, before == LIVER)


def test_a_click_grows_and_another_shrinks(page: Page) -> None:
    page.open()
    labels = page.labels()
    page.edit("absent", LIVER)
    liver = labels == LIVER
    half = liver.copy()
    half[: int(np.argwhere(liver)[:, 0].mean())] = False
    box = np.argwhere(half)
    first, last = box.min(axis=0), box.max(axis=0) + 1
    page.stroke("paint", LIVER, tuple(map(int, first)), half[tuple(map(slice, first, last))])
    missing = np.argwhere(liver & ~half)
    middle = missing[np.abs(missing - missing.mean(axis=0)).sum(axis=1).argmin()].tolist()
    assert page.edit("click", LIVER, ijk=middle).status_code == 200
    grown = page.labels() == LIVER

    def dice(mask: np.ndarray) -> float:
        return float(2 * (mask & liver).sum() / (mask.sum() + liver.sum()))

    assert dice(grown) > dice(half) + 0.1
    assert (grown | ~half).all()  # nothing is lost
    assert np.array_equal(page.labels() == KIDNEY, labels == KIDNEY)
    inside = [int(n) for n in first + (last - first) // 2]
    page.edit("click", LIVER, ijk=inside, positive=False)
    shrunk = page.labels() == LIVER
    assert not shrunk[tuple(inside)]
    assert shrunk[tuple(middle)]  # an earlier click holds


def test_a_mask_that_lies_elsewhere_is_moved_to_the_click() -> None:
    """A click far outside moves a mask over other tissue; one that lies well stays, and so does one clicked before."""
    grid, model = straight_grid(), load_model("builtin", "cpu")
    scan = QUERY.scan(grid)
    kidney = QUERY.labels(grid).data == 7
    elsewhere = np.roll(kidney, 18, axis=1)
    assert not (elsewhere & kidney).any()
    voxels = np.argwhere(kidney)
    i, j, k = voxels[((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist()

    def after(mask: np.ndarray, click: Click, *earlier: Click) -> np.ndarray:
        patch, new = answer(model, scan, mask, click, earlier), mask.copy()
        new[tuple(slice(a, a + n) for a, n in zip(patch.start, patch.mask.shape, strict=True))] = patch.mask
        return new

    click = Click((i, j, k), True)
    moved = after(elsewhere, click)
    assert 2 * (moved & kidney).sum() > 0.85 * (moved.sum() + kidney.sum())
    held = after(elsewhere, click, Click(tuple(np.argwhere(elsewhere)[40].tolist()), True))
    assert (held | ~elsewhere).all()
    away = after(kidney, Click((i, (j + 12) % grid.shape[1], k), True))
    assert (away | ~kidney).all()


def test_drawn_slices_are_interpolated_and_holes_filled(page: Page) -> None:
    page.open()
    page.edit("absent", NODE)
    i, j = np.indices((24, 24))
    for k, radius, shift in ((10, 4, 8), (20, 9, 13)):
        disc = (i - shift) ** 2 + (j - shift) ** 2 <= radius**2
        page.stroke("paint", NODE, (2, 2, k), disc[:, :, None], overwrite=True)
    page.edit("interpolate", NODE, axis=2, overwrite=True)
    areas = (page.labels() == NODE).sum(axis=(0, 1))
    assert (areas[10:21] > 0).all()
    assert not areas[:10].any()
    radii = np.sqrt(areas[10:21] / np.pi)
    assert np.allclose(radii, np.linspace(radii[0], radii[-1], 11), atol=0.6)
    ring = ((i - 12) ** 2 + (j - 12) ** 2 <= 81) & ((i - 12) ** 2 + (j - 12) ** 2 >= 36)
    page.stroke("paint", NODE, (2, 2, 30), ring[:, :, None], overwrite=True)
    page.edit("fill", NODE, axis=2, ijk=[0, 0, 30], overwrite=True)
    assert (page.labels() == NODE)[14, 14, 30]
    assert page.edit("interpolate", NODE, axis=0).status_code == 200


def test_drawn_slices_replace_what_lies_between() -> None:
    """A wrong mask between two drawn slices goes."""
    mask = np.zeros((8, 8, 9), bool)
    mask[2:6, 2:6, 1] = mask[2:6, 2:6, 7] = True
    mask[:, :, 3:6] = True
    patch = edits.interpolate(mask, 2, np.ones(3), drawn=[1, 7])
    assert patch is not None
    assert (patch.mask == patch.mask[:, :, :1]).all()
    assert edits.interpolate(mask[:, :, :2], 2, np.ones(3)) is None


def test_a_case_in_use_is_never_opened_twice(tmp_path: Path) -> None:
    """Else two requests would each work on labels of their own, and one would be lost."""
    (tmp_path / "scans").mkdir()
    for name in "abcde":
        result_on(tmp_path / "out" / name, tmp_path / "scans" / f"{name}.nii.gz", straight_grid((24, 20, 18)))
        for kept in ("segmentation", "atlas", "model"):
            save_volume(QUERY.labels(straight_grid((24, 20, 18))), tmp_path / "out" / name / f"{kept}.nii.gz")
    cases = Cases.find([tmp_path / "scans"], tmp_path / "out")
    session = cases.open(0)
    for number in range(1, 5):
        cases.open(number)
    assert cases.open(0) is session
    # While it is being saved, its files are newer than what it knows.
    found: list[Any] = []
    with session.lock:
        os.utime(tmp_path / "out/a/run.json", ns=(1, 1))
        other = threading.Thread(target=lambda: found.append(cases.open(0)))
        other.start()
        other.join(0.2)
        session.stamp = 1
    other.join()
    assert found == [session]
    os.utime(tmp_path / "out/a/run.json", ns=(2, 2))
    assert cases.open(0) is not session


# Acceptance, and what survives


def test_acceptance_is_on_the_disk_with_who_and_when(page: Page, folder: tuple[Path, Path]) -> None:
    case = folder[0] / "case"
    original = load_labels(case / "segmentation.nii.gz").data
    page.open()
    page.edit("absent", NODE)
    assert has_draft(case)
    page.send("accept", structures=[LIVER])
    assert has_draft(case)  # the node's edit is saved, and still not accepted
    answer = page.send("accept").json()
    assert all(one["accepted"] and one["verdict"] == "accepted" for one in answer["structures"])
    run = read_run(case)
    assert run is not None
    assert run.verdict == "accepted"
    node = run.structures[2]
    assert (node.status, node.volume_ml, node.review.by, node.review.dice) == ("absent", 0, "Ada", 0)
    assert (node.review.quality.verdict, node.quality.estimated_dice) == ("good", None)
    assert node.quality.reason.startswith("accepted by Ada on 20")
    assert run.structures[0].review.dice == 1
    assert not (load_labels(case / "segmentation.nii.gz").data == 12).any()
    assert np.array_equal(load_labels(case / AUTOMATIC).data, original)
    assert not has_draft(case)
    lines = [json.loads(line) for line in (case / EDITS).read_text().splitlines()]
    assert [line["verb"] for line in lines] == ["absent", "accept", "accept"]
    # Reopened, everything is as it was estimated, and the automatic answer can be had back.
    page.send("reopen")
    run = read_run(case)
    assert (run.verdict, run.structures[2].quality.verdict) == ("failed", "good")
    page.edit("reset", NODE, overwrite=True)
    page.send("accept")
    assert np.array_equal(load_labels(case / "segmentation.nii.gz").data, original)


def test_versions_of_each_annotator_are_kept_apart(page: Page, folder: tuple[Path, Path]) -> None:
    """Whoever accepts later replaces the result, and not what others accepted; any name is safe for a file."""
    out, scans = folder
    page.open()
    names = ["Ada", "ada", "../../Ada", "CON", "Zo\u00eb \u674e", "x" * 80]
    drawn = {}
    for n, name in enumerate(names):
        page.by = name
        page.send("reopen")
        page.stroke("paint", NODE, (n, 0, 0), np.ones((1, 2, 3), bool), overwrite=True)
        assert page.send("accept").json()["annotators"] == sorted(names[: n + 1])
        drawn[name] = page.labels()
    assert np.array_equal(load_labels(out / "case/segmentation.nii.gz").data > 0, drawn[names[-1]] > 0)
    files = sorted(path.name for path in (out / "case/versions").iterdir())
    assert len({one.lower() for one in files}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]{8,60}\.nii\.gz", one) for one in files), files
    assert sorted(path.name for path in out.iterdir()) == ["case"]
    # Another server knows them from the disk; nameless acceptance makes none.
    again = Page(Desk(Cases.find([scans], out)))
    assert again.open()["annotators"] == sorted(names)
    again.by = ""
    again.send("reopen")
    for name in names:
        sent = again.post("cases/0/version", name=name).content
        assert np.array_equal(np.frombuffer(zlib.decompress(sent), np.uint8), drawn[name].ravel(order="F"))
    assert again.post("cases/0/version", name="Eve").status_code == 422
    assert again.edit("version", NODE, annotator="Ada", overwrite=True).status_code == 200
    assert np.array_equal(again.labels() == NODE, drawn["Ada"] == NODE)
    assert again.send("accept").json()["annotators"] == sorted(names)
    # A result that takes the place of this one keeps them.
    again.send("reopen")
    write_failure(out / "case", StatusRecord(state="failed", reason="made"))
    assert sorted(path.name for path in (out / "case/versions").iterdir()) == files


def test_a_draft_survives_the_server(page: Page, folder: tuple[Path, Path]) -> None:
    """Edits are in the log before they are answered; a line that was cut off is left out."""
    out, scans = folder
    page.open()
    page.edit("absent", NODE)
    page.send("accept", structures=[NODE])
    page.edit("atlas", LIVER, overwrite=True)
    page.edit("model", KIDNEY, overwrite=True)
    page.send("undo")
    drafted, version = page.labels(), page.version
    with (out / "case" / EDITS).open("a") as log:
        log.write('{"version": 99, "verb": "pai')
    again = Page(Desk(Cases.find([scans], out)))
    seen = again.open()
    assert np.array_equal(again.labels(), drafted)
    assert again.version == version
    assert (seen["undo"], [one["accepted"] for one in seen["structures"]]) == (1, [False, False, True])
    again.send("undo")
    again.send("accept")
    assert np.array_equal(Page(Desk(Cases.find([scans], out))).labels(), again.labels())


def test_a_new_result_ends_an_old_draft(page: Page, folder: tuple[Path, Path]) -> None:
    page.open()
    page.edit("absent", NODE)
    save_volume(ATLAS.labels(straight_grid()), folder[0] / "case/segmentation.nii.gz", structures=STRUCTURES)
    run_record("case", {1: 1.0, 7: 2.0, 12: 3.0}).write(folder[0] / "case/run.json")
    seen = page.open()
    assert seen["undo"] == 0
    assert (page.labels() == NODE).sum() == (ATLAS.labels(straight_grid()).data == 12).sum()
    assert not has_draft(folder[0] / "case")


def test_two_people_on_one_case_are_told(page: Page) -> None:
    page.open()
    version = page.version
    state = page.post("state", client="one", by="Ada", case=0).json()
    assert state["cases"][0]["taken"] == []
    state = page.post("state", client="two", by="Bob", case=0).json()
    assert state["cases"][0]["taken"] == ["Ada"]
    page.edit("absent", NODE)
    page.version = version
    labels = page.labels()
    late = page.edit("absent", LIVER)
    assert late.status_code == 409
    assert "changed meanwhile" in late.json()["detail"]
    assert np.array_equal(page.labels(), labels)


# The list


def test_worst_cases_come_first_and_accepted_ones_last(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    verdicts = {"a": ("good",) * 3, "b": ("review", "good", "good"), "c": ("good", "failed", "good"), "d": (None,) * 3}
    for name, found in verdicts.items():
        save_volume(QUERY.scan(straight_grid()), tmp_path / f"scans/{name}.nii.gz")
        write_result(tmp_path / "out" / name, 0, found)
    for name in ("e", "f"):
        save_volume(QUERY.scan(straight_grid()), tmp_path / f"scans/{name}.nii.gz")
    write_result(tmp_path / "out/gone", 0)
    warned = DONE.model_copy(update={"warnings": ("the scan hardly resembles the atlas",)})
    write_result(tmp_path / "out/f", 0, status=warned)
    page = Page(Desk(Cases.find([tmp_path / "scans"], tmp_path / "out"), title="out"))
    rows = page.post("state", client="x").json()["cases"]
    assert rows[0]["name"] == "f"
    assert rows.pop(0)["worst"] == "the scan hardly resembles the atlas"
    assert [row["name"] for row in rows] == ["c", "b", "d", "a", "gone", "e"]
    assert rows[0]["worst"].startswith("kidney: because failed")
    assert [row["state"] for row in rows[3:]] == ["open", "no scan", "waiting"]
    number = rows[0]["id"]
    page.open(number)
    assert page.send("accept", number).status_code == 200
    rows = page.post("state", client="x").json()["cases"]
    assert [row["name"] for row in rows][-1] == "c"
    gone = next(row["id"] for row in rows if row["state"] == "no scan")
    assert "scan of this case was not given" in page.get(f"cases/{gone}").json()["detail"]


def test_label_maps_of_any_program_are_reviewed(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "out").mkdir()
    grid = straight_grid()
    save_volume(QUERY.scan(grid), tmp_path / "scans/x_0000.nii.gz")
    save_volume(QUERY.labels(grid), tmp_path / "labels/x.nii.gz")
    (tmp_path / "labels/dataset.json").write_text('{"labels": {"background": 0, "liver": 1, "kidney": 7, "node": 12}}')
    assert import_folder(tmp_path / "labels", [tmp_path / "scans"], tmp_path / "out") == []
    page = Page(Desk(Cases.find([tmp_path / "scans"], tmp_path / "out")))
    seen = page.open()
    assert [one["name"] for one in seen["structures"]] == ["liver", "kidney", "node"]
    assert seen["sources"] == []
    assert page.edit("atlas", LIVER).status_code == 422
    page.edit("absent", LIVER)
    page.send("accept")
    assert not (load_labels(tmp_path / "out/x_0000/segmentation.nii.gz").data == 1).any()
    assert (load_labels(tmp_path / "labels/x.nii.gz").data == 1).any()
    assert page.post("run").status_code == 409
    assert page.post("cases/0/atlas").status_code == 409


# Safety


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 404),
        ("/wrong/", {}, 404),
        ("/wrong/api/cases/0", {}, 404),
        (f"/{TOKEN}", {}, 404),
        (f"/{TOKEN}/", {}, 200),
        (f"/{TOKEN}/", {"host": "evil.example"}, 421),
        (f"/{TOKEN}/", {"host": "192.168.1.7:80"}, 421),
        (f"/{TOKEN}/", {"host": "127.0.0.1:9999"}, 200),
        (f"/{TOKEN}/", {"host": "[::1]:80"}, 200),
        (f"/{TOKEN}/", {"host": "[::1"}, 421),
        (f"/{TOKEN}/api/cases/0", {"origin": "http://evil.example"}, 403),
        (f"/{TOKEN}/api/cases/0", {"origin": "null"}, 403),
        (f"/{TOKEN}/api/cases/0", {"origin": "http://localhost"}, 200),
        (f"/{TOKEN}/api/cases/0", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        (f"/{TOKEN}/api/cases/7", {}, 404),
        (f"/{TOKEN}/api/cases/-1", {}, 422),
        (f"/{TOKEN}/api/cases/..%2f..%2fetc%2fpasswd", {}, 404),
        (f"/{TOKEN}/../../etc/passwd", {}, 404),
        (f"/{TOKEN}/api/cases/0/labels/..%2frun.json", {}, 404),
        (f"/{TOKEN}/api/cases/0/labels/automatic", {}, 422),
        (f"/{TOKEN}/assets/page.css", {}, 404),
        (f"/{TOKEN}/docs", {}, 404),
        (f"/{TOKEN}/openapi.json", {}, 404),
    ],
)
def test_requests_from_elsewhere_and_for_something_else(
    page: Page, path: str, headers: dict[str, str], status: int
) -> None:
    answer = page.client.get(path, headers=headers)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    if status != 200:
        assert answer.json()["detail"]
        assert "/" not in str(answer.json()["detail"])


def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    "body",
    [
        {"verb": "paint"},
        {"verb": "paint", "start": [0, 0, 0], "shape": [2, 2, 0], "mask": _packed(b"")},
        {"verb": "paint", "start": [47, 0, 0], "shape": [2, 2, 2], "mask": _packed(bytes(8))},
        {"verb": "paint", "start": [-1, 0, 0], "shape": [2, 2, 2], "mask": _packed(bytes(8))},
        {"verb": "paint", "start": [0, 0, 0], "shape": [2, 2, 2], "mask": _packed(bytes(7))},
        {"verb": "paint", "start": [0, 0, 0], "shape": [2, 2, 2], "mask": _packed(bytes(50_000_000))},
        {"verb": "paint", "start": [0, 0, 0], "shape": [2, 2, 2], "mask": "bm8gemxpYg=="},
        {"verb": "paint", "start": [0, 0, 0], "shape": [2, 2, 2], "mask": "%%%"},
        {"verb": "click", "ijk": [48, 0, 0]},
        {"verb": "click", "ijk": [0, 0]},
        {"verb": "click"},
        {"verb": "swap", "other": 9},
        {"verb": "delete everything"},
        {"verb": "absent", "structure": 4},
        {"verb": "absent", "structure": 0},
        {"verb": "absent", "structure": "../x"},
        {"verb": "absent", "by": "x" * 81},
        {"verb": "absent", "by": "two\nlines"},
        {"verb": "absent", "path": "/etc/passwd"},
        {"verb": "fill", "axis": 3},
    ],
)
def test_malformed_edits_change_nothing(page: Page, folder: tuple[Path, Path], body: dict[str, Any]) -> None:
    page.open()
    answer = page.client.post(f"/{TOKEN}/api/cases/0/edit", json={"version": 0, "structure": LIVER, **body})
    assert answer.status_code == 422
    assert not (folder[0] / "case" / EDITS).exists()


def test_large_and_slow_bodies_are_refused(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    page.open()
    big = page.client.post(f"/{TOKEN}/api/cases/0/edit", content=bytes(guard.MOST_BYTES + 1))
    assert big.status_code == 413
    broken = page.client.post(f"/{TOKEN}/api/cases/0/edit", content=b'{"version": 0', headers={"content-type": "x"})
    assert broken.status_code == 422
    monkeypatch.setattr(guard, "MOST_SECONDS", 0.05)

    async def drip() -> Any:
        await asyncio.sleep(1)
        return {"type": "http.request", "body": b"", "more_body": True}

    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/{TOKEN}/api/state", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard.Guard(make_app(page.desk), TOKEN, frozenset({"localhost"}))(scope, drip, keep))
    assert sent[0]["status"] == 408


def test_slow_clients_hold_no_connection(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and bodies that never end are cut off, also drop by drop; others are answered meanwhile."""
    monkeypatch.setattr(start, "MOST_HEAD_SECONDS", 0.4)
    monkeypatch.setattr(guard, "MOST_SECONDS", 0.4)
    server = start.server_of(guard.Guard(make_app(page.desk), TOKEN, frozenset({"localhost"})))
    whole = f"GET /{TOKEN}/page.css HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    post = f"POST /{TOKEN}/api/state HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def connect(sent: bytes) -> socket.socket:
            client = socket.create_connection(listening.getsockname(), timeout=5)
            client.sendall(sent)
            return client

        slow = [connect(sent) for sent in (b"", b"GET / HT", whole + whole[:9], post, post + b'{"cl')]
        ended = time.monotonic() + 5
        answers, left = [b""] * len(slow), set(range(len(slow)))
        while left and time.monotonic() < ended:
            time.sleep(0.1)
            for n in sorted(left):
                try:
                    slow[n].sendall(b"x")  # a drop at a time
                    slow[n].settimeout(0.01)
                    received = slow[n].recv(100_000)
                    answers[n] += received
                    left -= set() if received else {n}
                except TimeoutError:
                    continue
                except OSError:
                    left.remove(n)
        assert not left
        assert answers[:2] == [b"", b""]
        assert answers[2].startswith(b"HTTP/1.1 200")
        assert all(b"408" in one or one == b"" for one in answers[3:])
        with connect(whole) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        for one in slow:
            one.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def test_no_name_is_in_an_address_or_an_error(page: Page, folder: tuple[Path, Path]) -> None:
    """Errors of the disk name no folder of this machine."""
    shutil.rmtree(folder[0] / "case")
    answer = page.get("cases/0")
    assert answer.status_code == 422
    assert str(folder[0]) not in answer.text


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["CTX", "--review-only"], "without a context"),
        ([], "a context is missing"),
        (["CTX", "--labels", "."], "goes with --review-only"),
        (["--review-only", "--port", "99999"], "--port"),
        (["--review-only", "--scans", "EMPTY"], "no scan here"),
        (["--review-only", "--allow-origin", "localhost:3000"], "expected the origin of a page"),
        (["--review-only", "--allow-origin", "http://localhost:3000/viewer"], "expected the origin of a page"),
    ],
)
def test_bad_calls(tmp_path: Path, run: Run, arguments: list[str], said: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    scans = [] if "--scans" in arguments else ["--scans", tmp_path]
    words = [str(tmp_path / one) if one in ("CTX", "EMPTY") else one for one in arguments]
    done = run("serve", *words, *scans, "-o", tmp_path / "out", "--no-open")
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_a_port_in_use_is_named(folder: tuple[Path, Path], run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("serve", "--review-only", "--scans", folder[1], "-o", folder[0], "--no-open", "--port", str(port))
    assert done.code == 2
    assert f"--port {port}: another program uses it" in done.err


def test_a_missing_extra_is_named(folder: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = run("serve", "--review-only", "--scans", folder[1], "-o", folder[0], "--no-open")
    assert done.code == 2
    assert "the extra 'server'" in done.err


# The loop: accepted, an atlas, and the rest again


@pytest.fixture
def loop(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A context without a model, a folder of three scans, and a place for results."""
    grid = straight_grid((32, 28, 24), (3.0, 3.0, 3.0))
    context, scans = tmp_path / "ctx", tmp_path / "scans"
    scans.mkdir()
    settings = with_overrides(Settings(), ["model=none", *UNREGISTERED])
    save_volume(ATLAS.scan(grid), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    Context.from_files(tmp_path / "atlas.nii.gz", tmp_path / "labels.nii.gz", settings=settings).save(context)
    for n, name in enumerate("abc"):
        save_volume(Patient((5.0 + n, 0.0, 0.0)).scan(grid), scans / f"{name}.nii.gz")
    return context, scans, tmp_path / "out"


def _finished(page: Page) -> Any:
    page.desk.cohort._thread.join(120)
    return page.post("state", client="x").json()["run"]


@pytest.mark.slow  # the quick tests do the same in a browser: tests/test_serve_page.py
@pytest.mark.timeout(180)
def test_an_accepted_case_becomes_an_atlas_and_the_rest_is_redone(loop: tuple[Path, Path, Path], run: Run) -> None:
    context, scans, out = loop
    done = run("segment", "--context", context, scans, "-o", out, "--keep", "-q", "--no-second-pass")
    assert done.code == 0, done.err
    desk = Desk(Cases.find([scans], out), context, Cohort(Job(context, out, lambda base: base)))
    page = Page(desk)
    state = page.post("state", client="x").json()
    assert [row["state"] for row in state["cases"]] == ["open"] * 3
    assert state["context"]["atlases"] == 1
    page.open(0)
    assert page.post("cases/0/atlas").status_code == 409  # not accepted yet
    truth = Patient((5.0, 0.0, 0.0)).labels(straight_grid((32, 28, 24), (3.0, 3.0, 3.0))).data
    for number, value in ((LIVER, 1), (KIDNEY, 7), (NODE, 12)):
        page.edit("absent", number)
        page.stroke("paint", number, (0, 0, 0), truth == value, overwrite=True)
    page.send("accept")
    assert '"verdict": "accepted"' in (out / "cohort.json").read_text()
    assert (out / "cohort.csv").read_text().count(",accepted,") == 3
    accepted = (out / "a/segmentation.nii.gz").read_bytes()
    assert page.post("cases/0/atlas").json()["atlases"] == 2
    again = page.post("cases/0/atlas")
    assert again.status_code == 422
    assert "same scan as another atlas" in again.json()["detail"]
    # One case has a draft: it is left alone, and named.
    page.open(2)
    page.send("edit", 2, verb="absent", structure=NODE)
    assert page.post("run").json()["drafts"] == ["c"]
    assert page.post("run").status_code == 422
    found = _finished(page)
    assert found["state"] == "done", found
    assert found["counts"] == {"done": 2, "failed": 0, "left": 0, "kept": 1}
    assert (out / "a/segmentation.nii.gz").read_bytes() == accepted
    assert len(read_run(out / "b").structures[0].atlases) > 0
    assert page.labels(2).max() == KIDNEY  # the draft is still there
    # The command line goes on from there, and leaves the accepted case as it is.
    done = run("segment", "--context", context, scans, "-o", out, "--keep", "-q", "--force", "--no-second-pass")
    assert done.code == 0, done.err
    assert (out / "a/segmentation.nii.gz").read_bytes() == accepted


def test_dicom_results_get_their_objects_anew(tmp_path: Path, run: Run) -> None:
    """RTSTRUCT and DICOM-SEG of a series say what was accepted."""
    pytest.importorskip("highdicom", reason="the extra 'dicom' is not installed")
    grid = Grid((24, 20, 9), np.array([[-4.0, 0, 0, 46], [0, -4.0, 0, 38], [0, 0, 8.0, -32], [0, 0, 0, 1]]))
    (tmp_path / "scans").mkdir()
    write_series(tmp_path / "scans/series", np.rint(QUERY.scan(grid).data).astype(np.int16), grid.affine)
    save_volume(ATLAS.scan(grid), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(grid), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    unregistered = [word for one in UNREGISTERED for word in ("--set", one)]
    done = run(
        *("segment", "--atlas", tmp_path / "atlas.nii.gz", "--labels", tmp_path / "labels.nii.gz"),
        *(tmp_path / "scans/series", "-o", tmp_path / "out", "--format", "nifti,rtstruct,seg", "--model", "none", "-q"),
        *unregistered,
    )
    assert done.code == 0, done.err
    page = Page(Desk(Cases.find([tmp_path / "scans"], tmp_path / "out")))
    page.open()
    page.edit("absent", NODE)
    page.edit("swap", LIVER, other=KIDNEY)
    answer = page.send("accept")
    assert answer.status_code == 200, answer.text
    case = tmp_path / "out/series"
    accepted = load_labels(case / "segmentation.nii.gz").canonical()
    found = open_labels(case / "seg.dcm", open_image(tmp_path / "scans/series"), warn=False).canonical()
    assert np.array_equal(found.data == 1, accepted.data == 1)
    assert not (found.data == 12).any()
    contours = contours_in(case / "rtstruct.dcm")
    assert {value for value, drawn in contours.items() if drawn} == {1, 7}
    assert read_run(case).dicom["seg"]["round_trip"]


# Files that are whole at any moment


def test_what_a_killed_process_was_replacing_is_put_back(tmp_path: Path) -> None:
    """A folder is moved away before its successor takes its place; a kill between the two loses nothing."""
    write_result(tmp_path / "case", 0)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    holder = tmp_path / f".writing-{re.sub(r'[^A-Za-z0-9.]+', '.', socket.gethostname())}-{gone.pid}-x"
    (holder / "replaced").mkdir(parents=True)
    (tmp_path / "case").rename(holder / "replaced/case")
    assert remove_unfinished(tmp_path) == 1
    assert read_run(tmp_path / "case") is not None
    assert not holder.exists()


def test_files_are_replaced_one_by_one_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "a.txt").write_text("old")
    with pytest.raises(InputError), replaced_files(folder, "b.txt") as new:
        new.joinpath("missing", "a.txt").write_text("new")
    assert (folder / "a.txt").read_text() == "old"
    with replaced_files(folder, "a.txt") as new:
        (new / "masks").mkdir()
        for name in ("a.txt", "masks/b.txt"):
            (new / name).write_text("new")
    assert [(folder / name).read_text() for name in ("a.txt", "masks/b.txt")] == ["new", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["case"]
    (folder / "log").write_text('{"cut')
    append_line(folder / "log", "{}")
    append_line(folder / "log", "[]")
    assert (folder / "log").read_text() == '{"cut\n{}\n[]\n'
