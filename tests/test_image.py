"""Volumes in and out of files: geometry, values, names, and every refusal in the user's words."""

from __future__ import annotations

import gzip
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atlassegfm.core.errors import InputError
from atlassegfm.core.files import atomic_path
from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import (
    Volume,
    image_stem,
    image_suffix,
    load_image,
    load_labels,
    load_volume,
    save_volume,
    smallest_label_type,
)
from atlassegfm.core.itk import set_itk_grid
from atlassegfm.core.labels import LabelEntry, Structure, itk_snap_labels, read_names_file, slicer_color_table
from atlassegfm.core.mask import LocalMap
from conftest import ORIENTATIONS, SHEARED, affine_of

Factory = Callable[..., Volume]

GEOMETRY_FIELDS = (
    *("sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "dim_info", "xyzt_units"),
)
# Byte offsets of NIfTI-1 header fields.
DIM, DATATYPE, PIXDIM, SLOPE, XYZT_UNITS, CODES, QUATERN, QOFFSET, SROW = 40, 70, 76, 112, 123, 252, 256, 268, 280

LIVER = (Structure(1, "liver", (200, 80, 60)), Structure(2, "left kidney", (10, 20, 255)))


def nifti(path: Path, data: Any, affine: Any = ORIENTATIONS["RAS"], *, sform: int = 2, qform: int = 1) -> Path:
    """Write with nibabel, both codes set."""
    image = nib.Nifti1Image(np.asarray(data), affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nib.save(image, path)
    return path


def patch(path: Path, offset: int, form: str, *values: Any) -> Path:
    """Overwrite header bytes of an uncompressed file."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<" + form, content, offset, *values)
    path.write_bytes(content)
    return path


@pytest.fixture
def scan_data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (20, 21, 22)).astype(np.int16)


@pytest.fixture
def scan(tmp_path: Path, scan_data: np.ndarray) -> Path:
    return nifti(tmp_path / "scan.nii", scan_data)


@pytest.fixture
def mha(tmp_path: Path, scan_data: np.ndarray) -> Path:
    image = sitk.GetImageFromArray(scan_data)
    image.SetSpacing((1.5, 2, 3))
    image.SetOrigin((10, 20, 30))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "scan.mha"))
    return tmp_path / "scan.mha"


@pytest.fixture
def nrrd(tmp_path: Path, mha: Path) -> Path:
    sitk.WriteImage(sitk.ReadImage(str(mha)), str(tmp_path / "scan.nrrd"))
    return tmp_path / "scan.nrrd"


def edit(path: Path, old: bytes, new: bytes) -> Path:
    """Replace a piece of a text header."""
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


# --- geometry through files


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("affine", [*ORIENTATIONS.values(), SHEARED], ids=[*ORIENTATIONS, "sheared"])
def test_round_trip_keeps_world_and_values(
    tmp_path: Path, synthetic_image: Factory, suffix: str, affine: np.ndarray
) -> None:
    volume = synthetic_image((5, 6, 7), affine)
    save_volume(volume, tmp_path / f"scan{suffix}")
    back = load_image(tmp_path / f"scan{suffix}")
    assert np.array_equal(back.data, volume.data)
    assert back.grid.shape == (5, 6, 7)
    assert back.grid.distance_mm(volume.grid) < 1e-4
    assert back.source is not None
    assert back.source.notes == ()


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_all_formats_agree_with_itk_on_a_landmark(tmp_path: Path, synthetic_image: Factory, affine: np.ndarray) -> None:
    """The brightest voxel is at one world point, whoever writes and reads the file."""
    volume = synthetic_image((5, 6, 7), affine)
    ijk = np.unravel_index(int(volume.data.argmax()), volume.data.shape)
    where = volume.grid.voxel_to_world(ijk)
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        save_volume(volume, tmp_path / f"ours{suffix}")
        image = sitk.ReadImage(str(tmp_path / f"ours{suffix}"))
        found = np.unravel_index(int(sitk.GetArrayFromImage(image).argmax()), image.GetSize()[::-1])[::-1]
        lps = image.TransformIndexToPhysicalPoint([int(n) for n in found])
        assert np.allclose((-lps[0], -lps[1], lps[2]), where, atol=1e-4)
        sitk.WriteImage(image, str(tmp_path / f"itk{suffix}"))
        theirs = load_volume(tmp_path / f"itk{suffix}")
        found = np.unravel_index(int(theirs.data.argmax()), theirs.data.shape)
        assert np.allclose(theirs.grid.voxel_to_world(found), where, atol=1e-4)


def test_nibabel_reads_what_is_saved(tmp_path: Path, synthetic_image: Factory) -> None:
    volume = synthetic_image((5, 6, 7), SHEARED)
    save_volume(volume, tmp_path / "scan.nii.gz")
    image = nib.load(tmp_path / "scan.nii.gz")
    assert np.allclose(image.affine, SHEARED)
    assert np.array_equal(np.asanyarray(image.dataobj), volume.data)
    assert int(image.header["sform_code"]) == 1
    assert int(image.header["qform_code"]) == 0  # quaternions cannot say shear
    assert image.header.get_xyzt_units()[0] == "mm"


def test_hand_worked_mha(mha: Path) -> None:
    grid = load_volume(mha).grid
    # LPS: i runs along -y by 1.5 mm, j along +x by 2 mm; RAS+ has x and y negated.
    assert grid.affine.tolist() == [[0, -2, 0, -10], [1.5, 0, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]]


def test_nrrd_spaces(nrrd: Path) -> None:
    lps = load_volume(nrrd).grid.affine
    edit(nrrd, b"left-posterior-superior", b"right-anterior-superior")
    ras = load_volume(nrrd).grid.affine
    assert np.allclose(ras, np.diag([-1, -1, 1, 1]) @ lps)


def test_sheared_nrrd_and_mha_are_read(nrrd: Path, mha: Path) -> None:
    header = nrrd.read_bytes().split(b"\n\n")[0]
    directions = next(line for line in header.splitlines() if line.startswith(b"space directions"))
    edit(nrrd, directions, b"space directions: (2,0,0) (1,3,0) (0,0,4)")
    assert np.allclose(load_volume(nrrd).grid.affine[:3, :3], [[-2, -1, 0], [0, -3, 0], [0, 0, 4]])
    edit(mha, b"TransformMatrix = 0 -1 0 1 0 0 0 0 1", b"TransformMatrix = 1 0 0 0.3 1 0 0 0 1")
    assert np.allclose(load_volume(mha).grid.affine[:3, :3], [[-1.5, -0.6, 0], [0, -2, 0], [0, 0, 3]])


def test_negative_spacing_of_mha_turns_the_axis(mha: Path) -> None:
    """MetaImage allows it; every ITK program reads it so."""
    straight = load_volume(mha).grid.affine.copy()
    turned = load_volume(edit(mha, b"ElementSpacing = 1.5", b"ElementSpacing = -1.5")).grid.affine
    straight[:3, 0] *= -1
    assert np.allclose(turned, straight)


def rounded(affine: np.ndarray) -> np.ndarray:
    return np.round(affine, 3)


@pytest.mark.parametrize(
    ("affine", "sform", "qform"),
    [
        (ORIENTATIONS["RAS"], 1, 1),
        (ORIENTATIONS["LPS"], 4, 0),
        (ORIENTATIONS["oblique"], 2, 3),
        (ORIENTATIONS["oblique-flipped"], 0, 1),
        (rounded(ORIENTATIONS["oblique"]), 1, 1),
        (SHEARED, 2, 0),
        (SHEARED, 1, 1),
    ],
    ids=["RAS", "sform only", "oblique", "qform only", "rounded", "sheared", "sheared with a qform"],
)
@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_results_have_the_geometry_fields_of_their_scan(
    tmp_path: Path, scan_data: np.ndarray, affine: np.ndarray, sform: int, qform: int, big_endian: bool, kind: Any
) -> None:
    header = kind.header_class(endianness=">" if big_endian else "<")
    header.set_data_dtype(np.int16)
    image = kind(scan_data, affine, header)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform, strip_shears=True)
    image.header.set_dim_info(freq=1, phase=0, slice=2)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"name of the patient"
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    result = Volume((volume.data > 500).astype(np.uint8), volume.grid, volume.source)
    save_volume(result, tmp_path / "result.nii.gz", structures=LIVER)

    before, after = nib.load(tmp_path / "scan.nii.gz").header, nib.load(tmp_path / "result.nii.gz").header
    for name in GEOMETRY_FIELDS:
        assert before[name].astype(before[name].dtype.newbyteorder("=")).tobytes() == after[name].tobytes(), name
    assert np.array_equal(before["pixdim"][:4], after["pixdim"][:4])
    assert bytes(after["descrip"]).strip(b"\0") == b""
    back = load_labels(tmp_path / "result.nii.gz")
    assert np.array_equal(back.grid.affine, volume.grid.affine)
    assert np.array_equal(back.data, result.data)
    if kind is nib.Nifti1Image and not big_endian:
        raw = [gzip.decompress((tmp_path / name).read_bytes()) for name in ("scan.nii.gz", "result.nii.gz")]
        assert raw[0][CODES : SROW + 48] == raw[1][CODES : SROW + 48]
        assert raw[0][PIXDIM : PIXDIM + 16] == raw[1][PIXDIM : PIXDIM + 16]


@pytest.mark.parametrize("code", [5, 99])
def test_a_code_nibabel_does_not_know_still_counts(tmp_path: Path, scan: Path, code: int) -> None:
    patch(scan, CODES, "hh", 0, code)
    volume = load_volume(scan)
    assert volume.source is not None
    assert volume.source.notes == ()
    assert np.allclose(volume.grid.affine, ORIENTATIONS["RAS"])
    save_volume(volume, tmp_path / "result.nii")
    assert (tmp_path / "result.nii").read_bytes()[CODES : SROW + 48] == scan.read_bytes()[CODES : SROW + 48]


def test_a_turned_volume_is_saved_where_it_is(tmp_path: Path, scan_data: np.ndarray) -> None:
    """The header of the source describes other axes then, and must not be used."""
    nifti(tmp_path / "scan.nii.gz", scan_data, ORIENTATIONS["oblique-flipped"])
    turned = load_volume(tmp_path / "scan.nii.gz").canonical()
    save_volume(turned, tmp_path / "turned.nii.gz")
    back = load_volume(tmp_path / "turned.nii.gz")
    assert back.grid.distance_mm(turned.grid) < 1e-4
    assert np.array_equal(back.data, turned.data)


def test_a_volume_on_another_grid_is_saved_there(tmp_path: Path, scan: Path) -> None:
    volume = load_volume(scan)
    box = volume.grid.crop((2, 3, 4), (10, 10, 10))
    save_volume(Volume(volume.data[2:10, 3:10, 4:10], box, volume.source), tmp_path / "box.nii.gz")
    assert load_volume(tmp_path / "box.nii.gz").grid.distance_mm(box) < 1e-4


def test_metres_and_micrometres(tmp_path: Path, scan: Path) -> None:
    millimetres = load_volume(scan).grid.affine
    for unit, factor in ((1, 1000.0), (3, 0.001), (0, 1.0), (2, 1.0)):
        patch(scan, XYZT_UNITS, "B", unit)
        volume = load_volume(scan)
        assert np.allclose(volume.grid.affine[:3], factor * millimetres[:3])
        save_volume(volume, tmp_path / "result.nii.gz")
        back = load_volume(tmp_path / "result.nii.gz")
        assert np.array_equal(back.grid.affine, volume.grid.affine)


# --- which NIfTI geometry counts


def test_sform_counts_where_both_are_set_and_the_gap_is_said(
    tmp_path: Path, scan: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patch(scan, SROW, "f", 1.75)  # 0.25 mm more for each of 19 steps along i
    with caplog.at_level(logging.WARNING):
        volume = load_volume(scan)
    assert volume.grid.spacing_mm[0] == 1.75
    assert volume.source is not None
    assert volume.source.notes == ("sform and qform differ by up to 4.75 mm; the sform counts",)
    assert f"{scan}: sform and qform differ" in caplog.text


def test_a_rounded_sform_is_no_conflict(tmp_path: Path, scan_data: np.ndarray) -> None:
    path = nifti(tmp_path / "scan.nii", scan_data, ORIENTATIONS["oblique"])
    for row, values in enumerate(rounded(ORIENTATIONS["oblique"])[:3]):
        patch(path, SROW + 16 * row, "ffff", *values)
    volume = load_volume(path)
    assert volume.source is not None
    assert volume.source.notes == ()
    assert np.allclose(volume.grid.affine, rounded(ORIENTATIONS["oblique"]))


def test_qform_counts_where_the_sform_code_is_0(scan: Path) -> None:
    patch(scan, CODES, "hh", 1, 0)
    patch(scan, SROW, "ffff", 9, 9, 9, 9)
    assert np.allclose(load_volume(scan).grid.affine, ORIENTATIONS["RAS"])


def test_qfac_0_is_1(scan: Path) -> None:
    """The standard's own rule for files of ANALYZE times."""
    patch(scan, CODES, "hh", 1, 0)
    patch(scan, PIXDIM, "f", 0)
    volume = load_volume(scan)
    assert np.allclose(volume.grid.affine, ORIENTATIONS["RAS"])
    assert volume.source is not None
    assert volume.source.notes == ()


def test_no_codes_at_all(scan: Path) -> None:
    volume = load_volume(patch(scan, CODES, "hh", 0, 0))
    assert volume.source is not None
    assert volume.source.notes == (
        "the header has no orientation (sform and qform codes are 0); its axes are taken as L, A, S",
    )
    assert volume.grid.axis_codes == "LAS"
    assert volume.grid.spacing_mm.tolist() == [1.5, 2, 4]


@pytest.mark.parametrize("values", [(2.0, 2.0, 2.0), (np.nan, 0.0, 0.0)])
def test_an_unusable_qform(scan: Path, values: tuple[float, ...]) -> None:
    patch(scan, QUATERN, "fff", *values)
    volume = load_volume(scan)
    assert volume.source is not None
    assert len(volume.source.notes) == 1
    assert volume.source.notes[0].startswith("the qform is unusable (")
    assert volume.source.notes[0].endswith("; the sform counts")
    assert np.allclose(volume.grid.affine, ORIENTATIONS["RAS"])
    patch(scan, CODES, "hh", 1, 0)
    with pytest.raises(InputError, match=r"scan.nii: the qform is unusable \(.*\); correct the header"):
        load_volume(scan)


# --- values


def test_load_image_is_float32_and_scaled(tmp_path: Path, scan: Path, scan_data: np.ndarray) -> None:
    patch(scan, SLOPE, "ff", 2.0, -1024.0)
    image = load_image(scan)
    assert image.data.dtype == np.float32
    assert np.array_equal(image.data, scan_data * 2.0 - 1024)


def test_one_volume_in_four_dimensions(tmp_path: Path, scan_data: np.ndarray) -> None:
    assert load_image(nifti(tmp_path / "a.nii.gz", scan_data[..., None])).grid.shape == (20, 21, 22)
    assert load_image(nifti(tmp_path / "b.nii.gz", scan_data[..., None, None])).grid.shape == (20, 21, 22)
    sitk.WriteImage(sitk.GetImageFromArray(scan_data[None], isVector=False), str(tmp_path / "a.nrrd"))
    assert load_image(tmp_path / "a.nrrd").grid.shape == (22, 21, 20)


def test_one_voxel_label_map(tmp_path: Path) -> None:
    save_volume(Volume(np.ones((1, 1, 1), np.uint8), Grid((1, 1, 1), np.diag([4, 4, 4, 1]))), tmp_path / "one.nii.gz")
    assert load_labels(tmp_path / "one.nii.gz").data.tolist() == [[[1]]]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize(
    ("largest", "kind"),
    [(1, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32), (2**32 - 1, np.uint32)],
)
def test_smallest_label_type(tmp_path: Path, suffix: str, largest: int, kind: type) -> None:
    assert smallest_label_type(largest) == kind
    data = np.zeros((3, 4, 5), np.float64)
    data[1, 2, 3] = largest
    save_volume(Volume(data, Grid((3, 4, 5), ORIENTATIONS["LPS"])), tmp_path / f"labels{suffix}")
    labels = load_labels(tmp_path / f"labels{suffix}")
    assert labels.data.dtype == kind
    assert np.array_equal(labels.data, data)
    save_volume(labels, tmp_path / f"again{suffix}")
    assert load_volume(tmp_path / f"again{suffix}").data.dtype == kind


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_saving_twice_gives_the_same_bytes(tmp_path: Path, synthetic_labels: Factory, suffix: str) -> None:
    labels = synthetic_labels()
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for folder in ("first", "second"):
        save_volume(labels, tmp_path / folder / f"labels{suffix}", structures=LIVER)
    first, second = ((tmp_path / folder / f"labels{suffix}").read_bytes() for folder in ("first", "second"))
    assert first == second
    if suffix == ".nii.gz":
        assert first[4:8] == bytes(4)  # no time of writing
        assert first[3] == 0  # no name of the file


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_names_and_colours_round_trip(tmp_path: Path, synthetic_labels: Factory, suffix: str) -> None:
    structures = (*LIVER, Structure(300, 'Leber & "Galle" <ä>', (1, 2, 3)))
    save_volume(synthetic_labels(), tmp_path / f"labels{suffix}", structures=structures)
    source = load_labels(tmp_path / f"labels{suffix}").source
    assert source is not None
    assert dict(source.label_table) == {s.value: LabelEntry(s.name, s.color) for s in structures}


def test_label_maps_say_that_they_are(tmp_path: Path, synthetic_labels: Factory) -> None:
    save_volume(synthetic_labels(), tmp_path / "labels.nii.gz", structures=LIVER)
    image = nib.load(tmp_path / "labels.nii.gz")
    assert image.header.get_intent()[0] == "label"
    assert [extension.get_code() for extension in image.header.extensions] == [0, 30]
    # As TotalSegmentator and others read names: the text of the first extension.
    assert b"liver" in image.header.extensions[0].get_content()


def test_totalsegmentator_header(tmp_path: Path, synthetic_labels: Factory) -> None:
    xml = b"""<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14T05:45:09]]></Date>
    <VolumeInformation Index="0">   <LabelTable>
    <Label Key="1" Red="0.2" Green="0.4" Blue="1.0" Alpha="1"><![CDATA[spleen]]></Label>
    <Label Key="2" Red="0.0" Green="0.0" Blue="0.0" Alpha="1"><![CDATA[kidney_right & co]]></Label>
    </LabelTable>  <StudyMetaDataLinkSet>  </StudyMetaDataLinkSet>  <VolumeType><![CDATA[Label]]></VolumeType>
    </VolumeInformation></CaretExtension>"""
    image = nib.Nifti1Image(synthetic_labels().data, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml))
    nib.save(image, tmp_path / "total.nii.gz")
    source = load_labels(tmp_path / "total.nii.gz").source
    assert source is not None
    assert source.label_table == {
        1: LabelEntry("spleen", (51, 102, 255)),
        2: LabelEntry("kidney_right & co", (0, 0, 0)),
    }


def test_slicer_segmentation(tmp_path: Path, synthetic_labels: Factory) -> None:
    image = sitk.GetImageFromArray(synthetic_labels().data)
    fields = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segment0_ID": "Segment_1",
        "Segment0_Name": "left atrium",
        "Segment0_LabelValue": "1",
        "Segment0_Color": "0.50196 0.682353 0.501961",
        "Segment0_Layer": "0",
        "Segment1_Name": "aorta",
        "Segment1_LabelValue": "2",
    }
    for key, text in fields.items():
        image.SetMetaData(key, text)
    sitk.WriteImage(image, str(tmp_path / "heart.seg.nrrd"), useCompression=True)
    source = load_labels(tmp_path / "heart.seg.nrrd").source
    assert source is not None
    assert source.label_table == {1: LabelEntry("left atrium", (128, 174, 128)), 2: LabelEntry("aorta")}


