"""Single DICOM files: what is one, how its header is read, how its pixels are decoded.

What pydicom warns of (values longer than the standard allows, unknown characters) does not concern the user of a
scan; what matters of it is checked here and in the modules above.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from pydicom import Dataset

#: LPS, as DICOM has it, to RAS+ and back.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: A file in the form of DICOM part 10 has "DICM" behind 128 bytes.
_PREAMBLE_BYTES = 128
#: High-throughput JPEG 2000 is in none of the packages of the extra.
_PACKAGE_OF_SYNTAX = {
    "1.2.840.10008.1.2.4.201": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg-openjpeg",
}
_UNDEFINED_LENGTH = 0xFFFFFFFF
#: Its length is compared with the size of the image, which makes a better message.
_PIXEL_DATA = 0x7FE00010
_GDCM = "python-gdcm"
_DAMAGED = "the file is truncated or damaged; copy or export it again"


def require_dicom_extra() -> None:
    """Check that DICOM files can be read.

    Raises
    ------
    MissingExtraError
        If pydicom is not installed.
    """
    try:
        import pydicom  # noqa: F401  (asked for only)
    except ImportError:
        raise MissingExtraError("reading and writing DICOM", "dicom") from None


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keep what pydicom and highdicom warn of from the user's screen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)(\..*)?")
        yield


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do: with the preamble, or without it right with group 0008.

    Raises
    ------
    InputError
        If it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_PREAMBLE_BYTES + 4)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the permissions") from None
    if start[_PREAMBLE_BYTES:] == b"DICM":
        return True
    if len(start) < 8:
        return False
    group, element = struct.unpack("<HH", start[:4])
    return bool(group == 0x0008 and element <= 0x0018)  # as files of scanners older than part 10 begin


def read_header(path: Path, keywords: Sequence[str] | None = None) -> Dataset:
    """Read everything but the pixels, or only the elements of these names.

    Raises
    ------
    InputError
        If the file is no DICOM file or damaged.
    """
    return _read(path, stop_before_pixels=True, specific_tags=None if keywords is None else list(keywords))


def read_dataset(path: Path) -> Dataset:
    """Read a whole file.

    Raises
    ------
    InputError
        As :func:`read_header`.
    """
    return _read(path)


def _read(path: Path, **options: Any) -> Dataset:
    require_dicom_extra()
    import pydicom
    from pydicom.uid import ImplicitVRLittleEndian

    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if not is_dicom(path):
        empty = path.stat().st_size == 0
        what = "the file is empty (0 bytes)" if empty else "not a DICOM file"
        raise InputError(f"{path}: {what}; export it again, or take it out of the folder")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            dataset = pydicom.dcmread(path, force=True, **options)
    except Exception:  # noqa: BLE001  (pydicom raises a dozen kinds on damaged files)
        raise InputError(f"{path}: {_DAMAGED}") from None
    # Where a file ends too early pydicom gives what there is: contours would be missing in silence.
    if any("end of file" in str(one.message).lower() for one in told) or _ends_early(dataset):
        raise InputError(f"{path}: {_DAMAGED}")
    if "TransferSyntaxUID" not in dataset.file_meta:
        # Part 10 wants it; without one only the default of the standard can be meant.
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def _ends_early(dataset: Dataset) -> bool:
    """Whether the last element has fewer bytes than it says."""
    from pydicom.dataelem import RawDataElement

    last: Any = dataset.get_item(max(dataset.keys())) if len(dataset) else None
    if not isinstance(last, RawDataElement) or last.value is None or last.length == _UNDEFINED_LENGTH:
        return False
    return bool(last.tag != _PIXEL_DATA and len(last.value) < last.length)


def decode_pixels(dataset: Dataset, path: Path) -> NDArray[Any]:
    """Decode the pixels of a file: stored values, no rescaling.

    Parameters
    ----------
    dataset : Dataset
        A whole file.
    path : Path
        Where it came from.

    Returns
    -------
    array, (frames, rows, columns)

    Raises
    ------
    InputError
        If there are no pixels, fewer than the header says, or they cannot be decoded: then the message names the
        package that can.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    if int(value_of(dataset, "SamplesPerPixel") or 1) != 1:
        raise InputError(f"{path}: the image is in colour; expected one value a pixel: give the series of the scan")
    if "PixelData" not in dataset:
        raise InputError(
            f"{path}: there is no complete pixel data: the file is truncated or was exported without its image; "
            "export it again"
        )
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    frames, rows, columns = int(value_of(dataset, "NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns)
    if not syntax.is_encapsulated:
        bits = int(dataset.BitsAllocated)
        expected = (frames * rows * columns * bits + 7) // 8
        if len(dataset.PixelData) < expected:
            raise InputError(f"{path}: {len(dataset.PixelData)} of {expected} bytes of pixels are there: {_DAMAGED}")
    name = syntax.name if syntax.name != str(syntax) else f"transfer syntax {syntax}"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise InputError(
            f"{path}: the pixels are compressed as {name}, which no package here decodes; "
            "export the series uncompressed"
        ) from None
    if not decoder.is_available:
        package = _PACKAGE_OF_SYNTAX.get(str(syntax), _GDCM)
        raise InputError(
            f"{path}: the pixels are compressed as {name}, which needs the package {package}; "
            f"install it with: pip install {package}"
        )
    try:
        with no_warnings():
            pixels = np.asarray(dataset.pixel_array)
    except Exception:  # noqa: BLE001  (each decoder raises kinds of its own)
        raise InputError(f"{path}: the pixels ({name}) cannot be decoded: {_DAMAGED}") from None
    return pixels.reshape(frames, rows, columns)


def value_of(dataset: Dataset, keyword: str) -> Any:
    """The value of an element, None where it is missing, empty or not to be read."""
    try:
        with no_warnings():
            value = dataset.get(keyword)
    except Exception:  # noqa: BLE001  (values are converted on access, and pydicom raises what it meets)
        return None
    return None if value is None or value == "" else value


def text_of(dataset: Dataset, keyword: str) -> str:
    """The value of an element as text, empty where there is none."""
    value = value_of(dataset, keyword)
    return "" if value is None else str(value).strip()


def numbers_of(dataset: Dataset, keyword: str, count: int) -> NDArray[np.float64] | None:
    """(count,) finite numbers of an element, None where there are not exactly so many."""
    value = value_of(dataset, keyword)
    if value is None:
        return None
    try:
        numbers = np.atleast_1d(np.asarray([float(n) for n in np.atleast_1d(value)], dtype=np.float64))
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None
