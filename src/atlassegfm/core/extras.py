"""Extras of this package: what they bring, and whether it is installed."""

import importlib
import importlib.metadata
import re
from typing import Any

from .errors import MissingExtraError

_PACKAGE = "atlassegfm"


def requirements(extra: str) -> list[str]:
    """Requirements of an extra, as pip takes them; empty where this package is not installed."""
    try:
        wanted = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    marker = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    return [one.partition(";")[0].strip() for one in wanted if marker.search(one)]


def require(feature: str, extra: str, *modules: str) -> Any:
    """Import what a feature needs of an extra, and give the last of the modules; else MissingExtraError."""
    try:
        return [importlib.import_module(name) for name in modules][-1]
    except ImportError:
        raise MissingExtraError(feature, extra) from None


def is_installed(extra: str) -> bool | None:
    """Check whether all that an extra brings is installed; None where this package is not."""
    names = [re.split(r"[^A-Za-z0-9._-]", one, maxsplit=1)[0] for one in requirements(extra)]
    try:
        return bool([importlib.metadata.version(name) for name in names]) or None
    except importlib.metadata.PackageNotFoundError:
        return False