# --- every refusal


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.nii.gz: no such file; check the path"):
        load_volume(tmp_path / "nothing.nii.gz")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "case.nii.gz").mkdir()
    for path in (tmp_path, tmp_path / "case.nii.gz"):
        with pytest.raises(InputError, match="a folder; expected a file"):
            load_volume(path)


def test_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"scan.png: not a known image file; expected a file ending in .nii.gz"):
        load_volume(tmp_path / "scan.png")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"scan{suffix}").write_bytes(b"")
    with pytest.raises(InputError, match=r"the file is empty \(0 bytes\); copy it again"):
        load_volume(tmp_path / f"scan{suffix}")


def test_compression_and_ending_disagree(tmp_path: Path, scan: Path) -> None:
    (tmp_path / "text.nii.gz").write_text("a download page in place of the file")
    (tmp_path / "plain.nii.gz").write_bytes(scan.read_bytes())
    for name in ("text.nii.gz", "plain.nii.gz"):
        with pytest.raises(InputError, match=f"{name}: not compressed with gzip, as its ending says; .* end in .nii"):
            load_volume(tmp_path / name)
    (tmp_path / "squeezed.nii").write_bytes(gzip.compress(scan.read_bytes()))
    with pytest.raises(InputError, match=r"squeezed.nii: compressed with gzip"):
        load_volume(tmp_path / "squeezed.nii")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_junk(tmp_path: Path, suffix: str) -> None:
    junk = np.random.default_rng(0).bytes(5000)
    (tmp_path / f"junk{suffix}").write_bytes(gzip.compress(junk) if suffix == ".nii.gz" else junk)
    name = "NIfTI" if "nii" in suffix else suffix[1:].upper()
    with pytest.raises(InputError, match=f"junk{suffix}: not readable as {name}; expected an image file: check that"):
        load_volume(tmp_path / f"junk{suffix}")


