"""What registration compares instead of intensities.

MIND-SSC (Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using
Self-similarities", MICCAI 2013) describes a voxel by how alike the patches around it are. It does not
change with contrast, bias field or scanner, and 12 numbers a voxel are cheap to compare.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor

#: The six neighbours whose patches are compared (Heinrich et al. 2013, figure 2).
_NEIGHBOURS = ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0))
#: Pairs of them at distance sqrt 2: all but the three opposite pairs.
_PAIRS = tuple(
    (a, b)
    for position, a in enumerate(_NEIGHBOURS)
    for b in _NEIGHBOURS[position + 1 :]
    if any(first + second for first, second in zip(a, b, strict=True))
)
MIND_CHANNELS = len(_PAIRS)


def box_mean(image: Tensor, radius: int) -> Tensor:
    """Mean over cubes of 2 * radius + 1 voxels; at the border over the part inside.

    Parameters
    ----------
    image : Tensor, (N, C, I, J, K)
    radius : int
        Of the cube, in voxels.

    Returns
    -------
    Tensor, (N, C, I, J, K)
    """
    size = 2 * radius + 1
    for axis in range(3):
        kernel = [1, 1, 1]
        padding = [0, 0, 0]
        kernel[axis], padding[axis] = size, radius
        image = F.avg_pool3d(image, kernel, stride=1, padding=padding, count_include_pad=False)
    return image


def mind_ssc(image: Tensor, *, radius: int = 1, dilation: int = 1) -> Tensor:
    """Self-similarity context of every voxel.

    Parameters
    ----------
    image : Tensor, (1, 1, I, J, K) float32
        Intensities, any scale.
    radius : int
        Of the compared patches, in voxels.
    dilation : int
        Distance of the neighbours, in voxels.

    Returns
    -------
    Tensor, (1, 12, I, J, K) float32
        Each in (0, 1].
    """
    reach = dilation
    padded = F.pad(image, [reach] * 6, mode="replicate")
    size = image.shape[2:]

    def shifted(offset: tuple[int, int, int]) -> Tensor:
        a, b, c = (reach + dilation * step for step in offset)
        return padded[:, :, a : a + size[0], b : b + size[1], c : c + size[2]]

    differences = torch.cat([(shifted(a) - shifted(b)) ** 2 for a, b in _PAIRS], dim=1)
    distances = box_mean(differences, radius)
    distances = distances - distances.amin(dim=1, keepdim=True)
    noise = distances.mean(dim=1, keepdim=True)
    # The local noise estimate is kept within a factor 1000 of its mean, as in the authors' own code.
    middle = noise.mean()
    noise = noise.clamp(float(middle) * 1e-3, float(middle) * 1e3).clamp_min(1e-12)
    return torch.exp(-distances / noise)
