"""One structure drawn with prompts on a scan: points, boxes, scribbles, lassos, and the way back.

Arrays have the axes of the client. Where the case is known, the first prompt on an empty mask takes the structure that
the atlas found there; else a model answers the prompt alone. From then on a point corrects the mask as a click does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError
from ...core.image import Volume
from ...core.mask import LocalMap, mean_of
from ...models.base import Segmenter
from ...prompts import INSIDE, BoxPrompt, ClickPrompt, MaskPrompt, Prompt, PromptKind, largest_component
from ..clicks import Click, Mask, answer
from ..edits import Change
from .models import Chosen

#: First and one past the last voxel along each axis.
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
_KINDS: Mapping[type[Any], PromptKind] = {ClickPrompt: "click", BoxPrompt: "box", MaskPrompt: "mask"}
#: Prompts that can be taken back, and points that a scribble is worked through with.
_MOST_STEPS, _MOST_POINTS = 50, 4
#: Overlap of a box or a lasso with a structure from which on it means that structure.
_MEANT = 0.5


@dataclass(frozen=True)
class _Step:
    change: Change | None
    clicks: tuple[Click, ...]


@dataclass
class Canvas:
    """A scan, its mask, and what is known of it: label arrays on the same axes, the best first.

    Corrections are answered by ``model``, and so are first prompts of a kind that no chosen model takes.
    """

    scan: Volume
    model: Segmenter
    known: Sequence[NDArray[Any]] = ()
    chosen: Chosen = field(default_factory=Chosen)
    mask: Mask = field(init=False)
    clicks: tuple[Click, ...] = ()
    _steps: list[_Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew with an empty mask."""
        self.seed(np.zeros(self.scan.grid.shape, bool))

    def seed(self, mask: Mask) -> None:
        """Begin anew with a mask."""
        self.mask, self.clicks = mask.copy(), ()
        self._steps.clear()

    def point(self, ijk: tuple[int, int, int], positive: bool) -> Box | None:
        """Say that a voxel belongs to the structure, or not."""
        click = Click(ijk, positive)
        if self.mask.any():
            patch = answer(self.model, self.scan, self.mask, click, self.clicks)
            new = self.mask.copy()
            new[_slices(patch.start, patch.mask.shape)] = patch.mask
        elif positive:
            start = self._known_at(np.array([ijk]))
            new = self._predict(ClickPrompt(ijk)) if start is None else start
            new[ijk] = True
        else:
            new = self.mask
        return self._put(new, (*self.clicks, click))

    def box(self, start: tuple[int, int, int], stop: tuple[int, int, int], positive: bool) -> Box | None:
        """Say that the structure fills a box, which may be one slice, or that the box has nothing of it."""
        region = np.zeros(self.mask.shape, bool)
        region[tuple(map(slice, start, stop))] = True
        if not positive:
            return self._put(self.mask & ~region)
        found = None if self.mask.any() else self._known_like(region, as_box=True)
        if found is None:
            flat = [axis for axis in range(3) if stop[axis] - start[axis] == 1]
            if flat:
                found = self._predict(BoxPrompt(start, stop, across=flat[-1]))
            else:
                found = self._predict(MaskPrompt(_ellipsoid(start, stop))) & region
        return self._put(self.mask | found)

    def lasso(self, region: Mask, positive: bool) -> Box | None:
        """Say that the structure is what was drawn around on a slice, or that there is nothing of it."""
        if not region.any():
            return None
        if not positive:
            return self._put(self.mask & ~region)
        found = None if self.mask.any() else self._known_like(region, as_box=False)
        if found is None:
            voxels = np.argwhere(region)
            (a, b, c), (d, e, f) = voxels.min(axis=0).tolist(), (voxels.max(axis=0) + 1).tolist()
            start, stop = (a, b, c), (d, e, f)
            flat = [axis for axis in range(3) if stop[axis] - start[axis] == 1]
            if flat:
                found = self._predict(BoxPrompt(start, stop, across=flat[-1]))
            else:
                found = self._predict(MaskPrompt(LocalMap.from_full(region)))
            # On the slice that was drawn on, the drawing counts.
            drawn = tuple(
                slice(x, y) if axis in flat else slice(None)
                for axis, (x, y) in enumerate(zip(start, stop, strict=True))
            )
            found[drawn] = region[drawn]
        return self._put(self.mask | found)

    def scribble(self, region: Mask, positive: bool) -> Box | None:
        """Say that voxels belong to the structure, or do not; the mask follows them."""
        if not region.any():
            return None
        new, clicks = self.mask.copy(), self.clicks
        if positive and not new.any():
            start = self._known_at(np.argwhere(region))
            new = self._predict(ClickPrompt(_middle(region))) if start is None else start
        for _ in range(_MOST_POINTS):
            wrong = region & ~new if positive else region & new
            if not wrong.any():
                break
            click = Click(_middle(wrong), positive)
            patch = answer(self.model, self.scan, new, click, clicks)
            new[_slices(patch.start, patch.mask.shape)] = patch.mask
            clicks = (*clicks, click)
        new[region] = positive
        return self._put(new, clicks)

    def undo(self) -> tuple[bool, Box | None]:
        """Take the last prompt back; whether there was one, and what changed."""
        if not self._steps:
            return False, None
        step = self._steps.pop()
        self.clicks = step.clicks
        if step.change is None:
            return True, None
        step.change.reversed.apply(self.mask)
        return True, _box(step.change)

    def _put(self, new: Mask, clicks: tuple[Click, ...] | None = None) -> Box | None:
        change = Change.between((0, 0, 0), self.mask, new)
        self._steps.append(_Step(change, self.clicks))
        del self._steps[:-_MOST_STEPS]
        self.mask = np.ascontiguousarray(new)
        self.clicks = self.clicks if clicks is None else clicks
        return None if change is None else _box(change)

    def _predict(self, prompt: Prompt) -> Mask:
        try:
            found = self._ask(self.chosen.by_prompt.get(_KINDS[type(prompt)], self.model), prompt)
        except InputError:  # a box across the slices that the model reads
            found = self._ask(self.model, prompt)
        if not found.is_empty:
            found = mean_of([found, *(self._ask(one, MaskPrompt(found)) for one in self.chosen.followers)])
        inside: Mask = found.to_full(self.scan.grid.shape) >= INSIDE
        return inside

    def _ask(self, model: Segmenter, prompt: Prompt) -> LocalMap:
        return model.predict(model.encode(self.scan), {1: prompt})[1]

    def _known_at(self, voxels: NDArray[np.int64]) -> Mask | None:
        """The structure that most of these voxels are in; None if they are in none."""
        for labels in self.known:
            counts = np.bincount(labels[tuple(voxels.T)].ravel())
            number = int(counts.argmax())
            if number:
                return np.asarray(labels == number)
        return None

    def _known_like(self, region: Mask, *, as_box: bool) -> Mask | None:
        """The structure that a region outlines, or bounds, on its slices; None if none is like it."""
        voxels = np.argwhere(region)
        first, last = voxels.min(axis=0), voxels.max(axis=0) + 1
        flat = last - first == 1
        plane = tuple(slice(a, b) if thin else slice(None) for a, b, thin in zip(first, last, flat, strict=True))
        for labels in self.known:
            for number in np.unique(labels[region]).tolist():
                own = labels[plane] == number
                shown = _filled(own) if as_box else own
                common = np.count_nonzero(shown & region[plane])
                if number and common / np.count_nonzero(shown | region[plane]) >= _MEANT:
                    return np.asarray(labels == number)
        return None


def _filled(mask: Mask) -> Mask:
    """The bounding box of a mask, filled."""
    voxels = np.argwhere(mask)
    box: Mask = np.zeros(mask.shape, bool)
    box[tuple(map(slice, voxels.min(axis=0), voxels.max(axis=0) + 1))] = True
    return box


def _ellipsoid(start: Sequence[int], stop: Sequence[int]) -> LocalMap:
    """The ellipsoid that touches a box from inside."""
    sides = [np.linspace(-1, 1, 2 * (b - a) + 1)[1::2] ** 2 for a, b in zip(start, stop, strict=True)]
    inside = sides[0][:, None, None] + sides[1][None, :, None] + sides[2][None, None, :] <= 1
    return LocalMap((start[0], start[1], start[2]), inside.astype(np.float32))


def _middle(mask: Mask) -> tuple[int, int, int]:
    """The voxel of the largest part of a mask next to the middle of that part."""
    voxels = np.argwhere(largest_component(mask))
    i, j, k = voxels[((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist()
    return i, j, k


def _slices(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + n) for first, n in zip(start, shape, strict=True))


def _box(change: Change) -> Box:
    (a, b, c), (d, e, f) = change.start, change.shape
    return (a, a + d), (b, b + e), (c, c + f)
