"""Scoring results against references: pairing of files, names and label sets, scores, summaries, tables."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlassegfm.core.errors import InputError
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import IMAGE_SUFFIXES, Volume, label_values, save_volume
from atlassegfm.core.labels import Structure
from atlassegfm.evaluate import EvaluationOptions, evaluate
from atlassegfm.evaluate.metrics import StructureScores
from atlassegfm.evaluate.pairing import FilePair, find_pairs
from atlassegfm.evaluate.scores import CaseScore, score_volumes
from atlassegfm.evaluate.summary import SMALL_ML, summarise, summarise_cases, write_scores
from atlassegfm.evaluate.tolerances import Tolerances, load_tolerances, uniform
from conftest import ORIENTATIONS, SHEARED
from scenes import straight_grid

#: 4 mm³ a voxel; the diagonal is sqrt(10² + 20² + 20²) = 30 mm.
GRID = straight_grid((10, 10, 10), (1.0, 2.0, 2.0))
DIAGONAL_MM = 30.0
#: 250 voxels, 1 ml.
LIVER = (slice(0, 5), slice(2, 7), slice(0, 10))
#: 2 voxels.
NODE = (slice(7, 9), slice(8, 9), slice(4, 5))
TOLERANCES = uniform(2)

Box = tuple[slice, slice, slice]
Build = Callable[..., Volume]


def boxes(content: Mapping[int, Box], grid: Grid = GRID) -> Volume:
    data = np.zeros(grid.shape, np.uint8)
    for value, box in content.items():
        data[box] = value
    return Volume(data, grid)


def write(path: Path, content: Mapping[int, Box], names: Mapping[int, str] | None = None, grid: Grid = GRID) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    structures = None if names is None else [Structure(value, name, (9, 9, 9)) for value, name in names.items()]
    save_volume(boxes(content, grid), path, structures=structures)
    return path


def turned(volume: Volume, codes: str) -> Volume:
    """The same voxels stored in another array order."""
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    turn = ornt_transform(io_orientation(volume.grid.affine), axcodes2ornt(codes))
    shape = tuple(volume.grid.shape[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3))
    grid = Grid(shape, volume.grid.affine @ inv_ornt_aff(turn, volume.grid.shape))
    assert grid.axis_codes == codes
    return Volume(np.ascontiguousarray(volume.turned_to(grid).data), grid)


def close(one: StructureScores, other: StructureScores) -> bool:
    """Whether all scores are the same, NaN counting as the same as NaN."""
    pairs = zip(asdict(one).values(), asdict(other).values(), strict=True)
    return all(a == (pytest.approx(b, nan_ok=True) if isinstance(b, float) else b) for a, b in pairs)


@contextmanager
def refused(*facts: object) -> Iterator[None]:
    """An input error that names these facts, the first one first."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(str(facts[0])), message
    assert all(str(fact) in message for fact in facts), message


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def scores_of(result: Path, reference: Path, **options: Any) -> tuple[CaseScore, ...]:
    tolerances = options.pop("tolerances", TOLERANCES)
    return evaluate(result, reference, tolerances, EvaluationOptions(**options)).scores


def evaluated(result: Path, reference: Path, **options: Any) -> dict[tuple[str, int], StructureScores]:
    return {(one.case, one.value): one.scores for one in scores_of(result, reference, **options)}


def names_of(result: Path, reference: Path, **options: Any) -> dict[int, str]:
    return {one.value: one.structure for one in scores_of(result, reference, **options)}


def made(status: Any, dice: float, **other: Any) -> StructureScores:
    """Scores of a structure of 1 ml."""
    scores: dict[str, Any] = {"nsd": dice, "tolerance_mm": 2.0, "hd95_mm": 0.0, "assd_mm": 0.0, "hd95_voxel_mm": 0.0}
    scores |= {"result_voxels": 250, "reference_voxels": 250, "result_ml": 1.0, "reference_ml": 1.0}
    scores |= {"cldice": None, "cldice_note": ""}
    return StructureScores(status=status, dice=dice, **(scores | other))


def made_empty(**other: Any) -> StructureScores:
    nothing: dict[str, Any] = {"hd95_mm": math.nan, "assd_mm": math.nan, "hd95_voxel_mm": math.nan}
    nothing |= {"result_voxels": 0, "reference_voxels": 0, "result_ml": 0.0, "reference_ml": 0.0}
    return made("both_empty", math.nan, **(nothing | other))


# Volumes


@pytest.mark.parametrize("codes", ["LPS", "LAS", "SRA", "PIR"])
def test_scores_do_not_depend_on_the_array_order_of_the_result(synthetic_labels: Build, codes: str) -> None:
    reference = synthetic_labels((12, 10, 9), values=(1, 2, 3))
    result = Volume(np.roll(reference.data, 1, axis=1), reference.grid)
    names = {1: "a", 2: "b", 3: "c", 4: "none"}
    straight = score_volumes({"": result}, reference, names, TOLERANCES, centreline=[1])[""]
    stored = score_volumes({"": turned(result, codes)}, reference, names, TOLERANCES, centreline=[1])[""]
    assert 0 < straight[1].dice < 1
    assert straight[4].status == "both_empty"
    for value in names:
        assert close(stored[value], straight[value])


@pytest.mark.parametrize("codes", ["LPS", "SRA", "PIR"])
def test_scores_do_not_depend_on_the_array_order_of_the_reference(synthetic_labels: Build, codes: str) -> None:
    reference = synthetic_labels((12, 10, 9), values=(1, 2))
    result = Volume(np.roll(reference.data, (1, -1), axis=(0, 2)), reference.grid)
    straight = score_volumes({"": result}, reference, {1: "a", 2: "b"}, TOLERANCES)[""]
    stored = score_volumes({"": result}, turned(reference, codes), {1: "a", 2: "b"}, TOLERANCES)[""]
    assert straight[2].hd95_mm > 0
    for value in (1, 2):
        assert close(stored[value], straight[value])


