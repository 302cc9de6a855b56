"""Findings on a scan against an atlas."""

import math
from collections.abc import Iterator, Sequence

from ..atlas import Atlas
from ..core.errors import AtlasSegError
from ..core.image import Volume
from ..quality import mirror
from ..quality.coverage import CUT_FRACTION, OUTSIDE_FRACTION
from .findings import AtlasReport, Finding, list_items, note, warning
from .intensity import inversion_findings, modality_findings

#: Correlation of the intensities of scan and atlas inside the body below which inverted contrast is reported.
LEAST_CORRELATION = -0.3


def compare_with_atlas(volume: Volume, atlas: Atlas, name: str) -> tuple[AtlasReport | None, list[Finding]]:
    """Compare sides, contrast and structures in view of a scan and an atlas; no report where they cannot be fitted."""
    inverted = inversion_findings(volume)
    findings = [*inverted, *modality_findings(volume, atlas.image)]
    try:
        found = mirror.fit_to_atlas(volume, atlas, name=name)
    except AtlasSegError as error:
        return None, [*findings, warning(f"the scan could not be fitted to the atlas: {error}")]
    outside = [(one.name, found.outside[one.value]) for one in atlas.structures]
    report = AtlasReport(
        found.resembles,
        round(found.resemblance, 3),
        round(found.sides.gain, 4),
        None if math.isnan(found.correlation) else round(found.correlation, 3),
        None if math.isnan(found.histogram_distance) else round(found.histogram_distance, 3),
        {structure: round(100 * (1 - fraction), 1) for structure, fraction in outside},
    )
    if not found.resembles:  # nothing else is believed
        text = (
            f"the scan hardly resembles the atlas, by a linear fit (resemblance {found.resemblance:.2f}; usually "
            f"{found.least_resemblance} or more): it seems to show another part of the body, or another modality; "
            "sides, contrast and field of view were not compared"
        )
        return report, [*findings, warning(text, "check that both show the same part of the body")]
    return report, [*findings, *_fit_findings(found, inverted=bool(inverted)), *_view_findings(outside)]


def _fit_findings(found: mirror.AtlasFit, *, inverted: bool) -> Iterator[Finding]:
    """Findings on sides and contrast; ``inverted``: the scan alone shows that already."""
    if found.sides.swapped:
        yield warning(
            f"the mirror image fits the atlas better by {100 * found.sides.gain:.1f} % of the cost of misplaced "
            "scans (usually below 0): left and right of the scan seem to be swapped (or those of the atlas); organs "
            "would be looked for, and labelled, on the wrong side",
            "compare with the original DICOM or a known side (liver, heart, a marker), and convert the scan again",
        )
    elif found.sides.undecided:
        yield note(
            f"the mirror image fits as well (better by {100 * found.sides.gain:.1f} %), as in nearly symmetric "
            "anatomy: left and right cannot be told apart, and swapped sides would not be found for certain",
            "look at a known side, if the header is not certain",
        )
    if not inverted and found.correlation < LEAST_CORRELATION:  # NaN, where no body overlaps, is not
        yield warning(
            f"what is bright in the atlas is dark in the scan (correlation {found.correlation:.2f}): if both are "
            "of the same modality, the intensities seem to be inverted, and the model would be misled",
            "turn them round (largest value minus each), unless it is another modality or sequence",
        )
    elif not inverted and found.other_modality:
        yield warning(
            "the intensities are not those of the atlas where both show body (distance of their distributions "
            f"{found.histogram_distance:.2f}, correlation {found.correlation:.2f}): the scan seems to be of another "
            "modality or sequence, which misleads model and gate",
            "take an atlas of the scan's modality and sequence",
        )


def _view_findings(outside: Sequence[tuple[str, float]]) -> Iterator[Finding]:
    """Findings on structures out of view, from the name and the fraction out of view of each."""
    gone = [name for name, fraction in outside if fraction >= OUTSIDE_FRACTION]
    partly = [(name, 100 * (1 - part)) for name, part in outside if CUT_FRACTION <= part < OUTSIDE_FRACTION]
    text = f"outside the field of view, by a linear fit: {list_items(gone)}"
    if len(gone) == len(outside):
        yield warning(f"{text}; nothing of the atlas would be found", "check that it is the same part of the body")
    elif gone:
        yield note(f"{text}; they will be missing from the result", "take a scan that shows them, if needed")
    if partly:
        cut = list_items([f"{name} ({percent:.0f} % in view)" for name, percent in partly])
        text = f"cut by the border of the field of view, by a linear fit: {cut}"
        yield note(f"{text}; only that part can be found, and volumes are too small")
