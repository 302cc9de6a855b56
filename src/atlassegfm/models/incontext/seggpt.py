"""SegGPT: paints the mask of a slice beside its picture, as it is painted on an example (Wang et al., ICCV 2023).

The network is transformers' ``SegGptForImageSegmentation``, trained on photographs; slices become grey pictures and
masks white on black, as its image processor makes them. Several examples are averaged inside the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError, MissingExtraError, ModelError
from ..base import usable_device
from ..checkpoint import check_fit
from ..medsam2.network import broken_torchvision_hidden
from ..weights import describe_file, installed_version
from .by_slices import SliceBaseline

#: Examples of a slice: each takes the time of one.
_SUPPORT = 1
_WANTED = "the weights of the in-context baseline 'seggpt' (model.safetensors)"
#: Beside the weights, it may describe another size of the network; without it they are of the published one, which is
#: transformers' default.
CONFIG_FILE = "config.json"
#: Of the three channels of photographs [the published processor's].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class SegGptNetwork:
    """Network for one slice; see :class:`.SliceNetwork`."""

    network: Any

    def __call__(self, image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """Give the brightness painted at each pixel, cut to [0, 1]."""
        count = len(support_images)
        painted = self.network(
            pixel_values=_as_picture(image[None]).expand(count, -1, -1, -1),
            prompt_pixel_values=_as_picture(support_images),
            prompt_masks=_as_picture(support_labels),
            feature_ensemble=count > 1,
        ).pred_masks
        # Below the example's mask; all rows of the batch are answers to the same slice.
        answer: Tensor = painted[0, :, painted.shape[2] // 2 :] * _channels(_STD, painted) + _channels(_MEAN, painted)
        return answer.clip(0, 1).mean(0)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _as_picture(slices: Tensor) -> Tensor:
    """(S, N, N) in [0, 1] to the network's input, (S, 3, N, N)."""
    return (slices[:, None] - _channels(_MEAN, slices)) / _channels(_STD, slices)


def load(device: str, weights: Callable[[], Path | None], support: int | None = None) -> SliceBaseline:
    """Load it onto "cpu" or "cuda"; random weights where the path is None. Errors as of :meth:`.Baseline.load`."""
    place = usable_device(device)
    try:
        with broken_torchvision_hidden():
            from huggingface_hub import errors
            from transformers import SegGptConfig, SegGptForImageSegmentation
    except ImportError:
        raise MissingExtraError("the in-context baseline 'seggpt'", "seggpt") from None
    path = weights()
    state = None if path is None else _read(path)
    # From version 5 on configurations are checked; before, there was no such error.
    misfit: type[Exception] = getattr(errors, "StrictDataclassError", ValueError)
    try:
        config = SegGptConfig(**({} if path is None else _config_beside(path)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = SegGptForImageSegmentation(config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, misfit) as error:
        found = str(error).partition("\n")[0] or type(error).__name__
        version = installed_version("transformers")
        raise ModelError(
            f"transformers {version}: cannot build the network of the baseline 'seggpt' ({found})"
        ) from None
    if path is not None and state is not None:
        check_fit(state, network.state_dict(), path, wanted=_WANTED)
        network.load_state_dict(state, strict=True)
    network.train(mode=False).requires_grad_(requires_grad=False).to(place)
    count = sum(one.numel() for one in network.parameters())
    provenance = {
        "weights": None if path is None else describe_file(path),
        "transformers_version": installed_version("transformers"),
    }
    size = int(config.image_size[1])  # type: ignore[index]  # height of two pictures, and width
    return SliceBaseline(SegGptNetwork(network), size, support or _SUPPORT, count, place, "bicubic", provenance)


def _read(path: Path) -> dict[str, Tensor]:
    """Read weights in the format of safetensors, which holds nothing but tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); expected {_WANTED}") from None
    except (SafetensorError, ValueError):
        raise ModelError(
            f"{path}: is no file of safetensors, or is cut short or damaged; expected {_WANTED}: fetch or copy it again"
        ) from None


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.with_name(CONFIG_FILE)
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(
            f"{file}: cannot be read as JSON ({found}); expected the one published with the weights"
        ) from None