@pytest.mark.parametrize("affine", [*ORIENTATIONS.values(), SHEARED], ids=[*ORIENTATIONS, "sheared"])
def test_every_way_a_scan_can_lie_is_scored(synthetic_labels: Build, affine: np.ndarray) -> None:
    reference = synthetic_labels(affine=affine)
    result = Volume(np.roll(reference.data, 1, axis=2), reference.grid)
    scores = score_volumes({"": result}, reference, {1: "a"}, TOLERANCES)[""][1]
    one, other = result.data == 1, reference.data == 1
    assert scores.dice == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
    # Moved by one voxel along the third axis, which is 4 mm long (tilted ones a little more).
    assert scores.hd95_voxel_mm == pytest.approx(reference.grid.spacing_mm[2])


def test_volumes_are_right_and_a_warning_is_given_on_sheared_axes(
    synthetic_labels: Build, caplog: pytest.LogCaptureFixture
) -> None:
    labels = synthetic_labels(affine=SHEARED)
    one = score_volumes({"": labels}, labels, {1: "organ"}, TOLERANCES)[""][1]
    # 1.5 x 2 x 4 mm as in the upright scan: shear keeps the volume, and lengthens an edge.
    assert one.reference_ml == one.result_ml == pytest.approx(one.reference_voxels * 12 / 1000)
    assert "the reference: its axes are not at right angles; distances are measured as if they were" in caplog.text
    caplog.clear()
    upright = synthetic_labels(affine=ORIENTATIONS["oblique"])
    score_volumes({"": upright}, upright, {1: "organ"}, TOLERANCES)
    assert not caplog.text


def test_several_results_at_once_are_scored_as_one_at_a_time(synthetic_labels: Build) -> None:
    reference = synthetic_labels((12, 10, 9), values=(1, 2))
    results = {
        "same": reference,
        "moved": Volume(np.roll(reference.data, 1, axis=0), reference.grid),
        "turned": turned(Volume(np.roll(reference.data, 2, axis=1), reference.grid), "LPS"),
        "empty": Volume(np.zeros_like(reference.data), reference.grid),
    }
    names = {2: "b", 1: "a", 9: "none"}
    together = score_volumes(results, reference, names, TOLERANCES, centreline=[1])
    assert list(together) == list(results)
    for method, result in results.items():
        alone = score_volumes({method: result}, reference, names, TOLERANCES, centreline=[1])[method]
        assert list(together[method]) == [2, 1, 9]
        assert all(close(together[method][value], alone[value]) for value in names)
    assert len({together[method][1].dice for method in results}) == 4


def test_no_result_and_no_structure_give_nothing() -> None:
    assert score_volumes({}, boxes({1: LIVER}), {1: "liver"}, TOLERANCES) == {}
    assert score_volumes({"a": boxes({1: LIVER})}, boxes({1: LIVER}), {}, TOLERANCES) == {"a": {}}


def test_each_structure_has_its_own_tolerance() -> None:
    kidney, spleen = (slice(1, 4), slice(1, 4), slice(1, 4)), (slice(1, 4), slice(6, 9), slice(6, 9))
    reference = boxes({1: kidney, 2: spleen})
    result = Volume(np.roll(reference.data, 1, axis=1), GRID)  # 2 mm to the front
    tolerances = Tolerances(1.0, (("left kidney", 2.0),), "test")
    scores = score_volumes({"": result}, reference, {1: "Left_Kidney", 2: "spleen"}, tolerances)[""]
    assert (scores[1].tolerance_mm, scores[2].tolerance_mm) == (2, 1)
    assert scores[1].nsd == 1
    assert scores[2].nsd < 1
    assert scores[1].dice == scores[2].dice == pytest.approx(2 / 3)


def test_centrelines_are_compared_for_wanted_structures_alone() -> None:
    volume = boxes({1: LIVER, 2: NODE})
    scores = score_volumes({"": volume}, volume, {1: "liver", 2: "node", 3: "none"}, TOLERANCES, centreline=[1, 3])[""]
    assert scores[1].cldice == 1
    assert scores[2].cldice is None
    assert scores[3].cldice is not None
    assert math.isnan(scores[3].cldice)


@pytest.mark.parametrize(
    ("grid", "facts"),
    [
        (GRID.crop((0, 0, 0), (10, 9, 10)), ["10 x 9 x 10 voxels of", "instead of 10 x 10 x 10 voxels"]),
        (straight_grid((10, 10, 10), (1.0, 2.0, 2.5)), ["of 1 x 2 x 2.5 mm", "of 1 x 2 x 2 mm"]),
        (Grid(GRID.shape, GRID.affine @ np.diag([1, 1.05, 1, 1.0])), ["of 1 x 2.1 x 2 mm", "of 1 x 2 x 2 mm"]),
        (Grid(GRID.shape, GRID.affine + np.outer([0, 0, 1, 0], [0, 0, 0, 12.5])), ["corners up to 12.5 mm apart"]),
        # Mirrored: the voxels run from -4 to 5 mm instead of -5 to 4 mm.
        (Grid(GRID.shape, np.diag([-1.0, 1, 1, 1]) @ GRID.affine), ["corners up to 1.0 mm apart"]),
    ],
)
def test_results_elsewhere_are_refused(tmp_path: Path, grid: Grid, facts: list[str]) -> None:
    result = write(tmp_path / "out" / "case.nii", {1: LIVER}, grid=grid)
    reference = write(tmp_path / "truth" / "case.nii", {1: LIVER})
    with refused(result, reference, *facts):
        evaluated(result, reference)


