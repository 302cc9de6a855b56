"""Engines of other packages: what goes to them and what comes back.

Most tests put a small program in the peer's place. Those with a real peer are skipped where it is not installed; name
environments of their own in ATLASSEGFM_GREEDY_PYTHON, ATLASSEGFM_ANTS_PYTHON, ATLASSEGFM_ELASTIX_PYTHON.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import scenes
from atlassegfm.core.errors import InputError, MissingExtraError, RegistrationError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume
from atlassegfm.registration import ENGINES, Registration, pyramid, register, require_engine
from atlassegfm.registration.engines import elastix, external, external_process
from atlassegfm.registration.pyramid import Pair
from atlassegfm.settings import RegistrationSettings
from atlassegfm.transforms.maps import Affine, Chain, DisplacementField, Transform
from atlassegfm.transforms.resample import resample
from conftest import ORIENTATIONS, SHEARED, affine_of, rotation
from deformations import centred_grid

PEERS = [name for name, engine in ENGINES.items() if engine.is_external]
#: Turned by 8 degrees, stretched by 5 to 8 % and shifted by about 1 cm.
MOTION = affine_of(rotation(2, -3, 7) @ np.diag([1.05, 1.06, 0.92]), (6.0, -7.0, 5.0))
FOUR = ["RAS", "LPS", "SRA", "oblique-flipped"]


def pair_of(fixed: Volume, moving: Volume) -> Pair:
    """A pair as :func:`register` makes it."""
    spacings = pyramid.level_spacings_mm(fixed.grid, (4_000, 12_000))
    return Pair(
        fixed,
        moving,
        pyramid.prepare(fixed, None, spacings[-1], "query"),
        pyramid.prepare(moving, None, spacings[-1], "atlas"),
        None,
    )


@functools.cache
def made_up_pair(orientation: str = "RAS", bend_mm: float = 0.0) -> tuple[Pair, Transform]:
    """An anisotropic query, an oblique atlas, and the exact map from one to the other."""
    matrix = {**ORIENTATIONS, "sheared": SHEARED}[orientation]
    axes = matrix[:3, :3] / np.array([1.5, 2.0, 4.0]) * np.array([2.0, 2.5, 3.5])
    grid = centred_grid((36, 30, 26), axes)
    atlas_axes = rotation(5, 5, -5) @ np.diag([-2.0, 2.0, 2.5])
    moving = scenes.ATLAS.scan(centred_grid((50, 42, 48), atlas_axes))
    truth: Transform = Affine(MOTION)
    if bend_mm:
        around = centred_grid((30, 30, 30), np.diag([4.0, 4.0, 4.0]))
        x, y, z = np.moveaxis(around.voxel_to_world(np.moveaxis(np.indices(around.shape), 0, -1)), -1, 0)
        bend = bend_mm * np.stack([np.sin(y / 15), np.cos(z / 18), np.sin(x / 16)])
        truth = Chain((DisplacementField(around, bend.astype(np.float32)), truth))
    # Seen from finer than the query, so that its edges are its own.
    fine = scenes.ATLAS.scan(centred_grid((70, 60, 80), np.diag([1.5, 1.5, 1.6])))
    return pair_of(Volume(resample(fine, grid, truth), grid), moving), truth


def error_mm(found: Transform, truth: Transform, scan: Volume) -> float:
    """Mean distance between where two transforms take the body."""
    points = scan.grid.voxel_to_world(np.argwhere(scan.data > 30)[::7])
    return float(np.linalg.norm(found.map(points) - truth.map(points), axis=1).mean())


def composed(fitted: Registration) -> Transform:
    return fitted.linear if fitted.field is None else Chain((fitted.field, fitted.linear))


# --- the grid a peer sees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        # Abd-MR, Abd-CT, OASIS, Hippocampus, Cardiac: the spacings of the reference figures are 2.5 x 2.5 x 5, 3, 1.5,
        # 1 and 1.6 x 1.6 x 4 mm.
        ((256, 256, 34), (1.25, 1.25, 7.7), (2.3, 2.3, 4.2)),
        ((257, 257, 125), (1.2, 1.2, 3.0), (3.1, 3.1, 3.1)),
        ((160, 197, 164), (1.0, 1.0, 1.0), (1.6, 1.6, 1.6)),
        ((35, 51, 35), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        ((256, 256, 13), (1.25, 1.25, 7.99), (1.6, 1.6, 3.6)),
    ],
)
def test_working_grid_is_about_that_of_the_reference(
    shape: tuple[int, int, int], spacing: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    grid = centred_grid(shape, np.diag(spacing))
    found = external.working_grid(grid, external.working_spacing_mm(grid, 1_200_000))
    np.testing.assert_allclose(found.spacing_mm, expected, atol=0.1)
    assert found.size < 1.02 * 1_200_000


def test_working_grid_does_not_depend_on_the_order_of_axes() -> None:
    straight = centred_grid((40, 30, 10), np.diag([1.0, 1.0, 6.0]))
    turned = Grid((10, 40, 30), straight.affine[:, [2, 0, 1, 3]])
    assert external.working_spacing_mm(turned, 5_000) == pytest.approx(external.working_spacing_mm(straight, 5_000))
    assert external.working_grid(turned, 2.0).matches(external.working_grid(straight, 2.0))


def test_a_small_isotropic_scan_is_given_as_it_is() -> None:
    scan = scenes.ATLAS.scan(scenes.straight_grid())
    spacing = external.working_spacing_mm(scan.grid, 1_200_000)
    grid = external.working_grid(scan.grid, spacing)
    assert grid.matches(scan.grid, 1e-9)
    np.testing.assert_allclose(external._on_grid(scan, grid), scan.data, atol=1e-4)


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, "sheared"])
def test_working_grid_is_straight_and_covers_the_scan(orientation: str) -> None:
    grid = Grid((20, 30, 12), {**ORIENTATIONS, "sheared": SHEARED}[orientation])
    found = external.working_grid(grid, 2.5)
    axes = found.affine[:3, :3] / found.spacing_mm
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) > 0
    outside = found.world_to_voxel(grid.corners_mm)
    assert (outside > -0.51).all()
    assert (outside < np.array(found.shape) - 0.49).all()


def test_what_a_peer_sees_is_the_scan_with_a_dark_background(synthetic_image: Any) -> None:
    scan: Volume = synthetic_image((40, 30, 12), ORIENTATIONS["oblique"])
    smooth = Volume(np.indices(scan.grid.shape).sum(axis=0).astype(np.float32) - 1000, scan.grid)
    grid = external.working_grid(scan.grid, 4.0)
    found = external._on_grid(smooth, grid)
    expected = grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    expected = scan.grid.world_to_voxel(expected).sum(axis=-1)
    inner = (slice(2, -2),) * 3
    # What was taken off to make the darkest 0 is one number.
    assert np.ptp((found - expected)[inner]) < 0.5
    assert 0 <= found.min() < 2


# --- the exchange, with a program in the peer's place -----------------------------------------------------------


class FakePeer:
    """A program that keeps what it was given, and does ``body``."""

    def __init__(self, folder: Path) -> None:
        self.path, self.kept = folder / "fake-python", folder / "kept"

    def write(self, body: str, check: int = 0) -> str:
        self.path.write_text(
            f"#!{sys.executable}\n"
            "import json, os, shutil, signal, sys\n"
            "import numpy as np\n"
            "if sys.argv[2] == '--check':\n"
            f"    sys.exit({check})\n"
            "folder = sys.argv[2]\n"
            f"shutil.copytree(folder, {str(self.kept)!r})\n"
            f"open({str(self.kept / 'environment.json')!r}, 'w').write(json.dumps([folder, dict(os.environ)]))\n"
            "os.chdir(folder)\n"
            "shape = np.load('fixed.npy').shape\n"
            "def answer(linear=np.eye(4), field=None):\n"
            "    np.save('displacement.npy', np.ones((3, *shape), np.float32) if field is None else field)\n"
            "    open('parameters.json', 'w').write('{\"deformable\": 3}')\n"
            "    np.save('linear.npy', linear)\n"
            f"{body}\n"
        )
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        return str(self.path)

    def request(self) -> dict[str, Any]:
        return dict(json.loads((self.kept / "request.json").read_text()))

    def environment(self) -> tuple[str, dict[str, str]]:
        folder, environment = json.loads((self.kept / "environment.json").read_text())
        return folder, environment


@pytest.fixture
def fake(tmp_path: Path) -> FakePeer:
    return FakePeer(tmp_path)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    external._is_installed.cache_clear()


def settings_with(python: str, engine: str = "greedy", **options: Any) -> RegistrationSettings:
    settings = RegistrationSettings(engine=engine)  # type: ignore[arg-type]
    return replace(settings, **{engine: replace(getattr(settings, engine), python=python, **options)})


def fit(pair: Pair, settings: RegistrationSettings, linear: Affine | None = None) -> Registration:
    return external.fit(pair, linear, None, settings, "cpu")


def test_the_request_holds_all_that_matters(fake: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/this/python")
    pair, _ = made_up_pair("oblique")
    settings = settings_with(fake.write("answer()"), seed=11, metric_radius=3, voxels=20_000)
    fitted = fit(pair, settings)
    assert fitted.linear.matrix.tolist() == np.eye(4).tolist()
    assert fitted.field is not None
    assert (fitted.field.displacement_mm == 1).all()
    assert fitted.parameter_count == {"deformable": 3}
    request = fake.request()
    assert request.pop("options") == {
        "search_tries": 200,
        "search_rotation_deg": 180.0,
        "search_shift_mm": 40.0,
        "metric_radius": 3,
        "iterations": "100x50x20",
        "update_smoothing_voxels": 2.0,
        "field_smoothing_voxels": 0.5,
    }
    spacing = external.working_spacing_mm(pair.fixed.grid, 20_000)
    for name, scan in (("fixed", pair.fixed), ("moving", pair.moving)):
        grid = external.working_grid(scan.grid, spacing)
        np.testing.assert_array_equal(request.pop(f"{name}_affine"), grid.affine)
        np.testing.assert_array_equal(np.load(fake.kept / f"{name}.npy"), external._on_grid(scan, grid))
    assert fitted.field.grid.shape == np.load(fake.kept / "fixed.npy").shape
    assert request == {
        "engine": "greedy",
        "threads": torch.get_num_threads(),
        "seed": 11,
        "rigid": True,
        "affine": True,
        "deformable": True,
        "linear": None,
    }
    _, environment = fake.environment()
    assert "PYTHONPATH" not in environment
    for variable in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
        assert environment[variable] == str(torch.get_num_threads())
    assert environment["ANTS_RANDOM_SEED"] == "11"


def test_a_given_linear_map_is_handed_on(fake: FakePeer) -> None:
    pair, _ = made_up_pair()
    fit(pair, settings_with(fake.write("answer()")), Affine(MOTION))
    np.testing.assert_array_equal(fake.request()["linear"], MOTION)


def test_without_the_deformable_stage_there_is_no_field(fake: FakePeer) -> None:
    pair, _ = made_up_pair()
    settings = replace(settings_with(fake.write("answer()")), deformable=False)
    assert fit(pair, settings).field is None
    assert fake.request()["deformable"] is False


@pytest.mark.parametrize("body", ["answer()", "sys.exit('no')"])
def test_the_folder_of_the_exchange_is_removed(fake: FakePeer, body: str) -> None:
    pair, _ = made_up_pair()
    settings = settings_with(fake.write(body))
    if body == "answer()":
        fit(pair, settings)
    else:
        with pytest.raises(RegistrationError):
            fit(pair, settings)
    folder, _ = fake.environment()
    assert Path(folder).name.startswith("atlassegfm-engine-")
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('fine'); sys.exit('itk::ERROR: too few samples')", "greedy.*itk::ERROR: too few samples"),
        ("sys.exit(2)", "greedy"),
        ("print('level 2', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV.*level 2"),
        ("raise MemoryError('x' * 1000)", r"MemoryError: x{200,300}\)$"),
        ("pass", "greedy.*linear.npy"),
        ("answer(); open('linear.npy', 'w').write('?')", "greedy"),
        ("answer(); os.remove('displacement.npy')", "greedy.*displacement.npy"),
        ("answer(np.eye(3))", "greedy.*linear map"),
        ("answer(np.full((4, 4), np.nan))", "greedy.*linear map"),
        ("answer(np.diag([-1.0, 1, 1, 1]))", "greedy.*linear map"),
        ("answer(field=np.zeros((3, 2, 2, 2), np.float32))", r"\(3, 2, 2, 2\)"),
        ("answer(field=np.full((3, *shape), np.nan, np.float32))", "greedy.*displacement field"),
    ],
)
def test_a_peer_that_fails_fails_the_pair_alone(fake: FakePeer, body: str, message: str) -> None:
    pair, _ = made_up_pair()
    with pytest.raises(RegistrationError, match=message):
        fit(pair, settings_with(fake.write(body)))


@pytest.mark.parametrize("engine", PEERS)
def test_a_peer_that_is_not_there_is_told_with_the_remedy(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"ATLASSEGFM_{engine.upper()}_PYTHON", raising=False)
    monkeypatch.setattr(external, "_is_installed", lambda *_: False)
    remedy = {
        "greedy": "pip install .*picsl.greedy",
        "ants": "python3 -m venv ants-env && ants-env/bin/pip install antspyx && export ATLASSEGFM_ANTS_PYTHON=",
        "elastix": "pip install .*itk-elastix",
    }
    with pytest.raises(MissingExtraError, match=f"^the engine '{engine}' needs .* not installed; .*{remedy[engine]}"):
        require_engine(RegistrationSettings(engine=engine))  # type: ignore[arg-type]


def test_a_named_python_without_the_peer_is_told_apart(fake: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    python = fake.write(f"sys.exit({external_process.MISSING})", check=external_process.MISSING)
    with pytest.raises(MissingExtraError, match=f"install it with: {python} -m pip install picsl_greedy$"):
        require_engine(settings_with(python))
    pair, _ = made_up_pair()
    with pytest.raises(MissingExtraError, match=f"install it with: {python} -m pip install picsl_greedy$"):
        fit(pair, settings_with(python))
    monkeypatch.setenv("ATLASSEGFM_ANTS_PYTHON", python)
    with pytest.raises(MissingExtraError, match=f"install it with: {python} -m pip install antspyx$"):
        require_engine(RegistrationSettings(engine="ants"))


def test_the_setting_goes_before_the_environment(fake: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLASSEGFM_GREEDY_PYTHON", "/no/such/python")
    require_engine(settings_with(fake.write("answer()")))
    with pytest.raises(InputError, match="^ATLASSEGFM_GREEDY_PYTHON is '/no/such/python'; expected the path"):
        require_engine(RegistrationSettings(engine="greedy"))


def test_a_python_that_is_none_is_bad_input(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=r"^registration\.ants\.python is '.*'; expected the path of a Python"):
            require_engine(settings_with(str(place), "ants"))
    text = tmp_path / "text"
    text.write_bytes(b"\0\0no program")
    text.chmod(0o755)
    with pytest.raises(InputError, match="text: does not run .* expected a Python"):
        require_engine(settings_with(str(text), "ants"))


def test_our_own_engines_need_nothing() -> None:
    require_engine(RegistrationSettings())


def test_register_hands_peers_the_linear_stages(fake: FakePeer) -> None:
    pair, _ = made_up_pair()
    settings = replace(settings_with(fake.write("answer()")), coarse_voxels=2_000, fine_voxels=4_000)
    found = register(pair.fixed, pair.moving, settings)
    assert fake.request()["linear"] is None
    assert found.field is not None
    assert (found.linear.matrix == np.eye(4)).all()
    assert "linear" not in found.seconds


def test_register_keeps_them_where_it_is_told_to(fake: FakePeer) -> None:
    pair, _ = made_up_pair()
    settings = replace(
        settings_with(fake.write("answer(np.array(json.load(open('request.json'))['linear']))")),
        coarse_voxels=2_000,
        fine_voxels=4_000,
        linear_iterations=3,
        candidates=1,
        peer_linear=False,
    )
    found = register(pair.fixed, pair.moving, settings)
    np.testing.assert_array_equal(fake.request()["linear"], found.linear.matrix)
    assert not np.allclose(found.linear.matrix, np.eye(4))


# --- the far side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("external_process", set()),
        ("greedy", {"SimpleITK", "picsl_greedy"}),
        ("ants", {"ants"}),
        ("elastix", {"itk"}),
    ],
)
def test_the_far_side_stands_alone(name: str, packages: set[str]) -> None:
    tree = ast.parse(Path(external_process.__file__).with_name(f"{name}.py").read_text(), feature_version=(3, 9))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"} | packages


def test_the_runner_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(MODULES=("json", "no_such_module"))
    monkeypatch.setattr(external_process, "load", lambda _: engine)
    assert external_process.main(["--check", "greedy"]) == external_process.MISSING
    (tmp_path / "request.json").write_text('{"engine": "greedy"}')
    assert external_process.main([str(tmp_path)]) == external_process.MISSING
    engine.MODULES = ("json",)
    assert external_process.main(["--check", "greedy"]) == 0


def test_images_for_itk_are_in_lps() -> None:
    image = external_process.Image(np.zeros((2, 3, 4)), ORIENTATIONS["RAS"])
    assert image.origin.tolist() == [20, -30, 7]
    assert image.spacing.tolist() == [1.5, 2, 4]
    assert image.direction.tolist() == [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]


def test_displacements_turn_to_ras() -> None:
    lps = np.zeros((2, 3, 4, 3))
    lps[..., :] = (1, 2, 3)
    found = external_process.Image.to_ras(lps)
    assert found.shape == (3, 2, 3, 4)
    assert found[:, 1, 2, 3].tolist() == [-1, -2, 3]


def test_a_linear_displacement_gives_its_matrix() -> None:
    image = external_process.Image(np.zeros((9, 10, 11)), ORIENTATIONS["oblique"])
    nodes = image.nodes()
    moved = np.einsum("ab,bijk->aijk", MOTION[:3, :3], nodes) + MOTION[:3, 3][:, None, None, None]
    np.testing.assert_allclose(elastix._fitted_matrix(image, moved - nodes), MOTION, atol=1e-9)


# --- real peers -------------------------------------------------------------------------------------------------


def need(engine: str) -> RegistrationSettings:
    """Settings of an engine that is there, on 3 mm for speed; skipped, with the reason, where it is not."""
    settings = settings_with("", engine, voxels=20_000)
    try:
        require_engine(settings)
    except MissingExtraError as error:
        pytest.skip(str(error))
    return settings


@pytest.mark.parametrize("orientation", [*FOUR, "sheared"])
def test_greedy_finds_a_known_motion(orientation: str) -> None:
    settings = need("greedy")
    pair, truth = made_up_pair(orientation)
    before = error_mm(Affine.identity(), truth, pair.fixed)
    fitted = fit(pair, replace(settings, deformable=False))
    assert fitted.field is None
    assert fitted.parameter_count == {"linear": 12}
    assert before > 8
    assert error_mm(fitted.linear, truth, pair.fixed) < 1.5


@pytest.mark.parametrize("orientation", ["SRA", "oblique-flipped"])
def test_greedy_finds_a_known_deformation(orientation: str) -> None:
    settings = need("greedy")
    pair, truth = made_up_pair(orientation, bend_mm=4)
    linear_alone = error_mm(Affine(MOTION), truth, pair.fixed)
    fitted = fit(pair, settings, Affine(MOTION))
    np.testing.assert_array_equal(fitted.linear.matrix, MOTION)
    assert fitted.field is not None
    assert fitted.parameter_count == {"deformable": 3 * fitted.field.grid.size}
    assert linear_alone > 3
    assert error_mm(composed(fitted), truth, pair.fixed) < 0.6 * linear_alone


def test_greedy_gives_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = need("greedy")
    # With more threads it does not: its sums depend on who comes first.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    settings = replace(settings, greedy=replace(settings.greedy, iterations="20x5x2"))
    pair, _ = made_up_pair("oblique", bend_mm=3)
    first, second = fit(pair, settings), fit(pair, settings)
    np.testing.assert_array_equal(first.linear.matrix, second.linear.matrix)
    assert first.field is not None
    assert second.field is not None
    np.testing.assert_array_equal(first.field.displacement_mm, second.field.displacement_mm)


def test_greedy_fits_the_stages_that_are_switched_on() -> None:
    settings = replace(need("greedy"), deformable=False)
    pair, _ = made_up_pair()
    rigid = fit(pair, replace(settings, affine=False))
    np.testing.assert_allclose(np.linalg.svd(rigid.linear.matrix[:3, :3])[1], 1, atol=1e-3)
    assert rigid.parameter_count == {"linear": 6}
    affine = fit(pair, replace(settings, rigid=False))
    assert np.ptp(np.linalg.svd(affine.linear.matrix[:3, :3])[1]) > 0.05


def test_greedy_serves_the_whole_registration() -> None:
    settings = replace(need("greedy"), coarse_voxels=2_000, fine_voxels=4_000)
    pair, truth = made_up_pair("oblique", bend_mm=3)
    found = register(pair.fixed, pair.moving, settings)
    assert error_mm(found.fixed_to_moving, truth, pair.fixed) < 2.5
    assert set(found.seconds) == {"prepare", "deformable", "assess"}


@pytest.mark.slow
@pytest.mark.parametrize("orientation", FOUR)
@pytest.mark.parametrize("engine", ["ants", "elastix"])
def test_other_peers_agree_with_us(engine: str, orientation: str) -> None:
    settings = need(engine)
    pair, truth = made_up_pair(orientation, bend_mm=3)
    fitted = fit(pair, settings)
    assert error_mm(composed(fitted), truth, pair.fixed) < 3
    fitted = fit(pair, settings, Affine(MOTION))
    np.testing.assert_allclose(fitted.linear.matrix, MOTION, atol=1e-5)
    fitted = fit(pair, replace(settings, affine=False, deformable=False))
    np.testing.assert_allclose(np.linalg.svd(fitted.linear.matrix[:3, :3])[1], 1, atol=1e-3)


def test_the_environment_is_left_alone(fake: FakePeer) -> None:
    before = dict(os.environ)
    pair, _ = made_up_pair()
    fit(pair, settings_with(fake.write("answer()")))
    assert dict(os.environ) == before
