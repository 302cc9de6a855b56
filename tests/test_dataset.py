"""Reading datasets in nnU-Net raw layout: no case may be lost, doubled or mixed up in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from atlassegfm.core.dataset import Case, Dataset, load_dataset, pick_structures
from atlassegfm.core.errors import InputError

CASES = ("abd_001", "abd_002", "abd_010")
CONTENT: dict[str, Any] = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "liver": 6, "right_kidney": 2, "left_kidney": 3, "spleen": 1},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three cases with two channels each."""
    folder = tmp_path / "Dataset001_Abd"
    for name in CASES:
        for file in (f"imagesTr/{name}_0000.nii.gz", f"imagesTr/{name}_0001.nii.gz", f"labelsTr/{name}.nii.gz"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
    write(folder)
    return folder


def write(folder: Path, *, without: str = "", **changes: Any) -> None:
    content = {key: value for key, value in (CONTENT | changes).items() if key != without}
    (folder / "dataset.json").write_text(json.dumps(content))


def names_of(dataset: Dataset) -> tuple[str, ...]:
    return tuple(case.name for case in dataset.cases)


def refused(folder: Path, message: str, *, channel: int = 0) -> None:
    """The message begins with a path of the dataset and goes on as given."""
    with pytest.raises(InputError, match=rf"^{re.escape(str(folder))}[^:]*: {message}"):
        load_dataset(folder, channel=channel)


def test_cases(folder: Path) -> None:
    dataset = load_dataset(folder)
    assert dataset.folder == folder
    assert dataset.name == "Dataset001_Abd"
    assert names_of(dataset) == CASES
    images, labels = folder / "imagesTr", folder / "labelsTr"
    assert dataset.cases[1] == Case("abd_002", images / "abd_002_0000.nii.gz", labels / "abd_002.nii.gz")
    assert list(dataset.structures.items()) == [(1, "spleen"), (2, "right_kidney"), (3, "left_kidney"), (6, "liver")]
    assert dataset.channels == ("T1", "T2")


def test_another_channel(folder: Path) -> None:
    assert load_dataset(folder, channel=1).case("abd_010").image.name == "abd_010_0001.nii.gz"
    for channel in (2, -1):
        refused(folder, rf"no channel {channel}; expected one of 0 \(T1\), 1 \(T2\)$", channel=channel)


def test_name_of_the_folder_one_stands_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_dataset(Path()).name == "Dataset001_Abd"
    monkeypatch.chdir(folder / "imagesTr")
    assert load_dataset(Path("..")).name == "Dataset001_Abd"


def test_hidden_and_other_files_do_not_count(folder: Path) -> None:
    for file in ("imagesTr/._abd_001_0000.nii.gz", "labelsTr/.DS_Store", "labelsTr/._abd_001.nii.gz", "imagesTr/a.txt"):
        (folder / file).touch()
    (folder / "labelsTr/old.nii.gz").mkdir()
    assert names_of(load_dataset(folder)) == CASES


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha"])
def test_other_endings(folder: Path, ending: str) -> None:
    for path in [*folder.glob("*/*.nii.gz")]:
        path.rename(str(path).replace(".nii.gz", ending))
    refused(
        folder, r"no file ends in \.nii\.gz; there is abd_001_0000\S*, .* and 3 more: correct file_ending in dataset"
    )
    write(folder, file_ending=ending)
    dataset = load_dataset(folder)
    assert names_of(dataset) == CASES
    assert dataset.cases[0].labels.name == f"abd_001{ending}"


def test_labels_and_channels_of_older_files(folder: Path) -> None:
    write(folder, without="channel_names", modality={"0": "MRI"}, labels={"0": "background", "2": "liver", "1": "node"})
    dataset = load_dataset(folder)
    assert dataset.channels == ("MRI",)
    assert dataset.structures == {1: "node", 2: "liver"}


def test_only_endings_and_labels_are_required(folder: Path) -> None:
    (folder / "dataset.json").write_bytes(b'\xef\xbb\xbf{"file_ending": ".nii.gz", "labels": {"liver": 1}}')
    dataset = load_dataset(folder)
    assert dataset.channels == ("0",)
    assert dataset.structures == {1: "liver"}


def test_ignore_label_is_no_structure(folder: Path) -> None:
    write(folder, labels={"background": 0, "liver": 1, "ignore": 2})
    assert load_dataset(folder).structures == {1: "liver"}


def test_folders_that_are_no_dataset(folder: Path, tmp_path: Path) -> None:
    layout = re.escape("nnU-Net raw layout (dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz)")
    refused(tmp_path / "absent", f"no such folder; expected the folder of a dataset in {layout}$")
    refused(folder / "dataset.json", f"a file; expected the folder of a dataset in {layout}$")
    refused(folder / "imagesTr", f"no dataset.json; expected a dataset in {layout}$")
    refused(tmp_path, f"no dataset.json; .* {layout}: give one of the datasets inside it, Dataset001_Abd$")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not valid JSON \(line 1: .*\); correct it"),
        ("[1]", 'found a list; expected an object with "labels" and more'),
        (
            '{"labels": {"liver": 1, "liver": 2}}',
            "'liver' is there twice; expected each key once: rename or remove",
        ),
        (b"\xff\xfe\x00", "not readable as text; expected JSON"),
    ],
)
def test_unreadable_dataset_json(folder: Path, text: str | bytes, message: str) -> None:
    (folder / "dataset.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("file_ending", None, r'"file_ending" is None; expected the ending of all images, one of \.nii\.gz, '),
        ("file_ending", ".png", r'"file_ending" is \'\.png\'; expected the ending of all images, one of \.nii\.gz'),
        ("file_ending", "nii.gz", r'"file_ending" is \'nii\.gz\'; expected the ending of all images, one of \.nii\.gz'),
        ("labels", ["liver"], 'no "labels"; add the label value of each name'),
        (
            "labels",
            {"whole": [1, 2], "core": 2},
            r"label 'whole' is a region, \[1, 2\]; expected one label value for each name",
        ),
        ("labels", {"liver": 1.5}, "label 'liver' is 1.5; expected \"name\": value, a whole number of at least 0"),
        ("labels", {"liver": -1}, "label 'liver' is -1; expected"),
        ("labels", {"liver": True}, "label 'liver' is True; expected"),
        ("labels", {"liver": "1"}, "label 'liver' is '1'; expected"),
        ("labels", {"liver": 1, "spleen": 1}, "'liver' and 'spleen' both have the label value 1; correct one"),
        (
            "labels",
            {"background": 0, "ignore": 1},
            '"labels" has no structure; expected at least one besides background',
        ),
        ("channel_names", ["CT"], r"\"channel_names\" is \['CT'\]; expected a name for each channel from 0"),
        ("channel_names", {}, '"channel_names" is {}; expected a name for each channel from 0'),
        ("channel_names", {"0": "T1", "2": "T2"}, r'"channel_names" is .*; expected a name for each channel from 0'),
        ("numTraining", "3", r"dataset\.json says '3' training cases, found 3 in labelsTr"),
        (
            "numTraining",
            4,
            r"dataset\.json says 4 training cases, found 3 in labelsTr; add the missing files, or",
        ),
        ("training", "x", '"training" has \'x\'; expected {"image": a path, "label": a path}'),
        ("training", [{"image": "x"}], r"\"training\" has {'image': 'x'}; expected"),
        (
            "training",
            [{"label": "./labelsTr/abd_001.nii.gz"}] * 2,
            '"training" lists 1 cases twice: abd_001; list each once',
        ),
        (
            "training",
            [{"label": f"./labelsTr/{name}.nii.gz"} for name in (*CASES, "abd_011", "abd_012")],
            '"training" lists 5 cases, of which 2 are not in labelsTr: abd_011, abd_012; add the files or',
        ),
        ("dataset", {}, '"dataset" is {}; expected {"CASE": {"images": .a path for each channel., "label": a path}}'),
        ("dataset", {"a": 1}, "case 'a' of \"dataset\" is 1; expected"),
        ("dataset", {"a": {"images": "x" * 99, "label": "y"}}, r"case 'a' of \"dataset\" is .{40}….{39}; expected"),
        (
            "dataset",
            {"a": {"images": [], "label": "y"}},
            "case 'a' of \"dataset\" has 0 images, none for channel 0; add",
        ),
        (
            "dataset",
            {name: {"images": [f"{name}.nrrd"], "label": f"labelsTr/{name}.nii.gz"} for name in (*CASES, "abd_011")},
            r'5 of the files that "dataset" lists do not exist: \S+abd_001\.nrrd, \S+, \S+ and 2 more; correct',
        ),
    ],
)
def test_dataset_json_that_cannot_be_used(folder: Path, key: str, value: Any, message: str) -> None:
    write(folder, **{key: value})
    refused(folder, message)


