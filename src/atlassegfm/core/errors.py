"""Errors a caller can act on.

Every message is one sentence: the file first, what was found, what was expected, what to do. Programming errors stay
ordinary Python exceptions.
"""

import shlex
import sys


class AtlasSegError(Exception):
    """Base class of every error this package raises on purpose."""


class InputError(AtlasSegError):
    """A file, a setting or an argument cannot be used as given."""


class RegistrationError(AtlasSegError):
    """The two scans could not be brought into one space."""


class ModelError(AtlasSegError):
    """A segmentation model or a compute device cannot do what was asked."""


class OutputError(AtlasSegError):
    """A result was not written, because its file would not say the same as the result."""


class MissingExtraError(AtlasSegError):
    """An optional dependency is needed and not installed.

    ``feature`` needs it ("drawing the picture"), ``extra`` is the extra of this package that brings it, or ``remedy``
    how to install it where there is none.
    """

    def __init__(self, feature: str, extra: str, remedy: str = "") -> None:
        needed = "an optional part that" if remedy else f"the extra {extra!r}, which"
        super().__init__(f"{feature} needs {needed} is not installed; install it with: {remedy or _install(extra)}")


def _install(extra: str) -> str:
    """Command that installs what an extra brings, wherever this package came from."""
    from .extras import requirements

    return shlex.join([sys.executable, "-m", "pip", "install", *(requirements(extra) or [f".[{extra}]"])])
