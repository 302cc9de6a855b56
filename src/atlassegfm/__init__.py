"""One annotated scan customizes a frozen segmentation foundation model to every other scan of its kind."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .core.errors import AtlasSegError, InputError, MissingExtraError, ModelError, RegistrationError
from .core.version import __version__

# Before PyTorch allocates: with large pages, networks with large layers run in half the time (Linux).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from .atlas import Atlas
    from .context import Context, customize
    from .core.geometry import Grid
    from .core.image import Volume, load_image, load_labels, save_volume
    from .core.labels import Structure
    from .evaluate import evaluate
    from .registration import Registration, register
    from .result import Segmentation
    from .segment import segment
    from .settings import RegistrationSettings, Settings

__all__ = ["Atlas", "Context", "Grid", "Registration", "RegistrationSettings", "Segmentation", "Settings", "Structure"]
__all__ += ["AtlasSegError", "InputError", "MissingExtraError", "ModelError", "RegistrationError", "Volume"]
__all__ += ["__version__", "customize", "evaluate", "load_image", "load_labels", "register", "save_volume", "segment"]

#: Where the names live that are imported on first use: PyTorch alone takes seconds.
_HOME = {
    "Atlas": "atlas",
    "Context": "context",
    "Grid": "core.geometry",
    "Registration": "registration",
    "RegistrationSettings": "settings",
    "Segmentation": "result",
    "Settings": "settings",
    "Structure": "core.labels",
    "Volume": "core.image",
    "customize": "context",
    "evaluate": "evaluate",
    "load_image": "core.image",
    "load_labels": "core.image",
    "register": "registration",
    "save_volume": "core.image",
    "segment": "segment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """The package, in which no module hides a function of its name, as ``segment``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
