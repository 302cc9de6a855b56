"""Slices through a scan in radiological display: planes, intensity windows, outlines, edge letters.

Slices follow the voxel axes as acquired: nothing is interpolated between thick slices. The letters at the edges give
the anatomical direction, two where it lies between two axes, as in DICOM.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.image import Volume

_Floats = NDArray[np.float64]
#: Cosine above which a direction gets a letter: an edge within 17 degrees of an axis has one letter.
_LETTER_COSINE = 0.3
#: Tilts from here on are written, in degrees.
_TILT = 3.0
#: Lengths of scale bars, mm.
_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)
#: Smallest view (mm) and margin (fraction of the extent; at least, mm) around one structure, and around all of them.
_STRUCTURE_VIEW_MM, _STRUCTURE_MARGIN, _MARGIN_MM = 70.0, 0.35, 20.0
_OVERVIEW_MM, _OVERVIEW_MARGIN = 100.0, 0.22
#: Width for which the outlines of a page are computed, px; tolerance of their simplification, mm.
_PANEL_PX, _TOLERANCE_MM = 420.0, 0.08
#: Width of a thumbnail, px.
_THUMBNAIL_PX = 200
#: Air on CT is below the first; the intensity range of CT is above the second, HU.
_AIR_HU, _CT_RANGE_HU = -900.0, 1000.0
#: CT windows: largest median inside the structure, name, level and width, HU.
_CT_WINDOWS = ((-400.0, "lung", -600.0, 1500.0), (200.0, "soft tissue", 40.0, 400.0), (np.inf, "bone", 400.0, 1800.0))
#: Grey of a slice whose scan is missing.
_NO_SCAN_GREY = 24


class View(NamedTuple):
    """One of the three planes of a canonical (RAS) volume: axes along the normal, against the rows and the columns."""

    name: str
    normal: int
    right: int
    down: int


#: Radiological display: the patient's right at the left, front at the top or left, head at the top.
VIEWS = (View("axial", 2, 0, 1), View("coronal", 1, 0, 2), View("sagittal", 0, 1, 2))


@dataclass(frozen=True)
class Panel:
    """One slice: the voxels of ``box``, on slice ``index`` along the normal."""

    view: View
    index: int
    box: tuple[slice, ...]
    width_mm: float
    height_mm: float

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width_mm / self.height_mm


@dataclass(frozen=True)
class Window:
    """Intensities shown black and white, and the name of the window."""

    low: float
    high: float
    name: str = ""

    def grey(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Scale intensities to [0, 1]."""
        fraction = (np.asarray(values, np.float32) - self.low) / (self.high - self.low)
        return np.asarray(np.clip(fraction, 0, 1), np.float32)


# Planes


def structure_panels(
    mask: NDArray[np.bool_], offset: Sequence[int], shape: Sequence[int], spacing_mm: _Floats
) -> list[Panel]:
    """Choose three slices of largest area through a structure, a mask on its box from voxel ``offset`` of a scan on."""
    size_mm = np.array(mask.shape) * spacing_mm
    margin_mm = np.maximum(max(_STRUCTURE_MARGIN * size_mm.max(), _MARGIN_MM), (_STRUCTURE_VIEW_MM - size_mm) / 2)
    areas = [mask.sum(axis=(view.right, view.down))[:, None] for view in VIEWS]
    indices = [offset[view.normal] + best_slice(area) for view, area in zip(VIEWS, areas, strict=True)]
    box = [slice(first, first + count) for first, count in zip(offset, mask.shape, strict=True)]
    return _panels(indices, box, margin_mm, shape, spacing_mm)


