"""MGH and MGZ files of FreeSurfer, by nibabel. They hold no label names."""

from pathlib import Path

import numpy as np

from .errors import InputError
from .volume import Source, Volume, damage_errors, grid_of, spatial_shape


def load_mgh(path: Path) -> Volume:
    """Read an MGH or MGZ file; raises InputError as :func:`~.image.load_volume`."""
    from nibabel.freesurfer.mghformat import MGHImage
    from nibabel.openers import ImageOpener

    with damage_errors(path, "MGH"):
        with ImageOpener(str(path)) as file:
            image = MGHImage.from_bytes(file.read())
        data = np.asanyarray(image.dataobj)
    shape = spatial_shape(data.shape, path)
    notes = () if image.header["goodRASFlag"] == 1 else ("the header has no orientation; FreeSurfer's default counts",)
    return Volume(data.reshape(shape), grid_of(shape, image.affine, path), Source(path, notes=notes))


def save_mgh(volume: Volume, path: Path) -> None:
    """Write an MGH or MGZ file, in the smallest of its types that holds the values."""
    from nibabel.freesurfer.mghformat import MGHImage

    data = volume.data
    if data.dtype not in (np.uint8, np.int16, np.int32, np.float32):
        kind = np.int32 if np.issubdtype(data.dtype, np.integer) else np.float32
        if kind is np.int32 and int(data.max()) > np.iinfo(kind).max:
            raise InputError(f"{path}: the value {int(data.max())} does not fit into MGH; write NIfTI or NRRD instead")
        data = data.astype(kind)
    MGHImage(data, volume.grid.affine).to_filename(path)
