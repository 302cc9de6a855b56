"""Planes through a scan as radiologists look at them: which voxels, which way round, which grey values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: A slice is shown with at least this much of the scan around the structures, mm, as far as it reaches.
SMALLEST_VIEW_MM = 100.0
#: And with this share of the structures' extent as margin on each side.
MARGIN_SHARE = 0.22
#: A direction gets a letter when its cosine is above this (an edge within 17 degrees has one letter).
_LETTER_COSINE = 0.3
#: Scale bar lengths to choose from, mm.
BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class View:
    """One of the three ways to cut a canonical (RAS) volume.

    Parameters
    ----------
    name : str
        In the words of radiology.
    normal : int
        Voxel axis the slice is across.
    right : int
        Voxel axis that runs along the rows of the picture, in its negative direction in all three.
    down : int
        Voxel axis that runs down the picture, in its negative direction in all three.
    """

    name: str
    normal: int
    right: int
    down: int


#: Radiological display: the patient's right is at the left, front at the top or at the left, head at the top.
VIEWS = (View("axial", 2, 0, 1), View("coronal", 1, 0, 2), View("sagittal", 0, 1, 2))


@dataclass(frozen=True)
class Panel:
    """One slice to draw.

    Parameters
    ----------
    view : View
        Which plane.
    index : int
        Slice number along the plane's normal.
    start, stop : tuple of int, (3,)
        Voxels shown, start <= ijk < stop; along the normal all of them.
    width_mm, height_mm : float
        Size of the shown part.
    """

    view: View
    index: int
    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    width_mm: float
    height_mm: float

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width_mm / self.height_mm


def areas_across(labels: NDArray[Any], count: int, axis: int) -> NDArray[np.int64]:
    """(slices, count) voxels of each structure on each slice across ``axis``."""
    # Slice by slice: a joint histogram of a large CT would take gigabytes.
    slices = np.ascontiguousarray(np.moveaxis(labels, axis, 0))
    areas = [np.bincount(one.ravel(), minlength=count + 1) for one in slices]
    return np.array(areas, dtype=np.int64)[:, 1:]


def best_slice(areas: NDArray[np.int64]) -> int:
    """The slice on which most structures show most of themselves; the middle one if there are none.

    Each structure votes with the root of its area relative to its largest section: being there at all counts
    more than being there at the full width, and a small structure as much as a large one.
    """
    largest = areas.max(axis=0, initial=0)
    present = largest > 0
    if not present.any():
        return len(areas) // 2
    votes = np.sqrt(areas[:, present] / largest[present]).sum(axis=1)
    best = np.flatnonzero(votes >= votes.max() - 1e-9)
    return int(best[len(best) // 2])


def display_window(data: NDArray[Any], labels: NDArray[Any], panels: Sequence[Panel]) -> tuple[float, float]:
    """Intensities shown black and white.

    Percentiles of the shown part keep single bright voxels from darkening the rest. Around the structures'
    own range the window is narrowed further: on CT, air and metal would leave the organs one grey.
    """
    start, stop = panels[0].start, panels[0].stop
    part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    shown = thinned(data[part])
    low, high = (float(v) for v in np.percentile(shown, (1.0, 99.9)))
    inside = thinned(data[labels > 0])
    if inside.size:
        first, last = (float(v) for v in np.percentile(inside, (3, 97)))
        span = max(last - first, 0.08 * (high - low))
        low, high = max(low, first - 1.6 * span), min(high, last + 0.8 * span)
    if not high > low:
        low, high = float(shown.min()), float(shown.max())
    return (low, high) if high > low else (low - 1, low + 1)


def thinned(values: NDArray[Any]) -> NDArray[Any]:
    """At most about a million of the values, evenly spread: enough for percentiles."""
    step = int(np.ceil((values.size / 1e6) ** (1 / values.ndim))) if values.size else 1
    return np.asarray(values[(slice(None, None, step),) * values.ndim], dtype=np.float32)


def cut(array: NDArray[Any], panel: Panel) -> NDArray[Any]:
    """The shown part of the slice as a picture: rows downwards, columns to the right."""
    view = panel.view
    part = [slice(a, b) for a, b in zip(panel.start, panel.stop, strict=True)]
    part[view.normal] = slice(panel.index, panel.index + 1)
    flat = np.squeeze(array[tuple(part)], axis=view.normal)
    # The axes of a canonical volume point to R, A, S: all three views show them reversed.
    return flat[::-1, ::-1].T


def smooth_mask(
    mask: NDArray[np.bool_], pixel_mm: tuple[float, float], px_per_mm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """A mask on a finer lattice, cut to its box, for outlines without staircase.

    Cubic interpolation keeps the value at every voxel centre: no voxel changes sides, and a structure of a
    single voxel stays.

    Returns
    -------
    x : array, (W,)
        mm to the right of the shown part's edge.
    y : array, (H,)
        mm below its upper edge.
    level : array, (H, W)
        0.5 on the border.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    margin = 3
    # Outside the shown part is background, so that an outline closes at its edge.
    padded = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], margin).astype(np.float32)
    first = np.array([rows[0] - margin, columns[0] - margin])
    steps = [int(np.clip(np.ceil(size_mm * px_per_mm / 2.5), 1, 12)) for size_mm in (pixel_mm[1], pixel_mm[0])]
    at = [np.linspace(0, n - 1, (n - 1) * step + 1) for n, step in zip(padded.shape, steps, strict=True)]
    grid = np.meshgrid(at[0], at[1], indexing="ij")
    level = ndimage.map_coordinates(padded, grid, order=3, mode="constant").astype(np.float32)
    y = (at[0] + first[0] + 0.5) * pixel_mm[1]
    x = (at[1] + first[1] + 0.5) * pixel_mm[0]
    return x, y, level


def letters(direction: NDArray[np.float64]) -> str:
    """Where a (3,) unit vector in RAS+ points: "R", or "RA" between two directions; the strongest first."""
    order = np.argsort(-np.abs(direction), kind="stable")
    kept = [axis for axis in order if abs(direction[axis]) > _LETTER_COSINE]
    return "".join("RAS"[a] if direction[a] > 0 else "LPI"[a] for a in kept)


def tilt_degrees(direction: NDArray[np.float64], view: View) -> float:
    """Angle between a slice and the world plane it is named after."""
    normal = np.cross(direction[:, view.right], direction[:, view.down])
    cosine = abs(float(normal[view.normal])) / float(np.linalg.norm(normal))
    return float(np.degrees(np.arccos(min(cosine, 1.0))))
