"""Structures of DICOM objects as a label map: selection, names and overlaps.

RTSTRUCT and SEG hold one mask a structure, a label map one value a voxel.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..core.config import load_toml
from ..core.errors import InputError
from ..core.geometry import Grid
from ..core.image import Volume, label_values, smallest_label_type
from ..core.labels import (
    LabelEntry,
    LabelTable,
    Structure,
    distinct_names,
    listed,
    match_rank,
    palette_color,
    plain_name,
    structures_of,
)
from .series import DicomSource, Series

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]
Box = tuple[slice, slice, slice]
#: Structures that share voxels are an error, or the first or last of the selection (else of the file) gets them.
Overlap = Literal["refuse", "first", "last"]
OVERLAPS: tuple[Overlap, ...] = ("refuse", "first", "last")
#: Label values are 1 to this (16 bits).
_LARGEST_LABEL = (1 << 16) - 1


@dataclass(frozen=True, eq=False)
class StructureMask:
    """One structure as a mask, (I, J, K), on a box of a grid that begins at voxel ``start``; size 0 if empty.

    Number (ROI or segment number), name and color (0 to 255) are those of the file.
    """

    number: int
    name: str
    color: Color | None
    start: tuple[int, int, int]
    mask: NDArray[np.bool_]

    @property
    def box(self) -> Box:
        """The box as slices into an array on the grid."""
        i, j, k = (slice(s, s + n) for s, n in zip(self.start, self.mask.shape, strict=True))
        return i, j, k


@dataclass(frozen=True)
class Selection:
    """Which structures of a file to read, and their names."""

    wanted: Sequence[str] = ()  # names, shell patterns or numbers, the first of which wins overlaps; empty for all
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)  # new name to names and patterns in files
    overlap: Overlap = "refuse"  # which structure gets shared voxels
    interpolate: bool = False  # fill single slices without contours between two with contours

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise InputError(f"unknown rule {self.overlap!r} for overlaps; expected one of {', '.join(OVERLAPS)}")

    def renamed(self, name: str) -> str:
        """Replace a name in a file by the one it is a synonym of, if any."""
        plain = plain_name(name)
        for new, others in self.synonyms.items():
            if plain == plain_name(new) or any(fnmatchcase(plain, plain_name(other)) for other in others):
                return new
        return name

    def select(self, found: Sequence[tuple[int, str, bool]], path: Path, content: str) -> tuple[list[int], list[str]]:
        """Find the positions of the wanted structures in ``found``, in their order, and give warnings.

        Each has number and name in the file, and whether it has ``content``; those without are left out. InputError if
        a wanted one is not there or has no content, two get one name by synonyms, or nothing is left.
        """
        names = [self.renamed(name) for _, name, _ in found]
        order: list[int] = []
        for one in self.wanted:
            fitting = [
                (rank, n)
                for n, (number, name, _) in enumerate(found)
                for known in (names[n], name)
                if (rank := match_rank(one, number, known)) is not None
            ]
            if not fitting:
                near = _near(one, [name for _, name, _ in found])
                raise InputError(f"{path}: no structure {one!r}; {near}: choose with --structures")
            best = min(rank for rank, _ in fitting)
            order += [n for rank, n in fitting if rank == best]
        order = list(dict.fromkeys(order)) if self.wanted else list(range(len(found)))
        seen: dict[str, int] = {}
        for n in order:
            other = seen.setdefault(plain_name(names[n]), n)
            if other != n and names[n] != found[n][1]:
                both = f"{found[other][1]!r} and {found[n][1]!r} are both {names[n]!r} by the synonyms"
                raise InputError(f"{path}: {both}; narrow them, or choose one with --structures")
        empty = [found[n][1] for n in order if not found[n][2]]
        if empty and self.wanted:
            raise InputError(f"{path}: {empty[0]!r} has no {content}; leave it out of --structures")
        if len(empty) == len(order):
            raise InputError(f"{path}: none of its {len(found)} structures has {content}; export it again")
        notes = [f"left out, as they have no {content}: {listed(empty)}"] if empty else []
        return [n for n in order if found[n][2]], notes


#: All structures, by their own names.
EVERYTHING = Selection()


def _near(wanted: str, names: Sequence[str]) -> str:
    by_plain = {plain_name(name): name for name in names}
    near = [by_plain[one] for one in difflib.get_close_matches(plain_name(wanted), by_plain, n=3, cutoff=0.4)]
    return f"the nearest are {listed(near)}" if near else f"there are {listed(sorted(names))}"


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a TOML table of names, as ``Brainstem = ["brain stem", "BrStem*"]``; else InputError."""
    found: dict[str, tuple[str, ...]] = {}
    owners: dict[str, str] = {}
    for name, others in load_toml(path, "names and their synonyms").items():
        others = [others] if isinstance(others, str) else others
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise InputError(f'{path}: {name} is {others!r}; expected a list of names, as Brainstem = ["brain stem"]')
        for other in map(plain_name, (name, *others)):
            if owners.setdefault(other, name) != name:
                raise InputError(f"{path}: {other!r} stands for both {owners[other]} and {name}; expected one of them")
        found[name] = tuple(others)
    return found


