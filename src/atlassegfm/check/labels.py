"""Findings on label maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.errors import InputError
from ..core.image import WHOLE_WITHIN, Volume
from ..core.labels import dataset_json_of, read_names_file, structures_of
from .findings import Finding, LabelReport, list_items

#: At most this many different values make a label map (OASIS has 139 of them).
_MOST_LABELS = 1024
#: So few values are a label map wherever they lie: scans of five bits are not made.
_FEW_LABELS = 32
#: Larger values are no labels; 64 bits hold it, and so does a float exactly.
_LARGEST = 1 << 53
#: Share of neighbouring voxels, background left out, that are equal: 0.74 and above in label maps (hippocampus to
#: abdomen), 0.10 and below in scans, of all five development sets.
_LABELS_ALIKE = 0.5
#: Whole numbers among the values inside: a label map that was resampled smoothly keeps them in its middles.
_MOSTLY_WHOLE = 0.5
#: A part counts as a stray island when it is smaller than this share of its structure.
_STRAY_SHARE = 0.05
#: Structures of fewer voxels are lost by half a voxel of misregistration.
_FEW_VOXELS = 20


def looks_like_labels(volume: Volume, value_range: tuple[float, ...]) -> bool:
    """Whether values are names rather than amounts, by header and by how they lie."""
    source = volume.source
    if source is not None and source.label_table:
        return True
    if source is not None and source.nifti_header is not None and int(source.nifti_header["intent_code"]) == 1002:
        return True
    if not value_range or value_range[0] < 0 or value_range[0] == value_range[1]:
        return False
    data = volume.data
    if not np.issubdtype(data.dtype, np.integer) and data.dtype != bool:
        inside = data[data != 0]
        whole = np.isfinite(inside) & (inside == np.round(inside))
        if np.count_nonzero(whole) < _MOSTLY_WHOLE * inside.size:
            return False
        data = np.where(np.isfinite(data), np.round(data), 0)
    # Fewer values than this in a part are not more in the whole by orders of magnitude, and a part is fast.
    different = len(np.unique(data[tuple(slice(None, None, 1 + n // 128) for n in data.shape)]))
    if different <= _FEW_LABELS:
        return True
    return different <= _MOST_LABELS and max(_alike(data, axis) for axis in range(3)) >= _LABELS_ALIKE


def _alike(data: NDArray[Any], axis: int) -> float:
    """Share of neighbours along an axis, not both background, that have one value."""
    if data.shape[axis] < 2:
        return 0.0
    one = data[tuple(slice(None, -1) if n == axis else slice(None) for n in range(3))]
    other = data[tuple(slice(1, None) if n == axis else slice(None) for n in range(3))]
    counted = np.count_nonzero((one != 0) | (other != 0))
    return float(np.count_nonzero((one == other) & (one != 0)) / counted) if counted else 0.0


def label_reports(volume: Volume, path: Path) -> tuple[tuple[LabelReport, ...], list[Finding]]:
    """Each structure of a label map, and what there is to say about them."""
    data, grid = volume.data, volume.grid
    findings = []
    if not np.issubdtype(data.dtype, np.integer) and data.dtype != bool:
        finite = np.isfinite(data)
        data = np.where(finite, data, 0)
        fractions = int(np.count_nonzero(np.abs(data - np.round(data)) > WHOLE_WITHIN))
        if fractions:
            findings.append(
                Finding(
                    "error",
                    f"{fractions} voxels of what looks like a label map are not whole numbers: it was resampled "
                    "smoothly, which invents labels between neighbours, and the program refuses it",
                    "resample the original labels with nearest neighbour",
                )
            )
        else:
            findings.append(
                Finding(
                    "note",
                    f"the labels are stored as {data.dtype}: they are read as whole numbers, and results are written "
                    "in the smallest integer type that holds them",
                )
            )
        data = np.round(data).clip(-_LARGEST, _LARGEST).astype(np.int64)
    if data.min() < 0:
        findings.append(
            Finding("error", f"the label map has the value {int(data.min())}: the program refuses it", "renumber it")
        )
    values, ranks = _numbered(data)
    positive = values.tolist()
    tables = [volume.source.label_table] if volume.source else []
    dataset = dataset_json_of(path)
    if dataset is not None:
        try:
            tables.append(read_names_file(dataset))
        except InputError as error:
            text = str(error).replace(str(dataset), dataset.name)
            findings.append(Finding("warning", f"the names of the labels are not readable ({text})"))
    structures = structures_of(positive, tables)
    unnamed = [value for value in positive if not any(value in table for table in tables)]
    if unnamed and len(unnamed) < len(positive):
        findings.append(
            Finding(
                "warning",
                f"no name for label {list_items(unnamed)} although others have one: are they meant?",
                "add them to the names, or remove them from the label map",
            )
        )
    elif unnamed:
        findings.append(
            Finding("note", "neither the header nor a dataset.json names the labels", "give a names file with --names")
        )
    reports = []
    tiny, cut, islands, several = [], [], [], []
    for number, (structure, box) in enumerate(zip(structures, ndimage.find_objects(ranks), strict=True), start=1):
        mask = ranks[box] == number
        components, parts = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        voxels = int(sizes.sum())
        stray = int(np.count_nonzero(sizes < _STRAY_SHARE * voxels))
        if voxels < _FEW_VOXELS:
            tiny.append(f"{structure.name} ({voxels})")
        if stray:
            islands.append(f"{structure.name} ({stray})")
        if parts - stray > 1:
            several.append(f"{structure.name} ({parts - stray})")
        if any(side.start == 0 or side.stop == n for side, n in zip(box, grid.shape, strict=True) if n > 1):
            cut.append(structure.name)
        reports.append(
            LabelReport(structure.value, structure.name, voxels, voxels * grid.voxel_volume_mm3 / 1000, parts, stray)
        )
    if tiny:
        findings.append(
            Finding(
                "warning",
                f"fewer than {_FEW_VOXELS} voxels: {list_items(tiny)}; half a voxel of misregistration loses them",
                "annotate them on a finer scan, or remove stray clicks",
            )
        )
    if cut:
        findings.append(
            Finding(
                "warning",
                f"cut off by the border of the field of view: {list_items(cut)}; as an atlas, this scan can only find "
                "the part it shows",
                "take an atlas that shows them whole, where there is one",
            )
        )
    if islands:
        findings.append(
            Finding(
                "note",
                f"stray islands of less than {_STRAY_SHARE:.0%} of their structure: {list_items(islands)}; they are "
                "carried over to the results",
                "remove them if they are not meant",
            )
        )
    if several:
        findings.append(
            Finding(
                "note",
                f"several large parts: {list_items(several)}; a click or a box prompts the model for the largest only",
                "give left and right values of their own, or use mask prompts",
            )
        )
    return tuple(reports), findings


def _numbered(data: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Label values above 0 in ascending order, (N,), and the map of their positions from 1, (I, J, K).

    So that values of 32 bits need no table of that size, and 0 is whatever is no label. Slice by slice, because
    sorting a whole large scan takes minutes.
    """
    slices = range(data.shape[2])
    found = np.unique(np.concatenate([np.unique(data[:, :, k]) for k in slices]).astype(np.int64))
    values = found[found > 0]
    ranks = np.zeros(data.shape, np.int32)
    for k in slices:
        one = data[:, :, k]
        ranks[:, :, k] = np.where(one > 0, np.searchsorted(values, one) + 1, 0)
    return values, ranks
