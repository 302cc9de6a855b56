"""One DICOM file: recognise it, read its header, decode its pixels.

Warnings of pydicom (overlong values, unknown characters) are silenced; what matters is checked here and in `stack`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import AtlasSegError, InputError
from ..core.extras import require

if TYPE_CHECKING:
    from pydicom import Dataset

#: Files in the form of DICOM part 10 have "DICM" behind 128 bytes.
_PREAMBLE_BYTES = 128
#: High-throughput JPEG 2000 is decoded by no package of the extra.
_HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")
_UNDEFINED_LENGTH = 0xFFFFFFFF
_PIXEL_DATA = 0x7FE00010
_DAMAGED = "the file is truncated or damaged; copy or export it again"


def require_dicom_extra() -> None:
    """Raise MissingExtraError if pydicom is not installed."""
    require("reading and writing DICOM", "dicom", "pydicom")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence warnings of pydicom and highdicom."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)(\..*)?")
        yield


@contextmanager
def element_errors(path: Path) -> Iterator[None]:
    """Raise what elements of a damaged or invalid file raise on use as InputError, and silence warnings on them."""
    try:
        with no_warnings(), np.errstate(all="ignore"):
            yield
    except AtlasSegError:
        raise
    except Exception:  # noqa: BLE001  (pydicom converts values on access, to whatever they hold)
        raise InputError(f"{path}: an element of the header has a value that cannot be used; export it again") from None


def is_dicom(path: Path) -> bool:
    """Check whether a file begins as DICOM files do: with the preamble, or directly with group 0008."""
    try:
        with path.open("rb") as file:
            start = file.read(_PREAMBLE_BYTES + 4)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the permissions") from None
    if start[_PREAMBLE_BYTES:] == b"DICM":
        return True
    # Files of scanners older than part 10 begin with an element of this group.
    return len(start) >= 8 and start[:2] == b"\x08\x00" and int.from_bytes(start[2:4], "little") <= 0x0018


def read_header(path: Path, keywords: Sequence[str] | None = None) -> Dataset:
    """Read all elements but the pixels, or only those named; raise InputError if the file is damaged."""
    return read_dataset(path, stop_before_pixels=True, specific_tags=None if keywords is None else list(keywords))


def read_dataset(path: Path, **options: Any) -> Dataset:
    """Read a file, with options of pydicom; raise InputError if it is no DICOM file or damaged."""
    require_dicom_extra()
    import pydicom
    from pydicom.uid import ImplicitVRLittleEndian

    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if not is_dicom(path):
        what = "not a DICOM file" if path.stat().st_size else "the file is empty (0 bytes)"
        raise InputError(f"{path}: {what}; export it again, or take it out of the folder")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = pydicom.dcmread(path, force=True, **options)
    except Exception:  # noqa: BLE001  (pydicom raises a dozen kinds on damaged files)
        raise InputError(f"{path}: {_DAMAGED}") from None
    # pydicom returns the readable part of a truncated file: contours would be missing silently.
    if any("end of file" in str(one.message).lower() for one in caught) or _ends_early(dataset):
        raise InputError(f"{path}: {_DAMAGED}")
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # the default of the standard
    return dataset


def _ends_early(dataset: Dataset) -> bool:
    """Whether the last element has fewer bytes than it says; pixels are checked by their image size instead."""
    from pydicom.dataelem import RawDataElement

    last: Any = dataset.get_item(max(dataset.keys())) if len(dataset) else None
    if not isinstance(last, RawDataElement) or last.value is None or last.length == _UNDEFINED_LENGTH:
        return False
    return bool(last.tag != _PIXEL_DATA and len(last.value) < last.length)


def decode_pixels(dataset: Dataset, path: Path) -> NDArray[Any]:
    """Decode the pixels of a whole file to stored values, (frames, rows, columns), not rescaled.

    InputError if pixels are missing, in colour or cannot be decoded; the message names the package that decodes them.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    check_one_sample(dataset, path)
    if "PixelData" not in dataset:
        raise InputError(f"{path}: no complete pixel data: truncated, or exported without its image; export it again")
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    frames, rows, columns = frame_count(dataset), int(dataset.Rows), int(dataset.Columns)
    if not syntax.is_encapsulated:
        expected = (frames * rows * columns * int(dataset.BitsAllocated) + 7) // 8
        if len(dataset.PixelData) < expected:
            raise InputError(f"{path}: {len(dataset.PixelData)} of {expected} bytes of pixels are there: {_DAMAGED}")
    name = syntax.name if syntax.name != str(syntax) else f"transfer syntax {syntax}"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        found = f"{path}: the pixels are compressed as {name}"
        raise InputError(f"{found}, which no package here decodes; export the series uncompressed") from None
    if not decoder.is_available:
        package = "pylibjpeg-openjpeg" if syntax in _HTJ2K else "python-gdcm"
        raise InputError(f"{path}: the pixels are compressed as {name}; to decode them: pip install {package}")
    try:
        with no_warnings():
            pixels = np.asarray(dataset.pixel_array)
    except Exception:  # noqa: BLE001  (each decoder raises kinds of its own)
        raise InputError(f"{path}: the pixels ({name}) cannot be decoded: {_DAMAGED}") from None
    return pixels.reshape(frames, rows, columns)


def check_one_sample(dataset: Dataset, path: Path) -> None:
    """Refuse images in colour."""
    if int(value_of(dataset, "SamplesPerPixel") or 1) != 1:
        raise InputError(f"{path}: the image is in colour; expected one value a pixel: give the series of the scan")


def frame_count(dataset: Dataset) -> int:
    """Count the frames of a file; one where it does not say."""
    count = numbers_of(dataset, "NumberOfFrames", 1)
    return 1 if count is None else max(int(count[0]), 1)


def value_of(dataset: Dataset, keyword: str) -> Any:
    """Get the value of an element; None where it is missing, empty or unreadable."""
    try:
        with no_warnings():
            value = dataset.get(keyword)
    except Exception:  # noqa: BLE001  (values are converted on access, and pydicom raises what it meets)
        return None
    return None if value is None or value == "" else value


def items_of(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Get the items of a sequence; none where it is missing."""
    return list(value_of(dataset, keyword) or ())


def text_of(dataset: Dataset, keyword: str) -> str:
    """Get the value of an element as text, empty where there is none."""
    value = value_of(dataset, keyword)
    return "" if value is None else str(value).strip()


def numbers_of(dataset: Dataset, keyword: str, count: int) -> NDArray[np.float64] | None:
    """Get (count,) finite numbers of an element; None where there are not exactly as many."""
    value = value_of(dataset, keyword)
    if value is None:
        return None
    try:
        numbers = np.array([float(n) for n in np.atleast_1d(value)])
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None


def group_numbers(groups: Sequence[Dataset], sequence: str, keyword: str, count: int = 1) -> NDArray[np.float64] | None:
    """Get (count,) numbers of a functional group, from the last of the groups that has them.

    The groups of a frame are the header, the shared and its own one; each is searched in its sequence, then directly.
    """
    for group in reversed(groups):
        for dataset in (*items_of(group, sequence)[:1], group):
            if (numbers := numbers_of(dataset, keyword, count)) is not None:
                return numbers
    return None
