"""Folders of labelled scans in nnU-Net raw layout: which cases there are and where their files lie.

::

    Dataset002_AbdCT/
        dataset.json
        imagesTr/abdct_003_0000.nii.gz      the case, and its channel as four digits
        labelsTr/abdct_003.nii.gz

Only paths are read here, no images. Whatever could drop a case silently is an error: a mean over the other cases would
look like the result of the whole dataset.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import PathLike, entries_of
from .image import IMAGE_SUFFIXES, image_stem, image_suffix
from .labels import hint, listed, pick_values, shortened

_LAYOUT = "nnU-Net raw layout (dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz)"
#: Name of voxels nobody annotated: documentation/ignore_label.md of nnU-Net.
_IGNORE = "ignore"


@dataclass(frozen=True)
class Case:
    """One labelled scan of a dataset: its name ("abdct_003"), one channel of the image, and its label map."""

    name: str
    image: Path
    labels: Path


@dataclass(frozen=True)
class Dataset:
    """Labelled scans of one kind."""

    folder: Path  # where dataset.json lies
    name: str  # of that folder
    cases: tuple[Case, ...]  # at least one, sorted by name
    structures: Mapping[int, str]  # name of each label value in ascending order, without background and "ignore"
    channels: tuple[str, ...]  # name of each channel of the scans ("CT", "T2")
    ignored: int | None = None  # label value of voxels that nobody annotated; None where there is none

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if not names or names != sorted(set(names)):
            raise ValueError("there are no cases, or they are not sorted, or some are doubled; use load_dataset")

    def case(self, name: str) -> Case:
        """Get the case of that name; InputError if there is none."""
        cases = {case.name: case for case in self.cases}
        if name not in cases:
            raise InputError(f"{self.folder}: no case {name!r}; {hint(name, cases)}expected one of {listed([*cases])}")
        return cases[name]

    def select(self, names: Sequence[str]) -> Dataset:
        """Select cases of the dataset; InputError if there is none, an unknown one, or one twice."""
        if not names:
            raise InputError(f"{self.folder}: no case is named; expected at least one")
        if doubled := _doubled(names):
            raise InputError(f"{self.folder}: case {doubled[0]!r} is named more than once; name each case once")
        return replace(self, cases=tuple(self.case(name) for name in sorted(names)))


def load_dataset(folder: PathLike, *, channel: int = 0) -> Dataset:
    """Find the cases of a dataset in nnU-Net raw layout, with one channel, counted from 0, of each scan.

    If ``dataset.json`` in the folder has a table "dataset", the cases are those it lists; if not, those of ``imagesTr``
    and ``labelsTr``. Hidden files do not count. InputError if there is no such dataset, ``dataset.json`` cannot be
    used, an image has no labels or the other way round, or there are other cases than ``dataset.json`` says.
    """
    folder = Path(folder)
    path = folder / "dataset.json"
    content = _read_json(folder, path)
    ending = _file_ending(content, path)
    structures, ignored = _structures(content, path)
    channels = _channels(content, path)
    if not 0 <= channel < len(channels):
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(channels))
        raise InputError(f"{path}: no channel {channel}; expected one of {known}")
    if "dataset" in content:
        place, cases = 'its "dataset"', _listed_cases(content["dataset"], path, channel)
    else:
        place, cases = "labelsTr", _found_cases(folder, ending, channel)
    _check_complete(content, path, [case.name for case in cases], place)
    # "." has no name of its own, and a link to a folder goes by the name of the link.
    name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    return Dataset(folder, name, tuple(cases), structures, channels, ignored)


def annotated_scans(folder: PathLike) -> tuple[Case, ...]:
    """Find the annotated scans of a folder: a dataset in nnU-Net raw layout, or ``images`` and ``labels`` inside it.

    In the latter two, files of one name without suffix belong together. InputError if there is neither, or a file has
    no counterpart.
    """
    folder = Path(folder)
    images, labels = folder / "images", folder / "labels"
    if not (images.is_dir() and labels.is_dir()):
        if folder.is_dir() and not (folder / "dataset.json").exists():
            raise InputError(f"{folder}: expected a dataset in {_LAYOUT}, or the folders images and labels inside it")
        return load_dataset(folder).cases
    found = [
        {image_stem(path): path for path in entries_of(one) if image_suffix(path) is not None or path.is_dir()}
        for one in (images, labels)
    ]
    if alone := sorted(found[0].keys() ^ found[1].keys()):
        raise InputError(f"{folder}: {listed(alone)} in only one of images and labels; expected files of equal names")
    if not found[0]:
        raise InputError(f"{images}: no scan; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return tuple(Case(name, found[0][name], found[1][name]) for name in sorted(found[0]))


def pick_structures(dataset: Dataset, wanted: Sequence[str]) -> tuple[int, ...]:
    """Find the label values, ascending, of the structures a user asks for; InputError if one of them fits none.

    Each of ``wanted``, at least one, is a label value ("6"), a name ("Left kidney", the same as "left_kidney") or a
    shell pattern (``*kidney*``; ``*`` is every structure).
    """
    path = dataset.folder / "dataset.json"
    if not wanted:
        raise InputError(f"{path}: no structure is named; expected at least one, or '*' for all")
    return pick_values(dataset.structures, wanted, f"{path}: ")


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; expected the folder of a dataset in {_LAYOUT}")
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob("*/dataset.json"))
        hint = f": give one of the datasets inside it, {listed(inside)}" if inside else ""
        raise InputError(f"{folder}: no dataset.json; expected a dataset in {_LAYOUT}{hint}")

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Python would keep the last of several equal keys: a case or a label would be gone.
        if doubled := _doubled(key for key, _ in pairs):
            raise InputError(f"{path}: {doubled[0]!r} is there twice; expected each key once: rename or remove one")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_doubles)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}); correct it") from None
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: not readable as text; expected JSON: check the file and its permissions") from None
    if not isinstance(content, dict):
        raise InputError(f'{path}: found a {type(content).__name__}; expected an object with "labels" and more')
    return content


def _file_ending(content: Mapping[str, Any], path: Path) -> str:
    ending = content.get("file_ending")
    if not isinstance(ending, str) or ending.lower() not in IMAGE_SUFFIXES:
        found = f'"file_ending" is {ending!r}' if "file_ending" in content else 'no "file_ending"'
        raise InputError(f"{path}: {found}; expected the ending of all images, one of {', '.join(IMAGE_SUFFIXES)}")
    return ending


def _structures(content: Mapping[str, Any], path: Path) -> tuple[dict[int, str], int | None]:
    """Name of each label value, and the value of "ignore"."""
    table = content.get("labels")
    if not isinstance(table, dict):
        example = '{"background": 0, "liver": 1}'
        raise InputError(f'{path}: no "labels"; add the label value of each name, such as {example}')
    structures: dict[int, str] = {}
    for key, item in table.items():
        if isinstance(item, list):
            raise InputError(f"{path}: label {key!r} is a region, {item}; expected one label value for each name")
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            value, name = item, key
        elif isinstance(item, str) and key.isdecimal():
            value, name = int(key), item  # Medical Decathlon and nnU-Net before its version 2
        else:
            raise InputError(f'{path}: label {key!r} is {item!r}; expected "name": value, a whole number of at least 0')
        if value in structures:
            both = f"{structures[value]!r} and {name!r}"
            raise InputError(f"{path}: {both} both have the label value {value}; correct one")
        structures[value] = name
    kept = {value: structures[value] for value in sorted(structures) if value and structures[value] != _IGNORE}
    if not kept:
        raise InputError(f'{path}: "labels" has no structure; expected at least one besides background')
    return kept, next((value for value, name in structures.items() if name == _IGNORE and value), None)


def _channels(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    # nnU-Net before its version 2 says "modality". One of them is required there, but nothing here needs the name.
    key = "channel_names" if "channel_names" in content else "modality"
    table = content.get(key, {"0": "0"})
    numbers = [str(number) for number in range(len(table))] if isinstance(table, dict) else []
    if not numbers or sorted(table) != sorted(numbers):
        example = '{"0": "CT"}'
        raise InputError(f'{path}: "{key}" is {table!r}; expected a name for each channel from 0, such as {example}')
    return tuple(str(table[number]) for number in numbers)


def _found_cases(folder: Path, ending: str, channel: int) -> list[Case]:
    """The cases of ``imagesTr`` and ``labelsTr``, sorted by name."""
    images, labels = folder / "imagesTr", folder / "labelsTr"
    image_files, label_files = _files(images, ending), _files(labels, ending)
    channels_of: dict[str, set[int]] = {}
    for stem in sorted(image_files):
        match = re.fullmatch(r"(.+)_([0-9]{4})", stem)
        if match is None:
            file = images / (stem + ending)
            raise InputError(f"{file}: the name has no channel; expected CASE_0000{ending}: rename it")
        channels_of.setdefault(match[1], set()).add(int(match[2]))
    if unlabelled := sorted(channels_of.keys() - label_files):
        found = _with_other_endings(labels, unlabelled, unlabelled, ending)
        raise InputError(
            f"{labels}: no labels for {len(unlabelled)} of {len(channels_of)} scans in imagesTr: {found}; "
            f"expected CASE{ending} for each: add the labels or take the scans out"
        )
    if missing := sorted(name for name in label_files if channel not in channels_of.get(name, ())):
        found = _with_other_endings(images, missing, [f"{name}_{channel:04}" for name in missing], ending)
        raise InputError(
            f"{images}: no image for {len(missing)} of {len(label_files)} label maps in labelsTr: {found}; "
            f"expected CASE_{channel:04}{ending} for each: add the images or take the labels out"
        )
    suffix = f"_{channel:04}{ending}"
    return [Case(name, images / f"{name}{suffix}", labels / f"{name}{ending}") for name in sorted(label_files)]


def _files(folder: Path, ending: str) -> set[str]:
    """Names of the files with that ending, without it; there is at least one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a dataset in {_LAYOUT}")
    names = _names_in(folder)
    stems = {name.removesuffix(ending) for name in names if name.endswith(ending)}
    if not stems:
        others = [name for name in names if image_suffix(Path(name)) is not None]
        found = f"there is {listed(others, 3)}: correct file_ending in dataset.json" if others else "add the files"
        raise InputError(f"{folder}: no file ends in {ending}; {found}")
    return stems


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in entries_of(folder) if path.is_file()]


