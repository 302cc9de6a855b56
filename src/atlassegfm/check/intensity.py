"""Findings on intensities."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..core.image import Volume
from ..quality.mirror import is_inverted
from .findings import Finding, note, warning

#: Percentiles of the intensities that are reported, and the number of voxels they are taken from.
PERCENTS = (1.0, 50.0, 99.0)
SAMPLED_VOXELS = 2_000_000
#: CT: air is about -1000 HU and fills part of each scan; soft tissue is above 0.
_AIR_HU = -900.0
#: Below the scale of Hounsfield units (-1024) lies only what scanners fill the corners with.
_PADDING_HU = -1100.0


def intensity_findings(
    volume: Volume, value_range: tuple[float, ...], percentiles: tuple[float, ...]
) -> Iterator[Finding]:
    """Find what is odd about intensities."""
    low, high = value_range
    if np.issubdtype(volume.data.dtype, np.integer) and low >= 0 and high <= 255:
        yield note(
            "8-bit intensities (0 to 255): contrast was cut off or coarsened on export; if this is CT, Hounsfield "
            "units are lost, which some models expect",
            "use the original export where there is one",
        )
    if low <= _AIR_HU and high > 0:
        text = "CT-like intensities (air near -1000)"
        if low < _PADDING_HU:
            yield note(
                f"{text}, with values down to {low:g} outside the scanner's circle",
                "set values below -1024 to -1024 if a model reacts to them",
            )
        else:
            yield note(text)
    if percentiles[0] == percentiles[2]:
        yield warning(
            f"98 % of the voxels have the value {percentiles[0]:g}: there is next to nothing to register",
            "crop the scan to the anatomy, and check that the right series was exported",
        )


def inversion_findings(volume: Volume) -> list[Finding]:
    """Find inverted contrast, as far as the scan alone shows it."""
    found = warning(
        "what surrounds the body is the brightest there is: the intensities seem to be inverted (DICOM MONOCHROME1, or "
        "a negative); air would be taken for the body, by the registration and by the models",
        "turn them round (largest value minus each) and write the scan again",
    )
    return [found] if is_inverted(volume) else []