def test_keys_left_out(folder: Path) -> None:
    write(folder, without="file_ending")
    refused(folder, r'no "file_ending"; expected the ending of all images, one of \.nii\.gz, ')
    write(folder, without="labels")
    refused(folder, 'no "labels"; add the label value of each name, such as {"background": 0, "liver": 1}$')


def test_training_list_of_older_files(folder: Path) -> None:
    write(
        folder,
        training=[{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in CASES],
    )
    assert names_of(load_dataset(folder)) == CASES


def test_folders_left_out_or_empty(folder: Path) -> None:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).rename(folder / "away")
        refused(folder, "no such folder; expected a dataset in nnU-Net raw layout")
        (folder / part).mkdir()
        refused(folder, r"no file ends in \.nii\.gz; add the files$")
        (folder / part).rmdir()
        (folder / "away").rename(folder / part)


def test_image_without_labels(folder: Path) -> None:
    (folder / "labelsTr/abd_002.nii.gz").unlink()
    refused(
        folder, r"no labels for 1 of 3 scans in imagesTr: abd_002; expected CASE\.nii\.gz for each: add the labels or"
    )
    (folder / "labelsTr/abd_002.nrrd").touch()
    refused(folder, r"no labels for 1 of 3 scans in imagesTr: abd_002 \(only abd_002\.nrrd\); expected CASE\.nii\.gz")


