"""Network of LiteMedSAM: a TinyViT image encoder with the prompt encoder and mask decoder of Segment Anything.

The architecture of bowang-lab/MedSAM, branch LiteMedSAM at b0fab47, as computed in inference: batch norms are folded
into the convolutions before them, position biases are tables, and of the decoder's masks only the single one is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoint import check_fit, load_state, named_weights

#: Rows and columns of the input and of the logits as published, and how many of them are one in the embedding.
IMAGE_SIZE, PATCH_SIZE = 256, 4
_WANTED = "the weights of the model 'litemedsam' (lite_medsam.pth)"

#: Number of blocks, heads and window of each stage; the first has convolutions instead of attention.
_STAGES = ((2, 0, 0), (2, 4, 7), (6, 5, 14), (2, 10, 7))
#: Factor by which tokens become fewer along both axes after each stage.
_STRIDES = (2, 2, 1)
_EXPANSION = 4
#: Attention heads and blocks of the decoder.
_HEADS, _DEPTH = 8, 2
#: Tokens of the decoder before those of the prompt: predicted overlap, then one a mask, the single one first.
_MASK_TOKENS = 4
#: Of the batch norms that are folded, and of norms over channels.
_BATCH_NORM_EPS, _CHANNEL_NORM_EPS = 1e-5, 1e-6
#: Weights of prompts that this program does not give, and of masks it does not ask for.
_UNUSED = (
    "prompt_encoder.mask_downscaling.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.point_embeddings.0.",
    "prompt_encoder.point_embeddings.1.",
    *(f"mask_decoder.output_hypernetworks_mlps.{n}." for n in range(1, _MASK_TOKENS)),
)


@dataclass(frozen=True)
class Widths:
    """Channels of the four stages, of embedding and tokens, of the decoder's MLP; by default the published ones."""

    stages: tuple[int, int, int, int] = (64, 128, 160, 320)
    embedding: int = 256
    mlp: int = 2048


