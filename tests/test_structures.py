"""Names and colours of labels: every place they are read from, and that they come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import deltaE_ciede2000, rgb2lab

from atlassegfm.core.errors import InputError
from atlassegfm.core.labels import (
    LabelEntry,
    Structure,
    dataset_json_of,
    from_nifti_xml,
    from_slicer_metadata,
    palette_color,
    read_names_file,
    structures_of,
    to_nifti_xml,
    to_slicer_metadata,
)

LIVER, SPLEEN = LabelEntry("liver", (200, 80, 60)), LabelEntry("spleen")

channel = st.integers(0, 255)
# Names as people write them: any letters, no control characters, nothing at the ends that a parser strips.
names = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=20).map(
    lambda name: name.strip() or "x"
)
structure_lists = st.lists(
    st.builds(Structure, st.integers(1, 2**32 - 1), names, st.tuples(channel, channel, channel)),
    max_size=5,
    unique_by=lambda structure: structure.value,
)


def as_table(structures: list[Structure]) -> dict[int, LabelEntry]:
    return {structure.value: LabelEntry(structure.name, structure.color) for structure in structures}


@given(structure_lists)
def test_nifti_xml_round_trip(structures: list[Structure]) -> None:
    assert from_nifti_xml(to_nifti_xml(structures)) == as_table(structures)


@given(structure_lists)
def test_slicer_round_trip(structures: list[Structure]) -> None:
    assert from_slicer_metadata(to_slicer_metadata(structures, (4, 5, 6))) == as_table(structures)


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "no xml at all",
        "<LabelTable>",
        "</LabelTable><LabelTable>",
        "<LabelTable><Label></LabelTable>",
        '<LabelTable><Label Key="one">liver</Label><Label Key="2"></Label><Label>x</Label></LabelTable>',
        '<LabelTable><Label Key="²">liver</Label></LabelTable>',
    ],
)
def test_xml_without_names(xml: str) -> None:
    assert from_nifti_xml(xml) == {}


def test_xml_with_unusable_colours() -> None:
    label = '<LabelTable><Label Key="1" Red="{}" Green="0" Blue="0">liver</Label></LabelTable>'
    assert from_nifti_xml(label.format("red")) == {1: LabelEntry("liver")}
    assert from_nifti_xml(label.format("7.5")) == {1: LabelEntry("liver", (255, 0, 0))}
    assert from_nifti_xml('<LabelTable><Label Key="1" Red="1">liver</Label></LabelTable>') == {1: LabelEntry("liver")}


def test_slicer_metadata_without_names() -> None:
    assert from_slicer_metadata({}) == {}
    assert from_slicer_metadata({"Segment0_LabelValue": "one", "Segment0_Name": "x"}) == {}
    assert from_slicer_metadata({"Segment0_LabelValue": "1"}) == {}
    unusable = {"Segment0_LabelValue": "1", "Segment0_Name": "liver", "Segment0_Color": "red"}
    assert from_slicer_metadata(unusable) == {1: LabelEntry("liver")}


def test_first_table_that_knows_a_value_counts() -> None:
    found = structures_of([7, 2, 1], [{1: SPLEEN}, {1: LIVER, 2: LabelEntry("aorta", (9, 9, 9))}])
    assert [s.value for s in found] == [1, 2, 7]
    assert [s.name for s in found] == ["spleen", "aorta", "label_7"]
    # The colour comes from the first table that has one.
    assert [s.color for s in found] == [(200, 80, 60), (9, 9, 9), palette_color(2)]
    assert structures_of([], [{1: SPLEEN}]) == ()
    assert structures_of([3], [], default_name="structure {value}")[0].name == "structure 3"


def test_palette_colours_differ() -> None:
    colors = [palette_color(position) for position in range(140)]
    assert len(set(colors)) == 140
    assert all(0 <= one <= 255 for color in colors for one in color)


#: Machado et al. (2009): linear RGB as protan and deutan eyes see it.
PROTAN = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
DEUTAN = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))


@pytest.mark.parametrize("vision", [np.eye(3), PROTAN, DEUTAN], ids=["normal", "protan", "deutan"])
def test_palette_colours_differ_for_the_colour_blind(vision: Any) -> None:
    colors = np.array([palette_color(position) for position in range(20)]) / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.asarray(vision).T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    distance = deltaE_ciede2000(lab[:, None], lab[None]) + 100 * np.eye(20)
    assert distance.min() > 10  # 2 are seen as different side by side


@pytest.mark.parametrize(
    ("name", "text", "table"),
    [
        ("a.json", '{"liver": 1, "spleen": 2}', {1: LabelEntry("liver"), 2: SPLEEN}),
        ("a.json", '{"0": "background", "1": "liver"}', {1: LabelEntry("liver")}),
        ("a.json", '{"name": "x", "labels": {"background": 0, "liver": 1}}', {1: LabelEntry("liver")}),
        ("a.txt", "# comment\n\n1 liver\r\n2: left kidney\n3,vertebra L5\n0 background\n", None),
        ("a.ctbl", "# Color table\n0 background 0 0 0 0\n1 liver 200 80 60 255\n2 left lung 1 2 3\n", None),
        ("a.label", '  0  0  0  0  0  0  0  "Clear"\n  1  200  80  60  1  1  1  "liver"\n', {1: LIVER}),
        ("a.label", '1 200 80 60 0.5 1 1 "left lung (upper)"\n', {1: LabelEntry("left lung (upper)", (200, 80, 60))}),
        (
            "LUT.txt",
            "1004   ctx-lh-corpuscallosum   120 70 50 0\n",
            {1004: LabelEntry("ctx-lh-corpuscallosum", (120, 70, 50))},
        ),
        ("a.txt", "\ufeff1 Leber\n2 Milz ä\n", {1: LabelEntry("Leber"), 2: LabelEntry("Milz ä")}),
        ("a.txt", "", {}),
    ],
)
def test_names_files(tmp_path: Path, name: str, text: str, table: dict[int, LabelEntry] | None) -> None:
    expected = {
        "a.txt": {1: LabelEntry("liver"), 2: LabelEntry("left kidney"), 3: LabelEntry("vertebra L5")},
        "a.ctbl": {1: LIVER, 2: LabelEntry("left lung", (1, 2, 3))},
    }
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_names_file(tmp_path / name) == (expected[name] if table is None else table)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", r"a.json: not valid JSON \(line 1: .*\); correct it"),
        ("a.json", b"[1]", r'a.json: expected an object such as \{"liver": 1\}, found a list'),
        ("a.json", b'{"whole": [1, 2]}', r"a.json: 'whole': \[1, 2\] is not a label; expected"),
        ("a.json", b'{"liver": true}', "a.json: 'liver': True is not a label"),
        ("a.txt", b"1 liver\nspleen\n", r"a.txt: line 2 is 'spleen'; expected a label value and a name, as '1 liver'"),
        ("a.txt", b"\xff\xfe1\x00", r"a.txt: not readable as text; expected a names file \(JSON or text\)"),
    ],
)
def test_unusable_names_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_names_file(tmp_path / name)


def test_missing_names_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.txt: no such file; expected a names file"):
        read_names_file(tmp_path / "none.txt")
    with pytest.raises(InputError, match="not readable as text"):
        read_names_file(tmp_path)


def test_dataset_json_beside_and_above(tmp_path: Path) -> None:
    (tmp_path / "labelsTr").mkdir()
    labels = tmp_path / "labelsTr" / "case.nii.gz"
    assert dataset_json_of(labels) is None
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}}))
    assert dataset_json_of(labels) == tmp_path.resolve() / "dataset.json"
    (tmp_path / "labelsTr" / "dataset.json").write_text("{}")
    assert dataset_json_of(labels) == tmp_path.resolve() / "labelsTr" / "dataset.json"


@pytest.mark.slow
def test_names_of_the_real_datasets(data_dir: Path) -> None:
    for folder in sorted(data_dir.glob("Dataset*")):
        path = dataset_json_of(next((folder / "labelsTr").glob("*.nii.gz")))
        assert path == folder.resolve() / "dataset.json"
        assert read_names_file(path)
