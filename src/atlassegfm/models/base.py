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
    """A model before it is loaded: ``name`` is also that of its module, which has ``load(device, settings, weights)``.

    ``prompts`` are the kinds it takes, the best first; licences SPDX expressions, or words. ``weights`` is None if it
    has none, ``extra`` the extra of this package that brings what it imports, empty if the core suffices.
    ``paper_dice`` is the Dice in percent that the paper reports by prompt (Table 6, Abd-CT, fused), where it does.
    """

    name: str
    summary: str
    prompts: tuple[PromptKind, ...]
    code_licence: str
    weights: PublishedWeights | None = None
    extra: str = ""
    paper_dice: Mapping[PromptKind, float] = field(default_factory=dict)

    @property
    def weights_licence(self) -> str:
        """Of the weights, where there are any."""
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
        """Predict several structures of one scan from what ``encode`` returned.

        Prompts are by number of the structure; their parts outside the scan are left out, and the scan need not show
        the structure. Returns for the same numbers the probability in [0, 1] that a voxel belongs to the structure, on
        the scan's grid, float32; empty where nothing was found.
        """
        ...


def in_turn(prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None) -> Iterator[tuple[int, Prompt]]:
    """Yield the prompts with their numbers, after ``on_prompt`` was called with each."""
    for number, prompt in prompts.items():
        if on_prompt is not None:
            on_prompt(number)
        yield number, prompt
