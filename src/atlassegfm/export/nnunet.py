"""Results as a training set of nnU-Net, in raw layout.

::

    Dataset101_Liver/
        dataset.json
        imagesTr/CASE_0000.nii.gz
        labelsTr/CASE.nii.gz
        export.csv                     what was taken of each case, what is ignored, and why

The atlases come first: their labels are the ones a person drew. Labels count from 1 in the order of their values in the
results; the last one is nnU-Net's "ignore" where something is to be ignored.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atlas import Atlas, is_same_scan
from ..core.errors import InputError
from ..core.files import output_folder, replaced_folder, write_json
from ..core.geometry import Grid
from ..core.image import Volume, save_volume, smallest_label_type
from ..core.labels import Structure, listed
from ..core.text import counted
from .results import Found, Result, none_left, structures_of_all, told
from .training import TrainingLabels, UsedStructure, training_labels

_DATASET_NAME = re.compile(r"Dataset(\d{3})_[0-9A-Za-z_-]+")
_CHANNEL = "_0000"
MANIFEST = "export.csv"
#: Names that nnU-Net reserves.
_RESERVED = ("background", "ignore")
#: Cosine between voxel axes from which on nnU-Net's reader, ITK, refuses a file.
_MOST_SKEW = 5e-4
_COLUMNS = ("case", "from", "structure", "use", "reason", "verdict", "estimated_dice", "voxels", "margin_mm", "ignored")


@dataclass
class TrainingSet:
    """What was written, and what was not."""

    folder: Path
    labels: dict[str, int]  # "background" is 0; "ignore" the last, where something is ignored
    left_out: dict[str, str]  # why, by name of the result
    channel: str
    atlases: list[str] = field(default_factory=list)  # names of training cases
    cases: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of export.csv

    def counts(self) -> dict[str, Counter[str]]:
        """Count the results by structure and use."""
        found = {name: Counter[str]() for name in self.labels if name not in _RESERVED}
        for row in self.rows:
            if row.get("from") == "result":
                found[row["structure"]][row["use"]] += 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        shown = {name: getattr(self, name) for name in ("labels", "channel", "atlases", "cases", "left_out")}
        return {
            "folder": str(self.folder),
            **shown,
            "structures": {name: {**one} for name, one in self.counts().items()},
        }

    def lines(self) -> list[str]:
        """Describe it for people."""
        count = f"{counted(len(self.cases), 'case')} and {counted(len(self.atlases), 'atlas', 'atlases')}"
        of_cases = [f"{one['label']} labelled, {one['ignore']} ignored" for one in self.counts().values()]
        width = max(map(len, self.counts()))
        return [
            f"{count} -> {self.folder}  ({len(self.left_out)} left out; channel {self.channel})",
            *(f"  {name:<{width}}  {text}" for name, text in zip(self.counts(), of_cases, strict=True)),
            f"why: {self.folder / MANIFEST}",
        ]


def check_dataset(folder: Path) -> None:
    """Check that a dataset of this name can be made: nnU-Net's form, and a number that no other one there has."""
    match = _DATASET_NAME.fullmatch(folder.name)
    if match is None:
        raise InputError(f"{folder}: no name of an nnU-Net dataset; expected DatasetNNN_NAME, such as Dataset101_Liver")
    if folder.exists():
        raise InputError(f"{folder}: exists already and is not replaced; choose another number, or move it away")
    if others := sorted(folder.parent.glob(f"Dataset{match[1]}_*")):
        raise InputError(f"{folder}: {others[0].name} has the number {match[1]} too; choose another one")


def write_nnunet(
    found: Found,
    folder: Path,
    atlases: Sequence[Atlas] = (),
    *,
    channel: str,
    on_case: Callable[[int, int, str], None] = lambda *_: None,
) -> TrainingSet:
    """Write results, and the atlases they were made with, as a training set; whole or not at all.

    ``channel`` is what the scans are: nnU-Net normalises "CT" in its own way, and all others alike. ``on_case`` is
    called with number, count and name before each case. InputError if the folder exists or cannot be written, names
    clash, an atlas has other structures, or no result is left.
    """
    check_dataset(folder)
    structures = structures_of_all(found.results)
    names = _case_names(found.results, len(atlases))
    done = TrainingSet(folder, _labels(structures), dict(found.left_out), channel)
    with output_folder(folder.parent), replaced_folder(folder, frozenset()) as new:
        files, whole = _Files(new, structures, done.labels), []
        for number, atlas in enumerate(atlases, start=1):
            name = _atlas_name(number)
            if missing := [one.name for one in atlas.structures if one.value not in atlas.present]:
                # A further atlas may lack structures because nobody drew them.
                done.left_out[name] = f"no voxel of {listed(missing)}, which may not have been drawn"
                continue
            whole.append(atlas)
            files.write(name, atlas.image, _atlas_labels(atlas, done.labels))
            done.atlases.append(name)
            done.rows += [{"case": name, "from": "atlas", **asdict(one)} for one in _atlas_uses(atlas)]
        for number, result in enumerate(found.results, start=1):
            on_case(number, len(found.results), result.name)
            try:
                scan, case = _training_case(result, structures, done.labels, whole)
            except InputError as error:
                done.left_out[result.name] = told(error)
                continue
            name = names[result.name]
            files.write(name, scan, case.data)
            done.cases.append(name)
            shared = {"case": name, "from": "result", "ignored": case.ignored}
            done.rows += [{**shared, **asdict(one)} for one in case.structures]
        if not done.cases:
            raise none_left(folder, done.left_out)
        if not any(row.get("ignored") for row in done.rows):
            del done.labels["ignore"]
        files.describe(done)
    return done


