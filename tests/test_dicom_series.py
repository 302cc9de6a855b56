"""Series of DICOM images against the geometry they were made with, and against SimpleITK."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless, RLELossless

from atlassegfm.core.errors import InputError, MissingExtraError
from atlassegfm.dicom import files as dicom_files
from atlassegfm.dicom import find_series, is_series_folder, load_series, open_image, series_of
from conftest import rotation
from dicom_series import (
    AFFINES,
    FRAME,
    NAME,
    PATIENT,
    SERIES,
    STUDY,
    affine_of,
    grid_of,
    scan_values,
    tilted,
    write_series,
)

VALUES = scan_values()
AXIAL = AFFINES["axial"]
OTHER = f"{SERIES}9"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_series(tmp_path / "scan", VALUES, AXIAL)


@pytest.mark.parametrize("kind", AFFINES)
def test_geometry_and_values_are_exact(kind: str, tmp_path: Path) -> None:
    volume = load_series(write_series(tmp_path / "scan", VALUES, AFFINES[kind]))
    truth = grid_of(VALUES, AFFINES[kind])
    assert volume.grid.shape == truth.shape
    assert volume.grid.distance_mm(truth) < 1e-3
    # Voxel for voxel, by where they are: the stack may count its slices the other way.
    assert np.array_equal(volume.turned_to(truth).data, _placed(VALUES, kind) - 1024)


@pytest.mark.parametrize("kind", [kind for kind in AFFINES if kind != "tilted"])
def test_simpleitk_agrees(kind: str, tmp_path: Path) -> None:
    import SimpleITK as sitk

    folder = write_series(tmp_path / "scan", VALUES, AFFINES[kind])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    volume = load_series(folder)
    values = sitk.GetArrayFromImage(image)
    for i, j, k in ((0, 0, 0), (23, 0, 0), (0, 19, 8), (11, 3, 5), (23, 19, 8)):
        lps = np.array(image.TransformIndexToPhysicalPoint((i, j, k)))
        here = volume.grid.world_to_voxel(lps * (-1, -1, 1))
        assert np.abs(here - np.rint(here)).max() < 1e-3
        assert volume.data[tuple(np.rint(here).astype(int))] == values[k, j, i]


def test_tilted_slices_agree_with_simpleitk_slice_by_slice(tmp_path: Path) -> None:
    import SimpleITK as sitk

    folder = write_series(tmp_path / "scan", VALUES, AFFINES["tilted"])
    volume = load_series(folder)
    series = series_of(volume)
    assert series is not None
    assert volume.grid.spacing_mm == pytest.approx([0.7, 1.1, 3.0])
    for k, frame in enumerate(series.frames):
        image = sitk.ReadImage(str(frame.path))
        values = sitk.GetArrayFromImage(image)
        for i, j in ((0, 0), (23, 4), (7, 19)):
            lps = np.array(image.TransformIndexToPhysicalPoint((i, j, 0)))
            assert volume.grid.world_to_voxel(lps * (-1, -1, 1)) == pytest.approx([i, j, k], abs=1e-3)
            assert volume.data[i, j, k] == values[0, j, i]


def test_steep_tilt_and_oblique_tilt(tmp_path: Path) -> None:
    affine = affine_of(rotation(5, 8, 3) @ tilted(30), (1.0, 2.0, 3.0))
    volume = load_series(write_series(tmp_path / "scan", VALUES, affine))
    assert volume.grid.distance_mm(grid_of(VALUES, affine)) < 1e-3


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_values_are_rescaled(modality: str, tmp_path: Path) -> None:
    slopes = {"CT": lambda _: 2.0, "MR": lambda _: 1.0, "PT": lambda k: 0.25 + 0.125 * k}
    intercept = {"CT": -1024.0, "MR": 0.0, "PT": 0.0}[modality]
    folder = write_series(
        tmp_path / "scan", VALUES, AXIAL, modality=modality, slope=slopes[modality], intercept=intercept
    )
    volume = load_series(folder)
    expected = VALUES * np.array([slopes[modality](k) for k in range(VALUES.shape[2])]) + intercept
    assert np.array_equal(volume.data, expected)
    assert volume.data.dtype == {"CT": np.int32, "MR": np.int16, "PT": np.float32}[modality]
    assert open_image(folder).data.dtype == np.float32
    assert np.array_equal(open_image(folder).data, expected.astype(np.float32))


def test_unsigned_values_above_the_signed_range(tmp_path: Path) -> None:
    values = np.full((4, 5, 3), 65535, np.uint16)
    values[1, 2] = 7
    assert load_series(write_series(tmp_path / "scan", values, AXIAL)).data.max() == 65535 - 1024


def _compress(syntax: str) -> Callable[[pydicom.Dataset, int], None]:
    return lambda dataset, _: dataset.compress(syntax, generate_instance_uid=False)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=["RLE", "JPEG-LS"])
def test_compressed_series(syntax: str, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=_compress(syntax))
    assert np.array_equal(load_series(folder).data, VALUES.astype(int) - 1024)


@pytest.mark.parametrize("name", ["JPEG2000Lossless", "JPEGLosslessProcess14_1"])
def test_series_compressed_by_gdcm(name: str, folder: Path) -> None:
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm is not installed")
    for path in folder.iterdir():
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(path))
        assert writer.Write()
    assert pydicom.dcmread(next(folder.iterdir())).file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(load_series(folder).data, VALUES.astype(int) - 1024)


def test_files_without_preamble_and_with_odd_names(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL, names="{0}.weird name".format)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.preamble, dataset.file_meta = None, pydicom.dataset.FileMetaDataset()
        dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[:2] == b"\x08\x00"
    (folder / "README.txt").write_text("not an image")
    assert np.array_equal(load_series(folder).data, VALUES.astype(int) - 1024)


def test_multi_frame_file_with_positions(tmp_path: Path) -> None:
    source = write_series(tmp_path / "scan", VALUES, AFFINES["oblique"])
    folder = tmp_path / "enhanced"
    folder.mkdir()
    _enhanced(source).save_as(folder / "all.dcm", enforce_file_format=True)
    one, other = load_series(folder), load_series(source)
    assert one.grid.distance_mm(other.grid) < 1e-6
    assert np.array_equal(one.data, other.data)


def _enhanced(source: Path) -> pydicom.Dataset:
    """The slices of a series as the frames of one file, in the order of their names."""
    slices = [pydicom.dcmread(path) for path in sorted(source.iterdir())]
    whole = pydicom.dcmread(min(source.iterdir()))
    whole.SOPClassUID, whole.NumberOfFrames = pydicom.uid.EnhancedCTImageStorage, len(slices)
    whole.PixelData = b"".join(one.PixelData for one in slices)
    whole.PerFrameFunctionalGroupsSequence = []
    for one in slices:
        frame, position = pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = one.ImagePositionPatient
        frame.PlanePositionSequence = [position]
        whole.PerFrameFunctionalGroupsSequence.append(frame)
    shared, orientation, measures, rescale = (pydicom.Dataset() for _ in range(4))
    orientation.ImageOrientationPatient = whole.ImageOrientationPatient
    measures.PixelSpacing = whole.PixelSpacing
    rescale.RescaleSlope, rescale.RescaleIntercept = whole.RescaleSlope, whole.RescaleIntercept
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence = [rescale]
    whole.SharedFunctionalGroupsSequence = [shared]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(whole, keyword)
    return whole


def test_multi_frame_file_without_positions(folder: Path) -> None:
    whole = _enhanced(folder)
    del whole.PerFrameFunctionalGroupsSequence
    shutil.rmtree(folder)
    folder.mkdir()
    whole.save_as(folder / "all.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match=r"all\.dcm: a multi-frame file of 9 images"):
        load_series(folder)


# Which series


def test_two_series_in_one_folder(folder: Path) -> None:
    write_series(
        folder, VALUES[..., :4], AXIAL, series_uid=OTHER, number=7, description="Liver 5.0", names="b{}".format
    )
    message = (
        r"scan: 2 series in this folder; pick one with --series: "
        r"3 \(CT, 'Thorax 2\.5', 9 images\), 7 \(CT, 'Liver 5\.0', 4 images\)"
    )
    with pytest.raises(InputError, match=message):
        load_series(folder)
    for choice in ("7", "liver", "Liver 5.0", OTHER, f"...{OTHER[-4:]}"):
        assert load_series(folder, choice).grid.shape[2] == 4, choice
    assert load_series(folder, "thorax").grid.shape[2] == 9
    with pytest.raises(InputError, match=r"no series 'knee' in this folder; it holds 3 \(CT"):
        load_series(folder, "knee")


def test_series_that_differ_in_nothing_but_their_uid(folder: Path) -> None:
    write_series(folder, VALUES, AXIAL, series_uid=OTHER, names="b{}".format)
    with pytest.raises(InputError, match=rf"2 series fit --series 3: .*\.\.\.{OTHER[-8:]}"):
        load_series(folder, "3")


def test_localisers_and_other_objects_are_no_choice(folder: Path, tmp_path: Path) -> None:
    scout = {"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER"), "series_uid": OTHER, "number": 1}
    write_series(folder, VALUES[..., :2], AFFINES["sagittal"], names="s{}".format, **scout)
    assert load_series(folder).grid.shape == VALUES.shape
    only = write_series(tmp_path / "only", VALUES[..., :2], AXIAL, **scout)
    with pytest.raises(InputError, match=r"only: expected a series of .* in this folder, found 1 \(localiser"):
        load_series(only)


def test_localiser_within_a_series_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    scout = {"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER"), "names": "s{}".format}
    turned = write_series(folder.parent / "scout", VALUES[..., :1], AFFINES["sagittal"], **scout)
    for path in turned.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = "1.2.3.4"
        dataset.save_as(folder / path.name)
    with caplog.at_level(logging.WARNING):
        assert load_series(folder).grid.shape == VALUES.shape
    assert "1 localiser images are left out" in caplog.text


# What is no even stack


def test_missing_slice(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL, skip=[4])
    with pytest.raises(InputError, match=r"scan: 1 slice is missing between 14\.5 and 19\.5 mm .* 2\.5 mm apart"):
        load_series(folder)
    # SimpleITK would stretch the spacing and say nothing.
    several = write_series(tmp_path / "more", VALUES, AXIAL, skip=[2, 6, 7])
    with pytest.raises(InputError, match=r"3 slices are missing between 9\.5 and 14\.5, 19\.5 and 27\.0 mm"):
        load_series(several)


def test_uneven_slices(tmp_path: Path) -> None:
    def shift(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImagePositionPatient[2] += 0.7 * (k > 4) * (k - 4)

    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=shift)
    with pytest.raises(InputError, match=r"scan: .* not evenly spaced \(2\.5 to 3\.2 mm apart"):
        load_series(folder)


def test_rounded_positions_are_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def rounded(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImagePositionPatient[2] = round(dataset.ImagePositionPatient[2] + 0.05 * (k % 2), 1)

    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=rounded)
    with caplog.at_level(logging.WARNING):
        volume = load_series(folder)
    assert "slice positions are up to 0.1 mm off an even distance of 2.5 mm, and used as even" in caplog.text
    assert volume.source is not None
    assert volume.source.notes


def test_slices_shifted_sideways(tmp_path: Path) -> None:
    def shift(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImagePositionPatient[0] += 3.0 * (k == 5)

    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=shift)
    with pytest.raises(InputError, match=r"scan: slices are up to 3 mm shifted sideways"):
        load_series(folder)


def test_copies_of_files_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = sorted(folder.iterdir())[3]
    shutil.copy(path, folder / "copy")
    with caplog.at_level(logging.WARNING):
        assert load_series(folder).grid.shape == VALUES.shape
    assert "1 file is a copy of others and left out" in caplog.text


def test_files_that_share_a_uid(tmp_path: Path) -> None:
    def same(dataset: pydicom.Dataset, _: int) -> None:
        dataset.SOPInstanceUID = "1.2.3"

    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=same)
    with pytest.raises(InputError, match=r"IM0000\d: has the instance UID of an image elsewhere"):
        load_series(folder)


def test_mosaics(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL, image_type=("ORIGINAL", "PRIMARY", "M", "MOSAIC"))
    with pytest.raises(InputError, match=r"IM0000\d: a mosaic .*; convert it with dcm2niix"):
        load_series(folder)


def test_double_slices(folder: Path) -> None:
    dataset = pydicom.dcmread(sorted(folder.iterdir())[3])
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.save_as(folder / "double")
    with pytest.raises(InputError, match=r"double or missing: 1 of 9 .* 2 images instead of 1"):
        load_series(folder)


def test_mixed_orientations(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL)
    write_series(folder, VALUES[..., :4], AFFINES["sagittal"], names="s{}".format, change=_renamed)
    with pytest.raises(InputError, match=r"have 2 orientations \(9 axial, 4 sagittal\); expected parallel slices"):
        load_series(folder)


def test_mixed_sizes_and_spacings(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL)
    write_series(folder, VALUES[:20, :, :4], AXIAL, names="s{}".format, change=_renamed)
    with pytest.raises(InputError, match=r"several sizes \(9 of 20 x 24, 4 of 20 x 20\)"):
        load_series(folder)
    finer = write_series(tmp_path / "finer", VALUES, AXIAL)
    dataset = pydicom.dcmread(finer / "IM00002")
    dataset.PixelSpacing = [1.3, 0.9]
    dataset.save_as(finer / "IM00002")
    with pytest.raises(InputError, match=r"several pixel spacings \(0\.8 to 1\.3 mm\)"):
        load_series(finer)


def _renamed(dataset: pydicom.Dataset, _: int) -> None:
    dataset.SOPInstanceUID = f"{dataset.SOPInstanceUID}.77"


def _phases(folder: Path, keyword: str | None) -> Path:
    """Three volumes at the same places that differ in one element or in their image numbers alone."""
    for phase in range(3):

        def mark(dataset: pydicom.Dataset, k: int, phase: int = phase) -> None:
            dataset.SOPInstanceUID = f"{SERIES}.{phase}.{k}"
            dataset.InstanceNumber = phase * VALUES.shape[2] + k + 1
            dataset.ContentTime = "101112"
            if keyword is not None:
                setattr(dataset, keyword, [30, 4, 100][phase])

        write_series(folder, VALUES + np.int16(phase), AXIAL, names=f"p{phase}_{{}}".format, change=mark)
    return folder


def test_series_of_several_volumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _phases(tmp_path / "scan", "EchoTime")
    message = r"scan: .* 3 volumes .* EchoTime \(#1 = 4\.?0?, #2 = 30\.?0?, #3 = 100\.?0?\); .* --series '#1' to '#3'"
    with pytest.raises(InputError, match=message):
        load_series(folder)
    with caplog.at_level(logging.WARNING):
        volumes = [load_series(folder, f"3#{n}").data + 1024 for n in (1, 2, 3)]
    # In the order of the echo times.
    for volume, phase in zip(volumes, (1, 0, 2), strict=True):
        assert np.array_equal(volume, VALUES + phase)
    assert "volume 2 of 3 of the series is used (EchoTime)" in caplog.text
    with pytest.raises(InputError, match="asks for volume 4 of 3; expected 1 to 3"):
        load_series(folder, "#4")


def test_volumes_that_differ_in_image_numbers(tmp_path: Path) -> None:
    folder = _phases(tmp_path / "scan", None)
    with pytest.raises(InputError, match="3 volumes that differ in InstanceNumber"):
        load_series(folder)
    assert np.array_equal(load_series(folder, "#3").data + 1024, VALUES + 2)


def test_volume_of_a_series_that_has_one(folder: Path) -> None:
    assert load_series(folder, "#1").grid.shape == VALUES.shape
    with pytest.raises(InputError, match="asks for volume 2, but the series has one volume only"):
        load_series(folder, "#2")


# Files that cannot be used


def test_no_dicom(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; check the path"):
        load_series(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match="no DICOM file in this folder; expected the files of a series"):
        load_series(tmp_path)
    assert not is_series_folder(tmp_path)
    with pytest.raises(InputError, match=r"notes\.txt: a file; expected the folder of a DICOM series"):
        load_series(tmp_path / "notes.txt")
    (tmp_path / "a.dcm").write_text("no DICOM in here, and more than a few bytes of it")
    with pytest.raises(InputError, match=r"a\.dcm: not a DICOM file; export it again, or take it out of the folder"):
        load_series(tmp_path)
    (tmp_path / "a.dcm").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.dcm: the file is empty \(0 bytes\)"):
        load_series(tmp_path)


def test_no_image_series(tmp_path: Path) -> None:
    def report(dataset: pydicom.Dataset, _: int) -> None:
        dataset.Modality = "SR"

    folder = write_series(tmp_path / "scan", VALUES[..., :2], AXIAL, change=report)
    with pytest.raises(InputError, match="no image series in this folder, only other DICOM objects"):
        load_series(folder)

    def xray(dataset: pydicom.Dataset, _: int) -> None:
        dataset.Modality = "DX"

    folder = write_series(tmp_path / "xray", VALUES[..., :2], AXIAL, change=xray)
    with pytest.raises(InputError, match=r"expected a series .*, found 3 \(DX.*2 images\)"):
        load_series(folder)
    with pytest.raises(InputError, match=r"3 .* is no scan; expected CT, MR, PT"):
        load_series(folder, "3")


def test_single_slice(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES[..., :1], AXIAL)
    with pytest.raises(InputError, match="expected a series of at least two slices"):
        load_series(folder)
    with pytest.raises(InputError, match="the series has one slice only; expected at least two"):
        load_series(folder, "3")


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.8, 0.95])
def test_truncated_file(fraction: float, folder: Path) -> None:
    path = sorted(folder.iterdir())[4]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(InputError, match=rf"{path.name}: .*(truncated|ends before|no usable)"):
        load_series(folder)


def test_truncated_compressed_file(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=_compress(RLELossless))
    path = sorted(folder.iterdir())[4]
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=rf"{path.name}: .*truncated"):
        load_series(folder)


def test_pixels_missing(tmp_path: Path) -> None:
    def bare(dataset: pydicom.Dataset, _: int) -> None:
        del dataset.PixelData

    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=bare)
    with pytest.raises(InputError, match=r"IM0000\d: no complete pixel data"):
        load_series(folder)


@pytest.mark.parametrize(
    ("syntax", "message"),
    [
        ("1.2.840.10008.1.2.4.201", "pip install pylibjpeg-openjpeg"),
        ("1.2.840.10008.1.2.4.100", r"compressed as MPEG2.*, which no package here decodes; export the series unc"),
    ],
)
def test_unsupported_transfer_syntax(syntax: str, message: str, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=_compress(RLELossless))
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path)
    with pytest.raises(InputError, match=message):
        load_series(folder)


def test_values_that_cannot_be_used(tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"ImagePositionPatient": None}, "no usable ImagePositionPatient"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "is not two unit vectors at right angles"),
        ({"PixelSpacing": [0, 1]}, r"the pixel spacing is \[0.0, 1.0\] mm; expected two numbers above 0"),
        ({"SamplesPerPixel": 3}, "the image is in colour"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, r"a table of values \(Modality LUT\)"),
    ]
    for number, (elements, message) in enumerate(changes):

        def change(dataset: pydicom.Dataset, _: int, elements: dict[str, Any] = elements) -> None:
            for keyword, value in elements.items():
                if value is None:
                    delattr(dataset, keyword)
                else:
                    setattr(dataset, keyword, value)

        folder = write_series(tmp_path / str(number), VALUES[..., :3], AXIAL, change=change)
        with pytest.raises(InputError, match=message):
            load_series(folder)


def test_several_frames_of_reference(tmp_path: Path) -> None:
    def moved(dataset: pydicom.Dataset, k: int) -> None:
        dataset.FrameOfReferenceUID = f"{FRAME}.{k // 5}"

    folder = write_series(tmp_path / "scan", VALUES, AXIAL, change=moved)
    with pytest.raises(InputError, match="the slices are in 2 frames of reference"):
        load_series(folder)


def test_inverted_display_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def inverted(dataset: pydicom.Dataset, _: int) -> None:
        dataset.PhotometricInterpretation = "MONOCHROME1"

    with caplog.at_level(logging.WARNING):
        load_series(write_series(tmp_path / "scan", VALUES, AXIAL, change=inverted))
    assert "MONOCHROME1" in caplog.text


def test_without_pydicom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match="the extra 'dicom'"):
        dicom_files.require_dicom_extra()
    with pytest.raises(MissingExtraError, match=r"reading and writing DICOM needs the extra 'dicom'"):
        load_series(folder)


# Privacy


def test_no_identifiers_in_messages(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    series, notes = find_series(folder)
    shutil.copy(min(folder.iterdir()), folder / "copy")
    with caplog.at_level(logging.DEBUG):
        load_series(folder)
    write_series(folder, VALUES, AXIAL, series_uid=OTHER, number=4, names="b{}".format)
    with pytest.raises(InputError) as error:
        load_series(folder)
    text = f"{caplog.text} {error.value} {series} {notes}"
    for secret in (PATIENT, NAME, "Müller", STUDY, "19500101"):
        assert secret not in text


def _placed(values: Any, kind: str) -> Any:
    """Stored values in the slice order of the truth."""
    truth = grid_of(values, AFFINES[kind])
    turned = not np.allclose(truth.affine, AFFINES[kind])
    return values[:, :, ::-1].astype(int) if turned else values.astype(int)
