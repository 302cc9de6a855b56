"""One annotated scan customizes a frozen segmentation foundation model to every other scan of its kind."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import AtlasSegError, InputError, MissingExtraError, ModelError, RegistrationError
from .version import __version__

if TYPE_CHECKING:
    from .context import Context
    from .customization import Customization, customize
    from .geometry import Grid
    from .image import Volume, load_image, load_labels, save_volume
    from .pipeline import Segmentation, Settings, segment
    from .registration import Registration, RegistrationSettings, register
    from .structures import Structure

__all__ = [
    "AtlasSegError",
    "Context",
    "Customization",
    "Grid",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "Registration",
    "RegistrationError",
    "RegistrationSettings",
    "Segmentation",
    "Settings",
    "Structure",
    "Volume",
    "__version__",
    "customize",
    "load_image",
    "load_labels",
    "register",
    "save_volume",
    "segment",
]

#: Where the names live that are imported on first use: PyTorch alone takes seconds.
_HOME = {
    "Context": "context",
    "Customization": "customization",
    "Grid": "geometry",
    "Registration": "registration",
    "RegistrationSettings": "registration",
    "Segmentation": "pipeline",
    "Settings": "pipeline",
    "Structure": "structures",
    "Volume": "image",
    "customize": "customization",
    "load_image": "image",
    "load_labels": "image",
    "register": "registration",
    "save_volume": "image",
    "segment": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