def test_rounded_headers_are_no_difference(tmp_path: Path) -> None:
    grid = Grid(GRID.shape, GRID.affine @ np.diag([1, 1.005, 1, 1.0]))  # at most 0.09 mm away, of voxels of 1 mm
    result, reference = write(tmp_path / "a.nii", {1: LIVER}, grid=grid), write(tmp_path / "b.nii", {1: LIVER})
    scores = evaluated(result, reference)["b", 1]
    assert (scores.dice, scores.reference_ml) == (1, 1)


def test_a_small_difference_of_the_spacing_is_called_one() -> None:
    """On a large image half a per cent is more than a voxel, and no matter of the origin."""
    one = Grid((200, 4, 4), np.diag([1.0, 2.0, 2.0, 1.0]))
    other = Grid((200, 4, 4), np.diag([1.005, 2.0, 2.0, 1.0]))
    result, reference = (Volume(np.ones(grid.shape, np.uint8), grid) for grid in (other, one))
    with refused("the result", "the reference", "of 1.005 x 2 x 2 mm", "of 1 x 2 x 2 mm"):
        score_volumes({"": result}, reference, {1: "a"}, TOLERANCES)


def test_one_result_elsewhere_among_several_is_refused() -> None:
    reference = boxes({1: LIVER})
    other = boxes({}, straight_grid((10, 10, 9), (1.0, 2.0, 2.0)))
    with refused("the result", "10 x 10 x 9 voxels", "instead of 10 x 10 x 10 voxels"):
        score_volumes({"good": reference, "bad": other}, reference, {1: "liver"}, TOLERANCES)


@pytest.mark.parametrize("order", ["C", "F"])
def test_label_values_are_found_in_any_array_order(order: Any) -> None:
    data = np.zeros((4, 5, 6), np.uint32, order=order)
    data[3, 4, 5], data[0, 0, 0], data[2, 1, 3] = 614_454_277, 7, 1
    assert label_values(data) == [1, 7, 614_454_277]
    assert label_values(data[::-1, :, ::-2]) == [1, 614_454_277]


# Pairs


def test_two_files_are_a_pair_whatever_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "mine.nrrd", "truth.nii.gz")
    result, reference = tmp_path / "mine.nrrd", tmp_path / "truth.nii.gz"
    assert find_pairs(result, reference) == [FilePair("truth", result, reference)]


def test_files_of_two_folders_belong_together_by_name(tmp_path: Path) -> None:
    result = touch(tmp_path / "out", "b.nrrd", "a.nii.gz", "notes.txt", "dataset.json", "logs/run.txt")
    reference = touch(tmp_path / "truth", "a.nii.gz", "b.nii.gz", "plan.json", "old/c.nii.gz")
    assert find_pairs(result, reference) == [
        FilePair("a", result / "a.nii.gz", reference / "a.nii.gz"),
        FilePair("b", result / "b.nrrd", reference / "b.nii.gz"),
    ]


def test_results_of_segment_belong_to_the_references_of_nnunet(tmp_path: Path) -> None:
    result = touch(
        tmp_path / "out", "q1_0000/segmentation.nii.gz", "q1_0000/run.json", "q2/segmentation.nii.gz", "failed/run.json"
    )
    reference = touch(tmp_path / "truth", "q1.nii.gz", "q2.nii.gz")
    assert find_pairs(result, reference) == [
        FilePair("q1", result / "q1_0000" / "segmentation.nii.gz", reference / "q1.nii.gz"),
        FilePair("q2", result / "q2" / "segmentation.nii.gz", reference / "q2.nii.gz"),
    ]


def test_a_reference_may_itself_end_as_a_channel(tmp_path: Path) -> None:
    result, reference = touch(tmp_path / "out", "q_0000.nii.gz"), touch(tmp_path / "truth", "q_0000.nii.gz")
    assert [pair.case for pair in find_pairs(result, reference)] == ["q_0000"]
    touch(reference, "q.nii.gz")
    with refused(result, "1 of 2 references: q;"):
        find_pairs(result, reference)


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    """macOS leaves "._case.nii.gz" beside files on foreign disks."""
    result = touch(tmp_path / "out", "a.nii.gz", "._a.nii.gz", ".writing-x/segmentation.nii.gz")
    reference = touch(tmp_path / "truth", "a.nii.gz", "._a.nii.gz", ".b.nii.gz")
    assert [pair.case for pair in find_pairs(result, reference)] == ["a"]


@pytest.mark.parametrize("partial", [False, True])
def test_a_result_without_reference_is_refused(tmp_path: Path, partial: bool) -> None:
    result = touch(tmp_path / "out", "a.nii.gz", "b_0000/segmentation.nii.gz")
    reference = touch(tmp_path / "truth", "a.nii.gz")
    with refused(result / "b_0000/segmentation.nii.gz", reference, "b.nii.gz"):
        find_pairs(result, reference, partial=partial)


def test_references_without_result_are_refused(tmp_path: Path) -> None:
    result = touch(tmp_path / "out", "c3.nii.gz")
    reference = touch(tmp_path / "truth", *[f"c{number}.nii.gz" for number in range(8)])
    with refused(result, "7 of 8", "c0, c1, c2, c4, c5 and 2 more", "--partial"):
        find_pairs(result, reference)


def test_references_without_result_are_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = touch(tmp_path / "out", "b.nii.gz")
    reference = touch(tmp_path / "truth", "a.nii.gz", "b.nii.gz", "c.nii.gz")
    with caplog.at_level(logging.WARNING):
        pairs = find_pairs(result, reference, partial=True)
    assert [pair.case for pair in pairs] == ["b"]
    assert len(caplog.messages) == 1
    assert "2 of 3 references: a, c;" in caplog.text
    caplog.clear()
    find_pairs(reference, reference, partial=True)
    assert not caplog.messages


