"""Findings on headers and grids, and on pairs of files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.geometry import Grid
from ..core.image import EXTENT_MM, Volume, image_stem
from ..dicom import DicomSource
from .findings import FileReport, Finding, PairReport, note, sort_findings, warning

#: Least ratio of slice distance and in-plane spacing to warn of: T2 abdomens of CHAOS have 6, thin-slice CT below 4.
_ANISOTROPIC = 4.0
#: Degrees from which axes are called sheared (0.5 mm over 300 mm; rounded headers reach 0.01), and oblique.
_SHEARED_DEG, _OBLIQUE_DEG = 0.1, 0.1
#: Least and greatest field of view of people, in mm: inner ear, and whole body (2 m).
_FIELD_OF_VIEW_MM = (15.0, 2500.0)
#: Voxels along two axes from which on a spacing of exactly 1 x 1 x 1 mm has probably been lost: scanners' bores are
#: 500 to 800 mm wide, and 512 x 512 pixels the common matrix.
_WIDEST_AT_UNIT_SPACING = 512
#: Nodes along each axis for overlaps: exact to 1 / 24 of an axis, 4 %.
_OVERLAP_NODES = 24
#: Fields of view that overlap by at least this much on both sides are taken for one.
_SAME_VIEW_PERCENT = 90.0
#: Effect and remedy by a word in a note of :mod:`~atlassegfm.core.image`; "" for all other notes.
_HEADER_NOTES = {
    "no orientation": (
        "left and right may be swapped, and the start of the registration is a guess",
        "convert the file from DICOM again with a tool that keeps the orientation, or set the sform",
    ),
    "differ": (
        "other programs may follow the qform and show the result displaced by that much",
        "make both agree: write the sform into the qform, or the other way round if that one is right",
    ),
    "": ("programs that follow the qform cannot place the file", "write the sform into the qform"),
}


def header_findings(volume: Volume) -> Iterator[Finding]:
    """Find what is odd about the header's geometry, from the notes made on reading."""
    for remark in volume.source.notes if volume.source else ():
        if isinstance(volume.source, DicomSource):
            yield warning(remark)
        else:
            effect, remedy = next(found for word, found in _HEADER_NOTES.items() if word in remark)
            yield warning(f"{remark}: {effect}", remedy)


def grid_findings(grid: Grid) -> Iterator[Finding]:
    """Find what is unusual in shape, spacing (mm) and axes of a grid."""
    spacing = np.sort(grid.spacing_mm)
    extent_mm = np.array(grid.shape) * grid.spacing_mm
    size = " x ".join(f"{mm:.4g}" for mm in extent_mm)
    longest, (smallest, largest) = extent_mm.max(), _FIELD_OF_VIEW_MM
    if not EXTENT_MM[0] <= longest <= EXTENT_MM[1]:
        pass  # refused by the reader, which says so
    elif not smallest <= longest <= largest:
        suspicion = "too large for a person: is the spacing in micrometres?"
        if longest < smallest:
            suspicion = "too small for a part of a person: is the spacing in metres or centimetres?"
        yield warning(
            f"the field of view is {size} mm, {suspicion} All distances in mm (smoothing, margins, error sizes) "
            "would be wrong",
            "correct the spacing or the unit in the header",
        )
    elif np.allclose(spacing, 1, atol=1e-6) and np.sort(grid.shape)[1] >= _WIDEST_AT_UNIT_SPACING:
        yield warning(
            f"the spacing is 1 x 1 x 1 mm and the field of view {size} mm: the true spacing seems to be lost, and "
            "the scan would be registered at a wrong size and shape",
            "convert the file from DICOM again, or set the true spacing in the header",
        )
    ratio = float(spacing[2] / spacing[1])
    if ratio > _ANISOTROPIC:
        yield warning(
            f"slices are {spacing[2]:.3g} mm apart, {ratio:.1f} times the in-plane spacing: structures thinner "
            f"than {2 * spacing[2]:.3g} mm lie in one or two slices, and no end is placed better than to a slice",
            "prefer a thin-slice series, above all as the atlas; do not interpolate slices beforehand",
        )
    sheared = sheared_deg(grid)
    if sheared > _SHEARED_DEG:
        yield note(
            f"the voxel axes are {sheared:.1f} degrees off a right angle (a tilted gantry?): handled here, but "
            "NRRD, MetaImage and programs built on ITK cannot hold such a grid",
            "give results to those programs after resampling scan and result to right-angled axes",
        )
    oblique = oblique_deg(grid)
    if oblique > _OBLIQUE_DEG:
        yield note(
            f"the slices are turned by {oblique:.1f} degrees against the patient's axes: handled here; programs "
            "that ignore the rotation show the result beside the anatomy"
        )


