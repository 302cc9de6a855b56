"""Findings on a scan against an atlas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.errors import AtlasSegError
from ..core.image import Volume
from .findings import AtlasReport, Finding, list_items
from .intensity import inversion_findings

if TYPE_CHECKING:
    from ..atlas import Atlas


#: A structure counts as outside from this fraction out of view on, and as cut by the border between the two.
_OUTSIDE, _CUT = 0.9, 0.1
#: A scan is suspected to be mirrored where its mirror image fits an atlas better by more than this (natural logarithm
#: of the ratio of costs, about 2 %). Heads are nearly symmetric: of 30 right pairs of them the mirror image of one
#: fitted better by 1.1 %; of 90 right pairs of abdomens and hearts none by more than 0.1 % (docs/how-to).
MIRRORED_GAIN = 0.02
#: Correlation of the intensities of scan and atlas inside the body below which the contrast is suspected to be
#: inverted.
LEAST_CORRELATION = -0.3


def compare_with_atlas(volume: Volume, atlas: Atlas, name: str) -> tuple[AtlasReport | None, list[Finding]]:
    """A scan against the annotated one."""
    from ..quality.mirror import fit_to_atlas

    findings = inversion_findings(volume)
    inverted = bool(findings)
    try:
        found = fit_to_atlas(volume, atlas, name=name)
    except AtlasSegError as error:
        return None, [*findings, Finding("warning", f"the scan could not be fitted to the atlas: {error}")]
    if found.mirrored_gain > MIRRORED_GAIN:
        percent = 100 * math.expm1(found.mirrored_gain)
        findings.append(
            Finding(
                "warning",
                f"the mirror image fits the atlas better by {percent:.1f} %: left and right of the scan seem to be "
                "swapped (or those of the atlas); organs would be looked for, and labelled, on the wrong side",
                "compare with the original DICOM or a known side (liver, heart, a marker), and convert the scan again",
            )
        )
    if not inverted and found.correlation < LEAST_CORRELATION:  # NaN, where no body is shared, is not
        findings.append(
            Finding(
                "warning",
                f"what is bright in the atlas is dark in the scan (correlation {found.correlation:.2f}): if both are "
                "of the same modality, the intensities seem to be inverted, and the model would be misled",
                "turn them round (largest value minus each), unless it is another modality or sequence",
            )
        )
    names = {structure.value: structure.name for structure in atlas.structures}
    gone = [names[value] for value, share in found.outside.items() if share >= _OUTSIDE]
    cut = [
        f"{names[value]} ({100 * (1 - share):.0f} % in view)"
        for value, share in found.outside.items()
        if _CUT <= share < _OUTSIDE
    ]
    if gone:
        all_of_it = len(gone) == len(names)
        findings.append(
            Finding(
                "warning" if all_of_it else "note",
                f"outside the field of view, by a linear fit: {list_items(gone)}; "
                + ("nothing of the atlas would be found" if all_of_it else "they will be missing from the result"),
                "check that it is the same part of the body" if all_of_it else "take a scan that shows them, if needed",
            )
        )
    if cut:
        findings.append(
            Finding(
                "note",
                f"cut by the border of the field of view, by a linear fit: {list_items(cut)}; only that part can be "
                "found, and volumes are too small",
            )
        )
    report = AtlasReport(
        round(found.mirrored_gain, 4),
        None if math.isnan(found.correlation) else round(found.correlation, 3),
        {names[value]: round(100 * (1 - share), 1) for value, share in found.outside.items()},
    )
    return report, findings
