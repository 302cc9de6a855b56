"""What a segmentation model is: published weights on Hugging Face, a description, an interface once it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from ..core.device import resolve_device
from ..core.errors import InputError
from ..core.image import Volume
from ..core.mask import LocalMap, mean_of
from ..prompts import Prompt, PromptKind, make_prompt

if TYPE_CHECKING:
    import torch

#: Environment variable that names a mirror of Hugging Face, as its own programs read it.
ENDPOINT_VARIABLE = "HF_ENDPOINT"
_ENDPOINT, _RELEASES = "https://huggingface.co", "https://github.com"
#: Called with the number of each structure as the model turns to it.
OnPrompt = Callable[[int], None]


@dataclass(frozen=True)
class WeightsFile:
    """One published file: its path below the model's folder, with its size in bytes and SHA-256 where known."""

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PublishedWeights:
    """Published weights of one model.

    ``repository`` is "owner/name" on Hugging Face, ``revision`` the commit that is downloaded. Where an installed
    package carries the files, they are its name and version on the package index, and ``package`` the name it is
    imported by; if ``is_release``, they are owner, name and tag of a release on GitHub. ``licence`` is an SPDX
    expression or words. If ``non_commercial``, it must be accepted before use.
    """

    repository: str
    revision: str
    files: tuple[WeightsFile, ...]
    licence: str
    licence_url: str
    non_commercial: bool
    package: str = ""
    is_release: bool = False

    @property
    def page(self) -> str:
        """Address of the page that lists the files, or name and version of the package that carries them."""
        if self.package:
            return f"the package {self.repository} {self.revision}"
        if self.is_release:
            return f"{_RELEASES}/{self.repository}/releases/tag/{quote(self.revision)}"
        return f"{_endpoint()}/{self.repository}/tree/{quote(self.revision, safe='')}"

    def url_of(self, file: WeightsFile) -> str:
        """Address of a file, or the package as of :attr:`page`; InputError if ``HF_ENDPOINT`` is no address."""
        if self.package:
            return self.page
        if self.is_release:
            return f"{_RELEASES}/{self.repository}/releases/download/{quote(self.revision)}/{quote(file.path)}"
        return f"{_endpoint()}/{self.repository}/resolve/{quote(self.revision, safe='')}/{quote(file.path)}"


def _endpoint() -> str:
    endpoint = os.environ.get(ENDPOINT_VARIABLE) or _ENDPOINT
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{ENDPOINT_VARIABLE} is {endpoint!r}; expected the address of a mirror, as {_ENDPOINT}")
    return endpoint.rstrip("/")


@dataclass(frozen=True)
class ModelDescription:
    """A model before it is loaded: ``name`` is also that of its module, which has ``load(device, settings, weights)``.

    ``prompts`` are the kinds it takes, the best first; licences SPDX expressions, or words. ``weights`` is None if it
    has none, ``extra`` the extra of this package that brings what it imports, empty if the core suffices.
    ``paper_dice`` is the Dice in percent that the paper reports by prompt (Table 6, Abd-CT, fused), where it does;
    ``demo_dice`` the band of the model's mean Dice on the embedded scans, with the published weights, once recorded.
    If it ``follows``, it is prompted with what other models found where there are some.
    """

    name: str
    summary: str
    prompts: tuple[PromptKind, ...]
    code_licence: str
    weights: PublishedWeights | None = None
    extra: str = ""
    paper_dice: Mapping[PromptKind, float] = field(default_factory=dict)
    demo_dice: tuple[float, float] | None = None
    follows: bool = False

    @property
    def weights_licence(self) -> str:
        """Of the weights, where there are any."""
        return "none (no weights)" if self.weights is None else self.weights.licence


class Segmenter(Protocol):
    """A loaded model."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Files, versions and server of the model, as plain values for ``run.json``; may be empty."""

    def encode(self, image: Volume) -> Any:
        """Encode one scan (float32, RAS-canonical array order), once for all its structures."""

    def predict(
        self, encoded: Any, prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None = None
    ) -> dict[int, LocalMap]:
        """Predict several structures of one scan from what ``encode`` returned.

        Prompts are by number of the structure; their parts outside the scan are left out, and the scan need not show
        the structure. Returns for the same numbers the probability in [0, 1] that a voxel belongs to the structure, on
        the scan's grid, float32; empty where nothing was found.
        """


