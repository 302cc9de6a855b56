"""Seconds and fitted numbers of each stage on scans of a given size: the paper's Table 5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .. import demo
from ..atlas import Atlas
from ..context import Context
from ..core.dataset import load_dataset, pick_structures
from ..core.errors import InputError
from ..core.geometry import Grid
from ..core.image import Volume, load_image
from ..core.parallel import peak_memory_mb, reset_peak_memory
from ..models.choice import load_chosen
from ..result import Segmentation
from ..segment import segment
from ..settings import Settings
from ..transforms.resample import resample
from .pairs import restricted


@dataclass(frozen=True)
class Stage:
    """One stage of the job.

    Parameters
    ----------
    name : str
        As ``run.json`` has it; parts of the registration begin with "registration: ".
    seconds : float
        Median wall time.
    parameters : int or None
        How many numbers are fitted in it; None where nothing is.
    """

    name: str
    seconds: float
    parameters: int | None


@dataclass(frozen=True)
class Timing:
    """What one job costs.

    Parameters
    ----------
    stages : tuple of Stage
        In order, the sum at the end.
    device : str
        Where it was computed.
    peak_memory_mb : int or None
        Largest memory of a run.
    """

    stages: tuple[Stage, ...]
    device: str
    peak_memory_mb: int | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "device": self.device,
            "peak_memory_mb": self.peak_memory_mb,
            "stages": [vars(one) for one in self.stages],
        }


def scans_for(folder: Path | None, shape: tuple[int, int, int], labels: Sequence[str]) -> tuple[Atlas, Volume]:
    """Load an atlas and a query, cases of a dataset or the embedded pair, and resample them to the given size.

    Parameters
    ----------
    folder : Path or None
        Dataset in nnU-Net raw layout, of which the first two cases are taken; None for the embedded pair.
    shape : tuple of int, (3,)
        Voxels of both in RAS-canonical order, over each one's own field of view.
    labels : sequence of str
        Structures to keep; all if empty.

    Raises
    ------
    InputError
        If the dataset cannot be used or has fewer than two cases.
    """
    if folder is None:
        context = Atlas.from_files(demo.PAIR / demo.ATLAS, demo.PAIR / demo.LABELS)
        query = load_image(demo.PAIR / demo.QUERY)
    else:
        dataset = load_dataset(folder)
        if len(dataset.cases) < 2:
            raise InputError(f"{folder}: has one case; expected at least two")
        atlas, other = dataset.cases[:2]
        values = pick_structures(dataset, labels or ["*"])
        context = restricted(Atlas.from_files(atlas.image, atlas.labels), values, atlas.labels)
        query = load_image(other.image)
    image = _resized(context.image, shape, order=1)
    labels_there = _resized(context.labels, shape, order=0)
    small = Volume(labels_there.data.astype(context.labels.data.dtype), labels_there.grid)
    return Atlas.from_volumes(image, small, context.structures), _resized(query.canonical(), shape, order=1)


def measure(
    atlas: Atlas,
    query: Volume,
    settings: Settings,
    *,
    device: str,
    rounds: int,
    on_stage: Callable[[str], None] | None = None,
) -> Timing:
    """Do the same job several times and take the median of each stage.

    The model is loaded before; the first round of several warms up and does not count.
    """
    model = load_chosen(settings, device)
    results: list[Segmentation] = []
    reset_peak_memory()
    for number in range(rounds + (rounds > 1)):
        result = segment(Context(atlas, settings), query, device=device, on_stage=on_stage, model=model)
        if number or rounds == 1:
            results.append(result)
    peak = peak_memory_mb()
    return Timing((*_stages(results), _total(results)), device, peak)


def _stages(results: Sequence[Segmentation]) -> list[Stage]:
    last = results[-1]
    stages = []
    for name in last.seconds:
        fitted = None
        if name == "gate" and last.gate is not None:
            fitted = last.gate.parameter_count
        stages.append(Stage(name, median(one.seconds[name] for one in results), fitted))
        if name == "registration":
            stages += [
                Stage(
                    f"registration: {part}",
                    median(one.registration.seconds[part] for one in results),
                    last.registration.parameter_count.get(part),
                )
                for part in last.registration.seconds
            ]
    return stages


def _total(results: Sequence[Segmentation]) -> Stage:
    return Stage("all", median(sum(one.seconds.values()) for one in results), None)


def _resized(volume: Volume, shape: tuple[int, int, int], *, order: int) -> Volume:
    """The same field of view with another number of voxels."""
    grid = volume.grid
    factor = np.array(grid.shape) / shape
    affine = np.eye(4)
    affine[:3, :3] = grid.affine[:3, :3] * factor
    affine[:3, 3] = grid.voxel_to_world(factor / 2 - 0.5)
    onto = Grid(shape, affine)
    return Volume(resample(volume, onto, order=order), onto)