class LiteMedSam(nn.Module):
    """Encoder and decoder under the names of the published checkpoint."""

    def __init__(self, widths: Widths | None = None) -> None:
        super().__init__()
        widths = widths or Widths()
        self.image_encoder = Encoder(widths)
        self.prompt_encoder = _PromptEncoder(widths.embedding)
        self.mask_decoder = _MaskDecoder(widths)

    def encode(self, images: Tensor) -> Tensor:
        """Encode slices, (N, 1, 256, 256) in [0, 1], to (N, 256, 64, 64)."""
        embedding: Tensor = self.image_encoder(images)
        return embedding

    def forward(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Decode one slice's embedding, (1, 256, 64, 64), for B boxes, (B, 4): x, y first, x, y last, in pixels.

        Returns logits (B, 256, 256), above 0 inside, and the overlap (Jaccard) that the network predicts, (B,).
        """
        size = embedding.shape[-1]
        decoded: tuple[Tensor, Tensor] = self.mask_decoder(
            embedding + self.prompt_encoder.no_mask_embed.weight[:, :, None, None],
            self.prompt_encoder.pe_layer.grid(size),
            self.prompt_encoder(boxes, size * PATCH_SIZE),
        )
        return decoded


def load_network(path: Path) -> LiteMedSam:
    """Build the network with a published file, a bare state dict; ModelError if it is of another one or damaged."""
    weights = named_weights(load_state(path, wanted=_WANTED), path, wanted=_WANTED)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays
        network = LiteMedSam(_widths_of(weights))
    folded = {name: value for name, value in fold(weights).items() if not name.startswith(_UNUSED)}
    check_fit(folded, network.state_dict(), path, wanted=_WANTED)
    network.load_state_dict(folded, strict=True)
    for kernel in network.image_encoder.parameters():
        if kernel.ndim == 4:  # channels come last in the encoder: convolutions then copy nothing
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    return network.eval().requires_grad_(requires_grad=False)


def _widths_of(weights: Mapping[str, Tensor]) -> Widths:
    """Widths of a checkpoint's network; the published ones where it does not show them."""
    stages = [f"image_encoder.layers.{n}.blocks.0.{'conv3.c' if n == 0 else 'attn.proj'}.weight" for n in range(4)]
    names = (*stages, "image_encoder.neck.0.weight", "mask_decoder.transformer.layers.0.mlp.lin1.weight")
    if any(name not in weights for name in names):
        return Widths()
    one, two, three, four, embedding, mlp = (int(weights[name].shape[0]) for name in names)
    return Widths((one, two, three, four), embedding, mlp)


def fold(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold batch norms (``*.bn``) into the convolutions before them (``*.c``), and spread position biases to tables."""
    folded = {}
    for name, value in weights.items():
        stem, _, last = name.rpartition(".")
        if last == "attention_biases":
            folded[f"{stem}.bias"] = _bias_table(value.float())
        elif stem.endswith(".c") and f"{stem[:-2]}.bn.weight" in weights:
            stem = stem[:-2]
            scale, shift, mean, variance = (
                weights[f"{stem}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = scale / (variance + _BATCH_NORM_EPS).sqrt()
            folded[f"{stem}.weight"] = (value.double() * scale[:, None, None, None]).float()
            folded[f"{stem}.bias"] = (shift - mean * scale).float()
        elif not stem.endswith(".bn"):
            folded[name] = value.float()
    return folded


def _bias_table(biases: Tensor) -> Tensor:
    """(heads, n², n²) biases between positions of a window of n² tokens, from (heads, n²) by absolute offset."""
    side = math.isqrt(biases.shape[1])
    offset = (torch.arange(side)[:, None] - torch.arange(side)[None]).abs()
    index = offset[:, None, :, None] * side + offset[None, :, None, :]
    return biases[:, index.reshape(side * side, side * side)].contiguous()


class Encoder(nn.Module):
    """TinyViT: (N, 1, 256, 256) to (N, 256, 64, 64).

    Inside, channels come last, (N, rows, columns, C): all but the depthwise convolutions are products of matrices.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        first, width = widths.stages[0], widths.embedding
        self.patch_embed = nn.ModuleDict(
            {"seq": nn.Sequential(_Pointwise(3, first // 2), nn.GELU(), _Pointwise(first // 2, first))}
        )
        self.layers = nn.ModuleList(_Stage(n, widths.stages) for n in range(len(_STAGES)))
        self.neck = nn.Sequential(
            _Pointwise(widths.stages[-1], width, bias=False),
            nn.LayerNorm(width, eps=_CHANNEL_NORM_EPS),
            _Spatial(width, bias=False),
            nn.LayerNorm(width, eps=_CHANNEL_NORM_EPS),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode slices."""
        x = self.patch_embed["seq"](images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))
        for stage in self.layers:
            x = stage(x)
        embedding: Tensor = self.neck(x)
        return embedding.permute(0, 3, 1, 2)


class _Pointwise(nn.Conv2d):
    """Convolution of one pixel."""

    def __init__(self, width: int, wider: int, *, bias: bool = True) -> None:
        super().__init__(width, wider, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight[:, :, 0, 0], self.bias)


class _Spatial(nn.Conv2d):
    """Convolution of 3 x 3 pixels, of all channels or of each alone."""

    def __init__(self, width: int, stride: int = 1, *, groups: int = 1, bias: bool = True) -> None:
        super().__init__(width, width, 3, stride, padding=1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.permute(0, 3, 1, 2))
        return found.permute(0, 2, 3, 1)


def _depthwise(width: int, stride: int = 1) -> _Spatial:
    return _Spatial(width, stride, groups=width)


class _Stage(nn.Module):
    def __init__(self, number: int, widths: Sequence[int]) -> None:
        super().__init__()
        width, (depth, heads, window) = widths[number], _STAGES[number]
        block = (lambda: _AttentionBlock(width, heads, window)) if heads else (lambda: _ConvolutionBlock(width))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.downsample = None
        if number + 1 < len(_STAGES):
            self.downsample = _Merging(width, widths[number + 1], _STRIDES[number])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x


class _ConvolutionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _Pointwise(width, width * _EXPANSION)
        self.conv2 = _depthwise(width * _EXPANSION)
        self.conv3 = _Pointwise(width * _EXPANSION, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.gelu(self.conv2(functional.gelu(self.conv1(x))))
        return functional.gelu(self.conv3(inner) + x)


class _Merging(nn.Module):
    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _Pointwise(width, wider)
        self.conv2 = _depthwise(wider, stride)
        self.conv3 = _Pointwise(wider, wider)

    def forward(self, x: Tensor) -> Tensor:
        merged: Tensor = self.conv3(functional.gelu(self.conv2(functional.gelu(self.conv1(x)))))
        return merged


class _AttentionBlock(nn.Module):
    """Attention in windows, a convolution, a perceptron."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = _WindowAttention(width, heads, window)
        self.local_conv = _depthwise(width)
        self.mlp = _Perceptron(width)

    def forward(self, x: Tensor) -> Tensor:
        n, rows, columns, width = x.shape
        side = self.window
        down, along = -(-rows // side), -(-columns // side)
        tokens = functional.pad(x, (0, 0, 0, along * side - columns, 0, down * side - rows))
        tokens = tokens.reshape(n, down, side, along, side, width).transpose(2, 3).reshape(-1, side * side, width)
        tokens = self.attn(tokens)
        tokens = tokens.reshape(n, down, along, side, side, width).transpose(2, 3)
        tokens = tokens.reshape(n, down * side, along * side, width)[:, :rows, :columns]
        mixed: Tensor = self.local_conv(x + tokens)
        added: Tensor = self.mlp(mixed)
        return mixed + added


class _WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.register_buffer("bias", torch.zeros(heads, window**2, window**2))

    def forward(self, tokens: Tensor) -> Tensor:
        windows, count, width = tokens.shape
        size = width // self.heads
        qkv = self.qkv(self.norm(tokens)).view(windows, count, self.heads, 3, size)
        # By hand: PyTorch's own attention spends a tenth of the time on looking for rows that are masked out.
        query, key, value = qkv.permute(3, 0, 2, 1, 4).flatten(1, 2)
        bias = self.get_buffer("bias").expand(windows, -1, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=size**-0.5)
        mixed = (scores.softmax(dim=-1) @ value).unflatten(0, (windows, self.heads))
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(windows, count, width))
        return projected


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width * _EXPANSION)
        self.fc2 = nn.Linear(width * _EXPANSION, width)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.fc2(functional.gelu(self.fc1(self.norm(tokens))))
        return found


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, rows, columns)."""

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = super().forward(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class _Positions(nn.Module):
    """Random Fourier features of positions in the unit square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.zeros(2, width // 2))

    def encode(self, unit: Tensor) -> Tensor:
        """(..., 2) x and y in [0, 1] to (..., C)."""
        matrix = self.get_buffer("positional_encoding_gaussian_matrix")
        angle = 2 * math.pi * ((2 * unit - 1) @ matrix)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    def grid(self, size: int) -> Tensor:
        """(1, size², C) encoding of the embedding's pixels, row by row."""
        matrix = self.get_buffer("positional_encoding_gaussian_matrix")
        centres = (torch.arange(size, device=matrix.device, dtype=matrix.dtype) + 0.5) / size
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.encode(torch.stack((x, y), dim=-1)).flatten(0, 1)[None]


class _PromptEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pe_layer = _Positions(width)
        # Under the published numbers: 0 and 1 are points outside and inside, 2 and 3 the corners of a box.
        self.point_embeddings = nn.ModuleDict({str(n): nn.Embedding(1, width) for n in (2, 3)})
        self.no_mask_embed = nn.Embedding(1, width)

    def forward(self, boxes: Tensor, size: int) -> Tensor:
        """(B, 2, C) tokens of the two corners of (B, 4) boxes in an image of ``size`` rows and columns."""
        corners = (boxes.reshape(-1, 2, 2) + 0.5) / size
        kinds = torch.cat([self.point_embeddings[str(n)].get_parameter("weight") for n in (2, 3)])
        return self.pe_layer.encode(corners) + kinds


class _MaskDecoder(nn.Module):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        width = widths.embedding
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(_MASK_TOKENS, width)
        self.transformer = _TwoWay(width, widths.mlp)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            _ChannelNorm(width // 4, eps=_CHANNEL_NORM_EPS),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleDict({"0": _Mlp(width, width, width // 8)})
        self.iou_prediction_head = _Mlp(width, width, _MASK_TOKENS)

    def forward(self, embedding: Tensor, positions: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((own[None].expand(prompts.shape[0], -1, -1), prompts), dim=1)
        tokens, image = self.transformer(tokens, embedding.flatten(2).transpose(1, 2), positions)
        image = image.transpose(1, 2).unflatten(2, embedding.shape[2:])
        upscaled = self.output_upscaling(image)
        weights = self.output_hypernetworks_mlps["0"](tokens[:, 1])
        logits = (weights[:, None] @ upscaled.flatten(2))[:, 0].unflatten(1, upscaled.shape[2:])
        return logits, self.iou_prediction_head(tokens[:, 0])[:, 0]


class _Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        widths = (inputs, hidden, hidden, outputs)
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        found: Tensor = self.layers[-1](x)
        return found


class _TwoWay(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoWayBlock(width, mlp_width, first=n == 0) for n in range(_DEPTH))
        self.final_attn_token_to_image = _Attention(width, width // 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, prompts: Tensor, image: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Let (B, N, C) tokens and (1, 4096, C) pixels attend to each other."""
        tokens = prompts
        for layer in self.layers:
            tokens, image = layer(tokens, image, prompts, positions)
        tokens = tokens + self.final_attn_token_to_image(tokens + prompts, image + positions, image)
        return self.norm_final_attn(tokens), image


class _TwoWayBlock(nn.Module):
    def __init__(self, width: int, mlp_width: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = _Attention(width, width)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))
        self.cross_attn_token_to_image = _Attention(width, width // 2)
        self.cross_attn_image_to_token = _Attention(width, width // 2)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(width, mlp_width), "lin2": nn.Linear(mlp_width, width)})

    def forward(self, tokens: Tensor, image: Tensor, prompts: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            query = tokens + prompts
            tokens = tokens + self.self_attn(query, query, tokens)
        tokens = self.norm1(tokens)
        # The first block's pixels are the same for all boxes, and are projected once.
        placed = image + positions
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + prompts, placed, image))
        tokens = self.norm3(tokens + self.mlp["lin2"](functional.relu(self.mlp["lin1"](tokens))))
        return tokens, self.norm4(image + self.cross_attn_image_to_token(placed, tokens + prompts, tokens))


class _Attention(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return torch.unflatten(x, 2, (_HEADS, -1)).transpose(1, 2)

        # Written out: batches of tokens and of pixels may differ, and the batch must stay open when traced.
        queries, keys, values = heads(self.q_proj(query)), heads(self.k_proj(key)), heads(self.v_proj(value))
        scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])
        projected: Tensor = self.out_proj((scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))
        return projected
