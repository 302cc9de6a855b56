"""Findings on label maps."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.errors import InputError
from ..core.image import WHOLE_WITHIN, Volume, label_boxes, label_values
from ..core.labels import LabelTable, dataset_json_of, read_names_file, structures_of
from .findings import Finding, LabelReport, list_items, note, warning

#: Most different values of a label map.
_MOST_LABELS = 1024
#: Least fraction of neighbouring voxels, background left out, that are equal in a label map, and in one of so few
#: values that is mostly background: scans of five bits are noise.
_LEAST_EQUAL, _FEW_LABELS, _LEAST_EQUAL_OF_FEW = 0.5, 32, 0.1
#: Least fraction of whole numbers among nonzero values: label maps that were resampled smoothly keep them inside.
_MOSTLY_WHOLE = 0.5
#: A part is a stray island below this fraction of its structure.
_STRAY_FRACTION = 0.05
#: Structures of fewer voxels are lost by half a voxel of misregistration.
_FEW_VOXELS = 20


def looks_like_labels(volume: Volume, value_range: tuple[float, ...]) -> bool:
    """Decide whether values are names rather than amounts, by header, number and neighbours."""
    source, data = volume.source, volume.data
    header = None if source is None else source.nifti_header
    if (source and source.label_table) or (header is not None and int(header["intent_code"]) == 1002):
        return True
    if not value_range or value_range[0] < 0 or value_range[0] == value_range[1]:
        return False
    if data.dtype.kind not in "iub":
        inside = data[data != 0]
        whole = np.abs(np.where(np.isfinite(inside), inside, 0.5) % 1 - 0.5) >= 0.5 - WHOLE_WITHIN
        if np.count_nonzero(whole) < _MOSTLY_WHOLE * inside.size:
            return False
        data = np.where(np.isfinite(data), np.round(data), 0)
    # A part has nearly as many different values as the whole, and is fast.
    part = data[tuple(slice(None, None, 1 + n // 128) for n in data.shape)]
    different, counts = np.unique(part, return_counts=True)
    background = different[counts.argmax()]  # 0, or what a scan has around the body
    few = len(different) <= _FEW_LABELS and 2 * counts.max() >= part.size
    least = _LEAST_EQUAL_OF_FEW if few else _LEAST_EQUAL
    return len(different) <= _MOST_LABELS and max(_equal_fraction(data, axis, background) for axis in range(3)) >= least


def _equal_fraction(data: NDArray[Any], axis: int, background: float) -> float:
    """Fraction of neighbours along an axis, not both background, that have one value."""
    along = np.moveaxis(data, axis, 0)
    one, other = along[:-1], along[1:]
    counted = int(np.count_nonzero((one != background) | (other != background)))
    return int(np.count_nonzero((one == other) & (one != background))) / max(counted, 1)


def label_reports(volume: Volume, path: Path) -> tuple[tuple[LabelReport, ...], list[Finding]]:
    """Describe the structures of a label map, and find what is odd about it."""
    data, grid = volume.data, volume.grid
    findings: list[Finding] = []
    values = label_values(data)
    boxes = label_boxes(values, data)
    tables = [volume.source.label_table] if volume.source else []
    if (dataset := dataset_json_of(path)) is not None:
        try:
            tables.append(read_names_file(dataset))
        except InputError as refusal:
            reason = str(refusal).replace(str(dataset), dataset.name)
            findings.append(warning(f"the names of the labels are not readable ({reason})"))
    findings += _name_findings(values, tables)
    reports, cut = [], []
    for structure in structures_of(values, tables):
        box = boxes[structure.value]
        components, parts = ndimage.label(data[box] == structure.value, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        voxels = int(sizes.sum())
        stray = int(np.count_nonzero(sizes < _STRAY_FRACTION * voxels))
        volume_ml = voxels * grid.voxel_volume_mm3 / 1000
        reports.append(LabelReport(structure.value, structure.name, voxels, volume_ml, parts, stray))
        if any(side.start == 0 or side.stop == n for side, n in zip(box, grid.shape, strict=True) if n > 1):
            cut.append(structure.name)
    return tuple(reports), [*findings, *_structure_findings(reports, cut)]


def _name_findings(values: Sequence[int], tables: Sequence[LabelTable]) -> Iterator[Finding]:
    unnamed = [value for value in values if not any(value in table for table in tables)]
    if unnamed and len(unnamed) < len(values):
        yield warning(
            f"no name for label {list_items(unnamed)} although others have one: are they meant?",
            "add them to the names, or remove them from the label map",
        )
    elif unnamed:
        yield note("neither the header nor a dataset.json names the labels", "give a names file with --names")


def _structure_findings(reports: Sequence[LabelReport], cut: Sequence[str]) -> Iterator[Finding]:
    """Findings on sizes, borders and parts; ``cut`` names the structures at the border of the field of view."""
    tiny = [f"{one.name} ({one.voxels})" for one in reports if one.voxels < _FEW_VOXELS]
    islands = [f"{one.name} ({one.stray})" for one in reports if one.stray]
    several = [f"{one.name} ({one.parts - one.stray})" for one in reports if one.parts - one.stray > 1]
    if tiny:
        text = f"fewer than {_FEW_VOXELS} voxels: {list_items(tiny)}; half a voxel of misregistration loses them"
        yield warning(text, "annotate them on a finer scan, or remove stray clicks")
    if cut:
        text = f"cut off by the border of the field of view: {list_items(cut)}; an atlas only finds the part it shows"
        yield warning(text, "take an atlas that shows them whole, where there is one")
    if islands:
        text = f"stray islands of less than {_STRAY_FRACTION:.0%} of their structure: {list_items(islands)}"
        yield note(f"{text}; they are carried over to the results", "remove them if they are not meant")
    if several:
        text = f"several large parts: {list_items(several)}; a click or a box prompts the model for the largest only"
        yield note(text, "give left and right values of their own, or use mask prompts")
