"""The page in a headless browser: the whole loop, with WebGL and without, and nothing from a network."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")

from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.image import load_labels, save_volume
from atlassegfm.jobs.table import read_run
from atlassegfm.records import RUN
from atlassegfm.settings import Settings
from conftest import Run
from scenes import ATLAS, STRUCTURES, UNREGISTERED, Patient, straight_grid

GRID = straight_grid((32, 28, 24), (3.0, 3.0, 3.0))


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """Start ``atlassegfm serve`` as a process, and give its address."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "atlassegfm", "serve", *map(str, arguments)]
        process = subprocess.Popen(
            [*command, "--no-open", "--port", "0", "--json", "-q"], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        started.append(process)
        assert process.stdout is not None
        return str(json.loads(process.stdout.readline())["url"])

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.fixture
def cohort(tmp_path: Path, run: Run) -> tuple[Path, Path, Path]:
    """A context without a model, two scans, and results of which the second is judged worse."""
    context, scans, out = tmp_path / "ctx", tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    settings = with_overrides(Settings(), ["model=none", *UNREGISTERED])
    save_volume(ATLAS.scan(GRID), tmp_path / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), tmp_path / "labels.nii.gz", structures=STRUCTURES)
    Context.from_files(tmp_path / "atlas.nii.gz", tmp_path / "labels.nii.gz", settings=settings).save(context)
    for name, shift in (("first", 3.0), ("second", 6.0)):
        save_volume(Patient((shift, 0.0, 0.0)).scan(GRID), scans / f"{name}.nii.gz")
    done = run("segment", "--context", context, scans, "-o", out, "--keep", "-q")
    assert done.code == 0, done.err
    record = read_run(out / "second")
    assert record is not None
    liver = record.structures[0]
    judged = liver.quality.model_copy(
        update={"verdict": "failed", "reason": "it lies elsewhere", "estimated_dice": 0.4}
    )
    rows = (liver.model_copy(update={"quality": judged}), *record.structures[1:])
    record.model_copy(update={"structures": rows, "verdict": "failed"}).write(out / "second" / RUN)
    return context, scans, out


