"""Measure how long the page of `serve` takes to open a case in headless Chromium, and to answer a click.

    python benchmarks/page_speed.py [--shape I J K] [--clicks N] [--folder FOLDER]

Cases are made: a body of soft tissue with ten organs, by default once with 96 x 96 x 64 voxels and once as a CT with
512 x 512 x 300. Times are those of the person: from the address to the first picture, of a server that has just been
started and once more; and from the click beside an organ to the new outline. 3-D is left out: without a GPU it is drawn
by the processor. FOLDER keeps the cases.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.labels import structures_of

SHAPES = ((96, 96, 64), (512, 512, 300))
#: Organs, and their radius where the scan reaches from -1 to 1.
ORGANS, RADIUS = 10, 0.2
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def main() -> None:
    """Make cases, open them, click, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, action="append", help="voxels of a case; may be repeated")
    parser.add_argument("--clicks", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for shape in options.shape or SHAPES:
            name = "x".join(map(str, shape))
            folder = (options.folder or Path(temporary)) / name
            if not folder.exists():
                make_case(folder, tuple(shape))
            first, again, clicks = measure(folder, options.clicks)
            print(f"{name}: opens in {first:.2f} s, again in {again:.2f} s", end="")
            print(f"; a click {statistics.median(clicks):.2f} s (median of {len(clicks)}), {max(clicks):.2f} s at most")


def make_case(folder: Path, shape: tuple[int, int, int]) -> None:
    """Write a scan and its labels: organs of different density in a body, of 400 x 400 x 450 mm."""
    grid = Grid(shape, np.diag([*(np.array([400.0, 400.0, 450.0]) / shape), 1.0]))
    i, j, k = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    i, j, k = i[:, None, None], j[None, :, None], k[None, None, :]
    labels = np.zeros(shape, np.uint8)
    for n in range(ORGANS):
        x, y, z = middle_of(n)
        labels[(i - x) ** 2 + (j - y) ** 2 + (k - z) ** 2 < RADIUS**2] = n + 1
    noise = np.random.default_rng(0).normal(0, 15, shape).astype(np.float32)
    data = np.where(i**2 + j**2 < 0.8, 20 + 12.0 * labels + noise, -1000).astype(np.int16)
    for part in ("scans", "labels"):
        (folder / part).mkdir(parents=True)
    save_volume(Volume(data, grid), folder / "scans/case.nii.gz")
    save_volume(Volume(labels, grid), folder / "labels/case.nii.gz", structures=structures_of(range(1, ORGANS + 1), ()))


def middle_of(number: int) -> tuple[float, float, float]:
    """Place an organ: coordinates from -1 to 1."""
    return 0.5 * math.cos(2.4 * number), 0.5 * math.sin(2.4 * number), -0.8 + 0.17 * number


def measure(folder: Path, clicks: int) -> tuple[float, float, list[float]]:
    """Seconds to the first picture, the same once more, and of each click."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        raise SystemExit(f"no browser: looked for {', '.join(PROGRAMS)}")
    with tempfile.TemporaryDirectory() as out, sync_playwright() as playwright:
        command = [sys.executable, "-m", "atlassegfm", "serve", "--review-only", "--scans", folder / "scans"]
        command += ["--labels", folder / "labels", "-o", out, "--no-open", "--port", "0", "--json", "-q"]
        server = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-3d-apis"]
        )
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            times = [opened(browser, url)[0]]
            seconds, page = opened(browser, url)
            return times[0], seconds, [clicked(page, n % ORGANS) for n in range(clicks)]
        finally:
            browser.close()
            server.terminate()
            server.wait()


def opened(browser: Any, url: str) -> tuple[float, Any]:
    """Open the page, and wait until the case is drawn."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.set_default_timeout(120_000)
    start = time.perf_counter()
    page.goto(url)
    page.wait_for_selector("body[data-page=ready][data-state=ready]")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    return time.perf_counter() - start, page


def clicked(page: Any, number: int) -> float:
    """Click 4 mm outside an organ, along the first axis."""
    x, y, z = middle_of(number)
    place = [
        round((one + 1) / 2 * (n - 1))
        for one, n in zip((x + RADIUS + 0.02, y, z), page.evaluate("desk.shape"), strict=True)
    ]
    page.evaluate("([structure, cross]) => Object.assign(desk, { structure, cross })", [number + 1, place])
    page.keyboard.press("c")
    start = time.perf_counter()
    page.keyboard.press("Enter")
    page.wait_for_selector("body:not([data-busy])")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    seconds = time.perf_counter() - start
    said = page.inner_text("#message")
    if "answered in" not in said:
        raise SystemExit(f"the click was not answered: {said}")
    return seconds


if __name__ == "__main__":
    main()
