"""Suggesting which scan to contour: the odd one comes last, few pairs are registered, the same input says the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atlassegfm.check import suggest as module
from atlassegfm.check.suggest import scans_in, suggest
from atlassegfm.check.suggest_figure import draw_suggestion
from atlassegfm.core.errors import InputError
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.settings import RegistrationSettings
from conftest import Run
from scenes import Patient, straight_grid

QUICK = RegistrationSettings(coarse_voxels=3000, linear_iterations=4, candidates=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients alike, and one whose organs look otherwise."""
    root = tmp_path_factory.mktemp("scans")
    grid = straight_grid((40, 34, 30), (2.5, 2.5, 2.5))
    for number, (shift, scale) in enumerate(
        (((0, 0, 0), 1.0), ((5, -4, 3), 1.05), ((-6, 2, -4), 0.95), ((2, 5, 0), 1.1))
    ):
        save_volume(Patient(shift, scale).scan(grid), root / f"alike_{number}.nii.gz")
    scan = Patient().scan(grid)
    noise = np.random.default_rng(0).normal(0, 60, grid.shape)
    odd = np.where(scan.data > 0, 250 - scan.data.max() * (scan.data > 150) + noise, 0)
    save_volume(Volume(odd.astype(np.float32), grid), root / "odd.nii.gz")
    return root


def test_the_odd_one_comes_last(folder: Path) -> None:
    found = suggest(scans_in(folder), QUICK)
    assert found.pairs == 10
    assert found.candidates[-1].name == "odd"
    assert found.candidates[0].furthest == "odd"
    assert found.candidates[0].score > 1.3 * found.candidates[-1].score
    assert [one.score for one in found.candidates] == sorted((one.score for one in found.candidates), reverse=True)
    assert np.array_equal(found.similarity, found.similarity.T, equal_nan=True)
    assert np.isnan(np.diag(found.similarity)).all()
    # On the map, too, it is apart.
    alike, odd = found.positions[:4], found.positions[4]
    assert np.linalg.norm(odd - alike.mean(axis=0)) > np.linalg.norm(alike - alike.mean(axis=0), axis=1).max()


def test_same_input_same_answer(folder: Path) -> None:
    files = scans_in(folder)[:3]
    first, second = (suggest(files, QUICK) for _ in range(2))
    assert np.array_equal(first.similarity, second.similarity, equal_nan=True)
    assert np.array_equal(first.positions, second.positions)


def test_a_file_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"nothing")
    found = suggest([*scans_in(folder)[:3], broken], QUICK)
    assert [name for name, _ in found.failures] == ["broken.nii.gz"]
    assert len(found.candidates) == 3
    with pytest.raises(InputError, match=r"2 of 3 scans can be used, expected three or more \(.*broken"):
        suggest([*scans_in(folder)[:2], broken], QUICK)


def test_folders_without_scans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 image files; expected three or more"):
        scans_in(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        scans_in(tmp_path / "no")


@pytest.fixture
def many(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Path]]:
    """So many files, the similarity of which is made up: the nearer the numbers of two files, the more alike."""
    content = (folder / "alike_0.nii.gz").read_bytes()
    scans: dict[int, int] = {}

    def prepare(*arguments: object) -> object:
        scan = type("Fake", (), {})()
        scans[id(scan)] = len(scans)
        kept.append(scan)
        return scan

    kept: list[object] = []
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(
        module, "_similarity", lambda one, other, *_: 1 - abs(scans[id(one)] - scans[id(other)]) / len(scans)
    )

    def make(count: int) -> list[Path]:
        for number in range(count):
            (tmp_path / f"scan_{number:03d}.nii.gz").write_bytes(content)
        return scans_in(tmp_path)

    return make


def test_work_grows_with_the_number_of_scans(many: Callable[[int], list[Path]]) -> None:
    counted = []
    found = suggest(many(60), QUICK, landmarks=8, finalists=3, on_pair=lambda *pair: counted.append(pair))
    assert found.pairs == len(counted) <= 60 * (8 + 3)
    assert found.pairs >= 60 * 8 - 8 * 9 / 2
    compared = [one.compared for one in found.candidates]
    assert compared[:3] == [59, 59, 59]
    assert set(compared[3:]) <= set(range(8, 12)) | {59}
    # The middle one is the nearest to all.
    best = int(found.candidates[0].name[-3:])
    assert 22 <= best <= 37
    assert {int(one.name[-3:]) for one in found.candidates[-2:]} <= {0, 1, 2, 57, 58, 59}
    again = suggest([one.path for one in sorted(found.candidates, key=lambda one: one.name)], QUICK, seed=1)
    assert not np.array_equal(np.isnan(again.similarity), np.isnan(found.similarity))


def test_twelve_scans_are_all_compared(many: Callable[[int], list[Path]]) -> None:
    found = suggest(many(12), QUICK)
    assert found.pairs == 66
    assert {one.compared for one in found.candidates} == {11}


@pytest.mark.parametrize("count", [12, 40])
def test_the_next_one_is_where_no_atlas_is_near(many: Callable[[int], list[Path]], count: int) -> None:
    """A scan in the lower third is contoured: the next one is the middle of what it does not reach."""
    files = many(count)
    contoured = f"scan_{count // 4:03d}"
    found = suggest(files, QUICK, contoured=[contoured])
    assert contoured not in {one.name for one in found.candidates}
    assert found.summary()["contoured"] == [contoured]
    assert count * 0.55 <= int(found.candidates[0].name[-3:]) <= count * 0.8
    with pytest.raises(InputError, match="not one of the scans"):
        suggest(files, QUICK, contoured=["scan_9999"])
    with pytest.raises(InputError, match="contoured already"):
        suggest(files[:3], QUICK, contoured=[path.name[:8] for path in files[:3]])


def test_command(folder: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    quick = ["--set", "registration.coarse_voxels=3000", "--set", "registration.linear_iterations=4"]
    done = run("suggest", folder, "-o", tmp_path / "out", "-q", *quick)
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "out" / "suggest.json").read_text())
    assert done.out.startswith(f"contour {written['best']} first")
    assert (tmp_path / "out" / "suggest.png").read_bytes().startswith(b"\x89PNG")
    assert written["similarity"][0][0] is None
    assert len(written["candidates"]) == 5
    assert str(folder) not in (tmp_path / "out" / "suggest.json").read_text()
    done = run("suggest", tmp_path / "no", "--json")
    assert done.code == 2
    assert "no such folder" in done.err


def test_picture_of_many_scans_is_drawn(many: Callable[[int], list[Path]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = suggest(many(40), QUICK)
    draw_suggestion(found, tmp_path / "a.png")
    draw_suggestion(found, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
