"""Slices with outlines for a page: the scan as a PNG in the page, the outlines as lines over it.

Lines stay sharp however large the page shows them, and each kind can be switched off.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.image import Volume
from .page import text
from .planes import BARS_MM, VIEWS, Panel, View, cut, letters, smooth_mask, thinned, tilt_degrees

#: Around a single structure, on each side: this share of its extent, but so many mm at least.
_MARGIN_SHARE, _MARGIN_MM = 0.35, 20.0
#: A structure is shown with at least this much around it, mm.
_SMALLEST_VIEW_MM = 70.0
#: Outlines are computed as for a panel of this width.
_PANEL_PX = 420.0
#: Width of a small picture in the page of a cohort.
_THUMB_PX = 200
#: Points closer to a line than this share of a mm are left out of an outline.
_TOLERANCE_MM = 0.08
#: On CT in Hounsfield units air is below this, and the range is above that.
_AIR_HU, _CT_RANGE_HU = -900.0, 1000.0
#: The usual CT windows, level and width in HU, and the median inside a structure up to which each is taken.
_CT_WINDOWS = ((-400.0, "lung", -600.0, 1500.0), (200.0, "soft tissue", 40.0, 400.0), (np.inf, "bone", 400.0, 1800.0))


@dataclass(frozen=True)
class Window:
    """Intensities shown black and white, and what the window is called."""

    low: float
    high: float
    name: str


def is_hounsfield(image: Volume) -> bool:
    """Whether intensities are those of CT in HU: air is there, and bone above it."""
    shown = thinned(image.data)
    low, high = (float(v) for v in np.percentile(shown, (1, 99.9)))
    return low < _AIR_HU and high - low > _CT_RANGE_HU


def structure_window(image: Volume, inside: NDArray[np.bool_], box: tuple[slice, ...], *, hounsfield: bool) -> Window:
    """A window for one structure and what is around it.

    Parameters
    ----------
    image : Volume
        The scan.
    inside : array of bool
        The structure, on the voxels of ``box``.
    box : tuple of slice, (3,)
        The part that is shown.
    hounsfield : bool
        Whether the usual windows of CT apply.
    """
    part = np.asarray(image.data[box], dtype=np.float32)
    values = part[inside] if inside.any() else part.ravel()
    if hounsfield:
        middle = float(np.median(values))
        _, name, level, width = next(row for row in _CT_WINDOWS if middle <= row[0])
        return Window(level - width / 2, level + width / 2, f"{name}, L {level:.0f} W {width:.0f} HU")
    low, dark, bright, high = (float(v) for v in np.percentile(thinned(part), (0.5, 20, 85, 99.7)))
    first, last = (float(v) for v in np.percentile(values, (3, 97)))
    # The structure's own range and as much again on both sides, but most of what is around it too.
    span = max(last - first, 0.15 * (high - low))
    low, high = max(low, min(dark, first - 1.2 * span)), min(high, max(bright, last + 0.8 * span))
    if not high > low:
        low, high = float(part.min()), float(part.max())
        high = high if high > low else low + 1
    return Window(low, high, f"{low:.4g} to {high:.4g}")


def panels_of(
    mask: NDArray[np.bool_], offset: Sequence[int], shape: Sequence[int], spacing_mm: NDArray[np.float64]
) -> list[Panel]:
    """Three planes through a structure, where each shows most of it.

    Parameters
    ----------
    mask : array of bool
        The structure in its own box; not empty.
    offset : sequence of int, (3,)
        First voxel of that box in the scan.
    shape : sequence of int, (3,)
        Of the scan.
    spacing_mm : array, (3,)
        Of the scan.
    """
    start = np.array(offset)
    stop = start + mask.shape
    size = (stop - start) * spacing_mm
    margin = np.maximum(np.maximum(_MARGIN_SHARE * size.max(), _MARGIN_MM), (_SMALLEST_VIEW_MM - size) / 2)
    first = np.maximum(np.floor(start - margin / spacing_mm).astype(int), 0)
    last = np.minimum(np.ceil(stop + margin / spacing_mm).astype(int), shape)
    extent = (last - first) * spacing_mm
    panels = []
    for view in VIEWS:
        areas = mask.sum(axis=tuple(axis for axis in range(3) if axis != view.normal))
        best = np.flatnonzero(areas == areas.max())
        panels.append(
            Panel(
                view,
                int(start[view.normal] + best[len(best) // 2]),
                (int(first[0]), int(first[1]), int(first[2])),
                (int(last[0]), int(last[1]), int(last[2])),
                float(extent[view.right]),
                float(extent[view.down]),
            )
        )
    return panels


def picture(image: Volume | None, panel: Panel, window: Window | None) -> str:
    """The slice as a data URI; an even grey without a scan."""
    from PIL import Image

    if image is None or window is None:
        grey = np.full((1, 1), 24, np.uint8)
    else:
        values = np.asarray(cut(image.data, panel), dtype=np.float32)
        grey = np.rint(255 * np.clip((values - window.low) / (window.high - window.low), 0, 1)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey)).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def outline(mask: NDArray[np.bool_], panel: Panel) -> str:
    """Outlines of a mask on a slice as the data of an SVG path, mm from the panel's top left corner."""
    from skimage.measure import approximate_polygon, find_contours

    if not mask.any():
        return ""
    pixel_mm = (panel.width_mm / mask.shape[1], panel.height_mm / mask.shape[0])
    xs, ys, level = smooth_mask(mask, pixel_mm, _PANEL_PX / max(panel.width_mm, panel.height_mm))
    step_x, step_y = float(xs[1] - xs[0]), float(ys[1] - ys[0])
    pieces = []
    for line in find_contours(level, 0.5):
        points = np.column_stack((xs[0] + line[:, 1] * step_x, ys[0] + line[:, 0] * step_y))
        points = approximate_polygon(points, _TOLERANCE_MM)
        if len(points) > 2:
            pieces.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(pieces)