def test_paths_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    full = touch(tmp_path / "full", "a.nii.gz")
    file, absent = full / "a.nii.gz", tmp_path / "absent"
    for pair in [(full, file), (file, full)]:
        with refused(full, "a folder", file):
            find_pairs(*pair)
    with refused(absent, "no such file or folder", "results"):
        find_pairs(absent, full)
    with refused(absent, "no such file or folder", "references"):
        find_pairs(full, absent)
    empty = touch(tmp_path / "empty", "run.json", "a/segmentation.nii.gz")
    endings = ", ".join(IMAGE_SUFFIXES)
    with refused(empty, "no label map", endings):
        find_pairs(full, empty)  # folders of segment are results, not references
    (empty / "a" / "segmentation.nii.gz").unlink()
    with refused(empty, "no label map", f"{endings}, or folders with segmentation.nii.gz"):
        find_pairs(empty, full)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with refused(tmp_path, "Permission denied"):
        find_pairs(tmp_path, tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    single = touch(tmp_path / "single", "a.nii.gz")
    double = touch(tmp_path / "double", "a.nii.gz", "a.nrrd")
    for pair in [(double, single), (single, double)]:
        with refused(double / "a.nrrd", double / "a.nii.gz"):
            find_pairs(*pair)
    both = touch(tmp_path / "both", "a/segmentation.nii.gz", "a.nii.gz")
    with refused(both / "a.nii.gz", both / "a/segmentation.nii.gz"):
        find_pairs(both, single)
    channel = touch(tmp_path / "channel", "a.nii.gz", "a_0000.nii.gz")
    with refused(channel / "a_0000.nii.gz", channel / "a.nii.gz"):
        find_pairs(channel, single)


# Files


def test_files_are_scored_case_by_case(tmp_path: Path) -> None:
    half = (slice(0, 5), slice(2, 7), slice(0, 5))
    for case, box in [("b", half), ("a", LIVER)]:
        write(tmp_path / "out" / f"{case}.nii", {2: NODE, 1: box})
        write(tmp_path / "truth" / f"{case}.nii", {1: LIVER, 2: NODE})
    seen: list[tuple[int, int, str]] = []
    # Paths may be text, and the tolerance a number of mm.
    paths = str(tmp_path / "out"), str(tmp_path / "truth")
    scored = evaluate(*paths, 2, on_case=lambda *case: seen.append(case)).scores
    assert seen == [(1, 2, "a"), (2, 2, "b")]
    assert [(one.case, one.value, one.structure) for one in scored] == [
        *[("a", 1, "label_1"), ("a", 2, "label_2")],
        *[("b", 1, "label_1"), ("b", 2, "label_2")],
    ]
    assert [one.scores.dice for one in scored] == pytest.approx([1, 1, 2 * 125 / (125 + 250), 1])
    assert scored[2].scores.result_ml == 0.5
    assert scored[2].scores.tolerance_mm == 2


def test_result_folders_of_segment_are_scored(tmp_path: Path) -> None:
    write(tmp_path / "out" / "q_0000" / "segmentation.nii.gz", {1: LIVER}, {1: "liver"})
    write(tmp_path / "truth" / "q.nii.gz", {1: LIVER})
    scored = scores_of(tmp_path / "out", tmp_path / "truth")
    assert [(one.case, one.structure, one.scores.dice) for one in scored] == [("q", "liver", 1.0)]


def test_names_come_from_the_users_file_then_the_references_then_the_results(tmp_path: Path) -> None:
    content = {value: (slice(value, value + 1), slice(2, 3), slice(2, 3)) for value in (1, 2, 3, 4, 5)}
    result = write(tmp_path / "out" / "a.nii", content, {value: f"result {value}" for value in (1, 2, 3, 4)})
    reference = write(tmp_path / "truth" / "a.nii", content, {1: "header 1", 2: "header 2"})
    (tmp_path / "truth" / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "dataset 1": 1, "dataset 2": 2, "dataset 3": 3}})
    )
    (tmp_path / "names.txt").write_text("1 given 1\n9 given 9\n")
    found = {2: "header 2", 3: "dataset 3", 4: "result 4", 5: "label_5"}
    assert names_of(result, reference) == {1: "header 1"} | found
    assert names_of(result, reference, names=tmp_path / "names.txt") == {1: "given 1"} | found


def test_names_are_gathered_from_all_files_of_a_folder(tmp_path: Path) -> None:
    for case, names in [("a", {1: "liver"}), ("b", {2: "node", 1: "other"})]:
        write(tmp_path / "out" / f"{case}.nii", {1: LIVER, 2: NODE})
        write(tmp_path / "truth" / f"{case}.nii", {1: LIVER, 2: NODE}, names)
    scored = scores_of(tmp_path / "out", tmp_path / "truth")
    assert [one.structure for one in scored] == ["liver", "node"] * 2


def test_a_names_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.nii", {1: LIVER})
    with refused(tmp_path / "absent.txt", "no such file"):
        evaluated(file, file, names=tmp_path / "absent.txt")


