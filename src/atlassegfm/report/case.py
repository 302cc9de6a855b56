"""Page of one case: structures in three planes, an interactive view, and its provenance."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError, MissingExtraError
from ..core.image import Volume, label_boxes, load_labels
from ..core.labels import Structure, listed, pick_values, read_names_file, shortened, structures_of
from ..core.overlap import dice_per_structure
from ..core.record import Record
from ..dicom import is_dicom_input, open_image
from ..quality.verdict import Verdict
from ..records import RUN, SLICER_COLORS, STATUS, StructureRecord, label_map_of
from . import slices
from .folder import ATLAS, CASE_PAGE, CASE_PICTURE, MODEL, Case, finite
from .overview import Note, draw_overview
from .page import duration, flatten, sources_digest, write_page
from .slices import Window, acquisition_view, cut, is_hounsfield, structure_window
from .viewer import Reduction, labels_payload, reduction, scan_payload

#: The facts of a page end within this many characters from its beginning.
_FACTS_REACH = 400_000
#: Verdicts whose structures the picture names, the worst first.
_POOR = ("failed", "review")
_FACTS = re.compile(r'<script type="application/json" id="facts">(.*?)</script>', re.DOTALL)
_NO_SCAN = "The scan was not given: only labels are shown. --images FOLDER adds it."
_NO_MAPS = "The label maps of atlas and model were not kept: only the result is outlined. segment --keep keeps them."


@dataclass(frozen=True)
class CaseOptions:
    """Content of the page of a case."""

    viewer_voxels: int = 8_000_000  # largest number of voxels of the interactive view; 0 leaves the view out
    overview: bool = True  # whether to draw overview.png (extra "report")


class Agreement(NamedTuple):
    """Dice of two label maps of one structure, in [0, 1]; None where one is missing or both are empty."""

    atlas_model: float | None = None
    result_atlas: float | None = None
    result_model: float | None = None


class CaseFacts(Record):
    """Facts on the page of a case for the page of the cohort, by label value."""

    fingerprint: str
    result: str  # digest of run.json and the label map alone
    colors: dict[int, tuple[int, int, int]]
    agreement: dict[int, Agreement]
    thumbnail: dict[str, Any]  # empty for an empty result
    has_image: bool


@dataclass(frozen=True, eq=False)
class _Maps:
    """Volumes of a case in RAS-canonical order."""

    image: Volume | None
    image_note: str
    labels: Mapping[str, Volume]  # those that are there of "result", "atlas", "model"
    structures: tuple[Structure, ...]

    @property
    def result(self) -> Volume:
        return self.labels["result"]

    @cached_property
    def boxes(self) -> dict[int, tuple[slice, slice, slice]]:
        """Bounding box of each structure over all label maps."""
        return label_boxes([one.value for one in self.structures], *(volume.data for volume in self.labels.values()))

    @cached_property
    def is_hounsfield(self) -> bool:
        return self.image is not None and is_hounsfield(self.image)

    def window(self, inside: NDArray[np.bool_], box: tuple[slice, ...]) -> Window | None:
        return None if self.image is None else structure_window(self.image, inside, box, hounsfield=self.is_hounsfield)


def write_case(
    case: Case, image: Path | None, options: CaseOptions, *, back: str, force: bool = False
) -> tuple[CaseFacts, bool]:
    """Write the page of a case into its folder, unless it is up to date and not forced.

    A page that shows the scan is not replaced by one that does not, as long as the result is the same; the second value
    tells whether it was kept for that. ``image`` is the query's file or DICOM folder, where it is known; ``back`` the
    address of the cohort's page relative to the folder, empty for none. An :class:`.InputError` if a label map cannot
    be read or the folder written; a :class:`.MissingExtraError` if matplotlib is missing and the overview is wanted.
    """
    path = case.folder / CASE_PAGE
    result = _digest(case.folder / RUN, label_map_of(case.folder))
    fingerprint = _fingerprint(case.folder, image, f"{sources_digest()} {options} {back} {result}")
    known = None if force else _known_facts(path)
    has_picture = not options.overview or (case.folder / CASE_PICTURE).is_file()
    if known is not None and known.fingerprint == fingerprint and has_picture:
        return known, False
    shows_scan = known if known is not None and known.has_image and known.result == result else None
    if shows_scan is not None and image is None:
        return shows_scan, True
    maps = _load(case, image)
    if shows_scan is not None and maps.image is None:
        return shows_scan, True
    facts = CaseFacts(
        fingerprint=fingerprint,
        result=result,
        colors={one.value: one.color for one in maps.structures},
        agreement=_agreement(maps),
        thumbnail=_thumbnail(maps),
        has_image=maps.image is not None,
    )
    wanted = [*filter(None, case.run.settings.get("tubular", "").split(","))]
    tubular = pick_values({one.value: one.name for one in maps.structures}, wanted)
    sections = {
        one.value: _section(maps, one, tubular=one.value in tubular)
        for one in maps.structures
        if one.value in maps.boxes
    }
    size = reduction(maps.result.grid, options.viewer_voxels) if options.viewer_voxels else None
    estimates = [one.quality.estimated_dice for one in case.run.structures if one.quality is not None]
    write_page(
        path,
        "case.html.j2",
        title=case.name,
        back=back,
        run=case.run,
        version=case.run.versions.get("atlassegfm", ""),
        lowest_estimate=min((n for n in map(finite, estimates) if n is not None), default=None),
        total_seconds=case.total_seconds,
        stages=[(name, duration(seconds)) for name, seconds in case.status.seconds.items()],
        settings=[(name, [(value, 0)]) for name, value in flatten(case.run.settings).items()],
        notes=_notes(case, maps),
        sections=sections,
        kinds=list(maps.labels),
        viewer=None if size is None else _viewer(maps, size, sections),
        size=size,
        shape=maps.result.grid.shape,
        facts=facts.model_dump(),
    )
    if options.overview:
        shown = maps.image or Volume(np.zeros(maps.result.grid.shape, np.float32), maps.result.grid)
        notes = {row.value: note for row in case.run.structures if (note := _note(row)) is not None}
        path, subtitle = case.folder / CASE_PICTURE, _subtitle(case, maps)
        draw_overview(shown, maps.result, maps.structures, path, title=case.name, subtitle=subtitle, notes=notes)
    return facts, False


def _note(row: StructureRecord) -> Note | None:
    """What the legend of the picture says of a structure; None if it is present, whole and good."""
    verdict: Verdict = (row.quality and row.quality.verdict) or "good"  # or not judged
    remarks = {f"in view; {row.cut}": row.cut, "absent": row.status == "absent", verdict: verdict in _POOR}
    text = ", ".join(remark for remark, applies in remarks.items() if applies)
    return Note(text, verdict if verdict in _POOR else "review") if text else None


def _subtitle(case: Case, maps: _Maps) -> str:
    """Model, and the names of what failed, needs review, is missing or cut."""
    rows = case.run.structures
    verdicts = [row.quality and row.quality.verdict for row in rows]
    named = {one: [row.name for row, is_it in zip(rows, verdicts, strict=True) if is_it == one] for one in _POOR}
    named["absent"] = [row.name for row in rows if row.status == "absent"]
    named["cut by the field of view"] = [row.name for row in rows if row.cut]
    good = f"good: {verdicts.count('good')} of {len(rows)}" if any(verdicts) else ""
    poor = [f"{key}: {listed([shortened(one, 40) for one in names], 6)}" for key, names in named.items() if names]
    missing = "the scan is missing: labels only" if maps.image is None else ""
    return ". ".join(filter(None, (f"Model: {case.run.model.name}", good, *poor, missing))) + "."


def _digest(*paths: Path) -> str:
    """Digest of the content of files; those that are missing are left out."""
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            found.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return found.hexdigest()


def _fingerprint(folder: Path, image: Path | None, shown: str) -> str:
    """Digest of everything that the page shows."""
    found = hashlib.sha256(f"{shown} {_digest(folder / STATUS)}".encode())
    for path in (folder / ATLAS, folder / MODEL, image):
        if path is None or not path.exists():
            continue
        # A DICOM folder's own time does not change with its files.
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            status = file.stat()
            found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def _known_facts(path: Path) -> CaseFacts | None:
    """Read the facts of an earlier page; None if it has none."""
    try:
        with path.open(encoding="utf-8") as file:
            match = _FACTS.search(file.read(_FACTS_REACH))
        return CaseFacts.model_validate_json(match[1]) if match else None
    except (OSError, ValueError):
        return None


def _load(case: Case, image: Path | None) -> _Maps:
    source = label_map_of(case.folder)
    if not source.is_file():
        raise InputError("no label map in its folder, which a page needs; write one with segment --format nifti")
    result = load_labels(source, allow_empty=True)
    tables = [{} if result.source is None else result.source.label_table]
    if (case.folder / SLICER_COLORS).is_file():  # MGZ has no colours
        tables.append(read_names_file(case.folder / SLICER_COLORS))
    found = {one.value: one for one in structures_of([row.value for row in case.run.structures], tables)}
    structures = tuple(Structure(row.value, row.name, found[row.value].color) for row in case.run.structures)
    labels = {"result": result.canonical()}
    grid = labels["result"].grid
    for kind, name in (("atlas", ATLAS), ("model", MODEL)):
        path = case.folder / name
        if path.is_file():
            other = load_labels(path, allow_empty=True)
            if other.grid.axes_relative_to(grid) is None:
                raise InputError(f"{path}: not on the voxels of {source.name}; make the result again")
            labels[kind] = other.turned_to(grid)
    if image is None:
        return _Maps(None, _NO_SCAN, labels, structures)
    try:
        scan = open_image(image, case.series if image.is_dir() and is_dicom_input(image) else None)
        if scan.grid.axes_relative_to(grid) is not None:
            return _Maps(scan.turned_to(grid), "", labels, structures)
        note = "The scan is not on the voxels of the result"
    except MissingExtraError as error:
        note = f"The scan could not be read ({error})"
    except InputError:
        note = "The scan could not be read"
    return _Maps(None, f"{note}: only labels are shown.", labels, structures)


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


def _thumbnail(maps: _Maps) -> dict[str, Any]:
    """Draw all structures on the plane of acquisition, where most of them show."""
    if not maps.boxes:
        return {}
    sides = list(zip(*maps.boxes.values(), strict=True))
    low = [min(side.start for side in axis) for axis in sides]
    whole = tuple(slice(first, max(side.stop for side in axis)) for first, axis in zip(low, sides, strict=True))
    inside = maps.result.data[whole] > 0
    if not inside.any():
        inside = np.ones_like(inside)
    grid = maps.result.grid
    panels = slices.structure_panels(inside, low, grid.shape, grid.spacing_mm)
    panel = next(one for one in panels if one.view is acquisition_view(grid.spacing_mm))
    colors = {one.value: one.color for one in maps.structures}
    return slices.thumbnail(maps.image, maps.result.data, colors, panel, maps.window(inside, whole))


def _section(maps: _Maps, structure: Structure, *, tubular: bool) -> dict[str, Any]:
    """Draw three slices of one structure, which meet in ``centre_mm`` (RAS+), and projections of a tubular one."""
    value, grid = structure.value, maps.result.grid
    box = maps.boxes[value]
    masks = {kind: volume.data[box] == value for kind, volume in maps.labels.items()}
    leading = next(mask for mask in masks.values() if mask.any())
    panels = slices.structure_panels(leading, [side.start for side in box], grid.shape, grid.spacing_mm)
    window = maps.window(maps.result.data[panels[0].box] == value, panels[0].box)
    # The result is drawn on top.
    drawn = [kind for kind in ("atlas", "model", "result") if kind in masks and masks[kind].any()]
    figures = []
    ijk = np.zeros(3)
    for panel in panels:
        shapes: dict[str, NDArray[np.bool_]] = {kind: cut(maps.labels[kind].data, panel) == value for kind in drawn}
        figures.append(slices.slice_figure(maps.image, panel, window, shapes, grid.affine))
        ijk[panel.view.normal] = panel.index
    for panel in panels if tubular else ():
        shapes = {kind: maps.labels[kind].data[panel.box] == value for kind in drawn}
        figures.append(slices.projection_figure(panel, shapes, grid.affine))
    return {
        "name": structure.name,
        "color": structure.color,
        "missing": not masks["result"].any(),
        "window": "" if window is None else window.name,
        "slices": figures,
        "centre_mm": grid.voxel_to_world(ijk).round(2).tolist(),
    }


def _notes(case: Case, maps: _Maps) -> list[str]:
    lacks_model = "model" not in maps.labels and case.run.model.name != "none"
    no_maps = "The model's label map is not in the folder." if lacks_model else ""
    return [*filter(None, (*case.warnings, maps.image_note, no_maps if "atlas" in maps.labels else _NO_MAPS))]


def _viewer(maps: _Maps, size: Reduction, sections: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    values = [one.value for one in maps.structures]
    volumes = {} if maps.image is None else {"scan": scan_payload(maps.image, size)}
    volumes |= {kind: labels_payload(volume, values, size) for kind, volume in maps.labels.items()}
    return {
        "structures": [{"value": s.value, "name": s.name, "color": list(s.color)} for s in maps.structures],
        "centres": {value: one["centre_mm"] for value, one in sections.items()},
        "volumes": volumes,
    }
