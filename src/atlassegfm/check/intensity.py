"""Findings on intensities."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
#: CT stored 1000 or 1024 above the scale: where soft tissue is, and its fraction of what is denser than lung.
_OFFSET_LUNG, _OFFSET_TISSUE, _MOSTLY_TISSUE = 500.0, (850.0, 1250.0), 0.75
#: Cubes of this many voxels to a side are like air or noise if their mean is within this many of its standard errors,
#: and a scan is empty if less than this fraction of them is anything else.
_CUBE, _ERRORS, _LEAST_ANATOMY = 4, 6.0, 0.05


def intensity_findings(
    volume: Volume, stored: np.dtype[Any], value_range: tuple[float, ...], percentiles: tuple[float, ...]
) -> Iterator[Finding]:
    """Find what is odd about the finite intensities of a scan, of another type in the file."""
    low, high = value_range
    if np.issubdtype(stored, np.integer) and low >= 0 and high <= 255:
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
    anatomy = _anatomy_fraction(volume.data)
    if percentiles[0] == percentiles[2] or anatomy < _LEAST_ANATOMY:
        yield warning(
            f"{100 * (1 - anatomy):.1f} % of the scan is like air or noise (half of it at or below "
            f"{percentiles[1]:.4g}): there is next to nothing to register",
            "crop the scan to the anatomy, and check that the right series was exported",
        )


def _anatomy_fraction(data: NDArray[Any]) -> float:
    """Fraction of small cubes that differ from the usual one by more than its noise."""
    sides = [min(_CUBE, n) for n in data.shape]
    whole = data[tuple(slice(n - n % side) for n, side in zip(data.shape, sides, strict=True))]
    split = [part for n, side in zip(whole.shape, sides, strict=True) for part in (n // side, side)]
    cubes = whole.reshape(split)
    mean = cubes.mean(axis=(1, 3, 5))
    error = np.median(cubes.std(axis=(1, 3, 5))) / math.sqrt(math.prod(sides))
    return float(np.mean(np.abs(mean - np.median(mean)) > _ERRORS * error))


def modality_findings(scan: Volume, atlas: Volume) -> Iterator[Finding]:
    """Find that of scan and atlas one has Hounsfield units and the other none."""
    ends = {
        name: (volume, float(volume.data.min()), float(volume.data.max()))
        for name, volume in (("scan", scan), ("atlas", atlas))
    }
    for one, other in (("scan", "atlas"), ("atlas", "scan")):
        volume, low, high = ends[other]
        if ends[one][1] > _AIR_HU or ends[one][2] <= 0 or low < 0:  # negative values without air: a crop, or no units
            continue
        dense = volume.data[volume.data > _OFFSET_LUNG]
        text = f"the {one} has Hounsfield units (air near -1000), the {other} only values from {low:g} to {high:g}"
        tissue = np.count_nonzero((dense > _OFFSET_TISSUE[0]) & (dense < _OFFSET_TISSUE[1]))
        if tissue > _MOSTLY_TISSUE * dense.size:
            text = f"{text}: most are near 1000 to 1100, so that it is taken for CT stored with 1000 or 1024 added"
            yield note(text, "subtract the offset, if a model expects Hounsfield units")
        else:
            yield warning(
                f"{text}: one seems to be CT and the other of another modality, or to have lost its units; what is "
                "bright in one may be dark in the other, which misleads model and gate",
                "take an atlas of the scan's modality, or the original export",
            )


def inversion_findings(volume: Volume) -> list[Finding]:
    """Find inverted contrast, as far as the scan alone shows it."""
    found = warning(
        "what surrounds the body is the brightest there is: the intensities seem to be inverted (DICOM MONOCHROME1, or "
        "a negative); air would be taken for the body, by the registration and by the models",
        "turn them round (largest value minus each) and write the scan again",
    )
    return [found] if is_inverted(volume) else []
