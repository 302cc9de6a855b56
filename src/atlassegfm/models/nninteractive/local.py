"""An nnInteractive session in this process: its folder, its network, and probabilities beside its masks."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pydoc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.errors import InputError, ModelError
from ...core.extras import require
from ...core.mask import LocalMap
from ...prompts import INSIDE
from ...settings import NnInteractiveSettings
from ..base import usable_device
from ..checkpoint import check_fit, load_state, named_weights
from ..weights import describe_file, installed_version
from . import Field, NnInteractiveSegmenter, Put

logger = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint_final.pth"
#: Name of the weights in messages.
_WANTED = f"the weights of the model 'nninteractive' ({_CHECKPOINT})"
#: Either lists the interactions a network was trained for; the second is of version 1.
_INFORMATION = ("inference_info.json", "inference_session_class.json")
_PACKAGE = "nninteractive"
_MODULES = ("nnunetv2.utilities.plans_handling.plans_handler", "nnInteractive.inference.inference_session")
#: Versions of nnInteractive whose private methods are used, and those methods.
_VERSIONS = ">=2.6,<2.7"
_PASTE = "_paste_prediction_to_target_buffer"
_PRIVATE = (_PASTE, "_load_capability_and_runtime_defaults", "_apply_capability", "_load_license")
#: The session plans its refinement with a margin of this many voxels on each side of a patch.
_REFINEMENT_MARGIN = 24
#: Seed of NumPy's global generator, which that plan draws from.
_SEED = 0
#: Probabilities below this are taken for 0, so that answers are small boxes.
_NEGLIGIBLE = 1e-3
#: Half-precision probabilities may fall on the wrong side of a half by rounding, not by more than this; and where more
#: than this fraction of the voxels does, they are not those of the mask.
_ROUNDING = 1e-2
_LARGEST_MISMATCH = 1e-3
_JUST_OUTSIDE = np.nextafter(np.float32(INSIDE), np.float32(0))
#: What nnInteractive and nnU-Net raise for files they cannot use.
_BAD_CONTENT = (RuntimeError, ValueError, KeyError, TypeError, AttributeError)
_LONGEST_REASON = 200


class LocalSegmenter(NnInteractiveSegmenter):
    """The model by a session in this process, with its network loaded."""

    def __init__(self, session: Any, provenance: Mapping[str, Any]) -> None:
        self.session, self.provenance = session, provenance
        self._shut_down = weakref.finalize(self, session.executor.shutdown)

    def close(self) -> None:
        """End the session's threads."""
        self._shut_down()

    def _probability(self, scan: Field, put: Put) -> LocalMap:
        """At least a half exactly where the session's mask is."""
        # A failed prompt stays in these, and would move the next answer.
        self.session.new_interaction_centers = []
        self.session.new_interaction_zoom_out_factors = []
        with _quiet(), _explained(), _seeded(), PaintedProbability(self.session) as painted:
            mask = self._ask(scan, put)
        return painted.beside(mask)


class PaintedProbability:
    """Reads, within a ``with`` block, the probabilities that a session turns into a mask and does not keep.

    A session runs its network on one patch after the other, then pastes the masks of the last ones into the result in
    the same order: the last outputs belong to the boxes that are pasted. Outside these its mask counts as 0 or 1.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs: list[NDArray[np.float16]] = []
        #: First voxel of each box and one past the last one, (2, 3).
        self._boxes: list[NDArray[np.int64]] = []

    def __enter__(self) -> PaintedProbability:
        paste = getattr(self._session, _PASTE)

        def follow(prediction: Any, bbox: Any, *arguments: Any, **named: Any) -> Any:
            self._boxes.append(np.array(bbox, np.int64).T)
            return paste(prediction, bbox, *arguments, **named)

        def keep(_network: Any, _inputs: Any, output: torch.Tensor) -> None:
            background, foreground = output[0].float()
            self._outputs.append(torch.sigmoid(foreground - background).half().cpu().numpy())

        self._hook = self._session.network.register_forward_hook(keep)
        setattr(self._session, _PASTE, follow)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        delattr(self._session, _PASTE)

    def beside(self, mask: NDArray[np.uint8]) -> LocalMap:
        """Combine the probabilities with the session's mask, (K, J, I): at least a half exactly where that is 1.

        Raises ModelError if outputs and mask do not belong together.
        """
        foreground = LocalMap.from_full(mask)
        if foreground.is_empty:
            return foreground
        patches = [(patch, np.clip([patch.start, patch.stop], 0, mask.shape)) for patch in self._patches()]
        patches = [(patch, box) for patch, box in patches if (box[1] > box[0]).all()]
        boxes = np.array([(foreground.start, foreground.stop), *(box for _, box in patches)])
        first, last = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
        inside = mask[tuple(map(slice, first, last))] > 0
        values = inside.astype(np.float32)
        for patch, (start, stop) in patches:
            values[tuple(map(slice, start - first, stop - first))] = patch.on_box(start, stop)
        wrong = (values >= INSIDE) != inside
        if float((wrong & (np.abs(values - INSIDE) > _ROUNDING)).mean()) > _LARGEST_MISMATCH:
            raise _other_version("its outputs are not those of its masks")
        values[wrong & inside] = INSIDE
        values[wrong & ~inside] = _JUST_OUTSIDE
        values[values < _NEGLIGIBLE] = 0
        local = LocalMap.from_full(values)
        return LocalMap(tuple((first + local.start).tolist()), local.values)

    def _patches(self) -> Iterator[LocalMap]:
        """The network's outputs in the boxes where they were pasted, which may reach out of the scan."""
        outputs = self._outputs[max(len(self._outputs) - len(self._boxes), 0) :]
        if len(outputs) != len(self._boxes):
            raise _other_version(f"it pasted {len(self._boxes)} patches after {len(self._outputs)} outputs")
        for (start, stop), output in zip(self._boxes, outputs, strict=True):
            if tuple(stop - start) != output.shape:
                raise _other_version(f"it pasted a patch from {start} to {stop} for an output of shape {output.shape}")
            yield LocalMap(tuple(start.tolist()), output.astype(np.float32))


