"""Scans and label maps: the voxels, where they are, and how they get in and out of files.

NIfTI is read by nibabel, because SimpleITK refuses sheared and rounded sforms; NRRD and MetaImage are read
by SimpleITK. Their LPS frame is turned to RAS+ here and nowhere else.

Which NIfTI geometry counts, in the order of the NIfTI-1 standard: the sform if its code is above 0, else
the qform if its code is above 0, else the bare spacing (with a note). Where both codes are above 0 and the
two differ by more than a tenth of a voxel, the sform counts and a note says by how much they differ.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .files import PathLike, atomic_path, check_readable
from .geometry import LPS_FLIP, Grid, box_corners
from .labels import LabelEntry, Structure, from_nifti_xml, from_slicer_metadata, to_nifti_xml, to_slicer_metadata

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header


logger = logging.getLogger(__name__)

#: nibabel tells of its repairs to headers here; what matters of them is checked and said by this module.
_repairs = logging.getLogger(f"{__name__}.repairs")


_repairs.setLevel(logging.CRITICAL + 1)

NIFTI_SUFFIXES = (".nii.gz", ".nii")

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")

IMAGE_SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES

#: Comment code of the NIfTI header extension that Connectome Workbench keeps label names in.
_NIFTI_ECODE_CARET = 30

#: NIfTI intent code "label": tells viewers that the values are names, not amounts.
_NIFTI_INTENT_LABEL = 1002

#: Where a NIfTI header keeps its geometry, next to shape, unit and pixdim.
_NIFTI_GEOMETRY_FIELDS = (
    *("dim_info", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True, eq=False)
class Source:
    """Where a volume came from.

    Parameters
    ----------
    path : Path
        The file it was read from.
    nifti_header : nibabel header or None
        The file's header as stored, so that results get the same geometry fields; None for other formats.
    label_table : mapping of int to LabelEntry
        Names of label values, where the header holds any.
    notes : tuple of str
        What a user should know about the file's geometry, in words.
    """

    path: Path
    nifti_header: Nifti1Header | None = None
    label_table: Mapping[int, LabelEntry] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """A 3-D array of voxels and where they are.

    Parameters
    ----------
    data : array, (I, J, K)
        Intensities or label values.
    grid : Grid
        Of the same shape.
    source : Source or None
        The file it was read from, if any.
    """

    data: NDArray[Any]
    grid: Grid
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.data.shape != self.grid.shape:
            raise ValueError(f"data of shape {self.data.shape} on a grid of shape {self.grid.shape}")

    def __repr__(self) -> str:
        """Shape, spacing, orientation and type, such as ``Volume(256x256x34, 1.25x1.25x7.70 mm, RAS, float32)``."""
        return f"Volume({self.grid.summary}, {self.data.dtype})"

    def canonical(self) -> Volume:
        """The same voxels, axes permuted and flipped to point closest to R, A, S (a view, no resampling)."""
        return self.turned_to(self.grid.canonical())

    def turned_to(self, grid: Grid) -> Volume:
        """The same voxels in the array order of ``grid`` (a view, no resampling).

        Raises
        ------
        ValueError
            If ``grid`` does not have the same voxels as this volume's grid.
        """
        from nibabel.orientations import apply_orientation

        orientation = self.grid.axes_relative_to(grid)
        if orientation is None:
            raise ValueError("the grids do not share their voxels")
        return Volume(apply_orientation(self.data, orientation), grid, self.source)


def image_suffix(path: Path) -> str | None:
    """The ending of a file name that names a format this package reads (".nii.gz", ...), or None."""
    name = path.name.lower()
    return next((suffix for suffix in IMAGE_SUFFIXES if name.endswith(suffix)), None)


def image_stem(path: Path) -> str:
    """The file name without its image ending: the name results of this scan go by."""
    suffix = image_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def load_volume(path: PathLike) -> Volume:
    """Read a 3-D volume with its stored values (scaling of the header applied) and its geometry.

    Parameters
    ----------
    path : path
        A file ending in one of :data:`IMAGE_SUFFIXES`.

    Raises
    ------
    InputError
        If the file is missing, damaged, not an image, not 3-D or has no usable geometry.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    suffix = image_suffix(path)
    if path.is_dir() or suffix is None:
        what = "a folder" if path.is_dir() else "not a known image file"
        raise InputError(f"{path}: {what}; expected a file ending in {', '.join(IMAGE_SUFFIXES)}")
    check_readable(path)
    volume = _load_nifti(path) if suffix in NIFTI_SUFFIXES else _load_itk(path)
    for note in volume.source.notes if volume.source else ():
        logger.warning("%s: %s", path, note)
    return volume