def figure(image_uri: str, panel: Panel, lines: Sequence[tuple[str, str, str]], affine: NDArray[np.float64]) -> str:
    """A slice with outlines, letters at its edges and a scale bar, as HTML.

    Parameters
    ----------
    image_uri : str
        From :func:`picture`.
    panel : Panel
        Which slice.
    lines : sequence of (str, str, str)
        Class, style and path of each outline, the lowest first.
    affine : array, (4, 4)
        Of the canonical scan.
    """
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    rightwards, downwards = -direction[:, panel.view.right], -direction[:, panel.view.down]
    width, height = panel.width_mm, panel.height_mm
    bar = max(length for length in BARS_MM if length <= max(0.3 * width, BARS_MM[0]))
    paths = "".join(f'<path class="{kind}"{style} d="{path}"/>' for kind, style, path in lines if path)
    return (
        f'<figure class="slice" style="--aspect:{panel.aspect:.4f}">'
        f'<svg viewBox="0 0 {width:.2f} {height:.2f}" role="img" '
        f'aria-label="{text(plane_name(panel, direction))}">'
        f'<image href="{image_uri}" width="{width:.2f}" height="{height:.2f}" preserveAspectRatio="none"/>{paths}</svg>'
        f'<span class="l">{letters(-rightwards)}</span><span class="r">{letters(rightwards)}</span>'
        f'<span class="t">{letters(-downwards)}</span><span class="b">{letters(downwards)}</span>'
        f'<span class="bar" style="width:{100 * bar / width:.2f}%"><em>{bar} mm</em></span>'
        f"<figcaption>{text(plane_name(panel, direction))}</figcaption></figure>"
    )


def plane_name(panel: Panel, direction: NDArray[np.float64]) -> str:
    """The plane and which slice of it, counted from 1."""
    tilt = tilt_degrees(direction, panel.view)
    return f"{panel.view.name} {panel.index + 1}" + (f", tilted {tilt:.0f}°" if tilt >= 3 else "")


def thumbnail(
    image: Volume | None,
    labels: NDArray[np.integer],
    colors: Mapping[int, Sequence[int]],
    panel: Panel,
    window: Window | None,
) -> str:
    """One slice with all structures in their colours, small, as HTML."""
    from PIL import Image

    if image is None or window is None:
        uri = picture(None, panel, None)
    else:
        values = np.asarray(cut(image.data, panel), dtype=np.float32)
        grey = np.rint(255 * np.clip((values - window.low) / (window.high - window.low), 0, 1)).astype(np.uint8)
        size = (_THUMB_PX, max(1, round(_THUMB_PX / panel.aspect)))
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(grey)).resize(size).save(stream, format="JPEG", quality=72)
        uri = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    shown = cut(labels, panel)
    paths = "".join(
        f'<path d="{path}" style="stroke:rgb({",".join(map(str, colors[int(value)]))});'
        f'fill:rgb({",".join(map(str, colors[int(value)]))})"/>'
        for value in np.unique(shown[shown > 0])
        if (path := outline(shown == value, panel))
    )
    return (
        f'<svg class="thumb" viewBox="0 0 {panel.width_mm:.1f} {panel.height_mm:.1f}">'
        f'<image href="{uri}" width="{panel.width_mm:.1f}" height="{panel.height_mm:.1f}" preserveAspectRatio="none"/>'
        f"{paths}</svg>"
    )


def view_of_acquisition(spacing_mm: NDArray[np.float64]) -> View:
    """The plane of the finest voxels; axial where all are alike."""
    coarsest = float(spacing_mm.max())
    return next(view for view in VIEWS if spacing_mm[view.normal] >= 0.99 * coarsest)
