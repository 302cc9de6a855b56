"""NIfTI files, single or as a pair, and Analyze files of SPM, by nibabel: SimpleITK refuses sheared and rounded sforms.

Which NIfTI geometry counts, in the order of the NIfTI-1 standard: the sform if its code is above 0, else the qform if
its code is above 0, else the bare spacing (with a note). Where both codes are above 0 and the two differ by more than
a tenth of a voxel, the sform counts and a note says by how much they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .geometry import Grid, box_corners
from .labels import LabelEntry, Structure, from_nifti_xml, to_nifti_xml
from .volume import Source, Volume, check_real, damage_errors, damage_message, grid_of, spatial_shape

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

#: Header and voxels, of NIfTI pairs and Analyze files.
PAIR_SUFFIXES = (".hdr", ".img")

#: nibabel reports its repairs of headers here; what matters of them is checked and reported by this module.
_repairs = logging.getLogger(f"{__name__}.repairs")
_repairs.setLevel(logging.CRITICAL + 1)

#: Codes of header extensions that hold label names: "ignore", which every reader decodes and TotalSegmentator
#: writes, and that of Connectome Workbench.
_NAME_CODES = (0, 30)
#: NIfTI intent code "label": the values are names, not amounts.
_INTENT_LABEL = 1002
#: Where a NIfTI header keeps its geometry, next to shape, unit and pixdim.
_GEOMETRY_FIELDS = (
    *("dim_info", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def load_nifti(path: Path) -> Volume:
    """Read a NIfTI file, or the pair of header and voxels that either file belongs to; raises InputError."""
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.openers import ImageOpener

    is_pair = path.suffix.lower() in PAIR_SUFFIXES
    header_path, voxel_path = pair_of(path) if is_pair else (path, path)
    with damage_errors(path, "NIfTI"), ExitStack() as stack:
        if is_pair and not _is_nifti(header_path):
            return _load_analyze(path, header_path)
        _check_compression(path)
        file = stack.enter_context(ImageOpener(str(header_path)))
        header, stored_pixdim = _read_nifti_header(file, path)
        shape = spatial_shape(header.get_data_shape(), path)
        check_real(header.get_data_dtype(), path)
        if not (np.isfinite(stored_pixdim).all() and (stored_pixdim > 0).all()):
            values = ", ".join(f"{value:g}" for value in stored_pixdim)
            raise InputError(
                f"{path}: the header gives the spacing {values}; expected three numbers above 0: correct pixdim"
            )
        affine, notes = _nifti_affine(header, path)
        grid = grid_of(shape, affine, path)
        voxels = stack.enter_context(ImageOpener(str(voxel_path))) if is_pair else file
        try:
            data = np.asanyarray(ArrayProxy(voxels, header, mmap=False)).reshape(shape)
        except MemoryError:
            size = " x ".join(str(n) for n in shape)
            raise InputError(f"{path}: {size} voxels do not fit into memory; check the header, or crop it") from None
        # The checksum of a gzip stream follows its last byte: damage shows only to who reads that far.
        while voxels.read(1 << 20):
            pass
    table: dict[int, LabelEntry] = {}
    for extension in header.extensions:
        # The raw bytes: nibabel's decoded form is an error for some codes, the one of Workbench among them.
        table.update(from_nifti_xml(extension.content.decode("utf-8", "replace")))
    return Volume(data, grid, Source(path, header, table, notes))


def pair_of(path: Path) -> tuple[Path, Path]:
    """Name header and voxel file of a pair; InputError if one of them is missing."""
    found = [path if path.suffix.lower() == suffix else path.with_suffix(suffix) for suffix in PAIR_SUFFIXES]
    for one in found:
        if not one.is_file():
            raise InputError(f"{path}: belongs to a pair of files, and {one.name} is missing; copy both")
    return found[0], found[1]


def _is_nifti(header: Path) -> bool:
    with header.open("rb") as file:
        return file.read(348)[344:347] == b"ni1"


def _load_analyze(path: Path, header_path: Path) -> Volume:
    """Read an Analyze 7.5 or SPM file; the affine of a ``.mat`` beside it counts."""
    from nibabel.spm2analyze import Spm2AnalyzeImage

    with damage_errors(path, "Analyze"):
        image = Spm2AnalyzeImage.from_filename(header_path)
        shape = spatial_shape(image.shape, path)
        check_real(image.get_data_dtype(), path)
        data = np.asanyarray(image.dataobj).reshape(shape)
    notes: tuple[str, ...] = ()
    if not header_path.with_suffix(".mat").is_file():
        notes = ("an Analyze header has no orientation; its axes are taken as L, A, S, as SPM does",)
    return Volume(data, grid_of(shape, image.affine, path), Source(path, notes=notes))


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
        raise InputError(f"{path}: compressed with gzip, which its ending does not say; rename it to end in .nii.gz")


def _read_nifti_header(file: Any, path: Path) -> tuple[Nifti1Header, NDArray[np.float64]]:
    """The header, repaired where the standard says how, and its spacing as stored, (3,)."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    sizes = {size.to_bytes(4, order): size for size in (348, 540) for order in ("little", "big")}
    first = file.read(4)
    if first not in sizes:
        raise InputError(damage_message(path, None, "NIfTI"))
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


def save_nifti(volume: Volume, path: Path, structures: Sequence[Structure] | None) -> None:
    """Write a NIfTI file, with the geometry fields of the file the volume came from, unchanged."""
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
        for name in _GEOMETRY_FIELDS:
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
        image.header["intent_code"] = _INTENT_LABEL
        xml = to_nifti_xml(structures).encode("utf-8")
        image.header.extensions.extend(nib.nifti1.Nifti1Extension(code, xml) for code in _NAME_CODES)
    nib.save(image, path)


def _describes(header: Nifti1Header, grid: Grid) -> bool:
    """Whether a NIfTI header has the geometry of ``grid``, to what its 32-bit numbers can tell."""
    if header.get_data_shape()[:3] != grid.shape:
        return False
    affine, _ = _nifti_affine(header, None)
    return np.allclose(affine, grid.affine, rtol=1e-6, atol=1e-4)
