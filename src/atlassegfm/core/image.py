"""Scans and label maps: how they get in and out of files and of the images of other libraries.

One foreign format a file: :mod:`.nifti`, :mod:`.itk`, :mod:`.freesurfer`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError
from .files import PathLike, atomic_path, check_readable
from .freesurfer import load_mgh, save_mgh
from .geometry import Grid
from .itk import SEGMENTATION_SUFFIX, itk_grid, load_itk, save_itk
from .labels import Structure, file_names
from .nifti import PAIR_SUFFIXES, load_nifti, save_nifti
from .volume import Source, Volume, check_real, spatial_shape

if TYPE_CHECKING:
    import nibabel as nib
    import SimpleITK as sitk

#: What functions of this package take as an image: a file, an image of this or another library, or voxels with affine.
ImageLike: TypeAlias = "PathLike | Volume | nib.spatialimages.SpatialImage | sitk.Image | tuple[ArrayLike, ArrayLike]"

__all__ = ["IMAGE_SUFFIXES", "NIFTI_SUFFIXES", "PAIR_SUFFIXES", "WHOLE_WITHIN", "Source", "Volume"]
__all__ += ["as_volume", "checked_image", "checked_labels", "image_stem", "image_suffix", "label_values", "load_image"]
__all__ += ["load_labels", "load_volume", "save_masks", "save_volume", "smallest_label_type"]

logger = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (SEGMENTATION_SUFFIX, ".nrrd", ".nhdr", ".mha", ".mhd")
MGH_SUFFIXES = (".mgz", ".mgh")
IMAGE_SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + MGH_SUFFIXES + PAIR_SUFFIXES
#: Of these, files can be written: the others are pairs of files.
WRITTEN_SUFFIXES = (".nii.gz", ".nii", SEGMENTATION_SUFFIX, ".nrrd", ".mha", ".mgz", ".mgh")
#: mm. No scan of a body or an organ is smaller, or larger, along its longest edge: a whole body in metres read as mm is
#: 2 mm long, and a crop of 20 mm in micrometres 20,000.
EXTENT_MM = (3.0, 10_000.0)
#: Largest difference of a label from a whole number: what resampling in 32 bits leaves behind.
WHOLE_WITHIN = 0.01
#: Larger values are no intensities: sums of their squares are beyond 32 bits.
_LARGEST_VALUE = np.float32(1e15)
#: Label values up to this are counted in a table, larger ones sorted out.
_LARGEST_COUNTED = 1 << 20
#: Fraction of the voxels that may be NaN or infinite, in a scan or label map that is otherwise usable.
_MOST_INVALID = 0.5


def image_suffix(path: Path) -> str | None:
    """Get the ending of a file name that names a format this package reads (".nii.gz", ...), or None."""
    name = path.name.lower()
    return next((suffix for suffix in IMAGE_SUFFIXES if name.endswith(suffix)), None)


def image_stem(path: Path) -> str:
    """Get the file name without its image ending: the name results of this scan go by."""
    suffix = image_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def as_volume(image: ImageLike) -> Volume:
    """Take an image of nibabel or SimpleITK, or an array with its affine, as a volume; a volume as it is.

    Arrays are (I, J, K), affines (4, 4) voxel to RAS+ mm, as nibabel has them; SimpleITK's frame is turned. InputError
    if it is none of these, not 3-D, or its affine is singular.
    """
    if isinstance(image, Volume):
        return image
    name = Path("the image")
    if type(image).__module__.startswith("SimpleITK"):
        import SimpleITK as sitk

        image = cast("sitk.Image", image)
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
            raise InputError(f"{name}: expected a SimpleITK image of three dimensions with one number a voxel")
        return Volume(sitk.GetArrayFromImage(image).transpose(2, 1, 0), itk_grid(image, name))
    if isinstance(image, tuple) and len(image) == 2:
        data, affine = np.asarray(image[0]), np.asarray(image[1], np.float64)
    elif hasattr(image, "dataobj") and hasattr(image, "affine"):
        data, affine = np.asanyarray(image.dataobj), image.affine
    else:
        raise InputError(
            f"{type(image).__name__}: not an image; expected a path, a Volume, an image of nibabel or SimpleITK, or "
            "an array with its affine"
        )
    check_real(data.dtype, name)
    shape = spatial_shape(data.shape, name)
    return Volume(data.reshape(shape), Grid(shape, affine))


def load_volume(image: ImageLike) -> Volume:
    """Read a 3-D volume with its stored values (scaling of the header applied) and its geometry.

    The image is a file ending in one of :data:`IMAGE_SUFFIXES`, or what :func:`as_volume` takes. InputError if the file
    is missing, damaged, not an image, not 3-D or has no usable geometry.
    """
    if not isinstance(image, str | os.PathLike):
        return as_volume(image)
    path = Path(image)
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    suffix = image_suffix(path)
    if path.is_dir() or suffix is None:
        what = "a folder" if path.is_dir() else "not a known image file"
        raise InputError(f"{path}: {what}; expected a file ending in {', '.join(IMAGE_SUFFIXES)}")
    check_readable(path)
    load = load_itk if suffix in ITK_SUFFIXES else load_mgh if suffix in MGH_SUFFIXES else load_nifti
    volume = load(path)
    for note in volume.source.notes if volume.source else ():
        logger.warning("%s: %s", path, note)
    return volume


def load_image(image: ImageLike) -> Volume:
    """Read a scan as float32 intensities; raises as :func:`load_volume` and :func:`checked_image`."""
    return checked_image(load_volume(image), image if isinstance(image, str | os.PathLike) else "the image")


def checked_image(volume: Volume, name: PathLike) -> Volume:
    """Convert a scan to float32 intensities; NaN and infinite voxels get its lowest value, with a warning.

    Resampling programs write NaN outside the field of view. InputError if most voxels are NaN or infinite, all are
    equal, or its size in mm is not that of a body.
    """
    _check_extent(volume.grid, name)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        data = np.asarray(volume.data, dtype=np.float32)
    low, high = float(data.min()), float(data.max())
    if not (low >= -_LARGEST_VALUE and high <= _LARGEST_VALUE):  # nor if they are NaN
        valid = np.abs(data) <= _LARGEST_VALUE
        volume = _valid_or_refused(volume, valid, name, "taken as outside the scan")
        low, high = float(data[valid].min()), float(data[valid].max())
        data = np.where(valid, data, np.float32(low))
    if low == high:
        raise InputError(f"{name}: all voxels have the value {low:g}; expected a scan with contrast")
    return Volume(data, volume.grid, volume.source)


def _check_extent(grid: Grid, name: PathLike) -> None:
    """Refuse a grid whose size in mm is not that of a body."""
    longest = float((np.array(grid.shape) * grid.spacing_mm).max())
    if not EXTENT_MM[0] <= longest <= EXTENT_MM[1]:
        unit, factor = ("metres", 1000) if longest < EXTENT_MM[0] else ("micrometres", 0.001)
        raise InputError(
            f"{name}: its longest edge is {longest:.3g} mm, which is no scan of a body; expected millimetres: if the "
            f"header is in {unit}, multiply the affine by {factor:g}"
        )


def _valid_or_refused(volume: Volume, valid: NDArray[np.bool_], name: PathLike, what: str) -> Volume:
    """The volume with a note on its invalid voxels; refused where they are most of it."""
    count = int(valid.size - valid.sum())
    if count > _MOST_INVALID * valid.size:
        raise InputError(
            f"{name}: {count} of {valid.size} voxels are NaN, infinite or above 1e15; expected numbers in most: "
            "export it again"
        )
    return _noted(volume, f"{count} of {valid.size} voxels are NaN, infinite or above 1e15; {what}", name)


def _noted(volume: Volume, note: str, name: PathLike) -> Volume:
    logger.warning("%s: %s", name, note)
    source = volume.source and replace(volume.source, notes=(*volume.source.notes, note))
    return Volume(volume.data, volume.grid, source)


def load_labels(image: ImageLike, *, allow_empty: bool = False) -> Volume:
    """Read a label map; raises as :func:`load_volume` and :func:`checked_labels`.

    ``allow_empty``: a map without any label is one, as a result may have found nothing, while an atlas has structures.
    """
    name = image if isinstance(image, str | os.PathLike) else "the label map"
    return checked_labels(load_volume(image), name, allow_empty=allow_empty)


def checked_labels(volume: Volume, name: PathLike, *, allow_empty: bool = False) -> Volume:
    """Convert a label map to the smallest unsigned integer type: whole numbers, 0 for background.

    Values within 0.01 of a whole number are rounded, NaN and infinite voxels are background, both with a warning.
    InputError if there are fractions, negative values or no label where one is needed, or its size is not a body's.
    """
    _check_extent(volume.grid, name)
    data = volume.data
    if not np.issubdtype(data.dtype, np.integer):
        valid = np.isfinite(data)
        if not valid.all():
            volume = _valid_or_refused(volume, valid, name, "taken as background")
            data = np.where(valid, data, 0)
        whole = np.round(data)
        gap = np.abs(data - whole)
        if gap.max() > WHOLE_WITHIN:
            fractions = gap > WHOLE_WITHIN
            raise InputError(
                f"{name}: {int(fractions.sum())} voxels are not whole numbers (the first is "
                f"{float(data[fractions][0]):.6g}); expected a label map: resample labels with nearest neighbour"
            )
        if gap.any():
            volume = _noted(volume, f"labels are off whole numbers by up to {gap.max():.1g}; rounded", name)
        data = whole
    low, high = int(data.min()), int(data.max())
    if low < 0:
        raise InputError(f"{name}: the label map has the value {low}; expected 0 for background and labels above 0")
    if high == 0 and not allow_empty:
        raise InputError(f"{name}: the label map is empty (all voxels are 0); expected at least one structure")
    try:
        label_type = smallest_label_type(high)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Volume(data.astype(label_type), volume.grid, volume.source)


def label_values(labels: NDArray[Any]) -> list[int]:
    """List the label values present in an array, ascending, without 0."""
    planes = np.moveaxis(labels, int(np.argmax(labels.strides)), 0)
    if int(labels.max()) > _LARGEST_COUNTED:
        return sorted({value for plane in planes for value in np.unique(plane).tolist()} - {0})
    counts = np.zeros(int(labels.max()) + 1, np.int64)
    for plane in planes:
        found = np.bincount(plane.ravel())
        counts[: len(found)] += found
    return [int(value) for value in np.flatnonzero(counts) if value]


def smallest_label_type(largest: int) -> np.dtype[Any]:
    """Get the smallest integer type for values 0 to ``largest`` that NIfTI, NRRD and MetaImage all hold."""
    for candidate in (np.uint8, np.uint16, np.uint32):
        if largest <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    raise InputError(f"the label value {largest} does not fit into 32 bits; renumber the labels")


def label_positions(labels: NDArray[Any], values: Sequence[int]) -> NDArray[Any]:
    """Replace label values by their position in ``values`` from 1, all others by 0."""
    kind = smallest_label_type(len(values))
    least, largest = min([int(labels.min(initial=0)), *values]), max([int(labels.max(initial=0)), *values])
    if least >= 0 and largest < 1 << 16:  # a table is several times faster
        table = np.zeros(largest + 1, kind)
        table[list(values)] = np.arange(1, len(values) + 1)
        return np.asarray(table[labels])
    known, ranks = np.array([*sorted(values), largest + 1]), np.array([*(np.argsort(values) + 1), 0], kind)
    found = np.zeros_like(labels, kind)
    for slab, out in zip(labels, found, strict=True):  # bounds the memory of 64-bit places
        place = np.searchsorted(known, slab)
        np.copyto(out, ranks[place], where=known[place] == slab)
    return found


def label_boxes(values: Sequence[int], *maps: NDArray[Any]) -> dict[int, tuple[slice, slice, slice]]:
    """Find the bounding box of each label value over label maps of one shape; none for values without voxels."""
    from scipy import ndimage

    found: dict[int, tuple[slice, slice, slice]] = {}
    for labels in maps:
        positions = label_positions(labels, values)
        # find_objects is fast with the axis that lies closest in memory last.
        turn = -1 if positions.flags.f_contiguous else 1
        boxes = ndimage.find_objects(positions.transpose((0, 1, 2)[::turn]))
        for value, box in zip(values, boxes, strict=False):
            if box is not None:
                sides = zip(box[::turn], found.get(value, box[::turn]), strict=True)
                i, j, k = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in sides)
                found[value] = (i, j, k)
    return found


def save_volume(volume: Volume, path: PathLike, *, structures: Sequence[Structure] | None = None) -> None:
    """Write a volume in the format of the file name, one of :data:`WRITTEN_SUFFIXES`, under a temporary name first.

    Where its source is a NIfTI file of the same grid, the geometry fields of that header are written unchanged. Names
    and colours of ``structures`` are put into the header. InputError if the ending is not known or writing fails.
    """
    path = Path(path)
    suffix = image_suffix(path)
    if suffix not in WRITTEN_SUFFIXES:
        raise InputError(f"{path}: cannot write this format; expected a name ending in {', '.join(WRITTEN_SUFFIXES)}")
    with atomic_path(path) as temporary:
        if suffix in NIFTI_SUFFIXES:
            save_nifti(volume, temporary, structures)
        elif suffix in MGH_SUFFIXES:
            save_mgh(volume, temporary)
        else:
            save_itk(volume, temporary, structures)


def save_masks(labels: Volume, structures: Sequence[Structure], folder: Path) -> None:
    """Write a folder with a mask (0 and 1) for each structure, named after it; an absent one is empty."""
    folder.mkdir(exist_ok=True)
    for structure, name in zip(structures, file_names(structures), strict=True):
        mask = Volume((labels.data == structure.value).astype(np.uint8), labels.grid, labels.source)
        save_volume(mask, folder / f"{name}.nii.gz", structures=[replace(structure, value=1)])
