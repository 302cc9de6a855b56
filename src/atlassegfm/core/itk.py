"""NRRD and MetaImage files, by SimpleITK; its LPS frame is turned to RAS+ here and nowhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .extras import require
from .geometry import LPS_FLIP, Grid
from .labels import LabelEntry, Structure, from_slicer_metadata, slicer_segments, to_slicer_metadata
from .volume import Source, Volume, check_real, damage_errors, grid_of, spatial_shape

#: A segmentation of 3D Slicer: an NRRD file with one layer, or one for each of its segments that overlap.
SEGMENTATION_SUFFIX = ".seg.nrrd"


def require_itk_extra(feature: str) -> Any:
    """Import SimpleITK for a feature; MissingExtraError if it is not installed."""
    return require(feature, "itk", "SimpleITK")


def load_itk(path: Path) -> Volume:
    """Read an NRRD or MetaImage file; raises InputError, or MissingExtraError without SimpleITK."""
    sitk = require_itk_extra(f"{path}: reading NRRD and MetaImage")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with damage_errors(path, path.suffix[1:].upper()):
        try:
            reader.ReadImageInformation()
            shape = spatial_shape(reader.GetSize(), path)
            layers = reader.GetNumberOfComponents()
            if layers != 1 and not path.name.lower().endswith(SEGMENTATION_SUFFIX):
                raise InputError(f"{path}: {layers} numbers a voxel; expected one")
            image = reader.Execute()
        except RuntimeError as error:
            text = str(error).lower()
            if "spacing" in text:
                found = "the spacing in the header is not three numbers above 0; correct the header"
            elif "determinant" in text or "singular" in text:
                found = "the affine is singular; correct the direction vectors in the header"
            else:
                raise
            raise InputError(f"{path}: {found}") from None
        grid = itk_grid(image, path)
        metadata = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
        stored = sitk.GetArrayFromImage(image)
        check_real(stored.dtype, path)
        if layers != 1:
            data, table = _flattened(stored.reshape(*shape[::-1], layers), metadata, path)
            return Volume(data.transpose(2, 1, 0), grid, Source(path, None, table))
        data = stored.reshape(shape[::-1]).transpose(2, 1, 0)
        return Volume(data, grid, Source(path, None, from_slicer_metadata(metadata)))


def _flattened(
    layers: NDArray[Any], metadata: Mapping[str, str], path: Path
) -> tuple[NDArray[np.uint16], dict[int, LabelEntry]]:
    """One label map of the layers (K, J, I, layer) of a 3D Slicer segmentation, numbered in the order of its segments.

    InputError if segments overlap: a label map has one value a voxel.
    """
    data = np.zeros(layers.shape[:3], np.uint16)
    table: dict[int, LabelEntry] = {}
    for segment in slicer_segments(metadata):
        inside = layers[..., segment.layer] == segment.value
        both = np.unique(data[inside])
        if both.any():
            raise InputError(
                f"{path}: the segments {table[int(both.max())].name!r} and {segment.entry.name!r} overlap; expected "
                "one segment a voxel: export them from 3D Slicer as a label map, or as one file each"
            )
        number = len(table) + 1
        data[inside] = number
        table[number] = segment.entry
    return data, table


def save_itk(volume: Volume, path: Path, structures: Sequence[Structure] | None, *, compress: bool = True) -> None:
    """Write an NRRD or MetaImage file; with structures, NRRD has the header of a 3D Slicer segmentation."""
    sitk = require_itk_extra("writing NRRD and MetaImage")
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(volume.data, (0, 1, 2), (2, 1, 0))))
    set_itk_grid(image, volume.grid)
    for key, text in to_slicer_metadata(structures or (), volume.grid.shape).items():
        image.SetMetaData(key, text)
    try:
        sitk.WriteImage(image, str(path), useCompression=compress)
    except RuntimeError:
        # ITK does not say why: a second write shows whether the disk is full.
        with path.open("wb") as file:
            file.write(bytes(1 << 20))
        raise InputError(f"{path.name}: cannot be written in this format; choose another") from None


def itk_grid(image: Any, path: Path) -> Grid:
    """Get the RAS+ grid of a SimpleITK image or reader, of its first three dimensions; errors name ``path``."""
    count = image.GetDimension()
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(count, count)[:3, :3] * np.array(image.GetSpacing()[:3])
    lps[:3, 3] = image.GetOrigin()[:3]
    return grid_of(image.GetSize(), LPS_FLIP @ lps, path)


def set_itk_grid(image: Any, grid: Grid) -> None:
    """Give a SimpleITK image the geometry of a grid."""
    lps = LPS_FLIP @ grid.affine
    image.SetSpacing(grid.spacing_mm.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / grid.spacing_mm).ravel().tolist())
