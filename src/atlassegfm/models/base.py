"""What a segmentation model is to the rest of the package: a description, and an interface once it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..core.image import Volume
from ..core.mask import LocalMap
from ..prompts import Prompt, PromptKind
from .published import PublishedWeights

#: Called with the number of each structure as the model turns to it.
OnPrompt = Callable[[int], None]


@dataclass(frozen=True)
class ModelDescription:
    """A model before it is loaded.

    Parameters
    ----------
    name : str
        As on the command line.
    summary : str
        One sentence.
    module : str
        Module of this package that has ``load(device, settings, weights)``.
    prompts : tuple of PromptKind
        Kinds of prompt it takes, the best first.
    code_licence : str
        SPDX expression, or words.
    weights : PublishedWeights or None
        None if it has no weights.
    extra : str
        The extra of this package that brings what it imports; empty if the core suffices.
    paper_dice : mapping of PromptKind to float
        Dice in percent that the paper reports by prompt (Table 6, Abd-CT, fused), where it does.
    """

    name: str
    summary: str
    module: str
    prompts: tuple[PromptKind, ...]
    code_licence: str
    weights: PublishedWeights | None = None
    extra: str = ""
    paper_dice: Mapping[PromptKind, float] = field(default_factory=dict)

    @property
    def weights_licence(self) -> str:
        """SPDX expression, or words."""
        return "none (no weights)" if self.weights is None else self.weights.licence


class Segmenter(Protocol):
    """A loaded model."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Files, versions and server of the model, as plain values for ``run.json``; may be empty."""
        ...

    def encode(self, image: Volume) -> Any:
        """Encode one scan (float32, RAS-canonical array order), once for all its structures."""
        ...

    def predict(
        self, encoded: Any, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Predict several structures of one scan.

        Parameters
        ----------
        encoded
            Result of ``encode``.
        prompts : mapping of int to Prompt
            By number of the structure. Parts outside the scan are left out; the scan need not show the structure.
        on_prompt : callable, optional
            Called with the number of each structure as the model turns to it.

        Returns
        -------
        dict of int to LocalMap
            The same numbers; probability in [0, 1] that a voxel belongs to the structure, on the scan's grid, float32.
            Empty where nothing was found.
        """
        ...


def in_turn(prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None) -> Iterator[tuple[int, Prompt]]:
    """Yield the prompts with their numbers, after ``on_prompt`` was called with each."""
    for number, prompt in prompts.items():
        if on_prompt is not None:
            on_prompt(number)
        yield number, prompt
