"""Scans that show little of the atlas: a few slices along any axis, or a third of it, registered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from atlassegfm.atlas import Atlas
from atlassegfm.context import Context
from atlassegfm.core.image import Volume
from atlassegfm.jobs.work import warnings_on
from atlassegfm.segment import segment
from atlassegfm.settings import RegistrationSettings, Settings
from scenes import ATLAS, QUERY, STRUCTURES, straight_grid

GRID = straight_grid()
#: A slice along each axis that shows some of the structures.
SHOWN = {0: 31, 1: 26, 2: 16}


#: Linear stages alone, on few voxels.
LINEAR = replace(
    Settings().registration, coarse_voxels=6000, fine_voxels=12_000, linear_iterations=15, deformable=False
)


def part(volume: Volume, axis: int, start: int, count: int) -> Volume:
    first, last = np.zeros(3, int), np.array(GRID.shape)
    first[axis], last[axis] = start, start + count
    box = tuple(slice(*ends) for ends in zip(first, last, strict=True))
    return Volume(volume.data[box], volume.grid.crop(first, last))


@pytest.mark.parametrize(
    ("axis", "start", "count"),
    [(axis, SHOWN[axis] - count // 2, count) for axis in range(3) for count in (1, 3, 8)]
    + [(2, 0, 12), (2, 12, 12), (2, 24, 12), (0, 0, 16), (0, 32, 16)],
)
def test_parts_of_the_atlas(axis: int, start: int, count: int) -> None:
    check_part(axis, start, count, LINEAR)


@pytest.mark.slow
@pytest.mark.parametrize("axis", range(3))
def test_one_slice_by_default(axis: int) -> None:
    check_part(axis, SHOWN[axis], 1, Settings().registration)


def check_part(axis: int, start: int, count: int, registration: RegistrationSettings) -> None:
    """The structures that a part of the scan shows are found on it, and how much of each lies outside is told."""
    atlas = Atlas.from_volumes(ATLAS.scan(GRID), ATLAS.labels(GRID), STRUCTURES)
    context = Context(atlas, replace(Settings(), model="none", registration=registration))
    truth = part(QUERY.labels(GRID), axis, start, count)
    result = segment(context, part(QUERY.scan(GRID), axis, start, count))
    assert result.labels.grid.matches(truth.grid)
    whole = QUERY.labels(GRID).data
    for one in result.structures:
        found, true = result.labels.data == one.structure.value, truth.data == one.structure.value
        outside = 1 - true.sum() / np.count_nonzero(whole == one.structure.value)
        assert one.outside_fraction == pytest.approx(outside, abs=0.15)
        if outside < 0.85:
            assert one.status == "present"
        elif outside > 0.95:
            assert one.status == "outside"
            assert one.quality is not None
            assert one.quality.verdict != "good"
            assert f"{100 * one.outside_fraction:.0f}" in one.reason
        if one.status == "present" and one.outside_fraction >= 0.1:  # the volume is that of the part in view
            assert one.quality is not None
            assert f"{100 * one.outside_fraction:.0f} %" in one.quality.reason
        if one.status == "present" and true.sum() > 100:
            assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.8
        assert found.any() == (one.status == "present")
    missing = not any(one.status == "present" for one in result.structures)
    assert missing == any("no structure" in warning for warning in warnings_on(result))