def opened(browser: Any, url: str, problems: list[str], scheme: str = "light") -> Any:
    """The page, which must load nothing from elsewhere and end without an error."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme).new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda one: problems.append(one.text) if one.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith((url, "data:", "blob:")) else problems.append(one.url))
    page.goto(url)
    page.wait_for_selector("body[data-page=ready][data-state=ready]")
    return page


def picture(page: Any, view: int) -> np.ndarray:
    from PIL import Image

    page.wait_for_timeout(150)
    shown = page.locator(f"[data-view='{view}'] canvas").screenshot()
    return np.asarray(Image.open(io.BytesIO(shown)).convert("RGB")).astype(int)


def settled(page: Any) -> None:
    page.wait_for_selector("body:not([data-busy])")


def draft(page: Any) -> np.ndarray:
    """Structure numbers as the page has them."""
    shape = page.evaluate("desk.shape")
    return np.array(page.evaluate("[...desk.labels]"), np.uint8).reshape(shape, order="F")


def point(page: Any, view: int, voxel: list[int]) -> tuple[float, float]:
    """Where a voxel lies on the screen."""
    box = page.locator(f"[data-view='{view}'] canvas").bounding_box()
    script = """async ([number, voxel]) => {
      const { SliceView } = await import("./slices.js");
      const canvas = document.querySelectorAll(".view canvas")[number];
      return new SliceView(canvas, number).pointOf(desk, voxel);
    }"""
    x, y = page.evaluate(script, [view, voxel])
    return box["x"] + x, box["y"] + y


@pytest.mark.timeout(240)
def test_the_loop(
    cohort: tuple[Path, Path, Path], server: Callable[..., str], browser: Callable[..., Any], tmp_path: Path
) -> None:
    context, scans, out = cohort
    url, problems = server(context, "--scans", scans, "-o", out), []
    running = browser(webgl=True)
    page = opened(running, url, problems)
    # The worst case first, at its worst structure.
    assert page.locator("#cases b").all_inner_texts() == ["second", "first"]
    assert page.inner_text("#case-name") == "second"
    assert page.inner_text("#structures li.current b") == "liver"
    assert "it lies elsewhere" in page.inner_text("#structures")
    for view in range(3):
        shown = picture(page, view)
        assert shown.std() > 20
        assert (np.ptp(shown, axis=2) > 60).mean() > 0.005  # coloured
    page.wait_for_selector("body[data-solid=ready]")
    assert (np.ptp(picture(page, 3), axis=2) > 60).mean() > 0.005
    page.keyboard.press("1")  # the axial plane alone: 3-D is slow in software

    # One click: the mask changes towards the truth.
    truth = Patient((6.0, 0.0, 0.0)).labels(GRID).data
    before = draft(page)
    missing = np.argwhere((truth == 1) & (before == 0))
    voxel = missing[int(np.abs(missing - missing.mean(axis=0)).sum(axis=1).argmin())].tolist()
    page.evaluate("voxel => { desk.cross = voxel; }", voxel)
    page.keyboard.press("c")
    page.mouse.click(*point(page, 0, voxel))
    settled(page)
    clicked = draft(page)
    assert clicked[tuple(voxel)] == 1
    assert (clicked == 1).sum() > (before == 1).sum()
    assert "answered in" in page.inner_text("#message")

    # A stroke of the brush, which is undone and done again.
    page.keyboard.press("b")
    free = ndimage.distance_transform_edt(np.pad(clicked[:, :, voxel[2]] == 0, 1, constant_values=False))[1:-1, 1:-1]
    middle = np.unravel_index(free.argmax(), free.shape)
    x, y = point(page, 0, [int(middle[0]), int(middle[1]), voxel[2]])
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10, y + 4, steps=4)
    page.mouse.up()
    settled(page)
    painted = draft(page)
    changed = np.argwhere(painted != clicked)
    assert len(changed) > 3
    assert set(changed[:, 2]) == {voxel[2]}
    page.keyboard.press("z")
    settled(page)
    assert np.array_equal(draft(page), clicked)
    page.keyboard.press("y")
    settled(page)
    assert np.array_equal(draft(page), painted)

    # Accepted, and there after the page is loaded again; on the disk to the voxel.
    page.fill("#who", "Ada")
    page.locator("#who").blur()
    page.keyboard.press("Shift+A")
    settled(page)
    assert page.inner_text("#accept-case") == "Case accepted"
    assert np.array_equal(load_labels(out / "second/segmentation.nii.gz").data > 0, painted > 0)
    assert read_run(out / "second").structures[0].review.by == "Ada"
    assert page.locator("#annotator option").all_text_contents() == ["Ada"]
    page.reload()
    page.keyboard.press("1")
    page.wait_for_selector("body[data-page=ready][data-state=ready]")
    assert np.array_equal(draft(page), painted)
    assert page.locator("#cases b").all_inner_texts() == ["first", "second"]

    # An atlas of the context, with which the other case comes out otherwise.
    old = load_labels(out / "first/segmentation.nii.gz").data
    page.keyboard.press("Shift+T")
    settled(page)
    assert len(Context.load(context).atlases) == 2
    page.click("#start")
    page.wait_for_selector("#run[hidden], #progress:not([hidden])")
    page.wait_for_selector("#progress", state="hidden", timeout=120_000)
    assert not np.array_equal(load_labels(out / "first/segmentation.nii.gz").data, old)
    assert np.array_equal(load_labels(out / "second/segmentation.nii.gz").data > 0, painted > 0)

    # Help by key.
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert "interpolate between drawn slices" in page.inner_text("#help")
    running.close()
    assert [one for one in problems if "GPU stall" not in one] == []


@pytest.mark.timeout(120)
def test_without_webgl_the_slices_are_drawn_and_the_page_says_so(
    cohort: tuple[Path, Path, Path], server: Callable[..., str], browser: Callable[..., Any]
) -> None:
    _, scans, out = cohort
    problems: list[str] = []
    running = browser(webgl=False)
    page = opened(running, server("--review-only", "--scans", scans, "-o", out), problems, "dark")
    assert "3-D needs WebGL 2" in page.inner_text("#solid-note")
    assert all(picture(page, view).std() > 20 for view in range(3))
    assert page.is_hidden("#run")
    # By keys alone: the next case, its next structure, absent, undone.
    page.keyboard.press("n")
    page.wait_for_selector("body[data-state=ready]")
    assert page.inner_text("#case-name") == "first"
    page.keyboard.press("s")
    name = page.inner_text("#structures li.current b")
    before = draft(page)
    page.keyboard.press("Delete")
    settled(page)
    assert page.inner_text("#structures li.current .ml") == "0 ml", name
    page.keyboard.press("Control+z")
    settled(page)
    assert np.array_equal(draft(page), before)
    ink, paper = (
        page.evaluate("name => getComputedStyle(document.body)[name]", name) for name in ("color", "backgroundColor")
    )
    assert sum(map(int, ink[4:-1].split(","))) > 600 > 100 > sum(map(int, paper[4:-1].split(",")))
    running.close()
    assert problems == []
