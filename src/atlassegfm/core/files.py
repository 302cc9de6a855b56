"""Atomic files and folders."""

import errno
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

#: A path as callers of public functions may give it.
PathLike = str | os.PathLike[str]

#: Temporary folders beside results begin so; a killed process may leave one.
_TEMPORARY_PREFIX = ".writing-"
#: Folder in a temporary one for what is being replaced, under its own name.
_REPLACED = "replaced"
#: Seconds after which a temporary folder of an unknown writer is left over: writing a result takes seconds.
_LEFT_OVER_SECONDS = 24 * 3600
#: Endings of files: a folder for results is not called so by intention.
_FILE_ENDINGS = (
    *(".nii", ".gz", ".nrrd", ".mha", ".mhd", ".mgz", ".dcm"),
    *(".csv", ".json", ".html", ".toml", ".png", ".zip"),
)


class DiskFullError(InputError):
    """No space is left where results go: what comes next cannot be written either."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise errors of the disk as InputError about ``path``; DiskFullError if no space or quota is left."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path}: a file is in the way where a folder is expected; choose another place") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{path}: no space is left there; free some, and run the same command again") from None
        raise InputError(f"{path}: cannot write there ({error.strerror or error}); choose another place") from None


def check_readable(path: Path) -> None:
    """Raise :class:`InputError` if an existing file cannot be opened or is empty."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check the permissions") from None
    if empty:
        raise InputError(f"{path}: the file is empty (0 bytes); copy it again")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` for a file or folder; move it there if the block succeeds."""
    with disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=_TEMPORARY_PREFIX) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


@contextmanager
def replaced_files(folder: Path, last: str) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``; move each file in it to the same place there if the block succeeds.

    Each is on the disk before it is moved, and the one called ``last`` goes last: at any moment, also when the machine
    stops, every file is whole, and an earlier one is there until its successor is.
    """
    own = f"{_TEMPORARY_PREFIX}{_host()}-{os.getpid()}-"
    with disk_errors(folder), tempfile.TemporaryDirectory(None, own, folder.parent) as holder:
        yield Path(holder)
        files = sorted((one for one in Path(holder).rglob("*") if one.is_file()), key=lambda one: one.name == last)
        for file in files:
            _to_disk(file)
        for file in files:
            target = folder / file.relative_to(holder)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
        _to_disk(folder)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, and wait until it is on the disk; a line that was cut off before it is ended first."""
    with disk_errors(path), path.open("ab+") as file:
        if size := file.tell():
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and sys.platform == "win32":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def entries_of(folder: Path) -> list[Path]:
    """List files and folders in a folder by name, without hidden ones ("._x" is what macOS leaves beside x)."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); check the permissions") from None


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Make a folder for results, and remove it if it ends up empty; InputError if it cannot be written to."""
    if path.suffix.lower() in _FILE_ENDINGS and not path.exists():
        raise InputError(f"{path}: a folder is expected here, and this is named like a file; leave out {path.suffix}")
    made: list[Path] = []
    try:
        with disk_errors(path):
            for folder in (*reversed(path.parents), path):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
            with tempfile.TemporaryDirectory(dir=path, prefix=_TEMPORARY_PREFIX):
                pass
        yield
    finally:
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def check_replaceable(path: Path, known: frozenset[str]) -> None:
    """Raise :class:`InputError` if ``path`` is a file, or a folder with other entries than ``known``."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path}: exists and is not a folder, but the result is to go there; move it away")
    if path.is_dir():
        try:
            foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in known)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); choose another output folder") from None
        if foreign:
            raise InputError(
                f"{path}: the result is to go there, but the folder holds other files ({foreign[0]}"
                f"{', ...' if len(foreign) > 1 else ''}); choose another output folder"
            )


@contextmanager
def replaced_folder(path: Path, known: frozenset[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; put it in its place if the block succeeds, delete it if not.

    InputError as :func:`check_replaceable`, and if the disk refuses.
    """
    check_replaceable(path, known)
    own = f"{_TEMPORARY_PREFIX}{_host()}-{os.getpid()}-"
    with disk_errors(path), tempfile.TemporaryDirectory(None, own, path.parent, ignore_cleanup_errors=True) as holder:
        new, old = Path(holder, "new"), Path(holder, _REPLACED, path.name)
        new.mkdir()
        old.parent.mkdir()
        yield new
        # A folder that is not empty cannot be replaced in one step: for a moment there is none.
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)


def remove_unfinished(folder: Path) -> int:
    """Delete temporary folders that killed processes left in ``folder``, and count them.

    Those of a running process of this machine are kept, and those of other machines for a day. What was being replaced
    when the process was killed is put back.
    """
    removed = 0
    try:
        found = [Path(entry) for entry in os.scandir(folder) if entry.name.startswith(_TEMPORARY_PREFIX)]
    except OSError:
        return 0
    for holder in found:
        host, _, process = holder.name.removeprefix(_TEMPORARY_PREFIX).rpartition("-")[0].rpartition("-")
        try:
            old = time.time() - holder.stat().st_mtime > _LEFT_OVER_SECONDS
        except OSError:
            continue
        if old or (host == _host() and process.isdigit() and not _runs(int(process))):
            for replaced in (holder / _REPLACED).glob("*"):
                if not (folder / replaced.name).exists():
                    os.replace(replaced, folder / replaced.name)
            shutil.rmtree(holder, ignore_errors=True)
            removed += 1
    return removed


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]+", ".", socket.gethostname()) or "unknown"


def _runs(process: int) -> bool:
    """Whether there is such a process here."""
    if sys.platform == "win32":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        return True
    return True
