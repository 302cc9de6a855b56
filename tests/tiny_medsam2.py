"""A MedSAM2 checkpoint of small random weights, in the layout of the published ones.

Names are turned from those of transformers into the original ones here, by a list of its own: what the package turns
back is then not its own work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlassegfm.models.medsam2 import network as network_module

#: A small network of the published depth: 64 pixels, widths 8 to 64. transformers has memories of 64 channels written
#: into its code, so that less than twice as many here would leave out how it takes pointers to objects apart.
CONFIG: dict[str, Any] = {
    "image_size": 64,
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "image_size": [64, 64],
            "hidden_size": 8,
            "num_attention_heads": 1,
            "blocks_per_stage": [1, 2, 7, 2],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [8, 4, 14, 7],
            "global_attention_blocks": [5, 7, 9],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 128,
    },
    "prompt_encoder_config": {"hidden_size": 128, "image_size": 64},
    "mask_decoder_config": {
        "hidden_size": 128,
        "mlp_dim": 64,
        "iou_head_hidden_dim": 32,
        "dynamic_multimask_via_stability": True,
    },
    "memory_attention_hidden_size": 128,
    "memory_attention_feed_forward_hidden_size": 64,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 128,
    "memory_encoder_output_channels": 64,
    "mask_downsampler_embed_dim": 128,
    "memory_fuser_embed_dim": 128,
    "memory_fuser_intermediate_dim": 64,
    "enable_temporal_pos_encoding_for_object_pointers": True,
    "enable_occlusion_spatial_embedding": True,
}

_HEADS = r"(iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+|obj_ptr_proj)\."
_ORIGINAL = (
    (r"^object_pointer_proj\.", "obj_ptr_proj."),
    (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
    (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (
        r"^prompt_encoder\.shared_embedding\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (_HEADS + r"layers\.0\.", r"\1.layers.1."),
    (_HEADS + r"proj_in\.", r"\1.layers.0."),
    (_HEADS + r"proj_out\.", r"\1.layers.2."),
    (r"\.mlp\.proj_in\.", ".mlp.layers.0."),
    (r"\.mlp\.proj_out\.", ".mlp.layers.1."),
    (r"mask_embed\.conv1\.", "mask_downscaling.0."),
    (r"mask_embed\.layer_norm1\.", "mask_downscaling.1."),
    (r"mask_embed\.conv2\.", "mask_downscaling.3."),
    (r"mask_embed\.layer_norm2\.", "mask_downscaling.4."),
    (r"mask_embed\.conv3\.", "mask_downscaling.6."),
    (r"upscale_conv1\.", "output_upscaling.0."),
    (r"upscale_layer_norm\.", "output_upscaling.1."),
    (r"upscale_conv2\.", "output_upscaling.3."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^vision_encoder\.backbone\.patch_embed\.projection\.", "image_encoder.trunk.patch_embed.proj."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"mask_downsampler\.final_conv\.", "mask_downsampler.encoder.12."),
    (r"memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
    (r"memory_encoder\.projection\.", "memory_encoder.out_proj."),
    (r"memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
    (r"(fuser\.layers\.\d+)\.depthwise_conv\.", r"\1.dwconv."),
    (r"(fuser\.layers\.\d+)\.layer_norm\.", r"\1.norm."),
    (r"(fuser\.layers\.\d+)\.pointwise_conv(\d)\.", r"\1.pwconv\2."),
    (r"(fuser\.layers\.\d+)\.scale$", r"\1.gamma"),
    (r"\.o_proj\.", ".out_proj."),
    (r"^(image_encoder|memory_attention|mask_decoder)\.(.*)layer_norm(\d?|_final_attn)\.", r"\1.\2norm\3."),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.", "sam_mask_decoder."),
)


def original_name(name: str) -> str:
    """The name of a weight in the original code."""
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    found = re.fullmatch(r"(memory_encoder\.mask_downsampler)\.layers\.(\d)\.(conv|layer_norm)\.(.+)", name)
    if found:
        name = f"{found[1]}.encoder.{3 * int(found[2]) + (found[3] == 'layer_norm')}.{found[4]}"
    return name


def original_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ``Sam2VideoModel`` as the original code would write them."""
    out = {}
    for name, tensor in state.items():
        if name == "prompt_encoder.point_embed.weight":
            for n, row in enumerate(tensor):
                out[f"sam_prompt_encoder.point_embeddings.{n}.weight"] = row[None].clone()
        elif name != "shared_image_embedding.positional_embedding":  # kept twice by transformers
            out[original_name(name)] = tensor
    return out


def build(config: Mapping[str, Any]) -> Any:
    """A network of an architecture, with transformers' own random weights."""
    with network_module.broken_torchvision_hidden(), torch.random.fork_rng(devices=[]):
        from transformers import Sam2VideoConfig, Sam2VideoModel

        return Sam2VideoModel(Sam2VideoConfig(**config))


def make_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the original layout, of a network that always sees an object, of a size that varies."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in build(CONFIG).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            state[name] = noise * (1.5 / fan_in**0.5)
        elif name.endswith("weight"):  # of a norm
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = 0.1 * noise
    state["mask_decoder.pred_obj_score_head.proj_out.bias"] += 10
    return original_layout(state)


def make_checkpoint(path: Path, seed: int = 0) -> Path:
    """Write a checkpoint, and its architecture as ``config.json`` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": make_weights(seed)}, path)
    (path.parent / "config.json").write_text(json.dumps({"transformers": CONFIG}), encoding="utf-8")
    return path
