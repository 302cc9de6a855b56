"""In-context baselines: networks that segment a scan from an annotated one, without prompts and without registration.

They are what the paper compares with, for ``benchmark icl`` alone: no ``--model`` of ``segment``. A baseline is a row
of :data:`BASELINES` and a module of its name here. Importing this package does not load torch.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ...atlas import Atlas
from ...core.errors import InputError
from ...core.image import Volume
from ...core.mask import LocalMap
from ...core.text import did_you_mean
from ..base import ModelDescription, PublishedWeights, WeightsFile
from ..weights import find_weights


class InContextModel(Protocol):
    """A loaded baseline; ``parameters`` is the number of its weights."""

    @property
    def parameters(self) -> int:
        """Number of weights of the network."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where its weights come from, as plain values."""

    def predict(
        self, atlas: Atlas, query: Volume, on_stage: Callable[[str], None] | None = None
    ) -> dict[int, LocalMap]:
        """Predict every structure of the atlas on a query (float32, RAS-canonical array order).

        Returns by number of the structure (:attr:`.Atlas.numbered`) the probability in [0, 1] that a voxel of the query
        belongs to it; empty where nothing was found. InputError if a scan shows nothing.
        """


#: Rows in the order of the paper's tables; none takes a prompt.
BASELINES: dict[str, ModelDescription] = {
    row.name: row
    for row in (
        ModelDescription(
            name="universeg",
            summary="in-context baseline: UniverSeg, slices of 128 x 128 from labelled slices of the atlas",
            prompts=(),
            code_licence="Apache-2.0 (this adapter; the network written anew)",
            weights=PublishedWeights(
                repository="JJGO/UniverSeg",
                revision="weights",
                files=(WeightsFile("universeg_v1_nf64_ss64_STA.pt"),),
                licence="UniverSeg OpenRAIL++-M (research only)",
                licence_url="https://github.com/JJGO/UniverSeg/blob/main/LICENSE-model",
                non_commercial=True,
                is_release=True,
            ),
        ),
        ModelDescription(
            name="tyche",
            summary="in-context baseline: Tyche, as UniverSeg, the mean of eight candidates",
            prompts=(),
            code_licence="Apache-2.0 (this adapter; the network written anew)",
            # Nothing was found that gives the weights a licence of their own: taken as UniverSeg's, on which it builds.
            weights=PublishedWeights(
                repository="mariannerakic/Tyche",
                revision="weights",
                files=(WeightsFile("tyche_v1_model_weights_CVPR.pt"),),
                licence="none stated for the weights (code Apache-2.0); taken as for research only",
                licence_url="https://github.com/mariannerakic/Tyche",
                non_commercial=True,
                is_release=True,
            ),
        ),
        ModelDescription(
            name="seggpt",
            summary="in-context baseline: SegGPT, trained on photographs, slices of 448 x 448 from one of the atlas",
            prompts=(),
            code_licence="Apache-2.0 (this adapter; the network is that of transformers)",
            weights=PublishedWeights(
                repository="BAAI/seggpt-vit-large",
                revision="b98cc67cb62510a76f3d1ff8ef7e20c6b03e24d4",
                files=(WeightsFile("model.safetensors"),),
                licence="Apache-2.0",
                licence_url="https://huggingface.co/BAAI/seggpt-vit-large",
                non_commercial=False,
            ),
            extra="seggpt",
        ),
    )
}


@dataclass(frozen=True)
class Baseline:
    """A baseline as it is asked for.

    ``path`` is the file of its weights, by default in the folder of all weights; ``random_weights`` takes random ones
    instead. ``support`` is the number of the atlas's slices that a slice is segmented from; None for its own.
    """

    name: str
    path: Path | None = None
    random_weights: bool = False
    support: int | None = None

    @property
    def title(self) -> str:
        """Name in tables, which says so where weights are random."""
        return f"{self.name} (random weights)" if self.random_weights else self.name

    def to_dict(self) -> dict[str, Any]:
        """Describe as plain values what its results depend on."""
        return asdict(self) | {"path": self.path and str(self.path)}

    def load(self, device: str) -> InContextModel:
        """Load it onto "cpu" or "cuda".

        InputError if the name is not known, the weights are not there or their licence has not been accepted;
        MissingExtraError if its extra is not installed; ModelError if there is no such device, or the weights are
        damaged or those of another network.
        """
        published = describe_baseline(self.name).weights
        assert published is not None
        module = importlib.import_module(f".{self.name}", __package__)

        def weights() -> Path | None:
            if self.random_weights:
                return None
            return find_weights(self.name, published, self.path)

        model: InContextModel = module.load(device, weights, self.support)
        return model


def describe_baseline(name: str) -> ModelDescription:
    """Describe a baseline; raise InputError, with the known names, if there is none."""
    if name not in BASELINES:
        meant = did_you_mean(name, BASELINES)
        raise InputError(f"unknown in-context baseline {name!r}{meant}; expected one of {', '.join(BASELINES)}")
    return BASELINES[name]
