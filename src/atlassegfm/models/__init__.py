"""Segmentation models behind one interface.

A model is one row of :data:`MODELS` and one file of this package. It is asked once to ``encode`` a scan, then
to ``predict`` its structures from a prompt each. The pipeline asks the model, never the other way round.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import InputError
from ..core.image import Volume
from ..core.mask import LocalMap
from ..core.text import did_you_mean
from ..prompts import Prompt, PromptKind
from ..settings import ModelSettings
from . import weights as _weights
from .published import PublishedWeights, WeightsFile
from .weights import LocalWeights, find_weights

#: Called with the key of each prompt as the model turns to it.
OnPrompt = Callable[[int], None]


@dataclass(frozen=True)
class ModelDescription:
    """A model as the pipeline and the user know it before it is loaded.

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
        What it must be given to run; None if it has no weights.
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


MODELS: Mapping[str, ModelDescription] = {
    description.name: description
    for description in (
        ModelDescription(
            name="builtin",
            summary="random field on the appearance and edges around the prompt; needs no download",
            module="builtin",
            prompts=("mask", "box", "click"),
            code_licence="Apache-2.0",
        ),
        ModelDescription(
            name="nninteractive",
            summary="interactive network trained on 120 public sets of CT, MR, PET and microscopy; wants a GPU",
            module="nninteractive",
            prompts=("mask", "box", "click"),
            code_licence="Apache-2.0",
            weights=PublishedWeights(
                repository="MIC-DKFZ/nnInteractive",
                # Revision, sizes and sums as MONAI Label pins them.
                revision="3f308d751c00644e4fde6f09c600264b393b21b5",
                files=(
                    WeightsFile(
                        "nnInteractive_v1.0/dataset.json",
                        245,
                        "e090394ac539b2823b2135173658190245c462cb042d3442487e4829f08252c4",
                    ),
                    WeightsFile(
                        "nnInteractive_v1.0/plans.json",
                        6_287,
                        "64a30a430438302a692a3edadd345a207b3428bea2e5cdc125298757da21f4d4",
                    ),
                    WeightsFile(
                        "nnInteractive_v1.0/inference_session_class.json",
                        121,
                        "8f43587a9d139fcf7af8776219e9432dab079f985cb0d7da72a4c851b39a4f09",
                    ),
                    WeightsFile(
                        "nnInteractive_v1.0/fold_0/checkpoint_final.pth",
                        411_387_150,
                        "b3ac4421f85457bbd1aa0d87f5e67bcb7bc8e2ce6b824b6ac45077cc5d630ea9",
                    ),
                ),
                licence="CC-BY-NC-SA-4.0",
                licence_url="https://creativecommons.org/licenses/by-nc-sa/4.0/",
                non_commercial=True,
            ),
            extra="nninteractive",
            paper_dice={"mask": 72.91, "box": 72.73, "click": 65.68},
        ),
        ModelDescription(
            name="medsam2",
            summary="SAM 2.1 trained on medical scans, follows a structure from slice to slice",
            module="medsam2",
            prompts=("click", "mask", "box"),
            code_licence="Apache-2.0",
            weights=PublishedWeights(
                repository="wanglab/MedSAM2",
                # Revision, size and hash are those that several public projects pin; not checked at the source.
                revision="e4a6f35edd7e091619cbc0750f462f1574e23955",
                files=(
                    WeightsFile(
                        path="MedSAM2_latest.pt",
                        size=156_040_129,
                        sha256="c92743b99f00d078bf32a3afcc38aaa9faf1c1692dffe3eaa7a90938c1991060",
                    ),
                ),
                # The repository's tag says CC-BY-SA-4.0; other projects report that the model card allows research and
                # education only. Neither was checked at the source, so the stricter one holds until it is.
                licence="CC-BY-SA-4.0 by its tag, research and education only by its model card",
                licence_url="https://huggingface.co/wanglab/MedSAM2",
                non_commercial=True,
            ),
            extra="medsam2",
            paper_dice={"click": 71.64, "mask": 69.49, "box": 66.65},
        ),
        ModelDescription(
            name="vesselfm",
            summary="vesselFM: finds all blood vessels of a scan; kept where the warped atlas says the vessel can be",
            module="vesselfm",
            prompts=("region",),
            code_licence="Apache-2.0 (this adapter; rebuilt on MONAI)",
            weights=PublishedWeights(
                repository="bwittmann/vesselFM",
                # No commit of the repository is known to be the published state: to be pinned when one is.
                revision="main",
                files=(WeightsFile("vesselFM_base.pt"),),
                licence="vesselfm-open-rail-plus-plus-m (research, non-commercial)",
                licence_url="https://huggingface.co/bwittmann/vesselFM",
                non_commercial=True,
            ),
            extra="vesselfm",
        ),
    )
}


