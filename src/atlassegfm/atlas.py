"""The annotated scan that customizes the program: the atlas, its labels, and what they are called."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .core.errors import InputError
from .core.geometry import Grid
from .core.image import Volume, checked_image, smallest_label_type
from .core.labels import LabelTable, Structure, dataset_json_of, distinct_names, listed, read_names_file, structures_of
from .dicom import EVERYTHING, Selection, is_dicom_input, open_image, open_labels

if TYPE_CHECKING:
    from .core.image import ImageLike

logger = logging.getLogger(__name__)

#: Label values up to this are counted in a table, larger ones sorted out.
_LARGEST_COUNTED = 1 << 20
#: Decimals of an origin for voxels of 1 mm. Header fields have 32 bits: 1e-5 mm at 200 mm.
_ORIGIN_DIGITS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Atlas:
    """One annotated scan.

    Parameters
    ----------
    image : Volume
        float32 intensities, in RAS-canonical array order.
    labels : Volume
        Unsigned integers on the grid of ``image``; 0 is background.
    structures : tuple of Structure
        Every label value of ``labels`` in ascending order, with its name and colour.
    """

    image: Volume
    labels: Volume
    structures: tuple[Structure, ...]

    def __post_init__(self) -> None:
        if not self.labels.grid.matches(self.image.grid) or self.image.grid.axis_codes != "RAS":
            raise ValueError("image and labels do not share a RAS-canonical grid; use Atlas.from_volumes")

    @classmethod
    def from_files(
        cls,
        image: ImageLike,
        labels: ImageLike,
        names: str | os.PathLike[str] | None = None,
        *,
        series: str | None = None,
        selection: Selection = EVERYTHING,
    ) -> Atlas:
        """Read an annotated scan.

        Parameters
        ----------
        image, labels : path or image
            The scan and its label map: the same voxels, in any array order each. The scan may be the folder of a DICOM
            series, the labels an RTSTRUCT or DICOM-SEG; both may be images in memory, see
            :func:`~atlassegfm.core.image.as_volume`.
        names : path, optional
            Names and colours in a form that :func:`~atlassegfm.core.labels.read_names_file` reads. They come
            before those in the header of ``labels``, which come before those of the ``dataset.json`` beside
            it or one folder above.
        series : str, optional
            Which DICOM series of the folder, as :func:`~atlassegfm.dicom.load_series` takes it.
        selection : Selection, optional
            Which structures, and what they are called.

        Raises
        ------
        InputError
            If a file cannot be used, or the labels lie on other voxels than the atlas.
        """
        image_name, labels_name = (
            str(one) if isinstance(one, str | os.PathLike) else word
            for one, word in ((image, "the atlas"), (labels, "the labels"))
        )
        # The names are cheap to check and come first: the atlas may take seconds to read.
        given = None if names is None else read_names_file(names)
        scan = open_image(image, series)
        label_map = open_labels(labels, scan, selection)
        tables: list[LabelTable] = []
        if names is not None and given is not None:
            unknown = sorted(set(given) - set(_values_of(label_map.data)))
            if unknown:
                listed = ", ".join(f"{value} ({given[value].name})" for value in unknown)
                logger.warning("%s: names values that %s does not have: %s", names, labels_name, listed)
            tables.append(given)
        if label_map.source is not None:
            tables.append(label_map.source.label_table)
        on_disk = isinstance(labels, str | os.PathLike)
        dataset = dataset_json_of(Path(labels_name)) if on_disk else None
        if dataset is not None:
            try:
                tables.append(read_names_file(dataset))
            except InputError as error:
                # Nobody asked for this file: it may belong to something else.
                logger.warning("%s; its names are not used", error)
        chosen = EVERYTHING if on_disk and is_dicom_input(Path(labels_name)) else selection
        return cls._built(scan, label_map, tables, image_name, labels_name, chosen)

    @classmethod
    def from_volumes(cls, atlas: Volume, labels: Volume, structures: Sequence[Structure] = ()) -> Atlas:
        """Take an annotated scan from memory.

        Parameters
        ----------
        atlas : Volume
            Intensities.
        labels : Volume
            Whole numbers, 0 for background: the voxels of ``atlas``, in any array order.
        structures : sequence of Structure, optional
            Names and colours; label values left out get made-up ones.

        Raises
        ------
        InputError
            If the voxels cannot be used, or the labels lie on other voxels than the atlas.
        """
        data = labels.data
        if not (np.isfinite(data).all() and (data == np.round(data)).all()):
            raise InputError("the label map has voxels that are not whole numbers; expected a label map")
        if data.min() < 0 or data.max() == 0:
            raise InputError("the label map is empty or has negative values; expected at least one label above 0")
        small = data.astype(smallest_label_type(int(data.max())))
        built = cls._built(atlas, Volume(small, labels.grid, labels.source), [], "the atlas", "the labels")
        given = {structure.value: structure for structure in structures}
        return cls(built.image, built.labels, tuple(given.get(one.value, one) for one in built.structures))

    @classmethod
    def _built(
        cls,
        image: Volume,
        labels: Volume,
        tables: Sequence[LabelTable],
        image_name: str,
        labels_name: str,
        selection: Selection = EVERYTHING,
    ) -> Atlas:
        if labels.grid.axes_relative_to(image.grid) is None:
            raise InputError(_mismatch(image, labels, image_name, labels_name))
        scan = canonical_scan(image, image_name)
        turned = labels.turned_to(image.grid.canonical())
        if np.array_equal(turned.data, scan.data):
            raise InputError(
                f"{labels_name}: these are the voxels of the scan itself ({image_name}), not labels; "
                "give the label map that was drawn on it"
            )
        structures = structures_of(_values_of(labels.data), tables)
        data = np.ascontiguousarray(turned.data)
        if selection != EVERYTHING:
            order = selection.select([(one.value, one.name) for one in structures], Path(labels_name))
            structures = tuple(
                replace(structures[n], name=selection.renamed(structures[n].name)) for n in sorted(order)
            )
            data = np.where(np.isin(data, [one.value for one in structures]), data, data.dtype.type(0))
        names = distinct_names([one.name for one in structures])
        for one, name in zip(structures, names, strict=True):
            if name != one.name:
                logger.warning("%s: several structures are called %s; the later is %s", labels_name, one.name, name)
        structures = tuple(replace(one, name=name) for one, name in zip(structures, names, strict=True))
        return cls(scan, Volume(data, scan.grid, labels.source), structures)

    @property
    def values(self) -> tuple[int, ...]:
        """Label value of each structure."""
        return tuple(structure.value for structure in self.structures)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each structure."""
        return tuple(structure.name for structure in self.structures)

    @cached_property
    def numbered(self) -> Volume:
        """Labels as numbers of the structures: position in ``structures`` plus 1.

        Label values may have 32 bits, and tables over them would not fit into memory.
        """
        known = np.array((0, *self.values), self.labels.data.dtype)
        numbers = np.empty(self.labels.grid.shape, smallest_label_type(len(self.structures)))
        for plane, out in zip(self.labels.data, numbers, strict=True):
            out[...] = np.searchsorted(known, plane)
        return Volume(numbers, self.labels.grid)

    def label_values(self, numbers: NDArray[Any], grid: Grid, query: Volume) -> Volume:
        """Turn numbers of structures on the canonical grid into label values on the query's own grid.

        Parameters
        ----------
        numbers : array, (I, J, K)
            On ``grid``; 0 is background.
        grid : Grid
            The query's grid in RAS-canonical array order.
        query : Volume
            As stored.

        Returns
        -------
        Volume
            The smallest integer type that holds all label values of the atlas.
        """
        values = np.array((0, *self.values), smallest_label_type(max(self.values)))
        return Volume(values[numbers], grid, query.source).turned_to(query.grid)

    def __repr__(self) -> str:
        """Image and structures, on a few lines."""
        return f"Atlas({self.image!r}, {len(self.structures)} structures: {listed(self.names)})"