@pytest.mark.parametrize("share", ["5 bytes", "60 bytes", "300 bytes", "half", "all but the checksum", "all but 1"])
def test_truncated_gzip(tmp_path: Path, scan: Path, share: str) -> None:
    content = gzip.compress(scan.read_bytes())
    length = {
        "half": len(content) // 2,
        "all but the checksum": len(content) - 8,
        "all but 1": len(content) - 1,
    }.get(share) or int(share.split()[0])
    (tmp_path / "cut.nii.gz").write_bytes(content[:length])
    with pytest.raises(InputError, match=r"cut.nii.gz: the file is truncated or damaged; copy it again"):
        load_volume(tmp_path / "cut.nii.gz")


def test_a_flipped_bit_in_gzip(tmp_path: Path, scan: Path) -> None:
    for place in (0.3, 0.5, 0.9):
        content = bytearray(gzip.compress(scan.read_bytes()))
        content[int(place * len(content))] ^= 0x10
        (tmp_path / "bit.nii.gz").write_bytes(content)
        with pytest.raises(InputError, match="bit.nii.gz: the file is truncated or damaged; copy it again"):
            load_volume(tmp_path / "bit.nii.gz")


@pytest.mark.parametrize("length", [3, 100, 347, 348, 352, 1000, -1])
def test_truncated_nifti(scan: Path, length: int) -> None:
    content = scan.read_bytes()
    scan.write_bytes(content[:length])
    message = "the file is truncated or damaged; copy it again" if abs(length) != 3 else "not readable as NIfTI"
    with pytest.raises(InputError, match=message):
        load_volume(scan)


