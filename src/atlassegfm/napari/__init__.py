"""Open results and contexts in napari: label maps with names, colours and place.

napari finds ``napari.yaml`` by an entry point; nothing here imports it. Arrays have the axes k, j, i of the files, and
the world is S, P, L in mm: napari shows the last two axes downwards and to the right, so slices lie as radiologists
see them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..context import CONTENT, Context
from ..core.files import PathLike
from ..core.geometry import LPS_FLIP
from ..core.image import Volume, label_values, load_labels
from ..core.labels import LabelTable, Structure, read_names_file, structures_of
from ..records import RUN, SLICER_COLORS, RunRecord, label_map_of

#: Data, arguments of the layer, and its kind, as napari takes a layer from a reader.
Layer = tuple[Any, dict[str, Any], str]
#: Label maps that --keep leaves beside a result.
_KEPT = ("atlas", "model")


def reader_of(path: PathLike | Sequence[PathLike]) -> Callable[[Any], list[Layer]] | None:
    """Choose the reader of a result or a context: the folder, or its ``run.json`` or ``context.toml``; else None."""
    if isinstance(path, Sequence) and not isinstance(path, str):
        return None  # a stack of files
    folder = _folder_of(path)
    if (folder / RUN).is_file() and label_map_of(folder).is_file():
        return lambda found: read_result(_folder_of(found))
    if (folder / CONTENT).is_file():
        return lambda found: read_context(_folder_of(found))
    return None


def _folder_of(path: PathLike) -> Path:
    found = Path(path)
    return found.parent if found.name in (RUN, CONTENT) else found


def read_result(folder: Path) -> list[Layer]:
    """Read the labels of a result; those of atlas and model, if kept, are hidden. InputError if it is damaged."""
    rows = RunRecord.read(folder / RUN).structures
    path = label_map_of(folder)
    labels = load_labels(path, allow_empty=True)
    tables: list[LabelTable] = [] if labels.source is None else [labels.source.label_table]
    if (folder / SLICER_COLORS).is_file():
        tables.insert(0, read_names_file(folder / SLICER_COLORS))
    colors = {one.value: one.color for one in structures_of([row.value for row in rows], tables)}
    structures = [Structure(row.value, row.name, colors[row.value]) for row in rows]
    found = [_labels(labels, structures, folder.name)]
    for name in _KEPT:
        if (folder / f"{name}.nii.gz").is_file():
            kept = load_labels(folder / f"{name}.nii.gz", allow_empty=True)
            found.append(_labels(kept, structures, f"{folder.name}: {name}", visible=False))
    verdicts = [(one.quality.verdict if one.quality is not None else None) or "" for one in rows]
    for _, arguments, _kind in found:
        arguments["features"]["verdict"] = ["", *verdicts]
    return found


def read_context(folder: Path) -> list[Layer]:
    """Read the atlases of a context, scans and labels; InputError if it is damaged."""
    found: list[Layer] = []
    for number, atlas in enumerate(Context.load(folder).atlases, start=1):
        name = "atlas" if number == 1 else f"atlas {number}"
        low, high = np.percentile(atlas.image.data, (1.0, 99.5)).tolist()
        limits = {"contrast_limits": (low, high if high > low else low + 1), "colormap": "gray"}
        found.append((_turned(atlas.image), {"name": name, **_place(atlas.image), **limits}, "image"))
        present = set(label_values(atlas.labels.data))
        structures = [one for one in atlas.structures if one.value in present]
        found.append(_labels(atlas.labels, structures, f"{name}: labels"))
    return found


def _labels(labels: Volume, structures: Sequence[Structure], name: str, *, visible: bool = True) -> Layer:
    colors: dict[int | None, Any] = {one.value: [*(n / 255 for n in one.color), 1.0] for one in structures}
    arguments = {
        "name": name,
        "visible": visible,
        **_place(labels),
        # Values that have no colour are background.
        "colormap": colors | {0: [0.0] * 4, None: [0.0] * 4},
        "features": {
            "index": [0, *(one.value for one in structures)],
            "name": ["background", *(one.name for one in structures)],
        },
    }
    return _turned(labels), arguments, "labels"


def _turned(volume: Volume) -> Any:
    return np.ascontiguousarray(volume.data.T)


def _place(volume: Volume) -> dict[str, Any]:
    turn = np.eye(4)[[2, 1, 0, 3]]
    affine = turn @ LPS_FLIP @ volume.grid.affine @ turn
    return {"affine": affine, "units": ("mm",) * 3, "axis_labels": ("S", "P", "L")}
