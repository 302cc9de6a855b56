"""Label maps and scans as files in memory; what a file that was sent says of each structure."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ...core.errors import InputError
from ...core.image import WRITTEN_SUFFIXES, Volume, image_suffix, label_values, load_labels
from ...core.itk import save_itk
from ...dicom import open_image
from .multipart import File


def nrrd(volume: Volume, *, compress: bool = True) -> bytes:
    """Write an NRRD file, raw or compressed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nrrd"
        save_itk(volume, path, None, compress=compress)
        return path.read_bytes()


def read_labels(file: File) -> Volume:
    """Read a label map that was sent; InputError if it is none, or of a format that is not read."""
    suffix = image_suffix(Path(PureWindowsPath(file.name).name))
    if suffix not in WRITTEN_SUFFIXES:
        raise InputError(f"the label map is no file ending in {', '.join(WRITTEN_SUFFIXES)}; send it as .nrrd")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"labels{suffix}"
        path.write_bytes(file.content)
        return load_labels(path, allow_empty=True)


def read_scan(files: Sequence[File]) -> Volume:
    """Read a scan that was sent: a file, or those of a DICOM series; InputError if it is none."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for n, file in enumerate(files):
            name = Path(PureWindowsPath(file.name).name)
            paths.append(Path(folder) / f"{n:05d}{image_suffix(name) or '.dcm'}")
            paths[-1].write_bytes(file.content)
        return open_image(paths[0] if len(paths) == 1 and image_suffix(paths[0]) else Path(folder))


def names_by_value(labels: Volume, listed: Sequence[Mapping[str, Any]], own: Mapping[str, int]) -> dict[int, str]:
    """Find which structure each value of a label map is; InputError where that is not clear.

    ``listed`` is what the sender says, ``own`` the values that were sent to it. 3D Slicer numbers the structures that
    it exports from 1, while the numbers that it says count all: they go by their order, unless that is refuted.
    """
    found = set(label_values(labels.data))
    table = {} if labels.source is None else labels.source.label_table
    inside = {value: entry.name for value, entry in table.items() if value > 0 and entry.name}
    if inside and found <= inside.keys():
        return inside
    names = [str(one.get("name", "")) for one in listed]
    if not names:
        if not found <= set(own.values()):
            raise InputError(f"the label map has the values {sorted(found)}, and nothing says what they are")
        return {value: name for name, value in own.items()}
    in_order = dict(enumerate(names, start=1))
    said = {idx: name for one, name in zip(listed, names, strict=True) if isinstance(idx := one.get("idx"), int)}
    by_order, by_said = found <= in_order.keys(), found <= said.keys()
    if by_order and (not by_said or found == in_order.keys() or all(in_order[n] == said[n] for n in found)):
        return in_order
    if by_said and not by_order:
        return said
    if by_said:
        raise InputError("the values of the label map do not tell which structures it has; send it as .seg.nrrd")
    raise InputError(f"the label map has the values {sorted(found)} for the {len(names)} structures that it lists")
