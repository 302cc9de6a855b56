"""The page of one case: every structure in three planes, an interactive view, and how it was made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..core.errors import InputError, MissingExtraError
from ..core.files import atomic_path
from ..core.image import Volume, load_labels
from ..core.labels import Structure, structures_of
from ..core.overlap import dice_per_structure
from ..dicom import is_dicom_input, open_image
from .folder import ATLAS, CASE_PAGE, CASE_PICTURE, MODEL, RUN, SEGMENTATION, STATUS, CaseRow
from .overview import draw_overview
from .page import (
    asset,
    badge,
    data_block,
    duration,
    flattened,
    footer,
    millilitres,
    model_table,
    packed_asset,
    page,
    pairs_table,
    score,
    swatch,
    text,
    tile,
)
from .planes import Panel, cut
from .slices import (
    Window,
    figure,
    is_hounsfield,
    outline,
    panels_of,
    picture,
    structure_window,
    thumbnail,
    view_of_acquisition,
)
from .viewer import labels_payload, scan_payload, thinning

#: Changes whenever pages made earlier are to be made again.
_EDITION = "2"
#: What a page knows of its case comes within so many characters from its beginning.
_FACTS_REACH = 400_000
_FACTS = re.compile(r'<script type="application/json" id="facts">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Agreement:
    """Dice of two of the label maps of one structure, in [0, 1]; None where one is not there or both are empty."""

    atlas_model: float | None = None
    result_atlas: float | None = None
    result_model: float | None = None


@dataclass(frozen=True, eq=False)
class CaseFacts:
    """What the page of a cohort takes from the page of a case.

    Parameters
    ----------
    colors : mapping of int to tuple of int
        Of each label value, 0 to 255.
    agreement : mapping of int to Agreement
        Of each label value; empty where the maps were not kept.
    thumbnail : str
        A small picture, as HTML.
    has_image : bool
        Whether the scan was there.
    """

    colors: Mapping[int, tuple[int, int, int]]
    agreement: Mapping[int, Agreement]
    thumbnail: str
    has_image: bool


@dataclass(frozen=True)
class CaseOptions:
    """What goes into the page of a case.

    Parameters
    ----------
    viewer_voxels : int
        The scan of the interactive view is reduced to so many voxels; 0 leaves the view out.
    overview : bool
        Whether to draw ``overview.png`` (extra "report").
    """

    viewer_voxels: int = 8_000_000
    overview: bool = True


@dataclass(frozen=True, eq=False)
class _Maps:
    """The volumes of a case in RAS-canonical order."""

    image: Volume | None
    image_note: str
    result: Volume
    atlas: Volume | None
    model: Volume | None
    structures: tuple[Structure, ...]


def write_case(case: CaseRow, image: Path | None, options: CaseOptions, *, back: str, force: bool = False) -> CaseFacts:
    """Write the page of a case into its folder, unless it is there and up to date.

    Parameters
    ----------
    case : CaseRow
        The result.
    image : Path or None
        The query's file, or the folder of its DICOM series, where it is known.
    options : CaseOptions
        What goes into it.
    back : str
        Address of the cohort's page, as seen from the folder; empty for none.
    force : bool
        Write it in any case.

    Raises
    ------
    InputError
        If a label map cannot be read, or the folder cannot be written.
    MissingExtraError
        If the picture cannot be drawn.
    """
    path = case.folder / CASE_PAGE
    mark = _fingerprint(case.folder, image, options, back)
    if not force:
        known = _known_facts(path, mark)
        if known is not None and (not options.overview or (case.folder / CASE_PICTURE).is_file()):
            return known
    maps = _load(case, image)
    html, facts = _page(case, maps, options, mark, back)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
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


def _subtitle(case: CaseRow, maps: _Maps) -> str:
    parts = [f"Model: {case.model.get('name', '-')}"]
    if case.verdict is not None:
        counts = {v: sum(row.verdict == v for row in case.structures) for v in ("good", "review", "failed")}
        parts.append("verdicts: " + ", ".join(f"{n} {v}" for v, n in counts.items() if n))
    if maps.image is None:
        parts.append("the scan was not there: labels only")
    return ". ".join(parts) + "."


def _fingerprint(folder: Path, image: Path | None, options: CaseOptions, back: str) -> str:
    """Changes with anything the page shows."""
    found = hashlib.sha256(f"{_EDITION} {options} {back}".encode())
    for name in ("report.css", "case.js"):
        found.update(asset(name).encode())
    for name in (RUN, STATUS):
        if (folder / name).is_file():
            found.update((folder / name).read_bytes())
    for path in (folder / SEGMENTATION, folder / ATLAS, folder / MODEL, image):
        if path is None or not path.exists():
            continue
        # The folder of a DICOM series does not change with its files.
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            status = file.stat()
            found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def _known_facts(path: Path, mark: str) -> CaseFacts | None:
    """What an earlier page knows, if it is of the same things."""
    try:
        with path.open(encoding="utf-8") as file:
            match = _FACTS.search(file.read(_FACTS_REACH))
        content = json.loads(match[1]) if match else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if content.get("fingerprint") != mark:
        return None
    return CaseFacts(
        {int(value): (color[0], color[1], color[2]) for value, color in content["colors"].items()},
        {int(value): Agreement(*numbers) for value, numbers in content["agreement"].items()},
        content["thumbnail"],
        content["has_image"],
    )


def _load(case: CaseRow, image: Path | None) -> _Maps:
    result = load_labels(case.folder / SEGMENTATION, allow_empty=True)
    table = {} if result.source is None else result.source.label_table
    found = {one.value: one for one in structures_of([row.value for row in case.structures], [table])}
    structures = tuple(Structure(row.value, row.name, found[row.value].color) for row in case.structures)
    result = result.canonical()

    def other(name: str) -> Volume | None:
        path = case.folder / name
        if not path.is_file():
            return None
        labels = load_labels(path, allow_empty=True)
        if labels.grid.axes_relative_to(result.grid) is None:
            raise InputError(f"{path}: not on the voxels of {SEGMENTATION}; make the result again")
        return labels.turned_to(result.grid)

    scan, note = None, "The scan itself was not given: only labels are shown. <code>--images FOLDER</code> adds it."
    if image is not None:
        try:
            series = case.series if image.is_dir() and is_dicom_input(image) else None
            read = open_image(image, series)
        except MissingExtraError as error:
            note = f"The scan could not be read ({text(error)}): only labels are shown."
        except InputError:
            note = "The scan could not be read: only labels are shown."
        else:
            if read.grid.axes_relative_to(result.grid) is None:
                note = "The scan of that name has other voxels than the result: only labels are shown."
            else:
                scan, note = read.turned_to(result.grid), ""
    return _Maps(scan, note, result, other(ATLAS), other(MODEL), structures)


# The page


def _page(case: CaseRow, maps: _Maps, options: CaseOptions, mark: str, back: str) -> tuple[str, CaseFacts]:
    values = [one.value for one in maps.structures]
    boxes = _boxes(maps, values)
    hounsfield = maps.image is not None and is_hounsfield(maps.image)
    agreement = _agreement(maps, values)
    colors = {one.value: one.color for one in maps.structures}
    thumb = _thumbnail(maps, boxes, colors, hounsfield=hounsfield)
    facts = CaseFacts(colors, agreement, thumb, maps.image is not None)
    known = {
        "fingerprint": mark,
        "colors": colors,
        "agreement": {v: [a.atlas_model, a.result_atlas, a.result_model] for v, a in agreement.items()},
        "thumbnail": thumb,
        "has_image": facts.has_image,
    }
    sections, centres = [], {}
    for row, structure in zip(case.structures, maps.structures, strict=True):
        box = boxes.get(row.value)
        if box is None:
            continue
        html, centre = _structure_section(maps, row.value, structure, box, hounsfield=hounsfield)
        sections.append(html)
        centres[row.value] = centre
    viewer, data = _viewer(maps, options, centres) if options.viewer_voxels else ("", "")
    body = "\n".join(
        (
            _head(case, maps, back),
            _structures_table(case, maps, agreement, centres),
            viewer,
            _slices(sections, maps),
            _making(case),
            footer(case.versions),
        )
    )
    head = data_block("facts", known)
    return page(case.name, "case", body, head=head, data=data, scripts=("case.js",)), facts


def _boxes(maps: _Maps, values: Sequence[int]) -> dict[int, tuple[slice, ...]]:
    """Around each structure, wherever one of the three maps has it."""
    found: dict[int, tuple[slice, ...]] = {}
    for volume in (maps.result, maps.atlas, maps.model):
        if volume is None:
            continue
        largest = int(volume.data.max(initial=0))
        if largest > 10 * len(values) + 255:
            # Boxes are listed for all numbers up to the largest.
            boxes = {v: ndimage.find_objects((volume.data == v).astype(np.uint8)) for v in values}
            listed = {v: box[0] for v, box in boxes.items() if box}
        else:
            every = ndimage.find_objects(volume.data)
            listed = {v: every[v - 1] for v in values if v <= len(every) and every[v - 1] is not None}
        for value, box in listed.items():
            known = found.get(value, box)
            found[value] = tuple(
                slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(known, box, strict=True)
            )
    return found


def _agreement(maps: _Maps, values: Sequence[int]) -> dict[int, Agreement]:
    if maps.atlas is None:
        return {}

    def dice(one: Volume | None, other: Volume | None) -> dict[int, float | None]:
        if one is None or other is None:
            return dict.fromkeys(values)
        found = dice_per_structure(one.data, other.data, values)
        return {value: None if np.isnan(found[value]) else round(found[value], 4) for value in values}

    pairs = dice(maps.atlas, maps.model), dice(maps.result, maps.atlas), dice(maps.result, maps.model)
    return {value: Agreement(*(pair[value] for pair in pairs)) for value in values}


def _thumbnail(
    maps: _Maps, boxes: Mapping[int, tuple[slice, ...]], colors: Mapping[int, Sequence[int]], *, hounsfield: bool
) -> str:
    """The plane of acquisition where most of the structures show, all of them in view."""
    if not boxes:
        return ""
    low = [min(box[axis].start for box in boxes.values()) for axis in range(3)]
    high = [max(box[axis].stop for box in boxes.values()) for axis in range(3)]
    whole = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside = maps.result.data[whole] > 0
    if not inside.any():
        inside = np.ones_like(inside)
    spacing = maps.result.grid.spacing_mm
    view = view_of_acquisition(spacing)
    panels = panels_of(inside, low, maps.result.grid.shape, spacing)
    panel = next(one for one in panels if one.view is view)
    window = None
    if maps.image is not None:
        window = structure_window(maps.image, inside, whole, hounsfield=hounsfield)
    return thumbnail(maps.image, maps.result.data, colors, panel, window)


def _structure_section(
    maps: _Maps, value: int, structure: Structure, box: tuple[slice, ...], *, hounsfield: bool
) -> tuple[str, list[float]]:
    """Three slices through a structure, and the point in mm (RAS+) in which they meet."""
    masks = {
        kind: volume.data[box] == value
        for kind, volume in (("result", maps.result), ("atlas", maps.atlas), ("model", maps.model))
        if volume is not None
    }
    leading = next(mask for mask in masks.values() if mask.any())
    spacing = maps.result.grid.spacing_mm
    offset = [side.start for side in box]
    panels = panels_of(leading, offset, maps.result.grid.shape, spacing)
    shown = tuple(slice(a, b) for a, b in zip(panels[0].start, panels[0].stop, strict=True))
    window = None
    if maps.image is not None:
        inside = maps.result.data[shown] == value
        window = structure_window(maps.image, inside, shown, hounsfield=hounsfield)
    figures = "".join(_figure(maps, value, panel, window, masks) for panel in panels)
    ijk = np.zeros(3)
    for panel in panels:
        ijk[panel.view.normal] = panel.index
    centre = [round(float(n), 2) for n in maps.result.grid.voxel_to_world(ijk)]
    missing = "" if masks["result"].any() else ' <span class="note">not in the result</span>'
    note = f'<span class="note">window {text(window.name)}</span>' if window is not None else ""
    return (
        f'<section class="structure" id="s{value}"><h3>{swatch(structure.color)}{text(structure.name)}{missing} {note}'
        f'</h3><div class="slices">{figures}</div></section>'
    ), centre


def _figure(
    maps: _Maps, value: int, panel: Panel, window: Window | None, masks: Mapping[str, NDArray[np.bool_]]
) -> str:
    lines = []
    # The result on top of what it was made of.
    for kind, volume in (("atlas", maps.atlas), ("model", maps.model), ("result", maps.result)):
        if volume is not None and masks[kind].any():
            lines.append((kind, "", outline(cut(volume.data, panel) == value, panel)))
    return figure(picture(maps.image, panel, window), panel, lines, maps.result.grid.affine)


def _head(case: CaseRow, maps: _Maps, back: str) -> str:
    link = f'<a class="back" href="{text(back)}">‹ all cases</a>' if back else ""
    present = sum(row.status == "present" for row in case.structures)
    trips = [row.round_trip for row in case.structures if row.round_trip is not None]
    estimates = [row.score for row in case.structures if row.score is not None]
    tiles = [
        tile("structures", f"{present} of {len(case.structures)}", "present in the result"),
        tile("registration", score(case.confidence), "confidence, 0 to 1"),
        *([tile("lowest round trip", score(min(trips)), "Dice, atlas to query and back")] if trips else []),
        *([tile("lowest estimate", score(min(estimates)), "Dice, without labels")] if estimates else []),
        tile("model", text(case.model.get("name", "-")), f"prompt: {text(case.model.get('prompt') or '-')}"),
        tile("time", duration(case.total_seconds), text(case.run.get("device", ""))),
    ]
    notes = [text(doubt) for doubt in case.doubts] + ([maps.image_note] if maps.image_note else [])
    if maps.atlas is None:
        notes.append(
            "The atlas's and the model's own label maps were not kept: only the result is outlined. "
            "<code>segment --keep</code> keeps them."
        )
    elif maps.model is None and case.model.get("name") not in (None, "none"):
        notes.append("The model's own label map is not in the folder.")
    shown = "".join(f'<p class="notice">{note}</p>' for note in notes)
    return (
        f"<header>{link}<h1>{text(case.name)} {badge(case.verdict) if case.verdict else ''}</h1>"
        f'<div class="tiles">{"".join(tiles)}</div>{shown}</header>'
    )


def _structures_table(
    case: CaseRow, maps: _Maps, agreement: Mapping[int, Agreement], centres: Mapping[int, Sequence[float]]
) -> str:
    judged = any(row.verdict for row in case.structures)
    # Made only to train the gate (fusion.examples).
    went = any(row.round_trip is not None for row in case.structures)
    rows = []
    for row, structure in zip(case.structures, maps.structures, strict=True):
        one = agreement.get(row.value, Agreement())
        name = f"{swatch(structure.color)}{text(row.name)}"
        if row.value in centres:
            name = f'<a href="#s{row.value}" data-value="{row.value}">{name}</a>'
        remarks = "; ".join(
            part for part in (row.verdict_reason, row.reason or ("" if row.status == "present" else row.status)) if part
        )
        cells = [
            f"<th scope='row'>{name}</th>",
            *([f"<td>{badge(row.verdict)}</td><td class='n'>{score(row.score)}</td>"] if judged else []),
            f"<td class='n'>{millilitres(row.volume_ml)}</td>",
            *([f"<td class='n'>{score(row.round_trip)}</td>"] if went else []),
            *(f"<td class='n'>{score(value)}</td>" for value in (one.atlas_model, one.result_atlas, one.result_model)),
            f"<td class='why'>{text(remarks)}</td>",
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [
        "<th>structure</th>",
        *(["<th>verdict</th><th class='n'>est. Dice</th>"] if judged else []),
        "<th class='n'>volume<br>ml</th>",
        *(
            ["<th class='n' title='Dice of the atlas label with itself, to the query and back'>round<br>trip</th>"]
            if went
            else []
        ),
        "<th class='n' title='Dice of warped atlas and model'>atlas ·<br>model</th>",
        "<th class='n' title='Dice of result and warped atlas'>result ·<br>atlas</th>",
        "<th class='n' title='Dice of result and model'>result ·<br>model</th>",
        "<th>remarks</th>",
    ]
    return (
        "<section><h2>Structures</h2><div class='scroll'><table class='grid'><thead><tr>"
        f"{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class='hint'>Agreements are Dice coefficients, 0 to 1; none of them needs the true labels. "
        "Choose a structure to see it in the view and in the slices.</p></section>"
    )


def _viewer(maps: _Maps, options: CaseOptions, centres: Mapping[int, Sequence[float]]) -> tuple[str, str]:
    values = [one.value for one in maps.structures]
    thin = thinning(maps.result.grid, options.viewer_voxels)
    volumes: dict[str, str] = {}
    if maps.image is not None:
        volumes["scan"] = scan_payload(maps.image, thin)
    for kind, volume in (("result", maps.result), ("atlas", maps.atlas), ("model", maps.model)):
        if volume is not None:
            volumes[kind] = labels_payload(volume, values, thin)
    note = "Scan with 8 bits."
    if not thin.is_none:
        factors = " × ".join(map(str, thin.factors))
        whole = " × ".join(map(str, maps.result.grid.shape))
        kept = " × ".join(map(str, thin.shape))
        note = (
            f"Reduced for this view: {factors} voxels became one ({whole} to {kept}); small structures may look coarse "
            "or vanish here. The slices below have all voxels."
        )
    content = {
        "structures": [{"value": s.value, "name": s.name, "color": list(s.color)} for s in maps.structures],
        "centres": centres,
        "volumes": volumes,
    }
    controls = []
    for kind, label, opacity, on in (
        ("scan", "scan", 100, True),
        ("result", "result", 60, True),
        ("atlas", "atlas mask", 50, False),
        ("model", "model mask", 50, False),
    ):
        if kind in volumes:
            controls.append(
                f'<div class="layer {kind}"><label><input type="checkbox" data-layer="{kind}"'
                f"{' checked' if on else ''}> <i></i>{label}</label>"
                f'<input type="range" min="0" max="100" value="{opacity}" data-opacity="{kind}" '
                f'aria-label="opacity of {label}"></div>'
            )
    layouts = "".join(
        f'<button type="button" data-layout="{kind}"{" aria-pressed=true" if kind == "multi" else ""}>{label}</button>'
        for kind, label in (
            ("multi", "planes + 3-D"),
            ("axial", "axial"),
            ("coronal", "coronal"),
            ("sagittal", "sagittal"),
            ("render", "3-D"),
        )
    )
    html = (
        '<section id="view"><h2>Interactive view</h2><div class="viewer"><div class="bar-top">'
        f'<div class="layouts" role="group" aria-label="layout">{layouts}</div>'
        '<label class="switch"><input type="checkbox" id="outline"> outlines only</label>'
        '<output id="where" aria-live="off"></output></div>'
        f'<div class="canvas"><canvas id="canvas" aria-label="interactive view"></canvas>'
        f'<p id="viewer-state">loading …</p></div><div class="layers">{"".join(controls)}</div></div>'
        f'<p class="hint">{text(note)} Drag to move the crosshair or turn the 3-D view, scroll to '
        "change slice, drag with the right button to set the window.</p></section>"
    )
    data = data_block("viewer-data", content) + (
        f"<!--\n{asset('NIIVUE-LICENSE.txt')}-->\n"
        f'<script type="text/plain" id="niivue">{packed_asset("niivue.umd.js")}</script>\n'
    )
    return html, data


def _slices(sections: Sequence[str], maps: _Maps) -> str:
    kinds = [("result", "result"), ("atlas", "atlas mask"), ("model", "model mask")]
    present = [pair for pair, volume in zip(kinds, (maps.result, maps.atlas, maps.model), strict=True) if volume]
    keys = "".join(
        f'<label class="key {kind}"><input type="checkbox" data-lines="{kind}" checked>'
        f'<svg viewBox="0 0 30 6"><path class="{kind}" d="M0 3L30 3"/></svg>{label}</label>'
        for kind, label in present
    )
    empty = "<p>No structure is in this result.</p>" if not sections else ""
    return (
        f'<section id="slices"><div class="keys"><h2>Slices</h2>{keys}</div>{empty}{"".join(sections)}'
        '<p class="hint">Radiological display: the patient\'s right is at the left of axial and coronal slices. '
        "Each plane is where the structure shows most of itself.</p></section>"
    )


def _making(case: CaseRow) -> str:
    registration: dict[str, Any] = dict(case.run.get("registration") or {})
    folding = case.folding
    rows = [
        ("registration", text(registration.get("source", "-"))),
        ("confidence", score(case.confidence)),
        ("folding", "-" if folding is None else f"{100 * folding:.3g} % of the body"),
        ("device", text(case.run.get("device", "-"))),
        ("seed", text(case.run.get("seed", "-"))),
    ]
    stages = [(name, text(duration(seconds))) for name, seconds in case.seconds.items()]
    settings = [(name, f"<code>{text(value)}</code>") for name, value in flattened(case.settings).items()]
    versions = [(name, text(value)) for name, value in case.versions.items()]
    return (
        '<section><h2>How it was made</h2><div class="columns">'
        f"<div><h3>Model</h3>{model_table(case.model)}</div><div><h3>Registration</h3>{pairs_table(rows)}</div>"
        f"<div><h3>Time</h3>{pairs_table(stages)}</div><div><h3>Versions</h3>{pairs_table(versions)}</div></div>"
        f"<details><summary>All settings</summary>{pairs_table(settings)}</details>"
        f"<details><summary>Licence of the interactive view</summary><pre>{text(asset('NIIVUE-LICENSE.txt'))}</pre>"
        "</details></section>"
    )
