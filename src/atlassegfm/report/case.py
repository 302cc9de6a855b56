"""Page of one case: structures in three planes, an interactive view, and its provenance."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from ..core.errors import InputError, MissingExtraError
from ..core.image import Volume, load_labels
from ..core.labels import Structure, structures_of
from ..core.overlap import dice_per_structure
from ..dicom import is_dicom_input, open_image
from ..quality.verdict import VERDICTS
from ..records import RUN, SEGMENTATION, STATUS
from .folder import ATLAS, CASE_PAGE, CASE_PICTURE, MODEL, Case, finite
from .overview import draw_overview
from .page import asset, duration, flatten, write_page
from .slices import (
    SliceFigure,
    acquisition_view,
    cut,
    is_hounsfield,
    slice_figure,
    structure_panels,
    structure_window,
    thumbnail,
)
from .viewer import Reduction, labels_payload, reduction, scan_payload

#: Raised by hand when pages made earlier are to be made again.
_EDITION = "3"
#: The facts of a page end within this many characters from its beginning.
_FACTS_REACH = 400_000
_FACTS = re.compile(r'<script type="application/json" id="facts">(.*?)</script>', re.DOTALL)
_NO_SCAN = "The scan was not given: only labels are shown. --images FOLDER adds it."
_NO_MAPS = "The label maps of atlas and model were not kept: only the result is outlined. segment --keep keeps them."

Box = tuple[slice, ...]


@dataclass(frozen=True)
class CaseOptions:
    """Content of the page of a case."""

    viewer_voxels: int = 8_000_000
    """Largest number of voxels of the interactive view; 0 leaves the view out."""

    overview: bool = True
    """Whether to draw ``overview.png`` (extra "report")."""


@dataclass(frozen=True)
class Agreement:
    """Dice of two label maps of one structure, in [0, 1]; None where one is missing or both are empty."""

    atlas_model: float | None = None
    result_atlas: float | None = None
    result_model: float | None = None


@dataclass(frozen=True, eq=False)
class CaseFacts:
    """What the page of the cohort takes from the page of a case. ``thumbnail`` is empty for an empty result."""

    colors: Mapping[int, tuple[int, int, int]]
    agreement: Mapping[int, Agreement]
    thumbnail: Mapping[str, Any]
    has_image: bool


@dataclass(frozen=True)
class _Section:
    """Slices of one structure, and the point in RAS+ mm where they meet."""

    value: int
    name: str
    color: tuple[int, int, int]
    missing: bool
    window: str
    slices: tuple[SliceFigure, ...]
    centre_mm: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Maps:
    """Volumes of a case in RAS-canonical order."""

    image: Volume | None
    image_note: str
    labels: Mapping[str, Volume]
    """Label maps that are there: "result", "atlas", "model"."""

    structures: tuple[Structure, ...]

    @property
    def result(self) -> Volume:
        return self.labels["result"]


def write_case(case: Case, image: Path | None, options: CaseOptions, *, back: str, force: bool = False) -> CaseFacts:
    """Write the page of a case into its folder, unless it is up to date.

    Parameters
    ----------
    case : Case
    image : Path or None
        The query's file or DICOM folder, where it is known.
    options : CaseOptions
    back : str
        Address of the cohort's page relative to the folder; empty for none.
    force : bool
        Write it even if it is up to date.

    Raises
    ------
    InputError
        If a label map cannot be read, or the folder cannot be written.
    MissingExtraError
        If matplotlib is not installed and the overview is wanted.
    """
    path = case.folder / CASE_PAGE
    fingerprint = _fingerprint(case.folder, image, options, back)
    if not force:
        known = _known_facts(path, fingerprint)
        if known is not None and (not options.overview or (case.folder / CASE_PICTURE).is_file()):
            return known
    maps = _load(case, image)
    boxes = _boxes(maps)
    hounsfield = maps.image is not None and is_hounsfield(maps.image)
    facts = CaseFacts(
        {one.value: one.color for one in maps.structures},
        _agreement(maps),
        _thumbnail(maps, boxes, hounsfield=hounsfield),
        maps.image is not None,
    )
    sections = [
        _section(maps, one, boxes[one.value], hounsfield=hounsfield) for one in maps.structures if one.value in boxes
    ]
    size = reduction(maps.result.grid, options.viewer_voxels) if options.viewer_voxels else None
    estimates = [one.quality.estimated_dice for one in case.run.structures if one.quality is not None]
    registration = case.run.registration
    write_page(
        path,
        "case.html.j2",
        title=case.name,
        back=back,
        run=case.run,
        version=case.run.versions.get("atlassegfm", ""),
        present=sum(row.status == "present" for row in case.run.structures),
        confidence=finite(registration.confidence),
        folding=finite(registration.folding),
        lowest_estimate=min((n for n in map(finite, estimates) if n is not None), default=None),
        total_seconds=case.total_seconds,
        stages=[(name, duration(seconds)) for name, seconds in case.seconds.items()],
        settings=[(name, [(value, 0)]) for name, value in flatten(case.run.settings).items()],
        notes=_notes(case, maps),
        sections={one.value: one for one in sections},
        kinds=list(maps.labels),
        viewer=None if size is None else _viewer(maps, size, sections),
        viewer_note="" if size is None else _viewer_note(maps, size),
        facts={
            "fingerprint": fingerprint,
            "colors": facts.colors,
            "agreement": {v: [a.atlas_model, a.result_atlas, a.result_model] for v, a in facts.agreement.items()},
            "thumbnail": facts.thumbnail,
            "has_image": facts.has_image,
        },
    )
    if options.overview:
        shown = maps.image or Volume(np.zeros(maps.result.grid.shape, np.float32), maps.result.grid)
        draw_overview(
            shown,
            maps.result,
            maps.structures,
            case.folder / CASE_PICTURE,
            title=case.name,
            subtitle=_subtitle(case, maps),
        )
    return facts


def _subtitle(case: Case, maps: _Maps) -> str:
    judged = [row.quality.verdict for row in case.run.structures if row.quality is not None]
    parts = [f"Model: {case.run.model.name}"]
    if judged:
        parts.append("verdicts: " + ", ".join(f"{n} {v}" for v in VERDICTS if (n := judged.count(v))))
    if maps.image is None:
        parts.append("the scan is missing: labels only")
    return ". ".join(parts) + "."


def _fingerprint(folder: Path, image: Path | None, options: CaseOptions, back: str) -> str:
    """Digest of everything that the page shows."""
    found = hashlib.sha256(f"{_EDITION} {options} {back}".encode())
    for name in ("report.css", "case.js"):
        found.update(asset(name).encode())
    for name in (RUN, STATUS):
        if (folder / name).is_file():
            found.update((folder / name).read_bytes())
    for path in (folder / SEGMENTATION, folder / ATLAS, folder / MODEL, image):
        if path is None or not path.exists():
            continue
        # A DICOM folder's own time does not change with its files.
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            status = file.stat()
            found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def _known_facts(path: Path, fingerprint: str) -> CaseFacts | None:
    """Read the facts of an earlier page; None if it is out of date."""
    try:
        with path.open(encoding="utf-8") as file:
            match = _FACTS.search(file.read(_FACTS_REACH))
        content = json.loads(match[1]) if match else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if content.get("fingerprint") != fingerprint:
        return None
    return CaseFacts(
        {int(value): (color[0], color[1], color[2]) for value, color in content["colors"].items()},
        {int(value): Agreement(*numbers) for value, numbers in content["agreement"].items()},
        content["thumbnail"],
        content["has_image"],
    )


def _load(case: Case, image: Path | None) -> _Maps:
    result = load_labels(case.folder / SEGMENTATION, allow_empty=True)
    table = {} if result.source is None else result.source.label_table
    found = {one.value: one for one in structures_of([row.value for row in case.run.structures], [table])}
    structures = tuple(Structure(row.value, row.name, found[row.value].color) for row in case.run.structures)
    labels = {"result": result.canonical()}
    grid = labels["result"].grid
    for kind, name in (("atlas", ATLAS), ("model", MODEL)):
        path = case.folder / name
        if path.is_file():
            other = load_labels(path, allow_empty=True)
            if other.grid.axes_relative_to(grid) is None:
                raise InputError(f"{path}: not on the voxels of {SEGMENTATION}; make the result again")
            labels[kind] = other.turned_to(grid)
    if image is None:
        return _Maps(None, _NO_SCAN, labels, structures)
    try:
        scan = open_image(image, case.series if image.is_dir() and is_dicom_input(image) else None)
    except MissingExtraError as error:
        return _Maps(None, f"The scan could not be read ({error}): only labels are shown.", labels, structures)
    except InputError:
        return _Maps(None, "The scan could not be read: only labels are shown.", labels, structures)
    if scan.grid.axes_relative_to(grid) is None:
        note = "The scan of that name is not on the voxels of the result: only labels are shown."
        return _Maps(None, note, labels, structures)
    return _Maps(scan.turned_to(grid), "", labels, structures)


def _boxes(maps: _Maps) -> dict[int, Box]:
    """Find the bounding box of each structure over all label maps."""
    found: dict[int, Box] = {}
    values = [one.value for one in maps.structures]
    for volume in maps.labels.values():
        # find_objects lists boxes up to the largest value: large values are looked for one by one.
        if int(volume.data.max(initial=0)) > 10 * len(values) + 255:
            listed = {v: ndimage.find_objects((volume.data == v).astype(np.uint8)) for v in values}
            boxes = {v: box[0] for v, box in listed.items() if box}
        else:
            every = ndimage.find_objects(volume.data)
            boxes = {v: every[v - 1] for v in values if v <= len(every) and every[v - 1] is not None}
        for value, box in boxes.items():
            sides = zip(found.get(value, box), box, strict=True)
            found[value] = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in sides)
    return found


def _agreement(maps: _Maps) -> dict[int, Agreement]:
    values = [one.value for one in maps.structures]
    if "atlas" not in maps.labels:
        return {}

    def dice(one: str, other: str) -> dict[int, float | None]:
        if one not in maps.labels or other not in maps.labels:
            return dict.fromkeys(values)
        found = dice_per_structure(maps.labels[one].data, maps.labels[other].data, values)
        return {value: None if np.isnan(found[value]) else round(found[value], 4) for value in values}

    pairs = dice("atlas", "model"), dice("result", "atlas"), dice("result", "model")
    return {value: Agreement(*(pair[value] for pair in pairs)) for value in values}


def _thumbnail(maps: _Maps, boxes: Mapping[int, Box], *, hounsfield: bool) -> dict[str, Any]:
    """Draw all structures on the plane of acquisition, where most of them show."""
    if not boxes:
        return {}
    low = [min(box[axis].start for box in boxes.values()) for axis in range(3)]
    high = [max(box[axis].stop for box in boxes.values()) for axis in range(3)]
    whole = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside = maps.result.data[whole] > 0
    if not inside.any():
        inside = np.ones_like(inside)
    grid = maps.result.grid
    panels = structure_panels(inside, low, grid.shape, grid.spacing_mm)
    panel = next(one for one in panels if one.view is acquisition_view(grid.spacing_mm))
    window = None if maps.image is None else structure_window(maps.image, inside, whole, hounsfield=hounsfield)
    return thumbnail(maps.image, maps.result.data, {one.value: one.color for one in maps.structures}, panel, window)


def _section(maps: _Maps, structure: Structure, box: Box, *, hounsfield: bool) -> _Section:
    value, grid = structure.value, maps.result.grid
    masks = {kind: volume.data[box] == value for kind, volume in maps.labels.items()}
    leading = next(mask for mask in masks.values() if mask.any())
    panels = structure_panels(leading, [side.start for side in box], grid.shape, grid.spacing_mm)
    window = None
    if maps.image is not None:
        shown = panels[0].box
        window = structure_window(maps.image, maps.result.data[shown] == value, shown, hounsfield=hounsfield)
    # The result is drawn on top.
    drawn = [kind for kind in ("atlas", "model", "result") if kind in masks and masks[kind].any()]
    figures = [
        slice_figure(
            maps.image,
            panel,
            window,
            {kind: cut(maps.labels[kind].data, panel) == value for kind in drawn},
            grid.affine,
        )
        for panel in panels
    ]
    ijk = np.zeros(3)
    for panel in panels:
        ijk[panel.view.normal] = panel.index
    return _Section(
        value,
        structure.name,
        structure.color,
        not masks["result"].any(),
        "" if window is None else window.name,
        tuple(figures),
        tuple(round(float(n), 2) for n in grid.voxel_to_world(ijk)),
    )


def _notes(case: Case, maps: _Maps) -> list[str]:
    notes = [*case.warnings, maps.image_note]
    if "atlas" not in maps.labels:
        notes.append(_NO_MAPS)
    elif "model" not in maps.labels and case.run.model.name != "none":
        notes.append("The model's label map is not in the folder.")
    return [note for note in notes if note]


def _viewer(maps: _Maps, size: Reduction, sections: Sequence[_Section]) -> dict[str, Any]:
    values = [one.value for one in maps.structures]
    volumes = {} if maps.image is None else {"scan": scan_payload(maps.image, size)}
    volumes |= {kind: labels_payload(volume, values, size) for kind, volume in maps.labels.items()}
    return {
        "structures": [{"value": s.value, "name": s.name, "color": list(s.color)} for s in maps.structures],
        "centres": {one.value: one.centre_mm for one in sections},
        "volumes": volumes,
    }


def _viewer_note(maps: _Maps, size: Reduction) -> str:
    if size.is_none:
        return "" if maps.image is None else "Scan with 8 bits."
    factors, whole, kept = (" × ".join(map(str, n)) for n in (size.factors, maps.result.grid.shape, size.shape))
    return (
        f"Reduced for this view: blocks of {factors} voxels became one ({whole} to {kept}); small structures may look "
        "coarse or vanish. The slices below have all voxels."
    )
