"""Vessels: made trees, and what registration and method do for structures that are marked as tubular."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

import scenes
from atlassegfm.atlas import Atlas
from atlassegfm.benchmark.vessels import VESSELS, Subject, make_branches, tree_pairs, write_trees
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.evaluate.metrics import score_masks
from atlassegfm.models.base import PromptedScan
from atlassegfm.models.table import load_chosen
from atlassegfm.models.tubes import follow_branches
from atlassegfm.quality.verdict import NOT_JUDGED_TUBULAR, judge
from atlassegfm.records import RunRecord
from atlassegfm.registration import pyramid
from atlassegfm.registration.centreline import find_centreline
from atlassegfm.registration.engines import instance
from atlassegfm.report import write_report
from atlassegfm.result import Segmentation
from atlassegfm.segment import segment
from atlassegfm.settings import InstanceSettings, RegistrationSettings, Settings
from atlassegfm.transforms.maps import Affine
from conftest import Run
from deformations import centred_grid
from result_folders import WITHOUT_PICTURES, write_result
from scenes import QUICK_GATE

#: Scan and labels of each of two subjects.
Scans = tuple[tuple[Volume, Volume], tuple[Volume, Volume]]
COARSER = 2.0
#: A registration of a second or two.
QUICK = (
    "registration.coarse_voxels=8000",
    "registration.fine_voxels=20000",
    "registration.instance.level_voxels=[8000, 20000]",
    "registration.instance.local_voxels=60000",
    "registration.instance.iterations=[15]",
    "registration.instance.ensemble=1",
    "registration.linear_iterations=10",
    "registration.candidates=1",
    "fusion.simulation.sizes=[0.07, 0.14]",
)


def cldice(result: Volume, reference: Volume) -> float:
    spacing = result.grid.spacing_mm
    scores = score_masks(
        result.data, reference.data, (spacing[0], spacing[1], spacing[2]), tolerance_mm=1, centreline=True
    )
    assert scores.cldice is not None
    return scores.cldice


# Made trees


@pytest.fixture(scope="module")
def pair() -> Scans:
    """Two subjects with one tree: scan and labels of each."""
    one, other = (Subject(4, n) for n in range(2))
    return one.scan(one.grid(COARSER)), other.scan(other.grid(COARSER))


def test_seed_makes_the_same_scan_again(pair: Scans) -> None:
    again = Subject(4, 1).scan(Subject(4, 1).grid(COARSER))
    for made, remade in zip(pair[1], again, strict=True):
        np.testing.assert_array_equal(made.data, remade.data)


def test_subjects_share_the_branches_and_nothing_else(
    pair: Scans,
) -> None:
    one, other = Subject(4, 0), Subject(4, 1)
    assert len(one.vessels) == len(other.vessels) == len(make_branches(4)) > 20
    assert one.grid().shape != other.grid().shape
    radii = [radii.min() for _, radii in one.vessels]
    assert max(radii) > 4 * min(radii)  # several calibres
    assert all(
        not np.allclose(mine[-1], theirs[-1], atol=0.5)
        for (mine, _), (theirs, _) in zip(one.vessels, other.vessels, strict=True)
    )
    for _, labels in pair:
        _, parts = ndimage.label(labels.data, np.ones((3, 3, 3)))
        assert parts == 1
        spacing_mm = labels.grid.spacing_mm
        assert spacing_mm[2] > 1.1 * spacing_mm[0]


def test_trees_are_written_as_a_dataset(tmp_path: Path) -> None:
    write_trees(tmp_path / "trees", [3], 2, coarser=4)
    dataset = load_dataset(tmp_path / "trees")
    assert [case.name for case in dataset.cases] == ["tree003-1", "tree003-2"]
    assert dataset.structures == {1: "vessels"}
    pairs = tree_pairs([3, 5], 2)
    assert [(one.atlas, one.query) for one in pairs[:2]] == [("tree003-1", "tree003-2"), ("tree003-2", "tree003-1")]
    assert len(pairs) == 4
    kept = dataset.cases[0].image.stat().st_mtime_ns
    write_trees(tmp_path / "trees", [3], 2, coarser=4)
    assert dataset.cases[0].image.stat().st_mtime_ns == kept


def test_published_layout_of_avt_is_listed_and_read(pair: Scans, tmp_path: Path) -> None:
    """By the program of the page on vessels: a folder for each patient in one for each centre."""
    for place, (image, labels) in zip(("Dongyang/D1", "Rider/R1"), pair, strict=True):
        (tmp_path / place).mkdir(parents=True)
        save_volume(image, tmp_path / place / f"{place[-2:]}.nrrd")
        save_volume(labels, tmp_path / place / f"{place[-2:]}.seg.nrrd", structures=[VESSELS])
    page = (Path(__file__).parent.parent / "docs/how-to/vessels.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    dataset = load_dataset(tmp_path)
    assert [case.name for case in dataset.cases] == ["D1", "R1"]
    atlas = Atlas.from_files(dataset.case("D1").image, dataset.case("D1").labels)
    np.testing.assert_array_equal(atlas.labels.data, pair[0][1].data)
    assert atlas.numbers_of("*", "tubular") == {1}


# Registration


def two_vessels(grid: Grid, branch_mm: float) -> tuple[Volume, Volume]:
    """A trunk of 10 mm radius at x = -16 mm and a branch of 2 mm at (16, ``branch_mm``) in tissue, both along z."""
    x, y, _ = np.moveaxis(grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)
    trunk_mm, branch_mm = np.hypot(x + 16, y) - 10, np.hypot(x - 16, y - branch_mm) - 2
    tissue = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, grid.shape), 1.5)
    data = 0.4 + 0.7 * tissue + 0.5 * np.clip(0.5 - np.minimum(trunk_mm, branch_mm) / 2, 0, 1)
    labels = np.select([trunk_mm < 0, branch_mm < 0], [3, 7])
    return Volume(data.astype(np.float32), grid), Volume(labels.astype(np.uint8), grid)


def test_closeness_falls_with_the_distance_from_the_centre_line_whatever_the_calibre() -> None:
    grid = centred_grid((41, 33, 25), np.diag([2.0] * 3))
    labels = two_vessels(grid, 0)[1]
    line = find_centreline(labels, {3, 7})
    assert line is not None
    # The query lies 4 mm along y.
    shift = np.eye(4)
    shift[1, 3] = -4
    closeness = line.closeness(grid, Affine(shift))
    x, y, _ = np.moveaxis(grid.voxel_to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)
    from_line_mm = np.hypot(np.abs(x) - 16, y - 4)
    middle = np.s_[:, :, 9:16]  # thinning shortens ends
    expected = np.where(from_line_mm < 11.9, np.exp(-0.5 * (from_line_mm / 3) ** 2), 0)
    np.testing.assert_allclose(closeness[middle], expected[middle], atol=1e-3)
    assert find_centreline(labels, {5}) is None


def test_branch_is_aligned_as_its_trunk_is() -> None:
    grid = centred_grid((41, 33, 25), np.diag([2.0] * 3))
    (moving, labels), (fixed, _) = two_vessels(grid, 0), two_vessels(grid, 4)
    prepared = pyramid.prepare(fixed, None, 2, "query"), pyramid.prepare(moving, labels, 2, "atlas")
    options = InstanceSettings(level_voxels=(20_000,), local_voxels=0, iterations=(20,), smoothness=(5.0,), ensemble=1)

    def missed_mm(tubular: Collection[int], emphasis: float = 12) -> float:
        settings = RegistrationSettings(instance=replace(options, centreline_emphasis=emphasis))
        pair = pyramid.Pair(fixed, moving, *prepared, labels, find_centreline(labels, tubular))
        found = instance.fit(pair, Affine.identity(), None, settings, "cpu").fixed_to_moving
        branch: NDArray[np.float64] = np.stack([np.full(9, 16.0), np.full(9, 4.0), np.linspace(-12, 12, 9)], axis=1)
        return abs(float(found.map(branch)[:, 1].mean()))

    as_organ = missed_mm(())
    assert missed_mm({7}) < 0.8
    assert as_organ > 1.5
    assert missed_mm({7}, emphasis=0) == as_organ


# What is done for vessels


@pytest.mark.parametrize("sign", [1, -1])
def test_branch_is_followed_as_far_as_a_registration_errs(sign: int) -> None:
    grid = Grid((60, 40, 40), np.eye(4))
    vessel, bone = np.zeros(grid.shape, bool), np.zeros(grid.shape, bool)
    vessel[5:55, 19:22, 19:22] = True
    bone[32:46, 22:36, 12:30] = True  # as bright, and touches the vessel
    noise = np.random.default_rng(0).normal(0, 5, grid.shape)
    image = Volume((sign * np.where(vessel | bone, 200, 0) + noise).astype(np.float32), grid)
    known = vessel.copy()
    known[30:] = False
    prompt = np.zeros(3, np.int64), known
    found = follow_branches(image, prompt, 3.0, LocalMap.from_full(known)).to_full(grid.shape) >= 0.5
    assert found[known].all()
    assert found[30:39, 20, 20].all()
    assert not found[41:].any()
    assert not found[bone & ~ndimage.binary_dilation(vessel, iterations=2)].any()


@pytest.fixture(scope="module")
def atlas(pair: Scans) -> Atlas:
    return Atlas.from_volumes(*pair[0], [VESSELS])


@pytest.fixture(scope="module")
def result(atlas: Atlas, pair: Scans) -> Segmentation:
    settings = with_overrides(Settings(), [*QUICK, *QUICK_GATE, "tubular=vessels"])
    return segment(Context(atlas, settings), pair[1][0], device="cpu")


def test_fused_vessels_are_nearer_than_the_atlas(result: Segmentation, pair: Scans) -> None:
    reference = pair[1][1]
    assert cldice(result.labels, reference) >= cldice(result.atlas_labels, reference) + 0.05


def test_vessels_are_not_smoothed(result: Segmentation) -> None:
    assert result.gate is not None
    assert result.gate.smoothing == (0.0,)


def test_vessels_have_no_verdict_of_organs(result: Segmentation) -> None:
    quality = result.structures[0].quality
    assert quality is not None
    assert quality.evidence is not None
    assert judge(quality.evidence, "builtin", 0.9).verdict is not None
    found = judge(quality.evidence, "builtin", 0.9, tubular=True)
    assert (found.verdict, found.estimated_dice, found.reason) == (None, None, NOT_JUDGED_TUBULAR)
    assert judge(quality.evidence, "builtin", 0.1, tubular=True).verdict == "failed"


def test_unknown_vessel_is_named(atlas: Atlas, pair: Scans) -> None:
    settings = with_overrides(Settings(), ["tubular=aorta, vess*"])
    with pytest.raises(InputError, match=r"^tubular=aorta,vess\*: no structure 'aorta'.*1 \(vessels\)"):
        segment(Context(atlas, settings), pair[1][0], device="cpu")


def test_structures_that_are_not_marked_are_predicted_the_same() -> None:
    grid = scenes.straight_grid()
    scan, labels = scenes.QUERY.scan(grid), scenes.ATLAS.labels(grid)
    masks = {n: LocalMap.from_full(labels.data == value) for n, value in enumerate((1, 7, 12), start=1)}
    model, names = load_chosen(Settings(), "cpu"), [one.name for one in scenes.STRUCTURES]
    assert model is not None
    plain, marked = (
        PromptedScan(model, "mask", scan, names, tubular).predict(masks, lambda _: None).members[""]
        for tubular in (frozenset[int](), frozenset({3}))
    )
    for n in (1, 2):
        assert plain[n].start == marked[n].start
        np.testing.assert_array_equal(plain[n].values, marked[n].values)
    assert not np.array_equal(plain[3].to_full(grid.shape), marked[3].to_full(grid.shape))


def test_report_projects_vessels_and_no_other(tmp_path: Path) -> None:
    write_result(tmp_path / "a", 0)
    run = RunRecord.read(tmp_path / "a/run.json")
    run.model_copy(update={"settings": {**run.settings, "tubular": "nod*"}}).write(tmp_path / "a/run.json")
    write_report(tmp_path, options=WITHOUT_PICTURES)
    page = (tmp_path / "a/report.html").read_text(encoding="utf-8")
    for one in scenes.STRUCTURES:
        section = page.split(f'id="s{one.value}"')[1].split("</section>")[0]
        projected = re.findall(r"<figcaption>(\w+), projected</figcaption>", section)
        assert projected == (["axial", "coronal", "sagittal"] if one.name == "node" else [])
        assert section.count('<path class="result" d="M') >= 2 * (1 + bool(projected))


def test_seeds_are_numbers(run: Run, tmp_path: Path) -> None:
    outcome = run("benchmark", "vessels", "-o", str(tmp_path / "out"), "--seeds", "4,x")
    assert outcome.code == 2
    assert outcome.err == "error: --seeds 4,x: expected whole numbers from 0 on with commas between, as 4,5,6\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_benchmark_of_made_vessels(run: Run, tmp_path: Path) -> None:
    sets = [part for one in (*QUICK, *QUICK_GATE) for part in ("--set", one)]
    outcome = run("benchmark", "vessels", "-o", str(tmp_path / "out"), "--seeds", "0", "--no-plots", "--json", *sets)
    assert outcome.code == 0
    means = {one["method"]: one["structures"][0]["cldice"]["mean"] for one in outcome.json["columns"]}
    assert means["fused"] > means["atlas"] + 0.05
    assert "| clDice |" in (tmp_path / "out" / "report.md").read_text()