def test_a_dataset_json_with_regions_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asked for it, so it stops nothing; and it is said once, not once a file."""
    for case in "abc":
        write(tmp_path / "out" / f"{case}.nii", {1: LIVER})
        write(tmp_path / "truth" / f"{case}.nii", {1: LIVER})
    (tmp_path / "truth" / "dataset.json").write_text(json.dumps({"labels": {"whole": [1, 2], "tumour": 2}}))
    with caplog.at_level(logging.WARNING):
        assert names_of(tmp_path / "out", tmp_path / "truth") == {1: "label_1"}
    assert len(caplog.messages) == 1
    assert "dataset.json: 'whole': [1, 2] is not a label" in caplog.text
    assert "its names are not used" in caplog.text


@pytest.fixture
def kidneys(tmp_path: Path) -> tuple[Path, Path]:
    """A result and a reference of four structures."""
    content = {value: (slice(place, place + 1), slice(2, 5), slice(2, 5)) for place, value in enumerate((1, 2, 3, 12))}
    names = {1: "liver", 2: "kidney_left", 3: "kidney_right", 12: "2"}
    return write(tmp_path / "out.nii", content), write(tmp_path / "truth.nii", content, names)


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        ((), [1, 2, 3, 12]),
        (("*",), [1, 2, 3, 12]),
        (("3",), [3]),
        (("Kidney Right",), [3]),
        (("*kidney*",), [2, 3]),
        (("kidney*", "liver", "1"), [1, 2, 3]),
        (("2",), [2]),  # a value comes before a name
        (("kidney?right", "12"), [3, 12]),
    ],
)
def test_structures_are_picked_by_value_name_or_pattern(
    kidneys: tuple[Path, Path], labels: tuple[str, ...], values: list[int]
) -> None:
    assert [value for _, value in evaluated(*kidneys, labels=labels)] == values


@pytest.mark.parametrize("option", ["labels", "centreline"])
def test_a_structure_that_nothing_has_is_refused(kidneys: tuple[Path, Path], option: str) -> None:
    with refused("no structure 'livr'", "1 (liver), 2 (kidney_left), 3 (kidney_right), 12 (2)"):
        evaluated(*kidneys, **{option: ["liver", "livr"]})


def test_centrelines_are_for_wanted_structures_alone(kidneys: tuple[Path, Path]) -> None:
    scores = evaluated(*kidneys, centreline=["kidney*"])
    assert {value: one.cldice for (_, value), one in scores.items()} == {1: None, 2: 1, 3: 1, 12: None}


def test_a_centreline_is_wanted_of_what_is_scored(kidneys: tuple[Path, Path]) -> None:
    with refused("no structure 'kidney*'", "1 (liver)"):
        evaluated(*kidneys, labels=["liver"], centreline=["kidney*"])


def test_label_sets_that_differ_are_refused(tmp_path: Path) -> None:
    lung, bone = (slice(7, 9), slice(0, 2), slice(0, 2)), (slice(7, 9), slice(3, 5), slice(0, 2))
    result = write(tmp_path / "result.nii", {1: LIVER, 3: lung})
    more = write(tmp_path / "more.nii", {1: LIVER, 2: NODE, 4: bone}, {2: "node"})
    less = write(tmp_path / "less.nii", {1: LIVER})
    for one, other, differences in [
        (result, less, [f"{result} has 3 (label_3), which {less} lacks"]),
        (less, result, [f"{result} has 3 (label_3), which {less} lacks"]),
        (
            *(result, more),
            [
                f"{result} has 3 (label_3), which {more} lacks",
                f"{more} has 2 (node), 4 (label_4), which {result} lacks",
            ],
        ),
    ]:
        with refused(*differences, "--labels"):
            evaluated(one, other)
    statuses = {value: one.status for (_, value), one in evaluated(result, more, labels=["*"]).items()}
    assert statuses == {1: "ok", 2: "missed", 3: "hallucinated", 4: "missed"}
    assert list(evaluated(result, more, labels=["1", "node"])) == [("more", 1), ("more", 2)]


@pytest.mark.parametrize("nested", [False, True])
def test_folders_are_named_where_the_label_sets_of_their_files_differ(tmp_path: Path, nested: bool) -> None:
    for case in "ab":
        name = f"{case}/segmentation.nii.gz" if nested else f"{case}.nii.gz"
        write(tmp_path / "out" / name, {1: LIVER})
        write(tmp_path / "truth" / f"{case}.nii.gz", {1: LIVER} | ({2: NODE} if case == "b" else {}))
    with refused(f"{tmp_path}/truth has 2 (label_2), which {tmp_path}/out lacks"):
        evaluated(tmp_path / "out", tmp_path / "truth")


def test_a_structure_of_one_case_counts_for_all(tmp_path: Path) -> None:
    """Cases of one folder need not have the same structures."""
    for case, content in [("a", {1: LIVER}), ("b", {1: LIVER, 2: NODE})]:
        write(tmp_path / "out" / f"{case}.nii", content)
        write(tmp_path / "truth" / f"{case}.nii", content)
    scores = evaluated(tmp_path / "out", tmp_path / "truth")
    assert {key: one.status for key, one in scores.items()} == {
        ("a", 1): "ok",
        ("a", 2): "both_empty",
        ("b", 1): "ok",
        ("b", 2): "ok",
    }


def test_what_the_result_knows_and_did_not_find_is_missed(tmp_path: Path) -> None:
    reference = write(tmp_path / "truth.nii", {1: LIVER, 2: NODE})
    result = write(tmp_path / "out.nii", {1: LIVER}, {1: "liver", 2: "node", 5: "elsewhere"})
    scores = evaluated(result, reference)
    assert {value: one.status for (_, value), one in scores.items()} == {1: "ok", 2: "missed"}
    assert (scores["truth", 2].dice, scores["truth", 2].nsd) == (0, 0)
    assert scores["truth", 2].hd95_mm == scores["truth", 2].hd95_voxel_mm == DIAGONAL_MM


def test_what_the_reference_knows_and_does_not_have_is_hallucinated(tmp_path: Path) -> None:
    reference = write(tmp_path / "truth" / "a.nii", {1: LIVER})
    (tmp_path / "truth" / "dataset.json").write_text(json.dumps({"labels": {"liver": 1, "node": 2}}))
    result = write(tmp_path / "out" / "a.nii", {1: LIVER, 2: NODE})
    assert {value: one.status for (_, value), one in evaluated(result, reference).items()} == {
        1: "ok",
        2: "hallucinated",
    }


def test_an_empty_result_has_missed_everything(tmp_path: Path) -> None:
    for case, content in [("a", {1: LIVER, 2: NODE}), ("b", {})]:
        write(tmp_path / "out" / f"{case}.nii", content)
        write(tmp_path / "truth" / f"{case}.nii", {1: LIVER, 2: NODE})
    scores = evaluated(tmp_path / "out", tmp_path / "truth")
    assert [scores["b", value].status for value in (1, 2)] == ["missed", "missed"]
    single = evaluated(tmp_path / "out" / "b.nii", tmp_path / "truth" / "b.nii", labels=["*"])
    assert [one.status for one in single.values()] == ["missed", "missed"]


@pytest.mark.parametrize("labels", [(), ("*",)])
def test_files_that_are_all_empty_are_refused(tmp_path: Path, labels: tuple[str, ...]) -> None:
    result, reference = write(tmp_path / "out.nii", {}), write(tmp_path / "truth.nii", {}, {1: "liver"})
    with refused(result, reference, "all voxels are 0"):
        evaluated(result, reference, labels=labels)


def test_one_name_for_two_values_is_refused(tmp_path: Path) -> None:
    """Liver and spleen in another order: each would be scored against the other."""
    content = {1: LIVER, 2: NODE}
    result = write(tmp_path / "out.nii", content, {1: "Node", 2: "liver"})
    reference = write(tmp_path / "truth.nii", content, {1: "liver", 2: "node"})
    for labels in ([], ["*"], ["1"]):
        with refused(result, "'Node' has the value 1, but 2", reference, "--names"):
            evaluated(result, reference, labels=labels)
    (tmp_path / "names.txt").write_text("1 liver\n2 node\n")
    assert names_of(result, reference, names=tmp_path / "names.txt") == {1: "liver", 2: "node"}


def test_two_values_of_one_name_on_both_sides_are_no_conflict(tmp_path: Path) -> None:
    content, names = {1: LIVER, 2: NODE}, {1: "cyst", 2: "Cyst"}
    result, reference = write(tmp_path / "out.nii", content, names), write(tmp_path / "truth.nii", content, names)
    assert list(evaluated(result, reference)) == [("truth", 1), ("truth", 2)]


def test_other_names_for_the_same_values_are_no_conflict(tmp_path: Path) -> None:
    result = write(tmp_path / "out.nii", {1: LIVER}, {1: "Leber", 2: "Niere"})
    reference = write(tmp_path / "truth.nii", {1: LIVER}, {1: "liver", 2: "kidney"})
    assert names_of(result, reference) == {1: "liver"}


def test_a_tolerance_for_no_structure_is_warned_of(
    tmp_path: Path, kidneys: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preset_mine.toml").write_text(
        'default_mm = 1\n[tolerance_mm]\n"kidny*" = 3\nliver = 5\n99 = 2\n"*kidney*" = 4\n'
    )
    with caplog.at_level(logging.WARNING):
        # Not picked is not misspelt.
        scores = evaluated(*kidneys, tolerances=load_tolerances("preset_mine.toml"), labels=["kidney*"])
    assert caplog.messages == ["preset_mine.toml: no structure is called kidny*, 99; check the spelling"]
    assert [one.tolerance_mm for one in scores.values()] == [4, 4]


@pytest.mark.parametrize("preset", ["flare22", "kits21", "nikolov"])
def test_a_preset_may_name_more_than_there_is(
    kidneys: tuple[Path, Path], caplog: pytest.LogCaptureFixture, preset: str
) -> None:
    tolerances = load_tolerances(preset)
    assert tolerances.unmatched([(1, "liver")])
    with caplog.at_level(logging.WARNING):
        evaluated(*kidneys, tolerances=tolerances)
    assert caplog.messages == []


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def elsewhere(path: Path) -> None:
    save_volume(Volume(np.ones(GRID.shape, np.uint8), Grid(GRID.shape, GRID.affine + np.eye(4, k=3))), path)


def in_metres(path: Path) -> None:
    save_volume(
        Volume(np.ones(GRID.shape, np.uint8), Grid(GRID.shape, np.diag([1e-3, 1e-3, 1e-3, 1]) @ GRID.affine)), path
    )


def fractions(path: Path) -> None:
    save_volume(Volume(np.full(GRID.shape, 0.5, np.float32), GRID), path)


@pytest.mark.parametrize("change", [damaged, elsewhere, in_metres, fractions, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("side", ["out", "truth"])
def test_one_case_that_cannot_be_scored_costs_that_case_alone(
    tmp_path: Path, change: Callable[[Path], object], side: str, caplog: pytest.LogCaptureFixture
) -> None:
    for case in ("a", "b", "c"):
        for folder in ("out", "truth"):
            write(tmp_path / folder / f"{case}.nii", {1: LIVER})
    change(tmp_path / side / "b.nii")
    found = evaluate(tmp_path / "out", tmp_path / "truth")
    assert [(one.case, one.scores.dice) for one in found.scores] == [("a", 1), ("c", 1)]
    assert found.failures.keys() == {"b"}
    assert str(tmp_path / side / "b.nii") in found.failures["b"]
    assert any(found.failures["b"] in message for message in caplog.messages)
    assert found.summary.cases == 2
    found.write_csv(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["status"]) for row in rows] == [("a", "ok"), ("c", "ok"), ("b", "not_scored")]
    assert [row["reason"] for row in rows] == ["", "", found.failures["b"]]
    assert [(one["case"], one["status"]) for one in found.to_dict()["cases"]] == [
        *[("a", "ok"), ("c", "ok"), ("b", "not_scored")]
    ]


def test_where_no_case_can_be_scored_all_reasons_are_given(tmp_path: Path) -> None:
    for case in ("a", "b"):
        write(tmp_path / "truth" / f"{case}.nii", {1: LIVER})
        elsewhere(touch(tmp_path / "out", f"{case}.nii") / f"{case}.nii")
    with refused(tmp_path / "out/a.nii", tmp_path / "out/b.nii"):
        evaluate(tmp_path / "out", tmp_path / "truth")


def test_a_file_that_is_no_label_map_is_refused(tmp_path: Path) -> None:
    reference = write(tmp_path / "truth.nii", {1: LIVER})
    scan = tmp_path / "scan.nii"
    save_volume(Volume(np.full(GRID.shape, 0.5, np.float32), GRID), scan)
    with refused(scan, "1000 voxels"):
        evaluated(scan, reference)


# Summaries


@pytest.fixture
def three_cases(tmp_path: Path) -> list[CaseScore]:
    """The liver (1 ml) is found, missed, found; the node (0.008 ml) is nowhere, made up, found."""
    liver, node = {1: LIVER}, {2: NODE}
    for case, result, reference in [("a", liver, liver), ("b", node, liver), ("c", liver | node, liver | node)]:
        write(tmp_path / "out" / f"{case}.nii", result)
        write(tmp_path / "truth" / f"{case}.nii", reference, {1: "liver", 2: "node"})
    return list(scores_of(tmp_path / "out", tmp_path / "truth"))


def means(dice: float, mm: float) -> dict[str, float]:
    return {"dice": dice, "nsd": dice, "hd95_mm": mm, "assd_mm": mm, "hd95_voxel_mm": mm}


def test_three_cases_by_hand(three_cases: list[CaseScore]) -> None:
    summary = summarise(three_cases)
    assert summary.cases == 3
    assert summary.counts == {"ok": 3, "missed": 1, "hallucinated": 1, "both_empty": 1}
    liver, node = summary.structures
    assert (liver.value, liver.structure, liver.tolerance_mm, liver.reference_ml) == (1, "liver", 2, 1.0)
    assert (node.value, node.structure, node.reference_ml) == (2, "node", pytest.approx(0.008))
    assert liver.counts == {"ok": 2, "missed": 1, "hallucinated": 0, "both_empty": 0}
    assert node.counts == {"ok": 1, "missed": 0, "hallucinated": 1, "both_empty": 1}
    # Liver: 1, 0, 1 and 0, 30, 0 mm. Node: none, 0, 1 and none, 30, 0 mm; none counts as 1 and 0 mm, or not at all.
    assert (liver.scores["dice"].count, liver.scores["dice"].mean) == (3, pytest.approx(2 / 3))
    assert liver.scores["dice"].sd == pytest.approx(math.sqrt(1 / 3))
    assert (node.scores["dice"].count, node.scores["dice"].mean) == (2, 0.5)
    assert liver.with_empty == pytest.approx(means(2 / 3, 10))
    assert node.with_empty == pytest.approx(means(2 / 3, 10))
    assert liver.scores["hd95_mm"].high == node.scores["hd95_mm"].high == DIAGONAL_MM
    assert summary.means == pytest.approx(means(7 / 12, 12.5))
    assert summary.means_with_empty == pytest.approx(means(2 / 3, 10))
    assert summary.small == ("node",)
    assert summary.small_means == pytest.approx(means(0.5, 15))


def test_the_worst_case_and_the_means_of_each(three_cases: list[CaseScore]) -> None:
    liver, node = summarise(three_cases).structures
    assert [one.worst and (one.worst.case, one.worst.scores.dice) for one in (liver, node)] == [("b", 0), ("b", 0)]
    first, second, third = summarise_cases(three_cases)
    # The node that neither has is left out.
    assert (first.case, first.means["dice"]) == ("a", 1)
    assert (second.means["dice"], second.means["assd_mm"]) == (0, DIAGONAL_MM)
    assert second.worst is not None
    assert second.worst.structure == "liver"
    assert third.to_dict()["worst"] == {"structure": "liver", "dice": 1}


def test_summaries_are_json(three_cases: list[CaseScore]) -> None:
    content = json.loads(json.dumps(summarise(three_cases).to_dict(), allow_nan=False))
    assert content["cases"] == 3
    assert content["mean"] == {
        "dice": 0.583333,
        "nsd": 0.583333,
        "hd95_mm": 12.5,
        "assd_mm": 12.5,
        "hd95_voxel_mm": 12.5,
    }
    assert content["mean_with_both_empty_as_perfect"]["dice"] == 0.666667
    assert content["counts"] == {"ok": 3, "missed": 1, "hallucinated": 1, "both_empty": 1}
    assert content["small_structures"]["names"] == ["node"]
    assert content["small_structures"]["below_ml"] == SMALL_ML
    assert content["small_structures"]["mean"]["hd95_mm"] == 15
    liver, node = content["structures"]
    assert (liver["structure"], liver["value"], liver["tolerance_mm"], liver["reference_ml"]) == ("liver", 1, 2, 1)
    assert node["dice"] == {
        "count": 2,
        "mean": 0.5,
        "sd": 0.707107,
        "low": 0,
        "quartile": 0.25,
        "median": 0.5,
        "upper_quartile": 0.75,
        "high": 1,
    }


def test_nan_is_null_in_json() -> None:
    content = summarise([CaseScore("a", 1, "liver", made_empty())]).to_dict()
    text = json.dumps(content, allow_nan=False)
    assert content["mean"]["dice"] is None
    assert content["mean_with_both_empty_as_perfect"]["dice"] == 1
    assert content["structures"][0]["reference_ml"] is None
    assert content["structures"][0]["hd95_mm"]["median"] is None
    assert "NaN" not in text
    alone = summarise([CaseScore("a", 1, "liver", made("ok", 0.5))]).to_dict()["structures"][0]["dice"]
    assert (alone["count"], alone["mean"], alone["sd"]) == (1, 0.5, None)


def test_structures_count_the_same_however_many_cases_have_them() -> None:
    scored = [CaseScore(case, 1, "liver", made("ok", 1.0)) for case in "abc"]
    scored += [CaseScore("a", 2, "node", made("ok", 0.5)), *[CaseScore(case, 2, "node", made_empty()) for case in "bc"]]
    summary = summarise(scored)
    assert summary.means["dice"] == 0.75  # over all scores it would be 0.875
    assert summary.means_with_empty["dice"] == pytest.approx((1 + (0.5 + 1 + 1) / 3) / 2)


def test_structures_that_no_case_has_are_left_out_of_one_mean_alone() -> None:
    summary = summarise([CaseScore("a", 1, "liver", made("ok", 0.5)), CaseScore("a", 2, "node", made_empty())])
    assert summary.means["dice"] == 0.5
    assert summary.means_with_empty["dice"] == 0.75
    assert math.isnan(summary.structures[1].reference_ml)
    assert summary.small == ()  # of unknown size


def test_structures_are_small_below_the_limit_alone() -> None:
    at, below = made("ok", 1.0, reference_ml=SMALL_ML), made("ok", 0.5, reference_ml=SMALL_ML - 1e-6)
    summary = summarise([CaseScore("a", 1, "at", at), CaseScore("a", 2, "below", below)])
    assert summary.small == ("below",)
    assert summary.small_means["dice"] == 0.5


def test_volumes_are_averaged_over_references_that_have_the_structure() -> None:
    hallucinated = made("hallucinated", 0.0, reference_voxels=0, reference_ml=0.0)
    missed = made("missed", 0.0, reference_ml=3.0)
    scored = [
        CaseScore(case, 1, "liver", one) for case, one in [("a", made("ok", 1.0)), ("b", hallucinated), ("c", missed)]
    ]
    assert summarise(scored).structures[0].reference_ml == 2


def test_structures_come_in_the_order_of_their_values() -> None:
    scored = [CaseScore("a", value, f"s{value}", made("ok", 1.0)) for value in (12, 3, 7)]
    assert [one.value for one in summarise(scored).structures] == [3, 7, 12]


def test_centrelines_count_for_structures_they_are_wanted_of() -> None:
    aorta = [
        CaseScore("a", 1, "aorta", made("ok", 0.9, cldice=0.5)),
        CaseScore("b", 1, "aorta", made_empty(cldice=math.nan)),
    ]
    liver = [CaseScore("a", 2, "liver", made("ok", 0.9)), CaseScore("b", 2, "liver", made_empty())]
    summary = summarise([aorta[0], liver[0], aorta[1], liver[1]])
    assert summary.means["cldice"] == 0.5
    # The liver, whose centreline nobody asked for, is not perfect in case b, where there is none.
    assert summary.means_with_empty["cldice"] == 0.75
    assert math.isnan(summary.structures[1].with_empty["cldice"])
    assert "cldice" not in summarise(liver).means


def test_other_statuses_are_counted_too() -> None:
    """Of programs that score more than files: a result that could not be made."""
    scored = [CaseScore("a", 1, "liver", made("failed", 0.0))]
    counts = summarise(scored).counts
    assert counts == {"ok": 0, "missed": 0, "hallucinated": 0, "both_empty": 0, "failed": 1}
    assert list(counts)[-1] == "failed"


def test_a_summary_of_nothing() -> None:
    summary = summarise([])
    assert (summary.cases, summary.structures, summary.small) == (0, (), ())
    assert all(math.isnan(mean) for mean in summary.means.values())
    json.dumps(summary.to_dict(), allow_nan=False)


# Tables


def test_scores_are_written_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    rows = [
        {"case": "a, b", "value": 1, "dice": 2 / 3, "hd95_mm": math.nan, "cldice": None},
        {"case": "ä", "value": 12, "dice": np.float64(1), "hd95_mm": 30.0, "cldice": 0.1234567},
    ]
    write_scores(path, iter(rows))
    assert path.read_bytes().decode() == (
        'case,value,dice,hd95_mm,cldice\n"a, b",1,0.666667,,\nä,12,1.000000,30.000000,0.123457\n'
    )


def test_rows_of_scores_come_back_from_the_table(tmp_path: Path) -> None:
    scores = made("ok", 0.25, cldice=0.5, cldice_note="resampled to 1 mm; result: lost")
    write_scores(tmp_path / "scores.csv", [{"case": "a"} | vars(scores), {"case": "b"} | vars(made_empty())])
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["case", *asdict(scores)]
    assert (first["status"], float(first["dice"]), int(first["result_voxels"])) == ("ok", 0.25, 250)
    assert (first["cldice"], first["cldice_note"]) == ("0.500000", "resampled to 1 mm; result: lost")
    assert (second["status"], second["dice"], second["cldice"]) == ("both_empty", "", "")


def test_tables_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_scores(path, [{"case": "old"}])
    with pytest.raises(ValueError, match="fields not in fieldnames: 'dice'"):
        write_scores(path, [{"case": "new"}, {"case": "newer", "dice": 1.0}])
    assert path.read_text() == "case\nold\n"
    assert [one.name for one in tmp_path.iterdir()] == ["scores.csv"]
    write_scores(path, [{"case": "new"}])
    assert path.read_text() == "case\nnew\n"


def test_tables_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "scores.csv"
    with refused(path, path.parent):
        write_scores(path, [{"case": "a"}])
    path.mkdir(parents=True)
    with refused(path, "directory"):
        write_scores(path, [{"case": "a"}])
    assert [one.name for one in path.parent.iterdir()] == ["scores.csv"]
