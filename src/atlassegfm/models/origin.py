"""Where the numbers of a model come from, as plain values for ``run.json``.

A model tells of its weights under "weights" (the file, its size in bytes, its SHA-256), and of the package it runs on
under the name of that package with "_version".
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .weights import loaded_sha256


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 (hexadecimal) of a file of weights; the folders above it are left out."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": loaded_sha256(path)}


def installed_version(package: str) -> str:
    """Version of an installed package, by its name on the package index; "unknown" where none is noted."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
