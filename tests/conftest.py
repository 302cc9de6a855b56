"""What several test modules share: synthetic scans, awkward grids, and the folder of real scans."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.models import BASELINES, MODELS, accept_licence
from atlassegfm.quality.estimate import regressions
from atlassegfm.settings import RegistrationSettings

# Examples are the same on every machine, and a busy one is not a failure.
settings.register_profile(
    "project", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")


def rotation(x_deg: float, y_deg: float, z_deg: float) -> NDArray[np.float64]:
    """(3, 3) rotation by degrees about x, then y, then z."""
    matrix = np.eye(3)
    for axis, degrees in enumerate((x_deg, y_deg, z_deg)):
        one, two = [n for n in range(3) if n != axis]
        turn = np.eye(3)
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn[one, one], turn[one, two], turn[two, one], turn[two, two] = c, -s, s, c
        matrix = turn @ matrix
    return matrix


def affine_of(axes: NDArray[np.float64], origin_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """(4, 4) affine with the given columns, mm, and the position of voxel (0, 0, 0)."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = origin_mm
    return affine


#: One affine for each way a scan can lie in the world; spacing 1.5 x 2 x 4 mm, so that swapped axes show.
ORIENTATIONS: dict[str, NDArray[np.float64]] = {
    "RAS": affine_of(np.diag([1.5, 2.0, 4.0]), (-20.0, 30.0, 7.0)),
    "LPS": affine_of(np.diag([-1.5, -2.0, 4.0]), (-20.0, 30.0, 7.0)),
    "LAS": affine_of(np.diag([-1.5, 2.0, 4.0]), (-20.0, 30.0, 7.0)),
    "SRA": affine_of(np.array([[0, 2.0, 0], [0, 0, 4.0], [1.5, 0, 0]]), (1.0, 2.0, 3.0)),
    "oblique": affine_of(rotation(20, -15, 33) @ np.diag([1.5, 2.0, 4.0]), (5.0, -6.0, 70.0)),
    "oblique-flipped": affine_of(rotation(10, 25, -12) @ np.diag([-1.5, 2.0, -4.0]), (5.0, -6.0, 70.0)),
}

#: Axes that are not at right angles: a gantry tilted by 20 degrees.
SHEARED = affine_of(np.array([[1.5, 0, 0], [0, 2.0, 4.0 * np.tan(np.deg2rad(20))], [0, 0, 4.0]]), (-9.0, 8.0, 7.0))


@dataclass(frozen=True)
class Outcome:
    """How the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def made_up_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the weights of whoever runs the tests out of them; those made up here are under nobody's licence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATLASSEGFM_MODELS", str(tmp_path_factory.mktemp("models")))
        for name in (*MODELS, *BASELINES):
            accept_licence(name)
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program with these arguments, in this process, on a wide screen."""
    from atlassegfm.cli.app import main

    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["atlassegfm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def browser() -> Iterator[Callable[..., Any]]:
    """Start the browser that is installed, with software WebGL or without any."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: looked for {', '.join(names)}")
    software = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with api.sync_playwright() as playwright:

        def start(*, webgl: bool) -> Any:
            arguments = ["--no-sandbox", *(software if webgl else ["--disable-gpu", "--disable-3d-apis"])]
            return playwright.chromium.launch(executable_path=program, args=arguments)

        yield start


@pytest.fixture
def mirror_images() -> None:
    """Let ``segment`` fit mirror images in this test."""


@pytest.fixture(autouse=True)
def _few_fits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the fits of mirror images, hundreds of them; tests of these ask for them."""
    if "mirror_images" not in request.fixturenames:
        module = importlib.import_module("atlassegfm.segment")
        monkeypatch.setattr(module, "_sides", lambda *_: None)


@pytest.fixture
def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit scans to an atlas in no time: on small scans, sides and contrast still show."""
    quick = RegistrationSettings(coarse_voxels=6000, fine_voxels=12_000, linear_iterations=8, candidates=1)
    monkeypatch.setattr("atlassegfm.quality.mirror.RegistrationSettings", lambda: quick)


@pytest.fixture
def synthetic_image() -> Callable[..., Volume]:
    """Build a scan of smooth blobs and noise: ``synthetic_image(shape, affine, dtype=..., seed=...)``."""

    def build(
        shape: tuple[int, int, int] = (7, 8, 9),
        affine: NDArray[np.float64] | None = None,
        *,
        dtype: type = np.float32,
        seed: int = 0,
    ) -> Volume:
        random = np.random.default_rng(seed)
        grid = Grid(shape, ORIENTATIONS["RAS"] if affine is None else affine)
        ijk = np.moveaxis(np.indices(shape), 0, -1)
        data = random.normal(0, 20, shape)
        for centre in random.uniform(0, shape, (3, 3)):
            data += 500 * np.exp(-(((ijk - centre) / (np.array(shape) / 4)) ** 2).sum(axis=-1))
        return Volume(data.astype(dtype), grid)

    return build


@pytest.fixture
def synthetic_labels() -> Callable[..., Volume]:
    """Build a label map of boxes, asymmetric along every axis: ``synthetic_labels(shape, affine, values=...)``."""

    def build(
        shape: tuple[int, int, int] = (7, 8, 9),
        affine: NDArray[np.float64] | None = None,
        *,
        values: tuple[int, ...] = (1, 2),
        dtype: type = np.uint8,
    ) -> Volume:
        data = np.zeros(shape, dtype)
        for number, value in enumerate(values):
            data[1 + number : 4 + number, 2 : 5 + number, 3 + number : 5 + number] = value
        return Volume(data, Grid(shape, ORIENTATIONS["RAS"] if affine is None else affine))

    return build


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real scans in nnU-Net raw layout; tests that need it are skipped without it."""
    named = os.environ.get("ATLASSEGFM_DATA")
    shared = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    for candidate in (shared / "data", shared):
        if any(candidate.glob("Dataset*/dataset.json")):
            return candidate
    where = f"{named} has" if named else "ATLASSEGFM_DATA is not set, and ../shared has"
    pytest.skip(f"no real scans: {where} no Dataset*/dataset.json")


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts for any settings: those of quick tests are not the ones they are calibrated for."""
    monkeypatch.setattr("atlassegfm.quality.verdict.quality_settings", lambda _: {})


@pytest.fixture
def under_review(calibrated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts of "review" for whatever was found, however good it is."""
    shipped = {kind: replace(one, good_from=1.1, failed_below=0.0) for kind, one in regressions().items()}
    monkeypatch.setattr("atlassegfm.quality.estimate.regressions", lambda: shipped)