def load_image(path: PathLike) -> Volume:
    """Read a scan as float32 intensities.

    Raises
    ------
    InputError
        As :func:`load_volume`, and if there are NaN or infinite voxels or all voxels are equal.
    """
    return checked_image(load_volume(path), Path(path))


def checked_image(volume: Volume, path: Path) -> Volume:
    """A volume that was read from ``path`` as float32 intensities.

    Raises
    ------
    InputError
        If there are NaN or infinite voxels or all voxels are equal.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        data = np.asarray(volume.data, dtype=np.float32)
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(data.size - np.isfinite(data).sum())
        raise InputError(
            f"{path}: {count} of {data.size} voxels are NaN, infinite or beyond 32 bits; expected numbers only: "
            "replace them (by the background value, for instance)"
        )
    if low == high:
        raise InputError(f"{path}: all voxels have the value {low:g}; expected a scan with contrast")
    return Volume(data, volume.grid, volume.source)


def load_labels(path: PathLike, *, allow_empty: bool = False) -> Volume:
    """Read a label map: whole numbers, 0 for background, as the smallest unsigned integer type.

    Parameters
    ----------
    path : path
        As :func:`load_volume` takes it.
    allow_empty : bool
        Whether a map without any label is one: a result may have found nothing, an atlas may not.

    Raises
    ------
    InputError
        As :func:`load_volume`, and if there are fractions, negative values or no label where one is needed.
    """
    volume = load_volume(path)
    data = volume.data
    if not np.issubdtype(data.dtype, np.integer):
        if not np.isfinite(data).all():
            raise InputError(f"{path}: the label map has NaN or infinite voxels; expected whole numbers")
        fractions = data != np.round(data)
        if fractions.any():
            raise InputError(
                f"{path}: {int(fractions.sum())} voxels are not whole numbers (the first is "
                f"{float(data[fractions][0]):g}); expected a label map: resample labels with nearest neighbour"
            )
    low, high = int(data.min()), int(data.max())
    if low < 0:
        raise InputError(f"{path}: the label map has the value {low}; expected 0 for background and labels above 0")
    if high == 0 and not allow_empty:
        raise InputError(f"{path}: the label map is empty (all voxels are 0); expected at least one structure")
    try:
        label_type = smallest_label_type(high)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Volume(data.astype(label_type), volume.grid, volume.source)


def smallest_label_type(largest: int) -> np.dtype[Any]:
    """The smallest integer type for values 0 to ``largest`` that NIfTI, NRRD and MetaImage all hold."""
    for candidate in (np.uint8, np.uint16, np.uint32):
        if largest <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    raise InputError(f"the label value {largest} does not fit into 32 bits; renumber the labels")


def label_positions(labels: NDArray[Any], values: Sequence[int]) -> NDArray[Any]:
    """Replace label values by their position in ``values`` from 1, all others by 0."""
    kind = smallest_label_type(len(values))
    largest = max([int(labels.max(initial=0)), *values], default=0)
    if largest < 1 << 16:  # a table is several times faster
        table = np.zeros(largest + 1, kind)
        table[list(values)] = np.arange(1, len(values) + 1)
        return np.asarray(table[labels])
    known, ranks = np.array([*sorted(values), largest + 1]), np.array([*(np.argsort(values) + 1), 0], kind)
    place = np.searchsorted(known, labels)
    return np.where(known[place] == labels, ranks[place], kind.type(0))


def label_boxes(values: Sequence[int], *maps: NDArray[Any]) -> dict[int, tuple[slice, slice, slice]]:
    """Find the bounding box of each label value over label maps of one shape; none for values without voxels."""
    from scipy import ndimage

    found: dict[int, tuple[slice, slice, slice]] = {}
    for labels in maps:
        # find_objects is fast with the axis that lies closest in memory last.
        boxes = ndimage.find_objects(label_positions(labels, values).transpose(2, 1, 0))
        for value, box in zip(values, boxes, strict=False):
            if box is not None:
                sides = zip(box[::-1], found.get(value, box[::-1]), strict=True)
                i, j, k = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in sides)
                found[value] = (i, j, k)
    return found


def save_volume(volume: Volume, path: PathLike, *, structures: Sequence[Structure] | None = None) -> None:
    """Write a volume in the format of the file name, under a temporary name first.

    Parameters
    ----------
    volume : Volume
        Where its source is a NIfTI file of the same grid, the geometry fields of that header are written
        unchanged.
    path : path
        Ends in one of :data:`IMAGE_SUFFIXES` (".nhdr" and ".mhd", which are two files, left out).
    structures : sequence of Structure, optional
        For label maps: names and colours to put into the header.

    Raises
    ------
    InputError
        If the ending is not known or the folder cannot be written to.
    """
    path = Path(path)
    suffix = image_suffix(path)
    if suffix is None or suffix in (".nhdr", ".mhd"):
        raise InputError(f"{path}: cannot write this format; expected a name ending in .nii.gz, .nii, .nrrd or .mha")
    with atomic_path(path) as temporary:
        if suffix in NIFTI_SUFFIXES:
            _save_nifti(volume, temporary, structures)
        else:
            _save_itk(volume, temporary, structures)


def _load_nifti(path: Path) -> Volume:
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.openers import ImageOpener
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    _check_compression(path)
    try:
        with ImageOpener(str(path)) as file:
            header, stored_pixdim = _read_nifti_header(file, path)
            shape = header.get_data_shape()
            while len(shape) > 3 and shape[-1] == 1:
                shape = shape[:-1]
            if len(shape) != 3:
                raise InputError(_dimension_message(path, shape))
            kind = header.get_data_dtype()
            if kind.fields is not None or np.issubdtype(kind, np.complexfloating):
                raise InputError(f"{path}: the voxels are {_kind_name(kind)}; expected one real number a voxel")
            if not (np.isfinite(stored_pixdim).all() and (stored_pixdim > 0).all()):
                values = ", ".join(f"{value:g}" for value in stored_pixdim)
                raise InputError(
                    f"{path}: the header gives the spacing {values}; expected three numbers above 0: correct pixdim"
                )
            affine, notes = _nifti_affine(header, path)
            try:
                grid = Grid(shape, affine)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            data = np.asanyarray(ArrayProxy(file, header, mmap=False)).reshape(shape)
            # The checksum of a gzip stream follows its last byte: damage shows only to who reads that far.
            while file.read(1 << 20):
                pass
    except MemoryError:
        size = " x ".join(str(n) for n in shape)
        raise InputError(f"{path}: {size} voxels do not fit into memory; check the header, or crop the scan") from None
    except (EOFError, OSError, zlib.error, ValueError, HeaderDataError, WrapStructError) as error:
        raise InputError(_damage_message(path, error, "NIfTI")) from None
    table: dict[int, LabelEntry] = {}
    for extension in header.extensions:
        # The raw bytes: nibabel's decoded form is an error for some codes, the one of Workbench among them.
        text = extension.content.decode("utf-8", "replace")
        table.update(from_nifti_xml(text))
    return Volume(data, grid, Source(path, header, table, notes))


def _check_compression(path: Path) -> None:
    """Refuse a NIfTI file whose ending and content disagree on whether it is compressed."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if path.name.lower().endswith(".gz") and not is_gzip:
        raise InputError(
            f"{path}: not compressed with gzip, as its ending says; "
            "if it is an uncompressed NIfTI file, rename it to end in .nii"
        )
    if is_gzip and not path.name.lower().endswith(".gz"):
        raise InputError(f"{path}: compressed with gzip, unlike its ending says; rename it to end in .nii.gz")