def _with_other_endings(folder: Path, cases: Sequence[str], stems: Sequence[str], ending: str) -> str:
    """Cases for a message, each with the file ``stem`` that it has under another ending than ``ending``."""
    others = [name for name in _names_in(folder) if image_suffix(Path(name)) and not name.endswith(ending)]
    found = {image_stem(Path(name)): name for name in others}
    pairs = zip(cases, stems, strict=True)
    return listed([f"{case} (only {found[stem]})" if stem in found else case for case, stem in pairs])


def _listed_cases(table: Any, path: Path, channel: int) -> list[Case]:
    """The cases of the table "dataset", sorted by name; paths are relative to the folder and may leave it."""
    form = 'expected {"CASE": {"images": [a path for each channel], "label": a path}}'
    if not isinstance(table, dict) or not table:
        raise InputError(f'{path}: "dataset" is {shortened(repr(table), 80)}; {form}')
    cases = []
    for name in sorted(table):
        entry = table[name] if isinstance(table[name], dict) else {}
        images, labels = entry.get("images"), entry.get("label")
        if not (isinstance(labels, str) and isinstance(images, list) and all(isinstance(one, str) for one in images)):
            raise InputError(f'{path}: case {name!r} of "dataset" is {shortened(repr(table[name]), 80)}; {form}')
        if channel >= len(images):
            found = f'case {name!r} of "dataset" has {len(images)} images'
            raise InputError(f"{path}: {found}, none for channel {channel}; add it")
        cases.append(Case(name, path.parent / images[channel], path.parent / labels))
    if absent := [str(file) for case in cases for file in (case.image, case.labels) if not file.is_file()]:
        found = f'{len(absent)} of the files that "dataset" lists do not exist: {listed(absent, 3)}'
        raise InputError(f"{path}: {found}; correct the paths, which are relative to the dataset's folder")
    return cases


def _check_complete(content: Mapping[str, Any], path: Path, found: Sequence[str], place: str) -> None:
    """Compare the cases found with the number and the list that dataset.json may have."""
    training = content.get("training", [])
    names = []
    for entry in training if isinstance(training, list) else [training]:
        file = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(file, str):
            form = '{"image": a path, "label": a path}'
            raise InputError(f'{path}: "training" has {shortened(repr(entry), 80)}; expected {form}')
        names.append(image_stem(Path(file)))
    if doubled := _doubled(names):
        raise InputError(f'{path}: "training" lists {len(doubled)} cases twice: {listed(doubled)}; list each once')
    if absent := sorted(set(names) - set(found)):
        unknown = f"{len(absent)} are not in {place}: {listed(absent)}"
        raise InputError(f'{path}: "training" lists {len(names)} cases, of which {unknown}; add the files or drop them')
    number = content.get("numTraining", len(found))
    if type(number) is not int or number != len(found):
        counts = f"{number!r} training cases, found {len(found)} in {place}"
        raise InputError(f"{path}: dataset.json says {counts}; add the missing files, or correct numTraining")


def _doubled(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
