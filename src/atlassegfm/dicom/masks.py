"""Structures as DICOM objects hold them, and as a label map does: names, selection, and what overlaps.

RTSTRUCT and SEG hold each structure as a mask of its own, a label map gives each voxel one value. Structures that share
voxels are refused unless the user says which one gets them.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.geometry import Grid
from ..core.image import Volume, smallest_label_type
from ..core.labels import LabelEntry, Structure, listed, match_rank, palette_color, plain_name
from .series import DicomSource, Series

#: "refuse": an error that names them. "first", "last": the first or the last of the selection, else of the file, wins.
Overlap = Literal["refuse", "first", "last"]
OVERLAPS: tuple[Overlap, ...] = ("refuse", "first", "last")
#: Structures named in a message of near names.
_NEAREST = 3


@dataclass(frozen=True, eq=False)
class StructureMask:
    """One structure as a mask on a box of a grid.

    Parameters
    ----------
    number : int
        As the file numbers it (ROI or segment number).
    name : str
        As the file names it.
    color : tuple of int, (3,), or None
        Red, green, blue, 0 to 255.
    start : tuple of int, (3,)
        First voxel of the box.
    mask : array, (I, J, K) bool
        Inside the box; of size 0 where nothing is marked.
    """

    number: int
    name: str
    color: tuple[int, int, int] | None
    start: tuple[int, int, int]
    mask: NDArray[np.bool_]

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The box as slices into an array on the grid."""
        i, j, k = (slice(s, s + n) for s, n in zip(self.start, self.mask.shape, strict=True))
        return i, j, k


@dataclass(frozen=True)
class Selection:
    """Which structures of a file are wanted, and what they are called.

    Parameters
    ----------
    wanted : sequence of str
        Names, shell patterns or numbers; all if empty. What comes first wins where the overlap is "first".
    synonyms : mapping of str to sequence of str
        The name wanted, and the names or patterns that files have for it.
    overlap : {"refuse", "first", "last"}
        What becomes of voxels of several structures.
    """

    wanted: Sequence[str] = ()
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    overlap: Overlap = "refuse"

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise InputError(f"unknown rule {self.overlap!r} for overlaps; expected one of {', '.join(OVERLAPS)}")

    def renamed(self, name: str) -> str:
        """The name wanted for a file's name: that whose synonyms it is, else itself."""
        plain = plain_name(name)
        for wanted, others in self.synonyms.items():
            if plain == plain_name(wanted) or any(fnmatchcase(plain, plain_name(other)) for other in others):
                return wanted
        return name

    def picked(self, found: Sequence[tuple[int, str]], path: Path) -> list[int]:
        """Positions in ``found`` (numbers and names of a file) of the structures wanted, in the order wanted.

        Raises
        ------
        InputError
            If one wanted is not there (the nearest names are listed), or two get one name by synonyms.
        """
        names = [self.renamed(name) for _, name in found]
        order: list[int] = []
        for one in self.wanted:
            ranks = {}
            for n, (number, name) in enumerate(found):
                fits = [rank for known in (names[n], name) if (rank := match_rank(one, number, known)) is not None]
                if fits:
                    ranks[n] = min(fits)
            if not ranks:
                raise InputError(
                    f"{path}: no structure {one!r}; {_near(one, [name for _, name in found])}: choose with --structures"
                )
            order += [n for n, rank in ranks.items() if rank == min(ranks.values()) and n not in order]
        order = order if self.wanted else list(range(len(found)))
        seen: dict[str, int] = {}
        for n in order:
            other = seen.setdefault(plain_name(names[n]), n)
            if other != n and names[n] != found[n][1]:
                raise InputError(
                    f"{path}: {found[other][1]!r} and {found[n][1]!r} are both {names[n]!r} by the synonyms; narrow "
                    "them, or choose one with --structures"
                )
        return order


#: All structures, by their own names.
EVERYTHING = Selection()


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a TOML table of names: ``Brainstem = ["brain stem", "BrStem*"]``.

    Raises
    ------
    InputError
        If the file is missing or no such table, or one name stands for two structures.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a TOML file of synonyms") from None
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: not readable as text; expected a TOML file of synonyms") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML ({error}); correct it") from None
    found: dict[str, tuple[str, ...]] = {}
    owners: dict[str, str] = {}
    for name, others in content.items():
        others = [others] if isinstance(others, str) else others
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise InputError(f'{path}: {name} is {others!r}; expected a list of names, as Brainstem = ["brain stem"]')
        for other in {plain_name(text) for text in (name, *others)}:
            if other in owners:
                raise InputError(f"{path}: {other!r} stands for both {owners[other]} and {name}; expected one of them")
            owners[other] = name
        found[name] = tuple(others)
    return found