def _read_nifti_header(file: Any, path: Path) -> tuple[Nifti1Header, NDArray[np.float64]]:
    """The header, repaired where the standard says how, and its spacing as stored, (3,)."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    sizes = {size.to_bytes(4, order): size for size in (348, 540) for order in ("little", "big")}
    first = file.read(4)
    if first not in sizes:
        raise InputError(_damage_message(path, None, "NIfTI"))
    if len(first + file.read(sizes[first] - 4)) < sizes[first]:
        raise EOFError
    file.seek(0)
    # Zero and negative spacings would be repaired as well, in silence; so they are kept to be looked at.
    stored = (Nifti1Header if sizes[first] == 348 else Nifti2Header).from_fileobj(file, check=False)
    header = stored.copy()
    header.check_fix(logger=_repairs)
    for code in ("sform_code", "qform_code"):
        header[code] = stored[code]  # a code newer than nibabel is still a code above 0
    return header, np.asarray(stored["pixdim"][1:4], dtype=np.float64)


def _nifti_affine(header: Nifti1Header, path: Path | None) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine in mm by the rule of this module's docstring, and notes for the user."""
    from nibabel.spatialimages import HeaderDataError

    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    notes = []
    qform = None
    if qform_code > 0:
        try:
            qform = header.get_qform()
            problem = "" if np.isfinite(qform).all() else "it has NaN or infinite numbers"
        except (ValueError, HeaderDataError) as error:
            problem = str(error)
        if problem and sform_code <= 0:
            raise InputError(f"{path}: the qform is unusable ({problem}); correct the header")
        if problem:
            qform = None
            notes.append(f"the qform is unusable ({problem}); the sform counts")
    if sform_code > 0:
        affine = header.get_sform()
        if qform is not None and np.isfinite(affine).all():
            corners = box_corners(np.zeros(3), np.array(header.get_data_shape()[:3]) - 1)
            gap = (corners @ (affine[:3, :3] - qform[:3, :3]).T) + (affine[:3, 3] - qform[:3, 3])
            gap_mm = float(np.linalg.norm(gap, axis=1).max())
            if gap_mm > 0.1 * float(np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).min()):
                notes.append(f"sform and qform differ by up to {gap_mm:.2f} mm; the sform counts")
    elif qform is not None:
        affine = qform
    else:
        affine = header.get_base_affine()
        notes.append("the header has no orientation (sform and qform codes are 0); its axes are taken as L, A, S")
    unit = header.get_xyzt_units()[0]
    scale = {"meter": 1000.0, "micron": 0.001}.get(unit, 1.0)
    affine = np.array(affine, dtype=np.float64)
    affine[:3] *= scale
    return affine, tuple(notes)