def test_labels_without_image(folder: Path) -> None:
    (folder / "imagesTr/abd_002_0001.nii.gz").rename(folder / "imagesTr/abd_002_0001.nii")
    assert names_of(load_dataset(folder)) == CASES
    message = (
        r"no image for 1 of 3 label maps in labelsTr: abd_002 \(only abd_002_0001\.nii\); expected CASE_0001\.nii\.gz "
    )
    refused(folder, message, channel=1)
    for path in folder.glob("imagesTr/abd_0[01]*"):
        path.unlink()
    (folder / "imagesTr/abd_001_0000.nii.gz").touch()
    refused(
        folder, r"no image for 2 of 3 label maps in labelsTr: abd_002, abd_010; expected CASE_0000\.nii\.gz for each"
    )


def test_image_without_channel(folder: Path) -> None:
    (folder / "imagesTr/abd_002_0000.nii.gz").rename(folder / "imagesTr/abd_002.nii.gz")
    with pytest.raises(
        InputError, match=r"abd_002\.nii\.gz: the name has no channel; expected CASE_0000\.nii\.gz: rename it$"
    ):
        load_dataset(folder)


def test_listed_files_take_the_place_of_the_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "labelsTr").rename(tmp_path / "drawn")
    listed = {
        name: {"images": [f"imagesTr/{name}_000{n}.nii.gz" for n in (0, 1)], "label": f"../drawn/{name}.nii.gz"}
        for name in reversed(CASES)
    }
    write(folder, dataset=listed)
    dataset = load_dataset(folder, channel=1)
    assert names_of(dataset) == CASES
    assert dataset.cases[0] == Case(
        "abd_001", folder / "imagesTr/abd_001_0001.nii.gz", folder / "../drawn/abd_001.nii.gz"
    )
    listed.pop("abd_001")
    write(folder, dataset=listed)
    refused(folder, r'dataset\.json says 3 training cases, found 2 in its "dataset"; add the missing files')


