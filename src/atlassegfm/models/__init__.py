"""Segmentation models behind one interface.

A model is one row of :data:`MODELS` and one file of this package. It is asked once to ``encode`` a scan,
then to ``predict`` from a prompt for each structure. The pipeline asks the model, never the other way
round.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import InputError
from ..image import LocalMap, Volume
from ..prompts import Prompt, PromptKind


@dataclass(frozen=True)
class ModelDescription:
    """What the pipeline and the user need to know of a model before it is loaded.

    Parameters
    ----------
    name : str
        As on the command line.
    summary : str
        One sentence.
    module : str
        Module of this package that has ``load(device)``.
    prompts : tuple of PromptKind
        Kinds of prompt it takes, the best first.
    code_licence, weights_licence : str
        SPDX expressions, or words.
    """

    name: str
    summary: str
    module: str
    prompts: tuple[PromptKind, ...]
    code_licence: str
    weights_licence: str


class Segmenter(Protocol):
    """A loaded model."""

    def encode(self, image: Volume) -> Any:
        """Take in one scan (RAS-canonical array order), once for all its structures."""
        ...

    def predict(self, encoded: Any, prompt: Prompt) -> LocalMap:
        """Probability in [0, 1] of the structure that the prompt points at, on the scan's grid."""
        ...


MODELS: Mapping[str, ModelDescription] = {
    description.name: description
    for description in (
        ModelDescription(
            name="builtin",
            summary="random field on the appearance and edges around the prompt; needs no download",
            module="builtin",
            prompts=("mask", "box", "click"),
            code_licence="Apache-2.0",
            weights_licence="none (no weights)",
        ),
    )
}


def describe_model(name: str) -> ModelDescription:
    """The row of the table with this name.

    Raises
    ------
    InputError
        If there is none; the message lists the known names.
    """
    if name not in MODELS:
        known = ", ".join(("none", *MODELS))
        raise InputError(f"unknown model {name!r}; known models: {known}")
    return MODELS[name]


def load_model(name: str, device: str) -> Segmenter:
    """Load a model by name onto "cpu" or "cuda".

    Raises
    ------
    InputError
        If the name is not known.
    MissingExtraError
        If the model's dependencies are not installed.
    """
    module = importlib.import_module(f".{describe_model(name).module}", __name__)
    model: Segmenter = module.load(device)
    return model
