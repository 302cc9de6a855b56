"""A tiny checkpoint of random weights for the model ``vesselfm``, in the layout of the published one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

#: Channels of each resolution: as few as the architecture bears.
FILTERS = (2, 2, 2, 2, 2, 2)


def make_checkpoint(path: Path, seed: int = 0, filters: Sequence[int] = FILTERS) -> Path:
    """Write a bare state dict as the authors publish theirs.

    Parameters
    ----------
    path : Path
        File to be written.
    seed : int
        Of the random weights.
    filters : sequence of int, (6,)
        Channels of each resolution, finest first.
    """
    from atlassegfm.models.vesselfm import build_network

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(filters)
    with torch.no_grad():
        # Untrained logits hardly differ from each other; so they reach from about -3 to 3.
        network.get_parameter("output_block.conv.conv.weight").mul_(4)
    torch.save(network.state_dict(), path)
    return path
