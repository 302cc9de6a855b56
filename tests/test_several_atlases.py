"""Contexts of several atlases: their votes, their files, and the command ``context``."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlassegfm import demo
from atlassegfm.atlas import Atlas
from atlassegfm.context import Context, customize
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.labels import Structure
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice
from atlassegfm.fusion.voting import vote
from atlassegfm.jobs.fingerprint import atlas_digest, context_digest
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from atlassegfm.transforms.maps import Affine
from conftest import Run
from scenes import PAPER_GATE, STRUCTURES, UNREGISTERED, Patient, save_demo_pair, straight_grid

GRID = straight_grid()
SHAPE = (16, 14, 12)
FAST = with_overrides(Settings(), [*UNREGISTERED, *PAPER_GATE])
#: Three patients near the query, and one whose organs lie elsewhere.
NEAR = (Patient(), Patient((1.5, -1.0, 1.0), 1.03), Patient((-1.5, 1.0, -1.0), 0.98))
FAR = Patient((0.0, 0.0, 26.0))
QUERY = Patient((0.8, 0.6, -0.5), 1.01)


def atlas_of(patient: Patient, without: tuple[int, ...] = ()) -> Atlas:
    labels = patient.labels(GRID)
    data = np.where(np.isin(labels.data, without), 0, labels.data).astype(np.uint8)
    kept = [one for one in STRUCTURES if one.value not in without]
    return Atlas.from_volumes(patient.scan(GRID), replace(labels, data=data), kept)


def context_of(*patients: Patient, settings: Settings = FAST) -> Context:
    first, *others = patients
    context = customize(Context(atlas_of(first), settings))
    for patient in others:
        context = context.with_atlas(atlas_of(patient))
    return context


def scores(context: Context) -> dict[int, float]:
    found, truth = segment(context, QUERY.scan(GRID)), QUERY.labels(GRID)
    return {one.value: dice(found.labels.data == one.value, truth.data == one.value) for one in STRUCTURES}


def block(start: int, stop: int) -> LocalMap:
    full = np.zeros(SHAPE, np.float32)
    full[start:stop, 3:9, 2:10] = 1
    return LocalMap.from_full(full)


# Votes.


def test_atlas_that_disagrees_is_dropped() -> None:
    lost = block(0, 2)
    voted, kept = vote([block(5, 11), lost, block(5, 12), block(4, 11)])
    assert kept == (0, 2, 3)
    np.testing.assert_allclose(voted.to_full(SHAPE)[:2], 0)
    assert set(np.unique(voted.to_full(SHAPE))) <= {np.float32(n / 3) for n in range(4)}


def test_two_atlases_are_both_kept() -> None:
    voted, kept = vote([block(5, 11), block(0, 3)])
    assert kept == (0, 1)
    assert voted.values.max() == 0.5
    alone = block(5, 11)
    assert vote([alone]) == (alone, (0,))


@given(st.permutations([(5, 11), (5, 12), (4, 11), (0, 2), (6, 11)]))
def test_order_of_atlases_does_not_matter(ends: list[tuple[int, int]]) -> None:
    voted, kept = vote([block(*one) for one in ends])
    expected, _ = vote([block(*one) for one in sorted(ends)])
    np.testing.assert_allclose(voted.to_full(SHAPE), expected.to_full(SHAPE), atol=1e-6)
    assert {ends[n] for n in kept} == set(ends) - {(0, 2)}


# Results.


def test_several_atlases_beat_the_mean_of_each_and_outvote_one_that_is_wrong() -> None:
    singles = [scores(context_of(one)) for one in NEAR]
    together = scores(context_of(*NEAR))
    assert np.mean(list(together.values())) > np.mean([list(one.values()) for one in singles])
    with_far = context_of(*NEAR, FAR)
    outvoted = scores(with_far)
    for value, score in together.items():
        assert outvoted[value] > score - 0.02
    result = segment(with_far, QUERY.scan(GRID))
    assert all(len(one.votes) >= 2 and 4 not in one.votes for one in result.structures)


def test_one_atlas_is_as_before() -> None:
    result = segment(context_of(NEAR[0]), QUERY.scan(GRID))
    assert all(one.votes == () for one in result.structures)
    context = context_of(NEAR[0])
    assert context_digest(context.atlases) == atlas_digest(context.atlas)


def test_atlas_with_some_of_the_structures() -> None:
    """It has a say in those that it has."""
    context = context_of(*NEAR[:2]).with_atlas(atlas_of(NEAR[2], without=(STRUCTURES[1].value,)))
    result = segment(context, QUERY.scan(GRID))
    votes = {one.structure.value: one.votes for one in result.structures}
    assert votes[STRUCTURES[0].value] == (1, 2, 3)
    assert votes[STRUCTURES[1].value] == (1, 2)


def test_structure_that_most_atlases_miss_is_missing() -> None:
    """Two of three atlases say that the field of view does not show it."""
    whole = GRID
    view = whole.crop((0, 0, 0), (48, 40, 9))
    scan = QUERY.scan(whole)
    query = Volume(np.ascontiguousarray(scan.data[:, :, :9]), view)
    result = segment(context_of(*NEAR), query)
    alone = segment(context_of(NEAR[0]), query)
    assert [one.status for one in result.structures] == [one.status for one in alone.structures]
    assert "outside" in {one.status for one in result.structures}


def test_query_among_the_atlases_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    context = context_of(NEAR[0], QUERY, NEAR[1])
    with caplog.at_level(logging.WARNING):
        result = segment(context, QUERY.scan(GRID))
    assert "left out" in caplog.text
    expected = segment(context_of(NEAR[0], NEAR[1]), QUERY.scan(GRID))
    np.testing.assert_array_equal(result.labels.data, expected.labels.data)
    only = Context(atlas_of(QUERY), FAST).with_atlas(atlas_of(NEAR[0], without=(STRUCTURES[2].value,)))
    with pytest.raises(InputError, match="no other one has all structures"):
        segment(only, QUERY.scan(GRID))


def test_transform_goes_with_one_atlas() -> None:
    with pytest.raises(InputError, match="several atlases"):
        segment(context_of(*NEAR), QUERY.scan(GRID), transforms=[Affine(np.eye(4))])


# Matching and files.


def test_structures_are_matched_by_name() -> None:
    patient = NEAR[1]
    other = [Structure(one.value + 40, one.name, (1, 2, 3)) for one in reversed(STRUCTURES)]
    labels = patient.labels(GRID)
    moved = np.where(labels.data > 0, labels.data + 40, 0).astype(np.uint8)
    renumbered = Atlas.from_volumes(patient.scan(GRID), replace(labels, data=moved), other)
    context = context_of(NEAR[0])
    one, two = context.with_atlas(renumbered), context.with_atlas(atlas_of(patient))
    np.testing.assert_array_equal(one.others[0].labels.data, two.others[0].labels.data)
    assert one.others[0].structures == context.atlas.structures


def test_atlases_that_do_not_fit_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    context = context_of(*NEAR[:2])
    for patient in NEAR[:2]:
        with pytest.raises(InputError, match="the same scan"):
            context.with_atlas(atlas_of(patient))
    scan, labels = NEAR[2].scan(GRID), NEAR[2].labels(GRID)
    first, second, third = STRUCTURES
    alien = Atlas.from_volumes(scan, labels, [first, second, replace(third, name="tail")])
    with pytest.raises(InputError) as error:
        context.with_atlas(alien, "alien.nii.gz")
    assert "alien.nii.gz" in str(error.value)
    assert "tail" in str(error.value)
    swapped = [replace(first, name=third.name), second, replace(third, name=first.name)]
    context.with_atlas(Atlas.from_volumes(scan, labels, swapped), "swapped.nii.gz")
    assert "is it the same structure?" in caplog.text
    for number in (0, 1, 3):
        with pytest.raises(InputError, match="no atlas"):
            context.without_atlas(number)


def test_folder_keeps_all_atlases(tmp_path: Path) -> None:
    context = context_of(*NEAR)
    saved = context.save(tmp_path / "ctx")
    loaded = Context.load(tmp_path / "ctx")
    assert context_digest(loaded.atlases) == context_digest(context.atlases)
    assert loaded.save(tmp_path / "again").sha256 == saved.sha256
    result, expected = (segment(one, QUERY.scan(GRID)) for one in (loaded, context))
    np.testing.assert_array_equal(result.labels.data, expected.labels.data)
    (tmp_path / "ctx" / "labels-3.nii.gz").unlink()
    with pytest.raises(InputError, match=r"labels-3\.nii\.gz"):
        Context.load(tmp_path / "ctx")
    shorter = loaded.without_atlas(2)
    np.testing.assert_array_equal(shorter.others[0].labels.data, context.others[1].labels.data)


def test_command_line(tmp_path: Path, run: Run) -> None:
    pair = save_demo_pair(tmp_path / "pair", GRID)
    for name, patient in (("b", NEAR[1]), ("c", NEAR[2])):
        save_volume(patient.scan(GRID), tmp_path / f"{name}.nii.gz")
        save_volume(patient.labels(GRID), tmp_path / f"{name}_labels.nii.gz", structures=STRUCTURES)
    context, options = str(tmp_path / "ctx"), [part for one in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", one)]
    first = ("--atlas", str(pair / demo.ATLAS), "--labels", str(pair / demo.LABELS))
    assert run("customize", *first, "-o", context, *options).code == 0
    for name in ("b", "c"):
        files = ("--atlas", str(tmp_path / f"{name}.nii.gz"), "--labels", str(tmp_path / f"{name}_labels.nii.gz"))
        added = run("context", "add", context, *files)
        assert added.code == 0, added.err
        again = run("context", "add", context, *files)
        assert again.code == 2
        assert f"{name}_labels.nii.gz" in again.err
    shown = run("context", "show", context, "--json").json["atlases"]
    assert [one["files"][0] for one in shown] == [demo.ATLAS, "b.nii.gz", "c.nii.gz"]
    done = run("segment", "--context", context, str(pair / demo.QUERY), "-o", str(tmp_path / "out"), "--json")
    assert done.code == 0, done.err
    assert all({1, 2, 3} >= set(one["atlases"]) for one in done.json["results"][0]["structures"])
    assert done.json["results"][0]["structures"][0]["atlases"] == [1, 2, 3]
    assert run("context", "remove", context, "2").code == 0
    shown = run("context", "show", context, "--json").json["atlases"]
    assert [one["files"][0] for one in shown] == [demo.ATLAS, "c.nii.gz"]
    refused = run("context", "remove", context, "1")
    assert refused.code == 2
    assert "expected 2 to 2" in refused.err
