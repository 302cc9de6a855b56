"""Slices of a scan for models that were trained on pictures: which way they lie, and their intensities at 8 bits.

Slices look as those of a usual CT file: rows run to the back of the patient, columns to the left (coronal and sagittal
ones: rows run to the feet, columns to the left or to the back).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.geometry import Grid
from ..prompts import BoxPrompt
from ..settings import SliceSettings

logger = logging.getLogger(__name__)

Slices = NDArray[np.uint8]

#: Intensities above 0 are cut at these percentiles where they are not Hounsfield units [published code].
_PERCENTILES = (0.5, 99.5)
#: A scan with values down to the first and up to the second is taken to be in Hounsfield units: air is -1000, soft
#: tissue ends at about 80. MR magnitudes are not negative, standardised ones seldom beyond 10.
_HOUNSFIELD_AIR, _HOUNSFIELD_DENSE = -500.0, 100.0


@dataclass(frozen=True)
class SliceView:
    """How slices lie in a RAS-canonical array: from slice to slice ``across``, rows and columns against the others."""

    name: str
    across: int
    down: int
    along: int

    def frames(self, data: NDArray[Any]) -> NDArray[Any]:
        """(I, J, K) as (slices, rows, columns), a view."""
        return data.transpose(self.across, self.down, self.along)[:, ::-1, ::-1]

    def volume(self, frames: NDArray[Any]) -> NDArray[Any]:
        """(slices, rows, columns) as (I, J, K), a view."""
        return np.asarray(frames[:, ::-1, ::-1].transpose(np.argsort((self.across, self.down, self.along))))


#: The last axis points to the head, so that rows of a coronal slice run against it, to the feet.
VIEWS: Mapping[str, SliceView] = {
    "axial": SliceView("axial", across=2, down=1, along=0),
    "coronal": SliceView("coronal", across=1, down=2, along=0),
    "sagittal": SliceView("sagittal", across=0, down=2, along=1),
}


def choose_view(grid: Grid, slice_axis: str) -> SliceView:
    """Choose the slices in which a RAS-canonical scan is read; see :class:`SliceSettings`."""
    if slice_axis != "auto":
        return VIEWS[slice_axis]
    return next(view for view in VIEWS.values() if view.across == grid.slice_axis)


def box_across(prompt: BoxPrompt, view: SliceView, model: str) -> str:
    """Explain that a box lies across the slices that a model reads."""
    names = {one.across: one.name for one in VIEWS.values()}
    return (
        f"the prompt 'box' lies on {names[prompt.across]} slices of this scan, and the model {model!r} reads "
        f"{view.name} ones; use the prompt mask, or set models.{model}.slice_axis to auto"
    )


def is_hounsfield(data: NDArray[Any]) -> bool:
    """Return whether intensities look like Hounsfield units: from air to contrast agent or bone."""
    return bool(data.min() <= _HOUNSFIELD_AIR and data.max() >= _HOUNSFIELD_DENSE)


def to_8_bits(frames: NDArray[Any], settings: SliceSettings, name: str, model: str) -> Slices:
    """Map intensities (slices, rows, columns), all finite, to 0 to 255 as the published code does.

    They are cut, stretched by the range of the whole scan, and lose their decimals. Raises InputError, with the names
    of scan and model, if there is no contrast.
    """
    least, most = float(frames.min()), float(frames.max())
    is_ct = settings.modality == "ct" or (settings.modality == "auto" and is_hounsfield(frames))
    if is_ct:
        half = settings.window_width / 2
        low, high = settings.window_level - half, settings.window_level + half
        logger.debug("%s reads the scan as a CT, in the window %g to %g HU", model, low, high)
    else:
        # All values count if none is above 0, as after some standardisations.
        counted = frames[frames > 0] if most > 0 else frames.flatten()
        low, high = (float(value) for value in np.percentile(counted, _PERCENTILES, overwrite_input=True))
        logger.debug("%s reads the scan from %g to %g, percentiles %g and %g", model, low, high, *_PERCENTILES)
    # The published code stretches the range left after the cut, which may be narrower than the window.
    bottom, top = min(max(least, low), high), max(min(most, high), low)
    if not bottom < top:
        advice = f"set models.{model}.modality or, for a CT, models.{model}.window_level and window_width"
        raise InputError(f"{name}: has no contrast from {low:g} to {high:g}, where {model!r} reads it; {advice}")
    out = np.empty(frames.shape, np.uint8)
    for index, values in enumerate(frames):
        wide = values.astype(np.float64)
        stretched = (np.clip(wide, low, high) - bottom) / (top - bottom) * 255
        if not is_ct and most > 0:
            stretched[wide == 0] = 0
        out[index] = stretched
    return out