@pytest.mark.parametrize("name", ["mha", "nrrd"])
@pytest.mark.parametrize("length", [100, -20])
def test_truncated_itk(request: pytest.FixtureRequest, name: str, length: int) -> None:
    path: Path = request.getfixturevalue(name)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=f"not readable as {name.upper()}; .* check that it is complete"):
        load_volume(path)


def test_detached_data_missing(tmp_path: Path, mha: Path) -> None:
    sitk.WriteImage(sitk.ReadImage(str(mha)), str(tmp_path / "scan.mhd"))
    assert load_volume(tmp_path / "scan.mhd").grid.shape == (22, 21, 20)
    (tmp_path / "scan.raw").unlink()
    with pytest.raises(InputError, match="scan.mhd: not readable as MHD; .* check that it is complete"):
        load_volume(tmp_path / "scan.mhd")


def test_too_many_voxels_for_any_memory(scan: Path) -> None:
    patch(scan, DIM, "hhhh", 3, 20000, 21000, 22000)
    with pytest.raises(InputError, match=r"scan.nii: 20000 x 21000 x 22000 voxels do not fit into memory"):
        load_volume(scan)


@pytest.mark.parametrize(("offset", "form", "values"), [(DATATYPE, "h", (1234,)), (344, "4s", (b"abcd",))])
def test_unknown_type_or_magic(scan: Path, offset: int, form: str, values: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="scan.nii: not readable as NIfTI"):
        load_volume(patch(scan, offset, form, *values))