def _save_nifti(volume: Volume, path: Path, structures: Sequence[Structure] | None) -> None:
    import nibabel as nib

    source = volume.source.nifti_header if volume.source else None
    if source is not None and not _describes(source, volume.grid):
        source = None  # the axes were turned, or the volume is on another grid
    is_large = max(volume.grid.shape) > 32767  # what NIfTI-1 can count to
    kind: Any = nib.Nifti2Image if isinstance(source, nib.Nifti2Header) or is_large else nib.Nifti1Image
    header = kind.header_class()
    header.set_data_shape(volume.grid.shape)
    header.set_data_dtype(volume.data.dtype)
    if source is not None:
        image = kind(volume.data, None, header)
        # Geometry only: free-text fields of a clinical file may name the patient. Field by field, and into
        # the finished image, because nibabel's setters and constructors round and repair.
        image.header["pixdim"][:4] = source["pixdim"][:4]
        for name in _NIFTI_GEOMETRY_FIELDS:
            image.header[name] = source[name]
        unit = source.get_xyzt_units()[0]
        image.header.set_xyzt_units(unit if unit != "unknown" else None)
    else:
        header.set_xyzt_units("mm")
        image = kind(volume.data, volume.grid.affine, header)
        image.set_sform(volume.grid.affine, code="scanner")
        image.set_qform(volume.grid.affine, code="scanner", strip_shears=True)
        if not np.allclose(image.get_qform(), volume.grid.affine, atol=1e-3):
            image.set_qform(None, code="unknown")  # a sheared grid has no qform
    if structures is not None:
        image.header["intent_code"] = _NIFTI_INTENT_LABEL
        xml = to_nifti_xml(structures).encode("utf-8")
        image.header.extensions.append(nib.nifti1.Nifti1Extension(_NIFTI_ECODE_CARET, xml))
    nib.save(image, path)