def overview_panels(labels: NDArray[Any], count: int, spacing_mm: _Floats) -> list[Panel]:
    """Choose three slices through structures 1 to ``count``, the plane of acquisition first."""
    boxes = ndimage.find_objects((labels > 0).astype(np.uint8)) or [tuple(slice(0, count) for count in labels.shape)]
    size_mm = np.array([side.stop - side.start for side in boxes[0]]) * spacing_mm
    margin_mm = np.maximum(_OVERVIEW_MARGIN * size_mm.max(), (_OVERVIEW_MM - size_mm) / 2)
    indices = [best_slice(_areas(labels, count, view.normal)) for view in VIEWS]
    panels = _panels(indices, boxes[0], margin_mm, labels.shape, spacing_mm)
    acquired = acquisition_view(spacing_mm)
    return sorted(panels, key=lambda panel: panel.view is not acquired)


def acquisition_view(spacing_mm: _Floats) -> View:
    """Find the plane of the finest voxels; axial for isotropic voxels."""
    return next(view for view in VIEWS if spacing_mm[view.normal] >= 0.99 * float(spacing_mm.max()))


def best_slice(areas: NDArray[np.int64]) -> int:
    """Find the slice that shows most of most structures by their areas, (slices, structures); the middle one if none.

    Each structure votes with the root of its area relative to its largest section, whatever its size.
    """
    largest = areas.max(axis=0, initial=0)
    present = largest > 0
    if not present.any():
        return len(areas) // 2
    votes = np.sqrt(areas[:, present] / largest[present]).sum(axis=1)
    best = np.flatnonzero(votes >= votes.max() - 1e-9)
    return int(best[len(best) // 2])


def _areas(labels: NDArray[Any], count: int, axis: int) -> NDArray[np.int64]:
    """Count the voxels (slices, structures) on each slice; slice by slice, to save memory."""
    slices = np.ascontiguousarray(np.moveaxis(labels, axis, 0))
    return np.array([np.bincount(one.ravel(), minlength=count + 1) for one in slices], np.int64)[:, 1:]


def _panels(
    indices: Sequence[int], box: Sequence[slice], margin_mm: _Floats, shape: Sequence[int], spacing_mm: _Floats
) -> list[Panel]:
    """Show a box and a margin around it within the scan, on one slice of each plane."""
    margin = margin_mm / spacing_mm
    start = np.maximum(np.floor([side.start for side in box] - margin), 0).astype(int)
    stop = np.minimum(np.ceil([side.stop for side in box] + margin), shape).astype(int)
    shown, width = tuple(map(slice, start.tolist(), stop.tolist())), ((stop - start) * spacing_mm).tolist()
    return [Panel(view, n, shown, width[view.right], width[view.down]) for view, n in zip(VIEWS, indices, strict=True)]


def cut(array: NDArray[Any], panel: Panel) -> NDArray[Any]:
    """Cut a slice as a picture: rows downwards, columns to the right."""
    part: list[slice | int] = list(panel.box)
    part[panel.view.normal] = panel.index
    return array[tuple(part)][::-1, ::-1].T


# Directions and lengths


def letters(direction: _Floats) -> str:
    """Name the direction of a (3,) unit vector in RAS+: "R", or "RA" between two axes, the strongest first."""
    order = np.argsort(-np.abs(direction), kind="stable")
    return "".join(("LPI", "RAS")[int(direction[a] > 0)][a] for a in order if abs(direction[a]) > _LETTER_COSINE)


def edge_letters(affine: _Floats, view: View) -> tuple[str, str, str, str]:
    """Name the directions of the left, right, top and bottom edge of a slice of a canonical scan."""
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    right, down = -direction[:, view.right], -direction[:, view.down]
    return letters(-right), letters(right), letters(-down), letters(down)


def tilt_remark(affine: _Floats, view: View) -> str:
    """Say how far a slice is tilted from the world plane it is named after; empty below 3 degrees."""
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    normal = np.cross(direction[:, view.right], direction[:, view.down])
    cosine = abs(float(normal[view.normal])) / float(np.linalg.norm(normal))
    tilt = float(np.degrees(np.arccos(min(cosine, 1.0))))
    return f"tilted {tilt:.0f}°" if tilt >= _TILT else ""


def bar_length_mm(width_mm: float) -> int:
    """Choose the scale bar: at most 30 % of the width."""
    return max(length for length in _BARS_MM if length <= max(0.3 * width_mm, _BARS_MM[0]))


# Intensities


def is_hounsfield(image: Volume) -> bool:
    """Check whether intensities look like CT in HU: air, and bone above it."""
    low, high = _percentiles(image.data, 1, 99.9)
    return low < _AIR_HU and high - low > _CT_RANGE_HU


def structure_window(image: Volume, inside: NDArray[np.bool_], box: tuple[slice, ...], *, hounsfield: bool) -> Window:
    """Choose the window for one structure, a mask on the shown box, and its surroundings; a CT window for HU."""
    part = np.asarray(image.data[box], dtype=np.float32)
    values = part[inside] if inside.any() else part.ravel()
    if hounsfield:
        middle = float(np.median(values))
        _, name, level, width = next(row for row in _CT_WINDOWS if middle <= row[0])
        return Window(level - width / 2, level + width / 2, f"{name}, L {level:.0f} W {width:.0f} HU")
    low, dark, bright, high = _percentiles(part, 0.5, 20, 85, 99.7)
    first, last = np.percentile(values, (3, 97)).tolist()
    # The structure's range and as much on both sides, but most of its surroundings too.
    span = max(last - first, 0.15 * (high - low))
    low, high = max(low, min(dark, first - 1.2 * span)), min(high, max(bright, last + 0.8 * span))
    if not high > low:
        low, high = float(part.min()), float(part.max())
    high = high if high > low else low + 1
    return Window(low, high, f"{low:.4g} to {high:.4g}")


def overview_window(data: NDArray[Any], labels: NDArray[Any], panel: Panel) -> Window:
    """Choose the window for all structures: percentiles of the view, narrowed to the range of the structures."""
    low, high = _percentiles(data[panel.box], 1.0, 99.9)
    inside = data[labels > 0]
    if inside.size:
        first, last = _percentiles(inside, 3, 97)
        span = max(last - first, 0.08 * (high - low))
        low, high = max(low, first - 1.6 * span), min(high, last + 0.8 * span)
    if not high > low:
        low, high = _percentiles(data[panel.box], 0, 100)
    return Window(low, high) if high > low else Window(low - 1, low + 1)


def _percentiles(values: NDArray[Any], *percents: float) -> list[float]:
    """Compute percentiles of every nth value, about a million."""
    step = int(np.ceil((values.size / 1e6) ** (1 / values.ndim)))
    part = np.asarray(values[(slice(None, None, step),) * values.ndim], dtype=np.float32)
    return list(np.percentile(part, percents).tolist())


# Outlines


def smooth_mask(
    mask: NDArray[np.bool_], pixel_mm: tuple[float, float], px_per_mm: float
) -> tuple[_Floats, _Floats, NDArray[np.float32]]:
    """Upsample a mask, not empty, for outlines without staircase; the value at every voxel centre stays.

    ``pixel_mm`` is width and height of a voxel. Returns x, (W,), and y, (H,), in mm from the upper left corner of the
    slice, and the level, (H, W), which is 0.5 on the border.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    margin = 3
    # Background around it closes the outline at the edge of the slice.
    padded = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], margin).astype(np.float32)
    first = np.array([rows[0] - margin, columns[0] - margin])
    steps = [int(np.clip(np.ceil(size_mm * px_per_mm / 2.5), 1, 12)) for size_mm in (pixel_mm[1], pixel_mm[0])]
    at = [np.linspace(0, n - 1, (n - 1) * step + 1) for n, step in zip(padded.shape, steps, strict=True)]
    grid = np.meshgrid(at[0], at[1], indexing="ij")
    level = ndimage.map_coordinates(padded, grid, order=3, mode="constant").astype(np.float32)
    return (at[1] + first[1] + 0.5) * pixel_mm[0], (at[0] + first[0] + 0.5) * pixel_mm[1], level


def outline(mask: NDArray[np.bool_], panel: Panel) -> str:
    """Trace a mask on a slice as an SVG path, mm from the upper left corner; empty for an empty mask."""
    from skimage.measure import approximate_polygon, find_contours

    if not mask.any():
        return ""
    pixel_mm = (panel.width_mm / mask.shape[1], panel.height_mm / mask.shape[0])
    xs, ys, level = smooth_mask(mask, pixel_mm, _PANEL_PX / max(panel.width_mm, panel.height_mm))
    step_x, step_y = float(xs[1] - xs[0]), float(ys[1] - ys[0])
    lines = [line[:, ::-1] * (step_x, step_y) + (xs[0], ys[0]) for line in find_contours(level, 0.5)]
    polygons = [polygon for line in lines if len(polygon := approximate_polygon(line, _TOLERANCE_MM)) > 2]
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in polygon) + "Z" for polygon in polygons)


# Pictures for pages


def slice_figure(
    image: Volume | None, panel: Panel, window: Window | None, masks: Mapping[str, NDArray[np.bool_]], affine: _Floats
) -> dict[str, Any]:
    """Build a slice for a page from a canonical scan (grey without one), its affine and masks by kind, lowest first."""
    tilt = tilt_remark(affine, panel.view)
    return {
        "uri": _picture(image, panel, window),
        "width_mm": panel.width_mm,
        "height_mm": panel.height_mm,
        "name": f"{panel.view.name} {panel.index + 1}" + (f", {tilt}" if tilt else ""),
        "letters": edge_letters(affine, panel.view),
        "bar_mm": bar_length_mm(panel.width_mm),
        "outlines": [(kind, path) for kind, mask in masks.items() if (path := outline(mask, panel))],
    }


def projection_figure(panel: Panel, masks: Mapping[str, NDArray[np.bool_]], affine: _Floats) -> dict[str, Any]:
    """Build a projection of masks along the normal of a panel, as :func:`slice_figure`: a vessel leaves every slice.

    Masks, by kind, are on the panel's box.
    """
    axis = panel.view.normal
    flat = tuple(slice(0, 1 if a == axis else side.stop - side.start) for a, side in enumerate(panel.box))
    onto = replace(panel, index=0, box=flat)
    projected = {kind: cut(np.asarray(mask.any(axis=axis, keepdims=True)), onto) for kind, mask in masks.items()}
    return slice_figure(None, onto, None, projected, affine) | {"name": f"{panel.view.name}, projected"}


def thumbnail(
    image: Volume | None, labels: NDArray[Any], colors: Mapping[int, Sequence[int]], panel: Panel, window: Window | None
) -> dict[str, Any]:
    """Build a small slice with all structures in their colours: uri, width, height, and (colour, path) of outlines."""
    shown = cut(labels, panel)
    return {
        "uri": _picture(image, panel, window, small=True),
        "width": round(panel.width_mm, 1),
        "height": round(panel.height_mm, 1),
        "outlines": [
            (list(colors[int(value)]), path)
            for value in np.unique(shown[shown > 0])
            if (path := outline(shown == value, panel))
        ],
    }


def _picture(image: Volume | None, panel: Panel, window: Window | None, *, small: bool = False) -> str:
    """Encode a slice as a data URI: PNG, or a small JPEG."""
    from PIL import Image

    values = np.full((1, 1), _NO_SCAN_GREY, np.uint8)
    if image is not None and window is not None:
        values = np.rint(255 * window.grey(cut(image.data, panel))).astype(np.uint8)
    picture, stream = Image.fromarray(np.ascontiguousarray(values)), io.BytesIO()
    kind = "jpeg" if small and image is not None else "png"
    if kind == "jpeg":
        picture = picture.resize((_THUMBNAIL_PX, max(1, round(_THUMBNAIL_PX / panel.aspect))))
    picture.save(stream, format=kind, quality=72, optimize=kind == "png")
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode("ascii")
