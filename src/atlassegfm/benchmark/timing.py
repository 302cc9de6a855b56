"""Seconds and parameters of each stage on scans of a given size: the paper's Table 5."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from .. import demo
from ..atlas import Atlas
from ..context import Context
from ..core.dataset import load_dataset, pick_structures
from ..core.errors import InputError
from ..core.geometry import Grid
from ..core.image import Volume, load_image
from ..core.parallel import peak_memory_mb, reset_peak_memory
from ..models.table import load_chosen
from ..result import Segmentation
from ..segment import segment
from ..settings import Settings
from ..transforms.resample import resample
from .pairs import restricted


@dataclass(frozen=True)
class Stage:
    """One stage of a job, or a part of it ("registration: affine"): median wall time, number of fitted parameters."""

    name: str
    seconds: float
    parameters: int | None = None


@dataclass(frozen=True)
class Timing:
    """Cost of a job: device, largest memory of a run, stages in order and their sum "all"."""

    device: str
    peak_memory_mb: int | None
    stages: tuple[Stage, ...]


def scans_for(folder: Path | None, shape: tuple[int, int, int], labels: Sequence[str]) -> tuple[Atlas, Volume]:
    """Load an atlas and a query, and resample each over its own field of view to ``shape`` voxels (RAS-canonical).

    The folder is a dataset in nnU-Net raw layout, whose first two cases are taken; None for the embedded pair.
    Structures are those of ``labels``, or all. InputError if the dataset cannot be used or has fewer than two cases.
    """
    if folder is None:
        full = Atlas.from_files(demo.PAIR / demo.ATLAS, demo.PAIR / demo.LABELS)
        query = load_image(demo.PAIR / demo.QUERY)
    else:
        dataset = load_dataset(folder)
        if len(dataset.cases) < 2:
            raise InputError(f"{folder}: has one case; expected at least two")
        case, other = dataset.cases[:2]
        values = pick_structures(dataset, labels or ["*"])
        full = restricted(Atlas.from_files(case.image, case.labels), values, case.labels)
        query = load_image(other.image)
    image, resized = _resized(full.image, shape, order=1), _resized(full.labels, shape, order=0)
    return Atlas.from_volumes(image, resized, full.structures), _resized(query.canonical(), shape, order=1)


def measure(
    atlas: Atlas,
    query: Volume,
    settings: Settings,
    *,
    device: str,
    rounds: int,
    on_stage: Callable[[str], None] | None = None,
) -> Timing:
    """Time the same job several times; the first round of several is a warm-up and does not count."""
    model = load_chosen(settings, device)
    results: list[Segmentation] = []
    reset_peak_memory()
    for number in range(rounds + (rounds > 1)):
        result = segment(Context(atlas, settings), query, device=device, on_stage=on_stage, model=model)
        if number or rounds == 1:
            results.append(result)
    peak = peak_memory_mb()
    total = Stage("all", median(sum(one.seconds.values()) for one in results))
    return Timing(device, peak, (*_stages(results), total))


def _stages(results: Sequence[Segmentation]) -> Iterator[Stage]:
    last = results[-1]
    for name in last.seconds:
        fitted = last.gate.parameter_count if name == "gate" and last.gate is not None else None
        yield Stage(name, median(one.seconds[name] for one in results), fitted)
        for part in last.registration.seconds if name == "registration" else ():
            seconds = median(one.registration.seconds[part] for one in results)
            yield Stage(f"registration: {part}", seconds, last.registration.parameter_count.get(part))


def _resized(volume: Volume, shape: tuple[int, int, int], *, order: int) -> Volume:
    """Resample to another number of voxels over the same field of view."""
    grid = volume.grid
    factor = np.array(grid.shape) / shape
    affine = grid.affine @ np.diag([*factor, 1.0])
    affine[:3, 3] = grid.voxel_to_world(factor / 2 - 0.5)
    onto = Grid(shape, affine)
    return Volume(resample(volume, onto, order=order), onto)