def describe_model(name: str) -> ModelDescription:
    """Describe a model.

    Raises
    ------
    InputError
        If there is none; the message lists the known names.
    """
    if name not in MODELS:
        known = ("none", *MODELS)
        raise InputError(f"unknown model {name!r}{did_you_mean(name, known)}; known models: {', '.join(known)}")
    return MODELS[name]


def load_model(name: str, device: str, settings: ModelSettings | None = None, path: Path | None = None) -> Segmenter:
    """Load a model by name onto "cpu" or "cuda".

    Parameters
    ----------
    name : str
        A key of :data:`MODELS`.
    device : {"cpu", "cuda"}
        Where it computes.
    settings : ModelSettings, optional
        Defaults if left out.
    path : Path, optional
        File or folder of its weights; by default in the folder of all weights (:mod:`atlassegfm.models.weights`).

    Raises
    ------
    InputError
        If the name is not known, or the weights are not there, or their licence has not been accepted; or if a path is
        given for a model that has no weights.
    MissingExtraError
        If the model's dependencies are not installed.
    ModelError
        If the model cannot be loaded: there is no such device, or its weights are damaged or those of another one.
    """
    row = describe_model(name)
    if row.weights is None and path is not None:
        raise InputError(
            f"{path}: given as weights, but the model {name!r} has none; leave out the path of the weights"
        )

    def weights() -> LocalWeights:
        if row.weights is None:
            raise TypeError(f"the model {name!r} has no weights")
        return find_weights(name, row.weights, path)

    module = importlib.import_module(f".{row.module}", __name__)
    model: Segmenter = module.load(device, settings or ModelSettings(), weights)
    return model


def accept_licence(name: str) -> str | None:
    """Record that the user accepts the licence of a model's weights; once is enough.

    Parameters
    ----------
    name : str
        A key of :data:`MODELS`.

    Returns
    -------
    str or None
        The date of the acceptance; None where none is needed.

    Raises
    ------
    InputError
        If the name is not known, or it cannot be recorded.
    """
    published = describe_model(name).weights
    return None if published is None else _weights.accept_licence(name, published)


def licence_accepted(name: str) -> str | None:
    """Return the date on which the licence of a model's weights was accepted; None if it was not, or need not be.

    Raises
    ------
    InputError
        If the name is not known.
    """
    published = describe_model(name).weights
    return None if published is None else _weights.licence_accepted(name, published)


def fetch_weights(
    name: str, folder: Path | None = None, on_stage: Callable[[str], None] | None = None
) -> _weights.Fetched | None:
    """Download the weights of a model, as ``atlassegfm models fetch`` does; None if it has none.

    Parameters
    ----------
    name : str
        A key of :data:`MODELS`.
    folder : Path, optional
        For the files; that of the model in the folder of all weights if left out.
    on_stage : callable, optional
        Called with the progress of each file.

    Raises
    ------
    InputError, ModelError
        As :func:`~atlassegfm.models.weights.fetch`.
    """
    published = describe_model(name).weights
    return None if published is None else _weights.fetch(name, published, folder, on_stage)
