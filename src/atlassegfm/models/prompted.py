"""A scan encoded once by a model, and prompted as often as needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.image import Volume
from ..core.mask import LocalMap
from ..prompts import Prompt, PromptKind, make_prompt
from .base import Segmenter


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prompts and predicted probabilities in [0, 1], by number of the structure; none for empty masks."""

    kind: PromptKind
    prompts: Mapping[int, Prompt]
    masks: Mapping[int, LocalMap]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PromptedScan:
    """A scan, float32 in RAS-canonical array order, and the model that segments it from prompts of one kind.

    The scan is encoded at the first prediction. The name of structure number n is at position n - 1 of ``names``.
    """

    model: Segmenter
    kind: PromptKind
    image: Volume
    names: Sequence[str]

    @cached_property
    def _encoded(self) -> Any:
        return self.model.encode(self.image)

    def predict(self, masks: Mapping[int, LocalMap], on_structure: Callable[[str], None]) -> Prediction:
        """Prompt the model with each mask that is not empty."""
        prompts = {n: prompt for n, mask in masks.items() if (prompt := make_prompt(self.kind, mask)) is not None}
        predicted: dict[int, LocalMap] = {}
        if prompts:
            predicted = self.model.predict(self._encoded, prompts, lambda n: on_structure(self.names[n - 1]))
        return Prediction(self.kind, prompts, predicted, self.model.provenance)
