"""Islands: what counts as one, by hand-made label maps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.config import with_overrides
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.fusion.label_map import count_parts, find_islands, remove_islands
from atlassegfm.models import OnPrompt
from atlassegfm.prompts import MaskPrompt
from atlassegfm.segment import segment
from atlassegfm.settings import Settings
from scenes import ATLAS, QUERY, STRUCTURES, UNREGISTERED, straight_grid


def empty() -> np.ndarray:
    return np.zeros((20, 16, 12), np.uint8)


def cube(labels: np.ndarray, value: int, corner: tuple[int, int, int], size: int) -> np.ndarray:
    labels[tuple(slice(first, first + size) for first in corner)] = value
    return labels


def test_parts_are_counted() -> None:
    labels = cube(cube(empty(), 1, (0, 0, 0), 5), 1, (10, 0, 0), 4)
    labels[19, 15, 11] = 1  # a slip of the pen
    cube(labels, 2, (0, 8, 0), 5)
    assert count_parts(labels) == {1: 2, 2: 1}
    assert count_parts(empty()) == {}


def test_voxels_that_share_a_corner_are_connected() -> None:
    assert count_parts(cube(cube(empty(), 1, (0, 0, 0), 3), 1, (3, 3, 3), 3)) == {1: 1}


def test_islands_go_and_the_largest_parts_stay() -> None:
    labels = cube(cube(cube(empty(), 3, (0, 0, 0), 6), 3, (10, 0, 0), 5), 3, (10, 10, 0), 2)
    # 216, 125 and 8 voxels: the second is more than 0.3 of the first and may be torn off it.
    assert find_islands(labels == 3, 1).sum() == 8
    assert not find_islands(cube(labels, 0, (10, 0, 0), 5) == 3, 2).any()


def test_only_structures_of_the_atlas_change() -> None:
    labels = cube(cube(empty(), 3, (0, 0, 0), 6), 3, (10, 10, 0), 2)
    masks = {3: LocalMap.from_full((labels == 3).astype(np.float32))}
    for parts in ({3: 2}, {}):
        same, unchanged = remove_islands(masks, masks, labels, parts)
        assert same == masks
        assert unchanged is labels
    changed, without = remove_islands(masks, masks, labels, {3: 1})
    assert (without == 3).sum() == 216
    np.testing.assert_array_equal(changed[3].to_full(labels.shape) > 0, without == 3)


class _WithIslands:
    """Predicts the prompt and an island far off."""

    def __init__(self) -> None:
        self.provenance: dict[str, str] = {}

    def encode(self, image: Volume) -> tuple[int, ...]:
        return image.grid.shape

    def predict(
        self, encoded: tuple[int, int, int], prompts: dict[int, MaskPrompt], _on_prompt: OnPrompt
    ) -> dict[int, LocalMap]:
        maps = {}
        for number, prompt in prompts.items():
            values = prompt.probability.to_full(encoded)
            values[0, number, 0] = 1
            maps[number] = LocalMap.from_full(values)
        return maps


@pytest.mark.parametrize("wanted", [True, False])
def test_results_have_the_topology_of_the_atlas(wanted: bool) -> None:
    grid = straight_grid()
    atlas = Atlas(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    overrides = [
        *UNREGISTERED,
        "fusion.gate=paper",
        "fusion.start=0",
        "fusion.iterations=0",
        f"topology={str(wanted).lower()}",
    ]
    context = Context(atlas, with_overrides(Settings(), overrides))
    result = segment(context, QUERY.scan(grid), model=_WithIslands())
    assert result.model_labels is not None
    assert result.model_labels.data[0].any()  # the prediction is reported as it is
    assert result.labels.data[0].any() == (not wanted)
    for value, maps in result.probabilities.items():
        mask = maps.fused.to_full(grid.shape) >= 0.5
        found = result.labels.data == value
        assert ndimage.label(found)[1] == (1 if wanted else 2)
        assert (mask == found).all()
