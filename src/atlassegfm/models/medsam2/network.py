"""The network of MedSAM2: transformers' ``Sam2VideoModel`` with the published weights.

MedSAM2 is SAM 2.1 (Hiera-tiny) at 512 pixels, trained on medical scans; a scan's slices are its video. Weights are
renamed from the original code to transformers (:func:`rename`); two deviations of transformers from the original code
are corrected (:func:`_corrected`). Importing this module loads torch, but not transformers.
"""

import copy
import importlib
import inspect
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...core.errors import InputError, MissingExtraError, ModelError
from ..checkpoint import check_fit, few, load_state, named_weights
from ..weights import installed_version

#: Name of the weights in messages.
_WANTED = "the weights of the model 'medsam2' (MedSAM2_latest.pt)"
#: Versions of transformers that have ``Sam2VideoModel`` under the names used here.
_SUPPORTED = "transformers 4.56 or newer, below 6 (tested with 4.56.0 and 5.23.0)"
#: Attributes of ``Sam2VideoInferenceSession`` that are used here.
_SESSION = (
    *("processed_frames", "cache", "obj_id_to_idx", "obj_with_new_inputs"),
    *("add_point_inputs", "add_mask_inputs", "output_dict_per_obj"),
)
#: Methods of ``Sam2VideoModel`` that are corrected, and parameters they must have.
_CORRECTED = {
    "_single_frame_forward": {"multimask_output"},
    "_use_mask_as_output": {"backbone_features", "high_res_features", "mask_inputs"},
}
#: ``Sam2VideoConfig`` of the published weights (``sam2.1_hiera_t512.yaml`` of bowang-lab/MedSAM2 at 332f30d) where
#: it is not transformers' default, SAM 2.1 Hiera-tiny at 1024 pixels.
PUBLISHED_CONFIG: Mapping[str, Any] = {
    "image_size": 512,
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {"model_type": "sam2_hiera_det_model", "image_size": [512, 512]},
        "backbone_feature_sizes": [[128, 128], [64, 64], [32, 32]],
    },
    "prompt_encoder_config": {"image_size": 512},
    "memory_attention_rope_feat_sizes": [32, 32],
}
#: File beside a checkpoint that may describe another size of the architecture, under the key of :data:`_CONFIG_KEY` as
#: keyword arguments of ``Sam2VideoConfig``. Without that key it is another program's.
CONFIG_FILE = "config.json"
_CONFIG_KEY = "transformers"
_HEADS = r"(iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+|obj_ptr_proj)\.layers\."
_BLOCKS = r"(mask_decoder\.transformer\.layers\.\d+|vision_encoder\.backbone\.blocks\.\d+)"
#: One tensor of the original code that transformers keeps twice.
_SHARED_FROM = "prompt_encoder.shared_embedding.positional_embedding"
_SHARED_TO = "shared_image_embedding.positional_embedding"
#: Names in the original checkpoint, applied in turn, and what they are in ``Sam2VideoModel``.
_RENAMED = (
    (r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", _SHARED_FROM),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    # "layers.1" of the original becomes "layers.0" only after its own "layers.0" has got another name.
    (_HEADS + r"0\.", r"\1.proj_in."),
    (_HEADS + r"1\.", r"\1.layers.0."),
    (_HEADS + r"2\.", r"\1.proj_out."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (_BLOCKS + r"\.mlp\.layers\.0\.", r"\1.mlp.proj_in."),
    (_BLOCKS + r"\.mlp\.layers\.1\.", r"\1.mlp.proj_out."),
    # The original code numbers the layers of the mask downsampler together with the activations.
    *(
        (rf"mask_downsampler\.encoder\.{3 * layer + place}\.", f"mask_downsampler.layers.{layer}.{part}.")
        for layer in range(4)
        for place, part in enumerate(("conv", "layer_norm"))
    ),
    (r"memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    (r"memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"\.gamma$", ".scale"),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.norm(\d*|_final_attn)\.", r".layer_norm\1."),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
)
#: The four kinds of point, which are one table in transformers.
_POINT_KINDS = tuple(f"prompt_encoder.point_embeddings.{n}.weight" for n in range(4))


class FeatureCache:
    """Image features of a scan's slices.

    Computing them is nearly all of the work, and they are the same for every structure and in both directions. Beyond
    ``limit_bytes`` the least recently used are dropped, but never the last one. ``encoded`` counts the slices put in.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._slices: OrderedDict[int, Any] = OrderedDict()
        self._positions: Any = None
        self.encoded = 0

    def get(self, index: int) -> dict[str, Any] | None:
        """Return the features of a slice as transformers put them in; None if they are not there."""
        if index not in self._slices:
            return None
        self._slices.move_to_end(index)
        return {"vision_feats": self._slices[index], "vision_pos_embeds": self._positions}

    def put(self, index: int, features: Mapping[str, Any]) -> None:
        """Keep the features of a slice."""
        # Positions depend on the size of the slices alone, and are five times as large as the features.
        if self._positions is None:
            self._positions = features["vision_pos_embeds"]
        self._slices[index] = features["vision_feats"]
        self.encoded += 1
        while len(self._slices) > 1 and self.size_bytes > self._limit_bytes:
            self._slices.popitem(last=False)

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def size_bytes(self) -> int:
        """Of the features of all slices that are kept."""
        return sum(level.nbytes for levels in self._slices.values() for level in levels)


@dataclass(frozen=True, eq=False)
class _Crop:
    """A session's frames, which become network input when seen, and its cache, both counted from slice ``first``."""

    cache: FeatureCache
    make: Callable[[int], Tensor]
    first: int
    count: int

    def get_vision_features(self, frame_idx: int) -> dict[str, Any] | None:
        return self.cache.get(self.first + frame_idx)

    def cache_vision_features(self, frame_idx: int, features: Mapping[str, Any]) -> None:
        self.cache.put(self.first + frame_idx, features)

    def __getitem__(self, index: int) -> Tensor:
        return self.make(self.first + index)

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, eq=False)
class PointPrompt:
    """Points on one slice.

    ``xy``, (N, 2), are column and row in pixels of the slice, from 0. ``kinds`` are 1: inside; 0: outside; 2 and 3:
    first and last corner of a box, both inclusive.
    """

    index: int
    xy: NDArray[np.float64]
    kinds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SlicePrompt:
    """A mask on one slice, (rows, columns) bool, not empty."""

    index: int
    mask: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Network:
    """The loaded network: a corrected ``Sam2VideoModel``, and the class ``Sam2VideoInferenceSession``.

    A GPU computes in automatic bfloat16 as the original code, a CPU in float32.
    """

    model: Any
    session: Any
    device: torch.device

    @property
    def image_size(self) -> int:
        """Rows and columns of its input, in pixels."""
        return int(self.model.image_size)

    def track(
        self,
        prompt: PointPrompt | SlicePrompt,
        frame: Callable[[int], Tensor],
        shape: tuple[int, int],
        span: tuple[int, int],
        cache: FeatureCache,
        *,
        reverse: bool,
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Predict a prompt's slice, then follow the object through the slices after it, or before it if ``reverse``.

        ``frame`` gives the network input (3, size, size) of a slice, ``shape`` is its rows and columns, ``span`` the
        first slice and one past the last one that may be seen, the prompt's among them. Yields the number of each slice
        and logits, (rows, columns) float32: above 0 inside; -1024 everywhere if the object is absent.
        """
        (first, last), device = span, self.device
        places = {"inference_device": device, "inference_state_device": device, "video_storage_device": "cpu"}
        session = self.session(video_height=shape[0], video_width=shape[1], dtype=torch.float32, **places)
        session.processed_frames = session.cache = _Crop(cache, frame, first, last - first)
        self._give(session, prompt, shape, first)
        for index in range(prompt.index, first - 1, -1) if reverse else range(prompt.index, last):
            half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
            with torch.inference_mode(), half:
                answer = self.model(session, frame_idx=index - first, reverse=reverse)
                logits = functional.interpolate(answer.pred_masks.float(), shape, mode="bilinear", align_corners=False)
            self._forget(session, index - first, reverse=reverse)
            yield index, logits[0, 0].cpu().numpy()

    def _give(self, session: Any, prompt: PointPrompt | SlicePrompt, shape: tuple[int, int], first: int) -> None:
        """Put a prompt into a session."""
        size, rows, columns = self.image_size, *shape
        number, index = session.obj_id_to_idx(1), prompt.index - first
        if isinstance(prompt, PointPrompt):
            # As in the original code, pixel numbers are scaled, not pixel centres.
            xy = np.asarray(prompt.xy, np.float64) * (size / columns, size / rows)
            inputs = {
                "point_coords": torch.from_numpy(xy.astype(np.float32))[None, None],
                "point_labels": torch.tensor(prompt.kinds, dtype=torch.int32)[None, None],
            }
            session.add_point_inputs(number, index, inputs)
        else:
            mask = torch.from_numpy(prompt.mask.astype(np.float32))[None, None]
            small = functional.interpolate(mask, (size, size), mode="bilinear", align_corners=False, antialias=True)
            # Keeps a structure of one pixel on a slice larger than the network's input.
            level = min(0.5, float(small.max()))
            session.add_mask_inputs(number, index, (small >= level).float())
        session.obj_with_new_inputs = [1]

    def _forget(self, session: Any, index: int, *, reverse: bool) -> None:
        """Drop what later slices do not use, so that memory does not grow with the number of slices."""
        kept = session.output_dict_per_obj[0]["non_cond_frame_outputs"]
        for name in ("pred_masks", "high_res_masks"):
            kept.get(index, {}).pop(name, None)
        reach = max(self.model.config.num_maskmem, self.model.config.max_object_pointers_in_encoder)
        kept.pop(index + reach if reverse else index - reach, None)


def load_network(path: Path, device: torch.device) -> Network:
    """Build the network on ``device`` with a published file: ``{"model": weights}``, in any precision.

    Raises InputError if a ``config.json`` beside it (:data:`CONFIG_FILE`) cannot be read, MissingExtraError if
    transformers or Pillow are not installed, ModelError if the file or transformers do not fit.
    """
    weights = named_weights(load_state(path, wanted=_WANTED), path, wanted=_WANTED, key="model")
    require_packages()
    with broken_torchvision_hidden():
        config_class, model_class, session_class = _import_classes()
        settings = _config_beside(path) or copy.deepcopy(dict(PUBLISHED_CONFIG))
        try:
            with torch.random.fork_rng(devices=[]):  # the caller's random state stays
                model = model_class(config_class(**settings))
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise _unsupported(f"cannot build the network of the model 'medsam2' ({reason})") from None
    renamed = rename(weights)
    check_fit(renamed, model.state_dict(), path, wanted=f"{_WANTED}; Efficient-MedSAM2 is another network")
    model.load_state_dict(renamed, strict=True)
    return Network(model.eval().requires_grad_(requires_grad=False).to(device), session_class, device)


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of the original code to those of ``Sam2VideoModel``, as float32."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.float() if tensor.is_floating_point() else tensor
    if all(name in renamed and renamed[name].ndim == 2 for name in _POINT_KINDS):
        renamed["prompt_encoder.point_embed.weight"] = torch.cat([renamed.pop(name) for name in _POINT_KINDS])
    if _SHARED_FROM in renamed:
        renamed[_SHARED_TO] = renamed[_SHARED_FROM]
    return renamed


def _config_beside(path: Path) -> dict[str, Any] | None:
    """Read the architecture from a file beside the checkpoint; None if there is none."""
    file = path.with_name(CONFIG_FILE)
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); correct it or move it away") from None
    settings = content.get(_CONFIG_KEY) if isinstance(content, dict) else None
    return settings if isinstance(settings, dict) else None


def require_packages() -> None:
    """Import what the extra brings; MissingExtraError if it is not installed."""
    for name in ("transformers", "PIL"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise MissingExtraError("the model 'medsam2'", "medsam2") from None


def _import_classes() -> tuple[Any, Any, Any]:
    """Classes of the network's settings, the network, corrected, and its session, if they are as used here."""
    try:
        config_class = importlib.import_module("transformers").Sam2VideoConfig
        modeling = importlib.import_module("transformers.models.sam2_video.modeling_sam2_video")
        model_class, session_class = modeling.Sam2VideoModel, modeling.Sam2VideoInferenceSession
    except (ImportError, AttributeError, RuntimeError) as error:
        raise _unsupported(f"gives no Sam2VideoModel ({error})") from None
    for name, parameters in _CORRECTED.items():
        method = getattr(model_class, name, None)
        if method is None or not parameters <= set(inspect.signature(method).parameters):
            raise _unsupported(f"has another Sam2VideoModel.{name} than is corrected here")
    session = None
    with suppress(TypeError):
        session = session_class(inference_device="cpu", dtype=torch.float32)
    if lacking := [name for name in _SESSION if not hasattr(session, name)]:
        raise _unsupported(f"has another Sam2VideoInferenceSession than is used here (without {few(lacking)})")
    return config_class, _corrected(model_class), session_class


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"transformers {installed_version('transformers')} {what}; the model 'medsam2' needs {_SUPPORTED}"
    )


def broken_torchvision_hidden() -> ExitStack:
    """Hide a torchvision that does not load, as one built for another torch, from transformers, which would load it."""
    hidden = ExitStack()
    if not _torchvision_is_sound():
        for place in ("transformers.utils.import_utils", "transformers.utils"):
            hidden.enter_context(mock.patch(f"{place}.is_torchvision_available", return_value=False))
    return hidden


def _torchvision_is_sound() -> bool:
    """Whether torchvision loads, or is not there at all."""
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        return isinstance(error, ModuleNotFoundError) and error.name == "torchvision"
    return True


def _corrected(kind: Any) -> Any:
    """Correct ``Sam2VideoModel`` where a mask as prompt is treated otherwise than by the original code.

    Each deviation alone moves the logits of other slices by about 0.3 (transformers 5.23.0 against bowang-lab/MedSAM2
    at 332f30d on the CPU; 0.002 remains).
    """

    class Corrected(kind):  # type: ignore[misc]
        def _single_frame_forward(self, **inputs: Any) -> Any:
            # Left open only for the pointer to an object given as a mask: transformers then takes it from the best of
            # three masks, the original code from the single one.
            inputs.setdefault("multimask_output", False)
            return super()._single_frame_forward(**inputs)

        def _use_mask_as_output(self, *inputs: Any, **named: Any) -> Any:
            # transformers remembers the mask as given, the original code its copy downsampled by four and upsampled.
            answer = super()._use_mask_as_output(*inputs, **named)
            answer.high_res_masks = functional.interpolate(
                answer.pred_masks.float(), (self.image_size, self.image_size), mode="bilinear", align_corners=False
            ).to(answer.pred_masks.dtype)
            return answer

    return Corrected