@dataclass(frozen=True)
class _Files:
    """Files of a dataset in a new folder."""

    folder: Path
    structures: Sequence[Structure]
    labels: Mapping[str, int]  # of the training set, by name

    def write(self, name: str, image: Volume, labels: NDArray[Any]) -> None:
        """Write scan and label map of a case."""
        images, label_maps = self.folder / "imagesTr", self.folder / "labelsTr"
        for part in (images, label_maps):
            part.mkdir(exist_ok=True)
        # Geometry as it counts here, not the source's header: ITK, which nnU-Net reads with, has other rules.
        save_volume(Volume(_stored(image.data), image.grid), images / f"{name}{_CHANNEL}.nii.gz")
        named = [replace(one, value=self.labels[one.name]) for one in self.structures]
        save_volume(Volume(labels, image.grid), label_maps / f"{name}.nii.gz", structures=named)

    def describe(self, done: TrainingSet) -> None:
        """Write ``dataset.json`` and what was taken of each case."""
        count = len(done.atlases) + len(done.cases)
        content = {"name": done.folder.name, "channel_names": {"0": done.channel}, "labels": done.labels}
        write_json(self.folder / "dataset.json", {**content, "numTraining": count, "file_ending": ".nii.gz"})
        left_out = [{"case": name, "use": "left out", "reason": why} for name, why in sorted(done.left_out.items())]
        with (self.folder / MANIFEST).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, _COLUMNS, restval="")
            table.writeheader()
            table.writerows([*done.rows, *left_out])


def _training_case(
    result: Result, structures: Sequence[Structure], labels: Mapping[str, int], atlases: Sequence[Atlas]
) -> tuple[Volume, TrainingLabels]:
    """Read scan and label map of a training case; InputError if the result cannot be one."""
    if lacking := {one.name for one in structures} - {one.name for one in result.structures}:
        what = listed(sorted(lacking))
        raise InputError(f"it was segmented without {what}, which would be background; segment it again")
    scan, label_map = result.read()
    _check_axes(scan.grid)
    if any(is_same_scan(one.image, scan.canonical()) for one in atlases):
        raise InputError("it is the scan of an atlas, whose own labels are taken")
    numbers = {one.value: labels[one.name] for one in structures}
    return scan, training_labels(result.run, label_map, result.read_opinions(scan), numbers)


def _labels(structures: Sequence[Structure]) -> dict[str, int]:
    """Labels of the training set by name; InputError if nnU-Net reserves a name, or two structures have one."""
    names = ["background", *(one.name for one in structures), "ignore"]
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"structures: the name {doubled[0]!r} is given twice or reserved by nnU-Net; rename it")
    return {name: number for number, name in enumerate(names)}


def _case_names(results: Sequence[Result], atlases: int) -> dict[str, str]:
    """Names of training cases by name of the result; InputError if two are the same on some file system."""
    names = {one.name: one.name.removesuffix(_CHANNEL) for one in results}
    taken = {_atlas_name(number): "an atlas" for number in range(1, atlases + 1)}
    for result, name in names.items():
        if (other := taken.setdefault(name.casefold(), result)) != result:
            raise InputError(f"{result}: its training case would have the name of that of {other}; rename one folder")
    return names


def _atlas_name(number: int) -> str:
    return "atlas" if number == 1 else f"atlas-{number}"


def _atlas_labels(atlas: Atlas, labels: Mapping[str, int]) -> NDArray[Any]:
    """Label map of an atlas with the labels of the training set."""
    names = {name for name, label in labels.items() if name not in _RESERVED}
    if names != set(atlas.names):
        both = f"{listed(sorted(atlas.names))}, the results {listed(sorted(names))}"
        raise InputError(f"the atlas has the structures {both}; give the atlas that they were made with")
    table = np.array([0, *(labels[name] for name in atlas.names)], smallest_label_type(labels["ignore"]))
    return np.asarray(table[atlas.numbered.data])


def _atlas_uses(atlas: Atlas) -> Iterator[UsedStructure]:
    for one in atlas.structures:
        voxels = int((atlas.labels.data == one.value).sum())
        yield UsedStructure(one.name, "label", "drawn by a person", voxels=voxels)


def _check_axes(grid: Grid) -> None:
    """Refuse voxel axes that are not at right angles: the files could not be read in nnU-Net."""
    axes = grid.affine[:3, :3] / grid.spacing_mm
    if np.abs(axes.T @ axes - np.eye(3)).max() > _MOST_SKEW:
        raise InputError("its voxel axes are not at right angles, which nnU-Net cannot read; resample the scan")


def _stored(data: NDArray[np.float32]) -> NDArray[Any]:
    """Intensities as 16-bit whole numbers where nothing is lost by that: files of half the size."""
    limits = np.iinfo(np.int16)
    if data.min() < limits.min or data.max() > limits.max:
        return data
    whole = data.astype(np.int16)
    return whole if np.array_equal(whole, data) else data
