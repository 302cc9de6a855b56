"""Seeded random damage to scans, label maps, DICOM series and structures."""

from __future__ import annotations

import gzip
import io
import math
import shutil
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from atlassegfm.core.geometry import Grid
from atlassegfm.core.image import load_volume, save_volume
from atlassegfm.dicom import Provenance, load_series, series_of, write_rtstruct, write_segmentation
from dicom_series import write_series
from scenes import ATLAS, QUERY, STRUCTURES, straight_grid

SHAPE = (18, 16, 14)
GRID = straight_grid(SHAPE, (5.0, 5.0, 6.0))
FLOATS = (0, -1, math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-30, 1e-3, 1e3, -2.5, 4e9, 0.5, 3e38)
INTEGERS = (-32768, -2, -1, 0, 1, 2, 3, 4, 5, 8, 16, 64, 255, 512, 1007, 2304, 4096, 32767)
TEXTS = ("", "0", "-1", "nan", "inf", "1e30", "1e-30", "99999999999", "3.5", "x", "é", "1 2 3", "(0,0,0)", "\0", "none")
DICOM_TEXTS = (*TEXTS, "1\\2", "nan\\nan\\nan", "1e30\\0\\0", "0\\0", "0\\0\\0\\0\\0\\0", "-5\\5", "9" * 80, "1\\" * 40)
SUFFIXES = (*(3 * [".nii.gz"]), *(2 * [".nii"]), ".img", ".hdr", *(2 * [".nrrd"]), *(2 * [".mha"]), ".mgz", ".mgh")
KINDS = (*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float32", "float64", "complex64")
SHAPES = ((1, 16, 14), (18, 1, 14), (18, 16, 1), (2, 2, 2), (1, 1, 1), (18, 16), (18, 16, 7, 2), (18, 16, 14, 1))
#: Offset and type of the fields of a NIfTI-1 (and, up to the scale, Analyze) header, and of an MGH header.
NIFTI = {
    **{f"dim{n}": (40 + 2 * n, "h") for n in range(8)},
    **{f"pixdim{n}": (76 + 4 * n, "f") for n in range(5)},
    **{name: (at, "h") for name, at in (("intent", 68), ("datatype", 70), ("bitpix", 72), ("magic", 344))},
    **{name: (at, "h") for name, at in (("qform_code", 252), ("sform_code", 254))},
    **{name: (at, "b") for name, at in (("dim_info", 39), ("units", 123))},
    **{name: (at, "i") for name, at in (("sizeof_hdr", 0), ("extension", 348), ("extension_size", 352))},
    **{name: (at, "f") for name, at in (("offset", 108), ("slope", 112), ("inter", 116))},
    **{f"quatern{n}": (256 + 4 * n, "f") for n in range(6)},
    **{f"srow{n}": (280 + 4 * n, "f") for n in range(12)},
}
MGH = {
    **{name: (4 * n, ">i") for n, name in enumerate(("version", "i", "j", "k", "frames", "type", "dof"))},
    "good_ras": (28, ">h"),
    **{f"geometry{n}": (30 + 4 * n, ">f") for n in range(15)},
}


@dataclass
class Damaged:
    """Damaged input: a scan, a label map (image, RTSTRUCT, DICOM-SEG) or a folder of slices."""

    path: Path
    is_labels: bool
    story: list[str] = field(default_factory=list)
    #: The series that structures lie on.
    series: Path | None = None

    @property
    def names(self) -> set[str]:
        """Names of which a refusal has one."""
        found = {self.path.name, *([self.series.name] if self.series else [])}
        if self.path.is_dir():
            found |= {file.name for file in self.path.iterdir()}
        if self.path.suffix in (".img", ".hdr"):
            found |= {self.path.with_suffix(suffix).name for suffix in (".img", ".hdr")}
        return found


def make_base(folder: Path) -> Path:
    """Sound files, of which each seed damages one."""
    folder.mkdir(parents=True)
    save_volume(ATLAS.scan(GRID), folder / "atlas.nii.gz")
    save_volume(ATLAS.labels(GRID), folder / "labels.nii.gz", structures=STRUCTURES)
    save_volume(QUERY.scan(GRID), folder / "query.nii.gz")
    lps = Grid(SHAPE, np.diag([-1.0, -1, 1, 1]) @ GRID.affine)
    write_series(folder / "series", ATLAS.scan(lps).data.astype(np.int16), lps.affine, intercept=0)
    volume = load_series(folder / "series")
    series = series_of(volume)
    assert series is not None
    labels = ATLAS.labels(volume.grid)
    write_rtstruct(folder / "structures.dcm", labels, STRUCTURES, series, Provenance("none"))
    write_segmentation(folder / "segments.dcm", labels, STRUCTURES, series, Provenance("none"))
    return folder


# Damage


def damage(base: Path, folder: Path, seed: int) -> Damaged:
    """Put damaged input into ``folder``, always the same for a seed."""
    random = Random(seed)
    kind = random.choices(("scan", "labels", "series", "structures", "segments"), (35, 22, 20, 16, 7))[0]
    if kind in ("scan", "labels"):
        return _image(base, folder, kind == "labels", random)
    if kind == "series":
        damaged = Damaged(folder / "slices", False)
        shutil.copytree(base / "series", damaged.path)
        for _ in range(random.choice((1, 1, 2))):
            damaged.story.append(_slices(damaged.path, random))
        return damaged
    damaged = Damaged(folder / f"{kind}.dcm", True, [], base / "series")
    shutil.copy(base / damaged.path.name, damaged.path)
    for _ in range(random.choice((1, 1, 3))):
        damaged.story.append(_contours(damaged.path, random) if kind == "structures" else "")
        if not damaged.story[-1]:
            damaged.story[-1] = _object(damaged.path, random)
        if "bytes" in damaged.story[-1]:
            break
    return damaged


def _image(base: Path, folder: Path, is_labels: bool, random: Random) -> Damaged:
    suffix, story = random.choice(SUFFIXES), []
    volume = load_volume(base / ("labels.nii.gz" if is_labels else "query.nii.gz"))
    data = volume.data
    if random.random() < 0.4:
        data, what = _voxels(data, random)
        story.append(what)
    damaged = Damaged(folder / f"patient{suffix}", is_labels, story)
    _write(data, volume.grid.affine, damaged.path, random.random() < 0.2, story)
    if random.random() < 0.75 or not story:
        story += [_file(damaged.path, random) for _ in range(random.choice((1, 1, 1, 2, 4)))]
    return damaged


def _voxels(data: Any, random: Random) -> tuple[Any, str]:
    what = random.choice(("kind", "nan", "mostly nan", "all nan", "infinite", "constant", "huge", "moved", "shape"))
    some = np.random.default_rng(random.getrandbits(32)).random(data.shape)
    data = data.astype(np.float64)
    if what == "kind":
        kind = random.choice(KINDS)
        with np.errstate(invalid="ignore"):
            return data.astype(kind), f"voxels of {kind}"
    if what == "constant":
        data[...] = random.choice((0, 1, -5, 1e30))
    elif what == "huge":
        data *= random.choice((1e36, 1e300, 1e-40, 1e7))
    elif what == "moved":
        data += random.choice((-3, 0.004, 0.3 * some, -1024, 70000))
    elif what == "shape":
        shape = random.choice(SHAPES)
        return np.resize(data, shape).astype(np.float32), f"shape {shape}"
    else:
        data[some < {"nan": 0.01, "mostly nan": 0.7, "all nan": 2, "infinite": 0.02}[what]] = (
            math.nan if "nan" in what else random.choice((math.inf, -math.inf))
        )
    return data.astype(random.choice((np.float32, np.float64))), f"voxels {what}"


def _write(data: Any, affine: Any, path: Path, big_endian: bool, story: list[str]) -> None:
    """Write voxels as they are, if the format has their type."""
    try:
        if path.suffix in (".nrrd", ".mha"):
            image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
            image.SetSpacing([5.0, 5.0, 6.0, 1.0][: image.GetDimension()])
            sitk.WriteImage(image, str(path), useCompression=big_endian)
            return
        kinds: dict[str, Any] = {".mgz": nib.MGHImage, ".mgh": nib.MGHImage}
        kind = kinds.get(path.suffix, nib.Nifti2Image if path.suffix == ".nii" and big_endian else nib.Nifti1Image)
        if path.suffix in (".img", ".hdr"):
            kind = nib.Spm2AnalyzeImage if big_endian else nib.Nifti1Pair
        header = kind.header_class(endianness=">") if big_endian and kind is nib.Nifti1Image else None
        image = kind(data, affine, header, dtype=data.dtype) if kind is not nib.MGHImage else kind(data, affine)
        nib.save(image, path)
        story.append(f"{kind.__name__}{', big endian' if header is not None else ''}")
    except Exception as error:  # each library refuses other types and shapes
        if data.dtype == np.float32 and data.shape == SHAPE:
            raise
        story.append(f"written as float32, as {error!r:.60}")
        _write(np.resize(np.real(data), SHAPE).astype(np.float32), affine, path, big_endian, story)


def _file(path: Path, random: Random) -> str:
    """Damage a file's header or bytes."""
    name, zipped = path.suffix, path.suffix in (".gz", ".mgz")
    if name in (".img", ".hdr") and random.random() < 0.3:
        return _pair(path, random)
    if zipped and random.random() < 0.2:
        return _bytes(path, random, "compressed ")
    header = path.with_suffix(".hdr") if name == ".img" else path
    if random.random() < 0.25:
        target = random.choice((path, header))
        return _bytes(target, random) if not zipped else _zipped(target, lambda file: _bytes(file, random))
    if name in (".nrrd", ".mha"):
        return _text_header(path, random)
    fields = MGH if name in (".mgz", ".mgh") else NIFTI
    return _zipped(path, lambda file: _field(file, fields, random)) if zipped else _field(header, fields, random)


def _zipped(path: Path, change: Any) -> str:
    """Change what a compressed file holds."""
    try:
        path.write_bytes(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, Exception):  # noqa: BLE001  (damaged before)
        return "left alone"
    story = change(path)
    path.write_bytes(gzip.compress(path.read_bytes(), 1, mtime=0))
    return str(story)


def _field(path: Path, fields: dict[str, tuple[int, str]], random: Random) -> str:
    name = random.choice(list(fields))
    at, kind = fields[name]
    content, order = bytearray(path.read_bytes() if path.is_file() else b""), kind[0] if len(kind) > 1 else "<"
    if len(content) < at + 8:
        return "left alone"
    value = random.choice(FLOATS if kind[-1] == "f" else INTEGERS)
    if kind[-1] == "b":
        value = value % 128
    struct.pack_into(order + kind[-1], content, at, value)
    path.write_bytes(content)
    return f"{name} = {value}"


def _text_header(path: Path, random: Random) -> str:
    """Damage a line of the header of an NRRD or MetaImage file."""
    content = path.read_bytes()
    end = content.find(b"\n\n") if path.suffix == ".nrrd" else content.find(b"ElementDataFile = LOCAL")
    lines = content[: max(end, 0)].split(b"\n")
    n = random.randrange(len(lines))
    before = lines[n]
    how = random.choice(("removed", "doubled", "value", "word", "word", "swapped"))
    if how == "removed":
        del lines[n]
    elif how == "doubled":
        lines.insert(n, before)
    elif how == "swapped":
        m = random.randrange(len(lines))
        lines[n], lines[m] = lines[m], lines[n]
    else:
        mark = b":" if path.suffix == ".nrrd" else b"="
        key, _, value = before.partition(mark)
        words = value.split(b" ") if how == "word" else [b" ", value]
        words[random.randrange(1, len(words)) if len(words) > 1 else 0] = random.choice(TEXTS).encode()
        lines[n] = key + mark + b" ".join(words)
    path.write_bytes(b"\n".join(lines) + content[max(end, 0) :])
    return f"{before!r} {how}: {b''.join(lines[n : n + 1])!r}"


def _pair(path: Path, random: Random) -> str:
    """Damage that needs two files."""
    other = path.with_suffix(".hdr" if path.suffix == ".img" else ".img")
    how = random.choice(("missing", "empty", "mat", "swapped", "other"))
    if how == "missing":
        other.unlink(missing_ok=True)
    elif how == "empty":
        other.write_bytes(b"")
    elif how == "mat":
        path.with_suffix(".mat").write_bytes(random.randbytes(random.choice((0, 10, 400))))
    elif other.is_file():
        one, another = path.read_bytes(), other.read_bytes()
        path.write_bytes(another)
        if how == "swapped":
            other.write_bytes(one)
    return f"{other.name} {how}"


def _bytes(path: Path, random: Random, what: str = "") -> str:
    content = bytearray(path.read_bytes() if path.is_file() else b"")
    how = random.choice(("cut", "cut", "bytes", "bytes", "first bytes", "emptied", "longer", "noise", "shifted"))
    if how == "cut":
        del content[random.randrange(len(content) + 1) :]
    elif how in ("bytes", "first bytes"):
        for _ in range(random.choice((1, 3, 30))):
            if content:
                content[random.randrange(min(len(content), 400) if "first" in how else len(content))] = (
                    random.randrange(256)
                )
    elif how == "emptied":
        content = bytearray()
    elif how == "longer":
        content += random.randbytes(random.choice((1, 100, 5000)))
    elif how == "noise":
        content = bytearray(random.randbytes(len(content)))
    else:
        content = content[random.choice((1, 4, 200)) :]
    path.write_bytes(content)
    return f"{what}{path.suffix} bytes {how}"


def _slices(folder: Path, random: Random) -> str:
    """Damage a series: elements of one slice or all of them, or whole files."""
    files = sorted(folder.iterdir())
    if not files:
        return "left alone"
    file = random.choice(files)
    how = random.choice((*(6 * ["element"]), "bytes", "missing", "most missing", "copied", "again", "foreign", "other"))
    if how == "element":
        keyword, action = random.choice(SLICE_TAGS), random.choice(("removed", "emptied", "text", "text", "doubled"))
        text = random.choice(DICOM_TEXTS)
        for one in files if random.random() < 0.5 else [file]:
            _element(one, keyword, action, text)
        return f"{keyword} {action} {text!r}"
    if how == "bytes":
        return _bytes(file, random)
    if how == "missing":
        file.unlink()
    elif how == "most missing":
        for one in files[random.choice((0, 1, 2, 3)) :]:
            one.unlink()
    elif how == "copied":
        shutil.copy(file, folder / "copy.dcm")
    elif how == "again":
        shutil.copy(file, folder / "again.dcm")
        _element(folder / "again.dcm", "SOPInstanceUID", "text", "1.2.3.4.5")
    elif how == "foreign":
        (folder / random.choice(("notes.txt", "x.dcm", "IM1", ".hidden"))).write_bytes(random.randbytes(300))
    else:
        shutil.copy(random.choice(sorted(folder.glob("*"))), folder / "scan.nii.gz")
    return f"{file.name} {how}"


SLICE_TAGS = (
    *("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "StudyInstanceUID", "PatientID", "Modality"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation"),
    *("RescaleSlope", "RescaleIntercept", "InstanceNumber", "SeriesNumber", "ImageType", "PixelData", "SOPClassUID"),
    *("NumberOfFrames", "SpecificCharacterSet", "AcquisitionTime", "TemporalPositionIdentifier", "SeriesDescription"),
)


def _element(path: Path, keyword: str, action: str, text: str) -> None:
    try:
        dataset = pydicom.dcmread(path, force=True)
        _change(dataset, Tag(tag_for_keyword(keyword)), action, text)
        _save(dataset, path)
    except Exception:  # noqa: BLE001  (damaged before)
        return


def _change(dataset: pydicom.Dataset, tag: Any, action: str, text: str) -> None:
    """Remove, empty, double or rewrite an element, whatever its type allows."""
    if action == "removed":
        dataset.pop(tag, None)
        return
    kind = dictionary_VR(tag).split(" ")[0]
    value = text.encode("utf-8")
    if action == "emptied":
        value = b""
    elif action == "doubled" and tag in dataset:
        whole = dataset[tag].value
        parts = whole if isinstance(whole, pydicom.multival.MultiValue) else [whole]
        value = "\\".join(map(str, [*parts, *parts])).encode("utf-8", "replace")
        if isinstance(whole, bytes):
            value = whole + whole
        elif kind == "US":
            value = b"".join(struct.pack("<H", int(one)) for one in [*parts, *parts])
    elif kind == "US":
        value = struct.pack("<H", len(text) * 1000 % 65536)
    elif kind == "SQ":
        dataset[tag].value = []
        return
    value += b" " * (len(value) % 2)
    dataset[tag] = RawDataElement(tag, kind, len(value), value, 0, dataset.original_encoding[0] or False, True)


def _save(dataset: pydicom.Dataset, path: Path) -> None:
    """Write a dataset, if pydicom can."""
    content = io.BytesIO()
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        dataset.save_as(content)
        path.write_bytes(content.getvalue())


def _object(path: Path, random: Random) -> str:
    """Damage any element of an RTSTRUCT or DICOM-SEG, or its bytes."""
    if random.random() < 0.15:
        return _bytes(path, random)
    dataset = pydicom.dcmread(path, force=True)
    found = list(_elements(dataset))
    if not found:
        return "left alone"
    # Sequences of contours and frames have most elements: each keyword is as likely as another.
    tag = random.choice(sorted({tag for _, tag in found}))
    holders = [holder for holder, one in found if one == tag]
    action, text = random.choice(("removed", "emptied", "text", "doubled", "items")), random.choice(DICOM_TEXTS)
    for holder in holders if random.random() < 0.3 else [random.choice(holders)]:
        element = holder[tag]
        if element.VR == "SQ" and action in ("doubled", "items", "text"):
            items = list(element.value)
            element.value = items + items if action == "doubled" else random.sample(items, len(items) // 2)
        else:
            _change(holder, tag, "text" if action == "items" else action, text)
    _save(dataset, path)
    return f"{pydicom.datadict.keyword_for_tag(tag)} {action} {text!r}"


def _elements(dataset: pydicom.Dataset) -> Iterator[tuple[pydicom.Dataset, Any]]:
    for element in dataset:
        yield dataset, element.tag
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item)


def _contours(path: Path, random: Random) -> str:
    """Damage the points of some contours; empty where something else is to be damaged."""
    how = random.choice(("odd", "nan", "out of plane", "few", "far", "type", "empty", "text", "oblique", "", "", ""))
    try:
        dataset = pydicom.dcmread(path, force=True)
        found = [c for roi in dataset.ROIContourSequence for c in roi.get("ContourSequence", ())]
    except Exception:  # noqa: BLE001  (damaged before)
        return ""
    if not how or not found:
        return ""
    for contour in found if random.random() < 0.3 else random.sample(found, 1 + len(found) // 10):
        try:
            points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
        except (AttributeError, TypeError, ValueError):  # damaged before
            continue
        if how == "out of plane":
            points[:, 2] += random.uniform(-20, 20)
        elif how == "oblique":
            points[:, 2] += points[:, 0]
        elif how == "far":
            points[:, random.randrange(3)] += random.choice((-1e3, 30, 1e9, 1e300))
        elif how == "few":
            points = points[: random.randrange(4)]
        numbers = [f"{n:.4g}" for n in points.ravel()]
        if how == "odd":
            numbers = numbers[:-1]
        elif how in ("nan", "text"):
            numbers[random.randrange(len(numbers))] = random.choice(("nan", "inf", "1e400") if how == "nan" else TEXTS)
        elif how == "empty":
            numbers = []
        elif how == "type":
            contour.ContourGeometricType = random.choice(("POINT", "OPEN_PLANAR", "", "x"))
        _change(contour, Tag("ContourData"), "text", "\\".join(numbers))
    _save(dataset, path)
    return f"contours {how}"