def test_case_by_name(folder: Path) -> None:
    dataset = load_dataset(folder)
    assert dataset.case("abd_002") is dataset.cases[1]
    with pytest.raises(
        InputError,
        match=r"Abd: no case 'abd_0002'; did you mean 'abd_002'\? expected one of abd_001, abd_002, abd_010$",
    ):
        dataset.case("abd_0002")
    with pytest.raises(InputError, match="no case 'xyz'; expected one of abd_001"):
        dataset.case("xyz")


def test_select(folder: Path) -> None:
    dataset = load_dataset(folder)
    chosen = dataset.select(["abd_010", "abd_001"])
    assert names_of(chosen) == ("abd_001", "abd_010")
    assert chosen.structures == dataset.structures
    with pytest.raises(InputError, match="case 'abd_001' is named more than once; name each case once"):
        dataset.select(["abd_001", "abd_002", "abd_001"])
    with pytest.raises(InputError, match="no case 'abd_003'"):
        dataset.select(["abd_001", "abd_003"])
    with pytest.raises(InputError, match="no case is named; expected at least one"):
        dataset.select([])


def test_dataset_checks_itself(folder: Path) -> None:
    one, two, _ = load_dataset(folder).cases
    for cases in ((), (two, one), (one, one)):
        with pytest.raises(ValueError, match="use load_dataset"):
            Dataset(folder, "x", cases, {1: "liver"}, ("CT",))


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        (["6"], (6,)),
        (["LIVER"], (6,)),
        (["liver", "right kidney", "left-kidney", "spleen"], (1, 2, 3, 6)),
        (["*kidney*", "left_kidney", "3"], (2, 3)),
        (["*"], (1, 2, 3, 6)),
    ],
)
def test_pick_structures(folder: Path, wanted: list[str], values: tuple[int, ...]) -> None:
    assert pick_structures(load_dataset(folder), wanted) == values


def test_value_comes_before_a_name_of_digits(folder: Path) -> None:
    write(folder, labels={"2": 1, "liver": 2, "9": 3})
    dataset = load_dataset(folder)
    assert pick_structures(dataset, ["2"]) == (2,)
    assert pick_structures(dataset, ["9"]) == (3,)


def test_structures_that_are_not_there(folder: Path) -> None:
    dataset = load_dataset(folder)
    there = re.escape("1 (spleen), 2 (right_kidney), 3 (left_kidney), 6 (liver)")
    with pytest.raises(
        InputError,
        match=rf"json: no structure 'Livr'; did you mean 'liver'\? expected a value, name or pattern of {there}$",
    ):
        pick_structures(dataset, ["spleen", "Livr"])
    for absent in ("0", "*lung*", ""):
        with pytest.raises(InputError, match=rf"no structure '{re.escape(absent)}'; expected a value"):
            pick_structures(dataset, [absent])
    with pytest.raises(InputError, match=r"no structure is named; expected at least one, or '\*' for all"):
        pick_structures(dataset, [])
    write(folder, labels={f"region_{n}": n for n in range(1, 21)})
    with pytest.raises(InputError, match=r"14 \(region_14\), 15 \(region_15\) and 5 more$"):
        pick_structures(load_dataset(folder), ["liver"])


@pytest.mark.parametrize(
    ("name", "cases", "structures"),
    [("Dataset001_AbdMR", 6, 4), ("Dataset002_AbdCT", 6, 13), ("Dataset004_Hippocampus", 26, 2)],
)
def test_real_datasets(data_dir: Path, name: str, cases: int, structures: int) -> None:
    dataset = load_dataset(data_dir / name)
    assert (dataset.name, len(dataset.cases), len(dataset.structures)) == (name, cases, structures)
    assert all(case.image.is_file() and case.labels.is_file() for case in dataset.cases)


def test_structures_of_a_real_dataset(data_dir: Path) -> None:
    dataset = load_dataset(data_dir / "Dataset002_AbdCT")
    assert pick_structures(dataset, ["liver", "right kidney", "left_kidney", "spleen"]) == (1, 2, 3, 6)
    assert pick_structures(dataset, ["*kidney*", "*adrenal*"]) == (2, 3, 12, 13)