def oblique_deg(grid: Grid) -> float:
    """Compute the largest angle between a voxel axis and the world axis next to it, degrees."""
    unit = np.abs(grid.affine[:3, :3] / grid.spacing_mm)
    return float(np.degrees(np.arccos(np.clip(unit.max(axis=0), 0, 1))).max())


def sheared_deg(grid: Grid) -> float:
    """Compute the largest deviation of two voxel axes from a right angle, degrees."""
    unit = grid.affine[:3, :3] / grid.spacing_mm
    cosines = np.abs(unit.T @ unit)[np.triu_indices(3, 1)]
    return float(np.degrees(np.arcsin(np.clip(cosines, 0, 1))).max())


def compare_grids(first: FileReport, one: Grid, second: FileReport, other: Grid) -> PairReport:
    """Compare the grids of two files."""
    distance_mm = one.distance_mm(other) if one.shape == other.shape else None
    overlap = (_overlap_percent(one, other), _overlap_percent(other, one))
    centres_mm = float(np.linalg.norm(one.centre_mm - other.centre_mm))
    pair = PairReport(first.name, second.name, one.matches(other), distance_mm, centres_mm, overlap, ())
    findings = _pair_findings(pair, first, second, reordered=one.axes_relative_to(other) is not None)
    return replace(pair, findings=sort_findings([*findings]))


def _pair_findings(pair: PairReport, first: FileReport, second: FileReport, *, reordered: bool) -> Iterator[Finding]:
    """Findings on two grids; ``reordered``: they have the same voxels in some array order."""
    distance_mm, overlap = pair.distance_mm, pair.overlap_percent
    if not pair.same_grid and reordered:
        yield note(
            f"the same voxels in another order ({first.axes} and {second.axes}): handled here; programs that pair "
            "arrays by index mix them up"
        )
    elif not pair.same_grid and (first.kind == "labels") != (second.kind == "labels"):
        if distance_mm is not None and (min(overlap) >= _SAME_VIEW_PERCENT or same_case(pair.first, pair.second)):
            yield warning(
                f"the same shape, but corners up to {distance_mm:.3g} mm apart: if the labels were drawn on this "
                "scan, one of the headers is wrong, and the two are refused as an atlas",
                "find out which header is right, and copy its geometry to the other file",
            )
        else:
            text = "a scan and a label map on different grids: refused as an atlas, fine for different patients"
            yield note(text, "if the labels belong to this scan, resample them to it with nearest neighbour")
    if max(overlap) == 0:
        yield note(
            f"no common field of view in scanner coordinates (centres {pair.centres_mm:.0f} mm apart): usual for "
            "different patients, and the search of the registration copes; not if its rigid stage is switched off"
        )


def same_case(first: str, second: str) -> bool:
    """Check whether two file names belong to one case: "case" and "case_0000", "scan" and "scan_labels"."""
    one, other = image_stem(Path(first)), image_stem(Path(second))
    return one.startswith(other) or other.startswith(one)


def _overlap_percent(of: Grid, within: Grid) -> float:
    """How much of the field of view of one grid lies in that of another, percent."""
    # Middles of equal cells, so that each node stands for the same volume.
    along = [(np.arange(min(n, _OVERLAP_NODES)) + 0.5) / min(n, _OVERLAP_NODES) * n - 0.5 for n in of.shape]
    ijk = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1)
    return 100 * float(within.contains(of.voxel_to_world(ijk)).mean())
