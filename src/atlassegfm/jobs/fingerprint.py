"""Digests of inputs: whether a result was made from the same content."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from ..atlas import Atlas
from ..context import Context
from ..core.errors import InputError
from ..core.nifti import PAIR_SUFFIXES, pair_of
from ..records import STATUS, FileRecord

#: Hexadecimal digits kept of a SHA-256: two of a billion different values have the same once in 10^20.
_DIGITS = 32
_BLOCK_BYTES = 1 << 20
#: Headers of scans whose voxels are in files of their own, and the field that names these.
_DETACHED = {".mhd": re.compile(r"^ElementDataFile\s*=\s*(.*)$"), ".nhdr": re.compile(r"^data ?file:\s*(.*)$")}
#: Bytes of such a header that are read at most.
_HEADER_BYTES = 1 << 20


def digest(*texts: str) -> str:
    """Compute the hexadecimal digest of texts."""
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)} {text};".encode())
    return found.hexdigest()[:_DIGITS]


def atlas_digest(atlas: Atlas) -> str:
    """Compute the digest of an atlas: voxels, geometry and structures, wherever its files lie."""
    found = hashlib.sha256()
    for volume in (atlas.image, atlas.labels):
        found.update(f"{volume.data.dtype.str} {volume.data.shape};".encode())
        found.update(np.ascontiguousarray(volume.data).data)
        found.update(np.ascontiguousarray(volume.grid.affine).data)
    found.update(repr(atlas.structures).encode())
    return found.hexdigest()[:_DIGITS]


def context_digest(context: Context) -> str:
    """Compute the digest of the atlases of a context, in their order, and of what they are expected to score."""
    digests = [atlas_digest(one) for one in context.atlases]
    if context.expected:
        digests.append(repr(sorted(context.expected.items())))
    return digests[0] if len(digests) == 1 else digest(*digests)


def file_record(path: Path) -> FileRecord:
    """Describe the content of a file, or of a folder with all in it; OSError if it cannot be read."""
    content = hashlib.sha256()
    files = _files_of(path)
    stamp = _stamp(files)
    for position, file in enumerate(files):
        content.update(f"{position} {file.stat().st_size};".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                content.update(block)
    return FileRecord(
        file=path.name or path.resolve().name, place=place_of(path), stamp=stamp, sha256=content.hexdigest()[:_DIGITS]
    )


def place_of(path: Path) -> str:
    """Compute the digest of an absolute path: it distinguishes places and names no folder."""
    return digest(os.path.realpath(path))


def owner_of(folder: Path, query: Path) -> Literal["nobody", "this", "other"]:
    """Tell whose result a folder holds: of the query (its place, or its content anywhere), or of another scan.

    A failure is nobody's: nothing is lost with it. Results of any format number count.
    """
    record = query_of(folder)
    if record is None:
        return "nobody"
    return "this" if record.place == place_of(query) or is_unchanged(query, record) else "other"


def query_of(folder: Path) -> FileRecord | None:
    """Read which scan the result in a folder was made from; None if it does not say."""
    try:
        content = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        return FileRecord.model_validate(content["provenance"]["query"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_unchanged(path: Path, record: FileRecord | None) -> bool:
    """Check whether a file has the content of the record; it is not read if place, size and time are the same.

    A file that cannot be read counts as changed: who reads it next says why.
    """
    if record is None:
        return False
    try:
        # Another file may have the same size and time: archives keep whole seconds, and raw scans are equally long.
        if record.place == place_of(path) and record.stamp == _stamp(_files_of(path)):
            return True
        return file_record(path).sha256 == record.sha256
    except (OSError, InputError):
        return False


def _stamp(files: list[Path]) -> str:
    stats = [file.stat() for file in files]
    return digest(*(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats))


def _files_of(path: Path) -> list[Path]:
    """The file and those its header names, or all files below a folder in order of their names."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix.lower() in PAIR_SUFFIXES:
        return [*pair_of(path), *(file for file in (path.with_suffix(".mat"),) if file.is_file())]
    return [path, *_detached(path)]


def _detached(header: Path) -> Iterator[Path]:
    """Files of voxels that a header names: one, a list below it, or a pattern with a number."""
    pattern = _DETACHED.get(header.suffix.lower())
    if pattern is None:
        return
    with header.open("rb") as opened:
        lines = opened.read(_HEADER_BYTES).decode("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        match = pattern.match(line.strip())
        if match is None:
            continue
        words = match.group(1).strip()
        if words.startswith("LIST"):
            named = [header.parent / one.strip() for one in lines[number + 1 :] if one.strip()]
        elif "%" in words:
            named = sorted(header.parent.glob(re.sub(r"%\d*d", "*", words.split()[0])))
        else:
            named = [header.parent / words]
        yield from (file for file in named if file.is_file())
        return