def open_folder(weights: Callable[[], Path], device: str, options: NnInteractiveSettings) -> LocalSegmenter:
    """Load a network into a session on "cpu" or "cuda"; errors as of :func:`~atlassegfm.models.load_model`."""
    place = usable_device(device)
    with _quiet():
        session_class = require("the model 'nninteractive'", "nninteractive", *_MODULES).nnInteractiveInferenceSession
    if missing := [name for name in _PRIVATE if not hasattr(session_class, name)]:
        raise _other_version(f"it has no {', '.join(missing)}")
    fold = find_fold(weights())
    with _quiet(), _settings_of_torch():
        # Without undo: every prompt starts from scratch here, a failed one too.
        session = session_class(
            device=place, torch_n_threads=torch.get_num_threads(), do_autozoom=options.autozoom, enable_undo=False
        )
        return LocalSegmenter(session, _load_network(session, fold))


def find_fold(path: Path) -> Path:
    """Find the folder of the checkpoint: ``path`` is that, the network's folder around it, or the folder around both.

    Raises InputError if there is none, more than one, or a file is missing.
    """
    fold = path
    if not path.name.startswith("fold_"):
        if not _is_model(path):
            path = _only(sorted(one for one in path.iterdir() if one.is_dir() and _is_model(one)), path)
        fold = _only(sorted(path.glob("fold_*")) or [path / "fold_0"], path)
    root = fold.parent
    for file in (root / "dataset.json", root / "plans.json", fold / _CHECKPOINT):
        if not file.is_file():
            raise InputError(f"{file}: no such file; get the network's folder again, as a whole")
    if not any((root / name).is_file() for name in _INFORMATION):
        raise InputError(f"{root}: neither {' nor '.join(_INFORMATION)} is there; get the network's folder again")
    return fold


def _is_model(folder: Path) -> bool:
    return (folder / "plans.json").is_file() or (folder / "dataset.json").is_file() or any(folder.glob("fold_*"))


def _only(found: list[Path], folder: Path) -> Path:
    if not found:
        files = f"dataset.json, plans.json, fold_0/{_CHECKPOINT}"
        raise InputError(f"{folder}: no network in it; expected the folder of an nnInteractive network ({files})")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder}: {names} are in it; name one of them as the model's path")
    return found[0]