def test_dimensions(tmp_path: Path) -> None:
    for shape, words in (((4, 5, 6, 2), r"4 dimensions \(4 x 5 x 6 x 2\)"), ((4, 5), r"2 dimensions \(4 x 5\)")):
        nifti(tmp_path / "scan.nii.gz", np.zeros(shape, np.uint8))
        with pytest.raises(InputError, match=rf"scan.nii.gz: the image has {words}; expected 3: extract one volume"):
            load_volume(tmp_path / "scan.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros(shape[::-1]), isVector=False), str(tmp_path / "scan.nrrd"))
        with pytest.raises(InputError, match=rf"scan.nrrd: the image has {words}; expected 3: extract one volume"):
            load_volume(tmp_path / "scan.nrrd")


@pytest.mark.parametrize("size", [0, -22])
def test_no_voxels(scan: Path, size: int) -> None:
    with pytest.raises(InputError, match=r"scan.nii: the image has shape \(20, 21, .*\); expected three positive"):
        load_volume(patch(scan, DIM, "hhhh", 3, 20, 21, size))


def test_colours_and_complex_numbers(tmp_path: Path) -> None:
    nifti(tmp_path / "rgb.nii.gz", np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    with pytest.raises(InputError, match=r"rgb.nii.gz: the voxels are 3 numbers each \(colour\); expected one real"):
        load_volume(tmp_path / "rgb.nii.gz")
    nifti(tmp_path / "complex.nii.gz", np.zeros((4, 4, 4), np.complex64))
    with pytest.raises(InputError, match=r"complex.nii.gz: the voxels are complex \(complex64\); expected one real"):
        load_volume(tmp_path / "complex.nii.gz")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_vectors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vector{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(path))
    with pytest.raises(InputError, match=f"vector{suffix}: 3 numbers a voxel"):
        load_volume(path)


@pytest.mark.parametrize("spacing", [0.0, -2.0, np.nan, np.inf])
def test_spacing_of_nifti(scan: Path, spacing: float) -> None:
    patch(scan, PIXDIM + 8, "f", spacing)
    with pytest.raises(
        InputError, match=f"scan.nii: the header gives the spacing 1.5, {spacing:g}, 4; .*correct pixdim"
    ):
        load_volume(scan)


@pytest.mark.parametrize("spacing", [b"0", b"nan", b"abc"])
def test_spacing_of_mha(mha: Path, spacing: bytes) -> None:
    edit(mha, b"ElementSpacing = 1.5", b"ElementSpacing = " + spacing)
    with pytest.raises(InputError, match=r"scan.mha: the spacing in the header is not three numbers above 0; correct"):
        load_volume(mha)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 0, 0, 0), r"the affine is singular \(voxel axes of length 0, 2, 4 mm that do not span a volume\)"),
        ((np.nan, 0, 0, 0), "the affine is not a finite 4 x 4 matrix; correct the header"),
    ],
)
def test_affine_of_nifti(scan: Path, row: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"scan.nii: {message}"):
        load_volume(patch(scan, SROW, "ffff", *row))


