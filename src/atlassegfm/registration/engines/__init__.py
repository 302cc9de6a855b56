"""Table of deformable engines: one row here and one file each.

Engines of other packages run in a process of their own (:mod:`.external`): a crash of their C++ code is one failed
pair, and packages can be used that cannot be installed beside this one, or whose licence keeps them apart.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...settings import RegistrationSettings
from ..result import Registration


@dataclass(frozen=True)
class Engine:
    """One row of the table of engines.

    ``module`` of this package has ``fit(pair, linear, start, settings, device) -> Registration``: ``linear`` is None if
    it does the linear stages too; ``start``, a :class:`.pyramid.Start` or None, goes to engines that take one. Of
    external engines, ``title`` is for messages, ``distribution`` the package that ``pip install`` knows and ``extra``
    the extra of this package that installs it, empty where it cannot be installed beside this package.
    """

    module: str
    takes_start: bool = False
    title: str = ""
    distribution: str = ""
    extra: str = ""

    @property
    def is_external(self) -> bool:
        """Whether it is another package's: it can do the linear stages itself."""
        return bool(self.distribution)

    def load(self) -> Callable[..., Registration]:
        """Import the engine's ``fit``."""
        fit: Callable[..., Registration] = importlib.import_module(f".{self.module}", __name__).fit
        return fit


#: Engines by name, which is that of their settings too.
ENGINES: Mapping[str, Engine] = {
    "instance": Engine("instance", takes_start=True),
    "voxelmorph": Engine("voxelmorph"),
    "greedy": Engine("external", title="greedy", distribution="picsl_greedy", extra="greedy"),
    # antspyx 0.6.3 holds numpy below 2.4 and scipy below 1.16.
    "ants": Engine("external", title="ANTs", distribution="antspyx"),
    "elastix": Engine("external", title="elastix", distribution="itk-elastix", extra="elastix"),
}


def require_engine(settings: RegistrationSettings) -> None:
    """Check that the engine chosen can run here, before hours of work that need it.

    Raises :class:`.MissingExtraError` if it is another package's that is not installed, and :class:`.InputError` if a
    setting or an environment variable names a Python for it that is no program.
    """
    if ENGINES[settings.engine].is_external:
        importlib.import_module(".external", __name__).require(settings)