def _load_network(session: Any, fold: Path) -> dict[str, Any]:
    """Load a network into a session, where possible without running code from the checkpoint; return its provenance."""
    root, path = fold.parent, fold / _CHECKPOINT
    plans, dataset = _json(root / "plans.json"), _json(root / "dataset.json")
    checkpoint = load_state(path, wanted=_WANTED)
    weights = named_weights(checkpoint, path, wanted=_WANTED, key="network_weights")
    arguments = checkpoint.get("init_args")
    configuration = arguments.get("configuration") if isinstance(arguments, Mapping) else None
    if not isinstance(configuration, str):
        raise ModelError(f"{path}: names no configuration under 'init_args'; expected {_WANTED}")
    known = plans.get("configurations", {})
    if configuration not in known:
        raise ModelError(
            f"{root / 'plans.json'}: no configuration {configuration!r}, which {_CHECKPOINT} was trained with "
            f"(there are: {', '.join(known) or 'none'}); the two do not belong together"
        )
    artifacts = _artifacts(session, root, plans, dataset, configuration)
    network = artifacts["network"]
    check_fit(weights, network.state_dict(), path, wanted="those of the network in plans.json beside it")
    network.load_state_dict(weights)
    network.to(session.device).eval()
    artifacts["trainer_name"] = str(checkpoint.get("trainer_name", ""))
    artifacts["license"] = session._load_license(str(root), plans, checkpoint)
    session.initialize_from_loaded_artifacts(artifacts)
    patch = tuple(int(n) for n in artifacts["configuration_manager"].patch_size)
    if session.pad_mode_data != "constant":
        raise ModelError(f"{root}: pads by {session.pad_mode_data!r}; nnInteractive can do 'constant' only")
    if len(patch) != 3 or min(patch) <= 2 * _REFINEMENT_MARGIN:
        raise ModelError(
            f"{root / 'plans.json'}: the patch is {' x '.join(map(str, patch))} voxels; nnInteractive cannot "
            f"refine with less than {2 * _REFINEMENT_MARGIN + 1} along each of three axes"
        )
    place = {"fold": fold.name, "folder": root.resolve().name}
    weights_record = describe_file(path) | place | {"licence_in_folder": str(session.license)}
    return {"weights": weights_record, "nninteractive_version": installed_version(_PACKAGE)}


def _artifacts(
    session: Any, root: Path, plans: dict[str, Any], dataset: dict[str, Any], configuration: str
) -> dict[str, Any]:
    """Build what the session needs, with a network whose weights are not loaded yet."""
    from nnInteractive.interaction.point import PointInteraction_stub
    from nnInteractive.trainer.nnInteractiveTrainer import nnInteractiveTrainer_stub
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        capability, radius, thickness, decay, padding = session._load_capability_and_runtime_defaults(str(root))
        session._apply_capability(capability)
    except _BAD_CONTENT as error:
        file = next(root / name for name in _INFORMATION if (root / name).is_file())
        why = f"nnInteractive {installed_version(_PACKAGE)} cannot use it ({_reason(error)})"
        raise ModelError(f"{file}: {why}; get the network's folder again, or another version") from None
    try:
        manager = PlansManager(plans)
        one = manager.get_configuration(configuration)
        channels = int(determine_num_input_channels(manager, one, dataset))
        labels = manager.get_label_manager(dataset)
        kind = pydoc.locate(one.network_arch_class_name)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            raise TypeError(f"{one.network_arch_class_name} is no network that is installed")
        with torch.random.fork_rng(devices=[]):
            network = nnInteractiveTrainer_stub.build_network_architecture(
                manager, one, channels + session.num_interaction_channels, 2, enable_deep_supervision=False
            )
    except (*_BAD_CONTENT, ImportError, pydoc.ErrorDuringImport) as error:
        why = f"its network cannot be built ({_reason(error)}); get the network's folder again, as a whole"
        raise ModelError(f"{root / 'plans.json'}: {why}") from None
    if channels != 1:
        raise ModelError(f"{root / 'dataset.json'}: {channels} channels; expected a network for scans of one")
    return {
        "capability_content": capability,
        "point_interaction": PointInteraction_stub(radius, True),
        "preferred_scribble_thickness": thickness,
        "interaction_decay": decay,
        "pad_mode_data": padding,
        "network": network,
        "plans_manager": manager,
        "configuration_manager": one,
        "dataset_json": dataset,
        "label_manager": labels,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not a JSON object ({_reason(error)}); get it again") from None


def _reason(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0].strip()[:_LONGEST_REASON]
    return f"{type(error).__name__}: {said or 'no more is known'}"


def _other_version(why: str) -> ModelError:
    found = f"nnInteractive {installed_version(_PACKAGE)} is installed, and {why}"
    return ModelError(f"{found}; expected a version {_VERSIONS}: pip install 'nninteractive{_VERSIONS}'")


@contextmanager
def _explained() -> Iterator[None]:
    """Explain what the session raises on a prompt; running out of memory is handled by the pipeline."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as error:
        logger.debug("the session failed", exc_info=True)
        raise ModelError(f"nnInteractive {installed_version(_PACKAGE)} failed on a prompt ({_reason(error)})") from None


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Hide the session's progress on standard output, where our results go."""
    return contextlib.redirect_stdout(io.StringIO())


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed NumPy's global generator, and put it back."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextmanager
def _settings_of_torch() -> Iterator[None]:
    """Restore the threads and cuDNN's benchmark mode, which makes results vary, after a new session set them."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
