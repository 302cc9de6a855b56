"""What the page needs to show a case: geometry, windows, and voxels as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.image import Volume
from ..records import StructureRecord
from ..report.slices import VIEWS, edge_letters, is_hounsfield, tilt_remark
from ..report.viewer import labels_payload, reduction, scan_payload
from .session import Session

#: Windows of CT: name, level and width, HU.
_CT_WINDOWS = (("soft tissue", 40, 400), ("lung", -600, 1500), ("bone", 400, 1800), ("brain", 40, 80))
#: Percentiles of the scan between which other scans are shown: usual, and wide.
_WINDOWS = (("auto", 1.0, 99.5), ("wide", 0.0, 100.0))
#: Voxels of the 3-D view at most.
_VIEW_VOXELS = 2_000_000
#: Largest number of a 16-bit voxel.
_LARGEST = 32_767


def describe(session: Session) -> dict[str, Any]:
    """Describe a case for the page: what does not change while it is open, and what does."""
    grid, windows = session.grid, _windows(session.scan)
    slope, intercept = _scale(session.scan.data)
    views = [
        {"name": view.name, "letters": edge_letters(grid.affine, view), "tilt": tilt_remark(grid.affine, view)}
        for view in VIEWS
    ]
    return {
        "shape": list(grid.shape),
        "spacing": [float(n) for n in grid.spacing_mm],
        "affine": grid.affine.tolist(),
        "slope": slope,
        "intercept": intercept,
        "bytes": int(session.numbers.dtype.itemsize),
        "views": views,
        "windows": windows,
        "sources": session.sources,
        "file": session.run.inputs.query.file if session.run.inputs.query is not None else "",
        "model": session.run.model.name,
        **state(session),
    }


def state(session: Session) -> dict[str, Any]:
    """Describe what edits change: version, history, and the structures."""
    volumes, touched = session.volumes_ml(), session.touched
    return {
        "version": session.version,
        "undo": session.cursor,
        "redo": len(session.history) - session.cursor,
        "annotators": session.annotators,
        "structures": [
            _structure(row, one.color, volumes[n], n + 1 in touched)
            for n, (row, one) in enumerate(zip(session.run.structures, session.structures, strict=True))
        ],
    }


def _structure(row: StructureRecord, color: tuple[int, int, int], volume_ml: float, touched: bool) -> dict[str, Any]:
    quality = row.quality
    before = row.review.quality if row.review is not None else None
    return {
        "name": row.name,
        "value": row.value,
        "color": color,
        "volume": round(volume_ml, 3),
        "verdict": quality.verdict if quality is not None else None,
        "reason": (quality.reason if quality is not None else "") or row.reason,
        "estimate": quality.estimated_dice if quality is not None else None,
        "before": before.verdict if before is not None else None,
        "accepted": row.review is not None,
        "dice": row.review.dice if row.review is not None else None,
        "touched": touched,
    }


def _windows(scan: Volume) -> list[dict[str, Any]]:
    """Windows by name: ``low`` is shown black, ``high`` white."""
    if is_hounsfield(scan):
        return [
            {"name": name, "low": level - width / 2, "high": level + width / 2} for name, level, width in _CT_WINDOWS
        ]
    step = max(1, round((scan.data.size / 1e6) ** (1 / 3)))
    part = scan.data[::step, ::step, ::step]
    found = []
    for name, *percents in _WINDOWS:
        low, high = np.percentile(part, percents).tolist()
        found.append({"name": name, "low": low, "high": high if high > low else low + 1})
    return found


def _scale(data: NDArray[np.float32]) -> tuple[float, float]:
    """Slope and intercept of intensities stored with 16 bits; whole numbers that fit stay as they are."""
    low, high = float(data.min()), float(data.max())
    middle = data[data.shape[0] // 2]
    if low >= -_LARGEST and high <= _LARGEST and np.array_equal(middle, np.rint(middle)):
        return 1.0, 0.0
    return (high - low) / (2 * _LARGEST) or 1.0, (high + low) / 2


def scan_bytes(session: Session) -> bytes:
    """Intensities as 16-bit numbers, little-endian, the first axis fastest; see ``slope`` and ``intercept``."""
    slope, intercept = _scale(session.scan.data)
    data = session.scan.data
    stored = np.rint(data if (slope, intercept) == (1, 0) else (data - np.float32(intercept)) / np.float32(slope))
    return bytes(stored.astype("<i2").tobytes(order="F"))


def scan_3d(session: Session) -> str:
    """Encode the scan, reduced, as a NIfTI file in base64 for NiiVue."""
    return scan_payload(session.scan, reduction(session.grid, _VIEW_VOXELS))


def labels_3d(session: Session) -> str:
    """Encode the draft, reduced as the scan is."""
    values = range(1, len(session.structures) + 1)
    return labels_payload(Volume(session.numbers, session.grid), values, reduction(session.grid, _VIEW_VOXELS))