def merge(
    masks: Sequence[StructureMask], selection: Selection, on: Series | Grid, path: Path, notes: Sequence[str] = ()
) -> Volume:
    """Merge structures, in the order of the selection, into a label map; names, colours and notes are in its source.

    Values are their numbers; those that cannot be label values (0, repeated) are replaced by free ones. InputError if
    structures overlap and no rule was given, or one of them has no voxel.
    """
    grid, series = (on.grid, on) if isinstance(on, Series) else (on, None)
    masks, warnings = _renumber(masks)
    masks, renamed = _with_distinct_names(masks)
    warnings += renamed
    for one in masks:
        if not one.mask.any():
            raise InputError(f"{path}: {one.name!r} has no voxel on the scan; leave it out with --structures")
    data = np.zeros(grid.shape, smallest_label_type(max((one.number for one in masks), default=0)))
    names = {one.number: one.name for one in masks}
    pairs = []
    for one in masks:
        part = data[one.box]
        taken = one.mask & (part != 0)
        for value, count in zip(*(found.tolist() for found in np.unique(part[taken], return_counts=True)), strict=True):
            pairs.append(f"{names[value]} and {one.name} ({count} voxels)")
        part[one.mask & ~taken if selection.overlap == "first" else one.mask] = one.number
    if pairs and selection.overlap == "refuse":
        raise InputError(
            f"{path}: structures overlap: {listed(pairs, 6)}; choose some with --structures, or say with --overlap "
            "first or last which one gets shared voxels"
        )
    if pairs:
        warnings.append(f"overlapping voxels go to the {selection.overlap} structure: {listed(pairs, 6)}")
    if lost := [one.name for one in masks if not (data[one.box] == one.number).any()]:
        raise InputError(f"{path}: nothing is left of {listed(lost)}, as others lie over it; choose with --structures")
    table = {one.number: LabelEntry(one.name, one.color or palette_color(n)) for n, one in enumerate(masks)}
    return Volume(data, grid, DicomSource(path, None, table, (*notes, *warnings), series))


def _with_distinct_names(masks: Sequence[StructureMask]) -> tuple[list[StructureMask], list[str]]:
    names = distinct_names([one.name for one in masks])
    new = [name for name, one in zip(names, masks, strict=True) if name != one.name]
    notes = [f"several structures have one name; they are renamed to {listed(new, 6)}"] if new else []
    return [replace(one, name=name) for one, name in zip(masks, names, strict=True)], notes


def _renumber(masks: Sequence[StructureMask]) -> tuple[list[StructureMask], list[str]]:
    """Replace numbers that cannot be label values."""
    numbers: dict[int, StructureMask] = {}
    changed = []
    for one in masks:
        number = one.number
        if not 0 < number <= _LARGEST_LABEL or number in numbers:
            taken = numbers.keys() | {other.number for other in masks}
            number = next(n for n in range(1, _LARGEST_LABEL + 1) if n not in taken)
            changed.append(f"{one.name} ({one.number} to {number})")
        numbers[number] = replace(one, number=number)
    notes = [f"numbers that cannot be label values were changed: {listed(changed, 6)}"] if changed else []
    return list(numbers.values()), notes


def structures_in(volume: Volume) -> tuple[Structure, ...]:
    """Get the names and colours of a label map that was read from DICOM."""
    table = {} if volume.source is None else volume.source.label_table
    return structures_of(table, [table])


def with_structures(
    labels: Volume, tables: Sequence[LabelTable], selection: Selection, name: str
) -> tuple[Volume, tuple[Structure, ...]]:
    """Choose structures of a label map; the others become background, and equal names get a number.

    Tables of names are in order of precedence; ``name`` is the label map's. InputError if a wanted one is missing.
    """
    structures, data = structures_of(label_values(labels.data), tables), labels.data
    if selection != EVERYTHING:
        order, _ = selection.select([(one.value, one.name, True) for one in structures], Path(name), "voxels")
        chosen = [structures[n] for n in sorted(order)]
        structures = tuple(replace(one, name=selection.renamed(one.name)) for one in chosen)
        data = np.where(np.isin(data, [one.value for one in structures]), data, data.dtype.type(0))
    names = distinct_names([one.name for one in structures])
    for one, new in zip(structures, names, strict=True):
        if new != one.name:
            logger.warning("%s: several structures are called %s; the later is %s", name, one.name, new)
    structures = tuple(replace(one, name=new) for one, new in zip(structures, names, strict=True))
    return Volume(data, labels.grid, labels.source), structures
