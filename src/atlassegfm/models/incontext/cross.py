"""Convolution of a slice with each of its examples, the part that UniverSeg and Tyche share, and their U shape.

Names and shapes of the weights are those of the published files; each block adds a module ``cross`` and others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoint import check_fit, load_state, named_weights

#: Channels of every resolution, coarsest last, and pixels of a slice [published].
CHANNELS, LEVELS, SLICE_SIZE = 64, 4, 128
#: Modules of the published code around the convolutions.
_PUBLISHED = {
    "cross": "cross.cross_conv",
    "meanconv": "meanconv.vmapped.conv",
    "target": "target.vmapped.conv",
    "support": "support.vmapped.conv",
    "out_conv": "out_conv.conv",
}


class CrossConv(nn.Conv2d):
    """Convolution of every pair of two sets of images, their channels one behind the other.

    It is linear, so that each image of both sets is convolved once, and the results are added.
    """

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__(first + second, out, kernel_size=3, padding=1)
        self._first = first

    def pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """(N, C, H, W) and (N, C', H, W) to (N, out, H, W); one N may be 1, which is then paired with all."""
        one = functional.conv2d(first, self.weight[:, : self._first], self.bias, padding=1)
        return one + functional.conv2d(second, self.weight[:, self._first :], None, padding=1)


#: Takes a target and a support, (T, C, H, W) and (S, C', H, W), and gives both again.
Block = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CrossUNet(nn.Module):
    """U-Net over a set of targets and a set of examples at once.

    ``make_block`` makes a block from the channels of target and support and those it gives; ``target_channels`` are
    those of the input. If ``averages_last``, the last block takes the mean of its examples, as it only averages them.
    """

    def __init__(
        self, make_block: Callable[[int, int, int], nn.Module], target_channels: int, channels: int, averages_last: bool
    ) -> None:
        super().__init__()
        inputs = [(target_channels, 2)] + [(channels, channels)] * (LEVELS - 1)
        self.enc_blocks = nn.ModuleList(make_block(*both, channels) for both in inputs)
        self.dec_blocks = nn.ModuleList(make_block(2 * channels, 2 * channels, channels) for _ in range(LEVELS - 1))
        self.out_conv = nn.Conv2d(channels, 1, kernel_size=1)
        self._averages_last = averages_last

    def forward(self, target: Tensor, support: Tensor) -> Tensor:
        """(T, C, H, W) targets and (S, 2, H, W) images with their masks to logits, (T, 1, H, W)."""
        skipped = []
        for block in self.enc_blocks[:-1]:
            target, support = block(target, support)
            skipped.append((target, support))
            target, support = functional.max_pool2d(target, 2), functional.max_pool2d(support, 2)
        target, support = self.enc_blocks[-1](target, support)
        for block in self.dec_blocks:
            target_skip, support_skip = skipped.pop()
            if not skipped and self._averages_last:
                support, support_skip = support.mean(0, keepdim=True), support_skip.mean(0, keepdim=True)
            target, support = block(_joined(target, target_skip), _joined(support, support_skip))
        logits: Tensor = self.out_conv(target)
        return logits


def _joined(coarse: Tensor, fine: Tensor) -> Tensor:
    """Both at the finer resolution, channels one behind the other."""
    return torch.cat([functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True), fine], dim=1)


def published_name(name: str) -> str:
    """Name that a weight of :class:`CrossUNet` has in a published file."""
    *stem, module, leaf = name.split(".")
    return ".".join((*stem, _PUBLISHED[module], leaf))


def load_network(make: Callable[[int], CrossUNet], path: Path | None, *, wanted: str) -> CrossUNet:
    """Load a network made for a number of channels; random weights, always the same, without a file.

    ``wanted`` names the weights in messages. ModelError if the file is damaged or holds weights of another network.
    """
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _frozen(make(CHANNELS))
    state = named_weights(load_state(path, wanted=wanted), path, wanted=wanted)
    last: Sequence[int] = state["out_conv.conv.weight"].shape if "out_conv.conv.weight" in state else ()
    with torch.device("meta"):
        network = make(last[1] if len(last) == 4 and last[1] > 0 else CHANNELS)
    own = network.state_dict()
    check_fit(state, {published_name(name): tensor for name, tensor in own.items()}, path, wanted=wanted)
    network.load_state_dict({name: state[published_name(name)].float() for name in own}, strict=True, assign=True)
    return _frozen(network)


def _frozen(network: CrossUNet) -> CrossUNet:
    return network.eval().requires_grad_(requires_grad=False)