def test_affine_of_nrrd_and_mha(nrrd: Path, mha: Path) -> None:
    header = nrrd.read_bytes().split(b"\n\n")[0]
    directions = next(line for line in header.splitlines() if line.startswith(b"space directions"))
    original = nrrd.read_bytes()
    edit(nrrd, directions, b"space directions: (1,0,0) (1,0,0) (0,0,3)")
    with pytest.raises(InputError, match="scan.nrrd: the affine is singular; correct the direction vectors"):
        load_volume(nrrd)
    nrrd.write_bytes(original)
    edit(nrrd, directions, b"space directions: (0,0,0) (0,2,0) (0,0,3)")
    with pytest.raises(InputError, match="scan.nrrd: the spacing in the header is not three numbers above 0"):
        load_volume(nrrd)
    edit(mha, b"TransformMatrix = 0 -1 0 1 0 0 0 0 1", b"TransformMatrix = 1 0 0 1 0 0 0 0 1")
    with pytest.raises(InputError, match="scan.mha: the affine is singular; correct the direction vectors"):
        load_volume(mha)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_none(tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture) -> None:
    data = np.random.default_rng(0).random((4, 5, 6))
    data[1, 2, 3] = data[0, 0, 0] = value
    nifti(tmp_path / "scan.nii.gz", data)
    with caplog.at_level(logging.WARNING):
        scan = load_image(tmp_path / "scan.nii.gz")
    assert "scan.nii.gz: 2 of 120 voxels" in caplog.text
    assert scan.source is not None
    assert "2 of 120 voxels" in scan.source.notes[-1]
    assert scan.data[1, 2, 3] == scan.data[0, 0, 0] == np.float32(np.delete(data.ravel(), [0, 45]).min())
    labels = np.where(np.isin(data, value), value, data > 0.5)
    if np.isnan(value):
        labels[1, 2, 3] = labels[0, 0, 0] = value
    nifti(tmp_path / "labels.nii.gz", labels)
    if abs(value) < np.inf:  # a number, if not one that a label map may have
        with pytest.raises(InputError, match="labels.nii.gz"):
            load_labels(tmp_path / "labels.nii.gz")
    else:
        assert load_labels(tmp_path / "labels.nii.gz").data[1, 2, 3] == 0
    data[:3] = value
    for load in (load_image, load_labels):
        nifti(tmp_path / "scan.nii.gz", data)
        with pytest.raises(InputError, match=r"scan.nii.gz: "):
            load(tmp_path / "scan.nii.gz")


def test_labels_off_whole_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = np.zeros((4, 5, 6), np.float32)
    data[1], data[2] = 1.00005, 1.9999
    data[3] = -0.0004
    nifti(tmp_path / "labels.nii.gz", data)
    with caplog.at_level(logging.WARNING):
        labels = load_labels(tmp_path / "labels.nii.gz")
    assert np.unique(labels.data).tolist() == [0, 1, 2]
    assert "off whole numbers" in caplog.text
    data[0, 0, 0] = 1.02
    nifti(tmp_path / "labels.nii.gz", data)
    with pytest.raises(InputError, match=r"1 voxels are not whole numbers \(the first is 1\.02\)"):
        load_labels(tmp_path / "labels.nii.gz")


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_scan_no_body_can_have(tmp_path: Path, factor: float) -> None:
    affine = np.diag([factor, factor, factor, 1.0]) @ ORIENTATIONS["oblique"]
    nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).random((20, 18, 16)), affine)
    with pytest.raises(InputError, match=f"scan.nii.gz: .*{'metres' if factor < 1 else 'micrometres'}"):
        load_image(tmp_path / "scan.nii.gz")


# --- formats of other programs


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
def test_freesurfer(tmp_path: Path, synthetic_image: Factory, affine: np.ndarray, suffix: str) -> None:
    volume = synthetic_image((4, 5, 6), affine)
    path = tmp_path / f"scan{suffix}"
    nib.save(nib.MGHImage(volume.data.astype(np.float32), affine), path)
    back = load_image(path)
    assert np.array_equal(back.data, volume.data.astype(np.float32))
    assert np.allclose(back.grid.affine, affine, atol=1e-4)
    for largest in (200, 40_000, 70_000):
        labels = Volume(np.arange(120, dtype=np.uint32).reshape(4, 5, 6) * 0 + largest, volume.grid)
        save_volume(labels, tmp_path / f"labels{suffix}")
        again = load_labels(tmp_path / f"labels{suffix}")
        assert np.array_equal(again.data, labels.data)
        assert np.allclose(again.grid.affine, affine, atol=1e-4)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=f"scan{suffix}"):
        load_image(path)