def merge(
    masks: Sequence[StructureMask],
    selection: Selection,
    grid: Grid,
    path: Path,
    series: Series | None = None,
    notes: tuple[str, ...] = (),
) -> Volume:
    """Structures as one label map, their numbers as values.

    Parameters
    ----------
    masks : sequence of StructureMask
        In the order of the selection, with the names wanted.
    selection : Selection
        For the rule on overlaps.
    grid : Grid
        That the masks lie on.
    path : Path
        Of their file.
    series : Series, optional
        That they were drawn on.
    notes : tuple of str
        For the user.

    Returns
    -------
    Volume
        Names and colours are in its source. Numbers that are no label values (0, or twice the same) are replaced by
        the next free ones, and a note says so.

    Raises
    ------
    InputError
        If structures overlap and no rule was given, or one of them has no voxel.
    """
    masks, more = _numbered(masks)
    for one in masks:
        if not one.mask.any():
            raise InputError(
                f"{path}: the structure {one.name!r} has no voxel on the scan; leave it out with --structures"
            )
    largest = max((one.number for one in masks), default=0)
    data = np.zeros(grid.shape, smallest_label_type(largest))
    overlaps: dict[tuple[int, int], int] = {}
    by_number = {one.number: one for one in masks}
    for one in masks:
        part = data[one.box]
        taken = one.mask & (part != 0)
        if taken.any():
            values, counts = np.unique(part[taken], return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                overlaps[value, one.number] = count
        part[one.mask & ~taken if selection.overlap == "first" else one.mask] = one.number
    if overlaps:
        pairs = [f"{by_number[a].name} and {by_number[b].name} ({count} voxels)" for (a, b), count in overlaps.items()]
        if selection.overlap == "refuse":
            raise InputError(
                f"{path}: structures overlap, which a label map cannot hold: {listed(pairs, 6)}; choose structures "
                "with --structures, or say with --overlap first or last which one gets shared voxels"
            )
        more.append(f"overlapping voxels go to the {selection.overlap} structure: {listed(pairs, 6)}")
    lost = [one.name for one in masks if not (data[one.box] == one.number).any()]
    if lost:
        raise InputError(f"{path}: nothing is left of {listed(lost)}, as others lie over it; choose with --structures")
    table = {
        one.number: LabelEntry(one.name, one.color or palette_color(position)) for position, one in enumerate(masks)
    }
    return Volume(data, grid, DicomSource(path, None, table, (*notes, *more), series))


def label_numbers(labels: NDArray[Any], structures: Sequence[Structure]) -> NDArray[np.uint16]:
    """(I, J, K) position in ``structures`` from 1, where a voxel has the value of one, else 0."""
    values = np.array([one.value for one in structures], np.int64)
    order = np.argsort(values)
    largest = int(labels.max())
    if largest < 1 << 16:
        table = np.zeros(1 << 16, np.uint16)
        table[values[values < 1 << 16]] = np.flatnonzero(values < 1 << 16) + 1
        small: NDArray[np.uint16] = table[labels]
        return small
    numbers = np.zeros(labels.shape, np.uint16)
    for k in range(labels.shape[2]):
        place = np.searchsorted(values[order], labels[..., k]).clip(0, len(values) - 1)
        numbers[..., k] = np.where(values[order[place]] == labels[..., k], order[place] + 1, 0)
    return numbers


def label_boxes(labels: NDArray[Any], structures: Sequence[Structure]) -> dict[int, tuple[slice, slice, slice]]:
    """The box of the voxels of each label value; values without voxels have none."""
    from scipy import ndimage

    # The axis that lies closest in memory comes last there: else the search strides through all of it.
    found = ndimage.find_objects(label_numbers(labels, structures).transpose(2, 1, 0))
    return {one.value: box[::-1] for one, box in zip(structures, found, strict=False) if box is not None}


def structures_in(volume: Volume) -> tuple[Structure, ...]:
    """Names and colours of a label map that was read from DICOM."""
    table = {} if volume.source is None else volume.source.label_table
    return tuple(
        Structure(value, entry.name, entry.color or palette_color(n))
        for n, (value, entry) in enumerate(sorted(table.items()))
    )


def _numbered(masks: Sequence[StructureMask]) -> tuple[list[StructureMask], list[str]]:
    """Numbers that can be label values: above 0, each once, in 16 bits."""
    used: set[int] = set()
    kept: list[StructureMask] = []
    changed = []
    for one in masks:
        number = one.number
        if not 0 < number < 1 << 16 or number in used:
            taken = used | {other.number for other in masks}
            number = next(n for n in range(1, 1 << 16) if n not in taken)
            changed.append(f"{one.name} ({one.number} to {number})")
        used.add(number)
        kept.append(replace(one, number=number))
    return kept, [f"numbers that cannot be label values were changed: {listed(changed, 6)}"] if changed else []


def _near(wanted: str, names: Sequence[str]) -> str:
    by_plain = {plain_name(name): name for name in names}
    near = [by_plain[one] for one in difflib.get_close_matches(plain_name(wanted), by_plain, n=_NEAREST, cutoff=0.4)]
    return f"the nearest are {listed(near)}" if near else f"there are {listed(sorted(names))}"
