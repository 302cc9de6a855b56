"""UniverSeg: a U-Net that convolves a slice with each of its examples (Butoi et al., ICCV 2023).

The network is written anew from the paper and the format of the published weights (JJGO/UniverSeg at 62de02e).
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

#: Examples of a slice: more are better in the paper, up to 64, and each costs as much time.
_SUPPORT = 16
_WANTED = "the weights of the in-context baseline 'universeg' (universeg_v1_nf64_ss64_STA.pt)"


class CrossBlock(nn.Module):
    """One slice and its examples interact, then each is convolved on its own."""

    def __init__(self, target: int, support: int, out: int) -> None:
        super().__init__()
        self.cross = CrossConv(target, support, out)
        self.target = nn.Conv2d(out, out, kernel_size=3, padding=1)
        self.support = nn.Conv2d(out, out, kernel_size=3, padding=1)

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """(1, C, H, W) and (S, C', H, W) to the same numbers of images."""
        pairs = self.cross.pairs(target, support)
        target = functional.leaky_relu(self.target(pairs.mean(0, keepdim=True)))
        return target, functional.leaky_relu(self.support(pairs))


@dataclass(frozen=True, eq=False)
class UniverSegNetwork:
    """Network for one slice; see :class:`.SliceNetwork`."""

    network: CrossUNet

    def __call__(self, image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """Give the probability at each pixel."""
        logits: Tensor = self.network(image[None, None], torch.stack([support_images, support_labels], 1))
        return logits[0, 0].sigmoid()


def build_network(channels: int) -> CrossUNet:
    """Build the published architecture for a number of channels."""
    return CrossUNet(CrossBlock, 1, channels, averages_last=True)


def load(device: str, weights: Callable[[], Path | None], support: int | None = None) -> SliceBaseline:
    """Load it onto "cpu" or "cuda"; random weights where the path is None. Errors as of :meth:`.Baseline.load`."""
    place, path = usable_device(device), weights()
    network = load_network(build_network, path, wanted=_WANTED).to(place)
    count = sum(one.numel() for one in network.parameters())
    provenance = {"weights": None if path is None else describe_file(path), "torch_version": installed_version("torch")}
    return SliceBaseline(
        UniverSegNetwork(network), SLICE_SIZE, support or _SUPPORT, count, place, provenance=provenance
    )
