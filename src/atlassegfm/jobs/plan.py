"""Cases of a run: which queries, and where their results go."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import InputError
from ..core.files import check_replaceable
from ..core.image import image_stem
from ..records import RESULT_NAMES
from ..transforms.io import is_transform
from .fingerprint import owner_of

logger = logging.getLogger(__name__)

#: A number of a shard and how many there are, as "3/8".
_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Case:
    """One query."""

    name: str  # of its result folder, see plan_cases
    query: Path
    transform: Path | None = None  # taken instead of registering: query to atlas

    def absolute(self) -> Case:
        """Copy with absolute paths."""
        return Case(self.name, self.query.absolute(), None if self.transform is None else self.transform.absolute())


@dataclass(frozen=True)
class Shard:
    """Part of a cohort: every ``count``-th case by name, beginning with the ``number``-th, from 1 on."""

    number: int
    count: int

    def part_of(self, cases: Sequence[Case]) -> list[Case]:
        """Select the cases of this shard, by name; every case is in one shard."""
        return sorted(cases, key=lambda case: case.name)[self.number - 1 :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str) -> Shard:
    """Parse a shard as the command line gives it, such as "3/8"; InputError if there is no such shard."""
    match = _SHARD.fullmatch(text.strip())
    shard = Shard(0, 0) if match is None else Shard(int(match.group(1)), int(match.group(2)))
    if not 1 <= shard.number <= shard.count:
        raise InputError(f"--shard {text}: expected i/n with i from 1 to n, such as 3/8")
    return shard


def plan_cases(
    queries: Sequence[Path],
    out: Path,
    inputs: Sequence[Path] = (),
    transform: Path | None = None,
    *,
    replace_others: bool = False,
) -> list[Case]:
    """List the cases, checked before anything is computed.

    Each is named after its query; where several would have one name, or a folder holds the result of another scan, the
    names of the query's folders that differ are put before it. ``out``, the folder of all result folders, need not
    exist; ``inputs`` are other files that are read, which no result may overwrite; ``transform`` is that of one query,
    or a folder of results made with ``--keep`` that has one for each. Results of other scans are replaced with
    ``replace_others`` only.

    InputError if no free name is left, a result would overwrite an input or other files, or a query has no transform.
    """
    cases = _named_cases(queries, out, replace_others)
    if transform is not None:
        cases = [replace(case, transform=_transform_of(case, len(cases), transform)) for case in cases]
        inputs = (*inputs, *(case.transform for case in cases if case.transform is not None))
    root, by_name = os.path.realpath(out), {case.name: case for case in cases}
    for path in (*(case.query for case in cases), *inputs):
        inside = Path(os.path.relpath(os.path.realpath(path), root)).parts
        if inside and inside[0] in by_name:
            case = by_name[inside[0]]
            raise InputError(
                f"{path}: would be overwritten, as the result of {case.query} goes to {out / case.name}; "
                "choose another output folder"
            )
    exists = out.exists()
    for case in cases:
        if exists and root == os.path.realpath(case.query):
            raise InputError(f"{out}: is the query and would be overwritten; choose another output folder")
        check_replaceable(out / case.name, RESULT_NAMES)
    return cases


def _named_cases(queries: Sequence[Path], out: Path, replace_others: bool) -> list[Case]:
    groups: dict[str, list[Path]] = {}
    for query in queries:
        groups.setdefault(_stem(query).casefold(), []).append(query)
    short = {query: name for group in groups.values() for query, name in zip(group, _distinct(group), strict=True)}
    taken, cases = {name.casefold() for name in short.values()}, []
    for query in queries:
        name, stem = short[query], _stem(query)
        names = [name, stem, *("_".join((*folders, stem)) for folders in _folders_above(query))]
        earlier = next((one for one in names if owner_of(out / one, query) == "this"), None)
        if earlier is None and not replace_others:
            free = (one for one in names[2:] if one.casefold() not in taken)
            while owner_of(out / name, query) == "other":
                logger.warning("%s: %s holds the result of another scan, which is kept", query, out / name)
                name = next(free, "")
                if not name:
                    raise InputError(
                        f"{query}: {out / stem} holds the result of another scan; choose another output folder, or "
                        "replace it with --force"
                    )
        name = earlier if earlier is not None and (earlier == name or earlier.casefold() not in taken) else name
        taken.add(name.casefold())
        cases.append(Case(name, query))
    return cases


def _stem(query: Path) -> str:
    stem = (query.name or query.resolve().name) if query.is_dir() else image_stem(query)
    if not stem:
        raise InputError(f"{query}: the file has no name before its ending; rename it")
    return stem


def _folders_above(query: Path) -> list[tuple[str, ...]]:
    """The last folder of a path, the last two, and so on."""
    parts = Path(os.path.normpath(query.absolute())).parts[1:-1]  # links are kept: their names are the user's
    return [parts[-count:] for count in range(1, len(parts) + 1)]


def _distinct(group: Sequence[Path]) -> list[str]:
    """Names for queries of one name: the folders that differ are put before it, as few as tell them apart."""
    stems = [_stem(query) for query in group]
    if len(group) == 1:
        return stems
    above = [_folders_above(query) for query in group]
    for count in range(1, max(map(len, above), default=0) + 1):
        folders = [(("",) * count + (ways[-1] if ways else ()))[-count:] for ways in above]
        differ = [len({one[place] for one in folders}) > 1 for place in range(count)]
        kept = [[part for part, differs in zip(one, differ, strict=True) if differs and part] for one in folders]
        names = ["_".join((*parts, stem)) for parts, stem in zip(kept, stems, strict=True)]
        if len({name.casefold() for name in names}) == len(names):
            return names
    # Files of one folder that differ in their endings.
    names = [query.name.replace(".", "_") for query in group]
    if len({name.casefold() for name in names}) < len(names):
        raise InputError(f"{group[0]} and {group[1]}: their results would have the same name; rename one")
    return names


def _transform_of(case: Case, count: int, given: Path) -> Path:
    """Find the transform of a query: the one given, or its own in a folder of results."""
    if not given.exists():
        raise InputError(f"{given}: no such file or folder; expected a saved transform")
    if is_transform(given):
        if count > 1:
            raise InputError(
                f"{given}: one transform for {count} queries, and each needs its own; give one query, or a folder "
                "of results made with --keep"
            )
        return given
    belonging = given / case.name / "transform"
    if not is_transform(belonging):
        raise InputError(
            f"{given}: no transform for {case.query}; expected {belonging} (in a folder of results made with "
            "--keep), or give a transform folder or file"
        )
    return belonging
