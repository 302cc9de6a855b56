"""Tyche: as UniverSeg, but with several candidates for a slice, which interact (Rakic et al., CVPR 2024).

The network, "Tyche-TS", is written anew from the paper and the format of the published weights (mariannerakic/Tyche
at 2ab2e75). Each candidate sees the slice and noise of its own; the answer is the mean of their probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import usable_device
from ..weights import describe_file, installed_version
from .by_slices import SliceBaseline
from .cross import SLICE_SIZE, CrossConv, CrossUNet, load_network

#: Examples of a slice, as many as for UniverSeg, and candidates for it.
_SUPPORT, _CANDIDATES = 16, 8
_WANTED = "the weights of the in-context baseline 'tyche' (tyche_v1_model_weights_CVPR.pt)"


class SetBlock(nn.Module):
    """The mean candidate interacts with the examples, each candidate with the outcome."""

    def __init__(self, target: int, support: int, out: int) -> None:
        super().__init__()
        self.cross = CrossConv(target, support, out)
        self.meanconv = CrossConv(target, out, out)
        self.target = nn.Conv2d(out, out, kernel_size=3, padding=1)
        self.support = nn.Conv2d(out, out, kernel_size=3, padding=1)

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """(K, C, H, W) and (S, C', H, W) to the same numbers of images."""
        pairs = functional.leaky_relu(self.cross.pairs(target.mean(0, keepdim=True), support))
        joined = functional.leaky_relu(self.meanconv.pairs(target, pairs.mean(0, keepdim=True)))
        return functional.leaky_relu(self.target(joined)), functional.leaky_relu(self.support(pairs))


@dataclass(frozen=True, eq=False)
class TycheNetwork:
    """Network for one slice; see :class:`.SliceNetwork`. ``noise`` is (K, N, N), that of each candidate."""

    network: CrossUNet
    noise: Tensor

    def __call__(self, image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """Give the probability at each pixel."""
        target = torch.stack([image.expand_as(self.noise), self.noise], 1)
        logits: Tensor = self.network(target, torch.stack([support_images, support_labels], 1))
        return logits[:, 0].sigmoid().mean(0)


def build_network(channels: int) -> CrossUNet:
    """Build the published architecture for a number of channels."""
    return CrossUNet(SetBlock, 2, channels, averages_last=False)


def load(device: str, weights: Callable[[], Path | None], support: int | None = None) -> SliceBaseline:
    """Load it onto "cpu" or "cuda"; random weights where the path is None. Errors as of :meth:`.Baseline.load`."""
    place, path = usable_device(device), weights()
    network = load_network(build_network, path, wanted=_WANTED).to(place)
    count = sum(one.numel() for one in network.parameters())
    # The same for every slice, so that a slice's answer does not depend on which others are asked.
    noise = torch.randn((_CANDIDATES, SLICE_SIZE, SLICE_SIZE), generator=torch.Generator().manual_seed(0)).to(place)
    provenance = {"weights": None if path is None else describe_file(path), "torch_version": installed_version("torch")}
    return SliceBaseline(
        TycheNetwork(network, noise), SLICE_SIZE, support or _SUPPORT, count, place, provenance=provenance
    )
