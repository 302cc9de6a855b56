"""Whether something is still what a result was made from: digests of values in memory and records of files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.image import Source

#: Hexadecimal digits kept of a SHA-256: two of a billion differing values share them once in 10^20.
_DIGITS = 32


_BLOCK_BYTES = 1 << 20


#: Headers of scans whose voxels lie in files of their own, and the field that names these.
_DETACHED = {".mhd": re.compile(r"^ElementDataFile\s*=\s*(.*)$"), ".nhdr": re.compile(r"^data ?file:\s*(.*)$")}


#: Bytes of such a header that are read at most; it is text of a few kB.
_HEADER_BYTES = 1 << 20


def digest(*values: Any) -> str:
    """Hexadecimal digest of plain values, arrays and dataclasses of them: the same in every process.

    Files go by their names, wherever they lie: a result does not depend on that.

    Raises
    ------
    TypeError
        If a value is of a type that is not known here.
    """
    found = hashlib.sha256()
    for value in values:
        _add(found, value)
    return found.hexdigest()[:_DIGITS]


def _add(found: hashlib._Hash, value: Any) -> None:
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        found.update(f"array {value.dtype.str} {value.shape};".encode())
        found.update(np.ascontiguousarray(value).data)
    elif isinstance(value, Source):
        # Its header is read already; the file's own name and notes go into run.json.
        _add(found, (value.path, value.notes))
    elif isinstance(value, Path):
        _add(found, value.name)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        found.update(f"{kind};".encode())
        for field in dataclasses.fields(value):
            _add(found, (field.name, getattr(value, field.name)))
    elif isinstance(value, Mapping):
        _add(found, sorted(value.items()))
    elif isinstance(value, tuple | list | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        found.update(f"sequence {len(items)};".encode())
        for item in items:
            _add(found, item)
    elif value is None or isinstance(value, str | bytes | bool | int | float):
        text = repr(value)
        found.update(f"{kind} {len(text)} {text};".encode())
    else:
        raise TypeError(f"no digest of {kind}")


def file_record(path: Path) -> dict[str, str]:
    """What a file, or a folder with all in it, contains.

    Returns
    -------
    dict of str to str
        "file": its name. "stamp": digest of names, sizes and times, cheap to look up again. "sha256": of the content.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    content = hashlib.sha256()
    files = _files_of(path)
    stamp = _stamp(files)
    for name, file in files:
        content.update(f"{len(name)} {name} {file.stat().st_size};".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                content.update(block)
    return {"file": path.name, "stamp": stamp, "sha256": content.hexdigest()[:_DIGITS]}


def is_unchanged(path: Path, record: Mapping[str, Any] | None) -> bool:
    """Whether a file has the content of the record; it is read only if its size or time differs.

    A file that cannot be read counts as changed: who reads it next says why.
    """
    if record is None or record.get("file") != path.name:
        return False
    try:
        if _stamp(_files_of(path)) == record.get("stamp"):
            return True
        return file_record(path)["sha256"] == record.get("sha256")
    except OSError:
        return False


def _stamp(files: list[tuple[str, Path]]) -> str:
    stats = [(name, file.stat()) for name, file in files]
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _files_of(path: Path) -> list[tuple[str, Path]]:
    """The file, and those its header names; or all files below a folder, with their names in it."""
    if path.is_dir():
        return sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    return [(file.name, file) for file in (path, *_detached(path))]


def _detached(header: Path) -> list[Path]:
    """Files of voxels that a header names: one, a list below it, or a pattern with a number."""
    pattern = _DETACHED.get(header.suffix.lower())
    if pattern is None:
        return []
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
        return [file for file in named if file.is_file()]
    return []