@pytest.mark.parametrize("ending", [".img", ".hdr"])
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Spm2AnalyzeImage, nib.Spm99AnalyzeImage])
def test_pairs_of_files(tmp_path: Path, synthetic_image: Factory, kind: Any, ending: str) -> None:
    affine = np.diag([-2.0, 1.5, 3.0, 1.0])
    affine[:3, 3] = (8.0, -3.0, -7.5)
    volume = synthetic_image((4, 5, 6), affine)
    nib.save(kind(volume.data.astype(np.float32), affine), tmp_path / "scan.img")
    back = load_image(tmp_path / f"scan{ending}")
    assert np.array_equal(back.data, volume.data.astype(np.float32))
    assert np.allclose(back.grid.affine, nib.load(tmp_path / "scan.img").affine)
    assert image_stem(tmp_path / f"scan{ending}") == "scan"
    other = tmp_path / f"scan{'.hdr' if ending == '.img' else '.img'}"
    content = other.read_bytes()
    other.write_bytes(content[:100])
    with pytest.raises(InputError, match=f"scan{ending}"):
        load_image(tmp_path / f"scan{ending}")
    other.unlink()
    with pytest.raises(InputError, match=f"{other.name} is missing"):
        load_image(tmp_path / f"scan{ending}")


def test_an_analyze_file_has_no_orientation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nib.save(nib.AnalyzeImage(np.random.default_rng(0).random((4, 5, 6)).astype(np.float32), None), tmp_path / "a.img")
    with caplog.at_level(logging.WARNING):
        assert load_image(tmp_path / "a.img").grid.axis_codes == "LAS"
    assert "no orientation" in caplog.text


def test_segmentation_with_layers(tmp_path: Path) -> None:
    layers = np.zeros((4, 5, 6, 2), np.uint8)  # as SimpleITK has them: (K, J, I)
    layers[1, ..., 0], layers[2, ..., 0], layers[3, ..., 1] = 1, 2, 1
    image = sitk.GetImageFromArray(layers, isVector=True)
    for number, (name, layer, value) in enumerate((("liver", 0, 1), ("spleen", 0, 2), ("tumour", 1, 1))):
        for key, text in (("Name", name), ("Layer", layer), ("LabelValue", value), ("Color", "1 0 0")):
            image.SetMetaData(f"Segment{number}_{key}", str(text))
    sitk.WriteImage(image, str(tmp_path / "three.seg.nrrd"))
    labels = load_labels(tmp_path / "three.seg.nrrd")
    assert np.array_equal(labels.data, np.arange(4)[None, None, :] * np.ones((6, 5, 1), int))
    assert labels.source is not None
    assert {value: entry.name for value, entry in labels.source.label_table.items()} == {
        1: "liver",
        2: "spleen",
        3: "tumour",
    }
    layers[1, 0, 0, 1] = 1
    overlapping = sitk.GetImageFromArray(layers, isVector=True)
    for key in image.GetMetaDataKeys():
        overlapping.SetMetaData(key, image.GetMetaData(key))
    sitk.WriteImage(overlapping, str(tmp_path / "two.seg.nrrd"))
    with pytest.raises(InputError, match=r"two.seg.nrrd: .*'liver' and 'tumour' overlap"):
        load_labels(tmp_path / "two.seg.nrrd")


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_images_of_other_libraries(synthetic_image: Factory, affine: np.ndarray) -> None:
    volume = synthetic_image((4, 5, 6), affine)
    itk = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.transpose(2, 1, 0)))
    set_itk_grid(itk, volume.grid)
    images = (
        volume,
        nib.Nifti1Image(volume.data, affine),
        itk,
        (volume.data, affine),
        (volume.data[..., None], affine),
    )
    for image in images:
        found = load_image(image)
        assert np.array_equal(found.data, volume.data.astype(np.float32))
        assert np.allclose(found.grid.affine, affine)
    for wrong in (3, "no.nii.gz", (volume.data[0], affine), (volume.data, np.zeros((4, 4))), None):
        with pytest.raises(InputError):
            load_image(wrong)  # type: ignore[arg-type]


def test_colour_tables_are_read_back(tmp_path: Path) -> None:
    structures = (*LIVER, Structure(70, "a name, with 3 words", (1, 2, 3)))
    for text in (slicer_color_table(structures), itk_snap_labels(structures)):
        (tmp_path / "names.txt").write_text(text)
        table = read_names_file(tmp_path / "names.txt")
        assert [table[one.value].color for one in structures] == [one.color for one in structures]
        assert [table[one.value].name.replace("_", " ") for one in structures] == [one.name for one in structures]


def test_constant_image(tmp_path: Path) -> None:
    nifti(tmp_path / "flat.nii.gz", np.full((4, 5, 6), 7, np.int16))
    with pytest.raises(InputError, match="flat.nii.gz: all voxels have the value 7; expected a scan with contrast"):
        load_image(tmp_path / "flat.nii.gz")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"1 voxels are not whole numbers \(the first is 1.5\); .* with nearest neighbour"),
        (-3, "the label map has the value -3; expected 0 for background and labels above 0"),
        (0, r"the label map is empty \(all voxels are 0\); expected at least one structure"),
        (5e9, "the label value 5000000000 does not fit into 32 bits; renumber the labels"),
    ],
)
def test_unusable_labels(tmp_path: Path, value: float, message: str) -> None:
    data = np.zeros((4, 5, 6))
    data[1, 2, 3] = value
    nifti(tmp_path / "labels.nii.gz", data)
    with pytest.raises(InputError, match=f"labels.nii.gz: {message}"):
        load_labels(tmp_path / "labels.nii.gz")


