"""Cases of a run: which queries, and where their results go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import InputError
from ..core.files import check_replaceable
from ..core.image import image_stem
from ..records import RESULT_NAMES
from ..transforms.io import is_transform

#: A number of a shard and how many there are, as "3/8".
_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Case:
    """One query.

    Parameters
    ----------
    name : str
        Of its result folder: the query's file name without its ending.
    query : Path
    transform : Path or None
        Taken instead of registering: query to atlas.
    """

    name: str
    query: Path
    transform: Path | None = None

    def absolute(self) -> Case:
        """The same with absolute paths."""
        return Case(self.name, self.query.absolute(), None if self.transform is None else self.transform.absolute())


@dataclass(frozen=True)
class Shard:
    """Part of a cohort: every ``count``-th case by name, beginning with the ``number``-th, from 1 on."""

    number: int
    count: int

    def part_of(self, cases: Sequence[Case]) -> list[Case]:
        """The cases of this shard, by name; every case is in one shard."""
        return sorted(cases, key=lambda case: case.name)[self.number - 1 :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str) -> Shard:
    """Parse a shard as the command line gives it, such as "3/8".

    Raises
    ------
    InputError
        If it is anything else, or there is no such shard.
    """
    match = _SHARD.fullmatch(text.strip())
    shard = Shard(0, 0) if match is None else Shard(int(match.group(1)), int(match.group(2)))
    if not 1 <= shard.number <= shard.count:
        raise InputError(f"--shard {text}: expected i/n with i from 1 to n, such as 3/8")
    return shard


def plan_cases(
    queries: Sequence[Path], out: Path, inputs: Sequence[Path] = (), transform: Path | None = None
) -> list[Case]:
    """List the cases, checked before anything is computed.

    Parameters
    ----------
    queries : sequence of Path
        The scans.
    out : Path
        Folder of all result folders; need not exist.
    inputs : sequence of Path
        Other files that are read, which no result may overwrite.
    transform : Path, optional
        A transform for one query, or a folder of results made with ``--keep`` that has one for each.

    Raises
    ------
    InputError
        If two results would go to one folder, a result would overwrite an input or a folder with other files in it, or
        a query has no transform.
    """
    cases: dict[str, Case] = {}
    for query in queries:
        stem = (query.name or query.resolve().name) if query.is_dir() else image_stem(query)
        if not stem:
            raise InputError(f"{query}: the file has no name before its ending; rename it")
        if stem in cases:
            raise InputError(
                f"{query}: its result would go to {out / stem}, as that of {cases[stem].query}; "
                "rename one, or segment them in two calls"
            )
        cases[stem] = Case(stem, query)
    if transform is not None:
        cases = {
            stem: replace(case, transform=_transform_of(case, len(cases), transform)) for stem, case in cases.items()
        }
        inputs = (*inputs, *(case.transform for case in cases.values() if case.transform is not None))
    root = out.resolve()
    for path in (*(case.query for case in cases.values()), *inputs):
        found = path.resolve()
        inside = found.relative_to(root).parts if found.is_relative_to(root) else ()
        if inside and inside[0] in cases:
            case = cases[inside[0]]
            raise InputError(
                f"{path}: would be overwritten, as the result of {case.query} goes to {out / case.name}; "
                "choose another output folder"
            )
    exists = out.exists()
    for case in cases.values():
        if exists and root == case.query.resolve():
            raise InputError(f"{out}: is the query and would be overwritten; choose another output folder")
        check_replaceable(out / case.name, RESULT_NAMES)
    return list(cases.values())


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
