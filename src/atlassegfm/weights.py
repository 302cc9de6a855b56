"""Weights of the segmentation models: what is published, where it lies on this machine, and its licence.

Nothing is downloaded unless ``fetch`` is asked for. Weights keep their own terms; they are never part of this package.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

#: Environment variable that names the folder of all weights, with one folder for each model.
FOLDER_VARIABLE = "ATLASSEGFM_MODELS"


@dataclass(frozen=True)
class WeightsFile:
    """One published file.

    Parameters
    ----------
    path : str
        Below the model's folder, with "/".
    size : int or None
        In bytes, where known.
    sha256 : str or None
        Hexadecimal, where known.
    """

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PublishedWeights:
    """Weights as their authors publish them.

    Parameters
    ----------
    repository : str
        On Hugging Face, "owner/name".
    revision : str
        Commit that is downloaded.
    files : tuple of WeightsFile
        What the model needs.
    licence : str
        SPDX expression, or words.
    licence_url : str
        Where it can be read.
    non_commercial : bool
        Whether it must be accepted before the weights are used.
    """

    repository: str
    revision: str
    files: tuple[WeightsFile, ...]
    licence: str
    licence_url: str
    non_commercial: bool


@dataclass(frozen=True)
class LocalWeights:
    """Weights found on this machine.

    Parameters
    ----------
    path : Path
        The file, or the folder, of the weights.
    licence : str
        Of the published weights they stand for.
    """

    path: Path
    licence: str


def weights_folder() -> Path:
    """Folder of all weights: ``$ATLASSEGFM_MODELS``, or ``~/.local/share/atlassegfm/models``."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".local" / "share" / "atlassegfm" / "models"


def find_weights(name: str, published: PublishedWeights, given: Path | None) -> LocalWeights:
    """Where the weights of a model lie on this machine.

    Parameters
    ----------
    name : str
        Of the model.
    published : PublishedWeights
        What is looked for.
    given : Path or None
        File or folder the user names; the model's folder in :func:`weights_folder` if None.

    Raises
    ------
    InputError
        If they are not there.
    """
    path = given if given is not None else weights_folder() / name
    if not path.exists():
        wanted = ", ".join(file.path for file in published.files)
        raise InputError(f"{path}: no weights of the model {name!r}; put {wanted} of {published.repository} there")
    return LocalWeights(path, published.licence)
