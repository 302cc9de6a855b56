"""HTML pages from templates: each holds all it needs and loads nothing."""

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..core.files import write_text
from ..core.version import __version__
from ..records import ModelRecord
from .folder import finite


@cache
def asset(name: str) -> str:
    """Read a file of the package's assets."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


@cache
def packed_asset(name: str) -> str:
    """Read an asset, compressed and in base64."""
    return base64.b64encode(gzip.compress(asset(name).encode(), mtime=0)).decode("ascii")


@cache
def sources_digest() -> str:
    """Hash everything that pages are made of except their results: version, templates, styles and scripts."""
    found = hashlib.sha256(__version__.encode())
    for folder in ("templates", "assets"):
        for file in sorted((resources.files(__package__) / folder).iterdir(), key=lambda one: one.name):
            found.update(file.read_bytes())
    return found.hexdigest()


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template; values are escaped."""
    write_text(path, _environment().get_template(template).render(values) + "\n")


def score(value: float | None) -> str:
    """Write a number in [0, 1]; a dash for None."""
    return "-" if value is None else f"{value:.2f}"


def millilitres(volume_ml: float) -> str:
    """Write a volume with about three digits, without its unit."""
    return f"{volume_ml:,.0f}" if volume_ml >= 99.5 else f"{volume_ml:.3g}"


def duration(seconds: float | None) -> str:
    """Write a time in s, min or h."""
    if seconds is None:
        return "-"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to "section.key" and value, in their order."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat


def is_non_commercial(model: ModelRecord) -> bool:
    """Check whether the licence of the weights forbids commercial use."""
    licence = model.weights_licence
    return "NC" in licence.upper().replace("_", "-").split("-") or "non-commercial" in licence.lower()


@cache
def _environment() -> Environment:
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    # Pages are the same bytes each time; JSON has no NaN.
    dumps = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False, "sort_keys": False}
    environment.policies["json.dumps_kwargs"] = dumps
    environment.filters |= {"score": score, "millilitres": millilitres, "duration": duration, "finite": finite}
    environment.globals |= {"asset": asset, "packed_asset": packed_asset, "is_non_commercial": is_non_commercial}
    return environment