def canonical_scan(volume: Volume, name: str) -> Volume:
    """A scan as everything after reading takes it: checked, float32, in RAS-canonical order.

    Parameters
    ----------
    volume : Volume
        Intensities of any type, in any array order.
    name : str
        What to call it in messages.

    Returns
    -------
    Volume
        In that order in memory too: sums over strided views may round otherwise. Its origin is rounded to less
        than a hundredth of a voxel: files of one scan in several array orders name different corners, each with a
        rounding error of its own. So the result does not depend on how a file stores its voxels, to the last bit.

    Raises
    ------
    InputError
        As :func:`~atlassegfm.core.image.checked_image`.
    """
    turned = checked_image(volume.canonical(), name)
    data = np.ascontiguousarray(turned.data)
    affine = turned.grid.affine.copy()
    affine[:3, 3] = affine[:3, 3].round(_ORIGIN_DIGITS - math.ceil(math.log10(turned.grid.spacing_mm.min()))) + 0.0
    return Volume(data, Grid(turned.grid.shape, affine), volume.source)


def _values_of(labels: NDArray[Any]) -> list[int]:
    """Label values present, ascending, without 0."""
    if int(labels.max()) > _LARGEST_COUNTED:
        return [int(value) for value in np.unique(labels) if value]
    counts = np.zeros(int(labels.max()) + 1, np.int64)
    for plane in labels:
        found = np.bincount(plane.ravel())
        counts[: len(found)] += found
    return [int(value) for value in np.flatnonzero(counts) if value]


def _mismatch(image: Volume, labels: Volume, image_name: str, labels_name: str) -> str:
    one, other = labels.grid.canonical(), image.grid.canonical()
    shapes = ""
    if one.shape != other.shape:
        sizes = (" x ".join(str(n) for n in grid.shape) for grid in (one, other))
        shapes = "it has {} voxels instead of {}, and ".format(*sizes)
    return (
        f"{labels_name}: not on the voxels of {image_name}: {shapes}its corners lie up to "
        f"{one.distance_mm(other):.1f} mm from the atlas' corners; "
        "resample the labels onto the atlas with nearest neighbour, or give the scan they were drawn on"
    )
