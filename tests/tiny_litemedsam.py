"""A LiteMedSAM checkpoint of small random weights, in the layout of the published one: batch norms are not folded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from atlassegfm.models.litemedsam.network import LiteMedSam, Widths

WIDTHS = Widths((4, 8, 10, 20), 16, 32)


def make_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names, and some that are not used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, weights = LiteMedSam(WIDTHS), dict[str, Tensor]()
        for name, value in network.state_dict().items():
            stem, _, last = name.rpartition(".")
            module = network.get_submodule(stem)
            if last == "bias" and stem.endswith(".attn"):
                heads, tokens, _ = value.shape
                weights[f"{stem}.attention_biases"] = torch.randn(heads, tokens)
            elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
                channels = len(module.bias)
                if last == "weight":
                    weights[f"{stem}.c.weight"] = torch.randn(value.shape) * 0.3
                    for part in ("weight", "running_var"):
                        weights[f"{stem}.bn.{part}"] = torch.rand(channels) + 0.5
                    for part in ("bias", "running_mean"):
                        weights[f"{stem}.bn.{part}"] = torch.randn(channels) * 0.2
                    weights[f"{stem}.bn.num_batches_tracked"] = torch.tensor(7)
            else:
                weights[name] = torch.randn(value.shape) * (0.3 if value.ndim > 1 else 0.1)
        weights["prompt_encoder.not_a_point_embed.weight"] = torch.zeros(1, WIDTHS.embedding)
        weights["mask_decoder.output_hypernetworks_mlps.1.layers.0.weight"] = torch.zeros(1, 1)
    return weights


def make_checkpoint(path: Path, seed: int = 0) -> Path:
    """Write them to a file."""
    torch.save(make_weights(seed), path)
    return path
