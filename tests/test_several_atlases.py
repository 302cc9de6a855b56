"""Contexts of several atlases: their votes, their files, and the command ``context``."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atlassegfm import demo
from atlassegfm.atlas import Atlas
from atlassegfm.context import Context, Expected, customize
from atlassegfm.core.config import with_overrides
from atlassegfm.core.errors import InputError
from atlassegfm.core.image import Volume, save_volume
from atlassegfm.core.labels import Structure
from atlassegfm.core.mask import LocalMap
from atlassegfm.core.overlap import dice
from atlassegfm.core.parallel import limited_threads
from atlassegfm.fusion.voting import vote
from atlassegfm.jobs.fingerprint import atlas_digest, context_digest
from atlassegfm.leave_one_out import measure
from atlassegfm.registration import rank, register, register_all
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from atlassegfm.transforms.maps import Affine
from atlassegfm.warping import atlases_for
from conftest import Run
from scenes import PAPER_GATE, STRUCTURES, UNREGISTERED, Patient, save_demo_pair, straight_grid

GRID = straight_grid()
SHAPE = (16, 14, 12)
FAST = with_overrides(Settings(), [*UNREGISTERED, *PAPER_GATE])
#: The linear stages alone, roughly.
ROUGH = ("registration.deformable=false", "registration.linear_iterations=12", "registration.candidates=2")
LINEAR = with_overrides(Settings(), [*ROUGH, *PAPER_GATE])
#: Three patients near the query, and one whose organs lie elsewhere.
NEAR = (Patient(), Patient((1.5, -1.0, 1.0), 1.03), Patient((-1.5, 1.0, -1.0), 0.98))
FAR = Patient((0.0, 0.0, 26.0))
#: Another shape, with all organs in view.
UNLIKE = Patient((6.0, 0.0, 10.0), 0.8)
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


def test_of_two_atlases_the_wrong_one_is_dropped_by_the_evidence() -> None:
    """Neither outvotes the other; the organs of one lie on other tissue."""
    result = segment(context_of(NEAR[0], FAR), QUERY.scan(GRID))
    votes = {one.structure.name: one.votes for one in result.structures}
    assert votes["liver"] == (1,)
    both = segment(context_of(*NEAR[:2]), QUERY.scan(GRID))
    assert all(one.votes == (1, 2) for one in both.structures)


def test_one_atlas_is_as_before() -> None:
    result = segment(context_of(NEAR[0]), QUERY.scan(GRID))
    assert all(one.votes == () for one in result.structures)
    context = context_of(NEAR[0])
    assert context_digest(context) == atlas_digest(context.atlas)


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


def test_gate_trained_on_the_query_is_not_used() -> None:
    """Its labels would take part, if the first atlas is the query itself."""
    context = context_of(QUERY, *NEAR[:2])
    result, expected = segment(context, QUERY.scan(GRID)), segment(context_of(*NEAR[:2]), QUERY.scan(GRID))
    np.testing.assert_array_equal(result.labels.data, expected.labels.data)
    assert result.gate == expected.gate


# Selection.


def test_the_most_alike_are_registered() -> None:
    """Those that hardly resemble the query are left out, wherever they stand, unless they alone have a structure."""
    few = replace(LINEAR, most_atlases=2)
    context = Context(atlas_of(UNLIKE), few).with_atlas(atlas_of(NEAR[0])).with_atlas(atlas_of(NEAR[1]))
    assert set(atlases_for(context, QUERY.scan(GRID), few)[1]) == {2, 3}
    value = STRUCTURES[2].value
    partial = Context(atlas_of(UNLIKE), few)
    for patient in NEAR[:2]:
        partial = partial.with_atlas(atlas_of(patient, without=(value,)))
    assert set(atlases_for(partial, QUERY.scan(GRID), few)[1]) == {1, 2, 3}


def test_order_does_not_matter_to_the_ranking() -> None:
    atlases = [atlas_of(patient) for patient in (UNLIKE, *NEAR)]
    labelled = [(one.image, one.numbered) for one in atlases]
    order = rank(QUERY.scan(GRID), labelled, LINEAR.registration)
    assert order[-1] == 0
    backwards = rank(QUERY.scan(GRID), labelled[::-1], LINEAR.registration)
    assert [len(labelled) - 1 - place for place in backwards] == order


def test_registrations_side_by_side_are_those_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    atlases = [atlas_of(patient) for patient in NEAR]
    labelled = [(one.image, one.numbered) for one in atlases]
    scan, reported = QUERY.scan(GRID), list[str]()
    before = torch.get_num_threads()
    found = register_all(scan, labelled, LINEAR.registration, on_stage=reported.append)
    assert torch.get_num_threads() == before
    assert sorted(reported) == [f"atlas {n} of 3" for n in (1, 2, 3)]
    with limited_threads(1):
        for one, (image, labels) in zip(found, labelled, strict=True):
            alone = register(scan, image, LINEAR.registration, moving_labels=labels)
            np.testing.assert_array_equal(one.linear.matrix, alone.linear.matrix)


# What to expect.


def test_each_atlas_is_segmented_from_the_others() -> None:
    context = context_of(*NEAR, QUERY)
    numbers = list[tuple[int, int]]()
    measured = measure(context, on_atlas=lambda number, count: numbers.append((number, count)))
    assert numbers == [(n, 4) for n in (1, 2, 3, 4)]
    first, last = STRUCTURES[0], atlas_of(QUERY)
    alone = segment(context_of(*NEAR), last.image)
    score = dice(alone.labels.data == first.value, last.labels.data == first.value)
    expected = measured.expected[first.name]
    assert expected.cases == 4
    assert expected.lowest <= min(score, expected.dice)
    assert expected.dice <= 1
    assert measure(context_of(NEAR[0])).expected == {}
    assert measured.with_atlas(atlas_of(FAR)).expected == {}


def test_what_was_measured_moves_the_estimates(calibrated: None) -> None:
    """Half of what the atlases left out scored above their estimates, where there are six of them."""
    context, name = context_of(*NEAR), STRUCTURES[0].name
    before = segment(context, QUERY.scan(GRID)).structures[0].quality
    expected = {name: Expected(dice=0.5, lowest=0.4, surplus=-0.2, cases=6)}
    after = segment(replace(context, expected=expected), QUERY.scan(GRID)).structures[0].quality
    assert before is not None
    assert after is not None
    assert after.estimated_dice == pytest.approx((before.estimated_dice or 0) - 0.1)


@pytest.mark.parametrize("place", [0, 1])
def test_labels_of_the_query_do_not_move_its_own_estimate(calibrated: None, place: int) -> None:
    """What atlases score comes from their labels; a query that is one of them gets no estimate that knows them."""
    patients = [NEAR[0], NEAR[1]]
    patients.insert(place, QUERY)
    context, name = context_of(*patients), STRUCTURES[0].name
    plain = segment(context, QUERY.scan(GRID)).structures[0].quality
    expected = {name: Expected(dice=0.5, lowest=0.4, surplus=-0.2, cases=3)}
    assert segment(replace(context, expected=expected), QUERY.scan(GRID)).structures[0].quality == plain


def test_structure_is_judged_by_the_nearest_atlas_that_agreed() -> None:
    result = segment(context_of(UNLIKE, *NEAR), QUERY.scan(GRID))
    assert result.nearest_atlas != 1
    assert result.registration is result.registrations[result.nearest_atlas]


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
    context = replace(context_of(*NEAR), expected={STRUCTURES[0].name: Expected(0.8, 0.7, -0.05, 3)})
    saved = context.save(tmp_path / "ctx")
    loaded = Context.load(tmp_path / "ctx")
    assert context_digest(loaded) == context_digest(context)
    assert loaded.expected == context.expected
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
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in (2, 3):  # of an earlier look
        (pictures / f"atlas-{number}.png").write_bytes(b"")
    shown = run("context", "show", context, "--json", "--pictures", str(pictures)).json["atlases"]
    assert [one["files"][0] for one in shown] == [demo.ATLAS, "c.nii.gz"]
    drawn = {path.name: path.read_bytes() for path in pictures.iterdir()}
    assert set(drawn) == {"atlas-1.png", "atlas-2.png"}
    assert drawn["atlas-1.png"] != drawn["atlas-2.png"]
    (pictures / "mine.txt").touch()
    assert run("context", "show", context, "--pictures", str(pictures)).code == 2
    refused = run("context", "remove", context, "1")
    assert refused.code == 2
    assert "expected 2 to 2" in refused.err


@pytest.mark.parametrize("layout", ["options", "folders", "dataset"])
def test_customize_takes_several_atlases(tmp_path: Path, run: Run, layout: str) -> None:
    """The one with all structures comes first, and what to expect is printed."""
    images, labels = ("imagesTr", "labelsTr") if layout == "dataset" else ("images", "labels")
    channel = "_0000" if layout == "dataset" else ""
    for folder in (images, labels):
        (tmp_path / "set" / folder).mkdir(parents=True)
    given = []
    for name, atlas in (("a", atlas_of(NEAR[0], without=(STRUCTURES[2].value,))), ("b", atlas_of(NEAR[1]))):
        paths = [tmp_path / "set" / images / f"{name}{channel}.nii.gz", tmp_path / "set" / labels / f"{name}.nii.gz"]
        save_volume(atlas.image, paths[0])
        save_volume(atlas.labels, paths[1], structures=atlas.structures)
        given += ["--atlas", str(paths[0]), "--labels", str(paths[1])]
    if layout == "dataset":
        names = {one.name: one.value for one in STRUCTURES}
        table = {"labels": {"background": 0, **names}, "file_ending": ".nii.gz", "numTraining": 2}
        (tmp_path / "set" / "dataset.json").write_text(json.dumps(table | {"channel_names": {"0": "MR"}}))
    chosen = given if layout == "options" else ["--atlases", str(tmp_path / "set")]
    options = [part for one in (*UNREGISTERED, *PAPER_GATE) for part in ("--set", one)]
    made = run("customize", *chosen, "-o", str(tmp_path / "ctx"), *options, "--json")
    assert made.code == 0, made.err
    # Without the second atlas none has all structures.
    assert {one["structure"]: one["cases"] for one in made.json["expected"]} == {
        one.name: 1 for one in STRUCTURES if one is not STRUCTURES[2]
    }
    shown = run("context", "show", str(tmp_path / "ctx"), "--json").json
    assert [one["files"][0] for one in shown["atlases"]] == [f"b{channel}.nii.gz", f"a{channel}.nii.gz"]
    assert shown["expected"] == made.json["expected"]
    again = run("context", "measure", str(tmp_path / "ctx"), "--json")
    assert again.json["expected"] == made.json["expected"]


def test_customize_refuses_atlases_that_do_not_add_up(tmp_path: Path, run: Run) -> None:
    out = ("-o", str(tmp_path / "ctx"))
    for options, word in (
        (("--atlas", "a.nii", "--atlas", "b.nii", "--labels", "c.nii"), "2 --atlas and 1 --labels"),
        (("--atlas", "a.nii", "--atlases", "folder"), "does not go with"),
        (("--atlases", str(tmp_path / "none")), "no such folder"),
        (("--atlases", str(tmp_path)), "images and labels"),
    ):
        refused = run("customize", *options, *out)
        assert refused.code == 2
        assert word in refused.err
    for name in ("images/a.nii.gz", "labels/b.nii.gz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    refused = run("customize", "--atlases", str(tmp_path), *out)
    assert refused.code == 2
    assert "in only one of" in refused.err
    assert not (tmp_path / "ctx").exists()
    pair = save_demo_pair(tmp_path / "pair", GRID)
    first = ("--atlas", str(pair / demo.ATLAS), "--labels", str(pair / demo.LABELS))
    assert run("customize", *first, *out, "--set", "model=none").code == 0
    refused = run("context", "measure", str(tmp_path / "ctx"))
    assert refused.code == 2
    assert "one atlas" in refused.err
