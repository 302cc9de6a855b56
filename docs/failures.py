"""Segment scans that go wrong, and write docs/explanation/failures.md with its pictures (needs the extra 'report')."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atlassegfm import Context, Segmentation, Volume, customize, load_image, load_labels, segment
from atlassegfm.check.against_atlas import compare_with_atlas
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.demo import ATLAS, LABELS, PAIR, QUERY, REFERENCE
from atlassegfm.report import Note, draw_overview

DOCS = Path(__file__).parent
PAGE, IMAGES = DOCS / "explanation/failures.md", DOCS / "images"
#: Width of a picture in px: small files.
WIDTH_PX = 900
SPLEEN, LEFT_KIDNEY = 2, 4

Scan = tuple[Volume, Volume]


@dataclass(frozen=True)
class Failure:
    """One way to go wrong: the scan and its true labels, made from the query and its true labels."""

    name: str
    title: str
    text: str
    make: Callable[[Volume, Volume], Scan]


def mirrored(image: Volume, labels: Volume) -> Scan:
    """Swap the sides, as a converter does that loses a sign of the affine."""
    return Volume(image.data[::-1], image.grid), Volume(labels.data[::-1], labels.grid)


def cropped(image: Volume, labels: Volume) -> Scan:
    """Keep the upper third: the rest of the anatomy is outside the field of view."""
    first = 2 * image.data.shape[2] // 3
    grid = image.grid.crop((0, 0, first), image.grid.shape)
    return Volume(image.data[:, :, first:], grid), Volume(labels.data[:, :, first:], grid)


def dark_spleen(image: Volume, labels: Volume) -> Scan:
    """Give the spleen a third of its intensity, that of muscle."""
    return _changed(image, labels.data == SPLEEN, lambda inside: inside / 3), labels


def without_kidney(image: Volume, labels: Volume) -> Scan:
    """Fill the left kidney's place with what is around it, as after its removal."""
    gone = labels.data == LEFT_KIDNEY
    scan = _changed(image, gone, lambda inside: np.random.default_rng(0).normal(260, 12, inside.shape))
    return scan, Volume(np.where(gone, 0, labels.data).astype(labels.data.dtype), labels.grid)


def _changed(image: Volume, mask: NDArray[np.bool_], change: Callable[[NDArray[np.float32]], NDArray]) -> Volume:
    data = image.data.astype(np.float32)
    data[mask] = change(data[mask])
    return Volume(data, image.grid)


FAILURES = (
    Failure(
        "mirrored",
        "Left and right are swapped",
        "A converter lost a sign, and the liver is on the left. Each kidney is found well, under the name of the "
        "other: only the fit of the mirror image tells. `check` warns before anything is computed, `segment` after.",
        mirrored,
    ),
    Failure(
        "cropped",
        "Another part of the body",
        "Only the upper third of the scan is there: the chest. Everything is flagged but the aorta, which goes on "
        "where the atlas's ends and is followed too far up.",
        cropped,
    ),
    Failure(
        "dark_spleen",
        "An organ that looks different",
        "The spleen has a third of its brightness, and a third of it is missed. The other organs do not suffer.",
        dark_spleen,
    ),
    Failure(
        "without_kidney",
        "An organ that is not there",
        "The left kidney was taken out. The atlas has one, so the program looks for it, and finds something small.",
        without_kidney,
    ),
)


def main() -> None:
    """Write the page and the pictures."""
    context = customize(Context.from_files(PAIR / ATLAS, PAIR / LABELS))
    query, reference = load_image(PAIR / QUERY).canonical(), load_labels(PAIR / REFERENCE).canonical()
    lines = [HEAD]
    for one in FAILURES:
        image, truth = one.make(query, reference)
        result = segment(context, image)
        draw(one, image, truth, result)
        lines += [f"## {one.title}", "", one.text, "", *_findings(image, context)]
        lines += [f"![{one.title}](../images/failure-{one.name}.png)", "", *_table(result, truth), ""]
    PAGE.write_text("\n".join([*lines, TAIL]).rstrip() + "\n", encoding="utf-8")


def draw(failure: Failure, image: Volume, truth: Volume, result: Segmentation) -> None:
    """Draw the result, the true outlines dashed, as a small file."""
    notes = {one.structure.value: Note(one.quality.verdict, one.quality.verdict) for one in result.structures}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.png"
        structures = [one.structure for one in result.structures]
        draw_overview(image, result.labels, structures, path, title=failure.title, reference=truth, notes=notes)
        with Image.open(path) as large:
            small = large.convert("RGB").resize(
                (WIDTH_PX, WIDTH_PX * large.height // large.width), Image.Resampling.BOX
            )
    # Fewer grey values, so that the noise of the scan takes less room.
    coarse = np.round(np.asarray(small) / 8) * 8
    Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).save(IMAGES / f"failure-{failure.name}.png", optimize=True)


def _findings(image: Volume, context: Context) -> Iterator[str]:
    """What ``check`` says of the scan before it is segmented."""
    findings = compare_with_atlas(image, context.atlas, "the scan")[1]
    yield from (f"`check`: **{one.severity}**, {one.text}.\n" for one in findings)
    if not findings:
        yield "`check` finds nothing.\n"


def _table(result: Segmentation, truth: Volume) -> Iterator[str]:
    dice = dice_per_structure(result.labels.data, truth.data, [one.structure.value for one in result.structures])
    yield from ("| structure | verdict | estimated Dice | true Dice | reason |", "|---|---|---:|---:|---|")
    for one in result.structures:
        estimate = one.quality.estimated_dice
        figures = [
            "–" if value is None or np.isnan(value) else f"{value:.2f}"
            for value in (estimate, dice[one.structure.value])
        ]
        yield f"| {one.structure.name} | `{one.quality.verdict}` | {' | '.join(figures)} | {one.quality.reason} |"


HEAD = """# Failures and their verdicts

<!-- Written by docs/failures.py with its pictures: change that file, not this one. -->

What goes wrong, what the program says of it, and what it does not notice. The scans are the [embedded
pair](../tutorial/first-case.md), which is synthetic; the query is changed each time. Lines are the result, dashes the
truth. [How verdicts are made](quality.md), and how often they are wrong.

```sh
python docs/failures.py      # makes this page and its pictures again, in some minutes
```
"""

TAIL = """## On real scans

Their pictures are not ours to show; where you have the sets, `--report` draws them. Of 418 structures of four sets
27 have a Dice below 0.7: one is judged `good`, eleven `review`, fifteen `failed` ([accuracy](quality.md#accuracy)).
The worst pair of Abd-MR, where the spleen is looked for in the wrong place:

```sh
atlassegfm segment --atlas imagesTr/abdmr_008_0000.nii.gz --labels labelsTr/abdmr_008.nii.gz \\
  imagesTr/abdmr_015_0000.nii.gz -o results --report
```

| structure | verdict | estimated Dice | true Dice | reason |
|---|---|---:|---:|---|
| liver | `review` | 0.79 | 0.81 | query and warped atlas differ around it by 1.23 (on average 0.53) |
| right_kidney | `good` | 0.88 | 0.95 | |
| left_kidney | `good` | 0.88 | 0.94 | |
| spleen | `review` | 0.78 | 0.00 | another place in the scan matches nearly as well (worse by 0.13, on average 0.81) |

What helps: [another atlas, or several](../how-to/prepare-an-atlas.md#several-atlases), and
[one click](../how-to/correct-in-the-browser.md).
"""


if __name__ == "__main__":
    main()