def _describes(header: Nifti1Header, grid: Grid) -> bool:
    """Whether a NIfTI header has the geometry of ``grid``, to what its 32-bit numbers can tell."""
    if header.get_data_shape()[:3] != grid.shape:
        return False
    affine, _ = _nifti_affine(header, None)
    return np.allclose(affine, grid.affine, rtol=1e-6, atol=1e-4)


def _load_itk(path: Path) -> Volume:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = reader.GetSize()
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            raise InputError(_dimension_message(path, shape))
        if reader.GetNumberOfComponents() != 1:
            raise InputError(
                f"{path}: {reader.GetNumberOfComponents()} numbers a voxel; expected one "
                "(export overlapping segments of 3D Slicer as a single label map)"
            )
        image = reader.Execute()
    except RuntimeError as error:
        if "spacing" in str(error).lower():
            raise InputError(
                f"{path}: the spacing in the header is not three numbers above 0; correct the header"
            ) from None
        if "determinant" in str(error).lower() or "singular" in str(error).lower():
            raise InputError(f"{path}: the affine is singular; correct the direction vectors in the header") from None
        raise InputError(_damage_message(path, error, path.suffix[1:].upper())) from None
    data = np.moveaxis(sitk.GetArrayFromImage(image).reshape(shape[::-1]), (0, 1, 2), (2, 1, 0))
    grid = itk_grid(image, path)
    metadata = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    return Volume(data, grid, Source(path, None, from_slicer_metadata(metadata)))


def _save_itk(volume: Volume, path: Path, structures: Sequence[Structure] | None) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(volume.data, (0, 1, 2), (2, 1, 0))))
    set_itk_grid(image, volume.grid)
    for key, text in to_slicer_metadata(structures or ()).items():
        image.SetMetaData(key, text)
    sitk.WriteImage(image, str(path), useCompression=True)


def itk_grid(image: Any, path: Path) -> Grid:
    """The RAS+ grid of a SimpleITK image or reader, of its first three dimensions; errors name ``path``."""
    count = image.GetDimension()
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(count, count)[:3, :3] * np.array(image.GetSpacing()[:3])
    lps[:3, 3] = image.GetOrigin()[:3]
    try:
        return Grid(image.GetSize()[:3], LPS_FLIP @ lps)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def set_itk_grid(image: Any, grid: Grid) -> None:
    """Give a SimpleITK image the geometry of a grid."""
    lps = LPS_FLIP @ grid.affine
    image.SetSpacing(grid.spacing_mm.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / grid.spacing_mm).ravel().tolist())


def _dimension_message(path: Path, shape: Sequence[int]) -> str:
    size = " x ".join(str(n) for n in shape)
    return (
        f"{path}: the image has {len(shape)} dimensions ({size}); expected 3: "
        "extract one volume of a series, or stack the slices"
    )


def _kind_name(kind: np.dtype[Any]) -> str:
    return f"{len(kind.fields)} numbers each (colour)" if kind.fields is not None else f"complex ({kind.name})"


def _damage_message(path: Path, error: BaseException | None, kind: str) -> str:
    text = str(error).lower()
    truncated = isinstance(error, EOFError) or ("expected" in text and "bytes" in text)
    if truncated or isinstance(error, zlib.error) or "crc check" in text or "incorrect length" in text:
        return f"{path}: the file is truncated or damaged; copy it again"
    return f"{path}: not readable as {kind}; expected an image file: check that it is complete and has the right ending"