def in_turn(prompts: Mapping[int, Prompt], on_prompt: OnPrompt | None) -> Iterator[tuple[int, Prompt]]:
    """Yield the prompts with their numbers, after ``on_prompt`` was called with each."""
    for number, prompt in prompts.items():
        if on_prompt is not None:
            on_prompt(number)
        yield number, prompt


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several loaded models by name, in the order of their names.

    Those of ``followers`` are prompted with what the others found, not with the warped mask itself.
    """

    members: Mapping[str, Segmenter]
    followers: frozenset[str] = frozenset()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Provenance of each model."""
        return {name: dict(model.provenance) for name, model in self.members.items()}


#: What a job is done with.
Models = Segmenter | Ensemble


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prompts, and probabilities in [0, 1] that each model predicted, by number of the structure.

    ``members`` are by name of the model; the name of a single one is empty. There are none for empty masks.
    """

    kind: PromptKind
    prompts: Mapping[int, Prompt]
    members: Mapping[str, Mapping[int, LocalMap]]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PromptedScan:
    """A scan, float32 in RAS-canonical array order, and the models that segment it from prompts of one kind.

    The scan is encoded at the first prediction. The name of structure number n is at position n - 1 of ``names``;
    ``tubular`` are the numbers of vessels.
    """

    model: Models
    kind: PromptKind
    image: Volume
    names: Sequence[str]
    tubular: frozenset[int] = frozenset()

    @cached_property
    def _encoded(self) -> Mapping[str, tuple[Segmenter, Any]]:
        members = self.model.members if isinstance(self.model, Ensemble) else {"": self.model}
        return {name: (member, member.encode(self.image)) for name, member in members.items()}

    @property
    def _followers(self) -> frozenset[str]:
        """Models that follow others; none of them if there are no others."""
        followers = self.model.followers if isinstance(self.model, Ensemble) else frozenset[str]()
        return followers if followers < self._encoded.keys() else frozenset()

    def predict(self, masks: Mapping[int, LocalMap], on_structure: Callable[[str], None]) -> Prediction:
        """Prompt each model with each mask that is not empty."""
        prompts, predicted = self._prompts(masks), dict[str, dict[int, LocalMap]]()
        for name in sorted(self._encoded, key=lambda one: one in self._followers) if prompts else ():
            member, encoded = self._encoded[name]
            asked = prompts
            if name in self._followers:
                leaders = [found for other, found in predicted.items() if other not in self._followers]
                better = {n: mean_of([found[n] for found in leaders]) for n in prompts}
                asked = {n: self._prompts({n: better[n]}).get(n, prompt) for n, prompt in prompts.items()}

            def report(n: int, prefix: str = name and f"{name}, ") -> None:
                on_structure(prefix + self.names[n - 1])

            predicted[name] = member.predict(encoded, asked, report)
        return Prediction(self.kind, prompts, dict(sorted(predicted.items())), self.model.provenance)

    def _prompts(self, masks: Mapping[int, LocalMap]) -> dict[int, Prompt]:
        """Prompts of the masks that are not empty."""
        across = self.image.grid.slice_axis
        made = {n: make_prompt(self.kind, mask, across, tubular=n in self.tubular) for n, mask in masks.items()}
        return {n: prompt for n, prompt in made.items() if prompt is not None}


def usable_device(name: str) -> torch.device:
    """Return the device "cpu" or "cuda"; ModelError if it is not there."""
    import torch

    return torch.device(resolve_device(name))


def intensities(image: Volume) -> NDArray[np.float32]:
    """Return (I, J, K) float32 intensities; InputError if some are NaN or infinite, or all are equal."""
    data = np.asarray(image.data, dtype=np.float32)
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{scan_name(image)}: there are NaN or infinite voxels; expected numbers only: replace them")
    if low == high:
        raise InputError(f"{scan_name(image)}: all voxels have the value {low:g}; expected a scan with contrast")
    return data


def scan_name(image: Volume) -> str:
    """Name a scan in messages."""
    return "the scan" if image.source is None else str(image.source.path)