@pytest.mark.parametrize("name", ["scan.png", "scan.mhd", "scan.nhdr", "scan"])
def test_unwritable_format(tmp_path: Path, synthetic_image: Factory, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: cannot write this format; expected a name ending in .nii.gz, .nii"):
        save_volume(synthetic_image(), tmp_path / name)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_unwritable_place(tmp_path: Path, synthetic_image: Factory, suffix: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / f"folder{suffix}").mkdir()
    for place, reason in (
        (f"nowhere/scan{suffix}", r"cannot write there \(No such file or directory\)"),
        (f"file/scan{suffix}", "a file is in the way where a folder is expected"),
        (f"folder{suffix}", r"cannot write there \(Is a directory\)"),
    ):
        with pytest.raises(InputError, match=rf"{place}: {reason}; choose another place"):
            save_volume(synthetic_image(), tmp_path / place)


# --- small parts


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.txt"
    target.write_text("old")
    with pytest.raises(KeyError), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half of the new")
        raise KeyError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_names_of_files() -> None:
    for name, suffix, stem in (
        ("a.nii.gz", ".nii.gz", "a"),
        ("A.b.NII", ".nii", "A.b"),
        ("x.seg.nrrd", ".seg.nrrd", "x"),
        ("x.mgz", ".mgz", "x"),
        ("x.hdr", ".hdr", "x"),
        ("x.txt", None, "x"),
    ):
        assert image_suffix(Path("f") / name) == suffix
        assert image_stem(Path("f") / name) == stem


def test_volume_refuses_a_shape_that_is_not_the_grids() -> None:
    with pytest.raises(ValueError, match=r"data of shape \(2, 2, 2\) on a grid of shape \(3, 3, 3\)"):
        Volume(np.zeros((2, 2, 2)), Grid((3, 3, 3), np.eye(4)))


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_canonical_and_back(synthetic_image: Factory, affine: np.ndarray) -> None:
    volume = synthetic_image((4, 5, 6), affine)
    canonical = volume.canonical()
    crude = nib.as_closest_canonical(nib.Nifti1Image(volume.data, affine))
    assert np.array_equal(canonical.data, np.asanyarray(crude.dataobj))
    assert np.allclose(canonical.grid.affine, crude.affine)
    back = canonical.turned_to(volume.grid)
    assert back.grid is volume.grid
    assert np.array_equal(back.data, volume.data)


def test_turned_to_other_voxels_is_refused(synthetic_image: Factory) -> None:
    with pytest.raises(ValueError, match="the grids do not share their voxels"):
        synthetic_image().turned_to(Grid((7, 8, 9), affine_of(np.eye(3), (0, 0, 0))))


sparse = hnp.arrays(np.float32, (4, 5, 6), elements=st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.25, 1.0]), fill=st.just(0.0))


@given(sparse)
def test_local_map_round_trip(full: np.ndarray) -> None:
    local = LocalMap.from_full(full)
    assert np.array_equal(local.to_full((4, 5, 6)), full)
    assert local.is_empty is (not full.any())
    if not local.is_empty:
        assert np.array_equal(full[local.box], local.values)
        for axis in range(3):
            planes = np.moveaxis(local.values, axis, 0)
            assert planes[0].any()
            assert planes[-1].any()


@given(sparse, st.tuples(*[st.integers(0, 3)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_local_map_on_a_box(full: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]) -> None:
    stop = tuple(min(a + n, m) for a, n, m in zip(start, size, full.shape, strict=True))
    crude = full[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    assert np.array_equal(LocalMap.from_full(full).on_box(start, stop), crude)


def test_empty_and_one_voxel_local_maps() -> None:
    assert LocalMap.empty().is_empty
    assert not LocalMap.empty().to_full((2, 3, 4)).any()
    assert LocalMap.empty().on_box((0, 0, 0), (2, 2, 2)).shape == (2, 2, 2)
    full = np.zeros((3, 3, 3))
    full[2, 1, 0] = 1
    one = LocalMap.from_full(full)
    assert (one.start, one.stop, one.values.shape) == ((2, 1, 0), (3, 2, 1), (1, 1, 1))


# --- the real scans


@pytest.mark.slow
def test_real_scans_are_read_and_saved_unmoved(tmp_path: Path, data_dir: Path) -> None:
    for folder in sorted(data_dir.glob("Dataset*")):
        for path in sorted(folder.glob("labelsTr/*.nii.gz"))[:2]:
            labels = load_labels(path)
            save_volume(labels, tmp_path / path.name)
            raw = [gzip.decompress(one.read_bytes())[:348] for one in (path, tmp_path / path.name)]
            assert raw[0][CODES : SROW + 48] == raw[1][CODES : SROW + 48], path
            assert np.array_equal(load_labels(tmp_path / path.name).data, labels.data)
            assert load_image(folder / "imagesTr" / path.name.replace(".nii", "_0000.nii")).grid.matches(labels.grid)


def test_paths_may_be_strings(tmp_path: Path, synthetic_image: Factory, synthetic_labels: Factory) -> None:
    save_volume(synthetic_image(), f"{tmp_path}/image.nii.gz")
    save_volume(synthetic_labels(), f"{tmp_path}/labels.nrrd")
    assert load_image(f"{tmp_path}/image.nii.gz").grid.matches(load_labels(f"{tmp_path}/labels.nrrd").grid)


def test_reprs_are_one_short_line() -> None:
    volume = Volume(np.zeros((256, 256, 34), np.float32), Grid((256, 256, 34), np.diag([1.25, 1.25, 7.7, 1])))
    assert repr(volume) == "Volume(256 x 256 x 34 voxels of 1.25 x 1.25 x 7.7 mm, axes RAS, float32)"
    assert repr(volume.grid) == "Grid(256 x 256 x 34 voxels of 1.25 x 1.25 x 7.7 mm, axes RAS)"
    mask = LocalMap((1, 2, 3), np.full((2, 2, 2), 0.5, np.float32))
    assert repr(mask) == "LocalMap((1, 2, 3) to (3, 4, 5), highest 0.50)"
