"""Atlas: one annotated scan with its labels and their names."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .core.errors import InputError
from .core.files import PathLike
from .core.geometry import Grid
from .core.image import ImageLike, Volume, checked_image, label_values, load_labels, smallest_label_type
from .core.labels import LabelEntry, LabelTable, Structure, dataset_json_of, listed, pick_values, read_names_file
from .core.text import counted
from .dicom import EVERYTHING, Selection, is_dicom_input, open_image, open_labels, with_structures

logger = logging.getLogger(__name__)

#: Volumes of a structure in two atlases that differ by more than this factor are named in a warning.
_LARGEST_RATIO = 12.0
#: Decimals of an origin for voxels of 1 mm. Header fields have 32 bits: 1e-5 mm at 200 mm.
_ORIGIN_DIGITS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Atlas:
    """One annotated scan.

    ``image`` has float32 intensities in RAS-canonical array order, ``labels`` unsigned integers on its grid, 0 for
    background; ``structures`` are name and colour of each label value, ascending.
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
        names: PathLike | None = None,
        *,
        series: str | None = None,
        selection: Selection = EVERYTHING,
    ) -> Atlas:
        """Read an annotated scan: the scan and its label map have the same voxels, in any array order each.

        The scan may be the folder of a DICOM series, of which ``series`` chooses one as in
        :func:`~atlassegfm.dicom.load_series`, the labels an RTSTRUCT or DICOM-SEG; both may be images in memory, see
        :func:`~atlassegfm.core.image.as_volume`. ``names`` is a file of names and colours, as
        :func:`~atlassegfm.core.labels.read_names_file` reads it: they precede those in the header of ``labels``, which
        precede those of the ``dataset.json`` beside it or one folder above. ``selection`` is which structures, and what
        they are called. Raises InputError if a file cannot be used, or the labels lie on other voxels than the atlas.
        """
        image_name, labels_name = (
            str(one) if isinstance(one, str | os.PathLike) else word
            for one, word in ((image, "the atlas"), (labels, "the labels"))
        )
        # The names are cheap to check and come first: the scan may take seconds to read.
        tables: list[LabelTable] = [] if names is None else [read_names_file(names)]
        scan = open_image(image, series)
        label_map = open_labels(labels, scan, selection)
        for given in tables:
            if unknown := sorted(set(given) - set(label_values(label_map.data))):
                found = ", ".join(f"{value} ({given[value].name})" for value in unknown)
                logger.warning("%s: names values that %s does not have: %s", names, labels_name, found)
        if label_map.source is not None:
            tables.append(label_map.source.label_table)
        on_disk = isinstance(labels, str | os.PathLike)
        if on_disk and (dataset := dataset_json_of(Path(labels_name))) is not None:
            try:
                tables.append(read_names_file(dataset))
            except InputError as error:
                # Nobody asked for this file: it may belong to something else.
                logger.warning("%s; its names are not used", error)
        chosen = EVERYTHING if on_disk and is_dicom_input(Path(labels_name)) else selection
        return cls._built(scan, label_map, tables, image_name, labels_name, chosen)

    @classmethod
    def from_volumes(cls, atlas: Volume, labels: Volume, structures: Sequence[Structure] = ()) -> Atlas:
        """Make an annotated scan of intensities and whole numbers on the same voxels, in any array order.

        ``structures`` are names and colours; other label values get default ones. Raises InputError if the voxels
        cannot be used, or the labels lie on other voxels than the atlas.
        """
        given = {one.value: LabelEntry(one.name, one.color) for one in structures}
        return cls._built(atlas, load_labels(labels), [given], "the atlas", "the labels")

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
        own = Volume(np.ascontiguousarray(turned.data), scan.grid, labels.source)
        return cls(scan, *with_structures(own, tables, selection, labels_name))

    @property
    def values(self) -> tuple[int, ...]:
        """Label values, ascending."""
        return tuple(structure.value for structure in self.structures)

    @cached_property
    def present(self) -> tuple[int, ...]:
        """Label values that have a voxel, ascending: of an atlas matched to another one, not all may have."""
        return tuple(label_values(self.labels.data))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of ``values``."""
        return tuple(structure.name for structure in self.structures)

    @cached_property
    def numbered(self) -> Volume:
        """Labels as numbers of the structures, position in ``structures`` plus 1: small enough for tables over them."""
        known = np.array((0, *self.values), self.labels.data.dtype)
        numbers = np.empty(self.labels.grid.shape, smallest_label_type(len(self.structures)))
        for plane, out in zip(self.labels.data, numbers, strict=True):
            out[...] = np.searchsorted(known, plane)
        return Volume(numbers, self.labels.grid)

    def label_values(self, numbers: NDArray[Any], grid: Grid, query: Volume) -> Volume:
        """Turn numbers of structures, (I, J, K) on ``grid``, into label values on the query's grid as stored.

        ``grid`` is the query's in RAS-canonical array order. Values have the smallest type that holds all of the atlas.
        """
        values = np.array((0, *self.values), smallest_label_type(max(self.values)))
        return Volume(values[numbers], grid, query.source).turned_to(query.grid)

    def numbers_of(self, wanted: str, setting: str) -> frozenset[int]:
        """Find the numbers of structures by value, name or pattern with commas between, as a ``setting`` names them.

        Raises InputError if one of them fits none.
        """
        names = {one.value: one.name for one in self.structures}
        picked = pick_values(names, [*filter(None, wanted.split(","))], f"{setting}={wanted}: ")
        return frozenset(self.values.index(value) + 1 for value in picked)

    def matched(self, first: Atlas, name: str = "the atlas") -> Atlas:
        """Give its structures the values, names and colours that an atlas of the same names has for them.

        ``structures`` of the result are all of the ``first``; some may have no voxel. Raises InputError, with the
        ``name`` of this one, if it has a structure that the first does not have.
        """
        own, known = {one.name: one.value for one in self.structures}, {one.name: one.value for one in first.structures}
        if unknown := [one for one in own if one not in known]:
            raise InputError(
                f"{name}: has the structures {listed(unknown)}, which the first atlas does not have "
                f"({listed(tuple(known))}); give an atlas with all structures first, or choose them with --structures"
            )
        values = np.zeros(int(self.labels.data.max()) + 1, first.labels.data.dtype)
        for one, value in own.items():
            values[value] = known[one]
        labels = Volume(values[self.labels.data], self.labels.grid, self.labels.source)
        for one, value in own.items():
            mine, theirs = self._volume_ml(value), first._volume_ml(known[one])
            if not theirs / _LARGEST_RATIO < mine < theirs * _LARGEST_RATIO:
                text = "%s: %s has %.1f ml, and %.1f ml in the first atlas; is it the same structure?"
                logger.warning(text, name, one, mine, theirs)
        return Atlas(self.image, labels, first.structures)

    def _volume_ml(self, value: int) -> float:
        return int((self.labels.data == value).sum()) * self.labels.grid.voxel_volume_mm3 / 1000

    def __repr__(self) -> str:
        """Image and structures, on a few lines."""
        return f"Atlas({self.image!r}, {counted(len(self.structures), 'structure')}: {listed(self.names)})"


def is_same_scan(one: Volume, other: Volume) -> bool:
    """Check whether two scans in RAS-canonical array order have the same voxels at the same place."""
    return one.grid.matches(other.grid) and np.array_equal(one.data, other.data)


def canonical_scan(volume: Volume, name: str) -> Volume:
    """Check a scan, called ``name`` in messages, and turn it into float32 in RAS-canonical order.

    The result does not depend on a file's array order, to the last bit: memory has the canonical order too, as sums
    over strided views may round otherwise, and the origin is rounded to less than a hundredth of a voxel, as each array
    order stores another corner with a rounding error of its own. InputError as of checked_image().
    """
    turned = checked_image(volume.canonical(), name)
    data = np.ascontiguousarray(turned.data)
    affine = turned.grid.affine.copy()
    affine[:3, 3] = affine[:3, 3].round(_ORIGIN_DIGITS - math.ceil(math.log10(turned.grid.spacing_mm.min()))) + 0.0
    return Volume(data, Grid(turned.grid.shape, affine), volume.source)


def _mismatch(image: Volume, labels: Volume, image_name: str, labels_name: str) -> str:
    one, other = labels.grid.canonical(), image.grid.canonical()
    sizes = [" x ".join(map(str, grid.shape)) for grid in (one, other)]
    shapes = "" if one.shape == other.shape else f"it has {sizes[0]} voxels instead of {sizes[1]}, and "
    return (
        f"{labels_name}: not on the voxels of {image_name}: {shapes}its corners lie up to "
        f"{one.distance_mm(other):.1f} mm from the atlas' corners; "
        "resample the labels onto the atlas with nearest neighbour, or give the scan they were drawn on"
    )
