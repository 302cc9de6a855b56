"""Islands and holes: what counts as one, by hand-made label maps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from atlassegfm.atlas import Atlas
from atlassegfm.core.config import with_overrides
from atlassegfm.core.image import Volume
from atlassegfm.core.mask import LocalMap
from atlassegfm.fusion.topology import Topology, changes_to, topologies_of
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


def test_parts_and_holes_are_counted() -> None:
    labels = cube(cube(empty(), 1, (0, 0, 0), 5), 1, (10, 0, 0), 4)
    labels[19, 15, 11] = 1  # a slip of the pen
    cube(cube(labels, 2, (0, 8, 0), 5), 0, (2, 10, 2), 1)
    assert topologies_of(labels) == {1: Topology(2, True), 2: Topology(1, False)}
    assert topologies_of(empty()) == {}


def test_voxels_that_share_a_corner_belong_together() -> None:
    labels = cube(cube(empty(), 1, (0, 0, 0), 3), 1, (3, 3, 3), 3)
    assert topologies_of(labels)[1].parts == 1


def test_islands_go_and_the_largest_parts_stay() -> None:
    labels = cube(cube(cube(empty(), 3, (0, 0, 0), 6), 3, (10, 0, 0), 5), 3, (10, 10, 0), 2)
    (changes,) = changes_to(labels, {3: Topology(1, True)}).values()
    # 216, 125 and 8 voxels: the second is more than 0.3 of the first and may be torn off it.
    assert changes.islands.sum() == 8
    assert not changes.holes.any()
    assert changes_to(cube(labels, 0, (10, 0, 0), 5), {3: Topology(2, True)}) == {}


def test_two_parts_wanted_two_found() -> None:
    labels = cube(cube(empty(), 3, (0, 0, 0), 6), 3, (10, 10, 0), 2)
    assert changes_to(labels, {3: Topology(2, True)}) == {}
    assert changes_to(labels, {}) == {}


def test_holes_are_filled_where_the_atlas_is_solid() -> None:
    labels = cube(cube(empty(), 1, (2, 2, 2), 7), 0, (4, 4, 4), 2)
    change = changes_to(labels, {1: Topology(1, True)})[1]
    assert change.holes.sum() == 8
    assert changes_to(labels, {1: Topology(1, False)}) == {}


def test_the_place_of_another_structure_is_no_hole() -> None:
    """A heart's muscle around its blood, and a voxel of background between the two."""
    labels = cube(cube(cube(empty(), 1, (2, 2, 2), 7), 0, (4, 4, 4), 3), 2, (4, 4, 4), 2)
    assert changes_to(labels, {1: Topology(1, True), 2: Topology(1, True)}) == {}


class _WithIslands:
    """Answers with the prompt, an island far off, and a hole in the middle."""

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
            middle = np.argwhere(values >= 0.5).mean(axis=0).astype(int)
            values[tuple(middle)] = 0
            values[0, number, 0] = 1
            maps[number] = LocalMap.from_full(values)
        return maps


@pytest.mark.parametrize("wanted", [True, False])
def test_results_have_the_topology_of_the_atlas(wanted: bool) -> None:
    grid = straight_grid()
    context = Atlas(ATLAS.scan(grid), ATLAS.labels(grid), STRUCTURES)
    overrides = [
        *UNREGISTERED,
        "fusion.gate=paper",
        "fusion.start=0",
        "fusion.iterations=0",
        f"topology={str(wanted).lower()}",
    ]
    result = segment(context, QUERY.scan(grid), with_overrides(Settings(), overrides), model=_WithIslands())
    assert result.model_labels is not None
    assert result.model_labels.data[0].any()  # what the model says is told as it is
    assert result.labels.data[0].any() == (not wanted)
    for value, maps in result.probabilities.items():
        mask = maps.fused.to_full(grid.shape) >= 0.5
        found = result.labels.data == value
        assert ndimage.label(found)[1] == (1 if wanted else 2)
        assert topologies_of(found.astype(np.uint8))[1].is_solid == wanted
        assert (mask == found).all()
